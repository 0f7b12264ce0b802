"""
A causal Llama-style transformer that writes an image token by token.

An image becomes a sequence by reading its grid of tokens row by row. The chain rule is then exact,

    p(x_1 ... x_T | c) = prod_t p(x_t | c, x_1 ... x_{t-1}),

and a causal transformer computes all T factors in one pass. This is LlamaGen (https://arxiv.org/abs/2406.06525) when
the tokens are ids and the head is a softmax, and GIVT-Causal (https://arxiv.org/abs/2312.02116) when they are real
vectors and the head a Gaussian mixture: only the input line and the head differ. The condition c stands in front as
P tokens: one for a class, more for a caption. While sampling, a KV cache keeps every earlier key and value, so a new
token costs one row and not T. from_official() reads LlamaGen's weights; export writes a Hugging Face Llama.

Shapes:  B batch, T tokens, D numbers in a token or V ids, C width (n_embd), P prefix tokens, S = P + T - 1

    cond (B,) | caption --embed--> (B, P, C) --cat--> (B, S, C) --n_layer Blocks--> h (B, T, C) --head--> p(x_t | h_t)
    tokens (B, T[, D]) --embed--> (B, T - 1, C) --^               (position t predicts token t)

    python ar_transformer.py   # words, samples, surprise; writes ar_transformer.png; about 50 s on 2 CPU cores

Try it yourself:
  1. Let the model see the future: causal=False in Attention. The loss falls to nothing. What do samples look like?
  2. Set label_drop=0 in read_captions. What does the model say of pictures without a caption, and why?
  3. Sample with use_cache=False and time it against the default for --image_size 8 and 16.
"""
import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

SIZES = {
    "nano": dict(n_layer=4, n_head=2, n_embd=64),
    "tiny": dict(n_layer=4, n_head=4, n_embd=128),
    "small": dict(n_layer=6, n_head=4, n_embd=192),          # the default on a CPU
    "medium": dict(n_layer=12, n_head=6, n_embd=384),        # the default on a GPU
    "gpt-b": dict(n_layer=12, n_head=12, n_embd=768, multiple_of=256),                      # LlamaGen's; it trains them
    "gpt-l": dict(n_layer=24, n_head=16, n_embd=1024, multiple_of=256),                     # with dropout=0.1
    "gpt-xl": dict(n_layer=36, n_head=20, n_embd=1280, multiple_of=256),
    "gpt-xxl": dict(n_layer=48, n_head=24, n_embd=1536, multiple_of=256),
    "gpt-3b": dict(n_layer=24, n_head=32, n_embd=3200, multiple_of=256),
}


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32. (Zhang & Sennrich 2019)"""

    def __init__(self, n_embd, eps=1e-5):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(n_embd))

    def forward(self, x):                                   # (..., C) -> (..., C)
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return y.type_as(x) * self.weight


def rope_table(grid, head_dim, prefix, base=10000.0, zero_prefix=False):
    """Rotary angles for a prefix and a grid of tokens: -> (P + T, head_dim / 2, 2) holding cos and sin.

    The head_dim / 2 pairs are shared out among the axes of the grid: for (rows, cols) the first half turns with the
    row, the second with the column (LlamaGen). Prefix tokens stand at the origin of every axis and do not turn. On one axis
    (T,) the prefix is counted too: rows 0 .. P + T - 1, as in any language model. zero_prefix: cos = sin = 0 for the prefix,
    as in LlamaGen's released weights: its keys vanish, so that every score with it is 0, and only its values count.
    """
    axes = len(grid)
    if axes == 1:
        places = torch.arange(prefix + grid[0]).float()[:, None]
    else:
        places = torch.cartesian_prod(*[torch.arange(n).float() for n in grid])
        places = torch.cat([torch.zeros(prefix, axes), places])                             # (P + T, axes)
    pairs = [head_dim // 2 // axes + (a < head_dim // 2 % axes) for a in range(axes)]
    angles = torch.cat([places[:, a:a + 1] * base ** (-torch.arange(n) / n) for a, n in enumerate(pairs)], 1)
    table = torch.stack([angles.cos(), angles.sin()], -1)                                   # (P + T, head_dim / 2, 2)
    if zero_prefix:
        table[:prefix] = 0
    return table


def rotate(x, rope):
    """Turn each pair (x_2k, x_2k+1) by its angle: x (B, S, n_head, head_dim), rope (S, head_dim / 2, 2) -> like x.

    (a, b) -> (a cos - b sin, b cos + a sin). The product q . k then depends on the difference of positions only.
    """
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)                                      # (B, S, n_head, head_dim/2)
    cos, sin = rope[:, None].unbind(-1)                                                     # (S, 1, head_dim/2)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).type_as(x)


def attention(q, k, v, mask=None, causal=False, dropout=0.0):
    """softmax(q k^T / sqrt(d)) v: q, k, v (B, n_head, S, d), mask True where a row may look -> (B, n_head, S, d).

    One fused kernel, except in bfloat16 training on a CPU, where PyTorch's backward pass of it is 5 to 15 times slower than
    the formula (2.13, S of 17 to 65).
    """
    if q.dtype != torch.bfloat16 or q.device.type != "cpu" or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    score = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5                                   # (B, n_head, S, S)
    if causal:
        mask = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        score = score.masked_fill(~mask, -math.inf)
    return F.dropout(score.softmax(-1), dropout).type_as(v) @ v


class Attention(nn.Module):
    """Causal self-attention with rotary positions and an optional KV cache."""

    def __init__(self, n_embd, n_head, dropout=0.0):
        super().__init__()
        self.n_head, self.dropout = n_head, nn.Dropout(dropout)
        self.wqkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.wo = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x, rope, mask=None, cache=None, at=None):
        """x (B, S, C) -> (B, S, C). mask: bool, broadcast to (B, n_head, S, keys), True where a row may look; without it,
        at earlier rows and itself. With cache (2, B, n_head, keys, head_dim), x are the rows at (S,) int64 of a longer
        sequence: their keys and values are written there, and all those of the cache are looked at."""
        B, S, C = x.shape
        qkv = self.wqkv(x).view(B, S, 3 * self.n_head, C // self.n_head)                    # q heads, k heads, v heads
        q, k = rotate(qkv[:, :, :2 * self.n_head], rope).transpose(1, 2).chunk(2, 1)        # (B, n_head, S, head_dim)
        v = qkv[:, :, 2 * self.n_head:].transpose(1, 2)
        if cache is not None:
            cache[0].index_copy_(2, at, k.type_as(cache))
            cache[1].index_copy_(2, at, v.type_as(cache))
            k, v = cache.type_as(q)
        y = attention(q, k, v, mask, causal=mask is None and S > 1)
        return self.dropout(self.wo(y.transpose(1, 2).reshape(B, S, C)))


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), two thirds of the usual 4C wide so that it costs the same as a plain MLP."""

    def __init__(self, n_embd, dropout=0.0, multiple_of=64):
        super().__init__()
        hidden = -(-int(8 * n_embd / 3) // multiple_of) * multiple_of
        self.w1, self.w3 = (nn.Linear(n_embd, hidden, bias=False) for _ in range(2))
        self.w2, self.dropout = nn.Linear(hidden, n_embd, bias=False), nn.Dropout(dropout)

    def forward(self, x):                                   # (..., C) -> (..., C)
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, n_embd, n_head, dropout=0.0, multiple_of=64):
        super().__init__()
        self.norm1, self.attn = RMSNorm(n_embd), Attention(n_embd, n_head, dropout)
        self.norm2, self.mlp = RMSNorm(n_embd), SwiGLU(n_embd, dropout, multiple_of)

    def forward(self, x, rope, mask=None, cache=None, at=None):                             # (B, S, C) -> (B, S, C)
        x = x + self.attn(self.norm1(x), rope, mask, cache, at)
        return x + self.mlp(self.norm2(x))


