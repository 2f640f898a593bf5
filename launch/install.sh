# shellcheck shell=bash
# Sourced by demo.sh, test.sh and make_tiny.sh: creates .venv beside the README and installs the package with the
# extras in $1. The versions in constraints.txt are tested together; pip takes others if Python or the machine needs them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || {
  echo "error: found $("$python" --version), but dpo_jax needs Python 3.11 to 3.13. Name one with PYTHON=python3.12" >&2
  exit 1
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
# A second run finds the stamp and skips pip.
stamp=.venv/.installed-$(cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)${1//[^a-z]/}
if [ ! -e "$stamp" ]; then
  echo "installing into .venv (a minute or two)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${1}"
  touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
