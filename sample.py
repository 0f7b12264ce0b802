"""
Draw from a trained run: a labelled grid, an .npz batch for evaluators, an animation of the tokens appearing.

    python sample.py runs/shapes-vae-ar-gmm                         # RUN/samples.png, one row per class
    python sample.py runs/shapes-vae-ar-gmm --class star --n 64     # one class
    python sample.py runs/shapes-vae-ar-gmm --npz out.npz --n 5000  # uint8 (N, H, W, 3) `arr_0`: what ADM's evaluator reads
    python sample.py runs/shapes-vae-ar-gmm --gif                   # RUN/samples.gif, token by token

Without --cfg and --temperature the defaults below are used; evaluate.py and train.py use the same ones.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
from data import BadInput

DEFAULTS = {"gmm": dict(cfg=2.5, temperature=0.9), "categorical": dict(cfg=1.5, temperature=1.0)}


@torch.no_grad()
def draw_tokens(run, labels, cfg=None, temperature=None, on_step=None, **tricks):
    """labels (B,) int64 -> tokens (B, T[, D]) on the run's device; None means this head's default."""
    default = DEFAULTS[run.args.head]
    return run.generator.sample(labels.to(run.device), cfg=default["cfg"] if cfg is None else cfg,
                                temperature=default["temperature"] if temperature is None else temperature,
                                on_step=on_step, **tricks)


@torch.no_grad()
def draw_samples(run, labels, cfg=None, temperature=None, batch_size=250, seed=0, **tricks):
    """labels (N,) int64 -> images (N, 3, H, W) float32 in [-1, 1] on the CPU, in batches; a function of seed."""
    images = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for part in labels.split(batch_size):
            images.append(run.tokenizer.decode(draw_tokens(run, part, cfg, temperature, **tricks)).float().cpu())
    return torch.cat(images)


def save_gif(path, run, labels, columns, cfg, temperature, seed):
    """Decode the half-written token grids too: unknown tokens are 0, the mean of all tokens."""
    frames = []

    def on_step(i, tokens, unknown):
        shown = tokens.masked_fill(unknown.view(*unknown.shape, *[1] * (tokens.ndim - 2)), 0)
        frames.append(data.tile(run.tokenizer.decode(shown), columns, scale=max(1, 64 // run.args.image_size)))
    torch.manual_seed(seed)
    draw_tokens(run, labels, cfg, temperature, on_step)
    pictures = [Image.fromarray(f) for f in frames]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[150] * (len(pictures) - 1) + [2000], loop=0)


def class_labels(args, classes):
    """--class and --n -> labels (N,): one class (by name or number), or all of them equally often."""
    if args.cls is None:
        n = args.n or 8 * len(classes)
        return torch.arange(n) * len(classes) // n
    if args.cls in classes:
        k = list(classes).index(args.cls)
    elif args.cls.isdigit() and int(args.cls) < len(classes):
        k = int(args.cls)
    else:
        raise BadInput(f"--class {args.cls}: the classes are {', '.join(map(str, classes))}, or 0 to {len(classes) - 1}")
    return torch.full((args.n or 16,), k)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Draw samples from a trained run.")
    p.add_argument("run", help="run folder of a generator, such as runs/shapes-vae-ar-gmm")
    p.add_argument("--n", type=int, help="number of samples (default: 8 per class, or 16 of one --class)")
    p.add_argument("--class", dest="cls", help="only this class, by name or number")
    p.add_argument("--cfg", type=float, help="guidance scale; 1 is off")
    p.add_argument("--temperature", type=float, help="below 1: closer to the mode; gmm: scales every sigma")
    p.add_argument("--batch_size", type=int, default=250, help="samples drawn at once")
    p.add_argument("--seed", type=int, default=0, help="the same seed gives the same samples")
    p.add_argument("--device", help="cpu, cuda, mps (default: CUDA if there is one)")
    p.add_argument("--out", help="the PNG to write (default: RUN/samples.png)")
    p.add_argument("--npz", help="also write the samples as uint8 (N, H, W, 3) `arr_0`, with `labels`")
    p.add_argument("--gif", nargs="?", const="", help="also write an animation of the tokens appearing (default: RUN/samples.gif)")
    return p.parse_args(argv)


def main(argv=None):
    from train import load_run, pick_device
    args = parse_args(argv)
    for name in ("n", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise BadInput(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.temperature is not None and args.temperature < 0:
        raise BadInput(f"--temperature {args.temperature}: must not be negative")
    run = load_run(args.run, pick_device(args.device))
    if run.generator is None:
        raise BadInput(f"{args.run}: a tokenizer alone cannot draw; name the run folder of a generator")
    labels = class_labels(args, run.classes)
    start = time.perf_counter()
    images = draw_samples(run, labels, args.cfg, args.temperature, args.batch_size, args.seed)
    seconds = time.perf_counter() - start
    print(f"{len(labels)} samples in {seconds:.2f} s: {seconds / len(labels):.4f} s per image at batch "
          f"{min(args.batch_size, len(labels))}, fp32, {run.device.type}")
    out = Path(args.out or run.folder / "samples.png")
    try:
        if args.npz:
            np.savez(args.npz, arr_0=data.to_uint8(images).permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
            print(f"wrote {args.npz}")
        shown = torch.cat([(labels == k).nonzero()[:12 if args.cls is None else None, 0] for k in labels.unique()])
        data.save_class_grid(out, images[shown], labels[shown], run.classes, f"{run.folder.name}: samples")
        print(f"wrote {out}")
        if args.gif is not None:
            path = Path(args.gif or run.folder / "samples.gif")
            save_gif(path, run, labels[shown][:80], 8, args.cfg, args.temperature, args.seed)
            print(f"wrote {path}")
    except OSError as e:
        raise BadInput(f"could not write ({e})") from None


if __name__ == "__main__":
    main()
