#!/usr/bin/env bash
# The checks and the tests: bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "$0")/environment.sh" dev
cd "$root"

ruff check .
ruff format --check .
lint-imports
mypy
exec pytest -n "${TEST_PROCESSES:-2}" "$@"
