"""
The papers' claims, tried at small scale: one command each, three seeds, and a verdict by a rule that was
fixed beforehand.

    python experiments/claims.py                      # the list
    python experiments/claims.py gmm-components       # runs one: results/claims/gmm-components.json and .png
    python experiments/claims.py --all                # runs all of them, rebuilds the table in docs/claims.md
    python experiments/claims.py --table              # table and figures anew from the result files
    python experiments/claims.py six-systems --data PATH/mnist.tar.gz PATH/cifar10.tar.gz  # on real images
    python experiments/claims.py mnist-nats --data PATH/mnist.tar.gz      # a public benchmark, see mnist_nats

The world is drawn shapes. A seed is another drawn world, tokenizer and generator; within a seed all arms
share the tokenizer and have equal steps, batches and the learning rates of train.py (4e-3 on a CPU, 1e-3 on
CUDA): nothing is tuned per arm. One classifier for all: evaluate.py's, of 20,000 images of seed 0. Guidance
is off and the temperature 1 unless an arm says otherwise. Runs lie in runs/claims, named by their flags, and
are shared; what was measured lies beside them.

The rule. A test compares two arms on one metric. With d the advantage of the arm that the paper favours, seed
by seed, it "holds" if mean(d) > 2 se, with se = std(d) / sqrt(seeds), "does not hold" if mean(d) < -2 se, and
is "undecided here" between. (Of three seeds that is a weak rule: chance alone passes it about one time in
eleven.) Where the paper says "as good", the test names what may be lost; an exact bound has to be kept at
every seed. A claim holds if all its tests hold, does not hold if one does not, and is undecided otherwise.
"""
import argparse
import csv
import functools
import inspect
import json
import math
import sys
import textwrap
import time
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ar_transformer
import data
import evaluate
import gmm_head
import lfq
import mar
import maskgit
import sample
import titok
import train
import vae
import vq
from common import age, classifier, drawing, metrics, pictures, runs, tokens
from experiments import mar_ablation
from experiments.head_modes import modes_of

# What "small" means on this machine. Sizes are entries of the SIZES of the model files, or made below.
SCALE = {
    "cpu": dict(image_size=16, n_shapes=6000, tok_steps=600, tok_batch_size=32, size="toy", steps=1200,
                batch_size=64, n=500, smaller="toy-32", larger="toy-128", vit=(64, 2, 4),
                net=dict(ch=8, ch_mult=(1, 2, 2), n_res=1, groups=4)),
    "cuda": dict(image_size=32, n_shapes=20_000, tok_steps=4000, tok_batch_size=128, size="small", steps=8000,
                 batch_size=256, n=2000, smaller="tiny", larger="medium", vit=(128, 4, 4),
                 net=dict(ch=32, ch_mult=(1, 2, 4), n_res=1, groups=8)),       # not run yet
}


def make_sizes(scale):
    """Sizes for these experiments, beside those of the model files: 4 x 4 tokens of 16 x 16 pixels."""
    net = dict(image_size=scale["image_size"], **scale["net"])
    vae.SIZES["claims"] = net | dict(token_dim=4)
    vae.SIZES["claims-dae"] = vae.SIZES["claims"] | dict(corrupt=0.5)
    vq.SIZES["claims"] = net | dict(vocab_size=256, code_dim=8, z_channels=2 * net["ch"])
    lfq.SIZES["claims"] = net | dict(bits=8)
    for name, weights in (("none", (0.0, 0.0)), ("sample", (0.02, 0.0)), ("batch", (1e-9, 0.02e9))):
        lfq.SIZES[f"claims-{name}"] = lfq.SIZES["claims"] | dict(entropy=weights[0], diversity=weights[1])
    titok.SIZES["claims"] = dict(image_size=net["image_size"], patch=4, n_tokens=8, vocab_size=256,
                                 enc=scale["vit"], dec=scale["vit"])
    for name, width in (("toy-32", 32), ("toy", 64), ("toy-128", 128)):
        size = dict(n_layer=2, n_head=4, n_embd=width)
        ar_transformer.SIZES[name] = size
        maskgit.SIZES[name] = size
        mar.SIZES[name] = size | dict(n_buffer=2, mask_min=0.0, mask_std=9.0)
        mar.HEAD_SIZES[name] = dict(width=64, depth=2)
    name = scale["size"]                                    # and one with a narrow head
    mar.SIZES[f"{name}-narrow"] = mar.SIZES[name]
    mar.HEAD_SIZES[f"{name}-narrow"] = mar.HEAD_SIZES[name] | dict(width=16)


# ---------------------------------------------------------------------------------------------------
# The laboratory: runs keyed by their flags, one classifier, a memory of what was measured

