"""
Linear probes: how well can the class be read off the hidden states, when nobody tells it to the generator?

The generator of a run is given real images and "no class". Its hidden states after each block are averaged
over the positions, and a logistic regression reads the class off them. So do others, off the pixels and off
the tokens: what the generator adds is the difference (GIVT's table of representations has the same
measure).

    python -m recipes.probe runs/shapes-vae-ar-gmm          # probe.png, and more entries of metrics.json

Shapes:  N images, B in a batch, T tokens, C width of the generator, F numbers in a feature vector

    images (B, 3, H, W) --encode--> tokens (B, T[, D]) --blocks--> (B, T, C) --mean--> (B, C)
    --regression--> class
"""
import argparse
import os
import re

import torch
import torch.nn.functional as F

from common import age, drawing, metrics, runs
from data import BadInput

MOST = 5000                                               # images of each set: enough for a linear classifier


# ---- Features ------------------------------------------------------------------------------------

@torch.no_grad()
def layer_features(generator, tokens, cond, mask=None):
    """Mean-pooled hidden states: tokens (B, T[, D]), cond (B,) -> list of n_layer + 1 float32 tensors (B, C).

    [0] is what enters the first block, [i] what leaves block i. Hooks read them while hidden_states runs
    as it is (GIVT's own probe, predict_fn_rep, stops at an undefined name). mask (B, T): given on to a
    model that wants one, True where a token is masked. An autoregressive model never looks at the last
    token.
    """
    if hasattr(generator, "adapter"):
        tokens = generator.adapter(tokens)
        generator = generator.generator
    pooled = []

    def read(block, inputs, output):                        # both (B, S, C), the prefix among the S
        if not pooled:
            pooled.append(inputs[0].float().mean(1))
        pooled.append(output.float().mean(1))

    forward = generator.hidden_states if hasattr(generator, "hidden_states") else generator.hidden    # of MAR
    hooks = [block.register_forward_hook(read) for block in generator.blocks]
    try:
        if mask is None:
            forward(tokens, cond)
        else:
            forward(tokens, cond, mask)
    finally:
        for hook in hooks:
            hook.remove()
    return pooled


@torch.no_grad()
def representations(run, image_set, index, batch_size):
    """Images by index (N,) -> {name: features (N, F)}, labels (N,).

    The generator is given "no class", so no label leaks. In training it met labels as inputs, never as
    targets.
    """
    features = {}
    labels = []
    for i in index.split(batch_size):
        images, y = image_set.batch(i)
        parts = {"pixels": small(images).flatten(1)}
        if hasattr(run.tokenizer, "posterior"):             # a VAE: take its mean, for a sample adds noise
            tokens = run.tokenizer.normalise(run.tokenizer.posterior(images)[0].float())           # (B, T, D)
            parts["latents"] = tokens.flatten(1)
            parts["latents, averaged"] = tokens.mean(1)
        else:
            tokens = run.tokenizer.encode(images)
        if hasattr(run.tokenizer, "bits"):                  # lfq: the signs that the ids spell
            parts["token bits"] = run.tokenizer.quantizer.codes(tokens).flatten(1)
        mask = None
        if run.args.generator != "ar":                      # nothing is masked
            mask = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        no_class = torch.full_like(y, run.generator.num_classes)
        for k, h in enumerate(layer_features(run.generator, tokens, no_class, mask)):
            parts[f"layer {k}"] = h
        for name, x in parts.items():
            features.setdefault(name, []).append(x)
        labels.append(y)
    return {name: torch.cat(x) for name, x in features.items()}, torch.cat(labels)


def small(images):
    """Images of at most 32 x 32 pixels, 3072 numbers: enough. Of a clip, 16 x 16 of each frame."""
    if images.ndim == 5 and images.shape[-1] > 16:
        return F.adaptive_avg_pool3d(images, (images.shape[2], 16, 16))
    if images.ndim == 4 and images.shape[-1] > 32:
        return F.adaptive_avg_pool2d(images, 32)
    return images


# ---- The linear classifier -----------------------------------------------------------------------

