"""Tests of perceptual_gan."""
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import perceptual_gan
from common import classifier
import vae
import vq
from official.lpips import load_lpips
from tests.helpers import close, golden


def official_discriminator(g):
    discriminator = perceptual_gan.PatchDiscriminator(ndf=8)
    discriminator.load_state_dict({k[2:]: v for k, v in g.items() if k.startswith("w/")})
    return discriminator


def test_discriminator_and_its_losses_are_the_authors():
    g = golden("llamagen/patchgan")
    discriminator = official_discriminator(g)
    real, fake = discriminator(g["in/real"]), discriminator(g["in/fake"])       # each with its own statistics
    close(real, g["out/logits_real_train"]), close(fake, g["out/logits_fake_train"])
    for key, value in discriminator.state_dict().items():
        if "running" in key:
            close(value, g[f"after/{key}"])
    close(discriminator.eval()(g["in/real"]), g["out/logits_real_eval"])
    close(perceptual_gan.discriminator_loss(real, fake), g["out/hinge_d_loss"], 1e-5)
    close(perceptual_gan.discriminator_loss(real, fake, "non-saturating"), g["out/vanilla_d_loss"], 1e-5)
    close(perceptual_gan.generator_loss(fake), g["out/hinge_gen_loss"], 1e-5)


@pytest.mark.parametrize("n_layers, sees", [(1, 16), (2, 34), (3, 70)])
def test_discriminator_sees_patches_of_the_stated_size(n_layers, sees):
    image = torch.randn(1, 3, 96, 96, requires_grad=True)
    logits = perceptual_gan.PatchDiscriminator(4, n_layers).eval()(image)
    middle = logits.shape[-1] // 2
    gradient, = torch.autograd.grad(logits[0, 0, middle, middle], image)
    seen = gradient.abs().sum((0, 1))
    assert (seen.sum(0) > 0).sum() == (seen.sum(1) > 0).sum() == sees


def test_discriminator_of_the_papers_has_its_parameter_count_and_start():
    discriminator = perceptual_gan.PatchDiscriminator.for_images(256)
    assert sum(p.numel() for p in discriminator.parameters()) == 2_765_633
    assert discriminator.main[-1].out_channels == 1 and discriminator(torch.zeros(
        1, 3, 256, 256)).shape == (1, 1, 30, 30)
    assert abs(discriminator.main[8].weight.std() - 0.02) < 1e-3 and abs(
        discriminator.main[8].weight.mean()) < 1e-3
    assert abs(discriminator.main[9].weight.mean() - 1) < 5e-3 and abs(discriminator.main[9].weight.std() -
                                                                       0.02) < 5e-3
    for side, params, logits in ((32, 35_489, 14), (64, 167_841, 14), (128, 2_765_633, 14)):
        discriminator = perceptual_gan.PatchDiscriminator.for_images(side)
        assert sum(p.numel() for p in discriminator.parameters()) == params
        assert discriminator(torch.zeros(1, 3, side, side)).shape == (1, 1, logits, logits)


def test_adversarial_losses_in_closed_form():
    real, fake = torch.randn(4, 1, 3, 3) * 2, torch.randn(4, 1, 3, 3) * 2
    bce, one, zero = F.binary_cross_entropy_with_logits, torch.ones(4, 1, 3, 3), torch.zeros(4, 1, 3, 3)
    assert torch.allclose(perceptual_gan.discriminator_loss(real, fake, "non-saturating"),
                          (bce(real, one) + bce(fake, zero)) / 2)
    assert torch.allclose(perceptual_gan.generator_loss(fake, "non-saturating"), bce(fake, one))
    hinge = [max(0, 1 - r) + max(0, 1 + f) for r, f in zip(real.flatten().tolist(), fake.flatten().tolist())]
    assert abs(perceptual_gan.discriminator_loss(real, fake) - sum(hinge) / len(hinge) / 2) < 1e-5
    assert perceptual_gan.discriminator_loss(
        real + 100, fake - 100) == 0 and perceptual_gan.generator_loss(fake) == -fake.mean()
    assert torch.isfinite(perceptual_gan.discriminator_loss(1e4 * real, 1e4 * fake, "non-saturating"))


