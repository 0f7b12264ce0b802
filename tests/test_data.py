"""Tests of data."""
import math
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
from common import files, pictures


def test_drawn_pictures_depend_on_seed_and_index_only():
    together = data.draw(torch.arange(40))[0]
    assert torch.allclose(data.draw(torch.tensor([7]))[0][0], together[7], atol=1e-6)
    assert not torch.allclose(data.draw(torch.arange(40), seed=1)[0], together)
    train_set, val_set = data.load(n_shapes=300), data.load(split="val", n_shapes=300)
    rows = lambda s: {bytes(i.numpy().tobytes()) for i in s.images}
    assert len(rows(train_set)) == 300 and not rows(train_set) & rows(val_set)
    u = data.uniforms(torch.arange(20_000), 3)
    assert torch.allclose(u.mean(0), torch.tensor(0.5), atol=0.01) and abs(torch.corrcoef(u.T)[0, 1]) < 0.02
    assert u.min() >= 0 and u.max() < 1


def test_drawn_shapes_have_the_area_and_place_they_should():
    images, labels, masks, d = data.draw(torch.arange(400), 128)
    s = data.scene(torch.arange(400))
    area = (masks > 0).float().mean((1, 2)) * 4  # in squared half widths
    disc, square = labels == 0, labels == 2
    assert torch.allclose(area[disc], math.pi * (0.9 * s["radius"][disc]) ** 2, rtol=0.02)
    assert torch.allclose(area[square], (1.56 * s["radius"][square]) ** 2, rtol=0.02)
    assert (masks.flatten(1).amax(1) == labels + 1).all() and set(labels.tolist()) == set(range(10))
    border = torch.cat([masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]], 1)
    assert (border > 0).float().mean() < 0.01, "shapes leave the picture"
    far = (images[0][:, d[0] < -0.1] / 2 + 0.5 - s["rgb"][0][:, None]).abs().max()
    assert far < 1e-5


def test_maps_belong_to_their_images():
    images, labels, masks, d = data.draw(torch.arange(20))
    truth = data.load(n_shapes=20).batch(torch.arange(20))[0]
    assert (truth - images).abs().max() < 0.01
    maps, again = data.load(n_shapes=20, task="segment").batch(torch.arange(20))
    assert maps.shape == (20, 11, 32, 32) and torch.equal(maps.argmax(1), masks)
    assert torch.equal(again, labels)
    assert set(maps.unique().tolist()) == {-1.0, 1.0}
    depth = data.load(n_shapes=20, task="depth").batch(torch.arange(20))[0]
    assert (depth[:, 0] - d.clamp(-1, 1)).abs().max() < 0.01
    colours = pictures.colour_maps(maps)
    assert colours.shape == (20, 3, 32, 32) and (colours[:, :, 0, 0] == -1).all()
    each = pictures.colour_maps(torch.eye(11)[:, :, None, None]).flatten(1)
    assert len(each.unique(dim=0)) == 11, "two classes have one colour"
    with pytest.raises(data.BadInput, match="only the drawn world"):
        data.load("somewhere", task="depth")


def test_captions_say_what_is_drawn():
    s = data.scene(torch.arange(300))
    for i, text in enumerate(data.captions(torch.arange(300))):
        words = text.split()
        assert words[3] == data.SHAPES[s["label"][i]] and words[2] == list(data.COLOURS)[s["colour"][i]]
        assert text.endswith(list(data.BACKGROUNDS)[s["background"][i]] + " background")
        if "upper" in words:
            assert s["cy"][i] < 0
        if "left" in words:
            assert s["cx"][i] < 0


def test_clips_move_as_their_action_says():
    videos, actions, _ = data.draw_clips(torch.arange(300), 32, frames=5)
    assert videos.shape == (300, 3, 5, 32, 32)
    ground = videos[:, :, :, :1, :1]
    weight = (videos - ground).abs().sum(1)                                                 # (B, F, H, W)
    axis = torch.arange(32.0)
    mass = weight.sum((2, 3)).clamp(min=1e-3)
    x, y = (weight.sum(2) * axis).sum(-1) / mass, (weight.sum(3) * axis).sum(-1) / mass
    for name, value, sign in (("moves left", x, -1), ("moves right", x, 1), ("moves up", y, -1),
                              ("moves down", y, 1), ("grows", mass, 1), ("shrinks", mass, -1)):
        rows = actions == data.ACTIONS.index(name)
        assert (sign * (value[rows, -1] - value[rows, 0]) > 0).all(), name
    rests = actions == data.ACTIONS.index("rests")
    assert torch.equal(videos[rests][:, :, 0], videos[rests][:, :, -1])
    assert data.draw_clips(torch.arange(3), 16, frames=1)[0].shape == (3, 3, 1, 16, 16)


def picture_tree(folder, n=12, size=(40, 30), grey=False):
    for c, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            pixels = np.random.RandomState(100 * c + i).randint(0, 255, (size[1], size[0], 3), np.uint8)
            Image.fromarray(pixels[..., 0] if grey else pixels).save(folder / name / f"{i:03d}.png")
    return folder


