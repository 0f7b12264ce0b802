"""Tests of vae.Patches: exact inverse and change of variables, bits per dimension from flags to a number."""
import json
import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

import data
import evaluate
import train
import vae
from common import runs, tokens
from tests.small_world import small_world


def photos(n, grey=False, side=8):
    """8-bit images (n, 3, side, side) whose neighbouring pixels are alike; one corner never changes."""
    x = torch.randn(n, 1 if grey else 3, side, side).cumsum(-1).cumsum(-2)
    x[..., 0, 0] = 0
    values = (127.5 + 12 * x).round().clamp(0, 255).expand(-1, 3, -1, -1)
    return values / 127.5 - 1


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("patch", [2, 4])
def test_patches_are_invertible_and_lose_no_pixel(patch, grey):
    images = photos(500, grey)
    model = vae.Patches(8, patch, patch**2 if grey else None)
    model.start(images)
    assert model.token_dim == model.path.basis.shape[1] == (1 if grey else 3) * patch**2
    again = model.decode(model.posterior(images)[0])
    assert again.shape == images.shape and (again - images).abs().max() < 1e-6
    steps = (model.decode(model.encode(images)) - images) * 127.5       # the noise is rounded away, but for
    assert steps.abs().max() < 1.01 and (steps.abs() > 0.5).float().mean() < 1e-3    # some at the border
    model = model.double()
    images = images.double()
    model.start(images)                                     # eigenvectors in float64
    x = model.dequantised(images)
    assert (model.path.inverse(model.path(x), model.grid) - x).abs().max() < 1e-6
    z = torch.randn(5, model.seq_len, model.token_dim, dtype=torch.float64)
    assert (model.path(model.path.inverse(z, model.grid)) - z).abs().max() < 1e-6
    assert torch.equal(model.posterior(images)[0], model.encode(images, torch.full_like(images, 0.5)[:, :1]))


def test_noise_is_uniform_over_one_step():
    images = photos(200)
    noise = (vae.Patches(8, 4).dequantised(images) - images) * 127.5
    assert -0.501 < noise.min() < -0.49 and 0.49 < noise.max() < 0.501
    assert abs(noise.mean()) < 0.01 and abs(noise.var() - 1 / 12) < 0.002


def test_tokens_of_patches_are_white():
    images = photos(3000)
    model = vae.Patches(8, 4)
    model.start(images)
    z = model.encode(images).flatten(0, 1)
    assert z.mean(0).abs().max() < 0.01
    assert (z.T.cov() - torch.eye(48)).abs().max() < 0.05


@pytest.mark.parametrize("grey", [False, True])
def test_bits_per_dimension_hold_the_log_determinant_of_autograd(grey):
    """What a density of tokens is as one of pixel values 0 .. 255, by the Jacobian of the whole map."""
    images = photos(200, grey)
    model = vae.Patches(8, 2, 4 if grey else None)
    model.start(images)
    model = model.double()
    shape = (1, model.channels, 8, 8)
    n = math.prod(shape)
    jacobian = torch.autograd.functional.jacobian(
        lambda values: model.path((values / 127.5 - 1).view(shape)).flatten(), 255 * torch.rand(n).double())
    log_det = torch.linalg.slogdet(jacobian).logabsdet
    nats = 1.7                                              # of a token, by whatever model
    truth = (nats * model.seq_len - log_det) / (n * math.log(2))
    assert model.bits_per_dim(nats) == pytest.approx(truth.item(), rel=1e-6)


def test_a_gaussian_model_pays_the_entropy_of_a_gaussian():
    """N(0, 1) of whitened tokens is the Gaussian of the pixels: 1/2 log2 det(2 pi e C), C in pixel values."""
    images = photos(800)
    model = vae.Patches(8, 4).double()
    torch.manual_seed(3)
    model.start(images.double())
    torch.manual_seed(3)
    noisy = model.dequantised(images.double())              # the same noise
    z = model.path(noisy)
    nats = 0.5 * (z**2 + math.log(2 * math.pi)).sum(-1).mean()
    covariance = np.cov(cut(noisy.numpy(), 4) * 127.5, rowvar=False)
    entropy = MultivariateNormal(torch.zeros(48).double(), torch.from_numpy(covariance)).entropy()
    assert model.bits_per_dim(nats).item() == pytest.approx(entropy.item() / (48 * math.log(2)), rel=1e-3)


def cut(x, p):
    """x (N, c, H, W) -> (N * T, c * p * p), by loops."""
    return np.stack([picture[:, i:i + p, j:j + p].reshape(-1) for picture in x
                     for i in range(0, x.shape[2], p) for j in range(0, x.shape[3], p)])


