#!/usr/bin/env bash
# The most memory that a map takes at 0.1, 1 and 4 million pixels, as a Markdown table: 200 sites,
# the shipped model, two products. ISOPLETH is the command; what follows goes to `map` too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

command="${ISOPLETH:-target/release/isopleth}"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 scripts/big-survey.py > "$folder/all.csv"
head -n 201 "$folder/all.csv" > "$folder/survey.csv"

echo "| pixels | peak memory | wall |"
echo "| --- | --- | --- |"
for resolution in 2300m 730m 365m; do
    "$command" map --surveys "$folder/survey.csv" --resolution "$resolution" --out "$folder/out" \
        --products mean,sd --no-pictures --force "$@" > "$folder/said"
    python3 - "$folder/out/run.json" <<'PY'
import json, sys
run = json.load(open(sys.argv[1]))
print(f"| {run['summary']['pixels']:,} | {run['peak_memory_mib']:.0f} MiB | {run['seconds']:.1f} s |")
PY
done
