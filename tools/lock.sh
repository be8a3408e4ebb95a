#!/usr/bin/env bash
# Write constraints.txt: what requirements.txt pulls in, pinned for all supported Pythons, so that
# a set-up next year equals today's. Run it after changing a pin. Needs `uv` on the PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
{
  echo "# Written by tools/lock.sh from requirements.txt; do not edit."
  # NVIDIA's packages are left to torch, which pins them itself and on CPU builds needs none.
  uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate \
    requirements.txt 2>/dev/null |
    grep -vE '^(nvidia-|cuda-|triton|torch)' |
    grep -vE "sys_platform == '(win32|emscripten|darwin)'" |
    grep -vxFf <(sed -E 's/ *[;#].*//; s/\[.*\]//' requirements.txt | grep -v '^$') |
    grep -vE "^($(sed -E 's/(==|\[| *#).*//' requirements.txt | grep -v '^$' | sort -u | paste -sd'|'))=="
} > constraints.txt.new
mv constraints.txt.new constraints.txt
