"""
Pictures that the programs and the demos save: labelled rows of images, film strips, animations, curves.

Images are tensors (N, 3, H, W) with values in [-1, 1]; clips are (N, 3, F, H, W). Everything else in the
project may use this room, and it uses nothing of the project.
"""
import textwrap

import torch
from PIL import Image, ImageDraw

MOST_LETTERS = 80                                           # of a label: longer captions are cut


def pyplot():
    """matplotlib.pyplot, set up to write files without a screen."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def plain(text):
    """A text as matplotlib shall print it, letter by letter: `$` would begin a formula, and some names are no
    UTF-8.
    """
    text = str(text).encode("utf-8", "replace").decode()
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    if len(text) > MOST_LETTERS:
        text = text[:MOST_LETTERS - 3] + "..."
    return text.replace("$", r"\$")


def attempt(save, path, *args, **options):
    """Call save(path, ...). A picture that cannot be written is said in a line: no run is lost for it."""
    try:
        save(path, *args, **options)
    except Exception as e:                                  # fonts, full disks, folders in its place
        print(f"no {path}: {str(e).splitlines()[0] if str(e) else type(e).__name__}", flush=True)


# ---- Images ---------------------------------------------------------------------------------------

def to_uint8(images):
    """images in [-1, 1] -> uint8 by rounding, the inverse of `x / 127.5 - 1`."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def tile(images, columns, gap=1, scale=1):
    """images (N, 3, H, W) in [-1, 1] -> one uint8 array (H', W', 3), row by row, enlarged `scale` times."""
    images = to_uint8(images.detach().cpu())
    N, _, H, W = images.shape
    rows = -(-N // columns)
    height = rows * (H + gap) - gap
    width = columns * (W + gap) - gap
    sheet = torch.full((3, height, width), 255, dtype=torch.uint8, device="cpu")
    for i in range(N):
        row, column = divmod(i, columns)
        top = row * (H + gap)
        left = column * (W + gap)
        sheet[:, top:top + H, left:left + W] = images[i]
    return sheet.permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)


