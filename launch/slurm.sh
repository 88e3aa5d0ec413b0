#!/usr/bin/env bash
# sbatch launch/slurm.sh recipes/sft.yaml [--set key=value ...]     one task per host, one process per GPU
#SBATCH --job-name=packtrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail

export HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export PROCESSES=$((SLURM_NNODES * SLURM_GPUS_ON_NODE))
CONFIG=${CONFIG:-launch/multi_node.yaml}
export CONFIG

# A requeued job goes on from its last checkpoint: pass --resume once there is one.
srun --kill-on-bad-exit=1 bash -c '
    accelerate launch --config_file "$CONFIG" --num_machines "$SLURM_NNODES" --num_processes "$PROCESSES" \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$HEAD_NODE" --main_process_port 29500 \
        -m packtrain train "$@"' packtrain "$@"
