"""Tests of the homework: the graders graded."""
import ast
import contextlib
import csv
import functools
import importlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import textwrap
import zipfile

import pytest
import torch

from common.reading import BadInput
from homework import answers, check, course, grading, half, kit, report, sandbox, submissions
from homework.answers import lines_of
from homework.course import exercises, graded
from homework.handout import HALF, MAIN, blanked, body, functions, parsed, truths, without_answers
from homework.kit import MODELS, ROOT, judged, looked
from homework.mistakes import MISTAKES

SOURCES = {name: (ROOT / f"{name}.py").read_text() for name in MODELS}
GRADERS_SEED = 1
TARGETS = [f"{name}.{target}" for name in MODELS for target in exercises(name, further=True)]


def source_of(target):
    """The source lines of a function, decorators included, without its docstring."""
    name, _, path = target.partition(".")
    node = functions(SOURCES[name])[path]
    lines = lines_of(SOURCES[name], node).split("\n")
    first = node.end_lineno - len(lines) + 1
    doc = node.body[0]
    return "\n".join(lines[:doc.lineno - first] + lines[doc.end_lineno - first + 1:])


@functools.lru_cache(maxsize=None)
def truths_of(name):
    """What the grader's tests see of the model file."""
    return truths(name, GRADERS_SEED, further=True)


@contextlib.contextmanager
def written(target, source):
    """While it lasts, the function `target` is what `source` makes of it. The truth is looked at before."""
    truths_of(target.split(".")[0])
    with answers.written(target, source):
        yield


def lost(tests):
    """The tests that an answer fails just now, as the grader sees it -> {test: what is wrong}."""
    found = {}
    for test in tests:
        if test.goals:
            continue
        seen, failed = sandbox.trial(test, GRADERS_SEED)
        wrong = judged(seen, failed, truths_of(test.exercise.split(".")[0])[test.__name__])[2]
        if wrong:
            found[test] = wrong
    return found


def own(target):
    """The tests of one function."""
    return [t for t in graded(target.split(".")[0], further=True) if t.exercise == target]


# ---- Right answers and wrong ones ----------------------------------------------------------------------

@pytest.mark.parametrize("name", MODELS)
def test_homework_of_a_file_is_ten_points_and_asks_in_docstrings(name):
    assert sum(t.points for t in graded(name)) == 10
    assert 3 <= len(exercises(name)) <= 5
    nodes = functions(SOURCES[name])
    for target in exercises(name, further=True):
        assert ast.get_docstring(nodes[target]), f"{name}.{target} has no docstring, so there is no question"
    for target in exercises(name):
        found = [m for m in MISTAKES if m[0] == f"{name}.{target}"]
        assert len(found) >= 3, f"fewer than three mistakes for {target}"


def test_homework_mistakes_are_as_many_as_teachers_are_told():
    assert f"\n{len(MISTAKES)} planted mistakes" in (ROOT / "docs" / "teachers.md").read_text()


@pytest.mark.parametrize("target", TARGETS)
def test_homework_right_answers_in_another_style_lose_nothing(target):
    """They print tensors, loop, use other names. The collected homework tests compare the other way round."""
    name, _, path = target.partition(".")
    with written(target, answers.second(name)[path]):
        assert not lost(own(target))


@pytest.mark.parametrize("name", MODELS)
def test_homework_not_done_costs_its_own_points_only(name):
    """The second tier builds on the first, not the first on the second."""
    for target in exercises(name, further=True):
        source = textwrap.dedent(source_of(f"{name}.{target}"))
        with written(f"{name}.{target}", blanked(source, name, [target.split(".")[-1]])):
            failed = lost(
                own(f"{name}.{target}") + [t for t in graded(name) if t not in own(f"{name}.{target}")])
        assert set(failed) == set(own(f"{name}.{target}")), {t.__name__: w for t, w in failed.items()}
        assert set(failed.values()) == {"not written yet"}


