"""
The tests: every formula against something independent (the authors' own arrays in golden/, a closed form,
torch.distributions, a slow loop, an inverse, the uncached path), and the programs as a user runs them.

    python -m pytest test_all.py          # about 6 minutes on 2 CPU cores; no network, no GPU

Some of them are homework. They blank a function, and grade what students write in its place:

    python test_all.py list                          # points, function, test
    python test_all.py handout gmm_head -o hw1       # hw1/: the project with gmm_head.py's exercise bodies blanked
    python test_all.py grade gmm_head alice bob ...  # folders holding gmm_head.py -> a table each, grades.csv; see --help
"""
import argparse
import ast
import compileall
import contextlib
import copy
import csv
import functools
import io
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import distributions as D

import ar_transformer
import compression
import data
import diffusion_head
import evaluate
import flow_adapter
import gmm_head
import lfq
import mar
import maskgit
import perceptual_gan
import sample
import titok
import train
import vae
import vq

ROOT = Path(__file__).resolve().parent
MODELS = [p for p in ("vae vq lfq titok perceptual_gan flow_adapter gmm_head diffusion_head ar_transformer maskgit "
                      "mar").split() if (ROOT / f"{p}.py").exists()]
PROGRAMS = ["train", "sample", "evaluate", "compression"]


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
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(train, "VALIDATED", 200)            # 2,000 images take a third of a tiny run's time


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
# perceptual_gan.py

def official_critic(g):
    critic = perceptual_gan.PatchCritic(ndf=8)
    critic.load_state_dict({k[2:]: v for k, v in g.items() if k.startswith("w/")})
    return critic


def test_critic_and_its_losses_are_the_authors():
    g = golden("llamagen/patchgan")
    critic = official_critic(g)
    real, fake = critic(g["in/real"]), critic(g["in/fake"])                                 # each with its own statistics
    close(real, g["out/logits_real_train"]), close(fake, g["out/logits_fake_train"])
    for key, value in critic.state_dict().items():
        if "running" in key:
            close(value, g[f"after/{key}"])
    close(critic.eval()(g["in/real"]), g["out/logits_real_eval"])
    close(perceptual_gan.critic_loss(real, fake), g["out/hinge_d_loss"], 1e-5)
    close(perceptual_gan.critic_loss(real, fake, "non-saturating"), g["out/vanilla_d_loss"], 1e-5)
    close(perceptual_gan.generator_loss(fake), g["out/hinge_gen_loss"], 1e-5)


@pytest.mark.parametrize("n_layers, sees", [(1, 16), (2, 34), (3, 70)])
def test_critic_sees_patches_of_the_stated_size(n_layers, sees):
    image = torch.randn(1, 3, 96, 96, requires_grad=True)
    logits = perceptual_gan.PatchCritic(4, n_layers).eval()(image)
    middle = logits.shape[-1] // 2
    gradient, = torch.autograd.grad(logits[0, 0, middle, middle], image)
    seen = gradient.abs().sum((0, 1))
    assert (seen.sum(0) > 0).sum() == (seen.sum(1) > 0).sum() == sees


def test_critic_of_the_papers_has_its_parameter_count_and_start():
    critic = perceptual_gan.PatchCritic.for_images(256)
    assert sum(p.numel() for p in critic.parameters()) == 2_765_633
    assert critic.main[-1].out_channels == 1 and critic(torch.zeros(1, 3, 256, 256)).shape == (1, 1, 30, 30)
    assert abs(critic.main[8].weight.std() - 0.02) < 1e-3 and abs(critic.main[8].weight.mean()) < 1e-3
    assert abs(critic.main[9].weight.mean() - 1) < 5e-3 and abs(critic.main[9].weight.std() - 0.02) < 5e-3
    for side, params, logits in ((32, 35_489, 14), (64, 167_841, 14), (128, 2_765_633, 14)):
        critic = perceptual_gan.PatchCritic.for_images(side)
        assert sum(p.numel() for p in critic.parameters()) == params
        assert critic(torch.zeros(1, 3, side, side)).shape == (1, 1, logits, logits)


def test_adversarial_losses_in_closed_form():
    real, fake = torch.randn(4, 1, 3, 3) * 2, torch.randn(4, 1, 3, 3) * 2
    bce, one, zero = F.binary_cross_entropy_with_logits, torch.ones(4, 1, 3, 3), torch.zeros(4, 1, 3, 3)
    assert torch.allclose(perceptual_gan.critic_loss(real, fake, "non-saturating"), (bce(real, one) + bce(fake, zero)) / 2)
    assert torch.allclose(perceptual_gan.generator_loss(fake, "non-saturating"), bce(fake, one))
    hinge = [max(0, 1 - r) + max(0, 1 + f) for r, f in zip(real.flatten().tolist(), fake.flatten().tolist())]
    assert abs(perceptual_gan.critic_loss(real, fake) - sum(hinge) / len(hinge) / 2) < 1e-5
    assert perceptual_gan.critic_loss(real + 100, fake - 100) == 0 and perceptual_gan.generator_loss(fake) == -fake.mean()
    assert torch.isfinite(perceptual_gan.critic_loss(1e4 * real, 1e4 * fake, "non-saturating"))


def vgg_files(tmp_path, monkeypatch):
    """VGG16 and LPIPS's weights under their published names, a sixteenth as wide, with random numbers."""
    widths, vgg, lins, index, c = (4, 4, 8, 8, 8), {}, {}, 0, 3
    monkeypatch.setattr(perceptual_gan.LPIPS, "STAGES", tuple(zip(widths, (2, 2, 3, 3, 3))))
    for stage, (width, n) in enumerate(zip(widths, (2, 2, 3, 3, 3))):
        for _ in range(n):
            vgg[f"features.{index}.weight"] = torch.randn(width, c, 3, 3) * (2 / 9 / c) ** 0.5
            vgg[f"features.{index}.bias"] = 0.1 * torch.randn(width)
            index, c = index + 2, width
        index += 1                                          # a pool
        lins[f"lin{stage}.model.1.weight"] = torch.rand(1, width, 1, 1)
    vgg["classifier.0.weight"] = torch.randn(3, 3)
    torch.save(vgg, tmp_path / "vgg16.pth"), torch.save(lins, tmp_path / "lins.pth")
    return vgg, lins


def slow_lpips(vgg, lins, a, b):
    """The paper's equation 1 for one pair of images (3, H, W), position by position."""
    def features(x):
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x, maps = ((x.permute(1, 2, 0) - shift) / scale).permute(2, 0, 1)[None], []
        layers = "0 2 M 5 7 M 10 12 14 M 17 19 21 M 24 26 28".split()          # where torchvision's list has weights
        for i, layer in enumerate(layers):
            if layer == "M":
                x = F.max_pool2d(x, 2, 2)
            else:
                x = F.relu(F.conv2d(x, vgg[f"features.{layer}.weight"], vgg[f"features.{layer}.bias"], padding=1))
            if i + 1 == len(layers) or layers[i + 1] == "M":
                maps.append(x[0])
        return maps
    total = 0.0
    for stage, (f, g) in enumerate(zip(features(a), features(b), strict=True)):
        lin, (_, H, W) = lins[f"lin{stage}.model.1.weight"].flatten(), f.shape
        for y in range(H):
            for x in range(W):
                u, v = f[:, y, x], g[:, y, x]
                total += float((lin * (u / (u.norm() + 1e-10) - v / (v.norm() + 1e-10)) ** 2).sum()) / (H * W)
    return total


def test_lpips_equals_a_slow_loop_over_vgg16(tmp_path, monkeypatch):
    vgg, lins = vgg_files(tmp_path, monkeypatch)
    lpips = perceptual_gan.LPIPS.from_files(tmp_path / "vgg16.pth", tmp_path / "lins.pth")
    a, b = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        d = lpips(a, b)
        assert d.shape == (2,) and torch.equal(lpips(a, a), torch.zeros(2)) and torch.allclose(lpips(b, a), d)
        assert torch.equal(lpips.train()(a, b), d), "no dropout, whatever the mode"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert lpips(a, b).dtype == torch.float32
    for i in range(2):
        assert abs(d[i] - slow_lpips(vgg, lins, a[i], b[i])) < 1e-4 * d[i]
    with torch.device("meta"):
        monkeypatch.undo()
        full = perceptual_gan.LPIPS()
    assert sum(p.numel() for p in full.parameters()) == 14_714_688 + 1_472, "VGG16 without its classifier, and the lins"
    assert [full.features[i].out_channels for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)] == \
        [64, 64, 128, 128, 256, 256, 256] + 6 * [512]


def test_lpips_reads_whole_checkpoints_and_names_what_is_missing(tmp_path, monkeypatch):
    vgg, lins = vgg_files(tmp_path, monkeypatch)
    a, b = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    load = perceptual_gan.LPIPS.from_files
    vqgan = {f"loss.perceptual_loss.{k}": v for k, v in lins.items()} | {"encoder.conv_in.weight": torch.zeros(1)}
    vqgan |= {"loss.perceptual_loss.net.slice1." + k.removeprefix("features."): v for k, v in vgg.items() if k[0] == "f"}
    torch.save({"state_dict": vqgan}, tmp_path / "vqgan.ckpt")
    reference = load(tmp_path / "vgg16.pth", tmp_path / "lins.pth")(a, b)
    assert torch.equal(load(tmp_path / "vqgan.ckpt")(a, b), reference)
    with pytest.raises(ValueError, match="vgg16-397923af.pth"):
        load(tmp_path / "lins.pth")
    with pytest.raises(ValueError, match="lins_path"):
        load(tmp_path / "vgg16.pth")
    torch.save(vgg | {"features.1.weight": torch.ones(4)}, tmp_path / "vgg16_bn.pth")
    with pytest.raises(ValueError, match=r"unknown \['features.1.weight'\]"):
        load(tmp_path / "vgg16_bn.pth", tmp_path / "lins.pth")
    torch.save({k: v for k, v in lins.items() if "lin3" not in k}, tmp_path / "four.pth")
    with pytest.raises(ValueError, match=r"missing \['lins.3.weight'\]"):
        load(tmp_path / "vgg16.pth", tmp_path / "four.pth")


def test_classifier_features_compare_directions_and_survive_dead_units():
    net = evaluate.SmallCNN(10).eval().stages
    distance = perceptual_gan.ClassifierFeatures(net)
    a, b = torch.rand(2, 3, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        maps = [[x] for x in (a, b)]
        for layer in net:
            maps = [m + [layer(m[-1])] for m in maps]
        slow = [1 - F.cosine_similarity(maps[0][i], maps[1][i], dim=1) for i in (3, 6, 9, 12)]      # after each ReLU
        # |u - v|^2 = 2 - 2 cos(u, v) for unit vectors; of two zeros the distance is 0, and of one it is 1
        zeros = [[m[i].norm(dim=1) == 0 for m in maps] for i in (3, 6, 9, 12)]
        slow = [torch.where(p & q, 0.0, torch.where(p | q, 1.0, 2 * d)) for d, (p, q) in zip(slow, zeros)]
        assert torch.allclose(distance(a, b), sum(d.mean((1, 2)) for d in slow) / 4, atol=1e-4)
        assert torch.equal(distance(a, a), torch.zeros(3))

    class Maps(nn.Module):
        def forward(self, x):
            return [F.relu(x), F.relu(-x)]
    x = torch.zeros(2, 3, 4, 4, requires_grad=True)
    d = perceptual_gan.ClassifierFeatures(Maps())(x, torch.ones(2, 3, 4, 4))
    d.sum().backward()
    assert torch.allclose(d, torch.tensor(0.5)) and torch.equal(x.grad, torch.zeros_like(x)), "1 and 0 by the two maps"
    x.grad = None
    perceptual_gan.unit_channels(x).sum().backward()
    assert torch.isfinite(x.grad).all(), "a norm has no gradient at 0"
    with pytest.raises(ValueError, match="activation"):
        perceptual_gan.ClassifierFeatures(nn.Sequential(nn.Conv2d(3, 4, 1)))


class MeanDifference(nn.Module):
    def forward(self, a, b):
        return (a - b).abs().mean((1, 2, 3))


class OneLayer(nn.Module):
    """A tokenizer of which the reconstruction is one convolution of fixed features."""
    seq_len, grid, token_dim, vocab_size = 4, (2, 2), 1, None

    def __init__(self, features, weight, auxiliary=0.0):
        super().__init__()
        self.features, self.weight, self.auxiliary = features, nn.Parameter(weight.clone()), torch.tensor(auxiliary)

    def reconstruct(self, images):
        return F.conv2d(self.features, self.weight, padding=self.weight.shape[-1] // 2), self.auxiliary, {}


@pytest.mark.parametrize("adaptive", [0, 1])
@pytest.mark.parametrize("step", [9, 10])
def test_adversarial_loss_is_the_authors_in_every_term(adaptive, step):
    g = golden("llamagen/vq_total_loss")
    tokenizer = OneLayer(g["in/feat"], g["in/last_layer"], g["in/codebook_losses"].sum().item())
    model = perceptual_gan.AdversarialTokenizer(tokenizer, official_critic(g), MeanDifference(), start=10,
                                                adaptive=bool(adaptive), last_layer="weight")
    model.steps.fill_(step)
    loss, logs = model(g["in/real"])
    ours, theirs = loss - logs["critic"], g[f"out/gen_loss_ada{adaptive}_step{step}"]
    close(ours, theirs, 1e-5)
    assert abs(logs["critic"] - g[f"out/disc_loss_ada{adaptive}_step{step}"]) < 1e-5
    recon = tokenizer.reconstruct(None)[0]
    close(logs["recon"], F.mse_loss(recon, g["in/real"]), 1e-6)
    close(logs["perceptual"], (recon - g["in/real"]).abs().mean(), 1e-6)
    # What is left for the adversarial term is lambda * 0.5 * (adaptive weight) * -mean critic(x').
    rest = ours - logs["recon"] - logs["perceptual"] - tokenizer.auxiliary
    assert abs(rest - (step == 10) * 0.5 * logs.get("adaptive", 1.0) * logs["gan"]) < 1e-5
    assert model.steps == step + 1 and all(v.ndim == 0 and not v.requires_grad for v in logs.values())


def test_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer():
    model = perceptual_gan.AdversarialTokenizer(OneLayer(torch.ones(1, 1, 2, 2), torch.ones(3, 1, 1, 1)),
                                                adaptive=True, last_layer="weight")
    w = model.tokenizer.weight
    value = model.adaptive_weight((3 * w).sum() + 7, (w**2).sum())              # gradients (3, 3, 3) and (2, 2, 2)
    close(value, torch.tensor(27**0.5 / (12**0.5 + 1e-4)), 1e-6)
    assert not value.requires_grad
    close(model.adaptive_weight((3 * w).sum(), (0 * w).sum()), torch.tensor(1e4), 1e-6)
    with torch.no_grad():
        assert model.adaptive_weight(w.sum(), w.sum()) == 1e4, "validation takes the last one"
    vae_ = vae.VAE(image_size=16, ch_mult=(1, 2))
    model = perceptual_gan.AdversarialTokenizer(vae_, perceptual_gan.PatchCritic(4, 1), start=0, adaptive=True)
    assert model.tokenizer.get_parameter(model.last_layer) is vae_.decoder[-1].weight
    _, logs = model(torch.rand(2, 3, 16, 16))
    assert 0 < logs["adaptive"] == model.balance
    with pytest.raises(ValueError, match="last_layer"):
        perceptual_gan.AdversarialTokenizer(OneLayer(torch.ones(1), torch.ones(3, 1, 1, 1)), adaptive=True)


def adversarial(kind="vae", **options):
    torch.manual_seed(0)
    sizes = dict(image_size=16, ch_mult=(1, 2), ch=8)
    tokenizer = vae.VAE(beta=0, **sizes) if kind == "vae" else vq.VQ(vocab_size=16, code_dim=4, **sizes)
    with torch.no_grad():                                   # blocks that start as the identity would have no gradient
        [p.add_(0.05 * torch.randn_like(p)) for p in tokenizer.parameters()]
    options = dict(start=0, perceptual=perceptual_gan.ClassifierFeatures(evaluate.SmallCNN(10).stages)) | options
    return perceptual_gan.AdversarialTokenizer(tokenizer, perceptual_gan.PatchCritic(4, 2), **options)


@pytest.mark.parametrize("gan", ["hinge", "non-saturating"])
def test_one_backward_pass_gives_each_network_its_own_gradient(gan):
    model, images = adversarial(gan=gan), data.draw(torch.arange(4), 16)[0]
    model(images)[0].backward()
    tokenizer, critic = model.tokenizer, model.critic
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    recon, auxiliary, _ = tokenizer.reconstruct(images)
    gan_term = -critic(recon).mean() if gan == "hinge" else -F.logsigmoid(critic(recon)).mean()
    (F.mse_loss(recon, images) + model.perceptual(recon, images).mean() + 0.5 * gan_term).backward()
    theirs = {n: p.grad.clone() for n, p in model.named_parameters() if n.startswith("tokenizer.")}
    model.zero_grad()
    real, fake = critic(images), critic(recon.detach())
    losses = (F.relu(1 - real), F.relu(1 + fake)) if gan == "hinge" else (-F.logsigmoid(real), -F.logsigmoid(-fake))
    (0.5 * 0.5 * sum(v.mean() for v in losses)).backward()
    theirs |= {n: p.grad.clone() for n, p in model.named_parameters() if n.startswith("critic.")}
    none = [n for n, v in ours.items() if v.abs().max() == 0]
    assert none == (["critic.main.8.bias"] if gan == "hinge" else []), "inside both margins the hinges pull it equally hard"
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=1e-6, rtol=1e-4), name


def test_one_optimiser_follows_llamagens_two():
    images = data.draw(torch.arange(12), 16)[0].split(4)
    one, two = adversarial(perceptual=None), adversarial(perceptual=None)
    opt = torch.optim.Adam(one.parameters(), lr=1e-3)
    for x in images:
        opt.zero_grad(), one(x)[0].backward(), opt.step()
    side = [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (two.tokenizer, two.critic)]
    for x in images:                                        # their loop: a step of the tokenizer, then one of the critic on
        recon = two.tokenizer.reconstruct(x)[0]             # the reconstruction made before it
        side[0].zero_grad()
        (F.mse_loss(recon, x) - 0.5 * two.critic(recon).mean()).backward()
        side[0].step(), side[1].zero_grad()
        real, fake = two.critic(x), two.critic(recon.detach())
        (0.25 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())).backward()
        side[1].step()
    for name, value in two.state_dict().items():
        if name != "steps":                                 # batch norm's running statistics agree as well
            assert torch.allclose(one.state_dict()[name], value, atol=1e-5), name


def test_before_start_the_critic_has_no_say_and_learns_nothing():
    images = data.draw(torch.arange(4), 16)[0]
    model, alone = adversarial(start=2), adversarial()
    alone.critic = None
    alone(images)[0].backward()
    for step in range(3):
        model.zero_grad()
        loss, logs = model(images)
        loss.backward()
        gradients = [(p.grad - q.grad).abs().max() for p, q in zip(model.tokenizer.parameters(), alone.tokenizer.parameters())]
        pushed = max(p.grad.abs().max() for p in model.critic.parameters())
        assert (max(gradients) == 0) == (pushed == 0) == (logs["critic"] == 0) == (step < 2), step
    model.eval()(images)
    assert model.steps == 3, "validation is no training step"


def test_perceptual_network_is_frozen_and_stays_in_eval_mode():
    net = evaluate.SmallCNN(10).stages
    model = adversarial(perceptual=perceptual_gan.ClassifierFeatures(nn.Sequential(*net, nn.Dropout(0.5), nn.ReLU())))
    before, images = {k: v.clone() for k, v in net.state_dict().items()}, torch.rand(4, 3, 16, 16)
    distance = model.perceptual(images, -images)
    model.train()(images)[0].backward()
    assert model.training and model.critic.training and not any(m.training for m in model.perceptual.modules())
    assert torch.equal(model.perceptual(images, -images), distance), "no batch statistics, no dropout, no drift"
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and len(list(net.parameters())) == 12
    assert all(n.split(".")[0] in ("tokenizer", "critic") for n, _ in model.named_parameters())
    assert {k.split(".")[0] for k in model.state_dict()} == {"tokenizer", "critic", "steps", "balance"}
    assert all(b.dtype == torch.float64 for b in model.double().perceptual.buffers() if b.is_floating_point())
    shared = copy.deepcopy(model)                           # as torch's weight averaging does
    shared.load_state_dict(model.state_dict())


@pytest.mark.parametrize("kind", ["vae", "vq"])
def test_adversarial_tokenizer_keeps_the_contract_of_a_tokenizer(kind, tmp_path):
    model, images = adversarial(kind), data.draw(torch.arange(4), 16)[0]
    assert all(getattr(model, n) == getattr(model.tokenizer, n) for n in ("seq_len", "grid", "token_dim", "vocab_size"))
    loss, logs = model(images, torch.zeros(4, dtype=torch.long))
    loss.backward()
    assert loss.ndim == 0 and all(v.ndim == 0 and not v.requires_grad for v in logs.values())
    assert {"recon", "perceptual", "gan", "critic", "critic_real", "critic_fake"} <= set(logs)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    tokens = model.eval().encode(images)
    assert tokens.shape[:2] == (4, model.seq_len) and model.decode(tokens).shape == images.shape
    with torch.no_grad():
        recon, auxiliary, _ = model.reconstruct(images)
        loss, logs = model(images)
    terms = F.mse_loss(recon, images) + auxiliary + logs["perceptual"] + 0.5 * logs["gan"] + logs["critic"]
    close(loss, terms, 1e-5)
    torch.save(model.tokenizer.state_dict(), tmp_path / "tokenizer.pt")
    other = adversarial(kind).tokenizer
    other.load_state_dict(torch.load(tmp_path / "tokenizer.pt", weights_only=True))
    assert torch.equal(other.eval().decode(tokens), model.decode(tokens))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(images)[0].dtype == torch.float32


def test_adversarial_tokenizer_takes_clips_and_grey_images():
    class Halve(nn.Module):
        seq_len, grid, token_dim, vocab_size = 1, (1,), 1, None

        def reconstruct(self, images):
            return 0.5 * images, images.new_zeros(()), {}
    torch.manual_seed(0)
    model = perceptual_gan.AdversarialTokenizer(Halve(), perceptual_gan.PatchCritic(4, 1), MeanDifference(), start=0)
    clips = torch.rand(2, 3, 5, 16, 16)
    frames = torch.stack([clips[b, :, f] for b in range(2) for f in range(5)])              # (10, 3, 16, 16)
    assert torch.equal(perceptual_gan.as_frames(clips), frames)
    (ours, logs), (theirs, _) = model(clips), model(frames)
    assert torch.allclose(ours, theirs, atol=1e-6)
    grey = perceptual_gan.AdversarialTokenizer(vae.VAE(image_size=16, ch_mult=(1, 2), channels=1, beta=0),
                                               perceptual_gan.PatchCritic(4, 1), start=0)
    colour = torch.tensor([0.3, -0.1, -0.2])[:, None, None]                                 # changes no average
    x = torch.rand(2, 3, 16, 16).mean(1, keepdim=True).expand(-1, 3, -1, -1)
    assert torch.allclose(grey(x)[0], grey(x + colour)[0], atol=1e-5)
    with pytest.raises(ValueError, match="use 'mse'"):
        perceptual_gan.AdversarialTokenizer(vae.VAE(likelihood="logistic"))
    with pytest.raises(ValueError, match="wasserstein"):
        perceptual_gan.AdversarialTokenizer(Halve(), gan="wasserstein")


def test_adversarial_training_step_is_one_graph():
    tokenizer = OneLayer(torch.randn(2, 4, 16, 16), torch.randn(3, 4, 1, 1))
    model = perceptual_gan.AdversarialTokenizer(tokenizer, perceptual_gan.PatchCritic(4, 1), MeanDifference(), start=1)
    compiled, images = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.rand(2, 3, 16, 16)
    losses = [compiled(images)[0] for _ in range(2)]        # the critic joins in at the second without a new graph
    assert model.steps == 2
    losses[1].backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.steps.zero_(), model.zero_grad()
    expected = [model(images)[0] for _ in range(2)]
    expected[1].backward()
    assert torch.allclose(torch.stack(losses), torch.stack(expected), atol=1e-5) and losses[0] != losses[1]
    assert all(torch.allclose(a, p.grad, atol=1e-5) for a, p in zip(ours, model.parameters()))


# ---------------------------------------------------------------------------------------------------
# lfq.py

def magvit_shapes(ch, ch_mult, n_res, bits, video):
    """Names and shapes of Open-MAGVIT2's tokenizer, spelt out: the part's name, the name inside the part, the shape."""
    taps = (3,) if video else ()
    names = []

    def conv(part, name, c_in, c_out, k=3, bias=False):
        inner = name + (".conv_1" if video else "")
        names.append((part, f"{inner}.weight", (c_out, c_in, *([k] if taps else []), k, k)))
        names.extend([(part, f"{inner}.bias", (c_out,))] if bias else [])

    def norm(part, name, c):
        names.extend((part, f"{name}.{w}", (c,)) for w in ("weight", "bias"))

    def block(part, name, c_in, c_out):
        norm(part, f"{name}.norm1", c_in), norm(part, f"{name}.norm2", c_out)
        conv(part, f"{name}.conv1", c_in, c_out), conv(part, f"{name}.conv2", c_out, c_out)
        if c_in != c_out:
            conv(part, f"{name}.nin_shortcut", c_in, c_out, 1)

    widths, low = [ch * m for m in ch_mult], ch * ch_mult[-1]
    conv("encoder", "conv_in", 3, ch)
    for i, width in enumerate(widths):
        for j in range(n_res):
            block("encoder", f"down.{i}.block.{j}", width if j else ([ch] + widths)[i], width)
            block("decoder", f"up.{i}.block.{j}", width if j else (widths + [low])[i + 1], width)
        for w in ("gamma", "beta"):
            names.append(("decoder", f"adaptive.{i}.{w}.weight", ((widths + [low])[i + 1], bits)))
            names.append(("decoder", f"adaptive.{i}.{w}.bias", ((widths + [low])[i + 1],)))
        if i < len(widths) - 1:
            conv("encoder", f"down.{i}.downsample", width, width, bias=True)
        if i > 0:
            frames = 2 if video and ch_mult[i - 1] > 1 else 1
            conv("decoder", f"up.{i}.upsample.conv1", width, 4 * frames * width, bias=True)
    for part in ("encoder", "decoder"):
        for j in range(n_res):
            block(part, f"mid_block.{j}", low, low)
        norm(part, "norm_out", low if part == "encoder" else ch)
    conv("encoder", "conv_out", low, bits, 1, bias=True)
    conv("decoder", "conv_in", bits, low, bias=True), conv("decoder", "conv_out", ch, 3, bias=True)
    return names


def magvit_weights(ch_mult, video):
    """The weights behind golden/tokenizers/*_tokenizer_tiny.npz, by the recipe in the README there."""
    sd = {}
    for part, name, shape in magvit_shapes(32, ch_mult, 1, 6, video):
        w = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32) * np.float32(0.05)
        sd[f"{part}.{name}"] = torch.from_numpy(w + (w.ndim == 1 and name.endswith("weight")))
    return sd


def k_way(z, tau):
    """Both entropies by the definition, over all codes: z (N, bits) float64."""
    bits = z.shape[1]
    all_codes = torch.tensor([[1.0 if c >> i & 1 else -1.0 for i in range(bits)] for c in range(1 << bits)]).to(z)
    p = (-(z[:, None] - all_codes).square().sum(-1) / tau).softmax(-1)                      # the distance, not z.c
    return torch.special.entr(p).sum(-1).mean(), torch.special.entr(p.mean(0)).sum()


@pytest.mark.parametrize("bits", [8, 10])
def test_lfq_signs_ids_and_losses_are_the_authors(bits):
    g = golden(f"tokenizers/lfq_d{bits}")
    for s in ("s0", "s1", "s2"):
        z = g[f"{s}_z"].clone().requires_grad_()
        q, ids = lfq.quantize(z)
        assert torch.equal(q, g[f"{s}_om_quantized"]) and torch.equal(q, g[f"{s}_vqt_t100_quantized"])
        assert torch.equal(ids, g[f"{s}_om_indices"]) and ids[0, 0] == 0, "a z of 0 is -1 everywhere"
        assert torch.equal(lfq.quantize(z.flip(-1))[1], g[f"{s}_vqt_t100_indices"]), "they read the bits the other way round"
        assert torch.equal(lfq.codes(ids, bits), q)
        assert torch.equal(torch.autograd.grad((q * g["proj"]).sum(), z)[0], g[f"{s}_om_grad_st"]), "straight through"
        close((z - q.detach()).square().mean(), g[f"{s}_om_commitment"], 1e-6)
        for name, tau in (("om", 0.01), ("vqt_t100", 0.01), ("vqt_t10", 0.1)):
            per_sample, batch = lfq.entropy_penalty(z, tau)
            grads = [torch.autograd.grad(v, z)[0] for v in (per_sample, batch)]
            rough = name == "om"                            # 1e-5 inside the logarithm; vqt's clamp is off per token only
            close(per_sample, g[f"{s}_{name}_per_sample_entropy"], 2e-4)
            close(grads[0], g[f"{s}_{name}_grad_per_sample"], 3e-3)
            close(batch, g[f"{s}_{name}_batch_entropy"], 3e-3 if rough else 1e-6)
            close(grads[1], g[f"{s}_{name}_grad_batch"], 2e-2 if rough else 2e-4)
        exact = g[f"{s}_exact_per_sample"].item(), g[f"{s}_exact_batch"].item()            # no epsilon, in float64
        assert [v.item() for v in lfq.entropy_penalty(z, 0.01)] == pytest.approx(exact, rel=1e-6)
        for size in (1, 2, 5) if bits == 10 else (1, 2, 4):
            grouped = lfq.entropy_penalty(z, 0.01, groups=bits // size)[1]
            assert grouped >= exact[1] - 1e-6, "an upper bound"
            if f"{s}_exact_batch_grouped_g{size}" in g:
                assert grouped.item() == pytest.approx(g[f"{s}_exact_batch_grouped_g{size}"].item(), rel=1e-6)
    if bits == 10:
        assert torch.equal(lfq.codes(g["s2_om_pre_4_6"], 4), q[..., :4]), "the first channels are the low bits"
        assert torch.equal(lfq.codes(g["s2_om_post_4_6"], 6), q[..., 4:])


@pytest.mark.parametrize("scale, tau", [(0.02, 0.01), (0.3, 0.1), (1.0, 1.0)])
def test_lfq_entropy_penalty_and_gradient_equal_the_sum_over_all_codes(scale, tau):
    z = (scale * torch.randn(24, 10)).requires_grad_()
    exact = z.detach().double().requires_grad_()
    for ours, reference in zip(lfq.entropy_penalty(z, tau), k_way(exact, tau)):
        close(ours, reference, 1e-6)
        close(torch.autograd.grad(ours, z, retain_graph=True)[0],
              torch.autograd.grad(reference, exact, retain_graph=True)[0], 2e-5)
    odd = 0.02 * torch.randn(5, 3, 7)
    close(torch.stack(lfq.entropy_penalty(odd)), torch.stack(k_way(odd.flatten(0, 1).double(), 0.01)), 1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lfq.entropy_penalty(z, tau)[1], lfq.entropy_penalty(z.detach(), tau)[1]), "float32 there too"
    with pytest.raises(ValueError, match="10 bits cannot be cut into 3"):
        lfq.entropy_penalty(z, groups=3)


def test_lfq_entropy_penalty_has_no_trouble_with_certainty_or_with_rare_codes():
    z = lfq.codes(torch.tensor([0, 0, 5, 1023]), 10).requires_grad_()                       # p is 0 or 1 in float32
    per_sample, batch = lfq.entropy_penalty(z)
    assert per_sample == 0 and abs(batch - 1.5 * math.log(2)) < 1e-6
    (per_sample - batch).backward()
    assert torch.isfinite(z.grad).all()
    z = torch.zeros(64, 18, requires_grad=True)                                             # each code has 2^-18 < 1e-5
    assert [v.item() for v in lfq.entropy_penalty(z)] == pytest.approx([18 * math.log(2)] * 2, rel=1e-6)


def test_lfq_needs_no_table_of_all_codes():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for v in out if isinstance(out, (tuple, list)) else [out]:
                self.numel = max(self.numel, v.numel() if isinstance(v, torch.Tensor) else 0)
            return out

    z = (0.02 * torch.randn(4, 1024, 18)).requires_grad_()
    with Largest() as largest:
        per_sample, batch = lfq.entropy_penalty(z)
        (per_sample - batch).backward()
    assert largest.numel <= 4096 * 512, "N x 2^(bits / 2), not N x 2^bits"
    assert 8 < batch < 18 * math.log(2) and torch.isfinite(z.grad).all() and z.grad.abs().max() > 0


def test_lfq_batch_entropy_is_over_all_processes(monkeypatch):
    z, seen = 0.02 * torch.randn(2, 30, 6), []
    both = z.flatten(0, 1).clone().requires_grad_()
    reference = lfq.entropy_penalty(both)[1]
    expected, = torch.autograd.grad(reference, both)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: seen.append(t.clone()))
    for part in z:
        lfq.entropy_penalty(part.clone().requires_grad_())
    total = seen[0] + seen[1]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.copy_(total))
    for part, share in zip(z, expected.view_as(z)):
        part = part.clone().requires_grad_()
        batch = lfq.entropy_penalty(part)[1]
        close(batch, reference, 1e-6)
        close(torch.autograd.grad(batch, part)[0] / 2, share, 1e-5)                         # DDP takes the mean over two
    with torch.no_grad():
        assert lfq.entropy_penalty(z[0])[1] < 0.99 * reference, "a process that validates alone does not wait for others"


