#!/usr/bin/env bash
# The whole default test suite, by two processes. Arguments go to pytest instead: bash launch/test.sh -m slow
source "$(dirname "${BASH_SOURCE[0]}")/install.sh" "[test]"
ruff check .
ruff format --check .
mypy
lint-imports
[ $# -gt 0 ] || set -- -n 2 --dist loadfile
exec python -m pytest "$@"
