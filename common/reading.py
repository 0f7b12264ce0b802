"""
One file -> an upright RGB picture, or a clip; and the sentences in which bad input is refused.

A file is judged by its content, not by its name. A phone's photo is turned as its EXIF orientation says,
transparent parts lie over white, 16 bits become 8 by the range of the mode. Pictures are cropped to the
middle square as in ADM.

This file imports nothing of the project.
"""
import io
import re
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms

FORMATS = ["JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "PCX",
           "SGI", "QOI", "PSD", "DDS", "HEIF"]  # not all that Pillow knows: EPS would run a program
ANIMATED = {".gif", ".webp"}                                # where clips are wanted, each of these is one
# By the optional package av.
FILMS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".y4m"}
BIG = 16 << 20  # pixels above which pictures are decoded one at a time
WIDEST = 16  # times as wide as high, or the reverse: the rest is cut first

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # twice the limit is refused
one_big = threading.Semaphore(1)


class BadInput(SystemExit):
    """A user's mistake in one sentence. Uncaught, it ends the program with exit code 1 and no traceback."""


class NeedsPackage(BadInput):
    """An optional package is missing, so that not one file is at fault: --skip_bad does not pass over it."""


def printable(name):
    """A name from a disk -> what can be printed, saved and drawn.

    Names may hold newlines, or bytes that are no UTF-8.
    """
    name = str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def reason(error):
    """An exception -> a few words on one line, without the inside of Pillow, zipfile and numpy."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "its content is no picture that Pillow knows"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * Image.MAX_IMAGE_PIXELS // 10**6} million pixels"
    if isinstance(error, zlib.error) or "while decompressing" in str(error):
        return "its packed content is damaged"
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip() or type(error).__name__
    return printable(text.splitlines()[0][:150]).rstrip(".")


def free_bytes(device):
    """Free memory in bytes where a set would be held."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]           # of this one: to ask another would occupy it
    try:
        text = Path("/proc/meminfo").read_text()
        free = int(text.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return 8 << 30                                      # not Linux: assume a laptop with 8 GB to spare
    try:  # a container may be allowed less than the machine has
        allowed = int(Path("/sys/fs/cgroup/memory.max").read_text())
        return min(free, allowed - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        return free


# ---- One picture ---------------------------------------------------------------------------------

def picture_endings():
    """The endings of files that Pillow reads here, with pillow-heif where it is installed."""
    Image.init()                                            # else Image.OPEN has but five formats
    if "HEIF" not in Image.OPEN:
        try:
            import pillow_heif
            pillow_heif.register_heif_opener()
        except ImportError:
            pass
    known = {name for name in [*FORMATS, "TGA"] if name in Image.OPEN}
    return {ending for ending, name in Image.registered_extensions().items() if name in known}


def formats(name=""):
    """The formats to try on a file. A TGA has no mark of its own, so its name must say it."""
    Image.init()
    known = FORMATS + ["TGA"] if name.lower().endswith(".tga") else FORMATS
    return [format for format in known if format in Image.OPEN]


def open_picture(content, name="", least=None):
    """The bytes of a picture file -> an upright RGB image. A large JPEG is decoded at 1/2, 1/4 or 1/8 of its
    size, as far as the short side keeps `least` pixels (default: at its own size). Raises what Pillow raises.
    """
    if not content:
        raise ValueError("the file is empty")
    image = Image.open(io.BytesIO(content), formats=formats(name))
    if least:
        image.draft(None, (least, least))
    if image.width * image.height > BIG:
        with one_big:                                       # 8 threads with 100 million pixels each are 3 GB
            return upright_rgb(image)
    return upright_rgb(image)


def upright_rgb(image):
    """A PIL image of any mode -> RGB: turned as its EXIF orientation says, transparent parts over white.

    16 bits become 8 by the range of the mode, 0 .. 65535. Numbers without such a range (32-bit integers,
    floats) are taken to lie in 0 .. 1 (floats), 0 .. 255 or 0 .. 65535, whichever holds them all; else the
    image's own range is.
    """
    image.load()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        turned = turn(Image.fromarray(eight_bits(image)), orientation(image))
        return turned.convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return turn(ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB"), orientation(image))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return turn(over_white(image), orientation(image))
    if image.mode != "RGB":
        image = image.convert("RGB")                        # of RGB it would be a copy of up to 500 MB
    return turn(image, orientation(image))


def over_white(image):
    """An image with transparent parts -> RGB. What lies under a transparent pixel is arbitrary."""
    image = image.convert("RGBA")
    if image.getextrema()[3][0] == 255:                     # opaque
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def eight_bits(image):
    values = np.asarray(image)
    if image.mode.startswith("I;16") or image.format == "PNG":
        low, high = 0, 65535
    else:
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0, 1)
        known = (1, 255, 65535) if image.mode == "F" else (255, 65535)
        fitting = [top for top in known if low >= 0 and high <= top]
        if fitting:
            low, high = 0, fitting[0]
    values = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    return ((values - low) / max(high - low, 1e-30) * 255).round().astype(np.uint8)


def orientation(image):
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:                                       # a damaged EXIF block spoils no picture
        return 1


def turn(image, how):
    """Undo an EXIF orientation, 1 to 8: a phone stores what the sensor saw, and notes how it was held."""
    T = Image.Transpose
    ways = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_270,
            7: T.TRANSVERSE, 8: T.ROTATE_90}
    return image.transpose(ways[how]) if how in ways else image


def centre_crop(image, image_size):
    """PIL image -> (image_size, image_size, 3) uint8, as in ADM (Dhariwal & Nichol 2021).

    Halve by boxes while it is twice too big (so that nothing aliases), then bicubic so that the short side
    fits, then the middle square.
    """
    if image.size == (image_size, image_size):
        return np.array(image)
    # A line of 1 x 60000 pixels would become 60000 times as large.
    if max(image.size) > WIDEST * min(image.size):
        width, height = (min(side, WIDEST * min(image.size)) for side in image.size)
        left = (image.width - width) // 2
        top = (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left = (image.width - image_size) // 2
    top = (image.height - image_size) // 2
    return np.array(image)[top:top + image_size, left:left + image_size]


def square(name, opener, image_size):
    """One file -> (image_size, image_size, 3) uint8, was it a square. opener: () -> bytes, or an array."""
    try:
        content = opener()
        if isinstance(content, np.ndarray):
            image = Image.fromarray(content)
            image = over_white(image) if image.mode == "RGBA" else image.convert("RGB")
        else:
            image = open_picture(content, name, 2 * image_size)
        return centre_crop(image, image_size), image.width == image.height
    except Exception as e:                                  # Pillow raises a dozen kinds
        raise BadInput(f"{printable(name)}: not a readable image ({reason(e)}); remove it, or leave such "
                       "files out with --skip_bad") from None


def read_image(name, opener, image_size):
    """One picture file, given by its name and a function that reads its bytes -> (3, H, W) uint8."""
    return torch.from_numpy(square(name, opener, image_size)[0]).permute(2, 0, 1)


# ---- One clip ------------------------------------------------------------------------------------

def clips_of(files):
    """Files [(name, opener)] -> clips, the same: an animation or a film is one, a folder of pictures another.

    The opener of such a folder gives the files in it, frame 10 after frame 9.
    """
    endings = picture_endings()
    clips = []
    folders = {}
    for name, opener in files:
        ending = Path(name).suffix.lower()
        if ending in ANIMATED | FILMS:
            clips.append((name, opener))
        elif ending in endings:
            folders.setdefault(Path(name).parent.as_posix(), []).append((name, opener))
    by_number = lambda file: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file[0])]
    clips += [(name, lambda inside=sorted(inside, key=by_number): inside) for name, inside in folders.items()]
    return sorted(clips, key=lambda clip: clip[0])


