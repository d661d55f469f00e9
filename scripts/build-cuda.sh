#!/usr/bin/env bash
# Builds with the feature `cuda`, on a machine that need not have a GPU, a driver or a CUDA toolkit.
#
#   scripts/build-cuda.sh [build|test|check|clippy] [further arguments of cargo]
#   scripts/build-cuda.sh build --no-default-features     without GDAL, for a machine that has none
#   scripts/build-cuda.sh home                            only prepares, and says where CUDA_HOME is
#
# The compiler is that of an installed toolkit (CUDA_HOME, CUDA_PATH, or nvcc on PATH); where there is
# none, that of NVIDIA's wheels, through pip, in .cuda13 (or the folder that ISOPLETH_CUDA names).
# The result needs no CUDA library to start: what it calls is looked up when first called
# (scripts/cuda-standins.py), so one binary serves machines with and without a GPU.
#
# `check` and `clippy` compile every kernel of this repository and none of candle's, which cannot rot
# here; they share `target` with normal builds, since most of what they need lies there.
#
# Environment, all optional: CUDA_COMPUTE_CAP, the least card to serve (80: Ampere and all since);
# ALL_KERNELS=1 keeps candle's kernels for quantised networks and mixtures of experts, which nothing
# here calls; CARGO_TARGET_DIR (target/cuda, or target for check and clippy); PYTHON.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"

python="${PYTHON:-python3}"
folder="${ISOPLETH_CUDA:-$PWD/.cuda13}"
case "$(uname -sm)" in
    "Linux x86_64") ;;
    *) echo "error: scripts/build-cuda.sh knows Linux on x86-64 only; elsewhere install a CUDA toolkit and use cargo build --features cuda" >&2; exit 2 ;;
esac

# --- the compiler -----------------------------------------------------------------------------------
# Stay on 13.0: a driver refuses PTX of a newer CUDA than its own, and 13.0 is what drivers of the 580
# series know.
toolkit="${CUDA_HOME:-${CUDA_PATH:-}}"
if [ -z "$toolkit" ] && command -v nvcc >/dev/null; then
    toolkit="$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")"
fi
if [ -z "$toolkit" ]; then
    toolkit="$folder/nvidia/cu13"
    if [ ! -e "$folder/complete" ]; then
        mkdir -p "$folder"
        "$python" -m pip --version >/dev/null 2>&1 || {
            echo "error: there is no CUDA toolkit here, and no pip to fetch its compiler with" >&2
            echo "help: scripts/setup.sh --cuda installs pip; or set CUDA_HOME to a toolkit" >&2
            exit 2
        }
        PIP_ROOT_USER_ACTION=ignore "$python" -m pip install --quiet --disable-pip-version-check --upgrade \
            --no-deps --no-compile --only-binary=:all: --target "$folder" \
            nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 \
            nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 || {
            echo "error: NVIDIA's compiler could not be fetched with pip: is this machine online?" >&2
            echo "help: try again, or set CUDA_HOME to an installed toolkit of CUDA 13.0" >&2
            exit 2
        }
        touch "$folder/complete"
    fi
fi
[ -x "$toolkit/bin/nvcc" ] || { echo "error: there is no bin/nvcc in $toolkit; unset CUDA_HOME to use the one from PyPI" >&2; exit 2; }

# --- a CUDA_HOME to build with: this compiler, and stand-ins instead of libraries ------------------
home="$folder/home"
mkdir -p "$home/bin" "$home/lib64"
ln -sfn "$toolkit/include" "$home/include"

# candle links `cudart`: the static runtime, under that name.
runtime=""
for lib in lib lib64 targets/x86_64-linux/lib; do
    [ ! -e "$toolkit/$lib/libcudart_static.a" ] || runtime="$toolkit/$lib/libcudart_static.a"
done
[ -n "$runtime" ] || { echo "error: there is no libcudart_static.a in $toolkit" >&2; exit 2; }
ln -sfn "$runtime" "$home/lib64/libcudart.a"

cudarc="$(cargo metadata --locked --format-version 1 --features cuda --filter-platform x86_64-unknown-linux-gnu |
    "$python" -c 'import json, os, sys
packages = json.load(sys.stdin)["packages"]
print(next(os.path.dirname(p["manifest_path"]) for p in packages if p["name"] == "cudarc"))')"
"$python" scripts/cuda-standins.py "$cudarc" "$home/lib64"

# Puts a script of standard input in place, untouched if it says the same: build scripts look at its date.
install_script() {
    cat > "$1.tmp"
    chmod +x "$1.tmp"
    if cmp -s "$1.tmp" "$1"; then rm "$1.tmp"; else mv "$1.tmp" "$1"; fi
}

# nvcc, with an empty file in place of the kernels that nothing here calls.
install_script "$home/bin/nvcc" <<WRAPPER
#!/usr/bin/env bash
set -u
arguments=("\$@")
if [ -z "\${ALL_KERNELS:-}" ]; then
    empty="\$(mktemp -d)"
    trap 'rm -rf "\$empty"' EXIT
    for i in "\${!arguments[@]}"; do
        name="\${arguments[\$i]##*/}"
        case "\$name" in
            mmq_*.cu | mmvq_*.cu | moe_*.cu | quantized.cu)
                : > "\$empty/\$name"
                arguments[\$i]="\$empty/\$name" ;;
        esac
    done
fi
"$toolkit/bin/nvcc" "\${arguments[@]}"
WRAPPER

# nvcc for checking: what other packages compile comes out empty, at once. Their build script keeps a
# list of what it has compiled; it goes, so that no later build takes these files for the real ones.
install_script "$home/bin/nvcc-check" <<WRAPPER
#!/usr/bin/env bash
set -eu
case "\${CARGO_MANIFEST_DIR:-}" in "" | "$PWD") exec "$toolkit/bin/nvcc" "\$@" ;; esac
out="" folder=. what="" last=""
while [ \$# -gt 0 ]; do
    case "\$1" in
        -o) out="\$2"; shift ;;
        --output-directory) folder="\$2"; shift ;;
        --ptx | -ptx | --lib | -lib | -c) what="\${1##*-}" ;;
        *.cu) last="\${1##*/}" ;;
    esac
    shift
done
case "\$what" in
    ptx) : > "\${out:-\$folder/\${last%.cu}.ptx}" ;;
    c) : > "\$out" ;;
    lib) rm -f "\$out" "\${OUT_DIR:-.}/.cudaforge_cache.json"; ar rcs "\$out" ;;
    *) exec "$toolkit/bin/nvcc" --version ;;
esac
WRAPPER

# --- cargo ------------------------------------------------------------------------------------------
verb="${1:-build}"
[ $# = 0 ] || shift
case "$verb" in
    check | clippy) nvcc="$home/bin/nvcc-check" target=target ;;
    *) nvcc="$home/bin/nvcc" target=target/cuda ;;
esac
unset CUDA_PATH CUDA_ROOT CUDA_TOOLKIT_ROOT_DIR
export CUDA_HOME="$home" NVCC="$nvcc" CUDA_COMPUTE_CAP="${CUDA_COMPUTE_CAP:-80}"
export CUDARC_CUDA_VERSION=13000 # else it is guessed from what nvcc says
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$target}"
if [ "$verb" = home ]; then
    echo "$home"
    exit
fi
cargo "$verb" --release --locked --features cuda "$@"
