"""Tests of vq."""
import copy
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import train
import vq
from common import pictures, runs, yardsticks
from official import llamagen
from tests.helpers import close, like_photographs, tokens_of, vq_golden


@pytest.mark.parametrize("name", ["res_32_64", "res_32_32", "attn_32", "down_32", "up_32"])
def test_vq_blocks_are_the_authors(name):
    g, sd = vq_golden("vq_blocks")
    kinds = {"attn_32": vq.AttnBlock, "down_32": vq.Downsample, "up_32": vq.Upsample}
    block = kinds[name](32) if name in kinds else vq.ResBlock(32, int(name[-2:]))
    block.load_state_dict({k.removeprefix(name + "."): v for k, v in sd.items() if k.startswith(name + ".")})
    with torch.no_grad():
        close(block(g["in/x"]), g["out/" + name])


@pytest.mark.parametrize("name", ["l2norm", "nonorm"])
def test_vq_quantizer_has_the_authors_codes_losses_and_gradients(name):
    g, sd = vq_golden(f"vq_quantizer_{name}")
    quantizer = vq.VectorQuantizer(64, 8, l2_norm=name == "l2norm", entropy=0.1)
    quantizer.load_state_dict({"codebook": sd["embedding.weight"]})
    z = g["in/z"].clone().requires_grad_()
    q, ids, loss, logs = quantizer(tokens_of(z))
    assert torch.equal(ids.flatten(), g["out/indices"])
    close(q, tokens_of(g["out/z_q"])), close(quantizer.codes(ids), tokens_of(g["out/codebook_entry"]))
    close(logs["commit"], g["out/commit_loss"], 1e-5), close(logs["entropy"], g["out/entropy_loss"], 1e-5)
    close(loss - logs["commit"] - logs["entropy"], g["out/vq_loss"], 1e-5)
    assert abs(logs["usage"] - len(ids.unique()) / 64) < 1e-6
    (loss + (q * tokens_of(g["in/upstream_grad"])).sum()).backward()
    close(z.grad, g["grad/z"]), close(quantizer.codebook.grad, g["grad/embedding.weight"])


def test_vq_loads_official_weights_and_gets_the_authors_numbers():
    g, sd = vq_golden("vq")
    model = llamagen.load_vq({"model": sd | {"quantize.codebook_used": torch.zeros(65536)}}, image_size=16)
    assert model.seq_len == 64 and model.grid == (8, 8) and model.vocab_size == 64 and not model.training
    with torch.no_grad():
        close(model.encoder(g["in/x"]), g["out/enc_h"]), close(model.latents(g["in/x"]),
                                                               tokens_of(g["out/z_pre_quant"]))
    ids = model.encode(g["in/x"])
    assert torch.equal(ids.flatten(), g["out/indices"])
    close(model.quantizer.codes(ids), tokens_of(g["out/quant"]))
    close(model.decode_raw(model.quantizer.codes(ids)), g["out/dec"])
    assert torch.equal(model.decode(ids), model.decode_raw(model.quantizer.codes(ids)).clamp(-1, 1))
    model.quantizer.entropy = 0.1                           # as in the authors' run; 0 is the default
    loss, logs = model.train()(g["in/x"])
    close(model.reconstruct(g["in/x"])[0], g["out/rec_train"])
    close(loss, g["out/total_loss"], 1e-5), close(logs["commit"], g["out/commit_loss"], 1e-5)
    close(logs["entropy"], g["out/entropy_loss"], 1e-5)
    close(loss - logs["mse"] - logs["commit"] - logs["entropy"], g["out/vq_loss"], 1e-4)
    loss.backward()
    ours = {
        "quantize.embedding.weight": model.quantizer.codebook, "quant_conv.weight": model.quant_conv.weight,
        "post_quant_conv.weight": model.post_quant_conv.weight,
        "encoder.conv_in.weight": model.encoder[0].weight, "decoder.conv_out.weight": model.decoder[-1].weight
    }
    for key, weight in ours.items():
        close(weight.grad, g["grad/" + key])


