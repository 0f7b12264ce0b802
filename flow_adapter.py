"""
A volume-preserving flow between the latents of a VAE and the transformer that models them.

GIVT's head is a mixture of axis-aligned Gaussians, and a VAE's tokens need not look like that. GIVT
(Tschannen et al. 2023, arxiv.org/abs/2312.02116, section 3.4) bends them first, by an invertible network f
trained together with the transformer by the one likelihood. Additive coupling makes that cheap: half of the
channels moves by a function of the other half, then the halves swap,

    (x1, x2) -> (x2, x1 + F(x2)),     inverse (a, b) -> (b - F(a), a),     |det df/dx| = 1,

so p(x) = p_transformer(f(x)) exactly, with no Jacobian anywhere, and F may be any network: here three 3x3
convolutions over the grid of tokens. They see later tokens too, which does no harm: f is undone only once,
after all tokens are sampled.

Shapes:  B batch, T = rows * cols tokens, D numbers in one token (even)

    tokens (B, T, D) --> (B, D, rows, cols) --n_block couplings--> (B, T, D) --> generator
    generator --> (B, T, D) --couplings undone, last first--> tokens (B, T, D)

    python flow_adapter.py     # a bent cloud made straight, writes flow_adapter.png; about 20 s

Try it yourself:
  1. Set --n_block 1: one coupling moves only one of the two coordinates. What is the best it can do?
  2. Let F see both halves. Where does inverse() break, and what does the inverse error print?
  3. Multiply x1 by exp(G(x2)) as well (RealNVP). Which term must the loss now carry?
"""
import argparse
import math
import time

import torch
import torch.nn as nn
import torch.nn.functional as F


SIZES = {
    "small": dict(n_block=8),                    # the default of train.py, and the paper's for a VAE's tokens
    "paper-16": dict(n_block=8, hidden=32),                 # 111,728 parameters for 16 numbers per token
}


# ---- Couplings, and a stack of them ---------------------------------------------------------------

class Coupling(nn.Module):
    """One additive coupling (i-RevNet's block, as in GIVT). The first one of a flow has no norm in front."""

    def __init__(self, channels, hidden, first=False):
        super().__init__()
        groups = min(32, channels)
        self.norms = nn.ModuleList([nn.Identity() if first else nn.GroupNorm(groups, channels, eps=1e-6),
                                    nn.GroupNorm(groups, hidden, eps=1e-6),
                                    nn.GroupNorm(groups, hidden, eps=1e-6)])
        self.convs = nn.ModuleList([nn.Conv2d(channels, hidden, 3, padding=1, bias=False),
                                    nn.Conv2d(hidden, hidden, 3, padding=1, bias=False),
                                    nn.Conv2d(hidden, channels, 3, padding=1, bias=False)])
        self.first = first
        nn.init.zeros_(self.convs[-1].weight)             # a mere swap; the authors' start stretches x by 1.7

    def shift(self, x):
        """F of the docstring: x (B, D/2, rows, cols) -> the same shape. Need not be invertible."""
        for i, (norm, conv) in enumerate(zip(self.norms, self.convs)):
            x = conv(x if i == 0 and self.first else F.relu(norm(x)))
        return x

    def forward(self, x1, x2):
        """x1, x2 (B, D/2, rows, cols) -> x2, x1 + F(x2), as at the top of this file."""
        return x2, x1 + self.shift(x2)

    def inverse(self, a, b):
        """What forward gave -> x1, x2. F is only evaluated, never inverted."""
        return b - self.shift(a), a


