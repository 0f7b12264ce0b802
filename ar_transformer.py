"""
A causal Llama-style transformer that writes an image token by token.

An image becomes a sequence by reading its grid of tokens row by row. The chain rule is then exact,

    p(x_1 ... x_T | c) = prod_t p(x_t | c, x_1 ... x_{t-1}),

and a causal transformer computes all T factors in one pass. With ids and a softmax this is LlamaGen (Sun et
al. 2024, arxiv.org/abs/2406.06525). With real vectors and a Gaussian mixture it follows GIVT-Causal
(arxiv.org/abs/2312.02116), whose own blocks are plain ones: here they are Llama's for both. The condition c
stands in front as P tokens, one for a class, more for a caption. While sampling, a cache keeps every earlier
key and value, so that a new token costs one row and not T.

Shapes:  B batch, T tokens, D numbers in a token or V ids, C width (n_embd), P prefix tokens, S = P + T - 1

    cond (B,) | caption --embed--> (B, P, C) --cat--> (B, S, C) --Blocks--> h (B, T, C) --head--> p(x_t)
    tokens (B, T[, D]) --embed--> (B, T - 1, C) --^               (position t predicts token t)

    python ar_transformer.py   # words, samples, surprise; writes ar_transformer.png; about 50 s on a CPU

Try it yourself:
  1. Let the model see the future: causal=False in Attention. The loss falls to nothing. What do samples look
     like?
  2. Set label_drop=0 in read_captions. What does the model say of pictures without a caption, and why?
  3. Sample with use_cache=False and time it against the default for --image_size 8 and 16.
"""
import argparse
import math
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

SIZES = {
    "nano": dict(n_layer=4, n_head=2, n_embd=64),
    "tiny": dict(n_layer=4, n_head=4, n_embd=128),                                    # the default on a CPU
    "small": dict(n_layer=6, n_head=4, n_embd=192),                                   # with a diffusion head
    "medium": dict(n_layer=12, n_head=6, n_embd=384),                                 # the default on a GPU
    "gpt-b": dict(n_layer=12, n_head=12, n_embd=768, multiple_of=256),              # LlamaGen's, trained with
    "gpt-l": dict(n_layer=24, n_head=16, n_embd=1024, multiple_of=256),               # dropout=0.1
    "gpt-xl": dict(n_layer=36, n_head=20, n_embd=1280, multiple_of=256),
    "gpt-xxl": dict(n_layer=48, n_head=24, n_embd=1536, multiple_of=256),
    "gpt-3b": dict(n_layer=24, n_head=32, n_embd=3200, multiple_of=256),
}


# ---- The transformer ------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32. (Zhang & Sennrich 2019, arxiv.org/abs/1910.07467)"""

    def __init__(self, n_embd, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n_embd))

    def forward(self, x):                                   # (..., C) -> (..., C)
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return y.type_as(x) * self.weight


def rope_table(grid, head_dim, prefix, base=10000.0):
    """Rotary angles for a prefix and a grid of tokens -> cos and sin (P + T, head_dim / 2, 2).

    The head_dim / 2 pairs are shared out among the axes of the grid. For (rows, columns) the first half turns
    with the row and the second with the column (LlamaGen). Prefix tokens stand at the origin of every axis
    and do not turn. On one axis (T,) the prefix is counted too, positions 0 .. P + T - 1, as in any language
    model.
    """
    n_axes = len(grid)
    if n_axes == 1:
        positions = torch.arange(prefix + grid[0]).float().unsqueeze(1)
    else:
        positions = torch.cartesian_prod(*[torch.arange(n).float() for n in grid])
        positions = torch.cat([torch.zeros(prefix, n_axes), positions])               # (P + T, n_axes)
    angles = []
    for axis in range(n_axes):
        n_pairs = head_dim // 2 // n_axes + (axis < head_dim // 2 % n_axes)
        angles.append(positions[:, axis:axis + 1] * base ** (-torch.arange(n_pairs) / n_pairs))
    angles = torch.cat(angles, dim=1)                                                 # (P + T, head_dim / 2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(x, rope):
    """Turn each pair (x_2k, x_2k+1) by its angle: x (B, S, n_head, head_dim), rope (S, head_dim / 2, 2) ->
    like x.

    (a, b) -> (a cos - b sin, b cos + a sin). The product q . k then depends on the difference of positions
    only. (RoPE, Su et al. 2021, arxiv.org/abs/2104.09864)
    """
    pairs = x.float().unflatten(-1, (-1, 2))                # (B, S, n_head, head_dim / 2, 2)
    if torch.compiler.is_compiling():                       # which makes one kernel of real numbers only
        a, b = pairs.unbind(-1)
        cos, sin = rope[:, None].unbind(-1)                                           # (S, 1, head_dim / 2)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1)
    else:                                                   # (a + ib)(cos + i sin): a third of the time
        turns = torch.view_as_complex(rope.float())[:, None]                          # (S, 1, head_dim / 2)
        turned = torch.view_as_real(torch.view_as_complex(pairs) * turns)
    return turned.flatten(-2).type_as(x)


