#!/bin/sh
# Measures everything about this machine's GPU: `qlora bench --hardware`, beside torch's products where torch is there and finds the
# GPU. Usage: hardware.sh [OPTION...], options of that command; ten minutes or so.
#
# Writes benches/results/<card>.json, prints the tables of docs/performance.md, and says how to send the file to the project. A machine without Rust
# needs the command alone: qlora bench --hardware.
#
# QLORA  the command to measure; by default a release build is made.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
# shellcheck source=common.sh
. "$root/scripts/common.sh"
cd "$root"
if [ -z "${QLORA:-}" ]; then
    check_cargo
    "$cargo" build --release --locked --bin qlora
    QLORA=${CARGO_TARGET_DIR:-target}/release/qlora
fi
mkdir -p benches/results
has_gpu='import sys, torch; sys.exit(not (torch.cuda.is_available() or torch.backends.mps.is_available()))'
if python3 -c "$has_gpu" >/dev/null 2>&1; then
    set -- --ceilings "python3 benches/peers/torch_ceilings.py" "$@"
else
    say "python3 has no torch that finds a GPU: no shares of its bf16 product"
fi
exec "$QLORA" bench --hardware --output benches/results "$@"
