#!/usr/bin/env bash
# Cross-validated scores on two continuous data sets: log zinc (meuse) and Swiss rain (sic97).
# Usage: scripts/values.sh [MODEL …]   (default: continuous gp); SURVEYS names the data's folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
surveys=${SURVEYS:-../shared/data}
[ -d "$surveys" ] || { echo "values: no folder $surveys; set SURVEYS" >&2; exit 1; }
[ $# -gt 0 ] || set -- continuous gp
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
awk -F, 'NR == 1 { print "x,y,log_zinc"; next } { printf "%s,%s,%.17g\n", $1, $2, log($6) }' \
    "$surveys/meuse/samples.csv" >"$work/meuse.csv"
awk -F, 'NR == 1 { print "x,y,rain,fold"; next } { print $1 "," $2 "," $3 "," ($5 ~ /train/ ? 0 : 1) }' \
    "$surveys/sic97/rain.csv" >"$work/sic97.csv"
for model in "$@"; do
    echo "meuse $model"
    target/release/isopleth validate --surveys "$work/meuse.csv" --lon x --lat y --crs EPSG:28992 \
        --value log_zinc --folds 10 --model "$model" 2>/dev/null | grep -E "sites|^$model|^${model##*/}"
    echo "sic97 $model: fold 1 is the 367 stations predicted from 100"
    target/release/isopleth validate --surveys "$work/sic97.csv" --lon x --lat y --crs local:km \
        --value rain --folds "$work/sic97.csv:fold" --model "$model" 2>/dev/null | grep -E "sites|fold 1"
done
