#!/usr/bin/env bash
# What only a GPU shows, the most telling first: the kernels' tests, selection, prefill, a POPE-shaped run, the suite.
# Needs a Python with PyTorch, Triton, transformers and pytest; the package need not be installed. What fails or takes
# too long is reported, and the rest goes on.
#
#   bash LLaVA/scripts/measure_gpu.sh [DIR]      results in DIR, gpu by default; what is there already is not measured again
#   PYTHON=python3 POPE=100x18 ONE_BY_ONE=25 SUITE_LIMIT=100 STEP_LIMIT=300 (seconds a step) are its settings
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called with sh
set -uo pipefail

root=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../.." && pwd -P)
refuse() {
    echo "measure_gpu.sh: $1" >&2
    exit 2
}
case ${1:-gpu} in
    -h | --help) sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
    -*) refuse "unknown option $1; --help tells what there is" ;;
esac
whole='^[1-9][0-9]*$' pope=${POPE:-100x18}
for name in ONE_BY_ONE SUITE_LIMIT STEP_LIMIT; do
    [[ ${!name:-1} =~ $whole ]] || refuse "$name=${!name}: must be a whole number >= 1"
done
[[ $pope =~ ^[1-9][0-9]*x[1-9][0-9]*$ ]] || refuse "POPE=$pope: must be IMAGESxQUESTIONS, such as 500x18"
command -v -- "${PYTHON:-python3}" >/dev/null || refuse "there is no ${PYTHON:-python3}: set PYTHON"
mkdir -p -- "${1:-gpu}"
output=$(cd -- "${1:-gpu}" && pwd -P)
python=${PYTHON:-python3}
export PYTHONPATH="$root/LLaVA${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
cd -- "$root"

"$python" - <<'EOF' || exit 2
import sys
try:
    import torch
except ImportError:
    sys.exit(f"measure_gpu.sh: {sys.executable} has no PyTorch: set PYTHON")
if not torch.cuda.is_available():
    sys.exit("measure_gpu.sh: PyTorch sees no GPU on this machine")
print(torch.cuda.get_device_name(), torch.__version__)
EOF

failed=0
step() {
    local name=$1 begin=$SECONDS
    shift
    if timeout "${STEP_LIMIT:-300}" "$@" >"$output/$name.log" 2>&1; then
        echo "== $name: done in $((SECONDS - begin)) s"
    else
        echo "== $name: failed ($?) after $((SECONDS - begin)) s, see $output/$name.log"
        failed=1
    fi
    # Without progress bars and blank lines.
    tr '\r' '\n' <"$output/$name.log" | grep -v '%|\|^ *$' | tail -n 25 | cut -c1-400
}
measure() {
    local name=$1
    shift
    step "$name" "$python" -m llava.eval.latency "$@" --device cuda --output "$output/$name"
}

step kernels "$python" -m pytest -q -p no:cacheprovider tests/llava/test_kernels.py tests/llava/test_devices.py \
    -k '(test_kernels and not MachineCode) or real_gpu'
measure select select --curve
measure prefill prefill --model 1.5-7b --batch 1 8 --methods otprune divprune visionzip fastv@2 published
measure generate generate --model 1.5-7b --batch 1 16 --repetitions 3 --pope "$pope" \
    --pope-one-by-one "${ONE_BY_ONE:-25}"
measure prefill-1.6 prefill --model 1.6-7b --batch 1 --methods otprune published
measure prefill-13b prefill --model 1.5-13b --batch 1 8
if "$python" -c 'import lmms_eval, lmms_eval_otprune' 2>/dev/null; then
    measure suite suite --limit "${SUITE_LIMIT:-100}"
else
    echo "== suite: lmms_eval is not installed here: not measured"
fi
exit "$failed"
