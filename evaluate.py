"""
Measure a trained run: how good are its reconstructions, its likelihood and its samples?

Papers report FID: the distance between two clouds of Inception-v3 features, of real and of generated images.
Inception is a large download and knows little about 32-pixel shapes, so this file trains its own ruler: a small
CNN that classifies the REAL training images, once per data set, kept in the folder cache beside RUN. Its 128
features replace Inception's. The formula is the same, with one Gaussian (mean mu, covariance C) for each cloud:

    d^2 = |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))        (Heusel et al. 2017, 1706.08500)

It is printed as "Frechet distance (small CNN)", never as FID: compare it between runs on the same data, and
with the floor printed below it (real training images), but not with any paper.

    python evaluate.py runs/shapes-vae-ar-gmm         # a table, and metrics.json in the run folder
    python evaluate.py runs/shapes-vae-ar-gmm --fid   # the real FID too; needs `pip install clean-fid`
    python evaluate.py runs/shapes-vae-ar-gmm --probe # what each layer knows about the class: probe.png, and nothing else

A run on clips (train.py --frames) gets two rulers: ClipCNN, which tells what happens in a clip, and SmallCNN for its frames.

The first run on a data set also trains the classifier: 40 s for the shapes on one core of an AMD EPYC.

Try it yourself:
  1. Sample with --cfg 1, 2 and 4. Class accuracy and precision rise; which number says what was lost?
  2. Halve --n. Which metrics stay, which get worse although the model is the same, and why?
  3. Give frechet_distance the features of blurred validation images. Does their class accuracy notice?
"""
import argparse
import hashlib
import inspect
import json
import math
import platform
import re
import tempfile
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import data
import lfq
import sample
import train
import vae
from perceptual_gan import as_frames


# ---------------------------------------------------------------------------------------------------
# Metrics on images: how close is b to a?

def psnr(a, b):
    """Peak signal-to-noise ratio in dB: images (B, 3, H, W) in [-1, 1] -> (B,), one per image.

    10 log10(peak^2 / MSE) with peak 2; at most 106 dB, so that an exact copy does not make a mean infinite.
    """
    mse = (a.float() - b.float()).square().mean((1, 2, 3))                         # (B,)
    return 10 * torch.log10(4 / mse.clamp(min=1e-10))


def ssim(a, b):
    """Structural similarity of the luminance (Wang et al. 2004): images (B, 3, H, W) in [-1, 1] -> (B,), at most 1.

    Their settings: 11 x 11 Gaussian window of sigma 1.5 (smaller where the image is), K1 = 0.01, K2 = 0.03, mean
    over the windows that lie inside the image. Their dynamic range L is 2 here.
    """
    return similarity(luminance(a), luminance(b))[0]


