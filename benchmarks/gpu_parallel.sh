#!/usr/bin/env bash
# Run what only a GPU runs of the parallel layouts, in under 4 minutes and without a network: ./benchmarks/gpu_parallel.sh
#
#   PYTHON   interpreter with torch for CUDA, triton and pytest       default: python3
#
# One GPU is enough: attention on a prefix, and training steps of one rank through NCCL. More arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}"

if ! "$python" -c 'import pytest, torch; torch.cuda.get_device_name()' 2>/dev/null; then
    echo "$python: no pytest, or no torch that sees a GPU. Set PYTHON to an interpreter that has both, on a machine with a GPU." >&2
    exit 2
fi

# without the project's settings of pytest, which name plugins that such an interpreter need not have
timeout 240 "$python" -m pytest -c /dev/null --rootdir . -p no:cacheprovider -v -rs --durations=5 "$@" \
    tests/parallel/test_cuda.py
