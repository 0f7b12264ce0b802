"""
Sharp reconstructions: VQGAN's perceptual and adversarial losses, around any tokenizer.

Few tokens cannot hold every pixel. Whatever the decoder does not know, squared error asks it to average:
grass becomes green felt. VQGAN (Esser et al. 2020, arxiv.org/abs/2012.09841) adds two terms. LPIPS
(arxiv.org/abs/1801.03924) compares features of a classifier instead of pixels. A discriminator d, trained
along with the tokenizer to tell patches of its output from real ones, makes it invent detail that could be
real:

    loss = |x - x'|^2 + LPIPS(x, x') - w * mean d(x')  +  w * hinge(d(x), d(x')),   w = 0 or 0.5

The third term moves the tokenizer only, the fourth the discriminator only, so one backward pass and one
optimiser serve both. The weights are LlamaGen's (arxiv.org/abs/2406.06525): w is 0 for the first 20,000
steps.

Shapes:  B batch, F frames, H W pixels, x' = decode(encode(x))

    x (B, 3, [F,] H, W) --tokenizer.reconstruct--> x' (B, 3, [F,] H, W)      clips count frame by frame
    x, x' --LPIPS or ClassifierFeatures--> distance (B,)
    x or x' --PatchDiscriminator--> a logit per patch (B, 1, h, w)

    python perceptual_gan.py   # what each term does to texture, writes perceptual_gan.png; about 30 s

Try it yourself:
  1. --gan_weight 0.5, LlamaGen's, who train 1000 times longer: what do the pictures lose?
  2. Give the third model adaptive=True and gan_weight=0.5 and print model.balance: which weight is that?
  3. Take .detach() away in duel(): the discriminator's loss then moves the tokenizer too. Which way?
"""
import argparse
import copy
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

SIZES = {
    "patchgan": dict(ndf=64, n_layers=3),                   # 2,765,633 parameters: pix2pix, VQGAN, LlamaGen
    "medium": dict(ndf=32, n_layers=2),                     # 167,841
    "small": dict(ndf=32, n_layers=1),                      # 35,489
}


# ---- The discriminator and the two sides of its game -----------------------------------------------

class PatchDiscriminator(nn.Module):
    """PatchGAN (pix2pix, 1611.07004): images (B, C, H, W) -> logits (B, 1, h, w), high where x looks real.

    It sees patches, not pictures: one logit sees 70 x 70 pixels with n_layers=3, 34 x 34 with 2, 16 x 16 with
    1. So it asks for texture and sharp edges and leaves it to the other terms which picture this is. Weights
    of VQGAN's and LlamaGen's discriminators load as they are (main.0.weight ...).
    """

    def __init__(self, ndf=64, n_layers=3, channels=3):
        super().__init__()
        c = ndf
        layers = [nn.Conv2d(channels, ndf, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, n_layers + 1):
            c_out = ndf * min(2**i, 8)
            stride = 2 if i < n_layers else 1               # the last of them keeps the resolution
            layers += [nn.Conv2d(c, c_out, 4, stride, 1, bias=False), nn.BatchNorm2d(c_out)]
            layers.append(nn.LeakyReLU(0.2))
            c = c_out
        self.main = nn.Sequential(*layers, nn.Conv2d(c, 1, 4, 1, 1))
        for layer in self.main:                             # DCGAN's initialisation, as published
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1, 0.02)

    @classmethod
    def for_images(cls, image_size, channels=3):
        """The published one from 128 pixels on, smaller ones below, so that a patch is a part of it."""
        size = "patchgan" if image_size >= 128 else "medium" if image_size > 48 else "small"
        return cls(**SIZES[size], channels=channels)

    def forward(self, images):                              # (B, C, H, W) -> (B, 1, h, w)
        return self.main(images)