def test_load_vq_names_the_key_that_does_not_fit(tmp_path):
    _, sd = vq_golden("vq")
    torch.save({"model": sd}, tmp_path / "vq_ds2.pt")
    assert llamagen.load_vq(tmp_path / "vq_ds2.pt").seq_len == 128 * 128
    with pytest.raises(ValueError, match="decoder.extra.weight"):
        llamagen.load_vq(sd | {"decoder.extra.weight": torch.zeros(1)})
    for key in ("decoder.conv_blocks.0.attn.1.q.bias", "quant_conv.weight",
                "encoder.conv_blocks.1.res.0.conv1.weight"):
        with pytest.raises(ValueError, match=key):
            llamagen.load_vq({k: v for k, v in sd.items() if k != key})


def test_vq_of_the_papers_has_its_parameter_count():
    count = lambda module: sum(p.numel() for p in module.parameters())
    for name, total, encoder, decoder, T in (("ds16", 71_883_403, 29_298_176, 42_449_795, 256),
                                             ("ds8", 70_109_835, 28_559_232, 41_415_171, 1024)):
        with torch.device("meta"):
            model = vq.VQ(**vq.SIZES[name])
        assert (count(model), count(model.encoder), count(model.decoder), model.seq_len) == (total, encoder,
                                                                                             decoder, T)
        assert count(
            model.quantizer) == 131_072 and count(model.quant_conv) + count(model.post_quant_conv) == 4_360


@pytest.mark.parametrize(
    "options",
    [dict(), dict(l2_norm=False), dict(l2_norm=False, ema=0.99),
     dict(ema=0.9)])
def test_vq_keeps_the_contract_of_a_tokenizer(options):
    model, images = vq.VQ(image_size=16, vocab_size=32, code_dim=4,
                          **options), data.draw(torch.arange(6), 16)[0]
    assert model.token_dim is None and model.vocab_size == 32 and model.grid == (4, 4) and model.seq_len == 16
    loss, logs = model(images, torch.zeros(6, dtype=torch.long))
    loss.backward()
    assert loss.ndim == 0 and all(v.ndim == 0 and not v.requires_grad for v in logs.values())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert ("quantizer.codebook" in dict(model.named_parameters())) == (not model.quantizer.ema)
    ids = model.encode(images)
    assert ids.shape == (6, 16) and ids.dtype == torch.int64 and 0 <= ids.min() and ids.max() < 32
    recon = model.decode(ids)
    assert recon.shape == images.shape and recon.abs().max() <= 1
    recon_, auxiliary, logs = model.eval().reconstruct(images)
    assert torch.allclose(model(images)[0], auxiliary + F.mse_loss(recon_, images))
    assert torch.allclose(model.decode(model.encode(images)), recon_.clamp(-1, 1),
                          atol=1e-5), "the decoder sees codes only"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, _, loss, _ = model.quantizer(torch.randn(2, 16, 4).bfloat16())
    assert q.dtype == loss.dtype == torch.float32
    with pytest.raises(ValueError, match="multiple of 4"):
        vq.VQ(image_size=30)


def test_vq_sees_grey_images_and_label_maps():
    grey = data.draw(torch.arange(4), 16)[0].mean(1, keepdim=True).expand(-1, 3, -1, -1)
    model = vq.VQ(image_size=16, channels=1)
    assert model.encoder[0].weight.shape[1] == model.decoder[-1].weight.shape[0] == 1
    recon = model.decode(model.encode(grey))
    assert recon.shape == grey.shape and torch.equal(recon[:, 0], recon[:, 2])
    colour = grey + torch.tensor([0.3, -0.1, -0.2])[:, None, None]
    assert torch.allclose(model.latents(colour), model.latents(grey), atol=1e-4), "only the average is seen"
    loss, logs = model(grey)
    assert torch.allclose(loss, logs["mse"] + logs["commit"] * 5), "codebook loss and a quarter of it"
    maps = F.one_hot(data.draw(torch.arange(4), 16)[2].long(), 11).permute(0, 3, 1, 2).float() * 2 - 1
    model = vq.VQ(image_size=16, channels=11)
    assert model.decode(model.encode(maps)).shape == maps.shape and model(maps)[0].ndim == 0


