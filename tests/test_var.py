"""Tests of var."""
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import mar
import var
from official import var as official
from tests.helpers import close, golden
from tests.test_official_var import ids_of_scales, var_golden

QUANTISERS = ("4scales_4phi", "znorm_1phi", "nonshared", "nophi", "10scales")


def small_quantizer(scales=(1, 2, 3), V=20, D=4, **options):
    """A quantiser with random codes and convolutions that do something."""
    quantizer = var.MultiScaleQuantizer(V, D, scales, **options)
    with torch.no_grad():
        quantizer.codebook.normal_()
        for phi in quantizer.phi:
            phi.weight.normal_(std=0.2)
            phi.bias.normal_(std=0.2)
    return quantizer


def small_var(quantizer=None, num_classes=3, **options):
    """A VAR whose zeros and nearly closed gates have become random numbers."""
    quantizer = quantizer or small_quantizer()
    size = dict(n_layer=2, n_head=2, n_embd=16) | options
    model = var.VAR(var.CategoricalHead(size["n_embd"], quantizer.vocab_size), quantizer, num_classes, **size)
    with torch.no_grad():
        for layer in (*model.modulate, model.head.proj):
            layer.weight.normal_(std=0.5)
        model.cls_embed.weight.normal_()
    return model


# ---- The quantiser

def test_var_scales_share_the_authors_convolutions():
    g = golden("beyond/var_phi_map")
    for key in [key for key in g if key.startswith("map_")]:
        n_phi, n_scales = (int(word[1 + word.startswith("SN"):]) for word in key.split("_")[1:])
        assert [var.phi_of(k, n_scales, n_phi) for k in range(n_scales)] == g[key].tolist(), key


@pytest.mark.parametrize("name", QUANTISERS)
def test_var_quantiser_has_the_authors_ids_sums_losses_and_gradients(name):
    g, sd, cfg = var_golden(f"var_quant_{name}")
    quantizer = official.load_quantizer(sd, cfg["patch_nums"], ratio=abs(cfg["quant_resi"]), beta=cfg["beta"],
                                        cosine=cfg["using_znorm"])
    f = g["in/f"].clone().requires_grad_()
    f_hat, ids, loss, logs = quantizer(f)
    assert torch.equal(ids, ids_of_scales(g, "out/ids_"))
    sums = quantizer.sums(ids)
    close(torch.stack(sums), g["out/f_hat"], 1e-5)
    close(torch.stack([F.mse_loss(total, g["in/f"]) for total in sums]), g["out/mse_per_scale"], 1e-5)
    close(f_hat, g["out/f_hat_st"], 1e-5)
    close(loss, g["out/vq_loss"], 1e-5)
    close(logs["commit"], g["out/vq_loss"] * cfg["beta"] / (1 + cfg["beta"]), 1e-5)
    close(quantizer.inputs(ids), g["out/var_input"], 1e-5)
    free = ids_of_scales(g, "in/free_ids_")
    close(quantizer.sums(free)[-1], g["out/free_f_hat"], 1e-5)
    close(quantizer.inputs(free), g["out/free_var_input"], 1e-5)
    (loss + (f_hat * g["in/upstream_grad"]).sum()).backward()
    close(f.grad, g["grad/f"])
    names = official.quantizer_names(sd)
    ours = dict(quantizer.named_parameters())
    for key in [key for key in g if key.startswith("grad/") and key != "grad/f"]:
        close(ours[names[key[5:]]].grad, g[key])


def test_var_sum_of_scales_is_the_quantised_latent():
    """One scale after the other, each by hand: cells are averaged, codes compared, and taken off."""
    quantizer = small_quantizer((1, 2, 4), ema=0.0)
    f = torch.randn(3, 4, 4, 4)
    f_hat, ids, _, _ = quantizer(f)
    assert torch.allclose(quantizer.sums(ids)[-1], f_hat, atol=1e-6)
    rest, slow = f.clone(), torch.zeros_like(f)
    for k, side in enumerate((1, 2, 4)):
        cells = rest.unflatten(3, (side, -1)).unflatten(2, (side, -1)).mean((3, 5))   # (B, D, side, side)
        z = cells.flatten(2).transpose(1, 2)
        own = (z[:, :, None] - quantizer.codebook).square().sum(-1).argmin(-1)
        assert torch.equal(own, ids.split([1, 4, 16], 1)[k])
        added = quantizer.enlarge(quantizer.codebook[own], k)
        rest = rest - added
        slow = slow + added
    assert torch.allclose(slow, f_hat, atol=1e-5)
    assert torch.allclose(slow + rest, f, atol=1e-5)


