"""
Sharp reconstructions: VQGAN's perceptual and adversarial losses, around any tokenizer.

Few tokens cannot hold every pixel, and whatever the decoder does not know, squared error asks it to average: grass
becomes green felt. VQGAN (Esser et al. 2020, https://arxiv.org/abs/2012.09841) asks two other judges. LPIPS
(https://arxiv.org/abs/1801.03924) compares features of a classifier instead of pixels, and a critic, trained along
with the tokenizer to tell patches of its output from real ones, makes it invent detail that could be real:

    loss = |x - x'|^2 + LPIPS(x, x') - w * mean critic(x')  +  w * hinge(critic(x), critic(x')),   w = 0 or 0.5

The third term moves the tokenizer only, the fourth the critic only, so one backward pass and one optimiser serve
both. The weights are LlamaGen's (https://arxiv.org/abs/2406.06525): w is 0 for the first 20,000 steps.

Shapes:  B batch, F frames, H W pixels, x' = decode(encode(x))

    x (B, 3, [F,] H, W) --tokenizer.reconstruct--> x' (B, 3, [F,] H, W)    clips are judged frame by frame
    x, x' --LPIPS or ClassifierFeatures--> distance (B,)      x or x' --PatchCritic--> a logit per patch (B, 1, h, w)

    python perceptual_gan.py   # what each term does to texture, writes perceptual_gan.png; about 30 s on 2 CPU cores

Try it yourself:
  1. --gan_weight 0.5, LlamaGen's, who train 1000 times longer: what do the pictures lose, and which number tells?
  2. Give the third model adaptive=True and gan_weight=0.5, and print model.balance: which fixed weight is that?
  3. Take .detach() away in duel(): the critic's loss then moves the tokenizer too. Which way, and how far?
"""
import argparse
import copy
import re
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

SIZES = {
    "patchgan": dict(ndf=64, n_layers=3),                   # 2,765,633 parameters: pix2pix, VQGAN, LlamaGen, at 256 pixels
    "medium": dict(ndf=32, n_layers=2),                     # 167,841
    "small": dict(ndf=32, n_layers=1),                      # 35,489
}


# ---------------------------------------------------------------------------------------------------
# The critic

class PatchCritic(nn.Module):
    """PatchGAN's discriminator (pix2pix, 1611.07004): images (B, C, H, W) -> logits (B, 1, h, w), high where x looks real.

    It judges patches, not pictures: one logit sees 70 x 70 pixels with n_layers=3, 34 x 34 with 2, 16 x 16 with 1, so it
    asks for texture and sharp edges and leaves it to the other terms which picture this is. Weights of VQGAN's and
    LlamaGen's critics load as they are (main.0.weight ...).
    """

    def __init__(self, ndf=64, n_layers=3, channels=3):
        super().__init__()
        c, layers = ndf, [nn.Conv2d(channels, ndf, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, n_layers + 1):                    # the last of them keeps the resolution
            c_in, c = c, ndf * min(2**i, 8)
            layers += [nn.Conv2d(c_in, c, 4, 2 if i < n_layers else 1, 1, bias=False), nn.BatchNorm2d(c), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*layers, nn.Conv2d(c, 1, 4, 1, 1))
        for layer in self.main:                             # DCGAN's initialisation, as published
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1, 0.02)

    @classmethod
    def for_images(cls, image_size, channels=3):
        """The published critic from 128 pixels on, smaller ones below, so that a patch stays a part of the picture."""
        return cls(**SIZES["patchgan" if image_size >= 128 else "medium" if image_size > 48 else "small"], channels=channels)

    def forward(self, images):
        return self.main(images)


