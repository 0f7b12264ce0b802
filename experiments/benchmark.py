"""
How fast is every system on this machine, and how far is that from what the machine can do?

Systems have train.py's default size for the device, random weights and inputs. All training steps and a large
matmul take turns, so that a slow minute hurts all alike; then all samplers and a large copy do. Medians.

  training step  as in train.fit: autocast, backward, clipping, optimizers, EMA, compiled on CUDA; no loading
  % of matmul    FLOP/s of the step over those of a square matmul of that dtype. Transformers: 6 x parameters
                 x tokens ("6PT"; no lookup tables, which multiply nothing). Convolutions use a parameter at
                 many places, so there FlopCounterMode counts forward + backward ("counted")
  sampling       drawing.DEFAULTS with guidance, float32, not compiled; s/image has the decoder, tokens/s not
  % of copy      parameter bytes read per second at batch 1, over bytes read + written per second by a copy;
                 no share of main memory where the parameters fit into a cache; --generator ar only
  peak MB        of training. CUDA: tensors. CPU: a process of its own, import_mb of it Python with torch

    python experiments/benchmark.py          # table, JSON in experiments/results; 4 minutes on 2 CPU cores
    python experiments/benchmark.py --quick  # does it run? 2 rounds, no JSON without --out; 2 minutes
    python experiments/benchmark.py --against COMMIT      # is it faster than it was? See against.py
"""
import argparse
import json
import re
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from common import age, averages, compiling, drawing, runs
from data import BadInput
from experiments import against

KL16 = "--tokenizer vae --tok_size kl16 --image_size 256"
SYSTEMS = [  # name, devices, classes, flags of train.py; --generator none times the tokenizer itself
    ("vae", "cpu", 10, "--tokenizer vae --generator none"),
    ("vq", "cpu", 10, "--tokenizer vq --generator none"),
    ("lfq", "cpu", 10, "--tokenizer lfq --generator none"),
    ("titok", "cpu", 10, "--tokenizer titok --generator none"),
    ("vae medium", "cuda", 10, "--tokenizer vae --tok_size medium --generator none"),
    ("vae kl16 256px", "cuda", 1000, f"{KL16} --tok_batch_size 8 --generator none"),
    ("givt", "cpu cuda", 10, "--tokenizer vae --head gmm"),
    ("givt-maskgit", "cpu cuda", 10, "--tokenizer vae --generator maskgit --head gmm"),
    ("mar", "cpu", 10, "--tokenizer vae --generator mar --head diffusion"),
    ("llamagen", "cpu", 10, "--tokenizer vq --head categorical"),
    ("maskgit", "cpu", 10, "--tokenizer vq --generator maskgit --head categorical"),
    ("var", "cpu", 10, "--tokenizer msvq --generator var --head categorical"),
    ("givt gpt-b 256px", "cuda", 1000, f"{KL16} --head gmm --n_mix 16 --size gpt-b --batch_size 64"),
]
BATCHES = (1, 64)                                           # images drawn at once
AT_ONCE = dict(cuda=10, cpu=1)                              # training steps between two looks at the clock
MATMUL = dict(cuda=8192, cpu=2048)                          # side of the matrices
COPY = dict(cuda=2**28, cpu=2**26)                          # floats: 1 GiB or 256 MiB


def build(entry, device):
    """A line of SYSTEMS -> namespace with all that training_step needs, set up as in train.fit."""
    name, _, classes, flags = entry
    given = train.parse_args(flags.split())
    defaults = runs.defaults_of(given, device)
    none = dict.fromkeys(runs.STAGE1 + runs.STAGE2 + runs.BOTH)
    args = argparse.Namespace(**none | defaults | {k: v for k, v in vars(given).items() if v is not None})
    args.device = device
    stage = 1 if args.generator == "none" else 2
    torch.manual_seed(args.seed)
    tokenizer = runs.build_tokenizer(args)
    B, lr = (args.tok_batch_size, args.tok_lr) if stage == 1 else (args.batch_size, args.lr)
    T, D, V = tokenizer.seq_len, tokenizer.token_dim, tokenizer.vocab_size
    raw = tokenizer if stage == 1 else runs.build_generator(args, tokenizer, classes)
    if stage == 1:
        x = 2 * torch.rand(B, 3, args.image_size, args.image_size) - 1
    else:
        x = torch.randint(V, (B, T)) if V else torch.randn(B, T, D)
    raw = raw.to(device)
    for p in raw.parameters():
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    lr = train.learning_rate(0, 1000, args.warmup, lr)      # that of the first step: the weights stay random
    optimizers = train.make_optimizers(raw, args, lr)
    multiplied = [m for m in raw.modules() if not isinstance(m, nn.Embedding)]
    return SimpleNamespace(
        name=name, args=args, stage=stage, device=device, B=B, T=T, classes=classes, raw=raw,
        optimizers=optimizers, ema=averages.Averages(raw, 0.999),
        tokenizer=tokenizer.to(device),
        model=compiling.for_training(raw) if device.type == "cuda" else raw,
        bf16=runs.native_bf16(device) and (device.type == "cuda" or stage == 2),
        x=x.to(device), labels=torch.randint(classes, (B,)).to(device),
        P=sum(p.numel() for m in multiplied for p in m.parameters(recurse=False)))


