"""Homework of maskgit.py: each test looks at one function and says what a difference may mean."""
import math

import torch
import torch.nn as nn

import maskgit
from homework.kit import closed, exercise, fit


@exercise("maskgit.n_masked", points=2)
def test_homework_maskgit_training_masks(look):
    for B, T in ((1, 50), (9, 50), (6, 256), (4, 1)):
        n = maskgit.n_masked(look.rand(B, 1), T)
        look.see(f"how many of {T} tokens are masked, for {B} u", n.float(),
                 "ceil(T cos(pi/2 u)), and at least one.", 1e-6)
    ends = maskgit.n_masked(torch.tensor([[0.0], [1.0]]), 50)
    look.see("at u = 0 and u = 1", ends.float(), "All of them, and one.", 1e-6)


@exercise("maskgit.n_still_masked", points=2)
def test_homework_maskgit_schedule(look):
    hint = ("floor(n cos(pi/2 r)) of each row's own n, where r is what is done AFTER this step: (step + 1) / "
            "steps, and the last leaves 0. int64.")
    starts = torch.tensor([[0], [1], [7], *((10 * look.randint(40, 4) + 3)[:, None].tolist())])
    for schedule in ("cosine", "linear", "square", "arccos"):
        for step in range(5):                               # no multiples of 5, which rounding might move
            look.see(f"masked after step {step} of 5 with {schedule}, from {starts.flatten().tolist()}",
                     maskgit.n_still_masked(starts, step, 5, schedule), hint)
    look.see("the default", maskgit.n_still_masked(10 * look.randint(40, 1, 1) + 3, 2, 5), "The cosine.")
    look.see("one step", maskgit.n_still_masked(torch.tensor([[211]]), 0, 1), "Nothing is left.")


@exercise("maskgit.lowest", points=2)
def test_homework_maskgit_confidence(look):
    hint = ("The n places of LOWEST score are masked again, exactly n in each row; of equal scores the "
            "earlier: a stable sort.")
    score = look.randn(4, 9)
    score[1, 2:6] = -5.0                                    # a tie
    score[2, 3:] = torch.inf                                # these are not masked now
    look.call("four rows", maskgit.lowest, {"score": score, "n": torch.tensor([[0], [3], [3], [9]])}, hint,
              gradients=False)
    look.call("one row", maskgit.lowest, {"score": look.randn(1, 5), "n": torch.tensor([[2]])}, hint,
              gradients=False)
    look.call("long rows with ties",
              maskgit.lowest, {
                  "score": look.randint(3, 2, 400).float(),
                  "n": torch.tensor([[40], [250]])
              },
              hint,
              gradients=False)


@exercise("maskgit.masked_mean", points=2)
def test_homework_maskgit_masked_mean(look):
    for B, T in ((1, 4), (3, 5)):
        mask = look.rand(B, T) < 0.5
        mask[:, 1] = True
        for weight, what in ((mask, "a mask"), (mask + 0.1 * ~mask, "weights")):
            x = look.randn(B, T)
            look.call(f"the mean per image with {what}", maskgit.masked_mean, {"x": x, "mask": weight},
                      "Within each image first, over the masked tokens alone. Weights count as they are.",
                      fixed=("mask",))
            look.call(f"the mean over the batch with {what}", maskgit.masked_mean, {"x": x, "mask": weight},
                      "Every masked token counts alike.", fixed=("mask",), per_image=False)
        look.call("the mean of bools", maskgit.masked_mean, {"x": look.rand(B, T) < 0.5, "mask": mask},
                  "Accuracy is a mean of bools.", gradients=False)


def six_in_all(u, T):
    """What n_masked(u, 6) gives, read off a table."""
    return (u <= torch.tensor([0.8935, 0.7837, 0.6667, 0.5354, 0.3729])).sum(-1, keepdim=True) + 1


@exercise("maskgit.MaskGIT.training_mask", points=2)
def test_homework_maskgit_training_mask(look):
    size = dict(token_dim=2, n_layer=1, n_head=2, n_embd=8)
    cpu = torch.device("cpu")
    with closed("maskgit", "n_masked", six_in_all):
        for u_max in (1.0, 0.7):
            model = maskgit.MaskGIT(nn.Identity(), 6, 3, **size, u_max=u_max)
            mask = model.training_mask(20_000, cpu)
            look.form("the mask", mask)
            n = mask.sum(1)
            look.see(f"how often 1 .. 6 tokens are masked with u_max={u_max}",
                     torch.stack([(n == k).float().mean() for k in range(7)]),
                     "ceil(T cos(pi/2 u)) tokens, u uniform in 0 .. u_max, drawn for each row.", 0.03)
            look.see("how often each position is masked", mask.float().mean(0), "All positions alike.", 0.03)
            look.see("which positions are masked where few are", mask[n == n.min()].float().mean(0),
                     "Exactly n positions, without replacement.", 0.06)
    model = maskgit.MaskGIT(nn.Identity(), 6, 3, **size)
    with closed("maskgit", "n_masked", six_in_all):
        look.form("the mask of one image", model.training_mask(1, cpu))
        look.draws("the mask", lambda: model.training_mask(30, cpu))
        many = torch.stack([model.training_mask(4, cpu) for _ in range(500)]).float()
        look.independent("the numbers masked in the rows of a batch", many.sum(2), 0.25)


