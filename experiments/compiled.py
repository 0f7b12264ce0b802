"""
What torch.compile costs and gives on this machine: for each system the training step and the sampler.

    python experiments/compiled.py            # a table, JSON in experiments/results; minutes for each system
    python experiments/compiled.py vq var     # some of the systems; nothing is written without --out

Systems have train.py's default sizes for this device, random weights and inputs. Each runs first as it is
and then compiled, in a process of its own, so that no compiler is warm. Seconds to compile are those of the
first call less those of a later one, by the wall clock; what a step or a batch takes is processor time on a
CPU, a median. It pays after so many steps or batches.
"""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import age, compiling, drawing, runs
from experiments import benchmark

SYSTEMS = {
    "vae": "--tokenizer vae --generator none",
    "vq": "--tokenizer vq --generator none",
    "lfq": "--tokenizer lfq --generator none",
    "titok": "--tokenizer titok --generator none",
    "givt": "--tokenizer vae --head gmm",
    "givt-maskgit": "--tokenizer vae --generator maskgit --head gmm",
    "mar": "--tokenizer vae --generator mar --head diffusion",
    "llamagen": "--tokenizer vq --generator ar --head categorical",
    "maskgit": "--tokenizer vq --generator maskgit --head categorical",
    "var": "--tokenizer msvq --generator var --head categorical",
}
DRAWN = 16                                                  # images in a batch, with guidance


def timed(function, device):
    """-> wall seconds and seconds that count: of the processor, on a GPU of the wall."""
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.cpu.synchronize
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    wait()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall, wall if device.type == "cuda" else cpu


def compare(function, compile_it, device, rounds):
    """function() before and after compile_it() -> dict(ms, compiled_ms, ratio, compile_s, pays_after)."""
    timed(function, device)
    before = [timed(function, device) for _ in range(rounds)]
    compile_it()
    first, _ = timed(function, device)
    for _ in range(2):                                      # other shapes, such as MAR's, compile here
        first += max(0.0, timed(function, device)[0] - median(wall for wall, _ in before))
    after = [timed(function, device) for _ in range(rounds)]
    ms, compiled_ms = (1000 * median(counted for _, counted in rows) for rows in (before, after))
    compile_s = first - median(wall for wall, _ in after)
    gain = (ms - compiled_ms) / 1000
    return dict(ms=ms, compiled_ms=compiled_ms, ratio=ms / compiled_ms, compile_s=compile_s,
                pays_after=compile_s / gain if gain > 0 else None)


def measure(name, device, rounds):
    """A system -> {"step": ..., "sample": ...}. A tokenizer draws nothing."""
    s = benchmark.build((name, "", 10, SYSTEMS[name]), device)

    def compile_step():
        s.model = compiling.for_training(s.raw)
    row = dict(step=compare(lambda: benchmark.training_step(s), compile_step, device, rounds))
    if s.stage == 2:
        s = benchmark.build((name, "", 10, SYSTEMS[name]), device)
        s.args.condition = "class"
        s.raw.eval()
        run = argparse.Namespace(folder=Path(name), args=s.args, tokenizer=s.tokenizer.eval(),
                                 generator=s.raw, classes=range(10), device=device)
        labels = torch.arange(DRAWN, device=device) % 10
        row["sample"] = compare(lambda: drawing.draw_tokens(run, labels), lambda: compiling.for_drawing(run),
                                device, max(2, rounds // 3))
    return row


def main():
    p = argparse.ArgumentParser(description="What torch.compile costs and gives, for each system.")
    p.add_argument("systems", nargs="*", help="some of " + ", ".join(SYSTEMS))
    p.add_argument("--device", help="cpu or cuda (default: the best there is)")
    p.add_argument("--rounds", type=int, default=9, help="timed steps, before and after")
    p.add_argument("--out", type=Path,
                   help="where the JSON goes (default: experiments/results/compiled.json)")
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    device = runs.pick_device(args.device)
    unknown = [name for name in args.systems if name not in SYSTEMS]
    if unknown:
        p.error(f"{unknown[0]}: choose from {', '.join(SYSTEMS)}")
    if args.child:
        said, sys.stdout = sys.stdout, sys.stderr           # for_drawing prints
        print(json.dumps(measure(args.systems[0], device, args.rounds)), file=said)
        return
    rows = []
    print(f"{'':14s}{'step ms':>10s}{'compiled':>10s}{'ratio':>7s}{'costs s':>9s}{'pays after':>12s}"
          f"{'batch ms':>12s}{'compiled':>10s}{'ratio':>7s}{'costs s':>9s}{'pays after':>12s}")
    for name in args.systems or SYSTEMS:
        done = subprocess.run([sys.executable, __file__, "--child", name, "--device", str(device),
                               "--rounds", str(args.rounds)], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{name:14s}stopped with an error, see above")
            continue
        row = json.loads(done.stdout)
        print(f"{name:14s}" + "".join(cells(row[job], width) for job, width in (("step", 10), ("sample", 12))
                                      if job in row), flush=True)
        rows.append(dict(system=name, flags=SYSTEMS[name]) | row)
    out = args.out or (None if args.systems else ROOT / "experiments" / "results" / "compiled.json")
    if out:
        benchmark.save(out, age.of_run(device) | dict(batch=DRAWN, rounds=args.rounds, rows=rows))
        print(f"wrote {out}")


def cells(found, width):
    pays = f"{found['pays_after']:.0f}" if found["pays_after"] else "never"
    return (f"{found['ms']:{width}.1f}{found['compiled_ms']:10.1f}{found['ratio']:7.2f}"
            f"{found['compile_s']:9.0f}{pays:>12s}")


if __name__ == "__main__":
    main()
