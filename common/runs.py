"""
A run folder: defaults, flags -> models, refusals, checkpoints, load_run.

`args` is one Namespace with every flag of train.py, resolved once from what was given, what the checkpoints
in the run folders say, and DEFAULTS. It travels from the program to the builders below. In a checkpoint it is
the dict "flags", so load_run can build the same models again.

Recipes train models that train.py has no flag for. They set args.tok_options and args.options, which go to
the tokenizer and to the generator as they are, and args.unit, what a loss of their own is measured in.

Read DEFAULTS and REFUSALS first: what a flag is when it is not given, and what does not go together.
"""
import argparse
import contextlib
import hashlib
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed

import ar_transformer
import data
import diffusion_head
import flow_adapter
import gmm_head
import lfq
import mar
import maskgit
import titok
import vae
import var
import vq
from data import BadInput

TOKENIZERS = {
    "vae": (vae.VAE, vae.SIZES),
    "vq": (vq.VQ, vq.SIZES),
    "lfq": (lfq.LFQ, lfq.SIZES),
    "titok": (titok.TiTok, titok.SIZES),
    "titok-vae": (titok.TiTokVAE, titok.SIZES),
    "msvq": (var.MSVQ, var.TOK_SIZES),
    "patches": (vae.Patches, vae.PATCHES),
}
CONTINUOUS = ("vae", "titok-vae", "patches")                         # their tokens are real vectors
GENERATORS = {
    "ar": (ar_transformer.ARTransformer, ar_transformer.SIZES),
    "maskgit": (maskgit.MaskGIT, maskgit.SIZES),
    "mar": (mar.MAR, mar.SIZES),
    "var": (var.VAR, var.SIZES),
}
HEADS = ("gmm", "diffusion", "categorical")
CODEBOOKS = {                                               # of unit length or any, by gradient or averages
    "l2": dict(l2_norm=True),                               # LlamaGen's
    "l2-ema": dict(l2_norm=True, ema=0.99),                 # the same, with restarts of unused codes
    "plain": dict(l2_norm=False),                           # VQGAN's
    "ema": dict(l2_norm=False, ema=0.99),                   # VQ-VAE's
}
QUANTISERS = ("lfq", "fsq", "bsq")                          # without a table: lfq's

# ---- Defaults: later lines override earlier ones, see defaults_of ----------------------------------

DEFAULTS = {
    "any": dict(data="shapes", image_size=32, frames=1, frame_step=None, flip=False, n_shapes=20_000, seed=0,
                skip_bad=False, condition="class", text_encoder="bytes", text_len=None,
                tok_options={}, options={},
                token_dim=None, vocab_size=None, tokens=None, codebook=None, perceptual=0.0, gan=0.0,
                adapter="none", n_mix=16, objective="diffusion", groups=1, order="random",
                attention="bidirectional", label_drop=None, dropout=None, weight_decay=0.02, warmup=50,
                grad_clip=1.0, ema=None, optimizer="muon"),
    "cpu": dict(tok_size="small", tok_steps=1000, tok_batch_size=32, tok_lr=4e-3, beta=0.02,
                size="small", steps=1600, batch_size=64, lr=4e-3),
    # Estimated, until it is measured: vae + ar at these sizes take 7 + 17 PFLOP (torch.utils.flop_counter).
    # An H100 does a sixth of its 989 TFLOP/s in such convolutions and a quarter in such transformers: 1 + 1
    # minutes, and 2 to compile both stages, so about 4 in all. A step of stage 2 is 2.1 TFLOP, 8 ms, longer
    # than its few hundred launches take; at 32 pixels it would be 0.5. Ids have 256 tokens here, four times
    # as many: AR 5 minutes more, MaskGIT 8. Activations: 7 GB (vae, ar) to 28 GB (ids) in float32, half of
    # that in bfloat16.
    "cuda": dict(image_size=64, n_shapes=50_000, tok_size="medium", tok_steps=4000, tok_batch_size=128,
                 tok_lr=1e-3, beta=0.02, size="medium", steps=8000, batch_size=256, lr=1e-3),
    # beta: of the commitment. l2 leaves half of the codes unused
    "any-vq": dict(beta=0.25, codebook="l2-ema"),
    "any-vq-patches-coarse": dict(codebook="ema"),           # the linear path: codes of any length
    "any-vq-patches": dict(codebook="ema"),
    "any-lfq": dict(beta=0.05, codebook="lfq"),
    "any-lfq-fsq": dict(beta=None),
    "any-lfq-bsq": dict(beta=0.0),
    "any-titok": dict(beta=0.25, codebook="l2-ema"),
    "any-msvq": dict(beta=0.02, codebook="ema"),            # of sums of scales: 0.25 pulls detail out of f
    "any-titok-vae": dict(beta=0.01),
    "any-patches": dict(tok_size="4", tok_steps=0, beta=None),            # pixels: nothing is trained
    "cpu-vae": dict(tok_size="patches", tok_lr=1e-2),
    "cuda-vae": dict(tok_size="patches-medium", tok_steps=2000),
    "cpu-vq": dict(tok_size="patches"),
    "cpu-vq-patches-coarse": dict(tok_steps=700),
    "cpu-vq-patches": dict(tok_steps=600, tok_lr=2e-3),
    "cpu-lfq": dict(tok_size="patches"),
    "cpu-lfq-patches": dict(tok_steps=1500),
    "cpu-titok": dict(tokens=16, tok_steps=2000, tok_batch_size=16, tok_lr=3e-3),
    "cpu-titok-vae": dict(tokens=16, tok_steps=2000, tok_batch_size=16, tok_lr=3e-3),
    "cpu-msvq": dict(tok_steps=1000, tok_lr=2e-3),
    # 2,700 steps of tiny beat 920 of small in the same time: 96.8% of samples recognised for 94.0%
    "cpu-ar-gmm": dict(size="tiny", steps=4500, lr=6e-3),
    "cpu-ar-categorical": dict(size="tiny", steps=3000),
    "cpu-maskgit": dict(steps=3000),  # a pass teaches the masked tokens only: it needs more steps
    "cpu-maskgit-categorical": dict(size="tiny", steps=8000),
    "cpu-mar": dict(size="tiny", steps=7000, dropout=0.0),
    "cpu-var": dict(size="tiny", steps=5000, batch_size=32),
    "cuda-maskgit": dict(steps=16_000),
    "cuda-mar": dict(steps=16_000, dropout=0.0),
    "cpu-clips": dict(image_size=16, n_shapes=16_000, tok_size="clips", tok_steps=2600, tok_batch_size=8,
                      size="tiny", steps=6500, batch_size=32),
    "cuda-clips": dict(image_size=64, n_shapes=20_000, tok_size="clips-medium", tok_batch_size=32,
                       batch_size=128),
}
PER_TOKEN = {"drawn shapes": 8, "grey pictures": 8, "colour pictures": 32}          # numbers: see suit()
BETA_IN_COLOUR = 0.005                                      # of a vae: less noise in many small components
BORDER_IN_COLOUR = 2.25                                     # of its linear path: see vae.LinearPath
LABEL_DROP = 0.1                                            # where there is more than one class, or captions
STAGE1 = ("data", "image_size", "frames", "frame_step", "flip", "n_shapes", "seed", "tokenizer", "tok_size",
          "tok_steps", "tok_batch_size", "tok_lr", "token_dim", "beta", "vocab_size", "codebook", "tokens",
          "perceptual", "gan", "tok_options")
