#!/usr/bin/env bash
# Trains with mpirun: on this machine, or on those of a hostfile.
#   launch/train_mpirun.sh CONFIG [--deepspeed JSON] [key=value ...]
#
#   RANKS     ranks in all (default: one per GPU of this machine, or one per slot of the hostfile)
#   HOSTFILE  machines to train on (see launch/hostfile.example)
#
# Asked to stop, by SIGINT, SIGTERM or SIGUSR1, it saves a checkpoint and exits with 75; asked again,
# it ends at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh

flags=()
if [[ -n ${HOSTFILE:-} ]]; then
  flags+=(--hostfile "$HOSTFILE")
  first=$(grep --max-count=1 --only-matching '^[^# ]\+' "$HOSTFILE")
  # Ranks on other machines must find the first one, by the same network, and import from the same
  # environment.
  flags+=(-x "MASTER_ADDR=$first" -x PATH)
  for name in $(compgen -e | grep -E '^(MASTER_PORT|(NCCL|GLOO|TORCH|OMP|HF|DS)_|PYTHON)'); do
    flags+=(-x "$name")
  done
else
  gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
  RANKS=${RANKS:-$((gpus > 0 ? gpus : 1))}
  # Also on a machine with fewer cores than ranks.
  flags+=(--oversubscribe)
fi
if [[ -n ${RANKS:-} ]]; then
  flags+=(-n "$RANKS")
fi

# Open MPI 5 kills the ranks a quarter of a second after it was told to end, whatever they are
# writing. SIGUSR1 it only hands on.
stop() {
  kill -"$signal" "$mpirun"
  signal=TERM
}
signal=USR1
# A process group of its own, or it would hear Ctrl-C as well.
set -m
# A rank's threads would otherwise all be tied to one core.
mpirun "${flags[@]}" --bind-to none \
  python pipeline/train.py --deepspeed ds_configs/zero3.json "$@" </dev/null &
mpirun=$!
trap stop HUP INT TERM USR1
# The trap ends `wait` early.
while kill -0 $mpirun 2>/dev/null; do
  wait $mpirun || true
done
wait $mpirun
