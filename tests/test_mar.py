"""Tests of mar."""
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import ar_transformer
import diffusion_head
import gmm_head
import mar
import maskgit
from tests.helpers import close, golden


def small_mar(cls=mar.MAR, continuous=True, **options):
    size = dict(n_layer=4, n_head=2, n_embd=32,
                grid=(3, 4)) | ({"n_buffer": 3} if cls is mar.MAR else {}) | options
    if continuous:
        return cls(gmm_head.GMMHead(32, 3, 4), 12, 5, token_dim=3, **size)
    return cls(mar.CategoricalHead(32, 11), 12, 5, vocab_size=11, **size)


@pytest.mark.parametrize("causal, masked", [(False, False), (True, False), (False, True)])
def test_attention_by_formula_is_the_fused_kernel(causal, masked):
    """In bf16 training on a CPU the formula stands in for the fused kernel: the same values and gradients."""
    q, k, v = (torch.randn(2, 3, 9, 16).bfloat16().requires_grad_() for _ in range(3))
    mask = (torch.rand(2, 1, 9, 9) < 0.6) | torch.eye(9, dtype=torch.bool) if masked else None
    ours = mar.attention(q, k, v, mask, causal)
    assert ours.dtype == torch.bfloat16 and ours.grad_fn.name(
    ) != "ScaledDotProductFlashAttentionForCpuBackward0"
    ours.float().square().sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = F.scaled_dot_product_attention(*exact, mask, is_causal=causal)
    truth.square().sum().backward()
    for a, b in zip((ours, *(x.grad for x in (q, k, v))), (truth, *(x.grad for x in exact))):
        assert (a - b).abs().max() < 0.02 * b.abs().max(), "not softmax(q k^T / sqrt(d)) v"


def test_mar_patchify_in_the_authors_order():
    g = golden("mar/mar_forward")
    for p, name in ((2, "patchify"), (1, "patchify1")):
        tokens, side = mar.patchify(g[name + "_in"], p), g[name + "_in"].shape[-1] // p
        assert torch.equal(tokens, g[f"patchify_p{p}_out"])
        assert torch.equal(mar.unpatchify(tokens, (side, side), p), g[name + "_in"])
    wide = torch.randn(2, 3, 4, 6)
    assert torch.equal(mar.unpatchify(mar.patchify(wide, 2), (2, 3), 2), wide)


def test_mar_mask_rate_and_counts_are_the_authors():
    g = golden("mar/schedules")
    for q, rate in zip(g["mask_ratio/q"].tolist(), g["mask_ratio/ppf"].tolist()):
        assert abs(mar.mask_rate(q) - rate) < 1e-9
    for name in [k for k in g if k.startswith("ar/")]:
        n, steps = map(int, name[3:].split("_"))
        counts = mar.masked_counts(n, steps)
        assert counts[:-1] == g[name][:, 0].tolist() and counts[-1] == 0
        assert [a - b for a, b in zip(counts, counts[1:])] == g[name][:, 2].tolist()
    model = mar.MAR(nn.Identity(), 256, 2, 4, n_layer=0, n_head=1, n_embd=4)
    counts = [model.mask_count() for _ in range(3000)]
    assert min(counts) >= 180 and max(counts) <= 256 and abs(np.mean(counts) / 256 - 0.869) < 0.006


@pytest.mark.parametrize("name, params, of_head", [("mar-b", 207_924_768, 35_749_920),
                                                   ("mar-l", 478_326_304, 72_230_432),
                                                   ("mar-h", 942_403_104, 151_206_944)])
def test_mar_of_the_paper_has_its_parameter_count(name, params, of_head):
    with torch.device("meta"):
        head = diffusion_head.DiffusionHead(mar.SIZES[name]["n_embd"], 16, **mar.HEAD_SIZES[name])
        model = mar.MAR(head, 256, 1000, 16, **mar.SIZES[name])
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert (count(model), count(head)) == (params, of_head)
    stated = {"mar-b": (207.92, 35.75), "mar-l": (478.33, 72.23), "mar-h": (942.40, 151.21)}[name]
    assert (round(params / 1e6, 2), round(of_head / 1e6, 2)) == stated, "papers/mar.md section 2"


