"""
Measure a trained run: how good are its reconstructions, its likelihood and its samples?

Papers report FID: the distance between two clouds of Inception-v3 features, of real and of generated
images. Inception is a large download and knows little about 32-pixel shapes. So the features here are those
of a small CNN that classifies the REAL training images; it is trained once per data set
(common/classifier.py). The formula is the same, with one Gaussian (mean mu, covariance C) for each cloud
(common/metrics.py):

    d^2 = |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))        (Heusel et al. 2017, 1706.08500)

It is printed as "Frechet distance (small CNN)", never as FID: compare it between runs on the same data, and
with the floor printed below it (real training images), but not with any paper.

    python evaluate.py runs/shapes-vae-ar-gmm         # a table, metrics.json and nearest.png
    python evaluate.py runs/shapes-vae-ar-gmm --fid   # the real FID too; needs `pip install clean-fid`
    torchrun --standalone --nproc_per_node=2 -- evaluate.py ...       # processes share the drawing

A run on clips has two classifiers: ClipCNN, which tells what happens in a clip, and SmallCNN for its
frames. Captions of the drawn world are judged by a rule that reads pictures, metrics.read_scene. Where the
data have one class, the numbers that need classes are left out. What each layer knows about the class:
recipes/probe.py.

Try it yourself:
  1. Sample with --cfg 1, 2 and 4. Class accuracy and precision rise. Which number says what was lost?
  2. Halve --n. Which metrics stay, which get worse although the model is the same, and why?
  3. Give frechet_distance the features of blurred validation images. Does their class accuracy notice?
"""
import argparse
import math
import platform
import time

from common import memory, waiting

waiting.gently()                                            # before torch is imported
memory.keep()
import torch

from common import age, captions, clips, compiling, drawing, metrics, pictures, runs, yardsticks
from common.classifier import classifier_for, look, look_at_real
from common.metrics import frechet_distance, precision_recall, psnr, ssim
from data import BadInput

NEED_CLASSES = {"recon_accuracy", "classifier_accuracy", "sample_accuracy", "prediction_accuracy",
                "prediction_accuracy_still"}
OF_RECIPES = ("probe_", "bound_")                           # entries of metrics.json that recipes write


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Measure a trained run: reconstructions, likelihood and samples.")
    p.add_argument("run", help="a run folder that train.py wrote")
    p.add_argument("--n", type=int, default=1000,
                   help="number of samples, of all classes alike; captions of the drawn world: at most 200")
    p.add_argument("--cfg", type=float, help="guidance of the samples, 1 is none (default: of sample.py)")
    p.add_argument("--temperature", type=float,
                   help="temperature of the samples (default: that of sample.py)")
    p.add_argument("--steps", type=int,
                   help="maskgit, mar: passes in which samples are drawn (default: that of sample.py)")
    p.add_argument("--batch_size", type=int, default=250,
                   help="images at a time; lower it when memory runs out")
    p.add_argument("--device", help="cpu, cuda, cuda:1 or mps (default: the best there is)")
    p.add_argument("--compile", action="store_true",
                   help="torch.compile what drawing repeats; it pays for thousands of samples (default: not)")
    p.add_argument("--seed", type=int, default=0, help="seed of the samples and of the choice of real images")
    p.add_argument("--fid", action="store_true",
                   help="the FID with Inception too; needs `pip install clean-fid`")
    return p.parse_args(argv)


# ---- The program ---------------------------------------------------------------------------------

def main(argv=None):
    args = parse_args(argv)
    with drawing.processes() as share:                      # (rank, size): what torchrun started
        run = runs.load_run(args.run, runs.pick_device(args.device))
        run.share = share
        if args.compile and run.generator is not None:
            compiling.for_drawing(run)
        rows = measure(args, run)
        if share[0] == 0:
            metrics.print_rows(rows)
            metrics.save_rows(run.folder, rows, lambda key: key.startswith(OF_RECIPES), **settings(args, run))


