#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=8
#SBATCH --error=HERE/runs/first/launch/%j_0_log.err
#SBATCH --gpus-per-node=4
#SBATCH --job-name=first
#SBATCH --mem=131072M
#SBATCH --no-requeue
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=HERE/runs/first/launch/%j_0_log.out
#SBATCH --signal=USR2@300
#SBATCH --time=240

# setup
cd HERE || exit 2
export SSL_DIST_LAUNCH="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
export HF_HUB_OFFLINE=1
run=runs/first
[ ! -e "$run/launch/stop" ] || { echo "$run was cancelled" >&2; exit 0; }

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output HERE/runs/first/launch/%j_%t_log.out --error HERE/runs/first/launch/%j_%t_log.err --kill-on-bad-exit=1 --cpus-per-task=8 PYTHON -P -u -m ssl_dist train pretrain/simclr run=runs/first 'data.shards=[data/mine]' grace=270 device=cuda


# teardown
code=$?
told=$(PYTHON -P -m launch.account "$run" --code "$code"); again=$?
code=${told:-$code}
if [ "$again" = 0 ]; then
  cp "$0" "$run/launch/next.sh"; words=(--parsable "$run/launch/next.sh")
  next=$(unset $(compgen -v SLURM_ | grep -vx SLURM_CONF); sbatch "${words[@]}") &&
    echo "${next%%;*}" >> "$run/launch/jobs" ||
    echo "the next job could not be submitted; do it yourself: sbatch ${words[*]}" >&2
fi
exit "$code"