def test_mar_block_equals_torchs_encoder_layer():
    block, theirs = mar.ViTBlock(32, 4), nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", 1e-6, True, True)
    theirs.load_state_dict({
        "self_attn.in_proj_weight": block.attn.qkv.weight, "self_attn.in_proj_bias": block.attn.qkv.bias,
        "self_attn.out_proj.weight": block.attn.proj.weight, "self_attn.out_proj.bias": block.attn.proj.bias,
        **{
            f"linear{i}.{k}": getattr(getattr(block.mlp, f"fc{i}"), k)
            for i in (1, 2)
            for k in ("weight", "bias")
        }, **{
            f"norm{i}.{k}": getattr(getattr(block, f"norm{i}"), k)
            for i in (1, 2)
            for k in ("weight", "bias")
        }
    })
    x = torch.randn(2, 7, 32)
    assert torch.allclose(block(x), theirs(x), atol=1e-5)


def test_mar_loss_counts_masked_tokens_only():
    """The head sees 9 of 12 tokens per row, each once, others in other rows; a zero categorical head starts
    at ln V.
    """
    model = small_mar(continuous=False, label_drop=0).eval()
    loss, logs = model(torch.randint(11, (4, 12)), torch.arange(4))
    assert abs(loss - math.log(11)) < 1e-5 and 0.7 <= logs["masked"] <= 1
    model, asked = small_mar(), []
    model.mask_count = lambda: 9
    loss_of = model.head.loss
    model.head.loss = lambda h, x: (asked.append((h, x)), loss_of(h, x))[1]
    x = torch.randn(6, 12, 3)
    model(x, torch.arange(6) % 5)[0].backward()
    (h, targets), = asked
    assert h.shape == (6, 9, 32) and targets.shape == (6, 9, 3), "the head is computed where it is needed"
    found = (targets[:, :, None] == x[:, None]).all(-1).float()        # (6, 9, 12) which token each target is
    assert (found.sum(2) == 1).all() and found.sum(1).max() == 1
    assert len({tuple(row.tolist()) for row in found.argmax(2)}) > 1, "every row has its own order"


@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("options", [dict(), dict(mask_min=0.0, mask_std=9.0)])
def test_mar_in_few_shapes_has_the_loss_of_forward(continuous, options, monkeypatch):
    """Whatever number of tokens is masked, with the same order: value and gradient, in at most 4 shapes."""
    model = small_mar(continuous=continuous, dropout=0, **options).eval()
    if not continuous:
        nn.init.normal_(model.head.proj.weight)             # it starts at zero
    x = torch.randn(6, 12, 3) if continuous else torch.randint(11, (6, 12))
    order = torch.stack([torch.randperm(12) for _ in range(6)])
    monkeypatch.setattr(mar, "draw_order", lambda *_: order)
    shapes, hidden = set(), model.hidden
    for n in range(max(1, math.ceil(12 * model.mask_min)), 13):
        model.mask_count = lambda: n
        model.hidden = hidden
        found = []
        for loss_of in (model, model.loss_in_few_shapes):
            loss, logs = loss_of(x, torch.arange(6) % 5)
            grad, = torch.autograd.grad(loss, model.encoder_blocks[0].mlp.fc1.weight)
            assert abs(logs["masked"] - n / 12) < 1e-6
            found.append((loss, grad))
            model.hidden = lambda *args, **options: (shapes.add(args[3]), hidden(*args, **options))[1]
        assert torch.allclose(found[0][0], found[1][0], rtol=1e-5)
        assert torch.allclose(found[0][1], found[1][1], atol=1e-5 * found[0][1].abs().max())
    assert 2 < len(shapes) <= 4, f"the encoder sees {shapes} tokens"


