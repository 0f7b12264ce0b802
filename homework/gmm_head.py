"""Homework of gmm_head.py: each test looks at one function and says what a difference may mean."""
import torch
import torch.nn as nn

import gmm_head
from homework.kit import closed, exercise, fit


def mixture(look, *lead, K=4, D=3):
    """log_pi (*lead, K), mu and sigma (*lead, K, D)."""
    log_pi = look.randn(*lead, K).log_softmax(-1)
    return log_pi, look.randn(*lead, K, D), look.rand(*lead, K, D) + 0.3


@exercise("gmm_head.GMMHead.density", points=3)
def test_homework_gmm_head_density(look):
    hint = ("logsumexp_k of log_pi_k + sum_d log N. A missing log(2 pi) / 2 per channel is +2.757 for three "
            "channels; sigma is no variance; any leading shape will do.")
    for lead, K, D in (((30,), 4, 3), ((1,), 1, 3), ((3, 2), 4, 3), ((2, 3, 2), 2, 1)):
        x = look.randn(*lead, D)
        look.call(f"log p, x of shape {tuple(x.shape)}, {K} components", gmm_head.GMMHead.density,
                  {"mixture": mixture(look, *lead, K=K, D=D), "x": x}, hint)
    look.call("log p of a far point", gmm_head.GMMHead.density,
              {"mixture": mixture(look, 5), "x": look.randn(5, 3) + 100},
              "exp(log N) is 0 there, and its log -inf: torch.logsumexp.")


@exercise("gmm_head.GMMHead.draw", points=2)
def test_homework_gmm_head_draw(look):
    draw = gmm_head.GMMHead.draw
    pi = torch.tensor([0.7, 0.3])
    mu = torch.tensor([[-1.0, 2.0], [3.0, 0.0]])
    sigma = torch.tensor([[0.5, 1.0], [0.2, 0.8]])
    many = tuple(v.expand(40_000, *v.shape) for v in (pi.log(), mu, sigma))
    few = tuple(v.expand(2, 3, *v.shape) for v in (pi.log(), mu, sigma))
    with closed("gmm_head", "nucleus", lambda log_pi, top_p: log_pi):
        for words in ({}, dict(n=(4,)), dict(clip=1.0), dict(temperature=0.5)):
            look.form(f"draws of 2 x 3 tokens, {words}", draw(few, **words))
        look.draws("draws", lambda: draw(few))
        look.draws("clipped draws", lambda: draw(few, clip=1.5))
        x = draw(many, temperature=0.5)
        look.see("the mean of 40,000 draws", x.mean(0),
                 "A component is chosen by its weight, and then its own mean taken. Temperature leaves the "
                 "weights alone.", 0.05)
        look.see("their variance at temperature 0.5", x.var(0),
                 "temperature multiplies sigma, once, and not mu.", 0.03)
        mixed = ((x[:, 0] < 1) & (x[:, 1] < 0.6)).float().mean()
        look.see("the share of draws between the components", mixed,
                 "One component for all channels of a token.", 0.02)
        x = draw(many, n=(3,), clip=1.0)
        inside = ((x[..., None, :] - mu).abs() <= sigma + 1e-4).all(-1).any(-1).float().mean()
        look.see("the share of draws within clip=1 sigma of a mean", inside, "None lies farther.", 1e-6)
        look.see("the spread of clipped draws", x[x[..., 0] < 1].std(0),
                 "A truncated normal, not one whose tails are piled up on the ends.", 0.02)
        third = (draw(many, n=(3,))[..., 0] < 1).float()    # which component
        look.independent("the components of the n draws", third.T, 0.05)
        noise = torch.stack([draw(tuple(v[:, :, :1] for v in few)) for _ in range(300)])
        look.independent("the draws of images, tokens and channels", noise, 0.3)
    keep = torch.tensor([0.75, 0.25, 0.0]).log()
    three = (torch.tensor([0.6, 0.2, 0.2]).log(), torch.tensor([[0.0], [5.0],
                                                                [9.0]]), torch.full((3, 1), 0.1))
    three = tuple(v.expand(20_000, *v.shape) for v in three)
    with closed("gmm_head", "nucleus", lambda log_pi, top_p: keep.expand_as(log_pi)):
        x = draw(three, top_p=0.7)
        look.see("how often each component is drawn with top_p",
                 torch.stack([((x - m).abs() < 1).float().mean() for m in (0.0, 5.0, 9.0)]),
                 "nucleus() says which stay.", 0.02)