class Lab:
    def __init__(self, scale, seeds, runs, device, images=()):
        make_sizes(scale)
        self.scale, self.seeds, self.runs, self.device = scale, seeds, Path(runs), device
        self.images = images                                # real images for claim 21
        self.data = "shapes"                                # what is trained on just now
        self.clock = time.process_time if device.type == "cpu" else time.perf_counter   # a CPU may be shared
        self.spent = {}
        self.flags = {}
        self.source = {}
        self.classifiers = {}
        self.runs.mkdir(parents=True, exist_ok=True)
        once = functools.lru_cache(maxsize=None)(data.load)               # the worlds of all seeds are kept

        def load(name, size, split, device, seed, **options):             # real images know no seed
            return once(name, size, split, device, seed if name == "shapes" else 0, **options)
        data.load = load
        for room, name in ((drawing, "save_samples"), (pictures, "save_curve"), (pictures, "save_rows")):
            setattr(room, name, lambda *_, **__: None)      # pictures take a fifth of a run

    def name(self, flags, seed):
        world = "" if self.data == "shapes" else f"{Path(self.data).name.split('.')[0]}-"
        return world + "-".join(flags.replace("--", "").split()) + f"-{seed}"

    def train(self, seed, tokenizer, generator=None):
        """Flags of train.py -> the run, trained first if its folder is missing, as is the tokenizer's own."""
        tok_name = self.name(tokenizer, seed)
        folder = self.name(f"{tokenizer} {generator or ''}".strip(), seed)
        if generator is not None:
            self.train(seed, tokenizer)
        path, s = self.runs / folder, self.scale
        checkpoint = runs.read_checkpoint(path)
        if checkpoint is None or not checkpoint["done"]:
            words = (f"{tokenizer} --data {self.data} --image_size {s['image_size']} "
                     f"--n_shapes {s['n_shapes']} --tok_steps {s['tok_steps']} "
                     f"--tok_batch_size {s['tok_batch_size']} --tok_name {tok_name} --seed {seed} "
                     f"--device {self.device} --log_every 100 --eval_every 100000 ")
            words += "" if "--tok_size" in tokenizer else "--tok_size claims "
            if generator is None:
                words += "--generator none "
            else:
                words += f"{generator} --steps {s['steps']} --batch_size {s['batch_size']} --name {folder} "
                words += "" if "--size" in generator else f"--size {s['size']} "
            words += "--resume" if checkpoint is not None else ""
            start = self.clock()
            train.main([*words.split(), "--runs", str(self.runs)])
            (path / "seconds.json").write_text(json.dumps(self.clock() - start))
        kept = path / "seconds.json"                        # missing if the program was killed just before it
        self.spent[folder] = json.loads(kept.read_text()) if kept.exists() else 0.0
        return runs.load_run(path, self.device)

    def read(self, name, command):
        """The result file of another experiment -> its contents. Its age and machine are told, not ours."""
        path = ROOT / "experiments" / "results" / f"{name}.json"
        if not path.exists():
            raise data.BadInput(f"{path} is missing: run `{command}` first, this claim reads what it "
                                "measured")
        result = json.loads(path.read_text())
        self.source = {key: result[key] for key in ("commit", "date", "machine", "torch")}
        self.source |= dict(scale=f"that of experiments/results/{name}.json", threads=result.get("threads"),
                            flags=[f"experiments: {command}"],
                            seconds=result.get("seconds", result.get("wall_s")))
        return result

    def classifier_and_features(self):
        """-> the classifier and its features of the validation images: of seed 0's world for all seeds."""
        if self.data not in self.classifiers:
            args = SimpleNamespace(data=self.data, image_size=self.scale["image_size"], seed=0, flip=False,
                                   n_shapes=20_000, frames=1)
            net, _ = classifier.classifier_for(args, self.runs / "any", self.device)
            val_set = runs.open_split(args, "val", self.device)
            features, _ = classifier.look_at_real(net, val_set, torch.arange(len(val_set)))
            self.classifiers[self.data] = net, features
        return self.classifiers[self.data]

    def score(self, images, labels=None):
        """n samples on the CPU -> {frechet, accuracy, precision, recall}"""
        net, real = self.classifier_and_features()
        asked = labels is not None                          # decoded noise was asked for no class
        labels = labels if asked else torch.zeros(len(images), dtype=torch.long)
        rows = evaluate.measure_samples(images.clamp(-1, 1), labels, net, real, 250)
        row = {key.removeprefix("sample_").removesuffix("_small_cnn"): value for key, _, value, _, _ in rows}
        return row if asked else {k: v for k, v in row.items() if k != "accuracy"}

    def remember(self, run, key, measure):
        """measure() once: its numbers lie in the run's folder from then on."""
        path = run.folder / "claims.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        key = f"{key}, n = {self.scale['n']}"
        if key not in known:
            start = self.clock()
            value = measure()
            known[key] = value | dict(measure_s=self.clock() - start)
            path.write_text(json.dumps(known, indent=1) + "\n")
            numbers = "  ".join(f"{k} {v:.3f}" for k, v in value.items())
            print(f"{run.folder.name}: {key}: {numbers}", flush=True)
        self.spent[f"{run.folder.name} {key}"] = known[key]["measure_s"]
        return {k: v for k, v in known[key].items() if k != "measure_s"}

    def draw(self, run, **options):
        """Samples of a run under options of sample.py -> metrics."""
        options = dict(cfg=1.0, temperature=1.0) | options
        if run.args.head == "diffusion":
            options = dict(diffusion_steps="25", cfg_schedule="constant") | options

        def measure():
            words, n = dict(options), self.scale["n"]
            if "diffusion_steps" in words:
                words["diffusion_steps"] = sample.parse_steps(words["diffusion_steps"], run)
            labels, start = torch.arange(n) % len(run.classes), self.clock()
            images = drawing.draw_samples(run, labels, **words)
            ms = 1000 * (self.clock() - start) / n
            return self.score(images, labels) | dict(ms_per_image=ms)
        return self.remember(run, ", ".join(f"{k} {v}" for k, v in sorted(options.items())), measure)

    def arm(self, tokenizer, generator, **options):
        """One arm -> [metrics of its samples, nll of the validation images, for each seed]."""
        rows = []
        for seed in self.seeds:
            run = self.train(seed, tokenizer, generator)
            seconds = [v for k, v in self.spent.items() if k in (self.name(tokenizer, seed), run.folder.name)]
            weights = [*run.tokenizer.parameters(), *run.generator.parameters()]
            rows.append(self.draw(run, **options) | dict(
                nll=last_loss(run.folder), train_s=sum(seconds), parameters=sum(p.numel() for p in weights)))
        self.flags |= {f"{tokenizer} {generator}": True}
        return rows

    def tokenizers(self, flags):
        """A tokenizer alone -> [{psnr, usage}, for each seed]; usage: share of the codes that images use."""
        rows = []
        for seed in self.seeds:
            run = self.train(seed, flags)

            def measure():
                images, _ = runs.open_split(run.args, "val", run.device).batch(torch.arange(500))
                with torch.no_grad():
                    recon = run.tokenizer.decode(run.tokenizer.encode(images)).float()
                row = dict(psnr=metrics.psnr(images, recon).mean().item())
                if run.tokenizer.vocab_size:
                    train_set = runs.open_split(run.args, "train", run.device)
                    ids = tokens.encode_all(run.tokenizer, train_set)["ids"]
                    row["usage"] = 100 * len(ids.unique()) / run.tokenizer.vocab_size
                return row
            rows.append(self.remember(run, "reconstructions", measure))
        self.flags[flags] = True
        return rows


def last_loss(folder):
    with open(folder / "log.csv", newline="") as f:
        return float(list(csv.DictReader(f))[-1]["val_loss"])


# ---------------------------------------------------------------------------------------------------
# The rule

def test(metric, arm, other, better="lower", times=1.0, give=0.0, every=False):
    """The claim that `arm` is better than `other`: lower than times * other + give, or higher than times *
    other - give. every: an exact bound, to be kept at every seed.
    """
    return dict(metric=metric, arm=arm, other=other, better=better, times=times, give=give, every=every)


def decide(advantages):
    """Advantages of the arm that the paper favours, one for each seed -> a verdict in words."""
    if len(advantages) < 2:
        return "undecided here"
    m, error = mean(advantages), stdev(advantages) / len(advantages) ** 0.5
    return "holds" if m > 2 * error else "does not hold" if m < -2 * error else "undecided here"


def judge_test(t, arms):
    """A test and {arm: [{metric: number}, for each seed]} -> the test with its numbers and its verdict."""
    a, b = ([row[t["metric"]] for row in arms[name]] for name in (t["arm"], t["other"]))
    sign = 1 if t["better"] == "lower" else -1
    d = [sign * (t["times"] * y - x) + t["give"] for x, y in zip(a, b, strict=True)]
    error = stdev(d) / len(d) ** 0.5 if len(d) > 1 else None
    verdict = decide(d)
    if t["every"]:
        verdict = "holds" if min(d) >= 0 else "does not hold"
    return t | dict(values=a, other_values=b, advantage=mean(d), standard_error=error, verdict=verdict)


def judge_claim(tests):
    verdicts = {t["verdict"] for t in tests}
    if not verdicts:
        return "a table, no verdict"
    if "does not hold" in verdicts:
        return "does not hold"
    return "holds" if verdicts == {"holds"} else "undecided here"


# ---------------------------------------------------------------------------------------------------
# The claims. The first line of each is the claim, the line "Paper:" what was reported, the line "Remark:",
# written after its results were seen, why they may be so; both go into the table. Such a line may go on in
# lines that are indented. Arms, flags and tests stand below.
# A claim returns its arms {name: [metrics for each seed]}, its tests, and the panels of its figure: (metric,
# title[, which arms; {x: arm} for a curve, whose x axis is the title]).

VAE, VQ = "--tokenizer vae", "--tokenizer vq"
AR, MASKGIT, MAR = "--generator ar --head", "--generator maskgit --head", "--generator mar --head"
GIVT, LLAMA, MASKED = f"{AR} gmm --n_mix 16", f"{AR} categorical", f"{MASKGIT} categorical"
LABELS = dict(
    plain_frechet="Frechet distance, no guidance", guided_frechet="Frechet distance, guided",
    plain_accuracy="class accuracy, %",
    frechet="Frechet distance (small CNN)", nll="validation NLL, nats per token",
    accuracy="class accuracy, %",
    recall="recall, %", precision="precision, %", ms_per_image="ms per image", usage="codes in use, %",
    psnr="reconstruction PSNR, dB", bound="bits per dimension", pixels="bits per dimension",
    frechet_clips="Frechet distance of clips", ms_ssim="MS-SSIM", error="error of the mean / sigma",
    error_wide="error of the mean / sigma", excess="excess, %",
    distance="total variation to the truth", valid="valid pictures, %")


def gmm_components(lab):
    """1. GIVT: more mixture components lower the NLL and improve samples.

    Paper: gains from k; k = 16 in its default models (our notes have no number).
    """
    arms = {f"K = {k}": lab.arm(VAE, f"{AR} gmm --n_mix {k}") for k in (1, 4, 16)}
    tests = [test("nll", "K = 4", "K = 1"), test("nll", "K = 16", "K = 4"),
             test("frechet", "K = 16", "K = 1")]
    return arms, tests, [("nll", "likelihood"), ("frechet", "samples")]


def flow_adapter(lab):
    """2. GIVT: the flow adapter helps.

    Paper: used for its largest models (FID 2.59, 1.67B parameters, with 16 components).
    Remark: at every seed the likelihood gains; at a class accuracy near 60% the samples do not show it.
    """
    arms = {}
    for k in (1, 16):
        arms[f"K = {k}"] = lab.arm(VAE, f"{AR} gmm --n_mix {k}")
        arms[f"K = {k}, adapter"] = lab.arm(VAE, f"{AR} gmm --n_mix {k} --adapter flow")
    tests = [test(metric, f"K = {k}, adapter", f"K = {k}") for k in (1, 16) for metric in ("nll", "frechet")]
    return arms, tests, [("nll", "likelihood"), ("frechet", "samples")]


