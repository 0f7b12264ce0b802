"""
The tests: every formula against something independent (the authors' own arrays in golden/, a closed form,
torch.distributions, a slow loop, an inverse, the uncached path), and the programs as a user runs them.

    python -m pytest test_all.py                 # all of them; no network, no GPU
    python -m pytest tests/test_gmm_head.py      # one room, in seconds

Some of them are homework. They blank a function, and grade what students write in its place:

    python test_all.py list                          # files in reading order: points, minutes, functions
    python test_all.py handout gmm_head -o hw1       # hw1/: the project, exercise bodies blanked
    python test_all.py check gmm_head                # for students: one line per question
    python test_all.py grade gmm_head alice bob ...  # folders, zips, notebooks -> a table each, grades.csv
    python test_all.py autograder gmm_head           # a zip for Gradescope

This file only collects. The tests of a file are in tests/test_<file>.py and its exercises in
homework/<file>.py.
"""
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
FIXTURE = type(pytest.fixture(lambda: None))
ROOMS = [f"tests.{path.stem}" for name in ("conftest", "test_*")                       # fixtures first
         for path in sorted((ROOT / "tests").glob(f"{name}.py"))]
ROOMS += [f"homework.{path.stem}" for path in sorted((ROOT / "homework").glob("*.py"))
          if (ROOT / path.name).exists()]                   # exercises have the name of their file


def collect():
    """The tests and fixtures of all rooms become names of this file, which is where pytest looks."""
    pytest.register_assert_rewrite(*ROOMS)               # before the first import: failures show their values
    for room in ROOMS:
        found = vars(importlib.import_module(room))
        tests = {name: found[name] for name in found if name.startswith("test_")}
        repeated = [name for name in tests if name in globals()]
        assert not repeated, f"{room} repeats the name of another room's test: {repeated}"
        globals().update(tests)
        # Fixtures, too, which pytest knows by their type. A name that two rooms share must be one fixture.
        fixtures = {name: value for name, value in found.items() if isinstance(value, FIXTURE)}
        clash = [name for name in fixtures if globals().get(name, fixtures[name]) is not fixtures[name]]
        assert not clash, f"{room} repeats the name of another room's fixture: {clash}"
        globals().update(fixtures)


if __name__ == "__main__":
    from homework import grading
    grading.main()
else:
    collect()
