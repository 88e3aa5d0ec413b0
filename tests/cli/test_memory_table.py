"""`packtrain plan --memory`: what a person reads, and what is refused before anything is read."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from packtrain.cli import main
from packtrain.cli.memory_table import explain_logits, show_memory
from packtrain.objectives.chunks import rows_of_chunk
from packtrain.packing.plan import plan_run
from packtrain.recipe.reader import load_recipe
from packtrain.recipe.shipped import SHARE
from packtrain.training.launch import engine_of
from packtrain.training.memory.plan import MicroBatchSize, describe_model, parse_bytes, plan_memory
from packtrain.training.memory.states import ENGINES

QUICKSTART = SHARE / "recipes/quickstart.yaml"
LORA = "lora={r: 4, target_modules: all-linear}"
MIB = 2**20
LENGTHS = np.random.default_rng(0).integers(20, 800, 200)


def printed(memory: int, *overrides: str, ranks: int = 4, engine: str | None = None) -> str:
    recipe = load_recipe(QUICKSTART, ["bf16=true", *overrides])
    plans = {
        name: plan_run(
            recipe.batching.model_copy(update={"strategy": name}),
            recipe.schedule,
            LENGTHS,
            max_length=recipe.data.max_length,
            world_size=ranks,
        )
        for name in ("balanced", "pad_longest")
    }
    console = Console(file=io.StringIO(), width=80)
    show_memory(recipe, plans, LENGTHS // 2, console, memory=memory, engine=engine)
    return console.file.getvalue()


def row(text: str, label: str) -> list[str]:
    """The cells of the first row that begins with `label`."""
    line = next(line for line in text.splitlines() if line.strip().startswith(label))
    return line.strip().removeprefix(label).split()


def run(capsys, *args: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(QUICKSTART), *args])
    return caught.value.code or 0, capsys.readouterr().err


def test_every_line_says_how_it_is_known():
    text = printed(1024 * MIB)
    for label in ("= parameters", "= optimizer states", "# activations", "~ buckets", "= logits, kept", "host: peak"):
        assert label in text
    assert "= exact   # measured   ~ estimated" in text and "not counted: the CUDA context" in text
    assert "…" not in text  # nothing is cut off at 80 columns


def test_a_small_model_on_a_large_device_is_shown_in_mib():
    text = printed(80 * 1024 * MIB)
    assert "Memory per rank in MiB" in text and "Peak per rank in MiB" in text and "on 80.0 GiB" in text
    assert all(float(cell) >= 1 for cell in row(text, "peak"))
    large = ["config.hidden_size=2048", "config.intermediate_size=8192", "config.num_hidden_layers=4"]
    assert "Memory per rank in GiB" in printed(80 * 1024 * MIB, *large, engine="ddp")  # control


def test_logits_in_chunks_of_some_strategies_only_are_explained():
    model = describe_model(load_recipe(QUICKSTART, []))
    rows = rows_of_chunk(model.vocabulary)
    whole, chunked = (
        MicroBatchSize(tokens=2 * rows, supervised=supervised, rows=1, width=2 * rows, pairs=4 * rows**2)
        for supervised in (rows, rows + 1)
    )
    note = explain_logits(model, {"balanced": whole, "pad_longest": chunked})
    assert f"up to {rows:,} supervised tokens of a micro-batch (balanced)" in note

    def kept(size: MicroBatchSize) -> int:
        options = dict(engine="ddp", ranks=1, half=False, checkpointing=False)
        return sum(line.bytes for line in plan_memory(model, size, **options).lines if "logits" in line.what)

    assert kept(chunked) < kept(whole), "one more supervised token takes less memory"
    assert not explain_logits(model, {"balanced": whole, "pad_longest": whole})  # control


def test_the_three_verdicts():
    """The same run on devices around its peak of DDP."""
    peak = float(row(printed(1024 * MIB), "peak")[0])
    verdicts = {}
    for name, share in {"fits": 2.0, "tight": 1.1, "no": 0.9}.items():
        verdicts[name] = row(printed(round(peak * share * MIB)), f"on {peak * share:,.1f} MiB")
    assert all(cells[0] == name for name, cells in verdicts.items())
    assert set(verdicts["fits"]) == {"fits"}


def test_the_simplest_engine_that_fits_is_named():
    assert "the simplest engine that fits: launch/ddp.yaml" in printed(1024 * MIB)
    assert "the simplest engine that fits: launch/single_gpu.yaml" in printed(1024 * MIB, ranks=1)
    assert "nothing fits" in printed(1 * MIB)
    peaks = [float(cell) for cell in row(printed(1024 * MIB), "peak")]
    between = round(0.9 * min(peaks) * MIB)
    assert "with training.gradient_checkpointing=true it fits: launch/" in printed(between)


def test_frozen_weights_have_neither_gradients_nor_states():
    full, lora = printed(1024 * MIB), printed(1024 * MIB, LORA)
    for label in ("= gradients", "= optimizer states"):
        assert float(row(lora, label)[0]) < 0.2 * float(row(full, label)[0])
    assert float(row(lora, "= parameters")[0]) >= float(row(full, "= parameters")[0])  # the adapter comes on top


def test_one_engine_can_be_asked_for():
    assert len(row(printed(1024 * MIB), "peak")) == len(ENGINES)
    text = printed(1024 * MIB, engine="zero3")
    assert len(row(text, "peak")) == 1
    assert row(text, "ZeRO-3") == [] and "+NVMe" not in text and "the simplest" not in text


def test_every_launch_file_has_its_formulas():
    others = {"cpu": "ddp", "single_gpu": "ddp", "multi_node": "zero2"}
    for file in sorted((SHARE / "launch").glob("*.yaml")):
        assert engine_of(file) == others.get(file.stem, file.stem)
        assert engine_of(file) in ENGINES


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--memory", "80 apples"], "must be an amount of memory"),
        (["--memory", "-1GiB"], "must be an amount of memory"),
        (["--memory", "80IB"], "must be an amount of memory"),
        (["--memory", ".GiB"], "must be an amount of memory"),
        (["--memory", "1.2.3GiB"], "must be an amount of memory"),
        (["--memory", "0.1B"], "must be an amount of memory"),
        (["--memory", "9" * 400 + "GiB"], "must be an amount of memory"),
        (["--memory", "80GiB", "--launch", "zero4"], "there is no such launch file"),
        (["--launch", "zero3"], "needs --memory"),
    ],
)
def test_what_cannot_be_planned_is_our_error(capsys, args, message):
    code, error = run(capsys, *args)
    assert code == 2
    assert error.startswith("error: ") and message in error and "fix: " in error


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * 2**30), ("80 gb", 80 * 10**9), (".5MiB", 2**19), ("1.TiB", 2**40), ("7B", 7), ("2KB", 2000)],
)
def test_amounts_of_memory(text, size):
    assert parse_bytes(text) == size


def test_an_engine_without_formulas_is_refused(capsys, tmp_path: Path):
    (tmp_path / "z2.json").write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}')
    file = tmp_path / "mine.yaml"
    file.write_text(f"distributed_type: DEEPSPEED\ndeepspeed_config: {{deepspeed_config_file: {tmp_path}/z2.json}}\n")
    code, error = run(capsys, "--memory", "80GiB", "--launch", str(file))
    assert code == 2 and "the memory of zero2_offload_cpu cannot be estimated" in error
    file.write_text("distributed_type: DEEPSPEED\n")
    assert "has no DeepSpeed config" in run(capsys, "--memory", "80GiB", "--launch", str(file))[1]
