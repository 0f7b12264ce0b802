"""
How should a tokenizer of clips look back in time? MAGVIT-v2's Table 5 at toy scale.

    C-ViViT              patches; transformer within each frame, then a causal one along time (Phenaki's
                         tokenizer)
    hybrid               an ordinary 3-D CNN on each block of four frames, then C-ViViT's causal transformer
                         over the blocks
    causal 3-D CNN       lfq.py as it is
      average pooling    ... whose two strided convolutions become a mean over the cell and a convolution
      no adaptive norm   ... whose decoder has plain norms

Each is an lfq.LFQ with another encoder and decoder: 9 frames of 16 x 16 pixels to 3 x 4 x 4 ids of 10 bits,
the same quantiser, losses and clips, parameters equal within 4%, the same steps, batches and learning rate
(tuned for none). All are causal: a token knows no frame after its own (tested). Measured on held-out clips by
evaluate.py's classifiers.

    python experiments/video_designs.py  # 5 designs, 3 seeds, 13 minutes of processor time on one core
    python experiments/video_designs.py --steps 400 800    # a second budget beside it
    python experiments/video_designs.py --steps 1 --n 72 --classifier_steps 2 --runs /tmp/x --out /tmp/x

The last only shows that it runs. Writes results/video-designs.json and .png. What is already in --runs is not
trained again.
"""
import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import lfq
from common import age, classifier, metrics, pictures
from common.clips import features_of_frames
from maskgit import EncoderBlock, attention
from perceptual_gan import as_frames

FRAMES, SIDE, BITS, LR = 9, 16, 10, 2e-3
# of the norms. With 8, one per channel, a frame's colour is normalised away: 16.3 dB in the place of 18.2
GROUPS = 2
# f = 3, h = w = 4
SIZE = lfq.SIZES["clips"] | dict(frames=FRAMES, image_size=SIDE, bits=BITS, ch=8, groups=GROUPS)
# millions of parameters, image FID, FVD on UCF-101: Table 5 of the paper, as this project's notes have it
DESIGNS = {
    "C-ViViT": (90, 28.02, 437.54), "hybrid": (67, 13.52, 316.70), "causal 3-D CNN": (58, 7.06, 96.33),
    "average pooling": None, "no adaptive norm": None}


# ---------------------------------------------------------------------------------------------------
# C-ViViT: (B, 3, F, H, W) is cut into patches of one frame (the first) and of four (the others)

def patches(x, time):                                       # (B, 3, F, H, W) -> (B, F/time, h, w, 3*time*4*4)
    return x.unfold(2, time, time).unfold(3, 4, 4).unfold(4, 4, 4).permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4)


def unpatch(x, time):                                       # the inverse of patches
    x = x.unflatten(-1, (3, time, 4, 4)).permute(0, 4, 1, 5, 2, 6, 3, 7)         # (B, 3, f, time, h, 4, w, 4)
    return x.flatten(6).flatten(4, 5).flatten(2, 3)


