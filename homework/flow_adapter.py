"""Homework of flow_adapter.py: each test grades one function and says what the mistake may be."""
import torch
import torch.nn as nn

import flow_adapter
from homework.kit import check, exercise


@exercise("flow_adapter.Coupling.forward", points=2)
def test_homework_flow_adapter_coupling():
    block, (x1, x2) = flow_adapter.Coupling(3, 6), torch.randn(2, 2, 3, 4, 4)
    block.shift = lambda x: torch.sin(3 * x) + x.flip(1)
    a, b = block(x1, x2)
    check("the first half of the output", a, x2, "The halves swap, or half of the channels would never move.")
    check("the second half of the output", b, x1 + block.shift(x2),
          "x1 moves by F(x2), and F sees only what stays.")


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
    check("inverse(forward(x))", flow.inverse(flow.join(x1, x2)), x,
          "The coupling that came last must be undone first.")


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
    check("the known tokens in the result", x[mask], known[mask], "At the end the given values are put back.",
          1e-6)
    check("the other tokens in the result", x[~mask], three[~mask], "Only known tokens are put back.")
