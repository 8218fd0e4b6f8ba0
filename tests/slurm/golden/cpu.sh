#!/bin/bash

# Parameters
#SBATCH --array=0-2%3
#SBATCH --cpus-per-task=8
#SBATCH --error=HERE/data/cut.launch/%A_%a_0_log.err
#SBATCH --job-name=cut
#SBATCH --mem=32768M
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=HERE/data/cut.launch/%A_%a_0_log.out
#SBATCH --partition=cpu
#SBATCH --requeue
#SBATCH --time=720

# setup
cd HERE || exit 2
umask 002
export SSL_DIST_LAUNCH="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
export HF_HUB_OFFLINE=1
case "$SLURM_ARRAY_TASK_ID" in
0) words=(shard shards/slides source=archive out=data/cut dataset=mine part=1/3) ;;
1) words=(shard shards/slides source=archive out=data/cut dataset=mine part=2/3) ;;
2) words=(shard shards/slides source=archive out=data/cut dataset=mine part=3/3) ;;
esac

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output HERE/data/cut.launch/%A_%a_%t_log.out --error HERE/data/cut.launch/%A_%a_%t_log.err --kill-on-bad-exit=1 --cpus-per-task=8 PYTHON -P -u -m ssl_dist "${words[@]}"


# teardown
code=$?
exit "$code"

#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=8
#SBATCH --dependency=afterok:cut
#SBATCH --error=HERE/data/cut.launch/%j_0_log.err
#SBATCH --job-name=cut-publish
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=32768M
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=HERE/data/cut.launch/%j_0_log.out
#SBATCH --partition=cpu
#SBATCH --requeue
#SBATCH --time=720

# setup
cd HERE || exit 2
umask 002
export SSL_DIST_LAUNCH="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
export HF_HUB_OFFLINE=1

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output HERE/data/cut.launch/%j_%t_log.out --error HERE/data/cut.launch/%j_%t_log.err --kill-on-bad-exit=1 --cpus-per-task=8 PYTHON -P -u -m ssl_dist shard shards/slides source=archive out=data/cut dataset=mine


# teardown
code=$?
exit "$code"
