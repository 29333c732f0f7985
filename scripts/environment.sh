# shellcheck shell=bash
# Sourced by run_train.sh and run_tests.sh. setup_environment ROOT train|test sets PYTHON to a working interpreter:
# the one at hand if it already has what is needed, else ROOT/.venv, made on first use from constraints.txt.

setup_environment() {
    local root="$1" purpose="$2" modules="torch, numpy, tiktoken, tensorboard" extra=""
    if [ "$purpose" = test ]; then
        modules="$modules, pytest, pytest_timeout, xdist, hypothesis, transformers, datasets, ruff, pyrefly"
        extra="[dev]"
    fi
    if [ -z "${TITAN_VENV_ONLY:-}" ]; then
        PYTHON="$(command -v "${PYTHON:-python3}" || true)"
        if [ -n "$PYTHON" ] && _has_modules "$PYTHON" "$modules"; then
            # an environment of the user's (activated, a container): used as it is
            _make_importable "$root"
            return
        fi
    fi
    PYTHON="$root/.venv/bin/python"
    local stamp
    stamp="$(cat "$root/pyproject.toml" "$root/constraints.txt" | sha256sum | cut -d ' ' -f 1) $purpose"
    (
        flock 9 # a second start waits here and then finds the work done
        if ! _is_set_up "$root" "$stamp"; then
            _install "$root" "$extra"
            # what was installed for the tests serves training as well
            echo "$stamp" >"$root/.venv/.stamp"
        fi
    ) 9>"$root/.venv.lock"
    _make_importable "$root"
}

_has_modules() {
    "$1" -c "
import importlib.metadata, importlib.util, sys
version = tuple(int(part) for part in importlib.metadata.version('torch').split('.')[:2])
sys.exit(sys.version_info < (3, 11) or version < (2, 11) or any(importlib.util.find_spec(name) is None for name in '$2'.split(', ')))" 2>/dev/null
}

_is_set_up() {
    local found
    [ -x "$1/.venv/bin/python" ] && [ -f "$1/.venv/.stamp" ] || return 1
    found="$(cat "$1/.venv/.stamp")"
    [ "$found" = "$2" ] || [ "$found" = "${2% train} test" ]
}

_install() {
    local root="$1" extra="$2" candidate base=""
    for candidate in "${BASE_PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            base="$candidate"
            break
        fi
    done
    if [ -z "$base" ]; then
        echo "ERROR: no Python 3.11 or newer was found; install one (Debian: apt install python3 python3-venv)" >&2
        exit 2
    fi
    echo "setting up $root/.venv with $base (once; some minutes)"
    if ! "$base" -m venv "$root/.venv"; then
        echo "ERROR: $base -m venv failed; install it (Debian: apt install python3-venv)" >&2
        exit 2
    fi
    if ! "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$root/constraints.txt" --editable "$root$extra"; then
        echo "ERROR: the packages could not be installed; see pip's message above, then start again" >&2
        exit 2
    fi
}

_make_importable() {
    # from a checkout without installation; last on the path, so that the folder kernels/ shadows nothing
    if ! "$PYTHON" -c 'import titan_yulan' 2>/dev/null; then
        export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$1"
    fi
}
