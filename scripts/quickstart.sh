#!/usr/bin/env bash
# From a fresh clone to a chat model in minutes: sets up .venv, trains, shows samples. Run again, it goes on or shows them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements.txt
run=${1:-runs/quickstart}

echo "== training configs/quickstart.py in $run (about 10 CPU minutes; if interrupted, run this again to go on)"
python -m lowrank_jax.main --config=configs/quickstart.py --workdir="$run"

echo
echo "== a sample of its prose"
python -m lowrank_jax.generate --workdir="$run" --prompt="ROMEO:" --max_tokens=120 --temperature=0.7
echo
echo "== and of its conversation"
for question in "Hello, how are you?" "What do you like to do?" "What is your name?"; do
  echo "> $question"
  python -m lowrank_jax.generate --workdir="$run" --chat --prompt="$question" --max_tokens=80 --temperature=0.5 < /dev/null
done

cat << END

== done. What next:
   report       $run/report.html
   chat         .venv/bin/python -m lowrank_jax.generate --workdir=$run --chat
   your text    .venv/bin/python -m lowrank_jax.main --config=configs/quickstart.py --workdir=runs/mine \\
                  --config.pretrain.sources="text:my/*.txt"
   bigger       .venv/bin/python -m lowrank_jax.plan --config=configs/custom.py
END
