"""Measures what tails do to early stops: for an exact denoiser (`--oracle`), and for tiny trained models.

    python results/rainbow/run.py --oracle                   # a minute; writes results/rainbow/oracle/
    python results/rainbow/run.py --seeds 0 1 2 3 4 5        # half an hour on one core; writes results/rainbow/trained/

`oracle.py` and `trained.py` say how. Runs that are stored are not trained again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from packtrain.errors import PacktrainError

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, as results/ is not installed
from results.page import RESULTS
from results.rainbow import oracle, report
from results.rainbow.pictures import draw_oracle, draw_trained
from results.rainbow.trained import TAILS, Settings, run

HERE = RESULTS / "rainbow"
COMMAND = "python results/rainbow/run.py"


def write_oracle(outcomes: Sequence[oracle.Outcome], directory: Path) -> str:
    """Write `oracle.json`, `oracle.md` and, where matplotlib is installed, `oracle.png`; returns the page."""
    directory.mkdir(parents=True, exist_ok=True)
    text = oracle.page(outcomes, command=f"{COMMAND} --oracle")
    (directory / "oracle.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    (directory / "oracle.md").write_text(text)
    draw_oracle(outcomes, directory / "oracle.png")
    return text


def write_trained(directory: Path, seeds: Sequence[int]) -> str:
    """Write `README.md` and `trained.png` from everything in `directory/runs`; returns the page.

    Args:
        seeds: those of the command.
    """
    results = report.load_results(directory / "runs", list(TAILS))
    pictures = sorted(path.name for path in directory.glob("unmasking-*.png"))
    text = report.page(results, pictures=pictures, command=f"{COMMAND} --seeds {' '.join(map(str, seeds))}")
    (directory / "README.md").write_text(text + "\n")
    settings = report.settings_of(results)
    draw_trained(settings, report.reference_length(settings), directory / "trained.png")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    grid = dict(type=Path, nargs="?", const=HERE / "oracle.yaml", metavar="GRID")
    parser.add_argument("--oracle", **grid, help="run the exact denoiser instead, over a grid (default oracle.yaml)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5], help="of trained models (default 0 1 2 3 4 5)"
    )
    parser.add_argument("--out", type=Path, help="default results/rainbow/oracle, or results/rainbow/trained")
    scratch = Path(tempfile.gettempdir(), "packtrain-rainbow")
    parser.add_argument("--scratch", type=Path, default=scratch, help="where base models are kept")
    options = parser.parse_args(arguments)
    if options.oracle:
        try:
            outcomes = oracle.run_file(options.oracle)
        except PacktrainError as error:
            parser.error(str(error))
        print(write_oracle(outcomes, options.out or HERE / "oracle"))
        return
    directory = options.out or HERE / "trained"
    run(Settings(), seeds=options.seeds, directory=directory, scratch=options.scratch)
    print(write_trained(directory, options.seeds))


if __name__ == "__main__":
    main()
