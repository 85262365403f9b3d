# Sourced by the other scripts: makes .venv in the repository's root once, and puts its programs first in PATH.
# usage: source scripts/environment.sh base|EXTRA   (an extra of pyproject.toml, such as dev). The argument must be
# given: without one, `source` would pass on the arguments of the script that calls it.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
extra="${1:?environment.sh needs base or an extra}"
[ "$extra" != base ] || extra=""
python="${PYTHON:-python3}"

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $("$python" --version 2>&1) is too old: Python 3.11 or newer is needed (set PYTHON to choose one)" >&2
    exit 1
fi

stamp="$root/.venv/.installed-${extra:-base}-$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
    echo "setting up $root/.venv (once; torch is a large download)"
    [ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv"
    "$root/.venv/bin/python" -m pip install --disable-pip-version-check \
        --constraint "$root/constraints.txt" --editable "$root${extra:+[$extra]}"
    touch "$stamp" "${stamp/installed-$extra-/installed-base-}"
fi
PATH="$root/.venv/bin:$PATH"