@exercise("gmm_head.guided_normal", points=2)
def test_homework_gmm_head_guided_normal(look):
    names = ["the mean", "the std", "proper"]
    hint = ("Precisions add, cfg / sc^2 - (cfg - 1) / su^2, and each mean counts with its own; std is the "
            "root of 1 / precision. All is elementwise, for any shape.")
    for shape, cfg in (((20,), 2.5), ((2, 3, 4), 2.5), ((1,), 1.0), ((), 4.0), ((5,), 0.5)):
        given = {"mc": look.randn(*shape), "sc": look.rand(*shape) + 0.3, "mu": look.randn(*shape),
                 "su": look.rand(*shape) + 1.6}
        look.call(f"N(mc, sc)^{cfg} N(mu, su)^{1 - cfg}, shape {shape}",
                  lambda mc, sc, mu, su: gmm_head.guided_normal(mc, sc, mu, su, cfg), given, hint, 1e-3,
                  outputs=names)


@exercise("gmm_head.guided_normal", points=1, hidden=True)
def test_homework_gmm_head_guided_normal_where_there_is_no_density(look):
    su = torch.tensor([[0.5, 4.0, 2.0], [0.82, 0.1, 1.0]])
    look.call("channels with and without a density",
              lambda mc, sc, mu, su: gmm_head.guided_normal(mc, sc, mu, su, 3.0), {
                  "mc": look.randn(2, 3),
                  "sc": torch.ones(2, 3),
                  "mu": look.randn(2, 3),
                  "su": su
              },
              "Where lam <= 0.01 that channel stays N(mc, sc), and only that one. No gradient is nan.",
              1e-3,
              outputs=["the mean", "the std", "proper"])


@exercise("gmm_head.nucleus", points=2)
def test_homework_gmm_head_nucleus(look):
    for shape, top_p in (((60, 6), 0.7), ((1, 1), 0.5), ((2, 3, 5), 0.4), ((4,), 0.9), ((3, 4), 0.01)):
        look.call(f"the weights kept of {shape} with top_p={top_p}",
                  lambda log_pi: gmm_head.nucleus(log_pi, top_p).exp(),
                  {"log_pi": look.randn(*shape).log_softmax(-1)},
                  "The fewest components whose weights reach top_p stay: the one that reaches it belongs to "
                  "them. What is left is renormalised, in its old place.", gradients=False)
    kept = gmm_head.nucleus(torch.tensor([0.5, 0.3, 0.2]).log(), 0.6)
    look.see("log weights", kept, "Those that go have the weight 0, so -inf.")


@exercise("gmm_head.GMMHead.guide", points=4, further=True)
def test_homework_gmm_head_guidance_of_mixtures(look):
    hint = ("See the docstring: the Gaussian of u near component j, by overlap; guided_normal; the weight "
            "that makes the density right at the piece's mean.")
    for lead, K, D, cfg in (((6,), 1, 2, 2.0), ((3, 2), 3, 2, 1.7), ((1,), 4, 1, 0.6)):
        c = mixture(look, *lead, K=K, D=D)
        log_pu, mu, sigma = mixture(look, *lead, K=K, D=D)
        look.call(f"{K} components, cfg={cfg}", lambda c, u: gmm_head.GMMHead.guide(c, u, cfg),
                  {"c": c, "u": (log_pu, mu, sigma + 1.2)}, hint, 1e-3, outputs=["log_pi", "mu", "sigma"],
                  gradients=False)


@exercise("gmm_head", points=3, further=True, goals=[
    ("nats per token of a ring of eight Gaussians", 0.3121, (0.3, 0.03), "Exact: log 8 + log(2 pi e 0.1^2). "
     "Below it, the density does not integrate to 1.")])
def capstone_gmm_head(look):
    """The head learns a ring of eight Gaussians, the fourth class of the demo."""
    table, head = nn.Embedding(4, 16), gmm_head.GMMHead(16, 2, n_mix=16)

    def nats(n):
        label = torch.full((n,), 3)
        return head.loss(table(label), gmm_head.toy_tokens(label)).mean()

    fit([*table.parameters(), *head.parameters()], lambda: nats(512), 800, 2e-2)
    with torch.no_grad():
        look.goal("nats per token of a ring of eight Gaussians", nats(50_000), 0.3, 0.03)
