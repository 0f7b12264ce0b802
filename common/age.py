"""
The age of a result: which commit of this code made it, when, and on which machine.

    now()             {"commit", "date"}: what metrics.json says of an evaluation
    of_run(device)    the same with machine and torch: what every JSON of experiments/ opens with

A commit is its short hash, "d253933 and changes" where a Python file differs from it, and "unknown" outside a
checkout of this project.
"""
import platform
import re
import subprocess
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def commit_of(root):
    """The commit of the checkout in the folder root, and whether its Python files differ from it.

    What an experiment wrote a minute ago, a JSON or a table, is no change of the code.
    """
    found = git(root, "rev-parse", "--show-toplevel", "--short", "HEAD").split("\n")
    if len(found) != 2 or Path(found[0]).resolve() != Path(root).resolve():           # perhaps of another one
        return "unknown"
    return found[1] + (" and changes" if git(root, "status", "--porcelain", "-uno", "--", "*.py") else "")


def git(root, *words):
    """What a git command prints, "" where it fails or there is no git. It takes no lock: git runs beside."""
    words = ["git", "--no-optional-locks", *words]
    try:
        found = subprocess.run(words, cwd=root, capture_output=True, text=True)
    except OSError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


COMMIT = commit_of(ROOT)                                    # at the start: a long run may see the next commit


def now(prefix=""):
    """-> commit and date of what runs now, as entries of a JSON; a prefix tells them from those of others."""
    return {f"{prefix}commit": COMMIT, f"{prefix}date": str(date.today())}


def of_run(device="cpu"):
    """-> commit, date, machine and version of torch of what runs now on the device, as entries of a JSON."""
    return now() | dict(machine=machine_name(torch.device(device)), torch=torch.__version__)


def machine_name(device):
    """The name of the GPU, or of the processor, as its maker has it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")                         # on Linux only
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1].strip() if found else platform.processor() or platform.machine()
