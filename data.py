"""
Images to learn from: a drawn world that needs no download, and your own folders.

The drawn world has ten shapes in eight colours on five backgrounds, at any place, size and rotation.
Every picture is a pure function of (seed, index): a hash gives the random numbers, a signed distance
function gives the shape. A signed distance d(p) is negative inside the shape and positive outside, so
one formula draws an anti-aliased edge at any resolution, with w the width of a pixel:

    pixel(p) = a * foreground + (1 - a) * background,        a = clamp(1/2 - d(p) / w, 0, 1)

The same world answers four questions: which class (labels), what is said of it (captions), which
pixels (masks and distances), and what happens (videos with an action label).

Shapes:  B batch, N images in a set, F frames, H W pixels
    index (B,) --hash--> label, colour, place, size, angle (B,) --distance--> images (B, 3, H, W) in [-1, 1]
    clips: index (B,) --> videos (B, 3, F, H, W) in [-1, 1]

    python data.py             # draws data.png: the ten classes, captions, masks, clips; about 10 s on 2 CPU cores
    python data.py --data PATH # the same for your images: one folder per class, or .tar[.gz], .zip, .npz

With --frames 17 the files are clips: GIFs, animated WebPs, folders of pictures, or films (see read_clip).

Try it yourself:
  1. Add a class: a heart is the union of a rotated square and two discs. Add it to SHAPES and distance().
  2. Draw with image_size=8. Which classes can you still tell apart? Can the classifier of evaluate.py?
  3. Replace clamp() by a hard threshold in draw_scene. How does the PSNR of a trained vae.py change?
"""
import argparse
import io
import math
import re
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import pictures

SHAPES = ("disc", "triangle", "square", "pentagon", "star", "trefoil", "ring", "cross", "bar", "crescent")
ACTIONS = ("moves left", "moves right", "moves up", "moves down", "grows", "shrinks",
           "turns left", "turns right", "blinks", "rests")
TURNABLE = (1, 2, 4, 5, 7, 8, 9)                           # the shapes on which a person sees a rotation
COLOURS = {"red": (230, 40, 40), "orange": (250, 145, 30), "yellow": (245, 230, 60), "green": (60, 200, 70),
           "cyan": (60, 215, 225), "blue": (75, 110, 250), "purple": (190, 80, 230), "white": (240, 240, 240)}
BACKGROUNDS = {"black": (12, 12, 12), "dark grey": (70, 70, 70), "dark blue": (15, 20, 85),
               "dark green": (10, 65, 25), "dark red": (80, 12, 20)}
TILT = 0.5                                                 # largest rotation either way, in radians
PLACES = ("in the upper left", "at the top", "in the upper right", "at the left", "in the middle",
          "at the right", "in the lower left", "at the bottom", "in the lower right")
SMALL, LARGE = 0.58, 0.86                                  # radius of a shape, in half image widths
VAL_INDEX = 1 << 30                                        # validation pictures start here, training at 0
IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"}
ANIMATED = {".gif", ".webp"}                               # where clips are wanted, each of these is one
FILMS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".y4m"}          # read by the optional package av


class BadInput(SystemExit):
    """A user's mistake in one sentence. Uncaught, it ends the program with exit code 1 and no traceback."""


# ---------------------------------------------------------------------------------------------------
# The drawn world

def uniforms(index, n, seed=0):
    """Counter-based random numbers: index (B,) int64 -> (B, n) float32 in [0, 1), the same on every device.

    A hash and not a torch.Generator, because picture 7 must not depend on which other pictures are drawn.
    The mixer is the 32-bit finaliser "lowbias32" (C. Wellons, public domain constants), kept in int64.
    """
    def mix(v):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            v = ((v ^ (v >> shift)) * factor) & 0xFFFFFFFF
        return v ^ (v >> 16)
    key = mix(mix(torch.full_like(index, seed) + 0x9E3779B9) ^ index)                  # (B,)
    column = torch.arange(n, device=index.device) * 0x85EBCA77                          # (n,)
    return (mix((key[:, None] + column) & 0xFFFFFFFF) >> 8).float() / (1 << 24)         # 24 bits: exact in float32


