"""
Train a tokenizer, then a generator on its tokens.

    python train.py --tokenizer vae --head gmm                       # GIVT on drawn shapes, on a CPU or a GPU
    python train.py --tokenizer vae --head gmm --data PATH           # the same on your images
    python train.py --tokenizer vq --generator maskgit               # MaskGIT: ids, many tokens in each pass
    python train.py --tokenizer vae --generator mar --head diffusion # MAR: random order, a diffusion loss
    python train.py --tokenizer msvq --generator var                 # VAR: from coarse to fine
    torchrun --standalone --nproc_per_node=2 -- train.py ...         # two GPUs, still the same batch

Stage 1 trains the tokenizer (images -> tokens -> images), unless its run folder is there already. Then all
images are encoded once, and stage 2 trains the generator on the tokens. Both stages share one loop, fit(),
because tokenizers and generators are trained alike: loss, logs = model(x, cond).

Each stage leaves ckpt.pt, log.csv, curve.png and a picture in its folder, such as runs/shapes-vae and
runs/shapes-vae-ar-gmm. If a run was stopped, the same command with --resume goes on from the last checkpoint.
On a CPU the result is bit for bit that of a run without the stop. The default of a flag depends on the
machine and the data: see common/runs.py, which also refuses combinations that cannot work.

Read main() first, then fit().
"""
import argparse
import math
import time
from types import SimpleNamespace

from common import memory, waiting

waiting.gently()                                            # before torch is imported
memory.keep()
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

import data
import perceptual_gan
from common import averages, captions, classifier, clips, compiling, drawing, log, muon, pictures, runs
from common import sharding, tokens
from data import BadInput
from maskgit import MaskGIT

VALIDATED = 2000                                            # images, or frames of clips, per validation loss
STARTED_FROM = 2000                                         # images, or frames, that start a linear path
MEASURED = 5000                                             # images whose tokens say what unit variance is
SAVE_SECONDS = 60                                           # between checkpoints


# ---- Flags: None where not given; runs.resolve fills them in ---------------------------------------

def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Train a tokenizer, then a generator on its tokens.")
    p.add_argument("--tokenizer", choices=list(runs.TOKENIZERS), required=True,
                   help="stage 1: images to tokens. vae, titok-vae, patches (pixels, nothing trained): real "
                        "vectors; vq, lfq, titok, msvq: ids")
    p.add_argument("--generator", choices=[*runs.GENERATORS, "none"],
                   help="stage 2: one token after another (ar, the default), masked tokens in parallel "
                        "(maskgit), sets of tokens in random order (mar), from coarse to fine (var, the "
                        "default for msvq), or stop after stage 1 (none)")
    p.add_argument("--head", choices=runs.HEADS,
                   help="the distribution of one token (default: gmm for vectors, categorical for ids)")
    add_data_flags(p)
    add_tokenizer_flags(p)
    add_generator_flags(p)
    add_run_flags(p)
    args = p.parse_args(argv)
    if args.generator is None:
        args.generator = "var" if args.tokenizer == "msvq" else "ar"
    if args.head is None:
        args.head = "gmm" if args.tokenizer in runs.CONTINUOUS else "categorical"
    return args


def add_data_flags(p):
    g = p.add_argument_group("data")
    g.add_argument("--data", help="shapes (drawn), or yours: a folder, a .tar[.gz], .zip or .npz")
    g.add_argument("--image_size", type=int, help="side of the square images, in pixels")
    g.add_argument("--frames", type=int, help="clips of this many frames, 1 + a multiple of 4 (lfq only)")
    g.add_argument("--frame_step", type=int,
                   help="your clips: take every so manyth frame (default: frames spread evenly over each "
                        "file)")
    g.add_argument("--n_shapes", type=int, help="number of drawn training images or clips")
    g.add_argument("--flip", action="store_const", const=True, help="mirror images left-right at random")
    g.add_argument("--skip_bad", action="store_true", help="leave out unreadable files instead of stopping")


