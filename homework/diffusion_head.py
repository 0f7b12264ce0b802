"""Homework of diffusion_head.py: each test looks at one function and says what a difference may mean."""
import torch

import diffusion_head
from homework.kit import exercise, fit


def head_of(look, objective="diffusion"):
    """A head of 3 numbers per token, h of width 4, whose network says something from the start."""
    head = diffusion_head.DiffusionHead(4, 3, width=8, depth=1, objective=objective)
    look.fill(head.net, 0.4)
    return head


@exercise("diffusion_head.DiffusionHead.reverse", points=3)
def test_homework_diffusion_head_reverse_step(look):
    table = diffusion_head.schedule(torch.arange(1000))
    for lead in ((4,), (2, 3)):
        row = table[look.randint(900, *lead) + 5].unsqueeze(-2).unbind(-1)
        given = {name: look.randn(*lead, 3) for name in ("x", "eps", "v")}
        look.call(
            f"a step of {lead} tokens",
            lambda x, eps, v: diffusion_head.DiffusionHead.reverse(x, eps, v, row),
            given, "x = a x0 + s eps, solved for x0; the mean k0 x0 + kx x; log variance from "
            "log beta~ at v = -1 to log beta at v = +1, on a straight line (Nichol & Dhariwal eq. 15).",
            1e-3,
            outputs=["the mean", "log variance", "x0"])
    row = table[500].unbind()
    look.call("a step in which all tokens are equally noisy", lambda x, eps, v:
              diffusion_head.DiffusionHead.reverse(x, eps, v, row),
              {name: look.randn(5, 3) for name in ("x", "eps", "v")}, "row holds eight numbers there.", 1e-3,
              outputs=["the mean", "log variance", "x0"])


@exercise("diffusion_head.DiffusionHead.terms", points=2)
def test_homework_diffusion_head_loss(look):
    head = head_of(look)
    a, s, c = 0.3 + 0.6 * look.rand(1000), 0.2 + 0.6 * look.rand(1000), -look.rand(1000)
    head.table = torch.stack([a, s, a, s, a, torch.ones(1000), c + 1, c], 1)

    def reverse(x, eps, v, row):                            # what reverse() gives with such a table only
        return 2 * x - row[1] * eps, row[7] + 0.5 + 0.5 * v, x

    head.reverse = reverse
    for lead in ((1,), (5,), (2, 3)):
        t = look.randint(700, *lead) + 50
        given = {"x": look.randn(*lead, 3), "h": look.randn(*lead, 4), "noise": look.randn(*lead, 3)}
        look.call(f"{lead} tokens", lambda x, h, noise: head.terms(x, h, t, noise), given,
                  "x_t = a x + s noise; the network gives eps, then v, and predicts the NOISE; mse is a mean "
                  "over the token's numbers and trains eps; vb is KL(q(x_earlier | x_t, x) || the step) in "
                  "bits, in this order, and trains v only: there eps is detached.", 1e-3,
                  outputs=["mse", "vb"], params=head.net)
    mse, _ = head.terms(given["x"], given["h"], t, given["noise"])
    look.gradients("mse alone", [mse], dict(head.net.named_parameters()), "mse trains eps.")


@exercise("diffusion_head.DiffusionHead.terms", points=1, hidden=True)
def test_homework_diffusion_head_flow_loss(look):
    head = head_of(look, "flow")
    for lead in ((1,), (2, 3)):
        t = look.rand(*lead)
        given = {"x": look.randn(*lead, 3), "h": look.randn(*lead, 4), "noise": look.randn(*lead, 3)}
        look.call(f"{lead} tokens, flow", lambda x, h, noise: head.terms(x, h, t, noise), given,
                  "t = 0 is the token, 1 the noise, with a straight line between; the network knows times of "
                  "0 .. 1000 and predicts the velocity noise - x.", 1e-3, outputs=["mse"], params=head.net)


@exercise("diffusion_head.DiffusionHead.predict", points=2)
def test_homework_diffusion_head_guidance(look):
    for objective in ("diffusion", "flow"):
        head = head_of(look, objective)
        names = ["eps", "v"] if objective == "diffusion" else ["velocity", "v, empty"]
        for lead, cfg in (((5,), None), ((5,), 3.0), ((2, 3), 1.5), ((1,), 0.0)):
            c = look.randn(*(() if cfg is None else (2,)), *lead, 8)
            look.call(f"{lead} tokens, cfg={cfg}", lambda x, time, c: head.predict(x, time, c, cfg),
                      {"x": look.randn(*lead, 3), "time": look.randn(8), "c": c},
                      "u + cfg (c - u), beyond the conditional prediction, which comes first in c. Guidance "
                      "mixes eps only; v is the conditional one's.", outputs=names, gradients=False)


@exercise("diffusion_head.DiffusionHead.follow_flow", points=2)
def test_homework_diffusion_head_walk_along_the_flow(look):
    head = head_of(look, "flow")
    head.predict = lambda x, time, c, cfg: (x.cos() + time[:3] + c[..., :3] * (cfg or 0.5), c[..., :0])
    for lead, steps, sampler, cfg in (((4,), 3, "euler", None), ((4,), 3, "heun", 2.0), ((2, 1), 1, "heun",
                                                                                         None)):
        shown = []
        look.call(f"{steps} steps of {sampler}", lambda x, c: head.follow_flow(
            x, c, cfg, steps, sampler, lambda i, x: shown.append((i, x.clone()))),
            {"x": look.randn(*lead, 3), "c": look.randn(*lead, 8)},
            "From t = 1 (noise) to 0, x moves against the velocity, 1 / steps each time. heun averages the "
            "velocity here and where euler would land, at the next time.", gradients=False)
        look.see("the steps that on_step sees", [i for i, _ in shown])
        look.see("what on_step sees", torch.stack([x for _, x in shown]) if shown else None)
        look.call("without on_step", lambda x, c: head.follow_flow(x, c, cfg, steps, sampler, None),
                  {"x": look.randn(*lead, 3), "c": look.randn(*lead, 8)}, gradients=False)


@exercise("diffusion_head", points=3, further=True, goals=[
    ("the squared error of the noise, for tokens N(0, 1)", 0.4956, (0.1, 0.01), "The mean over t of a_t^2, "
     "since the best guess of eps is s_t x_t. Below it, the token is seen."),
    ("the variance of samples", 1.0, (0.3, 0.1), "That of the tokens.")])
def capstone_diffusion_head(look):
    """Tokens of two numbers, each N(0, 1): the best denoiser is known."""
    head = diffusion_head.DiffusionHead(4, 2, width=32, depth=1, batch_mul=8)
    h = torch.zeros(20_000, 4)
    fit(head.parameters(), lambda: head.loss(h[:64], torch.randn(64, 2)).mean(), 600, 5e-3)
    t = torch.arange(1000).repeat(20)
    with torch.no_grad():
        mse, _ = head.terms(torch.randn(20_000, 2), h, t, torch.randn(20_000, 2))
    look.goal("the squared error of the noise, for tokens N(0, 1)", mse.mean(), 0.1, 0.01)
    x, _ = head.sample(h[:4000], diffusion_steps=50)
    look.goal("the variance of samples", x.var(), 0.3, 0.1)
