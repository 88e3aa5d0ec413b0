"""Manifests that others have written, and things in a checkpoint that are no files: refused, never waited for."""

from __future__ import annotations

import json
import os
import socket

import pytest

from packtrain.errors import CheckpointError
from packtrain.training.sealing import MANIFEST, _self_hash, is_sealed, read_manifest, seal, verify


@pytest.fixture
def sealed(tmp_path):
    directory = tmp_path / "checkpoint-1"
    directory.mkdir()
    (directory / "weights").write_bytes(b"1234")
    seal(directory, {"step": 1, "sealed_at": 17})
    verify(directory, read_manifest(directory))  # the control
    return directory


def forge(directory, **changed) -> None:
    """Writes a manifest with a hash that is right."""
    manifest = json.loads((directory / MANIFEST).read_text()) | changed
    manifest = {name: value for name, value in manifest.items() if name != "sha256" and value != "absent"}
    (directory / MANIFEST).write_text(json.dumps(manifest | {"sha256": _self_hash(manifest)}))


WHOLE = {"size": 4, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "changed",
    [
        {"sealed_at": "absent"},
        {"sealed_at": None},
        {"step": "\x1b[31m1"},
        {"step": True},
        {"files": None},
        {"files": []},
        {"files": {"weights": None}},
        {"files": {"weights": {"size": "4", "sha256": "0"}}},
        {"files": {"\x00": WHOLE}},
        {"files": {"\x1b]0;title\x07": WHOLE}},
        {"files": {"": WHOLE}},
        {"files": {"x" * 5000: WHOLE}},
    ],
    ids=str,
)
def test_a_forged_manifest_is_a_damaged_one(sealed, changed):
    forge(sealed)
    assert is_sealed(sealed)  # the control
    forge(sealed, **changed)
    assert not is_sealed(sealed)
    with pytest.raises(CheckpointError, match="has a damaged manifest") as error:
        read_manifest(sealed)
    assert "\x1b" not in str(error.value)


def test_what_is_no_file_is_not_read(sealed):
    """A pipe would be waited for, and nobody ever writes into it."""
    (sealed / "weights").unlink()
    os.mkfifo(sealed / "weights")
    with pytest.raises(CheckpointError, match="weights is no file"):
        verify(sealed, read_manifest(sealed))
    (sealed / "weights").unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(sealed)  # paths of sockets are short
        try:
            listening.bind("weights")
        finally:
            os.chdir(here)
        with pytest.raises(CheckpointError, match="weights is no file"):
            verify(sealed, read_manifest(sealed))


def test_a_pipe_that_was_added_is_said_and_not_sealed(sealed):
    os.mkfifo(sealed / "pipe")
    with pytest.raises(CheckpointError, match="pipe was added"):
        verify(sealed, read_manifest(sealed))
    with pytest.raises(CheckpointError, match="is no file"):
        seal(sealed, {"step": 1, "sealed_at": 17})
