"""Tests of common/tokens.py: images encoded once, kept as posteriors."""
import argparse

import torch

import data
import vae
from common import tokens


def test_the_token_cache_is_remade_when_the_tokenizer_changes(tmp_path):
    images = data.load(n_shapes=60)
    path = tmp_path / "tokens-train.pt"
    dist = argparse.Namespace(rank=0, size=1)
    tokenizer = vae.VAE().eval()
    first = tokens.cached(tokenizer, images, path, dist)
    stamp = path.stat().st_mtime_ns
    tokens.cached(tokenizer, images, path, dist)
    assert path.stat().st_mtime_ns == stamp, "an unchanged tokenizer reads the cache"
    with torch.no_grad():
        tokenizer.quant_conv.bias += 1
    second = tokens.cached(tokenizer, images, path, dist)
    assert torch.allclose(second.arrays["mean"], first.arrays["mean"] + 1, atol=1e-4)
    images.flip = True
    flipped = tokens.cached(tokenizer, images, path, dist)
    mean = tokenizer.posterior(images.images.float().flip(-1) / 127.5 - 1)[0]
    assert len(flipped.arrays["mean"]) == 120 and torch.allclose(flipped.arrays["mean"][60:], mean, atol=1e-4)
    assert flipped.batch(torch.arange(60))[0].shape == (60, 16, 8)
    a, b = (first.batch(torch.arange(4))[0] for _ in range(2))
    assert not torch.equal(a, b), "every batch draws fresh tokens from the posterior"


def test_a_damaged_token_cache_is_made_anew(tmp_path):
    images = data.load(n_shapes=20, image_size=16)
    tokenizer = vae.VAE(image_size=16, ch=8, ch_mult=(1, 1, 1), groups=4).eval()
    path = tmp_path / "tokens-train.pt"
    dist = argparse.Namespace(rank=0, size=1)
    first = tokens.cached(tokenizer, images, path, dist).arrays["mean"]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    again = tokens.cached(tokenizer, images, path, dist).arrays["mean"]
    assert torch.equal(first, again)
