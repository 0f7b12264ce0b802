"""Tests of common/age.py, and of the ages of all stored results."""
import json
import re
import subprocess
from datetime import date

import pytest
import torch

from common import age
from tests.helpers import ROOT

STORED = sorted((ROOT / "experiments" / "results").glob("**/*.json"))


def checkout(folder):
    """A repository of one Python file and one JSON -> its commit's short hash."""
    (folder / "code.py").write_text("x = 1\n")
    (folder / "result.json").write_text("{}\n")
    for words in (["init", "-q"], ["add", "-A"],
                  ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return age.git(folder, "rev-parse", "--short", "HEAD")


def test_a_commit_is_told_with_whether_the_code_differs_from_it(tmp_path):
    name = checkout(tmp_path)
    assert len(name) >= 7 and age.commit_of(tmp_path) == name
    (tmp_path / "result.json").write_text('{"new": 1}\n')
    assert age.commit_of(tmp_path) == name, "a result is no change of the code"
    (tmp_path / "code.py").write_text("x = 2\n")
    assert age.commit_of(tmp_path) == f"{name} and changes"


def test_outside_a_checkout_of_this_project_a_commit_is_unknown(tmp_path, monkeypatch):
    assert age.commit_of(tmp_path) == "unknown"
    checkout(tmp_path)
    inside = tmp_path / "unpacked"                          # an archive of the project in somebody's checkout
    inside.mkdir()
    assert age.commit_of(inside) == "unknown"
    monkeypatch.setenv("PATH", "")                          # no git at all
    assert age.commit_of(tmp_path) == "unknown"


def test_an_age_is_entries_of_a_json():
    facts = age.of_run("cpu")
    assert list(facts) == ["commit", "date", "machine", "torch"]
    assert facts["date"] == str(date.today()) and facts["torch"] == torch.__version__
    assert all(isinstance(v, str) and v for v in json.loads(json.dumps(facts)).values())
    assert age.now("probe_") == {"probe_commit": facts["commit"], "probe_date": facts["date"]}


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_every_stored_result_knows_its_age(path):
    result = json.loads(path.read_text())
    assert date.fromisoformat(result["date"])
    assert re.fullmatch(r"(stored with )?[0-9a-f]{7,}( and changes)?|unknown", result["commit"])


def test_there_are_stored_results():
    assert len(STORED) > 40


def test_every_table_of_results_knows_its_age():
    lines = (ROOT / "docs" / "results.md").read_text().split("\n")
    heads = [i for i, line in enumerate(lines) if re.fullmatch(r"\|[-|]+\|", line)]
    for i in heads:
        end = next(k for k in range(i, len(lines)) if not lines[k].startswith("|"))
        age_told = re.match(r"\*Run: \d{4}-\d\d-\d\d, (stored with )?[0-9a-f]{7,}\b", lines[end + 1])
        assert age_told, f"the table below {lines[i - 1]!r}"
    assert len(heads) > 25
