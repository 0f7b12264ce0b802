"""Tests of vae."""
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import distributions as D

import data
from common import pictures
import vae
from tests.helpers import like_photographs


def test_vae_of_the_papers_has_its_parameter_count():
    with torch.device("meta"):
        model = vae.VAE(**vae.SIZES["kl16"])
    assert sum(p.numel() for p in model.parameters()) == 66_456_019


def test_vae_kl_and_reparameterisation():
    mean, std = torch.randn(2, 3, 4).requires_grad_(), (torch.rand(2, 3, 4) + 0.1).requires_grad_()
    expected = D.kl_divergence(D.Normal(mean, std), D.Normal(0.0, 1.0)).sum(-1)
    assert torch.allclose(vae.VAE.kl(mean, std), expected, atol=1e-5)
    z = vae.VAE.reparameterise(mean.expand(5000, 2, 3, 4), std.expand(5000, 2, 3, 4))
    assert torch.allclose(z.mean(0), mean, atol=0.1) and torch.allclose(z.std(0), std, rtol=0.1)
    gradient = torch.autograd.grad(z.sum(), (mean, std))
    assert all(g.abs().sum() > 0 for g in gradient), "gradients must reach mean and std"


def test_vae_tokens_have_unit_variance_and_decode_inverts_the_scale():
    model = vae.VAE().eval()
    images = data.draw(torch.arange(200))[0]
    with torch.no_grad():
        mean, std = model.posterior(images)
        model.measure(mean, std)
        tokens = model.encode(images)
        assert tokens.shape == (200, 16, 8) and tokens.dtype == torch.float32
        assert torch.allclose(tokens.flatten(0, 1).std(0), torch.ones(8), atol=0.1)
        assert torch.allclose(tokens.flatten(0, 1).mean(0), torch.zeros(8), atol=0.1)
        assert torch.allclose(model.decode(model.normalise(mean)),
                              model.decode_raw(mean).clamp(-1, 1), atol=1e-5)


def test_vae_loss_is_squared_error_plus_beta_kl_and_the_others_lack_a_term():
    images = data.draw(torch.arange(8))[0]
    model = vae.VAE(beta=0.3)
    torch.manual_seed(1)
    loss, logs = model(images)
    assert torch.allclose(loss, logs["mse"] + 0.3 * logs["kl"] * 16 / 3072)
    auto = vae.VAE(beta=0)
    assert torch.equal(auto.encode(images), auto.encode(images)), "an autoencoder draws no noise"
    denoising = vae.VAE(beta=0, corrupt=0.5)
    assert not torch.equal(denoising(images)[0], denoising(images)[0])
    assert torch.equal(denoising.eval()(images)[0], denoising(images)[0]), "in eval mode the input is clean"


def test_vae_sees_grey_images_and_label_maps():
    grey = data.draw(torch.arange(4))[0].mean(1, keepdim=True).expand(-1, 3, -1, -1)
    model = vae.VAE(channels=1)
    assert model.encoder[0].weight.shape[1] == model.decoder[-1].weight.shape[0] == 1
    colour = grey + torch.tensor([0.3, -0.1, -0.2])[:, None, None]
    assert torch.allclose(model.posterior(colour)[0],
                          model.posterior(grey)[0], atol=1e-4), "only the average is seen"
    for recon in (model.decode(model.encode(grey)), model.reconstruct(grey)[0]):
        assert recon.shape == grey.shape and torch.equal(recon[:, 0], recon[:, 2])
    torch.manual_seed(1)
    loss, logs = model(grey)
    assert torch.allclose(loss, logs["mse"] +
                          model.beta * logs["kl"] * 16 / 1024), "a grey pixel is one number, not three"
    maps = F.one_hot(data.draw(torch.arange(4))[2].long(), 11).permute(0, 3, 1, 2).float() * 2 - 1
    model = vae.VAE(channels=11)
    assert model.decode(model.encode(maps)).shape == maps.shape == (4, 11, 32, 32)
    model(maps)[0].backward()
    model = vae.VAE(**vae.SIZES["mnist28"], channels=1)
    assert model.grid == (7, 7) and model.encode(torch.zeros(2, 3, 28, 28)).shape == (2, 49, 4)
    assert "log_scale" not in dict(vae.VAE().named_parameters())


