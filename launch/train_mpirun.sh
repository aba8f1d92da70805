#!/usr/bin/env bash
# Trains with mpirun: on this machine, or on the machines of a hostfile.
#   launch/train_mpirun.sh CONFIG [--deepspeed JSON] [key=value ...]
#
#   RANKS     total number of ranks (default: one per GPU of this machine, or one per slot of the hostfile)
#   HOSTFILE  machines to train on (see launch/hostfile.example)
#
# On SIGINT, SIGTERM or SIGUSR1 it saves a checkpoint and exits with 75; on a second signal it ends at
# once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh

flags=()
if [[ -n ${HOSTFILE:-} ]]; then
  flags+=(--hostfile "$HOSTFILE")
  first=$(grep --max-count=1 --only-matching '^[^# ]\+' "$HOSTFILE")
  # Ranks on other machines must find the first machine on the same network, and use the same
  # environment.
  flags+=(-x "MASTER_ADDR=$first" -x PATH)
  for name in $(compgen -e | grep -E '^(MASTER_PORT|(NCCL|GLOO|TORCH|OMP|HF|DS)_|PYTHON)'); do
    flags+=(-x "$name")
  done
else
  gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
  RANKS=${RANKS:-$((gpus > 0 ? gpus : 1))}
  # Works with fewer cores than ranks.
  flags+=(--oversubscribe)
fi
if [[ -n ${RANKS:-} ]]; then
  flags+=(-n "$RANKS")
fi

# Open MPI 5 kills the ranks a quarter of a second after SIGTERM, even in the middle of a save. It only
# forwards SIGUSR1.
stop() {
  kill -"$signal" "$mpirun"
  signal=TERM
}
signal=USR1
# A separate process group, which does not get Ctrl-C.
set -m
# Without --bind-to none, all threads of a rank would share one core.
mpirun "${flags[@]}" --bind-to none \
  python pipeline/train.py --deepspeed ds_configs/zero3.json "$@" </dev/null &
mpirun=$!
trap stop HUP INT TERM USR1
# The trap ends `wait` early.
while kill -0 $mpirun 2>/dev/null; do
  wait $mpirun || true
done
wait $mpirun
