#!/usr/bin/env bash
# All that needs a GPU, in one command: tests, compute-sanitizer, the table of errors, short benchmarks.
#
#   bash scripts/gpu_check.sh [--out DIR] [--stages LIST] [--full] [--no-fla]
#
# --out DIR     where the result files and gpu_check.log go (default: benchmarks/results)
# --stages LIST which stages run, of tests, sanitizer, errors, decode, layer, host, dispatch (FLA's) and bench
#               (prefill); default: all
# --full        every benchmark case instead of six
# --no-fla      leave flash-linear-attention out of the measurements
# PYTHON names the interpreter (default: python3); it needs torch with CUDA, kernels, pytest and matplotlib.
# A stage that fails makes the exit status 1; the stages behind it still run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
out=benchmarks/results
stages=tests,sanitizer,errors,decode,layer,host,dispatch,bench
cases=(--quick)
fla=()
while (($#)); do
  case $1 in
    --out) out=${2:?--out: expected a folder}; shift 2 ;;
    --stages) stages=${2:?--stages: expected a list}; shift 2 ;;
    --full) cases=(); shift ;;
    --no-fla) fla=(--no-fla); shift ;;
    -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "unknown argument: $1 (see --help)" >&2; exit 2 ;;
  esac
done
for stage in ${stages//,/ }; do
  case $stage in
    tests | sanitizer | errors | decode | layer | host | dispatch | bench) ;;
    *) echo "--stages: expected some of tests, sanitizer, errors, decode, layer, host, dispatch and bench, got $stage" >&2; exit 2 ;;
  esac
done

mkdir -p "$out"
log=$out/gpu_check.log
: >"$log"
export PYTHONUNBUFFERED=1
summary=()
failed=0

# stage NAME LIMIT_SECONDS COMMAND...: runs it into the log and the terminal, notes the outcome and the time
stage() {
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  [[ ,$stages, == *,$name,* ]] || return 0
  echo "== $name" | tee -a "$log"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$log"
  status=${PIPESTATUS[0]}
  ((status == 0)) || failed=1
  local outcome=passed
  ((status == 0)) || outcome="FAILED ($status)"
  ((status == 124 || status == 137)) && outcome="FAILED (over $limit s)"
  summary+=("$(printf '%-10s %-22s %4d s' "$name" "$outcome" $((SECONDS - begin)))")
}

pytest=("$python" -m pytest -q -p no:cacheprovider --tb=short --maxfail=15)
device='import torch; print("torch", torch.__version__, "on", torch.cuda.get_device_name())'
if ! "$python" -c "$device" 2>&1 | tee -a "$log"; then
  echo "no CUDA device that $python can use" >&2
  exit 1
fi
stage tests 420 "${pytest[@]}" --durations=15 --ignore=tests/gpu/test_sanitizer.py tests/gpu
stage sanitizer 420 "${pytest[@]}" --durations=5 tests/gpu/test_sanitizer.py
stage errors 240 "$python" benchmarks/errors.py --out "$out" "${fla[@]}"
stage decode 240 "$python" benchmarks/decode.py --out "$out" "${cases[@]}" "${fla[@]}"
stage layer 300 "$python" benchmarks/layer.py --out "$out" "${fla[@]}"
stage host 60 "$python" benchmarks/host.py --out "$out"
((${#fla[@]})) || stage dispatch 240 "$python" benchmarks/fla_dispatch.py --out "$out" --cases 8192/H32 512/H32
stage bench 540 "$python" benchmarks/prefill.py --out "$out" "${cases[@]}" "${fla[@]}"

echo "== summary" | tee -a "$log"
for line in "${summary[@]}"; do
  echo "$line" | tee -a "$log"
done
exit "$failed"
