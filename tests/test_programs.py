"""Tests of programs."""
import argparse
import contextlib
import functools
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ar_transformer
import compression
import data
import evaluate
import lfq
import mar
import maskgit
import perceptual_gan
import sample
import titok
import train
import vae
import vq
from tests.helpers import (ENV, IDS, RARELY, TINY, call, command, golden, llamagen, log_of, magvit_shapes,
                           official_mar, official_vae, open_magvit2, titok_golden, vq_golden)


def test_a_run_leaves_its_files_and_samples(tiny_run, tmp_path):
    folder = tiny_run / "shapes-vae-ar-gmm"
    for name in ("ckpt.pt", "log.csv", "curve.png", "samples.png"):
        assert (folder / name).stat().st_size > 0
    assert (tiny_run / "shapes-vae" / "reconstructions.png").exists() and not list(tiny_run.rglob("*.tmp"))
    out = call("sample.py", folder, "--npz", tmp_path / "x.npz", "--gif", tmp_path / "x.gif", "--out", tmp_path / "x.png", "--n", 30)
    assert re.search(r"s per image at batch 30, fp32, cpu", out)
    with np.load(tmp_path / "x.npz") as f:
        assert f["arr_0"].shape == (30, 16, 16, 3) and f["arr_0"].dtype == np.uint8
        assert (np.bincount(f["labels"]) == 3).all()
    assert Image.open(tmp_path / "x.gif").n_frames == 4 and Image.open(tmp_path / "x.png").width > 100
    assert "trained already" in call("train.py", *TINY, "--runs", tiny_run)


@pytest.mark.parametrize("words, name", [
    (["--generator", "maskgit"], "shapes-vae-maskgit-gmm"), (["--adapter", "flow"], "shapes-vae-flow-ar-gmm"),
    (["--joint"], "shapes-vae-joint-ar-gmm"), (["--mix", "channel", "--name", "c"], "c"), (["--mix", "full", "--name", "f"], "f"),
    (["--generator", "maskgit", "--adapter", "flow"], "shapes-vae-flow-maskgit-gmm"),
    (["--generator", "mar", "--head", "diffusion", "--head_width", "32", "--head_depth", "1"], "shapes-vae-mar-diffusion"),
    (["--generator", "mar", "--head", "diffusion", "--objective", "flow", "--head_width", "32", "--name", "mf"], "mf"),
    (["--generator", "mar", "--order", "raster", "--attention", "causal", "--name", "mc"], "mc"),
    (["--head", "diffusion", "--head_width", "32", "--head_depth", "1"], "shapes-vae-ar-diffusion"),
    ([*IDS], "shapes-vq-ar-categorical"), ([*IDS, "--generator", "maskgit"], "shapes-vq-maskgit-categorical"),
    ([*IDS, "--generator", "mar"], "shapes-vq-mar-categorical"),
    (["--perceptual", "1", "--gan", "0.5", "--gan_start", "12", "--adaptive", "--tok_name", "vg", "--name", "vg-ar"], "vg-ar"),
    ([*IDS, "--gan", "0.5", "--gan_loss", "non-saturating", "--tok_name", "qg", "--name", "qg-ar"], "qg-ar"),
    ([*IDS, "--tokenizer", "lfq", "--vocab_size", "64", "--generator", "maskgit"], "shapes-lfq-maskgit-categorical"),
    ([*IDS, "--tokenizer", "titok", "--tokens", "6", "--generator", "maskgit"], "shapes-titok-maskgit-categorical"),
    (["--tokenizer", "titok-vae", "--tokens", "5", "--generator", "mar", "--head", "diffusion", "--head_width", "32"],
     "shapes-titok-vae-mar-diffusion"),
    ([*IDS, "--codebook", "ema", "--vocab_size", "32", "--tok_name", "ve", "--generator", "mar", "--attention", "causal",
      "--flip", "--name", "vc"], "vc")])
