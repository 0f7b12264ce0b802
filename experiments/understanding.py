"""
Do tokens hold what happens in a clip? MAGVIT-v2's two questions (its section 4.4), on drawn clips with ten
actions.

Tokens as the INPUT: the same small transformer learns the action from 3 x 4 x 4 places, each given as
    pixels        the 4 x 4 x 4 pixel values themselves (the first frame four times over)
    LFQ, VQ ids   the token's number, through an embedding table of 1024 rows learned from nothing
    LFQ, VQ codes its vector, the signs or the codebook's row, through a linear layer
Tokens as the TARGET: the transformer of pixels first learns to name what is hidden, 60% of the places,
without labels, as pixel values (squared error), as VQ ids or as LFQ ids (cross-entropy), and then the action
from few labels; "from scratch" gets the same labels, steps and learning rate, without the first part.

Both tokenizers are lfq.py's causal 3-D CNN, trained for as many steps; one has vq.py's quantizer (running
means) in it.

    python experiments/understanding.py                   # about 16 minutes of processor time, one core
    python experiments/understanding.py --n 120 --tok_steps 5 --steps 5 --pre_steps 5 --labels 50 --seeds 0
    --out /tmp/x

A seed is that of the classifier's weights and of the choice of labels; tokenizers and pre-training are made
once. Writes results/understanding.json and .png. What is already in --runs is not made again.
"""
import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import lfq
import vq
from common import age, metrics
from experiments.video_designs import BITS, SIZE, clip_set, fit, patches
from maskgit import EncoderBlock
from perceptual_gan import as_frames

PAPER = {  # accuracy on SSv2, %, as this project's notes have it
    "input": {"pixels": "63.1", "LFQ ids": "62.4", "VQ ids": "41.3 (3-D VQ-VAE), 57.3 (MAGVIT)"},
    "target": {"pixel values": "64.8", "LFQ ids": "67.4", "VQ ids": "64.1 (3-D VQ-VAE), 67.2 (MAGVIT)"}}
HIDDEN, LR = 0.6, 1e-3


class VQClips(lfq.LFQ):
    """lfq.LFQ with vq.py's quantizer: a learned codebook of as many codes, with as many numbers."""

    def __init__(self, **options):
        super().__init__(**options)
        self.quantizer = vq.VectorQuantizer(1 << self.bits, self.bits, ema=0.99)

    @torch.no_grad()
    def encode(self, images):
        return self.quantizer.nearest(self.latents(images))

    @torch.no_grad()
    def decode(self, tokens):
        return self.decode_raw(self.quantizer.codes(tokens)).clamp(-1, 1)


def places(clips):
    """Clips (B, 3, F, H, W) -> what a token sees of them, (B, T, 192): the blocks of 4 x 4 x 4 pixels."""
    return patches(torch.cat([clips[:, :, :1].repeat(1, 1, 3, 1, 1), clips], dim=2), 4).flatten(1, 3)


class Reader(nn.Module):
    """A transformer over the T places of a clip: (B, T, ...) --embed--> (B, T, C), to actions or to what is
    hidden.
    """

    def __init__(self, embed, T, width=64, n=2):
        super().__init__()
        self.embed, self.place = embed, nn.Parameter(torch.randn(T, width) * 0.02)
        self.hidden_value = nn.Parameter(torch.randn(width) * 0.02)
        self.blocks = nn.Sequential(*[EncoderBlock(width, 4) for _ in range(n)], nn.LayerNorm(width))
        self.action = nn.Linear(width, len(data.ACTIONS))

    def states(self, x, hide=None):                         # hide (B, T): True where the place is not shown
        h = self.embed(x)
        h = h if hide is None else torch.where(hide[..., None], self.hidden_value, h)
        return self.blocks(h + self.place)

    def forward(self, x):                                   # -> logits (B, 10)
        return self.action(self.states(x).mean(1))


def learn(parameters, loss_of, n, steps, batch_size, seed):
    """AdamW with warm-up and linear decay on loss_of(index), index (B,) of n things."""
    opt = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(steps):
        opt.param_groups[0]["lr"] = LR * min(1, (step + 1) / 30) * (1 - step / steps)
        loss = loss_of(data.order(n, batch_size, step, seed))
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        opt.step()
    return loss.item()


def classify(reader, train, val, steps, seed, labels=None):
    """Train on `labels` of the pairs (inputs, actions), all unless told -> accuracy on the held-out pair."""
    x, y = train
    some = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:labels]
    x, y = x[some], y[some]
    learn(list(reader.parameters()), lambda i: F.cross_entropy(reader(x[i]), y[i]), len(y), steps, 32, seed)
    with torch.no_grad():
        seen = torch.cat([reader.eval()(part).argmax(-1) for part in val[0].split(250)])
    return (seen == val[1]).float().mean().item()


