"""
Files of your own -> pictures: what may lie in a folder, an archive or an array, and what in it is a class.

A path is read in four steps, and the file is in this order:

    open_picture    one file -> an upright RGB picture, whatever its format: judged by content, not by name
    listing         a folder, .zip or .tar -> its pictures by name, and what was left out and why
    arrange         names -> training and validation pictures with their classes
    read_files      all of it -> uint8 tensors, by several threads, kept in a cache file

What is a class: the folders that hold the pictures, below any number of folders around them. `train` beside
`val` or `test`, in any spelling, are two splits. Without them, every tenth picture of a class is held out.
Pictures that lie in no class folder at all are one class, "images". Every fault of the data is a BadInput:
one sentence, with the remedy.

This file imports nothing of the project.
"""
import bz2
import contextlib
import gzip
import hashlib
import io
import lzma
import os
import posixpath
import re
import stat
import sys
import tarfile
import threading
import time
import warnings
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageCms

FORMATS = ["JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "PCX",
           "SGI", "QOI", "PSD", "DDS", "HEIF"]  # not all that Pillow knows: EPS would run a program
# known by their first bytes
SNIFFED = ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "QOI"]
UNREADABLE = {  # endings of pictures that Pillow cannot read -> the remedy
    **dict.fromkeys((".heic", ".heif", ".hif"), "read by the optional package pillow-heif"),
    **dict.fromkeys((".avif", ".avifs"), "read by a newer Pillow"),
    **dict.fromkeys((".svg", ".eps", ".ai", ".pdf", ".jxl", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf",
                     ".orf", ".rw2"), "convert to PNG or JPEG"),
}
ANIMATED = {".gif", ".webp"}                                # where clips are wanted, each of these is one
# by the optional package av
FILMS = {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".y4m"}
JUNK = {"__macosx", "@eadir", "$recycle.bin", "thumbs.db", "desktop.ini"}  # of systems: not worth a word
TRAIN = {"train", "training", "trainset"}                   # folders that are splits, in any case
VAL = {"val", "valid", "validation", "dev", "valset"}
TEST = {"test", "testing", "testset", "eval"}
MOST_TEXT = 1 << 16                                         # bytes of a caption that are read
MOST_FILE = 1 << 30  # bytes of a picture file; a larger one is a mistake
BIG = 16 << 20  # pixels above which pictures are decoded one at a time
WORTH_KEEPING = 0.5                                        # seconds of reading, from which on a set is kept
WIDEST = 16  # times as wide as high, or the reverse: the rest is cut first

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # twice the limit is refused
one_big = threading.Semaphore(1)


class BadInput(SystemExit):
    """A user's mistake in one sentence. Uncaught, it ends the program with exit code 1 and no traceback."""


class NeedsPackage(BadInput):
    """An optional package is missing, so that not one file is at fault: --skip_bad does not pass over it."""


def printable(name):
    """A name from a disk -> what can be printed, saved and drawn: names may hold newlines, or bytes that are
    no UTF-8.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


def reason(error):
    """An exception -> a few words on one line, without the inside of Pillow, zipfile and numpy."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "its content is no picture that Pillow knows"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * Image.MAX_IMAGE_PIXELS // 10**6} million pixels"
    if isinstance(error, (zlib.error, lzma.LZMAError)) or "while decompressing" in str(error):
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
        return torch.cuda.mem_get_info(device)[0]
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
    if "HEIF" not in Image.OPEN:
        try:
            import pillow_heif
            pillow_heif.register_heif_opener()
        except ImportError:
            pass
    Image.init()                                            # fills Image.OPEN
    known = set(FORMATS + ["TGA"]) & set(Image.OPEN)
    return {ending for ending, name in Image.registered_extensions().items() if name in known}


def formats(name=""):
    """The formats to try on a file. A TGA has no mark of its own, so its name must say it."""
    Image.init()
    known = FORMATS + ["TGA"] if name.lower().endswith(".tga") else FORMATS
    return [format for format in known if format in Image.OPEN]


def open_picture(content, name="", least=None):
    """The bytes of a picture file -> an upright RGB image. A large JPEG is decoded at 1/2, 1/4 or 1/8 of its
    size, as far as the short side keeps `least` pixels (default: at its own size). Raises what Pillow
    raises."""
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
        image = image.convert("RGB")  # of RGB it would be a copy: half a gigabyte at worst
    return turn(image, orientation(image))


def over_white(image):
    """What lies under a transparent pixel is arbitrary: RGBA or a palette with a transparent colour -> RGB on
    white.
    """
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
    scaled = (values - low) / max(high - low, 1e-30)
    return (scaled * 255).round().astype(np.uint8)


def orientation(image):
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:                                       # a damaged EXIF block spoils no picture
        return 1


def turn(image, how):
    """Undo an EXIF orientation, 1 to 8; a phone stores the picture as the sensor lay and notes how it was
    held.
    """
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
    # a line of 1 x 60000 pixels would become 60000 times as large
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
    """One file -> (image_size, image_size, 3) uint8, and whether it was a square. opener: () -> bytes, or an
    array.
    """
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
                       "files out with "
                       "--skip_bad") from None


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

    frame_step None: one window, its frames evenly spread from the first to the last, so that an action is
    seen whole. frame_step n: every n-th frame, and of these as many windows, one behind the other, as there
    are.
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
                       "files out with "
                       "--skip_bad") from None
    if len(cropped) < frames:
        every = f" with --frame_step {frame_step}" if frame_step else ""
        raise BadInput(f"{printable(name)}: has {len(cropped)} frames{every}, fewer than --frames {frames}; "
                       "remove it, or "
                       "leave such files out with --skip_bad")
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


