"""
Raster, random and annealed orders (RAR, arxiv.org/abs/2411.00776) in one causal transformer at equal budget.

  pictures   drawn shapes, 12 x 12 black and white pixels, as 36 ids of 2 x 2 pixels each (mar.py's demo)
  models     mar.CausalMAR, 4 layers of 64, the same steps, batches and learning rate, nothing tuned per arm
  measured   on pictures that were never seen, nats per picture read in raster order; Frechet distance (small
             CNN) of samples written in raster order. An arm "random, own order" writes in random orders
  verdict    RAR's claim, annealed better than raster and better than random, by the rule of claims.py

    python experiments/orders.py  # trains three seeds, writes orders.json and docs/pictures/orders.png

The defaults take three and a half minutes of processor time on one core of a shared AMD EPYC.
"""
import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import mar
from common import age, classifier
from common.metrics import frechet_distance
from experiments.claims import judge_claim, judge_test, test

ORDERS = ("raster", "random", "annealed")
ARMS = (*ORDERS, "random, own order")
SIDE, PATCH = 12, 2
WEIGHTS = 2 ** torch.arange(PATCH * PATCH)


def to_ids(masks):
    """Black and white pictures (N, 12, 12) bool -> ids (N, 36) of 16."""
    return (mar.patchify(masks.long()[:, None], PATCH) * WEIGHTS).sum(-1)


def to_images(ids):
    """The inverse, as images (N, 3, 12, 12) in {-1, 1}."""
    bits = (ids[..., None] // WEIGHTS % 2).float()
    return mar.unpatchify(bits, (SIDE // PATCH, SIDE // PATCH), PATCH).expand(-1, 3, -1, -1) * 2 - 1


def draw(start, n, seed):
    """-> ids (n, 36), labels (n,)."""
    _, labels, masks, _ = data.draw(torch.arange(start, start + n), SIDE, seed)
    return to_ids(masks > 0), labels


def as_set(ids, labels):
    return data.ImageSet(((to_images(ids) + 1) * 127.5).to(torch.uint8), labels, data.SHAPES, "cpu")


def train_arm(order, ids, labels, seed, steps):
    torch.manual_seed(seed)
    model = mar.CausalMAR(mar.CategoricalHead(64, 16), ids.shape[1], 10, vocab_size=16, n_layer=4, n_head=2,
                          n_embd=64, dropout=0.0, label_drop=0.0, order=order)

    def batch(step):
        model.anneal(step / steps)
        i = torch.randint(len(ids), (32,))
        return ids[i], labels[i]
    mar.fit_ids(model, batch, steps)
    return model.eval()


def frechet(model, order, n, net, real):
    """Of n samples, all classes alike, written in an order."""
    model.order = order
    drawn = torch.cat([model.sample(torch.arange(250) % 10) for _ in range(n // 250)])
    return frechet_distance(classifier.look(net, to_images(drawn))[0], real)


def measure_seed(seed, steps, n):
    """-> {arm: {metric: number}} of one seed: another seed is another drawn world, too."""
    ids, labels = draw(0, 8000, seed)
    val_ids, val_labels = draw(data.VAL_INDEX, n, seed)
    val_set = as_set(val_ids, val_labels)
    net, accuracy = classifier.train_classifier(as_set(ids, labels), val_set, seed, 200, 64)
    real, _ = classifier.look_at_real(net, val_set, torch.arange(n))
    found = {}
    for order in ORDERS:
        model = train_arm(order, ids, labels, seed, steps)
        model.order = "raster"
        nats = mar.nats_per_picture(model, val_ids, val_labels).item()
        torch.manual_seed(seed)
        found[order] = dict(nats=nats, frechet=frechet(model, "raster", n, net, real))
        if order == "random":
            found[ARMS[-1]] = dict(frechet=frechet(model, "random", n, net, real))
        print(f"seed {seed} {order}: {found[order]}", flush=True)
    return found | dict(classifier=accuracy)


def save_figure(path, seeds):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    names = dict(nats="nats per unseen picture, read in raster order", frechet="Frechet distance of samples")
    for ax, metric in zip(axes, names):
        arms = [arm for arm in ARMS if metric in seeds[0][arm]]
        values = [[s[arm][metric] for s in seeds] for arm in arms]
        ax.barh(range(len(arms)), [mean(v) for v in values], color="tab:blue", alpha=0.5)
        for i, v in enumerate(values):
            ax.plot(v, [i] * len(v), "k.", ms=5)
        ax.set(xlabel=names[metric], yticks=range(len(arms)), yticklabels=arms)
        ax.invert_yaxis()
        ax.grid(axis="x", alpha=0.3)
    fig.suptitle(f"the order of the tokens at equal budget; dots: {len(seeds)} seeds")
    fig.savefig(path, dpi=80)


def main():
    p = argparse.ArgumentParser(description="Raster, random and annealed orders in a causal transformer.")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="which seeds")
    p.add_argument("--steps", type=int, default=400, help="training steps of every arm, 32 pictures each")
    p.add_argument("--n", type=int, default=500, help="samples, and unseen pictures; a multiple of 250")
    args = p.parse_args()
    start = time.process_time()
    seeds = [measure_seed(seed, args.steps, args.n) for seed in args.seeds]
    tests = [judge_test(test(metric, "annealed", other), {arm: [s[arm] for s in seeds] for arm in ORDERS})
             for metric in ("nats", "frechet") for other in ("raster", "random")]
    for arm in ARMS:
        print(arm, {metric: [round(f([s[arm][metric] for s in seeds]), 2) for f in (mean, stdev)]
                    for metric in seeds[0][arm]})
    for t in tests:
        print(f"{t['metric']}: annealed lower than {t['other']} by {t['advantage']:.2f}: {t['verdict']}")
    facts = age.of_run() | dict(steps=args.steps, n=args.n, seeds=args.seeds,
                                seconds=time.process_time() - start, verdict=judge_claim(tests),
                                tests=tests, results=seeds)
    out = ROOT / "experiments" / "results" / "orders.json"
    out.write_text(json.dumps(facts, indent=1) + "\n")
    save_figure(ROOT / "docs" / "pictures" / "orders.png", seeds)
    print(f"{facts['verdict']}; {facts['seconds']:.0f} s; wrote {out}")


if __name__ == "__main__":
    main()
