"""
What MAR's encoder costs when it encodes only the new tokens in most steps, and what that does to samples.

    python experiments/mar_reuse.py runs/shapes-vae-mar-diffusion           # quality and time of a run
    python experiments/mar_reuse.py runs/shapes-vae-mar-diffusion --paper   # and the time of MAR-B

MAR's encoder reads in both directions: a new token changes what it makes of all others, so nothing can be
reused exactly. sample.py RUN --encode_every K reuses anyway, and encodes all tokens in every Kth step only.
K = 1 is exact. --paper: 256 tokens, 64 rows of the class, random weights, guidance, one denoising step in
place of 100, one image. Frechet distance and class accuracy are those of evaluate.py, seconds are of the
processor. Writes experiments/results/mar-reuse.json.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
from common import age, classifier, drawing, runs
from experiments import mar_sampling
from experiments.sampling import measure

PAPER = (1, 2, 4, 8, 64)


def quality(run, n, denoising):
    """A trained run -> [{encode_every, sample_accuracy, sample_frechet_small_cnn, ..., cpu_s_per_image}]."""
    val_set = runs.open_split(run.args, "val", run.device)
    net, _ = classifier.classifier_for(run.args, run.folder, run.device)
    real, _ = classifier.look_at_real(net, val_set, torch.arange(len(val_set)))
    every, rows = 1, []
    while every <= run.tokenizer.seq_len:
        torch.manual_seed(0)
        start = time.process_time()
        row = measure(run, n, net, real, encode_every=every, diffusion_steps=denoising)
        row["cpu_s_per_image"] = (time.process_time() - start) / n
        rows.append(row)
        print(f"every {every:2d}: {row['sample_accuracy']:5.1f}%  Frechet distance "
              f"{row['sample_frechet_small_cnn']:5.2f}  precision {row['sample_precision']:5.1f}%  recall "
              f"{row['sample_recall']:5.1f}%  {1000 * row['cpu_s_per_image']:.1f} ms per image", flush=True)
        every = every * 2
    return rows


@torch.no_grad()
def cost_at_paper_size(device):
    """MAR-B with random weights -> [{encode_every, cpu_s_per_image}], the transformer's 64 passes."""
    run = mar_sampling.build("mar-b", device, quick=False)
    labels = torch.zeros(1, dtype=torch.long, device=device)
    run.generator.sample(labels, 2, cfg=3.0, diffusion_steps=1)
    rows = []
    for every in PAPER:
        start = time.process_time()
        run.generator.sample(labels, 64, cfg=3.0, diffusion_steps=1, encode_every=every)
        rows.append(dict(encode_every=every, cpu_s_per_image=time.process_time() - start))
        print(f"MAR-B, every {every:2d}: {rows[-1]['cpu_s_per_image']:.1f} s per image", flush=True)
    return rows


def main(argv=None):
    p = argparse.ArgumentParser(description="MAR with an encoder that reuses what it said before.")
    p.add_argument("run", help="a run with --generator mar --head diffusion, bidirectional")
    p.add_argument("--paper", action="store_true", help="also the time of MAR-B, random weights")
    p.add_argument("--n", type=int, default=1000, help="samples per row")
    p.add_argument("--diffusion_steps", type=int, default=25, help="denoising steps per token")
    p.add_argument("--out", type=Path, default=ROOT / "experiments" / "results" / "mar-reuse.json")
    args = p.parse_args(argv)
    device = runs.pick_device("cpu")
    run = runs.load_run(args.run, device)
    if run.generator is None or not hasattr(run.generator, "masked_loss"):
        raise data.BadInput(f"{args.run}: not a run with --generator mar, whose encoder this is about")
    if drawing.kind_of(run) != "classes":
        raise data.BadInput(f"{args.run}: draws {drawing.kind_of(run)}; name a run of images of classes")
    facts = age.of_run(device) | dict(run=run.folder.name, n=args.n, diffusion_steps=args.diffusion_steps)
    rows = quality(run, args.n, args.diffusion_steps)
    if args.paper:
        facts["mar_b"] = cost_at_paper_size(device)
    args.out.write_text(json.dumps(facts | dict(rows=rows), indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
