"""Length sets that many of the packing tests share."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture
def sft_lengths() -> np.ndarray:
    """2,000 lengths like those of instruction data: lognormal, median ~90, longest 1,024."""
    draws = np.random.default_rng(0).lognormal(4.5, 0.9, 2000)
    return np.clip(draws, 5, 1024).astype(np.int32)
