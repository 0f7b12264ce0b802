"""Tests of official/var.py: tiny weights made by the authors' own code, and the numbers that it gave."""
import json
import zlib

import numpy as np
import pytest
import torch

import var
from official import var as official
from tests.helpers import ROOT, close, golden


def var_golden(name):
    """Arrays of golden/beyond/<name>.npz, the weights in it under the authors' keys, its sizes."""
    g = golden(f"beyond/{name}")
    with np.load(ROOT / "golden" / "beyond" / f"{name}.npz") as f:
        cfg = json.loads(str(f["cfg"]))
    return g, {k[2:]: v for k, v in g.items() if k.startswith("w/")}, cfg


def ids_of_scales(g, start):
    """The arrays <start>0, <start>1, ... -> ids (B, T)."""
    return torch.cat([g[f"{start}{k}"] for k in range(20) if f"{start}{k}" in g], 1)


def tiny_var(name):
    """The authors' tiny transformer -> VAR, arrays, its weights under their keys."""
    g, sd, cfg = var_golden(name)
    inside = {k.removeprefix("vae.quantize."): v for k, v in sd.items() if k.startswith("vae.")}
    tokenizer = var.MSVQ(6, 32, 6, cfg["patch_nums"], ema=0.0, stem=2, ch=8, groups=4)
    tokenizer.quantizer = official.load_quantizer(inside, cfg["patch_nums"])
    sd = {k: v for k, v in sd.items() if not k.startswith("vae.")}
    return official.load_var(sd, tokenizer, n_head=cfg["num_heads"]), g, sd, tokenizer


TINY_VARS = ("var_tiny", "var_tiny_shared_nol2")


@pytest.mark.parametrize("name", TINY_VARS)
def test_official_var_has_the_authors_logits_loss_and_gradients(name):
    model, g, sd, _ = tiny_var(name)
    model.label_drop = 0
    ids = ids_of_scales(g, "in/ids_")
    assert torch.equal(model.visible, g["out/attn_bias"].bool())
    c = model.cls_embed(g["in/labels"])
    x = model.embed(c, g["in/var_input"]) + model.pos_embed + model.scale_embed(model.level)
    close(model.blocks[0](x, model.modulations(c)[0], model.visible), g["out/block0"], 1e-5)
    close(model.logits(ids, g["in/labels"]), g["out/logits"])
    close(model.logits(ids, torch.full_like(g["in/labels"], 10)), g["out/logits_dropped"])
    loss, logs = model.train()(ids, g["in/labels"])
    close(loss.detach(), g["out/loss"], 1e-5)
    each = model.head.loss(model.hidden_states(ids, g["in/labels"]), ids)
    close(logs["nll_3x3"], each[:, 5:].mean().detach(), 1e-5)
    loss.backward()
    ours = dict(model.named_parameters())
    keys = [k for k in g if k.startswith("grad/")]
    for key in keys:
        close(ours[official.names_of(key[5:])].grad.view_as(g[key]), g[key])
    assert len(keys) >= 11


@pytest.mark.parametrize("name", TINY_VARS)
@pytest.mark.parametrize("cfg", ["0", "1.5"])
def test_official_var_draws_the_authors_tokens(name, cfg):
    """Greedy, with a cache and their guidance, which is ours less 1."""
    model, g, _, tokenizer = tiny_var(name)
    logits = []
    sample = model.head.sample

    def kept(h, h_uncond, scale, *rest, **options):
        mixed = h if h_uncond is None else h_uncond + scale * (h - h_uncond)
        logits.append(model.head.logits(mixed))
        return sample(h, h_uncond, scale, *rest, **options)
    model.head.sample = kept
    tokens = model.sample(g["in/labels"], cfg=1 + float(cfg), top_k=1)
    assert torch.equal(tokens, ids_of_scales(g, f"out/cfg{cfg}_ids_"))
    for k, found in enumerate(logits):
        close(found, g[f"out/cfg{cfg}_mixed_logits_{k}"])
    close(torch.stack(model.quantizer.sums(tokens)), g[f"out/cfg{cfg}_f_hat"])


def recipe_weights(recipe):
    """The weights of the tiny tokenizer, which are not stored: noise from a seed that is their name's."""
    found = {}
    for key, shape in recipe.items():
        noise = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
        shift = 1 if len(shape) == 1 and key.endswith("weight") else 0
        found[key] = torch.from_numpy(noise * 0.05) + shift
    return found


