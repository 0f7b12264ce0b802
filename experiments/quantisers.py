"""
Three quantisers without a table in one tokenizer: LFQ, BSQ, FSQ, and LFQ without its entropies.

  networks   lfq.py's "small" with one residual block and one downsampling, on drawn shapes of 16 x 16
             pixels: 8 x 8 ids
  codes      1,024 (10 signs), FSQ 1,000 (8, 5, 5, 5): the paper's nearest
  budget     the same steps, batch and learning rate for all, nothing tuned per arm
  measured   on images that were never seen: share of the codes that occur, and PSNR

    python experiments/quantisers.py  # trains the arms, writes results/quantisers.json and .png

The defaults take one and a half minutes of processor time on one core of a shared AMD EPYC.
"""
import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import lfq
from common import age
from common.metrics import psnr

ARMS = {
    "LFQ": dict(codebook="lfq"),
    "LFQ without entropies": dict(codebook="lfq", entropy=0.0),
    "BSQ": dict(codebook="bsq"),
    "FSQ": dict(codebook="fsq"),
}
COLOURS = dict(zip(ARMS, ("tab:blue", "tab:red", "tab:orange", "tab:green")))


@torch.no_grad()
def look(model, images):
    """images (N, 3, H, W) -> share of the codes that occur, %, and PSNR, dB."""
    model.eval()
    ids = model.encode(images)
    in_use = 100 * (model.quantizer.count(ids) > 0).float().mean().item()
    db = psnr(images, model.decode(ids)).mean().item()
    model.train()
    return in_use, db


def train_arm(options, seed, steps, every):
    """-> [(step, % of the codes in use, dB)] of one tokenizer."""
    torch.manual_seed(seed)
    images = data.draw(torch.arange(2000), 16, seed)[0]
    held_out = data.draw(torch.arange(256) + data.VAL_INDEX, 16, seed)[0]
    model = lfq.LFQ(**lfq.SIZES["small"] | dict(image_size=16, ch_mult=(1, 2), n_res=1) | options)
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    curve = [(0, *look(model, held_out))]
    for step in range(steps):
        opt.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 30) * (1 - step / steps)
        loss, _ = model(images[torch.randint(len(images), (8,))])
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        if (step + 1) % every == 0:
            curve.append((step + 1, *look(model, held_out)))
    return curve


def save_figure(path, curves):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, runs in curves.items():
        steps = [step for step, _, _ in runs[0]]
        for ax, k in ((axes[0], 1), (axes[1], 2)):
            ax.plot(steps, [mean(run[i][k] for run in runs) for i in range(len(steps))], color=COLOURS[name],
                    label=name)
            for run in runs:
                ax.plot(steps, [point[k] for point in run], color=COLOURS[name], lw=0.5, alpha=0.6)
    axes[0].set(title="codes that occur, %", xlabel="training step", ylim=(0, 102))
    axes[1].set(title="PSNR of reconstructions, dB", xlabel="training step")
    axes[1].legend(fontsize=8, loc="lower right")
    for ax in axes:
        ax.grid(alpha=0.3)
    fig.savefig(path, dpi=80)


def main():
    p = argparse.ArgumentParser(description="LFQ, BSQ and FSQ: codes in use and PSNR against steps.")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="which seeds")
    p.add_argument("--steps", type=int, default=200, help="training steps of every arm, 8 images each")
    args = p.parse_args()
    start = time.process_time()
    curves = {}
    for name, options in ARMS.items():
        curves[name] = [train_arm(options, seed, args.steps, max(1, args.steps // 10)) for seed in args.seeds]
        last = list(zip(*(run[-1] for run in curves[name])))
        spread = [stdev(values) if len(values) > 1 else 0 for values in last]
        print(f"{name:22s} {mean(last[1]):5.1f} +- {spread[1]:.1f}% of the codes, {mean(last[2]):.1f} +- "
              f"{spread[2]:.1f} dB   {time.process_time() - start:.0f} s so far", flush=True)
    out = ROOT / "experiments" / "results" / "quantisers"
    facts = age.of_run() | dict(steps=args.steps, seeds=args.seeds, seconds=time.process_time() - start,
                                curves=curves)
    out.with_suffix(".json").write_text(json.dumps(facts) + "\n")
    save_figure(ROOT / "docs" / "pictures" / "quantisers.png", curves)
    print(f"wrote {out}.json and docs/pictures/quantisers.png")


if __name__ == "__main__":
    main()
