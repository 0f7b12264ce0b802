"""
A program of the project in a process of its own, for tests: with the sizes and few pictures of tests/mini.py.

    python tests/quickly.py train.py --tokenizer vae ...
"""
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import mini                                      # noqa: E402

if __name__ == "__main__":
    mini.begin()
    importlib.import_module(sys.argv[1].removesuffix(".py")).main(sys.argv[2:])
