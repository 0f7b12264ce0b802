"""Homework of titok.py: each test looks at one function and says what a difference may mean."""
from types import SimpleNamespace

import torch
import torch.nn as nn

import titok
from homework.kit import closed, exercise, fit

ENCODER = (
    "The sequence is cls, patches + pos (row by row), latents; it goes through norm_pre and all blocks; "
    "the last T rows go through norm_post and out.")


@exercise("titok.LatentEncoder.forward", points=2)
def test_homework_titok_encoder(look):
    for B, side, T, n_layer in ((3, 8, 3, 1), (1, 12, 5, 2)):
        encoder = look.fill(titok.LatentEncoder(side, 4, T, 5, n_embd=8, n_layer=n_layer, n_head=2), 0.5)
        learned = {k: p for k, p in encoder.named_parameters() if "blocks" not in k}
        look.call(f"z of {B} images, {T} tokens each",
                  encoder, {"images": look.randn(B, 3, side, side)},
                  ENCODER,
                  1e-3,
                  params=learned)


@exercise("titok.LatentEncoder.forward", points=1, hidden=True)
def test_homework_titok_encoder_of_one_image_and_one_token(look):
    encoder = look.fill(titok.LatentEncoder(8, 2, 1, 2, n_embd=4, n_layer=1, n_head=1), 0.8)
    look.call("z of one image and one token",
              encoder, {"images": look.randn(1, 3, 8, 8)},
              ENCODER,
              params={
                  k: p for k, p in encoder.named_parameters() if "blocks" not in k
              })


@exercise("titok.LatentDecoder.forward", points=3)
def test_homework_titok_decoder(look):
    hint = ("The sequence is cls, canvas, embed(q) + pos. The canvas, not the tokens, becomes the picture. A "
            "patch holds (row, column, colour). smooth comes last; with proxy_vocab the logits (B, P, "
            "proxy_vocab) do.")
    for B, side, T, vocab in ((3, 8, 3, None), (1, 12, 2, None), (2, 8, 1, 11)):
        decoder = look.fill(
            titok.LatentDecoder(side, 4, T, 5, n_embd=8, n_layer=2, n_head=2, proxy_vocab=vocab))
        learned = {k: p for k, p in decoder.named_parameters() if "blocks" not in k}
        look.call(f"{T} tokens of {B} images, proxy_vocab={vocab}", decoder, {"q": look.randn(B, T, 5)}, hint,
                  1e-3, params=learned)


class Painter(nn.Module):
    """A proxy: ids of patches from brightness, and a picture of any codes."""

    vocab_size = 6
    grid = (2, 2)

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)
        self.quantizer = SimpleNamespace(codes=lambda ids: self.table[ids])

    def encode(self, images):
        patches = images.unfold(2, 4, 4).unfold(3, 4, 4).mean((1, 4, 5)).flatten(1)
        return (patches * 20).long().abs() % 6

    def decode_raw(self, q):
        return (q.sin() + q.roll(1, 1)).mean(-1)[:, None, None] * torch.ones(1, 3, 8, 1)


def titok_with_proxy(look, vocab=6):
    """A TiTok of 3 tokens with a proxy, and a decoder that is one Linear."""
    model = titok.TiTok(8, 3, vocab_size=9, code_dim=5, patch=4, enc=(8, 1, 2), dec=(8, 1, 2), stage="proxy",
                        proxy=Painter(look.randn(6, 4)))
    look.fill(model, 0.5)
    return model


def unlike(self, q):
    """It stands in for LatentDecoder.forward: logits of four patches from the codes."""
    mixed = self.embed(q).mean(1, keepdim=True) + self.canvas
    return self.out(mixed.cos())


def also_unlike(self, images):
    """It stands in for LatentEncoder.forward: z of each token."""
    return self.out(self.latents.expand(len(images), -1, -1) * images.mean((1, 2, 3))[:, None, None].exp())


@exercise("titok.TiTok.decode_raw", points=2)
def test_homework_titok_soft_codes(look):
    with closed(titok.LatentDecoder, "forward", unlike):
        model = titok_with_proxy(look)
        for B in (1, 3):
            look.call(f"{B} pictures of the proxy", model.decode_raw, {"q": look.randn(B, 3, 5)},
                      "Each of the proxy's codes counts with its probability, a softmax over the vocabulary; "
                      "the proxy's decode_raw paints their mean.", params=model.decoder)
        plain = look.fill(titok.TiTok(8, 3, vocab_size=9, code_dim=5, patch=4, enc=(8, 1, 2), dec=(8, 1, 2)))
        look.call("without a proxy", plain.decode_raw, {"q": look.randn(2, 3, 5)},
                  "There the decoder's output is the image.")


@exercise("titok.TiTok.proxy_loss", points=2)
def test_homework_titok_proxy_loss(look):
    hint = (
        "The cross-entropy, in nats per id, of the decoder's logits against the ids that the proxy gives the "
        "same images, plus the loss of the bottleneck. logs: proxy_nats, proxy_right, and the bottleneck's."
    )
    with (closed(titok.LatentDecoder, "forward", unlike), closed(titok.LatentEncoder, "forward",
                                                                 also_unlike)):
        model = titok_with_proxy(look)
        model.bottleneck = lambda z: (z + z.sin(), z.square().mean(), {"odd": z.detach().mean()})
        for B in (1, 3):
            look.call(f"the loss of {B} images",
                      model.proxy_loss, {"images": look.randn(B, 3, 8, 8)},
                      hint,
                      1e-3,
                      logs=["proxy_nats", "proxy_right", "odd"], outputs=["the loss", "logs"],
                      fixed=("images",),
                      params={
                          k: p
                          for k, p in model.named_parameters()
                          if p.requires_grad and k.startswith(("encoder.out", "encoder.latents", "decoder"))
                      })


@exercise("titok", points=3, further=True, goals=[
    ("nats per id of the proxy, eight images", 0.0, (0.8, 0.4), "Two tokens of eight ids tell eight images "
     "apart, so all is known."),
    ("the share of the proxy's ids named right", 1.0, (0.4, 0.15), "The likeliest is the right one.")])
def capstone_titok(look):
    """Eight images of four flat patches, in two tokens."""
    model = titok.TiTok(8,
                        2,
                        vocab_size=8,
                        code_dim=4,
                        patch=4,
                        enc=(16, 1, 2),
                        dec=(16, 1, 2),
                        stage="proxy",
                        proxy=Painter(look.randn(6, 4)))
    images = 0.6 * look.rand(8, 3, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    fit([p for p in model.parameters() if p.requires_grad], lambda: model(images)[0], 500, 5e-3)
    with torch.no_grad():
        _, logs = model.proxy_loss(images)
    look.goal("nats per id of the proxy, eight images", logs["proxy_nats"], 0.8, 0.4)
    look.goal("the share of the proxy's ids named right", logs["proxy_right"], 0.4, 0.15)
