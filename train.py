"""
Train any tokenizer, and any generator with any head on top of it.

    python train.py --tokenizer vae --head gmm                 # GIVT on the drawn shapes, CPU or CUDA
    python train.py --tokenizer vae --head gmm --data PATH     # ... on your images: class folders, .tar[.gz], .zip, .npz
    python train.py --tokenizer vq --head categorical          # LlamaGen: whole numbers as tokens, a softmax over them
    python train.py --tokenizer lfq --vocab_size 262144 --groups 2         # ... of 2^18, as two digits of 2^9 (MAGVIT-v2)
    python train.py --tokenizer vae --generator maskgit        # ... tokens in parallel: GIVT-MaskGIT
    python train.py --tokenizer vae --generator mar --head diffusion       # MAR: random order, a diffusion loss per token
    python train.py --tokenizer vq --condition text            # ... from captions, not classes
    python train.py --tokenizer vae --task segment             # ... image in, label map out (GIVT section 4.3)
    python train.py --tokenizer lfq --generator maskgit --head categorical --frames 17     # ... clips: MAGVIT-v2
    torchrun --standalone --nproc_per_node=2 train.py ...      # ... on several GPUs (or CPU processes), same global batch

There are two stages and one loop. Stage 1 trains the tokenizer (images -> tokens -> images) unless its run folder is
there already; then all images are encoded once, and stage 2 trains the generator on the tokens. A VAE's tokens are
cached as mean and std, so that every step still draws fresh ones.

Each stage leaves ckpt.pt, log.csv, curve.png and pictures in its folder: runs/shapes-vae, runs/shapes-vae-ar-gmm.
Killed? Run the same command with --resume. Flags that you do not give take the machine's defaults (DEFAULTS below)
or, with --resume, those of the checkpoint.
"""
import argparse
import contextlib
import csv
import functools
import hashlib
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ar_transformer
import data
import diffusion_head
import flow_adapter
import gmm_head
import lfq
import mar
import maskgit
import perceptual_gan
import sample
import titok
import vae
import vq
from data import BadInput

STAGE1 = ("data", "image_size", "frames", "frame_step", "inflate", "flip", "n_shapes", "seed", "task", "tokenizer", "tok_size",
          "tok_steps", "tok_batch_size", "tok_lr", "token_dim", "channels", "likelihood", "beta", "corrupt", "vocab_size",
          "codebook", "tokens", "stage", "proxy", "proxy_flags", "perceptual", "lpips", "gan", "gan_loss", "gan_start", "adaptive")
STAGE2 = STAGE1 + ("adapter", "generator", "head", "mix", "n_mix", "objective", "head_width", "head_depth", "batch_mul",
                   "groups", "split", "order", "attention", "n_buffer", "mask_min", "joint", "size", "steps", "batch_size",
                   "lr", "optimizer", "label_drop", "dropout", "condition", "text_encoder", "text_len")
BOTH = ("weight_decay", "warmup", "grad_clip", "ema")

TOKENIZERS = {"vae": (vae.VAE, vae.SIZES), "vq": (vq.VQ, vq.SIZES), "lfq": (lfq.LFQ, lfq.SIZES),
              "titok": (titok.TiTok, titok.SIZES), "titok-vae": (titok.TiTokVAE, titok.SIZES)}
CONTINUOUS = ("vae", "titok-vae")                           # the others' tokens are whole numbers
GENERATORS = {"ar": (ar_transformer.ARTransformer, ar_transformer.SIZES), "maskgit": (maskgit.MaskGIT, maskgit.SIZES),
              "mar": (mar.MAR, mar.SIZES)}

CODEBOOKS = {                                               # --codebook: unit length or not, by gradient or as averages
    "l2": dict(l2_norm=True), "l2-ema": dict(l2_norm=True, ema=0.99),                       # LlamaGen's, and with restarts
    "plain": dict(l2_norm=False), "ema": dict(l2_norm=False, ema=0.99),                     # VQGAN's, and VQ-VAE's
}
DEFAULTS = {                                                # what a flag is when nobody says it
    "any": dict(data="shapes", image_size=32, frames=1, frame_step=None, inflate=None, flip=False, n_shapes=20_000, seed=0,
                task="class", condition="class",
                text_encoder="bytes", text_len=None, channels=3, likelihood="mse",
                corrupt=0.0, vocab_size=None, codebook=None, tokens=None, stage="pixels", proxy=None, proxy_flags=None,
                perceptual=0.0, lpips=None, gan=0.0, gan_loss="hinge", gan_start=None, adaptive=False, adapter="none",
                mix="vector", n_mix=8, objective="diffusion",
                batch_mul=4, groups=1, split=None, order="random",
                attention="bidirectional", joint=False, label_drop=0.1, weight_decay=0.02, warmup=50, grad_clip=1.0,
                optimizer="muon"),
    "cpu": dict(tok_size="small", tok_steps=1000, tok_batch_size=32, tok_lr=4e-3, beta=0.02,
                size="small", steps=1600, batch_size=64, lr=4e-3),
    "cuda": dict(tok_size="medium", tok_steps=4000, tok_batch_size=128, tok_lr=1e-3, beta=0.02,
                 size="medium", steps=8000, batch_size=256, lr=1e-3),
    "any-lfq": dict(beta=0.05), "cpu-lfq": dict(tok_size="coarse"),
    "any-titok": dict(beta=0.25, codebook="l2-ema"), "any-titok-vae": dict(beta=0.01),
    "cpu-titok": dict(tokens=16, tok_steps=2000, tok_batch_size=16, tok_lr=3e-3),
    "cpu-titok-vae": dict(tokens=16, tok_steps=2000, tok_batch_size=16, tok_lr=3e-3),
    "any-vq": dict(beta=0.25, codebook="l2-ema"),           # beta: of the commitment. LlamaGen's l2 leaves half unused here
    "cpu-maskgit-categorical": dict(size="tiny", steps=8000),
    "cpu-maskgit": dict(steps=3000),                        # a pass teaches the hidden tokens only, so it needs more of them
    "cuda-maskgit": dict(steps=16_000),
    "cpu-segment": dict(steps=2000),
    "cpu-mar": dict(size="tiny", steps=7000, dropout=0.0, mask_min=0.0),                    # all counts: see mar.MAR
    "cuda-mar": dict(steps=16_000, dropout=0.0, mask_min=0.0),
    "cpu-clips": dict(image_size=16, n_shapes=16_000, tok_size="clips", tok_steps=2600, tok_batch_size=8,
                      size="tiny", steps=6500, batch_size=32),
    "cuda-clips": dict(image_size=64, n_shapes=20_000, tok_size="clips-medium", tok_batch_size=32, batch_size=128),
}


