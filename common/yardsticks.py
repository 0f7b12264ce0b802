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

LEARNT_FROM = 2000                                          # training images for PCA and k-means
PATCHES = 32_000                                            # for k-means, or 16 per code
MOST_CODES = 4096                                           # beyond that k-means takes minutes
COMPARED = 20_000                                           # training images, to find the nearest
SIDE = 16                                                   # pixels of the images that `nearest` compares


def some(image_set, n):
    """At most n images of a data.ImageSet, spread evenly -> (N, 3, H, W)."""
    index = torch.linspace(0, len(image_set) - 1, min(n, len(image_set)), device="cpu").long()
    return torch.cat([image_set.batch(part)[0] for part in index.split(500)])


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
    mse = (recon.clamp(-1, 1) - truth).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / mse.clamp(min=1e-10))).mean().item()


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


def kmeans(x, n, steps=10):
    """Rows x (N, P) -> n codes (n, P) by Lloyd's algorithm. An empty code moves to a random row."""
    codes = x[torch.randperm(len(x), device="cpu")[:n].to(x.device)]
    for _ in range(steps):
        ids = nearest_code(x, codes)
        count = torch.zeros(len(codes), device=x.device).index_add_(0, ids, torch.ones_like(x[:, 0]))
        total = torch.zeros_like(codes).index_add_(0, ids, x)
        elsewhere = x[torch.randint(len(x), (len(codes),), device="cpu").to(x.device)]
        codes = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], elsewhere)
    return codes


def nearest_code(x, codes):
    """Rows x (N, P), codes (V, P) -> the number of the nearest code of each (N,)."""
    half = codes.square().sum(1) / 2
    return torch.cat([(half - part @ codes.T).argmin(1) for part in x.split(8192)])


def kmeans_psnr(train_images, images, grid, vocab_size, seed=0):
    """PSNR in dB of images (M, 3, H, W) whose patches are the nearest of vocab_size codes, by k-means."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = to_patches(train_images.cpu(), grid).flatten(0, 1)
        chosen = torch.randperm(len(x), device="cpu")[:max(PATCHES, 16 * vocab_size)]
        codes = kmeans(x[chosen], vocab_size)
    y = to_patches(images.cpu(), grid)                                                # (M, T, n)
    return psnr_of(codes[nearest_code(y.flatten(0, 1), codes)].view_as(y), y)


def of_tokenizer(tokenizer, train_set, images):
    """What PCA or k-means of this tokenizer's size reaches on images (M, 3, H, W) -> rows for evaluate.py."""
    grid = square_grid(tokenizer, images.shape[-1])
    if not tokenizer.vocab_size:
        placed = grid if len(tokenizer.grid) == 2 else None
        n = tokenizer.token_dim if placed else tokenizer.token_dim * tokenizer.seq_len
        db = pca_psnr(some(train_set, LEARNT_FROM), images, placed, n)
        return [("pca_psnr_db", "PSNR of PCA of the same size", db, "dB", "no network: to be beaten")]
    if grid is None or tokenizer.vocab_size > MOST_CODES:
        return []
    db = kmeans_psnr(some(train_set, LEARNT_FROM), images, grid, tokenizer.vocab_size)
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


def nearest(images, others):
    """images (N, 3, H, W), others (M, 3, H, W) -> distance (N,) to the nearest of others, its number (N,).

    The distance is the root of the mean squared difference of pixel values, of images averaged to 16 x 16
    pixels, so that it is the objects that count and not the noise.
    """
    x = F.interpolate(images.float().cpu(), (SIDE, SIDE), mode="area").flatten(1)
    y = F.interpolate(others.float().cpu(), (SIDE, SIDE), mode="area").flatten(1)
    found = [torch.cdist(part, y).min(1) for part in x.split(500)]
    distance = torch.cat([values for values, _ in found]) / x.shape[1] ** 0.5
    return distance, torch.cat([indices for _, indices in found])


def nearest_rows(samples, images, training):
    """Samples, validation images and training images -> rows for evaluate.py: medians."""
    remark = "below that of validation images: learnt by heart"
    return [("nearest_samples", "distance to the nearest training image, samples",
             nearest(samples, training)[0].median().item(), "", remark),
            ("nearest_val", "distance to the nearest training image, validation",
             nearest(images, training)[0].median().item(), "", "of images that were never seen")]
