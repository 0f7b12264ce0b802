"""Tests of recipes/joint.py."""
import csv
import json
import math

import pytest
import torch
import torch.nn as nn
from torch import distributions as D

import ar_transformer
import data
import gmm_head
import sample
import vae
from common import drawing, runs
from recipes import joint as joint_recipe
from recipes.joint import Joint, bound
from tests.helpers import RARELY, TINY


def logistic_vae(channels=3, **options):
    return vae.VAE(likelihood="logistic", channels=channels, **options)


class NormalPrior(nn.Module):
    """A generator of independent tokens N(mean, std^2): what ARTransformer.forward returns, in one line."""

    def __init__(self, mean=0.0, std=1.0):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, tokens, cond):
        return -D.Normal(self.mean, self.std).log_prob(tokens).sum(-1).mean(), {}


def test_joint_bound_with_a_standard_normal_prior_is_the_elbo():
    images = data.draw(torch.arange(60))[0]
    model, zeros = logistic_vae(beta=1.0).eval(), torch.zeros(60, dtype=torch.long)
    with torch.no_grad():
        model.quant_conv.bias[:8] += 1.0               # a posterior far from the prior: KL 4 + nats per token
        model.quant_conv.bias[8:] -= 2.0
        draws = [bound(model, NormalPrior(), images, zeros) for _ in range(10)]
        rate = sum((logs["prior"] - logs["entropy"]).item() for _, logs in draws) / 10
        elbo = [model(images)[0].item() for _ in range(10)]
    kl = model.kl(*model.posterior(images)).sum(1).mean() / (3072 * math.log(2))
    assert abs(rate / kl - 1) < 0.01, "the prior minus the entropy is the KL"
    assert abs(sum(loss.item() for loss, _ in draws) / sum(elbo) - 1) < 0.01
    loss, logs = draws[0]
    assert torch.allclose(loss, logs["pixels"] + logs["prior"] - logs["entropy"])


def test_joint_bound_does_not_depend_on_the_normalisation():
    images, cond = data.draw(torch.arange(16))[0], torch.zeros(16, dtype=torch.long)
    model = logistic_vae().eval()
    torch.manual_seed(1)
    plain = bound(model, NormalPrior(), images, cond)[1]
    model.latent_mean.copy_(torch.randn(8))
    model.latent_scale.copy_(torch.rand(8) + 0.2)
    # N(0, 1) seen through normalise()
    prior = NormalPrior(-model.latent_mean * model.latent_scale, model.latent_scale)
    torch.manual_seed(1)
    scaled = bound(model, prior, images, cond)[1]
    assert all(torch.allclose(plain[k], scaled[k], rtol=1e-4) for k in plain)
    with pytest.raises(ValueError, match="logistic"):
        bound(vae.VAE(), NormalPrior(), images, cond)


def test_joint_bound_stays_above_the_true_surprise_found_by_quadrature():
    """One token of one number: log p(image | class) is an integral over a line, with a transformer's mixture
    as prior.
    """
    model = logistic_vae(image_size=2, token_dim=1, ch_mult=(1, 2)).eval()
    prior = ar_transformer.ARTransformer(gmm_head.GMMHead(32, 1, 4), 1, 3, token_dim=1, n_layer=1, n_head=2,
                                         n_embd=32).eval()
    images, cond, dims = torch.randint(256, (4, 3, 2, 2)) / 127.5 - 1, torch.tensor([0, 1, 2,
                                                                                     0]), 12 * math.log(2)
    with torch.no_grad():
        model.latent_mean.fill_(0.3), model.latent_scale.fill_(0.6)
        for p in model.decoder.parameters():                # a picture that depends on z
            p.add_(0.05 * torch.randn_like(p))
        z = torch.linspace(-25, 25, 8001)[:, None, None]
        raw, tokens = model.decode_raw(z), model.normalise(z)
        mean, std = model.posterior(images)
        exact, expected = [], []
        for i in range(4):
            log_x = model.log_likelihood(images[i:i + 1].expand(8001, -1, -1, -1), raw).double()
            h = prior.hidden_states(tokens[:1], cond[i:i + 1])
            log_z = prior.head.log_prob(h.expand(8001, -1, -1), tokens).double()[:, 0] + math.log(0.6)
            q = D.Normal(mean[i, 0, 0].double(), std[i, 0, 0].double()).log_prob(z[:, 0, 0].double())
            step = 50 / 8000
            assert abs(log_z.exp().sum() * step - 1) < 1e-3
            exact.append(-torch.logsumexp(log_x + log_z, 0) - math.log(step))
            expected.append((q.exp() * (q - log_x - log_z)).sum() * step)
        many = torch.arange(4).repeat(2000)
        joint = Joint(model, prior).eval()
        estimate = joint(images[many], cond[many])[0]
        assert abs(estimate * dims / torch.stack(expected).mean() - 1) < 0.01
        assert all(e > x for e, x in zip(expected, exact)), "a bound on -log p below -log p"
        draws = model.reparameterise(mean[:1].expand(20_000, -1, -1), 2 * std[:1].expand(20_000, -1, -1))
        h = prior.hidden_states(model.normalise(draws[:1]), cond[:1]).expand(20_000, -1, -1)
        weights = (model.log_likelihood(images[:1].expand(20_000, -1, -1, -1), model.decode_raw(draws))
                   + prior.head.log_prob(h, model.normalise(draws))[:, 0] + math.log(0.6)
                   - D.Normal(mean[0], 2 * std[0]).log_prob(draws)[:, 0, 0])
        importance = math.log(20_000) - torch.logsumexp(weights, 0)
        assert abs(importance - exact[0]) < 0.1, "importance sampling finds the same log p"
    joint.train()(images, cond)[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0
               for p in (model.log_scale, model.quant_conv.weight, prior.head.proj.weight))


