"""
Maps of images: an image in, its label map or its depth map out, by the models that draw images.

GIVT does dense prediction as it draws (section 4.3 of arxiv.org/abs/2312.02116, after UViM,
arxiv.org/abs/2205.10337). The map has a VAE of its own, whose tokens are the target. The tokens of the image
stand in front of them, where otherwise the class is:

    image --VAE--> tokens (N, P, E) --prefix--> ARTransformer --p(token)--> tokens (N, T, D) --VAE--> map

A map that is drawn is one guess. The mean of 8 guesses is what most of them say, and the spread of 16 says
where the model is not sure. Images and maps are those of the drawn world: "segment", one channel for the
ground and one for each of the ten classes, or "depth", the signed distance to the outline in half image
widths, cut off at -1 and 1.

    python -m recipes.maps --task segment              # trains, draws, measures; 11 min on 2 CPU cores
    python -m recipes.maps --task depth --size tiny
    python -m recipes.maps --task segment --beam 4     # when it is trained: picture and table again

Every flag of train.py for a VAE and an autoregressive generator goes with it: --size, --head diffusion,
--resume and so on.

Shapes:  N images, P E of their tokens, T D of the tokens of a map, C channels of a map, H W pixels

Try it yourself:
  1. Measure with --temperature 0.3 and 1.2. Which row gains from it, one sample or the mean of 8?
  2. "The image hidden" lies above "ground everywhere". Where does a model that sees no image get that from?
  3. Train with --head diffusion. Is the spread of 16 samples still at the outlines?
"""
import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import data
import sample
import train
from common import drawing, pictures, runs, tokens
from common.metrics import mean_iou
from data import BadInput

CHANNELS = dict(segment=1 + len(data.SHAPES), depth=3)
CPU_STEPS = dict(segment=2000)                              # of stage 2 on a CPU; else as train.py
DEFAULT = dict(cfg=1.0, temperature=0.9)                    # the image says all, so guidance gains nothing
VOTES = 8                                                   # samples whose mean is the prediction


def parse_args(argv=None):
    """-> the flags of this recipe, those of train.py."""
    p = argparse.ArgumentParser(allow_abbrev=False, description="Train, draw and measure maps of images. "
                                                                "All flags of train.py go with it.")
    p.add_argument("--task", choices=list(CHANNELS), required=True,
                   help="label maps, or distances to the outline")
    p.add_argument("--n", type=int, default=1000, help="validation images that are measured")
    p.add_argument("--pictures", type=int, default=10, help="validation images in samples.png")
    p.add_argument("--cfg", type=float, help="guidance towards the image; 1 is off (default: 1)")
    p.add_argument("--temperature", type=float, help="below 1: closer to the mode (default: 0.9)")
    p.add_argument("--at_once", type=int, default=250, help="maps at a time; lower it when memory runs out")
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
    (lambda own, given: given.tokenizer != "vae", "--tokenizer: maps are tokens of a VAE; leave it out"),
    (lambda own, given: given.generator != "ar", "--generator: only ar takes an image as its prefix"),
    (lambda own, given: given.data not in (None, "shapes"),
     "--data: only the drawn world (--data shapes) comes with such maps"),
    (lambda own, given: given.flip, "--flip: an image and its map would be mirrored apart; leave it out"),
    (lambda own, given: given.condition == "text", "--condition: the image is the condition; leave it out"),
    (lambda own, given: given.frames not in (None, 1), "--frames: maps are of images; leave it out"),
    (lambda own, given: given.gan or given.perceptual,
     "--gan, --perceptual: their losses mean nothing on maps; leave them out"),
    (lambda own, given: min(own.n, own.pictures, own.at_once, 1 if own.beam is None else own.beam) < 1,
     "--n, --pictures, --at_once, --beam: must be at least 1"),
    (lambda own, given: own.n < 10, "--n: at least 10 maps are needed for a number"),
]


# ---- The program ---------------------------------------------------------------------------------

