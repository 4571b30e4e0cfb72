"""What several test modules start from: a text, a base for it, rows that the base wrote."""

from pathlib import Path

import pytest
import torch

from strategies import distilling, write_base, write_text
from train import distill

torch.set_num_threads(1)  # these models are too small for two, which would only wait for each other


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path) -> list[str]:
    return write_text(tmp_path)


@pytest.fixture
def base(tmp_path) -> Path:
    return write_base(tmp_path)


@pytest.fixture
def shards(base, text, tmp_path) -> str:
    return str(distill(distilling(base, text, out=str(tmp_path / "shards"), new_tokens=10)))
