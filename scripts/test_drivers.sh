#!/bin/sh
# Runs the tests of kernels, layers, models and training on software drivers, one after the other.
# Usage: test_drivers.sh [STACK...]; all of them but `coop` by default.
#
# lavapipe      the system's Mesa through Vulkan
# llvmpipe-gl   the system's Mesa through OpenGL
# swiftshader   SwiftShader through Vulkan, out of Debian's package chromium-common
# lavapipe-sid  the Mesa of Debian's unstable release through Vulkan, with every library that it needs, libc included
# coop          that in the tier cooperative-matrix alone, and only the tests of what this tier changes: some minutes
#
# The first two are installed where they are missing, with apt-get. The packages of the others come from the mirror of
# the system's own sources, checked with Debian's keys; they are unpacked in target/drivers and not installed. What is
# there already is used again: remove that folder for newer ones.
#
# A stack that cannot be set up is skipped, and the reason said. Fails if a test did, with status 3 if there was nothing but
# skipped ones. On two cores the first four take about half an hour. tests/model/smollm2.rs runs where `make smollm2` has fetched its model.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
# shellcheck source=common.sh
. "$root/scripts/common.sh"
# shellcheck source=packages.sh
. "$root/scripts/packages.sh"
cd "$root"
cache=$root/target/drivers

[ $# -gt 0 ] || set -- lavapipe llvmpipe-gl swiftshader lavapipe-sid
for stack; do
    case $stack in
    lavapipe | llvmpipe-gl | swiftshader | lavapipe-sid | coop) ;;
    *)
        complain "no stack $stack; usage: test_drivers.sh [lavapipe] [llvmpipe-gl] [swiftshader] [lavapipe-sid] [coop]"
        exit 2
        ;;
    esac
done

# What would choose other devices, tests or variants of kernels; each stack says what it means.
export QLORA_TUNE=0
unset QLORA_DEVICE QLORA_TIER QLORA_TEST_DEVICES VK_DRIVER_FILES VK_ICD_FILENAMES VK_ADD_DRIVER_FILES WGPU_BACKEND
# Mesa's GL driver complains where this is unset.
export XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-/tmp}"

# ---- Packages ----

# Fetches the stack; what apt-get says goes to a file.
fetch() {
    if ! command -v apt-get >/dev/null 2>&1 || ! command -v dpkg-deb >/dev/null 2>&1; then
        reason="its packages need apt-get and dpkg-deb, which Debian and Ubuntu have"
        return 1
    fi
    mkdir -p "$cache/logs"
    log=$cache/logs/$stack.apt
    say "$stack: fetching its packages with apt-get"
    case $stack in
    swiftshader) fetch_swiftshader ;;
    lavapipe-sid) unpack_mesa "$cache/$stack" ;;
    esac >"$log" 2>&1 && return
    reason="apt-get did not fetch its packages: $(grep -m 1 '^[EW]: ' "$log" || tail -n 1 "$log") (see $log)"
    return 1
}

fetch_swiftshader() {
    apt_of system update && unpack "$cache/$stack" system chromium-common
}

# ---- Stacks: each sets the environment, `loader` and `origin` where it needs them, or `reason` and fails ----

# Installs $1, the packages $2.
install_missing() {
    if ! command -v apt-get >/dev/null 2>&1; then
        reason="no $1, and no apt-get to install it with"
        return 1
    fi
    say "$stack: no $1: installing $2 with apt-get"
    apt_install "$2" && return
    reason="apt-get did not install $2"
    return 1
}

vulkan() {
    # The second name is what older loaders know.
    export WGPU_BACKEND=vulkan VK_DRIVER_FILES="$1" VK_ICD_FILENAMES="$1"
}

set_up_lavapipe() {
    set -- /usr/share/vulkan/icd.d/lvp_icd*.json
    if [ ! -f "$1" ]; then
        install_missing lavapipe "libvulkan1 mesa-vulkan-drivers" || return
        set -- /usr/share/vulkan/icd.d/lvp_icd*.json
    fi
    # There may be one for each architecture; the loader takes what it can load.
    vulkan "$(IFS=: && echo "$*")"
}

set_up_llvmpipe_gl() {
    export WGPU_BACKEND=gl LIBGL_ALWAYS_SOFTWARE=1
    probe || install_missing llvmpipe "libegl1 libgl1-mesa-dri libgles2"
}

set_up_swiftshader() {
    [ -d "$cache/$stack" ] || fetch || return
    # With the Vulkan loader that comes along.
    export LD_LIBRARY_PATH="$cache/$stack/usr/lib/chromium"
    origin=" ($(grep '^chromium-common ' "$cache/$stack/packages"))"
    vulkan "$cache/$stack/usr/lib/chromium/vk_swiftshader_icd.json"
}

set_up_lavapipe_sid() {
    [ -d "$cache/$stack" ] || fetch || return
    loader=$(loader_of "$cache/$stack")
    libraries=$(dirname -- "$loader")
    vulkan "$(lavapipe_of "$cache/$stack")"
}

# ---- Tests ----

# Runs a program as the stack wants it: through the dynamic linker of the libraries that it brings along, where it does.
launch() {
    if [ -n "$loader" ]; then
        "$loader" --library-path "$libraries" "$@"
    else
        "$@"
    fi
}