def test_lfq_causal_convolution_and_depth_to_space_are_the_authors():
    g = golden("tokenizers/causal_conv3d")
    for tag, weight, bias in (("stride111", g["w"], g["b"]), ("stride122", g["w"], g["b"]), ("stride222", g["w"], g["b"]),
                              ("k111", g["w1x1"], None), ("k533", g["w5"], None)):
        stride = tuple(map(int, tag[-3:])) if tag.startswith("s") else (1, 1, 1)
        conv = lfq.CausalConv(2, 4, tuple(weight.shape[2:]), stride, bias=bias is not None)
        conv.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        with torch.no_grad():
            close(conv(g["x"]), g[f"om_y_{tag}"], 1e-5)
            close(conv(g["x"][:, :, :1]), g[f"om_y_{tag}"][:, :, :1], 1e-5)                 # one frame: by the 2-D shortcut
    up = lfq.CausalUpsample(2, (3, 3, 3), 2)
    up.load_state_dict({"weight": g["up_w"], "bias": g["up_b"]})
    with torch.no_grad():
        for f in (1, 2, 3):
            close(up(g["x"][:, :, :f]), g[f"up_y_T{f}"], 1e-5)
    norm = lfq.AdaptiveNorm(64, 3, 32, per_frame=False)
    norm.load_state_dict({k[4:]: g[k] for k in g if k[:9] in ("agn_gamma", "agn_beta.")})
    with torch.no_grad():
        close(norm(g["agn_x"], g["agn_z"]), g["agn_y"], 1e-5)
        norm.per_frame = True
        close(norm(g["agn_x"], g["agn_z"])[:, :, 0], g["agn2d_y"], 1e-5)
        fast = g["agn_x"][:, :, [0, 1, 2, 0, 1, 2, 0, 1, 2]]                                # 9 frames to 3 of codes
        slow = [norm(fast[:, :, t:t + 1], g["agn_z"][:, :, f:f + 1]) for t, f in enumerate((0, 1, 1, 1, 1, 2, 2, 2, 2))]
        norm.time = 4
        close(norm(fast, g["agn_z"]), torch.cat(slow, dim=2), 1e-5)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_lfq_loads_official_weights_and_gets_the_authors_numbers(kind):
    video, g = kind == "video", golden(f"tokenizers/{kind}_tokenizer_tiny")
    sd = magvit_weights((1, 2, 2) if video else (1, 1, 2), video)
    ema = {"model_ema." + k.replace(".", ""): v for k, v in sd.items()} | {"model_ema.decay": torch.ones(())}
    ema |= {"loss.discriminator.main.0.weight": torch.ones(1), "quantize.mask": torch.ones(6)}
    stale = {k: v + 1 for k, v in sd.items()}
    model = lfq.LFQ.from_official({"state_dict": stale | ema}, image_size=16, frames=9 if video else None)
    assert model.grid == ((5, 4, 4) if video else (4, 4)) and model.vocab_size == 64 and not model.training
    z, q = tokens_of(g["z"].flatten(2)[..., None]), tokens_of(g["q"].flatten(2)[..., None])
    with torch.no_grad():
        close(model.latents(g[kind]), z), close(model.decode_raw(q), g["recon"])
    ids = model.encode(g[kind])
    assert torch.equal(lfq.codes(ids, 6), q)
    close(model.decode(ids), g["recon"].clamp(-1, 1))
    plain = lfq.LFQ.from_official(sd, image_size=16)
    assert torch.equal(plain.encode(g[kind]), ids), "without averaged weights: the plain ones"
    if video:
        frame = g["video"][:, :, 0]
        with torch.no_grad():
            close(model.latents(frame), tokens_of(g["z_image"].flatten(2)[..., None]))
        close(model.decode(model.encode(frame)), g["recon_image"][:, :, 0].clamp(-1, 1))
        for module in model.modules():
            if isinstance(module, lfq.FrameNorm):
                module.per_frame = True
        with torch.no_grad():
            close(model.latents(g["video"]), tokens_of(g["z_perframe_gn"].flatten(2)[..., None]))


def test_lfq_from_official_names_the_key_that_does_not_fit(tmp_path):
    sd = magvit_weights((1, 1, 2), video=False)
    torch.save({"state_dict": sd}, tmp_path / "imagenet.ckpt")
    assert lfq.LFQ.from_official(tmp_path / "imagenet.ckpt").seq_len == 64 * 64
    with pytest.raises(ValueError, match="decoder.extra.weight"):
        lfq.LFQ.from_official(sd | {"decoder.extra.weight": torch.zeros(1)})
    for key in ("decoder.adaptive.1.gamma.bias", "encoder.conv_in.weight", "decoder.up.2.upsample.conv1.weight"):
        with pytest.raises(ValueError, match=key):
            lfq.LFQ.from_official({k: v for k, v in sd.items() if k != key})
    ema = {"model_ema." + k.replace(".", ""): v for k, v in sd.items() if k != "encoder.conv_out.bias"}
    with pytest.raises(ValueError, match="model_ema.encoderconv_outbias"):
        lfq.LFQ.from_official(sd | ema)


def test_lfq_of_the_papers_has_its_parameter_count():
    count = lambda module: round(sum(p.numel() for p in module.parameters()) / 1e6, 1)
    for name, numbers, grid in (("f16", (115.1, 49.8, 65.4), (16, 16)), ("f8", (112.0, 48.4, 63.6), (16, 16)),
                                ("video", (370.5, 144.9, 225.7), (5, 16, 16))):
        with torch.device("meta"):
            model = lfq.LFQ(**lfq.SIZES[name])
        assert (count(model), count(model.encoder), count(model.decoder)) == numbers and model.grid == grid
        assert model.vocab_size == 262_144 and not list(model.quantizer.parameters())


@pytest.mark.parametrize("frames", [1, 5])
def test_lfq_keeps_the_contract_of_a_tokenizer(frames):
    model = lfq.LFQ(image_size=16, frames=frames, bits=6, n_res=1)
    images = data.draw(torch.arange(4), 16)[0] if frames == 1 else data.draw_clips(torch.arange(4), 16, 5)[0]
    assert model.token_dim is None and model.vocab_size == 64
    assert (model.grid, model.seq_len) == (((4, 4), 16) if frames == 1 else ((2, 4, 4), 32))
    loss, logs = model(images, torch.zeros(4, dtype=torch.long))
    loss.backward()
    assert loss.ndim == 0 and all(v.ndim == 0 and not v.requires_grad for v in logs.values())
    assert set(logs) == {"mse", "commit", "entropy_sample", "entropy_batch", "usage", "perplexity"}
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    expected = logs["mse"] + logs["commit"] + 0.02 * (logs["entropy_sample"] - logs["entropy_batch"])
    assert torch.allclose(loss, expected)
    ids = model.encode(images)
    assert ids.shape == (4, model.seq_len) and ids.dtype == torch.int64 and 0 <= ids.min() and ids.max() < 64
    p = torch.bincount(ids.flatten(), minlength=64) / ids.numel()
    assert torch.allclose(logs["usage"], (p > 0).float().mean())
    assert torch.allclose(logs["perplexity"], torch.special.entr(p).sum().exp())
    recon = model.decode(ids)
    assert recon.shape == images.shape and recon.abs().max() <= 1
    recon_, auxiliary, logs = model.eval().reconstruct(images)
    assert torch.allclose(model(images)[0], auxiliary + F.mse_loss(recon_, images))
    assert torch.allclose(recon, recon_.clamp(-1, 1), atol=1e-5), "the decoder sees signs only"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, _, loss, _ = model.quantizer(torch.randn(2, 16, 6).bfloat16())
    assert q.dtype == loss.dtype == torch.float32
    for wrong in (30, 4):
        with pytest.raises(ValueError, match="multiple of 4"):
            lfq.LFQ(image_size=wrong)


def test_lfq_sees_grey_images_and_label_maps():
    clip = data.draw_clips(torch.arange(2), 16, 5)[0].mean(1, keepdim=True).expand(-1, 3, -1, -1, -1)
    model = lfq.LFQ(image_size=16, frames=5, channels=1, n_res=1)
    for images in (clip, clip[:, :, 0]):
        recon = model.decode(model.encode(images))
        assert recon.shape == images.shape and torch.equal(recon[:, 0], recon[:, 2]) and model(images)[0].ndim == 0
    maps = F.one_hot(data.draw(torch.arange(4), 16)[2].long(), 11).permute(0, 3, 1, 2).float() * 2 - 1
    model = lfq.LFQ(image_size=16, channels=11, n_res=1)
    assert model.decode(model.encode(maps)).shape == maps.shape and model(maps)[0].ndim == 0


def trained_at_random(model):
    """All weights random: at the start the second half of each block is 0 and would hide mistakes."""
    for module in model.modules():
        if isinstance(module, (lfq.CausalConv, nn.Linear)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias)
    return model.eval()


def test_lfq_never_looks_ahead():
    model, clip = trained_at_random(lfq.LFQ(image_size=16, frames=17, n_res=1)), torch.rand(1, 3, 17, 16, 16) * 2 - 1
    with torch.no_grad():
        z = model.latents(clip).unflatten(1, model.grid)                                    # (1, 5, 4, 4, bits)
        assert model.grid == (5, 4, 4)
        for t in (1, 4, 5, 16):                             # tokens f hold frames 4f - 3 .. 4f
            changed = clip.clone()
            changed[:, :, t] = -changed[:, :, t]
            moved = (model.latents(changed).unflatten(1, model.grid) - z).abs().amax((0, 2, 3, 4)) > 1e-6
            assert moved.tolist() == [f >= (t + 3) // 4 for f in range(5)], t
        alone = model.latents(clip[:, :, 0])
        assert (alone - z[:, 0].flatten(1, 2)).abs().max() < 1e-6 * z.abs().max(), "an image is a clip of one frame"
        assert torch.equal(alone, model.latents(clip[:, :, :1]))
        shorter = model.latents(clip[:, :, :9]).unflatten(1, (3, 4, 4))
        assert torch.allclose(shorter, z[:, :3], atol=1e-5)
        q = lfq.quantize(z.flatten(1, 3))[0]
        whole = model.decode_raw(q)
        assert whole.shape == clip.shape
        for f in (1, 2, 3):                                 # tokens 0 .. f - 1 -> frames 0 .. 4 (f - 1)
            part = model.decode_raw(q[:, :16 * f])
            part = part if part.ndim == 5 else part.unsqueeze(2)
            assert part.shape[2] == 4 * f - 3
            assert torch.allclose(part, whole[:, :, :4 * f - 3], atol=1e-4), "nor does the decoder"
        for module in model.modules():
            if isinstance(module, lfq.FrameNorm):
                module.per_frame = False
        moved = (model.latents(clip)[:, :16] - model.latents(clip[:, :, :1])).abs().max()
        assert moved > 1e-2, "that is why norms are per frame"


def test_lfq_counts_frames_and_refuses_what_does_not_fit():
    video, image = (lfq.LFQ(image_size=8, frames=f, ch=8, n_res=1) for f in (17, 1))
    assert [video.latent_frames(f) for f in (1, 5, 9, 17)] == [1, 2, 3, 5] and video.seq_len == 5 * 4
    for f in (1, 5, 17):
        clip = torch.zeros(1, 3, f, 8, 8)
        ids = video.encode(clip)
        assert ids.shape == (1, 4 * video.latent_frames(f)) and video.reconstruct(clip)[0].shape == clip.shape
        assert video.decode(ids).shape == (clip.shape if f > 1 else (1, 3, 8, 8))
    for f, sentence in ((18, "18 frames .* 17 or 21"), (16, "16 frames .* 13 or 17"), (2, "1 or 5")):
        with pytest.raises(ValueError, match=sentence):
            video.encode(torch.zeros(1, 3, f, 8, 8))
        with pytest.raises(ValueError, match=sentence):
            lfq.LFQ(frames=f)
    clip = torch.rand(2, 3, 4, 8, 8)                        # an image tokenizer takes any clip, frame by frame
    ids = image.encode(clip).view(2, 4, 4)
    assert all(torch.equal(ids[:, t], image.encode(clip[:, :, t])) for t in range(4))
    assert image.decode(ids.flatten(1)).shape == clip.shape


def test_lfq_inflated_is_the_image_tokenizer():
    image, pictures = trained_at_random(lfq.LFQ(image_size=16, n_res=1)), torch.rand(3, 3, 16, 16) * 2 - 1
    video = lfq.LFQ(image_size=16, frames=9, n_res=1).eval().inflate(image.state_dict())
    with torch.no_grad():
        z = image.latents(pictures)
        close(video.latents(pictures), z, 1e-6)
        close(video.latents(pictures.unsqueeze(2).expand(-1, -1, 9, -1, -1)), z.repeat(1, 3, 1), 1e-5)     # standing still
        ids = image.encode(pictures)
        close(video.decode(ids), image.decode(ids), 1e-5)
        still = video.decode(ids.repeat(1, 3))
        close(still, image.decode(ids).unsqueeze(2).expand_as(still), 1e-5)
    with pytest.raises(ValueError, match="same sizes"):
        lfq.LFQ(image_size=16, frames=9, n_res=2).inflate(image.state_dict())


def test_lfq_gives_an_image_the_price_of_two_dimensions():
    from torch.utils.flop_counter import FlopCounterMode
    flops = []
    for frames in (1, 9):
        model = lfq.LFQ(image_size=16, frames=frames, n_res=1)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.reconstruct(torch.zeros(2, 3, 16, 16))
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 1e6, "the taps of time that meet nothing but padding are skipped"


def test_lfq_learns_and_uses_its_words():
    images = data.draw(torch.arange(64), 16)[0]
    torch.manual_seed(0)
    usage, losses = {}, []
    for weight in (0.02, 0.0):
        model = lfq.LFQ(image_size=16, bits=8, n_res=1, ch_mult=(1, 2), entropy=weight)
        opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(20):
            loss, logs = model(images[torch.randint(64, (8,))])
            opt.zero_grad(), loss.backward(), opt.step()
            losses.append(logs["mse"].item())
        usage[weight] = (model.quantizer.count(model.eval().encode(images)) > 0).float().mean().item()
    assert losses[19] < 0.5 * losses[0], f"squared error {losses[0]:.3f} to {losses[19]:.3f}"
    assert usage[0.02] > 1.5 * usage[0.0] and usage[0.02] > 0.5, usage


# ---------------------------------------------------------------------------------------------------
# titok.py

def titok_golden(name, **options):
    """Arrays of golden/tokenizers/titok_<name>.npz, the authors' weights, the model made of them, images in [-1, 1]."""
    g = golden(f"tokenizers/titok_{name}")
    sd = {k.removeprefix("sd."): v for k, v in g.items() if k.startswith("sd.")}
    return g, sd, titok.TiTok.from_official(sd, n_head=4, **options), 2 * g["image"] - 1


@torch.no_grad()
def test_titok_first_stage_is_the_authors_with_its_legacy_reshape():
    g, sd, model, images = titok_golden("legacy_vq_stage1")
    assert (model.seq_len, model.grid, model.vocab_size, model.token_dim, model.stage) == (8, (8,), 64, None, "proxy")
    z = model.encoder(images)
    close(F.normalize(z, dim=-1), F.normalize(tokens_of(g["z"]), dim=-1)), close(z, tokens_of(g["z"]))
    q, ids, loss, logs = model.quantizer(z)
    close(q, tokens_of(g["z_quantized"])), close(loss, g["quantizer_loss"]), close(logs["commit"], g["commitment_loss"])
    assert torch.equal(ids, g["indices"][:, 0]) and torch.equal(model.encode(images), ids)
    close(model.decoder(q), tokens_of(g["decoded"]))
    model.proxy = argparse.Namespace(encode=lambda images: g["proxy_codes"])
    loss, logs = model(images)
    close(logs["proxy_nats"], g["stage1_ce"]), close(loss, g["stage1_ce"] + g["quantizer_loss"])
    model.encoder.legacy = False
    assert (model.encoder(images) - z).abs().max() > 0.1, "transposing is not what their weights are used to"


@torch.no_grad()
def test_titok_of_pixels_is_the_authors():
    g, sd, model, images = titok_golden("vq_pixels")
    assert (model.seq_len, model.vocab_size, model.stage, model.quantizer.l2_norm) == (8, 128, "pixels", False)
    z = model.encoder(images)
    q, ids, loss, logs = model.quantizer(z)
    close(z, tokens_of(g["z"])), close(q, tokens_of(g["z_quantized"])), close(loss, g["quantizer_loss"])
    assert torch.equal(model.encode(images), g["indices"][:, 0])
    close((model.decode_raw(q) + 1) / 2, g["decoded"])
    assert torch.allclose(model.decode(ids), (2 * g["decoded"] - 1).clamp(-1, 1), atol=1e-4)
    loss_, logs = model(images)
    close(logs["mse"], 4 * F.mse_loss(g["decoded"], g["image"]), 1e-4), close(loss_, logs["mse"] + loss)


@torch.no_grad()
def test_titok_vae_is_the_authors(monkeypatch):
    g, sd, model, images = titok_golden("vae")
    assert isinstance(model, titok.TiTokVAE) and (model.token_dim, model.vocab_size, model.seq_len) == (16, None, 8)
    mean, std = model.posterior(images)
    close(model.encoder(images), tokens_of(g["moments"])), close(mean, tokens_of(g["mean"]))
    close(std, tokens_of(g["logvar"]).mul(0.5).exp()), close(model.kl(mean, std), g["kl"])
    close((model.decode_raw(mean) + 1) / 2, g["decoded_mode"])
    monkeypatch.setattr(torch, "randn_like", lambda x: tokens_of(g["noise"]))
    close(model.reparameterise(mean, std), tokens_of(g["sample"]))
    recon, auxiliary, logs = model.reconstruct(images)
    close((recon + 1) / 2, g["decoded_sample"]), close(logs["kl"], g["kl"].mean())
    close(auxiliary, model.beta * g["kl"].sum(1).mean() / images[0].numel())


def maskgit_vqgan(levels=2, n_res=1, c=32, encoder=True):
    """MaskGIT's VQGAN in the authors' layout, with weights made by the golden file's recipe -> state dict."""
    import zlib
    def fill(part, shapes):
        for name, shape in shapes.items():
            w = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32) * 0.05
            sd[f"{part}.{name}"] = torch.from_numpy(w + float(len(shape) == 1 and name.endswith("weight")))
    def block(name, a, b):
        shapes = {f"{name}.norm1.weight": (a,), f"{name}.norm1.bias": (a,), f"{name}.conv1.weight": (b, a, 3, 3),
                  f"{name}.norm2.weight": (b,), f"{name}.norm2.bias": (b,), f"{name}.conv2.weight": (b, b, 3, 3)}
        return shapes | ({f"{name}.nin_shortcut.weight": (b, b, 1, 1)} if a != b else {})
    end = lambda c, out, k: {"norm_out.weight": (c,), "norm_out.bias": (c,), "conv_out.weight": (out, c, k, k), "conv_out.bias": (out,)}
    sd = {}
    if encoder:
        fill("encoder", {"conv_in.weight": (c, 3, 3, 3)} | block("down.0.block.0", c, c) | block("down.1.block.0", c, 2 * c)
             | block("mid.0", 2 * c, 2 * c) | end(2 * c, 8, 1))
    fill("decoder", {"conv_in.weight": (2 * c, 8, 3, 3), "conv_in.bias": (2 * c,), "up.1.upsample_conv.weight": (2 * c, 2 * c, 3, 3),
                     "up.1.upsample_conv.bias": (2 * c,)} | block("mid.0", 2 * c, 2 * c) | block("up.1.block.0", 2 * c, 2 * c)
         | block("up.0.block.0", 2 * c, c) | end(c, 3, 3))
    return sd


@torch.no_grad()
def test_maskgit_vqgan_is_the_authors():
    g = golden("tokenizers/maskgit_vqgan_tiny")
    sd = maskgit_vqgan() | {"quantize.embedding.weight": g["codebook"]}
    model, images = titok.MaskGITVQGAN.from_official(sd, grid=(8, 8)), 2 * g["image"] - 1
    close(model.latents(images), tokens_of(g["h"]))
    q, ids, loss, _ = model.quantizer(model.latents(images))
    assert torch.equal(ids, g["indices"]) and torch.equal(model.encode(images), ids)
    close(q, tokens_of(g["z_q"])), close(loss, g["loss"]), close((model.decode_raw(q) + 1) / 2, g["recon"])
    close(model.encoder[0](g["odd_image"]), g["odd_conv"])
    with pytest.raises(ValueError, match="decoder.up.1.upsample_conv.bias"):
        titok.MaskGITVQGAN.from_official({k: v for k, v in sd.items() if k != "decoder.up.1.upsample_conv.bias"})
    with pytest.raises(ValueError, match="encoder.extra"):
        titok.MaskGITVQGAN.from_official(sd | {"encoder.extra": torch.zeros(1)})


def test_titok_mixes_the_proxys_codes_as_the_authors_and_trains_both_decoders_only():
    g = golden("tokenizers/titok_stage2_softcode")
    stage1 = titok_golden("legacy_vq_stage1")[1]
    with torch.no_grad():
        codes = titok.VectorQuantizer(*g["codebook"].shape, l2_norm=False)
        codes.codebook.copy_(g["codebook"])
        proxy = argparse.Namespace(quantizer=codes, decode_raw=lambda q: q, grid=(2, 2), vocab_size=64)
        holder = argparse.Namespace(decoder=lambda q: tokens_of(g["logits"]), proxy=proxy)
        holder.decoder = type("Decoder", (), dict(__call__=lambda self, q: tokens_of(g["logits"]), proxy_vocab=64))()
        close(titok.TiTok.decode_raw(holder, g["logits"]), tokens_of(g["soft"]))
        hard = F.one_hot(torch.arange(4)[None], 64).float() * 1e4
        holder.decoder = type("Decoder", (), dict(__call__=lambda self, q: hard, proxy_vocab=64))()
        close(titok.TiTok.decode_raw(holder, g["logits"]), g["codebook"][None, :4])
    pixel = maskgit_vqgan(encoder=False) | {"quantize.embedding.weight": torch.randn(1024, 8)}
    pixel = {"pixel_" + k if k.startswith("decoder") else k.replace("quantize", "pixel_quantize"): v for k, v in pixel.items()}
    model = titok.TiTok.from_official(stage1 | pixel, n_head=4)
    images = data.draw(torch.arange(2), 64)[0]
    assert model.stage == "finetune" and model.proxy.encoder is None
    with torch.no_grad():
        assert model.decode(model.encode(images)).shape == (2, 3, 8, 8), "the tiny proxy doubles 4 x 4 patches only once"
        close(model.decode_raw(model.quantizer.codes(model.encode(images))), model.reconstruct(images)[0])
    F.mse_loss(model.train().reconstruct(images)[0], images[:, :, ::8, ::8]).backward()
    learns = {k for k, v in model.named_parameters() if v.grad is not None and v.grad.abs().max() > 0}
    assert learns == {k for k, _ in model.named_parameters() if k.startswith(("decoder.", "proxy.decoder."))}


def test_titok_from_official_names_the_key_that_does_not_fit(tmp_path):
    _, sd, _, images = titok_golden("vq_pixels")
    torch.save(sd, tmp_path / "tokenizer.bin")
    assert titok.TiTok.from_official(tmp_path / "tokenizer.bin", n_head=4).encode(images).shape == (2, 8)
    for key in ("latent_tokens", "encoder.transformer.1.attn.in_proj_bias", "decoder.mask_token", "quantize.embedding.weight"):
        with pytest.raises(ValueError, match=key):
            titok.TiTok.from_official({k: v for k, v in sd.items() if k != key}, n_head=4)
    with pytest.raises(ValueError, match="decoder.extra"):
        titok.TiTok.from_official(sd | {"decoder.extra": torch.zeros(1)}, n_head=4)


@pytest.mark.parametrize("name, published, proxy", [
    ("l-32", 610.2, 1024), ("b-64", 174.0, 1024), ("s-128", 52.8, 1024), ("bl-64-vq8k", 390.0, None), ("bl-128-vq8k", None, None),
    ("sl-256-vq8k", 330.3, None), ("ll-32-vae", 606.9, None), ("bl-64-vae", None, None), ("bl-128-vae", 389.6, None)])
def test_titok_of_the_paper_has_its_parameter_count(name, published, proxy):
    size = titok.SIZES["titok-" + name]
    D, T = size.get("code_dim", size.get("token_dim")), size["n_tokens"]
    with torch.device("meta"):
        if proxy:
            model = titok.TiTok(**size, stage="proxy", proxy_vocab=proxy)
        else:
            model = (titok.TiTokVAE if "vae" in name else titok.TiTok)(**size)
    count = lambda module: sum(p.numel() for p in module.parameters())
    vit = lambda C, layers: layers * (12 * C**2 + 13 * C) + 4 * C + C + 257 * C             # blocks, two norms, class, places
    (E, n, _), (G, m, _) = size["enc"], size["dec"]
    moments = 2 * D if "vae" in name else D
    encoder = vit(E, n) + 769 * E + 2 * T * E + E * moments + moments                       # theirs: latents and their places
    decoder = vit(G, m) + D * G + G + G + T * G                                             # theirs: one mask token
    decoder += 2 * G * G + 2 * G + 2 * G * proxy + proxy if proxy else 768 * G + 768 + 84
    # ours keeps one vector where they add two: class and place 0 (twice), latent and place, mask token and place
    assert (count(model.encoder), count(model.decoder)) == (encoder - E - T * E, decoder - 2 * G)
    if published:
        whole = encoder + decoder + (-T * E if proxy else 0 if "vae" in name else size["vocab_size"] * D)   # as counted there
        assert round(whole / 1e6, 1) == published


def test_maskgit_vqgan_has_its_parameter_count():
    with torch.device("meta"):
        model = titok.MaskGITVQGAN()
    count = lambda *parts: round(sum(p.numel() for part in parts for p in part.parameters()) / 1e6, 1)
    assert (count(model.encoder), count(model.decoder), count(model)) == (23.8, 30.5, 54.5)
    assert count(model.decoder, model.quantizer) == 30.7    # what a TiTok file brings along


def small_titok(cls=titok.TiTok, **options):
    return cls(**dict(image_size=16, n_tokens=5, patch=4, enc=(32, 1, 2), dec=(32, 1, 2)) | options)


def small_proxy():
    return vq.VQ(image_size=16, vocab_size=24, code_dim=4, ch=8, z_channels=8)                          # 4 x 4 ids


@pytest.mark.parametrize("stage", ["pixels", "proxy", "finetune"])
@pytest.mark.parametrize("cls", [titok.TiTok, titok.TiTokVAE])
def test_titok_keeps_the_contract_of_a_tokenizer(cls, stage):
    ids, proxy = cls is titok.TiTok, None if stage == "pixels" else small_proxy()
    images = data.draw(torch.arange(6), 16)[0]
    model = small_titok(cls, stage=stage, proxy=proxy, **dict(vocab_size=20) if ids else dict(token_dim=3))
    assert model.seq_len == 5 and model.grid == (5,) and (model.vocab_size, model.token_dim) == ((20, None) if ids else (None, 3))
    loss, logs = model(images, torch.zeros(6, dtype=torch.long))
    loss.backward()
    assert loss.ndim == 0 and all(v.ndim == 0 and not v.requires_grad for v in logs.values())
    learns = {k for k, v in model.named_parameters() if v.grad is not None}
    expected = dict(pixels=("encoder.", "decoder.", "quantizer."), proxy=("encoder.", "decoder.", "quantizer."),
                    finetune=("decoder.", "proxy.decoder.", "proxy.post_quant_conv."))[stage]
    assert learns == {k for k, _ in model.named_parameters() if k.startswith(expected)}
    assert learns == {k for k, v in model.named_parameters() if v.requires_grad}, "an optimiser would see idle weights"
    tokens = model.encode(images)
    assert tokens.shape == ((6, 5) if ids else (6, 5, 3)) and tokens.dtype == (torch.int64 if ids else torch.float32)
    recon = model.decode(tokens)
    assert recon.shape == images.shape and recon.abs().max() <= 1
    torch.manual_seed(1)
    recon, auxiliary, logs = model.eval().reconstruct(images)
    torch.manual_seed(1)
    loss, logs = model(images)
    if stage == "proxy":
        target = model.proxy.encode(images)
        torch.manual_seed(1)
        p = model.decoder(model.bottleneck(model.encoder(images))[0]).log_softmax(-1)       # (6, 16, 24)
        slow = -sum(p[b, t, target[b, t]] for b in range(6) for t in range(16)) / 96
        assert torch.allclose(loss, slow + auxiliary) and 0 <= logs["proxy_right"] <= 1
    else:
        assert torch.allclose(loss, auxiliary + F.mse_loss(recon, images))
    if ids:
        assert torch.allclose(model.decode(tokens), recon.clamp(-1, 1), atol=1e-5), "the decoder sees codes only"


def test_titok_stages_share_their_weights():
    images, proxy = data.draw(torch.arange(4), 16)[0], small_proxy()
    first = small_titok(stage="proxy", proxy=proxy)
    then = small_titok(stage="finetune", proxy=small_proxy())
    then.load_state_dict(first.state_dict())
    assert torch.equal(first.encode(images), then.encode(images))
    assert torch.allclose(first.decode(first.encode(images)), then.decode(then.encode(images)), atol=1e-6)
    before = [p.clone() for p in then.encoder.parameters()]
    opt = torch.optim.AdamW(then.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(8):
        loss, _ = then.train()(images)
        opt.zero_grad(), loss.backward(), opt.step()
        start = loss.detach() if step == 0 else start
    assert loss < start and all(map(torch.equal, before, then.encoder.parameters())), "only the decoders may learn"
    first.set_stage("finetune")
    assert not first.encoder.out.weight.requires_grad and first.proxy.decoder[0].weight.requires_grad
    for make, sentence in ((lambda: small_titok(stage="proxy"), "needs a proxy"), (lambda: small_titok(proxy=proxy), "needs no proxy"),
                           (lambda: small_titok(image_size=32, stage="proxy", proxy=proxy), "8 x 8"),
                           (lambda: small_titok(stage="third"), "third"), (lambda: small_titok(image_size=18), "multiple of patch 4")):
        with pytest.raises(ValueError, match=sentence):
            make()


def test_titok_vae_tokens_have_unit_variance_token_by_token():
    model, images = small_titok(titok.TiTokVAE, token_dim=3).eval(), data.draw(torch.arange(400), 16)[0]
    with torch.no_grad():
        model.encoder.out.weight.mul_(3), model.encoder.out.bias.normal_()
        mean, std = model.posterior(images)
        model.measure(mean, std)
    tokens = torch.cat([model.encode(images) for _ in range(4)])
    assert tokens.mean(0).abs().max() < 0.15 and (tokens.std(0) - 1).abs().max() < 0.1
    with torch.no_grad():
        close(model.decode(model.normalise(mean)), model.decode_raw(mean).clamp(-1, 1), 1e-5)
    assert torch.equal(vae.VAE.kl(mean, std), model.kl(mean, std))
    noise = dict(beta=3.0)
    torch.manual_seed(2)
    strong = small_titok(titok.TiTokVAE, token_dim=3, **noise)
    loss, logs = strong(images[:8])
    assert torch.allclose(loss, logs["mse"] + 3 * logs["kl"] * 5 / 768)


def test_titok_tokens_have_no_place_but_an_order():
    """Each token reaches every patch, and the decoder tells them apart by their position."""
    model = small_titok().eval()
    with torch.no_grad():
        for module in (model.encoder, model.decoder):
            for p in module.parameters():
                p.add_(0.1 * torch.randn_like(p))
        ids = torch.tensor([[1, 2, 3, 4, 5]])
        picture = model.decode_raw(model.quantizer.codes(ids))
        change = (model.decode_raw(model.quantizer.codes(torch.tensor([[1, 2, 3, 4, 9]]))) - picture).abs().sum(1)
        assert change.min() > 0, "the last token does not reach every pixel"
        assert (model.decode_raw(model.quantizer.codes(ids.flip(1))) - picture).abs().max() > 1e-3
    small = [small_titok(n_tokens=n) for n in (1, 16)]
    assert [m.encode(data.draw(torch.arange(2), 16)[0]).shape[1] for m in small] == [1, 16]


@pytest.mark.parametrize("cls", [titok.TiTok, titok.TiTokVAE])
def test_titok_learns(cls):
    images = data.draw(torch.arange(64), 16)[0]
    model, losses = small_titok(cls, enc=(64, 2, 4), dec=(64, 2, 4)), []
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        loss, logs = model(images[torch.randint(64, (16,))])
        opt.zero_grad(), loss.backward(), opt.step()
        losses.append(logs["mse"].item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5]), f"squared error {losses[0]:.3f} to {losses[-1]:.3f}"


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


def test_ids_are_drawn_as_often_as_their_probabilities_say(monkeypatch):
    p = torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.3, 0.0], [3.0, 0.0, 0.0, 0.0, 0.0, 1.0]])      # the second adds up to 4
    n = 40_000
    ids = ar_transformer.draw_ids(p.expand(n, 2, 6))
    assert ids.shape == (n, 2) and ids.dtype == torch.long
    for row, truth in zip(ids.T, p / p.sum(-1, keepdim=True)):
        share = torch.bincount(row, minlength=6) / n
        assert (share[truth == 0] == 0).all(), "an id of probability 0"
        assert ((share - truth).abs() <= 4 * (truth * (1 - truth) / n).sqrt()).all(), f"{share} where {truth} was asked"
    for u in (0.0, 1 - 2**-24):                             # the ends of what torch.rand gives
        monkeypatch.setattr(torch, "rand", lambda shape: torch.full(shape, u))
        assert (p.gather(1, ar_transformer.draw_ids(p)[:, None]) > 0).all(), f"an id of probability 0 at u = {u}"


