"""
MAR: an image model that writes its tokens in random order, several at a time.

A causal transformer reads an image row by row because text is read that way. MAR (Li et al. 2024,
arxiv.org/abs/2406.11838) keeps "predict the next tokens from those already there", but lets the next ones be
any set S_k of positions, and reads what is there in both directions, as a masked autoencoder (MAE) does:

    p(x_S1, ..., x_SK | c) = prod_k p(x_Sk | c, x_S1, ..., x_Sk-1),     K <= T

How many tokens are still masked falls along a cosine: the first sets are small, the last ones large. An
encoder sees the tokens that are there only. A decoder sees everything, with one learned vector in each masked
position. The head draws every token of S_k from its own h; within a set the tokens do not see each other.
CausalMAR below is the other side of the paper's ablation: a GPT over a raster or random order.

Shapes:  B batch, T tokens, D numbers in a token or V ids, C width, P buffer positions, n tokens not masked

    label (B,) --repeat--> (B, P, C) --cat--> (B, P + T, C) --drop masked--> (B, P + n, C) --encoder--+
    tokens (B, T, D) --Linear--> (B, T, C) --^                                                        v
    head <-- h (B, T, C) <-- drop buffer <-- decoder <-- (B, P + T, C) <-- mask_embed where masked <--+

    python mar.py              # order, attention and steps on exact toys; writes mar.png; about 50 s

Try it yourself:
  1. Leave out self.pos_ahead[...] in CausalMAR, twice. What do the nats of random and raster order become?
  2. In masked_counts let every step draw equally many. Are 4 steps better or worse than with the cosine?
  3. Run with --n_buffer 1 and --n_buffer 64. What do the 63 positions cost in time, and what do they buy?
"""
import argparse
import math
import time
from statistics import NormalDist

import torch
import torch.nn as nn
import torch.nn.functional as F

# n_layer is half encoder, half decoder. mask_min, mask_std: see MAR. The first three mask any number of
# tokens equally often; tiny is the default on a CPU, medium on a GPU. The paper's are for 256 tokens.
SIZES = {
    "tiny": dict(n_layer=4, n_head=4, n_embd=128, n_buffer=4, mask_min=0.0, mask_std=9.0),
    "small": dict(n_layer=6, n_head=4, n_embd=192, n_buffer=8, mask_min=0.0, mask_std=9.0),
    "medium": dict(n_layer=12, n_head=6, n_embd=384, n_buffer=16, mask_min=0.0, mask_std=9.0),
    "mar-b": dict(n_layer=24, n_head=12, n_embd=768, n_buffer=64),
    "mar-l": dict(n_layer=32, n_head=16, n_embd=1024, n_buffer=64),
    "mar-h": dict(n_layer=40, n_head=16, n_embd=1280, n_buffer=64),
}
HEAD_SIZES = {                                              # of the diffusion head that belongs to each size
    "tiny": dict(width=128, depth=2),
    "small": dict(width=256, depth=3),
    "medium": dict(width=512, depth=3),
    "mar-b": dict(width=1024, depth=6),
    "mar-l": dict(width=1280, depth=8),
    "mar-h": dict(width=1536, depth=12),
}


# ---- Orders, and how many tokens are masked --------------------------------------------------------

def mask_rate(u, low=0.7, std=0.25):
    """Training: quantile u in [0, 1] of N(1, std^2) cut to [low, 1] -> share to mask (paper: mean 0.867)."""
    rate = NormalDist(1, std)
    start = rate.cdf(low)
    return rate.inv_cdf(start + u * (rate.cdf(1.0) - start))


def masked_counts(n, steps):
    """Sampling: how many of n tokens are masked before each step, 0 at the end -> list of steps + 1 ints.

    Before step k: floor(n cos(pi/2 k/steps)), at least one less than before and at least one (MaskGIT section
    3.2, MAR). Few are drawn at first, when little is known, and many at last.
    """
    counts = [n]
    for k in range(1, steps):
        counts.append(max(1, min(counts[-1] - 1, math.floor(n * math.cos(math.pi / 2 * k / steps)))))
    return counts + [0]


def draw_order(kind, B, T, device, known_mask=None):
    """The order in which tokens are written -> (B, T) int64, a permutation per row, known positions first."""
    if kind == "random":
        keys = torch.rand(B, T, device=device)
    else:
        keys = (torch.arange(T, device=device) / T).expand(B, T)
    if known_mask is not None:
        keys = keys - 2 * known_mask.float()
    return keys.argsort(1)


def guidance(cfg, schedule, done):
    """The guidance scale of a step after which a share `done` of the tokens is there -> float.

    "constant", or "linear", from 1 up to cfg: the first tokens decide what the image is, and strong guidance
    there makes all images alike.
    """
    if schedule not in ("linear", "constant"):
        raise ValueError(f"cfg_schedule {schedule!r} is neither 'linear' nor 'constant'")
    return 1 + (cfg - 1) * done if schedule == "linear" else cfg


def tricks_at(tricks, progress):
    """Sampling tricks at a moment from 0 (first step) to 1 (last): functions of progress become values."""
    return {k: v(progress) if callable(v) else v for k, v in tricks.items()}


