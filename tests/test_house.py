"""
The house rules: arrows between files run down, model files stand alone, copies are equal, flags are read,
docs are true.
"""
import ast
import functools
import graphlib
import importlib
import re
import shlex
import subprocess
import sys

import pytest
import torch

import ar_transformer
import diffusion_head
import flow_adapter
import gmm_head
import lfq
import mar
import maskgit
import titok
import train
import vae
import vq
from common import runs
from official.titok import TiTokGenerator
from tests.helpers import MODELS, PROGRAMS, ROOT

# Rooms from the lowest up: a file imports only what stands in a line above its own.
FLOORS = [
    ["common.waiting", "common.memory", "common.age", "common.pictures", "common.log", "common.sharding",
     "common.muon", "common.averages", "common.reading", "common.folders", "common.files"],
    ["data"],
    MODELS,
    ["official.files"],
    ["official.mar", "official.llamagen", "official.titok", "official.lpips", "official.open_magvit2"],
    ["common.runs"],
    ["common.tables"],
    ["common.captions", "common.tokens", "common.compiling"],
    ["common.drawing"],
    ["common.classifier"],
    ["common.metrics"],
    ["common.yardsticks"],
    ["common.clips"],
    PROGRAMS,
    ["recipes.*"],
    ["experiments.*"],
]
WITHIN = {                                                  # the only arrows between files of one line
    ("common.folders", "common.reading"),
    ("common.files", "common.reading"),
    ("common.muon", "common.sharding"),
    ("common.files", "common.folders"),
    ("official.open_magvit2", "official.llamagen"),
}
DOCS = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
SHAPES = dict(channels=3, B=3, T=16, D=4, V=64, C=32, K=5, H=16, W=16, S=6, N=7, bits=6, n_head=4, d=8,
              head_dim=8, P=1)


def files():
    """{dotted name: path} of the project's files, without tests and homework."""
    found = {}
    for path in [
            *ROOT.glob("*.py"), *(p for room in ("common", "official", "recipes", "experiments")
                                  for p in ROOT.glob(f"{room}/*.py"))
    ]:
        if path.stem not in ("__init__", "test_all"):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    return found


def tree_of(name):
    return parsed(files()[name])


@functools.cache
def parsed(path):
    return ast.parse(path.read_text())


@functools.cache
def all_imports(path):
    """The dotted names of what a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports(name):
    """The files of the project that a file imports."""
    known = files()
    return all_imports(known[name]) & set(known) - {name}


def floor_of(name):
    for floor, names in enumerate(FLOORS):
        if name in names or name.split(".")[0] + ".*" in names:
            return floor
    if name.startswith("official."):
        return floor_of("official.mar")
    raise AssertionError(f"{name}: in no room of FLOORS")


@pytest.mark.parametrize("name", sorted(files()))
def test_arrows_between_files_run_down(name):
    """Lower floors know nothing of higher ones, so there is no circle. A model's demo may import data."""
    for other in imports(name):
        if name in MODELS:
            assert other == "data", f"{name} imports {other}: model files stand alone"
            continue
        down = floor_of(other) < floor_of(name) or (name, other) in WITHIN
        beside = name.startswith("experiments.") and other.startswith("experiments.")
        assert down or beside, f"{name} imports {other}, which does not stand below it"


def test_the_arrows_make_no_circle():
    graph = {name: imports(name) for name in files()}
    assert "common.runs" in graph["train"] and "vae" in graph["common.runs"], "there are arrows"
    graphlib.TopologicalSorter(graph).prepare()             # raises CycleError, which names the files


@pytest.mark.parametrize("name", [name for name in sorted(files()) if name.startswith("official.")])
def test_the_authors_weights_need_the_models_only(name):
    """Not data, not a program: somebody takes such a file and its model elsewhere."""
    allowed = {*MODELS, "official.files"} | {other for file, other in WITHIN if file == name}
    assert imports(name) <= allowed, imports(name) - allowed


def test_imports_are_found_wherever_they_stand(monkeypatch, tmp_path):
    path = tmp_path / "x.py"
    lines = ["from common import runs", "import common.files", "def f():", "    from vae import VAE",
             "    import train as t"]
    path.write_text("\n".join(lines))
    known = files() | {"x": path}
    monkeypatch.setitem(globals(), "files", lambda: known)
    assert imports("x") == {"common.runs", "common.files", "vae", "train"}


