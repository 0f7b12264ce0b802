"""
A folder or an archive -> its pictures, and what in it is a class.

    list_path        a folder, .zip or .tar -> its pictures by name, and what was left out and why
    arrange          names -> training and validation pictures with their classes
    caption_readers  the captions beside them

What is a class: the folders that hold the pictures, below any number of folders around them. `train` beside
`val` or `test`, in any spelling, are two splits. Without them, every tenth picture of a class is held out.
Pictures that lie in no class folder at all are one class, "images". Archives are never unpacked, so their
names can do no harm.
"""
import bz2
import gzip
import lzma
import os
import posixpath
import re
import stat
import tarfile
import threading
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from common.reading import ANIMATED, FILMS, BadInput, free_bytes, picture_endings, printable, reason

# Known by their first bytes.
SNIFFED = ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "QOI"]
UNREADABLE = {  # endings of pictures that Pillow cannot read -> the remedy
    **dict.fromkeys((".heic", ".heif", ".hif"), "read by the optional package pillow-heif"),
    **dict.fromkeys((".avif", ".avifs"), "read by a newer Pillow"),
    **dict.fromkeys((".svg", ".eps", ".ai", ".pdf", ".jxl", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf",
                     ".orf", ".rw2"), "convert to PNG or JPEG"),
}
JUNK = {"__macosx", "@eadir", "$recycle.bin", "thumbs.db", "desktop.ini"}  # of systems: not worth a word
TRAIN = {"train", "training", "trainset"}                   # folders that are splits, in any case
VAL = {"val", "valid", "validation", "dev", "valset"}
TEST = {"test", "testing", "testset", "eval"}
MOST_TEXT = 1 << 16                                         # bytes of a caption that are read
MOST_FILE = 1 << 30  # bytes of a picture file; a larger one is a mistake


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


def list_path(path, skip_bad=False):
    """A folder or an archive -> Listing. skip_bad: of a damaged .tar, what comes before the damage."""
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
        return list_tar(path, skip_bad)
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
    """The name of an archive's member -> the same without a root, a `.` or a `..` around it."""
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


def list_tar(path, skip_bad):
    """A .tar is read where its members lie. A packed one has no such places: its pictures are read through
    once, and kept as they are, packed; other members are not read.
    """
    with open(path, "rb") as f:
        first = f.read(6)
    marks = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
    unpack = next((opener for mark, opener in marks.items() if first.startswith(mark)), None)
    if unpack is None and not tarfile.is_tarfile(path):
        raise BadInput(f"--data {printable(path)}: neither a folder, nor a .tar[.gz], .zip, .npz or .npy "
                       "file, or one that is cut short")
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

    def members():
        try:
            yield from archive
            while unpack and stream.read(1 << 20):          # the checksum comes last
                pass
        except Exception as e:                              # zlib, lzma, tarfile
            if not skip_bad:
                raise
            print(f"--skip_bad: {printable(path)} is damaged ({reason(e)}): only what comes before is used")
    for member in members():
        name = inside(member.name)
        if not name or hidden(name):
            continue
        if member.isdir():
            found.folders.add(name)
        elif member.issym() or member.islnk():
            around = posixpath.dirname(member.name) if member.issym() else ""
            links[name] = inside(posixpath.join(around, member.linkname))
        elif not member.isfile():
            found.leave_out("devices and pipes", name)
        elif not unpack:
            found.add(name, reader(member), (member.size, member.offset, stamp.st_mtime_ns), reader(member))
        else:
            try:
                room = keep_member(found, archive, member, name, room)
            except Exception:                               # members() meets the same, and says it
                if not skip_bad:
                    raise
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
    """Take one member of a packed .tar into memory, if it is of use -> bytes that are left for others."""
    file = archive.extractfile(member)
    begin = file.read(64)
    kind = found.sort(name, lambda: begin)
    if kind is None:
        return room
    if member.size > MOST_FILE:
        found.leave_out("larger than a picture can be", name)
        return room
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
    """Names below the wrapping -> training folder, [validation folders, best first]; None: no splits."""
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
    if direct[train] and (others or train.lower() not in TRAIN):
        return None                                         # a class of trains, beside one of cars
    if others and not held_out and not all(direct[top] for top in others):
        return None
    return train, held_out


def label_names(found, names, base, kind):
    """Names that lie below base -> {name: class}. Without class folders: one class, "images" or "clips"."""
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
    """A class folder without a readable picture is a mistake. A folder of tables or texts is none."""
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
    """A Listing -> train and val, each [(name, class)] sorted by name; classes; how, the rule in words.

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
        tops = {top: [name for name in names if name.startswith(f"{base}{top}/")]
                for top in (splits[0], *splits[1])}
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
            raise BadInput(f"--data {path}: it takes more than one {kind} in at least one class, to hold out "
                           "one for "
                           f"validation; here are {len(names)} in all: add some, or put them into one folder")
        held, how = hold_out([label for _, label in train])
        val = [row for row, out in zip(train, held) if out]
        train = [row for row, out in zip(train, held) if not out]
    return SimpleNamespace(train=train, val=val, classes=classes, how=how)


def first_that_fits(found, base, tops, splits, classes, kind):
    """The first validation folder with the classes of the training folder -> [(name, class)], (folder,).

    [], () where there is none.

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
        why = f"without the class folders of {printable(splits[0])}/"
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


def caption_readers(found, names):
    """For each name a function that reads its caption, NAME.txt beside NAME.jpg, or None."""
    beside = {posixpath.splitext(name)[0]: opener for name, opener in found.texts.items()}

    def reader(name):
        opener = beside.get(posixpath.splitext(name)[0])

        def read():
            try:
                return caption(opener())
            except Exception as e:
                where = f"{printable(found.path)}/{printable(name)}"
                raise BadInput(f"{where}: its caption cannot be read ({reason(e)})") from None
        return read if opener else None
    return [reader(name) for name in names]