def main(argv=None):
    own, given = parse_args(argv)
    dist = runs.join_processes(given)
    try:
        tok_folder, folder = runs.folders(given)
        map_folder = tok_folder.with_name(f"{tok_folder.name}-{own.task}")
        if not given.name:                                  # the task behind the tokenizer, as ever
            folder = folder.with_name(f"shapes-vae-{own.task}" + folder.name.removeprefix("shapes-vae"))
        train_all(own, given, dist, tok_folder, map_folder, folder)
    finally:
        runs.leave_processes(dist)
    if dist.rank == 0:
        draw_and_measure(own, load(folder, runs.pick_device(given.device)))


def train_all(own, given, dist, tok_folder, map_folder, folder):
    """Three trainings, each unless it is done: the VAE of images, the VAE of maps, the transformer."""
    if given.resume and not any((path / "ckpt.pt").exists() for path in (tok_folder, map_folder, folder)):
        raise BadInput(f"--resume: there is no run in {tok_folder}, {map_folder} or {folder}; leave it out")
    if given.steps is None and (given.overwrite or runs.read_checkpoint(folder) is None):
        device = runs.pick_device(given.device)
        given.steps = CPU_STEPS.get(own.task) if device.type == "cpu" else None
    image_args = resolve(given, tok_folder, folder, {})
    args = resolve(runs.on_pixels(given, map_folder), map_folder, folder, dict(channels=CHANNELS[own.task]))
    runs.refuse(args, dist)
    if image_args.stage1_done and not runs.stages_to_train(args, map_folder, folder):
        return
    images = load_sets(args, "class")
    maps = load_sets(args, own.task)
    runs.refuse_other_data(image_args, tok_folder, images[0])
    for path in (map_folder, folder):
        runs.refuse_other_data(args, path, maps[0])
    if not image_args.stage1_done:
        runs.suit(image_args, images[0])
        train.train_tokenizer(image_args, dist, tok_folder, *images)
    if not args.stage1_done:
        train_map_tokenizer(own, args, dist, map_folder, *maps)
    if not args.stage2_done:
        train_generator(own, args, dist, tok_folder, map_folder, folder, images, maps)


def resolve(given, tok_folder, folder, tok_options):
    """runs.resolve for one of the two tokenizers; tok_options: what it has that train.py's has not."""
    begun = any((path / "ckpt.pt").exists() for path in (tok_folder, folder))
    changed = dict(tok_options=tok_options, resume=given.resume and begun)
    return runs.resolve(argparse.Namespace(**vars(given) | changed), tok_folder, folder)


def load_sets(args, task):
    """Training and validation images, or their maps in the same order -> two ImageSets."""
    sets = []
    for split, n in (("train", args.n_shapes), ("val", None)):
        image_set = data.load("shapes", args.image_size, split, args.device, args.seed, n_shapes=n, task=task)
        sets.append(image_set)
    return sets


def train_map_tokenizer(own, args, dist, folder, train_set, val_set):
    """Stage 1 of the maps: a VAE with their channels."""
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
            rows = [("validation maps", visible(x, own.task)), ("reconstructed", visible(recon, own.task))]
            pictures.attempt(pictures.save_rows, folder / "reconstructions.png", rows, folder.name)

    extra = dict(classes=train_set.classes, fingerprint=runs.fingerprint(train_set), task=own.task)
    train.fit(1, tokenizer, train_set, val_set, args, dist, folder, finish, extra)


def train_generator(own, args, dist, tok_folder, map_folder, folder, images, maps):
    """Stage 2: the tokens of the maps, given those of their images."""
    source = runs.load_run(tok_folder, args.device)
    tokenizer = load(map_folder, args.device).tokenizer
    runs.refuse_other_tokenizer(args, folder, tokenizer)
    pairs = []
    for split, image_set, map_set in zip(("train", "val"), images, maps):
        name = f"tokens-{split}.pt"
        of_maps = tokens.cached(tokenizer, map_set, map_folder / name, dist)
        of_images = tokens.cached(source.tokenizer, image_set, tok_folder / name, dist)
        pairs.append(Pairs(of_maps, of_images))
    classes = images[0].classes
    args.options = prefix_of(source.tokenizer)
    torch.manual_seed(args.seed)
    generator = runs.build_generator(args, tokenizer, len(classes))

    def finish(model):
        if dist.rank == 0:
            run = SimpleNamespace(folder=folder, args=args, tokenizer=tokenizer, generator=model,
                                  classes=classes, device=args.device, source=source.tokenizer,
                                  task=own.task)
            pictures.attempt(save_maps, folder / "samples.png", run, own.pictures, args.seed)

    extra = dict(classes=classes, fingerprint=runs.fingerprint(maps[0]), task=own.task,
                 tokenizer=on_cpu(tokenizer), grid=list(tokenizer.grid), source=on_cpu(source.tokenizer),
                 source_flags=saved_flags(source.args))
    train.fit(2, generator, *pairs, args, dist, folder, finish, extra)


