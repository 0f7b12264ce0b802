"""Fixtures of all rooms; test_all.py takes them over."""
import pytest
import torch

import ar_transformer
import lfq
import mar
import maskgit
import titok
import train
import vae
import var
import vq
from tests import mini
from tests.helpers import CLIPS, TINY

torch.set_num_threads(1)                                    # the tensors are small: two threads lose
mini.begin()
KNOWN_SIZES = {m.__name__: list(m.SIZES) for m in (ar_transformer, lfq, mar, maskgit, titok, vae, var, vq)}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    for module in (ar_transformer, lfq, mar, maskgit, titok, vae, var, vq):           # experiments add sizes
        for name in [name for name in module.SIZES if name not in KNOWN_SIZES[module.__name__]]:
            del module.SIZES[name]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """One tiny run, uninterrupted -> its runs folder."""
    runs = tmp_path_factory.mktemp("runs")
    train.main([*TINY, "--runs", str(runs)])
    return runs


@pytest.fixture(scope="session")
def clip_run(tmp_path_factory):
    """A tiny run on clips -> its runs folder."""
    runs = tmp_path_factory.mktemp("clips")
    train.main([*CLIPS, "--runs", str(runs)])
    return runs
