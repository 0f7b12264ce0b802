"""Handing out and grading: python test_all.py list | handout | grade."""
import argparse
import ast
import compileall
import contextlib
import csv
import functools
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch

import data
from homework.kit import MODELS, ROOT


FOR_TEACHERS = ("homework/mistakes.py", "tests/test_homework.py")                     # never handed out


def graded(name):
    """The tests that grade NAME.py, in order."""
    tests = vars(importlib.import_module(f"homework.{name}")).values()
    return [t for t in tests if getattr(t, "exercise", "").split(".")[0] == name]


def exercises(name):
    """The functions of NAME.py that homework asks for, such as "GMMHead.density", in order."""
    return list(dict.fromkeys(t.exercise.partition(".")[2] for t in graded(name)))


parsed = functools.lru_cache(maxsize=None)(ast.parse)


def functions(source):
    """{"log_normal": node, "GMMHead.density": node, ...}: the functions and methods of a file."""
    found = {}
    for node in parsed(source).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        found |= {(f"{node.name}.{n.name}" if n is not node else n.name): n
                  for n in inner if isinstance(n, ast.FunctionDef)}
    return found


def body(node):
    """The statements of a function after its docstring."""
    return node.body[ast.get_docstring(node) is not None:]


def blanked(source, name, targets):
    """The source of NAME.py with the bodies of `targets` cut out, line by line; every other byte stays."""
    lines, nodes = source.split("\n"), functions(source)
    for target in sorted(targets, key=lambda t: -nodes[t].lineno):     # from the end: line numbers stay right
        first, last = body(nodes[target])[0], nodes[target].end_lineno
        lines[first.lineno -
              1:last] = [f'{" " * first.col_offset}raise NotImplementedError("homework: {name}.{target}")']
    return "\n".join(lines)


def without(source, cut):
    """A file of exercises without the tests whose names are in `cut`."""
    lines = source.split("\n")
    for node in reversed(parsed(source).body if cut else []):
        if getattr(node, "name", "") in cut:
            end = node.end_lineno
            while end < len(lines) and not lines[end]:
                end += 1
            del lines[node.decorator_list[0].lineno - 1:end]
    return "\n".join(lines)


def without_answers(name, hidden=False):
    """{file: text} of the project's Python files as handed out for NAME.py. Functions of other files with the
    same name and code as an exercise are blanked, too. hidden: whether the hidden tests stay, as they do
    while grading.
    """
    rooms = ("", "common", "official", "recipes", "homework", "tests")
    texts = {
        str(path.relative_to(ROOT)): path.read_text()
        for room in rooms
        for path in sorted((ROOT / room).glob("*.py"))
    }
    for path in FOR_TEACHERS:
        texts.pop(path, None)
    code = lambda node: "".join(map(ast.dump, body(node)))
    nodes = functions(texts[f"{name}.py"])
    targets = [target for target in exercises(name) if target in nodes]         # in a handout one may be gone
    answers = {(target.split(".")[-1], code(nodes[target])) for target in targets}
    for other in MODELS:
        same = [
            t for t, node in functions(texts[f"{other}.py"]).items()
            if (t.split(".")[-1], code(node)) in answers
        ]
        texts[f"{other}.py"] = blanked(texts[f"{other}.py"], other, targets if other == name else same)
    cut = [] if hidden else [t.__name__ for t in graded(name) if t.hidden]
    texts[f"homework/{name}.py"] = without(texts[f"homework/{name}.py"], cut)
    return texts


def write_project(folder, name, hidden=False):
    """The project as handed out for NAME.py, into an existing folder."""
    for file, text in without_answers(name, hidden).items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text)
    shutil.copytree(ROOT / "golden", folder / "golden")


class Stopped(BaseException):
    """A student's code went on for too long, or printed too much. No Exception: `except Exception` must not
    catch it.
    """


class Capped(io.StringIO):
    def write(self, text):
        if self.tell() > 100_000:
            raise Stopped("prints without end: more than 100,000 characters")
        return super().write(text)


