"""Homework of vae.py: each test grades one function and says what the mistake may be."""
import torch
from torch import distributions as D

import vae
from homework.kit import check, exercise


@exercise("vae.VAE.kl", points=3)
def test_homework_vae_kl():
    mean, std = torch.randn(2, 5, 3), torch.rand(2, 5, 3) + 0.3
    truth = D.kl_divergence(D.Normal(mean, std), D.Normal(0.0, 1.0)).sum(-1)
    check(
        "KL", vae.VAE.kl(mean, std), truth,
        "In nats per token: 1/2 sum_d (mean^2 + std^2 - 1 - log std^2). Without -1 it is "
        "+1.500, with log std for log std^2 " +
        f"{std.log().sum(-1).mean() / 2:+.3f}, with a mean over D a third of it.")


@exercise("vae.VAE.reparameterise", points=2)
def test_homework_vae_reparameterise():
    mean, std = (torch.tensor(v).repeat(1, 40_000, 1).requires_grad_()
                 for v in ([[[-2.0, 1.0]]], [[[0.5, 3.0]]]))
    z = vae.VAE.reparameterise(mean, std)
    check("the mean of 40,000 draws", z.mean((0, 1)), torch.tensor([-2.0, 1.0]), "z = mean + std * noise.",
          0.06)
    check("their std", z.std((0, 1)), torch.tensor([0.5, 3.0]),
          "std is not a variance, and the noise is normal.", 0.03)
    skew = ((z - mean) / std).pow(4).mean().item()
    assert abs(skew - 3) < 0.2, f"the fourth moment of the noise is {skew:.2f}: a normal has 3, a uniform 1.8"
    z.sum().backward()
    assert mean.grad is not None and std.grad is not None, "gradients must reach mean and std: nothing may be detached"
    check("dz / dmean", mean.grad, torch.ones_like(mean))
    check("dz / dstd", std.grad, ((z - mean) / std).detach(), "It is the noise.", 1e-3)


@exercise("vae.VAE.log_likelihood", points=3)
def test_homework_vae_log_likelihood():
    model, v = vae.VAE(likelihood="logistic"), torch.arange(256.0)
    with torch.no_grad():
        model.log_scale.copy_(torch.tensor([-2.0, -3.0, -1.0]))
    images, raw = (v / 127.5 - 1).view(256, 1, 1, 1).expand(256, 3, 1,
                                                            1), torch.tensor([0.1, -0.8,
                                                                              1.2]).view(1, 3, 1, 1)
    ours = model.log_likelihood(images, raw.expand(256, 3, 1, 1))
    edges = (torch.arange(257).double() * 2 - 1) / 255 - 1  # value v lies between the edges v and v + 1
    cdf = torch.sigmoid((edges[:, None] - raw.flatten()) * torch.exp(-model.log_scale.detach().double()))
    cdf[0], cdf[-1] = 0, 1
    check("log p of the values 1 .. 254 of a pixel", ours[1:-1], (cdf[1:] - cdf[:-1]).log().sum(1)[1:-1],
          "sigmoid(a) - sigmoid(b), summed over the three channels (in logs).", 1e-3)
    check("log p of the values 0 and 255", ours[::255], (cdf[1:] - cdf[:-1]).log().sum(1)[::255],
          "The outermost bins are open: all that lies beyond belongs to them.", 1e-3)
    far = model.log_likelihood(images[:3], raw.expand(3, 3, 1, 1) + 40)
    assert torch.isfinite(
        far).all(), "log p far from the mean is not finite: the difference of two sigmoids is 0 in float32"


@exercise("vae.VAE.measure", points=2)
def test_homework_vae_measure():
    model, std = vae.VAE(token_dim=2), torch.full((300, 16, 2), 2.0)
    mean = torch.randn(300, 16, 2) * torch.tensor([0.5, 4.0]) + torch.tensor([3.0, -1.0])
    model.measure(mean, std)
    z = (mean + std * torch.randn(20, 300, 16, 2)).flatten(0, 2)
    z = (z - model.latent_mean) * model.latent_scale
    check("the mean of normalised tokens", z.mean(0), torch.zeros(2),
          "latent_mean is taken over images and places.", 0.02)
    check(
        "their variance", z.var(0), torch.ones(2), "The spread of the means and the noise of each token add: "
        "var(mean) + E[std^2]; and latent_scale is 1 over its root.", 0.02)
