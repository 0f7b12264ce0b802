"""
Metrics: how close are two images, or two sets of images? And the rule that reads drawn pictures.

    psnr, ssim, ms_ssim         one number for each pair of images
    frechet_distance            one number for two clouds of features; with Inception's features it is the FID
    precision_recall            do samples look real, and is all the variety of the real images there?
    mean_iou                    label maps
    read_scene                  what a drawn picture shows: shape, colour and background, without a network
    measure_captions            are captions of the drawn world obeyed? Judged by read_scene
    clean_fid                   the FID of an optional package

Features come from common/classifier.py. Papers report the FID: the Frechet distance with 2048 features of
Inception-v3, which is a large download and knows little about 32-pixel shapes.

Shapes:  B or N images, F numbers in a feature vector, H W pixels; images in [-1, 1]
"""
import json
import math
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

import data
from common import captions, drawing, pictures, runs


# ---- Pairs of images: how close is b to a? -------------------------------------------------------

def psnr(a, b):
    """Peak signal-to-noise ratio in dB: images (B, 3, H, W) in [-1, 1] -> (B,), one per image.

    10 log10(peak^2 / MSE) with peak 2. At most 106 dB, so that an exact copy does not make a mean infinite.
    """
    mse = (a.float() - b.float()).square().mean((1, 2, 3))                            # (B,)
    return 10 * torch.log10(4 / mse.clamp(min=1e-10))


def ssim(a, b):
    """Structural similarity of the luminance: images (B, 3, H, W) in [-1, 1] -> (B,), at most 1.

    The settings of Wang et al. 2004: an 11 x 11 Gaussian window of sigma 1.5 (smaller where the image is),
    K1 = 0.01, K2 = 0.03, and the mean over the windows that lie inside the image. Their range L is 2 here.
    """
    return similarity(luminance(a), luminance(b))[0]


