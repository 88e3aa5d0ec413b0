"""Golden values: what the code gave when they were stored, next to the tests that expect the same again.

    python -m tests.golden.store                 # rewrite all but the checkpoint from the code as it is
    python -m tests.golden.store plans tokens    # only these
    python -m tests.golden.store checkpoint      # only when named: its worth is that earlier code has written it

The tests import only names of packtrain that stay where they are, so that they outlive moves of everything else.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODULES = {  # name -> the module with `store(directory)`, which writes its files into HERE
    "plans": "tests.golden.test_plans",
    "tokens": "tests.golden.test_tokens",
    "losses": "tests.golden.test_losses",
    "errors": "tests.golden.test_errors",
    "checkpoint": "tests.golden.test_checkpoints",
}


def load(name: str) -> dict[str, Any]:
    """The values stored as `name`.json."""
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def save(name: str, values: dict[str, Any]) -> None:
    """One case to a line, so that a difference names it."""
    lines = (f"{json.dumps(case)}: {json.dumps(value, ensure_ascii=False)}" for case, value in values.items())
    (HERE / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """`value` as JSON gives it back."""
    return json.loads(json.dumps(value))


def facts(message: str) -> list[str]:
    """Returns what a message is about (the words before its first colon) and its numbers: its wording is free."""
    return [message.partition(":")[0], *re.findall(r"[0-9][0-9,]*", message)]


def exit_code(function: Callable[[Sequence[str]], None], args: Sequence[str]) -> int:
    """Of a command line's `main`, called in this process."""
    try:
        function(list(args))
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def main(names: Sequence[str]) -> None:
    import torch

    torch.set_num_threads(1)  # as the tests have it
    for name in names or [name for name in MODULES if name != "checkpoint"]:
        with tempfile.TemporaryDirectory() as directory:
            os.environ["PACKTRAIN_CACHE"] = str(Path(directory) / "cache")
            import_module(MODULES[name]).store(Path(directory).resolve())
        print(f"stored {name}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(sys.argv[1:])
