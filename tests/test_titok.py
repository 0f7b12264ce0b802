"""Tests of titok."""
import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import titok
import vae
import vq
from tests.helpers import close, golden, titok_golden, tokens_of


@torch.no_grad()
def test_titok_first_stage_is_the_authors_with_its_legacy_reshape():
    g, sd, model, images = titok_golden("legacy_vq_stage1")
    assert (model.seq_len, model.grid, model.vocab_size, model.token_dim, model.stage) == (8, (8,), 64, None, "proxy")
    z = model.encoder(images)
    close(F.normalize(z, dim=-1), F.normalize(tokens_of(g["z"]), dim=-1)), close(z, tokens_of(g["z"]))
    q, ids, loss, logs = model.quantizer(z)
    close(q, tokens_of(g["z_quantized"])), close(loss, g["quantizer_loss"]), close(logs["commit"], g["commitment_loss"])
    assert torch.equal(ids, g["indices"][:, 0]) and torch.equal(model.encode(images), ids)
    close(model.decoder(q), tokens_of(g["decoded"]))
    model.proxy = argparse.Namespace(encode=lambda images: g["proxy_codes"])
    loss, logs = model(images)
    close(logs["proxy_nats"], g["stage1_ce"]), close(loss, g["stage1_ce"] + g["quantizer_loss"])
    model.encoder.legacy = False
    assert (model.encoder(images) - z).abs().max() > 0.1, "transposing is not what their weights are used to"


@torch.no_grad()
def test_titok_of_pixels_is_the_authors():
    g, sd, model, images = titok_golden("vq_pixels")
    assert (model.seq_len, model.vocab_size, model.stage, model.quantizer.l2_norm) == (8, 128, "pixels", False)
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
    assert isinstance(model, titok.TiTokVAE) and (model.token_dim, model.vocab_size, model.seq_len) == (16, None, 8)
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
    import zlib
    def fill(part, shapes):
        for name, shape in shapes.items():
            w = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32) * 0.05
            sd[f"{part}.{name}"] = torch.from_numpy(w + float(len(shape) == 1 and name.endswith("weight")))
    def block(name, a, b):
        shapes = {f"{name}.norm1.weight": (a,), f"{name}.norm1.bias": (a,), f"{name}.conv1.weight": (b, a, 3, 3),
                  f"{name}.norm2.weight": (b,), f"{name}.norm2.bias": (b,), f"{name}.conv2.weight": (b, b, 3, 3)}
        return shapes | ({f"{name}.nin_shortcut.weight": (b, b, 1, 1)} if a != b else {})
    end = lambda c, out, k: {"norm_out.weight": (c,), "norm_out.bias": (c,), "conv_out.weight": (out, c, k, k), "conv_out.bias": (out,)}
    sd = {}
    if encoder:
        fill("encoder", {"conv_in.weight": (c, 3, 3, 3)} | block("down.0.block.0", c, c) | block("down.1.block.0", c, 2 * c)
             | block("mid.0", 2 * c, 2 * c) | end(2 * c, 8, 1))
    fill("decoder", {"conv_in.weight": (2 * c, 8, 3, 3), "conv_in.bias": (2 * c,), "up.1.upsample_conv.weight": (2 * c, 2 * c, 3, 3),
                     "up.1.upsample_conv.bias": (2 * c,)} | block("mid.0", 2 * c, 2 * c) | block("up.1.block.0", 2 * c, 2 * c)
         | block("up.0.block.0", 2 * c, c) | end(c, 3, 3))
    return sd


@torch.no_grad()
def test_maskgit_vqgan_is_the_authors():
    g = golden("tokenizers/maskgit_vqgan_tiny")
    sd = maskgit_vqgan() | {"quantize.embedding.weight": g["codebook"]}
    model, images = titok.MaskGITVQGAN.from_official(sd, grid=(8, 8)), 2 * g["image"] - 1
    close(model.latents(images), tokens_of(g["h"]))
    q, ids, loss, _ = model.quantizer(model.latents(images))
    assert torch.equal(ids, g["indices"]) and torch.equal(model.encode(images), ids)
    close(q, tokens_of(g["z_q"])), close(loss, g["loss"]), close((model.decode_raw(q) + 1) / 2, g["recon"])
    close(model.encoder[0](g["odd_image"]), g["odd_conv"])
    with pytest.raises(ValueError, match="decoder.up.1.upsample_conv.bias"):
        titok.MaskGITVQGAN.from_official({k: v for k, v in sd.items() if k != "decoder.up.1.upsample_conv.bias"})
    with pytest.raises(ValueError, match="encoder.extra"):
        titok.MaskGITVQGAN.from_official(sd | {"encoder.extra": torch.zeros(1)})


