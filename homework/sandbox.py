"""Students' code runs in a process of its own: in a folder without the teacher's files, with an environment
that does not name them, within limits of processor time, memory and output.

Where Linux allows it (unshare), the process sees no other process and an empty folder in place of the
project's. It tells only what the tests saw. What is right is decided elsewhere.
"""
import contextlib
import functools
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import torch

from homework.kit import ROOT, looked


class Stopped(BaseException):
    """A student's code went on for too long, or printed too much. No Exception: `except Exception` must not
    catch it.
    """


class Capped(io.TextIOBase):
    """Takes what students print, and forgets it. Tests call a function hundreds of times, so a tensor printed
    in each call is allowed.
    """
    MOST = 10_000_000

    def __init__(self):
        self.total = 0

    def write(self, text):
        self.total += len(text)
        if self.total > self.MOST:
            raise Stopped(f"prints without end: more than {self.MOST:,} characters")
        return len(text)


WAITING = 10                                                # seconds on the clock for each of processor time


def trial(test, seed, seconds=0):
    """Run one test -> what it saw, and what ended it: None, or a sentence. seconds of processor time, ten
    times as many on the clock; 0: any number.
    """
    def late(*_):
        raise Stopped(f"not done after {seconds:g} s of processor time: an endless loop?")

    def waits(*_):
        raise Stopped(f"not done after {WAITING * seconds:g} s on the clock: does it wait for something?")

    name = test.exercise.split(".")[0]
    seconds = seconds if hasattr(signal, "setitimer") else 0  # not on Windows
    if seconds:
        signal.signal(signal.SIGPROF, late)
        signal.signal(signal.SIGALRM, waits)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, WAITING * seconds)
    try:
        with contextlib.redirect_stdout(Capped()), contextlib.redirect_stderr(Capped()):
            seen, failed = looked(test, seed)
        if failed is None:
            return seen, None
        return seen, told(failed, name)
    except BaseException as e:                              # Stopped, SystemExit, KeyboardInterrupt
        return [], told(e, name)
    finally:
        if seconds:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)


def told(error, name):
    """An exception in a sentence, with the line of NAME.py where it was raised."""
    if isinstance(error, NotImplementedError):
        return "not written yet"
    if isinstance(error, Stopped):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename).name == f"{name}.py" and "homework" not in
             Path(f.filename).parts]
    text = f"{type(error).__name__}: {error}" + (f" ({name}.py, line {lines[-1]})" if lines else "")
    if isinstance(error, MemoryError) or "allocate memory" in text:
        text = "asks for more memory than it may have: " + text
    return " ".join(text.split())[:600]


# ---- The process --------------------------------------------------------------------------------------

def child():
    """Runs in the student's folder: a line to results.txt before and after each test, so that the grader
    knows how far a process has come that dies, and a file of what the test saw.
    """
    name, seed, seconds, *tests = sys.argv[1:]
    by_name = vars(importlib.import_module(f"homework.{name}"))
    with open("results.txt", "a") as f:
        for test in tests:
            print("start", test, sep="\t", file=f, flush=True)
            seconds_here = float(seconds) * (6 if by_name[test].goals else 1)  # a capstone trains
            seen, failed = trial(by_name[test], int(seed), seconds_here)
            torch.save({"seen": [[what, value] for what, value, *_ in seen], "failed": failed}, f"{test}.pt")
            print("end", test, sep="\t", file=f, flush=True)
    os._exit(0)                                             # whatever threads the student's code has left


def limits(seconds, gigabytes, nobody):
    """For a student's process: processor time, memory, the size of a file, no core dumps."""
    import resource                                 # not on Windows, where the tests run and grading does not
    whole = int(seconds) + 1
    for kind, most in (("DATA", int(gigabytes * 2**30)), ("FSIZE", 2**24), ("CORE", 0), ("CPU", whole)):
        kind = getattr(resource, f"RLIMIT_{kind}")
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    if nobody:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


HIDE = """for path in $HIDDEN; do
    if [ -d "$path" ]; then mount -t tmpfs -o size=1m none "$path"; else mount --bind /dev/null "$path"; fi
done
unset HIDDEN
exec "$@"
"""
SPACES = [
    "unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
    "--ipc"
]


