"""Tests of compression."""
import math
import struct
import zlib

import numpy as np
import pytest
import torch
import torch.nn as nn

import ar_transformer
import compression
import data
import lfq
import titok
import vq


def tiny_codec(clips=True, side=8):
    """A video (or image) LFQ of 64 words and a transformer on its grid, random weights -> tokenizer, transformer."""
    torch.manual_seed(0)
    tokenizer = lfq.LFQ(side, 5 if clips else 1, bits=6, ch=8, ch_mult=(1, 2), n_res=1, groups=4)           # 3 x 4 x 4 ids
    head = ar_transformer.CategoricalHead(16, 64)
    nn.init.normal_(head.proj.weight, std=0.3)
    model = ar_transformer.ARTransformer(head, tokenizer.seq_len, 3, vocab_size=64, grid=tokenizer.grid, n_layer=1, n_head=2, n_embd=16)
    return tokenizer.eval(), model.eval()


def test_arithmetic_coder_reaches_the_entropy_and_inverts():
    rng = np.random.default_rng(0)
    for total, n in ((2, 5000), (1000, 5000), ((1 << 31) - 1, 2000), (1 << 31, 2000)):
        encoder, symbols, bits = compression.ArithmeticEncoder(), [], 0.0
        for _ in range(n):                                  # any share, from almost nothing to almost all
            start = int(rng.integers(total)) if rng.random() < 0.5 else 0
            end = int(rng.integers(start, total)) + 1 if rng.random() < 0.5 else total
            symbols.append((start, end))
            bits -= math.log2((end - start) / total)
            encoder.encode(start, end, total)
        payload = encoder.finish()
        assert 8 * len(payload) - bits < 8 + 1e-3 * bits and bits < 8 * len(payload) + 1e-3 * bits
        decoder = compression.ArithmeticDecoder(payload)
        for start, end in symbols:
            assert start <= decoder.target(total) < end
            decoder.advance(start, end, total)
    assert compression.ArithmeticEncoder().finish() == b"\0"
    for start in range(1000):                               # the first number of a share is in it, the one before is not
        decoder.range, decoder.code = (1 << 31) + 12345, ((1 << 31) + 12345) * start // 1000
        assert decoder.target(1000) == start
        decoder.code -= 1
        assert decoder.target(1000) == start - 1
    carries = compression.ArithmeticEncoder()               # 0.0111 1111 ... and then something more: the carry runs far back
    carries.encode((1 << 31) - 1, (1 << 31) + 1, 1 << 32)
    for _ in range(40):
        carries.encode(0, 2, 3), carries.encode(2, 3, 3)
    assert all(bit in (0, 1) for bit in carries.bits)


def test_a_tile_holds_each_place_once_in_the_order_of_the_transformer():
    order = compression.tiles([3, 2], 3, 5, (3, 2, 4))
    assert order.shape == (2 * 2 * 2, 24) and sorted(order[order >= 0].tolist()) == list(range(5 * 3 * 5))
    assert order[0].view(3, 2, 4)[:, 0].tolist() == [[0, 1, 2, 3], [15, 16, 17, 18], [30, 31, 32, 33]]
    assert order[-1].view(3, 2, 4)[1].tolist() == [[5 * 15 - 1, -1, -1, -1], [-1] * 4] and (order[-1].view(3, 2, 4)[2] < 0).all()


def test_ids_survive_the_file_on_a_hundred_random_clips():
    g = torch.Generator().manual_seed(0)
    tokenizer, model = tiny_codec(side=4)
    for _ in range(100):
        frames, height, width = (int(torch.randint(lo, hi, (1,), generator=g)) for lo, hi in ((1, 12), (3, 14), (3, 14)))
        lay = compression.Layout(tokenizer, frames, height, width)
        ids = torch.randint(64, (lay.f, lay.h, lay.w), generator=g)
        for coder in (None, model):
            blob = compression.write(ids, lay, tokenizer, coder, ms=40)
            back, again, ms = compression.read(blob, tokenizer, coder)
            assert torch.equal(back, ids) and (vars(again), ms) == (vars(lay), 40)
        assert len(compression.write(ids, lay, tokenizer)) == 40 + math.ceil(ids.numel() * 6 / 8)


