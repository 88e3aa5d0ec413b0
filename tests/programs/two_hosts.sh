#!/usr/bin/env bash
# Two "hosts" on this machine: two network namespaces joined by a veth pair, one rank in each, started as launch/README.md
# says. Needs root and iproute2.
#
#   tests/programs/two_hosts.sh CONFIG RECIPE OUT [key=value ...]      # CONFIG: a name in launch/
set -euo pipefail
cd "$(dirname "$0")/../.."
config=$1 recipe=$2 out=$3
shift 3

tag=$$
names=("packtrain_a_$tag" "packtrain_b_$tag")
trap 'for name in "${names[@]}"; do ip netns del "$name" 2>/dev/null || true; done' EXIT
for name in "${names[@]}"; do
    ip netns add "$name"
    ip -n "$name" link set lo up
done
ip link add va netns "${names[0]}" type veth peer name vb netns "${names[1]}"
ip -n "${names[0]}" addr add 10.77.0.1/24 dev va
ip -n "${names[1]}" addr add 10.77.0.2/24 dev vb
ip -n "${names[0]}" link set va up
ip -n "${names[1]}" link set vb up

host() { # rank, interface: what is typed on each host
    GLOO_SOCKET_IFNAME=$2 OMP_NUM_THREADS=1 ip netns exec "${names[$1]}" "${PYTHON:-python}" \
        -m accelerate.commands.launch --config_file "launch/$config.yaml" --num_machines 2 --num_processes 2 \
        --main_process_ip 10.77.0.1 --main_process_port 29500 --machine_rank "$1" \
        -m tests.programs.worker "$recipe" "$out" "${@:3}"
}

host 1 vb "$@" &
second=$!
host 0 va "$@"
wait "$second"
