"""
One token after the other, many at once, or fewer tokens: what does an image cost, and how good is it?

    python experiments/survey.py            # trains three systems at two widths, measures; about 70 minutes
    python experiments/survey.py --speed    # seconds only, on a machine without other work
    python experiments/survey.py --paper    # seconds only, at the papers' sizes; minutes, a GPU's work

--speed takes the quality from the last full run, --paper has random weights.

Three systems of equal width (64, then 128), depth (4) and data, the first two on the very same tokens:

  AR            64 ids of vq.py (8 x 8), ar_transformer.py with its KV cache: 64 passes of one token; for
                comparison also without the cache, each pass over all tokens so far, which is what MaskGIT's
                paper counts against
  MaskGIT       the same ids, maskgit.py: 4, 8 or 16 passes over all 64
  TiTok         16 ids of titok.py that have no place in the image, maskgit.py: 4 or 8 passes over 16

Quality is measured as in evaluate.py, at the guidance of sample.py. Seconds per image count everything from
the class to the pixels, with guidance, at batch 1 and 16; the systems take turns in one process, medians. On
a CPU that is processor time of one thread, for the machine may be shared. Beside it, for the width decides:
wall time from the class to the tokens at batch 1 for widths of 32 to 256 (random weights, which are as fast
as trained ones), with one and two threads, float32 and bfloat16; each system has its own best. Writes
experiments/results/survey[-paper][-cuda].json and survey.png. Runs that are already in --runs are not trained
again.
"""
import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ar_transformer
import evaluate
import maskgit
import titok
import train
import vq
from common import age, classifier, metrics, runs
from experiments.sampling import measure

SYSTEMS = {                                           # name: run folder, flags of train.py, numbers of passes
    "AR": ("ar", "--tokenizer vq --tok_size fine --tok_name vq-fine --generator ar", (64,)),
    "MaskGIT": ("maskgit", "--tokenizer vq --tok_size fine --tok_name vq-fine --generator maskgit",
                (4, 8, 16)),
    "TiTok": ("titok", "--tokenizer titok --tokens 16 --tok_name titok-16 --generator maskgit", (4, 8)),
}
STEPS = {
    "nano": {"AR": 4000, "MaskGIT": 10_000, "TiTok": 8000},
    "tiny": {"AR": 3000, "MaskGIT": 6000, "TiTok": 6000}
}
CFG = 2.0


def systems_trained(folder, size, device):
    """-> {name: run}, trained first where their folders are missing. One width and depth for all."""
    found = {}
    for name, (run_name, flags, _) in SYSTEMS.items():
        where = folder / f"{run_name}-{size}"
        checkpoint = runs.read_checkpoint(where)
        if checkpoint is None or not checkpoint["done"]:
            train.main([
                *flags.split(), "--steps",
                str(STEPS[size][name]), "--size", size, "--runs",
                str(folder), "--name", where.name, "--device",
                str(device), *["--resume"] * (checkpoint is not None)
            ])
        found[name] = runs.load_run(where, device)
    return found


def systems_of_paper_size(device, quick=False):
    """-> {name: run} with random weights: 24 layers of width 768, ImageNet's 1000 classes at 256 pixels.

    quick: one layer of width 32 and small tokenizers of as many tokens, to see that all of it runs.
    """
    def run(generator, tokenizer):
        for model in (generator, tokenizer):
            model.to(device).eval()
        torch.nn.init.normal_(generator.head.proj.weight, std=0.02)                        # it starts at zero
        return SimpleNamespace(generator=generator, tokenizer=tokenizer, device=device)
    wide, V = maskgit.SIZES["maskgit"], vq.SIZES["ds16"]["vocab_size"]
    head = lambda V: ar_transformer.CategoricalHead(wide["n_embd"], V)
    grid_size, one_d_size = vq.SIZES["ds16"], titok.SIZES["titok-l-32"]
    if quick:
        wide = dict(n_layer=1, n_head=2, n_embd=32)
        grid_size = grid_size | dict(image_size=64, ch=8, ch_mult=(1, 1, 1), n_res=1, z_channels=8, groups=4)
        one_d_size = one_d_size | dict(image_size=32, enc=(32, 1, 2), dec=(32, 1, 2))
    grid, one_d = vq.VQ(**grid_size), titok.TiTok(**one_d_size)
    same = dict(n_layer=wide["n_layer"], n_head=wide["n_head"], n_embd=wide["n_embd"])
    return {"AR": run(ar_transformer.ARTransformer(head(V), 256, 1000, vocab_size=V, **same), grid),
            "MaskGIT": run(maskgit.MaskGIT(head(V), 256, 1000, vocab_size=V, **wide), grid),
            "TiTok": run(maskgit.MaskGIT(head(4096), 32, 1000, vocab_size=4096, **wide), one_d)}


