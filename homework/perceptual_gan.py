"""Homework of perceptual_gan.py: each test grades one function and says what the mistake may be."""
import math
from unittest.mock import patch

import torch
import torch.nn.functional as F

import perceptual_gan
from homework.kit import check, exercise


@exercise("perceptual_gan.discriminator_loss", points=2)
def test_homework_perceptual_gan_discriminator_loss():
    real, fake = torch.randn(2, 1, 3, 3) * 2, torch.randn(4, 1, 2, 2) * 2
    mean = lambda values: sum(values) / len(values)
    r, f = real.flatten().tolist(), fake.flatten().tolist()
    hinge = (mean([max(0, 1 - v) for v in r]) + mean([max(0, 1 + v) for v in f])) / 2
    check("hinge", perceptual_gan.discriminator_loss(real, fake), torch.tensor(hinge),
          "Real logits are pushed above +1, fake ones below -1.")
    nats = -(mean([math.log(1 / (1 + math.exp(-v)))
                   for v in r]) + mean([math.log(1 / (1 + math.exp(v))) for v in f])) / 2
    check("non-saturating", perceptual_gan.discriminator_loss(real, fake, "non-saturating"),
          torch.tensor(nats), "Binary cross-entropy.")


@exercise("perceptual_gan.generator_loss", points=1)
def test_homework_perceptual_gan_generator_loss():
    fake = torch.randn(4, 1, 2, 2)
    check("hinge", perceptual_gan.generator_loss(fake), torch.tensor(-sum(fake.flatten().tolist()) / 16),
          "Raise the discriminator's logit.")
    nats = -sum(math.log(1 / (1 + math.exp(-v))) for v in fake.flatten().tolist()) / 16
    check("non-saturating", perceptual_gan.generator_loss(fake, "non-saturating"), torch.tensor(nats),
          "-log sigmoid(fake).")


@exercise("perceptual_gan.unit_channels", points=2)
def test_homework_perceptual_gan_unit_channels():
    f = torch.randn(2, 5, 3, 3)
    truth = torch.stack([
        torch.stack([
            f[b, :, i, j] / math.sqrt(sum(v * v for v in f[b, :, i, j].tolist())) for i in range(3)
            for j in range(3)
        ], -1) for b in range(2)
    ]).view(2, 5, 3, 3)
    check("unit_channels", perceptual_gan.unit_channels(f), truth,
          "Length 1 over the channels, at each position by itself.")
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
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450
                                                                                       ]).view(3, 1, 1)
        first = F.relu(net.features[0](x))
        maps.append([first, F.relu(net.features[3](F.max_pool2d(first, 2)))])
    with patch.object(perceptual_gan, "unit_channels", slow_unit):
        ours = net(a, b)
    truth = sum(net.lins[k]((slow_unit(maps[0][k]) - slow_unit(maps[1][k]))**2).mean((1, 2, 3))
                for k in range(2))
    check("LPIPS", ours, truth,
          "Shifted and scaled images, features of unit length, squared differences weighted per channel, "
          "a mean over positions, a sum over layers.", 1e-5)


@exercise("perceptual_gan.AdversarialTokenizer.adaptive_weight", points=2)
def test_homework_perceptual_gan_adaptive_weight():
    model = perceptual_gan.AdversarialTokenizer(perceptual_gan.TinyAutoencoder(4), adaptive=True)
    weight = model.tokenizer.get_parameter(model.last_layer)
    a, b = torch.randn(2, *weight.shape)
    ours = model.adaptive_weight((weight * a).sum(), (weight * b * 0.1).sum())
    check("the weight", ours,
          a.norm() / (0.1 * b.norm() + 1e-4), "|grad of the others| / |grad of the adversarial loss|.")
    assert not ours.requires_grad, "the weight is a number to multiply with: detached"
    assert torch.is_grad_enabled() and weight.grad is None, \
        "torch.autograd.grad leaves .grad alone, where backward() fills it"
    with torch.no_grad():
        check("the weight without gradients", model.adaptive_weight(None, None), ours,
              "It is that of the last training step.")
    check("the weight against a loss without gradient",
          model.adaptive_weight((weight * a * 100).sum(), (weight * 0).sum()), torch.tensor(1e4),
          "At most 1e4.")
