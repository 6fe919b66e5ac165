#!/usr/bin/env bash
# Write .clangd, so that clangd understands this repository: where CUDA, CUTLASS, torch and Python have their headers.
#
#   bash setup_clangd.sh
#
# It finds them as scripts/build_kernel.py does, and takes the same variables: CUDA_HOME, CXX, CUTLASS_SRC_DIR.
# FLASH_KDA_PYTHON names the interpreter whose torch is meant (default: .venv, else python3).
# Headers that clang asks every CUDA toolkit for, and this one lacks, are made empty in .clangd.headers/.
# CUDA files need clangd 17 or newer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

python=${FLASH_KDA_PYTHON:-}
if [ -z "$python" ]; then
  python=${FLASH_KDA_VENV:-.venv}/bin/python
  [ -x "$python" ] || python=python3
fi

PYTHONPATH=scripts exec "$python" - <<'PYTHON'
import json
import sys
from pathlib import Path

try:
    from kernel_build import BuildError
    from kernel_build.commands import REGISTRATION_H
    from kernel_build.config import open_project
    from kernel_build.toolchain import find_toolchain
except ImportError as error:
    sys.exit(f"error: {sys.executable}: {error}; pip install -e '.[build]' brings what is missing")

root = Path.cwd()
try:
    project = open_project(root)
    tools = find_toolchain(project)
except BuildError as error:
    sys.exit(f"error: {error}")

cuda = tools.cuda_home / "include"
made = root / ".clangd.headers"
made.mkdir(exist_ok=True)
(made / "registration.h").write_text(REGISTRATION_H)
# clang's wrapper of the CUDA headers includes these; CUDA 13 has dropped the first, the second is cuRAND's.
for name in ("texture_fetch_functions.h", "curand_mtgp32_kernel.h"):
    if not (cuda / name).exists():
        (made / name).touch()

major, minor = project.stable_abi
folders = sorted({folder for section in project.sections for folder in section.include})
system = [made, tools.torch_dir / "include", tools.python_include, tools.cutlass_include, cuda, cuda / "cccl"]
common = [
    f"-DTORCH_TARGET_VERSION={(major << 56) | (minor << 48):#x}ULL",
    "-DUSE_CUDA=1",
    "-DCUDA_KERNEL",
    "-DTORCH_EXTENSION_NAME=flash_kda",
    *(f"-I{root / folder}" for folder in folders),
    *(word for folder in system if folder is not None for word in ("-isystem", str(folder))),
]
host = ["-xc++", "-std=c++20", *common]
device = ["-xcuda", "-std=c++17", f"--cuda-path={tools.cuda_home}", "--cuda-gpu-arch=sm_90a"]
device += ["-Wno-unknown-cuda-version", *common]
documents = [
    f"If:\n  PathMatch: .*\\.{suffix}\nCompileFlags:\n  Add: {json.dumps(flags)}\n"
    for suffix, flags in (("(cpp|h)", host), ("(cu|cuh)", device))
]
(root / ".clangd").write_text("# Made by setup_clangd.sh.\n" + "---\n".join(documents))
print(f"wrote .clangd: {tools.description}")
PYTHON
