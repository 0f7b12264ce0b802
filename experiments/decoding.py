"""
How fast does the causal transformer write ids, against the way LlamaGen's published code decodes?

    python experiments/decoding.py           # table, JSON in experiments/results; 2 minutes on one CPU core
    python experiments/decoding.py --quick   # 64 tokens, 2 rounds, no JSON: does it run? 10 seconds

Both have the same weights, a KV cache, and guidance with both halves in one batch; greedy tokens are first
checked to be equal. The published way, rebuilt here from a description of it, pays three times per layer and
token: repeat_interleave(1) copies the whole cache, and plain ("math") attention runs over its full padded
length under a boolean mask. Ours looks only at the filled part of the cache (CPU), or runs as one CUDA graph
(compile=True). All take turns in one process; medians, on a CPU of processor time with one thread, because
the machine may be shared. On CUDA: GPT-L and GPT-XL in bf16; at batch 1 a token costs one read of all
weights, so its GB/s are compared with those that a large copy reads and writes.
"""
import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ar_transformer
from common import age

CFG = 2.0


def rotate_published(x, table):                     # (B, S, n_head, head_dim), (S, head_dim / 2, 2) -> like x
    y, table = x.float().reshape(*x.shape[:-1], -1, 2), table.view(1, x.shape[1], 1, -1, 2)
    y = torch.stack([y[..., 0] * table[..., 0] - y[..., 1] * table[..., 1],
                     y[..., 1] * table[..., 0] + y[..., 0] * table[..., 1]], -1)
    return y.flatten(3).type_as(x)


def pass_published(model, x, caches, mask, at):
    """Rows x (B, S, C) at places at (S,) -> h of the last (B, C)."""
    B, S, C = x.shape
    table, mask = model.rope[at], mask[:B, None, at]        # (B, 1, S, padded)
    for block, (keys, values) in zip(model.blocks, caches):
        q, k, v = block.attn.wqkv(block.norm1(x)).split(C, -1)
        q, k, v = (y.view(B, S, model.n_head, -1) for y in (q, k, v))
        q, k = rotate_published(q, table), rotate_published(k, table)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        keys[:, :, at], values[:, :, at] = k, v
        k, v = keys.repeat_interleave(1, 1), values.repeat_interleave(1, 1)  # n_head / n_kv_head is 1: a copy
        y = F.scaled_dot_product_attention(q, k, v, mask)
        x = x + block.attn.wo(y.transpose(1, 2).contiguous().view(B, S, C))
        x = x + block.mlp(block.norm2(x))
    return model.norm(x)[:, -1]


