"""Tests of maskgit."""
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import gmm_head
import mar
import maskgit
from common import muon
from tests.helpers import close, golden


def official_givt_maskgit():
    """The authors' tiny masked GIVT ("concat" embedding) in our layout -> MaskGIT, arrays."""
    g = golden("givt/givt_masked_concat_tiny")
    p = {k.removeprefix("param/"): v for k, v in g.items() if k.startswith("param/")}
    head = gmm_head.GMMHead(32, 4, 3, min_scale=1e-6)
    model = maskgit.MaskGIT(head, 16, 10, token_dim=4, n_layer=2, n_head=2, n_embd=32, n_mlp=48)
    labels = p["EmbedLabels/embedding"]          # ten classes, masked, seen, stand-in for the value, no class
    with torch.no_grad():
        model.cls_embed.weight.copy_(labels[[*range(10), 13]])
        # theirs: half of the width says which tokens are masked,
        masked, seen, stand_in = labels[[10, 11, 12], ::2]
        value = p["EmbedTargets/kernel"][:, ::2].T          # and every second entry is kept
        model.mask_embed.copy_(torch.cat([masked, stand_in]))
        model.tok_embed.weight.copy_(torch.cat([torch.zeros_like(value), value]))
        model.tok_embed.bias.copy_(torch.cat([seen, p["EmbedTargets/bias"][::2]]))
        model.pos_embed.copy_(p["decoder/pos_emb"][0])
        for i, block in enumerate(model.blocks):
            q = {
                k.removeprefix(f"decoder/EncDecBlock{i}/"): v
                for k, v in p.items() if f"EncDecBlock{i}/" in k
            }
            block.norm1.weight.copy_(q["LayerNorm1/scale"]), block.norm2.weight.copy_(q["LayerNorm3/scale"])
            block.wqkv.weight.copy_(
                torch.cat([q[f"SelfAttn/{n}/kernel"].flatten(1).T for n in ("query", "key", "value")]))
            block.wo.weight.copy_(q["SelfAttn/out/kernel"].flatten(0, 1).T)
            for ours, theirs in ((block.fc1, "MLP/Dense_0"), (block.fc2, "MLP/Dense_1")):
                ours.weight.copy_(q[f"{theirs}/kernel"].T), ours.bias.copy_(q[f"{theirs}/bias"])
        model.norm.weight.copy_(p["decoder/LayerNorm/scale"]), model.norm.bias.copy_(
            p["decoder/LayerNorm/bias"])
        head.proj.weight.copy_(p["decoder/LogitsDense/kernel"].T), head.proj.bias.copy_(
            p["decoder/LogitsDense/bias"])
    return model.eval(), g


def test_maskgit_is_the_authors_masked_givt():
    model, g = official_givt_maskgit()
    mask = g["input_mask"].bool()
    h = model.hidden_states(g["x"], g["labels"].long(), mask)
    close(model.head.proj(h), g["logits"])
    close(model.head.proj(model.hidden_states(g["x"], torch.full((2,), 10), mask)), g["logits_uncond"])
    nll = model.head.loss(h, g["x"])
    close(nll, g["nll"])
    close((nll * mask).sum() / mask.sum(), g["loss"])


@pytest.mark.parametrize("L, T", [(256, 16), (256, 8), (256, 12), (256, 32), (1024, 16), (6, 4), (16, 64)])
def test_maskgit_schedule_is_the_authors_to_the_integer(L, T):
    g, unknown = golden("givt/mask_schedule"), torch.tensor([[L]])
    for t in range(T):
        n = torch.minimum(maskgit.n_still_masked(torch.tensor([[L]]), t, T), unknown - 1).clamp(min=0)
        assert n == g[f"mask_len_L{L}_T{T}"][t] and unknown - n == g[f"uncovered_L{L}_T{T}"][t]
        unknown = n
    assert unknown == 0, "a token is still hidden after the last step"


