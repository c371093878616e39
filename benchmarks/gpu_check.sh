#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command:
#
#     benchmarks/gpu_check.sh OUT_DIR [tests] [sanitizer] [speed] [decode]      without a name: all four
#
# Parts, each within PART_MINUTES (10) and each writing its results as they come:
#     tests       tests/gpu, every test with a limit of its own            -> OUT_DIR/tests.{xml,log}
#     sanitizer   compute-sanitizer's memcheck and racecheck, small sizes   -> OUT_DIR/sanitizer_*.log
#     speed       tlstm beside torch.nn.LSTM: the set `check` of benchmarks.run, most telling shapes first, until the
#                 time is up; the same command goes on from there           -> OUT_DIR/check-COMMIT.{csv,json,svg}
#     decode      generation beside torch.nn.LSTM, as a loop and as a CUDA graph: the set `decode`
#                                                                           -> OUT_DIR/decode-COMMIT.{csv,json,svg}
# Ends with one line for each part; the exit code is the number of parts that failed. Without a GPU it says so and
# ends with 0: nothing was found wrong, and nothing was checked.
set -uo pipefail

OUT="${1:?usage: benchmarks/gpu_check.sh OUT_DIR [tests] [sanitizer] [speed] [decode]}"
shift
PARTS=("$@")
[ $# -eq 0 ] && PARTS=(tests sanitizer speed decode)
SECONDS_OF_A_PART=$((60 * ${PART_MINUTES:-10} - 15))
PYTHON="${PYTHON:-python3}"
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$OUT" && OUT="$(cd "$OUT" && pwd)" || exit 1
export PYTHONPATH=".:kernels${PYTHONPATH:+:$PYTHONPATH}"

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_check: torch sees no CUDA GPU here; nothing was checked" | tee "$OUT/summary.txt"
    exit 0
fi
"$PYTHON" benchmarks/gpu_check.py environment --out "$OUT"

run_tests() {
    timeout -k 10 "$SECONDS_OF_A_PART" "$PYTHON" -m pytest tests/gpu -m gpu -o timeout_method=thread \
        --junitxml="$OUT/tests.xml" -v 2>&1 | tee "$OUT/tests.log" | grep -E "FAILED|ERROR|passed|failed" | tail -60
}

run_sanitizer() {
    if ! command -v compute-sanitizer >/dev/null; then
        echo "compute-sanitizer is not on the PATH: not checked" | tee "$OUT/sanitizer_memcheck.log"
        return 0
    fi
    local failed=0
    for tool in memcheck racecheck; do
        timeout -k 10 $((SECONDS_OF_A_PART / 2)) compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$PYTHON" benchmarks/gpu_check.py sanitize >"$OUT/sanitizer_$tool.log" 2>&1 || failed=1
        tail -3 "$OUT/sanitizer_$tool.log"
    done
    return $failed
}

run_speed() {
    timeout -k 10 $((SECONDS_OF_A_PART + 60)) "$PYTHON" -m benchmarks.run --set check --out "$OUT" --device cuda \
        --providers tlstm torch --dtype bfloat16 float16 tf32 float32 --time-limit "$SECONDS_OF_A_PART" \
        ${SPEED_ARGS:-} 2>&1 | tee "$OUT/speed.log" | tail -40
}

run_decode() {
    timeout -k 10 $((SECONDS_OF_A_PART + 60)) "$PYTHON" -m benchmarks.run --set decode --out "$OUT" --device cuda \
        --dtype bfloat16 --time-limit "$SECONDS_OF_A_PART" 2>&1 | tee "$OUT/decode.log" | tail -40
}

failures=0
for part in "${PARTS[@]}"; do
    echo "== $part"
    if "run_$part"; then result=ok; else result=FAILED; failures=$((failures + 1)); fi
    echo "$part: $result" | tee -a "$OUT/summary.txt"
done
exit "$failures"
