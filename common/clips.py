"""
What runs on clips need besides: single frames in training, frame prediction, film strips, their metrics.

data.py reads clips and common/drawing.py draws them. A tokenizer of clips is causal: the tokens of the first
frames know nothing of later ones, so a generator can be given them and asked how the clip goes on.

Shapes:  N clips, B in a batch, F frames, n of them given, T tokens per clip, H W pixels

    clips (N, 3, F, H, W) --first n frames--> known tokens (N, T), known_mask (N, T) --predict--> clips
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F

import data
from common import drawing, pictures, reading, runs
from common.classifier import look
from common.metrics import psnr, ssim
from data import BadInput
from perceptual_gan import as_frames

STILLS = 4                                                  # frames of each clip in a batch of single frames


class Stills:
    """A training set of clips in which every other batch, by chance, is of single frames, each an image.

    So one tokenizer learns both, with the same weights and codes. A batch is of one kind, so shapes are
    static. A batch of frames costs a tenth of one of clips, and how things look is learnt from it as well.
    """

    def __init__(self, clips):
        self.clips = clips

    def __len__(self):
        return len(self.clips)

    def batch(self, index, share=slice(None)):
        """index (B,) -> of a share: clips (B, 3, F, H, W), or four frames of each (4 B, 3, H, W); labels."""
        x, labels = self.clips.batch(index, share)
        if torch.rand((), device="cpu") >= 0.5:             # on the CPU, so all processes decide alike
            return x, labels
        _, _, n_frames, H, W = x.shape
        score = torch.rand(len(index), n_frames, device=x.device)[share]
        chosen = score.argsort(1)[:, :STILLS]                                         # (B, 4), each once
        chosen = chosen[:, :, None, None, None].expand(-1, -1, 3, H, W)
        frames = x.transpose(1, 2).gather(1, chosen)                                  # (B, 4, 3, H, W)
        return frames.flatten(0, 1), labels.repeat_interleave(frames.shape[1])


# ---- Frame prediction ----------------------------------------------------------------------------

def known_tokens(run, n):
    """How many tokens the first n frames of a clip are. BadInput where no token ends after n frames."""
    frames = run.args.frames
    stride = run.tokenizer.time_stride
    if n % stride != 1 % stride or not 1 <= n < frames:
        nearest = sorted(range(1, frames, stride), key=lambda k: abs(k - n))[:2]
        raise BadInput(f"--known_frames {n}: tokens stand for 1 + a multiple of {stride} frames, and some "
                       f"must be left to draw: {' or '.join(map(str, nearest))}")
    return run.tokenizer.latent_frames(n) * math.prod(run.tokenizer.space)


def predict(run, clips, n, labels=None, cfg=None, **options):
    """Frame prediction: clips (N, 3, F, H, W), of which the first n frames are looked at -> clips that go on.

    labels (N,): the actions to go on with. None: the frames alone have to tell, and nothing is guided.
    """
    k = known_tokens(run, n)
    parts = clips[:, :, :n].split(max(1, 250 // n))
    tokens = torch.cat([run.tokenizer.encode(part.to(run.device)) for part in parts])                 # (N, k)
    known = F.pad(tokens, (0, run.tokenizer.seq_len - k))                             # (N, T)
    mask = (torch.arange(run.tokenizer.seq_len, device=run.device) < k).expand(len(known), -1)
    if labels is None:
        labels = torch.full((len(known),), run.generator.num_classes, device="cpu")   # "no class"
        cfg = 1.0
    return drawing.draw_samples(run, labels, cfg, known=known, known_mask=mask, **options)


def save_prediction(path, run, clips, names, n, gif=None, **options):
    """Film strips of frame prediction -> the predicted clips. gif: a path, for the same in motion.

    Each of clips (N, 3, F, H, W) stands above what the run makes of its first n frames: the green edge.
    """
    drawn = predict(run, clips, n, **options)
    rows = []
    for name, clip, predicted in zip(names, clips, drawn):
        rows.append((name, pictures.film(clip, given=n)))
        rows.append(("predicted", pictures.film(predicted, given=n)))
    title = f"{run.folder.name}: the first {n} frames of {run.args.frames} (green) are given"
    pictures.save_rows(path, rows[:2 * drawing.MOST_ROWS], title)
    if gif:
        both = torch.cat([clips.cpu(), drawn])
        pictures.save_clips(gif, both, len(clips), ("true", "predicted"), given=n)
    return drawn


def own_clip(path, image_size, frames):
    """A clip of one's own: an animation, a film or a folder of pictures -> (1, 3, F, H, W) in [-1, 1]."""
    path = Path(path)
    if not path.exists():
        raise BadInput(f"--image {path}: there is no such file or folder")
    files = path.iterdir() if path.is_dir() else [path]
    found = reading.clips_of([(file.as_posix(), file.read_bytes) for file in files])
    if not found:
        raise BadInput(f"--image {path}: neither an animation, nor a film, nor a folder of pictures")
    clip = reading.read_clip(*found[0], image_size, frames)[0]
    return clip[None].float() / 127.5 - 1