def logistic_vae(channels=3, **options):
    return vae.VAE(likelihood="logistic", channels=channels, **options)


def test_vae_logistic_likelihood_equals_a_slow_loop_and_sums_to_one():
    def slow(v, m, s):                            # float64; 1 - sigmoid(t) = sigmoid(-t) keeps the upper tail
        sigmoid = lambda t: 1 / (1 + math.exp(-t)) if t > -700 else 0.0
        a, b = (v / 127.5 - 1 + 1 / 255 - m) / s, (v / 127.5 - 1 - 1 / 255 - m) / s
        if v in (0, 255):
            return sigmoid(a) if v == 0 else sigmoid(-b)
        return sigmoid(a) - sigmoid(b) if a < 0 else sigmoid(-b) - sigmoid(-a)
    model, everything = logistic_vae(channels=1, image_size=8), torch.arange(256.0)
    images = (everything / 127.5 - 1).view(256, 1, 1, 1)
    for log_s in (-6.5, -4.0, -2.0, 0.0, 2.0):
        nn.init.constant_(model.log_scale, log_s)
        for m in (-1.7, -1.0, -0.313, 0.0, 0.5, 1.0, 1.2):
            log_p = model.log_likelihood(images, torch.full((256, 1, 1, 1), m))
            assert torch.isfinite(log_p).all() and abs(log_p.double().exp().sum() - 1) < 1e-4
            expected = torch.tensor([slow(v, m, math.exp(log_s)) for v in range(256)], dtype=torch.float64)
            seen = expected > 1e-250
            error = (log_p - expected.log())[seen].abs() / (1 + expected.log()[seen].abs())
            assert error.max() < 2e-4, f"log P off by {error.max():.1e} for m = {m}, log s = {log_s}"
    nn.init.constant_(model.log_scale, -200.0)              # the floor holds, gradients stay finite far away
    raw = torch.full((256, 1, 1, 1), 30.0, requires_grad=True)
    model.log_likelihood(images, raw).sum().backward()
    assert torch.isfinite(raw.grad).all() and (raw.grad[:255] < 0).all()
    three, x = logistic_vae(), pictures.to_uint8(data.draw(torch.arange(2))[0]).float() / 127.5 - 1
    with torch.no_grad():
        three.log_scale.copy_(torch.tensor([-3.0, -1.0, 0.0]))
        parts = []
        for c in range(3):
            nn.init.constant_(model.log_scale, three.log_scale[c].item())
            parts.append(model.log_likelihood(x[:, c:c + 1], x[:, c:c + 1] / 2))
        assert torch.allclose(three.log_likelihood(x, x / 2), sum(parts),
                              rtol=1e-4), "each channel has its own scale"


@pytest.mark.parametrize("channels", [1, 3])
def test_vae_logistic_loss_is_the_bound_in_bits_per_dimension(channels):
    images = data.draw(torch.arange(8))[0].mean(1, keepdim=True).expand(-1, 3, -1, -1)
    model, dims = logistic_vae(channels, beta=0.5), channels * 1024
    torch.manual_seed(1)
    loss, logs = model(images)
    torch.manual_seed(1)
    mean, std = model.posterior(images)
    nats = -model.log_likelihood(images, model.decode_raw(model.reparameterise(mean, std))).mean()
    kl = D.kl_divergence(D.Normal(mean, std), D.Normal(0.0, 1.0)).sum((1, 2)).mean()
    assert torch.allclose(loss, (nats + 0.5 * kl) / (dims * math.log(2)), rtol=1e-4)
    assert torch.allclose(logs["bits_per_dim"], (nats + kl) / (dims * math.log(2)), rtol=1e-4)
    loss.backward()
    assert model.log_scale.grad.abs().min() > 0


