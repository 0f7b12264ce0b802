"""
One stage instead of two: a VAE and its generator trained together, by the exact bound on log p(image).

GIVT (arxiv.org/abs/2312.02116) trains a VAE first, whose tokens are drawn towards N(0, 1), then a transformer
that models them. Training both together it leaves to future work. Here is that work, and the yardstick for
it: a bound in bits per dimension (pixel value), which holds however the two were trained,

    -log p(image | c)  <=  E[ -log p(image | z) ] + E[ -log p(z | c) ] - H( q(z | image) ),  z ~ q(z | image)

                           the decoder's pixels     the generator        what the draw of z gives back

    python -m recipes.joint                    # trains both at once, draws, measures
    python -m recipes.joint --two_stages       # the same networks one after the other, and the same measure
    python -m recipes.joint --data mnist.tar.gz --image_size 28 --channels 1 --tok_size mnist28 --size tiny

--two_stages also takes --likelihood mse and --corrupt, a denoising VAE, which have no bound. Every flag of
train.py for a VAE and an autoregressive generator goes with it: --size, --n_mix, --resume and so on.
sample.py and evaluate.py read the run. On MNIST, 300 steps each: joint 1.501, two stages 1.535, the VAE alone
1.596 bits (experiments/joint.py).

Try it yourself:
  1. Print prior minus entropy during training. Which of the two ways spends more bits on tokens, which on
     pixels?
  2. Leave the entropy out of the loss. What becomes of std, and why does the bound no longer hold?
  3. Replace the generator by N(0, 1), as Alone in experiments/joint.py. What does the transformer save?
"""
import argparse
import math
from types import SimpleNamespace

import torch
import torch.nn as nn

import train
from common import age, drawing, metrics, runs
from data import BadInput

# Options of the VAE beyond the flags of train.py.
DEFAULT = dict(likelihood="logistic", channels=3, corrupt=0.0)


# ---- The bound -----------------------------------------------------------------------------------

def bound(vae, generator, images, cond):
    """The bits per dimension that VAE and generator need at most -> loss (), logs of its three terms.

    images (B, 3, H, W), cond (B,). The prior is the generator, whose forward gives -log p(tokens | c) in nats
    per token, exactly: it must be autoregressive and its head a density. The vae has likelihood="logistic".
    With N(0, 1) in the prior's place this is -log p(image | z) + KL, the VAE's own bound. A sharper q is paid
    for by H, so nothing is gained by shrinking std. One draw of z per image. Images are never corrupted here.
    Raises ValueError for a VAE without a likelihood of pixels, or without a posterior (beta 0).
    """
    if vae.likelihood != "logistic" or vae.beta == 0:
        raise ValueError('a bound on the likelihood needs VAE(likelihood="logistic") and a beta above 0')
    mean, std = vae.posterior(images)
    z = vae.reparameterise(mean, std)                                                 # (B, T, D)
    T = vae.seq_len
    dims = math.log(2) * vae.pixels(images)[0].numel()                            # nats -> bits per dimension
    pixels = -vae.log_likelihood(images, vae.decode_raw(z)).mean()                    # nats per image
    # The generator's density is one of normalised tokens: p(z) = p(tokens) * prod(latent_scale), T times.
    prior = T * (generator(vae.normalise(z), cond)[0] - vae.latent_scale.log().sum())
    entropy = T * (std.log() + 0.5 * math.log(2 * math.pi * math.e)).mean((0, 1)).sum()
    logs = {"pixels": pixels / dims, "prior": prior / dims, "entropy": entropy / dims}
    loss = logs["pixels"] + logs["prior"] - logs["entropy"]
    return loss, {name: value.detach() for name, value in logs.items()}


class Joint(nn.Module):
    """VAE and generator as one model: z has no N(0, 1) to obey, only a generator to suit.

    Call vae.measure() before training or never: afterwards the generator would meet tokens that it does not
    know. beta and corrupt of the VAE play no part.
    """

    def __init__(self, vae, generator):
        super().__init__()
        self.vae = vae
        self.generator = generator

    def forward(self, images, cond):
        """images (B, 3, H, W), cond (B,) -> loss in bits per dimension (), logs: its three terms."""
        return bound(self.vae, self.generator, images, cond)


# ---- The program ---------------------------------------------------------------------------------

