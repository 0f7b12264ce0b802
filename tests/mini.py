"""
Sizes "mini" of every model, and few held out pictures: for tests that train by the programs as they are.

begin() adds them in this process; a test that starts a process of its own has it call begin(), too.
"""
import ar_transformer
import data
import lfq
import mar
import maskgit
import titok
import vae
import var
import vq

PIXELS = dict(image_size=32, ch=8, ch_mult=(1, 2, 2, 2), n_res=1, groups=4)    # of 16 x 16 pixels 4 tokens
BLOCKS = dict(n_layer=2, n_head=2, n_embd=64)


def begin():
    """2,000 validation pictures, and the default sizes, would take most of the time of a run of 24 steps."""
    data.DRAWN["val"] = 200
    data.DRAWN_CLIPS["val"] = 100
    vae.SIZES["mini"] = vae.SIZES["patches"] | dict(ch=8, groups=4)
    vae.PATCHES["mini"] = dict(patch=4)
    vq.SIZES["mini"] = PIXELS | dict(vocab_size=1024, code_dim=8, z_channels=16)
    lfq.SIZES["mini"] = PIXELS | dict(bits=10)
    lfq.SIZES["mini-clips"] = PIXELS | dict(bits=10, frames=17, ch_mult=(1, 2, 2))
    titok.SIZES["mini"] = dict(image_size=32, patch=4, n_tokens=32, enc=(32, 1, 2), dec=(32, 1, 2))
    var.TOK_SIZES["mini"] = var.TOK_SIZES["small"] | dict(ch=16, groups=4)
    for module in (ar_transformer, maskgit, var):
        module.SIZES["mini"] = BLOCKS
    mar.SIZES["mini"] = BLOCKS | dict(n_buffer=4, mask_min=0.0, mask_std=9.0)
    mar.HEAD_SIZES["mini"] = dict(width=64, depth=1)
