"""
Models that are larger than one device: shares of the weights (--shard), recomputed activations
(--recompute).

A model that trains with AdamW in float32 takes 20 bytes per parameter: weights, averaged weights, gradient
and two moments, 4 bytes each. With FSDP2 (torch.distributed.fsdp.fully_shard) each of n processes keeps 1/n
of all five. Before a block computes, its weights are collected from all processes. After it they are dropped.

    parameter, moment, average (rows, columns)  =  DTensor: every process holds rows / n of it

A checkpoint holds whole tensors, so a run may go on with another number of processes, or without --shard.
Activations are not shared out by this: batches are. --recompute keeps only the input of each block and
computes the rest again in the backward pass.
"""
import copy
import functools

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint


def blocks_of(model):
    """The repeated layers, by the names of their classes: Block, ResBlock, ViTBlock and so on."""
    return [module for module in model.modules() if "Block" in type(module).__name__]


def recompute(model):
    """Keep no activations inside the blocks of a model. The random numbers of dropout are drawn as before."""
    for block in blocks_of(model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(model):
    """Compile each block by itself -> the model. What collects the weights stands between the graphs."""
    for block in blocks_of(model):
        block.forward = torch.compile(block.forward)
    return model


def shard(model, device, size):
    """Keep a share of each parameter, in place. To be called by all `size` processes before any optimizer."""
    from torch.distributed.device_mesh import init_device_mesh        # loads for a second: only where needed
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(device.type, (size,))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def is_shared(value):
    return hasattr(value, "full_tensor")                    # a DTensor, whose class takes a second to load


def whole(value):
    """A tensor of which each process holds a share -> all of it, on each. Others stay as they are."""
    return value.full_tensor() if is_shared(value) else value


def share_of(value, like):
    """A whole tensor -> this process's share of it, cut as `like` is. Nothing is sent."""
    if not is_shared(like):
        return value
    from torch.distributed.tensor import distribute_tensor
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


# ---- Checkpoints ---------------------------------------------------------------------------------

def gathered(state, keep=True):
    """Nested dicts and lists -> the same with whole tensors, on the CPU where they were shared out.

    All processes must call it, with the same keys in the same order. keep=False: their tensors are dropped as
    soon as they have been collected, for processes that write nothing.
    """
    if isinstance(state, dict):
        return {name: gathered(value, keep) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(gathered(value, keep) for value in state)
    if not is_shared(state):
        return state
    value = state.full_tensor()
    return value.cpu() if keep else None


def load(module, state):
    """load_state_dict for a module that may be shared out. state: whole tensors."""
    now = module.state_dict()
    module.load_state_dict({name: share_of(value, now.get(name)) for name, value in state.items()})


def load_optimizer(optimizer, state):
    """load_state_dict for an optimizer whose parameters may be shared out. state: whole tensors."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    shares = {}
    for i, values in state["state"].items():
        shares[i] = {name: share_of(value, params[i]) if value.shape == params[i].shape else value
                     for name, value in values.items()}
    optimizer.load_state_dict({**state, "state": shares})


def without_weights(model):
    """A copy of a model that takes no memory for parameters. Buffers are copied. Before shard()."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
             for p in model.parameters()}
    return copy.deepcopy(model, memo=empty)


def filled(model, shared):
    """A model from without_weights() with the weights of its shared twin: whole on every process.

    So that one process alone can draw, encode or measure: each call of a shared model needs all processes.
    """
    weights = {name: whole(value) for name, value in shared.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    return model
