"""
VAR: write an image from coarse to fine, a whole scale in each pass.

An autoregressive model reads an image row by row, as no eye does. VAR (Tian et al. 2024, arxiv.org/abs/
2404.02905) makes the next SCALE the next word. Its tokenizer rounds the latent f of an image K times. Each
scale rounds what the ones before it left over, on a grid of p_k x p_k (residual quantisation):

    z_k = shrink(f - f_1 - ... - f_{k-1}),   i_k = nearest codes,   f_k = phi(enlarge(codes of i_k))

A transformer then predicts all p_k^2 ids of a scale at once from the sum of the scales before it:

    p(ids | class) = prod_k prod_t p(i_k,t | class, i_1 ... i_{k-1})       K passes, not one per token

Shapes:  B batch, D numbers of a code, V codes, S = p_K side of the grid, T = sum of p_k^2 tokens, C width

    images (B, 3, H, W) --Encoder--> f (B, D, S, S) --quantizer--> ids (B, T) int64, coarsest scale first
    ids (B, T) --sum of scales--> f_hat (B, D, S, S) --Decoder--> images (B, 3, H, W) in [-1, 1]
    class (B,), sums so far --embed--> (B, T, C) --class, blocks--> h (B, T, C) --head--> p(i_k,t)

    python var.py              # passes against quality, writes var.png; a minute of one CPU core

Try it yourself:
  1. Give SCHEDULES the scales (4, 4, 4, 4). What helps: many passes, or passes from coarse to fine?
  2. Train a tokenizer with train.py and --codebook plain. How many codes does the 1 x 1 scale use, and why?
  3. Draw with cfg_schedule="constant". Which of the passes should the class decide, and which the image?
"""
import argparse
import copy
import math
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

