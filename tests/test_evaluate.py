"""Tests of evaluate."""
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import ar_transformer
import data
import evaluate
import flow_adapter
import gmm_head


def test_frechet_distance_of_known_gaussians():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(4000, 3, generator=g, dtype=torch.float64)
    white = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(a.T.cov()).T)          # exactly N(0, 1) moments
    b = white * 3 + torch.tensor([1.0, 2.0, 2.0])
    assert abs(evaluate.frechet_distance(white, b) - (9 + 3 * (3 - 1) ** 2)) < 1e-6
    assert evaluate.frechet_distance(b, b) < 1e-6


def test_mean_iou_equals_a_slow_loop():
    predicted, true = torch.randint(4, (3, 5, 5)), torch.randint(3, (3, 5, 5))              # class 3 is never true
    slow = []
    for k in range(4):
        a, b = {tuple(i) for i in (predicted == k).nonzero().tolist()}, {tuple(i) for i in (true == k).nonzero().tolist()}
        slow.append(len(a & b) / len(a | b))
    assert abs(evaluate.mean_iou(predicted, true, 4) - sum(slow) / 4) < 1e-6
    assert evaluate.mean_iou(true, true, 5) == 1


def test_psnr_ssim_precision_and_recall():
    x = data.draw(torch.arange(4))[0]
    assert torch.allclose(evaluate.psnr(x, x + 0.2), torch.full((4,), 20.0), atol=1e-3)
    assert torch.allclose(evaluate.ssim(x, x), torch.ones(4), atol=1e-5) and evaluate.ssim(x, -x).max() < 0.5
    a, b = 0.5, 1.25                                        # flat images on SSIM's scale of [0, 2]: only the means count
    flat = lambda v: torch.full((1, 3, 16, 16), v - 1.0)
    assert abs(evaluate.ssim(flat(a), flat(b))[0] - (2 * a * b + 4e-4) / (a * a + b * b + 4e-4)) < 1e-4
    real, far = torch.randn(200, 4), torch.randn(200, 4) + 100
    assert evaluate.precision_recall(real, far) == (0, 0) and evaluate.precision_recall(real, real) == (1, 1)
    collapsed = real[:1] + 1e-3 * torch.randn(200, 4)
    precision, recall = evaluate.precision_recall(real, collapsed)
    assert precision > 0.99 and recall < 0.05


def test_precision_does_not_depend_on_the_order_of_the_real_images(monkeypatch):
    g = torch.Generator().manual_seed(0)
    near = lambda n, where: where + torch.randn(n, 8, generator=g)
    real, fake = torch.cat([near(300, 0.0), near(300, 20.0)]), torch.cat([near(50, 0.0), near(50, 20.0)])      # sorted by class
    monkeypatch.setattr(evaluate, "look", lambda net, images: (fake, torch.zeros(100, dtype=torch.long)))
    for order in (torch.arange(600), torch.randperm(600, generator=g)):
        rows = evaluate.measure_samples(torch.zeros(100, 3, 4, 4), torch.zeros(100, dtype=torch.long), None, real[order], 100)
        found = {key: value for key, _, value, *_ in rows}
        assert found["sample_precision"] > 75 and found["sample_recall"] > 75, found