@pytest.mark.parametrize("target", dict.fromkeys(m[0] for m in MISTAKES))
def test_homework_mistakes_are_found_with_a_sentence(target):
    for _, right, wrong in (m for m in MISTAKES if m[0] == target):
        source = source_of(target)
        assert source.count(right) == 1, f"{right!r} is {source.count(right)} times in {target}"
        with written(target, source.replace(right, wrong)):
            failed = lost(own(target))
        assert failed, f"{wrong!r} in {target} loses nothing"
        assert all(len(w) > 20 for w in failed.values()), failed


def spoiled(target, how):
    """The source of a right answer, inside a wrapper that spoils it in one way."""
    name = target.split(".")[-1]
    source = textwrap.dedent(source_of(target))
    decorators = "".join(line + "\n" for line in source.split("\n") if line.startswith("@static"))
    inner = textwrap.indent(source.replace("@staticmethod\n", ""), "    ")
    outer = textwrap.indent(how.format(name=name), "    ")
    return f"{decorators}def {name}(*args, **kwargs):\n{inner}\n{outer}\n"


SPOILERS = {
    "detached": """
out = {name}(*args, **kwargs)
cut = lambda x: x.detach() if isinstance(x, torch.Tensor) else x
return tuple(cut(x) for x in out) if isinstance(out, tuple) else cut(out)""",
    "float64": """
out = {name}(*args, **kwargs)
wide = lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
return tuple(wide(x) for x in out) if isinstance(out, tuple) else wide(out)""",
    "seeded": """
torch.manual_seed(0)
return {name}(*args, **kwargs)""",
    "deaf": """
return {name}(*args)""",
    "one for all": """
out = {name}(*args, **kwargs)
same = lambda x: x[:1].expand_as(x) if isinstance(x, torch.Tensor) and x.ndim else x
return tuple(same(x) for x in out) if isinstance(out, tuple) else same(out)""",
}
TRAINED = """vae.VAE.kl vae.VAE.reparameterise vae.VAE.log_likelihood vq.VectorQuantizer.forward
    vq.VectorQuantizer.entropy_loss gmm_head.GMMHead.density ar_transformer.rotate
    ar_transformer.Attention.forward ar_transformer.ARTransformer.hidden_states maskgit.masked_mean
    maskgit.MaskGIT.embed diffusion_head.DiffusionHead.terms mar.MAR.forward mar.MAR.hidden
    flow_adapter.Coupling.forward lfq.quantize lfq.entropy_penalty lfq.entropy_of_mean lfq.CausalConv.forward
    lfq.FactorizedHead.loss lfq.FactorizedHead.embed titok.LatentEncoder.forward titok.LatentDecoder.forward
    titok.TiTok.decode_raw titok.TiTok.proxy_loss perceptual_gan.discriminator_loss
    perceptual_gan.generator_loss perceptual_gan.unit_channels perceptual_gan.LPIPS.forward
    var.MultiScaleQuantizer.forward var.VARBlock.forward""".split()
DRAWN = """vae.VAE.reparameterise gmm_head.GMMHead.draw maskgit.MaskGIT.training_mask mar.draw_order
    mar.MAR.forward ar_transformer.CategoricalHead.sample vq.VectorQuantizer.update""".split()
TYPED = """vae.VAE.kl vae.VAE.reparameterise vae.VAE.log_likelihood gmm_head.GMMHead.density
    gmm_head.GMMHead.draw gmm_head.guided_normal gmm_head.nucleus ar_transformer.rotate
    diffusion_head.DiffusionHead.reverse diffusion_head.DiffusionHead.terms flow_adapter.Coupling.forward
    flow_adapter.Coupling.inverse lfq.quantize lfq.codes perceptual_gan.unit_channels""".split()
BATCHES = """vae.VAE.kl vae.VAE.reparameterise gmm_head.GMMHead.density gmm_head.GMMHead.draw gmm_head.nucleus
    ar_transformer.rotate maskgit.n_still_masked maskgit.lowest maskgit.MaskGIT.training_mask mar.draw_order
    vq.VectorQuantizer.nearest lfq.codes titok.LatentEncoder.forward
    flow_adapter.FlowAdapter.inverse""".split()