def fit_linear(x, y, decay, num_classes):
    """Logistic regression by L-BFGS, penalty decay / 2 |W|^2: x (N, F), y (N,) -> W (F, classes), bias."""
    weight = x.new_zeros(x.shape[1], num_classes).requires_grad_()
    bias = x.new_zeros(num_classes).requires_grad_()
    opt = torch.optim.LBFGS([weight, bias], max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    return weight.detach(), bias.detach()


def probe_accuracy(x, y, val_x, val_y, decays=(1e-3, 1e-2, 1e-1)):
    """Accuracy in [0, 1] of a linear classifier of features: x (N, F), y (N,); the val ones only judge.

    Features are standardised first. The decay is the one that is best on a fifth of x, held out. Then all
    of x is fitted.
    """
    std, mean = torch.std_mean(x, 0)
    scale = torch.where(std > 1e-3 * std.max(), 1 / std, 0)                   # a constant pixel tells nothing
    x = (x - mean) * scale
    val_x = (val_x - mean) * scale
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0), device="cpu").to(x.device)
    held_out = order[:len(x) // 5]
    rest = order[len(x) // 5:]
    num_classes = int(max(y.max(), val_y.max())) + 1

    def accuracy(fit_x, fit_y, decay, judge_x, judge_y):
        weight, bias = fit_linear(fit_x, fit_y, decay, num_classes)
        return ((judge_x @ weight + bias).argmax(-1) == judge_y).float().mean().item()

    scores = [accuracy(x[rest], y[rest], decay, x[held_out], y[held_out]) for decay in decays]
    best = decays[scores.index(max(scores))]
    return accuracy(x, y, best, val_x, val_y)


# ---- The program ---------------------------------------------------------------------------------

def parse_args(argv=None):
    p = argparse.ArgumentParser(prog="python -m recipes.probe",
                                description="Linear probes of a generator's layers, of pixels and of tokens.")
    p.add_argument("run", help="a run folder of a generator of classes that train.py wrote")
    p.add_argument("--batch_size", type=int, default=250, help="images at a time")
    p.add_argument("--device", help="cpu, cuda, cuda:1 or mps (default: the best there is)")
    p.add_argument("--seed", type=int, default=0, help="seed of the choice of images")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    run = runs.load_run(args.run, runs.pick_device(args.device))
    train_set = runs.open_split(run.args, "train", run.device)
    val_set = runs.open_split(run.args, "val", run.device)
    refuse(args, run, val_set)
    rows = measure(args, run, train_set, val_set)
    metrics.print_rows(rows)
    metrics.save_rows(run.folder, rows, **age.now("probe_"))
    print(f"wrote {run.folder / 'probe.png'}")


def refuse(args, run, val_set):
    """BadInput in a sentence for a run that cannot be probed."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise BadInput("recipes.probe draws no samples that processes could share; run it without torchrun")
    if args.batch_size < 1:
        raise BadInput(f"--batch_size {args.batch_size}: at least 1")
    if run.generator is None:
        raise BadInput(f"{args.run}: a tokenizer without a generator, so it has no layers to probe")
    if drawing.kind_of(run) == "captions" or len(run.classes) == 1:
        raise BadInput(f"{args.run}: was never told a class that could be hidden from it")
    if not hasattr(run.generator, "blocks"):
        raise BadInput(f"{args.run}: has a generator without .blocks, whose layers cannot be read")
    if len(val_set) < 10:
        raise BadInput(f"{args.run}: its --data has {len(val_set)} validation images, at least 10 are needed")


def measure(args, run, train_set, val_set):
    """Probes of every layer, the pixels and the latents, on MOST images -> rows; writes RUN/probe.png."""
    torch.manual_seed(args.seed)
    index = torch.randperm(len(train_set), device="cpu")[:MOST]
    x, y = representations(run, train_set, index, args.batch_size)
    index = torch.randperm(len(val_set), device="cpu")[:MOST]
    val_x, val_y = representations(run, val_set, index, args.batch_size)
    result = {name: 100 * probe_accuracy(x[name], y, val_x[name], val_y) for name in x}
    title = f"{run.folder.name}: linear probes of {len(y)} training images"
    save_probe(run.folder / "probe.png", result, title, 100 * (val_y.bincount().max() / len(val_y)).item())
    return [("probe_" + re.sub(r"\W+", "_", name), f"linear probe, {name}", accuracy, "%",
             f"of {x[name].shape[1]} numbers") for name, accuracy in result.items()]


def save_probe(path, result, title, chance):
    """{name: accuracy in %} -> a PNG: the layers as a curve, everything else as a horizontal line."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    curve = [v for name, v in result.items() if name.startswith("layer ")]
    lines = {name: v for name, v in result.items() if not name.startswith("layer ")}
    lines["always the commonest class"] = chance
    fig, ax = plt.subplots(figsize=(7, 4.5))
    ax.plot(range(len(curve)), curve, "o-", lw=2, label="generator, hidden states averaged over positions")
    for k, (name, v) in enumerate(lines.items()):
        ax.axhline(v, color=f"C{k + 1}", ls="--", label=f"{name}: {v:.1f}%")
    for k, v in enumerate(curve):
        offset = (0, 7) if k else (18, 3)
        ax.annotate(f"{v:.1f}", (k, v), textcoords="offset points", xytext=offset, ha="center", fontsize=9)
    ax.set(xlabel="layer (0: what enters the first block)", ylabel="accuracy on validation images (%)",
           title=title, xticks=range(len(curve)), ylim=(0, 105))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2, fontsize=9, frameon=False)
    fig.tight_layout()
    fig.savefig(path, dpi=80)
    plt.close(fig)


if __name__ == "__main__":
    main()