def critic_loss(real, fake, kind="hinge"):
    """What the critic minimises: its logits on real images and on reconstructions, any shapes -> loss ().

    hinge: [ relu(1 - real) + relu(1 + fake) ] / 2, which stops caring beyond a margin of 1; non-saturating:
    [ -log sigmoid(real) - log sigmoid(-fake) ] / 2, plain binary classification. Both are 1 or ln 2 for a blind critic.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())
    return 0.5 * (F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean())


def generator_loss(fake, kind="hinge"):
    """What the tokenizer minimises: logits of its reconstructions -> loss (). hinge: -fake; non-saturating:
    -log sigmoid(fake). (LlamaGen's code swaps logit and target in the latter; it is not used there.)"""
    return -fake.float().mean() if kind == "hinge" else F.softplus(-fake.float()).mean()


# ---------------------------------------------------------------------------------------------------
# Perceptual distances

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
    """Learned perceptual distance (Zhang et al. 2018, 1801.03924): VGG16 features whose channels are weighted so that
    distances agree with people's. The published dropout on the weights is left out: LlamaGen trains with it switched on.

    LPIPS() has random weights: use from_files.
    """

    STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))                 # width, convolutions

    def __init__(self):
        super().__init__()
        c, layers, self.after, self.lins = 3, [], [], nn.ModuleList()
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
        """Images a, b (B, 3, H, W) in [-1, 1], at least 16 x 16 -> distance (B,), 0 for equal ones."""
        a, b = (taps(self.features, (x - self.shift) / self.scale, self.after) for x in (a, b))
        return sum((lin.weight * (unit_channels(f) - unit_channels(g)).square()).sum(1).mean((1, 2))
                   for lin, f, g in zip(self.lins, a, b))

    @classmethod
    def from_files(cls, vgg_path, lins_path=None):
        """vgg_path: torchvision's vgg16-397923af.pth. lins_path: vgg.pth of LPIPS v0.1, which taming-transformers fetches
        too and which holds the five 1x1 weights only. A whole LPIPS state dict, or a VQGAN checkpoint with its loss, holds
        both and needs no second file. Refuses what is missing or does not belong to VGG16 by name."""
        paths = [p for p in (vgg_path, lins_path) if p is not None]
        ours, model = {}, cls()
        for path in paths:
            sd = load_weights(path)
            for key, value in sd.get("state_dict", sd).items():
                if found := re.search(r"(?:features|slice\d)\.(\d+)\.(weight|bias)$", key):
                    ours[f"features.{found[1]}.{found[2]}"] = value.float()
                elif found := re.search(r"lins?\.?(\d)\.model\.\d\.weight$", key):
                    ours[f"lins.{found[1]}.weight"] = value.float()
        names, need = " + ".join(map(str, paths)), model.state_dict()
        if not any(k.startswith("features") for k in ours):
            raise ValueError(f"{names}: VGG16 itself is missing; name torchvision's vgg16-397923af.pth as vgg_path")
        if not any(k.startswith("lins") for k in ours):
            raise ValueError(f"{names}: LPIPS's weights lin0 .. lin4 are missing; name its vgg.pth (v0.1) as lins_path")
        missing, unknown = ([k for k in a if k not in b] for a, b in ((need, ours), (ours, need)))
        if missing or unknown:
            raise ValueError(f"{names} does not fit VGG16: missing {missing[:3]}, unknown {unknown[:3]}")
        model.load_state_dict(ours)
        return model.eval()


class ClassifierFeatures(nn.Module):
    """A perceptual distance without downloads: LPIPS's formula with all weights 1, on features of any small classifier.

    net: a Sequential, of which the maps after each activation count (evaluate.py's SmallCNN: pass net.stages), or a
    module that returns a list of maps. Score with another network than this one: a tokenizer learns to please its judge.
    """

    def __init__(self, net):
        super().__init__()
        self.net, self.after = net, None
        if isinstance(net, nn.Sequential):
            self.after = tuple(i for i, m in enumerate(net) if isinstance(m, (nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU)))
            if not self.after:
                raise ValueError("ClassifierFeatures found no activation among the layers of this Sequential")

    def maps(self, images):                                 # (B, 3, H, W) -> [(B, C, h, w), ...]
        images = images.contiguous(memory_format=torch.channels_last)                       # twice as fast on a CPU
        return self.net(images) if self.after is None else taps(self.net, images, self.after)

    def forward(self, a, b):
        """Images a, b (B, 3, H, W) in [-1, 1] -> distance (B,), 0 to 4, a mean over layers and positions."""
        pairs = list(zip(self.maps(a), self.maps(b), strict=True))
        return sum((unit_channels(f) - unit_channels(g)).square().sum(1).mean((1, 2)) for f, g in pairs) / len(pairs)


def freeze(net):
    """A copy of net that cannot change: its numbers become buffers that follow .to(device) but are no parameters for an
    optimiser to find and no 59 MB of VGG16 in every checkpoint."""
    net = copy.deepcopy(net).eval()
    for module in net.modules():
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            delattr(module, name)
            module.register_buffer(name, value.detach(), persistent=False)
    return net