@torch.no_grad()
def sample_published(model, cond, top_k=0):
    """cond (B,) -> ids (B, T), with guidance."""
    P, T = model.n_prefix, model.seq_len
    padded = -(-(P + T) // 8) * 8
    x = torch.cat([model.prefix(cond), model.prefix(torch.full_like(cond, model.num_classes))])
    shape = len(x), model.n_head, padded, x.shape[-1] // model.n_head
    caches = [[x.new_zeros(shape) for _ in range(2)] for _ in model.blocks]
    mask = torch.ones(padded, padded, dtype=torch.bool, device=x.device).tril().repeat(len(x), 1, 1)
    tokens, at = [], torch.arange(P, device=x.device)
    for t in range(T):
        with sdpa_kernel(SDPBackend.MATH):
            h, h_uncond = pass_published(model, x, caches, mask, at).chunk(2)
        new, _ = model.head.sample(h, h_uncond, CFG, top_k=top_k)
        tokens.append(new)
        x, at = model.embed(torch.cat([new, new])[:, None]), torch.tensor([P + t], device=x.device)
    return torch.stack(tokens, 1)


def seconds(f, device):
    if device.type == "cpu":
        start = time.process_time()
        f()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(name, model, batches, rounds, device):
    """-> one row per batch size and way: tokens (of images, both halves of guidance count once) per
    second.
    """
    ways = {"published": partial(sample_published, model), "ours": partial(model.sample, cfg=CFG)}
    if device.type == "cuda":
        ways["one graph"] = partial(model.sample, cfg=CFG, compile=True)
    rows = []
    for B in batches:
        cond = torch.arange(B, device=device) % model.num_classes
        first = {way: f(cond, top_k=1) for way, f in ways.items()}                # warms up and compiles, too
        same = {way: (x == first["published"]).float().mean().item() for way, x in first.items()}
        times = {way: [] for way in ways}
        for _ in range(rounds):
            for way, f in ways.items():
                times[way].append(seconds(lambda: f(cond), device))
        for way, t in times.items():
            row = dict(model=name, batch=B, way=way, tokens_per_s=B * model.seq_len / median(t),
                       seconds=median(t), fastest=min(t), speedup=median(times["published"]) / median(t),
                       same_greedy_tokens=same[way])
            print(f"{name:10s} batch {B:2d}  {way:10s} {row['tokens_per_s']:8.0f} tokens/s  "
                  f"{row['seconds']:6.2f} s  {row['speedup']:5.2f} x   same greedy tokens: {same[way]:.1%}",
                  flush=True)
            rows.append(row)
    return rows


def bandwidth(name, model, rounds, device):
    """Batch 1 without guidance: bytes of the weights read per second, against a copy's bytes read and
    written.
    """
    source = torch.empty(2 ** 30, dtype=torch.uint8, device=device)
    target, cond = torch.empty_like(source), torch.zeros(1, dtype=torch.long, device=device)
    tables = (model.tok_embed.weight, model.cls_embed.weight)                            # looked up, not read
    size = sum(p.numel() * p.element_size() for p in model.parameters() if all(p is not q for q in tables))
    draw, copy = (lambda: model.sample(cond, compile=True)), (
        lambda: [target.copy_(source) for _ in range(10)])
    draw(), draw(), copy()
    times = [(seconds(draw, device), seconds(copy, device)) for _ in range(rounds)]
    ours, copied = (median(t) for t in zip(*times))
    row = dict(model=name, tokens_per_s=model.seq_len / ours, gb_per_s=size * model.seq_len / ours / 1e9,
               copy_gb_per_s=20 * source.numel() / copied / 1e9)
    share = row["gb_per_s"] / row["copy_gb_per_s"]
    print(f"{name:10s} batch  1, no guidance: {row['tokens_per_s']:.0f} tokens/s, {row['gb_per_s']:.0f} GB/s "
          f"of weights, a copy {row['copy_gb_per_s']:.0f} GB/s: {share:.0%}", flush=True)
    return row


def build(device, side=16, classes=1000, V=16384, **size):
    """A model with random weights like trained ones in kind: nothing is zero."""
    head = ar_transformer.CategoricalHead(size["n_embd"], V)
    torch.nn.init.normal_(head.proj.weight, std=0.05)
    model = ar_transformer.ARTransformer(head, side * side, classes, vocab_size=V, **size)
    model = model.to(device).eval()
    if device.type == "cuda":                               # the parameters alone: RoPE's angles would suffer
        for p in model.parameters():
            p.data = p.data.bfloat16()
    return model


def main():
    p = argparse.ArgumentParser(
        description="Tokens per second of our cached decoding against the published way.")
    p.add_argument("--quick", action="store_true", help="64 tokens, 2 rounds, no JSON")
    p.add_argument("--out", type=Path, help="JSON to write (default: in experiments/results)")
    p.add_argument("--rounds", type=int, default=5, help="turns of every way at every batch size")
    p.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="images at once")
    args = p.parse_args()
    device, rounds = torch.device(
        "cuda" if torch.cuda.is_available() else "cpu"), 2 if args.quick else args.rounds
    torch.manual_seed(0)
    if device.type == "cuda":
        names, reads, rows = ["gpt-b"] if args.quick else ["gpt-l", "gpt-xl"], [], []
        for name in names:
            model = build(device, **ar_transformer.SIZES[name])
            rows += compare(name, model, args.batches, rounds, device)
            reads.append(bandwidth(name, model, rounds, device))
    else:
        torch.set_num_threads(1)                            # small products: threads wait for each other
        model = build(device, 8 if args.quick else 16, 10, 1024, n_layer=6, n_head=8, n_embd=256,
                      multiple_of=256)
        rows, reads = compare("5.9M", model, args.batches, rounds, device), []
    if args.out or not args.quick:
        name = f"decoding{'-cuda' if device.type == 'cuda' else ''}.json"
        out = args.out or Path(__file__).parent / "results" / name
        out.parent.mkdir(exist_ok=True)
        facts = age.of_run(device) | dict(rounds=rounds, cfg=CFG)
        out.write_text(json.dumps(facts | dict(rows=rows, bandwidth=reads), indent=1) + "\n")
        print(f"wrote {out}")


if __name__ == "__main__":
    main()
