#!/usr/bin/env bash
# One node, all of its GPUs: bash pipelines/cluster/train.torchrun.sh pipelines/recipes/sft.yaml [dotted.key=value ...]
# A run that fails is started again and goes on from its newest verified checkpoint.
set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "usage: $0 RECIPE.yaml [dotted.key=value ...]" >&2
    exit 2
fi
cd "$(dirname "$0")/../.."
exec torchrun --standalone --nproc-per-node "${GPUS:-gpu}" --max-restarts 3 pipelines/train.py "$@"