STAGE2 = ("adapter", "generator", "head", "n_mix", "objective", "groups", "order", "attention", "size",
          "steps", "batch_size", "lr", "label_drop", "dropout", "condition", "text_encoder",
          "text_len", "options")
BOTH = ("optimizer", "weight_decay", "warmup", "grad_clip", "ema")
MAY_CHANGE = ("steps", "tok_steps", "lr", "tok_lr")         # with --resume: train longer, or at a lower rate

# Flags of the first edition that are gone, with the only values that today's code still means.
GONE = dict(task="class", joint=False, channels=3, likelihood="mse", corrupt=0.0, stage="pixels",
            mix="vector", head_width=None, head_depth=None, batch_mul=4, split=None,
            n_buffer=None, mask_min=0.0)


def machine_of(device):
    """The word for a device in the keys of DEFAULTS. Macs' GPUs have the CPU's sizes."""
    return "cuda" if device.type == "cuda" else "cpu"


def defaults_of(args, device):
    """args (tokenizer, tok_size, generator, head, frames) -> the default of each flag on this machine."""
    machine = machine_of(device)
    defaults = DEFAULTS["any"] | DEFAULTS[machine]

    def add(kind):
        defaults.update(DEFAULTS.get(f"any-{kind}", {}) | DEFAULTS.get(f"{machine}-{kind}", {}))

    add(args.tokenizer)
    size = getattr(args, "tok_size", None) or defaults["tok_size"]        # of the tokenizer here
    for kind in (f"{args.tokenizer}-{size}", f"{args.tokenizer}-{getattr(args, 'codebook', None)}",
                 args.generator, f"{args.generator}-{args.head}"):
        add(kind)
    if args.frames not in (None, 1):
        add("clips")
    return defaults


# ---- Flags -> args --------------------------------------------------------------------------------

def folders(given):
    """The run folders of stage 1 and stage 2: by --tok_name and --name, or after what is trained."""
    data_name = Path(given.data or "shapes").name.split(".")[0] or "data"
    tokenizer = given.tokenizer if given.frames in (None, 1) else f"{given.tokenizer}-{given.frames}f"
    tok_name = given.tok_name or f"{data_name}-{tokenizer}"
    parts = [data_name, tokenizer, "text" if given.condition == "text" else None,
             "flow" if given.adapter == "flow" else None, given.generator, given.head]
    name = given.name or "-".join(part for part in parts if part)
    return Path(given.runs) / tok_name, Path(given.runs) / name


