# Packages of Debian sid in a folder, beside the system's own; to be read in by other scripts (`. scripts/sid.sh`).
#
# Nothing is installed: packages are unpacked, and their programs run with their own loader and libraries, so that a newer libc
# does not meet the system's. Signatures are checked with Debian's keyring, as apt does for the system.

sid_complain() { printf 'sid: %s\n' "$*" >&2; }

# Prints the first mirror of Debian in the system's apt sources.
sid_mirror() {
    for file in /etc/apt/sources.list.d/*.sources /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [ -r "$file" ] || continue
        mirror=$(sed -n -e 's/^URIs:[[:space:]]*\([^[:space:]]*\).*/\1/p' \
            -e 's/^deb[[:space:]]\{1,\}\(\[[^]]*\][[:space:]]*\)\{0,1\}\([^[:space:]]*\).*/\2/p' "$file" |
            sed -n '/\/debian\/*$/{p;q;}')
        if [ -n "$mirror" ]; then
            printf '%s\n' "$mirror"
            return 0
        fi
    done
    sid_complain "no mirror of Debian in /etc/apt: sid's packages need one"
    return 1
}

# sid_unpack FOLDER PACKAGE...: fetches the packages and all that they depend on, and unpacks them into FOLDER/root.
# What is there already for the same packages is kept; remove FOLDER to have newer ones.
sid_unpack() {
    sid_folder=$1
    shift
    if [ "$(cat "$sid_folder/packages" 2>/dev/null)" = "$*" ]; then
        return 0
    fi
    command -v apt-get >/dev/null 2>&1 || { sid_complain "apt-get is needed to fetch $*"; return 1; }
    sid_mirror=$(sid_mirror) || return 1
    rm -rf "$sid_folder"
    mkdir -p "$sid_folder/lists/partial" "$sid_folder/archives/partial" "$sid_folder/etc" "$sid_folder/root" || return 1
    sid_folder=$(CDPATH='' cd -- "$sid_folder" && pwd) || return 1
    # An apt of its own that knows nothing but sid, and nothing as installed; how to fetch is as the system has it.
    : >"$sid_folder/status"
    printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s sid main\n' "$sid_mirror" \
        >"$sid_folder/sources.list"
    cat >"$sid_folder/apt.conf" <<CONF
Dir::State "$sid_folder";
Dir::State::status "$sid_folder/status";
Dir::Cache "$sid_folder";
Dir::Etc::sourcelist "$sid_folder/sources.list";
Dir::Etc::sourceparts "$sid_folder/etc";
Dir::Etc::preferences "$sid_folder/etc/none";
Dir::Etc::preferencesparts "$sid_folder/etc";
APT::Install-Recommends "false";
APT::Sandbox::User "";
Acquire::Languages "none";
Debug::NoLocking "true";
CONF
    if ! APT_CONFIG=$sid_folder/apt.conf apt-get -qq update >&2 ||
        ! APT_CONFIG=$sid_folder/apt.conf apt-get -qq -y --download-only install "$@" >&2; then
        sid_complain "cannot fetch $* from $sid_mirror"
        return 1
    fi
    for package in "$sid_folder"/archives/*.deb; do
        dpkg-deb -x "$package" "$sid_folder/root" || return 1
    done
    rm -rf "$sid_folder/archives" "$sid_folder/lists"
    printf '%s\n' "$*" >"$sid_folder/packages"
}

# Prints the loader of FOLDER/root.
sid_loader() {
    find "$1/root" -type f -name 'ld-linux*.so.*' | head -n 1
}

# sid_run FOLDER PROGRAM [ARGUMENT...]: runs a program of FOLDER/root with its own loader and libraries; PROGRAM is a path in there.
sid_run() {
    sid_root=$1/root
    sid_loader=$(sid_loader "$1")
    sid_program=$2
    shift 2
    sid_libraries=$(find "$sid_root/usr/lib" -name '*.so*' -exec dirname {} + | sort -u | tr '\n' ':')
    "$sid_loader" --library-path "$sid_libraries" "$sid_root/$sid_program" "$@"
}