def test_maskgit_choice_is_the_authors():
    g = golden("givt/mask_schedule")
    score = g["topk_probs"].log() + g["topk_temperature"] * g["topk_gumbel"]
    assert torch.equal(maskgit.lowest(score, g["topk_mask_len"].long()), g["topk_mask"].bool())


@pytest.mark.parametrize("name", ["w0p0", "w0p5"])
def test_maskgit_replays_the_authors_parallel_decoding(name, monkeypatch):
    """The recorded values of each pass are put in the head's place, and the recorded noise in that of
    torch.rand.
    """
    g, (model, _) = golden(f"givt/parallel_decode_trace_{name}"), official_givt_maskgit()
    steps, passes, seen, raw = int(g["num_steps"]), iter(range(99)), [], []

    def recorded(h, h_uncond=None, cfg=1.0, temperature=1.0):
        t = next(passes)
        raw.append((model.head.proj(h), None if h_uncond is None else model.head.proj(h_uncond)))
        drawn = torch.where((g["uncovered"][t] > 0)[..., None], g["inputs"][t + 1], torch.zeros(()))
        return drawn, g["prob"][t].log()
    uniform = iter(torch.exp(-torch.exp(-g["gumbel"].double())).float())
    noise = lambda *a, **k: next(uniform)
    monkeypatch.setattr(model.head, "sample", recorded)
    monkeypatch.setattr(torch, "rand", noise)
    weight = g["choice_temperature"].item()
    model.sample(g["labels"].long(), steps=steps, cfg=1 + g["w"].item(), choice_temperature=weight,
                 on_step=lambda i, x, m: seen.append((x, m)))
    known = torch.zeros(2, 16, dtype=torch.bool)
    for t, (x, mask) in enumerate(seen):
        known = known | (g["uncovered"][t] > 0)
        assert torch.equal(~mask, known), f"pass {t} reveals other tokens than the authors'"
        close(raw[t][0], g["logits"][t], 2e-4)
        if raw[t][1] is not None:
            close(raw[t][1], g["logits_uncond"][t], 2e-4)


def small_maskgit(continuous=True, **options):
    size = dict(n_layer=2, n_head=2, n_embd=32) | options
    if continuous:
        return maskgit.MaskGIT(gmm_head.GMMHead(32, 3, 4), 12, 5, token_dim=3, **size)
    return maskgit.MaskGIT(maskgit.CategoricalHead(32, 11), 12, 5, vocab_size=11, **size)


@pytest.mark.parametrize("continuous", [True, False])
def test_maskgit_never_sees_hidden_tokens_and_keeps_known_ones(continuous):
    model, cond = small_maskgit(continuous).eval(), torch.tensor([1, 2])
    draw = (lambda: torch.randn(2, 12, 3)) if continuous else (lambda: torch.randint(11, (2, 12)))
    x, other, mask = draw(), draw(), torch.rand(2, 12) < 0.5
    mixed = torch.where(mask.view(2, 12, *[1] * (x.ndim - 2)), other, x)
    assert torch.equal(model.hidden_states(x, cond, mask), model.hidden_states(mixed, cond,
                                                                               mask)), "a hidden token leaks"
    assert not torch.equal(model.hidden_states(x, cond, ~mask), model.hidden_states(mixed, cond, ~mask))
    hidden = []
    y = model.sample(cond, steps=5, cfg=2.0, known=x, known_mask=~mask,
                     on_step=lambda i, t, m: hidden.append(m))
    assert torch.equal(y[~mask], x[~mask]) and not torch.equal(y[mask], x[mask])
    assert len(hidden) == 5 and not hidden[-1].any() and all(
        (b <= a).all() for a, b in zip(hidden, hidden[1:]))
    with pytest.raises(ValueError, match="1 to 12"):
        model.sample(cond, steps=13)


def texts_as_bytes(*texts, P=22):
    """Captions -> bytes (B, P), zeros in front."""
    return torch.tensor([[0] * (P - len(text)) + list(text.encode()) for text in texts])


