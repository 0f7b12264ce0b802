"""Tests of ar_transformer.py: exact optima, the uncached path, slow loops."""
import math

import pytest
import torch
import torch.nn as nn

import ar_transformer
import gmm_head

WAYS = {"cached": dict(), "uncached": dict(use_cache=False), "one graph": dict(compile="aot_eager")}


def replay(model, monkeypatch, cond, **options):
    """Greedy sampling -> tokens (B, T) and the logits (B, T, V) that each was drawn from."""
    seen, draw = [], model.head.sample

    def record(h, h_uncond, cfg, temperature, **tricks):
        c = model.head.logits(h)
        seen.append(c if h_uncond is None or cfg == 1 else model.head.logits(h_uncond) * (1 - cfg) + cfg * c)
        return draw(h, h_uncond, cfg, temperature, top_k=1)
    monkeypatch.setattr(model.head, "sample", record)
    return model.sample(cond, **options), torch.stack(seen, 1)


def small_ar(continuous=True, **options):
    size = dict(n_layer=2, n_head=2, n_embd=32, grid=(3, 4)) | options
    if continuous:
        return ar_transformer.ARTransformer(gmm_head.GMMHead(32, 3, 4), 12, 5, token_dim=3, **size)
    return ar_transformer.ARTransformer(ar_transformer.CategoricalHead(32, 11), 12, 5, vocab_size=11, **size)


@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_ar_cached_sampling_equals_uncached(continuous, cfg):
    model, cond, drawn = small_ar(continuous).eval(), torch.arange(5), []
    if not continuous:
        nn.init.normal_(model.head.proj.weight)
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(model.sample(cond, cfg=cfg, use_cache=use_cache))
    assert drawn[0].std() > 0 if continuous else drawn[0].unique().numel() > 1
    assert torch.allclose(drawn[0].float(), drawn[1].float(), atol=1e-4)


def test_ar_is_causal_and_sees_the_class():
    model, x, cond = small_ar().eval(), torch.randn(2, 12, 3), torch.tensor([0, 1])
    h = model.hidden_states(x, cond)
    for t in range(12):
        y = x.clone()
        y[:, t] += 1
        changed = (model.hidden_states(y, cond) - h).abs().amax((0, 2)) > 1e-6
        assert not changed[:t + 1].any() and (t == 11 or
                                              changed[t + 1]), f"token {t} leaks into its own prediction"
    assert (model.hidden_states(x, cond.flip(0)) - h).abs().amin((0, 2)[:1]).max() > 0


def test_rope_turns_pairs_by_their_angle_and_is_relative():
    table = ar_transformer.rope_table((3, 4), 16, prefix=2)
    assert table.shape == (14, 8, 2) and torch.equal(table[:2, :, 0], torch.ones(2, 8))
    x = torch.randn(1, 14, 2, 16)
    cos, sin = table[:, None].unbind(-1)
    a, b = x[..., 0::2], x[..., 1::2]
    expected = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    assert torch.allclose(ar_transformer.rotate(x, table), expected, atol=1e-6)
    compiled = torch.compile(ar_transformer.rotate, backend="eager", fullgraph=True)  # its other formula
    assert torch.allclose(compiled(x, table), expected, atol=1e-6)
    q, k = torch.randn(2, 1, 1, 1, 16)
    score = lambda i, j: (ar_transformer.rotate(q, table[i:i + 1]) * ar_transformer.rotate(k, table[j:j + 1])
                          ).sum()
    at = lambda row, col: 2 + 4 * row + col
    assert torch.allclose(score(at(2, 3), at(1, 1)), score(at(1, 2), at(0, 0)), atol=1e-5)


def test_ar_label_dropping_reaches_the_null_row_in_training_only():
    model, x, cond = small_ar(label_drop=0.5), torch.randn(64, 12, 3), torch.zeros(64, dtype=torch.long)
    model(x, cond)[0].backward()
    assert model.cls_embed.weight.grad[5].abs().sum() > 0, "the null label is never trained"
    assert model.cls_embed.weight.grad[1:5].abs().sum() == 0
    model.zero_grad()
    model.eval()(x, cond)[0].backward()
    assert model.cls_embed.weight.grad[5].abs().sum() == 0
    assert torch.equal(model(x, cond)[0], model(x, cond)[0])


