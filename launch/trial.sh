# shellcheck shell=bash
# Sourced by the scripts beside it that try something out on one machine: installs if needed, and
# prepares what follows to run there without a GPU and without a network.
source launch/install.sh

# As many processes as cores: more threads would only wait for each other.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# DeepSpeed looks for a GPU at every start and says so; tell it where there is none.
command -v nvidia-smi >/dev/null || export DS_ACCELERATOR=cpu
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }
