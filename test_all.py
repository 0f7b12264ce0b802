"""
The tests: every formula against something independent (the authors' own arrays in golden/, a closed form,
torch.distributions, a slow loop, an inverse, the uncached path), and the programs as a user runs them.

    python -m pytest test_all.py          # about 3.5 minutes on 2 CPU cores; no network, no GPU
"""
import argparse
import ast
import csv
import io
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import distributions as D

import ar_transformer
import data
import diffusion_head
import evaluate
import flow_adapter
import gmm_head
import mar
import maskgit
import sample
import train
import vae
import vq

ROOT = Path(__file__).resolve().parent
MODELS = [p for p in "vae vq lfq titok flow_adapter gmm_head diffusion_head ar_transformer maskgit mar".split()
          if (ROOT / f"{p}.py").exists()]
PROGRAMS = ["train", "sample", "evaluate"]


def golden(name):
    """Arrays of golden/<name>.npz as tensors; weights stored as float16 become float32."""
    with np.load(ROOT / "golden" / f"{name}.npz", allow_pickle=False) as f:
        arrays = {k: torch.from_numpy(f[k]) for k in f.files if f[k].dtype.kind != "U"}
    return {k: v.float() if v.dtype == torch.float16 else v for k, v in arrays.items()}


def close(ours, reference, tolerance=1e-4):
    """Equal within `tolerance` of the largest reference value."""
    worst = (ours - reference).abs().max() / reference.abs().max().clamp(min=1e-12)
    assert worst <= tolerance, f"off by {worst:.2e} of the largest value, allowed {tolerance:.0e}"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------------------
# gmm_head.py

@pytest.mark.parametrize("k", [1, 4, 16])
def test_gmm_reproduces_the_authors_likelihood_and_gradient(k):
    g = golden(f"givt/gmm_nll_k{k}")
    raw = g["raw"].clone().requires_grad_()
    head = gmm_head.GMMHead(8, g["x"].shape[-1], k, min_scale=1e-6)
    head.proj = nn.Identity()                               # the arrays hold raw outputs
    log_pi, mu, sigma = head.mixture(raw)
    close(log_pi, g["mix_logits"].log_softmax(-1))
    close(mu, g["locs"])
    close(sigma, g["scales"])
    nll = head.loss(raw, g["x"])
    close(nll, g["nll"])
    nll.mean().backward()
    floor = g["scales"] <= 1e-6                             # on the floor only sigma's own gradient is a convention
    keep = torch.ones_like(raw, dtype=torch.bool)
    keep[..., k:].view(*raw.shape[:-1], k, 2, -1)[..., 1, :][floor] = False
    close(raw.grad[keep], g["grad_raw"][keep])
    close(-head.density((log_pi, mu, sigma * 0.95), g["x"]), g["nll_temp_scales_0p95"])


def test_gmm_log_prob_equals_torch_distributions():
    head, h, x = gmm_head.GMMHead(12, 5, 7), torch.randn(3, 4, 12), torch.randn(3, 4, 5)
    log_pi, mu, sigma = head.mixture(h)
    mixture = D.MixtureSameFamily(D.Categorical(logits=log_pi), D.Independent(D.Normal(mu, sigma), 1))
    assert torch.allclose(head.log_prob(h, x), mixture.log_prob(x), atol=1e-5)
    far = head.log_prob(h, x + 1e3)
    assert torch.isfinite(far).all(), "log p of a far point must not underflow to -inf"


def test_gmm_is_not_symmetric_at_the_start():
    head = gmm_head.GMMHead(8, 2, 4)
    h = torch.randn(64, 8)
    head.loss(h, torch.randn(64, 2)).mean().backward()
    gradient = head.proj.weight.grad[4:].view(4, 2, 2, 8)
    assert (gradient[0] - gradient[1]).abs().max() > 1e-4, "equal components get equal gradients and stay equal"


def test_gmm_reaches_the_exact_optimum_on_the_ring_of_eight():
    ring = lambda n: gmm_head.toy_tokens(torch.full((n,), 3))
    table, head = nn.Embedding(1, 16), gmm_head.GMMHead(16, 2, 16)
    opt = torch.optim.Adam([*table.parameters(), *head.parameters()], lr=2e-2)
    zero = torch.zeros(2048, dtype=torch.long)
    for step in range(700):
        opt.param_groups[0]["lr"] = 2e-2 * (1 - step / 700)
        loss = head.loss(table(zero), ring(2048)).mean()
        opt.zero_grad(), loss.backward(), opt.step()
    x = ring(200_000)
    modes = 1.5 * torch.tensor([[math.cos(a * math.pi / 4), math.sin(a * math.pi / 4)] for a in range(8)])
    truth = D.MixtureSameFamily(D.Categorical(torch.ones(8)), D.Independent(D.Normal(modes, 0.1), 1)).log_prob(x)
    with torch.no_grad():
        excess = truth - head.log_prob(table(zero[:1]), x)  # its mean is KL(truth || model) >= 0
    error = excess.std() / len(x) ** 0.5
    assert abs(-truth.mean() - 0.312) < 0.01
    assert -4 * error <= excess.mean() <= 0.02, f"{excess.mean():.4f} nats above the optimum of 0.312"


def test_gmm_samples_have_the_moments_and_the_temperature():
    head, h = gmm_head.GMMHead(4, 3, 5), torch.randn(1, 4)
    log_pi, mu, sigma = (v[0].detach() for v in head.mixture(h))
    for temperature in (1.0, 0.5):
        x, log_p = head.sample(h.expand(200_000, -1), temperature=temperature)
        mean = (log_pi.exp()[:, None] * mu).sum(0)
        var = (log_pi.exp()[:, None] * (mu**2 + (temperature * sigma) ** 2)).sum(0) - mean**2
        assert torch.allclose(x.mean(0), mean, atol=0.02) and torch.allclose(x.var(0), var, rtol=0.03)
    assert torch.allclose(log_p, head.log_prob(h.expand(200_000, -1), x), atol=1e-4)


def test_gmm_guidance_follows_the_guided_density():
    head = gmm_head.GMMHead(1, 1, 1)
    nn.init.zeros_(head.proj.weight)
    with torch.no_grad():                                   # h moves the mean only: N(h, 1) against N(0, 1)
        head.proj.bias.zero_()
        head.proj.weight[1] = 1.0
    h, null = torch.full((20_000, 1), 0.8), torch.zeros(20_000, 1)
    x, _ = head.sample(h, null, cfg=2.0, n_tries=64)        # N(0.8)^2 / N(0) is N(1.6, 1)
    assert abs(x.mean() - 1.6) < 0.04 and abs(x.std() - 1) < 0.04


@pytest.mark.parametrize("name", ["w0p4", "w0p95"])
def test_gmm_replays_the_authors_rejection_sampler(name):
    g = golden(f"givt/cfg_density_{name}")
    pair, cfg = [g[k] for k in ("loc_c", "scale_c", "loc_u", "scale_u")], 1 + g["w"].item()
    normal = gmm_head.log_normal
    close(cfg * normal(g["xs"], *pair[:2]) + (1 - cfg) * normal(g["xs"], *pair[2:]), g["log_p"])
    scale, log_bound = gmm_head.GMMHead.envelope(*pair, cfg, official=True)
    close(scale, g["prop_scale"])
    finite = torch.isfinite(g["fac"])
    assert torch.allclose(log_bound[finite], g["fac"][finite].log(), atol=1e-4) and torch.isinf(log_bound[~finite]).all()
    accepted = gmm_head.GMMHead.accept(g["prop_samples"], g["prop_uniform01"], *pair, cfg, scale, log_bound)
    assert torch.equal(accepted, g["accept"].bool())
    early = (g["first_accept"] >= 0) & (g["first_accept"] < len(accepted))                  # 40 of 200 proposals are recorded
    ours = gmm_head.GMMHead.first_accepted(g["prop_samples"], accepted, torch.zeros(()))
    assert early.sum() > 12 and torch.equal(ours[early], g["sample"][early])
    never = gmm_head.GMMHead.first_accepted(g["prop_samples"], torch.zeros_like(accepted), pair[0])
    assert torch.equal(never, pair[0]), "no accepted try: the fallback"


def one_channel(pi, mu, sigma):
    """A mixture of one channel, on rows."""
    return torch.tensor(pi).log(), torch.tensor(mu)[:, None], torch.tensor(sigma)[:, None]


def integrate_guided(c, u, cfg):
    """Mean and std of p_c^cfg p_u^(1 - cfg) on a fine grid, with torch.distributions."""
    x = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    log_p = lambda m: D.MixtureSameFamily(D.Categorical(logits=m[0].double()), D.Normal(*(v[:, 0].double() for v in m[1:]))).log_prob(x)
    weight = (cfg * log_p(c) + (1 - cfg) * log_p(u)).softmax(0)
    mean = (weight * x).sum()
    return mean, (weight * (x - mean) ** 2).sum().sqrt()


SINGLE = [one_channel([1.0], [0.8], [0.7]), one_channel([1.0], [-0.5], [1.2])]
THREE = [one_channel([0.5, 0.3, 0.2], [-1.5, 0.3, 2.2], [0.5, 0.4, 0.3]), one_channel([0.2, 0.5, 0.3], [1.0, -1.0, 0.5], [1.5, 1.2, 1.0])]


