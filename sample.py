"""
Draw from a trained run: a labelled grid, an .npz batch for evaluators, an animation of the tokens appearing.

    python sample.py runs/shapes-vae-ar-gmm                         # RUN/samples.png, one row per class
    python sample.py runs/shapes-vae-ar-gmm --class star --n 64     # one class
    python sample.py runs/shapes-vae-ar-gmm --npz out.npz --n 5000  # uint8 (N, H, W, 3) `arr_0`: what ADM's evaluator reads
    python sample.py runs/shapes-vae-ar-gmm --gif                   # RUN/samples.gif, token by token

    python sample.py RUN --image x.png --mask right                 # the rest of an image: repaint where the mask is
    python sample.py RUN --prompt "a large green star on a red background"     # a run with --condition text
    python sample.py RUN --diffusion_steps 50:5                     # fewer denoising steps for later tokens (MAR)
    python sample.py --official mar_base.pth --vae kl16.ckpt --label 207        # MAR's weights: a golden retriever
    python sample.py --official c2i_B_256.pt --vq vq_ds16_c2i.pt --label 207    # LlamaGen's; TiTok's: --titok FILE
    python sample.py RUN --top_p 0.9 --clip 2 --guidance closed     # GIVT's sampling tricks; --beam 4: a likely image
    python sample.py compress x.gif x.lfq --run runs/shapes-lfq     # a file of tokens (compression.py); decompress: back again
    python sample.py CLIPS --gif                                    # a run with --frames: film strips, and them moving
    python sample.py CLIPS --known_frames 5                         # ... how validation clips go on after 5 frames
    torchrun --standalone --nproc_per_node=8 -- sample.py RUN --n 50000 --npz out.npz        # eight GPUs, the same samples;
                                                                    # without the -- torchrun takes --n for one of its own

Without --cfg and --temperature the defaults below are used; evaluate.py and train.py use the same ones.
"""
import argparse
import contextlib
import inspect
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

import ar_transformer
import data
import lfq
import mar
import maskgit
import titok
import vae
import vq
from data import BadInput

DEFAULTS = {"ar-gmm": dict(cfg=1.5, temperature=0.9), "maskgit-gmm": dict(cfg=3.0, temperature=0.9),
            "mar-gmm": dict(cfg=1.5, temperature=0.9), "mar-diffusion": dict(cfg=4.0, temperature=1.0, cfg_schedule="constant"),
            "ar-diffusion": dict(cfg=2.5, temperature=1.0), "ar-categorical": dict(cfg=2.0, temperature=0.9),
            "maskgit-categorical": dict(cfg=3.0, temperature=1.0), "mar-categorical": dict(cfg=2.0, temperature=1.0),
            "text": dict(cfg=3.0, temperature=1.0), "titok": dict(cfg=4.5, temperature=9.5),               # L-32's, as published
            "segment": dict(cfg=1.0, temperature=0.9), "depth": dict(cfg=1.0, temperature=0.9)}
TRICKS = ("steps", "schedule", "order", "choice_temperature", "guidance", "top_k", "top_p", "clip", "beam", "fan", "cfg_schedule",
          "cfg_interval", "diffusion_steps", "sampler", "spacing")


@torch.no_grad()
def draw_tokens(run, cond, cfg=None, temperature=None, on_step=None, beam=1, fan=8, **tricks):
    """cond (B,) labels or (B, P, E) vectors -> tokens (B, T[, D]) on the run's device; None: the default of this run.
    beam > 1: the likeliest of a beam search, without guidance. tricks: keywords of the generator's and the head's sample."""
    default = default_of(run)
    tricks = {k: v for k, v in default.items() if k not in ("cfg", "temperature")} | tricks
    temperature = default["temperature"] if temperature is None else temperature
    with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=getattr(run, "bf16", False)):       # of --dtype
        if beam > 1:
            return run.generator.beam_search(cond.to(run.device), beam, fan, temperature, **tricks)[0]
        return sampler_of(run)(cond.to(run.device), cfg=default["cfg"] if cfg is None else cfg, temperature=temperature,
                               on_step=on_step, **tricks)


def sampler_of(run):
    """The method that draws: TiTok's own for its authors' weights."""
    return run.generator.sample_titok if getattr(run.args, "titok", None) else run.generator.sample


