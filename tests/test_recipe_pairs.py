"""Tests of recipes/pairs.py: pairs are read or made, trained on, drawn and measured."""
import json
import math

import pytest
import torch
from PIL import Image

import data
import sample
import train
from common import drawing, files, runs
from recipes import pairs

WORDS = ["--n_shapes", "100", "--image_size", "16", "--tok_steps", "12", "--tok_batch_size", "8",
         "--steps", "12", "--batch_size", "8", "--size", "mini", "--tok_size", "mini", "--warmup",
         "4", "--log_every", "12", "--eval_every", "12", "--device", "cpu", "--dtype", "fp32", "--n", "12",
         "--pictures", "2"]


@pytest.mark.parametrize("task", ["segment", "depth"])
def test_maps_of_images_are_trained_drawn_and_measured(task, tmp_path_factory, capsys):
    folder = tmp_path_factory.getbasetemp() / "maps"        # both tasks on one tokenizer of images
    pairs.main(["--task", task, "--runs", str(folder), *WORDS])
    first = capsys.readouterr().out
    run_folder = folder / f"shapes-vae-{task}-ar-gmm"
    for picture in (folder / f"shapes-vae-{task}" / "reconstructions.png", run_folder / "samples.png"):
        assert picture.stat().st_size > 0
    assert first.count("stage 1: ") == (2 if task == "segment" else 1) and first.count("stage 2: ") == 1
    metrics = json.loads((run_folder / "metrics.json").read_text())
    assert metrics["cfg"] == 1.0 and metrics["temperature"] == 0.9 and metrics["n"] == 12
    if task == "segment":
        assert 0 <= metrics["miou"] <= 1 and metrics["miou_tokenizer"] > metrics["miou_ground"] - 0.05
    else:
        assert metrics["rmse"] > 0 and metrics["rmse_mean_map"] > 0

    run = pairs.load(run_folder)
    assert run.source.grid == (2, 2) and run.tokenizer.channels == (11 if task == "segment" else 3)
    images = data.draw(torch.arange(3), 16)[0]
    a, b = (pairs.draw_targets(run, pairs.image_tokens(run, x)) for x in (images, images.flip(0)))
    assert not torch.equal(a, b), "the map does not depend on the image"

    pairs.main(["--task", task, "--runs", str(folder), *WORDS, "--beam", "2"])           # no training again
    assert "stage" not in capsys.readouterr().out
    assert json.loads((run_folder / "metrics.json").read_text())["beam"] == 2
    with pytest.raises(data.BadInput, match="draws images of images: python -m recipes.pairs"):
        sample.main([str(run_folder), "--device", "cpu"])
    again = runs.load_run(run_folder)                       # the checkpoint tells all
    for ours, theirs in ((run.generator, again.generator), (run.tokenizer, again.tokenizer)):
        theirs = theirs.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.state_dict().items())


# ---- One's own pairs, and pairs made of any images

def save(path, colour, size=(16, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, tuple(colour)).save(path)


@pytest.fixture(params=["beside", "folders"])
def own_pairs(request, tmp_path):
    """20 pairs from nothing: the target of grey 10 i is red 10 i, in both layouts -> the folder."""
    folder = tmp_path / "mine"
    for i in range(20):
        first, second = f"{i:02d}.png", f"{i:02d}.target.png"
        if request.param == "folders":
            first, second = f"input/{i:02d}.png", f"target/{i:02d}.bmp"
        save(folder / first, [10 * i] * 3)
        save(folder / second, (10 * i, 0, 0))
    return folder


def test_own_pairs_are_matched_by_name_and_every_tenth_is_held_out(own_pairs):
    for split, which in (("train", [*range(9), *range(10, 19)]), ("val", [9, 19])):
        inputs, targets = files.read_pairs(own_pairs, 8, split)
        assert inputs.shape == targets.shape == (len(which), 3, 8, 8)
        assert inputs[:, 1, 0, 0].tolist() == targets[:, 0, 0, 0].tolist() == [10 * i for i in which]
        assert targets[:, 1:].max() == 0


@pytest.mark.parametrize("own_pairs", ["beside"], indirect=True)
def test_own_pairs_are_trained_on_and_drawn(own_pairs, capsys):
    words = ["--data", str(own_pairs), "--runs", str(own_pairs.parent / "runs"), *WORDS]
    pairs.main([*words, "--beam", "2"])
    assert capsys.readouterr().out.count("stage 1: ") == 2
    folder = own_pairs.parent / "runs" / "mine-vae-pairs-ar-gmm"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"psnr", "psnr_one_sample", "psnr_input", "psnr_from_nothing", "psnr_tokenizer"} < set(metrics)
    assert (folder / "samples.png").stat().st_size > 0
    run = pairs.load(folder)
    assert run.generator.label_drop == runs.LABEL_DROP, "of one class, and yet there is an input to hide"
    drawn = pairs.draw_targets(run, pairs.image_tokens(run, torch.rand(3, 3, 16, 16) * 2 - 1))
    assert drawn.shape == (3, 3, 16, 16) and drawn.isfinite().all()
    save(own_pairs / "20.png", [9] * 3)
    with pytest.raises(data.BadInput, match="20.png has no target of the same name"):
        pairs.main([*words, "--overwrite"])


