#!/usr/bin/env bash
# Sets up, then checks style, spelling and types, and runs the tests: tests/run.sh [--transformers oldest|newest|VERSION] [pytest's arguments]
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called with sh
set -euo pipefail

here=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd -P)
source "$here/../LLaVA/scripts/setup.sh"

# Puts a transformers before the environment's own: the oldest that is allowed, the newest there is, or one by its version.
with_transformers() {
    local package
    case $1 in
        oldest) package=$(sed -n 's/.*"transformers>=\([0-9.]*\)".*/transformers==\1/p' "$root/LLaVA/pyproject.toml") ;;
        newest) package=transformers ;;
        *[!0-9.a-z]* | [!0-9]* | '') fail "--transformers takes oldest, newest or a version such as 5.24.0, not '$1'." ;;
        *) package=transformers==$1 ;;
    esac
    local folder=$root/.venv/transformers-$1
    rm -rf -- "$folder"
    # What it asks for in versions of its own; all else is the environment's.
    grep -vE '^(transformers|huggingface-hub|tokenizers)==' "$root/LLaVA/constraints.txt" >"$folder.txt"
    "$python" -m pip --disable-pip-version-check --quiet install -c "$folder.txt" --target "$folder" "$package" ||
        fail "$package could not be installed, see above."
    export PYTHONPATH=$folder${PYTHONPATH:+:$PYTHONPATH}
}

set_up
if [ "${1:-}" = --transformers ]; then
    with_transformers "${2:-}"
    shift 2
fi

cd -- "$root"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m codespell_lib README.md run_OTPrune.sh LLaVA lmms_eval tests .github
(cd LLaVA && "$python" -m mypy)
# One thread a process: the tests start processes of their own, and tiny models gain nothing from more.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$python" -m pytest tests --numprocesses auto --maxprocesses 8 --dist loadfile "$@"
if [ ! -x "${VLLM_VENV:-$root/.venv-vllm}/bin/python" ]; then
    printf 'Left out: the tests that need vLLM. bash tests/serve/run.sh sets it up and runs them.\n'
elif [ $# = 0 ]; then
    exec bash tests/serve/run.sh
fi
