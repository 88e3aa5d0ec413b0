"""Which weights a run starts from: an adapter fits those that it was trained on, and no others.

A model of the Hub is known by its commit. The files of a directory are known by their sizes, the headers of safetensors
files, and some bytes of every tensor, so that gigabytes are not read: weights that were trained on differ everywhere.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

from transformers import PreTrainedConfig

from packtrain.recipe.adapters import adapter_folder
from packtrain.recipe.sections import ModelSection

_PATTERNS = ("*.safetensors", "*.bin", "*.gguf")
_BLOCK = 1024  # bytes read at one place
_PLACES = 256  # in a file that does not say where its tensors are


def base_weights(section: ModelSection, config: PreTrainedConfig | None = None) -> str | None:
    """Returns what identifies the weights that a recipe names; None for a model from scratch.

    Args:
        config: that of the model, as it was loaded; only a model of the Hub needs it.
    """
    name = section.model_name_or_path
    if name is None:
        return None
    adapters = [_sampled(folder) for folder in map(adapter_folder, filter(None, adapters_of(section))) if folder]
    if not Path(name).is_dir():
        commit = getattr(config, "_commit_hash", None)
        found = f"{name} at {commit}" if commit else None
    else:
        found = _sampled(Path(name))
    return " with adapter ".join([found or name, *adapters]) if adapters else found


def adapters_of(section: ModelSection) -> list[str | None]:
    """Returns the adapters that a run goes on from."""
    return [section.merge_adapter, section.continue_adapter]


def _sampled(folder: Path) -> str:
    """Returns a hash of the files of weights in a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in _PATTERNS for path in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for place in _places(file, size):
                file.seek(place)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]


def _places(file: BinaryIO, size: int) -> list[int]:
    """Returns where to read: all of a safetensors header, and the beginning, middle and end of every tensor."""
    header = int.from_bytes(file.read(8), "little")
    try:
        tensors = json.loads(file.read(header)) if file.name.endswith(".safetensors") and header < size else None
        offsets = [tensor["data_offsets"] for tensor in tensors.values() if "data_offsets" in tensor] if tensors else []
    except (ValueError, AttributeError, TypeError):  # damaged, of which loading says more
        offsets = []
    places = [*range(0, 8 + header, _BLOCK)] if offsets else [*range(0, size, max(_BLOCK, size // _PLACES))]
    for start, stop in offsets:
        places += [8 + header + at for at in (start, (start + stop) // 2, max(start, stop - _BLOCK))]
    return places
