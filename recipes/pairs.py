"""
Pairs of images: an image in, another image out, by the models that draw images.

GIVT does dense prediction as it draws (section 4.3 of arxiv.org/abs/2312.02116, after UViM,
arxiv.org/abs/2205.10337). The target is coded by a VAE, whose tokens are drawn. The tokens of the input stand
in front of them, where otherwise the class is:

    input --VAE--> tokens (N, P, E) --prefix--> ARTransformer --p(token)--> tokens (N, T, D) --VAE--> target

A target that is drawn is one guess of many: a grey picture has more than one colouring. The mean of 8 guesses
is what most of them say, and the spread of 16 says where the model is not sure. Three kinds of pairs:

    python -m recipes.pairs --data FOLDER            # yours: a.jpg beside a.target.jpg, or input/ and target/
    python -m recipes.pairs --task colourise         # made of any images; also superresolve, denoise
    python -m recipes.pairs --task segment           # of the drawn world: label maps, or depth (distances)
    python -m recipes.pairs --task segment --beam 4  # when it is trained: picture and table again

Every flag of train.py for a VAE and an autoregressive generator goes with it: --data, --size, --resume ...

Shapes:  N pairs, P E of the tokens of an input, T D of a target, C channels of a target, H W pixels

Try it yourself:
  1. Measure --task colourise with --temperature 0.3 and 1.2. Which row gains, one sample or the mean of 8?
  2. "The input hidden" lies above "ground everywhere". Where does a model that sees no image get that from?
  3. Train --task segment with --head diffusion. Is the spread of 16 samples still at the outlines?
"""
import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import data
import train
from common import age, drawing, files, pictures, runs, tokens
from common.metrics import luminance, mean_iou, psnr
from data import BadInput

MAPS = dict(segment=1 + len(data.SHAPES), depth=3)          # of the drawn world, with their channels
MADE = ("colourise", "superresolve", "denoise")             # inputs made from the targets, by damage()
SHRINK = 4                                                  # superresolve: pixels a side that become one
NOISE = 0.4                                                 # denoise: a fifth of the range of a pixel
CPU_STEPS = dict(segment=2000)                              # of stage 2 on a CPU; else as train.py
DEFAULT = dict(cfg=1.0, temperature=0.9)                    # the input says all, so guidance gains nothing
VOTES = 8                                                   # samples whose mean is the prediction


def parse_args(argv=None):
    """-> the flags of this recipe, those of train.py."""
    p = argparse.ArgumentParser(allow_abbrev=False, description="Train, draw and measure pairs of images. "
                                                                "All flags of train.py go with it.")
    p.add_argument("--task", choices=["pairs", *MADE, *MAPS], default="pairs",
                   help="your own pairs (default), pairs made of any images, or maps of the drawn world")
    p.add_argument("--n", type=int, default=1000, help="validation pairs that are measured")
    p.add_argument("--pictures", type=int, default=10, help="validation pairs in samples.png")
    p.add_argument("--cfg", type=float, help="guidance towards the input; 1 is off (default: 1)")
    p.add_argument("--temperature", type=float, help="below 1: closer to the mode (default: 0.9)")
    p.add_argument("--at_once", type=int, default=250, help="targets drawn at a time (default: 250)")
    p.add_argument("--beam", type=int, help="keep so many sequences and return the likeliest; 1 is off")
    p.add_argument("--top_p", type=float, help="gmm: keep the likeliest components that reach this sum")
    p.add_argument("--clip", type=float, help="gmm: cut every component off at so many sigmas")
    p.add_argument("--guidance", choices=["closed", "importance", "rejection", "official"],
                   help="gmm: how p(x|c)^s p(x)^(1-s) is drawn from")
    p.add_argument("--diffusion_steps", type=int, help="diffusion head: denoising steps per token")
    p.add_argument("--sampler", choices=["ancestral", "ddim", "heun", "euler"],
                   help="diffusion head: how noise is removed")
    own, rest = p.parse_known_args(argv)
    given = train.parse_args(["--tokenizer", "vae", *rest])
    for wrong, sentence in REFUSALS:
        if wrong(own, given):
            raise BadInput(sentence)
    return own, given


