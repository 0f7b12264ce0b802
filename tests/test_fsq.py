"""Tests of lfq.py's other quantisers, FSQ and BSQ: the authors' arrays, whole numbers, flags."""
import math

import pytest
import torch
import torch.nn.functional as F

import data
import lfq
import train
from common import runs
from tests.helpers import close, golden

LEVELS = ["3_3_3", "3_5_4", "4_4", "8_6_5", "8_5_5_5", "7_5_5_5_5", "8_8_8_6_5", "16_15"]


@pytest.mark.parametrize("name", LEVELS)
def test_fsq_bounds_rounds_and_counts_like_the_authors(name):
    """Their notebook; of levels 16, 15 its index loses a step, so there the port's indices are the truth."""
    g = {key.removeprefix(name + "/"): v for key, v in golden("beyond/fsq").items()
         if key.startswith(name + "/")}
    levels = tuple(map(int, name.split("_")))
    z = g["z"].clone().requires_grad_()
    close(lfq.fsq_bound(z, levels), g["bounded"], 1e-5)
    q, ids = lfq.fsq_quantize(z, levels)
    close(q, g["codes"], 1e-6)
    truth = g["torch_indices"] if name == "16_15" else g["indices"]
    assert ids.dtype == torch.int64 and torch.equal(ids, truth.long())
    if name == "16_15":
        assert (g["indices_truncated_bug"].long() - ids).unique().tolist() == [-1, 0]
    close(torch.autograd.grad((q * g["upstream_grad"]).sum(), z)[0], g["grad"], 1e-5)
    close(lfq.fsq_codes(ids, levels), q, 1e-6)
    everything = lfq.fsq_codes(torch.arange(math.prod(levels)), levels)
    assert len(everything.unique(dim=0)) == math.prod(levels)
    if "codebook" in g:
        close(everything, g["codebook"], 1e-6)


@pytest.mark.parametrize("levels", [*lfq.FSQ_LEVELS.values(), (2, 22, 31), (1001,)])
def test_fsq_reaches_every_code_and_no_other(levels):
    """By any z, far away ones too. Each value of each channel, in float32 and within its range."""
    z = torch.cat([torch.linspace(-12, 12, 40_001), torch.tensor([-1e30, 1e30])])[:, None]
    for channel, L in enumerate(levels):
        if L == 1001:                                       # (1 - 1/1000) cuts its outermost values off
            continue
        one = z.expand(-1, len(levels))
        index = lfq.fsq_quantize(one, levels)[1] // math.prod(levels[:channel]) % L
        assert index.unique().tolist() == list(range(L))
    ids = lfq.fsq_quantize(z.expand(-1, len(levels)), levels)[1]
    assert 0 <= ids.min() and ids.max() < math.prod(levels)


def test_fsq_zero_is_a_code_and_halves_are_not_biased():
    for levels in lfq.FSQ_LEVELS.values():
        q, _ = lfq.fsq_quantize(torch.zeros(1, len(levels)), levels)
        assert not q.any(), "0 stays 0, with an even number of levels too"


def test_fsq_has_no_loss_and_no_parameter():
    quantizer = lfq.FiniteScalarQuantizer((8, 5, 5, 5))
    assert not list(quantizer.parameters()) and quantizer.vocab_size == 1000
    q, ids, loss, logs = quantizer(torch.randn(2, 30, 4).bfloat16())
    assert q.dtype == torch.float32 and loss == 0
    p = torch.bincount(ids.flatten(), minlength=1000) / 60
    assert logs["usage"] == (p > 0).float().mean() and torch.allclose(
        logs["perplexity"], torch.special.entr(p).sum().exp())


