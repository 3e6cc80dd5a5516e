#!/usr/bin/env bash
# Everything that needs a GPU, in one call and under eight minutes; needs no network. Results are written as they come.
#   benchmarks/gpu_check.sh [RESULTS]     (default: benchmarks/results)
# PYTHON names the interpreter (default: .venv/bin/python if there, else python3). Without a GPU it runs what a CPU can.
set -uo pipefail
cd "$(dirname "$0")/.."
RESULTS=${1:-benchmarks/results}
PYTHON=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || command -v python3)}
export PYTHONPATH="$PWD/kernels:$PWD" HF_HUB_OFFLINE=1
mkdir -p "$RESULTS"
CARD=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "_") if torch.cuda.is_available() else "cpu")')
failed=0

check() {  # check NAME SECONDS COMMAND...: its output goes to the terminal and to RESULTS/CARD-NAME.log
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  timeout "$limit" "$@" 2>&1 | tee "$RESULTS/$CARD-$name.log"
  local code=${PIPESTATUS[0]}
  if [ "$code" -ne 0 ]; then
    echo "== $name failed with exit code $code"
    failed=1
  fi
}

git rev-parse HEAD > "$RESULTS/$CARD-commit.txt" 2>/dev/null || true
check compile 120 "$PYTHON" benchmarks/compile_kernels.py --json "$RESULTS/$CARD-compile.json"
check accuracy 60 "$PYTHON" benchmarks/kernel_accuracy.py --json "$RESULTS/$CARD-accuracy.json"
if [ "$CARD" != cpu ]; then
  check speed 150 "$PYTHON" benchmarks/kernel_speed.py --json "$RESULTS/$CARD-speed.json"
fi
check share 60 "$PYTHON" benchmarks/step_share.py --json "$RESULTS/$CARD-share.json"
if "$PYTHON" -c 'import pytest' 2>/dev/null; then
  check tests 240 "$PYTHON" -m pytest -q -x -p no:cacheprovider tests/test_kernels.py
else
  echo "== tests: pytest is not installed; not run"
  failed=1
fi
exit $failed
