"""Weight files of any release: read without running code from them, and fitted to our names key by key."""
import torch


def load_weights(x):
    """A .pt, .pth, .bin, .ckpt or .safetensors file, or a state dict -> state dict on the CPU."""
    if isinstance(x, dict):
        return x
    if str(x).endswith(".safetensors"):
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError(f"{x} needs the optional package safetensors: pip install safetensors") from None
        return load_file(x)
    return torch.load(x, map_location="cpu", weights_only=True)


def fit_keys(sd, names, what):
    """sd: their state dict; names: their keys -> ours, or None. -> {our key: tensor} of those with a name of
    ours.

    Raises ValueError that names the first keys which are missing or unknown.
    """
    missing = [key for key in names if key not in sd]
    unknown = [key for key in sd if key not in names]
    if missing or unknown:
        raise ValueError(f"{what} do not fit: missing {missing[:3]}, unknown {unknown[:3]}")
    return {ours: sd[key] for key, ours in names.items() if ours}