def variance_and_guidance(lab):
    """3. GIVT: variance scaling below 1 and guidance improve quality, up to a point.

    Paper: t = 0.95 and w = 0.4 give FID 3.35, without guidance 5.67 (304M parameters).
    Remark: guidance is worth a lot here, and more of it than in the paper; variances below 1 are worth
        nothing.
    """
    scaled = {t: f"t = {t}" for t in (0.7, 0.8, 0.9, 0.95, 1.0)}
    guided = {w: f"w = {w}" for w in (0.0, 0.4, 1.0, 3.0)}
    arms = {name: lab.arm(VAE, GIVT, temperature=t) for t, name in scaled.items()}
    arms |= {name: lab.arm(VAE, GIVT, cfg=1 + w) for w, name in guided.items()}
    tests = [test("frechet", "t = 0.95", "t = 1.0"), test("frechet", "t = 0.95", "t = 0.7"),
             test("frechet", "w = 0.4", "w = 0.0"), test("frechet", "w = 0.4", "w = 3.0"),
             test("accuracy", "w = 0.4", "w = 0.0", "higher")]
    return arms, tests, [("frechet", "factor t of every sigma", scaled),
                         ("frechet", "guidance weight w", guided), ("accuracy", "guidance weight w", guided)]


def guidance_by_rejection(lab):
    """4. GIVT: guidance by density rejection equals its closed form, where there is one.

    Paper: the released sampler has mean -0.743 for -0.736 at w = 0.4, but -4.88 for -6.38 at w = 3 (measured
        on their code).
    Remark: 128 tries do not always reach a target that w = 3 moves far; the released envelope is no envelope
        (gmm_head.py).
    No training: 100 random pairs of Gaussians (K = 1) of 4 numbers, 150 draws of each; the error of the mean,
    in standard deviations of the target. It may be 0.01 above that of the closed form, whose error is
    sampling noise alone (0.065).
    """
    def gaussians():
        return torch.zeros(100, 1), 0.7 * torch.randn(100, 1, 4), 0.4 + torch.rand(100, 1, 4)

    arms = {}
    for w in (0.4, 3.0):
        for way in ("closed", "rejection", "official"):
            arms[f"{way}, w = {w}"] = rows = []
            for seed in lab.seeds:
                start = lab.clock()
                torch.manual_seed(seed)
                pair = [gaussians(), gaussians()]
                many = [tuple(v.expand(5, *v.shape) for v in mixture) for mixture in pair]
                x = [gmm_head.GMMHead.draw_guided(*many, 1 + w, way) for _ in range(30)]
                x = torch.cat(x)                            # (150, 100, 4)
                m, s, proper = (v[:, 0] for v in gmm_head.guided_normal(*pair[0][1:], *pair[1][1:], 1 + w))
                wide = pair[1][2][:, 0] >= pair[0][2][:, 0]           # as a rule in a trained model
                off = ((x.mean(0) - m) / s).abs()
                rows.append(dict(error=off[proper].mean().item(),
                                 error_wide=off[proper & wide].mean().item()))
                lab.spent[f"{way} {w} {seed}"] = lab.clock() - start
    tests = [test("error", f"rejection, w = {w}", f"closed, w = {w}", give=0.01) for w in (0.4, 3.0)]
    tests += [test("error", "official, w = 0.4", "closed, w = 0.4", give=0.01)]
    return arms, tests, [("error", "all channels"), ("error_wide", "sigma of p(x) above that of p(x|c)")]


def ablation(lab):
    """The arms of experiments/mar_ablation.py: 4 x 4 tokens of 32 x 32 pixels, 1,500 steps, its own seeds."""
    r = lab.read("mar-ablation", "python experiments/mar_ablation.py")
    names = []
    for order, attention, per_step in mar_ablation.ROWS:
        names.append(f"{order} {attention}" + ", 4 per step" * (per_step != "1"))
    lab.source["seeds"] = r["seeds"]
    return names, {f"{head}, {name}": [seed["rows"][head][i] for seed in r["results"]]
                   for head in ("categorical", "diffusion") for i, name in enumerate(names)}


def diffusion_loss(lab):
    """5. MAR: continuous tokens with a diffusion loss beat VQ tokens with cross-entropy in the same
        transformer.

    Paper: FID without guidance 19.23 for 19.58 (raster), 13.07 for 16.22 (random), 3.43 for 8.75
        (bidirectional).
    Remark: 1,500 steps are few for random orders; the diffusion head has more to learn and the better
        tokenizer.
    Read from experiments/mar_ablation.py; "guided": with guidance 2.
    """
    names, arms = ablation(lab)
    tests = [test(metric, f"diffusion, {name}", f"categorical, {name}")
             for metric in ("plain_frechet", "guided_frechet") for name in names[:3]]
    return arms, tests, [("plain_frechet", "without guidance"), ("guided_frechet", "guidance 2")]


def order_and_attention(lab):
    """6. MAR: random order beats raster, and bidirectional attention beats causal.

    Paper: FID 19.58, 16.22, 8.75 with cross-entropy, 19.23, 13.07, 3.43 with the diffusion loss.
    Remark: a random order means 2^16 conditionals to learn instead of 16, and 1,500 steps are few:
        docs/results.md has a longer run.
    Read from experiments/mar_ablation.py.
    """
    names, arms = ablation(lab)
    tests = [test("plain_frechet", f"{head}, {names[i + 1]}", f"{head}, {names[i]}")
             for head in ("categorical", "diffusion") for i in (0, 1)]
    return arms, tests, [("plain_frechet", "without guidance"), ("plain_accuracy", "without guidance")]


def mar_figures(lab):
    """7. MAR: a wider head, more denoising steps and more autoregressive steps help; a lower temperature
        costs diversity.

    Paper: head width 256 to 1,536 takes FID with guidance from 2.45 to 1.91; 64 autoregressive steps are as
        good as 256.
    Remark: after 1,200 steps the width of the head does not matter yet; 4 passes over 16 tokens are as good
        as 16.
    """
    model = f"{MAR} diffusion"
    widths = {w: f"head {w} wide" for w in (16, 64)}
    steps = {n: f"{n} denoising steps" for n in (2, 5, 25, 50)}
    passes = {n: f"{n} passes" for n in (1, 4, 16)}
    heat = {t: f"temperature {t}" for t in (0.8, 0.9, 1.0)}
    arms = {widths[64]: lab.arm(VAE, model),
            widths[16]: lab.arm(VAE, f"{model} --size {lab.scale['size']}-narrow")}
    arms |= {name: lab.arm(VAE, model, diffusion_steps=str(n)) for n, name in steps.items()}
    arms |= {name: lab.arm(VAE, model, steps=n) for n, name in passes.items()}
    arms |= {name: lab.arm(VAE, model, temperature=t) for t, name in heat.items()}
    tests = [test("frechet", widths[64], widths[16]), test("frechet", steps[25], steps[2]),
             test("frechet", passes[16], passes[1]), test("recall", heat[1.0], heat[0.8], "higher")]
    return arms, tests, [("frechet", "width of the head", widths), ("frechet", "denoising steps", steps),
                         ("frechet", "autoregressive steps", passes), ("recall", "temperature", heat)]


def decoding_noise(lab):
    """8. Survey: AE, DAE and VAE reconstruct, but only the VAE turns noise into images.

    Paper: a qualitative statement.
    Frechet distance of decoded N(0, 1) noise; beside it of noise with the mean and std of each model's own
    latents.
    """
    arms = {}
    for name, flags in (("AE", "--beta 0"), ("DAE", "--beta 0 --tok_size claims-dae"), ("VAE", "--beta 2")):
        arms[name] = lab.tokenizers(f"{VAE} {flags}")
        arms[f"{name}, own mean, std"] = own_rows = []
        for i, seed in enumerate(lab.seeds):
            run = lab.train(seed, f"{VAE} {flags}")

            def noise(decode):
                torch.manual_seed(seed)
                size = lab.scale["n"], run.tokenizer.seq_len, run.tokenizer.token_dim
                z = torch.randn(size, device=run.device)
                with torch.no_grad():
                    return lab.score(decode(z).cpu())
            arms[name][i] |= lab.remember(run, "noise", lambda: noise(run.tokenizer.decode_raw))
            own_rows.append(lab.remember(run, "noise with its own mean and std",
                                         lambda: noise(run.tokenizer.decode)))
    tests = [test("frechet", "VAE", "AE"), test("frechet", "VAE", "DAE")]
    return arms, tests, [("psnr", "reconstruction", ["AE", "DAE", "VAE"]), ("frechet", "decoded noise")]


