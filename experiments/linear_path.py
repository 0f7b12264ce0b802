"""
What the linear path of vae.py is worth: none, from a random orthonormal basis, from PCA.

  networks   those of train.py's default VAE, which see 2 x 2 pixels; 8 numbers per token for drawn shapes,
             32 for pictures in colour
  arms       without the path; the path on a random orthonormal basis; the path on principal components
  budget     the same processor time for each, the arms of a seed in turns; Muon, as in train.py
  measured   on images that were never seen: PSNR, beside that of PCA without networks

    python experiments/linear_path.py                          # drawn shapes
    python experiments/linear_path.py --data cifar10.tar.gz    # your pictures

Writes results/linear-path-DATA.json. Ten minutes of processor time on one core for each data set.
"""
import argparse
import json
import sys
from pathlib import Path
from statistics import mean, stdev

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import train
import vae
from common import age, runs, yardsticks
from common.metrics import psnr
from experiments import equal_time

ARMS = ("no path", "orthonormal", "PCA")


def build(arm, token_dim, images):
    """One arm's VAE, begun as train.py begins it: images (N, 3, H, W) are a first look at the data."""
    options = vae.SIZES["patches"] | dict(token_dim=token_dim, linear=arm != "no path")
    model = vae.VAE(**options | dict(image_size=images.shape[-1]))
    if arm == "orthonormal":
        model.path.start = lambda x: start_anywhere(model.path, x)
    model.start(images)
    return model


@torch.no_grad()
def start_anywhere(path, images):
    """As vae.LinearPath.start, but on directions drawn at random: what PCA is compared with."""
    patches = path.cut(images).flatten(0, 1)                                          # (N * T, n_in)
    path.mean.copy_(patches.mean(0))
    path.basis.copy_(torch.linalg.qr(torch.randn_like(path.basis)).Q)
    path.std.copy_(((patches - path.mean) @ path.basis).std(0))


@torch.no_grad()
def judge(model, images):
    """images (N, 3, H, W) -> mean PSNR of their reconstructions, dB."""
    model.eval()
    parts = images.split(250)
    return torch.cat([psnr(part, model.decode_raw(model.posterior(part)[0]).clamp(-1, 1))
                      for part in parts]).mean().item()


def main():
    p = argparse.ArgumentParser(description="A VAE without a linear path, and with two kinds of it.")
    p.add_argument("--data", default="shapes", help="shapes, or your images as of train.py")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="which seeds")
    p.add_argument("--seconds", type=float, default=60, help="processor time for each arm and seed")
    p.add_argument("--lr", type=float, default=1e-2, help="highest learning rate")
    args = p.parse_args()
    args.optimizer = "muon"
    args.weight_decay = 0.02
    args.device = torch.device("cpu")
    sets = [data.load(args.data, 32, split, args.device, 0, flip=False, n_shapes=n)
            for split, n in (("train", 20_000), ("val", None))]
    images, held_out = (s.batch(torch.linspace(0, len(s) - 1, min(len(s), n)).long())[0]
                        for s, n in zip(sets, (20_000, 1000)))
    kind = "drawn shapes"
    if args.data != "shapes":
        kind = "colour pictures" if runs.in_colour(sets[0], 2 / 127.5) else "grey pictures"
    token_dim = runs.PER_TOKEN[kind]
    found = {name: [] for name in ARMS}
    for seed in args.seeds:
        arms = {}
        for name in ARMS:
            torch.manual_seed(seed)
            model = build(name, token_dim, images[:train.STARTED_FROM])
            arms[name] = equal_time.Arm(model, train.make_optimizers(model, args, args.lr), args.lr)
        draw = lambda: (images[torch.randint(len(images), (32,))],)
        equal_time.train_in_turns(arms, draw, args.seconds)
        for name, arm in arms.items():
            found[name].append((judge(arm.model, held_out), arm.steps))
            print(f"seed {seed}, {name}: {found[name][-1][0]:.2f} dB after {arm.steps} steps", flush=True)
    pca = yardsticks.pca_psnr(images, held_out, (4, 4), token_dim)
    for name, results in found.items():
        db = [value for value, _ in results]
        print(f"{name:12s} {mean(db):.2f} +- {stdev(db) if len(db) > 1 else 0:.2f} dB")
    print(f"PCA alone    {pca:.2f} dB")
    facts = age.of_run(args.device) | dict(token_dim=token_dim, seconds=args.seconds, seeds=args.seeds,
                                           found=found, pca=pca)
    name = Path(args.data).name.split(".")[0]
    out = ROOT / "experiments" / "results" / f"linear-path-{name}.json"
    out.write_text(json.dumps(facts) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
