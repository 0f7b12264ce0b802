"""
Our models at the very configurations at which the authors' code was timed. Medians of seconds on the wall
with two threads, float32 as there and bfloat16 as train.py has it where the processor multiplies it; and
processor time of one thread.

  mar       64 tokens of 16 numbers, 192 wide, 4 + 4 blocks, 4 heads, head 3 x 256, 64 buffer places, dropout
            .1, batch 32
            authors' code on two shared cores of an AMD EPYC: forward + backward 2309 ms; 16 samples 8.45 s,
            of which denoising 2.40 s (the note does not say in how many passes: here 16, with 100 denoising
            steps, no guidance)
  maskgit   TiTok's generator at 256 wide, 6 layers, 64 ids of 1024, batch 32, dropout .1; 16 samples in 8
            passes, guided
            authors' code there, two threads: about 600 ms a step, 1.34 s for the samples

Other machine, other minute: a ratio to those figures is a rough one; give the machine to it alone. In float32
85% of a step of maskgit is matrix products of the same sizes as the authors', so equal is what can be had.
Decoding against LlamaGen's, side by side in one process: experiments/decoding.py.

    python experiments/same_config.py          # 2 minutes; writes experiments/results/same-config.json
"""
import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import diffusion_head
import mar
import maskgit
from common import age

AUTHORS = {"mar": (2309, 8450), "maskgit": (600, 1340)}     # ms


def build(name):
    torch.manual_seed(0)
    if name == "mar":
        head = diffusion_head.DiffusionHead(192, 16, 256, 3)
        model = mar.MAR(head, 64, 1000, token_dim=16, n_layer=8, n_head=4, n_embd=192, dropout=0.1,
                        n_buffer=64)
        return model, torch.randn(32, 64, 16), dict(steps=16, diffusion_steps=100)
    model = maskgit.MaskGIT(maskgit.CategoricalHead(256, 1024), 64, 1000, vocab_size=1024, n_layer=6,
                            n_head=8, n_embd=256, dropout=0.1, style="bert")
    return model, torch.randint(1024, (32, 64)), dict(steps=8, cfg=2.0)


def timed(f, repeats, clock):
    """Median time of f() in ms, after one call that warms up."""
    f()
    times = []
    for _ in range(repeats):
        start = clock()
        f()
        times.append(1000 * (clock() - start))
    return median(times)


def measure(model, tokens, options, threads, dtype):
    """-> forward + backward, and 16 samples, in ms."""
    torch.set_num_threads(threads)
    labels, clock = torch.arange(len(tokens)), time.process_time if threads == 1 else time.perf_counter

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
            loss, _ = model(tokens, labels)
        model.zero_grad(set_to_none=True)
        loss.backward()
    train_ms = timed(step, 9, clock)
    model.eval()
    sample_ms = timed(lambda: model.sample(labels[:16], **options), 5, clock) if dtype == "fp32" else None
    model.train()
    return train_ms, sample_ms


def main(argv=None):
    p = argparse.ArgumentParser(description="Our models at the configurations of the authors' timings.")
    p.add_argument("--out", help="JSON to write (default: experiments/results/same-config.json)")
    args = p.parse_args(argv)
    rows = {}
    for name, (authors_step, authors_sample) in AUTHORS.items():
        model, tokens, options = build(name)
        rows[name] = dict(parameters=sum(p.numel() for p in model.parameters()),
                          authors_train_ms=authors_step, authors_sample_16_ms=authors_sample, options=options)
        for threads, dtype in ((2, "fp32"), (2, "bf16"), (1, "fp32")):
            train_ms, sample_ms = measure(model, tokens, options, threads, dtype)
            rows[name][f"{threads}-{dtype}"] = dict(train_ms=train_ms, sample_16_ms=sample_ms)
            samples = f", 16 samples {sample_ms:.0f} ms (authors {authors_sample})" if sample_ms else ""
            print(f"{name:8s} {rows[name]['parameters'] / 1e6:.2f}M  {threads} threads {dtype}  forward + "
                  f"backward {train_ms:.0f} ms (authors {authors_step}){samples}", flush=True)
    out = Path(args.out or Path(__file__).parent / "results" / "same-config.json")
    facts = age.of_run()
    out.write_text(json.dumps(facts | rows, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