def vgg_files(tmp_path, monkeypatch):
    """VGG16 and LPIPS's weights under their published names, a sixteenth as wide, with random numbers."""
    widths, vgg, lins, index, c = (4, 4, 8, 8, 8), {}, {}, 0, 3
    monkeypatch.setattr(perceptual_gan.LPIPS, "STAGES", tuple(zip(widths, (2, 2, 3, 3, 3))))
    for stage, (width, n) in enumerate(zip(widths, (2, 2, 3, 3, 3))):
        for _ in range(n):
            vgg[f"features.{index}.weight"] = torch.randn(width, c, 3, 3) * (2 / 9 / c) ** 0.5
            vgg[f"features.{index}.bias"] = 0.1 * torch.randn(width)
            index, c = index + 2, width
        index += 1                                          # a pool
        lins[f"lin{stage}.model.1.weight"] = torch.rand(1, width, 1, 1)
    vgg["classifier.0.weight"] = torch.randn(3, 3)
    torch.save(vgg, tmp_path / "vgg16.pth"), torch.save(lins, tmp_path / "lins.pth")
    return vgg, lins


def slow_lpips(vgg, lins, a, b):
    """The paper's equation 1 for one pair of images (3, H, W), position by position."""
    def features(x):
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x, maps = ((x.permute(1, 2, 0) - shift) / scale).permute(2, 0, 1)[None], []
        layers = "0 2 M 5 7 M 10 12 14 M 17 19 21 M 24 26 28".split()   # where torchvision's list has weights
        for i, layer in enumerate(layers):
            if layer == "M":
                x = F.max_pool2d(x, 2, 2)
            else:
                x = F.relu(
                    F.conv2d(x, vgg[f"features.{layer}.weight"], vgg[f"features.{layer}.bias"], padding=1))
            if i + 1 == len(layers) or layers[i + 1] == "M":
                maps.append(x[0])
        return maps
    total = 0.0
    for stage, (f, g) in enumerate(zip(features(a), features(b), strict=True)):
        lin, (_, H, W) = lins[f"lin{stage}.model.1.weight"].flatten(), f.shape
        for y in range(H):
            for x in range(W):
                u, v = f[:, y, x], g[:, y, x]
                total += float((lin * (u / (u.norm() + 1e-10) - v / (v.norm() + 1e-10)) ** 2).sum()) / (H * W)
    return total


def test_lpips_equals_a_slow_loop_over_vgg16(tmp_path, monkeypatch):
    vgg, lins = vgg_files(tmp_path, monkeypatch)
    lpips = load_lpips(tmp_path / "vgg16.pth", tmp_path / "lins.pth")
    a, b = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        d = lpips(a, b)
        assert d.shape == (2,) and torch.equal(lpips(a, a), torch.zeros(2)) and torch.allclose(lpips(b, a), d)
        assert torch.equal(lpips.train()(a, b), d), "no dropout, whatever the mode"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert lpips(a, b).dtype == torch.float32
    for i in range(2):
        assert abs(d[i] - slow_lpips(vgg, lins, a[i], b[i])) < 1e-4 * d[i]
    with torch.device("meta"):
        monkeypatch.undo()
        full = perceptual_gan.LPIPS()
    assert sum(p.numel()
               for p in full.parameters()) == 14_714_688 + 1_472, "VGG16 without its classifier, and the lins"
    assert [full.features[i].out_channels for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)] == \
        [64, 64, 128, 128, 256, 256, 256] + 6 * [512]


