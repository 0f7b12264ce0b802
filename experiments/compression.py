"""
Tokens as a codec: bits per pixel against PSNR and MS-SSIM, beside JPEG, WebP and H.265.

    pip install av  # brings H.265 (x265); without it there are no films and no H.265
    python experiments/compression.py --film bigbuckbunny.mp4 --test bikes.mp4      # 40 minutes on one core
    python experiments/compression.py --parts images --n 16 --out /tmp/x            # does it run?

Trains what is not there, then measures. Three tests, on what no model was trained on. images: drawn
validation images, train.py's LFQ. clips: drawn clips of 9 frames, the image LFQ inflated to video and trained
on. film: 27 frames of --test, by the same LFQ trained on crops of --film alone. Entropy coders are AR
transformers on the training tokens ("no class" nine times in ten, for they are asked so).

What is compared with what. LFQ: the whole file of recipes.compress, its 40 bytes too, fixed-length or
arithmetic-coded, all pictures of a test in one file; every file is decoded again, and its ids must be those
that went in. JPEG and WebP: at 32 pixels a file is mostly header, so the images are laid side by side in one
large sheet; the size as single files is reported too. H.265: x265's preset medium, the bare stream without a
container; clips lie side by side in one film. Drawn things keep full colour resolution in JPEG and H.265
(4:4:4), films have half (4:2:0). A classical codec's value at LFQ's rate is read off the straight line, over
log bits, between the two settings around it. MS-SSIM: metrics.ms_ssim, per frame; 32 pixels have two scales,
and in a sheet it is taken picture by picture. LPIPS with --lpips.
"""
import argparse
import io
import json
import math
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ar_transformer
import data
import lfq
import train
from common import age, metrics, pictures, runs
from official.lpips import load_lpips
from recipes import compress

CHUNK = 9                                               # frames of a clip: 3 frames of 8 x 8 ids at 32 pixels


# ---------------------------------------------------------------------------------------------------
# The models

def image_codec(args):
    """train.py's own two stages on the drawn images -> tokenizer, coder. Another seed draws other images,
    too.
    """
    words = [
        "--tokenizer", "lfq", "--tok_size", "small", "--head", "categorical", "--size", "tiny",
        "--label_drop", "0.9"
    ]
    train.main([
        *words, "--steps",
        str(args.ar_steps), "--device", "cpu", "--runs",
        str(args.folder), "--seed",
        str(args.seed), "--tok_name", "codec-lfq", "--name", "codec-ar"
    ])
    run = runs.load_run(args.folder / "codec-ar")
    return run.tokenizer, run.generator


def kept(path, make):
    """A state dict from `path`, or from make() and then kept there."""
    if not path.exists():
        runs.save_atomically(make(), path)
    return torch.load(path, map_location="cpu", weights_only=True)


def clip_codec(args, name, image_lfq, clips):
    """The image LFQ inflated and trained on clips (N, 3, 9, 32, 32), then a transformer on their ids ->
    tokenizer, coder.
    """
    tokenizer = lfq.LFQ(**lfq.SIZES["small"], frames=CHUNK).inflate(image_lfq.state_dict())

    def fit():
        torch.manual_seed(args.seed)
        seconds, _ = lfq.fit_lfq(tokenizer, clips, args.clip_steps, batch_size=4)
        print(f"{name}: video tokenizer, {args.clip_steps} steps, {seconds:.0f} s", flush=True)
        return tokenizer.state_dict()
    tokenizer.load_state_dict(kept(args.folder / f"{name}-lfq.pt", fit))
    tokenizer.eval()
    size, V = ar_transformer.SIZES["tiny"], tokenizer.vocab_size
    model = ar_transformer.ARTransformer(ar_transformer.CategoricalHead(size["n_embd"], V), tokenizer.seq_len,
                                         1, vocab_size=V, grid=tokenizer.grid, label_drop=0.9, **size)

    def fit_coder():
        ids = torch.cat([tokenizer.encode(x) for x in clips.split(25)])
        torch.manual_seed(args.seed)
        start, none = time.perf_counter(), torch.zeros(16, dtype=torch.long)
        losses = ar_transformer.fit_ids(model, lambda step: (ids[torch.randint(len(ids), (16, ))], none),
                                        args.clip_ar_steps)
        print(f"{name}: transformer, {losses[-1] / math.log(2):.2f} bits per token in training, "
              f"{time.perf_counter() - start:.0f} s", flush=True)
        return model.state_dict()
    model.load_state_dict(kept(args.folder / f"{name}-ar.pt", fit_coder))
    return tokenizer, model.eval()


