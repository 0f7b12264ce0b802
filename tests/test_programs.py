"""Tests of programs."""
import argparse
import contextlib
import functools
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ar_transformer
import compression
import data
import evaluate
import lfq
import mar
import maskgit
import perceptual_gan
import sample
import titok
import train
import vae
import vq
from tests.helpers import (ENV, IDS, RARELY, TINY, call, command, golden, llamagen, log_of, magvit_shapes,
                           official_mar, official_vae, open_magvit2, titok_golden, vq_golden)


def test_a_run_leaves_its_files_and_samples(tiny_run, tmp_path):
    folder = tiny_run / "shapes-vae-ar-gmm"
    for name in ("ckpt.pt", "log.csv", "curve.png", "samples.png"):
        assert (folder / name).stat().st_size > 0
    assert (tiny_run / "shapes-vae" / "reconstructions.png").exists() and not list(tiny_run.rglob("*.tmp"))
    out = call("sample.py", folder, "--npz", tmp_path / "x.npz", "--gif", tmp_path / "x.gif", "--out", tmp_path / "x.png", "--n", 30)
    assert re.search(r"s per image at batch 30, fp32, cpu", out)
    with np.load(tmp_path / "x.npz") as f:
        assert f["arr_0"].shape == (30, 16, 16, 3) and f["arr_0"].dtype == np.uint8
        assert (np.bincount(f["labels"]) == 3).all()
    assert Image.open(tmp_path / "x.gif").n_frames == 4 and Image.open(tmp_path / "x.png").width > 100
    assert "trained already" in call("train.py", *TINY, "--runs", tiny_run)


@pytest.mark.parametrize("words, name", [
    (["--generator", "maskgit"], "shapes-vae-maskgit-gmm"), (["--adapter", "flow"], "shapes-vae-flow-ar-gmm"),
    (["--joint"], "shapes-vae-joint-ar-gmm"), (["--mix", "channel", "--name", "c"], "c"), (["--mix", "full", "--name", "f"], "f"),
    (["--generator", "maskgit", "--adapter", "flow"], "shapes-vae-flow-maskgit-gmm"),
    (["--generator", "mar", "--head", "diffusion", "--head_width", "32", "--head_depth", "1"], "shapes-vae-mar-diffusion"),
    (["--generator", "mar", "--head", "diffusion", "--objective", "flow", "--head_width", "32", "--name", "mf"], "mf"),
    (["--generator", "mar", "--order", "raster", "--attention", "causal", "--name", "mc"], "mc"),
    (["--head", "diffusion", "--head_width", "32", "--head_depth", "1"], "shapes-vae-ar-diffusion"),
    ([*IDS], "shapes-vq-ar-categorical"), ([*IDS, "--generator", "maskgit"], "shapes-vq-maskgit-categorical"),
    ([*IDS, "--generator", "mar"], "shapes-vq-mar-categorical"),
    (["--perceptual", "1", "--gan", "0.5", "--gan_start", "12", "--adaptive", "--tok_name", "vg", "--name", "vg-ar"], "vg-ar"),
    ([*IDS, "--gan", "0.5", "--gan_loss", "non-saturating", "--tok_name", "qg", "--name", "qg-ar"], "qg-ar"),
    ([*IDS, "--tokenizer", "lfq", "--vocab_size", "64", "--generator", "maskgit"], "shapes-lfq-maskgit-categorical"),
    ([*IDS, "--tokenizer", "titok", "--tokens", "6", "--generator", "maskgit"], "shapes-titok-maskgit-categorical"),
    (["--tokenizer", "titok-vae", "--tokens", "5", "--generator", "mar", "--head", "diffusion", "--head_width", "32"],
     "shapes-titok-vae-mar-diffusion"),
    ([*IDS, "--codebook", "ema", "--vocab_size", "32", "--tok_name", "ve", "--generator", "mar", "--attention", "causal",
      "--flip", "--name", "vc"], "vc")])
def test_every_combination_trains_loads_and_samples(words, name, tiny_run, capsys, monkeypatch):
    monkeypatch.setattr(evaluate.train_classifier, "__defaults__", (0, 12, 32, 4e-3))       # of --perceptual: 12 steps are enough
    train.main([*TINY, *RARELY, "--runs", str(tiny_run), *words])
    assert (tiny_run / name / "samples.png").stat().st_size > 0 and (tiny_run / name / "curve.png").exists()
    run = train.load_run(tiny_run / name)
    images = sample.draw_samples(run, torch.arange(4))
    assert images.shape == (4, 3, 16, 16) and torch.isfinite(images).all()
    assert all(torch.isfinite(torch.tensor(v)) for v in log_of(tiny_run, name).values())
    if name in ("shapes-vae-maskgit-gmm", "shapes-vae-mar-diffusion", "shapes-vq-ar-categorical", "shapes-vq-maskgit-categorical",
                "mc", "f"):
        bf16_draws_nearly_what_fp32_draws(run)