@pytest.mark.slow
def test_joint_training_lowers_its_bound():
    model = logistic_vae(image_size=16)
    prior = ar_transformer.ARTransformer(gmm_head.GMMHead(32, 8, 2), 4, 10, token_dim=8, n_layer=1, n_head=2,
                                         n_embd=32)
    joint, (images, labels, *_) = Joint(model, prior), data.draw(torch.arange(64), 16)
    opt, losses = torch.optim.AdamW(joint.parameters(), lr=3e-3), []
    for step in range(40):
        loss, _ = joint(images, labels)
        opt.zero_grad(), loss.backward(), opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5, f"{losses[0]:.2f} to {losses[-1]:.2f} bits per dimension"


# ---- The program ---------------------------------------------------------------------------------

WORDS = [*TINY[2:], *RARELY]
MACHINE = ["--device", "cpu", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def joint_run(tmp_path_factory):
    """A tiny joint run -> its folder."""
    parent = tmp_path_factory.mktemp("joint")
    joint_recipe.main([*WORDS, "--runs", str(parent)])
    return parent / "shapes-vae-joint-ar-gmm"


def test_a_joint_run_is_one_like_any_other(joint_run, tmp_path):
    run = runs.load_run(joint_run)
    averaged = runs.read_checkpoint(joint_run)["ema"]
    for model, name in ((run.tokenizer, "vae"), (run.generator, "generator")):
        for key, value in model.state_dict().items():
            assert torch.equal(value, averaged[f"module.{name}.{key}"]), key
    for name in ("log.csv", "curve.png", "samples.png"):
        assert (joint_run / name).stat().st_size > 0
    sample.main([str(joint_run), "--n", "4", "--out", str(tmp_path / "x.png"), "--device", "cpu"])
    assert (tmp_path / "x.png").stat().st_size > 0


def test_the_bound_of_a_joint_run_is_its_validation_loss(joint_run):
    """Two ways through the program: other images of the same set, other draws."""
    metrics = json.loads((joint_run / "metrics.json").read_text())
    with open(joint_run / "log.csv", newline="") as f:
        val_loss = float(list(csv.DictReader(f))[-1]["val_loss"])
    assert metrics["bound_bits_per_dim"] == pytest.approx(val_loss, abs=0.1)
    parts = metrics["bound_pixels"] + metrics["bound_prior"] - metrics["bound_entropy"]
    assert metrics["bound_bits_per_dim"] == pytest.approx(parts)
    assert 0 < metrics["bound_bits_per_dim_error"] < 0.1


@pytest.mark.slow
def test_a_stopped_joint_run_goes_on_with_its_own_flags(joint_run, tmp_path, monkeypatch):
    def stop(path, run):
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(drawing, "save_samples", stop)
        with pytest.raises(data.BadInput, match="goes on from the last checkpoint"):
            joint_recipe.main([*WORDS, "--runs", str(tmp_path)])
    folder = tmp_path / joint_run.name
    assert not runs.read_checkpoint(folder)["done"]
    with pytest.raises(data.BadInput, match="go on with --resume"):
        joint_recipe.main([*WORDS, "--runs", str(tmp_path)])
    joint_recipe.main(["--resume", "--runs", str(tmp_path), *MACHINE])
    ours, theirs = (runs.read_checkpoint(path) for path in (folder, joint_run))
    assert ours["flags"] == theirs["flags"] and ours["flags"]["image_size"] == 16
    assert all(torch.equal(value, theirs["ema"][name]) for name, value in ours["ema"].items())


def test_a_longer_joint_run_goes_on_from_a_finished_one(joint_run, tmp_path, capsys):
    (tmp_path / joint_run.name).mkdir()
    checkpoint = (joint_run / "ckpt.pt").read_bytes()
    (tmp_path / joint_run.name / "ckpt.pt").write_bytes(checkpoint)
    joint_recipe.main(["--resume", "--steps", "26", "--runs", str(tmp_path), *MACHINE])
    assert "steps 24 to 26" in capsys.readouterr().out
    assert runs.read_checkpoint(tmp_path / joint_run.name)["step"] == 26


def test_a_linear_path_is_started_here_too(tmp_path):
    words = ["--tok_size", "patches", "--steps", "2", "--n_shapes", "60", "--runs", str(tmp_path)]
    joint_recipe.main([*WORDS, *words])
    path = runs.load_run(tmp_path / "shapes-vae-joint-ar-gmm").tokenizer.path
    assert torch.allclose(path.basis.T @ path.basis, torch.eye(path.basis.shape[1]), atol=1e-4)


@pytest.mark.slow
def test_two_stages_are_measured_by_the_same_bound(tmp_path, capsys):
    words = [*WORDS, "--two_stages", "--runs", str(tmp_path)]
    joint_recipe.main([*words, "--channels", "1"])
    run = runs.load_run(tmp_path / "shapes-vae-logistic-ar-gmm")
    assert (run.tokenizer.channels, run.tokenizer.beta, run.tokenizer.likelihood) == (1, 1.0, "logistic")
    metrics = json.loads((run.folder / "metrics.json").read_text())
    images = runs.open_split(run.args, "val", run.device)
    with torch.no_grad():
        loss, _ = bound(run.tokenizer, run.generator, *images.batch(torch.arange(len(images))))
    assert metrics["bound_bits_per_dim"] == pytest.approx(loss.item(), abs=0.05)
    capsys.readouterr()
    joint_recipe.main(words)                                # --channels is that of the run
    assert "trained already" in capsys.readouterr().out
    with pytest.raises(data.BadInput, match="--channels 3 does not fit .*--channels 1"):
        joint_recipe.main([*words, "--channels", "3"])


def test_a_denoising_vae_has_no_bound(tmp_path, capsys):
    words = ["--two_stages", "--likelihood", "mse", "--corrupt", "0.5", "--beta", "0"]
    joint_recipe.main([*WORDS, *words, "--steps", "2", "--tok_steps", "2", "--runs", str(tmp_path)])
    assert "no bound without --likelihood logistic" in capsys.readouterr().out
    run = runs.load_run(tmp_path / "shapes-vae-mse-ar-gmm")
    assert (run.tokenizer.corrupt, run.tokenizer.beta) == (0.5, 0.0)


@pytest.mark.parametrize("words, sentence", [
    (["--generator", "maskgit"], "needs --generator ar"),
    (["--head", "diffusion"], "needs --generator ar and --head gmm"),
    (["--likelihood", "mse"], "or give --two_stages"), (["--beta", "0.5"], "or give --two_stages"),
    (["--corrupt", "0.1"], "images as they are"),
    (["--two_stages", "--corrupt", "-1"], "must not be negative"),
    (["--gan", "1"], "mean something else"), (["--tokenizer", "vq"], "that of a VAE"),
    (["--frames", "17"], "is of images"), (["--condition", "text"], "images of a class"),
    (["--resume"], "there is no run"), (["--image_size", "20"], "not a multiple of 8")])
def test_what_has_no_bound_is_refused(words, sentence, tmp_path):
    with pytest.raises(data.BadInput, match=sentence):
        joint_recipe.main([*WORDS, "--runs", str(tmp_path), *words])
    assert not list(tmp_path.iterdir())
