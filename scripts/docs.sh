#!/usr/bin/env bash
# Build the site in build/site from the pages and the docstrings. A link that leads nowhere fails.
#
#   bash scripts/docs.sh          # build it
#   bash scripts/docs.sh serve    # show it at http://127.0.0.1:8000
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# An environment of its own: the site needs none of the product's packages, as docstrings are read, not imported.
if ! cmp -s requirements-docs.txt .venv/docs/installed; then
  echo "== installing requirements-docs.txt"
  python3 -m venv .venv/docs
  .venv/docs/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
  cp requirements-docs.txt .venv/docs/installed
fi

# The same folders as in the repository, so that the pages' links to each other, configs/ and scripts/ lead there too.
rm -rf build/pages
mkdir -p build/pages
cp -r README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md LICENSE docs configs scripts build/pages
{
  echo "# What can I call from Python?"
  for module in lowrank_jax lowrank_jax.inference.session lowrank_jax.config; do
    printf '\n## %s\n\n::: %s\n' "$module" "$module"
  done
} > build/pages/docs/api.md
NO_MKDOCS_2_WARNING=1 exec .venv/docs/bin/mkdocs "${1:-build}" --strict
