"""Tests of official/titok.py: tiny weights made by the authors' own code, and the numbers that their code
gave.
"""
import argparse
import math
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import maskgit
import titok
from official import titok as official
from tests.helpers import close, golden, titok_golden, tokens_of


@torch.no_grad()
def test_titok_first_stage_is_the_authors_with_its_legacy_reshape():
    g, sd, model, images = titok_golden("legacy_vq_stage1")
    assert (model.seq_len, model.grid, model.vocab_size, model.token_dim, model.stage) == (8, (8, ), 64, None,
                                                                                           "proxy")
    z = model.encoder(images)
    close(F.normalize(z, dim=-1), F.normalize(tokens_of(g["z"]), dim=-1)), close(z, tokens_of(g["z"]))
    q, ids, loss, logs = model.quantizer(z)
    close(q, tokens_of(g["z_quantized"])), close(loss,
                                                 g["quantizer_loss"]), close(logs["commit"],
                                                                             g["commitment_loss"])
    assert torch.equal(ids, g["indices"][:, 0]) and torch.equal(model.encode(images), ids)
    close(model.decoder(q), tokens_of(g["decoded"]))
    model.proxy = argparse.Namespace(encode=lambda images: g["proxy_codes"])
    loss, logs = model(images)
    close(logs["proxy_nats"], g["stage1_ce"]), close(loss, g["stage1_ce"] + g["quantizer_loss"])
    shuffled = model.encoder.out
    model.encoder.out = torch.nn.Linear(shuffled.in_features, shuffled.out_features)
    model.encoder.out.load_state_dict(shuffled.state_dict())
    assert (model.encoder(images) - z).abs().max() > 0.1, "transposing is not what their weights are used to"


@torch.no_grad()
def test_titok_of_pixels_is_the_authors():
    g, sd, model, images = titok_golden("vq_pixels")
    assert (model.seq_len, model.vocab_size, model.stage, model.quantizer.l2_norm) == (8, 128, "pixels",
                                                                                       False)
    z = model.encoder(images)
    q, ids, loss, logs = model.quantizer(z)
    close(z, tokens_of(g["z"])), close(q, tokens_of(g["z_quantized"])), close(loss, g["quantizer_loss"])
    assert torch.equal(model.encode(images), g["indices"][:, 0])
    close((model.decode_raw(q) + 1) / 2, g["decoded"])
    assert torch.allclose(model.decode(ids), (2 * g["decoded"] - 1).clamp(-1, 1), atol=1e-4)
    loss_, logs = model(images)
    close(logs["mse"], 4 * F.mse_loss(g["decoded"], g["image"]), 1e-4), close(loss_, logs["mse"] + loss)


@torch.no_grad()
def test_titok_vae_is_the_authors(monkeypatch):
    g, sd, model, images = titok_golden("vae")
    assert isinstance(model,
                      titok.TiTokVAE) and (model.token_dim, model.vocab_size, model.seq_len) == (16, None, 8)
    mean, std = model.posterior(images)
    close(model.encoder(images), tokens_of(g["moments"])), close(mean, tokens_of(g["mean"]))
    close(std, tokens_of(g["logvar"]).mul(0.5).exp()), close(model.kl(mean, std), g["kl"])
    close((model.decode_raw(mean) + 1) / 2, g["decoded_mode"])
    monkeypatch.setattr(torch, "randn_like", lambda x: tokens_of(g["noise"]))
    close(model.reparameterise(mean, std), tokens_of(g["sample"]))
    recon, auxiliary, logs = model.reconstruct(images)
    close((recon + 1) / 2, g["decoded_sample"]), close(logs["kl"], g["kl"].mean())
    close(auxiliary, model.beta * g["kl"].sum(1).mean() / images[0].numel())


