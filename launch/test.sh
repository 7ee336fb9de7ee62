#!/usr/bin/env bash
# The tests.
#
#   bash launch/test.sh [PYTEST ARGUMENTS]     such as -m slow, or -k refit
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
bash "$here/setup.sh" test
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
export HF_HUB_DISABLE_TELEMETRY=1
cd "$here/.."
exec .venv/bin/python -m pytest "$@"
