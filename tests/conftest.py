"""Fixtures of all rooms; test_all.py takes them over."""
import pytest
import torch

import ar_transformer
import data
import lfq
import mar
import maskgit
import titok
import train
import vae
import var
import vq
from tests.helpers import CLIPS, TINY, one_thread


KNOWN_SIZES = {m.__name__: list(m.SIZES) for m in (ar_transformer, lfq, mar, maskgit, titok, vae, var, vq)}


@pytest.fixture(scope="session", autouse=True)
def few_are_held_out():
    """2,000 validation pictures would take most of the time of a tiny run: see tests/quickly.py."""
    with pytest.MonkeyPatch.context() as m:
        m.setitem(data.DRAWN, "val", 200)
        m.setitem(data.DRAWN_CLIPS, "val", 100)
        yield


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
    with one_thread():
        train.main([*TINY, "--runs", str(runs)])
    return runs


@pytest.fixture(scope="session")
def clip_run(tmp_path_factory):
    """A tiny run on clips -> its runs folder."""
    runs = tmp_path_factory.mktemp("clips")
    train.main([*CLIPS, "--runs", str(runs)])
    return runs
