"""
MAGVIT-v2's tokenizer: a lookup-free quantiser in a causal CNN, one vocabulary for images and clips.

A vector quantiser (vq.py) keeps a table of V codes, and the larger the table, the more of it dies. MAGVIT-v2
(Yu et al. 2023, arxiv.org/abs/2310.05737) has none. The encoder writes `bits` numbers per token, of each only
the sign is kept, and the signs read as a binary number are the token: 18 bits make 262,144 ids without one
parameter. An entropy penalty says "be certain of each token, undecided over all of them", where p(c | z) =
softmax of 2 z.c / tau over all 2^bits codes c:

    q_i = sign(z_i)     loss = |x - decoder(q)|^2 + a (E[H(p(.|z))] - H(E[p(.|z)])) + b |z - sg(q)|^2

Convolutions look back in time only. So an image is a clip of one frame, and the first frame of a clip gets
the same tokens whatever comes after it.

Shapes:  B batch, F frames, H W pixels, T = f * h * w tokens (17 frames: f = 5), V = 2^bits

    clip (B, 3, F, H, W) --CausalEncoder--> z (B, T, bits) --quantize--> q (B, T, bits) of -1, +1, ids (B, T)
    ids (B, T) --codes--> q (B, bits, f, h, w) --CausalDecoder--> clip (B, 3, F, H, W);   images: no F, f = 1

    python lfq.py              # what each entropy does to the ids, writes lfq.png; about a minute on a CPU

Try it yourself:
  1. Decode ids ^ 1 in main(), then ids ^ 512: one sign the other way round. What does a bit mean?
  2. Set per_frame=False in size of main(). Which of the printed zeros is none any more, and why?
  3. Set bits=16 there: main() measures 8,192 tokens. How many of 65,536 ids can be used? What is H[E]?
"""
import argparse
import math
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

SIZES = {
    # the papers': 16 x 16 tokens for 256 and 128 pixels, 5 x 16 x 16 for 17 frames of 128 pixels
    "f16": dict(image_size=256, bits=18, ch=128, ch_mult=(1, 1, 2, 2, 4), n_res=4, groups=32),
    "f8": dict(image_size=128, bits=18, ch=128, ch_mult=(1, 2, 2, 4), n_res=4, groups=32),
    "video": dict(image_size=128, frames=17, bits=18, ch=128, ch_mult=(1, 2, 2, 4), n_res=4, groups=32),
    # images on a CPU, 4 x 4 and 8 x 8 tokens, and on a GPU, 8 x 8
    "coarse": dict(image_size=32, bits=10, ch=16, ch_mult=(1, 2, 4, 4), n_res=1, groups=8),
    "small": dict(image_size=32, bits=10, ch=16, ch_mult=(1, 2, 4), n_res=2, groups=8),
    "medium": dict(image_size=32, bits=12, ch=64, ch_mult=(1, 2, 4), n_res=2, groups=16),
    # With the linear path beside the networks, on a CPU: 4 x 4 tokens, 8 x 8, which is the default, and
    # 5 x 4 x 4 of a clip. The networks see 2 x 2 or 4 x 4 pixels as channels.
    "patches-coarse": dict(image_size=32, bits=10, ch=32, ch_mult=(1, 2, 2), n_res=1, groups=8, stem=2,
                           linear=True),
    "patches": dict(image_size=32, bits=10, ch=64, ch_mult=(1,), n_res=2, groups=8, stem=4, linear=True),
    "patches-clips": dict(image_size=32, frames=17, bits=12, ch=16, ch_mult=(1, 2, 4), n_res=1, groups=8,
                          stem=2, linear=True),
    # clips on a CPU, 5 x 4 x 4 tokens, and on a GPU, 5 x 8 x 8
    "clips": dict(image_size=16, frames=17, bits=10, ch=16, ch_mult=(1, 2, 4), n_res=1, groups=8),
    "clips-medium": dict(image_size=64, frames=17, bits=12, ch=64, ch_mult=(1, 2, 4, 4), n_res=2, groups=16),
}


# ---- The quantiser: no table, so plain functions ---------------------------------------------------

def quantize(z):
    """Signs, and the number that they spell: z (..., bits) -> q (..., bits) of -1 and +1, index (...) int64.

    index = sum_i 2^i [z_i > 0]: the first channel is the lowest bit. A z of exactly 0 becomes -1 (torch.sign
    would leave a third value, 0). The gradient of q goes straight through to z, unclipped.
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

    per_sample: mean over tokens of the entropy of p(c | z) = softmax over all 2^bits codes of 2 z.c /
    temperature. It is a product of coins with P(c_i = +1) = sigmoid(4 z_i / temperature), so its entropy is a
    sum over bits, exactly. batch: entropy_of_mean(), of the mean of p over tokens, of all processes of a
    distributed run; at most bits * ln 2. groups > 1, a divisor of bits: the sum of the entropies of `groups`
    runs of neighbouring bits, an upper bound for vocabularies beyond 2^22 or so. It does not see how the runs
    depend on each other. Raises ValueError where groups is no divisor.

    Where |z| > 2 temperature the coin has fallen, and the gradient of both is gone. At 0.01 the commitment
    takes over there.
    """
    if z.shape[-1] % groups:
        raise ValueError(f"{z.shape[-1]} bits cannot be cut into {groups} groups of equal size")
    with torch.autocast(z.device.type, enabled=False):
        z = z.float().flatten(0, -2)                                                  # (N, bits)
        a = (4 / temperature * z).abs()                     # log-odds of the likelier sign: -p log p of the
        per_sample = (F.softplus(-a) + a * torch.sigmoid(-a)).sum(-1).mean()          # other would give NaN
        return per_sample, sum(entropy_of_mean(part, temperature) for part in z.chunk(groups, dim=1))