def parse_args(argv=None):
    """Flags -> Namespace in which a flag that was not given is None (resolve() fills it)."""
    p = argparse.ArgumentParser(description="Train a tokenizer and a generator on drawn shapes or on your own images.",
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokenizer", choices=list(TOKENIZERS), required=True,
                   help="stage 1: how an image becomes tokens; vae, titok-vae: real vectors; vq, lfq, titok: whole numbers")
    p.add_argument("--generator", choices=["ar", "maskgit", "mar", "none"], default="ar",
                   help="stage 2: one token after the other, masked tokens in parallel, or sets of tokens in random order; none: "
                        "stop after stage 1")
    p.add_argument("--head", choices=["gmm", "diffusion", "categorical"],
                   help="the distribution of one token (default: gmm of vectors, categorical of numbers)")
    g = p.add_argument_group("data")
    g.add_argument("--data", help="`shapes` (drawn, no download), or a folder / .tar[.gz] / .zip of class folders, or an .npz")
    g.add_argument("--image_size", type=int, help="side of the square images, in pixels")
    g.add_argument("--frames", type=int, help="lfq: clips of so many frames, 1 + a multiple of 4 (drawn shapes move, and their "
                                              "action is the class; what files of yours are clips: see data.py)")
    g.add_argument("--frame_step", type=int, help="your clips: take every so manyth frame, and all windows of a file (default: "
                                                  "one, its frames spread evenly over the file)")
    g.add_argument("--n_shapes", type=int, help="how many drawn training images or clips")
    g.add_argument("--flip", action="store_const", const=True, help="mirror images left-right at random")
    g.add_argument("--skip_bad", action="store_true", help="leave out unreadable image files instead of stopping")
    g = p.add_argument_group("stage 1, the tokenizer")
    g.add_argument("--tok_size", choices=list(dict.fromkeys(name for _, sizes in TOKENIZERS.values() for name in sizes)),
                   help="size of the tokenizer, from SIZES in its file")
    g.add_argument("--tok_steps", type=int, help="training steps")
    g.add_argument("--tok_batch_size", type=int, help="images per step, over all processes")
    g.add_argument("--tok_lr", type=float, help="peak learning rate")
    g.add_argument("--token_dim", type=int, help="numbers in one token, or in one code of vq (default: that of the size)")
    g.add_argument("--vocab_size", type=int, help="vq, lfq, titok: number of codes, lfq a power of 2 (default: of the size)")
    g.add_argument("--tokens", type=int, help="titok: tokens per image, such as 8, 16, 32 (default: that of the size)")
    g.add_argument("--stage", choices=["pixels", "proxy", "finetune"],
                   help="titok: learn pixels, or as published: first name the ids of --proxy, then go on from there to pixels "
                        "with encoder and ids frozen (finetune; does the first part too where its folder is missing)")
    g.add_argument("--proxy", help="titok: run folder of a trained vq tokenizer with one id per patch (--tok_size fine)")
    g.add_argument("--codebook", choices=list(CODEBOOKS),
                   help="vq, titok: codes of unit length (l2), as they are (plain), or as moving averages with restarts (l2-ema, "
                        "ema)")
    g.add_argument("--inflate", help="lfq with --frames: begin with the weights of an image tokenizer's run folder")
    g.add_argument("--task", choices=["class", "segment", "depth"],
                   help="what to generate: images of a class, or from an image of the drawn world its label map or distances")
    g.add_argument("--channels", type=int, choices=[1, 3], help="1: grey images (colours are averaged), 3: RGB")
    g.add_argument("--likelihood", choices=["mse", "logistic"],
                   help="of a pixel: Gaussian, or discretised logistic: losses are exact bounds in bits per dimension")
    g.add_argument("--beta", type=float, help="weight of the KL in nats per image against the summed squared error (logistic: "
                                              "against the nats of the pixels, default 1); 0: AE. vq: of the commitment")
    g.add_argument("--corrupt", type=float, help="standard deviation of noise on the input pixels: a denoising autoencoder")
    g.add_argument("--perceptual", type=float, help="weight of a perceptual distance of reconstructions (0: none; VQGAN: 1), by "
                                                    "a small classifier of the data, or by --lpips")
    g.add_argument("--lpips", nargs="+",
                   help="LPIPS's files: VGG16 of torchvision (vgg16-397923af.pth) and its linear layers (vgg.pth)")
    g.add_argument("--gan", type=float, help="weight of a patch critic (0: none; LlamaGen: 0.5)")
    g.add_argument("--gan_loss", choices=["hinge", "non-saturating"], help="the loss of the critic")
    g.add_argument("--gan_start", type=int, help="steps before the critic has a say (default: half of --tok_steps)")
    g.add_argument("--adaptive", action="store_const", const=True, help="VQGAN's adaptive weight of the critic")
    g = p.add_argument_group("stage 2, the generator")
    g.add_argument("--adapter", choices=["none", "flow"],
                   help="flow: bend the tokens by a volume-preserving flow first (GIVT)")
    g.add_argument("--size", choices=list(ar_transformer.SIZES | maskgit.SIZES | mar.SIZES),
                   help="size of the generator, from SIZES in its file")
    g.add_argument("--steps", type=int, help="training steps")
    g.add_argument("--batch_size", type=int, help="images per step, over all processes")
    g.add_argument("--lr", type=float, help="peak learning rate")
    g.add_argument("--optimizer", choices=["muon", "adamw"], help="muon: for the matrices of the blocks, AdamW for the rest")
    g.add_argument("--mix", choices=list(gmm_head.HEADS), help="gmm head: one mixture per token vector, one per channel, or "
                                                               "a single Gaussian with full covariance")
    g.add_argument("--n_mix", type=int, help="mixture components K of the gmm head")
    g.add_argument("--objective", choices=["diffusion", "flow"],
                   help="diffusion head: remove noise, or follow a rectified flow")
    g.add_argument("--head_width", type=int, help="diffusion head: width of its MLP (default: that of the size)")
    g.add_argument("--head_depth", type=int, help="diffusion head: blocks of its MLP (default: that of the size)")
    g.add_argument("--batch_mul", type=int, help="diffusion head: noise levels per token and step")
    g.add_argument("--groups", type=int,
                   help="categorical head: cut an id into so many digits, drawn side by side (MAGVIT-v2: 2)")
    g.add_argument("--split", type=int, nargs="+", metavar="BITS", help="categorical head of ar: cut an id into digits of so many "
                                                                        "bits, drawn in turn (Open-MAGVIT2: 6 12)")
    g.add_argument("--order", choices=["random", "raster"], help="mar: the order in which tokens are written")
    g.add_argument("--attention", choices=["bidirectional", "causal"],
                   help="mar: an encoder-decoder, or a GPT told where to write")
    g.add_argument("--n_buffer", type=int, help="mar: copies of the class, room to think in (default: that of the size)")
    g.add_argument("--mask_min", type=float, help="mar: least share of the tokens hidden in training (published: 0.7)")
    g.add_argument("--condition", choices=["class", "text"],
                   help="what an image is asked for by: its class, or its caption (drawn shapes have one, own images where "
                        "NAME.txt lies beside NAME.jpg)")
    g.add_argument("--text_encoder",
                   help="bytes: the model learns to read; or a T5 encoder of `transformers`, by name or folder")
    g.add_argument("--text_len", type=int, help="longest caption, in bytes or T5's tokens (default: of the training captions)")
    g.add_argument("--joint", action="store_const", const=True, help="train VAE and transformer together by the exact bound")
    g.add_argument("--label_drop", type=float, help="fraction of labels hidden in training, for guidance")
    g.add_argument("--dropout", type=float, help="dropout in the transformer, 0 to 1 (default: that of the size)")
    g = p.add_argument_group("both stages")
    g.add_argument("--seed", type=int, help="seed of the drawn images, the initial weights and everything random")
    g.add_argument("--weight_decay", type=float, help="decoupled weight decay of matrices")
    g.add_argument("--warmup", type=int, help="steps over which the learning rate rises; then it falls to 0 as a cosine")
    g.add_argument("--grad_clip", type=float, help="largest norm of the gradient")
    g.add_argument("--ema", type=float, help="decay per step of the averaged weights (default: a memory of 1/20 of the run)")
    g = p.add_argument_group("machine and run")
    g.add_argument("--runs", default="runs", help="folder that holds the run folders")
    g.add_argument("--name", help="name of the stage 2 run folder (default: data-tokenizer[-task][-adapter]-generator-head)")
    g.add_argument("--tok_name", help="name of the stage 1 run folder (default: data-tokenizer)")
    g.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    g.add_argument("--overwrite", action="store_true", help="train anew where a run folder exists already")
    g.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: CUDA if there is one)")
    g.add_argument("--dtype", choices=["fp32", "bf16"],
                   help="bf16: autocast (default: on CUDA, and for stage 2 on CPUs that multiply it natively)")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the model (default: on CUDA)")
    g.add_argument("--log_every", type=int, default=50, help="steps between printed lines")
    g.add_argument("--eval_every", type=int, default=500, help="steps between validation losses, each with a checkpoint")
    g.add_argument("--save_every", type=int, default=100, help="steps between checkpoints")
    args = p.parse_args(argv)
    args.head = args.head or ("gmm" if args.tokenizer in CONTINUOUS else "categorical")
    args.proxy_flags = None                                 # of the run --proxy, so that a checkpoint is complete in itself
    return args