# Prints the paths of what cargo built: that of the test program (or command) $1.
built() {
    sed -n "s/.*\"name\":\"$1\".*\"executable\":\"\([^\"]*\)\".*/\1/p" "$cache/built" | tail -n 1
}

# Sets `adapter` to what `qlora devices` says of the stack's only adapter, a software driver.
probe() {
    adapter=$(launch "$(built qlora)" devices --json 2>/dev/null | sed '1,/"index": 1,/d')
    case $adapter in
    *'"index": 2,'*) return 1 ;;
    *'"kind": "software"'*) ;;
    *) return 1 ;;
    esac
}

# The value of $1, a text, in what `probe` found.
field() { printf '%s\n' "$adapter" | sed -n "s/^ *\"$1\": \"\(.*\)\",*\$/\1/p" ; }

# Whether `probe` found the words $1, and what to call it: $2, or "no $2".
has() {
    case $adapter in
    *"$1"*) printf %s "$2" ;;
    *) printf %s "no ${3:-$2}" ;;
    esac
}

# Runs the test program $1 with the arguments that follow, and adds to `passed` and `failed`.
run_tests() {
    name=$1
    program=$(built "$name")
    shift
    log=$cache/logs/$stack.$name
    status=0
    for filter in "$@"; do
        # Tests that were renamed would be left out without a word.
        if ! launch "$program" --list "$filter" 2>/dev/null | grep -q ': test$'; then
            complain "$stack: $name has no test called $filter"
            failed=$((failed + 1))
            return
        fi
    done
    launch "$program" "$@" >"$log" 2>&1 || status=$?
    counts=$(sed -n 's/^test result: .* \([0-9]*\) passed; \([0-9]*\) failed.*/\1 \2/p' "$log")
    case $counts in
    '' | '0 0')
        complain "$stack: $name ended with status $status, and no tests did: see $log"
        failed=$((failed + 1))
        return
        ;;
    esac
    passed=$((passed + ${counts% *})) failed=$((failed + ${counts#* }))
    if [ "$status" -ne 0 ]; then
        complain "$stack: $name failed: see $log"
        sed -n 's/^test \(.*\) \.\.\. FAILED$/    \1/p' "$log" >&2
    fi
}

# Sets up the stack and tests on it; in a process of its own, for the environment. Status 3: skipped.
run_stack() {
    loader="" origin="" reason="" tier="" passed=0 failed=0
    if [ "$stack" = coop ]; then
        # The same packages.
        stack=lavapipe-sid tier=cooperative-matrix
    fi
    case $stack in
    lavapipe) set_up_lavapipe ;;
    llvmpipe-gl) set_up_llvmpipe_gl ;;
    swiftshader) set_up_swiftshader ;;
    lavapipe-sid) set_up_lavapipe_sid ;;
    esac && { probe || reason="wgpu does not find its driver"; }
    if [ -n "$reason" ]; then
        say "$stack: skipped: $reason"
        return 3
    fi
    mkdir -p "$cache/logs"
    start=$(date +%s)
    if [ -n "$tier" ]; then
        # Which asks for tiers itself.
        run_tests device
        export QLORA_TIER="$tier"
        run_tests layers adapters:: backward::
        run_tests model golden::
        run_tests train golden::
        run_tests qlora_wgpu kernels::qmatmul kernels::lora:: kernels::attention kernels::loss::linear_cross_entropy \
            kernels::rows bench::
    else
        run_tests device
        run_tests layers
        # Of the real model's tests those on a GPU; the others ask the CPU.
        real=""
        if [ -f "${QLORA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/qlora-wgpu}/SmolLM2-135M-Instruct.Q4_1.gguf" ]; then
            real=smollm2::a_gpu
        fi
        # shellcheck disable=SC2086 # or none
        run_tests model golden:: $real
        run_tests train golden::
        run_tests qlora_wgpu kernels:: autograd:: nn:: optim:: train:: generate:: tensor:: device:: bench:: formats::gguf::
    fi
    # shellcheck disable=SC2046 # two numbers
    set -- $(printf '%s\n' "$adapter" | sed -n '/"subgroup_sizes"/,/]/p' | tr -cs '0-9' ' ')
    sizes=$1
    [ "$1" -eq "$2" ] || sizes="$1 to $2"
    say "$stack: ${tier:+tier $tier alone, }$(field name), driver $(field driver)$origin;" \
        "$(has '"subgroup"' "subgroups of $sizes" subgroups), $(has '"f16"' f16)," \
        "$(has '"cooperative_matrix": true' 'cooperative matrices');" \
        "$passed passed, $failed failed; $(($(date +%s) - start)) s"
    [ "$failed" -eq 0 ]
}

check_cargo
mkdir -p "$cache"
"$cargo" build --bin qlora --message-format=json >"$cache/built"
"$cargo" test --no-run --lib --test device --test layers --test model --test train --message-format=json \
    >>"$cache/built"
tested=0 status=0
for stack; do
    result=0
    (run_stack) || result=$?
    case $result in
    3) ;;
    0) tested=$((tested + 1)) ;;
    *) tested=$((tested + 1)) status=1 ;;
    esac
done
if [ "$tested" -eq 0 ]; then
    [ $# -eq 1 ] || complain "no stack could be set up: nothing was tested"
    exit 3
fi
exit "$status"
