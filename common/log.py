"""
The log of a run: one line on the screen per row, and log.csv in the run folder.

A row is a dict {name: number}: step, loss, what the model reports besides, grad_norm, val_loss at times,
ms_per_step.
"""
import csv
import os


def show(row, seconds_left):
    """Print one row in a line, and the time that is left."""
    shown = [name for name in row if name not in ("step", "ms_per_step")]
    numbers = "  ".join(f"{name} {row[name]:.4g}" for name in shown)
    minutes, seconds = divmod(int(seconds_left), 60)
    left = f"{minutes}:{seconds:02d} left"
    print(f"step {row['step']:6d}  {numbers}  {row['ms_per_step']:.0f} ms  {left}", flush=True)


def write(folder, rows):
    """log.csv, all of it: a few hundred rows. Renamed into place, so a kill never leaves half a file."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    temporary = folder / "log.csv.tmp"
    with open(temporary, "w", newline="") as f:
        writer = csv.DictWriter(f, names)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, folder / "log.csv")


def read(folder, last):
    """The rows of log.csv up to step `last`; after a resume, later ones are written again."""
    path = folder / "log.csv"
    if not path.is_file():
        return []
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    if rows and not (rows[0].get("step") or "").isdigit():
        print(f"{path} is not a log of this program: it is begun anew")
        return []
    return [row for row in rows if int(row["step"]) <= last]
