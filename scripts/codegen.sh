#!/bin/sh
# Compiles every kernel to the machine code of GPUs that are not there, and says which rules it breaks: scripts/codegen/main.rs, which
# lists them. Usage: codegen.sh [OPTION...]; some minutes on two cores.
#
# --gpu NAME      of navi21, navi31, gfx1201 (AMD, by RADV), ampere (NVIDIA, by NVK), m1 (Apple, by Honeykrisp), adreno (by Turnip); all by
#                 default
# --kernel PART   only kernels with this part in their names; --label PART, or '!PART', only variants with it or without
# --show KERNEL   statistics and loops of a kernel's variants
# --keep FOLDER   keep the listings there
# --table         a line for each kernel and GPU: registers, subgroups, measure
# --all           every broken rule, not only the worst of a kernel
# --update        write the measures to scripts/codegen/table.json, which the next run compares with
#
# Mesa is that of Debian's unstable release, as `make test-coop` has it, and mesa-drm-shim, which feigns the GPUs, comes from there
# too; both are unpacked in target/drivers and not installed. Status 3 if they could not be fetched; 1 if a rule is broken.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
# shellcheck source=common.sh
. "$root/scripts/common.sh"
# shellcheck source=packages.sh
. "$root/scripts/packages.sh"
cd "$root"
cache=$root/target/drivers
mesa=$cache/lavapipe-sid
shims=$cache/drm-shim

if [ ! -d "$mesa" ] || [ ! -d "$shims" ]; then
    if ! command -v apt-get >/dev/null 2>&1 || ! command -v dpkg-deb >/dev/null 2>&1; then
        complain "skipped: its packages need apt-get and dpkg-deb, which Debian and Ubuntu have"
        exit 3
    fi
    say "fetching its packages with apt-get"
    mkdir -p "$cache/logs"
    log=$cache/logs/codegen.apt
    if ! { unpack_mesa "$mesa" && unpack_drm_shim "$shims"; } >"$log" 2>&1; then
        complain "skipped: apt-get did not fetch its packages: $(grep -m 1 '^[EW]: ' "$log" || tail -n 1 "$log") (see $log)"
        exit 3
    fi
fi
check_cargo
"$cargo" build --quiet --locked --package qlora-wgpu --features testing --example codegen
exec "$cargo" run --quiet --locked --package qlora-wgpu --features testing --example codegen -- --mesa "$mesa" --shims "$shims" "$@"