def draw_ids(p):
    """One id from each row of probabilities: p (..., V) -> (...) int64. The rows need not add up to 1.

    On a CPU a uniform number finds its place among the cumulated probabilities: torch.multinomial draws V numbers for each
    row, which takes 10 to 20 times as long. (On a GPU that is one fast kernel.)
    """
    if p.device.type != "cpu":
        return torch.multinomial(p.flatten(0, -2), 1).view(p.shape[:-1])
    cdf = p.cumsum(-1)
    u = 1 - torch.rand(cdf[..., :1].shape)                  # in (0, 1]: what has probability 0 is never found
    return torch.searchsorted(cdf, u * cdf[..., -1:]).squeeze(-1)


class CategoricalHead(nn.Module):
    """p(id | h) as a softmax over a vocabulary. Starts at zero, so the first loss is exactly ln V.

    groups > 1: an id becomes that many digits, the lowest first, each with a softmax of its own; p(id | h) is their product,
    as if they were independent given h (MAGVIT-v2, https://arxiv.org/abs/2310.05737: 2^18 ids are two digits of 2^9). The
    rows of proj are then the digits' embeddings too ("tied"), which embed() gives the generator instead of a table of its
    own, and cannot start at zero. At V = 2^18 a training step of ar_transformer.py's "small" with AdamW, 8 x 64 tokens on one
    core, takes 4 s and 2.9 GB (103M parameters); with two groups 0.15 s and 0.2 GB (2.9M).
    """

    def __init__(self, n_embd, vocab_size, groups=1):
        super().__init__()
        self.groups, self.base = groups, round(vocab_size ** (1 / groups))
        if self.base ** groups != vocab_size:
            raise ValueError(f"{groups} groups: vocab_size must be a whole number to the power of {groups}, such as "
                             f"{self.base ** groups}, not {vocab_size}")
        self.proj = nn.Linear(n_embd, groups * self.base, bias=False)
        self.register_buffer("place", self.base ** torch.arange(groups), persistent=False)   # what a digit counts
        if groups == 1:
            nn.init.zeros_(self.proj.weight)
        else:
            nn.init.normal_(self.proj.weight, std=0.02)

    def digits(self, ids):                                  # (...) int64 -> (..., groups)
        return ids.unsqueeze(-1) // self.place % self.base

    def embed(self, ids):                                   # (...) int64 -> (..., C), the sum of its digits' embeddings
        rows = self.digits(ids) + self.base * torch.arange(self.groups, device=ids.device)
        return F.embedding(rows, self.proj.weight).sum(-2)

    def digit_logits(self, h):                              # (..., C) -> (..., groups, base), float32
        return self.proj(h).float().unflatten(-1, (self.groups, -1))

    def logits(self, h):                                    # (..., C) -> (..., V), float32, of every id: 2^18 are many
        low, *others = self.digit_logits(h).unbind(-2)
        for high in others:
            low = (high.unsqueeze(-1) + low.unsqueeze(-2)).flatten(-2)
        return low

    def loss(self, h, x):
        """Cross-entropy in nats per token, not reduced: h (..., C), x (...) int64 -> (...)."""
        logits, digits = self.digit_logits(h), self.digits(x)
        return F.cross_entropy(logits.flatten(0, -2), digits.flatten(), reduction="none").view(digits.shape).sum(-1)

    @torch.no_grad()
    def sample(self, h, h_uncond=None, cfg=1.0, temperature=1.0, top_k=0, top_p=1.0):
        """Draw one id per position: h (..., C) -> ids (...) int64, log p (...) under the distribution drawn from.

        Guidance mixes logits: u + cfg * (c - u). Then temperature, then the top_k likeliest ids (0: all), then the
        smallest set whose probability reaches top_p (LlamaGen's order). With groups, all of it digit by digit.
        """
        if h_uncond is not None and cfg != 1.0:             # proj is affine: mixed before it, logits are made only once
            h = h_uncond + cfg * (h - h_uncond)
        logits = self.digit_logits(h)                                                       # (..., groups, base)
        if temperature != 1:
            logits = logits / max(temperature, 1e-5)
        if top_k:
            kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
            logits = logits.masked_fill(logits < kth, -math.inf)
        if top_p < 1:
            p, index = logits.softmax(-1).sort(-1, descending=True)
            drop = (p.cumsum(-1) - p >= top_p).scatter(-1, index, p.cumsum(-1) - p >= top_p)
            logits = logits.masked_fill(drop, -math.inf)
        p = logits.softmax(-1)
        digits = draw_ids(p)                                                                # (..., groups)
        return (digits * self.place).sum(-1), p.gather(-1, digits.unsqueeze(-1)).squeeze(-1).log().sum(-1)


