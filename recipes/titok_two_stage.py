"""
TiTok's two stages of training, as published: first name the ids of another tokenizer, then learn pixels.

train.py --tokenizer titok learns pixels from the start. The authors (arxiv.org/abs/2406.07550, section 3.3
and appendix) found a warm-up better: a trained tokenizer with one id per patch, the proxy, says what the
decoder has to predict, so that no loss on pixels is needed while the T tokens are still being found.

    proxy       images --TiTok's encoder--> T ids --TiTok's decoder--> logits of the proxy's ids
    finetune    encoder and T ids are frozen. The softmax of the logits mixes the proxy's codes, and the
                proxy's decoder makes pixels of them. Both decoders learn from the squared error; --gan and
                --perceptual join here.

The authors' proxy is MaskGIT's VQGAN. Ours is a small vq.VQ, trained here unless --proxy names the run of
one.

    python -m recipes.titok_two_stage                                  # proxy, both stages and a MaskGIT
    python -m recipes.titok_two_stage --proxy runs/shapes-titok-patches --tokens 8 --tok_name t8 --name t8-mg
    python -m recipes.titok_two_stage --generator none --gan 0.5       # the tokenizer alone

All flags of train.py go with it: --tok_steps is for each of the two stages, --proxy_steps for the proxy. The
last run folder, such as runs/shapes-titok-finetune-maskgit-categorical, is one like any other for sample.py
and evaluate.py.

Try it yourself:
  1. Compare reconstructions.png with that of train.py --tokenizer titok after as many steps. Which is
     sharper?
  2. Stop stage proxy after 100 steps. How many of its ids are named right (proxy_right), and what does
     finetune save?
  3. Give the proxy fewer codes, --proxy with a run of --vocab_size 64. What can the finetune stage not
     repair?
"""
import argparse
from pathlib import Path

import torch

import train
from common import runs
from data import BadInput

# The proxy is no TiTok: TiTok's flags do not go to it. "fine" has one id for every patch of 4 x 4 pixels.
OF_PROXY = dict(tokenizer="vq", tok_size="fine", tok_batch_size=None, tok_lr=None, token_dim=None,
                vocab_size=None, tokens=None, codebook=None, beta=None, perceptual=None, gan=None)


def parse_args(argv=None):
    """-> the flags of this recipe, those of train.py. Raises BadInput for what does not go together."""
    p = argparse.ArgumentParser(allow_abbrev=False, description="Train TiTok in its two published stages. "
                                                                "All flags of train.py go with it.")
    p.add_argument("--proxy", help="run folder of a trained --tokenizer vq with one id per patch of TiTok "
                                   "(default: trained here, in data-titok-patches)")
    p.add_argument("--proxy_steps", type=int, help="training steps of that proxy, where it is trained here")
    p.add_argument("--stage", choices=["proxy", "finetune"], default="finetune",
                   help="proxy: stop after the first stage")
    own, rest = p.parse_known_args(argv)
    named = any(word.split("=")[0] == "--tokenizer" for word in rest)
    chosen = any(word.split("=")[0] == "--generator" for word in rest)
    given = train.parse_args([*([] if named else ["--tokenizer", "titok"]), *rest])
    if not chosen and given.tokenizer == "titok":
        given.generator = "maskgit"                         # the paper's
    for wrong, sentence in REFUSALS:
        if wrong(own, given):
            raise BadInput(sentence)
    return own, given


REFUSALS = [  # what is asked, the sentence
    (lambda own, given: given.tokenizer not in
     ("titok", "titok-vae"), "--tokenizer: the two stages are those of titok, or of titok-vae"),
    (lambda own, given: own.proxy and own.proxy_steps,
     "--proxy_steps: the run of --proxy is trained already; leave one of them out"),
    (lambda own, given: own.proxy_steps is not None and own.proxy_steps < 1,
     "--proxy_steps: must be at least 1"),
]


