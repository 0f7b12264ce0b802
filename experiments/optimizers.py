"""
Which optimizer teaches a generator most in the same processor time, and what a step of Muon takes?

    python experiments/optimizers.py runs/shapes-vae-ar-gmm        # 3 seeds x 4 arms x 60 s, and two minutes

  arms       AdamW; Muon with whole matrices and five iterations, as published; Muon with blocks of 64 rows
             and three iterations, as train.py has it but for MaskGIT; and the first edition's default, the
             small generator with whole matrices and --lr 4e-3
  model      the run's generator, anew from each seed, on the run's tokens, with its batch size and --lr
  budget     the same processor time for each, in turns, in float32; the learning rate falls to 0 in that time
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

ARMS = {                                                    # flags of train.py, and Muon's rows
    "AdamW": dict(optimizer="adamw"),
    "Muon, whole matrices": dict(optimizer="muon", rows=None),
    "Muon, blocks of 64 rows": dict(optimizer="muon", rows=muon.ROWS),
    "the first edition: small, whole matrices": dict(optimizer="muon", rows=None, size="small", lr=4e-3),
}


def build(arm, run, seed):
    """-> one arm's generator, its optimizers as train.py makes them but for the rows, its learning rate."""
    flags = dict(ARMS[arm])
    rows = flags.pop("rows", None)
    args = argparse.Namespace(**vars(run.args) | flags)
    torch.manual_seed(seed)
    model = runs.build_generator(args, run.tokenizer, len(run.classes)).to(run.device)
    optimizers = train.make_optimizers(model, args, args.lr)
    if args.optimizer == "muon":
        optimizers[1].param_groups[0]["rows"] = rows
    return model, optimizers, args.lr


def step_ms(optimizer, rounds):
    """Median milliseconds of processor time of one step of Muon for all its matrices."""
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
    p.add_argument("run", help="a run folder of a generator; its tokens are kept there")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="which seeds")
    p.add_argument("--seconds", type=float, default=60, help="processor time for each arm and seed")
    p.add_argument("--rounds", type=int, default=5, help="timed steps of Muon")
    p.add_argument("--out", type=Path, default=ROOT / "experiments" / "results" / "optimizers.json")
    args = p.parse_args(argv)
    device = runs.pick_device("cpu")
    run = runs.load_run(args.run, device)
    if run.generator is None:
        raise BadInput(f"{args.run}: a tokenizer; name the run folder of a generator")
    if run.args.condition == "text":
        raise BadInput(f"{args.run}: reads captions; name a run of classes")
    sets = {}
    for split in ("train", "val"):
        images = runs.open_split(run.args, split, device)
        sets[split] = tokens.cached(run.tokenizer, images, run.folder / f"tokens-{split}.pt",
                                    argparse.Namespace(rank=0, size=1))
    n, batch_size = len(sets["train"]), run.args.batch_size
    draw = lambda: sets["train"].batch(torch.randint(n, (batch_size,)))
    found = {name: [] for name in ARMS}
    for seed in args.seeds:
        arms = {name: equal_time.Arm(*build(name, run, seed)) for name in ARMS}
        equal_time.train_in_turns(arms, draw, args.seconds)
        for name, arm in arms.items():
            loss = train.validate(2, arm.model, sets["val"], run.args)
            found[name].append(dict(seed=seed, val_loss=loss, steps=arm.steps))
            print(f"seed {seed}, {name}: {loss:.3f} after {arm.steps} steps", flush=True)
    for name, rows in found.items():
        print(f"{name:42s}{mean(row['val_loss'] for row in rows):8.3f}, mean of {len(rows)}")
    took = {}
    for name in list(ARMS)[1:3]:
        for dtype in (torch.float32, torch.bfloat16):
            optimizer = build(name, run, 0)[1][1]
            optimizer.dtype = dtype
            kind = f"{name}, {str(dtype).removeprefix('torch.')}"
            took[kind] = step_ms(optimizer, args.rounds)
            print(f"{kind:42s}{took[kind]:8.1f} ms a step")
    facts = age.of_run(device) | dict(run=run.folder.name, seconds=args.seconds, lr=run.args.lr,
                                      native_bf16=runs.native_bf16(device), found=found, muon_ms=took)
    args.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