def maskgit_vqgan(levels=2, n_res=1, c=32, encoder=True):
    """MaskGIT's VQGAN in the authors' layout, with weights made by the golden file's recipe -> state dict."""
    def fill(part, shapes):
        for name, shape in shapes.items():
            w = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(
                np.float32) * 0.05
            sd[f"{part}.{name}"] = torch.from_numpy(w + float(len(shape) == 1 and name.endswith("weight")))
    def block(name, a, b):
        shapes = {
            f"{name}.norm1.weight": (a, ), f"{name}.norm1.bias": (a, ), f"{name}.conv1.weight": (b, a, 3, 3),
            f"{name}.norm2.weight": (b, ), f"{name}.norm2.bias": (b, ), f"{name}.conv2.weight": (b, b, 3, 3)
        }
        return shapes | ({f"{name}.nin_shortcut.weight": (b, b, 1, 1)} if a != b else {})

    end = lambda c, out, k: {
        "norm_out.weight": (c, ), "norm_out.bias": (c, ), "conv_out.weight": (out, c, k, k),
        "conv_out.bias": (out, )
    }
    sd = {}
    if encoder:
        fill("encoder", {"conv_in.weight": (c, 3, 3, 3)} | block("down.0.block.0", c, c)
             | block("down.1.block.0", c, 2 * c)
             | block("mid.0", 2 * c, 2 * c) | end(2 * c, 8, 1))
    fill(
        "decoder", {
            "conv_in.weight": (2 * c, 8, 3, 3), "conv_in.bias": (2 * c, ),
            "up.1.upsample_conv.weight": (2 * c, 2 * c, 3, 3), "up.1.upsample_conv.bias": (2 * c, )
        } | block("mid.0", 2 * c, 2 * c) | block("up.1.block.0", 2 * c, 2 * c)
        | block("up.0.block.0", 2 * c, c) | end(c, 3, 3))
    return sd


@torch.no_grad()
def test_maskgit_vqgan_is_the_authors():
    g = golden("tokenizers/maskgit_vqgan_tiny")
    sd = maskgit_vqgan() | {"quantize.embedding.weight": g["codebook"]}
    model, images = official.load_maskgit_vqgan(sd, grid=(8, 8)), 2 * g["image"] - 1
    close(model.latents(images), tokens_of(g["h"]))
    q, ids, loss, _ = model.quantizer(model.latents(images))
    assert torch.equal(ids, g["indices"]) and torch.equal(model.encode(images), ids)
    close(q, tokens_of(g["z_q"])), close(loss, g["loss"]), close((model.decode_raw(q) + 1) / 2, g["recon"])
    close(model.encoder[0](g["odd_image"]), g["odd_conv"])
    with pytest.raises(ValueError, match="decoder.up.1.upsample_conv.bias"):
        official.load_maskgit_vqgan({k: v for k, v in sd.items() if k != "decoder.up.1.upsample_conv.bias"})
    with pytest.raises(ValueError, match="encoder.extra"):
        official.load_maskgit_vqgan(sd | {"encoder.extra": torch.zeros(1)})


def test_titok_mixes_the_proxys_codes_as_the_authors_and_trains_both_decoders_only():
    g = golden("tokenizers/titok_stage2_softcode")
    stage1 = titok_golden("legacy_vq_stage1")[1]
    with torch.no_grad():
        codes = titok.VectorQuantizer(*g["codebook"].shape, l2_norm=False)
        codes.codebook.copy_(g["codebook"])
        proxy = argparse.Namespace(quantizer=codes, decode_raw=lambda q: q, grid=(2, 2), vocab_size=64)
        holder = argparse.Namespace(decoder=lambda q: tokens_of(g["logits"]), proxy=proxy)
        holder.decoder = type("Decoder", (),
                              dict(__call__=lambda self, q: tokens_of(g["logits"]), proxy_vocab=64))()
        close(titok.TiTok.decode_raw(holder, g["logits"]), tokens_of(g["soft"]))
        hard = F.one_hot(torch.arange(4)[None], 64).float() * 1e4
        holder.decoder = type("Decoder", (), dict(__call__=lambda self, q: hard, proxy_vocab=64))()
        close(titok.TiTok.decode_raw(holder, g["logits"]), g["codebook"][None, :4])
    pixel = maskgit_vqgan(encoder=False) | {"quantize.embedding.weight": torch.randn(1024, 8)}
    pixel = {
        "pixel_" + k if k.startswith("decoder") else k.replace("quantize", "pixel_quantize"): v
        for k, v in pixel.items()
    }
    model = official.load_tokenizer(stage1 | pixel, n_head=4)
    images = data.draw(torch.arange(2), 64)[0]
    assert model.stage == "finetune" and model.proxy.encoder is None
    with torch.no_grad():
        assert model.decode(
            model.encode(images)).shape == (2, 3, 8, 8), "the tiny proxy doubles 4 x 4 patches only once"
        close(model.decode_raw(model.quantizer.codes(model.encode(images))), model.reconstruct(images)[0])
    F.mse_loss(model.train().reconstruct(images)[0], images[:, :, ::8, ::8]).backward()
    learns = {k for k, v in model.named_parameters() if v.grad is not None and v.grad.abs().max() > 0}
    assert learns == {k for k, _ in model.named_parameters() if k.startswith(("decoder.", "proxy.decoder."))}


