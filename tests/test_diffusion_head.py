"""Tests of diffusion_head."""
import pytest
import torch
import torch.nn as nn

import diffusion_head
from tests.helpers import close, golden


def official_diffusion_head():
    """The head of the authors' tiny MAR: its weights must load by their official names."""
    prefix = "sd/diffloss.net."
    weights = {k[len(prefix):]: v for k, v in golden("mar/mar_weights").items() if k.startswith(prefix)}
    head = diffusion_head.DiffusionHead(32, 4, width=64, depth=2)
    head.net.load_state_dict(weights)
    return head


def test_diffusion_mlp_reproduces_the_authors():
    head, g = official_diffusion_head(), golden("mar/mlp")
    close(head.net.time_embed.sinusoid(g["t"]), g["t_freq"])
    close(head.net.time_embed(g["t"]), g["t_emb"])
    close(head.net(g["x"], g["t"], g["c"]), g["out"])
    halves = lambda a: torch.stack([a[:3], a[3:]])          # in this array the two halves have different t
    eps, v = head.predict(g["x"][:3], head.net.time_embed(halves(g["t"])),
                          head.net.cond_embed(halves(g["c"])), g["cfg_scale"].item())
    close(torch.cat([eps, v], -1), g["out_cfg"][:3])


def test_diffusion_loss_reproduces_every_term_and_gradient():
    head, g = official_diffusion_head(), golden("mar/diffusion_loss")
    row = head.table[g["t"]].unsqueeze(-2).unbind(-1)
    close(row[0] * g["x_start"] + row[1] * g["noise"], g["x_t"])
    close(row[4] * g["x_start"] + row[5] * g["x_t"], g["true_mean"])
    close(row[7].expand(-1, 4), g["true_log_variance"])
    mean, log_var, x0 = head.reverse(g["x_t"], *g["model_out"].chunk(2, -1), row)
    for ours, name in ((mean, "p_mean"), (log_var, "p_log_variance"), (x0, "pred_xstart")):
        close(ours, g[name])
    mse, vb = head.terms(g["x_start"], g["c"], g["t"], g["noise"])
    close(mse, g["mse"])
    assert torch.allclose(vb, g["vb"], rtol=1e-4,
                          atol=1e-6), "each row: one of them is 700 bits and hides the others"
    total = ((mse + vb) * g["mask"]).sum() / g["mask"].sum()
    close(total, g["loss_masked_mean"])
    total.backward()
    parameters, names = dict(head.net.named_parameters()), [k[5:] for k in g if k.startswith("grad/")]
    assert len(names) == 5
    for name in names:
        close(parameters[name].grad, g[f"grad/{name}"])


@pytest.mark.parametrize("tag, steps, spacing", [("train", 1000, "strided"), ("ddim50", 50, "strided"),
                                                 ("ddim25", 25, "strided"), ("s100", 100, "official"),
                                                 ("s25", 25, "official"), ("s10", 10, "official")])
