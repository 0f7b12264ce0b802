"""Tests of annealed orders (RAR) in mar.CausalMAR: the authors' schedule and rows, drawing, resuming."""
import shutil

import pytest
import torch

import data
import mar
import train
from common import runs
from tests.helpers import golden
from tests.small_world import small_world

ANNEALED = ["--generator", "mar", "--attention", "causal", "--order", "annealed"]


def annealed_mar(**options):
    return mar.CausalMAR(mar.CategoricalHead(32, 11), 12, 5, vocab_size=11, n_layer=1, n_head=2, n_embd=32,
                         order="annealed", **options)


def test_the_share_of_random_orders_is_the_authors():
    g = golden("beyond/rar_schedule")
    steps = g["steps"].tolist()
    truth = g["ratio_official_125000_187500"].tolist()
    assert [mar.random_share(step, 125_000, 187_500) for step in steps] == pytest.approx(truth, abs=1e-12)
    model = annealed_mar()
    for step, share in zip(steps, truth):                   # of 250,000: a half, three quarters
        model.anneal(step / 250_000)
        assert model.random_share.item() == pytest.approx(share, abs=1e-6)
    for name in ("20_30", "0_100", "5_6"):
        first, last = map(int, name.split("_"))
        ours = [mar.random_share(step, first, last) for step in range(41)]
        assert ours == pytest.approx(g[f"ratio_{name}"].tolist(), abs=1e-12)


@pytest.mark.parametrize("share", ["0.0", "0.3", "0.5", "1.0"])
def test_the_rows_that_are_raster_are_the_authors(share, monkeypatch):
    """Each image by itself: their uniform numbers make the same rows raster as in their batch."""
    g = golden("beyond/rar_schedule")
    theirs = (g[f"orders_r{share}"] == torch.arange(16)).all(1)
    draw = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: (
        g["python_uniforms"].float()[:, None] if shape == (8, 1) else draw(*shape, **options)))
    order = mar.annealed_order(8, 16, "cpu", torch.tensor(float(share)))
    assert torch.equal((order == torch.arange(16)).all(1), theirs)
    assert torch.equal(order.sort(1).values, torch.arange(16).expand(8, -1)), "each row is a permutation"


def test_random_rows_differ_and_as_many_are_random_as_asked_for():
    order = mar.annealed_order(4000, 12, "cpu", torch.tensor(0.3))
    random = (order != torch.arange(12)).any(1)
    assert abs(random.float().mean() - 0.3) < 0.03
    first = torch.bincount(order[random, 0], minlength=12) / random.sum()
    assert (first - 1 / 12).abs().max() < 0.04, "every position comes first equally often"


def test_orders_are_annealed_in_training_and_raster_elsewhere(monkeypatch):
    model = annealed_mar()
    seen = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, cond, order: (
        seen.append((order == torch.arange(12)).all(1)), hidden(tokens, cond, order))[1])
    x, cond = torch.randint(11, (40, 12)), torch.arange(40) % 5
    for progress in (0.0, 0.625, 0.75, 1.0):
        model.anneal(progress)
        model(x, cond)[0].backward()
    assert not seen[0].any() and 8 < seen[1].sum() < 32 and seen[2].all() and seen[3].all()
    model.anneal(0.0)
    model.eval()(x, cond)
    assert seen[4].all(), "validation is of raster order, from the first step on"
    masks = []
    model.sample(cond[:3], on_step=lambda i, tokens, mask: masks.append(mask.clone()))
    assert all((mask.long().diff(dim=1) >= 0).all() for mask in masks), "written from left to right"


def test_an_annealed_run_resumed_equals_the_uninterrupted_one_bit_for_bit(tmp_path, monkeypatch):
    words = ["--tokenizer", "vq", *ANNEALED, "--tok_size", "dot", "--size", "dot", "--image_size", "8",
             "--n_shapes", "24", "--tok_steps", "2", "--tok_batch_size", "4", "--batch_size", "8", "--steps",
             "8", "--device", "cpu", "--dtype", "fp32", "--name", "x", "--tok_name", "tok"]
    write = runs.save_atomically

    def write_and_keep(state, path):
        write(state, path)
        if state.get("stage") == 2 and state["step"] == 5:  # while fewer and fewer orders are random
            shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    monkeypatch.setattr(runs, "save_atomically", write_and_keep)
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)
    shares = []
    anneal = mar.CausalMAR.anneal
    monkeypatch.setattr(mar.CausalMAR, "anneal", lambda self, progress: (
        anneal(self, progress), shares.append(self.random_share.item()))[0])
    with small_world():
        train.main([*words, "--runs", str(tmp_path / "whole")])
        train.main([*words, "--runs", str(tmp_path / "stopped"), "--resume"])
    assert shares[:8] == [1, 1, 1, 1, 1, 0.5, 0, 0] and shares[8:] == shares[5:8]
    whole, stopped = (runs.read_checkpoint(tmp_path / name / "x") for name in ("whole", "stopped"))
    for part in ("model", "ema"):
        assert all(torch.equal(v, whole[part][name]) for name, v in stopped[part].items())


@pytest.mark.parametrize("words", [["--generator", "mar"], ["--generator", "ar"],
                                   ["--generator", "mar", "--attention", "bidirectional"]], ids=" ".join)
def test_annealed_orders_need_a_causal_mar(words, tmp_path):
    with pytest.raises(data.BadInput, match="--order annealed: needs --generator mar --attention causal"):
        train.main(["--tokenizer", "vae", *words, "--order", "annealed", "--device", "cpu", "--runs",
                    str(tmp_path)])
    with pytest.raises(ValueError, match="'annealed' is none of random, raster"):
        mar.MAR(mar.CategoricalHead(32, 11), 12, 5, vocab_size=11, order="annealed")
