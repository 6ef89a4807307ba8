#!/usr/bin/env bash
# Set up .venv with the test tools, check the style, and run the tests.
#
#   bash scripts/test.sh           # all of them, as CI does, and then scripts/smoke.sh on the newest JAX
#   bash scripts/test.sh quick     # the fast ones, two minutes in all, for each commit
#   bash scripts/test.sh studies   # the tests of the study scripts alone
#
# Further arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt requirements-test.txt requirements-aot.txt

marks="not study" smoke=$(($# == 0))
case "${1:-}" in
  quick) marks="not slow and not study" && shift ;;
  studies) marks="study" && shift ;;
esac

if ! command -v chromium chromium-browser google-chrome > /dev/null; then
  echo "== installing Chromium"
  as_root=()
  [ "$(id -u)" = 0 ] || as_root=(sudo -n)
  ${as_root[@]+"${as_root[@]}"} apt-get -qq update && ${as_root[@]+"${as_root[@]}"} apt-get -qq install -y chromium || {
    echo "error: the chat page is tested in Chromium or Google Chrome; install one of them" >&2
    exit 1
  }
fi

requirements() { cat requirements*.txt pyproject.toml; }
if [ "$marks" = "not study" ] && ! requirements | cmp -s - .venv/resolved; then # changed since they were last resolved
  echo "== requirements on every Python"
  python scripts/resolve.py && requirements > .venv/resolved || [ $? = 75 ]
fi

echo "== style"
ruff check .
ruff format --check .
echo "== tests"
# A test that is skipped has failed. (LOWRANK_NO_SKIP= allows it, as where no compiler for other devices is made.)
export LOWRANK_NO_SKIP="${LOWRANK_NO_SKIP-1}"
python -m pytest -n 2 --dist worksteal -m "$marks" "$@"
if [ "$smoke" = 1 ]; then
  bash scripts/smoke.sh
fi