def ms_ssim(a, b):
    """SSIM over several scales (Wang, Simoncelli, Bovik 2003): images (B, 3, H, W) in [-1, 1] -> (B,), 0 to 1.

    prod_j (contrast and structure at scale j)^w_j, with the brightness too at the last; from scale to scale the image is
    halved by averaging 2 x 2 pixels. The five scales ask for 176 pixels, since the window has 11 at each; a smaller image
    has fewer, the w_j of which are scaled to the sum 1: 88 pixels four, 44 three, 22 two, less one, which is SSIM. Compare
    only values of as many scales. A negative mean, whose power would not be real, counts as 0.
    """
    weights = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]
    weights = weights[:max(1, min(5, (min(a.shape[-2:]) // 11).bit_length()))]
    a, b, product = luminance(a), luminance(b), 1.0
    for j, w in enumerate(weights):
        s, cs = similarity(a, b)
        product = product * (s if j == len(weights) - 1 else cs).clamp(min=0) ** (w / sum(weights))
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return product


def luminance(images):
    """images (B, 3, H, W) in [-1, 1] -> (B, 1, H, W) in [0, 2], as SSIM needs it: ITU-R BT.601."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)[:, None, None]
    return ((images.float() + 1) * weights).sum(1, keepdim=True)


def similarity(a, b):
    """SSIM, and its part of contrast and structure alone, of a, b (B, 1, H, W) in [0, 2] -> (B,), (B,)."""
    side = min(11, *a.shape[-2:])
    size = side - (side + 1) % 2                                                   # odd, to have a middle
    g = torch.exp(-(torch.arange(size, device=a.device) - size // 2).float().square() / (2 * 1.5**2))
    g = g / g.sum()

    def blur(x):                                                                   # the window is separable
        return F.conv2d(F.conv2d(x, g.view(1, 1, -1, 1)), g.view(1, 1, 1, -1))
    mu_a, mu_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mu_a**2, blur(b * b) - mu_b**2, blur(a * b) - mu_a * mu_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    cs = (2 * cov + c2) / (var_a + var_b + c2)
    s = cs * (2 * mu_a * mu_b + c1) / (mu_a**2 + mu_b**2 + c1)
    return s.mean((1, 2, 3)), cs.mean((1, 2, 3))


# ---------------------------------------------------------------------------------------------------
# Metrics on clouds of features: do two sets of images look alike as sets?

def frechet_distance(f1, f2):
    """d^2 of the top of this file, between Gaussians fitted to two clouds: f1 (N, F), f2 (M, F) -> float, >= 0.

    tr (C1 C2)^(1/2) sums the square roots of the eigenvalues of C1 C2, which are also those of the symmetric
    C1^(1/2) C2 C1^(1/2), so eigh is enough. Biased upwards by about 1/N: compare only values of equal N and M.
    """
    f1, f2 = f1.detach().cpu().double(), f2.detach().cpu().double()
    c1, c2 = f1.T.cov(), f2.T.cov()                                                # (F, F)
    values, vectors = torch.linalg.eigh(c1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                        # C1^(1/2)
    product = root @ c2 @ root
    trace_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    d = (f1.mean(0) - f2.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * trace_root
    return max(d.item(), 0.0)


def precision_recall(real, fake, k=3):
    """Precision and recall of Kynkaanniemi et al. 2019 (1904.06991): real (N, F), fake (M, F) -> floats in [0, 1].

    The manifold of a cloud is the union of balls around its points, each reaching to the k-th neighbour. Precision:
    how much of fake lies inside the manifold of real. Recall: how much of real inside the manifold of fake.
    """
    def inside(points, cloud):                                  # 1000 rows at a time: N x M may not fit into memory
        radius = torch.cat([torch.cdist(rows, cloud).kthvalue(k + 1).values        # k + 1, for the nearest is itself
                            for rows in cloud.split(1000)])
        hits = torch.cat([(torch.cdist(rows, cloud) <= radius).any(1) for rows in points.split(1000)])
        return hits.double().mean().item()
    real, fake = real.detach().cpu().double(), fake.detach().cpu().double()
    return inside(fake, real), inside(real, fake)


# ---------------------------------------------------------------------------------------------------
# The ruler: a small classifier of the real images

class SmallCNN(nn.Module):
    """Four convolutions, a global average, 128 features, num_classes logits. Any image size from 8 pixels."""

    def __init__(self, num_classes, n_features=128):
        super().__init__()
        layers, width = [], 3
        for n_out, stride in ((32, 1), (64, 2), (128, 2), (128, 2)):
            layers += [nn.Conv2d(width, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]
            width = n_out
        self.stages = nn.Sequential(*layers)
        self.embed = nn.Linear(width, n_features)
        self.norm = nn.BatchNorm1d(n_features, affine=False)    # unit variance, so that distances have a scale
        self.classify = nn.Linear(n_features, num_classes)

    def features(self, images):
        """images (B, 3, H, W) in [-1, 1] -> (B, 128) float32, mean 0 and variance 1 over the training images."""
        if images.shape[-1] > 64:                               # a large image costs no more than one of 64 pixels
            images = F.adaptive_avg_pool2d(images, 64)
        x = self.stages(images.contiguous(memory_format=torch.channels_last))      # (B, 128, H/8, W/8)
        return self.norm(self.embed(x.mean((2, 3))).float())

    def forward(self, images):
        """images (B, 3, H, W) -> logits (B, num_classes)"""
        return self.classify(self.features(images).relu())


class ClipCNN(nn.Module):
    """SmallCNN with a third dimension, time: (B, 3, F, H, W) -> num_classes logits. From 8 pixels and 1 frame."""

    def __init__(self, num_classes, n_features=128):
        super().__init__()
        layers, width = [], 3
        for n_out, stride in ((24, 1), (48, 2), (96, 2), (128, 2)):
            layers += [nn.Conv3d(width, n_out, 3, stride, 1, bias=False), nn.BatchNorm3d(n_out), nn.ReLU()]
            width = n_out
        self.stages = nn.Sequential(*layers)
        self.embed = nn.Linear(width, n_features)
        self.norm = nn.BatchNorm1d(n_features, affine=False)
        self.classify = nn.Linear(n_features, num_classes)

    def features(self, clips):
        """clips (B, 3, F, H, W) in [-1, 1] -> (B, 128) float32, mean 0 and variance 1 over the training clips."""
        if clips.shape[-1] > 32:
            clips = F.adaptive_avg_pool3d(clips, (clips.shape[2], 32, 32))
        return self.norm(self.embed(self.stages(clips).mean((2, 3, 4))).float())

    def forward(self, clips):
        """clips (B, 3, F, H, W) -> logits (B, num_classes)"""
        return self.classify(self.features(clips).relu())


def new_ruler(image_set, device):
    """An untrained classifier for the images, or the clips, of a data.ImageSet."""
    if image_set.frames > 1:
        return ClipCNN(len(image_set.classes)).to(device)
    return SmallCNN(len(image_set.classes)).to(device, memory_format=torch.channels_last)


def train_classifier(train_set, val_set, seed=0, steps=600, batch_size=128, lr=4e-3):
    """Train a SmallCNN on data.ImageSets, or a ClipCNN -> the network in eval mode, its validation accuracy in [0, 1].

    A fixed number of steps, so the result depends on the seed and the data only, not on how fast the machine is. A batch
    holds a fourth as many clips: each is a lesson of many frames.
    """
    device, fast = train_set.device, train.native_bf16(train_set.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = new_ruler(train_set, device)
        batch_size = batch_size if train_set.frames == 1 else batch_size // 4
        opt = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps)
        for step in range(steps):
            images, labels = train_set.batch(data.order(len(train_set), batch_size, step, seed))
            (dy, dx), (H, W) = torch.randint(5, (2,)).tolist(), images.shape[-2:]  # move it by up to 2 pixels
            edges = (2, 2, 2, 2) + (0, 0) * (images.ndim - 4)                      # of a clip, all frames together
            images = F.pad(images, edges, mode="replicate")[..., dy:dy + H, dx:dx + W]
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast):
                logits = net(images)
            loss = F.cross_entropy(logits.float(), labels)
            opt.zero_grad(set_to_none=True)
            loss.backward()
            opt.step()
            schedule.step()
    net.eval()
    return net, look_at_real(net, val_set, torch.arange(len(val_set)))[1].float().mean().item()


def classifier_for(run, device, train_set=None, val_set=None, seed=0):
    """The classifier of a run's data -> SmallCNN or ClipCNN on `device` in eval mode, its validation accuracy in [0, 1].

    Trained once, then read from <parent of the run>/cache/classifier-<key>.pt. The key covers data, seed and source
    of the classifier, so an edited one is trained anew. The flag --seed stays out: a ruler must not change.
    """
    train_set = train.open_data(run.args, "train", device) if train_set is None else train_set
    some = train_set.images[torch.linspace(0, len(train_set) - 1, 100).long()].cpu()   # (100, 3, [F,] H, W) uint8
    what = [str(run.args.data), tuple(some.shape), len(train_set), train_set.classes, seed,
            inspect.getsource(SmallCNN if train_set.frames == 1 else ClipCNN), inspect.getsource(train_classifier)]
    key = hashlib.sha1(repr(what).encode() + some.numpy().tobytes()).hexdigest()[:12]
    path = Path(run.folder).resolve().parent / "cache" / f"classifier-{key}.pt"
    if path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        net = new_ruler(train_set, device).eval()
        net.load_state_dict(saved["model"])
        return net, saved["accuracy"]
    start = time.perf_counter()
    val_set = train.open_data(run.args, "val", device) if val_set is None else val_set
    net, accuracy = train_classifier(train_set, val_set, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    train.save_atomically(dict(model=net.state_dict(), accuracy=accuracy), path)      # no run ever reads half a file
    what = "images" if train_set.frames == 1 else "clips"
    print(f"trained a classifier of the real {what} in {time.perf_counter() - start:.0f} s, kept as {path}")
    return net, accuracy


@torch.no_grad()
def look(net, images):
    """What the classifier sees: images (B, 3, H, W) -> features (B, 128), predicted classes (B,)."""
    f = net.features(images)
    return f, net.classify(f.relu()).argmax(-1)


def look_at_real(net, image_set, index, batch_size=250):
    """Real images by index (N,) -> features (N, 128), right or wrong (N,) bool."""
    seen = []
    for i in index.split(batch_size):
        images, labels = image_set.batch(i)
        f, predicted = look(net, images)
        seen.append((f, predicted == labels))
    return tuple(torch.cat(x) for x in zip(*seen))


# ---------------------------------------------------------------------------------------------------
# What is measured on a run. A row is (key in metrics.json, name, number or (number, error), unit, remark).

@torch.no_grad()
def measure_reconstruction(tokenizer, net, val_set, index, batch_size):
    """Encode and decode the validation images at index (N,) -> rows, features of the reconstructions (N, 128)."""
    per_batch, used = [], torch.zeros(tokenizer.vocab_size or 0, dtype=torch.bool, device=val_set.device)
    for i in index.split(batch_size):
        images, labels = val_set.batch(i)
        kl = torch.full((len(i),), math.nan)
        if hasattr(tokenizer, "posterior"):                     # a VAE: take its mean, for a sample adds noise
            mean, std = (m.float() for m in tokenizer.posterior(images))           # (B, T, D), raw latent units
            kl = (0.5 * (mean**2 + std**2 - 1) - std.log()).sum(-1).mean(1)        # (B,) nats per token
            tokens = tokenizer.normalise(mean)
        else:
            tokens = tokenizer.encode(images)
            used[tokens] = True
        recon = tokenizer.decode(tokens).float().clamp(-1, 1)
        f, predicted = look(net, recon)
        per_batch.append((f, psnr(images, recon), ssim(images, recon), (predicted == labels).float(), kl))
    f, *columns = (torch.cat(x) for x in zip(*per_batch))
    db, similar, right, kl = (x.mean().item() for x in columns)
    rows = [("recon_psnr_db", "reconstruction PSNR", db, "dB", "higher is better"),
            ("recon_ssim", "reconstruction SSIM (luminance)", similar, "", "higher is better, 1 is a copy"),
            ("kl_nats_per_token", "KL of a token to the prior", kl, "nats", "what a token may carry, not a score"),
            ("recon_accuracy", "class accuracy, reconstructions", 100 * right, "%", "higher is better")]
    if len(used):
        rows.append(("codebook_usage", "codes that occur", 100 * used.float().mean().item(), "%",
                     f"of {len(used)}, in {len(index)} validation images"))
    return [row for row in rows if math.isfinite(row[2])], f    # no KL: not a VAE, or its std is 0


@torch.no_grad()
def measure_bound(run, val_set, index, batch_size, seed):
    """Bits per pixel value that VAE and generator need for an image at most, with likelihood="logistic" -> rows."""
    torch.manual_seed(seed)
    bits = []
    for i in index.split(max(1, min(batch_size, len(index) // 20))):
        loss, logs = vae.bound(run.tokenizer, run.generator, *val_set.batch(i))
        bits.append(torch.stack([loss, *logs.values()]))
    bits = torch.stack(bits).double()                           # (batches, 4): bound, pixels, prior, entropy
    mean, error = bits.mean(0), bits.std(0) / len(bits) ** 0.5
    texts = ("bound on bits per dimension", "of it: pixels, given the tokens", "the tokens, under the generator",
             "entropy of q, taken off")
    keys = ("bound_bits_per_dim", "bound_pixels", "bound_prior", "bound_entropy")
    return [(key, text, (m.item(), e.item()), "bits", "lower is better" if key == keys[0] else "a part of the bound")
            for key, text, m, e in zip(keys, texts, mean, error)]


@torch.no_grad()
def measure_maps(args, run, device):
    """A --task run: maps drawn for args.n validation images against the true ones -> rows.

    Mean IoU: over the ground and the ten classes, intersection over union of all pixels of the set (as PASCAL VOC
    counts it). RMSE of distances in half image widths. A prediction is the mean of 8 sampled maps; "the image hidden" asks
    the same model without its image.
    """
    flags = argparse.Namespace(**vars(run.args) | dict(task="class"))
    images, truth = train.open_data(flags, "val", device), train.open_data(run.args, "val", device)
    if args.fid or args.n < 10:
        raise data.BadInput("--fid, --n: of maps at least 10 are needed, and they have no FID")
    index = torch.randperm(len(truth), generator=torch.Generator().manual_seed(args.seed))[:args.n]
    cond = torch.cat([sample.image_tokens(run, images.batch(i)[0]) for i in index.split(args.batch_size)])
    true = torch.cat([truth.batch(i)[0].cpu() for i in index.split(args.batch_size)])
    options = dict(temperature=args.temperature, batch_size=args.batch_size, seed=args.seed)
    copy = torch.cat([run.tokenizer.decode(run.tokenizer.normalise(run.tokenizer.posterior(x.to(device))[0])).cpu()
                      for x in true.split(args.batch_size)])
    start = time.perf_counter()
    drawn = sample.predict_maps(run, cond, cfg=args.cfg, **options)
    seconds = (time.perf_counter() - start) / len(index)
    arms = [("", "maps of images", drawn),
            ("_one_sample", "one sample each", sample.draw_samples(run, cond, cfg=args.cfg, **options)),
            ("_from_nothing", "the image hidden", sample.predict_maps(run, cond, cfg=0.0, **options)),
            ("_tokenizer", "true maps, encoded and decoded", copy)]
    if run.args.task == "segment":
        arms.insert(2, ("_ground", "ground everywhere", torch.eye(true.shape[1])[0].view(1, -1, 1, 1).expand_as(true)))
        iou = lambda x: mean_iou(x.argmax(1), true.argmax(1), true.shape[1])
        rows = [("miou" + key, f"mean IoU, {text}", iou(x), "", "higher is better") for key, text, x in arms]
        right = (drawn.argmax(1) == true.argmax(1)).float().mean().item()
        rows.append(("pixel_accuracy", "pixels right", 100 * right, "%", "higher is better"))
    else:
        arms.insert(2, ("_mean_map", "the mean map everywhere", true.mean(0, keepdim=True).expand_as(true)))
        rmse = lambda x: (x - true)[:, 0].square().mean().sqrt().item()
        rows = [("rmse" + key, f"RMSE, {text}", rmse(x), "half widths", "lower is better") for key, text, x in arms]
    return rows + [("seconds_per_map", "seconds per map", seconds, "s", "8 samples each")]


@torch.no_grad()
def read_scene(images, sizes=4, tilts=7):
    """What a drawn picture shows, judged from its pixels: images (N, 3, H, W) in [-1, 1] -> {name: (N,) int64}.

    background: the nearest of data.BACKGROUNDS to the median colour of the border. colour: the nearest of data.COLOURS to the
    median of the 3% of pixels farthest from it. Then each pixel's cover is its place on the way from the one to the other, and
    shape is the one of the ten that leaves the smallest squared difference of cover, when it is laid on the centre of mass
    of the cover at one of `sizes` sizes and `tilts` tilts. No network, nothing learned.
    """
    N, _, H, W = images.shape
    device = images.device
    border = torch.cat([images[:, :, 0], images[:, :, -1], images[..., 0], images[..., -1]], -1)           # (N, 3, 4 H)
    ground = border.median(-1).values
    away = images - ground[:, :, None, None]
    far = away.norm(dim=1).flatten(1).topk(H * W // 32).indices                             # (N, 3% of the pixels)
    colour = images.flatten(2).gather(2, far[:, None].expand(-1, 3, -1)).median(-1).values
    axis = (colour - ground)[:, :, None, None]
    cover = ((away * axis).sum(1) / axis.square().sum(1).clamp(min=1e-6)).clamp(0, 1)       # (N, H, W)
    line = (torch.arange(H, device=device) + 0.5) * (2 / H) - 1
    mass = cover.sum((1, 2)).clamp(min=1e-6)
    mx, my = (cover.sum(1) * line).sum(1) / mass, (cover.sum(2) * line).sum(1) / mass
    fine = torch.linspace(-1.2, 1.2, 96, device=device)
    fy, fx = torch.meshgrid(fine, fine, indexing="ij")
    least, shape = torch.full((N,), math.inf, device=device), torch.zeros(N, dtype=torch.long, device=device)
    for k in range(len(data.SHAPES)):
        inside = data.distance(k, fx, fy) < 0                                               # a shape's own centre of mass
        ox, oy = fx[inside].mean(), fy[inside].mean()
        for r in torch.linspace(data.SMALL, data.LARGE, sizes).tolist():
            for tilt in torch.linspace(-data.TILT, data.TILT, tilts).tolist():
                cos, sin = math.cos(tilt), math.sin(tilt)
                dx = line[None, None] - (mx - r * (cos * ox - sin * oy))[:, None, None]     # (N, 1, W)
                dy = line[None, :, None] - (my - r * (sin * ox + cos * oy))[:, None, None]  # (N, H, 1)
                d = data.distance(k, (cos * dx + sin * dy) / r, (cos * dy - sin * dx) / r) * r
                error = ((0.5 - d * (H / 2)).clamp(0, 1) - cover).square().sum((1, 2))
                shape, least = torch.where(error < least, k, shape), torch.minimum(least, error)
    nearest = lambda x, colours: torch.cdist(x, torch.tensor(list(colours.values()), device=device) / 127.5 - 1).argmin(1)
    return dict(shape=shape, colour=nearest(colour, data.COLOURS), background=nearest(ground, data.BACKGROUNDS))


def unseen_captions(run, n):
    """n captions of the drawn world that describe no training image -> texts, {name: (n,) int64} of what they ask for."""
    seen, texts, wanted = set(train.captions_of(run.args, train.open_data(run.args, "train", run.device), "train")), {}, []
    start = data.VAL_INDEX
    while len(texts) < n and start < data.VAL_INDEX + 100_000:
        index = torch.arange(start, start + 1000)
        s = data.scene(index, run.args.seed)
        for i, text in enumerate(data.captions(index, run.args.seed)):
            if text not in seen and text not in texts and len(texts) < n:
                texts[text] = True
                wanted.append([s[name][i].item() for name in ("label", "colour", "background")])
        start += 1000
    if len(texts) < n:
        raise data.BadInput(f"--n {n}: only {len(texts)} captions of the drawn world are not in the training set")
    return list(texts), dict(zip(("shape", "colour", "background"), torch.tensor(wanted).T))


def measure_captions(args, run, device):
    """A --condition text run on the drawn world: are new captions obeyed? The rule is first tried on real images -> rows."""
    if run.args.data != "shapes":
        raise data.BadInput(f"{args.run}: captions are judged on the drawn world only (--data shapes)")
    n = args.n = min(args.n, 200)                               # metrics.json tells it too
    index = torch.arange(data.VAL_INDEX, data.VAL_INDEX + 500)
    real, s = data.draw(index, run.args.image_size, run.args.seed)[0], data.scene(index, run.args.seed)
    told = read_scene(real)
    rows = [(f"rule_{name}", f"the rule on 500 real images: {name}", 100 * (told[name] == s[key]).float().mean().item(), "%",
             "its own limit") for name, key in (("shape", "label"), ("colour", "colour"), ("background", "background"))]
    texts, wanted = unseen_captions(run, n)
    images = sample.draw_captions(run, texts, cfg=args.cfg, temperature=args.temperature, batch_size=args.batch_size,
                                  seed=args.seed)
    told = {name: v.cpu() for name, v in read_scene(images.clamp(-1, 1)).items()}
    right = {name: told[name] == wanted[name] for name in wanted}
    right["all three"] = right["shape"] & right["colour"] & right["background"]
    return rows + [(f"caption_{name.replace(' ', '_')}", f"{n} unseen captions, {name} as asked", 100 * v.float().mean().item(), "%",
                    "higher is better") for name, v in right.items()]


def mean_iou(predicted, true, num_classes):
    """Label maps (N, H, W) -> mean over the classes that occur of intersection / union of their pixels, in [0, 1]."""
    pairs = (true * num_classes + predicted).flatten()          # one number for each (true, predicted)
    counts = pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes).double()
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return (counts.diagonal() / union)[union > 0].mean().item()


@torch.no_grad()
def measure_likelihood(run, val_set, index, batch_size, seed):
    """Validation loss of the generator, posterior samples and masks drawn from seed -> rows.

    Only an autoregressive model with a density or a softmax has a likelihood; the other losses say what they are.
    """
    torch.manual_seed(seed)
    losses, sizes, D = [], [], run.tokenizer.token_dim
    for i in index.split(max(1, min(batch_size, len(index) // 20))):   # 20 batches or more, for a standard error
        images, labels = val_set.batch(i)
        losses.append(run.generator(run.tokenizer.encode(images), labels)[0].item())
        sizes.append(len(i))
    x, w = (torch.tensor(v, dtype=torch.float64) for v in (losses, sizes))
    w = w / w.sum()
    mean = (w * x).sum().item()
    error = ((w * (x - mean)).square().sum() * len(x) / (len(x) - 1)).sqrt().item()
    if run.args.head == "diffusion" or run.args.generator != "ar":
        unit = "noise MSE" if run.args.head == "diffusion" else "nats/token"
        return [("val_loss", "validation loss", (mean, error), unit, "lower is better, not a likelihood")]
    rows = [("val_nll_nats_per_token", "validation NLL", (mean, error), "nats/token", "lower is better")]
    if D is None:
        return rows + [("val_perplexity", "perplexity", math.exp(mean), "tokens",
                        f"lower is better, {run.tokenizer.vocab_size} by chance")]
    return rows + [("val_bits_per_dim", "the same per latent dimension", mean / (D * math.log(2)), "bits",
                    "lower is better, N(0, 1) gives 2.05")]


def measure_samples(images, labels, net, real, batch_size):
    """Samples (N, 3, H, W) on the CPU, the classes asked for (N,), features of real images (M, 128) -> rows."""
    seen = [look(net, part.to(real.device)) for part in images.split(batch_size)]
    fake, predicted = (torch.cat(x) for x in zip(*seen))
    right = (predicted.cpu() == labels).float().mean().item()
    m = min(len(fake), len(real))                               # balls shrink as points grow more: equal numbers, and evenly
    some = lambda f: f[torch.linspace(0, len(f) - 1, m, device=f.device).round().long()]       # spread: they may lie by class
    precision, recall = precision_recall(some(real), some(fake))
    return [("sample_accuracy", "class accuracy, samples", 100 * right, "%", "higher is better"),
            ("sample_precision", "precision", 100 * precision, "%", "higher: samples look real"),
            ("sample_recall", "recall", 100 * recall, "%", "higher: all the variety is there"),
            ("sample_frechet_small_cnn", "Frechet distance (small CNN)", frechet_distance(fake, real), "",
             f"lower is better, {len(fake)} samples to {len(real)} real")]


def real_fid(cleanfid, images, val_set, index, device):
    """The FID of samples (N, 3, H, W) to the real images at index (M,), by the Inception network of clean-fid."""
    features = {}
    with tempfile.TemporaryDirectory() as folder:
        real = (val_set.batch(i)[0] for i in index.split(250))
        for name, parts in (("real", real), ("fake", images.split(250))):
            Path(folder, name).mkdir()
            for p, part in enumerate(parts):
                for k, image in enumerate(data.to_uint8(part).permute(0, 2, 3, 1).cpu().numpy()):
                    Image.fromarray(image).save(Path(folder, name, f"{p}-{k}.png"))
        try:
            inception = cleanfid.build_feature_extractor("clean", device)
        except OSError as e:
            raise data.BadInput(f"--fid: clean-fid could not download its Inception network ({e})") from None
        for name in ("real", "fake"):
            features[name] = torch.from_numpy(cleanfid.get_folder_features(
                str(Path(folder, name)), inception, num_workers=0, device=device, mode="clean", verbose=False))
    return frechet_distance(features["fake"], features["real"])


# ---------------------------------------------------------------------------------------------------
# Clips: what happens in them, and what their frames look like

def single_frames(run, clips, split):
    """Four frames of each clip of an ImageSet -> an ImageSet of images, to train the ruler of frames on. Its classes are
    those of the clips, but in the drawn world the shapes, for a single frame hardly tells what happens."""
    labels, classes = clips.labels, clips.classes
    if run.args.data == "shapes":
        index = torch.arange(len(clips)) + (data.VAL_INDEX if split == "val" else 0)
        labels, classes = data.scene(index, run.args.seed, video=True)["label"], data.SHAPES
    some = torch.linspace(0, clips.frames - 1, 4).long()
    return data.ImageSet(as_frames(clips.images[:, :, some]), labels.repeat_interleave(4), classes, clips.device)


@torch.no_grad()
def features_of_frames(net, clips, batch_size):
    """Clips (N, 3, F, H, W) -> the features of all their frames (N F, 128) by a SmallCNN."""
    device, few = net.classify.weight.device, max(1, batch_size // clips.shape[2])
    return torch.cat([net.features(as_frames(part.to(device))) for part in clips.split(few)])


@torch.no_grad()
def measure_clip_reconstruction(tokenizer, net, clips, labels, batch_size):
    """Encode and decode clips (N, 3, F, H, W), and their middle frames as images -> rows."""
    used = torch.zeros(tokenizer.vocab_size, dtype=torch.bool, device=labels.device)
    columns, middle = [], clips.shape[2] // 2
    for x, y in zip(clips.split(batch_size), labels.split(batch_size)):
        tokens = tokenizer.encode(x)
        used[tokens] = True
        recon, image = tokenizer.decode(tokens), x[:, :, middle].contiguous()
        by_frame = [m(as_frames(x), as_frames(recon)).view(len(x), -1).mean(1) for m in (psnr, ssim)]      # (B,) each
        db_image = psnr(image, tokenizer.decode(tokenizer.encode(image)))
        columns.append((*by_frame, db_image, (look(net, recon)[1] == y).float()))
    db, similar, db_image, right = (torch.cat(c).mean().item() for c in zip(*columns))
    return [("recon_psnr_db", "reconstruction PSNR, per frame", db, "dB", "higher is better"),
            ("recon_ssim", "reconstruction SSIM (luminance), per frame", similar, "", "higher is better, 1 is a copy"),
            ("recon_image_psnr_db", "reconstruction PSNR, middle frames as images", db_image, "dB", "the same weights"),
            ("recon_accuracy", "action accuracy, reconstructions", 100 * right, "%", "higher is better"),
            ("codebook_usage", "codes that occur", 100 * used.float().mean().item(), "%",
             f"of {len(used)}, in {len(clips)} validation clips")]


@torch.no_grad()
def measure_prediction(run, net, clips, labels, **options):
    """Frame prediction: the first frames of clips (N, 3, F, H, W) given, the action not told -> rows.

    Is the true action seen in what comes out? Chance has a rival that costs nothing: the last given frame stands still.
    PSNR is over the predicted frames. A sample is one of many possible futures, so it need not come nearest.
    """
    n = 1 + run.tokenizer.time_stride
    n = n if n < clips.shape[2] else 1
    drawn = sample.predict(run, clips, n, **options).to(clips.device)
    still = torch.cat([clips[:, :, :n], clips[:, :, n - 1:n].expand(-1, -1, clips.shape[2] - n, -1, -1)], 2)
    seen = lambda x: torch.cat([look(net, part)[1] for part in x.split(100)])
    right = lambda x: 100 * (seen(x) == labels).float().mean().item()
    db = lambda x: psnr(as_frames(clips[:, :, n:]), as_frames(x[:, :, n:])).mean().item()
    what = f"{n} of {clips.shape[2]} frames given"
    return [("prediction_accuracy", f"action accuracy, {what}", right(drawn), "%", "higher is better; the action is not told"),
            ("prediction_accuracy_still", "the same, if the rest stands still", right(still), "%", "what these frames show"),
            ("prediction_psnr_db", "PSNR of the predicted frames", db(drawn), "dB", "higher is better"),
            ("prediction_psnr_still_db", "the same, if the rest stands still", db(still), "dB", "no prediction at all")]


def measure_clips(args, run, device):
    """All that applies to a run on clips -> rows."""
    sets = {split: train.open_data(run.args, split, device) for split in ("train", "val")}
    check(args, run, sets["val"])
    net, accuracy = classifier_for(run, device, *sets.values())
    eye, _ = classifier_for(run, device, *(single_frames(run, s, split) for split, s in sets.items()))
    g = torch.Generator().manual_seed(args.seed)
    (floor, _), (clips, truth) = (s.batch(torch.randperm(len(s), generator=g)[:args.n]) for s in sets.values())
    torch.manual_seed(args.seed)
    few = max(1, args.batch_size // clips.shape[2])
    features = lambda x: torch.cat([look(net, part.to(device))[0] for part in x.split(few)])
    real, real_frames = features(clips), features_of_frames(eye, clips, args.batch_size)
    rows = measure_clip_reconstruction(run.tokenizer, net, clips, truth, few)
    rows.append(("classifier_accuracy", "action accuracy, real clips", 100 * accuracy, "%", "the classifier's limit"))
    if run.generator is not None:
        rows += measure_likelihood(run, sets["val"], torch.arange(len(sets["val"])), few, args.seed)
        labels, start = torch.arange(args.n) % len(run.classes), time.perf_counter()
        drawn = sample.draw_samples(run, labels, args.cfg, args.temperature, args.batch_size, args.seed)
        rows.append(("seconds_per_clip", "seconds per clip drawn", (time.perf_counter() - start) / args.n, "s", "batched"))
        names = {"sample_accuracy": "action accuracy, samples", "sample_precision": "precision, clips",
                 "sample_recall": "recall, clips", "sample_frechet_small_cnn": "Frechet distance over clips (small CNN)"}
        rows += [(row[0], names[row[0]], *row[2:]) for row in measure_samples(drawn, labels, net, real, few)]
        rows.append(("sample_frechet_frames", "Frechet distance of frames (small CNN)",
                     frechet_distance(features_of_frames(eye, drawn, args.batch_size), real_frames), "", "lower is better"))
        rows += measure_prediction(run, net, clips, truth, temperature=args.temperature, batch_size=args.batch_size,
                                   seed=args.seed)
    by_clip = frechet_distance(features(floor), real)
    by_frame = frechet_distance(features_of_frames(eye, floor, args.batch_size), real_frames)
    return rows + [("floor_frechet_small_cnn", "Frechet distance over clips, training clips", by_clip, "",
                    f"the floor for {len(floor)} samples"),
                   ("floor_frechet_frames", "Frechet distance of frames, training clips", by_frame, "", "its floor")]


# ---------------------------------------------------------------------------------------------------
# The linear probe: how well can the class be read off the hidden states, when nobody tells it to the generator?

@torch.no_grad()
def layer_features(generator, tokens, cond, mask=None):
    """Mean-pooled hidden states: tokens (B, T[, D]), cond (B,) -> list of n_layer + 1 tensors (B, C), float32.

    [0] is what enters the first block, [i] what leaves block i. Hooks read them while generator.hidden runs as it is
    (GIVT's own probe, predict_fn_rep, stops at an undefined name). mask (B, T): given on to a model that wants one,
    True where a token is hidden. An autoregressive model never looks at the last token.
    """
    if hasattr(generator, "adapter"):
        tokens, generator = generator.adapter(tokens), generator.generator
    pooled = []

    def keep(block, inputs, output):                            # both (B, S, C), the prefix among the S
        if not pooled:
            pooled.append(inputs[0].float().mean(1))
        pooled.append(output.float().mean(1))
    hooks = [block.register_forward_hook(keep) for block in generator.blocks]
    try:
        generator.hidden(tokens, cond) if mask is None else generator.hidden(tokens, cond, mask)
    finally:
        for hook in hooks:
            hook.remove()
    return pooled


@torch.no_grad()
def representations(run, image_set, index, batch_size):
    """Images by index (N,) -> {name: features (N, F)}, labels (N,).

    The generator is given "no class", so no label leaks. In training it met labels as inputs, never as targets.
    """
    features, labels = {}, []
    for i in index.split(batch_size):
        images, y = image_set.batch(i)
        small = F.adaptive_avg_pool2d(images, 32) if images.shape[-1] > 32 else images     # 3072 numbers are enough
        if images.ndim == 5 and images.shape[-1] > 16:                                     # and of a clip 768 per frame
            small = F.adaptive_avg_pool3d(images, (images.shape[2], 16, 16))
        parts = {"pixels": small.flatten(1)}
        if hasattr(run.tokenizer, "posterior"):                 # a VAE: take its mean, for a sample adds noise
            tokens = run.tokenizer.normalise(run.tokenizer.posterior(images)[0].float())   # (B, T, D)
            parts |= {"latents": tokens.flatten(1), "latents, averaged": tokens.mean(1)}
        else:
            tokens = run.tokenizer.encode(images)
        if hasattr(run.tokenizer, "bits"):                      # lfq: the signs that the ids spell
            parts["token bits"] = lfq.codes(tokens, run.tokenizer.bits).flatten(1)
        known = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)      # nothing is hidden
        mask = None if run.args.generator == "ar" else known
        states = layer_features(run.generator, tokens, torch.full_like(y, run.generator.num_classes), mask)
        for name, x in (parts | {f"layer {k}": h for k, h in enumerate(states)}).items():
            features.setdefault(name, []).append(x)
        labels.append(y)
    return {name: torch.cat(x) for name, x in features.items()}, torch.cat(labels)


def fit_linear(x, y, decay, num_classes):
    """Logistic regression by L-BFGS, penalty decay / 2 * |W|^2: x (N, F), y (N,) -> W (F, num_classes), bias."""
    weight, bias = x.new_zeros(x.shape[1], num_classes), x.new_zeros(num_classes)
    weight.requires_grad_(), bias.requires_grad_()
    opt = torch.optim.LBFGS([weight, bias], max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss
    opt.step(closure)
    return weight.detach(), bias.detach()


def probe_accuracy(x, y, val_x, val_y, decays=(1e-3, 1e-2, 1e-1)):
    """Accuracy in [0, 1] of a linear classifier of features: x (N, F), y (N,); the val ones only judge.

    Features are standardised first. The decay is the one that is best on a fifth of x, held out; then all of x is fitted.
    """
    std, mean = torch.std_mean(x, 0)
    scale = torch.where(std > 1e-3 * std.max(), 1 / std, 0)     # a pixel that never changes tells nothing
    x, val_x = (x - mean) * scale, (val_x - mean) * scale
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    held, rest = order[:len(x) // 5], order[len(x) // 5:]
    num_classes = int(max(y.max(), val_y.max())) + 1

    def accuracy(fitted, decay, judged, truth):
        weight, bias = fit_linear(*fitted, decay, num_classes)
        return ((judged @ weight + bias).argmax(-1) == truth).float().mean().item()
    best = max(decays, key=lambda d: accuracy((x[rest], y[rest]), d, x[held], y[held]))
    return accuracy((x, y), best, val_x, val_y)


def probe(args, run, device, most=5000):
    """Probes of every layer, of the pixels and of the latents, on `most` images -> rows; writes RUN/probe.png."""
    if run.source is not None or run.args.condition == "text":
        raise data.BadInput(f"--probe: {args.run} was never told a class that could be hidden from it")
    if run.generator is None:
        raise data.BadInput(f"--probe: {args.run} is a tokenizer without a generator, so it has no layers")
    if not hasattr(run.generator, "blocks"):
        raise data.BadInput(f"--probe: {args.run} has a generator without .blocks, whose layers cannot be read")
    sets = [train.open_data(run.args, split, device) for split in ("train", "val")]
    check(args, run, sets[1])
    torch.manual_seed(args.seed)
    (x, y), (val_x, val_y) = (representations(run, s, torch.randperm(len(s))[:most], args.batch_size) for s in sets)
    result = {name: 100 * probe_accuracy(x[name], y, val_x[name], val_y) for name in x}
    save_probe(Path(run.folder) / "probe.png", result, f"{Path(run.folder).name}: linear probes of {len(y)} training images",
               100 * (val_y.bincount().max() / len(val_y)).item())
    return [("probe_" + re.sub(r"\W+", "_", name), f"linear probe, {name}", accuracy, "%", f"of {x[name].shape[1]} numbers")
            for name, accuracy in result.items()]


def save_probe(path, result, title, chance):
    """{name: accuracy in %} -> a PNG: the layers as a curve, everything else as a horizontal line."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    curve = [v for name, v in result.items() if name.startswith("layer ")]
    lines = {name: v for name, v in result.items() if not name.startswith("layer ")} | {"always the commonest class": chance}
    fig, ax = plt.subplots(figsize=(7, 4.5))
    ax.plot(range(len(curve)), curve, "o-", lw=2, label="generator, hidden states averaged over positions")
    for k, (name, v) in enumerate(lines.items()):
        ax.axhline(v, color=f"C{k + 1}", ls="--", label=f"{name}: {v:.1f}%")
    for k, v in enumerate(curve):
        ax.annotate(f"{v:.1f}", (k, v), textcoords="offset points", xytext=(0, 7) if k else (18, 3), ha="center", fontsize=9)
    ax.set(xlabel="layer (0: what enters the first block)", ylabel="accuracy on validation images (%)", title=title,
           xticks=range(len(curve)), ylim=(0, 105))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2, fontsize=9, frameon=False)
    fig.tight_layout()
    fig.savefig(path, dpi=80)
    plt.close(fig)


# ---------------------------------------------------------------------------------------------------
# The program

def parse_args():
    parser = argparse.ArgumentParser(description="Measure a trained run: reconstructions, likelihood and samples.")
    parser.add_argument("run", help="a run folder that train.py wrote")
    parser.add_argument("--n", type=int, default=1000, help="number of images to sample, the classes in equal shares")
    parser.add_argument("--cfg", type=float, help="guidance of the samples, 1 is none (default: that of sample.py)")
    parser.add_argument("--temperature", type=float, help="temperature of the samples (default: that of sample.py)")
    parser.add_argument("--batch_size", type=int, default=250, help="images at a time; lower it when memory runs out")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 or mps (default: the best there is)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples and of the choice of real images")
    parser.add_argument("--fid", action="store_true", help="the FID with Inception too; needs `pip install clean-fid`")
    parser.add_argument("--probe", action="store_true", help="only this: linear probes of all layers, on up to 5000 images")
    return parser.parse_args()


def check(args, run, val_set):
    """Refuse in a sentence, before any work, what cannot be measured -> clean-fid's module, None without --fid."""
    least = max(10, len(run.classes))
    if args.n < least:
        raise data.BadInput(f"--n {args.n}: at least {least}, with {len(run.classes)} classes")
    if run.source is None and run.args.task != "class":
        raise data.BadInput(f"{args.run}: a tokenizer of maps, which no classifier knows; name the run folder of its generator")
    if args.batch_size < 1:
        raise data.BadInput(f"--batch_size {args.batch_size}: at least 1")
    for flag in ("cfg", "temperature", "fid"):
        value = getattr(args, flag)
        if value not in (None, False) and run.generator is None:
            raise data.BadInput(f"--{flag}: {args.run} is a tokenizer without a generator, so it has no samples")
        if value is not None and not 0 <= value < math.inf:
            raise data.BadInput(f"--{flag} {value}: must be 0 or more")
    if len(val_set) < 10:
        raise data.BadInput(f"{args.run}: its --data has {len(val_set)} validation images, at least 10 are needed")
    if args.fid and val_set.frames > 1:
        raise data.BadInput("--fid: is of images; this run draws clips")
    if not args.fid:
        return None
    try:
        from cleanfid import fid
    except ImportError as e:
        raise data.BadInput(f"--fid: needs an optional package ({e}): pip install clean-fid") from None
    return fid


def measure(args, run, device):
    """All that applies to this run -> rows."""
    if run.source is not None:
        return measure_maps(args, run, device)
    if run.args.condition == "text" and run.generator is not None:
        return measure_captions(args, run, device)
    if run.args.frames > 1:
        return measure_clips(args, run, device)
    train_set, val_set = (train.open_data(run.args, split, device) for split in ("train", "val"))
    cleanfid = check(args, run, val_set)
    net, accuracy = classifier_for(run, device, train_set, val_set)
    g = torch.Generator().manual_seed(args.seed)                # a folder comes sorted by class, so draw at random
    index, others = (torch.randperm(len(s), generator=g) for s in (val_set, train_set))
    torch.manual_seed(args.seed)                                # whether or not the classifier had to be trained
    real, _ = look_at_real(net, val_set, index, args.batch_size)                   # (N, 128)
    floor, _ = look_at_real(net, train_set, others[:args.n], args.batch_size)
    rows, recon = measure_reconstruction(run.tokenizer, net, val_set, index, args.batch_size)
    rows.append(("classifier_accuracy", "class accuracy, real images", 100 * accuracy, "%", "the classifier's limit"))
    if run.generator is not None:
        rows += measure_likelihood(run, val_set, index, args.batch_size, args.seed)
        if run.args.likelihood == "logistic" and run.args.generator == "ar":
            rows += measure_bound(run, val_set, index, args.batch_size, args.seed)
        labels = torch.arange(args.n) % len(run.classes)
        images = sample.draw_samples(run, labels, cfg=args.cfg, temperature=args.temperature,
                                     batch_size=args.batch_size, seed=args.seed).clamp(-1, 1)
        rows += measure_samples(images, labels, net, real, args.batch_size)
    rows += [("recon_frechet_small_cnn", "Frechet distance, reconstructions", frechet_distance(recon, real), "",
              "of the same images, so it may pass the floor"),
             ("floor_frechet_small_cnn", "Frechet distance, training images", frechet_distance(floor, real), "",
              f"the floor for {len(floor)} samples")]
    if cleanfid:
        rows.append(("fid", "FID (clean-fid)", real_fid(cleanfid, images, val_set, index, device), "",
                     f"lower is better; papers use 50000, here {args.n} samples to {len(index)} real"))
    return rows


def main():
    args = parse_args()
    with sample.processes() as share:
        report(args, share)


def report(args, share):
    """Measures, prints and writes; share: rank and number of the processes, which share the drawing of samples."""
    if args.probe and share[1] > 1:
        raise data.BadInput("--probe: draws no samples that processes could share; run it without torchrun")
    device = train.pick_device(args.device)
    run = train.load_run(args.run, device)
    run.share = share
    metrics, lines = {}, []
    for key, name, value, unit, remark in (probe if args.probe else measure)(args, run, device):
        value, *error = value if isinstance(value, tuple) else (value,)
        metrics.update({key: value}, **{f"{key}_error": e for e in error})
        lines.append((name, f"{value:.3f}" + "".join(f" +- {e:.3f}" for e in error), unit, remark))
    path = Path(run.folder) / "metrics.json"
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):                               # absent or damaged
        before = {}
    if args.probe:                                              # either kind of call leaves the other's numbers alone
        metrics = before | metrics
    else:
        machine = torch.cuda.get_device_name(device) if device.type == "cuda" else \
            f"{platform.machine()} {platform.system()}, {torch.get_num_threads()} threads"
        metrics.update(n=args.n, seed=args.seed)
        if run.generator is not None:
            used = {k: v if getattr(args, k, None) is None else getattr(args, k) for k, v in sample.default_of(run).items()}
            metrics.update(used)
        metrics.update(device=str(device), machine=machine, **{k: v for k, v in before.items() if k.startswith("probe_")})
    if share[0]:
        return                                                  # the first process writes
    path.write_text(json.dumps(metrics, indent=1) + "\n")
    wide = [max(len(line[c]) for line in lines) for c in range(3)]
    for name, number, unit, remark in lines:
        print(f"{name:{wide[0]}}  {number:>{wide[1]}}  {unit:{wide[2]}}  {remark}")
    print(f"wrote {path}" + f" and {path.with_name('probe.png')}" * args.probe)


if __name__ == "__main__":
    main()
