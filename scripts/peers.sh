#!/bin/sh
# Sets up the programs of benches/peers that `qlora bench --against` times beside us, and prints how each is run.
# Usage: peers.sh [PEER...]; bitsandbytes, llama-cpp and lavapipe, all by default.
#
# bitsandbytes  bitsandbytes with PEFT, in a Python environment: that of tests/interop with its versions (6 GB), made where
#               QLORA_INTEROP_VENV names none
# llama-cpp     llama.cpp's CPU and Vulkan backends, the latter on lavapipe; out of packages of Debian's unstable release, which
#               are unpacked in target and not installed
# lavapipe      that lavapipe for us: target/peers/on-lavapipe runs a program on it
#
# Each becomes a command in target/peers. One that cannot be set up is left out, with the reason; then the status is 1.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
# shellcheck source=common.sh
. "$root/scripts/common.sh"
# shellcheck source=packages.sh
. "$root/scripts/packages.sh"
# shellcheck source=../tests/interop/venv.sh
. "$root/tests/interop/venv.sh"
cd "$root"
peers=target/peers
llama=$root/target/interop/sid
mesa=$root/target/drivers/lavapipe-sid
mkdir -p "$peers" target/interop target/drivers

# Makes the command $1 of the shell line on standard input.
command_of() {
    { printf '#!/bin/sh\n' && cat; } >"$peers/$1"
    chmod +x "$peers/$1"
}

# Fetches packages with $1, a function of packages.sh, in the folder $2; what apt-get says goes to a file.
fetched() {
    if ! command -v apt-get >/dev/null 2>&1 || ! command -v dpkg-deb >/dev/null 2>&1; then
        complain "its packages need apt-get and dpkg-deb, which Debian and Ubuntu have"
        return 1
    fi
    cache=$(dirname -- "$2")
    "$1" "$2" >"$peers/$1.log" 2>&1 && return
    complain "apt-get did not fetch its packages: see $peers/$1.log"
    return 1
}

# What a program needs to find lavapipe, and nothing else. llama.cpp takes no device that is a CPU unless told so.
lavapipe_environment() {
    printf "export VK_DRIVER_FILES='%s' GGML_VK_VISIBLE_DEVICES=0 XDG_RUNTIME_DIR=\"\${XDG_RUNTIME_DIR:-/tmp}\"\n" "$(lavapipe_of "$mesa")"
}

set_up_bitsandbytes() {
    python=$(interop_venv)/bin/python || return
    "$python" -c 'import bitsandbytes, peft, torch, transformers' || return
    printf "exec '%s' '%s'\n" "$python" "$root/benches/peers/bitsandbytes_peft.py" | command_of bitsandbytes
    say "qlora bench --device cpu --double-quant --against $peers/bitsandbytes"
}

set_up_llama_cpp() {
    fetched unpack_llama_cpp "$llama" || return
    fetched unpack_mesa "$mesa" || return
    program="'$(loader_of "$llama")' --library-path '$(libraries_of "$llama")$(libraries_of "$mesa")'"
    program="$program '$(find "$llama/usr" -name test-backend-ops)'"
    # "llama.cpp 1:0.7.0+dfsg-2"
    release=$(sed -n 's/^llama\.cpp \([0-9]*:\)*\([0-9.]*\).*/\2/p' "$llama/packages")
    peer="exec python3 '$root/benches/peers/llama_cpp.py' --release '$release'"
    printf '%s --backend CPU %s\n' "$peer" "$program" | command_of llama-cpp-cpu
    { lavapipe_environment && printf '%s --backend Vulkan0 %s\n' "$peer" "$program"; } | command_of llama-cpp-vulkan
    say "qlora bench --device cpu --n 4096 --k 14336 --against $peers/llama-cpp-cpu"
    say "$peers/on-lavapipe qlora bench --device llvmpipe --n 4096 --k 14336 --against $peers/llama-cpp-vulkan"
}

set_up_lavapipe() {
    fetched unpack_mesa "$mesa" || return
    {
        lavapipe_environment
        # Through the dynamic linker, which takes no names on PATH.
        printf "program=\$(command -v \"\$1\") && shift && exec '%s' --library-path '%s' \"\$program\" \"\$@\"\n" \
            "$(loader_of "$mesa")" "$(libraries_of "$mesa")"
    } | command_of on-lavapipe
}

[ $# -gt 0 ] || set -- bitsandbytes lavapipe llama-cpp
status=0
for peer; do
    case $peer in
    bitsandbytes) set_up_bitsandbytes ;;
    llama-cpp) set_up_llama_cpp ;;
    lavapipe) set_up_lavapipe ;;
    *)
        complain "no peer $peer; usage: peers.sh [bitsandbytes] [llama-cpp] [lavapipe]"
        exit 2
        ;;
    esac || {
        complain "$peer is left out"
        status=1
    }
done
exit "$status"