def test_var_codes_are_means_in_which_a_scale_weighs_as_much_as_its_side():
    quantizer = small_quantizer((1, 2), V=5, ema=0.9, restart=0.0)
    N, m = quantizer.ema_count.fill_(1.0).tolist(), quantizer.ema_sum.copy_(quantizer.codebook).clone()
    zs = [torch.randn(3, 1, 4), torch.randn(3, 4, 4)]
    ids = [torch.tensor([[0], [0], [3]]), torch.tensor([[0, 1, 1, 2]] * 3)]
    quantizer.update(zs, ids)
    for code in range(5):
        weight = [1 / side for z, part, side in zip(zs, ids, (1, 2)) for _ in z[part == code]]
        mine = [v / side for z, part, side in zip(zs, ids, (1, 2)) for v in z[part == code]]
        N[code] = 0.9 * N[code] + 0.1 * sum(weight)
        m[code] = 0.9 * m[code] + 0.1 * sum(mine, torch.zeros(4))
    assert torch.allclose(quantizer.ema_count, torch.tensor(N))
    assert torch.allclose(quantizer.codebook, m / torch.tensor(N)[:, None], atol=1e-5)


@pytest.mark.parametrize("ema", [0.0, 0.95])
def test_var_coarse_scales_keep_codes_in_use_with_running_means(ema):
    """Batches of 8 whose 1 x 1 means form 16 clusters. By the gradient alone few codes serve them."""
    quantizer = var.MultiScaleQuantizer(64, 3, (1, 4), n_phi=0, ema=ema).train()
    centres = 4 * torch.randn(16, 3)
    optimizer = torch.optim.Adam([p for p in quantizer.parameters()] or [torch.zeros(1)], lr=1e-2)
    for _ in range(100):
        f = centres[torch.randint(16, (8,))][:, :, None, None] + torch.randn(8, 3, 4, 4)
        loss = quantizer(f)[2]
        if not ema:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    f = centres[:, :, None, None] + torch.randn(16, 3, 4, 4)
    used = len(quantizer.eval()(f)[1][:, 0].unique())
    assert used >= 12 if ema else used <= 8, f"{used} codes for 16 clusters at 1 x 1"


def test_var_start_gives_every_scale_codes_and_something_to_add():
    images = data.draw(torch.arange(300), 16)[0]
    held_out = data.draw(torch.arange(50) + data.VAL_INDEX, 16)[0]
    model = var.MSVQ(16, 64, 8, (1, 2, 4, 8), ch=8, groups=4, stem=2, linear=True).eval()
    model.start(images)
    ids = model.encode(held_out)
    error = [F.mse_loss(model.decode(ids, k + 1), held_out).item() for k in range(4)]
    assert error == sorted(error, reverse=True)
    assert error[-1] < 0.3 * error[0]
    parts = model.encode(images).split([1, 4, 16, 64], 1)
    assert all(len(part.unique()) >= 8 for part in parts), [len(part.unique()) for part in parts]
    count = model.quantizer.ema_count
    assert (count > 0.1 * count.mean()).all(), "no code restarts in the first step"