def loss_of(s, model, n):                                   # of the first n images, in train.fit's dtype
    with torch.autocast(s.device.type, dtype=torch.bfloat16, enabled=s.bf16):
        return model(s.x[:n], s.labels[:n])[0]


def training_step(s):                                       # one of train.fit
    loss = loss_of(s, s.model, s.B)
    for opt in s.optimizers:
        opt.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(s.raw.parameters(), s.args.grad_clip)
    for opt in s.optimizers:
        opt.step()
    s.ema.update_parameters(s.raw)


def count_flops(s):
    """-> FLOPs of one training step, and where the number comes from."""
    if s.stage == 2:
        return 6 * s.P * s.B * s.T, "6PT"
    with FlopCounterMode(display=False) as counter:         # of one image, not compiled
        loss_of(s, s.raw, 1).backward()
    s.raw.zero_grad(set_to_none=True)
    return counter.get_total_flops() * s.B, "counted"


def build_all(device):
    """-> the systems of this device, each with its peak memory. CUDA: what it adds to those before it. CPU:
    that of a fresh process, run before this one grows: Linux starts a child at the peak of its parent.
    """
    entries, memory = [e for e in SYSTEMS if device.type in e[1].split()], {}
    for name in [e[0] for e in entries if device.type == "cpu"]:
        command = [sys.executable, __file__, "--device", "cpu", "--peak", name]
        memory[name] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    systems = []
    for entry in entries:
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        systems.append(s := build(entry, device))
        s.flops, s.flops_source = count_flops(s)
        if device.type == "cuda":
            for _ in range(3):                              # compile, and let the optimizers make their state
                training_step(s)
            torch.cuda.reset_peak_memory_stats()
            training_step(s)
            memory[s.name] = dict(peak_mb=(torch.cuda.max_memory_allocated() - before) / 1e6)
        s.memory = memory[s.name]
    return systems


def print_peak(name):
    """What the child process of build_all does. ru_maxrss is in KiB, on macOS in bytes."""
    unit, usage = 1 if sys.platform == "darwin" else 1024, partial(resource.getrusage, resource.RUSAGE_SELF)
    import_mb = usage().ru_maxrss * unit / 1e6
    s = build(next(e for e in SYSTEMS if e[0] == name), torch.device("cpu"))
    for _ in range(2):
        training_step(s)
    print(json.dumps(dict(peak_mb=usage().ru_maxrss * unit / 1e6, import_mb=import_mb)))


def interleave(jobs, rounds, device, times=1):
    """{name: function} -> {name: median seconds of one call}. Every round times every job in turn, `times`
    calls at once, since a GPU is only busy when nobody waits for it after each. Round -1 is the warm-up.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.cpu.synchronize   # on a CPU: nothing
    seconds = {name: [] for name in jobs}
    for r in range(-1, rounds):
        for name, job in jobs.items():
            wait()
            start = time.perf_counter()
            for _ in range(times):
                job()
            wait()
            if r >= 0:
                seconds[name].append((time.perf_counter() - start) / times)
    return {name: median(v) for name, v in seconds.items()}


def time_training(systems, device, rounds):
    """-> {system name: seconds per step}, {dtype: FLOP/s of a square matmul}."""
    n = MATMUL[device.type]
    jobs = {s.name: partial(training_step, s) for s in systems}
    dtypes = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if runs.native_bf16(device) else {})
    for name, dtype in dtypes.items():
        jobs[name] = partial(torch.mm, *torch.randn(2, n, n, device=device, dtype=dtype))
    seconds = interleave(jobs, rounds, device, times=AT_ONCE[device.type])
    return seconds, {name: 2 * n**3 / seconds[name] for name in dtypes}


def time_sampling(systems, device, rounds):
    """-> {(system name, batch, "tokens" or "decoder"): seconds}, bytes/s of a copy."""
    jobs = {}
    for s in (s for s in systems if s.stage == 2):
        s.tokenizer.eval()
        run = SimpleNamespace(args=s.args, generator=s.ema.module.eval(), device=device,
                              classes=range(s.classes))
        for B in BATCHES:
            index = torch.arange(B)
            jobs[s.name, B, "tokens"] = partial(drawing.draw_tokens, run, index % s.classes)
            jobs[s.name, B, "decoder"] = partial(s.tokenizer.decode, s.x[index % s.B])
    source = torch.ones(COPY[device.type], device=device)
    jobs["copy"] = partial(torch.empty_like(source).copy_, source)
    seconds = interleave(jobs, rounds, device)
    return seconds, 2 * source.nbytes / seconds["copy"]


def row_of(s, step, rates, sampling, copy):
    """All numbers of one system -> dict; the units are in the names."""
    dtype = "bf16" if s.bf16 else "fp32"
    row = dict(system=s.name, parameters=sum(p.numel() for p in s.raw.parameters()), parameters_in_6PT=s.P,
               dtype=dtype, batch_size=s.B, tokens_per_image=s.T, step_ms=1e3 * step, images_per_s=s.B / step,
               flops_per_step=s.flops, flops_source=s.flops_source, tflops=s.flops / step / 1e12,
               percent_of_matmul=100 * s.flops / step / rates[dtype], **s.memory)
    if s.stage == 2:
        for B in BATCHES:
            tokens, decoder = sampling[s.name, B, "tokens"], sampling[s.name, B, "decoder"]
            row[f"s_per_image_batch{B}"] = (tokens + decoder) / B
            row[f"tokens_per_s_batch{B}"] = B * s.T / tokens
        if s.args.generator == "ar":                        # one pass per token for both guided rows
            read = 4 * s.P * row["tokens_per_s_batch1"]     # bytes/s, float32
            row |= dict(read_gb_per_s_batch1=read / 1e9, percent_of_copy_batch1=100 * read / copy)
    return row


COLUMNS = {  # key: two header lines, format
    "system": ("", "system", "s"), "parameters": ("parame-", "ters", ",d"), "dtype": ("", "dtype", "s"),
    "batch_size": ("batch", "images", "d"), "step_ms": ("step", "ms", ".1f"),
    "images_per_s": ("", "images/s", ".0f"), "tflops": ("", "TFLOP/s", ".3f"),
    "percent_of_matmul": ("% of", "matmul", ".1f"), "flops_source": ("FLOPs", "by", "s"),
    "peak_mb": ("peak", "MB", ".0f"), "s_per_image_batch1": ("draw 1", "s/image", ".4f"),
    "s_per_image_batch64": ("draw 64", "s/image", ".4f"),
    "tokens_per_s_batch1": ("draw 1", "tokens/s", ".0f"),
    "tokens_per_s_batch64": ("draw 64", "tokens/s", ".0f"),
    "percent_of_copy_batch1": ("% of", "copy", ".1f"),
}


def print_table(rows):
    lines = [[c[i] for c in COLUMNS.values()] for i in (0, 1)]
    lines += [[format(row[k], c[2]) if k in row else "-" for k, c in COLUMNS.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))))


def save(out, result):
    """Write a result as JSON. BadInput if that cannot be done."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as e:
        raise BadInput(f"could not write {out} ({e})") from None
    print(f"wrote {out}")