@pytest.mark.parametrize("w", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("guidance, pair", [("closed", SINGLE), ("rejection", SINGLE), ("importance", SINGLE), ("importance", THREE)])
def test_gmm_guidance_equals_numerical_integration(guidance, pair, w):
    c, u = ([v.expand(200_000, *v.shape) for v in m] for m in pair)
    n_tries = 64 if pair is THREE else None
    x = torch.cat([gmm_head.GMMHead.draw_guided([v[:50_000] for v in c], [v[:50_000] for v in u], 1 + w, guidance, n_tries=n_tries)
                   for _ in range(4)])
    mean, std = integrate_guided(*pair, 1 + w)
    assert abs(x.mean() - mean) < 0.02 * max(std, abs(mean)) and abs(x.std() - std) < 0.02 * std, (x.mean(), mean, x.std(), std)


def test_gmm_guidance_towards_nothing_is_the_other_mixture():
    c, u = ([v.expand(100_000, *v.shape) for v in m] for m in THREE)
    x = gmm_head.GMMHead.draw_guided(c, u, 0.0)                                              # p_c^0 p_u^1
    mean, std = integrate_guided(*THREE, 0.0)
    assert abs(x.mean() - mean) < 0.02 and abs(x.std() - std) < 0.02 * std


@pytest.mark.parametrize("guidance", ["closed", "importance", "rejection", "official"])
def test_gmm_improper_guidance_is_finite(guidance):
    c = torch.zeros(500, 1), torch.full((500, 1, 2), 3.0), torch.full((500, 1, 2), 1.0)
    u = torch.zeros(500, 1), torch.zeros(500, 1, 2), torch.tensor([0.2, 3.0]).expand(500, 1, 2)   # channel 0: no density
    x = gmm_head.GMMHead.draw_guided(c, u, 3.0, guidance)
    assert torch.isfinite(x).all() and x.abs().max() < 50
    if guidance == "closed":                                # that channel stays unguided, as the docstring says
        assert abs(x[:, 0].mean() - 3) < 0.2 and abs(x[:, 0].std() - 1) < 0.15


def test_gmm_order_of_components_does_not_matter():
    turned = [v.flip(0) for v in THREE[1]]
    for guidance in ("closed", "importance"):
        drawn = []
        for u in (THREE[1], turned):
            torch.manual_seed(4)
            drawn.append(gmm_head.GMMHead.draw_guided(*([v.expand(1000, *v.shape) for v in m] for m in (THREE[0], u)), 2.0, guidance))
        assert torch.allclose(*drawn, atol=1e-4)


def test_gmm_nucleus_and_clip():
    log_pi = torch.randn(50, 6).log_softmax(-1)
    kept, _, _ = gmm_head.GMMHead.nucleus((log_pi, None, None), 0.7)
    for row, ours in zip(log_pi.exp().tolist(), kept.exp().tolist()):
        total, nucleus = 0.0, []
        for k in sorted(range(6), key=lambda k: -row[k]):
            if total < 0.7:
                nucleus.append(k)
            total += row[k]
        mass = sum(row[k] for k in nucleus)
        assert all(abs(p - (row[k] / mass if k in nucleus else 0)) < 1e-4 for k, p in enumerate(ours))
    x = gmm_head.GMMHead.draw((torch.zeros(20_000, 1), torch.full((20_000, 1, 1), 5.0), torch.full((20_000, 1, 1), 2.0)), clip=1.5)
    z = (x - 5) / 2
    assert z.abs().max() <= 1.5 and abs(z.std() - 0.7430) < 0.01, "a truncated normal, not a clamped one (std 0.85)"


@pytest.mark.parametrize("k", [1, 4, 16])
def test_gmm_per_channel_mixtures_are_the_authors(k):
    g = golden(f"givt/gmm_nll_k{k}")
    head = gmm_head.ChannelGMMHead(8, g["x"].shape[-1], k, min_scale=1e-6)
    head.proj = nn.Identity()
    raw = g["raw_pc"].clone().requires_grad_()
    nll = head.loss(raw, g["x"])
    close(nll, g["nll_pc"].sum(-1))
    close(nll.mean() / g["x"].shape[-1], g["loss_mean_pc"])
    (nll.mean() / g["x"].shape[-1]).backward()
    close(raw.grad, g["grad_raw_pc"])
    x, log_p = head.sample(raw.detach())
    assert x.shape == g["x"].shape and torch.allclose(log_p, head.log_prob(raw, x), atol=1e-3)


def test_gmm_full_covariance_is_the_authors_and_has_both_signs():
    g = golden("givt/gmm_nll_k1")
    head = gmm_head.FullGaussianHead(8, 4, 1, min_scale=1e-6, official=True)
    head.proj = nn.Identity()
    mean, factor = head.gaussian(g["raw_mv"])
    close(mean, g["loc_mv"]), close(factor, g["scale_tril_mv"])
    close(head.loss(g["raw_mv"], g["x"]), g["nll_mv"])
    head, h = gmm_head.FullGaussianHead(6, 3), torch.randn(1, 6) * 30
    mean, factor = (v[0].detach() for v in head.gaussian(h))
    assert factor[1, 0] < 0 or factor[2, 0] < 0 or factor[2, 1] < 0, "covariances of either sign"
    truth = D.MultivariateNormal(mean, scale_tril=factor)
    x, log_p = head.sample(h.expand(100_000, -1))
    assert torch.allclose(x.T.cov(), truth.covariance_matrix, atol=0.05 * truth.covariance_matrix.max())
    assert torch.allclose(log_p[:100], truth.log_prob(x[:100]), atol=1e-3)
    raw = head.proj(h).detach().expand(100_000, -1)
    wide, narrow = (torch.cat([((a - 1 / a) * torch.eye(3)).flatten(), torch.ones(3)]).expand(100_000, -1) for a in (3.0, 0.01))
    head.proj = nn.Identity()                               # square_plus(a - 1 / a) = a: factors a * identity
    x, _ = head.sample(raw, wide, cfg=1.5)
    covariance = torch.linalg.inv(1.5 * truth.precision_matrix - 0.5 * torch.eye(3) / 9)
    assert torch.linalg.eigvalsh(covariance).min() > 0 and (covariance - truth.covariance_matrix).abs().max() > 0.5
    assert torch.allclose(x.T.cov(), covariance, atol=0.05 * covariance.max())
    expected = covariance @ (1.5 * truth.precision_matrix @ mean - 0.5 * torch.ones(3) / 9)
    assert torch.allclose(x.mean(0), expected, atol=0.05)
    x, _ = head.sample(raw, narrow, cfg=1.5)                # no density: unguided
    assert torch.allclose(x.T.cov(), truth.covariance_matrix, atol=0.05 * truth.covariance_matrix.max())


# ---------------------------------------------------------------------------------------------------
# vae.py

def official_vae():
    encoder, decoder = golden("mar/vae_encoder"), golden("mar/vae_decoder")
    sd = {k.removeprefix("sd/"): v for g in (encoder, decoder) for k, v in g.items() if k.startswith("sd/")}
    return sd, encoder, decoder


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


# ---------------------------------------------------------------------------------------------------
# vq.py

def vq_golden(name):
    """The arrays of golden/llamagen/<name>.npz and its weights under the authors' keys; an int8 weight is q * s."""
    g = golden(f"llamagen/{name}")
    sd = {k[2:]: v.float() * g["s/" + k[2:]] if k[0] == "q" else v for k, v in g.items() if k[:2] in ("q/", "w/")}
    return g, sd


tokens_of = lambda grid: grid.flatten(2).transpose(1, 2)    # (B, D, h, w) -> (B, T, D)


@pytest.mark.parametrize("name", ["res_32_64", "res_32_32", "attn_32", "down_32", "up_32"])
def test_vq_blocks_are_the_authors(name):
    g, sd = vq_golden("vq_blocks")
    kinds = {"attn_32": vq.AttnBlock, "down_32": vq.Downsample, "up_32": vq.Upsample}
    block = kinds[name](32) if name in kinds else vq.ResBlock(32, int(name[-2:]))
    block.load_state_dict({k.removeprefix(name + "."): v for k, v in sd.items() if k.startswith(name + ".")})
    with torch.no_grad():
        close(block(g["in/x"]), g["out/" + name])


@pytest.mark.parametrize("name", ["l2norm", "nonorm"])
def test_vq_quantizer_has_the_authors_codes_losses_and_gradients(name):
    g, sd = vq_golden(f"vq_quantizer_{name}")
    quantizer = vq.VectorQuantizer(64, 8, l2_norm=name == "l2norm", entropy=0.1)
    quantizer.load_state_dict({"codebook": sd["embedding.weight"]})
    z = g["in/z"].clone().requires_grad_()
    q, ids, loss, logs = quantizer(tokens_of(z))
    assert torch.equal(ids.flatten(), g["out/indices"])
    close(q, tokens_of(g["out/z_q"])), close(quantizer.codes(ids), tokens_of(g["out/codebook_entry"]))
    close(logs["commit"], g["out/commit_loss"], 1e-5), close(logs["entropy"], g["out/entropy_loss"], 1e-5)
    close(loss - logs["commit"] - logs["entropy"], g["out/vq_loss"], 1e-5)
    assert abs(logs["usage"] - len(ids.unique()) / 64) < 1e-6
    (loss + (q * tokens_of(g["in/upstream_grad"])).sum()).backward()
    close(z.grad, g["grad/z"]), close(quantizer.codebook.grad, g["grad/embedding.weight"])


def test_vq_loads_official_weights_and_gets_the_authors_numbers():
    g, sd = vq_golden("vq")
    model = vq.VQ.from_official({"model": sd | {"quantize.codebook_used": torch.zeros(65536)}}, image_size=16)
    assert model.seq_len == 64 and model.grid == (8, 8) and model.vocab_size == 64 and not model.training
    with torch.no_grad():
        close(model.encoder(g["in/x"]), g["out/enc_h"]), close(model.latents(g["in/x"]), tokens_of(g["out/z_pre_quant"]))
    ids = model.encode(g["in/x"])
    assert torch.equal(ids.flatten(), g["out/indices"])
    close(model.quantizer.codes(ids), tokens_of(g["out/quant"]))
    close(model.decode_raw(model.quantizer.codes(ids)), g["out/dec"])
    assert torch.equal(model.decode(ids), model.decode_raw(model.quantizer.codes(ids)).clamp(-1, 1))
    model.quantizer.entropy = 0.1                           # as in the authors' run; 0 is the default
    loss, logs = model.train()(g["in/x"])
    close(model.reconstruct(g["in/x"])[0], g["out/rec_train"])
    close(loss, g["out/total_loss"], 1e-5), close(logs["commit"], g["out/commit_loss"], 1e-5)
    close(logs["entropy"], g["out/entropy_loss"], 1e-5)
    close(loss - logs["mse"] - logs["commit"] - logs["entropy"], g["out/vq_loss"], 1e-4)
    loss.backward()
    ours = {"quantize.embedding.weight": model.quantizer.codebook, "quant_conv.weight": model.quant_conv.weight,
            "post_quant_conv.weight": model.post_quant_conv.weight, "encoder.conv_in.weight": model.encoder[0].weight,
            "decoder.conv_out.weight": model.decoder[-1].weight}
    for key, weight in ours.items():
        close(weight.grad, g["grad/" + key])


def test_vq_from_official_names_the_key_that_does_not_fit(tmp_path):
    _, sd = vq_golden("vq")
    torch.save({"model": sd}, tmp_path / "vq_ds2.pt")
    assert vq.VQ.from_official(tmp_path / "vq_ds2.pt").seq_len == 128 * 128
    with pytest.raises(ValueError, match="decoder.extra.weight"):
        vq.VQ.from_official(sd | {"decoder.extra.weight": torch.zeros(1)})
    for key in ("decoder.conv_blocks.0.attn.1.q.bias", "quant_conv.weight", "encoder.conv_blocks.1.res.0.conv1.weight"):
        with pytest.raises(ValueError, match=key):
            vq.VQ.from_official({k: v for k, v in sd.items() if k != key})


def test_vq_of_the_papers_has_its_parameter_count():
    count = lambda module: sum(p.numel() for p in module.parameters())
    for name, total, encoder, decoder, T in (("ds16", 71_883_403, 29_298_176, 42_449_795, 256),
                                             ("ds8", 70_109_835, 28_559_232, 41_415_171, 1024)):
        with torch.device("meta"):
            model = vq.VQ(**vq.SIZES[name])
        assert (count(model), count(model.encoder), count(model.decoder), model.seq_len) == (total, encoder, decoder, T)
        assert count(model.quantizer) == 131_072 and count(model.quant_conv) + count(model.post_quant_conv) == 4_360


@pytest.mark.parametrize("options", [dict(), dict(l2_norm=False), dict(l2_norm=False, ema=0.99), dict(ema=0.9)])
def test_vq_keeps_the_contract_of_a_tokenizer(options):
    model, images = vq.VQ(image_size=16, vocab_size=32, code_dim=4, **options), data.draw(torch.arange(6), 16)[0]
    assert model.token_dim is None and model.vocab_size == 32 and model.grid == (4, 4) and model.seq_len == 16
    loss, logs = model(images, torch.zeros(6, dtype=torch.long))
    loss.backward()
    assert loss.ndim == 0 and all(v.ndim == 0 and not v.requires_grad for v in logs.values())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert ("quantizer.codebook" in dict(model.named_parameters())) == (not model.quantizer.ema)
    ids = model.encode(images)
    assert ids.shape == (6, 16) and ids.dtype == torch.int64 and 0 <= ids.min() and ids.max() < 32
    recon = model.decode(ids)
    assert recon.shape == images.shape and recon.abs().max() <= 1
    recon_, auxiliary, logs = model.eval().reconstruct(images)
    assert torch.allclose(model(images)[0], auxiliary + F.mse_loss(recon_, images))
    assert torch.allclose(model.decode(model.encode(images)), recon_.clamp(-1, 1), atol=1e-5), "the decoder sees codes only"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, _, loss, _ = model.quantizer(torch.randn(2, 16, 4).bfloat16())
    assert q.dtype == loss.dtype == torch.float32
    with pytest.raises(ValueError, match="multiple of 4"):
        vq.VQ(image_size=30)


def test_vq_sees_grey_images_and_label_maps():
    grey = data.draw(torch.arange(4), 16)[0].mean(1, keepdim=True).expand(-1, 3, -1, -1)
    model = vq.VQ(image_size=16, channels=1)
    assert model.encoder[0].weight.shape[1] == model.decoder[-1].weight.shape[0] == 1
    recon = model.decode(model.encode(grey))
    assert recon.shape == grey.shape and torch.equal(recon[:, 0], recon[:, 2])
    colour = grey + torch.tensor([0.3, -0.1, -0.2])[:, None, None]
    assert torch.allclose(model.latents(colour), model.latents(grey), atol=1e-4), "only the average is seen"
    loss, logs = model(grey)
    assert torch.allclose(loss, logs["mse"] + logs["commit"] * 5), "codebook loss and a quarter of it"
    maps = F.one_hot(data.draw(torch.arange(4), 16)[2].long(), 11).permute(0, 3, 1, 2).float() * 2 - 1
    model = vq.VQ(image_size=16, channels=11)
    assert model.decode(model.encode(maps)).shape == maps.shape and model(maps)[0].ndim == 0


@pytest.mark.parametrize("l2_norm", [True, False])
def test_vq_takes_the_nearest_code(l2_norm):
    quantizer, z = vq.VectorQuantizer(200, 6, l2_norm), torch.randn(3, 50, 6)
    nn.init.normal_(quantizer.codebook)
    unit = (lambda v: v / v.norm(dim=-1, keepdim=True)) if l2_norm else (lambda v: v)
    codes = unit(quantizer.codebook.detach().double())
    slow = [[(unit(v) - codes).square().sum(1).argmin() for v in row] for row in z.double()]
    ids = quantizer.nearest(z)
    assert torch.equal(ids, torch.tensor(slow))
    assert torch.allclose(quantizer.codes(ids), codes[ids].float(), atol=1e-6)
    own = torch.arange(200).view(4, 50)
    assert torch.equal(quantizer.nearest(quantizer.codes(own)), own), "ids survive being looked up and found again"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.nearest(z), ids), "float32 under autocast too"


def test_vq_gradient_goes_straight_through():
    quantizer, g = vq.VectorQuantizer(16, 3, l2_norm=False), torch.randn(2, 5, 3)
    z = torch.randn(2, 5, 3, requires_grad=True)
    q, ids, loss, _ = quantizer(z)
    assert torch.allclose(q, quantizer.codes(ids), atol=1e-6)
    through, codes = torch.autograd.grad((q * g).sum(), (z, quantizer.codebook), retain_graph=True, allow_unused=True)
    assert codes is None and torch.equal(through, g), "the decoder's gradient passes the codes by"
    pull, codes = torch.autograd.grad(loss, (z, quantizer.codebook))
    e = quantizer.codebook.detach()[ids]
    assert torch.allclose(pull, 0.25 * 2 * (z - e).detach() / z.numel(), atol=1e-7)
    slow = torch.zeros(16, 3).index_add_(0, ids.flatten(), (2 * (e - z) / z.numel()).detach().flatten(0, 1))
    assert torch.allclose(codes, slow, atol=1e-7)


def test_vq_usage_and_perplexity_count_codes():
    quantizer = vq.VectorQuantizer(8, 2, l2_norm=False)
    with torch.no_grad():
        quantizer.codebook.copy_(10 * torch.arange(16.0).view(8, 2))
    ids = torch.tensor([[0, 0, 0, 0, 5, 5, 7, 7]])
    q, found, _, logs = quantizer(quantizer.codes(ids))
    assert torch.equal(found, ids) and torch.equal(quantizer.count(ids), torch.tensor([4.0, 0, 0, 0, 0, 2, 0, 2]))
    assert logs["usage"] == 3 / 8 and abs(logs["perplexity"] - 2 ** 1.5) < 1e-5       # frequencies 1/2, 1/4, 1/4


@pytest.mark.parametrize("l2_norm", [True, False])
def test_vq_moving_averages_equal_a_slow_loop(l2_norm):
    V, decay = 12, 0.9
    quantizer = vq.VectorQuantizer(V, 4, l2_norm, ema=decay, restart=0)
    unit = (lambda v: v / v.norm()) if l2_norm else (lambda v: v)
    N, m, e = [1.0] * V, list(quantizer.codebook.clone()), list(quantizer.codebook.clone())
    for step in range(5):
        z = torch.randn(2, 20, 4)
        _, ids, loss, logs = quantizer(z)
        flat = [unit(v) for v in z.flatten(0, 1)]
        expected = [min(range(V), key=lambda k: (v - e[k]).square().sum()) for v in flat]
        assert ids.flatten().tolist() == expected
        assert torch.equal(loss, logs["commit"]), "no codebook loss beside the averages"
        for k in range(V):
            mine = [v for v, i in zip(flat, expected) if i == k]
            N[k] = decay * N[k] + (1 - decay) * len(mine)
            m[k] = decay * m[k] + (1 - decay) * sum(mine, torch.zeros(4))
        for k in range(V):
            e[k] = unit(m[k] / ((N[k] + 1e-5) / (sum(N) + V * 1e-5) * sum(N)))
    assert len(set(expected)) > 2
    assert torch.allclose(quantizer.codebook, torch.stack(e), atol=1e-5)
    before = quantizer.codebook.clone()
    quantizer.eval()(torch.randn(2, 20, 4))
    assert torch.equal(quantizer.codebook, before), "evaluation moves nothing"


def test_vq_dead_codes_restart_on_tokens_of_the_batch():
    quantizer = vq.VectorQuantizer(20, 3, l2_norm=False, ema=0.99)
    z = torch.randn(4, 64, 3) * 2 + 1
    count = quantizer.count(quantizer(z)[1])
    dead = count < 0.1 * count.mean()
    from_z = (quantizer.codebook[:, None] - z.flatten(0, 1)).abs().amax(-1).amin(1)         # (20,)
    assert 0 < dead.sum() < 20 and from_z[dead].max() < 1e-3 < from_z[~dead].min(), "the dead ones sit on tokens now"
    with torch.no_grad():                                   # as after a long run: each code has its share of 256 / 20
        quantizer.codebook[3] = 1e4                         # nobody's nearest
        quantizer.ema_count.fill_(12.8), quantizer.ema_sum.copy_(12.8 * quantizer.codebook)
    step = next(i for i in range(300) if quantizer(z) and quantizer.codebook[3].max() < 100)
    assert 220 < step < 235, f"0.99^230 = 0.1, but the code restarted after {step} steps"
    assert quantizer(z)[3]["usage"] > 0.9
    still = vq.VectorQuantizer(20, 3, l2_norm=False, ema=0.99, restart=0)
    for step in range(50):
        still(z)
    assert still(z)[3]["usage"] < 0.8, "without restarts most of the codebook stays dead"


def test_vq_learns():
    images = data.draw(torch.arange(64), 16)[0]
    model, losses = vq.VQ(image_size=16, ch_mult=(1, 2)), []
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(20):
        loss, logs = model(images[torch.randint(64, (8,))])
        opt.zero_grad(), loss.backward(), opt.step()
        losses.append(logs["mse"].item())
    assert losses[-1] < 0.5 * losses[0], f"squared error {losses[0]:.3f} to {losses[-1]:.3f}"
    assert logs["usage"] > 0.1, "a short code at unit length does not collapse"


# ---------------------------------------------------------------------------------------------------
# ar_transformer.py

def small_ar(continuous=True, **options):
    size = dict(n_layer=2, n_head=2, n_embd=32, grid=(3, 4)) | options
    if continuous:
        return ar_transformer.ARTransformer(gmm_head.GMMHead(32, 3, 4), 12, 5, token_dim=3, **size)
    return ar_transformer.ARTransformer(ar_transformer.CategoricalHead(32, 11), 12, 5, vocab_size=11, **size)


@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_ar_cached_sampling_equals_uncached(continuous, cfg):
    model, cond, drawn = small_ar(continuous).eval(), torch.arange(5), []
    if not continuous:
        nn.init.normal_(model.head.proj.weight)
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(model.sample(cond, cfg=cfg, use_cache=use_cache))
    assert drawn[0].std() > 0 if continuous else drawn[0].unique().numel() > 1
    assert torch.allclose(drawn[0].float(), drawn[1].float(), atol=1e-4)


def test_ar_is_causal_and_sees_the_class():
    model, x, cond = small_ar().eval(), torch.randn(2, 12, 3), torch.tensor([0, 1])
    h = model.hidden(x, cond)
    for t in range(12):
        y = x.clone()
        y[:, t] += 1
        changed = (model.hidden(y, cond) - h).abs().amax((0, 2)) > 1e-6
        assert not changed[:t + 1].any() and (t == 11 or changed[t + 1]), f"token {t} leaks into its own prediction"
    assert (model.hidden(x, cond.flip(0)) - h).abs().amin((0, 2)[:1]).max() > 0


def test_rope_is_complex_multiplication_and_relative():
    table = ar_transformer.rope_table((3, 4), 16, prefix=2)
    assert table.shape == (14, 8, 2) and torch.equal(table[:2, :, 0], torch.ones(2, 8))
    x = torch.randn(1, 14, 2, 16)
    expected = torch.view_as_complex(x.view(1, 14, 2, 8, 2)) * torch.view_as_complex(table)[:, None]
    assert torch.allclose(ar_transformer.rotate(x, table), torch.view_as_real(expected).flatten(-2), atol=1e-5)
    q, k = torch.randn(2, 1, 1, 1, 16)
    score = lambda i, j: (ar_transformer.rotate(q, table[i:i + 1]) * ar_transformer.rotate(k, table[j:j + 1])).sum()
    at = lambda row, col: 2 + 4 * row + col
    assert torch.allclose(score(at(2, 3), at(1, 1)), score(at(1, 2), at(0, 0)), atol=1e-5)


def test_ar_label_dropping_reaches_the_null_row_in_training_only():
    model, x, cond = small_ar(label_drop=0.5), torch.randn(64, 12, 3), torch.zeros(64, dtype=torch.long)
    model(x, cond)[0].backward()
    assert model.cls_embed.weight.grad[5].abs().sum() > 0, "the null label is never trained"
    assert model.cls_embed.weight.grad[1:5].abs().sum() == 0
    model.zero_grad()
    model.eval()(x, cond)[0].backward()
    assert model.cls_embed.weight.grad[5].abs().sum() == 0
    assert torch.equal(model(x, cond)[0], model(x, cond)[0])


def test_ar_initial_loss_is_ln_v_and_logits_give_the_loss():
    model, x, cond = small_ar(False, label_drop=0), torch.randint(11, (4, 12)), torch.arange(4)
    assert abs(model(x, cond)[0] - math.log(11)) < 1e-5
    nn.init.normal_(model.head.proj.weight)
    logits = model.logits(x, cond)
    slow = -sum(logits[b, t].log_softmax(-1)[x[b, t]] for b in range(4) for t in range(12)) / 48
    assert torch.allclose(model(x, cond)[0], slow, atol=1e-5)


