#!/usr/bin/env bash
# Makes .venv at the root of the repository: a Python of at least 3.12, the packages of requirements.lock and jaxserve
# itself. A .venv that is complete and made from today's lock is left as it is; any other is made anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The path is in the stamp because neither a virtual environment nor an editable install survives a move. The stamp is
# written last, so that an interrupted run leaves none.
stamp="$(cat requirements.lock pyproject.toml | cksum) $PWD"
if [[ -x .venv/bin/python && "$(cat .venv/stamp 2>/dev/null)" == "$stamp" ]]; then exit 0; fi

shopt -s nullglob
pyenv="${PYENV_ROOT:-${HOME:-}/.pyenv}/versions"

# Whether $1 can be built on: it runs (a pyenv shim may not), is CPython 3.12 or newer with its global lock (few wheels
# are made without), and can put pip into a virtual environment (Debian's Python lacks ensurepip at first).
usable() {
  "$1" -c '
import importlib.util, sys, sysconfig
standard = sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED")
has_pip = importlib.util.find_spec("ensurepip") or importlib.util.find_spec("pip")
sys.exit(not (sys.version_info >= (3, 12) and standard and has_pip))' >/dev/null 2>&1
}

# Prints the first usable Python. Lower versions come first, as the surest to have a wheel of everything.
find_python() {
  local version candidate candidates=()
  for version in 3.12 3.13 3.14; do candidates+=("python$version" "$pyenv/$version"*/bin/python); done
  for candidate in "${candidates[@]}" python3 python "$pyenv"/3.1[5-9]*/bin/python; do
    if usable "$candidate"; then echo "$candidate" && return; fi
  done
  return 1
}

# A virtual environment $2 of the Python $1, with pip.
make_environment() {
  if "$1" -c 'import ensurepip' 2>/dev/null; then
    "$1" -m venv --clear "$2"
  else
    "$1" -m venv --clear --without-pip "$2" && "$1" -m pip --python "$2/bin/python" install --quiet pip
  fi
}

# Prints a Python that uv downloaded, now or earlier. Without a uv on PATH, any Python's pip gets one, into folder $1.
download_python() {
  local candidate uv
  if ! uv="$(command -v uv)"; then
    for candidate in python3 python "$pyenv"/3.*/bin/python; do
      if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 9))' && make_environment "$candidate" "$1"; then
        break
      fi >&2
    done
    "$1/bin/python" -m pip install --quiet --retries 1 uv || return
    uv="$1/bin/uv"
  fi
  # Its own Python only, and no link to it in ~/.local/bin.
  export UV_PYTHON_PREFERENCE=only-managed UV_PYTHON_INSTALL_BIN=0
  "$uv" python install 3.12 >&2 && "$uv" python find --system 3.12
}

if ! python="$(find_python)"; then
  echo "No Python 3.12 or newer on PATH or among pyenv's: getting one with uv ..." >&2
  scratch="$(mktemp -d)"
  trap 'rm -rf "$scratch"' EXIT
  if ! python="$(download_python "$scratch/uv" 2>"$scratch/errors")"; then
    echo "jaxserve needs Python 3.12 or newer with its venv module, found none, and could not download one with uv:" \
      "install one (with 'apt install python3.12-venv', 'brew install python@3.12' or 'pyenv install 3.12', say)" \
      "and run this again." >&2
    exit 1
  fi
fi

echo "Making .venv with $("$python" --version) ($python): a minute or two, once ..." >&2
rm -rf .venv
make_environment "$python" .venv
pip=(.venv/bin/python -m pip install -qq --disable-pip-version-check --no-input) # -qq: errors only
"${pip[@]}" --requirement requirements.lock
"${pip[@]}" --no-deps --no-build-isolation --editable .
echo "$stamp" >.venv/stamp
