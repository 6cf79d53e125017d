#!/bin/sh
# What the network lab needs from the system, where there is a Debian to get it from. Never fails: without it the lab's
# tests are skipped, with the reason. The router's daemon is installed without its service.
missing=""
command -v ip >/dev/null 2>&1 || missing="$missing iproute2"
command -v nft >/dev/null 2>&1 || [ -x /usr/sbin/nft ] || missing="$missing nftables"
command -v miniupnpd >/dev/null 2>&1 || [ -x /usr/sbin/miniupnpd ] || missing="$missing miniupnpd-nftables"
[ -n "$missing" ] || exit 0
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 || exit 0
# shellcheck disable=SC2086 # one word for each package
apt-get update -qq && apt-get install -y -qq --no-install-recommends $missing || true