def distance(shape, x, y):
    """Signed distance from points to one shape of about unit radius: x, y (...) -> (...); negative is inside.

    Exact near the edges, which is all that drawing needs (far outside a corner it is a lower bound).
    """
    name = SHAPES[shape]
    r = torch.hypot(x, y)

    def polygon(n, inner):                                  # n half planes at distance `inner`, by folding the angle
        sector = 2 * math.pi / n
        angle = torch.atan2(x, -y)                          # one corner points up
        return r * torch.cos(angle - sector * torch.floor(angle / sector) - sector / 2) - inner

    def box(half_x, half_y):
        return torch.maximum(x.abs() - half_x, y.abs() - half_y)

    if name == "disc":
        return r - 0.9
    if name == "triangle":
        return polygon(3, 0.56)
    if name == "square":
        return box(0.78, 0.78)
    if name == "pentagon":
        return polygon(5, 0.78)
    if name == "ring":
        return (r - 0.74).abs() - 0.21
    if name == "cross":
        return torch.minimum(box(1.0, 0.27), box(0.27, 1.0))
    if name == "bar":
        return box(1.0, 0.25)
    if name == "crescent":
        return torch.maximum(r - 0.95, 0.78 - torch.hypot(x - 0.5, y))
    if name == "trefoil":                                   # three discs around the middle
        turn = [2 * math.pi * k / 3 - math.pi / 2 for k in range(3)]
        lobes = [torch.hypot(x - 0.5 * math.cos(a), y - 0.5 * math.sin(a)) for a in turn]
        return torch.stack(lobes).amin(0) - 0.46
    assert name == "star"                                   # five tips: fold into one edge, distance to its line
    sector = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    angle = (angle - sector * torch.round(angle / sector)).abs()
    tip, dent = (1.08, 0.0), (0.44 * math.cos(sector / 2), 0.44 * math.sin(sector / 2))
    edge = (dent[0] - tip[0], dent[1] - tip[1])
    return ((r * angle.cos() - tip[0]) * edge[1] - (r * angle.sin() - tip[1]) * edge[0]) / math.hypot(*edge)


def scene(index, seed=0, video=False):
    """What picture `index` (B,) shows: a dict of (B,) tensors (colours are (B, 3) in [0, 1]), places in [-1, 1]."""
    u = uniforms(index, 12, seed)
    label = (u[:, 0] * len(SHAPES)).long()
    colour, ground = (u[:, 1] * len(COLOURS)).long(), (u[:, 2] * len(BACKGROUNDS)).long()
    radius = SMALL + (LARGE - SMALL) * u[:, 3]
    room = 0.94 - radius                                    # so that no shape leaves the picture
    cx, cy = room * (2 * u[:, 4] - 1), room * (2 * u[:, 5] - 1)
    jitter = 8 * (u[:, 7:10] - 0.5) / 255                  # no two reds are quite the same
    table = lambda colours: torch.tensor(list(colours.values()), device=index.device) / 255
    out = dict(label=label, colour=colour, background=ground, radius=radius, cx=cx, cy=cy,
               angle=TILT * (2 * u[:, 6] - 1), rgb=(table(COLOURS)[colour] + jitter).clamp(0, 1),
               ground_rgb=(table(BACKGROUNDS)[ground] + jitter).clamp(0, 1))
    if video:
        out["action"] = (u[:, 10] * len(ACTIONS)).long()
        turns = (out["action"] == ACTIONS.index("turns left")) | (out["action"] == ACTIONS.index("turns right"))
        turnable = torch.tensor(TURNABLE, device=index.device)
        out["label"] = torch.where(turns, turnable[(u[:, 11] * len(TURNABLE)).long()], label)
    return out


def draw_scene(s, image_size):
    """Draw scenes: dict of (B,) -> images (B, 3, H, W) in [-1, 1], distances (B, H, W) in half image widths."""
    axis = (torch.arange(image_size, device=s["label"].device) + 0.5) * (2 / image_size) - 1
    dx = axis[None, None, :] - s["cx"][:, None, None]                                   # (B, 1, W)
    dy = axis[None, :, None] - s["cy"][:, None, None]                                   # (B, H, 1)
    cos, sin, radius = (v[:, None, None] for v in (s["angle"].cos(), s["angle"].sin(), s["radius"]))
    x, y = (cos * dx + sin * dy) / radius, (cos * dy - sin * dx) / radius               # (B, H, W), the shape's own axes
    d = torch.empty_like(x)
    for shape in range(len(SHAPES)):
        rows = (s["label"] == shape).nonzero()[:, 0]
        if len(rows):
            d[rows] = distance(shape, x[rows], y[rows]) * radius[rows]
    a = (0.5 - d * (image_size / 2)).clamp(0, 1)[:, None]                               # (B, 1, H, W) coverage
    a = a * s.get("visible", torch.ones_like(s["cx"]))[:, None, None, None]             # a blinking shape is away at times
    images = a * s["rgb"][:, :, None, None] + (1 - a) * s["ground_rgb"][:, :, None, None]
    return images * 2 - 1, d