# ---------------------------------------------------------------------------------------------------
# Tokenizer + critic + perceptual distance = tokenizer

def as_frames(x):
    """Clips (B, C, F, H, W) -> images (B * F, C, H, W); images stay as they are."""
    return x.transpose(1, 2).flatten(0, 1) if x.ndim == 5 else x


class AdversarialTokenizer(nn.Module):
    """Any tokenizer, trained with the loss at the top of this file; again a tokenizer. Keep .tokenizer when it is done.

    critic, perceptual: None leaves the term out. gan: "hinge" or "non-saturating". start: training steps before the
    critic has a say and learns. pixel_loss: F.mse_loss as LlamaGen, F.l1_loss as VQGAN. gan_weight also multiplies the
    critic's own loss, as published; to Adam that makes no difference.

    adaptive: VQGAN's weight, |grad of the other terms| / |grad of the adversarial one| with respect to the weight of
    the decoder's last layer (last_layer names another parameter of the tokenizer), at most 1e4. LlamaGen leaves it off.

    Gradients of both networks are there after one backward pass; clip each on its own, as published: the critic's is
    often the larger by far.
    """

    def __init__(self, tokenizer, critic=None, perceptual=None, gan="hinge", gan_weight=0.5, perceptual_weight=1.0,
                 start=20_000, pixel_loss=F.mse_loss, adaptive=False, last_layer=None):
        super().__init__()
        if gan not in ("hinge", "non-saturating"):
            raise ValueError(f"gan {gan!r} must be 'hinge' or 'non-saturating'")
        if getattr(tokenizer, "likelihood", "mse") != "mse":
            raise ValueError(f"likelihood {tokenizer.likelihood!r} is an exact bound, which these losses spoil: use 'mse'")
        self.seq_len, self.grid = tokenizer.seq_len, tokenizer.grid
        self.token_dim, self.vocab_size = tokenizer.token_dim, tokenizer.vocab_size
        self.tokenizer, self.critic = tokenizer, critic
        self.perceptual = None if perceptual is None else freeze(perceptual)
        self.gan, self.gan_weight, self.perceptual_weight, self.start = gan, gan_weight, perceptual_weight, start
        self.pixel_loss, self.adaptive, self.last_layer = pixel_loss, adaptive, last_layer
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))      # forward passes in train mode so far
        self.register_buffer("balance", torch.ones(()))                        # the latest adaptive weight
        if adaptive and last_layer is None:
            matrices = [n for n, p in tokenizer.named_parameters() if n.startswith("decoder.") and p.ndim > 1]
            if not matrices:
                raise ValueError("adaptive: this tokenizer has no decoder.*, so name the weight of its last_layer")
            self.last_layer = matrices[-1]

    def train(self, mode=True):
        """As usual, but the perceptual network stays in eval mode: its batch norms and dropouts are part of the ruler."""
        super().train(mode)
        if self.perceptual is not None:
            self.perceptual.eval()
        return self

    def adaptive_weight(self, others, adversarial):
        """|grad others| / (|grad adversarial| + 1e-4) at the last layer, from two losses () -> (), 0 to 1e4, detached.

        Two more passes through the last layer only. Without gradients (validation) it is that of the last training step.
        """
        if torch.is_grad_enabled():
            weight = self.tokenizer.get_parameter(self.last_layer)
            a, b = (torch.autograd.grad(loss, weight, retain_graph=True)[0].float().norm() for loss in (others, adversarial))
            self.balance.copy_((a / (b + 1e-4)).clamp(max=1e4))
        return self.balance.clone()

    def duel(self, x, x_hat, others):
        """Both sides of the game on images and reconstructions (B, 3, H, W) -> loss (), logs. others: the terms that the
        adaptive weight compares with, ()."""
        # The tokenizer's side: constants in place of the critic's parameters, so that nothing flows into them.
        frozen = {name: p.detach() for name, p in self.critic.named_parameters()}
        adversarial = generator_loss(torch.func.functional_call(self.critic, frozen, (x_hat,)), self.gan)
        # The critic's side: a detached reconstruction. Real and fake ones are normalised by their own batch statistics.
        # The published loop has two optimisers and two backward passes, the tokenizer's first. LlamaGen's critic then
        # sees the same x' as here, so that nothing but separate clipping sets the two apart; VQGAN's reconstructs anew
        # with the stepped tokenizer, at the price of another forward pass.
        real, fake = self.critic(x), self.critic(x_hat.detach())
        critic = critic_loss(real, fake, self.gan)
        weight = self.gan_weight * (self.steps >= self.start)                  # a tensor: asking it would wait for the GPU
        if self.training:
            self.steps += 1
        logs = {"gan": adversarial.detach(), "critic_real": real.detach().float().mean(),
                "critic_fake": fake.detach().float().mean()}
        if self.adaptive:
            balance = logs["adaptive"] = self.adaptive_weight(others, adversarial)
            adversarial = balance * adversarial
        logs["critic"] = (weight * critic).detach()
        return weight * adversarial + weight * critic, logs

    def forward(self, images, labels=None):
        """images (B, 3, [F,] H, W) in [-1, 1] -> loss (), logs: recon, perceptual and gan, all unweighted; critic, what the
        critic adds to the loss; critic_real and critic_fake, its mean logits; adaptive; and the tokenizer's own."""
        recon, auxiliary, logs = self.tokenizer.reconstruct(images)
        if getattr(self.tokenizer, "channels", 3) == 1:     # a grey tokenizer must not be caught by its lack of colour
            images = images.mean(1, keepdim=True).expand_as(images)
        x, x_hat = as_frames(images), as_frames(recon)
        pixel = self.pixel_loss(x_hat, x)
        others, logs = pixel, {"recon": pixel.detach(), **logs}
        if self.perceptual is not None:
            distance = self.perceptual(x_hat, x).mean()
            others, logs["perceptual"] = others + self.perceptual_weight * distance, distance.detach()
        loss = others + auxiliary
        if self.critic is not None:
            game, more = self.duel(x, x_hat, others)
            loss, logs = loss + game, logs | more
        return loss, logs

    def reconstruct(self, images):
        return self.tokenizer.reconstruct(images)

    def encode(self, images):
        return self.tokenizer.encode(images)

    def decode(self, tokens):
        return self.tokenizer.decode(tokens)


