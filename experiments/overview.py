"""
The picture on top of README: a row of every system, a column of every class, one sample each: the first that
the seed gives, none chosen. The row on top is the first validation image of each class.

    python experiments/overview.py runs/shapes-vae-ar-gmm runs/shapes-vq-ar-categorical ...
    python experiments/overview.py runs/cifar10-vae-ar-gmm ... --title "CIFAR-10, one core"

Samples are drawn as sample.py draws them without flags. The first command writes docs/pictures/overview.png;
runs on other data write overview-NAME.png beside it, NAME as in the names of their run folders. Of clips the
frame in the middle is shown.
"""
import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import drawing, pictures, runs
from data import BadInput

NAMES = {                                                   # tokenizer, generator, head: the system
    ("vae", "ar", "gmm"): "GIVT",
    ("vae", "maskgit", "gmm"): "GIVT-MaskGIT",
    ("vae", "mar", "diffusion"): "MAR",
    ("patches", "ar", "gmm"): "GIVT on pixels",
    ("vq", "ar", "categorical"): "LlamaGen",
    ("vq", "maskgit", "categorical"): "MaskGIT",
    ("lfq", "maskgit", "categorical"): "MAGVIT-v2",
    ("lfq", "ar", "categorical"): "Open-MAGVIT2",
    ("titok", "maskgit", "categorical"): "TiTok",
    ("titok", "ar", "categorical"): "TiTok, causal",
    ("msvq", "var", "categorical"): "VAR",
}
SIDE = 64                                                   # pixels of an image on the page, or a bit less
GAP = 2                                                     # pixels between images
MOST_BYTES = 300_000                                        # of the picture: README is read on phones, too
DPI = 100


def main(argv=None):
    p = argparse.ArgumentParser(description="Rows are systems, columns are classes.")
    p.add_argument("runs", nargs="+", type=Path, help="run folders of train.py on the same data")
    p.add_argument("--title", default="", help="a line on top of the picture (default: none)")
    p.add_argument("--seed", type=int, default=0, help="the same seed gives the same samples")
    p.add_argument("--device", help="cpu, cuda, mps (default: a GPU if there is one)")
    p.add_argument("--out", type=Path, help="the picture (default: in docs/pictures, named by the data)")
    args = p.parse_args(argv)
    device = runs.pick_device(args.device)
    loaded = [runs.load_run(folder, device) for folder in args.runs]
    refuse(loaded)
    out = args.out or ROOT / "docs" / "pictures" / picture_of(loaded[0].args)
    if not out.parent.is_dir():
        raise BadInput(f"--out {out}: there is no folder {out.parent}")
    classes = list(map(str, loaded[0].classes))[:drawing.MOST_ROWS]
    rows = [("drawn" if loaded[0].args.data == "shapes" else "real", first_of_each(loaded[0], len(classes)))]
    for run, name in zip(loaded, names_of(loaded)):
        images = drawing.draw_samples(run, torch.arange(len(classes), device="cpu"), seed=args.seed)
        rows.append((name, still(images)))
        print(f"{name}: {run.folder}", flush=True)
    save(out, rows, classes, args.title)
    print(f"wrote {out}")


def refuse(loaded):
    """BadInput in a sentence for runs that have no place in such a table."""
    first = loaded[0]
    for run in loaded:
        if run.generator is None or "prefix" in getattr(run.args, "options", {}):
            raise BadInput(f"{run.folder}: does not draw images of classes; name runs of a generator")
        if drawing.kind_of(run) == "captions":
            raise BadInput(f"{run.folder}: draws captions, and the columns are classes")
        if list(run.classes) != list(first.classes):
            raise BadInput(f"{run.folder}: has other classes than {first.folder}; name runs on the same data")


def picture_of(args):
    """Flags of a run -> overview.png, or overview-NAME.png for other data than drawn shapes, and clips."""
    name = Path(args.data).name.split(".")[0] + (f"-{args.frames}f" if args.frames > 1 else "")
    return "overview.png" if name == "shapes" else f"overview-{name}.png"


# ---- Names: by what a run is, for its folder may be called anything ------------------------------

