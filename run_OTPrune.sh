#!/usr/bin/env bash
# Evaluates LLaVA with and without OTPrune on eleven benchmarks and writes the table. Sets itself up on first use.
# What can be chosen: bash run_OTPrune.sh --help
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called with sh
set -euo pipefail

here=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd -P)
source "$here/LLaVA/scripts/setup.sh"

# The options need nothing but Python: --help and a wrong value do not wait for the set-up.
base=$python
[ -x "$base" ] || base=$(find_python)
(cd -- "$root/lmms_eval" && PYTHONPATH="$root/LLaVA" PYTHONDONTWRITEBYTECODE=1 "$base" -m lmms_eval_otprune.runner.options "$@")
for argument in "$@"; do
    case $argument in -h | --help) exit 0 ;; esac
done

set_up
# A folder named llava where the command is given must not be taken for the package.
export PYTHONSAFEPATH=1
exec "$python" -m lmms_eval_otprune.runner "$@"
