"""Tests of common/memory.py: freed memory stays with the process, unless the user has set it up otherwise."""
import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT

# A small network learns. The first steps ask for memory, the others should find it.
FAULTS = """
from common import memory
told = {0}
import resource, torch
torch.set_num_threads(1)
layers = [torch.nn.Linear(128, 512), torch.nn.SiLU(), torch.nn.Linear(512, 128), torch.nn.SiLU()]
net = torch.nn.Sequential(*layers, torch.nn.Linear(128, 512), torch.nn.SiLU(), torch.nn.Linear(512, 128))
x = torch.randn(4096, 128)                                  # 8 MB behind the widest layers
def step():
    net(x).square().mean().backward()
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(told, **variables):
    """What keep() said in a new process, and for how many pages it had to ask in five steps."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", FAULTS.format(told)], cwd=ROOT, env=clean | variables,
                          capture_output=True, text=True, check=True)
    said, n = done.stdout.split()
    return said == "True", int(n)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library of Linux only")
def test_freed_memory_is_found_again():
    told, n = faults("memory.keep()")
    if not told:
        pytest.skip("this C library cannot be told")
    _, without = faults("False")
    assert n < without / 4
    assert without > 5000                                   # pages of 4 kB


def test_memory_is_left_alone_where_the_user_has_set_it_up():
    assert faults("memory.keep()", MALLOC_TRIM_THRESHOLD_="131072")[0] is False