def test_every_combination_trains_loads_and_samples(words, name, tiny_run, capsys, monkeypatch):
    monkeypatch.setattr(evaluate.train_classifier, "__defaults__", (0, 12, 32, 4e-3))       # of --perceptual: 12 steps are enough
    train.main([*TINY, *RARELY, "--runs", str(tiny_run), *words])
    assert (tiny_run / name / "samples.png").stat().st_size > 0 and (tiny_run / name / "curve.png").exists()
    run = train.load_run(tiny_run / name)
    images = sample.draw_samples(run, torch.arange(4))
    assert images.shape == (4, 3, 16, 16) and torch.isfinite(images).all()
    assert all(torch.isfinite(torch.tensor(v)) for v in log_of(tiny_run, name).values())
    if name in ("shapes-vae-maskgit-gmm", "shapes-vae-mar-diffusion", "shapes-vq-ar-categorical", "shapes-vq-maskgit-categorical",
                "mc", "f"):
        bf16_draws_nearly_what_fp32_draws(run)


@pytest.mark.parametrize("words, folder", [(IDS, "shapes-vq-text-ar-categorical"), ([], "shapes-vae-text-ar-gmm")])
def test_captions_are_trained_drawn_and_judged(words, folder, tiny_run, tmp_path, capsys, monkeypatch):
    train.main([*TINY, *RARELY, "--runs", str(tiny_run), "--condition", "text", *words])
    run = train.load_run(tiny_run / folder)
    assert run.args.text_len == max(len(t.encode()) for t in data.captions(torch.arange(200)))
    texts = ["a small red ring in the middle on a black background", "a large blue disc at the top on a dark red background " * 9]
    one, other = (sample.draw_captions(run, [t] * 4) for t in texts)
    assert one.shape == (4, 3, 16, 16) and torch.isfinite(one).all() and not torch.equal(one, other), "the caption has no effect"
    sample.main([str(tiny_run / folder), "--prompt", *texts, "--n", "6", "--out", str(tmp_path / "x.png"), "--npz", str(tmp_path / "x.npz")])
    with np.load(tmp_path / "x.npz") as f:
        assert f["arr_0"].shape == (6, 16, 16, 3) and list(f["texts"]) == [texts[0]] * 3 + [texts[1]] * 3
    unseen, wanted = evaluate.unseen_captions(run, 20)
    assert not set(unseen) & set(data.captions(torch.arange(200)))
    first = data.captions(torch.arange(data.VAL_INDEX, data.VAL_INDEX + 20))
    with monkeypatch.context() as m:                        # what was trained on is not asked for
        m.setattr(train, "captions_of", lambda *a: first)
        assert not set(evaluate.unseen_captions(run, 20)[0]) & set(first)
    for text, k, c in zip(unseen, wanted["shape"], wanted["colour"]):
        assert data.SHAPES[k] in text and list(data.COLOURS)[c] in text
    args = argparse.Namespace(n=20, seed=0, batch_size=20, cfg=None, temperature=None)
    rows = {key: value for key, _, value, _, _ in evaluate.measure_captions(args, run, "cpu")}
    assert all(0 <= v <= 100 for v in rows.values()) and rows["caption_all_three"] <= rows["caption_shape"]
    for words, sentence in [(["--class", "star"], "ask with --prompt"), (["--prompt"], "expected at least one")]:
        with pytest.raises(SystemExit, match=sentence if sentence[0] == "a" else None):
            sample.main([str(tiny_run / folder), *words])
    with pytest.raises(SystemExit, match="knows classes, not captions"):
        sample.main([str(tiny_run / "shapes-vae-ar-gmm"), "--prompt", "a star"])