def vqvae_prior(lab):
    """9. VQ-VAE: with a learned prior it beats drawing its codes at random.

    Paper: a qualitative statement.
    The prior: `--generator ar`; at random: uniform ids, and ids as often as they occur in the training
    images.
    """
    arms = {"uniform ids": [], "ids by frequency": [], "ids of a transformer": lab.arm(VQ, LLAMA)}
    for seed in lab.seeds:
        run = lab.train(seed, VQ)

        def drawn(uniform):
            train_set = runs.open_split(run.args, "train", run.device)
            ids = tokens.encode_all(run.tokenizer, train_set)["ids"].flatten()
            torch.manual_seed(seed)
            count = (lab.scale["n"], run.tokenizer.seq_len)
            uniform_ids = torch.randint(run.tokenizer.vocab_size, count, device=run.device)
            ids = uniform_ids if uniform else ids[torch.randint(len(ids), count, device=run.device)]
            return lab.score(run.tokenizer.decode(ids).float().cpu())
        for name in ("uniform ids", "ids by frequency"):
            arms[name].append(lab.remember(run, name, lambda: drawn(name == "uniform ids")))
    tests = [test("frechet", "ids of a transformer", name) for name in ("uniform ids", "ids by frequency")]
    return arms, tests, [("frechet", "samples"), ("precision", "samples")]


def few_steps(lab):
    """10. MaskGIT: a few parallel steps match many sequential ones, several times faster.

    Paper: 8 steps for 256 tokens, FID 6.18; sequential decoding needs 256.
    Remark: four passes lose about 7% of the distance, 8 passes nothing.
    As good: not more than 3 points of accuracy and 10% of the distance lost. Here 4 steps for 16 tokens; 64
    tokens and one seed in experiments/survey.py.
    """
    steps = {n: f"{n} steps" for n in (1, 2, 4, 8, 16)}
    arms = {name: lab.arm(VQ, MASKED, steps=n) for n, name in steps.items()}
    tests = [test("accuracy", "4 steps", "16 steps", "higher", give=3),
             test("frechet", "4 steps", "16 steps", times=1.1),
             test("ms_per_image", "4 steps", "16 steps", times=0.5)]
    metrics_shown = ("frechet", "accuracy", "ms_per_image")
    return arms, tests, [(metric, "16 tokens: passes", steps) for metric in metrics_shown]


def one_dimensional(lab):
    """11. TiTok: a few 1-D tokens suffice, and are faster still.

    Paper: 32 tokens instead of 256: FID 2.77 against MaskGIT's 6.18, 101.6 against 50.5 samples/s.
    Remark: TiTok's transformer has learned little after 600 steps; in the longer runs of docs/results.md 16
        of its tokens match 64 of VQ.
    As good: as in claim 10.
    """
    long, short = "MaskGIT, 16 tokens", "TiTok, 8 tokens"
    arms = {}
    for name, flags in ((long, VQ), (short, "--tokenizer titok --tokens 8")):
        drawn, alone = lab.arm(flags, MASKED, steps=4), lab.tokenizers(flags)
        arms[name] = [a | b for a, b in zip(drawn, alone)]
    tests = [test("frechet", short, long, times=1.1), test("accuracy", short, long, "higher", give=3),
             test("ms_per_image", short, long)]
    return arms, tests, [("psnr", "tokenizer"), ("frechet", "samples, 4 passes"),
                         ("ms_per_image", "samples, 4 passes")]


def code_dimension(lab):
    """12. LlamaGen: low-dimensional codes of unit length stay in use, 256-dimensional ones collapse.

    Paper: of 16,384 codes 97.0% are used with 8 dimensions (rFID 2.19), 20.9% with 32, 0.29% with 256 (rFID
        9.21).
    """
    dims = {d: f"{d} dimensions" for d in (8, 256)}
    arms = {name: lab.tokenizers(f"{VQ} --codebook l2 --vocab_size 1024 --token_dim {d}")
            for d, name in dims.items()}
    tests = [test("usage", dims[8], dims[256], "higher"), test("psnr", dims[8], dims[256], "higher")]
    return arms, tests, [("usage", "1,024 codes learned by gradient"), ("psnr", "reconstruction")]


def model_size(lab):
    """13. LlamaGen: quality rises with model size.

    Paper: FID without guidance, 384 pixels: B 32.2, L 19.1, XL 15.5, XXL 14.6, 3B 9.38.
    Remark: the widest learns the 6,000 images by heart (12 epochs): its validation NLL rises while its
        samples do not get worse.
    """
    names = [lab.scale[k] for k in ("smaller", "size", "larger")]
    sizes = {f"width {ar_transformer.SIZES[name]['n_embd']}": name for name in names}
    arms = {w: lab.arm(VQ, LLAMA + f" --size {name}" * (name != lab.scale["size"]))
            for w, name in sizes.items()}
    small, middle, large = sizes
    tests = [test(metric, a, b) for metric in ("nll", "frechet")
             for a, b in ((middle, small), (large, middle))]
    return arms, tests, [("nll", "likelihood", list(sizes)), ("frechet", "samples", list(sizes))]


def guidance_trade_off(lab):
    """14. LlamaGen: guidance trades diversity for fidelity.

    Paper: scales 1.5, 1.75, 2, 2.25 give FID 4.74, 3.15, 3.07, 3.62 (L, 384 pixels); B: precision .83, recall
        .45 at 2.0.
    """
    scales = {s: f"scale {s}" for s in (1.0, 1.5, 2.0, 4.0, 8.0)}
    arms = {name: lab.arm(VQ, LLAMA, cfg=s) for s, name in scales.items()}
    tests = [test("precision", "scale 2.0", "scale 1.0", "higher"),
             test("accuracy", "scale 2.0", "scale 1.0", "higher"),
             test("recall", "scale 1.0", "scale 8.0", "higher")]
    return arms, tests, [(metric, "guidance scale", scales) for metric in ("precision", "recall", "frechet")]


def vocabulary(lab):
    """15. MAGVIT-v2: with a growing vocabulary VQ's generation gets worse, while LFQ's keeps improving.

    Paper: Figure 1, to 2^18; a curve, our notes have no numbers. See also experiments/vocabulary.py: more
        steps, one seed.
    """
    arms = {}
    for kind in ("vq", "lfq"):
        for bits in (4, 8, 12):                             # 2^8 is what the other claims have
            flags = f"--tokenizer {kind}" + f" --vocab_size {1 << bits}" * (bits != 8)
            drawn, alone = lab.arm(flags, MASKED, steps=16), lab.tokenizers(flags)
            arms[f"{kind} 2^{bits}"] = [a | b for a, b in zip(drawn, alone)]
    tests = [test("frechet", "vq 2^4", "vq 2^12"), test("frechet", "lfq 2^12", "lfq 2^4"),
             test("psnr", "vq 2^12", "vq 2^4", "higher"), test("psnr", "lfq 2^12", "lfq 2^4", "higher")]
    return arms, tests, [("psnr", "reconstructions"), ("frechet", "samples of MaskGIT"),
                         ("usage", "codes in use")]


def entropy_terms(lab):
    """16. MAGVIT-v2: the entropy penalty keeps the codes in use, and both of its terms are needed.

    Paper: part of the recipe (weight 0.1); the released reimplementations turn it on throughout. No ablation
        in our notes.
    Remark: without the batch term codes die; the per-token term is worth nothing at 8 bits and 600 steps.
    """
    sizes = {"none": " --tok_size claims-none", "per token": " --tok_size claims-sample",
             "batch": " --tok_size claims-batch", "both": ""}
    arms = {name: lab.tokenizers(f"--tokenizer lfq{flags}") for name, flags in sizes.items()}
    tests = [test("usage", "both", "none", "higher"), test("usage", "both", "per token", "higher"),
             test("psnr", "both", "batch", "higher")]
    return arms, tests, [("usage", "256 codes"), ("psnr", "reconstruction")]


