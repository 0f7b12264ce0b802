"""
The authors' weights of VAR (Tian et al. 2024, arxiv.org/abs/2404.02905; FoundationVision/VAR).

    tokenizer = load_vqvae("vae_ch160v4096z32.pth")             # var.MSVQ; image_size=512 for d36-s
    model = load_var("var_d16.pth", tokenizer)                  # var.VAR: d16, d20, d24, d30, d36-s
    images = tokenizer.decode(model.sample(torch.tensor([207]), cfg=2.5, top_k=900, top_p=0.96))

Each takes a path or a state dict, reads the sizes off the shapes, returns the model in eval mode and raises
ValueError for unknown or missing keys, by name. Their cfg is ours less 1. What only this release needs is
here: a head with a bias, one AdaLN layer for all blocks (d36-s), and attention without unit lengths, which
their code has and no published file.
"""
import re

import torch
import torch.nn as nn

from official.files import fit_keys, load_weights
from var import MSVQ, VAR, VARBlock, CategoricalHead, MultiScaleQuantizer

SCALES = {256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),           # of images of so many pixels a side
          512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}
BUFFERS = ("quantize.ema_vocab_hit_SV", "lvl_1L", "attn_bias_for_masking", "zero_k_bias")       # not weights

# ---- The tokenizer ---------------------------------------------------------------------------------


