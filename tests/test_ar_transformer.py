"""Tests of ar_transformer."""
import math
import re
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import distributions as D

import ar_transformer
import mar
import maskgit
import gmm_head
import sample
import train
from tests.helpers import IDS, RARELY, TINY, close, golden, llamagen, log_of, open_magvit2


def replay(model, monkeypatch, cond, **options):
    """Greedy sampling -> tokens (B, T) and the logits (B, T, V) that each was drawn from."""
    seen, draw = [], model.head.sample

    def record(h, h_uncond, cfg, temperature, **tricks):
        c = model.head.logits(h)
        seen.append(c if h_uncond is None or cfg == 1 else model.head.logits(h_uncond) * (1 - cfg) + cfg * c)
        return draw(h, h_uncond, cfg, temperature, top_k=1)
    monkeypatch.setattr(model.head, "sample", record)
    return model.sample(cond, **options), torch.stack(seen, 1)


def grouped(kind, groups=2):
    """A small generator whose 27 or 16 ids are digits, with a head that has opinions."""
    V, size = {2: 16, 3: 27}[groups], dict(n_layer=2, n_head=2, n_embd=32, label_drop=0)
    module = dict(ar=ar_transformer, split=ar_transformer, maskgit=maskgit, mar=mar, causal=mar)[kind]
    cls = dict(ar="ARTransformer", split="ARTransformer", maskgit="MaskGIT", mar="MAR", causal="CausalMAR")[kind]
    head = module.SubTokenHead(32, V, (1, 3), n_head=2) if kind == "split" else module.CategoricalHead(32, V, groups)
    return getattr(module, cls)(head, 12, 5, vocab_size=V, grid=(3, 4), **size)


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
    h = model.hidden(x, cond)
    for t in range(12):
        y = x.clone()
        y[:, t] += 1
        changed = (model.hidden(y, cond) - h).abs().amax((0, 2)) > 1e-6
        assert not changed[:t + 1].any() and (t == 11 or changed[t + 1]), f"token {t} leaks into its own prediction"
    assert (model.hidden(x, cond.flip(0)) - h).abs().amin((0, 2)[:1]).max() > 0


def test_rope_is_complex_multiplication_and_relative():
    table = ar_transformer.rope_table((3, 4), 16, prefix=2)
    assert table.shape == (14, 8, 2) and torch.equal(table[:2, :, 0], torch.ones(2, 8))
    x = torch.randn(1, 14, 2, 16)
    expected = torch.view_as_complex(x.view(1, 14, 2, 8, 2)) * torch.view_as_complex(table)[:, None]
    assert torch.allclose(ar_transformer.rotate(x, table), torch.view_as_real(expected).flatten(-2), atol=1e-5)
    q, k = torch.randn(2, 1, 1, 1, 16)
    score = lambda i, j: (ar_transformer.rotate(q, table[i:i + 1]) * ar_transformer.rotate(k, table[j:j + 1])).sum()
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
    x = model.sample(torch.tensor([1, 2]), known=known, known_mask=mask, on_step=lambda t, tokens, unknown: seen.append(int(unknown.sum())))
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
    assert abs(float(log_p.exp()[ids == ranked[0]][0]) - float(p[ranked[0]] / sum(p[i] for i in nucleus))) < 1e-4
    null = torch.randn(1, 6)
    guided = (head.logits(null) + 1.5 * (head.logits(h) - head.logits(null)))[0].softmax(-1)
    counts = head.sample(h.expand(50_000, -1), null.expand(50_000, -1), cfg=1.5)[0].bincount(minlength=9) / 50_000
    assert torch.allclose(counts, guided, atol=0.015)


def test_ar_reaches_the_exact_optimum_on_bars_and_stripes():
    model = ar_transformer.ARTransformer(ar_transformer.CategoricalHead(64, 2), 16, 1, vocab_size=2, n_layer=2, n_head=2,
                                         n_embd=64, label_drop=0)
    zeros = torch.zeros(128, dtype=torch.long)
    ar_transformer.fit_ids(model, lambda step: (ar_transformer.bars_and_stripes(128, "cpu"), zeros), 400, 5e-3)
    everything = ar_transformer.bars_and_stripes(5000, "cpu").unique(dim=0)
    assert len(everything) == 30
    with torch.no_grad():
        nll = model.eval().head.loss(model.hidden(everything, zeros[:30]), everything).sum(1)
        drawn = model.sample(torch.zeros(300, dtype=torch.long))
    assert torch.logsumexp(-nll, 0) <= 1e-4, "the probabilities of the 30 pictures sum to more than one"
    assert math.log(30) - 1e-4 <= nll.mean() <= 1.02 * math.log(30), f"{nll.mean():.3f} nats, the optimum is {math.log(30):.3f}"
    good = (drawn[:, None] == everything[None]).all(-1).any(1).float().mean()
    assert good > 0.95, f"{good:.0%} of the samples are bars or stripes"


