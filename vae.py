"""
A convolutional beta-VAE: images to a small grid of continuous tokens and back.

An autoencoder squeezes an image into T tokens of D numbers. Nothing tells it where in that space the tokens of real
images lie, so decoding a random point gives mud. A VAE (Kingma & Welling 2013, https://arxiv.org/abs/1312.6114)
encodes each image as a little Gaussian cloud and pays for every nat by which the cloud differs from N(0, 1):

    loss = |x - decoder(z)|^2 + beta * KL( N(mean, std^2) || N(0, 1) ),     z = mean + std * noise

Small beta (GIVT, MAR, latent diffusion) keeps pictures sharp and leaves it to a second model to learn where the
tokens lie; Joint, below, trains the two together by the exact bound on log p(image). The network is the published one
of LDM and MAR ("KL-16"): attention only at the lowest resolution.

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
    "kl16": dict(image_size=256, token_dim=16, ch=128, ch_mult=(1, 1, 2, 2, 4), n_res=2, groups=32),   # 66.46M, GIVT and MAR
    "small": dict(image_size=32, token_dim=8, ch=16, ch_mult=(1, 2, 4, 4), n_res=1, groups=8),         # 32 x 32 on a CPU
    "mnist28": dict(image_size=28, token_dim=4, ch=16, ch_mult=(1, 2, 2), n_res=1, groups=8),          # true MNIST
    "medium": dict(image_size=32, token_dim=8, ch=64, ch_mult=(1, 2, 2, 4), n_res=2, groups=16),       # 32 x 32 on a GPU
}


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
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):                                   # (B, c, h, w) -> (B, c, h, w)
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))      # (B, h*w, c)
        weights = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)                 # (B, h*w, h*w)
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
    """images (B, channels, H, W) -> features (B, c_out, h, w). Attention after the blocks of the levels in attn_levels."""

    def __init__(self, c_out, ch=128, ch_mult=(1, 1, 2, 2, 4), n_res=2, attn_levels=(4,), groups=32, channels=3):
        c, layers = ch, [nn.Conv2d(channels, ch, 3, padding=1)]
        for level, mult in enumerate(ch_mult):
            for _ in range(n_res):
                layers.append(ResBlock(c, ch * mult, groups))
                c = ch * mult
                if level in attn_levels:
                    layers.append(AttnBlock(c, groups))
            if level < len(ch_mult) - 1:
                layers.append(Downsample(c))
        layers += [ResBlock(c, c, groups), AttnBlock(c, groups), ResBlock(c, c, groups)]
        super().__init__(*layers, nn.GroupNorm(groups, c, eps=1e-6), nn.SiLU(), nn.Conv2d(c, c_out, 3, padding=1))


class Decoder(nn.Sequential):
    """features (B, c_in, h, w) -> images (B, channels, H, W); mirrors Encoder with one more block per level."""

    def __init__(self, c_in, ch=128, ch_mult=(1, 1, 2, 2, 4), n_res=2, attn_levels=(), groups=32, channels=3):
        c = ch * ch_mult[-1]
        layers = [nn.Conv2d(c_in, c, 3, padding=1), ResBlock(c, c, groups), AttnBlock(c, groups), ResBlock(c, c, groups)]
        for level in reversed(range(len(ch_mult))):
            for _ in range(n_res + 1):
                layers.append(ResBlock(c, ch * ch_mult[level], groups))
                c = ch * ch_mult[level]
                if level in attn_levels:
                    layers.append(AttnBlock(c, groups))
            if level > 0:
                layers.append(Upsample(c))
        super().__init__(*layers, nn.GroupNorm(groups, c, eps=1e-6), nn.SiLU(), nn.Conv2d(c, channels, 3, padding=1))


class VAE(nn.Module):
    """KL autoencoder. beta=0: a plain autoencoder (AE), no noise in the latents. corrupt > 0: Gaussian noise of that
    standard deviation on the input pixels while training (with beta=0 a denoising autoencoder, DAE).

    beta weighs the KL in nats against the squared error summed over the image, both in [-1, 1] pixel units: twice
    the variance of the decoder's pixel noise makes the loss a multiple of the exact bound on -log p(image).
    With likelihood="logistic" the decoder gives a probability to each of 256 values of a pixel and the loss is in
    bits per dimension; with beta=1 it is that bound itself, and tells how long a file the model would make of an image.

    channels=1: grey. Images still come and go as (B, 3, H, W), the network in between sees their average. Any other
    number: images are (B, channels, H, W), such as one-hot label maps.
    """

    vocab_size = None                                       # tokens are continuous

    def __init__(self, image_size=32, token_dim=8, beta=1e-2, corrupt=0.0, ch=16, ch_mult=(1, 2, 4, 4), n_res=1,
                 enc_attn=None, dec_attn=(), groups=8, channels=3, likelihood="mse"):
        super().__init__()
        side, D = image_size >> (len(ch_mult) - 1), token_dim
        if image_size % (1 << (len(ch_mult) - 1)):
            raise ValueError(f"image_size {image_size} is not a multiple of {1 << (len(ch_mult) - 1)}, the stride of this VAE")
        if likelihood not in ("mse", "logistic"):
            raise ValueError(f"likelihood {likelihood!r} must be 'mse' or 'logistic'")
        self.grid, self.seq_len, self.token_dim = (side, side), side * side, D
        self.beta, self.corrupt, self.channels, self.likelihood = beta, corrupt, channels, likelihood
        enc_attn = (len(ch_mult) - 1,) if enc_attn is None else enc_attn
        self.encoder = Encoder(2 * D, ch, ch_mult, n_res, enc_attn, groups, channels)
        self.quant_conv = nn.Conv2d(2 * D, 2 * D, 1)
        self.post_quant_conv = nn.Conv2d(D, D, 1)
        self.decoder = Decoder(D, ch, ch_mult, n_res, dec_attn, groups, channels)
        for module in self.modules():                       # each block starts as the identity: 4 dB more after 300 steps
            if isinstance(module, nn.Conv2d):               # of a small model than PyTorch's default initialisation
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, (ResBlock, AttnBlock)):
                nn.init.zeros_((module.conv2 if isinstance(module, ResBlock) else module.proj_out).weight)
        if likelihood == "logistic":                        # s of log_likelihood, e^-2: about 17 of the 256 steps
            self.log_scale = nn.Parameter(torch.full((channels,), -2.0))
        self.register_buffer("latent_mean", torch.zeros(D))  # set by measure() at the end of training
        self.register_buffer("latent_scale", torch.ones(D))  # tokens = (latents - mean) * scale

    def pixels(self, images):
        """What the network sees of images: (B, 3, H, W) -> (B, 1, H, W) where it is grey, else the images themselves."""
        return images.mean(1, keepdim=True) if self.channels == 1 else images

    def posterior(self, images):
        """q(z | image), a Gaussian per token: images (B, 3, H, W) -> mean, std, each (B, T, D), raw latent units."""
        moments = self.quant_conv(self.encoder(self.pixels(images))).float().flatten(2).transpose(1, 2)    # (B, T, 2D)
        mean, logvar = moments.chunk(2, dim=-1)
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
        """Draw z ~ N(mean, std^2) so that gradients reach mean and std: (B, T, D), (B, T, D) -> (B, T, D)."""
        return mean + std * torch.randn_like(std)

    def decode_raw(self, z):
        """z (B, T, D) in raw latent units -> images (B, channels, H, W), not clamped; a grey one has 1 channel."""
        z = z.transpose(1, 2).unflatten(2, self.grid)                                       # (B, D, h, w)
        return self.decoder(self.post_quant_conv(z)).float()

    def as_images(self, raw):
        """The decoder's output -> images of as many channels as came in: (B, 1, H, W) -> (B, 3, H, W) if grey."""
        return raw.expand(-1, 3, -1, -1) if self.channels == 1 else raw

    def log_likelihood(self, images, raw):
        """log p(image | z) in nats under likelihood="logistic": images, raw, both (B, channels or 3, H, W) -> (B,).

        A pixel has 256 values v, at x = v / 127.5 - 1. Its probability is what a logistic distribution with mean m =
        raw and scale s, learned per channel, has within half a step of x; the outermost bins are open (PixelCNN++,
        Salimans et al. 2017, 1701.05517):

            P(v) = sigmoid(a) - sigmoid(b),   a = (x + 1/255 - m) / s,   b = (x - 1/255 - m) / s
                 = sigmoid(a) * sigmoid(-b) * (1 - exp(b - a))

        Far from the mean the difference is 0 in float32 and its log -inf; the log of the product never is.
        """
        v = ((self.pixels(images).float() + 1) * 127.5).round()                             # (B, channels, H, W)
        log_s = self.log_scale.clamp(min=-7)[:, None, None]                                 # PixelCNN++'s floor: 0.04 bit
        a = (v / 127.5 - 1 + 1 / 255 - self.pixels(raw).float()) * torch.exp(-log_s)
        step = 2 / 255 * torch.exp(-log_s)                                                  # a - b, the same everywhere
        below = torch.where(v < 255, F.logsigmoid(a), 0)                                    # log P(value <= v)
        above = torch.where(v > 0, F.logsigmoid(step - a), 0)                               # log P(value >= v)
        inside = torch.where((v > 0) & (v < 255), torch.log(-torch.expm1(-step)), 0)
        return (below + above + inside).sum((1, 2, 3))

    def reconstruct(self, images):
        """images (B, 3, H, W) -> recon (B, 3, H, W), beta * KL per pixel value () (in bits if logistic), logs."""
        noisy = images + self.corrupt * torch.randn_like(images) if self.corrupt and self.training else images
        mean, std = self.posterior(noisy)
        if self.beta == 0:
            return self.as_images(self.decode_raw(mean)), images.new_zeros(()), {}
        kl = self.kl(mean, std).mean()                                                      # nats per token
        recon = self.as_images(self.decode_raw(self.reparameterise(mean, std)))
        unit = math.log(2) if self.likelihood == "logistic" else 1
        return recon, self.beta * kl * (self.seq_len / (unit * self.pixels(images)[0].numel())), {"kl": kl.detach()}

    def forward(self, images, labels=None):
        """images (B, 3, H, W) in [-1, 1] -> loss (), logs: kl in nats per token, and mse per pixel value, or, with
        likelihood="logistic", bits per dimension (pixel value): of the pixels given z, and of the whole bound."""
        recon, auxiliary, logs = self.reconstruct(images)
        if self.likelihood == "logistic":
            dims = math.log(2) * self.pixels(images)[0].numel()
            bits = -self.log_likelihood(images, recon).mean() / dims                        # nats / (ln 2 * dimensions)
            rate = logs["kl"] * self.seq_len / dims if logs else 0
            return bits + auxiliary, {"pixel_bits_per_dim": bits.detach(), "bits_per_dim": bits.detach() + rate, **logs}
        mse = F.mse_loss(self.pixels(recon), self.pixels(images))
        return mse + auxiliary, {"mse": mse.detach(), **logs}

    def normalise(self, z):
        """Raw latents -> tokens of unit variance."""
        return (z - self.latent_mean) * self.latent_scale

    @torch.no_grad()
    def encode(self, images):
        """images (B, 3, H, W) -> one draw from the posterior (B, T, D), float32, unit variance over the data."""
        return self.normalise(self.reparameterise(*self.posterior(images)))

    @torch.no_grad()
    def decode(self, tokens):
        """tokens (B, T, D) of unit variance -> images (B, 3, H, W) in [-1, 1]."""
        return self.as_images(self.decode_raw(tokens / self.latent_scale + self.latent_mean)).clamp(-1, 1)

    @torch.no_grad()
    def measure(self, mean, std):
        """Set latent_mean and latent_scale from the posteriors of the training set, each (N, T, D)."""
        mean, std = mean.flatten(0, -2).double(), std.flatten(0, -2).double()
        self.latent_mean.copy_(mean.mean(0))
        self.latent_scale.copy_((mean.var(0) + (std**2).mean(0)).rsqrt())

    @classmethod
    def from_official(cls, state_dict, groups=32):
        """Weights with LDM's key names (MAR's kl16.ckpt, LDM's kl-f*): a state dict or a path -> VAE in eval mode.

        The sizes are read off the shapes. latent_scale becomes MAR's 0.2325 = 1 / std over ImageNet, with no mean
        taken off (papers: LDM 2112.10752, MAR 2406.11838). Refuses unknown or missing keys by name.
        """
        if not isinstance(state_dict, dict):
            state_dict = load_weights(state_dict)
        sd = state_dict.get("model", state_dict.get("state_dict", state_dict))
        sd = {k: v for k, v in sd.items() if not k.startswith("loss.")}
        need = [k for k in ("encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight", "quant_conv.weight",
                           "decoder.conv_in.weight") if k not in sd]
        if need:
            raise ValueError(f"not an LDM-style autoencoder: the key {need[0]} is missing")
        count = lambda start: len({k[len(start):].split(".")[0] for k in sd if k.startswith(start)})
        levels, ch = count("encoder.down."), sd["encoder.conv_in.weight"].shape[0]
        mult = tuple(sd[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // ch for i in range(levels))
        n_res = count("encoder.down.0.block.")
        enc_attn = tuple(i for i in range(levels) if count(f"encoder.down.{i}.attn."))
        dec_attn = tuple(i for i in range(levels) if count(f"decoder.up.{i}.attn."))
        model = cls(image_size=16 << (levels - 1), token_dim=sd["quant_conv.weight"].shape[0] // 2, ch=ch, ch_mult=mult,
                    n_res=n_res, enc_attn=enc_attn, dec_attn=dec_attn, groups=groups)
        names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
        for part, official in (("encoder", ldm_names(levels, n_res, enc_attn)),
                               ("decoder", ldm_names(levels, n_res + 1, dec_attn, decoder=True))):
            layers = [i for i, layer in enumerate(getattr(model, part)) if list(layer.parameters())]
            names |= {f"{part}.{name}": f"{part}.{i}" for name, i in zip(official, layers, strict=True)}
        ours = {}
        for key, value in sd.items():
            owner = next((n for n in names if key.startswith(n + ".")), None)
            if owner is None:
                raise ValueError(f"unknown key {key} in the autoencoder's weights")
            ours[names[owner] + key[len(owner):]] = value.float()
        missing = [k for k, _ in model.named_parameters() if k not in ours]
        unknown = [k for k in ours if k not in model.state_dict()]
        if missing or unknown:
            raise ValueError(f"the autoencoder's weights do not fit: missing {missing[:3]}, unknown {unknown[:3]}")
        model.load_state_dict(ours, strict=False)           # latent_mean stays 0
        model.latent_scale.fill_(0.2325)
        return model.eval()


def bound(vae, generator, images, cond):
    """How many bits per dimension (pixel value) VAE and generator need at most: -> loss (), logs. A bound on -log p(image).

        -log p(image | c)  <=  E[ -log p(image | z) ]  +  E[ -log p(z | c) ]  -  H( q(z | image) ),   z ~ q(z | image)

    The prior is the generator, whose forward gives -log p(tokens | c) in nats per token, exactly, so it must be
    autoregressive with a density head. The vae has likelihood="logistic". Putting N(0, 1) in the prior's place gives
    back -log p(image | z) + KL, the VAE's own bound. It holds however the two were trained, and a sharper q is paid
    for by H, so that nothing is gained by shrinking std. One draw of z per image; images are never corrupted here.
    """
    if vae.likelihood != "logistic" or vae.beta == 0:
        raise ValueError('a bound on the likelihood needs VAE(likelihood="logistic") and a beta above 0')
    mean, std = vae.posterior(images)
    z = vae.reparameterise(mean, std)
    T, dims = vae.seq_len, math.log(2) * vae.pixels(images)[0].numel()
    pixels = -vae.log_likelihood(images, vae.decode_raw(z)).mean()                          # nats per image
    # The generator's density is one of normalised tokens: p(z) = p(tokens) * prod(latent_scale), for each of the T.
    prior = T * (generator(vae.normalise(z), cond)[0] - vae.latent_scale.log().sum())
    entropy = T * (std.log() + 0.5 * math.log(2 * math.pi * math.e)).mean((0, 1)).sum()
    logs = {"pixels": pixels / dims, "prior": prior / dims, "entropy": entropy / dims}
    return logs["pixels"] + logs["prior"] - logs["entropy"], {k: v.detach() for k, v in logs.items()}


class Joint(nn.Module):
    """VAE and generator trained together by the exact bound above: z has no N(0, 1) to obey, only a generator to suit.

    GIVT (2312.02116) trains them in turn and leaves this to future work. Call vae.measure() before training or never:
    afterwards the generator would meet tokens that it does not know. beta and corrupt of the VAE play no part.
    """

    def __init__(self, vae, generator):
        super().__init__()
        self.vae, self.generator = vae, generator

    def forward(self, images, cond):
        """images (B, 3, H, W), cond (B,) -> loss in bits per dimension (), logs: its three terms in the same unit."""
        return bound(self.vae, self.generator, images, cond)


def ldm_names(levels, n_res, attn, decoder=False):
    """LDM's names of the layers that hold weights, in the order of our Sequential."""
    mid = ["mid.block_1", "mid.attn_1", "mid.block_2"]
    names = []
    for level in reversed(range(levels)) if decoder else range(levels):
        side, change = (f"up.{level}", "upsample") if decoder else (f"down.{level}", "downsample")
        for j in range(n_res):
            names += [f"{side}.block.{j}"] + ([f"{side}.attn.{j}"] if level in attn else [])
        if level != (0 if decoder else levels - 1):
            names.append(f"{side}.{change}.conv".removesuffix(".conv"))
    return ["conv_in"] + (mid + names if decoder else names + mid) + ["norm_out", "conv_out"]


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
# Demo

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


def main():
    parser = argparse.ArgumentParser(description="Three autoencoders: which of them can draw from noise?")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each of the three models")
    parser.add_argument("--beta", type=float, default=2.0, help="weight of the VAE's KL against the squared error")
    args = parser.parse_args()
    import data
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    images = data.draw(torch.arange(4000, device=device))[0]
    held_out = data.draw(torch.arange(12, device=device) + data.VAL_INDEX)[0]
    rows = [("held-out images", held_out)]
    for name, options in (("AE", dict(beta=0)), ("DAE", dict(beta=0, corrupt=0.5)), ("VAE", dict(beta=args.beta))):
        torch.manual_seed(0)
        model = VAE(**SIZES["small"], **options).to(device, memory_format=torch.channels_last)   # faster on a CPU
        seconds = fit_autoencoder(model, images, args.steps)
        model.eval()
        with torch.no_grad():
            mean, std = model.posterior(images[:1000])
            x_hat = model.decode_raw(model.posterior(held_out)[0])
            prior = model.decode_raw(torch.randn(12, model.seq_len, model.token_dim, device=device))
        psnr = 10 * math.log10(4 / F.mse_loss(x_hat.clamp(-1, 1), held_out))
        spread = (mean.var((0, 1)) + (std**2).mean((0, 1))).sqrt()
        kl = f"KL {model.kl(mean, std).mean():5.1f} nats per token" if model.beta else "no KL in the loss"
        print(f"{name:4s} PSNR {psnr:4.1f} dB   latents: mean {mean.mean():+5.2f}, std {spread.min():.2f} to {spread.max():.2f} "
              f"by channel (N(0, 1) is 0 and 1)   {kl}   {seconds:.0f} s")
        rows += [(f"{name}: reconstructed", x_hat), (f"{name}: decoded N(0, 1) noise", prior)]
    data.save_rows("vae.png", rows, "vae.py: all three reconstruct, but only the VAE turns N(0, 1) noise into one thing on a dark ground")
    print("wrote vae.png")


if __name__ == "__main__":
    main()
