"""
The authors' weights of LlamaGen (Sun et al. 2024, arxiv.org/abs/2406.06525; FoundationVision/LlamaGen).

    tokenizer = load_vq("vq_ds16_c2i.pt")                       # vq.VQ
    model = load_gpt("c2i_B_256.pt")  # ar_transformer.ARTransformer, classes or captions
    python -m official.llamagen export c2i_B_256.pt OUT         # a folder for Hugging Face's transformers

Each takes a path or a state dict, reads the sizes off the shapes, returns the model in eval mode and raises
ValueError for unknown or missing keys, by name. What only this release needs is here: a prefix whose keys
vanish.
"""
import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from ar_transformer import SIZES, ARTransformer, CategoricalHead, RMSNorm
from official.files import fit_keys, load_weights
from vq import VQ

# ---- The tokenizer --------------------------------------------------------------------------------


def load_vq(x, image_size=256, l2_norm=True):
    """vq_ds16 or vq_ds8 -> vq.VQ in eval mode.

    image_size: any multiple of the stride; 256, 384, 512 pixels in the paper. It and l2_norm are not to be
    read off the shapes.
    """
    state = load_weights(x)
    sd = next((state[key] for key in ("ema", "model", "state_dict") if key in state), state)
    # a queue for their usage meter
    sd = {k: v.float() for k, v in sd.items() if k != "quantize.codebook_used"}

    def count(start):
        return len({key[len(start):].split(".")[0] for key in sd if key.startswith(start)})

    levels = count("encoder.conv_blocks.")
    n_res = count("encoder.conv_blocks.0.res.")
    widths = [f"encoder.conv_blocks.{i}.res.0.conv1.weight" for i in range(levels)]
    for key in ("encoder.conv_in.weight", "quant_conv.weight", "quantize.embedding.weight", *widths):
        if key not in sd:
            raise ValueError(f"not a LlamaGen tokenizer: the key {key} is missing")
    ch, channels = sd["encoder.conv_in.weight"].shape[:2]
    vocab_size, code_dim = sd["quantize.embedding.weight"].shape
    model = VQ(image_size, vocab_size, code_dim, l2_norm, ch=ch,
               ch_mult=tuple(len(sd[key]) // ch for key in widths), n_res=n_res,
               z_channels=sd["quant_conv.weight"].shape[1], groups=32, channels=channels)
    names = {}                                              # theirs: ours
    for key in model.state_dict():
        part, _, rest = key.partition(".")
        if part in ("encoder", "decoder"):
            layers = [i for i, layer in enumerate(getattr(model, part)) if list(layer.parameters())]
            theirs = layer_names(levels, n_res + (part == "decoder"), part == "decoder")
            i, _, rest = rest.partition(".")
            names[f"{part}.{theirs[layers.index(int(i))]}.{rest}"] = key
        else:
            names["quantize.embedding.weight" if part == "quantizer" else key] = key
    model.load_state_dict(fit_keys(sd, names, "the tokenizer's weights"))
    return model.eval()


def layer_names(levels, n_res, decoder=False):
    """Their names of the layers that hold weights, in the order of our Sequential. Level 0 comes first in
    both.
    """
    mid = ["mid.0", "mid.1", "mid.2"]
    names = []
    for i in range(levels):
        for j in range(n_res):
            names.append(f"conv_blocks.{i}.res.{j}")
            if i == (0 if decoder else levels - 1):         # the lowest resolution has attention
                names.append(f"conv_blocks.{i}.attn.{j}")
        if i < levels - 1:
            names.append(f"conv_blocks.{i}.{'upsample' if decoder else 'downsample'}")
    return ["conv_in"] + (mid + names if decoder else names + mid) + ["norm_out", "conv_out"]


# ---- The transformer ------------------------------------------------------------------------------

NAMES = (("tok_embed", "tok_embeddings"), ("cls_embed", "cls_embedding.embedding_table"),       # ours, theirs
         ("caption.none", "cls_embedding.uncond_embedding"), ("caption.", "cls_embedding.cap_proj."),
         ("blocks.", "layers."), ("norm1", "attention_norm"), ("norm2", "ffn_norm"),
         (".attn.", ".attention."), (".mlp.", ".feed_forward."), ("head.proj", "output"))


def load_gpt(x, n_head=None, grid=(16, 16), rope_base=10000.0, norm_eps=1e-5):
    """LlamaGen's class- or text-conditional GPT -> ARTransformer in eval mode, head included.

    Reads "ema", else "model" (their DDP files), else a plain dict (FSDP). The shapes do not tell n_head
    (None: that of the published size), grid, (16, 16) for 256 pixels and (24, 24) for 384, rope_base and
    norm_eps. Labels are in torchvision's order of ImageNet. Captions are FLAN-T5-XL's features (B, 120,
    2048).
    """
    state = load_weights(x)
    sd = next((state[key] for key in ("ema", "model", "module", "state_dict") if key in state), state)
    sd = {k.removeprefix("module.").removeprefix("_orig_mod."): v for k, v in sd.items()}
    text = "cls_embedding.uncond_embedding" in sd
    cond = "cls_embedding.uncond_embedding" if text else "cls_embedding.embedding_table.weight"
    needed = ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight", "layers.0.attention.wqkv.weight",
              cond)
    lost = [key for key in needed if key not in sd]
    if lost:
        raise ValueError(
            f"not the weights of a LlamaGen GPT: missing {lost}; the keys begin with {list(sd)[:3]}")
    V, C = sd["tok_embeddings.weight"].shape
    if len(sd["layers.0.attention.wqkv.weight"]) != 3 * C:
        raise ValueError(
            f"this GPT shares keys and values among its heads (wqkv has {len(sd[needed[2]])} rows, not "
            f"{3 * C}): grouped heads are not written here")
    n_layer = len({key.split(".")[1] for key in sd if key.startswith("layers.")})
    num_classes = 1 if text else len(sd[cond]) - 1
    model = ARTransformer(CategoricalHead(C, V), math.prod(grid), num_classes, vocab_size=V, grid=grid,
                          n_layer=n_layer, n_head=heads_of(C, n_head), n_embd=C,
                          text=tuple(sd[cond].shape) if text else None, multiple_of=len(sd[needed[1]]),
                          rope_base=rope_base)
    model.load_state_dict(
        fit_keys({k: v.float()
                  for k, v in sd.items()}, names_of(model, NAMES), "LlamaGen's weights"))
    return parity(model, norm_eps).eval()


