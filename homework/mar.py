"""Homework of mar.py: each test looks at one function and says what a difference may mean."""
import math

import torch
import torch.nn as nn

import mar
from homework.kit import closed, exercise, fit

CPU = torch.device("cpu")


@exercise("mar.mask_rate", points=2)
def test_homework_mar_mask_rate(look):
    for low, std in ((0.7, 0.25), (0.0, 9.0), (0.5, 0.5)):
        for u in (0.5, 0.1, 0.8, 0.0, 1.0, float(look.rand(1))):
            look.see(f"the rate at quantile {u:.3g} of N(1, {std}^2) cut to [{low}, 1]",
                     torch.tensor(float(mar.mask_rate(u, low, std))),
                     f"The inverse cdf, of a number between cdf({low}) and cdf(1).", 1e-3)
    look.see("the defaults", torch.tensor(float(mar.mask_rate(0.3))), "0.7 and 0.25.", 1e-3)


@exercise("mar.masked_counts", points=3)
def test_homework_mar_counts(look):
    hint = (
        "floor(n cos(pi/2 k / steps)) before step k and 0 at the end: a list of steps + 1 ints. Every step "
        "draws one token at least, and no more than are left.")
    for n, steps in ((256, 8), (97, 7), (64, 64), (1, 1), (9, 9), (10, 8), (256, 1), (13, 11)):
        counts = mar.masked_counts(n, steps)
        look.see(f"{n} tokens in {steps} steps", counts, hint)
        look.see("the types in the list", sorted({type(v).__name__ for v in counts}), hint)


@exercise("mar.draw_order", points=2)
def test_homework_mar_order(look):
    look.see("raster order", mar.draw_order("raster", 2, 6, CPU), "0 .. T - 1 in each row.")
    look.see("raster order of one row", mar.draw_order("raster", 1, 3, CPU))
    order = mar.draw_order("random", 4000, 6, CPU)
    look.form("a random order", order)
    look.see("a random order, sorted", order.sort(1).values[:20], "Each row holds each position once.")
    share = torch.stack([(order[:, i, None] == torch.arange(6)).float().mean(0) for i in range(6)])
    look.see("how often each position comes at each turn", share, "All orders are equally likely.", 0.05)
    look.draws("a random order", lambda: mar.draw_order("random", 2, 30, CPU))
    known = torch.zeros(4000, 6, dtype=torch.bool)
    known[:, [1, 4]] = True
    many = look.rand(500, 6) < 0.4
    for kind in ("random", "raster"):
        order = mar.draw_order(kind, 4000, 6, CPU, known)
        share = torch.stack([(order[:, i, None] == torch.arange(6)).float().mean(0) for i in range(6)])
        look.see(f"where each position comes in a {kind} order, 1 and 4 being known", share,
                 "Known positions come first; all others are ordered as before.", 0.06)
        order = mar.draw_order(kind, 500, 6, CPU, many)
        first = many.gather(1, order)
        look.see(f"known positions come first in a {kind} order", bool((first[:, 1:] <= first[:, :-1]).all()),
                 "However many of them a row has.")
        look.see(f"a {kind} order with known ones, sorted", order.sort(1).values[:20], "Each position once.")
    places = torch.stack([mar.draw_order("random", 3, 8, CPU)[:, 0] for _ in range(200)]).float()
    look.independent("the orders of the rows", places, 0.35)


class Square(nn.Module):
    """A head whose loss is a squared distance."""

    def loss(self, h, x):
        return (h[..., :2] - x).square().sum(-1)


def standing_in(model):
    """What stands in for MAR.hidden: h of the tokens that are there, the labels, the mask, in place."""
    told = {}

    def hidden(tokens, labels, mask, n_visible=None):
        told.update(labels=labels, mask=mask)
        there = tokens.masked_fill(mask[..., None], 0.0) if model.token_dim else tokens.masked_fill(mask, 0)
        x = model.tok_embed(there) + model.cls_embed(labels)[:, None] + model.head_pos
        x = x + x.mean(1, keepdim=True) + 0.1 * mask[..., None]
        if n_visible is not None and (n_visible != (~mask).sum(1)).any():
            x = x + 7
        return x

    model.hidden = hidden
    return told


