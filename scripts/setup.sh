#!/usr/bin/env bash
# Installs what Isopleth needs to build, where it is missing: a C compiler, pkg-config, GDAL (by apt-get)
# and Rust (by rustup). Safe to run again: with everything in place it takes well under a second.
#
#   scripts/setup.sh            what `make map` and `make test` call
#   scripts/setup.sh --lint     rustfmt and clippy too, what `make check` calls
#   scripts/setup.sh --cuda     pip and a C++ compiler too, which scripts/build-cuda.sh fetches and runs
#                               NVIDIA's compiler with; --lint --cuda is what `.ci/run` calls
#
# Rust goes where CARGO_HOME and RUSTUP_HOME say (default: ~/.cargo and ~/.rustup); no profile file is edited.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

GDAL_AT_LEAST=3.4
RUST_AT_LEAST=$(sed -n 's/^rust-version *= *"\(.*\)"/\1/p' Cargo.toml)
export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"

say() { printf 'setup: %s\n' "$*"; }
stop() { # what, then lines of help
    printf 'error: %s\n' "$1" >&2
    shift
    printf 'help: %s\n' "$@" >&2
    exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; } # version, minimum

# ---- system packages -------------------------------------------------------------------------

compiles() { echo '#include <stdio.h>' | cc -xc -fsyntax-only - 2>/dev/null; }
gdal_version() { pkg-config --modversion gdal 2>/dev/null || gdal-config --version 2>/dev/null; }
rust_version() { cargo --version 2>/dev/null | cut -d' ' -f2; }
rust_is_ready() { at_least "$(rust_version || true)" "$RUST_AT_LEAST" && rustc --version >/dev/null 2>&1; }

lint='' cuda=''
for option; do
    case "$option" in
    --lint) lint=yes ;;
    --cuda) cuda=yes ;;
    *) stop "scripts/setup.sh does not know $option" "--lint, --cuda" ;;
    esac
done

packages=()
have make || packages+=(make)
compiles || packages+=(gcc libc6-dev)
have pkg-config || packages+=(pkg-config)
gdal_version >/dev/null || packages+=(libgdal-dev)
# Certificates: without them neither rustup nor cargo can fetch anything.
[ -e /etc/ssl/certs/ca-certificates.crt ] || [ -n "${SSL_CERT_FILE:-}" ] || packages+=(ca-certificates)
rust_is_ready || have curl || packages+=(curl)
if [ $cuda ]; then
    python3 -m pip --version >/dev/null 2>&1 || packages+=(python3-pip)
    have c++ || packages+=(g++)
fi

if [ ${#packages[@]} -gt 0 ]; then
    have apt-get || stop "this system has no apt-get, so setup cannot install: ${packages[*]}" \
        "install a C compiler, make, pkg-config and the GDAL (>= $GDAL_AT_LEAST) development files by hand, then try again" \
        "Fedora: dnf install gcc make pkgconf gdal-devel    macOS: brew install pkg-config gdal"
    as_root=()
    if [ "$(id -u)" != 0 ]; then
        have sudo || stop "installing ${packages[*]} needs root, and there is no sudo" \
            "as root: apt-get install --no-install-recommends ${packages[*]}"
        as_root=(sudo)
    fi
    say "installing ${packages[*]} with apt-get"
    apt() { "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y "$@" </dev/null; }
    by_hand="as root: apt-get update && apt-get install --no-install-recommends ${packages[*]}"
    # Lists that are merely old often still serve, and an apt without network says so itself.
    apt update || say "apt-get update failed: trying with the package lists there are"
    apt install --no-install-recommends "${packages[@]}" ||
        stop "apt-get could not install ${packages[*]}: is this machine online?" "$by_hand"
fi

gdal=$(gdal_version) || stop "GDAL's development files are still not to be found" \
    "install libgdal-dev, and see that \`pkg-config --modversion gdal\` answers"
at_least "$gdal" "$GDAL_AT_LEAST" || stop "GDAL $gdal is too old: $GDAL_AT_LEAST or newer is needed" \
    "use Debian 12, Ubuntu 22.04 or newer"

# ---- Rust ------------------------------------------------------------------------------------

if ! rust_is_ready; then
    offline="rustup could not be fetched or could not fetch Rust: is this machine online?"
    by_hand="install Rust $RUST_AT_LEAST or newer from https://rustup.rs, then try again"
    found=$(rust_version || true)
    if have rustup; then
        say "Rust ${found:-without a toolchain} found, $RUST_AT_LEAST needed: installing the stable toolchain for this folder"
        rustup toolchain install stable --profile minimal --no-self-update || stop "$offline" "$by_hand"
        rustup override set stable
    else
        say "Rust ${found:-absent}, $RUST_AT_LEAST needed: installing it with rustup in ${CARGO_HOME:-$HOME/.cargo}"
        installer=$(mktemp)
        trap 'rm -f "$installer"' EXIT
        # The second address is the same script on the server that Rust itself comes from.
        for address in https://sh.rustup.rs https://static.rust-lang.org/rustup/rustup-init.sh; do
            fetched=yes
            curl --proto '=https' --tlsv1.2 --retry 2 --connect-timeout 20 -sSfL "$address" -o "$installer" && break
            fetched=no
        done
        [ $fetched = yes ] || stop "$offline" "$by_hand"
        # An older cargo of the system may stay: ours comes first in PATH here and in the Makefile.
        RUSTUP_INIT_SKIP_PATH_CHECK=yes sh "$installer" -y -q --profile minimal --no-modify-path \
            --default-toolchain stable </dev/null || stop "$offline" "$by_hand"
    fi
    hash -r
    rust_is_ready || stop "cargo is still older than $RUST_AT_LEAST: $(command -v cargo || echo none)" "$by_hand"
fi

if [ $lint ]; then
    for tool in fmt clippy; do
        cargo "$tool" --version >/dev/null 2>&1 && continue
        component=${tool/#fmt/rustfmt}
        have rustup || stop "cargo $tool is missing" "install the $component that belongs to $(cargo --version)"
        say "adding $component"
        rustup component add "$component"
    done
fi

say "ready: GDAL $gdal, Rust $(rust_version), $(cc --version | head -n 1)"
