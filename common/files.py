"""
A path of your own -> uint8 tensors: many files read by several threads, kept in a cache file; arrays.

read_files() is all that data.py calls: a folder or an archive (see folders.py), or an .npz or .npy of images.
"""
import contextlib
import hashlib
import io
import os
import posixpath
import re
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from common.folders import arrange, caption_readers, hold_out, list_path, told
from common.reading import (BadInput, NeedsPackage, clips_of, free_bytes, orientation, printable, read_clip,
                            read_image, reason, square)


# ---- Reading many --------------------------------------------------------------------------------

WORTH_KEEPING = 0.5                                         # seconds of reading, from which on a set is kept


class StreamedFiles:
    """Images decoded when they are asked for, by a few threads: for sets that do not fit into memory.

    read_ahead() begins with those that are asked for next, while the device computes.
    """

    def __init__(self, files, image_size):
        self.files = files
        self.image_size = image_size
        self.pool = ThreadPoolExecutor(workers())
        self.next = []                                      # positions that are being read ...
        self.reading = []                                   # ... and the results that will come

    def read_ahead(self, index):
        self.next = index.tolist()
        self.reading = [self.pool.submit(read_image, *self.files[i], self.image_size) for i in self.next]

    def __getitem__(self, index):
        """index (B,) int64 -> (B, 3, H, W) uint8."""
        if index.tolist() != self.next:
            self.read_ahead(index)
        images = torch.stack([result.result() for result in self.reading])
        self.next = self.reading = []
        return images


