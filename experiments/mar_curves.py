"""
MAR's four curves at small scale, and how few denoising steps are enough.

    python experiments/mar_curves.py runs/shapes-vae-mar-diffusion             # from one trained run
    python experiments/mar_curves.py runs/shapes-vae-mar-diffusion --flow RUN  # and one with --objective flow
    python experiments/mar_curves.py runs/shapes-vae-mar-diffusion --heads     # trains heads of other sizes

  head         width and depth of the head's MLP: one short training each, on the run's tokenizer
  denoising    steps per token
  temperature  of the noise on the way: quality, and diversity as recall
  passes       autoregressive steps K over 16 tokens: quality and time
  annealing    A:B takes A denoising steps for the first token and B for the last; quality against seconds per
               image

Writes experiments/results/mar-curves.json with .png and mar-annealing.png. Frechet distance and recall as in
evaluate.py.
"""
import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import mar
import sample
import train
from common import age, classifier, drawing, metrics, runs
from experiments.sampling import measure

WIDTHS, DEPTHS = (32, 64, 128, 256), (1, 3, 6)
DENOISING = (2, 5, 10, 25, 50, 100)
TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
PASSES = (1, 2, 4, 8, 12, 16)
ANNEALED = {"ancestral, constant": (dict(), ("100", "50", "25", "15", "10", "5")),
            "ancestral, annealed": (dict(), ("100:10", "50:5", "25:5", "15:3")),
            "ddim, constant": (dict(sampler="ddim"), ("100", "50", "25", "10", "5")),
            "ddim, annealed": (dict(sampler="ddim"), ("100:10", "50:5", "25:5")),
            "flow, heun, constant": (dict(sampler="heun"), ("25", "10", "5", "3")),
            "flow, heun, annealed": (dict(sampler="heun"), ("25:5", "10:3"))}


class Scores:
    """Measures samples of runs on one data set: the classifier and its features of the validation images are
    kept, and what is measured lies in RUN/curves.json, so that a killed program goes on.
    """

    def __init__(self, run, n):
        self.n, self.path = n, run.folder / "curves.json"
        self.known = json.loads(self.path.read_text()) if self.path.exists() else {}
        val_set = runs.open_split(run.args, "val", run.device)
        self.net, _ = classifier.classifier_for(run.args, run.folder, run.device)
        self.real, _ = classifier.look_at_real(self.net, val_set, torch.arange(len(val_set)))

    def __call__(self, run, text, **options):
        key = (f"{run.folder.name}, {run.args.steps} steps, {drawing.default_of(run)}, {text}, "
               f"{self.n} samples")
        if key in self.known:
            return self.known[key]
        if "diffusion_steps" in options:
            options["diffusion_steps"] = sample.parse_steps(options["diffusion_steps"], run)
        row = measure(run, self.n, self.net, self.real, **options)
        print(f"{text:32s} accuracy {row['sample_accuracy']:5.1f}%  Frechet "
              f"{row['sample_frechet_small_cnn']:6.2f}  recall {row['sample_recall']:5.1f}%  "
              f"{1000 * row['seconds_per_image']:.1f} ms per image", flush=True)
        keep = ("sample_accuracy", "sample_frechet_small_cnn", "sample_precision", "sample_recall",
                "seconds_per_image")
        return self.keep(key, {k: row[k] for k in keep})

    def keep(self, key, value):
        self.known[key] = value
        self.path.write_text(json.dumps(self.known, indent=1) + "\n")
        return value


