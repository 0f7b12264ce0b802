"""Tests of official/llamagen.py: tiny weights made by the authors' own code, and the numbers that their code
gave.
"""
import math
import re
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import ar_transformer
from official import llamagen as official
from tests.helpers import close, golden, llamagen
from tests.test_ar_transformer import WAYS, replay, small_ar


def check_gradients(model, g):
    theirs = {ours: key for key, ours in official.names_of(model, official.NAMES).items()}
    ours = {theirs[k]: p.grad for k, p in model.named_parameters()}
    keys = [k for k in g if k.startswith("grad/")]
    assert len(keys) >= 2
    for key in keys:
        close(ours[key[5:]], g[key])


def test_llamagen_of_classes_has_the_authors_logits_loss_and_gradients():
    model, g, _ = llamagen("gpt_c2i_train")
    model.train()
    model.label_drop = 0
    close(model.logits(g["in/idx"], g["in/cls"]), g["out/logits_train"], 1e-5)
    assert torch.equal(model.eval().logits(g["in/idx"], g["in/cls"]),
                       model.train().logits(g["in/idx"], g["in/cls"]))
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
    assert torch.equal(model.caption.padding_mask(feat), g["in/emb_mask"].bool())
    assert torch.equal(model.caption.padding_mask(feat, drop),
                       g["in/emb_mask"].bool()), "no caption: the padding stays, as published"
    assert torch.equal(model.attention_mask(model.positions, 22, model.padding_mask(feat)),
                       g["out/attn_mask"].bool())
    close(model.prefix(feat), g["out/caption_emb"], 1e-5)
    close(model.prefix(feat, drop), g["out/caption_emb_dropped"], 1e-5)
    close(model.logits(g["in/idx"], feat), g["out/logits_train"], 1e-5)
    loss, _ = model(g["in/idx"], feat)
    close(loss.detach(), g["out/loss_unmasked_mean"], 1e-5)
    # the third sample is not valid
    each = model.head.loss(model.hidden_states(g["in/idx"], feat), g["in/idx"]).mean(1)
    loss = (each * g["in/valid"]).sum() / g["in/valid"].sum()
    loss.backward()
    close(loss.detach(), g["out/loss"], 1e-5)
    check_gradients(model, g)


def test_llamagen_rope_is_the_authors():
    g = golden("llamagen/rope")
    for key in [k for k in g if k.startswith("out/freqs2d")]:
        side, width, prefix = map(int, re.findall(r"\d+", key)[1:])
        table = ar_transformer.rope_table((side, side), width, prefix)
        table[:prefix] = 0                                  # official.parity
        assert torch.allclose(table, g[key], atol=2e-5), key
    close(ar_transformer.rotate(g["in/x"], g["out/freqs2d_grid4_hd8_cls1"]), g["out/x_rot_grid4_hd8_cls1"],
          1e-5)
    line = ar_transformer.rope_table((16,), 8, 1)           # ours counts the prefix: one turn more
    turn = lambda table: torch.view_as_complex(table.contiguous())
    theirs = turn(g["out/freqs1d_len16_hd8_cls1"])[1:] * turn(ar_transformer.rope_table((16,), 8, 1))[1]
    assert torch.allclose(turn(line)[1:], theirs, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind, cfg, interval", [("c2i", 1.0, -1), ("c2i", 3.0, -1), ("c2i", 3.0, 5),
                                                 ("t2i", 1.0, -1), ("t2i", 3.0, -1)])
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
    keep = torch.cat(
        [model.padding_mask(g["in/feat"]),
         model.padding_mask(g["in/feat"], torch.ones(3, dtype=torch.bool))])
    # row by row, as decode_step
    ours = torch.cat([model.attention_mask(model.positions[t:t + 1], 22, keep) for t in range(22)], 2)
    assert torch.equal(ours[:, 0], g["out/causal_mask_cfg3"][:, :22, :22].bool())


def test_categorical_head_filters_as_the_authors(monkeypatch):
    g, seen, draw = golden("llamagen/logit_filter"), [], ar_transformer.draw_ids
    head = ar_transformer.CategoricalHead(1, 1)
    head.proj = nn.Identity()                               # the arrays hold logits
    monkeypatch.setattr(ar_transformer, "draw_ids", lambda p: seen.append(p) or draw(p))
    for key in [k for k in g if k.startswith("out/filtered") or k.startswith("out/ties")]:
        k, p = re.search(r"k(\d+)", key), re.search(r"_p([\d.e-]+)", key)
        head.sample(g["in/ties" if "ties" in key else "in/logits"], top_k=int(k[1]) if k else 0,
                    top_p=float(p[1]) if p else 1.0)
        assert torch.allclose(seen[-1], g[key].softmax(-1), atol=1e-6), key
    head.sample(g["in/logits"], temperature=0.7, top_k=10, top_p=0.6)
    assert torch.allclose(seen[-1], g["out/probs_T0.7_k10_p0.6"], atol=1e-6) and len(seen) >= 9


