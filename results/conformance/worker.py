"""Asks settings: `python -m results.conformance.worker CELLS OUT`.

Started by `run.py` with the interpreter of the settings' environment; under torchrun with two processes for what is about
ranks. Only settings of packtrain import packtrain.
CELLS is JSON, setting -> questions; every answer is appended to OUT as a line of JSON as soon as it is known.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from results.conformance.questions import Asked, ask
from results.conformance.settings import SETTINGS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cells", type=json.loads)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    for number, (name, questions) in enumerate(arguments.cells.items()):
        setting = SETTINGS[name]
        versions = {package: importlib.metadata.version(package) for package in (*setting.packages, "torch")}
        root = arguments.out.parent / f"{number}"  # of all ranks
        root.mkdir(exist_ok=True)
        asked = Asked(setting, root)
        for question in questions:
            answer = asdict(ask(asked, question))
            if rank == 0:
                line = {"setting": name, "question": question, "versions": versions} | answer
                print(f"{name}: {question}: {answer['verdict']} {answer['figure']}", file=sys.stderr, flush=True)
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