def crops(film, n, side=32, seed=0):
    """n random pieces of a film (N, 3, H, W) uint8 -> (n, 3, 9, side, side) in [-1, 1]."""
    g = torch.Generator().manual_seed(seed)
    room = [size - k + 1 for size, k in zip((len(film), *film.shape[-2:]), (CHUNK, side, side))]
    places = [[int(torch.randint(r, (1,), generator=g)) for r in room] for _ in range(n)]
    pieces = [film[t:t + CHUNK, :, y:y + side, x:x + side].transpose(0, 1) for t, y, x in places]
    return torch.stack(pieces).float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------------
# The codecs: clip (N, 3, H, W) uint8 -> bytes, the decoded clip

def sheet(clip, columns):
    """Pictures side by side: (N, 3, H, W) -> (3, rows H, columns W); clips (N, F, 3, H, W) -> (F, 3, rows H,
    columns W).
    """
    *_, H, W = clip.shape
    x = clip.unflatten(0, (-1, columns)).movedim(1, -2)     # (rows, ..., H, columns, W)
    return x.movedim(0, -4).flatten(-4, -3).flatten(-2)


def unsheet(x, columns, like):
    """The inverse of sheet."""
    H, W = like.shape[-2:]
    return x.unflatten(-1, (columns, W)).unflatten(-3, (-1, H)).movedim(-4, 0).movedim(-2, 1).flatten(0, 1)


def still(picture, kind, **options):
    """(3, H, W) uint8 through Pillow -> bytes, the decoded picture."""
    file = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(file, kind, **options)
    return file.tell(), torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)


def h265(clip, crf, pix_fmt):
    """(N, 3, H, W) uint8 through x265 -> bytes of the bare stream, the decoded clip."""
    import av
    file = io.BytesIO()
    with av.open(file, "w", format="hevc") as film:
        options = {
            "crf": str(crf), "preset": "medium",
            "x265-params": "info=0:log-level=none:pools=none:frame-threads=1"
        }
        stream = film.add_stream("libx265", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = clip.shape[-1], clip.shape[-2], pix_fmt
        for x in clip.permute(0, 2, 3, 1).contiguous().numpy():
            film.mux(stream.encode(av.VideoFrame.from_ndarray(x, format="rgb24")))
        film.mux(stream.encode())
    size = len(file.getvalue())
    with av.open(io.BytesIO(file.getvalue()), format="hevc") as film:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)])
    return size, torch.from_numpy(frames).permute(0, 3, 1, 2)


def quality(clip, decoded, lpips):
    """-> {psnr, ms_ssim[, lpips]}: means over frames."""
    out = dict(psnr=[], ms_ssim=[], lpips=[])
    for a, b in zip(clip.split(64), decoded.split(64)):
        a, b = a.float() / 127.5 - 1, b.float() / 127.5 - 1
        out["psnr"].append(metrics.psnr(a, b)), out["ms_ssim"].append(metrics.ms_ssim(a, b))
        if lpips is not None:
            with torch.no_grad():
                out["lpips"].append(lpips(a, b))
    return {k: torch.cat(v).mean().item() for k, v in out.items() if v}


def through_lfq(clip, tokenizer, model, lpips):
    """-> rows of both codings, other sizes of the same ids, the decoded clip."""
    ids, lay = compress.to_ids(tokenizer, clip)
    pixels, rows = clip[:, 0].numel(), []
    decoded = compress.from_ids(tokenizer, ids, lay)
    scores = quality(clip, decoded, lpips)
    for name, coder in (("LFQ, fixed length", None), ("LFQ, arithmetic-coded", model)):
        start = time.process_time()
        blob = compress.write(ids, lay, tokenizer, coder)
        written = time.process_time()
        assert torch.equal(compress.read(blob, tokenizer, coder)[0], ids)
        rows.append(dict(codec=name, bpp=8 * len(blob) / pixels, bytes=len(blob),
                         bits_per_token=8 * (len(blob) - compress.HEADER.size) / ids.numel(),
                         write_s=written - start, read_s=time.process_time() - written, **scores))
    p = ids.flatten().bincount().double() / ids.numel()
    zipped = len(zlib.compress(ids.numpy().astype("<u2").tobytes(), 9))
    others = dict(tokens=ids.numel(), bits_per_token_zlib=8 * zipped / ids.numel(),
                  # table not counted
                  bits_per_token_by_frequency=-(torch.xlogy(p, p).sum() / math.log(2)).item())
    return rows, others, decoded