TOLD = """gmm_head.GMMHead.draw vq.VectorQuantizer.entropy_loss lfq.entropy_penalty maskgit.masked_mean
    ar_transformer.CategoricalHead.sample maskgit.MaskGIT.sample mar.MAR.sample
    flow_adapter.Adapted.sample""".split()


@pytest.mark.parametrize("how, targets", [("detached", TRAINED), ("seeded", DRAWN), ("float64", TYPED),
                                          ("deaf", TOLD), ("one for all", BATCHES)])
def test_homework_right_values_are_not_enough(how, targets):
    """Values right, but no gradient passes; a fixed seed; another type; options ignored; one result for all
    of a batch.
    """
    assert len(targets) >= 7
    for target in targets:
        with written(target, spoiled(target, SPOILERS[how])):
            assert lost(own(target)), f"{target}, {how}, loses nothing"


def test_homework_what_only_samples_needs_no_gradient():
    with written("flow_adapter.Coupling.inverse",
                 spoiled("flow_adapter.Coupling.inverse", SPOILERS["detached"])):
        assert not lost(own("flow_adapter.Coupling.inverse"))


def test_homework_inputs_must_stay_as_they_were():
    look = kit.Look(0)
    look.call("x", lambda x: x.mul_(2), {"x": torch.ones(3)}, gradients=False)
    assert look.seen[-1][:2] == ("the inputs of x stay as they were", False)


def test_homework_inputs_are_the_same_whatever_an_answer_draws():
    first, second = kit.Look(3), kit.Look(3)
    torch.rand(100)
    assert torch.equal(first.randn(4), second.randn(4))
    assert not torch.equal(kit.Look(4).randn(4), kit.Look(3).randn(4))


@pytest.mark.parametrize("value, truth, words", [
    (torch.ones(2), torch.ones(3), "has shape (2,) and not (3,)"),
    (torch.ones(2).double(), torch.ones(2), "is float64 and not float32"),
    (torch.tensor([1.0, torch.nan]), torch.ones(2), "is nan where 1 is right"),
    (torch.tensor([1.0, 2.0]), torch.tensor([1.0, -torch.inf]), "is 2 where -inf is right"),
    (torch.ones(2), torch.tensor([2.0, 2.0]), "is off by -1.000 on average"),
    (torch.tensor([1, 2]), torch.tensor([1, 3]), "is wrong in 1 of 2 places, such as 2 and not 3"),
    (torch.zeros(2), torch.tensor([2.0, 3.0]), "is 0 everywhere"),
    (3, torch.ones(2), "is no tensor: 3"),
    (torch.ones(2), True, "is a tensor of shape (2,)"),
    ([1.0], [1], ""), (False, True, "is not so"), ("b", "a", "is 'b' and not 'a'"),
    (torch.ones(2), torch.ones(2) + 1e-6, ""),
])
def test_homework_a_difference_is_told_in_words(value, truth, words):
    found = kit.differs(value, truth, 1e-4)
    assert found.startswith(words) and bool(found) == bool(words)


def test_homework_capstones_are_reached_by_right_answers_only():
    """The quick ones. The others train for seconds; what they reach is in docs/teachers.md."""
    for name in ("vq", "lfq"):
        capstone, = (t for t in graded(name, further=True) if t.goals)
        seen, failed = looked(capstone, GRADERS_SEED)
        right, of, wrong = judged(seen, failed, capstone.goals)
        assert (failed, right, wrong) == (None, of, ""), wrong
    update = source_of("vq.VectorQuantizer.update")
    update = update.replace("self.ema_sum / smooth[:, None]", "self.ema_sum")
    with written("vq.VectorQuantizer.update", update):
        capstone, = (t for t in graded("vq", further=True) if t.goals)
        right, of, wrong = judged(*looked(capstone, GRADERS_SEED), capstone.goals)
    assert right < of and "within" in wrong and "1/12" in wrong
    assert 0 < check.points_of(3, right, of, wrong, partial=True) < 3 or right == 0


