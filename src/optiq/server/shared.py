"""One model on several ranks: what they are started with, and how the others are reached.

`mlx.launch` starts `optiq serve` on every rank. On rank 0 that is the server, whose engine process
leads; on the others it is an engine process that follows, and nothing listens. Before every step
the leader tells the followers what it has taken in, over sockets of its own beside those of MLX:
followers then wait in the kernel and not in a collective, and the end of a process shows at once.
Nothing here needs MLX, which a process that serves HTTP does without.
"""

from __future__ import annotations

import hmac
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Final, NoReturn

from optiq.configs import ServeConfig
from optiq.errors import EngineFailure, UsageError
from optiq.events import Emit
from optiq.server.catalog import Catalog

COMMAND: Final = (sys.executable, "-m", "optiq.server.ranks")
"""Starts the engine process of rank 0."""

LOST_S: Final = 20
"""Seconds until a machine that went away without a word counts as lost; a process shows at once."""

SECRET_BYTES: Final = 32
_NUMBER_BYTES: Final = 2
_JOIN_S: Final = 60.0
_PROBE_S: Final = 5


def check(catalog: Catalog, config: ServeConfig) -> None:
    """Refuse what several ranks cannot do.

    Raises:
        UsageError: naming the option.
    """
    if len(catalog.entries) > 1:
        raise UsageError(
            f"{len(catalog.entries)} models cannot be served under mlx.launch, which shares out "
            "one; give one --model"
        )
    for name, value in (("--drafter", config.drafter), ("--idle-unload", config.idle_unload)):
        if value is not None:
            raise UsageError(
                f"{name} {value} cannot be used under mlx.launch: it follows the clock of each "
                "rank; leave it out"
            )


def follow(emit: Emit) -> NoReturn:
    """Be a rank that is not the first, until the first one ends."""
    from optiq.server import ranks  # noqa: PLC0415  which needs MLX

    ranks.follow(emit)


def gathered(listener: socket.socket, secret: bytes, count: int) -> list[socket.socket]:
    """Connections of the followers.

    Args:
        listener: where they connect to.
        secret: that they know and others do not.
        count: of them.

    Raises:
        EngineFailure: if one does not come.
    """
    found: dict[int, socket.socket] = {}
    listener.settimeout(_JOIN_S)
    while len(found) < count:
        try:
            end, _ = listener.accept()
            end.settimeout(_JOIN_S)
            said = _exactly(end, SECRET_BYTES + _NUMBER_BYTES)
        except TimeoutError:
            raise EngineFailure(
                f"{len(found)} of {count} ranks have come within {_JOIN_S:g} s; look at their "
                "output, and start all of them again"
            ) from None
        if hmac.compare_digest(said[:SECRET_BYTES], secret):
            end.settimeout(None)
            probe(end)
            found[int.from_bytes(said[SECRET_BYTES:])] = end
        else:
            end.close()  # a stranger
    return [found[rank] for rank in sorted(found)]


def joined(host: str, port: int, secret: bytes, rank: int) -> socket.socket:
    """A connection to the leader.

    Raises:
        EngineFailure: if it cannot be reached.
    """
    try:
        end = socket.create_connection((host, port), _JOIN_S)
    except OSError as error:
        raise EngineFailure(
            f"rank 0 cannot be reached at {host}:{port} ({error}); open the network between ranks"
        ) from None
    end.settimeout(None)
    probe(end)
    end.sendall(secret + rank.to_bytes(_NUMBER_BYTES))
    return end


def _exactly(end: socket.socket, count: int) -> bytes:
    """So many bytes, or fewer if the other end is closed."""
    data = b""
    while len(data) < count and (more := end.recv(count - len(data))):
        data += more
    return data


def probe(end: socket.socket) -> None:
    """Let the kernel find out within `LOST_S` that the machine at the other end is gone."""
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    settings = {
        "TCP_KEEPIDLE": _PROBE_S,
        "TCP_KEEPALIVE": _PROBE_S,  # the same on macOS
        "TCP_KEEPINTVL": _PROBE_S,
        "TCP_KEEPCNT": LOST_S // _PROBE_S - 1,
        "TCP_USER_TIMEOUT": 1000 * LOST_S,
    }
    for name, value in settings.items():
        option = getattr(socket, name, None)
        if option is not None:
            end.setsockopt(socket.IPPROTO_TCP, option, value)


def watch(ends: Sequence[socket.socket], lost: Callable[[int], None]) -> None:
    """Call `lost` with the number of a rank, in a thread, when it has gone.

    Args:
        ends: of ranks 1, 2, ..., which say nothing.
        lost: takes the number.
    """
    for rank, end in enumerate(ends, 1):
        threading.Thread(target=_await_end, args=(end, rank, lost), daemon=True).start()


def _await_end(end: socket.socket, rank: int, lost: Callable[[int], None]) -> None:
    try:
        end.recv(1)
    except OSError:
        pass  # however it ended
    lost(rank)