@pytest.mark.parametrize("options", [dict(), dict(ema=0.0), dict(linear=True, stem=4, ch_mult=(1,))])
def test_msvq_keeps_the_contract_of_a_tokenizer(options):
    model = var.MSVQ(16, 32, 4, **dict(ch=8, ch_mult=(1, 1, 1), groups=4) | options)
    images = data.draw(torch.arange(6), 16)[0]
    model.start(images)
    assert model.scales == (1, 2, 3, 4) and model.seq_len == 30 and model.grid == (30,)
    assert model.token_dim is None and model.vocab_size == 32
    loss, logs = model.train()(images, torch.zeros(6, dtype=torch.long))
    loss.backward()
    assert loss.ndim == 0 and all(v.ndim == 0 and not v.requires_grad for v in logs.values())
    assert {"usage_1x1", "usage_2x2", "usage_3x3", "usage_4x4", "mse", "commit"} == set(logs)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert ("quantizer.codebook" in dict(model.named_parameters())) == (not model.quantizer.ema)
    ids = model.eval().encode(images)
    assert ids.shape == (6, 30) and ids.dtype == torch.int64 and 0 <= ids.min() and ids.max() < 32
    recon, auxiliary, logs = model.reconstruct(images)
    assert torch.allclose(model(images)[0], auxiliary + F.mse_loss(recon, images))
    assert torch.allclose(model.decode(ids), recon.clamp(-1, 1), atol=1e-5), "the decoder sees codes only"
    assert abs(logs["usage_1x1"] - len(ids[:, 0].unique()) / 32) < 1e-6


def test_msvq_refuses_scales_that_do_not_fit_the_image():
    assert [var.scales_of(n) for n in (1, 2, 4, 8, 16)] == [(1,), (1, 2), (1, 2, 3, 4), (1, 2, 3, 5, 8),
                                                            (1, 2, 3, 5, 8, 12, 16)]
    with pytest.raises(ValueError, match="grid of 4 x 4, and the last of the scales"):
        var.MSVQ(16, 32, 4, (1, 2, 3), stem=4)
    with pytest.raises(ValueError, match="multiple of 4"):
        var.MSVQ(30, 32, 4, stem=4)


# ---- The transformer

def test_var_sees_its_own_class_and_coarser_scales_only():
    model = small_var().eval()
    tokens = torch.randint(20, (2, 14))
    cond = torch.tensor([0, 2])
    before = model.logits(tokens, cond)
    for start, end in ((0, 1), (1, 5), (5, 14)):
        other = tokens.clone()
        other[:, start:end] = (other[:, start:end] + 7) % 20
        changed = (model.logits(other, cond) != before).flatten(2).any(2).any(0)      # (T,)
        assert not changed[:end].any(), "a token saw its own scale, or a finer one"
        assert changed[end:].all(), "a finer scale does not see all of the coarser ones"
    assert (model.logits(tokens, cond.flip(0)) != before).any(2).all()


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_var_cached_passes_equal_the_uncached_transformer(cfg):
    """Each scale's logits while drawing, against one pass over all that was drawn, and guidance by hand."""
    model = small_var().eval()
    cond = torch.arange(3)
    seen = []
    sample = model.head.sample

    def kept(h, h_uncond, scale, temperature, **tricks):
        seen.append((h, h_uncond, scale))
        return sample(h, h_uncond, scale, temperature, **tricks)
    model.head.sample = kept
    tokens = model.sample(cond, cfg=cfg)
    parts = [model.hidden_states(tokens, c).split([1, 4, 9], 1) for c in (cond, torch.full((3,), 3))]
    for k, (h, h_uncond, scale) in enumerate(seen):
        assert torch.allclose(h, parts[0][k], atol=1e-5)
        if cfg == 1:
            assert h_uncond is None
        else:
            assert torch.allclose(h_uncond, parts[1][k], atol=1e-5)
            assert scale == [1.0, 2.0, 3.0][k], "guidance grows from nothing to cfg"
    seen.clear()
    model.sample(cond, cfg=cfg, cfg_schedule="constant")
    assert [scale for _, _, scale in seen] == [cfg] * 3


def test_var_draws_from_its_own_distribution():
    """The share of each id of the first scale, and of one of the second, given the first."""
    torch.manual_seed(1)
    model = small_var(small_quantizer((1, 2), V=4)).eval()
    n = 6000
    tokens = model.sample(torch.zeros(n, dtype=torch.long))
    p = model.logits(tokens, torch.zeros(n, dtype=torch.long)).softmax(-1)
    share = F.one_hot(tokens, 4).float()
    assert (share[:, 0].mean(0) - p[0, 0]).abs().max() < 0.03
    first = tokens[:, 0] == p[0, 0].argmax()
    assert (share[first, 2].mean(0) - p[first, 2][0]).abs().max() < 0.04