def head_sizes(run, scores, steps):
    """Train a run for every head size -> {"width": [(width, metrics)], "depth": [...]}."""
    folder, curves = run.folder.resolve().parent / "mar-heads", {"width": [], "depth": []}
    folder.mkdir(parents=True, exist_ok=True)               # so that its .. is a place
    tokenizer = runs.read_checkpoint(run.folder.parent / f"{run.folder.name.split('-')[0]}-vae")
    if tokenizer is None:
        raise data.BadInput(f"--heads: the tokenizer of {run.folder} is not beside it")
    for kind, values, fixed in (("width", WIDTHS, dict(depth=3)), ("depth", DEPTHS, dict(width=128))):
        for v in values:
            name = f"width-{v}" if kind == "width" else ("width-128" if v == 3 else f"depth-{v}")
            words = [
                "--tokenizer", "vae", "--generator", "mar", "--head", "diffusion", "--size", name, "--runs",
                folder, "--name", name, "--tok_name", f"../{run.folder.name.split('-')[0]}-vae", "--steps",
                steps
            ]
            mar.SIZES[name] = mar.SIZES["tiny"]             # a size of its own, for its head
            mar.HEAD_SIZES[name] = {kind: v, **fixed}
            begun = runs.read_checkpoint(folder / name)
            train.main([str(w) for w in words] + ["--resume"] * bool(begun and not begun["done"]))
            curves[kind].append(
                (v, scores(runs.load_run(folder / name, run.device), f"head {kind} {v}",
                           diffusion_steps="25")))
    return curves


def largest(run, n, batch_size=500):
    """Does any of n samples explode? -> the largest |number| of their tokens, and of as many real ones."""
    torch.manual_seed(0)
    drawn, train_set, real = 0.0, runs.open_split(run.args, "train", run.device), 0.0
    for i in range(0, n, batch_size):
        labels = torch.arange(i, i + batch_size) % len(run.classes)
        drawn = max(drawn, drawing.draw_tokens(run, labels, diffusion_steps=25).abs().max().item())
        real = max(
            real,
            run.tokenizer.encode(train_set.batch(torch.arange(i, i + batch_size))[0]).abs().max().item())
    print(f"largest |number| of the tokens of {n} samples {drawn:.1f}, of {n} training images {real:.1f}",
          flush=True)
    return dict(n=n, samples=drawn, training_images=real)


def save_curves(path, curves, name, steps):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 4 if "width" in curves else 3,
                             figsize=(15 if "width" in curves else 11.5, 3.6))
    axes = list(axes)
    frechet = lambda points: [r["sample_frechet_small_cnn"] for _, r in points]
    if "width" in curves:
        ax = axes.pop(0)
        ax.plot([v for v, _ in curves["width"]], frechet(curves["width"]), "o-", label="width, 3 blocks")
        ax.plot([128] * len(curves["depth"]), frechet(curves["depth"]), "s",
                label="1, 3, 6 blocks, width 128")
        for v, r in curves["depth"]:
            ax.annotate(f"{v}", (128, r["sample_frechet_small_cnn"]), textcoords="offset points",
                        xytext=(6, 0), fontsize=8)
        ax.set(xlabel="width of the head", xscale="log", title=f"size of the head ({steps} steps each)")
        ax.set_xticks(WIDTHS, WIDTHS)
        ax.set_xticks([], minor=True)
        ax.legend(fontsize=8)
    for ax, key, xlabel, title, second, label in ((axes[0], "denoising", "denoising steps per token",
                                                   "denoising steps", None, None),
                                                  (axes[1], "temperature", "temperature",
                                                   "temperature and diversity", "sample_recall",
                                                   "recall, %  (diversity)"),
                                                  (axes[2], "passes", "autoregressive steps for 16 tokens",
                                                   "tokens per step", "seconds_per_image", "ms per image")):
        x = [v for v, _ in curves[key]]
        ax.plot(x, frechet(curves[key]), "o-", color="C0")
        ax.set(xlabel=xlabel, title=title)
        if key == "denoising":
            ax.set(xscale="log")
            ax.set_xticks(x, x)
            ax.set_xticks([], minor=True)
        if second:
            twin = ax.twinx()
            twin.plot(x, [r[second] * (1000 if second == "seconds_per_image" else 1) for _, r in curves[key]],
                      "s--", color="C1")
            twin.set_ylabel(label, color="C1")
            twin.set_ylim(0, 1.08 * twin.get_ylim()[1])
    for ax in fig.axes:
        if not ax.get_ylabel():
            ax.set_ylabel("Frechet distance", color="C0")
            ax.set_ylim(0, 1.08 * ax.get_ylim()[1])
            ax.grid(alpha=0.3)
    fig.suptitle(f"{name}: lower is better, floor for real images {curves['floor']:.1f}")
    fig.tight_layout()
    fig.savefig(path, dpi=80)


