#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=8
#SBATCH --error=HERE/runs/old/eval/launch/%j_0_log.err
#SBATCH --gpus-per-node=1
#SBATCH --job-name=old-linear
#SBATCH --mem=65536M
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=HERE/runs/old/eval/launch/%j_0_log.out
#SBATCH --requeue
#SBATCH --time=1440

# setup
cd HERE || exit 2
export SSL_DIST_LAUNCH="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
export HF_HUB_OFFLINE=1

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output HERE/runs/old/eval/launch/%j_%t_log.out --error HERE/runs/old/eval/launch/%j_%t_log.err --kill-on-bad-exit=1 --cpus-per-task=8 apptainer exec --nv --bind /archive HERE/ssl_dist.sif python -P -u -m ssl_dist eval eval/linear encoder=runs/old/encoder 'data.shards=[data/mine]'


# teardown
code=$?
exit "$code"
