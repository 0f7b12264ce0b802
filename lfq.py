"""
A lookup-free quantiser in a causal video CNN: one tokenizer, and one vocabulary, for images and clips.

A vector quantiser (vq.py) keeps a table of V codes, and the larger the table, the more of it dies. MAGVIT-v2 (Yu et al.
2023, https://arxiv.org/abs/2310.05737) has none: the encoder writes `bits` numbers per token, of each only the sign is
kept, and the signs read as a binary number are the token. 18 bits make 262,144 words, and no word costs a parameter.
Which of them are used is left to an entropy penalty, with p(c | z) = softmax over all 2^bits codes c of 2 z.c / tau:

    q_i = sign(z_i)     loss = |x - decoder(q)|^2  +  a ( E[H(p(.|z))] - H(E[p(.|z)]) )  +  b |z - sg(q)|^2

"be certain of each token, undecided over all of them". Convolutions look back in time only, never ahead, so that an
image is a clip of one frame: the first frame of a clip gets the same tokens whatever comes after it.

Shapes:  B batch, F frames, H W pixels, T = f * h * w tokens (17 frames: f = 5), V = 2^bits

    clip (B, 3, F, H, W) --CausalEncoder--> z (B, T, bits) --quantize--> q (B, T, bits) of -1, +1 and ids (B, T) int64
    ids (B, T) --codes--> q (B, bits, f, h, w) --CausalDecoder--> clip (B, 3, F, H, W) in [-1, 1];   images: no F, f = 1

    python lfq.py              # what each entropy does to the words, writes lfq.png; about 35 s on 2 CPU cores

Try it yourself:
  1. Decode ids ^ 1 in main(), then ids ^ 512: the decoder sees one sign the other way round. What does a bit mean?
  2. Set per_frame=False in size of main(). Which of the printed zeros is none any more, and why?
  3. Set bits=16 there: 65,536 words, but main() measures 8,192 tokens. How many words can be in use, and what is H[E]?
"""
import argparse
import math
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

SIZES = {
    "f16": dict(image_size=256, bits=18, ch=128, ch_mult=(1, 1, 2, 2, 4), n_res=4, groups=32),
    "f8": dict(image_size=128, bits=18, ch=128, ch_mult=(1, 2, 2, 4), n_res=4, groups=32),
    "video": dict(image_size=128, frames=17, bits=18, ch=128, ch_mult=(1, 2, 2, 4), n_res=4, groups=32),
    "coarse": dict(image_size=32, bits=10, ch=16, ch_mult=(1, 2, 4, 4), n_res=1, groups=8),             # for a CPU, 4 x 4 tokens
    "small": dict(image_size=32, bits=10, ch=16, ch_mult=(1, 2, 4), n_res=2, groups=8),                 # 8 x 8
    "clips": dict(image_size=16, frames=17, bits=10, ch=16, ch_mult=(1, 2, 4), n_res=1, groups=8),      # for a CPU, 5 x 4 x 4
    "clips-medium": dict(image_size=64, frames=17, bits=12, ch=64, ch_mult=(1, 2, 4, 4), n_res=2, groups=16),      # 5 x 8 x 8
    "medium": dict(image_size=32, bits=12, ch=64, ch_mult=(1, 2, 4), n_res=2, groups=16),
}


# ---------------------------------------------------------------------------------------------------
# The quantiser: no table, so plain functions

def quantize(z):
    """Signs, and the number that they spell: z (..., bits) -> q (..., bits) of -1 and +1, index (...) int64.

    index = sum_i 2^i [z_i > 0]: the first channel is the lowest bit. A z of exactly 0 becomes -1 (torch.sign would leave
    a third value, 0). The gradient of q goes straight through to z, unclipped.
    """
    positive = z > 0
    index = (positive.long() << torch.arange(z.shape[-1], device=z.device)).sum(-1)
    q = torch.where(positive, 1.0, -1.0).to(z.dtype)
    return z + (q - z).detach(), index


def codes(index, bits):
    """The inverse of quantize: index (...) int64 in 0 .. 2^bits - 1 -> q (..., bits) float32 of -1 and +1."""
    return (index[..., None] >> torch.arange(bits, device=index.device) & 1) * 2.0 - 1