def resolve(given, tok_folder, folder):
    """given: flags, None where not given -> args: each flag as given, else as saved, else its default.

    A checkpoint in tok_folder or folder says how that stage was trained. Raises BadInput where a flag
    contradicts it, where a run stopped and neither --resume nor --overwrite is given, and where --resume
    finds nothing. tok_folder None: there is no stage 1 of its own, folder holds all (recipes/joint.py).
    """
    device = pick_device(given.device)
    if given.resume and given.overwrite:
        raise BadInput("--resume goes on and --overwrite starts anew: give one of them")
    if given.generator != "none" and folder == tok_folder:
        raise BadInput(f"--name and --tok_name are both {folder.name}: give the two stages folders of their "
                       "own")
    for path in filter(None, (tok_folder, folder)):
        refuse_folder(path)
        remove_leftovers(path)
    saved1 = read_for(given, tok_folder) if tok_folder else None
    saved2 = None if given.generator == "none" else read_for(given, folder)
    if given.resume and saved1 is None and saved2 is None:
        where = f"{folder} or {tok_folder}" if tok_folder else f"{folder}"
        raise BadInput(f"--resume: there is no run in {where}; leave --resume out to start one")
    if given.overwrite:
        saved2 = None
        if saved1 is not None and (given.generator == "none" or not fits(given, saved1)):
            saved1 = None                                   # else a finished tokenizer is kept
    flags = {}
    names2 = STAGE2 + BOTH if tok_folder else STAGE1 + STAGE2 + BOTH
    for path, saved, names in ((tok_folder, saved1, STAGE1 + BOTH), (folder, saved2, names2)):
        if saved is None:
            continue
        if not saved["done"] and not given.resume and not given.overwrite:
            raise BadInput(f"{path} holds a run that stopped at step {saved['step']}: go on with --resume, "
                           "or start again with --overwrite")
        refuse_gone(path, saved["flags"])
        keep = dict(saved["flags"])
        if path == tok_folder and saved["done"]:      # how a finished stage was optimised is its own business
            names = [name for name in names if name not in BOTH or getattr(given, name, None) is not None]
        for name in names:
            if name in keep:
                flags[name] = saved_or_given(given, name, keep[name], path, saved)
    kind = argparse.Namespace(**{name: flags.get(name, getattr(given, name))
                                 for name in ("tokenizer", "tok_size", "codebook", "generator", "head",
                                              "frames")})
    defaults = defaults_of(kind, device)
    by_default = []
    for name in STAGE1 + STAGE2 + BOTH:
        if name not in flags:
            flags[name] = getattr(given, name, None)
            if flags[name] is None:
                flags[name] = defaults.get(name)
                by_default.append(name)
    args = argparse.Namespace(**vars(given) | flags)
    args.device = device
    args.by_default = by_default
    args.compile = device.type == "cuda" if given.compile is None else given.compile
    args.stage1_done = saved1 is not None and saved1["done"] and saved1["step"] >= args.tok_steps
    args.stage2_done = saved2 is not None and saved2["done"] and saved2["step"] >= args.steps
    args.resume1 = saved1 is not None and not args.stage1_done
    args.resume2 = saved2 is not None and not args.stage2_done
    args.begun = [path for path, saved in ((tok_folder, saved1), (folder, saved2)) if saved is not None]
    return args


def on_pixels(given, folder):
    """given, with the VAE whose networks see the pixels, for recipes. A run in folder keeps its own."""
    if given.tok_size is not None or (not given.overwrite and read_checkpoint(folder) is not None):
        return given
    size = dict(tok_size="medium")
    if pick_device(given.device).type != "cuda":
        size = dict(tok_size="small", tok_steps=given.tok_steps or 1000)
    return argparse.Namespace(**vars(given) | size)


def read_for(given, folder):
    """read_checkpoint; with --overwrite a damaged one counts as none."""
    try:
        return read_checkpoint(folder)
    except BadInput:
        if given.overwrite:
            return None
        raise


def saved_or_given(given, name, saved_value, folder, saved):
    """The value of a flag in a run that was begun before. Raises BadInput where saved and given differ."""
    value = getattr(given, name, None)
    if value is None:
        return saved_value
    if value == saved_value or name == "data":              # compared by content: refuse_other_data
        return value
    if given.resume and name in MAY_CHANGE:
        if not name.endswith("steps") or value > saved["step"]:
            print(f"--{name} {value} instead of {saved_value}: the learning rate follows the new schedule "
                  f"from step {saved['step']} on")
            return value
        raise BadInput(f"--{name} {value}: {folder} is at step {saved['step']} already; give more")
    raise BadInput(f"--{name} {value} does not fit {folder}, which was trained with --{name} {saved_value}: "
                   "give that value, another folder (--name, --tok_name), or --overwrite")


def fits(given, saved):
    """Is a saved stage 1 finished, and as the given flags ask for?"""
    flags = DEFAULTS["any"] | saved["flags"]
    differs = [name for name in STAGE1 if getattr(given, name, None) not in (None, flags.get(name))]
    return saved["done"] and not differs


def refuse_gone(folder, flags):
    """A run of the first edition that used an option which train.py has no longer."""
    for name, neutral in GONE.items():
        if flags.get(name, neutral) not in (neutral, None):
            raise BadInput(f"{folder}: trained with --{name} {flags[name]} by the first edition of this "
                           "project; use it with that version (commit de4e350), or train anew")


def flags_to_save(args, stage):
    """The flags that a checkpoint keeps: a stage 2 run is complete in itself."""
    names = STAGE1 + BOTH if stage == 1 else STAGE1 + STAGE2 + BOTH
    return {name: getattr(args, name) for name in names}


def stages_to_train(args, tok_folder, folder):
    """[1, 2], [1], [2] or []: what is not trained already. Says so where nothing is left to do."""
    stages = [] if args.stage1_done else [1]
    if args.generator != "none" and not args.stage2_done:
        stages.append(2)
    if args.generator != "none" and args.stage2_done:
        print(f"{folder} is trained already: look at samples.png in it, or start again with --overwrite")
    elif not stages:
        print(f"{tok_folder} is trained already: look at reconstructions.png in it, or start again with "
              "--overwrite")
    return stages


# ---- What does not go together --------------------------------------------------------------------

def whole_power(value, n):
    """Is value a whole number to the power of n?"""
    return round(value ** (1 / n)) ** n == value


def is_kind(a, *tokenizers):
    return a.tokenizer in tokenizers


