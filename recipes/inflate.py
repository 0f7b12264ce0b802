"""
A video tokenizer that starts from an image tokenizer: its kernels inflated along time.

MAGVIT-v2 (arxiv.org/abs/2310.05737, section 3.2) trains lfq.LFQ on images first. Then each kernel of its
convolutions becomes a kernel over time: the image's weights stand at the last tap, where the present frame
is, and the others are 0. The video tokenizer begins with exactly the ids and pictures of the image tokenizer
for an image, and for the first frame of a clip. It learns from there what the frames have in common.

    image LFQ --LFQ.inflate--> video LFQ --stage 1 on clips (3, F, H, W)--> ids --stage 2--> generator

    python train.py --tokenizer lfq --tok_size clips --image_size 16 --generator none    # runs/shapes-lfq
    python -m recipes.inflate runs/shapes-lfq                               # 17 frames, and a MaskGIT
    python -m recipes.inflate runs/shapes-lfq --frames 9 --generator none   # the tokenizer alone

All flags of train.py go with it. The size and the number of codes are those of the image tokenizer. The run
folders are those of train.py with -inflated behind the tokenizer's name, for sample.py and evaluate.py as any
others.

Try it yourself:
  1. Train as long without inflating (train.py --frames 17). How many steps ahead is the inflated one in
     val_loss?
  2. --tok_steps 1 --tok_lr 1e-9: look at reconstructions.png. What do the later frames of a clip look like,
     and why?
"""
import argparse

import torch

import train
from common import runs
from data import BadInput


def parse_args(argv=None):
    """-> the flags of this recipe, those of train.py."""
    p = argparse.ArgumentParser(allow_abbrev=False, description="Train a video tokenizer from one of images. "
                                                                "All flags of train.py go with it.")
    p.add_argument("image_run", help="run folder of an image tokenizer, --tokenizer lfq")
    own, rest = p.parse_known_args(argv)
    given = train.parse_args(["--tokenizer", "lfq", "--generator", "maskgit", "--frames", "17", *rest])
    if given.tokenizer != "lfq":
        raise BadInput("--tokenizer: only lfq can be inflated; leave it out")
    if given.frames == 1:
        raise BadInput("--frames 1: there is no time to inflate to; give 17, say")
    return own, given


def main(argv=None):
    own, given = parse_args(argv)
    torch.set_float32_matmul_precision("high")              # TF32 on GPUs that have it, as in train.py
    dist = runs.join_processes(given)
    try:
        folder = train_all(own, given, dist)
        train.say(dist, f"done: {folder}")
    except KeyboardInterrupt:
        raise BadInput("stopped; the same command with --resume goes on from the last checkpoint") from None
    finally:
        runs.leave_processes(dist)


def train_all(own, given, dist):
    """The video tokenizer and its generator, each unless it is done -> the last run folder."""
    image_run = runs.load_run(own.image_run)
    if image_run.args.tokenizer != "lfq" or image_run.args.frames != 1:
        raise BadInput(f"{own.image_run}: not an image tokenizer of --tokenizer lfq")
    if given.tok_size is None:
        given.tok_size = image_run.args.tok_size
    if given.codebook is None:
        given.codebook = image_run.args.codebook
    if given.vocab_size is None:
        given.vocab_size = image_run.tokenizer.vocab_size
    tok_folder, folder = runs.folders(given)
    if not given.name:                                      # before the tokenizer's name changes
        folder = folder.with_name(folder.name.replace(f"-{given.frames}f", f"-{given.frames}f-inflated", 1))
    if not given.tok_name:
        tok_folder = tok_folder.with_name(f"{tok_folder.name}-inflated")
    args = runs.resolve(given, tok_folder, folder)
    runs.refuse(args, dist)
    weights = inflated(args, image_run)
    stages = runs.stages_to_train(args, tok_folder, folder)
    if stages:
        sets = runs.open_data(args)
        for begun in (tok_folder, folder):
            runs.refuse_other_data(args, begun, sets[0])
    if 1 in stages:
        train.train_tokenizer(args, dist, tok_folder, *sets, weights)
    if 2 in stages:
        train.train_generator(args, dist, folder, tok_folder, *sets)
    return tok_folder if args.generator == "none" else folder


def inflated(args, image_run):
    """The weights of an image tokenizer, inflated to those of the video tokenizer that the flags name."""
    try:
        return runs.build_tokenizer(args).inflate(image_run.tokenizer.state_dict()).state_dict()
    except (ValueError, RuntimeError):                      # names or shapes differ
        raise BadInput(f"{image_run.folder}: its sizes are others; leave out --tok_size and --vocab_size, "
                       f"which are then {image_run.args.tok_size} and {image_run.tokenizer.vocab_size} as "
                       "there") from None


if __name__ == "__main__":
    main()