def trial(test, seconds=0):
    """Run one graded test -> what is wrong, in a sentence, or "". seconds: of processor time, 0: any
    number.
    """
    def late(*_):
        raise Stopped(f"not done after {seconds:g} s of processor time: an endless loop?")
    name = test.exercise.split(".")[0]
    torch.manual_seed(0)
    if seconds:
        signal.signal(signal.SIGPROF, late), signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        with contextlib.redirect_stdout(Capped()), contextlib.redirect_stderr(Capped()):
            test()
        return ""
    except AssertionError as e:
        text = str(e) or "a check failed"
    except Stopped as e:
        text = str(e)
    except NotImplementedError:
        text = "not written yet"
    except BaseException as e:
        lines = [
            f.lineno for f in traceback.extract_tb(e.__traceback__) if Path(f.filename).name == f"{name}.py"
        ]
        text = f"{type(e).__name__}: {e}" + (f" ({name}.py, line {lines[-1]})" if lines else "")
        if isinstance(e, MemoryError) or "allocate memory" in text:
            text = "asks for more memory than it may have: " + text
    finally:
        if seconds:
            signal.setitimer(signal.ITIMER_PROF, 0)
    return " ".join(text.split())[:600]


def run_tests(name, seconds, tests):
    """The part of grading that runs in a process of its own, in the student's copy of the project: a line to
    results.jsonl before and after each test, so that the grader knows how far a process has come that
    dies.
    """
    by_name = {t.__name__: t for t in graded(name)}
    with open("results.jsonl", "a") as f:
        for test in tests:
            print("start", test, sep="\t", file=f, flush=True)
            print("end", test, trial(by_name[test], float(seconds)), sep="\t", file=f, flush=True)
    os._exit(0)                                             # whatever threads the student's code has left


def limits(gigabytes):
    """For a student's process: memory, the size of a file, no core dumps."""
    import resource                                 # not on Windows, where the tests run and grading does not
    for kind, most in (("DATA", int(gigabytes * 2**30)), ("FSIZE", 2**24), ("CORE", 0)):
        kind = getattr(resource, f"RLIMIT_{kind}")
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def run_process(folder, name, tests, args, seconds):
    """Run `tests` in the student's copy of the project -> {test: what is wrong, or ""} for those that came to
    an end, the tests that began, and what ended the process, in a sentence.
    """
    env = os.environ | {
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"
    }
    # Imported and not run as a script, for its compiled file lies beside it.
    start = "from homework import grading; grading.main()"
    words = [sys.executable, "-c", start, "_run", name, str(args.test_seconds), *tests]
    results, output = folder / "results.jsonl", folder / "output.txt"
    with open(output, "wb") as f:
        child = subprocess.Popen(words, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=f, stderr=f,
                                 start_new_session=True, preexec_fn=lambda: limits(args.gigabytes))
        try:
            code = child.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            code = None
        try:
            os.killpg(child.pid, signal.SIGKILL)            # with all that it has started
        except ProcessLookupError:
            pass
        child.wait()
    done, began = {}, []
    for line in results.read_text(errors="replace").split("\n")[:-1] if results.is_file() else ():
        key, test, wrong = (line.split("\t") + ["", ""])[:3]
        began, done = began + [test] * (key == "start"), done | ({test: wrong} if key == "end" else {})
    if code is None and not began:
        return done, began, f"is not imported within {args.seconds:g} s: an endless loop?"
    if code is None:
        return done, began, f"stopped: all questions together may take {args.seconds:g} s"
    if code < 0:
        return done, began, f"crashes the Python interpreter ({signal.Signals(-code).name})"
    if began:
        return done, began, f"ends the Python interpreter (exit code {code})"
    printed = output.read_text(errors="replace")
    last = [line for line in printed[-5000:].split("\n") if line.strip()] or [f"exit code {code}"]
    why = "prints without end" if len(printed) > 2**23 else last[-1][:600]
    return done, began, f"cannot be imported: {why}"


def grade_one(name, path, clean, args):
    """Grade one student -> dict: student, file, points, of, seconds, remark, and tests: [(test, points, what
    is wrong)].
    """
    start, tests, wrong, remark = time.perf_counter(), graded(name), {}, ""
    file = path if path.suffix == ".py" else path / f"{name}.py"
    student = file.resolve().parent.name if file.name == f"{name}.py" else file.stem
    try:
        text = file.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(text, f"{name}.py", "exec", dont_inherit=True)
    except FileNotFoundError:
        remark = f"there is no {file}"
    except OSError as e:
        remark = f"{file} cannot be read ({e.strerror})"
    except SyntaxError as e:
        remark = f"{name}.py is no Python: {e.msg}" + (f" (line {e.lineno})" if e.lineno else "")
    except (ValueError, RecursionError, MemoryError, OverflowError) as e:
        remark = f"{name}.py is no Python: {e}"
    queue = [] if remark else [t.__name__ for t in tests]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        while queue:                             # once more for the rest if a question has killed the process
            here = Path(folder) / str(len(queue))
            shutil.copytree(clean, here)
            (here / f"{name}.py").write_bytes(text)
            done, began, ending = run_process(here, name, queue, args,
                                              args.seconds - (time.perf_counter() - start))
            wrong |= done
            queue = [t for t in queue if t not in done]
            if queue and (not began or ending.startswith("stopped")):
                remark = ending if began else f"{name}.py {ending}"
                wrong |= {t: ending if t in began else "not reached in time" for t in queue if began}
                break
            if queue:
                wrong[queue.pop(0)] = ending
    rows = [(t, t.points if wrong.get(t.__name__) == "" else 0, wrong.get(t.__name__, "")) for t in tests]
    return dict(student=student, file=name, points=sum(points for _, points, _ in rows),
                of=sum(t.points for t in tests), seconds=time.perf_counter() - start, remark=remark,
                tests=rows)


def gradescope(row):
    """One student's grades as Gradescope's results.json has them. Hidden tests are shown after the due
    date.
    """
    tests = [
        dict(name=f"{t.exercise}: {t.__name__}", score=points, max_score=t.points, output=wrong or
             row["remark"], status="passed" if points else "failed",
             visibility="after_due_date" if t.hidden else "visible") for t, points, wrong in row["tests"]
    ]
    return dict(score=row["points"], execution_time=round(row["seconds"], 1), output=row["remark"],
                tests=tests)


def grade(args):
    """Print a table for each student, write grades.csv and, if asked for, Gradescope's JSON."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        clean = Path(folder)
        write_project(clean, args.file, hidden=True)
        compileall.compile_dir(clean, maxlevels=1, quiet=2)                       # once, not once per student
        for old in (clean / "__pycache__").glob(f"{args.file}.*"):
            old.unlink()
        for path in args.students:
            row = grade_one(args.file, Path(path), clean, args)
            if any(row["student"] == r["student"] for r in rows):
                row["student"] = str(path).replace("/", "_")                         # two folders of one name
            rows.append(row)
            print(f"{row['student']:20s} {row['points']:2d} of {row['of']} points   {row['seconds']:.1f} s"
                  + (f"   {row['remark']}" if row["remark"] else ""))
            for t, points, wrong in row["tests"] if row["points"] or not row["remark"] else []:
                print(
                    f"    {points} of {t.points}  " + (f"{t.exercise:46s} {wrong}" if wrong else t.exercise),
                    flush=True)
    try:
        with open(args.csv, "w", newline="") as f:
            out = csv.writer(f)
            out.writerow([
                "student", "file", "points", "of", *[t.__name__ for t in graded(args.file)], "seconds",
                "remark"
            ])
            for row in rows:
                out.writerow([row["student"], row["file"], row["points"], row["of"],
                              *[points for _, points, _ in row["tests"]],
                              f"{row['seconds']:.1f}", row["remark"]])
        print(f"wrote {args.csv}")
        if args.json:
            for row in rows:
                path = Path(args.json) if len(rows) == 1 else Path(args.json) / f"{row['student']}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(gradescope(row), indent=1))
            print(f"wrote {args.json}")
    except OSError as e:
        raise data.BadInput(f"could not write ({e})") from None


def handout(args):
    """Write the project with one file's exercises blanked."""
    folder = Path(args.o or f"homework-{args.file}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise data.BadInput(f"-o {folder} is there already and not an empty folder: name another one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_project(folder, args.file)
        for name in ("requirements.txt", "README.md", "LICENSE", "pictures"):
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name)
            elif (ROOT / name).exists():
                shutil.copy(ROOT / name, folder / name)
    except OSError as e:
        raise data.BadInput(f"could not write ({e})") from None
    hidden = sum(t.points for t in graded(args.file) if t.hidden)
    print(
        f"wrote {folder}: {args.file}.py with {len(exercises(args.file))} functions to write: the docstrings say what.\n"
        f"There, python -m pytest test_all.py -k homework_{args.file} says how far one has come, and "
        f"python test_all.py grade {args.file} . counts the points" +
        (f"; hidden tests give {hidden} more." if hidden else "."))


