#!/usr/bin/env bash
# Cross-validated scores on real data with and without covariates, as a Markdown table.
# Usage: scripts/covariates.sh [MODEL …]   (default: prevalence gp; values are read by `continuous` for it)
# The data are not part of this repository; SURVEYS names the folder that holds them. NETWORK names a model
# trained on the rasters of loaloa (elevation with a knot at 650, EVI), which is scored on them too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
surveys=${SURVEYS:-../shared/data}
[ -d "$surveys" ] || { echo "covariates: no folder $surveys; set SURVEYS" >&2; exit 1; }
[ $# -gt 0 ] || set -- prevalence gp
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
awk -F, 'NR == 1 { print "x,y,log_zinc"; next } { printf "%s,%s,%.17g\n", $1, $2, log($6) }' \
    "$surveys/meuse/samples.csv" >"$work/meuse.csv"

# score NAME FOLDS MODEL COVARIATES ARGUMENT…
score() {
    local name=$1 folds=$2 model=$3 what=$4
    shift 4
    target/release/isopleth validate --folds "$folds" --model "$model" --json "$@" 2>/dev/null |
        python3 -c '
import json, sys
r = json.load(sys.stdin); c = r["coverage"]
alone = r["baselines"].get("covariates-only")
print("| {} | {} | {} | {} | {} | {:.3f} | {:.3f} / {:.3f} / {:.3f} | {:.4f} | {:.4f} | {} | {:.1f} |".format(
    *sys.argv[1:5], r["n"], r["log_score"], c["50"], c["80"], c["95"], r["rmse"], r["crps"],
    "{:.3f}".format(alone["log_score"]) if alone else "", r["seconds"]))
' "$name" "${folds##*fold_}" "${model##*/}" "$what"
}

echo '| data | folds | model | covariates | sites | log score | coverage 50 / 80 / 95 % | RMSE | CRPS | covariates only | seconds |'
echo '| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |'
column() { printf -- '--covariate-column %s ' "$@"; }
for folds in random block; do
    [ -n "${NETWORK:-}" ] || break
    score loaloa "$surveys/loaloa/folds.csv:fold_$folds" "$NETWORK" "rasters, read by the network" \
        --surveys "$surveys/loaloa/villages.csv" --lon lon --lat lat --positive positive --tested n \
        --covariate "elevation=$surveys/loaloa/elevation.tif,knot:650" \
        --covariate "evi=$surveys/loaloa/evi.tif"
done
for model in "$@"; do
    for folds in random block; do
        loaloa=(--surveys "$surveys/loaloa/villages.csv" --lon lon --lat lat --positive positive --tested n)
        by="$surveys/loaloa/folds.csv:fold_$folds"
        score loaloa "$by" "$model" none "${loaloa[@]}"
        # shellcheck disable=SC2046 # words are meant to be split
        score loaloa "$by" "$model" columns "${loaloa[@]}" \
            $(column elevation_m,knot:650 ndvi_max,knot:0.8 ndvi_sd)
        score loaloa "$by" "$model" rasters "${loaloa[@]}" \
            --covariate "elevation=$surveys/loaloa/elevation.tif,knot:650" \
            --covariate "evi=$surveys/loaloa/evi.tif"
        liberia=(--surveys "$surveys/liberia/villages.csv" --lon lon --lat lat --positive positive --tested n)
        by="$surveys/liberia/folds.csv:fold_$folds"
        score liberia "$by" "$model" none "${liberia[@]}"
        # shellcheck disable=SC2046
        score liberia "$by" "$model" columns "${liberia[@]}" $(column elevation_m,log)
        gambia=(--surveys "$surveys/gambia/villages.csv" --lon x --lat y --crs EPSG:32628 --positive positive --tested n)
        by="$surveys/gambia/folds.csv:fold_$folds"
        score gambia "$by" "$model" none "${gambia[@]}"
        # shellcheck disable=SC2046
        score gambia "$by" "$model" columns "${gambia[@]}" \
            $(column age_mean_days netuse_frac green phc)
    done
    meuse=(--surveys "$work/meuse.csv" --lon x --lat y --crs EPSG:28992 --value log_zinc)
    values=$model
    [ "$model" = prevalence ] && values=continuous
    score meuse 10 "$values" none "${meuse[@]}"
    score meuse 10 "$values" "sqrt(distance to the river), raster" "${meuse[@]}" \
        --covariate "dist=$surveys/meuse/grid_40m.tif:3,nearest,sqrt"
done
