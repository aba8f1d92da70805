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
# Any free port: DeepSpeed's default, 29500, is taken while another run trains on this machine.
_free_port='import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])'
# shellcheck disable=SC2034 # for the scripts
two_ranks=(deepspeed --num_accelerators 2 --master_port "$(python -c "$_free_port")")

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }

# One training and its export, unless it exists: train NAME CONFIG [key=value ...]
# The script sets `out`, the command `trainer`, and `changes`, which hold for all its trainings.
# shellcheck disable=SC2154 # of the script
train() {
  local name=$1 config=$2
  shift 2
  if [[ -f $out/$name/export/modules.json ]]; then
    echo "$name: finished before, skipped"
    return
  fi
  echo "$name: started, see $out/$name.log"
  local settings=("output_dir=$out/$name" "$@" ${changes[@]+"${changes[@]}"})
  {
    "${trainer[@]}" "$config" "${settings[@]}" &&
      diffembed export "$config" "${settings[@]}"
  } >"$out/$name.log" 2>&1 || {
    echo "$name failed; the end of $out/$name.log:" >&2
    tail -n 5 "$out/$name.log" >&2
    return 1
  }
  echo "$name: $(grep -o 'loss [0-9.]*' "$out/$name.log" | tail -n 1)"
}
