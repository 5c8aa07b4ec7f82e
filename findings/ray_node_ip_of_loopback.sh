#!/usr/bin/env bash
# Version: ray 2.60.0
# Behaviour: a head that is told to be on 127.0.0.1 is not. On Linux `ray start --head --node-ip-address=127.0.0.1` (and `ray.init` with
#   the same address) replaces loopback names by the machine's own address in the network, which then is the cluster's; the dashboard
#   alone stays where --dashboard-host says. Only where RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER is 0, the switch for laptops with other
#   systems, is the node 127.0.0.1. Ray reads the switch once, when it is imported.
# Seen: on Linux with another address than loopback: "told 127.0.0.1: the cluster is elsewhere; with the switch: 127.0.0.1"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "ray[default]==2.60.0"
export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token RAY_AUTH_TOKEN=only-for-this-script-0123456789abcdef PATH="$folder/venv/bin:$PATH"

free=$(python3 -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])")
address() { # of a cluster that lives for a moment
    local temporary
    temporary=$(mktemp -d)
    ray start --head --node-ip-address=127.0.0.1 --port=0 --dashboard-agent-listen-port=0 --ray-client-server-port="$free" \
        --include-dashboard=false --num-cpus=1 --object-store-memory=100000000 --temp-dir="$temporary" >"$folder/log" 2>&1 ||
        { cat "$folder/log" >&2; exit 1; }
    cut -d: -f1 "$temporary/ray_current_cluster"
    pkill -9 -f "$temporary" || true
    sleep 3
    rm -rf "$temporary"
}
told=$(address)
switched=$(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 address)
[ "$told" = 127.0.0.1 ] && where=127.0.0.1 || where="the cluster is elsewhere"
echo "told 127.0.0.1: $where; with the switch: $switched"
[ "$where" = "the cluster is elsewhere" ] && [ "$switched" = 127.0.0.1 ] || { echo "changed (or this machine has no other address)"; exit 1; }
