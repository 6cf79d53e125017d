#!/bin/sh
# Installs the programs the benchmarks compare with, on Debian and its relatives. Run as root; may be run again.
# Those that are not installed are simply left out of the tables.
set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# Nothing of this is meant to run as a service: the benchmarks start what they need, on loopback.
had_policy=0
[ -e /usr/sbin/policy-rc.d ] && had_policy=1
if [ "$had_policy" = 0 ]; then
    printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
    chmod +x /usr/sbin/policy-rc.d
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
fi
apt-get install -y -qq --no-install-recommends rsync openssh-server openssh-client nginx-light curl socat openssl iperf3
apt-get install -y -qq --no-install-recommends globus-gridftp-server-progs globus-gass-copy-progs globus-proxy-utils ||
    echo "GridFTP is not packaged here; it is left out"