def pca_error(images, patch, n, border):
    """Squared error of the best linear autoencoder of patches, by numpy: images (N, 3, H, W), n numbers per
    patch.
    """
    path = vae.LinearPath(patch, 3 * patch**2, n, border)
    x = path.cut(images).flatten(0, 1).double().numpy()
    mean = x.mean(0)
    _, _, vectors = np.linalg.svd(x - mean, full_matrices=False)
    kept = (x - mean) @ vectors[:n].T @ vectors[:n] + mean
    return torch.from_numpy(kept).float()


@pytest.mark.parametrize("token_dim, border", [(16, 2.0), (8, 1.0)])
def test_vae_starts_as_principal_components(token_dim, border):
    """Before any training step, tokens and reconstructions are those of PCA of as many numbers."""
    images = data.draw(torch.arange(300))[0]
    model = vae.VAE(**vae.SIZES["patches"] | dict(token_dim=token_dim))
    model.path.border = border
    model.start(images)
    path = model.path
    truth = path.join(pca_error(images, path.patch, token_dim, border).view(300, 16, -1), (4, 4))
    mean, std = model.posterior(images)
    ours = model.decode_raw(mean)
    assert (ours - truth).square().mean() < 1e-6
    decibel = 10 * torch.log10((truth - images).square().mean() / (ours - images).square().mean())
    assert abs(decibel) < 0.1
    assert torch.allclose(mean.flatten(0, 1).var(0), torch.ones(token_dim), atol=0.05)


def test_vae_linear_path_and_its_stretched_borders_are_invertible():
    """With as many numbers as a patch has, nothing is lost."""
    images = torch.rand(400, 3, 16, 16) * 2 - 1
    path = vae.LinearPath(4, 48, 48, border=2.0)
    path.start(images)
    assert torch.allclose(path.inverse(path(images), (4, 4)), images, atol=1e-4)
    assert torch.allclose(path.join(path.cut(images), (4, 4)), images, atol=1e-6)


@pytest.mark.parametrize("kind", ["drawn shapes", "like photographs"])
def test_vae_never_ends_below_its_linear_path(kind):
    images = data.draw(torch.arange(600))[0] if kind == "drawn shapes" else like_photographs(600)
    model = vae.VAE(**vae.SIZES["mini"])
    model.start(images)
    with torch.no_grad():
        before = (model.decode(model.normalise(model.posterior(images)[0])) - images).square().mean()
    path = model.path
    best = pca_error(images, path.patch, model.token_dim, path.border).view(600, -1, 3 * path.patch**2)
    pca = (path.join(best, model.grid) - images).square().mean()
    assert before < 1.02 * pca, "it does not start at PCA"
    vae.fit_autoencoder(model, images, steps=25)
    with torch.no_grad():
        after = (model.decode(model.normalise(model.posterior(images)[0])) - images).square().mean()
    assert after < min(before, pca)


def test_vae_linear_path_is_in_the_checkpoint():
    images = data.draw(torch.arange(50))[0]
    model = vae.VAE(**vae.SIZES["patches"])
    model.start(images)
    other = vae.VAE(**vae.SIZES["patches"])
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.path.basis, model.path.basis)
    assert not any("path." in name for name in vae.VAE(**vae.SIZES["small"]).state_dict())


@pytest.mark.parametrize("bias, logvar", [(1e4, 20.0), (-1e4, -30.0), (3.0, 3.0)])
def test_the_log_variance_is_kept_in_a_range_that_float32_can_square(bias, logvar):
    model = vae.VAE(image_size=16).eval()
    with torch.no_grad():
        model.quant_conv.weight.zero_()
        model.quant_conv.bias[8:] = bias
    _, std = model.posterior(torch.zeros(1, 3, 16, 16))
    assert torch.allclose(std, torch.tensor(logvar / 2).exp())
    assert torch.isfinite(model.kl(torch.zeros_like(std), std)).all()
