#!/usr/bin/env bash
# Renews launch/constraints.txt: installs the newest versions that pyproject.toml allows into a
# temporary environment and records them. Run launch/test.sh afterwards, then commit.
#
#   launch/freeze.sh [python]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${1:-python3}" -m venv "$folder/env"
unset CONDA_PREFIX
source "$folder/env/bin/activate"
DIFFEMBED_LATEST=1 source launch/install.sh
{
  echo "# Versions that the test-suite passed with, for CPUs and GPUs: torch brings its own CUDA"
  echo "# packages. Written by launch/freeze.sh; certificates and pip are left to the system."
  # 2.13.0+cpu is the CPU build of 2.13.0; a constraint without the suffix allows both.
  python -m pip freeze --exclude diffembed --exclude certifi | sed 's/+cpu$//'
} >launch/constraints.txt
git --no-pager diff --stat -- launch/constraints.txt
