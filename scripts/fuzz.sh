#!/bin/sh
# Fuzzes the readers of files. Usage: fuzz.sh [TARGET...]: gguf, safetensors, tokenizer, jsonl, adapter_config; all by default,
# one after the other.
#
# FUZZ_SECONDS  how long for each; by default half an hour.
#
# A C++ compiler is needed, and cargo-fuzz, which is installed where it is missing. What is found to be new goes to
# fuzz/corpus/TARGET, from which the next run goes on; a file that breaks a reader to fuzz/artifacts/TARGET. A reader is
# broken that panics, takes ten seconds, or allocates 64 MiB at once, for files of at most 64 KiB.
set -eu
cd "$(dirname "$0")/.."
seconds=${FUZZ_SECONDS:-1800}
[ $# -gt 0 ] || set -- gguf safetensors tokenizer jsonl adapter_config

complain() { printf 'fuzz: %s\n' "$*" >&2; }

if ! cargo fuzz --version >/dev/null 2>&1; then
    complain "installing cargo-fuzz"
    cargo install --locked cargo-fuzz
fi
# The address sanitizer is a matter of nightly compilers; this lets the stable one have it.
export RUSTC_BOOTSTRAP=1
# Files of a run go to memory where there is a folder for it, and with it when this ends.
if [ -d /dev/shm ]; then
    TMPDIR=$(mktemp -d /dev/shm/fuzz.XXXXXX)
    export TMPDIR
    trap 'rm -rf "$TMPDIR"' EXIT
    trap 'exit 1' HUP INT TERM
fi
for target; do
    mkdir -p "fuzz/corpus/$target"
    cargo fuzz build "$target"
    # One thread: the readers' own would only share files of a few bytes among them.
    RAYON_NUM_THREADS=1 cargo fuzz run "$target" "fuzz/corpus/$target" "fuzz/seeds/$target" -- \
        -dict="fuzz/dictionaries/$target.dict" -max_total_time="$seconds" -max_len=65536 \
        -timeout=10 -malloc_limit_mb=64 -rss_limit_mb=2048 -print_final_stats=1 || {
        complain "$target: stopped; a file that broke it is in fuzz/artifacts/$target"
        complain "again: RUSTC_BOOTSTRAP=1 cargo fuzz run $target FILE; smaller: cargo fuzz tmin $target FILE"
        exit 1
    }
done
