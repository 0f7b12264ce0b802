"""
MaskGIT: write an image in a few passes, many tokens in each.

An autoregressive model needs one pass per token. MaskGIT (Chang et al. 2022, arxiv.org/abs/2202.04200) masks
a random part of the tokens and learns to predict each of them from the tokens that are not masked:

    loss = mean over the masked t of  -log p(x_t | class, tokens that are not masked)

To write an image, start with all tokens masked. Each pass draws every masked token, keeps those with the
highest confidence, and masks the others again. Confidence is log p of the value drawn plus noise that fades.
With real vectors and a Gaussian mixture, whose density is the confidence, this is GIVT-MaskGIT (section 3.5
of arxiv.org/abs/2312.02116): only the embedding of a token and the head differ.

Shapes:  B batch, T tokens, V vocabulary or D numbers in a token, C width (n_embd); mask True where masked

    tokens (B, T[, D]), mask (B, T) --embed--> (B, T, C) --class, blocks--> h (B, T, C) --head--> p(x_t)

    python maskgit.py          # learns small drawn shapes, writes maskgit.png; about a minute on one CPU core

Try it yourself:
  1. Sample the shapes with choice_temperature=0, so without noise. What do all pictures have in common?
  2. Average the loss over all tokens instead of the masked ones. It falls faster. Why does that mean nothing?
  3. Sample with schedule="linear" in 4 passes. Why does it hurt to keep many tokens after the first pass?
"""
import argparse
import functools
import itertools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

SIZES = {
    "nano": dict(n_layer=4, n_head=2, n_embd=64),
    "tiny": dict(n_layer=4, n_head=4, n_embd=128),                    # the default on a CPU, for ids
    "small": dict(n_layer=6, n_head=4, n_embd=192),                   # and for vectors
    "medium": dict(n_layer=12, n_head=6, n_embd=384),                 # the default on a GPU
    "maskgit": dict(n_layer=24, n_head=8, n_embd=768, dropout=0.1, smoothing=0.1),    # the paper's, pre-norm
    "givt": dict(n_layer=24, n_head=16, n_embd=1024, dropout=0.4),    # GIVT-MaskGIT, 304M with its head
}
SCHEDULES = {                                               # share of the tokens still masked at progress r
    "cosine": lambda r: torch.cos(math.pi / 2 * r),
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r * r,
    "arccos": lambda r: torch.acos(r) / (math.pi / 2),
}


# ---- The transformer and its head ----------------------------------------------------------------

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


class EncoderBlock(nn.Module):
    """A pre-norm transformer block in which every position attends to every other. Biases in the MLP only.

    Dropout falls on the attention weights, on what the attention returns and inside the MLP, as in GIVT.
    """

    def __init__(self, n_embd, n_head, n_mlp=None, dropout=0.0):
        super().__init__()
        n_mlp = n_mlp or 4 * n_embd
        self.n_head = n_head
        self.norm1 = nn.LayerNorm(n_embd, eps=1e-6, bias=False)
        self.wqkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.wo = nn.Linear(n_embd, n_embd, bias=False)
        self.norm2 = nn.LayerNorm(n_embd, eps=1e-6, bias=False)
        self.fc1 = nn.Linear(n_embd, n_mlp)
        self.fc2 = nn.Linear(n_mlp, n_embd)
        self.gelu = nn.GELU("tanh")
        self.dropout = nn.Dropout(dropout)

    def attend(self, x, mask=None):
        B, S, C = x.shape
        q, k, v = self.wqkv(x).view(B, S, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, n_head, S, d) each
        y = attention(q, k, v, mask, dropout=self.dropout.p if self.training else 0.0)
        return self.dropout(self.wo(y.transpose(1, 2).reshape(B, S, C)))

    def mlp(self, x):
        return self.fc2(self.dropout(self.gelu(self.fc1(x))))

    def forward(self, x, mask=None):
        """x (B, S, C) -> (B, S, C). mask (B, 1, 1, S): True where attended, None: everywhere."""
        x = x + self.attend(self.norm1(x), mask)
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