@pytest.mark.parametrize("continuous", [True, False])
def test_maskgit_reads_captions_and_not_their_padding(continuous):
    model = small_maskgit(continuous, text=(22, "bytes")).eval()
    x = torch.randn(1, 12, 3).expand(3, -1, -1) if continuous else torch.randint(11, (1, 12)).expand(3, -1)
    cond, mask = texts_as_bytes("a disc", "a ring", "no padding in this one"), torch.ones(3, 12).bool()
    h = model.hidden_states(x, cond, mask)
    assert (h[0] - h[1]).abs().max() > 1e-3, "the caption has no effect"
    assert torch.equal(h, model.hidden_states(x, cond.to(torch.uint8), mask))
    for wide in (model.caption.pos.data[:16], model.pos_embed.data[:4]):              # of 24 bytes, 6 rows
        wide += 5
    changed = (model.hidden_states(x, cond, mask) - h).abs().amax((1, 2))
    assert (changed[:2] == 0).all() and changed[2] > 1e-3, "padding was looked at, or text was not"


def test_maskgit_without_a_caption_is_the_null_caption_alone():
    """Guidance, label dropping and zeros mean one thing: the rows of "no caption", whatever was asked for."""
    model, seen = small_maskgit(False, text=(22, "bytes"), label_drop=0.5).eval(), []
    cond, zeros = texts_as_bytes("a disc", "a ring"), torch.zeros(2, 22, dtype=torch.long)
    tokens, mask = torch.randint(11, (1, 12)).expand(2, -1), torch.ones(2, 12).bool()
    h, h_uncond = model.guided_states(tokens, cond, mask, 2.0)
    close(h, model.hidden_states(tokens, cond, mask), 1e-5)
    close(h_uncond, model.hidden_states(tokens, zeros, mask), 1e-5)
    assert torch.equal(h_uncond[0], h_uncond[1]), "a dropped caption leaves a trace"
    model.caption.none += 1
    assert not torch.equal(h_uncond, model.hidden_states(tokens, zeros, mask))
    model.train()
    model.hidden_states = lambda tokens, cond, mask: (seen.append(cond), torch.randn(400, 12, 32))[1]
    model(torch.zeros(400, 12, dtype=torch.long), cond[:1].expand(400, -1))
    kept = (seen[0] == cond[0]).all(1)
    assert (kept | (seen[0] == 0).all(1)).all() and 0.4 < kept.float().mean() < 0.6


def test_maskgit_reads_features_of_an_encoder_as_well():
    model = small_maskgit(False, text=(7, 5)).eval()
    cond = torch.randn(2, 7, 5)
    cond[:, :4] = 0                                         # padding in front
    x, mask = torch.randint(11, (2, 12)), torch.ones(2, 12).bool()
    h = model.hidden_states(x, cond, mask)
    model.pos_embed.data[:4] += 5
    assert torch.equal(h, model.hidden_states(x, cond, mask)), "padding was looked at"
    assert model.sample(cond, cfg=2.0).shape == (2, 12)
    assert model.hidden_states(x, torch.zeros_like(cond), mask).isfinite().all()


def test_maskgit_loss_is_the_mean_over_masked_tokens_only():
    model, x, cond = small_maskgit(label_drop=0).eval(), torch.randn(3, 12, 3), torch.arange(3)
    torch.manual_seed(5)
    loss, _ = model(x, cond)
    torch.manual_seed(5)
    mask = model.training_mask(3, "cpu")
    terms = [
        model.head.loss(model.hidden_states(x, cond, mask), x)[b, t].item() for b in range(3)
        for t in range(12) if mask[b, t]
    ]
    assert abs(loss.item() - sum(terms) / len(terms)) < 1e-4


def test_maskgit_training_masks_have_the_authors_counts():
    g, model = golden("givt/mask_schedule"), small_maskgit(u_max=0.7)
    assert torch.equal(maskgit.n_masked(g["train_keep"], 256).long(), g["train_num_masked_L256"].long())
    counts = model.training_mask(4000, "cpu").sum(1)
    u = torch.linspace(0, 0.7, 4001)
    assert counts.min() == math.ceil(12 * math.cos(0.35 * math.pi)) and counts.max() == 12
    assert abs(counts.float().mean() - (12 * torch.cos(math.pi / 2 * u)).ceil().mean()) < 0.1
    mean = model.training_mask(4000, "cpu").float().mean(0)
    assert mean.std() < 0.03, "some places are hidden more often than others"