# ---- The program ---------------------------------------------------------------------------------

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
    """Proxy, first stage, second stage and generator, each unless it is done -> the last run folder."""
    tok_folder, folder = runs.folders(given)
    proxy_folder = Path(own.proxy or tok_folder.with_name(f"{tok_folder.name}-patches"))
    first_folder = tok_folder.with_name(f"{tok_folder.name}-proxy")
    last_folder = tok_folder.with_name(f"{tok_folder.name}-finetune")
    if not given.name:
        folder = folder.with_name(folder.name.replace("-titok", "-titok-finetune", 1))
    folders = (proxy_folder, first_folder, last_folder, folder)
    begun = [path for path in folders if (path / "ckpt.pt").exists()]
    if given.resume and not begun:
        raise BadInput(f"--resume: there is no run in {first_folder} or {last_folder}; leave it out")

    # All flags are resolved, and refused where they cannot work, before anything is trained.
    if own.proxy:
        proxy_args = runs.load_run(proxy_folder).args
    else:
        proxy_args = resolve(given, proxy_folder, **OF_PROXY, tok_steps=own.proxy_steps)
        runs.refuse(proxy_args, dist)
    if proxy_args.tokenizer != "vq":
        raise BadInput(f"--proxy {own.proxy}: a run of --tokenizer vq is wanted, this is one of "
                       f"{proxy_args.tokenizer}")
    proxy_flags = {name: getattr(proxy_args, name) for name in runs.STAGE1}
    refuse_other_proxy(given, first_folder, proxy_flags)
    first_args = resolve(given, first_folder, last=own.stage == "proxy", gan=None, perceptual=None,
                         tok_options=dict(stage="proxy", proxy=proxy_flags))
    first_args.unit = "nats per id of the proxy + losses of the codes"
    runs.refuse(first_args, dist)
    tok_options = dict(stage="finetune", proxy=proxy_flags)
    resume = given.resume and any(path in begun for path in (last_folder, folder))
    args = runs.resolve(changed(given, tok_options=tok_options, resume=resume), last_folder, folder)
    runs.refuse(args, dist)
    sets = runs.open_data(args)

    if not own.proxy:
        train_tokenizer(proxy_args, dist, proxy_folder, sets)
    proxy = runs.load_run(proxy_folder).tokenizer.state_dict()
    weights = {f"proxy.{name}": value for name, value in proxy.items()}
    train_tokenizer(first_args, dist, first_folder, sets, weights)
    if own.stage == "proxy":
        return first_folder
    train_tokenizer(args, dist, last_folder, sets, runs.load_run(first_folder).tokenizer.state_dict())
    if args.generator == "none":
        return last_folder
    if not args.stage2_done:
        runs.refuse_other_data(args, folder, sets[0])
        train.train_generator(args, dist, folder, last_folder, *sets)
    return folder


def changed(given, **flags):
    return argparse.Namespace(**vars(given) | flags)


def resolve(given, folder, last=False, **flags):
    """runs.resolve for a tokenizer. --overwrite keeps it if it is done as asked for, and not the last one."""
    given = changed(given, generator="none", **flags)
    saved = runs.read_checkpoint(folder)
    given.resume = given.resume and saved is not None
    if saved is not None and not last and runs.fits(given, saved):
        given.overwrite = False
    return runs.resolve(given, folder, folder)


def refuse_other_proxy(given, folder, proxy_flags):
    """The first stage goes on only with the proxy that it was begun with."""
    saved = None if given.overwrite else runs.read_checkpoint(folder)
    if saved is not None and saved["flags"].get("tok_options", {}).get("proxy") != proxy_flags:
        raise BadInput(f"--proxy: {folder} was trained with another proxy; give that one, another "
                       "--tok_name, or --overwrite")


def train_tokenizer(args, dist, folder, sets, weights=None):
    """One tokenizer, unless it is done. weights: those that it begins with."""
    if args.stage1_done:
        return
    runs.refuse_other_data(args, folder, sets[0])
    train.train_tokenizer(args, dist, folder, *sets, weights)


if __name__ == "__main__":
    main()