# (what is asked for, what it needs, what to say). A sentence is filled in with the flags.
REFUSALS = [
    (lambda a: a.head == "categorical", lambda a: a.tokenizer not in CONTINUOUS,
     "--head {head} does not fit --tokenizer {tokenizer}, which gives real vectors: use --head gmm"),
    (lambda a: a.head != "categorical", lambda a: a.tokenizer in CONTINUOUS,
     "--head {head} does not fit --tokenizer {tokenizer}, which gives ids: use --head categorical"),
    (lambda a: a.adapter != "none", lambda a: is_kind(a, "vae", "patches"),
     "--adapter: needs --tokenizer vae or patches"),
    (lambda a: a.order == "annealed", lambda a: a.generator == "mar" and a.attention == "causal",
     "--order annealed: needs --generator mar --attention causal, whose orders can become raster"),
    (lambda a: a.condition == "text", lambda a: a.generator != "var",
     "--condition text: --generator var reads no captions; use ar, maskgit or mar"),
    (lambda a: a.condition == "text", lambda a: not a.flip,
     "--flip: a caption may say left or right, which a mirrored image contradicts; leave it out"),
    (lambda a: a.text_encoder != "bytes", lambda a: a.condition == "text",
     "--text_encoder: goes with --condition text"),
    (lambda a: is_kind(a, "msvq"), lambda a: a.generator in ("var", "none"),
     "--generator {generator} does not fit --tokenizer msvq, whose tokens come scale by scale: use "
     "--generator var"),
    (lambda a: a.generator == "var", lambda a: is_kind(a, "msvq"),
     "--generator var writes scales, which --tokenizer {tokenizer} does not have: use --tokenizer msvq"),
    (lambda a: is_kind(a, "msvq"), lambda a: a.codebook in ("plain", "ema"),
     "--codebook {codebook}: the codes of --tokenizer msvq are sums of any length: use ema or plain"),
    (lambda a: a.vocab_size is not None, lambda a: is_kind(a, "vq", "lfq", "titok", "msvq"),
     "--vocab_size: is for --tokenizer vq or lfq or titok or msvq"),
    (lambda a: a.codebook in CODEBOOKS, lambda a: is_kind(a, "vq", "titok", "msvq"),
     "--codebook: is for --tokenizer vq or titok or msvq, or, of lfq, one of lfq, fsq, bsq"),
    (lambda a: a.codebook in QUANTISERS, lambda a: is_kind(a, "lfq"),
     "--codebook {codebook}: is for --tokenizer lfq; vq and titok have l2, l2-ema, plain, ema"),
    (lambda a: a.codebook == "fsq", lambda a: a.beta is None,
     "--beta: weighs the penalty of lfq, and --codebook fsq has none; leave it out"),
    (lambda a: a.codebook == "fsq" and a.vocab_size, lambda a: a.vocab_size in lfq.FSQ_LEVELS,
     "--vocab_size {vocab_size}: fsq has {fsq_sizes} codes, the products of its levels; nearest is "
     "{fsq_nearest}"),
    (lambda a: a.tokens is not None, lambda a: is_kind(a, "titok", "titok-vae"),
     "--tokens: is for --tokenizer titok or titok-vae"),
    (lambda a: a.tokenizer == "lfq" and a.vocab_size and a.codebook != "fsq",
     lambda a: a.vocab_size >= 2 and a.vocab_size & (a.vocab_size - 1) == 0,
     "--vocab_size {vocab_size}: lfq has one bit per dimension, so a power of 2 from 2 on, such as 1024"),
    (lambda a: a.tokenizer == "lfq", lambda a: not a.token_dim,
     "--token_dim: of lfq it follows from --vocab_size, 10 bits for 1024"),
    (lambda a: a.frames > 1, lambda a: is_kind(a, "lfq"),
     "--frames {frames}: only --tokenizer lfq reads clips, --tokenizer {tokenizer} does not"),
    (lambda a: a.frames > 1, lambda a: a.condition != "text",
     "--condition text: clips are asked for by their action only; leave it or --frames out"),
    (lambda a: a.frames > 1 and a.data == "shapes", lambda a: not a.flip,
     "--flip: a mirrored clip that moves left moves right; leave it out"),
    (lambda a: a.frames > 1, lambda a: not a.perceptual,
     "--perceptual: the classifier of clips looks at time too; leave it out with --frames"),
    (lambda a: a.frame_step is not None, lambda a: a.frames > 1,
     "--frame_step: is for clips, so it goes with --frames 17, say"),
    (lambda a: a.frame_step is not None, lambda a: a.data != "shapes",
     "--frame_step: is for your own clips (--data); drawn ones have as many frames as asked for"),
    (lambda a: True, lambda a: a.tok_size in TOKENIZERS[a.tokenizer][1],
     "--tok_size {tok_size}: --tokenizer {tokenizer} has {tok_sizes}"),
    (lambda a: a.generator != "none", lambda a: a.size in GENERATORS[a.generator][1],
     "--size {size}: --generator {generator} has {sizes}"),
    (lambda a: a.groups != 1, lambda a: a.generator != "var",
     "--groups: --generator var reads codes, not sub-tokens of ids; leave it out"),
    (lambda a: a.tokenizer == "patches" and a.token_dim,
     lambda a: a.token_dim in (vae.PATCHES[a.tok_size]["patch"]**2, 3 * vae.PATCHES[a.tok_size]["patch"]**2),
     "--token_dim {token_dim}: patches of --tok_size {tok_size} have 3 x {tok_size}^2 numbers, or "
     "{tok_size}^2 in grey; leave it out, and the images decide"),
    (lambda a: a.tokenizer == "patches",
     lambda a: not (a.tok_steps or a.beta or a.perceptual or a.gan),
     "--tokenizer patches: nothing is trained in stage 1; leave --tok_steps, --beta, --perceptual and --gan "
     "out"),
    (lambda a: a.tokenizer != "patches", lambda a: a.tok_steps >= 1,
     "--tok_steps {tok_steps}: must be at least 1"),
    (lambda a: a.groups != 1, lambda a: a.head == "categorical",
     "--groups: cuts ids into sub-tokens, so it goes with --head categorical"),
    (lambda a: a.head == "diffusion", lambda a: a.generator != "maskgit",
     "--head diffusion gives no density, and --generator maskgit keeps the tokens of highest density: use "
     "--generator mar, or --head gmm"),
]
AT_LEAST_ONE = ("frames", "frame_step", "image_size", "n_shapes", "tok_batch_size", "steps",
                "batch_size", "n_mix", "token_dim", "vocab_size", "tokens", "groups", "log_every",
                "eval_every", "accumulate")
