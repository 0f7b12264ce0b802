"""
A bidirectional transformer that fills in masked tokens, many at a time.

An autoregressive model needs one pass per token. MaskGIT (Chang et al. 2022, https://arxiv.org/abs/2202.04200) hides a
random part of the tokens and learns to predict every hidden one from all that are seen,

    loss = mean over masked t of  -log p(x_t | c, x_seen),

and so can write an image in a few passes: draw ALL hidden tokens at once, keep those it is most confident of, hide the
rest again, repeat. The confidence of a token is log p of the value drawn plus noise that fades (without noise, all
pictures look alike). With a softmax head this is MaskGIT; with real vectors and a Gaussian mixture, whose density is
the confidence, it is GIVT-MaskGIT (https://arxiv.org/abs/2312.02116, section 3.5). Only the input line and the head differ.

Shapes:  B batch, T tokens, D numbers in a token or V ids, C width (n_embd); mask is True where a token is NOT known

    tokens (B, T[, D]), mask (B, T) --embed--> (B, T, C) --class in front, EncoderBlocks--> h (B, T, C) --head--> p(x_t)
    after step i of n, floor(T cos(pi/2 (i+1)/n)) tokens are still hidden: few are revealed at first, many at the end

    python maskgit.py          # masks and pictures pass by pass, exact errors; writes maskgit.png; about 50 s on 2 cores

Try it yourself:
  1. Sample the shapes with choice_temperature=0: the most confident tokens first, no noise. What do all pictures share?
  2. Take the loss on all tokens instead of the masked ones. It falls faster. Why does that say nothing?
  3. Sample with schedule="linear" and 4 steps. Why is it worse to reveal many tokens in the first step?
"""
import argparse
import itertools
import math
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

SIZES = {
    "nano": dict(n_layer=4, n_head=2, n_embd=64),
    "tiny": dict(n_layer=4, n_head=4, n_embd=128),
    "small": dict(n_layer=6, n_head=4, n_embd=192),          # the default on a CPU
    "medium": dict(n_layer=12, n_head=6, n_embd=384),        # the default on a GPU
    "givt": dict(n_layer=24, n_head=16, n_embd=1024, dropout=0.4),                         # GIVT-MaskGIT, 304M with its head
    "maskgit": dict(n_layer=24, n_head=16, n_embd=768, dropout=0.1, style="bert"),          # MaskGIT, and TiTok's generator:
    # ... 177M with the latter's 4096 ids (MaskGIT's paper says 8 heads); that of TiTok's 128 tokens has long skips, 295M:
    "uvit": dict(n_layer=21, n_head=16, n_embd=1024, dropout=0.1, style="uvit"),
}
EPS = {"givt": 1e-6, "bert": 1e-12, "uvit": 1e-5}           # of the norms, by the style of the transformer
SCHEDULES = {                                               # share of the tokens still hidden at progress r in [0, 1]
    "cosine": lambda r: torch.cos(math.pi / 2 * r),
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r * r,
    "arccos": lambda r: torch.acos(r) / (math.pi / 2),
}


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


class EncoderBlock(nn.Module):
    """Bidirectional transformer block. style "givt": pre-norm with few biases; "bert": post-norm with biases everywhere, as
    in MaskGIT; "uvit": pre-norm with biases but for the queries, keys and values, as in TiTok's generator of 128 tokens."""

    def __init__(self, n_embd, n_head, hidden=None, dropout=0.0, style="givt"):
        super().__init__()
        hidden, self.n_head, self.post_norm = hidden or 4 * n_embd, n_head, style == "bert"
        self.norm1, self.norm2 = (nn.LayerNorm(n_embd, EPS[style], bias=style != "givt") for _ in range(2))
        self.wqkv = nn.Linear(n_embd, 3 * n_embd, bias=style == "bert")
        self.wo = nn.Linear(n_embd, n_embd, bias=style != "givt")
        self.fc1, self.fc2 = nn.Linear(n_embd, hidden), nn.Linear(hidden, n_embd)
        self.gelu, self.dropout = nn.GELU("tanh" if style == "givt" else "none"), nn.Dropout(dropout)

    def attend(self, x):                                    # (B, S, C) -> (B, S, C): every position sees every other
        q, k, v = self.wqkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)   # (B, n_head, S, head_dim)
        return self.dropout(self.wo(attention(q, k, v).transpose(1, 2).flatten(2)))

    def mlp(self, x):                                       # (B, S, C) -> (B, S, C)
        x = self.gelu(self.fc1(x))
        return self.dropout(self.fc2(x)) if self.post_norm else self.fc2(self.dropout(x))  # BERT's place, and GIVT's

    def forward(self, x):                                   # (B, S, C) -> (B, S, C)
        if self.post_norm:
            x = self.norm1(x + self.attend(x))
            return self.norm2(x + self.mlp(x))
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def n_hidden(u, T, schedule="cosine"):
    """How many of T tokens training hides: u in [0, 1] -> ceil(T cos(pi/2 u)), at least 1. TiTok has arccos, rounded."""
    n = T * SCHEDULES[schedule](u)
    return (n.round() if schedule == "arccos" else n.ceil()).clamp(1, T)