def parse_args(argv=None):
    """-> the flags of this recipe, those of train.py. Raises BadInput for what does not go together."""
    p = argparse.ArgumentParser(allow_abbrev=False, description="Train a VAE and its generator by one bound. "
                                                                "All flags of train.py go with it.")
    p.add_argument("--two_stages", action="store_true", help="one after the other, to compare with")
    p.add_argument("--likelihood", choices=["logistic", "mse"],
                   help="of a pixel: a discretised logistic of its 256 values, or a Gaussian (--two_stages)")
    p.add_argument("--channels", type=int, choices=[1, 3],
                   help="1: grey images (colours are averaged), 3: RGB")
    p.add_argument("--corrupt", type=float,
                   help="--two_stages: standard deviation of noise on the VAE's input, to be removed")
    p.add_argument("--at_once", type=int, default=250, help="images measured at a time")
    own, rest = p.parse_known_args(argv)
    given = train.parse_args(["--tokenizer", "vae", *rest])
    for wrong, sentence in REFUSALS:
        if wrong(own, given):
            raise BadInput(sentence)
    return own, given


REFUSALS = [  # what is asked, the sentence
    (lambda own, given: given.tokenizer != "vae", "--tokenizer: the bound is that of a VAE; leave it out"),
    (lambda own, given: given.frames not in (None, 1), "--frames: the bound is of images; leave it out"),
    (lambda own, given: given.condition == "text",
     "--condition: the bound is of images of a class; leave it out"),
    (lambda own, given: given.gan or given.perceptual,
     "--gan, --perceptual: their losses mean something else than a bound; leave them out"),
    (lambda own, given: own.at_once < 1, "--at_once: must be at least 1"),
    (lambda own, given: own.corrupt is not None and not 0 <= own.corrupt < math.inf,
     "--corrupt: must not be negative"),
    (lambda own, given: not own.two_stages and (given.generator != "ar" or given.head != "gmm"),
     "--generator, --head: joint training needs --generator ar and --head gmm, for an exact density; or give "
     "--two_stages"),
    (lambda own, given: not own.two_stages and (own.likelihood == "mse" or given.beta not in (None, 1)),
     "--likelihood, --beta: joint training maximises a bound on the likelihood, so logistic and 1; or give "
     "--two_stages"),
    (lambda own, given: not own.two_stages and own.corrupt,
     "--corrupt: the bound is of images as they are; give --two_stages with it"),
]


def main(argv=None):
    own, given = parse_args(argv)
    torch.set_float32_matmul_precision("high")              # TF32 on GPUs that have it, as in train.py
    dist = runs.join_processes(given)
    try:
        if own.two_stages:
            folder = train_two_stages(own, given, dist)
        else:
            folder = train_joint(own, given, dist)
    except KeyboardInterrupt:
        raise BadInput("stopped; the same command with --resume goes on from the last checkpoint") from None
    finally:
        runs.leave_processes(dist)
    if dist.rank == 0 and given.generator != "none":
        report(runs.load_run(folder, runs.pick_device(given.device)), own.at_once)


def train_joint(own, given, dist):
    """Both at once, from scratch, unless it is done -> the run folder."""
    _, folder = runs.folders(given)
    if not given.name:
        folder = folder.with_name(folder.name.replace("-vae", "-vae-joint", 1))
    args = runs.resolve(with_options(own, given, folder), None, folder)
    args.unit = "bits per dimension"
    if args.dtype is None and args.device.type == "cpu":
        args.dtype = "fp32"                                 # it is mostly convolutions, which gain nothing
    runs.refuse(args, dist)
    if args.stage2_done:
        print(f"{folder} is trained already: start again with --overwrite")
        return folder
    train_set, val_set = runs.open_data(args)
    runs.refuse_other_data(args, folder, train_set)
    torch.manual_seed(args.seed)
    tokenizer = runs.build_tokenizer(args)
    if not args.resume2:
        train.start_path(tokenizer, args, train_set)
    generator = runs.build_generator(args, tokenizer, len(train_set.classes))
    extra = dict(classes=train_set.classes, fingerprint=runs.fingerprint(train_set),
                 grid=list(tokenizer.grid))

    def finish(model):
        # From here on the checkpoint is that of any stage 2 run: sample.py and evaluate.py load it.
        extra["tokenizer"] = {name: value.cpu() for name, value in model.vae.state_dict().items()}
        if dist.rank == 0:
            run = SimpleNamespace(folder=folder, args=args, tokenizer=model.vae, generator=model.generator,
                                  classes=train_set.classes, device=args.device)
            drawing.save_samples(folder / "samples.png", run)

    train.fit(2, Joint(tokenizer, generator), train_set, val_set, args, dist, folder, finish, extra)
    return folder


