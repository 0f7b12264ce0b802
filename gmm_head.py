"""
A Gaussian mixture head: the output layer of GIVT, on its own.

A language model reads tokens from a table and ends in a softmax, so its tokens must come from a finite list.
GIVT (Tschannen et al. 2023, arxiv.org/abs/2312.02116) keeps the transformer and replaces both ends: a Linear
in place of the table, and in place of the softmax the layer below, after which the next token may be any real
vector. The hidden state h of a position gives a mixture of K Gaussians with diagonal covariance, and training
maximises the likelihood of the true token x:

    p(x | h) = sum_k pi_k(h) * prod_d Normal(x_d; mu_kd(h), sigma_kd(h))

Shapes:  B batch, T tokens, C width of h, K mixture components (n_mix), D numbers in one token

    h (B, T, C) --Linear--> log_pi (B, T, K)  mu (B, T, K, D)  sigma (B, T, K, D)
    the Linear's K + 2KD outputs are laid out as in the authors' code: [K logits] [K x (D means, D scales)]

    python gmm_head.py         # 2-D toy tokens against an exact optimum; writes gmm_head.png; about 20 s

Try it yourself:
  1. Run with --n_mix 1. Why is the ring filled in? What does that say about a plain MSE loss?
  2. Start the head at zero, as the authors' code does (nn.init.zeros_ on proj.weight and proj.bias). All K
     components then get the same gradient for ever. Compare the nll of K = 32 with that of K = 1.
  3. Reverse the three lists of u in draw_tricks(): the same density. Which samplers change at w = 3, and why?
"""
import argparse
import math
import time

import torch
import torch.nn as nn

SIZES = {
    "small": dict(n_mix=8),                                 # the default of train.py
    "givt": dict(n_mix=16, min_scale=1e-6),                 # the paper's, for 16 numbers per token
}


# ---- The mixture: its density, draws, guidance ----------------------------------------------------

def square_plus(s):
    """(s + sqrt(s^2 + 4)) / 2, elementwise: positive, smooth, 1 at 0. Like softplus, but without exp.

    From GIVT's code, whose class default misplaces the bracket (all its shipped configurations repair that).
    """
    return (s + torch.sqrt(s * s + 4)) / 2


def log_normal(x, mu, sigma):
    """log Normal(x; mu, sigma) in nats, elementwise: -(x - mu)^2 / (2 sigma^2) - log sigma - log(2 pi)/2."""
    z = (x - mu) / sigma
    return -0.5 * z * z - sigma.log() - 0.5 * math.log(2 * math.pi)


def guided_normal(mc, sc, mu, su, cfg):
    """N(mc, sc)^cfg N(mu, su)^(1 - cfg) is again a Gaussian -> mean, std, proper (bool), elementwise.

    Its precision, in units of 1 / sc^2, is lam = cfg - (cfg - 1) sc^2 / su^2. Where the unconditional
    Gaussian is so narrow that lam <= 0, the product grows without bound and is no density. That channel then
    stays unguided, N(mc, sc). So it does up to lam = 0.01, where the mean would move by 100
    (cfg - 1)(mc - mu).
    """
    ratio = (sc / su) ** 2
    lam = cfg - (cfg - 1) * ratio
    proper = lam > 0.01
    lam = torch.where(proper, lam, 1.0)
    return mc + torch.where(proper, (cfg - 1) * ratio * (mc - mu) / lam, 0.0), sc / lam.sqrt(), proper


def choose(log_pi, n=()):
    """Draw component indices by the Gumbel-max trick: log_pi (..., K) -> (*n, ...) int64."""
    u = torch.rand(*n, *log_pi.shape, device=log_pi.device).clamp(1e-20, 1 - 1e-7)
    return (log_pi - torch.log(-torch.log(u))).argmax(-1)


def pick(a, k):
    """The chosen component's row: a (..., K, D), k (*n, ...) -> (*n, ..., D)."""
    k = k[..., None, None].expand(*k.shape, 1, a.shape[-1])
    return a.expand(*k.shape[:-2], *a.shape[-2:]).gather(-2, k).squeeze(-2)


