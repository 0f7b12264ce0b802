"""
Which optimizer teaches a generator most in the same processor time, and what a step of Muon takes?

    python experiments/optimizers.py runs/shapes-vae-ar-gmm        # 3 seeds x 3 arms x 60 s, and two minutes

  arms       AdamW; Muon with whole matrices and five iterations, as published; Muon with blocks of 64 rows
             and three iterations, as train.py has it (common/muon.py)
  model      the run's generator, anew from each seed, on the run's tokens, with its batch size and --lr
  budget     the same processor time for each, in turns; the learning rate falls to 0 in that time
  measured   validation loss; then milliseconds of one step of Muon on these matrices, in float32 and bfloat16

Writes experiments/results/optimizers.json.
"""
import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean, median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train
from common import age, muon, runs, tokens
from data import BadInput
from experiments import equal_time

MUON = {"whole matrices, 5 iterations": None, "blocks of 64 rows, 3 iterations": muon.ROWS}
ARMS = ("AdamW", *MUON)


def optimizers_of(arm, model, args):
    """One arm's optimizers, as train.py makes them but for the blocks."""
    kind = argparse.Namespace(**vars(args) | dict(optimizer="adamw" if arm == "AdamW" else "muon"))
    made = train.make_optimizers(model, kind, args.lr)
    if arm in MUON:
        made[1].param_groups[0]["rows"] = MUON[arm]
    return made


def build(run, seed):
    torch.manual_seed(seed)
    return runs.build_generator(run.args, run.tokenizer, len(run.classes)).to(run.device)


def step_ms(arm, dtype, model, args, rounds):
    """Median milliseconds of processor time of one step of Muon for all matrices of the model."""
    optimizer = optimizers_of(arm, model, args)[1]
    optimizer.dtype = dtype
    found = []
    for _ in range(rounds + 1):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn_like(p)
        start = time.process_time()
        optimizer.step()
        found.append(1000 * (time.process_time() - start))
    return median(found[1:])


def main(argv=None):
    p = argparse.ArgumentParser(description="AdamW and two kinds of Muon at equal processor time.")
    p.add_argument("run", help="a run folder of a generator, with its tokenizer's folder beside it")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="which seeds")
    p.add_argument("--seconds", type=float, default=60, help="processor time for each arm and seed")
    p.add_argument("--rounds", type=int, default=5, help="timed steps of Muon")
    p.add_argument("--out", type=Path, default=ROOT / "experiments" / "results" / "optimizers.json")
    args = p.parse_args(argv)
    device = runs.pick_device("cpu")
    run = runs.load_run(args.run, device)
    if run.generator is None:
        raise BadInput(f"{args.run}: a tokenizer; name the run folder of a generator")
    sets = {}
    for split in ("train", "val"):
        images = runs.open_split(run.args, split, device)
        sets[split] = tokens.cached(run.tokenizer, images, run.folder / f"tokens-{split}.pt",
                                    argparse.Namespace(rank=0, size=1))
    n, batch_size = len(sets["train"]), run.args.batch_size
    draw = lambda: sets["train"].batch(torch.randint(n, (batch_size,)))
    found = {name: [] for name in ARMS}
    for seed in args.seeds:
        models = {name: build(run, seed) for name in ARMS}
        arms = {name: equal_time.Arm(model, optimizers_of(name, model, run.args), run.args.lr)
                for name, model in models.items()}
        equal_time.train_in_turns(arms, draw, args.seconds)
        for name, arm in arms.items():
            loss = train.validate(2, arm.model, sets["val"], run.args)
            found[name].append(dict(seed=seed, val_loss=loss, steps=arm.steps))
            print(f"seed {seed}, {name}: {loss:.3f} after {arm.steps} steps", flush=True)
    for name, rows in found.items():
        print(f"{name:32s}{mean(row['val_loss'] for row in rows):8.3f}, mean of {len(rows)}")
    took = {}
    for arm in MUON:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{arm}, {str(dtype).removeprefix('torch.')}"
            took[name] = step_ms(arm, dtype, build(run, 0), run.args, args.rounds)
            print(f"{name:48s}{took[name]:8.1f} ms a step")
    facts = age.of_run(device) | dict(run=run.folder.name, seconds=args.seconds, lr=run.args.lr,
                                      native_bf16=runs.native_bf16(device), found=found, muon_ms=took)
    args.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
