#!/usr/bin/env bash
# Train a configuration to its end: ./run_train.sh [--config FILE] [--section.key=value ...]
# Environment: NPROC NNODES NODE_RANK RDZV_ENDPOINT MAX_RESTARTS LOG_RANK. Exit: 0 finished, 75 stopped (the same
# command goes on), 1 failed, 2 the configuration or its files are wrong. See docs/run.md.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"
setup_environment "$root" train
exec "$PYTHON" -m titan_yulan.cli train "$@"