def default_of(run):
    if getattr(run.args, "titok", None):
        return DEFAULTS["titok"]
    if run.args.condition == "text" and run.args.head == "categorical":
        return DEFAULTS["text"]
    return DEFAULTS[run.args.task if run.source is not None else f"{run.args.generator}-{run.args.head}"]


@torch.no_grad()
def draw_samples(run, cond, cfg=None, temperature=None, batch_size=250, seed=0, known=None, known_mask=None, **tricks):
    """cond (N,) labels or (N, P, E) vectors -> images (N, C, H, W) float32 in [-1, 1] on the CPU, in batches; a function of
    seed and batch_size. known (N, T[, D]), known_mask (N, T): tokens that are given and stay.

    Under torchrun each process draws every size-th batch and gets those of the others: the same images as from one process.
    """
    rank, size = share_of(run)
    images = {}                                             # number of the batch: its images
    with torch.random.fork_rng():
        for k in range(rank, -(-len(cond) // batch_size), size):
            torch.manual_seed(seed + 1_000_003 * k)
            mine = slice(k * batch_size, (k + 1) * batch_size)
            if known is not None:
                tricks.update(known=known[mine], known_mask=known_mask[mine])
            tokens = draw_tokens(run, cond[mine], cfg, temperature, **tricks)
            some = max(1, batch_size // run.args.frames)    # clips are decoded in smaller parts
            images[k] = torch.cat([run.tokenizer.decode(part).float().cpu() for part in tokens.split(some)])
    if size > 1:
        parts = [None] * size
        dist.all_gather_object(parts, images)
        images = {k: batch for part in parts for k, batch in part.items()}
    return torch.cat([images[k] for k in sorted(images)])


@contextlib.contextmanager
def processes():
    """Joins the processes, if torchrun started this program -> (rank, size), else (0, 1). All but the first are silent."""
    rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if size == 1:
        yield rank, size
        return
    dist.init_process_group("gloo")                         # what they exchange, finished images, lies on the CPU
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere if rank else sys.stdout):
            yield rank, size
    finally:
        dist.destroy_process_group()


def share_of(run):
    """(rank, size), where a program shares its work among processes: run.share, from processes(). (train.py draws alone.)"""
    return getattr(run, "share", (0, 1))


def official_run(args, device):
    """--official with the file of its tokenizer -> the authors' weights as a run, like train.load_run; ImageNet's classes
    are numbers.

    MAR-B/L/H with their KL-16 VAE; LlamaGen's class- or text-conditional GPT with its vq_ds16 or vq_ds8; TiTok's generator
    of ids with its tokenizer; Open-MAGVIT2's GPT with its.
    """
    def load(flag, path, read):
        if not Path(path).is_file():
            raise BadInput(f"{flag} {path}: there is no such file (README says where the authors keep them)")
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):                    # their flags lie beside
                return read(path)
        except Exception as e:                              # a damaged file, or one that from_official refuses by name
            raise BadInput(f"{flag} {path}: {str(e).splitlines()[0]}") from None
    kinds = {"vae": (vae.VAE, mar.MAR, "mar"), "vq": (vq.VQ, ar_transformer.ARTransformer, "ar"),
             "lfq": (lfq.LFQ, ar_transformer.ARTransformer, "ar"), "titok": (titok.TiTok, maskgit.MaskGIT, "maskgit")}
    named = [name for name in kinds if getattr(args, name)]
    if len(named) != 1:
        raise BadInput("--official: name its tokenizer too: --vae kl16.ckpt for MAR, --vq vq_ds16_c2i.pt for LlamaGen, "
                       "--titok for TiTok, --lfq for Open-MAGVIT2")
    (tokenizer_class, generator_class, name), file = kinds[named[0]], getattr(args, named[0])
    sized = dict(image_size=args.image_size) if named[0] in ("vq", "lfq") else {}           # convolutions take any size
    tokenizer = load(f"--{named[0]}", file, lambda path: tokenizer_class.from_official(path, **sized))
    places = dict(grid=tokenizer.grid) if name == "ar" else {}
    generator = load("--official", args.official, lambda path: generator_class.from_official(path, **places))
    texts = getattr(generator, "caption", None) is not None
    flags = dict(generator=name, head="diffusion" if name == "mar" else "categorical", condition="text" if texts else "class",
                 text_len=getattr(generator, "n_prefix", None), titok=args.titok)
    if texts and (not args.prompt or not args.text_encoder):
        raise BadInput(f"--official {args.official}: reads captions; give --prompt and --text_encoder google/flan-t5-xl")
    ours, theirs = ((m.seq_len, m.token_dim or m.vocab_size) for m in (tokenizer, generator))
    if ours != theirs:
        raise BadInput(f"--official {args.official}: writes {theirs[0]} tokens of {theirs[1]} numbers or ids, {file} "
                       f"has {ours[0]} of {ours[1]}; is --image_size {args.image_size} right?")
    flags = argparse.Namespace(image_size=args.image_size, frames=1, mix="vector", text_encoder=args.text_encoder, data="",
                               **flags)
    return SimpleNamespace(folder=Path(args.official).with_suffix(""), args=flags, tokenizer=tokenizer.to(device),
                           generator=generator.to(device), source=None, device=device,
                           classes=[str(k) for k in range(generator.num_classes)])


# ---------------------------------------------------------------------------------------------------
# Captions (--condition text of train.py)

def some_captions(run, n):
    """n captions of validation images."""
    from train import captions_of, open_data
    texts = captions_of(run.args, open_data(run.args, "val", run.device), "val")
    return [texts[i] for i in torch.linspace(0, len(texts) - 1, n).long().tolist()]


def draw_captions(run, texts, **options):
    """texts, a list of str -> an image of each (N, 3, H, W)."""
    from train import encode_texts
    cond = encode_texts(run.args, texts)
    return draw_samples(run, cond.float() if cond.is_floating_point() else cond, **options)


def save_captions(path, run, texts, each=8, **options):
    """Picture: a row per caption. -> images, as many of each caption."""
    images = draw_captions(run, [t for t in texts for _ in range(each)], **options)
    rows = [(text, x) for text, x in zip(texts, images.split(each))]
    data.save_rows(path, rows, f"{run.folder.name}: samples")
    return images


# ---------------------------------------------------------------------------------------------------
# Dense prediction: an image in, a map out (--task of train.py)

@torch.no_grad()
def image_tokens(run, images):
    """images (N, 3, H, W) -> the mean tokens (N, P, E) of the run's image tokenizer: the prefix of its maps."""
    return torch.cat([run.source.normalise(run.source.posterior(x.to(run.device))[0]) for x in images.split(250)])


def predict_maps(run, cond, votes=8, **options):
    """The image tokens cond (N, P, E) -> maps (N, C, H, W), each the mean of `votes` sampled ones: what most of them say."""
    many = [draw_samples(run, part.repeat_interleave(votes, 0), **options).unflatten(0, (len(part), votes)).mean(1)
            for part in cond.split(max(1, 1000 // votes))]
    return torch.cat(many)


def save_maps(path, run, n=10, seed=0, **options):
    """Picture of a --task run on n validation images: image, truth, prediction, and where 16 samples disagree."""
    from train import open_data
    flags = argparse.Namespace(**vars(run.args) | dict(task="class"))
    sets = [open_data(f, "val", run.device) for f in (flags, run.args)]
    index = torch.linspace(0, len(sets[0]) - 1, n).long()
    images, truth = (s.batch(index)[0].cpu() for s in sets)
    cond = image_tokens(run, images)
    many = draw_samples(run, cond.repeat_interleave(16, 0), cfg=1.0, temperature=1.0, seed=seed)
    many = many.clamp(-1, 1).unflatten(0, (n, 16))
    spread = many.std(1).mean(1, keepdim=True).expand(-1, 3, -1, -1)                        # (n, 3, H, W), 0 .. about 1
    show = data.colour_maps if run.args.task == "segment" else lambda x: x
    rows = [("image", images), ("true map", show(truth)), ("prediction", show(predict_maps(run, cond, seed=seed, **options))),
            ("one sample", show(many[:, 0])), ("spread of 16", 2 * spread / spread.max().clamp(min=1e-3) - 1)]
    data.save_rows(path, rows, f"{run.folder.name}: validation images")


# ---------------------------------------------------------------------------------------------------
# Editing: some tokens are given, the rest is painted (--image, --mask)

def parse_mask(text, grid):
    """--mask -> (T,) bool over the token grid, True where to repaint: left, right, top, bottom, centre, border, a box
    y0,x0,y1,x1 in fractions of the image, or a PNG, white where to repaint."""
    rows, cols = grid
    y, x = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(cols) + 0.5) / cols, indexing="ij")
    centre = ((y - 0.5).abs() < 0.26) & ((x - 0.5).abs() < 0.26)
    named = dict(left=x < 0.5, right=x > 0.5, top=y < 0.5, bottom=y > 0.5, centre=centre, border=~centre,
                 all=torch.ones_like(centre))
    if text in named:
        return named[text].flatten()
    try:
        if text.lower().endswith(".png"):
            with Image.open(text) as picture:
                return torch.from_numpy(np.array(picture.convert("L").resize((cols, rows), Image.BOX))).flatten() > 127
        y0, x0, y1, x1 = (float(v) for v in text.split(","))
    except (OSError, ValueError):
        raise BadInput(f"--mask {text}: {', '.join(named)}, a box y0,x0,y1,x1 in fractions of the image, or a readable "
                       ".png") from None
    return ((y > y0) & (y < y1) & (x > x0) & (x < x1)).flatten()


def edit(run, args, labels, tricks):
    """--image and --mask -> images (N, 3, H, W): the tokens of the image outside the mask stay, the rest is drawn."""
    if len(run.tokenizer.grid) != 2:
        raise BadInput("--mask: the tokens of this run have no place in the image")
    repaint = parse_mask(args.mask, run.tokenizer.grid)
    if not repaint.any():
        raise BadInput(f"--mask {args.mask}: covers no token of the {run.tokenizer.grid[0]} x {run.tokenizer.grid[1]} grid")
    if run.args.generator == "ar" and (~repaint[repaint.nonzero()[0, 0]:]).any():
        print("note: this model is causal: what it paints does not see given tokens that come later (--generator maskgit "
              "does)")
    if not Path(args.image).is_file():
        raise BadInput(f"--image {args.image}: there is no such file")
    image = data.read_image(args.image, Path(args.image).read_bytes, run.args.image_size)[None].float() / 127.5 - 1
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        known = run.tokenizer.encode(image.to(run.device)).expand(len(labels), *[-1] * (2 if run.tokenizer.token_dim else 1))
    mask = ~repaint.to(run.device).expand(len(labels), -1)
    images = draw_samples(run, labels, args.cfg, args.temperature, args.batch_size, args.seed, known, mask, **tricks)
    side = run.args.image_size
    hole = F.interpolate(repaint.view(1, 1, *run.tokenizer.grid).float(), (side, side), mode="nearest")
    given = torch.cat([image, torch.where(hole > 0, 0.4, image)])
    names = [str(run.classes[k]) for k in labels.unique()]
    rows = [("given", given)] + [(name, images[labels == run.classes.index(name)][:12]) for name in names]
    return images, rows


# ---------------------------------------------------------------------------------------------------
# Clips (--frames of train.py): film strips, moving pictures, and frame prediction

def known_tokens(run, n):
    """How many tokens the first n frames of a clip are. They know nothing of later frames, for the tokenizer is causal."""
    frames, stride = run.args.frames, run.tokenizer.time_stride
    if n % stride != 1 % stride or not 1 <= n < frames:
        fit = list(range(1, frames, stride))
        raise BadInput(f"--known_frames {n}: tokens stand for 1 + a multiple of {stride} frames, and some must be left to draw: "
                       + " or ".join(map(str, sorted(fit, key=lambda k: abs(k - n))[:2])))
    return run.tokenizer.latent_frames(n) * math.prod(run.tokenizer.space)


def predict(run, clips, n, labels=None, cfg=None, **options):
    """Frame prediction: clips (N, 3, F, H, W), of which only the first n frames are looked at -> clips that go on from them.

    labels (N,): the actions to go on with. None: nobody says, the frames alone have to tell, and there is nothing to guide.
    """
    k = known_tokens(run, n)
    parts = clips[:, :, :n].split(max(1, 250 // n))
    tokens = torch.cat([run.tokenizer.encode(part.to(run.device)) for part in parts])       # (N, k)
    known = F.pad(tokens, (0, run.tokenizer.seq_len - k))                                   # (N, T)
    mask = (torch.arange(run.tokenizer.seq_len, device=run.device) < k).expand(len(known), -1)
    if labels is None:
        labels, cfg = torch.full((len(known),), run.generator.num_classes), 1.0
    return draw_samples(run, labels, cfg, known=known, known_mask=mask, **options)


def save_prediction(path, run, clips, names, n, gif=None, **options):
    """Film strips of frame prediction, each clip (N, 3, F, H, W) above what the run makes of its first n frames, those in
    green -> the predicted clips. gif: a path, for the same in motion."""
    drawn = predict(run, clips, n, **options)
    rows = [row for name, pair in zip(names, zip(clips, drawn)) for row in
            ((name, data.film(pair[0], given=n)), ("predicted", data.film(pair[1], given=n)))]
    data.save_rows(path, rows, f"{run.folder.name}: the first {n} frames of {run.args.frames} (green) are given")
    if gif:
        data.save_clips(gif, torch.cat([clips.cpu(), drawn]), len(clips), ("true", "predicted"), given=n)
    return drawn


def given_clips(args, run):
    """--image FILE: a clip of one's own, else validation clips, one of each action -> clips (N, 3, F, H, W), names."""
    if args.image:
        path = Path(args.image)
        if not path.exists():
            raise BadInput(f"--image {path}: there is no such file or folder")
        found = data.clips_of([(p.as_posix(), p.read_bytes) for p in (path.iterdir() if path.is_dir() else [path])])
        if not found:
            raise BadInput(f"--image {path}: neither an animation, nor a film, nor a folder of pictures")
        clip = data.read_clip(*found[0], run.args.image_size, run.args.frames)[0]
        return clip[None].float() / 127.5 - 1, [path.stem]
    from train import open_data
    images = open_data(run.args, "val", run.device)
    n = args.n or min(len(run.classes), 20)
    seen, turns = {}, []
    for i, k in enumerate(images.labels.tolist()):
        turns.append((seen.setdefault(k, 0), k, i))         # the first clip of each class, then the second of each
        seen[k] += 1
    clips, labels = images.batch(torch.tensor([i for _, _, i in sorted(turns)[:n]]))
    return clips, [str(run.classes[k]) for k in labels.tolist()]


def main_clips(args, run, out, tricks):
    """What main() does for a run on clips."""
    gif = None if args.gif is None else Path(args.gif or out.with_suffix(".gif"))
    options = dict(cfg=args.cfg, temperature=args.temperature, batch_size=args.batch_size, seed=args.seed) | tricks
    start, title = time.perf_counter(), f"{run.folder.name}: samples"
    if args.known_frames:
        clips, names = given_clips(args, run)
        labels = None if args.cls is None else class_labels(argparse.Namespace(n=len(clips), cls=args.cls), run.classes)
        images = save_prediction(out, run, clips, names, args.known_frames, gif, labels=labels, **options)
        labels = torch.tensor([-1] * len(images)) if labels is None else labels
    else:
        n = args.n or (4 * len(run.classes) if args.cls is None else 8)
        labels = class_labels(argparse.Namespace(n=n, cls=args.cls), run.classes)
        images = draw_samples(run, labels, **options)
        each = 1 if args.cls is None else 8
        some = torch.cat([(labels == k).nonzero()[:each, 0] for k in labels.unique()])
        names = [str(run.classes[k]) for k in labels.unique().tolist()]
        data.save_rows(out, [(str(run.classes[labels[i]]), data.film(images[i])) for i in some.tolist()], title)
        if gif:
            few = min(6, *labels.bincount()[labels.unique()].tolist())
            some = torch.cat([(labels == k).nonzero()[:few, 0] for k in labels.unique()])
            data.save_clips(gif, images[some], few, names)
    seconds = time.perf_counter() - start
    print(f"{len(images)} clips in {seconds:.2f} s, pictures included, {args.dtype}, {run.device.type}")
    if args.npz:
        np.savez(args.npz, arr_0=data.to_uint8(images).permute(0, 2, 3, 4, 1).numpy(), labels=labels.numpy())
    print("wrote " + ", ".join(str(path) for path in (args.npz, out, gif) if path))


def save_gif(path, run, labels, columns, cfg, temperature, seed, **tricks):
    """Decode the half-written token grids too: unknown tokens are 0, the mean of all tokens."""
    frames = []

    def on_step(i, tokens, unknown):
        shown = tokens.masked_fill(unknown.view(*unknown.shape, *[1] * (tokens.ndim - 2)), 0)
        frames.append(data.tile(run.tokenizer.decode(shown), columns, scale=max(1, 64 // run.args.image_size)))
    torch.manual_seed(seed)
    draw_tokens(run, labels, cfg, temperature, on_step, **tricks)
    pictures = [Image.fromarray(f) for f in frames]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[150] * (len(pictures) - 1) + [2000], loop=0)


def class_labels(args, classes):
    """--class and --n -> labels (N,): one class (by name or number), or all of them equally often."""
    if args.cls is None:
        n = args.n or 8 * len(classes)
        return torch.arange(n) * len(classes) // n
    if args.cls in classes:
        k = list(classes).index(args.cls)
    elif args.cls.isdigit() and int(args.cls) < len(classes):
        k = int(args.cls)
    else:
        raise BadInput(f"--class {args.cls}: the classes are {', '.join(map(str, classes))}, or 0 to {len(classes) - 1}")
    return torch.full((args.n or 16,), k)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Draw samples from a trained run.")
    p.add_argument("run", nargs="?", help="run folder of a generator, such as runs/shapes-vae-ar-gmm")
    p.add_argument("--official", help="instead of a run: the authors' weights, such as mar_base.pth (README has the names)")
    p.add_argument("--vae", help="with --official, for MAR: the file of its tokenizer, kl16.ckpt")
    p.add_argument("--vq", help="with --official, for LlamaGen: the file of its tokenizer, such as vq_ds16_c2i.pt")
    p.add_argument("--titok", help="with --official, for TiTok: the file of its tokenizer, such as tokenizer_titok_l32.bin")
    p.add_argument("--lfq", help="with --official, for Open-MAGVIT2: the file of its tokenizer")
    p.add_argument("--image_size", type=int, default=256,
                   help="with --official, for LlamaGen and Open-MAGVIT2: 256 (default), 384 or 512 pixels")
    p.add_argument("--text_encoder",
                   help="with --official, for LlamaGen's text-conditional files: google/flan-t5-xl, or its folder")
    p.add_argument("--n", type=int, help="number of samples (default: 8 per class, or 16 of one --class)")
    p.add_argument("--class", "--label", dest="cls", help="only this class, by name or number")
    p.add_argument("--cfg", type=float, help="guidance scale; 1 is off")
    p.add_argument("--temperature", type=float, help="below 1: closer to the mode; gmm: scales every sigma")
    p.add_argument("--batch_size", type=int, default=250, help="samples drawn at once")
    p.add_argument("--steps", type=int, help="maskgit, mar: passes in which all tokens are drawn (default: 12; mar: 64 or T)")
    p.add_argument("--cfg_schedule", choices=["linear", "constant", "power-cosine"],
                   help="mar, --titok: guidance grows up to --cfg, or is the same throughout; power-cosine: --titok only")
    p.add_argument("--diffusion_steps",
                   help="diffusion head: denoising steps per token; 50:5 anneals them from first to last token")
    p.add_argument("--sampler", choices=["ancestral", "ddim", "heun", "euler"],
                   help="diffusion head: how noise is removed; heun and euler for --objective flow")
    p.add_argument("--spacing", choices=["strided", "official"],
                   help="diffusion head: which noise levels; official begins at t = 999")
    p.add_argument("--schedule", choices=list(maskgit.SCHEDULES),
                   help="maskgit: how many tokens are revealed when (default: cosine)")
    p.add_argument("--order", choices=["confidence", "halton"],
                   help="maskgit: which tokens are revealed first: the most confident, or those far apart, whatever they say")
    p.add_argument("--choice_temperature", type=float, help="maskgit: noise in the choice of the tokens that stay")
    p.add_argument("--guidance", choices=["closed", "importance", "rejection", "official"],
                   help="gmm: how p(x|c)^s p(x)^(1-s) is drawn from")
    p.add_argument("--top_k", type=int, help="categorical: keep the likeliest ids; 0 keeps all")
    p.add_argument("--top_p", type=float, help="keep the likeliest components (gmm) or ids (categorical) that reach this sum")
    p.add_argument("--clip", type=float, help="gmm: cut every component off at so many sigmas")
    p.add_argument("--beam", type=int, help="ar: keep so many sequences and return the likeliest (no guidance); 1 is off")
    p.add_argument("--fan", type=int, help="ar: candidates for each next token of each sequence of the beam (default: 8)")
    p.add_argument("--prompt", nargs="+", help="captions to draw, each in quotes, for a run with --condition text (default: of "
                                               "validation images)")
    p.add_argument("--cfg_interval", type=int, help="ar: guide only the first so many tokens + 2, as LlamaGen counts; -1: all")
    p.add_argument("--known_frames", type=int, help="clips: the first so many frames of validation clips (or of --image, your "
                                                    "own) are given, the rest is predicted; --class says how it goes on")
    p.add_argument("--image", help="an image to edit; --mask says where it is repainted")
    p.add_argument("--mask", help="left, right, top, bottom, centre, border, all, a box y0,x0,y1,x1 in fractions, or a .png")
    p.add_argument("--seed", type=int, default=0, help="the same seed gives the same samples")
    p.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32",
                   help="bf16: the generator computes in it, which pays where a pass draws many tokens (default: fp32)")
    p.add_argument("--device", help="cpu, cuda, mps (default: CUDA if there is one)")
    p.add_argument("--out", help="the PNG to write (default: RUN/samples.png)")
    p.add_argument("--npz", help="also write the samples as uint8 (N, [F,] H, W, 3) `arr_0`, with `labels`")
    p.add_argument("--gif", nargs="?", const="", help="also write an animation (default: beside --out): tokens appearing, or "
                                                      "clips moving")
    args = p.parse_args(argv)
    if (args.run is None) == (args.official is None):
        raise BadInput("name a run folder, or weights with --official: one of them")
    if (args.vae or args.vq or args.titok or args.lfq or args.text_encoder) and not args.official:
        raise BadInput("--vae, --vq, --titok, --lfq, --text_encoder: go with --official; a run has them in it")
    return args


def parse_steps(text, run):
    """--diffusion_steps N, or A:B for A steps at the first token and B at the last (mar only) -> what head.sample takes."""
    try:
        first, *last = [int(v) for v in text.split(":")]
        assert first >= 1 and len(last) <= 1 and all(v >= 1 for v in last)
    except (ValueError, AssertionError):
        raise BadInput(f"--diffusion_steps {text}: a number of steps such as 50, or 50:5") from None
    if last and run.args.generator != "mar":
        raise BadInput(f"--diffusion_steps {text}: only --generator mar anneals them; give one number")
    return (lambda progress: round(first + (last[0] - first) * progress)) if last else first


def check(args, run):
    """Refuse in a sentence what this run cannot do -> the tricks that were asked for, as keywords."""
    for name in ("n", "batch_size", "beam", "fan", "steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise BadInput(f"--{name} {getattr(args, name)}: must be at least 1")
    for name in ("temperature", "choice_temperature"):
        if getattr(args, name) is not None and getattr(args, name) < 0:
            raise BadInput(f"--{name} {getattr(args, name)}: must not be negative")
    for name in ("top_p", "clip"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise BadInput(f"--{name} {getattr(args, name)}: must be above 0")
    if run.generator is None:
        raise BadInput(f"{args.run}: a tokenizer alone cannot draw; name the run folder of a generator")
    if run.args.frames > 1:
        if args.mask or (args.image and not args.known_frames):
            raise BadInput("--image, --mask: a clip is continued, not repainted; give --known_frames 5, say")
        if args.known_frames is not None:
            known_tokens(run, args.known_frames)
    elif args.known_frames is not None:
        raise BadInput(f"--known_frames: {args.run} draws images; train a run on clips with --frames 17")
    elif (args.image is None) != (args.mask is None):
        raise BadInput("--image and --mask belong together: which image, and where to repaint it")
    if run.source is not None and (args.image or args.cls or args.gif is not None):
        raise BadInput("--image, --class, --gif: this run makes maps of images, it knows no classes")
    if run.args.condition == "text" and (args.image or args.cls or args.gif is not None):
        raise BadInput("--image, --class, --gif: this run draws captions; ask with --prompt")
    if args.prompt and run.args.condition != "text":
        raise BadInput(f"--prompt: {args.run} knows classes, not captions: ask with --class, or train with --condition text")
    tricks = {name: getattr(args, name) for name in TRICKS if getattr(args, name) is not None}
    if "diffusion_steps" in tricks:
        tricks["diffusion_steps"] = parse_steps(args.diffusion_steps, run)
    beam = tricks.get("beam", 1) > 1
    if beam and (args.image or args.gif is not None or args.cfg not in (None, 1)):
        raise BadInput("--beam looks for one likely image of a class: leave out --image, --gif and --cfg")
    if beam and tricks.get("fan", 8) < args.beam:
        raise BadInput(f"--fan {tricks.get('fan', 8)}: must be at least --beam {args.beam}")
    inner = getattr(run.generator, "generator", run.generator)                              # behind a flow adapter
    known = set(inspect.signature(inner.head.sample).parameters) | set(inspect.signature(inner.sample).parameters)
    known = set(inspect.signature(sampler_of(run)).parameters) if getattr(run.args, "titok", None) else known
    known |= {"beam", "fan"} if hasattr(inner, "beam_search") and run.args.head != "diffusion" else set()
    for name in tricks:
        if name not in known:
            raise BadInput(f"--{name}: not for --generator {run.args.generator} --head {run.args.head} --mix {run.args.mix}")
    if tricks.get("steps") and run.args.generator == "ar" and args.steps != run.tokenizer.seq_len:
        raise BadInput(f"--steps {args.steps}: an autoregressive model draws one token per step, {run.tokenizer.seq_len} in "
                       "all")
    if tricks.get("steps", 1) > run.tokenizer.seq_len:
        raise BadInput(f"--steps {args.steps}: there are only {run.tokenizer.seq_len} tokens to reveal")
    return tricks


def main(argv=None):
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] in (["compress"], ["decompress"]):         # a program of its own, with its own flags
        import compression
        return compression.main(words)
    args = parse_args(argv)
    with processes() as share, tempfile.TemporaryDirectory() as folder:
        if share[0]:                                        # a helper: its share of the samples is all that is wanted of it
            args.out, args.npz, args.gif = str(Path(folder) / "samples.png"), None, None
        draw(args, share)


def draw(args, share):
    """What main() does once the flags are read; share: rank and number of the processes."""
    from train import load_run, pick_device
    device = pick_device(args.device)
    run = official_run(args, device) if args.official else load_run(args.run, device)
    run.bf16, run.share = args.dtype == "bf16", share
    if args.official:
        args.run, args.n = args.official, args.n or (4 if args.cls else 16)
    tricks = check(args, run)
    out = Path(args.out or (run.folder.name + ".png" if args.official else run.folder / "samples.png"))
    start, rows = time.perf_counter(), None
    try:
        if run.source is not None:
            n = args.n or 10
            save_maps(out, run, n, args.seed, cfg=args.cfg, temperature=args.temperature, **tricks)
            print(f"wrote {out}: {n} validation images and their maps, {time.perf_counter() - start:.1f} s")
            return
        if run.args.condition == "text":
            texts = args.prompt or some_captions(run, args.n or 8)
            each = max(1, (args.n or 8) // len(texts)) if args.prompt else 8
            images = save_captions(out, run, texts, each, cfg=args.cfg, temperature=args.temperature, batch_size=args.batch_size,
                                   seed=args.seed, **tricks)
            if args.npz:
                np.savez(args.npz, arr_0=data.to_uint8(images).permute(0, 2, 3, 1).numpy(), texts=np.repeat(texts, each))
            print(f"wrote {out}: {len(texts)} captions, {each} images of each, {time.perf_counter() - start:.1f} s")
            return
        if run.args.frames > 1:
            return main_clips(args, run, out, tricks)
        labels = class_labels(args, run.classes)
        if args.image:
            images, rows = edit(run, args, labels, tricks)
        else:
            images = draw_samples(run, labels, args.cfg, args.temperature, args.batch_size, args.seed, **tricks)
        seconds = time.perf_counter() - start
        print(f"{len(labels)} samples in {seconds:.2f} s: {seconds / len(labels):.4f} s per image at batch "
              f"{min(args.batch_size, len(labels))}, {args.dtype}, {run.device.type}")
        if args.npz:
            np.savez(args.npz, arr_0=data.to_uint8(images).permute(0, 2, 3, 1).numpy(), labels=labels.numpy())
            print(f"wrote {args.npz}")
        if rows:
            data.save_rows(out, rows, f"{run.folder.name}: {Path(args.image).name}, repainted {args.mask}")
        else:
            shown = torch.cat([(labels == k).nonzero()[:12 if args.cls is None else None, 0] for k in labels.unique()])
            data.save_class_grid(out, images[shown], labels[shown], run.classes, f"{run.folder.name}: samples")
        print(f"wrote {out}")
        if args.gif is not None:
            path = Path(args.gif or out.with_suffix(".gif"))
            some = torch.cat([(labels == k).nonzero()[:8, 0] for k in labels.unique()])[:80]
            save_gif(path, run, labels[some], 8, args.cfg, args.temperature, args.seed, **tricks)
            print(f"wrote {path}")
    except OSError as e:
        raise BadInput(f"could not write ({e})") from None
    except ValueError as e:                                 # the models say in a sentence what does not fit them
        raise BadInput(f"{args.run}: {e}") from None


if __name__ == "__main__":
    main()