@pytest.mark.parametrize("l2_norm", [True, False])
def test_vq_takes_the_nearest_code(l2_norm):
    quantizer, z = vq.VectorQuantizer(200, 6, l2_norm), torch.randn(3, 50, 6)
    nn.init.normal_(quantizer.codebook)
    unit = (lambda v: v / v.norm(dim=-1, keepdim=True)) if l2_norm else (lambda v: v)
    codes = unit(quantizer.codebook.detach().double())
    slow = [[(unit(v) - codes).square().sum(1).argmin() for v in row] for row in z.double()]
    ids = quantizer.nearest(z)
    assert torch.equal(ids, torch.tensor(slow))
    assert torch.allclose(quantizer.codes(ids), codes[ids].float(), atol=1e-6)
    own = torch.arange(200).view(4, 50)
    assert torch.equal(quantizer.nearest(quantizer.codes(own)),
                       own), "ids survive being looked up and found again"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.nearest(z), ids), "float32 under autocast too"


def test_vq_gradient_goes_straight_through():
    quantizer, g = vq.VectorQuantizer(16, 3, l2_norm=False), torch.randn(2, 5, 3)
    z = torch.randn(2, 5, 3, requires_grad=True)
    q, ids, loss, _ = quantizer(z)
    assert torch.allclose(q, quantizer.codes(ids), atol=1e-6)
    through, codes = torch.autograd.grad((q * g).sum(), (z, quantizer.codebook), retain_graph=True,
                                         allow_unused=True)
    assert codes is None and torch.equal(through, g), "the decoder's gradient passes the codes by"
    pull, codes = torch.autograd.grad(loss, (z, quantizer.codebook))
    e = quantizer.codebook.detach()[ids]
    assert torch.allclose(pull, 0.25 * 2 * (z - e).detach() / z.numel(), atol=1e-7)
    slow = torch.zeros(16, 3).index_add_(0, ids.flatten(), (2 * (e - z) / z.numel()).detach().flatten(0, 1))
    assert torch.allclose(codes, slow, atol=1e-7)


def test_vq_usage_and_perplexity_count_codes():
    quantizer = vq.VectorQuantizer(8, 2, l2_norm=False)
    with torch.no_grad():
        quantizer.codebook.copy_(10 * torch.arange(16.0).view(8, 2))
    ids = torch.tensor([[0, 0, 0, 0, 5, 5, 7, 7]])
    q, found, _, logs = quantizer(quantizer.codes(ids))
    assert torch.equal(found, ids) and torch.equal(quantizer.count(ids),
                                                   torch.tensor([4.0, 0, 0, 0, 0, 2, 0, 2]))
    assert logs["usage"] == 3 / 8 and abs(logs["perplexity"] - 2 ** 1.5) < 1e-5    # frequencies 1/2, 1/4, 1/4


