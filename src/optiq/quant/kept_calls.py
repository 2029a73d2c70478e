"""What reached the matrices of a block in a backward pass, until all of it is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from optiq.backend import is_cuda, load_arrays, mx, save_arrays
from optiq.models.taps import Call

_IN_MEMORY = 1 << 28


class KeptCalls:
    """Inputs and cotangents in bfloat16, by matrix.

    Args:
        folder: takes files; `close` deletes them.
        in_memory: bytes that stay in memory where that is the memory of the system; what comes
            after them goes to files.
    """

    def __init__(self, folder: Path, in_memory: int = _IN_MEMORY) -> None:
        self._folder, self._files = folder, list[Path]()
        self._bytes, self._in_memory = 0, in_memory
        self._calls: dict[str, list[tuple[int, Call]]] = {}

    def add(self, first: int, calls: Sequence[Call]) -> None:
        """Keep the calls of a micro-batch that begins with a sequence; inputs stay shared."""
        reached = [call for call in calls if call.g is not None]
        numbers = {id(call.x): n for n, call in enumerate(reached)}
        arrays: dict[str, mx.array] = {}
        for n, call in enumerate(reached):
            assert call.g is not None
            arrays[f"g{n}"] = call.g.astype(mx.bfloat16)
            if numbers[id(call.x)] == n:
                arrays[f"x{n}"] = call.x.astype(mx.bfloat16)
        mx.eval(arrays)
        self._bytes += sum(array.nbytes for array in arrays.values())
        if self._bytes > self._in_memory and not is_cuda():
            arrays = self._stored(arrays)
        for n, call in enumerate(reached):
            x, g = arrays[f"x{numbers[id(call.x)]}"], arrays[f"g{n}"]
            kept = dataclasses.replace(call, x=x, g=g)
            self._calls.setdefault(call.path, []).append((first, kept))

    def _stored(self, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """The same arrays, to be read when they are needed."""
        path = self._folder / f"calls_{len(self._files):04d}.safetensors"
        save_arrays(path, arrays)
        self._files.append(path)
        return load_arrays(path)

    @property
    def paths(self) -> list[str]:
        """Matrices that were reached, in the order of the backward pass."""
        return list(self._calls)

    def pop(self, path: str) -> list[tuple[int, Call]]:
        """Calls of a matrix with the first sequence of each; they are not kept any longer."""
        return self._calls.pop(path)

    def close(self) -> None:
        """Delete the files."""
        self._calls.clear()
        for path in self._files:
            path.unlink(missing_ok=True)
