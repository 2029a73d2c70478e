#!/bin/bash
# From a model to a better one: convert it, judge it beside uniform quantization, let it write.
# MODEL: a model directory, hub id or GGUF file; default: a 135M model that is fetched.
# OUT: the directory to write.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"

step() {
  printf '\n== %s\n' "$*"
}

model="${MODEL:-$(python scripts/demo_model.py models)}"
out="${OUT:-models/quickstart-5bpw}"
rival="$(mktemp -d)"
trap 'rm -rf "$rival"' EXIT

step "converting $model to 5 stored bits per weight"
optiq convert "$model" -o "$out" --effort quick --force
step "its uniform rival, not smaller"
optiq baseline "$model" --like "$out" -o "$rival/uniform"
step "both judged on held-out text"
optiq judge "$out" --baseline "$rival/uniform"
step "what it writes"
optiq generate "$out" "Why is the sky blue? Answer in one sentence." --max-tokens 48
step "done"
echo "model: $out"
echo "card:  $out/README.md"
