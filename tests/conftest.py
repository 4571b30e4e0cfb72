"""What several test modules start from: a text, a base for it, rows that the base wrote."""

import os
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import sample
from model import GPT
from strategies import call, distilling, random_heads, write_base, write_text
from train import distill

torch.set_num_threads(1)  # these models are too small for two, which would only wait for each other


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Tokens are kept here, and not in the user's own cache."""
    with patch.dict(os.environ, XDG_CACHE_HOME=str(tmp_path_factory.mktemp("cache"))):
        yield


@pytest.fixture
def text(tmp_path) -> list[str]:
    return write_text(tmp_path)


@pytest.fixture
def base(tmp_path) -> Path:
    return write_base(tmp_path)


@pytest.fixture
def shards(base, text, tmp_path) -> str:
    return str(distill(distilling(base, text, out=str(tmp_path / "shards"), new_tokens=10)))


@pytest.fixture
def run_sample(base, capsys):
    """sample.py with the base and four heads of random weights; returns what it prints."""
    random_heads(GPT.from_pretrained(base), 4, 0).save_pretrained(base / "heads")

    def run(*flags) -> str:
        call(sample.main, "--base", base, "--device", "cpu", *flags)
        return capsys.readouterr().out

    return run