def test_killed_twice_and_resumed_equals_uninterrupted_bit_for_bit(tiny_run, tmp_path):
    for stage, more in (("stage 1", []), ("stage 2", ["--resume"])):
        words = command("train.py", *TINY, "--runs", tmp_path, *more)
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=ENV)
        inside = False
        for line in process.stdout:
            inside = inside or line.startswith(stage)
            if inside and line.startswith("step     12"):
                process.send_signal(signal.SIGKILL)
                break
        process.wait(), process.stdout.close()
        assert inside and process.returncode == -signal.SIGKILL
    call("train.py", *TINY, "--runs", tmp_path, "--resume")
    for name in ("shapes-vae", "shapes-vae-ar-gmm"):
        ours, theirs = train.read_checkpoint(tmp_path / name), train.read_checkpoint(tiny_run / name)
        for part in ("model", "ema"):
            assert all(torch.equal(v, theirs[part][k]) for k, v in ours[part].items()), f"{name}: {part} differs"
        assert log_of(tmp_path, name) == log_of(tiny_run, name)
    runs = [train.load_run(r / "shapes-vae-ar-gmm") for r in (tmp_path, tiny_run)]
    assert torch.equal(*(sample.draw_samples(r, torch.arange(10)) for r in runs))


def test_two_processes_follow_one(tmp_path):
    """Without noise inside the models (beta 0, no label dropping) the losses are equal up to rounding."""
    options = [*TINY, "--beta", "0", "--label_drop", "0", "--eval_every", "24"]
    train.main([*options, "--runs", str(tmp_path / "one")])
    call("train.py", *options, "--runs", tmp_path / "two", torchrun=2)
    for name in ("shapes-vae", "shapes-vae-ar-gmm"):
        one, two = log_of(tmp_path / "one", name), log_of(tmp_path / "two", name)
        assert one.keys() == two.keys() and len(one) > 4
        assert all(abs(one[s] - two[s]) <= 2e-3 * (1 + abs(one[s])) for s in one), (name, one, two)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "ckpt.pt"
    train.save_atomically({"step": 1}, path)
    full = path.with_suffix(f".{os.getpid()}.tmp")
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    full.symlink_to("/dev/full")                            # writing there fails as on a full disk
    with pytest.raises(data.BadInput, match="could not write"):
        train.save_atomically({"step": 2, "x": torch.zeros(100_000)}, path)
    assert torch.load(path, weights_only=True) == {"step": 1} and not full.exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    out = call("train.py", *TINY, "--runs", tmp_path, "--tok_lr", "1e30", "--warmup", "1", "--generator", "none", code=1)
    step = int(re.search(r"step (\d+): the loss is not finite", out).group(1))
    saved = train.read_checkpoint(tmp_path / "shapes-vae")
    assert "Traceback" not in out and saved["step"] <= step
    assert all(torch.isfinite(v).all() for v in saved["model"].values() if v.is_floating_point())


@pytest.mark.parametrize("words, sentence", [
    (["--head", "categorical"], "use --head gmm"),
    (["--data", "nowhere"], "no such file or folder"),
    (["--device", "cuda:77"], "--device cuda:77: not on this machine"),
    (["--device", "toaster"], "--device toaster: not on this machine"),
    (["--resume", "--runs", "nowhere"], "there is no run"),
    (["--resume", "--overwrite"], "give one of them"),
    (["--image_size", "20"], "not a multiple of 8"),
    (["--steps", "0"], "--steps 0: must be at least 1"),
    (["--lr", "-1"], "--lr -1.0: must be above 0"),
    (["--label_drop", "1.5"], "must be below 1"),
    (["--task", "segment", "--generator", "maskgit"], "only --generator ar"),
    (["--task", "segment", "--flip"], "mirrored apart"),
    (["--head", "diffusion", "--generator", "maskgit"], "--head diffusion gives no density"),
    (["--generator", "mar", "--mask_min", "1"], "--mask_min 1.0: a share"),
    (["--generator", "mar", "--attention", "causal", "--n_buffer", "4"], "no encoder and no buffer"),
    (["--joint", "--generator", "maskgit"], "needs --generator ar"),
    (["--mix", "full", "--n_mix", "4"], "--mix full is one Gaussian"),
    (["--size", "gpt-b", "--generator", "maskgit"], "--generator maskgit has nano, tiny"),
])
def test_train_refuses_in_one_sentence(words, sentence, tmp_path, capsys):
    base = ["--tokenizer", "vae", "--head", "gmm", "--runs", str(tmp_path), "--n_shapes", "50"]
    with pytest.raises(SystemExit) as caught:
        train.main(base + words)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("ckpt.pt"))


