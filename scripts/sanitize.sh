#!/usr/bin/env bash
# Look at the kernels of every room with compute-sanitizer, on a GPU machine: the tiny cases of
# tests/gpu/small_cases.py, a process for each room and tool. A line for each says: clean, what was found or failed, or
# that time ran out.
#
#   scripts/sanitize.sh LOGS [ROOM ...]      LOGS: folder for what the tools print
#
# JOBS=8 processes at a time, each with LIMIT=120 seconds; TOOLS="racecheck memcheck"; PRINT=5 findings are printed of
# each; PY: the Python that has the package. The exchange needs ranks and is not among the rooms: tests/gpu/run_ranks.py --sanitizer. Fails unless all is
# clean. Racecheck wants kernels built with DSV3RT_FOR_RACECHECK=ON, and what it names need not be a race:
# docs/notes/sanitizer.md.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: scripts/sanitize.sh LOGS [ROOM ...]" >&2; exit 2; }
logs=$(realpath -m "$1")
shift
cd "$(dirname "$0")/.."

rooms=(gemm_dense gemm_by_row_scales gemm_grouped casts swiglu norms embed experts loss optim prefill decode)
[ $# -eq 0 ] || rooms=("$@")
at_once=${JOBS:-8} limit=${LIMIT:-120} print=${PRINT:-5} tools=${TOOLS:-racecheck memcheck}
python=${PY:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3
sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
[ -x "$sanitizer" ] || { echo "sanitize: needs compute-sanitizer of the CUDA toolkit, which is not here" >&2; exit 2; }
mkdir -p "$logs"
summary=$logs/summary.txt
: >"$summary"

# Each tensor has an allocation of its own, or its neighbours in torch's pools would hide what is read behind its end.
# Torch's kernels are loaded late and left alone.
export CUDA_MODULE_LOADING=LAZY PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

sanitized() { # tool, command ...
  timeout -k 10 "$limit" "$sanitizer" --tool "$1" --kernel-regex kns=dsv3rt --report-api-errors no --error-exitcode 9 \
    --print-limit "$print" "${@:2}"
}

say() { printf '%-20s %-10s %4ss  %s\n' "$@" | tee -a "$summary"; }

look() { # room, tool
  local log=$logs/$1.$2.log start=$SECONDS code=0 found verdict
  sanitized "$2" "$python" -m pytest -q -x -p no:xdist -p no:cacheprovider tests/gpu/test_small_cases.py \
    -k "near_its_reference and $1" >"$log" 2>&1 || code=$?
  found=$(grep -o 'SUMMARY: .*' "$log" | tail -n 1 || true)
  case $code in
    0)
      if ! grep -q '[0-9] passed' "$log"; then verdict="nothing ran: is there a GPU?"
      elif [ -z "$found" ]; then verdict="no summary"
      elif grep -Eq '[1-9][0-9]* (error|warning|hazard)' <<<"$found"; then verdict=$found
      else verdict=clean; fi ;;
    5) verdict="no such room" ;;
    9) verdict=$found ;;
    124 | 137) verdict="out of time" ;;
    *) verdict="a case failed (exit code $code)" ;;
  esac
  say "$1" "$2" $((SECONDS - start)) "$verdict"
}

# Rows from behind the end of x, which memcheck has to see: a filter that matches no kernel finds everything clean.
wrong='
import torch
from dsv3rt import ops
x = torch.zeros(8, 128, dtype=torch.bfloat16, device="cuda")
layout = ops.GroupLayout(*(torch.tensor(v, dtype=torch.int32, device="cuda") for v in ([128], [0, 128])))
ops.quantize_1x128(x, layout=layout, rows_P=torch.full((128,), 1000, dtype=torch.int32, device="cuda"))
torch.cuda.synchronize()'

canary() {
  local log=$logs/canary.memcheck.log start=$SECONDS code=0 verdict="clean: what is wrong on purpose was seen"
  sanitized memcheck "$python" -c "$wrong" >"$log" 2>&1 || code=$?
  { [ $code -eq 9 ] && grep -q quantize "$log"; } || verdict="does not see our kernels (exit code $code)"
  say canary memcheck $((SECONDS - start)) "$verdict"
}

case " $tools " in *" memcheck "*) canary & ;; esac
for tool in $tools; do
  for room in "${rooms[@]}"; do
    while [ "$(jobs -rp | wc -l)" -ge "$at_once" ]; do wait -n || true; done
    look "$room" "$tool" &
  done
done
wait
echo "sanitize: $SECONDS s; logs in $logs"
! grep -qv 's  clean' "$summary"