def load_weights(path):
    """A .pt, .pth, .ckpt or .safetensors file -> state dict on the CPU. Never runs code from the file."""
    if str(path).endswith(".safetensors"):
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError(f"{path} needs the optional package safetensors: pip install safetensors") from None
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


# ---------------------------------------------------------------------------------------------------
# Demo

class TinyAutoencoder(nn.Module):
    """32 x 32 images through 16 tokens of 4 numbers, 48 times fewer: what does not fit is lost."""

    seq_len, grid, token_dim, vocab_size = 16, (4, 4), 4, None

    def __init__(self, width=32):
        super().__init__()
        conv = lambda c_in, c_out, *size: [nn.Conv2d(c_in, c_out, *size), nn.SiLU()]
        up = nn.Upsample(scale_factor=2)
        self.encoder = nn.Sequential(*conv(3, width, 4, 2, 1), *conv(width, 2 * width, 4, 2, 1),
                                     *conv(2 * width, 2 * width, 4, 2, 1), nn.Conv2d(2 * width, 4, 3, 1, 1))
        self.decoder = nn.Sequential(*conv(4, 2 * width, 3, 1, 1), up, *conv(2 * width, 2 * width, 3, 1, 1),
                                     up, *conv(2 * width, width, 3, 1, 1), up, *conv(width, width, 3, 1, 1),
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
    """Drawn shapes in grain that no code of 64 numbers can hold: index (N,) -> images (N, 3, 32, 32), labels (N,)."""
    import data
    images, labels, masks, _ = data.draw(index)
    grain = torch.randint(2, (len(index), 1, 16, 16), device=index.device) - 0.5            # a coin per 2 x 2 pixels
    grain = grain.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return (images + grain * (masks > 0)[:, None]).clamp(-1, 1), labels


def small_classifier(images, labels, seed, steps=120):
    """Three convolutions that learn to tell the shapes apart -> the Sequential of them, in eval mode."""
    torch.manual_seed(seed)
    layers = [part for a, b in ((3, 16), (16, 32), (32, 64))
              for part in (nn.Conv2d(a, b, 3, 1 if a == 3 else 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())]
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
    """Train on a fixed set of images (N, 3, H, W) -> seconds. One optimiser and one backward pass for both networks."""
    opt = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.5, 0.9))
    start = time.perf_counter()
    for step in range(steps):
        opt.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / steps)
        loss, _ = model(images[torch.randint(len(images), (batch_size,), device=images.device)])
        opt.zero_grad()
        loss.backward()
        for part in (model.tokenizer, model.critic):
            if part is not None:
                nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        opt.step()
    return time.perf_counter() - start


