#!/bin/sh
# Kills a training run, or lets a system call fail, at the calls that touch its files, and resumes it: cli/examples/faults.rs.
# Usage: faults.sh [--full] [kill|eio]...
#
# A sample of the calls, about two minutes on two cores; --full: all of them. Needs Linux and strace, which Debian and Ubuntu get
# where it is missing.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
# shellcheck source=common.sh
. "$root/scripts/common.sh"
check_cargo

if ! command -v strace >/dev/null 2>&1; then
    if command -v apt-get >/dev/null 2>&1; then
        say "no strace: installing it with apt-get"
        apt_install strace || complain "that did not work"
    fi
    if ! command -v strace >/dev/null 2>&1; then
        complain "strace is missing: install your system's package of that name (there is one for Linux only)"
        exit 1
    fi
fi
cd "$root"
"$cargo" build --quiet --locked --bin qlora --example faults
exec "$cargo" run --quiet --locked --example faults -- "$@"
