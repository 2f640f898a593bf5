#!/usr/bin/env bash
# Runs the linters and the default test suite in two processes. Arguments go to pytest: bash launch/test.sh -m slow
source "$(dirname "${BASH_SOURCE[0]}")/install.sh" "[test]"
ruff check .
ruff format --check .
mypy
lint-imports
[ $# -gt 0 ] || set -- -n 2 --dist loadfile --no-loadscope-reorder
exec python -m pytest "$@"
