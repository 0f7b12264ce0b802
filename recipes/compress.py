"""
Images and clips as small files: a tokenizer is a codec, and a generator is its entropy coder.

A clip becomes a grid of ids, and an id takes log2 V bits (MAGVIT-v2, https://arxiv.org/abs/2310.05737,
compresses videos so). But not all ids are equally likely: an autoregressive transformer knows p(id |
earlier ids), and an arithmetic coder spends -log2 p bits on one. The file is then as long as the model's
loss, and who predicts better compresses better. What has been written so far is an interval of numbers. The
next id narrows it to its share, and the file is a number in the last one:

    low += range P(the ids before this one in the alphabet)         range *= p(this one)

    python -m recipes.compress compress cat.gif cat.lfq --run runs/shapes-lfq             # log2 V bits per id
    python -m recipes.compress compress cat.gif cat.lfq --run runs/shapes-lfq \
                                        --entropy_coder runs/shapes-lfq-ar-categorical      # fewer
    python -m recipes.compress decompress cat.lfq cat2.gif --run runs/shapes-lfq-ar-categorical

Shapes:  clip (N, 3, H, W) uint8, N frames; ids (f, h, w) int64. LFQ and VQ are convolutions, so a picture
may have any size: it is padded to whole tokens, and cropped again. A video tokenizer takes chunks of its
own number of frames, TiTok squares of its own size. The transformer knows one grid: each chunk is cut into
tiles of that grid, which know nothing of each other.

The file, its numbers little-endian:

     0 -  3   "LFQ" and the version, 1                           18, 19   milliseconds per frame (0: an image)
     4,   5   coder (0 fixed length, 1 AR), bits per id          20 - 27  fingerprints: tokenizer, transformer
     6 - 11   frames, height, width of the clip                           (0: none)
    12 - 17   f, h, w of the ids                                 28 - 31  bytes from 40 on
    40 - end  the ids                                            32 - 39  CRC32 of the ids, and of all else

Who decodes must compute the very probabilities of who encoded, to the last bit. Here both take the same
cached steps at the same batch size, on one thread of the CPU: the same on one machine with one build of
PyTorch. Elsewhere a sum may be rounded otherwise. The CRC of the ids tells, and the file is refused.
Fixed-length files hold the same ids everywhere.
"""
import argparse
import contextlib
import math
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence

import ar_transformer
from common import runs
from data import BadInput

HEADER = struct.Struct("<4s2B7H5I")
FIELDS = ("magic", "coder", "bits", "frames", "height", "width", "f", "h", "w", "ms", "tokenizer", "model",
          "length", "ids_crc", "crc")
MAGIC = b"LFQ\1"
MOST = 65535                                                # frames, rows, columns: what the header holds
MOST_PIXELS = 1 << 27                                       # of a clip: 64 frames of 1920 x 1080
FILMS = {".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v"}   # what only the optional package av reads


# ---- The arithmetic coder: whole numbers of 32 bits, exact ---------------------------------------

class ArithmeticEncoder:
    """The interval [low, low + range), in units of 2^-32 of what the bits written so far leave open.

    When range falls to half or less, the next bit is written and the unit halved. So range stays above
    2^31, and a share of 1 in 2^31 is not yet nothing. low may grow past 2^32; the carry then goes into the
    bits already written, as on paper.
    """

    def __init__(self):
        self.low = 0
        self.range = 1 << 32
        self.bits = []

    def encode(self, start, end, total):
        """Narrow the interval to its part from start / total to end / total.

        Integers: 0 <= start < end <= total <= 2^31.
        """
        a = self.range * start // total
        b = self.range * end // total
        self.low += a
        self.range = b - a
        self.carry()
        while self.range <= 1 << 31:
            self.bits.append(self.low >> 31)
            self.low = (self.low << 1) & 0xFFFFFFFF
            self.range <<= 1

    def carry(self):
        if self.low >> 32:
            self.low -= 1 << 32
            i = len(self.bits) - 1
            while self.bits[i]:                         # 0.0111 + 0.0001; there is a 0, for all stays below 1
                self.bits[i] = 0
                i -= 1
            self.bits[i] = 1

    def finish(self):
        """-> bytes. A range above 2^31 has a multiple of 2^31 in it: one more bit tells which."""
        self.low = -(-self.low >> 31) << 31
        self.carry()
        return np.packbits(np.array(self.bits + [self.low >> 31], dtype=np.uint8)).tobytes()


