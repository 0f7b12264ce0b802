"""Tests of recipes/maps.py: training, drawing and measuring of maps of images."""
import json

import pytest
import torch

import data
import sample
import train
from common import drawing, runs
from recipes import maps

WORDS = ["--n_shapes", "100", "--image_size", "16", "--tok_steps", "12", "--tok_batch_size", "8",
         "--steps", "12", "--batch_size", "8", "--size", "tiny", "--warmup", "4", "--log_every", "12",
         "--eval_every", "12", "--device", "cpu", "--dtype", "fp32", "--n", "12", "--pictures", "2"]


@pytest.mark.parametrize("task", ["segment", "depth"])
def test_maps_of_images_are_trained_drawn_and_measured(task, tmp_path_factory, capsys):
    folder = tmp_path_factory.getbasetemp() / "maps"        # both tasks on one tokenizer of images
    maps.main(["--task", task, "--runs", str(folder), *WORDS])
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

    run = maps.load(run_folder)
    assert run.source.grid == (2, 2) and run.tokenizer.channels == (11 if task == "segment" else 3)
    images = data.draw(torch.arange(3), 16)[0]
    a, b = (maps.draw_maps(run, maps.image_tokens(run, x)) for x in (images, images.flip(0)))
    assert not torch.equal(a, b), "the map does not depend on the image"

    maps.main(["--task", task, "--runs", str(folder), *WORDS, "--beam", "2"])           # no training again
    assert "stage" not in capsys.readouterr().out
    assert json.loads((run_folder / "metrics.json").read_text())["beam"] == 2
    with pytest.raises(data.BadInput, match="makes maps of images: python -m recipes.maps"):
        sample.main([str(run_folder), "--device", "cpu"])
    again = runs.load_run(run_folder)                       # the checkpoint tells all
    for ours, theirs in ((run.generator, again.generator), (run.tokenizer, again.tokenizer)):
        theirs = theirs.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("changed", [dict(), dict(done=False), dict(task=None)])
def test_only_finished_runs_on_maps_are_loaded(changed, tmp_path, tiny_run):
    checkpoint = runs.read_checkpoint(tiny_run / "shapes-vae") | changed
    torch.save(checkpoint | ({"task": "depth"} if "done" in changed else {}), tmp_path / "ckpt.pt")
    sentence = "finish it with --resume" if "done" in changed else "no run of python -m"
    with pytest.raises(data.BadInput, match=sentence):
        maps.load(tmp_path)


def test_a_training_stopped_between_the_tokenizers_goes_on(tmp_path, capsys):
    short = [*WORDS[:-4], "--steps", "2", "--tok_steps", "2"]
    words = ["--task", "depth", "--runs", str(tmp_path), *short, *WORDS[-4:]]
    with pytest.raises(data.BadInput, match="--resume: there is no run in .*shapes-vae-depth"):
        maps.main([*words, "--resume"])
    train.main(["--tokenizer", "vae", "--generator", "none", "--runs", str(tmp_path), *short])
    capsys.readouterr()
    maps.main([*words, "--resume"])
    assert capsys.readouterr().out.count("stage 1: ") == 1  # of the maps only


def test_a_prediction_is_the_mean_of_its_votes(monkeypatch):
    asked = []

    def draw_samples(run, cond, **options):
        asked.append(options)
        return (torch.arange(len(cond)) % maps.VOTES).float().view(-1, 1, 1, 1) + cond[:, :1, :1, None]
    monkeypatch.setattr(drawing, "draw_samples", draw_samples)
    cond = torch.arange(3.0).view(3, 1, 1)
    predicted = maps.predict_maps(None, cond, seed=5)
    assert torch.allclose(predicted.flatten(), torch.arange(3.0) + 3.5)                 # mean of 0 .. 7
    assert asked == [dict(cfg=1.0, temperature=0.9, seed=5)]
    maps.predict_maps(None, cond, cfg=0.0)
    assert asked[1] == dict(cfg=0.0, temperature=0.9)


@pytest.mark.parametrize("words, sentence", [
    (["--generator", "maskgit"], "only ar takes an image"), (["--flip"], "mirrored apart"),
    (["--tokenizer", "vq", "--head", "categorical"], "maps are tokens of a VAE"),
    (["--data", "x"], "only the drawn world"),
    (["--condition", "text"], "the image is the condition"), (["--gan", "1"], "mean nothing on maps"),
    (["--frames", "17"], "maps are of images"), (["--n", "9"], "at least 10"),
    (["--beam", "0"], "must be at least 1")])
def test_what_does_not_go_with_maps_is_refused(words, sentence, tmp_path):
    with pytest.raises(data.BadInput, match=sentence):
        maps.main(["--task", "segment", "--runs", str(tmp_path), *words])
    assert not list(tmp_path.iterdir())
