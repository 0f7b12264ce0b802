"""
Every path of the programs on a GPU that is not there (tests/pretend_gpu.py): no tensor meets one of another
device, a training step waits for nothing, and drawing waits once for each batch of images.

PER_BATCH and ONCE are all the places where drawing waits. A new one fails the tests until it is listed.
"""
import ast
import contextlib
import inspect
import json
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import ar_transformer
import data
import evaluate
import gmm_head
import sample
import train
import vae
from common import drawing, runs
from experiments import benchmark, mar_sampling
from tests.helpers import MODELS, PROGRAMS, ROOT
from tests.pretend_gpu import pretend_gpu
from tests.small_world import small_world

PER_BATCH = {                                               # (what, file, function): why
    ("cpu", "common/drawing.py", "draw_samples"): "the finished images",
    ("bool", "common/drawing.py", "refuse_not_finite"): "are all numbers finite? Asked after the images",
    ("tolist", "mar.py", "MAR.sample"): "how many tokens are given? That decides the shapes",
}
ONCE = {
    ("tensor", "maskgit.py", "halton_rank"): "the order of a grid, which is kept",
}
STEPS = 4                                                   # the first and the last are logged


# ---- What is counted

def place(wait):
    """(what, file, function, line) -> (what, file, function), without the names of comprehensions."""
    what, file, function, _ = wait
    return what, file, function.split(".<locals>")[0]


def places(waits):
    found = Counter()
    for wait, n in waits.items():
        found[place(wait)] += n
    return found