def discriminator_loss(real, fake, kind="hinge"):
    """What the discriminator minimises: its logits on real images and reconstructions, any shapes -> loss ().

    hinge: [ relu(1 - real) + relu(1 + fake) ] / 2, which stops caring beyond a margin of 1. non-saturating:
    [ -log sigmoid(real) - log sigmoid(-fake) ] / 2, plain binary classification. A blind one has 1 or ln 2.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())
    return 0.5 * (F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean())


def generator_loss(fake, kind="hinge"):
    """What the tokenizer minimises: logits of its reconstructions, any shape -> loss ().

    hinge: -fake. non-saturating: -log sigmoid(fake). (LlamaGen's code swaps logit and target in the latter,
    which it does not use.)
    """
    return -fake.float().mean() if kind == "hinge" else F.softplus(-fake.float()).mean()


# ---- Perceptual distances ---------------------------------------------------------------------------

def unit_channels(f):
    """Feature maps (B, C, h, w) -> float32, of length 1 over the channels at each position; zeros stay zeros.

    The epsilon is under the root, where LPIPS adds it to the norm: the gradient of a norm at 0 is nan.
    """
    f = f.float()
    return f / (f.square().sum(1, keepdim=True) + 1e-20).sqrt()


def taps(layers, x, after):
    """Run x through a Sequential -> list of its outputs after the layers whose positions are in `after`."""
    maps = []
    for i, layer in enumerate(layers):
        x = layer(x)
        if i in after:
            maps.append(x)
    return maps


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018, 1801.03924).

    VGG16 features, whose channels are weighted so that distances agree with people's. The published dropout
    on the weights is left out: LlamaGen trains with it switched on. LPIPS() has random weights: the published
    ones come from official.lpips.load_lpips.
    """

    STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))                 # width, convolutions

    def __init__(self):
        super().__init__()
        c = 3
        layers = []
        self.after = []
        self.lins = nn.ModuleList()
        for width, n in self.STAGES:                        # numbered as torchvision numbers VGG16's features
            if layers:
                layers.append(nn.MaxPool2d(2))
            for _ in range(n):
                layers += [nn.Conv2d(c, width, 3, padding=1), nn.ReLU()]
                c = width
            self.after.append(len(layers) - 1)              # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
            self.lins.append(nn.Conv2d(c, 1, 1, bias=False))
        self.features = nn.Sequential(*layers)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)

    def forward(self, a, b):
        """Images a, b (B, 3, H, W) in [-1, 1], at least 16 x 16 -> distance (B,), 0 for equal ones.

        Both are shifted and scaled. taps() gives their features; each map goes through unit_channels(). The
        squared differences are weighted per channel by the layer's lin and summed over channels, averaged
        over positions, and summed over layers. (Equation 1)
        """
        maps_a, maps_b = [taps(self.features, (x - self.shift) / self.scale, self.after) for x in (a, b)]
        return sum((lin.weight * (unit_channels(f) - unit_channels(g)).square()).sum(1).mean((1, 2))
                   for lin, f, g in zip(self.lins, maps_a, maps_b))


class ClassifierFeatures(nn.Module):
    """A perceptual distance without downloads: LPIPS's formula with all weights 1, on any small classifier.

    net: a Sequential, of which the maps after each activation count (common/classifier.py's SmallCNN: pass
    net.stages), or a module that returns a list of maps. Score with another network than this one: a
    tokenizer learns to please the classifier that it is trained against.
    """

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.after = None
        if isinstance(net, nn.Sequential):
            activations = nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU
            self.after = tuple(i for i, layer in enumerate(net) if isinstance(layer, activations))
            if not self.after:
                raise ValueError("ClassifierFeatures found no activation among the layers of this Sequential")

    def maps(self, images):                                 # (B, 3, H, W) -> [(B, C, h, w), ...]
        images = images.contiguous(memory_format=torch.channels_last)                 # faster on a CPU
        return self.net(images) if self.after is None else taps(self.net, images, self.after)

    def forward(self, a, b):
        """Images a, b (B, 3, H, W) in [-1, 1] -> distance (B,), 0 to 4, a mean over layers and positions."""
        pairs = list(zip(self.maps(a), self.maps(b), strict=True))
        total = sum((unit_channels(f) - unit_channels(g)).square().sum(1).mean((1, 2)) for f, g in pairs)
        return total / len(pairs)


def freeze(net):
    """A copy of net that cannot change.

    Its numbers become buffers that follow .to(device), but no optimiser finds them as parameters, and no
    checkpoint holds 59 MB of VGG16.
    """
    net = copy.deepcopy(net).eval()
    for module in net.modules():
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            delattr(module, name)
            module.register_buffer(name, value.detach(), persistent=False)
    return net


# ---- Tokenizer + discriminator + perceptual distance = tokenizer -------------------------------------

def as_frames(x):
    """Clips (B, C, F, H, W) -> images (B * F, C, H, W); images stay as they are."""
    return x.transpose(1, 2).flatten(0, 1) if x.ndim == 5 else x


