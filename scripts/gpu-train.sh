#!/usr/bin/env bash
# NEVER RUN BESIDE A GPU YET: prepared where none was to be had. Remove this line after the first run.
#
# Trains recipes on a GPU machine in windows of a few minutes, each a command of its own that goes on
# where the last one was stopped. The machine may be a fresh one every time.
#
#   scripts/gpu-train.sh                    the shipped models, stage after stage (models/README.md)
#   scripts/gpu-train.sh RECIPE.toml …      these recipes, one after the other
#
# What comes back lies in OUT: NAME.tar.gz for each training (weights, state and journal) and
# gpu-train.json, which says how far all of them are. To go on, put the archives into CARRIED (out/gpu-train),
# carry it there and run the same command again. A finished training only waits to be unpacked:
# `tar -xzf NAME.tar.gz` gives NAME.safetensors and NAME.journal.jsonl.
#
# A window ends by stopping the training where it is: it goes on from its last state, and what it makes is
# bit for bit what one long run makes on the same device (tests/journey/gpu.rs, on the processor).
#
# Environment, all optional: WINDOW, seconds of training in all (520); DEVICE (cuda); STEPS, in place of
# each recipe's own; BUNDLE and ISOPLETH, as in gpu-check.sh; WINDOW_STEPS, steps of each training in a
# window, for tests.
# Exit code: 0 when all is trained, 3 when there is more to do, anything else for an error.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

start=$SECONDS
window="${WINDOW:-520}"
device="${DEVICE:-cuda}"
out="${OUT:-out}"
carried="${CARRIED:-out/gpu-train}"
bundle="${BUNDLE:-out/gpu}"
MOST=$((16 * 1024 * 1024)) # of one file that comes back

die() { echo "error: $1" >&2; exit 2; }
mkdir -p "$out"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

isopleth="${ISOPLETH:-$folder/isopleth}"
if [ -z "${ISOPLETH:-}" ]; then
    [ -e "$bundle/isopleth.gz" ] || die "there is no $bundle/isopleth.gz; make it with scripts/gpu-check.sh pack, and carry it here"
    gzip -dc "$bundle/isopleth.gz" > "$isopleth"
    chmod +x "$isopleth"
fi
# cuBLAS and cuRAND, where the loader does not find them by itself.
for lib in $(python3 -c 'import nvidia, os
for root in nvidia.__path__:
    for part in ("cu13", "cublas", "curand", "cuda_nvrtc"):
        print(os.path.join(root, part, "lib"))' 2>/dev/null) /usr/local/cuda/lib64; do
    [ ! -d "$lib" ] || export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$lib"
done

# Name, recipe, seed, the training whose weights it starts from, the step to stop at for good.
names=() recipes=() seeds=() starts=() lasts=()
training() { names+=("$1") recipes+=("$2") seeds+=("$3") starts+=("${4:-}") lasts+=("${5:-}"); }
if [ $# = 0 ]; then
    training stage1 models/stages/prevalence-1.toml 1
    training stage2 models/stages/prevalence-2.toml 2 stage1 3500
    training prevalence models/prevalence.toml 3 stage2
    training continuous models/continuous.toml 1 stage1
else
    [ $# -le 7 ] || die "seven recipes at a time: eight files come back"
    for recipe; do
        name="$(basename "$recipe" .toml)"
        case "$name" in *[!A-Za-z0-9._-]*) die "the name of $recipe has other signs than letters, digits, '.', '_' and '-'" ;; esac
        case " ${names[*]-} " in *" $name "*) die "two recipes are called $name" ;; esac
        training "$name" "$recipe" 1
    done
fi

# Brings back the training $1, as it is.
pack() {
    local files=()
    for end in safetensors state.safetensors journal.jsonl log done; do
        [ ! -e "$folder/$1.$end" ] || files+=("$1.$end")
    done
    [ ${#files[@]} -gt 0 ] || return 0
    tar -C "$folder" -czf "$out/$1.tar.gz.tmp" "${files[@]}"
    [ "$(stat -c %s "$out/$1.tar.gz.tmp")" -le $MOST ] || echo "warning: $1.tar.gz is larger than the 16 MiB that come back in one file" >&2
    mv "$out/$1.tar.gz.tmp" "$out/$1.tar.gz"
}

# How far all are: name, whether done, the last line of the journal.
report() {
    local rows=() finished=true i name last state
    for i in "${!names[@]}"; do
        name="${names[$i]}" state=false
        [ -e "$folder/$name.done" ] && state=true || finished=false
        last="$(tail -n 1 "$folder/$name.journal.jsonl" 2>/dev/null || true)"
        rows+=("    {\"name\": \"$name\", \"finished\": $state, \"last\": ${last:-null}}")
    done
    {
        printf '{\n  "finished": %s,\n  "seconds": %d,\n  "device": "%s",\n  "trainings": [\n' $finished $((SECONDS - start)) "$device"
        local comma=""
        for i in "${!rows[@]}"; do printf '%s%s' "$comma" "${rows[$i]}"; comma=$',\n'; done
        printf '\n  ]\n}\n'
    } > "$out/gpu-train.json.tmp"
    mv "$out/gpu-train.json.tmp" "$out/gpu-train.json"
    $finished
}

for name in "${names[@]}"; do
    [ ! -e "$carried/$name.tar.gz" ] || tar -C "$folder" -xzf "$carried/$name.tar.gz"
done

for i in "${!names[@]}"; do
    name="${names[$i]}"
    left=$((window - (SECONDS - start)))
    if [ -e "$folder/$name.done" ] || [ $left -lt 10 ]; then
        pack "$name"
        continue
    fi
    from="${starts[$i]}"
    if [ -n "$from" ] && [ ! -e "$folder/$from.done" ]; then
        continue # its first stage is not through yet
    fi
    command=("$isopleth" train "${recipes[$i]}" --out "$folder/$name.safetensors" --device "$device" --seed "${seeds[$i]}")
    [ -z "${STEPS:-}" ] || command+=(--steps "$STEPS")
    last="${lasts[$i]}"
    [ -z "${STEPS:-}" ] || last=""
    if [ -e "$folder/$name.state.safetensors" ]; then
        command+=(--resume)
    else
        command+=(--force)
        [ -z "$from" ] || command+=(--start "$folder/$from.safetensors")
    fi
    cut=""
    if [ -n "${WINDOW_STEPS:-}" ]; then
        # Where this window stops, for tests: so many steps on from the journal's last.
        at="$(sed -n '$s/.*"step":\([0-9]*\).*/\1/p' "$folder/$name.journal.jsonl" 2>/dev/null || true)"
        cut=$((${at:-0} + WINDOW_STEPS))
        steps="${STEPS:-$(sed -n 's/^steps *= *\([0-9]*\).*/\1/p' "${recipes[$i]}")}"
        [ "$cut" -lt "${last:-$steps}" ] || cut=""
    fi
    [ -z "${cut:-$last}" ] || command+=(--stop-at "${cut:-$last}")
    echo "== $name: $left s left"
    code=0
    timeout -k 10 "$left" "${command[@]}" 2>&1 | tee -a "$folder/$name.log" | tail -n 5 || code=$?
    case $code in
        0) [ -n "$cut" ] || touch "$folder/$name.done" ;;
        124 | 137) echo "   stopped: the window is over" ;;
        *) pack "$name"; report || true; die "$name could not be trained (exit $code)" ;;
    esac
    pack "$name"
    report || true
done

if report; then
    echo "== all trained: $out"
else
    echo "== more to do: carry $out/*.tar.gz in $carried, and run this again"
    exit 3
fi
