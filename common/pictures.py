"""
Pictures that the programs and the demos save: grids, film strips, animations, curves.

Images are (N, 3, H, W) in [-1, 1], clips (N, 3, F, H, W), on any device. This file imports nothing of the
project. Words in a picture are drawn as they are: a class named "$5 or $6" is no formula.
"""
import torch
from PIL import Image, ImageDraw


def to_uint8(images):
    """images in [-1, 1] -> uint8 by rounding, the inverse of `x / 127.5 - 1`."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def colour_maps(maps):
    """Label maps (B, n, H, W), the largest channel wins -> pictures (B, 3, H, W) in [-1, 1].

    Channel 0, the ground, becomes black."""
    hue = torch.arange(maps.shape[1] - 1, device=maps.device) * 0.618 % 1           # neighbours are far apart
    thirds = torch.tensor([0, 1 / 3, 2 / 3], device=maps.device)
    wheel = ((hue[:, None] + thirds) % 1 * 6 - 3).abs() - 1
    black = -torch.ones(1, 3, device=maps.device)
    palette = torch.cat([black, wheel.clamp(0, 1) * 1.5 - 0.5])                     # (n, 3)
    return palette[maps.argmax(1)].permute(0, 3, 1, 2)


def tile(images, columns, gap=1, scale=1):
    """images (N, 3, H, W) in [-1, 1] -> one (H', W', 3) uint8 array, row by row, enlarged `scale` times."""
    images = to_uint8(images.detach().cpu())
    N, _, H, W = images.shape
    rows = -(-N // columns)
    sheet = torch.full((3, rows * (H + gap) - gap, columns * (W + gap) - gap), 255, dtype=torch.uint8)
    for i in range(N):
        r, c = divmod(i, columns)
        sheet[:, r * (H + gap):r * (H + gap) + H, c * (W + gap):c * (W + gap) + W] = images[i]
    return sheet.permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)


def save_rows(path, rows, title=""):
    """Save labelled rows of images: rows = [(text, images (n, 3, H, W) in [-1, 1]), ...] -> a PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    n = max(len(images) for _, images in rows)
    size = rows[0][1].shape[-1]
    scale = max(1, 48 // size)
    margin = 0.2 + 0.075 * max(len(text) for text, _ in rows)                       # inches for the words
    width = max(1.5, margin) + 0.55 * n
    height = 0.58 * len(rows) + 0.5 * bool(title)
    fig, axes = plt.subplots(len(rows), 1, figsize=(width, height), squeeze=False)
    for ax, (text, images) in zip(axes[:, 0], rows):
        ax.imshow(tile(images, n, gap=2, scale=scale), interpolation="nearest")
        ax.set_axis_off()
        ax.text(-0.01, 0.5, drawable(text), transform=ax.transAxes, ha="right", va="center", fontsize=9,
                parse_math=False)
    fig.suptitle(drawable(title), fontsize=10, parse_math=False)
    fig.subplots_adjust(left=margin / width, right=0.995, bottom=0.01,
                        top=1 - 0.42 * bool(title) / height, hspace=0.04)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def drawable(text):
    """Text -> the same with "?" for what is no character, such as half of a file name that is not UTF-8."""
    return str(text).encode("utf-8", "replace").decode()


def save_class_grid(path, images, labels, classes, title=""):
    """One labelled row per class: images (N, 3, H, W), labels (N,)."""
    rows = [(str(name), images[labels.to(images.device) == k]) for k, name in enumerate(classes)]
    save_rows(path, [r for r in rows if len(r[1])], title)


def film(clip, n=9, given=0):
    """A clip (3, F, H, W) as a strip: n of its frames, evenly chosen -> (n, 3, H', W').

    The first `given` frames of the clip get a green edge, the others a white one; given=0: no edges."""
    index = torch.linspace(0, clip.shape[1] - 1, min(n, clip.shape[1])).round().long()
    frames = clip[:, index].transpose(0, 1)
    return edged(frames, index < given) if given else frames


def edged(images, which):
    """images (N, 3, H, W) in [-1, 1] -> the same, enlarged to about 48 pixels, inside an edge of 3 pixels.

    The edge is green where which (N,), else white."""
    scale = max(1, 48 // images.shape[-1])
    images = images.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    colour = torch.where(which[:, None].cpu(), torch.tensor([-0.6, 0.6, -0.6]), torch.ones(3))      # (N, 3)
    sheet = colour[:, :, None, None].repeat(1, 1, images.shape[2] + 6, images.shape[3] + 6)
    sheet[:, :, 3:-3, 3:-3] = images
    return sheet


def save_clips(path, clips, columns, names=(), ms=110, given=0):
    """Moving pictures: clips (N, 3, F, H, W) in [-1, 1] in a grid -> a GIF of `ms` milliseconds per frame.

    names: of the rows. given: the first frames have a green edge, as in film()."""
    clips = clips.detach().cpu()
    F_, H = clips.shape[2], clips.shape[3]
    scale = 1 if given else max(1, 64 // H)
    wide = 6 * max(map(len, names)) + 6 if names else 0     # the letters of Pillow's own font are 6 pixels wide
    pictures = []
    for t in range(F_):
        frames = edged(clips[:, :, t], torch.full((len(clips),), t < given)) if given else clips[:, :, t]
        sheet = Image.fromarray(tile(frames, columns, gap=2, scale=scale))
        picture = Image.new("RGB", (wide + sheet.width, sheet.height), "white")
        picture.paste(sheet, (wide, 0))
        for row, name in enumerate(names):
            y = ((row + 0.5) * (frames.shape[2] + 2) - 1) * scale - 6
            ImageDraw.Draw(picture).text((3, y), drawable(name), fill="black")
        pictures.append(picture)
    durations = [ms] * (F_ - 1) + [6 * ms]                  # the last frame stays a while
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def save_curve(path, rows, unit):
    """The learning curve of one stage -> a PNG, titled by its folder.

    rows: dicts with `step`, `loss` and `val_loss` as in log.csv, empty or None where not measured.
    unit: the name of the loss axis."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(6, 3.6))
    for key, style in (("loss", "-"), ("val_loss", "o-")):
        points = [(int(r["step"]), float(r[key])) for r in rows if r.get(key) not in (None, "")]
        points = [p for p in points if p[0] > 1] or points
        if points:
            label = "training batch" if key == "loss" else "validation, averaged weights"
            ax.plot(*zip(*points), style, ms=4, label=label)
    ax.set(xlabel="training step", ylabel=unit)
    ax.set_title(drawable(path.parent.name), parse_math=False)
    ax.grid(alpha=0.3)
    ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=100)
    plt.close(fig)
