# shellcheck shell=sh disable=SC2154
# For the scripts here, which set `root` to the repository and source this.

me=$(basename -- "$0" .sh)
say() { printf '%s: %s\n' "$me" "$*"; }
complain() { printf '%s: %s\n' "$me" "$*" >&2; }

# Ends the script unless there is a cargo that is new enough; `cargo` is then its name.
check_cargo() {
    cargo=${CARGO:-cargo}
    wanted=$(sed -n 's/^rust-version *= *"\([0-9.]*\)".*/\1/p' "$root/Cargo.toml")
    if ! command -v "$cargo" >/dev/null 2>&1; then
        complain "$cargo not found. Install Rust $wanted or newer: from https://rustup.rs, or your distribution's package if it is that new."
        if [ -x "${CARGO_HOME:-${HOME:-}/.cargo}/bin/cargo" ]; then
            complain "There is one in ${CARGO_HOME:-$HOME/.cargo}/bin: add that folder to PATH."
        fi
        exit 1
    fi
    # "cargo 1.88.0 (873a06493 2025-05-10)"; run in the repository, where rustup picks its toolchain.
    if ! version=$(cd "$root" && "$cargo" --version); then
        complain "\`$cargo --version\` fails. If rustup has no toolchain yet: rustup default stable"
        exit 1
    fi
    version=${version#cargo }
    version=${version%% *}
    version=${version%%-*}
    if ! at_least "$version" "$wanted"; then
        complain "cargo $version is too old: Rust $wanted or newer is needed. With rustup: rustup update stable. Otherwise install it from https://rustup.rs"
        exit 1
    fi
}

# Whether version $1 (MAJOR.MINOR...) is at least $2.
at_least() {
    major=${1%%.*} minor=${1#*.} wanted_major=${2%%.*} wanted_minor=${2#*.}
    minor=${minor%%.*} wanted_minor=${wanted_minor%%.*}
    [ "$major" -gt "$wanted_major" ] || { [ "$major" -eq "$wanted_major" ] && [ "$minor" -ge "$wanted_minor" ]; }
}

# Runs a command as root; fails where that is not allowed. sudo may ask for a password only where someone can answer.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif ! command -v sudo >/dev/null 2>&1; then
        complain "this needs root, and there is no sudo"
        return 1
    elif [ -t 0 ] && [ -t 2 ]; then
        sudo "$@"
    else
        sudo -n "$@"
    fi
}

# Installs the packages $1 with apt-get.
apt_install() {
    # An update that fails (for a third party's repository, say) need not stop the installation.
    as_root env DEBIAN_FRONTEND=noninteractive sh -c \
        "apt-get update -qq || echo 'apt-get update failed' >&2; apt-get install -y -qq --no-install-recommends $1"
}