ABOVE_ZERO = ("tok_lr", "lr", "grad_clip")
NOT_NEGATIVE = ("perceptual", "gan", "beta", "label_drop", "dropout", "weight_decay", "warmup", "ema")
BELOW_ONE = ("label_drop", "dropout", "ema")
NUMBERS = (                                                 # (flags, what holds, what to say)
    (AT_LEAST_ONE, lambda v: v >= 1, "must be at least 1"),
    (ABOVE_ZERO, lambda v: 0 < v < float("inf"), "must be above 0"),
    (NOT_NEGATIVE, lambda v: 0 <= v < float("inf"), "must not be negative"),
    (BELOW_ONE, lambda v: v < 1, "must be below 1"),
    (("seed",), lambda v: abs(v) < 2 ** 31, "must be between -2147483647 and 2147483647"),
)


def refuse(args, dist=SimpleNamespace(rank=0, size=1)):
    """Raises BadInput, in one sentence that names the flag to change, for what cannot work."""
    words = vars(args) | dict(tok_sizes=", ".join(TOKENIZERS[args.tokenizer][1]),
                              sizes=", ".join(GENERATORS.get(args.generator, (None, {}))[1]),
                              fsq_sizes=", ".join(map(str, lfq.FSQ_LEVELS)),
                              fsq_nearest=lfq.nearest_size(max(1, args.vocab_size or 1)))
    for asked, needed, sentence in REFUSALS:
        if asked(args) and not needed(args):
            raise BadInput(sentence.format(**words))
    for names, holds, sentence in NUMBERS:
        for name in names:
            value = getattr(args, name, None)
            if value is not None and not holds(value):
                raise BadInput(f"--{name} {value}: {sentence}")
    if args.shard and dist.size == 1:
        raise BadInput("--shard: there is one process, which has nobody to share with; start several with "
                       "torchrun --standalone --nproc_per_node=2 -- train.py")
    for name in ("tok_batch_size", "batch_size"):
        value = getattr(args, name)
        if value % dist.size:
            raise BadInput(f"--{name} {value} cannot be shared equally by {dist.size} processes: give a "
                           "multiple")
        if value % (dist.size * args.accumulate):
            raise BadInput(f"--{name} {value} cannot be cut into --accumulate {args.accumulate} equal parts "
                           f"in each of {dist.size} processes: give a multiple of "
                           f"{dist.size * args.accumulate}")
    refuse_too_large(args)
    tokenizer = build_tokenizer(args)                       # refuses what its size cannot do
    if args.generator != "none":
        refuse_groups(args, tokenizer.vocab_size or 1)


def refuse_groups(args, vocab_size):
    if args.groups > 1 and not whole_power(vocab_size, args.groups):
        base = round(vocab_size ** (1 / args.groups))
        raise BadInput(f"--groups {args.groups}: --vocab_size {vocab_size} must be a whole number to the "
                       f"power of {args.groups}, such as {base ** args.groups}")


def refuse_too_large(args):
    """Estimates from below: what cannot fit is refused with the number, before any of it is made."""
    free = data.free_bytes(args.device)
    pixels = 3 * args.frames * args.image_size ** 2
    needs = {
        f"--n_shapes {args.n_shapes} at --image_size {args.image_size}":
            pixels * args.n_shapes if args.data == "shapes" else 0,
        f"--tok_batch_size {args.tok_batch_size} at --image_size {args.image_size}":
            32 * pixels * args.tok_batch_size,
        f"--batch_size {args.batch_size}": 4 * 64 * args.batch_size,
        f"--vocab_size {args.vocab_size}": 4 * 64 * (args.vocab_size or 0),
        f"--tokens {args.tokens}": 4 * 64 * (args.tokens or 0)**2,
        f"--token_dim {args.token_dim}": 4 * 64 * (args.token_dim or 0),
        f"--n_mix {args.n_mix}": 4 * 64 * (1 + 2 * (args.token_dim or 1)) * args.n_mix,
    }
    for what, size in needs.items():
        if size > free:
            raise BadInput(f"{what}: needs at least {size / 2**30:,.0f} GB, and {free / 2**30:,.1f} GB are "
                           "free here; give less")


