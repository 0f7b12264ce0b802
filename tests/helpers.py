"""What tests of several rooms share."""
import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from official import llamagen as official_llamagen
from official import open_magvit2 as official_open_magvit2
from official import titok as official_titok
from official.mar import load_mar


ROOT = Path(__file__).resolve().parent.parent
MODELS = [
    p for p in ("vae vq lfq titok perceptual_gan flow_adapter gmm_head diffusion_head ar_transformer maskgit "
                "mar var").split() if (ROOT / f"{p}.py").exists()
]
PROGRAMS = ["train", "sample", "evaluate"]


def golden(name):
    """Arrays of golden/<name>.npz as tensors; weights stored as float16 become float32."""
    with np.load(ROOT / "golden" / f"{name}.npz", allow_pickle=False) as f:
        arrays = {k: torch.from_numpy(f[k]) for k in f.files if f[k].dtype.kind != "U"}
    return {k: v.float() if v.dtype == torch.float16 else v for k, v in arrays.items()}


def like_photographs(n, size=32):
    """n pictures (n, 3, size, size) with what lines see of photographs: power 1 / f^2, nearly grey."""
    f = torch.fft.fftfreq(size)[:, None].square() + torch.fft.rfftfreq(size).square()
    noise = torch.fft.rfft2(torch.randn(n, 3, size, size)) / (f + 1 / size**2).sqrt()
    x = torch.fft.irfft2(noise, s=(size, size))
    x = 0.2 * x + x.mean(1, keepdim=True)
    return (0.5 * x / x.std()).clamp(-1, 1)


def close(ours, reference, tolerance=1e-4):
    """Equal within `tolerance` of the largest reference value."""
    worst = (ours - reference).abs().max() / reference.abs().max().clamp(min=1e-12)
    assert worst <= tolerance, f"off by {worst:.2e} of the largest value, allowed {tolerance:.0e}"


def official_vae():
    encoder, decoder = golden("mar/vae_encoder"), golden("mar/vae_decoder")
    sd = {k.removeprefix("sd/"): v for g in (encoder, decoder) for k, v in g.items() if k.startswith("sd/")}
    return sd, encoder, decoder


def vq_golden(name):
    """The arrays of golden/llamagen/<name>.npz and its weights under the authors' keys; an int8 weight is q *
    s.
    """
    g = golden(f"llamagen/{name}")
    sd = {
        k[2:]: v.float() * g["s/" + k[2:]] if k[0] == "q" else v
        for k, v in g.items() if k[:2] in ("q/", "w/")
    }
    return g, sd


tokens_of = lambda grid: grid.flatten(2).transpose(1, 2)    # (B, D, h, w) -> (B, T, D)


def magvit_shapes(ch, ch_mult, n_res, bits, video):
    """Names and shapes of Open-MAGVIT2's tokenizer, spelt out: the part's name, the name inside the part, the
    shape.
    """
    taps = (3,) if video else ()
    names = []

    def conv(part, name, c_in, c_out, k=3, bias=False):
        inner = name + (".conv_1" if video else "")
        names.append((part, f"{inner}.weight", (c_out, c_in, *([k] if taps else []), k, k)))
        names.extend([(part, f"{inner}.bias", (c_out,))] if bias else [])

    def norm(part, name, c):
        names.extend((part, f"{name}.{w}", (c,)) for w in ("weight", "bias"))

    def block(part, name, c_in, c_out):
        norm(part, f"{name}.norm1", c_in), norm(part, f"{name}.norm2", c_out)
        conv(part, f"{name}.conv1", c_in, c_out), conv(part, f"{name}.conv2", c_out, c_out)
        if c_in != c_out:
            conv(part, f"{name}.nin_shortcut", c_in, c_out, 1)

    widths, low = [ch * m for m in ch_mult], ch * ch_mult[-1]
    conv("encoder", "conv_in", 3, ch)
    for i, width in enumerate(widths):
        for j in range(n_res):
            block("encoder", f"down.{i}.block.{j}", width if j else ([ch] + widths)[i], width)
            block("decoder", f"up.{i}.block.{j}", width if j else (widths + [low])[i + 1], width)
        for w in ("gamma", "beta"):
            names.append(("decoder", f"adaptive.{i}.{w}.weight", ((widths + [low])[i + 1], bits)))
            names.append(("decoder", f"adaptive.{i}.{w}.bias", ((widths + [low])[i + 1],)))
        if i < len(widths) - 1:
            conv("encoder", f"down.{i}.downsample", width, width, bias=True)
        if i > 0:
            frames = 2 if video and ch_mult[i - 1] > 1 else 1
            conv("decoder", f"up.{i}.upsample.conv1", width, 4 * frames * width, bias=True)
    for part in ("encoder", "decoder"):
        for j in range(n_res):
            block(part, f"mid_block.{j}", low, low)
        norm(part, "norm_out", low if part == "encoder" else ch)
    conv("encoder", "conv_out", low, bits, 1, bias=True)
    conv("decoder", "conv_in", bits, low, bias=True), conv("decoder", "conv_out", ch, 3, bias=True)
    return names


