"""
What torch.compile makes of each model: how many graphs, no break in them, and the same numbers.

The graphs are counted by a backend that runs them as they are, on a CPU. What a GPU compiler makes of them
is not seen here.
"""
import argparse
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters, get_compilation_metrics

import ar_transformer
import diffusion_head
import evaluate
import lfq
import mar
import maskgit
import sample
import train
import vae
import var
import vq
from common import averages, compiling, drawing, runs
from data import BadInput
from tests.small_world import small_world


SIDE = 4                                                    # of the images, in pixels


class Graphs:
    """A backend of torch.compile that keeps the graphs, and runs them."""

    def __init__(self):
        self.made = []

    def __call__(self, module, inputs):
        self.made.append(module)
        return module.forward


@pytest.fixture
def graphs():
    """A fresh compiler that counts its graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.clear_compilation_metrics()
    counters.clear()
    yield Graphs()
    torch._dynamo.reset()


def reasons():
    """Why something was compiled again -> list of str."""
    return [m.recompile_reason for m in get_compilation_metrics() if m.recompile_reason]


def resolved(*words):
    """Words of train.py -> args with every default, of the small world where they say nothing."""
    given = train.parse_args([*words, "--device", "cpu"])
    titok = given.tokenizer.startswith("titok")
    beta = None if given.tokenizer == "patches" or given.codebook == "fsq" else 0.1
    small = dict(tok_size="dot-vae" if given.tokenizer == "titok-vae" else "dot", size="dot", image_size=SIDE,
                 tokens=4 if titok else None, text_len=9)
    named = {name: value for name, value in vars(given).items() if value is not None}
    codebook = "ema" if given.tokenizer == "msvq" else "l2-ema"
    return argparse.Namespace(**runs.DEFAULTS["any"] | dict(codebook=codebook, beta=beta) | small | named)


def built(*words):
    """-> tokenizer, generator or None, as train.py builds them of these words, with random weights."""
    with small_world() as patch:
        for sizes in (vae.SIZES, vq.SIZES, lfq.SIZES, var.TOK_SIZES):
            patch.setitem(sizes, "dot", sizes["dot"] | dict(ch_mult=(1, 1)))
        for module in (ar_transformer, maskgit, var):
            patch.setitem(module.SIZES, "dot", dict(n_layer=1, n_head=2, n_embd=32))
        patch.setitem(mar.SIZES, "dot", mar.SIZES["dot"] | dict(mask_min=0.0, mask_std=9.0))
        args = resolved(*words)
        torch.manual_seed(0)
        tokenizer = runs.build_tokenizer(args)
        if args.generator == "none":
            return tokenizer, None
        return tokenizer, runs.build_generator(args, tokenizer, 10)


def batch_of(tokenizer, generator, B, text=False):
    """Random x and cond as train.py has them in a step: images, or tokens and labels or captions."""
    labels = torch.randint(10, (B,))
    if generator is None:
        return 2 * torch.rand(B, 3, SIDE, SIDE) - 1, labels
    T, D, V = tokenizer.seq_len, tokenizer.token_dim, tokenizer.vocab_size
    x = torch.randint(V, (B, T)) if V else torch.randn(B, T, D)
    return x, torch.randint(1, 256, (B, 9), dtype=torch.uint8) if text else labels


# ---- Training

# Words of train.py: graphs in 12 steps, and why there are more than one.
TRAINING = {
    "--tokenizer vae --generator none": 1,
    "--tokenizer vq --generator none": 1,
    "--tokenizer vq --generator none --tok_size patches": 1,
    "--tokenizer lfq --generator none": 1,
    "--tokenizer lfq --codebook fsq --generator none": 1,
    "--tokenizer lfq --codebook bsq --generator none": 1,
    "--tokenizer titok --generator none": 1,
    "--tokenizer titok-vae --generator none": 1,
    "--tokenizer msvq --generator none": 1,
    "--tokenizer patches --head gmm": 1,
    "--tokenizer vae --head gmm": 1,
    "--tokenizer vae --head diffusion": 1,
    "--tokenizer vae --head diffusion --objective flow": 1,
    "--tokenizer vae --adapter flow": 1,
    "--tokenizer vq --head categorical": 1,
    "--tokenizer vq --head categorical --groups 2": 1,
    "--tokenizer vq --head categorical --condition text": 1,
    "--tokenizer vae --generator maskgit --head gmm": 1,
    "--tokenizer vq --generator maskgit --head categorical": 1,
    "--tokenizer vae --generator mar --head gmm": 4,        # the ranges of the number of masked tokens
    "--tokenizer vae --generator mar --attention causal --head gmm": 1,
    "--tokenizer vq --generator maskgit --head categorical --condition text": 1,
    "--tokenizer vae --generator mar --head gmm --condition text": 4,
    "--tokenizer msvq --generator var": 1,
    "--tokenizer vae --generator mar --attention causal --order annealed --head gmm": 1,
}


@pytest.mark.parametrize("words", TRAINING)
def test_twelve_training_steps_and_a_validation_make_as_many_graphs_as_listed(words, graphs):
    tokenizer, generator = built(*words.split())
    raw = tokenizer if generator is None else generator
    ema = averages.Averages(raw, 0.9)                       # as in train.fit: copied before it is compiled
    model = compiling.for_training(raw, backend=graphs)
    for step in range(12):
        torch.manual_seed(step)
        if hasattr(raw, "anneal"):
            raw.anneal(step / 12)
        loss, logs = model(*batch_of(tokenizer, generator, 4, "--condition text" in words))
        loss.backward()
        for value in logs.values():
            value.detach()
    ema.update_parameters(raw)
    with torch.no_grad():
        ema.module.eval()(*batch_of(tokenizer, generator, 7, "--condition text" in words))
    assert len(graphs.made) == TRAINING[words]
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert len(reasons()) == TRAINING[words] - 1, reasons()


def test_a_number_read_in_a_step_is_seen_as_a_break(graphs, monkeypatch):
    tokenizer, generator = built("--tokenizer", "vq", "--generator", "maskgit", "--head", "categorical")
    mask = maskgit.MaskGIT.training_mask
    monkeypatch.setattr(maskgit.MaskGIT, "training_mask",
                        lambda self, B, device: mask(self, B, device) | (float(torch.rand(())) < 0.0))
    model = compiling.for_training(generator, backend=graphs)
    model(*batch_of(tokenizer, generator, 4))[0].backward()
    assert counters["graph_break"] and len(graphs.made) > 1


def test_mar_behind_a_flow_adapter_is_two_graphs_without_a_break(graphs):
    """The adapter and, of one range, the loss: the number of masked tokens is drawn between them."""
    tokenizer, generator = built("--tokenizer", "vae", "--generator", "mar", "--adapter", "flow")
    generator.generator.mask_count = lambda: 3
    model = compiling.for_training(generator, backend=graphs)
    for _ in range(3):
        model(*batch_of(tokenizer, generator, 4))[0].backward()
    assert len(graphs.made) == 2 and not counters["graph_break"] and not reasons()


def test_train_compiles_the_model_in_this_way(graphs, tmp_path, monkeypatch):
    """train.main itself: of 4 tokens MAR masks 3 or 4, and its validation compiles nothing."""
    for_training = compiling.for_training
    monkeypatch.setattr(compiling, "for_training", lambda model: for_training(model, backend=graphs))
    words = ["--runs", str(tmp_path), "--device", "cpu", "--dtype", "fp32", "--tok_size", "dot-vae", "--size",
             "dot", "--image_size", "8", "--n_shapes", "24", "--tok_steps", "2", "--tok_batch_size", "4",
             "--batch_size", "4", "--tokenizer", "titok-vae", "--tokens", "4"]
    with small_world():
        train.main([*words, "--generator", "none"])
        train.main([*words, "--generator", "mar", "--head", "gmm", "--steps", "12", "--eval_every", "6",
                    "--compile"])
    assert len(graphs.made) == 2 and not counters["graph_break"]
    assert {m.co_name for m in get_compilation_metrics()} == {"masked_loss"}


# ---- Drawing

def run_of(*words):
    """An untrained run in the small world, whose zeros have become random numbers."""
    tokenizer, generator = built(*words)
    for p in generator.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    args = resolved(*words)
    return SimpleNamespace(folder="runs/x", args=args, tokenizer=tokenizer.eval(), generator=generator.eval(),
                           classes=[str(k) for k in range(10)], device=torch.device("cpu"))


# Words of train.py: sizes of the batches, graphs.
DRAWING = {
    "--tokenizer vae --head gmm": (3, 2),                   # batches of 3, 3, 2: a graph per number of rows
    "--tokenizer vq --generator maskgit --head categorical": (4, 1),
    "--tokenizer msvq --generator var": (4, 2),             # scales of 1 x 1 and 2 x 2
    "--tokenizer vae --generator mar --head gmm": (4, 3),   # 4 tokens are 3 ranges, more of them 4
    "--tokenizer vae --head diffusion": (3, 2 + 2),         # in the head 4 and 2 rows
    "--tokenizer vae --head diffusion --objective flow": (4, 1 + 1),
}


@pytest.mark.parametrize("words", DRAWING)
def test_compiled_drawing_gives_the_same_samples_in_few_graphs(words, graphs):
    run = run_of(*words.split())
    batch_size, n_graphs = DRAWING[words]
    draw = {}
    for way in ("plain", "compiled"):
        if way == "compiled":
            compiling.for_drawing(run, backend=graphs)
        draw[way] = drawing.draw_samples(run, torch.arange(8), batch_size=batch_size, cfg=2.0)
    assert torch.allclose(draw["plain"], draw["compiled"], atol=1e-5)
    assert len(graphs.made) == n_graphs and not counters["graph_break"]
    drawing.draw_samples(run, torch.arange(8), batch_size=batch_size, cfg=3.0, seed=1)
    assert len(graphs.made) == n_graphs, "another guidance or other images made new graphs"


def test_mar_draws_any_number_of_tokens_with_few_graphs_of_its_head(graphs):
    """1, 3, 4 and 2 tokens in a pass, two images: 2, 6, 8, 4 rows in graphs for 2, 4 and 8."""
    torch.manual_seed(0)
    head = diffusion_head.DiffusionHead(32, 3, 16, 1).eval()
    torch.nn.init.normal_(head.net.final_layer.linear.weight, std=0.1)
    h = torch.randn(2, 2, 4, 32)
    plain = {}
    for compiled in (False, True):
        if compiled:
            compiling.for_drawing(SimpleNamespace(generator=SimpleNamespace(head=head), folder="x"), graphs)
        for n in (1, 3, 4, 2):
            torch.manual_seed(n)
            x, _ = head.sample(h[0, :, :n], h[1, :, :n], cfg=1.5 + n, diffusion_steps=4)
            assert torch.allclose(x, plain.setdefault(n, x), atol=1e-5)
    assert len(graphs.made) == 3


def test_a_step_of_a_token_is_one_graph_with_static_caches_and_nothing_random(graphs):
    run = run_of("--tokenizer", "vq", "--head", "categorical")
    model = run.generator
    cond = torch.arange(3)
    model.sample(cond, cfg=2.0, compile=graphs)
    caches = list(model.static_caches)
    model.sample(cond, cfg=2.0, compile=graphs)
    assert len(graphs.made) == 1, "every step and every call is one graph"
    assert all(a is b for a, b in zip(caches, model.static_caches)), "a CUDA graph writes to fixed addresses"
    assert all(hasattr(cache, "_dynamo_static_input_type") for cache in caches)
    names = {str(node.target) for node in graphs.made[0].graph.nodes if node.op.startswith("call")}
    assert any("scaled_dot_product" in name for name in names)
    assert not [name for name in names if any(word in name for word in ("rand", "multinomial", "bernoulli"))]


def test_what_has_nothing_to_compile_is_refused_in_a_sentence():
    run = run_of("--tokenizer", "vae", "--generator", "mar", "--attention", "causal", "--head", "gmm")
    with pytest.raises(BadInput, match="--compile: runs/x has nothing to compile, .*leave it out"):
        compiling.for_drawing(run)


def test_sample_and_evaluate_compile_what_they_draw_with(graphs, tmp_path, monkeypatch, capsys):
    for_drawing = compiling.for_drawing
    monkeypatch.setattr(compiling, "for_drawing", lambda run: for_drawing(run, backend=graphs))
    with small_world():
        train.main(["--runs", str(tmp_path), "--device", "cpu", "--dtype", "fp32", "--tok_size", "dot",
                    "--size", "dot", "--image_size", "8", "--n_shapes", "24", "--tok_steps", "2", "--steps",
                    "2", "--tok_batch_size", "4", "--batch_size", "4", "--tokenizer", "vae", "--name", "x"])
        words = [str(tmp_path / "x"), "--device", "cpu", "--n", "20", "--batch_size", "10"]
        arrays = []
        for more in ([], ["--compile"]):
            sample.main([*words, "--npz", str(tmp_path / "x.npz"), *more])
            with np.load(tmp_path / "x.npz") as f:
                arrays.append(f["arr_0"].astype(int))
        with pytest.raises(BadInput, match="--compile: the search of --beam is not compiled"):
            sample.main([*words, "--compile", "--beam", "2"])
        assert abs(arrays[0] - arrays[1]).max() <= 1 and len(graphs.made) == 1
        evaluate.main([*words, "--compile"])
    assert capsys.readouterr().out.count("compiling step of a token: about 70 s on a CPU") == 2


# ---- Numbers under autocast and TF32

@pytest.mark.parametrize("words", [words for words in TRAINING if "adapter" not in words])
def test_losses_are_float32_under_autocast(words):
    tokenizer, generator = built(*words.split())
    model = tokenizer if generator is None else generator
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, logs = model(*batch_of(tokenizer, generator, 4, "--condition text" in words))
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    assert all(value.dtype == torch.float32 for value in logs.values())


def tf32(x):
    """x with the 10 bits of mantissa that a tensor core reads under TF32, rounded to nearest."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & -0x2000).view(torch.float32)


def test_tf32_hardly_changes_which_code_is_nearest():
    """"high" precision, which train.py sets, allows TF32 in matrix products. Of 0.5% of the tokens at most
    another code is taken, and it is at most 0.5% farther than the nearest.
    """
    quantizer = vq.VectorQuantizer(1024, 8, True, 0.25, 0.0)
    z = torch.nn.functional.normalize(torch.randn(20_000, 8), dim=-1)
    codes = torch.nn.functional.normalize(quantizer.codebook.detach(), dim=-1)
    exact = torch.cdist(z.double(), codes.double())
    taken = (tf32(z) @ tf32(codes).T).argmax(1)             # of unit length: nearest is the largest product
    least = exact.min(1)
    other = taken != least.indices
    farther = exact.gather(1, taken[:, None])[:, 0] / least.values - 1
    assert 0 < other.float().mean() < 0.005
    assert farther.max() < 0.005
