"""Runs of several processes, started through launch/ as users start them.

    pytest -m slow -s tests/launch        # a quarter of an hour on two quiet cores; prints what it measured

What needs DeepSpeed, libaio or network namespaces is skipped, with the reason, where they are not.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from results.zero.run import state_rows
from tests.launch.helpers import (
    LORA,
    RECIPE,
    ROOT,
    difference,
    log,
    needs_deepspeed,
    run,
    say,
    skip_without_libaio,
    start,
    weights,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

IN_CI = ("ddp", "zero3")


def engine(config: str, in_ci: tuple[str, ...] = IN_CI):
    """`config` as a parameter: DeepSpeed's need DeepSpeed, and CI runs those `in_ci`."""
    marks = [] if config == "ddp" else [needs_deepspeed]
    return pytest.param(config, marks=[*marks, pytest.mark.ci] if config in in_ci else marks)


WITH_ZERO = [engine(config) for config in ("ddp", "zero1", "zero2", "zero3")]
ON_FOUR_RANKS = [
    engine(config, in_ci=("ddp",)) for config in ("ddp", "zero1", "zero2", "zero3")
]  # minutes on two cores


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One plain process, in full and with LoRA: what every engine has to repeat."""
    directory = tmp_path_factory.mktemp("alone")
    return {
        name: (run(directory / name, None, 1, *options)[0], weights(directory / name))
        for name, options in {"full": (), "lora": (LORA,)}.items()
    }


@pytest.mark.parametrize("trained", ["full", "lora"])
@pytest.mark.parametrize("config", [*WITH_ZERO, engine("zero3_offload_cpu")])
def test_every_engine_trains_the_same(tmp_path, alone, config, trained):
    """Losses, gradient norms and the saved model; ZeRO-3 with logits at supervised positions and varlen attention.

    With LoRA the engines also recompute activations, which the one process does not.
    """
    expected, expected_weights = alone[trained]
    options = [LORA, "training.gradient_checkpointing=true"] if trained == "lora" else []
    found = run(tmp_path, config, 2, *options)[0]
    assert found["attention"] == "packtrain_varlen"
    relative = [abs(loss / expected["losses"][step] - 1) for step, loss in found["losses"].items()]
    say(f"{config}, {trained}: losses differ from one process's by at most {max(relative):.1e}")
    for figure in ("losses", "norms"):
        np.testing.assert_allclose(list(found[figure].values()), list(expected[figure].values()), rtol=1e-4)
    assert difference(weights(tmp_path), expected_weights) < 1e-4


HEADS = {
    "tied": (),
    "full": ("model.config.tie_word_embeddings=false",),
    "lora": (LORA, "training.gradient_checkpointing=true"),
    "lora, scaled": (LORA, "model.config.model_type=granite", "model.config.logits_scaling=0.3"),
    "adapter on the head": ("lora={r: 4, target_modules: [q_proj, lm_head], init_lora_weights: false}",),
}


def chunked(config: str, head: str):
    """One engine and head as parameters; CI runs one of them."""
    marks = [] if config == "ddp" else [needs_deepspeed]
    in_ci = (config, head) == ("zero3", "tied")
    return pytest.param(config, head, marks=[*marks, pytest.mark.ci] if in_ci else marks)


CHUNKED = [
    chunked(config, head) for config in ("ddp", "zero1", "zero2", "zero3", "zero3_offload_cpu") for head in HEADS
]


@pytest.mark.parametrize(("config", "head"), CHUNKED)
def test_every_engine_computes_losses_in_chunks(tmp_path, config, head):
    """Chunks of 16 positions against one process with whole logits; an adapter on the head makes ZeRO-3 keep them whole."""
    options = HEADS[head]
    (expected,) = run(tmp_path / "alone", None, 1, *options)
    assert expected["in_chunks"] is None
    found = run(tmp_path / "run", config, 2, *options, f"chunk={4 * 320 * 16}")
    whole = head == "adapter on the head" and config.startswith("zero3")
    assert [one["in_chunks"] for one in found] == [not whole] * 2
    relative = [abs(loss / expected["losses"][step] - 1) for step, loss in found[0]["losses"].items()]
    say(f"{config}, {head}: losses differ from whole logits' by at most {max(relative):.1e}")
    for figure in ("losses", "norms"):
        np.testing.assert_allclose(list(found[0][figure].values()), list(expected[figure].values()), rtol=1e-4)
    assert difference(weights(tmp_path / "run"), weights(tmp_path / "alone")) < 1e-4


@pytest.mark.parametrize("config", [engine(config) for config in IN_CI])
def test_a_killed_rank_ends_the_job_and_the_run_resumes(tmp_path, config):
    saving = ("training.save_strategy=steps", "training.save_steps=3", "training.max_steps=8")
    unbroken = run(tmp_path / "unbroken", config, 2, *saving)
    killed = start(tmp_path / "killed", config, 2, *saving, "die=1:6")
    code = killed.wait(timeout=900)
    ended_after = time.time() - (tmp_path / "killed/died").stat().st_mtime
    assert code != 0
    message = log(tmp_path / "killed")
    assert "SIGKILL" in message or "exitcode  : -9" in message
    assert "rank      : 1" in message
    assert not (tmp_path / "killed/rank0.json").exists()  # nobody carried on alone

    checkpoint = tmp_path / "killed/run/checkpoint-3"
    resumed = run(tmp_path / "resumed", config, 2, *saving, f"resume={checkpoint}")
    assert sorted(map(int, resumed[0]["read"])) == list(range(3, 8))
    for rank in range(2):
        assert all(unbroken[rank]["read"][step] == read for step, read in resumed[rank]["read"].items())
    largest = difference(weights(tmp_path / "resumed"), weights(tmp_path / "unbroken"))
    say(f"{config}: the job ended {ended_after:.1f} s after rank 1 was killed, with exit code {code}")
    say(f"{config}: resumed and unbroken weights differ by at most {largest:.1e}")
    assert largest == 0 if config == "ddp" else largest <= 1e-6


@pytest.mark.parametrize("config", ON_FOUR_RANKS)
def test_resuming_on_other_numbers_of_ranks(tmp_path, config):
    """Two ranks, then one, then four: every example of every epoch once, and the losses of a run on two."""
    whole = run(tmp_path / "whole", config, 2)[0]
    total = whole["total_steps"]
    parts, checkpoint = [], None
    for ranks, stop in ((2, 4), (1, 8), (4, total)):
        directory = tmp_path / str(ranks)
        options = [f"stop={stop}"] + ([f"resume={checkpoint}"] if checkpoint else [])
        launched = "single_gpu" if config == "ddp" and ranks == 1 else config
        parts += run(directory, launched, ranks, *options)
        checkpoint = directory / f"run/checkpoint-{stop}"

    losses = {int(step): loss for part in parts for step, loss in part["losses"].items()}
    expected = {int(step): loss for step, loss in whole["losses"].items()}
    assert losses.keys() == expected.keys()
    relative = [abs(losses[step] - expected[step]) / expected[step] for step in losses]
    say(f"{config}: 2 -> 1 -> 4 ranks, {total} updates, losses differ from 2 ranks' by at most {max(relative):.1e}")
    assert max(relative) < 1e-5
    for epoch in range(2):
        read = [i for part in parts for step, ids in part["read"].items() if part["epochs"][step] == epoch for i in ids]
        assert sorted(read) == list(range(whole["examples"]))


@needs_deepspeed
def test_shards_are_not_read_by_another_engine_or_stage(tmp_path):
    run(tmp_path / "zero2", "zero2", 2, "training.max_steps=2", "stop=1")
    checkpoint = tmp_path / "zero2/run/checkpoint-1"
    for config, message in {"ddp": "was written by DeepSpeed", "zero3": "was written by ZeRO stage 1 or 2"}.items():
        refused = start(tmp_path / config, config, 2, "training.max_steps=2", f"resume={checkpoint}")
        assert refused.wait() != 0
        assert message in log(tmp_path / config)


@needs_deepspeed
def test_documents_that_see_each_other_are_refused_where_weights_are_whole(tmp_path):
    """OPT builds its mask without position_ids, so sdpa leaks. ZeRO-3 shards while it loads and can't tell."""
    opt = "{model_type: opt, hidden_size: 32, ffn_dim: 64, num_hidden_layers: 2, num_attention_heads: 4, "
    leaking = (f"model.config={opt}word_embed_proj_dim: 32}}", "model.attn_implementation=sdpa", "training.max_steps=1")
    refused = start(tmp_path / "zero2", "zero2", 2, *leaking)
    assert refused.wait() != 0
    assert "attention leaks between documents of a flat batch with sdpa: leaks" in log(tmp_path / "zero2")
    run(tmp_path / "allowed", "zero2", 2, *leaking, "batching.allow_contamination=true")  # control
    run(tmp_path / "zero3", "zero3", 2, *leaking)