@pytest.mark.parametrize("l2_norm", [True, False])
def test_vq_moving_averages_equal_a_slow_loop(l2_norm):
    V, decay = 12, 0.9
    quantizer = vq.VectorQuantizer(V, 4, l2_norm, ema=decay, restart=0)
    unit = (lambda v: v / v.norm()) if l2_norm else (lambda v: v)
    N, m, e = [1.0] * V, list(quantizer.codebook.clone()), list(quantizer.codebook.clone())
    for step in range(5):
        z = torch.randn(2, 20, 4)
        _, ids, loss, logs = quantizer(z)
        flat = [unit(v) for v in z.flatten(0, 1)]
        expected = [min(range(V), key=lambda k: (v - e[k]).square().sum()) for v in flat]
        assert ids.flatten().tolist() == expected
        assert torch.equal(loss, logs["commit"]), "no codebook loss beside the averages"
        for k in range(V):
            mine = [v for v, i in zip(flat, expected) if i == k]
            N[k] = decay * N[k] + (1 - decay) * len(mine)
            m[k] = decay * m[k] + (1 - decay) * sum(mine, torch.zeros(4))
        for k in range(V):
            e[k] = unit(m[k] / ((N[k] + 1e-5) / (sum(N) + V * 1e-5) * sum(N)))
    assert len(set(expected)) > 2
    assert torch.allclose(quantizer.codebook, torch.stack(e), atol=1e-5)
    before = quantizer.codebook.clone()
    quantizer.eval()(torch.randn(2, 20, 4))
    assert torch.equal(quantizer.codebook, before), "evaluation moves nothing"


def test_vq_dead_codes_restart_on_tokens_of_the_batch():
    quantizer = vq.VectorQuantizer(20, 3, l2_norm=False, ema=0.99)
    z = torch.randn(4, 64, 3) * 2 + 1
    count = quantizer.count(quantizer(z)[1])
    dead = count < 0.1 * count.mean()
    from_z = (quantizer.codebook[:, None] - z.flatten(0, 1)).abs().amax(-1).amin(1)         # (20,)
    assert 0 < dead.sum() < 20 and from_z[dead].max() < 1e-3 < from_z[~dead].min(
    ), "the dead ones sit on tokens now"
    with torch.no_grad():                           # as after a long run: each code has its share of 256 / 20
        quantizer.codebook[3] = 1e4                         # nobody's nearest
        quantizer.ema_count.fill_(12.8), quantizer.ema_sum.copy_(12.8 * quantizer.codebook)
    step = next(i for i in range(300) if quantizer(z) and quantizer.codebook[3].max() < 100)
    assert 220 < step < 235, f"0.99^230 = 0.1, but the code restarted after {step} steps"
    assert quantizer(z)[3]["usage"] > 0.9
    still = vq.VectorQuantizer(20, 3, l2_norm=False, ema=0.99, restart=0)
    for step in range(50):
        still(z)
    assert still(z)[3]["usage"] < 0.8, "without restarts most of the codebook stays dead"


def test_vq_learns():
    images = data.draw(torch.arange(64), 16)[0]
    model, losses = vq.VQ(image_size=16, ch_mult=(1, 2)), []
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(20):
        loss, logs = model(images[torch.randint(64, (8,))])
        opt.zero_grad(), loss.backward(), opt.step()
        losses.append(logs["mse"].item())
    assert losses[-1] < 0.5 * losses[0], f"squared error {losses[0]:.3f} to {losses[-1]:.3f}"
    assert logs["usage"] > 0.1, "a short code at unit length does not collapse"


# ---- The linear path

def with_path(vocab_size=256, n=300, images=None, **options):
    """A started, untrained VQ of 8 x 8 ids, and the images, n drawn ones by default, that started it."""
    images = data.draw(torch.arange(n))[0] if images is None else images
    model = vq.VQ(**vq.SIZES["patches"] | dict(vocab_size=vocab_size) | options)
    model.start(images)
    return model.eval(), images


@pytest.mark.parametrize("channels", [1, 3])
def test_vq_starts_no_worse_than_kmeans_of_patches(channels):
    """Before any training step, on images that were not seen."""
    held_out = data.draw(torch.arange(100) + data.VAL_INDEX)[0]
    model, images = with_path(channels=channels)
    if channels == 1:
        images, held_out = (x.mean(1, keepdim=True).expand(-1, 3, -1, -1) for x in (images, held_out))
    ours = yardsticks.psnr_of(model.decode(model.encode(held_out)), held_out)
    assert ours > yardsticks.kmeans_psnr(images, held_out, (8, 8), 256) - 0.1


