#!/usr/bin/env bash
# Trains with the deepspeed launcher: on this machine, or on the machines of a hostfile (needs pdsh).
#   launch/train_deepspeed.sh CONFIG [--deepspeed JSON] [key=value ...]
#
#   RANKS     ranks on this machine (default: one per GPU)
#   HOSTFILE  machines to train on (see launch/hostfile.example)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh

flags=()
if [[ -n ${HOSTFILE:-} ]]; then
  flags+=(--hostfile "$HOSTFILE" --force_multi)
elif [[ -n ${RANKS:-} ]]; then
  flags+=(--num_accelerators "$RANKS")
fi
exec deepspeed "${flags[@]}" pipeline/train.py --deepspeed ds_configs/zero3.json "$@"
