"""Tests of train.py: runs of every kind, kills and resumption, several processes."""
import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import ar_transformer
import data
import flow_adapter
import gmm_head
import mar
import maskgit
import perceptual_gan
import train
from common import classifier, drawing, muon, runs
from tests.helpers import ENV, IDS, RARELY, ROOT, TINY, log_of
from tests.test_drawing import bf16_draws_nearly_what_fp32_draws


def test_a_run_leaves_its_files_and_is_not_trained_again(tiny_run, capsys):
    folder = tiny_run / "shapes-vae-ar-gmm"
    for name in ("ckpt.pt", "log.csv", "curve.png", "samples.png"):
        assert (folder / name).stat().st_size > 0
    assert (tiny_run / "shapes-vae" / "reconstructions.png").exists() and not list(tiny_run.rglob("*.tmp"))
    train.main([*TINY, "--runs", str(tiny_run)])
    assert "trained already" in capsys.readouterr().out


COMBINATIONS = [(["--generator", "maskgit"], "shapes-vae-maskgit-gmm"),
     (["--adapter", "flow"], "shapes-vae-flow-ar-gmm"),
     (["--generator", "maskgit", "--adapter", "flow"], "shapes-vae-flow-maskgit-gmm"),
     (["--generator", "mar", "--head", "diffusion"], "shapes-vae-mar-diffusion"),
     (["--generator", "mar", "--head", "diffusion", "--objective", "flow", "--name", "mf"], "mf"),
     (["--generator", "mar", "--order", "raster", "--attention", "causal", "--name", "mc"], "mc"),
     (["--head", "diffusion"], "shapes-vae-ar-diffusion"), ([*IDS], "shapes-vq-ar-categorical"),
     ([*IDS, "--generator", "maskgit"], "shapes-vq-maskgit-categorical"),
     ([*IDS, "--generator", "mar"], "shapes-vq-mar-categorical"),
     (["--perceptual", "1", "--gan", "0.5", "--tok_name", "vg", "--name", "vg-ar"], "vg-ar"),
     ([*IDS, "--gan", "0.5", "--tok_name", "qg", "--name", "qg-ar"], "qg-ar"),
     ([*IDS, "--tokenizer", "lfq", "--vocab_size", "64", "--generator", "maskgit"
       ], "shapes-lfq-maskgit-categorical"),
     ([*IDS, "--tokenizer", "titok", "--tokens", "6", "--generator", "maskgit"
       ], "shapes-titok-maskgit-categorical"),
     (["--tokenizer", "titok-vae", "--tokens", "5", "--generator", "mar", "--head", "diffusion"
       ], "shapes-titok-vae-mar-diffusion"),
     ([
         *IDS, "--codebook", "ema", "--vocab_size", "32", "--tok_name", "ve", "--generator", "mar",
         "--attention", "causal", "--flip", "--name", "vc"
     ], "vc"),
     (["--tokenizer", "msvq", "--head", "categorical", "--generator", "var"], "shapes-msvq-var-categorical")]


@pytest.mark.parametrize("words, name", [pytest.param(*row, marks=[pytest.mark.slow] * (i % 2))
                                         for i, row in enumerate(COMBINATIONS)])     # each second is slow
def test_every_combination_trains_loads_and_samples(words, name, tiny_run, capsys, monkeypatch):
    few = (0, 12, 32, 4e-3)                                 # of --perceptual: 12 steps are enough
    monkeypatch.setattr(classifier.train_classifier, "__defaults__", few)
    for kind in ("ar-diffusion", "mar-diffusion"):          # where 100 would take seconds
        monkeypatch.setitem(drawing.DEFAULTS, kind, drawing.DEFAULTS[kind] | dict(diffusion_steps=8))
    train.main([*TINY, *RARELY, "--steps", "12", "--runs", str(tiny_run), *words])
    assert (tiny_run / name / "samples.png").stat().st_size > 0 and (tiny_run / name / "curve.png").exists()
    run = runs.load_run(tiny_run / name)
    images = drawing.draw_samples(run, torch.arange(4))
    assert images.shape == (4, 3, 16, 16) and torch.isfinite(images).all()
    assert all(torch.isfinite(torch.tensor(v)) for v in log_of(tiny_run, name).values())
    if name in ("shapes-vae-maskgit-gmm", "shapes-vae-mar-diffusion", "shapes-vq-ar-categorical",
                "shapes-vq-maskgit-categorical", "mc"):
        bf16_draws_nearly_what_fp32_draws(run)