def resolve(given, names, saved, device, folder):
    """Fill in the flags `names`: what was given, else what the checkpoint in `folder` says, else the defaults.
    Refuses a given flag that contradicts the checkpoint."""
    machine = "cuda" if device.type == "cuda" else "cpu"
    defaults = DEFAULTS["any"] | DEFAULTS[machine]
    clips = "clips" if (saved or {}).get("frames", given.frames) not in (None, 1) else None
    for choice in (given.tokenizer, given.generator, f"{given.generator}-{given.head}", given.task, clips):
        defaults |= DEFAULTS.get(f"any-{choice}", {}) | DEFAULTS.get(f"{machine}-{choice}", {})
    if given.mix == "full":
        defaults |= dict(n_mix=1)
    if "logistic" in (given.likelihood, saved and saved.get("likelihood")) or given.joint:
        defaults |= dict(beta=1.0, likelihood="logistic")   # the bound itself
    flags = {}
    for name in names:
        value = getattr(given, name)
        if saved is not None and name in saved:
            if value is not None and value != saved[name]:
                raise BadInput(f"--{name} {value} does not fit {folder}, which was trained with --{name} {saved[name]}: "
                               "give that value, another folder (--name, --tok_name), or --overwrite")
            value = saved[name]
        flags[name] = defaults.get(name) if value is None else value
    return flags


def check(args):
    """Refuse what cannot work, in one sentence that names the flag to change."""
    continuous = args.tokenizer in CONTINUOUS
    if (args.head == "categorical") == continuous:
        what, other = ("real vectors", "gmm") if continuous else ("ids", "categorical")
        raise BadInput(f"--head {args.head} does not fit --tokenizer {args.tokenizer}, which gives {what}: use --head {other}")
    for name, neutral in (("adapter", "none"), ("joint", False), ("task", "class"), ("likelihood", "mse"), ("corrupt", 0)):
        if args.tokenizer != "vae" and getattr(args, name) not in (None, neutral):
            raise BadInput(f"--{name}: needs --tokenizer vae")
    if args.condition == "text" and (args.generator not in ("ar", "none") or args.joint or args.task not in (None, "class")):
        raise BadInput("--condition text: only --generator ar reads captions, without --task and --joint")
    if args.condition == "text" and args.flip:
        raise BadInput("--flip: a caption may say left or right, which a mirrored image contradicts; leave it out")
    for name in ("text_encoder", "text_len"):
        if args.condition != "text" and getattr(args, name) not in (None, "bytes"):
            raise BadInput(f"--{name}: goes with --condition text")
    for name, where in (("vocab_size", ("vq", "lfq", "titok")), ("codebook", ("vq", "titok")), ("tokens", ("titok", "titok-vae")),
                        ("channels", ("vae", "vq", "lfq"))):
        if args.tokenizer not in where and getattr(args, name) not in (None, 3):
            raise BadInput(f"--{name}: is for --tokenizer {' or '.join(where)}")
    if args.stage not in (None, "pixels") and (not args.tokenizer.startswith("titok") or not args.proxy):
        raise BadInput(f"--stage {args.stage}: is for --tokenizer titok, and needs --proxy RUN, the folder of a trained vq "
                       "tokenizer")
    if args.proxy and args.stage in (None, "pixels"):
        raise BadInput("--proxy: goes with --stage proxy or finetune")
    if args.tokenizer == "lfq" and args.vocab_size and args.vocab_size & (args.vocab_size - 1):
        raise BadInput(f"--vocab_size {args.vocab_size}: lfq has one bit per dimension, so a power of 2, such as 1024")
    if args.tokenizer == "lfq" and args.token_dim:
        raise BadInput("--token_dim: of lfq it follows from --vocab_size, 10 bits for 1024")
    if args.frames not in (None, 1):
        check_clips(args)
    for name in ("frame_step", "inflate"):
        if getattr(args, name) is not None and args.frames in (None, 1):
            raise BadInput(f"--{name}: is for clips, so it goes with --frames 17, say")
    if args.tok_size is not None and args.tok_size not in TOKENIZERS[args.tokenizer][1]:
        raise BadInput(f"--tok_size {args.tok_size}: --tokenizer {args.tokenizer} has "
                       f"{', '.join(TOKENIZERS[args.tokenizer][1])}")
    for name in ("frames", "frame_step", "image_size", "n_shapes", "tok_steps", "tok_batch_size", "steps", "batch_size", "n_mix",
                 "token_dim", "vocab_size", "tokens", "text_len", "head_width", "head_depth", "batch_mul", "groups", "n_buffer",
                 "log_every", "eval_every", "save_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise BadInput(f"--{name} {getattr(args, name)}: must be at least 1")
    for name in ("tok_lr", "lr", "grad_clip"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise BadInput(f"--{name} {getattr(args, name)}: must be above 0")
    if args.lpips and (len(args.lpips) > 2 or not args.perceptual):
        raise BadInput("--lpips: one or two files, and --perceptual 1 gives it a weight")
    if (args.gan_start is not None or args.adaptive) and not args.gan:
        raise BadInput("--gan_start, --adaptive: go with --gan")
    if (args.gan or args.perceptual) and (args.joint or args.likelihood == "logistic" or args.task not in (None, "class")):
        raise BadInput("--gan, --perceptual: not with --joint, --likelihood logistic or --task, whose losses mean something "
                       "else")
    for name in ("perceptual", "gan", "gan_start", "beta", "corrupt", "label_drop", "dropout", "weight_decay", "warmup", "ema"):
        if getattr(args, name) is not None and not getattr(args, name) >= 0:
            raise BadInput(f"--{name} {getattr(args, name)}: must not be negative")
    for name in ("label_drop", "dropout", "ema"):
        if getattr(args, name) is not None and getattr(args, name) >= 1:
            raise BadInput(f"--{name} {getattr(args, name)}: must be below 1")
    if args.size is not None and args.generator in GENERATORS and args.size not in GENERATORS[args.generator][1]:
        raise BadInput(f"--size {args.size}: --generator {args.generator} has {', '.join(GENERATORS[args.generator][1])}")
    if (args.split or args.groups not in (None, 1)) and args.head != "categorical":
        raise BadInput("--groups, --split: cut ids into digits, so they go with --head categorical")
    if args.split and args.groups not in (None, 1):
        raise BadInput("--groups, --split: two ways to cut an id into digits; give one of them")
    if args.split and args.generator not in ("ar", "none"):
        raise BadInput("--split: only --generator ar predicts digits one after the other; use --groups 2")
    if args.head == "diffusion" and args.generator == "maskgit":
        raise BadInput("--head diffusion gives no density, and --generator maskgit keeps the tokens of highest density: use "
                       "--generator mar, or --head gmm")
    if args.attention == "causal" and args.generator == "mar" and args.n_buffer is not None:
        raise BadInput("--n_buffer: --attention causal has no encoder and no buffer")
    if args.mask_min is not None and not 0 <= args.mask_min < 1:
        raise BadInput(f"--mask_min {args.mask_min}: a share, from 0 to below 1")
    if args.task not in (None, "class") and args.generator not in ("ar", "none"):
        raise BadInput(f"--task {args.task}: only --generator ar takes an image as its prefix")
    if args.task not in (None, "class") and args.flip:
        raise BadInput(f"--flip: with --task {args.task} an image and its map would be mirrored apart; leave it out")
    if args.joint and (args.generator != "ar" or args.head == "diffusion" or args.task not in (None, "class") or
                       args.likelihood == "mse" or args.beta not in (None, 1)):
        raise BadInput("--joint maximises a bound on the likelihood: it needs --generator ar, --head gmm and no --task, "
                       "--likelihood mse or --beta")
    if args.mix == "full" and args.n_mix not in (None, 1):
        raise BadInput(f"--mix full is one Gaussian: give --n_mix 1, not {args.n_mix}")
    if args.resume and args.overwrite:
        raise BadInput("--resume goes on and --overwrite starts anew: give one of them")


def check_clips(args):
    """The same for what --frames takes, and for what does not go with it."""
    if args.tokenizer != "lfq":
        raise BadInput(f"--frames {args.frames}: only --tokenizer lfq reads clips, --tokenizer {args.tokenizer} does not")
    if args.condition == "text":
        raise BadInput("--condition text: clips are asked for by their action only; leave it or --frames out")
    if args.flip and args.data in (None, "shapes"):
        raise BadInput("--flip: a mirrored clip that moves left moves right; leave it out")
    if args.perceptual and not args.lpips:
        raise BadInput("--perceptual: the classifier of clips looks at time too; give --lpips, which looks at frames")
    if args.frame_step and args.data in (None, "shapes"):
        raise BadInput("--frame_step: is for your own clips (--data); drawn ones have as many frames as asked for")


def check_digits(args, V):
    """Refuse --groups and --split that do not cut V ids into whole digits: before the tokenizer is trained."""
    groups = args.groups or 1
    if groups > 1 and (base := round(V ** (1 / groups))) ** groups != V:
        raise BadInput(f"--groups {groups}: --vocab_size {V} must be a whole number to the power of {groups}, such as "
                       f"{base ** groups}")
    if args.split and (len(args.split) < 2 or min(args.split) < 1 or 1 << sum(args.split) != V):
        raise BadInput(f"--split {' '.join(map(str, args.split))}: two or more numbers of bits, which add up to those of "
                       f"--vocab_size {V}")


# ---------------------------------------------------------------------------------------------------
# Building and loading: sample.py and evaluate.py use these too

def pick_device(name=None):
    """--device -> torch.device; the best there is when not given. Under torchrun each process gets its own GPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise BadInput(f"--device {name}: not on this machine ({str(e).splitlines()[0]}); try --device cpu") from None
    return torch.device(name)


def native_bf16(device):
    """Does the processor multiply bfloat16 natively? Elsewhere autocast on a CPU is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, n)() for n in names if hasattr(torch.cpu, n))


