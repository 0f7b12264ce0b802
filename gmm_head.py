"""
A Gaussian mixture head: the output layer of GIVT, on its own.

A language model ends in a softmax, so its next token must come from a finite list. GIVT (Tschannen et al. 2023,
https://arxiv.org/abs/2312.02116) keeps the transformer and swaps that one layer, so that the next token may be any
real vector. Each hidden state h gives a mixture of K Gaussians with diagonal covariance, and training maximises the
likelihood of the true token x:

    p(x | h) = sum_k pi_k(h) * prod_d Normal(x_d; mu_kd(h), sigma_kd(h))

Shapes:  B batch, T tokens, C width of h, K mixture components (n_mix), D numbers in one token

    h (B, T, C) --Linear--> log_pi (B, T, K)  mu (B, T, K, D)  sigma (B, T, K, D)
    the Linear's K + 2KD outputs are laid out as in the authors' code: [K logits] [K x (D means, D scales)]

    python gmm_head.py         # 2-D toy tokens and an exact optimum, writes gmm_head.png; about 20 s on 2 CPU cores

Try it yourself:
  1. Run with --n_mix 1. Why is the ring filled in? What does that say about a plain MSE loss?
  2. Zero the head at the start, as the authors' code does (nn.init.zeros_ on proj.weight and proj.bias): all K
     components then get the same gradient for ever. Compare the nll of K = 32 with that of K = 1.
  3. Reverse the three lists of u in draw_tricks(), the same density: which samplers change at w = 3, and why?
"""
import argparse
import math
import time

import torch
import torch.nn as nn


def square_plus(s):
    """(s + sqrt(s^2 + 4)) / 2: positive, smooth, 1 at 0, like softplus but growing and decaying without exp.

    From GIVT's code, whose class default misplaces the bracket (all its shipped configurations repair it).
    """
    return (s + torch.sqrt(s * s + 4)) / 2


def log_normal(x, mu, sigma):
    """log Normal(x; mu, sigma) in nats, elementwise: -(x - mu)^2 / (2 sigma^2) - log sigma - log(2 pi) / 2."""
    z = (x - mu) / sigma
    return -0.5 * z * z - sigma.log() - 0.5 * math.log(2 * math.pi)


def normal_noise(like, clip=None):
    """Standard normal noise of like's shape; with clip, truncated to [-clip, clip] by the inverse cdf (not clamped,
    which would pile mass on the two ends). GIVT's paper speaks of truncated sampling; its code has none."""
    if clip is None:
        return torch.randn_like(like)
    u = 2 * torch.rand_like(like) - 1
    return (2 ** 0.5 * torch.erfinv(u * math.erf(clip / 2 ** 0.5))).clamp(-clip, clip)      # the clamp: erf(6) is 1


def guided_normal(mc, sc, mu, su, cfg):
    """N(mc, sc)^cfg N(mu, su)^(1 - cfg) is again a Gaussian -> mean, std, proper (bool), elementwise.

    Its precision, in units of 1 / sc^2, is lam = cfg - (cfg - 1) sc^2 / su^2. Where the unconditional Gaussian is so
    narrow that lam <= 0 the product grows without bound and is no density: that channel then stays unguided,
    N(mc, sc), and so it does up to lam = 0.01, where the mean would be flung away by 100 (cfg - 1) (mc - mu).
    """
    ratio = (sc / su) ** 2
    lam = cfg - (cfg - 1) * ratio
    proper = lam > 0.01
    lam = torch.where(proper, lam, 1.0)
    return mc + torch.where(proper, (cfg - 1) * ratio * (mc - mu) / lam, 0.0), sc / lam.sqrt(), proper


