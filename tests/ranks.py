"""Ranks on this machine, started as `mlx.launch` starts them on several."""

import contextlib
import json
import socket
import subprocess
import sys


def environments(folder, count=2):
    """What sets the environment of each rank; a file of hosts is written into the folder."""
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in free]
    hostfile = folder / "hosts.json"
    hostfile.write_text(json.dumps(hosts))
    return [["env", f"MLX_HOSTFILE={hostfile}", f"MLX_RANK={rank}"] for rank in range(count)]


@contextlib.contextmanager
def started(folder, *words, count=2):
    """A program on every rank; what is left of them at the end is killed."""
    with contextlib.ExitStack() as stack:
        out = []
        for rank, environment in enumerate(environments(folder, count)):
            log = stack.enter_context((folder / f"stderr.{rank}").open("w"))
            process = subprocess.Popen(
                [*environment, sys.executable, *words],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            stack.callback(_end, process)
            out.append(process)
        yield out


def _end(process):
    process.kill()
    process.wait()
    process.stdout.close()


def said(folder, rank):
    """What a rank wrote to stderr."""
    return (folder / f"stderr.{rank}").read_text()