# ---- What lies in a folder or an archive ---------------------------------------------------------

class Listing:
    """What a path holds: pictures, films, texts {name: opener}, all folders, what is left out {why: [names]}.

    stamps {name: text} change when a file does. aliases are names that stand for a file elsewhere: links.
    """

    def __init__(self, path):
        self.path = path
        self.pictures, self.films, self.texts, self.stamps = {}, {}, {}, {}
        self.folders = set()
        self.left_out = {}
        self.same_file = {}  # name -> identity of the file, where links may share it
        self.aliases = set()
        self.endings = picture_endings()

    def leave_out(self, why, name):
        self.left_out.setdefault(why, []).append(name)

    def sort(self, name, head):
        """Where a file belongs. head: () -> its first bytes, read only where the name does not tell."""
        ending = posixpath.splitext(name)[1].lower()
        if ending == ".txt":
            return self.texts
        if ending in FILMS:
            return self.films
        if ending in self.endings:
            return self.pictures
        if ending in UNREADABLE:
            return self.leave_out(f"{ending} ({UNREADABLE[ending]})", name)
        first = head()
        known = [Image.OPEN[f][1](first) for f in SNIFFED if f in Image.OPEN]
        if any(answer is True for answer in known):
            return self.pictures
        return self.leave_out(f"{ending} (no picture)" if ending else "without an ending", name)

    def add(self, name, opener, stamp, head):
        kind = self.sort(name, head)
        if kind is not None:
            kind[name] = opener
            self.stamps[name] = str(stamp)


def hidden(name):
    return any(part.startswith(".") or part.lower() in JUNK for part in name.split("/"))


def limited(size, most=MOST_FILE):
    """Refuse to read a file of so many bytes into memory."""
    if size > most:
        raise OSError(f"{size / 2**30:,.1f} GB are too large for a picture")


def list_path(path):
    """A folder or an archive -> Listing."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as e:
        why = "there is no such file or folder (use `shapes` for the drawn world)"
        raise BadInput(f"--data {printable(path)}: "
                       f"{why if isinstance(e, FileNotFoundError) else reason(e)}") from None
    if stat.S_ISDIR(mode):
        return list_folder(path)
    if not stat.S_ISREG(mode):
        raise BadInput(f"--data {printable(path)}: neither a folder nor a regular file")
    try:
        if zipfile.is_zipfile(path):
            return list_zip(path)
        with open(path, "rb") as f:
            if f.read(4) == b"PK\3\4":                       # its table of contents stands at the end
                raise BadInput(f"--data {printable(path)}: the archive is damaged (its end is missing)")
        return list_tar(path)
    except BadInput:
        raise
    except Exception as e:  # zlib, lzma, tarfile, zipfile, and what they run into
        raise BadInput(f"--data {printable(path)}: the archive is damaged ({reason(e)})") from None


def list_folder(root):
    """Links are followed, but not to a folder that they lie in. hidden() names are passed over."""
    found = Listing(root)
    waiting = [("", (os.stat(root).st_dev, os.stat(root).st_ino), frozenset(), False)]
    while waiting:  # a list, not recursion: folders may be nested deeply
        prefix, here, above, linked = waiting.pop()
        above = above | {here}
        try:
            entries = sorted(os.scandir(root / prefix), key=lambda entry: entry.name)
        except OSError as e:
            raise BadInput(f"--data {printable(root)}: the folder {printable(prefix or '.')} cannot be read "
                           f"({reason(e)})") from None
        for entry in entries:
            name = prefix + entry.name
            if hidden(entry.name):
                continue
            try:
                status = entry.stat()
            except OSError:
                found.leave_out("broken links", name)
                continue
            same = (status.st_dev, status.st_ino)
            alias = linked or entry.is_symlink()
            if stat.S_ISDIR(status.st_mode):
                if same in above or is_above(root, entry):
                    found.leave_out("links to a folder around them", name)
                    continue
                found.folders.add(name)
                waiting.append((name + "/", same, above, alias))
            elif stat.S_ISREG(status.st_mode):
                found.add(name, disk_reader(entry.path, status.st_size), (status.st_size, status.st_mtime_ns),
                          lambda file=entry.path: disk_head(file))
                found.same_file[name] = same
                if alias:
                    found.aliases.add(name)
            else:
                found.leave_out("devices and pipes", name)
    return found


def is_above(root, entry):
    return entry.is_symlink() and Path(os.path.realpath(entry.path)) in Path(os.path.realpath(root)).parents


def disk_reader(path, size):
    def read():
        is_film = Path(path).suffix.lower() in FILMS
        limited(size, max(MOST_FILE, free_bytes("cpu") // 4) if is_film else MOST_FILE)
        return Path(path).read_bytes()
    return read


def disk_head(path):
    try:
        with open(path, "rb") as f:
            return f.read(64)
    except OSError:
        return b""


def inside(name):
    """The name of an archive's member -> the same without a root, `.` or `..` around it: nothing is unpacked.
    """
    name = posixpath.normpath(name.replace("\\", "/"))
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def list_zip(path):
    found = Listing(path)
    archive = zipfile.ZipFile(path)
    lock = threading.Lock()

    def reader(info):
        def read():
            limited(info.file_size)
            with lock:
                return archive.read(info)
        return read

    def head(info):
        try:
            with archive.open(info) as f:
                return f.read(64)
        except Exception:  # encrypted, or packed in a way that zipfile does not know
            return b""
    for info in archive.infolist():
        name = inside(info.filename)
        if not name or hidden(name):
            continue
        if info.is_dir():
            found.folders.add(name)
        else:
            found.add(name, reader(info), (info.file_size, info.CRC), lambda info=info: head(info))
    return found


class Header(tarfile.TarInfo):
    """tarfile takes a damaged header in the middle for the end of the archive; here it is an error."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            return super().frombuf(buf, encoding, errors)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as e:
            raise tarfile.ReadError(f"a header in it: {e}") from None