def test_homework_every_file_has_a_capstone():
    for name in MODELS:
        assert [t.exercise for t in graded(name, further=True) if t.goals] == [name]


# ---- Handouts -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MODELS)
def test_homework_is_handed_out_without_answers_and_with_all_else(name):
    def answer(file, target):                               # the lines that are to be cut
        node = functions(SOURCES[file])[target]
        return "\n".join(SOURCES[file].split("\n")[body(node)[0].lineno - 1:node.end_lineno])

    texts = without_answers([name], further=True)
    for other in MODELS:
        text = texts[f"{other}.py"]
        compile(text, f"{other}.py", "exec")
        holes = re.findall(r'^ *raise NotImplementedError\("homework: \w+\.([\w.]+)"\)$', text, re.M)
        assert set(exercises(other, further=True)) <= set(holes)
        for target in holes:                            # put the lines back, and it is the file, byte by byte
            text = re.sub(rf'^ *raise NotImplementedError\("homework: {other}\.{re.escape(target)}"\)$',
                          lambda _: answer(other, target), text, flags=re.M)
        assert text.removesuffix(HALF) == SOURCES[other].removesuffix(MAIN)
    assert not [
        file for file in texts if "answers" in file or "mistakes" in file or file.startswith("tests/")
    ]
    assert [f for f in texts if f.startswith("homework/") and f[9:-3] in MODELS] == [f"homework/{name}.py"]
    tests = texts[f"homework/{name}.py"]
    compile(tests, f"homework/{name}.py", "exec")
    assert all((f"def {t.__name__}(" in tests) != t.hidden for t in graded(name, further=True))


def test_homework_that_is_released_stays():
    texts = without_answers(["mar"], released=["vae", "vq"])
    assert texts["vae.py"] == SOURCES["vae"]
    assert texts["maskgit.py"] != SOURCES["maskgit"]
    assert texts["mar.py"] != SOURCES["mar"]
    assert "GMMHead.guide\")" not in texts["gmm_head.py"], "the second tier is not asked for"


class Plain(ast.NodeTransformer):
    """Names, arguments and constants of text are numbered, so that renaming does not hide a copy."""

    def __init__(self):
        self.names = {}

    def number(self, name):
        return self.names.setdefault(name, f"v{len(self.names)}")

    def visit_Name(self, node):
        return ast.Name(self.number(node.id), node.ctx)

    def visit_arg(self, node):
        return ast.arg(self.number(node.arg))


def plain(nodes):
    """Statements or expressions with numbered names, as a string that compares."""
    rename = Plain()
    copies = [ast.parse(ast.unparse(node)) for node in nodes]
    return "\n".join(ast.dump(rename.visit(copy)) for copy in copies)


@functools.lru_cache(maxsize=None)
def size_of(node):
    return type(node).__name__, sum(1 for _ in ast.walk(node))


def shape_of(nodes):
    return tuple(size_of(node) for node in nodes)


def bodies(source):
    """Every run of statements of a file, function by function, and every expression of a lambda."""
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.FunctionDef):
            yield node.name, body(node)
        if isinstance(node, ast.Lambda):
            yield "a lambda", [ast.Return(node.body)]


def test_homework_no_answer_stands_anywhere_else_in_a_handout():
    """Each answer against every function of a handout, in part and whole, names normalised."""
    wanted = {}
    for target in TARGETS:
        name, _, path = target.partition(".")
        for source in (SOURCES[name], (ROOT / "homework" / "answers" / f"{name}.py").read_text()):
            nodes = body(functions(source)[path])
            wanted.setdefault(shape_of(nodes), []).append((plain(nodes), target))
    lengths = {len(shape) for shape in wanted}
    texts = without_answers(MODELS, further=True)
    checked = 0
    for file, text in texts.items():
        for name, nodes in bodies(text):
            for n in lengths:
                for i in range(len(nodes) - n + 1):
                    for code, target in wanted.get(shape_of(nodes[i:i + n]), ()):
                        checked += 1
                        assert plain(nodes[i:i + n]) != code, f"{file}: {name} is the answer to {target}"
    assert checked > 5, "some pieces at least have the shape of an answer"