def causal_video(lab):
    """17. MAGVIT-v2: a causal 3-D CNN beats networks per frame or block with a causal transformer over time.

    Paper: UCF-101, FVD 96.33 for 437.54 (C-ViViT) and 316.70 (hybrid); image FID 7.06, 28.02, 13.52.
    Remark: in PSNR C-ViViT leads, in single frames the hybrid; after 400 steps C-ViViT led here, too.
    Read from experiments/video_designs.py: 9 frames of 16 x 16 pixels, equal parameters, its longest runs,
    its own seeds.
    """
    r = lab.read("video-designs", "python experiments/video_designs.py")
    steps = max(row["steps"] for row in r["rows"])
    arms = {}
    for row in r["rows"]:
        if row["steps"] == steps:
            arms.setdefault(row["design"], []).append(row)
    lab.source["seeds"] = sorted({row["seed"] for row in r["rows"]})
    training_s = sum(row["steps"] * row["ms_per_step"] / 1000 for row in r["rows"])
    lab.source["seconds"] = round(training_s)
    tests = [test("frechet_clips", "causal 3-D CNN", other) for other in ("C-ViViT", "hybrid")]
    return arms, tests, [("frechet_clips", "reconstructed clips"), ("psnr", "reconstructed clips")]


def compression(lab):
    """18. MAGVIT-v2: at a low rate LFQ tokens look better than H.265.

    Paper: 0.0384 bpp, LPIPS 0.104 for 0.199, but PSNR 26.18 for 30.10 and MS-SSIM 0.894 for 0.943; raters
        prefer the tokens.
    Remark: H.265 is far ahead on both measures, on which it leads in the paper, too; the claim rests on
        LPIPS, not at hand.
    Read from experiments/compression.py: tokenizers of minutes; LPIPS, the paper's measure, needs weights
    that were not at hand.
    """
    r = lab.read("compression", "python experiments/compression.py --film FILE --test FILE")
    arms = {}
    tests = []
    for of in r["seeds"]:
        for part in of["tests"]:
            for row in part["at_equal_rate"]:
                if row["codec"] != "H.265" or row["psnr_of_codec"] is None:
                    continue
                ours = f"{part['name']}, {row['lfq']}"
                theirs = f"{part['name']}, H.265 at that rate ({row['lfq'][5:]})"
                if ours not in arms:
                    tests += [test(metric, ours, theirs, "higher") for metric in ("ms_ssim", "psnr")]
                for arm, suffix in ((ours, ""), (theirs, "_of_codec")):
                    numbers = {key: row[key + suffix] for key in ("psnr", "ms_ssim")}
                    arms.setdefault(arm, []).append(numbers | dict(bpp=row["bpp"]))
    if not arms:
        raise data.BadInput("results/compression.json has no row of H.265: run experiments/compression.py "
                            "with its films")
    lab.source["seeds"] = [of["seed"] for of in r["seeds"]]
    return arms, tests, [("ms_ssim", "at equal rate"), ("psnr", "at equal rate")]


def joint_training(lab):
    """19. Ours: VAE and transformer trained together reach a better bound than one after the other.

    Paper: none; GIVT leaves it to future work.
    Read from experiments/joint.py: MNIST's test set, equal seconds.
    """
    r = lab.read("joint", "python experiments/joint.py --data PATH")
    lab.source["seeds"] = sorted({row["seed"] for row in r["arms"]["joint"]})
    tests = [test("bound", "joint", "two stages"), test("bound", "two stages", "VAE alone")]
    return r["arms"], tests, [("bound", "the bound"), ("pixels", "of it: pixels, given the tokens")]


def annealed_steps(lab):
    """20. Ours: denoising steps annealed from the first token to the last cost less and lose nothing.

    Paper: none; experiments/mar_curves.py at a larger scale: 25:5 instead of 100 is 2.0 times faster, at +4%
        distance.
    Remark: 25:5 is 3.2 times as fast as 100 and loses about 6%, as much as 25 steps throughout.
    As good: not more than 10% of the distance lost.
    """
    arms = {text: lab.arm(VAE, f"{MAR} diffusion", diffusion_steps=text)
            for text in ("100", "25", "25:5", "5")}
    tests = [test("frechet", "25:5", "100", times=1.1), test("ms_per_image", "25:5", "100", times=0.5)]
    return arms, tests, [("frechet", "denoising steps, first:last"),
                         ("ms_per_image", "denoising steps, first:last")]


def six_systems(lab):
    """21. Ours: the six systems with one budget, in one table.

    Paper: none.
    Real images: `six-systems --data PATH/mnist.tar.gz PATH/cifar10.tar.gz`, made as small as the drawn ones.
    Guidance and temperature of sample.py's defaults. Validation losses of different heads and tokens are not
    comparable; of GIVT and LlamaGen they are nats per token.
    """
    systems = {"GIVT": (VAE, GIVT), "MAR": (VAE, f"{MAR} diffusion"), "LlamaGen": (VQ, LLAMA),
               "MaskGIT": (VQ, MASKED), "MAGVIT-v2": ("--tokenizer lfq", MASKED),
               "TiTok": ("--tokenizer titok --tokens 8", MASKED)}
    arms, panels = {}, []
    for path in lab.images or ("shapes",):
        lab.data = path
        images = Path(path).name.split(".")[0]
        arms |= {f"{name}, {images}": lab.arm(*flags, cfg=None, temperature=None)
                 for name, flags in systems.items()}
        here = [f"{name}, {images}" for name in systems]
        panels += [(metric, f"samples, {images}", here) for metric in ("frechet", "accuracy")]
    lab.data = "shapes"
    return arms, [], panels


def bars_and_stripes(n, device, side=4):
    """n pictures, uniform over the 2 (2^side - 1) distinct ones with full rows or full columns -> (n, side^2)
    int64.
    """
    bits = torch.arange(1 << side, device=device)[:, None] >> torch.arange(side, device=device) & 1
    rows = bits[:, :, None].expand(-1, -1, side)
    all_ = torch.cat([rows, rows.transpose(1, 2)[1:-1]]).flatten(1)       # blank and full only once
    return all_[torch.randint(len(all_), (n,), device=device)]


def fit_ids(model, batches, steps, lr=2e-3):
    """Train on batches(step) -> tokens, labels; returns the losses."""
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    losses = []
    for step in range(steps):
        opt.param_groups[0]["lr"] = lr * min(1, (step + 1) / 30) * (1 - step / steps)
        loss, _ = model(*batches(step))
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        losses.append(loss.item())
    return losses


def error_of_parallel_decoding(model, steps, n=1500, **options):
    """Draw n bars-and-stripes in `steps` passes -> share that are valid, total variation to the truth.

    The truth is uniform over 30. 1500 draws from the truth itself would show a total variation of 0.06.
    """
    device = model.pos_embed.device
    drawn = model.sample(torch.zeros(n, dtype=torch.long, device=device), steps=steps, **options)
    all_ = bars_and_stripes(5000, device).unique(dim=0)                                     # (30, 16)
    p = (drawn[:, None] == all_[None]).all(-1).float().mean(0)                              # (30,)
    return p.sum().item(), 0.5 * ((p - 1 / 30).abs().sum() + 1 - p.sum()).item()