def test_llamagen_from_official_reads_files_and_names_keys(tmp_path):
    model, g, sd = llamagen("gpt_c2i_train")
    options = dict(n_head=4, grid=(4, 4))
    same = lambda other: all(torch.equal(v,
                                         other.state_dict()[k])
                             for k, v in model.state_dict().items()) and not other.training
    # DDP
    torch.save({"model": {f"module._orig_mod.{k}": v
                          for k, v in sd.items()}, "steps": 7}, tmp_path / "c2i_B_256.pt")
    torch.save(sd, tmp_path / "c2i_XXL_384.pt")             # FSDP
    for name in ("c2i_B_256.pt", "c2i_XXL_384.pt"):
        assert same(official.load_gpt(tmp_path / name, **options))
    half = {k: v / 2 for k, v in sd.items()}
    assert same(official.load_gpt({"model": half, "ema": sd}, **options))
    assert official.load_gpt(sd, n_head=8, grid=(2, 3)).seq_len == 6
    for lost in ("layers.1.feed_forward.w2.weight", "cls_embedding.embedding_table.weight", "output.weight",
                 "tok_embeddings.weight"):
        with pytest.raises(ValueError, match=f"missing.*{lost}"):
            official.load_gpt({k: v for k, v in sd.items() if k != lost}, **options)
    with pytest.raises(ValueError, match="unknown.*layers.0.attention.kv_cache.k_cache"):
        official.load_gpt(sd | {"layers.0.attention.kv_cache.k_cache": torch.zeros(1)}, **options)
    with pytest.raises(ValueError, match="n_head="):
        official.load_gpt(sd)


@pytest.mark.parametrize("name, of_classes, of_captions", [("gpt-b", 110_888_448, 112_282_368),
                                                           ("gpt-l", 342_910_976, 345_031_680),
                                                           ("gpt-xl", 774_699_520, 777_678_080),
                                                           ("gpt-xxl", 1_410_972_672, 1_414_940_160),
                                                           ("gpt-3b", 3_096_659_200, 3_110_249_600)])
def test_llamagen_of_the_paper_has_its_parameter_count(name, of_classes, of_captions):
    for text, count in ((None, of_classes), ((120, 2048), of_captions)):
        with torch.device("meta"):
            head = ar_transformer.CategoricalHead(ar_transformer.SIZES[name]["n_embd"], 16384)
            model = ar_transformer.ARTransformer(head, 256, 1000, vocab_size=16384, text=text,
                                                 **ar_transformer.SIZES[name])
        assert sum(p.numel() for p in model.parameters()) == count


def slow_llama(config, sd, ids):
    """A Llama as transformers has it, written down once more: two halves of a head turn against each other ->
    logits.
    """
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
        score = (turn(q) @ turn(k).transpose(2, 3) / width**0.5).masked_fill(
            torch.ones(S, S).triu(1).bool(), -math.inf)
        x = x + (score.softmax(-1) @ v).transpose(1, 2).reshape(B, S, -1) @ w("self_attn.o_proj").T
        n = norm(x, f"model.layers.{i}.post_attention_layernorm.weight")
        x = x + (F.silu(n @ w("mlp.gate_proj").T) * (n @ w("mlp.up_proj").T)) @ w("mlp.down_proj").T
    return norm(x, "model.norm.weight") @ sd["lm_head.weight"].T


def exported(kind):
    """A model on a line (stock Llama) or the authors' on a grid, and ids for transformers: the class, then
    the tokens.
    """
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
    config, generation, sd = official.to_llama(model)
    logits = slow_llama(config, sd, ids)
    close(logits[..., :model.vocab_size], model.logits(x, cond))
    assert (logits[..., model.vocab_size:] == 0).all() and logits.shape[-1] == config["vocab_size"]
    assert generation["suppress_tokens"] == list(range(model.vocab_size, config["vocab_size"]))
    assert (config["architectures"] == ["LlamaForCausalLM"]) == (kind == "line") == ("model.rotary_emb.cos"
                                                                                     not in sd)
    with pytest.raises(ValueError, match="learned positions"):
        official.to_llama(small_ar())


@pytest.mark.parametrize("kind", ["line", "grid"])
@torch.no_grad()
def test_llama_export_is_what_transformers_reads(kind, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    model, x, cond, ids = exported(kind)
    monkeypatch.setattr(official, "load_for_export", lambda *_: model)
    official.export("unused", tmp_path / "llama")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama",
                                                               trust_remote_code=True).eval()
    assert type(theirs).__name__ == ("LlamaForCausalLM" if kind == "line" else "LlamaGenForCausalLM")
    close(theirs(ids).logits[..., :model.vocab_size], model.logits(x, cond))
    tokens = theirs.generate(ids[:, :1], do_sample=False)[:, 1:]                            # with their cache
    assert torch.equal(tokens, model.sample(cond, top_k=1))