def add_tokenizer_flags(p):
    g = p.add_argument_group("stage 1: the tokenizer")
    g.add_argument("--tok_size", help="a size from SIZES in the tokenizer's file")
    g.add_argument("--tok_steps", type=int, help="training steps")
    g.add_argument("--tok_batch_size", type=int, help="images per step, over all processes")
    g.add_argument("--tok_lr", type=float, help="highest learning rate")
    g.add_argument("--token_dim", type=int, help="numbers in a token, or in a code (default: of the size)")
    g.add_argument("--vocab_size", type=int,
                   help="vq, titok, lfq, msvq: number of codes (default: of the size)")
    g.add_argument("--tokens", type=int, help="tokens per image of titok, titok-vae (default: of the size)")
    g.add_argument("--codebook", choices=[*runs.CODEBOOKS, *runs.QUANTISERS],
                   help="vq, titok: codes of unit length (l2) or any (plain), or as moving averages (-ema). "
                        "msvq: ema or plain. lfq: signs, with entropies (lfq) or on the sphere (bsq), or "
                        "rounded numbers (fsq)")
    g.add_argument("--beta", type=float,
                   help="vae: weight of the KL; vq, titok, msvq: of the commitment loss; lfq: of its penalty")
    g.add_argument("--perceptual", type=float,
                   help="weight of a perceptual loss, by a small classifier of the data (0: none)")
    g.add_argument("--gan", type=float, help="weight of a patch discriminator (0: none; LlamaGen has 0.5)")


def add_generator_flags(p):
    g = p.add_argument_group("stage 2: the generator")
    g.add_argument("--adapter", choices=["none", "flow"],
                   help="flow: a volume-preserving map of the tokens, trained with the generator")
    g.add_argument("--size", help="a size from SIZES in the generator's file")
    g.add_argument("--steps", type=int, help="training steps")
    g.add_argument("--batch_size", type=int, help="images per step, over all processes")
    g.add_argument("--lr", type=float, help="highest learning rate")
    g.add_argument("--n_mix", type=int, help="gmm head: components of the mixture")
    g.add_argument("--objective", choices=["diffusion", "flow"],
                   help="diffusion head: remove noise step by step, or follow a rectified flow")
    g.add_argument("--groups", type=int,
                   help="categorical head: sub-tokens that an id is cut into, drawn side by side "
                        "(MAGVIT-v2: 2)")
    g.add_argument("--order", choices=["random", "raster", "annealed"],
                   help="mar: order of the tokens; annealed: random first, raster at last (--attention "
                        "causal)")
    g.add_argument("--attention", choices=["bidirectional", "causal"],
                   help="mar: an encoder and a decoder, or one causal transformer")
    g.add_argument("--condition", choices=["class", "text"],
                   help="condition on the class label or on the caption")
    g.add_argument("--text_encoder",
                   help="of captions: bytes, or a T5 encoder of the package transformers, by name or folder")
    g.add_argument("--label_drop", type=float, help="share of the labels dropped in training, for guidance")
    g.add_argument("--dropout", type=float, help="dropout in the transformer (default: that of the size)")


def add_run_flags(p):
    """Flags of the loop, the machine and the run folders, which the recipes have as well."""
    g = p.add_argument_group("both stages")
    g.add_argument("--seed", type=int, help="seed of the drawn images, the weights and everything random")
    g.add_argument("--optimizer", choices=["muon", "adamw"],
                   help="muon: Muon for the matrices of transformer blocks and the kernels of "
                        "convolutions, AdamW for the rest")
    g.add_argument("--weight_decay", type=float, help="decoupled weight decay, of matrices only")
    g.add_argument("--warmup", type=int,
                   help="steps in which the learning rate rises; after them it falls to 0 along a cosine")
    g.add_argument("--grad_clip", type=float, help="largest norm of the gradient")
    g.add_argument("--ema", type=float,
                   help="decay per step of the averaged weights (default: they remember 1/20 of the run)")
    g = p.add_argument_group("machine and run folders")
    g.add_argument("--runs", default="runs", help="folder of the run folders")
    g.add_argument("--name",
                   help="run folder of stage 2 (default: data-tokenizer[-text][-flow]-generator-head)")
    g.add_argument("--tok_name", help="run folder of stage 1 (default: data-tokenizer)")
    g.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    g.add_argument("--overwrite", action="store_true",
                   help="train anew; for stage 2, a finished tokenizer that fits is kept")
    g.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    g.add_argument("--dtype", choices=["fp32", "bf16"],
                   help="bf16: autocast (default: on CUDA, and for stage 2 on CPUs that multiply bfloat16)")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction,
                   help="torch.compile the model (default: on CUDA)")
    g.add_argument("--accumulate", type=int, default=1,
                   help="parts that a batch is cut into, computed one after the other: less memory, one step")
    g.add_argument("--recompute", action="store_true",
                   help="compute what is inside each block again in the backward pass instead of keeping it: "
                        "less memory, a third more time")
    g.add_argument("--shard", action="store_true",
                   help="under torchrun: each process keeps only its share of the generator's weights, "
                        "gradients and moments (FSDP2)")
    g.add_argument("--log_every", type=int, default=50, help="steps between printed lines")
    g.add_argument("--eval_every", type=int, default=500,
                   help="steps between validation losses")