@pytest.mark.parametrize("name", MODELS)
def test_model_files_stand_alone(name):
    top = set()
    for node in tree_of(name).body:
        if isinstance(node, ast.Import):
            top |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            top.add(node.module.split(".")[0])
    assert top <= {"torch", "numpy"} | sys.stdlib_module_names, top


@pytest.mark.parametrize("name", MODELS)
def test_model_files_open_with_what_shapes_and_the_command(name):
    doc = ast.get_docstring(tree_of(name))
    assert f"python {name}.py" in doc
    assert "Shapes:" in doc
    assert "Try it yourself" in doc
    assert doc.count("\n") < 26


def test_same_name_means_same_code():
    """Only main() is every file's own."""
    seen = {}
    for name in MODELS:
        for node in ast.parse(files()[name].read_text()).body:
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or node.name == "main":
                continue
            other, code = seen.setdefault(node.name, (name, ast.dump(node)))
            assert code == ast.dump(node), f"{node.name} differs between {other}.py and {name}.py"


def flags_of(tree):
    """The add_argument calls of a file -> {name in args: their keywords}."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            options = {word.arg: word.value for word in node.keywords}
            name = options["dest"].value if "dest" in options else node.args[0].value.lstrip("-")
            found[name] = options
    return found


def read_in(tree):
    """The names that a file reads off a Namespace of flags: args.name, own.name, run.args.name, getattr."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            holder = getattr(node.value, "id", getattr(node.value, "attr", None))
            if holder in ("args", "given", "own", "a"):
                found.add(node.attr)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            found.add(getattr(node.args[1], "value", None))
    return found