def measure(args, run):
    """All that applies to this run -> rows (key in metrics.json, name, number, unit, remark)."""
    train_set = runs.open_split(run.args, "train", run.device)
    val_set = runs.open_split(run.args, "val", run.device)
    refuse(args, run, val_set)
    kind = drawing.kind_of(run)
    if kind == "captions" and run.args.data == "shapes":
        args.n = min(args.n, 200)                           # metrics.json tells it too
        rows = metrics.measure_captions(run, args.n, batch_size=args.batch_size, seed=args.seed,
                                        **given(args))
    elif kind == "clips":
        rows = measure_clips(args, run, train_set, val_set)
    else:
        rows = measure_images(args, run, train_set, val_set)
    return [row for row in rows if len(train_set.classes) > 1 or row[0] not in NEED_CLASSES]


def refuse(args, run, val_set):
    """BadInput in a sentence, before any work, for what cannot be measured."""
    least = 10 if drawing.kind_of(run) == "captions" else max(10, len(run.classes))
    if args.n < least:
        raise BadInput(f"--n {args.n}: at least {least}, with {len(run.classes)} classes")
    if args.batch_size < 1:
        raise BadInput(f"--batch_size {args.batch_size}: at least 1")
    for flag in ("cfg", "temperature", "steps", "fid"):
        value = getattr(args, flag)
        if value not in (None, False) and run.generator is None:
            raise BadInput(f"--{flag}: {args.run} is a tokenizer without a generator, so it has no samples")
        if value is not None and not 0 <= value < math.inf:
            raise BadInput(f"--{flag} {value}: must be 0 or more")
    if args.steps is not None:
        if run.args.generator == "ar" or "steps" not in drawing.keywords_of(run):
            raise BadInput(f"--steps: not for --generator {run.args.generator}; it is for maskgit and mar")
        T = run.generator.seq_len
        if not 1 <= args.steps <= T:
            raise BadInput(f"--steps {args.steps}: must be 1 to {T}, the tokens of an image")
    if len(val_set) < 10:
        raise BadInput(f"{args.run}: its --data has {len(val_set)} validation images, at least 10 are needed")
    if args.fid and val_set.frames > 1:
        raise BadInput("--fid: is of images; this run draws clips")
    if args.fid:
        metrics.import_clean_fid()


def given(args):
    """The flags that say how samples are drawn, those that were given -> keywords of draw_samples."""
    flags = dict(cfg=args.cfg, temperature=args.temperature, steps=args.steps)
    return {name: value for name, value in flags.items() if value is not None}


def settings(args, run):
    """What the numbers were measured with -> more entries of metrics.json."""
    machine = f"{platform.machine()} {platform.system()}, {torch.get_num_threads()} threads"
    if run.device.type == "cuda":
        machine = torch.cuda.get_device_name(run.device)
    used = {}
    if run.generator is not None:                           # the sampling defaults, or the flags
        used = drawing.default_of(run) | given(args)
    return dict(n=args.n, seed=args.seed) | used | dict(device=str(run.device), machine=machine) | age.now()


# ---- Runs on images ------------------------------------------------------------------------------

def measure_images(args, run, train_set, val_set):
    """Reconstructions, likelihood and samples of a run on images, by classes or by captions -> rows."""
    net, accuracy = classifier_for(run.args, run.folder, run.device, train_set, val_set)
    g = torch.Generator().manual_seed(args.seed)           # a folder comes sorted by class, so draw at random
    index = torch.randperm(len(val_set), generator=g, device="cpu")
    others = torch.randperm(len(train_set), generator=g, device="cpu")
    torch.manual_seed(args.seed)                            # whether or not the classifier had to be trained
    real, _ = look_at_real(net, val_set, index, args.batch_size)                      # (N, 128)
    floor, _ = look_at_real(net, train_set, others[:args.n], args.batch_size)
    rows, recon, first = measure_reconstruction(run.tokenizer, net, val_set, index, args.batch_size, args.n)
    rows.append(("classifier_accuracy", "class accuracy, real images", 100 * accuracy, "%",
                 "the classifier's limit"))
    truth = torch.cat([val_set.batch(part)[0].cpu() for part in index[:args.n].split(args.batch_size)])
    rows += yardsticks.of_tokenizer(run.tokenizer, train_set, truth)
    shown = dict(real=truth, reconstructions=first)
    if run.generator is not None:
        rows += measure_likelihood(run, val_set, index, args.batch_size, args.seed)
        cond, labels = asked_for(run, val_set, args.n)
        images = drawing.draw_samples(run, cond, batch_size=args.batch_size, seed=args.seed, **given(args))
        images = images.clamp(-1, 1)
        rows += measure_samples(images, labels, net, real, args.batch_size, floor)
        shown["samples"] = images
        rows += compare_with_training(run, images, truth, train_set, val_set)
    rows += yardsticks.seam_rows(run.tokenizer, **shown)
    rows += [("recon_frechet_small_cnn", "Frechet distance, reconstructions",
              frechet_distance(recon, real), "", "of the same images, so it may pass the floor"),
             ("floor_frechet_small_cnn", "Frechet distance, training images",
              frechet_distance(floor, real), "", f"the floor for {len(floor)} samples")]
    if args.fid:
        fid = metrics.clean_fid(metrics.import_clean_fid(), images, val_set, index, run.device)
        rows.append(("fid", "FID (clean-fid)", fid, "",
                     f"lower is better; papers use 50000, here {args.n} samples to {len(index)} real"))
    return rows


