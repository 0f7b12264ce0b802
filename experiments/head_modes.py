"""
Do the heads find every mode? GMM, diffusion and flow heads on 2-D mixtures whose modes are known, after equal
training.

  data       8 Gaussians on a circle of radius 1.5, std 0.1; 25 Gaussians on a 5 x 5 grid over [-2, 2]^2,
             std 0.05
  training   one learned h, Adam, batches of 128 tokens (4 noise levels each), one thread, until --seconds of
             processor time are gone (not wall time: other programs do not count); the rate falls to 0 with
             that time
  within     fraction of 20,000 samples within 3 standard deviations of a mode; 1 - exp(-4.5) = 0.989 is
             perfect
  weights    smallest and largest share of those samples in one mode, times the number of modes: 1 is perfect

    python experiments/head_modes.py  # table and experiments/results/head-modes.json; 7 minutes on one core
    python experiments/head_modes.py --seconds 2   # does it run? (give --out elsewhere)
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import diffusion_head
import gmm_head
from common import age


def modes_of(name):
    """-> the modes (M, 2) and their standard deviation."""
    if name == "ring8":
        angle = torch.arange(8) * math.pi / 4
        return 1.5 * torch.stack([angle.cos(), angle.sin()], 1), 0.1
    line = torch.linspace(-2, 2, 5)
    return torch.cartesian_prod(line, line), 0.05


HEADS = {  # name: head, learning rate, options of sample(); rates of the two demos
    "gmm K=32": (lambda: gmm_head.GMMHead(64, 2, n_mix=32), 2e-2, {}),
    "diffusion, ancestral 100": (lambda: diffusion_head.DiffusionHead(64, 2, 64), 4e-3,
                                 dict(diffusion_steps=100)),
    "diffusion, ddim 50": ("diffusion, ancestral 100", None, dict(sampler="ddim", diffusion_steps=50)),
    "flow, heun 25": (lambda: diffusion_head.DiffusionHead(64, 2, 64, objective="flow"), 4e-3,
                      dict(diffusion_steps=25)),
}


def train(head, modes, std, lr, seconds, batch_size=128):
    """Train head and one h (1, 64) -> h, number of steps."""
    h = nn.Parameter(torch.randn(1, 64))
    opt = torch.optim.Adam([h, *head.parameters()], lr=lr, betas=(0.9, 0.99), fused=True)
    steps, start = 0, time.process_time()
    while (used := (time.process_time() - start) / seconds) < 1:
        opt.param_groups[0]["lr"] = lr * min(1, (steps + 1) / 50) * (1 - used)
        x = modes[torch.randint(len(modes), (batch_size,))] + std * torch.randn(batch_size, 2)
        loss = head.loss(h.expand(batch_size, -1), x).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        steps += 1
    return h.detach(), steps


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60,
                        help="processor seconds of training for each head")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions, seeds 0, 1, ...")
    parser.add_argument("--out", default=str(ROOT / "experiments/results/head-modes.json"),
                        help="where the JSON goes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(args.seeds):
        for data in ("ring8", "grid25"):
            (modes, std), trained = modes_of(data), {}
            for name, (make, lr, options) in HEADS.items():
                torch.manual_seed(seed)
                if lr is None:                             # another sampler of a head that is trained already
                    head, h, steps = trained[make]
                else:
                    head = make()
                    h, steps = train(head, modes, std, lr, args.seconds)
                trained[name] = head, h, steps
                start = time.process_time()
                x = torch.cat([head.sample(h.expand(2000, -1), **options)[0] for _ in range(10)])
                seconds = time.process_time() - start
                far, mode = torch.cdist(x, modes).min(1)
                near = far < 3 * std
                share = torch.bincount(mode[near], minlength=len(modes)) / near.sum() * len(modes)
                row = dict(data=data, head=name, seed=seed, train_steps=steps,
                           within=near.float().mean().item(), weight_min=share.min().item(),
                           weight_max=share.max().item(), sample_us_per_token=seconds / len(x) * 1e6)
                rows.append(row)
                print(f"{data:7s} {name:25s} seed {seed}  {steps:6d} steps   within 3 sigma "
                      f"{row['within']:.3f}   weights {share.min():.2f} .. {share.max():.2f}   "
                      f"{row['sample_us_per_token']:.1f} us per token", flush=True)
    result = age.of_run() | dict(seconds=args.seconds, threads=1, rows=rows)
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