@torch.no_grad()
def seconds(run, passes, B, cache=True):
    """One batch from classes to pixels -> seconds per image, of processor time on a CPU."""
    clock = time.process_time if run.device.type == "cpu" else time.perf_counter
    sync = torch.cuda.synchronize if run.device.type == "cuda" else lambda: None
    labels = torch.arange(B, device=run.device) % 10
    ar = isinstance(run.generator, ar_transformer.ARTransformer)
    options = dict(use_cache=cache) if ar else dict(steps=passes)
    sync()
    start = clock()
    run.tokenizer.decode(run.generator.sample(labels, cfg=CFG, **options))
    sync()
    return (clock() - start) / B


def measure_speed(systems, passes, batches, rounds):
    """All take turns -> [{system, passes, batch, seconds_per_image}]"""
    arms = [(name, n) for name in systems for n in passes[name]] + [("AR without a cache", passes["AR"][0])]
    of = lambda name: systems[name.split()[0]]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                               # processor time of one thread; a GPU does not mind
    rows = []
    for B in batches:
        times = {arm: [] for arm in arms}
        for turn in range(rounds + 1):                      # the first is a warm-up
            for name, n in arms:
                spent = seconds(of(name), n, B, cache="without" not in name)
                times[name, n] += [spent] if turn else []
        for (name, n), t in times.items():
            rows.append(
                dict(system=name, tokens=of(name).tokenizer.seq_len, passes=n, batch=B,
                     seconds_per_image=median(t)))
    torch.set_num_threads(threads)
    return rows


