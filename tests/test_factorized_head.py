"""Tests of lfq.FactorizedHead, MAGVIT-v2's factorised vocabulary, alone and in every generator."""
import math

import pytest
import torch
import torch.nn as nn
from torch import distributions as D

import ar_transformer
import lfq
import mar
import maskgit
import sample
import train
from common import drawing, runs
from official import llamagen
from tests.helpers import IDS, RARELY, TINY, log_of


def grouped(kind, n_sub=2):
    """A small generator whose 27 or 16 ids are sub-tokens."""
    V = {2: 16, 3: 27}[n_sub]
    head = lfq.FactorizedHead(32, V, n_sub)
    size = dict(n_layer=2, n_head=2, n_embd=32, label_drop=0, vocab_size=V, grid=(3, 4))
    if kind == "ar":
        return ar_transformer.ARTransformer(head, 12, 5, **size)
    if kind == "maskgit":
        return maskgit.MaskGIT(head, 12, 5, **size)
    return (mar.MAR if kind == "mar" else mar.CausalMAR)(head, 12, 5, **size)


def opinions(head):
    for name, p in head.named_parameters():
        if "proj" in name:
            nn.init.normal_(p, std=0.5)
    return head


@pytest.mark.parametrize("groups, V, base", [(2, 16, 4), (3, 27, 3)])
def test_groups_are_a_product_of_softmaxes(groups, V, base):
    head, h, null = opinions(lfq.FactorizedHead(6, V, groups)), torch.randn(6), torch.randn(6)
    digits = lambda i: [i // base ** g % base for g in range(groups)]                       # the lowest first
    rows = head.proj.weight.detach().view(groups, base, 6)
    factors = [D.Categorical(logits=row @ h) for row in rows]
    slow = torch.stack(
        [sum(f.log_prob(torch.tensor(d)) for f, d in zip(factors, digits(i))) for i in range(V)])
    ours = -head.loss(h.expand(V, -1), torch.arange(V)).detach()
    assert torch.allclose(ours, slow, atol=1e-5) and abs(ours.logsumexp(0)) < 1e-5
    assert torch.allclose(head.logits(h).log_softmax(-1), slow, atol=1e-5)
    assert torch.allclose(head.embed(torch.arange(V)),
                          torch.stack([sum(rows[g, d] for g, d in enumerate(digits(i))) for i in range(V)]))
    guided, many = [], h.expand(2, 9000, 6)                 # each digit is guided, warmed and cut by itself
    for row in rows:
        logits = (row @ null + 1.5 * (row @ h - row @ null)) / 0.8
        guided.append(logits.masked_fill(logits < logits.topk(2).values[-1], -math.inf).log_softmax(-1))
    wanted = torch.stack([sum(f[d] for f, d in zip(guided, digits(i))) for i in range(V)])
    ids, log_p = head.sample(many, null.expand_as(many), cfg=1.5, temperature=0.8, top_k=2)
    assert ids.shape == log_p.shape == (2, 9000) and torch.allclose(log_p, wanted[ids], atol=1e-4)
    assert torch.allclose(ids.flatten().bincount(minlength=V) / 18_000, wanted.exp(), atol=0.02)
    if groups > 1:
        with pytest.raises(ValueError, match=f"such as {V}, not {V + 1}"):
            lfq.FactorizedHead(6, V + 1, groups)


@pytest.mark.parametrize("kind, groups", [("ar", 2), ("ar", 3), ("maskgit", 2), ("mar", 2), ("causal", 2)])
def test_generators_of_digits_start_at_ln_v_and_train_every_weight(kind, groups):
    model = grouped(kind, groups)
    V = model.vocab_size
    x, cond, step = torch.randint(V,
                                  (8, 12)), torch.arange(8) % 5, torch.optim.SGD(model.parameters(), lr=0.1)
    loss, _ = model.eval()(x, cond)
    assert abs(loss - math.log(V)) < 0.1
    for _ in range(2):                                 # a head at zero lets nothing through in the first step
        step.zero_grad()
        model.train()(x, cond)[0].backward()
        step.step()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead, dead
    drawn = model.eval().sample(cond, cfg=2.0)
    assert drawn.shape == x.shape and drawn.min() >= 0 and drawn.max() < V and (drawn >= V // 2).any() and (
        drawn < V // 2).any()
    known = torch.arange(12) < 6
    drawn = model.sample(cond, known=x, known_mask=known.expand(8, -1))
    assert torch.equal(drawn[:, known], x[:, known]) and not torch.equal(drawn, x)


@pytest.mark.parametrize("kind, groups", [("ar", 3)])
def test_digits_cached_or_not_and_their_beam(kind, groups):
    model, cond, drawn = grouped(kind, groups).eval(), torch.arange(5), []
    opinions(model.head)
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(model.sample(cond, cfg=2.0, top_k=2, use_cache=use_cache))
    assert torch.equal(*drawn) and drawn[0].unique().numel() > 3
    with torch.no_grad():
        h, x = model.hidden_states(drawn[0], cond), drawn[0].clone()
        x[:, 5] = (x[:, 5] + 1) % model.vocab_size
        changed = (model.hidden_states(x, cond) - h).abs().amax((0, 2)) > 1e-6
        assert not changed[:6].any() and changed[6], "the lowest digit is read, and not before its turn"
        tokens, log_p = model.beam_search(cond)
        assert torch.allclose(log_p, -model.head.loss(model.hidden_states(tokens, cond), tokens).sum(1),
                              atol=1e-3)
    with pytest.raises(ValueError, match="in one softmax"):
        llamagen.to_llama(model)


def test_maskgit_of_digits_counts_all_of_them():
    """The smoothed loss over all V ids, and an accuracy that wants every digit, written out over the whole
    vocabulary.
    """
    model, cond = grouped("maskgit"), torch.zeros(3, dtype=torch.long)
    model.smoothing = 0.1
    opinions(model.head)
    x = torch.randint(16, (3, 12))
    torch.manual_seed(5)
    loss, logs = model(x, cond)
    torch.manual_seed(5)
    mask = model.training_mask(3, "cpu")
    log_p = model.logits(x, cond, mask).log_softmax(-1)                                     # (3, 12, 16)
    nll = -log_p.gather(-1, x[..., None])[..., 0]
    each = (1 - model.smoothing) * nll - model.smoothing * log_p.mean(-1)
    assert torch.allclose(loss, torch.stack([each[b][mask[b]].mean() for b in range(3)]).mean(), atol=1e-5)
    assert torch.allclose(logs["nll"], nll[mask].mean(), atol=1e-5)
    assert torch.allclose(logs["accuracy"], (log_p.argmax(-1) == x)[mask].float().mean())
    other = torch.where(mask, 15 - x, x)
    assert torch.equal(model.hidden_states(x, cond, mask), model.hidden_states(other, cond,
                                                                               mask)), "a hidden id leaks"


@pytest.mark.parametrize("words, shape", [(["--groups", "2"], (16, 64)),
                                          (["--groups", "3", "--generator", "maskgit"], (12, 64))])
def test_digits_are_trained_and_drawn_by_the_programs(words, shape, tiny_run, capsys):
    name = "digits" + "".join(words).replace("--", "-")
    train.main([
        *TINY, *RARELY, "--runs",
        str(tiny_run), *IDS, "--tokenizer", "lfq", "--vocab_size", "64", "--name", name, *words
    ])
    run = runs.load_run(tiny_run / name)
    head = run.generator.head
    assert head.proj.weight.shape == shape
    images = drawing.draw_samples(run, torch.arange(4))
    assert images.shape == (4, 3, 16, 16) and torch.isfinite(images).all()
    assert 0 < log_of(tiny_run, name)[24] < 1.1 * math.log(64)
    sample.main([str(tiny_run / name), "--n", "3", "--top_k", "2", "--out", str(tiny_run / "x.png")])
    with pytest.raises(SystemExit, match="does not fit"):
        train.main([
            *TINY, *RARELY, "--runs",
            str(tiny_run), *IDS, "--tokenizer", "lfq", "--name", name, "--groups", "6"
        ])


@pytest.mark.parametrize("words, sentence",
                         [(["--tokenizer", "vae", "--groups", "2"], "goes with --head categorical"),
                          (["--tokenizer", "lfq", "--groups", "0"], "at least 1"),
                          (["--tokenizer", "vq", "--vocab_size", "1000", "--groups", "2"
                            ], "whole number to the power of 2, such as 1024"),
                          (["--tokenizer", "lfq", "--groups", "3"], "--vocab_size 1024 must be")])
def test_digits_that_do_not_fit_are_refused_before_anything_is_trained(words, sentence, tmp_path):
    with pytest.raises(SystemExit, match=sentence):
        train.main([*words, "--runs", str(tmp_path), "--device", "cpu"])
    assert not list(tmp_path.iterdir())