@torch.no_grad()
def measure_reconstruction(tokenizer, net, val_set, index, batch_size, keep=1):
    """Encode and decode the validation images at index (N,) -> rows, features of what comes out (N, 128), and
    the first `keep` of it (keep, 3, H, W), on the CPU.
    """
    per_batch = []
    kept = []
    used = torch.zeros(tokenizer.vocab_size or 0, dtype=torch.bool, device=val_set.device)
    scales = getattr(tokenizer, "scales", ())               # of VAR
    used_on = used.repeat(len(scales), 1)
    for i in index.split(batch_size):
        images, labels = val_set.batch(i)
        kl = torch.full((len(i),), math.nan, device=images.device)
        if hasattr(tokenizer, "posterior"):                 # a VAE: take its mean, for a sample adds noise
            mean, std = tokenizer.posterior(images)         # (B, T, D), raw latent units
            mean = mean.float()
            std = std.float()
            kl = (0.5 * (mean**2 + std**2 - 1) - std.log()).sum(-1).mean(1)           # (B,) nats per token
            tokens = tokenizer.normalise(mean)
        else:
            tokens = tokenizer.encode(images)
            used[tokens] = True
            start = 0
            for side, row in zip(scales, used_on):
                row[tokens[:, start:start + side * side]] = True
                start += side * side
        recon = tokenizer.decode(tokens).float().clamp(-1, 1)
        if len(kept) * batch_size < keep:
            kept.append(recon.cpu())
        features, predicted = look(net, recon)
        right = (predicted == labels).float()
        per_batch.append((features, psnr(images, recon), ssim(images, recon), right, kl))
    features, *columns = (torch.cat(column) for column in zip(*per_batch))
    db, similar, right, kl = (column.mean().item() for column in columns)
    rows = [("recon_psnr_db", "reconstruction PSNR", db, "dB", "higher is better"),
            ("recon_ssim", "reconstruction SSIM (luminance)", similar, "", "higher is better, 1 is a copy"),
            ("kl_nats_per_token", "KL of a token to the prior", kl, "nats",
             "what a token may carry, not a score"),
            ("recon_accuracy", "class accuracy, reconstructions", 100 * right, "%", "higher is better")]
    if len(used):
        rows.append(("codebook_usage", "codes that occur", 100 * used.float().mean().item(), "%",
                     f"of {len(used)}, in {len(index)} validation images"))
    for side, row in zip(scales, used_on):
        rows.append((f"codebook_usage_{side}x{side}", f"codes that occur at {side} x {side}",
                     100 * row.float().mean().item(), "%", "all scales share one codebook"))
    rows = [row for row in rows if math.isfinite(row[2])]   # no KL: not a VAE, or its std is 0
    return rows, features, torch.cat(kept)[:keep]


