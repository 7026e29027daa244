#!/bin/sh
# Checks our files in other programs. Usage: run.sh [CHECK...]: peft_adapters, bitsandbytes_checkpoints, merged_models, llama_cpp;
# all by default.
#
# QLORA_INTEROP_VENV  a Python environment with requirements.txt; by default one in target/interop is made.
# QLORA               the command to check; by default a release build is made.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
root=$(CDPATH='' cd -- "$here/../.." && pwd)
work=$root/target/interop
[ $# -gt 0 ] || set -- peft_adapters bitsandbytes_checkpoints merged_models llama_cpp
mkdir -p "$work" "$here/results"

# shellcheck source=venv.sh
. "$here/venv.sh"
venv=$(interop_venv)
if [ -z "${QLORA:-}" ]; then
    (cd "$root" && "${CARGO:-cargo}" build --release --locked --bin qlora)
    QLORA=$root/target/release/qlora
fi
export QLORA
# Nothing here is on the hub, and a GPU would compute in other precisions.
export HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES='' QLORA_DEVICE=cpu

# llama.cpp of Debian sid, which runs through the dynamic linker that comes with it.
prepare_llama_cpp() {
    cache=$work
    # shellcheck source=../../scripts/packages.sh
    . "$root/scripts/packages.sh"
    SID=$work/sid
    unpack_llama_cpp "$SID"
    SID_LOADER=$(loader_of "$SID")
    SID_LIBRARIES=$(libraries_of "$SID")
    export SID SID_LOADER SID_LIBRARIES
}

failed=
for check; do
    echo "== $check"
    case $check in
    merged_models | llama_cpp)
        SMOLLM2=$(sh "$root/scripts/smollm2.sh")
        export SMOLLM2
        ;;
    esac
    if [ "$check" = llama_cpp ]; then
        prepare_llama_cpp
    fi
    if "$venv/bin/python" "$here/$check.py" "$work" >"$work/$check.txt"; then
        { date -u +%Y-%m-%d && cat "$work/$check.txt"; } >"$here/results/$check.txt"
        cat "$work/$check.txt"
    else
        cat "$work/$check.txt"
        failed="$failed $check"
    fi
done
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
