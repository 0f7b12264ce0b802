"""Tests of sample.py: what it draws, writes and refuses, and that it draws from the authors' files."""
import argparse
import contextlib
import csv
import functools
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ar_transformer
import data
import mar
import official.llamagen
import official.mar
import official.open_magvit2
import official.rar
import official.titok
import sample
from common import drawing, pictures, runs
from tests.helpers import (call, golden, llamagen, magvit_shapes, official_mar, official_vae, open_magvit2,
                           titok_golden, vq_golden)
from tests.test_drawing import untrained_run


@pytest.fixture
def drawn_by(monkeypatch, tmp_path):
    """A function (kind, words): sample.py with words draws from an untrained run in tmp_path / "run"."""
    def draw(kind, *words, **options):
        (tmp_path / "run").mkdir(exist_ok=True)
        run = untrained_run(tmp_path / "run", kind, **options)
        monkeypatch.setattr(runs, "load_run", lambda folder, device="cpu": run)
        sample.main([str(run.folder), "--device", "cpu", *map(str, words)])
        return run
    return draw


def as_arrays(images):
    """images (N, 3, H, W) -> what an .npz holds of them."""
    return pictures.to_uint8(images).permute(0, 2, 3, 1).numpy()


def files_in(folder):
    return ["--out", str(folder / "x.png"), "--npz", str(folder / "x.npz")]


# ---- What is written

def test_grid_batch_and_animation_of_a_trained_run(tiny_run, tmp_path, capsys):
    files = ["--gif", str(tmp_path / "x.gif"), *files_in(tmp_path)]
    sample.main([str(tiny_run / "shapes-vae-ar-gmm"), *files, "--n", "30", "--device", "cpu"])
    assert re.search(r"s per image at batch 30, fp32, cpu", capsys.readouterr().out)
    with np.load(tmp_path / "x.npz") as f:
        assert f["arr_0"].shape == (30, 16, 16, 3) and f["arr_0"].dtype == np.uint8
        assert (np.bincount(f["labels"]) == 3).all()
    assert Image.open(tmp_path / "x.gif").n_frames == 4 and Image.open(tmp_path / "x.png").width > 100


def test_pictures_are_numbered_and_nothing_is_overwritten(drawn_by, tmp_path, capsys):
    run = drawn_by("vectors", "--n", 4)
    (run.folder / "samples.png").write_bytes(b"of train.py")
    first = (run.folder / "samples-1.png").read_bytes()
    drawn_by("vectors", "--n", 4, "--seed", 1, "--gif")
    (run.folder / "samples-9.png").write_bytes(b"")
    (run.folder / "samples-last.png").write_bytes(b"")
    drawn_by("vectors", "--n", 4)
    names = "-1.png -10.png -2.gif -2.png -9.png -last.png .png".split()
    assert sorted(p.name for p in run.folder.glob("samples*")) == [f"samples{name}" for name in names]
    assert (run.folder / "samples-1.png").read_bytes() == first
    assert (run.folder / "samples.png").read_bytes() == b"of train.py"
    written = f"wrote {run.folder / 'samples-2.png'}, {run.folder / 'samples-2.gif'}\n"
    assert written in capsys.readouterr().out


def test_endings_are_added_and_said(drawn_by, tmp_path, capsys):
    files = ["--out", tmp_path / "v1.5", "--npz", tmp_path / "n", "--gif", tmp_path / "g.webp"]
    drawn_by("vectors", "--n", 2, *files)
    names = [tmp_path / name for name in ("v1.5.png", "n.npz", "g.webp.gif")]
    assert all(path.exists() for path in names)
    assert "wrote " + ", ".join(map(str, names)) in capsys.readouterr().out
    drawn_by("vectors", "--n", 2, "--out", tmp_path / "x.JPG")
    assert (tmp_path / "x.JPG").exists()


