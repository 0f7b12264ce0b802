"""Tests of files: what may lie in a folder, an archive or an array, and what comes of it."""
import io
import os
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
from common import files


def photo(k=0, width=48, height=40):
    """A smooth picture whose colours tell k, and whose brightness tells which way up it is."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., k % 3] = 40 + 200 * x / (width - 1)
    pixels[..., (k + 1) % 3] = 200 * y / (height - 1)
    return Image.fromarray(pixels)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def tree(root, classes=("cat", "dog"), n=12, ending="png"):
    """root/<class>/000.png ... -> root."""
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            photo(k).save(root / name / f"{i:03d}.{ending}")
    return root


def both(path, image_size=8, **options):
    return [data.load(str(path), image_size, split, **options) for split in ("train", "val")]


def sizes(path):
    """The classes, and how many images are learnt from and held out."""
    train_set, val_set = both(path)
    return train_set.classes, len(train_set), len(val_set)


def refused(path, words, **options):
    with pytest.raises(data.BadInput, match=words) as caught:
        both(path, **options)
    assert "\n" not in str(caught.value) and "Error" not in str(caught.value) and "<" not in str(caught.value)


def read(content, image_size=40, name="a.png"):
    return files.read_image(name, lambda: content, image_size)


# ---- One picture ---------------------------------------------------------------------------------

@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_all_eight_exif_orientations_give_the_same_picture(format):
    lossless = dict(JPEG=dict(quality=100, subsampling=0), WEBP=dict(lossless=True)).get(format, {})
    flat = np.asarray(photo(0, 6, 4)).repeat(16, 0).repeat(16, 1)          # whole blocks: turned, a JPEG stays itself
    upright = Image.fromarray(flat)
    T = Image.Transpose
    stored = {1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE,
              6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}
    expected = read(encoded(upright, format, **lossless), 64)
    for orientation, how in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = upright.transpose(how) if how is not None else upright
        assert torch.equal(read(encoded(turned, format, exif=exif, **lossless), 64), expected), orientation


def test_what_lies_under_transparency_is_white():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 40, 4), dtype=np.uint8)
    alpha = pixels[..., 3:] / 255
    white = np.round(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    got = read(encoded(Image.fromarray(pixels))).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(got - white).max() <= 1
    pixels[..., 3] = np.where(pixels[..., 3] < 128, 0, 255)
    white = np.where(pixels[..., 3:] > 0, pixels[..., :3], 255)
    assert torch.equal(read(encoded(Image.fromarray(pixels))), read(encoded(Image.fromarray(white.astype(np.uint8)))))


def test_a_transparent_colour_of_a_palette_or_of_grey_is_white():
    index = Image.fromarray((np.mgrid[0:40, 0:40][1] // 20).astype(np.uint8), "P")
    index.putpalette([255, 0, 0, 0, 0, 255])
    got = read(encoded(index, transparency=0))
    assert (got[:, :, :20] == 255).all() and got[:, 0, 30].tolist() == [0, 0, 255]
    grey = Image.fromarray(np.full((40, 40), 7, np.uint8))
    assert (read(encoded(grey, transparency=7)) == 255).all()
    both_bands = Image.merge("LA", [grey, Image.new("L", (40, 40), 0)])
    assert (read(encoded(both_bands)) == 255).all()


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bits_are_scaled_by_their_range_and_not_clipped(format):
    values = (np.mgrid[0:40, 0:40][1] * 1680).astype(np.uint16)            # 0 .. 65520
    got = read(encoded(Image.fromarray(values), format))
    assert torch.equal(got[0], torch.from_numpy((values / 65535 * 255).round().astype(np.uint8)))
    assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])


@pytest.mark.parametrize("low, high, white", [(0, 1, 1), (0, 200, 255), (0, 60_000, 65_535), (-3, 5, None)])
def test_floats_are_scaled_by_0_to_1_or_255_or_65535_or_else_by_their_own_range(low, high, white):
    values = np.linspace(low, high, 1600, dtype=np.float32).reshape(40, 40)
    got = read(encoded(Image.fromarray(values), "TIFF"))[0].numpy()
    expected = values / white if white else (values - low) / (high - low)
    assert np.abs(got - expected * 255).max() <= 0.51


def test_floats_that_are_not_finite_do_not_spoil_a_picture():
    values = np.linspace(0, 1, 1600, dtype=np.float32).reshape(40, 40)
    values[0, 0] = np.nan
    values[0, 1] = np.inf
    got = read(encoded(Image.fromarray(values), "TIFF"))[0].numpy()
    assert got[0, 0] == 0 and got[0, 1] == 255 and np.abs(got[1:] - values[1:] * 255).max() <= 0.51


@pytest.mark.parametrize("format", ["GIF", "WEBP", "BMP", "TIFF", "PNG"])
def test_a_file_is_judged_by_its_content_and_not_by_its_ending(format):
    content = encoded(photo(), format)
    assert torch.equal(read(content, name="a.jpg"), read(content, name=f"a.{format.lower()}"))


@pytest.mark.parametrize("mode", ["CMYK", "L", "1", "YCbCr", "P"])
def test_other_modes_become_rgb_as_pillow_converts_them(mode):
    image = photo(0, 40, 40).convert(mode)
    format = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    expected = np.asarray(Image.open(io.BytesIO(encoded(image, format))).convert("RGB"))
    assert np.array_equal(read(encoded(image, format)).permute(1, 2, 0).numpy(), expected)


def test_a_large_jpeg_is_decoded_small_and_looks_the_same():
    image = photo(0, 1600, 1200)
    content = encoded(image, "JPEG", quality=95)
    small = files.open_picture(content, "a.jpg", 64)
    assert small.size == (200, 150) and files.open_picture(content, "a.jpg").size == (1600, 1200)
    whole = files.centre_crop(files.open_picture(content, "a.jpg"), 32).astype(int)
    assert np.abs(files.centre_crop(small, 32).astype(int) - whole).max() <= 3


@pytest.mark.parametrize("content, words", [
    (b"", "the file is empty"), (b"<html>404</html>", "no picture that Pillow knows"),
    (encoded(photo(0, 200, 200), "JPEG")[:900], "truncated"),
    (encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), np.uint8)))[:5000], "truncated"),
])
def test_an_unreadable_picture_is_a_sentence_or_left_out(tmp_path, capsys, content, words):
    tree(tmp_path / "t")
    (tmp_path / "t" / "cat" / "005.png").write_bytes(content)
    refused(tmp_path / "t", f"cat/005.png: not a readable image .*{words}.*--skip_bad")
    train_set, val_set = both(tmp_path / "t", skip_bad=True)
    assert len(train_set) == 21 and len(val_set) == 2
    assert "left out 1 unreadable images" in capsys.readouterr().out
    assert "left out by --skip_bad: 1" in data.describe(train_set, val_set)
    streamed = data.load(str(tmp_path / "t"), 8, skip_bad=True, max_bytes=0)
    index = torch.arange(21)
    assert torch.equal(streamed.batch(index)[0], train_set.batch(index)[0])
    assert torch.equal(streamed.labels, train_set.labels)


def test_a_picture_of_more_pixels_than_pillow_allows_is_a_sentence(tmp_path, monkeypatch):
    tree(tmp_path / "t")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    refused(tmp_path / "t", "not a readable image .more than 0 million pixels")


def test_a_line_of_pixels_does_not_grow_into_a_large_picture():
    assert files.centre_crop(Image.new("RGB", (60_000, 1)), 16).shape == (16, 16, 3)


# ---- What is a class -----------------------------------------------------------------------------

@pytest.mark.parametrize("wrapping", ["", "pets", "a/b/c", "images/archive"])
def test_folders_around_the_class_folders_do_not_count(tmp_path, wrapping):
    tree(tmp_path / "t" / wrapping)
    assert sizes(tmp_path / "t") == (["cat", "dog"], 22, 2)


@pytest.mark.parametrize("train, val", [("train", "val"), ("Training", "Testing"), ("TRAIN", "Valid"),
                                        ("train", "validation"), ("seg_train", "seg_test"), ("x/train", "x/test")])
def test_two_splits_have_many_names_in_any_case(tmp_path, train, val):
    tree(tmp_path / "t" / train), tree(tmp_path / "t" / val, n=4)
    assert sizes(tmp_path / "t") == (["cat", "dog"], 24, 8)


def test_val_counts_before_test_and_the_other_is_named(tmp_path):
    for split, n in (("train", 12), ("val", 3), ("test", 2)):
        tree(tmp_path / "t" / split, n=n)
    train_set, val_set = both(tmp_path / "t")
    assert (len(train_set), len(val_set)) == (24, 6)
    assert "left out: 4 images in test/" in data.describe(train_set, val_set)


@pytest.mark.parametrize("inside", ["", "test", "unknown"])
def test_a_test_folder_without_classes_is_left_out_and_a_tenth_held_out(tmp_path, inside):
    tree(tmp_path / "t" / "train")
    unlabelled = tmp_path / "t" / "test" / inside
    unlabelled.mkdir(parents=True)
    for i in range(5):
        photo(i).save(unlabelled / f"{i}.png")
    train_set, val_set = both(tmp_path / "t")
    assert train_set.classes == ["cat", "dog"] and (len(train_set), len(val_set)) == (22, 2)
    assert "left out: 5 images in test/" in data.describe(train_set, val_set)


def test_classes_may_be_named_train_or_test(tmp_path):
    tree(tmp_path / "a", ("bus", "car", "train"))
    assert sizes(tmp_path / "a") == (["bus", "car", "train"], 33, 3)
    tree(tmp_path / "b" / "train", ("train", "val")), tree(tmp_path / "b" / "val", ("train", "val"), n=3)
    assert sizes(tmp_path / "b") == (["train", "val"], 24, 6)


def test_a_flat_folder_of_photos_is_one_class(tmp_path):
    for where in ("a", "b/train"):
        (tmp_path / where).mkdir(parents=True)
        for i in range(20):
            photo(i).save(tmp_path / where / f"IMG_{i:04d}.JPG")
    assert sizes(tmp_path / "a") == (["images"], 18, 2)
    assert sizes(tmp_path / "b") == (["images"], 18, 2)


def test_classes_of_five_images_are_learnt_whole_but_for_a_tenth_of_all(tmp_path):
    tree(tmp_path / "t", [f"person{k:02d}" for k in range(20)], 5)
    train_set, val_set = both(tmp_path / "t")
    assert len(train_set) + len(val_set) == 100 and 6 <= len(val_set) <= 12
    assert len(train_set.labels.unique()) == 20 and len(val_set.labels.unique()) > 5


def test_a_class_of_one_image_is_learnt_and_not_held_out(tmp_path):
    tree(tmp_path / "t"), tree(tmp_path / "t", ("rare",), 1)
    train_set, val_set = both(tmp_path / "t")
    assert train_set.classes == ["cat", "dog", "rare"]
    assert train_set.labels.bincount().tolist() == [11, 11, 1] and val_set.labels.bincount().tolist() == [1, 1]


def test_every_tenth_of_a_class_is_held_out_and_no_image_twice(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "t" / name).mkdir(parents=True)
        for i in range(30):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(tmp_path / "t" / name / f"{i:03d}.png")
    train_set, val_set = both(tmp_path / "t")
    ninth = torch.from_numpy(np.array(Image.open(tmp_path / "t" / "cat" / "009.png"))).permute(2, 0, 1)
    assert torch.equal(val_set.images[0], ninth) and len(val_set) == 6
    rows = [image.numpy().tobytes() for image in [*train_set.images, *val_set.images]]
    assert len(set(rows)) == 60


def test_links_to_class_folders_and_files_are_followed_and_loops_are_not(tmp_path):
    tree(tmp_path / "store")
    (tmp_path / "a").mkdir(), (tmp_path / "b" / "set" / "cat").mkdir(parents=True)
    for name in ("cat", "dog"):
        os.symlink(tmp_path / "store" / name, tmp_path / "a" / name)
    assert sizes(tmp_path / "a") == (["cat", "dog"], 22, 2)
    os.symlink(tmp_path / "store", tmp_path / "whole")
    assert sizes(tmp_path / "whole") == (["cat", "dog"], 22, 2)
    tree(tmp_path / "b" / "store")
    for file in (tmp_path / "b" / "store" / "cat").iterdir():
        os.symlink(file, tmp_path / "b" / "set" / "cat" / file.name)
    os.symlink(tmp_path / "b" / "store" / "dog", tmp_path / "b" / "set" / "dog")
    assert sizes(tmp_path / "b") == (["cat", "dog"], 22, 2), "links beside the store that they show"
    os.symlink("..", tmp_path / "store" / "cat" / "loop")
    os.symlink("../dog", tmp_path / "store" / "cat" / "other"), os.symlink("../cat", tmp_path / "store" / "dog" / "other")
    os.symlink("nowhere.jpg", tmp_path / "store" / "cat" / "gone.jpg")
    assert sizes(tmp_path / "store") == (["cat", "dog"], 22, 2), "links among the classes"


def test_what_systems_leave_behind_is_passed_over(tmp_path):
    root = tree(tmp_path / "t")
    for name in (".DS_Store", "cat/._000.png", "cat/Thumbs.db", "dog/desktop.ini"):
        (root / name).write_bytes(b"\0\5\x16\7")
    for folder in (".ipynb_checkpoints", "cat/.ipynb_checkpoints", "__MACOSX"):
        (root / folder).mkdir()
        (root / folder / "000.png").write_bytes(b"no picture")
    train_set, val_set = both(root)
    assert sizes(root) == (["cat", "dog"], 22, 2) and "left out" not in data.describe(train_set, val_set)


def test_what_is_left_out_is_told_with_the_reason(tmp_path):
    root = tree(tmp_path / "t")
    (root / "cat" / "a.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    (root / "cat" / "a.svg").write_text("<svg/>")
    (root / "labels.csv").write_text("a,b")
    os.mkfifo(root / "cat" / "pipe.png")
    text = data.describe(*both(root))
    for words in ("1 .heic (read by the optional package pillow-heif)", "1 .svg (convert to PNG or JPEG)",
                  "1 .csv (no picture)", "1 devices and pipes"):
        assert words in text
    photo().save(root / "cat" / "no_ending", "PNG"), photo().save(root / "cat" / "a.jfif", "JPEG")
    assert sizes(root) == (["cat", "dog"], 24, 2), "pictures under rare endings are read"


def test_the_summary_tells_images_classes_and_what_is_held_out(tmp_path):
    assert data.describe(*both(tree(tmp_path / "t"))).splitlines()[0].endswith(
        "24 images in 2 classes: cat (12), dog (12)")
    text = data.describe(*both(tmp_path / "t"))
    assert "22 to learn from, 2 held out (every tenth of each class)" in text
    assert "not square: 24, of which the middle square is taken" in text
    text = data.describe(data.load(image_size=8, n_shapes=30), data.load(image_size=8, split="val", n_shapes=20))
    assert "10 classes: disc, triangle" in text and "30 to learn from, 20 held out" in text


@pytest.mark.parametrize("make, words", [
    (lambda r: r.mkdir(), "no images in it"),
    (lambda r: (tree(r), (r / "emu").mkdir()), "the class folder emu holds no image: fill it or remove it"),
    (lambda r: (tree(r), photo().save(r / "loose.png")), "loose.png lies in no class folder: put the images into"),
    (lambda r: tree(r, ("cat",), 1), "too few to hold out one"),
    (lambda r: tree(r, ("cat", "dog", "emu"), 1), "too few to hold out one"),
    (lambda r: photo().save(r, "PNG"), "neither a folder"),
    (os.mkfifo, "neither a folder nor a regular file"),
    (lambda r: None, "no such file or folder"),
])
def test_a_set_that_cannot_be_is_a_sentence(tmp_path, make, words):
    make(tmp_path / "t")
    refused(tmp_path / "t", words)


def test_names_are_printable_whatever_the_disk_holds(tmp_path):
    names = [os.fsencode("été 猫"), b"bad\xff", b"new\nline"]
    for name in names:
        folder = os.path.join(os.fsencode(tmp_path / "t"), name)
        os.makedirs(folder)
        for i in range(10):
            with open(os.path.join(folder, b"%d.png" % i), "wb") as f:
                f.write(encoded(photo()))
    classes, learnt, held_out = sizes(tmp_path / "t")
    assert (learnt, held_out) == (27, 3) and "été 猫" in classes
    assert all(name.isprintable() and name.encode() for name in classes)


# ---- Captions ------------------------------------------------------------------------------------

def test_captions_stand_beside_the_images(tmp_path):
    root = tree(tmp_path / "t")
    for file in root.rglob("*.png"):
        file.with_suffix(".txt").write_text(f"a {file.parent.name}, number {int(file.stem)}\n")
    (root / "cat" / "000.txt").write_bytes(b"\xef\xbb\xbfa  cat\0with\na BOM")
    (root / "cat" / "001.txt").write_bytes("ein Kätzchen".encode("latin-1"))
    train_set, val_set = both(root)
    assert train_set.texts[:3] == ["a cat with a BOM", "ein Kätzchen", "a cat, number 2"]
    assert val_set.texts == ["a cat, number 9", "a dog, number 9"]
    assert "each has a caption" in data.describe(train_set, val_set)
    (root / "dog" / "003.txt").unlink()
    train_set, val_set = both(root)
    assert train_set.texts is None and train_set.without_text == ["dog/003.png"]
    assert "without a caption: 1, the first is dog/003.png" in data.describe(train_set, val_set)
