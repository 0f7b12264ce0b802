"""
A GPU that is not there: CPU tensors that say they lie on cuda:0, and complain as CUDA tensors would.

    with pretend_gpu() as gpu:
        x = torch.randn(3, device="cuda")      # x.device is cuda:0
        x + torch.ones(3)                      # RuntimeError: ... at least two devices, cuda:0 and cpu
        x.sum().item()                         # counted in gpu.waits: ("item", "file.py", "main", 12)

The numbers are real: the CPU computes them, with the CPU's random generator. So are autograd, optimizers, and
the device that each tensor lies on. Pretended are that CUDA is available, has bfloat16 and 80 GB. Kernels,
streams and torch.compile are not covered, and autocast("cuda") becomes autocast("cpu").

Refused as on CUDA: operands on two devices (CUDA lets CPU tensors without dimensions join, and CPU tensors as
indices), pinning a CUDA tensor, .numpy() of one. Counted, by (what, file, function, line) of the project:

    gpu.waits     where Python waits until the device has computed: what is read back, and what is copied
                  there without non_blocking=True, for such a copy stands in line behind the kernels
    gpu.copies    where memory goes to the device, non-blocking ("async") or not
    gpu.doubles   where a float64 tensor comes to be on the device: MPS has none
"""
import contextlib
import functools
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")

# What makes Python wait until the device has computed.
WAITS = {
    Tensor.item: "item", Tensor.tolist: "tolist", Tensor.__float__: "float", Tensor.__int__: "int",
    Tensor.__bool__: "bool", Tensor.__index__: "index", Tensor.__format__: "format", Tensor.__repr__: "repr",
    Tensor.__contains__: "bool", Tensor.cpu: "cpu", Tensor.nonzero: "nonzero", torch.nonzero: "nonzero",
    Tensor.argwhere: "nonzero", Tensor.masked_select: "masked_select", Tensor.unique: "unique",
    torch.unique: "unique", Tensor.unique_consecutive: "unique", torch.unique_consecutive: "unique",
    Tensor.bincount: "bincount", torch.bincount: "bincount", Tensor.equal: "equal", torch.equal: "equal",
}
# What may take tensors of two devices.
MIXES = {
    Tensor.copy_,
    Tensor.type_as,
    Tensor.data.__set__,
    Tensor.grad.__set__,
    Tensor.view_as,
    Tensor.expand_as,
    Tensor.reshape_as,
    Tensor.__getitem__,
    Tensor.__setitem__,
    Tensor.index_put_,
    Tensor.to,
    torch._foreach_copy_,
    torch.is_same_size,
    torch._has_compatible_shallow_copy_type,
}
# No elementwise kernels: here not even a CPU tensor without dimensions may join.
STRICT = {
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.cat,
    torch.stack,
    torch.cdist,
    torch.searchsorted,
    torch.bucketize,
    Tensor.gather,
    Tensor.scatter,
    Tensor.index_select,
    Tensor.index_add_,
    Tensor.index_copy_,
    F.embedding,
    F.linear,
    F.conv2d,
    F.conv3d,
    F.cross_entropy,
    F.scaled_dot_product_attention,
    F.pad,
}
# The result lies where the first operand does.
ON_FIRST = {Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put_, Tensor.copy_}
TWO_DEVICES = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"


class OnGPU(Tensor):
    """A CPU tensor that says it lies on cuda:0."""
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __format__(self, spec):                             # torch's own asks for the class Tensor itself
        return self.item().__format__(spec) if self.ndim == 0 else object.__format__(self, spec)

    def __deepcopy__(self, memo):
        with torch._C.DisableTorchFunction():
            copied = self.as_subclass(Tensor).detach().clone(memory_format=torch.preserve_format)
            copied = copied.as_subclass(OnGPU).requires_grad_(self.requires_grad)
            copied.__dict__.update(self.__dict__)           # _is_param, which makes it a Parameter
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol):                      # a checkpoint holds plain tensors
        with torch._C.DisableTorchFunction():
            return self.as_subclass(Tensor).detach().__reduce_ex__(protocol)


def to_gpu(tensor):
    return tensor if isinstance(tensor, OnGPU) else tensor.as_subclass(OnGPU)


def plain(tensor):
    with torch._C.DisableTorchFunction():
        return tensor.as_subclass(Tensor)


