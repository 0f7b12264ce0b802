"""Homework of diffusion_head.py: each test grades one function and says what the mistake may be."""
import math
from unittest.mock import patch

import torch
import torch.nn as nn
from torch import distributions as D

import diffusion_head
from homework.kit import check, exercise


@exercise("diffusion_head.DiffusionHead.reverse", points=3)
def test_homework_diffusion_head_reverse_step():
    # (4, 1) each
    row = diffusion_head.schedule(torch.arange(1000))[torch.tensor([5, 100, 500, 900])][:, None].unbind(-1)
    a, s, a_earlier, s_earlier = (v.double() for v in row[:4])
    x0, noise = torch.randn(2, 4, 3)
    x = row[0] * x0 + row[1] * noise
    step = a / a_earlier                                 # x = step * x_earlier + N(0, beta), and Bayes' rule:
    beta = 1 - step**2
    precision = 1 / s_earlier**2 + step**2 / beta
    mean = (a_earlier * x0 / s_earlier**2 + step * x / beta) / precision
    ours, log_var, x0_ours = diffusion_head.DiffusionHead.reverse(x, noise, torch.full_like(x, -1.0), row)
    check("x0", x0_ours, x0, "x = a x0 + s eps, solved for x0.", 1e-3)
    check("the mean", ours, mean, "That of q(x_earlier | x, x0), by Bayes' rule.", 1e-3)
    check("log variance at v = -1", log_var, -precision.log().expand(4, 3), "v = -1 is the smallest: beta~.",
          1e-3)
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
    # some mean and variance, not the right ones
    head.reverse = lambda x, eps, v, row: (x - eps, row[6] + 0.3 * v, None)
    with patch.object(diffusion_head, "kl_bits", kl_in_bits):
        mse, vb = head.terms(x, torch.randn(5, 4), t, noise)
    row = head.table[t].unsqueeze(1).unbind(-1)
    x_t = row[0] * x + row[1] * noise
    check("the noisy token that the network sees", head.net.x, x_t, "x_t = a x + s noise.")
    eps, v = head.net.out.detach()[:, :3], head.net.out.detach()[:, 3:]
    check("mse", mse, ((eps - noise)**2).mean(-1),
          "The network predicts the NOISE; the mean is over the token's numbers.")
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
    check("the point on the way that the network sees", head.net.x, torch.lerp(x, noise, t[:, None]),
          "t = 0 is the token.")
    check("the time that the network is told", head.net.t, 1000 * t, "The network knows times of 0 .. 1000.")
    check("the loss", loss, ((head.net.out - (noise - x))**2).mean(-1),
          "The velocity is d x_t / dt = noise - x.")


@exercise("diffusion_head.DiffusionHead.predict", points=2)
def test_homework_diffusion_head_guidance():
    head, out = diffusion_head.DiffusionHead(4, 3, width=8, depth=1), torch.randn(2, 5, 6)
    head.net.denoise = lambda x, y: out if y.ndim == 3 else out[0]
    eps, v = head.predict(torch.randn(5, 3), torch.randn(8), torch.randn(5, 8), None)
    check("eps without guidance", eps, out[0, :, :3]), check("v without guidance", v, out[0, :, 3:])
    eps, v = head.predict(torch.randn(5, 3), torch.randn(8), torch.randn(2, 5, 8), 3.0)
    check("guided eps", eps, 3 * out[0, :, :3] - 2 * out[1, :, :3],
          "u + cfg (c - u): beyond the conditional prediction.")
    check("v under guidance", v, out[0, :, 3:],
          "Guidance mixes eps only; the variance is the conditional one's.")


@exercise("diffusion_head.kl_bits", points=2)
def test_homework_diffusion_head_kl():
    gaussians = torch.randn(4, 7, 3)
    check(
        "KL", diffusion_head.kl_bits(*gaussians), kl_in_bits(*gaussians),
        "log_var is log sigma^2, not log sigma; the second Gaussian's variance divides; nats / ln 2 are bits."
    )
