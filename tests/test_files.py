"""Tests of files: what may lie in a folder, an archive or an array, and what comes of it."""
import io
import os
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
from common import files, folders, reading
from tests.helpers import ROOT


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
    return reading.read_image(name, lambda: content, image_size)


# ---- One picture ---------------------------------------------------------------------------------

@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_all_eight_exif_orientations_give_the_same_picture(format):
    lossless = dict(JPEG=dict(quality=100, subsampling=0), WEBP=dict(lossless=True)).get(format, {})
    flat = np.asarray(photo(0, 6, 4)).repeat(16, 0).repeat(16, 1)  # whole blocks: turned, a JPEG stays itself
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
    white = np.where(pixels[..., 3:] > 0, pixels[..., :3], 255).astype(np.uint8)
    assert torch.equal(read(encoded(Image.fromarray(pixels))), read(encoded(Image.fromarray(white))))


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


def test_a_large_jpeg_is_decoded_small_and_looks_the_same_through_files():
    image = photo(0, 1600, 1200)
    content = encoded(image, "JPEG", quality=95)
    small = reading.open_picture(content, "a.jpg", 64)
    assert small.size == (200, 150) and reading.open_picture(content, "a.jpg").size == (1600, 1200)
    whole = reading.centre_crop(reading.open_picture(content, "a.jpg"), 32).astype(int)
    assert np.abs(reading.centre_crop(small, 32).astype(int) - whole).max() <= 3


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), np.uint8))


