#!/usr/bin/env bash
# WAN 2.1 1.3B on the GPUs of one host, from the root:
#   pip install '.[cuda13]' && scripts/gpu.sh prompt="a cat walks through wet grass at sunrise"
# Under SLURM, one process for each GPU of many hosts: srun --ntasks-per-node=8 --gpus-per-node=8 scripts/gpu.sh ...
set -euo pipefail

words=(
  attention=auto             # kernel and split by the devices that are there
  ici_context_parallelism=-1 # the video's tokens over all GPUs that the data axis leaves
)
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 # of the GPU's memory; jax takes 0.75 of it unless told
until python generate_wan.py "${CONFIG:-configs/wan2.1_t2v_1.3b.yml}" "${words[@]}" "$@"; do
  code=$?
  [ $code -eq 75 ] || exit $code # 75: stopped by SIGTERM; the same command goes on
done