def list_exercises(args):
    """Points, function and test; the hidden ones are marked."""
    for name in [args.file] if args.file else MODELS:
        tests = graded(name)
        print(f"{name}.py: {sum(t.points for t in tests)} points")
        for t in tests:
            print(f"    {t.points}  {t.exercise:52s} {t.__name__}{'   hidden' if t.hidden else ''}")


def main():
    if sys.argv[1:2] == ["_run"]:                           # grading: see run_process
        return run_tests(sys.argv[2], sys.argv[3], sys.argv[4:])
    parser = argparse.ArgumentParser(
        description="The tests as homework: hand a file out, grade what comes back. (The tests "
        "themselves: python -m pytest test_all.py)")
    commands = parser.add_subparsers(required=True, metavar="list | handout | grade")
    p = commands.add_parser("list", help="points, functions and tests")
    p.add_argument("file", nargs="?", choices=MODELS, metavar="FILE",
                   help="one model file, such as vae; default: all")
    p.set_defaults(run=list_exercises)
    p = commands.add_parser("handout", help="copy the project with the exercises of one file blanked")
    p.add_argument("file", choices=MODELS, metavar="FILE", help=" | ".join(MODELS))
    p.add_argument("-o", metavar="DIR", help="a new or empty folder (default: homework-FILE)")
    p.set_defaults(run=handout)
    p = commands.add_parser(
        "grade", help="run the graded tests on students' files, each in a process of its own",
        description="Runs students' code with your rights. A time limit, a memory limit and a folder of "
        "its own stop accidents; nothing stops somebody who wants to read, delete or send your files, "
        "or to fake results. Grade what you do not trust in a container. Linux, or macOS, where the "
        "memory limit has no effect.")
    p.add_argument("file", choices=MODELS, metavar="FILE", help=" | ".join(MODELS))
    p.add_argument("students", nargs="+", help="folders that hold FILE.py, or Python files by any name")
    p.add_argument("--csv", default="grades.csv", metavar="PATH",
                   help="a row per student (default: grades.csv)")
    p.add_argument("--json", metavar="PATH",
                   help="Gradescope's results.json; with several students a folder of one for each")
    p.add_argument("--seconds", type=float, default=60.0,
                   help="time limit of one student, for all questions (default: 60)")
    p.add_argument("--test_seconds", type=float, default=10.0,
                   help="processor time limit of one question (default: 10)")
    p.add_argument("--gigabytes", type=float, default=4.0,
                   help="memory limit of a student's process (default: 4)")
    p.set_defaults(run=grade)
    args = parser.parse_args()
    args.run(args)
