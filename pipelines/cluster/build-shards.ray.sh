#!/bin/bash
# Build a dataset on a Ray cluster (pip install 'omnilmm-toolkit[ray]' on every node). Run it on the head node:
#
#   RAY_ADDRESS=auto bash pipelines/cluster/build-shards.ray.sh build.yaml
#
# The folders that build.yaml names must be on storage that all nodes share. Without RAY_ADDRESS a Ray of its
# own is started on this machine. Interrupted, it goes on when it is started again.
set -euo pipefail

exec omnidata build-shards --config "${1:?usage: build-shards.ray.sh build.yaml}" --executor ray
