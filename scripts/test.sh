#!/usr/bin/env bash
# Sets up what is missing, then runs the tests, two files at a time: most of their time goes into compiling on one core.
# Arguments go to pytest; `-n 0` is for debuggers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/bootstrap.sh
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
