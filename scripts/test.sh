#!/usr/bin/env bash
# The whole test run: check, then the real kernel, then the lab. Root; touches only namespaces it makes.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "$(id -u)" -ne 0 ]; then
  echo "make test: needs root (network namespaces, ipset, iptables); got uid $(id -u). Try: sudo make test, or make check" >&2
  exit 3
fi
make --no-print-directory lint types layers
if [ $# -gt 0 ]; then
  exec .venv/bin/python -m pytest -q "$@"
fi
# Alone, since guests share the machine with nothing: they are slow, and some of their tests are about time.
# So do the tests with a thousand peers: all namespaces share one table of neighbours, and they fill it.
.venv/bin/python -m pytest -q -m "uml or alone"
# The rest by two workers, a file to a worker: both wait for kernels and processes most of the time.
exec .venv/bin/python -m pytest -q -n 2 --dist loadgroup -m "not uml and not alone"