class GMMHead(nn.Module):
    """p(x | h) as a mixture of n_mix diagonal Gaussians. h (..., C), x (..., D), any leading shape.

    min_scale is the floor of sigma: a component that shrinks onto one point would make p(x) infinite. The
    authors use 1e-6. Our tokens are drawn from a posterior and are never points, so a higher floor costs
    nothing and is safer.
    """

    def __init__(self, n_embd, token_dim, n_mix=16, min_scale=1e-3):
        super().__init__()
        self.n_mix = n_mix
        self.token_dim = token_dim
        self.min_scale = min_scale
        self.proj = nn.Linear(n_embd, n_mix * (1 + 2 * token_dim))
        # Not zero, unlike in the authors' released code: equal components get equal gradients and stay equal.
        # The means start spread over N(0, 1), where unit-variance tokens live. The scales start at 1.
        nn.init.normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)
        with torch.no_grad():
            self.proj.bias[n_mix:].view(n_mix, 2, token_dim)[:, 0].normal_()

    def split(self, raw):
        """Raw outputs (..., K + 2KD) -> log_pi (..., K), mu (..., K, D), sigma (..., K, D), float32."""
        logits, normals = raw.float().split([self.n_mix, 2 * self.n_mix * self.token_dim], -1)
        mu, s = normals.unflatten(-1, (self.n_mix, 2, self.token_dim)).unbind(-2)     # (..., K, D) each
        return logits.log_softmax(-1), mu, square_plus(s).clamp(min=self.min_scale)

    def mixture(self, h):
        """h (..., C) -> the mixture: log_pi (..., K), mu (..., K, D), sigma (..., K, D), float32."""
        return self.split(self.proj(h))

    @staticmethod
    def density(mixture, x):
        """log p(x) in nats under (log_pi, mu, sigma): x (..., D) -> (...).

        One Gaussian: sum_d [ -(x_d - mu_d)^2 / (2 sigma_d^2) - log sigma_d - log(2 pi) / 2 ].
        All K of them: logsumexp_k( log_pi_k + log N_k ), since exp(log N_k) underflows in 16 dimensions.
        """
        log_pi, mu, sigma = mixture
        z = (x.float().unsqueeze(-2) - mu) / sigma                                    # (..., K, D)
        log_n = -0.5 * (z * z).sum(-1) - sigma.log().sum(-1) - 0.5 * math.log(2 * math.pi) * x.shape[-1]
        return torch.logsumexp(log_pi + log_n, dim=-1)                                # (...)

    def log_prob(self, h, x):
        """log p(x | h) in nats, one number per token: h (..., C), x (..., D) -> (...). GIVT section 3.2."""
        return self.density(self.mixture(h), x)

    def loss(self, h, x):
        """Negative log-likelihood in nats per token, not reduced: h (..., C), x (..., D) -> (...)."""
        return -self.log_prob(h, x)

    @torch.no_grad()
    def sample(self, h, h_uncond=None, cfg=1.0, temperature=1.0, top_p=1.0, clip=None,
               guidance="importance", n_tries=None):
        """Draw one token per position: h (..., C) -> x (..., D), log p(x | h) (...).

        temperature multiplies sigma, in both mixtures under guidance (GIVT: "variance scaling"). Temperature
        0 gives the mean of the likeliest component. With h_uncond and cfg other than 1, x follows
        p(x | h)^cfg p(x | h_uncond)^(1 - cfg) up to a constant; guidance and n_tries say how it is drawn, see
        draw_guided. top_p, clip: see draw.

        The log p returned is the model's own, at temperature 1, neither guided nor truncated, so confidences
        and beams mean the same under every trick. It is not the density that x was drawn from.
        """
        model = self.mixture(h)
        guided = h_uncond is not None and cfg != 1.0
        uncond = self.mixture(h_uncond) if guided else None
        if temperature < 1e-6:                             # sigma 0 would divide 0 by 0 in the guided density
            x = self.mode(self.guide(model, uncond, cfg) if guided else model)
        elif guided:
            log_pi, mu, sigma = model
            log_pu, mu_u, sigma_u = uncond
            c = log_pi, mu, temperature * sigma
            u = log_pu, mu_u, temperature * sigma_u
            x = self.draw_guided(c, u, cfg, guidance, top_p, clip, n_tries)
        else:
            x = self.draw(model, temperature, top_p=top_p, clip=clip)
        return x, self.density(model, x)

    @staticmethod
    def draw(mixture, temperature=1.0, n=(), top_p=1.0, clip=None):
        """Draw from (log_pi, mu, sigma) -> x (*n, ..., D): choose a component, then add noise to its mean.

        All channels of a token share one component, and each of the n draws chooses anew. temperature
        multiplies every sigma and leaves the weights alone. top_p: nucleus() says which components stay. With
        clip the noise is a normal truncated to clip (tempered) sigmas around its component's mean.
        """
        log_pi, mu, sigma = mixture
        if top_p < 1:
            log_pi = nucleus(log_pi, top_p)
        k = choose(log_pi, n)                                                         # (*n, ...)
        mu = pick(mu, k)                                                              # (*n, ..., D)
        sigma = pick(sigma, k)
        noise = torch.randn_like(mu) if clip is None else truncated_noise(mu, clip)
        return mu + temperature * sigma * noise

    @staticmethod
    def mode(mixture):
        """The mean of the likeliest component: log_pi (..., K), mu (..., K, D), sigma -> (..., D)."""
        log_pi, mu, _ = mixture
        return pick(mu, log_pi.argmax(-1))

    @staticmethod
    def guide(c, u, cfg):
        """p_c^cfg p_u^(1 - cfg) as a mixture again -> log_pi, mu, sigma. Exact for K = 1, else by pieces.

        Component j of c meets ONE Gaussian with the moments of u near it (u's components, weighted by how
        much they overlap j). guided_normal gives the piece's mean and sigma. Its weight makes the density
        right at that mean: pi'_j = pi_j (p_c / p_u)^(cfg - 1) N_j / N'_j. The order of the components plays
        no role. Builds (..., K, K, D): 270 MB for 256 x 64 tokens with K = D = 16, 1.2 GB in all.
        """
        log_pi, mc, sc = c
        log_pu, mu, su = u
        gap = mu.unsqueeze(-3) - mc.unsqueeze(-2)                                   # (..., K of c, K of u, D)
        var = sc.unsqueeze(-2) ** 2 + su.unsqueeze(-3) ** 2
        log_det = var.log().sum(-1)
        overlap = -0.5 * (log_det + var.reciprocal_().mul_(gap).mul_(gap).sum(-1))  # in place: peak memory
        near = (log_pu.unsqueeze(-2) + overlap).softmax(-1)                           # (..., K, K)
        shift = (near.unsqueeze(-2) @ gap).squeeze(-2)                                # (..., K, D)
        gap = gap.sub_(shift.unsqueeze(-2)).square_()
        var = (near.unsqueeze(-2) @ gap).squeeze(-2) + near @ su ** 2
        del gap
        mean, std, _ = guided_normal(mc, sc, mc + shift, var.sqrt(), cfg)
        log_c, log_u = [GMMHead.density((log_w.unsqueeze(-2), m.unsqueeze(-3), s.unsqueeze(-3)), mean)
                        for log_w, m, s in (c, u)]                                    # (..., K) each
        ratio = (log_normal(mean, mc, sc) - log_normal(mean, mean, std)).sum(-1)
        return (log_pi + (cfg - 1) * (log_c - log_u) + ratio).log_softmax(-1), mean, std

    @staticmethod
    def draw_guided(c, u, cfg, guidance="importance", top_p=1.0, clip=None, n_tries=None):
        """Draw from p_c^cfg p_u^(1 - cfg), given two mixtures (log_pi, mu, sigma) -> x (..., D).

        guidance="closed" draws from guide()'s mixture. "importance" draws n_tries (8) tokens from it and
        keeps one with probability in proportion to target / guide(). That mends most of what guide()
        approximates, but not all: the mean is off by .007, .016, .054 sigma at cfg 1.5, 2, 4 (the median over
        tokens of trained heads; a few are off by far more). "rejection" is the paper's way, DB-CFG, with a
        valid envelope: see draw_rejection (128 tries). "official" is DB-CFG as released (1000 tries).

        Measured for K = D = 8 with pairs of mixtures as one network gives them (u's components moved,
        narrowed, reweighted): error of the mean in the target's sigmas at cfg 2 | 4 (0.026 is sampling
        noise), and ms for 512 tokens on one core:

            closed       0.03 | 0.20     8      importance   0.03 | 0.10   14 (32 tries: 0.06 at cfg 4, 27 ms)
            rejection    0.36 | 1.08    16      32 draws of p(x | h), reweighted by the ratio:   0.04 | 0.29

        So importance is the default. Rejection is exact for K = 1; its error here is the pairing by index.
        """
        if guidance not in ("closed", "importance", "rejection", "official"):
            raise ValueError(f"guidance {guidance!r} must be closed, importance, rejection or official")
        if guidance == "rejection":
            return draw_rejection(c, u, cfg, n_tries or 128, top_p, clip)
        if guidance == "official":
            return draw_rejection(c, u, cfg, n_tries or 1000, top_p, clip, official=True)
        guided = GMMHead.guide(c, u, cfg)
        if guidance == "closed":
            return GMMHead.draw(guided, top_p=top_p, clip=clip)
        tries = GMMHead.draw(guided, n=(n_tries or 8,), top_p=top_p, clip=clip)       # (N, ..., D)
        log_w = [cfg * GMMHead.density(c, x) + (1 - cfg) * GMMHead.density(u, x) - GMMHead.density(guided, x)
                 for x in tries]                            # one try at a time, so that memory does not grow
        weights = torch.stack(log_w).softmax(0)                                       # (N, ...)
        best = torch.multinomial(weights.flatten(1).T, 1).T.view(1, *weights.shape[1:], 1)
        return tries.gather(0, best.expand(1, *tries.shape[1:])).squeeze(0)           # (..., D)