@functools.lru_cache(maxsize=None)
def spaces():
    """The command in front of a student's that gives it processes and mounts of its own, or [] where this
    machine allows none.
    """
    if not shutil.which("unshare"):
        return []
    try:
        tried = subprocess.run([*SPACES, "sh", "-c", "mount -t tmpfs none /mnt"],
                               capture_output=True,
                               timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return SPACES if tried.returncode == 0 else []


@functools.lru_cache(maxsize=None)
def as_nobody():
    """Whether a student's code can run as the user `nobody`: for root alone, and where nobody may run this
    Python.
    """
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    try:
        tried = subprocess.run([sys.executable, "-c", "import torch"], user=65534, group=65534, cwd="/",
                               capture_output=True)
    except OSError:
        return False
    return tried.returncode == 0


def to_hide(students):
    """What a student's process must not read: the project, unless Python itself is in it, and the work of
    others.
    """
    python = [Path(sys.prefix).resolve(), Path(sys.executable).resolve()]
    inside = any(ROOT in p.parents for p in python)
    paths = [p for p in ROOT.iterdir() if not any(p == q or p in q.parents for q in python)
            ] if inside else [ROOT]
    for path in map(Path, students):
        path = path.resolve()
        if path.exists() and not any(path == q or q in path.parents for q in paths) and len(path.parts) > 2:
            paths.append(path)
    return [str(p) for p in paths if not any(c.isspace() for c in str(p))]


def run_process(folder, name, tests, seed, args, hidden):
    """Run `tests` in a student's folder -> {test: (seen, failed)} of those that came to an end, the tests
    that began, and what ended the process, in a sentence.
    """
    env = {"PATH": os.defpath, "HOME": str(folder), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1",
           "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"}
    start = "from homework import sandbox; sandbox.child()"
    words = [sys.executable, "-c", start, name, str(seed), str(args.test_seconds), *tests]
    nobody = False
    if spaces():
        env["HIDDEN"] = " ".join(hidden)
        words = [*spaces(), "sh", "-c", HIDE, "sh", *words]
    elif as_nobody():
        nobody = True
        os.chmod(folder.parent, 0o711)
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, 65534, 65534)
    results, output = folder / "results.txt", folder / "output.txt"
    with open(output, "wb") as f:
        child = subprocess.Popen(words, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=f, stderr=f,
                                 start_new_session=True,
                                 preexec_fn=lambda: limits(args.seconds, args.gigabytes, nobody))
        try:
            ended = child.wait(WAITING * args.seconds)
        except subprocess.TimeoutExpired:
            ended = None
        try:
            os.killpg(child.pid, signal.SIGKILL)            # with all that it has started
        except ProcessLookupError:
            pass
        child.wait()
    done, began = {}, []
    for line in results.read_text(errors="replace").split("\n")[:-1] if results.is_file() else ():
        key, test = (line.split("\t") + [""])[:2]
        if key == "start":
            began.append(test)
        elif test in tests:
            done[test] = read_back(folder / f"{test}.pt")
    if ended is None or ended in (-signal.SIGXCPU, -signal.SIGKILL, 128 + signal.SIGXCPU,
                                  128 + signal.SIGKILL):
        if not began:
            return done, began, f"is not imported within {args.seconds:g} s: an endless loop?"
        return done, began, f"stopped: all questions together may take {args.seconds:g} s"
    if ended < 0 or ended > 128:
        number = -ended if ended < 0 else ended - 128
        return done, began, f"crashes the Python interpreter ({signal.Signals(number).name})"
    if began:
        return done, began, f"ends the Python interpreter (exit code {ended})"
    printed = output.read_text(errors="replace")
    last = [line for line in printed[-5000:].split("\n") if line.strip()] or [f"exit code {ended}"]
    why = "prints without end" if len(printed) > 2**23 else last[-1][:600]
    return done, began, f"cannot be imported: {why}"


def read_back(path):
    """What a test saw, from a student's process -> (seen, failed)."""
    try:
        found = torch.load(path, weights_only=True)
        return [(str(what), value) for what, value in found["seen"]], found["failed"]
    except Exception as e:
        return [], f"left no readable result ({type(e).__name__})"
