# Sourced by the other scripts: create .venv with Python 3.11 to 3.14 and install the named requirements files, once.
# Afterwards `python` is the environment's.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
  local candidate
  for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
    if command -v "$candidate" > /dev/null &&
      "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2> /dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 to 3.14 with its venv module is needed (on Debian: apt-get install python3-venv)" >&2
  return 1
}

# The stamp is a copy of the installed requirements file: a changed file or an interrupted install is installed again.
install_requirements() {
  local stamp=.venv/installed-$1
  if ! .venv/bin/python -c '' 2> /dev/null; then
    local python
    python=$(find_python)
    echo "== making .venv with $("$python" --version)"
    rm -rf .venv
    "$python" -m venv .venv
  fi
  if ! cmp -s "$1" "$stamp"; then
    echo "== installing $1"
    local options=()
    if [ "$1" = requirements-aot.txt ]; then # kept apart: see the file
      options=(--no-deps --target .venv/aot)
      rm -rf .venv/aot
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check ${options[@]+"${options[@]}"} -r "$1"
    cp "$1" "$stamp"
  fi
}

for file in "$@"; do
  install_requirements "$file"
done
export PATH="$PWD/.venv/bin:$PATH"
# Attention and decoding on a CPU are C++ compiled for it (lowrank_jax/model/kernels/build.py).
if ! command -v "${CXX:-g++}" clang++ c++ > /dev/null && ! python -c 'import ziglang' 2> /dev/null; then
  echo "== installing a C++ compiler"
  python -m pip install --quiet --disable-pip-version-check ziglang==0.17.1
fi
echo "== compiling for this CPU"
python -c 'from lowrank_jax.model.kernels import build; print(*(f"{name}: {build.load(name)}" for name in build.TARGETS))'
