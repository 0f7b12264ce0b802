"""What students get: the project without answers, and the numbers that a right answer gives."""
import ast
import functools
import shutil

import torch

from homework.course import exercises, graded
from homework.kit import MODELS, ROOT, STUDENTS_SEED, looked

ROOMS = ("", "common", "official", "recipes")               # of Python files, apart from homework/
OWN = ("__init__", "kit", "course", "sandbox", "check", "handout", "submissions", "report", "grading",
       "autograder", "half")                                # of homework/, besides the exercises

parsed = functools.lru_cache(maxsize=None)(ast.parse)


def functions(source):
    """{"log_normal": node, "GMMHead.density": node, ...}: the functions and methods of a file."""
    found = {}
    for node in parsed(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{n.name}": n for n in node.body if isinstance(n, ast.FunctionDef)}
    return found


def body(node):
    """The statements of a function after its docstring."""
    return node.body[ast.get_docstring(node) is not None:]


@functools.lru_cache(maxsize=None)
def code(node):
    """The code of a function without its docstring, as a string that compares."""
    return "".join(map(ast.dump, body(node)))


def blanked(source, name, targets):
    """The source of NAME.py with the bodies of `targets` cut out, line by line; every other byte stays."""
    lines, nodes = source.split("\n"), functions(source)
    for target in sorted(targets, key=lambda t: -nodes[t].lineno):     # from the end: line numbers stay right
        first, last = body(nodes[target])[0], nodes[target].end_lineno
        hole = f'{" " * first.col_offset}raise NotImplementedError("homework: {name}.{target}")'
        lines[first.lineno - 1:last] = [hole]
    return "\n".join(lines)


MAIN = '\n\nif __name__ == "__main__":\n    main()\n'
HALF = '\n\nif __name__ == "__main__":\n    from homework import half\n    half.run(main, __file__)\n'


def guarded(source):
    """A demo that says what is missing where a function is not written yet."""
    return source.removesuffix(MAIN) + HALF if source.endswith(MAIN) else source


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


def answers(further=False, released=()):
    """{(name of the function, its code): "vae.VAE.kl"} of the exercises of all files but the released."""
    found = {}
    for name in MODELS:
        if name in released:
            continue
        nodes = functions((ROOT / f"{name}.py").read_text())
        also = [target for test in graded(name, further) for target in test.also]
        for target in exercises(name, further) + also:
            if target in nodes:                             # in a handout one may be gone
                found[target.split(".")[-1], code(nodes[target])] = f"{name}.{target}"
    return found


def without_answers(names, released=(), further=False):
    """{file: text} of the project's Python files, handed out for the exercises of `names`.

    Blanked are the answers of ALL files of the course except the released ones, wherever they or their copies
    stand: today's homework must not hold next week's.
    """
    texts = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).glob("*.py")):
            texts[str(path.relative_to(ROOT))] = path.read_text()
    secret = answers(further, set(released) - set(names))
    for file, text in texts.items():
        holes = [t for t, node in functions(text).items() if (t.split(".")[-1], code(node)) in secret]
        if holes:
            name = file.removesuffix(".py").replace("/", ".")
            texts[file] = guarded(blanked(text, name, holes))
    for own in OWN:
        texts[f"homework/{own}.py"] = (ROOT / "homework" / f"{own}.py").read_text()
    for name in names:
        tests = graded(name, further=True)
        cut = [t.__name__ for t in tests if t.hidden or t.further and not further]
        texts[f"homework/{name}.py"] = without((ROOT / "homework" / f"{name}.py").read_text(), cut)
    return texts


def truths(name, seed, further=False, hidden=True):
    """{test: what it sees of the teacher's own file}, under a seed."""
    found = {}
    for test in graded(name, further):
        if test.hidden and not hidden:
            continue
        if test.goals:
            found[test.__name__] = test.goals
            continue
        seen, failed = looked(test, seed)
        if failed is not None:
            raise failed
        found[test.__name__] = seen
    return found


def write_handout(folder, names, released=(), further=False):
    """The project as handed out, into an existing empty folder."""
    for file, text in without_answers(names, released, further).items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text)
    (folder / "homework" / "truths").mkdir()
    for name in names:
        found = truths(name, STUDENTS_SEED, further, hidden=False)
        torch.save({test: [list(row) for row in rows] for test, rows in found.items()},
                   folder / "homework" / "truths" / f"{name}.pt")
    for name in ("requirements.txt", "README.md", "LICENSE", "pytest.ini"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
