"""Tests of flow_adapter."""
import pytest
import torch
import torch.nn as nn

import ar_transformer
import flow_adapter
import gmm_head
from tests.helpers import close, golden


def official_flow(name):
    """The adaptor of the authors' arrays in our layout -> FlowAdapter, arrays."""
    g = golden(f"givt/{name}")
    tokens, rows = g["x"].shape[1], {"adaptor_small": 4, "adaptor_rect": 4, "adaptor_width16": 4}[name]
    flow = flow_adapter.FlowAdapter(g["x"].shape[2], (rows, tokens // rows), int(g["num_blocks"]),
                                    int(g["num_channels_bottleneck"]) // 2)
    for i, block in enumerate(flow.blocks):
        for j in range(3):
            block.convs[j].weight.data = g[f"param/modules_{i}/Conv_{j}/kernel"].permute(3, 2, 0,
                                                                                         1).contiguous()
            if i or j:
                block.norms[j].weight.data = g[f"param/modules_{i}/gn_{j}/scale"]
                block.norms[j].bias.data = g[f"param/modules_{i}/gn_{j}/bias"]
    return flow, g


@pytest.mark.parametrize("name", ["adaptor_small", "adaptor_rect", "adaptor_width16"])
def test_flow_reproduces_the_authors_adaptor_and_preserves_volume(name):
    flow, g = official_flow(name)
    with torch.no_grad():
        close(flow(g["x"]), g["y"])
        close(flow.inverse(g["x"]), g["x_inverse_of_x"])
        assert torch.allclose(flow.inverse(flow(g["x"])), g["x"], atol=1e-4)
    x = g["x"][0].double().flatten()
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v.view(1, *g["x"].shape[1:])).flatten(),
                                                  x.float())
    sign, log_det = torch.linalg.slogdet(jacobian.double())
    assert sign == 1 and abs(log_det) < 1e-5


def test_flow_of_the_paper_has_its_parameter_count():
    count = lambda d, m: sum(p.numel() for p in flow_adapter.FlowAdapter(d, (16, 16), 8, m).parameters())
    assert count(16, 32) == 111_728 and count(32, 128) == 1_478_880


def test_adapted_is_a_generator_and_trains_both_parts():
    adapter = flow_adapter.FlowAdapter(4, (3, 4), 2)
    assert torch.equal(adapter(torch.ones(1, 12, 4)), torch.ones(1, 12, 4)), "a new flow changes nothing"
    for block in adapter.blocks:
        nn.init.normal_(block.convs[-1].weight, std=0.1)
    inner = ar_transformer.ARTransformer(gmm_head.GMMHead(32, 4, 3), 12, 5, token_dim=4, grid=(3, 4),
                                         n_layer=1, n_head=2, n_embd=32)
    model, x, cond = flow_adapter.Adapted(adapter, inner), torch.randn(2, 12, 4), torch.tensor([0, 3])
    model(x, cond)[0].backward()
    assert all(p.grad.abs().sum() > 0
               for p in [adapter.blocks[0].convs[0].weight, inner.blocks[0].attn.wqkv.weight])
    model.eval()
    assert torch.allclose(model(x, cond)[0], inner(adapter(x), cond)[0]) and model.seq_len == 12
    torch.manual_seed(1)
    drawn = model.sample(cond)
    torch.manual_seed(1)
    assert torch.allclose(adapter(drawn), inner.sample(cond), atol=1e-4)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, :4] = True
    assert torch.equal(model.sample(cond, known=x, known_mask=mask)[:, :4], x[:, :4])


def test_flow_is_computed_in_float32_under_autocast():
    """In bfloat16 the inverse would miss the tokens by a percent."""
    flow = flow_adapter.FlowAdapter(4, (2, 2), 3, 8)
    for p in flow.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(5, 4, 4)
    with torch.no_grad():
        there, back = flow(x), flow.inverse(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(flow(x), there) and torch.equal(flow.inverse(x), back)
            assert torch.equal(flow(x.bfloat16()), flow(x.bfloat16().float()))
