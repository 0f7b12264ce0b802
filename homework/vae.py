"""Homework of vae.py: each test looks at one function and says what a difference may mean."""
import torch
import torch.nn as nn

import vae
from homework.kit import exercise, fit


@exercise("vae.VAE.kl", points=3)
def test_homework_vae_kl(look):
    for shape in ((1, 1, 3), (3, 5, 3), (2, 1, 1)):
        mean = look.randn(*shape)
        std = look.rand(*shape) + 0.3
        look.call(
            f"the KL, shape {shape}", vae.VAE.kl, {
                "mean": mean,
                "std": std
            },
            "In nats per token: 1/2 sum_d (mean^2 + std^2 - 1 - log std^2). A missing -1 is +D/2, a mean "
            "over D a D-th of it; the other direction, KL(N(0, 1) || N(mean, std^2)), is another number.")
    sharp = torch.full((1, 2, 3), 1e-6)
    look.call("the KL of a very sharp token", vae.VAE.kl, {"mean": torch.zeros(1, 2, 3), "std": sharp},
              "log std^2 is 2 log std; std^2 + epsilon would change it.")


@exercise("vae.VAE.reparameterise", points=2)
def test_homework_vae_reparameterise(look):
    draw = vae.VAE.reparameterise
    mean = torch.tensor([[[-2.0, 1.0]]]).repeat(2, 20_000, 1).requires_grad_()
    std = torch.tensor([[[0.5, 3.0]]]).repeat(2, 20_000, 1).requires_grad_()
    before = mean.detach().clone(), std.detach().clone()
    look.draws("z", lambda: draw(mean[:, :50], std[:, :50]))
    z = draw(mean, std)
    look.form("z", z)
    look.form("z of one token", draw(mean[:1, :1], std[:1, :1]))
    look.see("the mean of 40,000 draws", z.mean((0, 1)), "z = mean + std * noise.", 0.08)
    look.see("their std", z.std((0, 1)), "std is not a variance, and the noise is normal.", 0.03)
    noise = ((z - mean) / std).detach()
    look.see("the fourth moment of the noise", noise.pow(4).mean(), "A normal has 3, a uniform 1.8.", 0.1)
    look.see("the inputs stay as they were", torch.equal(mean, before[0]) and torch.equal(std, before[1]))
    for_mean, for_std = torch.autograd.grad(z.sum(), (mean, std), allow_unused=True) if z.requires_grad else (
        None, None)
    hint = "Gradients must reach mean and std: nothing may be detached."
    look.see("dz / dmean", torch.zeros(1) if for_mean is None else for_mean[:, :2], hint)
    follows = for_std is not None and torch.allclose(for_std, noise, atol=1e-2)
    look.see("dz / dstd is the noise", follows, hint)
    many = torch.stack([draw(torch.zeros(2, 2, 2), torch.ones(2, 2, 2)) for _ in range(600)])
    look.independent("the noises of images, tokens and channels", many, 0.2)


@exercise("vae.VAE.log_likelihood", points=3)
def test_homework_vae_log_likelihood(look):
    model = vae.VAE(image_size=8, token_dim=2, ch=4, ch_mult=(1, 1), groups=2, likelihood="logistic")
    with torch.no_grad():
        model.log_scale.copy_(torch.tensor([-2.0, -3.0, -1.0]))
    scale = {"log_scale": model.log_scale}
    hint = ("log of sigmoid(a) - sigmoid(b) at the edges of a bin 2 / 255 wide, each channel with its own "
            "scale, summed over channels and pixels.")
    for B in (1, 3):
        images = (look.randint(254, B, 3, 4, 4) + 1) / 127.5 - 1
        look.call(f"log p of {B} images of values 1 .. 254", model.log_likelihood,
                  {"images": images, "raw": look.randn(B, 3, 4, 4)}, hint, 1e-3, params=scale,
                  fixed=("images",))
    ends = (torch.tensor([0.0, 255.0]) / 127.5 - 1).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    look.call("log p of the values 0 and 255", model.log_likelihood,
              {"images": ends, "raw": look.randn(2, 3, 1, 1)},
              "The outermost bins are open: all that lies beyond belongs to them.", 1e-3, params=scale,
              fixed=("images",))
    far = (look.randint(256, 3, 3, 1, 1)) / 127.5 - 1
    look.call("log p far from the mean", model.log_likelihood, {"images": far, "raw": far + 40},
              "The difference of two sigmoids is 0 in float32, and its log -inf.", 1e-3, params=scale,
              fixed=("images",))


@exercise("vae.VAE.measure", points=2)
def test_homework_vae_measure(look):
    model = vae.VAE(image_size=8, token_dim=2, ch=4, ch_mult=(1, 1), groups=2)
    for N, T in ((300, 16), (4000, 1)):
        mean = look.randn(N, T, 2) * torch.tensor([0.5, 4.0]) + torch.tensor([3.0, -1.0])
        std = 0.5 + 3 * look.rand(N, T, 2)
        look.call("nothing is returned", model.measure, {"mean": mean, "std": std}, gradients=False)
        look.see("latent_mean", model.latent_mean, "It is taken over images and positions.", 2e-3)
        look.see("latent_scale", model.latent_scale, "The variance of the means and the noise of each token "
                 "add: var(mean) + E[std^2]; and latent_scale is 1 over its root.", 2e-3)


@exercise("vae", points=3, further=True, goals=[
    ("the bound of a linear VAE, nats per point", 5.1245, (0.5, 0.05), "Exact: half of log det of the "
     "covariance of the data, and 2 log(2 pi e). A linear VAE reaches it, and nothing goes below.")])
def capstone_vae(look):
    """Points of four numbers that lie near a plane, x = W z + noise: probabilistic PCA."""
    generator = torch.Generator().manual_seed(1)
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator))
    W = turn[:, :2] * torch.tensor([2.0, 1.0])
    encoder, decoder = nn.Linear(4, 2), nn.Linear(2, 4)
    log_std, log_noise = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(()))

    def bound(n):
        x = torch.randn(n, 1, 2) @ W.T + 0.5 * torch.randn(n, 1, 4)
        mean = encoder(x)
        std = log_std.exp().expand_as(mean)
        recon = decoder(vae.VAE.reparameterise(mean, std))
        nats = -torch.distributions.Normal(recon, log_noise.exp()).log_prob(x).sum(-1)
        return (nats + vae.VAE.kl(mean, std)).mean()

    learned = [*encoder.parameters(), *decoder.parameters(), log_std, log_noise]
    fit(learned, lambda: bound(256), 1500, 2e-2)
    with torch.no_grad():
        look.goal("the bound of a linear VAE, nats per point", bound(50_000), 0.5, 0.05)
