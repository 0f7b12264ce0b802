"""Tests of common/drawing.py: tokens, images and pictures of a run, edited images, shared work."""
import argparse
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ar_transformer
import data
import gmm_head
import maskgit
import train
import vae
import var
import vq
from common import drawing, pictures, runs
from tests.helpers import RARELY, TINY


@pytest.fixture
def run(tiny_run):
    return runs.load_run(tiny_run / "shapes-vae-ar-gmm")


class Fixed(torch.nn.Module):
    """A generator that draws the class number in every token, or `value`."""

    def __init__(self, value=None, num_classes=300):
        super().__init__()
        self.value = value
        self.num_classes = num_classes

    def sample(self, cond, cfg=1.0, temperature=1.0, on_step=None, **tricks):
        tokens = cond.float()[:, None, None].repeat(1, 4, 2)
        if self.value is not None:
            tokens[1, 2, 0] = self.value
        return tokens


class Plain(torch.nn.Module):
    """A tokenizer whose images are 8 x 8 pixels of one grey."""

    def decode(self, tokens):
        return (tokens[:, 0, 0] / 300)[:, None, None, None].expand(-1, 3, 8, 8)


def fixed_run(folder, value=None):
    args = argparse.Namespace(condition="class", frames=1, generator="ar", head="gmm", image_size=8, seed=0)
    classes = [f"class {k}" for k in range(300)]
    return SimpleNamespace(folder=folder, args=args, tokenizer=Plain(), generator=Fixed(value),
                           classes=classes, device=torch.device("cpu"))


def untrained_run(folder, kind, text=False):
    """Random weights: 2 x 2 vectors or 4 x 4 ids of 16 pixels, by MaskGIT or, of captions, ARTransformer."""
    torch.manual_seed(0)
    if kind == "ids":
        tokenizer = vq.VQ(**vq.SIZES["fine"] | dict(image_size=16))
        head = maskgit.CategoricalHead(64, tokenizer.vocab_size)
    else:
        tokenizer = vae.VAE(**vae.SIZES["small"] | dict(image_size=16))
        head = gmm_head.GMMHead(64, tokenizer.token_dim)
    for p in head.parameters():                             # a head starts where its input has no effect
        torch.nn.init.normal_(p, std=0.1)
    sizes = dict(n_layer=1, n_head=2, n_embd=64)
    given = (head, tokenizer.seq_len, 10, tokenizer.token_dim, tokenizer.vocab_size, tokenizer.grid)
    if text:
        generator = ar_transformer.ARTransformer(*given, **sizes, text=(60, "bytes"))
    else:
        generator = maskgit.MaskGIT(*given, **sizes)
    args = argparse.Namespace(condition="text" if text else "class", frames=1, image_size=16, seed=0,
                              generator="ar" if text else "maskgit", text_encoder="bytes", text_len=60,
                              head="categorical" if kind == "ids" else "gmm")
    return SimpleNamespace(folder=folder, args=args, tokenizer=tokenizer.eval(), generator=generator.eval(),
                           classes=list(data.SHAPES), device=torch.device("cpu"))