def bf16_draws_nearly_what_fp32_draws(run):
    labels, images = torch.arange(20) % 10, {}
    for run.bf16 in (False, True):
        images[run.bf16] = sample.draw_samples(run, labels, cfg=1.0, temperature=0.0 if run.tokenizer.vocab_size else 1e-3)
    assert torch.isfinite(images[True]).all() and images[True].dtype == torch.float32
    if not run.tokenizer.vocab_size:                        # of ids the likeliest stay
        assert not torch.equal(images[True], images[False]), "--dtype bf16 changes nothing"
    off = (images[True] - images[False]).abs().mean() / images[False].std()
    assert off < 0.2, f"off by {off:.2f} standard deviations of a pixel"


def test_bf16_draws_nearly_what_fp32_draws(tiny_run):
    bf16_draws_nearly_what_fp32_draws(train.load_run(tiny_run / "shapes-vae-ar-gmm"))


def test_titoks_published_stages_follow_each_other(tiny_run, capsys):
    words = [*TINY, *RARELY, *IDS, "--runs", str(tiny_run), "--generator", "none"]
    train.main([*words, "--tok_size", "fine", "--tok_name", "patches"])
    words[words.index("vq")] = "titok"
    train.main([*words, "--tokens", "6", "--stage", "finetune", "--proxy", str(tiny_run / "patches")])
    proxy, first, then = (train.load_run(tiny_run / n).tokenizer for n in ("patches", "shapes-titok-proxy", "shapes-titok-finetune"))
    assert (first.stage, then.stage) == ("proxy", "finetune") and then.proxy.grid == (4, 4)
    a, b, c = (m.state_dict() for m in (proxy, first.proxy, then.proxy))
    same = lambda x, y: {k for k in x if torch.equal(x[k], y[k])}
    assert same(a, b) == set(a)                             # the proxy is only read, then its decoder learns
    assert all(k in same(a, c) for k in a if k.startswith("encoder.")) and any(k not in same(a, c) for k in a if k.startswith("decoder."))
    a, b = first.state_dict(), then.state_dict()
    frozen = {k for k in a if k.startswith(("encoder.", "quantizer."))}
    assert frozen <= same(a, b) and any(k not in same(a, b) for k in a if k.startswith("decoder."))
    nats = log_of(tiny_run, "shapes-titok-proxy", "proxy_nats")
    assert abs(nats[1] - math.log(512)) < 1 and nats[24] < nats[1] and "mse" in (tiny_run / "shapes-titok-finetune/log.csv").read_text()
    train.main([*TINY, *RARELY, *IDS, "--runs", str(tiny_run), "--tokenizer", "titok", "--tokens", "6", "--stage", "finetune", "--proxy",
                str(tiny_run / "patches"), "--generator", "maskgit"])
    run = train.load_run(tiny_run / "shapes-titok-finetune-maskgit-categorical")            # complete in itself
    assert torch.equal(run.tokenizer.decoder.canvas, then.decoder.canvas) and run.tokenizer.seq_len == 6
    with pytest.raises(SystemExit, match="a run of --tokenizer vq is wanted"):
        train.main([*words, "--stage", "proxy", "--proxy", str(tiny_run / "shapes-titok-proxy"), "--tok_name", "other"])
    with pytest.raises(SystemExit, match="grid of \\(4, 4\\) ids, this TiTok 8 x 8"):
        train.main([*words, "--image_size", "32", "--stage", "proxy", "--proxy", str(tiny_run / "patches"), "--tok_name", "other"])


@pytest.mark.parametrize("task", ["segment", "depth"])
def test_maps_of_images_are_trained_drawn_and_measured(task, tiny_run, capsys, monkeypatch):
    train.main([*TINY, *RARELY, "--runs", str(tiny_run), "--task", task])
    folder = tiny_run / f"shapes-vae-{task}-ar-gmm"
    run = train.load_run(folder)
    assert run.source.grid == (2, 2) and run.tokenizer.channels == (11 if task == "segment" else 3)
    images = data.draw(torch.arange(3), 16)[0]
    a, b = (sample.draw_samples(run, sample.image_tokens(run, x)) for x in (images, images.flip(0)))
    assert not torch.equal(a, b), "the map does not depend on the image"
    args = argparse.Namespace(n=30, seed=0, batch_size=30, fid=False, cfg=None, temperature=None)
    rows = {key: value for key, _, value, _, _ in evaluate.measure_maps(args, run, "cpu")}
    if task == "segment":
        assert 0 <= rows["miou"] <= 1 and rows["miou_tokenizer"] > rows["miou_ground"] - 0.05
    else:
        assert rows["rmse"] > 0 and rows["rmse_mean_map"] > 0
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tiny_run / f"shapes-vae-{task}"), "--device", "cpu"])
    with pytest.raises(SystemExit, match="a tokenizer of maps"):
        evaluate.main()
    sample.main([str(folder), "--n", "3", "--beam", "2"])
    assert (folder / "samples.png").stat().st_size > 0


