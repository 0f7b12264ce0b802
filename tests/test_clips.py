"""Tests of clips."""
import argparse
import json
import math
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ar_transformer
import data
import evaluate
import lfq
import maskgit
import sample
import train
from common import classifier, drawing, pictures, runs
from common import clips as clips_room
from tests.helpers import close


def grey_clip(path, n, first=0):
    """A clip whose frame t is grey of level 10 (first + t), so that a pixel tells which frame it was: .gif,
    .webp or a folder.
    """
    pictures = [Image.new("RGB", (20, 12), (10 * (first + t),) * 3) for t in range(n)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix:
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=50, lossless=True)
        return
    path.mkdir()
    for t, picture in enumerate(pictures):
        picture.save(path / f"frame{t}.png")                # frame10 comes before frame2 in the alphabet


def frame_numbers(image_set):
    """What grey_clip() wrote, read back -> list of lists, a row per clip."""
    assert (image_set.images == image_set.images[:, :1, :, :1, :1]).all()
    return (image_set.images[:, 0, :, 0, 0] / 10).round().int().tolist()


def test_clips_are_read_from_animations_folders_and_films(tmp_path, monkeypatch, capsys):
    tree = tmp_path / "d"
    grey_clip(tree / "train" / "left" / "a.gif", 5), grey_clip(tree / "train" / "left" / "b.webp", 9)
    grey_clip(tree / "train" / "right" / "c",
              12), grey_clip(tree / "val" / "left" / "v", 5), grey_clip(tree / "val" / "right" / "w.gif", 6)
    (tree / "train" / "left" / "notes.txt").write_text("no clip")
    s = data.load(str(tree), 8, frames=5)
    assert s.images.shape == (3, 3, 5, 8, 8) and s.images.dtype == torch.uint8 and s.frames == 5
    assert s.classes == ["left", "right"] and s.labels.tolist() == [0, 0, 1]
    # spread over the whole file
    assert frame_numbers(s) == [[0, 1, 2, 3, 4], [0, 2, 4, 6, 8], [0, 3, 6, 8, 11]]
    x, labels = s.batch(torch.tensor([2, 0]))
    assert x.shape == (2, 3, 5, 8, 8) and labels.tolist() == [1, 0] and (pictures.to_uint8(x)
                                                                         == s.images[[2, 0]]).all()
    assert frame_numbers(data.load(str(tree), 8, "val", frames=5)) == [[0, 1, 2, 3, 4], [0, 1, 2, 4, 5]]
    windows = data.load(str(tree), 8, frames=2, frame_step=2)
    assert frame_numbers(windows) == [[0, 2], [0, 2], [4, 6], [0, 2], [4, 6], [8, 10]
                                      ] and windows.labels.tolist() == [0] * 3 + [1] * 3
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as z:
        for f in tree.rglob("*.*"):
            z.write(f, f.relative_to(tree))
    assert torch.equal(data.load(str(tmp_path / "d.zip"), 8, frames=5).images, s.images)

    def refused(words, **options):
        with pytest.raises(data.BadInput, match=words) as caught:
            data.load(str(tree), 8, **dict(frames=5) | options)
        assert "\n" not in str(caught.value)
    refused("left/a.gif: has 5 frames, fewer than --frames 9", frames=9)
    refused("left/a.gif: has 3 frames with --frame_step 2", frame_step=2)
    assert len(data.load(str(tree), 8, frames=9,
                         skip_bad=True)) == 2 and "left out 1 clips" in capsys.readouterr().out
    refused("a class is empty", frames=10, skip_bad=True)
    refused("more clips .* than fit into memory", max_bytes=2000)
    broken = tree / "train" / "left" / "z.gif"
    broken.write_bytes((tree / "train" / "left" / "a.gif").read_bytes()[:20])
    refused("left/z.gif: not a readable clip")
    assert len(data.load(str(tree), 8, frames=5, skip_bad=True)) == 3
    broken.unlink(), Image.new("RGB", (8, 8)).save(tree / "train" / "right" / "x.png")
    refused("train/right lies in no class folder.* is a folder in there")
    (tree / "train" / "right" / "x.png").unlink(), (tree / "train" / "right" / "y.mp4").write_bytes(b"film")
    monkeypatch.setitem(sys.modules, "av", None)
    refused("y.mp4: .* pip install av", skip_bad=True)

    class Film:                                             # what the programs ask of av
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def decode(self, video):
            picture = argparse.Namespace(to_image=lambda: Image.new("RGB", (9, 9), (30, 30, 30)))
            return iter([picture] * 7)

    monkeypatch.setitem(
        sys.modules, "av",
        argparse.Namespace(open=lambda content: Film() if content.read() == b"film" else None))
    assert frame_numbers(data.load(str(tree), 8, frames=5))[-1] == [3] * 5
    np.savez(tmp_path / "x.npz", images=np.zeros((20, 8, 8, 3), np.uint8), labels=np.zeros(20))
    with pytest.raises(data.BadInput, match="not from an .npz"):
        data.load(str(tmp_path / "x.npz"), 8, frames=5)