def test_vq_starts_with_nearly_all_codes_in_use():
    model, images = with_path()
    assert len(model.encode(images).unique()) > 0.9 * 256


def test_vq_codes_are_those_of_a_slow_kmeans():
    z = torch.randn(200, 3)
    torch.manual_seed(1)
    codes, share = vq.kmeans(z, 7, steps=4)
    torch.manual_seed(1)
    slow = z[torch.randperm(200)[:7]].tolist()
    for _ in range(4):
        near = [[] for _ in slow]
        for v in z.tolist():
            near[min(range(7), key=lambda k: sum((a - b) ** 2 for a, b in zip(v, slow[k])))].append(v)
        slow = [[sum(column) / len(mine) for column in zip(*mine)] for mine in near]
    assert torch.allclose(codes, torch.tensor(slow), atol=1e-5)
    assert torch.allclose(share, torch.tensor([len(mine) / 200 for mine in near]))


def test_vq_kmeans_moves_a_code_that_is_nobodys_nearest():
    z = torch.tensor([[0.0], [0.0], [0.0], [1.0]])
    codes, _ = vq.kmeans(z, 4, steps=1)                     # three codes lie on 0, and the first takes all
    assert all(code in (0, 1) for code in codes.flatten()), "means, or z themselves"
    assert vq.kmeans(z[:3], 5)[0].shape == (5, 1), "fewer z than codes"


def test_vq_way_back_from_codes_is_the_least_squares_one():
    model, images = with_path(n=100)
    q = model.quantizer.codes(model.encode(images)).flatten(0, 1).numpy()
    patches = model.path.cut(images).flatten(0, 1).numpy()
    best = np.linalg.lstsq(np.c_[q, np.ones(len(q))], patches, rcond=None)[0]
    with torch.no_grad():
        close(model.path_out(torch.from_numpy(q)), torch.from_numpy(np.c_[q, np.ones(len(q))] @ best).float())


def test_vq_restarts_keep_the_codes_of_kmeans():
    """A code lives on through steps without a token of its own, and the averages are the codes."""
    model, images = with_path()
    quantizer = model.quantizer
    assert torch.allclose(quantizer.ema_sum / quantizer.ema_count[:, None], quantizer.codebook, atol=1e-5)
    before = quantizer.codebook.clone()
    model.train()
    for step in range(5):
        with torch.no_grad():
            model(images[:32])
    unused = quantizer.count(model.encode(images[:32])) == 0
    assert unused.sum() > 5
    moved = (quantizer.codebook - before)[unused].norm(dim=1) / before[unused].norm(dim=1)
    assert moved.max() < 0.01


def test_vq_a_code_that_kmeans_left_unused_has_69_steps_to_show_its_use():
    model, images = with_path(vocab_size=64, n=50)
    codes = model.quantizer.codebook.clone()
    codes[5] = 100.0                                        # nobody's nearest
    model.start_codes(codes, torch.full((64,), 1 / 63).index_fill(0, torch.tensor(5), 0.0))
    with torch.no_grad():
        z = model.train().latents(images[:32])
        step = next(i for i in range(100) if model.quantizer(z) and model.quantizer.codebook[5].max() < 50)
    assert 60 < step < 80, f"0.99^69 = 1/2, but the code restarted after {step} steps"


def test_vq_start_depends_on_the_seed_alone():
    torch.manual_seed(3)
    first, _ = with_path(vocab_size=64, n=50)
    torch.manual_seed(3)
    second, _ = with_path(vocab_size=64, n=50)
    other, _ = with_path(vocab_size=64, n=50)
    weights = second.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in first.state_dict().items())
    assert not torch.equal(other.quantizer.codebook, first.quantizer.codebook)


