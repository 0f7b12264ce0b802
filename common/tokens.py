"""
Images encoded once: a VAE's tokens kept as posteriors, the others' as ids, and batches of them for the
generator.

    images --tokenizer.posterior--> mean, std (N, T, D), or --tokenizer.encode--> ids (N, T)        encode_all
    index (B,) --> tokens (B, T[, D]) and labels (B,), or captions (B, P[, E])         Tokens.batch

They are kept in the tokenizer's run folder with a key that stands for the tokenizer and the images, so a file
of another tokenizer, of other images, or a damaged one is made anew.
"""
import contextlib
import hashlib

import torch

from common import runs


class Tokens:
    """A set of images as tokens. arrays: mean, std (N, T, D), or ids (N, T); labels (N,), or captions (N, P[,
    E]).
    """

    def __init__(self, tokenizer, arrays, labels):
        self.tokenizer = tokenizer
        self.arrays = arrays
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def batch(self, index):
        """index (B,) -> tokens (B, T[, D]), labels (B,). Vectors are a fresh draw each time (GIVT section
        3.1).
        """
        index = index.to(self.labels.device, non_blocking=True)
        cond = self.labels[index]
        if cond.is_floating_point():                        # T5's features are kept in half precision
            cond = cond.float()
        row = index
        if "flipped" in self.arrays:                   # the second half of the arrays are the mirrored images
            mirrored = torch.rand(len(index), device=index.device) < 0.5
            row = index + mirrored * len(self.labels)
        if "ids" in self.arrays:
            return self.arrays["ids"][row], cond
        z = self.tokenizer.reparameterise(self.arrays["mean"][row], self.arrays["std"][row])
        return self.tokenizer.normalise(z), cond


@torch.no_grad()
def encode_all(tokenizer, images):
    """A whole data.ImageSet -> dict of arrays on its device: mean, std, or ids; with --flip the mirrored
    images, too.
    """
    flip = images.flip
    images.flip = False
    at_once = 250 if images.frames == 1 else max(1, 1000 // images.frames)            # clips take more memory
    parts = {}
    for mirror in ([False, True] if flip else [False]):
        for i in range(0, len(images), at_once):
            x, _ = images.batch(torch.arange(i, min(i + at_once, len(images)), device="cpu"))
            if mirror:
                x = x.flip(-1)
            if tokenizer.vocab_size:
                parts.setdefault("ids", []).append(tokenizer.encode(x))
            else:
                mean, std = tokenizer.posterior(x)
                parts.setdefault("mean", []).append(mean)
                parts.setdefault("std", []).append(std)
    images.flip = flip
    arrays = {name: torch.cat(part) for name, part in parts.items()}
    if flip:
        arrays["flipped"] = torch.ones(1, device="cpu")
    return arrays


def key_of(tokenizer, images):
    """A text that stands for the weights of a tokenizer and the content of a data.ImageSet."""
    digest = hashlib.sha1(f"{runs.fingerprint(images)} {images.flip}".encode())
    for value in tokenizer.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()


def cached(tokenizer, images, path, dist):
    """The tokens of a set, read from `path` if they are of this tokenizer and these images, else made and
    saved.
    """
    key = key_of(tokenizer, images)
    saved = None
    if path.exists():
        with contextlib.suppress(Exception):                # a damaged cache is made anew
            saved = runs.load_file(path, map_location=images.device)
    if not isinstance(saved, dict) or saved.get("key") != key:
        saved = dict(encode_all(tokenizer, images), key=key)
        if dist.rank == 0:
            runs.save_atomically(saved, path)
    arrays = {name: value for name, value in saved.items() if name != "key"}
    return Tokens(tokenizer, arrays, images.labels)
