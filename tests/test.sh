#!/usr/bin/env bash
# Make the environment, build the kernels (the GPU one where there is an nvcc), run the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

flash_kda_env test
flash_kda_build
exec "$PYTHON" -m pytest "$@"
