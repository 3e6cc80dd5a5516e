#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under eight minutes; needs no network and no DeepSpeed.
#   benchmarks/gpu_check.sh [FOLDER]      (default: runs/gpu_check)
# Six files in FOLDER, each named after the card and written as results come: one log of all steps, and JSON (and a
# plot) of accuracy, speed, share and compile. To keep them, copy them to benchmarks/results/; prove.py reads both.
# PYTHON names the interpreter (default: .venv/bin/python if there, else python3). Without a GPU each step is a dry run.
# A step that fails or runs past its time does not stop the others; the exit code is then 1.
set -uo pipefail
cd "$(dirname "$0")/.."
FOLDER=${1:-runs/gpu_check}
PYTHON=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || command -v python3)}
# Inductor compiles in this process: a pool of its own would take longer to start than these few kernels.
export PYTHONPATH="$PWD/kernels:$PWD" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TORCHINDUCTOR_COMPILE_THREADS=1
CARD=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "_") if torch.cuda.is_available() else "cpu")')
if [ -z "$CARD" ]; then
  echo "error: $PYTHON cannot import torch; PYTHON=... names another interpreter" >&2
  exit 2
fi
mkdir -p "$FOLDER"
LOG="$FOLDER/$CARD-gpu_check.log"
failed=0

check() {  # check NAME SECONDS COMMAND...: its output goes to the terminal and to the log
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  echo "== $name" | tee -a "$LOG"
  timeout -k 1 "$limit" "$@" 2>&1 | tee -a "$LOG"
  local code=${PIPESTATUS[0]} note=passed
  if [ "$code" -ne 0 ]; then
    note="failed with exit code $code"
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then note="stopped at its limit of $limit s"; fi
    failed=1
  fi
  echo "== $name: $note, $((SECONDS - start)) s" | tee -a "$LOG"
}

{ date -Is; git rev-parse HEAD 2>/dev/null; } > "$LOG"
# 200 + 40 + 130 + 60 + 45 s
check tests 200 "$PYTHON" -u -m pytest tests/test_kernels.py -q -p no:cacheprovider
check accuracy 40 "$PYTHON" -u benchmarks/kernel_accuracy.py --json "$FOLDER/$CARD-accuracy.json"
check speed 130 "$PYTHON" -u benchmarks/kernel_speed.py --seconds 95 --json "$FOLDER/$CARD-speed.json"
check share 60 "$PYTHON" -u benchmarks/step_share.py --json "$FOLDER/$CARD-share.json"
check compile 45 "$PYTHON" -u benchmarks/compile_kernels.py --json "$FOLDER/$CARD-compile.json"
exit $failed
