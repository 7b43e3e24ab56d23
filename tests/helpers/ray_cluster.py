"""
A Ray cluster of two nodes with one CPU each on this machine, for the tests.

    python ray_cluster.py FOLDER

prints its address; the second node is killed, or there again, after a line `kill` or `add` on
stdin, and a line answers. It ends with its input, so also when the tests are killed. Ray's logs and
sockets go into FOLDER, whose path has to be short.
"""

import os
import sys

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from ray.cluster_utils import Cluster

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
# A dead node is noticed in a second, where Ray waits for some 15.
QUICK = {"health_check_period_ms": 500, "health_check_failure_threshold": 2}


def main() -> None:
    head = {"include_dashboard": False, "temp_dir": sys.argv[1], "_system_config": QUICK}
    cluster = Cluster(initialize_head=True, head_node_args=NODE | head)
    try:
        node = cluster.add_node(**NODE)
        print(cluster.address, flush=True)
        for line in sys.stdin:
            if line == "kill\n":
                cluster.remove_node(node, allow_graceful=False)
            else:
                node = cluster.add_node(**NODE)
            print("done", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
