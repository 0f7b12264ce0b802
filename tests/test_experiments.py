"""Tests of experiments."""
import argparse
import json
import math
import time
from datetime import date

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import lfq
import train
from common import age, classifier, drawing, pictures
from experiments import claims, compiled, equal_time, mar_reuse, neighbours, optimizers, understanding
from experiments import video_designs
from tests.small_world import small_world


def test_claims_are_listed_once_and_judged_by_the_rule(tmp_path, capsys):
    claims.main(["--out", str(tmp_path)])
    listed = capsys.readouterr().out.strip("\n").split("\n")
    assert [int(line[:2]) for line in listed] == list(range(1, 24)) and all("not run" in line
                                                                            for line in listed)
    with pytest.raises(data.BadInput, match="not a claim"):
        claims.main(["no-such-claim"])
    # mean 1, standard error 0.289 (std 0.5 / sqrt 3): beyond two of them; 0.9 is the mean of a wider spread,
    # 0.586
    assert claims.decide([0.5, 1.0, 1.5]) == "holds" and claims.decide([-0.5, -1.0, -1.5]) == "does not hold"
    assert claims.decide([0.0, 0.7, 2.0]) == "undecided here" and claims.decide([9.0]) == "undecided here"
    arms = {
        "new": [dict(error=e) for e in (1.0, 1.2, 1.4)], "old": [dict(error=e) for e in (1.05, 1.25, 1.46)]
    }
    verdict = lambda *words, **options: claims.judge_test(claims.test("error", *words, **options), arms)[
        "verdict"]
    # paired: 0.05 at each seed
    assert verdict("new", "old") == "holds" and verdict("old", "new") == "does not hold"
    assert verdict("old", "new", times=1.1) == "holds" and verdict("old", "new", give=0.1) == "holds"
    assert verdict("new", "old", "higher") == "does not hold" and verdict("new", "old", "higher",
                                                                          give=0.1) == "holds"
    assert verdict("new", "old", every=True) == "holds" and verdict("new", "old", give=-0.055,
                                                                    every=True) == "does not hold"
    claim = lambda *verdicts: claims.judge_claim([dict(verdict=v) for v in verdicts])
    assert claim("holds", "holds") == "holds" and claim("holds", "undecided here") == "undecided here"
    assert claim("holds", "undecided here", "does not hold") == "does not hold"
    tests = [claims.judge_test(claims.test("error", "new", "old"), arms)]
    (tmp_path / "few-steps.json").write_text(json.dumps(dict(tests=tests, verdict="holds", commit="1a2b3c4",
                                                          date="2026-11-22")))
    text = claims.table(tmp_path)
    assert "error of the mean / sigma: new 1.2 +- 0.2, lower than old 1.3 +- 0.2: holds" in text
    assert "**holds (1 of 1 tests hold)**" in text
    assert " | 2026-11-22, 1a2b3c4 |" in text, "the age of its run"
    assert "](../experiments/results/claims/few-steps.png)" in text, "the table stands in docs/"
    assert "Not run: 1 (`gmm-components`)" in text
    assert "`few-steps`" not in text
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- claims -->\nold\n<!-- /claims -->\nafter\n")
    claims.fill_readme(readme, text)
    assert readme.read_text() == f"before\n<!-- claims -->\n{text}\n<!-- /claims -->\nafter\n"
    readme.write_text("no markers")
    with pytest.raises(data.BadInput, match="markers"):
        claims.fill_readme(readme, text)


