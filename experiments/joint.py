"""
One stage or two? VAE and transformer trained together by the exact bound, against one after the other.

GIVT trains a VAE first, whose tokens are drawn towards N(0, 1), and then a transformer that models them;
training both together it leaves to future work. Both can be judged by the same bound on -log p(image) in bits
per pixel value,

    E[ -log p(image | z) ]  +  E[ -log p(z | class) ]  -  H( q(z | image) ),        z ~ q(z | image),

with a discretised logistic likelihood of the 256 values of a pixel (recipes/joint.py), so the comparison is
exact, on true MNIST pixels (28 x 28, grey). Arms, each with the same networks, batch size, learning rate and
number of seconds (measured):

    VAE alone    its own bound, the prior is N(0, 1): stage 1 of the two-stage arm
    two stages   S steps of the VAE, then S steps of the transformer on its tokens
    joint        S steps of both at once: a step costs about as much as one of each

    python experiments/joint.py --data PATH/mnist.tar.gz      # 3 seeds, about 20 minutes on 1 core

Prints a table; writes results/joint.json and joint.png.
"""
import argparse
import csv
import json
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import age, runs
from recipes import joint

FLAGS = ("--image_size 28 --channels 1 --tok_size mnist28 --size tiny --n_mix 8 --tok_batch_size 64 "
         "--batch_size 64 --dtype fp32")


def run_arm(arm, data, seed, steps, parent):
    """Train one arm with one seed -> its run, and the seconds that its steps took."""
    folder = parent / f"{arm}-{seed}"
    words = f"{FLAGS} --data {data} --seed {seed} --steps {steps} --tok_steps {steps}"
    words += f" --eval_every {max(1, steps // 5)} --runs {parent} --name {folder.name}"
    if arm != "joint":
        words += f" --two_stages --tok_name vae-{seed}"
    joint.main(words.split())
    folders = [folder] if arm == "joint" else [parent / f"vae-{seed}", folder]
    return runs.load_run(folder, runs.pick_device()), sum(seconds_of(f) for f in folders)