class GMMHead(nn.Module):
    """p(x | h) as a mixture of n_mix diagonal Gaussians. h (..., C), x (..., D), any leading shape.

    min_scale is the floor of sigma: a component that shrinks onto one point would make p(x) infinite. The authors
    use 1e-6; our tokens are drawn from a posterior, never points, so a higher floor costs nothing and is safer.
    """

    def __init__(self, n_embd, token_dim, n_mix=16, min_scale=1e-3):
        super().__init__()
        self.n_mix, self.token_dim, self.min_scale = n_mix, token_dim, min_scale
        self.proj = nn.Linear(n_embd, n_mix * (1 + 2 * token_dim))
        # Not zero, unlike the authors' released code: equal components get equal gradients and stay equal.
        # The means start spread over N(0, 1), where unit-variance tokens live; the scales start at 1.
        nn.init.normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)
        with torch.no_grad():
            self.proj.bias[n_mix:].view(n_mix, 2, token_dim)[:, 0].normal_()

    def split(self, raw):
        """Raw outputs (..., K + 2KD) -> log_pi (..., K), normalised; mu (..., K, D); sigma (..., K, D) >= min_scale."""
        raw = raw.float()
        logits = raw[..., :self.n_mix]
        mu, s = raw[..., self.n_mix:].unflatten(-1, (self.n_mix, 2, self.token_dim)).unbind(-2)
        return logits.log_softmax(-1), mu, square_plus(s).clamp(min=self.min_scale)

    def mixture(self, h):
        """The mixture after state h (..., C) -> log_pi (..., K), mu (..., K, D), sigma (..., K, D), float32."""
        return self.split(self.proj(h))

    @staticmethod
    def density(mixture, x):
        """log p(x) in nats under (log_pi, mu, sigma): x (..., D) -> (...).

        One Gaussian: sum_d [ -(x_d - mu_d)^2 / (2 sigma_d^2) - log sigma_d - log(2 pi) / 2 ].
        All K of them: logsumexp_k( log_pi_k + log N_k ), since exp(log N_k) underflows in 16 dimensions.
        """
        log_pi, mu, sigma = mixture
        z = (x.float().unsqueeze(-2) - mu) / sigma                                          # (..., K, D)
        log_n = -0.5 * (z * z).sum(-1) - sigma.log().sum(-1) - 0.5 * math.log(2 * math.pi) * x.shape[-1]
        return torch.logsumexp(log_pi + log_n, dim=-1)                                      # (...)

    def log_prob(self, h, x):
        """log p(x | h) in nats, one number per token: h (..., C), x (..., D) -> (...). GIVT section 3.2."""
        return self.density(self.mixture(h), x)

    def loss(self, h, x):
        """Negative log-likelihood in nats per token, not reduced: h (..., C), x (..., D) -> (...)."""
        return -self.log_prob(h, x)

    @staticmethod
    def choose(log_pi, n=()):
        """Draw component indices, by the Gumbel-max trick: log_pi (..., K) -> (*n, ...) int64."""
        u = torch.rand(*n, *log_pi.shape, device=log_pi.device).clamp(1e-20, 1 - 1e-7)
        return (log_pi - torch.log(-torch.log(u))).argmax(-1)

    @staticmethod
    def pick(a, k):
        """The chosen component's row: a (..., K, D), k (*n, ...) -> (*n, ..., D)."""
        k = k[..., None, None].expand(*k.shape, 1, a.shape[-1])
        return a.expand(*k.shape[:-2], *a.shape[-2:]).gather(-2, k).squeeze(-2)

    @staticmethod
    def draw(mixture, temperature=1.0, n=(), clip=None):
        """Draw from (log_pi, mu, sigma): -> x (*n, ..., D). temperature multiplies every sigma; with clip, every
        channel stays within clip (tempered) sigmas of its component's mean."""
        log_pi, mu, sigma = mixture
        k = GMMHead.choose(log_pi, n)                                                       # (*n, ...)
        mu, sigma = GMMHead.pick(mu, k), GMMHead.pick(sigma, k)                             # (*n, ..., D)
        return mu + temperature * sigma * normal_noise(mu, clip)

    @staticmethod
    def nucleus(mixture, top_p):
        """Keep the smallest set of components whose weights sum to at least top_p, and renormalise -> mixture."""
        log_pi, mu, sigma = mixture
        pi, order = log_pi.exp().sort(-1, descending=True)
        drop = pi.cumsum(-1) - pi >= top_p                  # those before it suffice; never true for the first
        drop = drop.scatter(-1, order, drop)
        return log_pi.masked_fill(drop, -torch.inf).log_softmax(-1), mu, sigma

    @staticmethod
    def guide(c, u, cfg):
        """p_c^cfg p_u^(1 - cfg) as a mixture again -> mixture. Exact for K = 1; K > 1 is Gaussian piece by piece:

        component j of c meets the one Gaussian with the moments of u near it (u's components weighted by how much
        they overlap j), guided_normal gives its new mean and sigma, and its new weight makes the pieces right at
        their means: pi'_j = pi_j (p_c / p_u)^(cfg - 1) N_j / N'_j. The order of the components plays no role (GIVT
        pairs component j with component j and keeps pi: permuting u, the same density, changes its samples).
        Builds (..., K, K, D), 270 MB for 256 x 64 tokens with K = D = 16, where sampling takes 1.2 GB at most.
        """
        (log_pi, mc, sc), (log_pu, mu, su) = c, u
        gap = mu.unsqueeze(-3) - mc.unsqueeze(-2)                                           # (..., K of c, K of u, D)
        var = sc.unsqueeze(-2) ** 2 + su.unsqueeze(-3) ** 2
        overlap = -0.5 * (var.log().sum(-1) + var.reciprocal_().mul_(gap).mul_(gap).sum(-1))  # in place: the peak of memory
        near = (log_pu.unsqueeze(-2) + overlap).softmax(-1)                                 # (..., K, K)
        shift = (near.unsqueeze(-2) @ gap).squeeze(-2)                                      # (..., K, D)
        gap = gap.sub_(shift.unsqueeze(-2)).square_()
        var = (near.unsqueeze(-2) @ gap).squeeze(-2) + near @ su ** 2
        del gap
        mean, std, _ = guided_normal(mc, sc, mc + shift, var.sqrt(), cfg)
        log_c, log_u = (GMMHead.density((a.unsqueeze(-2), b.unsqueeze(-3), s.unsqueeze(-3)), mean) for a, b, s in (c, u))
        ratio = (log_normal(mean, mc, sc) - log_normal(mean, mean, std)).sum(-1)
        return (log_pi + (cfg - 1) * (log_c - log_u) + ratio).log_softmax(-1), mean, std

    @staticmethod
    def envelope(mc, sc, mu, su, cfg, official=False):
        """For rejection, per channel: p = N(mc, sc)^cfg N(mu, su)^(1 - cfg) lies under bound * N(mc, scale)
        -> scale, log bound. The proposal must be wider than p and reach its mean; log p - log q is then a parabola,
        whose top is exact. official: the authors' N(mc, 2 max(sc, su)) and a grid maximum of p(x) / q(mc), which is
        too small away from mc (cfg 4, means 3 apart: samples have mean -4.9, p has -6.4).
        """
        log_p = lambda x: cfg * log_normal(x, mc, sc) + (1 - cfg) * log_normal(x, mu, su)
        if official:
            scale = 2 * torch.maximum(sc, su)
            grid = torch.linspace(-10, 10, 1001, device=mc.device).view(-1, *[1] * mc.ndim)
            bound = log_p(mc + grid).amax(0) - log_normal(mc, mc, scale)
            return scale, bound.masked_fill(bound > 88.72, torch.inf)                       # where their float32 overflows
        mean, std, proper = guided_normal(mc, sc, mu, su, cfg)
        scale = 2 * torch.maximum(sc, std) + (mean - mc).abs()
        top = mean + (mean - mc) * std ** 2 / (scale ** 2 - std ** 2)
        bound = log_p(top) - log_normal(top, mc, scale)
        return scale, torch.where(proper, bound, torch.inf)

    @staticmethod
    def accept(x, u, mc, sc, mu, su, cfg, scale, log_bound):
        """Which proposals x, with u uniform in [0, 1), fall under p -> bool. An infinite bound accepts none."""
        log_p = cfg * log_normal(x, mc, sc) + (1 - cfg) * log_normal(x, mu, su)
        return u.log() + log_bound + log_normal(x, mc, scale) < log_p

    @staticmethod
    def first_accepted(proposals, accepted, fallback):
        """proposals, accepted (N, ...) -> the first accepted of each, or fallback (...) where there is none."""
        first = accepted.int().argmax(0, keepdim=True)                                      # argmax: the first maximum
        return torch.where(accepted.any(0), proposals.gather(0, first).squeeze(0), fallback)

    @staticmethod
    def draw_rejection(c, u, cfg, n_tries, clip=None, official=False):
        """GIVT's sampler -> x (..., D): choose component j by c's weights, then reject every channel by itself
        against components j of c and u. A channel without an accepted try is drawn from N(mc, sc)."""
        k = GMMHead.choose(c[0])
        pair = [GMMHead.pick(a, k) for a in (*c[1:], *u[1:])]                               # mc, sc, mu, su (..., D)
        mc, sc = pair[:2]
        scale, log_bound = GMMHead.envelope(*pair, cfg, official)
        x = mc + scale * torch.randn(n_tries, *mc.shape, device=mc.device)                  # (n_tries, ..., D)
        accepted = GMMHead.accept(x, torch.rand_like(x), *pair, cfg, scale, log_bound)
        if clip is not None:
            mean, std, _ = guided_normal(*pair, cfg)
            accepted &= (x - mean).abs() <= clip * std
        return GMMHead.first_accepted(x, accepted, mc + sc * normal_noise(mc, clip))

    @staticmethod
    def draw_guided(c, u, cfg, guidance="importance", top_p=1.0, clip=None, n_tries=None):
        """Draw from p_c^cfg p_u^(1 - cfg), given two mixtures -> x (..., D). The four ways: see sample."""
        if guidance in ("rejection", "official"):
            n_tries = n_tries or dict(rejection=128, official=1000)[guidance]
            return GMMHead.draw_rejection(GMMHead.nucleus(c, top_p), u, cfg, n_tries, clip, guidance == "official")
        if guidance not in ("closed", "importance"):
            raise ValueError(f"guidance {guidance!r} must be closed, importance, rejection or official")
        guided = GMMHead.guide(c, u, cfg)
        kept = GMMHead.nucleus(guided, top_p)
        if guidance == "closed":
            return GMMHead.draw(kept, clip=clip)
        many = GMMHead.draw(kept, n=(n_tries or 8,), clip=clip)                             # (N, ..., D)
        log_w = [cfg * GMMHead.density(c, x) + (1 - cfg) * GMMHead.density(u, x) - GMMHead.density(guided, x) for x in many]
        weights = torch.stack(log_w).softmax(0)             # (N, ...); one try at a time, so that memory does not grow
        best = torch.multinomial(weights.flatten(1).T, 1).T.view(1, *weights.shape[1:], 1)  # (1, ..., 1)
        return many.gather(0, best.expand(1, *many.shape[1:])).squeeze(0)                   # (..., D)

    @torch.no_grad()
    def sample(self, h, h_uncond=None, cfg=1.0, temperature=1.0, top_p=1.0, clip=None, guidance="importance",
               n_tries=None):
        """Draw one token per position: h (..., C) -> x (..., D), log p(x | h) (...).

        temperature  multiplies sigma (GIVT's "variance scaling"), in both mixtures under guidance
        cfg          with h_uncond and cfg != 1, x follows p(x | h)^cfg p(x | h_uncond)^(1 - cfg), up to a constant
        top_p        then keeps the likeliest components whose weights sum to top_p,
        clip         and each channel within clip sigmas of its component's mean (a truncated normal).
        The log p returned is the model's own, at temperature 1, neither guided nor truncated, so that confidences and
        beams mean the same under every trick; it is not the density x was drawn from.

        guidance says how: "closed" draws from guide()'s mixture. "importance" draws n_tries (8) tokens from it and
        keeps one with probability in proportion to target / guide(), which mends what guide() approximates.
        "rejection" is GIVT's per-component sampler (n_tries 128) made valid, "official" theirs as released (1000).
        Measured, K = D = 8, pairs of mixtures as one network gives them (u's components moved, narrowed, reweighted):
        error of the mean in the target's sigmas at cfg 2 | 4 (0.026 is sampling noise), ms for 512 tokens on one core:

            closed       0.03 | 0.20     8        importance      0.03 | 0.10   14 (32 tries: 0.06 at cfg 4, 27 ms)
            rejection    0.36 | 1.08    16        32 draws of p(x | h), reweighted by the ratio:   0.04 | 0.29

        So importance is the default. Rejection is exact for K = 1; its error here is the pairing by index.
        """
        model = self.mixture(h)
        cooled = lambda mixture: (*mixture[:2], mixture[2] * temperature)
        if h_uncond is None or cfg == 1.0:
            x = self.draw(self.nucleus(cooled(model), top_p), clip=clip)
        else:
            x = self.draw_guided(cooled(model), cooled(self.mixture(h_uncond)), cfg, guidance, top_p, clip, n_tries)
        return x, self.density(model, x)