def test_drawn_clips_are_those_of_draw_clips_and_val_is_another_set():
    s, val = (data.load("shapes", 8, split, seed=3, n_shapes=500, frames=9) for split in ("train", "val"))
    index = torch.tensor([0, 221, 222, 499])                # from several of the parts they are drawn in
    x, actions, _ = data.draw_clips(index, 8, 9, seed=3)
    assert s.images.shape == (500, 3, 9, 8, 8) and torch.equal(s.images[index], pictures.to_uint8(x))
    assert torch.equal(s.labels[index], actions) and s.classes == list(data.ACTIONS)
    assert torch.equal(val.images[:2],
                       pictures.to_uint8(data.draw_clips(data.VAL_INDEX + torch.arange(2), 8, 9, seed=3)[0]))


def test_stills_are_frames_of_the_clips_in_half_of_the_batches():
    clips = data.load("shapes", 8, n_shapes=40, frames=9)
    source, index, kinds = clips_room.Stills(clips), torch.tensor([7, 3]), []
    for seed in range(200):
        torch.manual_seed(seed)
        x, labels = source.batch(index)
        kinds.append(x.ndim)
        if x.ndim == 5:
            assert torch.equal(x, clips.batch(index)[0])
            continue
        assert x.shape == (8, 3, 8, 8) and torch.equal(labels, clips.labels[index].repeat_interleave(4))
        for i, still in enumerate(x):
            assert (still[:, None] == clips.batch(index)[0][i // 4]).all(0).all(
                (1, 2)).any(), "no frame of its clip"
    assert len(source) == 40 and 75 < kinds.count(4) < 125
    a, b = (torch.manual_seed(kinds.index(4)) and source.batch(index)[0] for _ in range(2))
    assert torch.equal(a, b)                  # a function of the seed of the step: --resume goes on as it was


def test_clips_are_trained_drawn_and_continued(clip_run, tmp_path, capsys):
    folder = clip_run / "shapes-lfq-5f-maskgit-categorical"
    for name in ("shapes-lfq-5f/reconstructions.png", f"{folder.name}/samples.png",
                 f"{folder.name}/curve.png"):
        assert (clip_run / name).stat().st_size > 0
    run = runs.load_run(folder)
    assert run.tokenizer.grid == (2, 2, 2) and run.args.frames == 5 and run.classes == list(data.ACTIONS)
    words = ["--out", str(tmp_path / "x.png"), "--gif", "--npz", str(tmp_path / "x.npz")]
    sample.main([str(folder), "--n", "20", *words])
    with np.load(tmp_path / "x.npz") as f:
        drawn, labels = f["arr_0"], f["labels"]
    assert drawn.shape == (20, 5, 8, 8, 3) and drawn.dtype == np.uint8 and (np.bincount(labels) == 2).all()
    assert np.array_equal(
        drawn,
        pictures.to_uint8(drawing.draw_samples(run, torch.from_numpy(labels))).permute(0, 2, 3, 4, 1).numpy())
    assert Image.open(tmp_path / "x.gif").n_frames == 5 and Image.open(tmp_path / "x.png").height > 400
    sample.main([str(folder), "--known_frames", "1", "--class", "blinks", "--n", "3", *words])
    with np.load(tmp_path / "x.npz") as f:
        assert f["arr_0"].shape == (3, 5, 8, 8, 3) and (f["labels"] == data.ACTIONS.index("blinks")).all()
    grey_clip(tmp_path / "own.gif", 7)
    sample.main([str(folder), "--known_frames", "1", "--image", str(tmp_path / "own.gif"), *words])
    assert "1 clips in" in capsys.readouterr().out and Image.open(tmp_path / "x.gif").n_frames == 5
    for more, sentence in [(["--known_frames", "3"], "--known_frames 3: .* to draw: 1"),
                           (["--known_frames", "5"], "to draw: 1"),
                           (["--image", "x.gif", "--mask", "left"], "continued, not repainted"),
                           (["--image", str(tmp_path / "no.gif"), "--known_frames", "1"], "no such file")]:
        with pytest.raises(SystemExit, match=sentence):
            sample.main([str(folder), *more])

def untrained_run(folder, generator):
    """Random weights for clips of 9 frames of 8 pixels, 3 x 2 x 2 ids."""
    torch.manual_seed(0)
    tokenizer = lfq.LFQ(**lfq.SIZES["clips"] | dict(image_size=8, frames=9, bits=4))
    head = maskgit.CategoricalHead(64, tokenizer.vocab_size)
    torch.nn.init.normal_(head.proj.weight)                 # it starts at zero, where its input has no effect
    model_class = dict(maskgit=maskgit.MaskGIT, ar=ar_transformer.ARTransformer)[generator]
    model = model_class(head, tokenizer.seq_len, 10, None, tokenizer.vocab_size, tokenizer.grid, n_layer=1,
                        n_head=2, n_embd=64)
    args = argparse.Namespace(condition="class", frames=9, generator=generator, head="categorical",
                              image_size=8, data="shapes")
    return SimpleNamespace(folder=folder, args=args, tokenizer=tokenizer.eval(), generator=model.eval(),
                           classes=list(data.ACTIONS), device=torch.device("cpu"))


@pytest.mark.parametrize("generator", ["maskgit", "ar"])
def test_given_frames_stay_and_nothing_later_is_looked_at(generator, tmp_path):
    """9 frames of 4 + 4 + 4 tokens, the model of any weights: the tokens of the first 5 are given."""
    run = untrained_run(tmp_path, generator)
    clips = data.draw_clips(torch.arange(6), 8, 9)[0]
    assert [clips_room.known_tokens(run, n) for n in (1, 5)] == [4, 8]
    drawn, whole = clips_room.predict(run, clips, 5,
                                      seed=1), run.tokenizer.decode(run.tokenizer.encode(clips))
    assert drawn.shape == clips.shape and torch.allclose(drawn[:, :, :5], whole[:, :, :5], atol=1e-5)
    assert (drawn[:, :, 5:] - whole[:, :, 5:]).abs().max() > 0.01, "nothing was drawn"
    other = torch.cat([clips[:, :, :5], -clips[:, :, 5:]], 2)
    assert torch.equal(clips_room.predict(run, other, 5, seed=1),
                       drawn), "it looked at the frames it is to predict"
    assert not torch.equal(clips_room.predict(run, clips, 5, seed=2), drawn)


def test_clips_are_measured(clip_run, capsys, monkeypatch):
    monkeypatch.setattr(classifier.train_classifier, "__defaults__", (0, 12, 32, 4e-3))
    folder = clip_run / "shapes-lfq-5f-maskgit-categorical"
    evaluate.main([str(folder), "--n", "20", "--device", "cpu"])
    out, metrics = capsys.readouterr().out, json.loads((folder / "metrics.json").read_text())
    for key in ("recon_psnr_db", "recon_image_psnr_db", "recon_accuracy", "codebook_usage", "sample_accuracy",
                "sample_frechet_small_cnn", "sample_frechet_frames", "floor_frechet_frames",
                "prediction_accuracy", "prediction_psnr_still_db", "val_loss"):
        assert math.isfinite(metrics[key]), key
    assert "Frechet distance over clips (small CNN)" in out
    assert "FVD" not in out
    assert "action accuracy, samples" in out
    assert metrics["floor_frechet_frames"] < metrics["sample_frechet_frames"]
    with pytest.raises(SystemExit, match="--fid: is of images"):
        evaluate.main([str(folder), "--fid", "--device", "cpu"])


def test_numbers_of_clips_are_those_of_their_frames(monkeypatch):
    clips, actions, shapes = data.draw_clips(torch.arange(6), 8, 9)
    net = classifier.SmallCNN(10).eval()
    one_by_one = torch.stack([net.features(clip[:, t][None])[0] for clip in clips for t in range(9)])
    close(clips_room.features_of_frames(net, clips, 30), one_by_one)
    run = argparse.Namespace(args=argparse.Namespace(data="shapes", seed=0))
    stills = clips_room.single_frames(run, data.load("shapes", 8, n_shapes=6, frames=9), "train")
    assert torch.equal(stills.labels, shapes.repeat_interleave(4)) and stills.frames == 1
    assert torch.equal(stills.images.view(6, 4, 3, 8, 8)[5, 3], pictures.to_uint8(clips[5, :, -1]))
    # A prediction that is right: its PSNR is the largest there is. One that stands still: the last frame that
    # was given.
    monkeypatch.setattr(clips_room, "predict", lambda run, clips, n, **options: clips)
    run.tokenizer = argparse.Namespace(time_stride=4)
    ruler = classifier.ClipCNN(10).eval()
    rows = {row[0]: row[2] for row in clips_room.measure_prediction(run, ruler, clips, actions)}
    assert rows["prediction_accuracy"] == pytest.approx(
        100 * (classifier.look(ruler, clips)[1] == actions).float().mean().item())
    error = [[(clip[:, t] - clip[:, 4]).square().mean().clamp(min=1e-10) for t in range(5, 9)]
             for clip in clips]
    assert rows["prediction_psnr_still_db"] == pytest.approx(
        (10 * torch.log10(4 / torch.tensor(error))).mean().item(), abs=1e-3)
    assert rows["prediction_psnr_db"] == pytest.approx(10 * math.log10(4e10), abs=1e-3)


@pytest.mark.parametrize(
    "words, sentence", [(["--tokenizer", "vae"], "--frames 17: only --tokenizer lfq reads clips"),
                        (["--frames", "18"], "--frames 18 .*so 17 or 21"),
                        (["--condition", "text", "--generator", "ar"], "asked for by their action"),
                        (["--flip"], "moves left moves right"), (["--perceptual", "1"], "looks at time too"),
                        (["--frame_step", "2"], "is for your own clips"),
                        (["--frames", "1", "--frame_step", "2", "--data", "x"], "--frame_step: is for clips"),
                        (["--n_shapes", "2000000000"], "needs at least .* free here"),
                        (["--data", "nowhere"], "no such file or folder")])
def test_what_clips_do_not_go_with_is_refused(words, sentence, tmp_path):
    with pytest.raises(SystemExit, match=sentence):
        train.main([
            "--tokenizer", "lfq", "--generator", "maskgit", "--frames", "17", "--runs",
            str(tmp_path), "--device", "cpu", *words
        ])
    assert not list(tmp_path.rglob("ckpt.pt"))


def test_strips_and_moving_pictures_show_the_frames_they_should(tmp_path):
    clip = torch.linspace(-1, 1, 17)[None, :, None, None].expand(3, 17, 8, 8)               # ever brighter
    strip = pictures.film(clip)
    assert strip.shape == (9, 3, 8, 8) and torch.allclose(strip[:, 0, 0, 0], clip[0, ::2, 0, 0])
    edge = pictures.film(clip, given=5)[:, :, 0, 0]
    # frames 0, 2, 4
    assert edge.shape == (9, 3) and (edge[:3, 0] < 0).all() and (edge[:3, 1] > 0).all() and (edge[3:]
                                                                                             == 1).all()
    assert torch.allclose(pictures.film(clip, given=5)[:, 0, 20, 20], strip[:, 0, 0, 0])
    pictures.save_clips(tmp_path / "x.gif", clip[None].repeat(4, 1, 1, 1, 1), 2, ("a", "b"))
    with Image.open(tmp_path / "x.gif") as animation:
        assert animation.n_frames == 17
        for t in (0, 8, 16):
            animation.seek(t)
            picture = np.array(animation.convert("RGB"))
            assert abs(int(picture[10, -10, 0]) - int(pictures.to_uint8(clip[0, t, 0, 0]))) <= 4


def test_places_in_time_and_space_are_told_apart():
    """A clip's grid has three axes: RoPE turns with the difference in each of them, and Halton's order visits
    all tokens.
    """
    grid, q, k = (3, 4, 2), torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)
    table = ar_transformer.rope_table(grid, 32, 1)[1:].view(*grid, 16, 2)
    score = lambda a, b: (ar_transformer.rotate(q, table[a][None]) * ar_transformer.rotate(k, table[b][None])
                          ).sum()
    assert torch.allclose(score((0, 1, 0), (1, 3, 1)), score((1, 0, 0), (2, 2, 1)), atol=1e-4)
    base = score((0, 0, 0), (0, 0, 0))
    assert all((score((0, 0, 0), place) - base).abs() > 1e-3 for place in [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
    rank = maskgit.halton_rank(grid)
    assert sorted(rank.tolist()) == list(range(24))
    assert len({int(t) // 8 for t in rank.argsort()[:3]}) > 1, "the first tokens all lie in one frame"