def save_annealing(path, arms, name):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7.5, 4.6))
    for k, (arm, points) in enumerate(arms.items()):
        x, y = zip(*((1000 * r["seconds_per_image"], r["sample_frechet_small_cnn"]) for _, r in points))
        ax.plot(x, y, "o-" if "constant" in arm else "s--", color=f"C{k // 2}", label=arm)
        for (text, _), a, b in zip(points, x, y):
            ax.annotate(text, (a, b), textcoords="offset points", xytext=(4, 4), fontsize=7,
                        color=f"C{k // 2}")
    ax.set(xlabel="ms per image, in batches of 250", ylabel="Frechet distance (small CNN), lower is better",
           ylim=(0, None), title=f"{name}: denoising steps, first:last token")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, loc="lower right")
    fig.tight_layout()
    fig.savefig(path, dpi=80)


def main():
    p = argparse.ArgumentParser(
        description="MAR's curves: head size, denoising steps, temperature, autoregressive steps, annealing.")
    p.add_argument("run", help="a run with --generator mar --head diffusion")
    p.add_argument("--flow", help="a run with --objective flow, for the annealing figure")
    p.add_argument("--heads", action="store_true", help="train heads of other widths and depths too")
    p.add_argument("--head_steps", type=int, default=800, help="training steps of each of those")
    p.add_argument("--n", type=int, default=1000, help="samples per point")
    p.add_argument("--many", type=int, default=10_000,
                   help="samples among which an exploding one is looked for")
    args = p.parse_args()
    run = runs.load_run(args.run)
    if run.generator is None or (run.args.generator, run.args.head) != ("mar", "diffusion"):
        raise data.BadInput(f"{args.run}: not a run with --generator mar --head diffusion")
    scores = Scores(run, args.n)
    train_set = runs.open_split(run.args, "train", run.device)
    floor, _ = classifier.look_at_real(scores.net, train_set, torch.arange(args.n))
    curves = head_sizes(run, scores, args.head_steps) if args.heads else {}
    curves["floor"] = metrics.frechet_distance(floor, scores.real)
    curves["denoising"] = [(v, scores(run, f"{v} denoising steps", diffusion_steps=str(v)))
                           for v in DENOISING]
    curves["temperature"] = [(v, scores(run, f"temperature {v}", temperature=v, diffusion_steps="25"))
                             for v in TEMPERATURES]
    curves["passes"] = [(v, scores(run, f"{v} passes", steps=v, diffusion_steps="25")) for v in PASSES]
    if f"largest of {args.many}" not in scores.known:
        scores.keep(f"largest of {args.many}", largest(run, args.many))
    curves["largest"] = scores.known[f"largest of {args.many}"]
    arms = {}
    for arm, (options, choices) in ANNEALED.items():
        if arm.startswith("flow") and not args.flow:
            continue
        of = runs.load_run(args.flow) if arm.startswith("flow") else run
        arm = arm + f" ({of.args.steps:,} training steps)" * (of.args.steps != run.args.steps)
        arms[arm] = [(text, scores(of, f"{arm} {text}", diffusion_steps=text, **options)) for text in choices]
    out = Path(__file__).parent / "results"
    facts = age.of_run(run.device) | dict(n=args.n, threads=torch.get_num_threads(),
                                          defaults=drawing.default_of(run), generator_steps=run.args.steps,
                                          head_steps=args.head_steps)
    (out / "mar-curves.json").write_text(json.dumps(facts | curves | dict(annealing=arms), indent=1) + "\n")
    save_curves(out / "mar-curves.png", curves, run.folder.name, args.head_steps)
    save_annealing(out / "mar-annealing.png", arms, run.folder.name)
    print(f"wrote {out / 'mar-curves.json'} and two pictures")


if __name__ == "__main__":
    main()