@pytest.mark.parametrize("cls", [mar.MAR, mar.CausalMAR])
def test_mar_label_dropping_reaches_the_null_row_in_training_only(cls):
    model, x, cond = small_mar(cls, label_drop=0.5,
                               dropout=0), torch.randn(64, 12, 3), torch.zeros(64, dtype=torch.long)
    model(x, cond)[0].backward()
    assert model.cls_embed.weight.grad[5].abs().sum() > 0 and model.cls_embed.weight.grad[1:5].abs().sum(
    ) == 0
    model.zero_grad()
    model.eval()(x, cond)[0].backward()
    assert model.cls_embed.weight.grad[5].abs().sum() == 0
    unused = [k for k, p in model.named_parameters() if p.grad is None]
    assert not unused, f"{unused} take no part in the loss"


@pytest.mark.parametrize("order", ["random", "raster"])
def test_mar_writes_in_its_order_and_by_its_schedule(order):
    model, seen = small_mar(order=order).eval(), []
    x = model.sample(torch.arange(5), 4, cfg=2.0, on_step=lambda i, tokens, mask: seen.append(
        (tokens.clone(), mask.clone())))
    assert [int(m[0].sum()) for _, m in seen] == mar.masked_counts(12, 4)[1:] == [11, 8, 4, 0]
    for (a, unknown), (b, later) in zip(seen, seen[1:]):
        assert (unknown | ~later).all() and torch.equal(a[~unknown], b[~unknown]), "a written token stays"
    assert torch.equal(seen[-1][0], x) and x.shape == (5, 12, 3)
    raster = all((m[:, 1:] >= m[:, :-1]).all() for _, m in seen)      # known tokens stand before unknown ones
    assert raster == (order == "raster")


def test_mar_in_one_step_draws_every_token_from_an_empty_picture():
    model, hs = small_mar(continuous=False).eval(), []
    draw = model.head.sample
    model.head.sample = lambda h, *a, **k: (hs.append(h), draw(h, *a, **k))[1]
    model.sample(torch.arange(5), 1)
    alone = model.hidden(torch.zeros(5, 12, dtype=torch.long), torch.arange(5),
                         torch.ones(5, 12, dtype=torch.bool))
    assert len(hs) == 1 and hs[0].shape == (5, 12, 32)
    assert torch.cdist(hs[0], alone).min(1).values.max() < 1e-3, "the same 12 states, in the order of writing"


@pytest.mark.parametrize("cls", [mar.MAR, mar.CausalMAR])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_mar_keeps_known_tokens_with_any_number_per_row(cls, cfg):
    model = small_mar(cls).eval()
    known, mask = torch.randn(4, 12, 3), torch.zeros(4, 12, dtype=torch.bool)
    for row, places in enumerate([[0, 5], [1, 2, 3, 7, 11], [4, 9], range(12)]):
        mask[row, list(places)] = True
    masks = []
    x = model.sample(torch.arange(4), cfg=cfg, known=known, known_mask=mask,
                     on_step=lambda i, t, m: masks.append(m.clone()))
    assert torch.equal(x[mask], known[mask]) and (x[~mask] != known[~mask]).all()
    if cls is mar.MAR:
        assert len(masks) == 10 and int(masks[0][1].sum()) == 7 and not masks[-1].any()
        equal = mask[[0, 0, 2, 2]]                          # equal numbers: the encoder drops the holes
        x = model.sample(torch.arange(4), 3, cfg, known=known, known_mask=equal)
        assert torch.equal(x[equal], known[equal])
        assert torch.equal(model.sample(torch.arange(4), known=known, known_mask=mask | True), known)


def test_mar_known_tokens_are_seen_from_the_first_step():
    model = small_mar(continuous=False).eval()
    nn.init.normal_(model.head.proj.weight)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, [0, 5]], mask[1, [1, 2, 6]] = True, True
    tokens, hs, draw = torch.randint(11, (2, 12)), [], model.head.sample
    model.head.sample = lambda h, *a, **k: (hs.append(h), draw(h, *a, **k))[1]
    model.sample(torch.arange(2), 1, known=tokens, known_mask=mask)
    h = model.hidden(tokens, torch.arange(2), ~mask)        # (2, 12, 32)
    for row in range(2):
        assert torch.cdist(hs[0][row], h[row]).min(1).values.max() < 1e-4