class AdversarialTokenizer(nn.Module):
    """A tokenizer around any tokenizer, trained with the loss at the top of this file. Keep .tokenizer of it.

    discriminator, perceptual: None leaves the term out. gan: "hinge" or "non-saturating". start: training
    steps before the discriminator has a say and learns. pixel_loss: F.mse_loss as LlamaGen, F.l1_loss as
    VQGAN. gan_weight also multiplies the discriminator's own loss, as published; to Adam that makes no
    difference. adaptive, last_layer: see adaptive_weight; LlamaGen leaves it off.

    Gradients of both networks are there after one backward pass. Clip each on its own, as published: the
    discriminator's is often the larger by far.
    """

    def __init__(self, tokenizer, discriminator=None, perceptual=None, gan="hinge", gan_weight=0.5,
                 perceptual_weight=1.0, start=20_000, pixel_loss=F.mse_loss, adaptive=False, last_layer=None):
        super().__init__()
        if gan not in ("hinge", "non-saturating"):
            raise ValueError(f"gan {gan!r} must be 'hinge' or 'non-saturating'")
        if getattr(tokenizer, "likelihood", "mse") != "mse":
            raise ValueError(f"likelihood {tokenizer.likelihood!r} is an exact bound, which these losses "
                             "spoil: use 'mse'")
        self.seq_len = tokenizer.seq_len
        self.grid = tokenizer.grid
        self.token_dim = tokenizer.token_dim
        self.vocab_size = tokenizer.vocab_size
        self.tokenizer = tokenizer
        self.discriminator = discriminator
        self.perceptual = None if perceptual is None else freeze(perceptual)
        self.gan = gan
        self.gan_weight = gan_weight
        self.perceptual_weight = perceptual_weight
        self.start = start
        self.pixel_loss = pixel_loss
        self.adaptive = adaptive
        self.last_layer = last_layer
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # forward passes while training
        self.register_buffer("balance", torch.ones(()))                        # the latest adaptive weight
        if adaptive and last_layer is None:
            matrices = [n for n, p in tokenizer.named_parameters() if n.startswith("decoder.") and p.ndim > 1]
            if not matrices:
                raise ValueError("adaptive: this tokenizer has no decoder.*, so name the weight, last_layer")
            self.last_layer = matrices[-1]

    def train(self, mode=True):
        """As usual, but the perceptual network stays in eval mode, batch norms and dropouts included."""
        super().train(mode)
        if self.perceptual is not None:
            self.perceptual.eval()
        return self

    def adaptive_weight(self, others, adversarial):
        """VQGAN's weight |grad others| / (|grad adversarial| + 1e-4) of two losses () -> (), at most 1e4.

        The gradients are those of last_layer, a parameter of the tokenizer, by default the weight of the
        decoder's last layer, and | | is their Euclidean norm. So it costs two more passes through that layer
        only. The weight is detached, no .grad is touched, and both losses can still be differentiated.
        Without gradients (validation) it is the weight of the last training step. (VQGAN eq. 7)
        """
        if torch.is_grad_enabled():
            weight = self.tokenizer.get_parameter(self.last_layer)
            a = torch.autograd.grad(others, weight, retain_graph=True)[0].float().norm()
            b = torch.autograd.grad(adversarial, weight, retain_graph=True)[0].float().norm()
            self.balance.copy_((a / (b + 1e-4)).clamp(max=1e4))
        return self.balance.clone()

    def duel(self, x, x_hat, others):
        """Both sides of the game on images and reconstructions (B, 3, H, W) -> loss (), logs.

        others (): the terms that the adaptive weight compares with.
        """
        # The tokenizer's side: constants in place of the discriminator's parameters get no gradient.
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        logits = torch.func.functional_call(self.discriminator, frozen, (x_hat,))
        adversarial = generator_loss(logits, self.gan)
        # The discriminator's side: a detached reconstruction. Real and fake have their own batch statistics.
        # The published loop has two optimisers and two backward passes, the tokenizer's first. LlamaGen's
        # discriminator then sees the same x' as here, so only separate clipping sets the two apart. VQGAN's
        # reconstructs anew with the stepped tokenizer, at the price of another forward pass.
        real = self.discriminator(x)
        fake = self.discriminator(x_hat.detach())
        own = discriminator_loss(real, fake, self.gan)
        weight = self.gan_weight * (self.steps >= self.start)                    # a tensor: no wait for a GPU
        if self.training:
            self.steps += 1
        logs = {"gan": adversarial.detach(),
                "discriminator_real": real.detach().float().mean(),
                "discriminator_fake": fake.detach().float().mean()}
        if self.adaptive:
            logs["adaptive"] = self.adaptive_weight(others, adversarial)
            adversarial = logs["adaptive"] * adversarial
        logs["discriminator"] = (weight * own).detach()
        return weight * adversarial + weight * own, logs

    def forward(self, images, labels=None):
        """images (B, 3, [F,] H, W) in [-1, 1] -> loss (), logs.

        logs: recon, perceptual and gan, all unweighted; discriminator, what it adds to the loss;
        discriminator_real and discriminator_fake, its mean logits; adaptive; and the tokenizer's own.
        """
        recon, auxiliary, logs = self.tokenizer.reconstruct(images)
        if getattr(self.tokenizer, "channels", 3) == 1:         # grey must not be found by its lack of colour
            images = images.mean(1, keepdim=True).expand_as(images)
        x = as_frames(images)
        x_hat = as_frames(recon)
        others = self.pixel_loss(x_hat, x)
        logs = {"recon": others.detach(), **logs}
        if self.perceptual is not None:
            distance = self.perceptual(x_hat, x).mean()
            others = others + self.perceptual_weight * distance
            logs["perceptual"] = distance.detach()
        loss = others + auxiliary
        if self.discriminator is not None:
            game, more = self.duel(x, x_hat, others)
            loss = loss + game
            logs = logs | more
        return loss, logs

    def reconstruct(self, images):
        return self.tokenizer.reconstruct(images)

    def encode(self, images):
        return self.tokenizer.encode(images)

    def decode(self, tokens):
        return self.tokenizer.decode(tokens)