# ---- Extras: truncated draws, the paper's guidance by rejection, other Gaussian heads --------------

def truncated_noise(like, clip):
    """Normal noise of like's shape, truncated to [-clip, clip] by the inverse cdf.

    Not clamped, which would pile mass on the two ends. GIVT's paper speaks of truncated sampling; its code
    has none.
    """
    u = 2 * torch.rand_like(like) - 1
    noise = 2 ** 0.5 * torch.erfinv(u * math.erf(clip / 2 ** 0.5))
    return noise.clamp(-clip, clip)                         # beyond clip = 6, erf is 1 and erfinv infinite


def nucleus(log_pi, top_p):
    """Keep the fewest components whose weights reach top_p, and renormalise: log_pi (..., K) -> (..., K)."""
    pi, order = log_pi.exp().sort(-1, descending=True)
    drop = pi.cumsum(-1) - pi >= top_p                     # those before it suffice; never true for the first
    drop = drop.scatter(-1, order, drop)
    return log_pi.masked_fill(drop, -torch.inf).log_softmax(-1)


def draw_rejection(c, u, cfg, n_tries, top_p=1.0, clip=None, official=False):
    """DB-CFG, GIVT's guidance: mixtures (log_pi, mu, sigma) -> x (..., D).

    Choose component j by c's weights. Then reject every channel by itself against components j of c and u. A
    channel without an accepted try is drawn from N(mc, sc). Pairing j with j makes it a heuristic for K > 1:
    permuting u's components, the same density, changes the samples.
    """
    k = choose(nucleus(c[0], top_p) if top_p < 1 else c[0])
    mc, sc, mu, su = [pick(a, k) for a in (*c[1:], *u[1:])]                           # (..., D) each
    scale, log_bound = envelope(mc, sc, mu, su, cfg, official)
    x = mc + scale * torch.randn(n_tries, *mc.shape, device=mc.device)                # (n_tries, ..., D)
    accepted = accept(x, torch.rand_like(x), mc, sc, mu, su, cfg, scale, log_bound)
    if clip is not None:
        mean, std, _ = guided_normal(mc, sc, mu, su, cfg)
        accepted &= (x - mean).abs() <= clip * std
    noise = torch.randn_like(mc) if clip is None else truncated_noise(mc, clip)
    return first_accepted(x, accepted, mc + sc * noise)


def envelope(mc, sc, mu, su, cfg, official=False):
    """A proposal with p = N(mc, sc)^cfg N(mu, su)^(1 - cfg) <= bound * N(mc, scale) -> scale, log bound.

    The proposal must be wider than p and reach its mean. Then log p - log q is a parabola, whose top is
    exact. official: the authors' N(mc, 2 max(sc, su)) and a grid maximum of p(x) / q(mc), which is too small
    away from mc (cfg 4, means 3 apart: samples have mean -4.9, p has -6.4).
    """
    def log_p(x):
        return cfg * log_normal(x, mc, sc) + (1 - cfg) * log_normal(x, mu, su)

    if official:
        scale = 2 * torch.maximum(sc, su)
        grid = torch.linspace(-10, 10, 1001, device=mc.device).view(-1, *[1] * mc.ndim)
        bound = log_p(mc + grid).amax(0) - log_normal(mc, mc, scale)
        return scale, bound.masked_fill(bound > 88.72, torch.inf)              # where their float32 overflows
    mean, std, proper = guided_normal(mc, sc, mu, su, cfg)
    scale = 2 * torch.maximum(sc, std) + (mean - mc).abs()
    top = mean + (mean - mc) * std ** 2 / (scale ** 2 - std ** 2)
    bound = log_p(top) - log_normal(top, mc, scale)
    return scale, torch.where(proper, bound, torch.inf)


def accept(x, u, mc, sc, mu, su, cfg, scale, log_bound):
    """Which proposals x, with u uniform in [0, 1), fall under p -> bool. An infinite bound accepts none."""
    log_p = cfg * log_normal(x, mc, sc) + (1 - cfg) * log_normal(x, mu, su)
    return u.log() + log_bound + log_normal(x, mc, scale) < log_p


def first_accepted(proposals, accepted, fallback):
    """proposals, accepted (N, ...) -> the first accepted of each, or fallback (...) where there is none."""
    first = accepted.int().argmax(0, keepdim=True)                                 # argmax: the first maximum
    return torch.where(accepted.any(0), proposals.gather(0, first).squeeze(0), fallback)


class ChannelGMMHead(GMMHead):
    """One mixture per channel, p(x | h) = prod_d sum_k pi_dk Normal(x_d; mu_dk, sigma_dk).

    GIVT uses it for dense prediction. A token of D channels is treated as D tokens of one channel, so
    GMMHead's density, draw and guidance serve as they are. The Linear's 3DK outputs are the authors' [3D, K]:
    D rows of logits, D of means, D of scales.
    """

    def __init__(self, n_embd, token_dim, n_mix=16, min_scale=1e-3):
        super().__init__(n_embd, 1, n_mix, min_scale)
        self.token_dim = token_dim
        self.proj = nn.Linear(n_embd, 3 * token_dim * n_mix)
        nn.init.normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)
        with torch.no_grad():
            self.proj.bias.view(3, token_dim, n_mix)[1].normal_()

    def split(self, raw):
        """Raw outputs (..., 3DK) -> log_pi (..., D, K), mu (..., D, K, 1), sigma (..., D, K, 1)."""
        logits, mu, s = raw.float().unflatten(-1, (3, self.token_dim, self.n_mix)).unbind(-3)
        sigma = square_plus(s).clamp(min=self.min_scale)
        return logits.log_softmax(-1), mu.unsqueeze(-1), sigma.unsqueeze(-1)

    def log_prob(self, h, x):
        """log p(x | h) in nats per token, the sum over channels (the authors' loss is the mean over them)."""
        return self.density(self.mixture(h), x.unsqueeze(-1)).sum(-1)

    @torch.no_grad()
    def sample(self, h, *args, **tricks):
        """As GMMHead.sample, which see, with every trick applied to each channel's own mixture."""
        x, log_p = super().sample(h, *args, **tricks)                                 # (..., D, 1), (..., D)
        return x.squeeze(-1), log_p.sum(-1)


