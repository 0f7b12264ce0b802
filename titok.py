"""
TiTok: an image as 32 tokens, none of which belongs to a place.

In a grid of tokens each one stands for its own patch, and two equal patches of sky cost two tokens. TiTok
(Yu et al. 2024, arxiv.org/abs/2406.07550) shows a ViT the patches of an image together with T learned
latents, and keeps only what comes out at the latents. T is free, and each token may speak of the whole image.
A second ViT reads the T tokens beside an empty canvas, one learned vector per patch, and paints the image
there. In between, each z becomes the nearest e_k of V codes of unit length (sg: stop gradient):

    loss = |x - ViT(canvas, e_k)|^2 + |sg(z) - e_k|^2 + beta |z - sg(e_k)|^2

In TiTokVAE a token is a small Gaussian instead, as in vae.py.

Shapes:  B batch, H W pixels, P = (H / patch)^2 patches, T tokens (n_tokens), C width, V codes of D numbers

    images (B, 3, H, W) --patches, latents--> (B, 1 + P + T, C) --ViT, last T--> z (B, T, D) --> ids (B, T)
    codes (B, T, D) --behind a canvas--> (B, 1 + P + T, C) --ViT, middle P--> images (B, 3, H, W)

    python titok.py            # 2 to 16 tokens, what one says; writes titok.png; a minute on 2 CPU cores

Try it yourself:
  1. Leave the patches, x, out of the torch.cat in LatentEncoder.forward. What does the decoder draw, and why?
  2. Put 1 in front of the numbers of tokens in main(). Does a single token speak of colour, place or shape?
  3. Give the TiTok of main() ema=0, so that codes learn by gradient. How many of the 256 are still in use?
"""
import argparse
import math
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

SIZES = {                                                   # enc, dec: width, layers, heads of the two ViTs
    # for 32 x 32 pixels, on a CPU and on a GPU
    "small": dict(image_size=32, patch=4, n_tokens=32, enc=(128, 2, 4), dec=(128, 3, 4)),
    "medium": dict(image_size=32, patch=4, n_tokens=32, enc=(256, 6, 4), dec=(256, 6, 4)),
    # the paper's, published after two stages: 610M, 174M and 53M parameters
    "titok-l-32": dict(image_size=256, patch=16, n_tokens=32, vocab_size=4096, code_dim=12,
                       enc=(1024, 24, 16), dec=(1024, 24, 16)),
    "titok-b-64": dict(image_size=256, patch=16, n_tokens=64, vocab_size=4096, code_dim=12,
                       enc=(768, 12, 12), dec=(768, 12, 12)),
    "titok-s-128": dict(image_size=256, patch=16, n_tokens=128, vocab_size=4096, code_dim=12,
                        enc=(512, 8, 8), dec=(512, 8, 8)),
    # the authors' later ones, trained in one stage
    "titok-bl-64-vq8k": dict(image_size=256, patch=16, n_tokens=64, vocab_size=8192, code_dim=64,
                             l2_norm=False, enc=(768, 12, 12), dec=(1024, 24, 16)),
    "titok-bl-128-vq8k": dict(image_size=256, patch=16, n_tokens=128, vocab_size=8192, code_dim=64,
                              l2_norm=False, enc=(768, 12, 12), dec=(1024, 24, 16)),
    "titok-sl-256-vq8k": dict(image_size=256, patch=16, n_tokens=256, vocab_size=8192, code_dim=64,
                              l2_norm=False, enc=(512, 8, 8), dec=(1024, 24, 16)),
    # of TiTokVAE
    "titok-ll-32-vae": dict(image_size=256, patch=16, n_tokens=32, token_dim=16,
                            enc=(1024, 24, 16), dec=(1024, 24, 16)),
    "titok-bl-64-vae": dict(image_size=256, patch=16, n_tokens=64, token_dim=16,
                            enc=(768, 12, 12), dec=(1024, 24, 16)),
    "titok-bl-128-vae": dict(image_size=256, patch=16, n_tokens=128, token_dim=16,
                             enc=(768, 12, 12), dec=(1024, 24, 16)),
}


# ---- The two transformers ------------------------------------------------------------------------

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