def test_what_is_wrong_with_pairs_is_said_by_name(own_pairs):
    beside = (own_pairs / "00.png").exists()
    one, its = (own_pairs / name for name in
                (("03.png", "03.target.png") if beside else ("input/03.png", "target/03.bmp")))
    its.unlink()
    with pytest.raises(data.BadInput, match="03.png has no target of the same name: add it"):
        files.read_pairs(own_pairs, 8, "train")
    save(its, [0] * 3)
    one.unlink()
    with pytest.raises(data.BadInput, match="03.* has no input of the same name"):
        files.read_pairs(own_pairs, 8, "train")
    save(one, [0] * 3, (16, 12))
    with pytest.raises(data.BadInput, match="03.png has 16 x 12 pixels and its target 16 x 16: give"):
        files.read_pairs(own_pairs, 8, "val")
    save(one, [0] * 3)
    save(one.with_suffix(".bmp"), [0] * 3)
    with pytest.raises(data.BadInput, match="03.bmp and .*03.png would be one side of the same pair"):
        files.read_pairs(own_pairs, 8, "train")
    one.with_suffix(".bmp").unlink()
    one.write_bytes(b"no picture")
    with pytest.raises(data.BadInput, match="03.png: not a readable image"):
        files.read_pairs(own_pairs, 8, "train")


def test_too_few_pairs_or_none_are_said(tmp_path):
    for i in range(9):
        save(tmp_path / f"{i}.png", [i] * 3)
    with pytest.raises(data.BadInput, match="no pairs in it: put a.target.jpg beside a.jpg, or files of"):
        files.read_pairs(tmp_path, 8, "train")
    for i in range(9):
        save(tmp_path / f"{i}.target.png", [i] * 3)
    with pytest.raises(data.BadInput, match="9 pairs; at least 10"):
        files.read_pairs(tmp_path, 8, "train")


def test_inputs_are_made_of_images_as_the_task_says():
    x = torch.rand(4, 3, 8, 8) * 2 - 1
    grey = pairs.damage(x, "colourise")
    red, green, blue = x.unbind(1)
    assert torch.allclose(grey, (0.299 * red + 0.587 * green + 0.114 * blue)[:, None].expand(-1, 3, -1, -1),
                          atol=1e-6)
    small = pairs.damage(x, "superresolve")
    for i in (0, 4):
        for j in (0, 4):
            mean = x[:, :, i:i + 4, j:j + 4].mean((2, 3), keepdim=True)
            assert torch.allclose(small[:, :, i:i + 4, j:j + 4], mean.expand(-1, -1, 4, 4), atol=1e-6)
    noisy = pairs.damage(torch.zeros(50, 3, 8, 8), "denoise", 1)
    assert abs(noisy.std() - pairs.NOISE) < 0.02 and abs(noisy.mean()) < 0.02
    assert torch.equal(noisy, pairs.damage(torch.zeros(50, 3, 8, 8), "denoise", 1))


