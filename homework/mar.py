"""Homework of mar.py: each test grades one function and says what the mistake may be."""
import math
from unittest.mock import patch

import torch
import torch.nn as nn

import mar
from homework.kit import check, exercise


@exercise("mar.mask_rate", points=2)
def test_homework_mar_mask_rate():
    for low, std in ((0.7, 0.25), (0.0, 9.0)):
        grid = torch.linspace(low, 1, 20_001, dtype=torch.float64)
        below = torch.cumulative_trapezoid((-0.5 * ((grid - 1) / std) ** 2).exp(), grid)
        for u in (0.5, 0.1, 0.8, 0.0, 1.0):
            rate = mar.mask_rate(u, low, std)
            truth = grid[torch.searchsorted(below / below[-1], u)].item()
            assert abs(rate - truth) < 2e-3, (
                f"the rate at quantile {u} of N(1, {std}^2) cut to [{low}, 1] is {rate:.3f}, "
                f"not {truth:.3f}: the inverse cdf, u being between cdf({low}) and cdf(1)")


@exercise("mar.masked_counts", points=3)
def test_homework_mar_counts():
    counts = mar.masked_counts(256, 8)
    assert counts == [math.floor(256 * math.cos(math.pi / 2 * k / 8)) for k in range(8)] + [0], \
        f"256 tokens in 8 steps: {counts}. Before step k, floor(256 cos(pi/2 k/8)) are masked, and 0 at the end."
    for n in (1, 2, 9, 64):
        counts = mar.masked_counts(n, n)
        assert counts == list(range(n, -1, -1)), \
            f"{n} tokens in {n} steps: {counts}. Every step must draw one at least, and no more."
    counts = mar.masked_counts(10, 8)
    assert len(counts) == 9 and all(a > b for a, b in zip(counts, counts[1:])), \
        f"10 tokens in 8 steps: {counts} does not fall"


@exercise("mar.draw_order", points=2)
def test_homework_mar_order():
    raster = mar.draw_order("raster", 2, 6, torch.device("cpu"))
    assert raster.tolist() == [list(range(6))
                               ] * 2, f"raster order is 0 .. 5 in each row, not {raster.tolist()}"
    order = mar.draw_order("random", 3000, 6, torch.device("cpu"))
    assert torch.equal(order.sort(1).values,
                       torch.arange(6).expand(3000, 6)), "each row must hold each position once"
    share = torch.stack([(order[:, i, None] == torch.arange(6)).float().mean(0) for i in range(6)])
    check("how often each position comes at each turn", share, torch.full((6, 6), 1 / 6),
          "All orders are equally likely.", 0.05)
    known = torch.rand(500, 6) < 0.4
    for kind in ("random", "raster"):
        order = mar.draw_order(kind, 500, 6, torch.device("cpu"), known)
        first = known.gather(1, order)
        assert (first[:, 1:] <= first[:, :-1]).all(), f"known positions must come first in a {kind} order"
        assert torch.equal(order.sort(1).values,
                           torch.arange(6).expand(500, 6)), "each row must hold each position once"


class Listener(nn.Module):
    """A head that remembers what it is asked, and whose loss is the token itself."""

    def loss(self, h, x):
        self.h, self.x = h, x
        return x[..., 0]


@exercise("mar.MAR.forward", points=3)
def test_homework_mar_loss():
    model, asked = mar.MAR(Listener(), 6, 5, token_dim=1, n_layer=2, n_head=2, n_embd=8,
                           label_drop=1.0).eval(), {}
    tokens, order = torch.arange(24.0).view(4, 6, 1), torch.stack([torch.randperm(6) for _ in range(4)])

    def hidden(tokens, labels, mask, n_visible=None):       # an encoder-decoder whose h is the token itself
        asked.update(labels=labels, mask=mask, n_visible=n_visible)
        return tokens.clone()
    model.hidden, model.mask_count = hidden, lambda: 4
    with patch.object(mar, "draw_order", lambda *_, **__: order):
        loss, logs = model(tokens, torch.arange(4))
        mask = asked["mask"]
        assert mask.dtype == torch.bool and mask.sum(
            1).tolist() == [4] * 4, "mask_count() is 4: four of each row are masked"
        assert torch.equal(mask, torch.zeros(4, 6).scatter(1, order[:, 2:], 1).bool(), ), \
            "masked are the LAST positions of the order: those before them are what the model has already written"
        assert asked["n_visible"] in (2, None), f"n_visible is {asked['n_visible']}: 6 - 4 tokens are visible"
        check("the loss", loss, tokens[mask].mean(),
              f"The mean over MASKED tokens; over all of them it is {tokens.mean():.2f}.")
        check("h that the head is given", model.head.h, model.head.x,
              "h and token must come from the same position.")
        assert torch.equal(asked["labels"], torch.arange(4)), "in eval mode the labels stay"
        model.train()(tokens, torch.arange(4))
        assert torch.equal(asked["labels"], torch.full((4,), 5)), \
            "label_drop is 1: while training every label becomes 'no class', 5"
