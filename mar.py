"""
MAR: an image model that writes its tokens in random order, several at a time.

A causal transformer reads an image row by row because text is read that way. MAR (Li et al. 2024,
https://arxiv.org/abs/2406.11838) keeps "predict the next tokens from those already there", but lets the next ones be
any set S_k of places, and reads what is there in both directions, as a masked autoencoder (MAE) does:

    p(x_S1, ..., x_SK | c) = prod_k p(x_Sk | c, x_S1, ..., x_Sk-1),     |S_k| grows along a cosine, K <= T

An encoder sees the visible tokens only, a decoder sees everything with one learned vector in each hole, and the head
draws every token of S_k from its own h; within a step the tokens do not see each other. CausalMAR below is the other
side of the paper's ablation: a GPT over a raster or random order, which in random order must be told where to write.

Shapes:  B batch, T tokens, D numbers in a token or V ids, C width (n_embd), P buffer places (n_buffer), n visible

    label (B,) --repeat--> (B, P, C) --cat--> (B, P + T, C) --drop holes--> (B, P + n, C) --encoder--+
    tokens (B, T, D) --Linear--> (B, T, C) --^                                                       v
    head <-- h (B, T, C) <-- drop buffer <-- decoder <-- (B, P + T, C) <-- mask_token in the holes --+

    python mar.py              # order, attention and steps on exact toys; writes mar.png; about 50 s on 2 CPU cores

Try it yourself:
  1. Leave out self.place_ahead[...] in CausalMAR, twice: what do the nats of random order become? And of raster order?
  2. In masked_counts let every step draw equally many (a line in place of the cosine). Are 4 steps better or worse?
  3. Run with --n_buffer 1 and --n_buffer 64. What do the 63 places cost in time, and what do they buy?
"""
import argparse
import math
import time
from statistics import NormalDist

import torch
import torch.nn as nn
import torch.nn.functional as F

SIZES = {
    "tiny": dict(n_layer=4, n_head=4, n_embd=128, n_buffer=4),           # n_layer: half encoder, half decoder
    "small": dict(n_layer=6, n_head=4, n_embd=192, n_buffer=8),          # the default on a CPU
    "medium": dict(n_layer=12, n_head=6, n_embd=384, n_buffer=16),       # the default on a GPU
    "mar-b": dict(n_layer=24, n_head=12, n_embd=768, n_buffer=64),       # the paper's, for 256 tokens of 16 numbers
    "mar-l": dict(n_layer=32, n_head=16, n_embd=1024, n_buffer=64),
    "mar-h": dict(n_layer=40, n_head=16, n_embd=1280, n_buffer=64),
}
HEAD_SIZES = {                                              # of the diffusion head that belongs to each size
    "tiny": dict(width=128, depth=2), "small": dict(width=256, depth=3), "medium": dict(width=512, depth=3),
    "mar-b": dict(width=1024, depth=6), "mar-l": dict(width=1280, depth=8), "mar-h": dict(width=1536, depth=12),
}


# ---------------------------------------------------------------------------------------------------
# Orders, counts and places

def mask_rate(u, low=0.7, std=0.25):
    """Quantile u in [0, 1] of N(1, std^2) cut to [low, 1] -> the fraction of tokens to mask (as published: mean 0.867)."""
    rate = NormalDist(1, std)
    start = rate.cdf(low)
    return rate.inv_cdf(start + u * (rate.cdf(1.0) - start))


def masked_counts(n, steps):
    """How many of n tokens are unknown before each step, and 0 at the end: -> list of steps + 1 falling ints.

    n cos(pi/2 k/steps), at least one token per step: few at first, when little is known, many at last. (MaskGIT, MAR)
    """
    counts = [n]
    for k in range(1, steps):
        counts.append(max(1, min(counts[-1] - 1, math.floor(n * math.cos(math.pi / 2 * k / steps)))))
    return counts + [0]


def draw_order(kind, B, T, device, known_mask=None):
    """The order in which tokens are written: -> (B, T) int64, a permutation per row; known places come first."""
    keys = torch.rand(B, T, device=device) if kind == "random" else (torch.arange(T, device=device) / T).expand(B, T)
    return (keys if known_mask is None else keys - 2 * known_mask.float()).argsort(1)