class LatentBlock(nn.Module):
    """A pre-norm transformer block as in ViT, in which every position attends to every other."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm1 = nn.LayerNorm(n_embd)
        self.norm2 = nn.LayerNorm(n_embd)
        self.wqkv = nn.Linear(n_embd, 3 * n_embd)
        self.wo = nn.Linear(n_embd, n_embd)
        self.fc1 = nn.Linear(n_embd, 4 * n_embd)
        self.fc2 = nn.Linear(4 * n_embd, n_embd)

    def attend(self, x):
        B, S, C = x.shape
        q, k, v = self.wqkv(x).view(B, S, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, n_head, S, d) each
        return self.wo(attention(q, k, v).transpose(1, 2).reshape(B, S, C))

    def mlp(self, x):
        return self.fc2(F.gelu(self.fc1(x)))

    def forward(self, x):                                                             # (B, S, C) -> (B, S, C)
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def learned(n, n_embd):
    """n learned vectors of length about 1 -> (n, n_embd)."""
    return nn.Parameter(n_embd ** -0.5 * torch.randn(n, n_embd))


def sines(side, n_embd):
    """Sines and cosines of the row and the column of each of side x side patches -> (side^2, n_embd)."""
    k = torch.arange(math.ceil(n_embd / 4))
    angle = torch.arange(side).unsqueeze(1) * (math.pi / 2) * 100.0 ** (-k / len(k))  # (side, n_embd / 4)
    axis = 0.5 * torch.cat([angle.sin(), angle.cos()], dim=1)                         # (side, n_embd / 2)
    rows = axis.unsqueeze(1).expand(-1, side, -1)
    columns = axis.expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)[:, :n_embd]


class LatentEncoder(nn.Module):
    """images (B, 3, H, W) -> z (B, T, c_out): a ViT over patches and T learned latents. The latents stay."""

    def __init__(self, image_size, patch, n_tokens, c_out, n_embd, n_layer, n_head):
        super().__init__()
        self.n_tokens = n_tokens
        self.patch_embed = nn.Conv2d(3, n_embd, patch, stride=patch)
        self.cls = learned(1, n_embd)
        self.pos = learned((image_size // patch) ** 2, n_embd)
        self.latents = learned(n_tokens, n_embd)
        self.norm_pre = nn.LayerNorm(n_embd)
        self.norm_post = nn.LayerNorm(n_embd)
        self.blocks = nn.ModuleList(LatentBlock(n_embd, n_head) for _ in range(n_layer))
        self.out = nn.Linear(n_embd, c_out)

    def forward(self, images):
        """images (B, 3, H, W) -> z (B, T, c_out) float32.

        The sequence is [cls, patches + pos, latents]. It goes through norm_pre and the blocks. Its last T
        vectors go through norm_post and out.
        """
        B = len(images)
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos            # (B, P, C)
        x = torch.cat([self.cls.expand(B, -1, -1), x, self.latents.expand(B, -1, -1)], dim=1)
        x = self.norm_pre(x)                                                          # (B, 1 + P + T, C)
        for block in self.blocks:
            x = block(x)
        x = self.norm_post(x[:, -self.n_tokens:])                                     # (B, T, C)
        return self.out(x).float()


class LatentDecoder(nn.Module):
    """codes q (B, T, c_in) -> images (B, 3, H, W), not clamped.

    With proxy_vocab: -> logits (B, P, proxy_vocab) of the ids of another tokenizer, one per patch.
    """

    def __init__(self, image_size, patch, n_tokens, c_in, n_embd, n_layer, n_head, proxy_vocab=None):
        super().__init__()
        self.patch = patch
        self.side = image_size // patch
        self.proxy_vocab = proxy_vocab
        self.embed = nn.Linear(c_in, n_embd)
        self.cls = learned(1, n_embd)
        self.canvas = learned(self.side**2, n_embd)
        self.pos = learned(n_tokens, n_embd)
        self.norm_pre = nn.LayerNorm(n_embd)
        self.norm_post = nn.LayerNorm(n_embd)
        self.blocks = nn.ModuleList(LatentBlock(n_embd, n_head) for _ in range(n_layer))
        if proxy_vocab:
            self.out = nn.Sequential(nn.Linear(n_embd, 2 * n_embd), nn.Tanh(),
                                     nn.Linear(2 * n_embd, proxy_vocab))
        else:
            self.out = nn.Linear(n_embd, 3 * patch**2)
            self.smooth = nn.Conv2d(3, 3, 3, padding=1)     # hides the seams between patches

    def forward(self, q):
        """q (B, T, c_in) -> images (B, 3, H, W).

        The sequence is [cls, canvas, embed(q) + pos]. It goes through norm_pre and the blocks. The P vectors
        of the canvas go through norm_post and out, which gives the 3 patch^2 numbers of a patch in the order
        (row, column, colour). Last comes smooth.
        """
        B = len(q)
        p = self.patch
        canvas = torch.cat([self.cls, self.canvas]).expand(B, -1, -1)                 # (B, 1 + P, C)
        x = self.norm_pre(torch.cat([canvas, self.embed(q) + self.pos], dim=1))       # (B, 1 + P + T, C)
        for block in self.blocks:
            x = block(x)
        x = self.out(self.norm_post(x[:, 1:1 + self.side**2]))                        # (B, P, 3 patch^2)
        if self.proxy_vocab:
            return x.float()
        x = x.view(B, self.side, self.side, p, p, 3).permute(0, 5, 1, 3, 2, 4)        # (B, 3, side, p, ..)
        return self.smooth(x.reshape(B, 3, self.side * p, self.side * p)).float()


# ---- Codes, as in vq.py ----------------------------------------------------------------------------

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


# ---- TiTok -----------------------------------------------------------------------------------------

class TiTok(nn.Module):
    """T ids per image. enc and dec: (width, layers, heads) of the two ViTs. patch: side of a patch in pixels.

    ema and restart: see VectorQuantizer. The authors' codes learn by gradient (ema=0). From a fresh start
    only a few of them ever do. stage, proxy, proxy_vocab: see set_stage.
    """

    token_dim = None                                        # tokens are ids

    def __init__(self, image_size=32, n_tokens=32, vocab_size=512, code_dim=12, patch=4, enc=(128, 2, 4),
                 dec=(128, 3, 4), l2_norm=True, beta=0.25, ema=0.99, restart=0.1, stage="pixels", proxy=None,
                 proxy_vocab=None):
        super().__init__()
        self.vocab_size = vocab_size
        self.build(image_size, n_tokens, code_dim, code_dim, patch, enc, dec, proxy, proxy_vocab)
        self.quantizer = VectorQuantizer(vocab_size, code_dim, l2_norm, beta, 0.0, ema, restart)
        self.set_stage(stage)

    def build(self, image_size, n_tokens, c_out, c_in, patch, enc, dec, proxy, proxy_vocab):
        """The two transformers. A token has c_out numbers behind the encoder, c_in before the decoder."""
        if image_size % patch:
            raise ValueError(f"image_size {image_size} is not a multiple of patch {patch}")
        side = image_size // patch
        if proxy is not None:
            proxy_vocab = proxy.vocab_size
            if tuple(proxy.grid) != (side, side):
                raise ValueError(f"the proxy has a grid of {tuple(proxy.grid)} ids, "
                                 f"this TiTok {side} x {side} patches")
        self.grid = (n_tokens,)
        self.seq_len = n_tokens
        self.proxy = proxy
        self.encoder = LatentEncoder(image_size, patch, n_tokens, c_out, *enc)
        self.decoder = LatentDecoder(image_size, patch, n_tokens, c_in, *dec, proxy_vocab)
        self.init_weights(side)

    def init_weights(self, side):
        """Linear layers start by Xavier, positions as 2-D sines, so that nearby patches are similar.

        Xavier gives 2 dB more after 300 steps of a small model than the authors' N(0, 0.02^2), from which z
        hardly sees the image.
        """
        for part in (self.encoder, self.decoder):
            for module in part.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    nn.init.xavier_uniform_(module.weight.flatten(1))
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            for pos in (self.encoder.pos, self.decoder.canvas):
                pos.copy_(sines(side, pos.shape[1]))
        if not self.decoder.proxy_vocab:
            nn.init.dirac_(self.decoder.smooth.weight)      # starts as the identity

    def bottleneck(self, z):
        """Outputs of the encoder z (B, T, D) -> what the decoder gets (B, T, D), loss (), logs."""
        if self.stage == "finetune":                        # the codes are frozen
            return self.quantizer.codes(self.quantizer.nearest(z)), z.new_zeros(()), {}
        q, _, loss, logs = self.quantizer(z)
        return q, loss, logs

    def decode_raw(self, q):
        """Codes q (B, T, D) -> images (B, 3, H, W), not clamped.

        With a proxy, the decoder gives logits of the proxy's ids. The proxy paints the mean of its codes
        under their probabilities, which has a gradient, unlike the likeliest code.
        """
        if not self.decoder.proxy_vocab:
            return self.decoder(q)
        ids = torch.arange(self.decoder.proxy_vocab, device=q.device)
        p = self.decoder(q).softmax(-1)                                               # (B, P, proxy_vocab)
        return self.proxy.decode_raw(p @ self.proxy.quantizer.codes(ids))

    def reconstruct(self, images):
        """images (B, 3, H, W) -> recon (B, 3, H, W), auxiliary loss (), logs."""
        q, auxiliary, logs = self.bottleneck(self.encoder(images))
        return self.decode_raw(q), auxiliary, logs

    def forward(self, images, labels=None):
        """images (B, 3, H, W) in [-1, 1] -> loss (), logs: mse per pixel value, and the bottleneck's."""
        if self.stage == "proxy":
            return self.proxy_loss(images)
        recon, auxiliary, logs = self.reconstruct(images)
        mse = F.mse_loss(recon, images)
        return mse + auxiliary, {"mse": mse.detach(), **logs}

    @torch.no_grad()
    def encode(self, images):
        """images (B, 3, H, W) in [-1, 1] -> ids (B, T) int64 in 0 .. V - 1. Their order means nothing."""
        return self.quantizer.nearest(self.encoder(images))

    @torch.no_grad()
    def decode(self, tokens):
        """ids (B, T) int64 -> images (B, 3, H, W) in [-1, 1]."""
        return self.decode_raw(self.quantizer.codes(tokens)).clamp(-1, 1)

    # ---- Extras: the two stages in which the paper trains, with the help of another tokenizer

    def set_stage(self, stage):
        """Choose the loss, and which weights learn. Raises ValueError where the stage does not fit the proxy.

        "pixels" (the default) trains everything on the squared error, without a proxy. The paper has two
        stages and a proxy, a trained tokenizer of one id per patch, such as vq.VQ. In "proxy" everything but
        the proxy learns to name the proxy's ids. "finetune" starts from those weights. Encoder and codes are
        frozen, and this decoder and the proxy's learn from the squared error. Both stages have the same
        weights under the same names.
        """
        if stage not in ("pixels", "proxy", "finetune"):
            raise ValueError(f"stage {stage!r} is none of 'pixels', 'proxy', 'finetune'")
        if stage == "pixels" and self.decoder.proxy_vocab:
            raise ValueError("stage 'pixels' needs no proxy tokenizer")
        if stage != "pixels" and not self.decoder.proxy_vocab:
            raise ValueError(f"stage {stage!r} needs a proxy tokenizer")
        self.stage = stage
        self.requires_grad_(stage != "finetune")
        self.decoder.requires_grad_(True)
        if self.proxy is None:
            return
        self.proxy.requires_grad_(False)
        if stage == "finetune":
            for name in ("post_quant_conv", "decoder", "path_out"):
                if hasattr(self.proxy, name):
                    getattr(self.proxy, name).requires_grad_(True)

    def proxy_loss(self, images):
        """images (B, 3, H, W) -> loss (), logs: proxy_nats per id, proxy_right, and the bottleneck's.

        The cross-entropy of the decoder's logits against proxy.encode(images), plus the bottleneck's loss.
        proxy_right is the share of ids whose logit is the largest. (Section 3.3, warm-up with proxy codes)
        """
        q, auxiliary, logs = self.bottleneck(self.encoder(images))
        logits = self.decoder(q).flatten(0, 1)                                        # (B * P, proxy_vocab)
        target = self.proxy.encode(images).flatten()                                  # (B * P)
        nats = F.cross_entropy(logits, target)
        right = (logits.argmax(-1) == target).float().mean()
        return nats + auxiliary, {"proxy_nats": nats.detach(), "proxy_right": right, **logs}


