"""
A 1-D tokenizer: an image becomes 32 tokens that belong to no place in it.

In a grid of tokens each stands for its own patch, and two equal patches of sky cost two tokens. TiTok (Yu et al. 2024,
https://arxiv.org/abs/2406.07550) lets a ViT read the patches together with T learned latents and keeps only what
becomes of the latents: T is free, and each token may speak of the whole picture. A second ViT draws the picture from
the T tokens on an empty canvas, one learned vector per patch. Between them the nearest of V codes of unit length,

    z = ViT(patches, latents),   loss = |x - ViT(canvas, e_k)|^2 + |sg(z) - e_k|^2 + beta |z - sg(e_k)|^2,

or, in TiTokVAE, a small Gaussian per token as in vae.py. The published ids were trained in two stages: first the canvas
had to name the ids of another tokenizer, then both decoders together learned pixels.

Shapes:  B batch, H W pixels, P = (H / patch)^2 patches, T tokens (n_tokens), C width, V codes of D numbers

    images (B, 3, H, W) --patches and latents--> (B, 1 + P + T, C) --ViT, last T--> z (B, T, D) --nearest--> ids (B, T)
    codes (B, T, D) --canvas in front--> (B, 1 + P + T, C) --ViT, middle P--> (B, P, 3 patch^2) --> images (B, 3, H, W)

    python titok.py            # 2 to 16 tokens, and what one of them says; writes titok.png; about 58 s on 2 cores

Try it yourself:
  1. Leave the patches, x, out of the torch.cat in LatentEncoder.forward. What does the decoder still draw, and why?
  2. Put 1 in front of the numbers of tokens in main(). What does a single token speak of: colour, place or shape?
  3. Give the TiTok of main() ema=0, so that codes learn by gradient. How many of the 256 are still in use?
"""
import argparse
import math
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

SIZES = {                                                   # enc and dec: width, layers, heads of the two ViTs
    "small": dict(image_size=32, patch=4, n_tokens=32, enc=(128, 2, 4), dec=(128, 3, 4)),              # 32 x 32 on a CPU
    "medium": dict(image_size=32, patch=4, n_tokens=32, enc=(256, 6, 4), dec=(256, 6, 4)),             # 32 x 32 on a GPU
}
VIT = dict(s=(512, 8, 8), b=(768, 12, 12), l=(1024, 24, 16))
for kind, names in (
        (dict(vocab_size=4096, code_dim=12), ("l-32", "b-64", "s-128")),                 # in two stages
        (dict(vocab_size=8192, code_dim=64, l2_norm=False), ("bl-64-vq8k", "bl-128-vq8k", "sl-256-vq8k")),
        (dict(token_dim=16), ("ll-32-vae", "bl-64-vae", "bl-128-vae"))):                               # of TiTokVAE
    for name in names:
        vits, n = name.split("-")[:2]
        SIZES["titok-" + name] = kind | dict(image_size=256, patch=16, n_tokens=int(n), enc=VIT[vits[0]], dec=VIT[vits[-1]])


# ---------------------------------------------------------------------------------------------------
# The two transformers

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