def spread(index, x):
    """index (B, n) -> (B, n[, D]), as gather and scatter want it for x (B, T[, D])."""
    return index.view(*index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])


def take(x, index):
    """The rows at the positions `index` (B, n) of x (B, T[, D]) -> (B, n[, D])."""
    return x.gather(1, spread(index, x))


def put(x, index, rows):
    """x (B, T[, D]) with `rows` (B, n[, D]) written at the positions `index` (B, n)."""
    return x.scatter(1, spread(index, x), rows.type_as(x))


# ---- The transformer block of ViT: LayerNorm, GELU, biases everywhere -------------------------------

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


class ViTAttention(nn.Module):
    """Self-attention. Dropout falls on the attention weights and on the output."""

    def __init__(self, n_embd, n_head, dropout=0.0):
        super().__init__()
        self.n_head = n_head
        self.dropout = nn.Dropout(dropout)
        self.qkv = nn.Linear(n_embd, 3 * n_embd)
        self.proj = nn.Linear(n_embd, n_embd)

    def forward(self, x, mask=None, causal=False, cache=None, start=0):
        """x (B, S, C) -> (B, S, C). mask (B, 1, 1 or S, S): True where attended. causal: none sees a later.

        With cache (2, B, n_head, all, head_dim), x are the rows from position start on: their keys and values
        are written into the cache, and earlier ones are read from it.
        """
        B, S, C = x.shape
        q, k, v = self.qkv(x).view(B, S, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, n_head, S, d) each
        if cache is not None:
            cache[0, :, :, start:start + S] = k
            cache[1, :, :, start:start + S] = v
            k, v = cache[:, :, :, :start + S].type_as(q)
        p = self.dropout.p if self.training else 0.0
        y = attention(q, k, v, mask, causal and S > 1, p)
        return self.dropout(self.proj(y.transpose(1, 2).reshape(B, S, C)))


class ViTMLP(nn.Module):
    """fc2(gelu(fc1 x)), four times as wide inside."""

    def __init__(self, n_embd, dropout=0.0):
        super().__init__()
        self.fc1 = nn.Linear(n_embd, 4 * n_embd)
        self.fc2 = nn.Linear(4 * n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):                                   # (..., C) -> (..., C)
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class ViTBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, n_embd, n_head, dropout=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(n_embd, eps=1e-6)
        self.attn = ViTAttention(n_embd, n_head, dropout)
        self.norm2 = nn.LayerNorm(n_embd, eps=1e-6)
        self.mlp = ViTMLP(n_embd, dropout)

    def forward(self, x, **options):                     # (B, S, C) -> (B, S, C); options go to the attention
        x = x + self.attn(self.norm1(x), **options)
        return x + self.mlp(self.norm2(x))


