"""Homework of vq.py: each test grades one function and says what the mistake may be."""
import torch
import torch.nn as nn
from torch import distributions as D

import vq
from homework.kit import check, exercise, gradient


@exercise("vq.VectorQuantizer.distances", points=2)
def test_homework_vq_distances():
    z, codes = torch.randn(6, 3), torch.randn(9, 3)
    check("squared distances", vq.VectorQuantizer.distances(z, codes), ((z[:, None] - codes) ** 2).sum(-1),
          "(N, V): |z|^2 + |e|^2 - 2 z.e, squared, not their root.")


def slow_distances(z, codes):
    return ((z[:, None] - codes) ** 2).sum(-1)


def nearest_by_loop(codes, z):
    """ids (B, T) of the nearest rows of codes (V, D)."""
    nearest = lambda v: min(range(len(codes)), key=lambda k: (codes[k] - v).norm().item())
    return torch.tensor([[nearest(v) for v in row] for row in z])


@exercise("vq.VectorQuantizer.nearest", points=2)
def test_homework_vq_nearest():
    for l2_norm in (False, True):
        quantizer, z = vq.VectorQuantizer(7, 3, l2_norm), torch.randn(2, 5, 3)
        # of all lengths
        quantizer.codebook = nn.Parameter(torch.randn(7, 3) * torch.linspace(0.2, 3, 7)[:, None])
        quantizer.distances = slow_distances
        unit = (lambda x: x / x.norm(dim=-1, keepdim=True)) if l2_norm else (lambda x: x)
        truth = nearest_by_loop(unit(quantizer.codebook.detach()), unit(z))
        ids = quantizer.nearest(z)
        assert ids.shape == (
            2, 5) and ids.dtype == torch.long, f"ids {tuple(ids.shape)} {ids.dtype} are not (2, 5) int64"
        right = (ids == truth).float().mean()
        assert right == 1, f"with l2_norm={l2_norm} {100 * right:.0f}% of the ids are the nearest code's" + \
            (": z and codes are both compared at unit length" if l2_norm else "")


@exercise("vq.VectorQuantizer.forward", points=3)
def test_homework_vq_losses_and_straight_through():
    quantizer, z = vq.VectorQuantizer(7, 3, l2_norm=False,
                                      beta=0.25), torch.randn(2, 5, 3, requires_grad=True)
    nn.init.normal_(quantizer.codebook)
    quantizer.nearest = lambda z: nearest_by_loop(quantizer.codebook.detach(), z.detach())
    quantizer.distances = slow_distances
    q, ids, loss, _ = quantizer(z)
    e, n = quantizer.codebook.detach()[ids], z.numel()
    check("q", q, e, "What goes on has the value of the nearest code.")
    weight = torch.randn_like(z)
    through = gradient((q * weight).sum(), z)
    assert through is not None, "no gradient comes back through q: the encoder would learn nothing (straight-through)"
    check("the gradient that q sends back to z", through, weight, "Straight through: as if q were z.")
    check("the loss", loss, 1.25 * ((z - e) ** 2).mean(),
          "|sg(z) - e|^2 + beta |z - sg(e)|^2, means over tokens and channels.")
    to_z, to_codes = gradient(loss, z), gradient(loss, quantizer.codebook)
    assert to_z is not None and to_codes is not None, "the loss must move both the encoder (commitment) and the codes"
    check("the gradient of the loss for z", to_z, 0.25 * 2 * (z - e) / n,
          "beta, and only beta, weighs the encoder's term.")
    moved = torch.zeros(7, 3).index_add_(0, ids.flatten(), (2 * (e - z) / n).detach().flatten(0, 1))
    check("the gradient of the loss for the codes", to_codes, moved,
          "The codes' own term has weight 1, and z is detached in it.")


@exercise("vq.VectorQuantizer.forward", points=1, hidden=True)
def test_homework_vq_running_averages():
    quantizer, z, calls = vq.VectorQuantizer(7, 3, l2_norm=False,
                                             ema=0.9), torch.randn(2, 5, 3, requires_grad=True), []
    quantizer.nearest = lambda z: torch.arange(10).view(2, 5) % 7
    quantizer.update = lambda z, ids: calls.append((z, ids))
    _, ids, loss, _ = quantizer.train()(z)
    assert len(
        calls) == 1, f"update() is called {len(calls)} times in a training step with ema: once is right"
    assert torch.equal(calls[0][0], z.detach().flatten(0, 1)) and torch.equal(calls[0][1], ids.flatten()), \
        "update(z (N, D), ids (N,))"
    assert not calls[0][0].requires_grad, "the running averages are no part of the graph"
    check("the loss", loss, 0.25 * ((z - quantizer.codebook[ids]) ** 2).mean(),
          "With ema the codes have no loss of their own.")
    assert gradient(loss, z) is not None, "the commitment moves z, and with ema it alone is the loss"
    quantizer.eval()(z)
    assert len(calls) == 1, "in eval mode the codes must stay"


@exercise("vq.VectorQuantizer.entropy_loss", points=2)
def test_homework_vq_entropy():
    quantizer, z = vq.VectorQuantizer(6, 3, l2_norm=False), torch.randn(40, 3)
    nn.init.normal_(quantizer.codebook)
    quantizer.distances = slow_distances
    p = (-slow_distances(z, quantizer.codebook.detach()) / 0.7).softmax(-1)
    entropies, whole = D.Categorical(probs=p).entropy(), D.Categorical(probs=p.mean(0)).entropy()
    check("the entropy loss", quantizer.entropy_loss(z, 0.7),
          entropies.mean() - whole,
          f"The mean entropy of a token, {entropies.mean():.3f}, minus that of the mean, {whole:.3f} nats.",
          1e-3)
