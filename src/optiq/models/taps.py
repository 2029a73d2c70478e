"""Taps: stand-ins for matrices that record their inputs and the cotangents of their outputs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Sequence
from typing import Any, cast

from optiq.artifacts import ModuleInfo
from optiq.backend import mx, nn
from optiq.models.modules import module_at


@dataclasses.dataclass
class Call:
    """One use of a matrix.

    Attributes:
        path: its module path.
        x: input; (..., in), or token ids for a lookup.
        indices: expert of each row of x, for expert stacks.
        lookup: x are row numbers of an embedding.
        g: cotangent of the output, once the backward pass has reached it.
    """

    path: str
    x: mx.array
    indices: mx.array | None = None
    lookup: bool = False
    g: mx.array | None = None


class _Tap:
    """Calls a module and records; everything else is forwarded to the module."""

    def __init__(self, module: nn.Module, path: str, taps: Taps) -> None:
        self._module, self._path, self._taps = module, path, taps

    def __call__(self, x: mx.array, *rest: Any, **named: Any) -> mx.array:  # noqa: ANN401
        y = self._module(x, *rest, **named)
        indices = rest[0] if rest else named.get("indices")
        lookup = isinstance(self._module, nn.Embedding)
        return self._taps.record(Call(self._path, x, indices, lookup), y)

    def as_linear(self, x: mx.array) -> mx.array:
        return self._taps.record(Call(self._path, x), self._module.as_linear(x))

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  any attribute of the module
        return getattr(self._module, name)


class Taps:
    """The calls recorded since `start`."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._gradients = False
        self._anchor: mx.array | None = None

    def start(self, *, gradients: bool, anchor: mx.array | None = None) -> None:
        """Forget earlier calls.

        Args:
            gradients: let a following vjp fill `Call.g`.
            anchor: a zero that the vjp is taken with respect to, added to what lookups return; for
                functions whose only other inputs are token ids.
        """
        self.calls = []
        self._gradients, self._anchor = gradients, anchor

    def record(self, call: Call, y: mx.array) -> mx.array:
        """Note a call; returns the output to pass on."""
        self.calls.append(call)
        if call.lookup and self._anchor is not None:
            y = y + self._anchor
        return _watched(y, call) if self._gradients else y


def _watched(y: mx.array, call: Call) -> mx.array:
    """The identity, whose vjp notes the cotangent."""

    @mx.custom_function
    def identity(value: mx.array) -> mx.array:
        return value

    @identity.vjp
    def _(_primal: mx.array, cotangent: mx.array, _output: mx.array) -> mx.array:
        call.g = cotangent
        return cotangent

    return cast(mx.array, identity(y))


def replace(root: nn.Module, path: str, new: Any) -> Any:  # noqa: ANN401  a module or a stand-in
    """Put `new` at a module path; returns what stood there. The order of modules stays."""
    parent, _, last = path.rpartition(".")
    node: Any = module_at(root, parent)
    key = int(last) if isinstance(node, list) else last
    old, node[key] = node[key], new
    return old


@contextlib.contextmanager
def tapped(root: nn.Module, prefix: str, modules: Sequence[ModuleInfo]) -> Generator[Taps]:
    """Tap the matrices under a prefix of module paths for the time of the context."""
    taps = Taps()
    originals: dict[str, nn.Module] = {}
    try:
        for info in modules:
            if info.path.startswith(prefix):
                path = info.path.removeprefix(prefix)
                originals[path] = module_at(root, path)
                replace(root, path, _Tap(originals[path], info.path, taps))
        yield taps
    finally:
        for path, module in originals.items():
            replace(root, path, module)
