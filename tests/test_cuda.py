"""
On a real GPU: the first steps of every system, the same numbers as on a CPU, and no wait in a step.

They are skipped without one. PRETEND_CUDA=1 runs them on tests/pretend_gpu.py instead, so that a typo here
does not cost the first minutes on a GPU.
"""
import os

import numpy as np
import pytest
import torch

import ar_transformer
import data
import diffusion_head
import evaluate
import gmm_head
import mar
import maskgit
import sample
import train
from common import runs
from tests.pretend_gpu import pretend_gpu
from tests.small_world import small_world

PRETENDED = os.environ.get("PRETEND_CUDA") == "1" and not torch.cuda.is_available()


@pytest.fixture
def cuda(monkeypatch):
    """-> the device. With PRETEND_CUDA=1 it is pretended, and nothing is compiled."""
    if torch.cuda.is_available():
        yield torch.device("cuda", 0)
    elif PRETENDED:
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
        with pretend_gpu():
            yield torch.device("cuda", 0)
    else:
        pytest.skip("no GPU")


def models():
    """{name: (model, tokens, cond)} of small models on the CPU."""
    torch.manual_seed(0)
    size = dict(n_layer=2, n_head=2, n_embd=64)
    vectors, ids, labels = torch.randn(8, 16, 4), torch.randint(32, (8, 16)), torch.arange(8)
    ar = ar_transformer.ARTransformer(gmm_head.GMMHead(64, 4), 16, 10, 4, **size)
    softmax = ar_transformer.CategoricalHead(64, 32)
    llama = ar_transformer.ARTransformer(softmax, 16, 10, vocab_size=32, **size)
    git = maskgit.MaskGIT(maskgit.CategoricalHead(64, 32), 16, 10, vocab_size=32, **size)
    sets = mar.MAR(diffusion_head.DiffusionHead(64, 4, 32, 1), 16, 10, 4, n_buffer=4, **size)
    torch.nn.init.normal_(llama.head.proj.weight)           # it starts at zero
    return dict(ar=(ar, vectors, labels), llama=(llama, ids, labels), maskgit=(git, ids, labels),
                mar=(sets, vectors, labels))


@pytest.mark.cuda
def test_the_drawn_world_is_the_same_on_a_gpu(cuda):
    there = data.draw(torch.arange(20, device=cuda), 16)
    here = data.draw(torch.arange(20), 16)
    assert torch.equal(there[1].cpu(), here[1]) and (there[0].cpu() - here[0]).abs().max() < 1e-3


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["ar", "llama"])
def test_losses_on_a_gpu_are_those_of_a_cpu(name, cuda):
    model, tokens, cond = models()[name]
    model.eval()
    here = model(tokens, cond)[0].item()
    there = model.to(cuda)(tokens.to(cuda), cond.to(cuda))[0].item()
    assert abs(here - there) < 2e-3 * abs(here)


@pytest.mark.cuda
def test_a_cuda_graph_decodes_what_single_kernels_decode(cuda):
    model, _, cond = models()["llama"]
    model = model.eval().to(cuda)
    cond = cond.to(cuda)
    plain = model.sample(cond, cfg=2.0, top_k=1)
    for _ in range(2):                                      # the second call replays
        compiled = model.sample(cond, cfg=2.0, top_k=1, compile=True)
        assert (plain == compiled).float().mean() > 0.9     # near ties may fall the other way


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["ar", "llama", "maskgit", "mar"])
def test_a_step_on_a_gpu_reads_nothing_back(name, cuda):
    """torch.cuda.set_sync_debug_mode turns every wait into an error."""
    model, tokens, cond = models()[name]
    model = model.to(cuda)
    tokens = tokens.to(cuda)
    cond = cond.to(cuda)
    opt = torch.optim.AdamW(model.parameters(), fused=True)
    for step in range(3):
        if step == 1:
            torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss, _ = model(tokens, cond)
            opt.zero_grad(set_to_none=True)
            loss.backward()
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.cuda
@pytest.mark.parametrize("words", [["--head", "gmm"], ["--generator", "mar", "--head", "diffusion"],
                                   ["--generator", "maskgit", "--head", "gmm"]], ids=lambda words: words[-1])
def test_the_programs_run_on_a_gpu_compiled(words, cuda, tmp_path):
    """As a user runs them: bf16 and torch.compile are the defaults on CUDA."""
    with small_world():
        train.main(["--tokenizer", "vae", *words, "--tok_size", "dot", "--size", "dot", "--image_size", "8",
                    "--n_shapes", "24", "--tok_steps", "4", "--steps", "4", "--tok_batch_size", "4",
                    "--batch_size", "4", "--runs", str(tmp_path), "--name", "x"])
        assert runs.load_run(tmp_path / "x", cuda).device == cuda
        for more in ([], ["--compile"]):
            sample.main([str(tmp_path / "x"), "--n", "6", "--batch_size", "3", "--npz", str(tmp_path / "x"),
                         *more])
            with np.load(tmp_path / "x.npz") as f:
                assert f["arr_0"].shape == (6, 8, 8, 3)
        evaluate.main([str(tmp_path / "x"), "--n", "20", "--batch_size", "12"])
    assert "NVIDIA" in (tmp_path / "x" / "metrics.json").read_text() or PRETENDED