def test_lpips_reads_whole_checkpoints_and_names_what_is_missing(tmp_path, monkeypatch):
    vgg, lins = vgg_files(tmp_path, monkeypatch)
    a, b = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    load = load_lpips
    vqgan = {f"loss.perceptual_loss.{k}": v
             for k, v in lins.items()} | {"encoder.conv_in.weight": torch.zeros(1)}
    vqgan |= {
        "loss.perceptual_loss.net.slice1." + k.removeprefix("features."): v
        for k, v in vgg.items() if k[0] == "f"
    }
    torch.save({"state_dict": vqgan}, tmp_path / "vqgan.ckpt")
    reference = load(tmp_path / "vgg16.pth", tmp_path / "lins.pth")(a, b)
    assert torch.equal(load(tmp_path / "vqgan.ckpt")(a, b), reference)
    with pytest.raises(ValueError, match="vgg16-397923af.pth"):
        load(tmp_path / "lins.pth")
    with pytest.raises(ValueError, match="lins_path"):
        load(tmp_path / "vgg16.pth")
    torch.save(vgg | {"features.1.weight": torch.ones(4)}, tmp_path / "vgg16_bn.pth")
    with pytest.raises(ValueError, match=r"unknown \['features.1.weight'\]"):
        load(tmp_path / "vgg16_bn.pth", tmp_path / "lins.pth")
    torch.save({k: v for k, v in lins.items() if "lin3" not in k}, tmp_path / "four.pth")
    with pytest.raises(ValueError, match=r"missing \['lins.3.weight'\]"):
        load(tmp_path / "vgg16.pth", tmp_path / "four.pth")


