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
import vq
from tests.helpers import CLIPS, TINY, call


KNOWN_SIZES = {m.__name__: list(m.SIZES) for m in (ar_transformer, lfq, mar, maskgit, titok, vae, vq)}


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    for module in (ar_transformer, lfq, mar, maskgit, titok, vae, vq):      # experiments add sizes of theirs
        for name in [name for name in module.SIZES if name not in KNOWN_SIZES[module.__name__]]:
            del module.SIZES[name]
    monkeypatch.setattr(train, "VALIDATED", 200)            # 2,000 images take a third of a tiny run's time


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """One tiny run, uninterrupted -> its runs folder."""
    runs = tmp_path_factory.mktemp("runs")
    call("train.py", *TINY, "--runs", runs)
    return runs


@pytest.fixture(scope="session")
def clip_run(tmp_path_factory):
    """A tiny run on clips -> its runs folder."""
    runs = tmp_path_factory.mktemp("clips")
    train.main([*CLIPS, "--runs", str(runs)])
    return runs
