"""Homework of lfq.py: each test looks at one function and says what a difference may mean."""
import math

import torch
import torch.nn as nn

import lfq
from homework.kit import closed, exercise, fit


@exercise("lfq.quantize", points=2)
def test_homework_lfq_quantize(look):
    for shape in ((3, 4, 6), (1, 1), (5, 40), (7,)):
        look.call(f"z of shape {shape}", lfq.quantize, {"z": 2 * look.randn(*shape)},
                  "Only the sign is kept; channel 0 is the LOWEST bit of the int64 index; the gradient goes "
                  "straight through, unclipped.", outputs=["q", "index"])


@exercise("lfq.quantize", points=1, hidden=True)
def test_homework_lfq_quantize_zero(look):
    look.call("z with zeros", lfq.quantize, {"z": torch.tensor([[0.0, 0.5, -0.0], [-0.4, 0.0, 0.9]])},
              "A z of 0 becomes -1.", outputs=["q", "index"])


@exercise("lfq.codes", points=2)
def test_homework_lfq_codes(look):
    for shape, bits in (((3, 4), 6), ((5,), 40), ((), 3), ((2, 1, 2), 1)):
        look.call(f"codes of ids of shape {shape}, {bits} bits", lambda index: lfq.codes(index, bits),
                  {"index": look.randint(2**bits, *shape)}, "-1 and +1, float32, the lowest bit first.",
                  gradients=False)


def of_two_bits(z, temperature):
    """What entropy_of_mean() gives for z of two bits, and of no other number."""
    a, b = torch.sigmoid(4 / temperature * z).unbind(1)
    four = torch.stack([a * b, a * (1 - b), (1 - a) * b, (1 - a) * (1 - b)]).mean(1)
    return -(four * four.log()).sum()


@exercise("lfq.entropy_penalty", points=3)
def test_homework_lfq_entropy(look):
    hint = ("Coins with P(+1) = sigmoid(4 z / temperature): entropies in nats add over bits, then the mean "
            "over tokens is taken. batch is entropy_of_mean(), with groups the sum over runs of neighbouring "
            "bits.")
    with closed("lfq", "entropy_of_mean", of_two_bits):
        for shape, words in (((30, 2), dict(temperature=0.5)), ((5, 6, 4), dict(temperature=1.0, groups=2)),
                             ((1, 6), dict(temperature=0.7, groups=3))):
            look.call(f"z of shape {shape}, {words}", lambda z: lfq.entropy_penalty(z, **words),
                      {"z": 0.3 * look.randn(*shape)}, hint, 1e-3, outputs=["per_sample", "batch"])
    with closed("lfq", "entropy_of_mean", lambda z, temperature: z.sum() * 0):
        look.call("large z at the default temperature", lambda z: lfq.entropy_penalty(z)[0],
                  {"z": 20 * look.randn(10, 4)},
                  "There the entropy is 0 and so is its gradient, not nan: p log p at p = 0.")


@exercise("lfq.CausalConv.forward", points=2)
def test_homework_lfq_causal_convolution(look):
    hint = "kernel - 1 frames of zeros in front of the first one, none behind the last; stride, bias count."
    arms = [((3, 3, 3), (1, 1, 1), True, 1, 5), ((3, 3, 3), (2, 2, 2), False, 2, 5),
            ((3, 3, 3), (1, 2, 2), True, 1, 3), ((1, 3, 3), (1, 1, 1), True, 2, 3),
            ((4, 1, 1), (1, 1, 1), True, 1, 4)]
    for kernel, stride, bias, B, frames in arms:
        conv = look.fill(lfq.CausalConv(2, 4, kernel, stride, bias))
        x = look.randn(B, 2, frames, 4, 4)
        what = f"kernel {kernel}, stride {stride}"
        look.call(f"a clip, {what}", conv, {"x": x}, hint, params=conv)
        look.call(f"an image, {what}",
                  conv, {"x": x[:, :, :1]},
                  "An image is a clip of one frame.",
                  params=conv)
        look.call(f"the first two channels, {what}", lambda x: conv(x, 2), {"x": x},
                  "c_out takes the first rows of the weight and of the bias.", params=conv)


@exercise("lfq.entropy_of_mean", points=3, further=True)
def test_homework_lfq_entropy_of_the_batch(look):
    for N, bits, temperature in ((30, 4, 0.5), (7, 5, 1.0), (1, 3, 0.3), (4, 1, 1.0), (20, 14, 2.0)):
        look.call(
            f"{N} tokens of {bits} bits at {temperature}", lambda z: lfq.entropy_of_mean(z, temperature),
            {"z": 0.4 * look.randn(N, bits)}, "p(c) of a token is a softmax of 2 z.c / temperature over "
            "all codes; p is averaged over tokens before the entropy is taken, in nats.", 1e-3)


@exercise("lfq.fsq_quantize", points=2, further=True)
def test_homework_lfq_rounded_numbers(look):
    hint = ("Round fsq_bound(), with the gradient straight through; divide by L // 2. Digits are the rounded "
            "numbers plus L // 2, the first one counts least.")
    for shape, levels in (((3, 4, 3), (8, 6, 5)), ((1, 2), (5, 4)), ((6,), (3, 7, 4, 5, 2, 8)),
                          ((2, 1, 1), (9,))):
        look.call(f"z of shape {shape}, levels {levels}", lambda z: lfq.fsq_quantize(z, levels),
                  {"z": 2 * look.randn(*shape)}, hint, outputs=["q", "index"])


@exercise("lfq.FactorizedHead.loss", points=2, further=True)
def test_homework_lfq_factorised_vocabulary(look):
    for lead, vocab, n_sub in (((1,), 16, 2), ((3, 2), 27, 3), ((4,), 25, 2)):
        head = look.fill(lfq.FactorizedHead(5, vocab, n_sub))
        for smoothing in (0.0, 0.1):
            look.call(f"{lead} ids of {vocab}, {n_sub} sub-tokens, smoothing {smoothing}",
                      lambda h, x: head.loss(h, x, smoothing), {
                          "h": look.randn(*lead, 5),
                          "x": look.randint(vocab, *lead)
                      },
                      "The sum of the cross-entropies of the sub-tokens, one number per position.",
                      params=head)


@exercise("lfq.FactorizedHead.embed", points=1, further=True)
def test_homework_lfq_embedding_of_sub_tokens(look):
    for lead, vocab, n_sub in (((1,), 16, 2), ((3, 2), 27, 3)):
        head = look.fill(lfq.FactorizedHead(5, vocab, n_sub))
        look.call(f"the embedding of {lead} ids of {vocab}", head.embed, {"ids": look.randint(vocab, *lead)},
                  "The sum of the rows of proj that belong to the sub-tokens, each with its own table.",
                  params=head)


@exercise("lfq", points=3, further=True, goals=[
    ("the entropy of a token, in nats", 0.0, (0.3, 0.05), "Each is certain."),
    ("the entropy of the batch, in nats", 4 * math.log(2), (0.3, 0.05), "All 16 ids are used alike: 4 ln 2."),
    ("how many ids are in use", 16.0, (1.0, 0.0), "All.")])
def capstone_lfq(look):
    """The two entropies alone, on 256 free tokens of four bits."""
    z = nn.Parameter(0.3 * torch.randn(256, 4))

    def loss():
        each, batch = lfq.entropy_penalty(z, 1.0)
        return each - batch

    fit([z], loss, 300, 5e-2)
    each, batch = lfq.entropy_penalty(z, 1.0)
    look.goal("the entropy of a token, in nats", each, 0.3, 0.05)
    look.goal("the entropy of the batch, in nats", batch, 0.3, 0.05)
    look.goal("how many ids are in use", len(lfq.quantize(z)[1].unique()), 1.0, 0.0)
