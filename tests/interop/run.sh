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

venv=${QLORA_INTEROP_VENV:-$work/venv}
if [ -z "${QLORA_INTEROP_VENV:-}" ] && ! cmp -s "$here/requirements.txt" "$venv/requirements.txt"; then
    python3 -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
    cp "$here/requirements.txt" "$venv/requirements.txt"
fi
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
    [ -d "$SID" ] || unpack_sid "$SID" llama.cpp
    SID_LOADER=$(loader_of "$SID")
    SID_LIBRARIES=$(find "$SID/usr/lib" -name '*.so*' -exec dirname {} + | sort -u | tr '\n' ':')
    # It looks for its code for CPUs beside the program, which is the loader here.
    find "$SID" -path '*/ggml/*' -name 'libggml-cpu-*.so' -exec cp -n {} "$(dirname -- "$SID_LOADER")" \;
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
