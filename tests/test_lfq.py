"""Tests of lfq.py: signs and entropies against the authors' arrays and the sum over all codes; causality;
images and clips.
"""
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import lfq
from tests.helpers import close, golden


def k_way(z, tau):
    """Both entropies by the definition, over all codes: z (N, bits) float64."""
    bits = z.shape[1]
    all_codes = torch.tensor([[1.0 if c >> i & 1 else -1.0 for i in range(bits)]
                              for c in range(1 << bits)]).to(z)
    p = (-(z[:, None] - all_codes).square().sum(-1) / tau).softmax(-1)                 # the distance, not z.c
    return torch.special.entr(p).sum(-1).mean(), torch.special.entr(p.mean(0)).sum()


@pytest.mark.parametrize("bits", [8, 10])
def test_lfq_signs_ids_and_losses_are_the_authors(bits):
    g = golden(f"tokenizers/lfq_d{bits}")
    for s in ("s0", "s1", "s2"):
        z = g[f"{s}_z"].clone().requires_grad_()
        q, ids = lfq.quantize(z)
        assert torch.equal(q, g[f"{s}_om_quantized"]) and torch.equal(q, g[f"{s}_vqt_t100_quantized"])
        assert torch.equal(ids, g[f"{s}_om_indices"]) and ids[0, 0] == 0, "a z of 0 is -1 everywhere"
        assert torch.equal(lfq.quantize(z.flip(-1))[1],
                           g[f"{s}_vqt_t100_indices"]), "they read the bits the other way round"
        assert torch.equal(lfq.codes(ids, bits), q)
        assert torch.equal(torch.autograd.grad((q * g["proj"]).sum(), z)[0],
                           g[f"{s}_om_grad_st"]), "straight through"
        close((z - q.detach()).square().mean(), g[f"{s}_om_commitment"], 1e-6)
        for name, tau in (("om", 0.01), ("vqt_t100", 0.01), ("vqt_t10", 0.1)):
            per_sample, batch = lfq.entropy_penalty(z, tau)
            grads = [torch.autograd.grad(v, z)[0] for v in (per_sample, batch)]
            rough = name == "om"                # 1e-5 inside the logarithm; vqt's clamp is off per token only
            close(per_sample, g[f"{s}_{name}_per_sample_entropy"], 2e-4)
            close(grads[0], g[f"{s}_{name}_grad_per_sample"], 3e-3)
            close(batch, g[f"{s}_{name}_batch_entropy"], 3e-3 if rough else 1e-6)
            close(grads[1], g[f"{s}_{name}_grad_batch"], 2e-2 if rough else 2e-4)
        exact = g[f"{s}_exact_per_sample"].item(), g[f"{s}_exact_batch"].item()       # no epsilon, in float64
        assert [v.item() for v in lfq.entropy_penalty(z, 0.01)] == pytest.approx(exact, rel=1e-6)
        for size in (1, 2, 5) if bits == 10 else (1, 2, 4):
            grouped = lfq.entropy_penalty(z, 0.01, groups=bits // size)[1]
            assert grouped >= exact[1] - 1e-6, "an upper bound"
            if f"{s}_exact_batch_grouped_g{size}" in g:
                assert grouped.item() == pytest.approx(g[f"{s}_exact_batch_grouped_g{size}"].item(), rel=1e-6)
    if bits == 10:
        assert torch.equal(lfq.codes(g["s2_om_pre_4_6"], 4),
                           q[..., :4]), "the first channels are the low bits"
        assert torch.equal(lfq.codes(g["s2_om_post_4_6"], 6), q[..., 4:])


@pytest.mark.parametrize("scale, tau", [(0.02, 0.01), (0.3, 0.1), (1.0, 1.0)])
def test_lfq_entropy_penalty_and_gradient_equal_the_sum_over_all_codes(scale, tau):
    z = (scale * torch.randn(24, 10)).requires_grad_()
    exact = z.detach().double().requires_grad_()
    for ours, reference in zip(lfq.entropy_penalty(z, tau), k_way(exact, tau)):
        close(ours, reference, 1e-6)
        close(torch.autograd.grad(ours, z, retain_graph=True)[0],
              torch.autograd.grad(reference, exact, retain_graph=True)[0], 2e-5)
    odd = 0.02 * torch.randn(5, 3, 7)
    close(torch.stack(lfq.entropy_penalty(odd)), torch.stack(k_way(odd.flatten(0, 1).double(), 0.01)), 1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lfq.entropy_penalty(z, tau)[1],
                           lfq.entropy_penalty(z.detach(), tau)[1]), "float32 there too"
    with pytest.raises(ValueError, match="10 bits cannot be cut into 3"):
        lfq.entropy_penalty(z, groups=3)


def test_lfq_entropy_penalty_has_no_trouble_with_certainty_or_with_rare_codes():
    z = lfq.codes(torch.tensor([0, 0, 5, 1023]), 10).requires_grad_()                 # p is 0 or 1 in float32
    per_sample, batch = lfq.entropy_penalty(z)
    assert per_sample == 0 and abs(batch - 1.5 * math.log(2)) < 1e-6
    (per_sample - batch).backward()
    assert torch.isfinite(z.grad).all()
    z = torch.zeros(64, 18, requires_grad=True)             # each code has 2^-18 < 1e-5
    assert [v.item() for v in lfq.entropy_penalty(z)] == pytest.approx([18 * math.log(2)] * 2, rel=1e-6)


def test_lfq_needs_no_table_of_all_codes():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for v in out if isinstance(out, (tuple, list)) else [out]:
                self.numel = max(self.numel, v.numel() if isinstance(v, torch.Tensor) else 0)
            return out

    z = (0.02 * torch.randn(4, 1024, 18)).requires_grad_()
    with Largest() as largest:
        per_sample, batch = lfq.entropy_penalty(z)
        (per_sample - batch).backward()
    assert largest.numel <= 4096 * 512, "N x 2^(bits / 2), not N x 2^bits"
    assert 8 < batch < 18 * math.log(2) and torch.isfinite(z.grad).all() and z.grad.abs().max() > 0


def test_lfq_batch_entropy_is_over_all_processes(monkeypatch):
    z, seen = 0.02 * torch.randn(2, 30, 6), []
    both = z.flatten(0, 1).clone().requires_grad_()
    reference = lfq.entropy_penalty(both)[1]
    expected, = torch.autograd.grad(reference, both)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: seen.append(t.clone()))
    for part in z:
        lfq.entropy_penalty(part.clone().requires_grad_())
    total = seen[0] + seen[1]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.copy_(total))
    for part, share in zip(z, expected.view_as(z)):
        part = part.clone().requires_grad_()
        batch = lfq.entropy_penalty(part)[1]
        close(batch, reference, 1e-6)
        close(torch.autograd.grad(batch, part)[0] / 2, share, 1e-5)              # DDP takes the mean over two
    with torch.no_grad():
        assert lfq.entropy_penalty(
            z[0])[1] < 0.99 * reference, "a process that validates alone does not wait for others"


