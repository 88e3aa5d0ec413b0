"""Shared by all tests: two threads fight over tiny models, so torch gets one, in what tests start, too."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from packtrain.data.examples import Examples

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PACKTRAIN_CACHE"] = tempfile.mkdtemp(prefix="packtrain-tests-")  # not the user's, nor another worker's
os.environ["HF_DATASETS_CACHE"] = os.path.join(os.environ["PACKTRAIN_CACHE"], "datasets")

NOT_CHECKED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]  # the latter: what examples share is harmless
settings.register_profile("packtrain", deadline=None, suppress_health_check=NOT_CHECKED)  # a machine may be slow
settings.load_profile("packtrain")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_environment(monkeypatch):
    """`datasets`, mapping in several processes, leaves a copy in the place of `os.environ`; rich reads the original."""
    monkeypatch.setattr(os, "environ", os.environ)  # put back after the test


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """GSM8K's training rows, where they are at hand."""
    default = Path(__file__).parents[2] / "shared/data/gsm8k/train.jsonl"
    path = Path(os.environ.get("PACKTRAIN_GSM8K", default))
    if not path.exists():
        pytest.skip("GSM8K is not at hand; set PACKTRAIN_GSM8K to its train.jsonl")
    return path


@pytest.fixture
def sft_lengths() -> np.ndarray:
    """2,000 lengths like those of instruction data: lognormal, median ~90, longest 1,024."""
    draws = np.random.default_rng(0).lognormal(4.5, 0.9, 2000)
    return np.clip(draws, 5, 1024).astype(np.int32)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as JSON lines; a string or bytes is a line as it stands."""

    def write(*rows: dict | str | bytes, name: str = "rows.jsonl") -> Path:
        lines = [row if isinstance(row, str | bytes) else json.dumps(row) for row in rows]
        path = tmp_path / name
        path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
        return path

    return write


@pytest.fixture
def build(write_rows) -> Callable[..., Examples]:
    """Examples of rows written down in the test."""

    def build(rows: Iterable[dict], tokenizer: PreTrainedTokenizerFast, **options) -> Examples:
        from packtrain.data.examples import build_examples
        from packtrain.data.sources import open_rows

        return build_examples(open_rows(write_rows(*rows)), tokenizer, **options)

    return build