def test_ar_keeps_known_tokens_and_counts_its_steps():
    model, seen = small_ar().eval(), []
    known, mask = torch.randn(2, 12, 3), torch.zeros(2, 12, dtype=torch.bool)
    mask[:, :5] = True
    x = model.sample(torch.tensor([1, 2]), known=known, known_mask=mask, on_step=lambda t, tokens, unknown: seen.append(int(unknown.sum())))
    assert torch.equal(x[:, :5], known[:, :5]) and not torch.equal(x[:, 5:], known[:, 5:])
    assert seen == [2 * (11 - t) for t in range(12)]
    with pytest.raises(ValueError, match="one token per step"):
        model.sample(torch.tensor([1]), steps=3)


def test_categorical_head_filters_like_a_slow_loop():
    head = ar_transformer.CategoricalHead(6, 9)
    nn.init.normal_(head.proj.weight)
    h = torch.randn(1, 6)
    p = head.logits(h)[0].softmax(-1).detach()
    ranked = sorted(range(9), key=lambda i: -p[i])
    assert set(head.sample(h.expand(3000, -1), top_k=3)[0].tolist()) == set(ranked[:3])
    total, nucleus = 0.0, set()
    for i in ranked:
        if total < 0.7:
            nucleus.add(i)
        total += float(p[i])
    ids, log_p = head.sample(h.expand(20_000, -1), top_p=0.7)
    assert set(ids.tolist()) == nucleus
    assert abs(float(log_p.exp()[ids == ranked[0]][0]) - float(p[ranked[0]] / sum(p[i] for i in nucleus))) < 1e-4
    null = torch.randn(1, 6)
    guided = (head.logits(null) + 1.5 * (head.logits(h) - head.logits(null)))[0].softmax(-1)
    counts = head.sample(h.expand(50_000, -1), null.expand(50_000, -1), cfg=1.5)[0].bincount(minlength=9) / 50_000
    assert torch.allclose(counts, guided, atol=0.015)


def test_ar_reaches_the_exact_optimum_on_bars_and_stripes():
    model = ar_transformer.ARTransformer(ar_transformer.CategoricalHead(64, 2), 16, 1, vocab_size=2, n_layer=2, n_head=2,
                                         n_embd=64, label_drop=0)
    zeros = torch.zeros(128, dtype=torch.long)
    ar_transformer.fit_ids(model, lambda step: (ar_transformer.bars_and_stripes(128, "cpu"), zeros), 400, 5e-3)
    everything = ar_transformer.bars_and_stripes(5000, "cpu").unique(dim=0)
    assert len(everything) == 30
    with torch.no_grad():
        nll = model.eval().head.loss(model.hidden(everything, zeros[:30]), everything).sum(1)
        drawn = model.sample(torch.zeros(300, dtype=torch.long))
    assert torch.logsumexp(-nll, 0) <= 1e-4, "the probabilities of the 30 pictures sum to more than one"
    assert math.log(30) - 1e-4 <= nll.mean() <= 1.02 * math.log(30), f"{nll.mean():.3f} nats, the optimum is {math.log(30):.3f}"
    good = (drawn[:, None] == everything[None]).all(-1).any(1).float().mean()
    assert good > 0.95, f"{good:.0%} of the samples are bars or stripes"


@pytest.mark.parametrize("continuous", [True, False])
def test_ar_beam_search_returns_the_models_own_log_probability(continuous):
    model, cond = small_ar(continuous).eval(), torch.tensor([0, 3, 4])
    if not continuous:
        nn.init.normal_(model.head.proj.weight, std=0.3)
    tokens, log_p = model.beam_search(cond, beam=4, fan=8)
    exact = lambda x: -model.head.loss(model.hidden(x, cond), x).sum(1)
    assert torch.allclose(log_p, exact(tokens), atol=1e-3), "a beam's score is log p of its tokens, T factors and no more"
    plain = torch.stack([exact(model.sample(cond)) for _ in range(20)])
    assert (log_p > plain.mean(0)).all()
    with pytest.raises(ValueError, match="fan"):
        model.beam_search(cond, beam=9, fan=8)


def test_ar_wide_beam_finds_the_likeliest_sequence():
    model = ar_transformer.ARTransformer(ar_transformer.CategoricalHead(16, 3), 4, 1, vocab_size=3, n_layer=1, n_head=2, n_embd=16).eval()
    nn.init.normal_(model.head.proj.weight)
    all_ = torch.cartesian_prod(*[torch.arange(3)] * 4)                                     # (81, 4): every sequence
    zeros = torch.zeros(81, dtype=torch.long)
    log_p = -model.head.loss(model.hidden(all_, zeros), all_).sum(1)
    tokens, best = model.beam_search(zeros[:1], beam=81, fan=200)                           # 200 draws miss no id in practice
    assert torch.allclose(best, log_p.max(), atol=1e-4) and torch.equal(tokens[0], all_[log_p.argmax()])


def test_ar_with_a_prefix_of_vectors_sees_all_of_it_and_drops_it():
    size = dict(n_layer=2, n_head=2, n_embd=32, label_drop=0.5, prefix=(6, 5))
    model = ar_transformer.ARTransformer(gmm_head.GMMHead(32, 3, 4), 12, 1, token_dim=3, grid=(3, 4), **size)
    x, cond = torch.randn(4, 12, 3), torch.randn(4, 6, 5)
    model(x, cond)[0].backward()
    assert model.pre_none.grad.abs().sum() > 0 and model.pre_embed.weight.grad.abs().sum() > 0
    model.eval()
    h = model.hidden(x, cond)
    for p in range(6):
        other = cond.clone()
        other[:, p] += 1
        assert ((model.hidden(x, other) - h).abs().amax((0, 2)) > 1e-6).all(), "every token sees every vector of the prefix"
    everyone = torch.ones(4, dtype=torch.bool)
    assert torch.equal(model.hidden(x, cond, everyone), model.hidden(x, -cond, everyone))
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(model.sample(cond, cfg=2.0, use_cache=use_cache))
    assert torch.allclose(*drawn, atol=1e-4)


# LlamaGen: the authors' arrays, both their conditions

def llamagen(name, **options):
    """The arrays of golden/llamagen/<name>.npz and the model with the weights in them."""
    g = golden(f"llamagen/{name}")
    sd = {k[2:]: v for k, v in g.items() if k.startswith("w/")}
    return ar_transformer.ARTransformer.from_official(sd, n_head=4, grid=(4, 4), **options), g, sd


def check_gradients(model, g):
    ours = {ar_transformer.official_name(k): p.grad for k, p in model.named_parameters()}
    keys = [k for k in g if k.startswith("grad/")]
    assert len(keys) >= 2
    for key in keys:
        close(ours[key[5:]], g[key])


def test_llamagen_of_classes_has_the_authors_logits_loss_and_gradients():
    model, g, _ = llamagen("gpt_c2i_train")
    model.train()
    model.label_drop = 0
    close(model.logits(g["in/idx"], g["in/cls"]), g["out/logits_train"], 1e-5)
    assert torch.equal(model.eval().logits(g["in/idx"], g["in/cls"]), model.train().logits(g["in/idx"], g["in/cls"]))
    close(model.logits(g["in/idx"], g["in/cls"]), g["out/logits_eval_full"][:, :16], 1e-5)
    loss, _ = model(g["in/idx"], g["in/cls"])
    loss.backward()
    close(loss.detach(), g["out/loss"], 1e-5)
    check_gradients(model, g)
    x = torch.cat([model.prefix(g["in/cls"]), model.embed(g["in/idx"][:, :-1])], 1)
    block, rope = model.blocks[0], model.rope[:16]
    close(block.attn(block.norm1(x), rope), g["out/layer0_attention"], 1e-5)
    close(block(x, rope), g["out/layer0_block"], 1e-5)
    close(block.mlp(block.norm2(x + block.attn(block.norm1(x), rope))), g["out/layer0_ffn"], 1e-5)


def test_llamagen_of_captions_has_the_authors_masks_logits_loss_and_gradients():
    model, g, _ = llamagen("gpt_t2i_train")
    feat, drop = g["in/feat"], g["in/force_drop_ids"].bool()
    assert torch.equal(model.caption.keep(feat), g["in/emb_mask"].bool())
    assert torch.equal(model.caption.keep(feat, drop), g["in/emb_mask"].bool()), "no caption: the padding stays, as published"
    assert torch.equal(model.mask(model.row, 22, model.keep(feat)), g["out/attn_mask"].bool())
    close(model.prefix(feat), g["out/caption_emb"], 1e-5)
    close(model.prefix(feat, drop), g["out/caption_emb_dropped"], 1e-5)
    close(model.logits(g["in/idx"], feat), g["out/logits_train"], 1e-5)
    loss, _ = model(g["in/idx"], feat)
    close(loss.detach(), g["out/loss_unmasked_mean"], 1e-5)
    each = model.head.loss(model.hidden(g["in/idx"], feat), g["in/idx"]).mean(1)            # the third sample is not valid
    loss = (each * g["in/valid"]).sum() / g["in/valid"].sum()
    loss.backward()
    close(loss.detach(), g["out/loss"], 1e-5)
    check_gradients(model, g)


def test_llamagen_rope_is_the_authors():
    g = golden("llamagen/rope")
    for key in [k for k in g if k.startswith("out/freqs2d")]:
        side, width, prefix = map(int, re.findall(r"\d+", key)[1:])
        table = ar_transformer.rope_table((side, side), width, prefix, zero_prefix=True)
        assert torch.allclose(table, g[key], atol=2e-5), key
    close(ar_transformer.rotate(g["in/x"], g["out/freqs2d_grid4_hd8_cls1"]), g["out/x_rot_grid4_hd8_cls1"], 1e-5)
    line = ar_transformer.rope_table((16,), 8, 1, zero_prefix=True)                         # ours counts the prefix: one turn more
    turn = lambda table: torch.view_as_complex(table.contiguous())
    theirs = turn(g["out/freqs1d_len16_hd8_cls1"])[1:] * turn(ar_transformer.rope_table((16,), 8, 1))[1]
    assert torch.allclose(turn(line)[1:], theirs, atol=1e-5)
    assert (line[0] == 0).all()


def replay(model, monkeypatch, cond, **options):
    """Greedy sampling -> tokens (B, T) and the logits (B, T, V) that each was drawn from."""
    seen, draw = [], model.head.sample

    def record(h, h_uncond, cfg, temperature, **tricks):
        c = model.head.logits(h)
        seen.append(c if h_uncond is None or cfg == 1 else model.head.logits(h_uncond) * (1 - cfg) + cfg * c)
        return draw(h, h_uncond, cfg, temperature, top_k=1)
    monkeypatch.setattr(model.head, "sample", record)
    return model.sample(cond, **options), torch.stack(seen, 1)


WAYS = {"cached": dict(), "uncached": dict(use_cache=False), "one graph": dict(compile="aot_eager")}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind, cfg, interval", [("c2i", 1.0, -1), ("c2i", 3.0, -1), ("c2i", 3.0, 5), ("t2i", 1.0, -1), ("t2i", 3.0, -1)])
def test_llamagen_writes_the_authors_tokens(kind, cfg, interval, way, monkeypatch):
    model, g, _ = llamagen(f"generate_{kind}")
    name = f"cfg{cfg}_int{interval}" if kind == "c2i" else f"cfg{cfg}_mask"
    cond = g["in/cls"].long() if kind == "c2i" else g["in/feat"]
    with torch.compiler.set_stance("force_eager" if way == "one graph" and cfg == 1 else "default"):
        tokens, logits = replay(model, monkeypatch, cond, cfg=cfg, cfg_interval=interval, **WAYS[way])
    assert torch.equal(tokens, g[f"out/tokens_{name}"].long())
    close(logits, g[f"out/logits_{name}"])


def test_llamagen_mask_while_decoding_is_the_authors():
    model, g, _ = llamagen("generate_t2i")
    keep = torch.cat([model.keep(g["in/feat"]), model.keep(g["in/feat"], torch.ones(3, dtype=torch.bool))])
    ours = torch.cat([model.mask(model.row[t:t + 1], 22, keep) for t in range(22)], 2)      # row by row, as decode_step
    assert torch.equal(ours[:, 0], g["out/causal_mask_cfg3"][:, :22, :22].bool())


def test_categorical_head_filters_as_the_authors(monkeypatch):
    g, seen, draw = golden("llamagen/logit_filter"), [], torch.multinomial
    head = ar_transformer.CategoricalHead(1, 1)
    head.proj = nn.Identity()                               # the arrays hold logits
    monkeypatch.setattr(torch, "multinomial", lambda p, n: seen.append(p) or draw(p, n))
    for key in [k for k in g if k.startswith("out/filtered") or k.startswith("out/ties")]:
        k, p = re.search(r"k(\d+)", key), re.search(r"_p([\d.e-]+)", key)
        head.sample(g["in/ties" if "ties" in key else "in/logits"], top_k=int(k[1]) if k else 0, top_p=float(p[1]) if p else 1.0)
        assert torch.allclose(seen[-1], g[key].softmax(-1), atol=1e-6), key
    head.sample(g["in/logits"], temperature=0.7, top_k=10, top_p=0.6)
    assert torch.allclose(seen[-1], g["out/probs_T0.7_k10_p0.6"], atol=1e-6) and len(seen) >= 9


def test_llamagen_from_official_reads_files_and_names_keys(tmp_path):
    model, g, sd = llamagen("gpt_c2i_train")
    cls, options = ar_transformer.ARTransformer, dict(n_head=4, grid=(4, 4))
    same = lambda other: all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items()) and not other.training
    torch.save({"model": {f"module._orig_mod.{k}": v for k, v in sd.items()}, "steps": 7}, tmp_path / "c2i_B_256.pt")   # DDP
    torch.save(sd, tmp_path / "c2i_XXL_384.pt")             # FSDP
    for name in ("c2i_B_256.pt", "c2i_XXL_384.pt"):
        assert same(cls.from_official(tmp_path / name, **options))
    half = {k: v / 2 for k, v in sd.items()}
    assert same(cls.from_official({"model": half, "ema": sd}, **options))
    assert cls.from_official(sd, n_head=8, grid=(2, 3)).seq_len == 6
    for lost in ("layers.1.feed_forward.w2.weight", "cls_embedding.embedding_table.weight", "output.weight", "tok_embeddings.weight"):
        with pytest.raises(ValueError, match=f"missing.*{lost}"):
            cls.from_official({k: v for k, v in sd.items() if k != lost}, **options)
    with pytest.raises(ValueError, match="unknown.*layers.0.attention.kv_cache.k_cache"):
        cls.from_official(sd | {"layers.0.attention.kv_cache.k_cache": torch.zeros(1)}, **options)
    with pytest.raises(ValueError, match="n_head="):
        cls.from_official(sd)


@pytest.mark.parametrize("name, of_classes, of_captions", [
    ("gpt-b", 110_888_448, 112_282_368), ("gpt-l", 342_910_976, 345_031_680), ("gpt-xl", 774_699_520, 777_678_080),
    ("gpt-xxl", 1_410_972_672, 1_414_940_160), ("gpt-3b", 3_096_659_200, 3_110_249_600)])
def test_llamagen_of_the_paper_has_its_parameter_count(name, of_classes, of_captions):
    for text, count in ((None, of_classes), ((120, 2048), of_captions)):
        with torch.device("meta"):
            head = ar_transformer.CategoricalHead(ar_transformer.SIZES[name]["n_embd"], 16384)
            model = ar_transformer.ARTransformer(head, 256, 1000, vocab_size=16384, text=text, **ar_transformer.SIZES[name])
        assert sum(p.numel() for p in model.parameters()) == count


