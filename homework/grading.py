"""Handing out and grading: python test_all.py list | handout | check | grade | autograder."""
import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.reading import BadInput
from homework import autograder, check, report, sandbox, submissions
from homework.course import exercises, graded, listing
from homework.handout import truths, write_handout
from homework.kit import MODELS, ROOT, judged, truth_file

NEEDED = ("__init__", "kit", "sandbox")                     # of homework/, in a student's process


# ---- Grading ------------------------------------------------------------------------------------------

class Grader:
    """All that grading NAME.py needs, made once: tests, truths, a clean folder to copy for each student."""

    def __init__(self, name, seed, args, hidden=()):
        self.name = name
        self.seed = seed
        self.args = args
        self.tests = graded(name, args.further)
        self.worth = own_points(args.points, self.tests)
        self.truths = truths(name, seed, args.further)
        self.reference = (ROOT / f"{name}.py").read_text()
        self.hidden = hidden

    def write_folder(self, folder, text):
        """A folder with the student's file, the tests, and nothing else."""
        (folder / "homework").mkdir(parents=True)
        for part in (*NEEDED, self.name):
            shutil.copy(ROOT / "homework" / f"{part}.py", folder / "homework" / f"{part}.py")
        (folder / f"{self.name}.py").write_bytes(text)

    def grade(self, path):
        """Grade one student -> dict: student, file, points, of, seconds, remark, seed, digest, source, worth,
        and tests: [(test, points, what is wrong, share of its checks that are right)].
        """
        start = time.perf_counter()
        found = submissions.find(path, self.name)
        seen, endings = {}, {}
        remark = found.remark
        wrong_file = why_not_python(found.text, self.name) if found.text is not None else remark
        if wrong_file:
            remark = wrong_file
        queue = [] if wrong_file else [t.__name__ for t in self.tests]
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            while queue:  # once more for the rest if a question has killed the process
                here = Path(folder) / str(len(queue))
                self.write_folder(here, found.text)
                done, began, ending = sandbox.run_process(here, self.name, queue, self.seed, self.args,
                                                          self.hidden)
                seen |= done
                queue = [t for t in queue if t not in done]
                if queue and (not began or ending.startswith("stopped")):
                    if not began:
                        remark = f"{self.name}.py {ending}"
                    endings |= {
                        t: ending if t in began or not began else "not reached in time" for t in queue
                    }
                    break
                if queue:
                    endings[queue.pop(0)] = ending
        rows = []
        for t in self.tests:
            what, failed = seen.get(t.__name__, ([], endings.get(t.__name__, wrong_file or "not run")))
            right, of, wrong = judged(what, failed, self.truths[t.__name__])
            worth = self.worth[t.__name__]
            points = check.points_of(worth, right, of, wrong, self.args.partial or t.goals)
            rows.append((t, points, wrong, right / max(of, 1)))
        text = found.text or b""
        return dict(student=found.student,
                    file=self.name,
                    points=round(sum(row[1] for row in rows), 1),
                    of=sum(self.worth.values()),
                    seconds=time.perf_counter() - start,
                    remark=remark,
                    seed=self.seed,
                    digest=digest(text),
                    tests=rows,
                    worth=self.worth,
                    source=text.decode(errors="replace"), ran=bool(seen or endings))


def digest(text):
    """A short name of a file's content, which tells whether it has changed."""
    return hashlib.sha256(text).hexdigest()[:16]


