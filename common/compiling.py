"""
torch.compile, as the programs use it: what is compiled of each model, so that shapes stay few and static.

    for_training(model)     a tokenizer or a generator as train.py trains it: one graph, of MAR up to four
    for_drawing(run)        what sample.py and evaluate.py repeat: a pass of the transformer, the net of the
                            diffusion head. The samples are those of the model that is not compiled

A graph is made for the shapes that it first meets, and made anew for others (dynamic=False). That takes from
seconds to minutes each time, so shapes must be few. What is drawn at random on the CPU, and what Python
decides by a number, stays outside.
"""
import functools
import math

import torch
import torch.nn.functional as F

from data import BadInput

RANGES = 4                                                  # of the number of tokens that MAR's encoder sees
# Measured for the default sizes on one core of an AMD EPYC that others shared; the first one also imports.
SECONDS = {"step of a token": 70, "passes of MAR": 80, "pass of MaskGIT": 20, "diffusion head": 35,
           "pass of each scale": 100}                       # not measured: five passes at MaskGIT's 20


def for_training(model, **options):
    """A model -> one that is called alike: loss, logs = model(x, cond). options: those of torch.compile.

    Of MAR, alone or behind a flow adapter, the number of masked tokens is drawn outside of the compiled part.
    """
    options = dict(dynamic=False) | options
    if not hasattr(model, "masked_loss"):
        return torch.compile(model, **options)
    generator = getattr(model, "generator", model)
    generator.masked_loss = torch.compile(generator.masked_loss, **options)
    generator.forward = functools.partial(generator.loss_in_few_shapes, shapes=RANGES)
    if generator is not model:
        model.adapter.forward = torch.compile(model.adapter.forward, **options)
    return model


def for_drawing(run, backend=None):
    """Compile what a run repeats while it draws, in place. backend: of torch.compile, for tests.

    An autoregressive transformer: the step of one token; on a GPU it becomes one CUDA graph. MaskGIT: a pass.
    MAR: its passes, in RANGES shapes for each batch size. VAR: a graph for each scale. The diffusion head:
    its net with guidance and the arithmetic of a step. Raises BadInput where there is nothing of that kind.
    """
    options = dict(dynamic=False) if backend is None else dict(dynamic=False, backend=backend, fullgraph=True)
    generator = getattr(run.generator, "generator", run.generator)                    # behind a flow adapter
    head = generator.head
    found = []
    if hasattr(generator, "decode_step"):
        generator.sample = functools.partial(generator.sample, compile=backend or True)
        found.append("step of a token")
    elif hasattr(generator, "masked_loss"):
        generator.hidden = in_ranges(generator, torch.compile(generator.hidden, **options))
        found.append("passes of MAR")
    elif hasattr(generator, "scales"):
        generator.forward_blocks = torch.compile(generator.forward_blocks, **options)
        found.append("pass of each scale")
    elif hasattr(generator, "hidden_states"):
        generator.hidden_states = torch.compile(generator.hidden_states, **options)
        found.append("pass of MaskGIT")
    if hasattr(head, "denoise_step"):
        name = "denoise_step" if head.objective == "diffusion" else "predict"
        setattr(head, name, in_powers_of_two(torch.compile(getattr(head, name), **options)))
        found.append("diffusion head")
    if not found:
        raise BadInput(f"--compile: {run.folder} has nothing to compile, for its caches grow with each token "
                       "(--attention causal) and its head is a single layer; leave it out")
    seconds = sum(SECONDS[part] for part in found)
    print(f"compiling {', '.join(found)}: about {seconds} s on a CPU before the first batch", flush=True)


def in_ranges(model, hidden):
    """MAR.hidden, compiled, whose encoder keeps more tokens than are there: one of RANGES numbers of them."""
    width = -(-model.seq_len // RANGES)

    def rounded(tokens, labels, mask, n_visible=None):
        if n_visible is None:
            return hidden(tokens, labels, mask)
        n_visible = min(model.seq_len, max(1, -(-n_visible // width)) * width)
        return hidden(tokens, labels, mask, n_visible, ragged=True)
    return rounded


def in_powers_of_two(function):
    """A compiled DiffusionHead.denoise_step or .predict, for any number of rows in a few shapes.

    MAR draws another number of tokens in each pass. Zeros fill the rows up to a power of two; what comes out
    there is cut off. That is up to twice the work for the net, on average 1.4 times.
    """
    def padded(x, time, c, cfg, *row):
        shape = x.shape[:-1]
        n = math.prod(shape)
        more = (0, 0, 0, (1 << (n - 1).bit_length()) - n)
        c = c.reshape(*c.shape[:c.ndim - x.ndim], n, c.shape[-1])                     # ([2,] n, W)
        out = function(F.pad(x.reshape(n, -1), more), time, F.pad(c, more), cfg, *row)
        return tuple(y[:n].reshape(*shape, y.shape[-1]) for y in out)
    return padded
