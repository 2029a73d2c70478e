"""The models of the engine process: described from their files, loaded when they are asked for.

Only the thread that owns MLX uses it. Together the weights stay below a limit: the model that was
used longest ago and does nothing makes room. Models that may be in memory together share the memory
for pasts in equal parts, whichever is loaded first.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import time
from collections.abc import Callable
from typing import Any, Final

from optiq.artifacts import BitPlan
from optiq.backend import is_cpu, memory_bytes, memory_left, mx, release_memory
from optiq.configs import parse_size
from optiq.data import chat
from optiq.engine.drafters import drafter_kind
from optiq.engine.engine import Engine, EngineOptions, load
from optiq.engine.options import KV_SHARE
from optiq.engine.reasoning import reasoning_format
from optiq.engine.text import Pieces, backend_of
from optiq.engine.tools import call_format
from optiq.errors import EngineFailure, RequestRejected, UsageError
from optiq.events import Emit, Notice
from optiq.models.families import check_standalone
from optiq.models.load import context_length, load_tokenizer, read_config
from optiq.models.vision.gemma4 import Gemma4Vision
from optiq.server.catalog import Entry, not_served
from optiq.server.jobs import ModelCard
from optiq.server.messages import WorkerOptions

_SHARE: Final = 0.8  # of the memory, as for a single model
_PLAIN_BITS: Final = 16  # of weights that are not quantized
_PACKED_GROWTH: Final = 1.15  # float32 scales instead of 16 bits


@dataclasses.dataclass
class Loaded:
    """A model in memory.

    Attributes:
        name: of its entry.
        engine: what runs it.
        pieces: its tokens as bytes.
        longest_token_bytes: no token stands for more text.
        size_bytes: memory that loading it took.
        num_tasks: jobs that use it.
        used_at: when it was last used, on the monotonic clock.
    """

    name: str
    engine: Engine
    pieces: Pieces
    longest_token_bytes: int
    size_bytes: int
    num_tasks: int = 0
    used_at: float = dataclasses.field(default_factory=time.monotonic)


class Shelf:
    """Models by name, in memory or not.

    Args:
        entries: what may be loaded, the default first.
        options: of the engine process.
        emit: receives notices.
        loading: is called with a name before that model is loaded.

    Attributes:
        num_changes: how often a model was loaded or unloaded.

    Raises:
        UsageError: if an entry that the user named is no model, or an option is wrong.
    """

    def __init__(
        self,
        entries: tuple[Entry, ...],
        options: WorkerOptions,
        emit: Emit,
        loading: Callable[[str], None],
    ) -> None:
        self._options, self._emit, self._loading = options, emit, loading
        limit = options.memory_limit
        self._limit_bytes = parse_size(limit) if limit else int(_SHARE * memory_bytes())
        self._engine_options = _engine_options(options)
        self._entries: dict[str, Entry] = {}
        self._cards: dict[str, ModelCard] = {}
        for entry in entries:
            self._add(entry)
        if not self._entries:
            raise UsageError("none of the directories is a model that can be served; see above")
        self._loaded: dict[str, Loaded] = {}
        self.num_changes = 0

    def _add(self, entry: Entry) -> None:
        try:
            self._cards[entry.name] = described(entry, self._options.max_context)
        except UsageError as error:
            if not entry.found:
                raise
            self._emit(Notice(f"{entry.folder} is not served: {error}", "warning"))
        else:
            self._entries[entry.name] = entry

    def cards(self) -> tuple[ModelCard, ...]:
        """All models, the default one first."""
        return tuple(
            dataclasses.replace(card, loaded=name in self._loaded)
            for name, card in self._cards.items()
        )

    @property
    def loaded(self) -> list[Loaded]:
        """The models in memory."""
        return list(self._loaded.values())

    @property
    def default(self) -> str:
        """Name of the first model."""
        return next(iter(self._entries))

    def use(self, name: str) -> Loaded | None:
        """A model, loaded if it is not; None while models that are busy leave no room for it.

        Raises:
            RequestRejected: if there is none of that name, or it is too large for the limit.
            EngineFailure: if it cannot be loaded.
        """
        found = self._loaded.get(name)
        if found is None:
            if name not in self._entries:
                raise not_served(name, list(self._entries))
            if not self._make_room(name):
                return None
            try:
                found = self.load(name)
            except UsageError as error:  # of the operator; the request is as it should be
                raise EngineFailure(
                    f"model {name!r} cannot be loaded; the server's log says why"
                ) from error
        found.used_at = time.monotonic()
        return found

    def _make_room(self, name: str) -> bool:
        """Unload what is needed for a model; False if that is busy."""
        need = self._resident_bytes(self._cards[name])
        if need > self._limit_bytes:
            raise RequestRejected(
                f"model {name!r} takes {need / 1e9:.2f} GB in memory, and "
                f"{self._limit_bytes / 1e9:.2f} GB are allowed; use another model",
                param="model",
                code="model_too_large",
            )
        excess = need + sum(one.size_bytes for one in self.loaded) - self._limit_bytes
        idle = sorted((one for one in self.loaded if not one.num_tasks), key=lambda a: a.used_at)
        if excess > sum(one.size_bytes for one in idle):
            return False
        for one in idle:
            if excess <= 0:
                break
            excess -= one.size_bytes
            self._unload(one)
        return True

    def _resident_bytes(self, card: ModelCard) -> int:
        """What the weights of a model take in memory, as `engine.loading` would hold them."""
        if not is_cpu():
            return card.size_bytes
        dense = int(card.size_bytes * 32 / (card.bpw or _PLAIN_BITS))
        return dense if dense <= self._limit_bytes else int(card.size_bytes * _PACKED_GROWTH)

    def load(self, name: str) -> Loaded:
        """Load a model, whatever else is in memory.

        Raises:
            UsageError: if it, or its drafter, is not what the engine can run.
        """
        entry = self._entries[name]
        self._loading(name)
        gc.collect()  # what is given back meanwhile would be taken off
        before = mx.get_active_memory()
        engine = load(entry.folder, entry.drafter, self._options_for(name), self._emit)
        if self._options.max_context is not None:
            engine.context = min(self._options.max_context, engine.context or 1 << 62)
        _warm(engine)
        vocabulary = backend_of(engine.tokenizer).get_vocab()
        loaded = Loaded(
            entry.name,
            engine,
            Pieces(engine.tokenizer),
            max(len(piece.encode()) for piece in vocabulary),
            max(0, mx.get_active_memory() - before),
        )
        self._loaded[name] = loaded
        self.num_changes += 1
        return loaded

    def _options_for(self, name: str) -> EngineOptions:
        """How a model is run that is to be loaded now, with its part of the memory for pasts."""
        options, together = self._engine_options, self._num_together
        if together == 1 or options.kv_memory is not None:
            return options  # a model alone is measured when it is loaded, which is more exact
        coming = sum(
            self._resident_bytes(card) for at, card in self._cards.items() if at not in self._loaded
        )
        held = sum(one.size_bytes for one in self.loaded)
        own = self._resident_bytes(self._cards[name])
        weights = max(own, min(coming, self._limit_bytes - held))
        kept = options.prefix_memory
        return dataclasses.replace(
            options,
            kv_memory=part_of_memory(memory_left(), own, weights, together),
            prefix_memory=None if kept is None else kept // together,
        )

    @property
    def _num_together(self) -> int:
        """Most models that may be in memory together, at least 1."""
        sizes = itertools.accumulate(sorted(map(self._resident_bytes, self._cards.values())))
        return max(1, sum(size <= self._limit_bytes for size in sizes))

    def _unload(self, loaded: Loaded) -> None:
        del self._loaded[loaded.name]
        self.num_changes += 1
        del loaded.engine  # whoever else has the record must not keep the weights
        gc.collect()
        release_memory()

    def unload_idle(self) -> bool:
        """Unload what nobody has used for a while; whether there was something."""
        left = self.idle_left_s()
        if left is None or left > 0:
            return False
        for one in self.loaded:
            if not one.num_tasks and self._left_s(one) <= 0:
                self._unload(one)
        return True

    def idle_left_s(self) -> float | None:
        """Seconds until something is to be unloaded; None if nothing is."""
        if self._options.idle_unload_s is None:
            return None
        return min((self._left_s(one) for one in self.loaded if not one.num_tasks), default=None)

    def _left_s(self, loaded: Loaded) -> float:
        assert self._options.idle_unload_s is not None
        return loaded.used_at + self._options.idle_unload_s - time.monotonic()


def part_of_memory(left: int, own: int, weights: int, together: int) -> int:
    """Bytes for the pasts of one of several models.

    Where memory is so short that the weights of others would leave too little, they are not waited
    for: a model has at least the part that it had if each of the others took as much as is left.

    Args:
        left: bytes that are free before it is loaded.
        own: of its weights.
        weights: of its weights and those that may come beside it.
        together: models that may be in memory together.
    """
    free = max(left - weights, (left - own) // together, 0)
    return int(KV_SHARE * free) // together


def described(entry: Entry, max_context: int | None = None) -> ModelCard:
    """A model as its files describe it; weights are not read.

    Raises:
        UsageError: if it is no model that runs by itself.
    """
    folder = entry.folder
    config = read_config(folder)
    check_standalone(config)
    tokenizer = load_tokenizer(folder, config)
    contexts = [n for n in (context_length(config), max_context) if n is not None]
    files = list(folder.glob("*.safetensors"))
    if not files:
        raise UsageError(f"{folder} has no safetensors file; give a model directory")
    has_chat = bool(tokenizer.has_chat_template)
    return ModelCard(
        name=entry.name,
        created=int(folder.stat().st_mtime),
        loaded=False,
        context=min(contexts, default=None),
        vision=_sees(entry, config),
        tools=has_chat and call_format(tokenizer) is not None and chat.offers_tools(tokenizer),
        thinking=has_chat and reasoning_format(tokenizer) is not None,
        chat=has_chat,
        drafter=None if entry.drafter is None else drafter_kind(entry.drafter),
        size_bytes=sum(file.stat().st_size for file in files),
        bpw=_bpw(entry, config),
    )


def _sees(entry: Entry, config: dict[str, Any]) -> bool:
    try:
        Gemma4Vision(entry.folder, config)
    except UsageError:
        return False
    return True


def _bpw(entry: Entry, config: dict[str, Any]) -> float | None:
    """Stored bits per weight of an artifact; of another quantized model, its default setting."""
    plan = entry.folder / "optiq" / "plan.json"
    if plan.is_file():
        return BitPlan.load(plan).bpw
    setting = config.get("quantization")
    if isinstance(setting, dict) and setting.get("bits") and setting.get("group_size"):
        return float(setting["bits"] + 32 / setting["group_size"])
    return None


def _engine_options(options: WorkerOptions) -> EngineOptions:
    try:
        return EngineOptions(
            memory_limit=options.memory_limit, limits=options.limits, **options.engine
        )
    except TypeError as error:
        raise UsageError(f"an option of the engine is wrong: {error}") from None


def _warm(engine: Engine) -> None:
    """Read and write a few tokens, alone and side by side, and make ready for grammars.

    No request then waits for compilation.

    Raises:
        OptiqError: if the model cannot write.
    """
    token = backend_of(engine.tokenizer).id_to_token(0) or "a"
    for count in (1, 2):
        for answer in engine.generate_choices(token, choices=count, temperature=0, max_tokens=3):
            answer.result()
    unequal = [engine.generate([0] * n, temperature=0, max_tokens=2) for n in (8, 7)]
    for answer in unequal:  # their prompts share a pass
        answer.result()
    engine.prepare_grammars()