class LatentBlock(nn.Module):
    """Bidirectional pre-norm transformer block of ViT, biases everywhere."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head, self.norm1, self.norm2 = n_head, nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.wqkv, self.wo = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.fc1, self.fc2 = nn.Linear(n_embd, 4 * n_embd), nn.Linear(4 * n_embd, n_embd)

    def forward(self, x):                                   # (B, S, C) -> (B, S, C): every position sees every other
        q, k, v = self.wqkv(self.norm1(x)).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)   # (B, n_head, S, ..)
        x = x + self.wo(attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def waves(side, n_embd):
    """Where the learned places of side x side patches start: -> (side^2, n_embd) sines and cosines of row and column."""
    k = torch.arange(-(-n_embd // 4))
    angle = torch.arange(side)[:, None] * (math.pi / 2) * 100.0 ** (-k / len(k))                       # (side, n_embd / 4)
    axis = 0.5 * torch.cat([angle.sin(), angle.cos()], 1)                                   # (side, n_embd / 2)
    rows, columns = axis[:, None].expand(-1, side, -1), axis.expand(side, -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)[:, :n_embd]


class LatentEncoder(nn.Module):
    """images (B, 3, H, W) -> z (B, T, c_out): patches and T learned latents in one sequence, of which the latents stay.
    """

    def __init__(self, image_size, patch, n_tokens, c_out, n_embd, n_layer, n_head):
        super().__init__()
        start = lambda n: nn.Parameter(n_embd ** -0.5 * torch.randn(n, n_embd))
        self.n_tokens = n_tokens
        self.patch_embed = nn.Conv2d(3, n_embd, patch, stride=patch)
        self.cls, self.pos, self.latents = start(1), start((image_size // patch) ** 2), start(n_tokens)
        self.norm_pre, self.norm_post = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.blocks = nn.ModuleList([LatentBlock(n_embd, n_head) for _ in range(n_layer)])
        self.out = nn.Linear(n_embd, c_out)

    def forward(self, images):
        """images (B, 3, H, W) -> z (B, T, c_out) float32: [cls, patches + pos, latents] through norm_pre, the blocks and, the
        last T of them, norm_post and out."""
        B = len(images)
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos                  # (B, P, C)
        x = torch.cat([self.cls.expand(B, -1, -1), x, self.latents.expand(B, -1, -1)], 1)   # (B, 1 + P + T, C)
        x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm_post(x[:, -self.n_tokens:])                                           # (B, T, C)
        return self.out(x).float()


class LatentDecoder(nn.Module):
    """codes q (B, T, c_in) -> images (B, 3, H, W), not clamped; with proxy_vocab, logits (B, P, proxy_vocab) of another
    tokenizer's ids, one per patch."""

    def __init__(self, image_size, patch, n_tokens, c_in, n_embd, n_layer, n_head, proxy_vocab=None):
        super().__init__()
        start = lambda n: nn.Parameter(n_embd ** -0.5 * torch.randn(n, n_embd))
        self.patch, self.side, self.proxy_vocab = patch, image_size // patch, proxy_vocab
        self.embed = nn.Linear(c_in, n_embd)
        self.cls, self.canvas, self.pos = start(1), start(self.side**2), start(n_tokens)
        self.norm_pre, self.norm_post = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.blocks = nn.ModuleList([LatentBlock(n_embd, n_head) for _ in range(n_layer)])
        if proxy_vocab:
            self.out = nn.Sequential(nn.Linear(n_embd, 2 * n_embd), nn.Tanh(), nn.Linear(2 * n_embd, proxy_vocab))
        else:
            self.out, self.smooth = nn.Linear(n_embd, 3 * patch**2), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, q):
        """q (B, T, c_in) -> images (B, 3, H, W): [cls, canvas, embed(q) + pos] through norm_pre, the blocks and, the P of
        the canvas, norm_post and out, whose 3 patch^2 numbers are (row, column, colour) of a patch; then smooth."""
        B, p = len(q), self.patch
        canvas = torch.cat([self.cls, self.canvas]).expand(B, -1, -1)                       # (B, 1 + P, C)
        x = self.norm_pre(torch.cat([canvas, self.embed(q) + self.pos], 1))                 # (B, 1 + P + T, C)
        for block in self.blocks:
            x = block(x)
        x = self.out(self.norm_post(x[:, 1:1 + self.side**2]))                              # (B, P, 3 patch^2)
        if self.proxy_vocab:
            return x.float()
        x = x.view(B, self.side, self.side, p, p, 3).permute(0, 5, 1, 3, 2, 4)              # (B, 3, side, p, side, p)
        return self.smooth(x.reshape(B, 3, self.side * p, self.side * p)).float()           # hides the seams of patches


