"""Tests of recipes/joint.py."""
import math

import pytest
import torch
import torch.nn as nn
from torch import distributions as D

import ar_transformer
import data
import gmm_head
import vae
from recipes.joint import Joint, bound


def logistic_vae(channels=3, **options):
    return vae.VAE(likelihood="logistic", channels=channels, **options)


class NormalPrior(nn.Module):
    """A generator of independent tokens N(mean, std^2): what ARTransformer.forward returns, in one line."""

    def __init__(self, mean=0.0, std=1.0):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, tokens, cond):
        return -D.Normal(self.mean, self.std).log_prob(tokens).sum(-1).mean(), {}


def test_joint_bound_with_a_standard_normal_prior_is_the_elbo():
    images = data.draw(torch.arange(200))[0]
    model, zeros = logistic_vae(beta=1.0).eval(), torch.zeros(200, dtype=torch.long)
    with torch.no_grad():
        model.quant_conv.bias[:8] += 1.0               # a posterior far from the prior: KL 4 + nats per token
        model.quant_conv.bias[8:] -= 2.0
        draws = [bound(model, NormalPrior(), images, zeros) for _ in range(10)]
        rate = sum((logs["prior"] - logs["entropy"]).item() for _, logs in draws) / 10
        elbo = [model(images)[0].item() for _ in range(10)]
    kl = model.kl(*model.posterior(images)).sum(1).mean() / (3072 * math.log(2))
    assert abs(rate / kl - 1) < 0.01, "the prior minus the entropy is the KL"
    assert abs(sum(loss.item() for loss, _ in draws) / sum(elbo) - 1) < 0.01
    loss, logs = draws[0]
    assert torch.allclose(loss, logs["pixels"] + logs["prior"] - logs["entropy"])


def test_joint_bound_does_not_depend_on_the_normalisation():
    images, cond = data.draw(torch.arange(16))[0], torch.zeros(16, dtype=torch.long)
    model = logistic_vae().eval()
    torch.manual_seed(1)
    plain = bound(model, NormalPrior(), images, cond)[1]
    model.latent_mean.copy_(torch.randn(8))
    model.latent_scale.copy_(torch.rand(8) + 0.2)
    # N(0, 1) seen through normalise()
    prior = NormalPrior(-model.latent_mean * model.latent_scale, model.latent_scale)
    torch.manual_seed(1)
    scaled = bound(model, prior, images, cond)[1]
    assert all(torch.allclose(plain[k], scaled[k], rtol=1e-4) for k in plain)
    with pytest.raises(ValueError, match="logistic"):
        bound(vae.VAE(), NormalPrior(), images, cond)


def test_joint_bound_stays_above_the_true_surprise_found_by_quadrature():
    """One token of one number: log p(image | class) is an integral over a line, with a transformer's mixture
    as prior.
    """
    model = logistic_vae(image_size=2, token_dim=1, ch_mult=(1, 2)).eval()
    prior = ar_transformer.ARTransformer(gmm_head.GMMHead(32, 1, 4), 1, 3, token_dim=1, n_layer=1, n_head=2,
                                         n_embd=32).eval()
    images, cond, dims = torch.randint(256, (4, 3, 2, 2)) / 127.5 - 1, torch.tensor([0, 1, 2,
                                                                                     0]), 12 * math.log(2)
    with torch.no_grad():
        model.latent_mean.fill_(0.3), model.latent_scale.fill_(0.6)
        for p in model.decoder.parameters():                # a picture that depends on z
            p.add_(0.05 * torch.randn_like(p))
        z = torch.linspace(-25, 25, 8001)[:, None, None]
        raw, tokens = model.decode_raw(z), model.normalise(z)
        mean, std = model.posterior(images)
        exact, expected = [], []
        for i in range(4):
            log_x = model.log_likelihood(images[i:i + 1].expand(8001, -1, -1, -1), raw).double()
            h = prior.hidden(tokens[:1], cond[i:i + 1])
            log_z = prior.head.log_prob(h.expand(8001, -1, -1), tokens).double()[:, 0] + math.log(0.6)
            q = D.Normal(mean[i, 0, 0].double(), std[i, 0, 0].double()).log_prob(z[:, 0, 0].double())
            step = 50 / 8000
            assert abs(log_z.exp().sum() * step - 1) < 1e-3
            exact.append(-torch.logsumexp(log_x + log_z, 0) - math.log(step))
            expected.append((q.exp() * (q - log_x - log_z)).sum() * step)
        many = torch.arange(4).repeat(2000)
        joint = Joint(model, prior).eval()
        estimate = joint(images[many], cond[many])[0]
        assert abs(estimate * dims / torch.stack(expected).mean() - 1) < 0.01
        assert all(e > x for e, x in zip(expected, exact)), "a bound on -log p below -log p"
        draws = model.reparameterise(mean[:1].expand(20_000, -1, -1), 2 * std[:1].expand(20_000, -1, -1))
        h = prior.hidden(model.normalise(draws[:1]), cond[:1]).expand(20_000, -1, -1)
        weights = (model.log_likelihood(images[:1].expand(20_000, -1, -1, -1), model.decode_raw(draws))
                   + prior.head.log_prob(h, model.normalise(draws))[:, 0] + math.log(0.6)
                   - D.Normal(mean[0], 2 * std[0]).log_prob(draws)[:, 0, 0])
        importance = math.log(20_000) - torch.logsumexp(weights, 0)
        assert abs(importance - exact[0]) < 0.1, "importance sampling finds the same log p"
    joint.train()(images, cond)[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0
               for p in (model.log_scale, model.quant_conv.weight, prior.head.proj.weight))


def test_joint_training_lowers_its_bound():
    model = logistic_vae(image_size=16)
    prior = ar_transformer.ARTransformer(gmm_head.GMMHead(32, 8, 2), 4, 10, token_dim=8, n_layer=1, n_head=2,
                                         n_embd=32)
    joint, (images, labels, *_) = Joint(model, prior), data.draw(torch.arange(64), 16)
    opt, losses = torch.optim.AdamW(joint.parameters(), lr=3e-3), []
    for step in range(40):
        loss, _ = joint(images, labels)
        opt.zero_grad(), loss.backward(), opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5, f"{losses[0]:.2f} to {losses[-1]:.2f} bits per dimension"