@pytest.mark.parametrize("continuous", [True, False])
def test_ar_beam_search_returns_the_models_own_log_probability(continuous):
    model, cond = small_ar(continuous).eval(), torch.tensor([0, 3, 4])
    if not continuous:
        nn.init.normal_(model.head.proj.weight, std=0.3)
    tokens, log_p = model.beam_search(cond, beam=4, fan=8)
    exact = lambda x: -model.head.loss(model.hidden(x, cond), x).sum(1)
    assert torch.allclose(log_p, exact(tokens), atol=1e-3), "a beam's score is log p of its tokens, T factors and no more"
    plain = torch.stack([exact(model.sample(cond)) for _ in range(20)])
    assert (log_p > plain.mean(0)).all()
    with pytest.raises(ValueError, match="fan"):
        model.beam_search(cond, beam=9, fan=8)


def test_ar_wide_beam_finds_the_likeliest_sequence():
    model = ar_transformer.ARTransformer(ar_transformer.CategoricalHead(16, 3), 4, 1, vocab_size=3, n_layer=1, n_head=2, n_embd=16).eval()
    nn.init.normal_(model.head.proj.weight)
    all_ = torch.cartesian_prod(*[torch.arange(3)] * 4)                                     # (81, 4): every sequence
    zeros = torch.zeros(81, dtype=torch.long)
    log_p = -model.head.loss(model.hidden(all_, zeros), all_).sum(1)
    tokens, best = model.beam_search(zeros[:1], beam=81, fan=200)                           # 200 draws miss no id in practice
    assert torch.allclose(best, log_p.max(), atol=1e-4) and torch.equal(tokens[0], all_[log_p.argmax()])


def test_ar_with_a_prefix_of_vectors_sees_all_of_it_and_drops_it():
    size = dict(n_layer=2, n_head=2, n_embd=32, label_drop=0.5, prefix=(6, 5))
    model = ar_transformer.ARTransformer(gmm_head.GMMHead(32, 3, 4), 12, 1, token_dim=3, grid=(3, 4), **size)
    x, cond = torch.randn(4, 12, 3), torch.randn(4, 6, 5)
    model(x, cond)[0].backward()
    assert model.pre_none.grad.abs().sum() > 0 and model.pre_embed.weight.grad.abs().sum() > 0
    model.eval()
    h = model.hidden(x, cond)
    for p in range(6):
        other = cond.clone()
        other[:, p] += 1
        assert ((model.hidden(x, other) - h).abs().amax((0, 2)) > 1e-6).all(), "every token sees every vector of the prefix"
    everyone = torch.ones(4, dtype=torch.bool)
    assert torch.equal(model.hidden(x, cond, everyone), model.hidden(x, -cond, everyone))
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(model.sample(cond, cfg=2.0, use_cache=use_cache))
    assert torch.allclose(*drawn, atol=1e-4)


def check_gradients(model, g):
    ours = {ar_transformer.official_name(k): p.grad for k, p in model.named_parameters()}
    keys = [k for k in g if k.startswith("grad/")]
    assert len(keys) >= 2
    for key in keys:
        close(ours[key[5:]], g[key])


def test_llamagen_of_classes_has_the_authors_logits_loss_and_gradients():
    model, g, _ = llamagen("gpt_c2i_train")
    model.train()
    model.label_drop = 0
    close(model.logits(g["in/idx"], g["in/cls"]), g["out/logits_train"], 1e-5)
    assert torch.equal(model.eval().logits(g["in/idx"], g["in/cls"]), model.train().logits(g["in/idx"], g["in/cls"]))
    close(model.logits(g["in/idx"], g["in/cls"]), g["out/logits_eval_full"][:, :16], 1e-5)
    loss, _ = model(g["in/idx"], g["in/cls"])
    loss.backward()
    close(loss.detach(), g["out/loss"], 1e-5)
    check_gradients(model, g)
    x = torch.cat([model.prefix(g["in/cls"]), model.embed(g["in/idx"][:, :-1])], 1)
    block, rope = model.blocks[0], model.rope[:16]
    close(block.attn(block.norm1(x), rope), g["out/layer0_attention"], 1e-5)
    close(block(x, rope), g["out/layer0_block"], 1e-5)
    close(block.mlp(block.norm2(x + block.attn(block.norm1(x), rope))), g["out/layer0_ffn"], 1e-5)


def test_llamagen_of_captions_has_the_authors_masks_logits_loss_and_gradients():
    model, g, _ = llamagen("gpt_t2i_train")
    feat, drop = g["in/feat"], g["in/force_drop_ids"].bool()
    assert torch.equal(model.caption.keep(feat), g["in/emb_mask"].bool())
    assert torch.equal(model.caption.keep(feat, drop), g["in/emb_mask"].bool()), "no caption: the padding stays, as published"
    assert torch.equal(model.mask(model.row, 22, model.keep(feat)), g["out/attn_mask"].bool())
    close(model.prefix(feat), g["out/caption_emb"], 1e-5)
    close(model.prefix(feat, drop), g["out/caption_emb_dropped"], 1e-5)
    close(model.logits(g["in/idx"], feat), g["out/logits_train"], 1e-5)
    loss, _ = model(g["in/idx"], feat)
    close(loss.detach(), g["out/loss_unmasked_mean"], 1e-5)
    each = model.head.loss(model.hidden(g["in/idx"], feat), g["in/idx"]).mean(1)            # the third sample is not valid
    loss = (each * g["in/valid"]).sum() / g["in/valid"].sum()
    loss.backward()
    close(loss.detach(), g["out/loss"], 1e-5)
    check_gradients(model, g)


