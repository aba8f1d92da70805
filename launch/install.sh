# shellcheck shell=bash
# Sourced by the scripts beside it: afterwards `python` is one that has diffembed, editable and with
# its test tools, in the active environment, or in .venv where none is active. Does nothing when
# that was done before and pyproject.toml has not changed since.
#
#   DIFFEMBED_TORCH  what to install where there is no torch (default: torch==2.13.0), as arguments
#                    of pip, for example "torch==2.9.1 --index-url URL-OF-YOUR-CUDA-BUILDS"

require_python() {
  if python3 -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    return
  fi
  echo "found $(python3 --version 2>&1 || true) | allowed: Python 3.10 or newer with venv" \
    "(Debian: apt-get install python3-venv) | fix: install it, or activate an environment" >&2
  exit 2
}

install_project() {
  local root stamp wanted
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} ]]; then
    if [[ ! -f $root/.venv/bin/activate ]]; then
      require_python
      echo "making $root/.venv"
      python3 -m venv "$root/.venv"
    fi
    # shellcheck source=/dev/null
    source "$root/.venv/bin/activate"
  fi
  stamp=$(python -c 'import sys; print(sys.prefix)')/.diffembed-installed
  wanted=$(sha256sum <"$root/pyproject.toml")
  # The code of this checkout runs, also where the environment was made for another one.
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    return
  fi
  echo "installing this project and what it needs (a few minutes the first time)"
  # --no-compile: Python compiles what it imports, which is a small part of what is installed; that
  # makes the installation three times as fast.
  local install=(python -m pip install --quiet --no-compile --disable-pip-version-check)
  # Before the rest, or pip would take the newest torch, whatever this machine can use.
  if ! python -c 'import torch' 2>/dev/null; then
    # shellcheck disable=SC2086 # several arguments
    "${install[@]}" ${DIFFEMBED_TORCH:-torch==2.13.0}
  fi
  "${install[@]}" --editable "$root[dev]"
  printf '%s' "$wanted" >"$stamp"
}

install_project
