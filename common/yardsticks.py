"""
Yardsticks that need no network: what a run must beat, and two faults that its other numbers do not see.

    pca_psnr        real-valued tokens: the best linear autoencoder of as many numbers
    kmeans_psnr     ids: patches rounded to one of as many codes
    seams           are the borders of the patches seen in the pictures? A small classifier hardly notices
    nearest         are samples copies? Their distance to the training images, beside that of real images

A network that is worse than PCA or k-means of its size has learnt nothing that was worth the time.

Shapes:  N M images, H W pixels, h w grid of tokens, T = h * w, n = 3 * (H / h) * (W / w) numbers of a patch,
         D numbers in a token, V codes; images in [-1, 1]
"""
import math

import torch
import torch.nn.functional as F

import vq
from common.metrics import psnr

LEARNT_FROM = 2000                                          # training images for PCA and k-means ...
MOST_VALUES = 25_000_000                                    # ... or fewer, where they are larger than 64 x 64
PATCHES = 32_000                                            # for k-means, or 16 per code
MOST_CODES = 4096                                           # beyond that k-means takes minutes
COMPARED = 20_000                                           # training images, to find the nearest
SIDE = 16                                                   # pixels of the images that `nearest` compares


def spread(image_set, n):
    """The positions (N,) of at most n images of a data.ImageSet, spread evenly."""
    return torch.linspace(0, len(image_set) - 1, min(n, len(image_set)), device="cpu").long().unique()


