"""
An older commit against this working tree, on this machine: is a system faster than it was, or slower?

    python experiments/benchmark.py --against COMMIT   # a table, JSON in experiments/results; some minutes

Two processes, one with the code of each tree, build the same system: the same flags, sizes, batches and
seeds. Then they take turns, old, new, old, new, a call each, while the other one waits: whatever else the
machine does hurts both alike. The medians are of processor time with one thread, so that a busy machine
counts little (of wall time on CUDA, where the processor only waits).

The trees have other layouts. What knows how to build a system in one is its own experiments/benchmark.py,
whose build() and training_step() have been there from the first commit that had it. So this file is run twice
as a script that loads that of the tree it is given, and nothing of another.
"""
import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--tok_size small --size small"
SYSTEMS = {                                                 # flags of train.py: no size is left to a default
    "vae": "--tokenizer vae --tok_size small --tok_batch_size 32 --generator none",
    "vq": "--tokenizer vq --tok_size small --tok_batch_size 32 --generator none",
    "lfq": "--tokenizer lfq --tok_size coarse --tok_batch_size 32 --generator none",
    "titok": "--tokenizer titok --tok_size small --tok_batch_size 16 --generator none",
    "givt": f"--tokenizer vae --head gmm {SMALL} --batch_size 32",
    "givt-maskgit": f"--tokenizer vae --generator maskgit --head gmm {SMALL} --batch_size 32",
    "mar": f"--tokenizer vae --generator mar --head diffusion {SMALL} --batch_size 32",
    "llamagen": f"--tokenizer vq --generator ar --head categorical {SMALL} --batch_size 16",
    "maskgit": f"--tokenizer vq --generator maskgit --head categorical {SMALL} --batch_size 16",
    "var": f"--tokenizer msvq --generator var --head categorical {SMALL} --batch_size 16",
}
DRAWN = 8                                                   # images drawn at once, with guidance
DENOISING = 10                                              # steps of the diffusion head


# ---- The child: one tree -------------------------------------------------------------------------

def load_benchmark(tree):
    """experiments/benchmark.py of a tree, with nothing else of this project on the path."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(tree), *(p for p in sys.path if p and Path(p).resolve() not in (here, ROOT))]
    spec = importlib.util.spec_from_file_location("benchmark", Path(tree) / "experiments" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def jobs_of(s, training_step):
    """{"step", "sample"} of a system that build() made -> functions. A tokenizer encodes and decodes."""
    import torch
    cond = torch.arange(DRAWN, device=s.device) % s.classes
    tricks = dict(diffusion_steps=DENOISING) if s.stage == 2 and s.args.head == "diffusion" else {}

    def step():
        s.raw.train()
        training_step(s)

    @torch.no_grad()
    def sample():
        s.raw.eval()
        s.tokenizer.eval()
        tokens = s.raw.encode(s.x) if s.stage == 1 else s.raw.sample(cond, cfg=2.0, **tricks)
        s.tokenizer.decode(tokens)
    return {"step": step, "sample": sample}


def build(benchmark, flags, device):
    """-> the jobs of a system, or {"skip": why this tree does not know it}."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return jobs_of(benchmark.build(("", "cpu cuda", 10, flags), device), benchmark.training_step)
    except SystemExit:                                      # argparse's refusal is its last line
        return {"skip": re.sub(r"^\S+: error: ", "", said.getvalue().strip().split("\n")[-1])}
    except Exception as e:                                  # a tree may stand in the middle of a change
        return {"skip": f"{type(e).__name__}: {str(e).split(chr(10))[0]}"}


def child(tree, device):
    """Answer each line of JSON on stdin, {"build": flags} or {"job": name, "seed": n}, by one on stdout."""
    answers, sys.stdout = sys.stdout, sys.stderr            # what else is printed must not come between
    benchmark = load_benchmark(tree)
    import torch
    device = torch.device(device)
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.cpu.synchronize
    jobs = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if "build" in asked:
            jobs.clear()                                    # the memory of the last system is free now
            jobs |= build(benchmark, asked["build"], device)
            answer = {"skip": jobs.get("skip")}
        else:
            torch.manual_seed(asked["seed"])
            wait()
            cpu, wall = time.process_time(), time.perf_counter()
            jobs[asked["job"]]()
            wait()
            answer = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        print(json.dumps(answer), file=answers, flush=True)


# ---- The parent: two children in turns -----------------------------------------------------------

