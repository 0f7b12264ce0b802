"""A world that is small enough for tests which train many systems: models, images, trainings, no pictures."""
import contextlib

import pytest

import ar_transformer
import data
import lfq
import mar
import maskgit
import titok
import train
import vae
import var
import vq
from common import classifier, drawing, pictures, runs


@contextlib.contextmanager
def small_world():
    """Sizes "dot" of every model, few images, short trainings, and no picture by matplotlib."""
    with pytest.MonkeyPatch.context() as patch:
        convolutions = dict(ch=8, ch_mult=(1, 1, 1), n_res=1, groups=4)
        patch.setitem(vae.SIZES, "dot", dict(token_dim=4) | convolutions)
        patch.setitem(vae.PATCHES, "dot", dict(patch=2))
        patch.setitem(vq.SIZES, "dot", dict(vocab_size=16, code_dim=4, z_channels=8) | convolutions)
        patch.setitem(lfq.SIZES, "dot", dict(bits=4) | convolutions)
        patch.setitem(titok.SIZES, "dot", dict(n_tokens=4, code_dim=4, vocab_size=16, enc=(32, 1, 2),
                                               dec=(32, 1, 2)))
        patch.setitem(var.TOK_SIZES, "dot", dict(vocab_size=16, code_dim=4) | convolutions)
        patch.setitem(titok.SIZES, "dot-vae", dict(n_tokens=4, token_dim=4, enc=(32, 1, 2), dec=(32, 1, 2)))
        for module in (ar_transformer, maskgit, mar, var):
            size = dict(n_layer=2, n_head=2, n_embd=32) | (dict(n_buffer=2) if module is mar else {})
            patch.setitem(module.SIZES, "dot", size)
        patch.setitem(mar.HEAD_SIZES, "dot", dict(width=16, depth=1))
        for kind in drawing.DEFAULTS:
            if kind.endswith("diffusion"):
                patch.setitem(drawing.DEFAULTS, kind, drawing.DEFAULTS[kind] | dict(diffusion_steps=3))
        patch.setattr(classifier.train_classifier, "__defaults__", (0, 3, 8, 4e-3))
        patch.setattr(train, "VALIDATED", 16)
        for name in ("draw_set", "draw_clip_set"):
            patch.setattr(data, name, few(getattr(data, name)))
        patch.setattr(runs, "load_file", read_once(runs.load_file))
        patch.setattr(pictures, "pyplot", pytest.fail)
        patch.setattr(pictures, "save_rows", only_tiles)
        patch.setattr(pictures, "save_curve", lambda path, rows, unit: None)
        yield patch


def few(draw):
    """A function that draws a set of images, with 24 of them where it would draw thousands."""
    def drawn(image_size, split, device, seed=0, n=None, **options):
        return draw(image_size, split, device, seed, n or 24, **options)
    return drawn


def read_once(load_file, kept={}):
    """load_file that keeps what it read: else half of these tests' time is reading checkpoints again."""
    def load(path, map_location="cpu"):
        key = str(path), path.stat().st_mtime_ns, str(map_location)
        if key not in kept:
            kept[key] = load_file(path, map_location)
        return dict(kept[key])
    return load


def only_tiles(path, rows, title=""):
    """What pictures.save_rows asks of its images, without matplotlib."""
    for _, images in rows:
        pictures.tile(images, len(images))