def test_classifier_features_compare_directions_and_survive_dead_units():
    net = classifier.SmallCNN(10).eval().stages
    distance = perceptual_gan.ClassifierFeatures(net)
    a, b = torch.rand(2, 3, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        maps = [[x] for x in (a, b)]
        for layer in net:
            maps = [m + [layer(m[-1])] for m in maps]
        # after each ReLU
        slow = [1 - F.cosine_similarity(maps[0][i], maps[1][i], dim=1) for i in (3, 6, 9, 12)]
        # |u - v|^2 = 2 - 2 cos(u, v) for unit vectors; of two zeros the distance is 0, and of one it is 1
        zeros = [[m[i].norm(dim=1) == 0 for m in maps] for i in (3, 6, 9, 12)]
        slow = [torch.where(p & q, 0.0, torch.where(p | q, 1.0, 2 * d)) for d, (p, q) in zip(slow, zeros)]
        assert torch.allclose(distance(a, b), sum(d.mean((1, 2)) for d in slow) / 4, atol=1e-4)
        assert torch.equal(distance(a, a), torch.zeros(3))

    class Maps(nn.Module):
        def forward(self, x):
            return [F.relu(x), F.relu(-x)]
    x = torch.zeros(2, 3, 4, 4, requires_grad=True)
    d = perceptual_gan.ClassifierFeatures(Maps())(x, torch.ones(2, 3, 4, 4))
    d.sum().backward()
    assert torch.allclose(d, torch.tensor(0.5)) and torch.equal(
        x.grad, torch.zeros_like(x)), "1 and 0 by the two maps"
    x.grad = None
    perceptual_gan.unit_channels(x).sum().backward()
    assert torch.isfinite(x.grad).all(), "a norm has no gradient at 0"
    with pytest.raises(ValueError, match="activation"):
        perceptual_gan.ClassifierFeatures(nn.Sequential(nn.Conv2d(3, 4, 1)))


class MeanDifference(nn.Module):
    def forward(self, a, b):
        return (a - b).abs().mean((1, 2, 3))


class OneLayer(nn.Module):
    """A tokenizer of which the reconstruction is one convolution of fixed features."""
    seq_len, grid, token_dim, vocab_size = 4, (2, 2), 1, None

    def __init__(self, features, weight, auxiliary=0.0):
        super().__init__()
        self.features, self.weight, self.auxiliary = features, nn.Parameter(
            weight.clone()), torch.tensor(auxiliary)

    def reconstruct(self, images):
        return F.conv2d(self.features, self.weight, padding=self.weight.shape[-1] // 2), self.auxiliary, {}


@pytest.mark.parametrize("adaptive", [0, 1])
@pytest.mark.parametrize("step", [9, 10])
def test_adversarial_loss_is_the_authors_in_every_term(adaptive, step):
    g = golden("llamagen/vq_total_loss")
    tokenizer = OneLayer(g["in/feat"], g["in/last_layer"], g["in/codebook_losses"].sum().item())
    model = perceptual_gan.AdversarialTokenizer(tokenizer, official_discriminator(g), MeanDifference(),
                                                start=10, adaptive=bool(adaptive), last_layer="weight")
    model.steps.fill_(step)
    loss, logs = model(g["in/real"])
    ours, theirs = loss - logs["discriminator"], g[f"out/gen_loss_ada{adaptive}_step{step}"]
    close(ours, theirs, 1e-5)
    assert abs(logs["discriminator"] - g[f"out/disc_loss_ada{adaptive}_step{step}"]) < 1e-5
    recon = tokenizer.reconstruct(None)[0]
    close(logs["recon"], F.mse_loss(recon, g["in/real"]), 1e-6)
    close(logs["perceptual"], (recon - g["in/real"]).abs().mean(), 1e-6)
    # What is left for the adversarial term is lambda * 0.5 * (adaptive weight) * -mean discriminator(x').
    rest = ours - logs["recon"] - logs["perceptual"] - tokenizer.auxiliary
    assert abs(rest - (step == 10) * 0.5 * logs.get("adaptive", 1.0) * logs["gan"]) < 1e-5
    assert model.steps == step + 1 and all(v.ndim == 0 and not v.requires_grad for v in logs.values())


def test_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer():
    model = perceptual_gan.AdversarialTokenizer(OneLayer(torch.ones(1, 1, 2, 2), torch.ones(3, 1, 1, 1)),
                                                adaptive=True, last_layer="weight")
    w = model.tokenizer.weight
    value = model.adaptive_weight((3 * w).sum() + 7, (w**2).sum())         # gradients (3, 3, 3) and (2, 2, 2)
    close(value, torch.tensor(27**0.5 / (12**0.5 + 1e-4)), 1e-6)
    assert not value.requires_grad
    close(model.adaptive_weight((3 * w).sum(), (0 * w).sum()), torch.tensor(1e4), 1e-6)
    with torch.no_grad():
        assert model.adaptive_weight(w.sum(), w.sum()) == 1e4, "validation takes the last one"
    vae_ = vae.VAE(image_size=16, ch_mult=(1, 2))
    model = perceptual_gan.AdversarialTokenizer(vae_, perceptual_gan.PatchDiscriminator(4, 1), start=0,
                                                adaptive=True)
    assert model.tokenizer.get_parameter(model.last_layer) is vae_.decoder[-1].weight
    _, logs = model(torch.rand(2, 3, 16, 16))
    assert 0 < logs["adaptive"] == model.balance
    with pytest.raises(ValueError, match="last_layer"):
        perceptual_gan.AdversarialTokenizer(OneLayer(torch.ones(1), torch.ones(3, 1, 1, 1)), adaptive=True)


def adversarial(kind="vae", **options):
    torch.manual_seed(0)
    sizes = dict(image_size=16, ch_mult=(1, 2), ch=8)
    tokenizer = vae.VAE(beta=0, **sizes) if kind == "vae" else vq.VQ(vocab_size=16, code_dim=4, **sizes)
    with torch.no_grad():                           # blocks that start as the identity would have no gradient
        [p.add_(0.05 * torch.randn_like(p)) for p in tokenizer.parameters()]
    options = dict(start=0, perceptual=perceptual_gan.ClassifierFeatures(
        classifier.SmallCNN(10).stages)) | options
    return perceptual_gan.AdversarialTokenizer(tokenizer, perceptual_gan.PatchDiscriminator(4, 2), **options)


@pytest.mark.parametrize("gan", ["hinge", "non-saturating"])
def test_one_backward_pass_gives_each_network_its_own_gradient(gan):
    model, images = adversarial(gan=gan), data.draw(torch.arange(4), 16)[0]
    model(images)[0].backward()
    tokenizer, discriminator = model.tokenizer, model.discriminator
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    recon, auxiliary, _ = tokenizer.reconstruct(images)
    gan_term = -discriminator(recon).mean() if gan == "hinge" else -F.logsigmoid(discriminator(recon)).mean()
    (F.mse_loss(recon, images) + model.perceptual(recon, images).mean() + 0.5 * gan_term).backward()
    theirs = {n: p.grad.clone() for n, p in model.named_parameters() if n.startswith("tokenizer.")}
    model.zero_grad()
    real, fake = discriminator(images), discriminator(recon.detach())
    losses = (F.relu(1 - real), F.relu(1 + fake)) if gan == "hinge" else (-F.logsigmoid(real),
                                                                          -F.logsigmoid(-fake))
    (0.5 * 0.5 * sum(v.mean() for v in losses)).backward()
    theirs |= {n: p.grad.clone() for n, p in model.named_parameters() if n.startswith("discriminator.")}
    none = [n for n, v in ours.items() if v.abs().max() == 0]
    assert none == (["discriminator.main.8.bias"]
                    if gan == "hinge" else []), "inside both margins the hinges pull it equally hard"
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=1e-6, rtol=1e-4), name


def test_one_optimiser_follows_llamagens_two():
    images = data.draw(torch.arange(12), 16)[0].split(4)
    one, two = adversarial(perceptual=None), adversarial(perceptual=None)
    opt = torch.optim.Adam(one.parameters(), lr=1e-3)
    for x in images:
        opt.zero_grad(), one(x)[0].backward(), opt.step()
    side = [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (two.tokenizer, two.discriminator)]
    for x in images:                   # their loop: a step of the tokenizer, then one of the discriminator on
        recon = two.tokenizer.reconstruct(x)[0]             # the reconstruction made before it
        side[0].zero_grad()
        (F.mse_loss(recon, x) - 0.5 * two.discriminator(recon).mean()).backward()
        side[0].step(), side[1].zero_grad()
        real, fake = two.discriminator(x), two.discriminator(recon.detach())
        (0.25 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())).backward()
        side[1].step()
    for name, value in two.state_dict().items():
        if name != "steps":                                 # batch norm's running statistics agree as well
            assert torch.allclose(one.state_dict()[name], value, atol=1e-5), name