load_once = functools.lru_cache(maxsize=4)(data.load)       # both stages read the same images, and their maps


def open_data(args, split, device):
    """The training or validation images that the flags name -> data.ImageSet."""
    n = args.n_shapes if split == "train" else None
    return load_once(args.data, args.image_size, split, device, args.seed, bool(args.flip) and split == "train",
                     getattr(args, "skip_bad", False), n, None, getattr(args, "task", "class"), getattr(args, "frames", 1),
                     getattr(args, "frame_step", None))


def build_tokenizer(args):
    model_class, sizes = TOKENIZERS[args.tokenizer]
    size = sizes[args.tok_size] | dict(image_size=args.image_size, beta=args.beta)
    given = lambda **flags: {k: v for k, v in flags.items() if v is not None}               # the others are left to the size
    if args.tokenizer in ("vae", "vq", "lfq"):
        size["channels"] = 1 + len(data.SHAPES) if args.task == "segment" else args.channels
    if args.tokenizer == "vae":
        size |= dict(corrupt=args.corrupt, likelihood=args.likelihood) | given(token_dim=args.token_dim)
    elif args.tokenizer == "lfq":
        size["frames"] = args.frames
        size |= given(bits=args.vocab_size and args.vocab_size.bit_length() - 1)
    elif args.tokenizer == "titok-vae":
        size |= given(token_dim=args.token_dim, n_tokens=args.tokens)
    else:
        size |= CODEBOOKS[args.codebook] | given(vocab_size=args.vocab_size, code_dim=args.token_dim)
        size |= given(n_tokens=args.tokens) if args.tokenizer == "titok" else {}
    if args.stage != "pixels":
        size |= dict(stage=args.stage, proxy=build_tokenizer(argparse.Namespace(**DEFAULTS["any"] | args.proxy_flags)))
    try:
        return model_class(**size)
    except ValueError as e:
        flags = f"--frames {args.frames}" if " frames " in str(e) else f"--image_size {args.image_size}"
        raise BadInput(f"{flags} with --tok_size {args.tok_size}: {e}") from None


def inflate(tokenizer, folder):
    """--inflate: take over the weights of the image tokenizer in a run folder -> the video tokenizer."""
    run = load_run(folder)
    if run.args.tokenizer != "lfq" or run.args.frames != 1:
        raise BadInput(f"--inflate {folder}: not an image tokenizer of --tokenizer lfq")
    try:
        return tokenizer.inflate(run.tokenizer.state_dict())
    except (ValueError, RuntimeError):                      # keys or shapes differ
        raise BadInput(f"--inflate {folder}: its sizes are others; train it with the same --tok_size (here {run.args.tok_size}) "
                       f"and --vocab_size ({run.tokenizer.vocab_size})") from None


def with_losses(args, tokenizer, images, held_out, folder, device):
    """The tokenizer behind the losses of perceptual_gan.py that the flags name; it is .tokenizer of what comes back."""
    perceptual, critic = None, None
    if args.lpips:
        try:
            perceptual = perceptual_gan.LPIPS.from_files(*args.lpips)
        except (OSError, ValueError, RuntimeError) as e:
            raise BadInput(f"--lpips {' '.join(args.lpips)}: {str(e).splitlines()[0]}") from None
    elif args.perceptual:
        import evaluate                                     # here, for it imports this file
        run = SimpleNamespace(args=args, folder=folder)
        net, _ = evaluate.classifier_for(run, device, images, held_out, seed=1)             # seed 0 is the judge's
        perceptual = perceptual_gan.ClassifierFeatures(net.stages)
    if args.gan:
        critic = perceptual_gan.PatchCritic.for_images(args.image_size)
    start = args.tok_steps // 2 if args.gan_start is None else args.gan_start
    return perceptual_gan.AdversarialTokenizer(tokenizer, critic, perceptual, args.gan_loss, args.gan, args.perceptual, start,
                                               adaptive=args.adaptive)