def train_two_stages(own, given, dist):
    """The VAE, then the generator on its tokens, each unless it is done -> the last run folder."""
    tok_folder, folder = runs.folders(given)
    likelihood = own.likelihood or DEFAULT["likelihood"]
    if not given.tok_name:
        tok_folder = tok_folder.with_name(f"{tok_folder.name}-{likelihood}")
    if not given.name:
        folder = folder.with_name(folder.name.replace("-vae", f"-vae-{likelihood}", 1))
    args = runs.resolve(with_options(own, given, tok_folder), tok_folder, folder)
    runs.refuse(args, dist)
    stages = runs.stages_to_train(args, tok_folder, folder)
    if stages:
        train_set, val_set = runs.open_data(args)
        for begun in (tok_folder, folder):
            runs.refuse_other_data(args, begun, train_set)
    if 1 in stages:
        if args.tok_options["likelihood"] == "logistic":
            args.unit = "bits per dimension"
        train.train_tokenizer(args, dist, tok_folder, train_set, val_set)
        args.unit = None
    if 2 in stages:
        train.train_generator(args, dist, folder, tok_folder, train_set, val_set)
    return folder


def with_options(own, given, folder):
    """given, with tok_options: the VAE's options as given, else as saved in a run folder, else DEFAULT."""
    saved = None if given.overwrite else runs.read_checkpoint(folder)
    options = dict(DEFAULT)
    if saved is not None:
        options |= saved["flags"].get("tok_options", {})
    asked = dict(likelihood=own.likelihood, channels=own.channels, corrupt=own.corrupt)
    for name, value in asked.items():
        if value is None:
            continue
        if saved is not None and value != options[name]:
            raise BadInput(f"--{name} {value} does not fit {folder}, which was trained with --{name} "
                           f"{options[name]}: give that value, another folder (--name, --tok_name), or "
                           "--overwrite")
        options[name] = value
    beta = given.beta
    if saved is None and beta is None and options["likelihood"] == "logistic":
        beta = 1.0                                          # the bound itself
    given = runs.on_pixels(given, folder)
    return argparse.Namespace(**vars(given) | dict(tok_options=options, beta=beta))


# ---- Measure -------------------------------------------------------------------------------------

@torch.no_grad()
def measure_bound(vae, generator, val_set, batch_size=250, seed=0):
    """The bound over a whole data.ImageSet -> rows (key, name, (mean, standard error), unit, remark)."""
    order = torch.Generator("cpu").manual_seed(seed)
    index = torch.randperm(len(val_set), generator=order, device="cpu")               # folders come by class
    torch.manual_seed(seed)
    bits = []
    for part in index.split(max(1, min(batch_size, len(index) // 20))):           # 20 parts, for the error
        loss, logs = bound(vae, generator, *val_set.batch(part))
        bits.append(torch.stack([loss, *logs.values()]))
    bits = torch.stack(bits).cpu().double()                                           # (batches, 4)
    means = bits.mean(0).tolist()
    errors = (bits.std(0) / len(bits) ** 0.5).tolist()
    texts = (("bound_bits_per_dim", "bound on bits per dimension", "lower is better"),
             ("bound_pixels", "of it: pixels, given the tokens", "a part of the bound"),
             ("bound_prior", "the tokens, under the generator", "a part of the bound"),
             ("bound_entropy", "entropy of q, taken off", "a part of the bound"))
    return [(key, name, (mean, error), "bits", remark)
            for (key, name, remark), mean, error in zip(texts, means, errors)]


def report(run, batch_size):
    """The table of a trained run, and more entries of its metrics.json."""
    if run.tokenizer.likelihood != "logistic" or run.args.generator != "ar" or run.args.head != "gmm":
        print(f"{run.folder}: no bound without --likelihood logistic, --generator ar and --head gmm")
        return
    val_set = runs.open_split(run.args, "val", run.device)
    rows = measure_bound(run.tokenizer, run.generator, val_set, batch_size)
    metrics.print_rows(rows)
    metrics.save_rows(run.folder, rows, **age.now("bound_"))


if __name__ == "__main__":
    main()
