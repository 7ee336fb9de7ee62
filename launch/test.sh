#!/usr/bin/env bash
# The tests.
#
#   bash launch/test.sh [PYTEST ARGUMENTS]     such as -m slow, -k refit, or tests/fit
#
# Two files are tested at a time, unless it is said otherwise (-n 0), tests of a marker are asked for
# (-m slow), which measure time and memory or need the whole machine, or output is to be seen (-s).
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
bash "$here/setup.sh" test
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
export HF_HUB_DISABLE_TELEMETRY=1
cd "$here/.."
case " $* " in
  *" -m"* | *" -n"* | *" -s "* | *" --pdb "*) ;;
  *) set -- -n 2 --dist loadfile --no-loadscope-reorder "$@" ;;  # long files are in the middle
esac
exec .venv/bin/python -m pytest "$@"