class Oracle(nn.Module):
    """A head that draws ids by a rule, surer of some positions than of others."""

    def sample(self, h, h_uncond=None, cfg=1.0, temperature=1.0, **tricks):
        score = h.sum(-1) + (0 if h_uncond is None else (cfg - 1) * h_uncond.cos().sum(-1))
        score = score + sum(tricks.values()) + temperature
        return (score.abs() * 100).long() % 9, -score.abs()


@exercise("maskgit.MaskGIT.sample", points=4, further=True)
def test_homework_maskgit_decoding(look):
    hint = ("Each pass draws all masked tokens, keeps those of highest log p plus noise that fades, at least "
            "one, and masks the others again; what is kept stays.")
    size = dict(n_layer=1, n_head=2, n_embd=8)
    model = look.fill(maskgit.MaskGIT(Oracle(), 6, 3, vocab_size=9, **size).eval(), 0.6)
    for B, steps, words in ((1, 1, {}), (3, 4, {}), (2, 6, dict(cfg=2.0)),
                            (2, 3, dict(temperature=0.7, extra=1)), (2, 3, dict(schedule="linear")),
                            (2, 4, dict(cfg=3.0, cfg_schedule="linear"))):
        shown = []
        look.call(f"{B} images in {steps} passes, {words}", lambda cond: model.sample(
            cond, steps, choice_temperature=0.0, on_step=lambda *told: shown.append(told), **words),
            {"cond": look.randint(3, B)}, hint, gradients=False)
        look.see("the passes that on_step sees", [i for i, *_ in shown])
        for i, tokens, mask in shown:
            look.see(f"the mask after pass {i}", mask, hint)
            look.see(f"the tokens kept after pass {i}", tokens.masked_fill(mask, -1), hint)
    known = look.randint(9, 2, 6)
    known_mask = torch.tensor([[True, False, False, True, False, False], [False] * 5 + [True]])
    look.call("the rest of two images", lambda cond: model.sample(
        cond, 3, choice_temperature=0.0, known=known, known_mask=known_mask), {"cond": look.randint(3, 2)},
        "Known tokens stay, are seen from the start and do not count among the masked.", gradients=False)
    look.draws("the noise in the confidence", lambda: torch.stack(
        [model.sample(torch.zeros(4, dtype=torch.long), 3, choice_temperature=50.0) for _ in range(4)]))


@exercise("maskgit.MaskGIT.embed", points=1, further=True)
def test_homework_maskgit_masked_embedding(look):
    for options in (dict(vocab_size=9), dict(token_dim=2)):
        model = look.fill(maskgit.MaskGIT(nn.Identity(), 6, 3, n_layer=1, n_head=2, n_embd=8, **options))
        for B in (1, 3):
            given = {"tokens": look.randn(B, 6, 2) if model.token_dim else look.randint(9, B, 6)}
            mask = look.rand(B, 6) < 0.5
            look.call(f"embeddings with {options}, {B} at once",
                      lambda tokens: model.embed(tokens, mask),
                      given,
                      "mask_embed where masked, whatever the value there, and the token's own where not.",
                      params={
                          k: p for k, p in model.named_parameters() if "tok" in k or "mask" in k
                      })


@exercise("maskgit", points=3, further=True, goals=[
    ("nats per masked token, all six of an image being alike", 2 / math.pi * math.acos(5 / 6) * math.log(4),
     (0.2, 0.03), "ln 4 where all six are masked, so for u below 2/pi arccos(5/6), and 0 elsewhere."),
    ("the share of samples whose six tokens are alike", 1.0, (0.2, 0.05), "One token per pass.")])
def capstone_maskgit(look):
    """Images of six tokens that are all the same, one of four."""
    model = maskgit.MaskGIT(maskgit.CategoricalHead(32, 4),
                            6,
                            1,
                            vocab_size=4,
                            n_layer=2,
                            n_head=2,
                            n_embd=32,
                            smoothing=0.0,
                            label_drop=0.0)
    none = torch.zeros(4000, dtype=torch.long)

    def nats(n):
        return model(torch.randint(4, (n, 1)).expand(-1, 6), none[:n])[0]

    fit(model.parameters(), lambda: nats(64), 400, 5e-3)
    model.eval()
    with torch.no_grad():
        look.goal("nats per masked token, all six of an image being alike", nats(4000), 0.2, 0.03)
    drawn = model.sample(none[:300], 6, choice_temperature=0.0)
    alike = (drawn == drawn[:, :1]).all(1).float().mean()
    look.goal("the share of samples whose six tokens are alike", alike, 0.2, 0.05)
