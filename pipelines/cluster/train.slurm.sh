#!/usr/bin/env bash
# Slurm, several nodes: sbatch --nodes 8 pipelines/cluster/train.slurm.sh RECIPE.yaml [dotted.key=value ...]
#
# Five minutes before the time limit the ranks get SIGUSR1: they finish the step, save and exit 0, and the job
# asks for its place in the queue again. Checkpoints must be on a file system that all nodes share.
#SBATCH --job-name=omnilmm
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "usage: sbatch --nodes N $0 RECIPE.yaml [dotted.key=value ...]" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR}"
head_node=$(scontrol show hostnames "${SLURM_JOB_NODELIST}" | head -n 1)
preempted=no

# shellcheck disable=SC2329  # the trap below calls it
warn_ranks() {
    preempted=yes
    srun --overlap --ntasks-per-node=1 pkill -USR1 -f pipelines/train.py || true
}
trap warn_ranks USR1

# torchrun must ignore the signal; the ranks, which inherit that, install their own handler.
# srun does not take the CPUs of the job's request by itself: without them all loader workers share one.
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-64}" bash -c 'trap "" USR1; exec torchrun "$@"' torchrun \
    --nnodes "${SLURM_NNODES}" --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-id "${SLURM_JOB_ID}" --rdzv-endpoint "${head_node}:29500" \
    pipelines/train.py "$@" &
step=$!

# A trapped signal interrupts wait, so wait again until the step itself has ended.
code=0
while kill -0 "${step}" 2>/dev/null; do
    code=0
    wait "${step}" || code=$?
done
if [[ ${preempted} == yes && ${code} -eq 0 ]]; then
    scontrol requeue "${SLURM_JOB_ID}"
fi
exit "${code}"