def tensors_in(values, found=None):
    """The tensors among values, and in tuples, lists and dicts among them -> list."""
    found = [] if found is None else found
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            tensors_in(value, found)
        elif isinstance(value, dict):
            tensors_in(value.values(), found)
    return found


def mapped(value, kind, change):
    """value with change(x) for every x of this kind in nested tuples, lists and dicts."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return type(value)((name, mapped(item, kind, change)) for name, item in value.items())
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return type(value)([mapped(item, kind, change) for item in value])
    return value


def asked_device(func, args, kwargs):
    """The device that a call names, or None."""
    asked = kwargs.get("device")
    if func is Tensor.to:
        for value in (*args[1:], *kwargs.values()):
            if isinstance(value, (torch.device, Tensor, str)):
                asked = value
                break
    if func is Tensor.cuda:
        asked = GPU
    if func is Tensor.cpu:
        asked = CPU
    if isinstance(asked, Tensor):
        asked = asked.device
    return None if asked is None else torch.device(asked)


@functools.cache
def inside(root, path):
    return str(Path(path).relative_to(root))


class Pretend(TorchFunctionMode):
    """Every torch function passes through here: it checks devices, counts, and computes on the CPU."""

    def __init__(self, root):
        super().__init__()
        self.root = str(root)
        self.waits = Counter()
        self.copies = Counter()
        self.doubles = Counter()

    def caller(self, kind):
        """(kind, file, function, line) of the project's line that called, or (kind, "torch", "", 0)."""
        frame = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            if code.co_filename.startswith(self.root) and code.co_filename != __file__:
                return kind, inside(self.root, code.co_filename), code.co_qualname, frame.f_lineno
            frame = frame.f_back
        return kind, "torch", "", 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs)
        if func is Tensor.device.__get__:
            return GPU if isinstance(args[0], OnGPU) else CPU
        if func is Tensor.is_cuda.__get__:
            return isinstance(args[0], OnGPU)

        found = tensors_in(kwargs.values(), tensors_in(args))
        others = [x for x in found if not isinstance(x, OnGPU)]
        ours = len(others) < len(found)
        asked = asked_device(func, args, kwargs)
        there = ours if asked is None else asked.type == "cuda"                       # where the result lies
        if ours:
            self.refuse(func, args, others)
        if ours or there:
            self.count(func, args, kwargs, ours, others, asked, there)
        if func in ON_FIRST and found:
            there = isinstance(args[0], OnGPU)
            self.refuse_index(func, args)
        if func is Tensor.pin_memory:
            return args[0]

        if asked is not None:
            args = [CPU if is_cuda_name(x) else x for x in args]
            kwargs = {name: CPU if is_cuda_name(x) else x for name, x in kwargs.items()}
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu) and there != ours and out is args[0]:
            with torch._C.DisableTorchFunction():
                out = out.clone()                           # another device is another memory
        if func is Tensor.type_as:
            there = isinstance(args[1], OnGPU)
        if not there:
            return mapped(out, OnGPU, plain) if ours else out
        if any(x.dtype == torch.float64 for x in tensors_in([out])):
            self.doubles[self.caller(name_of(func))] += 1
        with torch._C.DisableTorchFunction():
            return mapped(out, Tensor, to_gpu)

    def refuse(self, func, args, others):
        """Raise what CUDA would raise, where a tensor of the device takes part."""
        if others and func not in MIXES:
            name = name_of(func)
            strangers = [x for x in others if x.ndim or func in STRICT]
            if strangers and not name.startswith("__get__"):
                raise RuntimeError(f"{TWO_DEVICES} ({name} with a CPU tensor {tuple(strangers[0].shape)})")
            in_place = name.endswith("_") and not name.startswith("__")
            if in_place and isinstance(args[0], Tensor) and not isinstance(args[0], OnGPU):
                raise RuntimeError(f"{TWO_DEVICES} ({name} of a CPU tensor)")
        if func in (Tensor.numpy, Tensor.__array__):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to "
                "host memory first.")
        if func is Tensor.pin_memory:
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def refuse_index(self, func, args):
        """Raise what CUDA would raise, for an index on the device into a CPU tensor."""
        if func is not Tensor.copy_ and not isinstance(args[0], OnGPU):
            if any(isinstance(i, OnGPU) for i in tensors_in([args[1]])):
                raise RuntimeError(
                    "indices should be either on cpu or on the same device as the indexed tensor (cpu)")

    def count(self, func, args, kwargs, ours, others, asked, there):
        """Note where Python waits for the device, and where memory goes there."""
        if ours and func in WAITS:
            self.waits[self.caller(WAITS[func])] += 1
        if ours and func is Tensor.to and asked is not None and asked.type == "cpu":
            self.waits[self.caller("to cpu")] += 1
        if ours and func in (torch.repeat_interleave, Tensor.repeat_interleave):
            if len(args) > 1 and isinstance(args[1], Tensor):
                self.waits[self.caller("repeat_interleave")] += 1
        if ours and func is Tensor.copy_:
            if not isinstance(args[0], OnGPU):
                self.waits[self.caller("copy_")] += 1
            elif not isinstance(args[1], OnGPU):
                self.arrive("copy_", kwargs)
        if func in (Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put_) and isinstance(args[0], OnGPU):
            index = tensors_in([args[1]])
            one_number = func is Tensor.__setitem__ and (
                not isinstance(args[2], Tensor) or args[2].numel() == 1)              # masked_fill
            if any(i.dtype in (torch.bool, torch.uint8) for i in index) and not one_number:
                self.waits[self.caller("boolean index")] += 1
            if any(not isinstance(i, OnGPU) for i in index):
                self.arrive("index", kwargs)
        if there and not ours and asked is not None and others and others[0].numel():
            self.arrive("to", kwargs)
        if there and not ours and func in (torch.tensor, torch.as_tensor):
            self.arrive("tensor", kwargs)

    def arrive(self, kind, options):
        """Memory goes to the device. Without non_blocking Python waits until it is there."""
        if options.get("non_blocking"):
            self.copies[self.caller("async")] += 1
        else:
            self.copies[self.caller(kind)] += 1
            self.waits[self.caller(kind)] += 1