def test_maskgit_one_token_per_pass_comes_close_to_bars_and_stripes():
    """The 14 pictures of 3 x 3 ids."""
    model = maskgit.MaskGIT(maskgit.CategoricalHead(32, 2), 9, 1, vocab_size=2, n_layer=2, n_head=2,
                            n_embd=32, label_drop=0, smoothing=0)
    fit_with_muon(model, 150, 2e-2)
    model.eval()
    few = total_variation(model, 2)
    many = total_variation(model, 9)
    assert many[0] > 0.8
    assert many[1] < few[1]


def fit_with_muon(model, steps, lr):
    """Train on bars-and-stripes. With AdamW alone it takes three times as many multiplications."""
    zeros = torch.zeros(128, dtype=torch.long)
    matrices = [p for name, p in model.named_parameters() if "blocks." in name and p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not q for q in matrices)]
    optimizers = [muon.Muon(matrices, lr=lr, weight_decay=0.0, dtype=torch.float32),
                  torch.optim.AdamW(others, lr=lr)]
    for step in range(steps):
        loss, _ = model(mar.bars_and_stripes(128, "cpu", 3), zeros)
        loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / 10) * (1 - step / steps)
            optimizer.step()
            optimizer.zero_grad()


def total_variation(model, steps, n=800):
    """Draw n bars-and-stripes in `steps` passes -> share that are valid, total variation to uniform over the
    14.
    """
    drawn = model.sample(torch.zeros(n, dtype=torch.long), steps=steps)
    key = (drawn * 2 ** torch.arange(9)).sum(1)
    true = (mar.bars_and_stripes(4000, "cpu", 3) * 2 ** torch.arange(9)).sum(1).unique()
    assert len(true) == 14
    share = torch.stack([(key == k).float().mean() for k in true])
    return share.sum().item(), 0.5 * ((share - 1 / 14).abs().sum() + 1 - share.sum()).item()


@pytest.mark.parametrize("name", ["cosine", "arccos"])
@pytest.mark.parametrize("N", [32, 64, 128, 256, 1024])
@pytest.mark.parametrize("T", [4, 8, 10, 12, 16])
def test_maskgit_hides_as_many_ids_as_the_authors(name, N, T):
    theirs, unknown, ours = golden("tokenizers/maskgit_schedules")[f"{name}_N{N}_T{T}"], torch.tensor([[N]
                                                                                                       ]), []
    for t in range(T):
        unknown = torch.minimum(maskgit.n_still_masked(torch.tensor([[N]]), t, T, name), unknown - 1)
        ours.append(unknown.item())
    assert theirs[-1] == 1 and ours[
        -1] == 0, "theirs hides one after the last pass and returns its id all the same"
    assert ours[:-1] == theirs[:-1].tolist()


def test_maskgit_schedules_are_the_authors_functions():
    g = golden("tokenizers/maskgit_schedules")
    for ours, theirs in (("cosine", "cosine"), ("linear", "uniform"), ("square", "pow2")):
        close(maskgit.SCHEDULES[ours](g["ratio_x"]), g[f"ratio_{theirs}"], 1e-6)
    g = golden("tokenizers/maskgit_train_mask")
    for name in ("cosine", "arccos"):
        close(maskgit.SCHEDULES[name](g["u"]), g[f"{name}_ratio"], 1e-6)
    assert torch.equal(maskgit.n_masked(g["u"], 64), g["num_masked_cosine_ceil_N64"])