# ---- Demo --------------------------------------------------------------------------------------------

class TinyAutoencoder(nn.Module):
    """32 x 32 images through 16 tokens of 4 numbers, 48 times fewer: what does not fit is lost."""

    seq_len, grid, token_dim, vocab_size = 16, (4, 4), 4, None

    def __init__(self, width=32):
        super().__init__()
        def conv(c_in, c_out, *size):
            return [nn.Conv2d(c_in, c_out, *size), nn.SiLU()]

        up = nn.Upsample(scale_factor=2)
        self.encoder = nn.Sequential(*conv(3, width, 4, 2, 1), *conv(width, 2 * width, 4, 2, 1),
                                     *conv(2 * width, 2 * width, 4, 2, 1), nn.Conv2d(2 * width, 4, 3, 1, 1))
        self.decoder = nn.Sequential(*conv(4, 2 * width, 3, 1, 1), up, *conv(2 * width, 2 * width, 3, 1, 1),
                                     up, *conv(2 * width, width, 3, 1, 1),
                                     up, *conv(width, width, 3, 1, 1),
                                     nn.Conv2d(width, 3, 3, 1, 1))

    def reconstruct(self, images):
        return self.decoder(self.encoder(images)), images.new_zeros(()), {}

    @torch.no_grad()
    def encode(self, images):
        return self.encoder(images).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def decode(self, tokens):
        return self.decoder(tokens.transpose(1, 2).unflatten(2, self.grid)).clamp(-1, 1)


def grainy(index):
    """Shapes in grain that 64 numbers cannot hold: index (N,) -> images (N, 3, 32, 32), labels (N,)."""
    import data
    images, labels, masks, _ = data.draw(index)
    grain = torch.randint(2, (len(index), 1, 16, 16), device=index.device) - 0.5     # a coin per 2 x 2 pixels
    grain = grain.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return (images + grain * (masks > 0)[:, None]).clamp(-1, 1), labels


def small_classifier(images, labels, seed, steps=120):
    """Three convolutions that learn to tell the shapes apart -> the Sequential of them, in eval mode."""
    torch.manual_seed(seed)
    layers = []
    for c_in, c_out, stride in ((3, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers += [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
    stages = nn.Sequential(*layers).to(images.device, memory_format=torch.channels_last)
    classify = nn.Linear(64, 10).to(images.device)
    opt = torch.optim.AdamW([*stages.parameters(), *classify.parameters()], lr=4e-3)
    for step in range(steps):
        i = torch.randint(len(images), (64,), device=images.device)
        loss = F.cross_entropy(classify(stages(images[i]).mean((2, 3))), labels[i])
        opt.zero_grad()
        loss.backward()
        opt.step()
    return stages.eval()


def fit_adversarial(model, images, steps, lr, batch_size=16):
    """Train on images (N, 3, H, W) -> seconds. One optimiser and one backward pass for both networks."""
    opt = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.5, 0.9))
    start = time.perf_counter()
    for step in range(steps):
        opt.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / steps)
        loss, _ = model(images[torch.randint(len(images), (batch_size,), device=images.device)])
        opt.zero_grad()
        loss.backward()
        for part in (model.tokenizer, model.discriminator):
            if part is not None:
                nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        opt.step()
    return time.perf_counter() - start


