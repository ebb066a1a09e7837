#!/bin/bash
# Several machines on this one, to rehearse a cell that spans them: network namespaces on a switch.
#
#   scripts/machines.sh up robot gpu cluster      # 10.77.0.1, 10.77.0.2, 10.77.0.3
#   scripts/machines.sh on gpu genforce serve models/array_1
#   scripts/machines.sh down                      # ends what runs on them
#
# Needs root (CAP_NET_ADMIN) and iproute2. MACHINES (default: genforce) sets them apart from others'.
set -euo pipefail
name=${MACHINES:-genforce}
switch=$name-switch

usage() {
    sed -n '2,8s/^# \?//p' "$0" >&2
    exit 64
}

up() {
    [ $# -gt 0 ] || usage
    ip netns add "$switch"
    ip -n "$switch" link add bridge type bridge mcast_snooping 0
    ip -n "$switch" link set bridge up
    local number=0 machine
    for machine in "$@"; do
        number=$((number + 1))
        ip netns add "$name-$machine"
        ip -n "$name-$machine" link set lo up
        ip -n "$name-$machine" link add eth0 type veth peer name "port$number" netns "$switch"
        ip -n "$switch" link set "port$number" master bridge up
        ip -n "$name-$machine" address add "10.77.0.$number/24" dev eth0
        ip -n "$name-$machine" link set eth0 up
        ip -n "$name-$machine" route add 224.0.0.0/4 dev eth0 # how DDS finds its peers
    done
}

on() {
    [ $# -gt 1 ] || usage
    # Shared memory would reach from machine to machine, which no real network does.
    exec ip netns exec "$name-$1" env FASTDDS_BUILTIN_TRANSPORTS=UDPv4 "${@:2}"
}

down() {
    local machine pids
    for machine in $(ip netns list | cut -d' ' -f1 | grep "^$name-"); do
        pids=$(ip netns pids "$machine")
        [ -z "$pids" ] || kill $pids 2>/dev/null || true
        ip netns delete "$machine"
    done
}

case ${1:-} in
    up | on | down) "$@" ;;
    *) usage ;;
esac