def test_before_start_the_discriminator_has_no_say_and_learns_nothing():
    images = data.draw(torch.arange(4), 16)[0]
    model, alone = adversarial(start=2), adversarial()
    alone.discriminator = None
    alone(images)[0].backward()
    for step in range(3):
        model.zero_grad()
        loss, logs = model(images)
        loss.backward()
        gradients = [(p.grad - q.grad).abs().max()
                     for p, q in zip(model.tokenizer.parameters(), alone.tokenizer.parameters())]
        pushed = max(p.grad.abs().max() for p in model.discriminator.parameters())
        assert (max(gradients) == 0) == (pushed == 0) == (logs["discriminator"] == 0) == (step < 2), step
    model.eval()(images)
    assert model.steps == 3, "validation is no training step"


def test_perceptual_network_is_frozen_and_stays_in_eval_mode():
    net = classifier.SmallCNN(10).stages
    model = adversarial(
        perceptual=perceptual_gan.ClassifierFeatures(nn.Sequential(*net, nn.Dropout(0.5), nn.ReLU())))
    before, images = {k: v.clone() for k, v in net.state_dict().items()}, torch.rand(4, 3, 16, 16)
    distance = model.perceptual(images, -images)
    model.train()(images)[0].backward()
    assert model.training and model.discriminator.training and not any(m.training
                                                                       for m in model.perceptual.modules())
    assert torch.equal(model.perceptual(images, -images),
                       distance), "no batch statistics, no dropout, no drift"
    assert all(torch.equal(v, before[k])
               for k, v in net.state_dict().items()) and len(list(net.parameters())) == 12
    assert all(n.split(".")[0] in ("tokenizer", "discriminator") for n, _ in model.named_parameters())
    assert {k.split(".")[0] for k in model.state_dict()} == {"tokenizer", "discriminator", "steps", "balance"}
    assert all(b.dtype == torch.float64 for b in model.double().perceptual.buffers() if b.is_floating_point())
    shared = copy.deepcopy(model)                           # as torch's weight averaging does
    shared.load_state_dict(model.state_dict())


