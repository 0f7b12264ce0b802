"""
Draw from a trained run: a labelled grid, an .npz batch for evaluators, an animation of the tokens appearing.

    python sample.py runs/shapes-vae-ar-gmm                    # RUN/samples-1.png, a row per class
    python sample.py runs/shapes-vae-ar-gmm --class star --n 64
    python sample.py RUN --n 5000 --npz out.npz                # uint8 (N, H, W, 3) `arr_0`, for evaluators
    python sample.py RUN --n 5000 --png FOLDER                 # single files: for other FID tools
    python sample.py RUN --gif                                 # samples-1.gif too, token by token

    python sample.py RUN --image x.png --mask right            # the rest of an image: repaint inside the mask
    python sample.py RUN --prompt "a green star on a red background"          # a run with --condition text
    python sample.py RUN --image x.png --known_scales 3        # VAR: its coarse scales stay
    python sample.py RUN --diffusion_steps 50:5                # fewer denoising steps for later tokens (MAR)
    python sample.py RUN --top_p 0.9 --clip 2 --guidance closed               # GIVT's tricks
    python sample.py CLIPS --gif                               # a run with --frames: film strips, and moving
    python sample.py CLIPS --known_frames 5                    # how validation clips go on after 5 frames
    python sample.py --official mar_base.pth --vae kl16.ckpt --label 207      # MAR's: a golden retriever
    python sample.py --official c2i_B_256.pt --vq vq_ds16_c2i.pt              # LlamaGen's; --titok, --lfq
    torchrun --standalone --nproc_per_node=8 -- sample.py RUN --n 50000 --npz out.npz

On eight GPUs the samples are the same. Torchrun needs the --, or it takes --n for one of its own. Without
--cfg and --temperature the defaults of common/drawing.py are used, as by evaluate.py and train.py.
"""
import argparse
import csv
import math
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from common import memory, waiting

waiting.gently()                                            # before torch is imported
memory.keep()
import numpy as np
import torch
from PIL import Image

import maskgit
from common import captions, clips, compiling, drawing, pictures, runs
from data import BadInput
from official import llamagen, mar, open_magvit2, rar, titok, var

TRICKS = ("steps", "schedule", "order", "choice_temperature", "guidance", "top_k", "top_p", "clip", "beam",
          "fan", "cfg_schedule", "cfg_interval", "encode_every", "diffusion_steps", "sampler", "spacing")
LARGEST_SEED = 4_503_599_626                                # beyond it, train.py's seeds overflow 64 bits
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".pdf", ".svg", ".eps", ".ps")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Draw samples from a trained run.")
    p.add_argument("run", nargs="?", help="run folder of a generator, such as runs/shapes-vae-ar-gmm")
    p.add_argument("--n", type=int, help="number of samples (default: 8 per class, or 16 of one --class)")
    p.add_argument("--class", "--label", dest="cls", help="only this class, by name or number")
    p.add_argument("--cfg", type=float, help="guidance scale; 1 is off")
    p.add_argument("--temperature", type=float, help="below 1: closer to the mode; gmm: scales every sigma")
    p.add_argument("--batch_size", type=int, default=250, help="samples drawn at once")
    p.add_argument("--seed", type=int, default=0, help="the same seed gives the same samples")
    p.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32",
                   help="bf16: faster where a pass of the generator draws many tokens (default: fp32)")
    p.add_argument("--device", help="cpu, cuda, mps (default: a GPU if there is one)")
    p.add_argument("--compile", action="store_true",
                   help="torch.compile what is repeated; it pays for thousands of samples (default: not)")
    add_wish_flags(p)
    add_output_flags(p)
    add_drawing_flags(p)
    add_official_flags(p)
    args = p.parse_args(argv)
    if (args.run is None) == (args.official is None):
        raise BadInput("name a run folder, or weights with --official: one of them")
    if not args.official and (args.text_encoder or any(getattr(args, name) for name in RELEASES)):
        raise BadInput(f"--{', --'.join(RELEASES)}, --text_encoder: go with --official; a run has its own")
    return args


