#!/usr/bin/env bash
# Install what netpol needs on Debian 12: apt packages, then .venv/ with locked, hash-checked packages.
# Idempotent; a second run only compares a stamp. Needs root for the first run.
set -euo pipefail
cd "$(dirname "$0")/.."

APT=(iptables ipset iproute2 iputils-ping conntrack procps kmod netcat-openbsd
     containernetworking-plugins user-mode-linux ca-certificates
     bird2 frr gobgpd ipvsadm
     python3 python3-venv python3-dev gcc libc6-dev)
# The system's interpreter: python3-dev and the guest of the IPVS tests fit it, and any user can read it.
PYTHON=/usr/bin/python3

stamp=$(cat requirements/dev.lock pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1)
if [ -x .venv/bin/netpol-ctl ] && [ "$(cat .venv/stamp 2>/dev/null)" = "$stamp" ] \
   && [ -x /usr/sbin/ipset ] && [ -x /usr/sbin/iptables ] && [ -x /usr/lib/cni/bridge ]; then
  exit 0
fi
if [ "$(id -u)" -ne 0 ]; then
  echo "make setup: needs root (it installs Debian packages: ${APT[*]}); got uid $(id -u). Try: sudo make setup" >&2
  exit 3
fi
if ! command -v apt-get >/dev/null; then
  echo "make setup: needs Debian 12 (apt-get not found); install by hand: ${APT[*]}" >&2
  exit 3
fi
missing=()
for p in "${APT[@]}"; do
  [ "$(dpkg-query -W -f='${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing+=("$p")
done
if [ ${#missing[@]} -gt 0 ]; then
  echo "setup: apt-get install ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get -qq update
  apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null
fi
echo "setup: .venv with locked packages"
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
.venv/bin/python -m pip install -q --disable-pip-version-check --use-pep517 --require-hashes -r requirements/dev.lock
.venv/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
ln -sf netpol-ctl .venv/bin/kubectl-netpol
echo "$stamp" > .venv/stamp
echo "setup: done"