# Trainings one after another, each in a process of its own. Forked, they import torch but once.
ONE_AFTER_ANOTHER = """
import json, os, sys
import matplotlib.pyplot, torch._dynamo
import train
from tests import mini
mini.begin()
train.SAVE_SECONDS = 0
for words in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        print("process", os.getpid(), flush=True)
        train.main(words)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_killed_twice_and_resumed_equals_uninterrupted_bit_for_bit(tiny_run, tmp_path):
    words = [*TINY, "--runs", str(tmp_path)]
    commands = json.dumps([words, [*words, "--resume"], [*words, "--resume"]])
    process = subprocess.Popen([sys.executable, "-c", ONE_AFTER_ANOTHER, commands], text=True, cwd=ROOT,
                               stdout=subprocess.PIPE, env=ENV)
    to_kill = ["stage 1", "stage 2"]
    stage, said = None, ""
    for line in process.stdout:
        said += line
        if line.startswith("process "):
            child = int(line.split()[1])
        if line.startswith("stage "):
            stage = line[:7]
        if to_kill and stage == to_kill[0] and line.startswith("step     12"):
            os.kill(child, signal.SIGKILL)
            del to_kill[0]
    process.stdout.close()
    assert process.wait() == 0 and not to_kill, said
    assert said.count("process ") == 3 and "done in" not in said.split("process ")[2], said
    for name in ("shapes-vae", "shapes-vae-ar-gmm"):
        ours, theirs = runs.read_checkpoint(tmp_path / name), runs.read_checkpoint(tiny_run / name)
        for part in ("model", "ema"):
            assert all(torch.equal(v, theirs[part][k])
                       for k, v in ours[part].items()), f"{name}: {part} differs"
        assert log_of(tmp_path, name) == log_of(tiny_run, name)
    both = [runs.load_run(folder / "shapes-vae-ar-gmm") for folder in (tmp_path, tiny_run)]
    assert torch.equal(*(drawing.draw_samples(run, torch.arange(10)) for run in both))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(SystemExit, match="the loss is not finite") as caught:
        train.main([*TINY, "--runs", str(tmp_path), "--tok_lr", "1e30", "--warmup", "1",
                    "--generator", "none"])
    step = int(re.search(r"step (\d+): the loss is not finite", str(caught.value)).group(1))
    saved = runs.read_checkpoint(tmp_path / "shapes-vae")
    assert saved["step"] <= step
    assert all(torch.isfinite(v).all() for v in saved["model"].values() if v.is_floating_point())


@pytest.mark.parametrize("name", ["vae", "vq", "lfq", "titok", "titok-vae", "msvq"])
def test_the_adversarial_losses_go_around_every_tokenizer(name):
    given = argparse.Namespace(tokenizer=name, generator="none", head=None, frames=None)
    args = argparse.Namespace(**runs.defaults_of(given, torch.device("cpu")), tokenizer=name)
    tokenizer = runs.build_tokenizer(args)
    model = perceptual_gan.AdversarialTokenizer(tokenizer, perceptual_gan.PatchDiscriminator.for_images(32),
                                                start=0, adaptive=True)
    images = data.draw(torch.arange(4))[0]
    loss, logs = model(images)
    loss.backward()
    assert torch.isfinite(loss) and 0 < logs["adaptive"] < 1e4
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.discriminator.parameters())
    assert tokenizer.get_parameter(model.last_layer).grad.abs().sum() > 0
    assert model.decode(model.encode(images)).shape == images.shape


def test_learning_rate_rises_then_falls_to_zero():
    rates = [train.learning_rate(s, 100, 10, 2.0) for s in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(max(rates),
                                                                        rel=0.05) and rates[-1] < 1e-2
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))


@pytest.mark.parametrize("tokenizer", ["titok", "vae"])
def test_adamw_is_used_alone_where_it_is_asked_for(tokenizer):
    """TiTok's blocks and a VAE's kernels are trained with Muon where --optimizer adamw is not given."""
    given = argparse.Namespace(tokenizer=tokenizer, generator="none", head=None, frames=None)
    cpu = torch.device("cpu")
    args = argparse.Namespace(**runs.defaults_of(given, cpu), tokenizer=tokenizer, device=cpu)
    model = runs.build_tokenizer(args)
    args.optimizer = "adamw"
    assert len(train.make_optimizers(model, args, 1e-3)) == 1
    args.optimizer = "muon"
    assert len(train.make_optimizers(model, args, 1e-3)) == 2


def test_muon_takes_kernels_but_none_of_a_discriminator():
    model = nn.ModuleDict(dict(net=nn.Conv2d(3, 4, 3), discriminator=nn.Conv2d(3, 4, 3)))
    args = argparse.Namespace(optimizer="muon", weight_decay=0.0, device=torch.device("cpu"))
    _, optimizer = train.make_optimizers(model, args, 1e-3)
    [kernel] = optimizer.param_groups[0]["params"]
    assert kernel is model["net"].weight


@pytest.mark.parametrize("name, blocks", [("ar", muon.ROWS), ("maskgit", None), ("mar", muon.ROWS)])
def test_maskgit_alone_learns_from_whole_matrices(name, blocks):
    args = argparse.Namespace(optimizer="muon", weight_decay=0.0, device=torch.device("cpu"))
    head = gmm_head.GMMHead(n_embd=16, token_dim=2, n_mix=2)
    build = dict(ar=ar_transformer.ARTransformer, maskgit=maskgit.MaskGIT, mar=mar.MAR)[name]
    model = build(head, seq_len=4, num_classes=3, token_dim=2, n_layer=1, n_head=2, n_embd=16)
    adapted = flow_adapter.Adapted(flow_adapter.FlowAdapter(2, (2, 2)), model)
    for whole in (model, adapted):
        _, optimizer = train.make_optimizers(whole, args, 1e-3)
        assert [group["rows"] for group in optimizer.param_groups] == [blocks]


def test_a_checkpoint_of_another_optimizer_is_refused(tiny_run, tmp_path):
    folder = tmp_path / "runs" / "shapes-vae"
    shutil.copytree(tiny_run / "shapes-vae", folder)
    checkpoint = torch.load(folder / "ckpt.pt", weights_only=True)
    checkpoint["optimizers"] = checkpoint["optimizers"][:1]                           # AdamW's alone
    torch.save(checkpoint | dict(done=False, step=12), folder / "ckpt.pt")
    with pytest.raises(SystemExit, match="shapes-vae: begun by an earlier version.*--overwrite"):
        train.main([*TINY, "--runs", str(tmp_path / "runs"), "--generator", "none", "--resume"])


def test_steps_may_be_raised_with_resume(tiny_run, tmp_path, capsys):
    folder = tmp_path / "runs"
    shutil.copytree(tiny_run / "shapes-vae", folder / "shapes-vae")
    words = [*TINY, "--runs", str(folder), "--generator", "none", "--tok_steps", "26", "--resume"]
    train.main(words)
    assert "--tok_steps 26 instead of 24" in capsys.readouterr().out
    assert runs.read_checkpoint(folder / "shapes-vae")["step"] == 26
    with pytest.raises(SystemExit, match="is at step 26 already"):
        train.main([*words[:-3], "--tok_steps", "20", "--resume"])


def test_a_lower_learning_rate_goes_on_with_resume(tmp_path, capsys):
    """The advice of the sentence about a loss that is not finite."""
    words = [*TINY, "--runs", str(tmp_path), "--generator", "none"]
    with pytest.raises(SystemExit, match="the loss is not finite.*--resume with a lower --tok_lr"):
        train.main([*words, "--tok_lr", "1e30", "--warmup", "1"])
    with pytest.raises(SystemExit, match="--warmup 4 does not fit"):
        train.main([*words, "--tok_lr", "1e-3", "--resume"])
    words = [word for pair in zip(words[::2], words[1::2]) if pair[0] != "--warmup" for word in pair]
    capsys.readouterr()
    train.main([*words, "--tok_lr", "1e-3", "--resume"])
    assert "--tok_lr 0.001 instead of 1e+30" in capsys.readouterr().out
    saved = runs.read_checkpoint(tmp_path / "shapes-vae")
    assert saved["done"] and saved["step"] == 24 and saved["flags"]["tok_lr"] == 1e-3
    assert all(np.isfinite(loss) for loss in log_of(tmp_path, "shapes-vae").values())


def test_without_resume_another_learning_rate_is_another_run(tiny_run):
    with pytest.raises(SystemExit, match="--lr 0.001 does not fit .*--lr 0.006.*--overwrite"):
        train.main([*TINY, "--runs", str(tiny_run), "--lr", "0.001"])


@pytest.fixture(scope="module")
def pictures_run(tmp_path_factory):
    """A tokenizer trained on a folder of pictures -> the folder of both."""
    parent = tmp_path_factory.mktemp("pictures")
    draws = torch.Generator("cpu").manual_seed(0)
    for split, n in (("train", 24), ("val", 6)):
        for kind in "ab":
            (parent / "photos" / split / kind).mkdir(parents=True)
            for i in range(n):
                pixels = torch.randint(256, (16, 16, 3), generator=draws, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(parent / "photos" / split / kind / f"{i}.png")
    train.main([*OF_PICTURES, "--data", str(parent / "photos"), "--runs", str(parent / "runs")])
    (parent / "photos").rename(parent / "kept")             # the path that the checkpoint names is gone
    return parent


OF_PICTURES = ["--tokenizer", "vae", "--generator", "none", "--image_size", "16", "--tok_steps", "4",
               "--tok_batch_size", "4", "--tok_name", "mine", "--device", "cpu", "--dtype", "fp32"]


def moved(pictures_run, tmp_path):
    """The pictures and the run in another place, under another name -> folders of both."""
    shutil.copytree(pictures_run / "kept", tmp_path / "elsewhere" / "holiday")
    shutil.copytree(pictures_run / "runs" / "mine", tmp_path / "runs" / "mine")
    return tmp_path / "elsewhere" / "holiday", tmp_path / "runs"


def test_a_run_goes_on_with_the_same_images_under_another_path(pictures_run, tmp_path, capsys):
    photos, parent = moved(pictures_run, tmp_path)
    words = [*OF_PICTURES, "--data", str(photos), "--runs", str(parent)]
    train.main([*words, "--tok_steps", "6", "--resume"])
    assert "steps 4 to 6" in capsys.readouterr().out
    assert runs.read_checkpoint(parent / "mine")["step"] == 6


def test_a_run_does_not_go_on_with_images_that_changed(pictures_run, tmp_path):
    photos, parent = moved(pictures_run, tmp_path)
    with Image.open(photos / "train" / "a" / "3.png") as image:
        pixels = np.asarray(image).copy()
    pixels[5, 5, 1] ^= 255                                  # one number of one picture
    Image.fromarray(pixels).save(photos / "train" / "a" / "3.png")
    words = [*OF_PICTURES, "--data", str(photos), "--runs", str(parent)]
    with pytest.raises(SystemExit, match="these are not the images that .*mine was trained on"):
        train.main([*words, "--tok_steps", "6", "--resume"])
    assert runs.read_checkpoint(parent / "mine")["step"] == 4
    train.main([*words, "--overwrite"])                     # the remedy that the sentence names
    assert runs.read_checkpoint(parent / "mine")["done"]


def test_checkpoints_come_by_time_between_validations(tmp_path, monkeypatch):
    """Else a long run of few validations would lose hours; not after every step, which would cost more."""
    saved = []

    def note(state, path):
        saved.append((state["step"], state["done"]))
    monkeypatch.setattr(runs, "save_atomically", note)
    words = [*TINY, "--runs", str(tmp_path), "--generator", "none", "--tok_steps", "6"]
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    train.main([*words, "--tok_name", "often"])
    assert saved == [(step, False) for step in range(7)] + [(6, True)]
    saved.clear()
    monkeypatch.setattr(train, "SAVE_SECONDS", 1e9)
    train.main([*words, "--tok_name", "seldom", "--eval_every", "4"])
    assert saved == [(0, False), (6, False), (6, True)], "a validation is no reason to save"


def test_a_resumed_run_refuses_a_tokenizer_that_was_trained_anew(tiny_run, tmp_path):
    for name in ("shapes-vae", "shapes-vae-ar-gmm"):
        shutil.copytree(tiny_run / name, tmp_path / name)
    path = tmp_path / "shapes-vae" / "ckpt.pt"
    state = runs.read_checkpoint(path.parent)
    state["ema"]["module.quant_conv.bias"] += 1
    runs.save_atomically(state, path)
    with pytest.raises(SystemExit, match="begun on the tokens of another tokenizer"):
        train.main([*TINY, "--runs", str(tmp_path), "--steps", "26", "--resume"])