def test_llamagen_rope_is_the_authors():
    g = golden("llamagen/rope")
    for key in [k for k in g if k.startswith("out/freqs2d")]:
        side, width, prefix = map(int, re.findall(r"\d+", key)[1:])
        table = ar_transformer.rope_table((side, side), width, prefix, zero_prefix=True)
        assert torch.allclose(table, g[key], atol=2e-5), key
    close(ar_transformer.rotate(g["in/x"], g["out/freqs2d_grid4_hd8_cls1"]), g["out/x_rot_grid4_hd8_cls1"], 1e-5)
    line = ar_transformer.rope_table((16,), 8, 1, zero_prefix=True)                         # ours counts the prefix: one turn more
    turn = lambda table: torch.view_as_complex(table.contiguous())
    theirs = turn(g["out/freqs1d_len16_hd8_cls1"])[1:] * turn(ar_transformer.rope_table((16,), 8, 1))[1]
    assert torch.allclose(turn(line)[1:], theirs, atol=1e-5)
    assert (line[0] == 0).all()


WAYS = {"cached": dict(), "uncached": dict(use_cache=False), "one graph": dict(compile="aot_eager")}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind, cfg, interval", [("c2i", 1.0, -1), ("c2i", 3.0, -1), ("c2i", 3.0, 5), ("t2i", 1.0, -1), ("t2i", 3.0, -1)])
def test_llamagen_writes_the_authors_tokens(kind, cfg, interval, way, monkeypatch):
    model, g, _ = llamagen(f"generate_{kind}")
    name = f"cfg{cfg}_int{interval}" if kind == "c2i" else f"cfg{cfg}_mask"
    cond = g["in/cls"].long() if kind == "c2i" else g["in/feat"]
    with torch.compiler.set_stance("force_eager" if way == "one graph" and cfg == 1 else "default"):
        tokens, logits = replay(model, monkeypatch, cond, cfg=cfg, cfg_interval=interval, **WAYS[way])
    assert torch.equal(tokens, g[f"out/tokens_{name}"].long())
    close(logits, g[f"out/logits_{name}"])


def test_llamagen_mask_while_decoding_is_the_authors():
    model, g, _ = llamagen("generate_t2i")
    keep = torch.cat([model.keep(g["in/feat"]), model.keep(g["in/feat"], torch.ones(3, dtype=torch.bool))])
    ours = torch.cat([model.mask(model.row[t:t + 1], 22, keep) for t in range(22)], 2)      # row by row, as decode_step
    assert torch.equal(ours[:, 0], g["out/causal_mask_cfg3"][:, :22, :22].bool())


def test_ids_are_drawn_as_often_as_their_probabilities_say(monkeypatch):
    p = torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.3, 0.0], [3.0, 0.0, 0.0, 0.0, 0.0, 1.0]])      # the second adds up to 4
    n = 40_000
    ids = ar_transformer.draw_ids(p.expand(n, 2, 6))
    assert ids.shape == (n, 2) and ids.dtype == torch.long
    for row, truth in zip(ids.T, p / p.sum(-1, keepdim=True)):
        share = torch.bincount(row, minlength=6) / n
        assert (share[truth == 0] == 0).all(), "an id of probability 0"
        assert ((share - truth).abs() <= 4 * (truth * (1 - truth) / n).sqrt()).all(), f"{share} where {truth} was asked"
    for u in (0.0, 1 - 2**-24):                             # the ends of what torch.rand gives
        monkeypatch.setattr(torch, "rand", lambda shape: torch.full(shape, u))
        assert (p.gather(1, ar_transformer.draw_ids(p)[:, None]) > 0).all(), f"an id of probability 0 at u = {u}"


def test_categorical_head_filters_as_the_authors(monkeypatch):
    g, seen, draw = golden("llamagen/logit_filter"), [], ar_transformer.draw_ids
    head = ar_transformer.CategoricalHead(1, 1)
    head.proj = nn.Identity()                               # the arrays hold logits
    monkeypatch.setattr(ar_transformer, "draw_ids", lambda p: seen.append(p[..., 0, :]) or draw(p))
    for key in [k for k in g if k.startswith("out/filtered") or k.startswith("out/ties")]:
        k, p = re.search(r"k(\d+)", key), re.search(r"_p([\d.e-]+)", key)
        head.sample(g["in/ties" if "ties" in key else "in/logits"], top_k=int(k[1]) if k else 0, top_p=float(p[1]) if p else 1.0)
        assert torch.allclose(seen[-1], g[key].softmax(-1), atol=1e-6), key
    head.sample(g["in/logits"], temperature=0.7, top_k=10, top_p=0.6)
    assert torch.allclose(seen[-1], g["out/probs_T0.7_k10_p0.6"], atol=1e-6) and len(seen) >= 9


