"""A zip for Gradescope: setup.sh, run_autograder, and the project's files that grading one homework needs.

The layout is that of gradescope-autograders.readthedocs.io: there the zip lies in /autograder/source, what a
student handed in in /autograder/submission, and the result goes to /autograder/results/results.json.
"""
import argparse
import json
import zipfile
from pathlib import Path

from homework.kit import ROOT

SETUP = """#!/usr/bin/env bash
set -e
apt-get update
apt-get install -y python3 python3-pip python3-venv util-linux
python3 -m venv /opt/grading
/opt/grading/bin/pip install numpy pillow torch --index-url https://download.pytorch.org/whl/cpu \\
    --extra-index-url https://pypi.org/simple
"""
RUN = """#!/usr/bin/env bash
# Grades what is in submission/ and writes results/results.json, both beside this file.
base="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"
python=/opt/grading/bin/python
[ -x "$python" ] || python="${{PYTHON:-python3}}"
chmod -R go-rwx "$base/source"
mkdir -p "$base/results"
cd "$base/source" || exit 1
"$python" -m homework.autograder {file} "$base/submission" "$base/results/results.json"{further}
"""


def files(name):
    """{path in the zip: text} of what grading NAME.py needs."""
    paths = [ROOT / f"{name}.py", ROOT / "common" / "__init__.py", ROOT / "common" / "reading.py",
             *sorted((ROOT / "homework").glob("*.py"))]
    secret = [ROOT / "homework" / "mistakes.py"]
    others = secret + [
        ROOT / "homework" / f"{path.stem}.py" for path in ROOT.glob("*.py") if path.stem != name
    ]
    return {str(p.relative_to(ROOT)): p.read_text() for p in paths if p not in others and p.exists()}


def write(path, name, further=False):
    """Write the zip for NAME.py."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        def add(file, text, mode=0o644):
            info = zipfile.ZipInfo(file, (2020, 1, 1, 0, 0, 0))
            info.external_attr = (0o100000 | mode) << 16
            z.writestr(info, text)

        add("setup.sh", SETUP, 0o755)
        add("run_autograder", RUN.format(file=name, further=" --further" if further else ""), 0o755)
        for file, text in files(name).items():
            add(file, text)


def main():
    """Runs in Gradescope's container: python -m homework.autograder FILE SUBMISSION RESULTS."""
    from homework import grading, report, sandbox           # they import this file
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("submission")
    parser.add_argument("results")
    grading.add_grading(parser, dict(action="store_true"))
    args = parser.parse_args()
    seed = 1 if args.seed is None else args.seed
    row = grading.Grader(args.file, seed, args, sandbox.to_hide([])).grade(args.submission)
    Path(args.results).write_text(json.dumps(report.gradescope(row), indent=1))


if __name__ == "__main__":
    main()
