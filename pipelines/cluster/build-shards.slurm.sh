#!/bin/bash
# Build a dataset with a Slurm array: each task builds every N-th shard, the last one to end completes it.
#
#   sbatch --array=0-31 pipelines/cluster/build-shards.slurm.sh build.yaml
#
# build.yaml holds the flags of `omnidata build-shards` (source, tokenizer, out, image-root, ...); the folders
# that it names must be on storage that all nodes share. The first task to start makes the plan, the others
# wait for it. A task that was preempted or failed may be started again at any time, alone too:
#
#   sbatch --array=7 --export=ALL,TASKS=32 pipelines/cluster/build-shards.slurm.sh build.yaml
#
#SBATCH --job-name=build-shards
#SBATCH --cpus-per-task=32
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=build-shards-%A-%a.log
set -euo pipefail

config=${1:?usage: sbatch --array=0-31 build-shards.slurm.sh build.yaml}
tasks=${TASKS:-${SLURM_ARRAY_TASK_COUNT:?start this as an array, or set TASKS}}

exec omnidata build-shards --config "$config" --task "$SLURM_ARRAY_TASK_ID/$tasks" \
    --workers "${SLURM_CPUS_PER_TASK:-1}"
