#!/usr/bin/env bash
# Sets up .venv with the test tools, checks the style, and runs all tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt requirements-test.txt requirements-aot.txt

echo "== style"
ruff check .
ruff format --check .
echo "== tests"
python -m pytest -n 2 "$@"