def test_ms_ssim_equals_its_definition_in_slow_loops():
    def means(a, b):                                        # SSIM and contrast-structure, window by window, in float64
        g = np.exp(-(np.arange(11) - 5.0) ** 2 / (2 * 1.5**2))
        window, ssim, cs = np.outer(g, g) / g.sum() ** 2, [], []
        for y in range(a.shape[0] - 10):
            for x in range(a.shape[1] - 10):
                p, q = a[y:y + 11, x:x + 11], b[y:y + 11, x:x + 11]
                mu_p, mu_q = (window * p).sum(), (window * q).sum()
                var_p, var_q = (window * (p - mu_p) ** 2).sum(), (window * (q - mu_q) ** 2).sum()
                cov = (window * (p - mu_p) * (q - mu_q)).sum()
                cs.append((2 * cov + 0.06**2) / (var_p + var_q + 0.06**2))
                ssim.append(cs[-1] * (2 * mu_p * mu_q + 0.02**2) / (mu_p**2 + mu_q**2 + 0.02**2))
        return np.mean(ssim), np.mean(cs)

    def slow(a, b, weights):                                # grey images (H, W) in [0, 2]
        product = 1.0
        for j, w in enumerate(weights):
            ssim, cs = means(a, b)
            product *= (ssim if j + 1 == len(weights) else cs) ** (w / sum(weights))
            a, b = (v[:len(v) // 2 * 2, :v.shape[1] // 2 * 2].reshape(len(v) // 2, 2, -1, 2).mean((1, 3)) for v in (a, b))
        return product
    weights = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]
    for side, scales in ((44, 3), (43, 2), (22, 2), (21, 1)):
        a = data.draw(torch.arange(1), side)[0]
        b = (a + 0.3 * torch.randn(a.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
        grey = [((x[0].double() + 1) * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0).numpy() for x in (a, b)]
        assert abs(evaluate.ms_ssim(a, b).item() - slow(*grey, weights[:scales])) < 1e-4, side
    assert torch.equal(evaluate.ms_ssim(a, b), evaluate.ssim(a, b))                         # 21 pixels: one scale
    real = evaluate.similarity                              # five from 176 pixels on, four below
    for side, scales in ((176, 5), (175, 4)):
        calls, x = [], torch.rand(1, 3, side, 200) * 2 - 1
        evaluate.similarity = lambda a, b: calls.append(a.shape) or real(a, b)
        try:
            assert abs(evaluate.ms_ssim(x, x) - 1) < 1e-5 and evaluate.ms_ssim(x, -x) == 0
        finally:
            evaluate.similarity = real
        assert len(calls) == 2 * scales


def test_probe_is_perfect_on_separable_features_and_at_chance_on_noise():
    y = torch.arange(1200) % 4
    x = torch.randn(1200, 6) + 12 * F.one_hot(y, 6)
    x[:, 5] = 7.0                                           # a constant must not become a division by zero
    assert evaluate.probe_accuracy(x[:800], y[:800], x[800:], y[800:]) == 1
    assert abs(evaluate.probe_accuracy(1e3 * x[:800], y[:800], 1e3 * x[800:], y[800:]) - 1) < 1e-6
    noise = torch.randn(1200, 6)
    assert abs(evaluate.probe_accuracy(noise[:800], y[:800], noise[800:], y[800:]) - 0.25) < 0.08
    weight, bias = evaluate.fit_linear(x[:800, :3], y[:800], 0.1, 4)
    p = (x[:800, :3] @ weight + bias).softmax(-1) - F.one_hot(y[:800], 4)                   # at the optimum the gradient is 0
    assert (x[:800, :3].T @ p / 800 + 0.1 * weight).abs().max() < 1e-3 and p.mean(0).abs().max() < 1e-3


def test_probe_reads_every_layer_by_hooks_and_takes_them_away():
    size = dict(n_layer=3, n_head=2, n_embd=32)
    model = ar_transformer.ARTransformer(gmm_head.GMMHead(32, 4, 2), 12, 5, token_dim=4, grid=(3, 4), **size).eval()
    x, cond = torch.randn(2, 12, 4), torch.tensor([5, 5])
    pooled = evaluate.layer_features(model, x, cond)
    assert [f.shape for f in pooled] == [(2, 32)] * 4 and not any(block._forward_hooks for block in model.blocks)
    h = torch.cat([model.prefix(cond), model.embed(x[:, :-1])], 1)
    for block, f in zip([None, *model.blocks], pooled):     # the forward pass again, by hand
        h = h if block is None else block(h, model.rope[:12])
        assert torch.allclose(h.mean(1), f, atol=1e-6)
    adapted = flow_adapter.Adapted(flow_adapter.FlowAdapter(4, (3, 4), 2), model).eval()
    for a, b in zip(evaluate.layer_features(adapted, x, cond), evaluate.layer_features(model, adapted.adapter(x), cond)):
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
    pooled = evaluate.layer_features(Masked(), x, cond, hide)
    assert len(pooled) == 3 and torch.allclose(pooled[0], x[:, :6].sum(1) / 12, atol=1e-6)


def test_probe_runs_alone_and_adds_to_the_metrics(tiny_run, monkeypatch, capsys):
    folder = tiny_run / "shapes-vae-ar-gmm"
    before = (folder / "metrics.json").read_text() if (folder / "metrics.json").exists() else None
    (folder / "metrics.json").write_text('{"kept": 1}')
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(folder), "--probe", "--device", "cpu"])
    evaluate.main()
    out, metrics = capsys.readouterr().out, evaluate.json.loads((folder / "metrics.json").read_text())
    assert metrics.pop("kept") == 1
    assert list(metrics) == ["probe_pixels", "probe_latents", "probe_latents_averaged"] + [f"probe_layer_{k}" for k in range(5)]
    assert all(5 < v <= 100 for v in metrics.values()) and "linear probe, layer 4" in out and "samples" not in out
    assert Image.open(folder / "probe.png").width > 400
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tiny_run / "shapes-vae"), "--probe", "--device", "cpu"])
    with pytest.raises(SystemExit, match="--probe: .* without a generator"):
        evaluate.main()
    (folder / "probe.png").unlink(), (folder / "metrics.json").unlink()
    if before:
        (folder / "metrics.json").write_text(before)