class ArithmeticDecoder:
    """Follows the encoder's interval. code is the file's number, counted from low, which it need not know."""

    def __init__(self, payload):
        self.bits = iter(np.unpackbits(np.frombuffer(payload, dtype=np.uint8)).tolist())
        self.range = 1 << 32
        self.code = 0
        for _ in range(32):
            self.code = self.code << 1 | next(self.bits, 0)

    def target(self, total):
        """-> the number t in 0 .. total - 1 in whose part of the interval the code lies.

        The symbol is the one with start <= t < end.
        """
        return ((self.code + 1) * total - 1) // self.range

    def advance(self, start, end, total):
        """Narrow the interval as encode did."""
        a = self.range * start // total
        b = self.range * end // total
        self.code -= a
        self.range = b - a
        while self.range <= 1 << 31:
            self.code = self.code << 1 | next(self.bits, 0)
            self.range <<= 1


# ---- The transformer as a table of counts --------------------------------------------------------

def cumulative(logits):
    """logits (n, V) -> cumulative counts (n, V + 1) int64 from 0 to at most 1025 V.

    Every id counts at least 1, for none may be impossible. That gives away one part in 1,025, or 0.0014
    bits per token; with 2^18 words the sum stays below 2^29.
    """
    V = logits.shape[-1]
    counts = (logits.double().softmax(-1) * (1024 * V)).long() + 1
    return F.pad(counts.cumsum(-1), (1, 0)).numpy()


def least_bits(V):
    """Bits that even the likeliest of V ids costs: its count is at most 1024 V + 1, the others count 1."""
    return math.log2(1025 * V / (1024 * V + 1))


def predictions(model, n):
    """Yields the cumulative counts (n, V + 1) of the next id of n sequences, and is sent the id, (n,)."""
    P = model.n_prefix
    x = model.prefix(torch.full((n,), model.num_classes, device="cpu"))               # "no class"
    caches = model.empty_caches(x)
    for t in range(model.seq_len):
        h = model.forward_blocks(x, P + t - 1 if t else 0, caches)[:, -1]
        ids = yield cumulative(model.head.logits(h))
        x = model.embed(ids[:, None], model.positions[P + t:P + t + 1])


@torch.no_grad()
def walk(positions, model, visit, batch_size=32):
    """The loop of both directions: visit(position, cumulative counts (V + 1,)) -> id, for every id in order.

    positions (n, T): see tiles(). One function, so that the decoder computes in the shapes of the encoder.
    They differ only in where visit has the ids from, and the ids are the same.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for rows in positions.split(batch_size):
            step = predictions(model, len(rows))
            ids = None                                      # what starts a generator
            columns = int((rows >= 0).any(0).nonzero().max()) + 1
            for column in rows.T.tolist()[:columns]:
                table = step.send(ids)
                visited = [visit(i, c) if i >= 0 else 0 for i, c in zip(column, table)]
                ids = torch.tensor(visited, device="cpu")
    finally:
        torch.set_num_threads(threads)


def tiles(lengths, h, w, grid):
    """The order of the ids in the file: (n, T) int64, a row for each tile, positions in ids.flatten().

    -1 where a tile of the transformer's grid hangs over the edge: such an id is 0 and costs nothing. lengths:
    the ids' frames in each chunk.
    """
    tf, th, tw = (1,) * (3 - len(grid)) + tuple(grid)
    positions = torch.arange(sum(lengths) * h * w, device="cpu").view(-1, h, w)
    chunks = [F.pad(c, (0, -w % tw, 0, -h % th, 0, tf - len(c)), value=-1) for c in positions.split(lengths)]
    cut = torch.stack(chunks).unflatten(3, (-1, tw)).unflatten(2, (-1, th))      # (n, tf, rows, th, cols, tw)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, tf * th * tw)


def encode_ids(ids, lengths, model):
    """ids (f, h, w) -> bytes, as many bits as the model's -log2 p of all of them, and 8 more at most."""
    coder = ArithmeticEncoder()
    flat = ids.flatten().tolist()

    def visit(position, table):
        i = flat[position]
        coder.encode(int(table[i]), int(table[i + 1]), int(table[-1]))
        return i

    walk(tiles(lengths, *ids.shape[1:], model.grid), model, visit)
    return coder.finish()


