#!/usr/bin/env bash
# Trains with mpirun: on this machine, or on those of a hostfile.
#   launch/train_mpirun.sh CONFIG [--deepspeed JSON] [key=value ...]
#
#   RANKS     ranks in all (default: one per GPU of this machine, or one per slot of the hostfile)
#   HOSTFILE  machines to train on (see launch/hostfile.example)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh

flags=()
if [[ -n ${HOSTFILE:-} ]]; then
  flags+=(--hostfile "$HOSTFILE")
  first=$(grep --max-count=1 --only-matching '^[^# ]\+' "$HOSTFILE")
  # Ranks on other machines must find the first one, and import from the same environment.
  flags+=(-x "MASTER_ADDR=$first" -x PATH)
else
  gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
  RANKS=${RANKS:-$((gpus > 0 ? gpus : 1))}
  # Also on a machine with fewer cores than ranks.
  flags+=(--oversubscribe)
fi
if [[ -n ${RANKS:-} ]]; then
  flags+=(-n "$RANKS")
fi
# A rank's threads would otherwise all be tied to one core.
exec mpirun "${flags[@]}" --bind-to none \
  python pipeline/train.py --deepspeed ds_configs/zero3.json "$@"
