#!/usr/bin/env bash
# A training step of CNP, TNP-D and ConvCNP here and in PyTorch, in turn on the same cores, as a Markdown table:
# BENCHMARKS.md, "The family beside PyTorch". Usage: scripts/family.sh PYTHON [ROUNDS]   (a Python that has torch; default 3 rounds)
# Nothing else should run: each side's figure is the best step of all rounds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${1:?a Python that has torch, see benches/peers/README.md}
rounds=${2:-3}
models=(cnp tnp-d convcnp convcnp-xl)
cargo build --release --locked --quiet --example family_pace
found=$(mktemp)
trap 'rm -f "$found"' EXIT
for _ in $(seq "$rounds"); do
    CANDLE_NUM_THREADS=1 target/release/examples/family_pace 60 "${models[@]}" | sed 's/^/ours /' >>"$found"
    "$python" benches/peers/family.py --threads 2 --steps 60 --models "${models[@]}" | sed 's/^/peer /' >>"$found"
done
python3 - "$found" <<'PY'
import json, sys
best = {}
for line in open(sys.argv[1]):
    side, row = line.split(" ", 1)
    row = json.loads(row)
    key = (row["model"], side)
    if key not in best or row["best_ms"] < best[key]["best_ms"]:
        best[key] = row
torch = next(r["torch"] for (_, side), r in best.items() if side == "peer")
print(f"| model | weights, here and there | here, ms | PyTorch {torch}, ms | ratio |")
print("| --- | --- | --- | --- | --- |")
for model in dict.fromkeys(m for m, _ in best):
    a, b = best[model, "ours"], best[model, "peer"]
    print(f"| `{model}` | {a['parameters']:,} / {b['parameters']:,} | {a['best_ms']:.1f} | {b['best_ms']:.1f} | {b['best_ms'] / a['best_ms']:.1f} |")
PY