def yardsticks(lab):
    """22. Yardstick: likelihood models end within 2% above the exact optimum, and never below it.

    Paper: none; the optimum is known.
    Percent of |optimum|, or of 1 nat where that is smaller (both mixtures of Gaussians). As ids: bars and
    stripes, ln 30 nats at 4 x 4, ln 510 at 8 x 8; as vectors: 4 x 4 as -1 and 1 with noise of 0.1. Model and
    truth are asked for the density of the same points, so the excess is an estimate of a KL divergence, and
    chance hardly takes it below 0.
    """
    models = {"GMM head, 8 Gaussians": lambda seed: excess_of_head("ring8", seed),
              "GMM head, 25 Gaussians": lambda seed: excess_of_head("grid25", seed),
              "AR ids, bars 4 x 4": lambda seed: excess_of_bars(4, seed),
              "AR ids, bars 8 x 8": lambda seed: excess_of_bars(8, seed, 600),
              "AR vectors, bars 4 x 4": lambda seed: excess_of_bars(4, seed, 1500, noise=0.1)}
    arms = {name: [] for name in models}
    for name, seed in [(name, seed) for name in models for seed in lab.seeds]:
        start = lab.clock()
        arms[name].append(models[name](seed))
        lab.spent[f"{name} {seed}"] = lab.clock() - start
        print(f"seed {seed}, {name}: {arms[name][-1]['excess']:.2f}% above the optimum", flush=True)
    arms |= {"2%": [dict(excess=2.0)] * len(lab.seeds), "0%": [dict(excess=0.0)] * len(lab.seeds)}
    tests = [test("excess", a, b, every=True) for name in models for a, b in ((name, "2%"), ("0%", name))]
    return arms, tests, [("excess", "above the exact optimum", list(models))]


def excess_of_head(name, seed, steps=2000):
    """A GMM head alone on 2-D mixtures with known density -> {excess: %}.

    Eight components for every mode: gradients move a component to the modes that it can see, and with two for
    every mode some modes of 25 have to share one.
    """
    torch.manual_seed(seed)
    modes, std = modes_of(name)
    points = lambda n: modes[torch.randint(len(modes), (n,))] + std * torch.randn(n, 2)
    table, head = torch.nn.Embedding(1, 16), gmm_head.GMMHead(16, 2, 8 * len(modes))
    opt = torch.optim.Adam([*table.parameters(), *head.parameters()], lr=2e-2)
    zero = torch.zeros(1, dtype=torch.long)
    for step in range(steps):
        opt.param_groups[0]["lr"] = 2e-2 * (1 - step / steps)
        loss = head.loss(table(zero).expand(256, -1), points(256)).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    x = points(50_000)
    normal = torch.distributions.Independent(torch.distributions.Normal(modes, std), 1)
    even = torch.distributions.Categorical(torch.ones(len(modes)))
    truth = torch.distributions.MixtureSameFamily(even, normal).log_prob(x)
    best = -truth.mean().item()
    with torch.no_grad():
        excess = (truth - head.log_prob(table(zero), x)).mean().item()
    return dict(excess=100 * excess / max(1, abs(best)), nats=best + excess, optimum=best)


def excess_of_bars(side, seed, steps=400, noise=None):
    """The AR transformer on bars and stripes as ids, or as vectors with noise -> {excess: %}."""
    torch.manual_seed(seed)
    T, zeros = side * side, torch.zeros(64, dtype=torch.long)
    head = ar_transformer.CategoricalHead(64, 2) if noise is None else gmm_head.GMMHead(64, 1, 4)
    model = ar_transformer.ARTransformer(head, T, 1, token_dim=noise and 1, vocab_size=None if noise else 2,
                                         grid=(side, side), n_layer=2, n_head=2, n_embd=64, label_drop=0)

    def look(ids):
        return ids if noise is None else ids[..., None] * 2.0 - 1 + noise * torch.randn(*ids.shape, 1)
    fit_ids(model, lambda step: (look(bars_and_stripes(64, "cpu", side)), zeros), steps, 5e-3)
    model.eval()
    pictures = bars_and_stripes(20_000, "cpu", side).unique(dim=0)           # all that there are
    x = look(pictures if noise is None else pictures.repeat(40, 1))
    with torch.no_grad():
        parts = [(v, torch.zeros(len(v), dtype=torch.long)) for v in x.split(128)]
        nats = torch.cat([model.head.loss(model.hidden_states(v, cond), v) for v, cond in parts]).sum(1)
    optimum = truth = math.log(len(pictures))
    if noise is not None:                                   # a mixture of 30 Gaussians in 16 dimensions
        modes = torch.distributions.Normal(pictures * 2.0 - 1, noise)
        log_p = [modes.log_prob(v.transpose(1, 2)).sum(-1).logsumexp(1) for v in x.split(100)]
        truth = truth - torch.cat(log_p)
        optimum += T * math.log(noise * math.sqrt(2 * math.pi * math.e))
    excess = (nats - truth).mean().item()
    return dict(excess=100 * excess / abs(optimum), nats=nats.mean().item(), optimum=optimum)


def parallel_gap(lab):
    """23. Yardstick: parallel decoding has a price, and more steps pay it off.

    Paper: none.
    MaskGIT on bars and stripes 4 x 4, total variation between 1,500 samples and the uniform truth over the 30
    pictures, against the number of passes. 1,500 draws from the truth itself would show 0.06.
    """
    passes = {n: f"{n} passes" for n in (1, 2, 4, 8, 16)}
    arms = {name: [] for name in passes.values()}
    for seed in lab.seeds:
        start = lab.clock()
        torch.manual_seed(seed)
        model = maskgit.MaskGIT(maskgit.CategoricalHead(64, 2), 16, 1, vocab_size=2, n_layer=2, n_head=4,
                                n_embd=64, label_drop=0, smoothing=0)
        zeros = torch.zeros(128, dtype=torch.long)
        fit_ids(model, lambda step: (bars_and_stripes(128, "cpu"), zeros), 500, 5e-3)
        for n, name in passes.items():
            valid, distance = error_of_parallel_decoding(model.eval(), n, 1500)
            arms[name].append(dict(valid=100 * valid, distance=distance))
        lab.spent[f"seed {seed}"] = lab.clock() - start
        distances = "  ".join(f"{name} {rows[-1]['distance']:.3f}" for name, rows in arms.items())
        print(f"seed {seed}: {distances}", flush=True)
    tests = [test("distance", passes[16], passes[1]), test("distance", passes[16], passes[4])]
    return arms, tests, [("distance", "passes over 16 ids", passes), ("valid", "passes over 16 ids", passes)]


CLAIMS = {f.__name__.replace("_", "-"): f for f in (
    gmm_components, flow_adapter, variance_and_guidance, guidance_by_rejection, diffusion_loss,
    order_and_attention, mar_figures, decoding_noise, vqvae_prior, few_steps, one_dimensional, code_dimension,
    model_size, guidance_trade_off, vocabulary, entropy_terms, causal_video, compression, joint_training,
    annealed_steps, six_systems, yardsticks, parallel_gap)}


# ---------------------------------------------------------------------------------------------------
# A public benchmark: nats per image of binarised MNIST

PUBLISHED = {"MADE": 84.9, "PixelCNN": 81.4, "ImageGPT": 79.2}    # README of EugenHotaj/pytorch-generative


