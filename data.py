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

    python data.py              # draws data.png: the ten classes, captions, masks, clips; 3 s of one CPU core
    python data.py --data PATH  # the same for your images: a folder, .zip, .tar[.gz] or .npz

With --frames 17 the files are clips: GIFs, animated WebPs, folders of pictures, or films (see read_clip).

Try it yourself:
  1. Add a class: a heart is the union of a rotated square and two discs. Add it to SHAPES and distance().
  2. Draw with image_size=8. Which classes can you still tell apart? Can the classifier of evaluate.py?
  3. Replace clamp() by a hard threshold in draw_scene. How does the PSNR of a trained vae.py change?
"""
import argparse
import math
import time

import torch

from common import files, pictures
from common.reading import BadInput, free_bytes             # programs raise data.BadInput

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
DRAWN = dict(train=20_000, val=2_000)                      # pictures of a split
DRAWN_CLIPS = dict(train=4_000, val=1_000)


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
    key = mix(mix(torch.full_like(index, seed) + 0x9E3779B9) ^ index)                     # (B,)
    column = torch.arange(n, device=index.device) * 0x85EBCA77                            # (n,)
    bits = mix((key[:, None] + column) & 0xFFFFFFFF) >> 8                                 # (B, n)
    return bits.float() / (1 << 24)                         # 24 bits are exact in float32


def distance(shape, x, y):
    """Signed distance from points to one shape of about unit radius: x, y (...) -> (...); negative is inside.

    Exact near the edges, which is all that drawing needs (far outside a corner it is a lower bound).
    """
    name = SHAPES[shape]
    r = torch.hypot(x, y)

    def polygon(n, inner):  # n half planes at a distance, by folding the angle
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
    assert name == "star"                                   # five tips, folded into one edge
    sector = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    angle = (angle - sector * torch.round(angle / sector)).abs()
    tip = (1.08, 0.0)
    dent = (0.44 * math.cos(sector / 2), 0.44 * math.sin(sector / 2))
    edge = (dent[0] - tip[0], dent[1] - tip[1])
    return ((r * angle.cos() - tip[0]) * edge[1] - (r * angle.sin() - tip[1]) * edge[0]) / math.hypot(*edge)


def scene(index, seed=0, video=False):
    """What picture `index` (B,) shows -> a dict of (B,) tensors. Colours are (B, 3) in [0, 1],
    places are in [-1, 1].
    """
    u = uniforms(index, 12, seed)
    label = (u[:, 0] * len(SHAPES)).long()
    colour = (u[:, 1] * len(COLOURS)).long()
    ground = (u[:, 2] * len(BACKGROUNDS)).long()
    radius = SMALL + (LARGE - SMALL) * u[:, 3]
    room = 0.94 - radius                                    # so that no shape leaves the picture
    cx = room * (2 * u[:, 4] - 1)
    cy = room * (2 * u[:, 5] - 1)
    jitter = 8 * (u[:, 7:10] - 0.5) / 255                   # no two reds are quite the same
    colours = torch.tensor(list(COLOURS.values()), device=index.device) / 255
    grounds = torch.tensor(list(BACKGROUNDS.values()), device=index.device) / 255
    out = dict(label=label, colour=colour, background=ground, radius=radius, cx=cx, cy=cy,
               angle=TILT * (2 * u[:, 6] - 1), rgb=(colours[colour] + jitter).clamp(0, 1),
               ground_rgb=(grounds[ground] + jitter).clamp(0, 1))
    if video:
        out["action"] = (u[:, 10] * len(ACTIONS)).long()
        left = out["action"] == ACTIONS.index("turns left")
        right = out["action"] == ACTIONS.index("turns right")
        turnable = torch.tensor(TURNABLE, device=index.device)
        out["label"] = torch.where(left | right, turnable[(u[:, 11] * len(TURNABLE)).long()], label)
    return out


def draw_scene(s, image_size):
    """Scenes, a dict of (B,) -> images (B, 3, H, W) in [-1, 1], distances (B, H, W) in half image widths."""
    axis = (torch.arange(image_size, device=s["label"].device) + 0.5) * (2 / image_size) - 1
    dx = axis[None, None, :] - s["cx"][:, None, None]                                     # (B, 1, W)
    dy = axis[None, :, None] - s["cy"][:, None, None]                                     # (B, H, 1)
    cos, sin, radius = (v[:, None, None] for v in (s["angle"].cos(), s["angle"].sin(), s["radius"]))
    x = (cos * dx + sin * dy) / radius                      # (B, H, W), along the shape's own axes
    y = (cos * dy - sin * dx) / radius
    d = torch.empty_like(x)
    for shape in range(len(SHAPES)):
        rows = (s["label"] == shape).nonzero()[:, 0]
        if len(rows):
            d[rows] = distance(shape, x[rows], y[rows]) * radius[rows]
    a = (0.5 - d * (image_size / 2)).clamp(0, 1)[:, None]  # (B, 1, H, W) coverage
    visible = s.get("visible", torch.ones_like(s["cx"]))    # a blinking shape is away at times
    a = a * visible[:, None, None, None]
    images = a * s["rgb"][:, :, None, None] + (1 - a) * s["ground_rgb"][:, :, None, None]
    return images * 2 - 1, d


def draw(index, image_size=32, seed=0):
    """index (B,) int64 -> images (B, 3, H, W) in [-1, 1], labels (B,), masks (B, H, W), distances (B, H, W).

    masks hold 0 for background and 1 + label on the shape. distances are in half image widths, negative
    inside.
    """
    s = scene(index, seed)
    images, d = draw_scene(s, image_size)
    return images, s["label"], (d < 0) * (1 + s["label"][:, None, None]), d


def draw_clips(index, image_size=32, frames=17, seed=0):
    """Clips: index (B,) -> videos (B, 3, F, H, W) in [-1, 1], actions (B,) int64, labels (B,) int64.

    The action is centred on the middle frame, so no single frame tells "moves left" from "moves right".
    """
    s = scene(index, seed, video=True)
    B = len(index)
    action = s["action"]
    moment = torch.linspace(-0.5, 0.5, frames, device=index.device) * (frames > 1)  # one frame: the middle

    def is_action(name):
        return (action == ACTIONS.index(name)).float()[:, None]                           # (B, 1)

    resizes = is_action("grows") + is_action("shrinks")     # 1.4 times as large at one end
    s["radius"] = torch.minimum(s["radius"] - 0.1, 0.65 - 0.05 * resizes[:, 0])
    room = torch.where(resizes[:, 0] > 0, 0.94 - 1.4 * s["radius"], 0.94 - s["radius"])
    s["cx"], s["cy"] = (torch.maximum(torch.minimum(s[k], room), -room) for k in ("cx", "cy"))
    reach = 0.9 - s["radius"]                               # it travels from -reach to +reach
    across = is_action("moves right") - is_action("moves left")
    down = is_action("moves down") - is_action("moves up")
    growth = is_action("grows") - is_action("shrinks")
    turning = is_action("turns right") - is_action("turns left")
    cx = torch.where(across != 0, across * 2 * reach[:, None] * moment, s["cx"][:, None].expand(B, frames))
    cy = torch.where(down != 0, down * 2 * reach[:, None] * moment, s["cy"][:, None].expand(B, frames))
    radius = s["radius"][:, None] * (1 + 0.8 * growth * moment)
    angle = s["angle"][:, None] + 0.75 * math.pi * turning * moment
    blink = ((torch.arange(frames, device=index.device) // 2) % 2).float()  # two frames there, two away
    visible = 1 - is_action("blinks") * blink
    flat = {k: v.repeat_interleave(frames, 0) for k, v in s.items()}
    moving = dict(cx=cx, cy=cy, radius=radius, angle=angle, visible=visible)              # (B, F) each
    flat.update({k: v.flatten() for k, v in moving.items()})
    images, _ = draw_scene(flat, image_size)                                              # (B*F, 3, H, W)
    videos = images.view(B, frames, 3, image_size, image_size).transpose(1, 2).contiguous()
    return videos, action, s["label"]


def captions(index, seed=0, video=False):
    """One sentence per picture: index (B,) -> list of B strings; for clips the action is the verb."""
    s = {k: v.tolist() for k, v in scene(index, seed, video).items()}
    out = []
    for i in range(len(index)):
        third = [0 if v < -0.08 else 2 if v > 0.08 else 1 for v in (s["cx"][i], s["cy"][i])]
        size = "small" if s["radius"][i] < (SMALL + LARGE) / 2 else "large"
        colour = list(COLOURS)[s["colour"][i]]
        shape = SHAPES[s["label"][i]]
        ground = list(BACKGROUNDS)[s["background"][i]]
        article = "an" if not video and size[0] in "aeiou" else "a"
        where = ACTIONS[s["action"][i]] if video else PLACES[third[1] * 3 + third[0]]
        out.append(f"{article} {size} {colour} {shape} {where} on a {ground} background")
    return out


# ---------------------------------------------------------------------------------------------------
# A set of images, and the ways to get one

class ImageSet:
    """N images or clips with class labels, ready to be drawn in batches.

    images: (N, 3, H, W) uint8 tensor, on the device where it fits, or a StreamedFiles; labels: (N,) int64.
    Clips: (N, 3, F, H, W), and so are the batches. With one_hot = n, images are maps (N, 1, H, W) of values
    0 .. n - 1, and batch() gives n channels of -1 and 1.
    """

    def __init__(self, images, labels, classes, device, flip=False, texts=None, one_hot=0):
        self.images = images
        self.labels = labels.to(device)
        self.classes = list(classes)
        self.device = self.labels.device                    # "cuda" has become "cuda:0" here
        self.flip = flip
        self.texts = texts
        self.one_hot = one_hot
        self.summary = f"{len(labels)} images in {len(self.classes)} classes"
        self.head = ""                                      # this and the rest: what describe() tells
        self.left_out = ""
        self.unreadable = 0
        self.oblong = 0
        self.without_text = []                              # the names of images that lack a caption
        # Looked at once, and by kind: a device named without its number equals no tensor's device.
        self.beside_labels = isinstance(images, torch.Tensor) and images.is_cpu == self.labels.is_cpu

    def __len__(self):
        return len(self.labels)

    @property
    def frames(self):
        """F of a set of clips, 1 of a set of images."""
        return self.images.shape[2] if getattr(self.images, "ndim", 4) == 5 else 1

    def batch(self, index, share=slice(None)):
        """index (B,) on the CPU -> on the device: images (B, 3, H, W) float32 in [-1, 1], labels (B,).

        share: of the batch, only these are read and given. Random numbers are drawn for the whole batch.
        """
        n = len(index)
        index = index[share]
        if self.beside_labels:
            index = index.to(self.device, non_blocking=True)
            images = self.images[index]
        else:  # copied while the device still computes the last step
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
            turned = torch.rand(n, *[1] * (images.ndim - 1), device=self.device) < 0.5
            images = torch.where(turned[share], images.flip(-1), images)
        return images, labels


def order(n, batch_size, step, seed=0, _cache={}):
    """The images of one training step: -> (batch_size,) int64. A pure function of (seed, step), so a resumed
    run sees what the uninterrupted one would have seen. Each epoch is a fresh permutation.
    """
    if n < batch_size:
        g = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return torch.randint(n, (batch_size,), generator=g)
    epoch, place = divmod(step, n // batch_size)
    if _cache.get("key") != (n, seed, epoch):
        g = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        _cache.update(key=(n, seed, epoch), permutation=torch.randperm(n, generator=g))
    return _cache["permutation"][place * batch_size:(place + 1) * batch_size]


def read_ahead(source, batch_size, step, seed, share):
    """Begin to decode the images of a later step, if those of a set are files. Else nothing is done."""
    images = getattr(source, "images", None)
    if isinstance(images, files.StreamedFiles):
        images.read_ahead(order(len(source), batch_size, step, seed)[share])


def load(data="shapes", image_size=32, split="train", device="cpu", seed=0, flip=False, skip_bad=False,
         n_shapes=None, max_bytes=None, task="class", frames=1, frame_step=None, cache=None):
    """The training or validation set named by --data, as an ImageSet. Its .summary tells what was found.

    data: "shapes", or the path of your own images; what may lie there: see common/folders.py.
    max_bytes: a larger set is decoded while training (default: half of the free memory).
    task: "class" gives images; of the drawn world also their maps, in the same order: "segment", one channel
    for the ground and one for each class, or "depth", the signed distance to the outline in half image
    widths, cut off at -1 and 1.
    frames: more than one gives clips of so many; the classes of drawn clips are the ACTIONS.
    frame_step: see read_clip. cache: a folder in which decoded images are kept for the next time.
    Raises BadInput, in one sentence, for a path that is absent or empty, for an empty class, for an image
    that cannot be read.
    """
    if image_size < 1:
        raise BadInput(f"--image_size {image_size}: at least 1")
    if not str(data):
        raise BadInput("--data: names nothing; give `shapes`, or the path of your images")
    free = free_bytes(device) // 2
    if 30 * 3 * frames * image_size ** 2 > free:            # to draw or to decode one takes as much
        raise BadInput(f"--image_size {image_size}: to read one picture takes "
                       f"{90 * frames * image_size ** 2 / 2**30:,.0f} GB, more than half of the free memory")
    if data == "shapes":
        drawn = draw_set if frames == 1 else draw_clip_set
        return drawn(image_size, split, device, seed, n_shapes, flip=flip, task=task, frames=frames)
    if task != "class":
        raise BadInput(f"--task {task}: only the drawn world (--data shapes) comes with such maps, not "
                       f"{data}")
    found = files.read_files(data, image_size, split, frames, frame_step, skip_bad,
                             free if max_bytes is None else max_bytes, cache)
    images = found.images.to(device) if isinstance(found.images, torch.Tensor) else found.images
    out = ImageSet(images, torch.tensor(found.labels, device="cpu"), found.classes, device, flip, found.texts)
    out.summary = found.summary
    out.head = found.head
    out.left_out = found.left_out
    out.unreadable = found.unreadable
    out.without_text = found.without_text
    out.oblong = found.oblong
    return out


def describe(train_set, val_set):
    """Two ImageSets of one --data -> what they hold, in words, for train.py to print before it trains.

    How many images, the classes with their names, how many are held out, and what was left out and why.
    Unlike .summary, which is of one set, it counts both.
    """
    head = f"{train_set.summary}\n    {len(train_set)} to learn from, {len(val_set)} held out"
    lines = [train_set.head or head]
    if train_set.left_out:
        lines.append(f"left out: {train_set.left_out}")
    unreadable = train_set.unreadable + val_set.unreadable
    if unreadable:
        lines.append(f"left out by --skip_bad: {unreadable}")
    oblong = train_set.oblong + val_set.oblong
    if oblong:
        lines.append(f"not square: {oblong}, of which the middle square is taken")
    missing = train_set.without_text + val_set.without_text
    if train_set.texts is not None and val_set.texts is not None:
        lines.append("each has a caption")
    elif missing and len(missing) < len(train_set) + len(val_set):
        lines.append(f"without a caption: {len(missing)}, the first is {missing[0]}")
    return "\n    ".join(lines)


def draw_set(image_size, split, device, seed=0, n=None, flip=False, task="class", frames=1):
    """20,000 drawn pictures to learn from, or 2,000 to validate, or maps of them as in load() -> ImageSet."""
    n = n or DRAWN[split]
    refuse_too_many(n, 1, image_size, device)
    start = 0 if split == "train" else VAL_INDEX
    images = []
    labels = []
    for i in range(0, n, 1000):
        index = torch.arange(start + i, start + min(i + 1000, n), device=device)
        x, y, masks, distances = draw(index, image_size, seed)
        if task == "class":
            images.append(pictures.to_uint8(x))
        elif task == "segment":
            images.append(masks[:, None].to(torch.uint8))
        else:
            images.append(pictures.to_uint8(distances)[:, None].expand(-1, 3, -1, -1))
        labels.append(y)
    one_hot = 1 + len(SHAPES) if task == "segment" else 0
    out = ImageSet(torch.cat(images), torch.cat(labels), SHAPES, device, flip, one_hot=one_hot)
    out.summary = f"shapes: {n} drawn images in {len(SHAPES)} classes: {', '.join(SHAPES)}"
    return out


def draw_clip_set(image_size, split, device, seed=0, n=None, flip=False, task="class", frames=17):
    """4000 drawn clips to learn from, or 1000 to validate -> an ImageSet whose classes are ACTIONS."""
    n = n or DRAWN_CLIPS[split]
    refuse_too_many(n, frames, image_size, device)
    clips = torch.empty(n, 3, frames, image_size, image_size, dtype=torch.uint8, device=device)
    actions = torch.empty(n, dtype=torch.long, device=device)
    # Drawn in float32: a few at a time.
    for i in torch.arange(n, device=device).split(max(1, 2000 // frames)):
        index = i + (0 if split == "train" else VAL_INDEX)
        x, actions[i], _ = draw_clips(index, image_size, frames, seed)
        clips[i] = pictures.to_uint8(x)
    out = ImageSet(clips, actions, ACTIONS, device)
    what = f"{len(ACTIONS)} actions: {', '.join(ACTIONS)}"
    out.summary = f"shapes: {n} drawn clips of {frames} frames with {what}"
    return out


def refuse_too_many(n, frames, image_size, device):
    size = n * 3 * frames * image_size ** 2
    free = free_bytes(device)
    if size > free // 2:
        what = f"clips of {frames} frames" if frames > 1 else "images"
        raise BadInput(f"--n_shapes: {n} {what} at {image_size} pixels take {size / 2**30:,.1f} GB, and "
                       f"{free / 2**30:,.1f} GB "
                       "are free: they do not fit into memory; give less of --n_shapes, --frames or "
                       "--image_size")


# ---------------------------------------------------------------------------------------------------
# Demo

def demo_shapes(image_size):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    for what, function, n in (("pictures", draw, 1000), ("17-frame clips", draw_clips, 50)):
        start = time.perf_counter()
        function(torch.arange(n), image_size)
        print(f"{n / (time.perf_counter() - start):7.0f} {what} of {image_size} x {image_size} drawn per "
              "second")
    images, labels, masks, d = draw(torch.arange(400), image_size)
    fig = plt.figure(figsize=(15, 7.6))
    left, right = fig.add_gridspec(1, 2, width_ratios=[1, 1.0], wspace=0.12, left=0.065, right=0.985,
                                   top=0.92, bottom=0.01)
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
        ax.text(1.02, 0.5, text.replace(" on a ", "\non a "), transform=ax.transAxes, ha="left", va="center",
                fontsize=10)
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
    fig.suptitle(f"data.py: the drawn world at {image_size} x {image_size} pixels, its captions, masks, "
                 "distances and clips")
    fig.savefig("data.png", dpi=90)


def main():
    parser = argparse.ArgumentParser(description="Draw the shapes world, or look at your own images.")
    parser.add_argument("--data", default="shapes", help="`shapes`, or a folder, archive or .npz of images")
    parser.add_argument("--image_size", type=int, default=32, help="side of the square pictures, in pixels")
    parser.add_argument("--frames", type=int, default=1,
                        help="with --data PATH: more than 1 reads clips of so many frames")
    args = parser.parse_args()
    if args.data == "shapes":
        demo_shapes(args.image_size)
    else:
        start = time.perf_counter()
        train = load(args.data, args.image_size, "train", frames=args.frames)
        val = load(args.data, args.image_size, "val", frames=args.frames)
        print(f"{describe(train, val)}\nread in {time.perf_counter() - start:.1f} s")
        n = min(len(train), 4000 // args.frames)
        images, labels = train.batch(order(len(train), n, 0))
        rows = [(c, images[labels == k][:12]) for k, c in enumerate(train.classes[:20])]
        rows = rows if args.frames == 1 else [(c, pictures.film(x[0])) for c, x in rows if len(x)]
        title = f"{args.data} at {args.image_size} x {args.image_size}"
        pictures.save_rows("data.png", [r for r in rows if len(r[1])], title)
    print("wrote data.png")


if __name__ == "__main__":
    main()