class Tree:
    """A process with the code of one tree. ask() is a question and its answer."""

    def __init__(self, name, folder, device):
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")
        threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, __file__, str(folder), device], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
                                        cwd=folder, env=os.environ | threads)

    def ask(self, **question):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            last = self.errors.read().strip().split("\n")[-1]
            raise ValueError(f"the process with the {self.name} code ended: {last}")
        return json.loads(line)

    def close(self):
        with contextlib.suppress(BrokenPipeError):          # it may have ended before
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()


def git(*words, **options):
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, **options)


def unpack(commit, folder):
    """The tree of a commit of this repository into a folder -> its short hash. ValueError in a sentence."""
    found = git("rev-parse", "--short", "--verify", f"{commit}^{{commit}}", text=True)
    if found.returncode:
        raise ValueError(f"--against {commit}: not a commit of this repository")
    archive = git("archive", "--format=tar", commit).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    path = Path(folder) / "experiments" / "benchmark.py"
    text = path.read_text() if path.exists() else ""
    if not all(re.search(rf"^def {name}\(", text, re.M) for name in ("build", "training_step")):
        raise ValueError(f"--against {commit}: too old to be timed, its experiments/benchmark.py has no "
                         "build() and training_step()")
    return found.stdout.strip()


def take_turns(old, new, rounds, clock):
    """old and new: a Tree each, with the same system built -> {job: dict of milliseconds and ratios}.

    ratio is old / new, of the medians: above 1 the new tree is faster. Half of the ratios of single rounds
    lie between low and high. A first round warms up and is not counted.
    """
    row = {}
    for job in ("step", "sample"):
        taken = {"old": [], "new": []}
        for i in range(-1, rounds):
            for name, tree in (("old", old), ("new", new)):
                answer = tree.ask(job=job, seed=i + 1)
                if i >= 0:
                    taken[name].append(answer)
        found = {f"{name}_{kind}_ms": 1000 * median(a[kind] for a in answers)
                 for name, answers in taken.items() for kind in ("cpu", "wall")}
        single = [a[clock] / b[clock] for a, b in zip(taken["old"], taken["new"])]
        low, _, high = quantiles(single, n=4, method="inclusive") if rounds > 1 else single * 3
        row[job] = found | dict(ratio=found[f"old_{clock}_ms"] / found[f"new_{clock}_ms"], low=low, high=high)
    return row


def compare(commit, device="cpu", rounds=9, systems=None):
    """Time every system of `systems` (names; None: all) in two trees -> facts with the rows. It prints."""
    from common import age                                  # here: a child loads the rooms of its own tree
    rows = []
    clock = "wall" if device == "cuda" else "cpu"
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        facts = dict(old=unpack(commit, folder), new=age.commit_of(ROOT), clock=clock, rounds=rounds)
        old, new = Tree("old", folder, device), Tree("new", ROOT, device)
        stack.callback(new.close)
        stack.callback(old.close)
        print(f"old {facts['old']}, new {facts['new']}: milliseconds of {clock} time, medians of {rounds}; "
              "ratio old / new, above 1 is faster now")
        print(f"{'':14s}{'step old':>10s}{'new':>9s}{'ratio':>7s} {'half between':>13s}"
              f"{'sample old':>12s}{'new':>9s}{'ratio':>7s} {'half between':>13s}")
        for name in systems or SYSTEMS:
            why = {tree.name: tree.ask(build=SYSTEMS[name])["skip"] for tree in (old, new)}
            lost = [f"{tree}: {reason}" for tree, reason in why.items() if reason]
            if lost:
                print(f"{name:14s}skipped, {lost[0]}")
                rows.append(dict(system=name, skipped=lost[0]))
                continue
            row = take_turns(old, new, rounds, clock)
            print(f"{name:14s}" + "".join(cells(row[job], clock, width)
                                          for job, width in (("step", 10), ("sample", 12))), flush=True)
            rows.append(dict(system=name, flags=SYSTEMS[name]) | row)
    return facts | dict(systems=rows)


def cells(found, clock, width):
    return (f"{found[f'old_{clock}_ms']:{width}.1f}{found[f'new_{clock}_ms']:9.1f}{found['ratio']:7.2f}"
            f" {found['low']:6.2f}, {found['high']:.2f}")


if __name__ == "__main__":
    if len(sys.argv) != 3:                                  # not from Tree, but typed by somebody
        raise SystemExit("type python experiments/benchmark.py --against COMMIT instead")
    child(*sys.argv[1:])