def build_generator(args, tokenizer, num_classes, source=None):
    """The generator that the flags name, behind the flow where --adapter flow asks for it. source: the tokenizer of
    the images on which maps are conditioned (--task)."""
    check_digits(args, tokenizer.vocab_size)
    model_class, sizes = GENERATORS[args.generator]
    size = sizes[args.size] | (dict(dropout=args.dropout) if args.dropout is not None else {})
    if args.condition == "text":
        size["text"] = (args.text_len, "bytes" if args.text_encoder == "bytes" else args.text_features)
    if source is not None:
        size["prefix"] = (source.seq_len, source.token_dim)
    if args.generator == "mar":
        size |= dict(order=args.order) | ({} if args.n_buffer is None else dict(n_buffer=args.n_buffer))
        if args.attention == "causal":
            model_class, size = mar.CausalMAR, {k: v for k, v in size.items() if k != "n_buffer"}
        elif args.mask_min is not None:                     # 0.7: as published; less: the long tail of a flat distribution
            size |= dict(mask_min=args.mask_min, mask_std=0.25 if args.mask_min >= 0.7 else 9.0)
    if args.head == "diffusion":
        net = mar.HEAD_SIZES.get(args.size, mar.HEAD_SIZES["mar-b"])
        head = diffusion_head.DiffusionHead(size["n_embd"], tokenizer.token_dim, args.head_width or net["width"],
                                            args.head_depth or net["depth"], args.objective, args.batch_mul)
    elif args.split:                                        # as deep as Open-MAGVIT2's: a layer for every twelve
        head = ar_transformer.SubTokenHead(size["n_embd"], tokenizer.vocab_size, args.split, max(1, size["n_layer"] // 12),
                                           size["n_head"], size.get("multiple_of", 64))
    elif args.head == "categorical":
        head = ar_transformer.CategoricalHead(size["n_embd"], tokenizer.vocab_size, args.groups)    # one code in three files
    else:
        head = gmm_head.HEADS[args.mix](size["n_embd"], tokenizer.token_dim, args.n_mix)
    model = model_class(head, tokenizer.seq_len, num_classes, tokenizer.token_dim, tokenizer.vocab_size, tokenizer.grid,
                        label_drop=args.label_drop, **size)
    if args.adapter == "flow":
        model = flow_adapter.Adapted(flow_adapter.FlowAdapter(tokenizer.token_dim, tokenizer.grid), model)
    return model


def encode_texts(args, texts):
    """Captions -> what the generator reads, on the CPU: bytes (N, P) uint8, or T5 features (N, P, E) float16, zeros in
    front. P is args.text_len; what is longer loses its end."""
    if args.text_encoder == "bytes":
        cut = [text.encode()[:args.text_len].decode(errors="ignore") for text in texts]
        return ar_transformer.bytes_of(cut, args.text_len).to(torch.uint8)
    tokenizer, encoder = load_t5(args.text_encoder)
    parts = []
    for i in range(0, len(texts), 64):
        words = tokenizer(texts[i:i + 64], padding="max_length", truncation=True, max_length=args.text_len,
                          return_tensors="pt")
        with torch.no_grad():
            x = encoder(**words).last_hidden_state                                          # (B, P, E), padding behind
        count = words["attention_mask"].sum(1)
        turned = [torch.cat([row[n:] * 0, row[:n]]) for row, n in zip(x, count)]            # LlamaGen pads in front
        parts.append(torch.stack(turned).half())
    return torch.cat(parts)


@functools.lru_cache(maxsize=1)
def load_t5(name):
    """A frozen T5 encoder, by its name or folder -> tokenizer, encoder. LlamaGen's is google/flan-t5-xl, 120 tokens."""
    try:
        from transformers import AutoTokenizer, T5EncoderModel
    except ImportError:
        raise BadInput(f"--text_encoder {name}: needs the optional package transformers: pip install transformers "
                       "sentencepiece; or --text_encoder bytes") from None
    try:
        return AutoTokenizer.from_pretrained(name), T5EncoderModel.from_pretrained(name).eval()
    except (OSError, ValueError) as e:
        raise BadInput(f"--text_encoder {name}: {str(e).splitlines()[0]}") from None


def captions_of(args, images, split):
    """The captions of an ImageSet -> list of str."""
    if args.data == "shapes":
        start = data.VAL_INDEX if split == "val" else 0
        return data.captions(torch.arange(start, start + len(images)), args.seed)
    if images.texts is None:
        raise BadInput(f"--condition text: not every image of --data {args.data} has a caption; write NAME.txt beside "
                       "NAME.jpg")
    return images.texts


def text_cache(args, texts, folder, split, main_process):
    """encode_texts, kept in `folder` where it was T5's work."""
    if args.text_encoder == "bytes":
        return encode_texts(args, texts)
    key = hashlib.sha1(repr((args.text_encoder, args.text_len, texts)).encode()).hexdigest()
    path = folder / f"captions-{split}.pt"
    if path.exists():
        with contextlib.suppress(Exception):                # a damaged cache is made anew
            saved = torch.load(path, map_location="cpu", weights_only=True)
            if saved["key"] == key:
                return saved["features"]
    saved = dict(key=key, features=encode_texts(args, texts))
    if main_process:
        save_atomically(saved, path)
    return saved["features"]


def read_checkpoint(folder):
    """The checkpoint in a run folder, or None where there is none."""
    path = Path(folder) / "ckpt.pt"
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:                                  # torch raises half a dozen kinds for a damaged file
        raise BadInput(f"{path}: not a readable checkpoint ({str(e).splitlines()[0]}); --overwrite trains anew") from None


def averaged(checkpoint):
    """The EMA weights of a checkpoint as a plain state dict."""
    weights = {k.removeprefix("module."): v for k, v in checkpoint["ema"].items() if k.startswith("module.")}
    if any(k.startswith("tokenizer.") for k in weights):    # the critic stays behind
        weights = {k.removeprefix("tokenizer."): v for k, v in weights.items() if k.startswith("tokenizer.")}
    return weights


def load_run(folder, device="cpu"):
    """A run folder -> namespace with folder, args, tokenizer, generator (None for a stage 1 run), source (the tokenizer of
    the images that a map is made from, with --task), classes, device.

    The models carry the averaged weights and are in eval mode. Raises BadInput for anything but a finished run.
    """
    folder, device = Path(folder), torch.device(device)
    checkpoint = read_checkpoint(folder)
    if checkpoint is None:
        raise BadInput(f"{folder}: no ckpt.pt in it; name a run folder such as runs/shapes-vae-ar-gmm")
    if not checkpoint["done"]:
        raise BadInput(f"{folder}: this run stopped at step {checkpoint['step']}; finish it with train.py --resume")
    args, classes = argparse.Namespace(**DEFAULTS["any"] | checkpoint["flags"]), checkpoint["classes"]
    tokenizer, generator, source = build_tokenizer(args), None, None
    if checkpoint["stage"] == 1:
        tokenizer.load_state_dict(averaged(checkpoint))
    else:                                                   # a stage 2 checkpoint is complete in itself
        if "source" in checkpoint:
            source = build_tokenizer(argparse.Namespace(**checkpoint["source_flags"]))
            source.load_state_dict(checkpoint["source"])
            source = source.to(device).eval()
        generator = build_generator(args, tokenizer, len(classes), source)
        if args.joint:
            vae.Joint(tokenizer, generator).load_state_dict(averaged(checkpoint))
        else:
            tokenizer.load_state_dict(checkpoint["tokenizer"])
            generator.load_state_dict(averaged(checkpoint))
        generator = generator.to(device).eval()
    return SimpleNamespace(folder=folder, args=args, tokenizer=tokenizer.to(device).eval(), generator=generator,
                           source=source, classes=classes, device=device)


# ---------------------------------------------------------------------------------------------------
# Tokens: encoded once, kept as posteriors

class Tokens:
    """The training set as tokens: mean, std (N, T, D) of a VAE, or ids (N, T); labels (N,), or captions (N, P[, E]) in
    their place. Drawn in batches."""

    def __init__(self, tokenizer, arrays, labels):
        self.tokenizer, self.arrays, self.labels = tokenizer, arrays, labels

    def __len__(self):
        return len(self.labels)

    def batch(self, index):
        """index (B,) -> tokens (B, T[, D]), labels (B,). A fresh draw from the posterior each time (GIVT section 3.1)."""
        index = index.to(self.labels.device, non_blocking=True)
        cond = self.labels[index]
        cond = cond.float() if cond.is_floating_point() else cond                           # features are kept in half
        if "flipped" in self.arrays:                        # the second half of the arrays are the mirrored images
            turned = torch.rand(len(index), device=index.device) < 0.5
            row = index + turned * len(self.labels)
        else:
            row = index
        if "ids" in self.arrays:
            return self.arrays["ids"][row], cond
        z = self.tokenizer.reparameterise(self.arrays["mean"][row], self.arrays["std"][row])
        return self.tokenizer.normalise(z), cond


class Pairs:
    """Maps and the images they belong to, both as tokens: the image is the condition (--task)."""

    def __init__(self, maps, images):
        self.maps, self.images = maps, images

    def __len__(self):
        return len(self.maps)

    def batch(self, index):                                 # (B,) -> the map's tokens (B, T, D), the image's (B, P, E)
        return self.maps.batch(index)[0], self.images.batch(index)[0]


class Stills:
    """A set of clips in which every other batch, by chance, is of single frames, each of them as an image: four of every clip,
    at random. So one tokenizer learns both, with the same weights and codes. A batch is of one kind, so shapes stay static; one
    of stills costs a tenth of the other, for an image needs no time axis, and how things look is learnt from it as well."""

    def __init__(self, clips):
        self.clips = clips

    def __len__(self):
        return len(self.clips)

    def batch(self, index):                                 # (B,) -> (B, 3, F, H, W) or (4B, 3, H, W), labels
        x, labels = self.clips.batch(index)
        if torch.rand(()) >= 0.5:                           # on the CPU, from the seed of the step: alike in all processes
            return x, labels
        B, _, n, H, W = x.shape
        some = torch.rand(B, n, device=x.device).argsort(1)[:, :4]                          # (B, 4), none of them twice
        x = x.transpose(1, 2).gather(1, some[:, :, None, None, None].expand(-1, -1, 3, H, W))
        return x.flatten(0, 1), labels.repeat_interleave(some.shape[1])


@torch.no_grad()
def encode_all(tokenizer, images):
    """Encode a whole ImageSet: -> dict of arrays on the device, plus the mirrored images where --flip is on."""
    arrays, flip, images.flip = {}, images.flip, False
    many = 250 if images.frames == 1 else max(1, 1000 // images.frames)                    # of clips, fewer fit into memory
    for turn in ([False, True] if flip else [False]):
        for i in range(0, len(images), many):
            x, _ = images.batch(torch.arange(i, min(i + many, len(images))))
            x = x.flip(-1) if turn else x
            if tokenizer.vocab_size:
                arrays.setdefault("ids", []).append(tokenizer.encode(x))
                continue
            mean, std = tokenizer.posterior(x)
            arrays.setdefault("mean", []).append(mean)
            arrays.setdefault("std", []).append(std)
    images.flip = flip
    return {k: torch.cat(v) for k, v in arrays.items()} | ({"flipped": torch.ones(1)} if flip else {})


def token_cache(tokenizer, images, folder, split, main_process):
    """Tokens of a set, read from `folder` if they were made from this tokenizer and these images, else made and saved."""
    digest = hashlib.sha1()
    for v in tokenizer.state_dict().values():
        digest.update(v.cpu().numpy().tobytes())
    if isinstance(images.images, torch.Tensor):
        digest.update(images.images.contiguous().cpu().numpy().tobytes())
    else:
        digest.update(repr([(n, os.path.getmtime(n)) for n, _ in images.images.files]).encode())
    digest.update(f"{split} {images.flip}".encode())
    path = folder / f"tokens-{split}.pt"
    saved = None
    if path.exists():
        with contextlib.suppress(Exception):                # a damaged cache is made anew
            saved = torch.load(path, map_location=images.device, weights_only=True)
    if saved is None or saved["key"] != digest.hexdigest():
        saved = dict(encode_all(tokenizer, images), key=digest.hexdigest())
        if main_process:
            save_atomically(saved, path)
    arrays = {k: v for k, v in saved.items() if k != "key"}
    return Tokens(tokenizer, arrays, images.labels)


def save_atomically(state, path):
    """torch.save to a temporary file, then rename: whatever happens, `path` holds a whole old or a whole new one."""
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
        raise BadInput(f"could not write {path} ({str(e).splitlines()[0]}); the previous one, if any, is untouched") from None


# ---------------------------------------------------------------------------------------------------
# The loop

def make_optimizers(model, args, lr, matrices):
    """AdamW for everything, or Muon (Jordan et al. 2024) for the matrices inside the transformer blocks where asked."""
    muon = [p for n, p in model.named_parameters() if matrices and p.ndim == 2 and "blocks." in n]
    rest = [p for p in model.parameters() if all(p is not q for q in muon)]
    decay, plain = [p for p in rest if p.ndim > 1], [p for p in rest if p.ndim <= 1]
    groups = [dict(params=decay, weight_decay=args.weight_decay), dict(params=plain, weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)]
    if muon:                                                # its update is scaled to the size of AdamW's: one --lr serves both
        optimizers.append(torch.optim.Muon(muon, lr=lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def learning_rate(step, steps, warmup, peak):
    """Linear warm-up, then half a cosine down to zero."""
    return peak * min((step + 1) / max(1, warmup), 0.5 * (1 + math.cos(math.pi * step / steps)))


def fit(stage, model, source, val, args, folder, world, checkpoint, extra, finish, unit):
    """Train `model` on batches of `source` and leave checkpoint, log and curve in `folder`.

    source.batch(index) -> x, cond; val: a function (model) -> validation loss; extra: more entries for the checkpoint;
    finish(averaged model) runs once after the last step, before the run counts as done; unit: that of the loss.
    """
    steps, batch_size, lr = ((args.tok_steps, args.tok_batch_size, args.tok_lr) if stage == 1 else
                             (args.steps, args.batch_size, args.lr))
    model = raw = model.to(world.device)
    for p in raw.parameters():
        if p.ndim == 4:                                     # channels last: twice as fast for 2-D convolutions on a CPU
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    ema = AveragedModel(raw, multi_avg_fn=get_ema_multi_avg_fn(1 - 20 / max(steps, 40) if args.ema is None else args.ema))
    transformer = args.tokenizer.startswith("titok") if stage == 1 else not args.joint      # small convolutions gain no speed
    optimizers = make_optimizers(raw, args, lr, matrices=transformer if stage == 1 else args.optimizer == "muon")
    first = 0
    if checkpoint is not None:
        raw.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        for opt, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            opt.load_state_dict(state)
        first = checkpoint["step"]
    critic = list(raw.critic.parameters()) if getattr(raw, "critic", None) is not None else []
    others = [p for p in raw.parameters() if all(p is not q for q in critic)]
    if world.compile and not getattr(raw, "adaptive", False):           # the adaptive weight asks for gradients on the way
        model = torch.compile(model)
    if world.size > 1:
        model = DistributedDataParallel(model)
    use_bf16 = world.dtype == "bf16" if world.dtype else world.native_bf16 and (world.device.type == "cuda" or transformer)
    params, log_unit = sum(p.numel() for p in raw.parameters()), "images" if args.frames == 1 else "clips"
    say(world, f"stage {stage}: {folder}, {params / 1e6:.2f}M parameters, {len(source)} {log_unit}, steps {first} to {steps} of "
               f"{batch_size} {log_unit}, {world.device.type} x {world.size}, {'bf16' if use_bf16 else 'fp32'}")

    def save(step, done=False):
        if world.rank == 0:
            state = dict(stage=stage, step=step, done=done, flags=vars(args), model=raw.state_dict(), ema=ema.state_dict(),
                         optimizers=[o.state_dict() for o in optimizers])
            save_atomically(state | extra, folder / "ckpt.pt")

    log = Log(folder, first) if world.rank == 0 else None
    if checkpoint is None:
        save(0)                                             # from here on --resume works
    bad_step = torch.full((), steps, device=world.device)   # the first step whose loss was not finite
    since, timer = first, time.perf_counter()
    for step in range(first, steps):
        index = data.order(len(source), batch_size, step, args.seed)
        # One seed per step, so that no generator state needs saving. Every process draws the whole batch and takes
        # its share, so that n processes see what one would have seen.
        torch.manual_seed(args.seed * 1_000_003 + 2 * step + stage)
        x, cond = (v[world.rank::world.size] for v in source.batch(index))
        torch.manual_seed((args.seed * 1_000_003 + 2 * step + stage) * 4096 + 1 + world.rank)
        for opt in optimizers:
            for group in opt.param_groups:
                group["lr"] = learning_rate(step, steps, args.warmup, lr)
        with torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=use_bf16):
            loss, logs = model(x, cond)
        for opt in optimizers:
            opt.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(others, args.grad_clip)
        if critic:                                          # by itself: its gradient is often the larger by far
            torch.nn.utils.clip_grad_norm_(critic, args.grad_clip)
        bad_step = torch.where(torch.isfinite(loss.detach() + norm), bad_step, bad_step.clamp(max=step))
        evaluating = step + 1 == steps or (step + 1) % args.eval_every == 0
        checkpointing = evaluating or (step + 1) % args.save_every == 0
        logging = evaluating or step == 0 or (step + 1) % args.log_every == 0
        if logging or checkpointing or world.device.type == "cpu":       # .item() waits for a GPU, so not at every step
            if (at := agree(world, bad_step)) < steps:
                raise BadInput(f"step {at}: the loss is not finite; stopped. The last good checkpoint is kept in {folder}: "
                               f"try a lower {'--tok_lr' if stage == 1 else '--lr'}, or --dtype fp32")
        for opt in optimizers:
            opt.step()
        ema.update_parameters(raw)
        if logging:
            row = {"loss": loss.detach(), **logs, "grad_norm": norm}
            row = {k: mean_over_processes(world, v) for k, v in row.items()}
            seconds = (time.perf_counter() - timer) / (step + 1 - since)
            if evaluating:
                row["val_loss"] = val(ema.module)
            if world.rank == 0:
                log.add(step + 1, steps, row, seconds, batch_size, log_unit)
            since, timer = step + 1, time.perf_counter()
        if checkpointing:
            save(step + 1)
    finish(ema.module.eval())
    if world.rank == 0:
        log.plot(unit)
    save(steps, done=True)                                  # last, so that a run killed before goes on with --resume


def say(world, text):
    if world.rank == 0:
        print(text, flush=True)


def mean_over_processes(world, value):
    """A scalar tensor -> its mean over all processes, as a float."""
    if world.size > 1:
        value = value.detach().clone().float()
        dist.all_reduce(value)
        value = value / world.size
    return float(value)


def agree(world, bad_step):
    """The first step that failed on any process, as an int."""
    if world.size > 1:
        bad_step = bad_step.clone()
        dist.all_reduce(bad_step, op=dist.ReduceOp.MIN)
    return int(bad_step)


class Log:
    """One printed line and one row of log.csv per log step. After a resume, rows past the checkpoint are dropped."""

    def __init__(self, folder, first):
        self.path, self.rows, self.ms = folder / "log.csv", [], []
        if first and self.path.exists():
            with open(self.path, newline="") as f:
                self.rows = [r for r in csv.DictReader(f) if int(r["step"]) <= first]

    def add(self, step, steps, row, seconds, batch_size, unit="images"):
        self.ms.append(1000 * seconds)
        left = (steps - step) * seconds
        shown = "  ".join(f"{k} {v:.4f}" if abs(v) < 10 else f"{k} {v:.2f}" for k, v in row.items())
        print(f"step {step:6d}  {shown}  {1000 * seconds:.0f} ms  {batch_size / seconds:.0f} {unit}/s  "
              f"{int(left) // 60}:{int(left) % 60:02d} left", flush=True)
        self.rows.append(dict(step=step, **row, ms_per_step=1000 * seconds) | {f"{unit}_per_s": batch_size / seconds})
        keys = list(dict.fromkeys(k for r in self.rows for k in r))
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w", newline="") as f:
            writer = csv.DictWriter(f, keys)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(temporary, self.path)

    def plot(self, unit):
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        fig, ax = plt.subplots(figsize=(6, 3.6))
        for key, style in (("loss", "-"), ("val_loss", "o-")):
            points = [(int(r["step"]), float(r[key])) for r in self.rows if r.get(key) not in (None, "")]
            points = [p for p in points if p[0] > 1] or points
            if points:
                label = "training batch" if key == "loss" else "validation, averaged weights"
                ax.plot(*zip(*points), style, ms=4, label=label)
        ax.set(xlabel="training step", ylabel=unit, title=self.path.parent.name)
        ax.grid(alpha=0.3)
        ax.legend()
        fig.tight_layout()
        fig.savefig(self.path.with_name("curve.png"), dpi=100)
        plt.close(fig)


VALIDATED = 2000                                            # images, or frames of clips, in each validation loss


def validate(source, batch_size, args, world, n=None):
    """-> a function (model) -> mean loss over up to n (VALIDATED) validation images, in eval mode, with a fixed seed."""
    @torch.no_grad()
    def run(model):
        was_training, total, count = model.training, 0.0, 0
        model.eval()
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)
            # evenly spread: a folder comes sorted by class
            some = torch.linspace(0, len(source) - 1, min(n or VALIDATED, len(source))).long()
            for index in some.split(batch_size):
                total, count = total + model(*source.batch(index))[0] * len(index), count + len(index)
        model.train(was_training)
        return float(total) / count
    return run


# ---------------------------------------------------------------------------------------------------
# The two stages

def start(given, names, folder, world):
    """Look into a run folder -> flags, checkpoint to go on from (None: train anew), is it done already."""
    checkpoint = None if given.overwrite else read_checkpoint(folder)
    flags = resolve(given, names + BOTH, checkpoint and checkpoint["flags"], world.device, folder)
    args = argparse.Namespace(**flags)
    if checkpoint is not None and not checkpoint["done"] and not given.resume:
        raise BadInput(f"{folder} holds a run that stopped at step {checkpoint['step']}: go on with --resume, or start "
                       "again with --overwrite")
    return args, checkpoint, checkpoint is not None and checkpoint["done"]


UNITS = {"vae": "squared error per pixel value + beta KL", "titok-vae": "squared error per pixel value + beta KL",
         **{name: "squared error per pixel value + losses of the codes" for name in ("vq", "lfq", "titok")},
         "proxy": "nats per id of the proxy + losses of the codes", "logistic": "bits per dimension",
         "gmm": "nats per token", "categorical": "nats per token",
         "diffusion": "squared error of the noise + vb (bits)", "flow": "squared error of the velocity"}


def train_tokenizer(given, folder, world, begin=None):
    """Stage 1 -> the tokenizer, in eval mode, and its flags. begin: the trained run of --stage proxy, for finetune."""
    if given.stage not in (None, "pixels"):
        proxy = load_run(given.proxy, world.device)
        if proxy.args.tokenizer != "vq":
            raise BadInput(f"--proxy {given.proxy}: a run of --tokenizer vq is wanted, this is one of {proxy.args.tokenizer}")
        given.proxy_flags = {name: getattr(proxy.args, name) for name in STAGE1}
    args, checkpoint, done = start(given, STAGE1, folder, world)
    check(argparse.Namespace(**vars(given) | vars(args)))
    if not done:
        divisible(args.tok_batch_size, "--tok_batch_size", world)
        torch.manual_seed(args.seed)
        tokenizer = build_tokenizer(args)
        check_digits(given, tokenizer.vocab_size)
        if args.stage == "proxy":
            tokenizer.proxy.load_state_dict(proxy.tokenizer.state_dict())
        if args.stage == "finetune":
            tokenizer.load_state_dict(begin.state_dict())
        args_io = argparse.Namespace(**vars(args), skip_bad=given.skip_bad)
        if args.inflate and checkpoint is None:
            tokenizer = inflate(tokenizer, args.inflate)
        images, held_out = open_data(args_io, "train", world.device), open_data(args_io, "val", world.device)
        folder.mkdir(parents=True, exist_ok=True)

        model = tokenizer
        if args.gan or args.perceptual:
            model = with_losses(args, tokenizer, images, held_out, folder, world.device)

        def finish(model):
            model = getattr(model, "tokenizer", model)
            measured = encode_all(model, images)
            if model.vocab_size:
                used = len(measured["ids"].unique())
                say(world, f"{used} of {model.vocab_size} codes occur in the training images "
                           f"({100 * used / model.vocab_size:.1f}%)")
            else:
                model.measure(measured["mean"], measured["std"])
            if world.rank == 0:
                torch.manual_seed(args.seed)
                n = 12 if args.frames == 1 else 4
                x, labels = held_out.batch(torch.linspace(0, len(held_out) - 1, n).long())  # folders come sorted by class
                recon = model.decode(model.encode(x))
                rows = [("validation images", x), ("reconstructed", recon)]
                rows = [(text, data.colour_maps(x) if args.task == "segment" else x) for text, x in rows]
                if args.frames > 1:                                                         # a clip, and what became of it
                    rows = [row for clip, again, k in zip(x, recon, labels.tolist()) for row in
                            ((str(images.classes[k]), data.film(clip)), ("reconstructed", data.film(again)))]
                data.save_rows(folder / "reconstructions.png", rows, folder.name)

        loop_args = argparse.Namespace(**vars(args), **loop_flags(given))
        unit = "logistic" if args.likelihood == "logistic" else "proxy" if args.stage == "proxy" else args.tokenizer
        at_once = 100 if args.frames == 1 else max(1, 200 // args.frames)
        val = validate(held_out, at_once, args, world, VALIDATED // args.frames)
        fit(1, model, images if args.frames == 1 else Stills(images), val, loop_args, folder, world, checkpoint,
            dict(classes=images.classes), finish, UNITS[unit])
        barrier(world)                                      # until process 0 has written the checkpoint
    run = load_run(folder, world.device)
    return run.tokenizer, run.args


def begin(given, folder, world):
    """Stage 2 -> flags, checkpoint to go on from, training and validation images; None for these where the run is done."""
    args, checkpoint, done = start(given, STAGE2, folder, world)
    check(argparse.Namespace(**vars(given) | vars(args)))
    if done:
        say(world, f"{folder} is trained already: look at samples.png in it, or start again with --overwrite")
        return args, checkpoint, None
    divisible(args.batch_size, "--batch_size", world)
    args_io = argparse.Namespace(**vars(args), skip_bad=given.skip_bad)
    return args, checkpoint, {split: open_data(args_io, split, world.device) for split in ("train", "val")}


def train_generator(given, folder, tokenizer, tok_args, tok_folder, world, source=None):
    """Stage 2, on the tokens of a trained tokenizer. source: tokenizer, flags and folder of the images of --task."""
    for name in STAGE1:                                     # stage 2 inherits what stage 1 was trained with
        setattr(given, name, getattr(tok_args, name))
    args, checkpoint, sets = begin(given, folder, world)
    if sets is None:
        return
    weights = {k: v.cpu() for k, v in tokenizer.state_dict().items()}
    if checkpoint and any(not torch.equal(v, checkpoint["tokenizer"][k]) for k, v in weights.items()):
        raise BadInput(f"{folder} was begun on the tokens of another tokenizer than {tok_folder}: start again with "
                       "--overwrite")
    extra = dict(classes=sets["train"].classes, tokenizer=weights, grid=list(tokenizer.grid))           # grid: for export
    tokens = {s: token_cache(tokenizer, images, tok_folder, s, world.rank == 0) for s, images in sets.items()}
    if source is not None:
        image_tokenizer, image_args, image_folder = source
        extra |= dict(source={k: v.cpu() for k, v in image_tokenizer.state_dict().items()}, source_flags=vars(image_args))
        for s, maps in tokens.items():
            images = token_cache(image_tokenizer, open_data(image_args, s, world.device), image_folder, s, world.rank == 0)
            tokens[s] = Pairs(maps, images)
    if args.condition == "text":
        texts = {s: captions_of(args, images, s) for s, images in sets.items()}
        if args.text_len is None:
            args.text_len = 120 if args.text_encoder != "bytes" else max(len(t.encode()) for t in texts["train"])
        for s, of in tokens.items():
            of.labels = text_cache(args, texts[s], tok_folder, s, world.rank == 0).to(world.device)
        args.text_features = tokens["train"].labels.shape[-1]                               # E of T5; not used for bytes
    torch.manual_seed(args.seed)
    generator = named_generator(args, tokenizer, sets["train"].classes, source and source[0])
    folder.mkdir(parents=True, exist_ok=True)
    loop_args = argparse.Namespace(**vars(args), **loop_flags(given))
    run = SimpleNamespace(folder=folder, args=args, tokenizer=tokenizer, classes=sets["train"].classes, device=world.device,
                          source=source and source[0])
    fit(2, generator, tokens["train"], validate(tokens["val"], 250, args, world), loop_args, folder, world, checkpoint, extra,
        lambda model: save_samples(run, model, world), UNITS[args.objective if args.head == "diffusion" else args.head])


def train_joint(given, folder, world):
    """Both stages in one: VAE and transformer from scratch, by the exact bound (--joint)."""
    args, checkpoint, sets = begin(given, folder, world)
    if sets is None:
        return
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(args)
    model = vae.Joint(tokenizer, named_generator(args, tokenizer, sets["train"].classes))
    folder.mkdir(parents=True, exist_ok=True)
    loop_args = argparse.Namespace(**vars(args), **loop_flags(given))
    run = SimpleNamespace(folder=folder, args=args, classes=sets["train"].classes, device=world.device, source=None)

    def finish(model):
        run.tokenizer = model.vae
        save_samples(run, model.generator, world)
    fit(2, model, sets["train"], validate(sets["val"], 250, args, world), loop_args, folder, world, checkpoint,
        dict(classes=sets["train"].classes), finish, UNITS["logistic"])


def named_generator(args, tokenizer, classes, source=None):
    try:
        return build_generator(args, tokenizer, len(classes), source)
    except ValueError as e:
        raise BadInput(f"--size {args.size}: {e}") from None


def save_samples(run, generator, world):
    """The picture at the end of stage 2: a row per class, or images with their maps."""
    if world.rank == 0:
        run.generator = generator
        if run.args.condition == "text":
            sample.save_captions(run.folder / "samples.png", run, sample.some_captions(run, 8), seed=run.args.seed)
        elif run.source is not None:
            sample.save_maps(run.folder / "samples.png", run, n=10, seed=run.args.seed)
        elif run.args.frames > 1:
            labels = torch.arange(min(len(run.classes), 20))
            clips = sample.draw_samples(run, labels, seed=run.args.seed)
            rows = [(str(name), data.film(clip)) for name, clip in zip(run.classes, clips)]
            data.save_rows(run.folder / "samples.png", rows, f"{run.folder.name}: samples")
        else:
            labels = torch.arange(min(len(run.classes), 20)).repeat_interleave(8)
            images = sample.draw_samples(run, labels, seed=run.args.seed)
            data.save_class_grid(run.folder / "samples.png", images, labels, run.classes, f"{run.folder.name}: samples")


def loop_flags(given):
    return {k: getattr(given, k) for k in ("log_every", "eval_every", "save_every")}


def divisible(batch_size, flag, world):
    if batch_size % world.size:
        raise BadInput(f"{flag} {batch_size} cannot be shared equally by {world.size} processes: give a multiple")


def barrier(world):
    if world.size > 1:
        dist.barrier()


def main(argv=None):
    begun = time.perf_counter()
    given = parse_args(argv)
    check(given)
    device = pick_device(given.device)
    torch.set_float32_matmul_precision("high")              # TF32 on GPUs that have it
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:                                            # started by torchrun
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    world = SimpleNamespace(rank=int(os.environ.get("RANK", 0)), size=size, device=device, dtype=given.dtype,
                            native_bf16=native_bf16(device),
                            compile=device.type == "cuda" if given.compile is None else given.compile)
    data_name = Path(given.data or "shapes").name.split(".")[0] or "data"
    kind = given.tokenizer if given.frames in (None, 1) else f"{given.tokenizer}-{given.frames}f"
    tok_folder = Path(given.runs) / (given.tok_name or f"{data_name}-{kind}")
    task = given.task if given.task not in (None, "class") else None
    parts = [data_name, kind, task, given.stage if given.stage in ("proxy", "finetune") else None,
             "text" if given.condition == "text" else None, "joint" if given.joint else None,
             given.adapter if given.adapter == "flow" else None, given.generator, given.head]
    folder = Path(given.runs) / (given.name or "-".join(p for p in parts if p))
    if given.resume and not any((f / "ckpt.pt").exists() for f in (folder, tok_folder)):
        raise BadInput(f"--resume: there is no run in {folder} or {tok_folder}; leave --resume out to start one")

    def stage1(folder, begin=None, **changed):
        keep = argparse.Namespace(**vars(given) | changed)
        if (folder / "ckpt.pt").exists() and given.overwrite and given.generator != "none":
            keep.overwrite = contradicts(keep, folder)      # --overwrite of stage 2 keeps a tokenizer that still fits
        return *train_tokenizer(keep, folder, world, begin), folder

    try:
        shown = folder
        if given.joint:
            train_joint(given, folder, world)
        else:
            source = stage1(tok_folder, task="class") if task else None
            stage = given.stage if given.stage in ("proxy", "finetune") else None
            named = lambda part: tok_folder.with_name(f"{tok_folder.name}-{part}")
            begin = stage1(named("proxy"), stage="proxy")[0] if stage == "finetune" else None
            tokenizer = stage1(named(task or stage) if task or stage else tok_folder, begin)
            if given.generator != "none":
                train_generator(given, folder, *tokenizer, world, source)
            else:
                shown = tokenizer[2]
        say(world, f"done in {(time.perf_counter() - begun) / 60:.1f} minutes: {shown}")
    except KeyboardInterrupt:
        raise BadInput("stopped; the same command with --resume goes on from the last checkpoint") from None
    finally:
        if size > 1:
            dist.destroy_process_group()


def contradicts(given, folder):
    """Does a given stage 1 flag differ from what the run in `folder` was trained with, or is that run unfinished?"""
    checkpoint = read_checkpoint(folder)
    was = DEFAULTS["any"] | checkpoint["flags"]             # an older run may lack a newer flag
    differs = [n for n in STAGE1 if getattr(given, n) is not None and getattr(given, n) != was.get(n)]
    return bool(differs) or not checkpoint["done"]


if __name__ == "__main__":
    main()