@exercise("mar.MAR.forward", points=3)
def test_homework_mar_loss(look):
    hint = ("The last mask_count() positions of the order are masked; the head gets h and token of the same "
            "masked positions; the mean is over these.")
    size = dict(n_layer=2, n_head=2, n_embd=8, n_buffer=2)

    def order(kind, B, T, device, known_mask=None):
        if kind == "raster":
            return torch.arange(T).expand(B, T)
        return torch.stack([torch.randperm(T) for _ in range(B)])

    with closed("mar", "draw_order", order):
        for B, n in ((1, 4), (3, 1), (3, 6)):
            for options in (dict(token_dim=2), dict(vocab_size=5)):
                head = Square() if "token_dim" in options else mar.CategoricalHead(8, 5)
                model = mar.MAR(head, 6, 5, order="raster", label_drop=1.0, **options, **size).eval()
                look.fill(model, 0.5)
                standing_in(model)
                model.mask_count = lambda n=n: n
                tokens = look.randn(B, 6, 2) if model.token_dim else look.randint(5, B, 6)
                labels = look.randint(5, B)
                learned = {k: p for k, p in model.named_parameters()
                           if k.startswith(("tok", "cls", "head"))}
                look.call(f"the loss with {n} of 6 tokens masked, {B} images", lambda tokens: model(
                    tokens, labels)[0], {"tokens": tokens}, hint, params=learned)
                model.train()
                look.call("the loss in training with label_drop=1", lambda tokens: model(tokens, labels)[0],
                          {"tokens": tokens}, "While training labels become num_classes, 'no class'.",
                          params=learned)
    model = look.fill(mar.MAR(Square(), 6, 5, token_dim=2, label_drop=0.5, **size))
    told = standing_in(model)
    model.mask_count = lambda: 2
    with closed("mar", "draw_order", order):
        model.train()(look.randn(2000, 6, 2), torch.arange(2000) % 5)
        mask, labels = told["mask"], told["labels"]
        look.form("the mask that hidden() is given", mask)
        look.see("the numbers of masked tokens", mask.sum(1).unique(), "mask_count() in each row.")
        look.see("how often each position is masked",
                 mask.float().mean(0), "All orders are equally likely.", 0.08)
        look.see("the share of labels dropped", (labels == 5).float().mean(),
                 "Each image drops its label by itself.", 0.08)
        look.see("the labels that are kept",
                 bool((labels[labels < 5] == (torch.arange(2000) % 5)[labels < 5]).all()))
        look.draws("the loss", lambda: model(torch.ones(4, 6, 2) * torch.arange(6.0)[:, None],
                                             torch.arange(4))[0])
        masks = []
        for _ in range(150):
            model(torch.zeros(3, 6, 2), torch.arange(3))
            masks.append(told["mask"].float()[:, :5])
        look.independent("the masks of the images of a batch", torch.stack(masks)[:, :, 0], 0.4)


@exercise("mar.MAR.hidden", points=3, further=True, also=["ReusingEncoder.__call__"])
def test_homework_mar_encoder_and_decoder(look):
    hint = (
        "The encoder sees the buffer and the tokens that are there, at their positions; mask_embed stands "
        "in every masked position of the decoder's input; the buffer is left out at the end.")
    for B, T, n, options in ((1, 5, 4, dict(token_dim=2)), (3, 6, 2, dict(vocab_size=5)),
                             (2, 6, 6, dict(token_dim=2))):
        model = mar.MAR(nn.Identity(), T, 4, n_layer=2, n_head=2, n_embd=8, n_buffer=2, **options).eval()
        look.fill(model, 0.4)
        mask = torch.stack([look.order(T) < n for _ in range(B)])
        labels = look.randint(5, B)
        tokens = look.randn(B, T, 2) if model.token_dim else look.randint(5, B, T)
        learned = {k: p for k, p in model.named_parameters()
                   if "." not in k or k.startswith(("tok", "cls", "decoder_embed"))}
        for n_visible in (None, T - n):
            look.call(f"h, {n} of {T} tokens masked, n_visible={n_visible}", lambda tokens: model.hidden(
                tokens, labels, mask, n_visible), {"tokens": tokens}, hint, 1e-3, params=learned)
    uneven = torch.tensor([[True, False, True, True, True, True], [False] * 6])
    look.call("rows with different numbers of masked tokens", lambda tokens: model.hidden(
        tokens, labels[:1].expand(2), uneven), {"tokens": look.randn(2, 6, 2)}, hint, 1e-3)