def test_homework_a_copy_under_another_name_would_be_found():
    source = SOURCES["flow_adapter"]
    node = functions(source)["Coupling.inverse"]
    other = ast.parse("def g(self, u, v):\n    return v - self.shift(u), u").body[0]
    assert plain(body(node)) == plain(other.body)


@pytest.mark.parametrize("name", MODELS)
def test_homework_pasting_a_visible_test_gives_no_points(name):
    """Each function and lambda of the handed out tests as the answer, and the numbers that are stored."""
    text = without_answers([name], further=True)[f"homework/{name}.py"]
    module = importlib.import_module(f"homework.{name}")
    helpers = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)) and not getattr(node, "name", "").startswith(
            ("test_", "capstone_")):
            node = ast.parse(ast.unparse(node)).body[0]
            n_args = len((node if isinstance(node, ast.FunctionDef) else node.value).args.args)
            helpers[ast.unparse(node)] = n_args
    for target in exercises(name, further=True):
        function = functions(SOURCES[name])[target]
        n_args = len(function.args.args)
        static = any(getattr(d, "id", "") == "staticmethod" for d in function.decorator_list)
        mark = "@staticmethod\n" if static else ""
        short = target.split(".")[-1]
        tests = own(f"{name}.{target}")
        candidates = []
        for helper, count in helpers.items():
            if n_args - 1 <= count <= n_args:
                if helper.startswith("def "):
                    candidates.append(mark + re.sub(r"^def \w+", f"def {short}", helper))
                else:
                    candidates.append(
                        f"{mark}def {short}(*args, **kwargs):\n    return ({helper})(*args[:{count}])")
        for candidate in candidates:
            with contextlib.suppress(NameError), patched_globals(name, module):
                with written(f"{name}.{target}", candidate):
                    failed = lost(tests)
                assert len(failed) == len([t for t in tests if not t.goals]), (target, candidate)
        stored = iter([v for t in tests if not t.hidden
                       for _, v, *_ in kit.truth_of(t, kit.STUDENTS_SEED)] * 3)
        replay = f"{mark}def {short}(*args, **kwargs):\n    return next(_stored)"
        sys.modules[name]._stored = stored
        with written(f"{name}.{target}", replay):
            failed = lost(tests)
        del sys.modules[name]._stored
        assert len(failed) == len([t for t in tests if not t.goals]), f"stored numbers answer {target}"


@contextlib.contextmanager
def patched_globals(name, module):
    """The names of the test file in the model file, as if pasted together."""
    space = vars(sys.modules[name])
    new = {k: v for k, v in vars(module).items() if k not in space}
    space.update(new)
    try:
        yield
    finally:
        for key in new:
            del space[key]


# ---- Commands -------------------------------------------------------------------------------------------

def run_command(*words):
    """A command of test_all.py in this process -> what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        grading.main([str(word) for word in words])
    return out.getvalue()


def run_python(*words, cwd, **env):
    """A command in a process of its own -> exit code, and all that it prints."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"} | env)
    return done.returncode, done.stdout + done.stderr


def test_homework_list_is_in_reading_order():
    lines = run_command("list").split("\n")
    assert [line.split(".py")[0] for line in lines if line and line[0] != " "] == list(MODELS)
    table = re.findall(r"^\|.*?\| `(\w+)\.py` \| `--", (ROOT / "README.md").read_text(), re.M)
    assert [name for name, _ in itertools.groupby(table)] == list(MODELS)       # maskgit.py has two rows
    assert lines[0].startswith("gmm_head.py: 10 points, about 120 minutes, medium")
    assert len(run_command("list", "mar",
                           "--further").split("\n")) > len(run_command("list", "mar").split("\n"))
    assert set(course.FILES) == set(MODELS)


