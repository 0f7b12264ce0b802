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
  3. Set min_scale to 1e-6 in fit_toy() and train on eight fixed points: what does the loss tend to?
"""
import argparse
import math
import time

import torch
import torch.nn as nn


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
        """Raw outputs (..., K + 2KD) -> log_pi (..., K), normalised; mu (..., K, D); sigma (..., K, D) >= min_scale.

        sigma = (s + sqrt(s^2 + 4)) / 2, "square-plus": a smooth positive function with value 1 at 0, like softplus
        but growing and decaying without exp. (GIVT's code; its class default misplaces the bracket.)
        """
        raw = raw.float()
        logits = raw[..., :self.n_mix]
        mu, s = raw[..., self.n_mix:].unflatten(-1, (self.n_mix, 2, self.token_dim)).unbind(-2)
        sigma = ((s + torch.sqrt(s * s + 4)) / 2).clamp(min=self.min_scale)
        return logits.log_softmax(-1), mu, sigma

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
        log_n = -(0.5 * z * z + sigma.log()).sum(-1) - 0.5 * math.log(2 * math.pi) * x.shape[-1]
        return torch.logsumexp(log_pi + log_n, dim=-1)                                      # (...)

    def log_prob(self, h, x):
        """log p(x | h) in nats, one number per token: h (..., C), x (..., D) -> (...). GIVT section 3.2."""
        return self.density(self.mixture(h), x)

    def loss(self, h, x):
        """Negative log-likelihood in nats per token, not reduced: h (..., C), x (..., D) -> (...)."""
        return -self.log_prob(h, x)

    @staticmethod
    def draw(mixture, temperature=1.0, n=()):
        """Draw from (log_pi, mu, sigma): -> x (*n, ..., D). temperature multiplies every sigma."""
        log_pi, mu, sigma = mixture
        gumbel = -torch.log(-torch.log(torch.rand(*n, *log_pi.shape, device=mu.device).clamp(1e-20, 1 - 1e-7)))
        k = (log_pi + gumbel).argmax(-1)[..., None, None]                                   # (*n, ..., 1, 1)
        k = k.expand(*k.shape[:-1], mu.shape[-1])                                           # (*n, ..., 1, D)
        pick = lambda a: a.expand(*n, *a.shape).gather(-2, k).squeeze(-2)                   # (*n, ..., D)
        mu, sigma = pick(mu), pick(sigma)
        return mu + temperature * sigma * torch.randn_like(mu)

    @torch.no_grad()
    def sample(self, h, h_uncond=None, cfg=1.0, temperature=1.0, n_tries=32):
        """Draw one token per position: h (..., C) -> x (..., D), log p(x | h) (...).

        temperature scales sigma (GIVT's "variance scaling"). With h_uncond, guidance: x follows
        p(x|h)^cfg * p(x|h_uncond)^(1 - cfg), up to a constant, by drawing n_tries tokens from p(x|h) and keeping one
        with probability proportional to (p(x|h) / p(x|h_uncond))^(cfg - 1). Guides the whole mixtures, so it does
        not matter in which order a mixture lists its components (in the authors' sampler it does).
        """
        conditional = self.mixture(h)
        if h_uncond is None or cfg == 1.0:
            x = self.draw(conditional, temperature)
            return x, self.density(conditional, x)
        many = self.draw(conditional, temperature, (n_tries,))                              # (N, ..., D)
        log_c, log_u = self.density(conditional, many), self.density(self.mixture(h_uncond), many)
        weights = ((cfg - 1) * (log_c - log_u)).softmax(0)                                  # (N, ...)
        pick = torch.multinomial(weights.flatten(1).T, 1).T.view(1, *weights.shape[1:])     # (1, ...)
        x = many.gather(0, pick.unsqueeze(-1).expand(1, *many.shape[1:])).squeeze(0)
        return x, log_c.gather(0, pick).squeeze(0)


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
    label = torch.arange(4, device=device).repeat_interleave(4000)
    columns = [("the data", toy_tokens(label))]
    for n_mix in args.n_mix:
        start = time.perf_counter()
        table, head, nll = fit_toy(n_mix, args.steps, device)
        print(f"K = {n_mix:3d}: nll in nats  " + "  ".join(f"{n} {v:.3f}" for n, v in zip(names, nll))
              + f"   ({time.perf_counter() - start:.0f} s)")
        columns.append((f"K = {n_mix}", head.sample(table(label))[0]))
    print(f"lowest possible:             checkerboard {math.log(8):.3f}  eight Gaussians {optimum:.3f}")
    columns.append((f"K = {n_mix}, temperature 0.5", head.sample(table(label), temperature=0.5)[0]))
    other = table(label.roll(4000))                                                         # guide away from another class
    columns.append((f"K = {n_mix}, guidance 3", head.sample(table(label), other, cfg=3.0)[0]))

    fig, axes = plt.subplots(4, len(columns), figsize=(2.3 * len(columns), 9.6), squeeze=False)
    for row in range(4):
        for ax, (title, x) in zip(axes[row], columns):
            x = x.view(4, -1, 2)[row].cpu()
            ax.plot(x[:, 0], x[:, 1], ".", ms=1.2, alpha=0.4)
            ax.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=[], yticks=[], aspect="equal")
            if row == 0:
                ax.set_title(title, fontsize=10)
        axes[row][0].set_ylabel(names[row])
    fig.suptitle("gmm_head.py: tokens drawn for four classes (guidance pushes each class away from the one above it)")
    fig.tight_layout()
    fig.savefig("gmm_head.png", dpi=80)
    print("wrote gmm_head.png")


if __name__ == "__main__":
    main()