def prefix_of(source):
    """The transformer's option that makes the tokens of an image, of the VAE `source`, its prefix."""
    return dict(prefix=(source.seq_len, source.token_dim))


def saved_flags(args):
    return {name: value for name, value in vars(args).items() if name != "device"}


class Pairs:
    """Maps and the images they belong to, both as tokens: the image is the condition."""

    def __init__(self, maps, images):
        self.maps = maps
        self.images = images

    def __len__(self):
        return len(self.maps)

    def batch(self, index, share=slice(None)):
        """index (B,) -> tokens of the maps (B, T, D), of their images (B, P, E), of a share."""
        target = self.maps.batch(index, share)[0]
        return target, self.images.batch(index, share)[0]


def on_cpu(model):
    return {name: value.cpu() for name, value in model.state_dict().items()}


def load(folder, device="cpu"):
    """A run folder of this recipe -> what runs.load_run gives, .task, and .source, the tokenizer of images.

    source and generator are None of a stage 1 run. Runs of the first edition's train.py --task load too.
    """
    folder = Path(folder)
    device = torch.device(device)
    checkpoint = runs.read_checkpoint(folder)
    task = checkpoint and (checkpoint.get("task") or checkpoint["flags"].get("task"))
    if task not in CHANNELS:
        raise BadInput(f"{folder}: no run of python -m recipes.maps")
    if not checkpoint["done"]:
        raise BadInput(f"{folder}: this run stopped at step {checkpoint['step']}; finish it with --resume")
    default = runs.DEFAULTS["any"]
    channels = dict(tok_options=dict(channels=CHANNELS[task]))
    args = argparse.Namespace(**default | checkpoint["flags"] | channels)
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
    """images (N, 3, H, W) -> mean tokens (N, P, E) of the run's image tokenizer: the prefix of its maps."""
    parts = [run.source.posterior(x.to(run.device))[0] for x in images.split(250)]
    return run.source.normalise(torch.cat(parts))


def draw_maps(run, cond, **options):
    """The image tokens cond (N, P, E) -> a sampled map of each (N, C, H, W)."""
    return drawing.draw_samples(run, cond, **DEFAULT | options)