def sharpness(images):
    """Mean absolute difference of neighbouring pixels: (N, C, H, W) -> ()."""
    return (images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()) / 2


def draw_results(rows, path):
    """rows: (text, images (n, 3, 32, 32)) -> a PNG with images, and enlarged patches of three."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    n, patches = 6, 3
    fig, axes = plt.subplots(len(rows), n + patches, figsize=(13, 6.1))
    for line, (text, images) in zip(axes, rows):
        picture = ((images.float().cpu() + 1) / 2).permute(0, 2, 3, 1)              # (n, 32, 32, 3) in [0, 1]
        for i, ax in enumerate(line):
            ax.imshow(picture[i] if i < n else picture[i - patches, 8:20, 4:16], interpolation="nearest")
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(text, rotation=0, ha="right", va="center", labelpad=8, fontsize=10.5)
    axes[0, 2].set_title("held-out images", fontsize=11)
    axes[0, n + 1].set_title("12 x 12 pixels of the last three", fontsize=11)
    fig.suptitle("perceptual_gan.py: 64 numbers cannot hold the grain. Squared error averages it away, a "
                 "perceptual\ndistance helps a little, and the discriminator makes the decoder invent grain: "
                 "sharp, but farther off", fontsize=12)
    fig.subplots_adjust(left=0.165, right=0.995, bottom=0.01, top=0.84, wspace=0.05, hspace=0.05)
    fig.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description="What do LPIPS and a discriminator add to squared error?")
    parser.add_argument("--steps", type=int, default=600, help="of squared error, half as many of each loss")
    parser.add_argument("--perceptual_weight", type=float, default=4.0, help="of the perceptual distance")
    parser.add_argument("--gan_weight", type=float, default=0.1, help="of the adversarial terms (paper: 0.5)")
    args = parser.parse_args()
    import data
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    images, labels = grainy(torch.arange(2000, device=device))
    held_out, _ = grainy(torch.arange(64, device=device) + data.VAL_INDEX)
    teacher = ClassifierFeatures(small_classifier(images, labels, seed=1))
    other = ClassifierFeatures(small_classifier(images, labels, seed=2))              # not trained against
    first = TinyAutoencoder().to(device, memory_format=torch.channels_last)           # faster on a CPU
    seconds = fit_adversarial(AdversarialTokenizer(first), images, args.steps, lr=4e-3)
    print(f"{args.steps} steps of squared error, where all three begin: {seconds:.0f} s")
    rows = [("the images", held_out)]
    losses = (("squared error", None, None), ("+ perceptual", teacher, None),
              ("+ discriminator", teacher, PatchDiscriminator.for_images(32)))
    for name, perceptual, discriminator in losses:
        torch.manual_seed(0)
        model = AdversarialTokenizer(copy.deepcopy(first), discriminator, perceptual, start=0,
                                     gan_weight=args.gan_weight, perceptual_weight=args.perceptual_weight)
        model.to(device, memory_format=torch.channels_last)
        seconds = fit_adversarial(model, images, args.steps // 2, lr=2e-3)
        x_hat = model.decode(model.encode(held_out))
        with torch.no_grad():
            mse = F.mse_loss(x_hat, held_out)
            own = teacher(x_hat, held_out).mean()
            distance = other(x_hat, held_out).mean()
        sharp = 100 * sharpness(x_hat) / sharpness(held_out)
        print(f"{name:15s} squared error {mse:.4f}   feature distance {distance:.3f} ({own:.3f} by the "
              f"network trained against)   sharpness {sharp:3.0f}% of the images'   "
              f"{1000 * seconds / (args.steps // 2):.0f} ms per step")
        rows.append((f"{name}\n\nMSE {mse:.3f}\ndistance {distance:.3f}\nsharpness {sharp:.0f}%", x_hat))
    draw_results(rows, "perceptual_gan.png")
    print("wrote perceptual_gan.png")


if __name__ == "__main__":
    main()
