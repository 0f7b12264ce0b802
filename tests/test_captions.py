"""Tests of common/captions.py: from texts to prefixes, through training, drawing and measuring."""
import argparse
import functools
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


@pytest.mark.parametrize("words, folder", [pytest.param(IDS, "shapes-vq-text-ar-categorical",
                                                        marks=pytest.mark.slow),
                                           ([], "shapes-vae-text-ar-gmm"),
                                           pytest.param([*IDS, "--generator", "maskgit"],
                                                        "shapes-vq-text-maskgit-categorical",
                                                        marks=pytest.mark.slow),
                                           (["--generator", "mar", "--head", "diffusion"],
                                            "shapes-vae-text-mar-diffusion")])
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
    assert not capsys.readouterr().out
    assert captions.length_of(args, ["a cat"] * 150 + ["word " * 2000]) == 10
    assert "1 of 151 captions are longer than 10 bytes" in capsys.readouterr().out
    assert captions.length_of(args, ["word " * 2000] * 3) == captions.MOST_BYTES
    assert captions.length_of(args, ["a cat"] * 99 + ["a cat too"]) == 9, "what is a little longer is kept"
    assert captions.length_of(args, ["", ""]) == 1


def test_a_caption_is_cut_between_letters_and_stands_at_the_end():
    args = argparse.Namespace(text_encoder="bytes", text_len=6)
    x = captions.encode(args, ["a cat", "\u00e9\u00e9\u00e9\u00e9", "\u00e9" + "a" * 9])
    assert x.shape == (3, 6) and x.dtype == torch.uint8
    assert x[0].tolist() == [0, *b"a cat"]
    assert x[1].tolist() == list("\u00e9\u00e9\u00e9".encode())
    args.text_len = 5                                       # in the middle of a letter of two bytes
    assert captions.encode(args, ["\u00e9\u00e9\u00e9"])[0].tolist() == [0, *"\u00e9\u00e9".encode()]


class Words(dict):
    """What a tokenizer of the package transformers returns."""

    def to(self, device):
        return self


class PretendT5:
    """Tokenizer and encoder in one: word i of a text has feature (length of the word, 1); 9s behind it."""
    calls = 0

    def __call__(self, texts=None, max_length=None, input_ids=None, attention_mask=None, **options):
        if texts is None:
            self.calls += 1
            features = torch.stack([input_ids, torch.ones_like(input_ids)], -1).float()
            features[attention_mask == 0] = 9.0             # T5 gives features of the padding, too
            return argparse.Namespace(last_hidden_state=features)
        ids = torch.zeros(len(texts), max_length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, text in enumerate(texts):
            lengths = [len(word) for word in text.split()][:max_length]
            ids[i, :len(lengths)] = torch.tensor(lengths)
            mask[i, :len(lengths)] = 1
        return Words(input_ids=ids, attention_mask=mask)

    def to(self, device):
        return self


def test_features_of_t5_stand_at_the_end_and_are_kept_in_a_file(tmp_path, monkeypatch):
    t5 = PretendT5()
    monkeypatch.setattr(captions, "load_t5", functools.lru_cache(lambda name: (t5, t5)))
    args = argparse.Namespace(text_encoder="t5-small", text_len=4)
    dist = argparse.Namespace(rank=0, size=1)
    path = tmp_path / "captions-train.pt"
    texts = ["a star", "one two three four five"] * 40      # more than one batch of 64
    features = captions.cached(args, texts, path, dist)
    assert features.shape == (80, 4, 2) and features.dtype == torch.float16
    assert features[0].tolist() == [[0, 0], [0, 0], [1, 1], [4, 1]]
    assert features[79].tolist() == [[3, 1], [3, 1], [5, 1], [4, 1]]
    assert t5.calls == 2
    assert torch.equal(captions.cached(args, texts, path, dist), features) and t5.calls == 2, "read"
    captions.cached(args, texts[1:], path, dist)
    assert t5.calls == 4, "other texts are encoded"
    args.text_encoder = "t5-large"
    captions.cached(args, texts[1:], path, dist)
    assert t5.calls == 6, "so are those for another encoder"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    again = captions.cached(args, texts[1:], path, dist)
    assert t5.calls == 8 and torch.equal(again, features[1:]), "a damaged file is made anew"


def test_drawn_captions_of_validation_are_those_of_the_validation_images():
    args = argparse.Namespace(data="shapes", seed=3)
    for split, first in (("train", 0), ("val", data.VAL_INDEX)):
        index = torch.arange(first, first + 5)
        images = data.load(n_shapes=5, image_size=16, split=split, seed=3)
        ours = captions.of_images(args, images, split)[:5]
        assert ours == data.captions(index, 3)
