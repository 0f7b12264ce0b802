"""Tests of common/tokens.py: images encoded once, kept as posteriors."""
import argparse
from pathlib import Path

import pytest
import torch

import data
import lfq
import vae
import vq
from common import tables, tokens
from tests.pretend_gpu import pretend_gpu


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


SMALL = dict(image_size=16, ch=8, ch_mult=(1, 1, 1), n_res=1, groups=4)


def test_ids_of_a_set_are_those_of_its_images_one_by_one():
    images = data.load(n_shapes=260, image_size=16)         # more than are encoded at once
    tokenizer = vq.VQ(vocab_size=64, code_dim=4, z_channels=8, **SMALL).eval()
    ids = tokens.encode_all(tokenizer, images)["ids"]
    assert ids.shape == (260, 16) and ids.dtype == torch.int64
    for i in (0, 249, 250, 259):
        x, _ = images.batch(torch.tensor([i]))
        assert torch.equal(ids[i:i + 1], tokenizer.encode(x))


def test_a_batch_of_flipped_ids_is_the_image_or_its_mirror_image():
    images = data.load(n_shapes=30, image_size=16)
    tokenizer = vq.VQ(vocab_size=64, code_dim=4, z_channels=8, **SMALL).eval()
    plain = tokenizer.encode(images.images.float() / 127.5 - 1)
    mirrored = tokenizer.encode(images.images.float().flip(-1) / 127.5 - 1)
    images.flip = True
    arrays = tokens.encode_all(tokenizer, images)
    assert images.flip, "left as it was"
    source = tokens.Tokens(tokenizer, arrays, images.labels)
    index = torch.arange(30)
    seen = [0, 0]
    for _ in range(10):
        ids, labels = source.batch(index)
        assert torch.equal(labels, images.labels)
        is_plain, is_mirrored = (ids == plain).all(1), (ids == mirrored).all(1)
        assert (is_plain | is_mirrored).all()
        seen[0] += int((is_plain & ~is_mirrored).sum())
        seen[1] += int((is_mirrored & ~is_plain).sum())
    assert min(seen) > 0.35 * sum(seen), "both come about half of the time"


def test_tokens_of_vectors_have_the_mean_and_spread_of_the_posterior():
    images = data.load(n_shapes=6, image_size=16)
    tokenizer = vae.VAE(token_dim=4, **SMALL).eval()
    arrays = tokens.encode_all(tokenizer, images)
    tokenizer.measure(arrays["mean"], arrays["std"])
    source = tokens.Tokens(tokenizer, arrays, images.labels)
    draws = torch.stack([source.batch(torch.tensor([2]))[0][0] for _ in range(2000)])
    mean = (arrays["mean"][2] - tokenizer.latent_mean) * tokenizer.latent_scale
    std = arrays["std"][2] * tokenizer.latent_scale
    assert ((draws.mean(0) - mean).abs() < 5 * std / 2000 ** 0.5).all()
    assert ((draws.std(0) / std - 1).abs() < 0.1).all()


def test_captions_stand_in_the_place_of_labels():
    images = data.load(n_shapes=4, image_size=16)
    tokenizer = vq.VQ(vocab_size=64, code_dim=4, z_channels=8, **SMALL).eval()
    source = tokens.Tokens(tokenizer, tokens.encode_all(tokenizer, images), torch.rand(4, 3, 2).half())
    _, cond = source.batch(torch.tensor([3, 0]))
    assert cond.dtype == torch.float32 and torch.equal(cond, source.labels[[3, 0]].float())


def test_the_token_cache_is_remade_for_other_images(tmp_path):
    tokenizer = vq.VQ(vocab_size=64, code_dim=4, z_channels=8, **SMALL).eval()
    dist = argparse.Namespace(rank=0, size=1)
    path = tmp_path / "tokens-train.pt"
    for seed in (0, 1):
        images = data.load(n_shapes=20, image_size=16, seed=seed)
        ids = tokens.cached(tokenizer, images, path, dist).arrays["ids"]
        assert torch.equal(ids, tokenizer.encode(images.images.float() / 127.5 - 1))


# ---- Large sets: common/tables.py ------------------------------------------------------------------

