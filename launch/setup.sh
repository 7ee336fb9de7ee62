#!/usr/bin/env bash
# Makes .venv beside this folder and installs ekfac_dist in it, unless that has been done.
#
#   bash launch/setup.sh [EXTRAS]     extras of pyproject.toml, such as test or test,lint
#
# PYTHON names the Python to use. Run it again after an interruption: it goes on.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
stamp="$venv/ekfac_dist.stamp"
log="$venv/setup.log"
wanted="${1:-test}"

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local candidate
  if [[ -n "${PYTHON:-}" ]]; then
    is_new_enough "$PYTHON" || fail "PYTHON is $PYTHON, which is no Python 3.11 or newer."
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11; do
    # Tried, not only looked up: version managers leave names behind that run nothing.
    if is_new_enough "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "No Python 3.11 or newer was found; install one, or name it: PYTHON=/path/to/python3."
}

make_venv() {
  local python
  python="$(find_python)"
  say "making .venv with $("$python" -c 'import sys; print(sys.executable, sys.version.split()[0])')"
  if "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
    "$python" -m venv --clear "$venv"
    return
  fi
  # Debian's python3 without python3-venv: the environment can be made, and given its pip by another.
  "$python" -m venv --clear --without-pip "$venv" >/dev/null 2>&1 \
    && "$python" -m pip --python "$venv/bin/python" install pip >"$log" 2>&1 \
    || fail "$python cannot make a virtual environment; install its venv package (on Debian:" \
      "apt install python3-venv), or name another Python: PYTHON=/path/to/python3."
}

# What is installed: a hash of what decides it, and the extras so far.
fingerprint() {
  "$venv/bin/python" - "$root/pyproject.toml" "$root/launch/constraints.txt" <<'PY'
import hashlib, sys
print(hashlib.sha256(b"\0".join(open(path, "rb").read() for path in sys.argv[1:])).hexdigest())
PY
}

if ! { is_new_enough "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
  make_venv
fi

hash="$(fingerprint)"
installed_hash="" installed=""
if [[ -f "$stamp" ]]; then
  read -r installed_hash installed <"$stamp" || true
fi
if [[ "$installed_hash" != "$hash" ]]; then
  installed=""
fi
missing=""
for extra in ${wanted//,/ }; do
  [[ ",$installed," == *",$extra,"* ]] || missing="$missing,$extra"
done
if [[ -z "$missing" ]]; then
  exit 0
fi
extras="${installed:+$installed}$missing"
extras="${extras#,}"

say "installing ekfac_dist[$extras] into .venv; this can take a few minutes"
rm -f "$stamp"
if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-input \
  -c "$root/launch/constraints.txt" -e "$root[$extras]" >"$log" 2>&1; then
  tail -n 30 "$log" >&2
  fail "the installation failed; its end is above, all of it in $log."
fi
printf '%s %s\n' "$hash" "$extras" >"$stamp"
say "done"
