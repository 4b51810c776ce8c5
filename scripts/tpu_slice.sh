#!/usr/bin/env bash
# One video on all hosts of a TPU slice (such as a v6e-16: four hosts of four chips), started from your own machine.
# Every host needs the repository at ~/maxdiffusion with '.[tpu,gcs]' installed, and read access to the bucket:
#   TPU_NAME=slice ZONE=us-east5-b BUCKET=gs://mine scripts/tpu_slice.sh prompt="a cat walks through wet grass"
set -euo pipefail

words=(
  jax_distributed=on                      # the hosts find each other by the slice's metadata, or say that they cannot
  initialization_timeout=600              # seconds; ssh starts the hosts one after another
  attention=ulysses_ring                  # the video's tokens over all chips
  ulysses_shards=4                        # all-to-alls within each host's chips,
  ici_context_parallelism=-1              # a ring over the hosts: all chips that the data axis leaves
  ici_data_parallelism=2                  # one half of the hosts makes the prompt's branch, the other the negative's,
  guidance_mode=batched                   # in one batch of two
  logical_axis_rules='[[embed, context]]' # weights spread over the chips; each host reads its part alone
  jax_cache_dir="$BUCKET/xla"             # process 0 keeps the programs there, all read them
  output_dir="$BUCKET/outputs"            # written by process 0 alone
)
command="cd ~/maxdiffusion && export TPU_LOG_DIR=disabled && until python generate_wan.py"
command+="$(printf ' %q' "${CONFIG:-configs/wan2.1_t2v_14b.yml}" "${words[@]}" "$@")"
command+="; do code=\$?; [ \$code -eq 75 ] || exit \$code; done" # 75: stopped by SIGTERM; the same command goes on
exec gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all --command="$command"