def test_titok_from_official_names_the_key_that_does_not_fit(tmp_path):
    _, sd, _, images = titok_golden("vq_pixels")
    torch.save(sd, tmp_path / "tokenizer.bin")
    assert official.load_tokenizer(tmp_path / "tokenizer.bin", n_head=4).encode(images).shape == (2, 8)
    for key in ("latent_tokens", "encoder.transformer.1.attn.in_proj_bias", "decoder.mask_token",
                "quantize.embedding.weight"):
        with pytest.raises(ValueError, match=key):
            official.load_tokenizer({k: v for k, v in sd.items() if k != key}, n_head=4)
    with pytest.raises(ValueError, match="decoder.extra"):
        official.load_tokenizer(sd | {"decoder.extra": torch.zeros(1)}, n_head=4)


def test_maskgit_vqgan_has_its_parameter_count():
    with torch.device("meta"):
        model = official.MaskGITVQGAN()
    count = lambda *parts: round(sum(p.numel() for part in parts for p in part.parameters()) / 1e6, 1)
    assert (count(model.encoder), count(model.decoder), count(model)) == (23.8, 30.5, 54.5)
    assert count(model.decoder, model.quantizer) == 30.7    # what a TiTok file brings along


@pytest.mark.parametrize("kind, others", [("imagebert", "encoder.layer.1.attention.self.key.bias"),
                                          ("uvitbert", "out_blocks.1.skip_linear.bias")])
def test_maskgit_loads_titoks_generators_and_gets_the_authors_logits(kind, others, tmp_path):
    g = golden(f"tokenizers/{kind}_tiny")
    sd = {k.removeprefix("sd."): v for k, v in g.items() if k.startswith("sd.")}
    model = official.load_generator(sd, n_head=4)
    assert (model.seq_len, model.vocab_size, model.num_classes,
            model.smoothing) == (16, 64, 10, 0.1) and not model.training
    mask = g["input_ids"] == 64
    assert 0 < mask.sum() < 48
    for cond, name in ((g["condition"], "cond"), (torch.full((3,), 10), "uncond")):
        close(model.logits(g["input_ids"].clamp(max=63), cond, mask), g[f"logits_{name}"])
    for step in range(4):                             # guided as in their run: c + 3 (c - u) is u + 4 (c - u)
        ids = g[f"step{step}_ids_in"]
        c, u = (model.logits(ids.clamp(max=63), cond, ids == 64)
                for cond in (g["condition"], torch.full((3, ), 10)))
        close(u + 4 * (c - u), g[f"step{step}_guided_logits"])
    torch.save(sd, tmp_path / "generator.bin")
    model = official.load_generator(tmp_path / "generator.bin", n_head=4)
    y = maskgit.MaskGIT.sample(model, torch.tensor([3, 4]), steps=4, cfg=2.0)
    assert y.shape == (2, 16) and 0 <= y.min() and y.max() < 64
    with pytest.raises(ValueError, match="extra.weight"):
        official.load_generator(sd | {"model.extra.weight": torch.zeros(1)}, n_head=4)
    for key in ("lm_head.bias", others, "lm_head.weight"):
        with pytest.raises(ValueError, match=key):
            official.load_generator({k: v
                                     for k, v in sd.items() if k.removeprefix("model.") != key}, n_head=4)


@pytest.mark.parametrize("name, options",
                         [("const", dict(cfg=3.0, temperature=4.5, cfg_schedule="constant", anneal=False)),
                          ("linear", dict(cfg=4.5, temperature=9.5, cfg_schedule="linear")),
                          ("power", dict(cfg=6.9, temperature=2.8, cfg_schedule="power-cosine"))])
@pytest.mark.parametrize("kind", ["imagebert", "uvitbert"])
def test_maskgit_replays_titoks_sampler(kind, name, options, monkeypatch):
    """From the uniforms that their code drew: the ids, and in the constant run what is hidden after each
    pass.
    """
    g = golden(f"tokenizers/{kind}_tiny")
    model = official.load_generator({k.removeprefix("sd."): v
                                     for k, v in g.items() if k.startswith("sd.")}, n_head=4)
    noise = iter([g[f"gen_{name}_u_{kind}{i}"] for i in range(4) for kind in ("sample", "conf")])
    monkeypatch.setattr(torch, "rand", lambda *a, **k: next(noise))
    passes = []
    tokens = model.sample(g["condition"], steps=4, on_step=lambda i, x, m: passes.append((x, m)), **options)
    assert torch.equal(tokens, g[f"gen_{name}_tokens"])
    if name == "const":
        for i, (x, mask) in enumerate(passes[:3]):
            assert torch.equal(torch.where(mask, 64, x),
                               g[f"step{i + 1}_ids_in"]), f"after pass {i} other tokens are known"
            assert mask.sum(1).tolist() == [int(g[f"step{i}_mask_len"])] * 3


