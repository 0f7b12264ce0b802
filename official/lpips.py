"""
The published weights of LPIPS (Zhang et al. 2018, arxiv.org/abs/1801.03924), for perceptual_gan.LPIPS.

    from official import lpips
    distance = lpips.load_lpips("vgg16-397923af.pth", "vgg.pth")

Neither file comes with this project: docs/weights.md tells where they are.
"""
import re

import torch

from perceptual_gan import LPIPS


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


def load_lpips(vgg_path, lins_path=None):
    """Two files, or one that holds both -> LPIPS in eval mode.

    vgg_path: torchvision's vgg16-397923af.pth. lins_path: vgg.pth of LPIPS v0.1, which taming-transformers
    fetches too and which holds the five 1x1 weights only. A whole LPIPS state dict, or a VQGAN checkpoint
    with its loss, holds both and needs no second file. Refuses what is missing or does not belong to VGG16 by
    name.
    """
    paths = [path for path in (vgg_path, lins_path) if path is not None]
    model = LPIPS()
    ours = {}
    for path in paths:
        sd = load_weights(path)
        for key, value in sd.get("state_dict", sd).items():
            if found := re.search(r"(?:features|slice\d)\.(\d+)\.(weight|bias)$", key):
                ours[f"features.{found[1]}.{found[2]}"] = value.float()
            elif found := re.search(r"lins?\.?(\d)\.model\.\d\.weight$", key):
                ours[f"lins.{found[1]}.weight"] = value.float()
    names = " + ".join(map(str, paths))
    if not any(k.startswith("features") for k in ours):
        raise ValueError(f"{names}: VGG16 itself is missing; name torchvision's vgg16-397923af.pth "
                         "as vgg_path")
    if not any(k.startswith("lins") for k in ours):
        raise ValueError(f"{names}: LPIPS's weights lin0 .. lin4 are missing; name its vgg.pth (v0.1) "
                         "as lins_path")
    missing = [k for k in model.state_dict() if k not in ours]
    unknown = [k for k in ours if k not in model.state_dict()]
    if missing or unknown:
        raise ValueError(f"{names} does not fit VGG16: missing {missing[:3]}, unknown {unknown[:3]}")
    model.load_state_dict(ours)
    return model.eval()
