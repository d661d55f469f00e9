#!/usr/bin/env bash
# Formatting and lints, with GDAL and without. With --cuda, only the lints of the feature `cuda`, for
# which its kernels are compiled.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Clippy learns new lints with every Rust: they are errors with the Rust this is developed on, and with
# another they are shown and stop nobody.
LINTED_WITH=1.95
deny=(-D warnings)
case "$(cargo --version)" in
"cargo $LINTED_WITH."*) ;;
*) deny=() && echo "lint: $(cargo --version) is not $LINTED_WITH: warnings are shown, and are no errors" ;;
esac

if [ "${1:-}" = --cuda ]; then
    # What has code of its own for it; kernels for one card, since none of them asks which it is on.
    CUDA_COMPUTE_CAP="${CUDA_COMPUTE_CAP:-90}" scripts/build-cuda.sh clippy --lib --bins --test contract_models --test contract_training -- "${deny[@]}"
    exit
fi

set -x
cargo fmt --check
cargo clippy --release --locked --all-targets -- "${deny[@]}"
cargo clippy --release --locked --no-default-features -- "${deny[@]}"
