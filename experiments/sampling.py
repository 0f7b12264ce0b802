"""
How do temperature and guidance move the samples of a trained run? Two curves each: class accuracy, Frechet
distance.

    python experiments/sampling.py runs/shapes-vae-ar-gmm  # 11 x 1000 samples, about 2 minutes on 2 CPU cores

Writes experiments/results/sampling-RUN.json and .png. Guidance w stands for p(x|c)^(1+w) p(x|0)^(-w), --cfg
is 1 + w; the temperature multiplies every sigma. One is varied at a time, the other stays at the default of
sample.py. All metrics are those of evaluate.py: the classifier knows real images only.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import evaluate
from common import age, classifier, drawing, runs

TEMPERATURES = (0.7, 0.8, 0.9, 1.0, 1.1)
WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 3.0)


def measure(run, n, net, real, **options):
    """n samples under options -> {metric: number}."""
    labels, start = torch.arange(n) % len(run.classes), time.perf_counter()
    images = drawing.draw_samples(run, labels, **options).clamp(-1, 1)
    seconds = (time.perf_counter() - start) / n
    rows = evaluate.measure_samples(images, labels, net, real, 250)
    return {key: value for key, _, value, _, _ in rows} | options | dict(seconds_per_image=seconds)


def save_figure(path, name, by_temperature, by_guidance):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.7))
    for ax, xlabel, points in ((axes[0], "temperature (factor of every sigma)", by_temperature),
                               (axes[1], "guidance w", by_guidance)):
        x, accuracy, distance = zip(*((a, r["sample_accuracy"], r["sample_frechet_small_cnn"])
                                      for a, r in points))
        ax.plot(x, accuracy, "o-", color="C0")
        ax.set_xlabel(xlabel)
        ax.set_ylabel("class accuracy, %  (higher is better)", color="C0")
        ax.set_ylim(min(60, min(accuracy) - 3), 100)
        ax.grid(alpha=0.3)
        twin = ax.twinx()
        twin.plot(x, distance, "s--", color="C1")
        twin.set_ylabel("Frechet distance  (lower is better)", color="C1")
        twin.set_ylim(0, 1.15 * max(distance))
    fig.suptitle(f"{name}: what temperature and guidance do to samples")
    fig.tight_layout()
    fig.savefig(path, dpi=80)


def main():
    p = argparse.ArgumentParser(
        description="Class accuracy and Frechet distance along temperature and guidance.")
    p.add_argument("run", help="a run folder of a generator")
    p.add_argument("--n", type=int, default=1000, help="samples per point")
    args = p.parse_args()
    device = runs.pick_device()
    run = runs.load_run(args.run, device)
    if run.generator is None or drawing.kind_of(run) != "classes":
        raise data.BadInput(f"{args.run}: not a run that draws images of classes")
    val_set = runs.open_split(run.args, "val", device)
    net, _ = classifier.classifier_for(run.args, run.folder, device)
    real, _ = classifier.look_at_real(net, val_set, torch.arange(len(val_set)))
    curves = {"temperature": [], "guidance": []}
    for name, values, options in (("temperature", TEMPERATURES, lambda v: dict(temperature=v)),
                                  ("guidance", WEIGHTS, lambda v: dict(cfg=1 + v))):
        for v in values:
            curves[name].append((v, measure(run, args.n, net, real, **options(v))))
            r = curves[name][-1][1]
            print(f"{name} {v:5.2f}: accuracy {r['sample_accuracy']:.1f}%  Frechet "
                  f"{r['sample_frechet_small_cnn']:.2f}  precision {r['sample_precision']:.1f}  "
                  f"recall {r['sample_recall']:.1f}", flush=True)
    out = Path(__file__).parent / "results"
    out.mkdir(exist_ok=True)
    name = run.folder.name
    facts = age.of_run(device) | dict(n=args.n, defaults=drawing.default_of(run),
                                      generator_steps=run.args.steps)
    (out / f"sampling-{name}.json").write_text(json.dumps(facts | curves, indent=1) + "\n")
    save_figure(out / f"sampling-{name}.png", name, **{f"by_{k}": v for k, v in curves.items()})
    print(f"wrote {out / f'sampling-{name}.json'} and .png")


if __name__ == "__main__":
    main()