def test_a_claim_runs_from_its_flags_to_a_verdict_and_remembers(tmp_path, monkeypatch, capsys):
    for module, name in ((data, "load"), (drawing, "save_samples"), (pictures, "save_curve"),
                         (pictures, "save_rows")):
        monkeypatch.setattr(module, name, getattr(module, name))                    # claims.Lab replaces them
    draw_set = data.draw_set

    def at_most_200(image_size, split, device, seed=0, n=None, **options):          # not 20,000
        return draw_set(image_size, split, device, seed, min(n or 200, 200), **options)
    monkeypatch.setattr(data, "draw_set", at_most_200)
    monkeypatch.setattr(classifier.train_classifier, "__defaults__", (0, 12, 32, 4e-3))
    monkeypatch.setitem(claims.SCALE, "cpu",
                        claims.SCALE["cpu"] | dict(n_shapes=64, tok_steps=2, steps=2, batch_size=8, n=20))
    words = [
        "vqvae-prior", "--seeds", "0", "1", "--runs",
        str(tmp_path / "runs"), "--out",
        str(tmp_path), "--device", "cpu"
    ]
    claims.main(words)
    first, out = json.loads((tmp_path / "vqvae-prior.json").read_text()), capsys.readouterr().out
    assert first["commit"] == age.COMMIT and first["date"] == str(date.today())
    assert (tmp_path / "vqvae-prior.png").stat().st_size > 0 and first["seeds"] == [0, 1
                                                                                    ] and first["seconds"] > 0
    assert out.count("done in") == 4 and [len(rows) for rows in first["arms"].values()] == [2, 2, 2]
    for t in first["tests"]:
        values = [[row["frechet"] for row in first["arms"][t[k]]] for k in ("arm", "other")]
        assert t["values"] == values[0] and t["advantage"] == pytest.approx(
            sum(values[1]) / 2 - sum(values[0]) / 2)
        assert t["verdict"] == claims.decide([y - x for x, y in zip(*values)])
    claims.main(words)
    again = json.loads((tmp_path / "vqvae-prior.json").read_text())
    assert "done in" not in capsys.readouterr(
    ).out and again == first, "what was measured is not measured again"