def vit_init(model):
    """MAR's initialisation: Xavier for every Linear (qkv as one matrix), N(0, 0.02^2) for the rest."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for p in model.parameters(recurse=False):
        nn.init.normal_(p, std=0.02)


def check_sizes(seq_len, grid, n_head, n_embd, order, orders=("random", "raster")):
    """Refuse what cannot be built. Positions are learned one by one: the grid only has to hold them."""
    if grid is not None and math.prod(grid) != seq_len:
        raise ValueError(f"grid {grid} holds {math.prod(grid)} tokens, not seq_len = {seq_len}")
    if n_embd % n_head:
        raise ValueError(f"n_embd {n_embd} must be a multiple of n_head {n_head}")
    if order not in orders:
        raise ValueError(f"order {order!r} is none of {', '.join(orders)}")


# ---- MAR -------------------------------------------------------------------------------------------

class MAR(nn.Module):
    """p(tokens | class) in random order, set by set. Give vocab_size for ids or token_dim for real vectors.

    n_layer: half of it encoder, half decoder, or a pair. n_buffer: copies of the class at positions of their
    own, room to think in (64 as published; they are most of the cost where T is small). order: "random" |
    "raster". mask_min, mask_std: see mask_rate. As published nothing with less than 70% masked is ever
    trained, yet sampling passes there. With 256 tokens it carries over, with 9 it does not (the demo), and
    raster order never trains its last positions. mask_min=0, mask_std=9 masks any number equally often.
    text: (P, "bytes") or (P, E). A caption then fills the buffer, see CaptionEmbedder, and not a class.
    Every number of masked tokens is a shape of its own; for torch.compile there is loss_in_few_shapes.
    """

    def __init__(self, head, seq_len, num_classes, token_dim=None, vocab_size=None, grid=None, n_layer=6,
                 n_head=4, n_embd=192, dropout=0.1, label_drop=0.1, n_buffer=64, order="random", mask_min=0.7,
                 mask_std=0.25, text=None):
        super().__init__()
        check_sizes(seq_len, grid, n_head, n_embd, order)
        if n_buffer < 1:
            raise ValueError(f"n_buffer {n_buffer}: an encoder that sees no token yet needs at least 1 row")
        caption = CaptionEmbedder(*text, n_embd) if text else None
        n_buffer = caption.n_rows if text else n_buffer
        self.seq_len = seq_len
        self.num_classes = num_classes
        self.token_dim = token_dim
        self.vocab_size = vocab_size
        self.label_drop = label_drop
        self.n_buffer = n_buffer
        self.order = order
        self.mask_min = mask_min
        self.mask_std = mask_std
        n_encoder, n_decoder = (n_layer // 2, n_layer - n_layer // 2) if isinstance(n_layer, int) else n_layer

        if token_dim:
            self.tok_embed = nn.Linear(token_dim, n_embd)
        elif not hasattr(head, "embed"):                    # lfq.FactorizedHead embeds its ids itself
            self.tok_embed = nn.Embedding(vocab_size, n_embd)
        if not text:
            self.cls_embed = nn.Embedding(num_classes + 1, n_embd)                    # last row: "no class"
        self.tok_norm = nn.LayerNorm(n_embd, eps=1e-6)
        self.encoder_pos = nn.Parameter(torch.zeros(n_buffer + seq_len, n_embd))
        self.encoder_blocks = nn.ModuleList([ViTBlock(n_embd, n_head, dropout) for _ in range(n_encoder)])
        self.encoder_norm = nn.LayerNorm(n_embd, eps=1e-6)
        self.decoder_embed = nn.Linear(n_embd, n_embd)
        self.mask_embed = nn.Parameter(torch.zeros(1, n_embd))
        self.decoder_pos = nn.Parameter(torch.zeros(n_buffer + seq_len, n_embd))
        self.decoder_blocks = nn.ModuleList([ViTBlock(n_embd, n_head, dropout) for _ in range(n_decoder)])
        self.decoder_norm = nn.LayerNorm(n_embd, eps=1e-6)
        self.head_pos = nn.Parameter(torch.zeros(seq_len, n_embd))                  # the head's own positions
        vit_init(self)
        self.caption = caption                              # last, so that they keep their own initialisation
        self.head = head

    def hidden(self, tokens, labels, mask, n_visible=None, ragged=False):
        """tokens (B, T[, D]), labels (B,) (num_classes: "no class"), mask (B, T) -> h (B, T, C).

        labels may be captions (B, P[, E]) instead, whose padding nothing attends to.
        h at a masked position predicts its token, whose value is not looked at. n_visible: how many tokens
        are not masked, if that is the same in every row. The encoder then drops the masked ones (MAE: with
        87% masked it costs almost nothing). Without it nothing attends to them: the same numbers for any
        mask, at the full price. ragged: n_visible is the largest number, and rows may have fewer.
        """
        P, T = self.n_buffer, self.seq_len
        buffer, there = read_condition(self, labels)
        x = torch.cat([buffer.expand(-1, P, -1), embed_tokens(self, tokens)], 1)      # (B, P + T, C)
        x = self.tok_norm(x + self.encoder_pos)
        mask = F.pad(mask, (P, 0))                                                  # (B, P + T), buffer never
        seen = ~mask if there is None else ~mask & there
        attended = None
        if n_visible is None:
            attended = seen[:, None, None]                                            # (B, 1, 1, P + T)
        else:
            positions = mask.byte().argsort(dim=1, stable=True)[:, :P + n_visible]    # in reading order
            x = take(x, positions)                                                    # (B, P + n_visible, C)
            if ragged or there is not None:
                attended = take(seen, positions)[:, None, None]
        for block in self.encoder_blocks:
            x = block(x, mask=attended)
        x = self.decoder_embed(self.encoder_norm(x))
        if n_visible is not None:
            x = put(x.new_zeros(len(x), P + T, x.shape[-1]), positions, x)
        x = torch.where(mask[..., None], self.mask_embed, x) + self.decoder_pos       # (B, P + T, C)
        attended = None if there is None else there[:, None, None]
        for block in self.decoder_blocks:
            x = block(x, mask=attended)
        return self.decoder_norm(x[:, P:]) + self.head_pos

    def mask_count(self):
        """How many tokens this batch masks -> int. ONE for all rows, or the encoder's input would be ragged.

        Drawn from torch's CPU generator: reading it back waits for no GPU, and torch.manual_seed() repeats
        it.
        """
        n = self.seq_len * mask_rate(float(torch.rand((), device="cpu")), self.mask_min, self.mask_std)
        return min(self.seq_len, max(1, math.ceil(n)))

    def forward(self, tokens, cond):
        """tokens (B, T[, D]), cond (B,) int64 or captions -> mean loss per MASKED token (), logs.

        Masked are the last mask_count() positions of an order per row (draw_order). hidden() gives h, and
        the head is computed for these positions only; the others have no loss. As published, 70 to 100% are
        masked. While training, a share label_drop of the labels become num_classes, "no class", each by
        itself: guidance needs it.
        """
        if self.training and self.label_drop > 0:
            cond = drop_conditions(self, cond)
        B, T, n = len(tokens), self.seq_len, self.mask_count()
        masked = draw_order(self.order, B, T, tokens.device)[:, T - n:]          # (B, n) the last n positions
        mask = torch.zeros(B, T, dtype=torch.bool, device=tokens.device).scatter(1, masked, True)
        h = self.hidden(tokens, cond, mask, T - n)
        loss = self.head.loss(take(h, masked), take(tokens, masked)).mean()
        return loss, {"masked": loss.new_full((), n / T)}

    @torch.no_grad()
    def sample(self, cond, steps=None, cfg=1.0, temperature=1.0, known=None, known_mask=None, on_step=None,
               cfg_schedule="linear", encode_every=1, **tricks):
        """cond (B,) labels, or captions -> tokens (B, T[, D]) in `steps` <= T sets (default: 64, at most T).

        cfg: guidance scale, 1 is off. cfg_schedule: "linear" | "constant", see guidance(). known (B, T[, D])
        with known_mask (B, T), True where a token is given: any positions, any number per row. They are kept,
        and seen from the start. on_step(i, tokens, mask) is called after each step, mask True where still
        masked. tricks go to the head. One that is a function is asked at every step: diffusion_steps=lambda
        p: round(50 - 45 * p) goes from 50 to 5. encode_every above 1: see ReusingEncoder.
        """
        B, T, device = len(cond), self.seq_len, cond.device
        if steps is not None and not 1 <= steps <= T:
            raise ValueError(f"{T} tokens can be drawn in 1 to {T} steps, not {steps}")
        tokens = blank_tokens(self, B, device)
        mask = torch.ones(B, T, dtype=torch.bool, device=device)
        fewest, most = 0, 0                                 # tokens given in a row
        if known is not None:
            fewest, most = torch.stack(known_mask.sum(1).aminmax()).tolist()     # the one wait for the device
            tokens = torch.where(spread(known_mask, tokens), known.type_as(tokens), tokens)
            mask = ~known_mask
        if encode_every < 1 or (encode_every > 1 and fewest != most):
            raise ValueError(f"encode_every {encode_every}: 1, or more where as many tokens are given in "
                             "all rows")
        order = draw_order(self.order, B, T, device, known_mask)               # given tokens come first in it
        counts = masked_counts(T - fewest, min(steps or 64, T - fewest)) if fewest < T else [0]
        guided = cfg != 1.0
        labels = torch.cat([cond, no_condition(self, cond)]) if guided else cond
        hidden = self.hidden if encode_every == 1 else ReusingEncoder(self, encode_every)
        for i, (before, after) in enumerate(zip(counts, counts[1:])):
            positions = order[:, T - before:T - after]  # (B, n): n never depends on what was drawn
            h = hidden(twice(tokens, guided), labels, twice(mask, guided),
                       T - before if fewest == most else None)
            h = take(h, twice(positions, guided))                                     # (B or 2B, n, C)
            h, h_uncond = h.chunk(2) if guided else (h, None)
            scale = guidance(cfg, cfg_schedule, 1 - max(after, 1) / T)
            now = tricks_at(tricks, i / max(len(counts) - 2, 1))
            drawn, _ = self.head.sample(h, h_uncond, scale, temperature, **now)       # (B, n[, D])
            if most > fewest:                              # rows with more given tokens than others keep them
                given = spread(take(known_mask, positions), drawn)
                drawn = torch.where(given, take(known, positions).type_as(drawn), drawn)
            tokens = put(tokens, positions, drawn)
            mask = mask.scatter(1, positions, False)
            if on_step is not None:
                on_step(i, tokens, mask)
        return tokens

    # Extra: the same loss in a handful of shapes, for torch.compile (common/compiling.py puts it in place)

    def loss_in_few_shapes(self, tokens, cond, shapes=4):
        """forward(), whose loss has the same expectation, in at most `shapes` shapes: of masked_loss.

        The numbers that occur are cut into `shapes` equal ranges. Shapes depend on the range and n is a
        tensor, so that a range is one graph. Rows beyond n are computed and not counted: of 256 tokens as
        published that is 4% more of the head and 10% more rows in the encoder; of 16 tokens, any number of
        them masked, 18% and 6 to 13%.
        """
        fewest = max(1, math.ceil(self.seq_len * self.mask_min))
        width = -(-(self.seq_len - fewest + 1) // shapes)
        n = self.mask_count()                               # here: no graph can decide its shapes by chance
        least = n - (n - fewest) % width
        most = min(self.seq_len, least + width - 1)
        return self.masked_loss(tokens, cond, torch.full((), n, device=tokens.device), least, most)

    def masked_loss(self, tokens, cond, n, least, most):
        """tokens (B, T[, D]), cond (B,), n () of the tokens masked, least <= n <= most -> loss (), logs."""
        if self.training and self.label_drop > 0:
            cond = drop_conditions(self, cond)
        B, T = len(tokens), self.seq_len
        last = draw_order(self.order, B, T, tokens.device)[:, T - most:]              # (B, most)
        counts = torch.arange(most, device=tokens.device) >= most - n                 # the last n of them
        mask = torch.zeros(B, T, dtype=torch.bool, device=tokens.device)
        mask = mask.scatter(1, last, counts.expand(B, -1))
        h = self.hidden(tokens, cond, mask, T - least, ragged=True)
        loss = self.head.loss(take(h, last), take(tokens, last))                      # (B, most)
        return (loss * counts).sum() / (B * n), {"masked": n / T}


def embed_tokens(model, tokens):
    """tokens (B, n[, D]) -> (B, n, C), by the model's own layer, or by a head that embeds its ids itself."""
    embed = model.head.embed if hasattr(model.head, "embed") else model.tok_embed
    return embed(tokens)