class FlowAdapter(nn.Module):
    """n_block couplings over the grid of tokens. hidden: the paper's 2 D (its "bottleneck" 4 D, halved)."""

    def __init__(self, token_dim, grid, n_block=8, hidden=None):
        super().__init__()
        if token_dim % 2:
            raise ValueError(f"a coupling halves the channels: token_dim {token_dim} must be even")
        self.grid = tuple(grid)
        hidden = hidden or 2 * token_dim
        self.blocks = nn.ModuleList([Coupling(token_dim // 2, hidden, first=i == 0) for i in range(n_block)])

    def split(self, x):                                     # (B, T, D) -> two of (B, D/2, rows, cols)
        return x.transpose(1, 2).unflatten(2, self.grid).chunk(2, dim=1)

    def join(self, x1, x2):                                 # the inverse of split
        return torch.cat([x1, x2], 1).flatten(2).transpose(1, 2)

    def forward(self, x):
        """Tokens of the tokenizer -> tokens for the generator: (B, T, D) -> (B, T, D)."""
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would not survive being undone
            x1, x2 = self.split(x.float())
            for block in self.blocks:
                x1, x2 = block(x1, x2)
            return self.join(x1, x2)

    def inverse(self, u):
        """Tokens of the generator -> tokens of the tokenizer: (B, T, D) -> (B, T, D)."""
        with torch.autocast(u.device.type, enabled=False):
            x1, x2 = self.split(u.float())
            for block in reversed(self.blocks):
                x1, x2 = block.inverse(x1, x2)
            return self.join(x1, x2)


class Adapted(nn.Module):
    """adapter + generator is again a generator: trained jointly by its loss, which is still the exact NLL."""

    def __init__(self, adapter, generator):
        super().__init__()
        self.adapter = adapter
        self.generator = generator

    def __getattr__(self, name):                          # seq_len, num_classes, head, ...: ask the generator
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("generator"), name)

    def forward(self, tokens, cond):
        """tokens (B, T, D), cond (B,) -> loss (), logs. The adapter learns through inputs and targets."""
        return self.generator(self.adapter(tokens), cond)

    @torch.no_grad()
    def sample(self, cond, known=None, known_mask=None, on_step=None, **options):
        """cond (B,) -> tokens (B, T, D) of the tokenizer. known, known_mask, on_step as in the generator.

        The values of known tokens are bent together with zeros where the others are masked, so near the
        border of the mask they are approximate. At the end the given values are put back.
        """
        def unbend(i, u, mask):
            on_step(i, self.adapter.inverse(u), mask)

        bent = None if known is None else self.adapter(known * known_mask[..., None])
        step = None if on_step is None else unbend
        u = self.generator.sample(cond, known=bent, known_mask=known_mask, on_step=step, **options)
        x = self.adapter.inverse(u)
        return x if known is None else torch.where(known_mask[..., None], known, x)


# ---- Demo: a cloud in the shape of a banana, modelled by ONE Gaussian (K = 1), with and without the flow

def banana(n):
    """n points (n, 2): a Gaussian bent along a parabola. Its entropy stays the Gaussian's."""
    a = torch.randn(n) * 1.2
    b = torch.randn(n) * 0.25
    return torch.stack([a, a * a * 0.8 + b - 1.2], 1)


def fit_banana(flow, steps, side=32, lr=3e-3):
    """Train a flow and one diagonal Gaussian on bananas -> mu, sigma, NLL in nats per point."""
    mu = nn.Parameter(torch.zeros(2))
    log_sigma = nn.Parameter(torch.zeros(2))
    opt = torch.optim.Adam([mu, log_sigma, *(flow.parameters() if flow else ())], lr=lr)

    def nll(x):
        u = flow(x) if flow else x
        return -torch.distributions.Normal(mu, log_sigma.exp()).log_prob(u).sum(-1).mean()

    for step in range(steps):
        opt.param_groups[0]["lr"] = lr * (1 - step / steps)
        loss = nll(banana(side * side).view(1, side * side, 2))
        opt.zero_grad()
        loss.backward()
        opt.step()
    with torch.no_grad():
        held_out = nll(banana(50 * side * side).view(50, side * side, 2))
    return mu.detach(), log_sigma.exp().detach(), held_out.item()


def main():
    parser = argparse.ArgumentParser(description="Bend a banana straight without changing any volume.")
    parser.add_argument("--n_block", type=int, default=6, help="number of couplings")
    parser.add_argument("--steps", type=int, default=1500, help="training steps")
    args = parser.parse_args()
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    torch.manual_seed(0)
    side = 32
    start = time.perf_counter()
    # The points are independent, so they lie in a grid whose convolutions see the middle only.
    flow = FlowAdapter(2, (side, side), args.n_block, hidden=32)
    middle = F.pad(torch.ones(1, 1, 1, 1), (1, 1, 1, 1))                              # (1, 1, 3, 3)
    for block in flow.blocks:
        for conv in block.convs:
            conv.weight.register_hook(lambda g: g * middle)
            conv.weight.data *= middle
    plain_mu, plain_sigma, plain = fit_banana(None, args.steps)
    mu, sigma, adapted = fit_banana(flow, args.steps)
    optimum = math.log(1.2 * 0.25) + math.log(2 * math.pi * math.e)
    x = banana(side * side).view(1, -1, 2)
    with torch.no_grad():
        u = flow(x)
        error = (flow.inverse(u) - x).abs().max()
        drawn = flow.inverse(mu + sigma * torch.randn(1, side * side, 2))
    small = FlowAdapter(2, (3, 3), args.n_block, hidden=32)
    small.load_state_dict(flow.state_dict())                # a grid small enough for a whole Jacobian
    jacobian = torch.autograd.functional.jacobian(lambda v: small(v.view(1, 9, 2)).flatten(), torch.randn(18))
    log_det = torch.linalg.slogdet(jacobian.double())[1]
    print(f"one Gaussian: {plain:.3f} nats per point; with the flow: {adapted:.3f}; optimum: {optimum:.3f}")
    print(f"inverse error {error:.1e}, log |det J| of a 3 x 3 grid {log_det:+.1e} (exactly 0 in theory)   "
          f"({time.perf_counter() - start:.0f} s)")
    plain_drawn = plain_mu + plain_sigma * torch.randn(1, side * side, 2)
    panels = [("tokens x", x), ("after the flow f(x)", u), ("K = 1 without the flow", plain_drawn),
              ("K = 1 with the flow", drawn)]
    fig, axes = plt.subplots(1, 4, figsize=(13, 4.2))
    for ax, (title, points) in zip(axes, panels):
        colour = x[0, :, 0] if points is x or points is u else [0.5] * side * side
        ax.scatter(points[0, :, 0], points[0, :, 1], s=4, c=colour, cmap="viridis", alpha=0.7)
        ax.set(title=title, aspect="equal", xticks=[], yticks=[], xlim=(-4.5, 4.5), ylim=(-4, 5))
    axes[2].set_xlabel(f"{plain:.2f} nats per point")
    axes[3].set_xlabel(f"{adapted:.2f} nats per point (optimum {optimum:.2f})")
    fig.suptitle("flow_adapter.py: a volume-preserving flow lets one Gaussian model a banana "
                 "(colour: the same point)")
    fig.tight_layout()
    fig.savefig("flow_adapter.png", dpi=90)
    print("wrote flow_adapter.png")


if __name__ == "__main__":
    main()