def test_maskgit_halton_order_is_the_authors_and_reveals_tokens_far_apart():
    g = golden("tokenizers/maskgit_schedules")
    for n in (8, 16):
        rows, columns = g[f"halton_{n}x{n}_order"].unbind(1)
        assert torch.equal(maskgit.halton_rank((n, n)).argsort(), rows * n + columns)
    assert maskgit.halton_rank((8, )).tolist() == [7, 3, 1, 5, 0, 4, 2,
                                                   6], "the digits of 1, 2, 3 ... in base 2, mirrored"
    assert sorted(maskgit.halton_rank((3, 4, 5)).tolist()) == list(range(60))
    model, passes = small_maskgit(False, grid=(3, 4)).eval(), []
    known_mask = torch.tensor([[0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], [0] * 12]).bool()
    y = model.sample(torch.tensor([1, 2]), steps=4, known=torch.full((2, 12), 7), known_mask=known_mask,
                     order="halton", schedule="linear", on_step=lambda i, x, m: passes.append(m))
    assert (y[known_mask] == 7).all() and not passes[-1].any()
    turn = maskgit.halton_rank((3, 4))
    for mask in passes[:-1]:
        for row in range(2):
            shown = ~mask[row] & ~known_mask[row]
            assert turn[shown].max() < turn[mask[row]].min(), "a token was revealed before its turn"
    with pytest.raises(ValueError, match="halton"):
        model.sample(torch.tensor([1]), order="spiral")
    with pytest.raises(ValueError, match="arccos"):
        model.sample(torch.tensor([1]), schedule="cubic")


def test_maskgit_replays_the_authors_jax_decoding_of_ids(monkeypatch):
    """Their toy network in the place of hidden(), their Gumbel noise in the place of draw_ids and rand."""
    g = golden("tokenizers/maskgit_decode_jax")
    K, T, steps, passes = 11, 16, 8, []
    model = maskgit.MaskGIT(maskgit.CategoricalHead(32, K), T, 4, vocab_size=K, n_layer=1, n_head=2,
                            n_embd=32).eval()
    model.head.proj = nn.Identity()

    def network(tokens, cond, mask):
        # -1 is their last row
        ids = torch.cat([K + cond[:, None], torch.where(mask, len(g["A"]) - 1, tokens)], 1)
        a = g["A"][ids]
        t = len(passes)
        assert torch.equal(torch.where(mask, -1, tokens),
                           g[f"step{t}_ids_in"][:, 1:].long()), f"pass {t} sees other tokens"
        logits = g["P"] + 0.5 * a + 2 * a.mean(1, keepdim=True)
        close(logits, g[f"step{t}_logits"])
        return logits[:, 1:]

    def gumbel_argmax(p):
        return (p.log() + g[f"step{len(passes)}_gumbel_sample"][:, 1:]).argmax(-1)

    uniform = lambda *a, **k: torch.exp(-torch.exp(-g[f"step{len(passes)}_gumbel_choice"][:, 1:].double())
                                        ).float()
    monkeypatch.setattr(model, "hidden_states", network)
    monkeypatch.setattr(maskgit, "draw_ids", gumbel_argmax)
    monkeypatch.setattr(torch, "rand", uniform)
    tokens = model.sample(g["init"][:, 0].long() - K, steps=steps, choice_temperature=g["temperature"].item(),
                          on_step=lambda i, x, m: passes.append((x, m)))
    for t, (x, mask) in enumerate(passes):
        assert torch.equal(x, g[f"step{t}_sampled"][:, 1:].long()), f"pass {t} draws other ids"
        if t < steps - 1:                                   # their last pass hides one again, ours none
            assert torch.equal(mask, g[f"step{t}_masking"][:, 1:]), f"pass {t} hides other tokens again"
    assert torch.equal(tokens, g["final_seqs"][:, -1, 1:].long()) and not passes[-1][1].any()