def test_a_made_task_shares_one_vae_of_images_with_train(tmp_path_factory, capsys):
    folder = tmp_path_factory.getbasetemp() / "maps"        # of the test above, or made here
    pairs.main(["--task", "colourise", "--runs", str(folder), *WORDS])
    assert capsys.readouterr().out.count("stage 1: ") <= 1
    run = pairs.load(folder / "shapes-vae-colourise-ar-gmm")
    source, target = run.source.state_dict(), run.tokenizer.state_dict()
    assert all(torch.equal(value, target[name]) for name, value in source.items())
    inputs, targets = pairs.load_pairs("colourise", run.args, "val")
    x, y = inputs.batch(torch.arange(3))[0], targets.batch(torch.arange(3))[0]
    assert torch.allclose(x, pairs.damage(y, "colourise"), atol=0.005), "pairs are out of order"
    measured = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))[:12]
    x, y = inputs.batch(measured)[0], targets.batch(measured)[0]
    db = sum(10 * math.log10(4 / (a - b).square().mean()) for a, b in zip(x, y)) / 12
    assert abs(json.loads((run.folder / "metrics.json").read_text())["psnr_input"] - db) < 1e-3


@pytest.mark.parametrize("changed", [dict(), dict(done=False), dict(task=None)])
def test_only_finished_runs_on_pairs_are_loaded(changed, tmp_path, tiny_run):
    checkpoint = runs.read_checkpoint(tiny_run / "shapes-vae") | changed
    torch.save(checkpoint | ({"task": "depth"} if "done" in changed else {}), tmp_path / "ckpt.pt")
    sentence = "finish it with --resume" if "done" in changed else "no run of python -m"
    with pytest.raises(data.BadInput, match=sentence):
        pairs.load(tmp_path)


def test_a_training_stopped_between_the_tokenizers_goes_on(tmp_path, capsys):
    short = [*WORDS[:-4], "--steps", "2", "--tok_steps", "2"]
    words = ["--task", "depth", "--runs", str(tmp_path), *short, *WORDS[-4:]]
    with pytest.raises(data.BadInput, match="--resume: there is no run in .*shapes-vae-depth"):
        pairs.main([*words, "--resume"])
    train.main(["--tokenizer", "vae", "--generator", "none", "--runs", str(tmp_path), *short])
    capsys.readouterr()
    pairs.main([*words, "--resume"])
    assert capsys.readouterr().out.count("stage 1: ") == 1  # of the maps only


def test_a_prediction_is_the_mean_of_its_votes(monkeypatch):
    asked = []

    def draw_samples(run, cond, **options):
        asked.append(options)
        return (torch.arange(len(cond)) % pairs.VOTES).float().view(-1, 1, 1, 1) + cond[:, :1, :1, None]
    monkeypatch.setattr(drawing, "draw_samples", draw_samples)
    cond = torch.arange(3.0).view(3, 1, 1)
    predicted = pairs.predict(None, cond, seed=5)
    assert torch.allclose(predicted.flatten(), torch.arange(3.0) + 3.5)                 # mean of 0 .. 7
    assert asked == [dict(cfg=1.0, temperature=0.9, seed=5)]
    pairs.predict(None, cond, cfg=0.0)
    assert asked[1] == dict(cfg=0.0, temperature=0.9)


@pytest.mark.parametrize("words, sentence", [
    (["--generator", "maskgit"], "only ar takes an image"), (["--flip"], "mirrored apart"),
    (["--tokenizer", "vq", "--head", "categorical"], "targets are tokens of a VAE"),
    (["--data", "x"], "only the drawn world"), (["--task", "pairs"], "needs --data FOLDER"),
    (["--condition", "text"], "the input is the condition"), (["--gan", "1"], "mean nothing on maps"),
    (["--frames", "17"], "pairs are of images"), (["--n", "9"], "at least 10"),
    (["--beam", "0"], "must be at least 1")])
def test_what_does_not_go_with_pairs_is_refused(words, sentence, tmp_path):
    with pytest.raises(data.BadInput, match=sentence):
        pairs.main(["--task", "segment", "--runs", str(tmp_path), *words])
    assert not list(tmp_path.iterdir())
