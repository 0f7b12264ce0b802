"""
A convolutional beta-VAE: images to a small grid of continuous tokens and back.

An autoencoder squeezes an image into T tokens of D numbers. Nothing tells it where in that space the tokens
of real images lie, so decoding a random point gives mud. A VAE (Kingma & Welling 2013,
arxiv.org/abs/1312.6114) encodes each image as a little Gaussian cloud and pays for every nat by which the
cloud differs from N(0, 1):

    loss = |x - decoder(z)|^2 + beta * KL( N(mean, std^2) || N(0, 1) ),     z = mean + std * noise

A small beta (GIVT, MAR, latent diffusion) keeps pictures sharp and leaves it to a second model to learn where
the tokens lie. The network is KL-16, of LDM and MAR: attention only at the lowest resolution. (GIVT's own VAE
is another: 53.03M parameters, no attention, average pooling.)

Shapes:  B batch, H W pixels, T = h * w tokens (h = H / 2^(levels - 1)), D numbers in one token

    images (B, 3, H, W) --Encoder--> moments (B, 2D, h, w) --> mean, std (B, T, D)
    tokens (B, T, D) --> (B, D, h, w) --Decoder--> images (B, 3, H, W) in [-1, 1]

    python vae.py              # AE, DAE and VAE side by side, writes vae.png; about 1 minute on 2 CPU cores

Try it yourself:
  1. Set --beta 30: the KL falls to nothing, and so does the picture ("posterior collapse"). And --beta 0.02?
  2. Decode z = 2 * noise and 0.5 * noise in main(). Where does each model still draw shapes?
  3. Replace the nearest-neighbour Upsample by a transposed convolution and look for a checkerboard.
"""
import argparse
import math
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

SIZES = {
    # Networks on pixels: for a CPU and a GPU, for MNIST's 28 x 28, and LDM's and MAR's (66.46M).
    "small": dict(image_size=32, token_dim=8, ch=16, ch_mult=(1, 2, 4, 4), n_res=1, groups=8),
    "medium": dict(image_size=32, token_dim=8, ch=64, ch_mult=(1, 2, 2, 4), n_res=2, groups=16),
    "mnist28": dict(image_size=28, token_dim=4, ch=16, ch_mult=(1, 2, 2), n_res=1, groups=8),
    "kl16": dict(image_size=256, token_dim=16, ch=128, ch_mult=(1, 1, 2, 2, 4), n_res=2, groups=32),
    # The defaults of train.py, on a CPU and a GPU: 2 x 2 pixels as channels, and the linear path beside the
    # networks.
    "patches": dict(image_size=32, token_dim=32, stem=2, ch=32, ch_mult=(1, 2, 2), n_res=1, groups=8,
                    linear=True),
    "patches-medium": dict(image_size=32, token_dim=32, stem=2, ch=128, ch_mult=(1, 2, 2), n_res=2, groups=32,
                           linear=True),
}


# ---- The network: residual blocks, attention at the lowest resolution ------------------------------

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


# ---- The VAE ---------------------------------------------------------------------------------------

