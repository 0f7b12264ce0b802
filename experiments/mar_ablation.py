"""
MAR's Table 1 at small scale: order x attention x tokens per step x head, at equal budget.

  heads      categorical on the ids of vq.py (4 x 4 of 1024 codes), diffusion on the vectors of vae.py (4 x 4
             of 8 numbers)
  models     the `tiny` transformer, the same training steps, batch and learning rate for all; bidirectional
             is trained once and sampled twice: one token per step (16 steps), and more than one (4 steps)
  seeds      another seed is another drawn world, tokenizer and generator; mean and spread over them
  metrics    of evaluate.py, 1,000 samples, without guidance and with --cfg 2 (nothing is tuned per arm)

    python experiments/mar_ablation.py  # trains what is missing, measures, writes results/mar-ablation.*
    python experiments/mar_ablation.py --seeds 1  # one seed only, so that two processes can share the work

One seed takes about 20 minutes on one core of an AMD EPYC. Runs lie in runs/mar-ablation; a killed program
goes on.
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
import evaluate
import train
from common import age, classifier, metrics, runs
from experiments.sampling import measure

HEADS = {"categorical": "--tokenizer vq", "diffusion": "--tokenizer vae"}
MODELS = {
    "raster causal": "--order raster --attention causal",
    "random causal": "--order random --attention causal",
    "random bidirectional": "--order random --attention bidirectional"
}
ROWS = [("raster", "causal", "1"), ("random", "causal", "1"), ("random", "bidirectional", "1"),
        ("random", "bidirectional", ">1")]
PAPER = {  # FID without and with guidance (MAR-L, ImageNet 256): papers of this project, Table 1
    "categorical": [(19.58, 4.92), (16.22, 4.36), (8.75, 3.50), (8.79, 3.69)],
    "diffusion": [(19.23, 4.69), (13.07, 4.07), (3.43, 1.84), (3.50, 1.98)]}


def train_arms(folder, seed, steps):
    """Train every arm of one seed that is not there yet -> {(head, model): run folder}."""
    folders = {}
    for head, tokenizer in HEADS.items():
        for model, flags in MODELS.items():
            name = f"{head}-{model.replace(' ', '-')}-{seed}"
            tok_name = f"{tokenizer.split()[1]}-{seed}"
            words = [
                *tokenizer.split(), "--generator", "mar", "--head", head, *flags.split(), "--size", "tiny",
                "--seed", seed, "--steps", steps, "--runs", folder, "--name", name, "--tok_name", tok_name,
                "--device", "cpu"
            ]
            unfinished = [
                n for n in (tok_name, name) if (c := runs.read_checkpoint(folder / n)) and not c["done"]
            ]
            train.main([str(w) for w in words] + ["--resume"] * bool(unfinished))
            folders[head, model] = folder / name
    return folders


def measure_seed(folder, seed, steps, n):
    """All rows of one seed -> {head: [{metric: number} for each of ROWS]}, and what the tokenizers allow."""
    start = time.process_time()
    folders, rows, ceiling = train_arms(folder, seed, steps), {}, {}
    for head in HEADS:
        rows[head] = []
        for order, attention, per_step in ROWS:
            run = runs.load_run(folders[head, f"{order} {attention}"])
            val_set = runs.open_split(run.args, "val", run.device)
            net, _ = classifier.classifier_for(run.args, run.folder, run.device)
            index = torch.arange(len(val_set))
            real, _ = classifier.look_at_real(net, val_set, index)
            row = {}
            for name, cfg in (("plain", 1.0), ("guided", 2.0)):
                tricks = dict(diffusion_steps=25) if head == "diffusion" else {}
                tricks |= dict(steps=run.tokenizer.seq_len // 4) if per_step == ">1" else {}
                r = measure(run, n, net, real, cfg=cfg, temperature=1.0, **tricks)
                row |= {
                    f"{name}_frechet": r["sample_frechet_small_cnn"], f"{name}_accuracy": r["sample_accuracy"]
                }
            rows[head].append(row)
            print(f"seed {seed} {head} {order} {attention} {per_step}: "
                  + "  ".join(f"{k} {v:.2f}" for k, v in row.items()), flush=True)
        recon, f, _ = evaluate.measure_reconstruction(run.tokenizer, net, val_set, index, 250)
        ceiling[head] = {key: value
                         for key, _, value, _, _ in recon} | dict(frechet=metrics.frechet_distance(f, real))
    return dict(rows=rows, ceiling=ceiling, seconds=time.process_time() - start)           # of processor time


def table(seeds):
    """Markdown, mean and standard deviation over seeds; the paper's numbers beside ours."""
    def cell(values, digits=1):
        spread = f" +- {stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{mean(values):.{digits}f}{spread}"
    lines = [
        "| order | attention | per step | " +
        " | ".join(f"{h}: Frechet, guided | accuracy %, guided | paper FID, guided" for h in HEADS) + " |",
        "|---" * 9 + "|"
    ]
    for i, row in enumerate(ROWS):
        cells = []
        for head in HEADS:
            of = lambda key: cell([s["rows"][head][i][key] for s in seeds])
            cells += [
                f"{of('plain_frechet')}, {of('guided_frechet')}",
                f"{of('plain_accuracy')}, {of('guided_accuracy')}", "{}, {}".format(*PAPER[head][i])
            ]
        lines.append("| " + " | ".join([*row, *cells]) + " |")
    return "\n".join(lines)