class Rule(nn.Module):
    """A head that draws numbers by a rule."""

    def sample(self, h, h_uncond=None, cfg=1.0, temperature=1.0, **tricks):
        x = h[..., :2].sin() * temperature + sum(tricks.values())
        return (x if h_uncond is None else x + cfg * h_uncond[..., :2].cos()), None


@exercise("mar.MAR.sample", points=4, further=True)
def test_homework_mar_sampling_loop(look):
    hint = ("Before step k masked_counts()[k] tokens are masked; those of the step are drawn together, from "
            "hidden() of all that is there, and written in their positions.")
    size = dict(n_layer=2, n_head=2, n_embd=8, n_buffer=2)
    order = torch.stack([look.order(6) for _ in range(3)])

    def given_first(kind, B, T, device, known_mask=None):
        known = torch.zeros(B, T) if known_mask is None else known_mask.float()
        places = order[:B]
        return places.gather(1, known.gather(1, places).argsort(dim=1, descending=True, stable=True))

    counts = {(6, 1): [6, 0], (6, 3): [6, 5, 3, 0], (6, 6): [6, 5, 4, 3, 2, 1, 0], (5, 3): [5, 4, 2, 0],
              (4, 3): [4, 3, 2, 0], (6, 2): [6, 4, 0], (5, 2): [5, 3, 0], (4, 2): [4, 2, 0]}
    with (closed("mar", "draw_order", given_first),
          closed("mar", "masked_counts", lambda n, steps: counts[n, steps])):
        model = look.fill(mar.MAR(Rule(), 6, 4, token_dim=2, **size).eval(), 0.5)
        standing_in(model)
        for B, steps, words in ((1, 1, {}), (3, 3, {}), (3, 6, dict(temperature=0.5, extra=1)),
                                (2, 3, dict(cfg=3.0)), (2, 3, dict(cfg=3.0, cfg_schedule="constant")),
                                (2, 3, dict(extra=lambda p: 2 * p))):
            shown = []
            look.call(f"{B} images in {steps} steps, {[k for k in words]}", lambda cond: model.sample(
                cond, steps, on_step=lambda *told: shown.append(told), **words), {"cond": look.randint(4, B)},
                hint, gradients=False)
            look.see("the steps that on_step sees", [i for i, *_ in shown])
            for i, tokens, mask in shown:
                look.see(f"the mask after step {i}", mask, hint)
                look.see(f"the tokens there after step {i}", tokens.masked_fill(mask[..., None], 0), hint)
        for rows in ([[1, 0, 0, 0, 1, 0], [0, 1, 1, 0, 0, 0]], [[1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0]]):
            mask = torch.tensor(rows, dtype=torch.bool)
            look.call(f"the rest of images with {mask.sum(1).tolist()} known tokens", lambda cond, known:
                      model.sample(cond, 3, known=known, known_mask=mask),
                      {"cond": look.randint(4, 2), "known": look.randn(2, 6, 2)},
                      "Known tokens are there from the start and stay.", gradients=False)


@exercise("mar", points=3, further=True, goals=[
    ("nats per picture of bars and stripes", math.log(14), (1.0, 0.6), "14 pictures of 3 x 3, all as "
     "likely: ln 14 = 2.639, in any order. Below it, a masked token is seen."),
    ("the share of samples that are bars or stripes", 1.0, (0.6, 0.3), "One token per step.")])
def capstone_mar(look):
    """Bars and stripes, 3 x 3, in random order."""
    pictures = mar.bars_and_stripes(1000, CPU, 3).unique(dim=0)                       # (14, 9)
    model = mar.MAR(mar.CategoricalHead(32, 2),
                    9,
                    1,
                    vocab_size=2,
                    n_layer=2,
                    n_head=2,
                    n_embd=32,
                    dropout=0.0,
                    label_drop=0.0,
                    n_buffer=1,
                    mask_min=0.0,
                    mask_std=9.0)
    none = torch.zeros(500, dtype=torch.long)
    fit(model.parameters(), lambda: model(pictures[torch.randint(14, (64,))], none[:64])[0], 1200, 3e-3)
    model.eval()
    nats = torch.stack([mar.nats_per_picture(model, pictures, none[:14]) for _ in range(8)]).mean()
    look.goal("nats per picture of bars and stripes", nats, 1.0, 0.6)
    found = (model.sample(none, 9)[:, None] == pictures).all(-1).any(1).float().mean()
    look.goal("the share of samples that are bars or stripes", found, 0.6, 0.3)