def test_categorical_head_filters_as_the_authors(monkeypatch):
    g, seen, draw = golden("llamagen/logit_filter"), [], ar_transformer.draw_ids
    head = ar_transformer.CategoricalHead(1, 1)
    head.proj = nn.Identity()                               # the arrays hold logits
    monkeypatch.setattr(ar_transformer, "draw_ids", lambda p: seen.append(p[..., 0, :]) or draw(p))
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
    _, curve = ar_transformer.read_captions("cpu", 600)
    _, told, untold = curve[-1]
    assert told < 0.5, f"{told:.2f} nats are left when the caption tells the picture"
    assert math.log(30) - 1e-3 <= untold < 1.06 * math.log(30), f"{untold:.3f} nats without a caption, ln 30 = 3.401 is the least"


# Ids as digits: CategoricalHead(groups=), SubTokenHead, and Open-MAGVIT2's arrays

def grouped(kind, groups=2):
    """A small generator whose 27 or 16 ids are digits, with a head that has opinions."""
    V, size = {2: 16, 3: 27}[groups], dict(n_layer=2, n_head=2, n_embd=32, label_drop=0)
    module = dict(ar=ar_transformer, split=ar_transformer, maskgit=maskgit, mar=mar, causal=mar)[kind]
    cls = dict(ar="ARTransformer", split="ARTransformer", maskgit="MaskGIT", mar="MAR", causal="CausalMAR")[kind]
    head = module.SubTokenHead(32, V, (1, 3), n_head=2) if kind == "split" else module.CategoricalHead(32, V, groups)
    return getattr(module, cls)(head, 12, 5, vocab_size=V, grid=(3, 4), **size)


def opinions(head):
    for name, p in head.named_parameters():
        if "proj" in name:
            nn.init.normal_(p, std=0.5)
    return head


