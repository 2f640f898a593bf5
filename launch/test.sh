#!/usr/bin/env bash
# The whole default test suite. More arguments go to pytest: bash launch/test.sh -m slow
source "$(dirname "${BASH_SOURCE[0]}")/install.sh" "[test]"
ruff check .
ruff format --check .
mypy
lint-imports
exec python -m pytest "$@"
