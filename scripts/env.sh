# To be sourced by bash. Gives:
#
#   flash_kda_env EXTRA     sets PYTHON to an interpreter with this project and its extra (of pyproject.toml) installed.
#                           Makes .venv once; afterwards nothing is installed or asked for until pyproject.toml changes.
#   flash_kda_build ARGS..  builds the kernel with PYTHON, if a C++ compiler is there and no build of the present sources
#                           is; without nvcc for CPUs alone, and then a failure is a note.
#
# FLASH_KDA_PYTHON    use this interpreter as it is and install nothing
# FLASH_KDA_VENV      where the environment goes instead of .venv
# FLASH_KDA_NO_BUILD  1: never compile

FLASH_KDA_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

flash_kda_fail() {
  echo "error: $*" >&2
  return 1
}

flash_kda_env() {
  local extra="$1" venv="${FLASH_KDA_VENV:-$FLASH_KDA_ROOT/.venv}" stamp state
  if [ -n "${FLASH_KDA_PYTHON:-}" ]; then
    PYTHON="$FLASH_KDA_PYTHON"
    return
  fi
  PYTHON="$venv/bin/python"
  stamp="$venv/.flash-kda-$extra"
  state="$(cat "$FLASH_KDA_ROOT/pyproject.toml" "$FLASH_KDA_ROOT/scripts/env.sh" | cksum)"
  if [ -x "$PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$state" ]; then
    return
  fi
  flash_kda_make_venv "$venv" && flash_kda_install "$extra" && echo "$state" >"$stamp"
}

flash_kda_make_venv() {
  local venv="$1" base options=()
  if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    return
  fi
  base="$(command -v python3)" || flash_kda_fail "no python3 in PATH" || return
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    flash_kda_fail "$base is too old, Python 3.10 or newer is needed" || return
  # A machine whose Python has a CUDA torch keeps it: it fits the driver, and is several GB.
  if "$base" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null; then
    options+=(--system-site-packages)
  fi
  echo "making $venv with $base ${options[*]}" >&2
  "$base" -m venv --clear "${options[@]}" "$venv" ||
    flash_kda_fail "$base -m venv does not work (Debian and Ubuntu: install python3-venv)" || return
  if [ ${#options[@]} -gt 0 ]; then
    # A Python that is itself in an environment: --system-site-packages means the one below it.
    "$base" -c 'import site, sys
if sys.prefix != sys.base_prefix:
    print(*(f"import site; site.addsitedir({path!r})" for path in site.getsitepackages()), sep="\n")' \
      >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base_environment.pth"
  fi
}

flash_kda_install() {
  local extra="$1" pip=("$PYTHON" -m pip --disable-pip-version-check --no-input install --quiet)
  echo "installing flash-kda[$extra], once; this takes some minutes" >&2
  "${pip[@]}" "setuptools>=77" wheel </dev/null || flash_kda_fail "pip can't install setuptools" || return
  if ! "$PYTHON" -c 'import torch' 2>/dev/null; then
    # One exact version on machines without a GPU: the newest would bring CUDA libraries of several GB.
    local torch="torch==2.13.0"
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then torch="torch>=2.11"; fi
    "${pip[@]}" "$torch" </dev/null || flash_kda_fail "pip can't install $torch" || return
  fi
  # Without build isolation: pip then asks for nothing that is there already, and works offline if all is.
  "${pip[@]}" --no-build-isolation --editable "$FLASH_KDA_ROOT[$extra]" </dev/null ||
    flash_kda_fail "pip can't install $FLASH_KDA_ROOT[$extra]"
}

flash_kda_build() {
  local builder="$FLASH_KDA_ROOT/scripts/build_kernel.py"
  if [ "${FLASH_KDA_NO_BUILD:-0}" = 1 ]; then
    return
  fi
  if ! command -v "${CXX:-g++}" >/dev/null; then
    return
  fi
  if ! { [ -x "${CUDA_HOME:+$CUDA_HOME/bin/nvcc}" ] || command -v nvcc || [ -x /usr/local/cuda/bin/nvcc ]; } >/dev/null; then
    set -- --backend cpu
    "$PYTHON" "$builder" "$@" --check >/dev/null || "$PYTHON" "$builder" "$@" || echo "note: no kernel was built" >&2
    return
  fi
  "$PYTHON" "$builder" "$@" --check >/dev/null || "$PYTHON" "$builder" "$@"
}
