"""
Draw from a loaded run: its sampling defaults, tokens, images, edited images, the picture after stage 2.

A run is what common.runs.load_run returns: folder, args, tokenizer, generator, classes, device. Programs may
add `bf16` (draw under autocast) and `share` (which part of the work this process does under torchrun).

What a run draws is decided here, once: kind_of(run) is "classes", "captions" or "clips".

Shapes:  N images, B in a batch, T tokens, D numbers in a token, P E length and width of a prefix, F frames

    cond (N,) labels or (N, P, E) vectors --draw_tokens--> (B, T[, D]) --decode--> (N, 3, [F,] H, W)
"""
import contextlib
import inspect
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common import captions, pictures, reading
from data import BadInput

DEFAULTS = {                                                # keywords of sample, for each generator-head
    "ar-gmm": dict(cfg=1.35, temperature=0.85),
    "ar-gmm-shapes": dict(cfg=1.5, temperature=0.85, top_p=0.85, clip=2.0, n_tries=128),    # drawn, of a vae
    "ar-gmm-vae": dict(cfg=1.25, temperature=1.0, top_p=0.95, clip=2.0, n_tries=32),        # yours, of a vae
    "ar-diffusion": dict(cfg=2.5, temperature=1.0),
    "ar-categorical": dict(cfg=2.0, temperature=0.9),
    "ar-categorical-shapes": dict(cfg=1.5, temperature=0.9),                          # drawn, of vq and titok
    "maskgit-gmm": dict(cfg=2.5, temperature=0.85),
    "maskgit-categorical": dict(cfg=3.0, temperature=1.0),
    "mar-gmm": dict(cfg=1.5, temperature=0.9),
    "mar-diffusion": dict(cfg=4.0, temperature=1.0, cfg_schedule="constant"),
    "mar-diffusion-causal": dict(cfg=2.0, temperature=1.0, cfg_schedule="constant"),  # of classes
    "mar-categorical": dict(cfg=2.0, temperature=1.0),
    "var-categorical": dict(cfg=3.0, temperature=0.8, cfg_schedule="constant"),
    "published-var-categorical": dict(cfg=2.5, temperature=1.0),           # the authors' weights, their 1.5
    "titok-categorical": dict(cfg=4.5, temperature=9.5),    # the authors' weights: of L-32, as published
    "rar-categorical": dict(cfg=16.0, temperature=1.0),     # of RAR-B, as published; its guidance grows
    "captions": dict(cfg=3.0, temperature=1.0),             # of ids
    "captions-maskgit": dict(cfg=2.5, temperature=0.6),
}
MANY_NUMBERS = 24                            # in a token: 8 tries find no good one, and guidance narrows more
MOST_ROWS = 20                                              # of a picture: more classes are unreadable
ACROSS = 16                                                 # pictures in a row, if a class has more


def kind_of(run):
    """What a run draws: "classes", "captions" or "clips" (of classes)."""
    if run.args.condition == "text":
        return "captions"
    return "clips" if run.args.frames > 1 else "classes"


def default_of(run):
    """The keywords with which this run draws when none are given: cfg, temperature, for some more."""
    if kind_of(run) == "captions" and run.args.head == "categorical":
        return DEFAULTS.get(f"captions-{run.args.generator}", DEFAULTS["captions"])
    name = f"{run.args.generator}-{run.args.head}"
    published = getattr(run.args, "data", None) == ""       # the authors' weights have no data here
    default = DEFAULTS.get(f"published-{name}" if published else name, DEFAULTS[name])
    drawn = getattr(run.args, "data", None) == "shapes"
    tokenizer = getattr(run.args, "tokenizer", None) if kind_of(run) == "classes" else None
    if name == "ar-gmm" and tokenizer == "vae":
        default = DEFAULTS["ar-gmm-shapes" if drawn else "ar-gmm-vae"]
    if name == "ar-categorical" and tokenizer in ("vq", "titok") and drawn:           # ids of lfq keep 2
        default = DEFAULTS["ar-categorical-shapes"]
    causal = getattr(run.args, "attention", None) == "causal"
    if name == "mar-diffusion" and causal and kind_of(run) == "classes":
        default = DEFAULTS["mar-diffusion-causal"]
    if run.args.head == "gmm" and (getattr(run.args, "token_dim", None) or 0) >= MANY_NUMBERS:
        default = DEFAULTS[name] | dict(cfg=2.25, temperature=1.1, n_tries=32)
    if unguided(run):
        return default | dict(cfg=1.0)
    return default


