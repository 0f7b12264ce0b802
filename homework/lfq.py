"""Homework of lfq.py: each test grades one function and says what the mistake may be."""
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import distributions as D

import lfq
from homework.kit import check, exercise, gradient


@exercise("lfq.quantize", points=2)
def test_homework_lfq_quantize():
    z = torch.randn(3, 4, 6, requires_grad=True)
    q, index = lfq.quantize(z)
    check("q", q, torch.where(z > 0, 1.0, -1.0), "Only the sign is kept.")
    number = lambda token: sum(2**i for i, v in enumerate(token) if v > 0)
    spelt = lambda z: torch.tensor([[number(token) for token in row] for row in z.tolist()])
    truth, backwards = spelt(z), spelt(z.flip(-1))
    assert index.shape == (3, 4) and index.dtype == torch.long, \
        f"index {tuple(index.shape)} {index.dtype} is not (3, 4) int64"
    assert torch.equal(index, truth), \
        "the bits are read backwards: channel 0 is the LOWEST bit" if torch.equal(index, backwards) \
        else f"index {index[0, 0]} for the signs {q[0, 0].tolist()}: {truth[0, 0]} is right"
    through = gradient((q * torch.arange(6.0)).sum(), z)
    assert through is not None, "no gradient comes back through q: straight-through"
    check("the gradient", through, torch.arange(6.0).expand(3, 4, 6), "It goes straight through, unclipped.")


@exercise("lfq.quantize", points=1, hidden=True)
def test_homework_lfq_quantize_zero():
    q, index = lfq.quantize(torch.tensor([0.0, 1.0, -0.0]))
    assert q.tolist() == [
        -1, 1, -1
    ] and index.item() == 2, f"signs {q.tolist()}, index {index.item()}: a z of 0 becomes -1"


@exercise("lfq.codes", points=2)
def test_homework_lfq_codes():
    index = torch.randint(64, (3, 4))
    truth = torch.tensor([[[1.0 if i >> bit & 1 else -1.0 for bit in range(6)] for i in row]
                          for row in index.tolist()])
    check("codes", lfq.codes(index, 6), truth, "-1 and +1, the lowest bit first.")
    assert lfq.codes(index, 6).dtype == torch.float32, f"codes are float32, not {lfq.codes(index, 6).dtype}"


@exercise("lfq.entropy_penalty", points=3)
def test_homework_lfq_entropy():
    z, words = torch.randn(30, 6) * 0.3, torch.tensor([[1.0 if i >> b & 1 else -1.0 for b in range(6)]
                                                       for i in range(64)])
    softly = lambda z, words, tau: (2 / tau * z @ words.T).softmax(-1)
    whole = lambda z, tau: D.Categorical(probs=softly(z, words[:2**z.shape[1], :z.shape[1]], tau).mean(0)
                                         ).entropy()
    per_token = torch.special.entr(softly(z.double(), words.double(), 0.5)).sum(-1)
    with patch.object(lfq, "entropy_of_mean", whole):
        ours = lfq.entropy_penalty(z.view(5, 6, 6), 0.5)
        parts = lfq.entropy_penalty(z, 0.5, groups=2)
        sharp = (z * 300).requires_grad_()
        lfq.entropy_penalty(sharp, 0.01)[0].backward()
    check(
        "per_sample", ours[0], per_token.mean(),
        "Coins with P(+1) = sigmoid(4 z / temperature): entropies add over bits, then "
        f"the mean over tokens is taken ({per_token.mean():.3f} nats); a forgotten sum over bits makes it a sixth."
    )
    check("batch", ours[1], whole(z, 0.5), f"The entropy of the mean is {whole(z, 0.5):.3f} nats.", 1e-3)
    check("batch of two groups", parts[1], whole(z[:, :3], 0.5) + whole(z[:, 3:], 0.5),
          "The sum over runs of neighbouring bits.", 1e-3)
    check("per_sample with two groups", parts[0], per_token.mean(), "It is exact, whatever the groups.")
    assert torch.isfinite(sharp.grad).all(), \
        "the gradient at large |z| is nan: p log p at p = 0, or a softplus that overflows"


@exercise("lfq.CausalConv.forward", points=2)
def test_homework_lfq_causal_convolution():
    for stride in (1, 2):
        conv, x = lfq.CausalConv(2, 4, (3, 3, 3), (stride, stride, stride)), torch.randn(1, 2, 5, 6, 6)
        frames = []
        for t in range(0, 5, stride):                       # frame by frame, tap by tap
            taps = [
                F.conv2d(x[:, :, t + k], conv.weight[:, :, k + 2], None, stride, 1) for k in (-2, -1, 0)
                if t + k >= 0
            ]
            frames.append(sum(taps) + conv.bias[:, None, None])
        truth = torch.stack(frames, 2)
        hint = "kernel - 1 zeros in front of the first frame, none behind the last."
        check(f"a clip, stride {stride}", conv(x), truth, hint)
        changed = torch.cat([x[:, :, :3], torch.randn(1, 2, 2, 6, 6)], 2)
        n = -(-3 // stride)
        check("the past, when the future changes", conv(changed)[:, :, :n], conv(x)[:, :, :n], hint, 1e-6)
        check("an image", conv(x[:, :, :1]), truth[:, :, :1], "An image is a clip of one frame.")
        check("the first two channels", conv(x, 2), truth[:, :2],
              "c_out takes the first rows of the weight and of the bias.")
