"""
The small classifiers of real images and clips. They judge samples, and serve as perceptual features.

Inception, whose features the FID compares, is a large download and knows little about 32-pixel shapes. So a
small CNN learns to classify the REAL training images, once per data set, and its 128 features replace
Inception's. It is kept in the folder cache beside the run folders. evaluate.py and train.py --perceptual
share the code, with different seeds, so that no tokenizer is trained on what judges it.

    net, accuracy = classifier_for(args, folder, device)      # trained once, then read from the cache
    features, predicted = look(net, images)                   # (B, 128), (B,)

Where the data have one class there is nothing to classify. Then it learns which way up an image is, one of
four quarter turns, which needs to know what things look like (Gidaris et al. 2018, 1803.07728): its features
serve, its classes tell nothing. Training takes 40 s for the drawn shapes on one core of an AMD EPYC.

Shapes:  B images or clips, F frames, H W pixels; images (B, 3, H, W) and clips (B, 3, F, H, W) in [-1, 1]
"""
import hashlib
import inspect
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from common import runs


# ---- The networks --------------------------------------------------------------------------------

class SmallCNN(nn.Module):
    """Four convolutions, a global average, 128 features, num_classes logits. Any image size from 8 pixels."""

    def __init__(self, num_classes, n_features=128):
        super().__init__()
        layers = []
        width = 3
        for n_out, stride in ((32, 1), (64, 2), (128, 2), (128, 2)):
            layers += [nn.Conv2d(width, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()]
            width = n_out
        self.stages = nn.Sequential(*layers)
        self.embed = nn.Linear(width, n_features)
        self.norm = nn.BatchNorm1d(n_features, affine=False)           # unit variance: distances have a scale
        self.classify = nn.Linear(n_features, num_classes)

    def features(self, images):
        """images (B, 3, H, W) in [-1, 1] -> (B, 128) float32: mean 0, variance 1 over training images."""
        if images.shape[-1] > 64:                                 # a large image costs no more than 64 pixels
            images = F.adaptive_avg_pool2d(images, 64)
        x = self.stages(images.contiguous(memory_format=torch.channels_last))         # (B, 128, H/8, W/8)
        return self.norm(self.embed(x.mean((2, 3))).float())

    def forward(self, images):
        """images (B, 3, H, W) -> logits (B, num_classes)"""
        return self.classify(self.features(images).relu())


class ClipCNN(nn.Module):
    """SmallCNN with a third dimension, time: (B, 3, F, H, W) -> num_classes logits. From 8 pixels."""

    def __init__(self, num_classes, n_features=128):
        super().__init__()
        layers = []
        width = 3
        for n_out, stride in ((24, 1), (48, 2), (96, 2), (128, 2)):
            layers += [nn.Conv3d(width, n_out, 3, stride, 1, bias=False), nn.BatchNorm3d(n_out), nn.ReLU()]
            width = n_out
        self.stages = nn.Sequential(*layers)
        self.embed = nn.Linear(width, n_features)
        self.norm = nn.BatchNorm1d(n_features, affine=False)
        self.classify = nn.Linear(n_features, num_classes)

    def features(self, clips):
        """clips (B, 3, F, H, W) in [-1, 1] -> (B, 128) float32: mean 0, variance 1 over training clips."""
        if clips.shape[-1] > 32:
            clips = F.adaptive_avg_pool3d(clips, (clips.shape[2], 32, 32))
        return self.norm(self.embed(self.stages(clips).mean((2, 3, 4))).float())

    def forward(self, clips):
        """clips (B, 3, F, H, W) -> logits (B, num_classes)"""
        return self.classify(self.features(clips).relu())


def new_classifier(image_set, device):
    """An untrained classifier for a data.ImageSet -> SmallCNN, or for one of clips ClipCNN, on device."""
    num_classes = len(image_set.classes)
    if num_classes == 1:
        num_classes = 4                                     # quarter turns
    if image_set.frames > 1:
        return ClipCNN(num_classes).to(device)
    return SmallCNN(num_classes).to(device, memory_format=torch.channels_last)


def turned(images):
    """images (B, 3, [F,] H, H) -> the same, each turned by 0 to 3 quarters, which (B,) int64."""
    turns = torch.arange(len(images), device=images.device) % 4
    views = torch.stack([images.rot90(k, (-2, -1)) for k in range(4)])                # (4, B, 3, [F,] H, H)
    return views[turns, torch.arange(len(images), device=images.device)], turns


# ---- Training, once per data set -----------------------------------------------------------------

def train_classifier(train_set, val_set, seed=0, steps=600, batch_size=128, lr=4e-3):
    """Train a SmallCNN, or a ClipCNN, on data.ImageSets -> the network in eval mode, its accuracy.

    The accuracy is of the validation images, in [0, 1]. The number of steps is fixed, so the result depends
    on the seed and the data only, not on how fast the machine is. A batch holds a fourth as many clips: each
    is a lesson of many frames.
    """
    device = train_set.device
    bf16 = runs.native_bf16(device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = new_classifier(train_set, device)
        batch_size = batch_size if train_set.frames == 1 else batch_size // 4
        opt = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps)
        for step in range(steps):
            images, labels = train_set.batch(data.order(len(train_set), batch_size, step, seed))
            if len(train_set.classes) == 1:
                images, labels = turned(images)
            dy, dx = torch.randint(5, (2,), device="cpu").tolist()        # move it by up to 2 pixels
            H, W = images.shape[-2:]
            edges = (2, 2, 2, 2) + (0, 0) * (images.ndim - 4)             # of a clip, all frames together
            images = F.pad(images, edges, mode="replicate")[..., dy:dy + H, dx:dx + W]
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                logits = net(images)
            loss = F.cross_entropy(logits.float(), labels)
            opt.zero_grad(set_to_none=True)
            loss.backward()
            opt.step()
            schedule.step()
    net.eval()
    return net, accuracy_of(net, val_set)


def accuracy_of(net, image_set, batch_size=250):
    """The share of an ImageSet that the network classifies rightly; with one class, of turned images."""
    right = []
    for i in torch.arange(len(image_set), device="cpu").split(batch_size):
        images, labels = image_set.batch(i)
        if len(image_set.classes) == 1:
            images, labels = turned(images)
        right.append(look(net, images)[1] == labels)
    return torch.cat(right).float().mean().item()


def classifier_for(args, folder, device, train_set=None, val_set=None, seed=0):
    """The classifier of a run's data -> SmallCNN or ClipCNN on device in eval mode, its accuracy in [0, 1].

    args: the flags of a run, and folder: its run folder. Trained once, then read from
    <parent of folder>/cache/classifier-<key>.pt. The key covers data, seed and source of the classifier, so
    an edited one is trained anew, and so is a damaged file, with a printed line. The flag --seed stays out of
    it, for what measures must not change.
    """
    if train_set is None:
        train_set = runs.open_split(args, "train", device)
    path = Path(folder).resolve().parent / "cache" / f"classifier-{cache_key(args, train_set, seed)}.pt"
    if path.exists():
        try:
            return read_classifier(path, train_set, device)
        except Exception as e:                                            # torch raises half a dozen kinds
            reason = (str(e) or type(e).__name__).splitlines()[0]
            print(f"{path}: not a readable classifier ({reason}); it is trained anew")
    start = time.perf_counter()
    if val_set is None:
        val_set = runs.open_split(args, "val", device)
    net, accuracy = train_classifier(train_set, val_set, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.save_atomically(dict(model=net.state_dict(), accuracy=accuracy), path)
    what = "images" if train_set.frames == 1 else "clips"
    print(f"trained a classifier of the real {what} in {time.perf_counter() - start:.0f} s, kept as {path}")
    return net, accuracy


def cache_key(args, train_set, seed):
    """12 hexadecimal digits that stand for the data (by 100 of the images), the seed and the code."""
    index = torch.linspace(0, len(train_set) - 1, 100, device="cpu").long()
    images = train_set.images[index].cpu()                                # (100, 3, [F,] H, W) uint8
    network = SmallCNN if train_set.frames == 1 else ClipCNN
    what = [str(args.data), tuple(images.shape), len(train_set), train_set.classes, seed,
            inspect.getsource(network), inspect.getsource(train_classifier)]
    return hashlib.sha1(repr(what).encode() + images.numpy().tobytes()).hexdigest()[:12]


def read_classifier(path, train_set, device):
    """A cached file -> the network in eval mode, its accuracy. Raises whatever a damaged file leads to."""
    saved = torch.load(path, map_location=device, weights_only=True)
    net = new_classifier(train_set, device).eval()
    net.load_state_dict(saved["model"])
    return net, float(saved["accuracy"])


# ---- What it sees --------------------------------------------------------------------------------

@torch.no_grad()
def look(net, images):
    """What the classifier sees in images (B, 3, H, W), or clips -> features (B, 128), classes (B,) int64."""
    features = net.features(images)
    return features, net.classify(features.relu()).argmax(-1)


def look_at_real(net, image_set, index, batch_size=250):
    """Real images of an ImageSet at index (N,) on the CPU -> features (N, 128), right or wrong (N,) bool."""
    features = []
    right = []
    for i in index.split(batch_size):
        images, labels = image_set.batch(i)
        f, predicted = look(net, images)
        features.append(f)
        right.append(predicted == labels)
    return torch.cat(features), torch.cat(right)
