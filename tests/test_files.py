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
