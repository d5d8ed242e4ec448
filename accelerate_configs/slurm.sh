#!/bin/bash
# One launcher on each machine of a Slurm job. From the repository's folder:
#   sbatch --nodes 4 --gpus-per-node 8 accelerate_configs/slurm.sh accelerate_configs/fsdp2.yaml \
#       recipes/wiki_zh_scratch.py
# Everything after the YAML is the recipe and its flags. The machines must share the folder, with .venv.
#SBATCH --job-name pretraining
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 32
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal TERM@120
#SBATCH --output slurm-%j.log
# --requeue: a job that loses a machine starts again, and the recipe continues from its last checkpoint.
# The job ends when the recipe ends. A machine that fails ends the others within NCCL's timeout (--ddp_timeout).
# Not yet run under Slurm; test_configs.py runs it with stand-ins for Slurm's commands.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: sbatch --nodes N accelerate_configs/slurm.sh YAML RECIPE [FLAGS]" >&2
    exit 2
fi
yaml=$1
shift
export MAIN_PROCESS_IP MAIN_PROCESS_PORT YAML=$yaml GPUS=${SLURM_GPUS_ON_NODE:-8}
MAIN_PROCESS_IP=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MAIN_PROCESS_PORT=$((20000 + SLURM_JOB_ID % 10000)) # two jobs may share a machine
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110 # seconds for the last save, of the 120 that --signal gives
export PATH=$PWD/.venv/bin:$PATH
# Single quotes, because SLURM_NODEID differs on each machine.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file "$YAML" \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * GPUS))" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MAIN_PROCESS_IP" --main_process_port "$MAIN_PROCESS_PORT" "$@"' launch "$@"