def name_of(args):
    """Flags of a run -> the system that it is, or its parts where that has no name of its own."""
    parts = args.tokenizer, args.generator, args.head
    name = NAMES.get(parts, " + ".join(parts))
    if args.generator == "mar" and args.attention == "causal":
        name = "RAR" if args.order == "annealed" and args.head == "categorical" else f"{name}, causal"
    if args.codebook in ("fsq", "bsq"):
        name += f", {args.codebook.upper()}"
    if args.adapter == "flow":
        name += ", flow adapter"
    return name + (f", {args.frames} frames" if args.frames > 1 else "")


def names_of(loaded):
    """The names of the rows. Runs of one name have their folders behind it."""
    names = [name_of(run.args) for run in loaded]
    return [name if names.count(name) == 1 else f"{name} ({run.folder.name})"
            for name, run in zip(names, loaded)]


# ---- Images --------------------------------------------------------------------------------------

def first_of_each(run, n):
    """The first validation image of each of n classes (n, 3, H, W); white for a class that is not there."""
    val_set = runs.open_split(run.args, "val", run.device)
    labels = val_set.labels.cpu()                           # all: a folder of images is sorted by class
    there = [k for k in range(n) if (labels == k).any()]
    images, _ = val_set.batch(torch.tensor([(labels == k).nonzero()[0, 0] for k in there], device="cpu"))
    images = still(images).cpu()
    shown = torch.ones(n, *images.shape[1:])
    shown[there] = images
    for k in sorted(set(range(n)) - set(there)):
        print(f"no validation image of {run.classes[k]}")
    return shown


def still(images):
    """images (N, 3, H, W) as they are; of clips (N, 3, F, H, W) the frame in the middle."""
    return images if images.ndim == 4 else images[:, :, images.shape[2] // 2]


# ---- The picture ---------------------------------------------------------------------------------

def save(path, rows, classes, title=""):
    """A PNG of rows = [(text, images (n, 3, H, W) in [-1, 1]), ...] under the names of n classes.

    Pixels are enlarged a whole number of times, without smoothing: less where the file becomes too large.
    """
    side = max(images.shape[-1] for _, images in rows)
    for scale in range(max(1, SIDE // side), 0, -1):
        draw(path, rows, classes, title, side * scale)
        if path.stat().st_size <= MOST_BYTES:
            return
    print(f"{path} has {path.stat().st_size} bytes, more than the {MOST_BYTES} that were aimed at")


def draw(path, rows, classes, title, side):
    """The PNG with images of so many pixels, or a whole fraction of that where theirs does not divide it."""
    plt = pictures.pyplot()
    rows = [(pictures.plain(text), images) for text, images in rows]
    classes = list(map(pictures.plain, classes))
    step = side + GAP
    letter = 7                                              # pixels, about
    slanted = max(map(len, classes)) * letter > step
    head = 22 + (max(map(len, classes)) * letter * 7 // 10 if slanted else 0)
    left = 12 + (letter + 1) * max(len(text) for text, _ in rows)
    right = head if slanted else 4                          # the last name leans over the edge
    top = head + (22 if title else 0)
    width = max(left + step * len(classes) + right, letter * len(title))
    height = top + step * len(rows)
    fig = plt.figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    write = dict(transform=None, fontsize=9)                # places are pixels from the lower left
    if title:
        fig.text(width / 2, height - 6, pictures.plain(title), ha="center", va="top", **write)
    for k, name in enumerate(classes):
        x = left + k * step + (side // 3 if slanted else side / 2)
        fig.text(x, height - top + 5, name, va="bottom", ha="left" if slanted else "center",
                 rotation=45 if slanted else 0, rotation_mode="anchor" if slanted else "default", **write)
    for i, (text, images) in enumerate(rows):
        bottom = height - top - (i + 1) * step + GAP
        fig.text(left - 6, bottom + side / 2, text, ha="right", va="center", **write)
        scale = max(1, side // images.shape[-1])
        for k, image in enumerate(images):
            fig.figimage(pictures.tile(image[None], 1, scale=scale), left + k * step, bottom)
    fig.savefig(path, dpi=DPI, pil_kwargs=dict(optimize=True))
    plt.close(fig)


if __name__ == "__main__":
    main()
