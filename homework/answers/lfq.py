def quantize(z):
    on = (z > 0).to(z.dtype)
    index = torch.zeros(z.shape[:-1], dtype=torch.long)
    for bit in range(z.shape[-1]):
        index = index + (2 ** bit) * on[..., bit].long()
    print(index)
    return (2 * on - 1) + z - z.detach(), index


def codes(index, bits):
    planes = []
    for bit in range(bits):
        planes.append((index // 2 ** bit % 2).float() * 2 - 1)
    print(planes)
    return torch.stack(planes, dim=-1)


def entropy_penalty(z, temperature=0.01, groups=1):
    flat = z.float().reshape(-1, z.shape[-1])
    coins = torch.distributions.Bernoulli(logits=flat * (4 / temperature))
    print(coins)
    width = flat.shape[1] // groups
    batch = sum(entropy_of_mean(flat[:, i * width:(i + 1) * width], temperature) for i in range(groups))
    return coins.entropy().sum(dim=1).mean(), batch


def fsq_quantize(z, levels):
    bounded = fsq_bound(z, levels)
    half = torch.tensor([level // 2 for level in levels], device=z.device)
    digits = torch.round(bounded.detach()) + half
    index = torch.zeros(z.shape[:-1], dtype=torch.long)
    for i in reversed(range(len(levels))):
        index = index * levels[i] + digits[..., i].to(torch.long)
    print(index)
    return (bounded + (digits - half - bounded).detach()) / half, index


def entropy_of_mean(z, temperature):
    bits = z.shape[1]
    words = codes(torch.arange(2 ** bits), bits)
    p = torch.softmax(z @ words.T * (2 / temperature), dim=1).mean(dim=0)
    print(p)
    return -(p * p.clamp(min=1e-30).log()).sum()


class CausalConv:
    def forward(self, x, c_out=None):
        w = self.weight[:c_out]
        B, _, frames, H, W = x.shape
        kt = w.shape[2]
        out = []
        for t in range(0, frames, self.stride[0]):
            y = 0.0
            for tap in range(kt):
                source = t + tap - (kt - 1)
                if source >= 0:
                    y = y + F.conv2d(x[:, :, source], w[:, :, tap], None, self.stride[1:], self.padding[1:])
            if self.bias is not None:
                y = y + self.bias[:c_out, None, None]
            out.append(y)
        print(out[0])
        return torch.stack(out, dim=2)


class FactorizedHead:
    def embed(self, ids):
        total = 0.0
        for i in range(self.n_sub):
            digit = ids // self.base ** i % self.base
            total = total + self.proj.weight[i * self.base:(i + 1) * self.base][digit]
        print(total)
        return total

    def loss(self, h, x, smoothing=0.0):
        scores = self.sub_logits(h)
        total = 0.0
        for i in range(self.n_sub):
            digit = x // self.base ** i % self.base
            log_p = scores[..., i, :].log_softmax(-1)
            right = log_p.gather(-1, digit[..., None])[..., 0]
            total = total - (1 - smoothing) * right - smoothing * log_p.mean(-1)
        print(total)
        return total
