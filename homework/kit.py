"""What every homework uses: who grades what, and comparisons that say what may be wrong."""
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parent.parent
MODELS = ("vae vq lfq titok perceptual_gan flow_adapter gmm_head diffusion_head ar_transformer maskgit mar"
          ).split()


def exercise(target, points, hidden=False):
    """This test grades `target`, such as "vae.VAE.kl". hidden: it is not in the handout, and graded all the
    same.
    """
    def mark(test):
        test.exercise, test.points, test.hidden = target, points, hidden
        return test
    return mark


def check(what, ours, truth, hint="", tolerance=1e-4):
    """ours equals truth within `tolerance` of the largest value (or of 1), or a sentence says by how much it
    does not.
    """
    assert isinstance(ours, torch.Tensor), f"{what} is not a tensor: {ours!r:.40}"
    assert ours.shape == truth.shape, f"{what} has shape {tuple(ours.shape)} and not {tuple(truth.shape)}. {hint}"
    error = ours.detach().double() - truth.detach().double()
    assert error.abs().max() <= tolerance * truth.detach().double().abs().max().clamp(min=1), \
        f"{what} is off by {error.mean():+.3f} on average and by {error.abs().max():.3g} at most. {hint}"


def gradient(y, x):
    """dy / dx, or None where y does not depend on x."""
    return torch.autograd.grad(y, x, retain_graph=True, allow_unused=True)[0] if y.requires_grad else None
