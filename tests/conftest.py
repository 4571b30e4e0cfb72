"""What several test modules start from: a text, a base for it, rows that the base wrote."""
from pathlib import Path

import pytest
import torch

from strategies import distilling, write_base, write_text
from train import distill


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """And one thread: these models are too small for two, which only wait for each other."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text(tmp_path) -> list[str]:
    return write_text(tmp_path)


@pytest.fixture
def base(tmp_path) -> Path:
    return write_base(tmp_path)


@pytest.fixture
def shards(base, text, tmp_path) -> str:
    return str(distill(distilling(base, text, out=str(tmp_path / "shards"), new_tokens=10)))
