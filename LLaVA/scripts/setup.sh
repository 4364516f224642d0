# Sourced by run_OTPrune.sh and tests/run.sh: finds a Python, makes .venv with both packages once, and sets
#   root    the repository's folder
#   python  the interpreter of .venv, once set_up has returned
# Nothing is downloaded when the stamp in .venv says that it holds what the pyproject and constraints files ask for.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)
python=$root/.venv/bin/python

fail() {
    printf '%s: %s\n' "$(basename -- "$0")" "$1" >&2
    exit 1
}

is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

# The user's choice ($PYTHON), or the first Python >= 3.10 on the path.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        is_recent "$PYTHON" || fail "PYTHON=$PYTHON is not a Python >= 3.10."
        printf '%s\n' "$PYTHON"
        return
    fi
    local name
    for name in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if command -v "$name" >/dev/null && is_recent "$name"; then
            command -v "$name"
            return
        fi
    done
    fail "Python >= 3.10 is needed and none was found. On Debian or Ubuntu: apt install python3 python3-venv."
}

# What .venv was made from. The interpreter is part of it: an environment does not survive the loss of its Python.
wanted_stamp() {
    "$1" - "$root" <<'PYTHON'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(f"{root}\0{sys.version}".encode())
for name in ("LLaVA/pyproject.toml", "lmms_eval/pyproject.toml", "LLaVA/constraints.txt", "LLaVA/scripts/setup.sh"):
    digest.update((root / name).read_bytes())
print(digest.hexdigest())
PYTHON
}

install_packages() {
    local pip=("$python" -m pip --disable-pip-version-check --quiet install -c "$root/LLaVA/constraints.txt")
    # Built with the constraints' own setuptools, not with whatever is newest on the day.
    "${pip[@]}" setuptools wheel &&
        "${pip[@]}" --no-build-isolation -e "$root/LLaVA[train,figures,dev]" -e "$root/lmms_eval"
}

set_up() {
    local stamp=$root/.venv/otprune.stamp wanted
    if [ -x "$python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(wanted_stamp "$python" 2>/dev/null)" ]; then
        return
    fi
    local base
    base=$(find_python)
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$base cannot make virtual environments. On Debian or Ubuntu: apt install python3-venv."
    printf 'Setting up %s (once; this downloads about 3 GB) ...\n' "$root/.venv" >&2
    # The stamp is written last, so a set-up that was interrupted is done again.
    rm -f -- "$stamp"
    if ! is_recent "$python"; then
        rm -rf -- "$root/.venv"
        "$base" -m venv "$root/.venv" || fail "The virtual environment $root/.venv could not be made."
    fi
    install_packages || fail "The packages could not be installed, see above. The same command tries again."
    wanted=$(wanted_stamp "$python")
    printf '%s\n' "$wanted" >"$stamp"
}
