"""A cluster of several raylets on this machine, as a process: prints its address and the ids of its nodes that have a CPU, and ends
with its standard input.

    python -m tests.faults.raylets 3
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster


def main(nodes: int) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 10**8})
    workers = [cluster.add_node(num_cpus=1, object_store_memory=10**8) for _ in range(nodes)]
    cluster.wait_for_nodes()
    print(cluster.address, *(node.node_id for node in workers), flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))