def test_sample_draws_from_the_authors_files(tmp_path, monkeypatch, capsys):
    """--official and --vae: the tiny golden MAR, stretched to the 256 tokens of the tiny golden VAE."""
    _, sd = official_mar()
    for name in ("encoder_pos_embed_learned", "decoder_pos_embed_learned", "diffusion_pos_embed_learned"):
        extra = sd[name].shape[1] - 16
        sd[name] = torch.cat([sd[name][:, :extra], sd[name][:, extra:].repeat(1, 16, 1)], 1)
    torch.save({"model_ema": sd, "model": sd, "args": argparse.Namespace(lr=1)}, tmp_path / "mar_tiny.pth")
    torch.save({"model": official_vae()[0]}, tmp_path / "kl.ckpt")
    monkeypatch.setitem(mar.SIZES, "tiny golden", dict(n_embd=32, n_head=4))
    words = ["--official", str(tmp_path / "mar_tiny.pth"), "--vae", str(tmp_path / "kl.ckpt"), "--label", "7", "--n", "2", "--steps", "3",
             "--diffusion_steps", "3:1", "--out", str(tmp_path / "x.png"), "--npz", str(tmp_path / "x.npz")]
    sample.main(words)
    with np.load(tmp_path / "x.npz") as f:
        drawn, labels = f["arr_0"], f["labels"]
    assert drawn.shape[0] == 2 and drawn.shape[1] % 16 == 0 and drawn.std() > 1 and (labels == 7).all()
    model = mar.MAR.from_official(tmp_path / "mar_tiny.pth")
    torch.manual_seed(0)
    tokens = model.sample(
        torch.tensor([7, 7]), steps=3, **sample.DEFAULTS["mar-diffusion"], diffusion_steps=lambda p: round(3 - 2 * p))
    images = vae.VAE.from_official(official_vae()[0]).decode_raw(tokens / 0.2325).clamp(-1, 1)
    assert np.array_equal(drawn, data.to_uint8(images).permute(0, 2, 3, 1).numpy()), "not the authors' scale of tokens"
    for change, sentence in [({3: str(tmp_path / "no.ckpt")}, "no such file"), ({1: str(tmp_path / "kl.ckpt")}, "not the weights of a MAR"),
                             ({5: "10"}, "--class 10: the classes are")]:
        with pytest.raises(SystemExit, match=sentence):
            sample.main([change.get(i, w) for i, w in enumerate(words)])


def test_sample_draws_from_llamagens_files(tmp_path, monkeypatch, capsys):
    """--official and --vq: the tiny golden GPT (16 ids of 64) on the tiny golden tokenizer, whose grid is 4 x 4 at 8 pixels."""
    _, g, sd = llamagen("generate_c2i")
    tokenizer = vq_golden("vq")[1]
    torch.save({"model": sd, "args": argparse.Namespace(lr=1)}, tmp_path / "c2i.pt")
    torch.save({"model": tokenizer}, tmp_path / "vq.pt")
    monkeypatch.setitem(ar_transformer.SIZES, "tiny golden", dict(n_embd=32, n_head=4))
    label = int(g["in/cls"][1])
    words = ["--official", str(tmp_path / "c2i.pt"), "--vq", str(tmp_path / "vq.pt"), "--image_size", "8", "--label", str(label), "--n", "1",
             "--cfg", "3", "--top_k", "1", "--out", str(tmp_path / "x.png"), "--npz", str(tmp_path / "x.npz")]
    sample.main(words)
    with np.load(tmp_path / "x.npz") as f:
        drawn = f["arr_0"]
    truth = vq.VQ.from_official(tokenizer, 8).decode(g["out/tokens_cfg3.0_int-1"][1:2].long())
    assert np.array_equal(drawn, data.to_uint8(truth).permute(0, 2, 3, 1).numpy()), "not the picture of the authors' tokens"
    for change, sentence in [({3: "no.pt"}, "--vq no.pt: there is no such file"), ({1: str(tmp_path / "vq.pt")}, "--official .*missing"),
                             ({2: "--vae"}, "not an LDM-style autoencoder")]:
        with pytest.raises(SystemExit, match=sentence):
            sample.main([change.get(i, w) for i, w in enumerate(words)])


