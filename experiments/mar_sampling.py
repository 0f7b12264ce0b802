"""
How fast does MAR draw at the paper's sizes: the transformer, the diffusion head, the decoder?

    python experiments/mar_sampling.py           # MAR-B, 256 tokens of 16 numbers; minutes, a GPU's work
    python experiments/mar_sampling.py --quick   # tiny: does it run? 2 minutes, to compile; no JSON

Random weights, which are as fast as trained ones; the paper's setting: 64 passes, 100 denoising steps per
token, guidance, 256 x 256 pixels. As they are and with what sample.py --compile compiles; the first call,
which compiles, is told apart. Medians of --rounds. Writes experiments/results/mar-sampling[-cuda].json.
"""
import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import diffusion_head
import mar
import vae
from common import age, compiling, runs

SMALL = dict(n_layer=2, n_head=2, n_embd=32, n_buffer=4)


def build(name, device, quick):
    """-> a run with random weights, as far as compiling.for_drawing asks for it."""
    size = SMALL if quick else mar.SIZES[name]
    head_size = dict(width=32, depth=1) if quick else mar.HEAD_SIZES[name]
    image = dict(image_size=32, ch=8, ch_mult=(1, 1, 1, 1), n_res=1, groups=4) if quick else {}
    tokenizer = vae.VAE(**vae.SIZES["kl16"] | image)
    head = diffusion_head.DiffusionHead(size["n_embd"], tokenizer.token_dim, **head_size)
    torch.nn.init.normal_(head.net.final_layer.linear.weight, std=0.02)               # it starts at zero
    model = mar.MAR(head, tokenizer.seq_len, 1000, tokenizer.token_dim, grid=tokenizer.grid, **size)
    return SimpleNamespace(folder=name, generator=model.to(device).eval(), device=device,
                           tokenizer=tokenizer.to(device).eval())


def seconds(f, device):
    """-> seconds of f(), until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def measure(run, batches, steps, diffusion_steps, rounds):
    """-> rows: way, batch, seconds per image of tokens and of the decoder, seconds of the first call."""
    rows = []
    for way in ("plain", "compiled"):
        if way == "compiled":
            compiling.for_drawing(run)
        for B in batches:
            labels = torch.arange(B, device=run.device) % 1000

            def draw():
                return run.generator.sample(labels, steps, cfg=3.0, diffusion_steps=diffusion_steps)

            first = seconds(draw, run.device)
            tokens = draw()
            spent = median(seconds(draw, run.device) for _ in range(rounds))
            decoder = median(seconds(lambda: run.tokenizer.decode(tokens), run.device) for _ in range(rounds))
            rows.append(dict(way=way, batch=B, steps=steps, diffusion_steps=diffusion_steps, first_call=first,
                             tokens_s_per_image=spent / B, decoder_s_per_image=decoder / B))
            print(f"{way:9s} batch {B:3d}: {spent / B:.4f} s per image, decoder {decoder / B:.4f} s, first "
                  f"call {first:.1f} s", flush=True)
    return rows


def main(argv=None):
    p = argparse.ArgumentParser(description="Seconds per image of MAR at the paper's sizes.")
    p.add_argument("--size", choices=["mar-b", "mar-l", "mar-h"], default="mar-b", help="of the transformer")
    p.add_argument("--batches", type=int, nargs="+", default=[1, 64], help="images at once")
    p.add_argument("--rounds", type=int, default=3, help="calls that are timed after the first")
    p.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    p.add_argument("--quick", action="store_true", help="tiny model, 2 passes, to see that it runs")
    p.add_argument("--out", type=Path, help="JSON to write (default: experiments/results/mar-sampling...)")
    args = p.parse_args(argv)
    device = runs.pick_device(args.device)
    torch.set_float32_matmul_precision("high")              # as in train.py: TF32
    torch.manual_seed(0)
    run = build(args.size, device, args.quick)
    T = run.tokenizer.seq_len
    steps, diffusion_steps = (2, 2) if args.quick else (64, 100)
    rows = measure(run, args.batches, steps, diffusion_steps, args.rounds)
    if args.out or not args.quick:
        name = f"mar-sampling{'-cuda' if device.type == 'cuda' else ''}.json"
        out = args.out or Path(__file__).parent / "results" / name
        facts = age.of_run(device) | dict(size=args.size, tokens=T, quick=args.quick, rounds=args.rounds)
        out.write_text(json.dumps(facts | dict(rows=rows), indent=1) + "\n")
        print(f"wrote {out}")


if __name__ == "__main__":
    main()
