#!/usr/bin/env bash
# The checks and the tests: bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "$0")/environment.sh" dev
cd "$root"

ruff check .
ruff format --check .
bandit --quiet --recursive megatron tools scripts pretrain_gpt2.py setup.py
lint-imports
mypy
exec pytest -n "${TEST_PROCESSES:-2}" "$@"
