"""Tests of gmm_head."""
import math

import pytest
import torch
import torch.nn as nn
from torch import distributions as D

import gmm_head
from tests.helpers import close, golden


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
    floor = g["scales"] <= 1e-6                       # on the floor only sigma's own gradient is a convention
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
    assert (gradient[0] -
            gradient[1]).abs().max() > 1e-4, "equal components get equal gradients and stay equal"


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
    truth = D.MixtureSameFamily(D.Categorical(torch.ones(8)), D.Independent(D.Normal(modes, 0.1),
                                                                            1)).log_prob(x)
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
    scale, log_bound = gmm_head.envelope(*pair, cfg, official=True)
    close(scale, g["prop_scale"])
    finite = torch.isfinite(g["fac"])
    assert torch.allclose(log_bound[finite], g["fac"][finite].log(), atol=1e-4) and torch.isinf(
        log_bound[~finite]).all()
    accepted = gmm_head.accept(g["prop_samples"], g["prop_uniform01"], *pair, cfg, scale, log_bound)
    assert torch.equal(accepted, g["accept"].bool())
    early = (g["first_accept"] >= 0) & (g["first_accept"] < len(accepted))  # 40 of 200 proposals are recorded
    ours = gmm_head.first_accepted(g["prop_samples"], accepted, torch.zeros(()))
    assert early.sum() > 12 and torch.equal(ours[early], g["sample"][early])
    never = gmm_head.first_accepted(g["prop_samples"], torch.zeros_like(accepted), pair[0])
    assert torch.equal(never, pair[0]), "no accepted try: the fallback"


def one_channel(pi, mu, sigma):
    """A mixture of one channel, on rows."""
    return torch.tensor(pi).log(), torch.tensor(mu)[:, None], torch.tensor(sigma)[:, None]


def integrate_guided(c, u, cfg):
    """Mean and std of p_c^cfg p_u^(1 - cfg) on a fine grid, with torch.distributions."""
    x = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    log_p = lambda m: D.MixtureSameFamily(D.Categorical(logits=m[0].double()),
                                          D.Normal(*(v[:, 0].double() for v in m[1:]))).log_prob(x)
    weight = (cfg * log_p(c) + (1 - cfg) * log_p(u)).softmax(0)
    mean = (weight * x).sum()
    return mean, (weight * (x - mean) ** 2).sum().sqrt()


SINGLE = [one_channel([1.0], [0.8], [0.7]), one_channel([1.0], [-0.5], [1.2])]
THREE = [
    one_channel([0.5, 0.3, 0.2], [-1.5, 0.3, 2.2], [0.5, 0.4, 0.3]),
    one_channel([0.2, 0.5, 0.3], [1.0, -1.0, 0.5], [1.5, 1.2, 1.0])
]


