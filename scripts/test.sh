#!/usr/bin/env bash
# Runs every test, doc tests too, to the end; then says how many passed, failed and were left out.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# candle's element-wise threads spin while they wait and starve the tests beside them.
export CANDLE_NUM_THREADS="${CANDLE_NUM_THREADS:-1}"

mkdir -p target
log=target/test.log
start=$SECONDS
run() { cargo test --release --locked --no-fail-fast "$@" 2>&1 | tee -a "$log"; }
: >"$log"
if [ $# -gt 0 ]; then
    run "$@"
    code=$?
else
    # Examples are built where they are linted.
    run --lib --bins --tests
    code=$?
    run --doc || code=$?
fi

echo
sed -n 's/^test \(.*\) \.\.\. FAILED$/failed: \1/p' "$log"
awk -v seconds=$((SECONDS - start)) '
    /^test result:/ { passed += $4; failed += $6; ignored += $8 }
    END {
        if (!passed && !failed) { print "tests: none ran"; exit }
        printf "tests: %d passed, %d failed, %d ignored, %d s with building\n", passed, failed, ignored, seconds
    }' "$log"
exit $code