# ---- The program ---------------------------------------------------------------------------------

def main(argv=None):
    start = time.perf_counter()
    given = parse_args(argv)
    torch.set_float32_matmul_precision("high")              # TF32 on GPUs that have it
    dist = runs.join_processes(given)                       # dist.rank, dist.size: 0 and 1 without torchrun
    try:
        tok_folder, folder = runs.folders(given)
        args = runs.resolve(given, tok_folder, folder)      # given, or else saved, or else the default
        runs.refuse(args, dist)                             # in a sentence, and before anything is trained
        runs.wait_for_all(dist)                             # until all have read what is there, and tidied up
        stages = runs.stages_to_train(args, tok_folder, folder)                       # [1, 2], [1], [2] or []
        if stages:
            train_set, val_set = runs.open_data(args)       # refuses a missing caption, for example
            say(dist, data.describe(train_set, val_set))
            for begun in (tok_folder, folder):
                runs.refuse_other_data(args, begun, train_set)
        if 1 in stages:
            train_tokenizer(args, dist, tok_folder, train_set, val_set)
        if 2 in stages:
            train_generator(args, dist, folder, tok_folder, train_set, val_set)
        shown = tok_folder if args.generator == "none" else folder
        say(dist, f"done in {(time.perf_counter() - start) / 60:.1f} minutes: {shown}")
    except KeyboardInterrupt:
        raise BadInput("stopped; the same command with --resume goes on from the last checkpoint") from None
    except RuntimeError as e:
        runs.explain(dist, e)                               # in a sentence, if it is a known one
        raise
    finally:
        runs.leave_processes(dist)


def train_tokenizer(args, dist, folder, train_set, val_set, weights=None):
    """Stage 1: images -> tokens -> images. weights: those by name that do not start at random (recipes)."""
    torch.manual_seed(args.seed)
    tokenizer = runs.build_tokenizer(args)
    if not args.resume1:
        start_path(tokenizer, args, train_set)
    if weights:
        tokenizer.load_state_dict(weights, strict=False)
    model = add_losses(args, tokenizer, folder, train_set, val_set)                   # --perceptual and --gan
    source = clips.Stills(train_set) if args.frames > 1 else train_set       # of clips, single frames as well

    def finish(model):
        tokenizer = getattr(model, "tokenizer", model)      # without the losses around it
        arrays = tokens.encode_some(tokenizer, train_set, MEASURED)
        if tokenizer.vocab_size:
            used = len(arrays["ids"].unique())
            n = len(arrays["ids"])
            say(dist, f"{used} of {tokenizer.vocab_size} codes occur in {n} training images")
            if hasattr(tokenizer, "scales"):
                parts = arrays["ids"].split([side * side for side in tokenizer.scales], 1)
                found = [f"{len(part.unique())} at {p} x {p}" for p, part in zip(tokenizer.scales, parts)]
                say(dist, "on each scale: " + ", ".join(found))
        else:
            tokenizer.measure(arrays["mean"], arrays["std"])                          # for unit variance
        if dist.rank == 0:
            drawing.save_reconstructions(folder / "reconstructions.png", args, tokenizer, val_set)

    extra = dict(classes=train_set.classes, fingerprint=runs.fingerprint(train_set))
    fit(1, model, source, val_set, args, dist, folder, finish, extra)