def seconds_of(folder):
    """What the logged steps of a run took, validation and pictures left out."""
    with open(folder / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    steps = [0] + [int(r["step"]) for r in rows]
    return sum((b - a) * float(r["ms_per_step"]) / 1000 for a, b, r in zip(steps, steps[1:], rows))


@torch.no_grad()
def alone(vae, val_set, seed):
    """The VAE's own bound, with N(0, 1) in the place of the transformer -> the terms of measure_bound."""
    class Standard(torch.nn.Module):
        def forward(self, tokens, cond):           # nats per token of the raw latents, which N(0, 1) is about
            z = tokens / vae.latent_scale + vae.latent_mean
            return -(torch.distributions.Normal(0, 1).log_prob(z).sum(-1) +
                     vae.latent_scale.log().neg().sum()).mean(), {}
    return terms(vae, Standard(), val_set, seed)


def terms(vae, generator, val_set, seed):
    """-> {bound, pixels, prior, entropy}, bits per dimension over the whole validation set."""
    rows = joint.measure_bound(vae, generator, val_set, 250, seed)
    return {
        key.removeprefix("bound_").replace("bits_per_dim", "bound"): value[0]
        for key, _, value, _, _ in rows
    }


def save_figure(path, arms, curves):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for x, (arm, results) in enumerate(arms.items()):
        part = {k: mean(r[k] for r in results) for k in ("bound", "pixels", "prior", "entropy")}
        left.bar(x, part["pixels"], color="#4c78a8", label="pixels, given the tokens" if x == 0 else None)
        left.bar(x, part["prior"] - part["entropy"], bottom=part["pixels"], color="#f58518",
                 label="tokens: prior minus entropy of q" if x == 0 else None)
        left.errorbar(x, part["bound"], yerr=stdev(r["bound"] for r in results) if len(results) > 1 else 0,
                      color="k", capsize=4)
        left.text(x + 0.08, part["bound"] * 1.01, f"{part['bound']:.3f}", fontsize=10)
    left.set(xticks=range(len(arms)), xticklabels=arms, ylabel="bits per dimension, test set",
             title="the bound and its parts")
    left.set_ylim(0, 1.25 * max(r["bound"] for results in arms.values() for r in results))
    left.legend(fontsize=8, loc="upper right")
    for arm, (seconds, values) in curves.items():
        right.plot(seconds, values, "o-", ms=4, label=arm)
    right.set(xlabel="seconds of training", ylabel="bits per dimension, test set",
              title="on the way (seed 0)")
    right.grid(alpha=0.3), right.legend(fontsize=8)
    fig.suptitle("joint.py: MNIST 28 x 28, VAE and transformer in two stages or at once")
    fig.tight_layout()
    fig.savefig(path, dpi=80)


def curve_of(folder, offset=0.0):
    """Validation losses of a run -> seconds, values; not comparable before a two-stage arm is in its second
    stage.
    """
    with open(folder / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    seconds, values, clock, last = [], [], offset, 0
    for r in rows:
        clock, last = clock + (int(r["step"]) - last) * float(r["ms_per_step"]) / 1000, int(r["step"])
        if r.get("val_loss"):
            seconds.append(clock)
            values.append(float(r["val_loss"]))
    return seconds, values


def main():
    p = argparse.ArgumentParser(description="Joint against two-stage training, in bits per dimension.")
    p.add_argument("--data", required=True, help="MNIST as class folders, .tar.gz or .npz")
    p.add_argument("--steps", type=int, default=300,
                   help="training steps of each stage, and of the joint arm")
    p.add_argument("--seeds", type=int, default=3, help="how many seeds")
    p.add_argument("--runs", default="runs/joint", help="where the runs go")
    args = p.parse_args()
    arms, curves, start = {"VAE alone": [], "two stages": [], "joint": []}, {}, time.perf_counter()
    for seed in range(args.seeds):
        for arm in ("two stages", "joint"):
            run, seconds = run_arm(arm.replace(" ", "-"), args.data, seed, args.steps, Path(args.runs))
            val_set = runs.open_split(run.args, "val", run.device)
            result = terms(run.tokenizer, run.generator, val_set, seed) | dict(seed=seed, seconds=seconds)
            arms[arm].append(result)
            if arm == "two stages":
                vae_folder = Path(args.runs) / f"vae-{seed}"
                arms["VAE alone"].append(
                    alone(run.tokenizer, val_set, seed) | dict(seed=seed, seconds=seconds_of(vae_folder)))
                shift = result["bound"] - curve_of(run.folder)[1][-1] * run.tokenizer.seq_len / (0.6931 * 784)
                if seed == 0:               # nats per token -> bits per dimension: scale, and the other terms
                    at, nats = curve_of(run.folder, seconds_of(vae_folder))
                    curves |= {"VAE alone": curve_of(vae_folder),
                               arm: (at, [v * run.tokenizer.seq_len / (0.6931 * 784) + shift for v in nats])}
            elif seed == 0:
                curves[arm] = curve_of(run.folder)
    print(f"{'arm':12} {'bits/dim':>16} {'pixels':>8} {'prior':>8} {'entropy':>8} {'seconds':>8}")
    for arm, results in arms.items():
        average = {k: mean(r[k] for r in results) for k in ("bound", "pixels", "prior", "entropy", "seconds")}
        spread = stdev(r["bound"] for r in results) if len(results) > 1 else 0.0
        print(f"{arm:12} {average['bound']:8.4f} +- {spread:.4f} {average['pixels']:8.4f} "
              f"{average['prior']:8.4f} {average['entropy']:8.4f} {average['seconds']:8.0f}")
    out = Path(__file__).parent / "results"
    out.mkdir(exist_ok=True)
    facts = age.of_run() | dict(threads=torch.get_num_threads(), steps=args.steps, flags=FLAGS,
                                wall_s=round(time.perf_counter() - start))
    (out / "joint.json").write_text(json.dumps(facts | {"arms": arms}, indent=1) + "\n")
    save_figure(out / "joint.png", arms, curves)
    print(f"wrote {out / 'joint.json'} and {out / 'joint.png'}")


if __name__ == "__main__":
    main()
