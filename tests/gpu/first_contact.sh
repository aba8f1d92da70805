#!/usr/bin/env bash
# All that a first GPU has to show, in at most ten minutes on one with 80 GB:
#
#   tests/gpu/first_contact.sh wheels         where pip works: fills .whl with the few packages that
#                                             a machine with torch and transformers may lack
#   tests/gpu/first_contact.sh [PART...]      on the GPU machine; installs .whl if it is there
#   tests/gpu/first_contact.sh --tiny         the same code on a CPU, in a minute
#
# Each part is a process with its own time limit. Results go to $OUT, by default
# first-contact/: results.json, results.md (a table for tests/benchmarks/RESULTS.md) and log.txt. The
# exit code is 1 if a part failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ ${1:-} == wheels ]]; then
  mkdir -p .whl
  pinned() { python3 -m pip show "$1" 2>/dev/null | sed -n 's/^Version: //p'; }
  platforms=()
  for glibc in 2_28 2_27 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
  for name in pydantic pydantic-core annotated-types typing-inspection hjson rapidfuzz; do
    python3 -m pip download -q --no-deps --only-binary=:all: --implementation cp \
      --python-version "${PYTHON_THERE:-3.12}" "${platforms[@]}" --platform manylinux2014_x86_64 \
      -d .whl "$name==$(pinned "$name")"
  done
  # Published as source only; building needs neither a GPU nor a compiler.
  DS_BUILD_OPS=0 python3 -m pip wheel -q --no-deps --no-build-isolation -w .whl \
    "deepspeed==$(pinned deepspeed)"
  du -sh .whl
  exit
fi

if compgen -G '.whl/*.whl' >/dev/null && ! python3 -c 'import deepspeed' 2>/dev/null; then
  site=$(mktemp -d)
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl
  export PYTHONPATH=$site:${PYTHONPATH:-}
fi
export PYTHONPATH=$PWD:${PYTHONPATH:-} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
exec python3 -m tests.gpu.first_contact "$@"