@pytest.fixture(scope="module")
def handed_out(tmp_path_factory):
    """A handout of flow_adapter.py and gmm_head.py, half of the first one written."""
    folder = tmp_path_factory.mktemp("handout") / "hw"
    out = run_command("handout", "flow_adapter", "gmm_head", "-o", folder)
    assert "flow_adapter.py with 4 functions to write" in out and "Hidden tests give 1 points more" in out
    with pytest.raises(BadInput, match="not an empty folder"):
        run_command("handout", "flow_adapter", "-o", folder)
    text = (folder / "flow_adapter.py").read_text()
    for right, target in (("return x2, x1 + self.shift(x2)", "Coupling.forward"),
                          ("return b - self.shift(a), x2", "Coupling.inverse")):      # x2: a slip
        text = text.replace(f'raise NotImplementedError("homework: flow_adapter.{target}")', right)
    (folder / "flow_adapter.py").write_text(text)
    return folder


def test_homework_check_tells_students_how_far_they_are(handed_out):
    code, out = run_python("test_all.py", "check", "flow_adapter", cwd=handed_out)
    assert code == 0 and "2 of 10 points" in out
    assert re.search(r"2 of 2  Coupling\.forward\n", out)
    assert re.search(
        r"0 of 2  Coupling\.inverse +NameError: name 'x2' is not defined \(flow_adapter.py, line", out)
    assert re.search(r"0 of 3  FlowAdapter\.inverse +not written yet\n", out)


HALF_WRITTEN = """
def drawn(x):
    return 2 * x


def missing(x):
    raise NotImplementedError("homework: demo.missing")


def main():
    first = drawn(4)
    second = missing(first)
    print("first", first)
    print("second", second)
    print("last")


main()
"""


def test_homework_demo_of_a_half_written_file_draws_what_it_can(tmp_path, capsys):
    path = tmp_path / "demo.py"
    path.write_text(HALF_WRITTEN)
    space = {}
    exec(HALF_WRITTEN.removesuffix("main()\n"), space)
    with pytest.raises(SystemExit):
        half.run(space["main"], str(path))
    out = capsys.readouterr().out
    assert "first 8\n" in out and "last\n" in out
    assert "demo.py, line 12: left out, for it needs demo.missing" in out
    assert "line 14: left out, too (NameError" in out
    assert "not written yet: missing " in out and "called by main" in out


def test_homework_demos_are_guarded_in_a_handout(handed_out):
    assert (handed_out / "flow_adapter.py").read_text().endswith(HALF)
    missing = half.holes((handed_out / "flow_adapter.py").read_text())
    assert missing == ["FlowAdapter.inverse", "Adapted.sample"]


def test_homework_a_handout_cannot_grade(handed_out, monkeypatch):
    monkeypatch.setattr(grading, "truth_file", lambda name: handed_out / "homework" / "truths" / f"{name}.pt")
    with pytest.raises(BadInput, match="this is a handout"):
        run_command("grade", "gmm_head", ".")


def changed(old, new, text=None):
    text = text or SOURCES["gmm_head"]
    assert text.count(old) == 1
    return text.replace(old, new)


NUCLEUS = "    pi, order = log_pi.exp().sort(-1, descending=True)\n"