def parity(model, norm_eps=1e-5):
    """What their code does and ours does not: the prefix has cos = sin = 0, so that its keys vanish.

    Every score with it is 0, and only its values count. Their weights have learned to live with it.
    """
    model.rope[:model.n_prefix] = 0
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.eps = norm_eps
    return model


def names_of(model, pairs):
    """{their key: our key} of all weights of a model, by replacing parts of our names."""
    names = {}
    for key in model.state_dict():
        theirs = key
        for ours, their in pairs:
            theirs = theirs.replace(ours, their)
        names[theirs] = key
    return names


def heads_of(n_embd, n_head=None):
    """n_head if it is given, else that of the published size: the shapes of the weights do not tell."""
    if n_head:
        return n_head
    for size in SIZES.values():
        if size["n_embd"] == n_embd:
            return size["n_head"]
    raise ValueError(f"n_embd {n_embd} is none of the published sizes: give n_head=")


# ---- Export: the same network as a LlamaForCausalLM, for other people's fast servers ---------------

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
    """A model of ids and classes -> config, generation config, weights of transformers' LlamaForCausalLM.

    The logits are equal. Class c becomes the id V + c in front of the tokens, "no class" the id V +
    num_classes. Their logits are 0 and must be banned, as the generation config does. transformers turns the
    halves of a head against each other, we turn neighbours: the rows of q and k change places. One axis of
    positions is stock Llama. A grid, or a prefix without keys, needs MODELING, which looks the angles up.
    "architectures" names it, because stock Llama would read such a folder with wrong angles.
    """
    table = getattr(model, "tok_embed", None)
    if not isinstance(table, nn.Embedding) or not hasattr(model, "cls_embed") or model.pos_embed is not None:
        raise ValueError(
            "Llama can hold a model of ids (in one softmax) and classes without learned positions, not "
            "this one")
    C = table.embedding_dim
    width = len(model.blocks[0].mlp.w1.weight)
    n_rows = len(model.positions)
    n_classes = model.num_classes + 1
    V = model.vocab_size
    head_dim = C // model.n_head

    def halves(w):                                          # rows 2k, 2k + 1 of a head -> k, k + head_dim / 2
        return w.view(model.n_head, head_dim // 2, 2, C).transpose(1, 2).reshape(C, C)

    sd = {"model.embed_tokens.weight": torch.cat([table.weight, model.cls_embed.weight]),
          "model.norm.weight": model.norm.weight,
          "lm_head.weight": F.pad(model.head.proj.weight, (0, 0, 0, n_classes))}
    for i, block in enumerate(model.blocks):
        q, k, v = block.attn.wqkv.weight.chunk(3)
        parts = {"self_attn.q_proj": halves(q), "self_attn.k_proj": halves(k), "self_attn.v_proj": v,
                 "self_attn.o_proj": block.attn.wo.weight, "mlp.gate_proj": block.mlp.w1.weight,
                 "mlp.up_proj": block.mlp.w3.weight, "mlp.down_proj": block.mlp.w2.weight,
                 "input_layernorm": block.norm1.weight, "post_attention_layernorm": block.norm2.weight}
        sd |= {f"model.layers.{i}.{name}.weight": w for name, w in parts.items()}
    nothing = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=V + n_classes,
                  hidden_size=C, intermediate_size=width, num_hidden_layers=len(model.blocks),
                  num_attention_heads=model.n_head, num_key_value_heads=model.n_head, head_dim=head_dim,
                  rms_norm_eps=model.norm.eps, rope_theta=model.rope_base,
                  rope_parameters=dict(rope_type="default",
                                       rope_theta=model.rope_base), max_position_embeddings=n_rows,
                  tie_word_embeddings=False, torch_dtype="float32", num_image_tokens=V, **nothing)
    if len(model.grid) > 1 or (model.rope[0] == 0).all():
        cos, sin = model.rope.unbind(-1)                                              # (P + T, head_dim / 2)
        sd["model.rotary_emb.cos"] = torch.cat([cos, cos], 1)
        sd["model.rotary_emb.sin"] = torch.cat([sin, sin], 1)
        config |= dict(architectures=["LlamaGenForCausalLM"],
                       auto_map={"AutoModelForCausalLM": "modeling_llamagen.LlamaGenForCausalLM"})
    generation = dict(max_new_tokens=model.seq_len, min_new_tokens=model.seq_len, do_sample=True, top_k=0,
                      suppress_tokens=list(range(V, V + n_classes)), **nothing)
    return config, generation, {k: v.detach().contiguous() for k, v in sd.items()}


