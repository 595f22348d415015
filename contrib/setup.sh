#!/bin/sh
# Makes .venv with backyfs in it; quick when there is nothing to do.
#
#   contrib/setup.sh run [demo] [test] [bench]     sections of packages.apt; `test` adds test tools
#
# The environment is made from the distribution's Python where that is 3.11 or newer, because the
# distribution's Ceph binding (python3-rbd) is built for that one; PYTHON=/path/to/python3 chooses
# another. Everything from the package index is pinned by hash. Needs no terminal.
set -eu
cd "$(dirname "$0")/.."

venv=.venv
bin=$venv/bin

say() { echo "setup: $*"; }
die() { echo "setup: $*" >&2; exit 1; }

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    for candidate in ${PYTHON:-/usr/bin/python3 python3}; do
        if is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    die "needs Python 3.11 or newer (PYTHON=/path/to/python3 make setup)"
}

make_venv() {
    if [ -x $bin/python ] && is_new_enough $bin/python && $bin/python -m pip --version >/dev/null; then
        return
    fi
    python=$(find_python)
    say "making $venv with $python"
    "$python" -m venv --clear $venv
}

pip() {
    $bin/python -m pip --quiet --quiet --no-input --disable-pip-version-check "$@" </dev/null
}

# install WHAT FILE...: the pinned packages of some requirements files, once for their content
install() {
    stamp=$venv/.installed-$1
    shift
    wanted=$(cat "$@" | cksum)
    [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || return 0
    say "installing Python packages from $* (the first time: about a minute)"
    # The tools that build pyfuse3 are pinned, too, instead of fetched behind our back.
    pip install --require-hashes -r requirements-build.txt
    for file in "$@"; do
        [ "$file" = requirements-build.txt ] ||
            pip install --require-hashes --no-build-isolation -r "$file"
    done
    echo "$wanted" >"$stamp"
}

install_project() {
    stamp=$venv/.installed-project
    wanted="$(cat pyproject.toml | cksum) $PWD"
    [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || [ ! -x $bin/backyfs ] || return 0
    pip install --no-deps --no-build-isolation --editable .
    echo "$wanted" >"$stamp"
}

# As pip does it for what it copies. Else a program that may not write beside its source (another
# user's, PYTHONDONTWRITEBYTECODE) compiles all of it at every start.
compile_project() {
    $bin/python -m compileall -q backyfs
}

# The Ceph binding comes with the distribution only. A folder with links to just these two modules
# brings it in without the rest of the distribution's packages.
link_ceph() {
    links=$venv/lib/ceph
    suffix=$($bin/python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
    site=$($bin/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
    mkdir -p $links
    for module in rados rbd; do
        file=/usr/lib/python3/dist-packages/$module$suffix
        if [ -e "$file" ]; then
            ln -sfn "$file" "$links/$module$suffix"
        else
            rm -f "$links/$module$suffix"
        fi
    done
    echo "$PWD/$links" >"$site/ceph.pth"
}

contrib/install-packages.sh "$@"
make_venv
case " $* " in *" test "*) tools=yes ;; *) tools=$(cat $venv/.installed-test 2>/dev/null || true) ;; esac
if [ -n "$tools" ]; then
    install test requirements-build.txt requirements-dev.txt
else
    install run requirements-build.txt requirements.txt
fi
install_project
compile_project
link_ceph
case " $* " in *" test "*) contrib/test-kernel.sh $venv/kernel ;; esac