@needs_deepspeed
def test_states_on_a_drive(tmp_path):
    """ZeRO-Infinity on plain disk: the same losses; resuming, which DeepSpeed gets wrong, is refused.

    The model is wider than the others': what is below 1 MiB on a rank DeepSpeed keeps in memory, whatever was asked.
    """
    skip_without_libaio()
    drive = tmp_path / "drive"
    drive.mkdir()
    wide = ("model.config.hidden_size=512", "model.config.intermediate_size=1408", "model.config.num_hidden_layers=1")
    wide += ("training.learning_rate=3e-4", "training.max_steps=6")
    zero = f"{{stage: 3, offload_param: {{device: nvme, nvme_path: {drive}}}, "
    zero += f"offload_optimizer: {{device: nvme, nvme_path: {drive}}}}}"
    offloaded = (f"training.deepspeed={{zero_optimization: {zero}}}", "training.save_strategy=steps")
    expected = run(tmp_path / "alone", None, 1, *wide)[0]["losses"]
    found = run(tmp_path / "run", "ddp", 2, *wide, *offloaded, "training.save_steps=3")[0]["losses"]
    relative = [abs(loss / expected[step] - 1) for step, loss in found.items()]
    written = sum(file.stat().st_size for file in drive.rglob("*.swp"))
    say(f"NVMe offload x2: losses differ from one process's by at most {max(relative):.1e}; {written:,} bytes on disk")
    assert max(relative) < 1e-4
    elements = sum(weight.numel() for weight in weights(tmp_path / "alone").values())
    assert written > 12 * elements  # master weights and both moments at least
    resume = f"resume={tmp_path / 'run/run/checkpoint-3'}"
    for config, options in {"ddp": offloaded, "zero3": ()}.items():
        refused = start(tmp_path / config, config, 2, *wide, *options, resume)
        assert refused.wait() != 0
        assert "states on NVMe can't be resumed" in log(tmp_path / config)