def entropy_penalty(z, temperature=0.01, groups=1):
    """z (..., bits) -> per_sample () and batch (), in nats: minimise the first, maximise the second.

    per_sample: mean over tokens of the entropy of p(c | z) = softmax over all 2^bits codes of 2 z.c / temperature. It is a
    product of coins with P(c_i = +1) = sigmoid(4 z_i / temperature), so that its entropy is a sum over bits, exactly.
    batch: entropy of the mean of p over tokens, of all processes of a distributed run; at most bits * ln 2.
    groups > 1, a divisor of bits: the sum of the entropies of `groups` runs of neighbouring bits instead, an upper bound
    of it for vocabularies beyond 2^22 or so, blind to what the groups have to do with each other.

    Where |z| > 2 temperature the coin has fallen: the gradient of both is gone (at 0.01 the commitment takes over there).
    """
    if z.shape[-1] % groups:
        raise ValueError(f"{z.shape[-1]} bits cannot be cut into {groups} groups of equal size")
    with torch.autocast(z.device.type, enabled=False):
        z = z.float().flatten(0, -2)                                                        # (N, bits)
        a = (4 / temperature * z).abs()                     # log-odds of the likelier sign; -p log p of the other one
        per_sample = (F.softplus(-a) + a * torch.sigmoid(-a)).sum(-1).mean()                # would be NaN in the gradient
        return per_sample, sum(entropy_of_mean(part, temperature) for part in z.chunk(groups, dim=1))