def slow_llama(config, sd, ids):
    """A Llama as transformers has it, written down once more: two halves of a head turn against each other -> logits."""
    B, S = ids.shape
    heads, width = config["num_attention_heads"], config["head_dim"]
    norm = lambda x, name: x * (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]) ** -0.5 * sd[name]
    if "model.rotary_emb.cos" in sd:
        cos, sin = sd["model.rotary_emb.cos"][:S], sd["model.rotary_emb.sin"][:S]
    else:
        angle = torch.arange(S)[:, None] / config["rope_theta"] ** (torch.arange(0, width, 2) / width)
        cos, sin = torch.cat([angle, angle], 1).cos(), torch.cat([angle, angle], 1).sin()
    turn = lambda x: x * cos + torch.cat([-x[..., width // 2:], x[..., :width // 2]], -1) * sin
    x = sd["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        w = lambda name: sd[f"model.layers.{i}.{name}.weight"]
        n = norm(x, f"model.layers.{i}.input_layernorm.weight")
        q, k, v = ((n @ w(f"self_attn.{c}_proj").T).view(B, S, heads, width).transpose(1, 2) for c in "qkv")
        score = (turn(q) @ turn(k).transpose(2, 3) / width ** 0.5).masked_fill(torch.ones(S, S).triu(1).bool(), -math.inf)
        x = x + (score.softmax(-1) @ v).transpose(1, 2).reshape(B, S, -1) @ w("self_attn.o_proj").T
        n = norm(x, f"model.layers.{i}.post_attention_layernorm.weight")
        x = x + (F.silu(n @ w("mlp.gate_proj").T) * (n @ w("mlp.up_proj").T)) @ w("mlp.down_proj").T
    return norm(x, "model.norm.weight") @ sd["lm_head.weight"].T


def exported(kind):
    """A model on a line (stock Llama) or the authors' on a grid, and ids for transformers: the class, then the tokens."""
    if kind == "line":
        model = small_ar(False, grid=(12,), n_head=4).eval()
        nn.init.normal_(model.head.proj.weight, std=0.3)
        for block in model.blocks:
            nn.init.normal_(block.norm1.weight), nn.init.normal_(block.attn.wqkv.weight)
    else:
        model, _, _ = llamagen("gpt_c2i_train")
    x, cond = torch.randint(model.vocab_size, (3, model.seq_len)), torch.tensor([0, 3, model.num_classes])
    return model, x, cond, torch.cat([model.vocab_size + cond[:, None], x[:, :-1]], 1)


@pytest.mark.parametrize("kind", ["line", "grid"])
@torch.no_grad()
def test_llama_export_has_equal_logits_in_a_llama_written_down_once_more(kind):
    model, x, cond, ids = exported(kind)
    config, generation, sd = ar_transformer.to_llama(model)
    logits = slow_llama(config, sd, ids)
    close(logits[..., :model.vocab_size], model.logits(x, cond))
    assert (logits[..., model.vocab_size:] == 0).all() and logits.shape[-1] == config["vocab_size"]
    assert generation["suppress_tokens"] == list(range(model.vocab_size, config["vocab_size"]))
    assert (config["architectures"] == ["LlamaForCausalLM"]) == (kind == "line") == ("model.rotary_emb.cos" not in sd)
    with pytest.raises(ValueError, match="learned places"):
        ar_transformer.to_llama(small_ar())


@pytest.mark.parametrize("kind", ["line", "grid"])
@torch.no_grad()
def test_llama_export_is_what_transformers_reads(kind, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    model, x, cond, ids = exported(kind)
    monkeypatch.setattr(ar_transformer, "load_for_export", lambda *_: model)
    ar_transformer.export("unused", tmp_path / "llama")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama", trust_remote_code=True).eval()
    assert type(theirs).__name__ == ("LlamaForCausalLM" if kind == "line" else "LlamaGenForCausalLM")
    close(theirs(ids).logits[..., :model.vocab_size], model.logits(x, cond))
    tokens = theirs.generate(ids[:, :1], do_sample=False)[:, 1:]                            # with their cache
    assert torch.equal(tokens, model.sample(cond, top_k=1))


def test_llama_export_of_files_and_runs(tmp_path, monkeypatch):
    model, _, sd = llamagen("gpt_c2i_train")
    torch.save({"model": sd}, tmp_path / "c2i.pt")
    assert torch.equal(ar_transformer.load_for_export(tmp_path / "c2i.pt", (4, 4), 4).rope, model.rope)
    ours = ar_transformer.ARTransformer(ar_transformer.CategoricalHead(128, 9), 6, 4, vocab_size=9, grid=(2, 3), **ar_transformer.SIZES["tiny"])
    nn.init.normal_(ours.head.proj.weight)
    run = dict(flags=dict(generator="ar", head="categorical", size="tiny"), ema={f"module.{k}": v for k, v in ours.state_dict().items()})
    torch.save(run | {"ema": run["ema"] | {"n_averaged": torch.tensor(3)}}, tmp_path / "ckpt.pt")
    x, cond = torch.randint(9, (2, 6)), torch.tensor([0, 4])
    assert torch.equal(ar_transformer.load_for_export(tmp_path, (2, 3)).logits(x, cond), ours.eval().logits(x, cond))
    with pytest.raises(ValueError, match="--grid"):
        ar_transformer.load_for_export(tmp_path)
    torch.save(run | dict(flags=dict(generator="ar", head="gmm")), tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="categorical"):
        ar_transformer.load_for_export(tmp_path, (2, 3))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        ar_transformer.export(tmp_path / "c2i.pt", tmp_path / "out", (4, 4), 4)


@pytest.mark.parametrize("condition", [dict(), dict(text=(6, "bytes")), dict(prefix=(6, 5))])
@pytest.mark.parametrize("continuous", [True, False])
def test_ar_three_ways_to_decode_are_one(condition, continuous):
    """Cache cut to the filled part, no cache, static shapes compiled without a graph break; guidance off, on, at first only."""
    torch.compiler.reset()
    model = small_ar(continuous, zero_prefix=not continuous, **condition).eval()
    if not continuous:
        nn.init.normal_(model.head.proj.weight)
    cond = {"text": ar_transformer.bytes_of(["a", "ring", "", "a star"], 6), "prefix": torch.randn(4, 6, 5)}
    cond = cond[next(iter(condition))] if condition else torch.arange(4)
    for cfg, interval in ((1.0, -1), (3.0, -1), (3.0, 2)):
        drawn = []
        for way in WAYS.values():
            torch.manual_seed(3)
            drawn.append(model.sample(cond, cfg=cfg, cfg_interval=interval, **way))
        assert drawn[0].float().std() > 0 and all(torch.allclose(drawn[0].float(), x.float(), atol=1e-3) for x in drawn[1:])
        if cfg > 1 and interval < 0:
            everything = drawn[0]
    assert not torch.equal(everything, drawn[0]), "the guided interval ended"
    assert torch.equal(everything[:, :3], drawn[0][:, :3]), "c = 2 guides the first 4 tokens, as LlamaGen counts"


def test_ar_token_dropout_covers_the_class_too():
    model = small_ar(False, n_layer=0, dropout=0.5, label_drop=0)
    zeros = model.hidden(torch.zeros(400, 12, dtype=torch.long), torch.zeros(400, dtype=torch.long)).eq(0).float().mean((0, 2))
    assert zeros.shape == (12,) and (zeros - 0.5).abs().max() < 0.03, "LlamaGen drops from the whole embedded sequence"


def test_ar_bytes_are_read_in_order_and_padding_is_not():
    model, texts = small_ar(False, text=(12, "bytes"), label_drop=0).eval(), ["ab", "ba", "a red ring"]
    nn.init.normal_(model.head.proj.weight)
    cond = ar_transformer.bytes_of(texts, 12)
    assert cond.dtype == torch.int64 and cond[0].tolist() == [0] * 10 + [97, 98]
    with pytest.raises(ValueError, match="13 bytes.*room for 12"):
        ar_transformer.bytes_of(["seven ärings"], 12)
    x = torch.randint(11, (1, 12)).expand(3, -1)
    logits = model.logits(x, cond)
    assert torch.equal(logits, model.logits(x, cond.to(torch.uint8)))
    assert (logits[0] - logits[1]).abs().max() > 1e-3, "ab and ba are two captions"
    model.caption.place.data[:10] += 5                      # places where the first two captions have no text
    model.caption.none += 5
    changed = (model.logits(x, cond) - logits).abs().amax((1, 2))
    assert (changed[:2] == 0).all() and changed[2] > 1e-3
    nothing = torch.ones(3, dtype=torch.bool)
    h = model.hidden(x, cond, nothing)
    assert torch.allclose(h[0], h[2], atol=1e-5), "a hidden caption leaves no trace, not even its length"
    model.train()
    model.label_drop = 0.5
    torch.manual_seed(0)
    loss = model(x, cond)[0]
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.caption.parameters())
    assert "caption.none" in model.state_dict()


def test_ar_learns_what_captions_say():
    text = ar_transformer.captions_of(ar_transformer.bars_and_stripes(2000, "cpu").unique(dim=0))
    assert len(set(text)) == 30 and "rows 1 and 3 dark" in text and "column 2 dark" in text
    _, curve = ar_transformer.read_captions("cpu")
    _, told, untold = curve[-1]
    assert told < 0.1, f"{told:.2f} nats are left when the caption tells the picture"
    assert math.log(30) - 1e-3 <= untold < 1.06 * math.log(30), f"{untold:.3f} nats without a caption, ln 30 = 3.401 is the least"


# ---------------------------------------------------------------------------------------------------
# maskgit.py

def official_givt_maskgit():
    """The authors' tiny masked GIVT ("concat" embedding) in our layout -> MaskGIT, arrays."""
    g = golden("givt/givt_masked_concat_tiny")
    p = {k.removeprefix("param/"): v for k, v in g.items() if k.startswith("param/")}
    head = gmm_head.GMMHead(32, 4, 3, min_scale=1e-6)
    model = maskgit.MaskGIT(head, 16, 10, token_dim=4, n_layer=2, n_head=2, n_embd=32, hidden=48)
    labels = p["EmbedLabels/embedding"]                     # ten classes, hidden, seen, stand-in for the value, no class
    with torch.no_grad():
        model.cls_embed.weight.copy_(labels[[*range(10), 13]])
        model.hid_embed.weight.copy_(labels[[11, 10], ::2])                                 # they keep every second entry only
        model.hid_value.copy_(labels[12, ::2])
        model.tok_embed.weight.copy_(p["EmbedTargets/kernel"][:, ::2].T)
        model.tok_embed.bias.copy_(p["EmbedTargets/bias"][::2])
        model.pos_embed.copy_(p["decoder/pos_emb"][0])
        for i, block in enumerate(model.blocks):
            q = {k.removeprefix(f"decoder/EncDecBlock{i}/"): v for k, v in p.items() if f"EncDecBlock{i}/" in k}
            block.norm1.weight.copy_(q["LayerNorm1/scale"]), block.norm2.weight.copy_(q["LayerNorm3/scale"])
            block.wqkv.weight.copy_(torch.cat([q[f"SelfAttn/{n}/kernel"].flatten(1).T for n in ("query", "key", "value")]))
            block.wo.weight.copy_(q["SelfAttn/out/kernel"].flatten(0, 1).T)
            for ours, theirs in ((block.fc1, "MLP/Dense_0"), (block.fc2, "MLP/Dense_1")):
                ours.weight.copy_(q[f"{theirs}/kernel"].T), ours.bias.copy_(q[f"{theirs}/bias"])
        model.norm.weight.copy_(p["decoder/LayerNorm/scale"]), model.norm.bias.copy_(p["decoder/LayerNorm/bias"])
        head.proj.weight.copy_(p["decoder/LogitsDense/kernel"].T), head.proj.bias.copy_(p["decoder/LogitsDense/bias"])
    return model.eval(), g


def test_maskgit_is_the_authors_masked_givt():
    model, g = official_givt_maskgit()
    mask = g["input_mask"].bool()
    h = model.hidden(g["x"], g["labels"].long(), mask)
    close(model.head.proj(h), g["logits"])
    close(model.head.proj(model.hidden(g["x"], torch.full((2,), 10), mask)), g["logits_uncond"])
    nll = model.head.loss(h, g["x"])
    close(nll, g["nll"])
    close((nll * mask).sum() / mask.sum(), g["loss"])


@pytest.mark.parametrize("L, T", [(256, 16), (256, 8), (256, 12), (256, 32), (1024, 16), (6, 4), (16, 64)])
def test_maskgit_schedule_is_the_authors_to_the_integer(L, T):
    g, unknown = golden("givt/mask_schedule"), torch.tensor([[L]])
    for t in range(T):
        n = torch.minimum(maskgit.still_hidden(torch.tensor([[L]]), t, T), unknown - 1).clamp(min=0)
        assert n == g[f"mask_len_L{L}_T{T}"][t] and unknown - n == g[f"uncovered_L{L}_T{T}"][t]
        unknown = n
    assert unknown == 0, "a token is still hidden after the last step"


def test_maskgit_choice_is_the_authors():
    g = golden("givt/mask_schedule")
    score = g["topk_probs"].log() + g["topk_temperature"] * g["topk_gumbel"]
    assert torch.equal(maskgit.keep_hidden(score, g["topk_mask_len"].long()), g["topk_mask"].bool())


@pytest.mark.parametrize("name", ["w0p0", "w0p5"])
def test_maskgit_replays_the_authors_parallel_decoding(name, monkeypatch):
    """The recorded values of each pass are put in the head's place, and the recorded noise in that of torch.rand."""
    g, (model, _) = golden(f"givt/parallel_decode_trace_{name}"), official_givt_maskgit()
    steps, passes, seen, raw = int(g["num_steps"]), iter(range(99)), [], []

    def recorded(h, h_uncond=None, cfg=1.0, temperature=1.0):
        t = next(passes)
        raw.append((model.head.proj(h), None if h_uncond is None else model.head.proj(h_uncond)))
        drawn = torch.where((g["uncovered"][t] > 0)[..., None], g["inputs"][t + 1], torch.zeros(()))
        return drawn, g["prob"][t].log()
    uniform = iter(torch.exp(-torch.exp(-g["gumbel"].double())).float())
    noise = lambda *a, **k: next(uniform)
    monkeypatch.setattr(model.head, "sample", recorded)
    monkeypatch.setattr(torch, "rand", noise)
    weight = g["choice_temperature"].item()
    model.sample(g["labels"].long(), steps=steps, cfg=1 + g["w"].item(), choice_temperature=weight,
                 on_step=lambda i, x, m: seen.append((x, m)))
    known = torch.zeros(2, 16, dtype=torch.bool)
    for t, (x, mask) in enumerate(seen):
        known = known | (g["uncovered"][t] > 0)
        assert torch.equal(~mask, known), f"pass {t} reveals other tokens than the authors'"
        close(raw[t][0], g["logits"][t], 2e-4)
        if raw[t][1] is not None:
            close(raw[t][1], g["logits_uncond"][t], 2e-4)


def small_maskgit(continuous=True, **options):
    size = dict(n_layer=2, n_head=2, n_embd=32) | options
    if continuous:
        return maskgit.MaskGIT(gmm_head.GMMHead(32, 3, 4), 12, 5, token_dim=3, **size)
    return maskgit.MaskGIT(maskgit.CategoricalHead(32, 11), 12, 5, vocab_size=11, **size)


@pytest.mark.parametrize("continuous", [True, False])
def test_maskgit_never_sees_hidden_tokens_and_keeps_known_ones(continuous):
    model, cond = small_maskgit(continuous).eval(), torch.tensor([1, 2])
    draw = (lambda: torch.randn(2, 12, 3)) if continuous else (lambda: torch.randint(11, (2, 12)))
    x, other, mask = draw(), draw(), torch.rand(2, 12) < 0.5
    mixed = torch.where(mask.view(2, 12, *[1] * (x.ndim - 2)), other, x)
    assert torch.equal(model.hidden(x, cond, mask), model.hidden(mixed, cond, mask)), "a hidden token leaks"
    assert not torch.equal(model.hidden(x, cond, ~mask), model.hidden(mixed, cond, ~mask))
    hidden = []
    y = model.sample(cond, steps=5, cfg=2.0, known=x, known_mask=~mask, on_step=lambda i, t, m: hidden.append(m))
    assert torch.equal(y[~mask], x[~mask]) and not torch.equal(y[mask], x[mask])
    assert len(hidden) == 5 and not hidden[-1].any() and all((b <= a).all() for a, b in zip(hidden, hidden[1:]))
    with pytest.raises(ValueError, match="1 to 12"):
        model.sample(cond, steps=13)


def test_maskgit_loss_is_the_mean_over_masked_tokens_only():
    model, x, cond = small_maskgit(label_drop=0).eval(), torch.randn(3, 12, 3), torch.arange(3)
    torch.manual_seed(5)
    loss, _ = model(x, cond)
    torch.manual_seed(5)
    mask = model.training_mask(3, "cpu")
    terms = [model.head.loss(model.hidden(x, cond, mask), x)[b, t].item() for b in range(3) for t in range(12) if mask[b, t]]
    assert abs(loss.item() - sum(terms) / len(terms)) < 1e-4


def test_maskgit_training_masks_have_the_authors_counts():
    g, model = golden("givt/mask_schedule"), small_maskgit(u_max=0.7)
    assert torch.equal(maskgit.n_hidden(g["train_keep"], 256).long(), g["train_num_masked_L256"].long())
    counts = model.training_mask(4000, "cpu").sum(1)
    u = torch.linspace(0, 0.7, 4001)
    assert counts.min() == math.ceil(12 * math.cos(0.35 * math.pi)) and counts.max() == 12
    assert abs(counts.float().mean() - (12 * torch.cos(math.pi / 2 * u)).ceil().mean()) < 0.1
    mean = model.training_mask(4000, "cpu").float().mean(0)
    assert mean.std() < 0.03, "some places are hidden more often than others"


def test_maskgit_one_token_per_pass_comes_close_to_bars_and_stripes():
    model = maskgit.MaskGIT(maskgit.CategoricalHead(64, 2), 16, 1, vocab_size=2, n_layer=2, n_head=4, n_embd=64, label_drop=0)
    zeros = torch.zeros(256, dtype=torch.long)
    maskgit.fit_ids(model, lambda step: (maskgit.bars_and_stripes(256, "cpu"), zeros), 400, 5e-3)
    model.eval()
    few, many = (maskgit.error_of_parallel_decoding(model, n, 1500) for n in (2, 16))
    assert many[0] > 0.8 and many[1] < few[1], (few, many)


# ---------------------------------------------------------------------------------------------------
# flow_adapter.py

def official_flow(name):
    """The adaptor of the authors' arrays in our layout -> FlowAdapter, arrays."""
    g = golden(f"givt/{name}")
    tokens, rows = g["x"].shape[1], {"adaptor_small": 4, "adaptor_rect": 4, "adaptor_width16": 4}[name]
    flow = flow_adapter.FlowAdapter(g["x"].shape[2], (rows, tokens // rows), int(g["num_blocks"]),
                                    int(g["num_channels_bottleneck"]) // 2)
    for i, block in enumerate(flow.blocks):
        for j in range(3):
            block.convs[j].weight.data = g[f"param/modules_{i}/Conv_{j}/kernel"].permute(3, 2, 0, 1).contiguous()
            if i or j:
                block.norms[j].weight.data = g[f"param/modules_{i}/gn_{j}/scale"]
                block.norms[j].bias.data = g[f"param/modules_{i}/gn_{j}/bias"]
    return flow, g


@pytest.mark.parametrize("name", ["adaptor_small", "adaptor_rect", "adaptor_width16"])
def test_flow_reproduces_the_authors_adaptor_and_preserves_volume(name):
    flow, g = official_flow(name)
    with torch.no_grad():
        close(flow(g["x"]), g["y"])
        close(flow.inverse(g["x"]), g["x_inverse_of_x"])
        assert torch.allclose(flow.inverse(flow(g["x"])), g["x"], atol=1e-4)
    x = g["x"][0].double().flatten()
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v.view(1, *g["x"].shape[1:])).flatten(), x.float())
    sign, log_det = torch.linalg.slogdet(jacobian.double())
    assert sign == 1 and abs(log_det) < 1e-5


def test_flow_of_the_paper_has_its_parameter_count():
    count = lambda d, m: sum(p.numel() for p in flow_adapter.FlowAdapter(d, (16, 16), 8, m).parameters())
    assert count(16, 32) == 111_728 and count(32, 128) == 1_478_880


def test_adapted_is_a_generator_and_trains_both_parts():
    adapter = flow_adapter.FlowAdapter(4, (3, 4), 2)
    assert torch.equal(adapter(torch.ones(1, 12, 4)), torch.ones(1, 12, 4)), "a new flow changes nothing"
    for block in adapter.blocks:
        nn.init.normal_(block.convs[-1].weight, std=0.1)
    inner = ar_transformer.ARTransformer(gmm_head.GMMHead(32, 4, 3), 12, 5, token_dim=4, grid=(3, 4), n_layer=1, n_head=2, n_embd=32)
    model, x, cond = flow_adapter.Adapted(adapter, inner), torch.randn(2, 12, 4), torch.tensor([0, 3])
    model(x, cond)[0].backward()
    assert all(p.grad.abs().sum() > 0 for p in [adapter.blocks[0].convs[0].weight, inner.blocks[0].attn.wqkv.weight])
    model.eval()
    assert torch.allclose(model(x, cond)[0], inner(adapter(x), cond)[0]) and model.seq_len == 12
    torch.manual_seed(1)
    drawn = model.sample(cond)
    torch.manual_seed(1)
    assert torch.allclose(adapter(drawn), inner.sample(cond), atol=1e-4)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, :4] = True
    assert torch.equal(model.sample(cond, known=x, known_mask=mask)[:, :4], x[:, :4])


# ---------------------------------------------------------------------------------------------------
# mar.py

def official_mar():
    """The authors' tiny weights -> MAR with 16 tokens of 4 numbers, and their state dict."""
    sd = {k.removeprefix("sd/"): v for k, v in golden("mar/mar_weights").items()}
    return mar.MAR.from_official(sd, n_head=4), sd


def small_mar(cls=mar.MAR, continuous=True, **options):
    size = dict(n_layer=4, n_head=2, n_embd=32, grid=(3, 4)) | ({"n_buffer": 3} if cls is mar.MAR else {}) | options
    if continuous:
        return cls(gmm_head.GMMHead(32, 3, 4), 12, 5, token_dim=3, **size)
    return cls(ar_transformer.CategoricalHead(32, 11), 12, 5, vocab_size=11, **size)


@pytest.mark.parametrize("name", ["", "_full", "_none"])
def test_mar_reproduces_the_authors_hidden_states(name):
    (model, _), g = official_mar(), golden("mar/mar_forward")
    mask = g["mask" + name].bool()
    nonsense = torch.where(mask[..., None], 1e3, g["tokens"])           # unknown tokens must not be looked at
    with torch.no_grad():
        for n_visible in (None, int((~mask[0]).sum())):     # nobody looks at the holes; the holes are dropped
            close(model.hidden(nonsense, g["labels"], mask, n_visible), g["z" + name], 1e-5)
        if name == "":
            close(model.hidden(g["tokens"], torch.full((3,), 10), mask, 4), g["z_uncond"], 1e-5)


def test_mar_patchify_in_the_authors_order():
    g = golden("mar/mar_forward")
    for p, name in ((2, "patchify"), (1, "patchify1")):
        tokens, side = mar.patchify(g[name + "_in"], p), g[name + "_in"].shape[-1] // p
        assert torch.equal(tokens, g[f"patchify_p{p}_out"])
        assert torch.equal(mar.unpatchify(tokens, (side, side), p), g[name + "_in"])
    wide = torch.randn(2, 3, 4, 6)
    assert torch.equal(mar.unpatchify(mar.patchify(wide, 2), (2, 3), 2), wide)


def test_mar_mask_rate_and_counts_are_the_authors():
    g = golden("mar/schedules")
    for q, rate in zip(g["mask_ratio/q"].tolist(), g["mask_ratio/ppf"].tolist()):
        assert abs(mar.mask_rate(q) - rate) < 1e-9
    for name in [k for k in g if k.startswith("ar/")]:
        n, steps = map(int, name[3:].split("_"))
        counts = mar.masked_counts(n, steps)
        assert counts[:-1] == g[name][:, 0].tolist() and counts[-1] == 0
        assert [a - b for a, b in zip(counts, counts[1:])] == g[name][:, 2].tolist()
    model = mar.MAR(nn.Identity(), 256, 2, 4, n_layer=0, n_head=1, n_embd=4)
    counts = [model.mask_count() for _ in range(3000)]
    assert min(counts) >= 180 and max(counts) <= 256 and abs(np.mean(counts) / 256 - 0.869) < 0.006
    model.count_multiple = 16
    assert {model.mask_count() for _ in range(300)} == {192, 208, 224, 240, 256}


def test_mar_loss_and_gradients_are_the_authors(monkeypatch):
    (model, _), g = official_mar(), golden("mar/mar_loss")
    mask = g["mask"].bool()
    order = mask.byte().argsort(dim=1, stable=True)
    n = int(mask[0].sum())
    index = order[:, 16 - n:]
    t = torch.stack([mar.take(v, index) for v in g["t"].view(4, 3, 16)])
    noise = torch.stack([mar.take(v, index) for v in g["noise"].view(4, 3, 16, 4)])
    monkeypatch.setattr(mar, "draw_order", lambda *_: order)
    monkeypatch.setattr(model, "mask_count", lambda: n)
    monkeypatch.setattr(model.head, "loss", lambda h, x: sum(model.head.terms(x, h, t, noise)).mean(0))
    loss, logs = model(mar.patchify(g["imgs"]), g["labels"])
    loss.backward()
    close(loss.detach(), g["loss"])
    assert logs["masked"] == n / 16
    grads = {k: p.grad for k, p in model.named_parameters()}
    close(torch.stack([v.norm() for v in grads.values()]).norm(), g["grad_norm"])
    names = {"z_proj.weight": "tok_embed.weight", "class_emb.weight": "cls_embed.weight", "encoder_pos_embed_learned": "encoder_pos",
             "diffusion_pos_embed_learned": "head_pos"}
    for key in [k for k in g if k.startswith("grad/")]:
        ours, reference = grads[names.get(key[5:], key[5:])], g[key]
        if key == "grad/class_emb.weight":
            assert (ours[10] == 0).all()                    # "no class": not used in eval mode
            ours = ours[:10]
        close(ours.reshape(reference.shape), reference)


@pytest.mark.parametrize("name", ["cfg3_linear", "nocfg", "cfg3_const_16it"])
def test_mar_sampling_replays_the_authors_runs(name, monkeypatch):
    """From their recorded noise: orders, counts, guidance and its schedule, temperature, 25 denoising steps."""
    (model, _), g = official_mar(), golden(f"mar/sample_tokens_{name}")
    steps, guided, scales = int(g["num_iter"]), float(g["cfg"]) != 1, []
    counts = mar.masked_counts(16, steps)
    order = g["orders"].flip(1)                             # they write from the end of `orders`
    order = torch.cat([order[:, 16 - a:16 - b].sort(1).values for a, b in zip(counts, counts[1:])], 1)
    first, noise = g["init_noise"].split(g["init_rows"].tolist()), g["step_noise"].split(g["step_rows"].tolist())
    draw = model.head.sample

    def replay(h, h_uncond, cfg, temperature, **tricks):
        k, n = len(scales), 3 * h.shape[1]
        scales.append(cfg)
        recorded = [first[k], *(v[:n] for v in noise[25 * k:25 * k + 25])]                  # conditional rows come first
        return draw(h, h_uncond, cfg, temperature, noise=torch.stack(recorded).view(26, 3, -1, 4), **tricks)
    monkeypatch.setattr(mar, "draw_order", lambda *_: order)
    monkeypatch.setattr(model.head, "sample", replay)
    tokens = model.sample(g["labels"], steps, float(g["cfg"]), float(g["temperature"]), diffusion_steps=25,
                          cfg_schedule="constant" if "const" in name else "linear")
    close(mar.unpatchify(tokens, (4, 4)), g["out"])
    assert scales == pytest.approx(g["cfg_iter"].tolist()) and len(scales) == steps


def test_mar_from_official_reads_files_and_names_keys(tmp_path):
    model, sd = official_mar()
    half = {k: v / 2 for k, v in sd.items()}
    torch.save({"model": half, "model_ema": sd, "args": argparse.Namespace(epochs=800)}, tmp_path / "mar.pth")
    read = mar.MAR.from_official(tmp_path / "mar.pth", n_head=4)
    assert all(torch.equal(v, read.state_dict()[k]) for k, v in model.state_dict().items()) and not read.training
    assert torch.equal(mar.MAR.from_official({"model": half}, n_head=4).head_pos, model.head_pos / 2)
    with pytest.raises(ValueError, match="encoder_blocks.0.extra"):
        mar.MAR.from_official(sd | {"encoder_blocks.0.extra": torch.zeros(1)}, n_head=4)
    with pytest.raises(ValueError, match="n_head="):
        mar.MAR.from_official(sd)
    del sd["decoder_norm.bias"]
    with pytest.raises(ValueError, match="missing.*decoder_norm.bias"):
        mar.MAR.from_official(sd, n_head=4)
    with pytest.raises(ValueError, match="missing.*fake_latent"):
        mar.MAR.from_official({"pos_embed": torch.zeros(1)})


@pytest.mark.parametrize("name, params, of_head", [("mar-b", 207_924_768, 35_749_920), ("mar-l", 478_326_304, 72_230_432),
                                                   ("mar-h", 942_403_104, 151_206_944)])
def test_mar_of_the_paper_has_its_parameter_count(name, params, of_head):
    with torch.device("meta"):
        head = diffusion_head.DiffusionHead(mar.SIZES[name]["n_embd"], 16, **mar.HEAD_SIZES[name])
        model = mar.MAR(head, 256, 1000, 16, **mar.SIZES[name])
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert (count(model), count(head)) == (params, of_head)
    stated = {"mar-b": (207.92, 35.75), "mar-l": (478.33, 72.23), "mar-h": (942.40, 151.21)}[name]
    assert (round(params / 1e6, 2), round(of_head / 1e6, 2)) == stated, "papers/mar.md section 2"


def test_mar_block_equals_torchs_encoder_layer():
    block, theirs = mar.ViTBlock(32, 4), nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", 1e-6, True, True)
    theirs.load_state_dict({"self_attn.in_proj_weight": block.attn.qkv.weight, "self_attn.in_proj_bias": block.attn.qkv.bias,
                            "self_attn.out_proj.weight": block.attn.proj.weight, "self_attn.out_proj.bias": block.attn.proj.bias,
                            **{f"linear{i}.{k}": getattr(getattr(block.mlp, f"fc{i}"), k) for i in (1, 2) for k in ("weight", "bias")},
                            **{f"norm{i}.{k}": getattr(getattr(block, f"norm{i}"), k) for i in (1, 2) for k in ("weight", "bias")}})
    x = torch.randn(2, 7, 32)
    assert torch.allclose(block(x), theirs(x), atol=1e-5)


def test_mar_loss_counts_masked_tokens_only():
    """The head sees 9 of 12 tokens per row, each once, others in other rows; a zero categorical head starts at ln V."""
    model = small_mar(continuous=False, label_drop=0).eval()
    loss, logs = model(torch.randint(11, (4, 12)), torch.arange(4))
    assert abs(loss - math.log(11)) < 1e-5 and 0.7 <= logs["masked"] <= 1
    model, asked = small_mar(), []
    model.mask_count = lambda: 9
    loss_of = model.head.loss
    model.head.loss = lambda h, x: (asked.append((h, x)), loss_of(h, x))[1]
    x = torch.randn(6, 12, 3)
    model(x, torch.arange(6) % 5)[0].backward()
    (h, targets), = asked
    assert h.shape == (6, 9, 32) and targets.shape == (6, 9, 3), "the head is computed where it is needed"
    found = (targets[:, :, None] == x[:, None]).all(-1).float()         # (6, 9, 12) which token each target is
    assert (found.sum(2) == 1).all() and found.sum(1).max() == 1
    assert len({tuple(row.tolist()) for row in found.argmax(2)}) > 1, "every row has its own order"


@pytest.mark.parametrize("cls", [mar.MAR, mar.CausalMAR])
def test_mar_label_dropping_reaches_the_null_row_in_training_only(cls):
    model, x, cond = small_mar(cls, label_drop=0.5, dropout=0), torch.randn(64, 12, 3), torch.zeros(64, dtype=torch.long)
    model(x, cond)[0].backward()
    assert model.cls_embed.weight.grad[5].abs().sum() > 0 and model.cls_embed.weight.grad[1:5].abs().sum() == 0
    model.zero_grad()
    model.eval()(x, cond)[0].backward()
    assert model.cls_embed.weight.grad[5].abs().sum() == 0
    unused = [k for k, p in model.named_parameters() if p.grad is None]
    assert not unused, f"{unused} take no part in the loss"


@pytest.mark.parametrize("order", ["random", "raster"])
def test_mar_writes_in_its_order_and_by_its_schedule(order):
    model, seen = small_mar(order=order).eval(), []
    x = model.sample(torch.arange(5), 4, cfg=2.0, on_step=lambda i, tokens, mask: seen.append((tokens.clone(), mask.clone())))
    assert [int(m[0].sum()) for _, m in seen] == mar.masked_counts(12, 4)[1:] == [11, 8, 4, 0]
    for (a, unknown), (b, later) in zip(seen, seen[1:]):
        assert (unknown | ~later).all() and torch.equal(a[~unknown], b[~unknown]), "a written token stays"
    assert torch.equal(seen[-1][0], x) and x.shape == (5, 12, 3)
    raster = all((m[:, 1:] >= m[:, :-1]).all() for _, m in seen)        # known tokens stand before unknown ones
    assert raster == (order == "raster")


def test_mar_in_one_step_draws_every_token_from_an_empty_picture():
    model, hs = small_mar(continuous=False).eval(), []
    draw = model.head.sample
    model.head.sample = lambda h, *a, **k: (hs.append(h), draw(h, *a, **k))[1]
    model.sample(torch.arange(5), 1)
    alone = model.hidden(torch.zeros(5, 12, dtype=torch.long), torch.arange(5), torch.ones(5, 12, dtype=torch.bool))
    assert len(hs) == 1 and hs[0].shape == (5, 12, 32)
    assert torch.cdist(hs[0], alone).min(1).values.max() < 1e-3, "the same 12 states, in the order of writing"


@pytest.mark.parametrize("cls", [mar.MAR, mar.CausalMAR])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_mar_keeps_known_tokens_with_any_number_per_row(cls, cfg):
    model = small_mar(cls).eval()
    known, mask = torch.randn(4, 12, 3), torch.zeros(4, 12, dtype=torch.bool)
    for row, places in enumerate([[0, 5], [1, 2, 3, 7, 11], [4, 9], range(12)]):
        mask[row, list(places)] = True
    masks = []
    x = model.sample(torch.arange(4), cfg=cfg, known=known, known_mask=mask, on_step=lambda i, t, m: masks.append(m.clone()))
    assert torch.equal(x[mask], known[mask]) and (x[~mask] != known[~mask]).all()
    if cls is mar.MAR:
        assert len(masks) == 10 and int(masks[0][1].sum()) == 7 and not masks[-1].any()
        equal = mask[[0, 0, 2, 2]]                          # equal numbers: the encoder drops the holes
        x = model.sample(torch.arange(4), 3, cfg, known=known, known_mask=equal)
        assert torch.equal(x[equal], known[equal])
        assert torch.equal(model.sample(torch.arange(4), known=known, known_mask=mask | True), known)


def test_mar_known_tokens_are_seen_from_the_first_step():
    model = small_mar(continuous=False).eval()
    nn.init.normal_(model.head.proj.weight)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, [0, 5]], mask[1, [1, 2, 6]] = True, True
    tokens, hs, draw = torch.randint(11, (2, 12)), [], model.head.sample
    model.head.sample = lambda h, *a, **k: (hs.append(h), draw(h, *a, **k))[1]
    model.sample(torch.arange(2), 1, known=tokens, known_mask=mask)
    h = model.hidden(tokens, torch.arange(2), ~mask)        # (2, 12, 32)
    for row in range(2):
        assert torch.cdist(hs[0][row], h[row]).min(1).values.max() < 1e-4


@pytest.mark.parametrize("order", ["random", "raster"])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_causal_mar_cached_sampling_equals_the_whole_pass(order, cfg, monkeypatch):
    model, hs, orders = small_mar(mar.CausalMAR, order=order).eval(), [], []
    draw, make = model.head.sample, mar.draw_order
    monkeypatch.setattr(model.head, "sample", lambda h, u=None, *a, **k: (hs.append((h, u)), draw(h, u, *a, **k))[1])
    monkeypatch.setattr(mar, "draw_order", lambda *a: (orders.append(make(*a)), orders[-1])[1])
    cond = torch.arange(5)
    x = model.sample(cond, cfg=cfg)
    h = torch.cat([h for h, _ in hs], 1)
    assert torch.allclose(h, model.hidden(x, cond, orders[0]), atol=1e-5)
    if cfg != 1:
        assert torch.allclose(torch.cat([u for _, u in hs], 1), model.hidden(x, torch.full((5,), 5), orders[0]), atol=1e-5)
    assert (orders[0] == torch.arange(12)).all() == (order == "raster")


def test_causal_mar_is_causal_and_is_told_the_target():
    model, x, cond = small_mar(mar.CausalMAR).eval(), torch.randn(1, 12, 3), torch.tensor([2])
    order = torch.randperm(12)[None]
    h = model.hidden(x, cond, order)
    for i in range(12):
        y = x.clone()
        y[:, order[0, i]] += 1
        changed = (model.hidden(y, cond, order) - h).abs().amax((0, 2)) > 1e-6
        assert not changed[:i + 1].any() and (i == 11 or changed[i + 1]), f"place {i} of the order leaks"
    swapped = order.clone()
    swapped[0, [10, 11]] = order[0, [11, 10]]
    changed = (model.hidden(x, cond, swapped) - h).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [False] * 10 + [True] * 2, "the same past and another target must give another h"


@pytest.mark.parametrize("cls", [mar.MAR, mar.CausalMAR])
@pytest.mark.parametrize("order", ["random", "raster"])
def test_mar_reaches_the_exact_optimum_on_bars_and_stripes(cls, order):
    """Every arm of the ablation: 6 pictures of 2 x 2, whose optimum is ln 6 = 1.792 nats, in any order."""
    options = dict(n_buffer=1, mask_min=0, mask_std=9) if cls is mar.MAR else {}
    model = cls(ar_transformer.CategoricalHead(32, 2), 4, 1, vocab_size=2, n_layer=2, n_head=2, n_embd=32, dropout=0,
                label_drop=0, order=order, **options)
    zeros, best = torch.zeros(300, dtype=torch.long), math.log(6)
    mar.fit_ids(model, lambda step: (mar.bars_and_stripes(64, "cpu", 2), zeros[:64]), 400, 5e-3)
    everything = mar.bars_and_stripes(1000, "cpu", 2).unique(dim=0)
    nats = [mar.nats_per_picture(model.eval(), everything, zeros[:6]) for _ in range(20)]   # each in other orders
    nats = torch.stack(nats).mean()
    assert len(everything) == 6 and best - 0.02 <= nats <= 1.03 * best, f"{nats:.3f} nats, the optimum is {best:.3f}"
    drawn = model.sample(zeros)
    good = (drawn[:, None] == everything[None]).all(-1)
    assert good.any(1).float().mean() > 0.95 and good.float().mean(0).min() > 0.08, "each of the 6 in about 1/6 of the samples"


@pytest.mark.parametrize("cls", [mar.MAR, mar.CausalMAR])
def test_mar_refuses_in_a_sentence(cls):
    model, cond = small_mar(cls).eval(), torch.arange(2)
    for steps in (0, 13) if cls is mar.MAR else (3,):
        with pytest.raises(ValueError, match="steps"):
            model.sample(cond, steps)
    for options, words in [(dict(order="spiral"), "spiral"), (dict(grid=(3, 3)), "holds 9 tokens"), (dict(n_head=5), "multiple of n_head 5")]:
        with pytest.raises(ValueError, match=words):
            small_mar(cls, **options)
    with pytest.raises(ValueError, match="cosine"):
        model.sample(cond, cfg=2.0, cfg_schedule="cosine")


@pytest.mark.parametrize("cls", [mar.MAR, mar.CausalMAR])
def test_mar_tricks_may_depend_on_the_progress(cls):
    model, seen = small_mar(cls).eval(), []
    draw = model.head.sample
    model.head.sample = lambda h, u, cfg, temperature, n_tries: (seen.append(n_tries), draw(h, u, cfg, temperature, n_tries))[1]
    model.sample(torch.arange(2), cfg=2.0, n_tries=lambda p: round(13 - 11 * p))
    assert seen == [13 - i for i in range(12)]


@pytest.mark.parametrize("cls", [mar.MAR, mar.CausalMAR])
def test_mar_trains_under_autocast_with_the_diffusion_head(cls):
    model = cls(diffusion_head.DiffusionHead(32, 3, width=32, depth=1), 12, 5, 3, n_layer=2, n_head=2, n_embd=32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = model(torch.randn(4, 12, 3), torch.arange(4))
        x = model.eval().sample(torch.arange(3), cfg=2.0, diffusion_steps=lambda p: round(8 - 4 * p))
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(x).all() and x.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------
# diffusion_head.py

def official_diffusion_head():
    """The head of the authors' tiny MAR: its weights must load by their official names."""
    prefix = "sd/diffloss.net."
    weights = {k[len(prefix):]: v for k, v in golden("mar/mar_weights").items() if k.startswith(prefix)}
    head = diffusion_head.DiffusionHead(32, 4, width=64, depth=2)
    head.net.load_state_dict(weights)
    return head


def test_diffusion_mlp_reproduces_the_authors():
    head, g = official_diffusion_head(), golden("mar/mlp")
    close(head.net.time_embed.sinusoid(g["t"]), g["t_freq"])
    close(head.net.time_embed(g["t"]), g["t_emb"])
    close(head.net(g["x"], g["t"], g["c"]), g["out"])
    halves = lambda a: torch.stack([a[:3], a[3:]])          # in this array the two halves have different t
    eps, v = head.predict(g["x"][:3], head.net.time_embed(halves(g["t"])), head.net.cond_embed(halves(g["c"])), g["cfg_scale"].item())
    close(torch.cat([eps, v], -1), g["out_cfg"][:3])


def test_diffusion_loss_reproduces_every_term_and_gradient():
    head, g = official_diffusion_head(), golden("mar/diffusion_loss")
    row = head.table[g["t"]].unsqueeze(-2).unbind(-1)
    close(row[0] * g["x_start"] + row[1] * g["noise"], g["x_t"])
    close(row[4] * g["x_start"] + row[5] * g["x_t"], g["true_mean"])
    close(row[7].expand(-1, 4), g["true_log_variance"])
    mean, log_var, x0 = head.reverse(g["x_t"], *g["model_out"].chunk(2, -1), row)
    for ours, name in ((mean, "p_mean"), (log_var, "p_log_variance"), (x0, "pred_xstart")):
        close(ours, g[name])
    mse, vb = head.terms(g["x_start"], g["c"], g["t"], g["noise"])
    close(mse, g["mse"])
    assert torch.allclose(vb, g["vb"], rtol=1e-4, atol=1e-6), "each row: one of them is 700 bits and hides the others"
    total = ((mse + vb) * g["mask"]).sum() / g["mask"].sum()
    close(total, g["loss_masked_mean"])
    total.backward()
    parameters, names = dict(head.net.named_parameters()), [k[5:] for k in g if k.startswith("grad/")]
    assert len(names) == 5
    for name in names:
        close(parameters[name].grad, g[f"grad/{name}"])


@pytest.mark.parametrize("tag, steps, spacing", [("train", 1000, "strided"), ("ddim50", 50, "strided"), ("ddim25", 25, "strided"),
                                                 ("s100", 100, "official"), ("s25", 25, "official"), ("s10", 10, "official")])
def test_diffusion_schedule_equals_the_authors(tag, steps, spacing):
    g = {k.split("/")[1]: v for k, v in golden("mar/schedules").items() if k.startswith(tag + "/")}
    t = torch.arange(1000) if tag == "train" else diffusion_head.timesteps(steps, spacing)
    assert torch.equal(t, g["timestep_map"])
    assert max(diffusion_head.timesteps(n)[-1] for n in (51, 100, 500, 981)) == 980 and len(diffusion_head.timesteps(981).unique()) == 981
    a, s, a_before, s_before, k0, kx, log_beta, log_tilde = diffusion_head.schedule(t).double().unbind(1)
    for ours, reference in ((a, g["sqrt_alphas_cumprod"]), (s, g["sqrt_one_minus_alphas_cumprod"]), (1 / a, g["sqrt_recip_alphas_cumprod"]),
                            (s / a, g["sqrt_recipm1_alphas_cumprod"]), (a_before, g["alphas_cumprod_prev"].sqrt()),
                            (s_before, (1 - g["alphas_cumprod_prev"]).sqrt()), (k0, g["posterior_mean_coef1"]),
                            (kx, g["posterior_mean_coef2"]), (log_beta.exp(), g["betas"]), (log_tilde, g["posterior_log_variance_clipped"])):
        assert torch.allclose(ours, reference, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("tag, steps, spacing", [("ddim25", 25, "strided"), ("s10", 10, "official")])
@pytest.mark.parametrize("name", ["traj", "traj_t09", "traj_cfg", "traj_ddim"])
def test_diffusion_sampling_follows_the_authors_trajectories(tag, steps, spacing, name):
    head, g, states = official_diffusion_head(), golden("mar/p_sample_loop"), []
    guided = name == "traj_cfg"
    noise = torch.cat([g["init_noise"][None], g[f"{tag}/step_noise{'_cfg' if guided else ''}"][:, :5]])
    h, h_uncond, cfg = (g["z_cfg"][:5], g["z_cfg"][5:], g["cfg_scale"].item()) if guided else (g["z"], None, 1.0)
    temperature = {"traj_t09": 0.9, "traj_cfg": g["temperature_cfg"].item()}.get(name, 1.0)
    x, log_p = head.sample(h, h_uncond, cfg, temperature, steps, "ddim" if name == "traj_ddim" else "ancestral", spacing,
                           noise=noise, on_step=lambda i, x: states.append(x))
    assert log_p is None and torch.equal(x, states[-1])
    close(torch.stack(states), g[f"{tag}/{name}"][:, :5])   # the authors' other half is carried along and thrown away


@pytest.mark.parametrize("width, depth, count", [(256, 3, 1.53), (512, 3, 5.41), (1024, 3, 20.26), (1536, 3, 44.55)])
def test_diffusion_head_has_the_published_parameter_count(width, depth, count):
    with torch.device("meta"):
        head = diffusion_head.DiffusionHead(1024, 16, width, depth)
    assert round(sum(p.numel() for p in head.parameters()) / 1e6, 2) == count
    assert all(k.startswith("net.") for k in head.state_dict()), "the schedule is no part of a checkpoint"


def test_a_new_diffusion_head_predicts_zero_and_its_mse_is_one():
    head, h, x = diffusion_head.DiffusionHead(8, 16, 32), torch.randn(500, 8), torch.randn(500, 16)
    t, noise = torch.randint(1000, (500,)), torch.randn(500, 16)
    mse, vb = head.terms(x, h, t, noise)
    assert not head.net(x, t, h).any() and torch.allclose(mse, noise.pow(2).mean(-1))
    _, vb = head.terms(x, h, torch.full((500,), 999), noise)
    assert 600 < vb.mean() < 850, "papers/mar.md section 0: about 718 bits at t = 999"


@pytest.mark.parametrize("objective", ["diffusion", "flow"])
def test_batch_mul_averages_independent_draws_of_any_leading_shape(objective):
    head = diffusion_head.DiffusionHead(8, 4, 32, 2, objective, batch_mul=3)
    for p in head.parameters():
        nn.init.normal_(p, std=0.1)
    h, x = torch.randn(2, 5, 8), torch.randn(2, 5, 4)
    torch.manual_seed(1)
    loss = head.loss(h, x)
    torch.manual_seed(1)
    noise = torch.randn(3, 2, 5, 4)
    t = torch.randint(1000, (3, 2, 5)) if objective == "diffusion" else torch.randn(3, 2, 5).sigmoid()
    tile = lambda a: a.repeat(3, 1, 1).view(30, -1)         # as the authors do: token j, then j again after all others
    rows = sum(head.terms(tile(x), tile(h), t.view(30), noise.view(30, 4)))
    assert loss.shape == (2, 5) and torch.allclose(loss, rows.view(3, 2, 5).mean(0), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        assert torch.equal(head.loss(h, x), loss), "the head computes in float32, whatever the transformer does"


def exact_head(objective, mu, sigma):
    """A head whose network is the best possible one for tokens ~ Normal(mu, sigma^2): known in closed form."""
    head = diffusion_head.DiffusionHead(8, 2, 16, 1, objective)
    head.net.time_embed = nn.Identity()                     # hand t itself to predict
    def predict(x, t, c, cfg):
        if objective == "flow":
            u = t / 1000                                    # x_u = (1 - u) x0 + u eps
            gain = (u - (1 - u) * sigma ** 2) / ((1 - u) ** 2 * sigma ** 2 + u ** 2)
            return -mu + gain * (x - (1 - u) * mu), x[..., :0]
        a, s = head.table[t.long(), :2].unbind()
        eps = s * (x - a * mu) / (a ** 2 * sigma ** 2 + s ** 2)
        return eps, torch.full_like(eps, -1.0)
    head.predict = predict
    return head


@pytest.mark.parametrize("objective, sampler, steps, off", [("diffusion", "ancestral", 250, 0.02), ("diffusion", "ddim", 250, 0.02),
                                                            ("flow", "euler", 100, 0.05), ("flow", "heun", 100, 0.005)])
def test_samplers_turn_an_exact_network_into_the_exact_distribution(objective, sampler, steps, off):
    mu, sigma = torch.tensor([0.5, -1.0]), 0.3
    x, _ = exact_head(objective, mu, sigma).sample(torch.zeros(20_000, 8), diffusion_steps=steps, sampler=sampler)
    error = 4 * sigma / 20_000 ** 0.5
    assert (x.mean(0) - mu).abs().max() < error + 0.005 and (x.std(0) / sigma - 1).abs().max() < off + 0.02
    if sampler in ("ddim", "euler", "heun"):                # deterministic: the same start ends in the same place
        start = torch.randn(1, 7, 2)
        ends = [exact_head(objective, mu, sigma).sample(torch.zeros(7, 8), sampler=sampler, noise=start)[0] for _ in range(2)]
        assert torch.equal(*ends)


def test_heun_is_of_second_order_and_euler_of_first():
    head, start = exact_head("flow", torch.tensor([0.5, -1.0]), 0.3), torch.randn(1, 50, 2)
    end = lambda sampler, n: head.sample(torch.zeros(50, 8), sampler=sampler, diffusion_steps=n, noise=start)[0]
    exact = torch.tensor([0.5, -1.0]) + 0.3 * start[0]      # the path of a Gaussian keeps its quantile
    order = lambda sampler: ((end(sampler, 20) - exact).norm() / (end(sampler, 40) - exact).norm()).log2()
    assert abs(order("euler") - 1) < 0.3 and abs(order("heun") - 2) < 0.4


def test_a_barely_trained_diffusion_head_does_not_explode_unless_asked_to():
    table, head = diffusion_head.fit_diffusion("diffusion", 60, "cpu", width=32)
    label = torch.arange(400) % 4
    spread = diffusion_head.toy_tokens(label).std()
    std = lambda spacing, steps: head.sample(table(label), spacing=spacing, diffusion_steps=steps)[0].std() / spread
    assert max(std("official", n) for n in (10, 25, 100)) > 20
    for n in (2, 10, 25, 64, 100, 250):
        assert 0.4 < std("strided", n) < 4, f"{n} steps: std {std('strided', n):.2f} of the data's"


def test_diffusion_guidance_mixes_predictions_and_is_off_at_one():
    head = official_diffusion_head()
    h, u, noise = torch.randn(3, 4, 32), torch.randn(3, 4, 32), torch.randn(11, 3, 4, 4)
    draw = lambda *a, **k: head.sample(*a, diffusion_steps=10, noise=noise, **k)[0]
    assert torch.equal(draw(h, u, 1.0), draw(h)) and torch.allclose(draw(h, u, 0.0, sampler="ddim"), draw(u, sampler="ddim"), atol=1e-4)
    assert torch.allclose(draw(h, h, 3.0), draw(h), atol=1e-4) and not torch.allclose(draw(h, u, 3.0), draw(h), atol=1e-2)


def test_diffusion_head_refuses_in_a_sentence():
    head, h = diffusion_head.DiffusionHead(8, 2, 16, 1), torch.randn(3, 8)
    for options, sentence in ((dict(sampler="heun"), "does not fit objective"), (dict(spacing="cosine"), "neither"),
                              (dict(diffusion_steps=982), "1 to 981")):
        with pytest.raises(ValueError, match=sentence):
            head.sample(h, **options)
    with pytest.raises(ValueError, match="is not diffusion | flow"):
        diffusion_head.DiffusionHead(8, 2, objective="score")


def test_diffusion_loss_and_network_compile_without_a_break():
    head, h, x = official_diffusion_head(), torch.randn(6, 32), torch.randn(6, 4)
    t, noise = torch.randint(1000, (6,)), torch.randn(6, 4)
    compiled = torch.compile(lambda *a: torch.stack(head.terms(*a)), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, h, t, noise), torch.stack(head.terms(x, h, t, noise)), atol=1e-5)


# ---------------------------------------------------------------------------------------------------
# data.py

def test_drawn_pictures_depend_on_seed_and_index_only():
    together = data.draw(torch.arange(40))[0]
    assert torch.allclose(data.draw(torch.tensor([7]))[0][0], together[7], atol=1e-6)
    assert not torch.allclose(data.draw(torch.arange(40), seed=1)[0], together)
    train_set, val_set = data.load(n_shapes=300), data.load(split="val", n_shapes=300)
    rows = lambda s: {bytes(i.numpy().tobytes()) for i in s.images}
    assert len(rows(train_set)) == 300 and not rows(train_set) & rows(val_set)
    u = data.uniforms(torch.arange(20_000), 3)
    assert torch.allclose(u.mean(0), torch.tensor(0.5), atol=0.01) and abs(torch.corrcoef(u.T)[0, 1]) < 0.02
    assert u.min() >= 0 and u.max() < 1


def test_drawn_shapes_have_the_area_and_place_they_should():
    images, labels, masks, d = data.draw(torch.arange(400), 128)
    s = data.scene(torch.arange(400))
    area = (masks > 0).float().mean((1, 2)) * 4                                             # in squared half widths
    disc, square = labels == 0, labels == 2
    assert torch.allclose(area[disc], math.pi * (0.9 * s["radius"][disc]) ** 2, rtol=0.02)
    assert torch.allclose(area[square], (1.56 * s["radius"][square]) ** 2, rtol=0.02)
    assert (masks.flatten(1).amax(1) == labels + 1).all() and set(labels.tolist()) == set(range(10))
    border = torch.cat([masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]], 1)
    assert (border > 0).float().mean() < 0.01, "shapes leave the picture"
    far = (images[0][:, d[0] < -0.1] / 2 + 0.5 - s["rgb"][0][:, None]).abs().max()
    assert far < 1e-5


def test_maps_belong_to_their_images():
    images, labels, masks, d = data.draw(torch.arange(20))
    truth = data.load(n_shapes=20).batch(torch.arange(20))[0]
    assert (truth - images).abs().max() < 0.01
    maps, again = data.load(n_shapes=20, task="segment").batch(torch.arange(20))
    assert maps.shape == (20, 11, 32, 32) and torch.equal(maps.argmax(1), masks) and torch.equal(again, labels)
    assert set(maps.unique().tolist()) == {-1.0, 1.0}
    depth = data.load(n_shapes=20, task="depth").batch(torch.arange(20))[0]
    assert (depth[:, 0] - d.clamp(-1, 1)).abs().max() < 0.01
    colours = data.colour_maps(maps)
    assert colours.shape == (20, 3, 32, 32) and (colours[:, :, 0, 0] == -1).all()
    assert len(data.colour_maps(torch.eye(11)[:, :, None, None]).flatten(1).unique(dim=0)) == 11, "two classes have one colour"
    with pytest.raises(data.BadInput, match="only the drawn world"):
        data.load("somewhere", task="depth")


def test_captions_say_what_is_drawn():
    s = data.scene(torch.arange(300))
    for i, text in enumerate(data.captions(torch.arange(300))):
        words = text.split()
        assert words[3] == data.SHAPES[s["label"][i]] and words[2] == list(data.COLOURS)[s["colour"][i]]
        assert text.endswith(list(data.BACKGROUNDS)[s["background"][i]] + " background")
        if "upper" in words:
            assert s["cy"][i] < 0
        if "left" in words:
            assert s["cx"][i] < 0


def test_clips_move_as_their_action_says():
    videos, actions, _ = data.draw_clips(torch.arange(300), 32, frames=5)
    assert videos.shape == (300, 3, 5, 32, 32)
    ground = videos[:, :, :, :1, :1]
    weight = (videos - ground).abs().sum(1)                                                 # (B, F, H, W)
    axis = torch.arange(32.0)
    mass = weight.sum((2, 3)).clamp(min=1e-3)
    x, y = (weight.sum(2) * axis).sum(-1) / mass, (weight.sum(3) * axis).sum(-1) / mass
    for name, value, sign in (("moves left", x, -1), ("moves right", x, 1), ("moves up", y, -1), ("moves down", y, 1),
                              ("grows", mass, 1), ("shrinks", mass, -1)):
        rows = actions == data.ACTIONS.index(name)
        assert (sign * (value[rows, -1] - value[rows, 0]) > 0).all(), name
    rests = actions == data.ACTIONS.index("rests")
    assert torch.equal(videos[rests][:, :, 0], videos[rests][:, :, -1])
    assert data.draw_clips(torch.arange(3), 16, frames=1)[0].shape == (3, 3, 1, 16, 16)


def picture_tree(folder, n=12, size=(40, 30), grey=False):
    for c, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            pixels = np.random.RandomState(100 * c + i).randint(0, 255, (size[1], size[0], 3), np.uint8)
            Image.fromarray(pixels[..., 0] if grey else pixels).save(folder / name / f"{i:03d}.png")
    return folder


def test_the_same_images_from_folder_tar_zip_and_npz(tmp_path):
    tree = picture_tree(tmp_path / "pets", size=(16, 16))
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as t:
        t.add(tree, arcname="pets")
    with tarfile.open(tmp_path / "b.tar", "w") as t:
        t.add(tree, arcname=".")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as z:
        for f in tree.rglob("*.png"):
            z.write(f, f.relative_to(tree))
    files = sorted(tree.rglob("*.png"))
    np.savez(tmp_path / "d.npz", images=np.stack([np.array(Image.open(f)) for f in files]),
             labels=np.array([f.parent.name == "dog" for f in files]).astype(int), classes=np.array(["cat", "dog"]))
    reference = data.load(str(tree), 16)
    assert reference.classes == ["cat", "dog"] and len(reference) == 22 and len(data.load(str(tree), 16, "val")) == 2
    assert np.array_equal(reference.images[0].permute(1, 2, 0).numpy(), np.array(Image.open(files[0])))
    for other in ("a.tar.gz", "b.tar", "c.zip"):
        s = data.load(str(tmp_path / other), 16)
        assert torch.equal(s.images, reference.images) and torch.equal(s.labels, reference.labels), other
    s = data.load(str(tmp_path / "d.npz"), 16)
    assert s.classes == ["cat", "dog"] and len(s) == 22 and s.images.dtype == torch.uint8
    streamed = data.load(str(tree), 16, max_bytes=0)
    index = torch.tensor([3, 20, 5])
    assert torch.equal(streamed.batch(index)[0], reference.batch(index)[0])


def test_images_are_cropped_in_the_middle_and_grey_becomes_rgb(tmp_path):
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 200
    assert (data.centre_crop(Image.fromarray(wide), 8) == 200).all()
    assert data.centre_crop(Image.fromarray(wide).resize((200, 90)), 8).shape == (8, 8, 3)
    s = data.load(str(picture_tree(tmp_path / "g", grey=True)), 16)
    assert s.images.shape[1:] == (3, 16, 16) and torch.equal(s.images[:, 0], s.images[:, 2])
    s = data.load(str(tmp_path / "g"), 16, flip=True)
    x, plain = s.batch(torch.zeros(64, dtype=torch.long))[0], s.images[0].float() / 127.5 - 1
    mirrored = (x == plain.flip(-1)).all((1, 2, 3))
    assert 10 < mirrored.sum() < 54 and ((x == plain).all((1, 2, 3)) | mirrored).all()


def test_train_and_val_levels_and_captions_are_understood(tmp_path):
    picture_tree(tmp_path / "d" / "train"), picture_tree(tmp_path / "d" / "test", n=3)
    for f in (tmp_path / "d" / "train").rglob("*.png"):
        f.with_suffix(".txt").write_text(f"a {f.parent.name}\n")
    s = data.load(str(tmp_path / "d"), 16)
    assert len(s) == 24 and len(data.load(str(tmp_path / "d"), 16, "val")) == 6
    assert s.texts[0] == "a cat" and s.texts[-1] == "a dog"


def test_bad_data_is_refused_in_a_sentence(tmp_path):
    def refused(path, words, **options):
        with pytest.raises(data.BadInput, match=words):
            data.load(str(path), 16, **options)
    refused(tmp_path / "absent", "no such file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no images")
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 not really")
    refused(tmp_path / "broken.zip", "neither a folder|damaged")
    tree = picture_tree(tmp_path / "t")
    (tree / "emu").mkdir()
    refused(tree, "emu holds no image")
    (tree / "emu").rmdir()
    whole = (tree / "cat" / "003.png").read_bytes()
    (tree / "cat" / "003.png").write_bytes(whole[:len(whole) // 2])
    refused(tree, "cat/003.png: not a readable image")
    assert len(data.load(str(tree), 16, skip_bad=True)) == 21
    archive = tmp_path / "cut.tar.gz"
    with tarfile.open(archive, "w:gz") as t:
        t.add(tree, arcname=".")
    archive.write_bytes(archive.read_bytes()[:-3000])
    refused(archive, "damaged")
    (tree / "loose.png").write_bytes(whole)
    refused(tree, "loose.png lies in no class folder")
    np.savez(tmp_path / "x.npz", images=np.zeros((20, 8, 8, 3)), labels=np.zeros(20))
    refused(tmp_path / "x.npz", "uint8")


def test_order_is_a_permutation_per_epoch():
    seen = torch.cat([data.order(100, 20, step, seed=1) for step in range(5)])
    assert sorted(seen.tolist()) == list(range(100))
    assert not torch.equal(data.order(100, 20, 0, 1), data.order(100, 20, 5, 1))
    again = data.order(100, 20, 3, seed=1)
    assert torch.equal(again, seen[60:80]) and len(data.order(7, 20, 0)) == 20


# ---------------------------------------------------------------------------------------------------
# evaluate.py

def test_frechet_distance_of_known_gaussians():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(4000, 3, generator=g, dtype=torch.float64)
    white = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(a.T.cov()).T)          # exactly N(0, 1) moments
    b = white * 3 + torch.tensor([1.0, 2.0, 2.0])
    assert abs(evaluate.frechet_distance(white, b) - (9 + 3 * (3 - 1) ** 2)) < 1e-6
    assert evaluate.frechet_distance(b, b) < 1e-6


def test_mean_iou_equals_a_slow_loop():
    predicted, true = torch.randint(4, (3, 5, 5)), torch.randint(3, (3, 5, 5))              # class 3 is never true
    slow = []
    for k in range(4):
        a, b = {tuple(i) for i in (predicted == k).nonzero().tolist()}, {tuple(i) for i in (true == k).nonzero().tolist()}
        slow.append(len(a & b) / len(a | b))
    assert abs(evaluate.mean_iou(predicted, true, 4) - sum(slow) / 4) < 1e-6
    assert evaluate.mean_iou(true, true, 5) == 1


def test_psnr_ssim_precision_and_recall():
    x = data.draw(torch.arange(4))[0]
    assert torch.allclose(evaluate.psnr(x, x + 0.2), torch.full((4,), 20.0), atol=1e-3)
    assert torch.allclose(evaluate.ssim(x, x), torch.ones(4), atol=1e-5) and evaluate.ssim(x, -x).max() < 0.5
    a, b = 0.5, 1.25                                        # flat images on SSIM's scale of [0, 2]: only the means count
    flat = lambda v: torch.full((1, 3, 16, 16), v - 1.0)
    assert abs(evaluate.ssim(flat(a), flat(b))[0] - (2 * a * b + 4e-4) / (a * a + b * b + 4e-4)) < 1e-4
    real, far = torch.randn(200, 4), torch.randn(200, 4) + 100
    assert evaluate.precision_recall(real, far) == (0, 0) and evaluate.precision_recall(real, real) == (1, 1)
    collapsed = real[:1] + 1e-3 * torch.randn(200, 4)
    precision, recall = evaluate.precision_recall(real, collapsed)
    assert precision > 0.99 and recall < 0.05


def test_probe_is_perfect_on_separable_features_and_at_chance_on_noise():
    y = torch.arange(1200) % 4
    x = torch.randn(1200, 6) + 12 * F.one_hot(y, 6)
    x[:, 5] = 7.0                                           # a constant must not become a division by zero
    assert evaluate.probe_accuracy(x[:800], y[:800], x[800:], y[800:]) == 1
    assert abs(evaluate.probe_accuracy(1e3 * x[:800], y[:800], 1e3 * x[800:], y[800:]) - 1) < 1e-6
    noise = torch.randn(1200, 6)
    assert abs(evaluate.probe_accuracy(noise[:800], y[:800], noise[800:], y[800:]) - 0.25) < 0.08
    weight, bias = evaluate.fit_linear(x[:800, :3], y[:800], 0.1, 4)
    p = (x[:800, :3] @ weight + bias).softmax(-1) - F.one_hot(y[:800], 4)                   # at the optimum the gradient is 0
    assert (x[:800, :3].T @ p / 800 + 0.1 * weight).abs().max() < 1e-3 and p.mean(0).abs().max() < 1e-3


def test_probe_reads_every_layer_by_hooks_and_takes_them_away():
    size = dict(n_layer=3, n_head=2, n_embd=32)
    model = ar_transformer.ARTransformer(gmm_head.GMMHead(32, 4, 2), 12, 5, token_dim=4, grid=(3, 4), **size).eval()
    x, cond = torch.randn(2, 12, 4), torch.tensor([5, 5])
    pooled = evaluate.layer_features(model, x, cond)
    assert [f.shape for f in pooled] == [(2, 32)] * 4 and not any(block._forward_hooks for block in model.blocks)
    h = torch.cat([model.prefix(cond), model.embed(x[:, :-1])], 1)
    for block, f in zip([None, *model.blocks], pooled):     # the forward pass again, by hand
        h = h if block is None else block(h, model.rope[:12])
        assert torch.allclose(h.mean(1), f, atol=1e-6)
    adapted = flow_adapter.Adapted(flow_adapter.FlowAdapter(4, (3, 4), 2), model).eval()
    for a, b in zip(evaluate.layer_features(adapted, x, cond), evaluate.layer_features(model, adapted.adapter(x), cond)):
        assert torch.equal(a, b)

    class Masked(nn.Module):                                # the shape of a bidirectional model
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def hidden(self, tokens, labels, mask):
            h = tokens * ~mask[..., None]
            for block in self.blocks:
                h = block(h)
            return h
    hide = torch.zeros(2, 12, dtype=torch.bool)
    hide[:, 6:] = True
    pooled = evaluate.layer_features(Masked(), x, cond, hide)
    assert len(pooled) == 3 and torch.allclose(pooled[0], x[:, :6].sum(1) / 12, atol=1e-6)


def test_probe_runs_alone_and_adds_to_the_metrics(tiny_run, monkeypatch, capsys):
    folder = tiny_run / "shapes-vae-ar-gmm"
    before = (folder / "metrics.json").read_text() if (folder / "metrics.json").exists() else None
    (folder / "metrics.json").write_text('{"kept": 1}')
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(folder), "--probe", "--device", "cpu"])
    evaluate.main()
    out, metrics = capsys.readouterr().out, evaluate.json.loads((folder / "metrics.json").read_text())
    assert metrics.pop("kept") == 1
    assert list(metrics) == ["probe_pixels", "probe_latents", "probe_latents_averaged"] + [f"probe_layer_{k}" for k in range(5)]
    assert all(5 < v <= 100 for v in metrics.values()) and "linear probe, layer 4" in out and "samples" not in out
    assert Image.open(folder / "probe.png").width > 400
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tiny_run / "shapes-vae"), "--probe", "--device", "cpu"])
    with pytest.raises(SystemExit, match="--probe: .* without a generator"):
        evaluate.main()
    (folder / "probe.png").unlink(), (folder / "metrics.json").unlink()
    if before:
        (folder / "metrics.json").write_text(before)