def at_rate(rows, bpp, key):
    """`key` of a classical codec at bpp, on the line between its settings over log bpp; None outside of
    them.
    """
    points = sorted((math.log(r["bpp"]), r[key]) for r in rows)
    x = math.log(bpp)
    return float(np.interp(x, *zip(*points))) if points[0][0] <= x <= points[-1][0] else None


def rate_for(rows, psnr):
    """The bpp at which a classical codec reaches this PSNR; None outside of its settings."""
    points = sorted((r["psnr"], math.log(r["bpp"])) for r in rows)
    return math.exp(float(np.interp(psnr, *zip(*points)))) if points[0][0] <= psnr <= points[-1][0] else None


# ---------------------------------------------------------------------------------------------------
# The three tests -> SimpleNamespace(name, rows, others, shown: [(title, picture (3, H, W))])

def images(args, lpips):
    tokenizer, model = image_codec(args)
    n = args.n // 16 * 16
    clip = pictures.to_uint8(data.draw(torch.arange(n) + data.VAL_INDEX)[0])                # as many "frames"
    rows, others, decoded = through_lfq(clip, tokenizer, model, lpips)
    page, webps, pixels = sheet(clip, 16), [], clip[:, 0].numel()
    for kind, settings in (("JPEG", dict(subsampling=0, optimize=True)), ("WEBP", dict(method=6))):
        for q in (1, 3, 6, 10, 15, 20, 30, 40, 55, 70, 85):
            size, back = still(page, kind, quality=q, **settings)
            back = unsheet(back, 16, clip)
            alone = sum(still(x, kind, quality=q, **settings)[0] for x in clip[:64]) / len(clip[:64])
            rows.append(
                dict(codec={"WEBP": "WebP"}.get(kind, kind), setting=q, bpp=8 * size / pixels, bytes=size,
                     single_file_bytes=alone, **quality(clip, back, lpips)))
            if kind == "WEBP":
                webps.append((rows[-1]["bpp"], back))
    rate = rows[0]["bpp"]
    bpp, near = min(webps, key=lambda v: abs(math.log(v[0] / rate)))
    pick = lambda x: sheet(x[:16], 4)
    shown = [("original", pick(clip)), (f"LFQ, {rate:.2f} bpp, {rows[1]['bpp']:.2f} coded", pick(decoded)),
             (f"WebP, {bpp:.2f} bpp", pick(near))]
    others |= dict(single_file_bytes=40 + math.ceil(tokenizer.seq_len * tokenizer.bits / 8))
    return SimpleNamespace(name="drawn images, 32 x 32", rows=rows, others=others, shown=shown)


def beside_h265(args, lpips, name, clip, codec, pix_fmt, to_film, from_film, picture):
    """clip -> LFQ's rows and those of x265 over its range."""
    rows, others, decoded = through_lfq(clip, *codec, lpips)
    shown, pixels = [], clip[:, 0].numel()
    for crf in (51, 48, 45, 42, 39, 36, 33, 30, 26, 22, 18, 12):
        size, back = h265(to_film(clip), crf, pix_fmt)
        back = from_film(back)
        rows.append(
            dict(codec="H.265", setting=crf, bpp=8 * size / pixels, bytes=size, **quality(clip, back, lpips)))
        shown.append((rows[-1]["bpp"], back))
    rate = rows[1]["bpp"]
    bpp, near = min(shown, key=lambda v: abs(math.log(v[0] / rate)))
    shown = [("original", picture(clip)), (f"LFQ, coded, {rate:.2f} bpp", picture(decoded)),
             (f"H.265, {bpp:.2f} bpp", picture(near))]
    return SimpleNamespace(name=name, rows=rows, others=others, shown=shown)