def why_not_python(text, name):
    """Why a file cannot be compiled, in a sentence, or ""."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(text, f"{name}.py", "exec", dont_inherit=True)
    except SyntaxError as e:
        return f"{name}.py is no Python: {e.msg}" + (f" (line {e.lineno})" if e.lineno else "")
    except (ValueError, RecursionError, MemoryError, OverflowError) as e:
        return f"{name}.py is no Python: {e}"
    return ""


def own_points(path, tests):
    """{test: points}: the course's, or those of a file of two lines, names of tests or functions and points.

    The points of a function are shared out among its tests as the course's are.
    """
    worth = {t.__name__: t.points for t in tests}
    if not path:
        return worth
    try:
        lines = [line for line in Path(path).read_text().split("\n") if line.strip()]
        names, points = ([word.strip() for word in line.split(",")] for line in lines)
        given = dict(zip(names, map(float, points), strict=True))
    except (OSError, ValueError) as e:
        raise BadInput(f"--points {path}: two lines, names and as many numbers, by commas ({e})") from None
    for name, value in given.items():
        own = [t for t in tests if name in (t.__name__, t.exercise, t.exercise.partition(".")[2])]
        if not own:
            raise BadInput(f"--points {path}: {name!r} is no test or function of this homework")
        whole = sum(t.points for t in own)
        for t in own:
            worth[t.__name__] = round(value * t.points / whole, 2)
    return worth


def show(row):
    """Print the table of one student."""
    print(f"{row['student']:20s} {row['points']:g} of {row['of']:g} points   {row['seconds']:.1f} s"
          + (f"   {row['remark']}" if row["remark"] else ""))
    for t, points, wrong, _ in row["tests"] if row["ran"] else []:
        question = t.exercise.partition(".")[2] or "capstone"
        print(f"    {points:g} of {row['worth'][t.__name__]:g}  "
              + (f"{question:40s} {wrong}" if wrong else question), flush=True)


def grade(args):
    """Print a table for each student; write a row of the CSV, a page and Gradescope's JSON after each."""
    if truth_file(args.file).is_file():
        raise BadInput(f"this is a handout, which holds no answers to grade by: `python test_all.py check "
                            f"{args.file}` tells how far you are")
    must_have(args.file)
    if args.seed is None:
        args.seed = 1
    grader = Grader(args.file, args.seed, args, sandbox.to_hide(args.students))
    if not sandbox.spaces():
        print("No namespaces on this machine: students' code can look for the project's files. "
              "Use a container: see docs/teachers.md.")
    names = name_students(args.students, args.file)
    waiting = dict(names)
    if args.resume:
        old = report.read_csv(args.csv)
        for path, student in names.items():
            row = old.get((student, args.file), {})
            text = submissions.find(path, args.file).text or b""
            same = row.get("digest") == digest(text) and row.get("seed") == str(args.seed)
            if same and float(row["of"]) == sum(grader.worth.values()):
                del waiting[path]
        if len(waiting) < len(names):
            print(f"{len(names) - len(waiting)} students are graded already and unchanged")
    lock = threading.Lock()

    def one(path):
        row = grader.grade(path)
        row["student"] = names[path]
        with lock:
            show(row)
            write_all(row, grader, args, alone=len(names) == 1)

    try:
        with ThreadPoolExecutor(args.jobs) as pool:
            futures = [pool.submit(one, path) for path in waiting]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except OSError as e:
        raise BadInput(f"could not write ({e})") from None
    except KeyboardInterrupt:
        raise BadInput(f"stopped; {args.csv} has those that were graded, and --resume goes on") from None
    print(f"wrote {args.csv}" + (f", {args.json}" if args.json else "") +
          (f", {args.html}" if args.html else ""))


def name_students(paths, file):
    """{path: student}: names that differ, also where two folders are called the same."""
    names = {}
    for path in paths:
        student = submissions.student_of(path, file)
        if student in names.values():
            student = str(path).strip("/").replace("/", "_")
        names[path] = student
    return names


def write_all(row, grader, args, alone):
    """A student's row of the CSV and, if asked for, page and JSON."""
    report.add_row(args.csv, report.csv_row(row))
    if args.json:
        path = Path(args.json) if alone else Path(args.json) / f"{row['student']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report.gradescope(row), indent=1))
    if args.html:
        folder = Path(args.html)
        folder.mkdir(parents=True, exist_ok=True)
        name = report.page_name(row["student"], row["file"])
        (folder / name).write_text(report.page(row, grader.reference, row["source"]))
        (folder / "index.html").write_text(report.overview(report.read_csv(args.csv)))


# ---- The other commands -------------------------------------------------------------------------------

