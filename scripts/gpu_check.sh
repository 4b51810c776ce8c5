#!/usr/bin/env bash
# Checks the package on one GPU, in under eight minutes and without a network, from the root:
#   scripts/gpu_check.sh            attention, a step of the 1.3B model against diffusers, the demo: one table
#   scripts/gpu_check.sh --small    the same of a small network, for a CPU
# diffusers' rows need torch and diffusers (requirements-dev.txt).
set -euo pipefail
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
exec python scripts/gpu_check.py "$@"
