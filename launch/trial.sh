# shellcheck shell=bash
# Sourced by the scripts in this folder that run an experiment on one machine with two ranks:
# installs if needed, and configures the commands to run without a network.
source launch/install.sh

# As many processes as cores: more threads would only wait for each other.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# Two ranks need two GPUs; with fewer, both run on the CPU.
if (($(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') < 2)); then
  export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
fi
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }
