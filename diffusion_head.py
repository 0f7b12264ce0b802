"""
A diffusion head: the output layer of MAR, on its own.

A mixture of Gaussians (gmm_head.py) must guess the shape of p(x | h) in advance. MAR (Li et al. 2024,
arxiv.org/abs/2406.11838) assumes nothing. A small MLP learns to remove noise from ONE token x; the hidden
state h tells it what to look for. Sampling starts from pure noise and removes it in steps. The Diffusion Loss
is

    loss = E_{t, eps} [ |eps - net(x_t, t, h)|^2 / D + vb ],     x_t = a_t x + s_t eps,     a_t^2 + s_t^2 = 1,

where t = 0 is the token and t = 999 noise. vb, a term of the likelihood bound, trains only the variance of a
step, which the net predicts as well. The transformer runs once per set of tokens in MAR, and once per token
in an autoregressive model; the steps repeat the MLP alone. objective="flow" trains the same MLP to predict
the velocity eps - x of a straight line from token to noise instead.

Shapes:  B batch, T tokens, C width of h, D numbers in a token, W width of the MLP, R batch_mul, N steps

    loss    h (B, T, C), x (B, T, D) --R draws of t, eps--> x_t (R, B, T, D) --net--> (R, B, T, 2D) --> (B, T)
    sample  noise (B, T, D) --N times net--> x (B, T, D)       no density: log p comes back as None

    python diffusion_head.py   # 2-D toy tokens against steps, writes diffusion_head.png; about 50 s

Try it yourself:
  1. Run with --steps 500. Which shapes are learned first, and which of the eight Gaussians' features last?
  2. Leave vb out: .terms(...)[0] in loss(). Which sampler suffers at few steps, which one does not, and why?
  3. Make spacing="official" the default of sample(). What does a well trained head lose by it?
"""
import argparse
import functools
import math
import time

import torch
import torch.nn as nn

SIZES = {                                                   # mar.HEAD_SIZES has those that belong to each MAR
    "small": dict(width=256, depth=3),
    "medium": dict(width=512, depth=3),
    "mar-b": dict(width=1024, depth=6),
}
T_TRAIN = 1000                                              # noise levels in training; any number in sampling


# ---- The noise schedule ----------------------------------------------------------------------------

def timesteps(steps, spacing="strided"):
    """The noise levels that sampling visits -> (steps,) int64, ascending.

    "strided" steps by 1000 / steps from 0 and never goes above t = 980. At t = 999, a_t = 5e-5, and
    x0 = (x - s eps) / a multiplies every error of the network by 20,000: the first of 100 steps leaves it 316
    times larger, and a small or young model explodes. At 980 it is 32. "official" is MAR's default, 0 .. 999
    in equal parts, to reproduce its numbers.
    """
    if spacing not in ("strided", "official"):
        raise ValueError(f"spacing {spacing!r} is neither 'strided' nor 'official'")
    most = T_TRAIN if spacing == "official" else 981
    if not 1 <= steps <= most:
        raise ValueError(f"{steps} denoising steps: with {spacing} spacing there are 1 to {most}")
    i = torch.arange(steps, device="cpu")
    if spacing == "strided":
        return i * T_TRAIN // steps if steps <= 50 else i * 980 // (steps - 1)
    return (i.double() * ((T_TRAIN - 1) / max(steps - 1, 1))).round().long()


def schedule(t):
    """All coefficients of steps that visit only the noise levels t (N,) -> (N, 8) float32, one row per step.

    Columns: a, s of x_t = a x0 + s eps; the same one step earlier; k0, kx of the mean k0 x0 + kx x_t of
    q(x_earlier | x_t, x0); log of the largest (beta) and the smallest (beta~) variance such a step can need.
    float64 inside: abar falls to 2e-9. Cosine schedule, Nichol & Dhariwal 2021 (arxiv.org/abs/2102.09672).
    """
    u = torch.arange(T_TRAIN + 1, dtype=torch.float64, device="cpu") / T_TRAIN
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    abar = (1 - (1 - f[1:] / f[:-1]).clamp(max=0.999)).cumprod(0)[t]              # a^2 after many small steps
    before = torch.cat([torch.ones_like(abar[:1]), abar[:-1]])
    beta = 1 - abar / before
    variance = beta * (1 - before) / (1 - abar)                                       # 0 at the last step,
    variance[0] = variance[min(1, len(t) - 1)]                                        # but its log is needed
    k0 = before.sqrt() * beta / (1 - abar)
    kx = (1 - beta).sqrt() * (1 - before) / (1 - abar)
    return torch.stack([abar.sqrt(), (1 - abar).sqrt(), before.sqrt(), (1 - before).sqrt(), k0, kx,
                        beta.log(), variance.clamp(min=1e-20).log()], 1).float()


@functools.lru_cache(maxsize=None)
def sampling_table(steps, spacing, device):
    """timesteps() and their schedule() on the device, made once: copies in every sample() stall a GPU."""
    t = timesteps(steps, spacing)
    return t.to(device, non_blocking=True), schedule(t).to(device, non_blocking=True)


# ---- The MLP. Module names are the official ones, so that released weights load --------------------

class TimeEmbedding(nn.Module):
    """t (...), a noise level 0 .. 999, need not be whole -> (..., W): cosines and sines, then two layers."""

    def __init__(self, width, n_freq=256):
        super().__init__()
        self.n_freq = n_freq
        self.mlp = nn.Sequential(nn.Linear(n_freq, width), nn.SiLU(), nn.Linear(width, width))

    def sinusoid(self, t):                             # (...) -> (..., n_freq), wavelengths 2 pi to 20,000 pi
        half = self.n_freq // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        angle = t.float().unsqueeze(-1) * frequency
        return torch.cat([angle.cos(), angle.sin()], -1)

    def forward(self, t):
        return self.mlp(self.sinusoid(t).to(self.mlp[0].weight.dtype))


class AdaLNBlock(nn.Module):
    """x + gate * MLP(LN(x) * (1 + scale) + shift), where y = (time, h) decides shift, scale and gate."""

    def __init__(self, width):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, y):                                # (..., W), (..., W) -> (..., W)
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, -1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class AdaLNOutput(nn.Module):
    """The last layer: a LayerNorm steered by y and a Linear to the outputs."""

    def __init__(self, width, n_out):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, n_out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, y):                                # (..., W), (..., W) -> (..., n_out)
        shift, scale = self.adaLN_modulation(y).chunk(2, -1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DenoisingMLP(nn.Module):
    """net(x, t, c): noisy token (..., D), noise level (...), condition (..., C) -> (..., n_out).

    Leading shapes broadcast, so one t () serves all rows while sampling, and R noisy copies of a token share
    one c.
    """

    def __init__(self, n_embd, token_dim, n_out, width, depth):
        super().__init__()
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(n_embd, width)
        self.input_proj = nn.Linear(token_dim, width)
        self.res_blocks = nn.ModuleList([AdaLNBlock(width) for _ in range(depth)])
        self.final_layer = AdaLNOutput(width, n_out)
        self.init_weights()

    def init_weights(self):
        """Gates and output start at 0: the first prediction is 0, and a block joins in when useful."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for i in (0, 2):
            nn.init.normal_(self.time_embed.mlp[i].weight, std=0.02)
        for module in (*self.res_blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def denoise(self, x, y):                                # y = time_embed(t) + cond_embed(c)
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)

    def forward(self, x, t, c):
        return self.denoise(x, self.time_embed(t) + self.cond_embed(c))


# ---- Training and sampling --------------------------------------------------------------------------

def kl_bits(mean, log_var, mean2, log_var2):
    """KL(N(mean, var) || N(mean2, var2)) in bits, averaged over the last dimension."""
    kl = 0.5 * (log_var2 - log_var - 1 + (log_var - log_var2).exp() + (mean - mean2) ** 2 * (-log_var2).exp())
    return kl.mean(-1) / math.log(2)


def pixel_bits(x, mean, log_var):
    """-log2 of the probability of the 8-bit bin around x, averaged over the last dimension.

    Pixels in [-1, 1] have such bins, latents do not. A leftover of image diffusion, kept only because the
    official loss has it at t = 0.
    """
    def cdf(edge):
        z = (x - mean + edge) * (-0.5 * log_var).exp()
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3)))

    low = cdf(-1 / 255)
    high = cdf(1 / 255)
    p = torch.where(x < -0.999, high, torch.where(x > 0.999, 1 - low, high - low))    # the end bins are open
    return -p.clamp(min=1e-12).log2().mean(-1)


class DiffusionHead(nn.Module):
    """p(x | h) as a denoising process. h (..., C), x (..., D) of about unit variance, any leading shape.

    batch_mul: noise levels per token and training step. The transformer's h is dear, the MLP is cheap.
    flow_time: how objective="flow" draws t in (0, 1): "logit-normal" (more in the middle, SD3) or "uniform".
    """

    def __init__(self, n_embd, token_dim, width=256, depth=3, objective="diffusion", batch_mul=4,
                 flow_time="logit-normal"):
        super().__init__()
        if objective not in ("diffusion", "flow"):
            raise ValueError(f"objective {objective!r} is not diffusion | flow")
        if flow_time not in ("logit-normal", "uniform"):
            raise ValueError(f"flow_time {flow_time!r} is not logit-normal | uniform")
        self.token_dim = token_dim
        self.objective = objective
        self.batch_mul = batch_mul
        self.flow_time = flow_time
        n_out = 2 * token_dim if objective == "diffusion" else token_dim
        self.net = DenoisingMLP(n_embd, token_dim, n_out, width, depth)
        self.register_buffer("table", schedule(torch.arange(T_TRAIN, device="cpu")), persistent=False)

    @staticmethod
    def reverse(x, eps, v, row):
        """One step towards the token, from the network's eps, v (..., D) -> mean, log variance, x0 (..., D).

        x0 solves x = a x0 + s eps, and the mean is k0 x0 + kx x. The log variance lies between the two
        extremes of the schedule: v = -1 is the smallest (log beta~), v = +1 the largest (log beta), on a
        straight line. (Nichol & Dhariwal 2021, eq. 15.) row: the eight columns of schedule(), each (..., 1)
        or ().
        """
        a, s, _, _, k0, kx, log_beta, log_tilde = row
        x0 = (x - s * eps) / a
        return k0 * x0 + kx * x, log_tilde + (v + 1) / 2 * (log_beta - log_tilde), x0

    def terms(self, x, h, t, noise):
        """The loss terms for given randomness: x (..., D), h (..., C), t (...), noise (..., D) -> each (...).

        diffusion, t in 0 .. 999: (mse, vb). The net gives eps, then v. mse, a mean over the D numbers of
        |noise - eps|^2, trains eps. vb, in bits, is the part of the likelihood bound that trains the variance
        v: kl_bits of q(x_earlier | x_t, x) against reverse(), in this order, with eps detached; at t = 0
        pixel_bits(). In a new model vb is about 700 at t = 999. flow, t in 0 .. 1: (mse,) of the velocity
        noise - x, at x + t (noise - x); the net is told T_TRAIN * t. (MAR eq. 2; Nichol & Dhariwal
        eq. 14 and 16)
        """
        x = x.float()
        h = h.float()
        with torch.autocast(x.device.type, enabled=False):
            if self.objective == "flow":
                u = t.unsqueeze(-1)
                velocity = self.net((1 - u) * x + u * noise, T_TRAIN * t, h)
                return ((velocity - (noise - x)) ** 2).mean(-1),
            row = self.table[t].unsqueeze(-2).unbind(-1)                              # eight of (..., 1)
            x_t = row[0] * x + row[1] * noise
            eps, v = self.net(x_t, t, h).chunk(2, -1)
            mean, log_var, _ = self.reverse(x_t, eps.detach(), v, row)
            vb = torch.where(t == 0, pixel_bits(x, mean, log_var),
                             kl_bits(row[4] * x + row[5] * x_t, row[7], mean, log_var))
            return ((noise - eps) ** 2).mean(-1), vb

    def loss(self, h, x):
        """The Diffusion Loss, averaged over batch_mul draws, not reduced: h (..., C), x (..., D) -> (...)."""
        noise = torch.randn(self.batch_mul, *x.shape, device=x.device)                # (R, ..., D)
        if self.objective == "diffusion":
            t = torch.randint(T_TRAIN, noise.shape[:-1], device=x.device)
        elif self.flow_time == "uniform":
            t = torch.rand(noise.shape[:-1], device=x.device)
        else:
            t = torch.randn(noise.shape[:-1], device=x.device).sigmoid()
        return sum(self.terms(x, h, t, noise)).mean(0)

    def predict(self, x, time, c, cfg):
        """The network at x, guided -> eps or velocity (..., D), v (..., D; flow: empty).

        Guidance, u + cfg (c - u), mixes the first only; v is that of the condition. c is cond_embed(h)
        (..., W), or with a cfg both, with the condition first and without it second, (2, ..., W).
        """
        out = self.net.denoise(x, time + c)
        D = self.token_dim
        if cfg is None:
            return out[..., :D], out[..., D:]
        cond, uncond = out                                  # both see the same x
        return torch.lerp(uncond[..., :D], cond[..., :D], cfg), cond[..., D:]

    def denoise_step(self, x, time, c, cfg, row):
        """predict and reverse, at a row (8,) of the table -> mean, log variance, x0, eps, each (..., D)."""
        eps, v = self.predict(x, time, c, cfg)
        return *self.reverse(x, eps, v, row.unbind()), eps

    @torch.no_grad()
    def sample(self, h, h_uncond=None, cfg=1.0, temperature=1.0, diffusion_steps=None, sampler=None,
               spacing="strided", noise=None, on_step=None):
        """Draw one token per position: h (..., C) -> x (..., D), None (no density to report).

        diffusion_steps: default 100, flow 25. sampler: "ancestral" (as in MAR) or "ddim" (no noise on the
        way) for diffusion, "heun" (twice the cost per step) or "euler" for flow; the first is the default.
        temperature scales the noise of each ancestral step, not the first x. The other samplers have no other
        noise, so there it scales the first x. With h_uncond, the guided prediction is u + cfg (c - u). noise
        (1 + steps, ..., D) replaces the random numbers. on_step(i, x) sees each step.
        """
        known = ("ancestral", "ddim") if self.objective == "diffusion" else ("heun", "euler")
        sampler = sampler or known[0]
        steps = diffusion_steps or (100 if self.objective == "diffusion" else 25)
        if sampler not in known:
            raise ValueError(f"sampler {sampler!r} does not fit objective={self.objective!r}: it has {known}")
        # a tensor: to compiled functions, every other number would be another function
        cfg = None if h_uncond is None or cfg == 1.0 else torch.full((), cfg, device=h.device)
        dtype = self.net.cond_embed.weight.dtype            # float32, also under autocast

        def draw(i):
            if noise is not None:
                return noise[i].to(dtype)
            return torch.randn(*h.shape[:-1], self.token_dim, dtype=dtype, device=h.device)

        with torch.autocast(h.device.type, enabled=False):
            states = h if cfg is None else torch.stack([h, h_uncond])
            c = self.net.cond_embed(states.to(dtype))       # once, not per step
            x = draw(0) * (1.0 if sampler == "ancestral" else temperature)
            if self.objective == "flow":
                return self.follow_flow(x, c, cfg, steps, sampler, on_step), None
            t, table = sampling_table(steps, spacing, h.device)
            times = self.net.time_embed(t)                  # (steps, W), for all rows
            for i in range(steps):
                j = steps - 1 - i                           # from noise to token
                mean, log_var, x0, eps = self.denoise_step(x, times[j], c, cfg, table[j])
                if sampler == "ddim":
                    x = table[j, 2] * x0 + table[j, 3] * eps                          # the same, less noise
                elif j > 0:
                    x = mean + temperature * (0.5 * log_var).exp() * draw(1 + i)
                else:
                    x = mean
                if on_step:
                    on_step(i, x)
            return x, None

    # ---- Extras: a straight flow in place of diffusion

    def follow_flow(self, x, c, cfg, steps, sampler, on_step):
        """Walk along the velocity from noise x (..., D) to tokens (..., D), in equal steps of t from 1 to 0.

        predict() gives the velocity, d x / d t. euler takes it at the start of a step, heun the mean of it
        there and where euler would land. on_step(i, x), if there is one, sees x after each step.
        """
        times = self.net.time_embed(torch.linspace(T_TRAIN, 0, steps + 1, device=x.device))   # (steps + 1, W)
        for i in range(steps):
            velocity, _ = self.predict(x, times[i], c, cfg)
            if sampler == "heun":                           # of the slopes at both ends of the step
                end, _ = self.predict(x - velocity / steps, times[i + 1], c, cfg)
                velocity = (velocity + end) / 2
            x = x - velocity / steps
            if on_step:
                on_step(i, x)
        return x


# ---- Demo: the tokens of gmm_head.py, whose picture this one is to be laid beside -------------------

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


def fit_diffusion(objective, steps, device, width=64, classes=4, batch_size=128, lr=4e-3):
    """Train a lookup table and a head on toy_tokens -> table, head."""
    table = nn.Embedding(classes, 64).to(device)
    head = DiffusionHead(64, 2, width, objective=objective).to(device)
    opt = torch.optim.Adam([*table.parameters(), *head.parameters()], lr=lr, betas=(0.9, 0.99), fused=True)
    label = torch.arange(batch_size, device=device) % classes
    for step in range(steps):
        opt.param_groups[0]["lr"] = lr * min(1, (step + 1) / 50) * (1 - step / steps)
        loss = head.loss(table(label), toy_tokens(label)).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    return table, head


def sliced_distance(x, y, n_slice=64):
    """How far two clouds (classes, n, 2) are apart (sliced Wasserstein-1), averaged over classes -> ().

    The mean distance that points move when both clouds are projected on a random line and sorted. It is not 0
    for two draws of the same data.
    """
    lines = nn.functional.normalize(torch.randn(2, n_slice, device=x.device), dim=0)
    return ((x @ lines).sort(1).values - (y @ lines).sort(1).values).abs().mean()


def quality(heads, label, data, costs):
    """{sampler: distance to the data for each number of evaluations of the network per token}, on the CPU."""
    curves = {}
    for sampler in ("ancestral", "ddim", "euler", "heun"):
        table, head = heads["diffusion" if sampler in ("ancestral", "ddim") else "flow"]
        per_step = 2 if sampler == "heun" else 1            # heun asks the network twice in each step
        drawn = [head.sample(table(label), sampler=sampler, diffusion_steps=n // per_step)[0] for n in costs]
        curves[sampler] = torch.stack([sliced_distance(x.view_as(data), data) for x in drawn]).cpu()
        print(f"{sampler:9s} distance at cost "
              + "  ".join(f"{n}: {d:.3f}" for n, d in zip(costs, curves[sampler])))
    return curves


def explosion(label, counts, steps=100):
    """{spacing: std of samples for each number of denoising steps} of a head trained for very few steps."""
    table, head = fit_diffusion("diffusion", steps, label.device)
    std = {}
    for spacing in ("official", "strided"):
        drawn = [head.sample(table(label), diffusion_steps=n, spacing=spacing)[0] for n in counts]
        std[spacing] = torch.stack([x.std() for x in drawn]).cpu()
        print(f"trained for {steps} steps, {spacing}: std "
              + "  ".join(f"{n}: {v:.2f}" for n, v in zip(counts, std[spacing])))
    return std


def plot_clouds(columns, costs, curves, floor, counts, std, data_std, gains, path):
    """Four classes' clouds in columns (title, (4 n, 2)); below, the curves of costs and counts -> a PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig = plt.figure(figsize=(1.55 * len(columns), 10.4), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=[4 * 1.6, 3.6])
    axes = top.subplots(4, len(columns))
    for row, name in enumerate(("ring", "spiral", "checkerboard", "eight Gaussians")):
        for ax, (title, cloud) in zip(axes[row], columns):
            cloud = cloud.reshape(4, -1, 2)[row].cpu()
            ax.plot(cloud[:, 0], cloud[:, 1], ".", ms=1.5, alpha=0.4)
            ax.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=[], yticks=[], aspect="equal",
                   title="" if row else title)
        axes[row][0].set_ylabel(name)
    top.suptitle("diffusion_head.py: noise becomes tokens of four classes "
                 "(guidance: away from the class above)")
    left, right = bottom.subplots(1, 2)
    for ax, ticks, lines, level, text in ((left, costs, curves, floor, "two draws of the data"),
                                          (right, counts, std, data_std, "the data")):
        for name, values in lines.items():
            ax.plot(ticks, values, "o-", label=name)
        ax.axhline(level.cpu(), color="k", ls=":", label=text)
        ax.set(xscale="log", yscale="log")
        ax.set_xticks(ticks, ticks)
        ax.set_xticks([], minor=True)
        ax.legend(fontsize=9, loc="upper right" if ax is left else "center left")
    left.set(xlabel="evaluations of the network per token", ylabel="sliced Wasserstein distance",
             title="quality and cost")
    left.set_yticks([0.05, 0.1, 0.2, 0.4], ["0.05", "0.1", "0.2", "0.4"])
    left.set_yticks([], minor=True)
    right.set(xlabel="denoising steps", ylabel="std of the samples",
              title="why not to start at t = 999: 100 training steps")
    right.text(0.97, 0.55, "\n".join(["x0 = (x - s eps) / a", *gains]), transform=right.transAxes, ha="right",
               va="center")
    fig.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description="A diffusion and a flow head on four kinds of 2-D tokens.")
    parser.add_argument("--steps", type=int, default=4000, help="training steps of each head")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.perf_counter()
    torch.manual_seed(0)
    label = torch.arange(4, device=device).repeat_interleave(600)
    data = toy_tokens(label).view(4, -1, 2)
    heads = {}
    for objective in ("diffusion", "flow"):
        heads[objective] = fit_diffusion(objective, args.steps, device)
        print(f"{objective}: trained for {args.steps} steps   ({time.perf_counter() - start:.0f} s so far)")
    floor = [sliced_distance(toy_tokens(label).view_as(data), data) for _ in range(8)]
    floor = torch.stack(floor).mean().cpu()
    print(f"two draws of the data: distance {floor:.3f}, std {data.std():.2f}")
    costs = [2, 4, 8, 16, 32, 100]
    counts = [10, 25, 50, 100, 250]
    curves = quality(heads, label, data, costs)
    std = explosion(label[::4], counts)

    table, head = heads["diffusion"]
    flow_table, flow_head = heads["flow"]
    strip = {}
    x, _ = head.sample(table(label), diffusion_steps=100, on_step=lambda i, x: strip.update({i + 1: x}))
    flow, _ = flow_head.sample(flow_table(label))
    guided, _ = head.sample(table(label), table(label.roll(600)), cfg=3.0)
    angle = torch.arange(8, device=device) * math.pi / 4
    modes = 1.5 * torch.stack([angle.cos(), angle.sin()], 1)                          # (8, 2)
    for name, cloud in (("data", data), ("diffusion", x), ("flow", flow)):
        near = torch.cdist(cloud.reshape(4, -1, 2)[3], modes) < 0.3
        share = near.float().mean(0)
        print(f"{name}: within 3 sigma of one of the eight modes {near.float().sum(1).mean():.3f}, "
              f"weights of the modes {share.min():.3f} to {share.max():.3f}")

    columns = [("the data", data)]
    columns += [(f"after step {i}", strip[i]) for i in (1, 50, 75, 88, 95, 100)]
    columns += [("flow, heun 25", flow), ("guidance 3", guided)]
    gains = [f"1 / a = {1 / head.table[t, 0]:,.0f} at t = {t}" for t in (999, 980)]
    plot_clouds(columns, costs, curves, floor, counts, std, data.std(), gains, "diffusion_head.png")
    print(f"wrote diffusion_head.png   ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
