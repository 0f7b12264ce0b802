"""Tests of official/mar.py: the authors' weights give the authors' numbers."""
import argparse

import pytest
import torch

import mar
from official import mar as official
from tests.helpers import close, golden, official_mar, official_vae


def test_vae_loads_official_weights_and_gets_the_authors_numbers():
    sd, encoder, decoder = official_vae()
    model = official.load_vae(sd)
    with torch.no_grad():
        mean, std = model.posterior(encoder["image"])
        grid = lambda v: v.flatten(2).transpose(1, 2)
        close(mean, grid(encoder["mean"]))
        close(std, grid(encoder["std"]))
        close(model.kl(mean, std).sum(1), encoder["kl"])
        close(model.decode_raw(grid(decoder["z_mode"])), decoder["rec_mode"])
        close(model.decode_raw(grid(decoder["z_sample"])), decoder["rec_sample"])
        tokens = model.normalise(mean)
        close(tokens, mean * 0.2325)
        close(model.decode(tokens), decoder["rec_mode"].clamp(-1, 1))


def test_vae_from_official_names_the_key_that_does_not_fit(tmp_path):
    sd, _, _ = official_vae()
    torch.save({"state_dict": sd}, tmp_path / "kl.ckpt")
    assert official.load_vae(tmp_path / "kl.ckpt").seq_len == 256
    with pytest.raises(ValueError, match="decoder.extra.weight"):
        official.load_vae(sd | {"decoder.extra.weight": torch.zeros(1)})
    del sd["decoder.mid.attn_1.q.bias"]
    with pytest.raises(ValueError, match="q.bias"):
        official.load_vae(sd)


def test_mar_from_official_reads_files_and_names_keys(tmp_path):
    model, sd = official_mar()
    half = {k: v / 2 for k, v in sd.items()}
    torch.save({"model": half, "model_ema": sd, "args": argparse.Namespace(epochs=800)}, tmp_path / "mar.pth")
    read = official.load_mar(tmp_path / "mar.pth", n_head=4)
    assert all(torch.equal(v,
                           read.state_dict()[k]) for k, v in model.state_dict().items()) and not read.training
    assert torch.equal(official.load_mar({"model": half}, n_head=4).head_pos, model.head_pos / 2)
    with pytest.raises(ValueError, match="encoder_blocks.0.extra"):
        official.load_mar(sd | {"encoder_blocks.0.extra": torch.zeros(1)}, n_head=4)
    with pytest.raises(ValueError, match="n_head="):
        official.load_mar(sd)
    del sd["decoder_norm.bias"]
    with pytest.raises(ValueError, match="missing.*decoder_norm.bias"):
        official.load_mar(sd, n_head=4)
    with pytest.raises(ValueError, match="missing.*fake_latent"):
        official.load_mar({"pos_embed": torch.zeros(1)})


@pytest.mark.parametrize("name", ["", "_full", "_none"])
def test_mar_reproduces_the_authors_hidden_states(name):
    (model, _), g = official_mar(), golden("mar/mar_forward")
    mask = g["mask" + name].bool()
    nonsense = torch.where(mask[..., None], 1e3, g["tokens"])           # unknown tokens must not be looked at
    with torch.no_grad():
        for n_visible in (None, int((~mask[0]).sum())):     # nobody looks at the holes; the holes are dropped
            close(model.hidden(nonsense, g["labels"], mask, n_visible), g["z" + name], 1e-5)
        if name == "":
            close(model.hidden(g["tokens"], torch.full((3,), 10), mask, 4), g["z_uncond"], 1e-5)