# ---- Extras: real vectors instead of ids -----------------------------------------------------------

class TiTokVAE(TiTok):
    """T real vectors per image: the same transformers around a Gaussian per token. Methods as in vae.VAE.

    beta weighs the KL in nats against the squared error summed over the image, in [-1, 1] pixel units, as in
    vae.VAE. The authors' 1e-6 is 0.8 on this scale at 256 x 256 pixels.
    """

    vocab_size = None                                       # tokens are continuous

    def __init__(self, image_size=32, n_tokens=32, token_dim=12, patch=4, enc=(128, 2, 4), dec=(128, 3, 4),
                 beta=1e-2, stage="pixels", proxy=None, proxy_vocab=None):
        nn.Module.__init__(self)                            # not TiTok's, which makes a codebook
        self.token_dim = token_dim
        self.beta = beta
        self.n_pixels = 3 * image_size**2
        self.build(image_size, n_tokens, 2 * token_dim, token_dim, patch, enc, dec, proxy, proxy_vocab)
        # Set by measure(), for each token, as tokens differ in meaning: tokens = (latents - mean) * scale.
        self.register_buffer("latent_mean", torch.zeros(n_tokens, token_dim))
        self.register_buffer("latent_scale", torch.ones(n_tokens, token_dim))
        self.set_stage(stage)

    def posterior(self, images):
        """q(z | image), a Gaussian per token: images (B, 3, H, W) -> mean, std, each (B, T, D), raw units."""
        return self.gaussian(self.encoder(images))

    @staticmethod
    def gaussian(moments):
        """moments (B, T, 2D), mean and log variance -> mean, std, each (B, T, D)."""
        mean, logvar = moments.chunk(2, dim=-1)
        return mean, torch.exp(0.5 * logvar.clamp(-30, 20))

    @staticmethod
    def kl(mean, std):
        """KL( N(mean, std^2) || N(0, 1) ) in nats per token: mean, std (B, T, D) -> (B, T)."""
        return 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).sum(-1)

    @staticmethod
    def reparameterise(mean, std):
        """Draw z ~ N(mean, std^2) so that gradients reach mean and std: (B, T, D), (B, T, D) -> (B, T, D)."""
        return mean + std * torch.randn_like(std)

    def bottleneck(self, z):
        """Moments z (B, T, 2D) -> a draw (B, T, D), beta * KL per pixel value (), logs: nats per token."""
        mean, std = self.gaussian(z)
        kl = self.kl(mean, std).mean()
        loss = self.beta * kl * (self.seq_len / self.n_pixels)
        return self.reparameterise(mean, std), loss, {"kl": kl.detach()}

    def normalise(self, z):
        """Raw latents -> tokens of unit variance."""
        return (z - self.latent_mean) * self.latent_scale

    @torch.no_grad()
    def encode(self, images):
        """images (B, 3, H, W) -> one draw of the posterior (B, T, D), float32, unit variance over data."""
        return self.normalise(self.reparameterise(*self.posterior(images)))

    @torch.no_grad()
    def decode(self, tokens):
        """tokens (B, T, D) of unit variance -> images (B, 3, H, W) in [-1, 1]."""
        return self.decode_raw(tokens / self.latent_scale + self.latent_mean).clamp(-1, 1)

    @torch.no_grad()
    def measure(self, mean, std):
        """Set latent_mean and latent_scale from the posteriors of the training set, each (N, T, D).

        In float64, and so on the CPU: Apple's GPUs have no float64.
        """
        mean = mean.cpu().double()
        std = std.cpu().double()
        self.latent_mean.copy_(mean.mean(0).float())
        self.latent_scale.copy_((mean.var(0) + (std**2).mean(0)).rsqrt().float())