def test_lfq_causal_convolution_and_depth_to_space_are_the_authors():
    g = golden("tokenizers/causal_conv3d")
    for tag, weight, bias in (("stride111", g["w"], g["b"]), ("stride122", g["w"], g["b"]),
                              ("stride222", g["w"], g["b"]), ("k111", g["w1x1"], None), ("k533", g["w5"],
                                                                                         None)):
        stride = tuple(map(int, tag[-3:])) if tag.startswith("s") else (1, 1, 1)
        conv = lfq.CausalConv(2, 4, tuple(weight.shape[2:]), stride, bias=bias is not None)
        conv.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
        with torch.no_grad():
            close(conv(g["x"]), g[f"om_y_{tag}"], 1e-5)
            close(conv(g["x"][:, :, :1]), g[f"om_y_{tag}"][:, :, :1], 1e-5)   # one frame: by the 2-D shortcut
    up = lfq.CausalUpsample(2, (3, 3, 3), 2)
    up.load_state_dict({"weight": g["up_w"], "bias": g["up_b"]})
    with torch.no_grad():
        for f in (1, 2, 3):
            close(up(g["x"][:, :, :f]), g[f"up_y_T{f}"], 1e-5)
    norm = lfq.AdaptiveNorm(64, 3, 32, per_frame=False)
    norm.load_state_dict({k[4:]: g[k] for k in g if k[:9] in ("agn_gamma", "agn_beta.")})
    with torch.no_grad():
        close(norm(g["agn_x"], g["agn_z"]), g["agn_y"], 1e-5)
        norm.per_frame = True
        close(norm(g["agn_x"], g["agn_z"])[:, :, 0], g["agn2d_y"], 1e-5)
        fast = g["agn_x"][:, :, [0, 1, 2, 0, 1, 2, 0, 1, 2]]                          # 9 frames to 3 of codes
        slow = [
            norm(fast[:, :, t:t + 1], g["agn_z"][:, :, f:f + 1])
            for t, f in enumerate((0, 1, 1, 1, 1, 2, 2, 2, 2))
        ]
        norm.time = 4
        close(norm(fast, g["agn_z"]), torch.cat(slow, dim=2), 1e-5)


