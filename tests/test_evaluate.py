"""Tests of evaluate.py."""
import argparse
import json
import math
import sys

import pytest
import torch
from PIL import Image

import data
import evaluate
import maskgit
import train
from common import age, captions, classifier, drawing, metrics, pictures, runs
from tests.helpers import IDS, RARELY, TINY


@pytest.fixture(autouse=True)
def quick_classifier(monkeypatch):
    monkeypatch.setattr(classifier.train_classifier, "__defaults__", (0, 12, 32, 4e-3))  # 12 steps are enough


@pytest.fixture(scope="session")
def one_class(tmp_path_factory):
    """120 images of one class, each with a caption -> their folder."""
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "disc").mkdir()
    images = pictures.to_uint8(data.draw(torch.arange(120), 16)[0]).permute(0, 2, 3, 1).numpy()
    for i, (image, text) in enumerate(zip(images, data.captions(torch.arange(120)))):
        Image.fromarray(image).save(folder / "disc" / f"{i:03d}.png")
        (folder / "disc" / f"{i:03d}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def caption_run(one_class, tmp_path_factory):
    """A tiny run with captions of one's own -> its folder."""
    folder = tmp_path_factory.mktemp("runs")
    train.main([
        *TINY, *RARELY, *IDS, "--data",
        str(one_class), "--runs",
        str(folder), "--condition", "text", "--name", "texts"
    ])
    return folder / "texts"


def measured(folder, *words):
    """Runs evaluate.py on a run folder -> the entries of metrics.json."""
    evaluate.main([str(folder), "--device", "cpu", *map(str, words)])
    return json.loads((folder / "metrics.json").read_text())


def test_precision_does_not_depend_on_the_order_of_the_real_images(monkeypatch):
    g = torch.Generator().manual_seed(0)
    near = lambda n, where: where + torch.randn(n, 8, generator=g)
    real = torch.cat([near(300, 0.0), near(300, 20.0)])     # sorted by class
    fake = torch.cat([near(50, 0.0), near(50, 20.0)])
    monkeypatch.setattr(evaluate, "look", lambda net, images: (fake, torch.zeros(100, dtype=torch.long)))
    for order in (torch.arange(600), torch.randperm(600, generator=g)):
        labels = torch.zeros(100, dtype=torch.long)
        rows = evaluate.measure_samples(torch.zeros(100, 3, 4, 4), labels, None, real[order], 100)
        found = {key: value for key, _, value, *_ in rows}
        assert found["sample_precision"] > 75 and found["sample_recall"] > 75, found


def test_beside_precision_and_recall_stand_those_of_training_images(monkeypatch):
    g = torch.Generator().manual_seed(0)
    real, training = torch.randn(2, 300, 8, generator=g).unbind()
    fake = torch.randn(100, 8, generator=g) + 20            # nothing like the real ones
    monkeypatch.setattr(evaluate, "look", lambda net, images: (fake, torch.zeros(100, dtype=torch.long)))
    labels = torch.zeros(100, dtype=torch.long)
    rows = evaluate.measure_samples(torch.zeros(100, 3, 4, 4), labels, None, real, 100, training)
    best_of_both = metrics.precision_recall(evaluate.evenly(real, 100), evaluate.evenly(training, 100))
    for key, best in zip(("sample_precision", "sample_recall"), best_of_both):
        value, remark = next((row[2], row[4]) for row in rows if row[0] == key)
        assert value == 0 and best > 0.5
        assert f"training data have {100 * best:.1f}" in remark


def test_a_run_on_classes_is_measured_and_what_recipes_wrote_stays(tiny_run, capsys):
    folder = tiny_run / "shapes-vae-ar-gmm"
    (folder / "metrics.json").write_text('{"probe_pixels": 1.0, "bound_pixels": 2.0, "old": 3}')
    found = measured(folder, "--n", 20, "--cfg", 3)
    out = capsys.readouterr().out
    assert (found["probe_pixels"], found["bound_pixels"], "old" in found) == (1.0, 2.0, False)
    assert (found["n"], found["seed"], found["cfg"], found["temperature"], found["device"]) == (20, 0, 3.0,
                                                                                                0.85, "cpu")
    assert (found["commit"], found["date"]) == (age.COMMIT, age.now()["date"])
    for key in ("recon_psnr_db", "recon_ssim", "kl_nats_per_token", "recon_accuracy", "classifier_accuracy",
                "val_nll_nats_per_token", "val_nll_nats_per_token_error", "val_bits_per_dim",
                "sample_accuracy", "sample_precision", "sample_recall", "sample_frechet_small_cnn",
                "recon_frechet_small_cnn", "floor_frechet_small_cnn"):
        assert math.isfinite(found[key]), key
    assert "Frechet distance (small CNN)" in out and "FID" not in out
    again = measured(folder, "--n", 20, "--cfg", 3)
    assert again == found, "the same seed gives the same numbers, whether or not the classifier was trained"
    (folder / "metrics.json").unlink()


def test_a_likelihood_is_the_mean_over_images_of_unequal_batches(tiny_run):
    run = runs.load_run(tiny_run / "shapes-vae-ar-gmm", "cpu")
    val_set = runs.open_split(run.args, "val", "cpu")
    index = torch.arange(45)                                # batches of 2, the last of 1
    rows = evaluate.measure_likelihood(run, val_set, index, 250, seed=3)
    torch.manual_seed(3)
    total = 0.0
    for part in index.split(2):
        images, labels = val_set.batch(part)
        with torch.no_grad():
            total += run.generator(run.tokenizer.encode(images), labels)[0].item() * len(part)
    assert rows[0][2][0] == pytest.approx(total / 45, rel=1e-6)


def test_a_tokenizer_alone_is_measured_without_samples(tiny_run):
    found = measured(tiny_run / "shapes-vae", "--n", 20)
    assert {"recon_psnr_db", "floor_frechet_small_cnn"} <= found.keys()
    assert not {"sample_accuracy", "val_nll_nats_per_token", "cfg"} & found.keys()


def test_data_of_one_class_are_measured_without_what_needs_classes(one_class, tmp_path, capsys):
    train.main([*TINY, *RARELY, "--data", str(one_class), "--runs", str(tmp_path), "--name", "one"])
    found = measured(tmp_path / "one", "--n", 20)
    assert not evaluate.NEED_CLASSES & found.keys() and "accuracy" not in capsys.readouterr().out.split(
        "wrote")[-2]
    assert {"recon_psnr_db", "val_nll_nats_per_token", "sample_precision",
            "sample_frechet_small_cnn"} <= found.keys()


def test_captions_of_ones_own_are_measured_by_what_needs_no_judge(caption_run):
    found = measured(caption_run, "--n", 20)
    assert {"recon_psnr_db", "codebook_usage", "val_nll_nats_per_token", "val_perplexity",
            "sample_frechet_small_cnn"} <= found.keys()
    assert not evaluate.NEED_CLASSES & found.keys() and not any(key.startswith("caption") for key in found)


def test_under_a_sample_stands_the_caption_that_it_was_drawn_by(caption_run, monkeypatch):
    run = runs.load_run(caption_run, "cpu")
    train_set, val_set = (runs.open_split(run.args, split, "cpu") for split in ("train", "val"))
    cond, _ = evaluate.asked_for(run, val_set, 20)
    truth = train_set.batch(torch.arange(20))[0]            # "samples" whose nearest images are known
    shown = []
    monkeypatch.setattr(pictures, "save_captioned", lambda path, rows, title: shown.extend(rows))
    evaluate.compare_with_training(run, truth, truth, train_set, val_set)
    (_, samples, asked), (_, _, near), (_, unseen, _) = shown

    def place(image, images):
        return (images - image).abs().flatten(1).sum(1).argmin().item()

    places = [place(sample, truth) for sample in samples]
    assert torch.equal(captions.encode(run.args, asked), cond[places])
    assert near == [train_set.texts[i] for i in places]
    held_out = val_set.batch(torch.arange(len(val_set)))[0]
    assert [val_set.texts[place(image, held_out)] for image in unseen] == asked


def test_a_likelihood_of_captions_is_that_of_the_caption_of_each_image(caption_run):
    run = runs.load_run(caption_run, "cpu")
    val_set = runs.open_split(run.args, "val", "cpu")
    for p in run.generator.parameters():                    # after 24 steps captions hardly count
        p.data.add_(0.1 * torch.randn_like(p))
    index = torch.arange(len(val_set)).flip(0)
    mean = evaluate.measure_likelihood(run, val_set, index, 250, seed=0)[0][2][0]
    x = run.tokenizer.encode(val_set.batch(torch.arange(len(val_set)))[0])

    def loss_of(texts):
        cond = [captions.encode(run.args, [text]) for text in texts]
        with torch.no_grad():
            return sum(run.generator(x[i:i + 1], c)[0].item() for i, c in enumerate(cond)) / len(texts)

    assert mean == pytest.approx(loss_of(val_set.texts), rel=1e-5)
    assert abs(mean - loss_of(val_set.texts[1:] + val_set.texts[:1])) > 1e-4 * mean, "any caption would do"


@pytest.mark.parametrize("words, sentence", [
    (["--n", "3"], "--n 3: at least 10"),
    (["--batch_size", "0"], "--batch_size 0: at least 1"),
    (["--cfg", "-1"], "--cfg -1.0: must be 0 or more"),
    (["--temperature", "inf"], "--temperature inf"),
    (["--temperature", "nan"], "--temperature nan"),
    (["--steps", "3"], "--steps: not for --generator ar; it is for maskgit and mar"),
])
def test_evaluate_refuses_in_one_sentence(words, sentence, tiny_run):
    with pytest.raises(SystemExit, match=sentence):
        evaluate.main([str(tiny_run / "shapes-vae-ar-gmm"), "--device", "cpu", *words])


def test_a_tokenizer_has_no_samples_to_guide(tiny_run):
    with pytest.raises(SystemExit, match="--cfg: .* has no samples"):
        evaluate.main([str(tiny_run / "shapes-vae"), "--device", "cpu", "--cfg", "2"])


def test_samples_are_drawn_in_the_passes_asked_for(tmp_path):
    model = maskgit.MaskGIT(maskgit.CategoricalHead(8, 5), 6, 2, vocab_size=5, n_layer=1, n_head=1, n_embd=8)
    args = argparse.Namespace(generator="maskgit", head="categorical", condition="class", frames=1)
    run = argparse.Namespace(args=args, generator=model.eval(), classes=["a", "b"], folder=tmp_path,
                             device=torch.device("cpu"))
    flags = evaluate.parse_args(["RUN", "--steps", "4"])
    passes = []
    drawing.draw_tokens(run, torch.arange(2), on_step=lambda step, *_: passes.append(step),
                        **evaluate.given(flags))
    assert passes == [0, 1, 2, 3] and evaluate.settings(flags, run)["steps"] == 4
    flags.steps = 7
    with pytest.raises(data.BadInput, match="--steps 7: must be 1 to 6, the tokens of an image"):
        evaluate.refuse(flags, run, val_set=[])


def test_fid_names_the_package_that_is_missing(tiny_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanfid", None)
    with pytest.raises(SystemExit, match="pip install clean-fid"):
        evaluate.main([str(tiny_run / "shapes-vae-ar-gmm"), "--device", "cpu", "--fid"])