class FullGaussianHead(nn.Module):
    """One Gaussian with full covariance: x = mean + L noise, L lower triangular with a positive diagonal.

    The Linear's D^2 + D outputs are the authors' [D x D factor by rows, D means]. They put square_plus on the
    whole factor, so its off-diagonals are positive and, for D = 2, no negative correlation can be expressed;
    official=True does that. Ours has square_plus on the diagonal only.
    """

    def __init__(self, n_embd, token_dim, n_mix=1, min_scale=1e-3, official=False):
        super().__init__()
        if n_mix != 1:
            raise ValueError(f"full covariance is for one component: n_mix must be 1, not {n_mix}")
        self.n_mix = 1
        self.token_dim = token_dim
        self.min_scale = min_scale
        self.official = official
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
        """log p(x) in nats: x (..., D) -> (...). -z^2/2 - log det L - D log(2 pi)/2, z = L^-1 (x - mean)."""
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
        """The closed form with matrices: Gaussians (mean, factor) -> mean (..., D), factor (..., D, D).

        The precision is P = cfg P_c - (cfg - 1) P_u, the mean P^-1 (cfg P_c m_c - (cfg - 1) P_u m_u). A token
        whose P is not positive definite stays unguided.
        """
        eye = torch.eye(c[0].shape[-1], device=c[0].device).expand_as(c[1])
        inverse_c = torch.linalg.solve_triangular(c[1], eye, upper=False)
        inverse_u = torch.linalg.solve_triangular(u[1], eye, upper=False)
        p_c = cfg * inverse_c.mT @ inverse_c
        p_u = (cfg - 1) * inverse_u.mT @ inverse_u
        root, failed = torch.linalg.cholesky_ex(p_c - p_u)                            # P = R R^T
        failed = (failed > 0)[..., None, None]
        root = torch.where(failed, eye, root)
        shift = torch.cholesky_solve(p_u @ (c[0] - u[0]).unsqueeze(-1), root).squeeze(-1)       # from m_c
        # x = R^-T noise has covariance P^-1. R^-T is upper triangular, which draws as well as a lower one.
        factor = torch.linalg.solve_triangular(root.mT, eye, upper=True)
        return c[0] + torch.where(failed[..., 0], 0.0, shift), torch.where(failed, c[1], factor)

    @torch.no_grad()
    def sample(self, h, h_uncond=None, cfg=1.0, temperature=1.0, clip=None):
        """Draw one token per position -> x (..., D), log p(x | h) (...). Guidance is always the closed form.

        clip bounds each number of the noise before L mixes them. With one component top_p has nothing to
        choose.
        """
        model = self.gaussian(h)
        mean, factor = model
        if h_uncond is not None and cfg != 1.0:
            mean, factor = self.guide(model, self.gaussian(h_uncond), cfg)
        noise = torch.randn_like(mean) if clip is None else truncated_noise(mean, clip)
        x = mean + temperature * (factor @ noise.unsqueeze(-1)).squeeze(-1)
        return x, self.density(model, x)


HEADS = {"vector": GMMHead, "channel": ChannelGMMHead, "full": FullGaussianHead}


# ---- Demo: classes of 2-D tokens ------------------------------------------------------------------
# A transformer would turn (class, earlier tokens) into h. Here a lookup table does, so everything that is
# learned about the shape of each class is learned by the head.

def toy_tokens(label):
    """label (N,) in {0, 1, 2, 3} -> x (N, 2): a ring, a spiral, a checkerboard, eight Gaussians."""
    def circle(angle):
        return torch.stack([angle.cos(), angle.sin()], -1)

    u, v = torch.rand(2, len(label), device=label.device)
    ring = 1.5 * circle(2 * math.pi * u)
    spiral = circle(4 * math.pi * u) * (0.2 + 1.6 * u)[:, None]
    column = (4 * u).floor()
    row = (2 * v).floor()
    board = torch.stack([4 * u - 2, 2 * row + column % 2 + torch.rand_like(v) - 2], -1)
    eight = 1.5 * circle((8 * u).floor() * math.pi / 4) + 0.1 * torch.randn_like(ring)
    thick = 0.05 * torch.randn_like(ring)
    kinds = torch.stack([ring + thick, spiral + thick, board, eight], 1)              # (N, 4, 2)
    return kinds[torch.arange(len(label), device=label.device), label]


def fit_toy(n_mix, steps, device, classes=4, batch_size=1024):
    """Train a lookup table and a head on toy_tokens -> table, head, held-out nll per class in nats (4,)."""
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


def one_channel(pi, mu, sigma, n=None):
    """A mixture of one channel from three lists of K numbers -> log_pi, mu, sigma, repeated for n tokens."""
    mixture = torch.tensor(pi).log(), torch.tensor(mu)[:, None], torch.tensor(sigma)[:, None]
    return mixture if n is None else tuple(a.expand(n, *a.shape) for a in mixture)


