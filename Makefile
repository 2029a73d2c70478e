# make setup | quickstart | test | test-slow | check
BIN := .venv/bin

.PHONY: setup quickstart test test-slow check lock format
.DEFAULT_GOAL := test

setup: .venv/optiq-setup

.venv/optiq-setup: requirements.lock pyproject.toml scripts/setup.sh
	@scripts/setup.sh

# A model, better than uniform quantization at the same size: MODEL=source OUT=directory
quickstart: setup
	@scripts/quickstart.sh

# Lint, types and layers
check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/pytest -m "not slow"

test-slow: setup
	$(BIN)/pytest -m slow

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Pin the newest versions that pyproject.toml allows; needs uv
lock:
	@scripts/lock.sh
