"""Homework of ar_transformer.py: each test grades one function and says what the mistake may be."""
from unittest.mock import patch

import torch

import ar_transformer
from homework.kit import check, exercise


def turned(x, rope):
    """RoPE as multiplication by complex numbers: x (B, S, n_head, head_dim), rope (S, head_dim / 2, 2)."""
    z, turn = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()), torch.view_as_complex(
        rope.contiguous())
    return torch.view_as_real(z * turn[:, None]).flatten(-2)


def angles(S, pairs):
    turn = torch.rand(S, pairs) * 6
    return torch.stack([turn.cos(), turn.sin()], -1)


@exercise("ar_transformer.rotate", points=3)
def test_homework_ar_transformer_rope():
    x, rope = torch.randn(2, 5, 3, 8), angles(5, 4)
    y = ar_transformer.rotate(x, rope)
    check("the length of the rotated vectors", y.norm(dim=-1), x.norm(dim=-1),
          "A rotation changes no length.")
    check("the rotated vectors", y, turned(x, rope),
          "Pairs are neighbours, (x0, x1), (x2, x3) ..., and (a, b) -> (a cos - b sin, b cos + a sin).")


def slow_attention(att, x, rope, causal=True):
    """One query at a time, one head at a time."""
    # (B, S, n_head, head_dim)
    q, k, v = (part.unflatten(-1, (att.n_head, -1)) for part in att.wqkv(x).chunk(3, -1))
    q, k, y = turned(q, rope), turned(k, rope), torch.zeros_like(v)
    for t in range(x.shape[1]):
        for head in range(att.n_head):
            seen = slice(t + 1) if causal else slice(None)
            score = (k[:, seen, head] * q[:, t:t + 1, head]).sum(-1) / q.shape[-1] ** 0.5
            y[:, t, head] = (score.softmax(1)[..., None] * v[:, seen, head]).sum(1)
    return att.wo(y.flatten(2))


@exercise("ar_transformer.Attention.forward", points=2)
def test_homework_ar_transformer_attention():
    att, x, rope = ar_transformer.Attention(12, 3).eval(), torch.randn(2, 6, 12), angles(6, 2)
    with patch.object(ar_transformer, "rotate", turned):
        check(
            "attention", att(x, rope), slow_attention(att, x, rope),
            "Queries and keys turn, values do not; row t attends to rows 0 .. t; wo comes last, on the heads side by side."
        )
        check("attention with a mask", att(x, rope, torch.ones(6, 6, dtype=torch.bool)),
              slow_attention(att, x, rope, False), "A mask that is given says alone what is attended to.")


@exercise("ar_transformer.Attention.forward", points=2)
def test_homework_ar_transformer_cached_attention():
    att, x, rope = ar_transformer.Attention(12, 3).eval(), torch.randn(2, 6, 12), angles(6, 2)
    cache = torch.zeros(2, 2, 3, 6, 4)
    with patch.object(ar_transformer, "rotate", turned):
        rows = [
            att(x[:, t:t + 1], rope[t:t + 1], (torch.arange(6) <= t)[None], cache, torch.tensor([t]))
            for t in range(6)
        ]
        check(
            "row by row with the cache", torch.cat(rows, 1), att(x, rope),
            "Each row's rotated key and its value are written at its position, and the whole cache is attended to."
        )


@exercise("ar_transformer.ARTransformer.hidden_states", points=3)
def test_homework_ar_transformer_teacher_forcing():
    for options in (dict(vocab_size=9), dict(token_dim=2, prefix=(3, 5))):
        head = ar_transformer.CategoricalHead(8, 9)
        model = ar_transformer.ARTransformer(head, 4, 7, n_layer=1, n_head=2, n_embd=8, **options).eval()
        # a transformer that does nothing
        model.forward_blocks = lambda x, start=0, caches=None, padding_mask=None: x
        tokens = torch.randint(9, (3, 4)) if model.vocab_size else torch.randn(3, 4, 2)
        cond = torch.randn(3, 3, 5) if model.n_prefix == 3 else torch.tensor([1, 2, 3])
        drop = torch.tensor([True, False, True])
        h, start, e = model.hidden_states(tokens, cond, drop), model.prefix(cond, drop), model.embed(tokens)
        assert h.shape == e.shape, f"h has shape {tuple(h.shape)} and not {tuple(e.shape)}: one row for each token"
        check("what h[:, 0] has read last", h[:, 0], start[:, -1],
              "The first token is predicted from the prefix (with drop).")
        check(
            "what h[:, 1:] has read last", h[:, 1:], e[:, :-1],
            "Row t predicts token t, so the last thing it reads is token t - 1. If it reads token t, the answer leaks."
        )
