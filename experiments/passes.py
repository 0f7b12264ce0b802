"""
Passes and milliseconds per image: token by token (GIVT, LlamaGen), masked (MaskGIT), by scales (VAR).

Systems have train.py's default size for the device and random weights. Sampling is that of sample.py, with
guidance and the decoder, float32, not compiled. On a CPU it is processor time, so that other programs on the
machine do not count; on a GPU it is wall time. "linear" is what the linear layers of the generator take of
one image, called one after the other with inputs of the same shapes and nothing between them: the floor.

    python experiments/passes.py             # a table; a minute of one CPU core
"""
import argparse
import sys
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import drawing, runs
from experiments.benchmark import build

SYSTEMS = [
    ("GIVT", "--tokenizer vae --head gmm"),
    ("LlamaGen", "--tokenizer vq --generator ar"),
    ("MaskGIT", "--tokenizer vq --generator maskgit"),
    ("VAR", "--tokenizer msvq --generator var"),
]


def measure(run, batch, rounds):
    """-> milliseconds per image, and passes, which on_step counts."""
    passes = []
    labels = torch.arange(batch) % 10
    drawing.draw_tokens(run, labels, on_step=lambda i, tokens, mask: passes.append(i))
    ms = timed(lambda: drawing.draw_samples(run, labels, batch_size=batch), run.device, rounds)
    return ms / batch, len(passes)


def timed(function, device, rounds):
    """-> milliseconds of a call, the median."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.cpu.synchronize
    taken = []
    for _ in range(rounds):
        wait()
        start = clock()
        function()
        wait()
        taken.append(1000 * (clock() - start))
    return median(taken)


@torch.no_grad()
def linear_alone(run, rounds):
    """-> milliseconds of all calls of linear layers that one image needs, without what lies between."""
    calls = []
    layers = [m for m in run.generator.modules() if isinstance(m, torch.nn.Linear)]
    keep = lambda layer, x: calls.append((layer, torch.randn_like(x[0])))
    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    drawing.draw_tokens(run, torch.zeros(1, dtype=torch.long))
    for hook in hooks:
        hook.remove()
    return timed(lambda: [layer(x) for layer, x in calls], run.device, rounds)


def main(argv=None):
    p = argparse.ArgumentParser(description="Passes and milliseconds per image of three kinds of generators.")
    p.add_argument("--device", help="cpu, cuda (default: a GPU if there is one)")
    p.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="images drawn at once")
    p.add_argument("--rounds", type=int, default=5, help="times each is drawn; the median is printed")
    args = p.parse_args(argv)
    device = runs.pick_device(args.device)
    print("| | tokens | passes | M parameters | " + " | ".join(f"ms, batch {n}" for n in args.batches)
          + " | linear, batch 1 |")
    for name, flags in SYSTEMS:
        s = build((name, "", 10, flags), device)
        s.args.condition = "class"
        run = SimpleNamespace(folder=Path(name), args=s.args, tokenizer=s.tokenizer.eval(),
                              generator=s.raw.eval(), classes=list(range(10)), device=device)
        found = [measure(run, n, args.rounds) for n in args.batches]
        millions = sum(p.numel() for p in s.raw.parameters()) / 1e6
        print(f"| {name} | {s.T} | {found[0][1]} | {millions:.1f} | "
              + " | ".join(f"{ms:.0f}" for ms, _ in found) + f" | {linear_alone(run, args.rounds):.1f} |")


if __name__ == "__main__":
    main()
