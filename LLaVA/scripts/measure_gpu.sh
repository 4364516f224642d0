#!/usr/bin/env bash
# What only a GPU shows. Needs a Python with PyTorch, Triton, transformers and pytest; the package need not be installed.
# A step that fails or takes too long is reported, and the rest goes on.
#
#   bash LLaVA/scripts/measure_gpu.sh [DIR [STEP...]]   results in DIR, gpu by default
#
# Steps, 8 minutes at most:  kernels select prefill prefill-qwen (done where none is named)
# and for a second call:     load devices generate prefill-1.6 prefill-13b suite
#
# Each leaves DIR/STEP.log, a measurement also JSON and Markdown in DIR/STEP; DIR/steps.jsonl has each step's status and
# seconds. A finished measurement is not repeated.
#
#   PYTHON=python3 STEP_LIMIT (seconds a step: 115, where steps are named 300) POPE=100x18 ONE_BY_ONE=25 SUITE_LIMIT=100
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called with sh
set -uo pipefail

first=(kernels select prefill prefill-qwen)
second=(load devices generate prefill-1.6 prefill-13b suite)
root=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../.." && pwd -P)
refuse() {
    echo "measure_gpu.sh: $1" >&2
    exit 2
}
case ${1:-gpu} in
    -h | --help) sed -n '2,/^\[/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
    -*) refuse "unknown option $1; --help tells what there is" ;;
esac
folder=${1:-gpu} steps=("${@:2}") limit=${STEP_LIMIT:-300}
[ ${#steps[@]} -gt 0 ] || steps=("${first[@]}") limit=${STEP_LIMIT:-115}
for step in "${steps[@]}"; do
    [[ " ${first[*]} ${second[*]} " == *" $step "* ]] || refuse "there is no step $step: ${first[*]} ${second[*]}"
done
whole='^[1-9][0-9]*$' pope=${POPE:-100x18} python=${PYTHON:-python3}
for name in ONE_BY_ONE SUITE_LIMIT STEP_LIMIT; do
    [[ ${!name:-1} =~ $whole ]] || refuse "$name=${!name}: must be a whole number >= 1"
done
[[ $pope =~ ^[1-9][0-9]*x[1-9][0-9]*$ ]] || refuse "POPE=$pope: must be IMAGESxQUESTIONS, such as 500x18"
command -v -- "$python" >/dev/null || refuse "there is no $python: set PYTHON"
mkdir -p -- "$folder" 2>/dev/null && [ -w "$folder" ] || refuse "$folder cannot be written to"
output=$(cd -- "$folder" && pwd -P)
export PYTHONPATH="$root/LLaVA${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
cd -- "$root"

"$python" - <<'EOF_CHECK' || exit 2
import sys
try:
    import torch
except ImportError:
    sys.exit(f"measure_gpu.sh: {sys.executable} has no PyTorch: set PYTHON")
if not torch.cuda.is_available():
    sys.exit("measure_gpu.sh: PyTorch sees no GPU on this machine")
print(torch.cuda.get_device_name(), torch.__version__)
EOF_CHECK

failed=0
run() { # NAME COMMAND...
    local name=$1 begin=$SECONDS status=0
    shift
    timeout -k 5 "$limit" "$@" >"$output/$name.log" 2>&1 || status=$? failed=1
    echo "{\"step\": \"$name\", \"status\": $status, \"seconds\": $((SECONDS - begin))}" >>"$output/steps.jsonl"
    echo "== $name: $([ $status = 0 ] && echo done || echo "failed ($status)") after $((SECONDS - begin)) s, $output/$name.log"
    # Without progress bars and blank lines.
    tr '\r' '\n' <"$output/$name.log" | grep -v '%|\|^ *$' | tail -n 25 | cut -c1-400
}
has() { "$python" -c "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))" "$@"; }
measure() { # NAME COMMAND [OPTION...]
    local device=(--device cuda)
    [ "$2" != serve ] || device=() # vLLM finds it
    if [ -e "$output/$1/$2.json" ]; then
        echo "== $1: measured before"
    else
        run "$1" "$python" -m llava.eval.latency "${@:2}" "${device[@]}" --output "$output/$1"
    fi
}
tests() { # NAME PYTEST-ARGUMENT...
    run "$1" "$python" -m pytest -q -rfE -p no:cacheprovider "${@:2}"
}

for step in "${steps[@]}"; do
    case $step in
        kernels) tests kernels tests/llava/test_kernels.py -k TestOnAGpu ;;
        select) measure select select --methods otprune divprune ;;
        prefill) measure prefill prefill --model 1.5-7b --batch 1 8 --methods otprune divprune fastv@2 ;;
        prefill-qwen) measure prefill-qwen prefill --model qwen2.5-vl-7b --dtype bfloat16 --batch 1 8 \
            --methods otprune divprune fastv@2 ;;
        load)
            measure load generate --model 1.5-7b --batch 1 8 32 --repetitions 20 --methods otprune
            ! has vllm || measure serve serve
            ;;
        devices) tests devices tests/llava/test_kernels.py tests/llava/test_devices.py -k 'not MachineCode and not pretended' ;;
        generate)
            measure generate generate --model 1.5-7b --batch 1 16 --repetitions 3 --pope "$pope" \
                --pope-one-by-one "${ONE_BY_ONE:-25}"
            ;;
        prefill-1.6) measure prefill-1.6 prefill --model 1.6-7b --batch 1 --methods otprune published ;;
        prefill-13b) measure prefill-13b prefill --model 1.5-13b --batch 1 8 ;;
        suite)
            if has lmms_eval lmms_eval_otprune; then
                measure suite suite --limit "${SUITE_LIMIT:-100}"
            else
                echo "== suite: lmms_eval is not installed here: not measured"
            fi
            ;;
    esac
done
exit "$failed"