def test_llamagen_from_official_reads_files_and_names_keys(tmp_path):
    model, g, sd = llamagen("gpt_c2i_train")
    cls, options = ar_transformer.ARTransformer, dict(n_head=4, grid=(4, 4))
    same = lambda other: all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items()) and not other.training
    torch.save({"model": {f"module._orig_mod.{k}": v for k, v in sd.items()}, "steps": 7}, tmp_path / "c2i_B_256.pt")   # DDP
    torch.save(sd, tmp_path / "c2i_XXL_384.pt")             # FSDP
    for name in ("c2i_B_256.pt", "c2i_XXL_384.pt"):
        assert same(cls.from_official(tmp_path / name, **options))
    half = {k: v / 2 for k, v in sd.items()}
    assert same(cls.from_official({"model": half, "ema": sd}, **options))
    assert cls.from_official(sd, n_head=8, grid=(2, 3)).seq_len == 6
    for lost in ("layers.1.feed_forward.w2.weight", "cls_embedding.embedding_table.weight", "output.weight", "tok_embeddings.weight"):
        with pytest.raises(ValueError, match=f"missing.*{lost}"):
            cls.from_official({k: v for k, v in sd.items() if k != lost}, **options)
    with pytest.raises(ValueError, match="unknown.*layers.0.attention.kv_cache.k_cache"):
        cls.from_official(sd | {"layers.0.attention.kv_cache.k_cache": torch.zeros(1)}, **options)
    with pytest.raises(ValueError, match="n_head="):
        cls.from_official(sd)


@pytest.mark.parametrize("name, of_classes, of_captions", [
    ("gpt-b", 110_888_448, 112_282_368), ("gpt-l", 342_910_976, 345_031_680), ("gpt-xl", 774_699_520, 777_678_080),
    ("gpt-xxl", 1_410_972_672, 1_414_940_160), ("gpt-3b", 3_096_659_200, 3_110_249_600)])
def test_llamagen_of_the_paper_has_its_parameter_count(name, of_classes, of_captions):
    for text, count in ((None, of_classes), ((120, 2048), of_captions)):
        with torch.device("meta"):
            head = ar_transformer.CategoricalHead(ar_transformer.SIZES[name]["n_embd"], 16384)
            model = ar_transformer.ARTransformer(head, 256, 1000, vocab_size=16384, text=text, **ar_transformer.SIZES[name])
        assert sum(p.numel() for p in model.parameters()) == count