def test_single_files_hold_the_samples_of_the_npz(drawn_by, tmp_path, capsys):
    files = ["--png", tmp_path / "deep" / "er", "--npz", tmp_path / "x.npz", "--out", tmp_path / "x.png"]
    drawn_by("ids", "--n", 3, *files)
    assert f"{tmp_path / 'deep' / 'er'}, {tmp_path / 'deep' / 'er.csv'}\n" in capsys.readouterr().out
    files = sorted((tmp_path / "deep" / "er").iterdir())
    assert [f.name for f in files] == ["000000.png", "000001.png", "000002.png"]
    asked = [f"{i:06d},{data.SHAPES[10 * i // 3]}" for i in range(3)]
    assert (tmp_path / "deep" / "er.csv").read_text().split() == ["number,asked", *asked]
    with np.load(tmp_path / "x.npz") as f:
        for file, x in zip(files, f["arr_0"], strict=True):
            assert np.array_equal(np.array(Image.open(file)), x)
    with pytest.raises(data.BadInput, match="--png .*must be a new or an empty folder"):
        drawn_by("ids", "--n", 3, "--png", tmp_path / "deep")
    clips = torch.linspace(-1, 1, 2 * 3 * 5 * 4 * 4).view(2, 3, 5, 4, 4)
    sample.save_pngs(tmp_path / "clips", clips, ["up", "down, \"then\" up"])
    with open(tmp_path / "clips.csv", newline="") as f:
        rows = list(csv.reader(f))
    assert rows == [["number", "asked"], ["000000", "up"], ["000001", "down, \"then\" up"]]
    names = [f"{i:06d}-{t:02d}.png" for i in range(2) for t in range(5)]
    assert sorted(f.name for f in (tmp_path / "clips").iterdir()) == names
    assert Image.open(tmp_path / "clips" / names[0]).getpixel((0, 0))[0] == 0


def test_the_reference_holds_the_validation_images(tiny_run, tmp_path):
    run = tiny_run / "shapes-vae-ar-gmm"
    sample.main([str(run), "--device", "cpu", "--n", "2", "--out", str(tmp_path / "x.png"), "--reference",
                 str(tmp_path / "real")])
    images, labels, _, _ = data.draw(torch.arange(200) + data.VAL_INDEX, 16)
    with np.load(tmp_path / "real.npz") as f:
        assert np.array_equal(f["arr_0"], as_arrays(images)) and np.array_equal(f["labels"], labels.numpy())


def test_captions_asked_for_are_drawn_and_named(drawn_by, tmp_path):
    texts = ["a small red ring", "a large blue disc " * 9]
    files = ["--out", tmp_path / "x.png", "--npz", tmp_path / "x.npz"]
    run = drawn_by("ids", "--prompt", *texts, "--n", 6, *files, text=True)
    with np.load(tmp_path / "x.npz") as f:
        assert list(f["texts"]) == [texts[0]] * 3 + [texts[1]] * 3
        images = drawing.draw_captions(run, list(f["texts"]))
        assert np.array_equal(f["arr_0"], as_arrays(images))


def test_an_image_is_edited_from_the_command_line(drawn_by, tmp_path):
    Image.new("RGB", (20, 12), (200, 30, 30)).save(tmp_path / "p.png")
    words = ["--image", tmp_path / "p.png", "--mask", "right", "--n", 10]
    run = drawn_by("vectors", *words, "--npz", tmp_path / "x.npz", "--seed", 3)
    with np.load(tmp_path / "x.npz") as f:
        images = drawing.edit(run, tmp_path / "p.png", "right", torch.arange(10), seed=3)[1]
        assert np.array_equal(f["arr_0"], as_arrays(images))
    assert (run.folder / "samples-1.png").stat().st_size > 0


def test_two_processes_draw_what_one_draws(tiny_run, tmp_path):
    """Under torchrun 28 images in batches of 8: each process draws two batches, rank 0 writes and speaks."""
    options = [str(tiny_run / "shapes-vae-ar-gmm"), "--n", "28", "--batch_size", "8", "--device", "cpu"]
    files = lambda name: ["--npz", str(tmp_path / f"{name}.npz"), "--out", str(tmp_path / f"{name}.png")]
    sample.main([*options, *files("one")])
    assert call("sample.py", *options, *files("two"), torchrun=2).count("28 samples in") == 1
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert np.array_equal(one["arr_0"], two["arr_0"]) and np.array_equal(one["labels"], two["labels"])
    assert len(np.unique(one["arr_0"].reshape(28, -1), axis=0)) == 28                       # no batch twice
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


# ---- What is refused

