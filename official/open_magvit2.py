"""
The authors' weights of Open-MAGVIT2 (Luo et al. 2024, arxiv.org/abs/2409.04410): tokenizers and transformer.

    from official import open_magvit2
    tokenizer = open_magvit2.load_tokenizer("imagenet_256_L.ckpt")    # lfq.LFQ, of images or of clips
    model = open_magvit2.load_gpt("AR_256_L.ckpt")                    # ARTransformer with a SubTokenHead
    images = tokenizer.decode(model.sample(torch.tensor([207]), cfg=(1.75, 1.85), temperature=(1.1, 1.0)))

Each takes a path or a state dict, returns the model in eval mode and refuses unknown or missing keys by name
(ValueError). The transformer is LlamaGen's with another head, so the helpers are official/llamagen.py's.
"""
import math

import torch
import torch.nn as nn

import ar_transformer
from lfq import LFQ
from official.files import fit_keys
from official.llamagen import as_released, fill, gpt_weights, heads_of, numbered, official_name, weights_in


# ---- The tokenizers ----------------------------------------------------------------------------------

def load_tokenizer(x, image_size=None, frames=None):
    """Open-MAGVIT2's image or video tokenizer, a path or a state dict -> LFQ in eval mode.

    The sizes are read off the shapes, except image_size in pixels (a multiple of the stride; None: 256, or
    128 for video) and the frames of a clip (None: 17). Averaged (EMA) weights are taken where there are any.
    The video weights were trained with normalisation over whole clips, so the first frame's ids depend on the
    other frames here.
    """
    sd = weights_in(x, "state_dict")
    sd = {k: v for k, v in sd.items() if not k.startswith(("loss.", "quantize."))}    # GAN, constants
    sd = averaged(sd)
    sd = {k.replace(".conv_1.", "."): v.float() for k, v in sd.items()}           # video names = image names
    levels = numbered(sd, "encoder.down.")
    n_res = numbered(sd, "encoder.down.0.block.")
    widths = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(levels)]
    ups = [f"decoder.up.{i}.upsample.conv1.weight" for i in range(1, levels)]
    for key in ("encoder.conv_in.weight", "encoder.conv_out.weight", *widths, *ups):
        if key not in sd:
            raise ValueError(f"not an Open-MAGVIT2 tokenizer: the key {key} is missing")
    ch, channels = sd["encoder.conv_in.weight"].shape[:2]
    video = sd["encoder.conv_in.weight"].ndim == 5
    model = LFQ(image_size or (128 if video else 256), frames or (17 if video else 1),
                bits=len(sd["encoder.conv_out.weight"]), ch=ch,
                ch_mult=tuple(len(sd[k]) // ch for k in widths), n_res=n_res,
                time=tuple(len(sd[k]) // sd[k].shape[1] // 4 for k in ups), groups=32,
                per_frame=not video, channels=channels)
    names = {}                                              # theirs: ours
    for key in model.state_dict():
        part, number, rest = key.split(".", 2)
        layers = [i for i, layer in enumerate(getattr(model, part)) if list(layer.parameters())]
        theirs = tokenizer_names(levels, n_res, part == "decoder")[layers.index(int(number))]
        names[f"{part}.{theirs}.{rest}"] = key
    ours = fit_keys(sd, names, "the tokenizer's weights")
    shapes = model.state_dict()                             # kernels of images are 2-D in their files
    model.load_state_dict({k: v.view_as(shapes[k]) for k, v in ours.items()})
    return model.eval()


def averaged(sd):
    """The averaged weights under "model_ema.", whose keys have lost their dots, where there are any."""
    plain = {k: v for k, v in sd.items() if not k.startswith("model_ema.")}
    if not any(k.startswith("model_ema.encoder") for k in sd):
        return plain
    names = {k: "model_ema." + k.replace(".", "") for k in plain}
    if lost := [v for v in names.values() if v not in sd]:
        raise ValueError(f"the averaged weights are incomplete: the key {lost[0]} is missing")
    return {k: sd[v] for k, v in names.items()}


def tokenizer_names(levels, n_res, decoder=False):
    """Open-MAGVIT2's names of the layers that hold weights, in the order of our Sequential."""
    mid = [f"mid_block.{j}" for j in range(n_res)]
    side, change, last = ("up", "upsample.conv1", 0) if decoder else ("down", "downsample", levels - 1)
    names = []
    for level in reversed(range(levels)) if decoder else range(levels):
        if decoder:
            names.append(f"adaptive.{level}")
        names += [f"{side}.{level}.block.{j}" for j in range(n_res)]
        if level != last:
            names.append(f"{side}.{level}.{change}")
    return ["conv_in"] + (mid + names if decoder else names + mid) + ["norm_out", "conv_out"]


# ---- The transformer, and its head -------------------------------------------------------------------

class SubTokenHead(nn.Module):
    """p(id | h) = p(s_1 | h) p(s_2 | h, s_1): an id is cut into sub-tokens of `bits` bits, drawn in turn.

    The lowest bits come first. For every token a small causal transformer goes over the rows [h, embedding of
    s_1]; row i predicts s_i. This is the paper's "next sub-token prediction": 2^18 ids as 2^6 x 2^12, with 2,
    3, 4 of these layers on the blocks of gpt-l, gpt-xl, gpt-xxl. The sub-tokens of lfq.FactorizedHead do not
    see each other. These do, so every distribution over the ids is within reach, at 0.23 s and 0.3 GB where
    those take 0.15 s and 0.2 GB. ValueError unless two or more sub-tokens make vocab_size ids.
    """

    def __init__(self, n_embd, vocab_size, bits=(6, 12), n_layer=1, n_head=4, multiple_of=64):
        super().__init__()
        if len(bits) < 2 or min(bits) < 1 or 1 << sum(bits) != vocab_size:
            raise ValueError(f"bits {tuple(bits)}: two or more numbers of bits that make {vocab_size} ids")
        self.bits = tuple(bits)
        self.embeds = nn.ModuleList([nn.Embedding(1 << n, n_embd) for n in bits])
        self.blocks = nn.ModuleList([ar_transformer.Block(n_embd, n_head, multiple_of=multiple_of)
                                     for _ in range(n_layer)])
        self.norm = ar_transformer.RMSNorm(n_embd)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        # These come after the others' initialisation, because they start at zero.
        self.heads = nn.ModuleList([ar_transformer.CategoricalHead(n_embd, 1 << n) for n in bits])
        rope = ar_transformer.rope_table((len(bits) - 1,), n_embd // n_head, 1)
        rope[0] = 0                                         # the row of h: see llamagen.as_released
        self.register_buffer("rope", rope, persistent=False)

    def sub_tokens(self, ids):
        """ids (...) int64 -> list of (...), one for each run of bits."""
        return [ids >> sum(self.bits[:i]) & (1 << n) - 1 for i, n in enumerate(self.bits)]

    def embed(self, ids):
        """ids (...) int64 -> (..., C), what ARTransformer reads."""
        return sum(table(s) for table, s in zip(self.embeds, self.sub_tokens(ids)))

    def rows(self, h, subs):
        """h (..., C), the first n sub-tokens, each (...) -> (..., n + 1, C): row i predicts sub-token i."""
        x = torch.stack([h, *(table(s) for table, s in zip(self.embeds, subs))], -2)
        y = x.flatten(0, -3)                                                          # (N, n + 1, C)
        for block in self.blocks:
            y = block(y, self.rope[:y.shape[1]])
        return self.norm(y).view(x.shape)

    def loss(self, h, x, smoothing=0.0):
        """Sum of the sub-tokens' cross-entropies in nats per token: h (..., C), x (...) int64 -> (...)."""
        subs = self.sub_tokens(x)
        rows = self.rows(h, subs[:-1]).unbind(-2)
        return sum(head.loss(row, s, smoothing) for head, row, s in zip(self.heads, rows, subs))

    @torch.no_grad()
    def sample(self, h, h_uncond=None, cfg=1.0, temperature=1.0, top_k=0, top_p=1.0):
        """Draw one id per position: h (..., C) -> ids (...) int64, log p (...), sub-token by sub-token.

        As CategoricalHead draws. cfg and temperature may be tuples, one number for each sub-token: the
        authors take (1.75, 1.85) and (1.1, 1.0) or so. No cache: to run the first of two rows twice is cheap.
        """
        n = len(self.bits)
        scales = cfg if isinstance(cfg, tuple) else (cfg,) * n
        temperatures = temperature if isinstance(temperature, tuple) else (temperature,) * n
        both = h if h_uncond is None else torch.stack([h, h_uncond])
        subs = []
        log_p = 0
        for i, head in enumerate(self.heads):
            row = self.rows(both, [s.expand(both.shape[:-1]) for s in subs])[..., -1, :]
            row, row_uncond = (row, None) if h_uncond is None else row
            sub, p = head.sample(row, row_uncond, scales[i], temperatures[i], top_k, top_p)
            subs.append(sub)
            log_p = log_p + p
        return sum(s << sum(self.bits[:i]) for i, s in enumerate(subs)), log_p


NAMES = (                                                   # parts of a name, ours and theirs
    ("cls_embed", "class_emb.embedding_table"), ("blocks.", "spatial_blocks."),
    ("head.spatial", "factorized"), ("norm1", "attention_norm"), ("norm2", "ffn_norm"),
    (".attn.", ".attention."), (".mlp.", ".feed_forward."), ("head.embeds.0", "pre_emb"),
    ("head.embeds.1", "post_emb"), ("head.norm", "norm"), ("heads.", ""), (".proj", ""),
)


def load_gpt(x, n_head=None, grid=(16, 16)):
    """Open-MAGVIT2's GPT, a path or a state dict -> ARTransformer with a SubTokenHead, in eval mode.

    Their files hold the tokenizer too: "transformer." is read. Their "pre" is the low bits of our ids, "post"
    the high ones. The sizes are read off the shapes. These do not tell n_head (None: that of n_embd in
    ar_transformer.SIZES) and grid, (16, 16) for 256 pixels.
    """
    sd = gpt_weights(x)
    sd = {k.removeprefix("transformer."): v for k, v in sd.items() if k.startswith("transformer.")} or sd
    first, second, classes = "pre_emb.weight", "post_emb.weight", "class_emb.embedding_table.weight"
    mlp = "spatial_blocks.0.feed_forward.w1.weight"
    if lost := [key for key in (first, second, classes, mlp) if key not in sd]:
        raise ValueError(f"not the weights of Open-MAGVIT2's GPT: missing {lost}; the keys begin with "
                         f"{list(sd)[:3]}")
    n_low, C = sd[first].shape
    n_high = len(sd[second])
    size = dict(n_head=heads_of(C, n_head), multiple_of=len(sd[mlp]))
    bits = n_low.bit_length() - 1, n_high.bit_length() - 1
    head = SubTokenHead(C, n_low * n_high, bits, numbered(sd, "factorized_blocks."), **size)
    model = ar_transformer.ARTransformer(
        head, math.prod(grid), len(sd[classes]) - 1, vocab_size=n_low * n_high, grid=grid,
        n_layer=numbered(sd, "spatial_blocks."), n_embd=C, **size)
    model.norm = nn.Identity()                              # the head's blocks go on from here
    names = {official_name(key, NAMES): key for key in model.state_dict()}
    fill(model, fit_keys(sd, names, "Open-MAGVIT2's GPT's weights"), "Open-MAGVIT2's GPT")
    return as_released(model)