@contextlib.contextmanager
def watched():
    """Inside the block a GPU is pretended. -> its counters, with .steps, the waits of each training step that
    is not logged, and .drawn, those of each call of drawing.draw_samples: [(batches decoded, waits), ...].
    """
    with small_world() as patch, pretend_gpu() as gpu:
        gpu.steps, gpu.drawn, begun = [], [], []
        order = data.order
        draw = drawing.draw_samples

        def order_in_fit(n, batch_size, step, seed=0):
            if sys._getframe(1).f_globals["__name__"] == "train":          # not of the classifier
                if step > 1:                                # from the begin of the last step to that of this
                    gpu.steps.append(gpu.waits - begun[-1])
                begun.append(gpu.waits.copy())
            return order(n, batch_size, step, seed)

        def draw_and_count(run, cond, *args, **options):
            assert run.device == next(run.generator.parameters()).device == torch.device("cuda", 0)
            asked = inspect.signature(draw).bind(run, cond, *args, **options)
            asked.apply_defaults()
            at_once = max(1, asked.arguments["batch_size"] // run.args.frames)        # clips take more memory
            batches = sum(-(-len(b) // at_once) for b in cond.split(asked.arguments["batch_size"]))
            before = gpu.waits.copy()
            images = draw(run, cond, *args, **options)
            assert images.device == torch.device("cpu") and images.isfinite().all()
            gpu.drawn.append((batches, gpu.waits - before))
            return images

        patch.setattr(data, "order", order_in_fit)
        patch.setattr(drawing, "draw_samples", draw_and_count)
        yield gpu


def trained(folder, *words):
    """train.main on the pretended GPU -> its counters. Each of the training steps waits for nothing."""
    with watched() as gpu:
        size = "dot-vae" if "titok-vae" in words else "dot"
        tok_steps = [] if "patches" in words else ["--tok_steps", str(STEPS)]         # without a stage 1
        train.main(["--runs", str(folder), "--device", "cuda", "--no-compile", "--tok_size", size, "--size",
                    "dot", "--image_size", "8", "--n_shapes", "24", *tok_steps, "--steps", str(STEPS),
                    "--tok_batch_size", "4", "--batch_size", "4", *words])
    expected = 0 if "patches" in words and "none" in words else STEPS - 2
    assert len(gpu.steps) == expected, "no stage, or more than one, was trained"
    for waits in gpu.steps:
        assert not waits, f"a training step waits for the GPU: {dict(waits)}"
    check_drawing(gpu)
    return gpu


def check_drawing(gpu):
    """Each call of draw_samples waited where PER_BATCH and ONCE allow it, and not more often."""
    for batches, waits in gpu.drawn:
        for where, n in places(waits).items():
            assert where in PER_BATCH or where in ONCE, f"drawing waits: {dict(waits)}"
            allowed = batches if where in PER_BATCH else 1
            assert n <= allowed, f"drawing waits more often than in each of {batches} batches: {dict(waits)}"
    assert not gpu.doubles, f"float64 on the device, which MPS has not: {dict(gpu.doubles)}"


def drew(folder, *words, out="x.png"):
    """sample.main on the pretended GPU, two batches of 3, all pictures and files in the run folder."""
    with watched() as gpu:
        sample.main([str(folder), "--device", "cuda", "--n", "6", "--batch_size", "3", "--out",
                     str(folder / out), *map(str, words)])
    assert gpu.drawn, "nothing was drawn"
    check_drawing(gpu)


def measured(folder, *words):
    """evaluate.main on the pretended GPU -> metrics.json."""
    with watched() as gpu:
        evaluate.main([str(folder), "--device", "cuda", "--n", "20", "--batch_size", "12", *words])
    check_drawing(gpu)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["machine"] == "no GPU at all" and metrics["device"] == "cuda:0"
    return metrics


# ---- Stage 1

TOKENIZERS = {
    "vae": ["--tokenizer", "vae"],
    "vq": ["--tokenizer", "vq", "--head", "categorical"],
    "lfq": ["--tokenizer", "lfq", "--head", "categorical"],
    "titok": ["--tokenizer", "titok", "--tokens", "4", "--head", "categorical"],
    "titok-vae": ["--tokenizer", "titok-vae", "--tokens", "4"],
    "msvq": ["--tokenizer", "msvq", "--head", "categorical"],
    "patches": ["--tokenizer", "patches"],
    "clips": ["--tokenizer", "lfq", "--frames", "5", "--head", "categorical"],
}


@pytest.fixture(scope="session")
def gpu_runs(tmp_path_factory):
    """A function: name of a tokenizer, words for its generator -> run folder, trained once on a pretended
    GPU. Without words it is that of the tokenizer.
    """
    root = tmp_path_factory.mktemp("gpu")
    done = set()

    def run_with(tokenizer, *words):
        folder = root / tokenizer                           # of the runs of this tokenizer
        name = "-".join(word.removeprefix("--") for word in words) or "none"
        if words and not (folder / "tok").exists():
            run_with(tokenizer)
        if (tokenizer, name) not in done:
            done.add((tokenizer, name))
            trained(folder, *TOKENIZERS[tokenizer], *(words or ["--generator", "none"]), "--name", name,
                    "--tok_name", "tok")
        return folder / (name if words else "tok")
    return run_with


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_trains_on_a_gpu(name, gpu_runs):
    assert (gpu_runs(name) / "ckpt.pt").exists()


@pytest.mark.parametrize("words", [
    ["--tokenizer", "vq", "--codebook", "plain"], ["--tokenizer", "lfq", "--codebook", "fsq"],
    ["--tokenizer", "lfq", "--codebook", "bsq"],
    ["--tokenizer", "vae", "--gan", "0.5", "--perceptual", "1", "--flip"]], ids=" ".join)
def test_an_option_of_a_tokenizer_trains_on_a_gpu(words, tmp_path):
    trained(tmp_path, *words, "--generator", "none")


@pytest.mark.parametrize("tokenizer, own", [
    ("vae", dict(token_dim=4, ch_mult=(1, 1))),
    ("vq", dict(vocab_size=16, code_dim=4, z_channels=8, ch_mult=(1,)))])
def test_the_linear_path_of_photographs_starts_on_a_gpu(tokenizer, own, tmp_path, monkeypatch):
    size = dict(stem=4, ch=8, n_res=1, groups=4, linear=True)
    monkeypatch.setitem(runs.TOKENIZERS[tokenizer][1], "photo", size | own)
    codebook = ["--codebook", "ema"] if tokenizer == "vq" else []
    trained(tmp_path, "--tokenizer", tokenizer, "--generator", "none", "--tok_size", "photo", *codebook)


# ---- Stage 2: the tokenizers, generators and heads that go together

GENERATORS = [["ar"], ["maskgit"], ["mar"], ["mar", "--attention", "causal"]]
HEADS = [["gmm"], ["diffusion"], ["diffusion", "--objective", "flow"], ["categorical"],
         ["categorical", "--groups", "2"]]


def pairs():
    """(tokenizer, words): with vae and vq all generators and heads that runs.REFUSALS lets pass, with the
    others each generator and each head once, for a generator sees of a tokenizer only T and D or V.
    """
    found = [("vae", ["--adapter", "flow"]), ("vae", ["--generator", "mar", "--order", "raster"]),
             ("vae", ["--generator", "mar", "--attention", "causal", "--order", "annealed"]),
             ("patches", ["--generator", "mar", "--head", "diffusion"])]
    for tokenizer in TOKENIZERS:
        whole = [(generator, head) for generator in GENERATORS for head in HEADS]
        once = [(generator, head) for generator in GENERATORS[:3] for head in (HEADS[0], HEADS[3])]
        once += [(["ar"], HEADS[1]), (["ar"], HEADS[4])]
        if tokenizer == "msvq":
            once = [(["var"], HEADS[3])]
        if tokenizer == "clips":
            once = once[1:4:2]                              # ar and maskgit
        for generator, head in whole if tokenizer in ("vae", "vq") else once:
            words = ["--generator", *generator, "--head", *head]
            if goes_together(tokenizer, words):
                found.append((tokenizer, words))
    return found


def goes_together(tokenizer, words):
    given = train.parse_args([*TOKENIZERS[tokenizer], *words])
    tok_size = next(iter(runs.TOKENIZERS[given.tokenizer][1]))
    default = runs.defaults_of(given, torch.device("cpu")) | dict(size="small", tok_size=tok_size)
    args = SimpleNamespace(**default | {name: v for name, v in vars(given).items() if v is not None})
    return not any(asked(args) and not needed(args) for asked, needed, _ in runs.REFUSALS)


@pytest.mark.parametrize("tokenizer, words", pairs(), ids=lambda value: value if isinstance(value, str) else
                         " ".join(word.removeprefix("--") for word in value[1:]))
def test_a_generator_trains_and_draws_on_a_gpu(tokenizer, words, gpu_runs):
    """train.py's own code: steps that wait for nothing, and the samples at the end."""
    assert (gpu_runs(tokenizer, *words) / "ckpt.pt").exists()


# ---- Drawing and measuring

VAE_AR = ("vae", "--generator", "ar", "--head", "gmm")
VAE_DIFFUSION = ("vae", "--generator", "ar", "--head", "diffusion")
VAE_FLOW = ("vae", "--generator", "ar", "--head", "diffusion", "--objective", "flow")
VAE_MAR = ("vae", "--generator", "mar", "--head", "diffusion")
VAE_CAUSAL = ("vae", "--generator", "mar", "--attention", "causal", "--head", "gmm")
VQ_AR = ("vq", "--generator", "ar", "--head", "categorical")
VQ_MASKGIT = ("vq", "--generator", "maskgit", "--head", "categorical")
VQ_MAR = ("vq", "--generator", "mar", "--head", "categorical")
MSVQ_VAR = ("msvq", "--generator", "var", "--head", "categorical")
CAPTIONS = ("vq", "--condition", "text")
CAPTIONS_MASKGIT = (*VQ_MASKGIT, "--condition", "text")
CAPTIONS_MAR = (*VAE_MAR, "--condition", "text")
CAPTIONS_CAUSAL = (*VAE_CAUSAL, "--condition", "text")
CLIPS_MASKGIT = ("clips", "--generator", "maskgit", "--head", "categorical")


@pytest.mark.parametrize("run, words", [
    (VAE_AR, ["--gif", "--npz", "x.npz", "--png", "pngs"]),
    (VAE_AR, ["--guidance", "closed", "--top_p", "0.8"]),
    (VAE_AR, ["--guidance", "rejection", "--clip", "2"]), (VAE_AR, ["--guidance", "official"]),
    (VAE_AR, ["--beam", "2", "--fan", "3"]), (VAE_AR, ["--cfg", "2", "--cfg_interval", "1"]),
    (VAE_AR, ["--temperature", "0"]), (VAE_AR, ["--dtype", "bf16"]),
    (VQ_AR, ["--top_k", "3", "--top_p", "0.9"]), (VQ_AR, ["--beam", "2", "--fan", "3"]),
    (VAE_DIFFUSION, ["--sampler", "ddim"]), (VAE_DIFFUSION, ["--spacing", "official"]),
    (VAE_FLOW, ["--sampler", "euler"]), (VAE_MAR, ["--diffusion_steps", "3:1", "--cfg_schedule", "linear"]),
    (VAE_MAR, ["--encode_every", "3"]), (MSVQ_VAR, ["--gif", "--top_k", "3", "--cfg_schedule", "constant"]),
    (VQ_MASKGIT, ["--order", "halton"]), (VQ_MASKGIT, ["--schedule", "arccos", "--choice_temperature", "1"]),
    *[(run, ["--prompt", "a star", "a ring"])
      for run in (CAPTIONS, CAPTIONS_MASKGIT, CAPTIONS_MAR, CAPTIONS_CAUSAL)], (CLIPS_MASKGIT, ["--gif"]),
    (CLIPS_MASKGIT, ["--known_frames", "1", "--gif"])], ids=lambda value: "-".join(value).replace("--", ""))
def test_drawing_on_a_gpu_waits_once_for_each_batch(run, words, gpu_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drew(gpu_runs(*run), *words)


@pytest.mark.parametrize("run", [VAE_AR, VAE_DIFFUSION, VAE_MAR, VAE_CAUSAL, VQ_AR, VQ_MASKGIT, VQ_MAR,
                                 MSVQ_VAR],
                         ids="-".join)
def test_editing_on_a_gpu_waits_once_for_each_batch(run, gpu_runs, tmp_path):
    Image.new("RGB", (20, 12), (200, 30, 30)).save(tmp_path / "p.png")
    drew(gpu_runs(*run), "--image", tmp_path / "p.png", "--mask", "right")


@pytest.mark.parametrize("run", [("vq",), VAE_AR, VAE_MAR, VQ_MASKGIT, MSVQ_VAR, CAPTIONS, CLIPS_MASKGIT],
                         ids="-".join)
def test_a_run_is_measured_on_a_gpu(run, gpu_runs):
    metrics = measured(gpu_runs(*run))
    name = "caption_shape" if run == CAPTIONS else "sample_frechet_small_cnn" if run[1:] else "recon_psnr_db"
    assert name in metrics


@pytest.mark.parametrize("run", [VAE_AR, VAE_MAR, VQ_MASKGIT, MSVQ_VAR], ids="-".join)
def test_what_is_compiled_draws_on_a_gpu(run, gpu_runs, monkeypatch):
    """As with --compile, but that functions stay as they are: padded rows, MAR's ranges, static caches."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    drew(gpu_runs(*run), "--compile")


def test_mar_in_few_shapes_trains_on_a_gpu(gpu_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    root = gpu_runs("vae").parent.parent
    trained(root, *TOKENIZERS["vae"], *VAE_MAR[1:], "--tok_name", "vae/tok", "--name", str(tmp_path / "x"),
            "--compile")


def test_a_prefix_of_vectors_is_read_on_a_gpu_without_a_wait():
    """What recipes/pairs.py conditions on: the tokens of another image."""
    with pretend_gpu() as gpu:
        model = ar_transformer.ARTransformer(gmm_head.GMMHead(32, 4), 4, 1, 4, n_layer=1, n_head=2, n_embd=32,
                                             prefix=(4, 3)).to("cuda")
        tokens, cond = (torch.randn(2, 4, n, device="cuda") for n in (4, 3))
        before = gpu.waits.copy()                           # those of moving the model there
        model(tokens, cond)[0].backward()
        model.eval().sample(cond, cfg=2.0)
        model.beam_search(cond, 2, 3)
        assert gpu.waits == before and not gpu.doubles


# ---- Every factory call names a device

FACTORIES = {"arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn",
             "randperm", "tensor", "zeros", "tril_indices", "triu_indices"}
BUILT = {                                                   # called while a model is built, and moved then
    ("titok.py", "learned"), ("titok.py", "sines"), ("ar_transformer.py", "rope_table"),
}


def factory_calls(path):
    """(function, line) of each torch.factory(...) without device=, outside __init__ and demos."""
    source = path.read_text()
    demo = source[:source.find("\n# ---- Demo")].count("\n") if "\n# ---- Demo" in source else 10 ** 6
    found = []

    def visit(node, function):
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.lineno < demo:
            named = getattr(node.func.value, "id", "") == "torch" and node.func.attr in FACTORIES
            keywords = {word.arg for word in node.keywords}
            if named and function != "__init__" and not keywords & {"device", "generator"}:
                found.append((function, node.lineno))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source), "")
    return found


@pytest.mark.parametrize("path", [*(ROOT / f"{name}.py" for name in MODELS + PROGRAMS),
                                  *sorted((ROOT / "common").glob("*.py"))], ids=lambda path: path.stem)
def test_every_factory_call_names_a_device(path):
    found = [(function, line) for function, line in factory_calls(path) if (path.name, function) not in BUILT]
    assert not found, f"{path.name}: torch makes a tensor on the CPU in {found}"


def test_a_factory_call_without_a_device_is_found(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("import torch\n\ndef f(x):\n    y = torch.zeros(3, device=x.device)\n"
                    "    return y + torch.arange(3)\n")
    assert factory_calls(path) == [("f", 5)]


# ---- Faults on purpose: each kind is seen

def test_an_operand_on_the_cpu_is_refused(gpu_runs, monkeypatch):
    folder = gpu_runs(*VAE_AR)
    prefix = ar_transformer.ARTransformer.prefix
    monkeypatch.setattr(ar_transformer.ARTransformer, "prefix",
                        lambda self, *cond: prefix(self, *cond) + torch.arange(32))
    with pytest.raises(RuntimeError, match="at least two devices, cuda:0 and cpu"):
        drew(folder)


def test_a_wait_in_a_training_step_is_seen(gpu_runs, tmp_path, monkeypatch):
    forward = vae.VAE.forward

    def looks(self, images, labels=None):
        loss, logs = forward(self, images)
        return loss, logs | dict(big=logs["mse"].new_full((), logs["mse"].item() > 1))
    monkeypatch.setattr(vae.VAE, "forward", looks)
    with pytest.raises(AssertionError, match=r"training step waits .*'item', 'tests/test_devices.py'"):
        trained(tmp_path, *TOKENIZERS["vae"], "--generator", "none")


def test_a_blocking_copy_in_a_training_step_is_seen(tmp_path, monkeypatch):
    batch = data.ImageSet.batch

    def blocks(self, index, share=slice(None)):
        return batch(self, index, share)[0], self.labels[index[share].to(self.device)]
    monkeypatch.setattr(data.ImageSet, "batch", blocks)
    with pytest.raises(AssertionError, match=r"training step waits .*'to', 'tests/test_devices.py'"):
        trained(tmp_path, *TOKENIZERS["vae"], "--generator", "none")


def test_a_wait_for_each_token_is_seen(gpu_runs, monkeypatch):
    draw = gmm_head.GMMHead.sample

    def looks(self, *args, **options):
        x, log_p = draw(self, *args, **options)
        return (x, log_p) if bool((log_p < 100).all()) else (x.clamp(-1, 1), log_p)
    folder = gpu_runs(*VAE_AR)
    monkeypatch.setattr(gmm_head.GMMHead, "sample", looks)
    with pytest.raises(AssertionError, match="drawing waits"):
        drew(folder)


def test_float64_on_the_device_is_seen(tmp_path, monkeypatch):
    measure = vae.VAE.measure
    monkeypatch.setattr(vae.VAE, "measure", lambda self, mean, std: measure(self, mean.double(), std))
    with pytest.raises(AssertionError, match="float64 on the device"):
        trained(tmp_path, *TOKENIZERS["vae"], "--generator", "none")


def test_a_device_without_its_number_is_seen(gpu_runs, monkeypatch):
    """The pick_device of the first edition, with which no first step on a GPU ran."""
    folder = gpu_runs(*VAE_AR)
    monkeypatch.setattr(runs, "pick_device", lambda name=None: torch.device(name or "cuda"))
    with pytest.raises(AssertionError, match="type='cuda'"):
        drew(folder)


def test_the_first_step_on_a_gpu_failed_when_devices_were_compared(tmp_path, monkeypatch):
    """With that pick_device and images whose device was compared with it, they were pinned on the GPU."""
    begin = data.ImageSet.__init__

    def compares(self, images, labels, classes, device, *args, **options):
        begin(self, images, labels, classes, device, *args, **options)
        self.beside_labels = images.device == device
    monkeypatch.setattr(data.ImageSet, "__init__", compares)
    monkeypatch.setattr(runs, "pick_device", lambda name=None: torch.device(name or "cuda"))
    with pytest.raises(RuntimeError, match="cannot pin"):
        trained(tmp_path, *TOKENIZERS["vae"], "--generator", "none")


# ---- Experiments

def test_the_benchmark_runs_to_its_end_on_a_gpu(tmp_path, monkeypatch):
    """Its numbers mean nothing here. Nothing is compiled: torch.compile gives back what it gets."""
    small = "--tok_size dot --size dot --image_size 8 --tok_batch_size 4 --batch_size 4"
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(benchmark, "SYSTEMS", [
        ("tokenizer", "cuda", 10, f"--tokenizer vae --generator none {small}"),
        ("givt", "cuda", 10, f"--tokenizer vae --head gmm {small}")])
    monkeypatch.setattr(benchmark, "BATCHES", (1, 2))
    monkeypatch.setattr(benchmark, "AT_ONCE", dict(cuda=1))
    monkeypatch.setattr(benchmark, "MATMUL", dict(cuda=32))
    monkeypatch.setattr(benchmark, "COPY", dict(cuda=64))
    with small_world(), pretend_gpu():
        benchmark.main(["--quick", "--out", str(tmp_path / "x.json")])
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["machine"] == "no GPU at all" and found["device"] == "cuda"
    assert [row["system"] for row in found["systems"]] == ["tokenizer", "givt"]
    assert all(row["step_ms"] > 0 and row["dtype"] == "bf16" for row in found["systems"])


def test_mar_sampling_runs_to_its_end_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    with pretend_gpu():
        mar_sampling.main(["--quick", "--rounds", "1", "--batches", "2", "--out", str(tmp_path / "x.json")])
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["way"] for row in rows] == ["plain", "compiled"]