@pytest.mark.parametrize("words, sentence", [
    (["--n", "0"], "--n 0: must be at least 1"), (["--batch_size", "-1"], "--batch_size -1: must be at"),
    (["--steps", "0"], "--steps 0: must be at least 1"), (["--steps", "5"], "there are only 4 tokens"),
    (["--cfg", "nan"], "--cfg nan: must be a finite number"), (["--cfg", "inf"], "--cfg inf: must be"),
    (["--temperature", "inf"], "--temperature inf: must be a finite"),
    (["--temperature", "-1"], "--temperature -1.0: must not be negative"),
    (["--choice_temperature", "nan"], "--choice_temperature nan: must be a finite"),
    (["--choice_temperature", "-2"], "--choice_temperature -2.0: must not be negative"),
    (["--top_p", "0"], "--top_p 0.0: must be above 0"), (["--clip", "nan"], "--clip nan: must be above 0"),
    (["--top_k", "-1"], "--top_k -1: must be at least 1, or 0"),
    (["--seed", "4503599627"], "--seed 4503599627: must be at most 4503599626"),
    (["--top_k", "3"], "--top_k: not for --generator maskgit --head gmm"),
    (["--beam", "2"], "--beam: not for --generator maskgit"),
    (["--diffusion_steps", "5"], "--diffusion_steps: not for"),
    (["--known_scales", "2", "--image", "x.png"], "--known_scales: goes with"),
    (["--image", "x.png"], "belong together"), (["--mask", "left"], "belong together"),
    (["--image", "no.png", "--mask", "left"], "no such file"), (["--known_frames", "5"], "draws images"),
    (["--prompt", "a star"], "knows classes, not captions"), (["--class", "heart"], "the classes are disc"),
    (["--out", "no/x.png"], "--out no/x.png: could not write, for there is no folder no"),
    (["--npz", "no/x"], "--npz no/x.npz: could not write"), (["--vae", "x"], "go with --official"),
    (["--official", "x"], "one of them")])
def test_sample_refuses_in_one_sentence(words, sentence, drawn_by, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.BadInput, match=sentence) as caught:
        drawn_by("vectors", *words)
    assert "\n" not in str(caught.value) and not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("words, sentence", [
    (["--class", "star"], "ask with --prompt"), (["--gif"], "ask with --prompt"),
    (["--image", "x", "--mask", "left"], "ask with --prompt"),
    (["--steps", "3"], "one token per step, 16 in all"), (["--beam", "2", "--cfg", "2"], "leave out --image"),
    (["--beam", "9"], "--beam 9: --fan must be at least as many"),
    (["--beam", "3", "--fan", "2"], "--beam 3: --fan must be")])
def test_captions_are_refused_what_classes_take(words, sentence, drawn_by):
    with pytest.raises(data.BadInput, match=sentence):
        drawn_by("ids", *words, text=True)


def test_steps_of_a_diffusion_head_are_a_number_or_go_from_one_to_another(tmp_path):
    run = untrained_run(tmp_path, "vectors")
    for text in ("0", "5:", "x", "50:5:2", "50:0", "-3"):
        with pytest.raises(data.BadInput, match="a number of steps such as 50, or 50:5"):
            sample.parse_steps(text, run)
    with pytest.raises(data.BadInput, match="only --generator mar"):
        sample.parse_steps("50:5", run)
    run.args.generator = "mar"
    steps = sample.parse_steps("50:5", run)
    assert [steps(p) for p in (0, 0.5, 1)] == [50, 28, 5] and sample.parse_steps("7", run) == 7


def test_what_sample_cannot_draw_is_refused_in_a_sentence(tiny_run, tmp_path):
    with pytest.raises(data.BadInput, match="the classes are disc"):
        sample.main([str(tiny_run / "shapes-vae-ar-gmm"), "--class", "heart"])
    tokenizer = tiny_run / "shapes-vae"
    for folder, sentence in [(tmp_path, "no ckpt.pt"), (tokenizer, "a tokenizer alone cannot draw")]:
        with pytest.raises(data.BadInput, match=sentence):
            sample.main([str(folder)])


@pytest.mark.parametrize("words, title", [
    (["--mask", "right"], "run: x.png, repainted right"),
    (["--known_scales", "3"], "run: x.png, repainted all but 3 coarse scales")])
def test_the_title_of_an_edit_says_what_stays(words, title, tmp_path, monkeypatch):
    run = SimpleNamespace(folder=tmp_path / "run", classes=["a", "b"], device=torch.device("cpu"))
    args = sample.parse_args(["run", "--image", "x.png", "--n", "2", *words])
    shown = []
    images = torch.zeros(2, 3, 4, 4)
    monkeypatch.setattr(drawing, "edit", lambda *rest, **options: (images, images))
    monkeypatch.setattr(pictures, "save_rows", lambda path, rows, title: shown.append(title))
    sample.draw_classes(run, args, tmp_path / "x.png", None, {})
    assert shown == [title]


# ---- The authors' files

