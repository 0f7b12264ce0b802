"""
The authors' weights of MAR (Li et al. 2024, arxiv.org/abs/2406.11838): its VAE, KL-16, and MAR-B, MAR-L,
MAR-H.

    from official import mar
    vae = mar.load_vae("kl16.ckpt")                         # or LDM's kl-f*; image_size=384 for larger images
    model = mar.load_mar("mar_base.pth")                   # tokens of vae, 256 of 16 numbers
    images = vae.decode(model.sample(torch.tensor([207]), cfg=2.9, diffusion_steps=100))

Both return the model in eval mode and refuse unknown or missing keys by name (ValueError). docs/weights.md
tells where the files come from.
"""
import argparse

import torch

import mar
from diffusion_head import DiffusionHead
from vae import VAE


def load_weights(path):
    """A .pt, .pth, .ckpt or .safetensors file -> state dict on the CPU. Never runs code from the file."""
    if str(path).endswith(".safetensors"):
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError(f"{path} needs the optional package safetensors: "
                             "pip install safetensors") from None
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def count(keys, start):
    """How many layers are numbered after `start`, such as "encoder.down."."""
    return len({k[len(start):].split(".")[0] for k in keys if k.startswith(start)})


def fill(model, weights, what, strict=True):
    """Load weights into model. Refuse by name what does not fit; with strict=False buffers may be missing."""
    own = model.state_dict() if strict else dict(model.named_parameters())
    missing = [k for k in own if k not in weights]
    unknown = [k for k in weights if k not in model.state_dict()]
    if missing or unknown:
        raise ValueError(f"{what} do not fit: missing {missing[:3]}, unknown {unknown[:3]}")
    model.load_state_dict(weights, strict=strict)
    return model.eval()


# ---- KL-16 -----------------------------------------------------------------------------------------