def validation_clips(run, n=None):
    """n validation clips, first one of each action, then the next of each -> (n, 3, F, H, W), their names.

    Default: one of each action, of at most MOST_ROWS.
    """
    clips = runs.open_split(run.args, "val", run.device)
    n = n or min(len(run.classes), drawing.MOST_ROWS)
    seen = {}                                               # action -> how many of it came before
    turns = []
    for i, k in enumerate(clips.labels.tolist()):
        turns.append((seen.get(k, 0), k, i))
        seen[k] = seen.get(k, 0) + 1
    x, labels = clips.batch(torch.tensor([i for _, _, i in sorted(turns)[:n]], device="cpu"))
    return x, [str(run.classes[k]) for k in labels.tolist()]


# ---- What sample.py draws of a run on clips ------------------------------------------------------

def draw(run, path, gif=None, cls=None, n=None, **options):
    """Clips of one class or of all -> (N, 3, F, H, W), labels (N,). path: film strips; gif: them moving."""
    n = n or (4 * len(run.classes) if cls is None else 8)
    labels = drawing.labels_of(run.classes, cls, n)
    drawn = drawing.draw_samples(run, labels, **options)
    drawing.save_strips(path, run, drawn, labels, each=1 if cls is None else 8)
    if gif:
        classes = labels.unique()[:drawing.MOST_ROWS]
        columns = min(6, *labels.bincount()[classes].tolist())
        shown = drawing.first_of_each(labels, columns)
        names = [str(run.classes[k]) for k in classes.tolist()]
        pictures.save_clips(gif, drawn[shown], columns, names)
    return drawn, labels


def go_on(run, path, n_known, gif=None, image=None, cls=None, n=None, **options):
    """How clips go on after n_known frames -> clips (N, 3, F, H, W), labels (N,), -1 where none was given.

    image: file or folder of a clip of one's own (default: n validation clips). cls: the action to come.
    """
    if image:
        clips = own_clip(image, run.args.image_size, run.args.frames)
        names = [Path(image).stem]
    else:
        clips, names = validation_clips(run, n)
    labels = None if cls is None else drawing.labels_of(run.classes, cls, len(clips))
    drawn = save_prediction(path, run, clips, names, n_known, gif, labels=labels, **options)
    return drawn, torch.full((len(drawn),), -1, device="cpu") if labels is None else labels


# ---- Metrics: a row is (key in metrics.json, name, number, unit, remark) -------------------------

def single_frames(run, clips, split):
    """Four frames of each clip of an ImageSet -> an ImageSet of images, to train the classifier of frames on.

    Its classes are those of the clips. In the drawn world they are the shapes, for one frame hardly tells
    what happens.
    """
    labels = clips.labels
    classes = clips.classes
    if run.args.data == "shapes":
        index = torch.arange(len(clips), device="cpu") + (data.VAL_INDEX if split == "val" else 0)
        labels = data.scene(index, run.args.seed, video=True)["label"]
        classes = data.SHAPES
    chosen = torch.linspace(0, clips.frames - 1, 4, device="cpu").long()
    frames = as_frames(clips.images[:, :, chosen])
    return data.ImageSet(frames, labels.repeat_interleave(4), classes, clips.device)


