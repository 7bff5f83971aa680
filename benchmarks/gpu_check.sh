#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build, test, sanitize, measure. Under nine minutes on an H100.
#
#   benchmarks/gpu_check.sh OUTDIR [build] [test] [bench]      (all three unless some are named)
#
# BENCH_SECONDS is how long modules are timed, 100 s if not given: a grid of 368 points takes 250.
# Uses the python3, torch, nvcc, pybind11, scikit-build-core and CMake that are there, and no network. Each part
# has its own time limit, all together under nine minutes, and its log; one that fails is reported and does
# not stop the rest. The exit status is 0 if all went well. Results: OUTDIR/gpu_check.json, OUTDIR/table.txt, OUTDIR/*.log.
set -u
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { sed -n '2,11s/^# \?//p' "$0"; exit 2; }
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
shift
PARTS=${*:-build test bench}
for part in $PARTS; do
  case $part in build | test | bench) ;; *) echo "unknown part '$part': build, test or bench" >&2; exit 2 ;; esac
done
PYTHON=${PYTHON:-python3}
BENCH_SECONDS=${BENCH_SECONDS:-100}
SITE="$OUT/site"  # the package goes here, so that nothing installed is touched
export PYTHONPATH="$SITE:$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
failed=()

# part NAME SECONDS COMMAND...: its output goes to OUT/NAME.log, its end to the screen.
part() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  [ $status -eq 0 ] || failed+=("$name")
  printf '%-12s %4d s  %s\n' "$name" $((SECONDS - start)) \
    "$(case $status in 0) echo ok ;; 124 | 137) echo "over its $limit s" ;; *) echo "failed ($status)" ;; esac)" |
    tee -a "$OUT/parts.txt"
  [ $status -eq 0 ] || tail -n 15 "$OUT/$name.log" | sed 's/^/    /'
}

: >"$OUT/parts.txt"
wanted() { case " $PARTS " in *" $1 "*) true ;; *) false ;; esac; }

if wanted build; then
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .)
  case $capability in 90 | 100) architecture="${capability}a-real" ;; ?*) architecture="$capability-real" ;; *) architecture="90a-real" ;; esac
  rm -rf "$SITE"
  RNNFAST_CUDA=ON part build 150 "$PYTHON" -m pip install --no-build-isolation --no-deps --no-index \
    --disable-pip-version-check --target "$SITE" \
    --config-settings="cmake.define.RNNFAST_CUDA_ARCHITECTURES=$architecture" .
  part sync-build 40 nvcc -std=c++17 -O3 "-gencode=arch=compute_${architecture%-real},code=sm_${architecture%-real}" \
    -o "$OUT/gpu_sync" benchmarks/gpu_sync.cu
fi

if wanted test; then
  part test 120 "$PYTHON" -m pytest -q -p no:cacheprovider -W default --maxfail=20 \
    --junitxml="$OUT/test.xml" tests/test_gpu.py
  if command -v compute-sanitizer >/dev/null; then
    sanitize=(compute-sanitizer --error-exitcode 9 --tool)
    part memcheck 40 "${sanitize[@]}" memcheck "$PYTHON" -m benchmarks.gpu small
    # In a cluster numbers say themselves that they have arrived, which to racecheck is a race.
    part racecheck 40 "${sanitize[@]}" racecheck "$PYTHON" -m benchmarks.gpu small --without cluster resident_cluster
  else
    echo "compute-sanitizer is not there: skipped" | tee -a "$OUT/parts.txt"
    failed+=(compute-sanitizer)
  fi
fi

if wanted bench; then
  part sync 20 bash -c '"$0" >"$1"' "$OUT/gpu_sync" "$OUT/sync.json"
  part bench $((BENCH_SECONDS + 25)) "$PYTHON" -m benchmarks.gpu bench --out "$OUT/bench.json" --seconds "$BENCH_SECONDS"
fi

"$PYTHON" benchmarks/gpu_table.py "$OUT" | tee "$OUT/table.txt"
[ ${#failed[@]} -eq 0 ] || { echo "not well: ${failed[*]}"; exit 1; }