def test_var_truncates_as_the_authors():
    g = golden("beyond/var_topk_topp")
    keys = [key for key in g if key.startswith("out/")]
    for key in keys:
        k, p = key[5:].split("_p")
        ours = var.truncate(g["in/logits"], int(k), float(p) or 1.0)
        assert torch.equal(ours.sort(-1).values, g[key].sort(-1).values), key      # as many of ties
    assert len(keys) >= 9


def test_var_known_tokens_stay_and_are_seen():
    model = small_var().eval()
    cond = torch.arange(3)
    known = torch.randint(20, (3, 14))
    coarse = (torch.arange(14) < 5).expand(3, -1)
    steps = []
    tokens = model.sample(cond, known=known, known_mask=coarse, top_k=1,
                          on_step=lambda k, tokens, mask: steps.append(mask.sum(1).tolist()))
    assert torch.equal(tokens[coarse], known[coarse])
    likeliest = model.logits(tokens, cond)[:, 5:].argmax(-1)
    assert torch.equal(tokens[:, 5:], likeliest), "drawn given the coarse ones"
    assert steps == [[13] * 3, [9] * 3, [0] * 3]
    with pytest.raises(ValueError, match="steps must be 3, not 5"):
        model.sample(cond, steps=5)
    with pytest.raises(ValueError, match="cfg_schedule must be linear or constant"):
        model.sample(cond, cfg_schedule="cosine")


def test_var_starts_undecided_and_its_tokenizer_does_not_learn():
    quantizer = small_quantizer(ema=0.9)
    model = var.VAR(var.CategoricalHead(16, 20), quantizer, 3, n_layer=2, n_head=2, n_embd=16)
    tokens = torch.randint(20, (4, 14))
    loss, logs = model(tokens, torch.arange(4) % 3)
    assert abs(loss - math.log(20)) < 1e-5
    assert set(logs) == {"nll_1x1", "nll_2x2", "nll_3x3"}
    loss.backward()
    assert all(p.grad is None for p in model.quantizer.parameters())
    assert torch.equal(model.quantizer.codebook, quantizer.codebook)
    assert all(p.grad is not None for name, p in model.named_parameters() if "quantizer" not in name)


@pytest.mark.parametrize("drop, mode, row", [(1.0, True, True), (1.0, False, False), (0.0, True, False)])
def test_var_label_dropping_reaches_the_null_row_in_training_only(drop, mode, row):
    model = small_var(label_drop=drop).train(mode)
    model(torch.randint(20, (4, 14)), torch.arange(4) % 3)[0].backward()
    rows = model.cls_embed.weight.grad.abs().sum(1) > 0
    assert rows[3] == row and rows[:3].any() != row


@pytest.mark.parametrize("scales, optimum", [((1, 4), math.log(30)), ((4,), 16 * math.log(2))])
def test_var_comes_to_the_exact_optimum_on_bars_and_stripes(scales, optimum):
    """If the 1 x 1 token tells which of the 30 pictures it is, ids of a scale are independent given the
    scales before it, and the least is ln 30 nats. With the 4 x 4 scale alone no pixel knows of another: 16 ln
    2.
    """
    pictures = mar.bars_and_stripes(2000, "cpu").unique(dim=0)                        # (30, 16) ids 0, 1
    tokens = pictures if len(scales) == 1 else torch.cat([torch.arange(30)[:, None], pictures], 1)
    model = small_var(small_quantizer(scales, V=30, D=8), 1, n_layer=1, n_embd=32, label_drop=0.0)
    none = torch.zeros(30, dtype=torch.long)
    steps = 300 if len(scales) == 2 else 40
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=8e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 8e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        loss, _ = model(tokens, none)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    nats = model.eval()(tokens, none)[0] * tokens.shape[1]
    assert optimum - 1e-3 < nats < 1.02 * optimum, f"{nats:.3f} nats, the least is {optimum:.3f}"