def load_vqvae(x, image_size=256, scales=None, groups=32):
    """vae_ch160v4096z32.pth -> var.MSVQ in eval mode.

    The scales are not to be read off the shapes: image_size 256 or 512 says which the authors have, or give
    scales.
    """
    if scales is None and image_size not in SCALES:
        raise ValueError(f"image_size {image_size}: the authors have {', '.join(map(str, SCALES))} pixels; "
                         "for others give scales=")
    scales = scales or SCALES[image_size]
    state = load_weights(x)
    sd = {key: value.float() for key, value in state.items() if not key.endswith(BUFFERS)}
    levels = count(sd, "encoder.down.")
    widths = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(levels)]
    for key in ("encoder.conv_in.weight", "quantize.embedding.weight", *widths):
        if key not in sd:
            raise ValueError(f"not a tokenizer of VAR: the key {key} is missing")
    n_res = count(sd, "encoder.down.0.block.")
    ch = len(sd["encoder.conv_in.weight"])
    vocab_size, code_dim = sd["quantize.embedding.weight"].shape
    model = MSVQ(scales[-1] << (levels - 1), vocab_size, code_dim, scales, ema=0.0, n_phi=len(phi_keys(sd)),
                 ch=ch, ch_mult=tuple(len(sd[key]) // ch for key in widths), n_res=n_res, groups=groups)
    for key in [key for key in sd if ".qkv." in key]:       # theirs is one convolution, ours are three
        for name, part in zip("qkv", sd.pop(key).chunk(3)):
            sd[key.replace(".qkv.", f".{name}.")] = part
    names = {}                                              # theirs: ours
    for key in model.state_dict():
        part, _, rest = key.partition(".")
        if part in ("encoder", "decoder"):
            layers = [i for i, layer in enumerate(getattr(model, part)) if list(layer.parameters())]
            i, _, rest = rest.partition(".")
            theirs = layer_names(levels, n_res + (part == "decoder"), part == "decoder")
            names[f"{part}.{theirs[layers.index(int(i))]}.{rest}"] = key
        elif part != "quantizer":
            names[key] = key
    names |= {f"quantize.{key}": f"quantizer.{ours}" for key, ours in quantizer_names(sd).items()}
    model.load_state_dict(fit_keys(sd, names, "the tokenizer's weights"))
    return model.eval()


def count(sd, start):
    """How many layers are numbered after `start`, such as "encoder.down."."""
    return len({key[len(start):].split(".")[0] for key in sd if key.startswith(start)})


def phi_keys(sd):
    """The keys of the weights of phi, in their order: one for all scales, four, or one for each scale."""
    keys = [key for key in sd if re.search(r"quant_resi\.(qresi_ls\.\d+\.|qresi\.|\d+\.)weight$", key)]
    return sorted(keys, key=lambda key: int((re.findall(r"\.(\d+)\.", key) or ["0"])[-1]))


def quantizer_names(sd):
    """Keys of their quantiser, after "quantize." if that is there -> keys of ours."""
    names = {"embedding.weight": "codebook"}
    for i, key in enumerate(phi_keys(sd)):
        key = key[key.index("quant_resi"):].removesuffix("weight")
        names |= {f"{key}{name}": f"phi.{i}.{name}" for name in ("weight", "bias")}
    return names


def load_quantizer(sd, scales, **options):
    """The weights of their quantiser alone -> MultiScaleQuantizer. options: ratio, beta, cosine."""
    quantizer = MultiScaleQuantizer(*sd["embedding.weight"].shape, scales, n_phi=len(phi_keys(sd)), **options)
    quantizer.load_state_dict(fit_keys(sd, quantizer_names(sd), "the quantiser's weights"))
    return quantizer


def layer_names(levels, n_res, decoder=False):
    """Their names of the layers that hold weights, in the order of our Sequential."""
    mid = ["mid.block_1", "mid.attn_1", "mid.block_2"]
    names = []
    for i in reversed(range(levels)) if decoder else range(levels):
        place = f"{'up' if decoder else 'down'}.{i}"
        for j in range(n_res):
            names.append(f"{place}.block.{j}")
            if i == levels - 1:                             # the lowest resolution has attention
                names.append(f"{place}.attn.{j}")
        if i > 0 if decoder else i < levels - 1:
            names.append(f"{place}.{'upsample' if decoder else 'downsample'}")
    return ["conv_in"] + (mid + names if decoder else names + mid) + ["norm_out", "conv_out"]


# ---- The transformer -------------------------------------------------------------------------------

class PlainBlock(VARBlock):
    """Queries and keys of any length: q k^T times 0.25 / sqrt(d), and not 1 / sqrt(d)."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        del self.log_scale

    def directions(self, q, k):
        return 0.25 * q, k


class SharedVAR(VAR):
    """One AdaLN layer for all blocks, and a table for each: d36-s."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        C = self.tok_embed.out_features
        self.modulate = nn.Linear(C, 6 * C)
        self.tables = nn.ParameterList(nn.Parameter(torch.zeros(6, C)) for _ in self.blocks)

    def modulations(self, c):
        shared = self.modulate(nn.functional.silu(c)).unflatten(1, (6, -1))           # (B, 6, C)
        return [shared + table for table in self.tables]


def plain_model(quantizer, depth, n_embd=None, n_head=None, num_classes=1000, shared=False, unit=True):
    """Their model with fresh weights. The published ones have n_embd 64 depth and n_head depth."""
    n_embd = n_embd or 64 * depth
    n_head = n_head or depth
    head = CategoricalHead(n_embd, quantizer.vocab_size)
    head.proj = nn.Linear(n_embd, quantizer.vocab_size)     # with a bias
    sizes = dict(n_layer=depth, n_head=n_head, n_embd=n_embd)
    model = (SharedVAR if shared else VAR)(head, quantizer, num_classes, **sizes)
    if not unit:
        model.blocks = nn.ModuleList(PlainBlock(n_embd, n_head) for _ in range(depth))
    return model


NAMES = (("attn.scale_mul_1H11", "log_scale"), ("attn.q_bias", "q_bias"), ("attn.v_bias", "v_bias"),
         ("attn.mat_qkv", "wqkv"), ("attn.proj", "wo"), ("ffn.", ""))             # in blocks: theirs, ours
OUTSIDE = {"pos_1LC": "pos_embed", "pos_start": "pos_start", "word_embed": "tok_embed",
           "class_emb": "cls_embed", "lvl_embed": "scale_embed", "head_nm.ada_lin.1": "modulate_last",
           "head": "head.proj", "shared_ada_lin.1": "modulate"}


def load_var(x, tokenizer, n_head=None):
    """var_d16.pth ... var_d36.pth -> VAR in eval mode, head included. tokenizer: of load_vqvae().

    n_head: None where the file tells it, as all published ones do. Labels are in torchvision's order of
    ImageNet.
    """
    state = load_weights(x)
    state = state.get("trainer", state)                     # of their training program
    state = state.get("var_wo_ddp", state)
    sd = {key: value.float() for key, value in state.items() if not key.endswith(BUFFERS)}
    needed = ("word_embed.weight", "class_emb.weight", "blocks.0.attn.proj.weight", "head.weight")
    lost = [key for key in needed if key not in sd]
    if lost:
        raise ValueError(f"not the weights of a VAR: missing {lost}; the keys begin with {list(sd)[:3]}")
    unit = "blocks.0.attn.scale_mul_1H11" in sd
    C, D = sd["word_embed.weight"].shape
    V = len(sd["head.weight"])
    if (V, D) != tuple(tokenizer.quantizer.codebook.shape):
        raise ValueError(f"this VAR writes ids of {V} codes of {D} numbers, the tokenizer has "
                         f"{tuple(tokenizer.quantizer.codebook.shape)}")
    if unit:
        n_head = sd["blocks.0.attn.scale_mul_1H11"].numel()
    model = plain_model(tokenizer.quantizer, count(sd, "blocks."), C, n_head or C // 64,
                        len(sd["class_emb.weight"]) - 1, "shared_ada_lin.1.weight" in sd, unit)
    names = {key: names_of(key) for key in sd}              # theirs: ours
    ours = model.state_dict()
    missing = [key for key in ours if key not in names.values() and not key.startswith("quantizer.")]
    unknown = [key for key, name in names.items() if name not in ours]
    if missing or unknown:
        raise ValueError(f"VAR's weights do not fit: missing {missing[:3]} (in our names), unknown "
                         f"{unknown[:3]}")
    for key, name in names.items():
        if sd[key].numel() != ours[name].numel():
            raise ValueError(f"VAR's weights do not fit: {key} has shape {tuple(sd[key].shape)}, and "
                             f"{tuple(ours[name].shape)} is needed; do the scales of the tokenizer fit?")
    model.load_state_dict({name: sd[key].view_as(ours[name]) for key, name in names.items()}, strict=False)
    return model.eval()


def names_of(key):
    """Their key -> ours."""
    found = re.match(r"blocks\.(\d+)\.(.*)", key)
    if found is None:
        start, _, last = key.rpartition(".")
        return OUTSIDE[key] if key in OUTSIDE else f"{OUTSIDE.get(start, start)}.{last}"
    i, rest = found.groups()
    if rest == "ada_gss":
        return f"tables.{i}"
    if rest.startswith("ada_lin.1."):
        return f"modulate.{i}.{rest.removeprefix('ada_lin.1.')}"
    for theirs, ours in NAMES:
        rest = rest.replace(theirs, ours)
    return f"blocks.{i}.{rest}"
