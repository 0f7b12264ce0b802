"""Tests of common/yardsticks.py."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import vq
from common import metrics, yardsticks


def drawn_images(n, start=0):
    return data.draw(torch.arange(start, start + n), 16)[0]


@pytest.mark.parametrize("grid, n", [((4, 4), 6), ((2, 2), 20), (None, 40)])
def test_pca_equals_numpys_singular_vectors(grid, n):
    train_images = drawn_images(300)
    images = drawn_images(50, 1000)
    shape = (1, 1) if grid is None else grid
    x = yardsticks.to_patches(train_images, shape).flatten(0, 1).double().numpy()
    y = yardsticks.to_patches(images, shape).double().numpy()
    mean = x.mean(0)
    basis = np.linalg.svd(x - mean, full_matrices=False)[2][:n]
    again = torch.from_numpy((y - mean) @ basis.T @ basis + mean).clamp(-1, 1)
    mse = (again - torch.from_numpy(y)).square().flatten(1).mean(1)
    expected = (10 * torch.log10(4 / mse)).mean().item()
    assert yardsticks.pca_psnr(train_images, images, grid, n) == pytest.approx(expected, abs=1e-3)


def test_pca_with_all_components_is_exact():
    assert yardsticks.pca_psnr(drawn_images(300), drawn_images(20, 500), (4, 4), 48) > 80


def test_kmeans_rounds_each_patch_to_the_nearest_code(monkeypatch):
    images = drawn_images(20)
    codes = torch.randn(9, 48)
    monkeypatch.setattr(vq, "kmeans", lambda x, n: (codes, None))
    y = yardsticks.to_patches(images, (4, 4))
    slow = codes[torch.cdist(y, codes[None]).argmin(2)]
    expected = yardsticks.psnr_of(slow, y)
    assert yardsticks.kmeans_psnr(images, images, (4, 4), 9) == pytest.approx(expected, abs=1e-5)


def test_more_codes_are_better_and_the_result_is_a_function_of_the_seed():
    train_images = drawn_images(200)
    images = drawn_images(50, 1000)
    few, many, again = (yardsticks.kmeans_psnr(train_images, images, (4, 4), n) for n in (4, 64, 64))
    assert many > few + 1 and many == again


def test_patches_are_cut_row_by_row():
    images = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    patches = yardsticks.to_patches(images, (2, 2))
    assert patches.shape == (2, 4, 12)
    assert set(patches[0, 1].tolist()) == set(images[0, :, :2, 2:].flatten().tolist())


def test_seams_are_steps_at_borders_over_steps_elsewhere():
    ramp = torch.arange(16.0).expand(1, 3, 16, 16) / 16
    both = (ramp + ramp.transpose(-1, -2)) / 2
    assert yardsticks.seams(both, 4) == pytest.approx(1)
    step = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.5])                    # all of it at the border
    stairs = both[..., :8, :8] + step + step[:, None]
    on = 0.5 + 1 / 32
    off = 1 / 32
    assert yardsticks.seams(stairs, 4) == pytest.approx(on / off, rel=1e-4)


def test_a_copy_has_distance_0_and_is_found():
    training = data.load("shapes", 16, "train", n_shapes=60)
    images = training.batch(torch.arange(60))[0]
    distance, position = yardsticks.nearest(images[[7, 41]], training)
    assert position.tolist() == [7, 41] and distance.max() < 5e-3    # float32 of |a|^2 + |b|^2 - 2ab
    others = drawn_images(2, 900)
    far, _ = yardsticks.nearest(others, training)
    slow = (others[:, None] - images[None]).square().flatten(2).mean(2).sqrt().min(1).values
    assert torch.allclose(far, slow, atol=1e-4)


def test_of_a_large_set_some_images_are_compared_and_found_by_their_position(monkeypatch):
    monkeypatch.setattr(yardsticks, "COMPARED", 20)
    training = data.load("shapes", 16, "train", n_shapes=58)
    images = training.batch(torch.tensor([0, 3, 57]))[0]
    distance, position = yardsticks.nearest(images, training)
    assert position.tolist() == [0, 3, 57] and distance.max() < 5e-3


def test_fewer_images_are_learnt_from_where_they_are_large(monkeypatch):
    training = data.load("shapes", 16, "train", n_shapes=300)
    assert len(yardsticks.learnt_from(training)) == 300
    monkeypatch.setattr(yardsticks, "MOST_VALUES", 150 * 3 * 16 * 16)
    assert len(yardsticks.learnt_from(training)) == 150


def test_rows_suit_the_tokenizer():
    train_set = data.load("shapes", 16, "train", n_shapes=100)
    images = drawn_images(20, 900)
    vectors = SimpleNamespace(grid=(4, 4), seq_len=16, token_dim=5, vocab_size=None)
    ids = SimpleNamespace(grid=(4, 4), seq_len=16, token_dim=None, vocab_size=16)
    placeless = SimpleNamespace(grid=(4,), seq_len=4, token_dim=None, vocab_size=16)
    odd = SimpleNamespace(grid=(5,), seq_len=5, token_dim=None, vocab_size=16)
    key = lambda tokenizer: [row[0] for row in yardsticks.of_tokenizer(tokenizer, train_set, images)]
    assert key(vectors) == ["pca_psnr_db"] and key(ids) == key(placeless) == ["kmeans_psnr_db"]
    assert key(odd) == []
    assert yardsticks.seam_rows(placeless, real=images) == []
    assert yardsticks.seam_rows(ids, real=images)[0][2] == yardsticks.seams(images, 4)


def test_psnr_is_that_of_the_metrics():
    a = drawn_images(4)
    b = (a + 0.1 * torch.randn_like(a)).clamp(-1, 1)
    assert yardsticks.psnr_of(b, a) == pytest.approx(metrics.psnr(a, b).mean().item(), abs=1e-4)
