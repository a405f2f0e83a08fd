#!/usr/bin/env bash
# The whole test run: check, then the real kernel, then the lab. Root; touches only namespaces it makes.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "$(id -u)" -ne 0 ]; then
  echo "make test: needs root (network namespaces, ipset, iptables); got uid $(id -u). Try: sudo make test, or make check" >&2
  exit 3
fi
make --no-print-directory lint types layers
# One run, so that one closing line counts every test.
exec .venv/bin/python -m pytest -q "$@"
