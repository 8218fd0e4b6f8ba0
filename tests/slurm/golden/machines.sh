#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --array=0-1%2
#SBATCH --cpus-per-task=12
#SBATCH --error=HERE/runs/dino/launch/%A_%a_0_log.err
#SBATCH --gpus-per-node=8
#SBATCH --job-name=dino
#SBATCH --mem=491520M
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=HERE/runs/dino/launch/%A_%a_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=2880

# setup
cd HERE || exit 2
module purge
module load cuda
export SSL_DIST_LAUNCH="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
export HF_HUB_OFFLINE=1
case "$SLURM_ARRAY_TASK_ID" in
0) words=(train pretrain/dino_tcga 'data.shards=[data/tcga]' seed=1 run=runs/dino/seed=1 grace=90 data.stage="/tmp/$SLURM_JOB_ID" device=cuda) run=runs/dino/seed=1 ;;
1) words=(train pretrain/dino_tcga 'data.shards=[data/tcga]' seed=2 run=runs/dino/seed=2 grace=90 data.stage="/tmp/$SLURM_JOB_ID" device=cuda) run=runs/dino/seed=2 ;;
esac
[ ! -e "$run/launch/stop" ] || { echo "$run was cancelled" >&2; exit 0; }

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output HERE/runs/dino/launch/%A_%a_%t_log.out --error HERE/runs/dino/launch/%A_%a_%t_log.err --kill-on-bad-exit=1 --cpus-per-task=12 PYTHON -P -u -m ssl_dist "${words[@]}"


# teardown
code=$?
srun --ntasks=4 --ntasks-per-node=1 rm -rf -- "/tmp/${SLURM_JOB_ID:?}"
told=$(PYTHON -P -m launch.account "$run" --code "$code"); again=$?
code=${told:-$code}
if [ "$again" = 0 ]; then
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" && sleep 60
fi
exit "$code"
