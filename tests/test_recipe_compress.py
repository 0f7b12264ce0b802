"""Tests of recipes/compress.py."""
import math
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

import ar_transformer
import data
import lfq
import titok
import train
import vq
from common import pictures, runs
from recipes import compress
from tests.helpers import ENV, RARELY, ROOT, TINY, command


def tiny_codec(clips=True, side=8):
    """A video (or image) LFQ of 64 words and a transformer on its grid, random weights -> tokenizer,
    transformer.
    """
    torch.manual_seed(0)
    # 3 x 4 x 4 ids
    tokenizer = lfq.LFQ(side, 5 if clips else 1, bits=6, ch=8, ch_mult=(1, 2), n_res=1, groups=4)
    head = ar_transformer.CategoricalHead(16, 64)
    nn.init.normal_(head.proj.weight, std=0.3)
    model = ar_transformer.ARTransformer(head, tokenizer.seq_len, 3, vocab_size=64, grid=tokenizer.grid,
                                         n_layer=1, n_head=2, n_embd=16)
    return tokenizer.eval(), model.eval()


def test_arithmetic_coder_reaches_the_entropy_and_inverts():
    rng = np.random.default_rng(0)
    for total, n in ((2, 5000), (1000, 5000), ((1 << 31) - 1, 2000), (1 << 31, 2000)):
        encoder, symbols, bits = compress.ArithmeticEncoder(), [], 0.0
        for _ in range(n):                                  # any share, from almost nothing to almost all
            start = int(rng.integers(total)) if rng.random() < 0.5 else 0
            end = int(rng.integers(start, total)) + 1 if rng.random() < 0.5 else total
            symbols.append((start, end))
            bits -= math.log2((end - start) / total)
            encoder.encode(start, end, total)
        payload = encoder.finish()
        assert 8 * len(payload) - bits < 8 + 1e-3 * bits and bits < 8 * len(payload) + 1e-3 * bits
        decoder = compress.ArithmeticDecoder(payload)
        for start, end in symbols:
            assert start <= decoder.target(total) < end
            decoder.advance(start, end, total)
    assert compress.ArithmeticEncoder().finish() == b"\0"
    for start in range(1000):                    # the first number of a share is in it, the one before is not
        decoder.range, decoder.code = (1 << 31) + 12345, ((1 << 31) + 12345) * start // 1000
        assert decoder.target(1000) == start
        decoder.code -= 1
        assert decoder.target(1000) == start - 1
    carries = compress.ArithmeticEncoder()  # 0.0111 1111 ... and then something more: the carry runs far back
    carries.encode((1 << 31) - 1, (1 << 31) + 1, 1 << 32)
    for _ in range(40):
        carries.encode(0, 2, 3), carries.encode(2, 3, 3)
    assert all(bit in (0, 1) for bit in carries.bits)


def test_a_tile_holds_each_place_once_in_the_order_of_the_transformer():
    order = compress.tiles([3, 2], 3, 5, (3, 2, 4))
    assert order.shape == (2 * 2 * 2, 24) and sorted(order[order >= 0].tolist()) == list(range(5 * 3 * 5))
    assert order[0].view(3, 2, 4)[:, 0].tolist() == [[0, 1, 2, 3], [15, 16, 17, 18], [30, 31, 32, 33]]
    assert order[-1].view(3, 2, 4)[1].tolist() == [[5 * 15 - 1, -1, -1, -1], [-1] * 4] and (order[-1].view(
        3, 2, 4)[2] < 0).all()


def test_ids_survive_the_file_on_a_hundred_random_clips():
    g = torch.Generator().manual_seed(0)
    tokenizer, model = tiny_codec(side=4)
    for _ in range(100):
        frames, height, width = (int(torch.randint(lo, hi, (1, ), generator=g))
                                 for lo, hi in ((1, 12), (3, 14), (3, 14)))
        lay = compress.Layout(tokenizer, frames, height, width)
        ids = torch.randint(64, (lay.f, lay.h, lay.w), generator=g)
        for coder in (None, model):
            blob = compress.write(ids, lay, tokenizer, coder, ms=40)
            back, again, ms = compress.read(blob, tokenizer, coder)
            assert torch.equal(back, ids) and (vars(again), ms) == (vars(lay), 40)
        assert len(compress.write(ids, lay, tokenizer)) == 40 + math.ceil(ids.numel() * 6 / 8)