def add_wish_flags(p):
    g = p.add_argument_group("what is asked for")
    g.add_argument("--prompt", nargs="+",
                   help="captions to draw, each in quotes, for a run with --condition text (default: of "
                        "validation images)")
    g.add_argument("--image", help="an image to edit; --mask says where it is repainted")
    g.add_argument("--mask", help="left, right, top, bottom, centre, border, all, a box y0,x0,y1,x1 in "
                                  "fractions, or a .png, white where to repaint")
    g.add_argument("--known_scales", type=int,
                   help="var: so many coarse scales of --image stay, the finer ones are drawn (in --mask, "
                        "default: all)")
    g.add_argument("--known_frames", type=int,
                   help="clips: so many frames of validation clips (or of --image, your own) are given, the "
                        "rest is predicted; --class says how it goes on")


def add_output_flags(p):
    g = p.add_argument_group("what is written")
    g.add_argument("--out", help="the picture (default: the next free of RUN/samples-1.png, -2 ...)")
    g.add_argument("--npz", help="also write the samples as uint8 (N, [F,] H, W, 3) `arr_0`, with `labels`")
    g.add_argument("--png", help="also write each sample, or each frame of a clip, as a PNG into this "
                                 "folder, and what it was asked to be into FOLDER.csv")
    g.add_argument("--reference",
                   help="also write the run's validation images as such an .npz, to compare samples with")
    g.add_argument("--gif", nargs="?", const="",
                   help="also write an animation (default: beside --out): tokens appearing, or clips moving")


def add_drawing_flags(p):
    g = p.add_argument_group("how tokens are drawn")
    g.add_argument("--steps", type=int, help="maskgit, mar: passes for all tokens (default: 12, mar 64 or T)")
    g.add_argument("--cfg_schedule", choices=["linear", "constant", "power-cosine"],
                   help="maskgit, mar, var, --titok: guidance grows up to --cfg or is constant; "
                        "power-cosine: --titok only")
    g.add_argument("--cfg_interval", type=int,
                   help="ar: guide only the first so many tokens + 2, as LlamaGen counts; -1: all")
    g.add_argument("--encode_every", type=int,
                   help="mar: encode all tokens in each so manyth pass, in others the new ones only; faster, "
                        "not exact (default: 1, exact)")
    g.add_argument("--diffusion_steps",
                   help="diffusion head: denoising steps per token; mar: 50:5 goes from 50 to 5")
    g.add_argument("--sampler", choices=["ancestral", "ddim", "heun", "euler"],
                   help="diffusion head: how noise is removed; heun and euler for --objective flow")
    g.add_argument("--spacing", choices=["strided", "official"],
                   help="diffusion head: which noise levels; official begins at t = 999")
    g.add_argument("--schedule", choices=list(maskgit.SCHEDULES),
                   help="maskgit: how many tokens are revealed when (default: cosine)")
    g.add_argument("--order", choices=["confidence", "halton"],
                   help="maskgit: reveal first the most confident tokens, or tokens that lie far apart")
    g.add_argument("--choice_temperature", type=float, help="maskgit: noise in what is revealed first")
    g.add_argument("--guidance", choices=["closed", "importance", "rejection", "official"],
                   help="gmm: how p(x|c)^s p(x)^(1-s) is drawn from")
    g.add_argument("--top_k", type=int, help="categorical: keep the likeliest ids; 0 keeps all")
    g.add_argument("--top_p", type=float,
                   help="keep the likeliest components (gmm) or ids (categorical) that reach this sum")
    g.add_argument("--clip", type=float, help="gmm: cut every component off at so many sigmas")
    g.add_argument("--beam", type=int, help="ar: search so many sequences for the likeliest; 1 is off")
    g.add_argument("--fan", type=int, help="ar: candidates for each next token of a sequence (default: 8)")


def add_official_flags(p):
    g = p.add_argument_group("the authors' weights instead of a run (docs/weights.md has the files)")
    g.add_argument("--official", help="file of the generator, such as mar_base.pth; name its tokenizer too")
    g.add_argument("--vae", help="MAR: the file of its tokenizer, kl16.ckpt")
    g.add_argument("--vq", help="LlamaGen: the file of its tokenizer, such as vq_ds16_c2i.pt")
    g.add_argument("--titok", help="TiTok: the file of its tokenizer, such as tokenizer_titok_l32.bin")
    g.add_argument("--lfq", help="Open-MAGVIT2: the file of its tokenizer")
    g.add_argument("--msvq", help="VAR: the file of its tokenizer, vae_ch160v4096z32.pth")
    g.add_argument("--vqgan", help="RAR: the file of its tokenizer, maskgit-vqgan-imagenet-f16-256.bin")
    g.add_argument("--image_size", type=int, default=256,
                   help="LlamaGen and Open-MAGVIT2: 256 (default), 384 or 512 pixels; VAR: 256 or 512")
    g.add_argument("--text_encoder",
                   help="LlamaGen's text-conditional files: google/flan-t5-xl, or its folder")