def ms_ssim(a, b):
    """SSIM over several scales: images (B, 3, H, W) in [-1, 1] -> (B,), 0 to 1.

    Wang, Simoncelli, Bovik 2003: prod_j (contrast and structure at scale j)^w_j, with the brightness too at
    the last. From scale to scale the image is halved by averaging 2 x 2 pixels. Five scales need 176 pixels,
    since the window has 11 at each. A smaller image has fewer scales, whose w_j are scaled to the sum 1:
    88 pixels have four, 44 three, 22 two, and less than 22 one, which is SSIM. Compare only values of as
    many scales. A negative mean, whose power would not be real, counts as 0.
    """
    weights = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]
    weights = weights[:max(1, min(5, (min(a.shape[-2:]) // 11).bit_length()))]
    a = luminance(a)
    b = luminance(b)
    product = 1.0
    for j, w in enumerate(weights):
        s, cs = similarity(a, b)
        product = product * (s if j == len(weights) - 1 else cs).clamp(min=0) ** (w / sum(weights))
        a = F.avg_pool2d(a, 2)
        b = F.avg_pool2d(b, 2)
    return product


def luminance(images):
    """images (B, 3, H, W) in [-1, 1] -> (B, 1, H, W) in [0, 2], as SSIM needs it: ITU-R BT.601."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)[:, None, None]
    return ((images.float() + 1) * weights).sum(1, keepdim=True)


def similarity(a, b):
    """SSIM, and its part of contrast and structure alone, of a, b (B, 1, H, W) in [0, 2] -> (B,), (B,)."""
    side = min(11, *a.shape[-2:])
    size = side - (side + 1) % 2                                                      # odd, to have a middle
    g = torch.exp(-(torch.arange(size, device=a.device) - size // 2).float().square() / (2 * 1.5**2))
    g = g / g.sum()

    def blur(x):                                                                     # the window is separable
        return F.conv2d(F.conv2d(x, g.view(1, 1, -1, 1)), g.view(1, 1, 1, -1))

    mu_a = blur(a)
    mu_b = blur(b)
    var_a = blur(a * a) - mu_a**2
    var_b = blur(b * b) - mu_b**2
    cov = blur(a * b) - mu_a * mu_b
    c1 = (0.01 * 2) ** 2
    c2 = (0.03 * 2) ** 2
    cs = (2 * cov + c2) / (var_a + var_b + c2)
    s = cs * (2 * mu_a * mu_b + c1) / (mu_a**2 + mu_b**2 + c1)
    return s.mean((1, 2, 3)), cs.mean((1, 2, 3))


# ---- Clouds of features: do two sets of images look alike as sets? -------------------------------

def frechet_distance(f1, f2):
    """Squared Frechet distance of Gaussians fitted to two clouds: f1 (N, F), f2 (M, F) -> float, >= 0.

        d^2 = |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))         (Heusel et al. 2017, 1706.08500)

    tr (C1 C2)^(1/2) sums the square roots of the eigenvalues of C1 C2, which are also those of the symmetric
    C1^(1/2) C2 C1^(1/2), so eigh is enough. Biased upwards by about 1/N: compare only values of equal N, M.
    """
    f1 = f1.detach().cpu().double()
    f2 = f2.detach().cpu().double()
    c1 = f1.T.cov()                                                                   # (F, F)
    c2 = f2.T.cov()
    values, vectors = torch.linalg.eigh(c1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T                           # C1^(1/2)
    product = root @ c2 @ root
    trace_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    d = (f1.mean(0) - f2.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * trace_root
    return max(d.item(), 0.0)


def precision_recall(real, fake, k=3):
    """Precision and recall of two clouds of features: real (N, F), fake (M, F) -> floats in [0, 1].

    Kynkaanniemi et al. 2019 (1904.06991). The manifold of a cloud is the union of balls around its points,
    each reaching to the k-th neighbour. Precision: the share of fake inside the manifold of real. Recall: the
    share of real inside that of fake.
    """
    real = real.detach().cpu().double()
    fake = fake.detach().cpu().double()
    return share_inside(fake, real, k), share_inside(real, fake, k)


def share_inside(points, cloud, k):
    """The share of points (N, F) that lies inside the manifold of cloud (M, F) -> float in [0, 1].

    1000 rows at a time, for N x M numbers may not fit into memory.
    """
    radius = torch.cat([torch.cdist(rows, cloud).kthvalue(k + 1).values         # k + 1: the nearest is itself
                        for rows in cloud.split(1000)])
    hits = torch.cat([(torch.cdist(rows, cloud) <= radius).any(1) for rows in points.split(1000)])
    return hits.double().mean().item()


def mean_iou(predicted, true, num_classes):
    """Label maps (N, H, W) int64 -> mean intersection over union of the classes that occur, in [0, 1].

    Pixels of the whole set are counted together, as PASCAL VOC does.
    """
    pairs = (true * num_classes + predicted).flatten()                   # a number for each (true, predicted)
    counts = pairs.cpu().bincount(minlength=num_classes**2).view(num_classes, num_classes).double()
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return (counts.diagonal() / union)[union > 0].mean().item()


# ---- The rule that reads drawn pictures ----------------------------------------------------------

@torch.no_grad()
def read_scene(images, sizes=4, tilts=7):
    """What drawn pictures show, read off their pixels: images (N, 3, H, W) in [-1, 1] -> {name: (N,) int64}.

    background: the nearest of data.BACKGROUNDS to the median colour of the border. colour: the nearest of
    data.COLOURS to the median of the 3% of pixels farthest from it. The cover of a pixel is how far it is on
    the way from the one to the other; it tells the shape, see read_shape. No network, nothing learned.
    """
    H, W = images.shape[-2:]
    edges = [images[:, :, 0], images[:, :, -1], images[..., 0], images[..., -1]]
    ground = torch.cat(edges, -1).median(-1).values                                   # (N, 3)
    away = images - ground[:, :, None, None]
    far = away.norm(dim=1).flatten(1).topk(H * W // 32).indices                       # (N, 3% of the pixels)
    colour = images.flatten(2).gather(2, far[:, None].expand(-1, 3, -1)).median(-1).values            # (N, 3)
    axis = (colour - ground)[:, :, None, None]
    cover = ((away * axis).sum(1) / axis.square().sum(1).clamp(min=1e-6)).clamp(0, 1)              # (N, H, W)
    return dict(shape=read_shape(cover, sizes, tilts), colour=nearest_colour(colour, data.COLOURS),
                background=nearest_colour(ground, data.BACKGROUNDS))


def nearest_colour(x, colours):
    """x (N, 3) in [-1, 1], colours {name: (r, g, b) of 0 to 255} -> the nearest one's number, (N,) int64."""
    values = torch.tensor(list(colours.values()), device=x.device) / 127.5 - 1
    return torch.cdist(x, values).argmin(1)


def read_shape(cover, sizes, tilts):
    """The shape whose drawing differs least, in squares, from cover (N, H, W) in [0, 1] -> (N,) int64.

    Each of the ten is laid on the centre of mass of the cover, at each of `sizes` sizes and `tilts` tilts.
    """
    N, H, _ = cover.shape
    device = cover.device
    line = (torch.arange(H, device=device) + 0.5) * (2 / H) - 1
    mass = cover.sum((1, 2)).clamp(min=1e-6)
    mx = (cover.sum(1) * line).sum(1) / mass
    my = (cover.sum(2) * line).sum(1) / mass
    fine = torch.linspace(-1.2, 1.2, 96, device=device)
    fy, fx = torch.meshgrid(fine, fine, indexing="ij")
    least = torch.full((N,), math.inf, device=device)
    shape = torch.zeros(N, dtype=torch.long, device=device)
    for k in range(len(data.SHAPES)):
        inside = data.distance(k, fx, fy) < 0                             # for the shape's own centre of mass
        ox = fx[inside].mean()
        oy = fy[inside].mean()
        for r in torch.linspace(data.SMALL, data.LARGE, sizes, device="cpu").tolist():
            for tilt in torch.linspace(-data.TILT, data.TILT, tilts, device="cpu").tolist():
                cos = math.cos(tilt)
                sin = math.sin(tilt)
                dx = line[None, None] - (mx - r * (cos * ox - sin * oy))[:, None, None]            # (N, 1, W)
                dy = line[None, :, None] - (my - r * (sin * ox + cos * oy))[:, None, None]         # (N, H, 1)
                d = data.distance(k, (cos * dx + sin * dy) / r, (cos * dy - sin * dx) / r) * r
                error = ((0.5 - d * (H / 2)).clamp(0, 1) - cover).square().sum((1, 2))
                shape = torch.where(error < least, k, shape)
                least = torch.minimum(least, error)
    return shape


# ---- Captions of the drawn world: are they obeyed? -----------------------------------------------

def unseen_captions(run, n):
    """n captions of the drawn world that describe no training image -> texts, {name: (n,) int64} of them."""
    seen = set(captions.of_images(run.args, runs.open_split(run.args, "train", run.device), "train"))
    texts = {}
    start = data.VAL_INDEX
    while len(texts) < n and start < data.VAL_INDEX + 100_000:
        index = torch.arange(start, start + 1000, device="cpu")
        s = data.scene(index, run.args.seed)
        for i, text in enumerate(data.captions(index, run.args.seed)):
            if text not in seen and text not in texts and len(texts) < n:
                texts[text] = [s[name][i].item() for name in ("label", "colour", "background")]
        start += 1000
    if len(texts) < n:
        raise data.BadInput(f"--n {n}: only {len(texts)} captions of the drawn world are not in the "
                            "training set")
    wanted = torch.tensor(list(texts.values()), device="cpu").T                       # (3, n)
    return list(texts), dict(zip(("shape", "colour", "background"), wanted))


def measure_captions(run, n, **options):
    """Does a run with captions of the drawn world draw what n unseen ones ask for? -> rows as in evaluate.py.

    read_scene judges. It is first tried on real images, for its own errors are the limit. options: keywords
    of drawing.draw_samples.
    """
    index = torch.arange(data.VAL_INDEX, data.VAL_INDEX + 500, device="cpu")
    real = data.draw(index, run.args.image_size, run.args.seed)[0]
    s = data.scene(index, run.args.seed)
    read = read_scene(real)
    rows = []
    for name, key in (("shape", "label"), ("colour", "colour"), ("background", "background")):
        right = (read[name] == s[key]).float().mean().item()
        text = f"the rule on 500 real images: {name}"
        rows.append((f"rule_{name}", text, 100 * right, "%", "its own limit"))
    texts, wanted = unseen_captions(run, n)
    images = drawing.draw_captions(run, texts, **options)
    read = read_scene(images.clamp(-1, 1))
    right = {name: read[name].cpu() == wanted[name] for name in wanted}
    right["all three"] = right["shape"] & right["colour"] & right["background"]
    for name, hits in right.items():
        rows.append((f"caption_{name.replace(' ', '_')}", f"{n} unseen captions, {name} as asked",
                     100 * hits.float().mean().item(), "%", "higher is better"))
    return rows


# ---- The real FID, by an optional package --------------------------------------------------------

def import_clean_fid():
    """-> clean-fid's module; BadInput, with the command that installs it, where it is missing."""
    try:
        from cleanfid import fid
    except ImportError as e:
        raise data.BadInput(f"--fid: needs an optional package ({e}): pip install clean-fid") from None
    return fid


def clean_fid(module, images, val_set, index, device):
    """The FID of samples (N, 3, H, W) to the real images at index (M,), by clean-fid's Inception network."""
    features = {}
    with tempfile.TemporaryDirectory() as folder:
        real = (val_set.batch(i)[0] for i in index.split(250))
        for name, parts in (("real", real), ("fake", images.split(250))):
            Path(folder, name).mkdir()
            for p, part in enumerate(parts):
                for k, image in enumerate(pictures.to_uint8(part).permute(0, 2, 3, 1).cpu().numpy()):
                    Image.fromarray(image).save(Path(folder, name, f"{p}-{k}.png"))
        try:
            inception = module.build_feature_extractor("clean", device)
        except OSError as e:
            raise data.BadInput(f"--fid: clean-fid could not download its Inception network ({e})") from None
        for name in ("real", "fake"):
            array = module.get_folder_features(str(Path(folder, name)), inception, num_workers=0,
                                               device=device, mode="clean", verbose=False)
            features[name] = torch.from_numpy(array)
    return frechet_distance(features["fake"], features["real"])


# ---- Rows: what was measured on a run ------------------------------------------------------------
# A row is (key in metrics.json, name, number or (number, standard error), unit, remark).

def print_rows(rows):
    """Rows -> a printed table."""
    lines = []
    for _, name, value, unit, remark in rows:
        value, *error = value if isinstance(value, tuple) else (value,)
        lines.append((name, f"{value:.3f}" + "".join(f" +- {e:.3f}" for e in error), unit, remark))
    wide = [max(len(line[column]) for line in lines) for column in range(3)]
    for name, number, unit, remark in lines:
        print(f"{name:{wide[0]}}  {number:>{wide[1]}}  {unit:{wide[2]}}  {remark}")


def save_rows(folder, rows, keep=lambda key: True, **more):
    """Write rows and more entries to metrics.json in a run folder. Entries of it that keep() names stay."""
    path = Path(folder) / "metrics.json"
    before = {key: value for key, value in read_metrics(path).items() if keep(key)}
    entries = {}
    for key, _, value, _, _ in rows:
        value, *error = value if isinstance(value, tuple) else (value,)
        entries[key] = value
        entries.update({f"{key}_error": e for e in error})
    entries.update(more)
    entries = {key: value for key, value in before.items() if key not in entries} | entries
    try:
        path.write_text(json.dumps(entries, indent=1) + "\n")
    except OSError as e:
        raise data.BadInput(f"could not write {path} ({e})") from None
    print(f"wrote {path}")


def read_metrics(path):
    """metrics.json -> its entries, {} where it is absent or, with a printed line, damaged."""
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text())
        if not isinstance(entries, dict):
            raise ValueError("not a table")
        return entries
    except (OSError, ValueError, RecursionError) as e:
        print(f"{path}: damaged ({e}); it is written anew")
        return {}