def blank_tokens(model, B, device):
    """Zeros to draw into: ids (B, T) int64, or vectors (B, T, D) of the model's dtype."""
    if model.vocab_size:
        return torch.zeros(B, model.seq_len, dtype=torch.long, device=device)
    dtype = model.tok_norm.weight.dtype
    return torch.zeros(B, model.seq_len, model.token_dim, dtype=dtype, device=device)


def twice(x, guided):
    """Under guidance, x for the rows with the class and again for those without: (B, ...) -> (2B, ...)."""
    return torch.cat([x, x]) if guided else x


# ---- Extras: a cheaper encoder, causal orders, patches of latents, a head for ids, captions ---------

class ReusingEncoder:
    """In place of MAR.hidden in sampling: most steps encode only the tokens that the last step drew.

    Each `every`-th step encodes all tokens, as hidden() does. In the steps between, new tokens see the old
    ones by keys and values that were kept. That is not exact, for the old ones should see the new ones, too:
    the encoder reads in both directions. docs/results.md has what it costs and saves.
    """

    def __init__(self, model, every):
        self.model = model
        self.every = every
        self.calls = 0

    def __call__(self, tokens, labels, mask, n_visible):
        """As MAR.hidden, for the steps of one batch in their order -> h (B, T, C)."""
        model, P = self.model, self.model.n_buffer
        buffer, there = read_condition(model, labels)
        x = torch.cat([buffer.expand(-1, P, -1), embed_tokens(model, tokens)], 1)     # (B, P + T, C)
        x = model.tok_norm(x + model.encoder_pos)
        if self.calls % self.every == 0:
            n_head = model.encoder_blocks[0].attn.n_head
            empty = x.new_zeros(2, *x.shape).unflatten(-1, (n_head, -1)).transpose(2, 3)
            self.caches = [empty.clone() for _ in model.encoder_blocks]     # (2, B, n_head, P + T, head_dim)
            self.encoded = torch.zeros_like(x)
            self.rows = torch.zeros(len(x), 0, dtype=torch.long, device=x.device)     # encoded so far
        self.calls = self.calls + 1

        mask = F.pad(mask, (P, 0))                                                  # (B, P + T), buffer never
        start, end = self.rows.shape[1], P + n_visible
        is_old = torch.zeros_like(mask).scatter(1, self.rows, True)
        new = (mask | is_old).byte().argsort(dim=1, stable=True)[:, :end - start]     # (B, new rows)
        self.rows = torch.cat([self.rows, new], 1)                                    # (B, P + n_visible)
        attended = None if there is None else take(there, self.rows)[:, None, None]
        y = take(x, new)
        for block, cache in zip(model.encoder_blocks, self.caches):
            y = block(y, mask=attended, cache=cache, start=start)
        self.encoded = put(self.encoded, new, model.decoder_embed(model.encoder_norm(y)))

        x = torch.where(mask[..., None], model.mask_embed, self.encoded) + model.decoder_pos
        attended = None if there is None else there[:, None, None]
        for block in model.decoder_blocks:
            x = block(x, mask=attended)
        return model.decoder_norm(x[:, P:]) + model.head_pos