def test_a_uniform_density_of_pixels_costs_eight_bits():
    """256 values, each as likely: the bound is tight, whatever the eigenvectors are."""
    images = photos(300)
    model = vae.Patches(8, 4)
    model.start(images)
    of_a_token = 48 * math.log(256 / 127.5) - model.path.std.log().sum()              # -log density of z
    assert model.bits_per_dim(of_a_token).item() == pytest.approx(8, rel=1e-6)


def test_noise_of_a_batch_is_fresh_and_shared_out_among_processes():
    images = (127.5 * (photos(20) + 1)).round().to(torch.uint8)
    source = tokens.Pixels(vae.Patches(8, 4), data.ImageSet(images, torch.arange(20) % 3, "abc", "cpu"))
    index = torch.tensor([3, 1, 4, 15])
    torch.manual_seed(0)
    whole, labels = source.batch(index)
    assert whole.shape == (4, 4, 48) and labels.tolist() == [0, 1, 1, 0] and len(source) == 20
    assert not torch.equal(source.batch(index)[0], whole)
    for rank in (0, 1):
        torch.manual_seed(0)
        share, labels = source.batch(index, slice(rank, None, 2))
        assert torch.equal(share, whole[rank::2]) and labels.tolist() == [[0, 1], [1, 0]][rank]


def test_pixels_go_from_flags_to_bits_per_dimension(tmp_path):
    """train.py without a step of stage 1, its run folder, and evaluate.py's number by the formula."""
    words = ["--tokenizer", "patches", "--tok_size", "dot", "--size", "dot", "--image_size", "8", "--steps",
             "4", "--batch_size", "4", "--n_shapes", "24", "--device", "cpu", "--runs", str(tmp_path)]
    with small_world():
        train.main(words)
        for file in ("shapes-patches/reconstructions.png", "shapes-patches-ar-gmm/samples.png"):
            assert not (tmp_path / file).exists() or (tmp_path / file).stat().st_size > 0
        alone = runs.load_run(tmp_path / "shapes-patches")
        run = runs.load_run(tmp_path / "shapes-patches-ar-gmm")
        assert torch.equal(alone.tokenizer.path.basis, run.tokenizer.path.basis)
        assert alone.tokenizer.path.std.min() > 0 and alone.tokenizer.path.std.max() != 1, "the PCA is saved"
        evaluate.main([str(tmp_path / "shapes-patches"), "--device", "cpu", "--n", "20"])
        evaluate.main([str(tmp_path / "shapes-patches-ar-gmm"), "--device", "cpu", "--n", "20"])
    of_tokenizer = json.loads((tmp_path / "shapes-patches" / "metrics.json").read_text())
    found = json.loads((tmp_path / "shapes-patches-ar-gmm" / "metrics.json").read_text())
    assert of_tokenizer["recon_psnr_db"] > 100, "nothing is lost"
    bits, nats = found["val_bits_per_dim_uniform"], found["val_nll_nats_per_token"]
    D, log_det = 12, run.tokenizer.path.std.log().sum().item()
    assert bits == pytest.approx((nats + log_det + D * math.log(127.5)) / (D * math.log(2)), rel=1e-5)
    assert 0 < bits < 12


@pytest.mark.parametrize("words, sentence", [
    (["--tok_steps", "5"], "nothing is trained in stage 1; leave --tok_steps"),
    (["--gan", "0.5"], "nothing is trained in stage 1"),
    (["--token_dim", "20"], "--token_dim 20: patches of --tok_size 4 have 3 x 4.2 numbers, or 4.2 in grey"),
    (["--tok_size", "3"], "--tok_size 3: --tokenizer patches has 2, 4, 8"),
    (["--image_size", "30"], "--image_size 30 .*not a multiple of 4"),
    (["--head", "categorical"], "--head categorical does not fit --tokenizer patches")])
def test_patches_refuse_in_a_sentence(words, sentence, tmp_path):
    with pytest.raises(data.BadInput, match=sentence):
        train.main(["--tokenizer", "patches", *words, "--device", "cpu", "--runs", str(tmp_path)])
    with pytest.raises(data.BadInput, match="--tok_steps 0: must be at least 1"):
        train.main(["--tokenizer", "vae", "--tok_steps", "0", "--device", "cpu", "--runs", str(tmp_path)])


def test_grey_pictures_are_patches_of_one_channel(tmp_path):
    args = train.parse_args(["--tokenizer", "patches", "--device", "cpu", "--runs", str(tmp_path)])
    args = runs.resolve(args, *runs.folders(args))
    args.data = "mine"
    for grey, numbers in ((True, 16), (False, 48)):
        args.token_dim = None
        images = (127.5 * (photos(20, grey) + 1)).round().to(torch.uint8)
        runs.suit(args, data.ImageSet(images, torch.zeros(20).long(), "a", "cpu"))
        assert args.token_dim == numbers and runs.build_tokenizer(args).channels == numbers // 16
