#!/usr/bin/env bash
# Run a few tests of everything that calls JAX on the newest one, which needs Python 3.12. The whole suite runs in .venv.
#
#   bash scripts/smoke.sh    # 4 minutes on 2 cores with the installation of .venv-3.12, which a change of pins repeats
#
# Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# No PyTorch: of the exports, llama.cpp runs the one that needs none.
tests=(
  tests/model/test_network.py
  tests/model/test_attention.py
  tests/model/test_loss.py
  tests/training/test_step.py
  tests/training/test_checkpoint.py
  tests/machine/test_devices.py
  tests/machine/test_roofline.py
  tests/machine/test_unstable.py
  tests/machine/test_topologies.py::test_a_step_on_a_single_v6e_has_no_array_of_length_by_length
  tests/model/test_attention_aot.py::test_the_kernel_runs_and_memory_is_linear_in_the_length
  tests/test_e2e.py::test_a_run_leaves_everything_the_contract_names
  tests/test_e2e.py::test_a_run_that_is_killed_again_and_again_ends_like_one_that_is_not
  tests/test_e2e.py::test_generate_streams_what_it_returns_and_repeats_with_its_seed
  tests/export/test_export_gguf.py::test_probabilities_are_ours
  tests/export/test_export_gguf.py::test_the_command_says_what_it_verified
)

find_python() { # pyenv's python3.12 fails unless that version is chosen
  local candidate
  for candidate in python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))' 2> /dev/null; then
      echo "$candidate"
      return
    fi
  done
  return 1
}
if ! python=$(find_python); then
  echo "== no smoke set on the newest JAX: Python 3.12 with its venv module is not installed"
  exit
fi

venv=.venv-3.12
tools=$(grep -E '^(uv|pytest|hypothesis|xllamacpp)' requirements-test.txt)
pins=$(cat requirements.txt requirements-aot.txt && echo "$tools")
if ! cmp -s - "$venv/installed" <<< "$pins"; then
  echo "== making $venv with $("$python" --version)"
  rm -rf "$venv"
  "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^uv=' <<< "$tools")"
  install=("$venv/bin/python" -m uv pip install --quiet --python "$venv/bin/python") # a fifth of pip's CPU seconds
  "${install[@]}" -r requirements.txt -r <(echo "$tools")
  "${install[@]}" --no-deps --target "$venv/aot" -r requirements-aot.txt # apart, as in setup.sh
  echo "$pins" > "$venv/installed"
fi
echo "== smoke set on JAX $("$venv/bin/python" -c 'import jax; print(jax.__version__)')"
export LOWRANK_NO_SKIP="${LOWRANK_NO_SKIP-1}" LOWRANK_TEST_CACHE="${LOWRANK_TEST_CACHE-$PWD/$venv/cache}"
"$venv/bin/python" -m pytest -n 2 --dist loadfile "${tests[@]}" "$@"