def test_titok_mixes_the_proxys_codes_as_the_authors_and_trains_both_decoders_only():
    g = golden("tokenizers/titok_stage2_softcode")
    stage1 = titok_golden("legacy_vq_stage1")[1]
    with torch.no_grad():
        codes = titok.VectorQuantizer(*g["codebook"].shape, l2_norm=False)
        codes.codebook.copy_(g["codebook"])
        proxy = argparse.Namespace(quantizer=codes, decode_raw=lambda q: q, grid=(2, 2), vocab_size=64)
        holder = argparse.Namespace(decoder=lambda q: tokens_of(g["logits"]), proxy=proxy)
        holder.decoder = type("Decoder", (), dict(__call__=lambda self, q: tokens_of(g["logits"]), proxy_vocab=64))()
        close(titok.TiTok.decode_raw(holder, g["logits"]), tokens_of(g["soft"]))
        hard = F.one_hot(torch.arange(4)[None], 64).float() * 1e4
        holder.decoder = type("Decoder", (), dict(__call__=lambda self, q: hard, proxy_vocab=64))()
        close(titok.TiTok.decode_raw(holder, g["logits"]), g["codebook"][None, :4])
    pixel = maskgit_vqgan(encoder=False) | {"quantize.embedding.weight": torch.randn(1024, 8)}
    pixel = {"pixel_" + k if k.startswith("decoder") else k.replace("quantize", "pixel_quantize"): v for k, v in pixel.items()}
    model = titok.TiTok.from_official(stage1 | pixel, n_head=4)
    images = data.draw(torch.arange(2), 64)[0]
    assert model.stage == "finetune" and model.proxy.encoder is None
    with torch.no_grad():
        assert model.decode(model.encode(images)).shape == (2, 3, 8, 8), "the tiny proxy doubles 4 x 4 patches only once"
        close(model.decode_raw(model.quantizer.codes(model.encode(images))), model.reconstruct(images)[0])
    F.mse_loss(model.train().reconstruct(images)[0], images[:, :, ::8, ::8]).backward()
    learns = {k for k, v in model.named_parameters() if v.grad is not None and v.grad.abs().max() > 0}
    assert learns == {k for k, _ in model.named_parameters() if k.startswith(("decoder.", "proxy.decoder."))}


def test_titok_from_official_names_the_key_that_does_not_fit(tmp_path):
    _, sd, _, images = titok_golden("vq_pixels")
    torch.save(sd, tmp_path / "tokenizer.bin")
    assert titok.TiTok.from_official(tmp_path / "tokenizer.bin", n_head=4).encode(images).shape == (2, 8)
    for key in ("latent_tokens", "encoder.transformer.1.attn.in_proj_bias", "decoder.mask_token", "quantize.embedding.weight"):
        with pytest.raises(ValueError, match=key):
            titok.TiTok.from_official({k: v for k, v in sd.items() if k != key}, n_head=4)
    with pytest.raises(ValueError, match="decoder.extra"):
        titok.TiTok.from_official(sd | {"decoder.extra": torch.zeros(1)}, n_head=4)


@pytest.mark.parametrize("name, published, proxy", [
    ("l-32", 610.2, 1024), ("b-64", 174.0, 1024), ("s-128", 52.8, 1024), ("bl-64-vq8k", 390.0, None), ("bl-128-vq8k", None, None),
    ("sl-256-vq8k", 330.3, None), ("ll-32-vae", 606.9, None), ("bl-64-vae", None, None), ("bl-128-vae", 389.6, None)])