def test_lfq_of_the_papers_has_its_parameter_count():
    count = lambda module: round(sum(p.numel() for p in module.parameters()) / 1e6, 1)
    for name, numbers, grid in (("f16", (115.1, 49.8, 65.4), (16, 16)), ("f8", (112.0, 48.4, 63.6), (16, 16)),
                                ("video", (370.5, 144.9, 225.7), (5, 16, 16))):
        with torch.device("meta"):
            model = lfq.LFQ(**lfq.SIZES[name])
        assert (count(model), count(model.encoder), count(model.decoder)) == numbers and model.grid == grid
        assert model.vocab_size == 262_144 and not list(model.quantizer.parameters())


@pytest.mark.parametrize("frames", [1, 5])
def test_lfq_keeps_the_contract_of_a_tokenizer(frames):
    model = lfq.LFQ(image_size=16, frames=frames, bits=6, n_res=1)
    images = data.draw(torch.arange(4), 16)[0] if frames == 1 else data.draw_clips(torch.arange(4), 16, 5)[0]
    assert model.token_dim is None and model.vocab_size == 64
    assert (model.grid, model.seq_len) == (((4, 4), 16) if frames == 1 else ((2, 4, 4), 32))
    loss, logs = model(images, torch.zeros(4, dtype=torch.long))
    loss.backward()
    assert loss.ndim == 0 and all(v.ndim == 0 and not v.requires_grad for v in logs.values())
    assert set(logs) == {"mse", "commit", "entropy_sample", "entropy_batch", "usage", "perplexity"}
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    expected = logs["mse"] + logs["commit"] + 0.02 * (logs["entropy_sample"] - logs["entropy_batch"])
    assert torch.allclose(loss, expected)
    ids = model.encode(images)
    assert ids.shape == (4, model.seq_len) and ids.dtype == torch.int64 and 0 <= ids.min() and ids.max() < 64
    p = torch.bincount(ids.flatten(), minlength=64) / ids.numel()
    assert torch.allclose(logs["usage"], (p > 0).float().mean())
    assert torch.allclose(logs["perplexity"], torch.special.entr(p).sum().exp())
    recon = model.decode(ids)
    assert recon.shape == images.shape and recon.abs().max() <= 1
    recon_, auxiliary, logs = model.eval().reconstruct(images)
    assert torch.allclose(model(images)[0], auxiliary + F.mse_loss(recon_, images))
    assert torch.allclose(recon, recon_.clamp(-1, 1), atol=1e-5), "the decoder sees signs only"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, _, loss, _ = model.quantizer(torch.randn(2, 16, 6).bfloat16())
    assert q.dtype == loss.dtype == torch.float32
    for wrong in (30, 4):
        with pytest.raises(ValueError, match="multiple of 4"):
            lfq.LFQ(image_size=wrong)


def test_lfq_sees_grey_images_and_label_maps():
    clip = data.draw_clips(torch.arange(2), 16, 5)[0].mean(1, keepdim=True).expand(-1, 3, -1, -1, -1)
    model = lfq.LFQ(image_size=16, frames=5, channels=1, n_res=1)
    for images in (clip, clip[:, :, 0]):
        recon = model.decode(model.encode(images))
        assert recon.shape == images.shape and torch.equal(recon[:, 0],
                                                           recon[:, 2]) and model(images)[0].ndim == 0
    maps = F.one_hot(data.draw(torch.arange(4), 16)[2].long(), 11).permute(0, 3, 1, 2).float() * 2 - 1
    model = lfq.LFQ(image_size=16, channels=11, n_res=1)
    assert model.decode(model.encode(maps)).shape == maps.shape and model(maps)[0].ndim == 0


def trained_at_random(model):
    """All weights random: at the start the second half of each block is 0 and would hide mistakes."""
    for module in model.modules():
        if isinstance(module, (lfq.CausalConv, nn.Linear)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias)
    return model.eval()