def test_an_arithmetic_coded_file_is_as_long_as_its_model_says():
    tokenizer, model = tiny_codec()
    # 3, 3, 2 x 21 x 10 ids: two batches of tiles, some hang over
    lay = compress.Layout(tokenizer, 12, 41, 20)
    torch.manual_seed(1)
    places, ids = compress.tiles(lay.lengths, lay.h, lay.w,
                                 model.grid), torch.zeros(lay.f * lay.h * lay.w, dtype=torch.long)
    drawn = model.sample(torch.full((len(places),), model.num_classes))
    # as the model expects them, so that there is something to save
    ids[places[places >= 0]] = drawn[places >= 0]
    padded = torch.where(places >= 0, ids[places], 0)
    with torch.no_grad():                              # in one pass: the same probabilities, but for rounding
        nats = model.head.loss(model.hidden_states(padded, torch.full((len(places), ), 3)),
                               padded)[places >= 0].sum().item()
    size = len(compress.encode_ids(ids.view(lay.f, lay.h, lay.w), lay.lengths, model))
    bits = nats / math.log(2)
    # 0.0014 bits per token are given away knowingly
    assert bits / 8 < size < 1.002 * bits / 8 + 4, (bits / 8, size)
    assert size < 0.95 * len(compress.pack(ids, 6))
    table = compress.cumulative(torch.tensor([[0.0, 300.0, -300.0]]))                    # none is impossible
    assert (np.diff(table) >= 1).all() and table[0, 0] == 0 and np.diff(table)[0, 1] / table[0, -1] > 0.999


def test_a_clip_of_any_size_goes_through_every_tokenizer():
    for tokenizer in (tiny_codec()[0], tiny_codec(False)[0],
                      vq.VQ(8, 50, ch=8, ch_mult=(1, 2), z_channels=8,
                            groups=4).eval(), titok.TiTok(8, 3, 50, enc=(16, 1, 2), dec=(16, 1, 2)).eval()):
        clip = torch.randint(256, (7, 3, 11, 18), dtype=torch.uint8)
        grid = tokenizer.grid
        ids, lay = compress.to_ids(tokenizer, clip)
        back = compress.from_ids(tokenizer, ids, lay)
        assert back.shape == clip.shape and back.dtype == torch.uint8 and tokenizer.grid == grid
        again, _, _ = compress.read(compress.write(ids, lay, tokenizer), tokenizer)
        assert torch.equal(compress.from_ids(tokenizer, again, lay), back)
    tokenizer, _ = tiny_codec()                             # at its own size: what the tokenizer itself says
    clip = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    x = clip.float().transpose(0, 1)[None] / 127.5 - 1
    ids, lay = compress.to_ids(tokenizer, clip)
    assert torch.equal(ids.flatten(), tokenizer.encode(x)[0])
    assert torch.equal(compress.from_ids(tokenizer, ids, lay),
                       pictures.to_uint8(tokenizer.decode(tokenizer.encode(x)))[0].transpose(0, 1))