def decode_ids(payload, lengths, h, w, model):
    """The inverse of encode_ids -> ids (f, h, w) int64."""
    coder = ArithmeticDecoder(payload)
    ids = torch.zeros(sum(lengths) * h * w, dtype=torch.long, device="cpu")

    def visit(position, table):
        total = int(table[-1])
        i = int(np.searchsorted(table, coder.target(total), side="right")) - 1
        coder.advance(int(table[i]), int(table[i + 1]), total)
        ids[position] = i
        return i

    walk(tiles(lengths, h, w, model.grid), model, visit)
    return ids.view(-1, h, w)


def pack(ids, bits):
    """ids of any shape, below 2^bits -> bytes, `bits` bits of each, the lowest first."""
    planes = ids.flatten()[:, None] >> torch.arange(bits, device="cpu") & 1
    return np.packbits(planes.numpy().astype(np.uint8), bitorder="little").tobytes()


def unpack(payload, bits, n):
    """The inverse of pack -> ids (n,) int64."""
    planes = np.unpackbits(np.frombuffer(payload, dtype=np.uint8), bitorder="little")
    planes = planes[:n * bits].reshape(n, bits)
    return (torch.from_numpy(planes).long() << torch.arange(bits, device="cpu")).sum(1)


# ---- Clips of any size and length, and their ids -------------------------------------------------

