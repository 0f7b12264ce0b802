"""Tests of experiments/against.py: an older commit against the working tree."""
import json
import subprocess
import sys

import pytest

import data
from experiments import against, benchmark
from tests.helpers import ROOT

FAKE = '''"""A benchmark whose step burns as much processor time as its own tree says."""
import sys, time
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import speed
import torch


def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def build(entry, device):
    if "--new_flag" in entry[3] and not speed.knows:
        print("train.py: error: unrecognized arguments: --new_flag", file=sys.stderr)
        raise SystemExit(2)
    print("something else on stdout")
    model = SimpleNamespace(train=bool, eval=bool, encode=lambda x: burn(speed.sample))
    return SimpleNamespace(raw=model, tokenizer=SimpleNamespace(eval=bool, decode=bool), device=device,
                           classes=10, stage=1, x=None)


def training_step(s):
    burn(speed.step)
'''


def commit(folder, message):
    me = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "add", "-A"], cwd=folder, check=True)
    subprocess.run(["git", *me, "commit", "-qm", message], cwd=folder, check=True)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Three commits: too old, slow, fast; systems "a" and, which the slow one does not know, "b"."""
    root = tmp_path / "repository"
    (root / "experiments").mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    (root / "experiments" / "benchmark.py").write_text("def main():\n    pass\n")
    commit(root, "too old")
    (root / "experiments" / "benchmark.py").write_text(FAKE)
    (root / "speed.py").write_text("step, sample, knows = 0.06, 0.02, False\n")
    commit(root, "slow")
    (root / "speed.py").write_text("step, sample, knows = 0.02, 0.04, True\n")
    commit(root, "fast")
    monkeypatch.setattr(against, "ROOT", root)
    monkeypatch.setattr(against, "SYSTEMS", {"a": "--flag", "b": "--new_flag"})
    return root


def test_against_an_older_commit_each_process_runs_the_code_of_its_own_tree(repository, tmp_path, capsys):
    """A step takes 60 ms of processor time in the old tree and 20 in the new one, a sample 20 and 40."""
    out = tmp_path / "x.json"
    benchmark.main(["--device", "cpu", "--against", "HEAD~1", "--quick", "--out", str(out)])
    found = json.loads(out.read_text())
    a, b = found["systems"]
    assert a["step"]["ratio"] == pytest.approx(3, rel=0.1)
    assert a["sample"]["ratio"] == pytest.approx(0.5, rel=0.1)
    assert a["step"]["old_cpu_ms"] == pytest.approx(60, rel=0.1) and a["step"]["old_wall_ms"] > 59
    assert a["step"]["low"] <= a["step"]["ratio"] <= a["step"]["high"]
    assert b == dict(system="b", skipped="old: unrecognized arguments: --new_flag")
    assert found["machine"] and found["date"] and found["clock"] == "cpu"
    for name, hash_ in (("HEAD~1", found["old"]), ("HEAD", found["new"])):
        whole = subprocess.run(["git", "rev-parse", name], cwd=repository, capture_output=True, text=True)
        assert whole.stdout.startswith(hash_) and len(hash_) >= 7
    lines = capsys.readouterr().out.split("\n")
    assert lines[3].startswith("b") and "skipped, old: unrecognized" in lines[3]


def test_against_says_what_it_cannot_time(repository):
    for name, why in (("HEAD~2", "too old"), ("nonsense", "not a commit")):
        with pytest.raises(data.BadInput, match=f"--against {name}: {why}"):
            benchmark.main(["--device", "cpu", "--against", name, "--quick"])
    with pytest.raises(data.BadInput, match="--systems c: there are a, b"):
        benchmark.main(["--device", "cpu", "--against", "HEAD", "--quick", "--systems", "c"])
    with pytest.raises(data.BadInput, match="--systems goes with --against"):
        benchmark.main(["--device", "cpu", "--systems", "a"])
    (repository / "speed.py").write_text("raise RuntimeError('no speed here')")
    with pytest.raises(data.BadInput, match="the new code ended: RuntimeError: no speed here"):
        benchmark.main(["--device", "cpu", "--against", "HEAD", "--quick"])


@pytest.mark.slow
def test_this_commit_is_as_fast_as_itself(monkeypatch, tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    small = "--tok_size small --size nano --image_size 16 --tok_batch_size 8 --batch_size 8"
    monkeypatch.setattr(against, "SYSTEMS", {"vae": f"--tokenizer vae --generator none {small}",
                                             "givt": f"--tokenizer vae --head gmm {small}"})
    found = against.compare("HEAD", rounds=9)
    for row in found["systems"]:
        for job in ("step", "sample"):
            assert 0.5 < row[job]["ratio"] < 2, row


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_against_typed_by_somebody_says_what_to_type(words):
    done = subprocess.run([sys.executable, ROOT / "experiments" / "against.py", *words], capture_output=True,
                          text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "benchmark.py --against" in done.stderr