def test_sample_draws_from_the_authors_files(tmp_path, monkeypatch, capsys):
    """--official and --vae: the tiny golden MAR, stretched to the 256 tokens of the tiny golden VAE."""
    _, sd = official_mar()
    for name in ("encoder_pos_embed_learned", "decoder_pos_embed_learned", "diffusion_pos_embed_learned"):
        extra = sd[name].shape[1] - 16
        sd[name] = torch.cat([sd[name][:, :extra], sd[name][:, extra:].repeat(1, 16, 1)], 1)
    torch.save({"model_ema": sd, "model": sd, "args": argparse.Namespace(lr=1)}, tmp_path / "mar_tiny.pth")
    torch.save({"model": official_vae()[0]}, tmp_path / "kl.ckpt")
    monkeypatch.setitem(mar.SIZES, "tiny golden", dict(n_embd=32, n_head=4))
    words = ["--official", str(tmp_path / "mar_tiny.pth"), "--vae", str(tmp_path / "kl.ckpt"), "--label", "7",
             "--n", "2", "--steps", "3", "--diffusion_steps", "3:1", *files_in(tmp_path)]
    sample.main(words)
    with np.load(tmp_path / "x.npz") as f:
        drawn, labels = f["arr_0"], f["labels"]
    assert drawn.shape[0] == 2 and drawn.shape[1] % 16 == 0 and drawn.std() > 1 and (labels == 7).all()
    model = official.mar.load_mar(tmp_path / "mar_tiny.pth")
    torch.manual_seed(0)
    default = drawing.DEFAULTS["mar-diffusion"]
    steps = dict(steps=3, diffusion_steps=lambda p: round(3 - 2 * p))
    tokens = model.sample(torch.tensor([7, 7]), **steps, **default)
    images = official.mar.load_vae(official_vae()[0]).decode_raw(tokens / 0.2325).clamp(-1, 1)
    assert np.array_equal(drawn, as_arrays(images)), "not the authors' scale of tokens"
    for change, sentence in [({3: str(tmp_path / "no.ckpt")}, "no such file"),
                             ({1: str(tmp_path / "kl.ckpt")}, "not the weights of a MAR"),
                             ({5: "10"}, "--class 10: the classes are")]:
        with pytest.raises(SystemExit, match=sentence):
            sample.main([change.get(i, w) for i, w in enumerate(words)])


def test_sample_draws_from_llamagens_files(tmp_path, monkeypatch, capsys):
    """--official and --vq: the tiny golden GPT (16 ids of 64) on the tiny golden tokenizer of 4 x 4."""
    _, g, sd = llamagen("generate_c2i")
    tokenizer = vq_golden("vq")[1]
    torch.save({"model": sd, "args": argparse.Namespace(lr=1)}, tmp_path / "c2i.pt")
    torch.save({"model": tokenizer}, tmp_path / "vq.pt")
    monkeypatch.setitem(ar_transformer.SIZES, "tiny golden", dict(n_embd=32, n_head=4))
    label = int(g["in/cls"][1])
    words = ["--official", str(tmp_path / "c2i.pt"), "--vq", str(tmp_path / "vq.pt"), "--image_size", "8",
             "--label", str(label), "--n", "1", "--cfg", "3", "--top_k", "1", *files_in(tmp_path)]
    sample.main(words)
    with np.load(tmp_path / "x.npz") as f:
        drawn = f["arr_0"]
    tokens = g["out/tokens_cfg3.0_int-1"][1:2].long()
    truth = official.llamagen.load_vq(tokenizer, image_size=8).decode(tokens)
    assert np.array_equal(drawn, as_arrays(truth)), "not the picture of the authors' tokens"
    for change, sentence in [({3: "no.pt"}, "--vq no.pt: there is no such file"),
                             ({1: str(tmp_path / "vq.pt")}, "--official .*missing"),
                             ({2: "--vae"}, "not an LDM-style autoencoder")]:
        with pytest.raises(SystemExit, match=sentence):
            sample.main([change.get(i, w) for i, w in enumerate(words)])