def keywords_of(run):
    """The names of all tricks that the run's generator and its head understand."""
    generator = getattr(run.generator, "generator", run.generator)                    # behind a flow adapter
    known = inspect.signature(generator.sample).parameters
    names = set(known)
    if any(p.kind == p.VAR_KEYWORD for p in known.values()):    # **tricks go to the head
        names |= set(inspect.signature(generator.head.sample).parameters)
    if hasattr(generator, "beam_search") and run.args.head != "diffusion":            # which has no density
        names |= {"beam", "fan"}
    return names


def unguided(run):
    """Was this run trained on one class, without label dropping? Then there is nothing to guide away from."""
    return kind_of(run) != "captions" and len(run.classes) == 1 and not getattr(run.args, "label_drop", None)


# ---- Tokens and images ---------------------------------------------------------------------------

@torch.no_grad()
def draw_tokens(run, cond, cfg=None, temperature=None, on_step=None, beam=1, fan=8, **tricks):
    """cond (B,) labels or (B, P, E) vectors -> tokens (B, T[, D]) on the run's device.

    cfg, temperature: None is the default of the run. beam > 1: the likeliest sequence of a beam
    search, without guidance. tricks: keywords of the sample of the generator and of its head.
    """
    default = dict(default_of(run))
    default_cfg = default.pop("cfg")
    default_temperature = default.pop("temperature")
    if cfg not in (None, 1) and unguided(run):
        raise BadInput(
            f"--cfg {cfg}: {run.folder} was trained on one class and without label dropping, so there is "
            "nothing to guide away from; leave it out, or train with --label_drop 0.1")
    temperature = default_temperature if temperature is None else temperature
    if tricks.get("guidance"):
        default.pop("n_tries", None)                        # each way of guiding has its own
    tricks = default | tricks
    cond = cond.to(run.device, non_blocking=True)
    with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=getattr(run, "bf16", False)):
        if beam > 1:
            return run.generator.beam_search(cond, beam, fan, temperature, **tricks)[0]
        cfg = default_cfg if cfg is None else cfg
        return run.generator.sample(cond, cfg=cfg, temperature=temperature, on_step=on_step, **tricks)