def sharpness(images):
    """Mean absolute difference of neighbouring pixels: (N, C, H, W) -> ()."""
    return (images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()) / 2


def draw_results(rows, path):
    """rows: (text, images (n, 3, 32, 32)) -> a PNG with whole images, and enlarged patches of three of them."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    n, patches = 6, 3
    fig, axes = plt.subplots(len(rows), n + patches, figsize=(13, 6.1))
    for line, (text, images) in zip(axes, rows):
        picture = ((images.float().cpu() + 1) / 2).permute(0, 2, 3, 1)                      # (n, 32, 32, 3) in [0, 1]
        for i, ax in enumerate(line):
            ax.imshow(picture[i] if i < n else picture[i - patches, 8:20, 4:16], interpolation="nearest")
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(text, rotation=0, ha="right", va="center", labelpad=8, fontsize=10.5)
    axes[0, 2].set_title("held-out images", fontsize=11)
    axes[0, n + 1].set_title("12 x 12 pixels of the last three", fontsize=11)
    fig.suptitle("perceptual_gan.py: 64 numbers cannot hold the grain. Squared error averages it away, a perceptual\n"
                 "distance helps a little, and the critic makes the decoder invent grain: sharp, but farther off in pixels",
                 fontsize=12)
    fig.subplots_adjust(left=0.165, right=0.995, bottom=0.01, top=0.84, wspace=0.05, hspace=0.05)
    fig.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description="What do a perceptual distance and a critic add to squared error?")
    parser.add_argument("--steps", type=int, default=600, help="steps of squared error, then half as many of each loss")
    parser.add_argument("--perceptual_weight", type=float, default=4.0, help="weight of the perceptual distance")
    parser.add_argument("--gan_weight", type=float, default=0.1, help="weight of the adversarial terms (published: 0.5)")
    args = parser.parse_args()
    import data
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    images, labels = grainy(torch.arange(2000, device=device))
    held_out, _ = grainy(torch.arange(64, device=device) + data.VAL_INDEX)
    teacher, judge = (ClassifierFeatures(small_classifier(images, labels, seed)) for seed in (1, 2))
    first = TinyAutoencoder().to(device, memory_format=torch.channels_last)                 # faster on a CPU
    seconds = fit_adversarial(AdversarialTokenizer(first), images, args.steps, lr=4e-3)
    print(f"{args.steps} steps of squared error, where all three begin: {seconds:.0f} s")
    rows = [("the images", held_out)]
    for name, perceptual, critic in (("squared error", None, None), ("+ perceptual", teacher, None),
                                     ("+ critic", teacher, PatchCritic.for_images(32))):
        torch.manual_seed(0)
        model = AdversarialTokenizer(copy.deepcopy(first), critic, perceptual, gan_weight=args.gan_weight,
                                     perceptual_weight=args.perceptual_weight, start=0)
        model.to(device, memory_format=torch.channels_last)
        seconds = fit_adversarial(model, images, args.steps // 2, lr=2e-3)
        x_hat = model.decode(model.encode(held_out))
        with torch.no_grad():
            mse, own, other = F.mse_loss(x_hat, held_out), teacher(x_hat, held_out).mean(), judge(x_hat, held_out).mean()
        sharp = 100 * sharpness(x_hat) / sharpness(held_out)
        print(f"{name:14s} squared error {mse:.4f}   feature distance {other:.3f} ({own:.3f} by the network trained against)"
              f"   sharpness {sharp:3.0f}% of the images'   {1000 * seconds / (args.steps // 2):.0f} ms per step")
        rows.append((f"{name}\n\nMSE {mse:.3f}\ndistance {other:.3f}\nsharpness {sharp:.0f}%", x_hat))
    draw_results(rows, "perceptual_gan.png")
    print("wrote perceptual_gan.png")


if __name__ == "__main__":
    main()