def test_sample_draws_from_titoks_files(tmp_path, monkeypatch, capsys):
    """--official and --titok: the tiny golden generator, 16 ids of 64, and a tokenizer made fit for it."""
    g, (_, sd, _, _) = golden("tokenizers/imagebert_tiny"), titok_golden("vq_pixels")
    generator = {k.removeprefix("sd."): v for k, v in g.items() if k.startswith("sd.")}
    T, V = 16, 64
    position = "latent_token_positional_embedding"
    for key in ("latent_tokens", f"encoder.{position}", f"decoder.{position}"):
        sd[key] = sd[key].repeat(-(-T // len(sd[key])), 1)[:T]
    table = sd["quantize.embedding.weight"]
    sd["quantize.embedding.weight"] = table.repeat(-(-V // len(table)), 1)[:V]
    torch.save(generator, tmp_path / "generator.bin")
    torch.save(sd, tmp_path / "tokenizer.bin")
    loaders = [functools.partial(load, n_head=4)            # the shapes do not tell
               for load in (official.titok.load_tokenizer, official.titok.load_generator)]
    monkeypatch.setitem(sample.RELEASES, "titok", (*loaders, "titok"))
    words = ["--official", str(tmp_path / "generator.bin"), "--titok", str(tmp_path / "tokenizer.bin"),
             "--label", "3", "--n", "2", "--steps", "4", *files_in(tmp_path)]
    sample.main(words)
    with np.load(tmp_path / "x.npz") as f:
        drawn = f["arr_0"]
    model = loaders[1](generator)
    torch.manual_seed(0)
    tokens = model.sample(torch.tensor([3, 3]), steps=4, cfg=4.5, temperature=9.5)
    truth = loaders[0](sd).decode(tokens)
    assert np.array_equal(drawn, as_arrays(truth))
    for extra, sentence in [(["--vq", "x"], "name its tokenizer"), (["--top_k", "3"], "--top_k: not for"),
                            (["--cfg_schedule", "power-cosine"], None)]:
        with pytest.raises(SystemExit, match=sentence) if sentence else contextlib.nullcontext():
            sample.main([*words, *extra])


def test_sample_draws_from_rars_files(tmp_path, monkeypatch):
    """--official and --vqgan: the tiny golden RAR, 16 ids of 32, and a random tokenizer of 4 x 4."""
    g = golden("beyond/rar_tiny")
    sd = {name.removeprefix("w/"): v for name, v in g.items() if name.startswith("w/")}
    vqgan = official.titok.MaskGITVQGAN((4, 4), 32, 8, 32, (1, 1), 1)
    monkeypatch.setitem(sample.RELEASES, "vqgan", (lambda path: vqgan, official.rar.load_generator, "rar"))
    for name, weights in (("rar.bin", sd), ("vqgan.bin", {})):
        torch.save(weights, tmp_path / name)
    words = ["--official", str(tmp_path / "rar.bin"), "--vqgan", str(tmp_path / "vqgan.bin"), "--label", "1",
             "--n", "2", "--image_size", "8", *files_in(tmp_path)]
    sample.main(words)
    with np.load(tmp_path / "x.npz") as f:
        drawn = f["arr_0"]
    model = official.rar.load_generator(sd, seq_len=16)
    torch.manual_seed(0)
    ids = model.sample(torch.tensor([1, 1]), cfg=16.0)
    assert np.array_equal(drawn, as_arrays(vqgan.decode(ids)))


def test_sample_draws_from_open_magvit2s_files(tmp_path, monkeypatch, capsys):
    """--official and --lfq: the tiny golden GPT (16 ids of 8 bits), a random tokenizer of their keys."""
    _, g, sd = open_magvit2()
    torch.manual_seed(0)
    shapes = magvit_shapes(32, (1, 1, 2), 1, 8, False)
    tokenizer = {f"{part}.{name}": 0.1 * torch.randn(shape) for part, name, shape in shapes}
    torch.save({"state_dict": {f"transformer.{k}": v for k, v in sd.items()}}, tmp_path / "gpt.ckpt")
    torch.save({"state_dict": tokenizer}, tmp_path / "tokenizer.ckpt")
    monkeypatch.setitem(ar_transformer.SIZES, "tiny golden", dict(n_embd=32, n_head=4))
    words = ["--image_size", "16", "--n", "1", "--label", str(int(g["cfg_cls"][0])), "--cfg",
             str(g["cfg_scale"].item()), "--top_k", "1"]
    weights = ["--official", str(tmp_path / "gpt.ckpt"), "--lfq", str(tmp_path / "tokenizer.ckpt")]
    sample.main([*weights, *words, *files_in(tmp_path)])
    with np.load(tmp_path / "x.npz") as f:
        drawn = f["arr_0"]
    ids = (g["greedy_pre"] + 8 * g["greedy_post"])[:1].long()
    truth = official.open_magvit2.load_tokenizer(tokenizer, image_size=16).decode(ids)
    assert truth.std() > 0.05 and np.array_equal(drawn, as_arrays(truth))
