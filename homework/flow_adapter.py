"""Homework of flow_adapter.py: each test looks at one function and says what a difference may mean."""
import math

import torch
import torch.nn as nn

import flow_adapter
from homework.kit import exercise, fit


@exercise("flow_adapter.Coupling.forward", points=2)
def test_homework_flow_adapter_coupling(look):
    for first, B in ((True, 1), (False, 3)):
        block = look.fill(flow_adapter.Coupling(4, 8, first))
        look.call(
            f"a coupling of {B} grids",
            block, {
                "x1": look.randn(B, 4, 3, 2),
                "x2": look.randn(B, 4, 3, 2)
            }, "The halves swap, or half of the channels would never move; x1 moves by F(x2), and F sees "
            "only what stays.",
            outputs=["the first half", "the second half"],
            params=block)


@exercise("flow_adapter.Coupling.inverse", points=2)
def test_homework_flow_adapter_coupling_undone(look):
    for first, B in ((True, 1), (False, 3)):
        block = look.fill(flow_adapter.Coupling(4, 8, first))
        look.call(f"a coupling of {B} grids, undone", block.inverse,
                  {"a": look.randn(B, 4, 3, 2), "b": look.randn(B, 4, 3, 2)},
                  "x1 = b - F(a): forward added F of the half that is now called a. x2 was only moved to the "
                  "front.", outputs=["x1", "x2"], gradients=False)


class Shear(nn.Module):
    """A coupling of another kind."""

    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, x1, x2):
        return x2, x1 + self.k * torch.sin(x2)

    def inverse(self, a, b):
        return b * (1 + self.k) - a.cos(), a + 0.3 * self.k * b


@exercise("flow_adapter.FlowAdapter.inverse", points=3)
def test_homework_flow_adapter_inverse(look):
    for shears, B, grid in (((1.0, 2.0, -0.5), 1, (3, 2)), ((0.4,), 2, (1, 1)), ((0.3, 1.0, 0.7, 2.0), 3,
                                                                                 (2, 4))):
        flow = flow_adapter.FlowAdapter(4, grid, n_block=len(shears))
        flow.blocks = nn.ModuleList([Shear(k) for k in shears])
        look.call(f"{len(shears)} couplings undone", flow.inverse, {"u": look.randn(B, grid[0] * grid[1], 4)},
                  "The coupling that came last is undone first, however many there are.", gradients=False)


class Stretch(nn.Module):
    """An adapter whose inverse is none, so that putting values back can be seen."""

    def forward(self, x):
        return 2 * x + 1

    def inverse(self, u):
        return (u - 1) / 2 + 0.01


class Writer(nn.Module):
    """A generator that writes sevens and remembers what it was told."""

    def sample(self, cond, known=None, known_mask=None, on_step=None, **options):
        self.told = dict(options, cond=cond)
        tokens = torch.full((len(cond), 4, 2), 7.0)
        self.known = known
        if known is not None:
            tokens = torch.where(known_mask[..., None], known, tokens)
        if on_step is not None:
            on_step(0, tokens, torch.zeros(len(cond), 4, dtype=torch.bool))
            on_step(3, tokens - 1, torch.ones(len(cond), 4, dtype=torch.bool))
        return tokens


@exercise("flow_adapter.Adapted.sample", points=3)
def test_homework_flow_adapter_sample(look):
    for B in (1, 3):
        model = flow_adapter.Adapted(Stretch(), Writer())
        shown = []
        given = {"cond": look.randint(5, B)}
        look.call(f"{B} samples", lambda cond: model.sample(
            cond, cfg=2.0, steps=3, temperature=0.5, on_step=lambda *told: shown.append(told)), given,
            "The generator's tokens are bent: the adapter's inverse makes the tokenizer's tokens of them.",
            gradients=False)
        look.see("how often on_step is called", len(shown), "As often as the generator calls it.")
        for i, tokens, mask in shown:
            look.see("the number of the step", i)
            look.see("the tokens that on_step is shown", tokens, "It, too, is to see the tokenizer's tokens.")
            look.see("the mask that on_step is shown", mask)
        told = model.generator.told
        for name in ("cond", "cfg", "steps", "temperature"):
            look.see(f"the generator's {name}", told.get(name), "All options go to the generator.")
        known = look.randn(B, 4, 2)
        mask = look.rand(B, 4) < 0.5
        x = look.call("a sample with known tokens", lambda cond, known, known_mask: model.sample(
            cond, known=known, known_mask=known_mask), given | {"known": known, "known_mask": mask},
            "At the end the given values are put back, and only those.", 1e-6, gradients=False)
        look.see("the known tokens that the generator is given", model.generator.known[mask],
                 "It lives in the bent space: known tokens go through the adapter first.")
        look.see("the values given are in the result", torch.equal(x[mask], known[mask]), "Exactly.")


@exercise("flow_adapter", points=3, further=True, goals=[
    ("nats per point of the banana", math.log(1.2 * 0.25) + math.log(2 * math.pi * math.e), (0.6, 0.3),
     "A bent Gaussian has the Gaussian's entropy, 1.634; one Gaussian without a flow has 3.52. Below it, the "
     "flow changes volumes."),
    ("the error of the inverse", 0.0, (0.01, 0.0001), "inverse(forward(x)) is x.")])
def capstone_flow_adapter(look):
    """One Gaussian and a flow learn the banana of the demo."""
    flow = flow_adapter.FlowAdapter(2, (16, 16), 4, hidden=16)
    middle = torch.zeros(3, 3)                              # the points know nothing of each other
    middle[1, 1] = 1
    for block in flow.blocks:
        for conv in block.convs:
            conv.weight.register_hook(lambda g: g * middle)
            conv.weight.data *= middle
    mean, log_std = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def nats(n):
        u = flow(flow_adapter.banana(256 * n).view(n, 256, 2))
        return -torch.distributions.Normal(mean, log_std.exp()).log_prob(u).sum(-1).mean()

    fit([mean, log_std, *flow.parameters()], lambda: nats(2), 600, 1e-2)
    x = flow_adapter.banana(256).view(1, 256, 2)
    with torch.no_grad():
        look.goal("nats per point of the banana", nats(100), 0.6, 0.3)
        look.goal("the error of the inverse", (flow.inverse(flow(x)) - x).abs().max(), 0.01, 0.0001)
