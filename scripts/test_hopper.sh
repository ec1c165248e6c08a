#!/usr/bin/env bash
# Compiles the GPU kernels and programs for an H200 that is not there and checks what comes out, registers, spills and
# copies (tests/hopper). Makes .venv-hopper, which adds JAX's CUDA plugin to .venv. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/bootstrap.sh

python=.venv-hopper/bin/python
packages() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
stamp="$(cat .venv/stamp) $(cksum <scripts/test_hopper.sh)"
if [[ "$(cat .venv-hopper/stamp 2>/dev/null)" != "$stamp" ]]; then
  echo "Making .venv-hopper: a minute or two, once ..." >&2
  .venv/bin/python -m venv --clear --without-pip .venv-hopper
  packages .venv/bin/python >"$(packages "$python")/base.pth"
  version="$(.venv/bin/python -c 'import jax; print(jax.__version__)')"
  # Without its dependencies, gigabytes of CUDA: to compile takes the plugin and an assembler.
  .venv/bin/python -m pip --python "$python" install -qq --disable-pip-version-check --no-input --no-deps \
    "jax-cuda13-plugin==$version" "jax-cuda13-pjrt==$version" nvidia-cuda-nvcc
  echo "$stamp" >.venv-hopper/stamp
fi

PATH="$(packages "$python")/nvidia/cu13/bin:$PATH"
export PATH JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 XLA_FLAGS=--xla_gpu_autotune_level=0
exec "$python" -m pytest tests/hopper "$@"
