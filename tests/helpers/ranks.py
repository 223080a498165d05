"""Start a command once for each rank, as torchrun does, without the seconds of its imports: `python ranks.py N COMMAND…`.

The exit code is 1 when that of a rank is not 0, and the others are terminated then."""

import os
import socket
import subprocess
import sys
import time


def main(count: int, command: list[str]) -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": str(port)}
    ranks = [subprocess.Popen(command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]
    try:
        while None in (codes := [rank.poll() for rank in ranks]):
            if any(codes):
                for rank in ranks:
                    rank.terminate()
                codes = [rank.wait() for rank in ranks]
                break
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
