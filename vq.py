"""
VQ: images to a small grid of whole numbers and back, by vector quantisation.

A language model wants words. VQ-VAE (van den Oord et al. 2017, arxiv.org/abs/1711.00937) gives images a
vocabulary. Each of the T vectors that an encoder writes is replaced by the nearest e_k of V learned codes,
and k is the token. Rounding has no gradient, so the decoder's is handed straight through to the encoder. Two
more terms pull the code and the encoder's z together (sg: stop gradient), with k = argmin |z - e_k|^2:

    loss = |x - decoder(e_k)|^2 + |sg(z) - e_k|^2 + beta |z - sg(e_k)|^2

A code that is never nearest gets no gradient and stays dead. LlamaGen (arxiv.org/abs/2406.06525) keeps 97% of
16384 codes alive by comparing directions in 8 dimensions; in 256 dimensions 0.3% survive. The network is
VQGAN's.

Shapes:  B batch, H W pixels, T = h * w tokens (h = H / 2^(levels - 1)), V codes of D numbers (code_dim)

    images (B, 3, H, W) --Encoder, quant_conv--> z (B, T, D) --nearest code--> ids (B, T) int64, 0 .. V - 1
    ids (B, T) --codebook--> (B, D, h, w) --post_quant_conv, Decoder--> images (B, 3, H, W) in [-1, 1]

    python vq.py               # codes in use against their dimension, writes vq.png; about a minute on a CPU

Try it yourself:
  1. Give the model of any length in main() ema=0.99: dead codes restart. How many are used then?
  2. Take .detach() away in the straight-through line of VectorQuantizer. What does the encoder learn from?
  3. Change one id of a code map before decoding. How far does it reach, and why farther than 4 x 4 pixels?
"""
import argparse
import math
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

SIZES = {
    # LlamaGen's vq_ds16 and vq_ds8: 71,883,403 and 70,109,835 parameters, 16 x 16 and 32 x 32 tokens
    "ds16": dict(image_size=256, vocab_size=16384, code_dim=8, ch=128, ch_mult=(1, 1, 2, 2, 4), n_res=2,
                 z_channels=256, groups=32),
    "ds8": dict(image_size=256, vocab_size=16384, code_dim=8, ch=128, ch_mult=(1, 2, 2, 4), n_res=2,
                z_channels=256, groups=32),
    # LlamaGen's, small, for 32 x 32 pixels: 4 x 4 tokens on a CPU, 8 x 8 on a CPU, 8 x 8 on a GPU
    "small": dict(image_size=32, vocab_size=1024, code_dim=8, ch=16, ch_mult=(1, 2, 4, 4), n_res=1,
                  z_channels=32, groups=8),
    "fine": dict(image_size=32, vocab_size=512, code_dim=8, ch=16, ch_mult=(1, 2, 4), n_res=1,
                 z_channels=32, groups=8),
    "medium": dict(image_size=32, vocab_size=1024, code_dim=8, ch=64, ch_mult=(1, 2, 4), n_res=2,
                   z_channels=128, groups=16),
    # With the linear path beside the networks, on a CPU: 4 x 4 tokens, and 8 x 8, which is the default. The
    # networks see 2 x 2 and 4 x 4 pixels as channels.
    "patches-coarse": dict(image_size=32, vocab_size=1024, code_dim=16, l2_norm=False, ema=0.99, stem=2,
                           ch=32, ch_mult=(1, 2, 2), n_res=1, z_channels=64, groups=8, linear=True),
    "patches": dict(image_size=32, vocab_size=1024, code_dim=16, l2_norm=False, ema=0.99, stem=4, ch=64,
                    ch_mult=(1,), n_res=1, z_channels=64, groups=8, linear=True),
}


# ---- The quantiser ---------------------------------------------------------------------------------

