#!/bin/sh
# What the network lab needs from the system, where there is a Debian to get it from. Never fails: without it the lab's
# tests are skipped, with the reason.
command -v ip >/dev/null 2>&1 && exit 0
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 || exit 0
apt-get update -qq && apt-get install -y -qq --no-install-recommends iproute2 || true