def workers():
    """Threads that decode: Pillow lets go of Python's lock while it works."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, 2 * cores)


def in_threads(function, n, what):
    """[function(0), ..., function(n - 1)], by several threads; after 2 seconds with a counter line."""
    results = []
    begin = time.perf_counter()
    shown = begin + 2 if os.environ.get("RANK", "0") == "0" else float("inf")         # when to write next
    live = sys.stderr.isatty()
    end = "\r" if live else "\n"
    with ThreadPoolExecutor(workers()) as pool:
        for start in range(0, n, 1024):  # not all at once: a million waiting calls take a gigabyte
            for result in pool.map(function, range(start, min(start + 1024, n))):
                results.append(result)
                now = time.perf_counter()
                if now > shown:
                    left = (now - begin) / len(results) * (n - len(results))
                    line = f"{what}: {len(results)} of {n}, {left:.0f} s left "
                    print(line, end=end, file=sys.stderr, flush=True)
                    shown = now + (0.5 if live else 10)
    if live and time.perf_counter() > begin + 2:
        print(" " * 70, end="\r", file=sys.stderr)
    return results


def decode_images(files, image_size):
    """Files [(name, opener)] -> images (N, 3, H, W) uint8, bad {position: sentence}, oblong (a count)."""
    images = torch.zeros(len(files), 3, image_size, image_size, dtype=torch.uint8, device="cpu")

    def decode(i):
        try:
            pixels, was_square = square(*files[i], image_size)
        except BadInput as e:
            return str(e), True
        images[i] = torch.from_numpy(pixels).permute(2, 0, 1)
        return None, was_square
    outcome = in_threads(decode, len(files), "reading images")
    bad = {i: sentence for i, (sentence, _) in enumerate(outcome) if sentence}
    return dict(images=images, bad=bad, oblong=sum(not was_square for _, was_square in outcome))


def check_images(files, image_size):
    """What decode_images finds bad, for a set too large for memory -> bad {position: sentence}."""
    def check(i):
        try:
            square(*files[i], image_size)
        except BadInput as e:
            return str(e)
    outcome = in_threads(check, len(files), "--skip_bad: reading every image once")
    return dict(bad={i: sentence for i, sentence in enumerate(outcome) if sentence})


def decode_clips(files, image_size, frames, frame_step, fits):
    """Files [(name, opener)] -> images (N, 3, F, H, W) uint8, owner (N positions in files), bad as above.

    fits: bytes of memory there are for them. Raises ValueError where they are more.
    """
    size = 3 * frames * image_size ** 2
    taken = [0]

    def decode(i):
        if taken[0] > fits:
            return []
        try:
            windows = read_clip(*files[i], image_size, frames, frame_step)
        except NeedsPackage:
            raise
        except BadInput as e:
            return str(e)
        taken[0] += len(windows) * size  # by several threads: nearly right, which is enough
        return windows
    outcome = in_threads(decode, len(files), "reading clips")
    if taken[0] > fits:
        raise ValueError("the clips do not fit")
    bad = {i: windows for i, windows in enumerate(outcome) if isinstance(windows, str)}
    good = [(i, window) for i, windows in enumerate(outcome) if i not in bad for window in windows]
    images = torch.zeros(0, dtype=torch.uint8, device="cpu")
    if good:
        images = torch.stack([window for _, window in good])
    return dict(images=images, owner=[i for i, _ in good], bad=bad)


def cached(folder, path, key, what, make):
    """make() -> a dict, kept in a file in `folder` (None: not kept) as long as `key` stays the same.

    One file for each path and kind of set, so that old ones do not pile up. A damaged one is made anew.
    """
    if folder is None:
        return make()
    stem = re.sub(r"\W+", "-", Path(path).stem)[:40]
    mark = hashlib.sha1(repr((os.path.abspath(path), what)).encode()).hexdigest()[:10]
    file = Path(folder) / f"{stem}-{mark}.pt"
    key = hashlib.sha1(repr((1, key)).encode("utf-8", "backslashreplace")).hexdigest()
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        if saved["key"] == key and saved["sum"] == checksum(saved):
            return saved
    except Exception:                                       # there is none, or it is damaged
        pass
    begin = time.perf_counter()
    made = make()
    size = made["images"].numel() if "images" in made else 0
    quick = time.perf_counter() - begin < WORTH_KEEPING     # to read again takes no longer
    mendable = "images" in made and made["bad"]             # what cannot be read today may be tomorrow
    if quick or mendable or os.environ.get("RANK", "0") != "0":
        return made
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for old in file.parent.glob(f"{file.name}.*.tmp"):  # of a program that was killed while it wrote
            old.unlink()
        room = os.statvfs(file.parent) if hasattr(os, "statvfs") else None
        if room is None or room.f_bavail * room.f_frsize > 2 * size:
            torch.save(dict(made, key=key, sum=checksum(made)), temporary)
            os.replace(temporary, file)
    except (OSError, RuntimeError) as e:                    # torch turns a full disk into a RuntimeError
        print(f"note: the images read are not kept for the next time ({reason(e)})")
        with contextlib.suppress(OSError):
            temporary.unlink()
    return made


def checksum(saved):
    """CRC-32 of what cached() keeps, pixels and the rest."""
    rest = [saved.get(name) for name in ("bad", "owner", "oblong")]
    rest = zlib.crc32(repr(rest).encode())
    return zlib.crc32(saved["images"].numpy().reshape(-1).data, rest) if "images" in saved else rest


def refuse_bad(bad, files, skip_bad, kind):
    """Stop at unreadable files, or with --skip_bad say in a line that they are left out."""
    if not bad:
        return
    first = min(bad)
    if not skip_bad:
        more = f" ({len(bad)} of {len(files)} files are like that)" if len(bad) > 1 else ""
        raise BadInput(bad[first] + more)
    short = " that are unreadable or too short" if kind == "clip" else ""
    which = f"{kind}s{short}" if short else f"unreadable {kind}s"
    print(f"--skip_bad: left out {len(bad)} {which}, the first is {printable(files[first][0])}")


def images_in_memory(files, image_size, keep):
    """Files [(name, opener)] -> images (N, 3, H, W) uint8, good (N positions in files), bad, oblong.

    keep(what, make): cached() for this path and its files.
    """
    decoded = keep((image_size,), lambda: decode_images(files, image_size))
    good = [i for i in range(len(files)) if i not in decoded["bad"]]
    images = decoded["images"] if not decoded["bad"] else decoded["images"][good]
    return dict(decoded, images=images, good=good)


def images_streamed(path, files, image_size, keep, skip_bad):
    """As images_in_memory, for a set that does not fit: images is StreamedFiles, and nothing is oblong."""
    if not path.is_dir():
        raise BadInput(f"--data {printable(path)}: {len(files)} images at {image_size} pixels do not fit "
                       "into memory, and an archive cannot be streamed: unpack it and name the folder")
    bad = {}
    if skip_bad:
        bad = keep((image_size, "checked"), lambda: check_images(files, image_size))["bad"]
    good = [i for i in range(len(files)) if i not in bad]
    return dict(images=StreamedFiles([files[i] for i in good], image_size), good=good, bad=bad, oblong=0)


def clips_in_memory(path, files, image_size, frames, frame_step, keep, fits):
    """As images_in_memory; images is (N, 3, F, H, W) uint8, several of them from a long film."""
    try:
        decoded = keep((image_size, frames, frame_step),
                       lambda: decode_clips(files, image_size, frames, frame_step, fits))
    except ValueError:
        raise BadInput(f"--data {printable(path)}: more clips of {frames} frames at {image_size} pixels than "
                       "fit into memory: give less of --frames or --image_size, or fewer files") from None
    return dict(decoded, good=decoded["owner"], oblong=0)


def read_captions(found, names):
    """-> the captions of the images in a Listing, or None unless each has one; names of those without."""
    captions = caption_readers(found, names)
    missing = [name for name, read in zip(names, captions) if read is None]
    if missing:
        return None, missing
    return in_threads(lambda i: captions[i](), len(names), "reading captions"), missing


def read_files(path, image_size, split, frames=1, frame_step=None, skip_bad=False, fits=None, cache=None):
    """One split of what lies in a path -> images, labels [int], classes, texts or None, summary in words.

    images: (N, 3, [F,] H, W) uint8, or StreamedFiles where they take more than `fits` bytes (default: half of
    the free memory). split: "train" or another. cache: a folder to keep what was decoded, for the next time.
    """
    path = Path(path)
    fits = free_bytes("cpu") // 2 if fits is None else fits
    kind = "image" if frames == 1 else "clip"
    if path.suffix.lower() in (".npz", ".npy") and path.is_file():
        if kind == "clip":
            raise BadInput(f"--data {printable(path)}: clips are read from class folders or an archive of "
                           f"them, not from an {path.suffix}")
        return read_array(path, image_size, split, skip_bad, fits, cache)
    found = list_path(path, skip_bad)
    openers = found.pictures
    if kind == "clip":
        openers = dict(clips_of([*found.pictures.items(), *found.films.items()]))
    else:
        for name in found.films:
            found.leave_out("films (--frames reads them)", name)
    sets = arrange(found, kind, openers)
    rows = sets.train if split == "train" else sets.val
    names = [name for name, _ in rows]
    labels = [sets.classes.index(label) for _, label in rows]
    files = [(f"{path}/{name}", openers[name]) for name in names]

    stamped = names if kind == "image" else [*found.pictures, *found.films]
    stamps = [(name, found.stamps.get(name)) for name in stamped]
    key = stamps if kind == "image" else (names, stamps)
    keep = lambda what, make: cached(cache, path, key, (split, *what), make)
    texts, missing = read_captions(found, names) if kind == "image" else (None, [])
    if kind == "clip":
        decoded = clips_in_memory(path, files, image_size, frames, frame_step, keep, fits // 2)
    elif len(files) * 3 * image_size ** 2 > fits:
        decoded = images_streamed(path, files, image_size, keep, skip_bad)
    else:
        decoded = images_in_memory(files, image_size, keep)
    good = decoded["good"]
    refuse_bad(decoded["bad"], files, skip_bad, kind)
    if {labels[i] for i in good} != set(labels):
        raise BadInput(f"--data {printable(path)}: without its unreadable "
                       f"{'and short ' * (kind == 'clip')}{kind}s a class is empty")

    notes = [f"left out: {told(found.left_out)}"] if found.left_out else []
    notes += middle_square(decoded["oblong"])
    if texts is not None:
        notes.append("each has a caption")
    elif missing and len(missing) < len(names):
        notes.append(f"{len(names) - len(missing)} of {len(names)} have a caption, {printable(missing[0])} "
                     "has none")
    return SimpleNamespace(
        images=decoded["images"],
        labels=[labels[i] for i in good],
        classes=[printable(name) for name in sets.classes],
        texts=[texts[i] for i in good] if texts else None,
        without_text=[printable(name) for name in missing],
        summary=summary(path, sets.train, sets.val, sets.how, kind, notes),
        head=summary(path, sets.train, sets.val, sets.how, kind, []),
        left_out=told(found.left_out),
        unreadable=len(decoded["bad"]),
        oblong=decoded["oblong"],
    )


def middle_square(oblong):
    """The line of a summary, as a list, that tells of so many images that are not square."""
    return [f"{oblong} are not square: of those, the middle square is taken"] if oblong else []


def read_pairs(path, image_size, split):
    """Pairs of pictures -> inputs, targets, each (N, 3, H, W) uint8. Every tenth pair is of split "val".

    a.jpg beside a.target.jpg, or input/a.jpg and target/a.png in two folders. Raises BadInput where a picture
    is alone, has two partners, or another size than its partner.
    """
    path = Path(path)
    where = f"--data {printable(path)}"
    found = list_path(path)
    sides = dict(input={}, target={})
    for name in sorted(found.pictures):
        stem = posixpath.splitext(name)[0]
        parts = stem.split("/")
        is_target = stem.endswith(".target") or "target" in parts[:-1]
        key = "/".join(part for part in parts if part not in ("input", "target")).removesuffix(".target")
        side = sides["target" if is_target else "input"]
        if key in side:
            raise BadInput(f"{where}: {printable(side[key])} and {printable(name)} would be one side of the "
                           "same pair: rename or remove one")
        side[key] = name
    if not sides["target"] or not sides["input"]:
        raise BadInput(f"{where}: no pairs in it: put a.target.jpg beside a.jpg, or files of the same names "
                       "into two folders, input/ and target/")
    for side, other in (("input", "target"), ("target", "input")):
        alone = sorted(sides[side].keys() - sides[other].keys())
        if alone:
            more = f" ({len(alone)} are like that)" if len(alone) > 1 else ""
            raise BadInput(f"{where}: {printable(sides[side][alone[0]])} has no {other} of the same "
                           f"name{more}: add it, or remove the picture")
    keys = sorted(sides["input"])
    if len(keys) < 10:
        raise BadInput(f"{where}: {len(keys)} pairs; at least 10, for every tenth is held out")
    if len(keys) * 6 * image_size ** 2 > free_bytes("cpu") // 2:
        raise BadInput(f"{where}: {len(keys)} pairs at {image_size} pixels do not fit into memory: give less "
                       "of --image_size")
    for key in keys:
        names = sides["input"][key], sides["target"][key]
        first, second = (picture_size(found.pictures[name]) for name in names)
        if first and second and first != second:
            raise BadInput(f"{where}: {printable(names[0])} has {first[0]} x {first[1]} pixels and its "
                           f"target {second[0]} x {second[1]}: give both one size")
    keys = [key for i, key in enumerate(keys) if (i % 10 == 9) == (split != "train")]
    images = []
    for side in sides.values():
        openers = [(f"{path}/{side[key]}", found.pictures[side[key]]) for key in keys]
        decoded = decode_images(openers, image_size)
        refuse_bad(decoded["bad"], openers, False, "image")
        images.append(decoded["images"])
    return images


def picture_size(opener):
    """Bytes of a picture, read by opener() -> (width, height) as it is shown; None where it is unreadable."""
    try:
        with Image.open(io.BytesIO(opener())) as image:
            return image.size[::-1] if orientation(image) > 4 else image.size
    except Exception:                                       # decode_images says what is wrong
        return None


def summary(path, train, val, how, kind, notes):
    """What train.py prints before it trains: rows are (name, class)."""
    counts = Counter(label for _, label in [*train, *val])
    names = [f"{printable(name)} ({n})" for name, n in sorted(counts.items())]
    which = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    classes = f"1 class: {which}" if len(names) == 1 else f"{len(names)} classes: {which}"
    lines = [f"{printable(path)}: {len(train) + len(val)} {kind}s in {classes}",
             f"{len(train)} to learn from, {len(val)} held out ({how})", *notes]
    return "\n    ".join(lines)


# ---- Arrays --------------------------------------------------------------------------------------

# Names in .npz files of this project, of FID tools, of others.
PAIRS = [("images", "labels"), ("arr_0", "arr_1"), ("arr_0", "labels"), ("x", "y"),
         ("train_images", "train_labels"), ("x_train", "y_train")]
VAL_PAIRS = {"train_images": [("val_images", "val_labels"), ("test_images", "test_labels")],
             "x_train": [("x_val", "y_val"), ("x_test", "y_test")]}


def open_arrays(path):
    """An .npz or .npy -> its names, and a function (name) -> array. Nothing pickled is opened."""
    def safely(read):
        try:
            return read()
        except Exception as e:                              # zipfile, zlib, tokenize, and numpy's own
            why = "no arrays of numbers or words in NumPy's format" if "pickle" in str(e) else reason(e)
            raise BadInput(f"--data {printable(path)}: not a readable {path.suffix} ({why})") from None
    if path.suffix.lower() == ".npy":
        array = safely(lambda: np.load(path, mmap_mode="r", allow_pickle=False))
        return ["images"], lambda name: array
    archive = safely(lambda: np.load(path, allow_pickle=False))
    if not hasattr(archive, "files"):
        return ["images"], lambda name: archive             # an .npy under another name

    def read(name):
        member = name if name in archive.zip.namelist() else name + ".npy"
        size = archive.zip.getinfo(member).file_size
        if size > free_bytes("cpu") // 2:
            raise BadInput(f"--data {printable(path)}: `{printable(name)}` takes {size / 2**30:,.1f} GB, "
                           "more than half of the free memory")
        return safely(lambda: archive[name])
    return archive.files, read


def as_pictures(where, array):
    """(N, H, W[, C]) or (N, C, H, W) uint8 -> (N, H, W, 3 or 4) uint8."""
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim == 4 and array.shape[-1] not in (1, 3, 4) and array.shape[1] in (1, 3, 4):
        array = array.transpose(0, 2, 3, 1)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        remedy = ""
        if array.dtype.kind == "f":
            remedy = "; floats in 0 .. 1: save (255 * images).round().astype(np.uint8)"
        raise BadInput(f"{where} must be (N, H, W, 3) uint8, not {array.shape} {array.dtype}{remedy}")
    return array.repeat(3, -1) if array.shape[-1] == 1 else array


def as_labels(where, array, n):
    """Labels (N,) or (N, 1), whole numbers or names -> (N,), and which rows have one: a float may be NaN."""
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.shape != (n,) or array.dtype.kind not in "biufUS":
        raise BadInput(f"{where} must be ({n},) whole numbers or names, one for each image, not "
                       f"{array.shape} {array.dtype}")
    known = np.ones(n, bool)
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8", "replace")
    if array.dtype.kind == "f":
        known = np.isfinite(array)
        broken = array[known][array[known] % 1 != 0]
        if len(broken):
            raise BadInput(f"{where} must be whole numbers or names, not such as {broken[0]}")
        array = np.where(known, array, 0).astype(np.int64)
    return array.astype(np.int64) if array.dtype.kind == "b" else array, known


def name_classes(where, values, names):
    """The values that occur as labels, sorted, and the array `classes` or None -> a name for each value."""
    if names is None:
        return [printable(value) for value in values]
    names = [printable(name) for name in np.ravel(names)]
    if values.dtype.kind == "U":
        return [printable(value) for value in values]
    if values.min() >= 0 and values.max() < len(names):
        return [names[value] for value in values]
    if len(names) == len(values):                           # counted from 1, for example
        return names
    raise BadInput(f"{where}: `classes` has {len(names)} names, but the labels go from {values.min()} to "
                   f"{values.max()}")


def find_arrays(shown, keys):
    """The names of an .npz -> the names of its images and of their labels, which may be missing."""
    pairs = [pair for pair in PAIRS if pair[0] in keys]
    pairs = [pair for pair in pairs if pair[1] in keys] or pairs
    if not pairs:
        holds = ", ".join(printable(name) for name in keys[:9]) or "nothing"
        raise BadInput(f"{shown}: an .npz needs the array `images` (N, H, W, 3) uint8 and, for classes, "
                       f"`labels` (N,); it holds {holds}")
    return pairs[0]


def find_val_arrays(keys, key, key_labels):
    """The names of an .npz's own validation images and labels, or None: with labels where `key` has them."""
    for pair in VAL_PAIRS.get(key, ()):
        if pair[0] in keys and (pair[1] in keys) == (key_labels in keys):
            return pair


