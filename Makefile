# Two commands: `make map` and `make test`. Each installs what is missing first (scripts/setup.sh).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
# Where rustup puts cargo, for shells that have not been told.
export PATH := $(or $(CARGO_HOME),$(HOME)/.cargo)/bin:$(PATH)

.PHONY: map test check setup

# Maps the bundled survey of an invented country (data/README.md) with the bundled model into out/.
map: setup
	cargo build --release --locked
	target/release/isopleth map --surveys data/survey.csv --like data/grid.tif --threshold 0.2 --out out --force

# Every test, doc tests too; then the count.
test: setup
	@scripts/test.sh

# Formatting and lints.
check:
	@scripts/setup.sh --lint
	@scripts/lint.sh

setup:
	@scripts/setup.sh
