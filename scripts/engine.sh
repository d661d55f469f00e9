#!/usr/bin/env bash
# How fast the attention engine is here, as a Markdown table: BENCHMARKS.md, "The attention engine".
# Usage: scripts/engine.sh [PART …]   parts: scan terms avx2 bf16 sparse dka step size   (default: all)
# Run it with nothing else running: the ceiling is measured in the same run, but a shared core is not noticed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || set -- scan terms avx2 bf16 sparse dka step size

bench() { # name, then the arguments of `isopleth bench`
    local name=$1
    shift
    target/release/isopleth bench "$@" --json | python3 -c '
import json, sys
r = json.load(sys.stdin)
left = "" if not r.get("skipped") else ", {:.2f} % of pairs left out".format(100 * r["skipped"])
print("| {} | `bench {}` | {:.2f} | {:.3f} | {:.1f} % | {:.0f} | {} |".format(
    sys.argv[1], sys.argv[2], r["wall_s"], r["ns_per_head_pair"], 100 * r["ceiling_share"],
    r["peak_rss_mib"], r["ceiling"]["simd"] + left))
' "$name" "$*"
}

echo '| work | command | wall, s | ns per head pair, wall | share of the ceiling | peak memory, MiB | notes |'
echo '| --- | --- | --- | --- | --- | --- | --- |'
for part in "$@"; do
    case $part in
    scan)
        bench 'scan, whole model, 10K × 100K' map --contexts 10K --targets 100K
        bench 'scan, one layer, 10K × 20K' attention --contexts 10K --targets 20K --repeat 5
        ;;
    terms)
        bench 'one term' attention --contexts 10K --targets 10K --repeat 5
        bench 'five rbf terms' attention --contexts 10K --targets 10K --repeat 5 --bias rbf,rbf,rbf,rbf,rbf
        bench 'rbf, slope and Matérn 3/2' attention --contexts 10K --targets 10K --repeat 5 --bias rbf,scalar,matern-3/2
        bench 'no bias' attention --contexts 10K --targets 10K --repeat 5 --bias none
        ;;
    avx2)
        ISOPLETH_SIMD=avx2 bench 'AVX2, whole model, 10K × 20K' map --contexts 10K --targets 20K --repeat 2
        ISOPLETH_SIMD=avx2 bench 'AVX2, no bias, one layer' attention --contexts 10K --targets 10K --repeat 5 --bias none
        ;;
    bf16) bench 'bf16, whole model, 10K × 20K' map --contexts 10K --targets 20K --precision bf16 --repeat 2 ;;
    sparse)
        bench 'compact support, whole model, 100K × 1M, clustered' map --contexts 100K --targets 1M \
            --layout clustered --bias wendland --reach 0.05
        bench 'faint keys left out (ε = 1e-3), one layer, 100K × 100K, clustered' attention --contexts 100K \
            --targets 100K --layout clustered --bias scalar --reach 0.01 --attention sparse --lose 1e-3 --repeat 1
        ;;
    dka) bench 'DKA, whole model, 100K × 1M' map --contexts 100K --targets 1M --attention dka ;;
    step) bench 'training step, batch 16, 256 + 256' train-step --fused --repeat 10 ;;
    size)
        for targets in 10K 100K; do
            bench "scan, whole model, 5K × $targets" map --contexts 5K --targets $targets --repeat 2
        done
        ;;
    *) echo "engine: no part $part" >&2 && exit 1 ;;
    esac
done
