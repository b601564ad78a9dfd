#!/bin/sh
# Install Debian's Chromium and its driver for tests/test_browser.py. Where that cannot be, say what to install, and fail.
set -u
have() { command -v chromium >/dev/null 2>&1 && command -v chromedriver >/dev/null 2>&1; }
fail() {
  echo "tests/test_browser.py cannot run: $1. Install Chromium and its driver (Debian: apt-get install chromium chromium-driver) and put 'chromium' and 'chromedriver' on PATH." >&2
  exit 1
}

have && exit 0
command -v apt-get >/dev/null 2>&1 || fail "no chromium and chromedriver here, and no apt-get"
[ "$(id -u)" = 0 ] || fail "no chromium and chromedriver here, and installing them needs root"

echo "Installing Debian's chromium and chromium-driver ..."
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver fonts-dejavu-core >/dev/null || fail "apt-get failed"
have || fail "Debian's packages have brought no chromium or no chromedriver"
