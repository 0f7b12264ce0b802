"""Tests of common/muon.py: the stacked optimizer against torch.optim.Muon, which takes one matrix at a
time.
"""
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import train
from common import muon, runs


def matrices():
    """Matrices of three shapes, several of each: square, wide and tall."""
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in [(8, 8), (24, 8), (8, 24), (8, 8), (24, 8)]]


def test_muon_in_stacks_equals_torch_optim_muon_over_20_steps():
    ours = matrices()
    theirs = matrices()
    stacked = muon.Muon(ours, lr=1e-2, weight_decay=0.1)
    single = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(20):
        torch.manual_seed(step)
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        stacked.step()
        single.step()
    for p, q in zip(ours, theirs):
        assert torch.allclose(p, q, atol=1e-6)


@torch.no_grad()
def test_muon_treats_a_kernel_as_the_matrix_of_its_rows():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(6, 4, 3, 3).contiguous(memory_format=torch.channels_last))
    matrix = nn.Parameter(kernel.flatten(1).clone())
    kernel.grad = torch.randn_like(kernel)
    matrix.grad = kernel.grad.flatten(1)
    for p in (kernel, matrix):
        muon.Muon([p], lr=1e-2, weight_decay=0.1).step()
    assert torch.equal(kernel.flatten(1), matrix)
    assert kernel.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_brings_singular_values_near_one(dtype):
    x = torch.randn(3, 16, 40)
    found = muon.orthogonalise(x, dtype=dtype)
    values = torch.linalg.svdvals(found.float())
    assert found.dtype == dtype
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize("native", [True, False])
def test_muon_iterates_in_the_dtype_that_the_processor_multiplies(native, monkeypatch):
    monkeypatch.setattr(runs, "native_bf16", lambda device: native)
    args = SimpleNamespace(optimizer="muon", weight_decay=0.0, device=torch.device("cpu"))
    _, optimizer = train.make_optimizers(nn.Conv2d(2, 2, 3), args, 1e-2)
    assert optimizer.dtype == (torch.bfloat16 if native else torch.float32)
    again = muon.Muon([nn.Parameter(torch.zeros(2, 2, 3, 3))], 1e-2, 0.0, dtype=torch.float32)
    again.load_state_dict(optimizer.state_dict())           # a checkpoint of another machine
    assert again.dtype == torch.float32


def test_muon_counts_kernels_per_shape_and_not_per_matrix():
    def kernels(n):
        params = [nn.Parameter(torch.randn(8, 8)) for _ in range(n)]
        optimizer = muon.Muon(params, lr=1e-2, weight_decay=0.1)
        for p in params:
            p.grad = torch.randn_like(p)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
        return sum(event.count for event in profile.key_averages() if event.key == "aten::baddbmm")
    assert kernels(6) == kernels(2) == 10


def test_muon_goes_on_from_torchs_state():
    """Checkpoints of runs that were trained with torch.optim.Muon can be resumed."""
    ours = matrices()
    theirs = matrices()
    single = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for q in theirs:
        q.grad = torch.ones_like(q)
    single.step()
    stacked = muon.Muon(ours, lr=1e-2, weight_decay=0.1)
    state = single.state_dict()["state"]
    stacked.load_state_dict(dict(state=state, param_groups=stacked.state_dict()["param_groups"]))
    assert torch.equal(stacked.state[ours[0]]["momentum_buffer"], single.state[theirs[0]]["momentum_buffer"])


@torch.no_grad()
def test_muon_in_blocks_of_rows_treats_each_as_a_matrix_of_its_own():
    """Along the longer side, be it rows or columns. A side that rows do not divide stays whole."""
    torch.manual_seed(0)
    for shape, n in (((24, 8), 6), ((8, 24), 6), ((22, 8), 1)):
        p = nn.Parameter(torch.randn(shape))
        p.grad = torch.randn(shape)
        long = shape.index(max(shape))
        parts = [nn.Parameter(part.clone()) for part in p.chunk(n, long)]
        for part, grad in zip(parts, p.grad.chunk(n, long)):
            part.grad = grad.clone()
        muon.Muon([p], lr=1e-2, weight_decay=0.1, rows=4).step()
        muon.Muon(parts, lr=1e-2, weight_decay=0.1, n_steps=3 if n > 1 else 5).step()
        assert torch.allclose(p, torch.cat(list(parts), long), atol=1e-6)


def test_three_iterations_bring_singular_values_from_a_hundredth_of_the_norm_near_one():
    values = torch.logspace(-2, 0, 32)
    left, right = (torch.linalg.qr(torch.randn(32, 32)).Q for _ in range(2))
    norm = values.norm()
    x = left @ torch.diag(values / values.max()) @ right
    found = torch.linalg.svdvals(muon.orthogonalise(norm * x[None], 3).float())
    small = values / norm < 0.01                            # of the matrix divided by its norm
    assert found.max() < 1.35
    assert found[0, :int((~small).sum())].min() > 0.6
