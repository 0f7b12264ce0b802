"""
Images encoded once: a VAE's tokens kept as posteriors, the others' as ids, and batches of them for the
generator.

    images --tokenizer.posterior--> mean, std (N, T, D), or --tokenizer.encode--> ids (N, T)        encode_all
    index (B,) --> tokens (B, T[, D]) and labels (B,), or captions (B, P[, E])         Tokens.batch

They are kept in the tokenizer's run folder with a key that stands for the tokenizer and the images, so a file
of another tokenizer, of other images, or a damaged one is made anew.
"""
import hashlib

import torch

import vae
from common import runs, tables


class Tokens:
    """A set of images as tokens. arrays: mean, std (N, T, D), or ids (N, T); labels (N,), or captions (N, P[,
    E]). Batches come on the device; large arrays lie on the CPU (see common/tables.py).
    """

    def __init__(self, tokenizer, arrays, labels, device=None):
        self.tokenizer = tokenizer
        self.arrays = arrays
        self.labels = labels
        self.device = device or labels.device

    def __len__(self):
        return len(self.labels)

    def batch(self, index, share=slice(None)):
        """index (B,) on the CPU -> tokens (B, T[, D]), labels (B,), on the device, of which a share is given.

        Vectors are a fresh draw each time (GIVT section 3.1). Random numbers are drawn for the whole batch.
        """
        mine = index[share]
        cond = tables.take(self.labels, mine, self.device)
        if cond.is_floating_point():                        # T5's features are kept in half precision
            cond = cond.float()
        if "flipped" in self.arrays:                   # the second half of the arrays are the mirrored images
            mirrored = torch.rand(len(index), device="cpu") < 0.5
            mine = (index + mirrored * len(self.labels))[share]
        if "ids" in self.arrays:
            return tables.take(self.arrays["ids"], mine, self.device), cond
        mean, std = (tables.take(self.arrays[name], mine, self.device) for name in ("mean", "std"))
        noise = torch.randn(len(index), *mean.shape[1:], device=self.device)[share]
        return self.tokenizer.normalise(mean + std * noise), cond


class Pixels:
    """A set of images as tokens of vae.Patches, made anew for each batch: that costs less than to keep them,
    and their noise is fresh.
    """

    def __init__(self, tokenizer, image_set):
        self.tokenizer = tokenizer
        self.image_set = image_set
        self.images = image_set.images                      # data.read_ahead looks here
        self.labels = image_set.labels
        self.device = image_set.labels.device

    def __len__(self):
        return len(self.labels)

    def batch(self, index, share=slice(None)):
        """index (B,) on the CPU -> tokens (B, T, D), labels (B,), as of Tokens.batch."""
        images, _ = self.image_set.batch(index, share)
        u = torch.rand(len(index), self.tokenizer.channels, *images.shape[2:], device=images.device)[share]
        cond = tables.take(self.labels, index[share], self.device)
        return self.tokenizer.encode(images, u), cond.float() if cond.is_floating_point() else cond


def parts_of(tokenizer, images, chosen=None):
    """How to make the tokens of a data.ImageSet -> n rows, rows at once, make(i, j): see common/tables.py.

    With --flip the mirrored images are there too, as rows N .. 2 N - 1. chosen (M,): only those positions.
    """
    n = len(images)
    if chosen is None:
        chosen = torch.arange(2 * n if images.flip else n, device="cpu")
    at_once = 250 if images.frames == 1 else max(1, 1000 // images.frames)            # clips take more memory

    @torch.no_grad()
    def make(i, j):
        index = chosen[i:j]
        flip, images.flip = images.flip, False
        x, _ = images.batch(index % n)
        images.flip = flip
        if (index >= n).any():
            mirrored = (index >= n).to(x.device).view(-1, *[1] * (x.ndim - 1))
            x = torch.where(mirrored, x.flip(-1), x)
        if tokenizer.vocab_size:
            return {"ids": tokenizer.encode(x)}
        mean, std = tokenizer.posterior(x)
        return {"mean": mean, "std": std}
    return len(chosen), at_once, make


def marked(arrays, images):
    """With --flip, Tokens must know that the second half are mirrored images."""
    return arrays | {"flipped": torch.ones(1, device="cpu")} if images.flip else arrays


def encode_some(tokenizer, images, most):
    """At most so many of a data.ImageSet, spread evenly and not mirrored -> arrays as of encode_all."""
    chosen = torch.linspace(0, len(images) - 1, min(len(images), most), device="cpu").long().unique()
    return tables.fill(*parts_of(tokenizer, images, chosen), tables.room_on(images.device))


def encode_all(tokenizer, images):
    """A whole data.ImageSet -> dict of arrays: mean, std, or ids; with --flip the mirrored images, too.

    On the device, or on the CPU where they are large.
    """
    arrays = tables.fill(*parts_of(tokenizer, images), tables.room_on(images.device))
    return marked(arrays, images)


def key_of(tokenizer, images):
    """A text that stands for the weights of a tokenizer and the content of a data.ImageSet."""
    digest = hashlib.sha1(f"{runs.fingerprint(images)} {images.flip}".encode())
    for value in tokenizer.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()


def cached(tokenizer, images, path, dist):
    """The tokens of a set, read from `path` if they are of this tokenizer and these images, else made by all
    processes together and saved. Pixels are not kept.
    """
    if isinstance(tokenizer, vae.Patches):
        return Pixels(tokenizer, images)
    key = key_of(tokenizer, images)
    arrays = tables.kept(path, key, *parts_of(tokenizer, images), images.device, dist)
    return Tokens(tokenizer, marked(arrays, images), images.labels)
