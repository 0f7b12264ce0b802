"""Tests of recipes/inflate.py."""
import pytest
import torch

import data
import train
from common import drawing, runs
from recipes import inflate
from tests.helpers import CLIPS



def without(words, *flags):
    """Words of a command without some flags and their values."""
    kept = list(words)
    for flag in flags:
        while flag in kept:
            del kept[kept.index(flag):kept.index(flag) + 2]
    return kept


# The sizes of a video tokenizer are those of the image tokenizer.
VIDEO = [*without(CLIPS, "--vocab_size", "--tok_size"), "--n_shapes", "40"]
IMAGES = [*without(CLIPS, "--frames"), "--n_shapes", "40", "--generator", "none"]


@pytest.fixture(scope="module")
def image_run(tmp_path_factory):
    """A tiny image tokenizer -> its run folder."""
    parent = tmp_path_factory.mktemp("inflate")
    train.main([*IMAGES, "--runs", str(parent)])
    return parent / "shapes-lfq"


def words_of(image_run):
    """Flags of a video tokenizer that hardly learns: its weights stay nearly those it begins with."""
    return [*VIDEO, "--runs", str(image_run.parent), "--tok_steps", "1", "--tok_lr", "1e-9"]


def test_a_video_tokenizer_begins_as_the_image_tokenizer(image_run, capsys):
    inflate.main([str(image_run), *words_of(image_run)])
    image = runs.load_run(image_run).tokenizer
    run = runs.load_run(image_run.parent / "shapes-lfq-5f-inflated-maskgit-categorical")
    video = run.tokenizer
    assert (video.vocab_size, run.args.tok_size) == (16, "mini-clips")            # as those of the images
    x = data.draw(torch.arange(8), 8)[0]
    assert (image.encode(x) == video.encode(x)).float().mean() > 0.99
    assert (video.decode(video.encode(x)) - image.decode(image.encode(x))).abs().max() < 0.1
    first = video.encode(x[:, :, None].expand(-1, -1, 5, -1, -1))[:, :image.seq_len]
    assert (image.encode(x) == first).float().mean() > 0.99, "a clip's first frame has the ids of the image"
    assert drawing.draw_samples(run, torch.arange(2)).shape == (2, 3, 5, 8, 8)
    capsys.readouterr()
    inflate.main([str(image_run), *words_of(image_run)])
    assert "trained already" in capsys.readouterr().out


@pytest.mark.parametrize("words, sentence", [
    (["--vocab_size", "32"], "its sizes are others; leave out --tok_size and --vocab_size, which are then "
                             "mini-clips and 16"),
    (["--tokenizer", "vq"], "only lfq can be inflated"),
    (["--frames", "1"], "there is no time")])
def test_what_cannot_be_inflated_is_refused(words, sentence, image_run, tmp_path):
    with pytest.raises(data.BadInput, match=sentence):
        inflate.main([str(image_run), *words_of(image_run), *words, "--runs", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_only_an_image_tokenizer_is_inflated(image_run, tiny_run, tmp_path):
    for folder, sentence in ((tiny_run / "shapes-vae", "not an image tokenizer"), (tmp_path, "no ckpt.pt")):
        with pytest.raises(data.BadInput, match=sentence):
            inflate.main([str(folder), *words_of(image_run)])