class ChannelGMMHead(GMMHead):
    """One mixture per channel, p(x | h) = prod_d sum_k pi_dk Normal(x_d; mu_dk, sigma_dk): GIVT's dense prediction.

    A token of D channels is treated as D tokens of one channel, so GMMHead's density, draw and guidance serve as they
    are. The Linear's 3DK outputs are the authors' [3D, K]: D rows of logits, D of means, D of scales.
    """

    def __init__(self, n_embd, token_dim, n_mix=16, min_scale=1e-3):
        super().__init__(n_embd, 1, n_mix, min_scale)
        self.token_dim, self.proj = token_dim, nn.Linear(n_embd, 3 * token_dim * n_mix)
        nn.init.normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)
        with torch.no_grad():
            self.proj.bias.view(3, token_dim, n_mix)[1].normal_()

    def split(self, raw):
        """Raw outputs (..., 3DK) -> log_pi (..., D, K), mu (..., D, K, 1), sigma (..., D, K, 1)."""
        logits, mu, s = raw.float().unflatten(-1, (3, self.token_dim, self.n_mix)).unbind(-3)
        return logits.log_softmax(-1), mu.unsqueeze(-1), square_plus(s).clamp(min=self.min_scale).unsqueeze(-1)

    def log_prob(self, h, x):
        """log p(x | h) in nats per token, the sum over channels (the authors' loss is the mean over them)."""
        return self.density(self.mixture(h), x.unsqueeze(-1)).sum(-1)

    @torch.no_grad()
    def sample(self, h, *args, **tricks):
        """As GMMHead.sample, which see, with every trick applied to each channel's own mixture."""
        x, log_p = super().sample(h, *args, **tricks)                                       # (..., D, 1), (..., D)
        return x.squeeze(-1), log_p.sum(-1)