def compare(args, device):
    """What --against does: a table of old and new, one system a line, and its JSON."""
    rounds = 2 if args.quick else 9
    if unknown := set(args.systems or ()) - set(against.SYSTEMS):
        raise BadInput(f"--systems {' '.join(sorted(unknown))}: there are {', '.join(against.SYSTEMS)}")
    try:
        result = against.compare(args.against, device.type, rounds, args.systems)
    except ValueError as e:
        raise BadInput(str(e)) from None
    facts = age.of_run(device) | dict(device=device.type, quick=args.quick)
    out = Path(args.out or Path(__file__).parent / "results" / f"against-{result['old']}.json")
    if args.out or not args.quick:
        save(out, facts | result)


def main(argv=None):
    p = argparse.ArgumentParser(description="Speed of every system, and what this machine could do.")
    p.add_argument("--device", choices=["cpu", "cuda"], help="default: CUDA if there is one")
    p.add_argument("--quick", action="store_true", help="2 rounds, to see that it runs: nothing to report")
    p.add_argument("--out", help="JSON to write (default: in experiments/results, "
                   "benchmark-MACHINE-DEVICE.json or against-COMMIT.json)")
    p.add_argument("--against", metavar="COMMIT", help="time this code against that of COMMIT instead, in "
                   "turns: ratio old / new of a training step and of sampling, for each system")
    p.add_argument("--systems", nargs="+", metavar="NAME", help="with --against: these systems only "
                   f"(default: {' '.join(against.SYSTEMS)})")
    p.add_argument("--peak", help=argparse.SUPPRESS)        # a child process that prints its own peak memory
    args = p.parse_args(argv)
    device = runs.pick_device(args.device)
    torch.set_float32_matmul_precision("high")              # as in train.py: "fp32" on a GPU is TF32
    if args.peak:
        return print_peak(args.peak)
    if args.against:
        return compare(args, device)
    if args.systems:
        raise BadInput("--systems goes with --against")
    systems = build_all(device)
    steps, rates = time_training(systems, device, 2 if args.quick else 15)
    sampling, copy = time_sampling(systems, device, 1 if args.quick else 7)
    facts = age.of_run(device) | dict(device=device.type, threads=torch.get_num_threads(), quick=args.quick)
    facts |= {f"matmul_{k}_tflops": v / 1e12 for k, v in rates.items()} | dict(copy_gb_per_s=copy / 1e9)
    rows = [row_of(s, steps[s.name], rates, sampling, copy) for s in systems]
    print(", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items()))
    print_table(rows)
    slug = re.sub(r"[^a-z0-9]+", "-", facts["machine"].lower()).strip("-")
    out = Path(args.out or Path(__file__).parent / "results" / f"benchmark-{slug}-{device.type}.json")
    if args.out or not args.quick:
        save(out, facts | {"systems": rows})


if __name__ == "__main__":
    main()
