#!/usr/bin/env bash
# WAN 2.1 14B at 720p on a v6e-8: eight chips of 32 GB, one host. Run it on the TPU VM, from the root:
#   pip install '.[tpu]' && scripts/tpu_v6e-8.sh prompt="a cat walks through wet grass at sunrise"
set -euo pipefail

words=(
  attention=ulysses_ring                  # the video's tokens over the chips of one branch
  ulysses_shards=4                        # of 40 heads each chip takes 10; no ring
  ici_context_parallelism=4               # four chips for each branch
  ici_data_parallelism=2                  # one half of the chips makes the prompt's branch, the other the negative's,
  guidance_mode=batched                   # in one batch of two: the fastest split of `plan=v6e-8`
  logical_axis_rules='[[embed, context]]' # each half spreads its 28 GB of weights, gathered layer by layer
)
export TPU_LOG_DIR=disabled # libtpu's own log files, which nobody reads
until python generate_wan.py "${CONFIG:-configs/wan2.1_t2v_14b.yml}" "${words[@]}" "$@"; do
  code=$?
  [ $code -eq 75 ] || exit $code # 75: stopped by SIGTERM; the same command goes on
done
