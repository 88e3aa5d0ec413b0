"""Errors of transformers and the Hub about a name, turned into what a user can do about them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

from huggingface_hub import errors as hub

from packtrain.errors import ModelError, clip

logger = logging.getLogger(__name__)


@contextmanager
def explained(key: str, name: str, revision: str | None = None) -> Iterator[None]:
    """Turns errors about `name`, the directory or Hub name that stands under `key`, into ModelErrors."""
    try:
        yield
    except ModelError:
        raise
    except UnpicklingError as error:
        what, fix = "has weights in a pickle that would run code when loaded", "name a model with safetensors weights"
        raise ModelError(what, key=key, value=name, fix=fix) from error
    except (OSError, ValueError, ImportError, KeyError) as error:
        what, fix = _explain(error, name, revision)
        raise ModelError(what, key=key, value=name, fix=fix) from error


def _explain(error: Exception, name: str, revision: str | None) -> tuple[str, str | None]:
    """Returns `(what is wrong, how to fix it)`. transformers wraps the Hub's errors, so their chain is searched."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__

    def among(*kinds: type) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    log_in = "run `hf auth login` or set HF_TOKEN"
    if among(hub.GatedRepoError):
        return "is gated", f"accept its terms at https://huggingface.co/{name}, then {log_in}"
    if among(hub.RevisionNotFoundError):
        return f"has no revision {revision!r}", f"see https://huggingface.co/{name}/commits/main"
    if among(hub.RepositoryNotFoundError, hub.HFValidationError):
        return (
            "is neither a directory here nor a model on the Hub",
            f"check the spelling; if it is private, {log_in}",
        )
    if among(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError, TimeoutError):
        return (
            "is not in the local cache, and the Hub can't be reached",
            "connect once to fetch it, or give a local directory; recipes/quickstart.yaml needs no network",
        )
    fix = "set `model.attn_implementation: auto`" if "attention" in str(error).lower() else None
    return f"can't be loaded: {first_line(error)}", fix


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, at most 300 characters of it."""
    return clip(next(iter(str(error).strip().splitlines()), type(error).__name__))


@functools.cache
def warn_of_code(name: str, revision: str | None, trusted: bool) -> None:
    """Warns, once for each name, that code which comes with a model may run here."""
    if trusted:
        at = f" at revision {revision}" if revision else ""
        logger.warning("model.trust_remote_code: code that comes with %s%s may run in this process", name, at)