def still_hidden(n_start, step, steps, schedule="cosine"):
    """How many tokens stay hidden after step 0 .. steps - 1: n_start (B, 1) int64, hidden at the start -> (B, 1) int64.

    In float32 as the authors' code: at r = 2/3 it gives floor(127.99..) = 127 of 256 where exact arithmetic gives 128,
    and without the clamp cos(pi / 2) is a little below 0 and floor makes -1 of it.
    """
    r = torch.full((), (step + 1) / steps, device=n_start.device)                          # there: no copy to wait for
    return (n_start * SCHEDULES[schedule](r).clamp(1e-6, 1)).floor().long()


def keep_hidden(score, n):
    """The n (B, 1) positions of lowest score (B, T) -> mask (B, T), True where hidden again. Ties: the earlier position."""
    order = score.argsort(dim=1, stable=True)
    first = (torch.arange(score.shape[1], device=score.device) < n).expand_as(order)
    return torch.zeros_like(first).scatter(1, order, first)


def halton_rank(grid, device=None):
    """When each token's turn comes in a Halton sequence: grid, such as (rows, cols) -> (T,) float32, 0 is the first.

    Point i has the digits of i in base 2 mirrored at the point as its row in [0, 1), those in base 3 as its column, so
    that the places of any stretch of points lie far apart. Tokens far apart say little about each other, and to draw
    them in one pass costs least. (Halton-MaskGIT, Besnier et al. 2025, https://arxiv.org/abs/2503.17076)
    """
    places = {}                                             # token: its turn
    for i in itertools.count(1):
        token = 0
        for n, base in zip(grid, (2, 3, 5)):
            share, rest, unit = 0.0, i, 1.0
            while rest:
                rest, digit, unit = rest // base, rest % base, unit / base
                share += digit * unit
            token = token * n + int(share * n)
        places.setdefault(token, len(places))
        if len(places) == math.prod(grid):
            return torch.tensor([places[t] for t in range(len(places))], dtype=torch.float32, device=device)


def masked_mean(loss, weight, per_image=True):
    """Mean of loss (B, T) under weight (B, T) -> (). Within each image first (MaskGIT), or over the batch (GIVT, TiTok).

    Per image, one with a single hidden token counts as much as one with all of them hidden.
    """
    if per_image:
        return ((loss * weight).sum(1) / weight.sum(1)).mean()
    return (loss * weight).sum() / weight.sum()


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