def handout(args):
    """Write the project with the exercises of some files blanked."""
    names = list(MODELS) if "all" in args.files else args.files
    folder = Path(args.o or f"homework-{'-'.join(args.files)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f"-o {folder} is there already and not an empty folder: name another one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_handout(folder, names, args.released, args.further)
    except OSError as e:
        raise BadInput(f"could not write ({e})") from None
    for name in names:
        hidden = sum(t.points for t in graded(name, args.further) if t.hidden)
        print(
            f"wrote {folder}: {name}.py with {len(exercises(name, args.further))} functions to write; there, "
            f"python test_all.py check {name} tells how far one is" +
            (f". Hidden tests give {hidden} points more." if hidden else "."))


def show_check(args):
    """One line per question."""
    must_have(args.file)
    lines, got, most = check.lines(args.file, capstones=args.capstones)
    print(f"{args.file}.py: {got:g} of {most} points that can be seen here")
    print("\n".join(lines))


def must_have(name):
    """Refuse a file whose exercises are not here: a handout has those of its own files only."""
    if not (ROOT / "homework" / f"{name}.py").is_file():
        raise BadInput(f"this handout has no homework for {name}.py")


def show_list(args):
    if args.file:
        must_have(args.file)
    here = [name for name in MODELS if (ROOT / "homework" / f"{name}.py").is_file()]
    print("\n".join(listing([args.file] if args.file else here, args.further)))


def write_autograder(args):
    path = Path(args.o or "autograder.zip")
    try:
        autograder.write(path, args.file, args.further)
    except OSError as e:
        raise BadInput(f"could not write ({e})") from None
    print(
        f"wrote {path}: upload it in Gradescope under Configure Autograder; students hand in {args.file}.py"
    )


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description="The tests as homework: hand a file out, grade what comes back. (The tests "
        "themselves: python -m pytest test_all.py)")
    commands = parser.add_subparsers(required=True, metavar="list | handout | check | grade | autograder")
    further = dict(action="store_true", help="the second tier, too: more ideas, and a capstone per file")

    p = commands.add_parser("list", help="files in reading order, with points, minutes and tests")
    p.add_argument("file", nargs="?", choices=MODELS, metavar="FILE",
                   help="one model file, such as vae; default: all")
    p.add_argument("--further", **further)
    p.set_defaults(run=show_list)

    p = commands.add_parser("handout", help="copy the project with the exercises of some files blanked")
    p.add_argument("files",
                   nargs="+",
                   choices=[*MODELS, "all"],
                   metavar="FILE",
                   help=" | ".join(MODELS) + " | all")
    p.add_argument("-o", metavar="DIR", help="a new or empty folder (default: homework-FILE)")
    p.add_argument("--released", nargs="+", default=[], choices=MODELS, metavar="FILE",
                   help="files whose answers students may have; those of all others are blanked, too")
    p.add_argument("--further", **further)
    p.set_defaults(run=handout)

    p = commands.add_parser("check", help="how far a file is, one line per question (for students)")
    p.add_argument("file", choices=MODELS, metavar="FILE", help=" | ".join(MODELS))
    p.add_argument("--capstones", action="store_true", help="train the capstones, too: up to a minute each")
    p.set_defaults(run=show_check)

    p = commands.add_parser(
        "grade",
        help="run the graded tests on students' files, each in a process of its own",
        description=
        "Runs students' code. Limits and, on Linux, namespaces stop accidents and keep the teacher's "
        "files out of sight; nothing stops everybody. Grade what you do not trust in a container: see "
        "docs/teachers.md.")
    p.add_argument("file", choices=MODELS, metavar="FILE", help=" | ".join(MODELS))
    p.add_argument("students",
                   nargs="+",
                   help="folders, zips, notebooks or Python files, one for each student")
    p.add_argument("--csv", default="grades.csv", metavar="PATH",
                   help="a row per student and homework, added to those there (default: grades.csv)")
    p.add_argument("--html", metavar="DIR", help="a page per student, and index.html")
    p.add_argument("--json", metavar="PATH",
                   help="Gradescope's results.json; with several students a folder of one for each")
    p.add_argument("--jobs", type=int, default=1, help="students graded at once (default: 1)")
    p.add_argument("--resume", action="store_true", help="leave out whom the CSV has already, if unchanged")
    add_grading(p, further)
    p.set_defaults(run=grade)

    p = commands.add_parser("autograder", help="a zip for Gradescope")
    p.add_argument("file", choices=MODELS, metavar="FILE", help=" | ".join(MODELS))
    p.add_argument("-o", metavar="PATH", help="default: autograder.zip")
    p.add_argument("--further", **further)
    p.set_defaults(run=write_autograder)
    return parser.parse_args(argv)


def add_grading(p, further):
    """Flags of grading itself, which the autograder has, too."""
    p.add_argument("--seed", type=int, help="of the tests' random inputs; students have 0 (default: 1)")
    p.add_argument("--partial",
                   action="store_true",
                   help="points for the share of a test's checks that are right")
    p.add_argument("--points",
                   metavar="PATH",
                   help="your own: a line of tests or functions, a line of points")
    p.add_argument("--further", **further)
    p.add_argument("--seconds", type=float, default=60.0,
                   help="processor time of one student, for all questions (default: 60)")
    p.add_argument("--test_seconds", type=float, default=10.0,
                   help="processor time of one question (default: 10); ten times as long on the clock")
    p.add_argument("--gigabytes", type=float, default=4.0,
                   help="memory limit of a student's process (default: 4)")


def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else argv)
    args.run(args)