def test_titok_generators_have_their_parameter_counts():
    def count(T, **size):
        with torch.device("meta"):
            model = official.TiTokGenerator(T, 1000, 4096, **size)
        return sum(p.numel() for p in model.parameters())
    bert = count(32, style="bert", n_layer=24, n_head=16, n_embd=768, n_mlp=3072)
    assert bert + 2 * 768 == 177_202_432                    # and two token types; published: 177M
    uvit = count(128, style="uvit", n_layer=21, n_head=16, n_embd=1024, n_mlp=4096)
    assert round(uvit / 1e6, 1) == 295.0                    # measured on their code; the paper says 287M
    with pytest.raises(ValueError, match="odd n_layer"):
        official.TiTokGenerator(4, 3, 8, "uvit", 4, 2, 32, 64)


def small_generator():
    return official.TiTokGenerator(64, 1, 9, "bert", 1, 2, 32, 64)


def test_titok_generator_masks_as_many_ids_as_the_authors(monkeypatch):
    """round(T arccos(u) / (pi/2)), for the u of their run."""
    g = golden("tokenizers/maskgit_train_mask")
    draws = iter([g["u"].view(-1, 1), torch.rand(len(g["u"]), 64)])
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: next(draws))
    mask = small_generator().training_mask(len(g["u"]), "cpu")
    assert torch.equal(mask.sum(1), g["num_masked_arccos_N64"].view(-1).long())


def test_titok_generator_loss_is_the_authors(monkeypatch):
    """The seen tokens weigh a tenth, and the mean is over the batch."""
    g = golden("tokenizers/maskgit_losses")
    model = official.TiTokGenerator(6, 1, 9, "bert", 1, 2, 32, 64).train()
    model.label_drop = 0
    model.head.proj = torch.nn.Identity()
    monkeypatch.setattr(model, "hidden_states", lambda tokens, cond, mask: g["logits"])
    monkeypatch.setattr(model, "training_mask", lambda B, device: g["weights"].bool())
    loss, _ = model(g["labels"], torch.zeros(2, dtype=torch.long))
    close(loss, g["titok_mlm_loss"], 1e-5)


def slow_bert_layer(block, x, p):
    """BertLayer of transformers, written down once more: post-norm, dropout at its three places."""
    B, S, C = x.shape
    q, k, v = block.wqkv(x).view(B, S, 3, block.n_head, -1).permute(2, 0, 3, 1, 4)
    weights = F.dropout((q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1), p)
    y = block.wo((weights @ v).transpose(1, 2).reshape(B, S, C))
    x = F.layer_norm(x + F.dropout(y, p), (C,), block.norm1.weight, block.norm1.bias, 1e-12)
    y = F.dropout(block.fc2(F.gelu(block.fc1(x))), p)
    return F.layer_norm(x + y, (C,), block.norm2.weight, block.norm2.bias, 1e-12)


def test_titoks_bert_drops_out_where_the_published_config_says():
    """dropout and attn_drop are 0.1: on the embeddings behind their norm, and at three places of a layer."""
    sd = {k.removeprefix("sd."): v for k, v in golden("tokenizers/imagebert_tiny").items()
          if k.startswith("sd.")}
    model = official.load_generator(sd, n_head=4).train()
    tokens, cond = torch.randint(64, (2, 16)), torch.tensor([3, 10])
    mask = torch.rand(2, 16) < 0.5
    torch.manual_seed(1)
    ours = model.logits(tokens, cond, mask)
    torch.manual_seed(1)
    x = torch.cat([model.cls_embed(cond).unsqueeze(1), model.embed(tokens, mask)], 1) + model.pos_embed
    x = F.dropout(model.norm_in(x), 0.1)
    for block in model.blocks:
        x = slow_bert_layer(block, x, 0.1)
    close(ours, model.head.logits(x[:, 1:]), 1e-5)


def test_titoks_uvit_has_no_dropout_as_published():
    """Its config says 0.1, too, but UViTBert builds its blocks without it."""
    sd = {k.removeprefix("sd."): v for k, v in golden("tokenizers/uvitbert_tiny").items()
          if k.startswith("sd.")}
    model = official.load_generator(sd, n_head=4)
    tokens, cond = torch.randint(64, (2, 16)), torch.tensor([3, 10])
    mask = torch.rand(2, 16) < 0.5
    assert torch.equal(model.train().logits(tokens, cond, mask), model.eval().logits(tokens, cond, mask))
    size = dict(n_layer=3, n_head=2, n_embd=32, n_mlp=64)
    other = official.TiTokGenerator(16, 3, 64, "uvit", dropout=0.5, **size).train()
    assert not torch.equal(other.blocks[0](torch.ones(1, 4, 32)), other.blocks[0](torch.ones(1, 4, 32)))
