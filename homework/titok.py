"""Homework of titok.py: each test grades one function and says what the mistake may be."""
from types import SimpleNamespace

import torch
import torch.nn as nn
from torch import distributions as D

import titok
from homework.kit import check, exercise, gradient


class Stir(nn.Module):
    """In place of a transformer block: every row sees the mean of all rows, and knows its place."""

    def forward(self, x):
        return x + x.mean(1, keepdim=True) * torch.linspace(1, 2, x.shape[1])[:, None]


def latent_outputs(encoder, images):
    """What LatentEncoder has before its last layer: (B, T, C), patch by patch."""
    p = encoder.patch_embed.kernel_size[0]
    weight, bias, rows = encoder.patch_embed.weight.flatten(1), encoder.patch_embed.bias, []
    for i in range(0, images.shape[2], p):
        for j in range(0, images.shape[3], p):
            rows.append(images[:, :, i:i + p, j:j + p].flatten(1) @ weight.T + bias + encoder.pos[len(rows)])
    x = torch.stack([encoder.cls[0].expand(len(images), -1), *rows,
                     *(v.expand(len(images), -1) for v in encoder.latents)], 1)
    return encoder.norm_post(Stir()(encoder.norm_pre(x)))[:, 1 + len(rows):]


@exercise("titok.LatentEncoder.forward", points=2)
def test_homework_titok_encoder():
    encoder = titok.LatentEncoder(8, 4, 3, 5, n_embd=8, n_layer=1, n_head=2)
    images = torch.randn(2, 3, 8, 8)
    encoder.blocks = nn.ModuleList([Stir()])
    check("z", encoder(images), encoder.out(latent_outputs(encoder, images)),
          "Patches (with pos) and latents stand in one sequence, cls in front. "
          "The last T outputs are the tokens.")


@exercise("titok.LatentEncoder.forward", points=1, hidden=True)
def test_homework_titok_encoder_of_one_image_and_one_token():
    encoder = titok.LatentEncoder(12, 4, 1, 5, n_embd=8, n_layer=1, n_head=2)
    encoder.blocks = nn.ModuleList([Stir()])
    images = torch.randn(1, 3, 12, 12)
    before = images.clone()
    z = encoder(images)
    truth = encoder.out(latent_outputs(encoder, images))
    check("z of one image and one token", z, truth)
    assert z.dtype == torch.float32, f"z is {z.dtype} and not float32"
    assert torch.equal(images, before), "the images are changed in place"
    learned = {"latents": encoder.latents, "pos": encoder.pos, "cls": encoder.cls, "out": encoder.out.weight}
    for name, weight in learned.items():
        ours = gradient(z.square().sum(), weight)
        assert ours is not None, f"no gradient reaches {name}"
        check(f"the gradient of {name}", ours, gradient(truth.square().sum(), weight))


@exercise("titok.LatentDecoder.forward", points=3)
def test_homework_titok_decoder():
    decoder = titok.LatentDecoder(8, 4, 3, 5, n_embd=8, n_layer=1, n_head=2)
    q = torch.randn(2, 3, 5)
    decoder.blocks = nn.ModuleList([Stir()])
    canvas = torch.cat([decoder.cls, decoder.canvas]).expand(2, -1, -1)
    x = torch.cat([canvas, decoder.embed(q) + decoder.pos], 1)
    x = decoder.out(decoder.norm_post(Stir()(decoder.norm_pre(x)))[:, 1:5])                 # (2, 4, 48)
    images = torch.zeros(2, 3, 8, 8)
    for i in range(8):
        for j in range(8):
            start = (i % 4 * 4 + j % 4) * 3                 # a patch holds (row, column, colour)
            images[:, :, i, j] = x[:, i // 4 * 2 + j // 4, start:start + 3]
    check("images", decoder(q), decoder.smooth(images),
          "The canvas, not the tokens, becomes the picture. A patch holds (row, column, colour). "
          "smooth comes last.")
    proxy = titok.LatentDecoder(8, 4, 3, 5, n_embd=8, n_layer=1, n_head=2, proxy_vocab=11)
    logits = proxy(q)
    shape = tuple(logits.shape)
    assert shape == (2, 4, 11), f"with proxy_vocab: logits (B, P, proxy_vocab), not {shape}"


@exercise("titok.TiTok.decode_raw", points=2)
def test_homework_titok_soft_codes():
    table, logits = torch.randn(6, 3), torch.randn(2, 4, 6)
    codes = SimpleNamespace(codes=lambda ids: table[ids])
    proxy = SimpleNamespace(decode_raw=lambda q: 10 + q, quantizer=codes)

    class Decoder(SimpleNamespace):
        def __call__(self, q):
            return logits
    mixed = sum(logits.softmax(-1)[..., k, None] * table[k] for k in range(6))              # (2, 4, 3)
    model = SimpleNamespace(decoder=Decoder(proxy_vocab=6), proxy=proxy)
    ours = titok.TiTok.decode_raw(model, torch.randn(2, 3, 5))
    check("what the proxy's decoder makes of the mixed codes", ours, 10 + mixed,
          "Each of the proxy's codes counts with its probability, a softmax over the vocabulary.")
    model = SimpleNamespace(decoder=Decoder(proxy_vocab=None), proxy=None)
    ours = titok.TiTok.decode_raw(model, torch.randn(2, 3, 5))
    check("without a proxy", ours, logits, "There the decoder's output is the image.")


@exercise("titok.TiTokVAE.bottleneck", points=2)
def test_homework_titok_vae_bottleneck():
    model = titok.TiTokVAE(image_size=8, n_tokens=3, token_dim=2, enc=(8, 1, 2), dec=(8, 1, 2), beta=0.5)
    mean, logvar = torch.randn(2, 4000, 3, 2)
    mean[:], logvar[:] = mean[:1], logvar[:1]
    z, loss, logs = model.bottleneck(torch.cat([mean, logvar], -1))
    kl = D.kl_divergence(D.Normal(mean, (0.5 * logvar).exp()), D.Normal(0.0, 1.0)).sum(-1).mean()
    check("logs['kl'], nats per token", logs["kl"], kl)
    check("the loss", loss, 0.5 * kl * 3 / (3 * 8 * 8),
          "beta * KL summed over the T tokens, divided by the 3 H W pixel values.")
    check("the mean of 4,000 draws", z.mean(0), mean[0], "The first half of the moments is the mean.", 0.1)
    check("their std", z.std(0), (0.5 * logvar[0]).exp(),
          "The second half is log variance; draw with noise, also in training.", 0.1)