def refuse_other_tokenizer(args, folder, tokenizer):
    """A stage 2 run goes on only with the tokenizer that it was begun with."""
    checkpoint = read_checkpoint(folder) if args.resume2 else None
    if checkpoint is None:
        return
    for name, value in tokenizer.state_dict().items():
        if not torch.equal(value.cpu(), checkpoint["tokenizer"][name]):
            raise BadInput(f"{folder} was begun on the tokens of another tokenizer than the present one: "
                           "start again with --overwrite")


# ---- Data ----------------------------------------------------------------------------------------

def open_split(args, split, device=None):
    """The images that the flags name, for training ("train") or validation ("val") -> data.ImageSet."""
    return data.load(args.data, args.image_size, split, device or args.device, args.seed,
                     flip=bool(args.flip) and split == "train", skip_bad=getattr(args, "skip_bad", False),
                     n_shapes=args.n_shapes if split == "train" else None, frames=args.frames,
                     frame_step=getattr(args, "frame_step", None),
                     cache=Path(args.runs) / "cache" if getattr(args, "runs", None) else None)


def open_data(args):
    """-> training set, validation set. Sets args.token_dim and args.tok_size where the images decide: suit().

    Raises BadInput where --condition text is given and not every image has a caption.
    """
    train_set = open_split(args, "train")
    val_set = open_split(args, "val")
    missing = train_set.without_text + val_set.without_text
    if args.condition == "text" and args.data != "shapes" and (missing or train_set.texts is None):
        first = f", the first is {missing[0]}" if missing else ""
        raise BadInput(f"--condition text: {len(missing) or 'all'} images of --data {args.data} have no "
                       f"caption{first}; write NAME.txt beside NAME.jpg")
    suit(args, train_set)
    return train_set, val_set


def suit(args, train_set):
    """Where no flag says it, what the images are says it: the numbers per token of a VAE with a linear path,
    its beta, and how far the path stretches borders.
    """
    pixels = args.tokenizer == "patches"
    path = pixels or args.tokenizer == "vae" and vae.SIZES.get(args.tok_size, {}).get("linear")
    if not path or getattr(args, "stage1_done", False):
        return
    kind = "drawn shapes"
    if args.data != "shapes":
        tint = 0 if pixels else 2 / 127.5                   # of JPEG; to lose it would be no inverse
        kind = "colour pictures" if in_colour(train_set, tint) else "grey pictures"
    if pixels:
        args.token_dim = vae.PATCHES[args.tok_size]["patch"]**2 * (1 if kind == "grey pictures" else 3)
        said = f"tokens of {args.token_dim} numbers, which are pixels"
    else:
        args.token_dim = args.token_dim or PER_TOKEN[kind]
        said = f"tokens of {args.token_dim} numbers; --token_dim changes it"
        if kind == "colour pictures" and "tok_options" in args.by_default:      # a begun run keeps its own
            args.tok_options = dict(border=BORDER_IN_COLOUR) | args.tok_options
        if kind == "colour pictures" and "beta" in args.by_default:
            args.beta = BETA_IN_COLOUR
            said += f". --beta {args.beta}"
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{kind}: {said}")


def in_colour(image_set, tint):
    """Do red, green and blue differ in 200 images by more than the tint, on average?"""
    index = torch.linspace(0, len(image_set) - 1, min(len(image_set), 200), device="cpu").long()
    images, _ = image_set.batch(index)                                                # (n, 3, H, W)
    return (images.amax(1) - images.amin(1)).mean().item() > tint


def fingerprint(image_set):
    """A short text that stands for a data.ImageSet: pixels, or names, sizes and times of files."""
    digest = hashlib.sha1(repr(list(image_set.classes)).encode())
    digest.update(image_set.labels.cpu().numpy().tobytes())
    if isinstance(image_set.images, torch.Tensor):
        digest.update(image_set.images.contiguous().cpu().numpy().tobytes())
    else:
        files = [(name, os.path.getsize(name), os.path.getmtime(name)) for name, _ in image_set.images.files]
        digest.update(repr(files).encode())
    return digest.hexdigest()


def refuse_other_data(args, folder, train_set):
    """A run that was begun before, and is not overwritten, goes on with the same images only."""
    checkpoint = read_checkpoint(folder) if folder in args.begun else None
    if checkpoint is None or "fingerprint" not in checkpoint:
        return
    if checkpoint["fingerprint"] != fingerprint(train_set):
        raise BadInput(f"--data {args.data}: these are not the images that {folder} was trained on "
                       "(classes, or images, changed since); give those, or start again with --overwrite")


# ---- Models --------------------------------------------------------------------------------------

def given_only(**options):
    """Without those that are None: their default is that of the model."""
    return {name: value for name, value in options.items() if value is not None}