def test_sample_draws_from_titoks_files(tmp_path, monkeypatch, capsys):
    """--official and --titok: the tiny golden generator, 16 ids of 64, and a tokenizer of as many made fit for it."""
    g, (_, sd, _, _) = golden("tokenizers/imagebert_tiny"), titok_golden("vq_pixels")
    generator = {k.removeprefix("sd."): v for k, v in g.items() if k.startswith("sd.")}
    T, V = 16, 64
    for key in ("latent_tokens", "encoder.latent_token_positional_embedding", "decoder.latent_token_positional_embedding"):
        sd[key] = sd[key].repeat(-(-T // len(sd[key])), 1)[:T]
    table = sd["quantize.embedding.weight"]
    sd["quantize.embedding.weight"] = table.repeat(-(-V // len(table)), 1)[:V]
    torch.save(generator, tmp_path / "generator.bin")
    torch.save(sd, tmp_path / "tokenizer.bin")
    for cls in (maskgit.MaskGIT, titok.TiTok):              # 4 heads; the shapes do not tell
        monkeypatch.setattr(cls, "from_official", functools.partial(cls.from_official, n_head=4))
    words = ["--official", str(tmp_path / "generator.bin"), "--titok", str(tmp_path / "tokenizer.bin"), "--label", "3", "--n", "2",
             "--steps", "4", "--out", str(tmp_path / "x.png"), "--npz", str(tmp_path / "x.npz")]
    sample.main(words)
    with np.load(tmp_path / "x.npz") as f:
        drawn = f["arr_0"]
    model = maskgit.MaskGIT.from_official(generator)
    torch.manual_seed(0)
    tokens = model.sample_titok(torch.tensor([3, 3]), steps=4, cfg=4.5, temperature=9.5)
    truth = titok.TiTok.from_official(sd).decode(tokens)
    assert np.array_equal(drawn, data.to_uint8(truth).permute(0, 2, 3, 1).numpy())
    for extra, sentence in [(["--vq", "x"], "name its tokenizer"), (["--top_k", "3"], "--top_k: not for"),
                            (["--cfg_schedule", "power-cosine"], None)]:
        with pytest.raises(SystemExit, match=sentence) if sentence else contextlib.nullcontext():
            sample.main([*words, *extra])


def test_sample_draws_from_open_magvit2s_files(tmp_path, monkeypatch, capsys):
    """--official and --lfq: the tiny golden GPT (16 ids of 8 bits) and a tokenizer of random weights under the authors' keys."""
    _, g, sd = open_magvit2()
    torch.manual_seed(0)
    tokenizer = {f"{part}.{name}": 0.1 * torch.randn(shape) for part, name, shape in magvit_shapes(32, (1, 1, 2), 1, 8, False)}
    torch.save({"state_dict": {f"transformer.{k}": v for k, v in sd.items()}}, tmp_path / "gpt.ckpt")
    torch.save({"state_dict": tokenizer}, tmp_path / "tokenizer.ckpt")
    monkeypatch.setitem(ar_transformer.SIZES, "tiny golden", dict(n_embd=32, n_head=4))
    sample.main(["--official", str(tmp_path / "gpt.ckpt"), "--lfq", str(tmp_path / "tokenizer.ckpt"), "--image_size", "16", "--n", "1",
                 "--label", str(int(g["cfg_cls"][0])), "--cfg", str(g["cfg_scale"].item()), "--top_k", "1", "--npz",
                 str(tmp_path / "x.npz"), "--out", str(tmp_path / "x.png")])
    with np.load(tmp_path / "x.npz") as f:
        drawn = f["arr_0"]
    truth = lfq.LFQ.from_official(tokenizer, 16).decode((g["greedy_pre"] + 8 * g["greedy_post"])[:1].long())
    assert truth.std() > 0.05 and np.array_equal(drawn, data.to_uint8(truth).permute(0, 2, 3, 1).numpy())


def test_the_rule_that_judges_captions_reads_real_pictures():
    index = torch.arange(data.VAL_INDEX, data.VAL_INDEX + 60)
    images, s = data.draw(index, 32)[0], data.scene(index)
    told = evaluate.read_scene(images)
    assert (told["shape"] == s["label"]).float().mean() >= 0.97 and (told["colour"] == s["colour"]).float().mean() >= 0.97
    assert (told["background"] == s["background"]).all()
    assert (evaluate.read_scene(images.roll(1, 1))["colour"] == s["colour"]).float().mean() < 0.5, "other colours are not noticed"


@pytest.mark.parametrize("words, folder", [(IDS, "shapes-vq-text-ar-categorical"), ([], "shapes-vae-text-ar-gmm")])
def test_captions_are_trained_drawn_and_judged(words, folder, tiny_run, tmp_path, capsys, monkeypatch):
    train.main([*TINY, *RARELY, "--runs", str(tiny_run), "--condition", "text", *words])
    run = train.load_run(tiny_run / folder)
    assert run.args.text_len == max(len(t.encode()) for t in data.captions(torch.arange(200)))
    texts = ["a small red ring in the middle on a black background", "a large blue disc at the top on a dark red background " * 9]
    one, other = (sample.draw_captions(run, [t] * 4) for t in texts)
    assert one.shape == (4, 3, 16, 16) and torch.isfinite(one).all() and not torch.equal(one, other), "the caption has no effect"
    sample.main([str(tiny_run / folder), "--prompt", *texts, "--n", "6", "--out", str(tmp_path / "x.png"), "--npz", str(tmp_path / "x.npz")])
    with np.load(tmp_path / "x.npz") as f:
        assert f["arr_0"].shape == (6, 16, 16, 3) and list(f["texts"]) == [texts[0]] * 3 + [texts[1]] * 3
    unseen, wanted = evaluate.unseen_captions(run, 20)
    assert not set(unseen) & set(data.captions(torch.arange(200)))
    first = data.captions(torch.arange(data.VAL_INDEX, data.VAL_INDEX + 20))
    with monkeypatch.context() as m:                        # what was trained on is not asked for
        m.setattr(train, "captions_of", lambda *a: first)
        assert not set(evaluate.unseen_captions(run, 20)[0]) & set(first)
    for text, k, c in zip(unseen, wanted["shape"], wanted["colour"]):
        assert data.SHAPES[k] in text and list(data.COLOURS)[c] in text
    args = argparse.Namespace(n=20, seed=0, batch_size=20, cfg=None, temperature=None)
    rows = {key: value for key, _, value, _, _ in evaluate.measure_captions(args, run, "cpu")}
    assert all(0 <= v <= 100 for v in rows.values()) and rows["caption_all_three"] <= rows["caption_shape"]
    for words, sentence in [(["--class", "star"], "ask with --prompt"), (["--prompt"], "expected at least one")]:
        with pytest.raises(SystemExit, match=sentence if sentence[0] == "a" else None):
            sample.main([str(tiny_run / folder), *words])
    with pytest.raises(SystemExit, match="knows classes, not captions"):
        sample.main([str(tiny_run / "shapes-vae-ar-gmm"), "--prompt", "a star"])


@pytest.mark.parametrize("words", [[], ["--tokenizer", "vq", "--head", "categorical", "--tok_size", "fine", "--tok_name", "patches"]])
def test_editing_keeps_what_lies_outside_the_mask(words, tiny_run, tmp_path, capsys, monkeypatch):
    train.main([*TINY, *RARELY, *words, "--runs", str(tiny_run), "--generator", "maskgit", "--name", "edit", "--overwrite"])
    picture = tmp_path / "p.png"
    Image.fromarray(data.to_uint8(data.draw(torch.arange(1), 16)[0])[0].permute(1, 2, 0).numpy()).save(picture)
    seen, draw = {}, sample.draw_tokens
    monkeypatch.setattr(sample, "draw_tokens", lambda *a, **k: seen.update(k, drawn=draw(*a, **k)) or seen["drawn"])
    sample.main([str(tiny_run / "edit"), "--image", str(picture), "--mask", "right", "--n", "10", "--npz", str(tmp_path / "x.npz")])
    with np.load(tmp_path / "x.npz") as f:
        assert f["arr_0"].shape == (10, 16, 16, 3)
    T = 16 if words else 4
    side = math.isqrt(T)                                    # of the grid of tokens, 2 x 2 or 4 x 4
    left = (torch.arange(T) % side < side // 2)
    assert (seen["known_mask"] == left).all() and torch.equal(seen["drawn"][:, left], seen["known"][:, left])
    changed = (seen["drawn"] != seen["known"])[:, ~left].flatten(1)
    assert changed.any(1).all() and seen["drawn"][:, ~left].float().std(0).min() > 0
    grid = (4, 4)
    assert sample.parse_mask("right", grid).view(grid)[:, 2:].all() and sample.parse_mask("right", grid).sum() == 8
    assert sample.parse_mask("0,0,0.5,1", grid).view(grid)[:2].all() and sample.parse_mask("0,0,0.5,1", grid).sum() == 8
    assert sample.parse_mask("centre", grid).sum() == 4 and (~sample.parse_mask("border", grid)).sum() == 4
    Image.fromarray(np.kron(np.eye(4), np.ones((8, 8))).astype(np.uint8) * 255).save(tmp_path / "m.png")
    assert torch.equal(sample.parse_mask(str(tmp_path / "m.png"), grid).view(grid), torch.eye(4).bool())
    for words, sentence in [(["--image", picture, "--mask", "0,0,2"], "a box y0,x0,y1,x1"), (["--image", picture], "belong together"),
                            (["--image", tmp_path / "no.png", "--mask", "left"], "no such file"),
                            (["--image", picture, "--mask", "0,0,0.01,0.01"], "covers no token"),
                            (["--steps", "17"], f"only {T} tokens"), (["--beam", "2"], "--beam: not for --generator maskgit")]:
        with pytest.raises(SystemExit, match=sentence):
            sample.main([str(tiny_run / "edit"), *map(str, words)])


def test_compress_and_decompress_from_the_command_line(tiny_run, tmp_path, capsys, monkeypatch):
    words = ["--tokenizer", "lfq", "--head", "categorical", "--vocab_size", "64"]
    train.main([*TINY, *RARELY, *words, "--runs", str(tiny_run)])
    tok, ar = str(tiny_run / "shapes-lfq"), str(tiny_run / "shapes-lfq-ar-categorical")
    clip = data.to_uint8(data.draw_clips(torch.arange(1), 30, 3)[0][0].transpose(0, 1))
    a, b, c = (str(tmp_path / name) for name in ("a.webp", "b.lfq", "c.webp"))
    compression.write_clip(a, clip, 50)
    assert torch.equal(compression.read_clip(a)[0], clip)
    sizes = []
    for coder in ([], ["--entropy_coder", ar]):
        sample.main(["compress", a, b, "--run", tok, *coder])
        assert "3 x 30 x 30 pixels" in capsys.readouterr().out
        sizes.append(Path(b).stat().st_size)
        words = ["decompress", b, c, "--run", ar]           # a run of stage 2 has the tokenizer in it
        call("sample.py", *words) if coder else sample.main(words)                          # once in a process of its own
        back, ms = compression.read_clip(c)
        tokenizer = train.load_run(tok).tokenizer
        assert ms == 50 and torch.equal(back, compression.from_ids(tokenizer, *compression.to_ids(tokenizer, clip)))
    assert sizes[0] == 40 + 3 * 4 * 4 * 6 / 8 > sizes[1]    # the default LFQ has a stride of 8
    Path(tmp_path / "cut.lfq").write_bytes(Path(b).read_bytes()[:-1])
    monkeypatch.setitem(sys.modules, "av", None)
    for words, sentence in ((["decompress", tmp_path / "cut.lfq", c, "--run", tok], "cut.lfq: .*copy it again"),
                            (["decompress", b, c, "--run", tok], "name the run that coded it with --entropy_coder"),
                            (["decompress", b, tmp_path / "c.png", "--run", ar], "3 frames do not fit into a PNG"),
                            (["decompress", b, tmp_path / "c.mp4", "--run", ar], "pip install av"),
                            (["decompress", b, tmp_path / "c.xyz", "--run", ar], "ending must be"),
                            (["decompress", b, tmp_path / "no" / "c.gif", "--run", ar], "could not write"),
                            (["compress", a, b, "--run", tiny_run / "shapes-vae"], "--run .*ids"),
                            (["compress", a, b, "--run", tok, "--entropy_coder", tok], "--entropy_coder .*must be a run of --generator ar"),
                            (["compress", tok, b, "--run", tok], "no such file"),
                            (["compress", Path(tok) / "log.csv", b, "--run", tok], "not a readable image")):
        with pytest.raises(data.BadInput, match=sentence):
            sample.main([str(w) for w in words])


def test_samples_are_a_function_of_the_seed(tiny_run):
    run = train.load_run(tiny_run / "shapes-vae-ar-gmm")
    labels = torch.arange(10)
    a, b, c = (sample.draw_samples(run, labels, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.min() >= -1 and a.max() <= 1


def test_killed_twice_and_resumed_equals_uninterrupted_bit_for_bit(tiny_run, tmp_path):
    for stage, more in (("stage 1", []), ("stage 2", ["--resume"])):
        words = command("train.py", *TINY, "--runs", tmp_path, *more)
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=ENV)
        inside = False
        for line in process.stdout:
            inside = inside or line.startswith(stage)
            if inside and line.startswith("step     12"):
                process.send_signal(signal.SIGKILL)
                break
        process.wait(), process.stdout.close()
        assert inside and process.returncode == -signal.SIGKILL
    call("train.py", *TINY, "--runs", tmp_path, "--resume")
    for name in ("shapes-vae", "shapes-vae-ar-gmm"):
        ours, theirs = train.read_checkpoint(tmp_path / name), train.read_checkpoint(tiny_run / name)
        for part in ("model", "ema"):
            assert all(torch.equal(v, theirs[part][k]) for k, v in ours[part].items()), f"{name}: {part} differs"
        assert log_of(tmp_path, name) == log_of(tiny_run, name)
    runs = [train.load_run(r / "shapes-vae-ar-gmm") for r in (tmp_path, tiny_run)]
    assert torch.equal(*(sample.draw_samples(r, torch.arange(10)) for r in runs))


def test_two_processes_follow_one(tmp_path):
    """Without noise inside the models (beta 0, no label dropping) the losses are equal up to rounding."""
    options = [*TINY, "--beta", "0", "--label_drop", "0", "--save_every", "24", "--eval_every", "24"]
    train.main([*options, "--runs", str(tmp_path / "one")])
    call("train.py", *options, "--runs", tmp_path / "two", torchrun=2)
    for name in ("shapes-vae", "shapes-vae-ar-gmm"):
        one, two = log_of(tmp_path / "one", name), log_of(tmp_path / "two", name)
        assert one.keys() == two.keys() and len(one) > 4
        assert all(abs(one[s] - two[s]) <= 2e-3 * (1 + abs(one[s])) for s in one), (name, one, two)


def test_two_processes_draw_what_one_draws(tiny_run, tmp_path, monkeypatch):
    """Under torchrun 28 images in batches of 8: each process draws two batches, the first alone writes and speaks."""
    options = [str(tiny_run / "shapes-vae-ar-gmm"), "--n", "28", "--batch_size", "8", "--device", "cpu"]
    files = lambda name: ["--npz", str(tmp_path / f"{name}.npz"), "--out", str(tmp_path / f"{name}.png")]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                # as many as torchrun's processes have: equal to the last bit
    try:
        sample.main([*options, *files("one")])
    finally:
        torch.set_num_threads(threads)
    assert call("sample.py", *options, *files("two"), torchrun=2).count("28 samples in") == 1
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert np.array_equal(one["arr_0"], two["arr_0"]) and np.array_equal(one["labels"], two["labels"])
    assert len(np.unique(one["arr_0"].reshape(28, -1), axis=0)) == 28                       # no batch twice
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    run, draw, drawn = train.load_run(options[0]), sample.draw_tokens, []
    monkeypatch.setattr(sample, "draw_tokens", lambda run, cond, *rest, **tricks: drawn.append(len(cond)) or draw(run, cond, *rest, **tricks))
    monkeypatch.setattr(sample.dist, "all_gather_object", lambda parts, mine: parts.__setitem__(slice(None), [mine, {}]))
    run.share = 1, 2
    sample.draw_samples(run, torch.arange(28) % 10, batch_size=8)
    assert drawn == [8, 4], "the second of two processes draws the second and the fourth batch, not those of the other"
    with pytest.raises(data.BadInput, match="without torchrun"):
        evaluate.report(SimpleNamespace(probe=True), (0, 2))


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "ckpt.pt"
    train.save_atomically({"step": 1}, path)
    full = path.with_suffix(f".{os.getpid()}.tmp")
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    full.symlink_to("/dev/full")                            # writing there fails as on a full disk
    with pytest.raises(data.BadInput, match="could not write"):
        train.save_atomically({"step": 2, "x": torch.zeros(100_000)}, path)
    assert torch.load(path, weights_only=True) == {"step": 1} and not full.exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    out = call("train.py", *TINY, "--runs", tmp_path, "--tok_lr", "1e30", "--warmup", "1", "--generator", "none", code=1)
    step = int(re.search(r"step (\d+): the loss is not finite", out).group(1))
    saved = train.read_checkpoint(tmp_path / "shapes-vae")
    assert "Traceback" not in out and saved["step"] <= step
    assert all(torch.isfinite(v).all() for v in saved["model"].values() if v.is_floating_point())


@pytest.mark.parametrize("words, sentence", [
    (["--head", "categorical"], "use --head gmm"),
    (["--data", "nowhere"], "no such file or folder"),
    (["--device", "cuda:77"], "--device cuda:77: not on this machine"),
    (["--device", "toaster"], "--device toaster: not on this machine"),
    (["--resume", "--runs", "nowhere"], "there is no run"),
    (["--resume", "--overwrite"], "give one of them"),
    (["--image_size", "20"], "not a multiple of 8"),
    (["--steps", "0"], "--steps 0: must be at least 1"),
    (["--lr", "-1"], "--lr -1.0: must be above 0"),
    (["--label_drop", "1.5"], "must be below 1"),
    (["--task", "segment", "--generator", "maskgit"], "only --generator ar"),
    (["--task", "segment", "--flip"], "mirrored apart"),
    (["--head", "diffusion", "--generator", "maskgit"], "--head diffusion gives no density"),
    (["--generator", "mar", "--mask_min", "1"], "--mask_min 1.0: a share"),
    (["--generator", "mar", "--attention", "causal", "--n_buffer", "4"], "no encoder and no buffer"),
    (["--joint", "--generator", "maskgit"], "needs --generator ar"),
    (["--mix", "full", "--n_mix", "4"], "--mix full is one Gaussian"),
    (["--size", "gpt-b", "--generator", "maskgit"], "--generator maskgit has nano, tiny"),
])
def test_train_refuses_in_one_sentence(words, sentence, tmp_path, capsys):
    base = ["--tokenizer", "vae", "--head", "gmm", "--runs", str(tmp_path), "--n_shapes", "50"]
    with pytest.raises(SystemExit) as caught:
        train.main(base + words)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("ckpt.pt"))


def test_refusals_end_with_an_exit_code_and_no_traceback(tiny_run, tmp_path, capsys):
    folder = str(tiny_run / "shapes-vae-ar-gmm")
    for words, sentence in [(["train.py", *TINY, "--runs", tiny_run, "--beta", "0.5"], "--beta 0.5 does not fit .* --beta 0.02"),
                            (["sample.py", folder, "--class", "heart"], "the classes are disc"),
                            (["evaluate.py", folder, "--n", 3], "--n 3")]:
        out = call(*words, code=1)
        assert re.search(sentence, out) and "Traceback" not in out, out
    for program, words, sentence in [(sample, [tmp_path], "no ckpt.pt"), (train, ["--tokenizer", "vae", "--no_flag"], "unrecognized arguments"),
                                     (sample, [tiny_run / "shapes-vae"], "a tokenizer alone cannot draw")]:
        with pytest.raises(SystemExit) as caught:           # the interpreter prints its text and exits with 1
            program.main([str(w) for w in words])
        assert caught.value.code not in (0, None) and re.search(sentence, f"{caught.value} {capsys.readouterr().err}")


@pytest.mark.parametrize("words, sentence", [
    (["--tokenizer", "vae", "--head", "categorical"], "gives real vectors: use --head gmm"),
    (["--tokenizer", "vq", "--head", "gmm"], "gives ids: use --head categorical"),
    (["--tokenizer", "vq", "--adapter", "flow"], "--adapter: needs --tokenizer vae"),
    (["--tokenizer", "lfq", "--vocab_size", "1000"], "power of 2"), (["--tokenizer", "lfq", "--token_dim", "8"], "10 bits for 1024"),
    (["--tokenizer", "vae", "--vocab_size", "64"], "--vocab_size: is for"), (["--tokenizer", "vq", "--tokens", "8"], "--tokens: is for"),
    (["--tokenizer", "vq", "--stage", "proxy"], "--stage proxy: is for --tokenizer titok"), (["--tokenizer", "titok", "--proxy", "x"],
                                                                                            "goes with --stage"),
    (["--tokenizer", "titok", "--stage", "finetune"], "--proxy RUN"),
    (["--tokenizer", "vq", "--tok_size", "kl16"], "--tok_size kl16: --tokenizer vq has"),
    (["--tokenizer", "vq", "--condition", "text", "--generator", "mar"], "only --generator ar reads captions"),
    (["--tokenizer", "vq", "--condition", "text", "--flip"], "may say left or right"), (["--tokenizer", "vq", "--text_len", "9"], "goes with"),
    (["--tokenizer", "vae", "--gan_start", "5"], "go with --gan"), (["--tokenizer", "vae", "--lpips", "vgg.pth"], "gives it a weight"),
    (["--tokenizer", "vae", "--gan", "1", "--likelihood", "logistic"], "losses mean something else"),
    (["--tokenizer", "vae", "--gan", "-1"], "--gan -1.0: must not be negative")])
def test_what_cannot_work_together_is_refused(words, sentence, tmp_path):
    with pytest.raises(SystemExit, match=sentence):
        train.main([*words, "--runs", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_captions_and_their_encoder_are_asked_for_in_a_sentence(tiny_run, tmp_path, monkeypatch):
    pictures = tmp_path / "pictures"
    for split in ("train", "val"):
        (pictures / split / "a").mkdir(parents=True)
        words = [*TINY, "--runs", str(tmp_path), "--data", str(pictures), "--condition", "text"]
        if split == "val":
            with pytest.raises(SystemExit, match="no images in val/, which is for validation"):
                train.main(words)
        for i in range(4):
            Image.fromarray(np.full((16, 16, 3), 60 * i, np.uint8)).save(pictures / split / "a" / f"{i}.png")
    with pytest.raises(SystemExit, match="write NAME.txt beside NAME.jpg"):
        train.main(words)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="pip install transformers"):
        train.main([*TINY, *RARELY, "--runs", str(tiny_run), "--condition", "text", "--text_encoder", "t5-small", "--name", "t5"])


@pytest.mark.parametrize("name", ["vae", "vq", "lfq", "titok", "titok-vae"])
def test_the_adversarial_losses_go_around_every_tokenizer(name):
    args = argparse.Namespace(**train.DEFAULTS["any"] | train.DEFAULTS["cpu"] | train.DEFAULTS.get(f"any-{name}", {}), token_dim=None)
    args.tokenizer = name
    tokenizer = train.build_tokenizer(args)
    model = perceptual_gan.AdversarialTokenizer(tokenizer, perceptual_gan.PatchCritic.for_images(32), start=0, adaptive=True)
    images = data.draw(torch.arange(4))[0]
    loss, logs = model(images)
    loss.backward()
    assert torch.isfinite(loss) and 0 < logs["adaptive"] < 1e4
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.discriminator.parameters())
    assert tokenizer.get_parameter(model.last_layer).grad.abs().sum() > 0
    assert model.decode(model.encode(images)).shape == images.shape


def test_an_unfinished_run_is_not_overwritten_by_accident(tiny_run, tmp_path):
    folder = tmp_path / "shapes-vae"
    folder.mkdir()
    state = train.read_checkpoint(tiny_run / "shapes-vae")
    torch.save(state | {"done": False, "step": 12}, folder / "ckpt.pt")
    with pytest.raises(SystemExit, match="--resume.*--overwrite"):
        train.main([*TINY, "--runs", str(tmp_path)])
    assert train.read_checkpoint(folder)["step"] == 12
    (folder / "ckpt.pt").write_bytes(b"half a file")
    with pytest.raises(SystemExit, match="not a readable checkpoint"):
        train.main([*TINY, "--runs", str(tmp_path)])


def test_the_token_cache_is_remade_when_the_tokenizer_changes(tmp_path):
    images = data.load(n_shapes=60)
    tokenizer = vae.VAE().eval()
    first = train.token_cache(tokenizer, images, tmp_path, "train", True)
    stamp = (tmp_path / "tokens-train.pt").stat().st_mtime_ns
    train.token_cache(tokenizer, images, tmp_path, "train", True)
    assert (tmp_path / "tokens-train.pt").stat().st_mtime_ns == stamp, "an unchanged tokenizer reads the cache"
    with torch.no_grad():
        tokenizer.quant_conv.bias += 1
    second = train.token_cache(tokenizer, images, tmp_path, "train", True)
    assert torch.allclose(second.arrays["mean"], first.arrays["mean"] + 1, atol=1e-4)
    images.flip = True
    flipped = train.token_cache(tokenizer, images, tmp_path, "train", True)
    mean = tokenizer.posterior(images.images.float().flip(-1) / 127.5 - 1)[0]
    assert len(flipped.arrays["mean"]) == 120 and torch.allclose(flipped.arrays["mean"][60:], mean, atol=1e-4)
    assert flipped.batch(torch.arange(60))[0].shape == (60, 16, 8)
    a, b = (first.batch(torch.arange(4))[0] for _ in range(2))
    assert not torch.equal(a, b), "every batch draws fresh tokens from the posterior"


def test_learning_rate_rises_then_falls_to_zero():
    rates = [train.learning_rate(s, 100, 10, 2.0) for s in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(max(rates), rel=0.05) and rates[-1] < 1e-2
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