def named_in(tree):
    """The names that a file lists in a tuple, a list or a dict, whose flags a loop then reads."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Tuple, ast.List)):
            found |= {item.value for item in node.elts if isinstance(item, ast.Constant)}
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "dict":
            found |= {word.arg for word in node.keywords}
        if isinstance(node, ast.Dict):
            found |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
    return found


@pytest.mark.parametrize("name",
                         [*PROGRAMS, "data", *(n for n in sorted(files()) if n.startswith("recipes."))])
def test_every_flag_is_explained_and_read(name):
    """By its own program, or for those of train.py in the rooms that its args travel through."""
    tree = tree_of(name)
    read = read_in(tree)
    if name == "train":
        read = read.union(*(read_in(tree_of(room)) for room in files() if room.startswith("common.")))
    else:
        read |= named_in(tree)
    for flag, options in flags_of(tree).items():
        assert "help" in options, f"{name} --{flag} has no help"
        assert flag in read, f"{name} parses --{flag} and never reads it"


def told(doc):
    """The shapes that a docstring tells, (inputs, outputs): what stands in brackets before and after its
    first arrow.
    """
    doc = re.sub(r"\[, D\]", "", doc.replace("...", "5, 7")).split("\n\n")[0]
    before, after = re.split("->", doc, maxsplit=1)
    def shapes(text):
        found = []
        for inside in re.findall(r"(?<!\w)\(([\w\s,/+*^-]*)\)", text):
            inside = re.sub(r"(\d)([A-Z])", r"\1 * \2", inside).replace("/", "//").replace("^", "**")
            try:
                found.append(tuple(eval(f"[{inside}]", {}, dict(SHAPES))))
            except (NameError, SyntaxError, TypeError):     # words in brackets
                continue
        return found
    return shapes(before), shapes(after)


def test_shapes_are_as_the_docstrings_tell():
    """Inputs are made in the shapes told before the arrow; what comes back must have those told after it."""
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    ids, real, labels = torch.randint(64, (3, 16)), torch.randn(3, 16, 4), torch.arange(3)
    mask = torch.rand(3, 16) < 0.5
    vae_ = vae.VAE(image_size=16, token_dim=4, ch=8, ch_mult=(1, 1, 1), n_res=1, groups=4).eval()
    tokenizers = [
        vq.VQ(image_size=16, vocab_size=64, code_dim=4, ch=8, ch_mult=(1, 1, 1), n_res=1, z_channels=8,
              groups=4).eval(),
        lfq.LFQ(image_size=16, bits=6, ch=8, ch_mult=(1, 1, 1), n_res=1, groups=4).eval(),
        titok.TiTok(image_size=16, n_tokens=16, vocab_size=64, code_dim=4, enc=(32, 1, 4),
                    dec=(32, 1, 4)).eval()
    ]
    size = dict(n_layer=2, n_head=4, n_embd=32)
    of = lambda cls, head: cls(head(32, 64), 16, 3, vocab_size=64, grid=(4, 4), **size).eval()
    ar, mg, mr = (of(m, m_.CategoricalHead) for m, m_ in ((ar_transformer.ARTransformer, ar_transformer),
                                                          (maskgit.MaskGIT, maskgit), (mar.MAR, mar)))
    tg = TiTokGenerator(16, 3, 64, "bert", n_mlp=64, **size).eval()
    gmm, diffusion = gmm_head.GMMHead(32, 4, 5), diffusion_head.DiffusionHead(32, 4, 16, 1)
    flow = flow_adapter.FlowAdapter(4, (4, 4))
    h, x, some = torch.randn(5, 7, 32), torch.randn(5, 7, 4), torch.randint(64, (5, 7))
    q = torch.randn(3, 4, 6, 8)
    calls = [(vae_.posterior, images), (vae_.encode, images), (vae_.decode, real), (vae_.decode_raw, real),
             (vae_.kl, real, real.exp()), (vae_.reparameterise, real, real.exp()),
             *[(t.encode, images) for t in tokenizers], *[(t.decode, ids) for t in tokenizers],
             *[(t.latents, images) for t in tokenizers[:2]], (tokenizers[0].quantizer.codes, ids),
             (tokenizers[0].quantizer.nearest, real), (lfq.quantize, torch.randn(5, 7, 6)),
             (lfq.codes, some, 6), (lfq.entropy_of_mean, torch.randn(7, 6), 0.1), (flow.forward, real),
             (flow.inverse, real), (gmm.mixture, h), (gmm.log_prob, h, x), (gmm.loss, h, x), (gmm.sample, h),
             (diffusion.loss, h, x), (diffusion.sample, h), (ar.head.loss, h, some), (ar.head.sample, h),
             (ar.hidden_states, ids, labels), (ar.logits, ids, labels), (ar.sample, labels),
             (ar.beam_search, labels, 2, 2), (mg.hidden_states, ids, labels, mask),
             (mg.logits, ids, labels, mask), (mg.sample, labels), (mg.training_mask, 3, "cpu"),
             (tg.hidden_states, ids, labels, mask), (tg.sample, labels), (tg.training_mask, 3, "cpu"),
             (mr.hidden, ids, labels, mask), (mr.sample, labels), (ar_transformer.attention, q, q, q)]
    for f, *inputs in calls:
        before, after = told(f.__doc__)
        given = [tuple(v.shape) for v in inputs if isinstance(v, torch.Tensor)]
        name = getattr(f, "__qualname__", f)
        assert not before or before[:len(given)] == given[:len(
            before)], f"{name} is given {given}, its docstring says {before}"
        out = f(*inputs)
        out = [
            tuple(v.shape) for v in (out if isinstance(out, tuple) else (out, ))
            if isinstance(v, torch.Tensor)
        ]
        if "each" in f.__doc__.split("\n\n")[0]:
            after = after[:1] * len(out)
        assert after[:len(out)] == out, f"{name} gives {out}, its docstring says {after}"


def commands():
    """(file, words) of every command in README, docs and the docstrings of the project."""
    texts = {doc: (ROOT / doc).read_text() for doc in DOCS}
    lines = [(doc, line) for doc, text in texts.items()
             for line in re.findall(r"(?:python|torchrun) [^`\n|]*", text)]
    for name in files():
        doc = ast.get_docstring(tree_of(name)) or ""
        lines += [(name, line) for line in re.findall(r"^ +((?:python|torchrun) .*)$", doc, re.M)]
    found = []
    for doc, line in lines:
        if ".py" not in line and "-m " not in line:         # words, not a command
            continue
        words = shlex.split(line, comments=True)
        if words[0] == "torchrun":                          # its own flags, and perhaps -- behind them
            words = words[[word.endswith(".py") for word in words].index(True) - 1:]
        words = words[1:]
        if words and words[0] == "-m":
            words = [words[1].replace(".", "/") + ".py", *words[2:]]
        if words and words[0].endswith(".py"):
            found.append((doc, tuple(words)))
    return sorted(set(found))


def parsers():
    """{file: its parse_args}: programs and recipes."""
    names = [*PROGRAMS, *(name for name in files() if name.startswith("recipes."))]
    return {name.replace(".", "/") + ".py": importlib.import_module(name).parse_args for name in names}


def test_commands_are_found():
    found = commands()
    for command in [("README.md", ("train.py", "--tokenizer", "vae", "--head", "gmm")),
                    ("README.md", ("sample.py", "RUN", "--prompt", "a large green star")),
                    ("README.md", ("recipes/pairs.py", "--task", "colourise")),
                    ("README.md", ("train.py", "...")),
                    ("train", ("train.py", "--tokenizer", "vq", "--generator", "maskgit"))]:
        assert command in found, command
    assert len(found) > 80


@pytest.mark.parametrize("doc, words", commands())
def test_commands_of_the_docs_are_understood(doc, words, tmp_path):
    """A program or recipe parses them. Elsewhere the file and the flags must be there."""
    file, *rest = words
    path = ROOT / file
    if file in ("pytest.py", "timeit.py"):                  # not ours
        return
    assert path.exists(), f"{doc}: {words}"
    parse = parsers().get(file)
    if parse and "..." not in rest and "--help" not in rest:
        given = parse(rest)
        if file == "train.py":                              # and what is asked for goes together
            given.runs, given.device = str(tmp_path), "cpu"
            runs.refuse(runs.resolve(given, *runs.folders(given)))
        return
    flags = set(re.findall(r"[\"'](-[\w-]+)[\"']", path.read_text())) | {"--help"}
    if file == "test_all.py":
        flags |= set(re.findall(r"[\"'](-[\w-]+)[\"']", (ROOT / "homework" / "grading.py").read_text()))
    missing = [word for word in rest if word.startswith("-") and word.split("=")[0] not in flags]
    assert not missing, f"{doc}: {words}: there is no {missing}"
    if file.startswith("experiments/"):                     # it is run by its path, or as a module
        assert "sys.path.insert" in path.read_text()
        importlib.import_module(file.removesuffix(".py").replace("/", "."))


@pytest.mark.parametrize("name", [n for n in sorted(files()) if n.startswith("experiments.")])
def test_every_experiment_has_a_parser(name):
    """against.py is started by benchmark.py, whose flag it is; equal_time.py is a part of two others."""
    if name not in ("experiments.against", "experiments.equal_time"):
        assert "ArgumentParser(" in files()[name].read_text()


def test_flags_in_the_tables_of_readme_go_together(tmp_path):
    rows = re.findall(r"^\|.*?\| `(\w+\.py)` \| `(--[^`]*)` \|", (ROOT / "README.md").read_text(), re.M)
    assert {file.removesuffix(".py") for file, _ in rows} == set(MODELS)
    for _, line in rows:
        words = shlex.split(line)
        if "--tokenizer" not in words:
            words = ["--tokenizer", "vae", *words]
        given = train.parse_args([*words, "--device", "cpu", "--runs", str(tmp_path)])
        runs.refuse(runs.resolve(given, *runs.folders(given)))


@pytest.mark.parametrize("doc", DOCS)
def test_links_of_the_docs_lead_somewhere(doc):
    folder = (ROOT / doc).parent
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / doc).read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = folder / path if path else ROOT / doc
        assert file.exists(), f"{doc} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, f"{doc} links to {target}"


def test_readme_is_one_screen():
    assert len((ROOT / "README.md").read_text().split("\n")) <= 140


@pytest.mark.parametrize("doc", DOCS)
def test_lines_of_docs_are_at_most_110_wide(doc):
    """But for the rows of tables, and commands, which cannot be broken."""
    for i, line in enumerate((ROOT / doc).read_text().split("\n"), 1):
        assert len(line) <= 110 or line.startswith(("|", "    python")), f"{doc}, line {i}: {line}"


def test_lines_of_python_are_at_most_110_wide():
    for room in ("", "common/", "official/", "recipes/", "experiments/", "homework/", "tests/"):
        for path in sorted(ROOT.glob(f"{room}*.py")):
            lines = path.read_text().split("\n")
            wide = [i for i, line in enumerate(lines, 1) if len(line) > 110]
            assert not wide, f"{room}{path.name}, lines {wide}"


def test_weights_are_loaded_without_running_code():
    for path in files().values():
        for call in re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", path.read_text()):
            assert "weights_only=True" in call, (path.name, call)


def test_nothing_that_a_run_makes_is_in_git():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    assert not [name for name in tracked if name.startswith("runs/") or name.endswith((".pt", ".pyc"))]