def test_ar_initial_loss_is_ln_v_and_logits_give_the_loss():
    model, x, cond = small_ar(False, label_drop=0), torch.randint(11, (4, 12)), torch.arange(4)
    assert abs(model(x, cond)[0] - math.log(11)) < 1e-5
    nn.init.normal_(model.head.proj.weight)
    logits = model.logits(x, cond)
    slow = -sum(logits[b, t].log_softmax(-1)[x[b, t]] for b in range(4) for t in range(12)) / 48
    assert torch.allclose(model(x, cond)[0], slow, atol=1e-5)


def test_ar_keeps_known_tokens_and_counts_its_steps():
    model, seen = small_ar().eval(), []
    known, mask = torch.randn(2, 12, 3), torch.zeros(2, 12, dtype=torch.bool)
    mask[:, :5] = True
    x = model.sample(torch.tensor([1, 2]), known=known, known_mask=mask,
                     on_step=lambda t, tokens, unknown: seen.append(int(unknown.sum())))
    assert torch.equal(x[:, :5], known[:, :5]) and not torch.equal(x[:, 5:], known[:, 5:])
    assert seen == [2 * (11 - t) for t in range(12)]
    with pytest.raises(ValueError, match="one token per step"):
        model.sample(torch.tensor([1]), steps=3)


def test_categorical_head_filters_like_a_slow_loop():
    head = ar_transformer.CategoricalHead(6, 9)
    nn.init.normal_(head.proj.weight)
    h = torch.randn(1, 6)
    p = head.logits(h)[0].softmax(-1).detach()
    ranked = sorted(range(9), key=lambda i: -p[i])
    assert set(head.sample(h.expand(3000, -1), top_k=3)[0].tolist()) == set(ranked[:3])
    total, nucleus = 0.0, set()
    for i in ranked:
        if total < 0.7:
            nucleus.add(i)
        total += float(p[i])
    ids, log_p = head.sample(h.expand(20_000, -1), top_p=0.7)
    assert set(ids.tolist()) == nucleus
    assert abs(float(log_p.exp()[ids == ranked[0]][0]) - float(p[ranked[0]] / sum(p[i]
                                                                                  for i in nucleus))) < 1e-4
    null = torch.randn(1, 6)
    guided = (head.logits(null) + 1.5 * (head.logits(h) - head.logits(null)))[0].softmax(-1)
    counts = head.sample(h.expand(50_000, -1), null.expand(50_000, -1),
                         cfg=1.5)[0].bincount(minlength=9) / 50_000
    assert torch.allclose(counts, guided, atol=0.015)


def test_ar_reaches_the_exact_optimum_on_bars_and_stripes():
    """The 14 pictures of 3 x 3, with full rows or full columns: ln 14 = 2.639 nats."""
    model = ar_transformer.ARTransformer(ar_transformer.CategoricalHead(32, 2), 9, 1, vocab_size=2,
                                         n_layer=2, n_head=2, n_embd=32, label_drop=0)
    zeros = torch.zeros(64, dtype=torch.long)
    batch = lambda step: (ar_transformer.bars_and_stripes(64, "cpu", 3), zeros)
    ar_transformer.fit_ids(model, batch, 500, 1e-2)
    everything = ar_transformer.bars_and_stripes(5000, "cpu", 3).unique(dim=0)
    assert len(everything) == 14
    with torch.no_grad():
        nll = model.eval().head.loss(model.hidden_states(everything, zeros[:14]), everything).sum(1)
        drawn = model.sample(torch.zeros(300, dtype=torch.long))
    assert torch.logsumexp(-nll, 0) <= 1e-4, "the probabilities of the 14 pictures sum to more than one"
    best = math.log(14)
    assert best - 1e-4 <= nll.mean() <= 1.02 * best, f"{nll.mean():.3f} nats, the optimum is {best:.3f}"
    good = (drawn[:, None] == everything[None]).all(-1).any(1).float().mean()
    assert good > 0.95, f"{good:.0%} of the samples are bars or stripes"


@pytest.mark.parametrize("continuous", [True, False])
def test_ar_beam_search_returns_the_models_own_log_probability(continuous):
    model, cond = small_ar(continuous).eval(), torch.tensor([0, 3, 4])
    if not continuous:
        nn.init.normal_(model.head.proj.weight, std=0.3)
    tokens, log_p = model.beam_search(cond, beam=4, fan=8)
    exact = lambda x: -model.head.loss(model.hidden_states(x, cond), x).sum(1)
    assert torch.allclose(log_p, exact(tokens),
                          atol=1e-3), "a beam's score is log p of its tokens, T factors and no more"
    plain = torch.stack([exact(model.sample(cond)) for _ in range(20)])
    assert (log_p > plain.mean(0)).all()
    with pytest.raises(ValueError, match="fan"):
        model.beam_search(cond, beam=9, fan=8)


def test_ar_wide_beam_finds_the_likeliest_sequence():
    model = ar_transformer.ARTransformer(ar_transformer.CategoricalHead(16, 3), 4, 1, vocab_size=3, n_layer=1,
                                         n_head=2, n_embd=16).eval()
    nn.init.normal_(model.head.proj.weight)
    all_ = torch.cartesian_prod(*[torch.arange(3)] * 4)     # (81, 4): every sequence
    zeros = torch.zeros(81, dtype=torch.long)
    log_p = -model.head.loss(model.hidden_states(all_, zeros), all_).sum(1)
    tokens, best = model.beam_search(zeros[:1], beam=81, fan=200)           # 200 draws miss no id in practice
    assert torch.allclose(best, log_p.max(), atol=1e-4) and torch.equal(tokens[0], all_[log_p.argmax()])


def test_ar_with_a_prefix_of_vectors_sees_all_of_it_and_drops_it():
    size = dict(n_layer=2, n_head=2, n_embd=32, label_drop=0.5, prefix=(6, 5))
    model = ar_transformer.ARTransformer(gmm_head.GMMHead(32, 3, 4), 12, 1, token_dim=3, grid=(3, 4), **size)
    x, cond = torch.randn(4, 12, 3), torch.randn(4, 6, 5)
    model(x, cond)[0].backward()
    assert model.pre_none.grad.abs().sum() > 0 and model.pre_embed.weight.grad.abs().sum() > 0
    model.eval()
    h = model.hidden_states(x, cond)
    for p in range(6):
        other = cond.clone()
        other[:, p] += 1
        assert ((model.hidden_states(x, other) - h).abs().amax((0, 2))
                > 1e-6).all(), "every token sees every vector of the prefix"
    everyone = torch.ones(4, dtype=torch.bool)
    assert torch.equal(model.hidden_states(x, cond, everyone), model.hidden_states(x, -cond, everyone))
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(model.sample(cond, cfg=2.0, use_cache=use_cache))
    assert torch.allclose(*drawn, atol=1e-4)




def test_ids_are_drawn_as_often_as_their_probabilities_say(monkeypatch):
    # the second adds up to 4
    p = torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.3, 0.0], [3.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
    n = 40_000
    ids = ar_transformer.draw_ids(p.expand(n, 2, 6))
    assert ids.shape == (n, 2) and ids.dtype == torch.long
    for row, truth in zip(ids.T, p / p.sum(-1, keepdim=True)):
        share = torch.bincount(row, minlength=6) / n
        assert (share[truth == 0] == 0).all(), "an id of probability 0"
        assert ((share - truth).abs()
                <= 4 * (truth * (1 - truth) / n).sqrt()).all(), f"{share} where {truth} was asked"
    for u in (0.0, 1 - 2**-24):                             # the ends of what torch.rand gives
        monkeypatch.setattr(torch, "rand", lambda shape, device: torch.full(shape, u))
        assert (p.gather(1,
                         ar_transformer.draw_ids(p)[:, None]) > 0).all(), f"an id of probability 0 at u = {u}"


@pytest.mark.parametrize("condition", [dict(), dict(text=(6, "bytes")), dict(prefix=(6, 5))])
@pytest.mark.parametrize("continuous", [True, False])
def test_ar_three_ways_to_decode_are_one(condition, continuous):
    """Cache cut to the filled part, no cache, static shapes compiled without a graph break; guidance off, on,
    at first only.
    """
    torch.compiler.reset()
    n_layer = 1 if condition or continuous else 2           # heads and what stands in front are no layer's
    model = small_ar(continuous, n_layer=n_layer, **condition).eval()
    if not continuous:
        model.rope[:model.n_prefix] = 0              # as in LlamaGen's released weights: official/llamagen.py
        nn.init.normal_(model.head.proj.weight)
    cond = {"text": ar_transformer.bytes_of(["a", "ring", "", "a star"], 6), "prefix": torch.randn(4, 6, 5)}
    cond = cond[next(iter(condition))] if condition else torch.arange(4)
    for cfg, interval in ((1.0, -1), (3.0, -1), (3.0, 2)):
        drawn = []
        for way in WAYS.values():
            torch.manual_seed(3)
            drawn.append(model.sample(cond, cfg=cfg, cfg_interval=interval, **way))
        assert drawn[0].float().std() > 0 and all(
            torch.allclose(drawn[0].float(), x.float(), atol=1e-3) for x in drawn[1:])
        if cfg > 1 and interval < 0:
            everything = drawn[0]
    assert not torch.equal(everything, drawn[0]), "the guided interval ended"
    assert torch.equal(everything[:, :3],
                       drawn[0][:, :3]), "c = 2 guides the first 4 tokens, as LlamaGen counts"


def test_ar_token_dropout_covers_the_class_too():
    model = small_ar(False, n_layer=0, dropout=0.5, label_drop=0)
    zeros = model.hidden_states(torch.zeros(400, 12, dtype=torch.long),
                                torch.zeros(400, dtype=torch.long)).eq(0).float().mean((0, 2))
    assert zeros.shape == (12, ) and (
        zeros - 0.5).abs().max() < 0.03, "LlamaGen drops from the whole embedded sequence"


def test_ar_bytes_are_read_in_order_and_padding_is_not():
    model, texts = small_ar(False, text=(12, "bytes"), label_drop=0).eval(), ["ab", "ba", "a red ring"]
    nn.init.normal_(model.head.proj.weight)
    cond = ar_transformer.bytes_of(texts, 12)
    assert cond.dtype == torch.int64 and cond[0].tolist() == [0] * 10 + [97, 98]
    with pytest.raises(ValueError, match="13 bytes.*room for 12"):
        ar_transformer.bytes_of(["seven ärings"], 12)
    x = torch.randint(11, (1, 12)).expand(3, -1)
    logits = model.logits(x, cond)
    assert torch.equal(logits, model.logits(x, cond.to(torch.uint8)))
    assert (logits[0] - logits[1]).abs().max() > 1e-3, "ab and ba are two captions"
    model.caption.pos.data[:10] += 5                      # places where the first two captions have no text
    model.caption.none += 5
    changed = (model.logits(x, cond) - logits).abs().amax((1, 2))
    assert (changed[:2] == 0).all() and changed[2] > 1e-3
    nothing = torch.ones(3, dtype=torch.bool)
    h = model.hidden_states(x, cond, nothing)
    assert torch.allclose(h[0], h[2], atol=1e-5), "a hidden caption leaves no trace, not even its length"
    model.train()
    model.label_drop = 0.5
    torch.manual_seed(0)
    loss = model(x, cond)[0]
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.caption.parameters())
    assert "caption.none" in model.state_dict()


@pytest.mark.slow
def test_ar_learns_what_captions_say():
    text = ar_transformer.captions_of(ar_transformer.bars_and_stripes(2000, "cpu").unique(dim=0))
    assert len(set(text)) == 30 and "rows 1 and 3 dark" in text and "column 2 dark" in text
    _, curve = ar_transformer.read_captions("cpu", 600)
    _, told, untold = curve[-1]
    assert told < 0.5, f"{told:.2f} nats are left when the caption tells the picture"
    assert math.log(30) - 1e-3 <= untold < 1.06 * math.log(
        30), f"{untold:.3f} nats without a caption, ln 30 = 3.401 is the least"