def read_pair(shown, keys, read, key, key_labels):
    """-> images (N, H, W, 3 or 4) uint8, their labels (N,), and which have one (N,); see open_arrays."""
    images = as_pictures(f"{shown}: `{key}`", read(key))
    if key_labels not in keys:
        return images, np.full(len(images), "images"), np.ones(len(images), bool)
    return images, *as_labels(f"{shown}: `{key_labels}`", read(key_labels), len(images))


def hold_out_rows(shown, labels, known):
    """Labels (N,) -> the rows to learn from, the rows held out, and in words how: a tenth of each class."""
    rows = np.flatnonzero(known)
    if len(rows) <= len(np.unique(labels[rows])):
        raise BadInput(f"{shown}: it takes more than one image in at least one class, to hold out one for "
                       f"validation; here are {len(rows)} in all")
    held, how = hold_out(labels[rows].tolist())
    return rows[~held], rows[held], how


def refuse_unlabelled(shown, key_labels, known, skip_bad):
    """Stop where a label is NaN, or with --skip_bad say in a line that such images are left out."""
    unlabelled = np.flatnonzero(~known)
    if len(unlabelled) == 0:
        return
    if not skip_bad:
        raise BadInput(f"{shown}: `{key_labels}`[{unlabelled[0]}] is not a number ({len(unlabelled)} of "
                       f"{len(known)} are not); mend it, or leave such images out with --skip_bad")
    print(f"--skip_bad: left out {len(unlabelled)} images without a label, the first is number "
          f"{unlabelled[0]}")


