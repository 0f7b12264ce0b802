"""Tests of official/open_magvit2.py: tiny weights made by the authors' own code, and the numbers that their
code gave.
"""
import math
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ar_transformer
import lfq
from official import open_magvit2 as official
from tests.helpers import close, golden, magvit_shapes, open_magvit2, tokens_of
from tests.test_ar_transformer import WAYS
from tests.test_factorized_head import opinions


def test_sub_tokens_are_a_chain_over_the_bits():
    head, h = opinions(official.SubTokenHead(16, 32, (2, 3), n_layer=2, n_head=2)), torch.randn(16)
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
    low, _ = head.sample(h.expand(50, 16), temperature=(1e-5, 1.0))             # a temperature for each digit
    assert len((low % 4).unique()) == 1 and len((low // 4).unique()) > 1
    null = torch.randn(50, 16)
    same, other = (torch.manual_seed(1) and head.sample(h.expand(50, 16), null, cfg=c)[0]
                   for c in (1.0, (1.0, 4.0)))
    assert torch.equal(same % 4, other % 4) and not torch.equal(same // 4, other // 4)
    for split in ((2, 2), (5, 0), (5,)):
        with pytest.raises(ValueError, match="split"):
            official.SubTokenHead(16, 32, split)


def test_open_magvit2_has_the_authors_logits_and_loss():
    model, g, _ = open_magvit2()
    assert (model.vocab_size, model.num_classes, model.head.split, model.training) == (256, 10, (3, 5), False)
    assert torch.equal(model.rope, g["freqs_cis"])
    ids, cond = g["idx_pre"] + (g["idx_post"] << 3), g["cls"][:, 0]                        # pre: the low bits
    rows = model.head.rows(model.hidden_states(ids, cond), [g["idx_pre"]])
    close(model.head.heads[0].logits(rows[..., 0, :]), g["logits_pre"], 1e-6)
    close(model.head.heads[1].logits(rows[..., 1, :]), g["logits_post"], 1e-6)
    theirs = [
        F.cross_entropy(g[f"logits_{n}"].flatten(0, 1), g[f"idx_{n}"].flatten()) for n in ("pre", "post")
    ]
    close(model(ids, cond)[0].detach(), sum(theirs), 1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_open_magvit2_writes_the_authors_tokens(way):
    model, g, _ = open_magvit2()
    tokens = model.sample(g["cfg_cls"][:2, 0], cfg=g["cfg_scale"].item(), top_k=1, **WAYS[way])
    assert torch.equal(tokens % 8, g["greedy_pre"]) and torch.equal(tokens // 8, g["greedy_post"])


def test_open_magvit2_from_official_reads_files_and_names_keys(tmp_path):
    model, _, sd = open_magvit2()
    options = dict(n_head=4, grid=(4, 4))
    whole = {f"transformer.{k}": v
             for k, v in sd.items()} | {"first_stage_model.encoder.conv_in.weight": torch.zeros(3)}
    # theirs, with the tokenizer in it
    torch.save({"state_dict": whole, "epoch": 3}, tmp_path / "AR_256_B.ckpt")
    other = official.load_gpt(tmp_path / "AR_256_B.ckpt", **options).state_dict()
    assert all(torch.equal(v, other[k]) for k, v in model.state_dict().items())
    for lost in ("pre_emb.weight", "head.1.weight", "spatial_blocks.1.feed_forward.w2.weight",
                 "factorized_blocks.0.ffn_norm.weight"):
        with pytest.raises(ValueError, match=f"missing.*{lost}"):
            official.load_gpt({k: v for k, v in sd.items() if k != lost}, **options)
    with pytest.raises(ValueError, match="unknown.*head.2.weight"):
        official.load_gpt(sd | {"head.2.weight": torch.zeros(1)}, **options)
    with pytest.raises(ValueError, match="n_head="):
        official.load_gpt(sd)


@pytest.mark.parametrize("name, n_layer, millions", [("gpt-l", 2, 343.6), ("gpt-xl", 3, 804.4),
                                                     ("gpt-xxl", 4, 1486.7)])
def test_open_magvit2_of_the_paper_has_its_parameter_count(name, n_layer, millions):
    size = ar_transformer.SIZES[name]
    with torch.device("meta"):
        model = official.build_gpt(256, 1000, (16, 16), size["n_layer"], size["n_head"], size["n_embd"],
                                   (6, 12), n_layer, multiple_of=256)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_sub_tokens_are_drawn_alike_with_a_cache_and_without():
    model = official.build_gpt(12, 5, (3, 4), 2, 2, 32, (1, 3), 1).eval()
    opinions(model.head)
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(model.sample(torch.arange(5), cfg=2.0, top_k=2, use_cache=use_cache))
    assert torch.equal(*drawn) and drawn[0].unique().numel() > 3


def test_a_generator_of_sub_tokens_starts_at_ln_v_and_trains_every_weight():
    model = official.build_gpt(12, 5, (3, 4), 2, 2, 32, (1, 3), 1)
    model.label_drop = 0
    x = torch.randint(16, (8, 12))
    cond = torch.arange(8) % 5
    loss, _ = model.eval()(x, cond)
    assert abs(loss - math.log(16)) < 1e-5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):                                 # a head at zero lets nothing through in the first step
        optimizer.zero_grad()
        model.train()(x, cond)[0].backward()
        optimizer.step()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead, dead


def magvit_weights(ch_mult, video):
    """The weights behind golden/tokenizers/*_tokenizer_tiny.npz, by the recipe in the README there."""
    sd = {}
    for part, name, shape in magvit_shapes(32, ch_mult, 1, 6, video):
        w = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(
            np.float32) * np.float32(0.05)
        sd[f"{part}.{name}"] = torch.from_numpy(w + (w.ndim == 1 and name.endswith("weight")))
    return sd


@pytest.mark.parametrize("kind", ["image", "video"])
def test_open_magvit2s_tokenizer_loads_and_gets_the_authors_numbers(kind):
    video, g = kind == "video", golden(f"tokenizers/{kind}_tokenizer_tiny")
    sd = magvit_weights((1, 2, 2) if video else (1, 1, 2), video)
    ema = {"model_ema." + k.replace(".", ""): v for k, v in sd.items()} | {"model_ema.decay": torch.ones(())}
    ema |= {"loss.discriminator.main.0.weight": torch.ones(1), "quantize.mask": torch.ones(6)}
    stale = {k: v + 1 for k, v in sd.items()}
    model = official.load_tokenizer({"state_dict": stale | ema}, image_size=16, frames=9 if video else None)
    assert model.grid == ((5, 4, 4) if video else (4, 4)) and model.vocab_size == 64 and not model.training
    z, q = tokens_of(g["z"].flatten(2)[..., None]), tokens_of(g["q"].flatten(2)[..., None])
    with torch.no_grad():
        close(model.latents(g[kind]), z), close(model.decode_raw(q), g["recon"])
    ids = model.encode(g[kind])
    assert torch.equal(lfq.codes(ids, 6), q)
    close(model.decode(ids), g["recon"].clamp(-1, 1))
    plain = official.load_tokenizer(sd, image_size=16)
    assert torch.equal(plain.encode(g[kind]), ids), "without averaged weights: the plain ones"
    if video:
        frame = g["video"][:, :, 0]
        with torch.no_grad():
            close(model.latents(frame), tokens_of(g["z_image"].flatten(2)[..., None]))
        close(model.decode(model.encode(frame)), g["recon_image"][:, :, 0].clamp(-1, 1))
        for module in model.modules():
            if isinstance(module, lfq.FrameNorm):
                module.per_frame = True
        with torch.no_grad():
            close(model.latents(g["video"]), tokens_of(g["z_perframe_gn"].flatten(2)[..., None]))


def test_open_magvit2s_tokenizer_names_the_key_that_does_not_fit(tmp_path):
    sd = magvit_weights((1, 1, 2), video=False)
    torch.save({"state_dict": sd}, tmp_path / "imagenet.ckpt")
    assert official.load_tokenizer(tmp_path / "imagenet.ckpt").seq_len == 64 * 64
    with pytest.raises(ValueError, match="decoder.extra.weight"):
        official.load_tokenizer(sd | {"decoder.extra.weight": torch.zeros(1)})
    for key in ("decoder.adaptive.1.gamma.bias", "encoder.conv_in.weight",
                "decoder.up.2.upsample.conv1.weight"):
        with pytest.raises(ValueError, match=key):
            official.load_tokenizer({k: v for k, v in sd.items() if k != key})
    ema = {"model_ema." + k.replace(".", ""): v for k, v in sd.items() if k != "encoder.conv_out.bias"}
    with pytest.raises(ValueError, match="model_ema.encoderconv_outbias"):
        official.load_tokenizer(sd | ema)