class SubTokenHead(nn.Module):
    """p(id | h) = p(d_1 | h) p(d_2 | h, d_1): an id is cut into digits of `split` bits, the lowest first, drawn in turn.

    For every token a small causal transformer goes over two rows, [h, embedding of d_1]; row i predicts d_i. It is the "next
    sub-token prediction" of Open-MAGVIT2 (https://arxiv.org/abs/2409.04410): 2^18 ids as 2^6 x 2^12, with 2, 3, 4 of these
    layers on the blocks of gpt-l, gpt-xl, gpt-xxl. The digits of CategoricalHead(groups=2) do not see each other; these do,
    so that every distribution over the ids is within reach, at 0.23 s and 0.3 GB where those take 0.15 s and 0.2 GB.
    zero_prefix: see rope_table; the prefix is h here.
    """

    def __init__(self, n_embd, vocab_size, split=(6, 12), n_layer=1, n_head=4, multiple_of=64, zero_prefix=False):
        super().__init__()
        if len(split) < 2 or min(split) < 1 or 1 << sum(split) != vocab_size:
            raise ValueError(f"split {tuple(split)}: two or more numbers of bits that make {vocab_size} ids are wanted")
        self.split, self.groups = tuple(split), len(split)
        self.embeds = nn.ModuleList([nn.Embedding(1 << bits, n_embd) for bits in split])
        self.blocks = nn.ModuleList([Block(n_embd, n_head, multiple_of=multiple_of) for _ in range(n_layer)])
        self.norm = RMSNorm(n_embd)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        self.heads = nn.ModuleList([CategoricalHead(n_embd, 1 << bits) for bits in split])  # last: they start at zero
        rope = rope_table((len(split) - 1,), n_embd // n_head, 1, zero_prefix=zero_prefix)
        self.register_buffer("rope", rope, persistent=False)

    def digits(self, ids):                                  # (...) int64 -> list of (...), one for each run of bits
        return [ids >> sum(self.split[:i]) & (1 << bits) - 1 for i, bits in enumerate(self.split)]

    def embed(self, ids):                                   # (...) int64 -> (..., C), what ARTransformer reads
        return sum(table(d) for table, d in zip(self.embeds, self.digits(ids)))

    def rows(self, h, digits):
        """h (..., C) and the first n digits, each (...) -> (..., n + 1, C): row i is what digit i is predicted from."""
        x = torch.stack([h, *(table(d) for table, d in zip(self.embeds, digits))], -2)
        y = x.flatten(0, -3)                                                                # (N, n + 1, C)
        for block in self.blocks:
            y = block(y, self.rope[:y.shape[1]])
        return self.norm(y).view(x.shape)

    def loss(self, h, x):
        """The sum of the digits' cross-entropies, in nats per token: h (..., C), x (...) int64 -> (...)."""
        digits = self.digits(x)
        rows = self.rows(h, digits[:-1]).unbind(-2)
        return sum(head.loss(row, d) for head, row, d in zip(self.heads, rows, digits))

    @torch.no_grad()
    def sample(self, h, h_uncond=None, cfg=1.0, temperature=1.0, top_k=0, top_p=1.0):
        """Draw one id per position: h (..., C) -> ids (...) int64, log p (...), as CategoricalHead does, digit by digit.

        cfg and temperature may be tuples, one for each digit: the authors take (1.75, 1.85) and (1.1, 1.0) or so. No cache:
        to run the first of two rows twice is cheap.
        """
        each = lambda value: value if isinstance(value, tuple) else (value,) * self.groups
        both, digits, log_p = h if h_uncond is None else torch.stack([h, h_uncond]), [], 0
        for head, scale, warmth in zip(self.heads, each(cfg), each(temperature)):
            row = self.rows(both, [d.expand(both.shape[:-1]) for d in digits])[..., -1, :]
            row, row_uncond = (row, None) if h_uncond is None else row
            d, p = head.sample(row, row_uncond, scale, warmth, top_k, top_p)
            digits, log_p = [*digits, d], log_p + p
        return sum(d << sum(self.split[:i]) for i, d in enumerate(digits)), log_p


def bytes_of(texts, P):
    """Texts -> their UTF-8 bytes (B, P) int64, zeros in front: the last byte stands beside the first token of the image.
    ValueError if one of them has more than P bytes."""
    rows = [list(text.encode()) for text in texts]
    for text, row in zip(texts, rows):
        if len(row) > P:
            raise ValueError(f"a caption of {len(row)} bytes where there is room for {P}: {text!r}")
    return torch.tensor([[0] * (P - len(row)) + row for row in rows])


class CaptionEmbedder(nn.Module):
    """A caption -> prefix tokens. Shorter captions have zeros in front.

    features: an int, the E numbers of each of P tokens of a frozen text encoder (LlamaGen: 120 of FLAN-T5's 2048):
    fc2(gelu(fc1 x)), without bias, so that padding stays 0. Or "bytes": the transformer learns to read P bytes by itself. RoPE
    gives the prefix no order, so each byte is told its place; and a convolution over 8 bytes in steps of 4 shows the first
    layer words instead of letters, in a quarter of the rows.
    """

    def __init__(self, P, features, n_embd):
        super().__init__()
        self.bytes, E = features == "bytes", n_embd if features == "bytes" else features
        self.n_rows = -(-P // 4) if self.bytes else P
        self.fc1, self.fc2 = nn.Linear(E, n_embd, bias=False), nn.Linear(n_embd, n_embd, bias=False)
        self.register_buffer("none", torch.randn(self.n_rows, E) / math.sqrt(E))            # "no caption": fixed (LlamaGen)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=n_embd ** -0.5 if self.bytes else 0.02)
        if self.bytes:
            self.byte, self.place = nn.Embedding(256, E), nn.Parameter(torch.randn(4 * self.n_rows, E))
            self.words = nn.Conv1d(E, E, 8, stride=4, padding=2)

    def whole(self, text):                                  # (B, P) bytes -> (B, 4 rows), zeros in front
        return F.pad(text.long(), (4 * self.n_rows - text.shape[1], 0))

    def keep(self, text, drop=None):
        """text (B, P) bytes or (B, P, E) -> (B, rows) bool, True where there is text. Where drop: everywhere, except that with
        features "no caption" keeps the padding of the caption it replaces, as published."""
        if not self.bytes:
            return (text != 0).any(-1)
        there = (self.whole(text) != 0).unflatten(1, (-1, 4)).any(-1)
        return there if drop is None else there | drop[:, None]

    def forward(self, text, drop=None):
        """text (B, P) bytes or (B, P, E), drop (B,) bool: True for "no caption" -> (B, rows, C)."""
        x = text
        if self.bytes:
            text = self.whole(text)
            x = (self.byte(text) + self.place) * (text != 0)[..., None]                     # (B, 4 rows, E)
            x = self.words(x.transpose(1, 2)).transpose(1, 2)                               # (B, rows, E)
        if drop is not None:
            x = torch.where(drop[:, None, None], self.none.type_as(x), x)
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class ARTransformer(nn.Module):
    """p(tokens | cond) for tokens in raster order. Give vocab_size for ids or token_dim for real vectors.

    cond is a class (B,), or
      text = (P, E)           captions (B, P, E): features of a text encoder, zeros in front. Causal, like the image.
      text = (P, "bytes")     captions (B, P): their bytes, see bytes_of(); four of them make a prefix token.
      prefix = (P, E)         P vectors (B, P, E), the tokens of another image. They see each other both ways.
    places: learned absolute places on top of RoPE. None: for real vectors (GIVT), not for ids (LlamaGen).
    multiple_of: the width of the MLP is rounded up to it. zero_prefix: see rope_table.
    """

    def __init__(self, head, seq_len, num_classes, token_dim=None, vocab_size=None, grid=None, n_layer=6, n_head=4,
                 n_embd=192, dropout=0.0, label_drop=0.1, rope_base=10000.0, prefix=None, text=None, places=None,
                 multiple_of=64, zero_prefix=False):
        super().__init__()
        side = math.isqrt(seq_len)
        grid = tuple(grid or ((side, side) if side * side == seq_len else (seq_len,)))
        if math.prod(grid) != seq_len:
            raise ValueError(f"grid {grid} holds {math.prod(grid)} tokens, not seq_len = {seq_len}")
        if n_embd % n_head or n_embd // n_head % 2:
            raise ValueError(f"n_embd {n_embd} over n_head {n_head} must be an even head width")
        if prefix and text:
            raise ValueError("prefix and text: the condition is one of them")
        self.seq_len, self.num_classes, self.token_dim, self.vocab_size = seq_len, num_classes, token_dim, vocab_size
        self.grid, self.n_head, self.label_drop, self.rope_base = grid, n_head, label_drop, rope_base
        self.caption = CaptionEmbedder(*text, n_embd) if text else None
        self.n_prefix = P = self.caption.n_rows if text else (prefix or [1])[0]
        if vocab_size and head.groups > 1:                  # the head holds the embeddings of the ids' digits
            self.tok_embed = None
        else:
            self.tok_embed = nn.Embedding(vocab_size, n_embd) if vocab_size else nn.Linear(token_dim, n_embd)
        if prefix:
            self.pre_embed = nn.Linear(prefix[1], n_embd)
            self.pre_place = nn.Parameter(torch.zeros(P, n_embd))
            self.pre_none = nn.Parameter(torch.zeros(n_embd))                               # each vector of "no prefix"
        elif not text:
            self.cls_embed = nn.Embedding(num_classes + 1, n_embd)                          # the last row: "no class"
        self.pos_embed = nn.Parameter(torch.zeros(seq_len, n_embd)) if places or places is None and token_dim else None
        self.blocks = nn.ModuleList([Block(n_embd, n_head, dropout, multiple_of) for _ in range(n_layer)])
        self.norm = nn.Identity() if isinstance(head, SubTokenHead) else RMSNorm(n_embd)    # its blocks go on from here
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("rope", rope_table(grid, n_embd // n_head, P, rope_base, zero_prefix), persistent=False)
        row = torch.arange(P + seq_len)
        look = (row <= row[:, None]) | (row < (P if prefix else 0))                         # who may look where
        self.register_buffer("row", row, persistent=False), self.register_buffer("look", look, persistent=False)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and not name.startswith("caption."):
                nn.init.normal_(module.weight, std=0.02)
        for p in self.parameters(recurse=False):            # the learned places
            nn.init.normal_(p, std=0.02)
        self.causal_only, self.static = not prefix and not text, None
        self.head = head                                    # last, so that it keeps its own initialisation

    def embed(self, tokens, at=None):
        """tokens (B, n[, D]) -> (B, n, C). The line that knows the token type. at (n,): the rows where they stand, counted
        with the prefix; None: the first n of the image."""
        x = self.head.embed(tokens) if self.tok_embed is None else self.tok_embed(tokens)
        if self.pos_embed is None:
            return x
        return x + (self.pos_embed[:x.shape[1]] if at is None else self.pos_embed[at - self.n_prefix])

    def prefix(self, cond, drop=None):
        """cond as in the class, labels (B,) int64 with num_classes for "no class" -> (B, P, C).
        drop (B,) bool: True where the condition is to be hidden."""
        if self.caption is not None:
            return self.caption(cond, drop)
        if cond.ndim == 1:
            cond = cond if drop is None else torch.where(drop, self.num_classes, cond)
            return self.cls_embed(cond)[:, None]
        x = self.pre_embed(cond)
        x = x if drop is None else torch.where(drop[:, None, None], self.pre_none.type_as(x), x)
        return x + self.pre_place

    def keep(self, cond, drop=None):
        """Which rows of each sequence are not padding: (B, P + T) bool, or None where there is none."""
        if self.caption is None:
            return None
        return F.pad(self.caption.keep(cond, drop), (0, self.seq_len), value=True)

    def mask(self, at, end, keep=None):
        """Who may look where: rows at (S,), keys 0 .. end - 1 -> bool (S, end), or with padding (B, 1, S, end).
        A row of padding looks at itself: a softmax over nothing would be nan."""
        look = self.look[at, :end]
        if keep is None:
            return look
        return (look & keep[:, None, :end] | (at[:, None] == self.row[:end]))[:, None]

    def run(self, x, start=0, caches=None, keep=None):
        """Rows x (B, S, C) standing at start .. start + S - 1 -> h (B, S, C). With caches, S = 1 or start = 0: the earlier
        rows are in there. Only the filled part of a cache is looked at, so its view grows (see decode_step)."""
        S, end = x.shape[1], start + x.shape[1]
        at, rope = self.row[start:end], self.rope[start:end]
        mask = None if self.causal_only or (S == 1 and keep is None) else self.mask(at, end, keep)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, mask, None if caches is None else caches[i][:, :, :, :end], at)
        return self.norm(x)

    def hidden(self, tokens, cond, drop=None):
        """tokens (B, T[, D]), cond as in prefix() -> h (B, T, C), where h[:, t] has seen cond and tokens before t only."""
        x = torch.cat([self.prefix(cond, drop), self.embed(tokens[:, :-1])], 1)             # (B, P + T - 1, C)
        return self.run(self.dropout(x), keep=self.keep(cond, drop))[:, self.n_prefix - 1:]

    def logits(self, tokens, cond):
        """tokens (B, T) int64, cond as in prefix() -> (B, T, V): position t predicts token t. For a categorical head."""
        return self.head.logits(self.hidden(tokens, cond))

    def forward(self, tokens, cond):
        """tokens (B, T[, D]), cond as in prefix() -> mean loss of the head per token (), logs (none).

        While training, a tenth of the conditions is hidden, so that one network knows both p(x | c) and p(x), which
        guidance needs. (The authors' released GIVT code forgets this.)
        """
        drop = torch.rand(len(cond), device=cond.device) < self.label_drop if self.training and self.label_drop > 0 else None
        loss = self.head.loss(self.hidden(tokens, cond, drop), tokens).mean()
        return loss, {}

    def caches(self, x, stay=False):
        """Room for the keys and values of len(x) whole sequences, for each block: x (B, P, C).
        stay: the same memory as in the last call if it fits, since a CUDA graph writes to fixed addresses."""
        shape, old = (2, len(x), self.n_head, self.n_prefix + self.seq_len, x.shape[-1] // self.n_head), self.static
        if stay and old and (old[0].shape, old[0].dtype, old[0].device) == (shape, x.dtype, x.device):
            return old
        caches = [x.new_zeros(shape) for _ in self.blocks]
        if stay:
            self.static = caches
            for cache in caches:
                torch._dynamo.mark_static_address(cache, guard=False)
        return caches

    def decode_step(self, tokens, at, caches, keep=None):
        """One token per sequence in static shapes, for torch.compile: tokens (B[, D]) at row at (1,) int64 -> h (B, C).

        The same numbers as run(), which on a CPU is faster. Here every step looks at the whole cache, the rest masked, and
        the row is a tensor: one graph serves all T steps. With caches for 2B sequences the tokens are fed to both halves.
        """
        x = self.embed(tokens[:, None], at)
        x = x.repeat(caches[0].shape[1] // len(x), 1, 1)
        rope, mask = self.rope[at], self.mask(at, len(self.row), keep)
        for block, cache in zip(self.blocks, caches):
            x = block(x, rope, mask, cache, at)
        return self.norm(x[:, -1])

    @torch.no_grad()
    def sample(self, cond, steps=None, cfg=1.0, temperature=1.0, known=None, known_mask=None, on_step=None,
               use_cache=True, cfg_interval=-1, compile=False, **tricks):
        """cond as in prefix() -> tokens (B, T[, D]), drawn one after the other.

        cfg is the guidance scale s of p(x|c)^s p(x)^(1-s), 1 is off. cfg_interval c: only the first c + 2 tokens are guided
        (so counts LlamaGen's code: the first token and steps 0 .. c), -1: all. known (B, T[, D]) with known_mask (B, T) True
        where a token is given: it is kept, and later ones see it (earlier ones cannot: the model is causal).
        on_step(t, tokens, mask) is called after each token, mask True where still unknown. tricks go to the head.
        compile: True compiles decode_step, on a GPU as one CUDA graph; or the name of another backend of torch.compile.
        """
        B, T, P, guided = len(cond), self.seq_len, self.n_prefix, cfg != 1.0
        if steps not in (None, T):
            raise ValueError(f"an autoregressive model draws one token per step: steps must be {T}, not {steps}")
        tokens, unknown = self.blank(B, cond.device), torch.ones(B, T, dtype=torch.bool, device=cond.device)
        x, keep, until = self.prefix(cond), self.keep(cond), T if cfg_interval < 0 else cfg_interval + 2
        if guided:
            none = torch.ones_like(unknown[:, 0])
            x = torch.cat([x, self.prefix(cond, none)])                                     # (2B, P, C)
            keep = None if keep is None else torch.cat([keep, self.keep(cond, none)])
        caches = self.caches(x, stay=bool(compile)) if use_cache or compile else None
        step = self.compiled(compile) if compile else None
        h = self.run(x, 0, caches, keep)[:, -1]                                             # (B or 2B, C)
        for t in range(T):
            if guided and t == until and not compile:       # from here on half of the rows are not needed
                guided, h, x, keep = False, h[:B], x[:B], None if keep is None else keep[:B]
                caches = caches and [cache[:, :B] for cache in caches]
            h, h_uncond = h.chunk(2) if guided else (h, None)
            new, _ = self.head.sample(h, h_uncond, cfg if t < until else 1.0, temperature, **tricks)     # (B[, D])
            if known is not None:
                given = known_mask[:, t].view(B, *[1] * (new.ndim - 1))
                new = torch.where(given, known[:, t].type_as(new), new)
            tokens[:, t], unknown[:, t] = new, False
            if on_step is not None:
                on_step(t, tokens, unknown)
            if t == T - 1:
                break
            if compile:
                torch.compiler.cudagraph_mark_step_begin()
                h = step(new, torch.full((1,), P + t, device=cond.device), caches, keep)
                continue
            e = self.embed(new[:, None], self.row[P + t:P + t + 1])                         # (B, 1, C)
            e = torch.cat([e, e]) if guided else e
            x = e if use_cache else torch.cat([x, e], 1)
            h = self.run(x, P + t if use_cache else 0, caches, keep)[:, -1]
        return tokens

    def compiled(self, how=True):
        """decode_step as one graph per batch size; after 8 of them torch warns and goes back to single kernels.
        reduce-overhead records CUDA graphs: a step of a small model is all kernel launches."""
        options = dict(mode="reduce-overhead") if how is True else dict(backend=how, fullgraph=True)
        return torch.compile(self.decode_step, dynamic=False, **options)

    def blank(self, n, device):
        """n sequences of nothing yet -> (n, T[, D])."""
        if self.vocab_size:
            return torch.zeros(n, self.seq_len, dtype=torch.long, device=device)
        return torch.zeros(n, self.seq_len, self.token_dim, device=device)

    @torch.no_grad()
    def beam_search(self, cond, beam=4, fan=8, temperature=1.0, **tricks):
        """cond as in prefix() -> tokens (B, T[, D]) of high probability, log p(tokens | cond) in nats (B,).

        Each of `beam` sequences draws `fan` next tokens; of all candidates the `beam` likeliest go on (GIVT section 4.3).
        The score is the model's own log p, whatever temperature and tricks drew the candidates. T steps: the authors' code
        makes one more and ranks the beams by a token that does not exist (47% of their results change by it).
        """
        B, T, device = len(cond), self.seq_len, cond.device
        if not 1 <= beam <= fan:
            raise ValueError(f"beam {beam} must be 1 to fan {fan}: at first there is one sequence to fan out")
        first = torch.arange(B, device=device)[:, None] * beam                              # (B, 1)
        tokens = self.blank(B * beam, device)
        total = torch.where(torch.arange(beam, device=device) == 0, 0.0, -math.inf).repeat(B, 1)   # first only one is real
        cond = cond.repeat_interleave(beam, 0)
        x, keep = self.prefix(cond), self.keep(cond)
        caches = self.caches(x)
        for t in range(T):
            h = self.run(x, self.n_prefix + t - 1 if t else 0, caches, keep)[:, -1]
            h = h[:, None].expand(-1, fan, -1)                                              # (B beam, fan, C)
            new, _ = self.head.sample(h, temperature=temperature, **tricks)                 # (B beam, fan[, D])
            log_p = -self.head.loss(h, new)                                                 # (B beam, fan)
            same = (new[:, :, None] == new[:, None]).flatten(3).all(-1) if new.ndim > 2 else new[:, :, None] == new[:, None]
            log_p = log_p.masked_fill(same.tril(-1).any(-1), -math.inf)                     # an id drawn twice counts once
            total, best = (total[..., None] + log_p.view(B, beam, fan)).flatten(1).topk(beam)                   # (B, beam)
            parent = (first + best // fan).flatten()
            tokens, caches = tokens[parent], [cache[:, parent] for cache in caches]
            tokens[:, t] = new.flatten(0, 1)[parent * fan + (best % fan).flatten()]
            x = self.embed(tokens[:, t:t + 1], self.row[self.n_prefix + t:][:1])
        return tokens[first[:, 0]], total[:, 0]             # topk sorts: the first is the best

    @classmethod
    def from_official(cls, state_dict, n_head=None, grid=(16, 16)):
        """LlamaGen's class- or text-conditional GPT, or Open-MAGVIT2's: a state dict or a path -> ARTransformer in eval mode,
        head included.

        Reads "ema", else "model" (their DDP files), else a plain dict (FSDP). The sizes are read off the shapes, which do
        not tell n_head (None: that of n_embd in SIZES) and grid, (16, 16) for 256 pixels, (24, 24) for 384. Labels are in
        torchvision's order of ImageNet; captions are FLAN-T5-XL's features (B, 120, 2048). Of Open-MAGVIT2's files, which
        hold the tokenizer too (for LFQ.from_official), "transformer." is read. Refuses unknown or missing keys by name.
        """
        if not isinstance(state_dict, dict):
            state_dict = load_weights(state_dict)
        sd = next((state_dict[k] for k in ("ema", "model", "module", "state_dict") if k in state_dict), state_dict)
        sd = {k.removeprefix("module.").removeprefix("_orig_mod."): v for k, v in sd.items()}
        if any("factorized_blocks." in k for k in sd):
            return cls.from_open_magvit2(sd, n_head, grid)
        conds = ("cls_embedding.embedding_table.weight", "cls_embedding.uncond_embedding")
        kind = conds[conds[1] in sd]
        need = ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight", kind)
        if lost := [k for k in need if k not in sd]:
            raise ValueError(f"not the weights of a LlamaGen GPT: missing {lost}; the keys begin with {list(sd)[:3]}")
        (V, C), hidden = sd[need[0]].shape, len(sd[need[1]])
        n_layer = len({k.split(".")[1] for k in sd if k.startswith("layers.")})
        text = tuple(sd[kind].shape) if kind == conds[1] else None
        model = cls(CategoricalHead(C, V), math.prod(grid), 1 if text else len(sd[kind]) - 1, vocab_size=V, grid=grid,
                    n_layer=n_layer, n_head=heads_of(C, n_head), n_embd=C, text=text, multiple_of=hidden, zero_prefix=True)
        return load_official(model, sd, LLAMAGEN, "LlamaGen's GPT")

    @classmethod
    def from_open_magvit2(cls, sd, n_head=None, grid=(16, 16)):
        """What from_official does with Open-MAGVIT2's GPT: their "pre" is the low bits of our ids, their "post" the high."""
        sd = {k.removeprefix("transformer."): v for k, v in sd.items() if k.startswith("transformer.")} or sd
        need = [f"{name}.weight" for name in ("pre_emb", "post_emb", "class_emb.embedding_table", "spatial_blocks.0.feed_forward.w1")]
        if lost := [k for k in need if k not in sd]:
            raise ValueError(f"not the weights of Open-MAGVIT2's GPT: missing {lost}; the keys begin with {list(sd)[:3]}")
        (pre, C), (post, _), classes, hidden = sd[need[0]].shape, sd[need[1]].shape, len(sd[need[2]]), len(sd[need[3]])
        depth = lambda start: len({k.split(".")[1] for k in sd if k.startswith(start)})
        size = dict(n_head=heads_of(C, n_head), multiple_of=hidden, zero_prefix=True)
        split = pre.bit_length() - 1, post.bit_length() - 1
        head = SubTokenHead(C, pre * post, split, depth("factorized_blocks."), **size)
        model = cls(head, math.prod(grid), classes - 1, vocab_size=pre * post, grid=grid, n_layer=depth("spatial_blocks."),
                    n_embd=C, **size)
        return load_official(model, sd, OPEN_MAGVIT2, "Open-MAGVIT2's GPT")


LLAMAGEN = (("tok_embed", "tok_embeddings"), ("cls_embed", "cls_embedding.embedding_table"),        # our names, theirs
            ("caption.none", "cls_embedding.uncond_embedding"), ("caption.", "cls_embedding.cap_proj."),
            ("blocks.", "layers."), ("norm1", "attention_norm"), ("norm2", "ffn_norm"),
            (".attn.", ".attention."), (".mlp.", ".feed_forward."), ("head.proj", "output"))
OPEN_MAGVIT2 = (("cls_embed", "class_emb.embedding_table"), ("blocks.", "spatial_blocks."), ("head.spatial", "factorized"),
                ("norm1", "attention_norm"), ("norm2", "ffn_norm"), (".attn.", ".attention."), (".mlp.", ".feed_forward."),
                ("head.embeds.0", "pre_emb"), ("head.embeds.1", "post_emb"), ("head.norm", "norm"), ("heads.", ""), (".proj", ""))


def official_name(key, names=LLAMAGEN):
    """Our name of a weight -> the authors'."""
    for ours, theirs in names:
        key = key.replace(ours, theirs)
    return key


def heads_of(n_embd, n_head=None):
    """n_head if it is given, else that of the published size: the shapes of the weights do not tell."""
    n_head = n_head or next((s["n_head"] for s in SIZES.values() if s["n_embd"] == n_embd), None)
    if n_head is None:
        raise ValueError(f"n_embd {n_embd} is none of the published sizes: say n_head=")
    return n_head


def load_official(model, sd, names, whose):
    """The model in eval mode with the weights sd, renamed. Refuses unknown or missing keys by name."""
    ours = {official_name(k, names): k for k in model.state_dict()}
    missing, unknown = ([k for k in a if k not in b] for a, b in ((ours, sd), (sd, ours)))
    if missing or unknown:
        raise ValueError(f"the weights do not fit {whose}: missing {missing[:3]}, unknown {unknown[:3]}")
    model.load_state_dict({ours[k]: v.float() for k, v in sd.items()})
    return model.eval()


def load_weights(path):
    """A .pt, .pth, .ckpt or .safetensors file -> state dict on the CPU. Never runs code from the file."""
    if str(path).endswith(".safetensors"):
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError(f"{path} needs the optional package safetensors: pip install safetensors") from None
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


# ---------------------------------------------------------------------------------------------------
# Export: the same network as a Hugging Face LlamaForCausalLM, for other people's fast servers

MODELING = '''"""LlamaGen for transformers: Llama with a table of rotary angles. Written by ar_transformer.py."""
import torch
from torch import nn
from transformers import LlamaForCausalLM


class RotaryTable(nn.Module):
    def __init__(self, config):
        super().__init__()
        shape = config.max_position_embeddings, config.head_dim
        self.register_buffer("cos", torch.ones(shape))      # the values lie in model.safetensors
        self.register_buffer("sin", torch.zeros(shape))

    def forward(self, x, position_ids):                     # (B, S) -> cos, sin (B, S, head_dim)
        return self.cos[position_ids].to(x.dtype), self.sin[position_ids].to(x.dtype)


class LlamaGenForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.rotary_emb = RotaryTable(config)
'''


def to_llama(model):
    """A model of ids and classes -> config, generation config, weights of transformers' LlamaForCausalLM with equal logits.

    Class c becomes the id V + c in front of the tokens, "no class" the id V + num_classes; their logits are 0 and must be
    banned, as the generation config does. transformers turns the halves of a head against each other, we turn neighbours:
    the rows of q and k change places. One axis of positions is stock Llama. A grid or zero_prefix needs MODELING, which
    looks the angles up; "architectures" names it, since stock Llama would read such a folder with wrong angles.
    """
    if not isinstance(model.tok_embed, nn.Embedding) or not hasattr(model, "cls_embed") or model.pos_embed is not None:
        raise ValueError("Llama can hold a model of ids (in one softmax) and classes without learned places, not this one")
    C, (hidden, _), rows = model.tok_embed.embedding_dim, model.blocks[0].mlp.w1.weight.shape, len(model.row)
    classes, V, hd = model.num_classes + 1, model.vocab_size, C // model.n_head
    halves = lambda w: w.view(model.n_head, hd // 2, 2, C).transpose(1, 2).reshape(C, C)    # 2k, 2k + 1 -> k, k + hd / 2
    sd = {"model.embed_tokens.weight": torch.cat([model.tok_embed.weight, model.cls_embed.weight]),
          "model.norm.weight": model.norm.weight, "lm_head.weight": F.pad(model.head.proj.weight, (0, 0, 0, classes))}
    for i, block in enumerate(model.blocks):
        q, k, v = block.attn.wqkv.weight.chunk(3)
        parts = {"self_attn.q_proj": halves(q), "self_attn.k_proj": halves(k), "self_attn.v_proj": v,
                 "self_attn.o_proj": block.attn.wo.weight, "mlp.gate_proj": block.mlp.w1.weight,
                 "mlp.up_proj": block.mlp.w3.weight, "mlp.down_proj": block.mlp.w2.weight,
                 "input_layernorm": block.norm1.weight, "post_attention_layernorm": block.norm2.weight}
        sd |= {f"model.layers.{i}.{name}.weight": w for name, w in parts.items()}
    nothing = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=V + classes, hidden_size=C,
                  intermediate_size=hidden, num_hidden_layers=len(model.blocks), num_attention_heads=model.n_head,
                  num_key_value_heads=model.n_head, head_dim=hd, rms_norm_eps=model.norm.eps, rope_theta=model.rope_base,
                  rope_parameters=dict(rope_type="default", rope_theta=model.rope_base), max_position_embeddings=rows,
                  tie_word_embeddings=False, torch_dtype="float32", num_image_tokens=V, **nothing)
    if len(model.grid) > 1 or (model.rope[0] == 0).all():
        cos, sin = model.rope.unbind(-1)                                                    # (P + T, head_dim / 2)
        sd |= {"model.rotary_emb.cos": torch.cat([cos, cos], 1), "model.rotary_emb.sin": torch.cat([sin, sin], 1)}
        config |= dict(architectures=["LlamaGenForCausalLM"],
                       auto_map={"AutoModelForCausalLM": "modeling_llamagen.LlamaGenForCausalLM"})
    generation = dict(max_new_tokens=model.seq_len, min_new_tokens=model.seq_len, do_sample=True, top_k=0,
                      suppress_tokens=list(range(V, V + classes)), **nothing)
    return config, generation, {k: v.detach().contiguous() for k, v in sd.items()}


def load_for_export(source, grid=None, n_head=None):
    """A run folder of train.py, or a file of LlamaGen's -> ARTransformer in eval mode. grid as in from_official."""
    if not Path(source).is_dir():
        return ARTransformer.from_official(source, n_head, grid or (16, 16))
    checkpoint = torch.load(Path(source) / "ckpt.pt", map_location="cpu", weights_only=True)
    flags, grid = checkpoint["flags"], grid or checkpoint.get("grid")
    sd = {k.removeprefix("module."): v for k, v in checkpoint["ema"].items() if k.startswith("module.")}
    wanted = flags.get("generator") == "ar" and flags.get("head") == "categorical" and "cls_embed.weight" in sd
    if not wanted or "tok_embed.weight" not in sd:
        raise ValueError(f"{source}: not a run of --generator ar --head categorical (whole, not in groups) that draws images of "
                         "classes")
    if grid is None:
        raise ValueError(f"{source}: say --grid ROWS COLUMNS, that of the tokens: the weights do not tell")
    (V, C), classes = sd["tok_embed.weight"].shape, len(sd["cls_embed.weight"]) - 1
    model = ARTransformer(CategoricalHead(C, V), math.prod(grid), classes, vocab_size=V, grid=grid, **SIZES[flags["size"]])
    model.load_state_dict(sd)
    return model.eval()


def export(source, out, grid=None, n_head=None):
    """Write the folder that transformers' from_pretrained(out) reads (a grid: with trust_remote_code=True)."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ValueError("export needs the optional package safetensors: pip install safetensors") from None
    config, generation, weights = to_llama(load_for_export(source, grid, n_head))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (out / "generation_config.json").write_text(json.dumps(generation) + "\n")
    if "auto_map" in config:
        (out / "modeling_llamagen.py").write_text(MODELING)


# ---------------------------------------------------------------------------------------------------
# Demo: two worlds of ids. Bars-and-stripes has exactly 30 pictures of 4 x 4: to the best possible model one of them costs
# ln 30 = 3.401 nats, and 0 if words tell which. Small drawn shapes in four greys show sampling and surprise.

def bars_and_stripes(n, device, side=4):
    """n pictures uniform over the 2 (2^side - 1) distinct ones with full rows or full columns -> (n, side^2) int64."""
    bits = torch.arange(1 << side, device=device)[:, None] >> torch.arange(side, device=device) & 1
    rows = bits[:, :, None].expand(-1, -1, side)
    all_ = torch.cat([rows, rows.transpose(1, 2)[1:-1]]).flatten(1)                         # blank and full only once
    return all_[torch.randint(len(all_), (n,), device=device)]


def captions_of(pictures, side=4):
    """Bars or stripes (N, side^2) -> what they show, in words: "rows 1 and 3 dark"."""
    texts = []
    for dark in (pictures == 0).view(-1, side, side):
        rows = bool((dark == dark[:, :1]).all())
        which = [str(i + 1) for i, line in enumerate(dark if rows else dark.T) if line.all()]
        name = ("row" if rows else "column") + "s" * (len(which) > 1)
        listed = " and ".join(p for p in (", ".join(which[:-1]), *which[-1:]) if p)
        texts.append("all dark" if dark.all() else "all light" if not dark.any() else f"{name} {listed} dark")
    return texts


def fit_ids(model, batches, steps, lr=2e-3):
    """Train on batches(step) -> tokens, labels; returns the losses."""
    opt, losses = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05), []
    for step in range(steps):
        opt.param_groups[0]["lr"] = lr * min(1, (step + 1) / 30) * (1 - step / steps)
        loss, _ = model(*batches(step))
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        losses.append(loss.item())
    return losses


def read_captions(device, steps=900):
    """Train on bars-and-stripes with captions, half of them hidden -> model, curve [(step, nats told, nats untold)]."""
    pictures = bars_and_stripes(2000, device).unique(dim=0).repeat(2, 1)                    # (60, 16): all there are, twice
    cond, curve = bytes_of(captions_of(pictures), 23).to(device), []
    model = ARTransformer(CategoricalHead(64, 2), 16, 1, vocab_size=2, n_layer=2, n_head=2, n_embd=64, text=(23, "bytes"),
                          label_drop=0.5).to(device)

    def batch(step):
        if step % 20 == 0:
            with torch.no_grad():
                hide = torch.arange(60, device=device) >= 30
                nats = model.head.loss(model.hidden(pictures, cond, hide), pictures).sum(1).view(2, 30).mean(1)
            curve.append((step, *nats.tolist()))
        i = torch.randint(30, (32,), device=device)
        return pictures[i], cond[i]
    fit_ids(model, batch, steps, 5e-3)
    batch(steps)
    return model.eval(), curve


def main():
    parser = argparse.ArgumentParser(description="A causal transformer on bars-and-stripes and on little drawn shapes.")
    parser.add_argument("--image_size", type=int, default=10, help="side of the little drawn shapes, in pixels")
    parser.add_argument("--steps", type=int, default=400, help="training steps on the drawn shapes")
    commands = parser.add_subparsers(dest="command", title="other uses")
    e = commands.add_parser("export", help="write a folder that Hugging Face's transformers reads, instead of the demo")
    e.add_argument("source", help="a run folder of --generator ar --head categorical, or a file of LlamaGen's weights")
    e.add_argument("out", help="the folder to write: config.json, model.safetensors")
    e.add_argument("--grid", type=int, nargs="+", help="rows and columns of tokens (default: 16 16 for LlamaGen's files)")
    e.add_argument("--n_head", type=int, help="attention heads of a LlamaGen file that is none of the published sizes")
    args = parser.parse_args()
    if args.command == "export":
        try:
            return export(args.source, args.out, args.grid, args.n_head)
        except (ValueError, OSError) as error:
            parser.error(str(error))
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import data
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    start = time.perf_counter()
    bars, curve = read_captions(device)
    print(f"bars-and-stripes: {curve[-1][2]:.3f} nats per picture (the least is ln 30 = {math.log(30):.3f}), given its "
          f"caption {curve[-1][1]:.3f} (the least is 0); {time.perf_counter() - start:.0f} s")
    texts = ["rows 1 and 3 dark", "column 4 dark", "columns 1 and 4 dark"]
    drawn = torch.cat([bars.sample(bytes_of(texts, 23).to(device), cfg=s) for s in (1.0, 0.0)])      # cfg 0 leaves p(x)

    side, levels = args.image_size, 4
    images, labels, _, _ = data.draw(torch.arange(8000, device=device), side)
    greys = ((images.amax(1) + 1) / 2 * levels).long().clamp(0, levels - 1).flatten(1)      # (N, side^2) ids
    model = ARTransformer(CategoricalHead(96, levels), side * side, 10, vocab_size=levels, n_layer=3, n_head=3, n_embd=96)
    model = model.to(device)
    pick = lambda step: torch.randint(8000, (32,), device=device)
    start = time.perf_counter()
    losses = fit_ids(model, lambda step: (lambda i: (greys[i], labels[i]))(pick(step)), args.steps)
    print(f"drawn shapes in {levels} greys: {losses[-1]:.3f} nats per pixel after {time.perf_counter() - start:.0f} s "
          f"(uniform guessing: ln {levels} = {math.log(levels):.3f})")
    model.eval()
    cond, stages = torch.arange(10, device=device), []
    for use_cache in (False, True):
        torch.manual_seed(1)
        start = time.perf_counter()
        model.sample(cond, cfg=2.0, use_cache=use_cache)
        print(f"10 samples of {side * side} tokens with guidance, {'KV cache' if use_cache else 'no cache'}: "
              f"{time.perf_counter() - start:.2f} s")
    keep = {round(side * side * f) - 1 for f in (0.25, 0.5, 0.75, 1)}
    torch.manual_seed(1)
    model.sample(cond, cfg=2.0, on_step=lambda t, x, unknown:
                 stages.append(torch.where(unknown, -1, x).clone()) if t in keep else None)
    real = greys[[int((labels == k).nonzero()[0]) for k in range(10)]]                      # one picture of each class
    with torch.no_grad():
        surprise = model.head.loss(model.hidden(real, cond), real)                          # (10, T) nats

    fig = plt.figure(figsize=(12.5, 7))
    left, right = fig.add_gridspec(1, 2, width_ratios=[2, 1], left=0.145, right=0.98, top=0.9, bottom=0.05, wspace=0.17)
    rows = left.subgridspec(6, 10, wspace=0.08, hspace=0.08)
    maps = [(f"{p}% of the tokens", s, "gray") for p, s in zip((25, 50, 75, 100), stages)]
    maps += [("a training picture", real, "gray"), ("its surprise, token by token", surprise, "magma")]
    for r, (text, values, cmap) in enumerate(maps):
        for c in range(10):
            ax = fig.add_subplot(rows[r, c])
            shown = values[c].view(side, side).float().cpu()
            ax.imshow(shown.masked_fill(shown < 0, torch.nan), cmap=cmap, vmin=0, vmax=3 if cmap == "gray" else 2)
            ax.set(xticks=[], yticks=[], facecolor="#b9d4ee")
            if r == 0:
                ax.set_title(data.SHAPES[c], fontsize=8)
            if c == 0:
                ax.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)
    upper, lower = right.subgridspec(2, 1, height_ratios=[1, 0.95], hspace=0.32)
    ax, (steps, with_caption, without) = fig.add_subplot(upper), zip(*curve)
    ax.plot(steps, without, label="no caption")
    ax.plot(steps, with_caption, label="given its caption")
    ax.axhline(math.log(30), color="k", ls="--", lw=1, label="least possible: ln 30, and 0")
    ax.axhline(0, color="k", ls="--", lw=1)
    ax.set(xlabel="training step", ylabel="nats per picture", title="bars-and-stripes 4 x 4")
    ax.legend(fontsize=9)
    for i, cell in enumerate(lower.subgridspec(2, 3, wspace=0.25, hspace=0.3)):
        ax = fig.add_subplot(cell)
        ax.imshow(drawn[i].view(4, 4).cpu(), cmap="gray", vmin=-0.3, vmax=1.1)
        ax.set(xticks=[], yticks=[])
        ax.set_title((texts + ["no caption"] * 3)[i], fontsize=8)
    fig.suptitle("ar_transformer.py: an image is written token by token; surprise is high where the shape decides itself; "
                 "words can tell it all")
    fig.savefig("ar_transformer.png", dpi=80)
    print("wrote ar_transformer.png")


if __name__ == "__main__":
    main()