def pretrain(reader, x, target, steps):
    """Teach a reader to name what is hidden: x (N, T, 192); target the same, or ids (N, T) -> the last
    loss.
    """
    ids, (N, T) = target.dtype == torch.long, x.shape[:2]
    head = nn.Linear(reader.place.shape[-1], 1 << BITS if ids else x.shape[-1])
    n = round(HIDDEN * T)

    def loss_of(i):
        hide = torch.rand(len(i), T).argsort(1).argsort(1) < n                         # n places of each clip
        out, truth = head(reader.states(x[i], hide)[hide]), target[i][hide]
        return F.cross_entropy(out, truth) if ids else F.mse_loss(out, truth)
    return learn([*reader.parameters(), *head.parameters()], loss_of, N, steps, 32, 0)


# ---------------------------------------------------------------------------------------------------
# The program: results are kept by name as they come, for a killed program to go on

def keep(path, make):
    """torch.load(path, weights_only=True), made first by make() where it is missing."""
    if not path.exists():
        start = time.process_time()
        value = make()
        torch.save(value, path)
        text = f"{value:.4f}" if isinstance(value, float) else "made"
        print(f"{path.stem}: {text}, {time.process_time() - start:.0f} s of processor time", flush=True)
    return torch.load(path, weights_only=True)


def make_tokens(kind, sets, held_out, steps, seed=0):
    """Train one tokenizer -> ids of all clips, the vectors that they stand for, and what it is worth."""
    torch.manual_seed(seed)
    model = (lfq.LFQ if kind == "LFQ" else VQClips)(**SIZE)
    fit(model, sets[0], steps, 8, seed)
    model.eval()
    ids = [torch.cat([model.encode(s.batch(i)[0]) for i in torch.arange(len(s)).split(50)]) for s in sets]
    recon = torch.cat([model.decode(part) for part in ids[1].split(50)])
    all_ids = torch.arange(1 << BITS)
    vectors = lfq.codes(all_ids, BITS) if kind == "LFQ" else model.quantizer.codes(all_ids)
    return dict(train=ids[0], val=ids[1], vectors=vectors, used=len(ids[0].unique()) / (1 << BITS),
                psnr=metrics.psnr(as_frames(recon), as_frames(held_out)).mean().item())


def as_inputs(clips, tokens):
    """The five ways to show clips: name -> ((train, val) inputs, a maker of the layer that takes them in)."""
    inputs = {"pixels": (clips, lambda: nn.Linear(clips[0].shape[-1], 64))}
    for kind, t in tokens.items():
        ids = t["train"], t["val"]
        inputs[f"{kind} ids"] = ids, lambda: nn.Embedding(1 << BITS, 64)
        inputs[f"{kind} codes"] = tuple(F.embedding(i, t["vectors"])
                                        for i in ids), lambda: nn.Linear(BITS, 64)
    return inputs