def captions_as_bytes(*texts, P=22):
    """Captions -> bytes (B, P), zeros in front."""
    return torch.tensor([[0] * (P - len(text)) + list(text.encode()) for text in texts])


TEXTS = ("a disc", "a ring", "no padding in this one")


@pytest.mark.parametrize("cls", [mar.MAR, mar.CausalMAR])
def test_mar_reads_captions_and_not_their_padding(cls, monkeypatch):
    model, cond = small_mar(cls, text=(22, "bytes")).eval(), captions_as_bytes(*TEXTS)
    tokens, positions = torch.randn(1, 12, 3).expand(3, -1, -1), torch.arange(12).expand(3, -1)
    asked = {mar.CausalMAR: [(positions,)], mar.MAR: [(positions >= n, v) for n in (0, 5) for v in (n, None)]}
    before = [model.hidden(tokens, cond, *more) for more in asked[cls]]
    for h in before:
        assert (h[0] - h[1]).abs().max() > 1e-3, "the caption has no effect"
    read = mar.read_condition

    def other_padding(*asked):
        rows, there = read(*asked)
        return rows + 5.0 * ~there[:, :6, None], there
    with monkeypatch.context() as patch:
        patch.setattr(mar, "read_condition", other_padding)
        for h, more in zip(before, asked[cls]):
            assert torch.equal(model.hidden(tokens, cond, *more), h), "padding was looked at"
    model.caption.pos.data[:16] += 5                        # of 24 bytes in 6 rows, "a disc" has the last 6
    if cls is mar.MAR:
        model.encoder_pos.data[:4] += 5
        model.decoder_pos.data[:4] += 5
    for h, more in zip(before, asked[cls]):
        changed = (model.hidden(tokens, cond, *more) - h).abs().amax((1, 2))
        assert (changed[:2] == 0).all() and changed[2] > 1e-3, "padding was looked at, or text was not"


def test_mar_drops_masked_tokens_behind_captions_at_no_loss():
    model, cond = small_mar(text=(22, "bytes")).eval(), captions_as_bytes(*TEXTS)
    tokens = torch.randn(3, 12, 3)
    for n in (0, 1, 7, 12):
        mask = torch.stack([torch.randperm(12) for _ in range(3)]) >= n
        everything = model.hidden(tokens, cond, mask)
        assert torch.allclose(model.hidden(tokens, cond, mask, n), everything, atol=1e-5)
        more = model.hidden(tokens, cond, mask, min(12, n + 3), ragged=True)
        assert torch.allclose(more, everything, atol=1e-5)


@pytest.mark.parametrize("text", [None, (22, "bytes")])
def test_mar_encodes_new_tokens_alone_as_an_encoder_in_which_old_ones_do_not_see_them(text):
    """Against one pass over all rows, with a mask: a row sees rows that came with it or before it."""
    model = small_mar(text=text).eval()
    cond = captions_as_bytes(*TEXTS) if text else torch.arange(3)
    tokens = torch.randn(3, 12, 3)
    order = torch.stack([torch.randperm(12) for _ in range(3)])
    P, came, reusing = model.n_buffer, torch.full((3, 12), 9), mar.ReusingEncoder(model, 9)
    for k, (start, end) in enumerate(((0, 3), (3, 4), (4, 9))):
        new = order[:, start:end]
        came = came.scatter(1, new, k)
        h = reusing(tokens, cond, came == 9, end)
        if k == 0:
            exact = model.hidden(tokens, cond, came == 9, end)
            assert torch.allclose(h, exact, atol=1e-5), "at first nothing is kept, so it must be hidden()"
        when = F.pad(came, (P, 0))                          # (B, P + T), the buffer is there from the start
        rows, there = mar.read_condition(model, cond)
        x = torch.cat([rows.expand(-1, P, -1), mar.embed_tokens(model, tokens)], 1)
        x = model.tok_norm(x + model.encoder_pos)
        visible = (when[:, None, :] <= when[:, :, None]) & (when < 9)[:, None, :]
        if text:
            visible = visible & there[:, None, :]
        for block in model.encoder_blocks:
            x = block(x, mask=visible[:, None])
        x = model.decoder_embed(model.encoder_norm(x))
        x = torch.where((when == 9)[..., None], model.mask_embed, x) + model.decoder_pos
        for block in model.decoder_blocks:
            x = block(x, mask=None if there is None else there[:, None, None])
        assert torch.allclose(h, model.decoder_norm(x[:, P:]) + model.head_pos, atol=1e-5)
    assert (h - model.hidden(tokens, cond, came == 9, 9)).abs().max() > 1e-3, "is it exact? then why ask"


