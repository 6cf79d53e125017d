#!/bin/sh
# Install the browser with which the tests look at the relay's pages. Debian and Ubuntu; needs root.
set -eu
if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then
    echo "chromium and chromedriver are installed already."
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "This script knows apt-get only; install chromium and chromedriver by other means." >&2
    exit 1
fi
apt-get update
apt-get install -y --no-install-recommends chromium chromium-driver
