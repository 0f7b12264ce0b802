"""
A normalising flow as a generator: TarFlow (Zhai et al. 2024, arxiv.org/abs/2412.06329) of our own parts.

GIVT with one Gaussian per token is one invertible block: z_t = (x_t - mu(x_<t)) / sigma(x_<t). Its z is
another sequence, on which a second block works in the other direction, and so on. The density is exact:

    log p(x) = log N(z_last; 0, 1) - sum over blocks and tokens of log sigma

Training computes all z_t of a block in one pass. Drawing undoes the blocks, token by token. Here 4 layers are
1, 2 or 4 blocks, on whitened pixels (vae.Patches) of drawn shapes: 16 x 16 pixels, 4 x 4 tokens.

    python experiments/tarflow.py    # bits per dimension of the three, writes results/tarflow.json
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import vae
from ar_transformer import ARTransformer
from common import age


class FlowBlock(nn.Module):
    """x (B, T, D) <-> z (B, T, D), by a causal transformer that reads x. It starts as the identity."""

    def __init__(self, seq_len, token_dim, num_classes, n_layer, **size):
        super().__init__()
        self.net = ARTransformer(nn.Identity(), seq_len, num_classes, token_dim, n_layer=n_layer,
                                 label_drop=0.0, **size)
        self.out = nn.Linear(self.net.norm.weight.shape[0], 2 * token_dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def mean_and_log_sigma(self, x, cond):
        return self.out(self.net.hidden_states(x, cond)).chunk(2, -1)

    def forward(self, x, cond):
        """-> z (B, T, D), log |dz / dx| (B,): the Jacobian is triangular."""
        mean, log_sigma = self.mean_and_log_sigma(x, cond)
        return (x - mean) * torch.exp(-log_sigma), -log_sigma.sum((1, 2))

    def inverse(self, z, cond):
        x = torch.zeros_like(z)
        for t in range(z.shape[1]):                         # x_t needs the x before it
            mean, log_sigma = self.mean_and_log_sigma(x, cond)
            x[:, t] = z[:, t] * torch.exp(log_sigma[:, t]) + mean[:, t]
        return x


class TarFlow(nn.Module):
    """Blocks that read from the first token and from the last in turn. A Generator, of tokens (B, T, D)."""

    def __init__(self, seq_len, token_dim, num_classes, n_block, n_layer, **size):
        super().__init__()
        self.shape = (seq_len, token_dim)
        self.blocks = nn.ModuleList(FlowBlock(seq_len, token_dim, num_classes, n_layer, **size)
                                    for _ in range(n_block))

    def encode(self, x, cond):
        """x (B, T, D) -> z (B, T, D), log |dz / dx| (B,)."""
        log_det = 0
        for block in self.blocks:
            x, more = block(x, cond)
            x = x.flip(1)
            log_det = log_det + more
        return x, log_det

    @torch.no_grad()
    def decode(self, z, cond):
        for block in reversed(self.blocks):
            z = block.inverse(z.flip(1), cond)
        return z

    def forward(self, tokens, cond):
        """-> -log p, nats per token (), logs (none)."""
        z, log_det = self.encode(tokens, cond)
        log_p = -0.5 * (z**2 + math.log(2 * math.pi)).sum((1, 2)) + log_det
        return -log_p.mean() / self.shape[0], {}

    def sample(self, cond):
        return self.decode(torch.randn(len(cond), *self.shape, device=cond.device), cond)


def main():
    p = argparse.ArgumentParser(description="Equal layers in 1, 2 and 4 blocks of a normalising flow.")
    p.add_argument("--steps", type=int, default=300, help="training steps of every arm, 32 images each")
    args = p.parse_args()
    images, labels, _, _ = data.draw(torch.arange(8000), 16)
    val_images, val_labels, _, _ = data.draw(torch.arange(1000) + data.VAL_INDEX, 16)
    images, val_images = (((x + 1) * 127.5).round() / 127.5 - 1 for x in (images, val_images))   # 256 values
    torch.manual_seed(0)
    patches = vae.Patches(16, 4)
    patches.start(images[:2000])
    found = {}
    for n_block in (1, 2, 4):
        torch.manual_seed(0)
        start = time.process_time()
        model = TarFlow(patches.seq_len, patches.token_dim, 10, n_block, 4 // n_block, n_embd=96, n_head=2)
        opt = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.02)
        for step in range(args.steps):
            opt.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 30) * (1 - step / args.steps)
            i = torch.randint(len(images), (32,))
            loss, _ = model(patches.encode(images[i]), labels[i])
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
        with torch.no_grad():
            bits = patches.bits_per_dim(model(patches.encode(val_images), val_labels)[0]).item()
        found[f"{n_block} x {4 // n_block}"] = dict(bits=bits, seconds=time.process_time() - start)
        print(f"{n_block} blocks of {4 // n_block} layers: {bits:.3f} bits per dimension (an upper bound: "
              f"uniform dequantisation), {found[f'{n_block} x {4 // n_block}']['seconds']:.0f} s", flush=True)
    path = ROOT / "experiments" / "results" / "tarflow.json"
    path.write_text(json.dumps(age.of_run() | dict(steps=args.steps, arms=found), indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
