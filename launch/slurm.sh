#!/usr/bin/env bash
# sbatch launch/slurm.sh recipes/sft.yaml [--set key=value ...]     one task per host, one process per GPU
#SBATCH --job-name=packtrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

export HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export PROCESSES=$((SLURM_NNODES * SLURM_GPUS_ON_NODE))
CONFIG=${CONFIG:-launch/multi_node.yaml}
export CONFIG

# A requeued job goes on from its newest checkpoint, if it had come to one.
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && python - "$@" <<'END'
import sys
from pathlib import Path
from packtrain import load_recipe
from packtrain.training.sealing import is_sealed

sets = [value for option, value in zip(sys.argv, sys.argv[1:]) if option == "--set"]
run = Path(load_recipe(sys.argv[1], sets).training["output_dir"])
sys.exit(not any(is_sealed(path) for path in run.glob("checkpoint-*")))
END
then set -- "$@" --resume; fi

# Two minutes before the end, and before a preemption, SLURM signals its tasks alone: `exec` makes the launcher one. It takes
# the options of `accelerate launch`, sends signals on to its ranks, waits while they save, and exits with their 75.
srun --kill-on-bad-exit=1 bash -c '
    exec python -m packtrain.cli.launcher --config_file "$CONFIG" --num_machines "$SLURM_NNODES" --num_processes "$PROCESSES" \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$HEAD_NODE" --main_process_port 29500 \
        -m packtrain train "$@"' packtrain "$@"