@torch.no_grad()
def features_of_frames(net, clips, batch_size):
    """Clips (N, 3, F, H, W) -> the features of all their frames (N F, 128) by a SmallCNN."""
    device = net.classify.weight.device
    at_once = max(1, batch_size // clips.shape[2])
    return torch.cat([net.features(as_frames(part.to(device))) for part in clips.split(at_once)])


@torch.no_grad()
def measure_clip_reconstruction(tokenizer, net, clips, labels, batch_size):
    """Encode and decode clips (N, 3, F, H, W), and their middle frames as images -> rows."""
    used = torch.zeros(tokenizer.vocab_size, dtype=torch.bool, device=labels.device)
    columns = []                                            # (B,) each, of every batch
    middle = clips.shape[2] // 2
    for x, y in zip(clips.split(batch_size), labels.split(batch_size)):
        tokens = tokenizer.encode(x)
        used[tokens] = True
        recon = tokenizer.decode(tokens)
        image = x[:, :, middle].contiguous()
        frames, recon_frames = as_frames(x), as_frames(recon)
        by_frame = [metric(frames, recon_frames).view(len(x), -1).mean(1) for metric in (psnr, ssim)]
        db_image = psnr(image, tokenizer.decode(tokenizer.encode(image)))
        right = (look(net, recon)[1] == y).float()
        columns.append((*by_frame, db_image, right))
    db, similar, db_image, right = (torch.cat(column).mean().item() for column in zip(*columns))
    return [
        ("recon_psnr_db", "reconstruction PSNR, per frame", db, "dB", "higher is better"),
        ("recon_ssim", "reconstruction SSIM (luminance), per frame", similar, "",
         "higher is better, 1 is a copy"),
        ("recon_image_psnr_db", "reconstruction PSNR, middle frames as images", db_image, "dB",
         "the same weights"),
        ("recon_accuracy", "action accuracy, reconstructions", 100 * right, "%", "higher is better"),
        ("codebook_usage", "codes that occur", 100 * used.float().mean().item(), "%",
         f"of {len(used)}, in {len(clips)} validation clips"),
    ]


@torch.no_grad()
def measure_prediction(run, net, clips, labels, **options):
    """Frame prediction: the first frames of clips (N, 3, F, H, W) given, the action not told -> rows.

    Is the true action seen in what comes out? Chance has a rival that costs nothing: the last given frame
    stands still. PSNR is over the predicted frames. A sample is one of many possible futures, so it need not
    come nearest.
    """
    n = 1 + run.tokenizer.time_stride
    if n >= clips.shape[2]:
        n = 1
    drawn = predict(run, clips, n, **options).to(clips.device)
    last = clips[:, :, n - 1:n].expand(-1, -1, clips.shape[2] - n, -1, -1)
    still = torch.cat([clips[:, :, :n], last], 2)

    def accuracy(x):
        seen = torch.cat([look(net, part)[1] for part in x.split(100)])
        return 100 * (seen == labels).float().mean().item()

    def decibel(x):
        return psnr(as_frames(clips[:, :, n:]), as_frames(x[:, :, n:])).mean().item()

    given = f"{n} of {clips.shape[2]} frames given"
    return [
        ("prediction_accuracy", f"action accuracy, {given}", accuracy(drawn), "%",
         "higher is better; the action is not told"),
        ("prediction_accuracy_still", "the same, if the rest stands still", accuracy(still), "%",
         "what these frames show"),
        ("prediction_psnr_db", "PSNR of the predicted frames", decibel(drawn), "dB", "higher is better"),
        ("prediction_psnr_still_db", "the same, if the rest stands still", decibel(still), "dB",
         "no prediction at all"),
    ]
