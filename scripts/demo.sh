#!/usr/bin/env bash
# Sets up what is missing, then answers a few questions in one batch with the model that ships in the package.
# Arguments go to `jaxserve generate`: more questions, or options such as --max-tokens 20.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$root/scripts/bootstrap.sh"
exec "$root/.venv/bin/jaxserve" generate --chat \
  "Who are you?" "What is 27+45?" "What is the capital of France?" "$@"