def predict_maps(run, cond, **options):
    """The image tokens cond (N, P, E) -> maps (N, C, H, W), each the mean of VOTES sampled ones."""
    predicted = []
    for part in cond.split(max(1, 1000 // VOTES)):
        votes = draw_maps(run, part.repeat_interleave(VOTES, 0), **options)
        predicted.append(votes.unflatten(0, (len(part), VOTES)).mean(1))
    return torch.cat(predicted)


def visible(maps, task):
    """Maps (N, C, H, W) -> pictures (N, 3, H, W)."""
    return pictures.colour_maps(maps) if task == "segment" else maps


def save_maps(path, run, n=10, seed=0, **options):
    """Picture of n validation images: image, truth, prediction, one sample, and where 16 samples disagree."""
    images, truth = (validation_set(run, task) for task in ("class", run.task))
    index = torch.linspace(0, len(images) - 1, n, device="cpu").long()
    x = images.batch(index)[0].cpu()
    cond = image_tokens(run, x)
    many = draw_maps(run, cond.repeat_interleave(16, 0), cfg=1.0, temperature=1.0, seed=seed)
    many = many.clamp(-1, 1).unflatten(0, (n, 16))
    spread = many.std(1).mean(1, keepdim=True).expand(-1, 3, -1, -1)                  # (n, 3, H, W) >= 0
    predicted = predict_maps(run, cond, seed=seed, **options)
    rows = [("image", x), ("true map", visible(truth.batch(index)[0].cpu(), run.task)),
            ("prediction", visible(predicted, run.task)), ("one sample", visible(many[:, 0], run.task)),
            ("spread of 16", 2 * spread / spread.max().clamp(min=1e-3) - 1)]
    pictures.save_rows(path, rows, f"{run.folder.name}: validation images")


def validation_set(run, task):
    return data.load("shapes", run.args.image_size, "val", run.device, run.args.seed, task=task)


# ---- Measure -------------------------------------------------------------------------------------

@torch.no_grad()
def measure_maps(run, n=1000, seed=0, batch_size=250, **options):
    """Maps drawn for n validation images against the true ones -> rows (key, name, number, unit, remark).

    Mean IoU: over the ground and the ten classes, intersection over union of all pixels of the set, as PASCAL
    VOC counts it. RMSE of distances in half image widths. "The image hidden" asks the same model without it.
    """
    images, truth = (validation_set(run, task) for task in ("class", run.task))
    order = torch.Generator().manual_seed(seed)
    index = torch.randperm(len(truth), generator=order, device="cpu")[:n]
    parts = index.split(batch_size)
    cond = torch.cat([image_tokens(run, images.batch(i)[0]) for i in parts])
    true = torch.cat([truth.batch(i)[0].cpu() for i in parts])
    codec = run.tokenizer
    copy = torch.cat([codec.decode(codec.normalise(codec.posterior(x.to(run.device))[0])).cpu()
                      for x in true.split(batch_size)])
    options = dict(seed=seed, batch_size=batch_size) | options
    start = time.perf_counter()
    drawn = predict_maps(run, cond, **options)
    seconds = (time.perf_counter() - start) / len(index)
    one = draw_maps(run, cond, **options)
    hidden = predict_maps(run, cond, **options | dict(cfg=0.0, beam=1))
    arms = [("", "maps of images", drawn),
            ("_one_sample", "one sample each", one),
            ("_from_nothing", "the image hidden", hidden),
            ("_tokenizer", "true maps, encoded and decoded", copy)]
    rows = []
    if run.task == "segment":
        ground = torch.eye(true.shape[1], device="cpu")[0].view(1, -1, 1, 1).expand_as(true)
        arms.insert(2, ("_ground", "ground everywhere", ground))
        for key, text, x in arms:
            iou = mean_iou(x.argmax(1), true.argmax(1), true.shape[1])
            rows.append((f"miou{key}", f"mean IoU, {text}", iou, "", "higher is better"))
        right = (drawn.argmax(1) == true.argmax(1)).float().mean().item()
        rows.append(("pixel_accuracy", "pixels right", 100 * right, "%", "higher is better"))
    else:
        arms.insert(2, ("_mean_map", "the mean map everywhere", true.mean(0, keepdim=True).expand_as(true)))
        for key, text, x in arms:
            rmse = (x - true)[:, 0].square().mean().sqrt().item()
            rows.append((f"rmse{key}", f"RMSE, {text}", rmse, "half widths", "lower is better"))
    return rows + [("seconds_per_map", "seconds per map", seconds, "s", f"{VOTES} samples each")]


def draw_and_measure(own, run):
    """samples.png, metrics.json and the table of a trained run."""
    names = ("cfg", "temperature", "beam", "top_p", "clip", "guidance", "diffusion_steps", "sampler")
    options = {name: getattr(own, name) for name in names if getattr(own, name) is not None}
    known = sample.keywords_of(run)
    for name in options:
        if name not in known:
            raise BadInput(f"--{name}: not for --head {run.args.head}")
    save_maps(run.folder / "samples.png", run, own.pictures, run.args.seed, batch_size=own.at_once, **options)
    rows = measure_maps(run, own.n, 0, own.at_once, **options)
    metrics = {key: value for key, _, value, _, _ in rows} | dict(n=own.n, **DEFAULT | options)
    (run.folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    for _, name, value, unit, remark in rows:
        print(f"{name:44} {value:8.3f}  {unit:12} {remark}")
    print(f"wrote {run.folder / 'samples.png'}, {run.folder / 'metrics.json'}")


if __name__ == "__main__":
    main()