def test_official_var_tokenizer_has_the_authors_numbers():
    g, sd, cfg = var_golden("var_vqvae_tiny")
    with np.load(ROOT / "golden" / "beyond" / "var_vqvae_tiny.npz") as f:
        sd |= recipe_weights(json.loads(str(f["recipe_names"])))
    hits = {"quantize.ema_vocab_hit_SV": torch.zeros(3, 64)}          # their usage meter
    model = official.load_vqvae(sd | hits, scales=cfg["patch_nums"])
    x = g["in/image_u8"].float() / 127.5 - 1
    with torch.no_grad():
        close(model.encoder(x), g["out/enc"])
        close(model.latents(x), g["out/f"])
        ids = model.encode(x)
        assert torch.equal(ids, ids_of_scales(g, "out/ids_"))
        close(torch.stack(model.quantizer.sums(ids)), g["out/f_hat"])
        close(model.decode_raw(model.quantizer.sums(ids)[-1]), g["out/dec"])
    assert torch.equal(model.decode(ids), model.decode_raw(model.quantizer.sums(ids)[-1]).clamp(-1, 1))
    for key in ("decoder.mid.attn_1.qkv.weight", "quantize.quant_resi.qresi_ls.1.bias"):
        with pytest.raises(ValueError, match="missing.*" + key.replace("qkv", "q")):
            official.load_vqvae({k: v for k, v in sd.items() if k != key}, scales=cfg["patch_nums"])
    with pytest.raises(ValueError, match="unknown.*decoder.extra"):
        official.load_vqvae(sd | {"decoder.extra": torch.zeros(1)}, scales=cfg["patch_nums"])
    with pytest.raises(ValueError, match="image_size 384: the authors have 256, 512 pixels"):
        official.load_vqvae(sd, image_size=384)


def test_official_var_reads_files_and_names_keys(tmp_path):
    model, _, sd, tokenizer = tiny_var("var_tiny")
    torch.save({"trainer": {"var_wo_ddp": sd | {"lvl_1L": torch.zeros(1, 14)}}}, tmp_path / "var_d2.pth")
    other = official.load_var(tmp_path / "var_d2.pth", tokenizer)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    assert not other.training
    with pytest.raises(ValueError, match="missing.*head.weight"):
        official.load_var({k: v for k, v in sd.items() if k != "head.weight"}, tokenizer)
    with pytest.raises(ValueError, match="missing.*blocks.1.fc1.bias"):
        official.load_var({k: v for k, v in sd.items() if k != "blocks.1.ffn.fc1.bias"}, tokenizer)
    with pytest.raises(ValueError, match="unknown.*blocks.0.attn.extra"):
        official.load_var(sd | {"blocks.0.attn.extra": torch.zeros(1)}, tokenizer)
    with pytest.raises(ValueError, match="pos_1LC has shape .*scales of the tokenizer"):
        official.load_var(sd | {"pos_1LC": torch.zeros(1, 15, 32)}, tokenizer)
    with pytest.raises(ValueError, match="32 codes of 6 numbers, the tokenizer has"):
        official.load_var(sd, var.MSVQ(6, 16, 6, (1, 2, 3), stem=2, ch=8, groups=4))


@pytest.mark.parametrize("depth, scales, shared, n", [
    (16, official.SCALES[256], False, 310_283_520), (20, official.SCALES[256], False, 600_917_136),
    (24, official.SCALES[256], False, 1_033_399_360), (30, official.SCALES[256], False, 2_010_020_356),
    (36, official.SCALES[512], True, 2_353_893_904)])
def test_var_of_the_paper_has_its_parameter_count(depth, scales, shared, n):
    with torch.device("meta"):
        quantizer = var.MultiScaleQuantizer(4096, 32, scales)
        model = official.plain_model(quantizer, depth, shared=shared)
    count = sum(p.numel() for p in model.parameters())
    assert count - sum(p.numel() for p in model.quantizer.parameters()) == n
    if f"d{depth}" in var.SIZES:
        assert var.SIZES[f"d{depth}"] == dict(n_layer=depth, n_head=depth, n_embd=64 * depth)


def test_var_tokenizer_of_the_paper_has_its_parameter_count():
    with torch.device("meta"):
        model = var.MSVQ(**var.TOK_SIZES["var"])
    count = [sum(p.numel() for p in part.parameters()) for part in
             (model, model.encoder, model.decoder, model.quantizer.phi, model.quant_conv)]
    assert count == [108_948_355, 44_107_872, 64_653_923, 36_992, 9_248]
    assert model.seq_len == 680 and model.scales == official.SCALES[256]