def test_mar_loss_and_gradients_are_the_authors(monkeypatch):
    (model, _), g = official_mar(), golden("mar/mar_loss")
    mask = g["mask"].bool()
    order = mask.byte().argsort(dim=1, stable=True)
    n = int(mask[0].sum())
    index = order[:, 16 - n:]
    t = torch.stack([mar.take(v, index) for v in g["t"].view(4, 3, 16)])
    noise = torch.stack([mar.take(v, index) for v in g["noise"].view(4, 3, 16, 4)])
    monkeypatch.setattr(mar, "draw_order", lambda *_: order)
    monkeypatch.setattr(model, "mask_count", lambda: n)
    monkeypatch.setattr(model.head, "loss", lambda h, x: sum(model.head.terms(x, h, t, noise)).mean(0))
    loss, logs = model(mar.patchify(g["imgs"]), g["labels"])
    loss.backward()
    close(loss.detach(), g["loss"])
    assert logs["masked"] == n / 16
    grads = {k: p.grad for k, p in model.named_parameters()}
    close(torch.stack([v.norm() for v in grads.values()]).norm(), g["grad_norm"])
    names = {
        "z_proj.weight": "tok_embed.weight", "class_emb.weight": "cls_embed.weight",
        "encoder_pos_embed_learned": "encoder_pos", "diffusion_pos_embed_learned": "head_pos",
        "mask_token": "mask_embed"
    }
    for key in [k for k in g if k.startswith("grad/")]:
        ours, reference = grads[names.get(key[5:], key[5:])], g[key]
        if key == "grad/class_emb.weight":
            assert (ours[10] == 0).all()                    # "no class": not used in eval mode
            ours = ours[:10]
        close(ours.reshape(reference.shape), reference)


@pytest.mark.parametrize("name", ["cfg3_linear", "nocfg", "cfg3_const_16it"])
def test_mar_sampling_replays_the_authors_runs(name, monkeypatch):
    """From their recorded noise: orders, counts, guidance and its schedule, temperature, 25 denoising
    steps.
    """
    (model, _), g = official_mar(), golden(f"mar/sample_tokens_{name}")
    steps, scales = int(g["num_iter"]), []
    counts = mar.masked_counts(16, steps)
    order = g["orders"].flip(1)                             # they write from the end of `orders`
    order = torch.cat([order[:, 16 - a:16 - b].sort(1).values for a, b in zip(counts, counts[1:])], 1)
    first, noise = g["init_noise"].split(g["init_rows"].tolist()), g["step_noise"].split(
        g["step_rows"].tolist())
    draw = model.head.sample

    def replay(h, h_uncond, cfg, temperature, **tricks):
        k, n = len(scales), 3 * h.shape[1]
        scales.append(cfg)
        recorded = [first[k], *(v[:n] for v in noise[25 * k:25 * k + 25])]       # conditional rows come first
        return draw(h, h_uncond, cfg, temperature, noise=torch.stack(recorded).view(26, 3, -1, 4), **tricks)
    monkeypatch.setattr(mar, "draw_order", lambda *_: order)
    monkeypatch.setattr(model.head, "sample", replay)
    tokens = model.sample(g["labels"], steps, float(g["cfg"]), float(g["temperature"]), diffusion_steps=25,
                          cfg_schedule="constant" if "const" in name else "linear")
    close(mar.unpatchify(tokens, (4, 4)), g["out"])
    assert scales == pytest.approx(g["cfg_iter"].tolist()) and len(scales) == steps


def test_the_vae_takes_the_size_of_the_images():
    """The network is convolutional: only the grid is a matter of the images' size."""
    sd, encoder, _ = official_vae()
    side = 2 * encoder["image"].shape[-1]
    model = official.load_vae(sd, image_size=side)
    stride = side // model.grid[0]
    images = torch.rand(1, 3, side, side) * 2 - 1
    tokens = model.encode(images)
    assert tokens.shape[1] == model.seq_len == (side // stride) ** 2
    assert model.decode(tokens).shape == images.shape
    with pytest.raises(ValueError, match="not a multiple"):
        official.load_vae(sd, image_size=side + 1)


def test_the_vae_of_48_pixels_is_the_same_network_on_a_larger_grid():
    """The default grid refuses to decode what it encodes of 48 pixels; image_size=48 decodes it."""
    sd, _, _ = official_vae()
    small, large = official.load_vae(sd, image_size=32), official.load_vae(sd, image_size=48)
    assert large.grid == (24, 24) and large.seq_len == 576
    images = torch.rand(2, 3, 48, 48) * 2 - 1
    images[:, :, :24] /= 4                                  # rows are no columns
    with torch.no_grad():
        mean, std = large.posterior(images)
        maps = small.quant_conv(small.encoder(images))[:, :4]                         # (B, D, 24, 24)
        rebuilt = small.decoder(small.post_quant_conv(maps))
        close(mean, maps.flatten(2).transpose(1, 2))
        close(large.decode_raw(mean), rebuilt)
        close(large.decode(large.normalise(mean)), rebuilt.clamp(-1, 1))
        with pytest.raises(RuntimeError, match="576"):
            small.decode_raw(mean)
