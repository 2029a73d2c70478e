#!/bin/bash
# Make .venv with the locked packages and optiq itself, and an optimized BLAS where it may be
# installed. Uses uv when it is there, else python3 (or $PYTHON) 3.11 or later with venv.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"

fail() {
  echo "setup: $*" >&2
  exit 1
}

make_environment() {
  if command -v uv >/dev/null && uv --version >/dev/null 2>&1; then
    [ -x .venv/bin/python ] || uv venv --quiet --python '>=3.11' .venv
    uv pip install --quiet --python .venv --require-hashes -r requirements.lock
    uv pip install --quiet --python .venv --no-build-isolation --no-deps -e .
    return
  fi
  command -v "$python" >/dev/null || fail "there is no $python; install Python 3.11 or later"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old; give Python 3.11 or later: make setup PYTHON=python3.12"
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python has no venv module; install it (Debian: apt-get install python3-venv) or install uv"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  .venv/bin/python -m pip install -qq --require-hashes -r requirements.lock
  .venv/bin/python -m pip install -qq --no-build-isolation --no-deps -e .
}

has_blas() {
  .venv/bin/python -c 'import sys; from optiq import blas; sys.exit("slow" in blas.NAME)'
}

install_blas() {
  has_blas && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "setup: installing OpenBLAS (libopenblas0-pthread)" >&2
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -y -qq libopenblas0-pthread >/dev/null 2>&1 ||
      { apt-get update -qq && apt-get install -y -qq libopenblas0-pthread; } >/dev/null 2>&1 || true
    has_blas && return
  fi
  echo "setup: MLX's own BLAS is slow on this machine. For a 50 times faster one run:" >&2
  echo "  sudo apt-get install libopenblas0-pthread" >&2
  echo "or, on x86-64 where nobody is root:  .venv/bin/python -m pip install mkl" >&2
}

echo "setup: installing the locked packages into .venv" >&2
make_environment
install_blas
touch .venv/optiq-setup
