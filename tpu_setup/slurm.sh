#!/usr/bin/env bash
#SBATCH --job-name=lm
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Three minutes before the time is over, or before a pre-emption where the cluster grants a grace
# time and has PreemptParameters=send_user_signal, every task is interrupted and exits 75.
#SBATCH --signal=INT@180
set -euo pipefail

if [[ ${1:-} == job ]]; then # what sbatch runs, from a folder of its own
    code=0
    # A failure on one host reaches the others through jax; SLURM's own killing would hide the 75.
    srun --label --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${@:2}" || code=$?
    if ((code == 75)); then scontrol requeue "$SLURM_JOB_ID"; fi
    exit "$code"
fi

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
. "$HERE/common.sh"

HELP="Submits one command to GPU nodes under SLURM: one task a GPU, as jax's own detection wants it.

    tpu_setup/slurm.sh --nodes=4 --gpus=8 --time=24:00:00 \\
        -- python -m lm.train --config=configs/chinchilla.py:425m --workdir=/shared/425m

The job is put back into the queue when the command exits 75, as it does when its time is over; the
same command then goes on from its workdir, on a file system that all nodes see.

  --nodes=1          nodes
  --gpus=8           GPUs of each node, and tasks
  --cpus=8           cores a task
  --time=D-HH:MM:SS  if not the partition's default
  --partition=NAME   if not the cluster's default
  --account=NAME     if the cluster wants one
  --dry_run          print what would be submitted
  --help             this text"

parse_flags "$HELP" "$@"
NODES=${NODES:-1} GPUS=${GPUS:-8} CPUS=${CPUS:-8}
whole --nodes "$NODES"
whole --gpus "$GPUS"
whole --cpus "$CPUS"
((${#COMMAND[@]})) || fail "the command is missing: slurm.sh ... -- python -m lm.train ..."

request=(--nodes="$NODES" --gres=gpu:"$GPUS" --ntasks-per-node="$GPUS" --cpus-per-task="$CPUS")
[[ ! $TIME ]] || request+=(--time="$TIME")
[[ ! $PARTITION ]] || request+=(--partition="$PARTITION")
[[ ! $ACCOUNT ]] || request+=(--account="$ACCOUNT")
run sbatch "${request[@]}" "$HERE/slurm.sh" job "${COMMAND[@]}"
