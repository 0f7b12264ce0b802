"""Tests of common/averages.py: the averaged weights against torch's own AveragedModel."""
import torch
import torch.nn as nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from common import averages
from tests.pretend_gpu import pretend_gpu


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


def moved(model, step):
    """The model after one more training step: other weights, other statistics."""
    torch.manual_seed(1 + step)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    model(torch.randn(6, 4))


def test_averages_are_torchs_own_to_the_last_bit():
    model = net()
    ours = averages.Averages(model, 0.9)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(5):
        moved(model, step)
        ours.update_parameters(model)
        theirs.update_parameters(model)
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_an_update_of_the_averages_waits_for_no_gpu():
    """Torch's copies its counter to the GPU in each update, which stands in line behind all kernels."""
    waits = []
    for make in (lambda model: averages.Averages(model, 0.9),
                 lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))):
        with pretend_gpu() as gpu:
            model = net().to("cuda")
            averaged = make(model)
            averaged.update_parameters(model)
            before = gpu.waits.copy()
            averaged.update_parameters(model)
            waits.append(sum((gpu.waits - before).values()))
    assert waits == [0, 1]