@pytest.mark.parametrize("w", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("guidance, pair", [("closed", SINGLE), ("rejection", SINGLE), ("importance", SINGLE),
                                            ("importance", THREE)])
def test_gmm_guidance_equals_numerical_integration(guidance, pair, w):
    c, u = ([v.expand(20_000, *v.shape) for v in m] for m in pair)
    n_tries = 64 if pair is THREE else None
    # 40,000 draws: the mean is known to .005 of the spread
    x = torch.cat([gmm_head.GMMHead.draw_guided(c, u, 1 + w, guidance, n_tries=n_tries) for _ in range(2)])
    mean, std = integrate_guided(*pair, 1 + w)
    assert abs(x.mean() - mean) < 0.02 * max(std, abs(mean)) and abs(x.std() - std) < 0.02 * std, (x.mean(),
                                                                                                   mean,
                                                                                                   x.std(),
                                                                                                   std)


def test_gmm_guidance_towards_nothing_is_the_other_mixture():
    c, u = ([v.expand(100_000, *v.shape) for v in m] for m in THREE)
    x = gmm_head.GMMHead.draw_guided(c, u, 0.0)                                              # p_c^0 p_u^1
    mean, std = integrate_guided(*THREE, 0.0)
    assert abs(x.mean() - mean) < 0.02 and abs(x.std() - std) < 0.02 * std


@pytest.mark.parametrize("guidance", ["closed", "importance", "rejection", "official"])
def test_gmm_improper_guidance_is_finite(guidance):
    c = torch.zeros(500, 1), torch.full((500, 1, 2), 3.0), torch.full((500, 1, 2), 1.0)
    # channel 0: no density
    u = torch.zeros(500, 1), torch.zeros(500, 1, 2), torch.tensor([0.2, 3.0]).expand(500, 1, 2)
    x = gmm_head.GMMHead.draw_guided(c, u, 3.0, guidance)
    assert torch.isfinite(x).all() and x.abs().max() < 50
    if guidance == "closed":                              # that channel stays unguided, as the docstring says
        assert abs(x[:, 0].mean() - 3) < 0.2 and abs(x[:, 0].std() - 1) < 0.15


def test_gmm_order_of_components_does_not_matter():
    turned = [v.flip(0) for v in THREE[1]]
    for guidance in ("closed", "importance"):
        drawn = []
        for u in (THREE[1], turned):
            torch.manual_seed(4)
            drawn.append(
                gmm_head.GMMHead.draw_guided(*([v.expand(1000, *v.shape) for v in m] for m in (THREE[0], u)),
                                             2.0, guidance))
        assert torch.allclose(*drawn, atol=1e-4)


def test_gmm_nucleus_and_clip():
    log_pi = torch.randn(50, 6).log_softmax(-1)
    kept = gmm_head.nucleus(log_pi, 0.7)
    for row, ours in zip(log_pi.exp().tolist(), kept.exp().tolist()):
        total, nucleus = 0.0, []
        for k in sorted(range(6), key=lambda k: -row[k]):
            if total < 0.7:
                nucleus.append(k)
            total += row[k]
        mass = sum(row[k] for k in nucleus)
        assert all(abs(p - (row[k] / mass if k in nucleus else 0)) < 1e-4 for k, p in enumerate(ours))
    x = gmm_head.GMMHead.draw((torch.zeros(20_000, 1), torch.full(
        (20_000, 1, 1), 5.0), torch.full((20_000, 1, 1), 2.0)), clip=1.5)
    z = (x - 5) / 2
    assert z.abs().max() <= 1.5 and abs(z.std() -
                                        0.7430) < 0.01, "a truncated normal, not a clamped one (std 0.85)"


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
    wide, narrow = (torch.cat([((a - 1 / a) * torch.eye(3)).flatten(),
                               torch.ones(3)]).expand(100_000, -1) for a in (3.0, 0.01))
    head.proj = nn.Identity()                               # square_plus(a - 1 / a) = a: factors a * identity
    x, _ = head.sample(raw, wide, cfg=1.5)
    covariance = torch.linalg.inv(1.5 * truth.precision_matrix - 0.5 * torch.eye(3) / 9)
    assert torch.linalg.eigvalsh(covariance).min() > 0 and (covariance -
                                                            truth.covariance_matrix).abs().max() > 0.5
    assert torch.allclose(x.T.cov(), covariance, atol=0.05 * covariance.max())
    expected = covariance @ (1.5 * truth.precision_matrix @ mean - 0.5 * torch.ones(3) / 9)
    assert torch.allclose(x.mean(0), expected, atol=0.05)
    x, _ = head.sample(raw, narrow, cfg=1.5)                # no density: unguided
    assert torch.allclose(x.T.cov(), truth.covariance_matrix, atol=0.05 * truth.covariance_matrix.max())


@pytest.mark.parametrize("cfg", [1.0, 0.0, 1.5, 4.0])
@pytest.mark.parametrize(
    "head", [gmm_head.GMMHead(8, 3, 5),
             gmm_head.ChannelGMMHead(8, 3, 5),
             gmm_head.FullGaussianHead(8, 3)], ids=["vector", "channel", "full"])
def test_gmm_temperature_0_is_the_mode_of_the_likeliest_component(head, cfg):
    h, u = torch.randn(4, 6, 8), torch.randn(4, 6, 8)
    x, log_p = head.sample(h, u, cfg, temperature=0)
    again, _ = head.sample(h, u, cfg, temperature=0)
    assert torch.equal(x, again) and torch.isfinite(x).all() and torch.allclose(
        log_p, head.log_prob(h, x), atol=1e-4)
    if isinstance(head, gmm_head.FullGaussianHead):
        mean = head.gaussian(h)[0] if cfg == 1 else head.guide(head.gaussian(h), head.gaussian(u), cfg)[0]
        assert torch.equal(x, mean)
        return
    log_pi, mu, _ = head.mixture(h) if cfg == 1 else head.guide(head.mixture(h), head.mixture(u), cfg)
    for place in range(24):
        pi, means, ours = (v.flatten(0, 1)[place] for v in (log_pi, mu, x))
        if isinstance(head, gmm_head.ChannelGMMHead):
            assert all(ours[d] == means[d, max(range(5), key=lambda k: pi[d, k])] for d in range(3))
        else:
            assert torch.equal(ours, means[max(range(5), key=lambda k: pi[k])])


@pytest.mark.parametrize("temperature", [1e-8, 1e-5, 1e-2])
def test_gmm_guidance_is_finite_at_low_temperatures(temperature):
    head, h, u = gmm_head.GMMHead(8, 4, 6), torch.randn(50, 8), torch.randn(50, 8)
    for cfg in (0.0, 1.5, 8.0):
        x, _ = head.sample(3 * h, 3 * u, cfg, temperature)
        assert torch.isfinite(x).all()
