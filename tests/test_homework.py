"""Tests of the homework: the graders graded."""
import ast
import contextlib
import csv
import importlib
import json
import re
import sys
import textwrap
from unittest.mock import patch

import pytest

import data
from homework.grading import blanked, body, exercises, functions, graded, main, parsed, trial, without_answers
from homework.kit import MODELS, ROOT
from homework.mistakes import MISTAKES


SOURCES = {name: (ROOT / f"{name}.py").read_text() for name in MODELS}


@contextlib.contextmanager
def written(target, source):
    """While it lasts, the function `target`, such as "vae.VAE.kl", is what `source` (its lines) makes of
    it.
    """
    module, *owner, function = target.split(".")
    module = importlib.import_module(module)
    space = vars(module)
    exec(compile(textwrap.dedent(source), f"{module.__name__}.py", "exec"), space, made := {})
    with patch.object(space[owner[0]] if owner else module, function, made[function]):
        yield


def lines_of(target):
    """The source lines of a function, decorators included."""
    name, _, path = target.partition(".")
    node = functions(SOURCES[name])[path]
    first = min([node.lineno] + [d.lineno for d in node.decorator_list])
    return "\n".join(SOURCES[name].split("\n")[first - 1:node.end_lineno])


def lost(name):
    """The graded tests of NAME.py that fail just now -> {test: what is wrong}."""
    return {t: wrong for t in graded(name) if (wrong := trial(t))}


@pytest.mark.parametrize("name", MODELS)
def test_homework_of_a_file_is_ten_points_and_right_answers_get_them(name):
    assert sum(t.points for t in graded(name)) == 10 and 3 <= len(exercises(name)) <= 5
    nodes = functions(SOURCES[name])
    for target in exercises(name):
        assert ast.get_docstring(nodes[target]), f"{name}.{target} has no docstring, so there is no question"
        assert len([m for m in MISTAKES
                    if m[0] == f"{name}.{target}"]) >= 3, f"fewer than three mistakes for {target}"
    assert not lost(name)


@pytest.mark.parametrize("name", MODELS)
def test_homework_not_done_costs_its_own_points_only(name):
    for target in exercises(name):
        source = lines_of(f"{name}.{target}")
        with written(f"{name}.{target}", blanked(textwrap.dedent(source), name, [target.split(".")[-1]])):
            failed = lost(name)
        assert {t.exercise
                for t in failed} == {f"{name}.{target}"} and set(failed.values()) == {"not written yet"
                                                                                      }, failed
        assert len(failed) == len([t for t in graded(name) if t.exercise == f"{name}.{target}"])


@pytest.mark.parametrize("target", dict.fromkeys(m[0] for m in MISTAKES))
def test_homework_mistakes_cost_what_they_should(target):
    name = target.split(".")[0]
    whole = sum(t.points for t in graded(name) if t.exercise == target)
    for _, right, wrong, *points in (m for m in MISTAKES if m[0] == target):
        source = lines_of(target)
        assert source.count(right) == 1, f"{right!r} is {source.count(right)} times in {target}"
        with written(target, source.replace(right, wrong)):
            failed = lost(name)
        assert {t.exercise
                for t in failed} == {target}, f"{wrong!r} in {target} fails {[t.__name__ for t in failed]}"
        assert sum(t.points
                   for t in failed) == (points or
                                        [whole])[0], (wrong, {t.__name__: w
                                                              for t, w in failed.items()})
        assert all(len(w) > 20 and "Error:" not in w or "shape" in w
                   for w in failed.values()) or "pass" in wrong, failed


