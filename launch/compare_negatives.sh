#!/usr/bin/env bash
# Compare hard negatives: all-MiniLM-L6-v2 is trained as in finetune_minilm.sh, with negatives by
# words (BM25), mined ones, mined ones below a margin, and with a teacher that masks false negatives
# or is distilled. Each model is scored on concepts that are not in the training data.
#
#   launch/compare_negatives.sh GENERATIONS|synthesis [teacher=FOLDER] [key=value ...]
#
# GENERATIONS is as for finetune_minilm.sh. FOLDER is a sentence-transformers model, or its name in
# the local cache; without it, the last two trainings are left out. The other arguments change all
# trainings. Run it again to continue. Results: runs/minilm/negatives/report/report.md
set -euo pipefail
teacher=
changes=()
for word in "${@:2}"; do
  if [[ $word == teacher=* ]]; then teacher=${word#teacher=}; else changes+=("$word"); fi
done
# Resolved here, because the next file changes to the checkout.
if [[ -d $teacher ]]; then teacher=$(cd "$teacher" && pwd); fi
# shellcheck source=launch/minilm.sh
source "$(dirname "$0")/minilm.sh"
out=runs/minilm/negatives
trainer=("${two_ranks[@]}" pipeline/train.py --deepspeed ds_configs/zero2.json)
make_shards

# Mined shards: mine NAME [key=value ...]
mine() {
  run diffembed mine "$recipe/mine.yaml" output="$out/data/$1" "${@:2}"
}
# A model trained with them: compare NAME DATA [key=value ...]
compare() {
  models+=("$1")
  train "$1" "$recipe/train.yaml" data.path="$2" "${@:3}"
}

say "3. Hard negatives"
mine mined 'margin={}'
mine margin
if [[ -n $teacher ]]; then
  # The shards' texts are cut at 96 tokens too.
  mine taught \
    "teacher={kind: bi_encoder, path: $teacher, vectors: true, max_length: 96}"
fi

say "4. Training: every weight, two ranks"
models=()
compare bm25 runs/minilm/shards
compare mined $out/data/mined
compare margin $out/data/margin
if [[ -n $teacher ]]; then
  compare guide $out/data/taught 'loss.guide={margin: 0.05, margin_strategy: relative}'
  compare distilled $out/data/taught \
    'loss.distillation={documents: batch, weight: 0.5, temperature: 0.05}'
fi

say "5. Scores"
entries="{name: untouched, path: runs/minilm/model}"
for name in "${models[@]}"; do entries+=", {name: $name, path: $out/$name/export}"; done
evaluation=("$recipe/evaluate.yaml" "output_dir=$out" training_run=null "models=[$entries]")
run diffembed evaluate run "${evaluation[@]}"
run diffembed report "${evaluation[@]}"
python - $out/report/report.json <<'PYTHON'
import json, sys

report = json.load(open(sys.argv[1]))
task = report["tasks"][0]
gains = {pair["model"]: pair for pair in task["pairs"] if pair["minus"] == "bm25"}
print(f"\n| {task['num_queries']} queries | {task['metric']} | gain over bm25, 95 % interval |")
print("|---|---|---|")
for name in report["models"]:
    gain = ""
    if pair := gains.get(name):
        gain = "{difference:+.4f} [{ci_low:+.4f}, {ci_high:+.4f}]".format(**pair)
    print(f"| {name} | {task[name]:.4f} | {gain} |")
PYTHON
