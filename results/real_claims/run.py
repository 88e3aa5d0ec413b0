"""Measures what layouts do to a real model: SmolLM2-135M-Instruct on GSM8K, with LoRA and all weights, and answers counted.

    python results/real_model/prepare.py           # once: the model, see there
    python results/real_claims/run.py              # about two hours on two cores, in sittings of 35 minutes
    python results/real_claims/run.py --only "cost: lora" --tokens 2000
    python results/real_claims/run.py --only "seed 0" --threads 1  # next to another of these: losses need no quiet machine

Four parts, in this order. `cost`: one epoch of the same rows by packtrain's `pad_longest` and `balanced`, and by TRL's
SFTTrainer as it pads and as it packs (bfd): losses, held-out loss, real tokens per second, memory. `answers`: held-out
questions, answered by the base and by what `balanced` has trained. `proof`: the audit of the model's weights, and its
gradients with and without padding. `rates`: `balanced` and `bfd`, whose packs hold several
times the examples of an update, at three learning rates and on other rows for every seed: does a gap between the two close
once the rate is tuned? Every arm is a process of its own, and its result is stored when it is done, so that a study that was
stopped, or whose minutes are over, goes on behind them; the page says what has not run yet. Without the model nothing runs.

Writes `results/real_claims/bench.json`, `README.md` and, where matplotlib is installed, `rates.png`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, as results/ is not installed
from results.page import RESULTS, origin, store
from results.real_claims.arms import FOLDER, GSM8K, Arm, all_arms, run_arm
from results.real_claims.page import draw, markdown, summarise
from results.real_model.prepare import missing

THREADS, TOKENS, GRID_TOKENS = 2, 40_000, 16_000


def stored(arm: Arm, machine: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the result of an arm that ran before, as it is wanted now, on this machine; else None."""
    file = FOLDER / f"{arm.folder.name}.json"
    if not file.exists():
        return None
    kept = json.loads(file.read_text(encoding="utf-8"))
    return kept["found"] if kept["arm"] == asdict(arm) and kept["machine"] == machine else None


def start(arm: Arm, machine: Mapping[str, Any], threads: int) -> bool:
    """Runs an arm in its own process and stores its result; False, and the end of its log, where it failed."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    result, log = FOLDER / f"{arm.folder.name}.result", FOLDER / f"{arm.folder.name}.log"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--arm", json.dumps(asdict(arm)), "--result", str(result)]
    command += ["--threads", str(threads)]
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False)
    if done.returncode or not result.exists():
        print(f"{arm.name}: failed, see {log}\n{log.read_text(encoding='utf-8')[-2000:]}", file=sys.stderr, flush=True)
        return False
    took = {"minutes": (time.monotonic() - began) / 60}
    found = {"arm": asdict(arm), "machine": machine, "found": json.loads(result.read_text(encoding="utf-8")) | took}
    (FOLDER / f"{arm.folder.name}.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    return True


def study(
    arms: Sequence[Arm], machine: Mapping[str, Any], only: str, minutes: float, threads: int = THREADS
) -> dict[str, dict[str, Any]]:
    """Runs the arms whose name has `only` in it and that have no result, until the time is over; returns all results."""
    end = time.monotonic() + 60 * minutes
    for arm in arms:
        if only in arm.name and stored(arm, machine) is None:
            if time.monotonic() > end:
                break
            began = time.monotonic()
            ended = start(arm, machine, threads)
            print(
                f"{arm.name}: {'done' if ended else 'failed'}, {time.monotonic() - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    results = {arm.name: stored(arm, machine) for arm in arms}
    return {name: found for name, found in results.items() if found is not None}


def command_of(tokens: int, grid_tokens: int) -> str:
    """Returns the command that makes the page, in as many sittings as it takes."""
    options = f" --tokens {tokens}" if tokens != TOKENS else ""
    return f"python results/real_claims/run.py{options}" + (
        f" --grid-tokens {grid_tokens}" if grid_tokens != GRID_TOKENS else ""
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of an arm of `cost`, about (default {TOKENS:,})")
    parser.add_argument(
        "--grid-tokens", type=int, default=GRID_TOKENS, help=f"of one of `rates` (default {GRID_TOKENS:,})"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="run the arms whose name has this in it")
    parser.add_argument("--minutes", type=float, default=35, help="after which no arm begins any more (default 35)")
    parser.add_argument("--threads", type=int, default=THREADS, help=f"of torch (default {THREADS})")
    parser.add_argument("--out", type=Path, default=RESULTS / "real_claims", help="default results/real_claims")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.arm:
        args.result.write_text(json.dumps(run_arm(Arm(**json.loads(args.arm)))), encoding="utf-8")
        return
    if (why := missing()) or not GSM8K.exists():
        sys.exit(f"error: {why or f'no {GSM8K}: set PACKTRAIN_GSM8K to the train.jsonl of GSM8K'}")
    about = origin("real_claims") | {"command": command_of(args.tokens, args.grid_tokens)}
    arms = all_arms(args.tokens, args.grid_tokens)
    runs = study(arms, {name: about[name] for name in ("machine", "packages")}, args.only, args.minutes, args.threads)
    result = about | {"tokens": args.tokens, "grid_tokens": args.grid_tokens, "arms": [arm.name for arm in arms]}
    result |= {"found": summarise(runs), "runs": runs}
    store(args.out, result, markdown(result), depth=3)
    draw(result["found"], args.out / "rates.png")
    print(markdown(result))


if __name__ == "__main__":
    main()
