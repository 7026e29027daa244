#!/bin/sh
# Sets up what a build and a run need, and says in one line what it did. Usage: setup.sh [demo|test|bench]
#
# cargo     must be there, at least as new as Cargo.toml's rust-version.
# a driver  On Linux wgpu needs Vulkan's loader and one driver. Where either is missing, Debian and Ubuntu get Mesa's
#           (with lavapipe, which runs on the CPU); elsewhere this says what to install. macOS and Windows have theirs.
#
# pip       is wanted for `test` alone, to fetch a model; Debian and Ubuntu get python3-pip where it is missing.
#
# Without a driver this fails, except for `demo` and `bench`, which then go on with the CPU device alone, and for `test`
# with QLORA_TEST_DEVICES=cpu, which asks for no adapter.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
goal=${1:-setup}
case $goal in
setup | demo | test | bench) ;;
*)
    echo "usage: setup.sh [demo|test|bench]" >&2
    exit 2
    ;;
esac

# shellcheck source=common.sh
. "$root/scripts/common.sh"

# ---- Vulkan ----

# Whether the dynamic linker would find the library named $1.
library_found() {
    case $linker_cache in
    *"$1 "*) return 0 ;;
    esac
    IFS=:
    for folder in ${LD_LIBRARY_PATH:-} /usr/lib /usr/lib64 /lib /lib64 /usr/local/lib /usr/lib/*-linux-* /run/opengl-driver/lib; do
        if [ -n "$folder" ] && [ -e "$folder/$1" ]; then
            unset IFS
            return 0
        fi
    done
    unset IFS
    return 1
}

# Whether $1 is a driver's manifest whose library exists.
manifest_works() {
    [ -f "$1" ] && [ -r "$1" ] || return 1
    library=$(sed -n 's/.*"library_path"[[:space:]]*:[[:space:]]*"\([^"]*\)".*/\1/p' "$1" | head -n 1 | sed 's/\\//g')
    case $library in
    '') return 1 ;;
    /*) [ -e "$library" ] ;;
    */*) [ -e "$(dirname -- "$1")/$library" ] ;;
    *) library_found "$library" ;;
    esac
}

# Sets `driver` to the first working manifest of the places in $1 (separated by colons; manifests, or folders of them).
find_manifest() {
    IFS=:
    # shellcheck disable=SC2086 # split at the colons, and at nothing else
    set -- $1
    unset IFS
    for place; do
        if [ -d "$place" ]; then
            for manifest in "$place"/*.json; do
                if manifest_works "$manifest"; then
                    driver=$manifest
                    return 0
                fi
            done
        elif manifest_works "$place"; then
            driver=$place
            return 0
        fi
    done
    return 1
}

# The loader's search, as in its LoaderDriverInterface.md. Sets `driver`, or says why not in `missing`.
find_driver() {
    linker_cache=$(PATH="$PATH:/sbin:/usr/sbin" ldconfig -p 2>/dev/null || true)
    missing="no Vulkan loader (libvulkan.so.1)"
    library_found libvulkan.so.1 || return 1
    missing="no Vulkan driver"
    if [ -n "$forced" ]; then
        find_manifest "$forced"
        return
    fi
    places=${VK_ADD_DRIVER_FILES:-}:${XDG_CONFIG_HOME:-${HOME:-}/.config}/vulkan/icd.d
    places=$places:${XDG_DATA_HOME:-${HOME:-}/.local/share}/vulkan/icd.d
    IFS=:
    for base in ${XDG_CONFIG_DIRS:-/etc/xdg} ${XDG_DATA_DIRS:-} /etc /usr/local/share /usr/share /usr/local/etc /run/opengl-driver/share; do
        places=$places:$base/vulkan/icd.d
    done
    unset IFS
    find_manifest "$places"
}

packages="libvulkan1 mesa-vulkan-drivers"

install_debian() {
    say "$missing: installing $packages (Mesa, with the software driver lavapipe) with apt-get"
    apt_install "$packages"
}

# Prints the command that installs a driver by hand on Linux.
by_hand() {
    # shellcheck source=/dev/null
    like=" $(if [ -r /etc/os-release ]; then . /etc/os-release && echo "${ID:-} ${ID_LIKE:-}"; fi) "
    case $like in
    *\ debian\ * | *\ ubuntu\ *) command="apt-get update && apt-get install -y $packages" ;;
    *\ fedora\ * | *\ rhel\ *) command="dnf install vulkan-loader mesa-vulkan-drivers" ;;
    *\ arch\ *) command="pacman -S vulkan-icd-loader vulkan-swrast" ;;
    *\ opensuse* | *\ suse\ *) command="zypper install libvulkan1 libvulkan_lvp" ;;
    *\ alpine\ *) command="apk add vulkan-loader mesa-vulkan-swrast" ;;
    *)
        echo "your system's packages of the Vulkan loader (libvulkan.so.1) and of a driver: the GPU's own, or Mesa's lavapipe"
        return
        ;;
    esac
    if [ "$(id -u)" -eq 0 ]; then
        echo "$command"
    elif command -v sudo >/dev/null 2>&1; then
        echo "sudo $command" | sed 's/ && / \&\& sudo /'
    else
        echo "su - -c '$command'"
    fi
}

# Whether what is missing is a driver that the environment names: no package would help.
forced_wrong() {
    [ -n "$forced" ] && [ "$missing" = "no Vulkan driver" ]
}

check_driver() {
    case $(uname -s) in
    Darwin)
        say "nothing to install: Metal is part of macOS"
        return
        ;;
    MINGW* | MSYS* | CYGWIN* | Windows*)
        say "nothing to install: DirectX 12 is part of Windows"
        return
        ;;
    esac
    forced=${VK_DRIVER_FILES:-${VK_ICD_FILENAMES:-}}
    if find_driver; then
        say "nothing to install: there is a Vulkan driver ($driver)"
        return
    fi
    if ! forced_wrong && command -v apt-get >/dev/null 2>&1; then
        if install_debian && find_driver; then
            say "installed: there is a Vulkan driver ($driver)"
            return
        fi
        complain "that did not work"
    fi
    if forced_wrong; then
        complain "VK_DRIVER_FILES or VK_ICD_FILENAMES names no working Vulkan driver ($forced): unset it, or correct it."
    else
        complain "$missing. To install one (the GPU's own driver is as good):"
        complain "    $(by_hand)"
    fi
    case $goal in
    demo | bench) complain "going on with the CPU device alone" ;;
    test)
        complain "Tests run on the CPU and on a GPU driver. QLORA_TEST_DEVICES=cpu make test leaves it out."
        exit 1
        ;;
    setup) exit 1 ;;
    esac
}

# ---- pip ----

# scripts/smollm2.sh takes the tests' model out of a Python package, and says what to do where there is no pip.
check_pip() {
    if ! python3 -m pip --version >/dev/null 2>&1 && command -v apt-get >/dev/null 2>&1; then
        say "no pip: installing python3-pip with apt-get, to fetch the tests' model"
        apt_install python3-pip || complain "that did not work"
    fi
}

check_cargo
if [ "$goal" = test ]; then
    check_pip
fi
case $goal:$(printf %s "${QLORA_TEST_DEVICES:-}" | tr '[:upper:]' '[:lower:]') in
test:cpu) say "QLORA_TEST_DEVICES=cpu: no adapter is needed, none is looked for" ;;
*) check_driver ;;
esac