TOK_SIZES = {
    # The paper's, 108,948,355 parameters: 680 tokens of 256 x 256 pixels.
    "var": dict(image_size=256, vocab_size=4096, code_dim=32, ema=0.0, ch=160, ch_mult=(1, 1, 2, 2, 4),
                n_res=2, groups=32, scales=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
    # With the linear path. For 32 x 32 pixels on a CPU: 103 tokens in 5 scales, or 30 in 4, which lose the
    # corners of drawn shapes; for 64 x 64 on a GPU: 103. scales_of() says which.
    "small": dict(image_size=32, vocab_size=512, code_dim=16, stem=4, ch=64, ch_mult=(1,), n_res=1, groups=8,
                  linear=True),
    "coarse": dict(image_size=32, vocab_size=1024, code_dim=32, stem=2, ch=32, ch_mult=(1, 2, 2), n_res=1,
                   groups=8, linear=True),
    "medium": dict(image_size=64, vocab_size=4096, code_dim=32, stem=2, ch=128, ch_mult=(1, 2, 2), n_res=2,
                   groups=32, linear=True),
}
SIZES = {
    "nano": dict(n_layer=4, n_head=2, n_embd=64),
    "tiny": dict(n_layer=4, n_head=4, n_embd=128),                                    # the default on a CPU
    "small": dict(n_layer=6, n_head=4, n_embd=192),
    "medium": dict(n_layer=12, n_head=6, n_embd=384),                                 # the default on a GPU
    "d16": dict(n_layer=16, n_head=16, n_embd=1024),        # the paper's: 310M, 601M, 1.0B, 2.0B parameters
    "d20": dict(n_layer=20, n_head=20, n_embd=1280),
    "d24": dict(n_layer=24, n_head=24, n_embd=1536),
    "d30": dict(n_layer=30, n_head=30, n_embd=1920),
}


# ---- The multi-scale quantiser ---------------------------------------------------------------------

def scales_of(side):
    """Sides of the scales up to `side`, each half as large again as the one before: (1, 2, 3, 5, 8, ...)."""
    scales = [1]
    while scales[-1] < side:
        scales.append(min(side, -(-3 * scales[-1] // 2)))
    return tuple(scales)


def phi_of(k, n_scales, n_phi):
    """Which of n_phi convolutions scale k uses: the one whose anchor is nearest to k / (n_scales - 1).

    In float64, whose rounding decides two ties of the published tokenizer: (0, 0, 1, 1, 1, 2, 2, 3, 3, 3).
    """
    first = 1 / (3 * n_phi) if n_phi == 4 else 1 / (2 * n_phi)
    anchors = np.linspace(first, 1 - first, n_phi)
    return int(np.abs(anchors - k / max(1, n_scales - 1)).argmin())


def nearest(z, codes):
    """The code of least squared distance: z (..., D), codes (V, D) -> ids (...) int64."""
    flat = z.flatten(0, -2)
    return ((codes**2).sum(1) - 2 * flat @ codes.T).argmin(1).view(z.shape[:-1])


class MultiScaleQuantizer(nn.Module):
    """f -> ids of K scales, coarsest first, and the sum of what they mean. One codebook serves all scales.

    scales: the sides p_k; the last is that of f. n_phi convolutions smooth what was enlarged, ratio of the
    result is theirs; None: 4, as published, but no more than scales; 0: none. beta: weight of the
    commitment. cosine: search by direction (the code is added as it is).
    ema=0: codes learn by the gradient, as published; those of the coarse scales tend to collapse. ema > 0:
    a code is the running mean of its z, and one that is used less than `restart` times its share gets a
    random z. A scale weighs as much as its side there, see update().
    """

    def __init__(self, vocab_size, code_dim, scales, n_phi=None, ratio=0.5, beta=0.25, ema=0.0, restart=0.1,
                 cosine=False):
        super().__init__()
        self.vocab_size = vocab_size
        self.scales = tuple(scales)
        self.ratio = ratio
        self.beta = beta
        self.ema = ema
        self.restart = restart
        self.cosine = cosine
        codes = torch.empty(vocab_size, code_dim).uniform_(-1 / vocab_size, 1 / vocab_size)
        if not ema:
            self.codebook = nn.Parameter(codes)
        else:
            self.register_buffer("codebook", codes)
            self.register_buffer("ema_count", torch.zeros(vocab_size))
            self.register_buffer("ema_sum", torch.zeros_like(codes))
        turns = torch.cat([torch.full((side,), k) for k, side in enumerate(self.scales)])
        self.register_buffer("turns", turns, persistent=False)        # scale k as often as its side
        if n_phi is None:                                   # no convolution without a scale that uses it
            n_phi = min(4, len(self.scales))
        self.phi = nn.ModuleList(nn.Conv2d(code_dim, code_dim, 3, padding=1) for _ in range(n_phi))
        self.which = [phi_of(k, len(self.scales), n_phi) for k in range(len(self.scales))] if n_phi else []
        for phi in self.phi:                                # at first, nothing is smoothed
            nn.init.dirac_(phi.weight)
            nn.init.zeros_(phi.bias)

    def shrink(self, f, k):
        """Means over the cells of grid k: f (B, D, S, S) -> (B, p_k^2, D), row by row."""
        if k < len(self.scales) - 1:
            f = F.interpolate(f, self.scales[k], mode="area")
        return f.flatten(2).transpose(1, 2)

    def enlarge(self, codes, k):
        """What the codes of scale k add to f_hat: codes (B, p_k^2, D) -> (B, D, S, S)."""
        h = codes.transpose(1, 2).unflatten(2, (self.scales[k], self.scales[k]))
        if k < len(self.scales) - 1:
            h = F.interpolate(h, self.scales[-1], mode="bicubic")
        if not self.phi:
            return h
        return (1 - self.ratio) * h + self.ratio * self.phi[self.which[k]](h)

    def nearest(self, z):
        """z (B, n, D) -> ids (B, n) int64."""
        if self.cosine:
            return nearest(F.normalize(z, dim=-1), F.normalize(self.codebook, dim=-1))
        return nearest(z, self.codebook)

    def decompose(self, f):
        """f (B, D, S, S) -> three lists of K: z (B, p_k^2, D), ids (B, p_k^2), what they add (B, D, S, S).

        Each scale rounds the rest that the scales before it left. (VAR, algorithm 1)
        """
        zs, ids, added = [], [], []
        rest = f.detach()
        for k in range(len(self.scales)):
            zs.append(self.shrink(rest, k))
            ids.append(self.nearest(zs[k]))
            added.append(self.enlarge(F.embedding(ids[k], self.codebook), k))
            rest = rest - added[k].detach()
        return zs, ids, added

    def forward(self, f):
        """f (B, D, S, S) -> f_hat (B, D, S, S) float32, ids (B, T), loss (), logs.

        loss = mean over k of |sum_k - sg(f)|^2 + beta |sg(sum_k) - f|^2, where sum_k is that of the first k
        scales: all of them shall be good pictures. f_hat is the last sum in value and f for the gradient.
        logs: commit (with its weight), and for each scale the share of the V codes that occurs in this batch.
        """
        with torch.autocast(f.device.type, enabled=False):
            f = f.float()
            zs, ids, added = self.decompose(f)
            total = torch.zeros_like(f)
            fit = commit = 0.0
            for h in added:
                total = total + h
                fit = fit + F.mse_loss(total, f.detach()) / len(added)
                commit = commit + self.beta * F.mse_loss(f, total.detach()) / len(added)
            logs = {"commit": commit.detach()}
            for side, found in zip(self.scales, ids):
                logs[f"usage_{side}x{side}"] = (self.count(found) > 0).float().mean()
            if self.ema and self.training:
                self.update(zs, ids)
            return f + (total - f).detach(), torch.cat(ids, 1), fit + commit, logs

    def grow(self, total, ids, k):
        """The sum of the scales before k, and scale k: total (B, D, S, S), ids (B, p_k^2) -> (B, D, S, S)."""
        with torch.autocast(ids.device.type, enabled=False):
            return total + self.enlarge(F.embedding(ids, self.codebook), k)

    def sums(self, ids):
        """ids (B, T) -> a list of K: the sum of the scales up to each, (B, D, S, S). The last is f_hat."""
        found = []
        for k, part in enumerate(ids.split([side**2 for side in self.scales], 1)):
            found.append(self.grow(found[-1] if found else 0.0, part, k))
        return found

    def inputs(self, ids):
        """Teacher forcing: ids (B, T) -> (B, T - p_1^2, D).

        For each scale but the first it is the sum of all scales before it, shrunk to its grid.
        """
        sums = self.sums(ids)
        parts = [self.shrink(sums[k - 1], k) for k in range(1, len(self.scales))]
        return torch.cat([sums[0].new_zeros(len(ids), 0, self.codebook.shape[1]), *parts], 1)

    @torch.no_grad()
    def count(self, ids, weights=None):
        """How often each code occurs in ids (n,), or the sum of the weights (n,) of its z -> (V,)."""
        ids = ids.flatten()
        counts = self.codebook.new_zeros(self.vocab_size)
        return counts.index_add_(0, ids, counts.new_ones(ids.shape) if weights is None else weights)

    # ---- Extras: codes as running means, which stay in use on every scale

    @torch.no_grad()
    def update(self, zs, ids):
        """Move the running averages by one batch: zs, ids of K scales, as decompose() gives them.

        N = ema N + (1 - ema) (sum of the weights of the z of a code), m alike for their weighted sum, and the
        code is m / N. A z of scale k weighs 1 / p_k, so the scale weighs p_k per image. If each z weighed 1,
        the 1 x 1 scale were one of T tokens, and its codes would count as unused. A code with N below restart
        * mean N gets a random z of a random scale, also drawn by p_k. All processes of torch.distributed
        agree and take the seeds of process 0.
        """
        V = self.vocab_size
        device = zs[0].device
        drawn = [z.flatten(0, 1)[torch.randint(z[..., 0].numel(), (V,), device=device)] for z in zs]
        scale = self.turns[torch.randint(len(self.turns), (V,), device=device)]
        seeds = torch.stack(drawn)[scale, torch.arange(V, device=device)]
        weights = torch.cat([z.new_full((z[..., 0].numel(),), z.shape[1] ** -0.5) for z in zs])
        flat = torch.cat([part.flatten() for part in ids])
        z = torch.cat([z.flatten(0, 1) for z in zs]) * weights[:, None]
        count = self.count(flat, weights)
        total = torch.zeros_like(self.codebook).index_add_(0, flat, z)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if torch.distributed.get_rank() > 0:
                seeds = torch.zeros_like(seeds)
            for x in (count, total, seeds):
                torch.distributed.all_reduce(x)
        self.ema_count.lerp_(count, 1 - self.ema)
        self.ema_sum.lerp_(total, 1 - self.ema)
        share = self.ema_count.mean()
        dead = self.ema_count < self.restart * share
        self.ema_count.copy_(torch.where(dead, share, self.ema_count))
        self.ema_sum.copy_(torch.where(dead[:, None], share * seeds, self.ema_sum))
        self.codebook.copy_(self.ema_sum / self.ema_count.clamp(min=1e-12)[:, None])

    @torch.no_grad()
    def start(self, f):
        """Before training: the codes are shared out to the scales by their sides and set by k-means.

        f (N, D, S, S). Equal shares cost 0.5 dB: what a coarse scale gets wrong, the finer ones mend.
        Random numbers come from torch's seed and sums are made on the CPU: all processes get the same.
        """
        total = sum(self.scales)
        rest = f.cpu()
        own = copy.deepcopy(self).cpu()
        for k, side in enumerate(self.scales):
            before = sum(self.scales[:k])
            part = slice(self.vocab_size * before // total, self.vocab_size * (before + side) // total)
            z = own.shrink(rest, k)
            flat = z.flatten(0, 1)
            codes, share = kmeans_of(flat[::max(1, len(flat) // 32_000)], part.stop - part.start)
            rest = rest - own.enlarge(codes[nearest(z, codes)], k)
            self.codebook[part] = codes.to(self.codebook)
            if self.ema:                                    # N and m as if steps of 32 images had made them
                rare = 2 * self.restart * total / self.vocab_size     # a rare code has time to show its use
                self.ema_count[part] = 32 * (side * share).clamp(min=rare).to(self.codebook)
                self.ema_sum[part] = self.codebook[part] * self.ema_count[part, None]


# ---- The network: vq.py's, with its linear path ----------------------------------------------------

class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x where the width changes."""

    def __init__(self, c_in, c_out, groups=32):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):                                   # (B, c_in, h, w) -> (B, c_out, h, w)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all h * w positions, with 1x1 convolutions as its four projections."""

    def __init__(self, c, groups=32):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x):                                   # (B, c, h, w) -> (B, c, h, w)
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))  # (B, h*w, c)
        weights = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)           # (B, h*w, h*w)
        return x + self.proj_out((weights @ v).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve the resolution. The padding is on the right and bottom only, as in the published weights."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):                                   # (B, c, h, w) -> (B, c, h/2, w/2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution: repeat pixels, then smooth by a learned convolution."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):                                   # (B, c, h, w) -> (B, c, 2h, 2w)
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Encoder(nn.Sequential):
    """images (B, channels, H, W) -> features (B, c_out, h, w). Attention in attn_levels, after each block."""

    def __init__(self, c_out, ch=128, ch_mult=(1, 1, 2, 2, 4), n_res=2, attn_levels=(4,), groups=32,
                 channels=3):
        c = ch
        layers = [nn.Conv2d(channels, ch, 3, padding=1)]
        for level, mult in enumerate(ch_mult):
            for _ in range(n_res):
                layers.append(ResBlock(c, ch * mult, groups))
                c = ch * mult
                if level in attn_levels:
                    layers.append(AttnBlock(c, groups))
            if level < len(ch_mult) - 1:
                layers.append(Downsample(c))
        layers += [ResBlock(c, c, groups), AttnBlock(c, groups), ResBlock(c, c, groups)]
        layers += [nn.GroupNorm(groups, c, eps=1e-6), nn.SiLU(), nn.Conv2d(c, c_out, 3, padding=1)]
        super().__init__(*layers)


class Decoder(nn.Sequential):
    """features (B, c_in, h, w) -> images (B, channels, H, W). Mirrors Encoder, one more block per level."""

    def __init__(self, c_in, ch=128, ch_mult=(1, 1, 2, 2, 4), n_res=2, attn_levels=(), groups=32,
                 channels=3):
        c = ch * ch_mult[-1]
        layers = [nn.Conv2d(c_in, c, 3, padding=1)]
        layers += [ResBlock(c, c, groups), AttnBlock(c, groups), ResBlock(c, c, groups)]
        for level in reversed(range(len(ch_mult))):
            for _ in range(n_res + 1):
                layers.append(ResBlock(c, ch * ch_mult[level], groups))
                c = ch * ch_mult[level]
                if level in attn_levels:
                    layers.append(AttnBlock(c, groups))
            if level > 0:
                layers.append(Upsample(c))
        layers += [nn.GroupNorm(groups, c, eps=1e-6), nn.SiLU(), nn.Conv2d(c, channels, 3, padding=1)]
        super().__init__(*layers)


class LinearPath(nn.Module):
    """The best linear autoencoder beside the networks: principal components of patches, and back.

    Of all linear maps to D numbers and back, PCA loses the least squared error (Baldi and Hornik 1989).
    start() computes it from some images, once. Then it stays as it is, and the networks add what lines
    cannot.

    Before an image is cut into patches, the difference of two pixels that meet at a border is stretched by
    the factor `border`. When the patches are put together again it shrinks by as much. A JPEG shows its grid
    of patches because each is rounded by itself; so would samples, whose tokens never agree to the last
    digit. (A lapped transform: Malvar and Staelin 1989, Tran et al. 2003.) 1: plain patches.
    """

    def __init__(self, patch, n_in, n_out, border=2.0):
        super().__init__()
        self.patch = patch
        self.border = border
        self.register_buffer("mean", torch.zeros(n_in))                    # of a patch's n_in numbers
        self.register_buffer("basis", torch.zeros(n_in, n_out))            # a component per column
        self.register_buffer("std", torch.ones(n_out))                     # of each component

    @torch.no_grad()
    def start(self, images):
        """PCA of the patches of images (N, channels, H, W). A thousand images will do."""
        patches = self.cut(images).flatten(0, 1).cpu().double()                       # (N * T, n_in)
        values, vectors = torch.linalg.eigh(patches.T.cov())                          # ascending
        n = min(self.basis.shape)
        self.mean.copy_(patches.mean(0))
        self.basis[:, :n] = vectors.flip(1)[:, :n].to(self.basis)
        self.std[:n] = values.flip(0)[:n].clamp(min=1e-6).sqrt().to(self.std)

    def forward(self, images):
        """images (B, channels, H, W) -> (B, T, n_out), each number of mean 0 and variance 1 over the
        images.
        """
        with torch.autocast(images.device.type, enabled=False):         # bfloat16 would cost decibels
            return (self.cut(images.to(self.mean.dtype)) - self.mean) @ (self.basis / self.std)

    def inverse(self, z, grid):
        """z (B, T, n_out) -> images (B, channels, H, W)."""
        with torch.autocast(z.device.type, enabled=False):
            return self.join(z.to(self.mean.dtype) @ (self.basis * self.std).T + self.mean, grid)

    def cut(self, images):
        """images (B, channels, H, W) -> patches (B, T, n_in), row by row."""
        return F.pixel_unshuffle(self.stretch(images, self.border), self.patch).flatten(2).transpose(1, 2)

    def join(self, patches, grid):
        """The inverse of cut: patches (B, T, n_in) -> images (B, channels, H, W)."""
        maps = patches.transpose(1, 2).unflatten(2, grid)                             # (B, n_in, h, w)
        return self.stretch(F.pixel_shuffle(maps, self.patch), 1 / self.border)

    def stretch(self, x, factor):
        """Multiply the differences across the borders of patches: x (B, channels, H, W) -> the same shape."""
        for _ in range(2):                                  # across, then, with the axes swapped, down
            x = x.transpose(-1, -2).contiguous()
            last = x[..., self.patch - 1:-1:self.patch]
            first = x[..., self.patch::self.patch]
            more = (factor - 1) / 2 * (first - last)
            x = x.clone()
            x[..., self.patch - 1:-1:self.patch] = last - more
            x[..., self.patch::self.patch] = first + more
        return x


# ---- The tokenizer ---------------------------------------------------------------------------------

class MSVQ(nn.Module):
    """VQGAN's autoencoder around a multi-scale quantiser: T = sum of p_k^2 ids per image.

    scales: the sides p_k, None: scales_of() the grid. stem: the networks see stem x stem pixels as channels
    of one position. linear: f = path(image) + network(image), and an image is path.inverse(f_hat) +
    network(f_hat). Both networks begin at zero, so that start() makes a residual k-means of patches.
    """

    token_dim = None                                        # tokens are ids

    def __init__(self, image_size=32, vocab_size=512, code_dim=16, scales=None, beta=0.25, ema=0.99,
                 restart=0.1, n_phi=None, ratio=0.5, cosine=False, ch=64, ch_mult=(1,), n_res=1, groups=8,
                 stem=1, linear=False):
        super().__init__()
        lowest = len(ch_mult) - 1                           # the only level with attention
        stride = stem << lowest
        side = image_size // stride
        if image_size % stride:
            raise ValueError(f"image_size {image_size} is not a multiple of {stride}, the stride of this VQ")
        scales = scales_of(side) if scales is None else tuple(scales)
        if scales[-1] != side:
            raise ValueError(f"image_size {image_size} makes a grid of {side} x {side}, and the last of the "
                             f"scales {scales} is another")
        self.scales = scales
        self.seq_len = sum(p * p for p in scales)
        self.grid = (self.seq_len,)                         # no grid: a coarse token lies over many places
        self.vocab_size = vocab_size
        self.stem = stem
        self.encoder = Encoder(code_dim, ch, ch_mult, n_res, (lowest,), groups, 3 * stem**2)
        self.quant_conv = nn.Conv2d(code_dim, code_dim, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(code_dim, code_dim, 3, padding=1)
        self.decoder = Decoder(code_dim, ch, ch_mult, n_res, (lowest,), groups, 3 * stem**2)
        self.path = LinearPath(stride, 3 * stride**2, code_dim) if linear else None
        self.init_weights()
        self.quantizer = MultiScaleQuantizer(vocab_size, code_dim, scales, n_phi, ratio, beta, ema, restart,
                                             cosine)

    def init_weights(self):
        """Each block starts as the identity: a small model learns faster than by PyTorch's default."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.conv2.weight)
            if isinstance(module, AttnBlock):
                nn.init.zeros_(module.proj_out.weight)
        if self.path is not None:                           # at first, the networks add nothing to the path
            nn.init.zeros_(self.quant_conv.weight)
            nn.init.zeros_(self.decoder[-1].weight)

    @torch.no_grad()
    def start(self, images):
        """Before training: PCA of the patches of images (N, 3, H, W), then the codes of their latents."""
        if self.path is not None:
            self.path.start(images)
            self.path.std.fill_(self.path.std.square().mean().sqrt())   # distances are those between patches
            self.quantizer.start(self.latents(images))

    def latents(self, images):
        """images (B, 3, H, W) -> f (B, D, S, S) float32, not yet rounded."""
        f = self.quant_conv(self.encoder(F.pixel_unshuffle(images, self.stem))).float()
        if self.path is None:
            return f
        return f + self.path(images).transpose(1, 2).view_as(f)

    def decode_raw(self, f_hat):
        """f_hat (B, D, S, S), the sum of all scales or of the first -> images (B, 3, H, W), not clamped."""
        raw = F.pixel_shuffle(self.decoder(self.post_quant_conv(f_hat)).float(), self.stem)
        if self.path is None:
            return raw
        return raw + self.path.inverse(f_hat.flatten(2).transpose(1, 2), f_hat.shape[2:])

    def reconstruct(self, images):
        """images (B, 3, H, W) -> recon (B, 3, H, W), loss of the quantiser (), logs."""
        f_hat, _, auxiliary, logs = self.quantizer(self.latents(images))
        return self.decode_raw(f_hat), auxiliary, logs

    def forward(self, images, labels=None):
        """images (B, 3, H, W) in [-1, 1] -> loss (), logs: mse per pixel value, and the quantiser's."""
        recon, auxiliary, logs = self.reconstruct(images)
        mse = F.mse_loss(recon, images)
        return mse + auxiliary, {"mse": mse.detach(), **logs}

    @torch.no_grad()
    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] -> ids (B, T) int64 in 0 .. V - 1, the coarsest scale first."""
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat(self.quantizer.decompose(self.latents(images))[1], 1)

    @torch.no_grad()
    def decode(self, tokens, n_scales=None):
        """ids (B, T) int64 -> images (B, 3, H, W) in [-1, 1]. n_scales: of so many coarse scales only."""
        f_hat = self.quantizer.sums(tokens)[(n_scales or len(self.scales)) - 1]
        return self.decode_raw(f_hat).clamp(-1, 1)


# ---- The transformer -------------------------------------------------------------------------------

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


class VARBlock(nn.Module):
    """A transformer block whose norms are scaled, shifted and gated by the class (DiT, arxiv.org/abs/
    2212.09748).

    Queries and keys have unit length. A scale per head, exp(log_scale) and at most 100, takes the place of
    1 / sqrt(d). Queries and values have biases, keys have none, which softmax would not notice.
    """

    def __init__(self, n_embd, n_head, n_mlp=None, dropout=0.0):
        super().__init__()
        n_mlp = n_mlp or 4 * n_embd
        self.n_head = n_head
        self.norm = nn.LayerNorm(n_embd, eps=1e-6, elementwise_affine=False)
        self.wqkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(n_embd))
        self.v_bias = nn.Parameter(torch.zeros(n_embd))
        self.log_scale = nn.Parameter(torch.full((n_head,), math.log(4)))
        self.wo = nn.Linear(n_embd, n_embd)
        self.fc1 = nn.Linear(n_embd, n_mlp)
        self.fc2 = nn.Linear(n_mlp, n_embd)
        self.gelu = nn.GELU("tanh")
        self.dropout = nn.Dropout(dropout)

    def directions(self, q, k):
        """q, k (B, n_head, S, d) -> the same, so that attention()'s q k^T / sqrt(d) is scale * cosine."""
        scale = self.log_scale.clamp(max=math.log(100)).exp()[:, None, None] * q.shape[-1] ** 0.5
        return F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)

    def attend(self, x, mask=None, cache=None, start=0):
        """x (B, S, C) -> (B, S, C). mask (S, S): True where attended; None: everywhere.

        With cache (2, B, n_head, T, d), x are the rows start .. start + S - 1 of a longer sequence. Their
        keys and values are written there, and those of all rows so far are attended to.
        """
        B, S, C = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.wqkv.weight, bias)
        q, k, v = qkv.view(B, S, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        q, k = self.directions(q, k)                                                  # (B, n_head, S, d) each
        if cache is not None:
            cache[0, :, :, start:start + S] = k
            cache[1, :, :, start:start + S] = v
            k, v = cache[:, :, :, :start + S]
        y = attention(q.type_as(v), k.type_as(v), v, mask).transpose(1, 2).reshape(B, S, C)
        return self.dropout(self.wo(y))

    def mlp(self, x):
        return self.fc2(self.dropout(self.gelu(self.fc1(x))))

    def forward(self, x, modulation, mask=None, cache=None, start=0):
        """x (B, S, C), modulation (B, 6, C): two gates, two scales, two shifts -> (B, S, C)."""
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unsqueeze(2).unbind(1)    # (B, 1, C) each
        x = x + gate1 * self.attend(self.norm(x) * (1 + scale1) + shift1, mask, cache, start)
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


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


# ---- The model -------------------------------------------------------------------------------------

class VAR(nn.Module):
    """p(ids of a scale | class, ids of the scales before it), for the ids of an MSVQ. All of a scale at once.

    quantizer: that of the tokenizer. The model keeps a copy that does not learn, for what it reads is not the
    ids but the sums of their codes.
    """

    token_dim = None

    def __init__(self, head, quantizer, num_classes, n_layer=6, n_head=4, n_embd=192, n_mlp=None, dropout=0.0,
                 label_drop=0.1):
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"n_embd {n_embd} must be a multiple of n_head {n_head}")
        self.scales = quantizer.scales
        sizes = [side**2 for side in self.scales]
        self.starts = [sum(sizes[:k]) for k in range(len(sizes) + 1)]                 # of the scales in T
        self.seq_len = sum(sizes)
        self.num_classes = num_classes
        self.vocab_size = quantizer.vocab_size
        self.label_drop = label_drop
        self.cls_embed = nn.Embedding(num_classes + 1, n_embd)                        # last row: "no class"
        self.tok_embed = nn.Linear(quantizer.codebook.shape[1], n_embd)
        self.pos_start = nn.Parameter(torch.zeros(sizes[0], n_embd))
        self.pos_embed = nn.Parameter(torch.zeros(self.seq_len, n_embd))
        self.scale_embed = nn.Embedding(len(sizes), n_embd)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(VARBlock(n_embd, n_head, n_mlp, dropout) for _ in range(n_layer))
        self.modulate = nn.ModuleList(nn.Linear(n_embd, 6 * n_embd) for _ in range(n_layer))
        self.norm = nn.LayerNorm(n_embd, eps=1e-6, elementwise_affine=False)
        self.modulate_last = nn.Linear(n_embd, 2 * n_embd)
        level = torch.cat([torch.full((n,), k) for k, n in enumerate(sizes)])
        self.register_buffer("level", level, persistent=False)                        # (T,): scale of a token
        self.register_buffer("visible", level[:, None] >= level, persistent=False)    # row sees column
        self.init_weights(std=(3 * n_embd) ** -0.5)
        self.head = head                                    # after it, so that these keep their own weights
        self.quantizer = copy.deepcopy(quantizer).requires_grad_(False)

    def init_weights(self, std, gate=1e-3):
        """The authors': the gates are nearly closed, so that each block starts near the identity."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            for layer in (block.wo, block.fc2):
                nn.init.normal_(layer.weight, std=std / math.sqrt(2 * len(self.blocks)))
        with torch.no_grad():
            for layer in self.modulate:
                gates, rest = layer.weight.tensor_split([2 * layer.in_features])
                gates.mul_(gate)
                rest.mul_(0.5)
            self.modulate_last.weight.mul_(0.5)
        nn.init.normal_(self.pos_start, std=std)
        nn.init.normal_(self.pos_embed, std=std)

    def embed(self, c, seen):
        """What the transformer reads: c (B, C) of the class, seen (B, n, D) of the sums -> (B, p_1^2 + n, C).

        The first scale reads the class. Positions and the number of the scale are not added yet.
        """
        first = c.unsqueeze(1) + self.pos_start                                       # (B, p_1^2, C)
        return torch.cat([first, self.tok_embed(seen)], 1)

    def modulations(self, c):
        """c (B, C) -> the gates, scales and shifts of each block, a list of (B, 6, C)."""
        c = F.silu(c)
        return [layer(c).unflatten(1, (6, -1)) for layer in self.modulate]

    def forward_blocks(self, x, c, start=0, caches=None):
        """Rows x (B, S, C) at positions start .. start + S - 1, c (B, C) of the class -> h (B, S, C).

        Without caches these are all T rows, and each sees its own scale and those before it. With caches they
        are one scale, which sees all that is in there.
        """
        end = start + x.shape[1]
        x = self.dropout(x + self.pos_embed[start:end] + self.scale_embed(self.level[start:end]))
        mask = self.visible if caches is None else None
        for i, (block, modulation) in enumerate(zip(self.blocks, self.modulations(c))):
            x = block(x, modulation, mask, None if caches is None else caches[i], start)
        scale, shift = self.modulate_last(F.silu(c)).unsqueeze(1).chunk(2, -1)
        return self.norm(x) * (1 + scale) + shift

    def hidden_states(self, tokens, cond):
        """tokens (B, T) int64, cond (B,) class labels -> h (B, T, C). Those of a scale have seen the scales
        before it only.
        """
        c = self.cls_embed(cond)
        return self.forward_blocks(self.embed(c, self.quantizer.inputs(tokens)), c)

    def logits(self, tokens, cond):
        """tokens (B, T) int64, cond (B,) class labels -> (B, T, V)."""
        return self.head.logits(self.hidden_states(tokens, cond))

    def forward(self, tokens, cond):
        """tokens (B, T) int64, cond (B,) class labels -> nats per token (), logs: those of each scale.

        While training, a tenth of the labels become "no class", for guidance.
        """
        if self.training and self.label_drop > 0:
            drop = torch.rand(cond.shape, device=cond.device) < self.label_drop
            cond = torch.where(drop, self.num_classes, cond)
        loss = self.head.loss(self.hidden_states(tokens, cond), tokens)               # (B, T)
        parts = loss.detach().mean(0).tensor_split(self.starts[1:-1])
        logs = {f"nll_{side}x{side}": part.mean() for side, part in zip(self.scales, parts)}
        return loss.mean(), logs

    @torch.no_grad()
    def sample(self, cond, steps=None, cfg=1.0, temperature=1.0, known=None, known_mask=None, on_step=None,
               cfg_schedule="linear", **tricks):
        """cond (B,) class labels -> tokens (B, T), drawn in K passes, one for each scale.

        cfg: guidance scale of the last pass, 1 is off. It grows linearly from 1 in the first pass, or is
        "constant" (cfg_schedule). The authors' number is cfg - 1. known (B, T), known_mask (B, T): tokens
        that are given stay, such as the coarse scales of an image, or a region of it in every scale.
        on_step(k, tokens, mask) is called after each pass, mask True where still masked. tricks go to the
        head.
        """
        B, K, device = len(cond), len(self.scales), cond.device
        if steps not in (None, K):
            raise ValueError(f"VAR draws a scale in each pass: steps must be {K}, not {steps}")
        if cfg_schedule not in ("linear", "constant"):
            raise ValueError(f"cfg_schedule must be linear or constant, not {cfg_schedule}")
        guided = cfg != 1.0
        if guided:                                          # the second half of the batch goes without class
            cond = torch.cat([cond, torch.full_like(cond, self.num_classes)])
        c = self.cls_embed(cond)
        x = self.embed(c, c.new_zeros(len(c), 0, self.tok_embed.in_features))         # (B or 2B, p_1^2, C)
        caches = self.empty_caches(x)
        tokens = torch.zeros(B, self.seq_len, dtype=torch.long, device=device)
        mask = torch.ones(B, self.seq_len, dtype=torch.bool, device=device)
        total = 0.0
        for k in range(K):
            part = slice(self.starts[k], self.starts[k + 1])
            h = self.forward_blocks(x, c, part.start, caches)
            h, h_uncond = h.chunk(2) if guided else (h, None)
            scale = cfg if cfg_schedule == "constant" else 1 + (cfg - 1) * k / max(1, K - 1)
            drawn, _ = self.head.sample(h, h_uncond, scale, temperature, **tricks)    # (B, p_k^2)
            if known is not None:
                drawn = torch.where(known_mask[:, part], known[:, part], drawn)
            tokens[:, part] = drawn
            mask[:, part] = False
            if on_step is not None:
                on_step(k, tokens, mask)
            if k + 1 < K:                                   # the next scale reads the sum, shrunk to its grid
                total = self.quantizer.grow(total, drawn, k)
                x = self.tok_embed(self.quantizer.shrink(total, k + 1))
                x = torch.cat([x, x]) if guided else x
        return tokens

    def empty_caches(self, x):
        """Room for the keys and values of len(x) sequences, a tensor per block. x: the first rows."""
        shape = (2, len(x), self.blocks[0].n_head, self.seq_len, x.shape[-1] // self.blocks[0].n_head)
        return [x.new_zeros(shape) for _ in self.blocks]


# ---- Extras: a fast draw, truncated distributions, a codebook by k-means --------------------------------

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


def kmeans_of(z, n, steps=10):
    """Lloyd's algorithm: z (N, D) on the CPU -> codes (n, D), their shares of z in the last step (n,).

    Each code becomes the mean of the z nearest to it. One that is nobody's nearest moves to a random z.
    """
    first = torch.randperm(len(z), device="cpu")[torch.arange(n, device="cpu") % len(z)]
    codes = z[first]
    for _ in range(steps):
        ids = nearest(z, codes)
        count = torch.zeros(n, device="cpu").index_add_(0, ids, torch.ones_like(z[:, 0]))
        total = torch.zeros_like(codes).index_add_(0, ids, z)
        elsewhere = z[torch.randint(len(z), (n,), device="cpu")]
        codes = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], elsewhere)
    return codes, count / len(z)


# ---- Demo: passes against quality ------------------------------------------------------------------

SCHEDULES = [(4,), (2, 4), (1, 2, 4), (1, 2, 3, 4)]


def fit_var(model, tokens, labels, steps, lr=4e-3):
    """Train on ids (N, T) and labels (N,) -> nats per image in the last steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    last = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 30) * (1 - step / steps)
        i = torch.randint(len(tokens), (32,), device=tokens.device)
        loss, _ = model(tokens[i], labels[i])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        last.append(loss.item() * model.seq_len)
    return sum(last[-20:]) / 20


def far_from(images, others):
    """Mean distance to the nearest of others: images (N, 3, H, W), others (M, 3, H, W) -> float."""
    return torch.cdist(images.flatten(1), others.flatten(1)).amin(1).mean().item()


def show_var(rows, curves, path):
    """rows: (text, images (n, 3, H, W)); curves: (text, style, numbers of passes, values)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure = plt.figure(figsize=(12.5, 6.4), layout="constrained")
    left, right = figure.add_gridspec(1, 2, width_ratios=[1.9, 1])
    for cell, (text, images) in zip(left.subgridspec(len(rows), 1), rows):
        ax = figure.add_subplot(cell)
        strip = ((images.clamp(-1, 1) + 1) / 2).permute(2, 0, 3, 1).flatten(1, 2)     # (H, n * W, 3)
        ax.imshow(strip.cpu(), interpolation="nearest")
        ax.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9)
        ax.set(xticks=[], yticks=[])
    ax = figure.add_subplot(right)
    for text, style, passes, values in curves:
        ax.plot(passes, values, style, label=text)
    ax.set(xlabel="passes, one for each scale", ylabel="mean distance to the nearest training picture")
    ax.set_xticks(passes)
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=9)
    figure.suptitle("var.py: a whole scale in each pass, from coarse to fine (last rows: after each pass).\n"
                    "With one pass for all, no token knows what the others draw")
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description="VAR on small drawn shapes: how many scales are enough?")
    parser.add_argument("--steps", type=int, default=300, help="training steps of each of the four models")
    parser.add_argument("--vocab", type=int, default=256, help="codes, shared by all scales")
    args = parser.parse_args()
    import data
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels, _, _ = data.draw(torch.arange(4000, device=device), 16)
    held_out = data.draw(torch.arange(200, device=device) + data.VAL_INDEX, 16)[0]
    cond = torch.arange(200, device=device) % 10
    rows, values = [], []
    for scales in SCHEDULES:
        torch.manual_seed(0)
        start = time.perf_counter()
        tokenizer = MSVQ(16, args.vocab, 16, scales, ch=16, stem=4, groups=4, linear=True).to(device).eval()
        tokenizer.start(images[:1000])                      # PCA and k-means: good enough for small pictures
        ids = tokenizer.encode(images)
        model = VAR(CategoricalHead(96, args.vocab), tokenizer.quantizer, 10, n_layer=3, n_head=3, n_embd=96)
        model = model.to(device)
        nats = fit_var(model, ids, labels, args.steps)
        model.eval()
        grown = []

        def record(k, tokens, mask):
            grown.append(tokenizer.decode(tokens, k + 1))
        torch.manual_seed(1)
        tokens = model.sample(cond, cfg=2.0, on_step=record)
        values.append(far_from(tokenizer.decode(tokens), images))
        psnr = 10 * math.log10(4 / F.mse_loss(tokenizer.decode(tokenizer.encode(held_out)), held_out))
        used = [len(part.unique()) for part in ids.split([side**2 for side in scales], 1)]
        print(f"scales {scales}: codes in use {used}, {psnr:.1f} dB, {nats:.0f} nats per picture, samples "
              f"{values[-1]:.2f} from the nearest training picture, {time.perf_counter() - start:.0f} s")
        if scales == SCHEDULES[-1]:
            for k, side in enumerate(scales):
                rows.append((f"after {side} x {side}", grown[k][:10]))
        else:
            rows.append((f"{len(scales)} pass{'es' * (len(scales) > 1)} {scales}", grown[-1][:10]))
    real = far_from(tokenizer.decode(tokenizer.encode(held_out)), images)
    passes = [len(scales) for scales in SCHEDULES]
    curves = [("samples", "o-", passes, values),
              ("held-out pictures, decoded", "k--", passes, [real] * len(passes))]
    show_var(rows, curves, "var.png")
    print("wrote var.png")


if __name__ == "__main__":
    main()
