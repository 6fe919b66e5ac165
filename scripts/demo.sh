#!/usr/bin/env bash
# Show Kimi Delta Attention at work: on a GPU with our CUDA kernel (built first if need be), elsewhere with the reference.
# Arguments go to `python -m hf_layer.demo`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

flash_kda_env demo
if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  flash_kda_build --archs native
fi
exec "$PYTHON" -m hf_layer.demo "$@"