@torch.no_grad()
def draw_samples(run, cond, cfg=None, temperature=None, batch_size=250, seed=0, known=None, known_mask=None,
                 **tricks):
    """cond (N,) labels or (N, P, E) vectors -> images (N, 3, [F,] H, W) float32 in [-1, 1] on the CPU.

    They are drawn in batches and are a function of seed and batch_size. known (N, T[, D]), known_mask (N, T):
    tokens that are given and stay. Under torchrun each process draws every size-th batch and gets those of
    the others: the same images as from one process. Raises BadInput where the tokens drawn are not finite.
    """
    rank, size = share_of(run)
    at_once = max(1, batch_size // run.args.frames)         # clips are decoded in smaller parts
    images = {}                                             # number of the batch -> its images
    with torch.random.fork_rng():
        for k in range(rank, -(-len(cond) // batch_size), size):
            torch.manual_seed(seed + 1_000_003 * k)
            batch = slice(k * batch_size, (k + 1) * batch_size)
            if known is not None:
                tricks.update(known=known[batch], known_mask=known_mask[batch])
            tokens = draw_tokens(run, cond[batch], cfg, temperature, **tricks)
            parts = [run.tokenizer.decode(part).float().cpu() for part in tokens.split(at_once)]
            refuse_not_finite(run, tokens)                  # last: to look waits for the device
            images[k] = torch.cat(parts)
    if size > 1:
        parts = [None] * size
        torch.distributed.all_gather_object(parts, images)
        images = {k: batch for part in parts for k, batch in part.items()}
    return torch.cat([images[k] for k in sorted(images)])


def refuse_not_finite(run, tokens):
    """A model that diverged draws NaN, which a decoder turns into black or grey squares without a word."""
    if tokens.is_floating_point() and not tokens.isfinite().all():
        bad = (~tokens.isfinite()).flatten(1).any(1).sum().item()
        raise BadInput(f"{run.folder}: {bad} of {len(tokens)} samples have tokens that are not finite. "
                       "Unless --cfg or --temperature did it, the model diverged: train it with a lower --lr")


def draw_captions(run, texts, each=1, **options):
    """texts, a list of str -> images (N, 3, H, W), `each` of the first text, then of the second ..."""
    cond = captions.encode(run.args, [text for text in texts for _ in range(each)])
    return draw_samples(run, cond.float() if cond.is_floating_point() else cond, **options)


def labels_of(classes, cls=None, n=None):
    """n labels (n,) of one class, by its name or number, or of all classes equally often.

    Default: 16 of one class, or 8 of each. Raises BadInput for a class that there is not.
    """
    if cls is None:
        n = n or 8 * len(classes)
        return torch.arange(n, device="cpu") * len(classes) // n
    if cls in classes:
        k = list(classes).index(cls)
    elif cls.isdigit() and int(cls) < len(classes):
        k = int(cls)
    else:
        more = ", ..." if len(classes) > MOST_ROWS else ""
        shown = ", ".join(map(str, classes[:MOST_ROWS])) + more
        raise BadInput(f"--class {cls}: the classes are {shown}, or 0 to {len(classes) - 1}")
    return torch.full((n or 16,), k, device="cpu")


# ---- Pictures ------------------------------------------------------------------------------------

def first_of_each(labels, each, most=MOST_ROWS):
    """labels (N,) -> the positions of the first `each` samples of each class, of at most `most` classes."""
    return torch.cat([(labels == k).nonzero()[:each, 0] for k in labels.unique()[:most]])


def save_grid(path, run, images, labels, each=None):
    """Picture: images (N, 3, H, W) class by class, the first `each` of one (None: all), in rows of ACROSS and
    at most MOST_ROWS rows.
    """
    classes = labels.unique()[:MOST_ROWS].tolist()
    rows = [(str(run.classes[k]), images[(labels == k).nonzero()[:each, 0]]) for k in classes]
    pictures.save_rows(path, broken(rows)[:MOST_ROWS], f"{run.folder.name}: samples")


def broken(rows):
    """rows [(text, images (n, 3, H, W)), ...] -> the same with at most ACROSS images in a row, as lines of a
    paragraph: the text stands at the first.
    """
    found = []
    for text, images in rows:
        first, *others = images.split(ACROSS)
        found += [(text, first), *[("", part) for part in others]]
    return found


def save_strips(path, run, clips, labels, each=1):
    """Picture: `each` of the clips (N, 3, F, H, W) of every class as strips of film."""
    shown = first_of_each(labels, each).tolist()
    rows = [(str(run.classes[labels[i]]), pictures.film(clips[i])) for i in shown]
    pictures.save_rows(path, rows, f"{run.folder.name}: samples")


def save_captions(path, run, texts, images):
    """Picture: a row per caption, or more if it has over ACROSS, images (N, 3, H, W) in the order of the
    texts, as many of each.
    """
    rows = broken(zip(texts, images.split(len(images) // len(texts))))
    pictures.save_rows(path, rows[:MOST_ROWS], f"{run.folder.name}: samples")


def save_reconstructions(path, args, tokenizer, val_set):
    """The picture at the end of stage 1: validation images or clips, and what becomes of them."""
    torch.manual_seed(args.seed)
    n = 12 if args.frames == 1 else 4
    index = torch.linspace(0, len(val_set) - 1, n, device="cpu").long()
    x, labels = val_set.batch(index)
    recon = tokenizer.decode(tokenizer.encode(x))
    rows = [("validation images", x), ("reconstructed", recon)]
    if args.frames > 1:
        rows = []
        for clip, again, k in zip(x, recon, labels.tolist()):
            rows += [(str(val_set.classes[k]), pictures.film(clip)), ("reconstructed", pictures.film(again))]
    pictures.attempt(pictures.save_rows, path, rows, path.parent.name)


def save_samples(path, run):
    """The picture at the end of stage 2, or a sentence if the model diverged: the run shall end well."""
    kind = kind_of(run)
    seed = run.args.seed
    labels = torch.arange(min(len(run.classes), MOST_ROWS), device="cpu")
    try:
        if kind == "captions":
            texts = captions.some(run, 8)
            images = draw_captions(run, texts, each=8, seed=seed)
            pictures.attempt(save_captions, path, run, texts, images)
        elif kind == "clips":
            clips = draw_samples(run, labels, seed=seed)
            pictures.attempt(save_strips, path, run, clips, labels)
        else:
            labels = labels.repeat_interleave(8)
            images = draw_samples(run, labels, seed=seed)
            pictures.attempt(save_grid, path, run, images, labels)
    except BadInput as e:
        print(f"no picture: {e}")


# ---- Editing: some tokens are given, the rest is drawn -------------------------------------------

def edit(run, path, mask, labels, seed=0, known_scales=None, **options):
    """An image file and --mask -> the image and its mask (2, 3, H, W), edited images (N, 3, H, W).

    The tokens of the image outside the mask stay. Those inside are drawn, one image for each of labels (N,).
    Tokens in scales (VAR): the mask is that of each scale, and the coarsest known_scales stay everywhere.
    """
    scales = getattr(run.tokenizer, "scales", None)
    if len(run.tokenizer.grid) != 2 and scales is None:
        raise BadInput("--mask: the tokens of this run have no place in the image")
    rows, columns = (scales[-1], scales[-1]) if scales else run.tokenizer.grid
    repaint = shown = parse_mask(mask, rows, columns)                                 # (T,)
    if scales:
        parts = [parse_mask(mask, side, side) & (k >= (known_scales or 0)) for k, side in enumerate(scales)]
        repaint = torch.cat(parts)
    if not repaint.any():
        raise BadInput(f"--mask {mask}: covers no token of the {rows} x {columns} grid")
    first = repaint.nonzero()[0, 0]
    if run.args.generator == "ar" and (~repaint[first:]).any():
        print("note: this model is causal: what it paints does not see given tokens that come later "
              "(--generator maskgit does)")
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"--image {path}: there is no such file")
    side = run.args.image_size
    image = reading.read_image(str(path), path.read_bytes, side)[None].float() / 127.5 - 1
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        known = run.tokenizer.encode(image.to(run.device))                            # (1, T[, D])
    known = known.expand(len(labels), *known.shape[1:])
    known_mask = ~repaint.to(run.device).expand(len(labels), -1)
    images = draw_samples(run, labels, seed=seed, known=known, known_mask=known_mask, **options)
    painted = F.interpolate(shown.view(1, 1, rows, columns).float(), (side, side), mode="nearest")
    return torch.cat([image, torch.where(painted > 0, 0.4, image)]), images


def parse_mask(text, rows, columns):
    """--mask -> (T,) bool over the grid of tokens, True where to repaint: a name, a box or a PNG."""
    y = ((torch.arange(rows, device="cpu") + 0.5) / rows).view(-1, 1).expand(rows, columns)
    x = ((torch.arange(columns, device="cpu") + 0.5) / columns).expand(rows, columns)
    centre = ((y - 0.5).abs() < 0.26) & ((x - 0.5).abs() < 0.26)
    named = dict(left=x < 0.5, right=x > 0.5, top=y < 0.5, bottom=y > 0.5, centre=centre, border=~centre,
                 all=torch.ones_like(centre))
    if text in named:
        return named[text].flatten()
    try:
        if text.lower().endswith(".png"):
            with Image.open(text) as picture:
                small = picture.convert("L").resize((columns, rows), Image.Resampling.BOX)
            return torch.from_numpy(np.array(small)).flatten() > 127
        y0, x0, y1, x1 = (float(v) for v in text.split(","))
    except (OSError, ValueError):
        raise BadInput(f"--mask {text}: {', '.join(named)}, a box y0,x0,y1,x1 in fractions of the image, or "
                       "a readable .png") from None
    return ((y > y0) & (y < y1) & (x > x0) & (x < x1)).flatten()


# ---- Several processes ---------------------------------------------------------------------------

@contextlib.contextmanager
def processes():
    """Joins the processes, if torchrun started this program -> (rank, size), or (0, 1). Rank 0 prints."""
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield rank, size
        return
    torch.distributed.init_process_group("gloo")            # they exchange finished images, on the CPU
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if rank else sys.stdout):
            yield rank, size
    finally:
        torch.distributed.destroy_process_group()


def share_of(run):
    """(rank, size) of a program that shares its work, from processes(). train.py draws alone."""
    return getattr(run, "share", (0, 1))