def entropy_of_mean(z, temperature):
    """H(E[p(. | z)]) in nats over all 2^bits codes, exactly: z (N, bits) -> ().

    p(c | z) is a product over bits, so a code's mean is one number of P^T Q / N, where P and Q (N,
    2^(bits/2)) belong to the two halves of the bits. 4,096 tokens at 18 bits cost 0.1 s and 74 MB, forward
    and backward on one CPU core. The N x 2^bits tensor alone would take 4.3 GB.
    """
    N, bits = z.shape
    halves = []
    for half in z.tensor_split([bits // 2], dim=1):
        all_codes = codes(torch.arange(1 << half.shape[1], device=z.device), half.shape[1])
        halves.append((2 / temperature * half @ all_codes.T).softmax(-1))             # (N, 2^(bits/2))
    mean = halves[1].T @ halves[0] / N                                        # flattened: in order of index
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.is_grad_enabled():
        # The mean of the processes' entropies would be another number, so p is averaged before the logarithm.
        # Each process sends back the gradient of its own share, and DDP averages these.
        everyone = mean.detach().clone()
        torch.distributed.all_reduce(everyone)
        mean = mean + (everyone / torch.distributed.get_world_size() - mean.detach())
    # No epsilon: 1e-5 would be more than a code's fair share at 2^18. The clamp gives a code that nobody is
    # near gradient 0 where -log 0 would give infinity times 0.
    return torch.special.entr(mean.clamp(min=torch.finfo(mean.dtype).tiny)).sum()


class LookupFreeQuantizer(nn.Module):
    """quantize with its losses, and no parameters.

    entropy weighs both entropies, diversity the batch's against the token's, beta the commitment. Against a
    squared error of weight 1 the defaults are the paper's 5 : 0.1 : 0.25 (reconstruction, entropy,
    commitment). The paper's temperature is 0.01; 0.1 still moves a z ten times as far from 0. After 200 steps
    of 8 drawn shapes 94% of 1024 ids are in use instead of 82%, and PSNR is 20.4 dB instead of 18.4.
    """

    def __init__(self, bits, entropy=0.02, diversity=1.0, beta=0.05, temperature=0.1, groups=1):
        super().__init__()
        self.bits = bits
        self.n_channels = bits
        self.vocab_size = 1 << bits
        self.entropy = entropy
        self.diversity = diversity
        self.beta = beta
        self.temperature = temperature
        self.groups = groups

    def count(self, ids):
        return count_ids(ids, self.vocab_size)

    def quantize(self, z):
        return quantize(z)

    def codes(self, index):
        return codes(index, self.bits)

    def forward(self, z):
        """z (B, T, bits) -> q (B, T, bits) float32, ids (B, T), loss (), negative as a rule, and logs.

        logs: commit (with its weight beta), entropy_sample and entropy_batch in nats without their weights,
        usage (share of the V codes that occur in this batch), perplexity exp(entropy of their frequencies).
        """
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            q, ids = quantize(z)
            commit = self.beta * F.mse_loss(z, q.detach())
            per_sample, batch = entropy_penalty(z, self.temperature, self.groups)
            loss = commit + self.entropy * (per_sample - self.diversity * batch)
            logs = {"commit": commit.detach(), "entropy_sample": per_sample.detach(),
                    "entropy_batch": batch.detach(), **usage(self.count(ids))}
        return q, ids, loss, logs


@torch.no_grad()
def count_ids(ids, vocab_size):
    """How often each code occurs: ids (B, T) -> (V,) float32. torch.bincount would wait for the GPU."""
    ids = ids.flatten()
    counts = torch.zeros(vocab_size, dtype=torch.float32, device=ids.device)
    return counts.index_add_(0, ids, counts.new_ones(ids.shape))


def usage(counts):
    """counts (V,) -> logs: share of the codes that occur (), and exp(entropy of their frequencies) ()."""
    p = counts / counts.sum()
    return {"usage": (p > 0).float().mean(), "perplexity": torch.exp(-torch.xlogy(p, p).sum())}


# ---- The causal network: activations are (B, C, frames, h, w) --------------------------------------

class CausalConv(nn.Conv3d):
    """A convolution over time and space whose frame t sees frames up to t.

    kernel - 1 frames of zeros are put in front of the clip, even where it strides, and none behind it. Around
    each frame there are as many zeros as usual.
    """

    def __init__(self, c_in, c_out, kernel=(3, 3, 3), stride=(1, 1, 1), bias=True):
        super().__init__(c_in, c_out, kernel, stride, (0, kernel[1] // 2, kernel[2] // 2), bias=bias)

    def forward(self, x, c_out=None):
        """x (B, c_in, f, h, w) -> (B, c_out, (f - 1) // stride + 1, h', w').

        c_out: only the first so many channels. An image, f = 1, costs what it does in two dimensions: all
        taps in time but the last meet zeros and are left out.
        """
        weight = self.weight[:c_out]
        bias = self.bias if self.bias is None else self.bias[:c_out]
        if x.shape[2] == 1:
            y = F.conv2d(x.squeeze(2), weight[:, :, -1], bias, self.stride[1:], self.padding[1:])
            return y.unsqueeze(2)
        x = F.pad(x, (0, 0, 0, 0, self.kernel_size[0] - 1, 0))
        return F.conv3d(x, weight, bias, self.stride, self.padding)


class CausalUpsample(CausalConv):
    """Twice the resolution by depth-to-space: the convolution writes all pixels of a block, as channels.

    With time=2 also f -> 2f - 1 frames: frame 0 stands for itself alone, so the first of its two is dropped.
    """

    def __init__(self, c, kernel, time):
        super().__init__(c, 4 * time * c, kernel)
        self.time = time

    def forward(self, x):                         # (B, c, f, h, w) -> (B, c, time * (f - 1) + 1, 2h, 2w)
        B, c, f, h, w = x.shape
        time = 1 if f == 1 else self.time                   # an image: what would be dropped is not computed
        x = super().forward(x, 4 * time * c).unflatten(1, (time, 2, 2, c))     # (B, time, 2, 2, c, f, h, w)
        x = x.permute(0, 4, 5, 1, 6, 2, 7, 3).reshape(B, c, f * time, 2 * h, 2 * w)
        return x if time == 1 else torch.cat([x[:, :, :1], x[:, :, time:]], dim=2)


class FrameNorm(nn.GroupNorm):
    """Group normalisation of each frame by itself.

    per_frame=False: over the whole clip, as PyTorch has it and Open-MAGVIT2's video weights want it. The
    first frame then knows how bright the last one is.
    """

    def __init__(self, c, groups, per_frame=True, affine=True):
        super().__init__(groups, c, eps=1e-6, affine=affine)
        self.per_frame = per_frame

    def forward(self, x):                                   # (B, c, f, h, w) -> the same
        if not self.per_frame:
            return super().forward(x)
        frames = x.transpose(1, 2)                                                    # (B, f, c, h, w)
        return super().forward(frames.flatten(0, 1)).view(frames.shape).transpose(1, 2)


class AdaptiveNorm(FrameNorm):
    """Group normalisation whose scale and shift are read off the codes.

    They are linear in the standard deviation and in the mean of each bit over a frame (or over the clip).
    time: frames of x per frame of codes.
    """

    def __init__(self, c, bits, groups, per_frame=True, time=1):
        super().__init__(c, groups, per_frame, affine=False)
        self.gamma = nn.Linear(bits, c)
        self.beta = nn.Linear(bits, c)
        self.time = time

    def forward(self, x, q):                      # (B, c, F, h, w), (B, bits, f, h', w') -> (B, c, F, h, w)
        axes = (3, 4) if self.per_frame else (2, 3, 4)
        var, mean = torch.var_mean(q, axes, keepdim=True)                            # (B, bits, f or 1, 1, 1)
        scale = self.gamma((var + 1e-6).sqrt().transpose(1, -1)).transpose(1, -1)     # (B, c, f or 1, 1, 1)
        shift = self.beta(mean.transpose(1, -1)).transpose(1, -1)
        return super().forward(x) * self.stretched(scale) + self.stretched(shift)

    def stretched(self, v):                                 # (B, c, f, 1, 1) -> (B, c, F, 1, 1)
        return v.repeat_interleave(self.time, 2)[:, :, self.time - 1:]


class CausalResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1x1 convolution on x where the width changes.

    Its convolutions have no biases.
    """

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
    """clip (B, channels, F, H, W) -> z (B, bits, f, h, w).

    After level i, time strides by time[i] and space by 2.
    """

    def __init__(self, bits, ch, ch_mult, n_res, kernel, time, groups, per_frame, channels=3):
        c = ch
        layers = [CausalConv(channels, ch, kernel, bias=False)]
        for level, mult in enumerate(ch_mult):
            for _ in range(n_res):
                layers.append(CausalResBlock(c, ch * mult, kernel, groups, per_frame))
                c = ch * mult
            if level < len(ch_mult) - 1:
                layers.append(CausalConv(c, c, kernel, (time[level], 2, 2)))
        layers += [CausalResBlock(c, c, kernel, groups, per_frame) for _ in range(n_res)]
        layers += [FrameNorm(c, groups, per_frame), nn.SiLU(), CausalConv(c, bits, (1, 1, 1))]
        super().__init__(*layers)


class CausalDecoder(nn.Sequential):
    """q (B, bits, f, h, w) -> clip (B, channels, F, H, W).

    Mirrors CausalEncoder, with an AdaptiveNorm before each level.
    """

    def __init__(self, bits, ch, ch_mult, n_res, kernel, time, groups, per_frame, channels=3):
        c = ch * ch_mult[-1]
        time_so_far = 1
        layers = [CausalConv(bits, c, kernel)]
        layers += [CausalResBlock(c, c, kernel, groups, per_frame) for _ in range(n_res)]
        for level in reversed(range(len(ch_mult))):
            layers.append(AdaptiveNorm(c, bits, groups, per_frame, time_so_far))
            for _ in range(n_res):
                layers.append(CausalResBlock(c, ch * ch_mult[level], kernel, groups, per_frame))
                c = ch * ch_mult[level]
            if level > 0:
                layers.append(CausalUpsample(c, kernel, time[level - 1]))
                time_so_far *= time[level - 1]
        layers += [FrameNorm(c, groups, per_frame), nn.SiLU(), CausalConv(c, channels, kernel)]
        super().__init__(*layers)

    def forward(self, q):
        x = q
        for layer in self:
            x = layer(x, q) if isinstance(layer, AdaptiveNorm) else layer(x)
        return x


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


# ---- The tokenizer ---------------------------------------------------------------------------------

class LFQ(nn.Module):
    """MAGVIT-v2's tokenizer: images (B, 3, H, W) and clips (B, 3, F, H, W) to ids and back, by one network.

    frames=1: an image tokenizer, its kernels 1 x 3 x 3. It takes clips frame by frame. More: kernels 3 x 3 x
    3, and time is halved together with space at the last two of the downsamplings, so 17 frames become 5.
    time=(1, 2, 2), say, gives other strides. Such a tokenizer takes images too, and clips of any length of
    1 + a multiple of its stride. groups, per_frame: see FrameNorm. channels=1: grey. Images still come and go
    with 3 channels; the network sees their average. Any other number: images are (B, channels, H, W), such as
    one-hot label maps. The rest: see LookupFreeQuantizer.

    stem: the networks see stem x stem pixels as channels of one position. linear: z = path(frames) +
    network(frames), and what codes q mean is path_out(q) + network(q). Both networks begin at zero. The path
    sees as many frames as a token stands for; in front of a clip its first frame is repeated, so the path is
    causal, too.

    codebook: "lfq", or one of the two quantisers below that leave out its losses: "bsq", signs on the sphere
    (entropy is 0.1 then, and beta 0, if they are not given), or "fsq", rounded numbers, whose levels are
    those of FSQ_LEVELS that make most nearly 2^bits codes, if they are not given.
    """

    token_dim = None                                        # tokens are ids

    def __init__(self, image_size=32, frames=1, bits=10, ch=16, ch_mult=(1, 2, 4), n_res=2, time=None,
                 groups=8, per_frame=True, channels=3, entropy=None, diversity=1.0, beta=None,
                 temperature=0.1, entropy_groups=1, codebook="lfq", levels=None, stem=1, linear=False):
        super().__init__()
        downs = len(ch_mult) - 1
        stride = stem << downs
        if image_size % stride or image_size < 2 * stride:                         # one token has no variance
            raise ValueError(f"image_size {image_size} must be a multiple of {stride}, the stride of "
                             f"this LFQ, and at least {2 * stride}")
        if time is None:
            last_two = tuple(2 if level >= downs - 2 else 1 for level in range(downs))
            time = (1,) * downs if frames == 1 else last_two
        kernel = (1 if frames == math.prod(time) == 1 else 3, 3, 3)
        side = image_size // stride
        weights = {name: v for name, v in dict(entropy=entropy, beta=beta).items() if v is not None}
        if codebook == "fsq":
            self.quantizer = FiniteScalarQuantizer(levels or FSQ_LEVELS[nearest_size(1 << bits)])
        elif codebook == "bsq":
            self.quantizer = BinarySphericalQuantizer(bits, diversity=diversity, groups=entropy_groups,
                                                      **weights)
        else:
            self.quantizer = LookupFreeQuantizer(bits, diversity=diversity, temperature=temperature,
                                                 groups=entropy_groups, **weights)
        n = self.quantizer.n_channels
        self.bits = bits
        self.vocab_size = self.quantizer.vocab_size
        self.channels = channels
        self.time_stride = math.prod(time)
        self.space = (side, side)
        self.grid = self.space if frames == 1 else (self.latent_frames(frames), *self.space)
        self.seq_len = math.prod(self.grid)
        self.stem = stem
        seen = channels * stem**2
        self.encoder = CausalEncoder(n, ch, ch_mult, n_res, kernel, time, groups, per_frame, seen)
        self.decoder = CausalDecoder(n, ch, ch_mult, n_res, kernel, time, groups, per_frame, seen)
        self.path = None
        if linear:
            n_in = self.time_stride * channels * stride**2
            self.path = LinearPath(stride, n_in, n)
            self.path_out = nn.Linear(n, n_in)              # codes -> patches
        self.init_weights()

    def init_weights(self):
        """Each block starts as the identity, as in vae.py, and each adaptive norm as a plain one."""
        for module in self.modules():
            if isinstance(module, CausalConv):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, CausalResBlock):
                nn.init.zeros_(module.conv2.weight)
            if isinstance(module, AdaptiveNorm):
                nn.init.zeros_(module.gamma.weight)
                nn.init.ones_(module.gamma.bias)
                nn.init.zeros_(module.beta.weight)
                nn.init.zeros_(module.beta.bias)
        if self.path is not None:                           # at first, the networks add nothing to the path
            nn.init.zeros_(self.encoder[-1].weight)
            nn.init.zeros_(self.decoder[-1].weight)

    @torch.no_grad()
    def start(self, images):
        """Before training: PCA of the patches of images (N, 3, H, W), or clips, turned at random, so that
        each bit gets its share of every component; then the linear map from signs to patches with the least
        squared error.

        Random numbers come from torch's seed and sums are made on the CPU: all processes get the same.
        """
        if self.path is None:
            return
        frames = self.groups_of_frames(images)
        self.path.start(frames)
        self.path.std.fill_(self.path.std.square().mean().sqrt())     # distances are those between patches
        n = len(self.path.std)
        turn = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, device="cpu")).Q
        self.path.basis.copy_(self.path.basis @ turn.to(self.path.basis))
        z = self.path(frames).flatten(0, 1)
        q = self.quantizer.codes(self.quantizer.quantize(z)[1]).cpu().double()                  # (N * T, n)
        patches = self.path.cut(frames).flatten(0, 1).cpu().double()                  # (N * T, n_in)
        mean = q.mean(0)
        spread = q.T.cov(correction=0) + 1e-6 * torch.eye(n, dtype=q.dtype, device="cpu")
        weight = torch.linalg.solve(spread, (q - mean).T @ patches / len(q))          # (n, n_in)
        self.path_out.weight.copy_(weight.T)
        self.path_out.bias.copy_(patches.mean(0) - mean @ weight)

    def groups_of_frames(self, images):
        """images (B, 3, H, W) or clips (B, 3, F, H, W) -> (B * f, time_stride * channels, H, W): the frames
        that a frame of tokens stands for, as channels. In front of the first one it is repeated.
        """
        x = self.pixels(images)
        x = x.unsqueeze(2) if x.ndim == 4 else x
        first = x[:, :, :1].expand(-1, -1, self.time_stride - 1, -1, -1)
        x = torch.cat([first, x], 2).transpose(1, 2)                                  # (B, f * s, C, H, W)
        return x.reshape(-1, self.time_stride * x.shape[2], *x.shape[3:])

    def latent_frames(self, frames):
        """Frames of a clip -> frames of its tokens. The first frame of a clip stands for itself."""
        s = self.time_stride
        if frames % s != 1 % s:
            below = (frames - 1) // s * s + 1
            raise ValueError(f"{frames} frames do not fit this LFQ: 1 + a multiple of {s} do, so {below} or "
                             f"{below + s}")
        return (frames - 1) // s + 1

    def pixels(self, images):
        """What the network sees of images or clips: their average (B, 1, ...) if channels is 1, else all."""
        return images.mean(1, keepdim=True) if self.channels == 1 else images

    def latents(self, images):
        """images (B, 3, H, W) or clips (B, 3, F, H, W) -> z (B, T, bits) float32, frame by frame."""
        x = self.pixels(images)
        x = x.unsqueeze(2) if x.ndim == 4 else x
        self.latent_frames(x.shape[2])                      # refuses a length that does not fit
        z = self.encoder(self.to_stem(x)).float().flatten(2).transpose(1, 2)
        if self.path is None:
            return z
        return z + self.path(self.groups_of_frames(images)).view(z.shape)

    def to_stem(self, x):
        """x (B, C, F, H, W) -> (B, C * stem^2, F, H / stem, W / stem)."""
        return F.pixel_unshuffle(x.transpose(1, 2), self.stem).transpose(1, 2)

    def decode_raw(self, q):
        """Codes q (B, T, bits) -> images (B, 3, H, W), or clips if of several frames, not clamped."""
        q = q.transpose(1, 2).unflatten(2, (-1, *self.space))                         # (B, bits, f, h, w)
        raw = F.pixel_shuffle(self.decoder(q).float().transpose(1, 2), self.stem)     # (B, F, C, H, W)
        if self.path is not None:
            with torch.autocast(q.device.type, enabled=False):
                patches = self.path_out(q.float().flatten(3).permute(0, 2, 3, 1)).flatten(0, 1)
                groups = self.path.join(patches, self.space)                          # (B * f, s * C, H, W)
            frames = groups.view(len(q), -1, *raw.shape[2:])                          # (B, f * s, C, H, W)
            raw = raw + frames[:, self.time_stride - 1:]
        raw = raw.transpose(1, 2)
        raw = raw.squeeze(2) if q.shape[2] == 1 else raw
        return raw.repeat_interleave(3, dim=1) if self.channels == 1 else raw

    def reconstruct(self, images):
        """images (B, 3, H, W) or clips (B, 3, F, H, W) -> recon (the same), quantiser's loss (), logs."""
        q, _, auxiliary, logs = self.quantizer(self.latents(images))
        return self.decode_raw(q).view_as(images), auxiliary, logs

    def forward(self, images, labels=None):
        """images or clips in [-1, 1] -> loss (), logs: mse per pixel value, and the quantiser's."""
        recon, auxiliary, logs = self.reconstruct(images)
        mse = F.mse_loss(self.pixels(recon), self.pixels(images))
        return mse + auxiliary, {"mse": mse.detach(), **logs}

    @torch.no_grad()
    def encode(self, images):
        """images (B, 3, H, W) or clips (B, 3, F, H, W) in [-1, 1] -> ids (B, T) int64, frame by frame."""
        return self.quantizer.quantize(self.latents(images))[1]

    @torch.no_grad()
    def decode(self, tokens):
        """ids (B, T) int64 -> images (B, 3, H, W), or clips if of several frames, in [-1, 1]."""
        return self.decode_raw(self.quantizer.codes(tokens)).clamp(-1, 1)

    # ---- Extras: a video tokenizer that begins as an image tokenizer

    def inflate(self, state_dict):
        """Take over an image tokenizer's weights: its state dict -> self, with the same ids for images.

        A kernel goes to the last tap of time, where the present frame is, and the others are 0. Where a
        convolution writes two frames at once, both are the image's. Raises ValueError where sizes differ.
        """
        ours = self.state_dict()
        if odd := sorted(ours.keys() ^ state_dict.keys()):
            raise ValueError("only an image tokenizer of the same sizes can be inflated: "
                             f"{odd[0]} is in one of the two")
        for key, new in ours.items():
            old = state_dict[key]
            if old.ndim == 5:
                old = F.pad(old, (0, 0, 0, 0, new.shape[2] - old.shape[2], 0))
            if key == "path.basis":                         # it looks at the present frame, the last one
                old = F.pad(old, (0, 0, len(new) - len(old), 0))
            ours[key] = old.repeat(new.shape[0] // old.shape[0], *[1] * (old.ndim - 1))
        self.load_state_dict(ours)
        return self


# ---- Extras: two quantisers that need no entropy penalty, or a cheaper one -------------------------

FSQ_LEVELS = {                                              # the paper's, for about 2^8, 2^10, ... 2^16 codes
    240: (8, 6, 5), 1000: (8, 5, 5, 5), 4375: (7, 5, 5, 5, 5), 15_360: (8, 8, 8, 6, 5),
    64_000: (8, 8, 8, 5, 5, 5),
}


def nearest_size(vocab_size):
    """The number of codes in FSQ_LEVELS that is nearest, as a ratio -> int."""
    return min(FSQ_LEVELS, key=lambda size: abs(math.log(size / vocab_size)))


def fsq_bound(z, levels):
    """z (..., n), n numbers of levels -> (..., n): channel i in a range whose rounding has levels[i] values.

    tanh squashes to a range of (L - 1) steps, a thousandth less so that no more values are reached. An even L
    has no value in the middle: the range is moved by half a step, and the input so that 0 stays about 0.
    """
    bounded = []
    for z_i, L in zip(z.unbind(-1), levels, strict=True):
        half = (L - 1) * (1 - 1e-3) / 2
        offset = (L % 2 == 0) / 2
        bounded.append(torch.tanh(z_i + math.tan(offset / half)) * half - offset)
    return torch.stack(bounded, -1)


def fsq_quantize(z, levels):
    """Rounded numbers: z (..., n) -> q (..., n) in [-1, 1], index (...) int64 in 0 .. prod(levels) - 1.

    The gradient goes straight through the rounding. index = sum_i digit_i * prod_(j < i) levels_j, digit_i in
    0 .. levels_i - 1: the first channel counts least, as in quantize(). Of an even number of levels, L, the
    values are -1, -1 + 2/L, .., 1 - 2/L: 0 is one of them, and 1 is not.
    """
    q = []
    index = 0
    unit = 1
    for bounded, L in zip(fsq_bound(z, levels).unbind(-1), levels):
        rounded = bounded.round()
        q.append((bounded + (rounded - bounded).detach()) / (L // 2))
        index = index + (rounded.long() + L // 2) * unit    # whole numbers: a sum of floats loses ids
        unit = unit * L
    return torch.stack(q, -1), index


def fsq_codes(index, levels):
    """The inverse of fsq_quantize: index (...) int64 -> q (..., n) float32, n numbers of levels."""
    digits = []
    for L in levels:
        digits.append(index % L)
        index = index // L
    return torch.stack([(digit - L // 2) / (L // 2) for digit, L in zip(digits, levels)], -1)


class FiniteScalarQuantizer(nn.Module):
    """FSQ: round each of a few numbers to one of its levels (Mentzer et al. 2023, arxiv.org/abs/2309.15505).

    No table, no loss, no parameters: levels (8, 5, 5, 5) are 1,000 codes of 4 numbers. All of them lie on a
    grid that the encoder's tanh fills, so nothing has to push it to use them. Take 5 levels or more.
    """

    def __init__(self, levels):
        super().__init__()
        self.levels = tuple(levels)
        self.n_channels = len(self.levels)
        self.vocab_size = math.prod(self.levels)

    def count(self, ids):
        return count_ids(ids, self.vocab_size)

    def quantize(self, z):
        return fsq_quantize(z, self.levels)

    def codes(self, index):
        return fsq_codes(index, self.levels)

    def forward(self, z):
        """z (B, T, n) -> q (B, T, n) float32, ids (B, T), loss 0 (), and logs: usage and perplexity."""
        with torch.autocast(z.device.type, enabled=False):
            q, ids = self.quantize(z.float())
            return q, ids, q.new_zeros(()), usage(self.count(ids))


class BinarySphericalQuantizer(nn.Module):
    """BSQ: signs of a vector of length 1 (Zhao et al. 2024, arxiv.org/abs/2406.07548).

    u = z / |z| is compared with corners q = sign(u) / sqrt(bits) of the same length, so the error of a code
    is bounded. The entropies are LFQ's with p(c | u) = softmax of 2 scale u.c. At scale 1, as published, p is
    nearly flat: the token's entropy hardly moves, and the batch's balances the codes. beta weighs the squared
    error of a code (published: 0). The gradient of q is 1 / sqrt(bits) of the decoder's, as in the released
    code (in the paper's formula it is whole). Against a squared error of weight 1, entropy is 0.1.
    """

    def __init__(self, bits, entropy=0.1, diversity=1.0, beta=0.0, scale=1.0, groups=1):
        super().__init__()
        self.n_channels = bits
        self.vocab_size = 1 << bits
        self.entropy = entropy
        self.diversity = diversity
        self.beta = beta
        self.scale = scale
        self.groups = groups

    def count(self, ids):
        return count_ids(ids, self.vocab_size)

    def quantize(self, z):
        """z (..., bits) -> q (..., bits), of length 1, index (...) int64: the lowest bit first."""
        q, index = quantize(F.normalize(z, dim=-1))
        return q / math.sqrt(self.n_channels), index

    def codes(self, index):
        return codes(index, self.n_channels) / math.sqrt(self.n_channels)

    def forward(self, z):
        """z (B, T, bits) -> q (B, T, bits) float32, ids (B, T), loss (), logs as of LookupFreeQuantizer."""
        with torch.autocast(z.device.type, enabled=False):
            u = F.normalize(z.float(), dim=-1)
            q, ids = self.quantize(u)
            commit = self.beta * (u - q.detach()).square().sum(-1).mean()
            temperature = math.sqrt(self.n_channels) / self.scale           # of corners that are -1 and +1
            per_sample, batch = entropy_penalty(u, temperature, self.groups)
            loss = commit + self.entropy * (per_sample - self.diversity * batch) / self.scale
            logs = {"commit": commit.detach(), "entropy_sample": per_sample.detach(),
                    "entropy_batch": batch.detach(), **usage(self.count(ids))}
        return q, ids, loss, logs


# ---- Extras: the head of a generator whose vocabulary is large -------------------------------------

class FactorizedHead(nn.Module):
    """p(id | h) when an id is n_sub sub-tokens: the product of their softmaxes (MAGVIT-v2, section 3.2).

    2^18 ids are two sub-tokens of 2^9, the lowest bits first, as if they were independent given h. The rows
    of proj embed the sub-tokens too ("tied"), so a generator embeds ids by head.embed, and proj cannot start
    at zero. At V = 2^18 a training step of ar_transformer.py's "small" with AdamW, 8 x 64 tokens on one CPU
    core, takes 4 s and 2.9 GB with a plain head (103M parameters), and 0.15 s and 0.2 GB (2.9M) with two
    sub-tokens. Raises ValueError if vocab_size is no whole number to the power of n_sub.
    """

    def __init__(self, n_embd, vocab_size, n_sub=2):
        super().__init__()
        self.n_sub = n_sub
        self.base = round(vocab_size ** (1 / n_sub))
        if self.base ** n_sub != vocab_size:
            raise ValueError(f"{n_sub} sub-tokens: vocab_size must be a whole number to the power of "
                             f"{n_sub}, such as {self.base ** n_sub}, not {vocab_size}")
        self.proj = nn.Linear(n_embd, n_sub * self.base, bias=False)
        self.register_buffer("unit", self.base ** torch.arange(n_sub), persistent=False)   # of each sub-token
        nn.init.normal_(self.proj.weight, std=0.02)

    def sub_tokens(self, ids):
        """ids (...) int64 -> (..., n_sub) int64, each in 0 .. base - 1."""
        return ids.unsqueeze(-1) // self.unit % self.base

    def embed(self, ids):
        """ids (...) int64 -> (..., C), the sum of the embeddings of their sub-tokens."""
        rows = self.sub_tokens(ids) + self.base * torch.arange(self.n_sub, device=ids.device)
        return F.embedding(rows, self.proj.weight).sum(-2)

    def sub_logits(self, h):
        """h (..., C) -> (..., n_sub, base) float32."""
        return self.proj(h).float().unflatten(-1, (self.n_sub, -1))

    def logits(self, h):
        """h (..., C) -> (..., V) float32, of every id: 2^18 are many."""
        low, *others = self.sub_logits(h).unbind(-2)
        for high in others:
            low = (high.unsqueeze(-1) + low.unsqueeze(-2)).flatten(-2)
        return low

    def argmax(self, h):
        """The likeliest id: h (..., C) -> (...) int64."""
        return (self.sub_logits(h).argmax(-1) * self.unit).sum(-1)

    def loss(self, h, x, smoothing=0.0):
        """Cross-entropy in nats per token, not reduced: h (..., C), x (...) int64 -> (...).

        smoothing is spread over all V ids, which is the same as over the sub-tokens, each by itself.
        """
        logits = self.sub_logits(h).flatten(0, -2)
        sub = self.sub_tokens(x)                                                      # (..., n_sub)
        loss = F.cross_entropy(logits, sub.flatten(), reduction="none", label_smoothing=smoothing)
        return loss.view(sub.shape).sum(-1)

    @torch.no_grad()
    def sample(self, h, h_uncond=None, cfg=1.0, temperature=1.0, top_k=0, top_p=1.0):
        """Draw one id per position: h (..., C) -> ids (...) int64, their log p (...) as they were drawn.

        Guidance, temperature, top_k and top_p as in ar_transformer.CategoricalHead, each sub-token by itself.
        """
        if h_uncond is not None:
            h = h_uncond + cfg * (h - h_uncond)             # proj is linear, so this mixes the logits
        logits = truncate(self.sub_logits(h) / max(temperature, 1e-5), top_k, top_p)
        sub = draw_ids(logits.softmax(-1))                                            # (..., n_sub)
        log_p = logits.log_softmax(-1).gather(-1, sub.unsqueeze(-1)).squeeze(-1)
        return (sub * self.unit).sum(-1), log_p.sum(-1)


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


# ---- Demo: which ids are used, and what happens in time --------------------------------------------

def fit_lfq(model, images, steps, batch_size=8, lr=2e-3, held_out=None):
    """Train on a fixed set of images (N, 3, H, W) or clips -> seconds, [(step, % of ids used)]."""
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
    start = time.perf_counter()
    curve = []
    for step in range(steps + 1):
        if held_out is not None and step % 15 == 0:
            in_use = model.quantizer.count(model.encode(held_out)) > 0
            curve.append((step, 100 * in_use.float().mean().item()))
        opt.param_groups[0]["lr"] = lr * min(1, (step + 1) / 30) * (1 - step / steps)
        loss, _ = model(images[torch.randint(len(images), (batch_size,), device=images.device)])
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
    return time.perf_counter() - start, curve


def psnr(x_hat, x):
    return 10 * math.log10(4 / F.mse_loss(x_hat, x))


def show_image(ax, image):
    """image (3, H, W) in [-1, 1]."""
    ax.imshow(((image.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).cpu(), interpolation="nearest")


def plot_bits(fig, cell, images, ids, x_hat, bits):
    """One row per image: the image, its ids bit by bit (white: 1), what the decoder makes of them."""
    cells = cell.subgridspec(len(images), bits + 2, width_ratios=[1.7] + [1] * bits + [1.7], wspace=0.12,
                             hspace=0.02)
    names = ["image", *[f"bit {i}" for i in range(bits)], "decoded"]
    for row, (image, id_map, decoded) in enumerate(zip(images, ids.view(-1, 8, 8), x_hat)):
        for column, name in enumerate(names):
            ax = fig.add_subplot(cells[row, column])
            ax.set(xticks=[], yticks=[])
            if 0 < column <= bits:
                ax.imshow(id_map >> (column - 1) & 1, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            else:
                show_image(ax, image if column == 0 else decoded)
            if row == 0:
                ax.set_title(name, fontsize=9)


def plot_strip(fig, cell, clip, x_hat, other, changed):
    """A clip, its reconstruction, the clip with another ending, and the tokens which that ending changed."""
    n = clip.shape[1]
    cells = cell.subgridspec(4, n, height_ratios=[1, 1, 1, 1.25], wspace=0.05, hspace=0.12)
    words = dict(fontsize=9, rotation=0, ha="right", va="center")
    rows = [("clip", clip), ("decoded", x_hat), ("another\nending", other)]
    for row, (name, frames) in enumerate(rows):
        for t in range(n):
            ax = fig.add_subplot(cells[row, t])
            ax.set(xticks=[], yticks=[])
            show_image(ax, frames[:, t])
            if row == 0:
                ax.set_title(f"frame {t}", fontsize=9)
            if t == 0:
                ax.set_ylabel(name, **words)
    step = (n - 1) // (len(changed) - 1)
    for f, changed_map in enumerate(changed):               # tokens f stand for frame 0, or for `step` frames
        ax = fig.add_subplot(cells[3, 0] if f == 0 else cells[3, 1 + (f - 1) * step:1 + f * step])
        ax.set(xticks=[], yticks=[])
        ax.imshow(changed_map, cmap="Reds", vmin=0, vmax=1.5, interpolation="nearest")
        ax.set_xlabel(f"{int(changed_map.sum())} of {changed_map.numel()}", fontsize=9)
        if f == 0:
            ax.set_ylabel("tokens\nchanged", **words)


def compare_entropies(cells, size, images, held_out, steps):
    """Train with none, one and both of the entropies, and plot the ids in use -> the last model."""
    curves, ranks = cells.subgridspec(2, 1, hspace=0.38).subplots()
    arms = {"no entropy": (dict(entropy=0), "tab:red"),
            "certain of each token": (dict(diversity=0), "tab:orange"),
            "... and undecided over all": (dict(), "tab:blue")}
    for name, (options, colour) in arms.items():
        torch.manual_seed(0)
        model = LFQ(**size, **options).to(images.device)
        seconds, curve = fit_lfq(model, images, steps, held_out=held_out[:64])
        ids = model.eval().encode(held_out)                                           # (128, 64)
        p = model.quantizer.count(ids) / ids.numel()                                  # (V,)
        with torch.no_grad():
            per_sample, batch = entropy_penalty(model.latents(held_out), model.quantizer.temperature)
        print(f"{name:26s} {100 * (p > 0).float().mean():5.1f}% of {model.vocab_size} ids in use, perplexity "
              f"{math.exp(-torch.xlogy(p, p).sum()):5.1f}   entropy in bits: {per_sample / math.log(2):4.2f} "
              f"per token, {batch / math.log(2):4.2f} over all   "
              f"PSNR {psnr(model.decode(ids), held_out):4.1f} dB   {seconds:.0f} s")
        curves.plot(*zip(*curve), color=colour, label=name)
        ranks.plot(100 * p.sort(descending=True).values.cpu(), color=colour)
    curves.set(title=f"% of the {model.vocab_size} ids in use", xlabel="training step", ylim=(0, 102))
    curves.legend(fontsize=9)
    ranks.set(title="how often each id occurs, %", xlabel="ids, the most frequent first", yscale="log",
              ylim=(5e-3, 100))
    return model


def train_on_clips(image_lfq, size, images, clips, held_out, steps):
    """Inflate an image tokenizer and train it on clips (N, 3, 9, 32, 32) -> the video tokenizer."""
    video = LFQ(**size, frames=9).to(clips.device).inflate(image_lfq.state_dict())
    same = (video.encode(images) == image_lfq.encode(images)).float().mean()
    before = psnr(video.decode(video.encode(held_out)), held_out)
    seconds, _ = fit_lfq(video, clips, steps, batch_size=2)
    after = psnr(video.eval().decode(video.encode(held_out)), held_out)
    print(f"inflated, {video.seq_len} tokens per clip of 9 frames: {100 * same:.0f}% of the images' ids are "
          f"as before; PSNR of clips {before:.1f} dB, after {steps} steps {after:.1f} dB   {seconds:.0f} s")
    return video


def main():
    parser = argparse.ArgumentParser(description="Which ids are used, and what happens in time?")
    parser.add_argument("--steps", type=int, default=150, help="training steps of each image tokenizer")
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
    left, right = fig.add_gridspec(1, 2, width_ratios=[1, 2.6], left=0.05, right=0.99, top=0.86, bottom=0.07,
                                   wspace=0.2)
    top, bottom = right.subgridspec(2, 1, height_ratios=[1, 2.1], hspace=0.2)
    images = data.draw(torch.arange(2000, device=device))[0]
    image_lfq = compare_entropies(left, size, images, held_out, args.steps)
    ids = image_lfq.encode(held_out)
    plot_bits(fig, top, held_out[:2], ids[:2].cpu(), image_lfq.decode(ids[:2]), image_lfq.bits)

    clips = data.draw_clips(torch.arange(400, device=device), frames=9)[0]            # (N, 3, 9, 32, 32)
    held_out_clips = data.draw_clips(torch.arange(16, device=device) + data.VAL_INDEX, frames=9)[0]
    video = train_on_clips(image_lfq, size, held_out, clips, held_out_clips, args.clip_steps)
    clip = held_out_clips[14:15]                            # "moves right"
    n = 5                                                   # frames 5 to 8 become another clip's
    other = torch.cat([clip[:, :, :n], held_out_clips[7:8, :, n:]], dim=2)
    with torch.no_grad():
        z = video.latents(clip)
        z_other = video.latents(other)
    changed = (quantize(z)[1] != quantize(z_other)[1]).view(video.grid).cpu()         # (f, h, w)
    moved = (z - z_other).abs().amax(-1).view(video.grid).amax((1, 2))
    print("another ending from frame 5 on moves z by at most "
          + ", ".join(f"{v:.2g}" for v in moved) + " in the 3 frames of tokens")
    x_hat = video.decode(video.encode(clip))
    plot_strip(fig, bottom, clip[0], x_hat[0], other[0], changed.float())
    fig.suptitle(f"lfq.py: a token is {video.bits} signs; entropy over all tokens brings the "
                 f"{video.vocab_size} ids into use\ninflated to clips (below) it looks back only: a new "
                 "ending leaves the earlier tokens alone", fontsize=12)
    fig.savefig("lfq.png", dpi=80)
    print("wrote lfq.png")


if __name__ == "__main__":
    main()