def class_of_students(folder):
    """Students of every kind in `folder` -> {name: (path, points, what the grader says)}."""
    right, blank = SOURCES["gmm_head"], without_answers(["gmm_head"])["gmm_head.py"]
    prints = changed("        z = (x.float()", "        print(mixture[0], repr(x))\n        z = (x.float()")
    loop = changed(NUCLEUS, "    while True:\n        pass\n" + NUCLEUS)
    monster = changed(NUCLEUS, "    os._exit(3)\n" + NUCLEUS).replace("import math\n",
                                                                      "import math\nimport os\n")
    monster = changed("    ratio = (sc / su) ** 2\n",
                      "    torch.empty(10 << 30)\n    ratio = (sc / su) ** 2\n", monster)
    monster = changed("        k = choose(log_pi, n)",
                      "        while True:\n            print(\"7\" * 9999)\n        k = 0", monster)
    spy = right + (
        "\n\nimport os\nraise SystemExit('sees ' + str([os.path.isfile(p) for p in (%r, %r)]) + ' '\n"
        "                 + str([p for p in os.listdir('/proc') if p.isdigit()]) + str(sorted(os.environ)))\n"
        % (str(ROOT / "gmm_head.py"), str(folder / "deep" / "a" / "gmm_head (2).py")))
    found = {
        "syntax": (folder / "syntax", 0, "is no Python: expected ':'"),
        "monster": (folder / "monster", 3, "ends the Python interpreter (exit code 3)"),
        "spy": (folder / "spy", 0, "cannot be imported"),
        "deep": (folder / "deep", 0, "taken: a/gmm_head (2).py"),
        "note": (folder / "note.ipynb", 8, "not done after 1 s of processor time"),
        "zipped": (folder / "zipped.zip", 10, "taken: zipped.zip: hw/gmm_head.py"),
        "nobody": (folder / "nobody", 0, "there is no "),
    }
    syntax = changed("class GMMHead(nn.Module):", "class GMMHead(nn.Module)")
    for name, text in {"syntax": syntax, "monster": monster, "spy": spy}.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "gmm_head.py").write_text(text)
    (folder / "deep" / "a").mkdir(parents=True)
    (folder / "deep" / "a" / "gmm_head (2).py").write_text(blank)
    cells = [{"cell_type": "markdown", "source": ["# no code"]},
             {"cell_type": "code", "source": ["%matplotlib inline\n", "!ls\n", loop]}]
    (folder / "note.ipynb").write_text(json.dumps({"cells": cells}))
    with zipfile.ZipFile(folder / "zipped.zip", "w") as z:
        z.writestr("__MACOSX/gmm_head.py", "no")
        z.writestr("hw/gmm_head.py", prints)
    return found


def test_homework_graded_from_the_command_line(tmp_path):
    students = class_of_students(tmp_path)
    paths = [path for path, _, _ in students.values()]
    table = tmp_path / "out" / "grades.csv"
    report.add_row(table, {"student": "deep", "file": "vae", "points": "7", "of": "10"})
    words = ["--csv", table, "--json", tmp_path / "json", "--html", tmp_path / "html", "--test_seconds", 1]
    out = run_command("grade", "gmm_head", *paths, "--jobs", 2, *words)
    rows = report.read_csv(table)
    assert rows["deep", "vae"]["points"] == "7", "another homework's row stays"
    for name, (_, points, says) in students.items():
        assert float(rows[name, "gmm_head"]["points"]) == points, out
        told = json.loads((tmp_path / "json" / f"{name}.json").read_text())
        assert told["score"] == points and sum(t["max_score"] for t in told["tests"]) == 10
        assert says in told["output"] + " ".join(t["output"] for t in told["tests"]), out
    for sentence in ("not written yet", "prints without end", "asks for more memory than it may have"):
        assert sentence in out, out
    if sandbox.spaces():
        assert "sees [False, False] ['1']" in out, "the project and the others' work are out of sight"
        spied = rows["spy", "gmm_head"]["remark"]
        assert str(ROOT) not in spied and "OLDPWD" not in spied
    page = (tmp_path / "html" / "note-gmm_head.html").read_text()
    assert "while True:" in page and "not done after 1 s" in page and "Keep the fewest components" in page
    index = (tmp_path / "html" / "index.html").read_text()
    assert 'href="note-gmm_head.html">8 of 10' in index and "7 of 10" in index
    (tmp_path / "syntax" / "gmm_head.py").write_text("def f(:\n")                       # handed in again
    out = run_command("grade", "gmm_head", *paths, "--resume", *words)
    assert "6 students are graded already and unchanged" in out
    assert "invalid syntax" in report.read_csv(table)["syntax", "gmm_head"]["remark"]


