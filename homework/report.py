"""What the grader writes: one CSV for all students and homeworks, pages in HTML, Gradescope's results."""
import ast
import csv
import html
import os
from pathlib import Path

FIRST = ["student", "file", "points", "of", "remark", "seconds", "seed", "digest"]


def read_csv(path):
    """The rows that are in a CSV by now -> {(student, file): row}."""
    if not Path(path).is_file():
        return {}
    with open(path, newline="") as f:
        return {(row["student"], row["file"]): row for row in csv.DictReader(f)}


def add_row(path, row):
    """Write a row into a CSV, in place of an older one of the same student and homework. Others stay."""
    rows = read_csv(path)
    rows[row["student"], row["file"]] = row
    columns = list(FIRST)
    for each in rows.values():
        columns += [key for key in each if key not in columns]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")                # a Ctrl-C leaves the old file whole
    with open(new, "w", newline="") as f:
        out = csv.DictWriter(f, columns, restval="")
        out.writeheader()
        out.writerows(rows[key] for key in sorted(rows, key=lambda key: (key[1], key[0])))
    os.replace(new, path)


def csv_row(graded):
    """The row of one student and homework."""
    row = {key: graded[key] for key in ("student", "file", "points", "of", "remark", "seed", "digest")}
    row["seconds"] = f"{graded['seconds']:.1f}"
    return row | {t.__name__: points for t, points, _, _ in graded["tests"]}


# ---- Pages -------------------------------------------------------------------------------------------

STYLE = """<meta charset="utf-8"><style>
body { font: 16px/1.45 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse }
td, th { padding: .25em .7em; text-align: left; border-bottom: 1px solid #ddd }
pre { background: #f5f5f2; padding: .7em; overflow-x: auto; font-size: 13px } .less { color: #b00020 }
.whole { color: #1b6e2f } h2 { margin: 1.6em 0 .3em; font-size: 1.1em }
</style>"""


def lines_of(source, path):
    """The lines of a function, such as "GMMHead.density", in a source; "" where there is none."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    for node in tree.body:
        for inner in node.body if isinstance(node, ast.ClassDef) else [node]:
            name = f"{node.name}.{inner.name}" if inner is not node and hasattr(inner, "name") else \
                getattr(inner, "name", "")
            if name == path and isinstance(inner, ast.FunctionDef):
                return "\n".join(source.split("\n")[inner.lineno - 1:inner.end_lineno])
    return ""


def question(reference, path):
    """What is asked: signature and docstring of a function, from the teacher's file."""
    lines = lines_of(reference, path)
    if not lines:
        return ""
    first = ast.parse("\n".join(
        line[len(lines) - len(lines.lstrip()):] for line in lines.split("\n"))).body[0]
    last = first.body[0].end_lineno if ast.get_docstring(first) else first.body[0].lineno - 1
    return "\n".join(lines.split("\n")[:last])


def page(graded, reference, source):
    """The page of one student and homework: for each question what was asked, the points, what is wrong, the
    student's lines.
    """
    e = html.escape
    parts = [
        f"<!doctype html><title>{e(graded['student'])}: {graded['file']}</title>{STYLE}",
        f"<h1>{e(graded['student'])}: {graded['file']}.py, "
        f"{graded['points']:g} of {graded['of']:g} points</h1>"
    ]
    if graded["remark"]:
        parts.append(f"<p>{e(graded['remark'])}</p>")
    by_target = {}
    for t, points, wrong, _ in graded["tests"]:
        by_target.setdefault(t.exercise, []).append((t, points, wrong))
    for target, tests in by_target.items():
        path = target.partition(".")[2]
        got = sum(points for _, points, _ in tests)
        of = sum(graded["worth"][t.__name__] for t, _, _ in tests)
        parts.append(f'<h2 class="{"whole" if got == of else "less"}">{e(path or "The whole file")}: '
                     f"{got:g} of {of:g}</h2>")
        parts += [f"<p>{e(wrong)}</p>" for _, _, wrong in tests if wrong]
        asked = question(reference, path)
        if asked:
            parts.append(f"<details><summary>the question</summary><pre>{e(asked)}</pre></details>")
        own = lines_of(source, path)
        if path:
            parts.append(f"<pre>{e(own or 'There is no such function in the file.')}</pre>")
    return "\n".join(parts)


def overview(rows):
    """The table of all students and homeworks of a CSV -> HTML."""
    e = html.escape
    files = sorted({file for _, file in rows})
    lines = [f"<!doctype html><title>Grades</title>{STYLE}<h1>Grades</h1><table><tr><th>student</th>"
             + "".join(f"<th>{e(f)}</th>" for f in files) + "<th>sum</th></tr>"]
    for student in sorted({student for student, _ in rows}):
        cells, total = [], 0.0
        for file in files:
            row = rows.get((student, file))
            if row is None:
                cells.append("<td></td>")
                continue
            total += float(row["points"])
            less = "whole" if float(row["points"]) == float(row["of"]) else "less"
            cells.append(f'<td class="{less}"><a href="{e(page_name(student, file))}">{row["points"]} of '
                         f"{row['of']}</a></td>")
        lines.append(f"<tr><td>{e(student)}</td>{''.join(cells)}<td>{total:g}</td></tr>")
    return "\n".join([*lines, "</table>"])


def page_name(student, file):
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in f"{student}-{file}") + ".html"


# ---- Gradescope --------------------------------------------------------------------------------------

def gradescope(graded):
    """One student's grades as Gradescope's results.json has them. Hidden tests are shown after the due date.

    The format is that of gradescope-autograders.readthedocs.io, Autograder Specifications.
    """
    tests = []
    for i, (t, points, wrong, _) in enumerate(graded["tests"], 1):
        worth = graded["worth"][t.__name__]
        tests.append({"name": f"{t.exercise}: {t.__name__.removeprefix('test_homework_')}", "number": str(i),
                      "score": points, "max_score": worth, "output": wrong or "as it should be",
                      "output_format": "text", "status": "passed" if points == worth else "failed",
                      "visibility": "after_due_date" if t.hidden else "visible"})
    return {"score": graded["points"], "execution_time": round(graded["seconds"], 1),
            "output": graded["remark"], "output_format": "text", "visibility": "visible",
            "stdout_visibility": "hidden", "tests": tests}