REFUSALS = [                                                # what is asked, the sentence
    (lambda own, given: given.tokenizer != "vae", "--tokenizer: targets are tokens of a VAE; leave it out"),
    (lambda own, given: given.generator != "ar", "--generator: only ar takes an image as its prefix"),
    (lambda own, given: own.task == "pairs" and given.data in (None, "shapes"),
     "--task pairs: needs --data FOLDER, with a.jpg beside a.target.jpg or with folders input/ and target/; "
     "--task colourise makes pairs of any images"),
    (lambda own, given: own.task in MAPS and given.data not in (None, "shapes"),
     "--data: only the drawn world (--data shapes) comes with such maps; --task pairs reads your own"),
    (lambda own, given: given.flip, "--flip: an input and its target would be mirrored apart; leave it out"),
    (lambda own, given: given.condition == "text", "--condition: the input is the condition; leave it out"),
    (lambda own, given: given.frames not in (None, 1), "--frames: pairs are of images; leave it out"),
    (lambda own, given: given.gan or given.perceptual,
     "--gan, --perceptual: their losses mean nothing on maps; leave them out"),
    (lambda own, given: min(own.n, own.pictures, own.at_once, 1 if own.beam is None else own.beam) < 1,
     "--n, --pictures, --at_once, --beam: must be at least 1"),
    (lambda own, given: own.n < 10, "--n: at least 10 pairs are needed for a number"),
]


# ---- The pairs -----------------------------------------------------------------------------------

def load_pairs(task, args, split):
    """Training or validation pairs -> inputs, targets: two data.ImageSets in the same order."""
    if task in MAPS:
        n = args.n_shapes if split == "train" else None
        kinds = ("class", task)
        return [data.load("shapes", args.image_size, split, args.device, args.seed, n_shapes=n, task=kind)
                for kind in kinds]
    if task == "pairs":
        sides = files.read_pairs(args.data, args.image_size, split)
        labels = torch.zeros(len(sides[0]), dtype=torch.long, device="cpu")
        return [data.ImageSet(images.to(args.device), labels, ["images"], args.device) for images in sides]
    targets = runs.open_split(args, split)
    if not isinstance(targets.images, torch.Tensor):
        raise BadInput(f"--data {args.data}: at {args.image_size} pixels these images do not fit into "
                       "memory, where the inputs are made; give less of --image_size")
    made = []
    seed = args.seed if split == "train" else args.seed + 1_000_003                   # other noise
    for i in torch.arange(len(targets), device="cpu").split(1000):
        made.append(pictures.to_uint8(damage(targets.batch(i)[0], task, seed + int(i[0]))))
    made = torch.cat(made).to(targets.images.device)
    return data.ImageSet(made, targets.labels, targets.classes, args.device), targets


def damage(images, task, seed=0):
    """images (N, 3, H, W) in [-1, 1] -> what the task shall undo (N, 3, H, W).

    colourise: the luminance in all three channels. superresolve: the mean of every SHRINK x SHRINK pixels.
    denoise: Gaussian noise of NOISE is added, another for each pixel.
    """
    if task == "colourise":
        return (luminance(images) - 1).expand(-1, 3, -1, -1)
    if task == "superresolve":
        return F.interpolate(F.avg_pool2d(images, SHRINK), images.shape[-2:])
    g = torch.Generator().manual_seed(seed)
    return images + NOISE * torch.randn(images.shape, generator=g, device="cpu").to(images.device)


# ---- The program ---------------------------------------------------------------------------------

def main(argv=None):
    own, given = parse_args(argv)
    dist = runs.join_processes(given)
    try:
        paths = folders(own.task, given)
        train_all(own, given, dist, *paths)
    finally:
        runs.leave_processes(dist)
    if dist.rank == 0:
        draw_and_measure(own, load(paths[-1], runs.pick_device(given.device)))


def folders(task, given):
    """The run folders of the VAE of inputs, of the VAE of targets (MADE: the same one), of the generator."""
    images, folder = runs.folders(given)
    if not given.name:                                      # the task behind the tokenizer, as ever
        before, _, after = folder.name.rpartition("-vae")
        folder = folder.with_name(f"{before}-vae-{task}{after}")
    if task in MADE:
        return images, images, folder
    if task == "pairs":                                     # images may be of all pictures, by train.py
        return images.with_name(images.name + "-input"), images.with_name(images.name + "-target"), folder
    return images, images.with_name(f"{images.name}-{task}"), folder


