"""Homework of var.py: each test looks at one function and says what a difference may mean."""
import math

import torch

import var
from homework.kit import exercise, fit


def book(look, scales=(1, 2, 4), V=9, **options):
    """A quantiser of V codes of 3 numbers with a convolution for each scale, none of which does nothing."""
    quantizer = var.MultiScaleQuantizer(V, 3, scales, n_phi=len(scales), **options)
    look.fill(quantizer.phi, 0.2)
    with torch.no_grad():
        quantizer.codebook.copy_(look.randn(V, 3))
    return quantizer


@exercise("var.MultiScaleQuantizer.decompose", points=3)
def test_homework_var_residual_quantisation(look):
    hint = ("Each scale shrinks the REST that the scales before it left and takes the nearest codes. What "
            "they mean, enlarged and smoothed, is taken off. No gradient passes through the rest.")
    for scales, B in (((1, 2, 4), 1), ((1, 2, 4), 3), ((1, 3), 2)):
        quantizer = book(look, scales)
        side = scales[-1]

        def found(f):
            zs, ids, added = quantizer.decompose(f)
            return torch.cat(zs, 1), torch.cat(ids, 1), torch.stack(list(added))
        look.call(f"{B} latents in the scales {scales}", found, {"f": 2 * look.randn(B, 3, side, side)}, hint,
                  outputs=["z of all scales", "the ids", "what each scale adds"], params=quantizer)


@exercise("var.MultiScaleQuantizer.forward", points=3)
def test_homework_var_losses_of_all_sums(look):
    hint = ("The mean over the scales of |sum so far - sg(f)|^2 + beta |sg(sum so far) - f|^2. f_hat has the "
            "value of the last sum and sends its gradient to f as if it were f.")
    for beta, B in ((0.25, 1), (0.7, 3)):
        quantizer = book(look, (1, 2), beta=beta)
        ids = [look.randint(9, B, 1), look.randint(9, B, 4)]

        def decompose(f):                                   # whatever f is
            codes = [torch.nn.functional.embedding(part, quantizer.codebook) for part in ids]
            added = [quantizer.enlarge(part, k) for k, part in enumerate(codes)]
            return [part.detach() for part in codes], ids, added
        quantizer.decompose = decompose
        look.call(f"{B} latents with beta={beta}", quantizer, {"f": look.randn(B, 3, 2, 2)}, hint,
                  outputs=["f_hat", "ids", "the loss", "logs"], logs=["commit", "usage_1x1", "usage_2x2"],
                  params=quantizer)
    quantizer = book(look, (1, 2), ema=0.9)
    calls = []
    quantizer.update = lambda *given: calls.append(given)
    quantizer.decompose = lambda f: ([look.randn(2, 1, 3), look.randn(2, 4, 3)],
                                     [look.randint(9, 2, 1), look.randint(9, 2, 4)],
                                     [look.randn(2, 3, 2, 2), look.randn(2, 3, 2, 2)])
    quantizer.train()(look.randn(2, 3, 2, 2))
    look.see("how often update() is called in a training step with ema", len(calls), "Once.")
    quantizer.eval()(look.randn(2, 3, 2, 2))
    look.see("calls after one more step, in eval mode", len(calls), "There the codes stay.")


@exercise("var.MultiScaleQuantizer.inputs", points=2)
def test_homework_var_teacher_forcing(look):
    hint = ("What scale k reads is the SUM of all scales before it, at full size and then shrunk to grid k. "
            "It is not the codes of scale k - 1, and never its own.")
    for scales, B in (((1, 2, 4), 1), ((1, 2, 4), 3), ((1, 2, 3, 5), 2), ((2, 4), 2)):
        quantizer = book(look, scales)
        ids = look.randint(9, B, sum(p * p for p in scales))
        look.call(f"{B} sequences of the scales {scales}", quantizer.inputs, {"ids": ids}, hint,
                  params=quantizer)
    look.call("one scale alone", book(look, (3,)).inputs, {"ids": look.randint(9, 2, 9)},
              "It has no scale before it: (B, 0, D).", gradients=False)


@exercise("var.VARBlock.forward", points=2)
def test_homework_var_block_is_modulated_by_the_class(look):
    hint = ("x + gate * f(norm(x) * (1 + scale) + shift), first for attention, then for the MLP. The six "
            "rows are two gates, two scales, two shifts.")
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 1]]).bool()
    for B, S, words in ((1, 1, {}), (2, 3, {}), (2, 3, dict(mask=mask))):
        block = look.fill(var.VARBlock(8, 2))
        look.call(f"{B} x {S} rows, {list(words)}", block,
                  {"x": look.randn(B, S, 8), "modulation": look.randn(B, 6, 8)}, hint, params=block, **words)
    block = look.fill(var.VARBlock(8, 2))
    cache = look.randn(2, 2, 2, 5, 4)
    look.call("two rows with a cache", lambda x, modulation: block(x, modulation, None, cache, 1),
              {"x": look.randn(2, 2, 8), "modulation": look.randn(2, 6, 8)}, "The cache and where the rows "
              "start go to attend().", gradients=False)


