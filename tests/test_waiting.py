"""Tests of common/waiting.py: what the programs set before torch is imported, and what they leave alone."""
import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT

SHOW = "import os, {0}; print(os.environ.get('GOMP_SPINCOUNT'))"


def spin_count(module, **variables):
    """GOMP_SPINCOUNT in a new process that has imported a program, with these variables of OpenMP."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run([sys.executable, "-c", SHOW.format(module)], cwd=ROOT, env=clean | variables,
                          capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["common.waiting as w; w.gently()", "recipes"])
def test_threads_wait_gently_where_the_user_says_nothing(module):
    assert spin_count(module) == "1000"


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "OMP_WAIT_POLICY"])
def test_a_setting_of_the_user_is_left_alone(name):
    value = dict(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="ACTIVE")[name]
    assert spin_count("recipes", **{name: value}) == "None"
    assert spin_count("recipes", GOMP_SPINCOUNT="7") == "7"


@pytest.mark.parametrize("name", ["train", "sample", "evaluate"])
def test_programs_choose_before_torch_is_imported(name):
    text = (ROOT / f"{name}.py").read_text()
    assert text.index("waiting.gently()") < text.index("\nimport torch")
