#!/usr/bin/env bash
# Installs if needed, then runs every check: style, types, tests.
#   launch/test.sh [arguments of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh

# Some tests bring up a real Slurm of their own. Without its programs they skip and say so.
lacks() {
  ! PATH=$PATH:/usr/sbin command -v "$1" >/dev/null
}
if { lacks slurmctld || lacks munged; } && [[ $EUID == 0 ]] && ! lacks apt-get; then
  echo "installing Slurm for the tests"
  if ! (apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes \
    --no-install-recommends slurm-wlm munge) >/dev/null 2>&1; then
    echo "Slurm could not be installed: its tests will be skipped" >&2
  fi
fi

set -x
ruff check .
ruff format --check .
mypy
python -m pytest "$@"