def list_tar(path):
    """A .tar is read where its members lie. A packed one has no such places: its pictures are read through
    once, and kept as they are, packed; other members are not read."""
    with open(path, "rb") as f:
        first = f.read(6)
    marks = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
    unpack = next((opener for mark, opener in marks.items() if first.startswith(mark)), None)
    if unpack is None and not tarfile.is_tarfile(path):
        raise BadInput(f"--data {printable(path)}: neither a folder, nor a .tar[.gz], .zip, .npz or .npy "
                       "file, or cut short")
    found = Listing(path)
    links = {}
    stamp = os.stat(path)
    room = free_bytes("cpu") // 2
    stream = unpack(path) if unpack else open(path, "rb")
    archive = tarfile.open(fileobj=stream, mode="r|" if unpack else "r:", tarinfo=Header)
    lock = threading.Lock()

    def reader(member):
        def read():
            limited(member.size)
            with lock:
                return archive.extractfile(member).read()
        return read
    for member in archive:
        name = inside(member.name)
        if not name or hidden(name):
            continue
        if member.isdir():
            found.folders.add(name)
        elif member.issym() or member.islnk():
            target = member.linkname
            if member.issym():
                target = posixpath.join(posixpath.dirname(member.name), target)
            links[name] = inside(target)
        elif not member.isfile():
            found.leave_out("devices and pipes", name)
        elif not unpack:
            found.add(name, reader(member), (member.size, member.offset, stamp.st_mtime_ns), reader(member))
        else:
            room = keep_member(found, archive, member, name, room)
    if unpack:
        while stream.read(1 << 20):                         # the checksum comes last
            pass
    for name, target in links.items():                      # of files, and of folders
        for kind in (found.pictures, found.films, found.texts):
            for old in [n for n in kind if n == target or n.startswith(target + "/")] if target else []:
                new = name + old[len(target):]
                kind[new] = kind[old]
                found.stamps[new] = found.stamps[old]
                found.same_file[old] = found.same_file[new] = old
                found.aliases.add(new)
    return found


def keep_member(found, archive, member, name, room):
    """Take one member of a packed .tar into memory, if it is of use -> the bytes of memory that are left for
    others.
    """
    file = archive.extractfile(member)
    begin = file.read(64)
    kind = found.sort(name, lambda: begin)
    if kind is None:
        return room
    limited(member.size)
    room -= member.size
    if room < 0:
        raise BadInput(f"--data {printable(found.path)}: its pictures do not fit into memory: unpack it and "
                       "name the folder")
    content = begin + file.read(MOST_TEXT if kind is found.texts else -1)
    kind[name] = lambda: content
    found.stamps[name] = f"{len(content)} {zlib.crc32(content)}"
    return room


# ---- What is a class -----------------------------------------------------------------------------

def split_word(folder):
    """The name of a folder -> "train", "val", "test" or None; "seg_train" and "Training 1" are train, too."""
    words = re.findall(r"[a-z]+", folder.lower())
    for split, names in (("train", TRAIN), ("val", VAL), ("test", TEST)):
        if any(word in names for word in words):
            return split
    return None


def unwrap(names, known=()):
    """The folders around all names, down to where the class folders are, such as "home/me/pets/" or "".

    known: names of classes, which are not to be taken for a wrapping.
    """
    base = ""
    while True:
        rest = [name[len(base):].split("/") for name in names]
        tops = {parts[0] for parts in rest}
        top = rest[0][0]
        if len(tops) > 1 or max(map(len, rest)) < 3 or top in known:
            return base
        base += top + "/"


def find_splits(names):
    """Names below the wrapping -> training folder, [validation folders, best first]; None where there are no
    splits.
    """
    direct = {}                                             # top folder -> does a picture lie in it directly
    for name in names:
        top, _, rest = name.partition("/")
        if rest:
            direct[top] = direct.get(top, False) or "/" not in rest
    training = [top for top in direct if split_word(top) == "train"]
    training = [top for top in training if top.lower() in TRAIN] or training
    held_out = [top for split in ("val", "test") for top in sorted(direct) if split_word(top) == split]
    others = [top for top in direct if split_word(top) is None]
    if len(training) != 1:
        return None
    train = training[0]
    if direct[train] and (others or train.lower() not in TRAIN):  # a class of trains, beside one of cars
        return None
    if others and not held_out and not all(direct[top] for top in others):
        return None
    return train, held_out