def test_truncated_altered_and_foreign_files_are_refused():
    tokenizer, model = tiny_codec()
    lay = compress.Layout(tokenizer, 5, 8, 8)
    ids = torch.randint(64, (lay.f, lay.h, lay.w), generator=torch.Generator().manual_seed(0))
    for coder in (None, model):
        blob = compress.write(ids, lay, tokenizer, coder)
        wrong = [blob[:n] for n in range(len(blob))] + [blob + b"\0"]
        wrong += [blob[:n] + bytes([blob[n] ^ 1 << n % 8]) + blob[n + 1:] for n in range(len(blob))]
        for bad in wrong:
            with pytest.raises(data.BadInput, match="x.lfq: .*"):
                compress.read(bad, tokenizer, coder, "x.lfq")
    with pytest.raises(data.BadInput, match="another tokenizer"):
        compress.read(blob, tiny_codec(False)[0], model)
    with pytest.raises(data.BadInput, match="arithmetic-coded; name the run"):
        compress.read(blob, tokenizer)
    with torch.no_grad():
        model.blocks[0].mlp.w1.weight[0, 0] += 1e-3
    with pytest.raises(data.BadInput, match="another transformer"):
        compress.read(blob, tokenizer, model)
    good = compress.write(ids, lay, tokenizer)
    head = good[:32] + bytes(4)                  # whole, but not the ids that were meant: other probabilities
    with pytest.raises(data.BadInput, match="on another machine"):
        compress.read(head + struct.pack("<I", zlib.crc32(good[40:], zlib.crc32(head))) + good[40:],
                      tokenizer)