def test_maskgit_losses_are_the_authors(monkeypatch):
    g = golden("tokenizers/maskgit_losses")
    def loss_of(smoothing, **options):
        model = maskgit.MaskGIT(maskgit.CategoricalHead(32, 9), 6, 1, vocab_size=9, n_layer=1, n_head=2,
                                n_embd=32, smoothing=smoothing, label_drop=0, **options).train()
        model.head.proj = nn.Identity()
        monkeypatch.setattr(model, "hidden_states", lambda tokens, cond, mask: g["logits"])
        monkeypatch.setattr(model, "training_mask", lambda B, device: g["weights"].bool())
        return model(g["labels"], torch.zeros(2, dtype=torch.long))
    mask = g["weights"].bool()
    nll = [
        -g["logits"][b, t].log_softmax(-1)[g["labels"][b, t]] for b in range(2) for t in range(6)
        if mask[b, t]
    ]
    hits = [g["logits"][b, t].argmax() == g["labels"][b, t] for b in range(2) for t in range(6) if mask[b, t]]
    for smoothing in (0.0, 0.1):
        loss, logs = loss_of(smoothing)
        close(loss, g[f"loss_ls{smoothing}"], 1e-5)
        close(logs["nll"], torch.stack(nll).mean(), 1e-5)             # without smoothing in both
        close(logs["accuracy"], torch.stack(hits).float().mean(), 1e-5)
    close(maskgit.masked_mean(g["ce_per_token_ls0.1"], g["weights"]), g["loss_ls0.1"], 1e-5)


def test_maskgit_label_dropping_reaches_the_null_row_in_training_only():
    tokens, cond = torch.randint(11, (4, 12)), torch.arange(4)
    for drop, mode, row in ((1.0, True, True), (1.0, False, False), (0.0, True, False)):
        model = small_maskgit(False, label_drop=drop).train(mode)
        nn.init.normal_(model.head.proj.weight)             # at zero, no gradient would pass it
        model(tokens, cond)[0].backward()
        rows = model.cls_embed.weight.grad.abs().sum(1) > 0
        assert rows[5] == row and rows[:4].any() != row


def test_maskgit_mathematics_does_not_depend_on_the_mode():
    model = small_maskgit(False, label_drop=0)
    nn.init.normal_(model.head.proj.weight)
    tokens, cond, losses = torch.randint(11, (4, 12)), torch.arange(4), []
    for mode in (True, False):
        torch.manual_seed(3)
        losses.append(model.train(mode)(tokens, cond)[0])
    assert torch.equal(*losses) and losses[0] > math.log(11)
    nn.init.zeros_(model.head.proj.weight)
    for model.smoothing in (0.0, 0.1):
        assert abs(model(tokens, cond)[0] - math.log(11)) < 1e-5, "an undecided head pays ln V"


def test_maskgit_guidance_takes_one_pass_and_is_off_at_one(monkeypatch):
    model, cond, rows = small_maskgit(False).eval(), torch.arange(3), []
    nn.init.normal_(model.head.proj.weight)
    hidden_states = model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda *a: rows.append(a[1]) or hidden_states(*a))
    plain = [
        torch.manual_seed(1) and model.sample(cond, steps=4),
        torch.manual_seed(1) and model.sample(cond, steps=4, cfg=1.0)
    ]
    assert torch.equal(*plain) and [len(r) for r in rows] == [3] * 8
    rows.clear()
    model.sample(cond, steps=4, cfg=3.0)
    assert [r.tolist() for r in rows] == [[0, 1, 2, 5, 5, 5]] * 4, "classes and their absence share a pass"


@pytest.mark.parametrize("steps, cfg_schedule, scales", [
    (4, "linear", [1, 2, 3, 4]), (4, "constant", [4] * 4), (1, "linear", [1])])
def test_maskgit_guidance_grows_by_equal_steps_from_off(monkeypatch, steps, cfg_schedule, scales):
    model, used = small_maskgit(False).eval(), []
    draw = model.head.sample
    monkeypatch.setattr(model.head, "sample",
                        lambda h, u, cfg, *a: used.append((cfg, u is None)) or draw(h, u, cfg, *a))
    model.sample(torch.arange(3), steps=steps, cfg=4.0, cfg_schedule=cfg_schedule)
    assert used == [(scale, False) for scale in scales], "a pass without guidance has another shape"
    with pytest.raises(ValueError, match="cfg_schedule must be constant or linear"):
        model.sample(torch.arange(3), cfg_schedule="cosine")