# ---- How many tokens are masked, and which -------------------------------------------------------

def n_masked(u, T):
    """Training: how many of T tokens to mask, ceil(T cos(pi/2 u)) and at least 1, for u in [0, 1]."""
    return (T * torch.cos(math.pi / 2 * u)).ceil().clamp(1, T)


def n_still_masked(n_start, step, steps, schedule="cosine"):
    """Sampling: how many of n_start (B, 1) masked tokens stay masked after step 0 .. steps - 1 -> (B, 1).

    floor(n_start * SCHEDULES[schedule](r)), r = (step + 1) / steps, each row by its own n_start (section
    3.2). With the cosine, few are kept in the first passes, where little is known, and many in the last. In
    float32 as the authors' code: 127 of 256 at r = 2/3, where exact arithmetic gives 128. There cos(pi / 2)
    is a little below 0, hence the clamp.
    """
    r = torch.full((), (step + 1) / steps, device=n_start.device)
    return (n_start * SCHEDULES[schedule](r).clamp(1e-6, 1)).floor().long()


def lowest(score, n):
    """True at the n (B, 1) lowest of score (B, T) -> (B, T). Of equal ones the earlier counts as lower."""
    order = score.argsort(dim=1, stable=True)
    first = (torch.arange(score.shape[1], device=score.device) < n).expand_as(order)
    return torch.zeros_like(first).scatter(1, order, first)


def masked_mean(x, mask, per_image=True):
    """Mean of x (B, T) over the masked tokens -> (). Per image first (MaskGIT), or over the batch (GIVT).

    mask (B, T): bool, or weights of real numbers that count as they are. x may be bool, too.
    """
    if per_image:                                           # however few are masked, an image counts in full
        return ((x * mask).sum(1) / mask.sum(1)).mean()
    return (x * mask).sum() / mask.sum()


# ---- The model -----------------------------------------------------------------------------------

