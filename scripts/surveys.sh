#!/usr/bin/env bash
# Cross-validated scores on three real surveys with fixed folds, as a Markdown table.
# Usage: scripts/surveys.sh [MODEL …]   (default: prevalence gp)
# The surveys are not part of this repository; SURVEYS names the folder that holds them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
surveys=${SURVEYS:-../shared/data}
[ -d "$surveys" ] || { echo "surveys: no folder $surveys; set SURVEYS" >&2; exit 1; }
[ $# -gt 0 ] || set -- prevalence gp

echo '| survey | folds | model | log score | coverage 50 / 80 / 95 % | RMSE | CRPS | seconds |'
echo '| --- | --- | --- | --- | --- | --- | --- | --- |'
for survey in loaloa liberia gambia; do
    where=(--lon lon --lat lat)
    [ "$survey" = gambia ] && where=(--lon x --lat y --crs EPSG:32628)
    for folds in random block; do
        for model in "$@"; do
            target/release/isopleth validate --surveys "$surveys/$survey/villages.csv" "${where[@]}" \
                --positive positive --tested n --folds "$surveys/$survey/folds.csv:fold_$folds" \
                --model "$model" --json 2>/dev/null |
                python3 -c '
import json, sys
r = json.load(sys.stdin); c = r["coverage"]
print("| {} | {} | {} | {:.3f} | {:.3f} / {:.3f} / {:.3f} | {:.4f} | {:.4f} | {:.1f} |".format(
    *sys.argv[1:4], r["log_score"], c["50"], c["80"], c["95"], r["rmse"], r["crps"], r["seconds"]))
' "$survey" "$folds" "${model##*/}"
        done
    done
done