class FullGaussianHead(nn.Module):
    """One Gaussian with full covariance: x = mean + L noise, L lower triangular with a positive diagonal.

    The Linear's D^2 + D outputs are the authors' [D x D factor by rows, D means]. They put square_plus on the whole
    factor, so its off-diagonals are positive and, for D = 2, no negative correlation can be expressed; official=True
    does that. Ours has square_plus on the diagonal only.
    """

    def __init__(self, n_embd, token_dim, n_mix=1, min_scale=1e-3, official=False):
        super().__init__()
        if n_mix != 1:
            raise ValueError(f"full covariance is for one component: n_mix must be 1, not {n_mix}")
        self.n_mix, self.token_dim, self.min_scale, self.official = 1, token_dim, min_scale, official
        self.proj = nn.Linear(n_embd, token_dim * (token_dim + 1))
        nn.init.normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)

    def gaussian(self, h):
        """h (..., C) -> mean (..., D), factor (..., D, D), float32."""
        raw = self.proj(h).float()
        factor, mean = raw.split([self.token_dim ** 2, self.token_dim], -1)
        factor = factor.unflatten(-1, (self.token_dim, self.token_dim))
        positive = square_plus(factor).clamp(min=self.min_scale)
        if self.official:
            return mean, positive.tril()
        return mean, factor.tril(-1) + torch.diag_embed(positive.diagonal(dim1=-2, dim2=-1))

    @staticmethod
    def density(gaussian, x):
        """log p(x) in nats: x (..., D) -> (...). With z = L^-1 (x - mean): -z^2 / 2 - log det L - D log(2 pi) / 2."""
        mean, factor = gaussian
        z = torch.linalg.solve_triangular(factor, (x.float() - mean).unsqueeze(-1), upper=False).squeeze(-1)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (z * z).sum(-1) - log_det - 0.5 * math.log(2 * math.pi) * x.shape[-1]

    def log_prob(self, h, x):
        """log p(x | h) in nats, one number per token: h (..., C), x (..., D) -> (...)."""
        return self.density(self.gaussian(h), x)

    def loss(self, h, x):
        """Negative log-likelihood in nats per token, not reduced: h (..., C), x (..., D) -> (...)."""
        return -self.log_prob(h, x)

    @staticmethod
    def guide(c, u, cfg):
        """The closed form with matrices: precision P = cfg P_c - (cfg - 1) P_u, mean P^-1 (cfg P_c m_c - ...) ->
        mean, factor. A token whose P is not positive definite stays unguided."""
        eye = torch.eye(c[0].shape[-1], device=c[0].device).expand_as(c[1])
        inverse = [torch.linalg.solve_triangular(factor, eye, upper=False) for _, factor in (c, u)]
        p_c, p_u = (cfg * inverse[0].mT @ inverse[0], (cfg - 1) * inverse[1].mT @ inverse[1])
        root, failed = torch.linalg.cholesky_ex(p_c - p_u)                                  # P = R R^T
        failed = (failed > 0)[..., None, None]
        root = torch.where(failed, eye, root)
        shift = torch.cholesky_solve(p_u @ (c[0] - u[0]).unsqueeze(-1), root).squeeze(-1)   # from m_c
        # x = R^-T noise has covariance P^-1. R^-T is upper triangular, which draws as well as a lower one.
        factor = torch.linalg.solve_triangular(root.mT, eye, upper=True)
        return c[0] + torch.where(failed[..., 0], 0.0, shift), torch.where(failed, c[1], factor)

    @torch.no_grad()
    def sample(self, h, h_uncond=None, cfg=1.0, temperature=1.0, clip=None):
        """Draw one token per position -> x (..., D), log p(x | h) (...). Guidance is always the closed form; clip
        bounds each number of the noise before L mixes them; with one component top_p has nothing to choose."""
        model = self.gaussian(h)
        mean, factor = model
        if h_uncond is not None and cfg != 1.0:
            mean, factor = self.guide(model, self.gaussian(h_uncond), cfg)
        x = mean + temperature * (factor @ normal_noise(mean, clip).unsqueeze(-1)).squeeze(-1)
        return x, self.density(model, x)