def read_array(path, image_size, split, skip_bad, fits, cache):
    """An .npz with `images` (N, H, W, 3) uint8 and `labels` (N,), or only images; `classes` names the labels.

    As read_files. A tenth of each class is held out, unless the file has arrays for validation (PAIRS,
    VAL_PAIRS).
    """
    shown = f"--data {printable(path)}"
    keys, read = open_arrays(path)
    key, key_labels = find_arrays(shown, keys)
    images, labels, known = read_pair(shown, keys, read, key, key_labels)
    values = np.unique(labels[known])
    if len(values) == 0:
        raise BadInput(f"{shown}: `{key_labels}` holds no labels")
    named = "classes" in keys and key_labels in keys
    classes = name_classes(shown, values, read("classes") if named else None)

    left_out = ""
    own = find_val_arrays(keys, key, key_labels)
    if own:
        val_images, val_labels, val_known = read_pair(shown, keys, read, *own)
        rows = np.flatnonzero(known)
        val_rows = np.flatnonzero(val_known & np.isin(val_labels, values))
        how = f"`{own[0]}`"
        strange = len(val_labels) - len(val_rows)
        if strange:
            left_out = f"{strange} of `{own[0]}` with labels that no training image has"
    else:
        val_images, val_labels = images, labels
        rows, val_rows, how = hold_out_rows(shown, labels, known)
    refuse_unlabelled(shown, key_labels, known, skip_bad)
    name_of = dict(zip(values.tolist(), classes))
    train = [(i, name_of[label]) for i, label in zip(rows.tolist(), labels[rows].tolist())]
    val = [(i, name_of[label]) for i, label in zip(val_rows.tolist(), val_labels[val_rows].tolist())]

    chosen, source = (train, images) if split == "train" else (val, val_images)
    if len(chosen) * 3 * image_size ** 2 > fits:
        raise BadInput(f"{shown}: {len(chosen)} images at {image_size} pixels do not fit into memory: give "
                       "less of --image_size")
    files = [(f"{path}[{i}]", lambda i=i: np.asarray(source[i])) for i, _ in chosen]
    stamp = os.stat(path)
    decoded = cached(cache, path, (stamp.st_size, stamp.st_mtime_ns, key, chosen), (split, image_size),
                     lambda: decode_images(files, image_size))
    refuse_bad(decoded["bad"], files, False, "image")
    notes = middle_square(decoded["oblong"])
    if left_out:
        notes.append(f"left out: {left_out}")
    return SimpleNamespace(
        images=decoded["images"],
        labels=[classes.index(name) for _, name in chosen],
        classes=classes,
        texts=None,
        without_text=[],
        summary=summary(path, train, val, how, "image", notes),
        head=summary(path, train, val, how, "image", []),
        left_out=left_out,
        unreadable=np.count_nonzero(~known) if split == "train" else 0,
        oblong=decoded["oblong"],
    )
