"""Tests of house."""
import ast
import re
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
import vae
import vq
from tests.helpers import MODELS, PROGRAMS, ROOT
SHAPES = dict(channels=3, B=3, T=16, D=4, V=64, C=32, K=5, H=16, W=16, S=6, N=7, bits=6, n_head=4, d=8, head_dim=8, P=1)


def told(doc):
    """The shapes that a docstring tells, (inputs, outputs): what stands in brackets before and after its first arrow."""
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


def tree_of(name):
    return ast.parse((ROOT / f"{name}.py").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_model_files_stand_alone(name):
    tree, doc = tree_of(name), ast.get_docstring(tree_of(name))
    top = {(a.name if isinstance(n, ast.Import) else n.module).split(".")[0]
           for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    assert top <= {"torch", "numpy"} | sys.stdlib_module_names, top
    assert f"python {name}.py" in doc and "Shapes:" in doc and "Try it yourself" in doc and doc.count("\n") < 26


def test_same_name_means_same_code():
    seen = {}
    for name in MODELS:
        for node in tree_of(name).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name != "main":
                other, code = seen.setdefault(node.name, (name, ast.dump(node)))
                assert code == ast.dump(node), f"{node.name} differs between {other}.py and {name}.py"


@pytest.mark.parametrize("name", PROGRAMS + ["data"])
def test_every_flag_is_explained_and_read(name):
    source = (ROOT / f"{name}.py").read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            flag = node.args[0].value.lstrip("-")
            options = {k.arg: k.value for k in node.keywords}
            assert "help" in options, f"{name}.py --{flag} has no help"
            dest = options["dest"].value if "dest" in options else flag
            read = rf"(args|given|args_io|flags)\.{dest}\b|[\"']{dest}[\"'][,)\]]"
            assert len(re.findall(read, source)) >= 1, f"{name}.py parses --{flag} and never reads it"


def test_shapes_are_as_the_docstrings_tell():
    """Inputs are made in the shapes told before the arrow; what comes back must have those told after it."""
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    ids, real, labels = torch.randint(64, (3, 16)), torch.randn(3, 16, 4), torch.arange(3)
    mask = torch.rand(3, 16) < 0.5
    vae_ = vae.VAE(image_size=16, token_dim=4, ch=8, ch_mult=(1, 1, 1), n_res=1, groups=4).eval()
    tokenizers = [vq.VQ(image_size=16, vocab_size=64, code_dim=4, ch=8, ch_mult=(1, 1, 1), n_res=1, z_channels=8, groups=4).eval(),
                  lfq.LFQ(image_size=16, bits=6, ch=8, ch_mult=(1, 1, 1), n_res=1, groups=4).eval(),
                  titok.TiTok(image_size=16, n_tokens=16, vocab_size=64, code_dim=4, enc=(32, 1, 4), dec=(32, 1, 4)).eval()]
    size = dict(n_layer=2, n_head=4, n_embd=32)
    of = lambda cls, head: cls(head(32, 64), 16, 3, vocab_size=64, grid=(4, 4), **size).eval()
    ar, mg, mr = (of(m, m_.CategoricalHead) for m, m_ in ((ar_transformer.ARTransformer, ar_transformer), (maskgit.MaskGIT, maskgit),
                                                          (mar.MAR, mar)))
    gmm, diffusion = gmm_head.GMMHead(32, 4, 5), diffusion_head.DiffusionHead(32, 4, 16, 1)
    flow = flow_adapter.FlowAdapter(4, (4, 4))
    h, x, some = torch.randn(5, 7, 32), torch.randn(5, 7, 4), torch.randint(64, (5, 7))
    q = torch.randn(3, 4, 6, 8)
    calls = [(vae_.posterior, images), (vae_.encode, images), (vae_.decode, real), (vae_.decode_raw, real), (vae_.kl, real, real.exp()),
             (vae_.reparameterise, real, real.exp()), *[(t.encode, images) for t in tokenizers], *[(t.decode, ids) for t in tokenizers],
             *[(t.latents, images) for t in tokenizers[:2]], (tokenizers[0].quantizer.codes, ids), (tokenizers[0].quantizer.nearest, real),
             (lfq.quantize, torch.randn(5, 7, 6)), (lfq.codes, some, 6), (lfq.entropy_of_mean, torch.randn(7, 6), 0.1),
             (flow.forward, real), (flow.inverse, real), (gmm.mixture, h), (gmm.log_prob, h, x), (gmm.loss, h, x), (gmm.sample, h),
             (diffusion.loss, h, x), (diffusion.sample, h), (ar.head.loss, h, some), (ar.head.sample, h),
             (ar.hidden, ids, labels), (ar.logits, ids, labels), (ar.sample, labels), (ar.beam_search, labels, 2, 2),
             (mg.hidden, ids, labels, mask), (mg.logits, ids, labels, mask), (mg.sample, labels), (mg.sample_titok, labels),
             (mg.training_mask, 3, "cpu"), (mr.hidden, ids, labels, mask), (mr.sample, labels), (ar_transformer.attention, q, q, q)]
    for f, *inputs in calls:
        before, after = told(f.__doc__)
        given = [tuple(v.shape) for v in inputs if isinstance(v, torch.Tensor)]
        name = getattr(f, "__qualname__", f)
        assert not before or before[:len(given)] == given[:len(before)], f"{name} is given {given}, its docstring says {before}"
        out = f(*inputs)
        out = [tuple(v.shape) for v in (out if isinstance(out, tuple) else (out,)) if isinstance(v, torch.Tensor)]
        if "each" in f.__doc__.split("\n\n")[0]:
            after = after[:1] * len(out)
        assert after[:len(out)] == out, f"{name} gives {out}, its docstring says {after}"


def test_readme_tells_the_length_of_every_file():
    told_lines = dict(re.findall(r"\| `(\w+\.py)` \|[^|]*\| (\d+) \|", (ROOT / "README.md").read_text()))
    assert len(told_lines) == len(MODELS) + 1
    for name, n in told_lines.items():
        true = (ROOT / name).read_text().count("\n")
        assert abs(true - int(n)) <= 0.05 * true, f"{name} has {true} lines, README says {n}"


def test_weights_are_loaded_without_running_code():
    for path in ROOT.glob("*.py"):
        for call_ in re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", path.read_text()):
            assert "weights_only=True" in call_ or path.name == "test_all.py", (path.name, call_)
