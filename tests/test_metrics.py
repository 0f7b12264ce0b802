"""Tests of common/metrics.py."""
import json

import numpy as np
import pytest
import torch

import data
from common import metrics


def test_frechet_distance_of_known_gaussians():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(4000, 3, generator=g, dtype=torch.float64)
    white = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(a.T.cov()).T)   # exactly N(0, 1) moments
    b = white * 3 + torch.tensor([1.0, 2.0, 2.0])
    assert abs(metrics.frechet_distance(white, b) - (9 + 3 * (3 - 1) ** 2)) < 1e-6
    assert metrics.frechet_distance(b, b) < 1e-6


def test_mean_iou_equals_a_slow_loop():
    predicted, true = torch.randint(4, (3, 5, 5)), torch.randint(3, (3, 5, 5))         # class 3 is never true
    slow = []
    for k in range(4):
        a, b = {tuple(i)
                for i in (predicted == k).nonzero().tolist()
                }, {tuple(i)
                    for i in (true == k).nonzero().tolist()}
        slow.append(len(a & b) / len(a | b))
    assert abs(metrics.mean_iou(predicted, true, 4) - sum(slow) / 4) < 1e-6
    assert metrics.mean_iou(true, true, 5) == 1


def test_psnr_ssim_precision_and_recall():
    x = data.draw(torch.arange(4))[0]
    assert torch.allclose(metrics.psnr(x, x + 0.2), torch.full((4,), 20.0), atol=1e-3)
    assert torch.allclose(metrics.ssim(x, x), torch.ones(4), atol=1e-5) and metrics.ssim(x, -x).max() < 0.5
    a, b = 0.5, 1.25                             # flat images on SSIM's scale of [0, 2]: only the means count
    flat = lambda v: torch.full((1, 3, 16, 16), v - 1.0)
    assert abs(metrics.ssim(flat(a), flat(b))[0] - (2 * a * b + 4e-4) / (a * a + b * b + 4e-4)) < 1e-4
    real, far = torch.randn(200, 4), torch.randn(200, 4) + 100
    assert metrics.precision_recall(real, far) == (0, 0) and metrics.precision_recall(real, real) == (1, 1)
    collapsed = real[:1] + 1e-3 * torch.randn(200, 4)
    precision, recall = metrics.precision_recall(real, collapsed)
    assert precision > 0.99 and recall < 0.05


def test_ms_ssim_equals_its_definition_in_slow_loops():
    def means(a, b):                               # SSIM and contrast-structure, window by window, in float64
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
            a, b = (v[:len(v) // 2 * 2, :v.shape[1] // 2 * 2].reshape(len(v) // 2, 2, -1, 2).mean((1, 3))
                    for v in (a, b))
        return product
    weights = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333]
    for side, scales in ((44, 3), (43, 2), (22, 2), (21, 1)):
        a = data.draw(torch.arange(1), side)[0]
        b = (a + 0.3 * torch.randn(a.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
        grey = [((x[0].double() + 1) * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0).numpy()
                for x in (a, b)]
        assert abs(metrics.ms_ssim(a, b).item() - slow(*grey, weights[:scales])) < 1e-4, side
    assert torch.equal(metrics.ms_ssim(a, b), metrics.ssim(a, b))                       # 21 pixels: one scale
    real = metrics.similarity                              # five from 176 pixels on, four below
    for side, scales in ((176, 5), (175, 4)):
        calls, x = [], torch.rand(1, 3, side, 200) * 2 - 1
        metrics.similarity = lambda a, b: calls.append(a.shape) or real(a, b)
        try:
            assert abs(metrics.ms_ssim(x, x) - 1) < 1e-5 and metrics.ms_ssim(x, -x) == 0
        finally:
            metrics.similarity = real
        assert len(calls) == 2 * scales


def test_the_rule_that_judges_captions_reads_real_pictures():
    index = torch.arange(data.VAL_INDEX, data.VAL_INDEX + 60)
    images, s = data.draw(index, 32)[0], data.scene(index)
    told = metrics.read_scene(images)
    assert (told["shape"] == s["label"]).float().mean() >= 0.97 and (told["colour"]
                                                                     == s["colour"]).float().mean() >= 0.97
    assert (told["background"] == s["background"]).all()
    assert (metrics.read_scene(images.roll(
        1, 1))["colour"] == s["colour"]).float().mean() < 0.5, "other colours are not noticed"


def test_a_colour_that_is_not_quite_one_of_the_palette_is_read_as_the_nearest():
    for name, rgb in data.COLOURS.items():
        x = torch.tensor(rgb)[None] / 127.5 - 1
        assert list(data.COLOURS)[metrics.nearest_colour(x * 0.95, data.COLOURS)] == name


def test_rows_become_a_table_and_a_file_that_keeps_what_it_is_told_to(tmp_path, capsys):
    path = tmp_path / "metrics.json"
    path.write_text('{"probe_pixels": 1, "recon_ssim": 2}')
    rows = [("recon_psnr_db", "reconstruction PSNR", 20.5, "dB", "higher is better"),
            ("val_loss", "validation loss", (3.0, 0.25), "", "lower is better")]
    metrics.print_rows(rows)
    metrics.save_rows(tmp_path, rows, lambda key: key.startswith("probe_"), n=5)
    out = capsys.readouterr().out
    assert "reconstruction PSNR          20.500  dB  higher" in out and "3.000 +- 0.250" in out
    assert json.loads(path.read_text()) == {"probe_pixels": 1, "recon_psnr_db": 20.5, "val_loss": 3.0,
                                            "val_loss_error": 0.25, "n": 5}


@pytest.mark.parametrize("damaged", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_damaged_metrics_are_made_anew_with_a_line(damaged, tmp_path, capsys):
    path = tmp_path / "metrics.json"
    path.write_bytes(damaged)
    metrics.save_rows(tmp_path, [("a", "name", 1.0, "", "")])
    assert json.loads(path.read_text()) == {"a": 1.0}
    assert "damaged" in capsys.readouterr().out


def test_a_folder_in_the_place_of_the_metrics_is_a_sentence(tmp_path):
    (tmp_path / "metrics.json").mkdir()
    with pytest.raises(data.BadInput, match="could not write .*metrics.json"):
        metrics.save_rows(tmp_path, [("a", "name", 1.0, "", "")])