def read_clip(name, opener, image_size, frames, frame_step=None):
    """One clip -> a list of windows (3, F, H, W) uint8, cropped like images. Which frames of it:

    frame_step None: one window, its frames spread evenly from the first to the last, so that an action is
    seen whole.
    frame_step n: every n-th frame, and of these as many windows, one behind the other, as there are.
    """
    cropped = []
    most = free_bytes("cpu") // 4 // (3 * image_size ** 2)
    try:
        for i, picture in enumerate(pictures_of(name, opener())):
            if frame_step is None or i % frame_step == 0:
                cropped.append(centre_crop(picture, image_size))
            if len(cropped) > most:
                raise ValueError(f"more than {most} frames, which do not fit into memory: cut it")
    except Exception as e:                                  # Pillow and av raise a dozen kinds
        raise BadInput(f"{printable(name)}: not a readable clip ({reason(e)}); remove it, or leave such "
                       "files out with --skip_bad") from None
    if len(cropped) < frames:
        every = f" with --frame_step {frame_step}" if frame_step else ""
        raise BadInput(f"{printable(name)}: has {len(cropped)} frames{every}, fewer than --frames {frames}; "
                       "remove it, or leave such files out with --skip_bad")
    if frame_step is None:
        cropped = [cropped[i] for i in np.linspace(0, len(cropped) - 1, frames).round().astype(int)]
    clip = torch.from_numpy(np.stack(cropped)).permute(3, 0, 1, 2)                    # (3, all of them, H, W)
    return [window.contiguous() for window in clip.split(frames, 1) if window.shape[1] == frames]


def pictures_of(name, content):
    """The contents of a clip, bytes or a list of picture files -> PIL images, one after the other."""
    if isinstance(content, list):
        for inside, opener in content:
            yield open_picture(opener(), inside)
    elif Path(name).suffix.lower() in FILMS:
        try:
            import av
        except ImportError:
            raise NeedsPackage(f"{printable(name)}: to read films takes the optional package av: pip install "
                               "av") from None
        with av.open(io.BytesIO(content)) as film:
            for frame in film.decode(video=0):
                yield frame.to_image()
    else:
        with Image.open(io.BytesIO(content), formats=formats(name)) as animation:
            for i in range(getattr(animation, "n_frames", 1)):
                animation.seek(i)
                yield upright_rgb(animation)
