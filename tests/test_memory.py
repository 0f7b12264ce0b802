"""Tests of common/memory.py: freed memory stays with the process, unless the user has set it up otherwise."""
import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT

# 200 tensors of a megabyte are asked for and freed. How much of that does the process still have?
FREED = """
from common import memory
told = {0}
import torch
torch.set_num_threads(1)
def megabytes():                                            # that lie in main memory, in pages of 4 kB
    return int(open("/proc/self/statm").read().split()[1]) / 256
before = megabytes()
tensors = [torch.ones(2 ** 18) for _ in range(200)]
while tensors:
    tensors.pop()
print(told, megabytes() - before)
"""


def still_there(told, **variables):
    """What keep() said in a new process, and how many megabytes it has after 200 were freed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", FREED.format(told)], cwd=ROOT, env=clean | variables,
                          capture_output=True, text=True, check=True)
    said, megabytes = done.stdout.split()
    return said == "True", float(megabytes)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library of Linux only")
def test_freed_memory_is_kept():
    told, kept = still_there("memory.keep()")
    if not told:
        pytest.skip("this C library cannot be told")
    _, without = still_there("False")
    assert kept > 150 and without < 50


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library of Linux only")
def test_memory_is_left_alone_where_the_user_has_set_it_up():
    told, kept = still_there("memory.keep()", MALLOC_TRIM_THRESHOLD_="131072")
    assert not told and kept < 50