def random_generator(name, width, V=512):
    """One system's generator with random weights, of SIZES["tiny"] but for its width."""
    size = ar_transformer.SIZES["tiny"] | dict(n_embd=width, n_head=max(1, width // 32), vocab_size=V)
    head = ar_transformer.CategoricalHead(width, V)
    model = ar_transformer.ARTransformer(head, 64, 10, **size) if name.startswith("AR") else \
        maskgit.MaskGIT(head, 64 if name == "MaskGIT" else 16, 10, **size)
    torch.nn.init.normal_(head.proj.weight, std=0.02)       # it starts at zero
    return model.eval()


@torch.no_grad()
def measure_widths(rounds, widths=(32, 64, 96, 128, 192, 256)):
    """Class to tokens at batch 1 -> [{system, width, passes, guided, threads, dtype, ms}], wall time, all
    taking turns.

    "AR compiled", which is not what sample.py does on a CPU (it compiles for 20 s), only guided and with one
    thread.
    """
    models = {(name, width): random_generator(name, width)
              for name in (*SYSTEMS, "AR compiled")
              for width in widths}
    arms = [(name, width, 64 if name.startswith("AR") else 8, guided, threads, dtype)
            for name, width in models for guided in (True, False) for threads in (1, 2)
            for dtype in ("fp32", "bf16")
            if name != "AR compiled" or (guided, threads, dtype) == (True, 1, "fp32")]
    label, times, before = torch.zeros(1, dtype=torch.long), {arm: []
                                                              for arm in arms}, torch.get_num_threads()
    for turn in range(rounds + 1):                          # the first is a warm-up
        for arm in sorted(arms, key=lambda arm: arm[4]):    # another number of threads costs the next call
            name, width, n, guided, threads, dtype = arm
            torch.set_num_threads(threads)
            options = dict(compile=name == "AR compiled") if name.startswith("AR") else dict(steps=n)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
                start = time.perf_counter()
                models[name, width].sample(label, cfg=CFG if guided else 1.0, **options)
                times[arm] += [time.perf_counter() - start] if turn else []
    torch.set_num_threads(before)
    keys = ("system", "width", "passes", "guided", "threads", "dtype")
    return [dict(zip(keys, arm)) | dict(ms=1000 * median(t)) for arm, t in times.items()]


def fastest(rows):
    """{(system, width, guided): row of the fastest setting}"""
    best = {}
    for r in sorted(rows, key=lambda r: -r["ms"]):
        best[r["system"], r["width"], r["guided"]] = r
    return best


def widths_table(rows):
    """Markdown: each system at its fastest setting, and how many times as long AR's fastest takes."""
    best = fastest(rows)
    cell = lambda r: f"{r['ms']:.1f} ({r['threads']} x {r['dtype']})"
    lines = [
        "| width | guided | AR, ms (threads) | MaskGIT, 8 passes | AR takes, times as long | "
        "TiTok, 8 passes | times | AR compiled, ms |", "|---" * 8 + "|"
    ]
    for guided in (True, False):
        for width in sorted({r["width"] for r in rows}):
            ar, *others = (best[name, width, guided] for name in SYSTEMS)
            cells = [str(width), "yes" if guided else "no", cell(ar)]
            cells += [c for r in others for c in (cell(r), f"{ar['ms'] / r['ms']:.1f}")]
            lines.append("| " +
                         " | ".join(cells + [cell(best["AR compiled", width, True]) if guided else ""]) +
                         " |")
    return "\n".join(lines)


def measure_quality(systems, n):
    """-> {(system, passes): metrics of n samples}, and of each tokenizer alone."""
    found, ceiling = {}, {}
    for name, run in systems.items():
        val_set = runs.open_split(run.args, "val", run.device)
        net, _ = classifier.classifier_for(run.args, run.folder, run.device)
        index = torch.arange(len(val_set))
        real, _ = classifier.look_at_real(net, val_set, index)
        rows, f, _ = evaluate.measure_reconstruction(run.tokenizer, net, val_set, index, 250)
        ceiling[name] = {key: value
                         for key, _, value, _, _ in rows} | dict(frechet=metrics.frechet_distance(f, real))
        for passes in SYSTEMS[name][2]:
            options = {} if name == "AR" else dict(steps=passes)
            found[name, passes] = measure(run, n, net, real, **options)
            print(name, passes, {k: round(v, 2) for k, v in found[name, passes].items()}, flush=True)
    return found, ceiling


def table(rows, batches):
    """Markdown: a line per system, width and number of passes."""
    quality = "sample_accuracy" in rows[0]
    lines = [
        "| width | system | tokens | passes | " +
        ("class accuracy | Frechet distance | " if quality else "") + " | ".join(f"ms per image, batch {B}"
                                                                                 for B in batches) + " |"
    ]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    key = lambda r: (r["width"], r["system"], r["passes"])
    for r in (r for r in rows if r["batch"] == batches[0]):
        of = {s["batch"]: s for s in rows if key(s) == key(r)}
        cells = [str(r["width"]), r["system"], str(r["tokens"]), str(r["passes"])]
        cells += [f"{r['sample_accuracy']:.1f}%", f"{r['sample_frechet_small_cnn']:.1f}"] if quality else []
        lines.append("| " + " | ".join(cells + [f"{1000 * of[B]['seconds_per_image']:.1f}"
                                                for B in batches]) + " |")
    return "\n".join(lines)


def save_figure(path, rows, batches, by_width):
    """Quality against time for each batch size; with by_width, the rows of measure_widths, also the ratio of
    times.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, len(batches) + bool(by_width), figsize=(14, 4.2))
    widths = sorted({r["width"] for r in rows})
    for ax, B in zip(axes, batches):
        for k, name in enumerate((*SYSTEMS, "AR without a cache")):
            for width in widths:
                mine = [r for r in rows if (r["system"], r["batch"], r["width"]) == (name, B, width)]
                x, y = [1000 * r["seconds_per_image"] for r in mine], [r["sample_accuracy"] for r in mine]
                ax.plot(x, y, "o-" if width == widths[-1] else "o--", color=f"C{k}",
                        mfc=None if width == widths[-1] else "w",
                        label=f"{name}, {mine[0]['tokens']} tokens" if width == widths[-1] else None)
                for r, a, b in zip(mine, x, y):
                    if not name.startswith("AR"):
                        ax.annotate(str(r["passes"]), (a, b), (0, 6), textcoords="offset points", ha="center",
                                    fontsize=8)
        ax.set(xscale="log", xlabel="milliseconds per image, log scale", title=f"batch {B}; numbers: passes",
               ylabel="class accuracy of samples, %")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.margins(0.1, 0.15)
        ax.grid(alpha=0.3, which="both")
    axes[0].plot([], [], "o--", color="gray", mfc="w", label=f"hollow: width {widths[0]}, else {widths[-1]}")
    axes[0].legend(fontsize=8)
    if by_width:
        best = fastest(by_width)
        x = sorted({r["width"] for r in by_width})
        for k, name in ((1, "MaskGIT"), (2, "TiTok")):
            for guided, line in ((False, "o:"), (True, "o-")):
                y = [best["AR", width, guided]["ms"] / best[name, width, guided]["ms"] for width in x]
                axes[-1].plot(x, y, line, color=f"C{k}",
                              label=f"{name}, 8 passes, {'guided' if guided else 'not guided'}")
        axes[-1].axhline(1, color="gray", lw=1)
        axes[-1].set(xscale="log", xticks=x, xticklabels=x, xlabel="width of the transformer (4 layers)",
                     ylabel="times as fast as AR with its cache",
                     title="batch 1, class to tokens, each at its best")
        axes[-1].set_xticks([], minor=True)
        axes[-1].set_ylim(0)
        axes[-1].grid(alpha=0.3)
        axes[-1].legend(fontsize=8)
    fig.suptitle("equal width and data: passes cost time, tokens cost passes, and a wide pass on a CPU costs "
                 "arithmetic")
    fig.tight_layout()
    fig.savefig(path, dpi=80)


def main():
    p = argparse.ArgumentParser(description="AR, MaskGIT and TiTok: quality and time of an image.")
    p.add_argument("--speed", action="store_true",
                   help="measure the seconds anew and keep the quality that is on file")
    p.add_argument("--paper", action="store_true",
                   help="seconds at the papers' sizes, random weights, batch 1 and 64")
    p.add_argument("--quick", action="store_true", help="with --paper: tiny sizes, to see that it runs")
    p.add_argument("--out", type=Path, help="JSON to write (default: in experiments/results, as said above)")
    p.add_argument("--runs", default=ROOT / "runs" / "survey", type=Path, help="where the runs lie")
    p.add_argument("--n", type=int, default=1000, help="samples per measurement")
    p.add_argument("--rounds", type=int, default=7, help="turns of every system")
    p.add_argument("--batches", type=int, nargs="+", help="images at once (default: 1 16, with --paper 1 64)")
    args = p.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = args.batches or ((1, 64) if args.paper else (1, 16))
    groups = [systems_of_paper_size(device, args.quick)
              ] if args.paper else [systems_trained(args.runs, size, device) for size in STEPS]
    passes = {"AR": (256, ), "MaskGIT": (8, 12), "TiTok": (8, )
              } if args.paper else {name: s[2]
                                    for name, s in SYSTEMS.items()}
    facts = age.of_run(device) | dict(rounds=args.rounds)
    name = f"survey{'-paper' * args.paper}{'-cuda' * (device.type == 'cuda')}"
    out = args.out.with_suffix("") if args.out else Path(__file__).parent / "results" / name
    known = json.loads(out.with_suffix(".json").read_text()) if args.speed else {}
    rows = []
    for systems in groups:
        width = systems["AR"].generator.head.proj.in_features
        timed = [dict(width=width) | r for r in measure_speed(systems, passes, batches, args.rounds)]
        if args.speed:
            quality = {(r["system"], r["passes"]): r for r in known["rows"] if r["width"] == width}
        elif not args.paper:
            # one tokenizer for both widths
            quality, facts["reconstructions"] = measure_quality(systems, args.n)
        if not args.paper:
            timed = [
                r | {
                    k: v
                    for k, v in quality[r["system"].split()[0], r["passes"]].items()
                    if k.startswith("sample_")
                } for r in timed
            ]
        rows += timed
    if not args.paper:
        facts |= dict(n=args.n, cfg=CFG, steps=STEPS, flags={name: s[1] for name, s in SYSTEMS.items()})
        facts |= dict(n=known["n"], reconstructions=known["reconstructions"]) if args.speed else {}
        by_width = measure_widths(args.rounds) if device.type == "cpu" else []
        save_figure(out.with_suffix(".png"), rows, batches, by_width)
        if by_width:
            facts["by_width"] = by_width
            print(widths_table(by_width) + "\n")
    out.with_suffix(".json").write_text(json.dumps(facts | dict(rows=rows), indent=1) + "\n")
    print(table(rows, batches))
    print(f"wrote {out}.json")


if __name__ == "__main__":
    main()