def test_titok_of_the_paper_has_its_parameter_count(name, published, proxy):
    size = titok.SIZES["titok-" + name]
    D, T = size.get("code_dim", size.get("token_dim")), size["n_tokens"]
    with torch.device("meta"):
        if proxy:
            model = titok.TiTok(**size, stage="proxy", proxy_vocab=proxy)
        else:
            model = (titok.TiTokVAE if "vae" in name else titok.TiTok)(**size)
    count = lambda module: sum(p.numel() for p in module.parameters())
    vit = lambda C, layers: layers * (12 * C**2 + 13 * C) + 4 * C + C + 257 * C             # blocks, two norms, class, places
    (E, n, _), (G, m, _) = size["enc"], size["dec"]
    moments = 2 * D if "vae" in name else D
    encoder = vit(E, n) + 769 * E + 2 * T * E + E * moments + moments                       # theirs: latents and their places
    decoder = vit(G, m) + D * G + G + G + T * G                                             # theirs: one mask token
    decoder += 2 * G * G + 2 * G + 2 * G * proxy + proxy if proxy else 768 * G + 768 + 84
    # ours keeps one vector where they add two: class and place 0 (twice), latent and place, mask token and place
    assert (count(model.encoder), count(model.decoder)) == (encoder - E - T * E, decoder - 2 * G)
    if published:
        whole = encoder + decoder + (-T * E if proxy else 0 if "vae" in name else size["vocab_size"] * D)   # as counted there
        assert round(whole / 1e6, 1) == published


def test_maskgit_vqgan_has_its_parameter_count():
    with torch.device("meta"):
        model = titok.MaskGITVQGAN()
    count = lambda *parts: round(sum(p.numel() for part in parts for p in part.parameters()) / 1e6, 1)
    assert (count(model.encoder), count(model.decoder), count(model)) == (23.8, 30.5, 54.5)
    assert count(model.decoder, model.quantizer) == 30.7    # what a TiTok file brings along


def small_titok(cls=titok.TiTok, **options):
    return cls(**dict(image_size=16, n_tokens=5, patch=4, enc=(32, 1, 2), dec=(32, 1, 2)) | options)


def small_proxy():
    return vq.VQ(image_size=16, vocab_size=24, code_dim=4, ch=8, z_channels=8)                          # 4 x 4 ids


@pytest.mark.parametrize("stage", ["pixels", "proxy", "finetune"])
@pytest.mark.parametrize("cls", [titok.TiTok, titok.TiTokVAE])
def test_titok_keeps_the_contract_of_a_tokenizer(cls, stage):
    ids, proxy = cls is titok.TiTok, None if stage == "pixels" else small_proxy()
    images = data.draw(torch.arange(6), 16)[0]
    model = small_titok(cls, stage=stage, proxy=proxy, **dict(vocab_size=20) if ids else dict(token_dim=3))
    assert model.seq_len == 5 and model.grid == (5,) and (model.vocab_size, model.token_dim) == ((20, None) if ids else (None, 3))
    loss, logs = model(images, torch.zeros(6, dtype=torch.long))
    loss.backward()
    assert loss.ndim == 0 and all(v.ndim == 0 and not v.requires_grad for v in logs.values())
    learns = {k for k, v in model.named_parameters() if v.grad is not None}
    expected = dict(pixels=("encoder.", "decoder.", "quantizer."), proxy=("encoder.", "decoder.", "quantizer."),
                    finetune=("decoder.", "proxy.decoder.", "proxy.post_quant_conv."))[stage]
    assert learns == {k for k, _ in model.named_parameters() if k.startswith(expected)}
    assert learns == {k for k, v in model.named_parameters() if v.requires_grad}, "an optimiser would see idle weights"
    tokens = model.encode(images)
    assert tokens.shape == ((6, 5) if ids else (6, 5, 3)) and tokens.dtype == (torch.int64 if ids else torch.float32)
    recon = model.decode(tokens)
    assert recon.shape == images.shape and recon.abs().max() <= 1
    torch.manual_seed(1)
    recon, auxiliary, logs = model.eval().reconstruct(images)
    torch.manual_seed(1)
    loss, logs = model(images)
    if stage == "proxy":
        target = model.proxy.encode(images)
        torch.manual_seed(1)
        p = model.decoder(model.bottleneck(model.encoder(images))[0]).log_softmax(-1)       # (6, 16, 24)
        slow = -sum(p[b, t, target[b, t]] for b in range(6) for t in range(16)) / 96
        assert torch.allclose(loss, slow + auxiliary) and 0 <= logs["proxy_right"] <= 1
    else:
        assert torch.allclose(loss, auxiliary + F.mse_loss(recon, images))
    if ids:
        assert torch.allclose(model.decode(tokens), recon.clamp(-1, 1), atol=1e-5), "the decoder sees codes only"