class MaskGIT(nn.Module):
    """p(x_t | class, tokens not masked) for each masked t. Give vocab_size for ids, token_dim for vectors.

    u_max: training masks ceil(T cos(pi/2 u)) tokens with u ~ U(0, u_max): MaskGIT has 1, GIVT 0.7.
    choice_temperature: weight of the noise in the confidence, 4.5 for ids (MaskGIT). Log densities of vectors
    spread wider: GIVT takes 35 for 16 numbers per token; the default here is 2 for each number.
    smoothing: for ids, the share of the target that is spread over all V ids, 0.1 in the paper. It keeps a
    large model from being too sure, and makes each model draw wrong ids: small ones draw shapes better at 0.
    text: (P, "bytes") or (P, E). The condition is a caption then, see CaptionEmbedder, and not a class.
    """

    def __init__(self, head, seq_len, num_classes, token_dim=None, vocab_size=None, grid=None, n_layer=6,
                 n_head=4, n_embd=192, n_mlp=None, dropout=0.0, label_drop=0.1, smoothing=0.0, u_max=1.0,
                 choice_temperature=None, text=None):
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"n_embd {n_embd} must be a multiple of n_head {n_head}")
        if choice_temperature is None:
            choice_temperature = 4.5 if vocab_size else 2.0 * token_dim
        self.seq_len = seq_len
        self.num_classes = num_classes
        self.token_dim = token_dim
        self.vocab_size = vocab_size
        self.grid = tuple(grid or (seq_len,))               # only for the Halton order; positions are learned
        self.label_drop = label_drop
        self.smoothing = smoothing
        self.u_max = u_max
        self.choice_temperature = choice_temperature

        if token_dim:
            self.tok_embed = nn.Linear(token_dim, n_embd)
        elif not hasattr(head, "embed"):                    # lfq.FactorizedHead embeds its ids itself
            self.tok_embed = nn.Embedding(vocab_size, n_embd)
        caption = CaptionEmbedder(*text, n_embd) if text else None
        if not text:
            self.cls_embed = nn.Embedding(num_classes + 1, n_embd)                    # last row: "no class"
        n_prefix = caption.n_rows if text else 1
        self.mask_embed = nn.Parameter(torch.zeros(n_embd))
        self.pos_embed = nn.Parameter(torch.zeros(n_prefix + seq_len, n_embd))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(EncoderBlock(n_embd, n_head, n_mlp, dropout) for _ in range(n_layer))
        self.norm = nn.LayerNorm(n_embd, eps=1e-6)
        self.init_weights(std=n_embd ** -0.5)
        self.caption = caption                              # last, so that they keep their own initialisation
        self.head = head

    def init_weights(self, std):
        """Embeddings start larger than the usual 0.02, with which small models learn positions slowly."""
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_embed, std=std)
        nn.init.normal_(self.pos_embed, std=std)

    def embed(self, tokens, mask):
        """tokens (B, T[, D]), mask (B, T) -> (B, T, C). Masked tokens look alike, whatever their value."""
        embed = self.head.embed if hasattr(self.head, "embed") else self.tok_embed
        x = embed(tokens)                                                             # (B, T, C)
        return torch.where(mask.unsqueeze(-1), self.mask_embed.type_as(x), x)

    def hidden_states(self, tokens, cond, mask):
        """tokens (B, T[, D]), cond (B,) class labels, mask (B, T) -> h (B, T, C), the input of the head.

        cond may be captions (B, P[, E]) instead: their rows stand where the class stands, padding unseen.
        """
        prefix, there = read_condition(self, cond)                                    # (B, 1, C), None
        x = torch.cat([prefix, self.embed(tokens, mask)], dim=1)
        x = self.dropout(x + self.pos_embed)                                          # (B, 1 + T, C)
        attended = None if there is None else there[:, None, None]
        for block in self.blocks:
            x = block(x, attended)
        return self.norm(x[:, -self.seq_len:])                                        # (B, T, C)

    def logits(self, tokens, cond, mask):
        """tokens (B, T) int64, cond (B,), mask (B, T) -> (B, T, V), for a categorical head."""
        return self.head.logits(self.hidden_states(tokens, cond, mask))

    def training_mask(self, B, device):
        """Mask ceil(T cos(pi/2 u)) random tokens of each image, each with its own u -> mask (B, T) bool.

        u is uniform in 0 .. u_max. Exactly so many tokens are masked, and all sets of them are as likely.
        """
        u = torch.rand(B, 1, device=device) * self.u_max
        rank = torch.rand(B, self.seq_len, device=device).argsort(1).argsort(1)       # 0 .. T - 1, shuffled
        return rank < n_masked(u, self.seq_len)

    def forward(self, tokens, cond):
        """tokens (B, T[, D]), cond (B,) class labels or captions -> mean loss of the masked tokens (), logs.

        While training, a tenth of the labels become "no class", for guidance. The loss is no likelihood of
        the image, because tokens masked together are predicted independently. logs, for ids: nll without
        smoothing and accuracy, of the masked tokens only, because the others need only be copied.
        """
        if self.training and self.label_drop > 0:
            cond = drop_conditions(self, cond)
        mask = self.training_mask(len(tokens), tokens.device)                         # (B, T)
        h = self.hidden_states(tokens, cond, mask)                                    # (B, T, C)
        if self.token_dim:
            return masked_mean(self.head.loss(h, tokens), mask, per_image=False), {}
        loss = self.head.loss(h, tokens, self.smoothing)                              # (B, T)
        # With smoothing the logs project h twice more: 3% of a step of "small" at V = 512, 14% at 4096.
        with torch.no_grad():
            nats = self.head.loss(h, tokens) if self.smoothing else loss
            nll = masked_mean(nats, mask, per_image=False)
            accuracy = masked_mean(self.head.argmax(h) == tokens, mask, per_image=False)
        return masked_mean(loss, mask), {"nll": nll, "accuracy": accuracy}

    @torch.no_grad()
    def sample(self, cond, steps=None, cfg=1.0, temperature=1.0, known=None, known_mask=None, on_step=None,
               schedule="cosine", choice_temperature=None, order="confidence", cfg_schedule="constant",
               **tricks):
        """cond (B,) class labels -> tokens (B, T[, D]), drawn in `steps` passes (default: 12, at most T).

        known (B, T[, D]), known_mask (B, T): tokens that are given stay and all others see them, so any part
        of an image can be filled in. cfg: guidance scale, 1 is off. cfg_schedule: "constant", or "linear",
        from 1 in the first pass up to cfg in the last, so that the first tokens, which decide what the image
        is, stay varied (Muse, arxiv.org/abs/2301.00704, section 2.7). order: keep the tokens of highest
        "confidence", or go in "halton" order. on_step(step, tokens, mask) is called after each pass, when the
        masked tokens still hold what was just drawn. tricks go to the head.
        """
        B, T, device = len(cond), self.seq_len, cond.device
        steps = min(12, T) if steps is None else steps
        if not 1 <= steps <= T:
            raise ValueError(f"steps must be 1 to {T}, the number of tokens, not {steps}")
        if order not in ("confidence", "halton"):
            raise ValueError(f"order must be confidence or halton, not {order}")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {schedule}")
        if cfg_schedule not in ("constant", "linear"):
            raise ValueError(f"cfg_schedule must be constant or linear, not {cfg_schedule}")
        if choice_temperature is None:
            choice_temperature = self.choice_temperature

        mask = torch.ones(B, T, dtype=torch.bool, device=device)
        tokens = torch.zeros(B, T, dtype=torch.long, device=device)
        if self.token_dim:
            tokens = torch.zeros(B, T, self.token_dim, dtype=self.mask_embed.dtype, device=device)
        if known is not None:
            tokens, mask = known.to(tokens), ~known_mask
        n_start = mask.sum(1, keepdim=True)                                           # (B, 1)
        for step in range(steps):
            scale = cfg if cfg_schedule == "constant" else 1 + (cfg - 1) * step / max(1, steps - 1)
            h, h_uncond = self.guided_states(tokens, cond, mask, cfg)                 # (B, T, C), same | None
            drawn, log_p = self.head.sample(h, h_uncond, scale, temperature, **tricks)  # (B, T[, D]), (B, T)
            drawn = drawn.type_as(tokens)
            tokens = torch.where(mask.unsqueeze(-1) if self.token_dim else mask, drawn, tokens)

            gumbel = -torch.log(-torch.log(torch.rand(B, T, device=device).clamp(1e-20, 1 - 1e-7)))
            noise = choice_temperature * (1 - (step + 1) / steps) * gumbel            # (B, T), 0 at last
            score = log_p + noise                           # not exp(log_p): 16-D densities overflow
            if order == "halton":
                score = -halton_rank(self.grid, device).expand(B, T)
            n = n_still_masked(n_start, step, steps, schedule)                        # (B, 1)
            n = torch.minimum(n, mask.sum(1, keepdim=True) - 1)                       # keep at least one
            mask = mask & lowest(score.masked_fill(~mask, math.inf), n)
            if on_step is not None:
                on_step(step, tokens, mask)
        return tokens

    def guided_states(self, tokens, cond, mask, cfg):
        """h with the class and h without it, in one forward pass. Without guidance (cfg 1): h, None."""
        if cfg == 1.0:
            return self.hidden_states(tokens, cond, mask), None
        both = torch.cat([cond, no_condition(self, cond)])
        h = self.hidden_states(torch.cat([tokens, tokens]), both, torch.cat([mask, mask]))
        return h.chunk(2)