class MaskGIT(nn.Module):
    """p(hidden tokens | seen tokens, class), each on its own. Give vocab_size for ids or token_dim for real vectors.

    u_max: training hides ceil(T cos(pi/2 u)) tokens, u ~ U(0, u_max). MaskGIT's 1; GIVT has 0.7, which never hides less
    than 45%. choice_temperature weighs the noise of the choice: 4.5 for ids (MaskGIT). Log densities of real vectors
    spread much wider: GIVT takes 35 for 16 numbers per token; 2 per number is the default here.
    smoothing, for ids: a tenth of the target goes to all V ids alike (MaskGIT). A perfect model then draws a wild id every
    tenth time; among 1000 ids it has a low log p and is hidden again, among a few it is not: set 0 for a small V.
    seen_weight is the weight of tokens that are not hidden: 0, TiTok's 0.1 with train_schedule="arccos".
    style: of the blocks, see EncoderBlock; "uvit" has an odd n_layer, and long skips around the one in the middle.
    """

    def __init__(self, head, seq_len, num_classes, token_dim=None, vocab_size=None, grid=None, n_layer=6, n_head=4,
                 n_embd=192, hidden=None, dropout=0.0, label_drop=0.1, u_max=1.0, choice_temperature=None, style="givt",
                 smoothing=0.1, seen_weight=0.0, train_schedule="cosine"):
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"n_embd {n_embd} over n_head {n_head} must be a whole head width")
        if style == "uvit" and n_layer % 2 == 0:
            raise ValueError(f"style uvit needs an odd n_layer, as many blocks after the middle as before, not {n_layer}")
        self.seq_len, self.num_classes, self.token_dim, self.vocab_size = seq_len, num_classes, token_dim, vocab_size
        self.grid, self.label_drop, self.u_max = tuple(grid or (seq_len,)), label_drop, u_max
        self.smoothing, self.seen_weight, self.train_schedule = smoothing, seen_weight, train_schedule
        usual = 4.5 if vocab_size else 2.0 * token_dim
        self.choice_temperature = usual if choice_temperature is None else choice_temperature
        if vocab_size and head.groups > 1:                  # the head holds the embeddings of the ids' digits
            self.tok_embed, self.hid_value = None, nn.Parameter(torch.randn(n_embd) * n_embd ** -0.5)
        elif vocab_size:
            self.tok_embed = nn.Embedding(vocab_size + 1, n_embd)                           # the last row: "hidden"
        else:                                               # a hidden vector has no value: half of the width says which
            self.tok_embed = nn.Linear(token_dim, n_embd // 2)                              # are hidden (GIVT: "concat")
            self.hid_embed = nn.Embedding(2, n_embd - n_embd // 2)                          # seen, hidden
            self.hid_value = nn.Parameter(torch.zeros(n_embd // 2))                         # what stands for the value
        self.cls_embed = nn.Embedding(num_classes + 1, n_embd)                              # the last row: "no class"
        self.pos_embed = nn.Parameter(torch.zeros(1 + seq_len, n_embd))
        self.norm_in = nn.LayerNorm(n_embd, EPS[style]) if style == "bert" else nn.Identity()
        self.blocks = nn.ModuleList([EncoderBlock(n_embd, n_head, hidden, dropout, style) for _ in range(n_layer)])
        self.norm = nn.Identity() if style == "bert" else nn.LayerNorm(n_embd, EPS[style])
        # A U-ViT's long skips (https://arxiv.org/abs/2209.12152): the last block also sees what left the first, and so on.
        self.merges = nn.ModuleList([nn.Linear(2 * n_embd, n_embd) for _ in range(n_layer // 2 if style == "uvit" else 0)])
        self.dropout = nn.Dropout(dropout)
        for module in self.modules():                       # embeddings as large as GIVT's: with 0.02 a small model needs
            if isinstance(module, nn.Embedding):            # several times the steps to find out where its tokens stand
                nn.init.normal_(module.weight, std=n_embd ** -0.5)
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.pos_embed, std=n_embd ** -0.5)
        self.head = head                                    # last, so that it keeps its own initialisation

    def embed(self, tokens, mask):
        """tokens (B, T[, D]), of which hidden ones are not looked at -> (B, T, C). The lines that know the token type."""
        if self.tok_embed is None:
            return torch.where(mask[..., None], self.hid_value, self.head.embed(tokens))
        if self.vocab_size:
            return self.tok_embed(torch.where(mask, self.vocab_size, tokens))
        value = self.tok_embed(tokens)
        value = torch.where(mask[..., None], self.hid_value.type_as(value), value)
        return torch.cat([self.hid_embed(mask.long()).type_as(value), value], -1)

    def hidden(self, tokens, cond, mask):
        """tokens (B, T[, D]), cond (B,), mask (B, T) True = hidden -> h (B, T, C). Hidden tokens are not looked at."""
        x = torch.cat([self.cls_embed(cond)[:, None], self.embed(tokens, mask)], 1) + self.pos_embed   # (B, 1 + T, C)
        x, half, passed = self.dropout(self.norm_in(x)), len(self.merges), []
        for i, block in enumerate(self.blocks):
            if i > half > 0:
                x = self.merges[i - half - 1](torch.cat([x, passed.pop()], -1))
            x = block(x)
            passed += [x] if i < half else []
        return self.norm(x[:, 1:])

    def logits(self, tokens, cond, mask):
        """tokens (B, T) int64, cond (B,), mask (B, T) -> (B, T, V). For a categorical head."""
        return self.head.logits(self.hidden(tokens, cond, mask))

    def training_mask(self, B, device):
        """-> mask (B, T): ceil(T cos(pi/2 u)) tokens of each row, drawn without replacement. GIVT section 3.5."""
        n = n_hidden(torch.rand(B, 1, device=device) * self.u_max, self.seq_len, self.train_schedule)
        return torch.rand(B, self.seq_len, device=device).argsort(1).argsort(1) < n

    def forward(self, tokens, cond):
        """tokens (B, T[, D]), cond (B,) int64 -> mean loss per hidden token (), logs.

        While training, a tenth of the labels become "no class" for guidance. Not a likelihood of the image: the tokens
        hidden together are predicted each on its own. logs for ids, both over the hidden tokens alone: nll (nats per
        token, without the smoothing that the loss has) and accuracy. With the seen ones, copying would count as skill.
        """
        if self.training and self.label_drop > 0:
            drop = torch.rand(cond.shape, device=cond.device) < self.label_drop
            cond = torch.where(drop, self.num_classes, cond)
        mask = self.training_mask(len(tokens), tokens.device)
        h = self.hidden(tokens, cond, mask)
        weight = mask + self.seen_weight * ~mask                                            # (B, T): static shapes
        if not self.vocab_size:
            return masked_mean(self.head.loss(h, tokens), weight, per_image=False), {}
        log_p, digits = self.head.digit_logits(h).log_softmax(-1), self.head.digits(tokens)      # (B, T, groups, base), ...
        nll = -log_p.gather(-1, digits.unsqueeze(-1)).squeeze(-1).sum(-1)                   # (B, T)
        loss = (1 - self.smoothing) * nll - self.smoothing * log_p.mean(-1).sum(-1)
        hit = (log_p.detach().argmax(-1) == digits).all(-1).float()
        logs = {"nll": masked_mean(nll.detach(), mask, False), "accuracy": masked_mean(hit, mask, False)}
        return masked_mean(loss, weight, per_image=not self.seen_weight), logs

    @torch.no_grad()
    def sample(self, cond, steps=None, cfg=1.0, temperature=1.0, known=None, known_mask=None, on_step=None,
               schedule="cosine", choice_temperature=None, order="confidence", **tricks):
        """cond (B,) int64 labels -> tokens (B, T[, D]), drawn in `steps` passes (default: 12, or T if that is less).

        known (B, T[, D]) with known_mask (B, T) True where a token is given: it stays and all others see it, so holes
        anywhere can be filled. cfg is the guidance scale of the head, 1 is off; both branches share one forward pass.
        order: "confidence", MaskGIT's, or "halton", a fixed order spread over the grid, without a look at confidence;
        the same model serves both. on_step(i, tokens, mask) after each step, mask True where still hidden, tokens with
        what was just drawn there. tricks go to the head.
        """
        B, T, device = len(cond), self.seq_len, cond.device
        steps = min(12, T) if steps is None else steps
        if not 1 <= steps <= T:
            raise ValueError(f"steps must be 1 to {T}, the number of tokens, not {steps}")
        if order not in ("confidence", "halton"):
            raise ValueError(f"order {order!r} is neither 'confidence' nor 'halton'")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule {schedule!r} is not one of {', '.join(SCHEDULES)}")
        weight = self.choice_temperature if choice_temperature is None else choice_temperature
        turn = halton_rank(self.grid, device) if order == "halton" else None
        shape = (B, T) if self.vocab_size else (B, T, self.token_dim)
        tokens = torch.zeros(shape, device=device, dtype=torch.long if self.vocab_size else torch.float32)
        mask = torch.ones(B, T, dtype=torch.bool, device=device)
        if known is not None:
            tokens, mask = known.to(tokens), ~known_mask
        n_start, guided = mask.sum(1, keepdim=True), cfg != 1.0
        rows = torch.cat([cond, torch.full_like(cond, self.num_classes)]) if guided else cond
        for i in range(steps):
            seen = (torch.cat([tokens, tokens]), torch.cat([mask, mask])) if guided else (tokens, mask)
            h = self.hidden(seen[0], rows, seen[1])                                         # (B or 2B, T, C)
            h, h_uncond = h.chunk(2) if guided else (h, None)
            new, log_p = self.head.sample(h, h_uncond, cfg, temperature, **tricks)          # (B, T[, D]), (B, T)
            tokens = torch.where(mask.view(B, T, *[1] * (new.ndim - 2)), new, tokens)
            # Confidence stays in log space: exp of a log density in 16 dimensions overflows (and then the authors' code
            # hides known tokens again). The noise fades to 0 with the last step, which reveals everything.
            gumbel = -torch.log(-torch.log(torch.rand(B, T, device=device).clamp(1e-20, 1 - 1e-7)))
            score = log_p + weight * (1 - (i + 1) / steps) * gumbel if turn is None else -turn.expand(B, T)
            n = torch.minimum(still_hidden(n_start, i, steps, schedule), mask.sum(1, keepdim=True) - 1)   # one at least
            mask = mask & keep_hidden(score.masked_fill(~mask, math.inf), n)
            if on_step is not None:
                on_step(i, tokens, mask)
        return tokens

    @torch.no_grad()
    def sample_titok(self, cond, steps=8, cfg=4.5, temperature=9.5, cfg_schedule="linear", anneal=True, on_step=None):
        """TiTok's own sampler, for its weights and its numbers: cond (B,) int64 -> ids (B, T). All T tokens are drawn.

        Unlike sample, it takes the likeliest id under noise that fades, and reveals by the raw logit of that id under such
        noise, not by its probability; arccos counts. cfg is theirs, c + cfg (c - u), constant or growing by equal steps from
        0, or, as "power-cosine", the usual scale, from 1 up to cfg. anneal: logits / (0.5 + 0.8 (1 - progress)). Published
        as (steps, temperature, cfg): L-32 (8, 9.5, 4.5) and B-64 (8, 11, 3), linear; S-128 (64, 2.8, 6.9), power-cosine.
        """
        B, T, device = len(cond), self.seq_len, cond.device
        gumbel = lambda *shape: -(-torch.rand(shape, device=device).clamp(min=1e-20).log()).clamp(min=1e-20).log()
        tokens, mask = torch.zeros(B, T, dtype=torch.long, device=device), torch.ones(B, T, dtype=torch.bool, device=device)
        rows, left = torch.cat([cond, torch.full_like(cond, self.num_classes)]), T
        scales = {"constant": lambda r: 1 + cfg, "linear": lambda r: 1 + cfg * r,
                  "power-cosine": lambda r: 1 + (cfg - 1) * (1 - math.cos(math.pi * r**3)) / 2}
        if cfg_schedule not in scales:
            raise ValueError(f"cfg_schedule {cfg_schedule!r} is not one of {', '.join(scales)}")
        for i in range(steps):
            r, scale = (i + 1) / steps, scales[cfg_schedule](i / steps)
            c, u = self.logits(tokens.repeat(2, 1), rows, mask.repeat(2, 1)).chunk(2)                       # (B, T, V)
            logits = (u + scale * (c - u)) / (0.5 + 0.8 * (1 - r) if anneal else 1)
            new = (logits + temperature * (1 - r) * gumbel(*logits.shape)).argmax(-1)
            tokens = torch.where(mask, new, tokens)
            score = logits.gather(-1, new.unsqueeze(-1)).squeeze(-1) + temperature * (1 - r) * gumbel(B, T)
            left = 0 if i + 1 == steps else max(1, min(left - 1, math.floor(T * math.acos(r) / (math.pi / 2))))
            mask = mask & keep_hidden(score.masked_fill(~mask, math.inf), left)
            if on_step is not None:
                on_step(i, tokens, mask)
        return tokens

    @classmethod
    def from_official(cls, state_dict, n_head=16):
        """TiTok's generator, a BERT or, for 128 tokens, a U-ViT: a state dict or a path -> MaskGIT in eval mode.

        Their ids are one table: V codes, hidden, the classes, no class. The sizes are read off the shapes; n_head they
        do not tell. Trained with seen_weight 0.1 and arccos masks, which the model keeps for further training. Their
        sampler is sample_titok. Refuses unknown or missing keys by name.
        """
        if not isinstance(state_dict, dict):
            state_dict = load_weights(state_dict)
        sd = {k.removeprefix("model."): v.float() for k, v in state_dict.items() if not k.endswith("position_ids")}
        uvit = "mid_block.norm1.weight" in sd
        table, place, out, fc1 = (("embeddings.weight", "pos_embed", "lm_head.weight", "mid_block.mlp.fc1.weight") if uvit else
                                  ("embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight",
                                   "lm_head.weight", "encoder.layer.0.intermediate.dense.weight"))
        lost = [k for k in (table, place, out, fc1) if k not in sd]
        if lost:
            raise ValueError(f"not the weights of TiTok's generator: missing {lost}")
        (V, n_embd), T = sd[out].shape, sd[place].shape[-2] - 1
        half = len({k.split(".")[1] for k in sd if k.startswith("in_blocks.")})
        n_layer = 2 * half + 1 if uvit else len({k.split(".")[2] for k in sd if k.startswith("encoder.layer.")})
        head = CategoricalHead(n_embd, V)
        head.proj = nn.Linear(n_embd, V)                    # theirs has a bias
        model = cls(head, T, len(sd[table]) - V - 2, vocab_size=V, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                    hidden=len(sd[fc1]), dropout=0.1, style="uvit" if uvit else "bert", seen_weight=0.1,
                    train_schedule="arccos")
        names = uvit_names(half) if uvit else bert_names(n_layer)                           # theirs: ours
        missing, unknown = [k for k in names if k not in sd], [k for k in sd if k not in names]
        if missing or unknown:
            raise ValueError(f"the generator's weights do not fit: missing {missing[:3]}, unknown {unknown[:3]}")
        ours = {name: sd[key] for key, name in names.items() if name}
        for i in range(0 if uvit else n_layer):
            for kind in ("weight", "bias"):
                qkv = [sd[f"encoder.layer.{i}.attention.self.{n}.{kind}"] for n in ("query", "key", "value")]
                ours[f"blocks.{i}.wqkv.{kind}"] = torch.cat(qkv)
        ours["tok_embed.weight"], ours["cls_embed.weight"] = sd[table][:V + 1], sd[table][V + 1:]
        ours["pos_embed"] = sd[place][0] if uvit else sd[place] + sd["embeddings.token_type_embeddings.weight"][0]   # type 0
        model.load_state_dict(ours)
        return model.eval()


def bert_names(n_layer):
    """The keys of a BERT of n_layer layers with its output layer -> ours, None where from_official puts it together."""
    names = {f"embeddings.{n}_embeddings.weight": None for n in ("word", "position", "token_type")}
    for kind in ("weight", "bias"):
        names |= {f"embeddings.LayerNorm.{kind}": f"norm_in.{kind}", f"lm_head.{kind}": f"head.proj.{kind}"}
        for i in range(n_layer):
            layer, block = f"encoder.layer.{i}", f"blocks.{i}"
            names |= {f"{layer}.attention.self.{n}.{kind}": None for n in ("query", "key", "value")}
            names |= {f"{layer}.attention.output.dense.{kind}": f"{block}.wo.{kind}",
                      f"{layer}.attention.output.LayerNorm.{kind}": f"{block}.norm1.{kind}",
                      f"{layer}.intermediate.dense.{kind}": f"{block}.fc1.{kind}",
                      f"{layer}.output.dense.{kind}": f"{block}.fc2.{kind}",
                      f"{layer}.output.LayerNorm.{kind}": f"{block}.norm2.{kind}"}
    return names


def uvit_names(half):
    """The keys of a U-ViT of half + 1 + half blocks with its output layer -> ours, None as in bert_names."""
    names = {"embeddings.weight": None, "pos_embed": None}
    theirs = [f"in_blocks.{i}" for i in range(half)] + ["mid_block"] + [f"out_blocks.{i}" for i in range(half)]
    parts = {"norm1": "norm1", "attn.proj": "wo", "norm2": "norm2", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}
    for kind in ("weight", "bias"):
        names |= {f"norm.{kind}": f"norm.{kind}", f"lm_head.{kind}": f"head.proj.{kind}"}
        names |= {f"out_blocks.{i}.skip_linear.{kind}": f"merges.{i}.{kind}" for i in range(half)}
        names |= {f"{block}.{a}.{kind}": f"blocks.{i}.{b}.{kind}" for i, block in enumerate(theirs) for a, b in parts.items()}
    return names | {f"{block}.attn.qkv.weight": f"blocks.{i}.wqkv.weight" for i, block in enumerate(theirs)}


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
# Demo: two worlds of ids. Of bars-and-stripes every probability is known, so the error of drawing many tokens at once can
# be measured exactly; small drawn shapes in four greys show the masks and the pictures that grow behind them.

def bars_and_stripes(n, device, side=4):
    """n pictures uniform over the 2 (2^side - 1) distinct ones with full rows or full columns -> (n, side^2) int64."""
    bits = torch.arange(1 << side, device=device)[:, None] >> torch.arange(side, device=device) & 1
    rows = bits[:, :, None].expand(-1, -1, side)
    all_ = torch.cat([rows, rows.transpose(1, 2)[1:-1]]).flatten(1)                         # blank and full only once
    return all_[torch.randint(len(all_), (n,), device=device)]


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


def error_of_parallel_decoding(model, steps, n=1500, **options):
    """Draw n bars-and-stripes in `steps` passes -> share that are valid, total variation to uniform over the 30.

    1500 draws from the truth itself would show a total variation of 0.06.
    """
    device = model.pos_embed.device
    drawn = model.sample(torch.zeros(n, dtype=torch.long, device=device), steps=steps, **options)
    all_ = bars_and_stripes(5000, device).unique(dim=0)                                     # (30, 16)
    p = (drawn[:, None] == all_[None]).all(-1).float().mean(0)                              # (30,)
    return p.sum().item(), 0.5 * ((p - 1 / 30).abs().sum() + 1 - p.sum()).item()


ORDERS = {"confidence with noise": {}, "confidence alone": dict(choice_temperature=0.0), "halton": dict(order="halton")}


def show_passes(passes, errors, painted, trace, names):
    """maskgit.png: masks and pictures pass by pass, painted halves, errors against the number of passes.

    errors: {order: [(valid, distance), ...]}; painted: rows (text, values (8, S, S)); trace: per pass (tokens, mask) of
    len(names) samples, each (n, S, S). Values are greys 0 .. 3, below 0 where hidden.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig = plt.figure(figsize=(12.5, 8))
    left, right = fig.add_gridspec(1, 2, width_ratios=[2.1, 1], left=0.115, right=0.985, top=0.86, bottom=0.07, wspace=0.17)
    rows = []
    for k, name in enumerate(names):
        rows.append((f"{name}:\nkept tokens", [torch.where(mask[k], -1, x[k]) for x, mask in trace]))
        rows.append(("all that is\ndrawn", [x[k] for x, _ in trace]))
    rows += painted
    heights = [1.0 if r % 2 == 0 else 1.12 for r in range(len(rows))]
    cells = left.subgridspec(len(rows), len(trace), wspace=0.06, hspace=0.1, height_ratios=heights)
    for r, (text, values) in enumerate(rows):
        for c, picture in enumerate(values):
            ax, picture = fig.add_subplot(cells[r, c]), picture.float().cpu()
            ax.imshow(picture.masked_fill(picture < 0, torch.nan), cmap="gray", vmin=0, vmax=3)
            ax.set(xticks=[], yticks=[], facecolor="#8fbce6")
            if r == 0:
                ax.set_title(f"pass {c + 1}", fontsize=10)
            if c == 0:
                ax.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)
    cells = right.subgridspec(3, 1, hspace=0.62)
    panels = ("% of samples that are bars or stripes", 100), ("total variation to the truth (0: none)", 1)
    for k, (title, factor) in enumerate(panels):
        ax = fig.add_subplot(cells[k])
        for (name, pairs), style in zip(errors.items(), ("o-", "s--", "^:")):
            ax.plot(passes, [factor * pair[k] for pair in pairs], style, label=name)
        ax.set(xscale="log", xlabel="passes for the 16 tokens of a 4 x 4 picture",
               ylim=(0, 1.08 * factor), title=title)
        ax.set_xticks(passes, passes)
        ax.minorticks_off()
    ax.legend(fontsize=8)
    ax, r = fig.add_subplot(cells[2]), torch.linspace(0, 1, 100)
    for name, share in SCHEDULES.items():
        ax.plot(r, share(r), label=name)
    ax.set(xlabel="share of the passes done", title="share of the tokens still hidden")
    ax.legend(fontsize=8)
    fig.suptitle("maskgit.py: every pass draws all hidden tokens (blue) at once and keeps those it is most confident of\n"
                 "left: 64 tokens in 8 passes, below a half that is given;   right: many passes cost time, few passes "
                 "cost truth", fontsize=12)
    fig.savefig("maskgit.png", dpi=80)


def main():
    parser = argparse.ArgumentParser(description="Masked tokens filled in, many at a time.")
    parser.add_argument("--image_size", type=int, default=8, help="side of the little drawn shapes, in pixels")
    parser.add_argument("--steps", type=int, default=500, help="training steps on the drawn shapes")
    args = parser.parse_args()
    import data
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    bars = MaskGIT(CategoricalHead(64, 2), 16, 1, vocab_size=2, grid=(4, 4), n_layer=2, n_head=4, n_embd=64, label_drop=0,
                   smoothing=0).to(device)                  # with 0.1 and two ids, a perfect model errs in 5% of its draws
    zeros = torch.zeros(256, dtype=torch.long, device=device)
    fit_ids(bars, lambda step: (bars_and_stripes(256, device), zeros), 450, 3e-3)
    passes, errors = (1, 2, 4, 8, 16), {}
    for name, options in ORDERS.items():
        errors[name] = [error_of_parallel_decoding(bars.eval(), n, **options) for n in passes]
        print(f"bars-and-stripes, {name:21s} " + "   ".join(f"{n} pass{'es' * (n > 1)}: {valid:.0%} valid, off by {tv:.2f}"
                                                           for n, (valid, tv) in zip(passes, errors[name])))

    side, levels, n_pass = args.image_size, 4, 8
    images, labels, _, _ = data.draw(torch.arange(8000, device=device), side)
    greys = ((images.amax(1) + 1) / 2 * levels).long().clamp(0, levels - 1).flatten(1)      # (N, side^2) ids
    model = MaskGIT(CategoricalHead(96, levels), side * side, 10, vocab_size=levels, grid=(side, side), n_layer=3, n_head=3,
                    n_embd=96, smoothing=0).to(device)
    start = time.perf_counter()

    def batch(step):
        i = torch.randint(8000, (32,), device=device)
        return greys[i], labels[i]
    fit_ids(model, batch, args.steps)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        logs = model.eval()(greys[:1000], labels[:1000])[1]
    print(f"drawn shapes in {levels} greys: {logs['nll']:.3f} nats per hidden pixel, {logs['accuracy']:.0%} of them guessed "
          f"right, after {seconds:.0f} s")
    kinds, trace, square = [4, 6, 9], [], (-1, side, side)  # star, ring, crescent
    start = time.perf_counter()
    model.sample(torch.tensor(kinds, device=device), steps=n_pass, cfg=2.0,
                 on_step=lambda i, x, mask: trace.append((x.view(square), mask.view(square))))
    print(f"3 samples of {side * side} tokens in {n_pass} passes with guidance: {time.perf_counter() - start:.2f} s")
    cond = torch.arange(n_pass, device=device)
    whole = greys[[int((labels == k).nonzero()[0]) for k in range(n_pass)]]                 # one picture of each class
    hole = (torch.arange(side * side, device=device) % side >= side // 2).expand(n_pass, -1)               # the right half
    filled = model.sample(cond, steps=n_pass, cfg=2.0, known=whole, known_mask=~hole)
    painted = [("other eight:\nleft half given", torch.where(hole, -1, whole).view(square)),
               ("right half\npainted", filled.view(square))]
    show_passes(passes, errors, painted, trace, [data.SHAPES[k] for k in kinds])
    print("wrote maskgit.png")


if __name__ == "__main__":
    main()
