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
# shellcheck source=launch/minilm.sh
source "$(dirname "$0")/minilm.sh"

make_shards

say "3. Hard negatives: documents that the untouched model scores nearly as high as the answer"
run diffembed mine "$recipe/mine.yaml"

say "4. Training: every weight, two ranks"
run "${two_ranks[@]}" pipeline/train.py "$recipe/train.yaml" \
  --deepspeed ds_configs/zero2.json "$@"
run diffembed export "$recipe/train.yaml" "$@"

say "5. Before and after"
run diffembed evaluate run "$recipe/evaluate.yaml"
run diffembed report "$recipe/evaluate.yaml"
