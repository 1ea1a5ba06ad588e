#!/usr/bin/env bash
# From raw conversations and pictures to a model that answers questions about pictures, on two CPU cores.
#
#   corpora -> tokenizer -> shards -> inspect -> train -> evaluate -> ask
#
# Every line shown after "$" is the command that runs, just as a user would type it. Running the demo again
# starts from nothing again; it only touches data/demo and runs/demo.
set -euo pipefail
cd "$(dirname "$0")/../.."
export TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() {
  printf '\033[36m$ %s\033[0m\n' "$(printf '%q ' "$@" | sed 's/ $//')"
  "$@"
}

SECONDS=0
rm -rf data/demo runs/demo
corpus=data/demo/corpus
mistral=$(python -c 'import pathlib, mistral_common as m; print(pathlib.Path(m.__file__).parent / "data/tokenizer.model.v1")')
build=(--tokenizer data/demo/tokenizer --num-query 16 --image-size 64 --quiet)

say "1. Write two corpora: photographs with conversations (LLaVA JSON), drawn shapes (chat JSONL)"
run python pipelines/demo/photos.py --out $corpus/photos
run python pipelines/demo/shapes.py --out $corpus/shapes

say "2. Build shards, with the Mistral tokenizer"
cp "$mistral" data/demo/tokenizer.model
run omnidata prepare-tokenizer data/demo/tokenizer.model --out data/demo/tokenizer --chat-template zephyr
run omnidata build-shards $corpus/photos/photos.json --image-root $corpus/photos --out data/demo/photos "${build[@]}"
run omnidata build-shards $corpus/shapes/train.jsonl --image-root $corpus/shapes --out data/demo/shapes --split val=0.01 "${build[@]}"
run omnidata build-shards $corpus/shapes/heldout.jsonl --image-root $corpus/shapes --out data/demo/heldout "${build[@]}"

say "3. Look at what the model will learn from (supervised tokens are marked)"
run omnidata inspect data/demo/photos --limit 1
run omnidata inspect data/demo/shapes --limit 2

say "4. Train a tiny OmniLMM from random weights"
run python pipelines/train.py pipelines/recipes/tiny_cpu.yaml

say "5. Answers about held-out pictures, and about the wrong pictures"
run python pipelines/evaluate.py --model runs/demo/final --data data/demo/heldout --swap-images --out runs/demo/eval.json
python - runs/demo/eval.json $corpus/shapes/summary.json <<'PY'
import json, sys
result, corpus = (json.load(open(path)) for path in sys.argv[1:])
print(f"{result['num_questions']} questions about {corpus['heldout_pictures']} held-out pictures, "
      f"{corpus['pictures_in_both']} of them seen in training:")
print(f"  exact answers {result['accuracy']:.1%}; with every picture swapped {result['accuracy_swapped']:.1%}; "
      f"chance {corpus['chance']:.1%}")
PY

say "6. Ask it"
run python pipelines/generate.py --model runs/demo/final --greedy --questions $corpus/shapes/questions.jsonl

say "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s. Datasets are in data/demo, the run is in runs/demo."