def titok_golden(name, **options):
    """Arrays of golden/tokenizers/titok_<name>.npz, the authors' weights, the model made of them, images in
    [-1, 1].
    """
    g = golden(f"tokenizers/titok_{name}")
    sd = {k.removeprefix("sd."): v for k, v in g.items() if k.startswith("sd.")}
    return g, sd, official_titok.load_tokenizer(sd, n_head=4, **options), 2 * g["image"] - 1


def llamagen(name, **options):
    """The arrays of golden/llamagen/<name>.npz and the model with the weights in them."""
    g = golden(f"llamagen/{name}")
    sd = {k[2:]: v for k, v in g.items() if k.startswith("w/")}
    return official_llamagen.load_gpt(sd, n_head=4, grid=(4, 4), **options), g, sd




def open_magvit2():
    g = golden("tokenizers/open_magvit2_gpt_tiny")
    sd = {k[3:]: v for k, v in g.items() if k.startswith("sd.")}
    return official_open_magvit2.load_gpt(sd, n_head=4, grid=(4, 4)), g, sd


def official_mar():
    """The authors' tiny weights -> MAR with 16 tokens of 4 numbers, and their state dict."""
    sd = {k.removeprefix("sd/"): v for k, v in golden("mar/mar_weights").items()}
    return load_mar(sd, n_head=4), sd


TINY = [
    "--tokenizer", "vae", "--head", "gmm", "--n_shapes", "200", "--tok_steps", "24", "--tok_batch_size", "8",
    "--image_size", "16", "--steps", "24", "--batch_size", "8", "--size", "mini", "--tok_size", "mini",
    "--log_every", "4", "--eval_every", "12", "--warmup", "4", "--device", "cpu", "--dtype", "fp32"
]
RARELY = ["--log_every", "12", "--eval_every", "24"]     # where nothing is stopped or resumed


def command(*words, torchrun=0):
    launcher = [sys.executable]
    if torchrun:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}", "--"]
    return launcher + [str(ROOT / "tests" / "quickly.py"), *map(str, words)]


ENV = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}


def call(*words, code=0, **options):
    done = subprocess.run(command(*words, **options), capture_output=True, text=True, env=ENV, timeout=900)
    assert done.returncode == code or (code and done.returncode), done.stdout + done.stderr
    return done.stdout + done.stderr


def log_of(runs, name, column="loss"):
    with open(runs / name / "log.csv", newline="") as f:
        return {int(r["step"]): float(r[column]) for r in csv.DictReader(f)}


IDS = ["--tokenizer", "vq", "--head", "categorical"]
CLIPS = [
    *TINY, "--tokenizer", "lfq", "--head", "categorical", "--generator", "maskgit", "--frames", "5",
    "--tok_size", "mini-clips", "--image_size", "8", "--vocab_size", "16", "--n_shapes", "60", "--tok_steps",
    "12", "--tok_batch_size", "4", "--steps", "8", "--batch_size", "4"
]