# ---- Extras: a fast draw, truncated distributions, an order without confidence, captions -----------

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


@functools.cache
def halton_rank(grid, device=None):
    """The turn of each token in a Halton sequence: grid, such as (rows, columns) -> (T,) float32, 0 is first.

    Point i has the digits of i in base 2, mirrored at the point, as its row in [0, 1), and those in base 3 as
    its column, so successive points lie far apart. Tokens far apart say little about each other, and drawing
    them in one pass costs least. (Halton-MaskGIT, Besnier et al. 2025, arxiv.org/abs/2503.17076)
    """
    turn = {}                                               # token: when it comes
    for i in itertools.count(1):
        token = 0
        for n, base in zip(grid, (2, 3, 5)):
            mirrored, rest, unit = 0.0, i, 1.0
            while rest:
                unit /= base
                mirrored += rest % base * unit
                rest //= base
            token = token * n + int(mirrored * n)
        turn.setdefault(token, len(turn))
        if len(turn) == math.prod(grid):
            return torch.tensor([turn[t] for t in range(len(turn))], dtype=torch.float32, device=device)


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


# ---- Demo: small drawn shapes in four greys show how a picture is written --------------------------

def fit_maskgit(model, tokens, labels, steps, lr=2e-3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 30) * (1 - step / steps)
        i = torch.randint(len(tokens), (32,), device=tokens.device)
        loss, logs = model(tokens[i], labels[i])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: {logs['nll']:.2f} nats per masked token, {logs['accuracy']:.0%} right")


