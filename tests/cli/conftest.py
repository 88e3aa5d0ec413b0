"""What the tests of several verbs are run in."""

from __future__ import annotations

import pytest


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """Rows are tokenised once for all, and not into the user's own cache."""
    monkeypatch.setenv("PACKTRAIN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def wide(monkeypatch):
    """Tables aren't squeezed."""
    monkeypatch.setenv("COLUMNS", "160")