def test_titok_stages_share_their_weights():
    images, proxy = data.draw(torch.arange(4), 16)[0], small_proxy()
    first = small_titok(stage="proxy", proxy=proxy)
    then = small_titok(stage="finetune", proxy=small_proxy())
    then.load_state_dict(first.state_dict())
    assert torch.equal(first.encode(images), then.encode(images))
    assert torch.allclose(first.decode(first.encode(images)), then.decode(then.encode(images)), atol=1e-6)
    before = [p.clone() for p in then.encoder.parameters()]
    start = None
    opt = torch.optim.AdamW(then.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(8):
        loss, _ = then.train()(images)
        opt.zero_grad(), loss.backward(), opt.step()
        start = loss.detach() if step == 0 else start
    assert loss < start and all(map(torch.equal, before, then.encoder.parameters())), "only the decoders may learn"
    first.set_stage("finetune")
    assert not first.encoder.out.weight.requires_grad and first.proxy.decoder[0].weight.requires_grad
    for make, sentence in ((lambda: small_titok(stage="proxy"), "needs a proxy"), (lambda: small_titok(proxy=proxy), "needs no proxy"),
                           (lambda: small_titok(image_size=32, stage="proxy", proxy=proxy), "8 x 8"),
                           (lambda: small_titok(stage="third"), "third"), (lambda: small_titok(image_size=18), "multiple of patch 4")):
        with pytest.raises(ValueError, match=sentence):
            make()


def test_titok_vae_tokens_have_unit_variance_token_by_token():
    model, images = small_titok(titok.TiTokVAE, token_dim=3).eval(), data.draw(torch.arange(400), 16)[0]
    with torch.no_grad():
        model.encoder.out.weight.mul_(3), model.encoder.out.bias.normal_()
        mean, std = model.posterior(images)
        model.measure(mean, std)
    tokens = torch.cat([model.encode(images) for _ in range(4)])
    assert tokens.mean(0).abs().max() < 0.15 and (tokens.std(0) - 1).abs().max() < 0.1
    with torch.no_grad():
        close(model.decode(model.normalise(mean)), model.decode_raw(mean).clamp(-1, 1), 1e-5)
    assert torch.equal(vae.VAE.kl(mean, std), model.kl(mean, std))
    noise = dict(beta=3.0)
    torch.manual_seed(2)
    strong = small_titok(titok.TiTokVAE, token_dim=3, **noise)
    loss, logs = strong(images[:8])
    assert torch.allclose(loss, logs["mse"] + 3 * logs["kl"] * 5 / 768)


def test_titok_tokens_have_no_place_but_an_order():
    """Each token reaches every patch, and the decoder tells them apart by their position."""
    model = small_titok().eval()
    with torch.no_grad():
        for module in (model.encoder, model.decoder):
            for p in module.parameters():
                p.add_(0.1 * torch.randn_like(p))
        ids = torch.tensor([[1, 2, 3, 4, 5]])
        picture = model.decode_raw(model.quantizer.codes(ids))
        change = (model.decode_raw(model.quantizer.codes(torch.tensor([[1, 2, 3, 4, 9]]))) - picture).abs().sum(1)
        assert change.min() > 0, "the last token does not reach every pixel"
        assert (model.decode_raw(model.quantizer.codes(ids.flip(1))) - picture).abs().max() > 1e-3
    small = [small_titok(n_tokens=n) for n in (1, 16)]
    assert [m.encode(data.draw(torch.arange(2), 16)[0]).shape[1] for m in small] == [1, 16]


@pytest.mark.parametrize("cls", [titok.TiTok, titok.TiTokVAE])
def test_titok_learns(cls):
    images = data.draw(torch.arange(64), 16)[0]
    model, losses = small_titok(cls, enc=(64, 2, 4), dec=(64, 2, 4)), []
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        loss, logs = model(images[torch.randint(64, (16,))])
        opt.zero_grad(), loss.backward(), opt.step()
        losses.append(logs["mse"].item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5]), f"squared error {losses[0]:.3f} to {losses[-1]:.3f}"