def save_figure(path, seeds):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
    names = [
        "\n".join((f"{order}, {attention}", f"{n} token{'s' * (n != '1')} per step"))
        for order, attention, n in ROWS
    ]
    for ax, key, title in ((axes[0], "plain_frechet", "without guidance"), (axes[1], "guided_frechet",
                                                                            "guidance 2")):
        for k, head in enumerate(HEADS):
            values = [[s["rows"][head][i][key] for s in seeds] for i in range(len(ROWS))]
            y = [i + 0.18 * (2 * k - 1) for i in range(len(ROWS))]
            ax.barh(y, [mean(v) for v in values], 0.34, color=f"C{k}", alpha=0.55, label=f"{head} head")
            for level, v in zip(y, values):
                ax.plot(v, [level] * len(v), "k.", ms=5)
            ax.axvline(mean(s["ceiling"][head]["frechet"] for s in seeds), color=f"C{k}", ls=":",
                       label=f"{'VQ' if head == 'categorical' else 'VAE'} reconstructions")
        ax.set(xlabel="Frechet distance (small CNN), lower is better", title=title, yticks=range(len(ROWS)),
               yticklabels=names)
        ax.invert_yaxis() if ax is axes[0] else None
        ax.grid(axis="x", alpha=0.3)
    fig.suptitle(f"order, attention and head at equal budget; dots: {len(seeds)} seeds")
    fig.tight_layout(rect=(0, 0.07, 1, 1))
    fig.legend(*axes[1].get_legend_handles_labels(), loc="lower center", ncol=4, fontsize=9, frameon=False)
    fig.savefig(path, dpi=80)


def main():
    p = argparse.ArgumentParser(
        description="MAR's ablation of order, attention and head, on the drawn shapes.")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="which seeds")
    p.add_argument("--steps", type=int, default=1500, help="training steps of every arm")
    p.add_argument("--n", type=int, default=1000, help="samples per measurement")
    p.add_argument("--runs", default=ROOT / "runs" / "mar-ablation", type=Path, help="where the runs lie")
    args = p.parse_args()
    seeds = []
    for seed in args.seeds:
        path = args.runs / f"seed-{seed}-{args.steps}-{args.n}.json"
        if not path.exists():
            result = measure_seed(args.runs, seed, args.steps, args.n)
            path.write_text(json.dumps(result))
        seeds.append(json.loads(path.read_text()))
    out = Path(__file__).parent / "results" / "mar-ablation"
    facts = age.of_run() | dict(steps=args.steps, n=args.n, seeds=args.seeds,
                                seconds=sum(s["seconds"] for s in seeds), results=seeds)
    out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    save_figure(out.with_suffix(".png"), seeds)
    print(table(seeds))
    print(f"wrote {out}.json and .png")


if __name__ == "__main__":
    main()