def entropy_of_mean(z, temperature):
    """H(E[p(. | z)]) in nats over all 2^bits codes, exactly: z (N, bits) -> ().

    p(c | z) is a product over bits, so a code's mean is one number of P^T Q / N, where P and Q (N, 2^(bits/2)) belong to
    the two halves of the bits. 4,096 tokens at 18 bits cost 0.1 s and 74 MB, forward and backward on one CPU core, where
    the N x 2^bits tensor alone would take 4.3 GB.
    """
    N, bits = z.shape
    halves = []
    for half in z.tensor_split([bits // 2], dim=1):
        all_codes = codes(torch.arange(1 << half.shape[1], device=z.device), half.shape[1])
        halves.append((2 / temperature * half @ all_codes.T).softmax(-1))                   # (N, 2^(bits/2))
    mean = halves[1].T @ halves[0] / N                                                      # flattened: in order of index
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.is_grad_enabled():
        everyone = mean.detach().clone()                    # before the logarithm: the mean of entropies is another number
        torch.distributed.all_reduce(everyone)              # each process sends back the gradient of its own share, which
        mean = mean + (everyone / torch.distributed.get_world_size() - mean.detach())       # DDP then averages
    # No epsilon: 1e-5 would be more than a code's fair share at 2^18. The clamp gives a code that nobody is near
    # gradient 0 where -log 0 would give infinity times 0.
    return torch.special.entr(mean.clamp(min=torch.finfo(mean.dtype).tiny)).sum()


class LookupFreeQuantizer(nn.Module):
    """quantize with its losses, and no parameters: entropy weighs both entropies, diversity the batch's against the token's,
    beta the commitment. Against a squared error of weight 1 the defaults are the paper's 5 : 0.1 : 0.25 (reconstruction,
    entropy, commitment). The paper's temperature is 0.01; 0.1 still moves a z ten times as far from 0: after 200 steps of
    8 drawn shapes 94% of 1024 words are in use instead of 82%, and PSNR is 20.4 dB instead of 18.4.
    """

    def __init__(self, bits, entropy=0.02, diversity=1.0, beta=0.05, temperature=0.1, groups=1):
        super().__init__()
        self.bits, self.entropy, self.diversity, self.beta = bits, entropy, diversity, beta
        self.temperature, self.groups = temperature, groups

    @torch.no_grad()
    def count(self, ids):
        """How often each code occurs: ids (B, T) -> (V,) float32. bincount would wait for the GPU."""
        ids = ids.flatten()
        return torch.zeros(1 << self.bits, device=ids.device).index_add_(0, ids, torch.ones_like(ids, dtype=torch.float32))

    def forward(self, z):
        """z (B, T, bits) -> q (B, T, bits) float32, ids (B, T), loss (), negative as a rule, and logs.

        logs: commit (with its weight beta), entropy_sample and entropy_batch in nats without their weights, usage (share
        of the V codes that occur in this batch), perplexity exp(entropy of their frequencies), 1 .. V.
        """
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            q, ids = quantize(z)
            commit = self.beta * F.mse_loss(z, q.detach())
            per_sample, batch = entropy_penalty(z, self.temperature, self.groups)
            loss = commit + self.entropy * (per_sample - self.diversity * batch)
            p = self.count(ids) / ids.numel()                                               # (V,)
            logs = {"commit": commit.detach(), "entropy_sample": per_sample.detach(), "entropy_batch": batch.detach(),
                    "usage": (p > 0).float().mean(), "perplexity": torch.exp(-torch.xlogy(p, p).sum())}
        return q, ids, loss, logs


# ---------------------------------------------------------------------------------------------------
# The causal network: activations are (B, C, frames, h, w)

class CausalConv(nn.Conv3d):
    """A convolution over time and space whose frame t sees frames up to t: zeros are put in front of the clip only,
    kernel - 1 of them even where it strides, and as many as usual around each frame."""

    def __init__(self, c_in, c_out, kernel=(3, 3, 3), stride=(1, 1, 1), bias=True):
        super().__init__(c_in, c_out, kernel, stride, (0, kernel[1] // 2, kernel[2] // 2), bias=bias)

    def forward(self, x, c_out=None):
        """x (B, c_in, f, h, w) -> (B, c_out, (f - 1) // stride + 1, h', w'); c_out: only the first so many channels."""
        weight, bias = self.weight[:c_out], self.bias if self.bias is None else self.bias[:c_out]
        if x.shape[2] == 1:                                 # all taps but the last meet zeros: an image costs what 2-D does
            return F.conv2d(x.squeeze(2), weight[:, :, -1], bias, self.stride[1:], self.padding[1:]).unsqueeze(2)
        x = F.pad(x, (0, 0, 0, 0, self.kernel_size[0] - 1, 0))
        return F.conv3d(x, weight, bias, self.stride, self.padding)


class CausalUpsample(CausalConv):
    """Twice the resolution by depth-to-space: the convolution writes all pixels of a block, as channels.

    With time=2 also f -> 2f - 1 frames: of frame 0, which stands for itself alone, the first of the two is kept.
    """

    def __init__(self, c, kernel, time):
        super().__init__(c, 4 * time * c, kernel)
        self.time = time

    def forward(self, x):                                   # (B, c, f, h, w) -> (B, c, time * (f - 1) + 1, 2h, 2w)
        B, c, f, h, w = x.shape
        time = 1 if f == 1 else self.time                   # an image: what would be dropped is not computed
        x = super().forward(x, 4 * time * c).unflatten(1, (time, 2, 2, c))                  # (B, time, 2, 2, c, f, h, w)
        x = x.permute(0, 4, 5, 1, 6, 2, 7, 3).reshape(B, c, f * time, 2 * h, 2 * w)
        return x if time == 1 else torch.cat([x[:, :, :1], x[:, :, time:]], dim=2)


class FrameNorm(nn.GroupNorm):
    """Group normalisation of each frame by itself. Over the whole clip, as PyTorch has it and Open-MAGVIT2's video
    weights want it (per_frame=False), the first frame would know how bright the last one is."""

    def __init__(self, c, groups, per_frame=True, affine=True):
        super().__init__(groups, c, eps=1e-6, affine=affine)
        self.per_frame = per_frame

    def forward(self, x):                                   # (B, c, f, h, w) -> the same
        if not self.per_frame:
            return super().forward(x)
        frames = x.transpose(1, 2)                                                          # (B, f, c, h, w)
        return super().forward(frames.flatten(0, 1)).view(frames.shape).transpose(1, 2)


class AdaptiveNorm(FrameNorm):
    """Group normalisation whose scale and shift are read off the codes: off the standard deviation and the mean of each
    bit over a frame (or the clip). `time`: frames of x per frame of codes."""

    def __init__(self, c, bits, groups, per_frame=True, time=1):
        super().__init__(c, groups, per_frame, affine=False)
        self.gamma, self.beta, self.time = nn.Linear(bits, c), nn.Linear(bits, c), time

    def forward(self, x, q):                                # (B, c, F, h, w), (B, bits, f, h', w') -> (B, c, F, h, w)
        var, mean = torch.var_mean(q, (3, 4) if self.per_frame else (2, 3, 4), keepdim=True)       # (B, bits, f or 1, 1, 1)
        scale = self.gamma((var + 1e-6).sqrt().transpose(1, -1)).transpose(1, -1)                   # (B, c, f or 1, 1, 1)
        shift = self.beta(mean.transpose(1, -1)).transpose(1, -1)
        scale, shift = (v.repeat_interleave(self.time, 2)[:, :, self.time - 1:] for v in (scale, shift))
        return super().forward(x) * scale + shift


class CausalResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1x1 convolution on x where the width changes; no biases."""

    def __init__(self, c_in, c_out, kernel, groups, per_frame):
        super().__init__()
        self.norm1 = FrameNorm(c_in, groups, per_frame)
        self.conv1 = CausalConv(c_in, c_out, kernel, bias=False)
        self.norm2 = FrameNorm(c_out, groups, per_frame)
        self.conv2 = CausalConv(c_out, c_out, kernel, bias=False)
        self.nin_shortcut = CausalConv(c_in, c_out, (1, 1, 1), bias=False) if c_in != c_out else nn.Identity()

    def forward(self, x):                                   # (B, c_in, f, h, w) -> (B, c_out, f, h, w)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class CausalEncoder(nn.Sequential):
    """clip (B, channels, F, H, W) -> z (B, bits, f, h, w). After level i, time strides by time[i] and space by 2."""

    def __init__(self, bits, ch, ch_mult, n_res, kernel, time, groups, per_frame, channels=3):
        c, layers = ch, [CausalConv(channels, ch, kernel, bias=False)]
        for level, mult in enumerate(ch_mult):
            for _ in range(n_res):
                layers.append(CausalResBlock(c, ch * mult, kernel, groups, per_frame))
                c = ch * mult
            if level < len(ch_mult) - 1:
                layers.append(CausalConv(c, c, kernel, (time[level], 2, 2)))
        layers += [CausalResBlock(c, c, kernel, groups, per_frame) for _ in range(n_res)]
        super().__init__(*layers, FrameNorm(c, groups, per_frame), nn.SiLU(), CausalConv(c, bits, (1, 1, 1)))


class CausalDecoder(nn.Sequential):
    """q (B, bits, f, h, w) -> clip (B, channels, F, H, W); mirrors CausalEncoder, with an AdaptiveNorm before each level."""

    def __init__(self, bits, ch, ch_mult, n_res, kernel, time, groups, per_frame, channels=3):
        c, so_far = ch * ch_mult[-1], 1
        layers = [CausalConv(bits, c, kernel)] + [CausalResBlock(c, c, kernel, groups, per_frame) for _ in range(n_res)]
        for level in reversed(range(len(ch_mult))):
            layers.append(AdaptiveNorm(c, bits, groups, per_frame, so_far))
            for _ in range(n_res):
                layers.append(CausalResBlock(c, ch * ch_mult[level], kernel, groups, per_frame))
                c = ch * ch_mult[level]
            if level > 0:
                layers.append(CausalUpsample(c, kernel, time[level - 1]))
                so_far *= time[level - 1]
        super().__init__(*layers, FrameNorm(c, groups, per_frame), nn.SiLU(), CausalConv(c, channels, kernel))

    def forward(self, q):
        x = q
        for layer in self:
            x = layer(x, q) if isinstance(layer, AdaptiveNorm) else layer(x)
        return x


# ---------------------------------------------------------------------------------------------------
# The tokenizer

class LFQ(nn.Module):
    """MAGVIT-v2's tokenizer: images (B, 3, H, W) and clips (B, 3, F, H, W) to ids and back, with the same weights.

    frames=1: an image tokenizer, its kernels 1 x 3 x 3. More: kernels 3 x 3 x 3, and time is halved together with space
    at the last two of the downsamplings (time=(1, 2, 2), say, gives other strides), so that 17 frames become 5. Such a
    tokenizer takes images too, and clips of any length of 1 + a multiple of its stride; an image tokenizer takes clips
    frame by frame. groups, per_frame: see FrameNorm. channels as in vae.VAE. The rest: see LookupFreeQuantizer.
    """

    token_dim = None                                        # tokens are ids

    def __init__(self, image_size=32, frames=1, bits=10, ch=16, ch_mult=(1, 2, 4), n_res=2, time=None, groups=8,
                 per_frame=True, channels=3, entropy=0.02, diversity=1.0, beta=0.05, temperature=0.1, entropy_groups=1):
        super().__init__()
        downs = len(ch_mult) - 1
        if image_size % (1 << downs) or image_size < 2 << downs:                            # one token has no variance
            raise ValueError(f"image_size {image_size} must be a multiple of {1 << downs}, the stride of this LFQ, "
                             f"and at least {2 << downs}")
        if time is None:
            time = (1,) * downs if frames == 1 else tuple(2 if level >= downs - 2 else 1 for level in range(downs))
        kernel = (1 if frames == math.prod(time) == 1 else 3, 3, 3)
        self.bits, self.vocab_size, self.channels, self.time_stride = bits, 1 << bits, channels, math.prod(time)
        side = image_size >> downs
        self.space = (side, side)
        self.grid = self.space if frames == 1 else (self.latent_frames(frames), *self.space)
        self.seq_len = math.prod(self.grid)
        self.encoder = CausalEncoder(bits, ch, ch_mult, n_res, kernel, time, groups, per_frame, channels)
        self.decoder = CausalDecoder(bits, ch, ch_mult, n_res, kernel, time, groups, per_frame, channels)
        for module in self.modules():                       # each block starts as the identity, as in vae.py and vq.py
            if isinstance(module, CausalConv):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, CausalResBlock):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, AdaptiveNorm):          # and an adaptive norm as a plain one
                nn.init.zeros_(module.gamma.weight), nn.init.ones_(module.gamma.bias)
                nn.init.zeros_(module.beta.weight), nn.init.zeros_(module.beta.bias)
        self.quantizer = LookupFreeQuantizer(bits, entropy, diversity, beta, temperature, entropy_groups)

    def latent_frames(self, frames):
        """Frames of a clip -> frames of its tokens; the first frame of a clip stands for itself."""
        s = self.time_stride
        if frames % s != 1 % s:
            below = (frames - 1) // s * s + 1
            raise ValueError(f"{frames} frames do not fit this LFQ: 1 + a multiple of {s} do, so {below} or {below + s}")
        return (frames - 1) // s + 1

    def pixels(self, images):
        """What the network sees of images or clips: (B, 3, ...) -> (B, 1, ...) where it is grey, else themselves."""
        return images.mean(1, keepdim=True) if self.channels == 1 else images

    def latents(self, images):
        """images (B, 3, H, W) or clips (B, 3, F, H, W) -> z (B, T, bits) float32, not yet rounded; frame by frame."""
        x = self.pixels(images)
        x = x.unsqueeze(2) if x.ndim == 4 else x
        self.latent_frames(x.shape[2])
        return self.encoder(x).float().flatten(2).transpose(1, 2)

    def decode_raw(self, q):
        """Codes q (B, T, bits) -> images (B, 3, H, W) if they are those of one frame, else clips, not clamped."""
        q = q.transpose(1, 2).unflatten(2, (-1, *self.space))                               # (B, bits, f, h, w)
        raw = self.decoder(q).float()
        raw = raw.squeeze(2) if q.shape[2] == 1 else raw
        return raw.repeat_interleave(3, dim=1) if self.channels == 1 else raw

    def reconstruct(self, images):
        """images (B, 3, H, W) or clips (B, 3, F, H, W) -> recon (the same), loss of the quantiser (), logs."""
        q, _, auxiliary, logs = self.quantizer(self.latents(images))
        return self.decode_raw(q).view_as(images), auxiliary, logs

    def forward(self, images, labels=None):
        """images or clips in [-1, 1] -> loss (), logs: mse per pixel value, and the quantiser's."""
        recon, auxiliary, logs = self.reconstruct(images)
        mse = F.mse_loss(self.pixels(recon), self.pixels(images))
        return mse + auxiliary, {"mse": mse.detach(), **logs}

    @torch.no_grad()
    def encode(self, images):
        """images (B, 3, H, W) or clips (B, 3, F, H, W) in [-1, 1] -> ids (B, T) int64 in 0 .. V - 1, frame by frame."""
        return quantize(self.latents(images))[1]

    @torch.no_grad()
    def decode(self, tokens):
        """ids (B, T) int64 -> images (B, 3, H, W) if they are those of one frame, else clips (B, 3, F, H, W), in [-1, 1]."""
        return self.decode_raw(codes(tokens, self.bits)).clamp(-1, 1)

    def inflate(self, state_dict):
        """Take over an image tokenizer's weights: its state dict, same sizes -> self, which now gives images the same ids.

        A kernel goes to the last tap of time, where the present frame is, and the others are 0; where a convolution
        writes two frames at once, both are the image's.
        """
        ours = self.state_dict()
        if odd := sorted(ours.keys() ^ state_dict.keys()):
            raise ValueError(f"only an image tokenizer of the same sizes can be inflated: {odd[0]} is in one of the two")
        for key, new in ours.items():
            old = state_dict[key]
            if old.ndim == 5:
                old = F.pad(old, (0, 0, 0, 0, new.shape[2] - old.shape[2], 0))
            ours[key] = old.repeat(new.shape[0] // old.shape[0], *[1] * (old.ndim - 1))
        self.load_state_dict(ours)
        return self

    @classmethod
    def from_official(cls, state_dict, image_size=None, frames=None):
        """Open-MAGVIT2's image or video tokenizer: a state dict or a path -> LFQ in eval mode.

        The sizes are read off the shapes, except image_size (a multiple of the stride: 256 unless told, or 128 for video)
        and the frames of a clip (17 unless told). Averaged (EMA) weights are taken where the file has them. The video
        weights were trained with normalisation over whole clips, and so the first frame's ids depend on the others here.
        Refuses unknown or missing keys by name.
        """
        if not isinstance(state_dict, dict):
            state_dict = load_weights(state_dict)
        sd = state_dict.get("state_dict", state_dict)
        sd = {k: v for k, v in sd.items() if not k.startswith(("loss.", "quantize."))}      # the critic, and constants
        raw = {k: v for k, v in sd.items() if not k.startswith("model_ema.")}
        if any(k.startswith("model_ema.encoder") for k in sd):                              # whose keys have lost their dots
            averaged = {k: "model_ema." + k.replace(".", "") for k in raw}
            if lost := [v for v in averaged.values() if v not in sd]:
                raise ValueError(f"the averaged weights are incomplete: the key {lost[0]} is missing")
            raw = {k: sd[v] for k, v in averaged.items()}
        sd = {k.replace(".conv_1.", "."): v.float() for k, v in raw.items()}                # video names = image names
        count = lambda start: len({k[len(start):].split(".")[0] for k in sd if k.startswith(start)})
        levels, n_res = count("encoder.down."), count("encoder.down.0.block.")
        widths = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(levels)]
        ups = [f"decoder.up.{i}.upsample.conv1.weight" for i in range(1, levels)]
        for key in ("encoder.conv_in.weight", "encoder.conv_out.weight", *widths, *ups):
            if key not in sd:
                raise ValueError(f"not an Open-MAGVIT2 tokenizer: the key {key} is missing")
        ch, channels = sd["encoder.conv_in.weight"].shape[:2]
        video = sd["encoder.conv_in.weight"].ndim == 5
        model = cls(image_size or (128 if video else 256), frames or (17 if video else 1),
                    bits=len(sd["encoder.conv_out.weight"]), ch=ch, ch_mult=tuple(len(sd[k]) // ch for k in widths),
                    n_res=n_res, time=tuple(len(sd[k]) // sd[k].shape[1] // 4 for k in ups),
                    groups=32, per_frame=not video, channels=channels)
        expected = {}                                       # their key: our key
        for key in model.state_dict():
            part, i, rest = key.split(".", 2)
            layers = [j for j, layer in enumerate(getattr(model, part)) if list(layer.parameters())]
            expected[f"{part}.{magvit_names(levels, n_res, part == 'decoder')[layers.index(int(i))]}.{rest}"] = key
        missing, unknown = ([k for k in a if k not in b] for a, b in ((expected, sd), (sd, expected)))
        if missing or unknown:
            raise ValueError(f"the tokenizer's weights do not fit: missing {missing[:3]}, unknown {unknown[:3]}")
        shapes = model.state_dict()
        model.load_state_dict({expected[k]: v.view_as(shapes[expected[k]]) for k, v in sd.items()})
        return model.eval()


def magvit_names(levels, n_res, decoder=False):
    """Open-MAGVIT2's names of the layers that hold weights, in the order of our Sequential."""
    names, mid = [], [f"mid_block.{j}" for j in range(n_res)]
    for i in reversed(range(levels)) if decoder else range(levels):
        side, change, last = ("up", "upsample.conv1", 0) if decoder else ("down", "downsample", levels - 1)
        names += [f"adaptive.{i}"] if decoder else []
        names += [f"{side}.{i}.block.{j}" for j in range(n_res)] + ([f"{side}.{i}.{change}"] if i != last else [])
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

def fit_lfq(model, images, steps, batch_size=8, lr=2e-3, held_out=None):
    """Train on a fixed set of images (N, 3, H, W) or clips -> seconds, [(step, % of words in use on held_out)]."""
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
    start, curve = time.perf_counter(), []
    for step in range(steps + 1):
        if held_out is not None and step % 15 == 0:
            curve.append((step, 100 * (model.quantizer.count(model.encode(held_out)) > 0).float().mean().item()))
        opt.param_groups[0]["lr"] = lr * min(1, (step + 1) / 30) * (1 - step / steps)
        loss, _ = model(images[torch.randint(len(images), (batch_size,), device=images.device)])
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
    return time.perf_counter() - start, curve


def psnr(x_hat, x):
    return 10 * math.log10(4 / F.mse_loss(x_hat, x))


def bit_planes(fig, cell, images, ids, x_hat, bits):
    """One row per image: the image, its ids bit by bit (white: 1), what the decoder makes of them."""
    import data
    cells = cell.subgridspec(len(images), bits + 2, width_ratios=[1.7] + [1] * bits + [1.7], wspace=0.12, hspace=0.02)
    for row, (image, map_, decoded) in enumerate(zip(images, ids.view(-1, 8, 8), x_hat)):
        for column in range(bits + 2):
            ax = fig.add_subplot(cells[row, column])
            ax.set(xticks=[], yticks=[])
            if 0 < column <= bits:
                ax.imshow(map_ >> (column - 1) & 1, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            else:
                ax.imshow(data.tile((image if column == 0 else decoded)[None], 1), interpolation="nearest")
            if row == 0:
                ax.set_title(["image", *[f"bit {i}" for i in range(bits)], "decoded"][column], fontsize=9)


def film_strip(fig, cell, clip, x_hat, other, changed):
    """A clip, its reconstruction, the clip with another ending, and the tokens which that ending changed."""
    import data
    n = clip.shape[1]
    cells = cell.subgridspec(4, n, height_ratios=[1, 1, 1, 1.25], wspace=0.05, hspace=0.12)
    for row, (name, frames) in enumerate((("clip", clip), ("decoded", x_hat), ("another\nending", other))):
        for t in range(n):
            ax = fig.add_subplot(cells[row, t])
            ax.set(xticks=[], yticks=[])
            ax.imshow(data.tile(frames[:, t][None], 1), interpolation="nearest")
            if row == 0:
                ax.set_title(f"frame {t}", fontsize=9)
            if t == 0:
                ax.set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
    step = (n - 1) // (len(changed) - 1)
    for f, map_ in enumerate(changed):                      # tokens f stand for frame 0, or for the next `step` frames
        ax = fig.add_subplot(cells[3, 0] if f == 0 else cells[3, 1 + (f - 1) * step:1 + f * step])
        ax.set(xticks=[], yticks=[])
        ax.imshow(map_, cmap="Reds", vmin=0, vmax=1.5, interpolation="nearest")
        ax.set_xlabel(f"{int(map_.sum())} of {map_.numel()}", fontsize=9)
        if f == 0:
            ax.set_ylabel("tokens\nchanged", fontsize=9, rotation=0, ha="right", va="center")


def compare_words(cells, size, images, held_out, steps):
    """Train with none, one and both of the entropies, and plot the words in use -> the last model."""
    curves, ranks = cells.subgridspec(2, 1, hspace=0.38).subplots()
    for name, options, colour in (("no entropy", dict(entropy=0), "tab:red"),
                                  ("certain of each token", dict(diversity=0), "tab:orange"),
                                  ("... and undecided over all", dict(), "tab:blue")):
        torch.manual_seed(0)
        model = LFQ(**size, **options).to(images.device)
        seconds, curve = fit_lfq(model, images, steps, held_out=held_out[:64])
        ids = model.eval().encode(held_out)                                                 # (128, 64)
        p = model.quantizer.count(ids) / ids.numel()                                        # (V,)
        with torch.no_grad():
            per_sample, batch = entropy_penalty(model.latents(held_out), model.quantizer.temperature)
        print(f"{name:26s} {100 * (p > 0).float().mean():5.1f}% of {model.vocab_size} words in use, perplexity "
              f"{math.exp(-torch.xlogy(p, p).sum()):5.1f}   entropy in bits: {per_sample / math.log(2):4.2f} per token, "
              f"{batch / math.log(2):4.2f} over all   PSNR {psnr(model.decode(ids), held_out):4.1f} dB   {seconds:.0f} s")
        curves.plot(*zip(*curve), color=colour, label=name)
        ranks.plot(100 * p.sort(descending=True).values.cpu(), color=colour)
    curves.set(title=f"% of the {model.vocab_size} words in use", xlabel="training step", ylim=(0, 102))
    curves.legend(fontsize=9)
    ranks.set(title="how often each word occurs, %", xlabel="words, the most frequent first", yscale="log", ylim=(5e-3, 100))
    return model


def main():
    parser = argparse.ArgumentParser(description="Words without a table: which of them are used, and what happens in time?")
    parser.add_argument("--steps", type=int, default=150, help="training steps of each of the three image tokenizers")
    parser.add_argument("--clip_steps", type=int, default=200, help="training steps of the video tokenizer")
    args = parser.parse_args()
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import data
    device = "cuda" if torch.cuda.is_available() else "cpu"
    held_out = data.draw(torch.arange(128, device=device) + data.VAL_INDEX)[0]
    size = SIZES["small"] | dict(n_res=1)                   # half the work of "small"
    fig = plt.figure(figsize=(13, 7.4))
    left, right = fig.add_gridspec(1, 2, width_ratios=[1, 2.6], left=0.05, right=0.99, top=0.86, bottom=0.07, wspace=0.2)
    top, bottom = right.subgridspec(2, 1, height_ratios=[1, 2.1], hspace=0.2)
    image_lfq = compare_words(left, size, data.draw(torch.arange(2000, device=device))[0], held_out, args.steps)
    ids = image_lfq.encode(held_out)
    bit_planes(fig, top, held_out[:2].cpu(), ids[:2].cpu(), image_lfq.decode(ids[:2]).cpu(), image_lfq.bits)

    clips = data.draw_clips(torch.arange(400, device=device), frames=9)[0]                  # (N, 3, 9, 32, 32)
    held_out_clips = data.draw_clips(torch.arange(16, device=device) + data.VAL_INDEX, frames=9)[0]
    video = LFQ(**size, frames=9).to(device).inflate(image_lfq.state_dict())
    same = (video.encode(held_out) == ids).float().mean()
    before = psnr(video.decode(video.encode(held_out_clips)), held_out_clips)
    seconds, _ = fit_lfq(video, clips, args.clip_steps, batch_size=2)
    x_hat = video.eval().decode(video.encode(held_out_clips))
    print(f"inflated, {video.seq_len} tokens per clip of 9 frames: {100 * same:.0f}% of the images' ids are as before; PSNR "
          f"of clips {before:.1f} dB, after {args.clip_steps} steps {psnr(x_hat, held_out_clips):.1f} dB   {seconds:.0f} s")
    clip, n = held_out_clips[14:15], 5                      # "moves right", but frames 5 to 8 will be another clip's
    other = torch.cat([clip[:, :, :n], held_out_clips[7:8, :, n:]], dim=2)
    with torch.no_grad():
        z, z_other = video.latents(clip), video.latents(other)
    changed = (quantize(z)[1] != quantize(z_other)[1]).view(video.grid).cpu()               # (f, h, w)
    moved = (z - z_other).abs().amax(-1).view(video.grid).amax((1, 2))
    print("another ending from frame 5 on moves z by at most "
          + ", ".join(f"{v:.2g}" for v in moved) + " in the 3 frames of tokens")
    film_strip(fig, bottom, clip[0].cpu(), x_hat[14].cpu(), other[0].cpu(), changed.float())
    fig.suptitle(f"lfq.py: a token is {video.bits} signs; entropy over all tokens brings the {video.vocab_size} words into use\n"
                 "inflated to clips (below) it looks back only: a new ending leaves the earlier tokens alone", fontsize=12)
    fig.savefig("lfq.png", dpi=80)
    print("wrote lfq.png")


if __name__ == "__main__":
    main()
