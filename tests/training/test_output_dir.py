"""A drive that fills up while a run writes: one error, wherever it was noticed."""

from __future__ import annotations

import errno
import os

import pytest
from safetensors import SafetensorError

from packtrain.errors import PacktrainError
from packtrain.training.output_dir import explaining_a_full_drive


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "run/samples.jsonl"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_drive_is_one_error(error, tmp_path):
    with pytest.raises(PacktrainError, match="can't be written, the drive is full") as caught:
        with explaining_a_full_drive(tmp_path):
            raise error
    assert caught.value.where == (error.filename if getattr(error, "filename", None) else str(tmp_path))


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "I/O"), ValueError("x"), PacktrainError("No space left on device")]
)
def test_other_errors_stay_what_they_are(error, tmp_path):
    with pytest.raises(type(error)) as caught, explaining_a_full_drive(tmp_path):
        raise error
    assert caught.value is error
