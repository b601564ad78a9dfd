#!/bin/sh
# Install Debian's Prometheus server for tests/test_receivers.py, without starting it. Where that cannot be, say what
# to install; the other tests run without it.
set -u
have() { command -v prometheus >/dev/null 2>&1 && command -v promtool >/dev/null 2>&1; }
go_on() {
  echo "tests/test_receivers.py will not run: $1. Install prometheus and promtool (Debian: apt-get install prometheus; others: https://prometheus.io/download) and put both on PATH."
  exit 0
}

have && exit 0
command -v apt-get >/dev/null 2>&1 || go_on "no Prometheus server here, and no apt-get"
[ "$(id -u)" = 0 ] || go_on "no Prometheus server here, and installing it needs root"

echo "Installing Debian's prometheus (no service is started) ..."
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  trap 'rm -f "$policy"' EXIT
  trap 'exit 1' INT TERM
  printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" || go_on "cannot write $policy"
elif ! grep -q 101 "$policy"; then
  go_on "$policy lets services start"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq && apt-get install -y -qq --no-install-recommends prometheus >/dev/null || go_on "apt-get failed"
if command -v systemctl >/dev/null 2>&1; then  # nor is it to start with the machine
  systemctl disable prometheus >/dev/null 2>&1 || true
fi
have || go_on "Debian's package has brought no prometheus or promtool"