@pytest.mark.parametrize("kind", ["vae", "vq"])
def test_adversarial_tokenizer_keeps_the_contract_of_a_tokenizer(kind, tmp_path):
    model, images = adversarial(kind), data.draw(torch.arange(4), 16)[0]
    assert all(
        getattr(model, n) == getattr(model.tokenizer, n)
        for n in ("seq_len", "grid", "token_dim", "vocab_size"))
    loss, logs = model(images, torch.zeros(4, dtype=torch.long))
    loss.backward()
    assert loss.ndim == 0 and all(v.ndim == 0 and not v.requires_grad for v in logs.values())
    assert {"recon", "perceptual", "gan", "discriminator", "discriminator_real",
            "discriminator_fake"} <= set(logs)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    tokens = model.eval().encode(images)
    assert tokens.shape[:2] == (4, model.seq_len) and model.decode(tokens).shape == images.shape
    with torch.no_grad():
        recon, auxiliary, _ = model.reconstruct(images)
        loss, logs = model(images)
    terms = F.mse_loss(recon,
                       images) + auxiliary + logs["perceptual"] + 0.5 * logs["gan"] + logs["discriminator"]
    close(loss, terms, 1e-5)
    torch.save(model.tokenizer.state_dict(), tmp_path / "tokenizer.pt")
    other = adversarial(kind).tokenizer
    other.load_state_dict(torch.load(tmp_path / "tokenizer.pt", weights_only=True))
    assert torch.equal(other.eval().decode(tokens), model.decode(tokens))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(images)[0].dtype == torch.float32


def test_adversarial_tokenizer_takes_clips_and_grey_images():
    class Halve(nn.Module):
        seq_len, grid, token_dim, vocab_size = 1, (1,), 1, None

        def reconstruct(self, images):
            return 0.5 * images, images.new_zeros(()), {}
    torch.manual_seed(0)
    model = perceptual_gan.AdversarialTokenizer(Halve(), perceptual_gan.PatchDiscriminator(4, 1),
                                                MeanDifference(), start=0)
    clips = torch.rand(2, 3, 5, 16, 16)
    frames = torch.stack([clips[b, :, f] for b in range(2) for f in range(5)])              # (10, 3, 16, 16)
    assert torch.equal(perceptual_gan.as_frames(clips), frames)
    (ours, _), (theirs, _) = model(clips), model(frames)
    assert torch.allclose(ours, theirs, atol=1e-6)
    grey = perceptual_gan.AdversarialTokenizer(vae.VAE(image_size=16, ch_mult=(1, 2), channels=1, beta=0),
                                               perceptual_gan.PatchDiscriminator(4, 1), start=0)
    colour = torch.tensor([0.3, -0.1, -0.2])[:, None, None]                               # changes no average
    x = torch.rand(2, 3, 16, 16).mean(1, keepdim=True).expand(-1, 3, -1, -1)
    assert torch.allclose(grey(x)[0], grey(x + colour)[0], atol=1e-5)
    with pytest.raises(ValueError, match="use 'mse'"):
        perceptual_gan.AdversarialTokenizer(vae.VAE(likelihood="logistic"))
    with pytest.raises(ValueError, match="wasserstein"):
        perceptual_gan.AdversarialTokenizer(Halve(), gan="wasserstein")


def test_adversarial_training_step_is_one_graph():
    tokenizer = OneLayer(torch.randn(2, 4, 16, 16), torch.randn(3, 4, 1, 1))
    model = perceptual_gan.AdversarialTokenizer(tokenizer, perceptual_gan.PatchDiscriminator(4, 1),
                                                MeanDifference(), start=1)
    compiled, images = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.rand(2, 3, 16, 16)
    # the discriminator joins in at the second without a new graph
    losses = [compiled(images)[0] for _ in range(2)]
    assert model.steps == 2
    losses[1].backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.steps.zero_(), model.zero_grad()
    expected = [model(images)[0] for _ in range(2)]
    expected[1].backward()
    assert torch.allclose(torch.stack(losses), torch.stack(expected), atol=1e-5) and losses[0] != losses[1]
    assert all(torch.allclose(a, p.grad, atol=1e-5) for a, p in zip(ours, model.parameters()))
