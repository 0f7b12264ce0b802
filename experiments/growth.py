"""
What does a token cost when there are more of them? Three generators, T = 16, 64, 256, 1024 tokens an image.

    python experiments/growth.py             # table, JSON in experiments/results; 4 minutes of one CPU core

Size "tiny", random weights, tokens of 8 numbers, float32, one thread. Cost is processor time per token, the
median of some calls. A training step, forward and backward, always has 2,048 tokens, so images get fewer as T
grows; MAR masks half of them. Sampling draws 2 images with guidance, so 4 rows: the causal transformer in T
passes, MaskGIT in 12, MAR in at most 64, with 10 denoising steps. Memory is the largest sum of the tensors
that lived at once during a call, less those that were there before it, by the records of torch's profiler:
parameters and the scratch space of oneDNN are not in it.
"""
import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ar_transformer
import mar
import maskgit
from common import age
from diffusion_head import DiffusionHead
from experiments.benchmark import save
from gmm_head import GMMHead

D, TOKENS, DRAWN = 8, 2048, 2                               # numbers in a token, tokens a step, images drawn


def build(name, T, dropout=0.0):
    """-> a generator of T tokens, and its tricks of sampling."""
    grid, cls = (math.isqrt(T),) * 2, dict(ar=ar_transformer.ARTransformer, maskgit=maskgit.MaskGIT,
                                           mar=mar.MAR)[name]
    size = dict(ar=ar_transformer.SIZES, maskgit=maskgit.SIZES, mar=mar.SIZES)[name]["tiny"]
    head = GMMHead(size["n_embd"], D, 8)
    if name == "mar":
        head = DiffusionHead(size["n_embd"], D, **mar.HEAD_SIZES["tiny"])
    model = cls(head, T, 10, token_dim=D, grid=grid, dropout=dropout, **size)
    model.mask_count = lambda: T // 2                       # of MAR: its mean, the same in every step
    return model, dict(diffusion_steps=10) if name == "mar" else {}


def step(model, T):
    x = torch.randn(TOKENS // T, T, D)
    model.train()(x, torch.arange(len(x)) % 10)[0].backward()
    model.zero_grad(set_to_none=True)


def processor_time(job, seconds=3.0):
    """Median of calls until so many seconds are spent; the first is not counted if others follow."""
    taken = []
    while not taken or sum(taken) < seconds:
        start = time.process_time()
        job()
        taken.append(time.process_time() - start)
    return median(taken[1:] or taken)


def bytes_added(job):
    """The peak of the bytes that tensors take during a call, over those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        job()
    records = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for record in sorted(records, key=lambda e: e.start_ns()):
        total += record.nbytes()
        peak = max(peak, total)
    return peak


def measure(name, T, dropout):
    """-> the numbers of one generator and one T."""
    model, tricks = build(name, T, dropout)
    jobs = {"step": (partial(step, model, T), TOKENS),
            "sampling": (lambda: model.eval().sample(torch.arange(DRAWN), cfg=2.0, **tricks), DRAWN * T)}
    row = dict(generator=name, T=T)
    for job, (run, tokens) in jobs.items():
        torch.manual_seed(0)
        row[f"{job}_ms_per_token"] = 1000 * processor_time(run) / tokens
        row[f"{job}_mb_added"] = bytes_added(run) / 1e6
    return row


def main(argv=None):
    p = argparse.ArgumentParser(description="Cost per token and memory against the number of tokens.")
    p.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 256, 1024], help="tokens of an image")
    p.add_argument("--dropout", type=float, default=0.0, help="of all three (default: 0, as in train.py)")
    p.add_argument("--out", type=Path, help="JSON to write (default: experiments/results/growth.json)")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    rows = [measure(name, T, args.dropout) for name in ("ar", "maskgit", "mar") for T in args.tokens]
    print("| | " + " | ".join(f"T = {T}" for T in args.tokens) + " |\n|" + "---|" * (len(args.tokens) + 1))
    for name in ("ar", "maskgit", "mar"):
        for key, label in (("step_ms_per_token", "step, ms per token"),
                           ("sampling_ms_per_token", "sampling, ms per token"),
                           ("step_mb_added", "step, MB added"), ("sampling_mb_added", "sampling, MB added")):
            cells = [f"{row[key]:.3g}" for row in rows if row["generator"] == name]
            print(f"| {name}: {label} | " + " | ".join(cells) + " |")
    facts = age.of_run() | dict(dropout=args.dropout)
    save(args.out or Path(__file__).parent / "results" / "growth.json", facts | dict(rows=rows))


if __name__ == "__main__":
    main()