class VectorQuantizer(nn.Module):
    """Rounds each token to the nearest of V codes, with the losses that train the codes.

    l2_norm: tokens and codes are compared, and handed on, at unit length. The codebook keeps any length.
    beta weighs the commitment of the encoder. entropy weighs LlamaGen's optional entropy_loss, off as
    published. ema=0: the codes are a parameter and learn by the gradient of |sg(z) - e|^2. ema > 0 (0.99 in
    VQ-VAE): each code is the running mean, with that decay per step, of the z nearest to it. A code used less
    than `restart` times its fair share is then put on a random z of the batch (Jukebox, arxiv.org/abs/
    2005.00341, section 3.1); 0: never.
    """

    def __init__(self, vocab_size, code_dim, l2_norm=True, beta=0.25, entropy=0.0, ema=0.0, restart=0.1):
        super().__init__()
        self.vocab_size = vocab_size
        self.l2_norm = l2_norm
        self.beta = beta
        self.entropy = entropy
        self.ema = ema
        self.restart = restart
        codes = torch.empty(vocab_size, code_dim).uniform_(-1 / vocab_size, 1 / vocab_size)
        codes = self.unit(codes)
        if not ema:
            self.codebook = nn.Parameter(codes)
        else:                                               # with restarts all codes count as dead at first,
            count = torch.full((vocab_size,), float(restart == 0))    # so the first batch seeds them all
            self.register_buffer("codebook", codes)
            self.register_buffer("ema_count", count)                                  # N_k
            self.register_buffer("ema_sum", codes * count[:, None])         # m_k, and e_k = m_k / N_k

    def unit(self, x):
        """x (..., D) -> (..., D), of length 1 with l2_norm, else as it is."""
        return F.normalize(x, dim=-1) if self.l2_norm else x

    @staticmethod
    def distances(z, codes):
        """Squared distances less |z|^2, which is the same for all codes: z (N, D), codes (V, D) -> (N, V).

        |e|^2 - 2 z.e, in one pass over (N, V). In float32: bfloat16 takes another code for 6% of random
        tokens. (TF32, where a GPU is allowed it, swaps near ties.)
        """
        return torch.addmm((codes**2).sum(1), z, codes.T, alpha=-2)

    def nearest(self, z):
        """The nearest code of each token: z (B, T, D) -> ids (B, T) int64. With l2_norm both are compared at
        unit length.
        """
        with torch.autocast(z.device.type, enabled=False), torch.no_grad():
            z = self.unit(z.type_as(self.codebook))
            d = self.distances(z.flatten(0, 1), self.unit(self.codebook))             # (B * T, V)
            return d.argmin(1).view(z.shape[:2])

    def codes(self, ids):
        """ids (B, T) int64 -> (B, T, D), what the decoder sees."""
        return F.embedding(ids, self.unit(self.codebook))

    def forward(self, z):
        """z (B, T, D) -> q (B, T, D) float32, ids (B, T), loss (), logs.

        ids come from nearest(). loss = |sg(z) - e|^2 + beta |z - sg(e)|^2 (VQ-VAE eq. 3), means over tokens
        and over the D channels; with ema the first term is left out, and while training update() is called
        once. entropy_loss() is added with its weight. q is e in value and z for the gradient. logs: commit
        (with its weight beta), usage (share of the V codes that occur in this batch), perplexity exp(entropy
        of their frequencies), 1 .. V, and entropy (with its weight) where it is on.
        """
        with torch.autocast(z.device.type, enabled=False):
            ids = self.nearest(z)
            z = self.unit(z.type_as(self.codebook))
            e = self.codes(ids)
            loss = commit = self.beta * F.mse_loss(z, e.detach())
            p = self.count(ids) / ids.numel()                                         # (V,)
            logs = {"commit": commit.detach(), "usage": (p > 0).float().mean(),
                    "perplexity": torch.exp(-torch.xlogy(p, p).sum())}
            if not self.ema:
                loss = loss + F.mse_loss(e, z.detach())
            elif self.training:
                self.update(z.detach().flatten(0, 1), ids.flatten())
            if self.entropy:
                entropy = self.entropy * self.entropy_loss(z.flatten(0, 1))
                loss = loss + entropy
                logs["entropy"] = entropy.detach()
            q = z + (e - z).detach()                        # value of e, gradient of z: straight through
        return q, ids, loss, logs

    @torch.no_grad()
    def count(self, ids):
        """How often each code occurs: ids (B, T) -> (V,) in the codebook's dtype.

        torch.bincount would wait for the GPU.
        """
        ids = ids.flatten()
        counts = self.codebook.new_zeros(self.vocab_size)
        return counts.index_add_(0, ids, counts.new_ones(ids.shape))

    # ---- Extras: an entropy term, codes as running means

    def entropy_loss(self, z, temperature=0.01):
        """Certain of each token, undecided over all: z (N, D) -> mean H(p) - H(mean p) (), in nats.

        p = softmax(-squared distance / temperature) over the codes. It moves z and codes. (LlamaGen)
        """
        log_p = (-self.distances(z, self.unit(self.codebook)) / temperature).log_softmax(-1)    # (N, V)
        mean = log_p.exp().mean(0)
        return -(log_p.exp() * log_p).sum(-1).mean() + (mean * torch.log(mean + 1e-5)).sum()

    @torch.no_grad()
    def update(self, z, ids):
        """Move the running averages by one batch: z (N, D), ids (N,). (VQ-VAE, appendix A.1)

        N_k = ema N_k + (1 - ema) (number of z of code k), m_k = ema m_k + (1 - ema) (their sum), and e_k is
        unit() of m_k / N_k. A code with N_k below restart * mean N gets a random z of the batch as m_k / N_k,
        each its own, and the mean N as N_k.

        All processes of torch.distributed agree. They take the seeds of process 0: the others add zeros.
        Unlike broadcast, all_reduce can be part of a graph of torch.compile.
        """
        count = self.count(ids)
        total = torch.zeros_like(self.codebook).index_add_(0, ids, z)
        seeds = z[torch.randint(len(z), (self.vocab_size,), device=z.device)]         # (V, D)
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
        n = self.ema_count.sum()                            # Laplace smoothing: never / 0, the sum stays n
        smooth = (self.ema_count + 1e-5) / (n + self.vocab_size * 1e-5) * n
        self.codebook.copy_(self.unit(self.ema_sum / smooth[:, None]))