def test_compress_and_decompress_from_the_command_line(tiny_run, tmp_path, capsys, monkeypatch):
    words = ["--tokenizer", "lfq", "--head", "categorical", "--vocab_size", "64"]
    train.main([*TINY, *RARELY, *words, "--runs", str(tiny_run)])
    tok, ar = str(tiny_run / "shapes-lfq"), str(tiny_run / "shapes-lfq-ar-categorical")
    clip = pictures.to_uint8(data.draw_clips(torch.arange(1), 30, 3)[0][0].transpose(0, 1))
    a, b, c = (str(tmp_path / name) for name in ("a.webp", "b.lfq", "c.webp"))
    compress.write_clip(a, clip, 50)
    assert torch.equal(compress.read_clip(a)[0], clip)
    sizes = []
    for coder in ([], ["--entropy_coder", ar]):
        compress.main(["compress", a, b, "--run", tok, *coder])
        assert "3 x 30 x 30 pixels" in capsys.readouterr().out
        sizes.append(Path(b).stat().st_size)
        words = ["decompress", b, c, "--run", ar]           # a run of stage 2 has the tokenizer in it
        if coder:                                           # once in a process of its own
            subprocess.run(command("recipes.compress", *words), cwd=ROOT, env=ENV, check=True)
        else:
            compress.main(words)
        back, ms = compress.read_clip(c)
        tokenizer = runs.load_run(tok).tokenizer
        assert ms == 50 and torch.equal(back, compress.from_ids(tokenizer, *compress.to_ids(tokenizer, clip)))
    ids, lay = compress.to_ids(tokenizer, clip)
    coded = compress.encode_ids(ids, lay.lengths, runs.load_run(ar, "cpu").generator)
    assert sizes == [40 + ids.numel() * 6 // 8, 40 + len(coded)]      # 24 steps may not save anything yet
    Path(tmp_path / "cut.lfq").write_bytes(Path(b).read_bytes()[:-1])
    monkeypatch.setitem(sys.modules, "av", None)
    for words, sentence in ((["decompress", tmp_path / "cut.lfq", c, "--run", tok],
                             "cut.lfq: .*copy it again"), (["decompress", b, c, "--run", tok],
                                                           "name the run that coded it with --entropy_coder"),
                            (["decompress", b, tmp_path / "c.png", "--run",
                              ar], "3 frames do not fit into a PNG"),
                            (["decompress", b, tmp_path / "c.mp4", "--run",
                              ar], "pip install av"), (["decompress", b, tmp_path / "c.xyz", "--run",
                                                        ar], "ending must be"),
                            (["decompress", b, tmp_path / "no" / "c.gif", "--run",
                              ar], "could not write"), (["compress", a, b, "--run",
                                                         tiny_run / "shapes-vae"], "--run .*ids"),
                            (["compress", a, b, "--run", tok, "--entropy_coder",
                              tok], "--entropy_coder .*must be a run of --generator ar"),
                            (["compress", tok, b, "--run",
                              tok], "no such file"), (["compress",
                                                       Path(tok) / "log.csv", b, "--run",
                                                       tok], "not a readable image")):
        with pytest.raises(data.BadInput, match=sentence):
            compress.main([str(w) for w in words])


def crafted(tokenizer, model, coder, frames, height, width, ids, payload):
    """A file with a right checksum whose header claims what it likes: ids (f, h, w)."""
    values = [compress.MAGIC, coder, compress.bits_of(tokenizer), frames, height, width, *ids, 0,
              compress.fingerprint(tokenizer), compress.fingerprint(model), len(payload), 0]
    head = compress.HEADER.pack(*values, 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(payload, zlib.crc32(head))) + payload


@pytest.mark.parametrize("coder, size, ids, sentence", [
    (1, (65535, 65535, 65535), (65535, 65535, 65535), "at most 134217728 in all"),          # 843 TB of pixels
    (0, (65535, 65535, 65535), (65535, 65535, 65535), "at most 134217728 in all"),
    (1, (1, 8192, 8192), (1, 4096, 4096), "contradicts itself or its length"),            # 16M ids in 8 bytes
    (0, (1, 8192, 8192), (1, 4096, 4096), "contradicts itself or its length"),
    (1, (1, 8192, 8192), (1, 2, 2), "contradicts itself"),                       # fits, but is not the layout
    (1, (0, 8, 8), (0, 4, 4), "contradicts itself"),
    (2, (1, 8, 8), (1, 4, 4), "contradicts itself or its length"),
])
def test_a_crafted_header_asks_for_no_more_than_its_file_can_hold(coder, size, ids, sentence, monkeypatch):
    tokenizer, model = tiny_codec(False)
    blob = crafted(tokenizer, model, coder, *size, ids, bytes(8))
    assert len(blob) == 48
    monkeypatch.setattr(compress, "decode_ids", lambda *a: pytest.fail("decoding began"))
    with pytest.raises(data.BadInput, match=sentence):
        compress.read(blob, tokenizer, model)


@pytest.mark.parametrize("V", [2, 64, 1024])
def test_no_id_costs_less_than_the_least(V):
    logits = torch.full((1, V), -1e4)
    logits[0, 1] = 1e4                                      # as sure as can be
    table = compress.cumulative(logits)[0]
    likeliest = -math.log2((table[2] - table[1]) / table[-1])
    assert likeliest == pytest.approx(compress.least_bits(V), rel=1e-9)
    for _ in range(50):                                     # no other distribution is cheaper
        table = compress.cumulative(torch.randn(1, V) * torch.rand(1) * 30)[0]
        assert -math.log2(np.diff(table).max() / table[-1]) >= compress.least_bits(V) * (1 - 1e-9)


def test_the_best_compressible_file_is_not_refused():
    """A model that is sure of every id: as few bytes as there can be for so many ids."""
    tokenizer, model = tiny_codec(False)
    model.head.logits = lambda h: 1e4 * (torch.arange(64) == 7).expand(*h.shape[:-1], 64)
    lay = compress.Layout(tokenizer, 1, 80, 80)
    ids = torch.full((lay.f, lay.h, lay.w), 7)
    blob = compress.write(ids, lay, tokenizer, model)
    assert len(blob) - 40 <= 1600 * compress.least_bits(64) / 8 + 2
    assert torch.equal(compress.read(blob, tokenizer, model)[0], ids)


def test_what_is_larger_than_the_maximum_is_not_compressed_either(tmp_path, monkeypatch):
    monkeypatch.setattr(compress, "MOST_PIXELS", 2 * 8 * 8)
    compress.write_clip(tmp_path / "a.gif", torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8), 50)
    with pytest.raises(data.BadInput, match="a.gif: more than 128 pixels"):
        compress.read_clip(tmp_path / "a.gif")
