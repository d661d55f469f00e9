#!/usr/bin/env bash
# NEVER RUN ON HARDWARE YET: prepared where no GPU was to be had. Remove this line after the first run.
#
# Everything a GPU machine is asked, in one command; it needs no internet, cargo or GDAL there.
#
#   scripts/gpu-check.sh pack     here: builds the bundle (out/gpu; BUNDLE names another folder)
#   scripts/gpu-check.sh          there: contract tests on the GPU, then benches; JSON in OUT/gpu-check.json
#
# The bundle is the command and the contract tests with the feature `cuda`, stripped (as the profile
# says) and compressed; more than 60 MiB is refused. There it needs a driver of the 580 series or later,
# and cuBLAS and cuRAND of CUDA 13 or 12, which PyTorch or a toolkit brings (LD_LIBRARY_PATH, where they
# are not found).
# Exit code: 0 if the tests passed and every bench answered.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bundle="${BUNDLE:-out/gpu}"

pack() {
    local tests
    scripts/build-cuda.sh build --no-default-features --bin isopleth
    tests="$(scripts/build-cuda.sh test --no-default-features --no-run --test contract_models \
        --message-format=json | sed -n '/"name":"contract_models"/s/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)"
    mkdir -p "$bundle"
    gzip -c "${CARGO_TARGET_DIR:-target/cuda}/release/isopleth" > "$bundle/isopleth.gz"
    gzip -c "$tests" > "$bundle/contract.gz"
    local size
    size="$(du -sk "$bundle" | cut -f1)"
    [ "$size" -le $((60 * 1024)) ] || { echo "error: the bundle takes $size KiB; 60 MiB is the most" >&2; exit 1; }
    echo "$bundle: $size KiB"
}

if [ "${1:-}" = pack ]; then
    pack
    exit
fi
[ $# = 0 ] || { echo "error: scripts/gpu-check.sh [pack]" >&2; exit 2; }
for file in isopleth contract; do
    [ -e "$bundle/$file.gz" ] || { echo "error: there is no $bundle/$file.gz; make it with scripts/gpu-check.sh pack, and carry it here" >&2; exit 2; }
done

out="${OUT:-out}"
mkdir -p "$out"
programs="$(mktemp -d)"
trap 'rm -rf "$programs"' EXIT
for file in isopleth contract; do
    gzip -dc "$bundle/$file.gz" > "$programs/$file"
    chmod +x "$programs/$file"
done
export ISOPLETH_GPU=1 # tests fail where they would be skipped

# cuBLAS and cuRAND, where the loader does not find them by itself.
for folder in $(python3 -c 'import nvidia, os
for root in nvidia.__path__:
    for part in ("cu13", "cublas", "curand", "cuda_nvrtc"):
        print(os.path.join(root, part, "lib"))' 2>/dev/null) /usr/local/cuda/lib64; do
    if [ -d "$folder" ]; then
        export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder"
    fi
done

ask() { nvidia-smi --query-gpu="$1" --format=csv,noheader,nounits 2>/dev/null | head -n 1 || true; }
quoted() { printf '"%s"' "$(printf '%s' "$1" | tr -d '\000-\037' | sed 's/\\/\\\\/g; s/"/\\"/g')"; }

echo "== contract tests"
start=$SECONDS
tests=0
"$programs/contract" cuda::on_a_gpu --test-threads 1 2>&1 | tee "$out/contract.log" || tests=$?
test_seconds=$((SECONDS - start))
counts="$(sed -n 's/^test result: .* \([0-9]*\) passed; \([0-9]*\) failed.*/{"passed": \1, "failed": \2}/p' "$out/contract.log" | tail -n 1)"

# A bench, with the most memory that the card showed meanwhile (MiB; less than this was there before).
benches=() failed=0
bench() {
    echo "== bench $*"
    local code=0 peak=0 now pid
    timeout "${LIMIT:-120}" "$programs/isopleth" bench "$@" --device cuda --json > "$out/bench.json" 2> "$out/bench.err" &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        now="$(ask memory.used)"
        case "$now" in '' | *[!0-9]*) ;; *) [ "$now" -le "$peak" ] || peak="$now" ;; esac
        sleep 0.1
    done
    wait "$pid" || code=$?
    cat "$out/bench.err"
    if [ "$code" = 0 ]; then
        cat "$out/bench.json"
        benches+=("{\"command\": $(quoted "$*"), \"card_memory_mib\": $peak, \"report\": $(cat "$out/bench.json")}")
    else
        failed=$((failed + 1))
        benches+=("{\"command\": $(quoted "$*"), \"exit\": $code, \"error\": $(quoted "$(tail -n 5 "$out/bench.err" | tr '\n' ' ')")}")
    fi
}

before="$(ask memory.used)"
bench attention --contexts 10K --targets 10K
bench attention --contexts 100K --targets 100K
bench attention --contexts 100K --targets 100K --bias matern-3/2
bench attention --contexts 100K --targets 1M --repeat 1
bench condition --contexts 10K
bench map --contexts 10K --targets 100K
bench train-step --batch 32 --fused

{
    printf '{\n'
    printf '  "date": %s,\n' "$(quoted "$(date -u +%Y-%m-%dT%H:%M:%SZ)")"
    printf '  "version": %s,\n' "$(quoted "$("$programs/isopleth" --version)")"
    printf '  "card": %s,\n' "$(quoted "$(ask name)")"
    printf '  "driver": %s,\n' "$(quoted "$(ask driver_version)")"
    printf '  "card_memory_before_mib": %s,\n' "$(quoted "$before")"
    printf '  "tests": {"exit": %s, "seconds": %s, "counts": %s},\n' "$tests" "$test_seconds" "${counts:-null}"
    printf '  "benches": [\n    %s\n  ]\n}\n' "$(printf '%s' "${benches[0]}"; printf ',\n    %s' "${benches[@]:1}")"
} > "$out/gpu-check.json.tmp"
mv "$out/gpu-check.json.tmp" "$out/gpu-check.json"
rm -f "$out/bench.json" "$out/bench.err"
echo "== $out/gpu-check.json: tests exit $tests, $failed benches failed"
[ "$tests" = 0 ] && [ "$failed" = 0 ]
