"""Two machines: two torchrun agents that meet by TCP, on one machine's loopback and in two network namespaces with addresses of
their own. The run is the one-node run of as many processes, bit for bit."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import TinySet
from tests.helpers.recipes import write_recipe
from tests.helpers.runs import ROOT, finish, launch, same

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# In namespaces of their own users may make networks; /run, where ip keeps their names, and all else goes with the last process.
UNSHARE = ["unshare", "--user", "--map-root-user", "--net", "--mount", "sh", "-ec"]
NETWORK = """
mount -t tmpfs none /run
for node in 0 1; do ip netns add node$node; ip -n node$node link set lo up; done
ip link add link0 netns node0 type veth peer name link1 netns node1
for node in 0 1; do ip -n node$node addr add 10.77.0.1$node/24 dev link$node; ip -n node$node link set link$node up; done
"""


def agents(per_node: int, endpoint: str, command: list[str], addresses: list[str]) -> list[list[str]]:
    """The command of each of two nodes, as docs/multi-node.md has it."""
    return [[*TORCHRUN, "--nnodes", "2", "--nproc-per-node", str(per_node), "--rdzv-backend", "c10d", "--rdzv-id", "test",
             "--rdzv-endpoint", endpoint, "--rdzv-conf", f"is_host={1 - node}", "--local-addr", address, *command]
            for node, address in enumerate(addresses)]


def finish_all(commands: list[list[str]]) -> None:
    started = [launch(command) for command in commands]
    try:
        for process in started:
            finish(process)
    finally:
        for process in started:
            process.terminate()  # nothing where it has ended; an agent takes its processes with it


def on_loopback(per_node: int, command: list[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    finish_all(agents(per_node, f"127.0.0.1:{port}", command, ["127.0.0.1"] * 2))


def in_namespaces(per_node: int, command: list[str]) -> None:
    commands = agents(per_node, "10.77.0.10:29500", command, ["10.77.0.10", "10.77.0.11"])
    lines = [f"ip netns exec node{node} env GLOO_SOCKET_IFNAME=link{node} {shlex.join(agent)} & node{node}=$!"
             for node, agent in enumerate(commands)]
    finish_all([[*UNSHARE, "\n".join([NETWORK, *lines, "trap 'kill $node0 $node1' TERM", "wait $node0", "wait $node1"])]])


def have_namespaces() -> bool:
    try:
        return subprocess.run([*UNSHARE, NETWORK], capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


@pytest.mark.parametrize("per_node, nodes", [(2, in_namespaces), pytest.param(1, on_loopback, marks=pytest.mark.slow),
                                             pytest.param(2, on_loopback, marks=pytest.mark.slow)])
def test_two_nodes_are_one(tiny_set: TinySet, tmp_path: Path, per_node: int, nodes: object) -> None:
    """One process a node shares the batch; two a node hold a tower each, and pairs share the batch."""
    if nodes is in_namespaces and not have_namespaces():
        nodes = on_loopback
    command = ["-m", "train.main", "--config", str(write_recipe(tmp_path, tiny_set.index)), f"--machine.runs={tmp_path}",
               "--train.epochs=1", f"--parallel.towers={per_node}", "--data.tier=resident", "--machine.resident_memory=gpu"]
    finish(launch([*TORCHRUN, "--standalone", "--nproc-per-node", str(2 * per_node), *command, "--machine.name=one"]))
    assert callable(nodes)
    nodes(per_node, [*command, "--machine.name=two"])
    same(tmp_path / "one", tmp_path / "two")


# What the Slurm script calls: srun runs its command as the second of two machines, torchrun notes what it was asked and trains
# until it is stopped, or ends with the code in a file.
FAKES = {"srun": 'while [[ $1 == --* ]]; do shift; done; SLURM_NODEID=1 exec "$@"',
         "torchrun": 'trap "exit 1" TERM; echo "$@" > asked; [[ -e code ]] && exit "$(cat code)"; echo $$ > pid.partial; '
                     'mv pid.partial pid; while true; do sleep 0.05; done',
         "scancel": '[[ "$*" == "--signal=TERM 12345" ]] && kill -TERM "$(cat pid)"',
         "scontrol": 'if [[ $1 == show ]]; then printf "alpha\\nbeta\\n"; else echo "$@" > requeued; fi'}


def test_the_slurm_script_stops_queues_again_and_resumes(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name, text in FAKES.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "12345", "SLURM_NNODES": "2",
                   "SLURM_JOB_NODELIST": "alpha,beta", "SLURM_GPUS_ON_NODE": "8"}
    command = ["bash", str(ROOT / "docs/slurm/train.sbatch"), "some.yaml", "mine", "--train.seed=2"]

    with subprocess.Popen(command, cwd=tmp_path, env=environment) as job:
        deadline = time.monotonic() + 20
        while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
        assert job.wait(20) == 0
    assert (tmp_path / "requeued").read_text() == "requeue 12345\n"
    asked = ("--nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d --rdzv-id 12345-0 --rdzv-endpoint alpha:22345 "
             "--rdzv-conf is_host=0,join_timeout=300 -m train.main --config some.yaml --machine.runs=runs --machine.name=mine")
    assert (tmp_path / "asked").read_text() == f"{asked} --train.seed=2\n"

    (tmp_path / "requeued").unlink()
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/config.yaml").touch()
    for code in (0, 1):  # finished; failed by itself, which another try would not mend
        (tmp_path / "code").write_text(str(code))
        assert subprocess.run(command, cwd=tmp_path, env=environment, timeout=20).returncode == code
        assert (tmp_path / "asked").read_text() == f"{asked} --resume --train.seed=2\n"
    assert not (tmp_path / "requeued").exists()
