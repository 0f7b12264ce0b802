"""Homework of maskgit.py: each test grades one function and says what the mistake may be."""
import math
from unittest.mock import patch

import torch
import torch.nn as nn

import maskgit
from homework.kit import check, exercise


@exercise("maskgit.n_masked", points=2)
def test_homework_maskgit_training_masks():
    u = [0.0, 0.11, 0.3, 0.52, 0.77, 0.93, 1.0]
    n = maskgit.n_masked(torch.tensor(u)[:, None], 50)
    check("the number of masked tokens", n.flatten(),
          torch.tensor([max(1, math.ceil(50 * math.cos(math.pi / 2 * v) - 1e-6)) for v in u]),
          "ceil(T cos(pi/2 u)), and at least one.")


@exercise("maskgit.n_still_masked", points=2)
def test_homework_maskgit_schedule():
    starts = torch.tensor([[64], [100], [7]])
    for step in range(5):
        truth = torch.tensor([[math.floor(n * math.cos(math.pi / 2 * (step + 1) / 5) + 1e-6)]
                              for n in (64, 100, 7)])
        ours = maskgit.n_still_masked(starts, step, 5)
        check(
            f"masked after step {step} of 5 (from {starts.flatten().tolist()})", ours, truth,
            "floor(n cos(pi/2 r)), where r is what is done AFTER this step: (step + 1) / steps, and the last leaves 0."
        )
    check("for the linear schedule", maskgit.n_still_masked(starts, 0, 5, "linear"),
          torch.tensor([[51], [80], [5]]))


@exercise("maskgit.lowest", points=2)
def test_homework_maskgit_confidence():
    score, n = torch.randn(4, 9), torch.tensor([[0], [3], [8], [9]])
    score[1, 2:6] = -5.0                                    # a tie
    truth = torch.zeros(4, 9, dtype=torch.bool)
    for row, s, count in zip(truth, score.tolist(), n.flatten().tolist()):
        for t in sorted(range(9), key=lambda t: (s[t], t))[:count]:
            row[t] = True
    mask = maskgit.lowest(score, n)
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == [0, 3, 8, 9], \
        f"{mask.sum(1).tolist()} tokens stay masked where n is [0, 3, 8, 9]: argsort gives positions, of which the first n stay masked"
    assert torch.equal(
        mask[2:], truth[2:]), "those of the LOWEST score are masked again; the model is sure of the others"
    assert torch.equal(mask, truth), "of equal scores the earlier positions are masked: a stable sort"


@exercise("maskgit.masked_mean", points=2)
def test_homework_maskgit_masked_mean():
    loss, weight = torch.rand(3, 5), torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 1, 1], [0.1, 1, 1, 0.1, 1]])
    rows = [sum(a * b for a, b in zip(x, w)) / sum(w) for x, w in zip(loss.tolist(), weight.tolist())]
    check(
        "the mean per image", maskgit.masked_mean(loss, weight), torch.tensor(sum(rows) / 3),
        f"Within each image first. Over all T tokens it would be {(loss * weight).mean():.3f}: masked ones alone count."
    )
    check("the mean over the batch", maskgit.masked_mean(loss, weight, per_image=False),
          torch.tensor(sum(r * sum(w) for r, w in zip(rows, weight.tolist()))) / weight.sum(),
          "Every masked token counts alike.")


@exercise("maskgit.MaskGIT.training_mask", points=2)
def test_homework_maskgit_training_mask():
    size = dict(token_dim=2, n_layer=1, n_head=2, n_embd=8)
    model = maskgit.MaskGIT(nn.Identity(), 6, 3, **size, u_max=0.7)
    n, asked = torch.arange(6000)[:, None] % 6 + 1, []
    with patch.object(maskgit, "n_masked", lambda u, T: asked.append((u, T)) or n):
        mask = model.training_mask(6000, torch.device("cpu"))
    assert asked, "n_masked() says how many to mask"
    u, T = asked[0]
    assert u.shape == (6000, 1), f"u has shape {tuple(u.shape)}: each row draws its own, (B, 1)"
    assert 0 <= u.min(
    ) and 0.69 < u.max() < 0.7, f"u is in {u.min():.2f} .. {u.max():.2f} and not uniform in 0 .. u_max = 0.7"
    assert T == 6, "n_masked is asked for the T tokens of the model"
    assert mask.shape == (
        6000, 6) and mask.dtype == torch.bool, f"mask {tuple(mask.shape)} {mask.dtype} is not (B, T) bool"
    right = (mask.sum(1, keepdim=True) == n).float().mean()
    assert right == 1, f"{100 * right:.0f}% of the rows mask n tokens: exactly n, drawn without replacement, not n on average"
    check("how often each position is masked",
          mask.float().mean(0), torch.full((6, ), 3.5 / 6), "All positions alike.", 0.03)
    assert len(mask[n[:, 0] == 1].unique(dim=0)) == 6, "every row must draw its positions anew"