# ---- The program ---------------------------------------------------------------------------------

def main(argv=None):
    args = parse_args(argv)
    with drawing.processes() as share, tempfile.TemporaryDirectory() as folder:
        if share[0]:                                        # it draws its share, the first one writes
            args.out = str(Path(folder) / "samples.png")
            args.npz = args.png = args.gif = args.reference = None
        draw(args, share)


def draw(args, share=(0, 1)):
    """Load, refuse what cannot be, draw, write. share: rank and number of the processes."""
    device = runs.pick_device(args.device)
    if args.official:
        run = official_run(args, device)
        args.run = args.official
        args.n = args.n or (4 if args.cls else 16)
    else:
        run = runs.load_run(args.run, device)
    run.bf16 = args.dtype == "bf16"
    run.share = share
    tricks = refuse(args, run)
    out, gif, npz, reference = output_paths(args, run)
    if args.compile:
        compiling.for_drawing(run)
    options = {name: getattr(args, name) for name in ("cfg", "temperature", "batch_size", "seed")} | tricks
    draw_kind = dict(classes=draw_classes, captions=draw_captions, clips=draw_clips)
    try:
        images, asked = draw_kind[drawing.kind_of(run)](run, args, out, gif, options)
        if npz:
            np.savez(npz, arr_0=pictures.to_uint8(images).movedim(1, -1).numpy(), **asked)
        if args.png:
            save_pngs(Path(args.png), images, names_of(run, asked))
        if reference:
            save_reference(reference, run)
    except OSError as e:
        raise BadInput(f"could not write ({e})") from None
    except ValueError as e:                                 # the models say what does not fit them
        raise BadInput(f"{args.run}: {e}") from None
    written = [out, npz, args.png, f"{Path(args.png)}.csv" if args.png else None, reference,
               gif]
    print("wrote " + ", ".join(str(path) for path in written if path))


def draw_classes(run, args, out, gif, options):
    """Images of one class or of all, or an edited image -> (N, 3, H, W), {name: array} for the .npz."""
    labels = drawing.labels_of(run.classes, args.cls, args.n)
    start = time.perf_counter()
    if args.image:
        mask = args.mask or "all"                           # with --known_scales
        given, images = drawing.edit(run, args.image, mask, labels, known_scales=args.known_scales, **options)
    else:
        images = drawing.draw_samples(run, labels, **options)
    seconds = time.perf_counter() - start
    print(f"{len(labels)} samples in {seconds:.2f} s: {seconds / len(labels):.4f} s per image at batch "
          f"{min(args.batch_size, len(labels))}, {args.dtype}, {run.device.type}")
    classes = labels.unique().tolist()
    if len(classes) > drawing.MOST_ROWS:
        print(f"{out} shows the first {drawing.MOST_ROWS} of {len(classes)} classes")
    if args.image:
        rows = [(str(run.classes[k]), images[labels == k][:12]) for k in classes[:drawing.MOST_ROWS]]
        kept = f" but {args.known_scales} coarse scales" if args.known_scales else ""
        title = f"{run.folder.name}: {Path(args.image).name}, repainted {mask}{kept}"
        pictures.save_rows(out, [("given", given)] + rows, title)
    else:
        drawing.save_grid(out, run, images, labels, each=12 if args.cls is None else None)
    if gif:
        shown = drawing.first_of_each(labels, 8, most=10)
        save_gif(gif, run, labels[shown], 8, **options)
    return images, dict(labels=labels.numpy())