def train_all(own, given, dist, in_folder, out_folder, folder):
    """Each training unless it is done: the VAE of inputs, the VAE of targets, the transformer."""
    if given.resume and not any((path / "ckpt.pt").exists() for path in (in_folder, out_folder, folder)):
        raise BadInput(f"--resume: there is no run in {in_folder}, {out_folder} or {folder}; leave it out")
    if given.steps is None and (given.overwrite or runs.read_checkpoint(folder) is None):
        device = runs.pick_device(given.device)
        given.steps = CPU_STEPS.get(own.task) if device.type == "cpu" else None
    in_args = resolve(given, in_folder, folder, {})
    args = in_args
    if own.task in MAPS:
        args = resolve(runs.on_pixels(given, out_folder), out_folder, folder,
                       dict(channels=MAPS[own.task]))
    elif own.task == "pairs":
        args = resolve(given, out_folder, folder, {})
    runs.refuse(args, dist)
    if in_args.stage1_done and not runs.stages_to_train(args, out_folder, folder):
        return
    inputs, targets = zip(*(load_pairs(own.task, args, split) for split in ("train", "val")))
    for path in (out_folder, folder):
        runs.refuse_other_data(args, path, targets[0])
    if args is not in_args:
        runs.refuse_other_data(in_args, in_folder, inputs[0])
    if args is not in_args and not in_args.stage1_done:
        runs.suit(in_args, inputs[0])
        train.train_tokenizer(in_args, dist, in_folder, *inputs)
    if not args.stage1_done:
        if own.task not in MAPS:
            runs.suit(args, targets[0])
        train_target_tokenizer(own, args, dist, out_folder, *targets)
    if not args.stage2_done:
        train_generator(own, args, dist, in_folder, out_folder, folder, inputs, targets)


def resolve(given, tok_folder, folder, tok_options):
    """runs.resolve for one of the two tokenizers; tok_options: what it has that train.py's has not."""
    begun = any((path / "ckpt.pt").exists() for path in (tok_folder, folder))
    changed = dict(tok_options=tok_options, resume=given.resume and begun)
    return runs.resolve(argparse.Namespace(**vars(given) | changed), tok_folder, folder)


def train_target_tokenizer(own, args, dist, folder, train_set, val_set):
    """Stage 1 of the targets: a VAE with their channels, which need not be three."""
    torch.manual_seed(args.seed)
    tokenizer = runs.build_tokenizer(args)
    if not args.resume1:
        train.start_path(tokenizer, args, train_set)

    def finish(model):
        arrays = tokens.encode_some(model, train_set, train.MEASURED)
        model.measure(arrays["mean"], arrays["std"])
        if dist.rank == 0:
            torch.manual_seed(args.seed)
            x, _ = val_set.batch(torch.linspace(0, len(val_set) - 1, 12, device="cpu").long())
            recon = model.decode(model.encode(x))
            rows = [("validation", visible(x, own.task)), ("reconstructed", visible(recon, own.task))]
            pictures.attempt(pictures.save_rows, folder / "reconstructions.png", rows, folder.name)

    extra = dict(classes=train_set.classes, fingerprint=runs.fingerprint(train_set), task=own.task)
    train.fit(1, tokenizer, train_set, val_set, args, dist, folder, finish, extra)


def train_generator(own, args, dist, in_folder, out_folder, folder, inputs, targets):
    """Stage 2: the tokens of the targets, given those of their inputs."""
    source = runs.load_run(in_folder, args.device)
    tokenizer = runs.load_run(out_folder, args.device).tokenizer
    runs.refuse_other_tokenizer(args, folder, tokenizer)
    pairs = []
    for split, input_set, target_set in zip(("train", "val"), inputs, targets):
        of_targets = tokens.cached(tokenizer, target_set, out_folder / f"tokens-{split}.pt", dist)
        path = in_folder / f"tokens-{split}-{own.task}.pt"
        pairs.append(Pairs(of_targets, tokens.cached(source.tokenizer, input_set, path, dist)))
    classes = targets[0].classes
    args.options = prefix_of(source.tokenizer)
    if args.label_drop is None:                             # of one class, too: there is an input to hide
        args.label_drop = runs.LABEL_DROP
    torch.manual_seed(args.seed)
    generator = runs.build_generator(args, tokenizer, len(classes))

    def finish(model):
        if dist.rank == 0:
            run = SimpleNamespace(folder=folder, args=args, tokenizer=tokenizer, generator=model,
                                  classes=classes, device=args.device, source=source.tokenizer,
                                  task=own.task)
            pictures.attempt(save_pairs, folder / "samples.png", run, own.pictures, args.seed)

    extra = dict(classes=classes, fingerprint=runs.fingerprint(targets[0]), task=own.task,
                 tokenizer=on_cpu(tokenizer), grid=list(tokenizer.grid), source=on_cpu(source.tokenizer),
                 source_flags=saved_flags(source.args))
    train.fit(2, generator, *pairs, args, dist, folder, finish, extra)