def build_tokenizer(args):
    """The tokenizer that the flags name, with fresh weights."""
    model_class, sizes = TOKENIZERS[args.tokenizer]
    options = sizes[args.tok_size] | dict(image_size=args.image_size) | given_only(beta=args.beta)
    if args.tokenizer in ("vae", "patches"):
        options |= given_only(token_dim=args.token_dim)
    elif args.tokenizer == "lfq":
        if args.codebook == "fsq":
            options |= dict(levels=lfq.FSQ_LEVELS.get(args.vocab_size))
        elif args.vocab_size:
            options |= dict(bits=args.vocab_size.bit_length() - 1)
        options |= dict(frames=args.frames) | given_only(codebook=args.codebook)
    elif args.tokenizer == "titok-vae":
        options |= given_only(token_dim=args.token_dim, n_tokens=args.tokens)
    elif args.tokenizer == "msvq":
        options |= given_only(vocab_size=args.vocab_size, code_dim=args.token_dim)
        options["ema"] = CODEBOOKS[args.codebook].get("ema", 0.0)
    else:
        options |= CODEBOOKS[args.codebook] | given_only(vocab_size=args.vocab_size, code_dim=args.token_dim)
        if args.tokenizer == "titok":
            options |= given_only(n_tokens=args.tokens)
    options |= args.tok_options
    if "proxy" in options:                                  # TiTok's two stages: the flags of a vq run
        options["proxy"] = build_tokenizer(argparse.Namespace(**DEFAULTS["any"] | options["proxy"]))
    try:
        return model_class(**options)
    except ValueError as e:
        flag = f"--frames {args.frames}" if " frames " in str(e) else f"--image_size {args.image_size}"
        raise BadInput(f"{flag} with --tok_size {args.tok_size}: {e}") from None


def build_head(args, tokenizer, n_embd):
    if args.head == "diffusion":
        size = mar.HEAD_SIZES.get(args.size, mar.HEAD_SIZES["mar-b"])
        return diffusion_head.DiffusionHead(n_embd, tokenizer.token_dim, objective=args.objective, **size)
    if args.head == "gmm":
        return gmm_head.GMMHead(n_embd, tokenizer.token_dim, args.n_mix)
    if args.groups > 1:
        return lfq.FactorizedHead(n_embd, tokenizer.vocab_size, args.groups)
    modules = dict(ar=ar_transformer, maskgit=maskgit, mar=mar, var=var)
    module = modules[args.generator]                        # one code in four files
    return module.CategoricalHead(n_embd, tokenizer.vocab_size)


def build_generator(args, tokenizer, num_classes):
    """The generator that the flags name, with its head, behind the flow where --adapter flow asks for it."""
    refuse_groups(args, tokenizer.vocab_size or 1)
    model_class, sizes = GENERATORS[args.generator]
    options = sizes[args.size] | given_only(dropout=args.dropout)
    if args.condition == "text":
        options["text"] = (args.text_len, "bytes" if args.text_encoder == "bytes" else args.text_features)
    if args.generator == "mar":
        options["order"] = args.order
        if args.attention == "causal":                      # one transformer: no buffer, no masks
            model_class = mar.CausalMAR
            for name in ("n_buffer", "mask_min", "mask_std"):
                options.pop(name, None)
    options |= args.options
    label_drop = args.label_drop
    if label_drop is None:                                  # one class: nothing to guide away from
        label_drop = 0.0 if num_classes == 1 and args.condition == "class" else LABEL_DROP
    try:
        head = build_head(args, tokenizer, options["n_embd"])
        if args.generator == "var":                         # it reads sums of codes, not ids
            return model_class(head, tokenizer.quantizer, num_classes, label_drop=label_drop, **options)
        model = model_class(head, tokenizer.seq_len, num_classes, tokenizer.token_dim, tokenizer.vocab_size,
                            tokenizer.grid, label_drop=label_drop, **options)
    except ValueError as e:
        raise BadInput(f"--size {args.size}: {e}") from None
    if args.adapter == "flow":
        model = flow_adapter.Adapted(flow_adapter.FlowAdapter(tokenizer.token_dim, tokenizer.grid), model)
    return model


def unit_of_loss(args, stage):
    """What the loss of a stage is measured in, for the axis of curve.png."""
    if getattr(args, "unit", None):
        return args.unit
    if stage == 1:
        extra = "beta KL" if args.tokenizer in CONTINUOUS else "losses of the codes"
        return f"squared error per pixel value + {extra}"
    if args.head == "diffusion":
        target = "noise + vb (bits)" if args.objective == "diffusion" else "velocity"
        return f"squared error of the {target}"
    return "nats per token"


# ---- Checkpoints ---------------------------------------------------------------------------------

def save_atomically(state, path):
    """torch.save to a temporary file, then rename: `path` always holds a whole file, old or new."""
    path = Path(path)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:                    # torch turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise BadInput(f"could not write {path} ({first_line(e)}); the previous one, if any, is "
                       "untouched") from None


def load_file(path, map_location="cpu", mmap=False):
    """What save_atomically wrote. Raises ValueError for a damaged file: torch.load skips the checksums.

    mmap: tensors stay in the file, on the CPU, and are read where they are looked at.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"its part {damaged} has a wrong checksum")
    if mmap:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return torch.load(path, map_location=map_location, weights_only=True)


def read_checkpoint(folder):
    """The checkpoint in a run folder as a dict, or None where there is none."""
    path = Path(folder) / "ckpt.pt"
    if not path.exists():
        return None
    try:
        checkpoint = load_file(path)
    except Exception as e:                                  # half a dozen kinds for a damaged file
        raise BadInput(f"{path}: not a readable checkpoint ({first_line(e)}); --overwrite trains "
                       "anew") from None
    needed = ("stage", "step", "done", "flags", "ema", "classes")
    missing = [name for name in needed if name not in checkpoint] if isinstance(checkpoint, dict) else needed
    if missing:
        raise BadInput(f"{path}: not a checkpoint of this project, {', '.join(missing)} missing; "
                       "--overwrite trains anew")
    return checkpoint


def first_line(error):
    """The first line of an exception's text, without torch's advice about unsafe loading."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    return "not written by this project" if "eights only" in text or "weights_only" in text else text[:200]