def draw_panel(ax, title, label, log_p, samples):
    """log_p (6001,) on a grid, drawn in grey, against histograms of samples [(name, x)] -> mean, std."""
    grid, bins = torch.linspace(-12, 12, 6001), torch.linspace(-4, 4, 81)
    p = log_p.exp() / torch.trapezoid(log_p.exp(), grid)
    ax.fill_between(grid, p, color="0.85", label=label)
    highest = float(p.max())
    for name, x in samples:
        height = torch.histogram(x.flatten(), bins, density=True)[0]
        ax.stairs(height, bins, label=name, lw=1.1)
        highest = max(highest, float(height.max()))
    ax.set_title(title, fontsize=10)
    ax.set(xlim=(-4, 4), ylim=(0, 1.55 * highest), xticks=(-3, 0, 3), yticks=[], xlabel="x")
    ax.legend(fontsize=7, loc="upper left", frameon=False, labelspacing=0.2)
    mean = torch.trapezoid(p * grid, grid)
    return mean, torch.trapezoid(p * (grid - mean) ** 2, grid).sqrt()


def draw_tricks(axes, n=10_000):
    """Six panels about one channel: temperature, top_p, clip, and the guidance samplers at three strengths.

    The guided density is integrated numerically. Prints its mean and std and those of each sampler.
    """
    lists_c = [0.5, 0.35, 0.15], [-1.5, 0.3, 2.2], [0.5, 0.6, 0.3]
    lists_u = [0.3, 0.69, 0.01], [-1.5, 0.5, 0.0], [0.9, 1.8, 1.6]
    c = one_channel(*lists_c, n)
    u = one_channel(*lists_u, n)
    grid = torch.linspace(-12, 12, 6001)[:, None]
    log_c = GMMHead.density(one_channel(*lists_c), grid)
    log_u = GMMHead.density(one_channel(*lists_u), grid)

    draw = GMMHead.draw
    draw_panel(axes[0], "temperature", "model", log_c, [("0.5", draw(c, 0.5)), ("1.3", draw(c, 1.3))])
    draw_panel(axes[1], "top_p (components)", "model", log_c, [("0.8", draw(c, top_p=0.8))])
    draw_panel(axes[2], "clip (sigmas)", "model", log_c, [("1", draw(c, clip=1.0)), ("2", draw(c, clip=2.0))])
    for ax, w in zip(axes[3:], (0.4, 1.0, 3.0)):
        samples = [(way, GMMHead.draw_guided(c, u, 1 + w, way))
                   for way in ("importance", "closed", "rejection", "official")]
        mean, std = draw_panel(ax, f"guidance, w = {w:g}", "exact", (1 + w) * log_c - w * log_u, samples)
        print(f"guidance w = {w:g}, exact mean {mean:6.3f} std {std:.3f}:  "
              + "  ".join(f"{way} {x.mean():6.3f} {x.std():.3f}" for way, x in samples))


def main():
    parser = argparse.ArgumentParser(description="Mixtures of K Gaussians on four kinds of 2-D tokens.")
    parser.add_argument("--n_mix", type=int, nargs="+", default=[1, 4, 32], help="values of K, a column each")
    parser.add_argument("--steps", type=int, default=1000, help="training steps for each K")
    args = parser.parse_args()
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    names = ("ring", "spiral", "checkerboard", "eight Gaussians")
    optimum = math.log(8) + 2 * 0.5 * math.log(2 * math.pi * math.e * 0.1 ** 2)      # the eight never overlap
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
    other = table(label.roll(2000))                         # guide away from another class
    columns.append((f"K = {n_mix}, guidance 1.5", head.sample(table(label), other, cfg=1.5)[0]))

    width = max(6, len(columns))
    fig, axes = plt.subplots(5, width, figsize=(2.35 * width, 11), height_ratios=[1, 1, 1, 1, 1.25],
                             squeeze=False)
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
    fig.suptitle("gmm_head.py: tokens drawn for four classes (guidance pushes each class away from the one "
                 "above it); below, each trick on one channel")
    fig.tight_layout()
    fig.savefig("gmm_head.png", dpi=72)
    print("wrote gmm_head.png")


if __name__ == "__main__":
    main()
