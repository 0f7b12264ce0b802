"""The teachers' second answers, never handed out: one for each exercise, right, and in another style than
the model file, with loops, other names and prints. Each is the other's check.

The files beside this one are laid out as the model files are and hold nothing but answers. They are never
imported: their functions take the place of the model file's, there.
"""
import ast
import contextlib
import functools
import importlib
import textwrap
from pathlib import Path
from unittest.mock import patch

HERE = Path(__file__).resolve().parent


def functions(source):
    """{"log_normal": node, "GMMHead.density": node, ...}: the functions and methods of a file."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{n.name}": n for n in node.body if isinstance(n, ast.FunctionDef)}
    return found


def lines_of(source, node):
    """The source lines of a function, decorators included."""
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return "\n".join(source.split("\n")[first - 1:node.end_lineno])


@functools.lru_cache(maxsize=None)
def second(name):
    """{function: source lines} of the second answers of NAME.py."""
    source = (HERE / f"{name}.py").read_text()
    return {target: lines_of(source, node) for target, node in functions(source).items()}


@contextlib.contextmanager
def written(target, source):
    """While it lasts, the function `target`, such as "vae.VAE.kl", is what `source` (its lines) makes of
    it.
    """
    module, *owner, function = target.split(".")
    module = importlib.import_module(module)
    space = vars(module)
    made = {}
    exec(compile(textwrap.dedent(source), f"{module.__name__}.py", "exec"), space, made)
    with patch.object(space[owner[0]] if owner else module, function, made[function]):
        yield


def in_place_of(target):
    """While it lasts, the function `target` is its second answer."""
    name, _, path = target.partition(".")
    return written(target, second(name)[path])
