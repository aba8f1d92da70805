#!/usr/bin/env bash
# The paper's comparison in miniature: from one corpus, two language models of one size, by masked
# diffusion and by predicting the next token; each becomes an embedder with bidirectional and with
# causal attention, and so do random weights. Scored on concepts and documents that are not in any
# training data, most of them far longer than the documents of training.
#
#   launch/miniature.sh [key=value ...]
#
# No GPU needed, no network except for the installation. Arguments change all trainings (`seed=2` for
# another repetition, which needs another folder: move runs/miniature away first). Run it again to
# continue. Results: runs/miniature/report/report.md; launch/recipes/miniature/README.md explains them
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/trial.sh

recipe=launch/recipes/miniature
out=runs/miniature
changes=("$@")
trainer=(python pipeline/train.py --deepspeed ds_configs/zero1.json)

# An embedder: embed START MODEL ATTENTION
embed() {
  # The last token is the only one of a causal model that has seen the whole text.
  local pooling=mean
  [[ $3 == causal ]] && pooling=last_token
  train "$1-$3" $recipe/train.yaml model.path="$2" model.attention="$3" model.pooling=$pooling
}

# Run two commands at once, each on a core, which is faster than two ranks of one training that wait
# for each other: side_by_side "COMMAND ARGUMENTS" "COMMAND ARGUMENTS"
side_by_side() {
  local first second failed=0
  $1 &
  first=$!
  $2 &
  second=$!
  wait $first || failed=1
  wait $second || failed=1
  return $failed
}

mkdir -p "$out"
SECONDS=0

say "1. Data: problems of 54 concepts, ten of them held out from all training"
if [[ ! -f $out/hub/mteb/BRIGHT/README.md ]]; then
  run python -m ReasonAug templates --out $out/data --problems-per-concept 128
  run python -m ReasonAug texts --data $out/data
  run python -m ReasonAug replicas --data $out/data --out $out/hub --max-tokens 2048 \
    --divide-lengths 16 --long-queries 40
fi
[[ -f $out/start/config.json ]] || run diffembed starter $recipe/model.yaml
run diffembed prepare $recipe/texts.yaml
# Random weights as an export too: all embedders start from folders with one tokenizer.
[[ -f $out/random/export/modules.json ]] ||
  run diffembed export $recipe/autoregressive.yaml --checkpoint init --output $out/random/export
run diffembed prepare $recipe/data.yaml

say "2. Pre-training from the same random weights on the same texts"
side_by_side "train diffusion $recipe/diffusion.yaml" \
  "train autoregressive $recipe/autoregressive.yaml"

say "3. Embedders: each model with both kinds of attention"
side_by_side "embed diffusion $out/diffusion/export bidirectional" \
  "embed autoregressive $out/autoregressive/export causal"
side_by_side "embed diffusion $out/diffusion/export causal" \
  "embed autoregressive $out/autoregressive/export bidirectional"
side_by_side "embed random $out/random/export bidirectional" \
  "embed random $out/random/export causal"

say "4. Scores on concepts and documents outside the training, and the report"
run diffembed evaluate run $recipe/evaluate.yaml
run diffembed report $recipe/evaluate.yaml
printf '\nDone in %d min %02d s after installation.\n' $((SECONDS / 60)) $((SECONDS % 60))