def draw(index, image_size=32, seed=0):
    """Pictures: index (B,) int64 -> images (B, 3, H, W) in [-1, 1], labels (B,), masks (B, H, W), distances (B, H, W).

    masks hold 0 for background and 1 + label on the shape; distances are in half image widths, negative inside.
    """
    s = scene(index, seed)
    images, d = draw_scene(s, image_size)
    return images, s["label"], (d < 0) * (1 + s["label"][:, None, None]), d


def draw_clips(index, image_size=32, frames=17, seed=0):
    """Clips: index (B,) -> videos (B, 3, F, H, W) in [-1, 1], actions (B,) int64, labels (B,) int64.

    The action is centred on the middle frame, so no single frame tells "moves left" from "moves right".
    """
    s = scene(index, seed, video=True)
    B, action = len(index), s["action"]
    time_ = torch.linspace(-0.5, 0.5, frames, device=index.device) * (frames > 1)            # one frame: the middle
    is_ = lambda name: (action == ACTIONS.index(name)).float()[:, None]                 # (B, 1)
    resizes = is_("grows") + is_("shrinks")                                             # 1.4 times as large at one end
    s["radius"] = torch.minimum(s["radius"] - 0.1, 0.65 - 0.05 * resizes[:, 0])
    room = torch.where(resizes[:, 0] > 0, 0.94 - 1.4 * s["radius"], 0.94 - s["radius"])
    s["cx"], s["cy"] = (torch.maximum(torch.minimum(s[k], room), -room) for k in ("cx", "cy"))
    reach = 0.9 - s["radius"]                                                           # travel from -reach to +reach
    across, down = is_("moves right") - is_("moves left"), is_("moves down") - is_("moves up")
    cx = torch.where(across != 0, across * 2 * reach[:, None] * time_, s["cx"][:, None].expand(B, frames))
    cy = torch.where(down != 0, down * 2 * reach[:, None] * time_, s["cy"][:, None].expand(B, frames))
    radius = s["radius"][:, None] * (1 + 0.8 * (is_("grows") - is_("shrinks")) * time_)
    angle = s["angle"][:, None] + 0.75 * math.pi * (is_("turns right") - is_("turns left")) * time_
    blink = ((torch.arange(frames, device=index.device) // 2) % 2).float()              # two frames there, two away
    visible = 1 - is_("blinks") * blink
    flat = {k: v.repeat_interleave(frames, 0) for k, v in s.items()}
    moving = dict(cx=cx, cy=cy, radius=radius, angle=angle, visible=visible)                # (B, F) each
    flat.update({k: v.flatten() for k, v in moving.items()})
    images, _ = draw_scene(flat, image_size)                                            # (B*F, 3, H, W)
    return images.view(B, frames, 3, image_size, image_size).transpose(1, 2).contiguous(), action, s["label"]


def captions(index, seed=0, video=False):
    """One sentence per picture: index (B,) -> list of B strings; for clips the action is the verb."""
    s = {k: v.tolist() for k, v in scene(index, seed, video).items()}
    out = []
    for i in range(len(index)):
        third = [0 if v < -0.08 else 2 if v > 0.08 else 1 for v in (s["cx"][i], s["cy"][i])]
        size = "small" if s["radius"][i] < (SMALL + LARGE) / 2 else "large"
        colour, shape = list(COLOURS)[s["colour"][i]], SHAPES[s["label"][i]]
        article = "an" if not video and size[0] in "aeiou" else "a"
        where = ACTIONS[s["action"][i]] if video else PLACES[third[1] * 3 + third[0]]
        out.append(f"{article} {size} {colour} {shape} {where} on a {list(BACKGROUNDS)[s['background'][i]]} background")
    return out


# ---------------------------------------------------------------------------------------------------
# A set of images, and the ways to get one

class ImageSet:
    """N images or clips with class labels, ready to be drawn in batches.

    images: (N, 3, H, W) uint8 tensor, on the device where it fits, or a StreamedFiles; labels: (N,) int64 on `device`.
    Clips: (N, 3, F, H, W), and so are the batches.
    With one_hot = n, images are maps (N, 1, H, W) of values 0 .. n - 1, and batch() gives n channels of -1 and 1.
    """

    def __init__(self, images, labels, classes, device, flip=False, texts=None, one_hot=0):
        self.images = images
        self.labels = labels.to(device)
        self.classes = list(classes)
        self.device = self.labels.device                    # "cuda" has become "cuda:0" here
        self.flip = flip
        self.texts = texts
        self.one_hot = one_hot
        # Looked at once, and by kind: a device named without its number equals no tensor's device.
        self.beside_labels = isinstance(images, torch.Tensor) and images.is_cpu == self.labels.is_cpu

    def __len__(self):
        return len(self.labels)

    @property
    def frames(self):
        """F of a set of clips, 1 of a set of images."""
        return self.images.shape[2] if getattr(self.images, "ndim", 4) == 5 else 1

    def batch(self, index):
        """index (B,) int64 on the CPU -> images (B, 3, H, W) float32 in [-1, 1], labels (B,), both on the device."""
        if self.beside_labels:
            index = index.to(self.device, non_blocking=True)
            images = self.images[index]
        else:                                               # copied while the device still computes the last step
            images = self.images[index]
            if self.labels.is_cuda:
                images = images.pin_memory()
                index = index.pin_memory()
            images = images.to(self.device, non_blocking=True)
            index = index.to(self.device, non_blocking=True)
        labels = self.labels[index]
        if self.one_hot:
            images = 2.0 * (images == torch.arange(self.one_hot, device=self.device).view(-1, 1, 1)) - 1
        else:
            images = images.float() / 127.5 - 1
        if self.flip:
            turned = torch.rand(len(images), *[1] * (images.ndim - 1), device=self.device) < 0.5
            images = torch.where(turned, images.flip(-1), images)
        return images, labels


class StreamedFiles:
    """Images decoded when they are asked for, by a few threads: for sets that do not fit into memory."""

    def __init__(self, files, image_size, workers=8):
        self.files, self.image_size = files, image_size
        self.pool = ThreadPoolExecutor(workers)

    def __getitem__(self, index):
        return torch.stack(list(self.pool.map(lambda i: read_image(*self.files[i], self.image_size), index.tolist())))


def order(n, batch_size, step, seed=0, _cache={}):
    """The images of one training step: -> (batch_size,) int64. A pure function of (seed, step), so a resumed run
    sees what the uninterrupted one would have seen. Each epoch is a fresh permutation."""
    if n < batch_size:
        return torch.randint(n, (batch_size,), generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
    epoch, place = divmod(step, n // batch_size)
    if _cache.get("key") != (n, seed, epoch):
        g = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        _cache.update(key=(n, seed, epoch), permutation=torch.randperm(n, generator=g))
    return _cache["permutation"][place * batch_size:(place + 1) * batch_size]


def load(data="shapes", image_size=32, split="train", device="cpu", seed=0, flip=False, skip_bad=False,
         n_shapes=None, max_bytes=None, task="class", frames=1, frame_step=None):
    """The training or validation set named by --data, as an ImageSet.

    data: "shapes", or a path to class folders / a .tar, .tar.gz or .zip of them / an .npz with `images` (N, H, W, 3)
    uint8 and `labels` (N,). max_bytes: a larger set is decoded while training (default: half of the free memory).
    task: "class" gives images; of the drawn world also their maps, in the same order: "segment", one channel for the
    ground and one for each class, or "depth", the signed distance to the outline in half image widths, cut off at -1 and 1.
    frames: more than one gives clips of so many; the classes of drawn clips are the ACTIONS. frame_step: see read_clip.
    Raises BadInput, in one sentence, for a path that is absent, empty, has an empty class or an unreadable image.
    """
    if frames > 1:
        if data == "shapes":
            return draw_clip_set(image_size, frames, split, device, seed, n_shapes)
        return load_clips(data, image_size, frames, frame_step, split, device, flip, skip_bad, max_bytes)
    if data == "shapes":
        n = n_shapes or (20_000 if split == "train" else 2_000)
        start = 0 if split == "train" else VAL_INDEX
        images, labels = [], []
        for i in range(0, n, 1000):
            x, y, masks, distances = draw(torch.arange(start + i, start + min(i + 1000, n), device=device), image_size, seed)
            images.append({"class": lambda: pictures.to_uint8(x), "segment": lambda: masks[:, None].to(torch.uint8),
                           "depth": lambda: pictures.to_uint8(distances)[:, None].expand(-1, 3, -1, -1)}[task]())
            labels.append(y)
        one_hot = 1 + len(SHAPES) if task == "segment" else 0
        return ImageSet(torch.cat(images), torch.cat(labels), SHAPES, device, flip, one_hot=one_hot)
    if task != "class":
        raise BadInput(f"--task {task}: only the drawn world (--data shapes) comes with such maps, not {data}")
    path = Path(data)
    if not path.exists():
        raise BadInput(f"--data {data}: there is no such file or folder (use `shapes` for the drawn world)")
    if path.suffix == ".npz":
        return load_npz(path, image_size, split, device, flip)
    files, labels, classes = list_split(path, split)
    fits = max_bytes if max_bytes is not None else free_bytes(device) // 2
    texts = read_texts(files)
    if len(files) * 3 * image_size**2 > fits:
        if not path.is_dir():
            raise BadInput(f"--data {data}: {len(files)} images at {image_size} pixels do not fit into memory, "
                           "and an archive cannot be streamed: unpack it and name the folder")
        return ImageSet(StreamedFiles(files, image_size), torch.tensor(labels), classes, device, flip, texts)
    images, good, bad = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8), [], []
    for i, (name, opener) in enumerate(files):
        try:
            images[i] = read_image(name, opener, image_size)
            good.append(i)
        except BadInput:
            if not skip_bad:
                raise
            bad.append(name)
    if bad:
        print(f"--skip_bad: left out {len(bad)} unreadable images, the first is {bad[0]}")
        images, labels = images[good], [labels[i] for i in good]
        texts = [texts[i] for i in good] if texts else None
        if len(set(labels)) < len(classes):
            raise BadInput(f"--data {data}: without its unreadable images a class is empty")
    return ImageSet(images.to(device), torch.tensor(labels), classes, device, flip, texts)


def draw_clip_set(image_size, frames, split, device, seed=0, n=None):
    """The drawn world in motion, 4000 clips to learn from and 1000 to validate -> an ImageSet whose classes are ACTIONS."""
    n = n or (4000 if split == "train" else 1000)
    if n * 3 * frames * image_size**2 > free_bytes(device) // 2:
        raise BadInput(f"{n} clips of {frames} frames at {image_size} pixels do not fit into memory: give less of "
                       "--n_shapes, --frames or --image_size")
    clips = torch.empty(n, 3, frames, image_size, image_size, dtype=torch.uint8, device=device)
    actions = torch.empty(n, dtype=torch.long, device=device)
    for i in torch.arange(n, device=device).split(max(1, 2000 // frames)):              # drawn in float32: a few at a time
        x, actions[i], _ = draw_clips(i + (0 if split == "train" else VAL_INDEX), image_size, frames, seed)
        clips[i] = pictures.to_uint8(x)
    return ImageSet(clips, actions, ACTIONS, device)


def load_clips(data, image_size, frames, frame_step, split, device, flip, skip_bad, max_bytes=None):
    """Your own clips, see read_clip, in class folders or an archive of them -> an ImageSet. Split like images, file by file,
    so that no two windows of one film stand on both sides."""
    path = Path(data)
    if not path.exists():
        raise BadInput(f"--data {data}: there is no such file or folder (use `shapes` for the drawn world)")
    if path.suffix == ".npz":
        raise BadInput(f"--data {data}: clips are read from class folders or an archive of them, not from an .npz")
    files, labels, classes = list_split(path, split, clips=True)
    fits = max_bytes if max_bytes is not None else free_bytes(device) // 4
    clips, kept, bad = [], [], []
    for (name, opener, *_), label in zip(files, labels):
        try:
            clips += read_clip(name, opener, image_size, frames, frame_step)
            kept += [label] * (len(clips) - len(kept))
        except BadInput as e:
            if not skip_bad or "pip install" in str(e):
                raise
            bad.append(name)
        if len(clips) * 3 * frames * image_size**2 > fits:
            raise BadInput(f"--data {data}: more clips of {frames} frames at {image_size} pixels than fit into memory: give "
                           "less of --frames or --image_size, or fewer files")
    if bad:
        print(f"--skip_bad: left out {len(bad)} clips that are unreadable or too short, the first is {bad[0]}")
        if len(set(kept)) < len(classes):
            raise BadInput(f"--data {data}: without its unreadable and short clips a class is empty")
    return ImageSet(torch.stack(clips).to(device), torch.tensor(kept), classes, device, flip)


def free_bytes(device):
    """Free memory in bytes where the set would be held."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        text = Path("/proc/meminfo").read_text()
        return int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return 8 << 30                                      # not Linux: assume a laptop with 8 GB to spare


def list_files(path):
    """A folder or archive -> list of (name inside it, function that returns the file's bytes), sorted by name."""
    if path.is_dir():
        found = {p.relative_to(path).as_posix(): p for p in path.rglob("*")}
        found = {n: p for n, p in sorted(found.items()) if not any(part.startswith(".") for part in n.split("/"))}
        return [(n, p.read_bytes) for n, p in found.items() if p.is_file()], [n for n, p in found.items() if p.is_dir()]
    files, folders = [], set()
    try:
        if zipfile.is_zipfile(path):
            archive, lock = zipfile.ZipFile(path), threading.Lock()

            def opener(name):
                def read():
                    with lock:
                        return archive.read(name)
                return read
            files = [(n, opener(n)) for n in archive.namelist() if not n.endswith("/")]
            folders = {n.rstrip("/") for n in archive.namelist() if n.endswith("/")}
        elif tarfile.is_tarfile(path):
            with tarfile.open(path) as archive:             # gzip has no random access: read it through once
                for member in archive:
                    if member.isdir():
                        folders.add(member.name.strip("./"))
                    elif member.isfile():
                        content = archive.extractfile(member).read()
                        files.append((member.name.removeprefix("./"), lambda content=content: content))
        else:
            raise BadInput(f"--data {path}: neither a folder, nor a .tar[.gz], .zip or .npz file")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as e:
        raise BadInput(f"--data {path}: the archive is damaged ({e})") from None
    files = [f for f in files if not any(part.startswith((".", "__MACOSX")) for part in f[0].split("/"))]
    return sorted(files, key=lambda f: f[0]), sorted(folders - {""})


def list_split(path, split, clips=False):
    """-> files of one split [(name, opener)], labels [int], class names. Classes are the folders, sorted.

    Understands train/ beside val/, valid/ or test/; without them every tenth image of a class is for validation.
    clips: the same with clips_of() in the place of images.
    """
    files, folders = list_files(path)
    tops = {name.split("/")[0] for name, _ in files} | {f.split("/")[0] for f in folders}
    if len(tops) == 1 and "train" not in tops:              # an archive of one folder: go inside
        top = tops.pop() + "/"
        inside = [(n, o) for n, o in files if n.startswith(top)]
        if any("/" in n.removeprefix(top) for n, _ in inside):
            files = [(n.removeprefix(top), o) for n, o in inside]
            folders = [f.removeprefix(top) for f in folders if f.startswith(top)]
            tops = {name.split("/")[0] for name, _ in files}
    images = clips_of(files) if clips else [(n, o) for n, o in files if Path(n).suffix.lower() in IMAGE_ENDINGS]
    kind, endings = ("clip", ANIMATED | FILMS) if clips else ("image", IMAGE_ENDINGS)
    texts = {n: o for n, o in files if n.endswith(".txt")}
    if not images:
        raise BadInput(f"--data {path}: no {kind}s in it (endings: {' '.join(sorted(endings))})")
    held_out = next((t for t in ("val", "valid", "validation", "test") if t in tops), None)
    levels = ("train", held_out) if "train" in tops and held_out else ("train",) if "train" in tops else ("",)
    inside = lambda level: [(n, o) for n, o in images if not level or n.startswith(level + "/")]
    depth = 1 if levels[0] else 0
    class_of = lambda name: name.split("/")[depth] if name.count("/") > depth else None
    loose = next((n for n, _ in inside(levels[0]) if class_of(n) is None), None)
    if loose and clips:
        raise BadInput(f"--data {path}: {loose} lies in no class folder: one subfolder per class holds its clips, and "
                       "a clip of single pictures is a folder in there")
    if loose:
        raise BadInput(f"--data {path}: {loose} lies in no class folder: put the images into one subfolder per class")
    classes = sorted({class_of(n) for n, _ in inside(levels[0])})
    for folder in folders:
        part = folder.split("/")
        if len(part) == depth + 1 and (not depth or part[0] == "train") and part[-1] not in classes:
            raise BadInput(f"--data {path}: the class folder {folder} holds no {kind}: fill it or remove it")
    level = levels[0] if split == "train" else levels[-1]
    chosen = inside(level)
    unknown = next((n for n, _ in chosen if class_of(n) not in classes), None)
    if unknown:
        raise BadInput(f"--data {path}: {unknown} belongs to a class that has no {kind}s in {levels[0]}/")
    if len(levels) == 1:
        counts, kept = {}, []
        for n, o in chosen:
            counts[class_of(n)] = counts.get(class_of(n), -1) + 1
            if (counts[class_of(n)] % 10 == 9) == (split != "train"):
                kept.append((n, o))
        chosen = kept
        if not chosen:
            raise BadInput(f"--data {path}: too few {kind}s to hold out a tenth: each class needs at least ten")
    if not chosen:
        what = "training" if split == "train" else "validation"
        raise BadInput(f"--data {path}: no {kind}s in {level}/, which is for {what}")
    files = [(f"{path}/{n}", o) for n, o in chosen]
    for i, (n, o) in enumerate(chosen):                     # a caption beside the image: name.txt beside name.jpg
        text = texts.get(str(Path(n).with_suffix(".txt")).replace("\\", "/"))
        if text:
            files[i] = (files[i][0], o, text)
    return files, [classes.index(class_of(n)) for n, _ in chosen], classes


def clips_of(files):
    """Files [(name, opener)] -> clips, the same: an animation or a film is one, a folder of pictures another. The opener of
    such a folder gives the files in it, frame 10 after frame 9."""
    clips, folders = [], {}
    for name, opener in files:
        ending = Path(name).suffix.lower()
        if ending in ANIMATED | FILMS:
            clips.append((name, opener))
        elif ending in IMAGE_ENDINGS:
            folders.setdefault(Path(name).parent.as_posix(), []).append((name, opener))
    by_number = lambda file: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file[0])]
    clips += [(name, lambda inside=sorted(inside, key=by_number): inside) for name, inside in folders.items()]
    return sorted(clips, key=lambda clip: clip[0])


def read_texts(files):
    """Captions of all images, or None if any image has none; strips the caption reader off `files` in place."""
    texts = [f[2]().decode("utf-8", "replace").strip() if len(f) == 3 else None for f in files]
    files[:] = [f[:2] for f in files]
    return texts if texts and all(t is not None for t in texts) else None


def read_image(name, opener, image_size):
    """One encoded image -> (3, H, W) uint8: RGB, centre crop and resize as in ADM (Dhariwal & Nichol 2021)."""
    try:
        image = Image.open(io.BytesIO(opener())).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise BadInput(f"{name}: not a readable image ({e}); remove it, or leave such files out with --skip_bad") from None
    return torch.from_numpy(centre_crop(image, image_size)).permute(2, 0, 1)


def read_clip(name, opener, image_size, frames, frame_step=None):
    """One clip -> a list of windows (3, F, H, W) uint8, cropped like images. Which frames of it:

    frame_step None: one window, its frames evenly spread from the first to the last, so that an action is seen whole.
    frame_step n: every n-th frame, and of these as many windows, one behind the other, as there are.
    """
    try:
        cropped = [centre_crop(picture, image_size) for picture in pictures_of(name, opener())]
    except (OSError, SyntaxError, ValueError, IndexError, EOFError, Image.DecompressionBombError) as e:
        raise BadInput(f"{name}: not a readable clip ({e}); remove it, or leave such files out with --skip_bad") from None
    cropped = cropped[::frame_step]
    if len(cropped) < frames:
        every = f" with --frame_step {frame_step}" if frame_step else ""
        raise BadInput(f"{name}: has {len(cropped)} frames{every}, fewer than --frames {frames}; remove it, or leave such "
                       "files out with --skip_bad")
    if frame_step is None:
        cropped = [cropped[i] for i in np.linspace(0, len(cropped) - 1, frames).round().astype(int)]
    clip = torch.from_numpy(np.stack(cropped)).permute(3, 0, 1, 2)                         # (3, all of them, H, W)
    return [window.contiguous() for window in clip.split(frames, 1) if window.shape[1] == frames]


def pictures_of(name, content):
    """The contents of a clip, bytes or a list of picture files -> PIL images, one after the other."""
    if isinstance(content, list):
        for _, opener in content:
            yield Image.open(io.BytesIO(opener())).convert("RGB")
    elif Path(name).suffix.lower() in FILMS:
        try:
            import av
        except ImportError:
            raise BadInput(f"{name}: to read films takes the optional package av: pip install av") from None
        with av.open(io.BytesIO(content)) as film:
            for frame in film.decode(video=0):
                yield frame.to_image()
    else:
        with Image.open(io.BytesIO(content)) as animation:
            for i in range(getattr(animation, "n_frames", 1)):
                animation.seek(i)
                yield animation.convert("RGB")


def centre_crop(image, image_size):
    """PIL image -> (image_size, image_size, 3) uint8. Halve by boxes while it is twice too big (so that nothing
    aliases), then bicubic so that the short side fits, then the middle square."""
    if image.size == (image_size, image_size):
        return np.array(image)
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    return np.array(image)[top:top + image_size, left:left + image_size]


def load_npz(path, image_size, split, device, flip):
    """An .npz with `images` (N, H, W, 3) or (N, H, W) uint8 and `labels` (N,), optionally `classes`; a tenth is held out."""
    try:
        with np.load(path, allow_pickle=False) as f:
            arrays = {k: f[k] for k in ("images", "labels", "classes") if k in f.files}
    except (OSError, ValueError, zipfile.BadZipFile) as e:
        raise BadInput(f"--data {path}: not a readable .npz ({e})") from None
    images, labels = arrays.get("images"), arrays.get("labels")
    if images is None or labels is None:
        raise BadInput(f"--data {path}: an .npz needs the arrays `images` (N, H, W, 3) uint8 and `labels` (N,)")
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, -1)
    fits = images.ndim == 4 and images.shape[-1] == 3 and images.dtype == np.uint8
    if not fits or len(images) != len(labels) or len(images) < 10:
        raise BadInput(f"--data {path}: `images` must be (N, H, W, 3) uint8 with N labels and N at least 10, "
                       f"not {images.shape} {images.dtype} with {len(labels)} labels")
    held_out = np.arange(len(images)) % 10 == 9
    keep = held_out if split != "train" else ~held_out
    values = np.unique(labels)
    classes = [str(c) for c in arrays["classes"]] if "classes" in arrays else [str(v) for v in values]
    small = np.stack([centre_crop(Image.fromarray(i), image_size) for i in images[keep]])
    return ImageSet(torch.from_numpy(small).permute(0, 3, 1, 2).contiguous().to(device),
                    torch.from_numpy(np.searchsorted(values, labels[keep])).long(), classes, device, flip)


# ---------------------------------------------------------------------------------------------------
# Demo

def demo_shapes(image_size):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    for what, function, n in (("pictures", draw, 1000), ("17-frame clips", draw_clips, 50)):
        start = time.perf_counter()
        function(torch.arange(n), image_size)
        print(f"{n / (time.perf_counter() - start):7.0f} {what} of {image_size} x {image_size} drawn per second")
    images, labels, masks, d = draw(torch.arange(400), image_size)
    fig = plt.figure(figsize=(15, 7.6))
    left, right = fig.add_gridspec(1, 2, width_ratios=[1, 1.0], wspace=0.12, left=0.065, right=0.985, top=0.92, bottom=0.01)
    rows = left.subgridspec(len(SHAPES), 1, hspace=0.05)
    for k, name in enumerate(SHAPES):
        ax = fig.add_subplot(rows[k])
        ax.imshow(pictures.tile(images[labels == k][:9], 9, gap=2, scale=2))
        ax.set_axis_off()
        ax.text(-0.02, 0.5, name, transform=ax.transAxes, ha="right", va="center")
        if k == 0:
            ax.set_title("ten classes", fontsize=11)
    top, bottom = right.subgridspec(2, 1, height_ratios=[1, 1.05], hspace=0.08)
    cells = top.subgridspec(3, 1, hspace=0.12)
    for i, text in enumerate(captions(torch.arange(3))):
        ax = fig.add_subplot(cells[i])
        mask = (masks[i] > 0).float().expand(3, -1, -1) * 2 - 1
        depth = (-d[i] / d[i].abs().max()).expand(3, -1, -1)
        ax.imshow(pictures.tile(torch.stack([images[i], mask, depth]), 3, gap=2, scale=2))
        ax.set_axis_off()
        ax.text(1.02, 0.5, text.replace(" on a ", "\non a "), transform=ax.transAxes, ha="left", va="center", fontsize=10)
        ax.set_anchor("W")
        if i == 0:
            ax.set_title("picture, mask, distance, caption", fontsize=11, loc="left")
    videos, actions, _ = draw_clips(torch.arange(200), image_size, frames=9)
    cells = bottom.subgridspec(len(ACTIONS), 1, hspace=0.05)
    for k, name in enumerate(ACTIONS):
        ax = fig.add_subplot(cells[k])
        ax.imshow(pictures.tile(videos[actions == k][0].transpose(0, 1), 9, gap=2, scale=2))
        ax.set_axis_off()
        ax.text(-0.02, 0.5, name, transform=ax.transAxes, ha="right", va="center", fontsize=9)
    fig.suptitle(f"data.py: the drawn world at {image_size} x {image_size} pixels, its captions, masks, distances and clips")
    fig.savefig("data.png", dpi=90)


def main():
    parser = argparse.ArgumentParser(description="Draw the shapes world, or look at your own images.")
    parser.add_argument("--data", default="shapes", help="`shapes`, or a folder / archive / npz of class folders")
    parser.add_argument("--image_size", type=int, default=32, help="side of the square pictures, in pixels")
    parser.add_argument("--frames", type=int, default=1, help="with --data PATH: more than 1 reads clips of so many frames")
    args = parser.parse_args()
    if args.data == "shapes":
        demo_shapes(args.image_size)
    else:
        start = time.perf_counter()
        train, val = (load(args.data, args.image_size, split, frames=args.frames) for split in ("train", "val"))
        what = "images" if args.frames == 1 else f"clips of {args.frames} frames"
        print(f"{len(train)} training and {len(val)} validation {what}, {len(train.classes)} classes: "
              f"{', '.join(train.classes)}; read in {time.perf_counter() - start:.1f} s")
        n = min(len(train), 4000 // args.frames)
        images, labels = train.batch(order(len(train), n, 0))
        rows = [(c, images[labels == k][:12]) for k, c in enumerate(train.classes[:20])]
        rows = rows if args.frames == 1 else [(c, pictures.film(x[0])) for c, x in rows if len(x)]
        pictures.save_rows("data.png", [r for r in rows if len(r[1])], f"{args.data} at {args.image_size} x {args.image_size}")
    print("wrote data.png")


if __name__ == "__main__":
    main()