@pytest.mark.parametrize("groups, V, base", [(1, 9, 9), (2, 16, 4), (3, 27, 3)])
def test_groups_are_a_product_of_softmaxes(groups, V, base):
    head, h, null = opinions(ar_transformer.CategoricalHead(6, V, groups)), torch.randn(6), torch.randn(6)
    digits = lambda i: [i // base ** g % base for g in range(groups)]                       # the lowest first
    rows = head.proj.weight.detach().view(groups, base, 6)
    factors = [D.Categorical(logits=row @ h) for row in rows]
    slow = torch.stack([sum(f.log_prob(torch.tensor(d)) for f, d in zip(factors, digits(i))) for i in range(V)])
    ours = -head.loss(h.expand(V, -1), torch.arange(V)).detach()
    assert torch.allclose(ours, slow, atol=1e-5) and abs(ours.logsumexp(0)) < 1e-5
    assert torch.allclose(head.logits(h).log_softmax(-1), slow, atol=1e-5)
    assert torch.allclose(head.embed(torch.arange(V)), torch.stack([sum(rows[g, d] for g, d in enumerate(digits(i))) for i in range(V)]))
    guided, many = [], h.expand(2, 9000, 6)                 # each digit is guided, warmed and cut by itself
    for row in rows:
        logits = (row @ null + 1.5 * (row @ h - row @ null)) / 0.8
        guided.append(logits.masked_fill(logits < logits.topk(2).values[-1], -math.inf).log_softmax(-1))
    wanted = torch.stack([sum(f[d] for f, d in zip(guided, digits(i))) for i in range(V)])
    ids, log_p = head.sample(many, null.expand_as(many), cfg=1.5, temperature=0.8, top_k=2)
    assert ids.shape == log_p.shape == (2, 9000) and torch.allclose(log_p, wanted[ids], atol=1e-4)
    assert torch.allclose(ids.flatten().bincount(minlength=V) / 18_000, wanted.exp(), atol=0.02)
    if groups > 1:
        with pytest.raises(ValueError, match=f"such as {V}, not {V + 1}"):
            ar_transformer.CategoricalHead(6, V + 1, groups)


def test_sub_tokens_are_a_chain_over_the_bits():
    head, h = opinions(ar_transformer.SubTokenHead(16, 32, (2, 3), n_layer=2, n_head=2)), torch.randn(16)
    slow = torch.empty(32)
    for low in range(4):                                    # one row and one pair of rows at a time
        row = []
        for k, x in enumerate((h[None, None], torch.stack([h, head.embeds[0].weight[low]])[None])):
            for block in head.blocks:
                x = block(x, head.rope[:k + 1])
            row.append(head.norm(x)[0, -1] @ head.heads[k].proj.weight.T)
        for high in range(8):
            slow[low + 4 * high] = (row[0].log_softmax(-1)[low] + row[1].log_softmax(-1)[high]).detach()
    ours = -head.loss(h.expand(2, 16, 16), torch.arange(32).view(2, 16)).detach().flatten()
    assert torch.allclose(ours, slow, atol=1e-5) and abs(ours.logsumexp(0)) < 1e-5
    ids, log_p = head.sample(h.expand(20_000, 16))
    assert torch.allclose(log_p, slow[ids], atol=1e-4)
    assert torch.allclose(ids.bincount(minlength=32) / 20_000, slow.exp(), atol=0.015)
    low, _ = head.sample(h.expand(50, 16), temperature=(1e-5, 1.0))                         # a temperature for each digit
    assert len((low % 4).unique()) == 1 and len((low // 4).unique()) > 1
    null = torch.randn(50, 16)
    same, other = (torch.manual_seed(1) and head.sample(h.expand(50, 16), null, cfg=c)[0] for c in (1.0, (1.0, 4.0)))
    assert torch.equal(same % 4, other % 4) and not torch.equal(same // 4, other // 4)
    for split in ((2, 2), (5, 0), (5,)):
        with pytest.raises(ValueError, match="split"):
            ar_transformer.SubTokenHead(16, 32, split)


@pytest.mark.parametrize("kind, groups", [("ar", 2), ("ar", 3), ("split", 2), ("maskgit", 2), ("mar", 2), ("causal", 2)])
def test_generators_of_digits_start_at_ln_v_and_train_every_weight(kind, groups):
    model = grouped(kind, groups)
    V = model.vocab_size
    x, cond, step = torch.randint(V, (8, 12)), torch.arange(8) % 5, torch.optim.SGD(model.parameters(), lr=0.1)
    loss, _ = model.eval()(x, cond)
    assert abs(loss - math.log(V)) < (1e-5 if kind == "split" else 0.1)
    for _ in range(2):                                      # a head at zero lets nothing through in the first step
        step.zero_grad()
        model.train()(x, cond)[0].backward()
        step.step()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead, dead
    drawn = model.eval().sample(cond, cfg=2.0)
    assert drawn.shape == x.shape and drawn.min() >= 0 and drawn.max() < V and (drawn >= V // 2).any() and (drawn < V // 2).any()
    known = torch.arange(12) < 6
    drawn = model.sample(cond, known=x, known_mask=known.expand(8, -1))
    assert torch.equal(drawn[:, known], x[:, known]) and not torch.equal(drawn, x)


@pytest.mark.parametrize("kind, groups", [("ar", 3), ("split", 2)])
def test_digits_cached_or_not_and_their_beam(kind, groups):
    model, cond, drawn = grouped(kind, groups).eval(), torch.arange(5), []
    opinions(model.head)
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(model.sample(cond, cfg=2.0, top_k=2, use_cache=use_cache))
    assert torch.equal(*drawn) and drawn[0].unique().numel() > 3
    with torch.no_grad():
        h, x = model.hidden(drawn[0], cond), drawn[0].clone()
        x[:, 5] = (x[:, 5] + 1) % model.vocab_size
        changed = (model.hidden(x, cond) - h).abs().amax((0, 2)) > 1e-6
        assert not changed[:6].any() and changed[6], "the lowest digit is read, and not before its turn"
        tokens, log_p = model.beam_search(cond)
        assert torch.allclose(log_p, -model.head.loss(model.hidden(tokens, cond), tokens).sum(1), atol=1e-3)
    with pytest.raises(ValueError, match="in one softmax"):
        ar_transformer.to_llama(model)


def test_maskgit_of_digits_counts_all_of_them():
    """The smoothed loss over all V ids, and an accuracy that wants every digit, written out over the whole vocabulary."""
    model, cond = grouped("maskgit"), torch.zeros(3, dtype=torch.long)
    opinions(model.head)
    x = torch.randint(16, (3, 12))
    torch.manual_seed(5)
    loss, logs = model(x, cond)
    torch.manual_seed(5)
    mask = model.training_mask(3, "cpu")
    log_p = model.logits(x, cond, mask).log_softmax(-1)                                     # (3, 12, 16)
    nll = -log_p.gather(-1, x[..., None])[..., 0]
    each = (1 - model.smoothing) * nll - model.smoothing * log_p.mean(-1)
    assert torch.allclose(loss, torch.stack([each[b][mask[b]].mean() for b in range(3)]).mean(), atol=1e-5)
    assert torch.allclose(logs["nll"], nll[mask].mean(), atol=1e-5)
    assert torch.allclose(logs["accuracy"], (log_p.argmax(-1) == x)[mask].float().mean())
    other = torch.where(mask, 15 - x, x)
    assert torch.equal(model.hidden(x, cond, mask), model.hidden(other, cond, mask)), "a hidden id leaks"


def open_magvit2():
    g = golden("tokenizers/open_magvit2_gpt_tiny")
    sd = {k[3:]: v for k, v in g.items() if k.startswith("sd.")}
    return ar_transformer.ARTransformer.from_official(sd, n_head=4, grid=(4, 4)), g, sd


def test_open_magvit2_has_the_authors_logits_and_loss():
    model, g, _ = open_magvit2()
    assert (model.vocab_size, model.num_classes, model.head.split, model.training) == (256, 10, (3, 5), False)
    assert torch.equal(model.rope, g["freqs_cis"])
    ids, cond = g["idx_pre"] + (g["idx_post"] << 3), g["cls"][:, 0]                         # pre: the low bits
    rows = model.head.rows(model.hidden(ids, cond), [g["idx_pre"]])
    close(model.head.heads[0].logits(rows[..., 0, :]), g["logits_pre"], 1e-6)
    close(model.head.heads[1].logits(rows[..., 1, :]), g["logits_post"], 1e-6)
    theirs = [F.cross_entropy(g[f"logits_{n}"].flatten(0, 1), g[f"idx_{n}"].flatten()) for n in ("pre", "post")]
    close(model(ids, cond)[0].detach(), sum(theirs), 1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_open_magvit2_writes_the_authors_tokens(way):
    model, g, _ = open_magvit2()
    tokens = model.sample(g["cfg_cls"][:2, 0], cfg=g["cfg_scale"].item(), top_k=1, **WAYS[way])
    assert torch.equal(tokens % 8, g["greedy_pre"]) and torch.equal(tokens // 8, g["greedy_post"])


def test_open_magvit2_from_official_reads_files_and_names_keys(tmp_path):
    model, _, sd = open_magvit2()
    cls, options = ar_transformer.ARTransformer, dict(n_head=4, grid=(4, 4))
    whole = {f"transformer.{k}": v for k, v in sd.items()} | {"first_stage_model.encoder.conv_in.weight": torch.zeros(3)}
    torch.save({"state_dict": whole, "epoch": 3}, tmp_path / "AR_256_B.ckpt")               # theirs, with the tokenizer in it
    other = cls.from_official(tmp_path / "AR_256_B.ckpt", **options).state_dict()
    assert all(torch.equal(v, other[k]) for k, v in model.state_dict().items())
    for lost in ("pre_emb.weight", "head.1.weight", "spatial_blocks.1.feed_forward.w2.weight", "factorized_blocks.0.ffn_norm.weight"):
        with pytest.raises(ValueError, match=f"missing.*{lost}"):
            cls.from_official({k: v for k, v in sd.items() if k != lost}, **options)
    with pytest.raises(ValueError, match="unknown.*head.2.weight"):
        cls.from_official(sd | {"head.2.weight": torch.zeros(1)}, **options)
    with pytest.raises(ValueError, match="n_head="):
        cls.from_official(sd)


@pytest.mark.parametrize("name, n_layer, millions", [("gpt-l", 2, 343.6), ("gpt-xl", 3, 804.4), ("gpt-xxl", 4, 1486.7)])
def test_open_magvit2_of_the_paper_has_its_parameter_count(name, n_layer, millions):
    size = ar_transformer.SIZES[name]
    with torch.device("meta"):
        head = ar_transformer.SubTokenHead(size["n_embd"], 1 << 18, (6, 12), n_layer, size["n_head"], multiple_of=256)
        model = ar_transformer.ARTransformer(head, 256, 1000, vocab_size=1 << 18, **size)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("words, shape", [(["--groups", "2"], (16, 128)), (["--split", "2", "4"], (4, 128)),
                                          (["--groups", "3", "--generator", "maskgit"], (12, 128))])
def test_digits_are_trained_and_drawn_by_the_programs(words, shape, tiny_run, capsys):
    name = "digits" + "".join(words).replace("--", "-")
    train.main([*TINY, *RARELY, "--runs", str(tiny_run), *IDS, "--tokenizer", "lfq", "--vocab_size", "64", "--name", name, *words])
    run = train.load_run(tiny_run / name)
    head = getattr(run.generator.head, "heads", [run.generator.head])[0]
    assert head.proj.weight.shape == shape
    images = sample.draw_samples(run, torch.arange(4))
    assert images.shape == (4, 3, 16, 16) and torch.isfinite(images).all()
    assert 0 < log_of(tiny_run, name)[24] < 1.1 * math.log(64)
    sample.main([str(tiny_run / name), "--n", "3", "--top_k", "2", "--out", str(tiny_run / "x.png")])
    with pytest.raises(SystemExit, match="does not fit"):
        train.main([*TINY, *RARELY, "--runs", str(tiny_run), *IDS, "--tokenizer", "lfq", "--name", name, "--groups", "6"])


@pytest.mark.parametrize("words, sentence", [
    (["--tokenizer", "vae", "--groups", "2"], "go with --head categorical"), (["--tokenizer", "lfq", "--groups", "0"], "at least 1"),
    (["--tokenizer", "lfq", "--groups", "2", "--split", "5", "5"], "give one of them"),
    (["--tokenizer", "lfq", "--split", "5", "5", "--generator", "mar"], "use --groups 2"),
    (["--tokenizer", "vq", "--vocab_size", "1000", "--groups", "2"], "whole number to the power of 2, such as 1024"),
    (["--tokenizer", "lfq", "--groups", "3"], "--vocab_size 1024 must be"), (["--tokenizer", "lfq", "--split", "5", "6"], "add up"),
    (["--tokenizer", "titok", "--split", "9"], "two or more")])
def test_digits_that_do_not_fit_are_refused_before_anything_is_trained(words, sentence, tmp_path):
    with pytest.raises(SystemExit, match=sentence):
        train.main([*words, "--runs", str(tmp_path), "--device", "cpu"])
    assert not list(tmp_path.iterdir())


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
    model = maskgit.MaskGIT(maskgit.CategoricalHead(64, 2), 16, 1, vocab_size=2, n_layer=2, n_head=4, n_embd=64, label_drop=0,
                            smoothing=0)
    zeros = torch.zeros(256, dtype=torch.long)
    maskgit.fit_ids(model, lambda step: (maskgit.bars_and_stripes(256, "cpu"), zeros), 400, 5e-3)
    model.eval()
    few, many = (maskgit.error_of_parallel_decoding(model, n, 1500) for n in (2, 16))
    assert many[0] > 0.8 and many[1] < few[1], (few, many)


@pytest.mark.parametrize("name", ["cosine", "arccos"])
@pytest.mark.parametrize("N", [32, 64, 128, 256, 1024])
@pytest.mark.parametrize("T", [4, 8, 10, 12, 16])
def test_maskgit_hides_as_many_ids_as_the_authors(name, N, T):
    theirs, unknown, ours = golden("tokenizers/maskgit_schedules")[f"{name}_N{N}_T{T}"], torch.tensor([[N]]), []
    for t in range(T):
        unknown = torch.minimum(maskgit.still_hidden(torch.tensor([[N]]), t, T, name), unknown - 1)
        ours.append(unknown.item())
    assert theirs[-1] == 1 and ours[-1] == 0, "theirs hides one after the last pass and returns its id all the same"
    assert ours[:-1] == theirs[:-1].tolist()


def test_maskgit_schedules_are_the_authors_functions():
    g = golden("tokenizers/maskgit_schedules")
    for ours, theirs in (("cosine", "cosine"), ("linear", "uniform"), ("square", "pow2")):
        close(maskgit.SCHEDULES[ours](g["ratio_x"]), g[f"ratio_{theirs}"], 1e-6)
    g = golden("tokenizers/maskgit_train_mask")
    for name in ("cosine", "arccos"):
        close(maskgit.SCHEDULES[name](g["u"]), g[f"{name}_ratio"], 1e-6)
    assert torch.equal(maskgit.n_hidden(g["u"], 64), g["num_masked_cosine_ceil_N64"])
    assert torch.equal(maskgit.n_hidden(g["u"], 64, "arccos"), g["num_masked_arccos_N64"])


def test_maskgit_halton_order_is_the_authors_and_reveals_tokens_far_apart():
    g = golden("tokenizers/maskgit_schedules")
    for n in (8, 16):
        rows, columns = g[f"halton_{n}x{n}_order"].unbind(1)
        assert torch.equal(maskgit.halton_rank((n, n)).argsort(), rows * n + columns)
    assert maskgit.halton_rank((8,)).tolist() == [7, 3, 1, 5, 0, 4, 2, 6], "the digits of 1, 2, 3 ... in base 2, mirrored"
    assert sorted(maskgit.halton_rank((3, 4, 5)).tolist()) == list(range(60))
    model, passes = small_maskgit(False, grid=(3, 4)).eval(), []
    known_mask = torch.tensor([[0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], [0] * 12]).bool()
    y = model.sample(torch.tensor([1, 2]), steps=4, known=torch.full((2, 12), 7), known_mask=known_mask, order="halton",
                     schedule="linear", on_step=lambda i, x, m: passes.append(m))
    assert (y[known_mask] == 7).all() and not passes[-1].any()
    turn = maskgit.halton_rank((3, 4))
    for mask in passes[:-1]:
        for row in range(2):
            shown = ~mask[row] & ~known_mask[row]
            assert turn[shown].max() < turn[mask[row]].min(), "a token was revealed before its turn"
    with pytest.raises(ValueError, match="halton"):
        model.sample(torch.tensor([1]), order="spiral")
    with pytest.raises(ValueError, match="arccos"):
        model.sample(torch.tensor([1]), schedule="cubic")


def test_maskgit_replays_the_authors_jax_decoding_of_ids(monkeypatch):
    """Their toy network in the place of hidden(), their Gumbel noise in the place of draw_ids and rand."""
    g = golden("tokenizers/maskgit_decode_jax")
    K, T, steps, passes = 11, 16, 8, []
    model = maskgit.MaskGIT(maskgit.CategoricalHead(32, K), T, 4, vocab_size=K, n_layer=1, n_head=2, n_embd=32).eval()
    model.head.proj = nn.Identity()

    def network(tokens, cond, mask):
        ids = torch.cat([K + cond[:, None], torch.where(mask, len(g["A"]) - 1, tokens)], 1)    # -1 is their last row
        a = g["A"][ids]
        t = len(passes)
        assert torch.equal(torch.where(mask, -1, tokens), g[f"step{t}_ids_in"][:, 1:].long()), f"pass {t} sees other tokens"
        logits = g["P"] + 0.5 * a + 2 * a.mean(1, keepdim=True)
        close(logits, g[f"step{t}_logits"])
        return logits[:, 1:]

    def gumbel_argmax(p):
        return (p.log() + g[f"step{len(passes)}_gumbel_sample"][:, 1:, None]).argmax(-1)
    uniform = lambda *a, **k: torch.exp(-torch.exp(-g[f"step{len(passes)}_gumbel_choice"][:, 1:].double())).float()
    monkeypatch.setattr(model, "hidden", network)
    monkeypatch.setattr(maskgit, "draw_ids", gumbel_argmax)
    monkeypatch.setattr(torch, "rand", uniform)
    tokens = model.sample(g["init"][:, 0].long() - K, steps=steps, choice_temperature=g["temperature"].item(),
                          on_step=lambda i, x, m: passes.append((x, m)))
    for t, (x, mask) in enumerate(passes):
        assert torch.equal(x, g[f"step{t}_sampled"][:, 1:].long()), f"pass {t} draws other ids"
        if t < steps - 1:                                   # their last pass hides one again, ours none
            assert torch.equal(mask, g[f"step{t}_masking"][:, 1:]), f"pass {t} hides other tokens again"
    assert torch.equal(tokens, g["final_seqs"][:, -1, 1:].long()) and not passes[-1][1].any()


def test_maskgit_losses_are_the_authors(monkeypatch):
    g = golden("tokenizers/maskgit_losses")
    def loss_of(smoothing, **options):
        model = maskgit.MaskGIT(maskgit.CategoricalHead(32, 9), 6, 1, vocab_size=9, n_layer=1, n_head=2, n_embd=32,
                                smoothing=smoothing, label_drop=0, **options).train()
        model.head.proj = nn.Identity()
        monkeypatch.setattr(model, "hidden", lambda tokens, cond, mask: g["logits"])
        monkeypatch.setattr(model, "training_mask", lambda B, device: g["weights"].bool())
        return model(g["labels"], torch.zeros(2, dtype=torch.long))
    for smoothing in (0.0, 0.1):
        loss, logs = loss_of(smoothing)
        close(loss, g[f"loss_ls{smoothing}"], 1e-5)
    mask = g["weights"].bool()
    nll = [-g["logits"][b, t].log_softmax(-1)[g["labels"][b, t]] for b in range(2) for t in range(6) if mask[b, t]]
    hits = [g["logits"][b, t].argmax() == g["labels"][b, t] for b in range(2) for t in range(6) if mask[b, t]]
    close(logs["nll"], torch.stack(nll).mean(), 1e-5), close(logs["accuracy"], torch.stack(hits).float().mean(), 1e-5)
    close(loss_of(0.1, seen_weight=0.1)[0], g["titok_mlm_loss"], 1e-5)
    close(maskgit.masked_mean(g["ce_per_token_ls0.1"], g["weights"]), g["loss_ls0.1"], 1e-5)


@pytest.mark.parametrize("kind, others", [("imagebert", "encoder.layer.1.attention.self.key.bias"),
                                          ("uvitbert", "out_blocks.1.skip_linear.bias")])
def test_maskgit_loads_titoks_generators_and_gets_the_authors_logits(kind, others, tmp_path):
    g = golden(f"tokenizers/{kind}_tiny")
    sd = {k.removeprefix("sd."): v for k, v in g.items() if k.startswith("sd.")}
    model = maskgit.MaskGIT.from_official(sd, n_head=4)
    assert (model.seq_len, model.vocab_size, model.num_classes, model.smoothing) == (16, 64, 10, 0.1) and not model.training
    mask = g["input_ids"] == 64
    assert 0 < mask.sum() < 48
    for cond, name in ((g["condition"], "cond"), (torch.full((3,), 10), "uncond")):
        close(model.logits(g["input_ids"].clamp(max=63), cond, mask), g[f"logits_{name}"])
    for step in range(4):                                   # guided as in their run: c + 3 (c - u) is u + 4 (c - u)
        ids = g[f"step{step}_ids_in"]
        c, u = (model.logits(ids.clamp(max=63), cond, ids == 64) for cond in (g["condition"], torch.full((3,), 10)))
        close(u + 4 * (c - u), g[f"step{step}_guided_logits"])
    torch.save(sd, tmp_path / "generator.bin")
    model = maskgit.MaskGIT.from_official(tmp_path / "generator.bin", n_head=4)
    y = model.sample(torch.tensor([3, 4]), steps=4, cfg=2.0)
    assert y.shape == (2, 16) and 0 <= y.min() and y.max() < 64
    with pytest.raises(ValueError, match="extra.weight"):
        maskgit.MaskGIT.from_official(sd | {"model.extra.weight": torch.zeros(1)}, n_head=4)
    for key in ("lm_head.bias", others, "lm_head.weight"):
        with pytest.raises(ValueError, match=key):
            maskgit.MaskGIT.from_official({k: v for k, v in sd.items() if k.removeprefix("model.") != key}, n_head=4)


@pytest.mark.parametrize("name, options", [("const", dict(cfg=3.0, temperature=4.5, cfg_schedule="constant", anneal=False)),
                                           ("linear", dict(cfg=4.5, temperature=9.5, cfg_schedule="linear")),
                                           ("power", dict(cfg=6.9, temperature=2.8, cfg_schedule="power-cosine"))])
@pytest.mark.parametrize("kind", ["imagebert", "uvitbert"])
def test_maskgit_replays_titoks_sampler(kind, name, options, monkeypatch):
    """From the uniforms that their code drew: the ids, and in the constant run what is hidden after each pass."""
    g = golden(f"tokenizers/{kind}_tiny")
    model = maskgit.MaskGIT.from_official({k.removeprefix("sd."): v for k, v in g.items() if k.startswith("sd.")}, n_head=4)
    noise = iter([g[f"gen_{name}_u_{kind}{i}"] for i in range(4) for kind in ("sample", "conf")])
    monkeypatch.setattr(torch, "rand", lambda *a, **k: next(noise))
    passes = []
    tokens = model.sample_titok(g["condition"], steps=4, on_step=lambda i, x, m: passes.append((x, m)), **options)
    assert torch.equal(tokens, g[f"gen_{name}_tokens"])
    if name == "const":
        for i, (x, mask) in enumerate(passes[:3]):
            assert torch.equal(torch.where(mask, 64, x), g[f"step{i + 1}_ids_in"]), f"after pass {i} other tokens are known"
            assert mask.sum(1).tolist() == [int(g[f"step{i}_mask_len"])] * 3


def test_maskgit_of_titok_has_its_parameter_count():
    count = {}
    for size, width, T in (("maskgit", 768, 32), ("uvit", 1024, 128)):
        with torch.device("meta"):
            model = maskgit.MaskGIT(maskgit.CategoricalHead(width, 4096), T, 1000, vocab_size=4096, **maskgit.SIZES[size])
        count[size] = sum(p.numel() for p in model.parameters()) + 4096                     # theirs has a bias per id
    assert count["maskgit"] + 2 * 768 == 177_202_432        # and two token types; published: 177M
    assert round(count["uvit"] / 1e6, 1) == 295.0           # measured on their code; the paper says 287M
    with pytest.raises(ValueError, match="odd n_layer"):
        maskgit.MaskGIT(maskgit.CategoricalHead(32, 8), 4, 3, vocab_size=8, n_layer=4, n_embd=32, style="uvit")


def test_maskgit_label_dropping_reaches_the_null_row_in_training_only():
    tokens, cond = torch.randint(11, (4, 12)), torch.arange(4)
    for drop, mode, row in ((1.0, True, True), (1.0, False, False), (0.0, True, False)):
        model = small_maskgit(False, label_drop=drop).train(mode)
        nn.init.normal_(model.head.proj.weight)             # at zero, no gradient would pass it
        model(tokens, cond)[0].backward()
        rows = model.cls_embed.weight.grad.abs().sum(1) > 0
        assert rows[5] == row and rows[:4].any() != row


def test_maskgit_mathematics_does_not_depend_on_the_mode():
    model = small_maskgit(False, label_drop=0)
    nn.init.normal_(model.head.proj.weight)
    tokens, cond, losses = torch.randint(11, (4, 12)), torch.arange(4), []
    for mode in (True, False):
        torch.manual_seed(3)
        losses.append(model.train(mode)(tokens, cond)[0])
    assert torch.equal(*losses) and losses[0] > math.log(11)
    nn.init.zeros_(model.head.proj.weight)
    assert abs(model(tokens, cond)[0] - math.log(11)) < 1e-5, "smoothed or not, an undecided head pays ln V"


def test_maskgit_guidance_takes_one_pass_and_is_off_at_one(monkeypatch):
    model, cond, rows = small_maskgit(False).eval(), torch.arange(3), []
    nn.init.normal_(model.head.proj.weight)
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda *a: rows.append(a[1]) or hidden(*a))
    plain = [torch.manual_seed(1) and model.sample(cond, steps=4), torch.manual_seed(1) and model.sample(cond, steps=4, cfg=1.0)]
    assert torch.equal(*plain) and [len(r) for r in rows] == [3] * 8
    rows.clear()
    model.sample(cond, steps=4, cfg=3.0)
    assert [r.tolist() for r in rows] == [[0, 1, 2, 5, 5, 5]] * 4, "classes and their absence share a pass"


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


@pytest.mark.parametrize("causal, masked", [(False, False), (True, False), (False, True)])
def test_attention_by_formula_is_the_fused_kernel(causal, masked):
    """In bf16 training on a CPU the formula stands in for the fused kernel: the same values and gradients."""
    q, k, v = (torch.randn(2, 3, 9, 16).bfloat16().requires_grad_() for _ in range(3))
    mask = (torch.rand(2, 1, 9, 9) < 0.6) | torch.eye(9, dtype=torch.bool) if masked else None
    ours = mar.attention(q, k, v, mask, causal)
    assert ours.dtype == torch.bfloat16 and ours.grad_fn.name() != "ScaledDotProductFlashAttentionForCpuBackward0"
    ours.float().square().sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = F.scaled_dot_product_attention(*exact, mask, is_causal=causal)
    truth.square().sum().backward()
    for a, b in zip((ours, *(x.grad for x in (q, k, v))), (truth, *(x.grad for x in exact))):
        assert (a - b).abs().max() < 0.02 * b.abs().max(), "not softmax(q k^T / sqrt(d)) v"


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


def test_precision_does_not_depend_on_the_order_of_the_real_images(monkeypatch):
    g = torch.Generator().manual_seed(0)
    near = lambda n, where: where + torch.randn(n, 8, generator=g)
    real, fake = torch.cat([near(300, 0.0), near(300, 20.0)]), torch.cat([near(50, 0.0), near(50, 20.0)])      # sorted by class
    monkeypatch.setattr(evaluate, "look", lambda net, images: (fake, torch.zeros(100, dtype=torch.long)))
    for order in (torch.arange(600), torch.randperm(600, generator=g)):
        rows = evaluate.measure_samples(torch.zeros(100, 3, 4, 4), torch.zeros(100, dtype=torch.long), None, real[order], 100)
        found = {key: value for key, _, value, *_ in rows}
        assert found["sample_precision"] > 75 and found["sample_recall"] > 75, found


def test_ms_ssim_equals_its_definition_in_slow_loops():
    def means(a, b):                                        # SSIM and contrast-structure, window by window, in float64
        g = np.exp(-(np.arange(11) - 5.0) ** 2 / (2 * 1.5**2))
        window, ssim, cs = np.outer(g, g) / g.sum() ** 2, [], []
        for y in range(a.shape[0] - 10):
            for x in range(a.shape[1] - 10):
                p, q = a[y:y + 11, x:x + 11], b[y:y + 11, x:x + 11]
                mu_p, mu_q = (window * p).sum(), (window * q).sum()
                var_p, var_q = (window * (p - mu_p) ** 2).sum(), (window * (q - mu_q) ** 2).sum()
                cov = (window * (p - mu_p) * (q - mu_q)).sum()
                cs.append((2 * cov + 0.06**2) / (var_p + var_q + 0.06**2))
                ssim.append(cs[-1] * (2 * mu_p * mu_q + 0.02**2) / (mu_p**2 + mu_q**2 + 0.02**2))
        return np.mean(ssim), np.mean(cs)

    def slow(a, b, weights):                                # grey images (H, W) in [0, 2]
        product = 1.0
        for j, w in enumerate(weights):
            ssim, cs = means(a, b)
            product *= (ssim if j + 1 == len(weights) else cs) ** (w / sum(weights))
            a, b = (v[:len(v) // 2 * 2, :v.shape[1] // 2 * 2].reshape(len(v) // 2, 2, -1, 2).mean((1, 3)) for v in (a, b))
        return product
    weights = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]
    for side, scales in ((44, 3), (43, 2), (22, 2), (21, 1)):
        a = data.draw(torch.arange(1), side)[0]
        b = (a + 0.3 * torch.randn(a.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
        grey = [((x[0].double() + 1) * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0).numpy() for x in (a, b)]
        assert abs(evaluate.ms_ssim(a, b).item() - slow(*grey, weights[:scales])) < 1e-4, side
    assert torch.equal(evaluate.ms_ssim(a, b), evaluate.ssim(a, b))                         # 21 pixels: one scale
    real = evaluate.similarity                              # five from 176 pixels on, four below
    for side, scales in ((176, 5), (175, 4)):
        calls, x = [], torch.rand(1, 3, side, 200) * 2 - 1
        evaluate.similarity = lambda a, b: calls.append(a.shape) or real(a, b)
        try:
            assert abs(evaluate.ms_ssim(x, x) - 1) < 1e-5 and evaluate.ms_ssim(x, -x) == 0
        finally:
            evaluate.similarity = real
        assert len(calls) == 2 * scales


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
# compression.py: files of tokens

def tiny_codec(clips=True, side=8):
    """A video (or image) LFQ of 64 words and a transformer on its grid, random weights -> tokenizer, transformer."""
    torch.manual_seed(0)
    tokenizer = lfq.LFQ(side, 5 if clips else 1, bits=6, ch=8, ch_mult=(1, 2), n_res=1, groups=4)           # 3 x 4 x 4 ids
    head = ar_transformer.CategoricalHead(16, 64)
    nn.init.normal_(head.proj.weight, std=0.3)
    model = ar_transformer.ARTransformer(head, tokenizer.seq_len, 3, vocab_size=64, grid=tokenizer.grid, n_layer=1, n_head=2, n_embd=16)
    return tokenizer.eval(), model.eval()


def test_arithmetic_coder_reaches_the_entropy_and_inverts():
    rng = np.random.default_rng(0)
    for total, n in ((2, 5000), (1000, 5000), ((1 << 31) - 1, 2000), (1 << 31, 2000)):
        encoder, symbols, bits = compression.ArithmeticEncoder(), [], 0.0
        for _ in range(n):                                  # any share, from almost nothing to almost all
            start = int(rng.integers(total)) if rng.random() < 0.5 else 0
            end = int(rng.integers(start, total)) + 1 if rng.random() < 0.5 else total
            symbols.append((start, end))
            bits -= math.log2((end - start) / total)
            encoder.encode(start, end, total)
        payload = encoder.finish()
        assert 8 * len(payload) - bits < 8 + 1e-3 * bits and bits < 8 * len(payload) + 1e-3 * bits
        decoder = compression.ArithmeticDecoder(payload)
        for start, end in symbols:
            assert start <= decoder.target(total) < end
            decoder.advance(start, end, total)
    assert compression.ArithmeticEncoder().finish() == b"\0"
    for start in range(1000):                               # the first number of a share is in it, the one before is not
        decoder.range, decoder.code = (1 << 31) + 12345, ((1 << 31) + 12345) * start // 1000
        assert decoder.target(1000) == start
        decoder.code -= 1
        assert decoder.target(1000) == start - 1
    carries = compression.ArithmeticEncoder()               # 0.0111 1111 ... and then something more: the carry runs far back
    carries.encode((1 << 31) - 1, (1 << 31) + 1, 1 << 32)
    for _ in range(40):
        carries.encode(0, 2, 3), carries.encode(2, 3, 3)
    assert all(bit in (0, 1) for bit in carries.bits)


def test_a_tile_holds_each_place_once_in_the_order_of_the_transformer():
    order = compression.tiles([3, 2], 3, 5, (3, 2, 4))
    assert order.shape == (2 * 2 * 2, 24) and sorted(order[order >= 0].tolist()) == list(range(5 * 3 * 5))
    assert order[0].view(3, 2, 4)[:, 0].tolist() == [[0, 1, 2, 3], [15, 16, 17, 18], [30, 31, 32, 33]]
    assert order[-1].view(3, 2, 4)[1].tolist() == [[5 * 15 - 1, -1, -1, -1], [-1] * 4] and (order[-1].view(3, 2, 4)[2] < 0).all()


def test_ids_survive_the_file_on_a_hundred_random_clips():
    g = torch.Generator().manual_seed(0)
    tokenizer, model = tiny_codec(side=4)
    for _ in range(100):
        frames, height, width = (int(torch.randint(lo, hi, (1,), generator=g)) for lo, hi in ((1, 12), (3, 14), (3, 14)))
        lay = compression.Layout(tokenizer, frames, height, width)
        ids = torch.randint(64, (lay.f, lay.h, lay.w), generator=g)
        for coder in (None, model):
            blob = compression.write(ids, lay, tokenizer, coder, ms=40)
            back, again, ms = compression.read(blob, tokenizer, coder)
            assert torch.equal(back, ids) and (vars(again), ms) == (vars(lay), 40)
        assert len(compression.write(ids, lay, tokenizer)) == 40 + math.ceil(ids.numel() * 6 / 8)


def test_an_arithmetic_coded_file_is_as_long_as_its_model_says():
    tokenizer, model = tiny_codec()
    lay = compression.Layout(tokenizer, 12, 41, 20)         # 3, 3, 2 x 21 x 10 ids: two batches of tiles, some hang over
    torch.manual_seed(1)
    places, ids = compression.tiles(lay.lengths, lay.h, lay.w, model.grid), torch.zeros(lay.f * lay.h * lay.w, dtype=torch.long)
    drawn = model.sample(torch.full((len(places),), model.num_classes))
    ids[places[places >= 0]] = drawn[places >= 0]           # as the model expects them, so that there is something to save
    padded = torch.where(places >= 0, ids[places], 0)
    with torch.no_grad():                                   # in one pass: the same probabilities, but for rounding
        nats = model.head.loss(model.hidden(padded, torch.full((len(places),), 3)), padded)[places >= 0].sum().item()
    size = len(compression.encode_ids(ids.view(lay.f, lay.h, lay.w), lay.lengths, model))
    bits = nats / math.log(2)
    assert bits / 8 < size < 1.002 * bits / 8 + 4, (bits / 8, size)         # 0.0014 bits per token are given away knowingly
    assert size < 0.95 * len(compression.pack(ids, 6))
    table = compression.cumulative(torch.tensor([[0.0, 300.0, -300.0]]))                    # none is impossible
    assert (np.diff(table) >= 1).all() and table[0, 0] == 0 and np.diff(table)[0, 1] / table[0, -1] > 0.999


def test_a_clip_of_any_size_goes_through_every_tokenizer():
    for tokenizer in (tiny_codec()[0], tiny_codec(False)[0], vq.VQ(8, 50, ch=8, ch_mult=(1, 2), z_channels=8, groups=4).eval(),
                      titok.TiTok(8, 3, 50, enc=(16, 1, 2), dec=(16, 1, 2)).eval()):
        clip = torch.randint(256, (7, 3, 11, 18), dtype=torch.uint8)
        grid = tokenizer.grid
        ids, lay = compression.to_ids(tokenizer, clip)
        back = compression.from_ids(tokenizer, ids, lay)
        assert back.shape == clip.shape and back.dtype == torch.uint8 and tokenizer.grid == grid
        again, _, _ = compression.read(compression.write(ids, lay, tokenizer), tokenizer)
        assert torch.equal(compression.from_ids(tokenizer, again, lay), back)
    tokenizer, _ = tiny_codec()                             # at its own size: what the tokenizer itself says
    clip = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    x = clip.float().transpose(0, 1)[None] / 127.5 - 1
    ids, lay = compression.to_ids(tokenizer, clip)
    assert torch.equal(ids.flatten(), tokenizer.encode(x)[0])
    assert torch.equal(compression.from_ids(tokenizer, ids, lay), data.to_uint8(tokenizer.decode(tokenizer.encode(x)))[0].transpose(0, 1))


def test_truncated_altered_and_foreign_files_are_refused():
    tokenizer, model = tiny_codec()
    lay = compression.Layout(tokenizer, 5, 8, 8)
    ids = torch.randint(64, (lay.f, lay.h, lay.w), generator=torch.Generator().manual_seed(0))
    for coder in (None, model):
        blob = compression.write(ids, lay, tokenizer, coder)
        wrong = [blob[:n] for n in range(len(blob))] + [blob + b"\0"]
        wrong += [blob[:n] + bytes([blob[n] ^ 1 << n % 8]) + blob[n + 1:] for n in range(len(blob))]
        for bad in wrong:
            with pytest.raises(data.BadInput, match="x.lfq: .*"):
                compression.read(bad, tokenizer, coder, "x.lfq")
    with pytest.raises(data.BadInput, match="another tokenizer"):
        compression.read(blob, tiny_codec(False)[0], model)
    with pytest.raises(data.BadInput, match="arithmetic-coded; name the run"):
        compression.read(blob, tokenizer)
    with torch.no_grad():
        model.blocks[0].mlp.w1.weight[0, 0] += 1e-3
    with pytest.raises(data.BadInput, match="another transformer"):
        compression.read(blob, tokenizer, model)
    good = compression.write(ids, lay, tokenizer)
    head = good[:32] + bytes(4)                             # whole, but not the ids that were meant: other probabilities
    with pytest.raises(data.BadInput, match="on another machine"):
        compression.read(head + struct.pack("<I", zlib.crc32(good[40:], zlib.crc32(head))) + good[40:], tokenizer)


# ---------------------------------------------------------------------------------------------------
# The programs, as a user runs them

TINY = ["--tokenizer", "vae", "--head", "gmm", "--n_shapes", "200", "--tok_steps", "24", "--tok_batch_size", "8", "--image_size", "16",
        "--steps", "24", "--batch_size", "8", "--size", "tiny", "--save_every", "4", "--log_every", "4", "--eval_every", "12",
        "--warmup", "4", "--device", "cpu", "--dtype", "fp32"]
RARELY = ["--save_every", "24", "--log_every", "12", "--eval_every", "24"]     # where nothing is stopped or resumed


def command(*words, torchrun=0):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}", "--"] if torchrun \
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


IDS = ["--tokenizer", "vq", "--head", "categorical"]


@pytest.mark.parametrize("words, name", [
    (["--generator", "maskgit"], "shapes-vae-maskgit-gmm"), (["--adapter", "flow"], "shapes-vae-flow-ar-gmm"),
    (["--joint"], "shapes-vae-joint-ar-gmm"), (["--mix", "channel", "--name", "c"], "c"), (["--mix", "full", "--name", "f"], "f"),
    (["--generator", "maskgit", "--adapter", "flow"], "shapes-vae-flow-maskgit-gmm"),
    (["--generator", "mar", "--head", "diffusion", "--head_width", "32", "--head_depth", "1"], "shapes-vae-mar-diffusion"),
    (["--generator", "mar", "--head", "diffusion", "--objective", "flow", "--head_width", "32", "--name", "mf"], "mf"),
    (["--generator", "mar", "--order", "raster", "--attention", "causal", "--name", "mc"], "mc"),
    (["--head", "diffusion", "--head_width", "32", "--head_depth", "1"], "shapes-vae-ar-diffusion"),
    ([*IDS], "shapes-vq-ar-categorical"), ([*IDS, "--generator", "maskgit"], "shapes-vq-maskgit-categorical"),
    ([*IDS, "--generator", "mar"], "shapes-vq-mar-categorical"),
    (["--perceptual", "1", "--gan", "0.5", "--gan_start", "12", "--adaptive", "--tok_name", "vg", "--name", "vg-ar"], "vg-ar"),
    ([*IDS, "--gan", "0.5", "--gan_loss", "non-saturating", "--tok_name", "qg", "--name", "qg-ar"], "qg-ar"),
    ([*IDS, "--tokenizer", "lfq", "--vocab_size", "64", "--generator", "maskgit"], "shapes-lfq-maskgit-categorical"),
    ([*IDS, "--tokenizer", "titok", "--tokens", "6", "--generator", "maskgit"], "shapes-titok-maskgit-categorical"),
    (["--tokenizer", "titok-vae", "--tokens", "5", "--generator", "mar", "--head", "diffusion", "--head_width", "32"],
     "shapes-titok-vae-mar-diffusion"),
    ([*IDS, "--codebook", "ema", "--vocab_size", "32", "--tok_name", "ve", "--generator", "mar", "--attention", "causal",
      "--flip", "--name", "vc"], "vc")])
def test_every_combination_trains_loads_and_samples(words, name, tiny_run, capsys, monkeypatch):
    monkeypatch.setattr(evaluate.train_classifier, "__defaults__", (0, 12, 32, 4e-3))       # of --perceptual: 12 steps are enough
    train.main([*TINY, *RARELY, "--runs", str(tiny_run), *words])
    assert (tiny_run / name / "samples.png").stat().st_size > 0 and (tiny_run / name / "curve.png").exists()
    run = train.load_run(tiny_run / name)
    images = sample.draw_samples(run, torch.arange(4))
    assert images.shape == (4, 3, 16, 16) and torch.isfinite(images).all()
    assert all(torch.isfinite(torch.tensor(v)) for v in log_of(tiny_run, name).values())
    if name in ("shapes-vae-maskgit-gmm", "shapes-vae-mar-diffusion", "shapes-vq-ar-categorical", "shapes-vq-maskgit-categorical",
                "mc", "f"):
        bf16_draws_nearly_what_fp32_draws(run)


def bf16_draws_nearly_what_fp32_draws(run):
    labels, images = torch.arange(20) % 10, {}
    for run.bf16 in (False, True):
        images[run.bf16] = sample.draw_samples(run, labels, cfg=1.0, temperature=0.0 if run.tokenizer.vocab_size else 1e-3)
    assert torch.isfinite(images[True]).all() and images[True].dtype == torch.float32
    if not run.tokenizer.vocab_size:                        # of ids the likeliest stay
        assert not torch.equal(images[True], images[False]), "--dtype bf16 changes nothing"
    off = (images[True] - images[False]).abs().mean() / images[False].std()
    assert off < 0.2, f"off by {off:.2f} standard deviations of a pixel"


def test_bf16_draws_nearly_what_fp32_draws(tiny_run):
    bf16_draws_nearly_what_fp32_draws(train.load_run(tiny_run / "shapes-vae-ar-gmm"))


def test_titoks_published_stages_follow_each_other(tiny_run, capsys):
    words = [*TINY, *RARELY, *IDS, "--runs", str(tiny_run), "--generator", "none"]
    train.main([*words, "--tok_size", "fine", "--tok_name", "patches"])
    words[words.index("vq")] = "titok"
    train.main([*words, "--tokens", "6", "--stage", "finetune", "--proxy", str(tiny_run / "patches")])
    proxy, first, then = (train.load_run(tiny_run / n).tokenizer for n in ("patches", "shapes-titok-proxy", "shapes-titok-finetune"))
    assert (first.stage, then.stage) == ("proxy", "finetune") and then.proxy.grid == (4, 4)
    a, b, c = (m.state_dict() for m in (proxy, first.proxy, then.proxy))
    same = lambda x, y: {k for k in x if torch.equal(x[k], y[k])}
    assert same(a, b) == set(a)                             # the proxy is only read, then its decoder learns
    assert all(k in same(a, c) for k in a if k.startswith("encoder.")) and any(k not in same(a, c) for k in a if k.startswith("decoder."))
    a, b = first.state_dict(), then.state_dict()
    frozen = {k for k in a if k.startswith(("encoder.", "quantizer."))}
    assert frozen <= same(a, b) and any(k not in same(a, b) for k in a if k.startswith("decoder."))
    nats = log_of(tiny_run, "shapes-titok-proxy", "proxy_nats")
    assert abs(nats[1] - math.log(512)) < 1 and nats[24] < nats[1] and "mse" in (tiny_run / "shapes-titok-finetune/log.csv").read_text()
    train.main([*TINY, *RARELY, *IDS, "--runs", str(tiny_run), "--tokenizer", "titok", "--tokens", "6", "--stage", "finetune", "--proxy",
                str(tiny_run / "patches"), "--generator", "maskgit"])
    run = train.load_run(tiny_run / "shapes-titok-finetune-maskgit-categorical")            # complete in itself
    assert torch.equal(run.tokenizer.decoder.canvas, then.decoder.canvas) and run.tokenizer.seq_len == 6
    with pytest.raises(SystemExit, match="a run of --tokenizer vq is wanted"):
        train.main([*words, "--stage", "proxy", "--proxy", str(tiny_run / "shapes-titok-proxy"), "--tok_name", "other"])
    with pytest.raises(SystemExit, match="grid of \\(4, 4\\) ids, this TiTok 8 x 8"):
        train.main([*words, "--image_size", "32", "--stage", "proxy", "--proxy", str(tiny_run / "patches"), "--tok_name", "other"])


@pytest.mark.parametrize("task", ["segment", "depth"])
def test_maps_of_images_are_trained_drawn_and_measured(task, tiny_run, capsys, monkeypatch):
    train.main([*TINY, *RARELY, "--runs", str(tiny_run), "--task", task])
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
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tiny_run / f"shapes-vae-{task}"), "--device", "cpu"])
    with pytest.raises(SystemExit, match="a tokenizer of maps"):
        evaluate.main()
    sample.main([str(folder), "--n", "3", "--beam", "2"])
    assert (folder / "samples.png").stat().st_size > 0


def test_sample_draws_from_the_authors_files(tmp_path, monkeypatch, capsys):
    """--official and --vae: the tiny golden MAR, stretched to the 256 tokens of the tiny golden VAE."""
    _, sd = official_mar()
    for name in ("encoder_pos_embed_learned", "decoder_pos_embed_learned", "diffusion_pos_embed_learned"):
        extra = sd[name].shape[1] - 16
        sd[name] = torch.cat([sd[name][:, :extra], sd[name][:, extra:].repeat(1, 16, 1)], 1)
    torch.save({"model_ema": sd, "model": sd, "args": argparse.Namespace(lr=1)}, tmp_path / "mar_tiny.pth")
    torch.save({"model": official_vae()[0]}, tmp_path / "kl.ckpt")
    monkeypatch.setitem(mar.SIZES, "tiny golden", dict(n_embd=32, n_head=4))
    words = ["--official", str(tmp_path / "mar_tiny.pth"), "--vae", str(tmp_path / "kl.ckpt"), "--label", "7", "--n", "2", "--steps", "3",
             "--diffusion_steps", "3:1", "--out", str(tmp_path / "x.png"), "--npz", str(tmp_path / "x.npz")]
    sample.main(words)
    with np.load(tmp_path / "x.npz") as f:
        drawn, labels = f["arr_0"], f["labels"]
    assert drawn.shape[0] == 2 and drawn.shape[1] % 16 == 0 and drawn.std() > 1 and (labels == 7).all()
    model = mar.MAR.from_official(tmp_path / "mar_tiny.pth")
    torch.manual_seed(0)
    tokens = model.sample(
        torch.tensor([7, 7]), steps=3, **sample.DEFAULTS["mar-diffusion"], diffusion_steps=lambda p: round(3 - 2 * p))
    images = vae.VAE.from_official(official_vae()[0]).decode_raw(tokens / 0.2325).clamp(-1, 1)
    assert np.array_equal(drawn, data.to_uint8(images).permute(0, 2, 3, 1).numpy()), "not the authors' scale of tokens"
    for change, sentence in [({3: str(tmp_path / "no.ckpt")}, "no such file"), ({1: str(tmp_path / "kl.ckpt")}, "not the weights of a MAR"),
                             ({5: "10"}, "--class 10: the classes are")]:
        with pytest.raises(SystemExit, match=sentence):
            sample.main([change.get(i, w) for i, w in enumerate(words)])


def test_sample_draws_from_llamagens_files(tmp_path, monkeypatch, capsys):
    """--official and --vq: the tiny golden GPT (16 ids of 64) on the tiny golden tokenizer, whose grid is 4 x 4 at 8 pixels."""
    _, g, sd = llamagen("generate_c2i")
    tokenizer = vq_golden("vq")[1]
    torch.save({"model": sd, "args": argparse.Namespace(lr=1)}, tmp_path / "c2i.pt")
    torch.save({"model": tokenizer}, tmp_path / "vq.pt")
    monkeypatch.setitem(ar_transformer.SIZES, "tiny golden", dict(n_embd=32, n_head=4))
    label = int(g["in/cls"][1])
    words = ["--official", str(tmp_path / "c2i.pt"), "--vq", str(tmp_path / "vq.pt"), "--image_size", "8", "--label", str(label), "--n", "1",
             "--cfg", "3", "--top_k", "1", "--out", str(tmp_path / "x.png"), "--npz", str(tmp_path / "x.npz")]
    sample.main(words)
    with np.load(tmp_path / "x.npz") as f:
        drawn = f["arr_0"]
    truth = vq.VQ.from_official(tokenizer, 8).decode(g["out/tokens_cfg3.0_int-1"][1:2].long())
    assert np.array_equal(drawn, data.to_uint8(truth).permute(0, 2, 3, 1).numpy()), "not the picture of the authors' tokens"
    for change, sentence in [({3: "no.pt"}, "--vq no.pt: there is no such file"), ({1: str(tmp_path / "vq.pt")}, "--official .*missing"),
                             ({2: "--vae"}, "not an LDM-style autoencoder")]:
        with pytest.raises(SystemExit, match=sentence):
            sample.main([change.get(i, w) for i, w in enumerate(words)])


def test_sample_draws_from_titoks_files(tmp_path, monkeypatch, capsys):
    """--official and --titok: the tiny golden generator, 16 ids of 64, and a tokenizer of as many made fit for it."""
    g, (_, sd, _, _) = golden("tokenizers/imagebert_tiny"), titok_golden("vq_pixels")
    generator = {k.removeprefix("sd."): v for k, v in g.items() if k.startswith("sd.")}
    T, V = 16, 64
    for key in ("latent_tokens", "encoder.latent_token_positional_embedding", "decoder.latent_token_positional_embedding"):
        sd[key] = sd[key].repeat(-(-T // len(sd[key])), 1)[:T]
    table = sd["quantize.embedding.weight"]
    sd["quantize.embedding.weight"] = table.repeat(-(-V // len(table)), 1)[:V]
    torch.save(generator, tmp_path / "generator.bin")
    torch.save(sd, tmp_path / "tokenizer.bin")
    for cls in (maskgit.MaskGIT, titok.TiTok):              # 4 heads; the shapes do not tell
        monkeypatch.setattr(cls, "from_official", functools.partial(cls.from_official, n_head=4))
    words = ["--official", str(tmp_path / "generator.bin"), "--titok", str(tmp_path / "tokenizer.bin"), "--label", "3", "--n", "2",
             "--steps", "4", "--out", str(tmp_path / "x.png"), "--npz", str(tmp_path / "x.npz")]
    sample.main(words)
    with np.load(tmp_path / "x.npz") as f:
        drawn = f["arr_0"]
    model = maskgit.MaskGIT.from_official(generator)
    torch.manual_seed(0)
    tokens = model.sample_titok(torch.tensor([3, 3]), steps=4, cfg=4.5, temperature=9.5)
    truth = titok.TiTok.from_official(sd).decode(tokens)
    assert np.array_equal(drawn, data.to_uint8(truth).permute(0, 2, 3, 1).numpy())
    for extra, sentence in [(["--vq", "x"], "name its tokenizer"), (["--top_k", "3"], "--top_k: not for"),
                            (["--cfg_schedule", "power-cosine"], None)]:
        with pytest.raises(SystemExit, match=sentence) if sentence else contextlib.nullcontext():
            sample.main([*words, *extra])


def test_sample_draws_from_open_magvit2s_files(tmp_path, monkeypatch, capsys):
    """--official and --lfq: the tiny golden GPT (16 ids of 8 bits) and a tokenizer of random weights under the authors' keys."""
    _, g, sd = open_magvit2()
    torch.manual_seed(0)
    tokenizer = {f"{part}.{name}": 0.1 * torch.randn(shape) for part, name, shape in magvit_shapes(32, (1, 1, 2), 1, 8, False)}
    torch.save({"state_dict": {f"transformer.{k}": v for k, v in sd.items()}}, tmp_path / "gpt.ckpt")
    torch.save({"state_dict": tokenizer}, tmp_path / "tokenizer.ckpt")
    monkeypatch.setitem(ar_transformer.SIZES, "tiny golden", dict(n_embd=32, n_head=4))
    sample.main(["--official", str(tmp_path / "gpt.ckpt"), "--lfq", str(tmp_path / "tokenizer.ckpt"), "--image_size", "16", "--n", "1",
                 "--label", str(int(g["cfg_cls"][0])), "--cfg", str(g["cfg_scale"].item()), "--top_k", "1", "--npz",
                 str(tmp_path / "x.npz"), "--out", str(tmp_path / "x.png")])
    with np.load(tmp_path / "x.npz") as f:
        drawn = f["arr_0"]
    truth = lfq.LFQ.from_official(tokenizer, 16).decode((g["greedy_pre"] + 8 * g["greedy_post"])[:1].long())
    assert truth.std() > 0.05 and np.array_equal(drawn, data.to_uint8(truth).permute(0, 2, 3, 1).numpy())


def test_the_rule_that_judges_captions_reads_real_pictures():
    index = torch.arange(data.VAL_INDEX, data.VAL_INDEX + 60)
    images, s = data.draw(index, 32)[0], data.scene(index)
    told = evaluate.read_scene(images)
    assert (told["shape"] == s["label"]).float().mean() >= 0.97 and (told["colour"] == s["colour"]).float().mean() >= 0.97
    assert (told["background"] == s["background"]).all()
    assert (evaluate.read_scene(images.roll(1, 1))["colour"] == s["colour"]).float().mean() < 0.5, "other colours are not noticed"


@pytest.mark.parametrize("words, folder", [(IDS, "shapes-vq-text-ar-categorical"), ([], "shapes-vae-text-ar-gmm")])
def test_captions_are_trained_drawn_and_judged(words, folder, tiny_run, tmp_path, capsys, monkeypatch):
    train.main([*TINY, *RARELY, "--runs", str(tiny_run), "--condition", "text", *words])
    run = train.load_run(tiny_run / folder)
    assert run.args.text_len == max(len(t.encode()) for t in data.captions(torch.arange(200)))
    texts = ["a small red ring in the middle on a black background", "a large blue disc at the top on a dark red background " * 9]
    one, other = (sample.draw_captions(run, [t] * 4) for t in texts)
    assert one.shape == (4, 3, 16, 16) and torch.isfinite(one).all() and not torch.equal(one, other), "the caption has no effect"
    sample.main([str(tiny_run / folder), "--prompt", *texts, "--n", "6", "--out", str(tmp_path / "x.png"), "--npz", str(tmp_path / "x.npz")])
    with np.load(tmp_path / "x.npz") as f:
        assert f["arr_0"].shape == (6, 16, 16, 3) and list(f["texts"]) == [texts[0]] * 3 + [texts[1]] * 3
    unseen, wanted = evaluate.unseen_captions(run, 20)
    assert not set(unseen) & set(data.captions(torch.arange(200)))
    first = data.captions(torch.arange(data.VAL_INDEX, data.VAL_INDEX + 20))
    with monkeypatch.context() as m:                        # what was trained on is not asked for
        m.setattr(train, "captions_of", lambda *a: first)
        assert not set(evaluate.unseen_captions(run, 20)[0]) & set(first)
    for text, k, c in zip(unseen, wanted["shape"], wanted["colour"]):
        assert data.SHAPES[k] in text and list(data.COLOURS)[c] in text
    args = argparse.Namespace(n=20, seed=0, batch_size=20, cfg=None, temperature=None)
    rows = {key: value for key, _, value, _, _ in evaluate.measure_captions(args, run, "cpu")}
    assert all(0 <= v <= 100 for v in rows.values()) and rows["caption_all_three"] <= rows["caption_shape"]
    for words, sentence in [(["--class", "star"], "ask with --prompt"), (["--prompt"], "expected at least one")]:
        with pytest.raises(SystemExit, match=sentence if sentence[0] == "a" else None):
            sample.main([str(tiny_run / folder), *words])
    with pytest.raises(SystemExit, match="knows classes, not captions"):
        sample.main([str(tiny_run / "shapes-vae-ar-gmm"), "--prompt", "a star"])


@pytest.mark.parametrize("words", [[], ["--tokenizer", "vq", "--head", "categorical", "--tok_size", "fine", "--tok_name", "patches"]])
def test_editing_keeps_what_lies_outside_the_mask(words, tiny_run, tmp_path, capsys, monkeypatch):
    train.main([*TINY, *RARELY, *words, "--runs", str(tiny_run), "--generator", "maskgit", "--name", "edit", "--overwrite"])
    picture = tmp_path / "p.png"
    Image.fromarray(data.to_uint8(data.draw(torch.arange(1), 16)[0])[0].permute(1, 2, 0).numpy()).save(picture)
    seen, draw = {}, sample.draw_tokens
    monkeypatch.setattr(sample, "draw_tokens", lambda *a, **k: seen.update(k, drawn=draw(*a, **k)) or seen["drawn"])
    sample.main([str(tiny_run / "edit"), "--image", str(picture), "--mask", "right", "--n", "10", "--npz", str(tmp_path / "x.npz")])
    with np.load(tmp_path / "x.npz") as f:
        assert f["arr_0"].shape == (10, 16, 16, 3)
    T = 16 if words else 4
    side = math.isqrt(T)                                    # of the grid of tokens, 2 x 2 or 4 x 4
    left = (torch.arange(T) % side < side // 2)
    assert (seen["known_mask"] == left).all() and torch.equal(seen["drawn"][:, left], seen["known"][:, left])
    changed = (seen["drawn"] != seen["known"])[:, ~left].flatten(1)
    assert changed.any(1).all() and seen["drawn"][:, ~left].float().std(0).min() > 0
    grid = (4, 4)
    assert sample.parse_mask("right", grid).view(grid)[:, 2:].all() and sample.parse_mask("right", grid).sum() == 8
    assert sample.parse_mask("0,0,0.5,1", grid).view(grid)[:2].all() and sample.parse_mask("0,0,0.5,1", grid).sum() == 8
    assert sample.parse_mask("centre", grid).sum() == 4 and (~sample.parse_mask("border", grid)).sum() == 4
    Image.fromarray(np.kron(np.eye(4), np.ones((8, 8))).astype(np.uint8) * 255).save(tmp_path / "m.png")
    assert torch.equal(sample.parse_mask(str(tmp_path / "m.png"), grid).view(grid), torch.eye(4).bool())
    for words, sentence in [(["--image", picture, "--mask", "0,0,2"], "a box y0,x0,y1,x1"), (["--image", picture], "belong together"),
                            (["--image", tmp_path / "no.png", "--mask", "left"], "no such file"),
                            (["--image", picture, "--mask", "0,0,0.01,0.01"], "covers no token"),
                            (["--steps", "17"], f"only {T} tokens"), (["--beam", "2"], "--beam: not for --generator maskgit")]:
        with pytest.raises(SystemExit, match=sentence):
            sample.main([str(tiny_run / "edit"), *map(str, words)])


def test_compress_and_decompress_from_the_command_line(tiny_run, tmp_path, capsys, monkeypatch):
    words = ["--tokenizer", "lfq", "--head", "categorical", "--vocab_size", "64"]
    train.main([*TINY, *RARELY, *words, "--runs", str(tiny_run)])
    tok, ar = str(tiny_run / "shapes-lfq"), str(tiny_run / "shapes-lfq-ar-categorical")
    clip = data.to_uint8(data.draw_clips(torch.arange(1), 30, 3)[0][0].transpose(0, 1))
    a, b, c = (str(tmp_path / name) for name in ("a.webp", "b.lfq", "c.webp"))
    compression.write_clip(a, clip, 50)
    assert torch.equal(compression.read_clip(a)[0], clip)
    sizes = []
    for coder in ([], ["--entropy_coder", ar]):
        sample.main(["compress", a, b, "--run", tok, *coder])
        assert "3 x 30 x 30 pixels" in capsys.readouterr().out
        sizes.append(Path(b).stat().st_size)
        words = ["decompress", b, c, "--run", ar]           # a run of stage 2 has the tokenizer in it
        call("sample.py", *words) if coder else sample.main(words)                          # once in a process of its own
        back, ms = compression.read_clip(c)
        tokenizer = train.load_run(tok).tokenizer
        assert ms == 50 and torch.equal(back, compression.from_ids(tokenizer, *compression.to_ids(tokenizer, clip)))
    assert sizes[0] == 40 + 3 * 4 * 4 * 6 / 8 > sizes[1]    # the default LFQ has a stride of 8
    Path(tmp_path / "cut.lfq").write_bytes(Path(b).read_bytes()[:-1])
    monkeypatch.setitem(sys.modules, "av", None)
    for words, sentence in ((["decompress", tmp_path / "cut.lfq", c, "--run", tok], "cut.lfq: .*copy it again"),
                            (["decompress", b, c, "--run", tok], "name the run that coded it with --entropy_coder"),
                            (["decompress", b, tmp_path / "c.png", "--run", ar], "3 frames do not fit into a PNG"),
                            (["decompress", b, tmp_path / "c.mp4", "--run", ar], "pip install av"),
                            (["decompress", b, tmp_path / "c.xyz", "--run", ar], "ending must be"),
                            (["decompress", b, tmp_path / "no" / "c.gif", "--run", ar], "could not write"),
                            (["compress", a, b, "--run", tiny_run / "shapes-vae"], "--run .*ids"),
                            (["compress", a, b, "--run", tok, "--entropy_coder", tok], "--entropy_coder .*must be a run of --generator ar"),
                            (["compress", tok, b, "--run", tok], "no such file"),
                            (["compress", Path(tok) / "log.csv", b, "--run", tok], "not a readable image")):
        with pytest.raises(data.BadInput, match=sentence):
            sample.main([str(w) for w in words])


def test_samples_are_a_function_of_the_seed(tiny_run):
    run = train.load_run(tiny_run / "shapes-vae-ar-gmm")
    labels = torch.arange(10)
    a, b, c = (sample.draw_samples(run, labels, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.min() >= -1 and a.max() <= 1


def test_killed_twice_and_resumed_equals_uninterrupted_bit_for_bit(tiny_run, tmp_path):
    for stage, more in (("stage 1", []), ("stage 2", ["--resume"])):
        words = command("train.py", *TINY, "--runs", tmp_path, *more)
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=ENV)
        inside = False
        for line in process.stdout:
            inside = inside or line.startswith(stage)
            if inside and line.startswith("step     12"):
                process.send_signal(signal.SIGKILL)
                break
        process.wait(), process.stdout.close()
        assert inside and process.returncode == -signal.SIGKILL
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
    options = [*TINY, "--beta", "0", "--label_drop", "0", "--save_every", "24", "--eval_every", "24"]
    train.main([*options, "--runs", str(tmp_path / "one")])
    call("train.py", *options, "--runs", tmp_path / "two", torchrun=2)
    for name in ("shapes-vae", "shapes-vae-ar-gmm"):
        one, two = log_of(tmp_path / "one", name), log_of(tmp_path / "two", name)
        assert one.keys() == two.keys() and len(one) > 4
        assert all(abs(one[s] - two[s]) <= 2e-3 * (1 + abs(one[s])) for s in one), (name, one, two)


def test_two_processes_draw_what_one_draws(tiny_run, tmp_path, monkeypatch):
    """Under torchrun 28 images in batches of 8: each process draws two batches, the first alone writes and speaks."""
    options = [str(tiny_run / "shapes-vae-ar-gmm"), "--n", "28", "--batch_size", "8", "--device", "cpu"]
    files = lambda name: ["--npz", str(tmp_path / f"{name}.npz"), "--out", str(tmp_path / f"{name}.png")]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                # as many as torchrun's processes have: equal to the last bit
    try:
        sample.main([*options, *files("one")])
    finally:
        torch.set_num_threads(threads)
    assert call("sample.py", *options, *files("two"), torchrun=2).count("28 samples in") == 1
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert np.array_equal(one["arr_0"], two["arr_0"]) and np.array_equal(one["labels"], two["labels"])
    assert len(np.unique(one["arr_0"].reshape(28, -1), axis=0)) == 28                       # no batch twice
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    run, draw, drawn = train.load_run(options[0]), sample.draw_tokens, []
    monkeypatch.setattr(sample, "draw_tokens", lambda run, cond, *rest, **tricks: drawn.append(len(cond)) or draw(run, cond, *rest, **tricks))
    monkeypatch.setattr(sample.dist, "all_gather_object", lambda parts, mine: parts.__setitem__(slice(None), [mine, {}]))
    run.share = 1, 2
    sample.draw_samples(run, torch.arange(28) % 10, batch_size=8)
    assert drawn == [8, 4], "the second of two processes draws the second and the fourth batch, not those of the other"
    with pytest.raises(data.BadInput, match="without torchrun"):
        evaluate.report(SimpleNamespace(probe=True), (0, 2))


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
    (["--size", "gpt-b", "--generator", "maskgit"], "--generator maskgit has nano, tiny"),
])
def test_train_refuses_in_one_sentence(words, sentence, tmp_path, capsys):
    base = ["--tokenizer", "vae", "--head", "gmm", "--runs", str(tmp_path), "--n_shapes", "50"]
    with pytest.raises(SystemExit) as caught:
        train.main(base + words)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("ckpt.pt"))


def test_refusals_end_with_an_exit_code_and_no_traceback(tiny_run, tmp_path, capsys):
    folder = str(tiny_run / "shapes-vae-ar-gmm")
    for words, sentence in [(["train.py", *TINY, "--runs", tiny_run, "--beta", "0.5"], "--beta 0.5 does not fit .* --beta 0.02"),
                            (["sample.py", folder, "--class", "heart"], "the classes are disc"),
                            (["evaluate.py", folder, "--n", 3], "--n 3")]:
        out = call(*words, code=1)
        assert re.search(sentence, out) and "Traceback" not in out, out
    for program, words, sentence in [(sample, [tmp_path], "no ckpt.pt"), (train, ["--tokenizer", "vae", "--no_flag"], "unrecognized arguments"),
                                     (sample, [tiny_run / "shapes-vae"], "a tokenizer alone cannot draw")]:
        with pytest.raises(SystemExit) as caught:           # the interpreter prints its text and exits with 1
            program.main([str(w) for w in words])
        assert caught.value.code not in (0, None) and re.search(sentence, f"{caught.value} {capsys.readouterr().err}")


@pytest.mark.parametrize("words, sentence", [
    (["--tokenizer", "vae", "--head", "categorical"], "gives real vectors: use --head gmm"),
    (["--tokenizer", "vq", "--head", "gmm"], "gives ids: use --head categorical"),
    (["--tokenizer", "vq", "--adapter", "flow"], "--adapter: needs --tokenizer vae"),
    (["--tokenizer", "lfq", "--vocab_size", "1000"], "power of 2"), (["--tokenizer", "lfq", "--token_dim", "8"], "10 bits for 1024"),
    (["--tokenizer", "vae", "--vocab_size", "64"], "--vocab_size: is for"), (["--tokenizer", "vq", "--tokens", "8"], "--tokens: is for"),
    (["--tokenizer", "vq", "--stage", "proxy"], "--stage proxy: is for --tokenizer titok"), (["--tokenizer", "titok", "--proxy", "x"],
                                                                                            "goes with --stage"),
    (["--tokenizer", "titok", "--stage", "finetune"], "--proxy RUN"),
    (["--tokenizer", "vq", "--tok_size", "kl16"], "--tok_size kl16: --tokenizer vq has"),
    (["--tokenizer", "vq", "--condition", "text", "--generator", "mar"], "only --generator ar reads captions"),
    (["--tokenizer", "vq", "--condition", "text", "--flip"], "may say left or right"), (["--tokenizer", "vq", "--text_len", "9"], "goes with"),
    (["--tokenizer", "vae", "--gan_start", "5"], "go with --gan"), (["--tokenizer", "vae", "--lpips", "vgg.pth"], "gives it a weight"),
    (["--tokenizer", "vae", "--gan", "1", "--likelihood", "logistic"], "losses mean something else"),
    (["--tokenizer", "vae", "--gan", "-1"], "--gan -1.0: must not be negative")])
def test_what_cannot_work_together_is_refused(words, sentence, tmp_path):
    with pytest.raises(SystemExit, match=sentence):
        train.main([*words, "--runs", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_captions_and_their_encoder_are_asked_for_in_a_sentence(tiny_run, tmp_path, monkeypatch):
    pictures = tmp_path / "pictures"
    for split in ("train", "val"):
        (pictures / split / "a").mkdir(parents=True)
        words = [*TINY, "--runs", str(tmp_path), "--data", str(pictures), "--condition", "text"]
        if split == "val":
            with pytest.raises(SystemExit, match="no images in val/, which is for validation"):
                train.main(words)
        for i in range(4):
            Image.fromarray(np.full((16, 16, 3), 60 * i, np.uint8)).save(pictures / split / "a" / f"{i}.png")
    with pytest.raises(SystemExit, match="write NAME.txt beside NAME.jpg"):
        train.main(words)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="pip install transformers"):
        train.main([*TINY, *RARELY, "--runs", str(tiny_run), "--condition", "text", "--text_encoder", "t5-small", "--name", "t5"])


@pytest.mark.parametrize("name", ["vae", "vq", "lfq", "titok", "titok-vae"])
def test_the_adversarial_losses_go_around_every_tokenizer(name):
    args = argparse.Namespace(**train.DEFAULTS["any"] | train.DEFAULTS["cpu"] | train.DEFAULTS.get(f"any-{name}", {}), token_dim=None)
    args.tokenizer = name
    tokenizer = train.build_tokenizer(args)
    model = perceptual_gan.AdversarialTokenizer(tokenizer, perceptual_gan.PatchCritic.for_images(32), start=0, adaptive=True)
    images = data.draw(torch.arange(4))[0]
    loss, logs = model(images)
    loss.backward()
    assert torch.isfinite(loss) and 0 < logs["adaptive"] < 1e4
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.critic.parameters())
    assert tokenizer.get_parameter(model.last_layer).grad.abs().sum() > 0
    assert model.decode(model.encode(images)).shape == images.shape


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


# Clips: --frames, through all programs

CLIPS = [*TINY, "--tokenizer", "lfq", "--head", "categorical", "--generator", "maskgit", "--frames", "5", "--image_size", "8", "--vocab_size",
         "16", "--n_shapes", "60", "--tok_steps", "12", "--tok_batch_size", "4", "--steps", "8", "--batch_size", "4"]


def grey_clip(path, n, first=0):
    """A clip whose frame t is grey of level 10 (first + t), so that a pixel tells which frame it was: .gif, .webp or a folder."""
    pictures = [Image.new("RGB", (20, 12), (10 * (first + t),) * 3) for t in range(n)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix:
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=50, lossless=True)
        return
    path.mkdir()
    for t, picture in enumerate(pictures):
        picture.save(path / f"frame{t}.png")                # frame10 comes before frame2 in the alphabet


def frame_numbers(image_set):
    """What grey_clip() wrote, read back -> list of lists, a row per clip."""
    assert (image_set.images == image_set.images[:, :1, :, :1, :1]).all()
    return (image_set.images[:, 0, :, 0, 0] / 10).round().int().tolist()


def test_clips_are_read_from_animations_folders_and_films(tmp_path, monkeypatch, capsys):
    tree = tmp_path / "d"
    grey_clip(tree / "train" / "left" / "a.gif", 5), grey_clip(tree / "train" / "left" / "b.webp", 9)
    grey_clip(tree / "train" / "right" / "c", 12), grey_clip(tree / "val" / "left" / "v", 5), grey_clip(tree / "val" / "right" / "w.gif", 6)
    (tree / "train" / "left" / "notes.txt").write_text("no clip")
    s = data.load(str(tree), 8, frames=5)
    assert s.images.shape == (3, 3, 5, 8, 8) and s.images.dtype == torch.uint8 and s.frames == 5
    assert s.classes == ["left", "right"] and s.labels.tolist() == [0, 0, 1]
    assert frame_numbers(s) == [[0, 1, 2, 3, 4], [0, 2, 4, 6, 8], [0, 3, 6, 8, 11]]         # spread over the whole file
    x, labels = s.batch(torch.tensor([2, 0]))
    assert x.shape == (2, 3, 5, 8, 8) and labels.tolist() == [1, 0] and (data.to_uint8(x) == s.images[[2, 0]]).all()
    assert frame_numbers(data.load(str(tree), 8, "val", frames=5)) == [[0, 1, 2, 3, 4], [0, 1, 2, 4, 5]]
    windows = data.load(str(tree), 8, frames=2, frame_step=2)
    assert frame_numbers(windows) == [[0, 2], [0, 2], [4, 6], [0, 2], [4, 6], [8, 10]] and windows.labels.tolist() == [0] * 3 + [1] * 3
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as z:
        for f in tree.rglob("*.*"):
            z.write(f, f.relative_to(tree))
    assert torch.equal(data.load(str(tmp_path / "d.zip"), 8, frames=5).images, s.images)

    def refused(words, **options):
        with pytest.raises(data.BadInput, match=words) as caught:
            data.load(str(tree), 8, **dict(frames=5) | options)
        assert "\n" not in str(caught.value)
    refused("left/a.gif: has 5 frames, fewer than --frames 9", frames=9)
    refused("left/a.gif: has 3 frames with --frame_step 2", frame_step=2)
    assert len(data.load(str(tree), 8, frames=9, skip_bad=True)) == 2 and "left out 1 clips" in capsys.readouterr().out
    refused("a class is empty", frames=10, skip_bad=True)
    refused("more clips .* than fit into memory", max_bytes=2000)
    broken = tree / "train" / "left" / "z.gif"
    broken.write_bytes((tree / "train" / "left" / "a.gif").read_bytes()[:20])
    refused("left/z.gif: not a readable clip")
    assert len(data.load(str(tree), 8, frames=5, skip_bad=True)) == 3
    broken.unlink(), Image.new("RGB", (8, 8)).save(tree / "train" / "right" / "x.png")
    refused("train/right lies in no class folder.* is a folder in there")
    (tree / "train" / "right" / "x.png").unlink(), (tree / "train" / "right" / "y.mp4").write_bytes(b"film")
    monkeypatch.setitem(sys.modules, "av", None)
    refused("y.mp4: .* pip install av", skip_bad=True)

    class Film:                                             # what the programs ask of av
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def decode(self, video):
            picture = argparse.Namespace(to_image=lambda: Image.new("RGB", (9, 9), (30, 30, 30)))
            return iter([picture] * 7)
    monkeypatch.setitem(sys.modules, "av", argparse.Namespace(open=lambda content: Film() if content.read() == b"film" else None))
    assert frame_numbers(data.load(str(tree), 8, frames=5))[-1] == [3] * 5
    np.savez(tmp_path / "x.npz", images=np.zeros((20, 8, 8, 3), np.uint8), labels=np.zeros(20))
    with pytest.raises(data.BadInput, match="not from an .npz"):
        data.load(str(tmp_path / "x.npz"), 8, frames=5)


def test_drawn_clips_are_those_of_draw_clips_and_val_is_another_set():
    s, val = (data.load("shapes", 8, split, seed=3, n_shapes=500, frames=9) for split in ("train", "val"))
    index = torch.tensor([0, 221, 222, 499])                # from several of the parts they are drawn in
    x, actions, _ = data.draw_clips(index, 8, 9, seed=3)
    assert s.images.shape == (500, 3, 9, 8, 8) and torch.equal(s.images[index], data.to_uint8(x))
    assert torch.equal(s.labels[index], actions) and s.classes == list(data.ACTIONS)
    assert torch.equal(val.images[:2], data.to_uint8(data.draw_clips(data.VAL_INDEX + torch.arange(2), 8, 9, seed=3)[0]))


def test_stills_are_frames_of_the_clips_in_half_of_the_batches():
    clips = data.load("shapes", 8, n_shapes=40, frames=9)
    source, index, kinds = train.Stills(clips), torch.tensor([7, 3]), []
    for seed in range(200):
        torch.manual_seed(seed)
        x, labels = source.batch(index)
        kinds.append(x.ndim)
        if x.ndim == 5:
            assert torch.equal(x, clips.batch(index)[0])
            continue
        assert x.shape == (8, 3, 8, 8) and torch.equal(labels, clips.labels[index].repeat_interleave(4))
        for i, still in enumerate(x):
            assert (still[:, None] == clips.batch(index)[0][i // 4]).all(0).all((1, 2)).any(), "no frame of its clip"
    assert len(source) == 40 and 75 < kinds.count(4) < 125
    a, b = (torch.manual_seed(kinds.index(4)) and source.batch(index)[0] for _ in range(2))
    assert torch.equal(a, b)                                # a function of the seed of the step: --resume goes on as it was


@pytest.fixture(scope="session")
def clip_run(tmp_path_factory):
    """A tiny run on clips -> its runs folder."""
    runs = tmp_path_factory.mktemp("clips")
    train.main([*CLIPS, "--runs", str(runs)])
    return runs


def test_clips_are_trained_drawn_and_continued(clip_run, tmp_path, capsys):
    folder = clip_run / "shapes-lfq-5f-maskgit-categorical"
    for name in ("shapes-lfq-5f/reconstructions.png", f"{folder.name}/samples.png", f"{folder.name}/curve.png"):
        assert (clip_run / name).stat().st_size > 0
    run = train.load_run(folder)
    assert run.tokenizer.grid == (2, 2, 2) and run.args.frames == 5 and run.classes == list(data.ACTIONS)
    words = ["--out", str(tmp_path / "x.png"), "--gif", "--npz", str(tmp_path / "x.npz")]
    sample.main([str(folder), "--n", "20", *words])
    with np.load(tmp_path / "x.npz") as f:
        drawn, labels = f["arr_0"], f["labels"]
    assert drawn.shape == (20, 5, 8, 8, 3) and drawn.dtype == np.uint8 and (np.bincount(labels) == 2).all()
    assert np.array_equal(drawn, data.to_uint8(sample.draw_samples(run, torch.from_numpy(labels))).permute(0, 2, 3, 4, 1).numpy())
    assert Image.open(tmp_path / "x.gif").n_frames == 5 and Image.open(tmp_path / "x.png").height > 400
    sample.main([str(folder), "--known_frames", "1", "--class", "blinks", "--n", "3", *words])
    with np.load(tmp_path / "x.npz") as f:
        assert f["arr_0"].shape == (3, 5, 8, 8, 3) and (f["labels"] == data.ACTIONS.index("blinks")).all()
    grey_clip(tmp_path / "own.gif", 7)
    sample.main([str(folder), "--known_frames", "1", "--image", str(tmp_path / "own.gif"), *words])
    assert "1 clips in" in capsys.readouterr().out and Image.open(tmp_path / "x.gif").n_frames == 5
    for more, sentence in [(["--known_frames", "3"], "--known_frames 3: .* to draw: 1"), (["--known_frames", "5"], "to draw: 1"),
                           (["--image", "x.gif", "--mask", "left"], "continued, not repainted"),
                           (["--image", str(tmp_path / "no.gif"), "--known_frames", "1"], "no such file")]:
        with pytest.raises(SystemExit, match=sentence):
            sample.main([str(folder), *more])


@pytest.mark.parametrize("generator", ["maskgit", "ar"])
def test_given_frames_stay_and_nothing_later_is_looked_at(generator, clip_run, capsys):
    """9 frames of 4 + 4 + 4 tokens, the model of any weights: the tokens of the first 5 are given."""
    train.main([*CLIPS, "--runs", str(clip_run), "--frames", "9", "--generator", generator])
    run = train.load_run(clip_run / f"shapes-lfq-9f-{generator}-categorical")
    clips = data.draw_clips(torch.arange(6), 8, 9)[0]
    assert [sample.known_tokens(run, n) for n in (1, 5)] == [4, 8]
    drawn, whole = sample.predict(run, clips, 5, seed=1), run.tokenizer.decode(run.tokenizer.encode(clips))
    assert drawn.shape == clips.shape and torch.allclose(drawn[:, :, :5], whole[:, :, :5], atol=1e-5)
    assert (drawn[:, :, 5:] - whole[:, :, 5:]).abs().max() > 0.01, "nothing was drawn"
    other = torch.cat([clips[:, :, :5], -clips[:, :, 5:]], 2)
    assert torch.equal(sample.predict(run, other, 5, seed=1), drawn), "it looked at the frames it is to predict"
    assert not torch.equal(sample.predict(run, clips, 5, seed=2), drawn)


def test_clips_are_measured(clip_run, capsys, monkeypatch):
    monkeypatch.setattr(evaluate.train_classifier, "__defaults__", (0, 12, 32, 4e-3))
    folder = clip_run / "shapes-lfq-5f-maskgit-categorical"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(folder), "--n", "20", "--device", "cpu"])
    evaluate.main()
    out, metrics = capsys.readouterr().out, evaluate.json.loads((folder / "metrics.json").read_text())
    for key in ("recon_psnr_db", "recon_image_psnr_db", "recon_accuracy", "codebook_usage", "sample_accuracy", "sample_frechet_small_cnn",
                "sample_frechet_frames", "floor_frechet_frames", "prediction_accuracy", "prediction_psnr_still_db", "val_loss"):
        assert math.isfinite(metrics[key]), key
    assert "Frechet distance over clips (small CNN)" in out and "FVD" not in out and "action accuracy, samples" in out
    assert metrics["floor_frechet_frames"] < metrics["sample_frechet_frames"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(folder), "--probe", "--device", "cpu"])
    evaluate.main()
    metrics = evaluate.json.loads((folder / "metrics.json").read_text())
    assert {"probe_pixels", "probe_token_bits", "probe_layer_4", "sample_accuracy"} <= metrics.keys()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(folder), "--fid", "--device", "cpu"])
    with pytest.raises(SystemExit, match="--fid: is of images"):
        evaluate.main()


def test_numbers_of_clips_are_those_of_their_frames(monkeypatch):
    clips, actions, shapes = data.draw_clips(torch.arange(12), 8, 9)
    net = evaluate.SmallCNN(10).eval()
    one_by_one = torch.stack([net.features(clip[:, t][None])[0] for clip in clips for t in range(9)])
    close(evaluate.features_of_frames(net, clips, 30), one_by_one)
    run = argparse.Namespace(args=argparse.Namespace(data="shapes", seed=0))
    stills = evaluate.single_frames(run, data.load("shapes", 8, n_shapes=12, frames=9), "train")
    assert torch.equal(stills.labels, shapes.repeat_interleave(4)) and stills.frames == 1
    assert torch.equal(stills.images.view(12, 4, 3, 8, 8)[5, 3], data.to_uint8(clips[5, :, -1]))
    # A prediction that is right: its PSNR is the largest there is. One that stands still: the last frame that was given.
    monkeypatch.setattr(sample, "predict", lambda run, clips, n, **options: clips)
    run.tokenizer = argparse.Namespace(time_stride=4)
    ruler = evaluate.ClipCNN(10).eval()
    rows = {row[0]: row[2] for row in evaluate.measure_prediction(run, ruler, clips, actions)}
    assert rows["prediction_accuracy"] == pytest.approx(100 * (evaluate.look(ruler, clips)[1] == actions).float().mean().item())
    error = [[(clip[:, t] - clip[:, 4]).square().mean().clamp(min=1e-10) for t in range(5, 9)] for clip in clips]
    assert rows["prediction_psnr_still_db"] == pytest.approx((10 * torch.log10(4 / torch.tensor(error))).mean().item(), abs=1e-3)
    assert rows["prediction_psnr_db"] == pytest.approx(10 * math.log10(4e10), abs=1e-3)


def test_a_video_tokenizer_begins_as_the_image_tokenizer(tmp_path, capsys):
    words = [w for w in CLIPS if w not in ("--frames", "5")] + ["--generator", "none", "--runs", str(tmp_path), "--tok_size", "clips"]
    train.main([*words, "--n_shapes", "40"])
    train.main([*words, "--n_shapes", "40", "--frames", "5", "--inflate", str(tmp_path / "shapes-lfq"), "--tok_steps", "1", "--tok_lr", "1e-9"])
    image, video = (train.load_run(tmp_path / name).tokenizer for name in ("shapes-lfq", "shapes-lfq-5f"))
    x = data.draw(torch.arange(8), 8)[0]
    assert (image.encode(x) == video.encode(x)).float().mean() > 0.99 and (video.decode(video.encode(x)) - image.decode(image.encode(x))).abs().max() < 0.1
    assert train.read_checkpoint(tmp_path / "shapes-lfq-5f")["flags"]["inflate"] == str(tmp_path / "shapes-lfq")
    for more, sentence in [(["--vocab_size", "32"], "its sizes are others; .*--vocab_size .16."), (["--inflate", str(tmp_path / "x")], "no ckpt.pt")]:
        with pytest.raises(SystemExit, match=sentence):
            train.main([*words, "--frames", "9", "--inflate", str(tmp_path / "shapes-lfq"), *more])


@pytest.mark.parametrize("words, sentence", [
    (["--tokenizer", "vae"], "--frames 17: only --tokenizer lfq reads clips"), (["--frames", "18"], "--frames 18 .*so 17 or 21"),
    (["--condition", "text", "--generator", "ar"], "asked for by their action"), (["--flip"], "moves left moves right"),
    (["--perceptual", "1"], "give --lpips"), (["--frame_step", "2"], "is for your own clips"),
    (["--frames", "1", "--frame_step", "2", "--data", "x"], "--frame_step: is for clips"), (["--frames", "1", "--inflate", "x"], "--inflate: is for clips"),
    (["--n_shapes", "2000000000"], "do not fit into memory"), (["--data", "nowhere"], "no such file or folder")])
def test_what_clips_do_not_go_with_is_refused(words, sentence, tmp_path):
    with pytest.raises(SystemExit, match=sentence):
        train.main(["--tokenizer", "lfq", "--generator", "maskgit", "--frames", "17", "--runs", str(tmp_path), "--device", "cpu", *words])
    assert not list(tmp_path.rglob("ckpt.pt"))


def test_strips_and_moving_pictures_show_the_frames_they_should(tmp_path):
    clip = torch.linspace(-1, 1, 17)[None, :, None, None].expand(3, 17, 8, 8)               # ever brighter
    strip = data.film(clip)
    assert strip.shape == (9, 3, 8, 8) and torch.allclose(strip[:, 0, 0, 0], clip[0, ::2, 0, 0])
    edge = data.film(clip, given=5)[:, :, 0, 0]
    assert edge.shape == (9, 3) and (edge[:3, 0] < 0).all() and (edge[:3, 1] > 0).all() and (edge[3:] == 1).all()     # frames 0, 2, 4
    assert torch.allclose(data.film(clip, given=5)[:, 0, 20, 20], strip[:, 0, 0, 0])
    data.save_clips(tmp_path / "x.gif", clip[None].repeat(4, 1, 1, 1, 1), 2, ("a", "b"))
    with Image.open(tmp_path / "x.gif") as animation:
        assert animation.n_frames == 17
        for t in (0, 8, 16):
            animation.seek(t)
            picture = np.array(animation.convert("RGB"))
            assert abs(int(picture[10, -10, 0]) - int(data.to_uint8(clip[0, t, 0, 0]))) <= 4


def test_places_in_time_and_space_are_told_apart():
    """A clip's grid has three axes: RoPE turns with the difference in each of them, and Halton's order visits all tokens."""
    grid, q, k = (3, 4, 2), torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)
    table = ar_transformer.rope_table(grid, 32, 1)[1:].view(*grid, 16, 2)
    score = lambda a, b: (ar_transformer.rotate(q, table[a][None]) * ar_transformer.rotate(k, table[b][None])).sum()
    assert torch.allclose(score((0, 1, 0), (1, 3, 1)), score((1, 0, 0), (2, 2, 1)), atol=1e-4)
    base = score((0, 0, 0), (0, 0, 0))
    assert all((score((0, 0, 0), place) - base).abs() > 1e-3 for place in [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
    rank = maskgit.halton_rank(grid)
    assert sorted(rank.tolist()) == list(range(24))
    assert len({int(t) // 8 for t in rank.argsort()[:3]}) > 1, "the first tokens all lie in one frame"


# experiments/claims.py: the list, the rule, the table

def test_claims_are_listed_once_and_judged_by_the_rule(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import claims
    claims.main(["--out", str(tmp_path)])
    listed = capsys.readouterr().out.strip("\n").split("\n")
    assert [int(line[:2]) for line in listed] == list(range(1, 24)) and all("not run" in line for line in listed)
    with pytest.raises(data.BadInput, match="not a claim"):
        claims.main(["no-such-claim"])
    # mean 1, standard error 0.289 (std 0.5 / sqrt 3): beyond two of them; 0.9 is the mean of a wider spread, 0.586
    assert claims.decide([0.5, 1.0, 1.5]) == "holds" and claims.decide([-0.5, -1.0, -1.5]) == "does not hold"
    assert claims.decide([0.0, 0.7, 2.0]) == "undecided here" and claims.decide([9.0]) == "undecided here"
    arms = {"new": [dict(error=e) for e in (1.0, 1.2, 1.4)], "old": [dict(error=e) for e in (1.05, 1.25, 1.46)]}
    verdict = lambda *words, **options: claims.judge_test(claims.test("error", *words, **options), arms)["verdict"]
    assert verdict("new", "old") == "holds" and verdict("old", "new") == "does not hold"       # paired: 0.05 at each seed
    assert verdict("old", "new", times=1.1) == "holds" and verdict("old", "new", give=0.1) == "holds"
    assert verdict("new", "old", "higher") == "does not hold" and verdict("new", "old", "higher", give=0.1) == "holds"
    assert verdict("new", "old", every=True) == "holds" and verdict("new", "old", give=-0.055, every=True) == "does not hold"
    claim = lambda *verdicts: claims.judge_claim([dict(verdict=v) for v in verdicts])
    assert claim("holds", "holds") == "holds" and claim("holds", "undecided here") == "undecided here"
    assert claim("holds", "undecided here", "does not hold") == "does not hold"
    tests = [claims.judge_test(claims.test("error", "new", "old"), arms)]
    (tmp_path / "few-steps.json").write_text(json.dumps(dict(tests=tests, verdict="holds")))
    text = claims.table(tmp_path)
    assert "error of the mean / sigma: new 1.2 +- 0.2, lower than old 1.3 +- 0.2: holds" in text
    assert "**holds (1 of 1 tests hold)**" in text and "Not run: 1 (`gmm-components`)" in text and "`few-steps`" not in text
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- claims -->\nold\n<!-- /claims -->\nafter\n")
    claims.fill_readme(readme, text)
    assert readme.read_text() == f"before\n<!-- claims -->\n{text}\n<!-- /claims -->\nafter\n"
    readme.write_text("no markers")
    with pytest.raises(data.BadInput, match="markers"):
        claims.fill_readme(readme, text)


def test_a_claim_runs_from_its_flags_to_a_verdict_and_remembers(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import claims
    for module, name in ((data, "save_rows"), (train, "save_samples"), (train.Log, "plot"), (train, "load_once")):
        monkeypatch.setattr(module, name, getattr(module, name))                            # claims.Lab replaces them
    monkeypatch.setattr(evaluate.train_classifier, "__defaults__", (0, 12, 32, 4e-3))
    monkeypatch.setitem(claims.SCALE, "cpu", claims.SCALE["cpu"] | dict(n_shapes=64, tok_steps=2, steps=2, batch_size=8, n=20))
    words = ["vqvae-prior", "--seeds", "0", "1", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path), "--device", "cpu"]
    claims.main(words)
    first, out = json.loads((tmp_path / "vqvae-prior.json").read_text()), capsys.readouterr().out
    assert (tmp_path / "vqvae-prior.png").stat().st_size > 0 and first["seeds"] == [0, 1] and first["seconds"] > 0
    assert out.count("done in") == 4 and [len(rows) for rows in first["arms"].values()] == [2, 2, 2]
    for t in first["tests"]:
        values = [[row["frechet"] for row in first["arms"][t[k]]] for k in ("arm", "other")]
        assert t["values"] == values[0] and t["advantage"] == pytest.approx(sum(values[1]) / 2 - sum(values[0]) / 2)
        assert t["verdict"] == claims.decide([y - x for x, y in zip(*values)])
    claims.main(words)
    again = json.loads((tmp_path / "vqvae-prior.json").read_text())
    assert "done in" not in capsys.readouterr().out and again == first, "what was measured is not measured again"


@pytest.mark.parametrize("block", [1, 2])
def test_blocks_of_pixels_lose_no_pixel(block, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import claims
    images = 255 * torch.randint(2, (5, 3, 28, 28), dtype=torch.uint8)                      # black or white: nothing is drawn
    ids, labels = claims.Binary(images, False, block).batch(torch.tensor([3, 1]))
    assert ids.shape == (2, (28 // block) ** 2) and ids.max() < 1 << block**2 and not labels.any()
    for image, row in zip(images[[3, 1], 0] // 255, ids.view(2, 28 // block, -1)):
        for y, x in [(y, x) for y in range(28) for x in range(28)]:
            bit = row[y // block, x // block] >> (y % block * block + x % block) & 1
            assert bit == image[y, x], f"pixel {y}, {x}"


def test_gmm_comes_within_two_percent_of_25_gaussians(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import claims
    found = claims.excess_of_head("grid25", 0, 1000)
    assert 0 < found["excess"] < 2, f"{found['excess']:.2f}% of a nat above the truth on the same points"


# ---------------------------------------------------------------------------------------------------
# Experiments on clips: experiments/video_designs.py and experiments/understanding.py

def test_designs_of_video_tokenizers_are_causal_and_of_equal_size(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import video_designs as v
    models = {design: v.tokenizer(design) for design in v.DESIGNS}
    sizes = {design: v.size_of(m) for design, m in models.items()}
    assert max(sizes.values()) < 1.04 * sizes["causal 3-D CNN"] and min(sizes.values()) > 0.96 * sizes["causal 3-D CNN"], sizes
    x = torch.rand(1, 3, 9, 16, 16)
    assert torch.equal(v.unpatch(v.patches(x[:, :, 1:], 4), 4), x[:, :, 1:])
    q = lfq.codes(torch.randint(1024, (1, 3, 4, 4)), 10).permute(0, 4, 1, 2, 3)
    for design, model in models.items():
        for p in model.parameters():                        # blocks that start as the identity would hide a leak
            if not p.any():
                nn.init.normal_(p, std=0.1)
        with torch.no_grad():
            z, y = model.encoder(x), model.decoder(q)
            assert z.shape == q.shape and y.shape == x.shape, design
            for t in (1, 4, 5, 8):                          # frames 1 .. 4 are in the second frame of tokens
                other, f = x.clone(), (t + 3) // 4
                other[:, :, t] = torch.rand(1, 3, 16, 16)
                moved = (model.encoder(other) - z).abs().amax((0, 1, 3, 4))
                assert moved[:f].max() == 0 and moved[f] > 1e-5, (design, t, moved)
            other = q.clone()
            other[:, :, 2] *= -1
            moved = (model.decoder(other) - y).abs().amax((0, 1, 3, 4))
            assert moved[:5].max() == 0 and moved[5:].min() > 1e-5, (design, moved)


def test_readers_of_clips_see_what_they_should(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import understanding as u
    clip = torch.rand(1, 3, 9, 16, 16)
    other = clip.clone()
    other[:, :, 6, 4:8, 12:16] += 1                         # frame 6: the third frame of tokens; second row, last column
    assert (u.places(other) != u.places(clip)).any(-1)[0].nonzero().flatten().tolist() == [2 * 16 + 1 * 4 + 3]
    reader = u.Reader(nn.Linear(192, 64), 48)
    x, hide = torch.rand(2, 48, 192), torch.rand(2, 48) < 0.6
    changed = torch.where(hide[..., None], torch.rand(2, 48, 192), x)
    assert torch.equal(reader.states(x, hide), reader.states(changed, hide)), "what is hidden can be seen"
    model = u.VQClips(**u.SIZE).eval()
    ids = model.encode(clip)
    assert torch.allclose(model.decode(ids), model.reconstruct(clip)[0].clamp(-1, 1), atol=1e-5)
    assert torch.cdist(F.normalize(model.latents(clip)[0], dim=-1), model.quantizer.codebook).argmin(-1).equal(ids[0])


def test_experiments_on_clips_run(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import understanding
    import video_designs
    io_ = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    video_designs.main(["--seeds", "0", "--steps", "1", "--n", "72", "--ruler_steps", "2", *io_])
    rows = json.loads((tmp_path / "video-designs.json").read_text())["rows"]
    assert [r["design"] for r in rows] == list(video_designs.DESIGNS)
    assert all(math.isfinite(v) for r in rows for v in r.values() if isinstance(v, float))
    understanding.main(["--n", "60", "--tok_steps", "1", "--steps", "2", "--pre_steps", "1", "--labels", "20", "--seeds", "0", *io_])
    result = json.loads((tmp_path / "understanding.json").read_text())["accuracy"]
    assert len(result["input"]) == 5 and len(result["target"]) == 4
    assert (tmp_path / "video-designs.png").exists() and (tmp_path / "understanding.png").exists()


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


SHAPES = dict(channels=3, B=3, T=16, D=4, V=64, C=32, K=5, H=16, W=16, S=6, N=7, bits=6, n_head=4, d=8, head_dim=8, P=1)


def told(doc):
    """The shapes that a docstring tells, (inputs, outputs): what stands in brackets before and after its first arrow."""
    doc = re.sub(r"\[, D\]", "", doc.replace("...", "5, 7")).split("\n\n")[0]
    before, after = re.split("->", doc, maxsplit=1)
    def shapes(text):
        found = []
        for inside in re.findall(r"(?<!\w)\(([\w\s,/+*^-]*)\)", text):
            inside = re.sub(r"(\d)([A-Z])", r"\1 * \2", inside).replace("/", "//").replace("^", "**")
            try:
                found.append(tuple(eval(f"[{inside}]", {}, dict(SHAPES))))
            except (NameError, SyntaxError, TypeError):     # words in brackets
                continue
        return found
    return shapes(before), shapes(after)


def test_shapes_are_as_the_docstrings_tell():
    """Inputs are made in the shapes told before the arrow; what comes back must have those told after it."""
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    ids, real, labels = torch.randint(64, (3, 16)), torch.randn(3, 16, 4), torch.arange(3)
    mask = torch.rand(3, 16) < 0.5
    vae_ = vae.VAE(image_size=16, token_dim=4, ch=8, ch_mult=(1, 1, 1), n_res=1, groups=4).eval()
    tokenizers = [vq.VQ(image_size=16, vocab_size=64, code_dim=4, ch=8, ch_mult=(1, 1, 1), n_res=1, z_channels=8, groups=4).eval(),
                  lfq.LFQ(image_size=16, bits=6, ch=8, ch_mult=(1, 1, 1), n_res=1, groups=4).eval(),
                  titok.TiTok(image_size=16, n_tokens=16, vocab_size=64, code_dim=4, enc=(32, 1, 4), dec=(32, 1, 4)).eval()]
    size = dict(n_layer=2, n_head=4, n_embd=32)
    of = lambda cls, head: cls(head(32, 64), 16, 3, vocab_size=64, grid=(4, 4), **size).eval()
    ar, mg, mr = (of(m, m_.CategoricalHead) for m, m_ in ((ar_transformer.ARTransformer, ar_transformer), (maskgit.MaskGIT, maskgit),
                                                          (mar.MAR, mar)))
    gmm, diffusion = gmm_head.GMMHead(32, 4, 5), diffusion_head.DiffusionHead(32, 4, 16, 1)
    flow = flow_adapter.FlowAdapter(4, (4, 4))
    h, x, some = torch.randn(5, 7, 32), torch.randn(5, 7, 4), torch.randint(64, (5, 7))
    q = torch.randn(3, 4, 6, 8)
    calls = [(vae_.posterior, images), (vae_.encode, images), (vae_.decode, real), (vae_.decode_raw, real), (vae_.kl, real, real.exp()),
             (vae_.reparameterise, real, real.exp()), *[(t.encode, images) for t in tokenizers], *[(t.decode, ids) for t in tokenizers],
             *[(t.latents, images) for t in tokenizers[:2]], (tokenizers[0].quantizer.codes, ids), (tokenizers[0].quantizer.nearest, real),
             (lfq.quantize, torch.randn(5, 7, 6)), (lfq.codes, some, 6), (lfq.entropy_of_mean, torch.randn(7, 6), 0.1),
             (flow.forward, real), (flow.inverse, real), (gmm.mixture, h), (gmm.log_prob, h, x), (gmm.loss, h, x), (gmm.sample, h),
             (diffusion.loss, h, x), (diffusion.sample, h), (ar.head.loss, h, some), (ar.head.sample, h),
             (ar.hidden, ids, labels), (ar.logits, ids, labels), (ar.sample, labels), (ar.beam_search, labels, 2, 2),
             (mg.hidden, ids, labels, mask), (mg.logits, ids, labels, mask), (mg.sample, labels), (mg.sample_titok, labels),
             (mg.training_mask, 3, "cpu"), (mr.hidden, ids, labels, mask), (mr.sample, labels), (ar_transformer.attention, q, q, q)]
    for f, *inputs in calls:
        before, after = told(f.__doc__)
        given = [tuple(v.shape) for v in inputs if isinstance(v, torch.Tensor)]
        name = getattr(f, "__qualname__", f)
        assert not before or before[:len(given)] == given[:len(before)], f"{name} is given {given}, its docstring says {before}"
        out = f(*inputs)
        out = [tuple(v.shape) for v in (out if isinstance(out, tuple) else (out,)) if isinstance(v, torch.Tensor)]
        if "each" in f.__doc__.split("\n\n")[0]:
            after = after[:1] * len(out)
        assert after[:len(out)] == out, f"{name} gives {out}, its docstring says {after}"


def test_readme_tells_the_length_of_every_file():
    told_lines = dict(re.findall(r"\| `(\w+\.py)` \|[^|]*\| (\d+) \|", (ROOT / "README.md").read_text()))
    assert len(told_lines) == len(MODELS) + 1
    for name, n in told_lines.items():
        true = (ROOT / name).read_text().count("\n")
        assert abs(true - int(n)) <= 0.05 * true, f"{name} has {true} lines, README says {n}"


def test_weights_are_loaded_without_running_code():
    for path in ROOT.glob("*.py"):
        for call_ in re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", path.read_text()):
            assert "weights_only=True" in call_ or path.name == "test_all.py", (path.name, call_)


# ---------------------------------------------------------------------------------------------------
# Homework. Each test below grades one function: what surrounds the function is given independently, so that one mistake
# costs one question, and the message says what the mistake may be. Its docstring is the question; 10 points a file.

def exercise(target, points, hidden=False):
    """This test grades `target`, such as "vae.VAE.kl". hidden: it is not in the handout, and graded all the same."""
    def mark(test):
        test.exercise, test.points, test.hidden = target, points, hidden
        return test
    return mark


def check(what, ours, truth, hint="", tolerance=1e-4):
    """ours equals truth within `tolerance` of the largest value (or of 1), or a sentence says by how much it does not."""
    assert isinstance(ours, torch.Tensor), f"{what} is not a tensor: {ours!r:.40}"
    assert ours.shape == truth.shape, f"{what} has shape {tuple(ours.shape)} and not {tuple(truth.shape)}. {hint}"
    error = ours.detach().double() - truth.detach().double()
    assert error.abs().max() <= tolerance * truth.detach().double().abs().max().clamp(min=1), \
        f"{what} is off by {error.mean():+.3f} on average and by {error.abs().max():.3g} at most. {hint}"


def gradient(y, x):
    """dy / dx, or None where y does not depend on x."""
    return torch.autograd.grad(y, x, retain_graph=True, allow_unused=True)[0] if y.requires_grad else None


# gmm_head.py

@exercise("gmm_head.GMMHead.density", points=3)
def test_homework_gmm_head_density():
    log_pi, mu, sigma = torch.randn(200, 4).log_softmax(-1), torch.randn(200, 4, 3), torch.rand(200, 4, 3) + 0.2
    truth = D.MixtureSameFamily(D.Categorical(logits=log_pi), D.Independent(D.Normal(mu, sigma), 1))
    x = truth.sample()
    check("log p", gmm_head.GMMHead.density((log_pi, mu, sigma), x), truth.log_prob(x),
          "A missing log(2 pi) / 2 per channel is +2.757 here, a missing log sigma about "
          f"{(log_pi.exp() * sigma.log().sum(-1)).sum(-1).mean():+.1f}.")
    check("log p of a far point", gmm_head.GMMHead.density((log_pi, mu, sigma), x + 1e3), truth.log_prob(x + 1e3),
          "exp(log N) is 0 there, and its log -inf: torch.logsumexp.")


@exercise("gmm_head.GMMHead.draw", points=2)
def test_homework_gmm_head_draw():
    pi, mu, sigma = torch.tensor([0.7, 0.3]), torch.tensor([[-1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.5, 1.0], [0.2, 0.8]])
    many = [v.expand(50_000, *v.shape) for v in (pi.log(), mu, sigma)]
    x = gmm_head.GMMHead.draw(many, temperature=0.5)
    mean = pi @ mu
    check("the mean of 50,000 draws", x.mean(0), mean,
          "Is a component chosen by its weight, and then its own mean taken?", 0.03)
    check("their variance at temperature 0.5", x.var(0), pi @ (mu**2 + (0.5 * sigma) ** 2) - mean**2,
          "temperature multiplies sigma, once, and not mu.", 0.03)
    x = gmm_head.GMMHead.draw(many, n=(3,), clip=1.0)
    assert x.shape == (3, 50_000, 2), f"n=(3,) gives shape {tuple(x.shape)}: {(3, 50_000, 2)} is right"
    near = ((x[..., None, :] - mu).abs() <= sigma + 1e-4).all(-1).any(-1)
    assert near.all(), \
        f"with clip=1, {100 * (~near).float().mean():.0f}% of the draws are more than one sigma from every mean"


def guided_on_a_grid(mc, sc, mu, su, cfg):
    """Mean and std of N(mc, sc)^cfg N(mu, su)^(1 - cfg), each (n,), by numerical integration."""
    x = torch.linspace(-40, 40, 8_001, dtype=torch.float64)[:, None]
    log_c, log_u = (D.Normal(m.double(), s.double()).log_prob(x) for m, s in ((mc, sc), (mu, su)))
    p = (cfg * log_c + (1 - cfg) * log_u).softmax(0)                                        # (8001, n)
    mean = (p * x).sum(0)
    return mean, (p * (x - mean) ** 2).sum(0).sqrt()


@exercise("gmm_head.guided_normal", points=2)
def test_homework_gmm_head_guided_normal():
    mc, sc, mu, su = torch.randn(20), torch.rand(20) + 0.3, torch.randn(20), torch.rand(20) + 1.2
    mean, std, proper = gmm_head.guided_normal(mc, sc, mu, su, 2.5)
    true_mean, true_std = guided_on_a_grid(mc, sc, mu, su, 2.5)
    check("the mean", mean, true_mean,
          "Precisions add: cfg / sc^2 - (cfg - 1) / su^2, and each mean counts with its own.", 1e-3)
    check("the std", std, true_std, "Precisions add, variances do not; and std is the root of 1 / precision.", 1e-3)
    assert proper.dtype == torch.bool and proper.all(), "all of these products are densities: proper should be True"


@exercise("gmm_head.guided_normal", points=1, hidden=True)
def test_homework_gmm_head_guided_normal_where_there_is_no_density():
    mc, sc, mu, su = torch.tensor([1.0, 1.0]), torch.ones(2), torch.zeros(2), torch.tensor([0.5, 4.0])
    mean, std, proper = gmm_head.guided_normal(mc, sc, mu, su, 3.0)
    assert proper.tolist() == [False, True], f"proper is {proper.tolist()}: the first product grows without bound"
    check("the unguided channel's mean", mean[:1], mc[:1], "Where lam <= 0.01 the channel stays N(mc, sc).")
    check("the unguided channel's std", std[:1], sc[:1], "Where lam <= 0.01 the channel stays N(mc, sc).")


@exercise("gmm_head.GMMHead.nucleus", points=2)
def test_homework_gmm_head_nucleus():
    log_pi, mu, sigma = torch.randn(60, 6).log_softmax(-1), torch.randn(60, 6, 2), torch.rand(60, 6, 2)
    truth = torch.zeros(60, 6, dtype=torch.float64)
    for row, p in zip(truth, log_pi.exp().tolist()):
        total = 0.0
        for k in sorted(range(6), key=lambda k: -p[k]):
            if total < 0.7:
                row[k] = p[k]
            total += p[k]
    kept = gmm_head.GMMHead.nucleus((log_pi, mu, sigma), 0.7)
    assert torch.equal(kept[0] > -torch.inf, truth > 0), (
        f"{(kept[0] > -torch.inf).sum(-1).float().mean():.1f} of 6 components stay on average (nan counts as gone), "
        f"{(truth > 0).sum(-1).float().mean():.1f} are needed. The one that reaches top_p belongs to them.")
    check("the weights kept", kept[0].exp(), truth / truth.sum(-1, keepdim=True), "What is left must be renormalised.")
    assert torch.equal(kept[1], mu) and torch.equal(kept[2], sigma), "means and scales stay as they are"


# flow_adapter.py

@exercise("flow_adapter.Coupling.forward", points=2)
def test_homework_flow_adapter_coupling():
    block, (x1, x2) = flow_adapter.Coupling(3, 6), torch.randn(2, 2, 3, 4, 4)
    block.shift = lambda x: torch.sin(3 * x) + x.flip(1)
    a, b = block(x1, x2)
    check("the first half of the output", a, x2, "The halves swap, or half of the channels would never move.")
    check("the second half of the output", b, x1 + block.shift(x2), "x1 moves by F(x2), and F sees only what stays.")


@exercise("flow_adapter.Coupling.inverse", points=2)
def test_homework_flow_adapter_coupling_undone():
    block, (x1, x2) = flow_adapter.Coupling(3, 6), torch.randn(2, 2, 3, 4, 4)
    block.shift = lambda x: torch.sin(3 * x) + x.flip(1)
    y1, y2 = block.inverse(x2, x1 + block.shift(x2))
    check("x1", y1, x1, "x1 = b - F(a): forward added F of the half that is now called a.")
    check("x2", y2, x2, "x2 was only moved to the front.")


class Shear(nn.Module):
    """A coupling whose F is k sin."""

    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, x1, x2):
        return x2, x1 + self.k * torch.sin(x2)

    def inverse(self, a, b):
        return b - self.k * torch.sin(a), a


@exercise("flow_adapter.FlowAdapter.inverse", points=3)
def test_homework_flow_adapter_inverse():
    flow, x = flow_adapter.FlowAdapter(4, (3, 5), n_block=3), torch.randn(2, 15, 4)
    flow.blocks = nn.ModuleList([Shear(k) for k in (1.0, 2.0, -0.5)])
    x1, x2 = flow.split(x)
    for block in flow.blocks:
        x1, x2 = block(x1, x2)
    check("inverse(forward(x))", flow.inverse(flow.join(x1, x2)), x, "The coupling that came last must be undone first.")


class Stretch(nn.Module):
    """An adapter that loses a little on the way back, so that putting values back can be seen."""

    def forward(self, x):
        return 2 * x + 1

    def inverse(self, u):
        return (u - 1) / 2 + 0.01


class Writer(nn.Module):
    """A generator that writes sevens and remembers what it was told."""

    def sample(self, cond, known=None, known_mask=None, on_step=None, **options):
        self.known, self.options = known, options
        tokens = torch.full((len(cond), 4, 2), 7.0)
        if known is not None:
            tokens = torch.where(known_mask[..., None], known, tokens)
        if on_step is not None:
            on_step(0, tokens, torch.zeros(len(cond), 4, dtype=torch.bool))
        return tokens


@exercise("flow_adapter.Adapted.sample", points=3)
def test_homework_flow_adapter_sample():
    model, seen = flow_adapter.Adapted(Stretch(), Writer()), []
    cond, three = torch.zeros(2, dtype=torch.long), torch.full((2, 4, 2), 3.01)
    x = model.sample(cond, cfg=2.0, on_step=lambda i, tokens, mask: seen.append(tokens))
    check("a sample", x, three,
          "The generator's tokens are bent: the adapter's inverse makes the tokenizer's tokens of them.")
    check("what on_step is shown", seen[0], three, "on_step, too, is to see the tokenizer's tokens.")
    assert model.generator.options.get("cfg") == 2.0, "options such as cfg go to the generator"
    known, mask = torch.randn(2, 4, 2), torch.tensor([[True, False, True, False]] * 2)
    x = model.sample(cond, known=known, known_mask=mask)
    check("the known tokens that the generator is given", model.generator.known[mask], 2 * known[mask] + 1,
          "It lives in the bent space: known tokens go through the adapter first.")
    check("the known tokens in the result", x[mask], known[mask], "At the end the given values are put back.", 1e-6)
    check("the other tokens in the result", x[~mask], three[~mask], "Only known tokens are put back.")


# ar_transformer.py

def turned(x, rope):
    """RoPE as multiplication by complex numbers: x (B, S, n_head, head_dim), rope (S, head_dim / 2, 2)."""
    z, turn = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()), torch.view_as_complex(rope.contiguous())
    return torch.view_as_real(z * turn[:, None]).flatten(-2)


def angles(S, pairs):
    turn = torch.rand(S, pairs) * 6
    return torch.stack([turn.cos(), turn.sin()], -1)


@exercise("ar_transformer.rotate", points=3)
def test_homework_ar_transformer_rope():
    x, rope = torch.randn(2, 5, 3, 8), angles(5, 4)
    y = ar_transformer.rotate(x, rope)
    check("the length of the rotated vectors", y.norm(dim=-1), x.norm(dim=-1), "A rotation changes no length.")
    check("the rotated vectors", y, turned(x, rope),
          "Pairs are neighbours, (x0, x1), (x2, x3) ..., and (a, b) -> (a cos - b sin, b cos + a sin).")


def slow_attention(att, x, rope, causal=True):
    """One query at a time, one head at a time."""
    q, k, v = (part.unflatten(-1, (att.n_head, -1)) for part in att.wqkv(x).chunk(3, -1))      # (B, S, n_head, head_dim)
    q, k, y = turned(q, rope), turned(k, rope), torch.zeros_like(v)
    for t in range(x.shape[1]):
        for head in range(att.n_head):
            seen = slice(t + 1) if causal else slice(None)
            score = (k[:, seen, head] * q[:, t:t + 1, head]).sum(-1) / q.shape[-1] ** 0.5
            y[:, t, head] = (score.softmax(1)[..., None] * v[:, seen, head]).sum(1)
    return att.wo(y.flatten(2))


@exercise("ar_transformer.Attention.forward", points=2)
def test_homework_ar_transformer_attention():
    att, x, rope = ar_transformer.Attention(12, 3).eval(), torch.randn(2, 6, 12), angles(6, 2)
    with patch.object(ar_transformer, "rotate", turned):
        check("attention", att(x, rope), slow_attention(att, x, rope),
              "Queries and keys turn, values do not; row t looks at rows 0 .. t; wo comes last, on the heads side by side.")
        check("attention with a mask", att(x, rope, torch.ones(6, 6, dtype=torch.bool)), slow_attention(att, x, rope, False),
              "A mask that is given says alone who may look where.")


@exercise("ar_transformer.Attention.forward", points=2)
def test_homework_ar_transformer_cached_attention():
    att, x, rope = ar_transformer.Attention(12, 3).eval(), torch.randn(2, 6, 12), angles(6, 2)
    cache = torch.zeros(2, 2, 3, 6, 4)
    with patch.object(ar_transformer, "rotate", turned):
        rows = [att(x[:, t:t + 1], rope[t:t + 1], (torch.arange(6) <= t)[None], cache, torch.tensor([t])) for t in range(6)]
        check("row by row with the cache", torch.cat(rows, 1), att(x, rope),
              "Each row's rotated key and its value are written at its place `at`, and the whole cache is looked at.")


@exercise("ar_transformer.ARTransformer.hidden", points=3)
def test_homework_ar_transformer_teacher_forcing():
    for options in (dict(vocab_size=9), dict(token_dim=2, prefix=(3, 5))):
        head = ar_transformer.CategoricalHead(8, 9)
        model = ar_transformer.ARTransformer(head, 4, 7, n_layer=1, n_head=2, n_embd=8, **options).eval()
        model.run = lambda x, start=0, caches=None, keep=None: x        # a transformer that does nothing
        tokens = torch.randint(9, (3, 4)) if model.vocab_size else torch.randn(3, 4, 2)
        cond = torch.randn(3, 3, 5) if model.n_prefix == 3 else torch.tensor([1, 2, 3])
        drop = torch.tensor([True, False, True])
        h, start, e = model.hidden(tokens, cond, drop), model.prefix(cond, drop), model.embed(tokens)
        assert h.shape == e.shape, f"h has shape {tuple(h.shape)} and not {tuple(e.shape)}: one row for each token"
        check("what h[:, 0] has read last", h[:, 0], start[:, -1],
              "The first token is predicted from the prefix (with drop).")
        check("what h[:, 1:] has read last", h[:, 1:], e[:, :-1],
              "Row t predicts token t, so the last thing it reads is token t - 1. If it reads token t, the answer leaks.")


# maskgit.py

@exercise("maskgit.n_hidden", points=2)
def test_homework_maskgit_training_hides():
    u = [0.0, 0.11, 0.3, 0.52, 0.77, 0.93, 1.0]
    n = maskgit.n_hidden(torch.tensor(u)[:, None], 50)
    check("the number of hidden tokens", n.flatten(), torch.tensor([max(1, math.ceil(50 * math.cos(math.pi / 2 * v) - 1e-6))
                                                                    for v in u]), "ceil(T cos(pi/2 u)), and at least one.")
    n = maskgit.n_hidden(torch.tensor(u)[:, None], 50, "arccos")
    truth = torch.tensor([max(1, round(50 * math.acos(v) * 2 / math.pi)) for v in u])
    check("the number for arccos", n.flatten(), truth, "TiTok rounds to the nearest.")


@exercise("maskgit.still_hidden", points=2)
def test_homework_maskgit_schedule():
    starts = torch.tensor([[64], [100], [7]])
    for step in range(5):
        truth = torch.tensor([[math.floor(n * math.cos(math.pi / 2 * (step + 1) / 5) + 1e-6)] for n in (64, 100, 7)])
        ours = maskgit.still_hidden(starts, step, 5)
        check(f"hidden after step {step} of 5 (from {starts.flatten().tolist()})", ours, truth,
              "floor(n cos(pi/2 r)), where r is what is done AFTER this step: (step + 1) / steps, and the last leaves 0.")
    check("for the linear schedule", maskgit.still_hidden(starts, 0, 5, "linear"), torch.tensor([[51], [80], [5]]))


@exercise("maskgit.keep_hidden", points=2)
def test_homework_maskgit_confidence():
    score, n = torch.randn(4, 9), torch.tensor([[0], [3], [8], [9]])
    score[1, 2:6] = -5.0                                    # a tie
    truth = torch.zeros(4, 9, dtype=torch.bool)
    for row, s, count in zip(truth, score.tolist(), n.flatten().tolist()):
        for t in sorted(range(9), key=lambda t: (s[t], t))[:count]:
            row[t] = True
    mask = maskgit.keep_hidden(score, n)
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == [0, 3, 8, 9], \
        f"{mask.sum(1).tolist()} tokens stay hidden where n is [0, 3, 8, 9]: argsort gives places, of which the first n stay hidden"
    assert torch.equal(mask[2:], truth[2:]), "those of the LOWEST score are hidden again; the model is sure of the others"
    assert torch.equal(mask, truth), "of equal scores the earlier positions are hidden: a stable sort"


@exercise("maskgit.masked_mean", points=2)
def test_homework_maskgit_masked_mean():
    loss, weight = torch.rand(3, 5), torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 1, 1], [0.1, 1, 1, 0.1, 1]])
    rows = [sum(a * b for a, b in zip(x, w)) / sum(w) for x, w in zip(loss.tolist(), weight.tolist())]
    check("the mean per image", maskgit.masked_mean(loss, weight), torch.tensor(sum(rows) / 3),
          f"Within each image first. Over all T tokens it would be {(loss * weight).mean():.3f}: hidden ones alone count.")
    check("the mean over the batch", maskgit.masked_mean(loss, weight, per_image=False),
          torch.tensor(sum(r * sum(w) for r, w in zip(rows, weight.tolist()))) / weight.sum(),
          "Every hidden token counts alike.")


@exercise("maskgit.MaskGIT.training_mask", points=2)
def test_homework_maskgit_training_mask():
    size = dict(token_dim=2, n_layer=1, n_head=2, n_embd=8)
    model = maskgit.MaskGIT(nn.Identity(), 6, 3, **size, u_max=0.7, train_schedule="arccos")
    n, asked = torch.arange(6000)[:, None] % 6 + 1, []
    with patch.object(maskgit, "n_hidden", lambda u, T, schedule="cosine": asked.append((u, T, schedule)) or n):
        mask = model.training_mask(6000, torch.device("cpu"))
    assert asked, "n_hidden() says how many to hide"
    u, T, schedule = asked[0]
    assert u.shape == (6000, 1), f"u has shape {tuple(u.shape)}: each row draws its own, (B, 1)"
    assert 0 <= u.min() and 0.69 < u.max() < 0.7, f"u is in {u.min():.2f} .. {u.max():.2f} and not uniform in 0 .. u_max = 0.7"
    assert (T, schedule) == (6, "arccos"), "n_hidden is asked for T tokens and the model's own train_schedule"
    assert mask.shape == (6000, 6) and mask.dtype == torch.bool, f"mask {tuple(mask.shape)} {mask.dtype} is not (B, T) bool"
    right = (mask.sum(1, keepdim=True) == n).float().mean()
    assert right == 1, f"{100 * right:.0f}% of the rows hide n tokens: exactly n, drawn without replacement, not n on average"
    check("how often each place is hidden", mask.float().mean(0), torch.full((6,), 3.5 / 6), "All places alike.", 0.03)
    assert len(mask[n[:, 0] == 1].unique(dim=0)) == 6, "every row must draw its places anew"


# mar.py

@exercise("mar.mask_rate", points=2)
def test_homework_mar_mask_rate():
    for low, std in ((0.7, 0.25), (0.0, 9.0)):
        grid = torch.linspace(low, 1, 20_001, dtype=torch.float64)
        below = torch.cumulative_trapezoid((-0.5 * ((grid - 1) / std) ** 2).exp(), grid)
        for u in (0.5, 0.1, 0.8, 0.0, 1.0):
            rate = mar.mask_rate(u, low, std)
            truth = grid[torch.searchsorted(below / below[-1], u)].item()
            assert abs(rate - truth) < 2e-3, (f"the rate at quantile {u} of N(1, {std}^2) cut to [{low}, 1] is {rate:.3f}, "
                                              f"not {truth:.3f}: the inverse cdf, u being between cdf({low}) and cdf(1)")


@exercise("mar.masked_counts", points=3)
def test_homework_mar_counts():
    counts = mar.masked_counts(256, 8)
    assert counts == [math.floor(256 * math.cos(math.pi / 2 * k / 8)) for k in range(8)] + [0], \
        f"256 tokens in 8 steps: {counts}. Before step k, floor(256 cos(pi/2 k/8)) are unknown, and 0 at the end."
    for n in (1, 2, 9, 64):
        counts = mar.masked_counts(n, n)
        assert counts == list(range(n, -1, -1)), \
            f"{n} tokens in {n} steps: {counts}. Every step must draw one at least, and no more."
    counts = mar.masked_counts(10, 8)
    assert len(counts) == 9 and all(a > b for a, b in zip(counts, counts[1:])), \
        f"10 tokens in 8 steps: {counts} does not fall"


@exercise("mar.draw_order", points=2)
def test_homework_mar_order():
    raster = mar.draw_order("raster", 2, 6, torch.device("cpu"))
    assert raster.tolist() == [list(range(6))] * 2, f"raster order is 0 .. 5 in each row, not {raster.tolist()}"
    order = mar.draw_order("random", 3000, 6, torch.device("cpu"))
    assert torch.equal(order.sort(1).values, torch.arange(6).expand(3000, 6)), "each row must hold each place once"
    share = torch.stack([(order[:, i, None] == torch.arange(6)).float().mean(0) for i in range(6)])
    check("how often each place comes at each turn", share, torch.full((6, 6), 1 / 6),
          "All orders are equally likely.", 0.05)
    known = torch.rand(500, 6) < 0.4
    for kind in ("random", "raster"):
        order = mar.draw_order(kind, 500, 6, torch.device("cpu"), known)
        first = known.gather(1, order)
        assert (first[:, 1:] <= first[:, :-1]).all(), f"known places must come first in a {kind} order"
        assert torch.equal(order.sort(1).values, torch.arange(6).expand(500, 6)), "each row must hold each place once"


class Listener(nn.Module):
    """A head that remembers what it is asked, and whose loss is the token itself."""

    def loss(self, h, x):
        self.h, self.x = h, x
        return x[..., 0]


@exercise("mar.MAR.forward", points=3)
def test_homework_mar_loss():
    model, asked = mar.MAR(Listener(), 6, 5, token_dim=1, n_layer=2, n_head=2, n_embd=8, label_drop=1.0).eval(), {}
    tokens, order = torch.arange(24.0).view(4, 6, 1), torch.stack([torch.randperm(6) for _ in range(4)])

    def hidden(tokens, labels, mask, n_visible=None):       # an encoder-decoder whose h is the token itself
        asked.update(labels=labels, mask=mask, n_visible=n_visible)
        return tokens.clone()
    model.hidden, model.mask_count = hidden, lambda: 4
    with patch.object(mar, "draw_order", lambda *_, **__: order):
        loss, logs = model(tokens, torch.arange(4))
        mask = asked["mask"]
        assert mask.dtype == torch.bool and mask.sum(1).tolist() == [4] * 4, "mask_count() is 4: four of each row are hidden"
        assert torch.equal(mask, torch.zeros(4, 6).scatter(1, order[:, 2:], 1).bool(), ), \
            "hidden are the LAST places of the order: those before them are what the model has already written"
        assert asked["n_visible"] in (2, None), f"n_visible is {asked['n_visible']}: 6 - 4 tokens are visible"
        check("the loss", loss, tokens[mask].mean(),
              f"The mean over MASKED tokens; over all of them it is {tokens.mean():.2f}.")
        check("h that the head is given", model.head.h, model.head.x, "h and token must come from the same place.")
        assert torch.equal(asked["labels"], torch.arange(4)), "in eval mode the labels stay"
        model.train()(tokens, torch.arange(4))
        assert torch.equal(asked["labels"], torch.full((4,), 5)), \
            "label_drop is 1: while training every label becomes 'no class', 5"


# diffusion_head.py

@exercise("diffusion_head.DiffusionHead.reverse", points=3)
def test_homework_diffusion_head_reverse_step():
    row = diffusion_head.schedule(torch.arange(1000))[torch.tensor([5, 100, 500, 900])][:, None].unbind(-1)    # (4, 1) each
    a, s, a_earlier, s_earlier = (v.double() for v in row[:4])
    x0, noise = torch.randn(2, 4, 3)
    x = row[0] * x0 + row[1] * noise
    step = a / a_earlier                                    # x = step * x_earlier + N(0, beta), and Bayes' rule:
    beta = 1 - step**2
    precision = 1 / s_earlier**2 + step**2 / beta
    mean = (a_earlier * x0 / s_earlier**2 + step * x / beta) / precision
    ours, log_var, x0_ours = diffusion_head.DiffusionHead.reverse(x, noise, torch.full_like(x, -1.0), row)
    check("x0", x0_ours, x0, "x = a x0 + s eps, solved for x0.", 1e-3)
    check("the mean", ours, mean, "That of q(x_earlier | x, x0), by Bayes' rule.", 1e-3)
    check("log variance at v = -1", log_var, -precision.log().expand(4, 3), "v = -1 is the smallest: beta~.", 1e-3)
    log_var = diffusion_head.DiffusionHead.reverse(x, noise, torch.ones_like(x), row)[1]
    check("log variance at v = +1", log_var, beta.log().expand(4, 3), "v = +1 is the largest: beta.", 1e-3)


class Told(nn.Module):
    """A network that says what it was told to, and remembers what it saw."""

    def __init__(self, out):
        super().__init__()
        self.out = nn.Parameter(out)

    def forward(self, x, t, c):
        self.x, self.t = x, t
        return self.out


def kl_in_bits(mean, log_var, mean2, log_var2):
    p, q = (D.Normal(m, (0.5 * v).exp()) for m, v in ((mean, log_var), (mean2, log_var2)))
    return D.kl_divergence(p, q).mean(-1) / math.log(2)


@exercise("diffusion_head.DiffusionHead.terms", points=2)
def test_homework_diffusion_head_loss():
    head, (x, noise) = diffusion_head.DiffusionHead(4, 3, width=8, depth=1), torch.randn(2, 5, 3)
    t = torch.tensor([1, 50, 400, 700, 990])
    head.net = Told(torch.randn(5, 6))
    head.reverse = lambda x, eps, v, row: (x - eps, row[6] + 0.3 * v, None)     # some mean and variance, not the right ones
    with patch.object(diffusion_head, "kl_bits", kl_in_bits):
        mse, vb = head.terms(x, torch.randn(5, 4), t, noise)
    row = head.table[t].unsqueeze(1).unbind(-1)
    x_t = row[0] * x + row[1] * noise
    check("the noisy token that the network sees", head.net.x, x_t, "x_t = a x + s noise.")
    eps, v = head.net.out.detach()[:, :3], head.net.out.detach()[:, 3:]
    check("mse", mse, ((eps - noise) ** 2).mean(-1), "The network predicts the NOISE; the mean is over the token's numbers.")
    truth = kl_in_bits(row[4] * x + row[5] * x_t, row[7].expand_as(x), x_t - eps, row[6] + 0.3 * v)
    check("vb", vb, truth, "KL(q(x_earlier | x_t, x) || reverse step), in this order.", 1e-3)
    vb.sum().backward()
    assert head.net.out.grad[:, :3].abs().max() == 0, "vb trains the variance only: its eps is detached"
    assert head.net.out.grad[:, 3:].abs().min() > 0, "vb must train the variance v"


@exercise("diffusion_head.DiffusionHead.terms", points=1, hidden=True)
def test_homework_diffusion_head_flow_loss():
    head = diffusion_head.DiffusionHead(4, 3, width=8, depth=1, objective="flow")
    (x, noise), t = torch.randn(2, 5, 3), torch.rand(5)
    head.net = Told(torch.randn(5, 3))
    loss, = head.terms(x, torch.randn(5, 4), t, noise)
    check("the point on the way that the network sees", head.net.x, torch.lerp(x, noise, t[:, None]), "t = 0 is the token.")
    check("the time that the network is told", head.net.t, 1000 * t, "The network knows times of 0 .. 1000.")
    check("the loss", loss, ((head.net.out - (noise - x)) ** 2).mean(-1), "The velocity is d x_t / dt = noise - x.")


@exercise("diffusion_head.DiffusionHead.predict", points=2)
def test_homework_diffusion_head_guidance():
    head, out = diffusion_head.DiffusionHead(4, 3, width=8, depth=1), torch.randn(2, 5, 6)
    head.net.denoise = lambda x, y: out if y.ndim == 3 else out[0]
    eps, v = head.predict(torch.randn(5, 3), torch.randn(8), torch.randn(5, 8), None)
    check("eps without guidance", eps, out[0, :, :3]), check("v without guidance", v, out[0, :, 3:])
    eps, v = head.predict(torch.randn(5, 3), torch.randn(8), torch.randn(2, 5, 8), 3.0)
    check("guided eps", eps, 3 * out[0, :, :3] - 2 * out[1, :, :3], "u + cfg (c - u): beyond the conditional prediction.")
    check("v under guidance", v, out[0, :, 3:], "Guidance mixes eps only; the variance is the conditional one's.")


@exercise("diffusion_head.kl_bits", points=2)
def test_homework_diffusion_head_kl():
    gaussians = torch.randn(4, 7, 3)
    check("KL", diffusion_head.kl_bits(*gaussians), kl_in_bits(*gaussians),
          "log_var is log sigma^2, not log sigma; the second Gaussian's variance divides; nats / ln 2 are bits.")


# vae.py

@exercise("vae.VAE.kl", points=3)
def test_homework_vae_kl():
    mean, std = torch.randn(2, 5, 3), torch.rand(2, 5, 3) + 0.3
    truth = D.kl_divergence(D.Normal(mean, std), D.Normal(0.0, 1.0)).sum(-1)
    check("KL", vae.VAE.kl(mean, std), truth,
          "In nats per token: 1/2 sum_d (mean^2 + std^2 - 1 - log std^2). Without -1 it is "
          "+1.500, with log std for log std^2 " + f"{std.log().sum(-1).mean() / 2:+.3f}, with a mean over D a third of it.")


@exercise("vae.VAE.reparameterise", points=2)
def test_homework_vae_reparameterise():
    mean, std = (torch.tensor(v).repeat(1, 40_000, 1).requires_grad_() for v in ([[[-2.0, 1.0]]], [[[0.5, 3.0]]]))
    z = vae.VAE.reparameterise(mean, std)
    check("the mean of 40,000 draws", z.mean((0, 1)), torch.tensor([-2.0, 1.0]), "z = mean + std * noise.", 0.06)
    check("their std", z.std((0, 1)), torch.tensor([0.5, 3.0]), "std is not a variance, and the noise is normal.", 0.03)
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
    images, raw = (v / 127.5 - 1).view(256, 1, 1, 1).expand(256, 3, 1, 1), torch.tensor([0.1, -0.8, 1.2]).view(1, 3, 1, 1)
    ours = model.log_likelihood(images, raw.expand(256, 3, 1, 1))
    edges = (torch.arange(257).double() * 2 - 1) / 255 - 1  # value v lies between the edges v and v + 1
    cdf = torch.sigmoid((edges[:, None] - raw.flatten()) * torch.exp(-model.log_scale.detach().double()))
    cdf[0], cdf[-1] = 0, 1
    check("log p of the values 1 .. 254 of a pixel", ours[1:-1], (cdf[1:] - cdf[:-1]).log().sum(1)[1:-1],
          "sigmoid(a) - sigmoid(b), summed over the three channels (in logs).", 1e-3)
    check("log p of the values 0 and 255", ours[::255], (cdf[1:] - cdf[:-1]).log().sum(1)[::255],
          "The outermost bins are open: all that lies beyond belongs to them.", 1e-3)
    far = model.log_likelihood(images[:3], raw.expand(3, 3, 1, 1) + 40)
    assert torch.isfinite(far).all(), "log p far from the mean is not finite: the difference of two sigmoids is 0 in float32"


@exercise("vae.VAE.measure", points=2)
def test_homework_vae_measure():
    model, std = vae.VAE(token_dim=2), torch.full((300, 16, 2), 2.0)
    mean = torch.randn(300, 16, 2) * torch.tensor([0.5, 4.0]) + torch.tensor([3.0, -1.0])
    model.measure(mean, std)
    z = (mean + std * torch.randn(20, 300, 16, 2)).flatten(0, 2)
    z = (z - model.latent_mean) * model.latent_scale
    check("the mean of normalised tokens", z.mean(0), torch.zeros(2), "latent_mean is taken over images and places.", 0.02)
    check("their variance", z.var(0), torch.ones(2), "The spread of the means and the noise of each token add: "
          "var(mean) + E[std^2]; and latent_scale is 1 over its root.", 0.02)


# vq.py

@exercise("vq.VectorQuantizer.distances", points=2)
def test_homework_vq_distances():
    z, codes = torch.randn(6, 3), torch.randn(9, 3)
    check("squared distances", vq.VectorQuantizer.distances(z, codes), ((z[:, None] - codes) ** 2).sum(-1),
          "(N, V): |z|^2 + |e|^2 - 2 z.e, squared, not their root.")


def slow_distances(z, codes):
    return ((z[:, None] - codes) ** 2).sum(-1)


def nearest_by_loop(codes, z):
    """ids (B, T) of the nearest rows of codes (V, D)."""
    nearest = lambda v: min(range(len(codes)), key=lambda k: (codes[k] - v).norm().item())
    return torch.tensor([[nearest(v) for v in row] for row in z])


@exercise("vq.VectorQuantizer.nearest", points=2)
def test_homework_vq_nearest():
    for l2_norm in (False, True):
        quantizer, z = vq.VectorQuantizer(7, 3, l2_norm), torch.randn(2, 5, 3)
        quantizer.codebook = nn.Parameter(torch.randn(7, 3) * torch.linspace(0.2, 3, 7)[:, None])           # of all lengths
        quantizer.distances = slow_distances
        unit = (lambda x: x / x.norm(dim=-1, keepdim=True)) if l2_norm else (lambda x: x)
        truth = nearest_by_loop(unit(quantizer.codebook.detach()), unit(z))
        ids = quantizer.nearest(z)
        assert ids.shape == (2, 5) and ids.dtype == torch.long, f"ids {tuple(ids.shape)} {ids.dtype} are not (2, 5) int64"
        right = (ids == truth).float().mean()
        assert right == 1, f"with l2_norm={l2_norm} {100 * right:.0f}% of the ids are the nearest code's" + \
            (": z and codes are both compared at unit length" if l2_norm else "")


@exercise("vq.VectorQuantizer.forward", points=3)
def test_homework_vq_losses_and_straight_through():
    quantizer, z = vq.VectorQuantizer(7, 3, l2_norm=False, beta=0.25), torch.randn(2, 5, 3, requires_grad=True)
    nn.init.normal_(quantizer.codebook)
    quantizer.nearest = lambda z: nearest_by_loop(quantizer.codebook.detach(), z.detach())
    quantizer.distances = slow_distances
    q, ids, loss, _ = quantizer(z)
    e, n = quantizer.codebook.detach()[ids], z.numel()
    check("q", q, e, "What goes on has the value of the nearest code.")
    weight = torch.randn_like(z)
    through = gradient((q * weight).sum(), z)
    assert through is not None, "no gradient comes back through q: the encoder would learn nothing (straight-through)"
    check("the gradient that q sends back to z", through, weight, "Straight through: as if q were z.")
    check("the loss", loss, 1.25 * ((z - e) ** 2).mean(),
          "|sg(z) - e|^2 + beta |z - sg(e)|^2, means over tokens and channels.")
    to_z, to_codes = gradient(loss, z), gradient(loss, quantizer.codebook)
    assert to_z is not None and to_codes is not None, "the loss must move both the encoder (commitment) and the codes"
    check("the gradient of the loss for z", to_z, 0.25 * 2 * (z - e) / n, "beta, and only beta, weighs the encoder's term.")
    moved = torch.zeros(7, 3).index_add_(0, ids.flatten(), (2 * (e - z) / n).detach().flatten(0, 1))
    check("the gradient of the loss for the codes", to_codes, moved,
          "The codes' own term has weight 1, and z is detached in it.")


@exercise("vq.VectorQuantizer.forward", points=1, hidden=True)
def test_homework_vq_running_averages():
    quantizer, z, calls = vq.VectorQuantizer(7, 3, l2_norm=False, ema=0.9), torch.randn(2, 5, 3, requires_grad=True), []
    quantizer.nearest = lambda z: torch.arange(10).view(2, 5) % 7
    quantizer.update = lambda z, ids: calls.append((z, ids))
    _, ids, loss, _ = quantizer.train()(z)
    assert len(calls) == 1, f"update() is called {len(calls)} times in a training step with ema: once is right"
    assert torch.equal(calls[0][0], z.detach().flatten(0, 1)) and torch.equal(calls[0][1], ids.flatten()), \
        "update(z (N, D), ids (N,))"
    assert not calls[0][0].requires_grad, "the running averages are no part of the graph"
    check("the loss", loss, 0.25 * ((z - quantizer.codebook[ids]) ** 2).mean(),
          "With ema the codes have no loss of their own.")
    assert gradient(loss, z) is not None, "the commitment moves z, and with ema it alone is the loss"
    quantizer.eval()(z)
    assert len(calls) == 1, "in eval mode the codes must stay"


@exercise("vq.VectorQuantizer.entropy_loss", points=2)
def test_homework_vq_entropy():
    quantizer, z = vq.VectorQuantizer(6, 3, l2_norm=False), torch.randn(40, 3)
    nn.init.normal_(quantizer.codebook)
    quantizer.distances = slow_distances
    p = (-slow_distances(z, quantizer.codebook.detach()) / 0.7).softmax(-1)
    entropies, whole = D.Categorical(probs=p).entropy(), D.Categorical(probs=p.mean(0)).entropy()
    check("the entropy loss", quantizer.entropy_loss(z, 0.7), entropies.mean() - whole,
          f"The mean entropy of a token, {entropies.mean():.3f}, minus that of the mean, {whole:.3f} nats.", 1e-3)


# lfq.py

@exercise("lfq.quantize", points=2)
def test_homework_lfq_quantize():
    z = torch.randn(3, 4, 6, requires_grad=True)
    q, index = lfq.quantize(z)
    check("q", q, torch.where(z > 0, 1.0, -1.0), "Only the sign is kept.")
    number = lambda token: sum(2**i for i, v in enumerate(token) if v > 0)
    spelt = lambda z: torch.tensor([[number(token) for token in row] for row in z.tolist()])
    truth, backwards = spelt(z), spelt(z.flip(-1))
    assert index.shape == (3, 4) and index.dtype == torch.long, \
        f"index {tuple(index.shape)} {index.dtype} is not (3, 4) int64"
    assert torch.equal(index, truth), \
        "the bits are read backwards: channel 0 is the LOWEST bit" if torch.equal(index, backwards) \
        else f"index {index[0, 0]} for the signs {q[0, 0].tolist()}: {truth[0, 0]} is right"
    through = gradient((q * torch.arange(6.0)).sum(), z)
    assert through is not None, "no gradient comes back through q: straight-through"
    check("the gradient", through, torch.arange(6.0).expand(3, 4, 6), "It goes straight through, unclipped.")


@exercise("lfq.quantize", points=1, hidden=True)
def test_homework_lfq_quantize_zero():
    q, index = lfq.quantize(torch.tensor([0.0, 1.0, -0.0]))
    assert q.tolist() == [-1, 1, -1] and index.item() == 2, f"signs {q.tolist()}, index {index.item()}: a z of 0 becomes -1"


@exercise("lfq.codes", points=2)
def test_homework_lfq_codes():
    index = torch.randint(64, (3, 4))
    truth = torch.tensor([[[1.0 if i >> bit & 1 else -1.0 for bit in range(6)] for i in row] for row in index.tolist()])
    check("codes", lfq.codes(index, 6), truth, "-1 and +1, the lowest bit first.")
    assert lfq.codes(index, 6).dtype == torch.float32, f"codes are float32, not {lfq.codes(index, 6).dtype}"


@exercise("lfq.entropy_penalty", points=3)
def test_homework_lfq_entropy():
    z, words = torch.randn(30, 6) * 0.3, torch.tensor([[1.0 if i >> b & 1 else -1.0 for b in range(6)] for i in range(64)])
    softly = lambda z, words, tau: (2 / tau * z @ words.T).softmax(-1)
    whole = lambda z, tau: D.Categorical(probs=softly(z, words[:2 ** z.shape[1], :z.shape[1]], tau).mean(0)).entropy()
    per_token = torch.special.entr(softly(z.double(), words.double(), 0.5)).sum(-1)
    with patch.object(lfq, "entropy_of_mean", whole):
        ours = lfq.entropy_penalty(z.view(5, 6, 6), 0.5)
        parts = lfq.entropy_penalty(z, 0.5, groups=2)
        sharp = (z * 300).requires_grad_()
        lfq.entropy_penalty(sharp, 0.01)[0].backward()
    check("per_sample", ours[0], per_token.mean(),
          "Coins with P(+1) = sigmoid(4 z / temperature): entropies add over bits, then "
          f"the mean over tokens is taken ({per_token.mean():.3f} nats); a forgotten sum over bits makes it a sixth.")
    check("batch", ours[1], whole(z, 0.5), f"The entropy of the mean is {whole(z, 0.5):.3f} nats.", 1e-3)
    check("batch of two groups", parts[1], whole(z[:, :3], 0.5) + whole(z[:, 3:], 0.5),
          "The sum over runs of neighbouring bits.", 1e-3)
    check("per_sample with two groups", parts[0], per_token.mean(), "It is exact, whatever the groups.")
    assert torch.isfinite(sharp.grad).all(), \
        "the gradient at large |z| is nan: p log p at p = 0, or a softplus that overflows"


@exercise("lfq.CausalConv.forward", points=2)
def test_homework_lfq_causal_convolution():
    for stride in (1, 2):
        conv, x = lfq.CausalConv(2, 4, (3, 3, 3), (stride, stride, stride)), torch.randn(1, 2, 5, 6, 6)
        frames = []
        for t in range(0, 5, stride):                       # frame by frame, tap by tap
            taps = [F.conv2d(x[:, :, t + k], conv.weight[:, :, k + 2], None, stride, 1) for k in (-2, -1, 0) if t + k >= 0]
            frames.append(sum(taps) + conv.bias[:, None, None])
        truth = torch.stack(frames, 2)
        hint = "kernel - 1 zeros in front of the first frame, none behind the last."
        check(f"a clip, stride {stride}", conv(x), truth, hint)
        changed = torch.cat([x[:, :, :3], torch.randn(1, 2, 2, 6, 6)], 2)
        n = -(-3 // stride)
        check("the past, when the future changes", conv(changed)[:, :, :n], conv(x)[:, :, :n], hint, 1e-6)
        check("an image", conv(x[:, :, :1]), truth[:, :, :1], "An image is a clip of one frame.")
        check("the first two channels", conv(x, 2), truth[:, :2],
              "c_out takes the first rows of the weight and of the bias.")


# titok.py

class Stir(nn.Module):
    """In place of a transformer block: every row sees the mean of all rows, and knows its place."""

    def forward(self, x):
        return x + x.mean(1, keepdim=True) * torch.linspace(1, 2, x.shape[1])[:, None]


def latent_outputs(encoder, images):
    """What LatentEncoder has before its last layer: (B, T, C), patch by patch."""
    p = encoder.patch_embed.kernel_size[0]
    weight, bias, rows = encoder.patch_embed.weight.flatten(1), encoder.patch_embed.bias, []
    for i in range(0, images.shape[2], p):
        for j in range(0, images.shape[3], p):
            rows.append(images[:, :, i:i + p, j:j + p].flatten(1) @ weight.T + bias + encoder.pos[len(rows)])
    x = torch.stack([encoder.cls[0].expand(len(images), -1), *rows,
                     *(v.expand(len(images), -1) for v in encoder.latents)], 1)
    return encoder.norm_post(Stir()(encoder.norm_pre(x)))[:, 1 + len(rows):]


@exercise("titok.LatentEncoder.forward", points=2)
def test_homework_titok_encoder():
    encoder, images = titok.LatentEncoder(8, 4, 3, 5, n_embd=8, n_layer=1, n_head=2), torch.randn(2, 3, 8, 8)
    encoder.blocks = nn.ModuleList([Stir()])
    check("z", encoder(images), encoder.out(latent_outputs(encoder, images)),
          "Patches (with pos) and latents stand in one sequence, cls in front; the last T outputs are the tokens.")


@exercise("titok.LatentEncoder.forward", points=1, hidden=True)
def test_homework_titok_encoder_of_the_published_weights():
    encoder, images = titok.LatentEncoder(8, 4, 3, 5, n_embd=8, n_layer=1, n_head=2, legacy=True), torch.randn(2, 3, 8, 8)
    encoder.blocks = nn.ModuleList([Stir()])
    flat = latent_outputs(encoder, images).flatten(1)                                       # (B, T * C)
    shuffled = torch.stack([flat[:, t::3] for t in range(3)], 1)                            # their (C, T), read as (T, C)
    check("z with legacy=True", encoder(images), encoder.out(shuffled), "See the docstring of the class.")


@exercise("titok.LatentDecoder.forward", points=3)
def test_homework_titok_decoder():
    decoder, q = titok.LatentDecoder(8, 4, 3, 5, n_embd=8, n_layer=1, n_head=2), torch.randn(2, 3, 5)
    decoder.blocks = nn.ModuleList([Stir()])
    x = torch.cat([torch.cat([decoder.cls, decoder.canvas]).expand(2, -1, -1), decoder.embed(q) + decoder.pos], 1)
    x = decoder.out(decoder.norm_post(Stir()(decoder.norm_pre(x)))[:, 1:5])                 # (2, 4, 48)
    images = torch.zeros(2, 3, 8, 8)
    for i in range(8):
        for j in range(8):
            start = (i % 4 * 4 + j % 4) * 3                 # a patch holds (row, column, colour)
            images[:, :, i, j] = x[:, i // 4 * 2 + j // 4, start:start + 3]
    check("images", decoder(q), decoder.smooth(images),
          "The canvas, not the tokens, becomes the picture; a patch holds (row, column, colour); smooth comes last.")
    proxy = titok.LatentDecoder(8, 4, 3, 5, n_embd=8, n_layer=1, n_head=2, proxy_vocab=11)
    assert proxy(q).shape == (2, 4, 11), f"with proxy_vocab: logits (B, P, proxy_vocab), not {tuple(proxy(q).shape)}"


@exercise("titok.TiTok.decode_raw", points=2)
def test_homework_titok_soft_codes():
    table, logits = torch.randn(6, 3), torch.randn(2, 4, 6)
    proxy = SimpleNamespace(decode_raw=lambda q: 10 + q, quantizer=SimpleNamespace(codes=lambda ids: table[ids]))

    class Decoder(SimpleNamespace):
        def __call__(self, q):
            return logits
    mixed = sum(logits.softmax(-1)[..., k, None] * table[k] for k in range(6))              # (2, 4, 3)
    ours = titok.TiTok.decode_raw(SimpleNamespace(decoder=Decoder(proxy_vocab=6), proxy=proxy), torch.randn(2, 3, 5))
    check("what the proxy's decoder makes of the mixed codes", ours, 10 + mixed,
          "Each of the proxy's codes counts with its probability, a softmax over the vocabulary.")
    ours = titok.TiTok.decode_raw(SimpleNamespace(decoder=Decoder(proxy_vocab=None), proxy=None), torch.randn(2, 3, 5))
    check("without a proxy", ours, logits, "There the decoder's output is the image.")


@exercise("titok.TiTokVAE.bottleneck", points=2)
def test_homework_titok_vae_bottleneck():
    model = titok.TiTokVAE(image_size=8, n_tokens=3, token_dim=2, enc=(8, 1, 2), dec=(8, 1, 2), beta=0.5)
    mean, logvar = torch.randn(2, 4000, 3, 2)
    mean[:], logvar[:] = mean[:1], logvar[:1]
    z, loss, logs = model.bottleneck(torch.cat([mean, logvar], -1))
    kl = D.kl_divergence(D.Normal(mean, (0.5 * logvar).exp()), D.Normal(0.0, 1.0)).sum(-1).mean()
    check("logs['kl'], nats per token", logs["kl"], kl)
    check("the loss", loss, 0.5 * kl * 3 / (3 * 8 * 8),
          "beta * KL summed over the T tokens, divided by the 3 H W pixel values.")
    check("the mean of 4,000 draws", z.mean(0), mean[0], "The first half of the moments is the mean.", 0.1)
    check("their std", z.std(0), (0.5 * logvar[0]).exp(),
          "The second half is log variance; draw with noise, also in training.", 0.1)


# perceptual_gan.py

@exercise("perceptual_gan.critic_loss", points=2)
def test_homework_perceptual_gan_critic_loss():
    real, fake = torch.randn(2, 1, 3, 3) * 2, torch.randn(4, 1, 2, 2) * 2
    mean = lambda values: sum(values) / len(values)
    r, f = real.flatten().tolist(), fake.flatten().tolist()
    hinge = (mean([max(0, 1 - v) for v in r]) + mean([max(0, 1 + v) for v in f])) / 2
    check("hinge", perceptual_gan.critic_loss(real, fake), torch.tensor(hinge),
          "Real logits are pushed above +1, fake ones below -1.")
    nats = -(mean([math.log(1 / (1 + math.exp(-v))) for v in r]) + mean([math.log(1 / (1 + math.exp(v))) for v in f])) / 2
    check("non-saturating", perceptual_gan.critic_loss(real, fake, "non-saturating"), torch.tensor(nats),
          "Binary cross-entropy.")


@exercise("perceptual_gan.generator_loss", points=1)
def test_homework_perceptual_gan_generator_loss():
    fake = torch.randn(4, 1, 2, 2)
    check("hinge", perceptual_gan.generator_loss(fake), torch.tensor(-sum(fake.flatten().tolist()) / 16),
          "Raise the critic's logit.")
    nats = -sum(math.log(1 / (1 + math.exp(-v))) for v in fake.flatten().tolist()) / 16
    check("non-saturating", perceptual_gan.generator_loss(fake, "non-saturating"), torch.tensor(nats), "-log sigmoid(fake).")


@exercise("perceptual_gan.unit_channels", points=2)
def test_homework_perceptual_gan_unit_channels():
    f = torch.randn(2, 5, 3, 3)
    truth = torch.stack([torch.stack([f[b, :, i, j] / math.sqrt(sum(v * v for v in f[b, :, i, j].tolist()))
                                      for i in range(3) for j in range(3)], -1) for b in range(2)]).view(2, 5, 3, 3)
    check("unit_channels", perceptual_gan.unit_channels(f), truth, "Length 1 over the channels, at each position by itself.")
    zero = torch.zeros(1, 5, 2, 2, requires_grad=True)
    y = perceptual_gan.unit_channels(zero)
    assert y.abs().max() == 0, "zeros must stay zeros"
    y.sum().backward()
    assert torch.isfinite(zero.grad).all(), "the gradient at 0 is nan: the epsilon belongs under the root"


class TinyLPIPS(perceptual_gan.LPIPS):
    STAGES = ((4, 1), (6, 1))


def slow_unit(f):
    return f / f.norm(dim=1, keepdim=True).clamp(min=1e-10)


@exercise("perceptual_gan.LPIPS.forward", points=3)
def test_homework_perceptual_gan_lpips():
    net, a, b = TinyLPIPS(), *(torch.rand(2, 2, 3, 8, 8) * 2 - 1)
    maps = []
    for x in (a, b):
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        first = F.relu(net.features[0](x))
        maps.append([first, F.relu(net.features[3](F.max_pool2d(first, 2)))])
    with patch.object(perceptual_gan, "unit_channels", slow_unit):
        ours = net(a, b)
    truth = sum(net.lins[k]((slow_unit(maps[0][k]) - slow_unit(maps[1][k])) ** 2).mean((1, 2, 3)) for k in range(2))
    check("LPIPS", ours, truth,
          "Shifted and scaled images, features of unit length, squared differences weighted per channel, "
          "a mean over positions, a sum over layers.", 1e-5)


@exercise("perceptual_gan.AdversarialTokenizer.adaptive_weight", points=2)
def test_homework_perceptual_gan_adaptive_weight():
    model = perceptual_gan.AdversarialTokenizer(perceptual_gan.TinyAutoencoder(4), adaptive=True)
    weight = model.tokenizer.get_parameter(model.last_layer)
    a, b = torch.randn(2, *weight.shape)
    ours = model.adaptive_weight((weight * a).sum(), (weight * b * 0.1).sum())
    check("the weight", ours, a.norm() / (0.1 * b.norm() + 1e-4), "|grad of the others| / |grad of the adversarial loss|.")
    assert not ours.requires_grad, "the weight is a number to multiply with: detached"
    assert torch.is_grad_enabled() and weight.grad is None, \
        "torch.autograd.grad leaves .grad alone, where backward() fills it"
    with torch.no_grad():
        check("the weight without gradients", model.adaptive_weight(None, None), ours,
              "It is that of the last training step.")
    check("the weight against a loss without gradient", model.adaptive_weight((weight * a * 100).sum(), (weight * 0).sum()),
          torch.tensor(1e4), "At most 1e4.")


# ---------------------------------------------------------------------------------------------------
# Handing out and grading: python test_all.py list | handout | grade, see main() below

def graded(name):
    """The tests that grade NAME.py, in order."""
    return [t for t in list(globals().values()) if getattr(t, "exercise", "").split(".")[0] == name]


def exercises(name):
    """The functions of NAME.py that homework asks for, such as "GMMHead.density", in order."""
    return list(dict.fromkeys(t.exercise.partition(".")[2] for t in graded(name)))


parsed = functools.lru_cache(maxsize=None)(ast.parse)


def functions(source):
    """{"log_normal": node, "GMMHead.density": node, ...}: the functions and methods of a file."""
    found = {}
    for node in parsed(source).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        found |= {(f"{node.name}.{n.name}" if n is not node else n.name): n for n in inner if isinstance(n, ast.FunctionDef)}
    return found


def body(node):
    """The statements of a function after its docstring."""
    return node.body[ast.get_docstring(node) is not None:]


def blanked(source, name, targets):
    """The source of NAME.py with the bodies of `targets` cut out, line by line; every other byte stays."""
    lines, nodes = source.split("\n"), functions(source)
    for target in sorted(targets, key=lambda t: -nodes[t].lineno):     # from the end: line numbers stay right
        first, last = body(nodes[target])[0], nodes[target].end_lineno
        lines[first.lineno - 1:last] = [f'{" " * first.col_offset}raise NotImplementedError("homework: {name}.{target}")']
    return "\n".join(lines)


def without(source, cut):
    """A test file without its part for the teacher and without the tests whose names are in `cut`."""
    rule = "# " + "-" * 99 + "\n"
    source = rule.join(part for part in source.split(rule) if not part.startswith("# Not handed out"))
    lines = source.split("\n")
    for node in reversed(parsed(source).body if cut else []):
        if getattr(node, "name", "") in cut:
            end = node.end_lineno
            while end < len(lines) and not lines[end]:
                end += 1
            del lines[node.decorator_list[0].lineno - 1:end]
    return "\n".join(lines)


def without_answers(name, hidden=False):
    """{file: text} of the project's Python files as handed out for NAME.py. Functions of other files with the same name
    and code as an exercise are blanked, too. hidden: whether the hidden tests stay, as they do while grading."""
    texts = {f"{p}.py": (ROOT / f"{p}.py").read_text() for p in (*MODELS, *PROGRAMS, "data", "test_all")}
    code = lambda node: "".join(map(ast.dump, body(node)))
    nodes = functions(texts[f"{name}.py"])
    targets = [target for target in exercises(name) if target in nodes]                     # in a handout one may be gone
    answers = {(target.split(".")[-1], code(nodes[target])) for target in targets}
    for other in MODELS:
        same = [t for t, node in functions(texts[f"{other}.py"]).items() if (t.split(".")[-1], code(node)) in answers]
        texts[f"{other}.py"] = blanked(texts[f"{other}.py"], other, targets if other == name else same)
    cut = [] if hidden else [t.__name__ for t in graded(name) if t.hidden]
    texts["test_all.py"] = without(texts["test_all.py"], cut)
    return texts


def write_project(folder, name, hidden=False):
    """The project as handed out for NAME.py, into an existing folder."""
    for file, text in without_answers(name, hidden).items():
        (folder / file).write_text(text)
    shutil.copytree(ROOT / "golden", folder / "golden")


class Stopped(BaseException):
    """A student's code went on for too long, or printed too much. No Exception: `except Exception` must not catch it."""


class Capped(io.StringIO):
    def write(self, text):
        if self.tell() > 100_000:
            raise Stopped("prints without end: more than 100,000 characters")
        return super().write(text)


def trial(test, seconds=0):
    """Run one graded test -> what is wrong, in a sentence, or "". seconds: of processor time, 0: any number."""
    def late(*_):
        raise Stopped(f"not done after {seconds:g} s of processor time: an endless loop?")
    name = test.exercise.split(".")[0]
    torch.manual_seed(0)
    if seconds:
        signal.signal(signal.SIGPROF, late), signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        with contextlib.redirect_stdout(Capped()), contextlib.redirect_stderr(Capped()):
            test()
        return ""
    except AssertionError as e:
        text = str(e) or "a check failed"
    except Stopped as e:
        text = str(e)
    except NotImplementedError:
        text = "not written yet"
    except BaseException as e:
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if Path(f.filename).name == f"{name}.py"]
        text = f"{type(e).__name__}: {e}" + (f" ({name}.py, line {lines[-1]})" if lines else "")
        if isinstance(e, MemoryError) or "allocate memory" in text:
            text = "asks for more memory than it may have: " + text
    finally:
        if seconds:
            signal.setitimer(signal.ITIMER_PROF, 0)
    return " ".join(text.split())[:600]


def run_tests(name, seconds, tests):
    """The part of grading that runs in a process of its own, in the student's copy of the project: a line to results.jsonl
    before and after each test, so that the grader knows how far a process has come that dies."""
    by_name = {t.__name__: t for t in graded(name)}
    with open("results.jsonl", "a") as f:
        for test in tests:
            print("start", test, sep="\t", file=f, flush=True)
            print("end", test, trial(by_name[test], float(seconds)), sep="\t", file=f, flush=True)
    os._exit(0)                                             # whatever threads the student's code has left


def limits(gigabytes):
    """For a student's process: memory, the size of a file, no core dumps."""
    import resource                                         # not on Windows, where the tests run and grading does not
    for kind, most in (("DATA", int(gigabytes * 2**30)), ("FSIZE", 2**24), ("CORE", 0)):
        kind = getattr(resource, f"RLIMIT_{kind}")
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def run_process(folder, name, tests, args, seconds):
    """Run `tests` in the student's copy of the project -> {test: what is wrong, or ""} for those that came to an end, the
    tests that began, and what ended the process, in a sentence."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"}
    # Imported and not run as a script, for its compiled file lies beside it; and without torch's compiler, which mar.py's
    # one use of torch._disable_dynamo would load: together they halve the 3 s until the first test.
    start = "import torch; torch._disable_dynamo = lambda f: f; import test_all; test_all.main()"
    words = [sys.executable, "-c", start, "_run", name, str(args.test_seconds), *tests]
    results, output = folder / "results.jsonl", folder / "output.txt"
    with open(output, "wb") as f:
        child = subprocess.Popen(words, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=f, stderr=f,
                                 start_new_session=True, preexec_fn=lambda: limits(args.gigabytes))
        try:
            code = child.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            code = None
        try:
            os.killpg(child.pid, signal.SIGKILL)            # with all that it has started
        except ProcessLookupError:
            pass
        child.wait()
    done, began = {}, []
    for line in results.read_text(errors="replace").split("\n")[:-1] if results.is_file() else ():
        key, test, wrong = (line.split("\t") + ["", ""])[:3]
        began, done = began + [test] * (key == "start"), done | ({test: wrong} if key == "end" else {})
    if code is None and not began:
        return done, began, f"is not imported within {args.seconds:g} s: an endless loop?"
    if code is None:
        return done, began, f"stopped: all questions together may take {args.seconds:g} s"
    if code < 0:
        return done, began, f"crashes the Python interpreter ({signal.Signals(-code).name})"
    if began:
        return done, began, f"ends the Python interpreter (exit code {code})"
    printed = output.read_text(errors="replace")
    last = [line for line in printed[-5000:].split("\n") if line.strip()] or [f"exit code {code}"]
    why = "prints without end" if len(printed) > 2**23 else last[-1][:600]
    return done, began, f"cannot be imported: {why}"


def grade_one(name, path, clean, args):
    """Grade one student -> dict: student, file, points, of, seconds, remark, and tests: [(test, points, what is wrong)]."""
    start, tests, wrong, remark = time.perf_counter(), graded(name), {}, ""
    file = path if path.suffix == ".py" else path / f"{name}.py"
    student = file.resolve().parent.name if file.name == f"{name}.py" else file.stem
    try:
        text = file.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(text, f"{name}.py", "exec", dont_inherit=True)
    except FileNotFoundError:
        remark = f"there is no {file}"
    except OSError as e:
        remark = f"{file} cannot be read ({e.strerror})"
    except SyntaxError as e:
        remark = f"{name}.py is no Python: {e.msg}" + (f" (line {e.lineno})" if e.lineno else "")
    except (ValueError, RecursionError, MemoryError, OverflowError) as e:
        remark = f"{name}.py is no Python: {e}"
    queue = [] if remark else [t.__name__ for t in tests]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        while queue:                                        # once more for the rest if a question has killed the process
            here = Path(folder) / str(len(queue))
            shutil.copytree(clean, here)
            (here / f"{name}.py").write_bytes(text)
            done, began, ending = run_process(here, name, queue, args, args.seconds - (time.perf_counter() - start))
            wrong |= done
            queue = [t for t in queue if t not in done]
            if queue and (not began or ending.startswith("stopped")):
                remark = ending if began else f"{name}.py {ending}"
                wrong |= {t: ending if t in began else "not reached in time" for t in queue if began}
                break
            if queue:
                wrong[queue.pop(0)] = ending
    rows = [(t, t.points if wrong.get(t.__name__) == "" else 0, wrong.get(t.__name__, "")) for t in tests]
    return dict(student=student, file=name, points=sum(points for _, points, _ in rows), of=sum(t.points for t in tests),
                seconds=time.perf_counter() - start, remark=remark, tests=rows)


def gradescope(row):
    """One student's grades as Gradescope's results.json has them. Hidden tests are shown after the due date."""
    tests = [dict(name=f"{t.exercise}: {t.__name__}", score=points, max_score=t.points, output=wrong or row["remark"],
                  status="passed" if points else "failed", visibility="after_due_date" if t.hidden else "visible")
             for t, points, wrong in row["tests"]]
    return dict(score=row["points"], execution_time=round(row["seconds"], 1), output=row["remark"], tests=tests)


def grade(args):
    """Print a table for each student, write grades.csv and, if asked for, Gradescope's JSON."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        clean = Path(folder)
        write_project(clean, args.file, hidden=True)
        compileall.compile_dir(clean, maxlevels=0, quiet=2)                                 # once, not once per student
        for old in (clean / "__pycache__").glob(f"{args.file}.*"):
            old.unlink()
        for path in args.students:
            row = grade_one(args.file, Path(path), clean, args)
            if any(row["student"] == r["student"] for r in rows):
                row["student"] = str(path).replace("/", "_")                                # two folders of one name
            rows.append(row)
            print(f"{row['student']:20s} {row['points']:2d} of {row['of']} points   {row['seconds']:.1f} s"
                  + (f"   {row['remark']}" if row["remark"] else ""))
            for t, points, wrong in row["tests"] if row["points"] or not row["remark"] else []:
                print(f"    {points} of {t.points}  " + (f"{t.exercise:46s} {wrong}" if wrong else t.exercise), flush=True)
    try:
        with open(args.csv, "w", newline="") as f:
            out = csv.writer(f)
            out.writerow(["student", "file", "points", "of", *[t.__name__ for t in graded(args.file)], "seconds", "remark"])
            for row in rows:
                out.writerow([row["student"], row["file"], row["points"], row["of"],
                              *[points for _, points, _ in row["tests"]],
                              f"{row['seconds']:.1f}", row["remark"]])
        print(f"wrote {args.csv}")
        if args.json:
            for row in rows:
                path = Path(args.json) if len(rows) == 1 else Path(args.json) / f"{row['student']}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(gradescope(row), indent=1))
            print(f"wrote {args.json}")
    except OSError as e:
        raise data.BadInput(f"could not write ({e})") from None


def handout(args):
    """Write the project with one file's exercises blanked."""
    folder = Path(args.o or f"homework-{args.file}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise data.BadInput(f"-o {folder} is there already and not an empty folder: name another one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_project(folder, args.file)
        for name in ("requirements.txt", "README.md", "LICENSE", "pictures"):
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name)
            elif (ROOT / name).exists():
                shutil.copy(ROOT / name, folder / name)
    except OSError as e:
        raise data.BadInput(f"could not write ({e})") from None
    hidden = sum(t.points for t in graded(args.file) if t.hidden)
    print(f"wrote {folder}: {args.file}.py with {len(exercises(args.file))} functions to write: the docstrings say what.\n"
          f"There, python -m pytest test_all.py -k homework_{args.file} says how far one has come, and "
          f"python test_all.py grade {args.file} . counts the points"
          + (f"; hidden tests give {hidden} more." if hidden else "."))


def list_exercises(args):
    """Points, function and test; the hidden ones are marked."""
    for name in [args.file] if args.file else MODELS:
        tests = graded(name)
        print(f"{name}.py: {sum(t.points for t in tests)} points")
        for t in tests:
            print(f"    {t.points}  {t.exercise:52s} {t.__name__}{'   hidden' if t.hidden else ''}")


def main():
    if sys.argv[1:2] == ["_run"]:                           # grading: see run_process
        return run_tests(sys.argv[2], sys.argv[3], sys.argv[4:])
    parser = argparse.ArgumentParser(description="The tests as homework: hand a file out, grade what comes back. (The tests "
                                     "themselves: python -m pytest test_all.py)")
    commands = parser.add_subparsers(required=True, metavar="list | handout | grade")
    p = commands.add_parser("list", help="points, functions and tests")
    p.add_argument("file", nargs="?", choices=MODELS, metavar="FILE", help="one model file, such as vae; default: all")
    p.set_defaults(run=list_exercises)
    p = commands.add_parser("handout", help="copy the project with the exercises of one file blanked")
    p.add_argument("file", choices=MODELS, metavar="FILE", help=" | ".join(MODELS))
    p.add_argument("-o", metavar="DIR", help="a new or empty folder (default: homework-FILE)")
    p.set_defaults(run=handout)
    p = commands.add_parser("grade", help="run the graded tests on students' files, each in a process of its own",
                            description="Runs students' code with your rights. A time limit, a memory limit and a folder of "
                            "its own stop accidents; nothing stops somebody who wants to read, delete or send your files, "
                            "or to fake results. Grade what you do not trust in a container. Linux, or macOS, where the "
                            "memory limit has no effect.")
    p.add_argument("file", choices=MODELS, metavar="FILE", help=" | ".join(MODELS))
    p.add_argument("students", nargs="+", help="folders that hold FILE.py, or Python files by any name")
    p.add_argument("--csv", default="grades.csv", metavar="PATH", help="a row per student (default: grades.csv)")
    p.add_argument("--json", metavar="PATH",
                   help="Gradescope's results.json; with several students a folder of one for each")
    p.add_argument("--seconds", type=float, default=60.0, help="time limit of one student, for all questions (default: 60)")
    p.add_argument("--test_seconds", type=float, default=10.0, help="processor time limit of one question (default: 10)")
    p.add_argument("--gigabytes", type=float, default=4.0, help="memory limit of a student's process (default: 4)")
    p.set_defaults(run=grade)
    args = parser.parse_args()
    args.run(args)


# ---------------------------------------------------------------------------------------------------
# Not handed out: the graders graded. What students get wrong, line by line: function, right, wrong, and the points that it
# costs where that is not all points of the function.

MISTAKES = [
    ("gmm_head.GMMHead.density", " - 0.5 * math.log(2 * math.pi) * x.shape[-1]", ""),
    ("gmm_head.GMMHead.density", "math.log(2 * math.pi) * x.shape[-1]", "math.log(2 * math.pi)"),
    ("gmm_head.GMMHead.density", " - sigma.log().sum(-1)", ""),
    ("gmm_head.GMMHead.density", "torch.logsumexp(log_pi + log_n, dim=-1)", "(log_pi + log_n).exp().sum(-1).log()"),
    ("gmm_head.GMMHead.density", "log_pi + log_n", "log_pi * log_n"),
    ("gmm_head.GMMHead.draw", "temperature * sigma", "sigma"),
    ("gmm_head.GMMHead.draw", "temperature * sigma", "temperature ** 0.5 * sigma"),
    ("gmm_head.GMMHead.draw", "GMMHead.pick(sigma, k)", "sigma.mean(-2)"),
    ("gmm_head.GMMHead.draw", "normal_noise(mu, clip)", "normal_noise(mu)"),
    ("gmm_head.GMMHead.draw", "GMMHead.choose(log_pi, n)", "log_pi.argmax(-1).expand(*n, *log_pi.shape[:-1])"),
    ("gmm_head.guided_normal", "cfg - (cfg - 1) * ratio", "cfg + (cfg - 1) * ratio"),
    ("gmm_head.guided_normal", "sc / lam.sqrt()", "sc / lam", 2),
    ("gmm_head.guided_normal", "(mc - mu) / lam", "(mu - mc) / lam", 2),
    ("gmm_head.guided_normal", "(sc / su) ** 2", "sc / su", 2),
    ("gmm_head.guided_normal", "lam = torch.where(proper, lam, 1.0)", "pass", 1),
    ("gmm_head.GMMHead.nucleus", "pi.cumsum(-1) - pi >= top_p", "pi.cumsum(-1) >= top_p"),
    ("gmm_head.GMMHead.nucleus", ".log_softmax(-1)", ""),
    ("gmm_head.GMMHead.nucleus", "drop = drop.scatter(-1, order, drop)", "pass"),
    ("gmm_head.GMMHead.nucleus", "descending=True", "descending=False"),
    ("flow_adapter.Coupling.forward", "return x2, x1", "return x1, x1"),
    ("flow_adapter.Coupling.forward", "x1 + self.shift(x2)", "x1 - self.shift(x2)"),
    ("flow_adapter.Coupling.forward", "x1 + self.shift(x2)", "x2 + self.shift(x1)"),
    ("flow_adapter.Coupling.inverse", "b - self.shift(a)", "b + self.shift(a)"),
    ("flow_adapter.Coupling.inverse", "b - self.shift(a)", "a - self.shift(b)"),
    ("flow_adapter.Coupling.inverse", "b - self.shift(a), a", "a, b - self.shift(a)"),
    ("flow_adapter.FlowAdapter.inverse", "reversed(self.blocks)", "self.blocks"),
    ("flow_adapter.FlowAdapter.inverse", "block.inverse(x1, x2)", "block(x1, x2)"),
    ("flow_adapter.FlowAdapter.inverse", "self.join(x1, x2)", "self.join(x2, x1)"),
    ("flow_adapter.Adapted.sample", "self.adapter.inverse(self.generator", "self.adapter(self.generator"),
    ("flow_adapter.Adapted.sample", "self.adapter(known * known_mask[..., None])", "known * known_mask[..., None]"),
    ("flow_adapter.Adapted.sample", "return x if known is None else torch.where(known_mask[..., None], known, x)",
     "return x"),
    ("flow_adapter.Adapted.sample", "on_step(i, self.adapter.inverse(u), mask)", "on_step(i, u, mask)"),
    ("ar_transformer.rotate", "a * cos - b * sin, b * cos + a * sin", "a * cos + b * sin, b * cos - a * sin"),
    ("ar_transformer.rotate", "unflatten(-1, (-1, 2)).unbind(-1)", "chunk(2, -1)"),
    ("ar_transformer.rotate", "-1).flatten(-2)", "-2).flatten(-2)"),
    ("ar_transformer.rotate", "cos, sin = ", "sin, cos = "),
    ("ar_transformer.Attention.forward", "v = qkv[:, :, 2 * self.n_head:]",
     "v = rotate(qkv[:, :, 2 * self.n_head:], rope)", 2),
    ("ar_transformer.Attention.forward", "y.transpose(1, 2).reshape(B, S, C)", "y.reshape(B, S, C)"),
    ("ar_transformer.Attention.forward", "causal=mask is None and S > 1", "causal=S > 1", 2),
    ("ar_transformer.Attention.forward", "causal=mask is None and S > 1", "causal=False"),
    ("ar_transformer.Attention.forward", "cache[1].index_copy_(2, at, v.type_as(cache))", "pass", 2),
    ("ar_transformer.Attention.forward", "cache[0].index_copy_(2, at,", "cache[0].index_copy_(2, at * 0,", 2),
    ("ar_transformer.ARTransformer.hidden", "tokens[:, :-1]", "tokens[:, 1:]"),
    ("ar_transformer.ARTransformer.hidden", "self.n_prefix - 1:", "self.n_prefix:"),
    ("ar_transformer.ARTransformer.hidden", "self.embed(tokens[:, :-1])], 1)", "self.embed(tokens)], 1)"),
    ("ar_transformer.ARTransformer.hidden", "self.prefix(cond, drop)", "self.prefix(cond)"),
    ("maskgit.n_hidden", "n.ceil()", "n.floor()"),
    ("maskgit.n_hidden", ".clamp(1, T)", ""),
    ("maskgit.n_hidden", "n.round() if schedule == \"arccos\" else n.ceil()", "n.ceil()"),
    ("maskgit.still_hidden", "(step + 1) / steps", "step / steps"),
    ("maskgit.still_hidden", ".floor()", ".ceil()"),
    ("maskgit.still_hidden", "SCHEDULES[schedule](r)", "SCHEDULES['cosine'](r)"),
    ("maskgit.keep_hidden", "torch.zeros_like(first).scatter(1, order, first)", "first"),
    ("maskgit.keep_hidden", " < n)", " <= n)"),
    ("maskgit.keep_hidden", "score.argsort(", "(-score).argsort("),
    ("maskgit.keep_hidden", " < n)", " >= n)"),
    ("maskgit.masked_mean", "weight.sum(1)).mean()", "weight.shape[1]).mean()"),
    ("maskgit.masked_mean", "(loss * weight).sum() / weight.sum()", "(loss * weight).mean()"),
    ("maskgit.masked_mean", "if per_image:", "if not per_image:"),
    ("maskgit.MaskGIT.training_mask", "torch.rand(B, 1, device=device)", "torch.rand(1, 1, device=device)"),
    ("maskgit.MaskGIT.training_mask", " * self.u_max", ""),
    ("maskgit.MaskGIT.training_mask", ".argsort(1).argsort(1) < n", " < n / self.seq_len"),
    ("maskgit.MaskGIT.training_mask", ".argsort(1) < n", ".argsort(1) <= n"),
    ("maskgit.MaskGIT.training_mask", "torch.rand(B, self.seq_len, device=device)",
     "torch.rand(1, self.seq_len, device=device).expand(B, -1)"),
    ("mar.mask_rate", "start + u * (rate.cdf(1.0) - start)", "u"),
    ("mar.mask_rate", "(rate.cdf(1.0) - start)", "(1 - start)"),
    ("mar.mask_rate", "rate.inv_cdf(start + u * (rate.cdf(1.0) - start))", "low + u * (1 - low)"),
    ("mar.masked_counts", "math.cos(math.pi / 2 * k / steps)", "math.sin(math.pi / 2 * k / steps)"),
    ("mar.masked_counts", "math.cos(math.pi / 2 * k / steps)", "(1 - k / steps)"),
    ("mar.masked_counts", "min(counts[-1] - 1, math.floor(n * math.cos(math.pi / 2 * k / steps)))",
     "math.floor(n * math.cos(math.pi / 2 * k / steps))"),
    ("mar.masked_counts", " + [0]", ""),
    ("mar.draw_order", "- 2 * known_mask.float()", "+ 2 * known_mask.float()"),
    ("mar.draw_order", "2 * known_mask.float()", "0.5 * known_mask.float()"),
    ("mar.draw_order", "torch.rand(B, T, device=device)", "torch.rand(1, T, device=device).expand(B, T)[:1].repeat(B, 1)"),
    ("mar.draw_order", ".argsort(1)", ""),
    ("mar.MAR.forward", "[:, T - n:]", "[:, :n]"),
    ("mar.MAR.forward", "self.head.loss(take(h, hidden), take(tokens, hidden))", "self.head.loss(h, tokens)"),
    ("mar.MAR.forward", "take(tokens, hidden)", "tokens[:, :n]"),
    ("mar.MAR.forward", "if self.training and self.label_drop > 0:", "if self.label_drop > 0:"),
    ("mar.MAR.forward", "cond, mask, T - n)", "cond, mask, n)"),
    ("diffusion_head.DiffusionHead.reverse", "(x - s * eps) / a", "x - s * eps"),
    ("diffusion_head.DiffusionHead.reverse", "(x - s * eps) / a", "(x - s * s * eps) / a"),
    ("diffusion_head.DiffusionHead.reverse", "k0 * x0 + kx * x", "kx * x0 + k0 * x"),
    ("diffusion_head.DiffusionHead.reverse", "(v + 1) / 2", "v"),
    ("diffusion_head.DiffusionHead.reverse", "log_tilde + (v + 1) / 2 * (log_beta - log_tilde)",
     "log_beta + (v + 1) / 2 * (log_tilde - log_beta)"),
    ("diffusion_head.DiffusionHead.terms", "eps.detach()", "eps", 2),
    ("diffusion_head.DiffusionHead.terms", "(noise - eps) ** 2", "(x - eps) ** 2", 2),
    ("diffusion_head.DiffusionHead.terms", "row[0] * x + row[1] * noise", "row[0] * x + row[1] ** 2 * noise", 2),
    ("diffusion_head.DiffusionHead.terms", "kl_bits(row[4] * x + row[5] * x_t, row[7], mean, log_var)",
     "kl_bits(mean, log_var, row[4] * x + row[5] * x_t, row[7])", 2),
    ("diffusion_head.DiffusionHead.terms", "(noise - x)) ** 2", "(x - noise)) ** 2", 1),
    ("diffusion_head.DiffusionHead.terms", "T_TRAIN * t", "t", 1),
    ("diffusion_head.DiffusionHead.terms", "(1 - u) * x + u * noise", "u * x + (1 - u) * noise", 1),
    ("diffusion_head.DiffusionHead.predict", "torch.lerp(uncond[..., :D], cond[..., :D], cfg)",
     "torch.lerp(cond[..., :D], uncond[..., :D], cfg)"),
    ("diffusion_head.DiffusionHead.predict", "torch.lerp(uncond[..., :D], cond[..., :D], cfg)",
     "cond[..., :D] + cfg * (cond - uncond)[..., :D]"),
    ("diffusion_head.DiffusionHead.predict", "cfg), cond[..., D:]", "cfg), uncond[..., D:]"),
    ("diffusion_head.kl_bits", " / math.log(2)", ""),
    ("diffusion_head.kl_bits", "log_var2 - log_var - 1", "log_var - log_var2 - 1"),
    ("diffusion_head.kl_bits", " - 1 +", " +"),
    ("diffusion_head.kl_bits", "(-log_var2).exp()", "(-log_var).exp()"),
    ("diffusion_head.kl_bits", "kl.mean(-1)", "kl.sum(-1)"),
    ("vae.VAE.kl", "std**2 - 1 - 2", "std**2 - 2"),
    ("vae.VAE.kl", "2 * std.log()", "std.log()"),
    ("vae.VAE.kl", "0.5 * ", ""),
    ("vae.VAE.kl", ".sum(-1)", ".mean(-1)"),
    ("vae.VAE.kl", "std**2", "std"),
    ("vae.VAE.reparameterise", "std * torch", "std**2 * torch"),
    ("vae.VAE.reparameterise", "torch.randn_like(std)", "torch.rand_like(std)"),
    ("vae.VAE.reparameterise", "mean + std *", "mean + std.detach() *"),
    ("vae.VAE.reparameterise", "mean + std * torch.randn_like(std)", "torch.normal(mean, std)"),
    ("vae.VAE.log_likelihood", "torch.where(v < 255, F.logsigmoid(a), 0)", "F.logsigmoid(a)"),
    ("vae.VAE.log_likelihood", "1 / 255 - self", "1 / 127.5 - self"),
    ("vae.VAE.log_likelihood", ".sum((1, 2, 3))", ".mean((1, 2, 3))"),
    ("vae.VAE.log_likelihood", "(below + above + inside)",
     "torch.log(torch.where(v < 255, a.sigmoid(), 1) - torch.where(v > 0, (a - step).sigmoid(), 0))"),
    ("vae.VAE.measure", " + (std**2).mean(0)", ""),
    ("vae.VAE.measure", ".rsqrt()", ".sqrt()"),
    ("vae.VAE.measure", ".rsqrt()", ".reciprocal()"),
    ("vae.VAE.measure", "mean.mean(0)", "mean.mean()"),
    ("vq.VectorQuantizer.distances", " - 2 * z", " - z"),
    ("vq.VectorQuantizer.distances", " - 2 * z", " + 2 * z"),
    ("vq.VectorQuantizer.distances", " + (codes**2).sum(1)", ""),
    ("vq.VectorQuantizer.distances", "(z**2).sum(1, keepdim=True)", "(z**2).sum()"),
    ("vq.VectorQuantizer.nearest", "argmin(1)", "argmax(1)"),
    ("vq.VectorQuantizer.nearest", "self.unit(self.codebook)", "self.codebook"),
    ("vq.VectorQuantizer.nearest", "argmin(1).view(z.shape[:2])", "argmin(1)"),
    ("vq.VectorQuantizer.forward", "q = z + (e - z).detach()", "q = e", 3),
    ("vq.VectorQuantizer.forward", "F.mse_loss(z, e.detach())", "F.mse_loss(z, e)", 3),
    ("vq.VectorQuantizer.forward", "loss + F.mse_loss(e, z.detach())", "loss + self.beta * F.mse_loss(e, z.detach())", 3),
    ("vq.VectorQuantizer.forward", "F.mse_loss(z, e.detach())", "F.mse_loss(e, z.detach())"),
    ("vq.VectorQuantizer.forward", "elif self.training:", "else:", 1),
    ("vq.VectorQuantizer.forward", "if not self.ema:", "if True:", 1),
    ("vq.VectorQuantizer.entropy_loss", "return -(", "return ("),
    ("vq.VectorQuantizer.entropy_loss", ".sum(-1).mean()", ".mean()"),
    ("vq.VectorQuantizer.entropy_loss", "+ (mean", "- (mean"),
    ("vq.VectorQuantizer.entropy_loss", "self.unit(self.codebook)) / temperature", "self.unit(self.codebook))"),
    ("lfq.quantize", "return z + (q - z).detach()", "return q", 2),
    ("lfq.quantize", "torch.arange(z.shape[-1], device=z.device)", "torch.arange(z.shape[-1], device=z.device).flip(0)", 2),
    ("lfq.quantize", "positive = z > 0", "positive = z >= 0", 1),
    ("lfq.quantize", "torch.where(positive, 1.0, -1.0)", "torch.where(positive, 1.0, 0.0)"),
    ("lfq.quantize", "torch.where(positive, 1.0, -1.0).to(z.dtype)", "z.sign()", 1),
    ("lfq.codes", " * 2.0 - 1", ""),
    ("lfq.codes", "torch.arange(bits, device=index.device)", "torch.arange(bits - 1, -1, -1, device=index.device)"),
    ("lfq.codes", "2.0 - 1", "2 - 1"),
    ("lfq.codes", " * 2.0 - 1", " * -2.0 + 1"),
    ("lfq.entropy_penalty", "4 / temperature", "2 / temperature"),
    ("lfq.entropy_penalty", "per_sample = (F.softplus(-a) + a * torch.sigmoid(-a)).sum(-1).mean()",
     "per_sample = (F.softplus(-a) + a * torch.sigmoid(-a)).mean()"),
    ("lfq.entropy_penalty", "F.softplus(-a) + a * torch.sigmoid(-a)",
     "-(a.sigmoid() * a.sigmoid().log() + (-a).sigmoid() * (-a).sigmoid().log())"),
    ("lfq.entropy_penalty", "for part in z.chunk(groups, dim=1)", "for part in [z]"),
    ("lfq.entropy_penalty", "z.chunk(groups, dim=1)", "[z[:, i::groups] for i in range(groups)]"),
    ("lfq.CausalConv.forward", "self.kernel_size[0] - 1, 0))", "0, self.kernel_size[0] - 1))"),
    ("lfq.CausalConv.forward", "self.kernel_size[0] - 1, 0))", "self.kernel_size[0] // 2, self.kernel_size[0] // 2))"),
    ("lfq.CausalConv.forward", "weight[:, :, -1]", "weight[:, :, 0]"),
    ("lfq.CausalConv.forward", "self.kernel_size[0] - 1, 0))", "self.kernel_size[0] - self.stride[0], 0))"),
    ("titok.LatentEncoder.forward", "x[:, -self.n_tokens:]", "x[:, :self.n_tokens]"),
    ("titok.LatentEncoder.forward", " + self.pos ", " "),
    ("titok.LatentEncoder.forward", "x = self.norm_pre(x)", "pass"),
    ("titok.LatentEncoder.forward", "x.reshape(B, -1, self.n_tokens).transpose(1, 2)", "x", 1),
    ("titok.LatentDecoder.forward", "x[:, 1:1 + self.side**2]", "x[:, :self.side**2]"),
    ("titok.LatentDecoder.forward", "x[:, 1:1 + self.side**2]", "x[:, -self.side**2:]"),
    ("titok.LatentDecoder.forward", "self.side, self.side, p, p, 3).permute(0, 5, 1, 3, 2, 4)",
     "self.side, self.side, 3, p, p).permute(0, 3, 1, 4, 2, 5)"),
    ("titok.LatentDecoder.forward", "(0, 5, 1, 3, 2, 4)", "(0, 5, 1, 2, 3, 4)"),
    ("titok.LatentDecoder.forward", "self.embed(q) + self.pos", "self.embed(q)"),
    ("titok.TiTok.decode_raw", ".softmax(-1)", ""),
    ("titok.TiTok.decode_raw", ".softmax(-1)", ".softmax(1)"),
    ("titok.TiTok.decode_raw", "self.decoder(q).softmax(-1)", "F.one_hot(self.decoder(q).argmax(-1), len(every)).float()"),
    ("titok.TiTokVAE.bottleneck", "self.seq_len / self.n_pixels", "1 / self.n_pixels"),
    ("titok.TiTokVAE.bottleneck", "self.reparameterise(mean, std)", "mean"),
    ("titok.TiTokVAE.bottleneck", "self.beta * kl", "kl"),
    ("titok.TiTokVAE.bottleneck", "self.gaussian(z)", "z.chunk(2, dim=-1)"),
    ("perceptual_gan.critic_loss", "F.relu(1 - real.float())", "F.relu(1 + real.float())"),
    ("perceptual_gan.critic_loss", "return 0.5 * (F.relu", "return (F.relu"),
    ("perceptual_gan.critic_loss", "F.softplus(-real.float())", "F.softplus(real.float())"),
    ("perceptual_gan.critic_loss", "F.relu(1 + fake.float())", "(1 + fake.float())"),
    ("perceptual_gan.generator_loss", "-fake.float().mean()", "fake.float().mean()"),
    ("perceptual_gan.generator_loss", "F.softplus(-fake.float())", "F.softplus(fake.float())"),
    ("perceptual_gan.generator_loss", "-fake.float().mean()", "F.relu(1 - fake.float()).mean()"),
    ("perceptual_gan.unit_channels", "sum(1, keepdim=True)", "sum()"),
    ("perceptual_gan.unit_channels", "sum(1, keepdim=True)", "mean(1, keepdim=True)"),
    ("perceptual_gan.unit_channels", " + 1e-20", ""),
    ("perceptual_gan.unit_channels", ".sqrt()", ""),
    ("perceptual_gan.LPIPS.forward", "(x - self.shift) / self.scale", "x"),
    ("perceptual_gan.LPIPS.forward", ".square()).sum(1)", ".abs()).sum(1)"),
    ("perceptual_gan.LPIPS.forward", "mean((1, 2))", "sum((1, 2))"),
    ("perceptual_gan.LPIPS.forward", "(unit_channels(f) - unit_channels(g))", "(f - g)"),
    ("perceptual_gan.LPIPS.forward", "lin.weight * ", ""),
    ("perceptual_gan.AdversarialTokenizer.adaptive_weight", "a / (b + 1e-4)", "b / (a + 1e-4)"),
    ("perceptual_gan.AdversarialTokenizer.adaptive_weight", ".clamp(max=1e4)", ""),
    ("perceptual_gan.AdversarialTokenizer.adaptive_weight", "self.balance.copy_((a / (b + 1e-4)).clamp(max=1e4))",
     "return (a / (b + 1e-4)).clamp(max=1e4)"),
]


SOURCES = {name: (ROOT / f"{name}.py").read_text() for name in MODELS}


@contextlib.contextmanager
def written(target, source):
    """While it lasts, the function `target`, such as "vae.VAE.kl", is what `source` (its lines) makes of it."""
    module, *owner, function = target.split(".")
    space = vars(globals()[module])
    exec(compile(textwrap.dedent(source), f"{module}.py", "exec"), space, made := {})
    with patch.object(space[owner[0]] if owner else globals()[module], function, made[function]):
        yield


def lines_of(target):
    """The source lines of a function, decorators included."""
    name, _, path = target.partition(".")
    node = functions(SOURCES[name])[path]
    first = min([node.lineno] + [d.lineno for d in node.decorator_list])
    return "\n".join(SOURCES[name].split("\n")[first - 1:node.end_lineno])


def lost(name):
    """The graded tests of NAME.py that fail just now -> {test: what is wrong}."""
    return {t: wrong for t in graded(name) if (wrong := trial(t))}


@pytest.mark.parametrize("name", MODELS)
def test_homework_of_a_file_is_ten_points_and_right_answers_get_them(name):
    assert sum(t.points for t in graded(name)) == 10 and 3 <= len(exercises(name)) <= 5
    nodes = functions(SOURCES[name])
    for target in exercises(name):
        assert ast.get_docstring(nodes[target]), f"{name}.{target} has no docstring, so there is no question"
        assert len([m for m in MISTAKES if m[0] == f"{name}.{target}"]) >= 3, f"fewer than three mistakes for {target}"
    assert not lost(name)


@pytest.mark.parametrize("name", MODELS)
def test_homework_not_done_costs_its_own_points_only(name):
    for target in exercises(name):
        source = lines_of(f"{name}.{target}")
        with written(f"{name}.{target}", blanked(textwrap.dedent(source), name, [target.split(".")[-1]])):
            failed = lost(name)
        assert {t.exercise for t in failed} == {f"{name}.{target}"} and set(failed.values()) == {"not written yet"}, failed
        assert len(failed) == len([t for t in graded(name) if t.exercise == f"{name}.{target}"])


@pytest.mark.parametrize("target", dict.fromkeys(m[0] for m in MISTAKES))
def test_homework_mistakes_cost_what_they_should(target):
    name = target.split(".")[0]
    whole = sum(t.points for t in graded(name) if t.exercise == target)
    for _, right, wrong, *points in (m for m in MISTAKES if m[0] == target):
        source = lines_of(target)
        assert source.count(right) == 1, f"{right!r} is {source.count(right)} times in {target}"
        with written(target, source.replace(right, wrong)):
            failed = lost(name)
        assert {t.exercise for t in failed} == {target}, f"{wrong!r} in {target} fails {[t.__name__ for t in failed]}"
        assert sum(t.points for t in failed) == (points or [whole])[0], (wrong, {t.__name__: w for t, w in failed.items()})
        assert all(len(w) > 20 and "Error:" not in w or "shape" in w for w in failed.values()) or "pass" in wrong, failed


@pytest.mark.parametrize("name", MODELS)
def test_homework_is_handed_out_without_answers_and_with_all_else(name):
    def answer(file, target):                               # the lines that are to be cut
        node = functions(SOURCES[file])[target]
        return "\n".join(SOURCES[file].split("\n")[body(node)[0].lineno - 1:node.end_lineno])
    texts, answers = without_answers(name), {target: answer(name, target) for target in exercises(name)}
    for other in MODELS:
        text = texts[f"{other}.py"]
        assert parsed(text) and (other != name or compile(text, f"{name}.py", "exec"))
        assert not (given := [target for target in answers if answers[target] in text]), f"{other}.py gives away {given}"
        holes = re.findall(r'^ *raise NotImplementedError\("homework: \w+\.([\w.]+)"\)$', text, re.M)
        assert other != name or holes == [target for target in functions(SOURCES[name]) if target in answers]
        for target in holes:                                # put the lines back, and it is the file, byte by byte
            text = re.sub(rf'^ *raise NotImplementedError\("homework: {other}\.{re.escape(target)}"\)$',
                          lambda _: answer(other, target), text, flags=re.M)
        assert text == SOURCES[other]
    tests = texts["test_all.py"]
    assert parsed(tests) and "MISTAKES" not in tests and all((f"def {t.__name__}(" in tests) != t.hidden for t in graded(name))
    everything = without_answers(name, hidden=True)["test_all.py"]
    assert all(f"def {t.__name__}(" in everything for t in graded(name)) and "MISTAKES" not in everything


def test_homework_from_the_command_line(tmp_path, monkeypatch, capsys):
    def typed(*words):
        monkeypatch.setattr(sys, "argv", ["test_all.py", *map(str, words)])
        main()
        return capsys.readouterr().out
    assert typed("list", "gmm_head").startswith("gmm_head.py: 10 points\n    3  gmm_head.GMMHead.density ")
    assert "with 4 functions to write" in typed("handout", "gmm_head", "-o", tmp_path / "hw")
    with pytest.raises(data.BadInput, match="not an empty folder"):
        typed("handout", "gmm_head", "-o", tmp_path / "hw")
    right, blank = SOURCES["gmm_head"], (tmp_path / "hw" / "gmm_head.py").read_text()
    change = lambda old, new: right.replace(old, new) if right.count(old) == 1 else pytest.fail(old)
    nucleus = "        pi, order = log_pi.exp().sort(-1, descending=True)\n"
    subtle = change("drop = pi.cumsum(-1) - pi >= top_p", "drop = pi.cumsum(-1) >= top_p")
    monster = change(nucleus, "        os._exit(3)\n" + nucleus).replace("import math\n", "import math\nimport os\n")
    monster = monster.replace("    ratio = (sc / su) ** 2\n", "    torch.empty(10 << 30)\n    ratio = (sc / su) ** 2\n")
    monster = monster.replace("        k = GMMHead.choose(log_pi, n)",
                              "        while True:\n            print(7)\n        k = 0")
    students = {
        "perfect": (right, 10, ""), "blank": (blank, 0, "not written yet"),
        "syntax": (change("class GMMHead(nn.Module):", "class GMMHead(nn.Module)"), 0,
                   "gmm_head.py is no Python: expected ':'"),
        "constant": (change("- sigma.log().sum(-1) - 0.5 * math.log(2 * math.pi) * x.shape[-1]\n        return torch.log",
                            "- sigma.log().sum(-1)\n        return torch.log"), 7, "log p is off by +2.757 on average"),
        "loop": (change(nucleus, "        while True:\n            pass\n" + nucleus), 8,
                 "not done after 1 s of processor time"),
        "subtle": (subtle, 8, "The one that reaches top_p belongs to them."),
        "monster": (monster, 3, "ends the Python interpreter (exit code 3)"), "nobody": (None, 0, "there is no ")}
    for name, (text, _, _) in students.items():
        (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "gmm_head.py").write_text(text)
    out = typed("grade", "gmm_head", *[tmp_path / name for name in students], "--csv", tmp_path / "grades.csv",
               "--json", tmp_path / "json", "--test_seconds", 1, "--seconds", 150)
    with open(tmp_path / "grades.csv", newline="") as f:
        grades = {row["student"]: row for row in csv.DictReader(f)}
    for name, (_, points, sentence) in students.items():
        assert int(grades[name]["points"]) == points, out
        report = json.loads((tmp_path / "json" / f"{name}.json").read_text())
        assert report["score"] == points and sum(t["max_score"] for t in report["tests"]) == 10
        assert sentence in report["output"] + " ".join(t["output"] for t in report["tests"]), out
    assert "prints without end" in out and "asks for more memory than it may have" in out


# ---------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    main()