class VAE(nn.Module):
    """KL autoencoder. beta=0: a plain autoencoder (AE), without noise in the latents.

    beta weighs the KL in nats against the squared error summed over the image, both in [-1, 1] pixel units:
    twice the variance of the decoder's pixel noise makes the loss a multiple of the exact bound on
    -log p(image).

    corrupt: standard deviation of Gaussian noise on the input pixels while training. With beta=0 this is a
    denoising autoencoder (DAE). channels=1: grey. Images still come and go as (B, 3, H, W); the network in
    between sees their average. Any other number: images are (B, channels, H, W), such as one-hot label maps.
    likelihood="logistic": see log_likelihood. stem, linear, border: the networks see stem x stem pixels as
    channels; linear puts LinearPath beside them.
    """

    vocab_size = None                                       # tokens are continuous

    def __init__(self, image_size=32, token_dim=8, beta=1e-2, corrupt=0.0, ch=16, ch_mult=(1, 2, 4, 4),
                 n_res=1, enc_attn=None, dec_attn=(), groups=8, channels=3, likelihood="mse", stem=1,
                 linear=False, border=2.0):
        super().__init__()
        stride = stem << (len(ch_mult) - 1)
        side = image_size // stride
        if image_size % stride:
            raise ValueError(f"image_size {image_size} is not a multiple of {stride}, the stride of this VAE")
        if likelihood not in ("mse", "logistic"):
            raise ValueError(f"likelihood {likelihood!r} must be 'mse' or 'logistic'")
        if enc_attn is None:
            enc_attn = (len(ch_mult) - 1,)
        self.grid = (side, side)
        self.seq_len = side * side
        self.token_dim = token_dim
        self.beta = beta
        self.corrupt = corrupt
        self.channels = channels
        self.likelihood = likelihood
        self.stem = stem
        self.encoder = Encoder(2 * token_dim, ch, ch_mult, n_res, enc_attn, groups, channels * stem**2)
        self.quant_conv = nn.Conv2d(2 * token_dim, 2 * token_dim, 1)
        self.post_quant_conv = nn.Conv2d(token_dim, token_dim, 1)
        self.decoder = Decoder(token_dim, ch, ch_mult, n_res, dec_attn, groups, channels * stem**2)
        self.path = LinearPath(stride, channels * stride**2, token_dim, border) if linear else None
        self.init_weights()
        if likelihood == "logistic":                      # log s of log_likelihood: about 17 of the 256 steps
            self.log_scale = nn.Parameter(torch.full((channels,), -2.0))
        # Set by measure() at the end of training: tokens = (latents - mean) * scale.
        self.register_buffer("latent_mean", torch.zeros(token_dim))
        self.register_buffer("latent_scale", torch.ones(token_dim))

    def init_weights(self):
        """Each block starts as the identity: 4 dB more than by PyTorch's default after 300 steps (small)."""
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
        """Before training: the linear path becomes the PCA of images (N, 3, H, W), so that tokens and
        pictures are those of PCA. The best variance of a component of variance v is beta / (2 v): see
        kl().
        """
        if self.path is not None:
            self.path.start(self.pixels(images))
            if self.beta:
                logvar = (self.beta / 2 / self.path.std**2).clamp(max=1).log()
                self.quant_conv.bias[self.token_dim:] = logvar

    def posterior(self, images):
        """q(z | image), a Gaussian per token: images (B, 3, H, W) -> mean, std, each (B, T, D), raw."""
        x = self.pixels(images)
        moments = self.quant_conv(self.encoder(F.pixel_unshuffle(x, self.stem))).float()   # (B, 2D, h, w)
        mean, logvar = moments.flatten(2).transpose(1, 2).chunk(2, dim=-1)            # (B, T, D) each
        if self.path is not None:
            mean = mean + self.path(x)
        if self.beta == 0:                                  # an autoencoder knows no uncertainty
            return mean, torch.zeros_like(mean)
        return mean, torch.exp(0.5 * logvar.clamp(-30, 20))

    @staticmethod
    def kl(mean, std):
        """KL( N(mean, std^2) || N(0, 1) ) in nats per token: mean, std (B, T, D) -> (B, T).

        Closed form, Kingma & Welling appendix B: 1/2 sum_d (mean^2 + std^2 - 1 - log std^2).
        """
        return 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).sum(-1)

    @staticmethod
    def reparameterise(mean, std):
        """Draw z ~ N(mean, std^2) so that gradients reach mean and std: (B, T, D), (B, T, D) -> (B, T, D).

        z = mean + std * noise, N(0, 1) for every number, from torch's global generator. (Kingma & Welling
        2013, section 2.4)
        """
        return mean + std * torch.randn_like(std)

    def decode_raw(self, z):
        """z (B, T, D) in raw latent units -> images (B, channels, H, W), not clamped; grey has 1 channel."""
        maps = z.transpose(1, 2).unflatten(2, self.grid)                              # (B, D, h, w)
        raw = F.pixel_shuffle(self.decoder(self.post_quant_conv(maps)).float(), self.stem)
        return raw if self.path is None else raw + self.path.inverse(z, self.grid)

    def reconstruct(self, images):
        """images (B, 3, H, W) -> recon (B, 3, H, W), beta * KL per pixel value (), logs."""
        noisy = images
        if self.corrupt and self.training:
            noisy = images + self.corrupt * torch.randn_like(images)
        mean, std = self.posterior(noisy)
        if self.beta == 0:
            return self.as_images(self.decode_raw(mean)), images.new_zeros(()), {}
        kl = self.kl(mean, std).mean()                                                # nats per token
        recon = self.as_images(self.decode_raw(self.reparameterise(mean, std)))
        unit = math.log(2) if self.likelihood == "logistic" else 1
        weight = self.seq_len / (unit * self.pixels(images)[0].numel())
        return recon, self.beta * kl * weight, {"kl": kl.detach()}

    def forward(self, images, labels=None):
        """images (B, 3, H, W) in [-1, 1] -> loss (), logs: mse per pixel value, kl in nats per token.

        With likelihood="logistic", logs hold bits per dimension (pixel value) in place of mse: of the pixels
        given z, and of the whole bound.
        """
        recon, auxiliary, logs = self.reconstruct(images)
        if self.likelihood == "logistic":
            dims = math.log(2) * self.pixels(images)[0].numel()
            bits = -self.log_likelihood(images, recon).mean() / dims              # nats / (ln 2 * dimensions)
            rate = logs["kl"] * self.seq_len / dims if logs else 0
            return bits + auxiliary, {"pixel_bits_per_dim": bits.detach(),
                                      "bits_per_dim": bits.detach() + rate, **logs}
        mse = F.mse_loss(self.pixels(recon), self.pixels(images))
        return mse + auxiliary, {"mse": mse.detach(), **logs}

    def normalise(self, z):
        """Raw latents -> tokens of unit variance."""
        return (z - self.latent_mean) * self.latent_scale

    @torch.no_grad()
    def encode(self, images):
        """images (B, 3, H, W) -> a draw from the posterior (B, T, D), float32, of unit variance."""
        return self.normalise(self.reparameterise(*self.posterior(images)))

    @torch.no_grad()
    def decode(self, tokens):
        """tokens (B, T, D) of unit variance -> images (B, 3, H, W) in [-1, 1]."""
        return self.as_images(self.decode_raw(tokens / self.latent_scale + self.latent_mean)).clamp(-1, 1)

    @torch.no_grad()
    def measure(self, mean, std):
        """Set latent_mean and latent_scale from the posteriors of the training set, each (N, T, D).

        Both are per channel, over images and positions. The variance of the latents is that of the means plus
        the mean of the variances, and latent_scale is 1 over its root. In float64, and so on the CPU: Apple's
        GPUs have no float64.
        """
        mean = mean.flatten(0, -2).cpu().double()                                     # (N * T, D)
        std = std.flatten(0, -2).cpu().double()
        self.latent_mean.copy_(mean.mean(0).float())
        self.latent_scale.copy_((mean.var(0) + (std**2).mean(0)).rsqrt().float())

    # ---- Extras: grey images and label maps, an exact likelihood of 8-bit pixels

    def pixels(self, images):
        """What the network sees of images: their average (B, 1, H, W) if channels is 1, else the images."""
        return images.mean(1, keepdim=True) if self.channels == 1 else images

    def as_images(self, raw):
        """The decoder's output (B, channels, H, W) -> images of as many channels as came in: 3 if grey."""
        return raw.expand(-1, 3, -1, -1) if self.channels == 1 else raw

    def log_likelihood(self, images, raw):
        """log p(image | z) in nats under likelihood="logistic": images, raw (B, channels or 3, H, W) -> (B,).

        The decoder gives a probability to each of the 256 values of a pixel. The loss is then in bits per
        dimension, and with beta=1 it is the bound itself: how long a file the model would make of an image. A
        value v lies at x = v / 127.5 - 1. Its probability is what a logistic distribution with mean m = raw
        and scale s, learned per channel, has within half a step of x; the outermost bins are open
        (PixelCNN++, Salimans et al. 2017, arxiv.org/abs/1701.05517):

            P(v) = sigmoid(a) - sigmoid(b),   a = (x + 1/255 - m) / s,   b = (x - 1/255 - m) / s
                 = sigmoid(a) * sigmoid(-b) * (1 - exp(b - a))

        Far from the mean the difference is 0 in float32 and its log -inf. The log of the product never is.
        """
        v = ((self.pixels(images).float() + 1) * 127.5).round()                       # (B, channels, H, W)
        log_s = self.log_scale.clamp(min=-7)[:, None, None]                           # PixelCNN++'s floor
        a = (v / 127.5 - 1 + 1 / 255 - self.pixels(raw).float()) * torch.exp(-log_s)
        step = 2 / 255 * torch.exp(-log_s)                                        # a - b, the same everywhere
        below = torch.where(v < 255, F.logsigmoid(a), 0)                              # log P(value <= v)
        above = torch.where(v > 0, F.logsigmoid(step - a), 0)                         # log P(value >= v)
        inside = torch.where((v > 0) & (v < 255), torch.log(-torch.expm1(-step)), 0)
        return (below + above + inside).sum((1, 2, 3))