# ---------------------------------------------------------------------------------------------------
# Codes, as in vq.py

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
        """Squared distances: z (N, D), codes (V, D) -> (N, V). |z|^2 + |e|^2 - 2 z.e needs no (N, V, D).

        In float32: bfloat16 takes another code for 6% of random tokens. (TF32, where a GPU is allowed it,
        swaps near ties.)
        """
        return (z**2).sum(1, keepdim=True) + (codes**2).sum(1) - 2 * z @ codes.T

    def nearest(self, z):
        """z (B, T, D) -> ids (B, T) int64."""
        with torch.autocast(z.device.type, enabled=False), torch.no_grad():
            z = self.unit(z.type_as(self.codebook))
            d = self.distances(z.flatten(0, 1), self.unit(self.codebook))             # (B * T, V)
            return d.argmin(1).view(z.shape[:2])

    def codes(self, ids):
        """ids (B, T) int64 -> (B, T, D), what the decoder sees."""
        return F.embedding(ids, self.unit(self.codebook))

    def forward(self, z):
        """z (B, T, D) -> q (B, T, D) float32, ids (B, T), loss (), logs.

        The losses are means over tokens and over the D channels. logs: commit (with its weight beta), usage
        (share of the V codes that occur in this batch), perplexity exp(entropy of their frequencies), 1 .. V.
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
        """Certain of each token, undecided over all: z (N, D) -> mean H(p) - H(mean p) (). LlamaGen's.

        p = softmax(-squared distance / temperature) over the codes.
        """
        log_p = (-self.distances(z, self.unit(self.codebook)) / temperature).log_softmax(-1)    # (N, V)
        mean = log_p.exp().mean(0)
        return -(log_p.exp() * log_p).sum(-1).mean() + (mean * torch.log(mean + 1e-5)).sum()

    @torch.no_grad()
    def update(self, z, ids):
        """Move the running averages by one batch: z (N, D), ids (N,).

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


# ---------------------------------------------------------------------------------------------------
# TiTok