def test_diffusion_schedule_equals_the_authors(tag, steps, spacing):
    g = {k.split("/")[1]: v for k, v in golden("mar/schedules").items() if k.startswith(tag + "/")}
    t = torch.arange(1000) if tag == "train" else diffusion_head.timesteps(steps, spacing)
    assert torch.equal(t, g["timestep_map"])
    assert max(diffusion_head.timesteps(n)[-1]
               for n in (51, 100, 500, 981)) == 980 and len(diffusion_head.timesteps(981).unique()) == 981
    a, s, a_before, s_before, k0, kx, log_beta, log_tilde = diffusion_head.schedule(t).double().unbind(1)
    for ours, reference in ((a, g["sqrt_alphas_cumprod"]), (s, g["sqrt_one_minus_alphas_cumprod"]),
                            (1 / a, g["sqrt_recip_alphas_cumprod"]),
                            (s / a, g["sqrt_recipm1_alphas_cumprod"]), (a_before,
                                                                        g["alphas_cumprod_prev"].sqrt()),
                            (s_before, (1 - g["alphas_cumprod_prev"]).sqrt()),
                            (k0, g["posterior_mean_coef1"]), (kx, g["posterior_mean_coef2"]),
                            (log_beta.exp(), g["betas"]), (log_tilde, g["posterior_log_variance_clipped"])):
        assert torch.allclose(ours, reference, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("tag, steps, spacing", [("ddim25", 25, "strided"), ("s10", 10, "official")])
@pytest.mark.parametrize("name", ["traj", "traj_t09", "traj_cfg", "traj_ddim"])
def test_diffusion_sampling_follows_the_authors_trajectories(tag, steps, spacing, name):
    head, g, states = official_diffusion_head(), golden("mar/p_sample_loop"), []
    guided = name == "traj_cfg"
    noise = torch.cat([g["init_noise"][None], g[f"{tag}/step_noise{'_cfg' if guided else ''}"][:, :5]])
    h, h_uncond, cfg = (g["z_cfg"][:5], g["z_cfg"][5:], g["cfg_scale"].item()) if guided else (g["z"], None,
                                                                                               1.0)
    temperature = {"traj_t09": 0.9, "traj_cfg": g["temperature_cfg"].item()}.get(name, 1.0)
    x, log_p = head.sample(h, h_uncond, cfg, temperature, steps,
                           "ddim" if name == "traj_ddim" else "ancestral", spacing, noise=noise,
                           on_step=lambda i, x: states.append(x))
    assert log_p is None and torch.equal(x, states[-1])
    # the authors' other half is carried along and thrown away
    close(torch.stack(states), g[f"{tag}/{name}"][:, :5])


@pytest.mark.parametrize("width, depth, count", [(256, 3, 1.53), (512, 3, 5.41), (1024, 3, 20.26),
                                                 (1536, 3, 44.55)])
def test_diffusion_head_has_the_published_parameter_count(width, depth, count):
    with torch.device("meta"):
        head = diffusion_head.DiffusionHead(1024, 16, width, depth)
    assert round(sum(p.numel() for p in head.parameters()) / 1e6, 2) == count
    assert all(k.startswith("net.") for k in head.state_dict()), "the schedule is no part of a checkpoint"


def test_a_new_diffusion_head_predicts_zero_and_its_mse_is_one():
    head, h, x = diffusion_head.DiffusionHead(8, 16, 32), torch.randn(500, 8), torch.randn(500, 16)
    t, noise = torch.randint(1000, (500,)), torch.randn(500, 16)
    mse, vb = head.terms(x, h, t, noise)
    assert not head.net(x, t, h).any() and torch.allclose(mse, noise.pow(2).mean(-1))
    _, vb = head.terms(x, h, torch.full((500,), 999), noise)
    assert 600 < vb.mean() < 850, "papers/mar.md section 0: about 718 bits at t = 999"


@pytest.mark.parametrize("objective", ["diffusion", "flow"])
def test_batch_mul_averages_independent_draws_of_any_leading_shape(objective):
    head = diffusion_head.DiffusionHead(8, 4, 32, 2, objective, batch_mul=3)
    for p in head.parameters():
        nn.init.normal_(p, std=0.1)
    h, x = torch.randn(2, 5, 8), torch.randn(2, 5, 4)
    torch.manual_seed(1)
    loss = head.loss(h, x)
    torch.manual_seed(1)
    noise = torch.randn(3, 2, 5, 4)
    t = torch.randint(1000, (3, 2, 5)) if objective == "diffusion" else torch.randn(3, 2, 5).sigmoid()
    # as the authors do: token j, then j again after all others
    tile = lambda a: a.repeat(3, 1, 1).view(30, -1)
    rows = sum(head.terms(tile(x), tile(h), t.view(30), noise.view(30, 4)))
    assert loss.shape == (2, 5) and torch.allclose(loss, rows.view(3, 2, 5).mean(0), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        assert torch.equal(head.loss(h, x),
                           loss), "the head computes in float32, whatever the transformer does"


def exact_head(objective, mu, sigma):
    """A head whose network is the best possible one for tokens ~ Normal(mu, sigma^2): known in closed
    form.
    """
    head = diffusion_head.DiffusionHead(8, 2, 16, 1, objective)
    head.net.time_embed = nn.Identity()                     # hand t itself to predict
    def predict(x, t, c, cfg):
        if objective == "flow":
            u = t / 1000                                    # x_u = (1 - u) x0 + u eps
            gain = (u - (1 - u) * sigma ** 2) / ((1 - u) ** 2 * sigma ** 2 + u ** 2)
            return -mu + gain * (x - (1 - u) * mu), x[..., :0]
        a, s = head.table[t.long(), :2].unbind()
        eps = s * (x - a * mu) / (a ** 2 * sigma ** 2 + s ** 2)
        return eps, torch.full_like(eps, -1.0)
    head.predict = predict
    return head


@pytest.mark.parametrize("objective, sampler, steps, off", [("diffusion", "ancestral", 250, 0.02),
                                                            ("diffusion", "ddim", 250, 0.02),
                                                            ("flow", "euler", 100, 0.05),
                                                            ("flow", "heun", 100, 0.005)])
def test_samplers_turn_an_exact_network_into_the_exact_distribution(objective, sampler, steps, off):
    mu, sigma = torch.tensor([0.5, -1.0]), 0.3
    x, _ = exact_head(objective, mu, sigma).sample(torch.zeros(20_000, 8), diffusion_steps=steps,
                                                   sampler=sampler)
    error = 4 * sigma / 20_000 ** 0.5
    assert (x.mean(0) - mu).abs().max() < error + 0.005 and (x.std(0) / sigma - 1).abs().max() < off + 0.02
    if sampler in ("ddim", "euler", "heun"):            # deterministic: the same start ends in the same place
        start = torch.randn(1, 7, 2)
        ends = [
            exact_head(objective, mu, sigma).sample(torch.zeros(7, 8), sampler=sampler, noise=start)[0]
            for _ in range(2)
        ]
        assert torch.equal(*ends)


def test_heun_is_of_second_order_and_euler_of_first():
    head, start = exact_head("flow", torch.tensor([0.5, -1.0]), 0.3), torch.randn(1, 50, 2)
    end = lambda sampler, n: head.sample(torch.zeros(50, 8), sampler=sampler, diffusion_steps=n, noise=start)[
        0]
    exact = torch.tensor([0.5, -1.0]) + 0.3 * start[0]      # the path of a Gaussian keeps its quantile
    order = lambda sampler: ((end(sampler, 20) - exact).norm() / (end(sampler, 40) - exact).norm()).log2()
    assert abs(order("euler") - 1) < 0.3 and abs(order("heun") - 2) < 0.4


def test_a_barely_trained_diffusion_head_does_not_explode_unless_asked_to():
    table, head = diffusion_head.fit_diffusion("diffusion", 60, "cpu", width=32)
    label = torch.arange(400) % 4
    spread = diffusion_head.toy_tokens(label).std()
    std = lambda spacing, steps: head.sample(table(label), spacing=spacing, diffusion_steps=steps)[0].std(
    ) / spread
    assert max(std("official", n) for n in (10, 25, 100)) > 20
    for n in (2, 10, 25, 64, 100, 250):
        assert 0.4 < std("strided", n) < 4, f"{n} steps: std {std('strided', n):.2f} of the data's"


def test_diffusion_guidance_mixes_predictions_and_is_off_at_one():
    head = official_diffusion_head()
    h, u, noise = torch.randn(3, 4, 32), torch.randn(3, 4, 32), torch.randn(11, 3, 4, 4)
    draw = lambda *a, **k: head.sample(*a, diffusion_steps=10, noise=noise, **k)[0]
    assert torch.equal(draw(h, u, 1.0), draw(h)) and torch.allclose(draw(h, u, 0.0, sampler="ddim"),
                                                                    draw(u, sampler="ddim"), atol=1e-4)
    assert torch.allclose(draw(h, h, 3.0), draw(h),
                          atol=1e-4) and not torch.allclose(draw(h, u, 3.0), draw(h), atol=1e-2)


def test_diffusion_head_refuses_in_a_sentence():
    head, h = diffusion_head.DiffusionHead(8, 2, 16, 1), torch.randn(3, 8)
    for options, sentence in ((dict(sampler="heun"), "does not fit objective"),
                              (dict(spacing="cosine"), "neither"), (dict(diffusion_steps=982), "1 to 981")):
        with pytest.raises(ValueError, match=sentence):
            head.sample(h, **options)
    with pytest.raises(ValueError, match="is not diffusion | flow"):
        diffusion_head.DiffusionHead(8, 2, objective="score")


def test_diffusion_loss_and_network_compile_without_a_break():
    head, h, x = official_diffusion_head(), torch.randn(6, 32), torch.randn(6, 4)
    t, noise = torch.randint(1000, (6,)), torch.randn(6, 4)
    compiled = torch.compile(lambda *a: torch.stack(head.terms(*a)), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x, h, t, noise), torch.stack(head.terms(x, h, t, noise)), atol=1e-5)