# ---- The network: vae.py's, with attention at the lowest resolution of the decoder too ------------

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


# ---- The linear path -------------------------------------------------------------------------------

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


def kmeans(z, n, steps=10):
    """Lloyd's algorithm: each code becomes the mean of the z nearest to it.

    z (N, D) on the CPU -> codes (n, D), their shares of z in the last step (n,). A code that is nobody's
    nearest moves to a random z.
    """
    first = torch.randperm(len(z), device="cpu")[torch.arange(n, device="cpu") % len(z)]
    codes = z[first]
    for _ in range(steps):
        ids = torch.cat([VectorQuantizer.distances(part, codes).argmin(1) for part in z.split(4096)])
        count = torch.zeros(n, device="cpu").index_add_(0, ids, torch.ones_like(z[:, 0]))
        total = torch.zeros_like(codes).index_add_(0, ids, z)
        elsewhere = z[torch.randint(len(z), (n,), device="cpu")]
        codes = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], elsewhere)
    return codes, count / len(z)


# ---- The tokenizer ---------------------------------------------------------------------------------

class VQ(nn.Module):
    """VQGAN's autoencoder around a vector quantiser: T ids per image. The defaults are LlamaGen's, small.

    VQ-VAE's classics are l2_norm=False, code_dim=256, ema=0.99. channels=1: grey. Images still come and go as
    (B, 3, H, W); the network in between sees their average. Any other number: images are (B, channels, H, W),
    such as one-hot label maps.

    stem: the networks see stem x stem pixels as channels of one position. linear: the code of a token is that
    of z = path(image) + network(image), and what a code e means is path_out(e) + network(codes). Both
    networks begin at zero, so that after start() this is k-means of patches, and training goes on from there.
    It needs codes of any length: at unit length a dark patch and a bright one would be the same.
    """

    token_dim = None                                        # tokens are ids

    def __init__(self, image_size=32, vocab_size=512, code_dim=8, l2_norm=True, beta=0.25, entropy=0.0,
                 ema=0.0, restart=0.1, ch=16, ch_mult=(1, 2, 4), n_res=1, z_channels=32, groups=8,
                 channels=3, stem=1, linear=False):
        super().__init__()
        lowest = len(ch_mult) - 1                           # the only level with attention
        stride = stem << lowest
        side = image_size // stride
        if image_size % stride:
            raise ValueError(f"image_size {image_size} is not a multiple of {stride}, the stride of this VQ")
        self.grid = (side, side)
        self.seq_len = side * side
        self.vocab_size = vocab_size
        self.channels = channels
        self.stem = stem
        self.encoder = Encoder(z_channels, ch, ch_mult, n_res, (lowest,), groups, channels * stem**2)
        self.quant_conv = nn.Conv2d(z_channels, code_dim, 1)
        self.post_quant_conv = nn.Conv2d(code_dim, z_channels, 1)
        self.decoder = Decoder(z_channels, ch, ch_mult, n_res, (lowest,), groups, channels * stem**2)
        self.path = None
        if linear:
            self.path = LinearPath(stride, channels * stride**2, code_dim)
            self.path_out = nn.Linear(code_dim, channels * stride**2)           # codes -> patches
        self.init_weights()
        self.quantizer = VectorQuantizer(vocab_size, code_dim, l2_norm, beta, entropy, ema, restart)

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
        """Before training: PCA of the patches of images (N, 3, H, W), then a codebook by k-means of its
        tokens, then the linear map from codes to patches with the least squared error.

        Random numbers come from torch's seed and sums are made on the CPU: all processes get the same.
        """
        if self.path is None:
            return
        x = self.pixels(images)
        self.path.start(x)
        self.path.std.fill_(self.path.std.square().mean().sqrt())     # distances are those between patches
        z = self.quantizer.unit(self.path(x))                                         # (N, T, D)
        flat = z.flatten(0, 1).cpu()
        every = max(1, len(flat) // max(32_000, 16 * self.vocab_size))
        codes, share = kmeans(flat[::every], self.vocab_size)
        self.start_codes(codes, share)
        q = self.quantizer.codes(self.quantizer.nearest(z)).flatten(0, 1).cpu().double()        # (N * T, D)
        patches = self.path.cut(x).flatten(0, 1).cpu().double()                       # (N * T, n)
        mean = q.mean(0)
        spread = q.T.cov(correction=0) + 1e-6 * torch.eye(len(mean), dtype=q.dtype, device="cpu")
        weight = torch.linalg.solve(spread, (q - mean).T @ patches / len(q))          # (D, n)
        self.path_out.weight.copy_(weight.T)
        self.path_out.bias.copy_(patches.mean(0) - mean @ weight)

    def start_codes(self, codes, share):
        """The codebook becomes codes (V, D), and moving averages begin as if steps had made them.

        share (V,): of the tokens, per code. A rare code begins at twice the share at which it would restart,
        and has time to show its use.
        """
        quantizer = self.quantizer
        quantizer.codebook.copy_(codes)
        if quantizer.ema:                                   # N_k and m_k of steps of 32 images
            rare = 2 * quantizer.restart / self.vocab_size
            quantizer.ema_count.copy_(share.clamp(min=rare) * 32 * self.seq_len)
            quantizer.ema_sum.copy_(quantizer.codebook * quantizer.ema_count[:, None])

    def pixels(self, images):
        """What the network sees of images: their average (B, 1, H, W) if channels is 1, else the images."""
        return images.mean(1, keepdim=True) if self.channels == 1 else images

    def latents(self, images):
        """images (B, 3, H, W) -> z (B, T, D) float32, not yet rounded and of any length."""
        x = self.pixels(images)
        z = self.quant_conv(self.encoder(F.pixel_unshuffle(x, self.stem))).float().flatten(2).transpose(1, 2)
        return z if self.path is None else z + self.path(x)

    def decode_raw(self, q):
        """Codes q (B, T, D) -> images (B, 3, H, W), not clamped."""
        z = q.transpose(1, 2).unflatten(2, self.grid)                                 # (B, D, h, w)
        raw = F.pixel_shuffle(self.decoder(self.post_quant_conv(z)).float(), self.stem)
        if self.path is not None:
            with torch.autocast(q.device.type, enabled=False):
                raw = raw + self.path.join(self.path_out(q.float()), self.grid)
        return raw.expand(-1, 3, -1, -1) if self.channels == 1 else raw

    def reconstruct(self, images):
        """images (B, 3, H, W) -> recon (B, 3, H, W), loss of the quantiser (), logs."""
        q, _, auxiliary, logs = self.quantizer(self.latents(images))
        return self.decode_raw(q), auxiliary, logs

    def forward(self, images, labels=None):
        """images (B, 3, H, W) in [-1, 1] -> loss (), logs: mse per pixel value, and the quantiser's."""
        recon, auxiliary, logs = self.reconstruct(images)
        mse = F.mse_loss(self.pixels(recon), self.pixels(images))
        return mse + auxiliary, {"mse": mse.detach(), **logs}

    @torch.no_grad()
    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] -> ids (B, T) int64 in 0 .. V - 1, row by row."""
        return self.quantizer.nearest(self.latents(images))

    @torch.no_grad()
    def decode(self, tokens):
        """ids (B, T) int64 -> images (B, 3, H, W) in [-1, 1]."""
        return self.decode_raw(self.quantizer.codes(tokens)).clamp(-1, 1)


# ---- Demo: how many codes are in use, against their dimension --------------------------------------

def fit_vq(model, images, steps, batch_size=8, lr=1e-3):
    """Train on a fixed set of images (N, 3, H, W) -> seconds. Four times this lr halves usage at small D."""
    opt = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.95))
    start = time.perf_counter()
    for step in range(steps):
        opt.param_groups[0]["lr"] = lr * min(1, (step + 1) / 30) * (1 - step / steps)
        loss, _ = model(images[torch.randint(len(images), (batch_size,), device=images.device)])
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
    return time.perf_counter() - start


def tried(dim, l2_norm, vocab, steps, images, held_out):
    """Train one model and look at held_out (N, 3, 32, 32) -> its numbers, ids (N, 64), x_hat, as a dict."""
    torch.manual_seed(0)
    model = VQ(**SIZES["fine"] | dict(vocab_size=vocab, code_dim=dim, l2_norm=l2_norm))
    model.to(images.device, memory_format=torch.channels_last)                        # faster on a CPU
    seconds = fit_vq(model, images, steps)
    ids = model.eval().encode(held_out)
    x_hat = model.decode(ids)
    psnr = 10 * math.log10(4 / F.mse_loss(x_hat, held_out))
    p = model.quantizer.count(ids) / ids.numel()                                      # (V,)
    usage = 100 * (p > 0).float().mean().item()
    perplexity = math.exp(-torch.xlogy(p, p).sum())
    print(f"codes of dimension {dim:3d}, {'unit length' if l2_norm else 'any length '}   {usage:5.1f}% of "
          f"{vocab} in use, perplexity {perplexity:5.1f}   PSNR {psnr:4.1f} dB   {seconds:.0f} s")
    return dict(dim=dim, l2_norm=l2_norm, usage=usage, psnr=psnr, ids=ids.cpu(), x_hat=x_hat.cpu())


def plot_bars(fig, cell, results, vocab):
    """Usage and error of each model, against the dimension of its codes."""
    names = [f"{r['dim']}" if r["l2_norm"] else f"{r['dim']}\nany length" for r in results]
    colours = ["tab:blue" if r["l2_norm"] else "tab:red" for r in results]
    titles = {"usage": f"% of the {vocab} codes in use", "psnr": "PSNR of held-out images, dB"}
    for part, (key, title) in zip(cell.subgridspec(2, 1, hspace=0.5), titles.items()):
        ax = fig.add_subplot(part)
        bars = ax.bar(range(len(results)), [r[key] for r in results], color=colours)
        ax.bar_label(bars, fmt="%.1f", fontsize=9)
        ax.set(title=title, xticks=range(len(results)), xticklabels=names)
        ax.margins(y=0.18)
        ax.set_ylim(bottom=0 if key == "usage" else 10)
    ax.set_xlabel("numbers in a code (blue: at unit length)")


def plot_codes(fig, cell, shown, images, vocab):
    """Two images, and for each model in `shown` their ids and what the decoder makes of them."""
    import matplotlib.pyplot as plt
    cells = cell.subgridspec(2, 5, width_ratios=[1, 1.35, 1, 1.35, 1], wspace=0.06, hspace=0.12)
    hue = torch.arange(vocab) * 0.618 % 1                   # neighbouring ids get colours far apart
    for row, i in enumerate((0, 2)):
        pictures = [(images[i], "image")]
        for r in shown:
            name = f"dimension {r['dim']}" + ("" if r["l2_norm"] else ", any length")
            pictures += [(r["ids"][i].view(8, 8), f"ids, {name}"), (r["x_hat"][i], "decoded")]
        for column, (picture, title) in enumerate(pictures):
            ax = fig.add_subplot(cells[row, column])
            ax.set_axis_off()
            if row == 0:
                ax.set_title(title, fontsize=10)
            if picture.ndim == 3:
                ax.imshow((picture.permute(1, 2, 0) + 1) / 2, interpolation="nearest")
                continue
            ax.imshow(plt.cm.hsv(hue[picture].numpy()) * [1, 1, 1, 0.45], interpolation="nearest")
            for t, k in enumerate(picture.flatten().tolist()):
                ax.text(t % 8, t // 8, k, ha="center", va="center", fontsize=6.5)


def main():
    parser = argparse.ArgumentParser(description="How many codes are used? It depends on their dimension.")
    parser.add_argument("--steps", type=int, default=150, help="training steps of each of the six models")
    parser.add_argument("--vocab", type=int, default=512, help="codes in each codebook")
    args = parser.parse_args()
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import data
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = data.draw(torch.arange(2000, device=device))[0]
    held_out = data.draw(torch.arange(128, device=device) + data.VAL_INDEX)[0]
    arms = [(2, True), (4, True), (8, True), (32, True), (256, True), (256, False)]
    results = [tried(*arm, args.vocab, args.steps, images, held_out) for arm in arms]
    fig = plt.figure(figsize=(12.5, 5.6))
    left, right = fig.add_gridspec(1, 2, width_ratios=[1, 1.75], left=0.06, right=0.99, top=0.85, bottom=0.13,
                                   wspace=0.1)
    plot_bars(fig, left, results, args.vocab)
    plot_codes(fig, right, [results[2], results[-1]], held_out.cpu().clamp(-1, 1), args.vocab)
    fig.suptitle("vq.py: short codes that differ only in direction stay in use, long ones die; 8 numbers "
                 "draw best\nright: the 64 numbers that an image becomes; equal colours are equal numbers",
                 fontsize=12)
    fig.savefig("vq.png", dpi=80)
    print("wrote vq.png")


if __name__ == "__main__":
    main()