def start_path(tokenizer, args, train_set):
    """The linear path of a tokenizer that has one, from a first look at images."""
    if hasattr(tokenizer, "start"):
        n = min(len(train_set), max(1, STARTED_FROM // args.frames))
        index = torch.linspace(0, len(train_set) - 1, n, device="cpu").long()
        tokenizer.to(args.device).start(train_set.batch(index)[0])


def add_losses(args, tokenizer, folder, train_set, val_set):
    """The tokenizer behind a perceptual loss and a patch discriminator, where the flags ask for them."""
    if not args.perceptual and not args.gan:
        return tokenizer
    perceptual = None
    discriminator = None
    if args.perceptual:                                     # seed 0 is that of the one that judges samples
        net, _ = classifier.classifier_for(args, folder, args.device, train_set, val_set, seed=1)
        perceptual = perceptual_gan.ClassifierFeatures(net.stages)
    if args.gan:
        discriminator = perceptual_gan.PatchDiscriminator.for_images(args.image_size)
    return perceptual_gan.AdversarialTokenizer(tokenizer, discriminator, perceptual, gan_weight=args.gan,
                                               perceptual_weight=args.perceptual, start=args.tok_steps // 2)


def train_generator(args, dist, folder, tok_folder, train_set, val_set):
    """Stage 2: learn the distribution of the tokens that a trained tokenizer makes."""
    tokenizer = runs.load_run(tok_folder, args.device).tokenizer
    runs.refuse_other_tokenizer(args, folder, tokenizer)    # --resume needs that of the checkpoint
    sources = {}
    for split, images in (("train", train_set), ("val", val_set)):
        sources[split] = tokens.cached(tokenizer, images, tok_folder / f"tokens-{split}.pt", dist)
    if args.condition == "text":
        texts = {split: captions.of_images(args, images, split) for split, images in
                 (("train", train_set), ("val", val_set))}
        args.text_len = args.text_len or captions.length_of(args, texts["train"])
        for split, source in sources.items():
            features = captions.cached(args, texts[split], tok_folder / f"captions-{split}.pt", dist)
            source.labels = features
        args.text_features = features.shape[-1]             # of T5; not used for bytes
    torch.manual_seed(args.seed)
    generator = runs.build_generator(args, tokenizer, len(train_set.classes))

    def finish(model):
        if dist.rank == 0:
            run = SimpleNamespace(folder=folder, args=args, tokenizer=tokenizer, generator=model,
                                  classes=train_set.classes, device=args.device)
            drawing.save_samples(folder / "samples.png", run)

    weights = {name: value.cpu() for name, value in tokenizer.state_dict().items()}
    extra = dict(classes=train_set.classes, fingerprint=runs.fingerprint(train_set), tokenizer=weights,
                 grid=list(tokenizer.grid))                 # complete in itself
    fit(2, generator, sources["train"], sources["val"], args, dist, folder, finish, extra)


# ---- The loop ------------------------------------------------------------------------------------

def fit(stage, model, source, val_source, args, dist, folder, finish, extra):
    """Train `model` on batches of `source` and leave ckpt.pt, log.csv and curve.png in `folder`.

    source.batch(index, share) -> x, cond and model(x, cond) -> loss, logs. finish(averaged model) is called
    after the last step, before the run counts as done. extra: more entries for the checkpoint.
    """
    steps, batch_size, lr, resume = args.steps, args.batch_size, args.lr, args.resume2
    if stage == 1:
        steps, batch_size, lr, resume = args.tok_steps, args.tok_batch_size, args.tok_lr, args.resume1
    folder.mkdir(parents=True, exist_ok=True)
    device = args.device
    raw = model.to(device)                                  # without the wrappers below: this is saved
    for p in raw.parameters():
        if p.ndim == 4:                                     # faster for most 2-D convolutions on a CPU
            p.data = p.data.contiguous(memory_format=torch.channels_last)
    decay = 1 - 20 / max(steps, 40) if args.ema is None else args.ema
    ema = averages.Averages(raw, decay)
    if args.recompute:
        sharding.recompute(raw)
    shard = args.shard and stage == 2                       # tokenizers are small
    if shard:
        unshared = sharding.without_weights(raw)            # what finish() gets, filled
        sharding.shard(raw, device, dist.size)
        sharding.shard(ema.module, device, dist.size)
    optimizers = make_optimizers(raw, args, lr)
    discriminator = list(raw.discriminator.parameters()) if getattr(raw, "discriminator", None) else []
    others = [p for p in raw.parameters() if all(p is not q for q in discriminator)]

    first, rows = 0, []
    checkpoint = runs.read_checkpoint(folder) if resume else None
    if checkpoint is not None:
        first, rows = checkpoint["step"], log.read(folder, checkpoint["step"])
        sharding.load(raw, checkpoint["model"])
        sharding.load(ema, checkpoint["ema"])
        try:
            for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
                sharding.load_optimizer(optimizer, state)
        except (ValueError, IndexError):
            raise BadInput(f"{folder}: begun by an earlier version, which gave other weights to Muon; start "
                           "again with --overwrite") from None

    def save(step, done=False):
        state = dict(model=raw.state_dict(), ema=ema.state_dict(),
                     optimizers=[optimizer.state_dict() for optimizer in optimizers])
        state = sharding.gathered(state, keep=dist.rank == 0)         # by all processes: shares become whole
        if dist.rank == 0:
            state |= dict(stage=stage, step=step, done=done, flags=runs.flags_to_save(args, stage))
            runs.save_atomically(state | extra, folder / "ckpt.pt")

    if args.compile and not getattr(raw, "adaptive", False):          # adaptive: its loss takes gradients
        say(dist, "compiling: " + ("a minute or more" if device.type == "cuda" else "some minutes")
            + " of silence before the first step")
        model = sharding.compile_blocks(raw) if shard else compiling.for_training(raw)
    ddp = dist.size > 1 and not shard and steps > first     # patches have no step, and no weights
    if ddp:
        model = DistributedDataParallel(model)
    bf16 = runs.use_bf16(args, stage)
    machine = f"{device.type} x {dist.size}, {'bf16' if bf16 else 'fp32'}"
    millions = sum(p.numel() for p in raw.parameters()) / 1e6
    say(dist, f"stage {stage}: {folder}, {millions:.2f}M parameters, {len(source)} examples, "
              f"steps {first} to {steps} of {batch_size}, {machine}")
    if checkpoint is None:
        save(0)                                             # from here on --resume works
    annealed = [module for module in raw.modules() if hasattr(module, "anneal")]      # mar.CausalMAR
    share = slice(dist.rank, None, dist.size)               # of each batch, for this process
    bad_step = torch.full((), steps, device=device)         # the first step whose loss was not finite
    since, timer, saved_at = first, time.perf_counter(), time.perf_counter()

    for step in range(first, steps):
        # One seed per step, so that no state of random numbers needs saving. Every process draws numbers for
        # the whole batch and takes its share, so that n processes see what one would have seen.
        seed = args.seed * 1_000_003 + 2 * step + stage
        torch.manual_seed(seed)
        x, cond = source.batch(data.order(len(source), batch_size, step, args.seed), share)
        if step + 1 < steps:
            data.read_ahead(source, batch_size, step + 1, args.seed, share)
        torch.manual_seed(seed * 4096 + 1 + dist.rank)
        for module in annealed:
            module.anneal(step / steps)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, args.warmup, lr)

        parts = []
        for part in range(args.accumulate):
            if ddp:                                         # gradients are averaged after the last part
                model.require_backward_grad_sync = part + 1 == args.accumulate
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                loss, logs = model(x[part::args.accumulate], cond[part::args.accumulate])
            (loss / args.accumulate).backward()
            parts.append({"loss": loss.detach(), **logs})
        logs = {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
        norm = sharding.whole(torch.nn.utils.clip_grad_norm_(others, args.grad_clip))
        if discriminator:                                   # by itself: its gradient is often far larger
            torch.nn.utils.clip_grad_norm_(discriminator, args.grad_clip)

        bad_step = torch.where(torch.isfinite(logs["loss"] + norm), bad_step, bad_step.clamp(max=step))
        evaluating = (step + 1) % args.eval_every == 0 or step + 1 == steps
        logging = (step + 1) % args.log_every == 0 or step == 0 or evaluating
        saving = step + 1 == steps or (logging or dist.size == 1) and is_late(dist, device, saved_at)
        if logging or saving or device.type == "cpu":       # to look waits for a GPU: not every step
            stop_if_not_finite(dist, bad_step, steps, stage, folder)
        for optimizer in optimizers:
            optimizer.step()
        ema.update_parameters(raw)

        if logging:
            row = {"step": step + 1}
            for name, value in {**logs, "grad_norm": norm}.items():
                row[name] = mean_over_processes(dist, value.detach())
            seconds = (time.perf_counter() - timer) / (step + 1 - since)
            if evaluating:
                row["val_loss"] = validate(stage, ema.module, val_source, args)
            row["ms_per_step"] = 1000 * seconds
            rows.append(row)
            if dist.rank == 0:
                log.show(row, (steps - step - 1) * seconds)
                log.write(folder, rows)
            since, timer = step + 1, time.perf_counter()
        if saving:
            save(step + 1)
            saved_at = time.perf_counter()

    averaged = sharding.filled(unshared, ema.module) if shard else ema.module         # what is used
    finish(averaged.eval())
    if dist.rank == 0 and rows:
        pictures.attempt(pictures.save_curve, folder / "curve.png", rows, runs.unit_of_loss(args, stage))
    save(steps, done=True)                                  # last: if killed before, --resume goes on
    runs.wait_for_all(dist)                                 # until process 0 has written the checkpoint


def make_optimizers(model, args, lr):
    """AdamW for all parameters, or Muon (Jordan et al. 2024) for the matrices inside transformer blocks and
    the kernels of convolutions. Only transformers name their layers blocks.

    On drawn shapes Muon gives the default VAE 1.5 dB more in the same time. A discriminator keeps AdamW.
    MaskGIT learns more in a step from whole matrices than from blocks of their rows; a causal transformer
    learns as much from either.
    """
    matrices = [p for name, p in model.named_parameters()
                if not name.startswith("discriminator.")
                and (p.ndim >= 4 or "blocks." in name and p.ndim == 2)]
    if args.optimizer == "adamw":
        matrices = []
    others = [p for p in model.parameters() if all(p is not q for q in matrices)]
    groups = [dict(params=[p for p in others if p.ndim > 1], weight_decay=args.weight_decay),
              dict(params=[p for p in others if p.ndim <= 1], weight_decay=0.0)]
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)]
    if matrices:                                            # scaled to AdamW's updates: one --lr for both
        dtype = torch.bfloat16 if runs.native_bf16(args.device) else torch.float32
        masked = any(isinstance(module, MaskGIT) for module in model.modules())       # behind an adapter, too
        rows = None if masked else muon.ROWS
        optimizers.append(muon.Muon(matrices, lr, args.weight_decay, rows=rows, dtype=dtype))
    return optimizers


def learning_rate(step, steps, warmup, peak):
    """Linear warm-up, then half a cosine down to zero."""
    return peak * min((step + 1) / max(1, warmup), 0.5 * (1 + math.cos(math.pi * step / steps)))


@torch.no_grad()
def validate(stage, model, source, args):
    """Mean loss over up to VALIDATED validation images, in eval mode, always with the same random numbers."""
    n = min(len(source), VALIDATED)
    at_once = 250
    if stage == 1:
        n = min(len(source), VALIDATED // args.frames)
        at_once = 100 if args.frames == 1 else max(1, 200 // args.frames)
    index = torch.linspace(0, len(source) - 1, n, device="cpu").long()         # evenly: folders come by class
    was_training = model.training
    model.eval()
    total = 0.0
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        for part in index.split(at_once):
            loss, _ = model(*source.batch(part))
            total = total + loss * len(part)
    model.train(was_training)
    return float(total) / n


# ---- Several processes ---------------------------------------------------------------------------

def say(dist, text):
    if dist.rank == 0:
        print(text, flush=True)


def mean_over_processes(dist, value):
    """A scalar tensor -> its mean over all processes, as a float."""
    if dist.size > 1:
        value = value.clone().float()
        torch.distributed.all_reduce(value)
        value /= dist.size
    return float(value)


def is_late(dist, device, saved_at):
    """Is it time for a checkpoint? All processes must agree, and their clocks differ: the majority has it."""
    late = time.perf_counter() - saved_at > SAVE_SECONDS
    if dist.size > 1:
        late = mean_over_processes(dist, torch.tensor(float(late), device=device)) > 0.5
    return late


def stop_if_not_finite(dist, bad_step, steps, stage, folder):
    """All processes stop together, before the optimizer spoils the weights."""
    if dist.size > 1:
        bad_step = bad_step.clone()
        torch.distributed.all_reduce(bad_step, op=torch.distributed.ReduceOp.MIN)
    if bad_step < steps:
        flag = "--tok_lr" if stage == 1 else "--lr"
        raise BadInput(f"step {int(bad_step)}: the loss is not finite; stopped. The last good checkpoint is "
                       f"kept in {folder}: try --resume with a lower {flag}, or with --dtype fp32")


if __name__ == "__main__":
    main()