def attention(q, k, v, mask=None, causal=False, dropout=0.0):
    """softmax(q k^T / sqrt(d)) v: q, k, v (B, n_head, S, d), mask True where attended -> (B, n_head, S, d).

    PyTorch's fused kernel computes it, except when training in bfloat16 on a CPU: there the backward pass of
    that kernel takes 4 to 15 times as long as the formula (torch 2.13, S from 17 to 65).
    """
    if q.dtype != torch.bfloat16 or q.device.type != "cpu" or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    score = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)                           # (B, n_head, S, S)
    if causal:
        mask = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:                                    # to add needs no pass of its own backwards
        score = score + torch.where(mask, 0.0, -math.inf).type_as(score)
    return F.dropout(score.softmax(-1, dtype=torch.float32), dropout).type_as(v) @ v


class Attention(nn.Module):
    """Causal self-attention with rotary positions and an optional cache of keys and values."""

    def __init__(self, n_embd, n_head, dropout=0.0):
        super().__init__()
        self.n_head = n_head
        self.dropout = nn.Dropout(dropout)
        self.wqkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.wo = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x, rope, mask=None, cache=None, positions=None):
        """x (B, S, C) -> (B, S, C). mask: bool, broadcast to (B, n_head, S, keys), True where attended; None:
        causal.

        wqkv gives queries, keys, values, each n_head * head_dim wide. rotate() turns queries and keys. Then
        softmax(q k^T / sqrt(head_dim)) v per head, and wo. (Vaswani et al. 2017, section 3.2)

        With cache (2, B, n_head, keys, head_dim), x holds the rows at positions (S,) of a longer sequence.
        Their keys and values are written into the cache, and all of the cache is attended to, as far as the
        mask allows.
        """
        B, S, C = x.shape
        qkv = self.wqkv(x).view(B, S, 3 * self.n_head, C // self.n_head)           # q heads, k heads, v heads
        # (B, n_head, S, head_dim)
        q, k = rotate(qkv[:, :, :2 * self.n_head], rope).transpose(1, 2).chunk(2, 1)
        v = qkv[:, :, 2 * self.n_head:].transpose(1, 2)
        if cache is not None:
            cache[0].index_copy_(2, positions, k.type_as(cache))
            cache[1].index_copy_(2, positions, v.type_as(cache))
            k, v = cache.type_as(q)
        y = attention(q, k, v, mask, causal=mask is None and S > 1)
        return self.dropout(self.wo(y.transpose(1, 2).reshape(B, S, C)))


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x), two thirds of the usual 4C wide, so that it costs the same as a plain MLP."""

    def __init__(self, n_embd, dropout=0.0, multiple_of=64):
        super().__init__()
        width = -(-int(8 * n_embd / 3) // multiple_of) * multiple_of
        self.w1 = nn.Linear(n_embd, width, bias=False)
        self.w3 = nn.Linear(n_embd, width, bias=False)
        self.w2 = nn.Linear(width, n_embd, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):                                   # (..., C) -> (..., C)
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    """Pre-norm transformer block of Llama."""

    def __init__(self, n_embd, n_head, dropout=0.0, multiple_of=64):
        super().__init__()
        self.norm1 = RMSNorm(n_embd)
        self.attn = Attention(n_embd, n_head, dropout)
        self.norm2 = RMSNorm(n_embd)
        self.mlp = SwiGLU(n_embd, dropout, multiple_of)

    def forward(self, x, rope, mask=None, cache=None, positions=None):                # (B, S, C) -> (B, S, C)
        x = x + self.attn(self.norm1(x), rope, mask, cache, positions)
        return x + self.mlp(self.norm2(x))


class CategoricalHead(nn.Module):
    """p(id | h), a softmax over the vocabulary. It starts at zero, so the first loss is exactly ln V."""

    def __init__(self, n_embd, vocab_size):
        super().__init__()
        self.proj = nn.Linear(n_embd, vocab_size, bias=False)
        nn.init.zeros_(self.proj.weight)

    def logits(self, h):
        return self.proj(h).float()                                                   # (..., V)

    def argmax(self, h):
        return self.logits(h).argmax(-1)                                              # (...) int64

    def loss(self, h, x, smoothing=0.0):
        """Cross-entropy in nats per token, not reduced: h (..., C), x (...) int64 -> (...)."""
        logits = self.logits(h).flatten(0, -2)
        loss = F.cross_entropy(logits, x.flatten(), reduction="none", label_smoothing=smoothing)
        return loss.view(x.shape)

    @torch.no_grad()
    def sample(self, h, h_uncond=None, cfg=1.0, temperature=1.0, top_k=0, top_p=1.0):
        """Draw one id per position: h (..., C) -> ids (...) int64, their log p (...) as they were drawn.

        Guidance takes the logits from the unconditional u past the conditional c: u + cfg (c - u). Then they
        are divided by temperature, and last come top_k and top_p, see truncate().
        """
        if h_uncond is not None:
            h = h_uncond + cfg * (h - h_uncond)             # proj is linear, so this mixes the logits
        logits = truncate(self.logits(h) / max(temperature, 1e-5), top_k, top_p)
        ids = draw_ids(logits.softmax(-1))
        return ids, logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


# ---- The model ------------------------------------------------------------------------------------

class ARTransformer(nn.Module):
    """p(tokens | cond) for tokens in raster order. Give vocab_size for ids or token_dim for real vectors.

    cond is a class (B,), or
      text = (P, E)           captions (B, P, E): features of a text encoder, zeros in front. Causal.
      text = (P, "bytes")     captions (B, P): their bytes, see bytes_of(). Four of them make a prefix token.
      prefix = (P, E)         P vectors (B, P, E), the tokens of another image. They see each other both ways.
    learned_positions: on top of RoPE. None: for real vectors (GIVT), not for ids (LlamaGen).
    multiple_of: the width of the MLP is rounded up to it.
    """

    def __init__(self, head, seq_len, num_classes, token_dim=None, vocab_size=None, grid=None, n_layer=6,
                 n_head=4, n_embd=192, dropout=0.0, label_drop=0.1, rope_base=10000.0, prefix=None, text=None,
                 learned_positions=None, multiple_of=64):
        super().__init__()
        side = math.isqrt(seq_len)
        grid = tuple(grid or ((side, side) if side * side == seq_len else (seq_len,)))
        if math.prod(grid) != seq_len:
            raise ValueError(f"grid {grid} holds {math.prod(grid)} tokens, not seq_len = {seq_len}")
        if n_embd % n_head or n_embd // n_head % 2:
            raise ValueError(f"n_embd {n_embd} over n_head {n_head} must be an even head width")
        if prefix and text:
            raise ValueError("prefix and text: the condition is one of them")
        self.seq_len = seq_len
        self.num_classes = num_classes
        self.token_dim = token_dim
        self.vocab_size = vocab_size
        self.grid = grid
        self.n_head = n_head
        self.label_drop = label_drop
        self.rope_base = rope_base
        self.caption = CaptionEmbedder(*text, n_embd) if text else None
        self.n_prefix = self.caption.n_rows if text else (prefix or [1])[0]
        self.causal_only = not prefix and not text          # then no attention mask is needed
        self.static_caches = None

        if token_dim:
            self.tok_embed = nn.Linear(token_dim, n_embd)
        elif not hasattr(head, "embed"):                    # lfq.FactorizedHead embeds its ids itself
            self.tok_embed = nn.Embedding(vocab_size, n_embd)
        if prefix:
            self.pre_embed = nn.Linear(prefix[1], n_embd)
            self.pre_pos = nn.Parameter(torch.zeros(self.n_prefix, n_embd))
            if label_drop > 0:
                self.pre_none = nn.Parameter(torch.zeros(n_embd))                 # each vector of "no prefix"
        elif not text:
            self.cls_embed = nn.Embedding(num_classes + 1, n_embd)                    # last row: "no class"
        self.pos_embed = None
        if learned_positions or (learned_positions is None and token_dim):
            self.pos_embed = nn.Parameter(torch.zeros(seq_len, n_embd))
        self.blocks = nn.ModuleList([Block(n_embd, n_head, dropout, multiple_of) for _ in range(n_layer)])
        self.norm = RMSNorm(n_embd)
        self.dropout = nn.Dropout(dropout)
        rope = rope_table(grid, n_embd // n_head, self.n_prefix, rope_base)
        positions = torch.arange(self.n_prefix + seq_len)
        visible = (positions <= positions[:, None]) | (positions < (self.n_prefix if prefix else 0))
        self.register_buffer("rope", rope, persistent=False)
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("visible", visible, persistent=False)           # (P + T, P + T): row sees column
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and not name.startswith("caption."):
                nn.init.normal_(module.weight, std=0.02)
        for p in self.parameters(recurse=False):            # the learned positions
            nn.init.normal_(p, std=0.02)
        self.head = head                                    # last, so that it keeps its own initialisation

    # Conditions and masks

    def embed(self, tokens, positions=None):
        """tokens (B, n[, D]) -> (B, n, C). positions (n,): their rows, with the prefix; None: the first n
        tokens.
        """
        embed = self.head.embed if hasattr(self.head, "embed") else self.tok_embed
        x = embed(tokens)
        if self.pos_embed is None:
            return x
        if positions is None:
            return x + self.pos_embed[:x.shape[1]]
        return x + self.pos_embed[positions - self.n_prefix]

    def prefix(self, cond, drop=None):
        """cond as in the class, labels (B,) int64 with num_classes for "no class" -> (B, P, C).

        drop (B,) bool: True where the condition is left out.
        """
        if self.caption is not None:
            return self.caption(cond, drop)
        if cond.ndim == 1:
            if drop is not None:
                cond = torch.where(drop, self.num_classes, cond)
            return self.cls_embed(cond)[:, None]
        x = self.pre_embed(cond)
        if drop is not None:
            if not hasattr(self, "pre_none"):
                raise ValueError(
                    "this model, trained with label_drop 0, knows no image without a prefix: use cfg=1"
                )
            x = torch.where(drop[:, None, None], self.pre_none.type_as(x), x)
        return x + self.pre_pos

    def padding_mask(self, cond, drop=None):
        """Which rows of each sequence are no padding -> (B, P + T) bool, or None where there is no
        padding.
        """
        if self.caption is None:
            return None
        return F.pad(self.caption.padding_mask(cond, drop), (0, self.seq_len), value=True)

    def attention_mask(self, positions, n_keys, padding_mask=None):
        """Rows at positions (S,), keys 0 .. n_keys - 1 -> bool (S, n_keys), or with padding (B, 1, S,
        n_keys).

        A row of padding attends to itself: a softmax over nothing would be nan.
        """
        visible = self.visible[positions, :n_keys]
        if padding_mask is None:
            return visible
        itself = positions[:, None] == self.positions[:n_keys]
        return (visible & padding_mask[:, None, :n_keys] | itself)[:, None]

    # Training

    def forward_blocks(self, x, start=0, caches=None, padding_mask=None):
        """Rows x (B, S, C) at positions start .. start + S - 1 -> h (B, S, C).

        With caches, S = 1 or start = 0, and the earlier rows are in there. Only the filled part of a cache is
        attended to, so its view grows (see decode_step).
        """
        S = x.shape[1]
        end = start + S
        positions = self.positions[start:end]
        mask = None
        if not self.causal_only and (S > 1 or padding_mask is not None):
            mask = self.attention_mask(positions, end, padding_mask)
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i][:, :, :, :end]
            x = block(x, self.rope[start:end], mask, cache, positions)
        return self.norm(x)

    def hidden_states(self, tokens, cond, drop=None):
        """tokens (B, T[, D]), cond as in prefix() -> h (B, T, C). h[:, t] has seen cond and the tokens before
        t only.

        forward_blocks() reads prefix(cond, drop), then embed() of the tokens but the last one; rows that
        padding_mask() names are not attended to. (Teacher forcing: LlamaGen section 3.2)
        """
        x = torch.cat([self.prefix(cond, drop), self.embed(tokens[:, :-1])], 1)       # (B, P + T - 1, C)
        h = self.forward_blocks(self.dropout(x), padding_mask=self.padding_mask(cond, drop))
        return h[:, self.n_prefix - 1:]

    def logits(self, tokens, cond):
        """tokens (B, T) int64, cond as in prefix() -> (B, T, V). Position t predicts token t. For a
        categorical head.
        """
        return self.head.logits(self.hidden_states(tokens, cond))

    def forward(self, tokens, cond):
        """tokens (B, T[, D]), cond as in prefix() -> mean loss of the head per token (), logs (none).

        While training, a tenth of the conditions is left out, so that one network knows both p(x | c) and
        p(x), which guidance needs. (The authors' released GIVT code forgets this.)
        """
        drop = None
        if self.training and self.label_drop > 0:
            drop = torch.rand(len(cond), device=cond.device) < self.label_drop
        return self.head.loss(self.hidden_states(tokens, cond, drop), tokens).mean(), {}

    # Sampling

    @torch.no_grad()
    def sample(self, cond, steps=None, cfg=1.0, temperature=1.0, known=None, known_mask=None, on_step=None,
               use_cache=True, cfg_interval=-1, compile=False, **tricks):
        """cond as in prefix() -> tokens (B, T[, D]), drawn one after the other.

        cfg is the guidance scale s of p(x|c)^s p(x)^(1-s), 1 is off. cfg_interval c: only the first c + 2
        tokens are guided, as LlamaGen counts; -1: all. known (B, T[, D]), known_mask (B, T): tokens that are
        given stay, and later ones see them. Earlier ones cannot, because the model is causal. on_step(t,
        tokens, mask) is called after each token, mask True where still masked. tricks go to the head.
        compile: True compiles decode_step, on a GPU as one CUDA graph; or the name of another backend of
        torch.compile.
        """
        B, T, P = len(cond), self.seq_len, self.n_prefix
        device = cond.device
        if steps not in (None, T):
            raise ValueError(
                f"an autoregressive model draws one token per step: steps must be {T}, not {steps}")
        guided = cfg != 1.0
        n_guided = T if cfg_interval < 0 else cfg_interval + 2
        tokens = self.blank(B, device)
        mask = torch.ones(B, T, dtype=torch.bool, device=device)
        x = self.prefix(cond)                                                         # (B, P, C)
        padding = self.padding_mask(cond)
        if guided:                                   # the second half of the batch goes without the condition
            without = torch.ones(B, dtype=torch.bool, device=device)
            x = torch.cat([x, self.prefix(cond, without)])
            if padding is not None:
                padding = torch.cat([padding, self.padding_mask(cond, without)])
        caches = self.empty_caches(x, static=bool(compile)) if use_cache or compile else None
        step = self.compiled(compile) if compile else None
        h = self.forward_blocks(x, 0, caches, padding)[:, -1]                         # (B or 2B, C)
        for t in range(T):
            if guided and t == n_guided and not compile:    # from here on half of the rows are not needed
                guided = False
                h, x = h[:B], x[:B]
                padding = None if padding is None else padding[:B]
                caches = caches and [cache[:, :B] for cache in caches]
            h, h_uncond = h.chunk(2) if guided else (h, None)
            scale = cfg if t < n_guided else 1.0
            new, _ = self.head.sample(h, h_uncond, scale, temperature, **tricks)      # (B[, D])
            new = new.type_as(tokens)
            if known is not None:
                given = known_mask[:, t].view(B, *[1] * (new.ndim - 1))
                new = torch.where(given, known[:, t].type_as(new), new)
            tokens[:, t] = new
            mask[:, t] = False
            if on_step is not None:
                on_step(t, tokens, mask)
            if t == T - 1:
                break
            if compile:
                torch.compiler.cudagraph_mark_step_begin()
                h = step(new, torch.full((1,), P + t, device=device), caches, padding)
                continue
            row = self.embed(new[:, None], self.positions[P + t:P + t + 1])           # (B, 1, C)
            row = torch.cat([row, row]) if guided else row
            x = row if use_cache else torch.cat([x, row], 1)
            h = self.forward_blocks(x, P + t if use_cache else 0, caches, padding)[:, -1]
        return tokens

    def empty_caches(self, x, static=False):
        """Room for the keys and values of len(x) whole sequences, one tensor per block: x (B, P, C).

        static: the same memory as in the last call if it fits, because a CUDA graph writes to fixed
        addresses.
        """
        shape = (2, len(x), self.n_head, self.n_prefix + self.seq_len, x.shape[-1] // self.n_head)
        old = self.static_caches
        if static and old and (old[0].shape, old[0].dtype) == (shape, x.dtype) and old[0].device == x.device:
            return old
        caches = [x.new_zeros(shape) for _ in self.blocks]
        if static:
            self.static_caches = caches
            for cache in caches:
                torch._dynamo.mark_static_address(cache, guard=False)
        return caches

    def blank(self, n, device):
        """n sequences of nothing yet -> (n, T[, D])."""
        if self.vocab_size:
            return torch.zeros(n, self.seq_len, dtype=torch.long, device=device)
        dtype = self.blocks[0].norm1.weight.dtype
        return torch.zeros(n, self.seq_len, self.token_dim, dtype=dtype, device=device)

    # One step in static shapes, for torch.compile

    def decode_step(self, tokens, positions, caches, padding_mask=None):
        """One token per sequence: tokens (B[, D]) at positions (1,) int64 -> h (B, C).

        The same numbers as forward_blocks(), which is faster on a CPU. Here every step attends to the whole
        cache, the rest masked, and the position is a tensor: one graph serves all T steps. With caches for 2B
        sequences the tokens are fed to both halves.
        """
        x = self.embed(tokens[:, None], positions)
        x = x.repeat(caches[0].shape[1] // len(x), 1, 1)
        mask = self.attention_mask(positions, len(self.positions), padding_mask)
        for block, cache in zip(self.blocks, caches):
            x = block(x, self.rope[positions], mask, cache, positions)
        return self.norm(x[:, -1])

    def compiled(self, how=True):
        """decode_step as one graph per batch size. After 8 of them torch warns and goes back to single
        kernels.

        reduce-overhead records CUDA graphs: a step of a small model is all kernel launches.
        """
        options = dict(mode="reduce-overhead") if how is True else dict(backend=how, fullgraph=True)
        return torch.compile(self.decode_step, dynamic=False, **options)

    # Extra: beam search

    @torch.no_grad()
    def beam_search(self, cond, beam=4, fan=8, temperature=1.0, **tricks):
        """cond as in prefix() -> tokens (B, T[, D]) of high probability, log p(tokens | cond) in nats (B,).

        Each of `beam` sequences draws `fan` next tokens. Of all candidates the `beam` likeliest go on (GIVT
        section 4.3). The score is the model's own log p, whatever temperature and tricks drew the candidates.
        T steps: the authors' code makes one more and ranks the beams by a token that does not exist (47% of
        their results change).
        """
        B, T, device = len(cond), self.seq_len, cond.device
        if not 1 <= beam <= fan:
            raise ValueError(f"beam {beam} must be 1 to fan {fan}: at first there is one sequence to fan out")
        first = torch.arange(B, device=device)[:, None] * beam                        # (B, 1)
        tokens = self.blank(B * beam, device)
        alone = torch.arange(beam, device=device) == 0      # at first only one sequence is real
        total = torch.where(alone, 0.0, -math.inf).repeat(B, 1)                       # (B, beam)
        cond = cond.repeat_interleave(beam, 0)
        x = self.prefix(cond)
        padding = self.padding_mask(cond)
        caches = self.empty_caches(x)
        for t in range(T):
            h = self.forward_blocks(x, self.n_prefix + t - 1 if t else 0, caches, padding)[:, -1]
            h = h[:, None].expand(-1, fan, -1)                                        # (B beam, fan, C)
            new, _ = self.head.sample(h, temperature=temperature, **tricks)           # (B beam, fan[, D])
            log_p = -self.head.loss(h, new)                                           # (B beam, fan)
            same = new[:, :, None] == new[:, None]
            if new.ndim > 2:
                same = same.flatten(3).all(-1)
            log_p = log_p.masked_fill(same.tril(-1).any(-1), -math.inf)        # an id drawn twice counts once
            candidates = (total[..., None] + log_p.view(B, beam, fan)).flatten(1)
            total, best = candidates.topk(beam)                                       # (B, beam)
            parent = (first + best // fan).flatten()
            tokens = tokens[parent]
            caches = [cache[:, parent] for cache in caches]
            tokens[:, t] = new.flatten(0, 1)[parent * fan + (best % fan).flatten()]
            x = self.embed(tokens[:, t:t + 1], self.positions[self.n_prefix + t:][:1])
        return tokens[first[:, 0]], total[:, 0]             # topk sorts: the first is the best


# ---- Extras ---------------------------------------------------------------------------------------

def draw_ids(p):
    """One id from each row of p (..., V) -> (...) int64: where the running sum of p passes a random number.

    On a CPU this takes a tenth of the time of torch.multinomial, which draws V random numbers for each row.
    """
    total = p.cumsum(-1)                                                              # (..., V)
    u = 1 - torch.rand(total[..., :1].shape, device=p.device)                         # in (0, 1], never 0
    return torch.searchsorted(total, u * total[..., -1:]).squeeze(-1)


def truncate(logits, top_k=0, top_p=1.0):
    """Keep the top_k likeliest ids (0: all), then the fewest of them that together reach top_p."""
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        p, ids = logits.softmax(-1).sort(-1, descending=True)
        out = p.cumsum(-1) - p >= top_p                     # the likelier ids reach top_p without this one
        logits = logits.masked_fill(out.scatter(-1, ids, out), -math.inf)             # back in the ids' order
    return logits


def bytes_of(texts, P):
    """Texts -> their UTF-8 bytes (B, P) int64, zeros in front. ValueError if one of them has more than P
    bytes.
    """
    rows = [list(text.encode()) for text in texts]
    for text, row in zip(texts, rows):
        if len(row) > P:
            raise ValueError(f"a caption of {len(row)} bytes where there is room for {P}: {text!r}")
    # the last stands beside the image
    return torch.tensor([[0] * (P - len(row)) + row for row in rows], device="cpu")


class CaptionEmbedder(nn.Module):
    """A caption -> prefix tokens. Shorter captions have zeros in front.

    features: an int, the E numbers of each of P tokens of a frozen text encoder (LlamaGen: 120 of FLAN-T5's
    2048), for fc2(gelu(fc1 x)), without bias, so that padding stays 0. Or "bytes": the transformer learns to
    read P bytes by itself. RoPE gives the prefix no order, so each byte has a learned position. A convolution
    over 8 bytes in steps of 4 shows the first layer words instead of letters, in a quarter of the rows.
    """

    def __init__(self, P, features, n_embd):
        super().__init__()
        self.bytes = features == "bytes"
        E = n_embd if self.bytes else features
        self.n_rows = -(-P // 4) if self.bytes else P
        self.fc1 = nn.Linear(E, n_embd, bias=False)
        self.fc2 = nn.Linear(n_embd, n_embd, bias=False)
        # "no caption": fixed (LlamaGen)
        self.register_buffer("none", torch.randn(self.n_rows, E) / math.sqrt(E))
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=n_embd ** -0.5 if self.bytes else 0.02)
        if self.bytes:
            self.byte = nn.Embedding(256, E)
            self.pos = nn.Parameter(torch.randn(4 * self.n_rows, E))
            self.words = nn.Conv1d(E, E, 8, stride=4, padding=2)

    def filled(self, text):                                 # (B, P) bytes -> (B, 4 rows), zeros in front
        return F.pad(text.long(), (4 * self.n_rows - text.shape[1], 0))

    def padding_mask(self, text, drop=None):
        """text (B, P) bytes or (B, P, E) -> (B, rows) bool, True where there is text.

        Where drop, "no caption" fills all rows of bytes. With features it keeps the padding of the caption
        that it replaces, as published.
        """
        if not self.bytes:
            return (text != 0).any(-1)
        there = (self.filled(text) != 0).unflatten(1, (-1, 4)).any(-1)
        return there if drop is None else there | drop[:, None]

    def forward(self, text, drop=None):
        """text (B, P) bytes or (B, P, E), drop (B,) bool: True for "no caption" -> (B, rows, C)."""
        x = text
        if self.bytes:
            text = self.filled(text)
            x = (self.byte(text) + self.pos) * (text != 0)[..., None]                 # (B, 4 rows, E)
            x = self.words(x.transpose(1, 2)).transpose(1, 2)                         # (B, rows, E)
        if drop is not None:
            x = torch.where(drop[:, None, None], self.none.type_as(x), x)
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


# ---- Demo: two worlds of ids ----------------------------------------------------------------------
# Bars-and-stripes has exactly 30 pictures of 4 x 4. To the best possible model one of them costs ln 30 =
# 3.401 nats, and 0 if words tell which. Small drawn shapes in four greys show sampling and surprise.

def bars_and_stripes(n, device, side=4):
    """n pictures, uniform over the 2 (2^side - 1) with full rows or full columns -> (n, side^2)."""
    bits = torch.arange(1 << side, device=device)[:, None] >> torch.arange(side, device=device) & 1
    rows = bits[:, :, None].expand(-1, -1, side)
    pictures = torch.cat([rows, rows.transpose(1, 2)[1:-1]]).flatten(1)             # blank and full only once
    return pictures[torch.randint(len(pictures), (n,), device=device)]


def captions_of(pictures, side=4):
    """Bars or stripes (N, side^2) -> what they show, in words: "rows 1 and 3 dark"."""
    texts = []
    for dark in (pictures == 0).view(-1, side, side):
        rows = bool((dark == dark[:, :1]).all())
        which = [str(i + 1) for i, line in enumerate(dark if rows else dark.T) if line.all()]
        name = ("row" if rows else "column") + "s" * (len(which) > 1)
        listed = " and ".join(part for part in (", ".join(which[:-1]), *which[-1:]) if part)
        texts.append("all dark" if dark.all() else "all light" if not dark.any() else f"{name} {listed} dark")
    return texts


def fit_ids(model, batches, steps, lr=2e-3):
    """Train on batches(step) -> tokens, labels; returns the losses."""
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    losses = []
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
    """Train on bars-and-stripes with captions, half of them left out -> model, curve [(step, nats with, nats
    without)].
    """
    pictures = bars_and_stripes(2000, device).unique(dim=0).repeat(2, 1)      # (60, 16): all there are, twice
    cond = bytes_of(captions_of(pictures), 23).to(device)
    model = ARTransformer(CategoricalHead(64, 2), 16, 1, vocab_size=2, n_layer=2, n_head=2, n_embd=64,
                          text=(23, "bytes"), label_drop=0.5).to(device)
    curve = []

    def batch(step):
        if step % 20 == 0:
            drop = torch.arange(60, device=device) >= 30
            with torch.no_grad():
                nats = model.head.loss(model.hidden_states(pictures, cond, drop), pictures).sum(1)
            curve.append((step, *nats.view(2, 30).mean(1).tolist()))
        i = torch.randint(30, (32,), device=device)
        return pictures[i], cond[i]
    fit_ids(model, batch, steps, 5e-3)
    batch(steps)
    return model.eval(), curve


def draw_greys(device, side, steps):
    """Train on small drawn shapes in four greys -> model, greys (N, side^2), labels (N,)."""
    import data
    images, labels, _, _ = data.draw(torch.arange(8000, device=device), side)
    greys = ((images.amax(1) + 1) / 2 * 4).long().clamp(0, 3).flatten(1)              # ids 0 .. 3
    model = ARTransformer(CategoricalHead(96, 4), side * side, 10, vocab_size=4, n_layer=3, n_head=3,
                          n_embd=96)
    model = model.to(device)

    def batch(step):
        i = torch.randint(8000, (32,), device=device)
        return greys[i], labels[i]
    losses = fit_ids(model, batch, steps)
    print(
        f"drawn shapes in 4 greys: {losses[-1]:.3f} nats per pixel (guessing: ln 4 = {math.log(4):.3f})"
    )
    return model.eval(), greys, labels


def show_ar(rows, curve, drawn, texts, names, side):
    """The picture: rows = [(text, values (10, T), colour map)] on the left, captions on the right."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig = plt.figure(figsize=(12.5, 7))
    left, right = fig.add_gridspec(1, 2, width_ratios=[2, 1], left=0.145, right=0.98, top=0.9, bottom=0.05,
                                   wspace=0.17)
    cells = left.subgridspec(6, 10, wspace=0.08, hspace=0.08)
    for r, (text, values, cmap) in enumerate(rows):
        for c in range(10):
            ax = fig.add_subplot(cells[r, c])
            shown = values[c].view(side, side).float().cpu()
            ax.imshow(shown.masked_fill(shown < 0, torch.nan), cmap=cmap, vmin=0,
                      vmax=3 if cmap == "gray" else 2)
            ax.set(xticks=[], yticks=[], facecolor="#b9d4ee")
            if r == 0:
                ax.set_title(names[c], fontsize=8)
            if c == 0:
                ax.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)
    upper, lower = right.subgridspec(2, 1, height_ratios=[1, 0.95], hspace=0.32)
    ax = fig.add_subplot(upper)
    steps, with_caption, without = zip(*curve)
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
    fig.suptitle(
        "ar_transformer.py: an image is written token by token; surprise is high where the shape decides "
        "itself; words can tell it all")
    fig.savefig("ar_transformer.png", dpi=80)


