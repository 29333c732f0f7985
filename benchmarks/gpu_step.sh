#!/usr/bin/env bash
# Fill every table of the training step on one GPU, in under 9 minutes and without a network: ./benchmarks/gpu_step.sh
#
#   PYTHON   interpreter with torch for CUDA and triton               default: python3
#   PEERS    folder of wheels of peers, used where they lie, behind what the interpreter has:
#              pip download --only-binary :all: -d PEERS --no-deps liger-kernel==0.8.5
#              pip download --only-binary :all: -d PEERS --python-version 3.12 transformers==5.23.0
#            without it, peers that the interpreter can import        default: benchmarks/peers
#   OUT      folder of the results                                    default: benchmarks/results/DEVICE
#   BUDGET   seconds for everything; nothing starts later             default: 500
#
# In this order, each into a folder of its own, so that what a short budget cuts off matters least:
#   layers      ours, reference and hf_liger of the 2.4B model with 4 and 8 of its layers, and the extrapolation to 56
#   attention   which backend for 30 heads of 64 and 6 key heads, at 4,096 and 28,672
#   depth       all 56 layers, one implementation in memory at a time, 2 rows of 4,096
#   knobs       ours at 8 layers: without WeSaR, not compiled; AdamW's foreach
#   allocator   ours at 8 layers, with the allocator's settings as PyTorch has them: without expandable segments
# All but the last use expandable segments, as the launcher does on GPUs.
# The first table is there after at most 3 minutes. More arguments go to benchmarks/train_step.py.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"

if ! device="$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "_"))' 2>/dev/null)"; then
    echo "$python: no torch that sees a GPU. Set PYTHON to an interpreter with torch for CUDA, on a machine with a GPU." >&2
    exit 2
fi
out="${OUT:-$root/benchmarks/results/$device}"
peers="${PEERS:-$root/benchmarks/peers}"
budget="${BUDGET:-500}"
failed=0
# what the launcher sets; the second name is the setting's older one
export PYTORCH_ALLOC_CONF=expandable_segments:True PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True

# run NAME MOST COMMAND...: what is left of the budget, but MOST seconds at most; a failure does not end the rest
run() {
    local name="$1" most="$2" left=$((budget - SECONDS))
    shift 2
    if ((left < 20)); then
        echo "== $name: not measured, the budget of $budget s was spent"
        return
    fi
    ((left > most)) && left="$most"
    echo "== $name, at most $left s"
    # 15 seconds to finish what was begun
    timeout $((left + 15)) "$python" "$@" --out "$out/$name" --budget-s "$left" || failed=1
}

step=("$root/benchmarks/train_step.py" --model yulan_mini_2b --seq-len 4096 --peers "$peers" --plot)
run layers 165 "${step[@]}" --micro-batch 2 --layers 4,8 --compile on "$@"
run attention 60 "$root/benchmarks/attention.py"
run depth 150 "${step[@]}" --micro-batch 2 --layers 56 --compile on --alternate --rounds 2 --steps 8 "$@"
run knobs 80 "${step[@]}" --micro-batch 2 --layers 8 --compile on,off --impl ours,ours_without_wesar,reference_foreach \
    --rounds 2 --steps 10 "$@"
unset PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF
run allocator 40 "${step[@]}" --micro-batch 2 --layers 8 --compile on --impl ours --rounds 2 --steps 10 "$@"
echo "took $SECONDS s; results in $out"
exit "$failed"