# ---------------------------------------------------------------------------------------------------
# The programs, as a user runs them

TINY = ["--tokenizer", "vae", "--head", "gmm", "--n_shapes", "200", "--tok_steps", "24", "--tok_batch_size", "8", "--image_size", "16",
        "--steps", "24", "--batch_size", "8", "--size", "tiny", "--save_every", "4", "--log_every", "4", "--eval_every", "12",
        "--warmup", "4", "--device", "cpu", "--dtype", "fp32"]


def command(*words, torchrun=0):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"] if torchrun \
        else [sys.executable]
    return launcher + [str(ROOT / words[0]), *map(str, words[1:])]


ENV = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}


def call(*words, code=0, **options):
    done = subprocess.run(command(*words, **options), capture_output=True, text=True, env=ENV, timeout=200)
    assert done.returncode == code or (code and done.returncode), done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """One tiny run, uninterrupted -> its runs folder."""
    runs = tmp_path_factory.mktemp("runs")
    call("train.py", *TINY, "--runs", runs)
    return runs


def log_of(runs, name, column="loss"):
    with open(runs / name / "log.csv", newline="") as f:
        return {int(r["step"]): float(r[column]) for r in csv.DictReader(f)}


def test_a_run_leaves_its_files_and_samples(tiny_run, tmp_path):
    folder = tiny_run / "shapes-vae-ar-gmm"
    for name in ("ckpt.pt", "log.csv", "curve.png", "samples.png"):
        assert (folder / name).stat().st_size > 0
    assert (tiny_run / "shapes-vae" / "reconstructions.png").exists() and not list(tiny_run.rglob("*.tmp"))
    out = call("sample.py", folder, "--npz", tmp_path / "x.npz", "--gif", tmp_path / "x.gif", "--out", tmp_path / "x.png", "--n", 30)
    assert re.search(r"s per image at batch 30, fp32, cpu", out)
    with np.load(tmp_path / "x.npz") as f:
        assert f["arr_0"].shape == (30, 16, 16, 3) and f["arr_0"].dtype == np.uint8
        assert (np.bincount(f["labels"]) == 3).all()
    assert Image.open(tmp_path / "x.gif").n_frames == 4 and Image.open(tmp_path / "x.png").width > 100
    assert "trained already" in call("train.py", *TINY, "--runs", tiny_run)


