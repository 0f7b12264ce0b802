"""Homework of vq.py: each test looks at one function and says what a difference may mean."""
import torch

import vq
from homework.kit import exercise


def book(look, l2_norm, **options):
    """A quantiser of 7 codes of 3 numbers, of all lengths, far apart."""
    quantizer = vq.VectorQuantizer(7, 3, l2_norm, **options)
    with torch.no_grad():
        quantizer.codebook.copy_(3 * look.randn(7, 3) * torch.linspace(0.4, 2, 7)[:, None])
    return quantizer


@exercise("vq.VectorQuantizer.nearest", points=2)
def test_homework_vq_nearest(look):
    for l2_norm in (False, True):
        quantizer = book(look, l2_norm)
        for B, T in ((1, 1), (1, 6), (4, 5)):
            look.call(f"the ids of {B} x {T} tokens with l2_norm={l2_norm}", quantizer.nearest,
                      {"z": 3 * look.randn(B, T, 3)},
                      "Ids are int64, (B, T). With l2_norm z and codes are both compared at unit length.",
                      gradients=False)


@exercise("vq.VectorQuantizer.forward", points=3)
def test_homework_vq_losses_and_straight_through(look):
    hint = ("|sg(z) - e|^2 + beta |z - sg(e)|^2, means over tokens and channels: beta weighs the encoder's "
            "term only. q has the value of e and sends its gradient to z as if q were z. The logs are told "
            "in the docstring.")
    for l2_norm, beta, entropy in ((False, 0.25, 0.0), (False, 0.7, 0.3), (True, 0.5, 0.0)):
        quantizer = book(look, l2_norm, beta=beta, entropy=entropy)
        quantizer.entropy_loss = lambda z: (z * z.cos()).mean()
        for B, T in ((1, 1), (2, 5)):
            ids = look.randint(7, B, T)
            z = quantizer.codebook.detach()[ids] * 1.1 + 0.01 * look.randn(B, T, 3)   # so these are nearest
            quantizer.nearest = lambda z, ids=ids: ids
            logs = ["commit", "usage", "perplexity"] + ["entropy"] * (entropy > 0)
            look.call(f"{B} x {T} tokens (l2_norm={l2_norm}, beta={beta}, entropy={entropy})", quantizer,
                      {"z": z}, hint, logs=logs, outputs=["q", "ids", "the loss", "logs"], params=quantizer)


@exercise("vq.VectorQuantizer.forward", points=1, hidden=True)
def test_homework_vq_codes_as_running_averages(look):
    quantizer = book(look, False, ema=0.9)
    ids = look.randint(7, 2, 5)
    calls = []
    quantizer.nearest = lambda z: ids
    quantizer.update = lambda *given: calls.append(given)
    z = quantizer.codebook[ids] * 1.1
    look.call("training with ema", lambda z: quantizer.train()(z)[:3], {"z": z},
              "With ema the codes have no loss of their own: the commitment is all.",
              outputs=["q", "ids", "the loss"])
    look.see("how often update() is called in a training step", len(calls), "Once.")
    look.see("what update() is told", calls[0][0] if calls else None, "z (N, D), ids (N,).")
    look.see("the ids that update() is told", calls[0][1] if calls else None, "z (N, D), ids (N,).")
    look.see("z goes to update() without its graph", bool(calls) and not calls[0][0].requires_grad)
    quantizer.eval()(z)
    look.see("calls after one more step, in eval mode", len(calls), "There the codes stay.")


@exercise("vq.VectorQuantizer.entropy_loss", points=2)
def test_homework_vq_entropy(look):
    for l2_norm, N, temperature in ((False, 40, 2.0), (True, 40, 0.5), (False, 2, 5.0)):
        quantizer = book(look, l2_norm)
        look.call(
            f"the entropy loss of {N} tokens at temperature {temperature}",
            quantizer.entropy_loss, {"z": 2 * look.randn(N, 3)},
            "mean H(p) - H(mean p) in nats, p = softmax(-squared distance / temperature) over the codes.",
            2e-3,
            params=quantizer,
            temperature=temperature)
    quantizer = book(look, True)
    look.call("at the default temperature", quantizer.entropy_loss, {"z": quantizer.codebook.detach() / 9},
              "See the signature.", 2e-3, gradients=False)


@exercise("vq.VectorQuantizer.update", points=2)
def test_homework_vq_running_averages(look):
    for l2_norm in (False, True):
        quantizer = book(look, l2_norm, ema=0.8, restart=0.0)
        quantizer.ema_sum.copy_(quantizer.codebook)         # and every count is 1
        for step, N in enumerate((40, 1)):
            ids = look.randint(5, N)                        # the last two codes are never nearest
            look.call(f"nothing is returned by step {step}", quantizer.update,
                      {"z": look.randn(N, 3), "ids": ids}, gradients=False)
            for name in ("ema_count", "ema_sum", "codebook"):
                look.see(f"{name} after step {step} (l2_norm={l2_norm})", getattr(quantizer, name),
                         "N_k and m_k move by 1 - ema towards the batch's count and sum of code k, and "
                         "e_k = m_k / N_k.", 1e-3)
    quantizer = book(look, False, ema=0.5, restart=0.3)
    quantizer.ema_count.fill_(1.0)
    quantizer.ema_sum.copy_(quantizer.codebook)
    before = quantizer.codebook.clone()
    ids = torch.tensor([0, 0, 0, 1, 1, 2, 3, 4] * 5)        # codes 5 and 6 fall below their share
    z = look.randn(40, 3)
    for _ in range(3):
        quantizer.update(z, ids)
    found = (quantizer.codebook[:, None] - z).abs().amax(-1).amin(1) < 1e-3
    look.see("codes that stand on a z of the batch", found,
             "Below restart times the mean count, a code is put on a random z, with the mean count.")
    look.see("the count of a code that was put anew", quantizer.ema_count[5:],
             "It is what a code has on average.", 0.05)
    look.see("two dead codes go to two places", not torch.equal(quantizer.codebook[5], quantizer.codebook[6]),
             "Each has a z of its own.")
    look.see("the codes in use are no restarts", not torch.equal(quantizer.codebook[:5], before[:5]))

    def fresh():
        again = vq.VectorQuantizer(7, 3, False, ema=0.5, restart=0.3)
        again.update(z, ids)
        return again.codebook.clone()

    look.draws("where dead codes go", fresh)


@exercise("vq", points=3, further=True, goals=[
    ("the squared error of eight codes", 1 / 12, (0.05, 0.005), "Of numbers uniform in 0 .. 8 the best eight "
     "codes leave the variance of an interval of width 1, which is 1/12."),
    ("the perplexity of eight codes", 8.0, (0.5, 0.05), "All are used alike.")])
def capstone_vq(look):
    """Eight codes, as running averages with restarts, for numbers uniform in 0 .. 8."""
    quantizer = vq.VectorQuantizer(8, 1, False, ema=0.9)
    for _ in range(600):
        quantizer.train()(8 * torch.rand(1, 512, 1))
    z = 8 * torch.rand(1, 40_000, 1)
    q, _, _, logs = quantizer.eval()(z)
    look.goal("the squared error of eight codes", (q - z).square().mean(), 0.05, 0.005)
    look.goal("the perplexity of eight codes", logs["perplexity"], 0.5, 0.05)
