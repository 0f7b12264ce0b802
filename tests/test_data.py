"""Tests of data."""
import io
import itertools
import math
import os
import sys
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
from common import files, pictures, reading
from common.folders import list_path


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
    area = (masks > 0).float().mean((1, 2)) * 4             # in squared half widths
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
    assert maps.shape == (20, 11, 32, 32) and torch.equal(maps.argmax(1), masks) and torch.equal(
        again, labels)
    assert set(maps.unique().tolist()) == {-1.0, 1.0}
    depth = data.load(n_shapes=20, task="depth").batch(torch.arange(20))[0]
    assert (depth[:, 0] - d.clamp(-1, 1)).abs().max() < 0.01
    colours = pictures.colour_maps(maps)
    assert colours.shape == (20, 3, 32, 32) and (colours[:, :, 0, 0] == -1).all()
    assert len(pictures.colour_maps(
        torch.eye(11)[:, :, None, None]).flatten(1).unique(dim=0)) == 11, "two classes have one colour"
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
    assert reference.classes == ["cat", "dog"] and len(reference) == 22 and len(
        data.load(str(tree), 16, "val")) == 2
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
    assert (reading.centre_crop(Image.fromarray(wide), 8) == 200).all()
    assert reading.centre_crop(Image.fromarray(wide).resize((200, 90)), 8).shape == (8, 8, 3)
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


# ---- One file: judged by its content, upright, on white -------------------------------------------

