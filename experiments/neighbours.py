"""
How slow does training get beside other work, and which setting of torch's threads helps?

    python experiments/neighbours.py         # a table, JSON in experiments/results; 4 to 6 minutes on 2 cores

Training steps of the default tokenizer, by the wall clock, in a process of its own for each cell: settings of
OpenMP, which torch reads when it is imported, beside kinds of other work. A thread that waits for the others
spins: it burns its time slice, and the system then takes the core from it in the middle of the next part,
for which the others spin. One thread waits for nobody.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import age

UNSET = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SETTINGS = {                                                # environment variables
    "torch as it comes": {},
    "GOMP_SPINCOUNT=10000": dict(GOMP_SPINCOUNT="10000"),
    "GOMP_SPINCOUNT=1000, ours": dict(GOMP_SPINCOUNT="1000"),
    "GOMP_SPINCOUNT=100": dict(GOMP_SPINCOUNT="100"),
    "OMP_WAIT_POLICY=PASSIVE": dict(OMP_WAIT_POLICY="PASSIVE"),
    "one thread": dict(OMP_NUM_THREADS="1"),
}
LOOP = [sys.executable, "-c", "while True: pass"]
TRAINING = [sys.executable, __file__, "--child", "100000"]
NEIGHBOURS = {                                              # commands that run beside
    "nothing": [],
    "a loop": [LOOP],
    "a loop, nice 10": [["nice", "-n", "10", *LOOP]],
    "a loop for each core": [LOOP] * (os.cpu_count() or 1),
    "another training": [TRAINING],
}
FLAGS = "--tokenizer vae --generator none"


def child(steps):
    """Train steps times -> the seconds of each, as JSON on stdout."""
    import torch

    from experiments import benchmark
    s = benchmark.build(("", "cpu", 10, FLAGS), torch.device("cpu"))
    taken = []
    for _ in range(steps + 3):                              # three to warm up
        start = time.perf_counter()
        benchmark.training_step(s)
        taken.append(time.perf_counter() - start)
    print(json.dumps(taken[3:]))


def measure(setting, neighbours, steps):
    """Milliseconds of a step: dict(median, worst). worst: one in ten takes longer."""
    clean = {name: value for name, value in os.environ.items() if name not in UNSET}
    beside = [subprocess.Popen(command, env=clean, stdout=subprocess.DEVNULL) for command in neighbours]
    try:
        if TRAINING in neighbours:
            time.sleep(6)                                   # until it trains
        done = subprocess.run([sys.executable, __file__, "--child", str(steps)], env=clean | setting,
                              stdout=subprocess.PIPE, text=True, check=True)
    finally:
        for process in beside:
            process.kill()
            process.wait()
    taken = sorted(1000 * seconds for seconds in json.loads(done.stdout))
    return dict(median=median(taken), worst=taken[int(0.9 * (len(taken) - 1))])


def main():
    p = argparse.ArgumentParser(description="Training beside other work, by settings of torch's threads.")
    p.add_argument("--steps", type=int, default=20, help="training steps of each cell")
    p.add_argument("--child", type=int, help=argparse.SUPPRESS)
    p.add_argument("--out", type=Path, default=ROOT / "experiments" / "results" / "neighbours.json")
    args = p.parse_args()
    if args.child:
        return child(args.child)
    rows = []
    print(f"{'ms per step, median (one in ten longer)':42s}" + "".join(f"{name:>24s}" for name in NEIGHBOURS))
    for setting, variables in SETTINGS.items():
        cells = {name: measure(variables, commands, args.steps) for name, commands in NEIGHBOURS.items()}
        rows.append(dict(setting=setting, variables=variables, **cells))
        print(f"{setting:42s}" + "".join(f"{cell['median']:14.0f} ({cell['worst']:5.0f})  "
                                         for cell in cells.values()), flush=True)
    facts = age.of_run() | dict(cores=os.cpu_count(), steps=args.steps, rows=rows)
    args.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