def test_refusals_end_with_an_exit_code_and_no_traceback(tiny_run, tmp_path, capsys):
    folder = str(tiny_run / "shapes-vae-ar-gmm")
    for words, sentence in [(["train.py", *TINY, "--runs", tiny_run, "--beta", "0.5"], "--beta 0.5 does not fit .* --beta 0.02"),
                            (["sample.py", folder, "--class", "heart"], "the classes are disc"),
                            (["evaluate.py", folder, "--n", 3], "--n 3")]:
        out = call(*words, code=1)
        assert re.search(sentence, out) and "Traceback" not in out, out
    for program, words, sentence in [(sample, [tmp_path], "no ckpt.pt"), (train, ["--tokenizer", "vae", "--no_flag"], "unrecognized arguments"),
                                     (sample, [tiny_run / "shapes-vae"], "a tokenizer alone cannot draw")]:
        with pytest.raises(SystemExit) as caught:           # the interpreter prints its text and exits with 1
            program.main([str(w) for w in words])
        assert caught.value.code not in (0, None) and re.search(sentence, f"{caught.value} {capsys.readouterr().err}")


@pytest.mark.parametrize("words, sentence", [
    (["--tokenizer", "vae", "--head", "categorical"], "gives real vectors: use --head gmm"),
    (["--tokenizer", "vq", "--head", "gmm"], "gives ids: use --head categorical"),
    (["--tokenizer", "vq", "--adapter", "flow"], "--adapter: needs --tokenizer vae"),
    (["--tokenizer", "lfq", "--vocab_size", "1000"], "power of 2"), (["--tokenizer", "lfq", "--token_dim", "8"], "10 bits for 1024"),
    (["--tokenizer", "vae", "--vocab_size", "64"], "--vocab_size: is for"), (["--tokenizer", "vq", "--tokens", "8"], "--tokens: is for"),
    (["--tokenizer", "vq", "--stage", "proxy"], "--stage proxy: is for --tokenizer titok"), (["--tokenizer", "titok", "--proxy", "x"],
                                                                                            "goes with --stage"),
    (["--tokenizer", "titok", "--stage", "finetune"], "--proxy RUN"),
    (["--tokenizer", "vq", "--tok_size", "kl16"], "--tok_size kl16: --tokenizer vq has"),
    (["--tokenizer", "vq", "--condition", "text", "--generator", "mar"], "only --generator ar reads captions"),
    (["--tokenizer", "vq", "--condition", "text", "--flip"], "may say left or right"), (["--tokenizer", "vq", "--text_len", "9"], "goes with"),
    (["--tokenizer", "vae", "--gan_start", "5"], "go with --gan"), (["--tokenizer", "vae", "--lpips", "vgg.pth"], "gives it a weight"),
    (["--tokenizer", "vae", "--gan", "1", "--likelihood", "logistic"], "losses mean something else"),
    (["--tokenizer", "vae", "--gan", "-1"], "--gan -1.0: must not be negative")])