@pytest.mark.parametrize("words, name", [
    (["--generator", "maskgit"], "shapes-vae-maskgit-gmm"), (["--adapter", "flow"], "shapes-vae-flow-ar-gmm"),
    (["--joint"], "shapes-vae-joint-ar-gmm"), (["--mix", "channel", "--name", "c"], "c"), (["--mix", "full", "--name", "f"], "f"),
    (["--generator", "maskgit", "--adapter", "flow"], "shapes-vae-flow-maskgit-gmm"),
    (["--generator", "mar", "--head", "diffusion", "--head_width", "32", "--head_depth", "1"], "shapes-vae-mar-diffusion"),
    (["--generator", "mar", "--head", "diffusion", "--objective", "flow", "--head_width", "32", "--name", "mf"], "mf"),
    (["--generator", "mar", "--order", "raster", "--attention", "causal", "--name", "mc"], "mc"),
    (["--head", "diffusion", "--head_width", "32", "--head_depth", "1"], "shapes-vae-ar-diffusion")])
def test_every_combination_trains_loads_and_samples(words, name, tiny_run, capsys):
    train.main([*TINY, "--runs", str(tiny_run), *words])
    assert (tiny_run / name / "samples.png").stat().st_size > 0 and (tiny_run / name / "curve.png").exists()
    run = train.load_run(tiny_run / name)
    images = sample.draw_samples(run, torch.arange(4))
    assert images.shape == (4, 3, 16, 16) and torch.isfinite(images).all()
    assert all(torch.isfinite(torch.tensor(v)) for v in log_of(tiny_run, name).values())


