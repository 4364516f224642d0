#!/usr/bin/env bash
# Sets up, then checks style and runs the tests. Arguments go to pytest.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
source "$here/../LLaVA/scripts/setup.sh"
set_up

cd -- "$root"
"$python" -m ruff check .
"$python" -m ruff format --check .
# One thread a process: the tests start processes of their own, and tiny models gain nothing from more.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m pytest tests "$@"