HEADS = {"vector": GMMHead, "channel": ChannelGMMHead, "full": FullGaussianHead}            # train.py --mix


# ---------------------------------------------------------------------------------------------------
# Demo: classes of 2-D tokens. A transformer would turn (class, earlier tokens) into h; here a lookup
# table does, so everything that is learned about the shape of each class is learned by the head.

def toy_tokens(label):
    """label (N,) in {0, 1, 2, 3} -> x (N, 2): a ring, a spiral, a checkerboard, eight Gaussians on a circle."""
    u, v = torch.rand(2, len(label), device=label.device)
    circle = lambda angle: torch.stack([angle.cos(), angle.sin()], -1)
    ring = 1.5 * circle(2 * math.pi * u)
    spiral = circle(4 * math.pi * u) * (0.2 + 1.6 * u)[:, None]
    column, row = (4 * u).floor(), (2 * v).floor()
    board = torch.stack([4 * u - 2, 2 * row + column % 2 + torch.rand_like(v) - 2], -1)
    eight = 1.5 * circle((8 * u).floor() * math.pi / 4) + 0.1 * torch.randn_like(ring)
    thick = 0.05 * torch.randn_like(ring)
    return torch.stack([ring + thick, spiral + thick, board, eight], 1)[torch.arange(len(label), device=label.device), label]