def label_names(found, names, base, kind):
    """Names that lie below base -> {name: class}. In no class folder at all: one class, "images" (or
    "clips").
    """
    one = f"{kind}s"
    below = {name: name[len(base):] for name in names}
    loose = [name for name in names if "/" not in below[name]]
    frames = kind == "clip" and any(Path(name).suffix.lower() not in ANIMATED | FILMS for name in loose)
    if loose and (len(loose) < len(names) or frames):
        remedy = f"put the {kind}s into one subfolder per class"
        if kind == "clip":
            remedy += " that holds its clips; a clip of single pictures is a folder in there"
        else:
            remedy += ", or all of them into one folder"
        raise BadInput(f"--data {printable(found.path)}: {printable(loose[0])} lies in no class folder: "
                       f"{remedy}")
    if loose:
        return dict.fromkeys(names, one)
    label_of = {name: below[name].split("/")[0] for name in names}
    refuse_empty(found, base, set(label_of.values()), kind)
    if len(set(label_of.values())) == 1 and split_word(label_of[names[0]]):
        return dict.fromkeys(names, one)                    # a folder "test" and nothing else
    return label_of


def refuse_empty(found, base, classes, kind):
    """A class folder without one readable picture is a mistake. A folder of tables or texts beside the
    classes is not.
    """
    left_out = [name for names in found.left_out.values() for name in names]
    files = [*found.texts, *found.films, *found.pictures, *left_out]
    for folder in sorted(found.folders):
        name = folder.removeprefix(base)
        if not folder.startswith(base) or "/" in name or name in classes:
            continue
        where = f"--data {printable(found.path)}: the class folder {printable(folder)} holds no {kind}"
        for why, names in found.left_out.items():
            if why.split(" ")[0] in UNREADABLE and any(n.startswith(folder + "/") for n in names):
                raise BadInput(f"{where} that can be read here, only {why}")
        if not any(n.startswith(folder + "/") for n in files):
            raise BadInput(f"{where}: fill it or remove it")


def hold_out(labels):
    """Labels in the order of the files -> a bool array, True for validation, and the rule in words.

    Every tenth of each class. Where most classes have fewer than ten: every tenth of all, but never the first
    of its class, so that each class is learnt.
    """
    rank = np.zeros(len(labels), int)
    seen = Counter()
    for i, label in enumerate(labels):
        rank[i] = seen[label]
        seen[label] += 1
    held = rank % 10 == 9
    if held.sum() >= max(1, len(labels) / 20):
        return held, "every tenth of each class"
    later = np.flatnonzero(rank > 0)
    held[:] = False
    held[later[8::9] if len(later) >= 9 else later[-1:]] = True
    return held, "about every tenth of all, because the classes are small"


def drop_doubles(found, names):
    """One file under several names -> the names that count, so that no picture is learnt twice, or in two
    classes.

    A folder of nothing but links was arranged by somebody: it counts, and not the store that it shows.
    Elsewhere the file itself counts, and not a link to it.
    """
    base = unwrap(names)
    top = {name: name[len(base):].split("/")[0] for name in names}
    own = {top[name] for name in names if name not in found.aliases}  # tops that hold files themselves
    arranged = {found.same_file[name] for name in names if name in found.aliases and top[name] not in own}
    real = {found.same_file.get(name) for name in names if name not in found.aliases}
    kept = []
    for name in names:
        is_link = name in found.aliases
        if not is_link and found.same_file.get(name) in arranged:
            found.leave_out("shown by links as well", name)
        elif is_link and top[name] in own and found.same_file[name] in real:
            found.leave_out("links to files that count by their own name", name)
        else:
            kept.append(name)
    return kept


def arrange(found, kind="image", names=None):
    """A Listing -> train and val, each [(name, class)], sorted by name; classes; and in words what is held
    out.

    names: of clips, in the place of the pictures. What is left out is added to found.left_out.
    """
    path = printable(found.path)
    names = sorted(found.pictures if names is None else names)
    if not names:
        holds = f"; it holds {told(found.left_out)}" if found.left_out else ""
        raise BadInput(f"--data {path}: no {kind}s in it{holds}")
    base = unwrap(names)
    splits = find_splits([name[len(base):] for name in names])
    if splits is None:
        names = drop_doubles(found, names)
        label_of = label_names(found, names, unwrap(names), kind)
        classes = sorted(set(label_of.values()))
        val, used = [], ()
    else:
        tops = {}
        for top in (splits[0], *splits[1]):
            tops[top] = [name for name in names if name.startswith(f"{base}{top}/")]
        learnt = tops[splits[0]]
        below = f"{base}{splits[0]}/"
        label_of = label_names(found, learnt, below + unwrap([name[len(below):] for name in learnt]), kind)
        classes = sorted(set(label_of.values()))
        val, used = first_that_fits(found, base, tops, splits, classes, kind)
        for name in names:
            top, _, rest = name[len(base):].partition("/")
            if not rest:
                found.leave_out(f"{kind}s beside the folder {printable(splits[0])}", name)
            elif top not in (splits[0], *used) and top not in found.refused:
                found.leave_out(f"{kind}s in {printable(top)}/", name)
        names = learnt
    train = [(name, label_of[name]) for name in names]
    how = f"those in {printable(used[0])}/" if used else ""
    if not used:
        if len(names) <= len(classes):
            many = f"{len(names)} {kind}{'s' * (len(names) > 1)} in "
            many += f"{len(classes)} class{'es' * (len(classes) > 1)}"
            raise BadInput(f"--data {path}: too few to hold out one for validation ({many}): put them into "
                           "one folder, or "
                           "add some")
        held, how = hold_out([label for _, label in train])
        val = [row for row, out in zip(train, held) if out]
        train = [row for row, out in zip(train, held) if not out]
    return SimpleNamespace(train=train, val=val, classes=classes, how=how)


