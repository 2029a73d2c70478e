"""The output head a slice of the vocabulary at a time, so that nothing of its size times the tokens
is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from optiq.artifacts import ModuleInfo
from optiq.backend import mx, nn
from optiq.errors import UnsupportedModel


def head_of(modules: Sequence[ModuleInfo]) -> ModuleInfo:
    """The matrix that makes the logits: the head, or the tied embedding.

    Raises:
        UnsupportedModel: if there is none.
    """
    for info in modules:
        if info.role == "head" or info.tied:
            return info
    raise UnsupportedModel("this model has no output head that optiq can find")


class HeadSlices:
    """The head of a model whose weights are loaded.

    Args:
        model: the module tree.
        modules: its matrices.

    Attributes:
        info: the head.
    """

    def __init__(self, model: nn.Module, modules: Sequence[ModuleInfo]) -> None:
        self.info = head_of(modules)
        node: Any = model
        for part in self.info.path.split("."):
            node = node[int(part)] if isinstance(node, list) else getattr(node, part)
        self._module: nn.Module = node
        self._names = [name for name in ("weight", "bias") if name in node]

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return self.info.shape[0]

    @contextlib.contextmanager
    def slice(self, start: int, stop: int) -> Iterator[None]:
        """Within the context the head has only the rows [start, stop): so have the logits.

        What a model does to its logits is elementwise (scale, soft-cap), so the slices of the logits
        are the logits of the slices.
        """
        whole: dict[str, mx.array] = {name: self._module[name] for name in self._names}
        try:
            for name, value in whole.items():
                self._module[name] = value[start:stop]
            yield
        finally:
            for name, value in whole.items():
                self._module[name] = value