def test_llama_export_of_files_and_runs(tmp_path, monkeypatch):
    model, _, sd = llamagen("gpt_c2i_train")
    torch.save({"model": sd}, tmp_path / "c2i.pt")
    assert torch.equal(official.load_for_export(tmp_path / "c2i.pt", (4, 4), 4).rope, model.rope)
    ours = ar_transformer.ARTransformer(ar_transformer.CategoricalHead(128, 9), 6, 4, vocab_size=9,
                                        grid=(2, 3), **ar_transformer.SIZES["tiny"])
    nn.init.normal_(ours.head.proj.weight)
    run = dict(done=True, flags=dict(generator="ar", head="categorical", size="tiny"),
               ema={f"module.{k}": v
                    for k, v in ours.state_dict().items()})
    torch.save(run | {"ema": run["ema"] | {"n_averaged": torch.tensor(3)}}, tmp_path / "ckpt.pt")
    x, cond = torch.randint(9, (2, 6)), torch.tensor([0, 4])
    assert torch.equal(
        official.load_for_export(tmp_path, (2, 3)).logits(x, cond),
        ours.eval().logits(x, cond))
    with pytest.raises(ValueError, match="--grid"):
        official.load_for_export(tmp_path)
    torch.save(run | dict(flags=dict(generator="ar", head="gmm")), tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="categorical"):
        official.load_for_export(tmp_path, (2, 3))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        official.export(tmp_path / "c2i.pt", tmp_path / "out", (4, 4), 4)


def test_llamagen_of_another_base_or_norm_is_told_by_keywords():
    model, _, sd = llamagen("gpt_c2i_train")
    other = official.load_gpt(sd, n_head=4, grid=(4, 4), rope_base=500.0, norm_eps=1e-6)
    assert not torch.equal(other.rope, model.rope)
    assert other.norm.eps == 1e-6
    assert other.rope_base == 500.0


def test_llamagen_with_grouped_heads_is_refused_in_a_sentence():
    _, _, sd = llamagen("gpt_c2i_train")
    key = "layers.0.attention.wqkv.weight"
    with pytest.raises(ValueError, match="grouped heads are not written here"):
        official.load_gpt(sd | {key: sd[key][:-8]}, n_head=4, grid=(4, 4))


def theirs_turn(x, base):
    """LlamaGen's 2-D rotary turns as complex numbers, written down once more: x (B, 17, heads, 8), grid 4."""
    speed = base ** -(torch.arange(0, 4, 2) / 4)            # half of a head's 4 pairs for each axis
    rows, columns = torch.arange(4).repeat_interleave(4), torch.arange(4).repeat(4)
    angle = torch.cat([rows[:, None] * speed, columns[:, None] * speed], 1)           # (16, 4)
    turn = torch.cat([torch.zeros(1, 4, dtype=torch.cfloat), torch.polar(torch.ones(16, 4), angle)])
    pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous())
    return torch.view_as_real(pairs * turn[:, None]).flatten(-2)


@torch.no_grad()
@pytest.mark.parametrize("base, eps", [(10000.0, 1e-5), (500.0, 1e-2)])
def test_llamagen_of_another_base_and_norm_has_the_logits_of_a_slow_rebuilt_network(base, eps):
    _, g, sd = llamagen("gpt_c2i_train")
    model = official.load_gpt(sd, n_head=4, grid=(4, 4), rope_base=base, norm_eps=eps)
    C = model.norm.weight.shape[0]
    assert C == 32, "8 numbers in a head"
    norm = lambda x, w: x * (x.pow(2).mean(-1, keepdim=True) + eps) ** -0.5 * w
    ids, cond = torch.randint(model.vocab_size, (3, 16)), torch.tensor([0, 2, 5])
    x = torch.cat([sd["cls_embedding.embedding_table.weight"][cond][:, None],
                   sd["tok_embeddings.weight"][ids]], 1)
    for i in range(len(model.blocks)):
        w = lambda name: sd[f"layers.{i}.{name}.weight"]
        n = norm(x, w("attention_norm"))
        q, k, v = (y.view(3, 17, 4, 8) for y in (n @ w("attention.wqkv").T).chunk(3, -1))
        q, k = theirs_turn(q, base).transpose(1, 2), theirs_turn(k, base).transpose(1, 2)
        score = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(torch.ones(17, 17).triu(1).bool(), -math.inf)
        y = (score.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).reshape(3, 17, C)
        x = x + y @ w("attention.wo").T
        n = norm(x, w("ffn_norm"))
        x = x + (F.silu(n @ w("feed_forward.w1").T) * (n @ w("feed_forward.w3").T)) @ w("feed_forward.w2").T
    logits = norm(x, sd["norm.weight"]) @ sd["output.weight"].T
    close(model.logits(ids, cond), logits[:, :16], 1e-4)