def fit_toy(n_mix, steps, device, classes=4, batch_size=1024):
    """Train a lookup table and a head on toy_tokens -> table, head, held-out nll per class in nats (a tensor)."""
    table = nn.Embedding(classes, 64).to(device)
    head = GMMHead(64, token_dim=2, n_mix=n_mix).to(device)
    opt = torch.optim.Adam([*table.parameters(), *head.parameters()], lr=2e-2)
    for step in range(steps):
        opt.param_groups[0]["lr"] = 2e-2 * (1 - step / steps)
        label = torch.arange(batch_size, device=device) % classes
        loss = head.loss(table(label), toy_tokens(label)).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    label = torch.arange(classes, device=device).repeat_interleave(20_000)
    with torch.no_grad():
        nll = head.loss(table(label), toy_tokens(label)).view(classes, -1).mean(1)
    return table, head, nll


def draw_tricks(axes, n=10_000):
    """Six panels about one channel: what temperature, top_p and clip do to a mixture, and four guidance samplers
    against the guided density, integrated numerically. Prints the error of each sampler's mean and std."""
    mixture = lambda pi, mu, sigma: (torch.tensor(pi).log(), torch.tensor(mu)[:, None], torch.tensor(sigma)[:, None])
    c = mixture([0.5, 0.35, 0.15], [-1.5, 0.3, 2.2], [0.5, 0.6, 0.3])
    u = mixture([0.3, 0.69, 0.01], [-1.5, 0.5, 0.0], [0.9, 1.8, 1.6])
    grid = torch.linspace(-12, 12, 6001)[:, None]
    fine, bins = grid[:, 0], torch.linspace(-4, 4, 81)
    many = lambda m: tuple(a.expand(n, *a.shape) for a in m)

    def panel(ax, title, log_p, samples):
        p = log_p.exp() / torch.trapezoid(log_p.exp(), fine)
        ax.fill_between(fine, p, color="0.85", label=title[1])
        heights = [torch.histogram(x.flatten(), bins, density=True)[0] for _, x in samples]
        for (name, _), height in zip(samples, heights):
            ax.stairs(height, bins, label=name, lw=1.1)
        ax.set_title(title[0], fontsize=10)
        ax.set(xlim=(-4, 4), xticks=(-3, 0, 3), yticks=[], xlabel="x")
        ax.set_ylim(0, 1.55 * max(float(h.max()) for h in [p, *heights]))
        ax.legend(fontsize=7, loc="upper left", frameon=False, labelspacing=0.2)
        mean = torch.trapezoid(p * fine, fine)
        return mean, torch.trapezoid(p * (fine - mean) ** 2, fine).sqrt()

    draw = GMMHead.draw
    for ax, name, samples in ((axes[0], "temperature", [("0.5", draw(many(c), 0.5)), ("1.3", draw(many(c), 1.3))]),
                              (axes[1], "top_p (components)", [("0.8", draw(many(GMMHead.nucleus(c, 0.8))))]),
                              (axes[2], "clip (sigmas)", [("1", draw(many(c), clip=1.0)), ("2", draw(many(c), clip=2.0))])):
        panel(ax, (name, "model"), GMMHead.density(c, grid), samples)
    for ax, w in zip(axes[3:], (0.4, 1.0, 3.0)):
        samples = [(way, GMMHead.draw_guided(many(c), many(u), 1 + w, way))
                   for way in ("importance", "closed", "rejection", "official")]
        log_p = (1 + w) * GMMHead.density(c, grid) - w * GMMHead.density(u, grid)
        mean, std = panel(ax, (f"guidance, w = {w:g}", "exact"), log_p, samples)
        print(f"guidance w = {w:g}, exact mean {mean:6.3f} std {std:.3f}:  "
              + "  ".join(f"{way} {x.mean():6.3f} {x.std():.3f}" for way, x in samples))