def test_what_cannot_work_together_is_refused(words, sentence, tmp_path):
    with pytest.raises(SystemExit, match=sentence):
        train.main([*words, "--runs", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_captions_and_their_encoder_are_asked_for_in_a_sentence(tiny_run, tmp_path, monkeypatch):
    pictures = tmp_path / "pictures"
    for split in ("train", "val"):
        (pictures / split / "a").mkdir(parents=True)
        words = [*TINY, "--runs", str(tmp_path), "--data", str(pictures), "--condition", "text"]
        if split == "val":
            with pytest.raises(SystemExit, match="no images in val/, which is for validation"):
                train.main(words)
        for i in range(4):
            Image.fromarray(np.full((16, 16, 3), 60 * i, np.uint8)).save(pictures / split / "a" / f"{i}.png")
    with pytest.raises(SystemExit, match="write NAME.txt beside NAME.jpg"):
        train.main(words)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="pip install transformers"):
        train.main([*TINY, *RARELY, "--runs", str(tiny_run), "--condition", "text", "--text_encoder", "t5-small", "--name", "t5"])


@pytest.mark.parametrize("name", ["vae", "vq", "lfq", "titok", "titok-vae"])
def test_the_adversarial_losses_go_around_every_tokenizer(name):
    args = argparse.Namespace(**train.DEFAULTS["any"] | train.DEFAULTS["cpu"] | train.DEFAULTS.get(f"any-{name}", {}), token_dim=None)
    args.tokenizer = name
    tokenizer = train.build_tokenizer(args)
    model = perceptual_gan.AdversarialTokenizer(tokenizer, perceptual_gan.PatchCritic.for_images(32), start=0, adaptive=True)
    images = data.draw(torch.arange(4))[0]
    loss, logs = model(images)
    loss.backward()
    assert torch.isfinite(loss) and 0 < logs["adaptive"] < 1e4
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.discriminator.parameters())
    assert tokenizer.get_parameter(model.last_layer).grad.abs().sum() > 0
    assert model.decode(model.encode(images)).shape == images.shape


def test_an_unfinished_run_is_not_overwritten_by_accident(tiny_run, tmp_path):
    folder = tmp_path / "shapes-vae"
    folder.mkdir()
    state = train.read_checkpoint(tiny_run / "shapes-vae")
    torch.save(state | {"done": False, "step": 12}, folder / "ckpt.pt")
    with pytest.raises(SystemExit, match="--resume.*--overwrite"):
        train.main([*TINY, "--runs", str(tmp_path)])
    assert train.read_checkpoint(folder)["step"] == 12
    (folder / "ckpt.pt").write_bytes(b"half a file")
    with pytest.raises(SystemExit, match="not a readable checkpoint"):
        train.main([*TINY, "--runs", str(tmp_path)])


def test_the_token_cache_is_remade_when_the_tokenizer_changes(tmp_path):
    images = data.load(n_shapes=60)
    tokenizer = vae.VAE().eval()
    first = train.token_cache(tokenizer, images, tmp_path, "train", True)
    stamp = (tmp_path / "tokens-train.pt").stat().st_mtime_ns
    train.token_cache(tokenizer, images, tmp_path, "train", True)
    assert (tmp_path / "tokens-train.pt").stat().st_mtime_ns == stamp, "an unchanged tokenizer reads the cache"
    with torch.no_grad():
        tokenizer.quant_conv.bias += 1
    second = train.token_cache(tokenizer, images, tmp_path, "train", True)
    assert torch.allclose(second.arrays["mean"], first.arrays["mean"] + 1, atol=1e-4)
    images.flip = True
    flipped = train.token_cache(tokenizer, images, tmp_path, "train", True)
    mean = tokenizer.posterior(images.images.float().flip(-1) / 127.5 - 1)[0]
    assert len(flipped.arrays["mean"]) == 120 and torch.allclose(flipped.arrays["mean"][60:], mean, atol=1e-4)
    assert flipped.batch(torch.arange(60))[0].shape == (60, 16, 8)
    a, b = (first.batch(torch.arange(4))[0] for _ in range(2))
    assert not torch.equal(a, b), "every batch draws fresh tokens from the posterior"


def test_learning_rate_rises_then_falls_to_zero():
    rates = [train.learning_rate(s, 100, 10, 2.0) for s in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(max(rates), rel=0.05) and rates[-1] < 1e-2
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
