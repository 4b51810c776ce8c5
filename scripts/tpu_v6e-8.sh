#!/usr/bin/env bash
# WAN 2.1 14B at 720p on a v6e-8: eight chips of 32 GB, one host. Run it on the TPU VM, from the root:
#   pip install '.[tpu]' && scripts/tpu_v6e-8.sh prompt="a cat walks through wet grass at sunrise"
set -euo pipefail

words=(
  attention=ulysses_ring                  # the video's tokens over all chips
  ulysses_shards=8                        # of 40 heads each chip takes 5; all-to-alls over the 2x4 grid, no ring
  ici_context_parallelism=8               # all chips
  ici_data_parallelism=1                  # both branches of guidance on all chips,
  guidance_mode=two_pass                  # one after the other: half the activations
  logical_axis_rules='[[embed, context]]' # 28 GB of weights spread over the chips, gathered layer by layer
)
export TPU_LOG_DIR=disabled # libtpu's own log files, which nobody reads
exec python generate_wan.py "${CONFIG:-configs/wan2.1_t2v_14b.yml}" "${words[@]}" "$@"