def test_mar_encodes_all_tokens_in_every_kth_step(monkeypatch):
    model, rows, block = small_mar().eval(), [], mar.ViTBlock.forward

    def counted(self, x, **options):
        if self is model.encoder_blocks[0]:
            rows.append(x.shape[1] - 3)                     # without the buffer, where all are encoded
        return block(self, x, **options)
    monkeypatch.setattr(mar.ViTBlock, "forward", counted)
    model.sample(torch.arange(2), 12, cfg=2.0, encode_every=3)          # 12 steps of 1 token
    assert rows == [0, -2, -2, 3, -2, -2, 6, -2, -2, 9, -2, -2]
    known, known_mask = torch.randn(2, 12, 3), torch.arange(12).expand(2, -1) < 5
    drawn = model.sample(torch.arange(2), 7, known=known, known_mask=known_mask, encode_every=9)
    assert torch.equal(drawn[:, :5], known[:, :5]) and rows[12:14] == [5, -2]
    ragged = known_mask & (torch.arange(2)[:, None] < 1)
    for wrong in (dict(encode_every=0), dict(encode_every=2, known=known, known_mask=ragged)):
        with pytest.raises(ValueError, match="encode_every"):
            model.sample(torch.arange(2), **wrong)


@pytest.mark.parametrize("cls", [mar.MAR, mar.CausalMAR])
def test_mar_without_a_caption_is_the_null_caption_alone(cls, monkeypatch):
    model, conds = small_mar(cls, text=(22, "bytes"), label_drop=0.5).eval(), []
    cond, read = captions_as_bytes(*TEXTS), mar.read_condition
    monkeypatch.setattr(mar, "read_condition", lambda m, c: (conds.append(c), read(m, c))[1])
    model.sample(cond, cfg=2.0)
    assert torch.equal(conds[0], torch.cat([cond, torch.zeros_like(cond)]))
    rows, there = read(model, conds[0])
    assert torch.equal(rows[3], rows[5]) and there[3:].all(), "a dropped caption leaves a trace"
    assert there.shape == (6, 6 + 12) and there.sum(1).tolist()[:3] == [14, 14, 18]
    conds.clear()
    model.train()(torch.randn(400, 12, 3), cond[:1].expand(400, -1))
    kept = (conds[0] == cond[0]).all(1)
    assert (kept | (conds[0] == 0).all(1)).all() and 0.4 < kept.float().mean() < 0.6


@pytest.mark.parametrize("order", ["random", "raster"])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize("text", [False, True])
def test_causal_mar_cached_sampling_equals_the_whole_pass(order, cfg, text, monkeypatch):
    options = dict(text=(22, "bytes")) if text else {}
    model, hs, orders = small_mar(mar.CausalMAR, order=order, **options).eval(), [], []
    draw, make = model.head.sample, mar.draw_order
    monkeypatch.setattr(model.head, "sample", lambda h, u=None, *a, **k: (hs.append(
        (h, u)), draw(h, u, *a, **k))[1])
    monkeypatch.setattr(mar, "draw_order", lambda *a: (orders.append(make(*a)), orders[-1])[1])
    cond = captions_as_bytes(*TEXTS) if text else torch.arange(5)
    nothing = torch.zeros_like(cond) if text else torch.full((5, ), 5)
    x = model.sample(cond, cfg=cfg)
    h = torch.cat([h for h, _ in hs], 1)
    assert torch.allclose(h, model.hidden(x, cond, orders[0]), atol=1e-5)
    if cfg != 1:
        h_uncond = torch.cat([u for _, u in hs], 1)
        assert torch.allclose(h_uncond, model.hidden(x, nothing, orders[0]), atol=1e-5)
    assert (orders[0] == torch.arange(12)).all() == (order == "raster")


def test_causal_mar_is_causal_and_is_told_the_target():
    model, x, cond = small_mar(mar.CausalMAR).eval(), torch.randn(1, 12, 3), torch.tensor([2])
    order = torch.randperm(12)[None]
    h = model.hidden(x, cond, order)
    for i in range(12):
        y = x.clone()
        y[:, order[0, i]] += 1
        changed = (model.hidden(y, cond, order) - h).abs().amax((0, 2)) > 1e-6
        assert not changed[:i + 1].any() and (i == 11 or changed[i + 1]), f"place {i} of the order leaks"
    swapped = order.clone()
    swapped[0, [10, 11]] = order[0, [11, 10]]
    changed = (model.hidden(x, cond, swapped) - h).abs().amax((0, 2)) > 1e-6
    assert changed.tolist(
    ) == [False] * 10 + [True] * 2, "the same past and another target must give another h"


def test_causal_mar_with_a_caption_is_causal():
    model, cond = small_mar(mar.CausalMAR, text=(22, "bytes")).eval(), captions_as_bytes("a disc")
    x, order = torch.randn(1, 12, 3), torch.randperm(12)[None]
    h = model.hidden(x, cond, order)
    for i in range(12):
        y = x.clone()
        y[:, order[0, i]] += 1
        changed = (model.hidden(y, cond, order) - h).abs().amax((0, 2)) > 1e-6
        assert not changed[:i + 1].any() and changed[i + 1:].all()


@pytest.mark.parametrize("cls", [mar.MAR, mar.CausalMAR])
@pytest.mark.parametrize("order", ["random", "raster"])
def test_mar_reaches_the_exact_optimum_on_bars_and_stripes(cls, order):
    """Every arm of the ablation: 6 pictures of 2 x 2, whose optimum is ln 6 = 1.792 nats, in any order."""
    options = dict(n_buffer=1, mask_min=0, mask_std=9) if cls is mar.MAR else {}
    model = cls(mar.CategoricalHead(32, 2), 4, 1, vocab_size=2, n_layer=2, n_head=2, n_embd=32, dropout=0,
                label_drop=0, order=order, **options)
    zeros, best = torch.zeros(300, dtype=torch.long), math.log(6)
    mar.fit_ids(model, lambda step: (mar.bars_and_stripes(64, "cpu", 2), zeros[:64]), 280, 5e-3)
    everything = mar.bars_and_stripes(1000, "cpu", 2).unique(dim=0)
    # each in other orders
    nats = [mar.nats_per_picture(model.eval(), everything, zeros[:6]) for _ in range(20)]
    nats = torch.stack(nats).mean()
    assert len(
        everything) == 6 and best - 0.02 <= nats <= 1.03 * best, f"{nats:.3f} nats, the optimum is {best:.3f}"
    drawn = model.sample(zeros)
    good = (drawn[:, None] == everything[None]).all(-1)
    assert good.any(1).float().mean() > 0.95 and good.float().mean(
        0).min() > 0.08, "each of the 6 in about 1/6 of the samples"


@pytest.mark.parametrize("cls", [mar.MAR, mar.CausalMAR])
def test_mar_refuses_in_a_sentence(cls):
    model, cond = small_mar(cls).eval(), torch.arange(2)
    for steps in (0, 13) if cls is mar.MAR else (3,):
        with pytest.raises(ValueError, match="steps"):
            model.sample(cond, steps)
    for options, words in [(dict(order="spiral"), "spiral"), (dict(grid=(3, 3)), "holds 9 tokens"),
                           (dict(n_head=5), "multiple of n_head 5")]:
        with pytest.raises(ValueError, match=words):
            small_mar(cls, **options)
    with pytest.raises(ValueError, match="cosine"):
        model.sample(cond, cfg=2.0, cfg_schedule="cosine")