def draw_captions(run, args, out, gif, options):
    """Images of the prompts, or of captions of validation images -> images (N, 3, H, W), {name: array}."""
    texts = args.prompt or captions.some(run, args.n or 8)
    each = max(1, (args.n or 8) // len(texts)) if args.prompt else 8
    start = time.perf_counter()
    images = drawing.draw_captions(run, texts, each, **options)
    drawing.save_captions(out, run, texts, images)
    print(f"{len(texts)} captions, {each} images of each, in {time.perf_counter() - start:.1f} s")
    return images, dict(texts=np.repeat(texts, each))


def draw_clips(run, args, out, gif, options):
    """Clips of one class or of all, or the rest of given clips -> clips (N, 3, F, H, W), {name: array}."""
    start = time.perf_counter()
    if args.known_frames:
        drawn, labels = clips.go_on(run, out, args.known_frames, gif, args.image, args.cls, args.n, **options)
    else:
        drawn, labels = clips.draw(run, out, gif, args.cls, args.n, **options)
    print(f"{len(drawn)} clips in {time.perf_counter() - start:.2f} s, pictures included, {args.dtype}, "
          f"{run.device.type}")
    return drawn, dict(labels=labels.numpy())


# ---- What is refused, before anything is drawn ---------------------------------------------------

NUMBERS = [                                                 # flags, what their value must be, the sentence
    (("n", "batch_size", "beam", "fan", "steps", "encode_every"), lambda v: v >= 1, "must be at least 1"),
    (("cfg", "temperature", "choice_temperature"), math.isfinite, "must be a finite number"),
    (("temperature", "choice_temperature"), lambda v: v >= 0, "must not be negative"),
    (("top_p", "clip"), lambda v: v > 0, "must be above 0"),
    (("top_k",), lambda v: v >= 0, "must be at least 1, or 0 to keep all ids"),
    (("seed",), lambda v: abs(v) <= LARGEST_SEED, f"must be at most {LARGEST_SEED}"),
]
REFUSALS = [                                                # what is asked of which run, the sentence
    (lambda a, run: run.generator is None,
     "{a.run}: a tokenizer alone cannot draw; name the run folder of a generator"),
    (lambda a, run: "prefix" in getattr(run.args, "options", {}),
     "{a.run}: this run draws images of images: python -m recipes.pairs draws and measures them"),
    (lambda a, run: a.reference and not run.args.data,
     "--reference: the authors' weights come without images; name a run"),
    (lambda a, run: run.args.frames > 1 and (a.mask or (a.image and not a.known_frames)),
     "--image, --mask: a clip is continued, not repainted; give --known_frames 5, say"),
    (lambda a, run: run.args.frames == 1 and a.known_frames is not None,
     "--known_frames: {a.run} draws images; train a run on clips with --frames 17"),
    (lambda a, run: a.known_scales is not None and (run.args.generator != "var" or not a.image),
     "--known_scales: goes with --image, and with a run of --generator var"),
    (lambda a, run: a.known_scales is not None and not 0 <= a.known_scales < len(run.tokenizer.scales),
     "--known_scales {a.known_scales}: at least 0, and less than the {n_scales} scales of this run"),
    (lambda a, run: run.args.frames == 1 and a.known_scales is None and (a.image is None) != (a.mask is None),
     "--image and --mask belong together: which image, and where to repaint it"),
    (lambda a, run: run.args.condition == "text" and (a.image or a.cls or a.gif is not None),
     "--image, --class, --gif: this run draws captions; ask with --prompt"),
    (lambda a, run: run.args.condition != "text" and a.prompt,
     "--prompt: {a.run} knows classes, not captions: ask with --class, or train with --condition text"),
    (lambda a, run: (a.beam or 1) > 1 and (a.image or a.gif is not None or a.cfg not in (None, 1)),
     "--beam looks for one likely image of a class: leave out --image, --gif and --cfg"),
    (lambda a, run: (a.beam or 1) > 1 and a.compile,
     "--compile: the search of --beam is not compiled; leave one of them out"),
    (lambda a, run: (a.beam or 1) > max(1, a.fan or 8),
     "--beam {a.beam}: --fan must be at least as many (default: 8)"),
    (lambda a, run: a.steps and run.args.generator == "ar" and a.steps != run.tokenizer.seq_len,
     "--steps {a.steps}: an autoregressive model draws one token per step, {run.tokenizer.seq_len} in all"),
    (lambda a, run: (a.steps or 1) > run.tokenizer.seq_len,
     "--steps {a.steps}: there are only {run.tokenizer.seq_len} tokens to reveal"),
]


def refuse(args, run):
    """Refuse in a sentence what this run cannot do -> the tricks asked for, as keywords of draw_samples."""
    for names, fits, sentence in NUMBERS:
        for name in names:
            value = getattr(args, name)
            if value is not None and not fits(value):
                raise BadInput(f"--{name} {value}: {sentence}")
    for asked, sentence in REFUSALS:
        if asked(args, run):
            scales = getattr(run.tokenizer, "scales", ())
            raise BadInput(sentence.format(a=args, run=run, n_scales=len(scales)))
    if args.known_frames is not None:
        clips.known_tokens(run, args.known_frames)
    tricks = {name: getattr(args, name) for name in TRICKS if getattr(args, name) is not None}
    known = drawing.keywords_of(run)
    for name in tricks:
        if name not in known:
            raise BadInput(f"--{name}: not for --generator {run.args.generator} --head {run.args.head}")
    if args.diffusion_steps:
        tricks["diffusion_steps"] = parse_steps(args.diffusion_steps, run)
    return tricks


def parse_steps(text, run):
    """--diffusion_steps N, or A:B for A steps at the first token and B at the last -> what the head takes."""
    try:
        first, *last = [int(v) for v in text.split(":")]
    except ValueError:
        first, last = 0, []
    if first < 1 or len(last) > 1 or min(last, default=1) < 1:
        raise BadInput(f"--diffusion_steps {text}: a number of steps such as 50, or 50:5")
    if not last:
        return first
    if run.args.generator != "mar":
        raise BadInput(f"--diffusion_steps {text}: only --generator mar anneals them; give one number")
    return lambda progress: round(first + (last[0] - first) * progress)


# ---- Files ---------------------------------------------------------------------------------------

def output_paths(args, run):
    """--out, --gif, --npz, --reference -> paths with the endings they will have; None where not wanted."""
    if args.out:
        out = with_ending(args.out, PICTURES)
    else:
        folder, name = (Path(), run.folder.name) if args.official else (run.folder, "samples")
        numbers = [path.stem.rpartition("-")[2] for path in folder.glob(f"{name}-*.*")]
        number = 1 + max((int(n) for n in numbers if n.isdigit()), default=0)
        out = folder / f"{name}-{number}.png"
    gif = None
    if args.gif is not None and drawing.kind_of(run) != "captions":
        gif = with_ending(args.gif or out.with_suffix(".gif"), (".gif",))
    npz = with_ending(args.npz, (".npz",)) if args.npz else None
    reference = with_ending(args.reference, (".npz",)) if args.reference else None
    for flag, path in (("out", out), ("gif", gif), ("npz", npz), ("reference", reference)):
        if path and not path.parent.is_dir():
            raise BadInput(f"--{flag} {path}: could not write, for there is no folder {path.parent}")
    if args.png:
        folder = Path(args.png)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise BadInput(f"--png {folder}: must be a new or an empty folder, for FID tools count all in it")
    return out, gif, npz, reference


def with_ending(path, endings):
    """The path with the first of the endings added, unless it has one of them."""
    path = Path(path)
    return path if path.suffix.lower() in endings else path.with_name(path.name + endings[0])


def names_of(run, asked):
    """What each sample was asked to be: its caption, or the name of its class."""
    if "texts" in asked:
        return asked["texts"].tolist()
    return [str(run.classes[k]) for k in asked["labels"].tolist()]


def save_pngs(folder, images, names):
    """images (N, 3, H, W) -> folder/000000.png ...; of clips (N, 3, F, H, W) each frame, 000000-00.png ...

    folder.csv says what each was asked to be. It lies beside the folder, for FID tools count all in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".csv"), "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["number", "asked"])
        writer.writerows((f"{i:06d}", name) for i, name in enumerate(names))
    for i, image in enumerate(pictures.to_uint8(images).movedim(1, -1).numpy()):
        if image.ndim == 3:
            Image.fromarray(image).save(folder / f"{i:06d}.png")
        else:
            for t, frame in enumerate(image):
                Image.fromarray(frame).save(folder / f"{i:06d}-{t:02d}.png")


def save_reference(path, run):
    """The validation images or clips of the run -> an .npz as of --npz, for tools that compare two sets."""
    val_set = runs.open_split(run.args, "val", run.device)
    parts = [val_set.batch(part) for part in torch.arange(len(val_set), device="cpu").split(500)]
    images = torch.cat([pictures.to_uint8(images).cpu() for images, _ in parts])
    labels = torch.cat([labels.cpu() for _, labels in parts])
    np.savez(path, arr_0=images.movedim(1, -1).numpy(), labels=labels.numpy())


def save_gif(path, run, labels, columns, cfg, temperature, seed, batch_size, **tricks):
    """The grid while it is being drawn. Masked tokens are shown as 0, the mean of all tokens."""
    frames = []

    def on_step(i, tokens, mask):
        mask = mask.view(*mask.shape, *[1] * (tokens.ndim - 2))
        coarse = dict(n_scales=i + 1) if hasattr(run.tokenizer, "scales") else {}     # no id means nothing
        images = run.tokenizer.decode(tokens.masked_fill(mask, 0), **coarse)
        sheet = pictures.tile(images, columns, scale=max(1, 64 // run.args.image_size))
        frames.append(Image.fromarray(sheet))

    torch.manual_seed(seed)
    drawing.draw_tokens(run, labels, cfg, temperature, on_step, **tricks)
    duration = [150] * (len(frames) - 1) + [2000]           # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0)


# ---- The authors' weights as a run ---------------------------------------------------------------

RELEASES = {                                                # flag: tokenizer, generator, its name
    "vae": (mar.load_vae, mar.load_mar, "mar"),
    "vq": (llamagen.load_vq, llamagen.load_gpt, "ar"),
    "titok": (titok.load_tokenizer, titok.load_generator, "titok"),
    "lfq": (open_magvit2.load_tokenizer, open_magvit2.load_gpt, "ar"),
    "msvq": (var.load_vqvae, var.load_var, "var"),
    "vqgan": (titok.load_maskgit_vqgan, rar.load_generator, "rar"),
}


def official_run(args, device):
    """--official with the file of its tokenizer -> the authors' weights as a run. Classes are numbers."""
    flags = [name for name in RELEASES if getattr(args, name)]
    if len(flags) != 1:
        raise BadInput("--official: name its tokenizer too: --vae kl16.ckpt for MAR, --vq vq_ds16_c2i.pt for "
                       "LlamaGen, --titok for TiTok, --lfq for Open-MAGVIT2, --msvq for VAR, --vqgan for RAR")
    load_tokenizer, load_generator, name = RELEASES[flags[0]]
    file = getattr(args, flags[0])
    convolutional = flags[0] in ("vq", "lfq", "msvq")       # it takes any size, so the weights do not tell
    size = dict(image_size=args.image_size) if convolutional else {}
    tokenizer = load_file(flags[0], file, load_tokenizer, **size)
    more = dict(ar=dict(grid=tokenizer.grid), var=dict(tokenizer=tokenizer),
                rar=dict(seq_len=tokenizer.seq_len)).get(name, {})
    generator = load_file("official", args.official, load_generator, **more)
    reads_captions = getattr(generator, "caption", None) is not None
    if reads_captions and (not args.prompt or not args.text_encoder):
        raise BadInput(f"--official {args.official}: reads captions; give --prompt and --text_encoder "
                       "google/flan-t5-xl")
    ours = (tokenizer.seq_len, tokenizer.token_dim or tokenizer.vocab_size)
    theirs = (generator.seq_len, generator.token_dim or generator.vocab_size)
    if ours != theirs:
        raise BadInput(f"--official {args.official}: writes {theirs[0]} tokens of {theirs[1]} numbers or "
                       f"ids, {file} has {ours[0]} of {ours[1]}; is --image_size {args.image_size} right?")
    run_args = argparse.Namespace(
        data="", image_size=args.image_size, frames=1, generator=name,
        head="diffusion" if name == "mar" else "categorical", condition="text" if reads_captions else "class",
        text_encoder=args.text_encoder, text_len=getattr(generator, "n_prefix", None))
    classes = [str(k) for k in range(generator.num_classes)]
    return SimpleNamespace(folder=Path(args.official).with_suffix(""), args=run_args, classes=classes,
                           tokenizer=tokenizer.to(device), generator=generator.to(device), device=device)


def load_file(flag, path, load, **options):
    """What load(path) returns, or a sentence that names flag and file."""
    if not Path(path).is_file():
        raise BadInput(f"--{flag} {path}: there is no such file (docs/weights.md says where they are)")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):                  # their flags lie beside
            return load(path, **options)
    except Exception as e:                                  # a damaged file, or one that load refuses by name
        raise BadInput(f"--{flag} {path}: {str(e).splitlines()[0]}") from None


if __name__ == "__main__":
    main()