def main():
    parser = argparse.ArgumentParser(description="Mixtures of K Gaussians on four kinds of 2-D tokens.")
    parser.add_argument("--n_mix", type=int, nargs="+", default=[1, 4, 32], help="values of K, one column each")
    parser.add_argument("--steps", type=int, default=1000, help="training steps for each K")
    args = parser.parse_args()
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    names = ("ring", "spiral", "checkerboard", "eight Gaussians")
    optimum = math.log(8) + 2 * 0.5 * math.log(2 * math.pi * math.e * 0.1**2)               # the eight never overlap
    label = torch.arange(4, device=device).repeat_interleave(2000)
    columns = [("the data", toy_tokens(label))]
    for n_mix in args.n_mix:
        start = time.perf_counter()
        table, head, nll = fit_toy(n_mix, args.steps, device)
        print(f"K = {n_mix:3d}: nll in nats  " + "  ".join(f"{n} {v:.3f}" for n, v in zip(names, nll))
              + f"   ({time.perf_counter() - start:.0f} s)")
        columns.append((f"K = {n_mix}", head.sample(table(label))[0]))
    print(f"lowest possible:             checkerboard {math.log(8):.3f}  eight Gaussians {optimum:.3f}")
    columns.append((f"K = {n_mix}, temperature 0.5", head.sample(table(label), temperature=0.5)[0]))
    other = table(label.roll(2000))                                                         # guide away from another class
    columns.append((f"K = {n_mix}, guidance 1.5", head.sample(table(label), other, cfg=1.5)[0]))

    wide = max(6, len(columns))
    fig, axes = plt.subplots(5, wide, figsize=(2.35 * wide, 11), height_ratios=[1, 1, 1, 1, 1.25], squeeze=False)
    for ax in [*axes[4][6:], *axes[:4, len(columns):].flat]:
        ax.set_axis_off()
    for row in range(4):
        for ax, (title, x) in zip(axes[row], columns):
            x = x.view(4, -1, 2)[row].cpu()
            ax.plot(x[:, 0], x[:, 1], ".", ms=1.2, alpha=0.4)
            ax.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=[], yticks=[], aspect="equal")
            if row == 0:
                ax.set_title(title, fontsize=10)
        axes[row][0].set_ylabel(names[row])
    draw_tricks(axes[4][:6])
    fig.suptitle("gmm_head.py: tokens drawn for four classes (guidance pushes each class away from the one above it); "
                 "below, each trick on one channel")
    fig.tight_layout()
    fig.savefig("gmm_head.png", dpi=72)
    print("wrote gmm_head.png")


if __name__ == "__main__":
    main()
