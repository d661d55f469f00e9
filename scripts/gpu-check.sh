#!/usr/bin/env bash
# NEVER RUN BESIDE A GPU YET: prepared where none was to be had. Remove this line after the first run.
#
# Everything a GPU machine is asked, in one command; it needs no internet, cargo or GDAL there.
#
#   scripts/gpu-check.sh pack     here: builds the bundle (out/gpu; BUNDLE names another folder)
#   scripts/gpu-check.sh          there: contract tests on the GPU, accuracy against f64, benches, peers,
#                                 training; JSON in OUT/gpu-check.json, rewritten after every step
#   DEVICE=cpu scripts/gpu-check.sh     the same steps on the processor, in tiny sizes: tries the script
#
# The bundle is the command and the contract tests with the feature `cuda`, stripped (as the profile
# says) and compressed; more than 60 MiB is refused. There it needs a driver of the 580 series or later,
# and cuBLAS and cuRAND of CUDA 13 or 12, which PyTorch or a toolkit brings (LD_LIBRARY_PATH, where they
# are not found). Beside it: this repository's files, and python3 (its standard library; PyTorch and JAX
# for the peers, where they are there).
#
# Environment, all optional: OUT (out), SECONDS_ALLOWED for all of it (560: a command there may take ten
# minutes), ISOPLETH and CONTRACT (one or several, with colons), programs to use in place of the bundle's,
# PEERS=no.
# Exit code: 0 if the tests passed and everything but peers answered.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bundle="${BUNDLE:-out/gpu}"
# Test targets with laws for a card.
laws=(contract_models contract_training)

# The executable of a test target, from what cargo says in JSON.
built() { python3 -c '
import json, sys
found = ""
for line in sys.stdin:
    try: said = json.loads(line)
    except ValueError: continue
    if said.get("reason") == "compiler-artifact" and said["target"]["name"] == sys.argv[1]:
        found = said.get("executable") or found
print(found)' "$1"; }

pack() {
    local said law tests size
    scripts/build-cuda.sh build --no-default-features --bin isopleth
    said="$(scripts/build-cuda.sh test --no-default-features --no-run "${laws[@]/#/--test=}" \
        --message-format=json)"
    rm -rf "$bundle"
    mkdir -p "$bundle"
    gzip -c "${CARGO_TARGET_DIR:-target/cuda}/release/isopleth" > "$bundle/isopleth.gz"
    for law in "${laws[@]}"; do
        tests="$(built "$law" <<< "$said")"
        [ -x "$tests" ] || { echo "error: cargo named no executable of $law" >&2; exit 1; }
        gzip -c "$tests" > "$bundle/$law.gz"
    done
    size="$(du -sk "$bundle" | cut -f1)"
    [ "$size" -le $((60 * 1024)) ] || { echo "error: the bundle takes $size KiB; 60 MiB is the most" >&2; exit 1; }
    echo "$bundle: $size KiB"
}

case "${1:-}" in
pack) pack; exit ;;
"") ;;
*) echo "error: scripts/gpu-check.sh [pack]" >&2; exit 2 ;;
esac

programs="$(mktemp -d)"
trap 'rm -rf "$programs"' EXIT
# Program $1 of the bundle, unpacked.
unpacked() {
    [ -e "$bundle/$1.gz" ] || { echo "error: there is no $bundle/$1.gz; make it with scripts/gpu-check.sh pack, and carry it here" >&2; exit 2; }
    gzip -dc "$bundle/$1.gz" > "$programs/$1"
    chmod +x "$programs/$1"
    echo "$programs/$1"
}
isopleth="${ISOPLETH:-$(unpacked isopleth)}"
if [ -n "${CONTRACT:-}" ]; then
    IFS=: read -ra contract <<< "$CONTRACT"
else
    contract=()
    for law in "${laws[@]}"; do contract+=("$(unpacked "$law")"); done
fi

# cuBLAS and cuRAND, where the loader does not find them by itself.
for folder in $(python3 -c 'import nvidia, os
for root in nvidia.__path__:
    for part in ("cu13", "cublas", "curand", "cuda_nvrtc"):
        print(os.path.join(root, part, "lib"))' 2>/dev/null) /usr/local/cuda/lib64; do
    if [ -d "$folder" ]; then
        export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder"
    fi
done

python3 scripts/gpu-check.py --isopleth "$isopleth" --contract "${contract[@]}" --device "${DEVICE:-cuda}" \
    --out "${OUT:-out}" --seconds "${SECONDS_ALLOWED:-560}"
