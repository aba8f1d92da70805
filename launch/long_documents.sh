#!/usr/bin/env bash
# Long documents: a small model learns to find what a document of up to 1,024 words hides once, and
# is scored on needles and passkeys in documents of up to 8,192, before and after. No GPU needed, no
# network except for the installation. Training shares no hidden text and no question with the scored
# documents, and words a passkey differently; needles are problems of concepts outside the training.
# Both use the same templates of the background, and the names of the other concepts as topics.
#
#   launch/long_documents.sh [key=value ...]
#
# Arguments change the training. Results: runs/long_documents/report/report.md
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/trial.sh

recipe=launch/recipes/long_documents
out=runs/long_documents

rm -rf "$out"
mkdir -p "$out"
SECONDS=0

say "1. Data: problems, training rows with long documents, and replicas of LongEmbed"
run python -m ReasonAug templates --out $out/data
run python -m ReasonAug long --data $out/data --rows 8192 --max-tokens 1024
run python -m ReasonAug replicas --data $out/data --out $out/hub --max-tokens 8192 \
  --divide-lengths 4 --long-queries 20

say "2. Model and shards"
run diffembed starter $recipe/model.yaml
run diffembed prepare $recipe/data.yaml

say "3. Training: whole documents, one layer at a time, two ranks"
run "${two_ranks[@]}" pipeline/train.py $recipe/train.yaml \
  --deepspeed ds_configs/zero3.json "$@"
run diffembed export $recipe/train.yaml "$@" --checkpoint init --output $out/export-untrained
run diffembed export $recipe/train.yaml "$@"

say "4. Before and after"
# One model and task per element of the array; two run at a time, one on each core.
for pair in "0 1" "2 3"; do
  for index in $pair; do
    run diffembed evaluate run $recipe/evaluate.yaml --index "$index" &
  done
  wait
done
run diffembed report $recipe/evaluate.yaml
printf '\nDone in %d min %02d s after installation.\n' $((SECONDS / 60)) $((SECONDS % 60))