def few(monkeypatch, tmp_path, small):
    """Tokens of 600 images by a VAE, which count as small or as large -> their cache, the path."""
    monkeypatch.setattr(tables, "SMALL", small)
    images = data.load(n_shapes=600, image_size=16)
    tokenizer = vae.VAE(token_dim=4, **SMALL).eval()
    path = tmp_path / "tokens-train.pt"
    path.parent.mkdir()
    return tokens.cached(tokenizer, images, path, argparse.Namespace(rank=0, size=1)), path


def is_mapped(tensor):
    """Does a file lie behind the tensor's memory? Linux lists the maps of a process."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return line.split()[-1].endswith(".pt")
    return False


def test_tokens_of_a_large_set_are_those_of_a_small_one_and_stay_in_the_file(tmp_path, monkeypatch):
    torch.manual_seed(0)
    small, _ = few(monkeypatch, tmp_path / "a", 1 / 4)
    torch.manual_seed(0)
    large, path = few(monkeypatch, tmp_path / "b", 0)
    index = torch.tensor([5, 599, 250, 0])
    for name, array in small.arrays.items():
        assert torch.equal(array, large.arrays[name])
        if Path("/proc/self/maps").exists():
            assert is_mapped(large.arrays[name]) and not is_mapped(array)
    torch.manual_seed(1)
    expected = small.batch(index)[0]
    torch.manual_seed(1)
    assert torch.equal(large.batch(index)[0], expected)
    assert sorted(file.name for file in path.parent.iterdir()) == ["tokens-train.pt"], "nothing is left over"


def test_large_sets_stay_beside_a_gpu_and_a_batch_waits_for_nothing(monkeypatch):
    monkeypatch.setattr(tables, "SMALL", 0)
    with pretend_gpu() as gpu:
        images = data.load(n_shapes=12, image_size=16, device="cuda")
        images.flip = True
        tokenizer = vae.VAE(token_dim=4, **SMALL).to("cuda").eval()
        arrays = tokens.encode_all(tokenizer, images)
        assert arrays["mean"].is_cpu and arrays["std"].is_cpu
        source = tokens.Tokens(tokenizer, arrays, images.labels)
        before = gpu.waits.copy()
        x, labels = source.batch(torch.arange(12))
        assert x.is_cuda and labels.is_cuda
        assert gpu.waits == before


def test_a_share_of_a_batch_is_that_of_the_whole_batch():
    images = data.load(n_shapes=12, image_size=16)
    images.flip = True
    tokenizer = vae.VAE(token_dim=4, **SMALL).eval()
    source = tokens.Tokens(tokenizer, tokens.encode_all(tokenizer, images), images.labels)
    index = torch.randperm(12)
    for batch in (source.batch, images.batch):
        torch.manual_seed(3)
        x, labels = batch(index)
        for rank in range(3):
            torch.manual_seed(3)
            ours = batch(index, slice(rank, None, 3))
            assert torch.equal(ours[0], x[rank::3]) and torch.equal(ours[1], labels[rank::3])


def test_arrays_are_filled_in_parts_by_several_processes_without_a_second_copy():
    """The parts of three processes, one after the other, in the room that they share."""
    room = {}

    def shared(name, shape, dtype):
        return room.setdefault(name, torch.zeros(shape, dtype=dtype))
    made = []

    def make(i, j):
        made.append((i, j))
        return {"square": torch.arange(i, j) ** 2}
    for rank in range(3):
        tables.fill(10, 2, make, shared, argparse.Namespace(rank=rank, size=3))
    assert sorted(made) == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)], "each part once"
    assert room["square"].tolist() == [i * i for i in range(10)]


@pytest.mark.parametrize("frames", [1, 5])
def test_some_images_are_encoded_as_all_are(frames):
    """Those that are chosen lie evenly over the set, and are not mirrored."""
    tokenizer = lfq.LFQ(image_size=8, frames=frames, bits=4, ch=8, ch_mult=(1, 2), n_res=1, groups=4)
    tokenizer.eval()
    images = data.load("shapes", 8, "train", n_shapes=40, frames=frames, flip=True)
    every = tokens.encode_all(tokenizer, images)["ids"]
    assert torch.equal(tokens.encode_some(tokenizer, images, 14)["ids"], every[:40:3])
    assert images.flip == (frames == 1), "clips are never mirrored"
    assert torch.equal(tokens.encode_some(tokenizer, images, 100)["ids"], every[:40])
