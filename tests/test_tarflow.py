"""Tests of experiments/tarflow.py against exact answers."""
import pytest
import torch
import torch.nn as nn

from experiments import tarflow


@pytest.fixture
def tarflow_of():
    """A function: options of TarFlow -> one of random weights in float64."""
    def built(n_block):
        model = tarflow.TarFlow(5, 3, 4, n_block, 1, n_embd=16, n_head=2).double()
        for block in model.blocks:
            nn.init.normal_(block.out.weight, std=0.1)
            nn.init.normal_(block.out.bias, std=0.2)
        return model
    return built


@pytest.mark.parametrize("n_block", [1, 2, 3])
def test_tarflow_is_undone_by_its_inverse(n_block, tarflow_of):
    model = tarflow_of(n_block)
    x, cond = torch.randn(6, 5, 3).double(), torch.arange(6) % 4
    with torch.no_grad():
        z, _ = model.encode(x, cond)
        assert (model.decode(z, cond) - x).abs().max() < 1e-5
        assert (model.encode(model.decode(x, cond), cond)[0] - x).abs().max() < 1e-5
    assert (z - x).abs().max() > 0.1, "it does something"


@pytest.mark.parametrize("n_block", [1, 2, 3])
def test_tarflow_log_determinant_is_that_of_autograd(n_block, tarflow_of):
    model = tarflow_of(n_block)
    x, cond = torch.randn(1, 5, 3).double(), torch.tensor([2])
    jacobian = torch.autograd.functional.jacobian(lambda v: model.encode(v, cond)[0].flatten(), x)
    truth = torch.linalg.slogdet(jacobian.view(15, 15)).logabsdet
    z, log_det = model.encode(x, cond)
    assert log_det.item() == pytest.approx(truth.item(), abs=1e-5)
    normal = torch.distributions.Normal(0.0, 1.0)
    nats = -(normal.log_prob(z).sum() + truth) / 5
    assert model(x, cond)[0].item() == pytest.approx(nats.item(), abs=1e-5)
    full = (jacobian.view(5, 3, 5, 3).abs().amax((1, 3)) > 1e-7).float().sum().item()
    assert full == (15 if n_block == 1 else 25), "from the second block on every token sees every other"