def guidance(cfg, schedule, done):
    """The guidance scale of a step after which a fraction `done` of the tokens is known.

    "constant", or "linear", from 1 up to cfg: the first tokens decide what the image is, and strong guidance there
    makes all images alike.
    """
    if schedule not in ("linear", "constant"):
        raise ValueError(f"cfg_schedule {schedule!r} is neither 'linear' nor 'constant'")
    return 1 + (cfg - 1) * done if schedule == "linear" else cfg


def at(tricks, progress):
    """Sampling tricks at a moment from 0 (first step) to 1 (last): functions of the progress become their values."""
    return {k: v(progress) if callable(v) else v for k, v in tricks.items()}


def spread(index, x):                                       # (B, n) -> (B, n[, D]), as gather and scatter want it
    return index.view(*index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])


def take(x, index):
    """The rows `index` (B, n) of x (B, T[, D]) -> (B, n[, D])."""
    return x.gather(1, spread(index, x))


def put(x, index, rows):
    """x (B, T[, D]) with `rows` (B, n[, D]) written at the places `index` (B, n)."""
    return x.scatter(1, spread(index, x), rows.type_as(x))


def embed_tokens(model, x):
    """x (B, n[, D]) -> (B, n, C): by the model's own layer, or by a head that holds the embeddings of its ids' digits."""
    return model.head.embed(x) if model.tok_embed is None else model.tok_embed(x)


def embedding_for(head, n_embd, token_dim, vocab_size):
    """The layer of embed_tokens: of real vectors, of ids, or none."""
    if not vocab_size:
        return nn.Linear(token_dim, n_embd)
    return nn.Embedding(vocab_size, n_embd) if head.groups == 1 else None


def patchify(latents, p=1):
    """A grid of latents (B, c, H, W) -> tokens (B, H/p * W/p, c * p * p), row by row; in a token: (c, row, column)."""
    B, c, H, W = latents.shape
    return latents.view(B, c, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).reshape(B, H // p * (W // p), c * p * p)


def unpatchify(tokens, grid, p=1):
    """The inverse: tokens (B, rows * columns, c * p * p), grid = (rows, columns) -> (B, c, rows * p, columns * p)."""
    return tokens.unflatten(1, grid).unflatten(3, (-1, p, p)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


# ---------------------------------------------------------------------------------------------------
# The transformer block of ViT: learned positions (added outside), LayerNorm, GELU, biases everywhere

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


class ViTAttention(nn.Module):
    """Self-attention; dropout falls on the attention weights and on the output."""

    def __init__(self, n_embd, n_head, dropout=0.0):
        super().__init__()
        self.n_head, self.dropout = n_head, nn.Dropout(dropout)
        self.qkv, self.proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)

    def forward(self, x, keep=None, causal=False, cache=None, start=0):
        """x (B, S, C) -> (B, S, C). keep (B, 1, 1, S) bool: False where nobody may look. causal: nobody looks ahead.
        With cache (2, B, n_head, T, head_dim), x is the one row at place start, S = 1: its key and value are written
        into it, and earlier ones are read from it."""
        B, S, C = x.shape
        q, k, v = self.qkv(x).view(B, S, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)    # (B, n_head, S, ...)
        if cache is not None:
            cache[0, :, :, start:start + S] = k
            cache[1, :, :, start:start + S] = v
            k, v = cache[:, :, :, :start + S].type_as(q)
        p = self.dropout.p if self.training else 0.0
        y = attention(q, k, v, keep, causal and S > 1, p)
        return self.dropout(self.proj(y.transpose(1, 2).reshape(B, S, C)))


class ViTMLP(nn.Module):
    """fc2(gelu(fc1 x)), four times as wide inside."""

    def __init__(self, n_embd, dropout=0.0):
        super().__init__()
        self.fc1, self.fc2, self.dropout = nn.Linear(n_embd, 4 * n_embd), nn.Linear(4 * n_embd, n_embd), nn.Dropout(dropout)

    def forward(self, x):                                   # (..., C) -> (..., C)
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class ViTBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, n_embd, n_head, dropout=0.0):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(n_embd, eps=1e-6), ViTAttention(n_embd, n_head, dropout)
        self.norm2, self.mlp = nn.LayerNorm(n_embd, eps=1e-6), ViTMLP(n_embd, dropout)

    def forward(self, x, **options):                        # (B, S, C) -> (B, S, C); options go to the attention
        x = x + self.attn(self.norm1(x), **options)
        return x + self.mlp(self.norm2(x))