def main():
    parser = argparse.ArgumentParser(
        description="A causal transformer on bars-and-stripes and on little drawn shapes.")
    parser.add_argument("--image_size", type=int, default=10,
                        help="side of the little drawn shapes, in pixels")
    parser.add_argument("--steps", type=int, default=400, help="training steps on the drawn shapes")
    args = parser.parse_args()
    import data
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    start = time.perf_counter()
    bars, curve = read_captions(device)
    print(
        f"bars-and-stripes: {curve[-1][2]:.3f} nats per picture (least: {math.log(30):.3f}), given its "
        f"caption {curve[-1][1]:.3f} (the least is 0); {time.perf_counter() - start:.0f} s")
    texts = ["rows 1 and 3 dark", "column 4 dark", "columns 1 and 4 dark"]
    cond = bytes_of(texts, 23).to(device)
    drawn = torch.cat([bars.sample(cond, cfg=scale) for scale in (1.0, 0.0)])         # cfg 0 leaves p(x)

    side = args.image_size
    model, greys, labels = draw_greys(device, side, args.steps)
    cond = torch.arange(10, device=device)
    for use_cache in (False, True):
        torch.manual_seed(1)
        start = time.perf_counter()
        model.sample(cond, cfg=2.0, use_cache=use_cache)
        print(f"10 samples of {side * side} tokens with guidance, {'KV cache' if use_cache else 'no cache'}: "
              f"{time.perf_counter() - start:.2f} s")
    shown_at = {
        round(side * side * share) - 1: f"{share:.0%} of the tokens"
        for share in (0.25, 0.5, 0.75, 1)
    }
    rows = []

    def record(t, tokens, mask):
        if t in shown_at:
            rows.append((shown_at[t], torch.where(mask, -1, tokens), "gray"))
    torch.manual_seed(1)
    model.sample(cond, cfg=2.0, on_step=record)
    real = greys[[int((labels == k).nonzero()[0]) for k in range(10)]]             # one picture of each class
    with torch.no_grad():
        surprise = model.head.loss(model.hidden_states(real, cond), real)             # (10, T) nats
    rows += [("a training picture", real, "gray"), ("its surprise, token by token", surprise, "magma")]
    show_ar(rows, curve, drawn, texts, data.SHAPES, side)
    print("wrote ar_transformer.png")


if __name__ == "__main__":
    main()
