#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command:
#
#     benchmarks/gpu_check.sh OUT_DIR [tests] [sanitizer] [speed] [decode]      without a name: all four
#
# Parts, each ended after PART_MINUTES (9) and each writing its results as they come:
#     tests       tests/gpu, each with a limit of its own, in WORKERS (8) processes, as most of the time goes into
#                 compiling; one that hangs or loses the GPU takes only its process along  -> OUT_DIR/tests.{xml,log}
#     sanitizer   compute-sanitizer's memcheck and racecheck, small sizes                  -> OUT_DIR/sanitizer_*.log
#     speed       tlstm beside torch.nn.LSTM: the set `check` of benchmarks.run, most telling shapes first, until the
#                 time is up; the same command goes on from there           -> OUT_DIR/check-COMMIT.{csv,json,svg}
#     decode      generation beside torch.nn.LSTM, as a loop and as a CUDA graph: the set `decode`
#                                                                           -> OUT_DIR/decode-COMMIT.{csv,json,svg}
# Narrower: TEST_ARGS="tests/gpu/test_decode.py -k greedy", DTYPES="bfloat16 float16", SPEED_ARGS="--mode forward".
# Ends with one line for each part; the exit code is the number of parts that failed. Without a GPU it says so and
# ends with 0: nothing was found wrong, and nothing was checked.
set -uo pipefail

OUT="${1:?usage: benchmarks/gpu_check.sh OUT_DIR [tests] [sanitizer] [speed] [decode]}"
shift
PARTS=("$@")
[ $# -eq 0 ] && PARTS=(tests sanitizer speed decode)
LIMIT=$((60 * ${PART_MINUTES:-9} - 20))  # seconds of a part, and some to stop in
PYTHON="${PYTHON:-python3}"
DTYPES="${DTYPES:-bfloat16 tf32 float32 float16}"
TEST_ARGS="${TEST_ARGS:-tests/gpu tests/generation/test_generation_gpu.py}"
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$OUT" && OUT="$(cd "$OUT" && pwd)" || exit 1
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check: torch sees no CUDA GPU here; nothing was checked" | tee "$OUT/summary.txt"
    exit 0
fi
"$PYTHON" benchmarks/gpu_check.py environment --out "$OUT"

limited() {  # SECONDS COMMAND...
    timeout -k 10 "$@"
}

run_tests() {
    local parallel=()
    "$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n "${WORKERS:-8}" --max-worker-restart 100)
    # shellcheck disable=SC2086
    limited "$LIMIT" "$PYTHON" -m pytest $TEST_ARGS "${parallel[@]}" -m gpu -o timeout_method=thread --tb=short \
        --durations=10 --junitxml="$OUT/tests.xml" -v 2>&1 | tee "$OUT/tests.log" |
        grep -E "^(FAILED|ERROR|E  )|passed|failed|crashed" | tail -60
}

run_sanitizer() {
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not on the PATH: not checked" | tee "$OUT/sanitizer_memcheck.log"
        return 0
    fi
    local failed=0 each=$((LIMIT / 3)) status
    limited "$each" "$PYTHON" benchmarks/gpu_check.py sanitize --processes 12 >"$OUT/sanitizer_none.log" 2>&1 || failed=1
    for tool in memcheck racecheck; do
        limited "$each" compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$PYTHON" benchmarks/gpu_check.py sanitize >"$OUT/sanitizer_$tool.log" 2>&1
        status=$?
        [ "$status" -eq 0 ] || failed=1
        echo "$tool: exit code $status (9: it found something; 124: out of time)," \
            "$(grep -c ': done' "$OUT/sanitizer_$tool.log") of 12 cases run"
        tail -3 "$OUT/sanitizer_$tool.log"
    done
    return $failed
}

benchmark() {  # SET DTYPES ARGUMENTS...
    local set="$1" dtypes="$2" start=$SECONDS
    shift 2
    # shellcheck disable=SC2086
    limited $((LIMIT / 2)) "$PYTHON" benchmarks/gpu_check.py warm --set "$set" --dtype $dtypes \
        --time-limit $((LIMIT * 2 / 5)) 2>&1 | tee "$OUT/warm-$set.log" | tail -10
    local left=$((LIMIT - (SECONDS - start)))
    # shellcheck disable=SC2086
    limited "$left" "$PYTHON" -m benchmarks.run --set "$set" --out "$OUT" --device cuda --dtype $dtypes --seconds 0.7 \
        --time-limit $((left > 90 ? left - 60 : left / 2)) "$@" 2>&1 | tee "$OUT/$set.log" | tail -40
}

run_speed() {
    # shellcheck disable=SC2086
    benchmark check "$DTYPES" --providers tlstm torch ${SPEED_ARGS:-}
}

run_decode() {
    # shellcheck disable=SC2086
    benchmark decode bfloat16 --providers tlstm:kernel tlstm:graph torch torch-graph ${DECODE_ARGS:-}
}

failures=0
for part in "${PARTS[@]}"; do
    echo "== $part"
    if "run_$part"; then result=ok; else result=FAILED; failures=$((failures + 1)); fi
    echo "$part: $result" | tee -a "$OUT/summary.txt"
done
exit "$failures"