@pytest.mark.parametrize("options, expected", [(dict(vocab_size=8), 4.5), (dict(token_dim=16), 32.0),
                                               (dict(token_dim=3), 6.0),
                                               (dict(token_dim=3, choice_temperature=1.0), 1.0)])
def test_choice_temperature_is_that_of_ids_or_grows_with_the_numbers_of_a_token(options, expected):
    head = NoHead(options.get("vocab_size"))
    model = maskgit.MaskGIT(head, 4, 1, n_layer=1, n_head=1, n_embd=8, **options)
    assert model.choice_temperature == expected


class NoHead(nn.Module):
    """Draws zeros, and is as certain of each token as it is told."""

    def __init__(self, vocab_size=None, log_p=None):
        super().__init__()
        self.vocab_size = vocab_size
        self.log_p = log_p

    def sample(self, h, h_uncond, cfg, temperature):
        B, T, _ = h.shape
        tokens = torch.zeros(B, T, dtype=torch.long) if self.vocab_size else torch.zeros(B, T, 2)
        return tokens, self.log_p.expand(B, T)


@pytest.mark.parametrize("kind", ["ids", "vectors"])
def test_the_noise_of_the_choice_is_used_where_none_is_asked_for(kind):
    """With a large choice temperature the order is random, with 0 it is that of the certainty."""
    log_p = torch.tensor([4.0, 3.0, 2.0, 1.0])
    options = dict(vocab_size=8) if kind == "ids" else dict(token_dim=2)
    firsts = {}
    for temperature in (0.0, 1e4):
        model = maskgit.MaskGIT(NoHead(options.get("vocab_size"), log_p), 4, 1, n_layer=1, n_head=1, n_embd=8,
                                choice_temperature=temperature, **options).eval()
        seen = []
        on_step = lambda i, tokens, mask: seen.append(~mask)
        model.sample(torch.zeros(400, dtype=torch.long), 4, on_step=on_step)
        firsts[temperature] = seen[0].float().mean(0)
    assert firsts[0.0].tolist() == [1, 0, 0, 0]
    assert (firsts[1e4] - 0.25).abs().max() < 0.08


def test_each_pass_reveals_a_token_at_least():
    """Among 16 tokens the cosine leaves as many masked after the first of 16 passes as before it."""
    model = maskgit.MaskGIT(NoHead(8, torch.zeros(1)), 16, 1, vocab_size=8, n_layer=1, n_head=1, n_embd=8)
    left = []
    on_step = lambda i, tokens, mask: left.append(mask.sum(1))
    model.eval().sample(torch.zeros(3, dtype=torch.long), 16, on_step=on_step)
    assert torch.stack(left).tolist() == [[15 - i] * 3 for i in range(16)]


def slow_weights(q, k, p):
    """softmax(q k^T / sqrt(d)) with a share p of the weights dropped: q, k (B, n_head, S, d)."""
    score = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return F.dropout(score.softmax(-1), p)


@pytest.mark.parametrize("B", [1, 3])
def test_a_maskgit_block_drops_out_where_givts_does(B):
    """On the attention weights, on the attention's output and after the GELU (big_vision's givt.py)."""
    block = maskgit.EncoderBlock(32, 4, dropout=0.4).train()
    x = torch.randn(B, 7, 32)

    def rebuilt(x):
        q, k, v = block.wqkv(block.norm1(x)).view(B, 7, 3, 4, 8).permute(2, 0, 3, 1, 4)
        y = (slow_weights(q, k, 0.4) @ v).transpose(1, 2).reshape(B, 7, 32)
        x = x + F.dropout(block.wo(y), 0.4)
        h = F.gelu(block.fc1(block.norm2(x)), approximate="tanh")
        return x + block.fc2(F.dropout(h, 0.4))
    torch.manual_seed(1)
    ours = block(x)
    torch.manual_seed(1)
    close(ours, rebuilt(x), 1e-5)
    block.eval()
    assert torch.equal(block(x), block(x))