def smooth(width=48, height=40, k=0):
    """A picture that looks different in every orientation -> PIL image."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., k] = 40 + 200 * x // width
    pixels[..., (k + 1) % 3] = 200 * y // height
    return Image.fromarray(pixels)


def read(path, image_size=16):
    return reading.read_image(str(path), path.read_bytes, image_size)


def test_the_eight_exif_orientations_of_a_photo_are_one_picture(tmp_path):
    photo = smooth()
    T = Image.Transpose
    undo = {
        1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90,
        7: T.TRANSVERSE, 8: T.ROTATE_270
    }  # how the camera lay: the inverse of what a viewer does
    photo.save(tmp_path / "plain.png")
    for how, way in undo.items():
        exif = Image.Exif()
        exif[0x0112] = how
        stored = photo if way is None else photo.transpose(way)
        for ending, lossless in (("png", {}), ("tif", {}), ("webp", dict(lossless=True))):
            stored.save(tmp_path / f"{how}.{ending}", exif=exif, **lossless)
            assert torch.equal(read(tmp_path / f"{how}.{ending}"),
                               read(tmp_path / "plain.png")), (how, ending)
        stored.save(tmp_path / f"{how}.jpg", exif=exif, quality=98)
        assert (read(tmp_path / f"{how}.jpg").int() -
                read(tmp_path / "plain.png").int()).abs().max() < 12, how


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparent_parts_lie_over_white(tmp_path, mode):
    rng = np.random.RandomState(0)
    pixels = np.array(smooth().convert("RGBA"))
    pixels[:, :20] = rng.randint(0, 255, (40, 20, 4))       # what lies under full transparency is arbitrary
    pixels[:, :10, 3] = 0
    options = {}
    if mode == "RGBA":
        image = Image.fromarray(pixels)
        a = pixels[..., 3:] / 255
        truth = pixels[..., :3] * a + 255 * (1 - a)
    elif mode == "LA":
        image = Image.fromarray(pixels[..., [0, 3]])
        a = pixels[..., 3:] / 255
        truth = (pixels[..., :1] * a + 255 * (1 - a)).repeat(3, -1)
    else:                                                   # one colour is transparent
        image = smooth().quantize(8) if mode == "P" else smooth()
        truth = np.array(image.convert("RGB")).astype(float)
        key = np.array(image)[20, 30]
        truth[(np.array(image) == key).reshape(40, 48, -1).all(-1)] = 255
        options = dict(transparency=int(key) if mode == "P" else tuple(int(v) for v in key))
    image.save(tmp_path / "x.png", **options)
    Image.fromarray(truth.round().astype(np.uint8)).save(tmp_path / "composite.png")
    assert (read(tmp_path / "x.png", 40).int() - read(tmp_path / "composite.png", 40).int()).abs().max() <= 1


def test_sixteen_bits_and_floats_are_scaled_by_their_range_and_never_clipped(tmp_path):
    ramp = np.mgrid[0:40, 0:40][1] / 39                     # 0 .. 1 from left to right
    Image.fromarray((ramp * 255).round().astype(np.uint8)).save(tmp_path / "truth.png")
    truth = read(tmp_path / "truth.png").int()
    kinds = {"16.png": (ramp * 65535).astype(np.uint16), "16.tif": (ramp * 65535).astype(np.uint16),
             "unit.tif": ramp.astype(np.float32), "255.tif": (ramp * 255).astype(np.float32),
             "65535.tif": (ramp * 65535).astype(np.float32), "int.tif": (ramp * 65535).astype(np.int32),
             "int255.tif": (ramp * 255).astype(np.int32), "signed.tif": (ramp * 9 - 4.5).astype(np.float32)}
    for name, values in kinds.items():
        Image.fromarray(values).save(tmp_path / name)
        assert (read(tmp_path / name).int() - truth).abs().max() <= 1, name
    dark = tmp_path / "dark.png"                            # half of the range stays half as bright
    Image.fromarray((ramp * 32767).astype(np.uint16)).save(dark)
    assert (read(dark).int() - truth // 2).abs().max() <= 1
    holes = ramp.astype(np.float32)
    holes[0, 0] = np.nan
    Image.fromarray(holes).save(tmp_path / "nan.tif")
    assert (read(tmp_path / "nan.tif").int() - truth).abs().max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "HSV"])
def test_every_mode_of_pillow_becomes_rgb(tmp_path, mode):
    image = smooth()
    if mode == "LAB":
        profiles = reading.ImageCms.createProfile("sRGB"), reading.ImageCms.createProfile("LAB")
        image = reading.ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    else:
        image = image.convert(mode)
    pixels = np.array(reading.upright_rgb(image)).astype(int)
    truth = np.array(smooth()).astype(int)
    if mode in ("1", "L"):                                  # has lost its colours
        truth = (truth @ [0.299, 0.587, 0.114])[..., None].repeat(3, -1)
    assert pixels.shape == (40, 48, 3)
    if mode == "1":                                         # black and white dots, right on average
        assert set(pixels.flatten()) == {0, 255} and abs(pixels.mean() - truth.mean()) < 3
    else:
        assert abs(pixels - truth).max() <= {"L": 1, "P": 50, "LAB": 20}.get(mode, 8)


def test_content_decides_and_not_the_name(tmp_path):
    truth = smooth()
    truth.save(tmp_path / "truth.png")
    for format, name in (("PNG", "a.jpg"), ("GIF", "b.jpg"), ("BMP", "c.png"), ("TIFF", "d"),
                         ("JPEG", "e.jfif"), ("AVIF", "f.avif"), ("MPO", "g.jpg"), ("WEBP", "h.gif")):
        truth.save(tmp_path / name, format=format)
        assert (read(tmp_path / name).int() -
                read(tmp_path / "truth.png").int()).abs().float().mean() < 6, name


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path):
    smooth(800, 600).save(tmp_path / "x.jpg", quality=95)
    whole = reading.centre_crop(Image.open(tmp_path / "x.jpg").convert("RGB"), 32)
    assert reading.open_picture((tmp_path / "x.jpg").read_bytes(), least=64).size == (100, 75)
    assert np.abs(read(tmp_path / "x.jpg", 32).permute(1, 2, 0).numpy().astype(int) - whole).max() <= 3


def test_a_line_of_pixels_takes_no_memory():
    assert reading.centre_crop(Image.new("RGB", (65000, 1), "red"), 64).shape == (64, 64, 3)


# ---- What is a class ------------------------------------------------------------------------------

def folders(root, *names, n=12):
    """n pictures in each of the named folders; "cat:3" has 3."""
    for k, name in enumerate(names):
        name, _, count = name.partition(":")
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(int(count or n)):
            smooth(18, 16, k % 3).save(root / name / f"{i:03d}.png")
    return root


def found(path, split="train", **options):
    """-> {class: how many images}."""
    s = data.load(str(path), 8, split, **options)
    return {name: int((s.labels == k).sum()) for k, name in enumerate(s.classes)}


CAT_DOG = {"cat": 11, "dog": 11}
ONE_OF_EACH = {"cat": 1, "dog": 1}


@pytest.mark.parametrize("around", ["", "pets/", "home/me/pets/", "train/"])
def test_folders_around_the_class_folders_do_not_matter(tmp_path, around):
    root = folders(tmp_path / "d", around + "cat", around + "dog")
    assert found(root) == CAT_DOG and found(root, "val") == ONE_OF_EACH


@pytest.mark.parametrize("train, val", [("train", "val"), ("Training", "Testing"), ("TRAIN", "Validation"),
                                        ("train", "valid"), ("seg_train/seg_train", "seg_test/seg_test"),
                                        ("x/train", "x/dev"), ("train_images", "test_images")])
def test_splits_are_known_in_any_spelling(tmp_path, train, val):
    root = folders(tmp_path, f"{train}/cat", f"{train}/dog", f"{val}/cat:3", f"{val}/dog:2")
    assert found(root) == {"cat": 12, "dog": 12} and found(root, "val") == {"cat": 3, "dog": 2}


def test_a_class_may_be_named_train(tmp_path):
    root = folders(tmp_path, "bus", "car", "train")
    assert found(root) == {"bus": 11, "car": 11, "train": 11} == {k: 11 for k in found(root, "val")}
    folders(root, "test tube")
    assert len(found(root)) == 4


def test_a_test_folder_without_classes_is_left_out_with_a_word(tmp_path):
    root = folders(tmp_path, "train/cat", "train/dog", "test")
    assert found(root) == CAT_DOG and found(root, "val") == ONE_OF_EACH
    assert "left out: 12 images in test/ without the class folders of train/" in data.load(str(root),
                                                                                           8).summary


def test_a_class_that_only_val_has_is_left_out_with_a_word(tmp_path):
    root = folders(tmp_path, "train/cat", "train/dog", "val/cat:3", "val/emu:4")
    assert found(root, "val") == {"cat": 3, "dog": 0}
    assert "left out: 4 images in val/ of classes that no training image has" in data.load(str(root),
                                                                                           8).summary


@pytest.mark.parametrize("where", ["", "photos", "train"])
def test_a_flat_folder_is_one_class(tmp_path, where):
    root = folders(tmp_path / "d", where, n=24)
    name = "photos" if where == "photos" else "images"
    assert found(root) == {name: 22} and found(root, "val") == {name: 2}
    for f in root.rglob("*.png"):
        f.with_suffix(".txt").write_text(f"number {f.stem}")
    assert data.load(str(root), 8, "val").texts == ["number 009", "number 019"]


def test_small_classes_are_held_out_over_the_whole_set(tmp_path):
    root = folders(tmp_path, *[f"person{k:02d}" for k in range(20)], n=5)
    train, val = found(root), found(root, "val")
    assert min(train.values()) >= 3 and sum(val.values()) == 8 and sum(train.values()) == 92
    root = folders(tmp_path / "few", "a:2", "b:1")
    assert found(root) == {"a": 1, "b": 1} and found(root, "val") == {"a": 1, "b": 0}


def test_links_to_class_folders_are_followed_and_loops_are_not(tmp_path):
    store = folders(tmp_path / "store", "cat", "dog")
    (tmp_path / "set").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).symlink_to(store / name)
    assert found(tmp_path / "set") == CAT_DOG
    assert found(tmp_path) == CAT_DOG                       # both at once: each picture counts once
    (store / "cat" / "loop").symlink_to("..")
    (store / "dog" / "gone.png").symlink_to("nowhere")
    assert found(store) == CAT_DOG
    assert "1 broken links" in data.load(str(store), 8).summary


def test_archives_lead_to_the_same_classes_whatever_their_paths(tmp_path):
    tree = folders(tmp_path / "d", "cat", "dog")
    reference = data.load(str(tree), 8)
    for i, prefix in enumerate(("./", "/home/u/", "../", "data\\", "a/b/", "C:\\pets\\")):
        for kind in ("zip", "tar", "tar.gz", "tar.xz", "tar.bz2"):
            if "\\" in prefix and kind != "zip":
                continue
            path = tmp_path / f"{i}.{kind}"
            names = {f: prefix + "/".join(f.relative_to(tree).parts) for f in sorted(tree.rglob("*.png"))}
            if kind == "zip":
                with zipfile.ZipFile(path, "w") as z:
                    for f, name in names.items():
                        z.writestr(name.replace("/", "\\") if "\\" in prefix else name, f.read_bytes())
                    z.writestr("__MACOSX/data/._x.png", b"\0\5\x16\7")
            else:
                with tarfile.open(path, "w:" + kind.partition(".")[2]) as t:
                    for f, name in names.items():
                        add(t, name, f.read_bytes())
            s = data.load(str(path), 8)
            assert s.classes == ["cat", "dog"] and torch.equal(s.images, reference.images), path


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def test_what_is_left_out_is_said_and_a_class_that_cannot_be_read_is_refused(tmp_path):
    root = folders(tmp_path, "cat", "dog")
    (root / "cat" / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    (root / "cat" / "b.svg").write_text("<svg/>")
    (root / "labels").mkdir()
    (root / "labels" / "x.csv").write_text("a,b")
    (root / "cat" / ".DS_Store").write_bytes(b"x")
    (root / "__MACOSX").mkdir()
    summary = data.load(str(root), 8).summary
    assert "24 images in 2 classes: cat (12), dog (12)" in summary
    assert "22 to learn from, 2 held out" in summary
    assert ".heic (read by the optional package pillow-heif)" in summary
    assert "1 .svg" in summary and "1 .csv" in summary
    assert "22 are not square" in summary and "DS_Store" not in summary
    (root / "emu").mkdir()
    (root / "emu" / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    with pytest.raises(data.BadInput, match="emu holds no image that can be read here, only .heic"):
        data.load(str(root), 8)


# ---- Arrays -------------------------------------------------------------------------------------

def array_set(path, **arrays):
    np.savez(path, **arrays)
    return found(path)


def test_arrays_hold_out_a_tenth_of_each_class_and_name_classes_by_their_labels(tmp_path):
    x = np.random.RandomState(0).randint(0, 255, (100, 8, 8, 3), np.uint8)
    turn = np.arange(100) % 10
    path = tmp_path / "x.npz"
    assert array_set(path, images=x, labels=turn) == {str(k): 9 for k in range(10)}
    assert found(path, "val") == {str(k): 1 for k in range(10)}
    halves = np.arange(100) % 2
    assert array_set(path, images=x, labels=halves[:, None]) == {"0": 45, "1": 45}
    assert array_set(path, images=x, labels=halves.astype(float)) == {"0": 45, "1": 45}
    assert array_set(path, images=x, labels=np.array(["b", "a"])[halves]) == {"a": 45, "b": 45}
    assert array_set(path, images=x, labels=2 * halves, classes=np.array(["cat", "dog",
                                                                          "emu"])) == {"cat": 45, "emu": 45}
    assert array_set(path, images=x, labels=halves + 1, classes=np.array(["cat",
                                                                          "dog"])) == {"cat": 45, "dog": 45}
    assert array_set(path, images=x) == {"images": 90}
    assert array_set(path, arr_0=x, arr_1=halves) == {"0": 45, "1": 45}
    np.save(tmp_path / "x.npy", x)
    assert found(tmp_path / "x.npy") == {"images": 90}


def test_arrays_come_in_several_shapes_and_with_their_own_validation_set(tmp_path):
    x = np.random.RandomState(0).randint(0, 255, (40, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=x)
    np.savez(tmp_path / "b.npz", images=x.transpose(0, 3, 1, 2))
    a, b = (data.load(str(tmp_path / name), 8).images for name in ("a.npz", "b.npz"))
    assert torch.equal(a, b) and np.array_equal(a[0].permute(1, 2, 0).numpy(), x[0])
    np.savez(tmp_path / "c.npz", x_train=x[..., 0], y_train=np.arange(40) % 2, x_test=x[:6, ..., 0],
             y_test=np.arange(6) % 3)
    assert found(tmp_path / "c.npz") == {"0": 20, "1": 20} and found(tmp_path / "c.npz",
                                                                     "val") == {"0": 2, "1": 2}
    np.savez(tmp_path / "d.npz", images=x, labels=np.where(np.arange(40) == 3, np.nan, np.arange(40) % 2))
    with pytest.raises(data.BadInput, match=r"`labels`\[3\] is not a number"):
        data.load(str(tmp_path / "d.npz"), 8)
    assert found(tmp_path / "d.npz", skip_bad=True) == {"0": 18, "1": 18}


@pytest.mark.parametrize(
    "labels",
    [np.zeros((20, 5)), np.array(3),
     np.arange(7), np.arange(20) / 2,
     np.arange(20) * 1j])
def test_labels_of_other_shapes_are_refused(tmp_path, labels):
    np.savez(tmp_path / "x.npz", images=np.zeros((20, 8, 8, 3), np.uint8), labels=labels)
    with pytest.raises(data.BadInput, match="`labels` must be "):
        data.load(str(tmp_path / "x.npz"), 8)


def test_arrays_that_lie_or_are_empty_are_refused(tmp_path):
    path = tmp_path / "x.npz"

    def refused(words):
        with pytest.raises(data.BadInput, match=words) as caught:
            data.load(str(path), 8)
        assert "\n" not in str(caught.value)
    np.savez(path)
    refused("needs the array `images`.* it holds nothing")
    np.savez(path, images=np.zeros((20, 8, 0, 3), np.uint8))
    refused("not .20, 8, 0, 3. uint8")
    np.savez(path, images=np.zeros((20, 8, 8, 3), np.uint8), labels=np.arange(20) % 4,
             classes=np.array(["a", "b"]))
    refused("`classes` has 2 names, but the labels go from 0 to 3")
    np.savez(path, images=np.array([1, "a", None], dtype=object))
    refused("not a readable .npz")
    path.write_text("no zip")
    refused("not a readable .npz")
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.zeros((20, 8, 8, 3), np.uint8))
    with zipfile.ZipFile(path, "w") as z:                   # a header that promises more than there is
        z.writestr("images.npy",
                   buffer.getvalue().replace(b"(20, 8, 8, 3), }  ", b"(90, 800, 8, 3), }")[:buffer.tell()])
    refused("not a readable .npz")


# ---- Faults, captions, cache ------------------------------------------------------------------------

def test_skip_bad_holds_for_folders_streams_and_archives(tmp_path, capsys):
    root = folders(tmp_path / "d", "cat", "dog")
    (root / "cat" / "003.png").write_bytes(b"")
    (root / "dog" / "004.png").write_text("<html>404</html>")
    with pytest.raises(data.BadInput,
                       match=r"cat/003.png: not a readable image \(the file is empty\).*\(2 of 22 files"):
        data.load(str(root), 8)
    whole = data.load(str(root), 8, skip_bad=True)
    assert found(root, skip_bad=True) == {"cat": 10, "dog": 10}
    assert "left out 2 unreadable images, the first is " in capsys.readouterr().out
    stream = data.load(str(root), 8, skip_bad=True, max_bytes=0)
    index = torch.arange(20)
    assert torch.equal(stream.batch(index)[0],
                       whole.batch(index)[0]) and torch.equal(stream.labels, whole.labels)
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as z:
        for f in sorted(root.rglob("*.png")):
            z.write(f, f.relative_to(root))
    assert found(tmp_path / "d.zip", skip_bad=True) == {"cat": 10, "dog": 10}
    content = bytearray((tmp_path / "d.zip").read_bytes())
    content[content.find(b"IDAT") + 9] ^= 255               # a wrong checksum in the archive
    (tmp_path / "d.zip").write_bytes(bytes(content))
    with pytest.raises(data.BadInput, match="Bad CRC-32"):
        data.load(str(tmp_path / "d.zip"), 8)
    assert found(tmp_path / "d.zip", skip_bad=True) == {"cat": 9, "dog": 10}


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_a_damaged_archive_is_a_sentence_wherever_it_is_damaged(tmp_path, kind):
    root = folders(tmp_path / "d", "cat", "dog", n=3)
    path = tmp_path / f"x.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as z:
            for f in sorted(root.rglob("*.png")):
                z.write(f, f.relative_to(root))
    else:
        with tarfile.open(path, "w:" + kind.partition(".")[2]) as t:
            t.add(root, arcname=".")
    whole = path.read_bytes()
    rng = np.random.RandomState(0)
    for i in range(60):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 5, 40))):
            content[rng.randint(len(content))] = rng.randint(256)
        path.write_bytes(bytes(content if i % 4 else content[:rng.randint(len(content))]))
        for skip_bad in (False, True):
            try:
                data.load(str(path), 8, skip_bad=skip_bad)
            except data.BadInput as e:
                assert "\n" not in str(e) and "object at" not in str(e)


def test_members_that_are_no_pictures_are_not_read_into_memory(tmp_path):
    path = tmp_path / "x.tar.gz"
    root = folders(tmp_path / "d", "cat", "dog")
    with tarfile.open(path, "w:gz", compresslevel=1) as t:
        t.add(root, arcname=".")
        member = tarfile.TarInfo("cat/notes.bin")
        member.size = 64 << 20
        t.addfile(member, io.BytesIO(bytes(member.size)))
    tracemalloc.start()
    listing = list_path(path)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20 and len(listing.pictures) == 24
    tracemalloc.stop()


def test_devices_pipes_and_sizes_without_end_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path / "pipe", "neither a folder nor a regular file"), ("/dev/zero",
                                                                                     "neither a folder"),
                        ("", "names nothing"), ("a\0b", "null"), ("x" * 5000, "too long")):
        with pytest.raises(data.BadInput, match=words):
            data.load(str(path), 8)
    root = folders(tmp_path / "d", "cat", "dog")
    os.mkfifo(root / "cat" / "x.png")
    assert found(root) == CAT_DOG
    for options, words in ((dict(image_size=0), "at least 1"), (dict(image_size=10 ** 5), "GB"),
                           (dict(n_shapes=10 ** 10), "GB")):
        with pytest.raises(data.BadInput, match=words):
            data.load(**options)


def test_captions_are_read_in_any_encoding_and_a_missing_one_is_named(tmp_path):
    root = folders(tmp_path, "cat", n=10)
    texts = ["plain", "caf\u00e9", "\u732b", "two\nlines ", "a\0b", "", "b" * 100_000]
    codes = ["utf-8", "latin-1", "utf-16", "utf-8", "utf-8", "utf-8", "utf-8"]
    for i, (text, code) in enumerate(zip(texts, codes)):
        (root / "cat" / f"{i:03d}.txt").write_bytes(text.encode(code))
    (root / "cat" / "007.txt").write_bytes(b"\xef\xbb\xbfmarked")
    s = data.load(str(root), 8)
    assert s.texts is None and s.without_text == ["cat/008.png"]
    assert "8 of 9 have a caption, cat/008.png has none" in s.summary
    (root / "cat" / "008.TXT").write_text("last")
    s = data.load(str(root), 8)
    assert s.texts[:6] == ["plain", "caf\u00e9", "\u732b", "two lines", "a b", ""
                           ] and s.texts[7:] == ["marked", "last"]
    assert len(s.texts[6]) == 1 << 16


def test_odd_names_can_be_printed(tmp_path):
    root = folders(tmp_path, "a\nb", "c")
    os.rename(root / "c", os.fsencode(root) + b"/caf\xe9")
    s = data.load(str(root), 8)
    assert s.classes == ["a\\nb", "caf\\xe9"]
    assert s.summary.encode("utf-8") and "caf\\xe9 (12)" in s.summary


def test_decoded_images_are_kept_until_a_file_changes(tmp_path, monkeypatch):
    root = folders(tmp_path / "d", "cat", "dog")
    cache = tmp_path / "runs" / "cache"
    clock = itertools.count()
    monkeypatch.setattr(files.time, "perf_counter", lambda: float(next(clock)))      # as if reading took long
    first = data.load(str(root), 8, cache=cache)
    kept = list(cache.iterdir())
    assert len(kept) == 1 and kept[0].suffix == ".pt"

    def decoding(*_):
        raise AssertionError("decoded again")
    monkeypatch.setattr(files, "decode_images", decoding)
    again = data.load(str(root), 8, cache=cache)
    assert torch.equal(again.images, first.images) and again.summary == first.summary
    monkeypatch.undo()
    smooth(18, 16, 2).save(root / "cat" / "000.png")
    changed = data.load(str(root), 8, cache=cache)
    assert not torch.equal(changed.images[0], first.images[0]) and torch.equal(
        changed.images[1:], first.images[1:])
    os.remove(root / "cat" / "001.png")
    assert len(data.load(str(root), 8, cache=cache)) == 21
    folders(root, "cat", "dog")
    content = bytearray(kept[0].read_bytes())
    content[len(content) // 2] ^= 1                         # bit rot
    kept[0].write_bytes(bytes(content))
    assert torch.equal(data.load(str(root), 8, cache=cache).images, first.images)


def test_a_set_on_the_device_is_indexed_there_whatever_its_name():
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    s = data.ImageSet(images, torch.arange(4), "abcd", "cpu")
    assert s.beside_labels and s.batch(torch.tensor([2]))[1].tolist() == [2]
    meta = data.ImageSet(images.to("meta"), torch.arange(4), "abcd", "meta")
    assert meta.beside_labels and meta.batch(torch.tensor([2]))[0].is_meta
    assert not data.ImageSet(images, torch.arange(4), "abcd", "meta").beside_labels


def test_data_py_shows_a_set_of_ones_own(tmp_path, monkeypatch, capsys):
    root = folders(tmp_path / "d", "cat", "dog")
    for f in (root / "dog").iterdir():
        Image.open(f).save(f.with_suffix(".avif"))
        f.unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data.py", "--data", "d", "--image_size", "8"])
    data.main()
    assert "d: 24 images in 2 classes: cat (12), dog (12)" in capsys.readouterr().out
    assert Image.open(tmp_path / "data.png").width > 100