class Binary:
    """Images of 28 x 28 as 784 bits. A pixel of grey g in [0, 1] is 1 with probability g: drawn anew for each
    batch of training ("dynamic"), once and for all with seed 0 for the test set."""

    def __init__(self, images, once, block):
        self.grey = images[:, 0]
        self.labels = torch.zeros(len(images), dtype=torch.long)
        self.block = block
        self.bits = None
        if once:
            generator = torch.Generator().manual_seed(0)
            bits = [torch.bernoulli(x / 255, generator=generator).byte() for x in self.grey.split(1000)]
            self.bits = torch.cat(bits)

    def __len__(self):
        return len(self.labels)

    def batch(self, index):
        """(B,) -> ids (B, (28 / block)^2) below 2^(block^2), labels (B,), all 0: no class is told.

        An id is a whole block of pixels, so nothing is lost, and the likelihood of the ids is the likelihood
        of the pixels.
        """
        bits = torch.bernoulli(self.grey[index] / 255) if self.bits is None else self.bits[index]
        b = self.block
        blocks = bits.long().view(-1, 28 // b, b, 28 // b, b).transpose(2, 3)
        blocks = blocks.flatten(3).flatten(1, 2)            # (B, T, b * b)
        return (blocks << torch.arange(b * b)).sum(-1), self.labels[index]


def mnist_nats(args, device):
    """Train the AR transformer on the pixels of binarised MNIST, without classes -> nats per test image.

        python experiments/claims.py mnist-nats --data PATH/mnist.tar.gz    # killed? the same command goes on

    Writes results/claims/mnist-nats.json and .png; the run, with its log, lies in runs/claims. A token is a
    block of 2 x 2 pixels, one of 16: still exact, and 14 times less work than a token per pixel (--block 1).
    """
    if len(args.data) != 1:
        raise data.BadInput("mnist-nats: needs one path with --data: MNIST as class folders, .tar.gz or "
                            ".npz, train/ and test/")
    folder = args.runs / f"mnist-nats-{args.block}-{args.size}-{args.steps}"
    cpu = torch.device("cpu")
    names = SimpleNamespace(data=args.data[0], image_size=28, seed=0, flip=False, n_shapes=None, frames=1)
    sets = {split: Binary(runs.open_split(names, split, cpu).images, split == "val", args.block)
            for split in ("train", "val")}
    torch.manual_seed(0)
    size = ar_transformer.SIZES[args.size]
    side, V = 28 // args.block, 1 << args.block ** 2
    head = ar_transformer.CategoricalHead(size["n_embd"], V)
    model = ar_transformer.ARTransformer(head, side * side, 1, vocab_size=V, grid=(side, side), label_drop=0,
                                         **size)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = runs.read_checkpoint(folder)
    none = dict.fromkeys(runs.STAGE1 + runs.STAGE2 + runs.BOTH)
    flags = SimpleNamespace(**none | dict(
        steps=args.steps, batch_size=args.batch_size, lr=args.lr, seed=0, tokenizer="pixels",
        head="categorical", optimizer="muon", warmup=50, weight_decay=0.02, grad_clip=1.0, dtype=None,
        device=device, compile=device.type == "cuda", accumulate=1, recompute=False, shard=False,
        log_every=100, eval_every=max(50, args.steps // 20), resume2=checkpoint is not None))
    if checkpoint is None or not checkpoint["done"]:
        train.fit(2, model, OnDevice(sets["train"], device), OnDevice(sets["val"], device, 200), flags,
                  SimpleNamespace(rank=0, size=1), folder, lambda model: None, dict(classes=["digit"]))
    model.load_state_dict(runs.averaged(runs.read_checkpoint(folder)))
    model.to(device).eval()
    index, nats = torch.arange(min(args.n_test, len(sets["val"]))), []
    with torch.no_grad():
        for i in index.split(50):
            ids, labels = (v.to(device) for v in sets["val"].batch(i))
            nats.append(model.head.loss(model.hidden_states(ids, labels), ids).sum(1).cpu())
    nats = torch.cat(nats).double()
    with open(folder / "log.csv", newline="") as f:
        log = list(csv.DictReader(f))
    steps = [0] + [int(r["step"]) for r in log]
    seconds = sum((b - a) * float(r["ms_per_step"]) / 1000 for a, b, r in zip(steps, steps[1:], log))
    result = dict(nats=nats.mean().item(), standard_error=nats.std().item() / len(nats) ** 0.5,
                  test_images=len(nats), published=PUBLISHED, binarisation=" ".join(Binary.__doc__.split()),
                  block=args.block, steps=args.steps, size=args.size, batch_size=args.batch_size, lr=args.lr,
                  seeds=[0], seconds=round(seconds), steps_per_s=args.steps / seconds,
                  threads=torch.get_num_threads(),
                  curve=[(int(r["step"]), side ** 2 * float(r["val_loss"])) for r in log if r["val_loss"]])
    result |= age.of_run(device)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "mnist-nats.json").write_text(json.dumps(result, indent=1) + "\n")
    save_nats(args.out / "mnist-nats.png", result)
    print(f"binarised MNIST: {result['nats']:.2f} +- {result['standard_error']:.2f} nats, "
          f"{seconds / 60:.1f} minutes")


class OnDevice:
    """A set whose batches are moved to the device. most: of no more than so many of its examples."""

    def __init__(self, source, device, most=None):
        self.source, self.device, self.n = source, device, min(len(source), most or len(source))

    def __len__(self):
        return self.n

    def batch(self, index, share=slice(None)):
        return tuple(v.to(self.device) for v in self.source.batch(index[share]))


def save_nats(path, result):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(5.4, 3.5))
    ax.plot(*zip(*result["curve"]), "o-", ms=4, label="on the way, 200 test images")
    ax.axhline(result["nats"], color="C0", ls=":",
               label=f"{result['test_images']:,} test images: {result['nats']:.1f}")
    for k, (name, value) in enumerate(result["published"].items()):
        ax.axhline(value, color=f"C{k + 1}", lw=1, label=f"{name}: {value}")
    ax.set(xlabel="training step", ylabel="nats per image", title="binarised MNIST, AR transformer on pixels",
           ylim=(75, max(130, 1.1 * result["nats"])))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=65)
    plt.close(fig)


# ---------------------------------------------------------------------------------------------------
# Result files, figures, the table

def words_of(claim):
    """-> number, the claim in a sentence, what the paper reports, a remark: from the docstring."""
    first, *rest = inspect.cleandoc(claim.__doc__).replace("\n    ", " ").split("\n")
    number, text = first.split(". ", 1)
    said = {}
    for line in rest:
        word, _, what = line.partition(": ")
        said.setdefault(word, what)
    return int(number), text.rstrip("."), said.get("Paper", ""), said.get("Remark", "")


def run_claim(name, lab, out):
    """Run one claim -> its result, written with its figure."""
    lab.spent, lab.flags, lab.source = {}, {}, {}
    arms, tests, panels = CLAIMS[name](lab)
    number, text, paper, remark = words_of(CLAIMS[name])
    tests = [judge_test(t, arms) for t in tests]
    result = dict(claim=name, number=number, text=text, paper=paper, remark=remark,
                  verdict=judge_claim(tests), tests=tests, threads=torch.get_num_threads(),
                  seconds=round(sum(lab.spent.values()), 1), seeds=lab.seeds, scale=lab.scale,
                  flags=list(lab.flags), arms=arms, panels=panels)
    result |= age.of_run(lab.device) | lab.source
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    save_figure(out / f"{name}.png", result)
    for t in tests:
        print(sentence(t))
    seconds = sum(lab.spent.values())
    print(f"{name}: {result['verdict']}   ({seconds:.0f} s, shared runs included)", flush=True)
    return result


def spread(values):
    """Mean +- standard deviation over the seeds, to as many digits as the latter deserves."""
    m = mean(values)
    std = stdev(values) if len(values) > 1 else abs(m) / 100
    if std == 0:                                            # a bound, not a measurement
        return f"{m:.4g}"
    places = min(4, max(int(abs(m) < 100), -math.floor(math.log10(max(std, 1e-9)))))
    return f"{m:.{places}f}" + f" +- {std:.{places}f}" * (len(values) > 1)


def sentence(t):
    bound = f"{t['times']:g} x " * (t["times"] != 1)
    give = f" {'+' if t['better'] == 'lower' else '-'} {t['give']:g}" if t["give"] else ""
    label = LABELS.get(t["metric"], t["metric"]).removesuffix(", %").removesuffix(" (small CNN)")


    def side(name, values):                                 # "2%" is a bound, not a measurement
        return name if name[0].isdigit() and name.endswith("%") else f"{name} {spread(values)}"
    every = ", every seed" if t.get("every") else ""
    return (f"{label}: {side(t['arm'], t['values'])}, {t['better']} than "
            f"{bound}{side(t['other'], t['other_values'])}{give}{every}: {t['verdict']}")


def save_figure(path, result):
    """Arms one below the other, or a curve along a setting: mean (large) and each seed (small)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    panels = [(metric, title, names[0] if names else list(result["arms"]))
              for metric, title, *names in result["panels"]]
    tall = max([len(names) for _, _, names in panels if not isinstance(names, dict)], default=0)
    figsize = 2.2 + 3.2 * len(panels), max(3.4, 1.7 + 0.27 * tall)
    fig, axes = plt.subplots(1, len(panels), figsize=figsize, squeeze=False)
    shown = None
    for k, (ax, (metric, title, names)) in enumerate(zip(axes[0], panels)):
        arms = names.values() if isinstance(names, dict) else names
        values = [[row[metric] for row in result["arms"][arm]] for arm in arms]
        label = LABELS.get(metric, metric.replace("_", " "))
        if isinstance(names, dict):
            x = [float(v) for v in names]                   # a result that was read back has text here
            for at, v in zip(x, values):
                ax.plot([at] * len(v), v, ".", color="0.45", ms=5)
            ax.plot(x, [mean(v) for v in values], "o-", color=f"C{k}")
            ax.set(xlabel=title, ylabel=label)
            if min(x) > 0 and max(x) >= 8 * min(x):
                ax.set_xscale("log", base=2)
                ax.set_xticks(x, [f"{v:g}" for v in x])
        else:
            for at, v in enumerate(values):
                ax.plot(v, [at] * len(v), ".", color="0.45", ms=5)
            ax.plot([mean(v) for v in values], range(len(names)), "D", color=f"C{k}", ms=6)
            ax.set(title=title, xlabel=label, ylim=(len(names) - 0.5, -0.5))
            ax.set_yticks(range(len(names)), names if names != shown else [""] * len(names), fontsize=9)
            shown = names
        ax.title.set_fontsize(10)
        ax.grid(alpha=0.3)
    text = "\n".join(textwrap.wrap(f"{result['number']}. {result['text']}", 28 * len(panels) + 20))
    fig.suptitle(f"{text}\n{verdict_of(result)}; small dots: {len(result['seeds'])} seeds", fontsize=10)
    fig.tight_layout()
    fig.savefig(path, dpi=65)
    plt.close(fig)


def verdict_of(result):
    if not result["tests"]:
        return result["verdict"]
    holding = sum(t["verdict"] == "holds" for t in result["tests"])
    return f"{result['verdict']} ({holding} of {len(result['tests'])} tests hold)"


def table(out):
    """Markdown from the result files: every claim and its verdict, then, folded, the tests, then what is
    missing.
    """
    lines = ["| claim | reported | verdict | here | run |", "|---" * 5 + "|"]
    numbers, missing, verdicts = [], [], []
    for name, claim in CLAIMS.items():
        number, text, paper, remark = words_of(claim)
        path = out / f"{name}.json"
        if not path.exists():
            missing.append(f"{number} (`{name}`)")
            continue
        r = json.loads(path.read_text())
        verdicts.append(r["verdict"])
        tests = [sentence(t) for t in r["tests"]] or ["The table below."]
        here = remark[:1].upper() + remark[1:] or tests[0].rsplit(": ", 1)[0]     # without the verdict
        link = f"[{text}](../experiments/results/claims/{name}.png)"
        lines.append(f"| {number}. {link} | {paper} | **{verdict_of(r)}** | {here} | {age_of(r)} |")
        numbers.append(f"| {number} | {'<br>'.join(tests)} |")
    lines += ["",
              "<details><summary>The tests in numbers: mean and standard deviation over the seeds</summary>",
              "", "| claim | tests |", "|---|---|", *numbers, "", "</details>"]
    counts = [f"{word}: {verdicts.count(word)}" for word in ("holds", "does not hold", "undecided here")]
    counts = "; ".join(counts)
    text = f"{counts[:1].upper()}{counts[1:]}.\n\n" + "\n".join(lines)
    if (out / "six-systems.json").exists():
        r = json.loads((out / "six-systems.json").read_text())
        s = r["scale"]
        text += wrapped(f"Claim 21: {s['image_size']} x {s['image_size']} pixels, 16 tokens (TiTok: 8), "
                        f"{s['tok_steps']} + {s['steps']} training steps, {s['n']} samples at sample.py's "
                        f"guidance, {len(r['seeds'])} seeds, {r['machine']}, threads: {r['threads']}, "
                        f"{age_of(r)}. The validation losses of different heads and tokens are not "
                        "comparable.")
        text += "\n\n" + systems_table(r["arms"])
    if (out / "mnist-nats.json").exists():
        r = json.loads((out / "mnist-nats.json").read_text())
        published = ", ".join(f"{name} {value}" for name, value in r["published"].items())
        curve = "[curve](../experiments/results/claims/mnist-nats.png)"
        text += wrapped(f"Binarised MNIST, AR transformer on blocks of 2 x 2 pixels ({curve}): "
                        f"**{r['nats']:.1f}** nats per test image after {r['seconds'] / 60:.0f} minutes "
                        f"({r['machine']}, threads: {r['threads']}, {age_of(r)}; published: {published}).")
    return text + (f"\n\nNot run: {', '.join(missing)}." if missing else "")


def age_of(result):
    """Date and commit of a result, as the table tells them."""
    return f"{result['date']}, {result['commit']}"


def wrapped(paragraph):
    """A paragraph behind an empty line, in lines of at most 108 characters."""
    return "\n\n" + "\n".join(textwrap.wrap(paragraph, 108, break_long_words=False, break_on_hyphens=False))


def systems_table(arms):
    """Claim 21 in Markdown: a line per system, means over the seeds."""
    columns = {"parameters": "parameters", "train_s": "training, s", "ms_per_image": "ms per image",
               "nll": "validation loss", "frechet": "Frechet distance", "accuracy": "class accuracy, %",
               "precision": "precision, %", "recall": "recall, %"}
    lines = ["| " + " | ".join(["system", *columns.values()]) + " |", "|---" * (1 + len(columns)) + "|"]
    for name, rows in arms.items():
        cells = [f"{rows[0][key]:,}" if key == "parameters" else spread([row[key] for row in rows])
                 for key in columns]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def fill_readme(path, text):
    """Put text between the two markers of docs/claims.md; refuses a file without them."""
    readme, begin, end = path.read_text(), "<!-- claims -->", "<!-- /claims -->"
    if readme.count(begin) != 1 or readme.count(end) != 1:
        raise data.BadInput(f"{path}: needs the markers {begin} and {end} once each, around the place of the "
                            "table")
    before, rest = readme.split(begin)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def show_list(out):
    for name, claim in CLAIMS.items():
        number, text, *_ = words_of(claim)
        path = out / f"{name}.json"
        verdict = json.loads(path.read_text())["verdict"] if path.exists() else "not run"
        print(f"{number:2d}  {name:24s} {verdict:20s} {text}")


def main(argv=None):
    p = argparse.ArgumentParser(description="Claims of the papers at small scale.")
    p.add_argument("names", nargs="*", help="which claims (default: list them)")
    p.add_argument("--all", action="store_true",
                   help="run all claims, then rebuild the table in docs/claims.md")
    p.add_argument("--table", action="store_true",
                   help="table in docs/claims.md and figures anew from the result files")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2],
                   help="a seed is a world, a tokenizer, a generator")
    p.add_argument("--runs", default=ROOT / "runs" / "claims", type=Path, help="where the runs lie")
    p.add_argument("--out", default=ROOT / "experiments" / "results" / "claims", type=Path,
                   help="where results go")
    p.add_argument("--device", help="cpu, cuda (default: CUDA if there is one)")
    p.add_argument("--data", nargs="+", default=[],
                   help="six-systems: real images, each as class folders in train/ and test/, .tar.gz or "
                        ".npz (default: the drawn shapes); mnist-nats: MNIST, likewise")
    g = p.add_argument_group("mnist-nats")
    g.add_argument("--block", type=int, default=2, choices=[1, 2],
                   help="side of the block of pixels that is a token")
    g.add_argument("--steps", type=int, default=5000, help="training steps")
    g.add_argument("--size", default="tiny", choices=list(ar_transformer.SIZES),
                   help="size of the transformer")
    g.add_argument("--batch_size", type=int, default=32, help="images per step")
    g.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    g.add_argument("--n_test", type=int, default=10_000, help="test images of the last measurement")
    args = p.parse_args(argv)
    if args.names == ["mnist-nats"]:
        return mnist_nats(args, runs.pick_device(args.device))
    for name in args.names:
        if name not in CLAIMS:
            raise data.BadInput(f"{name}: not a claim; `python experiments/claims.py` lists them")
    if args.table:
        for name in CLAIMS:
            if (args.out / f"{name}.json").exists():
                save_figure(args.out / f"{name}.png", json.loads((args.out / f"{name}.json").read_text()))
    elif not args.names and not args.all:
        return show_list(args.out)
    else:
        device = runs.pick_device(args.device)
        lab = Lab(SCALE["cuda" if device.type == "cuda" else "cpu"], args.seeds, args.runs, device, args.data)
        for name in CLAIMS if args.all else args.names:
            try:
                run_claim(name, lab, args.out)
            except data.BadInput as e:                      # what another experiment measures is not there
                if not args.all:
                    raise
                print(f"{name}: not run. {e}")
    if args.all or args.table:
        fill_readme(ROOT / "docs" / "claims.md", table(args.out))


if __name__ == "__main__":
    main()