def test_homework_partial_points_and_own_points(tmp_path):
    assert [check.points_of(3, 5, 10, wrong, partial) for wrong, partial in
            (("", False), ("no", False), ("no", True), ("", True))] == [3, 0, 1.5, 3]
    own_file = tmp_path / "points.csv"
    own_file.write_text("nucleus, GMMHead.density\n6, 0\n")
    assert sum(grading.own_points(own_file, graded("gmm_head")).values()) == 11
    own_file.write_text("nobody\n6\n")
    with pytest.raises(BadInput, match="'nobody' is no test or function"):
        grading.own_points(own_file, graded("gmm_head"))
    own_file.write_text("nucleus\nmany\n")
    with pytest.raises(BadInput, match="two lines"):
        grading.own_points(own_file, graded("gmm_head"))


def test_homework_submissions_say_what_was_taken(tmp_path):
    (tmp_path / "two").mkdir()
    for name in ("one.py", "other.py"):
        (tmp_path / "two" / name).write_text("x = 1")
    assert submissions.find(tmp_path / "two",
                            "vae").text is None, "two files, neither of which says what it is"
    (tmp_path / "two" / "my_vae.py").write_text("x = 2")
    assert submissions.find(tmp_path / "two", "vae").taken == "my_vae.py"
    (tmp_path / "broken.zip").write_text("no zip")
    assert "cannot be read" in submissions.find(tmp_path / "broken.zip", "vae").remark
    (tmp_path / "broken.ipynb").write_text("{}")
    assert "is no notebook" in submissions.find(tmp_path / "broken.ipynb", "vae").remark
    names = grading.name_students([tmp_path / "a" / "vae.py", tmp_path / "b" / "vae.py"], "vae")
    assert len(set(names.values())) == 2


def test_homework_csv_keeps_old_columns(tmp_path):
    table = tmp_path / "grades.csv"
    report.add_row(table, {"student": "a", "file": "vae", "points": 3, "test_x": 3})
    report.add_row(table, {"student": "a", "file": "vq", "points": 4, "test_y": 4})
    report.add_row(table, {"student": "a", "file": "vae", "points": 5, "test_x": 5})
    with open(table, newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(row["file"], row["points"], row["test_x"], row["test_y"]) for row in rows] == [
        ("vae", "5", "5", ""), ("vq", "4", "", "4")]


def test_homework_autograder_runs_in_a_bare_folder(tmp_path):
    """Laid out as Gradescope does it, with nothing of the project around."""
    path = tmp_path / "autograder.zip"
    run_command("autograder", "flow_adapter", "-o", path)
    base = tmp_path / "autograder"
    with zipfile.ZipFile(path) as z:
        z.extractall(base / "source")
        assert {"setup.sh", "run_autograder"} <= set(z.namelist())
        assert not [n for n in z.namelist() if "answers" in n or "mistakes" in n]
        modes = {i.filename: i.external_attr >> 16 & 0o777 for i in z.infolist()}
    assert modes["setup.sh"] == modes["run_autograder"] == 0o755
    (base / "run_autograder").write_text((base / "source" / "run_autograder").read_text())
    (base / "submission").mkdir()
    wrong = SOURCES["flow_adapter"].replace("return b - self.shift(a), a", "return b + self.shift(a), a")
    (base / "submission" / "flow_adapter.py").write_text(wrong)
    done = subprocess.run(["bash", base / "run_autograder"], cwd=tmp_path, capture_output=True, text=True,
                          env={"PATH": os.environ["PATH"], "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"})
    results = json.loads((base / "results" / "results.json").read_text())
    assert results["score"] == 8, done.stderr
    assert {t["visibility"] for t in results["tests"]} == {"visible"}
    assert {"score", "max_score", "name", "output", "status", "visibility"} <= set(results["tests"][0])