def prefix_of(source):
    """The transformer's option that makes the tokens of an image, of the VAE `source`, its prefix."""
    return dict(prefix=(source.seq_len, source.token_dim))


def saved_flags(args):
    return {name: value for name, value in vars(args).items() if name != "device"}


class Pairs:
    """Targets and the inputs they belong to, both as tokens: the input is the condition."""

    def __init__(self, targets, inputs):
        self.targets = targets
        self.inputs = inputs

    def __len__(self):
        return len(self.targets)

    def batch(self, index, share=slice(None)):
        """index (B,) -> tokens of the targets (B, T, D), of their inputs (B, P, E), of a share."""
        target = self.targets.batch(index, share)[0]
        return target, self.inputs.batch(index, share)[0]


def on_cpu(model):
    return {name: value.cpu() for name, value in model.state_dict().items()}


def load(folder, device="cpu"):
    """A run folder of this recipe -> what runs.load_run gives, .task, and .source, the tokenizer of inputs.

    source and generator are None of a stage 1 run. Runs of the first edition's train.py --task load too.
    """
    folder = Path(folder)
    device = torch.device(device)
    checkpoint = runs.read_checkpoint(folder)
    task = checkpoint and (checkpoint.get("task") or checkpoint["flags"].get("task"))
    if task not in ("pairs", *MADE, *MAPS):
        raise BadInput(f"{folder}: no run of python -m recipes.pairs")
    if not checkpoint["done"]:
        raise BadInput(f"{folder}: this run stopped at step {checkpoint['step']}; finish it with --resume")
    default = runs.DEFAULTS["any"]
    channels = dict(tok_options=dict(channels=MAPS.get(task, 3)))
    args = argparse.Namespace(**default | checkpoint["flags"] | channels, device=device)
    tokenizer = runs.build_tokenizer(args)
    generator, source = None, None
    if checkpoint["stage"] == 1:
        tokenizer.load_state_dict(runs.averaged(checkpoint))
    else:                                                   # a stage 2 checkpoint is complete in itself
        tokenizer.load_state_dict(checkpoint["tokenizer"])
        source = runs.build_tokenizer(argparse.Namespace(**default | checkpoint["source_flags"]))
        source.load_state_dict(checkpoint["source"])
        source = source.to(device).eval()
        args.options = prefix_of(source)
        generator = runs.build_generator(args, tokenizer, len(checkpoint["classes"]))
        generator.load_state_dict(runs.averaged(checkpoint))
        generator = generator.to(device).eval()
    return SimpleNamespace(folder=folder, args=args, tokenizer=tokenizer.to(device).eval(), source=source,
                           generator=generator, classes=checkpoint["classes"], device=device, task=task)


# ---- Draw ----------------------------------------------------------------------------------------

@torch.no_grad()
def image_tokens(run, images):
    """inputs (N, 3, H, W) -> mean tokens (N, P, E) of the run's VAE of inputs: the prefix of the targets."""
    parts = [run.source.posterior(x.to(run.device))[0] for x in images.split(250)]
    return run.source.normalise(torch.cat(parts))


def draw_targets(run, cond, **options):
    """The input tokens cond (N, P, E) -> a sampled target of each (N, C, H, W)."""
    return drawing.draw_samples(run, cond, **DEFAULT | options)