@pytest.mark.parametrize("name", MODELS)
def test_homework_is_handed_out_without_answers_and_with_all_else(name):
    def answer(file, target):                               # the lines that are to be cut
        node = functions(SOURCES[file])[target]
        return "\n".join(SOURCES[file].split("\n")[body(node)[0].lineno - 1:node.end_lineno])
    texts, answers = without_answers(name), {target: answer(name, target) for target in exercises(name)}
    for other in MODELS:
        text = texts[f"{other}.py"]
        assert parsed(text) and (other != name or compile(text, f"{name}.py", "exec"))
        assert not (given := [target for target in answers if answers[target] in text
                              ]), f"{other}.py gives away {given}"
        holes = re.findall(r'^ *raise NotImplementedError\("homework: \w+\.([\w.]+)"\)$', text, re.M)
        assert other != name or holes == [target for target in functions(SOURCES[name]) if target in answers]
        for target in holes:                            # put the lines back, and it is the file, byte by byte
            text = re.sub(rf'^ *raise NotImplementedError\("homework: {other}\.{re.escape(target)}"\)$',
                          lambda _: answer(other, target), text, flags=re.M)
        assert text == SOURCES[other]
    tests = texts[f"homework/{name}.py"]
    assert "homework/mistakes.py" not in texts and "tests/test_homework.py" not in texts
    assert parsed(tests) and all((f"def {t.__name__}(" in tests) != t.hidden for t in graded(name))
    everything = without_answers(name, hidden=True)[f"homework/{name}.py"]
    assert all(f"def {t.__name__}(" in everything for t in graded(name))


def test_homework_from_the_command_line(tmp_path, monkeypatch, capsys):
    def typed(*words):
        monkeypatch.setattr(sys, "argv", ["test_all.py", *map(str, words)])
        main()
        return capsys.readouterr().out
    assert typed("list", "gmm_head").startswith("gmm_head.py: 10 points\n    3  gmm_head.GMMHead.density ")
    assert "with 4 functions to write" in typed("handout", "gmm_head", "-o", tmp_path / "hw")
    with pytest.raises(data.BadInput, match="not an empty folder"):
        typed("handout", "gmm_head", "-o", tmp_path / "hw")
    right, blank = SOURCES["gmm_head"], (tmp_path / "hw" / "gmm_head.py").read_text()
    change = lambda old, new: right.replace(old, new) if right.count(old) == 1 else pytest.fail(old)
    nucleus = "    pi, order = log_pi.exp().sort(-1, descending=True)\n"
    subtle = change("drop = pi.cumsum(-1) - pi >= top_p", "drop = pi.cumsum(-1) >= top_p")
    monster = change(nucleus, "    os._exit(3)\n" + nucleus).replace("import math\n",
                                                                     "import math\nimport os\n")
    monster = monster.replace("    ratio = (sc / su) ** 2\n",
                              "    torch.empty(10 << 30)\n    ratio = (sc / su) ** 2\n")
    monster = monster.replace("        k = choose(log_pi, n)",
                              "        while True:\n            print(7)\n        k = 0")
    students = {
        "perfect": (right, 10, ""), "blank": (blank, 0, "not written yet"),
        "syntax": (change("class GMMHead(nn.Module):",
                          "class GMMHead(nn.Module)"), 0, "gmm_head.py is no Python: expected ':'"),
        "constant": (change(
            "- sigma.log().sum(-1) - 0.5 * math.log(2 * math.pi) * x.shape[-1]\n        return torch.log",
            "- sigma.log().sum(-1)\n        return torch.log"), 7, "log p is off by +2.757 on average"),
        "loop": (change(nucleus, "    while True:\n        pass\n" + nucleus), 8,
                 "not done after 1 s of processor time"),
        "subtle": (subtle, 8, "The one that reaches top_p belongs to them."),
        "monster": (monster, 3, "ends the Python interpreter (exit code 3)"), "nobody": (None, 0,
                                                                                         "there is no ")
    }
    for name, (text, _, _) in students.items():
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "gmm_head.py").write_text(text)
    out = typed("grade", "gmm_head", *[tmp_path / name for name in students], "--csv",
                tmp_path / "grades.csv", "--json", tmp_path / "json", "--test_seconds", 1, "--seconds", 150)
    with open(tmp_path / "grades.csv", newline="") as f:
        grades = {row["student"]: row for row in csv.DictReader(f)}
    for name, (_, points, sentence) in students.items():
        assert int(grades[name]["points"]) == points, out
        report = json.loads((tmp_path / "json" / f"{name}.json").read_text())
        assert report["score"] == points and sum(t["max_score"] for t in report["tests"]) == 10
        assert sentence in report["output"] + " ".join(t["output"] for t in report["tests"]), out
    assert "prints without end" in out and "asks for more memory than it may have" in out
