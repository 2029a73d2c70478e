#!/bin/bash
# Write requirements.lock: every package of optiq and its tools, for macOS and Linux, Python 3.11 and
# later, with hashes. Needs uv.
set -euo pipefail
cd "$(dirname "$0")/.."
uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --generate-hashes \
  --no-header --no-annotate --no-emit-index-url --no-emit-find-links --no-emit-build-options \
  --quiet --output-file requirements.lock