def refuse_folder(path):
    """A run folder must be a folder that can be written, known before an hour is lost. Leaves nothing."""
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()                                     # a name that is too long
        there = next((folder for folder in (path, *path.parents) if folder.exists()), Path("."))
        if not there.is_dir():
            raise BadInput(f"{there} is a file, not a folder: give another --runs or --name")
        probe = there / f"probe.{os.getpid()}.tmp"
        probe.touch()
        probe.unlink(missing_ok=True)                       # another process may have tidied up
    except OSError as e:
        raise BadInput(f"{path} cannot be written ({e.strerror}): give another --runs or --name") from None


def remove_leftovers(folder):
    """What a kill in the middle of writing left behind, each as large as a checkpoint."""
    for path in Path(folder).glob("*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


def averaged(checkpoint):
    """The averaged weights of a checkpoint's model, without what was trained around it."""
    weights = inside("module.", checkpoint["ema"])
    if any(name.startswith("tokenizer.") for name in weights):        # a tokenizer, and the losses around it
        return inside("tokenizer.", weights)
    if any(name.startswith("vae.") for name in weights):        # a generator, and the VAE of recipes/joint.py
        return inside("generator.", weights)
    return weights


def inside(prefix, weights):
    """The entries of a state dict whose name begins with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def load_run(folder, device="cpu"):
    """A run folder -> folder, args, tokenizer, generator (None of a stage 1 run), classes, device.

    The models carry the averaged weights and are in eval mode. Raises BadInput for anything but a finished
    run.
    """
    folder = Path(folder)
    device = torch.device(device)
    checkpoint = read_checkpoint(folder)
    if checkpoint is None:
        raise BadInput(f"{folder}: no ckpt.pt in it; name a run folder such as runs/shapes-vae-ar-gmm")
    if not checkpoint["done"]:
        raise BadInput(f"{folder}: this run stopped at step {checkpoint['step']}; finish it with train.py "
                       "--resume")
    refuse_gone(folder, checkpoint["flags"])
    args = argparse.Namespace(**DEFAULTS["any"] | checkpoint["flags"])
    args.device = device
    args.runs = str(folder.resolve().parent)                # its folder cache holds the decoded images
    try:
        tokenizer = build_tokenizer(args)
        generator = None
        if checkpoint["stage"] == 1:
            tokenizer.load_state_dict(averaged(checkpoint))
        else:                                               # a stage 2 checkpoint is complete in itself
            tokenizer.load_state_dict(checkpoint["tokenizer"])
            generator = build_generator(args, tokenizer, len(checkpoint["classes"]))
            generator.load_state_dict(averaged(checkpoint))
            generator = generator.to(device).eval()
    except (KeyError, TypeError, AttributeError, RuntimeError) as e:
        raise BadInput(f"{folder}: its checkpoint does not fit today's models ({first_line(e)}); use it "
                       "with the version that made it, or train anew") from None
    tokenizer = tokenizer.to(device).eval()
    return SimpleNamespace(folder=folder, args=args, tokenizer=tokenizer, generator=generator,
                           classes=checkpoint["classes"], device=device)


# ---- The machine ---------------------------------------------------------------------------------

def pick_device(name=None):
    """--device -> torch.device with its index; a GPU if there is one. Under torchrun one for each process."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)                   # so that no process holds memory on another's GPU
    except (RuntimeError, AssertionError, NotImplementedError):
        raise BadInput(f"--device {name}: PyTorch finds no such device on this machine; try "
                       "--device cpu") from None
    return device


def native_bf16(device):
    """Does the processor multiply bfloat16 natively? Elsewhere autocast on a CPU is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    checks = [getattr(torch.cpu, name) for name in names if hasattr(torch.cpu, name)]
    return device.type == "cpu" and any(check() for check in checks)


def use_bf16(args, stage):
    """Train under autocast? By default on CUDA, and transformers on a CPU: convolutions gain nothing."""
    if args.dtype is not None:
        return args.dtype == "bf16"
    transformer = stage == 2 or args.tokenizer.startswith("titok")
    return native_bf16(args.device) and (args.device.type == "cuda" or transformer)


def join_processes(given):
    """Joins the processes if torchrun started this program -> dist with rank and size, 0 and 1 without it."""
    dist = SimpleNamespace(rank=int(os.environ.get("RANK", 0)), size=int(os.environ.get("WORLD_SIZE", 1)))
    if dist.size > 1:
        device = pick_device(given.device)
        if device.type == "cuda":
            torch.distributed.init_process_group("nccl", device_id=device)
        else:
            torch.distributed.init_process_group("gloo")
    return dist


def explain(dist, error):
    """Raises BadInput where an error means that memory was short, or that another process is gone.

    torchrun ends all within seconds when one of them ends.
    """
    if isinstance(error, torch.OutOfMemoryError):
        raise BadInput("the memory of the device is full: try --accumulate 2, which computes half a batch at "
                       "a time, or more, and --recompute; then a smaller --batch_size, --tok_batch_size or "
                       "--image_size") from None
    lost = "onnection" in str(error) or isinstance(error, torch.distributed.DistBackendError)
    if dist.size > 1 and lost:
        raise BadInput(f"process {dist.rank} of {dist.size} has lost another one, which was killed or has "
                       "failed; the same command with --resume goes on from the last checkpoint") from None


def leave_processes(dist):
    if dist.size > 1:
        torch.distributed.destroy_process_group()


def wait_for_all(dist):
    if dist.size > 1:
        torch.distributed.barrier()