@pytest.mark.parametrize("content, words", [
    (b"", "the file is empty"), (b"<html>404</html>", "no picture that Pillow knows"),
    (encoded(photo(0, 200, 200), "JPEG")[:900], "truncated"),
    (encoded(NOISE)[:5000], "truncated"),
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
    assert reading.centre_crop(Image.new("RGB", (60_000, 1)), 16).shape == (16, 16, 3)


# ---- What is a class -----------------------------------------------------------------------------

@pytest.mark.parametrize("wrapping", ["", "pets", "a/b/c", "images/archive"])
def test_folders_around_the_class_folders_do_not_count(tmp_path, wrapping):
    tree(tmp_path / "t" / wrapping)
    assert sizes(tmp_path / "t") == (["cat", "dog"], 22, 2)


@pytest.mark.parametrize("train, val", [("train", "val"), ("Training", "Testing"), ("TRAIN", "Valid"),
                                        ("train", "validation"), ("seg_train", "seg_test"),
                                        ("x/train", "x/test")])
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
    assert train_set.labels.bincount().tolist() == [11, 11, 1]
    assert val_set.labels.bincount().tolist() == [1, 1]


def test_every_tenth_of_a_class_is_held_out_and_no_image_twice(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "t" / name).mkdir(parents=True)
        for i in range(30):
            pixels = rng.integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "t" / name / f"{i:03d}.png")
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
    os.symlink("../dog", tmp_path / "store" / "cat" / "other")
    os.symlink("../cat", tmp_path / "store" / "dog" / "other")
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
    drawn = data.load(image_size=8, n_shapes=30)
    text = data.describe(drawn, data.load(image_size=8, split="val", n_shapes=20))
    assert "10 classes: disc, triangle" in text and "30 to learn from, 20 held out" in text


@pytest.mark.parametrize("make, words", [
    (lambda r: r.mkdir(), "no images in it"),
    (lambda r: (tree(r), (r / "emu").mkdir()), "the class folder emu holds no image: fill it or remove it"),
    (lambda r: (tree(r), photo().save(r / "loose.png")), "loose.png lies in no class folder: put"),
    (lambda r: tree(r, ("cat",), 1), "it takes more than one image in at least one class"),
    (lambda r: tree(r, ("cat", "dog", "emu"), 1), "it takes more than one image in at least one class"),
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


def test_endings_are_known_before_the_first_picture_is_read():
    """In a fresh process: Pillow learns its formats one by one, when they are asked for.

    An empty module stands for torch, which has no part in it and takes seconds to import.
    """
    asked = ("import sys, types; sys.modules['torch'] = types.ModuleType('torch'); "
             "from common import reading; "
             "print({'.jpg', '.webp', '.avif', '.tif'} <= reading.picture_endings())")
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


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


# ---- Archives ------------------------------------------------------------------------------------

MEMBERS = [(f"{name}/{i:03d}.png", encoded(photo(k)))
           for k, name in enumerate(("cat", "dog")) for i in range(12)]


def write_zip(path, members=MEMBERS, prefix=""):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(prefix + name, content)
    return path


def write_tar(path, members=MEMBERS, prefix="", mode="w", extra=()):
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, kind, target in extra:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    return path


@pytest.mark.parametrize("prefix", ["", "./", "/home/me/", "../", "data\\pets\\", "data//pets/./"])
def test_paths_inside_archives_may_be_absolute_or_have_dots(tmp_path, prefix):
    prefix_of_tar = prefix.replace("\\", "/")
    for path in (write_zip(tmp_path / "a.zip", prefix=prefix),
                 write_tar(tmp_path / "a.tar", prefix=prefix_of_tar),
                 write_tar(tmp_path / "a.tgz", prefix=prefix_of_tar, mode="w:gz")):
        assert sizes(path) == (["cat", "dog"], 22, 2), path


@pytest.mark.parametrize("mode, name", [("w", "a.tar"), ("w:gz", "a.tar.gz"), ("w:bz2", "a.tar.bz2"),
                                        ("w:xz", "a.txz")])
def test_every_packing_of_a_tar_gives_the_images_of_the_folder(tmp_path, mode, name):
    expected = data.load(str(tree(tmp_path / "t")), 16)
    got = data.load(str(write_tar(tmp_path / name, mode=mode)), 16)
    assert torch.equal(got.images, expected.images) and torch.equal(got.labels, expected.labels)


def test_devices_in_a_tar_are_left_out_and_links_are_followed(tmp_path):
    extra = [("cat/null.png", tarfile.CHRTYPE, ""), ("dog/pipe.png", tarfile.FIFOTYPE, "")]
    path = write_tar(tmp_path / "a.tar", extra=extra)
    assert sizes(path) == (["cat", "dog"], 22, 2)
    assert "2 devices and pipes" in data.describe(*both(path))
    linked = [(f"set/{name}", tarfile.SYMTYPE, f"../store/{name}") for name in ("cat", "dog")]
    path = write_tar(tmp_path / "b.tgz", prefix="store/", mode="w:gz", extra=linked)
    assert sizes(path) == (["cat", "dog"], 22, 2)


def test_a_damaged_archive_is_a_sentence(tmp_path):
    whole = write_zip(tmp_path / "a.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:len(whole) // 2])
    refused(tmp_path / "cut.zip", "the archive is damaged .its end is missing")
    flipped = bytearray(whole)
    flipped[whole.index(b"cat/000.png") + 60] ^= 255
    (tmp_path / "crc.zip").write_bytes(flipped)
    refused(tmp_path / "crc.zip", "cat/000.png: not a readable image .*(CRC-32|packed content is damaged)")
    packed = write_tar(tmp_path / "a.tgz", mode="w:gz").read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(10, len(packed) - 1, 12):
        flipped = bytearray(packed)
        flipped[place] ^= 255
        (tmp_path / "flipped.tgz").write_bytes(flipped)
        refused(tmp_path / "flipped.tgz", "the archive is damaged|not a readable image")
        (tmp_path / "cut.tgz").write_bytes(packed[:place])
        refused(tmp_path / "cut.tgz", "the archive is damaged")


def test_members_of_a_packed_tar_that_are_no_pictures_are_not_kept(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tgz", [*MEMBERS, ("cat/table.bin", bytes(30 << 20))], mode="w:gz")
    monkeypatch.setattr(folders, "free_bytes", lambda device: 20 << 20)
    assert sizes(path) == (["cat", "dog"], 22, 2)
    assert "1 .bin (no picture)" in data.describe(*both(path))
    path = write_tar(tmp_path / "b.tgz", [*MEMBERS, ("cat/large.png", bytes(30 << 20))], mode="w:gz")
    refused(path, "its pictures do not fit into memory: unpack it")


def test_a_member_that_unpacks_to_gigabytes_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "MOST_FILE", 1 << 20)
    monkeypatch.setattr(folders.limited, "__defaults__", (1 << 20,))
    path = write_zip(tmp_path / "a.zip", [*MEMBERS, ("cat/bomb.png", bytes(2 << 20))])
    refused(path, "cat/bomb.png: not a readable image .0.0 GB are too large")


# ---- Arrays --------------------------------------------------------------------------------------

RANDOM = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 3), dtype=np.uint8)


def npz(folder, **arrays):
    np.savez(folder / "a.npz", **arrays)
    return folder / "a.npz"


def test_an_array_is_read_as_it_is(tmp_path):
    names = np.array(["cat", "dog"])
    train_set, val_set = both(npz(tmp_path, images=RANDOM, labels=np.arange(40) % 2, classes=names))
    assert train_set.classes == ["cat", "dog"] and (len(train_set), len(val_set)) == (36, 4)
    together = torch.cat([train_set.images, val_set.images]).permute(0, 2, 3, 1).reshape(40, -1)
    labels = torch.cat([train_set.labels, val_set.labels])
    rows = {bytes(row.numpy()): label for row, label in zip(together, labels.tolist())}
    assert [rows[RANDOM[i].tobytes()] for i in range(40)] == [i % 2 for i in range(40)]


@pytest.mark.parametrize("labels, classes", [
    (np.arange(40) % 10, [str(k) for k in range(10)]),  # in turn: each tenth is of one class
    (np.repeat(np.arange(4), 10), ["0", "1", "2", "3"]),
    ((np.arange(40) % 2)[:, None], ["0", "1"]),                            # a column
    (np.array(["cat", "dog"] * 20), ["cat", "dog"]),
    (np.array([b"cat", b"dog"] * 20), ["cat", "dog"]),
    ((np.arange(40) % 2).astype(float), ["0", "1"]),
    (np.arange(40) % 2 == 0, ["0", "1"]),
    (np.arange(40) % 2 - 1, ["-1", "0"]),
])
def test_labels_may_be_numbers_or_names_in_any_order(tmp_path, labels, classes):
    train_set, val_set = both(npz(tmp_path, images=RANDOM, labels=labels))
    assert train_set.classes == classes and len(train_set) + len(val_set) == 40
    assert len(train_set.labels.unique()) == len(classes)
    assert train_set.labels.bincount(minlength=len(classes)).min() >= 3


def test_a_class_name_without_images_shifts_no_other_name(tmp_path):
    names = np.array(["cat", "dog", "emu"])
    train_set, _ = both(npz(tmp_path, images=RANDOM, labels=np.arange(40) % 2 * 2, classes=names))
    assert train_set.classes == ["cat", "emu"] and set(train_set.labels.tolist()) == {0, 1}
    refused(npz(tmp_path, images=RANDOM, labels=np.arange(40) % 4, classes=names), "`classes` has 3 names")


@pytest.mark.parametrize("images", [RANDOM.transpose(0, 3, 1, 2), RANDOM[..., 0], RANDOM[..., :1],
                                    np.concatenate([RANDOM, np.full_like(RANDOM[..., :1], 255)], -1)])
def test_arrays_may_have_channels_first_one_channel_or_alpha(tmp_path, images):
    grey = images.ndim == 3 or images.shape[-1] == 1
    train_set, _ = both(npz(tmp_path, images=images, labels=np.zeros(40, int)))
    first = RANDOM[0, ..., :1].repeat(3, -1) if grey else RANDOM[0]
    assert torch.equal(train_set.images[0], torch.from_numpy(first).permute(2, 0, 1))


def test_arrays_without_labels_are_one_class_and_own_validation_arrays_count(tmp_path):
    assert sizes(npz(tmp_path, images=RANDOM)) == (["images"], 36, 4)
    np.save(tmp_path / "b.npy", RANDOM)
    assert sizes(tmp_path / "b.npy") == (["images"], 36, 4)
    mnist = dict(x_train=RANDOM[:30], y_train=np.arange(30) % 2, x_test=RANDOM[30:], y_test=np.arange(10) % 2)
    assert sizes(npz(tmp_path, **mnist)) == (["0", "1"], 30, 10)


@pytest.mark.parametrize("arrays, words", [
    (dict(images=RANDOM / 255, labels=np.arange(40) % 2), "must be .N, H, W, 3. uint8, .*save .255"),
    (dict(images=RANDOM[:0], labels=np.zeros(0, int)), "must be .N, H, W, 3. uint8"),
    (dict(images=RANDOM[:, :, :0], labels=np.arange(40) % 2), "must be .N, H, W, 3. uint8"),
    (dict(images=RANDOM, labels=np.arange(39)), "`labels` must be .40,. whole numbers or names"),
    (dict(images=RANDOM, labels=np.zeros((40, 4))), "`labels` must be .40,. whole numbers or names"),
    (dict(images=RANDOM, labels=np.linspace(0, 1, 40)), "must be whole numbers or names, not such as 0.0"),
    (dict(images=RANDOM, labels=np.where(np.arange(40) == 3, np.nan, 1.0)), "`labels`.3. is not a number"),
    (dict(images=np.array([1, "a"], dtype=object), labels=np.zeros(2)), "no arrays of numbers or words"),
    (dict(pictures=RANDOM), "needs the array `images`.*it holds pictures"),
    (dict(images=RANDOM[:1], labels=np.zeros(1, int)), "it takes more than one image in at least one class"),
])
def test_an_array_that_does_not_fit_is_a_sentence(tmp_path, arrays, words):
    refused(npz(tmp_path, **arrays), words)


def test_a_header_that_lies_is_a_sentence(tmp_path):
    header = io.BytesIO()
    lie = dict(descr="|u1", fortran_order=False, shape=(10**9, 99, 99, 3))
    np.lib.format.write_array_header_1_0(header, lie)
    (tmp_path / "b.npy").write_bytes(header.getvalue() + bytes(999))
    refused(tmp_path / "b.npy", "not a readable .npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue() + bytes(999))
    refused(tmp_path / "a.npz", "not a readable .npz")
    (tmp_path / "c.npz").write_text("not a zip")
    refused(tmp_path / "c.npz", "not a readable .npz")


# ---- Reading many --------------------------------------------------------------------------------

def test_a_set_that_was_read_once_is_kept_until_a_file_changes(tmp_path, monkeypatch):
    root = tree(tmp_path / "t", ending="jpg")
    decoded = []
    square = reading.square
    monkeypatch.setattr(files, "square", lambda name, *rest: decoded.append(name) or square(name, *rest))
    monkeypatch.setattr(files, "WORTH_KEEPING", 0.0)
    load = lambda size=8, split="train": data.load(str(root), size, split, cache=tmp_path / "cache").images
    first = load()
    assert len(decoded) == 22 and torch.equal(load(), first) and len(decoded) == 22
    load(16), load(8, "val")
    assert len(decoded) == 22 + 22 + 2, "another size or split is another file"
    assert torch.equal(load(), first) and len(decoded) == 46
    photo(2).save(root / "cat" / "003.jpg")
    os.utime(root / "cat" / "003.jpg", ns=(1, 1))
    changed = load()
    assert len(decoded) == 68 and not torch.equal(changed, first)
    (root / "dog" / "000.jpg").unlink()
    assert len(load()) == 21 and len(list((tmp_path / "cache").iterdir())) == 3
    kept = sorted((tmp_path / "cache").iterdir(), key=lambda path: path.stat().st_mtime)[-1]
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1                         # a flipped bit is noticed, and the set read anew
    kept.write_bytes(content)
    before = len(decoded)
    assert len(load()) == 21 and len(decoded) == before + 21


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "WORTH_KEEPING", 0.0)
    (tmp_path / "cache").write_text("a file in its place")
    assert len(data.load(str(tree(tmp_path / "t")), 8, cache=tmp_path / "cache")) == 22
    assert "not kept for the next time" in capsys.readouterr().out


def test_reading_shows_how_far_it_is(monkeypatch, capsys):
    clock = iter(range(1000))
    monkeypatch.setattr(files.time, "perf_counter", lambda: 3.0 * next(clock))
    assert files.in_threads(lambda i: i * i, 20, "reading images") == [i * i for i in range(20)]
    lines = capsys.readouterr().err.splitlines()
    assert "reading images: 1 of 20, 57 s left" in lines[0] and 2 <= len(lines) < 20


def test_skip_bad_leaves_no_class_empty(tmp_path):
    root = tree(tmp_path / "t")
    for file in (root / "dog").iterdir():
        file.write_bytes(b"")
    refused(root, "without its unreadable images a class is empty", skip_bad=True)
    refused(root, "without its unreadable images a class is empty", skip_bad=True, max_bytes=0)


# ---- Sets that are decoded while training ----------------------------------------------------------

def streamed(tmp_path, monkeypatch):
    """A set of 22 images that is not held in memory, and a list to which every read adds a position."""
    tree(tmp_path / "t")
    images = data.load(str(tmp_path / "t"), 8, max_bytes=0)
    position = {name: i for i, (name, _) in enumerate(images.images.files)}
    seen = []
    read_image = files.read_image

    def note(name, *rest):
        seen.append(position[name])
        return read_image(name, *rest)
    monkeypatch.setattr(files, "read_image", note)
    return images, seen


def test_a_process_decodes_its_share_of_a_batch_only(tmp_path, monkeypatch):
    images, seen = streamed(tmp_path, monkeypatch)
    images.batch(torch.arange(12), slice(1, None, 4))
    assert sorted(seen) == [1, 5, 9]


def test_the_next_batch_is_decoded_while_this_one_trains(tmp_path, monkeypatch):
    images, seen = streamed(tmp_path, monkeypatch)
    share = slice(1, None, 2)
    index = data.order(22, 6, 7)
    expected = images.batch(index, share)[0]
    seen.clear()
    data.read_ahead(images, 6, 7, 0, share)
    for result in images.images.reading:
        result.result(10)
    assert sorted(seen) == sorted(index[share].tolist()), "before anybody asked"
    assert torch.equal(images.batch(index, share)[0], expected) and len(seen) == 3, "and not again"
    assert not images.images.reading, "nor kept"


def test_another_batch_than_the_one_read_ahead_is_read_as_well(tmp_path, monkeypatch):
    images, _ = streamed(tmp_path, monkeypatch)
    images.images.read_ahead(torch.tensor([1, 2]))
    index = torch.tensor([7, 8, 9])
    whole = data.load(str(tmp_path / "t"), 8)
    assert torch.equal(images.batch(index)[0], whole.batch(index)[0])


def test_a_file_that_is_unreadable_ahead_is_a_sentence_when_its_batch_is_asked_for(tmp_path, monkeypatch):
    images, _ = streamed(tmp_path, monkeypatch)
    name, _ = images.images.files[4]
    images.images.files[4] = (name, lambda: b"no picture")
    images.images.read_ahead(torch.tensor([4]))
    with pytest.raises(data.BadInput, match="not a readable image"):
        images.batch(torch.tensor([4]))
