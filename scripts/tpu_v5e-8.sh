#!/usr/bin/env bash
# WAN 2.1 14B at 480p on a v5e-8 (v5litepod-8): eight chips of 16 GB, one host. Run it on the TPU VM, from the root:
#   pip install '.[tpu]' && scripts/tpu_v5e-8.sh prompt="a cat walks through wet grass at sunrise"
set -euo pipefail

words=(
  size=832*480                            # 720p has 2.3 times the tokens
  attention=ulysses_ring                  # the video's tokens over all chips
  ulysses_shards=8                        # of 40 heads each chip takes 5; no ring
  ici_context_parallelism=8               # all chips
  ici_data_parallelism=1                  # both branches of guidance on all chips,
  guidance_mode=two_pass                  # one after the other: half the activations
  logical_axis_rules='[[embed, context]]' # 28 GB of weights spread over the chips, gathered layer by layer
  vae_dtype=bfloat16                      # half the memory of decoding
)
export TPU_LOG_DIR=disabled # libtpu's own log files, which nobody reads
until python generate_wan.py "${CONFIG:-configs/wan2.1_t2v_14b.yml}" "${words[@]}" "$@"; do
  code=$?
  [ $code -eq 75 ] || exit $code # 75: stopped by SIGTERM; the same command goes on
done
