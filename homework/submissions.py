"""What a student hands in: a folder, a zip, a notebook or a file by any name -> the source of one file."""
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

MOST = 2 ** 22                                              # bytes of one file; nobody writes 4 MB by hand


@dataclass
class Submission:
    """student: a name. text: bytes, or None where there is none. taken: which file it is. remark: or why
    there is none.
    """
    student: str
    text: bytes | None = None
    taken: str = ""
    remark: str = ""


def of_notebook(raw):
    """The code cells of a notebook, one after the other, without lines for IPython -> bytes."""
    cells = json.loads(raw)["cells"]
    parts = []
    for cell in cells:
        if cell.get("cell_type") == "code":
            lines = "".join(cell["source"]).split("\n")
            parts.append("\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in lines))
    return "\n\n".join(parts).encode()


def best(names, name):
    """Of the paths in a folder or zip the one that is NAME.py, or most like it -> path or None."""
    def rank(path):
        path = Path(path)
        stem, kind = path.stem.lower(), path.suffix.lower()
        order = (0 if path.name == f"{name}.py" else 1 if kind == ".py" and name in stem else
                 2 if kind == ".ipynb" and name in stem else 3 if kind == ".py" else 4)
        return order, len(path.parts), str(path)

    usable = [n for n in names if Path(n).suffix.lower() in (".py", ".ipynb")
              and not any(part.startswith(("__MACOSX", ".", "__pycache__")) for part in Path(n).parts)]
    usable.sort(key=rank)
    if not usable:
        return None
    if rank(usable[0])[0] >= 3 and len(usable) > 1:         # several files, none of which says what it is
        return None
    return usable[0]


def student_of(path, name):
    """A student's name: that of the folder, or of a file that is not just called NAME.py."""
    path = Path(path).resolve()
    if path.is_file() and path.stem == name:
        return path.parent.name
    return path.name if path.is_dir() or not path.suffix else path.stem


def find(path, name):
    """What was handed in at `path` for NAME.py -> Submission."""
    path = Path(path)
    found = Submission(student_of(path, name))
    try:
        if path.is_dir():
            files = {str(p.relative_to(path)): p for p in path.rglob("*") if p.is_file()}
            chosen = best(files, name)
            if chosen:
                found.text, found.taken = files[chosen].read_bytes()[:MOST], chosen
        elif path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as z:
                chosen = best([n for n in z.namelist() if not n.endswith("/")], name)
                if chosen:
                    with z.open(chosen) as f:
                        found.text, found.taken = f.read(MOST), f"{path.name}: {chosen}"
        elif path.is_file():
            found.text, found.taken = path.read_bytes()[:MOST], path.name
        if found.text is not None and found.taken.lower().endswith(".ipynb"):
            found.text = of_notebook(found.text)
    except (OSError, zipfile.BadZipFile, zipfile.LargeZipFile, RuntimeError, NotImplementedError) as e:
        found.text, found.remark = None, f"{path} cannot be read ({e})"
        return found
    except (ValueError, KeyError, TypeError) as e:
        found.text, found.remark = None, f"{found.taken} is no notebook ({type(e).__name__}: {e})"
        return found
    if found.text is None:
        found.remark = f"there is no {path}" if not path.exists() else f"there is no {name}.py in {path}"
    elif found.taken.split(": ")[-1] != f"{name}.py":
        found.remark = f"taken: {found.taken}"
    return found