def test_bsq_codes_entropies_losses_and_gradients_are_the_authors():
    """g bits in a group are 8 / g groups here; the exact numbers are those of all 256 codes in float64."""
    g = golden("beyond/bsq")
    u = g["in/u"].clone().requires_grad_()
    z = F.normalize(u, dim=-1)
    close(z, g["out/z"], 1e-6)
    quantizer = lfq.BinarySphericalQuantizer(8)
    q, ids = quantizer.quantize(z)
    close(q, g["out/zq"], 1e-6)
    assert torch.equal(lfq.quantize(z.flip(-1))[1], g["out/indices"].long()), "they read bits the other way"
    close(quantizer.codes(ids), q, 1e-6)
    turned = torch.tensor([int(f"{i:08b}"[::-1], 2) for i in range(256)])
    close(quantizer.codes(turned) * math.sqrt(8), g["out/all_codes"], 1e-6)
    alone = g["out/z"].clone().requires_grad_()
    q, _ = lfq.quantize(alone)
    grad, = torch.autograd.grad((q / math.sqrt(8) * g["in/upstream_grad"]).sum(), alone)
    close(grad, g["grad/st_wrt_z"], 1e-6)
    for t in (1, 10, 100):
        for size in (8, 1):
            quantizer = lfq.BinarySphericalQuantizer(8, entropy=1.0, beta=0.25, scale=t, groups=8 // size)
            u = g["in/u"].clone().requires_grad_()
            _, _, loss, logs = quantizer(u)
            name = f"g{size}_group_t{t}"
            close(logs["entropy_sample"], g[f"out/{name}_per_sample"], 1e-4)
            close(logs["entropy_batch"], g[f"out/{name}_codebook"], 1e-4)
            close(logs["commit"], g["out/commit"], 1e-5)
            close(loss, g[f"out/{name}_loss"], 1e-4)
            close(torch.autograd.grad(loss, u)[0], g[f"grad/{name}_loss"], 1e-3)
        whole = lfq.BinarySphericalQuantizer(8, scale=t)(g["in/u"])[3]
        close(whole["entropy_sample"].double(), g[f"exact/per_sample_t{t}"], 1e-5)
        close(whole["entropy_batch"].double(), g[f"exact/codebook_t{t}"], 1e-5)
    for size in (4, 2):
        loss = lfq.BinarySphericalQuantizer(8, entropy=1.0, beta=0.25, groups=8 // size)(g["in/u"])[2]
        close(loss, g[f"out/g{size}_group_t1_loss"], 1e-4)


@pytest.mark.parametrize("codebook, n, vocab_size", [("fsq", 4, 1000), ("bsq", 10, 1024)])
@pytest.mark.parametrize("frames", [1, 5])
def test_the_tokenizer_keeps_its_contract_with_other_quantisers(codebook, n, vocab_size, frames):
    images = data.draw(torch.arange(4), 16)[0] if frames == 1 else data.draw_clips(torch.arange(4), 16, 5)[0]
    model = lfq.LFQ(image_size=16, frames=frames, n_res=1, codebook=codebook)
    assert model.vocab_size == vocab_size and model.latents(images).shape[-1] == n
    loss, logs = model(images)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert loss.ndim == 0 and all(v.ndim == 0 and not v.requires_grad for v in logs.values())
    ids = model.eval().encode(images)
    assert ids.shape == (4, model.seq_len) and 0 <= ids.min() and ids.max() < vocab_size
    with torch.no_grad():
        recon = model.reconstruct(images)[0]
    assert torch.allclose(model.decode(ids), recon.clamp(-1, 1), atol=1e-5), "the decoder sees ids only"


def resolved(tmp_path, *words):
    given = train.parse_args(["--tokenizer", "lfq", *words, "--device", "cpu", "--runs", str(tmp_path)])
    args = runs.resolve(given, *runs.folders(given))
    runs.refuse(args)
    return args


def test_flags_choose_the_levels_and_the_bits(tmp_path):
    for words, vocab_size, n in ((["fsq"], 1000, 4), (["fsq", "--vocab_size", "4375"], 4375, 5),
                                 (["bsq"], 1024, 10), (["bsq", "--vocab_size", "256"], 256, 8),
                                 (["lfq"], 1024, 10)):
        args = resolved(tmp_path, "--codebook", *words)
        model = runs.build_tokenizer(args)
        assert model.vocab_size == vocab_size and model.quantizer.n_channels == n
    assert runs.build_tokenizer(resolved(tmp_path)).quantizer.beta == 0.05
    with_beta = resolved(tmp_path, "--codebook", "bsq", "--beta", "0.3")
    assert runs.build_tokenizer(with_beta).quantizer.beta == 0.3
    args.codebook = None                                    # a checkpoint from before there was a choice
    assert isinstance(runs.build_tokenizer(args).quantizer, lfq.LookupFreeQuantizer)


@pytest.mark.parametrize("words, sentence", [
    (["--codebook", "fsq", "--vocab_size", "1024"],
     "--vocab_size 1024: fsq has 240, 1000, 4375, 15360, 64000 codes.*nearest is 1000"),
    (["--codebook", "fsq", "--vocab_size", "9"], "nearest is 240"),
    (["--codebook", "bsq", "--vocab_size", "1000"], "power of 2"),
    (["--codebook", "fsq", "--beta", "0.1"], "--beta: .*--codebook fsq has none"),
    (["--codebook", "l2"], "--codebook: is for --tokenizer vq or titok")])
def test_quantisers_refuse_in_a_sentence(words, sentence, tmp_path):
    with pytest.raises(data.BadInput, match=sentence):
        resolved(tmp_path, *words)
    with pytest.raises(data.BadInput, match="--codebook fsq: is for --tokenizer lfq"):
        resolved(tmp_path, "--tokenizer", "vq", "--codebook", "fsq")
