#!/usr/bin/env bash
# Make .venv with the locked packages and this project in it (editable): bash scripts/setup.sh
# Safe to repeat (a finished one takes a moment), to interrupt, and to call from any folder. PYTHON=... picks an interpreter.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
stamp=$venv/.shardwright-stamp
log=$venv/setup.log
needed_gb=4

say() { printf 'setup: %s\n' "$*"; }

fail() { # what is missing, what to do
    printf 'setup: %s\n       %s\n' "$1" "$2" >&2
    exit 1
}

fingerprint() { # what a finished .venv was made from
    { cat -- requirements.lock pyproject.toml scripts/setup.sh && printf '%s' "$root"; } | cksum
}

is_finished() {
    [ -f "$stamp" ] && [ "$(cat -- "$stamp")" = "$(fingerprint)" ] && "$venv/bin/python" -c '' 2>/dev/null
}

find_python() {
    local name version seen="" names=(python3 python3.11 python3.12 python3.13 python3.14)
    [ -z "${PYTHON:-}" ] || names=("$PYTHON")
    for name in "${names[@]}"; do
        version=$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            python=$name
            return
        fi
        seen+=" $name=$version"
    done
    fail "Python 3.11 or newer is missing (found:${seen:- none})." \
        "Install it (Debian, Ubuntu: apt-get install python3.11 python3.11-venv python3.11-dev), or name one: PYTHON=/path/to/python3.11 bash scripts/setup.sh"
}

check_machine() {
    local free_kb header
    mkdir -p -- "$venv" 2>/dev/null && [ -w "$venv" ] && [ -w "$root" ] ||
        fail "cannot write to $root." "Make it writable for $(id -un 2>/dev/null || id -u), or clone to a folder of your own."
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "the venv module of $python is missing." "Install it (Debian, Ubuntu: apt-get install python3-venv)."
    command -v "${CXX:-c++}" >/dev/null || find_compiler
    header=$("$python" -c 'import os, sysconfig; print(os.path.join(sysconfig.get_path("include"), "Python.h"))')
    [ -f "$header" ] ||
        fail "the header files of $python are missing ($header)." "Install them (Debian, Ubuntu: apt-get install python3-dev)."
    [ -z "$(compgen -G "$venv/lib/python*/site-packages/torch")" ] || needed_gb=1
    free_kb=$(df -Pk -- "$root" | awk 'NR == 2 { print $4 }')
    [ "$free_kb" -ge $((needed_gb * 1024 * 1024)) ] ||
        fail "the disk is nearly full: $((free_kb / 1024)) MB free at $root." "Free at least $needed_gb GB there."
}

find_compiler() { # DeepSpeed compiles its CPU optimizer, and torch.compile its kernels, at first use, with $CXX
    local name
    for name in g++ clang++; do
        if [ -z "${CXX:-}" ] && command -v "$name" >/dev/null; then
            export CXX=$name
            say "no c++ on PATH; using $name. Put export CXX=$name into your shell's profile."
            return
        fi
    done
    fail "a C++ compiler is missing (${CXX:-c++, g++ or clang++})." \
        "Install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++), or set CXX."
}

explain_pip() { # turn pip's words into a cure
    tail -n 15 -- "$log" >&2
    if grep -qE 'No space left|Errno 28' "$log"; then
        fail "the disk is full." "Free space at $root and in ${TMPDIR:-/tmp} ($needed_gb GB; 10 GB for a CUDA build of torch), then call this again; it goes on."
    elif grep -qE 'NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError|Network is unreachable|Temporary failure' "$log"; then
        fail "pip cannot reach its package index." "Check the network and proxy (or PIP_INDEX_URL for a mirror), then call this again; it goes on."
    fi
    fail "pip could not install the packages." "Its words are above and in $log; then call this again, it goes on."
}

pip_install() {
    "$venv/bin/python" -m pip --disable-pip-version-check --no-input install --no-compile --progress-bar off "$@" >>"$log" 2>&1 ||
        explain_pip
}

make_venv() {
    # Made anew if it has no pip (interrupted), its base interpreter is gone, or it was moved; pip repairs everything else.
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1 || ! grep -qsF -- "$venv" "$venv/bin/activate"; then
        say "making .venv with $python ($("$python" -V))"
        "$python" -m venv --clear -- "$venv" ||
            fail "$python could not make a virtual environment." "Its words are above (Debian, Ubuntu: apt-get install python3-venv)."
    fi
    : >"$log"
    say "installing the locked packages (2 GB, or 6 GB with CUDA; about 2 minutes)"
    pip_install -r requirements.lock
    pip_install --no-deps --no-build-isolation --editable .
}

cd -- "$root"
if is_finished; then
    say ".venv is up to date"
    exit 0
fi
find_python
check_machine
make_venv
fingerprint >"$stamp"
say "ready: source .venv/bin/activate"
