#!/usr/bin/env bash
# A first hour on a GPU in one command of nine minutes: what only a GPU can prove, most important first.
#
#   bash benchmarks/gpu_day.sh                   on a CUDA device
#   bash benchmarks/gpu_day.sh --toy             the same code at toy sizes on the CPU, to run every line once
#
# Every part has its own time limit; a part that fails or runs out of time does not stop the next. Figures are
# appended to $OUT/gpu_day.jsonl (default: here), a line a part as soon as it ends, so an interrupted run still
# tells. PARTS="train qwen" runs only these.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export GPU_DAY_FOLDER="${GPU_DAY_FOLDER:-$(mktemp -d)}"
python="${PYTHON:-python3}"
out="${OUT:-.}/gpu_day.jsonl"
slower=1
if [ "${1:-}" = --toy ]; then slower=5; fi

run() { # part, seconds
    if [ -n "${PARTS:-}" ] && [ "$1" != data ] && [[ " $PARTS " != *" $1 "* ]]; then return; fi
    echo "== $1 (at most $2 s)" >&2
    timeout --kill-after 5 "$(($2 * slower))" "$python" benchmarks/gpu_day.py "$1" --out "$out" "${@:3}"
    local code=$?
    [ $code -eq 0 ] || echo "{\"part\": \"$1\", \"failed\": $code}" | tee -a "$out"
}

run data 60 "$@"         # photographs, records, shards; what the parts below read
run resume 100 "$@"      # torchrun, kill -9, resume: losses beside an undisturbed run's; bf16 beside fp32
run train 110 "$@"       # train.py on real shards: MFU, wait, seconds to the first step; FSDP of one, autocast
run memory 100 "$@"      # peak and step time at the 12B's widths beside the plan
run qwen 45 "$@"         # a Qwen3-VL-4B's step: tokens/s, MFU, waits counted
run loader 35 "$@"       # samples/s with 1, 4 and 14 workers
run trainer 75 "$@"      # Hugging Face's Trainer on the same samples
run answers 30 "$@"      # evaluate.py: generation on the device
