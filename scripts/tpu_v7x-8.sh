#!/usr/bin/env bash
# WAN 2.1 14B at 720p on a TPU7x-8: four chips of two cores (each a device of 95 GB), one host. Run it on the TPU VM,
# from the root:
#   pip install '.[tpu]' && scripts/tpu_v7x-8.sh prompt="a cat walks through wet grass at sunrise"
set -euo pipefail

words=(
  attention=ulysses_ring    # the video's tokens over the devices of one branch:
  ulysses_shards=2          # all-to-alls between the two cores of a chip,
  ici_context_parallelism=4 # a ring over two chips; the weights are whole on every device
  ici_data_parallelism=2    # one half of the chips makes the prompt's branch, the other the negative prompt's,
  guidance_mode=batched     # in one batch of two
)
export TPU_LOG_DIR=disabled # libtpu's own log files, which nobody reads
until python generate_wan.py "${CONFIG:-configs/wan2.1_t2v_14b.yml}" "${words[@]}" "$@"; do
  code=$?
  [ $code -eq 75 ] || exit $code # 75: stopped by SIGTERM; the same command goes on
done
