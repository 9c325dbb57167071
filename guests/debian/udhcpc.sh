#!/bin/sh
# Told by udhcpc what the DHCP server said.
[ "$1" = bound ] || [ "$1" = renew ] || exit 0
ip -4 addr flush dev "$interface"
ip addr add "$ip/${mask:-24}" dev "$interface"
for to in $router; do ip route add default via "$to" dev "$interface"; done
: >/etc/resolv.conf
for server in $dns; do echo "nameserver $server" >>/etc/resolv.conf; done
