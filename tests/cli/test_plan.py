"""`packtrain plan --lengths`: from a file alone, and what it refuses."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from rich.console import Console

from packtrain.cli import main
from packtrain.cli.strategy_table import show_lengths, strategy_table
from packtrain.packing.plan import make_plan
from packtrain.packing.report import describe


@pytest.fixture
def file(tmp_path, sft_lengths):
    np.save(tmp_path / "lengths.npy", sft_lengths.astype(np.uint16))
    return tmp_path / "lengths.npy"


def shown(file, **options) -> str:
    console = Console(width=120, record=True, quiet=False, file=open("/dev/null", "w"))
    settings = dict(strategy="bfd", max_tokens=1024, every=False, world_size=2)
    show_lengths(file, console, **settings | options)
    return console.export_text()


def test_a_plan_of_lengths_alone(file):
    plan = shown(file)
    assert "2,000 examples" in plan and "bfd *" in plan and "pad_longest" in plan and "the fewest possible" in plan
    assert "global_balance: ranks are balanced, but their updates" in shown(file, every=True)
    assert "ABR" in plan and "eq. 2" in plan and "ABR" not in shown(file, world_size=1)


def test_equal_statements_of_strategies_are_one_line(tmp_path):
    np.save(tmp_path / "lengths.npy", np.full(40, 512, dtype=np.uint16))
    plan = " ".join(shown(tmp_path / "lengths.npy", every=True, world_size=1).split())
    assert plan.count("the fewest possible") == 1 and "0.00%" not in plan
    assert "bfd, ffd, optimal, global_balance: 20 packs, the fewest possible" in plan


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "needs a recipe or a lengths file"),
        (["--lengths", "absent.npy"], "no such lengths file"),
        (["--lengths", "{file}", "--set", "seed=1"], "need a recipe"),
        (["--lengths", "{file}", "--max-tokens", "10"], "max_tokens"),
        (["--lengths", "{file}", "--strategy", "bdf"], "did you mean 'bfd'"),
        (["recipes/x.yaml", "--max-tokens", "10"], "without a recipe"),
    ],
)
def test_errors_exit_with_2(args, message, file, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *(arg.format(file=file) for arg in args)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("width", [30, 80])
def test_no_number_of_a_table_is_cut(width, sft_lengths):
    """Names wrap, to the last letter, and keep their mark, as on a terminal that is wide enough (the control)."""
    own = "tests.programs.deadly:kill_rank_one"
    plans = [make_plan(sft_lengths, strategy=name, max_tokens=1024, world_size=2) for name in ("bfd", "balanced")]
    rows = [(name, describe(plan)) for name, plan in zip((own, "balanced"), plans, strict=True)]

    def printed(width: int) -> str:
        console = Console(width=width, file=io.StringIO())
        console.print(strategy_table(rows, own=own, world_size=2), crop=False)
        return console.file.getvalue()

    narrow, wide = printed(width), printed(200)
    numbers = [sorted(re.findall(r"\d[\d,.]*%?", text)) for text in (narrow, wide)]
    assert numbers[0] == numbers[1] and narrow.count("*") == wide.count("*") == 2 and "\u2026" not in narrow
    letters = "".join(line[:13].strip() for line in narrow.splitlines())
    assert f"{own} *" in wide and (width == 80 or own in letters)