# ---- Demo: ever more tokens, and what one token says -----------------------------------------------

def fit_titok(model, images, steps, batch_size=16, lr=4e-3):
    """Train on a fixed set of images (N, 3, H, W)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 30) * (1 - step / steps)
        i = torch.randint(len(images), (batch_size,), device=images.device)
        loss, _ = model(images[i])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def reach_of_tokens(model, ids, others):
    """How far a token reaches: ids (1, T), others (N, T) of other images -> (T, H, W), and (T, 3, H, W).

    Each id in turn is exchanged for the ids that the others have in its position. First the mean absolute
    change of the picture, then the picture that changed most.
    """
    before = model.decode(ids)
    reach = []
    changed = []
    for t in range(ids.shape[1]):
        mixed = ids.repeat(len(others), 1)
        mixed[:, t] = others[:, t]
        after = model.decode(mixed)                                                   # (N, 3, H, W)
        change = (after - before).abs().mean(1)                                       # (N, H, W)
        reach.append(change.mean(0))
        changed.append(after[change.mean((1, 2)).argmax()])
    return torch.stack(reach), torch.stack(changed)


def show_titok(columns, reach, changed, path):
    """Images from ever more tokens on the left, on the right what one token changes.

    columns: (title, images (N, 3, H, W)); reach (T, H, W); changed (T, 3, H, W).
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure = plt.figure(figsize=(12.5, 6.3))
    left, right = figure.add_gridspec(1, 2, width_ratios=[1, 1.5], left=0.01, right=0.93, top=0.78,
                                      bottom=0.02, wspace=0.05)

    def draw(cell, picture, title="", **options):
        ax = figure.add_subplot(cell)
        ax.set_axis_off()
        ax.set_title(title, fontsize=10)
        if picture.ndim == 3:                                                         # (3, H, W) in [-1, 1]
            picture = (picture.permute(1, 2, 0) + 1) / 2
        return ax.imshow(picture.cpu(), interpolation="nearest", **options)

    cells = left.subgridspec(5, len(columns), wspace=0.06, hspace=0.06)
    for c, (title, images) in enumerate(columns):
        for row in range(5):
            draw(cells[row, c], images[row], title if row == 0 else "")
    T = len(reach)
    cells = right.subgridspec(4, T // 2, wspace=0.06, hspace=0.22)
    for t in range(T):
        row, column = divmod(t, T // 2)
        draw(cells[2 * row, column], changed[t], f"token {t + 1} changed")
        heat = draw(cells[2 * row + 1, column], reach[t], cmap="magma", vmin=0, vmax=reach.max().item())
    bar = figure.colorbar(heat, cax=figure.add_axes([0.94, 0.15, 0.012, 0.5]))
    bar.ax.set_title("mean\nchange", fontsize=9)
    figure.suptitle("titok.py: tokens without a place. Left: held-out images, drawn from 2 to 16 tokens\n"
                    f"Right: the topmost image from {T} tokens, of which one is exchanged. Below, where that "
                    "is seen:\nnot a patch of a grid, but what this token speaks of, such as the background")
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description="Images from 2 to 16 tokens, and what one token says.")
    parser.add_argument("--steps", type=int, default=900, help="training steps of each of the four models")
    parser.add_argument("--image_size", type=int, default=16, help="side in pixels, a multiple of 4")
    args = parser.parse_args()
    import data
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = data.draw(torch.arange(4000, device=device), args.image_size)[0]
    held_out = data.draw(torch.arange(200, device=device) + data.VAL_INDEX, args.image_size)[0]

    columns = [("image", held_out)]
    for T in (2, 4, 8, 16):
        torch.manual_seed(0)
        model = TiTok(args.image_size, T, vocab_size=256, enc=(64, 2, 4), dec=(64, 2, 4)).to(device)
        start = time.perf_counter()
        fit_titok(model, images, args.steps)
        seconds = time.perf_counter() - start
        ids = model.eval().encode(held_out)                                           # (200, T)
        recon = model.decode(ids)
        psnr = 10 * math.log10(4 / F.mse_loss(recon, held_out))
        usage = (model.quantizer.count(ids) > 0).float().mean()
        reach, changed = reach_of_tokens(model, ids[:1], ids[1:65])
        far = (reach > 0.1 * reach.amax((1, 2), keepdim=True)).float().mean()
        print(f"{T:2d} tokens of 8 bits   PSNR {psnr:4.1f} dB   {usage:4.0%} of the codes in use   "
              f"one token touches {far:4.0%} of the picture   {seconds:.0f} s")
        columns.append((f"{T} tokens\n{8 * T} bits\n{psnr:.1f} dB", recon))
        if T == 8:
            shown = (reach, changed)
    show_titok(columns, *shown, "titok.png")
    print("wrote titok.png")


if __name__ == "__main__":
    main()
