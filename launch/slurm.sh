#!/bin/bash
# Training on the nodes of a Slurm allocation; the arguments are those of launch/train.sh:
#   sbatch --nodes 2 --gpus-per-node 8 launch/slurm.sh --config FILE output=/shared/run
# One task a node starts the node's processes by DeepSpeed's own launcher, so no ssh is needed.
# The checkout, the environment and `output` have to lie on a file system that all nodes share.
#SBATCH --job-name=obm-train
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

root=${OBM_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
[ -f "$root/launch/train.sh" ] || { echo "error: no launch/train.sh in $root; submit from the checkout, or set OBM_ROOT" >&2; exit 2; }
export PATH="$root/.venv/bin:$PATH"
slots=${SLOTS:-${SLURM_GPUS_ON_NODE:-1}}
hostfile=$(mktemp -p "$root" .hostfile-XXXXXX)
trap 'rm -f "$hostfile"' EXIT
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
for host in $hosts; do echo "$host slots=$slots"; done > "$hostfile"

export OBM_HOSTFILE=$hostfile OBM_ROOT=$root
export MASTER_ADDR=${MASTER_ADDR:-$(echo "$hosts" | head -n 1)}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
# a job that was preempted and comes back goes on where it was
resume=()
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && resume=(--resume)

# the first process that fails ends the job on all nodes
srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c '
  exec deepspeed --hostfile "$OBM_HOSTFILE" --no_ssh --node_rank "$SLURM_NODEID" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$OBM_ROOT/launch/train.sh" "$@"
' train "$@" ${resume[@]+"${resume[@]}"}
