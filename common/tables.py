"""
Arrays with a row per example, made once by all processes together and kept in a file.

    make(i, j) -> rows i .. j - 1 --fill--> {name: (n, ...)} --file--> on the device, or a memory map

Small arrays lie on the device. Large ones, such as the 42 GB of posteriors of ImageNet's images, stay in the
file: it is mapped into memory, which all processes of a machine share, and a batch is copied to the device.
Each process makes every so manyth part. The parts meet in a temporary file, so nothing is held twice.
"""
import contextlib
import math
import os

import torch

import data
from common import runs

SMALL = 1 / 4                                               # of the free memory: what may lie on the device


def fits(n_bytes, device):
    return n_bytes <= SMALL * data.free_bytes(device)


def fill(n, at_once, make, room, dist=None):
    """{name: (n, ...)}, made at_once rows at a time. room(name, shape, dtype) -> an empty array.

    dist: this process makes only its share of the parts. Their rows are not set elsewhere.
    """
    first, every = (dist.rank, dist.size) if dist else (0, 1)
    arrays = {}
    for i in range(first * at_once, n, every * at_once):
        j = min(i + at_once, n)
        for name, rows in make(i, j).items():
            if name not in arrays:
                arrays[name] = room(name, (n, *rows.shape[1:]), rows.dtype)
            arrays[name][i:j] = rows.to(arrays[name].device)
    return arrays


def room_on(device):
    """Room for fill(): on the device where the array is small, else on the CPU."""
    def room(name, shape, dtype):
        small = fits(math.prod(shape) * dtype.itemsize, device)
        return torch.empty(shape, dtype=dtype, device=device if small else "cpu")
    return room


def kept(path, key, n, at_once, make, device, dist):
    """What fill() makes, read from `path` if it was made for the same `key`, else made and saved there.

    To be called by all processes, in their run folder. A damaged file is made anew.
    """
    arrays = read(path, key, device)
    if arrays is not None:
        return arrays
    files = {}
    runs.wait_for_all(dist)                                 # until all have found that there is no such file

    def mapped(name, shape, dtype):
        files[name] = path.with_suffix(f".{name}.tmp")
        size = math.prod(shape)
        return torch.from_file(str(files[name]), shared=True, size=size, dtype=dtype).view(shape)

    def room(name, shape, dtype):
        if dist.size == 1 and fits(math.prod(shape) * dtype.itemsize, device):
            return torch.empty(shape, dtype=dtype, device=device)
        return mapped(name, shape, dtype)
    arrays = fill(n, at_once, make, room, dist)
    runs.wait_for_all(dist)                                 # until the last part is there
    if dist.rank == 0:
        runs.save_atomically(arrays | {"key": key}, path)
    runs.wait_for_all(dist)                                 # until it is saved
    if files or dist.size > 1:
        arrays = read(path, key, device)
        for file in files.values():
            with contextlib.suppress(OSError):              # another process was faster
                os.unlink(file)
    return arrays


def read(path, key, device):
    """The arrays in a file, on the device or as a memory map. None: no file, of another key, or damaged."""
    if not path.exists():
        return None
    with contextlib.suppress(Exception):                    # half a dozen kinds for a damaged file
        saved = runs.load_file(path, device, mmap=not fits(os.path.getsize(path), device))
        if saved.pop("key") == key:
            return saved
    return None


def take(array, index, device):
    """Rows of an array: index (B,) on the CPU -> (B, ...) on the device. The device is not waited for."""
    if not array.is_cpu:
        return array[index.to(device, non_blocking=True)]
    rows = array[index]
    if device.type == "cuda":
        rows = rows.pin_memory()
    return rows.to(device, non_blocking=True)
