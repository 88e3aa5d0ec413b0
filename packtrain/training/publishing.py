"""A trained model for the Hub: which of its files others need, and their upload in one commit.

    files = files_of("out/my_run")               # weights or adapter, config, tokenizer, model card, recipe
    publish(files, "name/model", private=True)   # the address of the commit

What goes up is named here file by file. `training_args.bin` stays: it is a pickle, and holds paths of this machine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub import errors as hub

from packtrain.errors import ModelError, PacktrainError
from packtrain.generation.trained import find_model
from packtrain.modeling.hub import first_line
from packtrain.training.portable import portable_text

UPLOADED = (
    *("*.safetensors", "*.json", "*.py", "README.md", "LICENSE*", "NOTICE*"),
    *("*.jinja", "additional_chat_templates/*.jinja", "*.model", "vocab*.txt", "merges*.txt"),  # of tokenizers
)
OF_CHECKPOINTS = "trainer_state.json"
LOG_IN = "run `hf auth login`, or set HF_TOKEN to a token that may write"


@dataclass(frozen=True, kw_only=True)
class File:
    """One file to upload.

    Attributes:
        name: in the repository.
        contents: where it is, or what is in it.
    """

    name: str
    contents: Path | bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.contents) if isinstance(self.contents, bytes) else self.contents.stat().st_size


def files_of(target: str | Path) -> list[File]:
    """Returns what is uploaded of a run or of the folder of a model, sorted by name.

    Raises:
        ModelError: there is no model, only a checkpoint, or an adapter whose base nobody else has.
    """
    recipe, folder = find_model(target)
    if folder is None:
        fix = "name the output_dir of a run, or the folder of a model"
        raise ModelError("is not a folder", key="RUN_OR_MODEL", value=str(target), fix=fix)
    if (folder / OF_CHECKPOINTS).exists():
        fix = "let the run end (`packtrain train RECIPE --resume`) and name its output_dir"
        raise ModelError("is a checkpoint, and no model yet", key="RUN_OR_MODEL", value=str(target), fix=fix)
    found = {path.relative_to(folder).as_posix(): path for pattern in UPLOADED for path in folder.glob(pattern)}
    if not any(name.endswith(".safetensors") for name in found):
        raise ModelError("holds no weights (*.safetensors)", key="RUN_OR_MODEL", value=str(target))
    _refuse_private_base(folder, target)
    files = [File(name=name, contents=path) for name, path in found.items()]
    if recipe is not None:
        files.append(File(name="recipe.yaml", contents=portable_text(recipe).encode()))
    return sorted(files, key=lambda file: file.name)


def _refuse_private_base(folder: Path, target: str | Path) -> None:
    """Refuses an adapter whose base is a folder of this machine, or was made from a seed: nobody else could load it."""
    config = folder / "adapter_config.json"
    if not config.is_file():
        return
    base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base or Path(base).is_absolute() or Path(base).exists():
        what = f"is an adapter for {base or 'a base that was made from scratch'}, which nobody else has"
        fix = "merge it with `packtrain merge RUN --out DIR`, and push that"
        raise ModelError(what, key="RUN_OR_MODEL", value=str(target), fix=fix)


def publish(files: list[File], repo: str, *, private: bool = False) -> str:
    """Uploads files to a model repository in one commit, and makes it where it is not there yet.

    Args:
        repo: `name/model`, or `model` for one of whoever the token is of.
        private: makes the repository private.

    Returns:
        The address of the commit.

    Raises:
        PacktrainError: no token, no network, no right to write, or a repository that exists and is public although
            `private` was asked for. Nothing was uploaded then.
    """
    api = HfApi()
    if get_token() is None:
        raise PacktrainError("there is no token of the Hub to upload with", key="REPO", value=repo, fix=LOG_IN)
    try:
        name = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(name).private:
            fix = "make it private in its settings, choose another name, or leave --private out"
            raise PacktrainError("exists already, and is public", key="REPO", value=name, fix=fix)
        operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.contents) for file in files]
        return str(api.create_commit(name, operations, commit_message="Upload a model trained by packtrain").commit_url)
    except PacktrainError:
        raise
    except Exception as error:  # of the Hub's client, whose errors have no common base
        what, fix = _explain(error, api.endpoint)
        raise PacktrainError(what, key="REPO", value=repo, fix=fix) from error


def _explain(error: Exception, endpoint: str) -> tuple[str, str | None]:
    """Returns `(what is wrong, how to fix it)`."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, hub.OfflineModeIsEnabled):
        return "cannot be uploaded to, because HF_HUB_OFFLINE is set", "unset it; --dry-run lists the files without it"
    if isinstance(error, hub.HFValidationError):
        return f"is no name of a repository: {first_line(error)}", "write name/model"
    if status == 401:
        return "the Hub does not accept the token", LOG_IN
    if status == 403:
        return "the token may not write to this repository", f"check the name; {LOG_IN}"
    if status is None:
        what = f"the Hub at {endpoint} can't be reached: {first_line(error)}"
        return what, "check the network, and HF_ENDPOINT if it is set; --dry-run lists the files without it"
    return f"the Hub did not take the upload: {first_line(error)}", None