@exercise("var.MultiScaleQuantizer.update", points=3, further=True)
def test_homework_var_running_averages(look):
    hint = ("N and m move by 1 - ema towards the batch's sums, in which a z of scale k weighs 1 / p_k. A "
            "code is m / N.")
    quantizer = book(look, (1, 2), ema=0.8, restart=0.0)
    quantizer.ema_count.fill_(1.0)
    quantizer.ema_sum.copy_(quantizer.codebook)
    for step, B in enumerate((20, 1)):
        zs = [look.randn(B, 1, 3), look.randn(B, 4, 3)]
        quantizer.update(zs, [look.randint(7, B, 1), look.randint(7, B, 4)])     # two codes are never nearest
        for name in ("ema_count", "ema_sum", "codebook"):
            look.see(f"{name} after step {step}", getattr(quantizer, name), hint, 1e-3)
    quantizer = book(look, (1, 2), ema=0.5, restart=0.3)
    quantizer.ema_count.fill_(1.0)
    quantizer.ema_sum.copy_(quantizer.codebook)
    zs = [look.randn(40, 1, 3), look.randn(40, 4, 3)]
    for _ in range(4):
        quantizer.update(zs, [torch.arange(40)[:, None] % 7, torch.arange(160).view(40, 4) % 7])
    every = torch.cat([z.flatten(0, 1) for z in zs])
    look.see("codes that stand on a z of the batch",
             (quantizer.codebook[:, None] - every).abs().amax(-1).amin(1) < 1e-3,
             "Below restart times the mean count, a code is put on a random z, with the mean count.")
    own = []
    for _ in range(40):
        quantizer.ema_count[7:] = 0.0
        quantizer.update(zs, [torch.arange(40)[:, None] % 7, torch.arange(160).view(40, 4) % 7])
        own.append((quantizer.codebook[7:, None] - zs[0].flatten(0, 1)).abs().amax(-1).amin(1) < 1e-3)
    look.see("how often a dead code gets a z of the 1 x 1 scale", torch.stack(own).float().mean(),
             "A random scale first, drawn by p_k, then a random z of it: a third.", 0.2)


@exercise("var.VAR.sample", points=4, further=True)
def test_homework_var_draws_scale_by_scale(look):
    hint = ("A pass for each scale. The first reads the class; the next reads the sum of all that was drawn, "
            "shrunk to its grid. What was read before stays in the caches.")
    quantizer = book(look, (1, 2, 3))
    model = var.VAR(var.CategoricalHead(8, 9), quantizer, 3, n_layer=2, n_head=2, n_embd=8)
    model = look.fill(model.eval(), 0.5)
    for B, words in ((1, {}), (3, {}), (2, dict(cfg=3.0)), (2, dict(cfg=3.0, cfg_schedule="constant"))):
        shown = []
        scales = []
        draw = model.head.sample

        def seen(h, h_uncond=None, cfg=1.0, *rest, **tricks):
            scales.append(float(cfg))
            return draw(h, h_uncond, cfg, *rest, **tricks)
        model.head.sample = seen
        look.call(f"the likeliest ids of {B} images, {words}", lambda cond: model.sample(
            cond, top_k=1, on_step=lambda k, tokens, mask: shown.append((k, mask.clone())), **words),
            {"cond": look.randint(3, B)}, hint, gradients=False)
        model.head.sample = draw
        if "cfg" in words:
            look.see(f"guidance in each pass, {words}", torch.tensor(scales),
                     "It grows linearly from 1 in the first pass to cfg in the last, or is constant.")
        look.see("the passes that on_step sees", [k for k, _ in shown])
        for k, mask in shown:
            look.see(f"what is masked after pass {k}", mask, "The scales that are still to come.")
    known = look.randint(9, 2, 14)
    known_mask = (torch.arange(14) < 5).expand(2, -1)
    look.call("the rest of two images", lambda cond: model.sample(cond, known=known, known_mask=known_mask,
                                                                  top_k=1),
              {"cond": look.randint(3, 2)}, "Known tokens stay, and the sums have them.", gradients=False)
    look.draws("the ids", lambda: model.sample(torch.zeros(40, dtype=torch.long)))


@exercise("var", points=3, further=True, goals=[
    ("nats of bars and stripes, of which the 1 x 1 token tells which it is", math.log(30), (0.3, 0.07),
     "ln 30: one of 30 pictures, and then nothing is left to tell."),
    ("the share of samples that are bars or stripes", 1.0, (0.1, 0.03), "A scale at a time.")])
def capstone_var(look):
    """The 30 pictures of 4 x 4 with full rows or full columns. The 1 x 1 token tells which it is."""
    lines = torch.arange(16)[:, None] >> torch.arange(4) & 1
    rows = lines[:, :, None].expand(-1, -1, 4)
    pictures = torch.cat([rows, rows.transpose(1, 2)[1:-1]]).flatten(1)               # (30, 16)
    tokens = torch.cat([torch.arange(30)[:, None], pictures], 1)
    quantizer = book(look, (1, 4), V=30)
    model = var.VAR(var.CategoricalHead(48, 30), quantizer, 1, n_layer=2, n_head=2, n_embd=48, label_drop=0.0)
    none = torch.zeros(300, dtype=torch.long)

    def nats(rows):
        return model(rows, none[:len(rows)])[0] * 17

    learned = [p for p in model.parameters() if p.requires_grad]
    fit(learned, lambda: nats(tokens[torch.randint(30, (64,))]), 300, 4e-3)
    model.eval()
    with torch.no_grad():
        look.goal("nats of bars and stripes, of which the 1 x 1 token tells which it is", nats(tokens), 0.3,
                  0.07)
    drawn = model.sample(none)[:, 1:]
    good = (drawn[:, None] == pictures).all(2).any(1).float().mean()
    look.goal("the share of samples that are bars or stripes", good, 0.1, 0.03)
