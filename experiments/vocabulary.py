"""
MAGVIT-v2's Figure 1 at small scale: does a larger vocabulary help, and whom?

    python experiments/vocabulary.py    # 2 tokenizers x 5 vocabularies, each with its MaskGIT; 40 minutes
    python experiments/vocabulary.py --bits 6 8 10 12 14 16      # larger ones take longer, for the softmax
    python experiments/vocabulary.py --bits 6 8 --steps 200 --tok_steps 100      # does it run?

With a learned codebook (vq.py) reconstruction gains from more codes while generation loses, says the paper;
without one (lfq.py) both gain. Here: drawn shapes of 16 x 16 pixels, 4 x 4 tokens, the same steps for every
arm, nothing tuned per arm, no guidance. The convolutions around the quantiser are those of vq.py and of
lfq.py, which differ; so compare a curve's slope, not the curves' heights. Writes
experiments/results/vocabulary.json and .png. Frechet distance and class accuracy as in evaluate.py; codes in
use over the training images. Runs that are already in --runs are not trained again.
"""
import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate
import train
from common import age, classifier, metrics, runs, tokens
from experiments.sampling import measure

KINDS = {"vq": ["--tok_size", "fine"], "lfq": ["--tok_size", "small"]}  # both: 4 x 4 tokens of 16 x 16 pixels


def arm(kind, bits, args):
    """Train one tokenizer and its generator -> its row."""
    name = f"{kind}-{bits}"
    checkpoint = runs.read_checkpoint(args.runs / name)
    if checkpoint is None or not checkpoint["done"]:
        train.main([
            "--tokenizer", kind, *KINDS[kind], "--vocab_size",
            str(1 << bits), "--image_size", "16", "--tok_steps",
            str(args.tok_steps), "--generator", "maskgit", "--size", "tiny", "--steps",
            str(args.steps), "--seed",
            str(args.seed), "--runs",
            str(args.runs), "--tok_name", f"{name}-tok", "--name", name, "--log_every", "500", "--eval_every",
            "1000", "--device", "cpu", *["--resume"] * (checkpoint is not None)
        ])
    run = runs.load_run(args.runs / name)
    val_set = runs.open_split(run.args, "val", run.device)
    net, _ = classifier.classifier_for(run.args, run.folder, run.device)
    index = torch.arange(len(val_set))
    real, _ = classifier.look_at_real(net, val_set, index)
    rows, f, _ = evaluate.measure_reconstruction(run.tokenizer, net, val_set, index, 250)
    ids = tokens.encode_all(run.tokenizer, runs.open_split(run.args, "train", run.device))["ids"]
    row = dict(kind=kind, bits=bits, used=len(ids.unique()) / (1 << bits),
               recon_frechet=metrics.frechet_distance(f,
                                                      real), **{key: value
                                                                for key, _, value, _, _ in rows})
    row |= {k: v for k, v in measure(run, args.n, net, real, cfg=1.0).items() if k.startswith("sample_")}
    print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return row


def save_figure(path, rows):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 3, figsize=(12.5, 3.7))
    for ax, key, title, label in ((axes[0], "recon_frechet", "reconstruction",
                                   "Frechet distance, lower is better"),
                                  (axes[1], "sample_frechet_small_cnn", "generation, no guidance",
                                   "Frechet distance, lower is better"), (axes[2], "used", "codes in use",
                                                                          "share of the vocabulary")):
        for k, (kind, name) in enumerate((("vq", "VQ: learned codes"), ("lfq", "LFQ: signs"))):
            mine = sorted((r for r in rows if r["kind"] == kind), key=lambda r: r["bits"])
            ax.plot([r["bits"] for r in mine], [r[key] for r in mine], "os"[k] + "-", color=f"C{k}",
                    label=name)
        bits = sorted({r["bits"] for r in rows})
        ax.set(xlabel="vocabulary", ylabel=label, title=title, xticks=bits,
               xticklabels=[f"$2^{{{b}}}$" for b in bits])
        ax.set_ylim(0, 1.08 * max(r[key] for r in rows))
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=9)
    fig.suptitle("vocabulary size at equal budget, after MAGVIT-v2's Figure 1")
    fig.tight_layout()
    fig.savefig(path, dpi=80)


def main():
    p = argparse.ArgumentParser(description="Reconstruction and generation against vocabulary, VQ and LFQ.")
    p.add_argument("--bits", type=int, nargs="+", default=[6, 8, 10, 12, 14], help="log2 of the vocabularies")
    p.add_argument("--tok_steps", type=int, default=700, help="training steps of every tokenizer")
    p.add_argument("--steps", type=int, default=1500, help="training steps of every generator")
    p.add_argument("--n", type=int, default=1000, help="samples per measurement")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--runs", default=ROOT / "runs" / "vocabulary", type=Path, help="where the runs lie")
    args = p.parse_args()
    rows = [arm(kind, bits, args) for bits in args.bits for kind in KINDS]
    out = Path(__file__).parent / "results" / "vocabulary"
    facts = age.of_run() | dict(tok_steps=args.tok_steps, steps=args.steps, n=args.n, seed=args.seed)
    out.with_suffix(".json").write_text(json.dumps(facts | dict(rows=rows), indent=1) + "\n")
    save_figure(out.with_suffix(".png"), rows)
    print("| vocabulary | kind | PSNR, dB | codes in use | Frechet: reconstructions | samples | "
          "class accuracy of samples |")
    print("|---" * 7 + "|")
    for r in rows:
        print(f"| 2^{r['bits']} | {r['kind']} | {r['recon_psnr_db']:.1f} | {100 * r['used']:.0f}% | "
              f"{r['recon_frechet']:.1f} | {r['sample_frechet_small_cnn']:.1f} | "
              f"{r['sample_accuracy']:.1f}% |")
    print(f"wrote {out}.json and .png")


if __name__ == "__main__":
    main()
