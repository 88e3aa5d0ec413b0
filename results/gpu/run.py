"""Measures packtrain on one CUDA device: kernels, equivalence, speed next to other trainers, memory of large vocabularies.

    python results/gpu/run.py --minutes 8            # again: continues with the parts that are missing
    python results/gpu/run.py --minutes 8 --wheels wheels
    python results/gpu/run.py --cpu-rehearsal        # every part at tiny shapes on a CPU, into out/gpu

Parts run in order of worth, each in its own process and cut off after its share (`results/gpu/parts.py`), so that a
failure, a hang or a device without memory is a line of the table. `bench.json` and `README.md` of `--out` are replaced
whole after every part; figures of several devices stand next to each other.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the checkout, as results/ is not installed


def markdown(record: dict[str, Any]) -> str:
    """Write the page of a record."""
    from results.gpu.page import markdown

    return markdown(record)


def install(wheels: Path, target: Path) -> None:
    """Install those wheels whose package is not there yet into a folder, and let Python look there, too.

    Raises:
        SystemExit: pip refuses one.
    """
    missing = [str(wheel) for wheel in sorted(wheels.glob("*.whl")) if not _is_installed(wheel.name.split("-")[0])]
    if missing:
        options = [
            "-q",
            "--no-index",
            "--no-deps",
            "--no-compile",
            "--no-cache-dir",
            "--upgrade",
            "--target",
            str(target),
        ]
        done = subprocess.run([sys.executable, "-m", "pip", "install", *options, *missing], check=False)
        if done.returncode:
            raise SystemExit(f"the wheels of {wheels} could not be installed")
    if target.exists():
        sys.path.append(str(target))  # behind what is installed
        importlib.invalidate_caches()


def _is_installed(package: str) -> bool:
    try:
        return bool(version(re.sub("[-_.]+", "-", package)))
    except PackageNotFoundError:
        return False


def prepare_environment(*, small: bool, scratch: Path) -> None:
    """Set what parts inherit: the checkout, no network, one device, and a cache of their own."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(ROOT), *filter(None, given), str(scratch / "site")]))
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking whether there is a device must not open it
    os.environ["PACKTRAIN_CACHE"] = str(scratch / "cache")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if small:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="after which everything has ended (default 8)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts, by their names in the table")
    parser.add_argument("--cpu-rehearsal", action="store_true", help="run every part at tiny shapes on a CPU")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="install what is missing from these wheels")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="for weights and logs; kept (default: temporary)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default results/gpu; out/gpu for a rehearsal")
    arguments = parser.parse_args()
    small = arguments.cpu_rehearsal
    out = arguments.out or (ROOT / "out" / "gpu" if small else Path(__file__).parent)
    with ExitStack() as stack:
        scratch = arguments.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="packtrain-gpu-")))
        scratch.mkdir(parents=True, exist_ok=True)
        if arguments.wheels:
            install(arguments.wheels, scratch / "site")
        prepare_environment(small=small, scratch=scratch)
        measure(arguments, out.resolve(), scratch.resolve(), small=small)


def measure(arguments: argparse.Namespace, out: Path, scratch: Path, *, small: bool) -> None:
    """Name the machine, then run the parts.

    Raises:
        SystemExit: a part of that name does not exist, or there is no device.
    """
    from results.gpu import schedule
    from results.gpu.parts import MACHINE, PARTS, weights_part

    def say(line: str) -> None:
        print(f"{time.monotonic() - BEGAN:5.0f} s  {line}", flush=True)

    known = [part.name for part in PARTS]
    if unknown := [name for name in arguments.only or () if name not in known]:
        raise SystemExit(f"there is no part {unknown[0]!r}; there are: {', '.join(known)}")
    task = schedule.Task(small=small, scratch=scratch, file=scratch / "parts" / "machine.json")
    about = schedule.run_part(MACHINE, task, MACHINE.seconds)
    if about["status"] != schedule.FINISHED:
        hint = "" if small else "; without a CUDA device, --cpu-rehearsal runs everything at tiny shapes"
        raise SystemExit(f"the machine can't be used: {about['reason']}{hint}")
    say(f"{about['found']['device']}, libraries imported in {about['seconds']:.0f} s")
    schedule.conduct(
        [part for part in PARTS if not arguments.only or part.name in arguments.only],
        out=out,
        scratch=scratch,
        ends=BEGAN + 60 * arguments.minutes,
        small=small,
        command=shlex.join(["python", "results/gpu/run.py", *_shown(sys.argv[1:])]),
        about=about["found"],
        weights=weights_part,
        page=markdown,
        say=say,
    )
    say(f"written: {out / 'README.md'}")


def _shown(words: list[str]) -> list[str]:
    """Leave out folders of this machine."""
    return [Path(word).name if "/" in word else word for word in words]


if __name__ == "__main__":
    main()