@pytest.mark.parametrize("task", ["segment", "depth"])
def test_maps_of_images_are_trained_drawn_and_measured(task, tiny_run, capsys):
    train.main([*TINY, "--runs", str(tiny_run), "--task", task])
    folder = tiny_run / f"shapes-vae-{task}-ar-gmm"
    run = train.load_run(folder)
    assert run.source.grid == (2, 2) and run.tokenizer.channels == (11 if task == "segment" else 3)
    images = data.draw(torch.arange(3), 16)[0]
    a, b = (sample.draw_samples(run, sample.image_tokens(run, x)) for x in (images, images.flip(0)))
    assert not torch.equal(a, b), "the map does not depend on the image"
    args = argparse.Namespace(n=30, seed=0, batch_size=30, fid=False, cfg=None, temperature=None)
    rows = {key: value for key, _, value, _, _ in evaluate.measure_maps(args, run, "cpu")}
    if task == "segment":
        assert 0 <= rows["miou"] <= 1 and rows["miou_tokenizer"] > rows["miou_ground"] - 0.05
    else:
        assert rows["rmse"] > 0 and rows["rmse_mean_map"] > 0
    sample.main([str(folder), "--n", "3", "--beam", "2"])
    assert (folder / "samples.png").stat().st_size > 0


def test_editing_keeps_what_lies_outside_the_mask(tiny_run, tmp_path, capsys):
    train.main([*TINY, "--runs", str(tiny_run), "--generator", "maskgit", "--name", "edit"])
    picture = tmp_path / "p.png"
    Image.fromarray(data.to_uint8(data.draw(torch.arange(1), 16)[0])[0].permute(1, 2, 0).numpy()).save(picture)
    sample.main([str(tiny_run / "edit"), "--image", str(picture), "--mask", "right", "--n", "10", "--npz", str(tmp_path / "x.npz")])
    with np.load(tmp_path / "x.npz") as f:
        assert f["arr_0"].shape == (10, 16, 16, 3)
    grid = (4, 4)
    assert sample.parse_mask("right", grid).view(grid)[:, 2:].all() and sample.parse_mask("right", grid).sum() == 8
    assert sample.parse_mask("0,0,0.5,1", grid).view(grid)[:2].all() and sample.parse_mask("0,0,0.5,1", grid).sum() == 8
    assert sample.parse_mask("centre", grid).sum() == 4 and (~sample.parse_mask("border", grid)).sum() == 4
    Image.fromarray(np.kron(np.eye(4), np.ones((8, 8))).astype(np.uint8) * 255).save(tmp_path / "m.png")
    assert torch.equal(sample.parse_mask(str(tmp_path / "m.png"), grid).view(grid), torch.eye(4).bool())
    for words, sentence in [(["--image", picture, "--mask", "0,0,2"], "a box y0,x0,y1,x1"), (["--image", picture], "belong together"),
                            (["--image", tmp_path / "no.png", "--mask", "left"], "no such file"),
                            (["--image", picture, "--mask", "0,0,0.01,0.01"], "covers no token"),
                            (["--steps", "9"], "only 4 tokens"), (["--beam", "2"], "--beam: not for --generator maskgit")]:
        with pytest.raises(SystemExit, match=sentence):
            sample.main([str(tiny_run / "edit"), *map(str, words)])