def predict(run, cond, **options):
    """The input tokens cond (N, P, E) -> targets (N, C, H, W), each the mean of VOTES sampled ones."""
    predicted = []
    for part in cond.split(max(1, 1000 // VOTES)):
        votes = draw_targets(run, part.repeat_interleave(VOTES, 0), **options)
        predicted.append(votes.unflatten(0, (len(part), VOTES)).mean(1))
    return torch.cat(predicted)


def visible(targets, task):
    """Targets (N, C, H, W) -> pictures (N, 3, H, W)."""
    return pictures.colour_maps(targets) if task == "segment" else targets


def save_pairs(path, run, n=10, seed=0, **options):
    """Picture of n validation pairs: input, a sample, mean of VOTES, target, and where 16 samples differ."""
    inputs, truth = load_pairs(run.task, run.args, "val")
    index = torch.linspace(0, len(inputs) - 1, min(n, len(inputs)), device="cpu").long()
    x = inputs.batch(index)[0].cpu()
    cond = image_tokens(run, x)
    many = draw_targets(run, cond.repeat_interleave(16, 0), cfg=1.0, temperature=1.0, seed=seed)
    many = many.clamp(-1, 1).unflatten(0, (len(index), 16))
    spread = many.std(1).mean(1, keepdim=True).expand(-1, 3, -1, -1)                  # (n, 3, H, W) >= 0
    predicted = predict(run, cond, seed=seed, **options)
    rows = [("input", x), ("drawn", visible(many[:, 0], run.task)),
            (f"mean of {VOTES}", visible(predicted, run.task)),
            ("target", visible(truth.batch(index)[0].cpu(), run.task)),
            ("spread of 16", 2 * spread / spread.max().clamp(min=1e-3) - 1)]
    pictures.save_rows(path, rows, f"{run.folder.name}: validation pairs")


# ---- Measure -------------------------------------------------------------------------------------

@torch.no_grad()
def measure_pairs(run, n=1000, batch_size=250, seed=0, **options):
    """Targets drawn for n validation inputs against the true ones -> rows (key, name, number, unit, remark).

    Label maps: mean IoU over the ground and the ten classes, intersection over union of all pixels of the
    set, as PASCAL VOC counts it. Distances: RMSE in half image widths. Pictures: the mean of their PSNR. "The
    input hidden" asks the same model without it.
    """
    inputs, truth = load_pairs(run.task, run.args, "val")
    order = torch.Generator().manual_seed(seed)
    index = torch.randperm(len(truth), generator=order, device="cpu")[:n]
    parts = index.split(batch_size)
    given = torch.cat([inputs.batch(i)[0].cpu() for i in parts])
    cond = image_tokens(run, given)
    true = torch.cat([truth.batch(i)[0].cpu() for i in parts])
    codec = run.tokenizer
    copy = torch.cat([codec.decode(codec.normalise(codec.posterior(x.to(run.device))[0])).cpu()
                      for x in true.split(batch_size)])
    options = dict(seed=seed, batch_size=batch_size) | options
    start = time.perf_counter()
    drawn = predict(run, cond, **options)
    seconds = (time.perf_counter() - start) / len(index)
    one = draw_targets(run, cond, **options)
    hidden = predict(run, cond, **options | dict(cfg=0.0, beam=1))
    arms = [("", f"mean of {VOTES} samples", drawn),
            ("_one_sample", "one sample each", one),
            ("_from_nothing", "the input hidden", hidden),
            ("_tokenizer", "true targets, encoded and decoded", copy)]
    rows = []
    if run.task == "segment":
        ground = torch.eye(true.shape[1], device="cpu")[0].view(1, -1, 1, 1).expand_as(true)
        for key, text, x in [*arms, ("_ground", "ground everywhere", ground)]:
            iou = mean_iou(x.argmax(1), true.argmax(1), true.shape[1])
            rows.append((f"miou{key}", f"mean IoU, {text}", iou, "", "higher is better"))
        right = (drawn.argmax(1) == true.argmax(1)).float().mean().item()
        rows.append(("pixel_accuracy", "pixels right", 100 * right, "%", "higher is better"))
    elif run.task == "depth":
        for key, text, x in [*arms, ("_mean_map", "the mean map everywhere", true.mean(0, keepdim=True))]:
            rmse = (x - true)[:, 0].square().mean().sqrt().item()
            rows.append((f"rmse{key}", f"RMSE, {text}", rmse, "half widths", "lower is better"))
    else:
        for key, text, x in [*arms, ("_input", "the input as it is", given)]:
            db = psnr(x, true).mean().item()
            rows.append((f"psnr{key}", f"PSNR, {text}", db, "dB", "higher is better"))
    return rows + [("seconds_per_map", "seconds per target", seconds, "s", f"{VOTES} samples each")]


def draw_and_measure(own, run):
    """samples.png, metrics.json and the table of a trained run."""
    names = ("cfg", "temperature", "beam", "top_p", "clip", "guidance", "diffusion_steps", "sampler")
    options = {name: getattr(own, name) for name in names if getattr(own, name) is not None}
    known = drawing.keywords_of(run)
    for name in options:
        if name not in known:
            raise BadInput(f"--{name}: not for --head {run.args.head}")
    options["batch_size"] = own.at_once
    save_pairs(run.folder / "samples.png", run, own.pictures, run.args.seed, **options)
    rows = measure_pairs(run, own.n, **options)
    metrics = {key: value for key, _, value, _, _ in rows} | dict(n=own.n, **DEFAULT | options) | age.now()
    (run.folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    for _, name, value, unit, remark in rows:
        print(f"{name:44} {value:8.3f}  {unit:12} {remark}")
    print(f"wrote {run.folder / 'samples.png'}, {run.folder / 'metrics.json'}")


if __name__ == "__main__":
    main()
