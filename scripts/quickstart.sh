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

step "converting $model to 5 stored bits per weight; the uniform rival is judged beside it"
optiq convert "$model" -o "$out" --effort quick --max-windows 18 --rival --force
step "what it writes"
optiq generate "$out" "Why is the sky blue? Answer in one sentence." --temperature 0 --max-tokens 48
step "done"
echo "model: $out"
echo "card:  $out/README.md"
