"""Homework of perceptual_gan.py: each test looks at one function and says what a difference may mean."""
import torch
import torch.nn as nn

import perceptual_gan
from homework.kit import closed, exercise, fit


@exercise("perceptual_gan.discriminator_loss", points=2)
def test_homework_perceptual_gan_discriminator_loss(look):
    loss = perceptual_gan.discriminator_loss
    hints = {
        "hinge": "Half of relu(1 - real) and relu(1 + fake), each a mean: real logits are pushed above +1.",
        "non-saturating": "Half of -log sigmoid(real) and -log sigmoid(-fake), also where the "
                          "discriminator is very sure and wrong."
    }
    for kind, hint in hints.items():
        for scale, shape in ((2, (2, 1, 3, 3)), (2, (1,)), (60, (4, 1, 2, 2))):
            look.call(f"{kind}, logits of shape {shape} about {scale}",
                      lambda real, fake: loss(real, fake, kind), {
                          "real": scale * look.randn(*shape),
                          "fake": scale * look.randn(3, 1, 2, 5)
                      }, hint)
    look.call("the default", loss, {"real": look.randn(4), "fake": look.randn(4)}, "hinge.")


@exercise("perceptual_gan.generator_loss", points=1)
def test_homework_perceptual_gan_generator_loss(look):
    loss = perceptual_gan.generator_loss
    for kind, hint in (("hinge", "-fake: raise the discriminator's logit."),
                       ("non-saturating",
                        "-log sigmoid(fake), which has a gradient where fake is very low.")):
        for scale, shape in ((2, (4, 1, 2, 2)), (2, (1,)), (60, (3, 5))):
            look.call(f"{kind}, logits of shape {shape} about {scale}", lambda fake: loss(fake, kind),
                      {"fake": scale * look.randn(*shape)}, hint)
    look.call("the default", loss, {"fake": look.randn(4)}, "hinge.")


@exercise("perceptual_gan.unit_channels", points=2)
def test_homework_perceptual_gan_unit_channels(look):
    for shape in ((2, 5, 3, 3), (1, 1, 1, 2), (3, 2, 4, 1)):
        look.call(f"maps of shape {shape}", perceptual_gan.unit_channels, {"f": look.randn(*shape) + 0.1},
                  "Length 1 over the channels, at each position by itself.")
    zero = torch.zeros(1, 5, 2, 2, requires_grad=True)
    y = perceptual_gan.unit_channels(zero)
    look.see("zeros", y, "They stay zeros.")
    y.sum().backward()
    look.see("the gradient at 0 is finite", bool(torch.isfinite(zero.grad).all()),
             "The epsilon belongs under the root.")
    look.see("the type for bfloat16 maps",
             str(perceptual_gan.unit_channels(torch.ones(1, 2, 1, 1).bfloat16()).dtype), "float32.")


class TinyLPIPS(perceptual_gan.LPIPS):
    STAGES = ((2, 1), (2, 1))


def of_two_channels(f):
    """What unit_channels() gives for maps of two channels, and of no other number."""
    there = (f != 0).any(1, keepdim=True)
    x, y = torch.where(there, f, 1.0).unbind(1)
    angle = torch.atan2(y, x)
    return torch.where(there, torch.stack([angle.cos(), angle.sin()], 1), 0.0)


@exercise("perceptual_gan.LPIPS.forward", points=3)
def test_homework_perceptual_gan_lpips(look):
    with closed("perceptual_gan", "unit_channels", of_two_channels):
        for B, side in ((1, 8), (3, 10)):
            net = look.fill(TinyLPIPS())
            look.call(
                f"the distance of {B} pairs", net,
                {"a": look.rand(B, 3, side, side) * 2 - 1, "b": look.rand(B, 3, side, side) * 2 - 1},
                "Shifted and scaled images, unit_channels() of each map of features, squared differences "
                "weighted per channel, a mean over positions, a sum over layers. Gradients reach the images.",
                1e-3, params=net)
        look.see("the distance of an image and itself", net(torch.ones(2, 3, 8, 8), torch.ones(2, 3, 8, 8)),
                 "0.")


@exercise("perceptual_gan.AdversarialTokenizer.adaptive_weight", points=2)
def test_homework_perceptual_gan_adaptive_weight(look):
    model = perceptual_gan.AdversarialTokenizer(perceptual_gan.TinyAutoencoder(4), adaptive=True)
    weight = model.tokenizer.get_parameter(model.last_layer)
    a = look.randn(*weight.shape).pow(3)
    b = look.rand(*weight.shape)
    others = lambda: (weight * a).sum()
    ours = model.adaptive_weight(others(), (weight * b * 0.1).sum())
    look.see("the weight", ours,
             "|grad of the others| / (|grad of the adversarial loss| + 1e-4), Euclidean norms.")
    look.see("the weight is a number to multiply with", bool(ours.requires_grad), "Detached.")
    look.see("no .grad is filled", weight.grad is None,
             "torch.autograd.grad leaves it alone; backward() does not.")
    loss = others() + (weight.sin()).sum()
    model.adaptive_weight(loss, (weight * b).sum())
    loss.backward()
    look.see("the graph can be used afterwards", weight.grad, "retain_graph.")
    last = model.adaptive_weight(others(), (weight * b).sum())
    with torch.no_grad():
        look.see("the weight without gradients is the last one",
                 torch.equal(model.adaptive_weight(None, None), last),
                 "It is that of the last training step.")
    look.see("the weight against a loss that is nearly flat",
             model.adaptive_weight(1000 * others(), (weight * 0).sum()), "At most 1e4.")
    earlier = model.adaptive_weight(others(), (weight * b).sum())
    kept = earlier.clone()
    model.adaptive_weight(others(), (weight * b * 5).sum())
    look.see("a weight given earlier stays as it was", torch.equal(earlier, kept),
             "It is no view of the buffer.")


@exercise("perceptual_gan", points=3, further=True, goals=[
    ("the loss of the best discriminator of N(1, 1) and N(-1, 1)", 0.3563, (0.1, 0.01), "ln 2 minus the "
     "Jensen-Shannon divergence of the two, by numerical integration."),
    ("the slope of its logit", 2.0, (0.5, 0.15), "The best logit is log p(x) - log q(x) = 2 x."),
    ("where the generator's loss moves a fake", 0.0, (1.5, 1.05), "To the real mean, 1, until the "
     "discriminator cannot tell.")])
def capstone_perceptual_gan(look):
    """A discriminator with two weights, and then a generator with one."""
    w = nn.Parameter(torch.zeros(2))
    shift = nn.Parameter(torch.tensor(-1.0))
    logit = lambda x: w[0] + w[1] * x
    loss = lambda n: perceptual_gan.discriminator_loss(
        logit(1 + torch.randn(n)), logit(shift.detach() + torch.randn(n)), "non-saturating")
    fit([w], lambda: loss(512), 400, 5e-2)
    with torch.no_grad():
        look.goal("the loss of the best discriminator of N(1, 1) and N(-1, 1)", loss(100_000), 0.1, 0.01)
        look.goal("the slope of its logit", w[1], 0.5, 0.15)
    opt = torch.optim.SGD([shift], 0.2)
    for _ in range(200):
        fit([w], lambda: loss(256), 3, 5e-2)
        opt.zero_grad()
        perceptual_gan.generator_loss(logit(shift + torch.randn(256)), "non-saturating").backward()
        opt.step()
    look.goal("where the generator's loss moves a fake", shift - 1, 1.5, 1.05)