class CausalBlock(EncoderBlock):
    """EncoderBlock whose positions see themselves and what came before."""

    def attend(self, x, mask=None):                         # (B, S, C) -> (B, S, C)
        q, k, v = self.wqkv(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        return self.wo(attention(q, k, v, causal=True).transpose(1, 2).flatten(2))


class AlongTime(nn.Sequential):
    """n causal blocks along time, at each place by itself: (B, f, h, w, C) -> the same."""

    def __init__(self, n, width):
        super().__init__(*[CausalBlock(width, 4) for _ in range(n)])
        self.turn = nn.Parameter(torch.randn((FRAMES + 3) // 4, width) * 0.02)   # which block of frames it is

    def forward(self, x):
        B, f, h, w, C = x.shape
        x = x.flatten(2, 3).transpose(1, 2).flatten(0, 1) + self.turn[:f]                   # (B*h*w, f, C)
        return super().forward(x).unflatten(0, (B, h * w)).transpose(1, 2).unflatten(2, (h, w))


class WithinFrames(nn.Sequential):
    """n blocks over the h * w places of each frame by itself: (B, f, h, w, C) -> the same."""

    def __init__(self, n, width):
        super().__init__(*[EncoderBlock(width, 4) for _ in range(n)])
        self.place = nn.Parameter(torch.randn((SIDE // 4) ** 2, width) * 0.02)

    def forward(self, x):
        return super().forward(x.flatten(2, 3).flatten(0, 1) + self.place).view(x.shape)


class ViViTEncoder(nn.Module):                              # (B, 3, F, H, W) -> (B, bits, f, h, w)
    def __init__(self, width=72, n=2):
        super().__init__()
        self.first, self.rest = nn.Linear(3 * 16, width), nn.Linear(3 * 64, width)
        self.body = nn.Sequential(WithinFrames(n, width), AlongTime(n, width), nn.LayerNorm(width),
                                  nn.Linear(width, BITS))

    def forward(self, x):
        x = torch.cat([self.first(patches(x[:, :, :1], 1)), self.rest(patches(x[:, :, 1:], 4))], dim=1)
        return self.body(x).permute(0, 4, 1, 2, 3)


class ViViTDecoder(nn.Module):                  # (B, bits, f, h, w) -> (B, 3, F, H, W): the encoder backwards
    def __init__(self, width=72, n=2):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(BITS, width), AlongTime(n, width), WithinFrames(n, width),
                                  nn.LayerNorm(width))
        self.first, self.rest = nn.Linear(width, 3 * 16), nn.Linear(width, 3 * 64)

    def forward(self, q):
        x = self.body(q.permute(0, 2, 3, 4, 1))
        return torch.cat([unpatch(self.first(x[:, :1]), 1), unpatch(self.rest(x[:, 1:]), 4)], dim=2)


# ---------------------------------------------------------------------------------------------------
# The hybrid: an ordinary 3-D CNN looks both ways, but never out of its block of four frames. The first frame,
# four times over, is a block of its own.

class Res3d(nn.Module):                                 # lfq's CausalResBlock with ordinary padding and norms
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(GROUPS, c_in), nn.Conv3d(c_in, c_out, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.GroupNorm(GROUPS, c_out), nn.Conv3d(c_out, c_out, 3, padding=1,
                                                                        bias=False)
        self.skip = nn.Conv3d(c_in, c_out, 1, bias=False) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)                   # the identity at first, as in lfq.py

    def forward(self, x):
        return self.skip(x) + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class Up3d(nn.Conv3d):                          # (N, c_in, t, h, w) -> (N, c_out, 2t, 2h, 2w), depth to space
    def forward(self, x):
        # (N, c_out, t, 2, h, 2, w, 2)
        x = super().forward(x).unflatten(1, (2, 2, 2, -1)).permute(0, 4, 5, 1, 6, 2, 7, 3)
        return x.flatten(6).flatten(4, 5).flatten(2, 3)


class HybridEncoder(nn.Module):                             # (B, 3, F, H, W) -> (B, bits, f, h, w)
    def __init__(self, c=8, width=56, n=2):
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv3d(3, c, 3, padding=1, bias=False), Res3d(c, c), nn.Conv3d(c, c, 3, 2, 1), Res3d(c, 2 * c),
            nn.Conv3d(2 * c, 2 * c, 3, 2, 1), Res3d(2 * c, 4 * c), Res3d(4 * c, 4 * c))
        self.body = nn.Sequential(nn.Linear(4 * c, width), AlongTime(n, width), nn.LayerNorm(width),
                                  nn.Linear(width, BITS))

    def forward(self, x):
        x = torch.cat([x[:, :, :1].repeat(1, 1, 3, 1, 1), x], dim=2)                      # F + 3 = 4 f frames
        B, blocks = len(x), x.unflatten(2, (-1, 4)).transpose(1, 2).flatten(0, 1)          # (B*f, 3, 4, H, W)
        x = self.cnn(blocks).squeeze(2).unflatten(0, (B, -1))                               # (B, f, 4c, h, w)
        return self.body(x.permute(0, 1, 3, 4, 2)).permute(0, 4, 1, 2, 3)


class HybridDecoder(nn.Module):                             # (B, bits, f, h, w) -> (B, 3, F, H, W)
    def __init__(self, c=8, width=56, n=2):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(BITS, width), AlongTime(n, width), nn.LayerNorm(width),
                                  nn.Linear(width, 4 * c))
        self.cnn = nn.Sequential(Res3d(4 * c, 4 * c), Res3d(4 * c, 4 * c),
                                 Up3d(4 * c, 8 * 2 * c, 3, padding=1), Res3d(2 * c, 2 * c),
                                 Up3d(2 * c, 8 * c, 3, padding=1), Res3d(c, c), nn.GroupNorm(GROUPS, c),
                                 nn.SiLU(), nn.Conv3d(c, 3, 3, padding=1))

    def forward(self, q):
        B, _, f = q.shape[:3]
        # (B*f, 4c, 1, h, w)
        x = self.body(q.permute(0, 2, 3, 4, 1)).flatten(0, 1).permute(0, 3, 1, 2).unsqueeze(2)
        x = self.cnn(x).unflatten(0, (B, f)).transpose(1, 2).flatten(2, 3)                  # (B, 3, 4f, H, W)
        return x[:, :, 3:]                                  # of the first block one frame stays


# ---------------------------------------------------------------------------------------------------
# The causal 3-D CNN's switch, and all five

class PooledConv(lfq.CausalConv):
    """What MAGVIT had in the place of a strided convolution: the mean of each cell, then a convolution
    without a stride. A cell is 2 x 2 x 2 and ends with an even frame; frame 0 is its own.
    """

    def forward(self, x):
        return super().forward(F.avg_pool3d(torch.cat([x[:, :, :1], x], dim=2), 2))


def tokenizer(design):
    """A design's name -> an untrained lfq.LFQ with its networks."""
    model = lfq.LFQ(**SIZE)
    if design == "C-ViViT":
        model.encoder, model.decoder = ViViTEncoder(), ViViTDecoder()
    elif design == "hybrid":
        model.encoder, model.decoder = HybridEncoder(), HybridDecoder()
    elif design == "average pooling":
        for i, layer in enumerate(model.encoder):
            if isinstance(layer, lfq.CausalConv) and layer.stride[-1] == 2:
                model.encoder[i] = PooledConv(layer.in_channels, layer.out_channels)
                model.encoder[i].load_state_dict(layer.state_dict())                  # the same first weights
    elif design == "no adaptive norm":
        for i, layer in enumerate(model.decoder):
            if isinstance(layer, lfq.AdaptiveNorm):
                model.decoder[i] = lfq.FrameNorm(layer.num_channels, layer.num_groups)
    return model


def size_of(model):
    return sum(p.numel() for p in model.parameters())


def clip_set(n, split="train"):
    """n drawn clips -> data.ImageSet of uint8 (N, 3, F, H, W) with their actions."""
    clips, actions, _ = data.draw_clips(
        torch.arange(n) + (data.VAL_INDEX if split == "val" else 0), SIDE, FRAMES)
    return data.ImageSet(((clips + 1) * 127.5).round().to(torch.uint8), actions, data.ACTIONS, "cpu")


def fit(model, clips, steps, batch_size, seed):
    """Train a tokenizer on an ImageSet of clips -> seconds of processor time. The same batches for every
    design.
    """
    opt, start = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95)), time.process_time()
    for step in range(steps):
        opt.param_groups[0]["lr"] = LR * min(1, (step + 1) / 30) * (1 - step / steps)
        loss, _ = model(clips.batch(data.order(len(clips), batch_size, step, seed))[0])
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
    return time.process_time() - start


# ---------------------------------------------------------------------------------------------------
# Measures

def classifiers(clips, held_out, args):
    """The classifiers of actions and of single frames' shapes, trained once -> ClipCNN, SmallCNN in eval
    mode.
    """
    path, some = args.runs / f"classifiers-{args.n}-{args.classifier_steps}.pt", torch.linspace(
        0, FRAMES - 1, 4).long()
    nets = [classifier.ClipCNN(len(data.ACTIONS)), classifier.SmallCNN(len(data.SHAPES))]
    if not path.exists():
        shapes = [data.scene(torch.arange(len(s)) + at, video=True)["label"].repeat_interleave(4)
                  for s, at in ((clips, 0), (held_out, data.VAL_INDEX))]
        frames = [data.ImageSet(as_frames(s.images[:, :, some]), labels, data.SHAPES, "cpu")
                  for s, labels in zip((clips, held_out), shapes)]
        for k, (name, sets) in enumerate(
            (("actions of clips", (clips, held_out)), ("shapes in frames", frames))):
            nets[k], accuracy = classifier.train_classifier(*sets, steps=args.classifier_steps)
            print(f"classifier: {name} {accuracy:.1%} right", flush=True)
        torch.save([net.state_dict() for net in nets], path)
    for net, state in zip(nets, torch.load(path, weights_only=True)):
        net.load_state_dict(state)
    return [net.eval() for net in nets]


@torch.no_grad()
def look(nets, clips):                         # (N, 3, F, H, W) -> features of clips, of frames, actions seen
    of_clips, seen = (torch.cat(v)
                      for v in zip(*[classifier.look(nets[0], part) for part in clips.split(50)]))
    return of_clips, features_of_frames(nets[1], clips, 450), seen


@torch.no_grad()
def measure(model, clips, actions, nets, real):
    """Reconstructions of held-out clips (N, 3, F, H, W) -> {metric: number}."""
    ids = torch.cat([model.encode(part) for part in clips.split(50)])
    recon = torch.cat([model.decode(part) for part in ids.split(50)])
    by_frame = metrics.psnr(as_frames(recon), as_frames(clips)).view(len(clips), FRAMES)
    of_clips, of_frames, seen = look(nets, recon)
    return dict(psnr=by_frame.mean().item(), psnr_first=by_frame[:, 0].mean().item(),
                psnr_rest=by_frame[:, 1:].mean().item(), used=len(ids.unique()) / model.vocab_size,
                frechet_frames=metrics.frechet_distance(of_frames, real[1]),
                frechet_clips=metrics.frechet_distance(of_clips, real[0]),
                accuracy=(seen == actions).float().mean().item())


def arm(design, seed, steps, clips, held_out, actions, nets, real, args):
    """Train and measure one design, unless that is done -> its row, its network."""
    path = args.runs / f"{design.replace(' ', '-')}-{seed}-{steps}x{args.batch_size}-of-{args.n}.pt"
    torch.manual_seed(seed)
    model = tokenizer(design)
    if not path.exists():
        seconds = fit(model, clips, steps, args.batch_size, seed)
        row = dict(design=design, seed=seed, steps=steps, parameters=size_of(model),
                   ms_per_step=1000 * seconds / steps, **measure(model.eval(), held_out, actions, nets, real))
        torch.save(dict(row=row, model=model.state_dict()), path)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    return dict(saved["row"], steps=steps), model.eval()


COLUMNS = (("psnr", "PSNR, dB", 1), ("psnr_first", "first frame", 1), ("psnr_rest", "the others", 1),
           ("used", "codes in use, %", 100), ("frechet_frames", "Frechet, frames", 1),
           ("frechet_clips", "Frechet, clips", 1), ("accuracy", "action seen, %", 100))


def table(rows, floor):
    """Markdown, one row per design and budget: mean over seeds (smallest .. largest)."""
    names = " | ".join(name for _, name, _ in COLUMNS)
    lines = [f"| steps | design | parameters | {names} | ms per step | paper: image FID, FVD |",
             "|---" * (len(COLUMNS) + 5) + "|"]
    for steps, design in [(n, d) for n in sorted({r["steps"] for r in rows}) for d in DESIGNS]:
        mine, paper, cells = [r for r in rows
                              if (r["steps"], r["design"]) == (steps, design)], DESIGNS[design], []
        for key, _, factor in COLUMNS:
            v = [factor * r[key] for r in mine]
            cells.append(f"{mean(v):.1f}" + (f" ({min(v):.1f} .. {max(v):.1f})" if len(v) > 1 else ""))
        cells += [f"{mean(r['ms_per_step'] for r in mine):.0f}", "{1}, {2}".format(*paper) if paper else ""]
        lines.append(f"| {steps} | {design} | {mine[0]['parameters']:,} | " + " | ".join(cells) + " |")
    return "\n".join(
        lines +
        [f"Frechet distance of as many other real clips: frames {floor[1]:.2f}, clips {floor[0]:.2f}"])


def save_figure(path, rows, floor, clip, strips):
    """Bars for three measures; below, a held-out clip and what each design makes of it. strips: {name: (3, F,
    H, W)}.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig = plt.figure(figsize=(11.5, 8.2))
    top, bottom = fig.add_gridspec(2, 1, height_ratios=[1, 1.75], left=0.14, right=0.985, top=0.88,
                                   bottom=0.02, hspace=0.2)
    titles = {"psnr": "PSNR, dB (more is better)", "frechet_frames": "Frechet distance of frames (less)",
              "frechet_clips": "Frechet distance of clips (less)"}
    names, budgets = list(strips), sorted({r["steps"] for r in rows})
    for k, (key, title) in enumerate(titles.items()):
        ax = fig.add_subplot(top.subgridspec(1, 3, wspace=0.08)[k])
        thick = 0.8 / len(budgets)
        for y, name, b, steps in [(*a, *b) for a in enumerate(names) for b in enumerate(budgets)]:
            values, at = [r[key] for r in rows
                          if (r["design"], r["steps"]) == (name, steps)], y - 0.4 + (b + 0.5) * thick
            ax.barh(at, mean(values), 0.92 * thick, color=f"C{y}", alpha=0.8 * (b + 1) / len(budgets))
            ax.plot(values, [at] * len(values), "k.", ms=4)
        if k:
            ax.axvline(floor[2 - k], color="k", ls=":", lw=1)
        ax.set(title=title, yticks=range(len(names)), yticklabels=names if k == 0 else [])
        ax.set_xlim(left=min(r[key] for r in rows) - 2 if key == "psnr" else 0)
        ax.invert_yaxis()
        ax.grid(axis="x", alpha=0.3)
    cells = bottom.subgridspec(len(names) + 1, FRAMES, wspace=0.04, hspace=0.06)
    for r, (name, frames) in enumerate({"held-out clip": clip, **strips}.items()):
        for t in range(FRAMES):
            ax = fig.add_subplot(cells[r, t])
            ax.imshow(pictures.tile(frames[:, t][None], 1), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            if r == 0:
                ax.set_title(f"frame {t}", fontsize=9)
            if t == 0:
                ax.set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
    fig.suptitle(
        f"tokenizers of clips, equal parameters and tokens, after {' and '.join(map(str, budgets))} steps" +
        " (darker: more)" * (len(budgets) > 1) + "\n"
        "dots: seeds; dotted line: the distance between two sets of real clips", fontsize=11)
    fig.savefig(path, dpi=80)
    plt.close(fig)


def main(argv=None):
    p = argparse.ArgumentParser(
        description="C-ViViT, hybrid and causal 3-D CNN tokenizers at equal parameters and steps.")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2],
                   help="seeds of the first weights and of the batches")
    p.add_argument("--steps", type=int, nargs="+", default=[800],
                   help="training steps of every design, one or more budgets")
    p.add_argument("--batch_size", type=int, default=8, help="clips per step")
    p.add_argument("--n", type=int, default=3000, help="training clips; a sixth as many are held out")
    p.add_argument("--classifier_steps", type=int, default=200,
                   help="training steps of the two classifiers that measure")
    p.add_argument("--runs", default=ROOT / "runs" / "video-designs", type=Path,
                   help="where trained networks lie")
    p.add_argument("--out", default=Path(__file__).parent / "results", type=Path,
                   help="folder of the JSON and the PNG")
    args = p.parse_args(argv)
    args.runs.mkdir(parents=True, exist_ok=True), args.out.mkdir(parents=True, exist_ok=True)
    train_clips, val_clips = clip_set(args.n), clip_set(args.n // 6, "val")
    nets = classifiers(train_clips, val_clips, args)
    held_out, actions = val_clips.batch(torch.arange(len(val_clips)))
    real = look(nets, held_out)
    others = look(nets, train_clips.batch(torch.arange(len(val_clips)))[0])
    floor = [metrics.frechet_distance(a, b) for a, b in zip(others[:2], real[:2])]       # of clips, of frames
    rows, strips, i = [], {}, int((actions == data.ACTIONS.index("moves right")).int().argmax())
    for seed, steps, design in [(a, b, c) for a in args.seeds for b in args.steps for c in DESIGNS]:
        row, model = arm(design, seed, steps, train_clips, held_out, actions, nets, real, args)
        rows.append(row)
        if (seed, steps) == (args.seeds[0], max(args.steps)):
            strips[design] = model.decode(model.encode(held_out[i:i + 1]))[0]
    out = args.out / "video-designs"
    facts = age.of_run() | dict(steps=args.steps, batch_size=args.batch_size, lr=LR, clips=args.n,
                                held_out=len(held_out), floor_clips=floor[0], floor_frames=floor[1],
                                real_accuracy=(real[2] == actions).float().mean().item(), rows=rows)
    out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    save_figure(out.with_suffix(".png"), rows, floor, held_out[i], strips)
    print(table(rows, floor))
    print(f"wrote {out}.json and .png")


if __name__ == "__main__":
    main()
