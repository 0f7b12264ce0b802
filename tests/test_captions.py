"""Tests of common/captions.py: from texts to prefixes, through training, drawing and measuring."""
import argparse
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import sample
import train
from common import captions, drawing, metrics, runs
from tests.helpers import IDS, RARELY, TINY


@pytest.mark.parametrize("words, folder", [(IDS, "shapes-vq-text-ar-categorical"),
                                           ([], "shapes-vae-text-ar-gmm")])
def test_captions_are_trained_drawn_and_judged(words, folder, tiny_run, tmp_path, capsys, monkeypatch):
    train.main([*TINY, *RARELY, "--runs", str(tiny_run), "--condition", "text", *words])
    run = runs.load_run(tiny_run / folder)
    assert run.args.text_len == max(len(t.encode()) for t in data.captions(torch.arange(200)))
    texts = [
        "a small red ring in the middle on a black background",
        "a large blue disc at the top on a dark red background " * 9
    ]
    one, other = (drawing.draw_captions(run, [t] * 4) for t in texts)
    assert one.shape == (4, 3, 16, 16) and torch.isfinite(one).all() and not torch.equal(
        one, other), "the caption has no effect"
    sample.main([
        str(tiny_run / folder), "--prompt", *texts, "--n", "6", "--out",
        str(tmp_path / "x.png"), "--npz",
        str(tmp_path / "x.npz")
    ])
    with np.load(tmp_path / "x.npz") as f:
        assert f["arr_0"].shape == (6, 16, 16, 3) and list(f["texts"]) == [texts[0]] * 3 + [texts[1]] * 3
    unseen, wanted = metrics.unseen_captions(run, 20)
    assert not set(unseen) & set(data.captions(torch.arange(200)))
    first = data.captions(torch.arange(data.VAL_INDEX, data.VAL_INDEX + 20))
    with monkeypatch.context() as m:                        # what was trained on is not asked for
        m.setattr(captions, "of_images", lambda *a: first)
        assert not set(metrics.unseen_captions(run, 20)[0]) & set(first)
    for text, k, c in zip(unseen, wanted["shape"], wanted["colour"]):
        assert data.SHAPES[k] in text and list(data.COLOURS)[c] in text
    rows = {key: value for key, _, value, _, _ in metrics.measure_captions(run, 20, batch_size=20, seed=0)}
    assert all(0 <= v <= 100 for v in rows.values()) and rows["caption_all_three"] <= rows["caption_shape"]
    for words, sentence in [(["--class", "star"], "ask with --prompt"),
                            (["--prompt"], "expected at least one")]:
        with pytest.raises(SystemExit, match=sentence if sentence[0] == "a" else None):
            sample.main([str(tiny_run / folder), *words])
    with pytest.raises(SystemExit, match="knows classes, not captions"):
        sample.main([str(tiny_run / "shapes-vae-ar-gmm"), "--prompt", "a star"])


def test_captions_and_their_encoder_are_asked_for_in_a_sentence(tiny_run, tmp_path, monkeypatch):
    pictures = tmp_path / "pictures"
    for split in ("train", "val"):
        (pictures / split / "a").mkdir(parents=True)
        words = [*TINY, "--runs", str(tmp_path), "--data", str(pictures), "--condition", "text"]
        for i in range(4):
            Image.fromarray(np.full((16, 16, 3), 60 * i, np.uint8)).save(pictures / split / "a" / f"{i}.png")
    with pytest.raises(SystemExit, match="write NAME.txt beside NAME.jpg"):
        train.main(words)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="pip install transformers"):
        train.main([
            *TINY, *RARELY, "--runs",
            str(tiny_run), "--condition", "text", "--text_encoder", "t5-small", "--name", "t5"
        ])


def test_one_long_caption_does_not_make_every_step_long(capsys):
    args = argparse.Namespace(text_encoder="bytes")
    assert captions.length_of(args, ["a cat", "two dogs"]) == 8
    assert captions.length_of(args, ["a cat", "word " * 2000]) == captions.MOST_BYTES
    assert "1 of 2 captions are longer than 512 bytes" in capsys.readouterr().out