def learnt_from(image_set):
    """The training images (N, 3, H, W) for PCA and k-means, on the CPU."""
    values = image_set.batch(torch.zeros(1, dtype=torch.long, device="cpu"))[0].numel()
    index = spread(image_set, min(LEARNT_FROM, max(100, MOST_VALUES // values)))
    return torch.cat([image_set.batch(part)[0].cpu() for part in index.split(250)])


def square_grid(tokenizer, image_size):
    """The grid (h, w) of a tokenizer; of tokens without a place a square of as many. None where none fits."""
    grid = tuple(tokenizer.grid)
    if len(grid) == 1:
        side = math.isqrt(grid[0])
        grid = (side, side)
    fits = len(grid) == 2 and grid[0] * grid[1] == tokenizer.seq_len and image_size % grid[0] == 0
    return grid if fits else None


def to_patches(images, grid):
    """images (N, 3, H, W) -> patches (N, T, n), row by row."""
    return F.pixel_unshuffle(images, images.shape[-1] // grid[1]).flatten(2).transpose(1, 2)


def psnr_of(recon, truth):
    """Mean PSNR in dB over rows that are images: (N, ...) in [-1, 1], recon cut to that range."""
    rows = (len(truth), 1, 1, -1)
    return psnr(truth.reshape(rows), recon.clamp(-1, 1).reshape(rows)).mean().item()


# ---- What a tokenizer must beat ------------------------------------------------------------------

def components(x, n):
    """Rows x (N, P) -> mean (P,) and the n principal components (P, n), the largest first."""
    mean = x.mean(0)
    x = (x - mean).double()
    tall = len(x) >= x.shape[1]
    _, vectors = torch.linalg.eigh(x.T @ x if tall else x @ x.T)                      # ascending
    vectors = vectors.flip(1)[:, :n]
    if not tall:                                            # of the N x N matrix: the same components
        vectors = F.normalize(x.T @ vectors, dim=0)
    return mean, vectors.float()


def pca_psnr(train_images, images, grid, n):
    """PSNR in dB of images (M, 3, H, W), rebuilt from n principal components of each patch of the grid.

    grid None: of whole images, with n numbers for an image. The components are those of train_images (N, 3,
    H, W). No linear autoencoder of that size is better on them (Baldi and Hornik 1989).
    """
    train_images = train_images.cpu()
    images = images.cpu()
    if grid is None:
        x = train_images.flatten(1)
        y = images.flatten(1)
    else:
        x = to_patches(train_images, grid).flatten(0, 1)                              # (N * T, n)
        y = to_patches(images, grid)                                                  # (M, T, n)
    mean, basis = components(x, n)
    return psnr_of((y - mean) @ basis @ basis.T + mean, y)


def kmeans_psnr(train_images, images, grid, vocab_size, seed=0):
    """PSNR in dB of images (M, 3, H, W) whose patches are the nearest of vocab_size codes, by k-means."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = to_patches(train_images.cpu(), grid).flatten(0, 1)
        chosen = torch.randperm(len(x), device="cpu")[:max(PATCHES, 16 * vocab_size)]
        codes, _ = vq.kmeans(x[chosen], vocab_size)
    y = to_patches(images.cpu(), grid)                                                # (M, T, n)
    ids = [vq.VectorQuantizer.distances(part, codes).argmin(1) for part in y.flatten(0, 1).split(4096)]
    return psnr_of(codes[torch.cat(ids)].view_as(y), y)


def of_tokenizer(tokenizer, train_set, images):
    """What PCA or k-means of this tokenizer's size reaches on images (M, 3, H, W) -> rows for evaluate.py."""
    grid = square_grid(tokenizer, images.shape[-1])
    if hasattr(tokenizer, "bits_per_dim"):                  # vae.Patches is PCA, of full rank
        return []
    if not tokenizer.vocab_size:
        placed = grid if len(tokenizer.grid) == 2 else None
        n = tokenizer.token_dim if placed else tokenizer.token_dim * tokenizer.seq_len
        db = pca_psnr(learnt_from(train_set), images, placed, n)
        return [("pca_psnr_db", "PSNR of PCA of the same size", db, "dB", "no network: to be beaten")]
    if grid is None or tokenizer.vocab_size > MOST_CODES:
        return []
    db = kmeans_psnr(learnt_from(train_set), images, grid, tokenizer.vocab_size)
    return [("kmeans_psnr_db", "PSNR of k-means of the same size", db, "dB", "no network: to be beaten")]


# ---- What other numbers do not see ---------------------------------------------------------------

def seams(images, patch):
    """Mean difference of neighbours across borders of patch x patch pixels, over that of all others.

    images (N, 3, H, W) -> float. 1 where borders are like any other place; drawn and photographed objects
    lie in the middle, so compare with real images.
    """
    across = (images[..., 1:] - images[..., :-1]).abs().double()                      # (N, 3, H, W - 1)
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().double().transpose(-1, -2)
    both = torch.cat([across.flatten(0, -2), down.flatten(0, -2)])                    # square images
    border = torch.arange(both.shape[1], device=both.device) % patch == patch - 1
    return (both[:, border].mean() / both[:, ~border].mean().clamp(min=1e-12)).item()


def seam_rows(tokenizer, **sets):
    """sets: name -> images (N, 3, H, W) -> rows for evaluate.py, where the tokens lie on a grid."""
    if len(tokenizer.grid) != 2:
        return []
    rows = []
    for name, images in sets.items():
        patch = images.shape[-1] // tokenizer.grid[1]
        if patch > 1:
            rows.append((f"seams_{name}", f"steps at patch borders, {name}", seams(images, patch), "",
                         "compare with real images"))
    return rows


def small(images):
    """images (N, 3, H, W) -> (N, 768), on the CPU: averages over parts. Objects count, and noise does not."""
    return F.interpolate(images.float(), (SIDE, SIDE), mode="area").flatten(1).cpu()


def nearest(images, image_set):
    """images (N, 3, H, W) -> distance (N,) to the nearest of a data.ImageSet, its position in the set (N,).

    The distance is the root of the mean squared difference of pixel values, of images averaged to 16 x 16
    pixels. Of a large set COMPARED images are looked at, spread evenly.
    """
    index = spread(image_set, COMPARED)
    others = torch.cat([small(image_set.batch(part)[0]) for part in index.split(250)])
    found = [torch.cdist(small(part), others).min(1) for part in images.split(500)]
    distance = torch.cat([values for values, _ in found]) / others.shape[1] ** 0.5
    return distance, index[torch.cat([indices for _, indices in found])]


def nearest_rows(of_samples, of_val):
    """Distances (N,) of samples and of validation images, from nearest() -> rows for evaluate.py: medians."""
    return [("nearest_samples", "distance to the nearest training image, samples",
             of_samples.median().item(), "", "below that of validation images: learnt by heart"),
            ("nearest_val", "distance to the nearest training image, validation",
             of_val.median().item(), "", "of images that were never seen")]