def load_for_export(source, grid=None, n_head=None):
    """A run folder of train.py, or a file of LlamaGen's -> ARTransformer in eval mode. grid as in
    load_gpt.
    """
    if not Path(source).is_dir():
        return load_gpt(source, n_head, grid or (16, 16))
    checkpoint = torch.load(Path(source) / "ckpt.pt", map_location="cpu", weights_only=True)
    if not checkpoint.get("done"):
        raise ValueError(f"{source}: this run is not finished; go on with train.py --resume")
    flags = checkpoint["flags"]
    grid = grid or checkpoint.get("grid")
    sd = {k.removeprefix("module."): v for k, v in checkpoint["ema"].items() if k.startswith("module.")}
    wanted = flags.get("generator") == "ar" and flags.get(
        "head") == "categorical" and "cls_embed.weight" in sd
    if not wanted or "tok_embed.weight" not in sd:
        raise ValueError(
            f"{source}: not a run of --generator ar --head categorical (whole, not in groups) that draws "
            "images of classes")
    if grid is None:
        raise ValueError(f"{source}: say --grid ROWS COLUMNS, that of the tokens: the weights do not tell")
    V, C = sd["tok_embed.weight"].shape
    num_classes = len(sd["cls_embed.weight"]) - 1
    model = ARTransformer(CategoricalHead(C, V), math.prod(grid), num_classes, vocab_size=V, grid=grid,
                          **SIZES[flags["size"]])
    model.load_state_dict(sd)
    return model.eval()


def export(source, out, grid=None, n_head=None):
    """Write the folder that transformers' from_pretrained(out) reads; of a grid, with
    trust_remote_code=True.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ValueError("export needs the optional package safetensors: pip install safetensors") from None
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already and not an empty folder: name another one")
    config, generation, weights = to_llama(load_for_export(source, grid, n_head))
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (out / "generation_config.json").write_text(json.dumps(generation) + "\n")
    if "auto_map" in config:
        (out / "modeling_llamagen.py").write_text(MODELING)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="LlamaGen's weights, or a run, as a folder for transformers.")
    commands = parser.add_subparsers(required=True, metavar="export")
    p = commands.add_parser("export", help="write a folder that Hugging Face's transformers reads")
    p.add_argument("source",
                   help="a run folder of --generator ar --head categorical, or a file of LlamaGen's weights")
    p.add_argument("out", help="the folder to write: config.json, model.safetensors")
    p.add_argument("--grid", type=int, nargs="+",
                   help="rows and columns of tokens (default: 16 16 for LlamaGen's files)")
    p.add_argument("--n_head", type=int,
                   help="attention heads of a LlamaGen file that is none of the published sizes")
    args = parser.parse_args(argv)
    try:
        export(args.source, args.out, args.grid, args.n_head)
    except Exception as error:                              # a damaged file raises half a dozen kinds
        text = (str(error) or type(error).__name__).splitlines()[0]
        parser.error("not a file of weights" if "weights_only" in str(error) else text)


if __name__ == "__main__":
    main()