def first_that_fits(found, base, tops, splits, classes, kind):
    """The first validation folder with the classes of the training folder -> [(name, class)], (its name,);
    else [], ().

    A test folder is often without classes: contests keep the answers to themselves.
    """
    found.refused = set()
    for top in splits[1]:
        names = tops[top]
        below = f"{base}{top}/"
        if classes == [f"{kind}s"]:
            return [(name, classes[0]) for name in names], (top,)
        below += unwrap([name[len(below):] for name in names], classes)
        rows = [(name, name[len(below):].split("/")[0]) for name in names if "/" in name[len(below):]]
        fits = [row for row in rows if row[1] in classes]
        inside = {name for name, _ in fits}
        why = f"without the class folders of {splits[0]}/"
        if fits:
            why = "of classes that no training image has"
        for name in names:
            if name not in inside:
                found.leave_out(f"{kind}s in {printable(top)}/ {why}", name)
        if fits:
            return fits, (top,)
        found.refused.add(top)
    return [], ()


def told(left_out, most=8):
    """{why: [names]} -> "12 .heic (read by ...), 1 broken links"."""
    parts = [f"{len(names)} {why}" for why, names in sorted(left_out.items(), key=lambda item: -len(item[1]))]
    return ", ".join(parts[:most]) + (", ..." if len(parts) > most else "")


# ---- Captions ------------------------------------------------------------------------------------