def compare_with_training(run, images, truth, train_set, val_set):
    """Are samples (N, 3, H, W) copies? -> rows, and nearest.png: samples above their nearest images."""
    train_set.flip = False                                  # as they are
    distances, positions = yardsticks.nearest(images, train_set)
    few = torch.linspace(0, len(images) - 1, min(len(images), 12), device="cpu").long()
    nearest = train_set.batch(positions[few])[0].cpu()
    path = run.folder / "nearest.png"
    if drawing.kind_of(run) == "captions":                  # of validation images: see asked_for
        asked = torch.linspace(0, len(val_set) - 1, len(images), device="cpu").long()[few]
        texts = captions.of_images(run.args, val_set, "val")
        near = captions.of_images(run.args, train_set, "train")
        unseen = [texts[i] for i in asked]
        rows = [("sample", images[few], unseen),
                ("nearest in training", nearest, [near[i] for i in positions[few]]),
                ("so it looks", val_set.batch(asked)[0].cpu(), [""] * len(unseen))]
        pictures.attempt(pictures.save_captioned, path, rows, f"{run.folder.name}: captions never seen")
    else:
        rows = [("samples", images[few]), ("nearest training images", nearest)]
        pictures.attempt(pictures.save_rows, path, rows, run.folder.name)
    return yardsticks.nearest_rows(distances, yardsticks.nearest(truth, train_set)[0])


