"""Tests of common/classifier.py."""
import argparse

import pytest
import torch
import torch.nn.functional as F

import data
from common import classifier, metrics, pictures


@pytest.fixture(scope="module")
def drawn():
    """Small drawn images: 400 to learn from and 1,000 others."""
    train_set = data.load("shapes", 16, "train", n_shapes=400)
    images, labels = data.draw(torch.arange(1000) + data.VAL_INDEX, 16)[:2]
    return train_set, data.ImageSet(pictures.to_uint8(images), labels, train_set.classes, "cpu")


def of_one_class(image_set):
    return data.ImageSet(image_set.images, torch.zeros(len(image_set), dtype=torch.long), ["thing"], "cpu")


def flags():
    return argparse.Namespace(data="shapes", image_size=16, n_shapes=400, seed=0)


def test_features_have_mean_0_and_variance_1_over_what_was_trained_on():
    net = classifier.SmallCNN(10)
    images = data.draw(torch.arange(512), 16)[0]
    features = net.train().features(images)
    assert features.shape == (512, 128) and features.dtype == torch.float32
    assert features.mean(0).abs().max() < 1e-5 and (features.std(0) - 1).abs().max() < 0.01


def test_a_large_image_is_seen_as_its_average_of_64_pixels():
    net = classifier.SmallCNN(3).eval()
    image = torch.rand(2, 3, 128, 128) * 2 - 1
    assert torch.equal(net(image), net(F.avg_pool2d(image, 2)))


def test_clips_are_seen_as_a_whole():
    net = classifier.ClipCNN(4).eval()
    clips = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    assert net(clips).shape == (2, 4) and not torch.allclose(net(clips), net(clips.flip(2)))


def test_training_learns_and_is_a_function_of_the_seed(drawn):
    before = torch.random.get_rng_state()
    nets = [classifier.train_classifier(*drawn, seed=seed, steps=25) for seed in (3, 3, 4)]
    assert torch.equal(torch.random.get_rng_state(), before), "the program's random numbers are its own"
    weights = [net.classify.weight for net, _ in nets]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert 0.2 < nets[0][1] <= 1 and not nets[0][0].training


def test_the_accuracy_is_that_of_the_validation_images(drawn):
    net, accuracy = classifier.train_classifier(*drawn, steps=20)
    images, labels = drawn[1].batch(torch.arange(len(drawn[1])))
    with torch.no_grad():
        right = (net(images).argmax(1) == labels).float().mean().item()
    assert accuracy == pytest.approx(right, abs=1e-6)
    features, seen = classifier.look_at_real(net, drawn[1], torch.tensor([5, 2, 9]), batch_size=2)
    assert torch.allclose(features, net.features(images[[5, 2, 9]]), atol=1e-5)
    assert torch.equal(seen, classifier.look(net, images[[5, 2, 9]])[1] == labels[[5, 2, 9]])


def test_turns_are_quarter_turns_of_images_and_of_clips():
    images = torch.rand(6, 3, 4, 4)
    out, turns = classifier.turned(images)
    assert turns.tolist() == [0, 1, 2, 3, 0, 1]
    assert all(torch.equal(out[i], images[i].rot90(k, (1, 2))) for i, k in enumerate(turns.tolist()))
    clips = torch.rand(2, 3, 5, 4, 4)
    assert torch.equal(classifier.turned(clips)[0][1], clips[1].rot90(1, (2, 3)))


def test_features_of_data_without_classes_tell_real_images_from_blurred_ones(drawn):
    train_set, val_set = (of_one_class(s) for s in drawn)
    net, accuracy = classifier.train_classifier(train_set, val_set, steps=120)
    assert net.classify.out_features == 4 and accuracy > 0.28, "a turn is not seen"         # 0.25 by chance
    images = val_set.batch(torch.arange(1000))[0]
    blurred = F.interpolate(F.avg_pool2d(images, 4), scale_factor=4.0, mode="bilinear")
    real, other, blur = (classifier.look(net, x)[0] for x in (images[:500], images[500:], blurred[:500]))
    assert metrics.frechet_distance(blur, real) > 3 * metrics.frechet_distance(other, real)


def test_a_classifier_is_trained_once_for_each_data_set_and_seed(drawn, tmp_path, monkeypatch, capsys):
    calls = []

    def quick(train_set, val_set, seed=0):
        calls.append(seed)
        return classifier.new_classifier(train_set, "cpu").eval(), 0.25
    monkeypatch.setattr(classifier, "train_classifier", quick)
    find = lambda seed=0, train_set=drawn[0]: classifier.classifier_for(flags(), tmp_path / "run", "cpu",
                                                                        train_set, drawn[1], seed)
    first, accuracy = find()
    again, remembered = find()
    assert calls == [0] and accuracy == remembered == 0.25 and torch.equal(first.classify.weight,
                                                                           again.classify.weight)
    assert len(list((tmp_path / "cache").glob("classifier-*.pt"))) == 1 and not again.training
    find(seed=1)
    find(train_set=data.ImageSet(255 - drawn[0].images, drawn[0].labels, drawn[0].classes, "cpu"))
    assert calls == [0, 1, 0] and len(list((tmp_path / "cache").glob("classifier-*.pt"))) == 3


def test_a_damaged_classifier_is_trained_anew_with_a_line(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(classifier.train_classifier, "__defaults__", (0, 2, 32, 4e-3))
    good, accuracy = classifier.classifier_for(flags(), tmp_path / "run", "cpu", *drawn)
    path, = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    other = tmp_path / "other.pt"
    torch.save(dict(model=classifier.SmallCNN(3).state_dict(), accuracy=1.0), other)
    torch.save({"model": good.state_dict()}, tmp_path / "no-accuracy.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1                           # a single bit, which torch.load does not see
    damaged = [b"", whole[:len(whole) // 2], b"no zip at all", bytes(flipped)]
    damaged += [(tmp_path / name).read_bytes() for name in ("other.pt", "no-accuracy.pt", "list.pt")]
    for content in damaged:
        path.write_bytes(content)
        capsys.readouterr()
        net, again = classifier.classifier_for(flags(), tmp_path / "run", "cpu", *drawn)
        out = capsys.readouterr().out
        assert "not a readable classifier" in out and "trained a classifier" in out
        assert torch.equal(net.classify.weight, good.classify.weight) and again == accuracy
