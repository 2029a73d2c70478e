"""The output head by slices of the vocabulary: nothing of its size times the tokens is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence

from optiq.artifacts import ModuleInfo
from optiq.backend import mx, nn
from optiq.errors import UnsupportedModel
from optiq.models.modules import module_at


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
        self._module = module_at(model, self.info.path)
        self._names = [name for name in ("weight", "bias") if name in self._module]

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return self.info.shape[0]

    @contextlib.contextmanager
    def slice(self, start: int, stop: int) -> Generator[None]:
        """Within the context the head has only the rows [start, stop): so have the logits.

        What a model does to its logits is elementwise (scale, soft-cap), so the slices of the
        logits are the logits of the slices.
        """
        whole: dict[str, mx.array] = {name: self._module[name] for name in self._names}
        try:
            for name, value in whole.items():
                self._module[name] = value[start:stop]
            yield
        finally:
            for name, value in whole.items():
                self._module[name] = value