def name_of(func):
    return getattr(func, "__name__", str(func))


def is_cuda_name(value):
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.startswith("cuda")


@contextlib.contextmanager
def pretend_gpu(root=ROOT):
    """Inside the with block CUDA seems to be there. root: the folder whose lines are counted."""
    mode = Pretend(root)
    saved = []

    def patch(where, name, value):
        saved.append((where, name, getattr(where, name)))
        setattr(where, name, value)

    answers = dict(_lazy_init=None, is_available=True, is_bf16_supported=True, device_count=1,
                   current_device=0, mem_get_info=(80 << 30, 80 << 30), get_device_name="no GPU at all",
                   get_device_capability=(9, 0), manual_seed=None, manual_seed_all=None, synchronize=None,
                   set_device=None, set_rng_state=None, get_rng_state=torch.zeros(16, dtype=torch.uint8),
                   max_memory_allocated=0, memory_allocated=0, set_sync_debug_mode=None,
                   reset_peak_memory_stats=None, empty_cache=None)
    for name, answer in answers.items():
        patch(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)

    real_load = torch.load
    real_save = torch.save
    real_autocast = torch.autocast
    real_group = torch._C._group_tensors_by_device_and_dtype

    def load(file, map_location=None, **options):
        with torch._C.DisableTorchFunction():
            state = real_load(file, map_location="cpu", **options)
            there = map_location is not None and not callable(map_location)
            there = there and torch.device(map_location).type == "cuda"
            return mapped(state, Tensor, to_gpu) if there else state

    def save(*args, **options):
        with torch._C.DisableTorchFunction():
            real_save(*args, **options)

    def autocast(kind, *args, **kwargs):
        return real_autocast("cpu" if kind == "cuda" else kind, *args, **kwargs)

    def group(lists, with_indices=False):                   # what optimizers and clip_grad_norm_ ask, in C++
        groups = real_group(lists, with_indices).items()
        return {(GPU if isinstance(found[0][0][0], OnGPU) else key[0], key[1]): found
                for key, found in groups}

    patch(torch, "load", load)
    patch(torch, "save", save)
    patch(torch, "autocast", autocast)
    patch(torch._C, "_group_tensors_by_device_and_dtype", group)
    future = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)              # .to() makes new parameters
    try:
        with mode:
            yield mode
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(future)
        for where, name, value in reversed(saved):
            setattr(where, name, value)
