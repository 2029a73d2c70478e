"""A table of named implementations, loaded when they are first used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar, cast

from optiq.errors import UsageError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names -> objects: built-ins from a static table, third parties from an entry-point group.

    Args:
        kind: what is registered, singular; used in messages and as entry-point group
            `optiq.<kind>`.
        builtin: name -> `module:attribute`.
    """

    def __init__(self, kind: str, builtin: Mapping[str, str]) -> None:
        self.kind = kind
        self._targets = dict(builtin)
        self._external: dict[str, EntryPoint] = {}
        for point in entry_points(group=f"optiq.{kind}"):
            if point.name in self._targets:
                raise UsageError(
                    f"the plug-in {point.value} redefines the built-in {kind} '{point.name}'; "
                    f"uninstall it"
                )
            other = self._external.setdefault(point.name, point)
            if other != point:
                raise UsageError(
                    f"the plug-ins {other.value} and {point.value} are both {kind} "
                    f"'{point.name}'; uninstall one"
                )

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted({*self._targets, *self._external})

    def get(self, name: str) -> T:
        """The object of that name.

        Raises:
            UsageError: if there is none, or its plug-in cannot be imported.
        """
        if name in self._targets:
            module, _, attribute = self._targets[name].partition(":")
            return cast(T, getattr(importlib.import_module(module), attribute))
        if name in self._external:
            try:
                return cast(T, self._external[name].load())
            except (ImportError, AttributeError) as error:
                raise UsageError(
                    f"the plug-in for {self.kind} '{name}' cannot be loaded: {error}"
                ) from error
        raise UsageError(f"no {self.kind} '{name}'; there are {self.names()}")