@pytest.mark.parametrize("cls", [mar.MAR, mar.CausalMAR])
def test_mar_tricks_may_depend_on_the_progress(cls):
    model, seen = small_mar(cls).eval(), []
    draw = model.head.sample
    model.head.sample = lambda h, u, cfg, temperature, n_tries: (seen.append(
        n_tries), draw(h, u, cfg, temperature, n_tries=n_tries))[1]
    model.sample(torch.arange(2), cfg=2.0, n_tries=lambda p: round(13 - 11 * p))
    assert seen == [13 - i for i in range(12)]


@pytest.mark.parametrize("cls", [mar.MAR, mar.CausalMAR])
def test_mar_trains_under_autocast_with_the_diffusion_head(cls):
    model = cls(diffusion_head.DiffusionHead(32, 3, width=32, depth=1), 12, 5, 3, n_layer=2, n_head=2,
                n_embd=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = model(torch.randn(4, 12, 3), torch.arange(4))
        x = model.eval().sample(torch.arange(3), cfg=2.0, diffusion_steps=lambda p: round(8 - 4 * p))
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(x).all() and x.dtype == torch.float32


@pytest.mark.parametrize("cls", [mar.MAR, mar.CausalMAR])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_mar_samples_tokens_of_its_own_dtype(cls, dtype):
    model, cond = small_mar(cls).eval().to(dtype), torch.arange(2)
    known = torch.randn(2, 12, 3)
    mask = torch.rand(2, 12) < 0.3
    for options in (dict(), dict(cfg=2.0), dict(known=known, known_mask=mask)):
        x = model.sample(cond, **options)
        assert x.dtype == dtype and x.shape == (2, 12, 3)
    assert torch.equal(x[mask], known[mask].to(dtype))
    assert small_mar(cls, continuous=False).eval().to(dtype).sample(cond).dtype == torch.int64


HEADS = {"gmm": lambda: gmm_head.GMMHead(32, 3, 4),
         "diffusion": lambda: diffusion_head.DiffusionHead(32, 3, width=32, depth=1)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cls, head", [
    (mar.MAR, "diffusion"), (mar.MAR, "gmm"), (mar.CausalMAR, "diffusion"), (mar.CausalMAR, "gmm"),
    (maskgit.MaskGIT, "gmm"), (ar_transformer.ARTransformer, "diffusion"),
    (ar_transformer.ARTransformer, "gmm")])
def test_generators_of_vectors_sample_in_the_dtype_of_their_weights(cls, head, dtype):
    model = cls(HEADS[head](), 4, 5, token_dim=3, n_layer=2, n_head=2, n_embd=32).eval().to(dtype)
    x = model.sample(torch.arange(2), cfg=2.0)
    assert x.dtype == dtype and x.shape == (2, 4, 3) and torch.isfinite(x).all()


@pytest.mark.parametrize("objective, sampler", [("diffusion", "ancestral"), ("diffusion", "ddim"),
                                                ("flow", "heun"), ("flow", "euler")])
def test_the_diffusion_head_denoises_in_the_dtype_of_its_weights(objective, sampler):
    """From the same noise, float64 is float32 with more digits."""
    head = diffusion_head.DiffusionHead(32, 3, width=32, depth=1, objective=objective)
    for p in head.parameters():
        nn.init.normal_(p, std=0.1)
    h, noise = torch.randn(2, 5, 32), torch.randn(11, 5, 3)
    options = dict(cfg=2.0, diffusion_steps=10, sampler=sampler)
    single, _ = head.sample(*h, noise=noise, **options)
    double, _ = head.double().sample(*h.double(), noise=noise.double(), **options)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    close(single, double.float(), 1e-4)
    assert not torch.equal(double.float().double(), double), "all its digits are of float64"
