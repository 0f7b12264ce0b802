"""Tests of official/rar.py: the authors' logits, losses, gradients and greedy samples; published sizes."""
import pytest
import torch

import mar
from official import rar
from tests.helpers import close, golden


def rar_golden():
    g = golden("beyond/rar_tiny")
    sd = {name.removeprefix("w/"): v for name, v in g.items() if name.startswith("w/")}
    return g, sd, rar.load_generator(sd, seq_len=16)


def test_rar_logits_loss_and_gradients_are_the_authors():
    g, _, model = rar_golden()
    cond = g["in/condition"] - 33                           # their class ids come after 32 codes and one more
    order = g["in/orders"]
    ids = g["in/ids"].gather(1, order)
    assert torch.equal(ids, g["out/labels"])
    close(model.logits(ids, cond, order), g["out/logits"])
    raster = torch.arange(16).expand(3, -1)
    close(model.logits(g["in/ids"], cond, raster), g["out/logits_raster"])
    close(model.loss(g["in/ids"], cond, raster), g["out/loss_raster"], 1e-5)
    close(model.logits(g["in/partial_ids_in_order"], cond, order), g["out/logits_partial"])
    loss = model.loss(g["in/ids"], cond, order)
    close(loss, g["out/loss"], 1e-5)
    loss.backward()
    found = [name for name in g if name.startswith("grad/")]
    assert len(found) == 8
    for name in found:
        close(model.get_parameter(name.removeprefix("grad/")).grad, g[name], 1e-4)


@pytest.mark.parametrize("name, cfg, power", [("nocfg", 0, 0), ("cfg4_pow0", 4.0, 0),
                                              ("cfg16_pow2.75", 16.0, 2.75)])
def test_rar_greedy_samples_are_the_authors(name, cfg, power):
    g, _, model = rar_golden()
    seen = []
    ids = model.sample(g["in/generate_class"], cfg, power, temperature=0,
                       on_logits=lambda t, z: seen.append(z))
    assert torch.equal(ids, g[f"out/{name}_tokens"])
    close(torch.stack(seen, 1), g[f"out/{name}_logits"])


def test_rar_guidance_grows_as_released():
    g = golden("beyond/rar_schedule")
    model = rar.RAR(256, 3, 4, n_layer=0, n_head=1, n_embd=4, n_mlp=4)
    torch.nn.init.normal_(model.embeddings.weight)
    seen = []
    head = model.head
    model.head = lambda x, c: (seen.append(head(x, c)), seen[-1])[1]
    guided = []
    model.sample(torch.tensor([1]), 16.0, 2.75, on_logits=lambda t, z: guided.append(z))
    for t in (0, 50, 128, 255):
        with_class, without = seen[t].chunk(2)
        scale = (guided[t] - without) / (with_class - without)
        assert scale.median().item() == pytest.approx(g["cfg_scale_B"][t].item(), rel=1e-3)


@pytest.mark.parametrize("n_layer, n_embd, n_mlp, count", [
    (24, 768, 3072, 260_923_648), (24, 1024, 4096, 461_668_352), (32, 1280, 5120, 955_425_024),
    (40, 1408, 6144, 1_498_520_704)])
def test_rar_of_the_paper_has_its_parameter_count(n_layer, n_embd, n_mlp, count):
    with torch.device("meta"):
        model = rar.RAR(n_layer=n_layer, n_embd=n_embd, n_mlp=n_mlp)
    assert sum(p.numel() for p in model.parameters()) == count


def test_rar_refuses_missing_and_unknown_keys_by_name():
    _, sd, _ = rar_golden()
    with pytest.raises(ValueError, match="missing .'pos_embed'"):
        rar.load_generator({name: v for name, v in sd.items() if name != "pos_embed"}, 16)
    with pytest.raises(ValueError, match="extra"):
        rar.load_generator(sd | {"extra": torch.zeros(1)}, 16)


def test_annealed_orders_are_those_that_rar_reads():
    """Both models read the same order: a token later in it changes no logits of an earlier place."""
    _, _, model = rar_golden()
    order = mar.annealed_order(1, 16, "cpu", torch.tensor(1.0))
    tokens = torch.randint(32, (1, 16))
    other = tokens.clone()
    other[0, order[0, 9]] = (other[0, order[0, 9]] + 1) % 32
    cond = torch.tensor([2])
    moved = (model.logits(tokens.gather(1, order), cond, order)
             - model.logits(other.gather(1, order), cond, order)).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [False] * 10 + [True] * 7
