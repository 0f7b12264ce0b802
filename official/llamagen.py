"""
The authors' weights of LlamaGen (Sun et al. 2024, arxiv.org/abs/2406.06525), and its way to Hugging Face.

    from official import llamagen
    tokenizer = llamagen.load_vq("vq_ds16_c2i.pt")          # vq.VQ; or vq_ds8
    model = llamagen.load_gpt("c2i_B_256.pt")               # ARTransformer; or t2i, which reads captions
    images = tokenizer.decode(model.sample(torch.tensor([207]), cfg=4.0))

    python -m official.llamagen export FILE OUT             # FILE: c2i_B_256.pt, or a run folder of train.py

Each takes a path or a state dict, returns the model in eval mode and refuses unknown or missing keys by name
(ValueError). export writes a folder that transformers' from_pretrained(OUT) reads: docs/weights.md.
"""
import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import ar_transformer
from official.files import fit_keys, load_weights
from vq import VQ


def weights_in(x, *names):
    """A path or a state dict -> the weights, from under the first of `names` that is there."""
    sd = load_weights(x)
    return next((sd[name] for name in names if name in sd), sd)


def numbered(sd, start):
    """How many layers are numbered after `start`, such as "layers."."""
    return len({key[len(start):].split(".")[0] for key in sd if key.startswith(start)})


# ---- The tokenizer -----------------------------------------------------------------------------------

