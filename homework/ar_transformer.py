"""Homework of ar_transformer.py: each test looks at one function and says what a difference may mean."""
import math

import torch

import ar_transformer
from homework.kit import closed, exercise, fit


def angles(look, S, pairs):
    """Any angles -> cos and sin (S, pairs, 2)."""
    turn = 6 * look.rand(S, pairs)
    return torch.stack([turn.cos(), turn.sin()], -1)


@exercise("ar_transformer.rotate", points=3)
def test_homework_ar_transformer_rope(look):
    hint = "Pairs are neighbours, (x0, x1), (x2, x3) ..., and (a, b) -> (a cos - b sin, b cos + a sin)."
    for shape in ((1, 1, 1, 2), (2, 5, 3, 8)):
        look.call(f"vectors {shape}, rotated", ar_transformer.rotate,
                  {"x": look.randn(*shape), "rope": angles(look, shape[1], shape[3] // 2)}, hint,
                  fixed=("rope",))
    look.call("bfloat16 vectors, rotated", ar_transformer.rotate,
              {"x": look.randn(2, 3, 2, 4).bfloat16(), "rope": angles(look, 3, 2)},
              "The result has the type of x, computed in float32.", 0.01, gradients=False)


def half_turns(look, S, pairs):
    """Angles of 0 and 180 degrees, so that `half_turned` stands in for rotate()."""
    cos = (look.rand(S, pairs) < 0.5) * 2.0 - 1
    return torch.stack([cos, torch.zeros_like(cos)], -1)


def half_turned(x, rope):
    """What rotate() does where every angle is 0 or 180 degrees: some pairs change their sign."""
    return torch.where(rope[:, None, :, 0].repeat_interleave(2, -1) < 0, -x, x)


@exercise("ar_transformer.Attention.forward", points=2)
def test_homework_ar_transformer_attention(look):
    att = look.fill(ar_transformer.Attention(12, 3).eval(), 0.5)
    with closed("ar_transformer", "rotate", half_turned):
        for B, S in ((1, 1), (1, 5), (3, 6)):
            rope = half_turns(look, S, 2)
            look.call(
                f"{B} x {S} rows",
                lambda x: att(x, rope), {"x": look.randn(B, S, 12)},
                "Queries and keys turn, values do not; scores are q.k / sqrt(head_dim); row t attends to "
                "rows 0 .. t; wo comes last, on the heads side by side.",
                params=att)
            mask = (look.rand(B, 1, S, S) < 0.5) | torch.eye(S, dtype=torch.bool)
            look.call(f"{B} x {S} rows with a mask",
                      lambda x: att(x, rope, mask), {"x": look.randn(B, S, 12)},
                      "A mask that is given says alone what is attended to; a row's weights add up to 1.",
                      params=att)


@exercise("ar_transformer.Attention.forward", points=2)
def test_homework_ar_transformer_cached_attention(look):
    att = look.fill(ar_transformer.Attention(12, 3).eval(), 0.5)
    with closed("ar_transformer", "rotate", half_turned), torch.no_grad():
        for B in (1, 3):
            cache = torch.zeros(2, B, 3, 6, 4)
            rope = half_turns(look, 6, 2)
            for positions in ([0], [1, 2], [3], [5]):
                mask = torch.arange(6) <= torch.tensor(positions)[:, None]
                look.call(
                    f"rows {positions} of {B} sequences",
                    lambda x: att(x, rope[positions], mask, cache, torch.tensor(positions)),
                    {"x": look.randn(B, len(positions), 12)}, "The rows' rotated keys and their values are "
                    "written at their positions, for each sequence; the whole cache is attended to, as far "
                    "as the mask allows.",
                    gradients=False)
            look.see("the cache afterwards", cache, "(2, B, n_head, keys, head_dim), keys first.")


def no_turns(grid, head_dim, prefix, base=10000.0):
    """It stands in for rope_table()."""
    return torch.ones(prefix + math.prod(grid), head_dim // 2, 2)


def mixing(self, x, rope, mask=None, cache=None, positions=None):
    """It stands in for Attention.forward: each row is told a little of all rows that it may see."""
    S = x.shape[1]
    seen = torch.ones(S, S).tril() if mask is None else mask.float()
    seen = seen if seen.ndim == 2 else seen[:, 0]
    weight = seen * torch.linspace(0.2, 1, S)
    return weight @ torch.sin(self.wqkv(x)[..., :x.shape[-1]]) + self.wo(x)


@exercise("ar_transformer.ARTransformer.hidden_states", points=3)
def test_homework_ar_transformer_teacher_forcing(look):
    hint = ("Row t predicts token t: it has read the prefix (with drop) and tokens 0 .. t - 1. If it reads "
            "token t, the answer leaks. Padding of captions is not attended to.")
    size = dict(n_layer=1, n_head=2, n_embd=8)
    arms = {
        "ids": (dict(vocab_size=9), lambda B: look.randint(7, B)),
        "vectors after a prefix of vectors": (dict(token_dim=2,
                                                   prefix=(3, 5)), lambda B: look.randn(B, 3, 5)),
        "ids after a caption":
            (dict(vocab_size=9, text=(3, 5)),
             lambda B: torch.cat([torch.zeros(B, 1, 5), look.randn(B, 2, 5)], 1)),
    }
    with (closed(ar_transformer.Attention, "forward", mixing),
          closed("ar_transformer", "rope_table", no_turns)):
        for name, (options, condition) in arms.items():
            model = ar_transformer.ARTransformer(torch.nn.Identity(), 4, 7, **options, **size).eval()
            look.fill(model, 0.5)
            learned = {k: p for k, p in model.named_parameters() if "embed" in k or "caption" in k}
            for B in (1, 3):
                cond = condition(B)
                for drop in (None, torch.arange(B) % 2 == 0):
                    given = {"tokens": look.randn(B, 4, 2) if model.token_dim else look.randint(9, B, 4)}
                    look.call(f"h of {name}, {B} at once, drop {drop is not None}",
                              lambda tokens: model.hidden_states(tokens, cond, drop), given, hint,
                              params=learned)


@exercise("ar_transformer.rope_table", points=2, further=True)
def test_homework_ar_transformer_rope_in_two_dimensions(look):
    for n_axes, head_dim in ((1, 8), (2, 8), (2, 12), (2, 10), (3, 12)):
        grid = tuple((look.randint(3, n_axes) + 2).tolist())
        prefix = int(look.randint(4, 1)) + 1
        base = 10.0 + 1000 * float(look.rand(1))
        look.see(
            f"angles of a grid of {n_axes} axes, head_dim {head_dim}",
            ar_transformer.rope_table(grid, head_dim, prefix, base),
            "The pairs are shared out among the axes, the row's first; in each share the angles fall from "
            "1 to 1 / base per position; a prefix does not turn, but on one axis it is counted.")
    grid = tuple((look.randint(3, 2) + 2).tolist())
    look.see("the default base", ar_transformer.rope_table(grid, 8, 1), "10000.")


@exercise("ar_transformer.CategoricalHead.sample", points=3, further=True)
def test_homework_ar_transformer_guided_decoding(look):
    head = look.fill(ar_transformer.CategoricalHead(6, 5), 0.8)
    h = look.randn(1, 6)
    without = look.randn(1, 6)
    n = 20_000
    for tricks in (dict(), dict(temperature=0.6), dict(top_k=3), dict(top_p=0.7), dict(cfg=2.0),
                   dict(cfg=1.5, temperature=0.8, top_k=4, top_p=0.9), dict(temperature=0.0)):
        other = without.expand(n, 6) if "cfg" in tricks else None
        ids, log_p = head.sample(h.expand(n, 6), other, **tricks)
        hint = "Guidance first, u + cfg (c - u) in the logits, then temperature, then top_k and top_p."
        look.form(f"ids with {tricks}", ids)
        look.see(f"how often each id is drawn with {tricks}",
                 torch.bincount(ids, minlength=5) / n, hint, 0.03)
        often = torch.bincount(ids, minlength=5)[ids] / n
        look.see(f"log p of the ids is how often they are drawn, with {tricks}",
                 bool(((log_p.exp() - often).abs() < 0.03).all()), "log p of an id is told as it was drawn.")
    look.form("ids of 2 x 3 positions", head.sample(look.randn(2, 3, 6))[0])
    look.draws("ids", lambda: head.sample(h.expand(200, 6))[0])
    drawn = torch.stack([head.sample(h.expand(2, 2, 6))[0] for _ in range(400)]).float()
    look.independent("the ids of a batch", drawn, 0.25)


@exercise("ar_transformer", points=3, further=True, goals=[
    ("nats per picture of bars and stripes", math.log(30), (0.5, 0.25), "30 pictures, all as likely: "
     "ln 30 = 3.401. Below it, a row sees the token that it predicts."),
    ("the share of samples that are bars or stripes", 1.0, (0.3, 0.15), "The samples come from the same p.")])
def capstone_ar_transformer(look):
    """Bars and stripes, 4 x 4: rows are full or empty, or columns are."""
    bits = torch.arange(16)[:, None] >> torch.arange(4) & 1
    rows = bits[:, :, None].expand(-1, -1, 4)
    pictures = torch.cat([rows, rows.transpose(1, 2)[1:-1]]).flatten(1)               # (30, 16)
    model = ar_transformer.ARTransformer(ar_transformer.CategoricalHead(32, 2),
                                         16,
                                         1,
                                         vocab_size=2,
                                         n_layer=2,
                                         n_head=2,
                                         n_embd=32,
                                         label_drop=0.0)
    none = torch.zeros(500, dtype=torch.long)
    fit(model.parameters(), lambda: model(pictures[torch.randint(30, (64,))], none[:64])[0], 700, 4e-3)
    model.eval()
    with torch.no_grad():
        look.goal("nats per picture of bars and stripes", 16 * model(pictures, none[:30])[0], 0.5, 0.25)
    found = (model.sample(none)[:, None] == pictures).all(-1).any(1).float().mean()
    look.goal("the share of samples that are bars or stripes", found, 0.3, 0.15)