# ---- Extras: pixels as tokens, nothing trained -----------------------------------------------------

PATCHES = {"2": dict(patch=2), "4": dict(patch=4), "8": dict(patch=8)}             # of `--tokenizer patches`


class Patches(nn.Module):
    """A token is patch x patch pixels, whitened by a PCA of full rank: invertible, so no pixel is lost.

    Nothing is trained: start() computes the eigenvectors. A likelihood of tokens is then one of images. But
    256 values have no density: a model that puts narrow peaks on them gains without end. So encode() adds u,
    uniform over the step between two values, and decode() rounds it away. By Jensen's inequality what a model
    p of v + u pays is an upper bound of what it pays for the value v (Theis et al. 2016,
    arxiv.org/abs/1511.01844, section 3.1):

        -log2 P(v) <= E_u[-log2 p(v + u)],      P(v) = integral of p(v + u) over u in [-1/2, 1/2)

    token_dim: patch^2 for grey pictures, which come and go as (B, 3, H, W); 3 patch^2 if it is not given.
    Raises ValueError for another number, and where image_size is no multiple of patch.
    """

    vocab_size = None                                       # tokens are continuous

    def __init__(self, image_size=32, patch=4, token_dim=None):
        super().__init__()
        self.token_dim = token_dim or 3 * patch**2
        self.channels = self.token_dim // patch**2
        if self.channels not in (1, 3) or self.token_dim % patch**2:
            raise ValueError(f"patches of {patch} x {patch} pixels have {3 * patch**2} numbers, or, if grey, "
                             f"{patch**2}, not {token_dim}")
        if image_size % patch:
            raise ValueError(f"image_size {image_size} is not a multiple of {patch}, the side of a patch")
        self.grid = (image_size // patch, image_size // patch)
        self.seq_len = self.grid[0] * self.grid[1]
        self.path = LinearPath(patch, self.token_dim, self.token_dim, border=1.0)
        nn.init.eye_(self.path.basis)                       # until start()

    def pixels(self, images):
        """images (B, 3, H, W) -> (B, channels, H, W): their average if they are grey."""
        return images.mean(1, keepdim=True) if self.channels == 1 else images

    def dequantised(self, images, u=None):
        """images (B, 3, H, W) plus noise of one step of 1/127.5 -> (B, channels, H, W). u: in [0, 1)."""
        x = self.pixels(images)
        return x + ((torch.rand_like(x) if u is None else u) - 0.5) / 127.5

    def start(self, images):
        """PCA of images (N, 3, H, W) with their noise, which gives pixels that never change a variance."""
        self.path.start(self.dequantised(images))

    @torch.no_grad()
    def encode(self, images, u=None):
        """images (B, 3, H, W) of 256 values in [-1, 1] -> tokens (B, T, D), of variance 1 over the images."""
        return self.path(self.dequantised(images, u))

    @torch.no_grad()
    def decode(self, tokens):
        """tokens (B, T, D) -> images (B, 3, H, W), each number the nearest of the 256 values.

        In float32 it is another value than before for one pixel in some ten thousand, whose noise was at the
        border of its step.
        """
        x = self.path.inverse(tokens, self.grid)
        return (((x + 1) * 127.5).round() / 127.5 - 1).clamp(-1, 1).expand(-1, 3, -1, -1)

    def bits_per_dim(self, nats):
        """-log p of tokens, nats per token () -> bits per pixel value (): the upper bound of the docstring.

        tokens = (x - mean) V / std with V orthogonal, so -log p(x) = -log p(tokens) + sum log std. A step
        between two values is 1/127.5 long: their probability is the density of x times that length.
        """
        nats = nats + self.path.std.log().sum() + self.token_dim * math.log(127.5)
        return nats / (self.token_dim * math.log(2))

    # What a VAE has as well, here without noise and without a scale of its own.

    def posterior(self, images):
        """images (B, 3, H, W) -> the tokens without noise (B, T, D), and zeros (B, T, D)."""
        mean = self.path(self.pixels(images))
        return mean, torch.zeros_like(mean)

    def normalise(self, z):
        return z

    def measure(self, mean, std):
        """Their mean is 0 and their variance 1 already."""


# ---- Demo ------------------------------------------------------------------------------------------

def fit_autoencoder(model, images, steps, batch_size=32, lr=4e-3):
    """Train on a fixed set of images (N, 3, H, W) -> seconds."""
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
    start = time.perf_counter()
    for step in range(steps):
        opt.param_groups[0]["lr"] = lr * min(1, (step + 1) / 30) * (1 - step / steps)
        loss, _ = model(images[torch.randint(len(images), (batch_size,), device=images.device)])
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
    return time.perf_counter() - start


def show_vae(rows, path):
    """A row of pictures for each (text, images (n, 3, H, W) in [-1, 1]) -> a PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 0.72 * len(rows) + 0.6), layout="constrained")
    for ax, (text, images) in zip(axes, rows):
        strip = ((images.clamp(-1, 1) + 1) / 2).permute(2, 0, 3, 1).flatten(1, 2)     # (H, n * W, 3)
        ax.imshow(strip.cpu(), interpolation="nearest")
        ax.set_ylabel(text, rotation=0, ha="right", va="center")
        ax.set(xticks=[], yticks=[])
    figure.suptitle("vae.py: all three reconstruct, but only the VAE\n"
                    "turns N(0, 1) noise into one thing on a dark ground")
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description="Three autoencoders: which of them can draw from noise?")
    parser.add_argument("--steps", type=int, default=165, help="training steps of each of the three models")
    parser.add_argument("--beta", type=float, default=2.0, help="weight of the VAE's KL")
    args = parser.parse_args()
    import data
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    images = data.draw(torch.arange(4000, device=device))[0]
    held_out = data.draw(torch.arange(12, device=device) + data.VAL_INDEX)[0]
    rows = [("held-out images", held_out)]
    kinds = {"AE": dict(beta=0), "DAE": dict(beta=0, corrupt=0.5), "VAE": dict(beta=args.beta)}
    for name, options in kinds.items():
        torch.manual_seed(0)
        model = VAE(**SIZES["small"], **options).to(device, memory_format=torch.channels_last)
        seconds = fit_autoencoder(model, images, args.steps)
        model.eval()
        with torch.no_grad():
            mean, std = model.posterior(images[:1000])
            x_hat = model.decode_raw(model.posterior(held_out)[0])
            prior = model.decode_raw(torch.randn(12, model.seq_len, model.token_dim, device=device))
        psnr = 10 * math.log10(4 / F.mse_loss(x_hat.clamp(-1, 1), held_out))
        spread = (mean.var((0, 1)) + (std**2).mean((0, 1))).sqrt()
        kl = f"KL {model.kl(mean, std).mean():5.1f} nats per token" if model.beta else "no KL in the loss"
        print(f"{name:4s} PSNR {psnr:4.1f} dB   latents: mean {mean.mean():+5.2f}, "
              f"std {spread.min():.2f} to {spread.max():.2f} by channel (N(0, 1) is 0 and 1)   {kl}   "
              f"{seconds:.0f} s")
        rows.append((f"{name}: reconstructed", x_hat))
        rows.append((f"{name}: decoded N(0, 1) noise", prior))
    show_vae(rows, "vae.png")
    print("wrote vae.png")


if __name__ == "__main__":
    main()
