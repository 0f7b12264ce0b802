"""Homework of gmm_head.py: each test grades one function and says what the mistake may be."""
import torch
from torch import distributions as D

import gmm_head
from homework.kit import check, exercise


@exercise("gmm_head.GMMHead.density", points=3)
def test_homework_gmm_head_density():
    log_pi, mu, sigma = torch.randn(200, 4).log_softmax(-1), torch.randn(200, 4,
                                                                         3), torch.rand(200, 4, 3) + 0.2
    truth = D.MixtureSameFamily(D.Categorical(logits=log_pi), D.Independent(D.Normal(mu, sigma), 1))
    x = truth.sample()
    check("log p", gmm_head.GMMHead.density((log_pi, mu, sigma), x), truth.log_prob(x),
          "A missing log(2 pi) / 2 per channel is +2.757 here, a missing log sigma about "
          f"{(log_pi.exp() * sigma.log().sum(-1)).sum(-1).mean():+.1f}.")
    check("log p of a far point", gmm_head.GMMHead.density((log_pi, mu, sigma), x + 1e3),
          truth.log_prob(x + 1e3), "exp(log N) is 0 there, and its log -inf: torch.logsumexp.")


@exercise("gmm_head.GMMHead.draw", points=2)
def test_homework_gmm_head_draw():
    pi, mu, sigma = torch.tensor([0.7, 0.3]), torch.tensor([[-1.0, 2.0], [3.0,
                                                                          0.0]]), torch.tensor([[0.5, 1.0],
                                                                                                [0.2, 0.8]])
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
    check("the std", std, true_std, "Precisions add, variances do not; and std is the root of 1 / precision.",
          1e-3)
    assert proper.dtype == torch.bool and proper.all(
    ), "all of these products are densities: proper should be True"


@exercise("gmm_head.guided_normal", points=1, hidden=True)
def test_homework_gmm_head_guided_normal_where_there_is_no_density():
    mc, sc, mu, su = torch.tensor([1.0, 1.0]), torch.ones(2), torch.zeros(2), torch.tensor([0.5, 4.0])
    mean, std, proper = gmm_head.guided_normal(mc, sc, mu, su, 3.0)
    assert proper.tolist() == [False,
                               True], f"proper is {proper.tolist()}: the first product grows without bound"
    check("the unguided channel's mean", mean[:1], mc[:1], "Where lam <= 0.01 the channel stays N(mc, sc).")
    check("the unguided channel's std", std[:1], sc[:1], "Where lam <= 0.01 the channel stays N(mc, sc).")


@exercise("gmm_head.nucleus", points=2)
def test_homework_gmm_head_nucleus():
    log_pi = torch.randn(60, 6).log_softmax(-1)
    before = log_pi.clone()
    truth = torch.zeros(60, 6, dtype=torch.float64)
    for row, p in zip(truth, log_pi.exp().tolist()):
        total = 0.0
        for k in sorted(range(6), key=lambda k: -p[k]):
            if total < 0.7:
                row[k] = p[k]
            total += p[k]
    kept = gmm_head.nucleus(log_pi, 0.7)
    assert torch.equal(kept > -torch.inf, truth > 0), (
        f"{(kept > -torch.inf).sum(-1).float().mean():.1f} of 6 components stay on average (nan counts as gone), "
        f"{(truth > 0).sum(-1).float().mean():.1f} are needed. The one that reaches top_p belongs to them.")
    check("the weights kept", kept.exp(), truth / truth.sum(-1, keepdim=True),
          "What is left must be renormalised.")
    assert torch.equal(log_pi, before), "the weights given must stay as they are"
