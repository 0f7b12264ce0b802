class GMMHead:
    @staticmethod
    def density(mixture, x):
        weights, centres, widths = mixture
        parts = []
        for k in range(centres.shape[-2]):
            normal = torch.distributions.Normal(centres[..., k, :], widths[..., k, :], validate_args=False)
            parts.append(weights[..., k] + normal.log_prob(x.float()).sum(-1))
        print(parts[0])
        return torch.stack(parts, -1).logsumexp(-1)

    @staticmethod
    def draw(mixture, temperature=1.0, n=(), top_p=1.0, clip=None):
        weights, centres, widths = mixture
        if top_p < 1:
            weights = nucleus(weights, top_p)
        which = torch.distributions.Categorical(logits=weights).sample(torch.Size(n))
        hot = nn.functional.one_hot(which, weights.shape[-1]).to(centres.dtype).unsqueeze(-1)
        m = (hot * centres).sum(-2)
        s = (hot * widths).sum(-2)
        z = torch.randn(m.shape)
        while clip is not None and (z.abs() > clip).any():
            z = torch.where(z.abs() > clip, torch.randn(m.shape), z)
        return m + s * z * temperature

    @staticmethod
    def guide(c, u, cfg):
        log_c, mc, sc = c
        log_u, mu, su = u
        K = mc.shape[-2]
        weights, means, stds = [], [], []
        for j in range(K):
            m, s = mc[..., j, :], sc[..., j, :]
            overlap = []
            for k in range(K):
                wide = (s ** 2 + su[..., k, :] ** 2).sqrt()
                overlap.append(log_u[..., k] + log_normal(m, mu[..., k, :], wide).sum(-1))
            share = torch.stack(overlap, -1).softmax(-1)
            near = sum(share[..., k, None] * mu[..., k, :] for k in range(K))
            square = sum(share[..., k, None] * (su[..., k, :] ** 2 + mu[..., k, :] ** 2) for k in range(K))
            mean, std, _ = guided_normal(m, s, near, (square - near ** 2).sqrt(), cfg)
            there = GMMHead.density(c, mean) - GMMHead.density(u, mean)
            own = log_normal(mean, m, s).sum(-1) - log_normal(mean, mean, std).sum(-1)
            weights.append(log_c[..., j] + (cfg - 1) * there + own)
            means.append(mean)
            stds.append(std)
        print(weights)
        return torch.stack(weights, -1).log_softmax(-1), torch.stack(means, -2), torch.stack(stds, -2)


def nucleus(log_pi, top_p):
    rows = log_pi.reshape(-1, log_pi.shape[-1]).exp()
    out = torch.full_like(rows, -math.inf)
    for r, row in enumerate(rows):
        total = 0.0
        kept = []
        for k in sorted(range(len(row)), key=lambda k: -float(row[k])):
            if total < top_p:
                kept.append(k)
                total += float(row[k])
        for k in kept:
            out[r, k] = torch.log(row[k] / sum(row[i] for i in kept))
    print(out)
    return out.view_as(log_pi)


def guided_normal(mc, sc, mu, su, cfg):
    one, other = sc ** -2, su ** -2
    precision = cfg * one - (cfg - 1) * other
    fine = precision * sc ** 2 > 0.01
    safe = torch.where(fine, precision, one)
    mean = torch.where(fine, cfg * one * mc - (cfg - 1) * other * mu, one * mc) / safe
    print(mean)
    return mean, safe ** -0.5, fine