def caption(content):
    """The bytes of a text file -> one line: UTF-8, UTF-16 with its mark, or else Latin-1."""
    content = content[:MOST_TEXT]
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = content[:len(content) // 2 * 2].decode("utf-16", "replace")
    else:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            whole = len(content) < MOST_TEXT                # else a letter may have been cut in two
            text = content.decode("latin-1") if whole else content.decode("utf-8", "ignore")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def read_texts(found, names):
    """The caption of each name, NAME.txt beside NAME.jpg -> list of str, or None where one is missing; those
    that miss.
    """
    beside = {posixpath.splitext(name)[0]: opener for name, opener in found.texts.items()}
    openers = [beside.get(posixpath.splitext(name)[0]) for name in names]
    missing = [name for name, opener in zip(names, openers) if opener is None]
    if missing:
        return None, missing

    def read(i):
        try:
            return caption(openers[i]())
        except Exception as e:
            where = f"{printable(found.path)}/{printable(names[i])}"
            raise BadInput(f"{where}: its caption cannot be read ({reason(e)})") from None
    return in_threads(read, len(names), "reading captions"), []


# ---- Reading many --------------------------------------------------------------------------------

class StreamedFiles:
    """Images decoded when they are asked for, by a few threads: for sets that do not fit into memory."""

    def __init__(self, files, image_size):
        self.files = files
        self.image_size = image_size
        self.pool = ThreadPoolExecutor(workers())

    def __getitem__(self, index):
        """index (B,) int64 -> (B, 3, H, W) uint8."""
        images = self.pool.map(lambda i: read_image(*self.files[i], self.image_size), index.tolist())
        return torch.stack(list(images))


def workers():
    """Threads that decode: Pillow lets go of Python's lock while it works."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return min(16, 2 * cores)


def in_threads(function, n, what):
    """[function(0), ..., function(n - 1)], by several threads. Waiting longer than 2 seconds shows a counter
    line.
    """
    results = []
    begin = time.perf_counter()
    shown = begin + 2 if os.environ.get("RANK", "0") == "0" else float("inf")         # when to write next
    live = sys.stderr.isatty()
    end = "\r" if live else "\n"
    with ThreadPoolExecutor(workers()) as pool:
        for start in range(0, n, 1024):  # not all at once: a million waiting calls take a gigabyte
            for result in pool.map(function, range(start, min(start + 1024, n))):
                results.append(result)
                now = time.perf_counter()
                if now > shown:
                    left = (now - begin) / len(results) * (n - len(results))
                    text = f"{what}: {len(results)} of {n}, {left:.0f} s left "
                    print(text, end=end, file=sys.stderr, flush=True)
                    shown = now + (0.5 if live else 10)
    if live and time.perf_counter() > begin + 2:
        print(" " * 70, end="\r", file=sys.stderr)
    return results


def decode_images(files, image_size):
    """Files [(name, opener)] -> images (N, 3, H, W) uint8, bad {position: sentence}, how many were no
    squares.
    """
    images = torch.zeros(len(files), 3, image_size, image_size, dtype=torch.uint8, device="cpu")

    def decode(i):
        try:
            pixels, was_square = square(*files[i], image_size)
        except BadInput as e:
            return str(e), True
        images[i] = torch.from_numpy(pixels).permute(2, 0, 1)
        return None, was_square
    outcome = in_threads(decode, len(files), "reading images")
    bad = {i: sentence for i, (sentence, _) in enumerate(outcome) if sentence}
    return dict(images=images, bad=bad, oblong=sum(not was_square for _, was_square in outcome))


def check_images(files, image_size):
    """What decode_images finds bad, for a set that does not fit into memory -> dict with bad {position:
    sentence}.
    """
    def check(i):
        try:
            square(*files[i], image_size)
        except BadInput as e:
            return str(e)
    outcome = in_threads(check, len(files), "--skip_bad: reading every image once")
    return dict(bad={i: sentence for i, sentence in enumerate(outcome) if sentence})


def decode_clips(files, image_size, frames, frame_step, fits):
    """Files [(name, opener)] -> images (N, 3, F, H, W) uint8, owner (list of N positions in files), bad as
    above.

    fits: bytes of memory there are for them. Raises ValueError where they are more.
    """
    size = 3 * frames * image_size ** 2
    taken = [0]

    def decode(i):
        if taken[0] > fits:
            return []
        try:
            windows = read_clip(*files[i], image_size, frames, frame_step)
        except NeedsPackage:
            raise
        except BadInput as e:
            return str(e)
        taken[0] += len(windows) * size  # by several threads: nearly right, which is enough
        return windows
    outcome = in_threads(decode, len(files), "reading clips")
    if taken[0] > fits:
        raise ValueError("the clips do not fit")
    bad = {i: windows for i, windows in enumerate(outcome) if isinstance(windows, str)}
    good = [(i, window) for i, windows in enumerate(outcome) if i not in bad for window in windows]
    images = torch.stack([window for _, window in good]) if good else torch.zeros(0, dtype=torch.uint8)
    return dict(images=images, owner=[i for i, _ in good], bad=bad)


def cached(folder, path, key, what, make):
    """make() -> a dict with `images`, kept in a file in `folder` (None: not kept), as long as `key` stays the
    same.

    One file for each path and kind of set, so that old ones do not pile up. A damaged one is made anew.
    """
    if folder is None:
        return make()
    stem = re.sub(r"\W+", "-", Path(path).stem)[:40]
    mark = hashlib.sha1(repr((os.path.abspath(path), what)).encode()).hexdigest()[:10]
    file = Path(folder) / f"{stem}-{mark}.pt"
    key = hashlib.sha1(repr((1, key)).encode("utf-8", "backslashreplace")).hexdigest()
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        if saved["key"] == key and saved["sum"] == checksum(saved):
            return saved
    except Exception:                                       # there is none, or it is damaged
        pass
    begin = time.perf_counter()
    made = make()
    size = made["images"].numel() if "images" in made else 0
    if time.perf_counter() - begin < WORTH_KEEPING or os.environ.get("RANK", "0") != "0":
        return made  # read again as quickly; or another process keeps it
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        for old in file.parent.glob(f"{file.name}.*.tmp"):  # of a program that was killed while it wrote
            old.unlink()
        room = os.statvfs(file.parent) if hasattr(os, "statvfs") else None
        if room is None or room.f_bavail * room.f_frsize > 2 * size:
            torch.save(dict(made, key=key, sum=checksum(made)), temporary)
            os.replace(temporary, file)
    except (OSError, RuntimeError) as e:                    # torch turns a full disk into a RuntimeError
        print(f"note: the images read are not kept for the next time ({reason(e)})")
        with contextlib.suppress(OSError):
            temporary.unlink()
    return made


def checksum(saved):
    if "images" in saved:
        return zlib.crc32(saved["images"].numpy().reshape(-1).data)
    return zlib.crc32(repr(saved["bad"]).encode())


def refuse_bad(bad, files, skip_bad, kind):
    """Stop at unreadable files, or with --skip_bad say in a line that they are left out."""
    if not bad:
        return
    first = min(bad)
    if not skip_bad:
        more = f" ({len(bad)} of {len(files)} files are like that)" if len(bad) > 1 else ""
        raise BadInput(bad[first] + more)
    short = " that are unreadable or too short" if kind == "clip" else ""
    which = f"{kind}s{short}" if short else f"unreadable {kind}s"
    print(f"--skip_bad: left out {len(bad)} {which}, the first is {printable(files[first][0])}")


def read_files(path, image_size, split, frames=1, frame_step=None, skip_bad=False, fits=None, cache=None):
    """One split of what lies in a path -> images, labels (list of int), classes, texts or None, and a summary
    in words.

    images: (N, 3, [F,] H, W) uint8, or StreamedFiles where they take more than `fits` bytes (default: half of
    the free memory). split: "train" or another. cache: a folder to keep what was decoded, for the next time.
    """
    path = Path(path).expanduser()
    shown = printable(path)
    fits = free_bytes("cpu") // 2 if fits is None else fits
    kind = "image" if frames == 1 else "clip"
    if path.suffix.lower() in (".npz", ".npy") and path.is_file():
        if kind == "clip":
            raise BadInput(f"--data {shown}: clips are read from class folders or an archive of them, not "
                           "from an "
                           f"{path.suffix}")
        return read_array(path, image_size, split, skip_bad, fits, cache)
    found = list_path(path)
    openers = found.pictures
    if kind == "clip":
        openers = dict(clips_of([*found.pictures.items(), *found.films.items()]))
    else:
        for name in found.films:
            found.leave_out("films (--frames reads them)", name)
    sets = arrange(found, kind, openers)
    rows = sets.train if split == "train" else sets.val
    names = [name for name, _ in rows]
    labels = [sets.classes.index(label) for _, label in rows]
    files = [(f"{path}/{name}", openers[name]) for name in names]
    texts, missing = read_texts(found, names) if kind == "image" else (None, [])
    stamped = names if kind == "image" else [*found.pictures, *found.films]
    stamps = [(name, found.stamps.get(name)) for name in stamped]
    size = len(files) * 3 * frames * image_size ** 2
    decoded = dict(oblong=0)
    if kind == "clip":
        try:
            decoded = cached(cache, path, (names, stamps), (split, image_size, frames, frame_step),
                             lambda: decode_clips(files, image_size, frames, frame_step, fits // 2))
        except ValueError:
            raise BadInput(f"--data {shown}: more clips of {frames} frames at {image_size} pixels than fit "
                           "into memory: give "
                           "less of --frames or --image_size, or fewer files") from None
        images = decoded["images"]
        good = decoded["owner"]
    elif size > fits:
        if not path.is_dir():
            raise BadInput(f"--data {shown}: {len(files)} images at {image_size} pixels do not fit into "
                           "memory, "
                           "and an archive cannot be streamed: unpack it and name the folder")
        if skip_bad:
            decoded = cached(cache, path, stamps, (split, image_size, "checked"),
                             lambda: check_images(files, image_size))
        bad = decoded.setdefault("bad", {})
        good = [i for i in range(len(files)) if i not in bad]
        images = StreamedFiles([files[i] for i in good], image_size)
    else:
        decoded = cached(cache, path, stamps, (split, image_size), lambda: decode_images(files, image_size))
        good = [i for i in range(len(files)) if i not in decoded["bad"]]
        images = decoded["images"] if not decoded["bad"] else decoded["images"][good]
    refuse_bad(decoded["bad"], files, skip_bad, kind)
    if {labels[i] for i in good} != set(labels):
        raise BadInput(f"--data {shown}: without its unreadable {'and short ' * (kind == 'clip')}{kind}s a "
                       "class is empty")
    return SimpleNamespace(images=images, labels=[labels[i] for i in good],
                           classes=[printable(name) for name in sets.classes],
                           texts=[texts[i] for i in good] if texts else None,
                           without_text=[printable(name) for name in missing],
                           summary=summary(shown, sets.train + sets.val, kind), how=sets.how,
                           left_out=told(found.left_out), unreadable=len(decoded["bad"]),
                           oblong=decoded.get("oblong", 0))


def summary(path, rows, kind):
    """What a path holds, in words. rows: (name, class) of both splits together."""
    counts = Counter(label for _, label in rows)
    names = [f"{printable(name)} ({n})" for name, n in sorted(counts.items())]
    which = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    classes = f"1 class: {which}" if len(names) == 1 else f"{len(names)} classes: {which}"
    return f"{path}: {len(rows)} {kind}s in {classes}"


# ---- Arrays --------------------------------------------------------------------------------------

# Names in .npz files of this project, of FID tools, of others.
PAIRS = [("images", "labels"), ("arr_0", "arr_1"), ("arr_0", "labels"), ("x", "y"),
         ("train_images", "train_labels"), ("x_train", "y_train")]
VAL_PAIRS = {"train_images": [("val_images", "val_labels"), ("test_images", "test_labels")],
             "x_train": [("x_val", "y_val"), ("x_test", "y_test")]}


def open_arrays(path):
    """An .npz or .npy -> its names, and a function (name) -> array that reads one. Nothing pickled is opened.
    """
    def safely(read):
        try:
            return read()
        except Exception as e:                              # zipfile, zlib, tokenize, and numpy's own
            why = "no arrays of numbers or words in NumPy's format" if "pickle" in str(e) else reason(e)
            raise BadInput(f"--data {printable(path)}: not a readable {path.suffix} ({why})") from None
    if path.suffix.lower() == ".npy":
        array = safely(lambda: np.load(path, mmap_mode="r", allow_pickle=False))
        return ["images"], lambda name: array
    archive = safely(lambda: np.load(path, allow_pickle=False))
    if not hasattr(archive, "files"):
        return ["images"], lambda name: archive             # an .npy under another name

    def read(name):
        member = name if name in archive.zip.namelist() else name + ".npy"
        size = archive.zip.getinfo(member).file_size
        if size > free_bytes("cpu") // 2:
            raise BadInput(f"--data {printable(path)}: `{printable(name)}` takes {size / 2**30:,.1f} GB, "
                           "more than half of the "
                           "free memory")
        return safely(lambda: archive[name])
    return archive.files, read


def as_pictures(where, array):
    """(N, H, W[, C]) or (N, C, H, W) uint8 -> (N, H, W, 3 or 4) uint8."""
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim == 4 and array.shape[-1] not in (1, 3, 4) and array.shape[1] in (1, 3, 4):
        array = array.transpose(0, 2, 3, 1)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        remedy = ""
        if array.dtype.kind == "f":
            remedy = "; floats in 0 .. 1: save (255 * images).round().astype(np.uint8)"
        raise BadInput(f"{where} must be (N, H, W, 3) uint8, not {array.shape} {array.dtype}{remedy}")
    return array.repeat(3, -1) if array.shape[-1] == 1 else array


def as_labels(where, array, n):
    """Labels (N,) or (N, 1), of whole numbers or names -> (N,), and which rows have one (a float may be NaN).
    """
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.shape != (n,) or array.dtype.kind not in "biufUS":
        raise BadInput(f"{where} must be ({n},) whole numbers or names, one for each image, not "
                       f"{array.shape} {array.dtype}")
    known = np.ones(n, bool)
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8", "replace")
    if array.dtype.kind == "f":
        known = np.isfinite(array)
        if (array[known] % 1 != 0).any():
            raise BadInput(f"{where} must be whole numbers or names, not such as "
                           f"{array[known][array[known] % 1 != 0][0]}")
        array = np.where(known, array, 0).astype(np.int64)
    return array.astype(np.int64) if array.dtype.kind == "b" else array, known


def name_classes(where, values, names):
    """The values that occur as labels, sorted, and the array `classes` or None -> a name for each value."""
    if names is None:
        return [printable(value) for value in values]
    names = [printable(name) for name in np.ravel(names)]
    if values.dtype.kind == "U":
        return [printable(value) for value in values]
    if values.min() >= 0 and values.max() < len(names):
        return [names[value] for value in values]
    if len(names) == len(values):                           # counted from 1, for example
        return names
    raise BadInput(f"{where}: `classes` has {len(names)} names, but the labels go from {values.min()} to "
                   f"{values.max()}")


def read_array(path, image_size, split, skip_bad, fits, cache):
    """An .npz with `images` (N, H, W, 3) uint8 and `labels` (N,), or only images; `classes` names the labels.

    As read_files. A tenth of each class is held out, unless the file has arrays for validation (PAIRS,
    VAL_PAIRS).
    """
    shown = f"--data {printable(path)}"
    keys, read = open_arrays(path)
    key, key_labels = next((pair for pair in PAIRS if pair[0] in keys and pair[1] in keys),
                           next((pair for pair in PAIRS if pair[0] in keys), (None, None)))
    if key is None:
        raise BadInput(f"{shown}: an .npz needs the array `images` (N, H, W, 3) uint8 and, for classes, "
                       "`labels` (N,); it holds "
                       + (", ".join(printable(k) for k in keys[:9]) or "nothing"))

    def pair(key, key_labels):
        images = as_pictures(f"{shown}: `{key}`", read(key))
        if key_labels not in keys:
            return images, np.full(len(images), "images"), np.ones(len(images), bool)
        return images, *as_labels(f"{shown}: `{key_labels}`", read(key_labels), len(images))
    images, labels, known = pair(key, key_labels)
    values = np.unique(labels[known])
    if len(values) == 0:
        raise BadInput(f"{shown}: `{key_labels}` holds no labels")
    names = read("classes") if "classes" in keys and key_labels in keys else None
    classes = name_classes(shown, values, names)
    rows = np.flatnonzero(known)
    unlabelled = np.flatnonzero(~known)
    own = [p for p in VAL_PAIRS.get(key, ()) if p[0] in keys and (p[1] in keys or key_labels not in keys)]
    if own:
        own = own[0]
        val_images, val_labels, fine = pair(*own)
        val_rows = np.flatnonzero(fine & np.isin(val_labels, values))
        how = f"`{own[0]}`"
    else:
        if len(rows) <= len(values):
            raise BadInput(f"{shown}: {len(rows)} images in {len(values)} classes are too few to hold out "
                           "one for validation")
        held, how = hold_out(labels[rows].tolist())
        val_images, val_labels = images, labels
        val_rows = rows[held]
        rows = rows[~held]
    if len(unlabelled):
        if not skip_bad:
            raise BadInput(f"{shown}: `{key_labels}`[{unlabelled[0]}] is not a number ({len(unlabelled)} of "
                           f"{len(labels)} are "
                           "not); mend it, or leave such images out with --skip_bad")
        print(f"--skip_bad: left out {len(unlabelled)} images without a label, the first is number "
              f"{unlabelled[0]}")
    name_of = dict(zip(values.tolist(), classes))
    table = [(None, name_of[label]) for label in [*labels[rows].tolist(), *val_labels[val_rows].tolist()]]
    chosen, source, kept = (rows, images, labels) if split == "train" else (val_rows, val_images, val_labels)
    if len(chosen) * 3 * image_size ** 2 > fits:
        raise BadInput(f"{shown}: {len(chosen)} images at {image_size} pixels do not fit into memory: give "
                       "less of --image_size")
    files = [(f"{path}[{i}]", lambda i=i: np.asarray(source[i])) for i in chosen.tolist()]
    stamp = os.stat(path)
    stamps = (stamp.st_size, stamp.st_mtime_ns, key, chosen.tolist())
    decoded = cached(cache, path, stamps, (split, image_size), lambda: decode_images(files, image_size))
    refuse_bad(decoded["bad"], files, False, "image")
    return SimpleNamespace(images=decoded["images"], labels=np.searchsorted(values, kept[chosen]).tolist(),
                           classes=classes, texts=None, without_text=[],
                           summary=summary(printable(path), table, "image"), how=how, left_out="",
                           unreadable=len(unlabelled) if split == "train" else 0, oblong=decoded["oblong"])
