"""Tests of experiments/overview.py: systems and classes in one picture."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train
from common import drawing, pictures, runs
from experiments import overview

MSVQ = ("--tokenizer msvq --tok_size mini --tok_steps 2 --tok_batch_size 4 --size mini --steps 2 "
        "--batch_size 4 --image_size 16 --n_shapes 40 --device cpu --eval_every 1000").split()


def args_of(tokenizer, generator, head, **more):
    kept = dict(tokenizer=tokenizer, generator=generator, head=head, adapter="none", frames=1, order="random",
                attention="bidirectional", codebook=None, data="shapes")
    return SimpleNamespace(**kept | more)


def test_a_row_is_named_by_what_the_run_is():
    for args, name in [
            (args_of("vae", "ar", "gmm"), "GIVT"), (args_of("msvq", "var", "categorical"), "VAR"),
            (args_of("vae", "ar", "gmm", adapter="flow"), "GIVT, flow adapter"),
            (args_of("lfq", "maskgit", "categorical", frames=17), "MAGVIT-v2, 17 frames"),
            (args_of("lfq", "maskgit", "categorical", codebook="fsq"), "MAGVIT-v2, FSQ"),
            (args_of("vq", "mar", "categorical", attention="causal", order="annealed"), "RAR"),
            (args_of("titok", "ar", "categorical"), "TiTok, causal"),
            (args_of("titok-vae", "ar", "diffusion"), "titok-vae + ar + diffusion")]:
        assert overview.name_of(args) == name
    twice = [SimpleNamespace(args=args_of("vae", "ar", "gmm"), folder=SimpleNamespace(name=name))
             for name in ("a", "b")]
    assert overview.names_of(twice) == ["GIVT (a)", "GIVT (b)"]


def test_the_picture_is_named_by_the_data():
    assert overview.picture_of(args_of("vae", "ar", "gmm")) == "overview.png"
    assert overview.picture_of(args_of("vae", "ar", "gmm", data="x/cifar10.tar.gz")) == "overview-cifar10.png"
    assert overview.picture_of(args_of("lfq", "ar", "gmm", frames=5)) == "overview-shapes-5f.png"


def test_two_runs_become_rows_of_the_samples_that_sample_py_draws(tiny_run, tmp_path, monkeypatch, capsys):
    """The file holds the very pixels: samples of the first batch of seed 0, enlarged four times."""
    train.main([*MSVQ, "--runs", str(tmp_path)])
    seen, save = [], overview.save
    monkeypatch.setattr(overview, "save", lambda path, rows, *rest:
                        seen.append(rows) or save(path, rows, *rest))
    givt, out = tiny_run / "shapes-vae-ar-gmm", tmp_path / "x.png"
    overview.main([str(givt), str(tmp_path / "shapes-msvq-var-categorical"), "--device", "cpu",
                   "--out", str(out), "--title", "two systems"])
    (top, real), (first, drawn), (second, scales) = seen[0]
    assert (top, first, second) == ("drawn", "GIVT", "VAR")
    run = runs.load_run(givt, "cpu")
    assert torch.equal(drawn, drawing.draw_samples(run, torch.arange(10)))
    images, labels = runs.open_split(run.args, "val", "cpu").batch(torch.arange(100))
    assert torch.equal(real[3], images[(labels == 3).nonzero()[0, 0]])
    page = np.array(Image.open(out).convert("RGB"))
    enlarged = pictures.tile(scales[7:8], 1, scale=4)
    assert any((page[y:y + 64, x:x + 64] == enlarged).all()
               for y in range(len(page) - 63) for x in range(page.shape[1] - 63)
               if (page[y, x] == enlarged[0, 0]).all() and (page[y + 63, x + 63] == enlarged[63, 63]).all())
    assert out.stat().st_size < overview.MOST_BYTES


def test_a_class_without_validation_images_stays_white(tiny_run, monkeypatch, capsys):
    run = runs.load_run(tiny_run / "shapes-vae-ar-gmm", "cpu")
    images = torch.full((6, 3, 16, 16), 100, dtype=torch.uint8)
    few = data.ImageSet(images, torch.tensor([0, 0, 2, 3, 4, 5]), run.classes, "cpu")
    monkeypatch.setattr(runs, "open_split", lambda *_: few)
    shown = overview.first_of_each(run, 10)
    assert [bool((image == 1).all()) for image in shown] == [k not in (0, 2, 3, 4, 5) for k in range(10)]
    assert f"no validation image of {run.classes[1]}" in capsys.readouterr().out


def test_pictures_full_of_noise_are_enlarged_less(tmp_path):
    noise = [(f"system {k}", torch.rand(10, 3, 32, 32) * 2 - 1) for k in range(7)]
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    overview.save(tmp_path / "x.png", noise, names)
    assert (tmp_path / "x.png").stat().st_size <= overview.MOST_BYTES
    assert 10 * 32 < Image.open(tmp_path / "x.png").width < 10 * 64


@pytest.mark.parametrize("names", [["bar", "ring", "lily"], ["automobile", "cat", "fullgrown owl"]])
def test_names_of_classes_are_whole(names, tmp_path):
    """A border of two white pixels on all sides: no letter is cut off, upright or slanted."""
    grey = torch.zeros(3, 3, 32, 32)
    overview.save(tmp_path / "x.png", [("GIVT", grey)], names)
    page = np.array(Image.open(tmp_path / "x.png").convert("RGB"))
    assert (page[:2] == 255).all() and (page[:, :2] == 255).all() and (page[:, -2:] == 255).all()
    assert (page[2:20] < 255).any()                         # and they are there


def test_runs_that_do_not_fit_are_refused(tiny_run, clip_run, tmp_path):
    givt = str(tiny_run / "shapes-vae-ar-gmm")
    clips = str(clip_run / "shapes-lfq-5f-maskgit-categorical")
    for folders, why in [([str(tiny_run / "shapes-vae")], "does not draw images of classes"),
                         ([givt, clips], "has other classes than")]:
        with pytest.raises(data.BadInput, match=why):
            overview.main([*folders, "--device", "cpu", "--out", str(tmp_path / "x.png")])
    with pytest.raises(data.BadInput, match="there is no folder"):
        overview.main([givt, "--device", "cpu", "--out", str(tmp_path / "no" / "x.png")])


def test_clips_are_shown_by_their_middle_frame(clip_run, tmp_path):
    folder = str(clip_run / "shapes-lfq-5f-maskgit-categorical")
    overview.main([folder, "--device", "cpu", "--out", str(tmp_path / "x.png")])
    assert Image.open(tmp_path / "x.png").width > 10 * 64
    clip = torch.arange(5.).view(1, 1, 5, 1, 1).expand(2, 3, 5, 4, 4)
    assert (overview.still(clip) == 2).all() and overview.still(clip).shape == (2, 3, 4, 4)