def experiment(args):
    """-> accuracies {"input": {name: [per seed]}, "target": {name: {labels: [per seed]}}}, facts of the
    tokenizers.
    """
    sets = clip_set(args.n), clip_set(args.n // 3, "val")
    clips, actions = zip(*(s.batch(torch.arange(len(s))) for s in sets))
    x, T = [places(c) for c in clips], places(clips[0][:1]).shape[1]
    tag = f"{args.n}-{args.tok_steps}"
    tokens = {
        kind: keep(args.runs / f"tokens-{kind}-{tag}.pt",
                   lambda: make_tokens(kind, sets, clips[1], args.tok_steps))
        for kind in ("LFQ", "VQ")
    }
    facts = {kind: dict(psnr=t["psnr"], used=t["used"]) for kind, t in tokens.items()}
    out = {"input": {}, "target": {}}
    inputs = as_inputs(x, tokens)

    def accuracy(name, make, data_, steps, seed, labels=None):
        def run():
            torch.manual_seed(seed)
            return classify(make(), (data_[0], actions[0]), (data_[1], actions[1]), steps, seed, labels)
        return keep(args.runs / f"{name.replace(' ', '-')}-{labels or 'all'}-{seed}-{tag}-{steps}.pt", run)

    for seed in args.seeds:
        for name, (inp, layer) in inputs.items():
            value = accuracy(f"input {name}", lambda: Reader(layer(), T), inp, args.steps, seed)
            out["input"].setdefault(name, []).append(value)
    targets = {"pixel values": x[0], "VQ ids": tokens["VQ"]["train"], "LFQ ids": tokens["LFQ"]["train"]}
    fresh = lambda: Reader(nn.Linear(x[0].shape[-1], 64), T)
    states = {"from scratch": None}
    for name, target in targets.items():
        def make():
            torch.manual_seed(0)
            reader = fresh()
            loss = pretrain(reader, x[0], target, args.pre_steps)
            return dict(reader=reader.state_dict(), loss=loss)

        states[name] = keep(args.runs / f"pretrained-{name.replace(' ', '-')}-{tag}-{args.pre_steps}.pt",
                            make)

    def start(state):
        reader = fresh()
        if state:                                           # all but the layer of actions, which stays new
            known = {k: v for k, v in state["reader"].items() if not k.startswith("action.")}
            reader.load_state_dict(reader.state_dict() | known)
        return reader
    for seed in args.seeds:
        for name, state in states.items():
            for n in args.labels:
                value = accuracy(f"target {name} {args.pre_steps}", lambda: start(state), x, args.steps // 2,
                                 seed, n)
                out["target"].setdefault(name, {}).setdefault(n, []).append(value)
    facts["loss"] = {name: s["loss"] for name, s in states.items() if s}
    return out, facts


def table(result, labels):
    cell = lambda v: f"{100 * mean(v):.1f}" + (f" ({100 * min(v):.1f} .. {100 * max(v):.1f})"
                                               if len(v) > 1 else "")
    lines = ["| what the transformer reads | accuracy, % | paper, SSv2 |", "|---|---|---|"]
    lines += [
        f"| {name} | {cell(v)} | {PAPER['input'].get(name, '')} |" for name, v in result["input"].items()
    ]
    budgets = " | ".join(f"{n} labels, %" for n in labels)
    lines += [
        "", f"| what it named before, without labels | {budgets} | paper, SSv2 |",
        "|---" * (len(labels) + 2) + "|"
    ]
    for name, by in result["target"].items():
        lines.append(f"| {name} | " + " | ".join(cell(by[n])
                                                 for n in labels) + f" | {PAPER['target'].get(name, '')} |")
    return "\n".join(lines)


def save_figure(path, result, labels):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(11.5, 3.9), width_ratios=[1, 1.15])
    colours = {"pixels": "C7", "LFQ ids": "C0", "LFQ codes": "C0", "VQ ids": "C1", "VQ codes": "C1"}
    for y, (name, v) in enumerate(result["input"].items()):
        left.barh(y, 100 * mean(v), 0.7, color=colours[name], alpha=0.4 if name.endswith("codes") else 0.75)
        left.plot([100 * a for a in v], [y] * len(v), "k.", ms=5)
    left.set(title="tokens as the input, all labels", xlabel="action accuracy on held-out clips, %",
             xlim=(0, 100), yticks=range(len(result["input"])), yticklabels=result["input"])
    left.axvline(10, color="k", ls=":", lw=1)
    left.invert_yaxis()
    k, width = len(result["target"]), 0.8 / len(result["target"])
    for j, (name, by) in enumerate(result["target"].items()):
        at = [i + (j - (k - 1) / 2) * width for i in range(len(labels))]
        right.bar(at, [100 * mean(by[n]) for n in labels], width * 0.92, alpha=0.75,
                  color={"from scratch": "0.75", "pixel values": "C7"}.get(name, colours.get(name)),
                  label=name if name == "from scratch" else f"after naming hidden {name}")
        for a, n in zip(at, labels):
            right.plot([a] * len(by[n]), [100 * v for v in by[n]], "k.", ms=5)
    right.set(title="tokens as the target of pre-training; the input is pixels", ylabel="action accuracy, %",
              ylim=(0, 100), xticks=range(len(labels)), xticklabels=[f"{n} labelled clips" for n in labels])
    right.axhline(10, color="k", ls=":", lw=1)
    right.legend(fontsize=8, loc="lower center", framealpha=0.95)
    for ax, axis in ((left, "x"), (right, "y")):
        ax.grid(axis=axis, alpha=0.3)
    n = len(next(iter(result["input"].values())))
    fig.suptitle(f"which of ten actions? dots: {n} seed{'s' * (n > 1)}, dotted: chance")
    fig.tight_layout()
    fig.savefig(path, dpi=80)
    plt.close(fig)


def main(argv=None):
    p = argparse.ArgumentParser(
        description="Action recognition: tokens as the input, and as the target of pre-training.")
    p.add_argument("--n", type=int, default=3000, help="training clips; a third as many are held out")
    p.add_argument("--tok_steps", type=int, default=400, help="training steps of both tokenizers")
    p.add_argument("--steps", type=int, default=1200,
                   help="training steps of the classifiers; half as many with few labels")
    p.add_argument("--pre_steps", type=int, default=1500, help="training steps of each pre-training")
    p.add_argument("--labels", type=int, nargs="+", default=[200, 1000],
                   help="how many labels the pre-trained ones get")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the classifiers")
    p.add_argument("--runs", default=ROOT / "runs" / "understanding", type=Path,
                   help="where intermediate results lie")
    p.add_argument("--out", default=Path(__file__).parent / "results", type=Path,
                   help="folder of the JSON and the PNG")
    args = p.parse_args(argv)
    args.runs.mkdir(parents=True, exist_ok=True), args.out.mkdir(parents=True, exist_ok=True)
    result, facts = experiment(args)
    out = args.out / "understanding"
    facts = age.of_run() | dict(clips=args.n, held_out=args.n // 3, tok_steps=args.tok_steps,
                                steps=args.steps, pre_steps=args.pre_steps, lr=LR, hidden=HIDDEN,
                                seeds=args.seeds, tokenizers=facts, accuracy=result)
    out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    save_figure(out.with_suffix(".png"), result, args.labels)
    print(f"tokenizers: {facts['tokenizers']}\n" + table(result, args.labels))
    print(f"wrote {out}.json and .png")


if __name__ == "__main__":
    main()