def load_vq(x, image_size=None, l2_norm=True):
    """LlamaGen's vq_ds16 or vq_ds8, a path or a state dict -> VQ in eval mode.

    The sizes are read off the shapes. image_size: side of the images in pixels, any multiple of the stride
    (256, 384, 512 in the paper; 256 unless said). l2_norm: as published. The shapes tell neither.
    """
    sd = weights_in(x, "ema", "model", "state_dict")
    sd = {k: v.float() for k, v in sd.items() if k != "quantize.codebook_used"}       # a queue of their meter
    levels = numbered(sd, "encoder.conv_blocks.")
    n_res = numbered(sd, "encoder.conv_blocks.0.res.")
    widths = [f"encoder.conv_blocks.{i}.res.0.conv1.weight" for i in range(levels)]
    for key in ("encoder.conv_in.weight", "quant_conv.weight", "quantize.embedding.weight", *widths):
        if key not in sd:
            raise ValueError(f"not a LlamaGen tokenizer: the key {key} is missing")
    ch, channels = sd["encoder.conv_in.weight"].shape[:2]
    vocab_size, code_dim = sd["quantize.embedding.weight"].shape
    model = VQ(image_size or 256, vocab_size, code_dim, l2_norm, ch=ch,
               ch_mult=tuple(len(sd[k]) // ch for k in widths), n_res=n_res,
               z_channels=sd["quant_conv.weight"].shape[1], groups=32, channels=channels)
    parts = {"encoder": vq_names(levels, n_res), "decoder": vq_names(levels, n_res + 1, decoder=True)}
    names = {}                                              # theirs: ours
    for key in model.state_dict():
        part, _, rest = key.partition(".")
        theirs = key
        if part in parts:
            layers = [i for i, layer in enumerate(getattr(model, part)) if list(layer.parameters())]
            number, _, rest = rest.partition(".")
            theirs = f"{part}.{parts[part][layers.index(int(number))]}.{rest}"
        if part == "quantizer":
            theirs = "quantize.embedding.weight"
        names[theirs] = key
    model.load_state_dict(fit_keys(sd, names, "the tokenizer's weights"))
    return model.eval()


def vq_names(levels, n_res, decoder=False):
    """LlamaGen's names of the layers that hold weights, in the order of our Sequential.

    Their level 0 comes first in both, so in the decoder it is the lowest.
    """
    mid = ["mid.0", "mid.1", "mid.2"]
    lowest = 0 if decoder else levels - 1
    names = []
    for level in range(levels):
        for j in range(n_res):
            names.append(f"conv_blocks.{level}.res.{j}")
            if level == lowest:
                names.append(f"conv_blocks.{level}.attn.{j}")
        if level < levels - 1:
            names.append(f"conv_blocks.{level}.{'upsample' if decoder else 'downsample'}")
    return ["conv_in"] + (mid + names if decoder else names + mid) + ["norm_out", "conv_out"]


# ---- The transformer ---------------------------------------------------------------------------------

NAMES = (                                                   # parts of a name, ours and theirs
    ("tok_embed", "tok_embeddings"), ("cls_embed", "cls_embedding.embedding_table"),
    ("caption.none", "cls_embedding.uncond_embedding"), ("caption.", "cls_embedding.cap_proj."),
    ("blocks.", "layers."), ("norm1", "attention_norm"), ("norm2", "ffn_norm"), (".attn.", ".attention."),
    (".mlp.", ".feed_forward."), ("head.proj", "output"),
)


def official_name(key, names=NAMES):
    """Our name of a weight -> the authors'."""
    for ours, theirs in names:
        key = key.replace(ours, theirs)
    return key


def load_gpt(x, n_head=None, grid=(16, 16), rope_base=10000.0, norm_eps=1e-5, n_kv_head=None):
    """LlamaGen's class- or text-conditional GPT, a path or a state dict -> ARTransformer in eval mode.

    Reads "ema", else "model" (their DDP files), else a plain dict (FSDP). The sizes are read off the shapes.
    These do not tell n_head (None: that of n_embd in ar_transformer.SIZES), grid, (16, 16) for 256 pixels and
    (24, 24) for 384, rope_base and norm_eps. n_kv_head: heads of keys and of values, where several heads of
    queries share one. None: read off the shapes. Labels are in torchvision's order of ImageNet. Captions are
    FLAN-T5-XL's features (B, 120, 2048). ValueError also where shapes contradict what is said.
    """
    sd = gpt_weights(x)
    classes, captions = "cls_embedding.embedding_table.weight", "cls_embedding.uncond_embedding"
    condition = captions if captions in sd else classes
    need = ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight", condition)
    if lost := [key for key in need if key not in sd]:
        raise ValueError(f"not the weights of a LlamaGen GPT: missing {lost}; the keys begin with "
                         f"{list(sd)[:3]}")
    V, C = sd["tok_embeddings.weight"].shape
    n_head = heads_of(C, n_head)
    text = tuple(sd[captions].shape) if condition == captions else None
    model = ar_transformer.ARTransformer(
        ar_transformer.CategoricalHead(C, V), math.prod(grid), 1 if text else len(sd[classes]) - 1,
        vocab_size=V, grid=grid, n_layer=numbered(sd, "layers."), n_head=n_head, n_embd=C, text=text,
        rope_base=rope_base, multiple_of=len(sd["layers.0.feed_forward.w1.weight"]))
    names = {official_name(key): key for key in model.state_dict()}
    ours = fit_keys(sd, names, "LlamaGen's GPT's weights")
    for i in range(len(model.blocks)):
        name = f"blocks.{i}.attn.wqkv.weight"
        ours[name] = one_head_each(ours[name], n_head, n_kv_head)
    fill(model, ours, "LlamaGen's GPT")
    return as_released(model, norm_eps)


def gpt_weights(x):
    """A path or a state dict -> the weights of a GPT, without the prefixes that DDP and torch.compile add."""
    sd = weights_in(x, "ema", "model", "module", "state_dict")
    return {k.removeprefix("module.").removeprefix("_orig_mod."): v.float() for k, v in sd.items()}


def fill(model, ours, what):
    """Load {our name: tensor} of all names. ValueError where a shape contradicts the other shapes."""
    for key, value in model.state_dict().items():
        if ours[key].shape != value.shape:
            raise ValueError(f"the weights of {what} contradict each other: {key} is "
                             f"{tuple(ours[key].shape)} where {tuple(value.shape)} is wanted")
    model.load_state_dict(ours)


def heads_of(n_embd, n_head=None):
    """n_head if it is given, else that of the published size: the shapes of the weights do not tell."""
    if n_head is None:
        n_head = next((s["n_head"] for s in ar_transformer.SIZES.values() if s["n_embd"] == n_embd), None)
    if n_head is None:
        raise ValueError(f"n_embd {n_embd} is none of the published sizes: say n_head=")
    return n_head


def one_head_each(wqkv, n_head, n_kv_head=None):
    """wqkv (rows, C) of n_head heads of queries and n_kv_head of keys and of values -> (3C, C).

    The heads of keys and values are repeated, one for each head of queries, as their code does.
    """
    rows, C = wqkv.shape
    d = C // n_head
    found, rest = divmod(rows - C, 2 * d)                   # heads of keys that the shape has room for
    if rest or found < 1 or n_head % found or n_kv_head not in (None, found):
        raise ValueError(f"n_head {n_head}, n_kv_head {n_kv_head or 'not given'} do not fit wqkv of "
                         f"{rows} x {C}: a head has {d} rows, so {(rows - C) / 2 / d:g} heads are for keys")
    if found == n_head:
        return wqkv
    q, k, v = wqkv.split([C, found * d, found * d])
    k, v = (part.view(found, d, C).repeat_interleave(n_head // found, 0).flatten(0, 1) for part in (k, v))
    return torch.cat([q, k, v])


def as_released(model, norm_eps=1e-5):
    """What their code does unlike ar_transformer.py -> the model in eval mode.

    Their table of angles holds cos = sin = 0 for the prefix. So the keys of the prefix vanish, every score
    with them is 0, and only their values count.
    """
    model.rope[:model.n_prefix] = 0
    for module in model.modules():
        if isinstance(module, ar_transformer.RMSNorm):
            module.eps = norm_eps
    return model.eval()


# ---- Export: the same network as a Hugging Face LlamaForCausalLM, for other people's fast servers ----

MODELING = '''"""LlamaGen for transformers: Llama with a table of angles. Written by official/llamagen.py."""
import torch
from torch import nn
from transformers import LlamaForCausalLM


class RotaryTable(nn.Module):
    def __init__(self, config):
        super().__init__()
        shape = config.max_position_embeddings, config.head_dim
        self.register_buffer("cos", torch.ones(shape))      # the values lie in model.safetensors
        self.register_buffer("sin", torch.zeros(shape))

    def forward(self, x, position_ids):                     # (B, S) -> cos, sin (B, S, head_dim)
        return self.cos[position_ids].to(x.dtype), self.sin[position_ids].to(x.dtype)


class LlamaGenForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.rotary_emb = RotaryTable(config)
'''


def to_llama(model):
    """A model of ids and classes -> config, generation config, weights of LlamaForCausalLM with equal logits.

    Class c becomes the id V + c in front of the tokens, "no class" the id V + num_classes. Their logits are 0
    and must be banned, as the generation config does. One axis of positions is stock Llama. A grid, or
    as_released() weights, need MODELING, which looks the angles up. "architectures" names it, since stock
    Llama would read such a folder with wrong angles.
    """
    embedded = isinstance(getattr(model, "tok_embed", None), nn.Embedding)
    if not embedded or not hasattr(model, "cls_embed") or model.pos_embed is not None:
        raise ValueError("Llama can hold a model of ids (in one softmax) and classes without learned "
                         "positions, not this one")
    V, classes = model.vocab_size, model.num_classes + 1
    width = len(model.blocks[0].mlp.w1.weight)
    C = model.tok_embed.embedding_dim
    d = C // model.n_head
    no_ids = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=V + classes, hidden_size=C,
        intermediate_size=width, num_hidden_layers=len(model.blocks), num_attention_heads=model.n_head,
        num_key_value_heads=model.n_head, head_dim=d, rms_norm_eps=model.norm.eps, rope_theta=model.rope_base,
        rope_parameters=dict(rope_type="default", rope_theta=model.rope_base),
        max_position_embeddings=len(model.rope), tie_word_embeddings=False, torch_dtype="float32",
        num_image_tokens=V, **no_ids)
    weights = llama_weights(model)
    if len(model.grid) > 1 or (model.rope[0] == 0).all():
        cos, sin = model.rope.unbind(-1)                                              # (P + T, d / 2)
        weights["model.rotary_emb.cos"] = torch.cat([cos, cos], 1)
        weights["model.rotary_emb.sin"] = torch.cat([sin, sin], 1)
        config["architectures"] = ["LlamaGenForCausalLM"]
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_llamagen.LlamaGenForCausalLM"}
    generation = dict(max_new_tokens=model.seq_len, min_new_tokens=model.seq_len, do_sample=True, top_k=0,
                      suppress_tokens=list(range(V, V + classes)), **no_ids)
    return config, generation, {k: v.detach().contiguous() for k, v in weights.items()}


def llama_weights(model):
    """The weights by the names of transformers. The logits of the classes' ids get rows of zeros."""
    weights = {
        "model.embed_tokens.weight": torch.cat([model.tok_embed.weight, model.cls_embed.weight]),
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": F.pad(model.head.proj.weight, (0, 0, 0, model.num_classes + 1)),
    }
    for i, block in enumerate(model.blocks):
        q, k, v = block.attn.wqkv.weight.chunk(3)
        parts = {
            "self_attn.q_proj": halves(q, model.n_head), "self_attn.k_proj": halves(k, model.n_head),
            "self_attn.v_proj": v, "self_attn.o_proj": block.attn.wo.weight,
            "mlp.gate_proj": block.mlp.w1.weight, "mlp.up_proj": block.mlp.w3.weight,
            "mlp.down_proj": block.mlp.w2.weight, "input_layernorm": block.norm1.weight,
            "post_attention_layernorm": block.norm2.weight,
        }
        for name, weight in parts.items():
            weights[f"model.layers.{i}.{name}.weight"] = weight
    return weights


def halves(weight, n_head):
    """weight (C, C) of queries or keys, rows 2k, 2k + 1 of a head d wide -> rows k, k + d / 2.

    transformers turns the two halves of a head against each other, we turn neighbours.
    """
    C = weight.shape[1]
    return weight.view(n_head, -1, 2, C).transpose(1, 2).reshape(C, C)


def load_for_export(source, grid=None, n_head=None):
    """A run folder of train.py, or a file of LlamaGen's -> ARTransformer in eval mode; grid: see load_gpt."""
    if not Path(source).is_dir():
        return load_gpt(source, n_head, grid or (16, 16))
    checkpoint = torch.load(Path(source) / "ckpt.pt", map_location="cpu", weights_only=True)
    flags = checkpoint["flags"]
    grid = grid or checkpoint.get("grid")
    ema = checkpoint["ema"]
    sd = {k.removeprefix("module."): v for k, v in ema.items() if k.startswith("module.")}
    right = flags.get("generator") == "ar" and flags.get("head") == "categorical"
    if not right or "cls_embed.weight" not in sd or "tok_embed.weight" not in sd:
        raise ValueError(f"{source}: not a run of --generator ar --head categorical (without --groups) "
                         "that draws images of classes")
    if grid is None:
        raise ValueError(f"{source}: give --grid ROWS COLUMNS, that of the tokens: the weights do not tell")
    V, C = sd["tok_embed.weight"].shape
    model = ar_transformer.ARTransformer(
        ar_transformer.CategoricalHead(C, V), math.prod(grid), len(sd["cls_embed.weight"]) - 1, vocab_size=V,
        grid=grid, **ar_transformer.SIZES[flags["size"]])
    model.load_state_dict(sd)
    return model.eval()


def export(source, out, grid=None, n_head=None):
    """Write the folder that transformers' from_pretrained(out) reads (a grid: trust_remote_code=True)."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ValueError("export needs the optional package safetensors: pip install safetensors") from None
    config, generation, weights = to_llama(load_for_export(source, grid, n_head))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (out / "generation_config.json").write_text(json.dumps(generation) + "\n")
    if "auto_map" in config:
        (out / "modeling_llamagen.py").write_text(MODELING)


def main(argv=None):
    parser = argparse.ArgumentParser(description="LlamaGen, or a run, for Hugging Face's transformers.")
    commands = parser.add_subparsers(dest="command", required=True)
    e = commands.add_parser("export", help="write a folder that transformers' from_pretrained reads")
    e.add_argument("source", help="a run folder of --generator ar --head categorical, or LlamaGen's file")
    e.add_argument("out", help="the folder to write: config.json, model.safetensors")
    e.add_argument("--grid", type=int, nargs="+", help="rows and columns of tokens (LlamaGen's files: 16 16)")
    e.add_argument("--n_head", type=int, help="attention heads, where a file is none of the published sizes")
    args = parser.parse_args(argv)
    try:
        export(args.source, args.out, args.grid, args.n_head)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
