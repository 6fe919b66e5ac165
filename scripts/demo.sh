#!/usr/bin/env bash
# Show Kimi Delta Attention at work: on a GPU with our CUDA kernel, elsewhere with the CPU's (built first if need be).
# Arguments go to `python -m hf_layer.demo`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

flash_kda_env demo
if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  flash_kda_build --archs native
else
  flash_kda_build --backend cpu
fi
exec "$PYTHON" -m hf_layer.demo "$@"
