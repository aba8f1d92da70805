#!/usr/bin/env bash
# The whole journey on this machine: raw data -> shards -> training with ZeRO-3 and gradient
# caching on two ranks, killed and resumed -> export -> FollowIR, LongEmbed and BRIGHT replicas ->
# report. No GPU needed, no network except for the installation. The commands are the same on a
# cluster, and each is shown before it runs. Results: runs/quickstart/report/report.md
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/trial.sh

recipe=launch/recipes/quickstart
out=runs/quickstart

rm -rf "$out"
mkdir -p "$out"
SECONDS=0

say "1. Data: problems with verified solutions, made on this machine"
run python -m ReasonAug templates --out $out/data

say "2. Model: a small Dream-architecture starter and its tokenizer"
run diffembed starter $recipe/model.yaml

say "3. Shards: tokenised Arrow files, built by two MPI ranks"
run mpirun -n 2 --allow-run-as-root --oversubscribe diffembed prepare $recipe/data.yaml

trainer=(pipeline/train.py $recipe/train.yaml --deepspeed ds_configs/zero3.json)
train=("${two_ranks[@]}" "${trainer[@]}")
say "4. Training: ZeRO-3 on two ranks, 256 queries per step in cached chunks"
run python "${trainer[@]}" --dry-run --world-size 2
printf '$ %s &\n' "${train[*]}"
setsid "${train[@]}" &
job=$!
trap 'kill -9 -- -$job 2>/dev/null || true' EXIT
# Step 30 is ten steps after the checkpoint of step 20: ten steps are lost and run again.
while kill -0 $job 2>/dev/null && (($(wc -l 2>/dev/null <$out/run/metrics.jsonl || echo 0) < 30)); do
  sleep 0.2
done
say "4b. Interrupted on purpose: every process of the job is killed, then the same command resumes"
run kill -9 -- -$job
wait $job 2>/dev/null || true
trap - EXIT
run "${train[@]}"

say "5. Export: folders that sentence-transformers loads without this package"
run diffembed export $recipe/train.yaml --checkpoint init --output $out/export-untrained
run diffembed export $recipe/train.yaml

say "6. Evaluation: unmodified mteb tasks on local replicas of FollowIR, LongEmbed and BRIGHT"
run python -m ReasonAug replicas --data $out/data --out $out/hub
run diffembed evaluate run $recipe/evaluate.yaml

say "7. Report"
run diffembed report $recipe/evaluate.yaml
printf '\nDone in %d min %02d s after installation.\n' $((SECONDS / 60)) $((SECONDS % 60))
