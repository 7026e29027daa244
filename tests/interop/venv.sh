# shellcheck shell=sh disable=SC2154
# The Python environment with torch, bitsandbytes, PEFT and transformers: for scripts that set `root` to the repository and source
# this.

# Prints the environment that QLORA_INTEROP_VENV names, or makes one with requirements.txt in target/interop.
interop_venv() {
    made=$root/target/interop/venv
    wanted=$root/tests/interop/requirements.txt
    if [ -z "${QLORA_INTEROP_VENV:-}" ] && ! cmp -s "$wanted" "$made/requirements.txt"; then
        {
            python3 -m venv --clear "$made" &&
                "$made/bin/python" -m pip install --quiet --disable-pip-version-check -r "$wanted" &&
                cp "$wanted" "$made/requirements.txt"
        } >&2 || return
    fi
    printf '%s\n' "${QLORA_INTEROP_VENV:-$made}"
}
