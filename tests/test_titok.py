"""Tests of titok."""

import pytest
import torch
import torch.nn.functional as F

import data
import titok
import vae
import vq
from tests.helpers import close


@pytest.mark.parametrize("name, published, proxy", [("l-32", 610.2, 1024), ("b-64", 174.0, 1024),
                                                    ("s-128", 52.8, 1024), ("bl-64-vq8k", 390.0, None),
                                                    ("bl-128-vq8k", None, None), ("sl-256-vq8k", 330.3, None),
                                                    ("ll-32-vae", 606.9, None), ("bl-64-vae", None, None),
                                                    ("bl-128-vae", 389.6, None)])
def test_titok_of_the_paper_has_its_parameter_count(name, published, proxy):
    size = titok.SIZES["titok-" + name]
    D, T = size.get("code_dim", size.get("token_dim")), size["n_tokens"]
    with torch.device("meta"):
        if proxy:
            model = titok.TiTok(**size, stage="proxy", proxy_vocab=proxy)
        else:
            model = (titok.TiTokVAE if "vae" in name else titok.TiTok)(**size)
    count = lambda module: sum(p.numel() for p in module.parameters())
    # blocks, two norms, class, places
    vit = lambda C, layers: layers * (12 * C**2 + 13 * C) + 4 * C + C + 257 * C
    (E, n, _), (G, m, _) = size["enc"], size["dec"]
    moments = 2 * D if "vae" in name else D
    encoder = vit(E, n) + 769 * E + 2 * T * E + E * moments + moments       # theirs: latents and their places
    decoder = vit(G, m) + D * G + G + G + T * G             # theirs: one mask token
    decoder += 2 * G * G + 2 * G + 2 * G * proxy + proxy if proxy else 768 * G + 768 + 84
    # ours keeps one vector where they add two: class and place 0 (twice), latent and place, mask token and
    # place
    assert (count(model.encoder), count(model.decoder)) == (encoder - E - T * E, decoder - 2 * G)
    if published:
        # as counted there
        whole = encoder + decoder + (-T * E if proxy else 0 if "vae" in name else size["vocab_size"] * D)
        assert round(whole / 1e6, 1) == published


def small_titok(cls=titok.TiTok, **options):
    return cls(**dict(image_size=16, n_tokens=5, patch=4, enc=(32, 1, 2), dec=(32, 1, 2)) | options)


def small_proxy():
    return vq.VQ(image_size=16, vocab_size=24, code_dim=4, ch=8, z_channels=8)                     # 4 x 4 ids


@pytest.mark.parametrize("stage", ["pixels", "proxy", "finetune"])
@pytest.mark.parametrize("cls", [titok.TiTok, titok.TiTokVAE])
def test_titok_keeps_the_contract_of_a_tokenizer(cls, stage):
    ids, proxy = cls is titok.TiTok, None if stage == "pixels" else small_proxy()
    images = data.draw(torch.arange(6), 16)[0]
    model = small_titok(cls, stage=stage, proxy=proxy, **dict(vocab_size=20) if ids else dict(token_dim=3))
    assert model.seq_len == 5 and model.grid == (5, ) and (model.vocab_size,
                                                           model.token_dim) == ((20, None) if ids else
                                                                                (None, 3))
    loss, logs = model(images, torch.zeros(6, dtype=torch.long))
    loss.backward()
    assert loss.ndim == 0 and all(v.ndim == 0 and not v.requires_grad for v in logs.values())
    learns = {k for k, v in model.named_parameters() if v.grad is not None}
    expected = dict(pixels=("encoder.", "decoder.", "quantizer."),
                    proxy=("encoder.", "decoder.", "quantizer."),
                    finetune=("decoder.", "proxy.decoder.", "proxy.post_quant_conv."))[stage]
    assert learns == {k for k, _ in model.named_parameters() if k.startswith(expected)}
    assert learns == {k
                      for k, v in model.named_parameters()
                      if v.requires_grad}, "an optimiser would see idle weights"
    tokens = model.encode(images)
    assert tokens.shape == ((6, 5) if ids else
                            (6, 5, 3)) and tokens.dtype == (torch.int64 if ids else torch.float32)
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
        assert torch.allclose(model.decode(tokens), recon.clamp(-1, 1),
                              atol=1e-5), "the decoder sees codes only"


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
    assert loss < start and all(map(torch.equal, before,
                                    then.encoder.parameters())), "only the decoders may learn"
    first.set_stage("finetune")
    assert not first.encoder.out.weight.requires_grad and first.proxy.decoder[0].weight.requires_grad
    for make, sentence in ((lambda: small_titok(stage="proxy"),
                            "needs a proxy"), (lambda: small_titok(proxy=proxy), "needs no proxy"),
                           (lambda: small_titok(image_size=32, stage="proxy", proxy=proxy),
                            "8 x 8"), (lambda: small_titok(stage="third"),
                                       "third"), (lambda: small_titok(image_size=18), "multiple of patch 4")):
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
        change = (model.decode_raw(model.quantizer.codes(torch.tensor([[1, 2, 3, 4, 9]]))) -
                  picture).abs().sum(1)
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