def slow_llama(config, sd, ids):
    """A Llama as transformers has it, written down once more: two halves of a head turn against each other -> logits."""
    B, S = ids.shape
    heads, width = config["num_attention_heads"], config["head_dim"]
    norm = lambda x, name: x * (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]) ** -0.5 * sd[name]
    if "model.rotary_emb.cos" in sd:
        cos, sin = sd["model.rotary_emb.cos"][:S], sd["model.rotary_emb.sin"][:S]
    else:
        angle = torch.arange(S)[:, None] / config["rope_theta"] ** (torch.arange(0, width, 2) / width)
        cos, sin = torch.cat([angle, angle], 1).cos(), torch.cat([angle, angle], 1).sin()
    turn = lambda x: x * cos + torch.cat([-x[..., width // 2:], x[..., :width // 2]], -1) * sin
    x = sd["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        w = lambda name: sd[f"model.layers.{i}.{name}.weight"]
        n = norm(x, f"model.layers.{i}.input_layernorm.weight")
        q, k, v = ((n @ w(f"self_attn.{c}_proj").T).view(B, S, heads, width).transpose(1, 2) for c in "qkv")
        score = (turn(q) @ turn(k).transpose(2, 3) / width ** 0.5).masked_fill(torch.ones(S, S).triu(1).bool(), -math.inf)
        x = x + (score.softmax(-1) @ v).transpose(1, 2).reshape(B, S, -1) @ w("self_attn.o_proj").T
        n = norm(x, f"model.layers.{i}.post_attention_layernorm.weight")
        x = x + (F.silu(n @ w("mlp.gate_proj").T) * (n @ w("mlp.up_proj").T)) @ w("mlp.down_proj").T
    return norm(x, "model.norm.weight") @ sd["lm_head.weight"].T


def exported(kind):
    """A model on a line (stock Llama) or the authors' on a grid, and ids for transformers: the class, then the tokens."""
    if kind == "line":
        model = small_ar(False, grid=(12,), n_head=4).eval()
        nn.init.normal_(model.head.proj.weight, std=0.3)
        for block in model.blocks:
            nn.init.normal_(block.norm1.weight), nn.init.normal_(block.attn.wqkv.weight)
    else:
        model, _, _ = llamagen("gpt_c2i_train")
    x, cond = torch.randint(model.vocab_size, (3, model.seq_len)), torch.tensor([0, 3, model.num_classes])
    return model, x, cond, torch.cat([model.vocab_size + cond[:, None], x[:, :-1]], 1)


@pytest.mark.parametrize("kind", ["line", "grid"])
@torch.no_grad()
def test_llama_export_has_equal_logits_in_a_llama_written_down_once_more(kind):
    model, x, cond, ids = exported(kind)
    config, generation, sd = ar_transformer.to_llama(model)
    logits = slow_llama(config, sd, ids)
    close(logits[..., :model.vocab_size], model.logits(x, cond))
    assert (logits[..., model.vocab_size:] == 0).all() and logits.shape[-1] == config["vocab_size"]
    assert generation["suppress_tokens"] == list(range(model.vocab_size, config["vocab_size"]))
    assert (config["architectures"] == ["LlamaForCausalLM"]) == (kind == "line") == ("model.rotary_emb.cos" not in sd)
    with pytest.raises(ValueError, match="learned places"):
        ar_transformer.to_llama(small_ar())


@pytest.mark.parametrize("kind", ["line", "grid"])
@torch.no_grad()
def test_llama_export_is_what_transformers_reads(kind, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    model, x, cond, ids = exported(kind)
    monkeypatch.setattr(ar_transformer, "load_for_export", lambda *_: model)
    ar_transformer.export("unused", tmp_path / "llama")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama", trust_remote_code=True).eval()
    assert type(theirs).__name__ == ("LlamaForCausalLM" if kind == "line" else "LlamaGenForCausalLM")
    close(theirs(ids).logits[..., :model.vocab_size], model.logits(x, cond))
    tokens = theirs.generate(ids[:, :1], do_sample=False)[:, 1:]                            # with their cache
    assert torch.equal(tokens, model.sample(cond, top_k=1))


def test_llama_export_of_files_and_runs(tmp_path, monkeypatch):
    model, _, sd = llamagen("gpt_c2i_train")
    torch.save({"model": sd}, tmp_path / "c2i.pt")
    assert torch.equal(ar_transformer.load_for_export(tmp_path / "c2i.pt", (4, 4), 4).rope, model.rope)
    ours = ar_transformer.ARTransformer(ar_transformer.CategoricalHead(128, 9), 6, 4, vocab_size=9, grid=(2, 3), **ar_transformer.SIZES["tiny"])
    nn.init.normal_(ours.head.proj.weight)
    run = dict(flags=dict(generator="ar", head="categorical", size="tiny"), ema={f"module.{k}": v for k, v in ours.state_dict().items()})
    torch.save(run | {"ema": run["ema"] | {"n_averaged": torch.tensor(3)}}, tmp_path / "ckpt.pt")
    x, cond = torch.randint(9, (2, 6)), torch.tensor([0, 4])
    assert torch.equal(ar_transformer.load_for_export(tmp_path, (2, 3)).logits(x, cond), ours.eval().logits(x, cond))
    with pytest.raises(ValueError, match="--grid"):
        ar_transformer.load_for_export(tmp_path)
    torch.save(run | dict(flags=dict(generator="ar", head="gmm")), tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="categorical"):
        ar_transformer.load_for_export(tmp_path, (2, 3))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        ar_transformer.export(tmp_path / "c2i.pt", tmp_path / "out", (4, 4), 4)


@pytest.mark.parametrize("condition", [dict(), dict(text=(6, "bytes")), dict(prefix=(6, 5))])
@pytest.mark.parametrize("continuous", [True, False])
def test_ar_three_ways_to_decode_are_one(condition, continuous):
    """Cache cut to the filled part, no cache, static shapes compiled without a graph break; guidance off, on, at first only."""
    torch.compiler.reset()
    model = small_ar(continuous, zero_prefix=not continuous, **condition).eval()
    if not continuous:
        nn.init.normal_(model.head.proj.weight)
    cond = {"text": ar_transformer.bytes_of(["a", "ring", "", "a star"], 6), "prefix": torch.randn(4, 6, 5)}
    cond = cond[next(iter(condition))] if condition else torch.arange(4)
    for cfg, interval in ((1.0, -1), (3.0, -1), (3.0, 2)):
        drawn = []
        for way in WAYS.values():
            torch.manual_seed(3)
            drawn.append(model.sample(cond, cfg=cfg, cfg_interval=interval, **way))
        assert drawn[0].float().std() > 0 and all(torch.allclose(drawn[0].float(), x.float(), atol=1e-3) for x in drawn[1:])
        if cfg > 1 and interval < 0:
            everything = drawn[0]
    assert not torch.equal(everything, drawn[0]), "the guided interval ended"
    assert torch.equal(everything[:, :3], drawn[0][:, :3]), "c = 2 guides the first 4 tokens, as LlamaGen counts"


def test_ar_token_dropout_covers_the_class_too():
    model = small_ar(False, n_layer=0, dropout=0.5, label_drop=0)
    zeros = model.hidden(torch.zeros(400, 12, dtype=torch.long), torch.zeros(400, dtype=torch.long)).eq(0).float().mean((0, 2))
    assert zeros.shape == (12,) and (zeros - 0.5).abs().max() < 0.03, "LlamaGen drops from the whole embedded sequence"


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
    model.caption.place.data[:10] += 5                      # places where the first two captions have no text
    model.caption.none += 5
    changed = (model.logits(x, cond) - logits).abs().amax((1, 2))
    assert (changed[:2] == 0).all() and changed[2] > 1e-3
    nothing = torch.ones(3, dtype=torch.bool)
    h = model.hidden(x, cond, nothing)
    assert torch.allclose(h[0], h[2], atol=1e-5), "a hidden caption leaves no trace, not even its length"
    model.train()
    model.label_drop = 0.5
    torch.manual_seed(0)
    loss = model(x, cond)[0]
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.caption.parameters())
    assert "caption.none" in model.state_dict()


def test_ar_learns_what_captions_say():
    text = ar_transformer.captions_of(ar_transformer.bars_and_stripes(2000, "cpu").unique(dim=0))
    assert len(set(text)) == 30 and "rows 1 and 3 dark" in text and "column 2 dark" in text
    _, curve = ar_transformer.read_captions("cpu", 600)
    _, told, untold = curve[-1]
    assert told < 0.5, f"{told:.2f} nats are left when the caption tells the picture"
    assert math.log(30) - 1e-3 <= untold < 1.06 * math.log(30), f"{untold:.3f} nats without a caption, ln 30 = 3.401 is the least"


def opinions(head):
    for name, p in head.named_parameters():
        if "proj" in name:
            nn.init.normal_(p, std=0.5)
    return head


@pytest.mark.parametrize("groups, V, base", [(1, 9, 9), (2, 16, 4), (3, 27, 3)])
def test_groups_are_a_product_of_softmaxes(groups, V, base):
    head, h, null = opinions(ar_transformer.CategoricalHead(6, V, groups)), torch.randn(6), torch.randn(6)
    digits = lambda i: [i // base ** g % base for g in range(groups)]                       # the lowest first
    rows = head.proj.weight.detach().view(groups, base, 6)
    factors = [D.Categorical(logits=row @ h) for row in rows]
    slow = torch.stack([sum(f.log_prob(torch.tensor(d)) for f, d in zip(factors, digits(i))) for i in range(V)])
    ours = -head.loss(h.expand(V, -1), torch.arange(V)).detach()
    assert torch.allclose(ours, slow, atol=1e-5) and abs(ours.logsumexp(0)) < 1e-5
    assert torch.allclose(head.logits(h).log_softmax(-1), slow, atol=1e-5)
    assert torch.allclose(head.embed(torch.arange(V)), torch.stack([sum(rows[g, d] for g, d in enumerate(digits(i))) for i in range(V)]))
    guided, many = [], h.expand(2, 9000, 6)                 # each digit is guided, warmed and cut by itself
    for row in rows:
        logits = (row @ null + 1.5 * (row @ h - row @ null)) / 0.8
        guided.append(logits.masked_fill(logits < logits.topk(2).values[-1], -math.inf).log_softmax(-1))
    wanted = torch.stack([sum(f[d] for f, d in zip(guided, digits(i))) for i in range(V)])
    ids, log_p = head.sample(many, null.expand_as(many), cfg=1.5, temperature=0.8, top_k=2)
    assert ids.shape == log_p.shape == (2, 9000) and torch.allclose(log_p, wanted[ids], atol=1e-4)
    assert torch.allclose(ids.flatten().bincount(minlength=V) / 18_000, wanted.exp(), atol=0.02)
    if groups > 1:
        with pytest.raises(ValueError, match=f"such as {V}, not {V + 1}"):
            ar_transformer.CategoricalHead(6, V + 1, groups)


def test_sub_tokens_are_a_chain_over_the_bits():
    head, h = opinions(ar_transformer.SubTokenHead(16, 32, (2, 3), n_layer=2, n_head=2)), torch.randn(16)
    slow = torch.empty(32)
    for low in range(4):                                    # one row and one pair of rows at a time
        row = []
        for k, x in enumerate((h[None, None], torch.stack([h, head.embeds[0].weight[low]])[None])):
            for block in head.blocks:
                x = block(x, head.rope[:k + 1])
            row.append(head.norm(x)[0, -1] @ head.heads[k].proj.weight.T)
        for high in range(8):
            slow[low + 4 * high] = (row[0].log_softmax(-1)[low] + row[1].log_softmax(-1)[high]).detach()
    ours = -head.loss(h.expand(2, 16, 16), torch.arange(32).view(2, 16)).detach().flatten()
    assert torch.allclose(ours, slow, atol=1e-5) and abs(ours.logsumexp(0)) < 1e-5
    ids, log_p = head.sample(h.expand(20_000, 16))
    assert torch.allclose(log_p, slow[ids], atol=1e-4)
    assert torch.allclose(ids.bincount(minlength=32) / 20_000, slow.exp(), atol=0.015)
    low, _ = head.sample(h.expand(50, 16), temperature=(1e-5, 1.0))                         # a temperature for each digit
    assert len((low % 4).unique()) == 1 and len((low // 4).unique()) > 1
    null = torch.randn(50, 16)
    same, other = (torch.manual_seed(1) and head.sample(h.expand(50, 16), null, cfg=c)[0] for c in (1.0, (1.0, 4.0)))
    assert torch.equal(same % 4, other % 4) and not torch.equal(same // 4, other // 4)
    for split in ((2, 2), (5, 0), (5,)):
        with pytest.raises(ValueError, match="split"):
            ar_transformer.SubTokenHead(16, 32, split)


@pytest.mark.parametrize("kind, groups", [("ar", 2), ("ar", 3), ("split", 2), ("maskgit", 2), ("mar", 2), ("causal", 2)])
def test_generators_of_digits_start_at_ln_v_and_train_every_weight(kind, groups):
    model = grouped(kind, groups)
    V = model.vocab_size
    x, cond, step = torch.randint(V, (8, 12)), torch.arange(8) % 5, torch.optim.SGD(model.parameters(), lr=0.1)
    loss, _ = model.eval()(x, cond)
    assert abs(loss - math.log(V)) < (1e-5 if kind == "split" else 0.1)
    for _ in range(2):                                      # a head at zero lets nothing through in the first step
        step.zero_grad()
        model.train()(x, cond)[0].backward()
        step.step()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead, dead
    drawn = model.eval().sample(cond, cfg=2.0)
    assert drawn.shape == x.shape and drawn.min() >= 0 and drawn.max() < V and (drawn >= V // 2).any() and (drawn < V // 2).any()
    known = torch.arange(12) < 6
    drawn = model.sample(cond, known=x, known_mask=known.expand(8, -1))
    assert torch.equal(drawn[:, known], x[:, known]) and not torch.equal(drawn, x)


@pytest.mark.parametrize("kind, groups", [("ar", 3), ("split", 2)])
def test_digits_cached_or_not_and_their_beam(kind, groups):
    model, cond, drawn = grouped(kind, groups).eval(), torch.arange(5), []
    opinions(model.head)
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(model.sample(cond, cfg=2.0, top_k=2, use_cache=use_cache))
    assert torch.equal(*drawn) and drawn[0].unique().numel() > 3
    with torch.no_grad():
        h, x = model.hidden(drawn[0], cond), drawn[0].clone()
        x[:, 5] = (x[:, 5] + 1) % model.vocab_size
        changed = (model.hidden(x, cond) - h).abs().amax((0, 2)) > 1e-6
        assert not changed[:6].any() and changed[6], "the lowest digit is read, and not before its turn"
        tokens, log_p = model.beam_search(cond)
        assert torch.allclose(log_p, -model.head.loss(model.hidden(tokens, cond), tokens).sum(1), atol=1e-3)
    with pytest.raises(ValueError, match="in one softmax"):
        ar_transformer.to_llama(model)


def test_maskgit_of_digits_counts_all_of_them():
    """The smoothed loss over all V ids, and an accuracy that wants every digit, written out over the whole vocabulary."""
    model, cond = grouped("maskgit"), torch.zeros(3, dtype=torch.long)
    opinions(model.head)
    x = torch.randint(16, (3, 12))
    torch.manual_seed(5)
    loss, logs = model(x, cond)
    torch.manual_seed(5)
    mask = model.training_mask(3, "cpu")
    log_p = model.logits(x, cond, mask).log_softmax(-1)                                     # (3, 12, 16)
    nll = -log_p.gather(-1, x[..., None])[..., 0]
    each = (1 - model.smoothing) * nll - model.smoothing * log_p.mean(-1)
    assert torch.allclose(loss, torch.stack([each[b][mask[b]].mean() for b in range(3)]).mean(), atol=1e-5)
    assert torch.allclose(logs["nll"], nll[mask].mean(), atol=1e-5)
    assert torch.allclose(logs["accuracy"], (log_p.argmax(-1) == x)[mask].float().mean())
    other = torch.where(mask, 15 - x, x)
    assert torch.equal(model.hidden(x, cond, mask), model.hidden(other, cond, mask)), "a hidden id leaks"


def test_open_magvit2_has_the_authors_logits_and_loss():
    model, g, _ = open_magvit2()
    assert (model.vocab_size, model.num_classes, model.head.split, model.training) == (256, 10, (3, 5), False)
    assert torch.equal(model.rope, g["freqs_cis"])
    ids, cond = g["idx_pre"] + (g["idx_post"] << 3), g["cls"][:, 0]                         # pre: the low bits
    rows = model.head.rows(model.hidden(ids, cond), [g["idx_pre"]])
    close(model.head.heads[0].logits(rows[..., 0, :]), g["logits_pre"], 1e-6)
    close(model.head.heads[1].logits(rows[..., 1, :]), g["logits_post"], 1e-6)
    theirs = [F.cross_entropy(g[f"logits_{n}"].flatten(0, 1), g[f"idx_{n}"].flatten()) for n in ("pre", "post")]
    close(model(ids, cond)[0].detach(), sum(theirs), 1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_open_magvit2_writes_the_authors_tokens(way):
    model, g, _ = open_magvit2()
    tokens = model.sample(g["cfg_cls"][:2, 0], cfg=g["cfg_scale"].item(), top_k=1, **WAYS[way])
    assert torch.equal(tokens % 8, g["greedy_pre"]) and torch.equal(tokens // 8, g["greedy_post"])


def test_open_magvit2_from_official_reads_files_and_names_keys(tmp_path):
    model, _, sd = open_magvit2()
    cls, options = ar_transformer.ARTransformer, dict(n_head=4, grid=(4, 4))
    whole = {f"transformer.{k}": v for k, v in sd.items()} | {"first_stage_model.encoder.conv_in.weight": torch.zeros(3)}
    torch.save({"state_dict": whole, "epoch": 3}, tmp_path / "AR_256_B.ckpt")               # theirs, with the tokenizer in it
    other = cls.from_official(tmp_path / "AR_256_B.ckpt", **options).state_dict()
    assert all(torch.equal(v, other[k]) for k, v in model.state_dict().items())
    for lost in ("pre_emb.weight", "head.1.weight", "spatial_blocks.1.feed_forward.w2.weight", "factorized_blocks.0.ffn_norm.weight"):
        with pytest.raises(ValueError, match=f"missing.*{lost}"):
            cls.from_official({k: v for k, v in sd.items() if k != lost}, **options)
    with pytest.raises(ValueError, match="unknown.*head.2.weight"):
        cls.from_official(sd | {"head.2.weight": torch.zeros(1)}, **options)
    with pytest.raises(ValueError, match="n_head="):
        cls.from_official(sd)


@pytest.mark.parametrize("name, n_layer, millions", [("gpt-l", 2, 343.6), ("gpt-xl", 3, 804.4), ("gpt-xxl", 4, 1486.7)])
def test_open_magvit2_of_the_paper_has_its_parameter_count(name, n_layer, millions):
    size = ar_transformer.SIZES[name]
    with torch.device("meta"):
        head = ar_transformer.SubTokenHead(size["n_embd"], 1 << 18, (6, 12), n_layer, size["n_head"], multiple_of=256)
        model = ar_transformer.ARTransformer(head, 256, 1000, vocab_size=1 << 18, **size)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("words, shape", [(["--groups", "2"], (16, 128)), (["--split", "2", "4"], (4, 128)),
                                          (["--groups", "3", "--generator", "maskgit"], (12, 128))])
def test_digits_are_trained_and_drawn_by_the_programs(words, shape, tiny_run, capsys):
    name = "digits" + "".join(words).replace("--", "-")
    train.main([*TINY, *RARELY, "--runs", str(tiny_run), *IDS, "--tokenizer", "lfq", "--vocab_size", "64", "--name", name, *words])
    run = train.load_run(tiny_run / name)
    head = getattr(run.generator.head, "heads", [run.generator.head])[0]
    assert head.proj.weight.shape == shape
    images = sample.draw_samples(run, torch.arange(4))
    assert images.shape == (4, 3, 16, 16) and torch.isfinite(images).all()
    assert 0 < log_of(tiny_run, name)[24] < 1.1 * math.log(64)
    sample.main([str(tiny_run / name), "--n", "3", "--top_k", "2", "--out", str(tiny_run / "x.png")])
    with pytest.raises(SystemExit, match="does not fit"):
        train.main([*TINY, *RARELY, "--runs", str(tiny_run), *IDS, "--tokenizer", "lfq", "--name", name, "--groups", "6"])


@pytest.mark.parametrize("words, sentence", [
    (["--tokenizer", "vae", "--groups", "2"], "go with --head categorical"), (["--tokenizer", "lfq", "--groups", "0"], "at least 1"),
    (["--tokenizer", "lfq", "--groups", "2", "--split", "5", "5"], "give one of them"),
    (["--tokenizer", "lfq", "--split", "5", "5", "--generator", "mar"], "use --groups 2"),
    (["--tokenizer", "vq", "--vocab_size", "1000", "--groups", "2"], "whole number to the power of 2, such as 1024"),
    (["--tokenizer", "lfq", "--groups", "3"], "--vocab_size 1024 must be"), (["--tokenizer", "lfq", "--split", "5", "6"], "add up"),
    (["--tokenizer", "titok", "--split", "9"], "two or more")])
def test_digits_that_do_not_fit_are_refused_before_anything_is_trained(words, sentence, tmp_path):
    with pytest.raises(SystemExit, match=sentence):
        train.main([*words, "--runs", str(tmp_path), "--device", "cpu"])
    assert not list(tmp_path.iterdir())
