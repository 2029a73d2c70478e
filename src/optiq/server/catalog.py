"""Names of models -> directories. No request names a path: what is not here is not served."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

from optiq.errors import RequestRejected, UsageError

DEFAULT_NAME: Final = "default_model"
ANY_NAME: Final = "*"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model that may be loaded.

    Attributes:
        name: of its directory.
        folder: the directory.
        drafter: directory or name of a drafter.
        found: whether it was found in a directory of models, where what is no model for us is
            passed over, not an error.
    """

    name: str
    folder: Path
    drafter: str | None = None
    found: bool = False


@dataclasses.dataclass(frozen=True)
class Catalog:
    """Models by name.

    Attributes:
        entries: in the order of the command line; the first is the default.
        aliases: further names, and `*` for every name that is unknown.
    """

    entries: tuple[Entry, ...]
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls, paths: Sequence[Path], aliases: Sequence[str] = (), drafter: str | None = None
    ) -> Catalog:
        """The models of a command line.

        Args:
            paths: directories of a model, or of models.
            aliases: `NAME=MODEL`, or `*`, which is short for `*=` the first model.
            drafter: a directory, for the first model; or the name of one that fits all.

        Raises:
            UsageError: if a directory holds no model, two have one name, or an alias names none.
        """
        entries = [entry for path in paths for entry in _entries(path)]
        if not entries:
            raise UsageError("there is no model to serve; give --model DIR")
        if drafter is not None:
            count = 1 if Path(drafter).is_dir() else len(entries)
            for index in range(count):
                entries[index] = dataclasses.replace(entries[index], drafter=drafter)
        for number, entry in enumerate(entries):
            same = [other for other in entries[:number] if other.name == entry.name]
            if same:
                raise UsageError(
                    f"{same[0].folder} and {entry.folder} would both be {entry.name!r}; rename one"
                )
        names = [entry.name for entry in entries]
        return cls(tuple(entries), dict(_alias(text, names) for text in aliases))

    def only(self, names: Collection[str]) -> Catalog:
        """The models of these names, and their aliases."""
        aliases = {alias: name for alias, name in self.aliases.items() if name in names}
        return Catalog(tuple(one for one in self.entries if one.name in names), aliases)

    def resolve(self, name: str | None) -> str:
        """Name of the model that a request means; None and `default_model` mean the first.

        Raises:
            RequestRejected: 404, if there is none of that name.
        """
        names = [entry.name for entry in self.entries]
        if name in names:
            return name
        if name is None or name == DEFAULT_NAME:
            return names[0]
        found = self.aliases.get(name, self.aliases.get(ANY_NAME))
        if found is None:
            raise not_served(name, names)
        return found


def not_served(name: str, names: Sequence[str]) -> RequestRejected:
    """Refusal of a name that is not known."""
    return RequestRejected(
        f"model {name!r} is not served; there are {list(names)}",
        http_status=404,
        param="model",
        code="model_not_found",
    )


def _entries(path: Path) -> list[Entry]:
    """The models of one `--model`."""
    path = path.expanduser().resolve()
    if (path / "config.json").is_file():
        return [Entry(path.name, path)]
    if not path.is_dir():
        raise UsageError(f"--model {path} is no directory; check the path")
    folders = [folder for folder in sorted(path.iterdir()) if not folder.name.startswith(".")]
    entries = [
        Entry(folder.name, folder, found=True)
        for folder in folders
        if (folder / "config.json").is_file()
    ]
    if not entries:
        raise UsageError(f"{path} has no config.json, nor has a directory in it; give a model")
    return entries


def _alias(text: str, names: Sequence[str]) -> tuple[str, str]:
    """Alias and model of `NAME=MODEL`."""
    alias, equals, model = text.rpartition("=")
    if not equals and text == ANY_NAME:
        alias, model = ANY_NAME, names[0]
    if not alias or model not in names:
        raise UsageError(f"--alias {text!r} must be NAME=MODEL, with a MODEL of {list(names)}")
    if alias in names:
        raise UsageError(f"--alias {text!r} hides the model {alias!r}; take another name")
    return alias, model
