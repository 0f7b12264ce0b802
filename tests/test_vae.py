"""Tests of vae."""
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import distributions as D

import ar_transformer
import data
import gmm_head
import vae
from tests.helpers import close, official_vae


def test_vae_loads_official_weights_and_gets_the_authors_numbers():
    sd, encoder, decoder = official_vae()
    model = vae.VAE.from_official(sd)
    with torch.no_grad():
        mean, std = model.posterior(encoder["image"])
        grid = lambda v: v.flatten(2).transpose(1, 2)
        close(mean, grid(encoder["mean"]))
        close(std, grid(encoder["std"]))
        close(model.kl(mean, std).sum(1), encoder["kl"])
        close(model.decode_raw(grid(decoder["z_mode"])), decoder["rec_mode"])
        close(model.decode_raw(grid(decoder["z_sample"])), decoder["rec_sample"])
        tokens = model.normalise(mean)
        close(tokens, mean * 0.2325)
        close(model.decode(tokens), decoder["rec_mode"].clamp(-1, 1))


def test_vae_from_official_names_the_key_that_does_not_fit(tmp_path):
    sd, _, _ = official_vae()
    torch.save({"state_dict": sd}, tmp_path / "kl.ckpt")
    assert vae.VAE.from_official(tmp_path / "kl.ckpt").seq_len == 256
    with pytest.raises(ValueError, match="decoder.extra.weight"):
        vae.VAE.from_official(sd | {"decoder.extra.weight": torch.zeros(1)})
    del sd["decoder.mid.attn_1.q.bias"]
    with pytest.raises(ValueError, match="q.bias"):
        vae.VAE.from_official(sd)


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
        assert torch.allclose(model.decode(model.normalise(mean)), model.decode_raw(mean).clamp(-1, 1), atol=1e-5)


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
    assert torch.allclose(model.posterior(colour)[0], model.posterior(grey)[0], atol=1e-4), "only the average is seen"
    for recon in (model.decode(model.encode(grey)), model.reconstruct(grey)[0]):
        assert recon.shape == grey.shape and torch.equal(recon[:, 0], recon[:, 2])
    torch.manual_seed(1)
    loss, logs = model(grey)
    assert torch.allclose(loss, logs["mse"] + model.beta * logs["kl"] * 16 / 1024), "a grey pixel is one number, not three"
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
    def slow(v, m, s):                                      # float64; 1 - sigmoid(t) = sigmoid(-t) keeps the upper tail
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
    three, x = logistic_vae(), data.to_uint8(data.draw(torch.arange(2))[0]).float() / 127.5 - 1
    with torch.no_grad():
        three.log_scale.copy_(torch.tensor([-3.0, -1.0, 0.0]))
        parts = []
        for c in range(3):
            nn.init.constant_(model.log_scale, three.log_scale[c].item())
            parts.append(model.log_likelihood(x[:, c:c + 1], x[:, c:c + 1] / 2))
        assert torch.allclose(three.log_likelihood(x, x / 2), sum(parts), rtol=1e-4), "each channel has its own scale"


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
        model.quant_conv.bias[:8] += 1.0                    # a posterior far from the prior: KL 4 + nats per token
        model.quant_conv.bias[8:] -= 2.0
        draws = [vae.bound(model, NormalPrior(), images, zeros) for _ in range(10)]
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
    plain = vae.bound(model, NormalPrior(), images, cond)[1]
    model.latent_mean.copy_(torch.randn(8))
    model.latent_scale.copy_(torch.rand(8) + 0.2)
    prior = NormalPrior(-model.latent_mean * model.latent_scale, model.latent_scale)        # N(0, 1) seen through normalise()
    torch.manual_seed(1)
    scaled = vae.bound(model, prior, images, cond)[1]
    assert all(torch.allclose(plain[k], scaled[k], rtol=1e-4) for k in plain)
    with pytest.raises(ValueError, match="logistic"):
        vae.bound(vae.VAE(), NormalPrior(), images, cond)


def test_joint_bound_stays_above_the_true_surprise_found_by_quadrature():
    """One token of one number: log p(image | class) is an integral over a line, with a transformer's mixture as prior."""
    model = logistic_vae(image_size=2, token_dim=1, ch_mult=(1, 2)).eval()
    prior = ar_transformer.ARTransformer(gmm_head.GMMHead(32, 1, 4), 1, 3, token_dim=1, n_layer=1, n_head=2, n_embd=32).eval()
    images, cond, dims = torch.randint(256, (4, 3, 2, 2)) / 127.5 - 1, torch.tensor([0, 1, 2, 0]), 12 * math.log(2)
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
        joint = vae.Joint(model, prior).eval()
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
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (model.log_scale, model.quant_conv.weight, prior.head.proj.weight))


def test_joint_training_lowers_its_bound():
    model = logistic_vae(image_size=16)
    prior = ar_transformer.ARTransformer(gmm_head.GMMHead(32, 8, 2), 4, 10, token_dim=8, n_layer=1, n_head=2, n_embd=32)
    joint, (images, labels, *_) = vae.Joint(model, prior), data.draw(torch.arange(64), 16)
    opt, losses = torch.optim.AdamW(joint.parameters(), lr=3e-3), []
    for step in range(40):
        loss, _ = joint(images, labels)
        opt.zero_grad(), loss.backward(), opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5, f"{losses[0]:.2f} to {losses[-1]:.2f} bits per dimension"