class TiTok(nn.Module):
    """T ids per image. n_tokens: how many; enc and dec: (width, layers, heads) of the two ViTs; patch: its side in pixels.

    stage: "pixels" (the default) trains everything on the squared error. The published two stages take a trained
    tokenizer of one id per patch, such as vq.VQ, as `proxy`: "proxy" trains everything to name the proxy's ids, and
    "finetune" goes on from those weights with encoder and codes frozen: the decoder's softmax mixes the proxy's codes,
    the proxy's decoder makes pixels of them, and both decoders learn from the squared error. All stages of a proxy have
    the same weights in the same places. ema and restart: see VectorQuantizer. The authors' codes learn by gradient (ema=0);
    from a fresh start only a few of them ever do.
    """

    token_dim = None                                        # tokens are ids

    def __init__(self, image_size=32, n_tokens=32, vocab_size=512, code_dim=12, patch=4, enc=(128, 2, 4), dec=(128, 3, 4),
                 l2_norm=True, beta=0.25, ema=0.99, restart=0.1, stage="pixels", proxy=None, proxy_vocab=None):
        super().__init__()
        self.vocab_size = vocab_size
        self.build(image_size, n_tokens, code_dim, code_dim, patch, enc, dec, proxy, proxy_vocab)
        self.quantizer = VectorQuantizer(vocab_size, code_dim, l2_norm, beta, 0.0, ema, restart)
        self.set_stage(stage)

    def build(self, image_size, n_tokens, c_out, c_in, patch, enc, dec, proxy, proxy_vocab):
        """The two transformers, and what they say of themselves."""
        if image_size % patch:
            raise ValueError(f"image_size {image_size} is not a multiple of patch {patch}")
        side = image_size // patch
        if proxy is not None and tuple(proxy.grid) != (side, side):
            raise ValueError(f"the proxy has a grid of {tuple(proxy.grid)} ids, this TiTok {side} x {side} patches")
        self.grid, self.seq_len = (n_tokens,), n_tokens
        self.proxy, proxy_vocab = proxy, proxy_vocab if proxy is None else proxy.vocab_size
        self.encoder = LatentEncoder(image_size, patch, n_tokens, c_out, *enc)
        self.decoder = LatentDecoder(image_size, patch, n_tokens, c_in, *dec, proxy_vocab)
        for part in (self.encoder, self.decoder):           # about 2 dB more after 300 steps of a small model than with the
            for module in part.modules():                   # authors' N(0, 0.02^2), from which z hardly sees the image
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    nn.init.xavier_uniform_(module.weight.flatten(1))
                    nn.init.zeros_(module.bias)
        with torch.no_grad():                               # and with places that tell neighbours from strangers
            for places in (self.encoder.pos, self.decoder.canvas):
                places.copy_(waves(side, places.shape[1]))
        if proxy_vocab is None:
            nn.init.dirac_(self.decoder.smooth.weight)      # starts as the identity

    def set_stage(self, stage):
        """"pixels", "proxy" or "finetune": decides the loss, and which weights learn."""
        if stage not in ("pixels", "proxy", "finetune"):
            raise ValueError(f"stage {stage!r} is none of 'pixels', 'proxy', 'finetune'")
        if (stage == "pixels") == bool(self.decoder.proxy_vocab):
            raise ValueError(f"stage {stage!r} {'needs no' if self.decoder.proxy_vocab else 'needs a'} proxy tokenizer")
        self.stage = stage
        self.requires_grad_(stage != "finetune")
        self.decoder.requires_grad_(True)
        if self.proxy is not None:
            self.proxy.requires_grad_(False)
            for name in ("post_quant_conv", "decoder") if stage == "finetune" else ():
                if hasattr(self.proxy, name):
                    getattr(self.proxy, name).requires_grad_(True)

    def bottleneck(self, z):
        """Outputs of the encoder z (B, T, D) -> what the decoder gets (B, T, D), loss (), logs."""
        if self.stage == "finetune":
            return self.quantizer.codes(self.quantizer.nearest(z)), z.new_zeros(()), {}
        q, _, loss, logs = self.quantizer(z)
        return q, loss, logs

    def decode_raw(self, q):
        """Codes q (B, T, D) -> images (B, 3, H, W), not clamped. With a proxy, its codes are mixed by their probability."""
        if not self.decoder.proxy_vocab:
            return self.decoder(q)
        every = torch.arange(self.decoder.proxy_vocab, device=q.device)
        return self.proxy.decode_raw(self.decoder(q).softmax(-1) @ self.proxy.quantizer.codes(every))

    def reconstruct(self, images):
        """images (B, 3, H, W) -> recon (B, 3, H, W), auxiliary loss (), logs."""
        q, auxiliary, logs = self.bottleneck(self.encoder(images))
        return self.decode_raw(q), auxiliary, logs

    def forward(self, images, labels=None):
        """images (B, 3, H, W) in [-1, 1] -> loss (), logs: mse per pixel value, or, in the stage "proxy", nats per proxy
        id and the share of them that is named right; and the bottleneck's."""
        if self.stage != "proxy":
            recon, auxiliary, logs = self.reconstruct(images)
            mse = F.mse_loss(recon, images)
            return mse + auxiliary, {"mse": mse.detach(), **logs}
        q, auxiliary, logs = self.bottleneck(self.encoder(images))
        logits, target = self.decoder(q).flatten(0, 1), self.proxy.encode(images).flatten()                 # over all B * P
        nats = F.cross_entropy(logits, target)
        right = (logits.argmax(-1) == target).float().mean()
        return nats + auxiliary, {"proxy_nats": nats.detach(), "proxy_right": right, **logs}

    @torch.no_grad()
    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] -> ids (B, T) int64 in 0 .. V - 1. Their order means nothing to the eye."""
        return self.quantizer.nearest(self.encoder(images))

    @torch.no_grad()
    def decode(self, tokens):
        """ids (B, T) int64 -> images (B, 3, H, W) in [-1, 1]."""
        return self.decode_raw(self.quantizer.codes(tokens)).clamp(-1, 1)


class TiTokVAE(TiTok):
    """T real vectors per image: the same transformers around a Gaussian per token, with the methods of vae.VAE.

    beta weighs the KL in nats against the squared error summed over the image, in [-1, 1] pixel units, as in vae.VAE.
    The authors' 1e-6 is 0.8 on this scale at 256 x 256 pixels.
    """

    vocab_size = None                                       # tokens are continuous

    def __init__(self, image_size=32, n_tokens=32, token_dim=12, patch=4, enc=(128, 2, 4), dec=(128, 3, 4), beta=1e-2,
                 stage="pixels", proxy=None, proxy_vocab=None):
        nn.Module.__init__(self)
        self.token_dim, self.beta = token_dim, beta
        self.build(image_size, n_tokens, 2 * token_dim, token_dim, patch, enc, dec, proxy, proxy_vocab)
        self.n_pixels = 3 * image_size**2
        self.register_buffer("latent_mean", torch.zeros(n_tokens, token_dim))               # set by measure(), for each
        self.register_buffer("latent_scale", torch.ones(n_tokens, token_dim))               # token: they differ in meaning
        self.set_stage(stage)

    @staticmethod
    def gaussian(moments):                                  # (B, T, 2D) -> mean, std, each (B, T, D)
        mean, logvar = moments.chunk(2, dim=-1)
        return mean, torch.exp(0.5 * logvar.clamp(-30, 20))

    def posterior(self, images):
        """q(z | image), a Gaussian per token: images (B, 3, H, W) -> mean, std, each (B, T, D), raw latent units."""
        return self.gaussian(self.encoder(images))

    @staticmethod
    def kl(mean, std):
        """KL( N(mean, std^2) || N(0, 1) ) in nats per token: mean, std (B, T, D) -> (B, T)."""
        return 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).sum(-1)

    @staticmethod
    def reparameterise(mean, std):
        """Draw z ~ N(mean, std^2) so that gradients reach mean and std: (B, T, D), (B, T, D) -> (B, T, D)."""
        return mean + std * torch.randn_like(std)

    def bottleneck(self, z):
        """Moments z (B, T, 2D) -> a draw (B, T, D), beta * KL per pixel value (), logs: kl in nats per token."""
        mean, std = self.gaussian(z)
        kl = self.kl(mean, std).mean()
        return self.reparameterise(mean, std), self.beta * kl * (self.seq_len / self.n_pixels), {"kl": kl.detach()}

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
        return self.decode_raw(tokens / self.latent_scale + self.latent_mean).clamp(-1, 1)

    @torch.no_grad()
    def measure(self, mean, std):
        """Set latent_mean and latent_scale from the posteriors of the training set, each (N, T, D)."""
        mean, std = mean.double(), std.double()
        self.latent_mean.copy_(mean.mean(0))
        self.latent_scale.copy_((mean.var(0) + (std**2).mean(0)).rsqrt())




# ---------------------------------------------------------------------------------------------------
# Demo

def fit_titok(model, images, steps, batch_size=16, lr=4e-3):
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


def reach_of_tokens(model, ids, others):
    """How far a token reaches: ids (1, T), others (N, T) of other images -> mean absolute change (T, H, W) of the picture
    where one id at a time is exchanged for what stands in its place in the others, and one changed picture per token."""
    before, reach, changed = model.decode(ids), [], []
    for t in range(ids.shape[1]):
        mixed = ids.repeat(len(others), 1)
        mixed[:, t] = others[:, t]
        after = model.decode(mixed)                                                         # (N, 3, H, W)
        change = (after - before).abs().mean(1)
        reach.append(change.mean(0))
        changed.append(after[change.mean((1, 2)).argmax()])
    return torch.stack(reach), torch.stack(changed)


def show_tokens(results, images, shown):
    """titok.png: images from ever more tokens on the left; on the right what one token of the model `shown` changes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import data
    fig = plt.figure(figsize=(12.5, 6.3))
    left, right = fig.add_gridspec(1, 2, width_ratios=[1, 1.5], left=0.01, right=0.93, top=0.78, bottom=0.02, wspace=0.05)
    columns = [(images, "image")] + [(r["recon"], f"{r['T']} tokens\n{r['bits']} bits\n{r['psnr']:.1f} dB") for r in results]
    cells = left.subgridspec(5, len(columns), wspace=0.06, hspace=0.06)
    for c, (pictures, title) in enumerate(columns):
        for row in range(5):
            ax = fig.add_subplot(cells[row, c])
            ax.imshow(data.tile(pictures[row:row + 1], 1), interpolation="nearest")
            ax.set_axis_off()
            if row == 0:
                ax.set_title(title, fontsize=10)
    reach, T = shown["reach"].cpu(), len(shown["reach"])
    cells = right.subgridspec(4, T // 2, wspace=0.06, hspace=0.22)
    for t in range(T):
        row, column = 2 * (t // (T // 2)), t % (T // 2)
        ax = fig.add_subplot(cells[row, column])
        ax.imshow(data.tile(shown["changed"][t:t + 1], 1), interpolation="nearest")
        ax.set_title(f"token {t + 1} changed", fontsize=10)
        ax.set_axis_off()
        ax = fig.add_subplot(cells[row + 1, column])
        heat = ax.imshow(reach[t], cmap="magma", vmin=0, vmax=reach.max().item(), interpolation="nearest")
        ax.set_axis_off()
    bar = fig.colorbar(heat, cax=fig.add_axes([0.94, 0.15, 0.012, 0.5]))
    bar.ax.set_title("mean\nchange", fontsize=9)
    fig.suptitle("titok.py: tokens without a place. Left: held-out images, drawn from 2 to 16 tokens\n"
                 f"Right: the topmost image from {T} tokens, of which one is exchanged. Below, where that is seen:\n"
                 "not a patch of a grid, but what this token speaks of, such as the whole background", fontsize=12)
    fig.savefig("titok.png", dpi=80)


def main():
    parser = argparse.ArgumentParser(description="The same images from 2 to 16 tokens, and what one token says.")
    parser.add_argument("--steps", type=int, default=900, help="training steps of each of the four models")
    parser.add_argument("--image_size", type=int, default=16, help="side of the images in pixels, a multiple of 4")
    args = parser.parse_args()
    import data
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = data.draw(torch.arange(4000, device=device), args.image_size)[0]
    held_out = data.draw(torch.arange(200, device=device) + data.VAL_INDEX, args.image_size)[0]
    results = []
    for T in (2, 4, 8, 16):
        torch.manual_seed(0)
        model = TiTok(args.image_size, T, vocab_size=256, enc=(64, 2, 4), dec=(64, 2, 4)).to(device)
        seconds = fit_titok(model, images, args.steps)
        ids = model.eval().encode(held_out)                                                 # (200, T)
        recon = model.decode(ids)
        psnr = 10 * math.log10(4 / F.mse_loss(recon, held_out))
        usage = (model.quantizer.count(ids) > 0).float().mean()
        reach, changed = reach_of_tokens(model, ids[:1], ids[1:65])
        far = (reach > 0.1 * reach.amax((1, 2), keepdim=True)).float().mean()
        print(f"{T:2d} tokens of 8 bits   PSNR {psnr:4.1f} dB   {usage:4.0%} of the codes in use   "
              f"one token touches {far:4.0%} of the picture   {seconds:.0f} s")
        results.append(dict(T=T, bits=8 * T, psnr=psnr, recon=recon, reach=reach, changed=changed))
    show_tokens(results, held_out, results[2])
    print("wrote titok.png")


if __name__ == "__main__":
    main()