def test_samples_are_a_function_of_the_seed(run):
    labels = torch.arange(10)
    a, b, c = (drawing.draw_samples(run, labels, seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.min() >= -1 and a.max() <= 1


def test_drawing_leaves_the_state_of_random_numbers_alone(run):
    torch.manual_seed(7)
    drawing.draw_samples(run, torch.arange(3), seed=1)
    after = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(3))


def bf16_draws_nearly_what_fp32_draws(run):
    labels, images = torch.arange(20) % 10, {}
    for run.bf16 in (False, True):
        temperature = 0.0 if run.tokenizer.vocab_size else 1e-3
        images[run.bf16] = drawing.draw_samples(run, labels, cfg=1.0, temperature=temperature)
    assert torch.isfinite(images[True]).all() and images[True].dtype == torch.float32
    if not run.tokenizer.vocab_size:                        # of ids the likeliest stay
        assert not torch.equal(images[True], images[False]), "--dtype bf16 changes nothing"
    off = (images[True] - images[False]).abs().mean() / images[False].std()
    assert off < 0.2, f"off by {off:.2f} standard deviations of a pixel"


def test_bf16_draws_nearly_what_fp32_draws(run):
    bf16_draws_nearly_what_fp32_draws(run)


def test_defaults_are_those_of_what_is_drawn():
    args = argparse.Namespace(condition="class", frames=1, generator="maskgit", head="categorical")
    run = SimpleNamespace(args=args, classes=["cat", "dog"])
    assert drawing.kind_of(run) == "classes" and drawing.default_of(run)["cfg"] == 3.0
    args.frames = 17
    assert drawing.kind_of(run) == "clips" and drawing.default_of(run)["cfg"] == 3.0
    args.frames, args.condition, args.generator = 1, "text", "ar"
    assert drawing.kind_of(run) == "captions" and drawing.default_of(run) == dict(cfg=3.0, temperature=1.0)
    args.head = "gmm"
    assert drawing.kind_of(run) == "captions" and drawing.default_of(run) == drawing.DEFAULTS["ar-gmm"]


@pytest.mark.parametrize("images, tokenizer, key", [
    ("shapes", "vae", "ar-gmm-shapes"), ("mine", "vae", "ar-gmm-vae"), ("shapes", "patches", "ar-gmm"),
    ("mine", "patches", "ar-gmm")])
def test_givt_draws_shapes_and_digits_with_what_was_measured_on_each(images, tokenizer, key):
    args = argparse.Namespace(condition="class", frames=1, generator="ar", head="gmm", data=images,
                              tokenizer=tokenizer)
    run = SimpleNamespace(args=args, classes=["a", "b"])
    assert drawing.default_of(run) == drawing.DEFAULTS[key]
    args.token_dim = drawing.MANY_NUMBERS                   # was measured on photographs, without top_p
    assert drawing.default_of(run) == dict(cfg=2.25, temperature=1.1, n_tries=32)


@pytest.mark.parametrize("images, tokenizer, frames, cfg", [
    ("shapes", "vq", 1, 1.5), ("shapes", "titok", 1, 1.5), ("shapes", "lfq", 1, 2.0), ("mine", "vq", 1, 2.0),
    ("shapes", "vq", 17, 2.0)])
def test_causal_ids_are_guided_less_on_shapes(images, tokenizer, frames, cfg):
    args = argparse.Namespace(condition="class", frames=frames, generator="ar", head="categorical",
                              data=images, tokenizer=tokenizer)
    run = SimpleNamespace(args=args, classes=["a", "b"])
    assert drawing.default_of(run) == dict(cfg=cfg, temperature=0.9)


@pytest.mark.parametrize("attention, condition, cfg", [
    ("causal", "class", 2.0), ("bidirectional", "class", 4.0), ("causal", "text", 4.0)])
def test_causal_mar_needs_less_guidance_for_classes(attention, condition, cfg):
    args = argparse.Namespace(condition=condition, frames=1, generator="mar", head="diffusion",
                              attention=attention)
    run = SimpleNamespace(args=args, classes=["a", "b"])
    assert drawing.default_of(run) == dict(cfg=cfg, temperature=1.0, cfg_schedule="constant")


def test_another_way_of_guiding_has_its_own_number_of_tries(tiny_run, monkeypatch):
    run, seen = runs.load_run(tiny_run / "shapes-vae-ar-gmm", "cpu"), {}
    monkeypatch.setattr(run.generator, "sample", lambda cond, **given: seen.update(given) or cond)
    drawing.draw_tokens(run, torch.arange(2))
    assert seen["n_tries"] == drawing.DEFAULTS["ar-gmm-shapes"]["n_tries"]
    seen.clear()
    drawing.draw_tokens(run, torch.arange(2), guidance="rejection")
    assert seen["guidance"] == "rejection" and "n_tries" not in seen


def test_one_class_is_drawn_without_guidance_unless_it_was_trained_for_it():
    args = argparse.Namespace(condition="class", frames=1, generator="maskgit", head="categorical",
                              label_drop=None)
    run = SimpleNamespace(args=args, classes=["images"], folder="runs/x", device=torch.device("cpu"))
    assert drawing.default_of(run) == drawing.DEFAULTS["maskgit-categorical"] | dict(cfg=1.0)
    with pytest.raises(data.BadInput, match="--cfg 3.0: runs/x was trained on one class"):
        drawing.draw_tokens(run, torch.zeros(2, dtype=torch.long), cfg=3.0)
    args.label_drop = 0.1
    assert drawing.default_of(run)["cfg"] == 3.0


def test_what_is_given_replaces_the_default_and_the_rest_stays(monkeypatch, tmp_path):
    run, seen = fixed_run(tmp_path), {}
    run.args.generator, run.args.head = "mar", "diffusion"
    monkeypatch.setattr(run.generator, "sample", lambda cond, **given: seen.update(given) or cond)
    drawing.draw_tokens(run, torch.arange(2))
    assert seen == dict(cfg=4.0, temperature=1.0, cfg_schedule="constant", on_step=None)
    drawing.draw_tokens(run, torch.arange(2), cfg=1.0, cfg_schedule="linear", steps=3)
    assert seen == dict(cfg=1.0, temperature=1.0, cfg_schedule="linear", steps=3, on_step=None)
    assert drawing.DEFAULTS["mar-diffusion"] == dict(cfg=4.0, temperature=1.0, cfg_schedule="constant")


def test_labels_of_one_class_and_of_all():
    classes = ["a", "b", "10"]
    assert drawing.labels_of(classes).bincount().tolist() == [8, 8, 8]
    assert drawing.labels_of(classes, None, 5).bincount().tolist() == [2, 2, 1]
    assert drawing.labels_of(classes, "b").tolist() == [1] * 16
    assert drawing.labels_of(classes, "0", 3).tolist() == [0] * 3
    assert drawing.labels_of(classes, "10", 2).tolist() == [2] * 2       # its name, not its number
    for wrong in ("c", "3", "-1"):
        with pytest.raises(data.BadInput, match=f"--class {wrong}: the classes are a, b, 10, or 0 to 2"):
            drawing.labels_of(classes, wrong)
    with pytest.raises(data.BadInput) as caught:
        drawing.labels_of([f"class {k}" for k in range(1000)], "x")
    assert len(str(caught.value)) < 400 and "0 to 999" in str(caught.value)


def test_pictures_of_300_classes_stay_readable(tmp_path, monkeypatch):
    run = fixed_run(tmp_path)
    labels = torch.arange(300).repeat_interleave(2)
    shown = []
    monkeypatch.setattr(pictures, "save_rows", lambda path, rows, title: shown.extend(rows))
    drawing.save_grid(tmp_path / "x.png", run, drawing.draw_samples(run, labels), labels, each=1)
    assert [text for text, _ in shown] == [str(run.classes[k]) for k in range(drawing.MOST_ROWS)]
    greys = torch.cat([images for _, images in shown])[:, 0, 0, 0] * 300
    assert torch.allclose(greys, torch.arange(drawing.MOST_ROWS).float(), atol=1e-4)


@pytest.mark.parametrize("n, rows", [(5, [5]), (16, [16]), (37, [16, 16, 5]), (5000, [16] * 20)])
def test_many_samples_of_one_class_or_caption_are_broken_into_rows(n, rows, tmp_path, monkeypatch):
    """64 in one row were a strip nobody could read, and 5,000 were more than matplotlib draws."""
    run, shown = fixed_run(tmp_path), []
    monkeypatch.setattr(pictures, "save_rows", lambda path, rows, title: shown.extend(rows))
    images = torch.arange(n).float()[:, None, None, None].expand(-1, 3, 2, 2)
    for save in (lambda path: drawing.save_grid(path, run, images, torch.zeros(n, dtype=torch.long)),
                 lambda path: drawing.save_captions(path, run, [str(run.classes[0])], images)):
        shown.clear()
        save(tmp_path / "x.png")
        assert [len(images) for _, images in shown] == rows
        assert [text for text, _ in shown] == [str(run.classes[0])] + [""] * (len(rows) - 1)
        assert torch.equal(torch.cat([images for _, images in shown]), images[:sum(rows)])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_diverged_is_said_in_a_sentence(value, tmp_path, capsys):
    run = fixed_run(tmp_path, value)
    with pytest.raises(data.BadInput, match="1 of 3 samples have tokens that are not finite.*diverged"):
        drawing.draw_samples(run, torch.arange(3))
    drawing.save_samples(tmp_path / "samples.png", run)     # the end of training goes on
    assert "no picture: " in capsys.readouterr().out and not (tmp_path / "samples.png").exists()


def test_each_of_two_processes_draws_every_other_batch(tmp_path, monkeypatch):
    run, drawn = fixed_run(tmp_path), []
    draw = drawing.draw_tokens

    def counted(run, cond, *rest, **tricks):
        drawn.append(len(cond))
        return draw(run, cond, *rest, **tricks)

    def gather(parts, mine):
        parts[:] = [mine, {}]
    monkeypatch.setattr(drawing, "draw_tokens", counted)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    run.share = 1, 2
    drawing.draw_samples(run, torch.arange(28) % 10, batch_size=8)
    assert drawn == [8, 4], "the second of two processes draws the second and the fourth batch, no others"


# ---- Editing

@pytest.mark.parametrize("kind", ["vectors", "ids"])
def test_editing_keeps_what_lies_outside_the_mask(kind, tmp_path, monkeypatch):
    run = untrained_run(tmp_path, kind)
    original = data.draw(torch.arange(1), 16)[0]
    Image.fromarray(pictures.to_uint8(original)[0].permute(1, 2, 0).numpy()).save(tmp_path / "p.png")
    seen, draw = {}, drawing.draw_tokens

    def watched(*rest, **tricks):
        seen.update(tricks, drawn=draw(*rest, **tricks))
        return seen["drawn"]
    monkeypatch.setattr(drawing, "draw_tokens", watched)
    given, images = drawing.edit(run, tmp_path / "p.png", "right", torch.arange(10))
    assert images.shape == (10, 3, 16, 16)
    assert (given[0] - original[0]).abs().max() < 0.01
    assert (given[1, :, :, :8] == given[0, :, :, :8]).all() and (given[1, :, :, 8:] == 0.4).all()
    T = 16 if kind == "ids" else 4
    side = math.isqrt(T)                                    # of the grid of tokens, 2 x 2 or 4 x 4
    left = (torch.arange(T) % side < side // 2)
    assert (seen["known_mask"] == left).all() and torch.equal(seen["drawn"][:, left], seen["known"][:, left])
    changed = (seen["drawn"] != seen["known"])[:, ~left].flatten(1)
    assert changed.any(1).all() and seen["drawn"][:, ~left].float().std(0).min() > 0
    for path, mask, sentence in [("p.png", "0,0,2", "a box y0,x0,y1,x1"), ("no.png", "left", "no such file"),
                                 ("p.png", "0,0,0.01,0.01", "covers no token")]:
        with pytest.raises(data.BadInput, match=sentence):
            drawing.edit(run, tmp_path / path, mask, torch.arange(2))


def test_a_mask_is_a_name_a_box_or_a_png(tmp_path):
    def mask(text):
        return drawing.parse_mask(text, 4, 4).view(4, 4)
    assert mask("right")[:, 2:].all() and mask("right").sum() == 8
    assert mask("top")[:2].all() and mask("top").sum() == 8
    assert mask("0,0,0.5,1")[:2].all() and mask("0,0,0.5,1").sum() == 8
    assert mask("centre").sum() == 4 and (~mask("border")).sum() == 4 and mask("all").all()
    Image.fromarray(np.kron(np.eye(4), np.ones((8, 8))).astype(np.uint8) * 255).save(tmp_path / "m.png")
    assert torch.equal(mask(str(tmp_path / "m.png")), torch.eye(4).bool())
    wide = drawing.parse_mask("left", 2, 6).view(2, 6)
    assert wide[:, :3].all() and not wide[:, 3:].any()


# ---- Captions

@pytest.mark.parametrize("kind", ["vectors", "ids"])
def test_the_caption_has_an_effect_on_the_image(kind, tmp_path):
    run = untrained_run(tmp_path, kind, text=True)
    texts = ["a small red ring in the middle on a black background",
             "a large blue disc at the top on a dark red background " * 9]
    one, other = (drawing.draw_captions(run, [t] * 4) for t in texts)
    assert one.shape == (4, 3, 16, 16) and torch.isfinite(one).all() and not torch.equal(one, other)
    images = drawing.draw_captions(run, texts, each=3)
    assert torch.equal(images, drawing.draw_captions(run, [texts[0]] * 3 + [texts[1]] * 3))
    drawing.save_captions(tmp_path / "x.png", run, texts, images)
    assert (tmp_path / "x.png").stat().st_size > 0


def test_a_run_on_captions_draws_them_when_it_is_trained(tiny_run):
    train.main([*TINY, *RARELY, "--runs", str(tiny_run), "--condition", "text"])
    run = runs.load_run(tiny_run / "shapes-vae-text-ar-gmm")
    assert (run.folder / "samples.png").stat().st_size > 0
    assert run.args.text_len == max(len(t.encode()) for t in data.captions(torch.arange(200)))


# ---- Editing in scales (VAR)

@pytest.mark.parametrize("known_scales, mask, stays", [
    (None, "right", "k kRkR kkRkkRkkR"), (2, "all", "k kkkk RRRRRRRRR"), (1, "left", "k RkRk RkkRkkRkk")])
def test_an_edit_in_scales_keeps_what_is_outside_of_the_mask(known_scales, mask, stays, tmp_path,
                                                             monkeypatch):
    """Letters: k is kept, R is drawn. The 1 x 1 token stays unless its centre lies in the mask."""
    tokenizer = var.MSVQ(6, 8, 4, stem=2, ch=8, groups=4).eval()
    run = SimpleNamespace(tokenizer=tokenizer, device=torch.device("cpu"), folder=tmp_path,
                          args=argparse.Namespace(image_size=6, generator="var", frames=1))
    Image.new("RGB", (6, 6), (200, 30, 30)).save(tmp_path / "x.png")
    asked = {}
    monkeypatch.setattr(drawing, "draw_samples", lambda run, labels, **words: asked.update(words))
    drawing.edit(run, tmp_path / "x.png", mask, torch.arange(2), known_scales=known_scales)
    kept = torch.tensor([letter == "k" for letter in stays.replace(" ", "")])
    assert torch.equal(asked["known_mask"], kept.expand(2, -1))
    assert torch.equal(asked["known"][0], asked["known"][1]) and asked["known"].shape == (2, 14)


@pytest.mark.parametrize("data_name, schedule", [("shapes", "constant"), ("", None)])
def test_runs_and_published_weights_of_var_are_guided_each_in_its_way(data_name, schedule):
    args = argparse.Namespace(data=data_name, generator="var", head="categorical", condition="class",
                              frames=1)
    default = drawing.default_of(argparse.Namespace(args=args, classes=["a", "b"]))
    assert default.get("cfg_schedule") == schedule


@pytest.mark.parametrize("generator, cfg", [("ar", 3.0), ("maskgit", 2.5), ("mar", 3.0)])
def test_ids_from_captions_are_guided_by_the_generators_own_default(generator, cfg):
    args = argparse.Namespace(generator=generator, head="categorical", condition="text", frames=1)
    assert drawing.default_of(argparse.Namespace(args=args, classes=[]))["cfg"] == cfg
