"""What a course consists of: files in reading order, their exercises, how long and how hard they are."""
import functools
import importlib

from homework.kit import MODELS

# What one learns, and minutes for somebody who has written a training loop before, reading included. No
# class was timed: they are the authors' guess, about eight minutes a point and half an hour to read.
FILES = {
    "vae": ("images to continuous tokens, and what a bit of them costs", 110, "easy"),
    "vq": ("images to ids: a rounding that learns", 120, "medium"),
    "gmm_head": ("the distribution of one continuous token; guidance of Gaussians", 120, "medium"),
    "ar_transformer": ("attention, rotary positions, teacher forcing, a cache", 130, "medium"),
    "maskgit": ("many tokens at once: schedules, confidence, masks", 110, "easy"),
    "diffusion_head": ("one token by denoising: loss, reverse step, guidance, flow", 140, "hard"),
    "mar": ("random orders, sets of tokens, a loss on masked tokens only", 110, "medium"),
    "flow_adapter": ("an invertible network between tokenizer and generator", 80, "easy"),
    "lfq": ("ids without a table, entropy of bits, causal convolutions", 110, "medium"),
    "titok": ("tokens without a place; the proxy and its soft codes", 110, "medium"),
    "var": ("residual codes from coarse to fine, a transformer that draws a scale at a time", 120, "medium"),
    "perceptual_gan": ("perceptual and adversarial losses and their balance", 100, "easy"),
}


@functools.lru_cache(maxsize=None)
def graded(name, further=False):
    """The tests that grade NAME.py, in order; further: those of the second tier, too."""
    tests = vars(importlib.import_module(f"homework.{name}")).values()
    own = [t for t in tests if getattr(t, "exercise", "").split(".")[0] == name]
    return [t for t in own if further or not t.further]


def exercises(name, further=False):
    """The functions of NAME.py that homework asks for, such as "GMMHead.density", in order. A capstone asks
    for none.
    """
    targets = [t.exercise.partition(".")[2] for t in graded(name, further)]
    return [target for target in dict.fromkeys(targets) if target]


def listing(names, further):
    """The lines of `list`: files in reading order, points, functions, tests."""
    lines = []
    for name in [n for n in MODELS if n in names]:
        idea, minutes, level = FILES[name]
        tests = graded(name, further)
        points = sum(t.points for t in tests if not t.further)
        more = sum(t.points for t in tests if t.further)
        lines.append(f"{name}.py: {points} points" + (f" and {more} further" if more else "")
                     + f", about {minutes} minutes, {level}: {idea}")
        for t in tests:
            marks = ("   hidden" if t.hidden else "") + ("   further" if t.further else "")
            lines.append(f"    {t.points}  {t.exercise:52s} {t.__name__}{marks}")
    return lines