def test_lfq_never_looks_ahead():
    model, clip = trained_at_random(lfq.LFQ(image_size=16, frames=17,
                                            n_res=1)), torch.rand(1, 3, 17, 16, 16) * 2 - 1
    with torch.no_grad():
        z = model.latents(clip).unflatten(1, model.grid)    # (1, 5, 4, 4, bits)
        assert model.grid == (5, 4, 4)
        for t in (1, 4, 5, 16):                             # tokens f hold frames 4f - 3 .. 4f
            changed = clip.clone()
            changed[:, :, t] = -changed[:, :, t]
            moved = (model.latents(changed).unflatten(1, model.grid) - z).abs().amax((0, 2, 3, 4)) > 1e-6
            assert moved.tolist() == [f >= (t + 3) // 4 for f in range(5)], t
        alone = model.latents(clip[:, :, 0])
        assert (alone -
                z[:, 0].flatten(1, 2)).abs().max() < 1e-6 * z.abs().max(), "an image is a clip of one frame"
        assert torch.equal(alone, model.latents(clip[:, :, :1]))
        shorter = model.latents(clip[:, :, :9]).unflatten(1, (3, 4, 4))
        assert torch.allclose(shorter, z[:, :3], atol=1e-5)
        q = lfq.quantize(z.flatten(1, 3))[0]
        whole = model.decode_raw(q)
        assert whole.shape == clip.shape
        for f in (1, 2, 3):                                 # tokens 0 .. f - 1 -> frames 0 .. 4 (f - 1)
            part = model.decode_raw(q[:, :16 * f])
            part = part if part.ndim == 5 else part.unsqueeze(2)
            assert part.shape[2] == 4 * f - 3
            assert torch.allclose(part, whole[:, :, :4 * f - 3], atol=1e-4), "nor does the decoder"
        for module in model.modules():
            if isinstance(module, lfq.FrameNorm):
                module.per_frame = False
        moved = (model.latents(clip)[:, :16] - model.latents(clip[:, :, :1])).abs().max()
        assert moved > 1e-2, "that is why norms are per frame"


def test_lfq_counts_frames_and_refuses_what_does_not_fit():
    video, image = (lfq.LFQ(image_size=8, frames=f, ch=8, n_res=1) for f in (17, 1))
    assert [video.latent_frames(f) for f in (1, 5, 9, 17)] == [1, 2, 3, 5] and video.seq_len == 5 * 4
    for f in (1, 5, 17):
        clip = torch.zeros(1, 3, f, 8, 8)
        ids = video.encode(clip)
        assert ids.shape == (1, 4 * video.latent_frames(f)) and video.reconstruct(clip)[0].shape == clip.shape
        assert video.decode(ids).shape == (clip.shape if f > 1 else (1, 3, 8, 8))
    for f, sentence in ((18, "18 frames .* 17 or 21"), (16, "16 frames .* 13 or 17"), (2, "1 or 5")):
        with pytest.raises(ValueError, match=sentence):
            video.encode(torch.zeros(1, 3, f, 8, 8))
        with pytest.raises(ValueError, match=sentence):
            lfq.LFQ(frames=f)
    clip = torch.rand(2, 3, 4, 8, 8)                       # an image tokenizer takes any clip, frame by frame
    ids = image.encode(clip).view(2, 4, 4)
    assert all(torch.equal(ids[:, t], image.encode(clip[:, :, t])) for t in range(4))
    assert image.decode(ids.flatten(1)).shape == clip.shape


def test_lfq_inflated_is_the_image_tokenizer():
    image, pictures = trained_at_random(lfq.LFQ(image_size=16, n_res=1)), torch.rand(3, 3, 16, 16) * 2 - 1
    video = lfq.LFQ(image_size=16, frames=9, n_res=1).eval().inflate(image.state_dict())
    with torch.no_grad():
        z = image.latents(pictures)
        close(video.latents(pictures), z, 1e-6)
        # standing still
        close(video.latents(pictures.unsqueeze(2).expand(-1, -1, 9, -1, -1)), z.repeat(1, 3, 1), 1e-5)
        ids = image.encode(pictures)
        close(video.decode(ids), image.decode(ids), 1e-5)
        still = video.decode(ids.repeat(1, 3))
        close(still, image.decode(ids).unsqueeze(2).expand_as(still), 1e-5)
    with pytest.raises(ValueError, match="same sizes"):
        lfq.LFQ(image_size=16, frames=9, n_res=2).inflate(image.state_dict())


def test_lfq_gives_an_image_the_price_of_two_dimensions():
    from torch.utils.flop_counter import FlopCounterMode
    flops = []
    for frames in (1, 9):
        model = lfq.LFQ(image_size=16, frames=frames, n_res=1)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.reconstruct(torch.zeros(2, 3, 16, 16))
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 1e6, "the taps of time that meet nothing but padding are skipped"


def test_lfq_learns_and_uses_its_words():
    images = data.draw(torch.arange(64), 16)[0]
    torch.manual_seed(0)
    usage, losses = {}, []
    for weight in (0.02, 0.0):
        model = lfq.LFQ(image_size=16, bits=8, n_res=1, ch_mult=(1, 2), entropy=weight)
        opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(20):
            loss, logs = model(images[torch.randint(64, (8,))])
            opt.zero_grad(), loss.backward(), opt.step()
            losses.append(logs["mse"].item())
        usage[weight] = (model.quantizer.count(model.eval().encode(images)) > 0).float().mean().item()
    assert losses[19] < 0.5 * losses[0], f"squared error {losses[0]:.3f} to {losses[19]:.3f}"
    assert usage[0.02] > 1.5 * usage[0.0] and usage[0.02] > 0.5, usage


# ---- The linear path -------------------------------------------------------------------------------

def with_path(frames=1, **options):
    """A small LFQ with the linear path, begun on drawn images or clips -> model, those images."""
    torch.manual_seed(0)
    sizes = dict(image_size=16, bits=8, ch=8, ch_mult=(1, 2), n_res=1, groups=4, stem=2, linear=True)
    model = lfq.LFQ(**sizes | dict(frames=frames, time=None if frames == 1 else (4,)) | options)
    if frames == 1:
        x = data.draw(torch.arange(200), 16)[0]
    else:
        x = data.draw_clips(torch.arange(24), 16, frames)[0]
    model.start(x)
    return model.eval(), x


@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("codebook", ["lfq", "bsq", "fsq"])
def test_lfq_begins_with_the_best_linear_map_from_codes_to_patches(frames, codebook):
    model, x = with_path(frames, codebook=codebook)
    frames_in = model.groups_of_frames(x)
    patches = model.path.cut(frames_in).flatten(0, 1).double()
    q = model.quantizer.codes(model.encode(x)).flatten(0, 1).double()
    ones = torch.cat([q, torch.ones(len(q), 1)], 1)
    best = ones @ torch.linalg.lstsq(ones, patches, driver="gelsd").solution
    found = model.path_out(q.float())
    assert (found - best).square().mean() < 1e-4 * (patches - best).square().mean()
    rebuilt = model.decode_raw(model.quantizer.codes(model.encode(x)))
    joined = model.path.join(found.view(len(frames_in), -1, patches.shape[1]), model.space)
    joined = joined.view(len(x), -1, 3, 16, 16).transpose(1, 2)[:, :, model.time_stride - 1:]
    close(rebuilt, joined.squeeze(2) if frames == 1 else joined, 1e-5)
    assert (rebuilt - x).square().mean() < 0.5 * x.var()


def test_lfq_with_the_linear_path_sees_no_later_frame():
    model, x = with_path(9)
    nn.init.normal_(model.encoder[-1].weight, std=0.1)
    later = x.clone()
    later[:, :, 5:] = 0
    z, changed = model.latents(x), model.latents(later)
    first = 2 * model.space[0] * model.space[1]             # tokens of frames 0 and 1 to 4
    close(z[:, :first], changed[:, :first], 1e-6)
    assert not torch.allclose(z[:, first:], changed[:, first:])


def test_lfq_training_never_ends_below_its_linear_start():
    model, x = with_path()
    with torch.no_grad():
        before = F.mse_loss(model.decode(model.encode(x)), x)
    opt = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
    for step in range(60):
        opt.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 10) * (1 - step / 60)
        loss, _ = model(x[torch.randint(len(x), (16,))])
        opt.zero_grad()
        loss.backward()
        opt.step()
    with torch.no_grad():
        after = F.mse_loss(model.eval().decode(model.encode(x)), x)
    assert after < 0.8 * before


def test_an_inflated_lfq_with_the_linear_path_keeps_the_ids_and_pixels_of_images():
    image, x = with_path()
    clip, _ = with_path(5)
    for layer in (image.encoder[-1], image.decoder[-1]):    # the networks have begun to say something
        nn.init.normal_(layer.weight, std=0.1)
    clip.inflate(image.state_dict())
    close(image.latents(x), clip.latents(x), 1e-5)
    assert torch.equal(image.encode(x), clip.encode(x))
    close(image.decode(image.encode(x)), clip.decode(clip.encode(x)), 1e-6)
