#!/usr/bin/env bash
# Build, check and measure on all GPUs of this node: expert exchange over NVLink, then the trainer over NCCL and with
# that exchange, beside one GPU.
# Writes benchmarks/results/<gpu>-x<N>/node.json, and trace.png there, a step in which phases run beside each other;
# docs/performance.md follows with `python -m benchmarks.report`.
#
#   scripts/bench_node.sh [LIBNCCL]      LIBNCCL: NCCL 2.30 or newer, where torch brings an older one
#
# SYSTEM=1 uses the Python at hand, as `make SYSTEM=1` does. ROUNDS=1000 random rounds of exchange are checked, and
# STEPS=20 of training in FP32. COMMIT: of these sources, where they came without git.
# Stops at the first failure; what was measured before is lost with it, so that no figure stands without its check.
set -euo pipefail
cd "$(dirname "$0")/.."

gpus=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true)
[ "$gpus" -ge 2 ] || { echo "bench_node: needs two GPUs or more, found $gpus" >&2; exit 1; }
make ${SYSTEM:+SYSTEM=$SYSTEM} DSV3RT_CUDA=ON setup
python=.venv/bin/python
[ "${SYSTEM:-}" = 1 ] && python=python3
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
parts=$scratch/parts
mkdir "$parts"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

on() { "$python" tests/gpu/run_ranks.py --ranks "$1" ${nccl:+--nccl "$nccl"} --timeout 1800 "${@:2}"; }
ranks() { on "$gpus" "$@"; }

nccl=${1:-}
commit=(${COMMIT:+--commit "$COMMIT"})
ranks tests/gpu/check_ep.py --only rounds --rounds "${ROUNDS:-1000}"
ranks tests/gpu/check_ep.py --only latency --rounds 20
ranks tests/gpu/check_ep.py --only faults
for tokens in 4096 8192; do
  for sms in 16 32; do
    ranks benchmarks/ep.py --tokens $tokens --num-sms $sms "${commit[@]}" --out "$parts/ep_${tokens}_$sms.json"
  done
done
case $gpus in
  2 | 4 | 8)
    nccl='' ranks tests/gpu/check_trainer.py --steps "${STEPS:-20}"
    ranks tests/gpu/check_fp8_trainer.py
    on 1 benchmarks/trainer_ranks.py "${commit[@]}" --out "$scratch/one.json"
    ranks benchmarks/trainer_ranks.py "${commit[@]}" --one "$scratch/one.json" --out "$parts/trainer.json"
    layout=(--parallel.pp 2 --parallel.dp $((gpus / 2)) --parallel.ep $((gpus / 2)) --parallel.schedule dualpipev)
    ranks scripts/trace_ranks.py configs/numerics.toml "$scratch/traces" --model.num_layers 8 --model.max_position 4096 \
      --train.seq_len 4096 --train.micro_batch_size 1 --train.batch_size $((8 * gpus)) --train.precision fp8 "${layout[@]}" ;;
  *) echo "bench_node: the trainer is checked on 2, 4 or 8 GPUs, not on $gpus" ;;
esac
"$python" - "$parts" "$gpus" >"$scratch/folder" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch

from benchmarks import provenance

parts = [json.loads(file.read_text()) for file in sorted(Path(sys.argv[1]).glob("*.json"))]
entries = {entry["name"]: entry for part in parts for entry in part["benchmarks"]}  # a low-latency line is in several
whole = {**parts[0], "benchmarks": list(entries.values())}
whole["machine_info"] = {**whole["machine_info"], "command": f"scripts/bench_node.sh on {sys.argv[2]} GPUs"}
folder = f"{provenance.folder_of(torch.cuda.get_device_name())}-x{sys.argv[2]}"
out = provenance.ROOT / "benchmarks" / "results" / folder / "node.json"
out.parent.mkdir(parents=True, exist_ok=True)
out.write_text(json.dumps(whole, indent=4) + "\n")
print(out.parent)
PYTHON
folder=$(<"$scratch/folder")
echo "bench_node: written to $folder/node.json"
if [ -d "$scratch/traces" ]; then
  "$python" scripts/trace_picture.py "$scratch"/traces/rank-*.json.gz --out "$folder/trace.png" \
    --title "A step on $gpus GPUs: pp 2, experts over $((gpus / 2)), DualPipeV"
fi
