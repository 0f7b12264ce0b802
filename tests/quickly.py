"""
A program of the project in a process of its own, for tests: 200 held out pictures are drawn, not 2,000.

    python tests/quickly.py train.py --tokenizer vae ...
"""
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data                                                 # noqa: E402

if __name__ == "__main__":
    data.DRAWN["val"] = 200
    data.DRAWN_CLIPS["val"] = 100
    importlib.import_module(sys.argv[1].removesuffix(".py")).main(sys.argv[2:])
