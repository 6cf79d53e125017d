#!/bin/sh
# What the tests need from the system and pip cannot bring, where there is a Debian to get it from. Never fails: a test
# that still finds a program missing is skipped and says which. Nothing is installed but what is missing.
# What systemd and reproducible builds are tried in (soaks: mmdebstrap, systemd-container) is not.
missing=""
# need PROGRAM PACKAGE...
need() {
    PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null 2>&1 && return
    shift
    missing="$missing $*"
}
# The network lab. The router's daemon comes without its service.
need ip iproute2
need nft nftables
need miniupnpd miniupnpd-nftables
# Disks of other kinds.
need mkfs.ext4 e2fsprogs
need mkfs.vfat dosfstools
need mkfs.exfat exfatprogs
need mount.exfat-fuse exfat-fuse
need mkntfs ntfs-3g
need mkfs.xfs xfsprogs
need mkfs.btrfs btrfs-progs
# Crashes at each call; the installer.
need strace strace
need openssl openssl
need curl curl
# A screen with a tray, and a mouse.
need Xvfb xvfb
need trayer trayer
need import imagemagick
need xdotool xdotool
need dbus-daemon dbus-daemon
[ -e /usr/lib/python3/dist-packages/gi ] || missing="$missing python3-gi"
ls /usr/lib/*/girepository-1.0/Gtk-3.0.typelib >/dev/null 2>&1 || missing="$missing gir1.2-gtk-3.0"
# The browser.
need chromium chromium
need chromedriver chromium-driver
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "Tests that need these are skipped (here they can be installed only by other means):$missing" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# It waits for another apt-get that is at work.
install() { apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=300 "$@"; }
# shellcheck disable=SC2086 # one word for each package
install $missing && exit 0
# One that this system does not have keeps the others away.
for package in $missing; do install "$package"; done
exit 0
