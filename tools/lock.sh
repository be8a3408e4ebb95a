#!/usr/bin/env bash
# Write constraints.txt: what the requirements*.txt pull in, pinned for all supported Pythons, so
# that a set-up next year equals today's. Run it after changing a pin. Needs `uv` on the PATH.
# Pins that still fit stay as they are; `tools/lock.sh --upgrade` takes the newest of each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
sources=(requirements.txt requirements-docs.txt)  # PyBullet, of requirements-tabletop.txt, is alone
cp constraints.txt "$work/lock.txt"
uv pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate "$@" \
  --output-file "$work/lock.txt" "${sources[@]}"
{
  echo "# Written by tools/lock.sh from requirements.txt and requirements-docs.txt; do not edit."
  # NVIDIA's packages are left to torch, which pins them itself and on CPU builds needs none.
  grep -vE '^(nvidia-|cuda-|triton|torch)' "$work/lock.txt" |
    grep -vE "sys_platform == '(win32|emscripten|darwin)'" |
    grep -vxFf <(sed -E 's/ *[;#].*//; s/\[.*\]//' "${sources[@]}" | grep -v '^$') |
    grep -vE "^($(sed -E 's/(==|\[| *#).*//' "${sources[@]}" | grep -v '^$' | sort -u | paste -sd'|'))=="
} > constraints.txt.new
mv constraints.txt.new constraints.txt
