#!/usr/bin/env bash
# A first hour on a GPU in one command of nine minutes: what only a GPU can prove, most important first.
#
#   bash benchmarks/gpu_day.sh                   on a CUDA device
#   bash benchmarks/gpu_day.sh --toy             the same code at toy sizes on the CPU, to run every line once
#
# Nothing need be installed but torch: packages that are not there may lie as wheels in wheels/, which is
# unpacked; of what is missing it says how to fetch it where there is a network.
#
# Every part has its own time limit; a part that fails or runs out of time does not stop the next. Figures are
# appended to $OUT/gpu_day.jsonl (default: here), a line per measurement as soon as there is one ("so_far") and
# one per part at its end, so an interrupted run still tells. PARTS="shards qwen" runs only these.
set -u
cd "$(dirname "$0")/.."
export GPU_DAY_FOLDER="${GPU_DAY_FOLDER:-$(mktemp -d)}"
export PYTHONPATH="$PWD:$GPU_DAY_FOLDER/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
python="${PYTHON:-python3}"
out="${OUT:-.}/gpu_day.jsonl"
slower=1
if [ "${1:-}" = --toy ]; then slower=5; fi
for wheel in wheels/*.whl; do
    [ -e "$wheel" ] && "$python" -m zipfile -e "$wheel" "$GPU_DAY_FOLDER/site"
done

run() { # part, seconds
    if [ -n "${PARTS:-}" ] && [[ " data $PARTS " != *" $1 "* ]]; then return; fi
    echo "== $1 (at most $2 s)" >&2
    timeout --kill-after 5 "$(($2 * slower))" "$python" benchmarks/gpu_day.py "$1" --out "$out" "${@:3}"
    local code=$?
    [ $code -eq 0 ] || echo "{\"part\": \"$1\", \"failed\": $code}" | tee -a "$out"
}

"$python" benchmarks/gpu_day_needs.py || exit 1
run data 45 "$@"     # photographs, records, shards of both kinds; what the parts below read
run resume 100 "$@"   # torchrun, kill -9, resume: losses beside an undisturbed run's; bf16 beside fp32
run memory 95 "$@"   # peak and step time at the 12B's widths beside the rehearsal
run shards 140 "$@"  # train.py on real shards: MFU and wait, 12B's widths and a Qwen3-VL-4B
run trainer 60 "$@"  # Hugging Face's Trainer on the same samples, at equal loss
run loader 20 "$@"   # samples/s with 1, 4 and all workers
run answers 30 "$@"  # generate.py and evaluate.py on the device
run qwen 40 "$@"     # a Qwen3-VL-4B's step on random data: tokens/s, memory, waits counted
