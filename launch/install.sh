# shellcheck shell=bash
# Sourced by the scripts in this folder. Afterwards `python` is one that has this package, editable and
# with its test tools, in the active environment, or in .venv if none is active. Does nothing if the
# same pyproject.toml and constraints.txt were installed before.
#
#   DIFFEMBED_LATEST=1  install the newest versions that pyproject.toml allows instead of the tested
#                       ones of launch/constraints.txt
#   DIFFEMBED_TORCH     arguments of pip that install another torch, for example
#                       "torch==2.11.0 --index-url URL-OF-YOUR-CUDA-BUILDS"

_new_enough='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'

# Print the name of a Python that is new enough, the default one first.
find_python() {
  local name
  for name in python3 python3.13 python3.12 python3.11; do
    if "$name" -c "$_new_enough" 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "found $(python3 --version 2>&1 || true) | allowed: Python 3.11 or newer with venv" \
    "| fix: one of \`apt-get install python3-venv\` (Debian 12, Ubuntu 24.04 or newer)," \
    "\`uv venv --seed --python 3.12 .venv\`, or \`conda create -n embed python=3.12\` and" \
    "\`conda activate embed\`; then run the same command again" >&2
  return 2
}

install_project() {
  local root stamp wanted python
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} ]]; then
    if [[ ! -f $root/.venv/bin/activate ]]; then
      python=$(find_python) || exit 2
      echo "making $root/.venv"
      "$python" -m venv "$root/.venv"
    fi
    # shellcheck source=/dev/null
    source "$root/.venv/bin/activate"
  fi
  if ! python -c "$_new_enough"; then
    echo "found $(python --version 2>&1) in ${VIRTUAL_ENV:-$CONDA_PREFIX} | allowed: Python 3.11 or" \
      "newer | fix: activate another environment, or none" >&2
    exit 2
  fi
  # Run the code of this checkout, even if the environment was made for another one.
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
  # Container images often forbid Python to keep compiled modules. Nothing is compiled on installation,
  # so every process would then compile torch and transformers again: 40 s of CPU per start, not 13.
  unset PYTHONDONTWRITEBYTECODE
  stamp=$(python -c 'import sys; print(sys.prefix)')/.diffembed-installed
  wanted=$({
    cat "$root/pyproject.toml"
    tested_versions
  } | sha256sum)
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    return
  fi
  echo "installing this project and its dependencies (a few minutes the first time)"
  # --no-compile: Python compiles the few modules that it imports, and the installation takes a third
  # of the time.
  local install=(python -m pip install --quiet --no-compile --disable-pip-version-check)
  # Keep a torch that matches this machine's driver: an installed one, or the one of DIFFEMBED_TORCH.
  local left_out='^torch=='
  if [[ -n ${DIFFEMBED_TORCH:-} ]]; then
    # shellcheck disable=SC2086 # several arguments
    "${install[@]}" $DIFFEMBED_TORCH
  elif ! python -c 'import torch' 2>/dev/null; then
    left_out='^$'
  fi
  "${install[@]}" --constraint <(tested_versions | grep -v "$left_out") --editable "$root[dev]"
  printf '%s' "$wanted" >"$stamp"
}

# Print the lines of launch/constraints.txt, or none for DIFFEMBED_LATEST=1.
tested_versions() {
  if [[ ${DIFFEMBED_LATEST:-0} != 1 ]]; then
    cat "$(dirname "${BASH_SOURCE[0]}")/constraints.txt"
  fi
}

install_project