def test_an_arithmetic_coded_file_is_as_long_as_its_model_says():
    tokenizer, model = tiny_codec()
    lay = compression.Layout(tokenizer, 12, 41, 20)         # 3, 3, 2 x 21 x 10 ids: two batches of tiles, some hang over
    torch.manual_seed(1)
    places, ids = compression.tiles(lay.lengths, lay.h, lay.w, model.grid), torch.zeros(lay.f * lay.h * lay.w, dtype=torch.long)
    drawn = model.sample(torch.full((len(places),), model.num_classes))
    ids[places[places >= 0]] = drawn[places >= 0]           # as the model expects them, so that there is something to save
    padded = torch.where(places >= 0, ids[places], 0)
    with torch.no_grad():                                   # in one pass: the same probabilities, but for rounding
        nats = model.head.loss(model.hidden(padded, torch.full((len(places),), 3)), padded)[places >= 0].sum().item()
    size = len(compression.encode_ids(ids.view(lay.f, lay.h, lay.w), lay.lengths, model))
    bits = nats / math.log(2)
    assert bits / 8 < size < 1.002 * bits / 8 + 4, (bits / 8, size)         # 0.0014 bits per token are given away knowingly
    assert size < 0.95 * len(compression.pack(ids, 6))
    table = compression.cumulative(torch.tensor([[0.0, 300.0, -300.0]]))                    # none is impossible
    assert (np.diff(table) >= 1).all() and table[0, 0] == 0 and np.diff(table)[0, 1] / table[0, -1] > 0.999


def test_a_clip_of_any_size_goes_through_every_tokenizer():
    for tokenizer in (tiny_codec()[0], tiny_codec(False)[0], vq.VQ(8, 50, ch=8, ch_mult=(1, 2), z_channels=8, groups=4).eval(),
                      titok.TiTok(8, 3, 50, enc=(16, 1, 2), dec=(16, 1, 2)).eval()):
        clip = torch.randint(256, (7, 3, 11, 18), dtype=torch.uint8)
        grid = tokenizer.grid
        ids, lay = compression.to_ids(tokenizer, clip)
        back = compression.from_ids(tokenizer, ids, lay)
        assert back.shape == clip.shape and back.dtype == torch.uint8 and tokenizer.grid == grid
        again, _, _ = compression.read(compression.write(ids, lay, tokenizer), tokenizer)
        assert torch.equal(compression.from_ids(tokenizer, again, lay), back)
    tokenizer, _ = tiny_codec()                             # at its own size: what the tokenizer itself says
    clip = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)
    x = clip.float().transpose(0, 1)[None] / 127.5 - 1
    ids, lay = compression.to_ids(tokenizer, clip)
    assert torch.equal(ids.flatten(), tokenizer.encode(x)[0])
    assert torch.equal(compression.from_ids(tokenizer, ids, lay), data.to_uint8(tokenizer.decode(tokenizer.encode(x)))[0].transpose(0, 1))


def test_truncated_altered_and_foreign_files_are_refused():
    tokenizer, model = tiny_codec()
    lay = compression.Layout(tokenizer, 5, 8, 8)
    ids = torch.randint(64, (lay.f, lay.h, lay.w), generator=torch.Generator().manual_seed(0))
    for coder in (None, model):
        blob = compression.write(ids, lay, tokenizer, coder)
        wrong = [blob[:n] for n in range(len(blob))] + [blob + b"\0"]
        wrong += [blob[:n] + bytes([blob[n] ^ 1 << n % 8]) + blob[n + 1:] for n in range(len(blob))]
        for bad in wrong:
            with pytest.raises(data.BadInput, match="x.lfq: .*"):
                compression.read(bad, tokenizer, coder, "x.lfq")
    with pytest.raises(data.BadInput, match="another tokenizer"):
        compression.read(blob, tiny_codec(False)[0], model)
    with pytest.raises(data.BadInput, match="arithmetic-coded; name the run"):
        compression.read(blob, tokenizer)
    with torch.no_grad():
        model.blocks[0].mlp.w1.weight[0, 0] += 1e-3
    with pytest.raises(data.BadInput, match="another transformer"):
        compression.read(blob, tokenizer, model)
    good = compression.write(ids, lay, tokenizer)
    head = good[:32] + bytes(4)                             # whole, but not the ids that were meant: other probabilities
    with pytest.raises(data.BadInput, match="on another machine"):
        compression.read(head + struct.pack("<I", zlib.crc32(good[40:], zlib.crc32(head))) + good[40:], tokenizer)