class Layout:
    """How a clip of `frames` frames and height x width pixels lies in ids (f, h, w).

    lengths: the frames of ids in each chunk. rows, cols: how often the stride fits into the picture.
    """

    def __init__(self, tokenizer, frames, height, width):
        one = tokenizer.decode(torch.zeros(1, tokenizer.seq_len, dtype=torch.long, device="cpu"))
        self.chunk = one.shape[2] if one.ndim == 5 else 1   # its size tells the strides
        self.flat = len(tokenizer.grid) == 1          # TiTok: T ids for a square of pixels, beside each other
        self.stride = one.shape[-1] if self.flat else one.shape[-1] // tokenizer.grid[-1]
        self.time_stride = getattr(tokenizer, "time_stride", 1)
        self.lengths = [-(-(min(self.chunk, frames - i) - 1) // self.time_stride) + 1
                        for i in range(0, frames, self.chunk)]
        least = 1 if self.flat else 2                       # LFQ asks for the variance of a frame's ids
        self.rows = max(least, -(-height // self.stride))
        self.cols = max(least, -(-width // self.stride))
        self.f = sum(self.lengths)
        self.h = self.rows
        self.w = self.cols * (tokenizer.seq_len if self.flat else 1)
        self.frames = frames
        self.height = height
        self.width = width

    @contextlib.contextmanager
    def known_to(self, tokenizer):
        """decode() must be told how the ids of a picture of another size lie."""
        name = "space" if hasattr(tokenizer, "space") else "grid"
        before = getattr(tokenizer, name)
        try:
            setattr(tokenizer, name, before if self.flat else (self.h, self.w))
            yield
        finally:
            setattr(tokenizer, name, before)


@torch.no_grad()
def to_ids(tokenizer, clip):
    """clip (N, 3, H, W) uint8 -> ids (f, h, w) int64, their Layout."""
    lay = Layout(tokenizer, len(clip), *clip.shape[-2:])
    below = lay.rows * lay.stride - lay.height
    right = lay.cols * lay.stride - lay.width
    parts = []
    for x, f in zip(clip.split(lay.chunk), lay.lengths):
        x = F.pad(x.float() / 127.5 - 1, (0, right, 0, below), mode="replicate")      # (n, 3, H', W')
        if lay.flat:
            squares = x.unflatten(3, (lay.cols, -1)).unflatten(2, (lay.rows, -1))   # (1, 3, rows, s, cols, s)
            x = squares.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        elif lay.chunk > 1:                            # the last chunk: its last frame again, up to whole ids
            again = (f - 1) * lay.time_stride + 1 - len(x)
            x = torch.cat([x, x[-1:].expand(again, -1, -1, -1)]).transpose(0, 1)[None]    # (1, 3, n', H', W')
        parts.append(tokenizer.encode(x).view(f, lay.h, lay.w))
    return torch.cat(parts), lay


@torch.no_grad()
def from_ids(tokenizer, ids, lay):
    """The inverse of to_ids, as far as the tokenizer can: ids (f, h, w) -> clip (N, 3, H, W) uint8."""
    clip = []
    with lay.known_to(tokenizer):
        for part, left in zip(ids.split(lay.lengths), range(lay.frames, 0, -lay.chunk)):
            x = tokenizer.decode(part.reshape(-1, tokenizer.seq_len) if lay.flat else part.view(1, -1))
            if lay.flat:
                x = x.unflatten(0, (1, lay.rows, lay.cols)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
            if x.ndim == 5:
                x = x[0].transpose(0, 1)
            x = x[:min(lay.chunk, left), :, :lay.height, :lay.width]                  # (n, 3, H, W)
            clip.append(((x + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(clip)


# ---- The file ------------------------------------------------------------------------------------

def fingerprint(model):
    """32 bits that tell one set of weights from another: against mistakes, not against malice."""
    crc = zlib.crc32(repr((model.grid, model.vocab_size, getattr(model, "n_head", 0))).encode())
    for name, value in model.state_dict().items():
        crc = zlib.crc32(value.cpu().contiguous().numpy().tobytes(), zlib.crc32(name.encode(), crc))
    return crc


def bits_of(tokenizer):
    """Bits of an id at fixed length."""
    return (tokenizer.vocab_size - 1).bit_length()


def crc_of_ids(ids):
    return zlib.crc32(ids.flatten().numpy().astype("<i8").tobytes())


def write(ids, lay, tokenizer, model=None, ms=0):
    """ids (f, h, w) and their Layout -> the bytes of a file; with a model arithmetic-coded.

    ms: milliseconds per frame.
    """
    bits = bits_of(tokenizer)
    payload = encode_ids(ids, lay.lengths, model) if model else pack(ids, bits)
    values = [MAGIC, int(model is not None), bits, lay.frames, lay.height, lay.width, lay.f, lay.h, lay.w, ms,
              fingerprint(tokenizer), fingerprint(model) if model else 0, len(payload), crc_of_ids(ids)]
    head = HEADER.pack(*values, 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(payload, zlib.crc32(head))) + payload


def read(blob, tokenizer, model=None, name="file"):
    """The bytes of a file -> ids (f, h, w), Layout, milliseconds per frame.

    BadInput, with its name, if it is not whole, not of this tokenizer, not of this transformer, or asks for
    more than its length can hold. Only an arithmetic-coded file needs the model.
    """
    x = read_header(blob, name)
    if x["tokenizer"] != fingerprint(tokenizer):
        raise BadInput(f"{name}: written by another tokenizer than that of --run; name the run that wrote it")
    if x["coder"] and (model is None or x["model"] != fingerprint(model)):
        what = "coded by another transformer than this" if model else "arithmetic-coded"
        raise BadInput(f"{name}: {what}; name the run that coded it with --entropy_coder")
    payload = blob[HEADER.size:]
    lay = layout_of(x, tokenizer, len(payload), name)
    if x["coder"]:
        ids = decode_ids(payload, lay.lengths, lay.h, lay.w, model)
    else:
        ids = unpack(payload, x["bits"], lay.f * lay.h * lay.w).view(lay.f, lay.h, lay.w)
    if crc_of_ids(ids) != x["ids_crc"]:
        raise BadInput(f"{name}: the ids came out otherwise than they went in, for their probabilities were "
                       "computed on another machine or by another PyTorch; decode it there, or write it "
                       "without --entropy_coder")
    if ids.max() >= tokenizer.vocab_size:
        raise BadInput(f"{name}: an id of {int(ids.max())}, and the tokenizer has {tokenizer.vocab_size}")
    return ids, lay, x["ms"]


def read_header(blob, name):
    """The bytes of a file -> {field: number}; BadInput unless it is whole and its checksum right."""
    if blob[:len(MAGIC)] != MAGIC[:len(blob)] or not blob:
        raise BadInput(f"{name}: not a file that recipes.compress wrote, or of another version")
    if len(blob) < HEADER.size:
        raise BadInput(f"{name}: cut off within its first {HEADER.size} bytes; copy it again")
    x = dict(zip(FIELDS, HEADER.unpack(blob[:HEADER.size])))
    payload = blob[HEADER.size:]
    if len(payload) != x["length"]:
        raise BadInput(f"{name}: {len(blob)} bytes where {HEADER.size + x['length']} were written; "
                       "copy it again")
    if zlib.crc32(payload, zlib.crc32(blob[:HEADER.size - 4])) != x["crc"]:
        raise BadInput(f"{name}: damaged: its checksum is wrong; copy it again")
    return x


def layout_of(x, tokenizer, length, name):
    """The fields of a header and the number of bytes after it -> Layout; BadInput if these cannot hold it.

    A right checksum says nothing: whoever crafts a file computes it too, and 48 bytes could ask for
    terabytes.
    """
    pixels = x["frames"] * x["height"] * x["width"]
    if pixels > MOST_PIXELS:
        raise BadInput(f"{name}: claims {x['frames']} x {x['height']} x {x['width']} pixels; at most "
                       f"{MOST_PIXELS} in all are decoded")
    n = x["f"] * x["h"] * x["w"]
    bits = bits_of(tokenizer)
    if x["coder"] == 0:
        fits = length == -(-n * bits // 8)
    else:
        fits = x["coder"] == 1 and n * least_bits(tokenizer.vocab_size) <= 8 * length
    if not pixels or x["bits"] != bits or not fits:
        raise BadInput(f"{name}: its header contradicts itself or its length")
    lay = Layout(tokenizer, x["frames"], x["height"], x["width"])
    if (x["f"], x["h"], x["w"]) != (lay.f, lay.h, lay.w):
        raise BadInput(f"{name}: its header contradicts itself")
    return lay


# ---- Reading and writing pictures ----------------------------------------------------------------

def need_av(path):
    """-> the optional package av, or BadInput."""
    try:
        import av
    except ImportError:
        raise BadInput(f"{path}: needs the optional package av: pip install av; or use a .gif, .webp or "
                       ".png") from None
    return av


def read_clip(path):
    """An image, GIF, animated WebP, or with av a film -> clip (N, 3, H, W) uint8, milliseconds per frame.

    Of a single image these are 0. BadInput for what cannot be read or is larger than MOST_PIXELS.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: there is no such file")
    try:
        frames, ms = read_film(path) if path.suffix.lower() in FILMS else read_picture(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise BadInput(f"{path}: not a readable image or clip ({e})") from None
    clip = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    if max(clip.shape) > MOST:
        raise BadInput(f"{path}: {tuple(clip.shape)}: at most {MOST} frames, rows and columns fit into the "
                       "header")
    return clip, min(ms, 65535)


def read_film(path):
    """A film, by the package av -> list of (H, W, 3) uint8, milliseconds per frame."""
    av = need_av(path)
    try:
        with av.open(str(path)) as film:
            rate = film.streams.video[0].average_rate
            frames = bounded((frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)), path)
    except (av.error.FFmpegError, IndexError) as e:
        raise ValueError(e) from None
    return frames, round(1000 / rate) if rate else 40


def read_picture(path):
    """An image or an animation -> list of (H, W, 3) uint8, milliseconds per frame (0: an image)."""
    with Image.open(path) as picture:
        frames = bounded((np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(picture)), path)
        return frames, round(picture.info.get("duration", 0) or 100) if len(frames) > 1 else 0


def bounded(frames, path):
    """An iterator of frames (H, W, 3) -> their list; BadInput as soon as they have more than MOST_PIXELS."""
    kept = []
    for frame in frames:
        kept.append(frame)
        if len(kept) * frame.shape[0] * frame.shape[1] > MOST_PIXELS:
            raise BadInput(f"{path}: more than {MOST_PIXELS} pixels in all; make it shorter or smaller")
    return kept


def write_clip(path, clip, ms):
    """clip (N, 3, H, W) uint8 -> .png (one frame), .gif (256 colours), .webp (lossless), or with av .mp4."""
    ending = Path(path).suffix.lower()
    frames = clip.permute(0, 2, 3, 1).contiguous().numpy()
    if ending == ".png" and len(clip) > 1:
        raise BadInput(f"{path}: {len(clip)} frames do not fit into a PNG; name a .gif, .webp or .mp4")
    if ending in (".png", ".gif", ".webp"):
        first, *rest = (Image.fromarray(x) for x in frames)
        moving = dict(save_all=True, append_images=rest, duration=ms, loop=0) if rest else {}
        lossless = dict(lossless=True) if ending == ".webp" else {}
        first.save(path, **moving, **lossless)
    elif ending == ".mp4":
        write_film(path, frames, ms)
    else:
        raise BadInput(f"{path}: the ending must be .png, .gif, .webp or .mp4")


def write_film(path, frames, ms):
    """frames (N, H, W, 3) uint8 -> an .mp4, by the package av."""
    av = need_av(path)
    N, H, W, _ = frames.shape
    even = H % 2 == 0 and W % 2 == 0                        # yuv420p has half as many colours as pixels
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=max(1, round(1000 / (ms or 1000))), options=dict(crf="12"))
        stream.width = W
        stream.height = H
        stream.pix_fmt = "yuv420p" if even else "yuv444p"
        for x in frames:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(x, format="rgb24")))
        film.mux(stream.encode())


# ---- The program ---------------------------------------------------------------------------------

def coder_of(args, run):
    """The transformer of --entropy_coder, or for decompress the one in --run -> ARTransformer or None."""
    asked = args.entropy_coder is not None
    other = runs.load_run(args.entropy_coder, "cpu") if asked else run
    fits = (other.generator is not None and other.args.generator == "ar" and other.args.condition == "class"
            and isinstance(other.generator.head, ar_transformer.CategoricalHead))
    if asked and not fits:
        raise BadInput(f"--entropy_coder {args.entropy_coder}: must be a run of --generator ar --head "
                       "categorical, without --condition text")
    if asked and fingerprint(other.tokenizer) != fingerprint(run.tokenizer):
        raise BadInput(f"--entropy_coder {args.entropy_coder}: was trained on the tokens of another "
                       f"tokenizer than that of --run {args.run}")
    return other.generator if fits and (asked or args.direction == "decompress") else None


def compress(args, run, model):
    """A picture or clip -> a file of ids; prints its size and how much was lost."""
    clip, ms = read_clip(args.file)
    start = time.perf_counter()
    ids, lay = to_ids(run.tokenizer, clip)
    blob = write(ids, lay, run.tokenizer, model, ms)
    seconds = time.perf_counter() - start
    Path(args.out).write_bytes(blob)
    mse = (from_ids(run.tokenizer, ids, lay).float() - clip.float()).square().mean().item()
    db = 10 * math.log10(255**2 / max(mse, 1e-9))
    bpp = 8 * len(blob) / (lay.frames * lay.height * lay.width)
    fixed = f" (fixed length: {-(-ids.numel() * bits_of(run.tokenizer) // 8)})" if model else ""
    print(f"{args.out}: {len(blob)} bytes, {len(blob) - HEADER.size} of them{fixed} for {lay.f} x {lay.h} x "
          f"{lay.w} ids of {lay.frames} x {lay.height} x {lay.width} pixels: {bpp:.4f} bits per pixel, "
          f"PSNR {db:.2f} dB; {seconds:.1f} s")


def decompress(args, run, model):
    """A file of ids -> a picture or clip."""
    if not Path(args.file).is_file():
        raise BadInput(f"{args.file}: there is no such file")
    start = time.perf_counter()
    ids, lay, ms = read(Path(args.file).read_bytes(), run.tokenizer, model, args.file)
    write_clip(args.out, from_ids(run.tokenizer, ids, lay), ms)
    seconds = time.perf_counter() - start
    print(f"{args.out}: {lay.frames} x {lay.height} x {lay.width} pixels, {seconds:.1f} s")


def parse_args(argv=None):
    p = argparse.ArgumentParser(prog="python -m recipes.compress",
                                description="Images and clips as files of tokens, and back.")
    p.add_argument("direction", choices=["compress", "decompress"], help="to tokens, or back to pixels")
    p.add_argument("file",
                   help="compress: an image, .gif, .webp, or a film such as .mp4; decompress: a file of ids")
    p.add_argument("out",
                   help="compress: the file to write, such as x.lfq; decompress: a .png, .gif, .webp or .mp4")
    p.add_argument("--run", required=True,
                   help="run folder with a tokenizer of ids (lfq, vq, titok): the same both ways")
    p.add_argument("--entropy_coder",
                   help="run folder of an AR transformer on the same ids: smaller files, but slower")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    run = runs.load_run(args.run, "cpu")
    if run.tokenizer.vocab_size is None:
        raise BadInput(f"--run {args.run}: needs a tokenizer that makes ids of images: lfq, vq or titok")
    model = coder_of(args, run)
    try:
        if args.direction == "compress":
            compress(args, run, model)
        else:
            decompress(args, run, model)
    except OSError as e:
        raise BadInput(f"could not write {args.out} ({e})") from None


if __name__ == "__main__":
    main()
