"""
The picture on top of README: one sample of every class from every system, the first that the seed gives, none
chosen.

    python experiments/overview.py runs/shapes-vae-ar-gmm runs/shapes-vq-ar-categorical ...
"""
import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import drawing, pictures, runs

NAMES = {
    "vae-ar-gmm": "GIVT", "vae-maskgit-gmm": "GIVT-MaskGIT", "vae-mar-diffusion": "MAR",
    "vq-ar-categorical": "LlamaGen", "vq-maskgit-categorical": "MaskGIT",
    "lfq-maskgit-categorical": "MAGVIT-v2", "titok-maskgit-categorical": "TiTok"
}


def main():
    p = argparse.ArgumentParser(description="Rows are systems, columns are classes.")
    p.add_argument("runs", nargs="+", type=Path, help="run folders of train.py on the same data")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures" / "overview.png")
    args = p.parse_args()
    rows = []
    for folder in args.runs:
        run = runs.load_run(folder)
        images = drawing.draw_samples(run, torch.arange(len(run.classes)), seed=args.seed)
        rows.append((NAMES.get(folder.name.split("-", 1)[1], folder.name), images))
    rows.insert(0, ("drawn", torch.stack([first_of(run, k) for k in range(len(run.classes))])))
    pictures.save_rows(args.out, rows, ", ".join(map(str, run.classes)))
    print(f"wrote {args.out}")


def first_of(run, k):
    """The first validation image of class k."""
    images, labels = runs.open_split(run.args, "val", run.device).batch(torch.arange(500))
    return images[labels == k][0]


if __name__ == "__main__":
    main()
