#!/bin/sh
# Measures the tables of docs/performance.md: on the CPU device beside bitsandbytes and llama.cpp's CPU backend, and on the lavapipe
# of Debian's unstable release beside llama.cpp's Vulkan backend. Usage: speed.sh; about ten minutes on two cores, which nothing
# else should use.
#
# Writes benches/results/{cpu,lavapipe}.{json,png} and prints these tables.
#
# QLORA  the command to measure; by default a release build is made.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
# shellcheck source=common.sh
. "$root/scripts/common.sh"
cd "$root"
# What would choose another device or other kernels.
unset QLORA_DEVICE QLORA_TIER QLORA_TUNE
sh scripts/peers.sh >&2
if [ -z "${QLORA:-}" ]; then
    check_cargo
    "$cargo" build --release --locked --bin qlora
    QLORA=target/release/qlora
fi
results=benches/results
mkdir -p "$results"

# Measures under the name $1; the arguments that follow are the command and its options.
measure() {
    name=$1
    shift
    complain "$name"
    "$@" --double-quant --m 1,8,512 --n 4096 --k 14336 --output "$results/$name.json" --plot "$results/$name.png" >&2
}

measure cpu "$QLORA" bench --device cpu --op forward,backward,step \
    --against target/peers/bitsandbytes --against target/peers/llama-cpp-cpu
measure lavapipe target/peers/on-lavapipe "$QLORA" bench --device llvmpipe --op forward,step \
    --against target/peers/llama-cpp-vulkan
python3 scripts/speed_table.py "$results/cpu.json" "$results/lavapipe.json"