@pytest.mark.parametrize("kind", ["drawn shapes", "like photographs"])
def test_vq_never_ends_below_its_linear_path(kind):
    model, images = with_path(n=200, images=like_photographs(200) if kind == "like photographs" else None)
    before = F.mse_loss(model.decode(model.encode(images)), images)
    vq.fit_vq(model.train(), images, steps=25, batch_size=8, lr=2e-3)
    model.eval()
    after = F.mse_loss(model.decode(model.encode(images)), images)
    assert after < before, (before, after)


def test_vq_linear_path_is_in_the_checkpoint_and_in_no_published_one():
    model, images = with_path(vocab_size=64, n=50)
    other = vq.VQ(**vq.SIZES["patches"] | dict(vocab_size=64)).eval()
    other.load_state_dict(model.state_dict())
    ids = model.encode(images)
    assert torch.equal(other.encode(images), ids) and torch.equal(other.decode(ids), model.decode(ids))
    assert not any("path" in name for name in vq.VQ(**vq.SIZES["small"]).state_dict())


def test_vq_without_a_linear_path_starts_as_it_was_made():
    model = vq.VQ()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.start(data.draw(torch.arange(4))[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_vq_goes_on_from_its_own_codes_after_a_stop(tmp_path, monkeypatch):
    """--resume starts nothing anew: bit for bit the run that was not stopped."""
    words = ["--tokenizer", "vq", "--tok_size", "patches", "--generator", "none", "--n_shapes", "100",
             "--image_size", "16", "--vocab_size", "64", "--tok_steps", "4", "--tok_batch_size", "4",
             "--device", "cpu", "--runs", str(tmp_path)]
    monkeypatch.setattr(pictures, "save_rows", lambda *a, **k: None)
    monkeypatch.setattr(pictures, "save_curve", lambda *a: None)
    train.main([*words, "--tok_name", "whole"])
    order = data.order

    def stop(n, batch_size, step, seed):
        if step == 2:
            raise KeyboardInterrupt
        return order(n, batch_size, step, seed)
    with monkeypatch.context() as patch:
        patch.setattr(train, "SAVE_SECONDS", -1)
        patch.setattr(data, "order", stop)
        with pytest.raises(SystemExit, match="--resume"):
            train.main([*words, "--tok_name", "stopped"])
    train.main([*words, "--tok_name", "stopped", "--resume"])
    whole, stopped = (runs.read_checkpoint(tmp_path / name)["ema"] for name in ("whole", "stopped"))
    assert whole["module.path.basis"].abs().sum() > 0
    assert all(torch.equal(value, stopped[name]) for name, value in whole.items())


def test_distances_of_codes_are_the_squared_ones_less_that_of_the_token():
    z = torch.randn(7, 5, dtype=torch.float64)
    codes = torch.randn(11, 5, dtype=torch.float64)
    d = vq.VectorQuantizer.distances(z, codes)
    assert torch.allclose(d + z.square().sum(1, keepdim=True), torch.cdist(z, codes) ** 2)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_vq_in_float64_counts_and_quantises_as_in_float32(ema):
    single = vq.VectorQuantizer(16, 4, ema=ema, restart=0)
    double = copy.deepcopy(single).double()
    z = torch.randn(3, 20, 4)
    for _ in range(3):                                      # and learns, where codes are running means
        q, ids, loss, logs = single(z)
        q64, ids64, loss64, logs64 = double(z.double())
        assert q64.dtype == loss64.dtype == torch.float64
        assert torch.equal(ids, ids64)
        slow = torch.tensor([(ids == k).sum() for k in range(16)])
        assert torch.equal(double.count(ids64), slow.double())
        assert torch.allclose(loss64, loss.double(), atol=1e-6)
        assert torch.allclose(q64, q.double(), atol=1e-5)
        assert torch.allclose(logs64["perplexity"], logs["perplexity"].double(), atol=1e-4)
    assert torch.allclose(double.codebook, single.codebook.double(), atol=1e-5)