def random_share(step, first, last):
    """RAR: the share of images whose order is random: 1 up to step `first`, then falling to 0 at `last`."""
    return 1.0 if step < first else 0.0 if step > last else 1 - (step - first) / (last - first)


def annealed_order(B, T, device, share):
    """Each row by itself a random order with probability `share`, a number or (), else raster -> (B, T)."""
    raster = torch.arange(T, device=device) / T
    random = torch.rand(B, 1, device=device) < share
    return torch.where(random, torch.rand(B, T, device=device), raster).argsort(1)


class CausalMAR(nn.Module):
    """The same blocks as one causal decoder with a KV cache: a token per step, in raster or random order.

    The authors describe it and did not release it. Step i of the order reads token i - 1 (at first: the
    class), the position where that token stands (pos_here) and the position of the next one (pos_ahead):
    without pos_ahead it would have to predict a token without knowing which. Unlike in MAR, h never sees
    tokens that come later in the order. text: as in MAR; the last row of a caption stands for the class.

    order="annealed" (RAR, Yu et al. 2024, arxiv.org/abs/2411.00776): random orders in the first half of the
    training, then fewer and fewer, and raster alone from three quarters on. A training loop tells the
    progress by anneal(). What is drawn and validated is in raster order.
    """

    def __init__(self, head, seq_len, num_classes, token_dim=None, vocab_size=None, grid=None, n_layer=6,
                 n_head=4, n_embd=192, dropout=0.1, label_drop=0.1, order="random", text=None):
        super().__init__()
        check_sizes(seq_len, grid, n_head, n_embd, order, ("random", "raster", "annealed"))
        caption = CaptionEmbedder(*text, n_embd) if text else None
        self.seq_len = seq_len
        self.num_classes = num_classes
        self.token_dim = token_dim
        self.vocab_size = vocab_size
        self.n_head = n_head
        self.label_drop = label_drop
        self.order = order
        if token_dim:
            self.tok_embed = nn.Linear(token_dim, n_embd)
        elif not hasattr(head, "embed"):                    # lfq.FactorizedHead embeds its ids itself
            self.tok_embed = nn.Embedding(vocab_size, n_embd)
        if not text:
            self.cls_embed = nn.Embedding(num_classes + 1, n_embd)                    # last row: "no class"
        self.pos_here = nn.Parameter(torch.zeros(seq_len, n_embd))
        self.pos_ahead = nn.Parameter(torch.zeros(seq_len, n_embd))
        self.tok_norm = nn.LayerNorm(n_embd, eps=1e-6)
        self.blocks = nn.ModuleList([ViTBlock(n_embd, n_head, dropout) for _ in range(n_layer)])
        self.norm = nn.LayerNorm(n_embd, eps=1e-6)
        vit_init(self)
        self.caption = caption                              # last, so that they keep their own initialisation
        self.head = head
        self.register_buffer("random_share", torch.ones(()), persistent=False)

    def anneal(self, progress):
        """Before a training step: progress is its number divided by that of all steps, in 0 .. 1.

        The share goes to the device. Nothing is read back, and a graph finds it in the same place.
        """
        self.random_share.fill_(random_share(progress, 0.5, 0.75))

    def hidden(self, tokens, cond, order):
        """tokens (B, T[, D]), cond (B,), order (B, T) -> h (B, T, C): h[:, i] predicts token order[:, i]."""
        T = self.seq_len
        before = order[:, :-1]
        x = embed_tokens(self, take(tokens, before)) + self.pos_here[before]          # (B, T - 1, C)
        prefix, there = read_condition(self, cond)                                    # (B, 1, C), None
        x = torch.cat([prefix, x], 1)                                                 # (B, T, C)
        x = self.tok_norm(x + F.pad(self.pos_ahead[order], (0, 0, x.shape[1] - T, 0)))
        mask = causal_mask(there)
        for block in self.blocks:
            x = block(x, mask=mask, causal=mask is None)
        return self.norm(x[:, -T:])

    def forward(self, tokens, cond):
        """tokens (B, T[, D]), cond (B,) or captions -> mean loss per token (), logs; an order per row."""
        if self.training and self.label_drop > 0:
            cond = drop_conditions(self, cond)
        if self.order == "annealed" and self.training:
            order = annealed_order(len(tokens), self.seq_len, tokens.device, self.random_share)
        else:
            order = draw_order(self.order, len(tokens), self.seq_len, tokens.device)
        loss = self.head.loss(self.hidden(tokens, cond, order), take(tokens, order)).mean()
        return loss, {}

    @torch.no_grad()
    def sample(self, cond, steps=None, cfg=1.0, temperature=1.0, known=None, known_mask=None, on_step=None,
               cfg_schedule="linear", **tricks):
        """cond (B,) int64 labels -> tokens (B, T[, D]), one per step. Arguments as in MAR.sample.

        Known tokens come first in a random order, so all others see them. In raster order (and "annealed",
        which ends as that) they are kept, and only later tokens see them.
        """
        B, T, device = len(cond), self.seq_len, cond.device
        if steps not in (None, T):
            raise ValueError(f"a causal model draws one token per step: steps must be {T}, not {steps}")
        order = draw_order(self.order, B, T, device, known_mask if self.order == "random" else None)
        guided = cfg != 1.0
        labels = torch.cat([cond, no_condition(self, cond)]) if guided else cond
        tokens = blank_tokens(self, B, device)
        mask = torch.ones(B, T, dtype=torch.bool, device=device)
        x, there = read_condition(self, labels)                                       # (B or 2B, 1, C)
        visible = causal_mask(there)
        end = x.shape[1]
        shape = (2, len(x), self.n_head, end + T - 1, x.shape[-1] // self.n_head)
        caches = [x.new_zeros(shape) for _ in self.blocks]
        for i in range(T):
            position = order[:, i:i + 1]                                              # (B, 1)
            start = end - x.shape[1]                        # the rows of the condition, then one at a time
            ahead = twice(self.pos_ahead[position], guided)
            y = self.tok_norm(x + F.pad(ahead, (0, 0, x.shape[1] - 1, 0)))
            attended = None if visible is None else visible[:, :, start:end, :end]
            for block, cache in zip(self.blocks, caches):
                y = block(y, mask=attended, cache=cache, start=start)
            y = self.norm(y[:, -1:])
            h, h_uncond = y.chunk(2) if guided else (y, None)                         # (B, 1, C)
            scale = guidance(cfg, cfg_schedule, (i + 1) / T)
            now = tricks_at(tricks, i / max(T - 1, 1))
            drawn, _ = self.head.sample(h, h_uncond, scale, temperature, **now)       # (B, 1[, D])
            if known is not None:
                given = spread(take(known_mask, position), drawn)
                drawn = torch.where(given, take(known, position).type_as(drawn), drawn)
            tokens = put(tokens, position, drawn)
            mask = mask.scatter(1, position, False)
            if on_step is not None:
                on_step(i, tokens, mask)
            x = twice(embed_tokens(self, drawn.type_as(tokens)) + self.pos_here[position], guided)
            end = end + 1
        return tokens


def causal_mask(there):
    """Padding mask (B, n + T) -> which of n + T - 1 rows sees which (B, 1, n + T - 1, n + T - 1), or None.

    A row sees itself and earlier ones but padding. Padding sees itself: a softmax over nothing would be nan.
    """
    if there is None:                                       # attention() has a faster way then
        return None
    row = torch.arange(there.shape[1] - 1, device=there.device)
    mask = (row <= row[:, None]) & there[:, None, :-1] | (row == row[:, None])
    return mask[:, None]


def patchify(latents, p=1):
    """Latents (B, c, H, W) -> tokens (B, H/p * W/p, c * p * p), row by row; in a token: (c, row, column)."""
    B, c, H, W = latents.shape
    patches = latents.view(B, c, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(B, H // p * (W // p), c * p * p)


def unpatchify(tokens, grid, p=1):
    """The inverse: tokens (B, rows * cols, c * p * p), grid = (rows, cols) -> (B, c, rows * p, cols * p)."""
    patches = tokens.unflatten(1, grid).unflatten(3, (-1, p, p))                    # (B, rows, cols, c, p, p)
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


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


def read_condition(model, cond):
    """Labels (B,), or captions (B, P[, E]) -> rows in front of the tokens (B, n, C), padding mask (B, n + T).

    Without captions there is no padding: None. num_classes, or a caption of zeros only, is "no condition".
    """
    if model.caption is None:
        return model.cls_embed(cond).unsqueeze(1), None
    drop = (cond == 0).flatten(1).all(1)                    # "no caption" fills all rows
    there = model.caption.padding_mask(cond) | drop[:, None]
    return model.caption(cond, drop), F.pad(there, (0, model.seq_len), value=True)


def no_condition(model, cond):
    """What guidance compares with: labels (B,) of num_classes, or captions (B, P[, E]) of zeros."""
    return torch.full_like(cond, model.num_classes if cond.ndim == 1 else 0)


def drop_conditions(model, cond):
    """Labels (B,) or captions (B, P[, E]), of which a share label_drop has become no_condition()."""
    drop = torch.rand(len(cond), device=cond.device) < model.label_drop
    return torch.where(drop.view(-1, *[1] * (cond.ndim - 1)), no_condition(model, cond), cond)


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


# ---- Demo: two kinds of pictures made of ids --------------------------------------------------------
# Bars-and-stripes (3 x 3: 14 pictures) has an exact optimum, and samples are right or wrong. Drawn shapes,
# 12 x 12 black and white pixels read as 36 ids of 2 x 2 pixels each, show how a picture comes about.

def bars_and_stripes(n, device, side=4):
    """n pictures, uniform over the 2 (2^side - 1) with full rows or full columns -> (n, side^2)."""
    bits = torch.arange(1 << side, device=device)[:, None] >> torch.arange(side, device=device) & 1
    rows = bits[:, :, None].expand(-1, -1, side)
    pictures = torch.cat([rows, rows.transpose(1, 2)[1:-1]]).flatten(1)             # blank and full only once
    return pictures[torch.randint(len(pictures), (n,), device=device)]


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


@torch.no_grad()
def nats_per_picture(model, x, cond):
    """-log p(x | order) in nats, mean over pictures: x (B, T) ids, cond (B,) -> (), at least their entropy.

    A causal model tells all T factors in one pass. MAR needs a pass for each, since what it sees changes.
    """
    B, T = x.shape
    order = draw_order(model.order, B, T, x.device)
    if isinstance(model, CausalMAR):
        return model.head.loss(model.hidden(x, cond, order), take(x, order)).sum(1).mean()
    mask = torch.ones(B, T, dtype=torch.bool, device=x.device)
    total = 0.0
    for t in range(T):
        position = order[:, t:t + 1]
        h = take(model.hidden(x, cond, mask, t), position)
        total = total + model.head.loss(h, take(x, position)).mean()
        mask = mask.scatter(1, position, False)
    return total


def compare_orders(device, steps=1200):
    """Train four models on bars-and-stripes -> {name: {steps: share of samples that are right}}."""
    zeros = torch.zeros(1000, dtype=torch.long, device=device)
    pictures = bars_and_stripes(1000, device, 3).unique(dim=0)                        # (14, 9)
    arms = {
        "raster, causal": (CausalMAR, dict(order="raster")),
        "random, causal": (CausalMAR, dict(order="random")),
        "random, both ways": (MAR, dict(n_buffer=1, mask_min=0.0, mask_std=9.0)),
        "the same, masking 70 to 100%": (MAR, dict(n_buffer=1)),
    }
    right = {}
    for name, (cls, options) in arms.items():
        torch.manual_seed(0)
        model = cls(CategoricalHead(32, 2), 9, 1, vocab_size=2, n_layer=2, n_head=2, n_embd=32, dropout=0.0,
                    label_drop=0.0, **options).to(device)
        fit_ids(model, lambda step: (bars_and_stripes(32, device, 3), zeros[:32]), steps, 3e-3)
        model.eval()
        nats = torch.stack([nats_per_picture(model, pictures, zeros[:14]) for _ in range(8)]).mean()
        right[name] = {}
        for k in (1, 2, 3, 4, 6, 9) if cls is MAR else (9,):
            drawn = model.sample(zeros, k)
            found = (drawn[:, None] == pictures).all(-1).any(1)
            right[name][k] = float(found.float().mean())
        print(f"bars-and-stripes, {name:30s} {nats:.3f} nats (optimum ln 14 = {math.log(14):.3f}), 9 steps: "
              f"{right[name][9]:.0%} of the samples are right")
    return right


def draw_shapes(device, n_buffer, steps, images, labels):
    """Train MAR on drawn shapes as ids and sample it -> rows (text, pictures (10, 12, 12), nan where masked).

    images (N, 12, 12) bool, labels (N,) of ten classes.
    """
    side, p = 12, 2
    grid = side // p, side // p
    weights = 2 ** torch.arange(p * p, device=device)
    ids = (patchify(images.long()[:, None], p) * weights).sum(-1)                     # (N, 36) of 16 ids
    T = ids.shape[1]
    cond = torch.arange(10, device=device)
    torch.manual_seed(0)
    model = MAR(CategoricalHead(64, 16), T, 10, vocab_size=16, n_layer=4, n_head=2, n_embd=64, dropout=0.0,
                n_buffer=n_buffer).to(device)

    def batch(step):
        i = torch.randint(len(ids), (32,), device=device)
        return ids[i], labels[i]

    start = time.perf_counter()
    losses = fit_ids(model, batch, steps, 3e-3)
    print(f"drawn shapes: {sum(losses[-50:]) / 50:.3f} nats per masked token (uniform guessing: "
          f"{math.log(16):.3f}), {time.perf_counter() - start:.0f} s")
    model.eval()
    rows = []

    def show(text, tokens, mask):
        pixels = unpatchify((tokens[..., None] // weights % 2).float(), grid, p)[:, 0]
        masked = unpatchify(mask[..., None].repeat(1, 1, p * p).float(), grid, p)[:, 0] > 0
        rows.append((text, pixels.masked_fill(masked, torch.nan).cpu()))

    for steps, shown in ((16, (1, 2, 4, 8, 16)), (2, (2,)), (T, (T,))):
        def record(i, tokens, mask):
            if i + 1 in shown:
                show(f"{steps} steps: after {i + 1}", tokens, mask)

        torch.manual_seed(1)
        start = time.perf_counter()
        model.sample(cond, steps, cfg=3.0, on_step=record)
        print(f"10 samples in {steps} steps with guidance: {time.perf_counter() - start:.2f} s")
    real = ids[[int((labels == k).nonzero()[0]) for k in range(10)]]               # one picture of each class
    known = (torch.arange(T, device=device) // grid[1] < 3).expand(10, -1)
    show("given: the upper half", real, ~known)
    drawn = model.sample(cond, 8, cfg=3.0, known=real, known_mask=known)
    show("the rest, in 8 steps", drawn, torch.zeros_like(known))
    return rows


def plot_orders(rows, names, right, path):
    """Pictures of draw_shapes on the left, the shares of compare_orders on the right -> a PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig = plt.figure(figsize=(13, 6.6))
    left, panel = fig.add_gridspec(1, 2, width_ratios=[2, 1], left=0.12, right=0.98, top=0.88, bottom=0.1,
                                   wspace=0.17)
    cells = left.subgridspec(len(rows), 10, wspace=0.08, hspace=0.08)
    for r, (text, pictures) in enumerate(rows):
        for c in range(10):
            ax = fig.add_subplot(cells[r, c])
            ax.imshow(pictures[c], cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[], facecolor="#b9d4ee")
            if r == 0:
                ax.set_title(names[c], fontsize=9)
            if c == 0:
                ax.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)
    ax = fig.add_subplot(panel)
    for name, share in right.items():
        style = dict(marker="o", ms=6) if len(share) > 1 else dict(marker="*", ms=13, ls="")
        ax.plot(list(share), list(share.values()), label=name, **style)
    ax.set(xlabel="steps (9 tokens)", ylabel="samples that are one of the 14 pictures", ylim=(0, 1.04),
           xticks=(1, 2, 3, 4, 6, 9), title="bars-and-stripes 3 x 3: order, attention, steps")
    ax.legend(fontsize=9, loc="upper left")
    ax.grid(alpha=0.3)
    fig.suptitle("mar.py: tokens in random order, more and more per step (left; blue is masked).\nTokens of "
                 "one step do not see each other: fewer steps, more mistakes (right)", fontsize=11)
    fig.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description="Order, attention and steps on two kinds of toy pictures.")
    parser.add_argument("--n_buffer", type=int, default=4, help="buffer positions (published: 64)")
    parser.add_argument("--steps", type=int, default=700, help="training steps on the drawn shapes")
    args = parser.parse_args()
    import data
    device = "cuda" if torch.cuda.is_available() else "cpu"
    right = compare_orders(device)
    _, labels, masks, _ = data.draw(torch.arange(8000, device=device), 12)
    rows = draw_shapes(device, args.n_buffer, args.steps, masks > 0, labels)
    plot_orders(rows, data.SHAPES, right, "mar.png")
    print("wrote mar.png")


if __name__ == "__main__":
    main()
