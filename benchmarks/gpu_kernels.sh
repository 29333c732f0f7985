#!/usr/bin/env bash
# Fill every table of the kernels on one GPU, in under 8 minutes and without a network: ./benchmarks/gpu_kernels.sh
#
#   PYTHON   interpreter with torch and triton                        default: python3
#   PEERS    folder of pure-Python wheels of peers (liger_kernel-0.8.5-py3-none-any.whl), used where they lie;
#            without it, peers that the interpreter can import        default: benchmarks/peers
#   OUT      folder of the results                                    default: benchmarks/results/DEVICE
#
# Writes kernels.csv, kernels.md and, with matplotlib, a plot per operation. More arguments go to kernels/bench.py.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"

if ! device="$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "_"))' 2>/dev/null)"; then
    echo "$python: no torch that sees a GPU. Set PYTHON to an interpreter with torch for CUDA, on a machine with a GPU." >&2
    exit 2
fi

# A wheel of pure Python is a zip file that can be imported from once unpacked; nothing is installed.
peers="$(mktemp -d)"
trap 'rm -rf "$peers"' EXIT
for wheel in "${PEERS:-$root/benchmarks/peers}"/*-none-any.whl; do
    [[ -e "$wheel" ]] || continue
    "$python" -m zipfile -e "$wheel" "$peers"
done

start=$SECONDS
PYTHONPATH="$peers${PYTHONPATH:+:$PYTHONPATH}" "$python" "$root/kernels/bench.py" \
    --out "${OUT:-$root/benchmarks/results/$device}" --plot --budget-s 420 "$@"
echo "took $((SECONDS - start)) s"