def test_the_same_images_from_folder_tar_zip_and_npz(tmp_path):
    tree = picture_tree(tmp_path / "pets", size=(16, 16))
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as t:
        t.add(tree, arcname="pets")
    with tarfile.open(tmp_path / "b.tar", "w") as t:
        t.add(tree, arcname=".")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as z:
        for f in tree.rglob("*.png"):
            z.write(f, f.relative_to(tree))
    files = sorted(tree.rglob("*.png"))
    np.savez(tmp_path / "d.npz", images=np.stack([np.array(Image.open(f)) for f in files]),
             labels=np.array([f.parent.name == "dog" for f in files]).astype(int),
             classes=np.array(["cat", "dog"]))
    reference = data.load(str(tree), 16)
    assert reference.classes == ["cat", "dog"] and len(reference) == 22
    assert len(data.load(str(tree), 16, "val")) == 2
    assert np.array_equal(reference.images[0].permute(1, 2, 0).numpy(), np.array(Image.open(files[0])))
    for other in ("a.tar.gz", "b.tar", "c.zip"):
        s = data.load(str(tmp_path / other), 16)
        assert torch.equal(s.images, reference.images) and torch.equal(s.labels, reference.labels), other
    s = data.load(str(tmp_path / "d.npz"), 16)
    assert s.classes == ["cat", "dog"] and len(s) == 22 and s.images.dtype == torch.uint8
    streamed = data.load(str(tree), 16, max_bytes=0)
    index = torch.tensor([3, 20, 5])
    assert torch.equal(streamed.batch(index)[0], reference.batch(index)[0])


def test_images_are_cropped_in_the_middle_and_grey_becomes_rgb(tmp_path):
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 200
    assert (files.centre_crop(Image.fromarray(wide), 8) == 200).all()
    assert files.centre_crop(Image.fromarray(wide).resize((200, 90)), 8).shape == (8, 8, 3)
    s = data.load(str(picture_tree(tmp_path / "g", grey=True)), 16)
    assert s.images.shape[1:] == (3, 16, 16) and torch.equal(s.images[:, 0], s.images[:, 2])
    s = data.load(str(tmp_path / "g"), 16, flip=True)
    x, plain = s.batch(torch.zeros(64, dtype=torch.long))[0], s.images[0].float() / 127.5 - 1
    mirrored = (x == plain.flip(-1)).all((1, 2, 3))
    assert 10 < mirrored.sum() < 54 and ((x == plain).all((1, 2, 3)) | mirrored).all()


def test_train_and_val_levels_and_captions_are_understood(tmp_path):
    picture_tree(tmp_path / "d" / "train"), picture_tree(tmp_path / "d" / "test", n=3)
    for f in (tmp_path / "d" / "train").rglob("*.png"):
        f.with_suffix(".txt").write_text(f"a {f.parent.name}\n")
    s = data.load(str(tmp_path / "d"), 16)
    assert len(s) == 24 and len(data.load(str(tmp_path / "d"), 16, "val")) == 6
    assert s.texts[0] == "a cat" and s.texts[-1] == "a dog"


def test_bad_data_is_refused_in_a_sentence(tmp_path):
    def refused(path, words, **options):
        with pytest.raises(data.BadInput, match=words):
            data.load(str(path), 16, **options)
    refused(tmp_path / "absent", "no such file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no images")
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 not really")
    refused(tmp_path / "broken.zip", "neither a folder|damaged")
    tree = picture_tree(tmp_path / "t")
    (tree / "emu").mkdir()
    refused(tree, "emu holds no image")
    (tree / "emu").rmdir()
    whole = (tree / "cat" / "003.png").read_bytes()
    (tree / "cat" / "003.png").write_bytes(whole[:len(whole) // 2])
    refused(tree, "cat/003.png: not a readable image")
    assert len(data.load(str(tree), 16, skip_bad=True)) == 21
    archive = tmp_path / "cut.tar.gz"
    with tarfile.open(archive, "w:gz") as t:
        t.add(tree, arcname=".")
    archive.write_bytes(archive.read_bytes()[:-3000])
    refused(archive, "damaged")
    (tree / "loose.png").write_bytes(whole)
    refused(tree, "loose.png lies in no class folder")
    np.savez(tmp_path / "x.npz", images=np.zeros((20, 8, 8, 3)), labels=np.zeros(20))
    refused(tmp_path / "x.npz", "uint8")


def test_order_is_a_permutation_per_epoch():
    seen = torch.cat([data.order(100, 20, step, seed=1) for step in range(5)])
    assert sorted(seen.tolist()) == list(range(100))
    assert not torch.equal(data.order(100, 20, 0, 1), data.order(100, 20, 5, 1))
    again = data.order(100, 20, 3, seed=1)
    assert torch.equal(again, seen[60:80]) and len(data.order(7, 20, 0)) == 20
