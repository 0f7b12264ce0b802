"""Tests of recipes/titok_two_stage.py."""
import math

import pytest
import torch

import data
from common import drawing, runs
from recipes import titok_two_stage
from tests.helpers import RARELY, TINY, log_of

WORDS = [*TINY[4:], *RARELY, "--tokens", "6"]               # without --tokenizer and --head


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """Proxy, both stages and a generator -> the folder of their runs."""
    parent = tmp_path_factory.mktemp("titok")
    titok_two_stage.main([*WORDS, "--proxy_steps", "8", "--runs", str(parent)])
    return parent


def equal_entries(a, b):
    """The names of the equal entries of two state dicts."""
    return {name for name in a if torch.equal(a[name], b[name])}


def test_titoks_published_stages_follow_each_other(parent):
    names = ("shapes-titok-patches", "shapes-titok-proxy", "shapes-titok-finetune")
    proxy, first, then = (runs.load_run(parent / name).tokenizer for name in names)
    assert (first.stage, then.stage) == ("proxy", "finetune")
    assert then.proxy.grid == (4, 4) and then.seq_len == 6
    a = proxy.state_dict()
    assert equal_entries(a, first.proxy.state_dict()) == set(a), "the first stage only reads the proxy"
    same = equal_entries(a, then.proxy.state_dict())
    assert {name for name in a if name.startswith("encoder.")} <= same
    assert {name for name in a if name.startswith("decoder.")} - same, "then its decoder learns"
    a = first.state_dict()
    same = equal_entries(a, then.state_dict())
    frozen = {name for name in a if name.startswith(("encoder.", "quantizer."))}
    assert frozen <= same
    assert {name for name in a if name.startswith("decoder.")} - same


def test_the_first_stage_learns_to_name_ids_and_the_second_pixels(parent):
    nats = log_of(parent, "shapes-titok-proxy", "proxy_nats")
    assert abs(nats[1] - math.log(512)) < 1 and nats[24] < nats[1]
    assert "mse" in (parent / "shapes-titok-finetune" / "log.csv").read_text()


def test_the_last_run_is_complete_in_itself(parent):
    run = runs.load_run(parent / "shapes-titok-finetune-maskgit-categorical")
    then = runs.load_run(parent / "shapes-titok-finetune").tokenizer
    assert equal_entries(then.state_dict(), run.tokenizer.state_dict()) == set(then.state_dict())
    images = drawing.draw_samples(run, torch.arange(4))
    assert images.shape == (4, 3, 16, 16) and torch.isfinite(images).all()


def test_what_is_trained_is_kept_and_a_proxy_of_ones_own_is_read(parent, capsys):
    words = [*WORDS, "--runs", str(parent)]
    titok_two_stage.main(words)
    assert "stage" not in capsys.readouterr().out
    proxy = str(parent / "shapes-titok-patches")
    titok_two_stage.main([*words, "--proxy", proxy, "--stage", "proxy", "--tok_name", "mine",
                          "--tok_steps", "2"])
    assert capsys.readouterr().out.count("stage 1: ") == 1
    assert runs.load_run(parent / "mine-proxy").tokenizer.stage == "proxy"
    names = ("mine-proxy", "shapes-titok-proxy")
    a, b = (runs.load_run(parent / name).tokenizer.proxy.state_dict() for name in names)
    assert equal_entries(a, b) == set(a)


@pytest.mark.parametrize("words, sentence", [
    (["--proxy", "shapes-titok-proxy"], "a run of --tokenizer vq is wanted"),
    (["--proxy", "nowhere"], "no ckpt.pt"),
    (["--proxy", "shapes-titok-patches", "--image_size", "32", "--tok_name", "other"],
     r"grid of \(4, 4\) ids, this TiTok 8 x 8"),
    (["--proxy", "shapes-titok-patches", "--proxy_steps", "3"], "leave one of them out"),
    (["--tokenizer", "vq"], "those of titok"),
    (["--proxy_steps", "0"], "at least 1"),
    (["--resume", "--tok_name", "new", "--name", "also-new"], "there is no run")])
def test_what_the_two_stages_cannot_do_is_refused_first(words, sentence, parent):
    before = sorted(parent.iterdir())
    if words[0] == "--proxy":
        words = ["--proxy", str(parent / words[1]), *words[2:]]
    with pytest.raises(data.BadInput, match=sentence):
        titok_two_stage.main([*WORDS, "--runs", str(parent), *words])
    assert sorted(parent.iterdir()) == before


def test_another_proxy_than_the_first_is_refused(parent):
    saved = runs.read_checkpoint(parent / "shapes-titok-patches")
    other = parent / "other"
    other.mkdir()
    runs.save_atomically(saved | dict(flags=saved["flags"] | dict(seed=1)), other / "ckpt.pt")
    with pytest.raises(data.BadInput, match="trained with another proxy"):
        titok_two_stage.main([*WORDS, "--runs", str(parent), "--proxy", str(other)])
