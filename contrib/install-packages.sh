#!/bin/sh
# Installs the system packages of the given sections of packages.apt that are not installed yet.
#
#   contrib/install-packages.sh run test
#
# Asks dpkg, so it is quick when there is nothing to do, and never asks a person. Works as root or
# through sudo. On a system without apt it names the packages and goes on: the steps that follow
# fail by themselves if something is missing.
set -eu

list=$(dirname "$0")/../packages.apt

packages() { # names in the given sections
    awk -v wanted=" $* " '
        /^\[/ { section = substr($0, 2, length($0) - 2); next }
        /^#/ || NF == 0 { next }
        index(wanted, " " section " ") { print $1 }' "$list" | sort -u
}

missing() { # those of the given packages that dpkg does not know as installed
    for package in "$@"; do
        state=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null) || state=
        [ "$state" = installed ] || echo "$package"
    done
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        echo "setup: needs root (or sudo) to run: $*" >&2
        exit 1
    fi
}

apt() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 "$@" \
        </dev/null
}

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    echo "setup: no apt here; install what these Debian packages hold:" $(packages "$@") >&2
    exit 0
fi

wanted=$(missing $(packages "$@"))
[ -n "$wanted" ] || exit 0
echo "setup: installing" $wanted
# The lists may be old or absent: a package that cannot be had is looked for again after an update.
if ! apt install --yes --no-install-recommends $wanted >/dev/null 2>&1; then
    apt update
    apt install --yes --no-install-recommends $wanted
fi