@pytest.mark.parametrize("block", [1, 2])
def test_blocks_of_pixels_lose_no_pixel(block):
    images = 255 * torch.randint(2, (5, 3, 28, 28), dtype=torch.uint8)      # black or white: nothing is drawn
    ids, labels = claims.Binary(images, False, block).batch(torch.tensor([3, 1]))
    assert ids.shape == (2, (28 // block) ** 2) and ids.max() < 1 << block**2 and not labels.any()
    for image, row in zip(images[[3, 1], 0] // 255, ids.view(2, 28 // block, -1)):
        for y, x in [(y, x) for y in range(28) for x in range(28)]:
            bit = row[y // block, x // block] >> (y % block * block + x % block) & 1
            assert bit == image[y, x], f"pixel {y}, {x}"


@pytest.mark.slow
def test_gmm_comes_within_two_percent_of_25_gaussians():
    found = claims.excess_of_head("grid25", 0, 1000)
    assert 0 < found["excess"] < 2, f"{found['excess']:.2f}% of a nat above the truth on the same points"


def test_designs_of_video_tokenizers_are_causal_and_of_equal_size():
    v = video_designs
    models = {design: v.tokenizer(design) for design in v.DESIGNS}
    sizes = {design: v.size_of(m) for design, m in models.items()}
    assert max(sizes.values()) < 1.04 * sizes["causal 3-D CNN"] and min(
        sizes.values()) > 0.96 * sizes["causal 3-D CNN"], sizes
    x = torch.rand(1, 3, 9, 16, 16)
    assert torch.equal(v.unpatch(v.patches(x[:, :, 1:], 4), 4), x[:, :, 1:])
    q = lfq.codes(torch.randint(1024, (1, 3, 4, 4)), 10).permute(0, 4, 1, 2, 3)
    for design, model in models.items():
        for p in model.parameters():                     # blocks that start as the identity would hide a leak
            if not p.any():
                nn.init.normal_(p, std=0.1)
        with torch.no_grad():
            z, y = model.encoder(x), model.decoder(q)
            assert z.shape == q.shape and y.shape == x.shape, design
            for t in (1, 4, 5, 8):                          # frames 1 .. 4 are in the second frame of tokens
                other, f = x.clone(), (t + 3) // 4
                other[:, :, t] = torch.rand(1, 3, 16, 16)
                moved = (model.encoder(other) - z).abs().amax((0, 1, 3, 4))
                assert moved[:f].max() == 0 and moved[f] > 1e-5, (design, t, moved)
            other = q.clone()
            other[:, :, 2] *= -1
            moved = (model.decoder(other) - y).abs().amax((0, 1, 3, 4))
            assert moved[:5].max() == 0 and moved[5:].min() > 1e-5, (design, moved)


def test_readers_of_clips_see_what_they_should():
    u = understanding
    clip = torch.rand(1, 3, 9, 16, 16)
    other = clip.clone()
    other[:, :, 6, 4:8, 12:16] += 1              # frame 6: the third frame of tokens; second row, last column
    assert (u.places(other) != u.places(clip)).any(-1)[0].nonzero().flatten().tolist() == [2 * 16 + 1 * 4 + 3]
    reader = u.Reader(nn.Linear(192, 64), 48)
    x, hide = torch.rand(2, 48, 192), torch.rand(2, 48) < 0.6
    changed = torch.where(hide[..., None], torch.rand(2, 48, 192), x)
    assert torch.equal(reader.states(x, hide), reader.states(changed, hide)), "what is hidden can be seen"
    model = u.VQClips(**u.SIZE).eval()
    ids = model.encode(clip)
    assert torch.allclose(model.decode(ids), model.reconstruct(clip)[0].clamp(-1, 1), atol=1e-5)
    assert torch.cdist(F.normalize(model.latents(clip)[0], dim=-1),
                       model.quantizer.codebook).argmin(-1).equal(ids[0])


@pytest.mark.slow
def test_experiments_on_clips_run(tmp_path):
    io_ = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    video_designs.main(["--seeds", "0", "--steps", "1", "--n", "72", "--classifier_steps", "2", *io_])
    rows = json.loads((tmp_path / "video-designs.json").read_text())["rows"]
    assert [r["design"] for r in rows] == list(video_designs.DESIGNS)
    assert all(math.isfinite(v) for r in rows for v in r.values() if isinstance(v, float))
    understanding.main([
        "--n", "60", "--tok_steps", "1", "--steps", "2", "--pre_steps", "1", "--labels", "20", "--seeds", "0",
        *io_
    ])
    result = json.loads((tmp_path / "understanding.json").read_text())["accuracy"]
    assert len(result["input"]) == 5 and len(result["target"]) == 4
    assert (tmp_path / "video-designs.png").exists() and (tmp_path / "understanding.png").exists()


def test_growth_counts_the_bytes_that_live_at_once():
    from experiments import growth
    kept = torch.ones(1000)                                 # was there before

    def job():
        a = torch.ones(250_000)                             # 1 MB
        b = a + 1                                           # and another one
        del a
        c = b + kept[0]                                     # two at a time again
        return b, c
    assert growth.bytes_added(job) == pytest.approx(2e6, abs=1e4)
    more = lambda: [torch.ones(250_000) for _ in range(3)]
    assert growth.bytes_added(more) == pytest.approx(3e6, abs=1e4)


def test_growth_fills_its_table(tmp_path, monkeypatch, capsys):
    from experiments import growth
    monkeypatch.setattr(growth, "TOKENS", 32)
    monkeypatch.setattr(growth, "processor_time", lambda job: (job(), 0.5)[1])
    growth.main(["--tokens", "4", "16", "--out", str(tmp_path / "x.json")])
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    expected = [(name, T) for name in ("ar", "maskgit", "mar") for T in (4, 16)]
    assert [(r["generator"], r["T"]) for r in rows] == expected
    for r in rows:
        assert r["step_ms_per_token"] == 500 / 32 and r["sampling_ms_per_token"] == 500 / (2 * r["T"])
        assert r["step_mb_added"] > 0 and r["sampling_mb_added"] > 0
    assert "| mar: sampling, ms per token | 62.5 | 15.6 |" in capsys.readouterr().out


def test_growth_times_the_processor_and_not_the_clock():
    from experiments import growth
    assert growth.processor_time(lambda: time.sleep(0.02), seconds=1e-6) < 0.01
    calls = []
    growth.processor_time(lambda: calls.append(sum(range(100_000))), seconds=0.02)
    assert len(calls) > 1


def test_neighbours_run_beside_a_step_and_are_stopped(monkeypatch):
    """A cell is timed in a process with the setting, and what ran beside it is gone afterwards."""
    beside = []
    asked = []

    class Beside:
        def __init__(self, command, env, stdout):
            assert "GOMP_SPINCOUNT" not in env              # the neighbour is as it comes
            beside.append(self)
            self.alive = True

        def kill(self):
            self.alive = False

        def wait(self):
            assert not self.alive

    def run(command, env, **_):
        asked.append(env.get("GOMP_SPINCOUNT"))
        return argparse.Namespace(stdout=json.dumps([0.1, 0.3, 0.2]))

    monkeypatch.setattr(neighbours.subprocess, "Popen", Beside)
    monkeypatch.setattr(neighbours.subprocess, "run", run)
    found = neighbours.measure(dict(GOMP_SPINCOUNT="1000"), [neighbours.LOOP] * 2, 3)
    assert found == dict(median=pytest.approx(200), worst=pytest.approx(200))
    assert asked == ["1000"] and len(beside) == 2 and not any(process.alive for process in beside)


def test_compiled_says_after_how_many_steps_it_pays():
    """A step of 30 ms that is 10 ms when compiled, which takes half a second, pays after 25."""
    pace = [0.030]
    waits = [0.0]

    def step():
        time.sleep(waits.pop() if waits else 0)
        end = time.process_time() + pace[0]
        while time.process_time() < end:
            pass

    def compile_it():
        pace[0] = 0.010
        waits.extend([0.5])

    found = compiled.compare(step, compile_it, torch.device("cpu"), 3)
    assert found["ratio"] == pytest.approx(3, rel=0.2)
    assert 0.4 < found["compile_s"] < 1.5                   # by the wall clock, which others may delay
    assert found["pays_after"] == pytest.approx(found["compile_s"] / 0.020, rel=0.3)


class Slow(nn.Module):
    """A step of this model takes so much processor time, and its loss is that of one number."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds
        self.x = nn.Parameter(torch.ones(()))

    def forward(self, target):
        end = time.process_time() + self.seconds
        while time.process_time() < end:
            pass
        return (self.x - target) ** 2, {}


def test_arms_have_equal_processor_time_and_a_rate_that_falls():
    arms, rates = {}, {}
    for name, seconds in (("quick", 0.002), ("slow", 0.008)):
        model = Slow(seconds)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step, rates[name] = optimizer.step, []
        optimizer.step = lambda step=step, of=rates[name], group=optimizer.param_groups[0]: (
            of.append(group["lr"]), step())
        arms[name] = equal_time.Arm(model, [optimizer], 0.1)
    equal_time.train_in_turns(arms, lambda: (torch.zeros(()),), 0.4)
    for name, arm in arms.items():
        assert arm.used == pytest.approx(0.4, abs=0.03) and len(rates[name]) == arm.steps
        assert max(rates[name]) > 0.02 > 0.005 > rates[name][-1], "warm-up, then down to nearly 0"
    assert 2 < arms["quick"].steps / arms["slow"].steps < 5
    assert abs(arms["quick"].model.x.item()) < abs(arms["slow"].model.x.item()) < 1


def test_optimizers_train_the_same_generator_in_three_ways(tiny_run, tmp_path):
    folder = tiny_run / "shapes-vae-ar-gmm"                 # other tests leave runs beside it
    out = tmp_path / "x.json"
    optimizers.main([str(folder), "--seeds", "3", "--seconds", "0.3", "--rounds", "1", "--out", str(out)])
    found = json.loads(out.read_text())
    assert list(found["found"]) == list(optimizers.ARMS) and found["commit"]
    for rows in found["found"].values():
        assert rows[0]["seed"] == 3 and rows[0]["steps"] > 0 and math.isfinite(rows[0]["val_loss"])
    assert len(found["muon_ms"]) == 4 and all(ms > 0 for ms in found["muon_ms"].values())
    run = optimizers.runs.load_run(folder, torch.device("cpu"))
    made = {arm: optimizers.build(arm, run, 0) for arm in optimizers.ARMS}
    assert [len(each) for _, each, _ in made.values()] == [1, 2, 2, 2]
    assert [each[1].param_groups[0]["rows"] for _, each, _ in list(made.values())[1:]] == [None, 64, None]
    assert [lr for *_, lr in made.values()] == [run.args.lr] * 3 + [4e-3]
    same = [model for model, *_ in list(made.values())[:3]]
    assert all(torch.equal(p, q) for model in same for p, q in zip(model.parameters(), same[0].parameters()))
    with pytest.raises(data.BadInput, match="a tokenizer"):
        optimizers.main([str(tiny_run / "shapes-vae")])


def test_reuse_of_mars_encoder_is_measured(tmp_path, monkeypatch):
    words = ["--tokenizer", "vae", "--tok_size", "dot", "--tok_steps", "1", "--generator", "mar", "--head",
             "diffusion", "--size", "dot", "--steps", "1", "--image_size", "16", "--runs", str(tmp_path)]
    out = tmp_path / "x.json"
    with small_world():
        train.main(words)
        monkeypatch.setattr(mar_reuse, "cost_at_paper_size", lambda device: "not here")
        mar_reuse.main([str(tmp_path / "shapes-vae-mar-diffusion"), "--paper", "--n", "20", "--out", str(out),
                        "--diffusion_steps", "2"])
        found = json.loads(out.read_text())
        assert [row["encode_every"] for row in found["rows"]] == [1, 2, 4, 8, 16]
        assert all(math.isfinite(row["sample_frechet_small_cnn"]) for row in found["rows"])
        assert found["mar_b"] == "not here" and found["n"] == 20
        with pytest.raises(data.BadInput, match="not a run with --generator mar"):
            mar_reuse.main([str(tmp_path / "shapes-vae")])