def save_rows(path, rows, title=""):
    """A PNG of labelled rows: rows = [(text, images (n, 3, H, W) in [-1, 1]), ...]."""
    plt = pyplot()
    rows = [(plain(text), images) for text, images in rows]
    n = max(len(images) for _, images in rows)
    scale = max(1, 48 // rows[0][1].shape[-1])
    margin = 0.2 + 0.075 * max(len(text) for text, _ in rows)                         # inches, for the words
    width = max(1.5, margin) + 0.55 * n
    height = 0.58 * len(rows) + 0.5 * bool(title)
    fig, axes = plt.subplots(len(rows), 1, figsize=(width, height), squeeze=False)
    for ax, (text, images) in zip(axes[:, 0], rows):
        ax.imshow(tile(images, n, gap=2, scale=scale), interpolation="nearest")
        ax.set_axis_off()
        ax.text(-0.01, 0.5, text, transform=ax.transAxes, ha="right", va="center", fontsize=9)
    fig.suptitle(plain(title), fontsize=10)
    width, height = fig.get_size_inches()
    fig.subplots_adjust(left=margin / width, right=0.995, bottom=0.01,
                        top=1 - 0.42 * bool(title) / height, hspace=0.04)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def save_captioned(path, rows, title=""):
    """A PNG of images with words below each: rows = [(text, images (n, 3, H, W) in [-1, 1], n texts)]."""
    plt = pyplot()
    n = max(len(images) for _, images, _ in rows)
    width, height = 1.1 * n + 0.9, 1.5 * len(rows) + 0.4                              # inches
    fig, axes = plt.subplots(len(rows), n, figsize=(width, height), squeeze=False)
    for line, (name, images, texts) in zip(axes, rows):
        line[0].text(-0.1, 0.5, textwrap.fill(plain(name), 11), transform=line[0].transAxes, ha="right",
                     va="center", fontsize=8)
        for ax in line:
            ax.set_axis_off()
        for ax, image, text in zip(line, to_uint8(images.detach().cpu()), texts):
            ax.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            ax.set_title(textwrap.fill(plain(text), 18, max_lines=3), y=-0.07, va="top", fontsize=6.5)
    fig.suptitle(plain(title), fontsize=10)
    fig.subplots_adjust(left=0.9 / width, right=0.995, bottom=0.4 / height, top=1 - 0.35 / height,
                        hspace=0.35, wspace=0.08)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def colour_maps(maps):
    """Label maps (B, n, H, W), whose largest channel wins -> pictures (B, 3, H, W). Channel 0 becomes
    black.
    """
    device = maps.device
    hue = torch.arange(maps.shape[1] - 1, device=device) * 0.618 % 1                # neighbours are far apart
    thirds = torch.tensor([0, 1 / 3, 2 / 3], device=device)
    wheel = ((hue[:, None] + thirds) % 1 * 6 - 3).abs() - 1
    palette = torch.cat([-torch.ones(1, 3, device=device), wheel.clamp(0, 1) * 1.5 - 0.5])            # (n, 3)
    return palette[maps.argmax(1)].permute(0, 3, 1, 2)


# ---- Clips ----------------------------------------------------------------------------------------

def film(clip, n=9, given=0):
    """A clip (3, F, H, W) -> n of its frames, evenly chosen (n, 3, H', W'). The first `given` get a green
    edge.
    """
    index = torch.linspace(0, clip.shape[1] - 1, min(n, clip.shape[1]), device="cpu").round().long()
    frames = clip[:, index].transpose(0, 1)
    return edged(frames, index < given) if given else frames


def edged(images, which):
    """images (N, 3, H, W) -> the same, enlarged to about 48 pixels, with an edge: green where which (N,),
    else white.
    """
    scale = max(1, 48 // images.shape[-1])
    images = images.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    green = torch.tensor([-0.6, 0.6, -0.6], device="cpu")
    colour = torch.where(which[:, None].cpu(), green, torch.ones(3, device="cpu"))    # (N, 3)
    sheet = colour[:, :, None, None].repeat(1, 1, images.shape[2] + 6, images.shape[3] + 6)
    sheet[:, :, 3:-3, 3:-3] = images
    return sheet


def save_clips(path, clips, columns, names=(), ms=110, given=0):
    """A GIF of clips (N, 3, F, H, W) moving in a grid. names: of the rows. ms: per frame. given: see
    film().
    """
    clips = clips.detach().cpu()
    n_frames, H = clips.shape[2], clips.shape[3]
    scale = 1 if given else max(1, 64 // H)
    # the letters of Pillow's own font are 6 pixels wide
    margin = 6 * max(map(len, names)) + 6 if names else 0
    sheets = []
    for t in range(n_frames):
        frames = clips[:, :, t]
        if given:
            frames = edged(frames, torch.full((len(clips),), t < given, device="cpu"))
        tiles = Image.fromarray(tile(frames, columns, gap=2, scale=scale))
        sheet = Image.new("RGB", (margin + tiles.width, tiles.height), "white")
        sheet.paste(tiles, (margin, 0))
        for row, name in enumerate(names):
            y = ((row + 0.5) * (frames.shape[2] + 2) - 1) * scale - 6
            ImageDraw.Draw(sheet).text((3, y), str(name).encode("ascii", "replace").decode(), fill="black")
        sheets.append(sheet)
    duration = [ms] * (n_frames - 1) + [6 * ms]             # the last frame stays for a while
    sheets[0].save(path, save_all=True, append_images=sheets[1:], duration=duration, loop=0)


# ---- Curves ---------------------------------------------------------------------------------------

def save_curve(path, rows, unit):
    """A PNG of training and validation loss: rows of log.csv as dicts. unit: what the loss is measured in."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(6, 3.6))
    for key, style, label in (("loss", "-", "training batch"), ("val_loss", "o-",
                                                                "validation, averaged weights")):
        points = [(int(row["step"]), float(row[key])) for row in rows if row.get(key) not in (None, "")]
        points = [point for point in points if point[0] > 1] or points            # step 1 would set the scale
        if points:
            style = style if len(points) > 1 else "o"       # a line through one point is not seen
            ax.plot(*zip(*points), style, ms=4, label=label)
    ax.set(xlabel="training step", title=plain(path.parent.name))
    ax.set_ylabel(unit, fontsize="small")                   # the longest unit just fits
    ax.grid(alpha=0.3)
    ax.legend()
    fig.subplots_adjust(left=0.14, right=0.97, bottom=0.14, top=0.91)     # tight_layout takes twice as long
    fig.savefig(path, dpi=100)
    plt.close(fig)