@pytest.mark.parametrize("config", ["ddp", pytest.param("multi_node", marks=needs_deepspeed)])
def test_two_hosts_train_what_one_does(tmp_path, alone, config):
    """Two network namespaces, one rank in each, started as launch/README.md says."""
    allowed = shutil.which("ip") and subprocess.run(["ip", "netns", "add", "packtrain_try"], capture_output=True)
    if not allowed or allowed.returncode:
        pytest.skip(f"no network namespaces here: {allowed.stderr.decode().strip() if allowed else 'no iproute2'}")
    subprocess.run(["ip", "netns", "del", "packtrain_try"], check=True)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    script = [ROOT / "tests/programs/two_hosts.sh", config, tmp_path / "recipe.yaml", tmp_path]
    done = subprocess.run(
        [*map(str, script), f"training.output_dir={tmp_path / 'run'}"],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    expected, expected_weights = alone["full"]
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    relative = [abs(loss / expected["losses"][step] - 1) for step, loss in found[0]["losses"].items()]
    say(f"{config}: two hosts' losses differ from one process's by at most {max(relative):.1e}")
    np.testing.assert_allclose(list(found[0]["losses"].values()), list(expected["losses"].values()), rtol=1e-5)
    assert difference(weights(tmp_path), expected_weights) < 1e-4
    for step, ids in expected["read"].items():
        assert sorted(found[0]["read"][step] + found[1]["read"][step]) == sorted(ids)


def test_fully_sharded_by_torch(tmp_path):
    """The objective under raw FSDP2, which CPU ranks can have without accelerate: its hook on a sharded head."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.programs.fully_sharded"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "losses agree" in done.stdout


@needs_deepspeed
def test_bytes_are_what_the_formulas_say(tmp_path):
    """All kinds of states on 1, 2 and 4 ranks, in full and with LoRA, in float32 and bfloat16."""
    rows = state_rows(tmp_path)
    assert {row["ranks"] for row in rows} == {1, 2, 4}
    largest = {"full": 1000 * 64, "LoRA": 8 * 160}  # elements of the largest trained parameter
    for row in rows:
        more = row["measured"] - row["formula"]
        if (row["engine"], row["kind"]) == ("zero2", "gradients"):  # of whole parameters: one more at each end
            itemsize = 2 if row["dtype"] == "bf16" else 4
            assert abs(more) <= 2 * itemsize * largest[row["trained"]], row
        else:
            assert more == 0, row
    # Control: sharding shows. ZeRO-3 on four ranks holds a quarter of the optimizer states that DDP holds.
    states = {(row["engine"], row["ranks"]): row["measured"] for row in rows if row["kind"] == "optimizer states"}
    assert states["zero3", 4] < 0.3 * states["ddp", 4]
