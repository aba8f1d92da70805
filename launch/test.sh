#!/usr/bin/env bash
# Installs if needed, then runs every check: style, types, tests.
#   launch/test.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh

# Some tests start a real Slurm, two hosts in network namespaces, or bubblewrap. Without the programs
# for that they are skipped.
lacks() {
  ! PATH=$PATH:/usr/sbin command -v "$1" >/dev/null
}
if { lacks slurmctld || lacks munged || lacks pdsh || lacks ip || lacks bwrap; } &&
  [[ $EUID == 0 ]] && ! lacks apt-get; then
  echo "installing Slurm, pdsh, ip and bubblewrap for the tests"
  if ! (apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes \
    --no-install-recommends slurm-wlm munge pdsh iproute2 bubblewrap) >/dev/null 2>&1; then
    echo "they could not be installed: the tests that need them will be skipped" >&2
  fi
fi

# All tests except the ones in tests/gpu compare results of the CPU.
if [[ $* != *tests/gpu* ]]; then
  export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
fi

# The first time in a checkout, compile what the tests import while mypy has the other core. The
# workers of pytest would each compile all of it at once.
if [[ ! -d tests/__pycache__ ]]; then
  (python -m tests.forks && python -m pytest --collect-only --quiet) &>/dev/null &
fi

set -x
ruff check .
ruff format --check .
mypy
wait
# Four files at a time, because tests often wait for processes that they start, and long files first
# (-n 0: one by one).
python -m pytest -n 4 --dist loadfile --no-loadscope-reorder "$@"
