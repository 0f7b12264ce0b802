"""
Text conditions: captions -> bytes that the generator learns to read, or features of a frozen T5 encoder.

    texts --encode--> (N, P) uint8 of bytes, or (N, P, E) float16 of T5; P is the length of the longest,
    args.text_len

Bytes need nothing: the model embeds them and learns to read as it learns to draw. T5 (--text_encoder
google/flan-t5-xl, as in LlamaGen) needs the package transformers and a download; its features are kept in a
file.
"""
import functools
import hashlib

import torch

import ar_transformer
import data
from common import runs, tables
from data import BadInput

T5_LENGTH = 120                                             # tokens of a caption, as in LlamaGen
MOST_BYTES = 512                                    # longer captions lose their end: every step pays for them


def of_images(args, images, split):
    """The captions of a data.ImageSet -> list of str."""
    if args.data == "shapes":
        first = data.VAL_INDEX if split == "val" else 0
        return data.captions(torch.arange(first, first + len(images), device="cpu"), args.seed)
    if images.texts is None:
        raise BadInput(
            f"--condition text: not every image of --data {args.data} has a caption; write NAME.txt beside "
            "NAME.jpg")
    return images.texts


def length_of(args, texts):
    """The number of positions for captions: T5's, or bytes enough for all but the longest 1%.

    One caption of 10,000 letters would make every step a hundred times as long. So what is more than twice as
    long as 99 of 100 captions, or longer than MOST_BYTES, is cut. Says how many are.
    """
    if args.text_encoder != "bytes":
        return T5_LENGTH
    lengths = sorted(len(text.encode()) for text in texts)
    usual = max(1, lengths[int(0.99 * (len(lengths) - 1))])
    length = min(lengths[-1], 2 * usual, MOST_BYTES)
    cut = sum(n > length for n in lengths)
    if cut:
        print(f"{cut} of {len(texts)} captions are longer than {length} bytes: the rest of them is left out")
    return max(1, length)


def encode(args, texts):
    """Captions -> bytes (N, P) uint8, or T5 features (N, P, E) float16, on args.device, zeros in front. P:
    args.text_len.
    """
    device = getattr(args, "device", torch.device("cpu"))
    if args.text_encoder == "bytes":
        cut = [text.encode()[:args.text_len].decode(errors="ignore") for text in texts]
        return ar_transformer.bytes_of(cut, args.text_len).to(device, torch.uint8)
    features = tables.fill(*features_of(args, texts, device), tables.room_on(device))
    return features["features"]


def features_of(args, texts, device):
    """How to make T5's features of captions -> n rows, rows at once, make(i, j): see common/tables.py."""
    def make(i, j):
        tokenizer, encoder = load_t5(args.text_encoder)
        encoder = encoder.to(device)
        words = tokenizer(texts[i:j], padding="max_length", truncation=True, max_length=args.text_len,
                          return_tensors="pt").to(device)
        with torch.no_grad():
            x = encoder(**words).last_hidden_state          # (B, P, E), padding behind
        # LlamaGen pads in front: row p of the result is row p + n of x, after n rows of padding.
        lengths = words["attention_mask"].sum(1, keepdim=True)                        # (B, 1)
        positions = torch.arange(x.shape[1], device=device) + lengths - x.shape[1]                    # (B, P)
        x = x.gather(1, positions.clamp(min=0)[..., None].expand_as(x))
        return {"features": torch.where(positions[..., None] < 0, 0, x).half()}
    return len(texts), 64, make


@functools.lru_cache(maxsize=1)
def load_t5(name):
    """A frozen T5 encoder, by its name or folder -> tokenizer, encoder."""
    try:
        from transformers import AutoTokenizer, T5EncoderModel
    except ImportError:
        raise BadInput(
            f"--text_encoder {name}: needs the optional package transformers: pip install transformers "
            "sentencepiece; or --text_encoder bytes") from None
    try:
        return AutoTokenizer.from_pretrained(name), T5EncoderModel.from_pretrained(name).eval()
    except (OSError, ValueError) as e:
        raise BadInput(f"--text_encoder {name}: {runs.first_line(e)}") from None


def cached(args, texts, path, dist):
    """encode(args, texts), kept in `path` where it was T5's work. Large ones stay on the CPU."""
    if args.text_encoder == "bytes":
        return encode(args, texts)
    key = hashlib.sha1(repr((args.text_encoder, args.text_len, texts)).encode()).hexdigest()
    device = getattr(args, "device", torch.device("cpu"))
    features = tables.kept(path, key, *features_of(args, texts, device), device, dist)["features"]
    load_t5.cache_clear()                                   # gigabytes of the device, not needed in training
    return features


def some(run, n):
    """n captions of validation images of a run, evenly spread."""
    texts = of_images(run.args, runs.open_split(run.args, "val", run.device), "val")
    return [texts[i] for i in torch.linspace(0, len(texts) - 1, n, device="cpu").long().tolist()]