def show_maskgit(rows, path):
    """A row of pictures for each (text, pictures): values 0 .. 3, or -1 where masked."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    n = len(rows[0][1])
    figure, axes = plt.subplots(len(rows), n, figsize=(9, 10), layout="constrained", squeeze=False)
    for line, (text, pictures) in zip(axes, rows):
        line[0].set_ylabel(text)
        for ax, picture in zip(line, pictures):
            picture = picture.float().cpu()
            ax.imshow(picture.masked_fill(picture < 0, math.nan), cmap="gray", vmin=0, vmax=3)
            ax.set(xticks=[], yticks=[], facecolor="#8fbce6")
    figure.suptitle("maskgit.py: each pass draws all masked tokens (blue) and keeps the most confident;\n"
                    "below, the left half of eight pictures is given and the right half is filled in")
    figure.savefig(path, dpi=90)


def main():
    parser = argparse.ArgumentParser(description="MaskGIT on small drawn shapes.")
    parser.add_argument("--image_size", type=int, default=8, help="side of the pictures, in pixels")
    parser.add_argument("--steps", type=int, default=500, help="training steps, 32 pictures each")
    parser.add_argument("--passes", type=int, default=8, help="passes in which a picture is sampled")
    args = parser.parse_args()
    import data
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    size = args.image_size
    images, labels, _, _ = data.draw(torch.arange(8000, device=device), size)
    greys = ((images.amax(1) + 1) / 2 * 4).long().clamp(0, 3).flatten(1)              # (8000, T) ids 0 .. 3
    head = CategoricalHead(96, vocab_size=4)
    model = MaskGIT(head, size ** 2, 10, vocab_size=4, n_layer=3, n_head=3, n_embd=96).to(device)
    fit_maskgit(model, greys, labels, args.steps)
    model.eval()

    rows = []
    for name in ("star", "ring", "crescent"):
        kept, drawn = [], []

        def record(step, tokens, mask):                     # after each pass: tokens (1, T), mask (1, T)
            kept.append(torch.where(mask, -1, tokens).view(size, size))
            drawn.append(tokens.view(size, size))
        label = torch.tensor([data.SHAPES.index(name)], device=device)
        model.sample(label, steps=args.passes, cfg=2.0, on_step=record)
        rows.append((f"{name}:\nkept", kept))
        rows.append(("drawn", drawn))
    n = args.passes
    left = (torch.arange(size ** 2, device=device) % size < size // 2).expand(n, -1)  # (n, T)
    filled = model.sample(labels[:n], steps=n, cfg=2.0, known=greys[:n], known_mask=left)
    rows.append(("given", torch.where(left, greys[:n], -1).view(n, size, size)))
    rows.append(("filled in", filled.view(n, size, size)))
    show_maskgit(rows, "maskgit.png")
    print("wrote maskgit.png")


if __name__ == "__main__":
    main()