def check_sizes(seq_len, grid, n_head, n_embd, order):
    """Refuse what cannot be built, in a sentence. The places are learned one by one: the grid only has to hold them."""
    if grid is not None and math.prod(grid) != seq_len:
        raise ValueError(f"grid {grid} holds {math.prod(grid)} tokens, not seq_len = {seq_len}")
    if n_embd % n_head:
        raise ValueError(f"n_embd {n_embd} must be a multiple of n_head {n_head}")
    if order not in ("random", "raster"):
        raise ValueError(f"order {order!r} is neither 'random' nor 'raster'")


def vit_init(model):
    """MAR's initialisation: Xavier for every Linear (the fused qkv as one matrix), N(0, 0.02^2) for tables and positions."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for p in model.parameters(recurse=False):
        nn.init.normal_(p, std=0.02)


# ---------------------------------------------------------------------------------------------------
# MAR

class MAR(nn.Module):
    """p(tokens | class) in random order, set by set. Give vocab_size for ids or token_dim for real vectors.

    n_layer: half of it encoder, half decoder, or a pair. n_buffer: copies of the class at places of their own, room to
    think in (64 as published; they are most of the cost where T is small). order: "random" | "raster".
    mask_min, mask_std: see mask_rate. As published nothing with less than 70% masked is ever trained, yet sampling passes
    there: with 256 tokens it carries over, with 9 it does not (the demo), and raster order never trains its last places;
    mask_min=0, mask_std=9 hides any number equally often.
    count_multiple rounds the number of masked tokens up to a multiple. As published 1, so about 0.3 T shapes occur:
    torch.compile turns the number into a symbol and makes 3 graphs. Where shapes must be static (dynamic=False, CUDA
    graphs), 16 leaves 5 of them at T = 256, with 0.90 T instead of 0.87 T masked.
    """

    def __init__(self, head, seq_len, num_classes, token_dim=None, vocab_size=None, grid=None, n_layer=6, n_head=4,
                 n_embd=192, dropout=0.1, label_drop=0.1, n_buffer=64, order="random", mask_min=0.7, mask_std=0.25,
                 count_multiple=1):
        super().__init__()
        check_sizes(seq_len, grid, n_head, n_embd, order)
        if n_buffer < 1:
            raise ValueError(f"n_buffer {n_buffer}: an encoder that sees no token yet needs at least 1 row")
        self.seq_len, self.num_classes, self.token_dim, self.vocab_size = seq_len, num_classes, token_dim, vocab_size
        self.label_drop, self.n_buffer, self.order = label_drop, n_buffer, order
        self.mask_min, self.mask_std, self.count_multiple = mask_min, mask_std, count_multiple
        n_encoder, n_decoder = (n_layer // 2, n_layer - n_layer // 2) if isinstance(n_layer, int) else n_layer
        self.tok_embed = embedding_for(head, n_embd, token_dim, vocab_size)
        self.cls_embed = nn.Embedding(num_classes + 1, n_embd)                              # the last row: "no class"
        self.tok_norm = nn.LayerNorm(n_embd, eps=1e-6)
        self.encoder_pos = nn.Parameter(torch.zeros(n_buffer + seq_len, n_embd))
        self.encoder_blocks = nn.ModuleList([ViTBlock(n_embd, n_head, dropout) for _ in range(n_encoder)])
        self.encoder_norm = nn.LayerNorm(n_embd, eps=1e-6)
        self.decoder_embed = nn.Linear(n_embd, n_embd)
        self.mask_token = nn.Parameter(torch.zeros(1, n_embd))
        self.decoder_pos = nn.Parameter(torch.zeros(n_buffer + seq_len, n_embd))
        self.decoder_blocks = nn.ModuleList([ViTBlock(n_embd, n_head, dropout) for _ in range(n_decoder)])
        self.decoder_norm = nn.LayerNorm(n_embd, eps=1e-6)
        self.head_pos = nn.Parameter(torch.zeros(seq_len, n_embd))                          # the place, told to the head
        vit_init(self)
        self.head = head                                    # last, so that it keeps its own initialisation

    def hidden(self, tokens, labels, mask, n_visible=None):
        """tokens (B, T[, D]), labels (B,) (num_classes: "no class"), mask (B, T) True = unknown -> h (B, T, C).

        h at an unknown place predicts its token; tokens there are not looked at. n_visible: how many tokens are known, if
        every row knows equally many: the encoder then drops the others (MAE: with 87% masked it costs almost nothing).
        Without it nobody looks at them: the same numbers for any mask, at the full price.
        """
        P, T = self.n_buffer, self.seq_len
        x = torch.cat([self.cls_embed(labels)[:, None].expand(-1, P, -1), embed_tokens(self, tokens)], 1)    # (B, P + T, C)
        x = self.tok_norm(x + self.encoder_pos)
        hole = F.pad(mask, (P, 0))                                                          # (B, P + T), buffer never
        keep = None
        if n_visible is None:
            keep = ~hole[:, None, None]                                                     # (B, 1, 1, P + T)
        else:
            places = hole.byte().argsort(dim=1, stable=True)[:, :P + n_visible]             # known ones, in reading order
            x = take(x, places)                                                             # (B, P + n_visible, C)
        for block in self.encoder_blocks:
            x = block(x, keep=keep)
        x = self.decoder_embed(self.encoder_norm(x))
        if n_visible is not None:
            x = put(x.new_zeros(len(x), P + T, x.shape[-1]), places, x)
        x = torch.where(hole[..., None], self.mask_token, x) + self.decoder_pos             # (B, P + T, C)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x[:, P:]) + self.head_pos

    @torch._disable_dynamo                                  # torch.compiler.disable, but loads the compiler (1 s) when called
    def mask_count(self):
        """How many tokens this batch hides: an int. ONE number for all rows, or the encoder's input would be ragged.

        Drawn from torch's CPU generator: reading it back waits for no GPU, and torch.manual_seed() repeats it.
        """
        n = self.seq_len * mask_rate(float(torch.rand((), device="cpu")), self.mask_min, self.mask_std)
        return min(self.seq_len, max(1, math.ceil(n / self.count_multiple)) * self.count_multiple)

    def forward(self, tokens, cond):
        """tokens (B, T[, D]), cond (B,) int64 -> mean loss per MASKED token (), logs.

        Hides 70 to 100% of the tokens; the head is computed for these only, and the visible ones have no loss. While
        training, a tenth of the labels become "no class", which guidance needs.
        """
        if self.training and self.label_drop > 0:
            drop = torch.rand(cond.shape, device=cond.device) < self.label_drop
            cond = torch.where(drop, self.num_classes, cond)
        B, T, n = len(tokens), self.seq_len, self.mask_count()
        hidden = draw_order(self.order, B, T, tokens.device)[:, T - n:]                     # (B, n) the last n places
        mask = torch.zeros(B, T, dtype=torch.bool, device=tokens.device).scatter(1, hidden, True)
        h = self.hidden(tokens, cond, mask, T - n)
        loss = self.head.loss(take(h, hidden), take(tokens, hidden)).mean()
        return loss, {"masked": loss.new_full((), n / T)}

    @torch.no_grad()
    def sample(self, cond, steps=None, cfg=1.0, temperature=1.0, known=None, known_mask=None, on_step=None,
               cfg_schedule="linear", **tricks):
        """cond (B,) int64 labels -> tokens (B, T[, D]) in `steps` <= T sets (default: 64, or T where that is less).

        cfg: guidance scale, 1 is off; cfg_schedule "linear" | "constant", see guidance(). known (B, T[, D]) with known_mask
        (B, T), True where a token is given: any places, any number per row; they are kept and seen from the start.
        on_step(i, tokens, mask) after each step, mask True where still unknown. tricks go to the head; one that is a
        function is asked at every step: diffusion_steps=lambda p: round(50 - 45 * p) goes from 50 to 5.
        """
        B, T, device, fewest, most = len(cond), self.seq_len, cond.device, 0, 0
        if steps is not None and not 1 <= steps <= T:
            raise ValueError(f"{T} tokens can be drawn in 1 to {T} steps, not {steps}")
        tokens = torch.zeros((B, T) if self.vocab_size else (B, T, self.token_dim), device=device,
                             dtype=torch.long if self.vocab_size else torch.float32)
        mask = torch.ones(B, T, dtype=torch.bool, device=device)
        if known is not None:
            fewest, most = torch.stack(known_mask.sum(1).aminmax()).tolist()                # the one wait for the device
            tokens, mask = torch.where(spread(known_mask, tokens), known, tokens), ~known_mask
        order = draw_order(self.order, B, T, device, known_mask)                            # given tokens come first in it
        counts = masked_counts(T - fewest, min(steps or 64, T - fewest)) if fewest < T else [0]
        guided = cfg != 1.0
        rows = torch.cat([cond, torch.full_like(cond, self.num_classes)]) if guided else cond
        both = lambda x: torch.cat([x, x]) if guided else x
        for i, (before, after) in enumerate(zip(counts, counts[1:])):
            picked = order[:, T - before:T - after]         # (B, n): n depends on the step, never on what was drawn
            h = self.hidden(both(tokens), rows, both(mask), T - before if fewest == most else None)
            h = take(h, both(picked))                                                       # (B or 2B, n, C)
            h, h_uncond = h.chunk(2) if guided else (h, None)
            scale, now = guidance(cfg, cfg_schedule, 1 - max(after, 1) / T), at(tricks, i / max(len(counts) - 2, 1))
            new, _ = self.head.sample(h, h_uncond, scale, temperature, **now)               # (B, n[, D])
            if most > fewest:                               # rows that know more than the others keep what they know
                new = torch.where(spread(take(known_mask, picked), new), take(known, picked).type_as(new), new)
            tokens, mask = put(tokens, picked, new), mask.scatter(1, picked, False)
            if on_step is not None:
                on_step(i, tokens, mask)
        return tokens

    @classmethod
    def from_official(cls, state_dict, n_head=None, head=None):
        """Weights of the authors' MAR-B / L / H: a state dict or a path to their .pth -> MAR in eval mode, head included.

        Reads "model_ema", else "model", else a plain dict; the sizes are read off the shapes. n_head: heads do not show in
        shapes; None looks n_embd up in SIZES. head: another head with MAR's parameters under head.net. Tokens are
        posterior samples of their VAE times 0.2325. Refuses unknown or missing keys by name.
        """
        if not isinstance(state_dict, dict):
            with torch.serialization.safe_globals([argparse.Namespace]):                    # their flags lie beside
                state_dict = load_weights(state_dict)
        sd = state_dict.get("model_ema", state_dict.get("model", state_dict))
        names = {"z_proj_ln": "tok_norm", "z_proj": "tok_embed", "encoder_pos_embed_learned": "encoder_pos",
                 "decoder_pos_embed_learned": "decoder_pos", "diffusion_pos_embed_learned": "head_pos",
                 "class_emb": "cls_embed", "diffloss": "head"}
        need = ["class_emb.weight", "fake_latent", "z_proj.weight", "encoder_pos_embed_learned",
                "diffusion_pos_embed_learned", "diffloss.net.input_proj.weight"]
        if lost := [k for k in need if k not in sd]:
            raise ValueError(f"not the weights of a MAR: missing {lost}; the keys begin with {list(sd)[:3]}")
        ours = {}
        for key, value in sd.items():
            first, *rest = key.split(".")
            value = value[0] if value.ndim == 3 else value                                  # positions: (1, n, C) -> (n, C)
            ours[".".join([names.get(first, first), *rest])] = value.float()
        ours["cls_embed.weight"] = torch.cat([ours["cls_embed.weight"], ours.pop("fake_latent")])
        depth = lambda start: len({k[len(start):].split(".")[0] for k in ours if k.startswith(start)})
        (n_embd, token_dim), T = ours["tok_embed.weight"].shape, len(ours["head_pos"])
        n_head = n_head or next((s["n_head"] for s in SIZES.values() if s["n_embd"] == n_embd), None)
        if n_head is None:
            raise ValueError(f"n_embd {n_embd} is none of the published sizes: say n_head=")
        if head is None:
            from diffusion_head import DiffusionHead        # here, so that mar.py alone runs with any other head
            head = DiffusionHead(n_embd, token_dim, len(ours["head.net.input_proj.weight"]), depth("head.net.res_blocks."))
        model = cls(head, T, len(ours["cls_embed.weight"]) - 1, token_dim, n_head=n_head, n_embd=n_embd,
                    n_layer=(depth("encoder_blocks."), depth("decoder_blocks.")), n_buffer=len(ours["encoder_pos"]) - T)
        missing = [k for k in model.state_dict() if k not in ours]
        unknown = [k for k in ours if k not in model.state_dict()]
        if missing or unknown:
            raise ValueError(f"the weights do not fit MAR: missing {missing[:3]}, unknown {unknown[:3]}")
        model.load_state_dict(ours)
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
# The other side of the ablation

class CausalMAR(nn.Module):
    """The same blocks as one causal decoder with a KV cache: a token per step, in raster or random order.

    The authors describe it and did not release it. At place i of the order it reads token i - 1 (at first: the class),
    where that token stands (place_here) and where the next one will (place_ahead): without place_ahead it would have to
    predict a token without knowing which. Other than in MAR, h never sees tokens that come later in the order.
    """

    def __init__(self, head, seq_len, num_classes, token_dim=None, vocab_size=None, grid=None, n_layer=6, n_head=4,
                 n_embd=192, dropout=0.1, label_drop=0.1, order="random"):
        super().__init__()
        check_sizes(seq_len, grid, n_head, n_embd, order)
        self.seq_len, self.num_classes, self.token_dim, self.vocab_size = seq_len, num_classes, token_dim, vocab_size
        self.n_head, self.label_drop, self.order = n_head, label_drop, order
        self.tok_embed = embedding_for(head, n_embd, token_dim, vocab_size)
        self.cls_embed = nn.Embedding(num_classes + 1, n_embd)                              # the last row: "no class"
        self.place_here, self.place_ahead = (nn.Parameter(torch.zeros(seq_len, n_embd)) for _ in range(2))
        self.tok_norm = nn.LayerNorm(n_embd, eps=1e-6)
        self.blocks = nn.ModuleList([ViTBlock(n_embd, n_head, dropout) for _ in range(n_layer)])
        self.norm = nn.LayerNorm(n_embd, eps=1e-6)
        vit_init(self)
        self.head = head                                    # last, so that it keeps its own initialisation

    def hidden(self, tokens, cond, order):
        """tokens (B, T[, D]), cond (B,), order (B, T) -> h (B, T, C): h[:, i] predicts token order[:, i]."""
        e = embed_tokens(self, take(tokens, order[:, :-1])) + self.place_here[order[:, :-1]]    # (B, T - 1, C)
        x = self.tok_norm(torch.cat([self.cls_embed(cond)[:, None], e], 1) + self.place_ahead[order])
        for block in self.blocks:
            x = block(x, causal=True)
        return self.norm(x)

    def forward(self, tokens, cond):
        """tokens (B, T[, D]), cond (B,) int64 -> mean loss per token (), logs: teacher forcing over one order per row."""
        if self.training and self.label_drop > 0:
            drop = torch.rand(cond.shape, device=cond.device) < self.label_drop
            cond = torch.where(drop, self.num_classes, cond)
        order = draw_order(self.order, len(tokens), self.seq_len, tokens.device)
        loss = self.head.loss(self.hidden(tokens, cond, order), take(tokens, order)).mean()
        return loss, {}

    @torch.no_grad()
    def sample(self, cond, steps=None, cfg=1.0, temperature=1.0, known=None, known_mask=None, on_step=None,
               cfg_schedule="linear", **tricks):
        """cond (B,) int64 labels -> tokens (B, T[, D]), one per step; arguments as in MAR.sample. Known tokens come first in
        a random order, so all others see them; in raster order they are kept, and only later tokens see them."""
        B, T, device = len(cond), self.seq_len, cond.device
        if steps not in (None, T):
            raise ValueError(f"a causal model draws one token per step: steps must be {T}, not {steps}")
        order = draw_order(self.order, B, T, device, known_mask if self.order == "random" else None)
        guided = cfg != 1.0
        rows = torch.cat([cond, torch.full_like(cond, self.num_classes)]) if guided else cond
        both = lambda x: torch.cat([x, x]) if guided else x
        tokens = torch.zeros((B, T) if self.vocab_size else (B, T, self.token_dim), device=device,
                             dtype=torch.long if self.vocab_size else torch.float32)
        mask = torch.ones(B, T, dtype=torch.bool, device=device)
        x = self.cls_embed(rows)[:, None]                                                   # (B or 2B, 1, C)
        caches = [x.new_zeros(2, len(rows), self.n_head, T, x.shape[-1] // self.n_head) for _ in self.blocks]
        for i in range(T):
            place = order[:, i:i + 1]                                                       # (B, 1)
            y = self.tok_norm(x + both(self.place_ahead[place]))
            for block, cache in zip(self.blocks, caches):
                y = block(y, cache=cache, start=i)
            h, h_uncond = self.norm(y).chunk(2) if guided else (self.norm(y), None)         # (B, 1, C)
            scale, now = guidance(cfg, cfg_schedule, (i + 1) / T), at(tricks, i / max(T - 1, 1))
            new, _ = self.head.sample(h, h_uncond, scale, temperature, **now)               # (B, 1[, D])
            if known is not None:
                new = torch.where(spread(take(known_mask, place), new), take(known, place).type_as(new), new)
            tokens, mask = put(tokens, place, new), mask.scatter(1, place, False)
            if on_step is not None:
                on_step(i, tokens, mask)
            x = both(embed_tokens(self, new.type_as(tokens)) + self.place_here[place])
        return tokens


# ---------------------------------------------------------------------------------------------------
# Demo: two worlds of ids. Bars-and-stripes (3 x 3: 14 pictures) has an exact optimum and samples that are right or wrong.
# Drawn shapes, 12 x 12 black and white pixels read as 36 ids of 2 x 2 pixels each, show how a picture comes about.

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


@torch.no_grad()
def nats_per_picture(model, x, cond):
    """-log p(x | one order) in nats, averaged over pictures: x (B, T) ids, cond (B,) -> (). At least their entropy.

    A causal model tells all T factors in one pass; MAR needs a pass for each, since what it sees changes.
    """
    B, T = x.shape
    order = draw_order(model.order, B, T, x.device)
    if isinstance(model, CausalMAR):
        return model.head.loss(model.hidden(x, cond, order), take(x, order)).sum(1).mean()
    mask, total = torch.ones(B, T, dtype=torch.bool, device=x.device), 0.0
    for t in range(T):
        place = order[:, t:t + 1]
        total = total + model.head.loss(take(model.hidden(x, cond, mask, t), place), take(x, place)).mean()
        mask = mask.scatter(1, place, False)
    return total


def main():
    parser = argparse.ArgumentParser(description="Order, attention and steps on two toy worlds.")
    parser.add_argument("--n_buffer", type=int, default=4, help="buffer places (as published: 64 for 256 tokens)")
    parser.add_argument("--steps", type=int, default=700, help="training steps on the drawn shapes")
    args = parser.parse_args()
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import data
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = dict(n_layer=2, n_head=2, n_embd=32, dropout=0.0, label_drop=0.0)
    zeros = torch.zeros(1000, dtype=torch.long, device=device)
    everything = bars_and_stripes(1000, device, 3).unique(dim=0)                            # (14, 9)
    arms = {"raster, causal": (CausalMAR, dict(order="raster")), "random, causal": (CausalMAR, dict(order="random")),
            "random, both ways": (MAR, dict(n_buffer=1, mask_min=0.0, mask_std=9.0)),       # any count equally often
            "the same, masking 70 to 100%": (MAR, dict(n_buffer=1))}
    right, takes = {}, (1, 2, 3, 4, 6, 9)
    for name, (cls, options) in arms.items():
        torch.manual_seed(0)
        model = cls(CategoricalHead(32, 2), 9, 1, vocab_size=2, **size, **options).to(device)
        fit_ids(model, lambda step: (bars_and_stripes(32, device, 3), zeros[:32]), 1200, 3e-3)
        nats = torch.stack([nats_per_picture(model.eval(), everything, zeros[:14]) for _ in range(8)]).mean()
        right[name] = [float((model.sample(zeros, k)[:, None] == everything).all(-1).any(1).float().mean())
                       for k in (takes if cls is MAR else (9,))]
        print(f"bars-and-stripes, {name:30s} {nats:.3f} nats (optimum ln 14 = {math.log(14):.3f}), 9 steps: "
              f"{right[name][-1]:.0%} of the samples are right")

    side, p = 12, 2
    _, labels, masks, _ = data.draw(torch.arange(8000, device=device), side)
    weights = 2 ** torch.arange(p * p, device=device)
    ids = (patchify((masks > 0).long()[:, None], p) * weights).sum(-1)                      # (N, 36) of 16 ids
    picture = lambda x: unpatchify((x[..., None] // weights % 2).float(), (side // p, side // p), p)[:, 0]
    T, cond, rows = ids.shape[1], torch.arange(10, device=device), []
    torch.manual_seed(0)
    model = MAR(CategoricalHead(64, 16), T, 10, vocab_size=16, n_layer=4, n_head=2, n_embd=64, dropout=0.0,
                n_buffer=args.n_buffer).to(device)
    start = time.perf_counter()
    pick = lambda step: torch.randint(8000, (32,), device=device)
    losses = fit_ids(model, lambda step: (lambda i: (ids[i], labels[i]))(pick(step)), args.steps, 3e-3)
    print(f"drawn shapes: {sum(losses[-50:]) / 50:.3f} nats per masked token (uniform guessing: {math.log(16):.3f}), "
          f"{time.perf_counter() - start:.0f} s")
    model.eval()

    def show(text, x, unknown):
        hole = unpatchify(unknown[..., None].repeat(1, 1, p * p).float(), (side // p, side // p), p)[:, 0] > 0
        rows.append((text, picture(x).masked_fill(hole, torch.nan).cpu()))
    for steps, shown in ((16, (1, 2, 4, 8, 16)), (2, (2,)), (T, (T,))):
        torch.manual_seed(1)
        start = time.perf_counter()
        model.sample(cond, steps, cfg=3.0, on_step=lambda i, x, unknown: show(f"{steps} steps: after {i + 1}", x, unknown)
                     if i + 1 in shown else None)
        print(f"10 samples in {steps} steps with guidance: {time.perf_counter() - start:.2f} s")
    real = ids[[int((labels == k).nonzero()[0]) for k in range(10)]]                        # one picture of each class
    known = (torch.arange(T, device=device) // (side // p) < 3).expand(10, -1)
    show("given: the upper half", real, ~known)
    show("the rest, in 8 steps", model.sample(cond, 8, cfg=3.0, known=real, known_mask=known), ~known & known)

    fig = plt.figure(figsize=(13, 6.6))
    left, panel = fig.add_gridspec(1, 2, width_ratios=[2, 1], left=0.12, right=0.98, top=0.88, bottom=0.1, wspace=0.17)
    cells = left.subgridspec(len(rows), 10, wspace=0.08, hspace=0.08)
    for r, (text, shown) in enumerate(rows):
        for c in range(10):
            ax = fig.add_subplot(cells[r, c])
            ax.imshow(shown[c], cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[], facecolor="#b9d4ee")
            if r == 0:
                ax.set_title(data.SHAPES[c], fontsize=9)
            if c == 0:
                ax.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)
    ax = fig.add_subplot(panel)
    for name, share in right.items():
        many = len(share) > 1
        ax.plot(takes if many else [9], share, "o-" if many else "*", ms=6 if many else 13, label=name)
    ax.set(xlabel="steps (9 tokens)", ylabel="samples that are one of the 14 pictures", ylim=(0, 1.04), xticks=takes,
           title="bars-and-stripes 3 x 3: order, attention, steps")
    ax.legend(fontsize=9, loc="upper left")
    ax.grid(alpha=0.3)
    fig.suptitle("mar.py: tokens in random order, more and more per step (left; blue is unknown).\nTokens of one step do not "
                 "see each other: fewer steps, more mistakes (right)", fontsize=11)
    fig.savefig("mar.png", dpi=80)
    print("wrote mar.png")


if __name__ == "__main__":
    main()
