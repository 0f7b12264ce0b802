"""Tests of recipes/probe.py."""
import json

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import ar_transformer
import flow_adapter
import gmm_head
from common import age
from recipes import probe


def test_probe_is_perfect_on_separable_features_and_at_chance_on_noise():
    y = torch.arange(1200) % 4
    x = torch.randn(1200, 6) + 12 * F.one_hot(y, 6)
    x[:, 5] = 7.0                                           # a constant must not become a division by zero
    assert probe.probe_accuracy(x[:800], y[:800], x[800:], y[800:]) == 1
    assert abs(probe.probe_accuracy(1e3 * x[:800], y[:800], 1e3 * x[800:], y[800:]) - 1) < 1e-6
    noise = torch.randn(1200, 6)
    assert abs(probe.probe_accuracy(noise[:800], y[:800], noise[800:], y[800:]) - 0.25) < 0.08
    weight, bias = probe.fit_linear(x[:800, :3], y[:800], 0.1, 4)
    p = (x[:800, :3] @ weight + bias).softmax(-1) - F.one_hot(y[:800], 4)   # at the optimum the gradient is 0
    assert (x[:800, :3].T @ p / 800 + 0.1 * weight).abs().max() < 1e-3 and p.mean(0).abs().max() < 1e-3


def test_probe_reads_every_layer_by_hooks_and_takes_them_away():
    size = dict(n_layer=3, n_head=2, n_embd=32)
    model = ar_transformer.ARTransformer(gmm_head.GMMHead(32, 4, 2), 12, 5, token_dim=4, grid=(3, 4),
                                         **size).eval()
    x, cond = torch.randn(2, 12, 4), torch.tensor([5, 5])
    pooled = probe.layer_features(model, x, cond)
    assert [f.shape for f in pooled] == [(2, 32)] * 4 and not any(block._forward_hooks
                                                                  for block in model.blocks)
    h = torch.cat([model.prefix(cond), model.embed(x[:, :-1])], 1)
    for block, f in zip([None, *model.blocks], pooled):     # the forward pass again, by hand
        h = h if block is None else block(h, model.rope[:12])
        assert torch.allclose(h.mean(1), f, atol=1e-6)
    adapted = flow_adapter.Adapted(flow_adapter.FlowAdapter(4, (3, 4), 2), model).eval()
    for a, b in zip(probe.layer_features(adapted, x, cond),
                    probe.layer_features(model, adapted.adapter(x), cond)):
        assert torch.equal(a, b)

    class Masked(nn.Module):                                # the shape of a bidirectional model
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def hidden(self, tokens, labels, mask):
            h = tokens * ~mask[..., None]
            for block in self.blocks:
                h = block(h)
            return h
    hide = torch.zeros(2, 12, dtype=torch.bool)
    hide[:, 6:] = True
    pooled = probe.layer_features(Masked(), x, cond, hide)
    assert len(pooled) == 3 and torch.allclose(pooled[0], x[:, :6].sum(1) / 12, atol=1e-6)


def test_probe_adds_to_the_metrics(tiny_run, capsys):
    folder = tiny_run / "shapes-vae-ar-gmm"
    before = (folder / "metrics.json").read_text() if (folder / "metrics.json").exists() else None
    (folder / "metrics.json").write_text('{"kept": 1}')
    probe.main([str(folder), "--device", "cpu"])
    out, metrics = capsys.readouterr().out, json.loads((folder / "metrics.json").read_text())
    assert metrics.pop("kept") == 1
    assert {"probe_" + key: metrics.pop("probe_" + key) for key in ("commit", "date")} == age.now("probe_")
    assert list(metrics) == ["probe_pixels", "probe_latents", "probe_latents_averaged"
                             ] + [f"probe_layer_{k}" for k in range(3)]
    assert all(5 < v <= 100
               for v in metrics.values()) and "linear probe, layer 2" in out and "samples" not in out
    assert Image.open(folder / "probe.png").width > 400
    (folder / "probe.png").unlink(), (folder / "metrics.json").unlink()
    if before:
        (folder / "metrics.json").write_text(before)


def test_probe_reads_the_bits_of_clips(clip_run, capsys):
    folder = clip_run / "shapes-lfq-5f-maskgit-categorical"
    probe.main([str(folder), "--device", "cpu"])
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {"probe_pixels", "probe_token_bits", "probe_layer_2"} <= metrics.keys()


def test_probe_refuses_what_has_no_layers_and_several_processes(tiny_run, monkeypatch):
    with pytest.raises(SystemExit, match="without a generator"):
        probe.main([str(tiny_run / "shapes-vae"), "--device", "cpu"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="without torchrun"):
        probe.main([str(tiny_run / "shapes-vae-ar-gmm"), "--device", "cpu"])
