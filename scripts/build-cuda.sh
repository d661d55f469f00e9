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
# Environment, all optional: CUDA_COMPUTE_CAP, the least card to serve (80: Ampere and all since);
# ALL_KERNELS=1 keeps candle's kernels for quantised networks and mixtures of experts, which nothing
# here calls; CARGO_TARGET_DIR (target/cuda: normal builds are left alone); PYTHON.
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
        "$python" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --upgrade \
            --no-deps --no-compile --only-binary=:all: --target "$folder" \
            nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 \
            nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
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

# nvcc, with an empty file in place of the kernels that nothing here calls.
cat > "$home/bin/nvcc.tmp" <<WRAPPER
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
chmod +x "$home/bin/nvcc.tmp"
# Untouched if it says the same: build scripts look at its date.
if cmp -s "$home/bin/nvcc.tmp" "$home/bin/nvcc"; then
    rm "$home/bin/nvcc.tmp"
else
    mv "$home/bin/nvcc.tmp" "$home/bin/nvcc"
fi

# --- cargo ------------------------------------------------------------------------------------------
unset CUDA_PATH CUDA_ROOT CUDA_TOOLKIT_ROOT_DIR
export CUDA_HOME="$home" NVCC="$home/bin/nvcc" CUDA_COMPUTE_CAP="${CUDA_COMPUTE_CAP:-80}"
export CUDARC_CUDA_VERSION=13000 # else it is guessed from what nvcc says
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target/cuda}"
verb="${1:-build}"
[ $# = 0 ] || shift
if [ "$verb" = home ]; then
    echo "$home"
    exit
fi
cargo "$verb" --release --locked --features cuda "$@"