@torch.no_grad()
def measure_likelihood(run, val_set, index, batch_size, seed):
    """Validation loss of the generator at index (N,), posterior samples and masks drawn from seed -> rows.

    Only an autoregressive model with a density or a softmax has a likelihood. The other losses say what
    they are.
    """
    cond = conditions(run, val_set)
    torch.manual_seed(seed)
    losses = []
    sizes = []
    for i in index.split(max(1, min(batch_size, len(index) // 20))):      # 20 batches or more, for an error
        images, _ = val_set.batch(i)
        x = run.tokenizer.encode(images)
        losses.append(run.generator(x, cond_at(cond, i).to(x.device))[0].item())
        sizes.append(len(i))
    x = torch.tensor(losses, dtype=torch.float64, device="cpu")
    w = torch.tensor(sizes, dtype=torch.float64, device="cpu")
    w = w / w.sum()
    mean = (w * x).sum().item()
    error = ((w * (x - mean)).square().sum() * len(x) / (len(x) - 1)).sqrt().item()   # of the mean
    if run.args.head == "diffusion" or run.args.generator not in ("ar", "var"):
        unit = "noise MSE" if run.args.head == "diffusion" else "nats/token"
        return [("val_loss", "validation loss", (mean, error), unit, "lower is better, not a likelihood")]
    rows = [("val_nll_nats_per_token", "validation NLL", (mean, error), "nats/token", "lower is better")]
    D = run.tokenizer.token_dim
    if D is None:
        return rows + [("val_perplexity", "perplexity", math.exp(mean), "tokens",
                        f"lower is better, {run.tokenizer.vocab_size} by chance")]
    if hasattr(run.tokenizer, "bits_per_dim"):              # of pixels
        bits = float(run.tokenizer.bits_per_dim(mean))
        return rows + [("val_bits_per_dim_uniform", "bits per dimension (pixel value)",
                        (bits, error / (D * math.log(2))), "bits",
                        "upper bound by uniform dequantisation; 8 by chance")]
    return rows + [("val_bits_per_dim", "the same per latent dimension", mean / (D * math.log(2)), "bits",
                    "lower is better, N(0, 1) gives 2.05")]


def conditions(run, image_set):
    """What a run is told of the validation images: labels (N,), or encoded captions (N, P[, E])."""
    if drawing.kind_of(run) != "captions":
        return image_set.labels
    return captions.encode(run.args, captions.of_images(run.args, image_set, "val"))


def cond_at(cond, index):
    """Conditions at index (B,) -> (B,) or (B, P[, E]); features are kept in half precision."""
    cond = cond[index.to(cond.device)]
    return cond.float() if cond.is_floating_point() else cond


def asked_for(run, val_set, n):
    """What n samples are drawn by -> cond (n,) or (n, P[, E]), and their classes (n,).

    All classes equally often, or the captions of validation images, which have their classes.
    """
    if drawing.kind_of(run) != "captions":
        labels = torch.arange(n, device="cpu") % len(run.classes)
        return labels, labels
    positions = torch.linspace(0, len(val_set) - 1, n, device="cpu").long()
    return cond_at(conditions(run, val_set), positions), val_set.labels.cpu()[positions]


def measure_samples(images, labels, net, real, batch_size, training=None):
    """Samples (N, 3, [F,] H, W), classes asked for (N,), both on the CPU, real features (M, 128) -> rows.

    training: features (K, 128) of training images. Their precision and recall, which are what samples can
    reach, stand in the remarks.
    """
    seen = [look(net, part.to(real.device)) for part in images.split(batch_size)]
    fake = torch.cat([features for features, _ in seen])
    predicted = torch.cat([classes for _, classes in seen])
    right = (predicted.cpu() == labels).float().mean().item()
    m = min(len(fake), len(real))                           # balls shrink as points grow more: equal numbers
    precision, recall = precision_recall(evenly(real, m), evenly(fake, m))
    looks_real, all_there = "higher: samples look real", "higher: all the variety is there"
    if training is not None:
        most = precision_recall(evenly(real, m), evenly(training, min(m, len(training))))
        looks_real += f"; training data have {100 * most[0]:.1f}"
        all_there += f"; training data have {100 * most[1]:.1f}"
    return [("sample_accuracy", "class accuracy, samples", 100 * right, "%", "higher is better"),
            ("sample_precision", "precision", 100 * precision, "%", looks_real),
            ("sample_recall", "recall", 100 * recall, "%", all_there),
            ("sample_frechet_small_cnn", "Frechet distance (small CNN)", frechet_distance(fake, real), "",
             f"lower is better, {len(fake)} samples to {len(real)} real")]


def evenly(features, m):
    """m rows of features (N, F), evenly spread, for they may lie by class -> (m, F)."""
    return features[torch.linspace(0, len(features) - 1, m, device=features.device).round().long()]


# ---- Runs on clips -------------------------------------------------------------------------------

def measure_clips(args, run, train_set, val_set):
    """Reconstructions, likelihood, samples and frame prediction of a run on clips -> rows."""
    net, accuracy = classifier_for(run.args, run.folder, run.device, train_set, val_set)
    frames = (clips.single_frames(run, train_set, "train"), clips.single_frames(run, val_set, "val"))
    frame_net, _ = classifier_for(run.args, run.folder, run.device, *frames)
    g = torch.Generator().manual_seed(args.seed)
    floor, _ = train_set.batch(torch.randperm(len(train_set), generator=g, device="cpu")[:args.n])
    real, labels = val_set.batch(torch.randperm(len(val_set), generator=g, device="cpu")[:args.n])
    torch.manual_seed(args.seed)
    at_once = max(1, args.batch_size // real.shape[2])

    def features(x):
        return torch.cat([look(net, part.to(run.device))[0] for part in x.split(at_once)])

    def frame_features(x):
        return clips.features_of_frames(frame_net, x, args.batch_size)

    of_real = features(real)
    of_training = features(floor)
    frames_of_real = frame_features(real)
    rows = clips.measure_clip_reconstruction(run.tokenizer, net, real, labels, at_once)
    rows.append(("classifier_accuracy", "action accuracy, real clips", 100 * accuracy, "%",
                 "the classifier's limit"))
    if run.generator is not None:
        index = torch.arange(len(val_set), device="cpu")
        rows += measure_likelihood(run, val_set, index, at_once, args.seed)
        asked, _ = asked_for(run, val_set, args.n)
        start = time.perf_counter()
        drawn = drawing.draw_samples(run, asked, batch_size=args.batch_size, seed=args.seed, **given(args))
        seconds = (time.perf_counter() - start) / args.n
        rows.append(("seconds_per_clip", "seconds per clip drawn", seconds, "s", "batched"))
        names = {"sample_accuracy": "action accuracy, samples", "sample_precision": "precision, clips",
                 "sample_recall": "recall, clips",
                 "sample_frechet_small_cnn": "Frechet distance over clips (small CNN)"}
        rows += [(key, names[key], *others)
                 for key, _, *others in measure_samples(drawn, asked, net, of_real, at_once, of_training)]
        rows.append(("sample_frechet_frames", "Frechet distance of frames (small CNN)",
                     frechet_distance(frame_features(drawn), frames_of_real), "", "lower is better"))
        rows += clips.measure_prediction(run, net, real, labels, temperature=args.temperature,
                                         batch_size=args.batch_size, seed=args.seed)
    return rows + [("floor_frechet_small_cnn", "Frechet distance over clips, training clips",
                    frechet_distance(of_training, of_real), "",
                    f"the floor for {len(floor)} samples"),
                   ("floor_frechet_frames", "Frechet distance of frames, training clips",
                    frechet_distance(frame_features(floor), frames_of_real), "", "its floor")]


if __name__ == "__main__":
    main()