def clips(args, lpips):
    tokenizer, _ = image_codec(args)
    codec = clip_codec(args, "clips", tokenizer, data.draw_clips(torch.arange(args.n_clips), frames=CHUNK)[0])
    n = max(16, args.n // 4 // 16 * 16)
    held_out = data.draw_clips(torch.arange(n) + data.VAL_INDEX, frames=CHUNK)[0]
    clip = pictures.to_uint8(held_out).transpose(1, 2).flatten(0, 1)                        # (n 9, 3, 32, 32)
    columns = 8
    to_film = lambda x: sheet(x.unflatten(0, (n, CHUNK)), columns)                      # (9, 3, rows 32, 256)
    from_film = lambda x: unsheet(x, columns, clip).flatten(0, 1)
    picture = lambda x: sheet(x.unflatten(0, (n, CHUNK))[:4, ::2].flatten(0, 1)[:20], 5)
    return beside_h265(args, lpips, f"drawn clips, {CHUNK} x 32 x 32", clip, codec, "yuv444p", to_film,
                       from_film, picture)


def film(args, lpips):
    tokenizer, _ = image_codec(args)
    source = compress.read_clip(args.film)[0]
    if source.shape[-1] > 800:                   # halved, so that its details are as large as those of --test
        source = source[..., :source.shape[-2] // 2 * 2, :source.shape[-1] // 2 * 2]
        source = source.float().unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).mean(
            (-1, -3)).round().to(torch.uint8)
    codec = clip_codec(args, "film-" + Path(args.film).stem, tokenizer,
                       crops(source, args.n_clips, seed=args.seed))
    clip = compress.read_clip(args.test)[0]
    H, W = (min(v, most) // 16 * 16 for v, most in zip(clip.shape[-2:], (192, 320)))
    y, x = ((v - m) // 2 for v, m in zip(clip.shape[-2:], (H, W)))
    clip = clip[:args.film_frames, :, y:y + H, x:x + W].contiguous()
    same = lambda v: v
    name = f"film {Path(args.test).stem}, {len(clip)} x {H} x {W}"
    return beside_h265(args, lpips, name, clip, codec, "yuv420p", same, same, lambda v: v[len(v) // 2])


TESTS = dict(images=images, clips=clips, film=film)


# ---------------------------------------------------------------------------------------------------

def draw(path, tests):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig = plt.figure(figsize=(5.2 * len(tests), 6.2))
    grid = fig.add_gridspec(2, len(tests), height_ratios=[2.1, 1], left=0.17 / len(tests), right=0.99,
                            top=0.87, bottom=0.01, wspace=0.16, hspace=0.28)
    for column, test in enumerate(tests):
        ax = fig.add_subplot(grid[0, column])
        for k, codec in enumerate(dict.fromkeys(r["codec"] for r in test.rows)):
            points = sorted((r["bpp"], r["psnr"]) for r in test.rows if r["codec"] == codec)
            style = dict(marker="*", ms=15, ls="") if codec.startswith("LFQ") else dict(marker="o", ms=4)
            ax.plot(*zip(*points), label=codec, color=["tab:red", "tab:blue", "tab:grey", "k"][k], **style)
        (a, b) = test.rows[:2]
        ax.annotate("", (b["bpp"], b["psnr"]), (a["bpp"], a["psnr"]),
                    arrowprops=dict(arrowstyle="->", shrinkA=6, shrinkB=8))
        ticks = [t for t in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
                 if min(r["bpp"] for r in test.rows) <= t <= max(r["bpp"] for r in test.rows)]
        ax.set(xscale="log", xlabel="bits per pixel", ylabel="PSNR, dB" if column == 0 else "",
               title=test.name)
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend(fontsize=9)
        cells = grid[1, column].subgridspec(1, 3, wspace=0.05)
        for cell, (title, picture) in zip(cells, test.shown):
            ax = fig.add_subplot(cell)
            ax.imshow(picture.permute(1, 2, 0), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.set_title(title, fontsize=8)
    fig.suptitle(
        "Tokens as a codec: the same ids, fixed-length and\narithmetic-coded (arrow), beside classical codecs"
    )
    fig.savefig(path, dpi=80)
    plt.close(fig)


def compare_at_equal_rate(test, seed):
    """Prints a test's rows, and gives it `equal`: each of LFQ's two rows beside every classical codec at the
    same rate.
    """
    scores = [k for k in ("psnr", "ms_ssim", "lpips") if k in test.rows[0]]
    print(f"\nseed {seed}, {test.name}: {test.others}")
    for row in test.rows:
        print(
            f"  {row['codec']:22s} {row.get('setting', ''):>4} {row['bpp']:8.4f} bpp  " +
            "  ".join(f"{k} {row[k]:.3f}" for k in scores) +
            (f"  {row['bits_per_token']:.2f} bits per token" if "bits_per_token" in row else ""), flush=True)
    test.equal = []
    for row in test.rows[:2]:
        for codec in dict.fromkeys(r["codec"] for r in test.rows[2:]):
            other = [r for r in test.rows if r["codec"] == codec]
            test.equal.append(
                dict(lfq=row["codec"], codec=codec, bpp=row["bpp"], **{k: row[k]
                                                                       for k in scores},
                     **{f"{k}_of_codec": at_rate(other, row["bpp"], k)
                        for k in scores}, bpp_of_codec_for_psnr=rate_for(other, row["psnr"])))
            print("  at equal rate:", test.equal[-1], flush=True)


def main():
    p = argparse.ArgumentParser(description="LFQ tokens against JPEG, WebP and H.265.")
    p.add_argument("--parts", nargs="+", default=list(TESTS), choices=list(TESTS), help="which tests")
    p.add_argument("--film", help="the film to train on (part film)")
    p.add_argument("--test", help="the film to compress (part film)")
    p.add_argument("--film_frames", type=int, default=27, help="frames of --test that are compressed")
    p.add_argument("--n", type=int, default=256, help="held-out images; a quarter as many clips")
    p.add_argument("--n_clips", type=int, default=400, help="training clips, drawn or cropped")
    p.add_argument("--clip_steps", type=int, default=150, help="training steps of a video tokenizer")
    p.add_argument("--ar_steps", type=int, default=400, help="training steps of the entropy coder of images")
    p.add_argument("--clip_ar_steps", type=int, default=200,
                   help="training steps of an entropy coder of clips")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2],
                   help="all is trained for each; the first is drawn")
    p.add_argument("--lpips", nargs="+",
                   help="LPIPS's weights: vgg16-397923af.pth of torchvision and vgg.pth of LPIPS")
    p.add_argument("--runs", default="runs",
                   help="the trained models, a folder per seed: what is there is used")
    p.add_argument("--out", default=str(ROOT / "experiments/results/compression"),
                   help="where .json and .png go")
    args = p.parse_args()
    if "film" in args.parts and not (args.film and args.test):
        raise data.BadInput("--film, --test: name two films, or leave the test out with --parts images clips")
    torch.set_num_threads(1)
    begun, used, seeds = time.perf_counter(), time.process_time(), []
    lpips = load_lpips(*args.lpips) if args.lpips else None
    for args.seed in args.seeds:
        args.folder, tests = Path(args.runs) / f"seed-{args.seed}", []
        seeds.append(dict(seed=args.seed, tests=tests))
        for part in args.parts:
            tests.append(test := TESTS[part](args, lpips))
            compare_at_equal_rate(test, args.seed)
            facts = age.of_run() | dict(
                threads=1, seconds=time.perf_counter() - begun, processor_seconds=time.process_time() - used,
                flags={k: v
                       for k, v in vars(args).items() if k not in ("runs", "out", "seed", "folder")}, seeds=[
                           dict(
                               seed=of["seed"], tests=[
                                   dict(name=t.name, ids=t.others, rows=t.rows, at_equal_rate=t.equal)
                                   for t in of["tests"]
                               ]) for of in seeds
                       ])
            # after each test: they take long
            Path(args.out + ".json").write_text(json.dumps(facts, indent=1) + "\n")
        if args.seed == args.seeds[0]:
            draw(args.out + ".png", tests)
    print(f"wrote {args.out}.json and .png, {time.process_time() - used:.0f} s of processor time")


if __name__ == "__main__":
    main()