def test_samples_are_a_function_of_the_seed(tiny_run):
    run = train.load_run(tiny_run / "shapes-vae-ar-gmm")
    labels = torch.arange(10)
    a, b, c = (sample.draw_samples(run, labels, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.min() >= -1 and a.max() <= 1


@pytest.mark.parametrize("stage", ["stage 1", "stage 2"])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(stage, tiny_run, tmp_path):
    words = command("train.py", *TINY, "--runs", tmp_path)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=ENV)
    inside = False
    for line in process.stdout:
        inside = inside or line.startswith(stage)
        if inside and line.startswith("step     12"):
            process.send_signal(signal.SIGKILL)
            break
    process.wait(), process.stdout.close()
    call("train.py", *TINY, "--runs", tmp_path, "--resume")
    for name in ("shapes-vae", "shapes-vae-ar-gmm"):
        ours, theirs = train.read_checkpoint(tmp_path / name), train.read_checkpoint(tiny_run / name)
        for part in ("model", "ema"):
            assert all(torch.equal(v, theirs[part][k]) for k, v in ours[part].items()), f"{name}: {part} differs"
        assert log_of(tmp_path, name) == log_of(tiny_run, name)
    runs = [train.load_run(r / "shapes-vae-ar-gmm") for r in (tmp_path, tiny_run)]
    assert torch.equal(*(sample.draw_samples(r, torch.arange(10)) for r in runs))


def test_two_processes_follow_one(tmp_path):
    """Without noise inside the models (beta 0, no label dropping) the losses are equal up to rounding."""
    options = [*TINY, "--beta", "0", "--label_drop", "0"]
    call("train.py", *options, "--runs", tmp_path / "one")
    call("train.py", *options, "--runs", tmp_path / "two", torchrun=2)
    for name in ("shapes-vae", "shapes-vae-ar-gmm"):
        one, two = log_of(tmp_path / "one", name), log_of(tmp_path / "two", name)
        assert one.keys() == two.keys() and len(one) > 4
        assert all(abs(one[s] - two[s]) <= 2e-3 * (1 + abs(one[s])) for s in one), (name, one, two)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "ckpt.pt"
    train.save_atomically({"step": 1}, path)
    full = path.with_suffix(f".{os.getpid()}.tmp")
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    full.symlink_to("/dev/full")                            # writing there fails as on a full disk
    with pytest.raises(data.BadInput, match="could not write"):
        train.save_atomically({"step": 2, "x": torch.zeros(100_000)}, path)
    assert torch.load(path, weights_only=True) == {"step": 1} and not full.exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    out = call("train.py", *TINY, "--runs", tmp_path, "--tok_lr", "1e30", "--warmup", "1", "--generator", "none", code=1)
    step = int(re.search(r"step (\d+): the loss is not finite", out).group(1))
    saved = train.read_checkpoint(tmp_path / "shapes-vae")
    assert "Traceback" not in out and saved["step"] <= step
    assert all(torch.isfinite(v).all() for v in saved["model"].values() if v.is_floating_point())


@pytest.mark.parametrize("words, sentence", [
    (["--head", "categorical"], "use --head gmm"),
    (["--data", "nowhere"], "no such file or folder"),
    (["--device", "cuda:77"], "--device cuda:77: not on this machine"),
    (["--device", "toaster"], "--device toaster: not on this machine"),
    (["--resume", "--runs", "nowhere"], "there is no run"),
    (["--resume", "--overwrite"], "give one of them"),
    (["--image_size", "20"], "not a multiple of 8"),
    (["--steps", "0"], "--steps 0: must be at least 1"),
    (["--lr", "-1"], "--lr -1.0: must be above 0"),
    (["--label_drop", "1.5"], "must be below 1"),
    (["--task", "segment", "--generator", "maskgit"], "only --generator ar"),
    (["--task", "segment", "--flip"], "mirrored apart"),
    (["--head", "diffusion", "--generator", "maskgit"], "--head diffusion gives no density"),
    (["--generator", "mar", "--mask_min", "1"], "--mask_min 1.0: a share"),
    (["--generator", "mar", "--attention", "causal", "--n_buffer", "4"], "no encoder and no buffer"),
    (["--joint", "--generator", "maskgit"], "needs --generator ar"),
    (["--mix", "full", "--n_mix", "4"], "--mix full is one Gaussian"),
    (["--size", "gpt-b", "--generator", "maskgit"], "--generator maskgit has tiny, small"),
])
def test_train_refuses_in_one_sentence(words, sentence, tmp_path, capsys):
    base = ["--tokenizer", "vae", "--head", "gmm", "--runs", str(tmp_path), "--n_shapes", "50"]
    with pytest.raises(SystemExit) as caught:
        train.main(base + words)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("ckpt.pt"))


def test_refusals_end_with_an_exit_code_and_no_traceback(tiny_run, tmp_path):
    folder = tiny_run / "shapes-vae-ar-gmm"
    for words, sentence in [(["train.py", "--tokenizer", "vae", "--no_such_flag"], "unrecognized arguments"),
                            (["train.py", *TINY, "--runs", tiny_run, "--beta", "0.5"], "--beta 0.5 does not fit .* --beta 0.02"),
                            (["sample.py", folder, "--class", "heart"], "the classes are disc"),
                            (["sample.py", tmp_path], "no ckpt.pt"),
                            (["sample.py", tiny_run / "shapes-vae"], "a tokenizer alone cannot draw"),
                            (["evaluate.py", folder, "--n", 3], "--n 3")]:
        out = call(*words, code=1)
        assert re.search(sentence, out) and "Traceback" not in out, out


def test_an_unfinished_run_is_not_overwritten_by_accident(tiny_run, tmp_path):
    folder = tmp_path / "shapes-vae"
    folder.mkdir()
    state = train.read_checkpoint(tiny_run / "shapes-vae")
    torch.save(state | {"done": False, "step": 12}, folder / "ckpt.pt")
    with pytest.raises(SystemExit, match="--resume.*--overwrite"):
        train.main([*TINY, "--runs", str(tmp_path)])
    assert train.read_checkpoint(folder)["step"] == 12
    (folder / "ckpt.pt").write_bytes(b"half a file")
    with pytest.raises(SystemExit, match="not a readable checkpoint"):
        train.main([*TINY, "--runs", str(tmp_path)])


def test_the_token_cache_is_remade_when_the_tokenizer_changes(tmp_path):
    images = data.load(n_shapes=60)
    tokenizer = vae.VAE().eval()
    first = train.token_cache(tokenizer, images, tmp_path, "train", True)
    stamp = (tmp_path / "tokens-train.pt").stat().st_mtime_ns
    train.token_cache(tokenizer, images, tmp_path, "train", True)
    assert (tmp_path / "tokens-train.pt").stat().st_mtime_ns == stamp, "an unchanged tokenizer reads the cache"
    with torch.no_grad():
        tokenizer.quant_conv.bias += 1
    second = train.token_cache(tokenizer, images, tmp_path, "train", True)
    assert torch.allclose(second.arrays["mean"], first.arrays["mean"] + 1, atol=1e-4)
    images.flip = True
    flipped = train.token_cache(tokenizer, images, tmp_path, "train", True)
    mean = tokenizer.posterior(images.images.float().flip(-1) / 127.5 - 1)[0]
    assert len(flipped.arrays["mean"]) == 120 and torch.allclose(flipped.arrays["mean"][60:], mean, atol=1e-4)
    assert flipped.batch(torch.arange(60))[0].shape == (60, 16, 8)
    a, b = (first.batch(torch.arange(4))[0] for _ in range(2))
    assert not torch.equal(a, b), "every batch draws fresh tokens from the posterior"


def test_learning_rate_rises_then_falls_to_zero():
    rates = [train.learning_rate(s, 100, 10, 2.0) for s in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(max(rates), rel=0.05) and rates[-1] < 1e-2
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))


# ---------------------------------------------------------------------------------------------------
# The house rules

def tree_of(name):
    return ast.parse((ROOT / f"{name}.py").read_text())


@pytest.mark.parametrize("name", MODELS)
def test_model_files_stand_alone(name):
    tree, doc = tree_of(name), ast.get_docstring(tree_of(name))
    top = {(a.name if isinstance(n, ast.Import) else n.module).split(".")[0]
           for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    assert top <= {"torch", "numpy"} | sys.stdlib_module_names, top
    assert f"python {name}.py" in doc and "Shapes:" in doc and "Try it yourself" in doc and doc.count("\n") < 26


def test_same_name_means_same_code():
    seen = {}
    for name in MODELS:
        for node in tree_of(name).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name != "main":
                other, code = seen.setdefault(node.name, (name, ast.dump(node)))
                assert code == ast.dump(node), f"{node.name} differs between {other}.py and {name}.py"


@pytest.mark.parametrize("name", PROGRAMS + ["data"])
def test_every_flag_is_explained_and_read(name):
    source = (ROOT / f"{name}.py").read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            flag = node.args[0].value.lstrip("-")
            options = {k.arg: k.value for k in node.keywords}
            assert "help" in options, f"{name}.py --{flag} has no help"
            dest = options["dest"].value if "dest" in options else flag
            read = rf"(args|given|args_io|flags)\.{dest}\b|[\"']{dest}[\"'][,)\]]"
            assert len(re.findall(read, source)) >= 1, f"{name}.py parses --{flag} and never reads it"


def test_weights_are_loaded_without_running_code():
    for path in ROOT.glob("*.py"):
        for call_ in re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", path.read_text()):
            assert "weights_only=True" in call_ or path.name == "test_all.py", (path.name, call_)
