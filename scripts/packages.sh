# shellcheck shell=sh disable=SC2154
# Packages of Debian in folders, unpacked and not installed: for scripts that set `cache`, a folder for apt's lists, and source
# this. Anyone may run it; signatures are checked with the system's keys.

# apt-get on the sources of $1 (`system`, or a release) with lists and locks of its own.
apt_of() {
    apt=$cache/apt/$1
    shift
    mkdir -p "$apt/state/lists/partial" "$apt/cache/archives/partial"
    : >>"$apt/status"
    if [ -f "$apt/sources" ]; then
        set -- -o Dir::Etc::sourcelist="$apt/sources" -o Dir::Etc::sourceparts=/dev/null \
            -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null -o APT::Default-Release= "$@"
    fi
    apt-get -qq -o Dir::State="$apt/state" -o Dir::State::status="$apt/status" -o Dir::Cache="$apt/cache" \
        -o APT::Sandbox::User=root "$@"
}

# Unpacks the packages $3 of $2 (`system`, or a release) in the folder $1, with a list of them.
unpack() {
    staging=$1.partial
    rm -rf "$staging"
    mkdir -p "$staging"
    # shellcheck disable=SC2086 # one word a package
    (cd "$staging" && apt_of "$2" download $3) || return
    for package in "$staging"/*.deb; do
        dpkg-deb -x "$package" "$staging" || return
        # shellcheck disable=SC2016 # names of dpkg's
        dpkg-deb -W --showformat='${Package} ${Version}\n' "$package" >>"$staging/packages" || return
        rm "$package"
    done
    mv "$staging" "$1"
}

# Has apt read Debian's unstable release, from the mirror of the system's sources.
read_sid() {
    apt_of system update || return
    # shellcheck disable=SC2016 # a name of apt's
    mirror=$(apt_of system indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' |
        head -n 1)
    set -- /usr/share/keyrings/debian-archive-keyring.*
    if [ -z "$mirror" ] || [ ! -f "$1" ]; then
        echo "the system's sources name no mirror of Debian, or there are no keys of Debian's in /usr/share/keyrings"
        return 1
    fi
    mkdir -p "$cache/apt/sid"
    echo "deb [signed-by=$1] $mirror sid main" >"$cache/apt/sid/sources"
    apt_of sid update
}

# Unpacks the packages $2 of Debian's unstable release, and all that they need, libc included, in the folder $1.
unpack_sid() {
    folder=$1 wanted=$2
    read_sid || return
    # All of them, for nothing is installed as far as these lists know.
    # shellcheck disable=SC2086 # one word a package
    unpack "$folder" sid "$(apt_of sid -s --no-install-recommends install $wanted | sed -n 's/^Inst \([^ ]*\).*/\1/p')"
}

# Unpacks llama.cpp of Debian's unstable release, with its Vulkan backend, in the folder $1, unless it is there.
unpack_llama_cpp() {
    if [ -z "$(find "$1" -name libggml-vulkan.so 2>/dev/null)" ]; then
        rm -rf "$1"
        unpack_sid "$1" "llama.cpp libggml0-backend-vulkan" || return
    fi
    # It looks for its backends beside the program, which is the loader here.
    find "$1" -path '*/ggml/*' -name 'libggml-*.so' -exec cp -n {} "$(dirname -- "$(loader_of "$1")")" \;
}

# Unpacks Mesa's Vulkan drivers of Debian's unstable release in the folder $1, unless they are there.
unpack_mesa() {
    [ -d "$1" ] || unpack_sid "$1" "mesa-vulkan-drivers libvulkan1"
}

# Unpacks mesa-drm-shim of Debian's unstable release, without what it needs, in the folder $1, unless it is there: Mesa's packages have
# that.
unpack_drm_shim() {
    [ -d "$1" ] || { read_sid && unpack "$1" sid mesa-drm-shim; }
}

# Writes the manifest of lavapipe in the folder $1 of Mesa's packages, and prints its path. The library by its path: by its name
# the system's own might be found.
lavapipe_of() {
    sed "s|\"library_path\": *\"[^\"]*\"|\"library_path\": \"$(dirname -- "$(loader_of "$1")")/libvulkan_lvp.so\"|" \
        "$1"/usr/share/vulkan/icd.d/lvp_icd*.json >"$1/lvp_icd.json"
    printf '%s\n' "$1/lvp_icd.json"
}

# Prints the folders of the libraries of the packages in the folder $1, as --library-path of their dynamic linker takes them.
libraries_of() {
    find "$1/usr/lib" -name '*.so*' -exec dirname {} + | sort -u | tr '\n' ':'
}

# Prints the dynamic linker of the packages in the folder $1: their programs, and those that load their libraries, run through it.
loader_of() {
    for loader in "$1"/usr/lib/*/ld-linux-*.so.*; do
        printf '%s\n' "$loader"
        return
    done
}