def load_vae(x, image_size=None, groups=32):
    """Weights with LDM's key names (MAR's kl16.ckpt, LDM's kl-f*), a path or state dict -> VAE in eval mode.

    All sizes but image_size are read off the shapes. image_size: side of the images in pixels; the default is
    16 tokens a side, so 256 for KL-16. latent_scale becomes MAR's 0.2325 = 1 / std over ImageNet, with no
    mean taken off. Papers: LDM, arxiv.org/abs/2112.10752, and MAR.
    """
    sd = x if isinstance(x, dict) else load_weights(x)
    sd = sd.get("model", sd.get("state_dict", sd))
    sd = {k: v for k, v in sd.items() if not k.startswith("loss.")}
    for key in ("encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight", "quant_conv.weight",
                "decoder.conv_in.weight"):
        if key not in sd:
            raise ValueError(f"not an LDM-style autoencoder: the key {key} is missing")
    levels = count(sd, "encoder.down.")
    n_res = count(sd, "encoder.down.0.block.")
    ch = sd["encoder.conv_in.weight"].shape[0]
    mult = tuple(sd[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // ch for i in range(levels))
    enc_attn = tuple(i for i in range(levels) if count(sd, f"encoder.down.{i}.attn."))
    dec_attn = tuple(i for i in range(levels) if count(sd, f"decoder.up.{i}.attn."))
    model = VAE(image_size or 16 << (levels - 1), sd["quant_conv.weight"].shape[0] // 2, ch=ch, ch_mult=mult,
                n_res=n_res, enc_attn=enc_attn, dec_attn=dec_attn, groups=groups)

    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}        # theirs: ours
    theirs = {"encoder": ldm_names(levels, n_res, enc_attn),
              "decoder": ldm_names(levels, n_res + 1, dec_attn, decoder=True)}
    for part, layers in theirs.items():
        numbers = [i for i, layer in enumerate(getattr(model, part)) if list(layer.parameters())]
        names |= {f"{part}.{name}": f"{part}.{i}" for name, i in zip(layers, numbers, strict=True)}
    ours = {}
    for key, value in sd.items():
        owner = next((name for name in names if key.startswith(name + ".")), None)
        if owner is None:
            raise ValueError(f"unknown key {key} in the autoencoder's weights")
        ours[names[owner] + key[len(owner):]] = value.float()
    fill(model, ours, "the autoencoder's weights", strict=False)                      # latent_mean stays 0
    model.latent_scale.fill_(0.2325)
    return model


def ldm_names(levels, n_res, attn, decoder=False):
    """LDM's names of the layers that hold weights, in the order of our Sequential."""
    mid = ["mid.block_1", "mid.attn_1", "mid.block_2"]
    side, change, last = ("up", "upsample", 0) if decoder else ("down", "downsample", levels - 1)
    names = []
    for level in reversed(range(levels)) if decoder else range(levels):
        for j in range(n_res):
            names.append(f"{side}.{level}.block.{j}")
            if level in attn:
                names.append(f"{side}.{level}.attn.{j}")
        if level != last:
            names.append(f"{side}.{level}.{change}")
    return ["conv_in"] + (mid + names if decoder else names + mid) + ["norm_out", "conv_out"]


# ---- MAR-B, MAR-L, MAR-H ---------------------------------------------------------------------------

NAMES = {                                                   # first part of a key, theirs: ours
    "z_proj_ln": "tok_norm", "z_proj": "tok_embed", "encoder_pos_embed_learned": "encoder_pos",
    "decoder_pos_embed_learned": "decoder_pos", "diffusion_pos_embed_learned": "head_pos",
    "class_emb": "cls_embed", "mask_token": "mask_embed", "diffloss": "head",
}


def load_mar(x, n_head=None, head=None):
    """The authors' .pth, a path or a state dict -> MAR in eval mode, its diffusion head included.

    Reads "model_ema", else "model", else a plain dict. The sizes are read off the shapes. n_head: heads do
    not show in shapes; None looks n_embd up in mar.SIZES. head: another head with MAR's parameters under
    head.net. Tokens are posterior samples of load_vae's VAE times 0.2325.
    """
    sd = x
    if not isinstance(x, dict):
        with torch.serialization.safe_globals([argparse.Namespace]):                  # their flags lie beside
            sd = load_weights(x)
    sd = sd.get("model_ema", sd.get("model", sd))
    need = ["class_emb.weight", "fake_latent", "z_proj.weight", "encoder_pos_embed_learned",
            "diffusion_pos_embed_learned", "diffloss.net.input_proj.weight"]
    if lost := [k for k in need if k not in sd]:
        raise ValueError(f"not the weights of a MAR: missing {lost}; the keys begin with {list(sd)[:3]}")
    ours = {}
    for key, value in sd.items():
        first, *rest = key.split(".")
        value = value[0] if value.ndim == 3 else value                        # positions: (1, n, C) -> (n, C)
        ours[".".join([NAMES.get(first, first), *rest])] = value.float()
    ours["cls_embed.weight"] = torch.cat([ours["cls_embed.weight"], ours.pop("fake_latent")])

    n_embd, token_dim = ours["tok_embed.weight"].shape
    T = len(ours["head_pos"])
    if n_head is None:
        n_head = next((size["n_head"] for size in mar.SIZES.values() if size["n_embd"] == n_embd), None)
    if n_head is None:
        raise ValueError(f"n_embd {n_embd} is none of the published sizes: say n_head=")
    if head is None:
        width = len(ours["head.net.input_proj.weight"])
        head = DiffusionHead(n_embd, token_dim, width, count(ours, "head.net.res_blocks."))
    n_layer = count(ours, "encoder_blocks."), count(ours, "decoder_blocks.")
    model = mar.MAR(head, T, len(ours["cls_embed.weight"]) - 1, token_dim, n_layer=n_layer, n_head=n_head,
                    n_embd=n_embd, n_buffer=len(ours["encoder_pos"]) - T)
    return fill(model, ours, "the weights of this MAR")
