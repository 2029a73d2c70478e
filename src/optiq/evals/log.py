"""Logs of benchmarks: one record an answer, appended while the run goes on, and a header.

`<task>.jsonl` holds the records, `<task>.json` the header (`EvalLog`). A record is on disk before
the next answer is taken, so a run that is killed loses only what had not been answered.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from optiq.artifacts import EvalLog, write_atomic
from optiq.configs import EvalConfig
from optiq.errors import ArtifactMismatch, UsageError
from optiq.evals.task import Item, Prompt, Response, Score, ToolCall

_FINGERPRINTED = ("task", "version", "subject", "items", "prompts", "num_samples", "provenance")
_OPTIONS = ("sampling", "seeds", "samples", "thinking")


@dataclasses.dataclass(frozen=True)
class ItemRecord:
    """One answer and its score; a line of `<task>.jsonl`.

    Attributes:
        id: of the item.
        sample: number of the answer among those to the item, from 0.
        prompt: hash of the prompt; empty where the answer came from elsewhere.
        response: what was scored; None where the harness got none.
        reasoning: what the model thought before its answer.
        looped: the output ends in a cycle.
        score: the score; its details are keys of the line itself.
    """

    id: str
    sample: int
    prompt: str
    response: Response | None
    reasoning: str
    looped: bool
    score: Score

    def to_line(self) -> str:
        """The record as JSON, without a newline."""
        response = self.response or Response("")
        fields: dict[str, Any] = {
            "id": self.id,
            "sample": self.sample,
            "prompt": self.prompt,
            "output": None if self.response is None else response.text,
            "reasoning": self.reasoning,
            "tool_calls": _plain_calls(response.tool_calls),
            "logprobs": response.logprobs,
            "parsed": self.score.parsed,
            "score": self.score.value,
            "tokens": response.num_tokens,
            "truncated": response.truncated,
            "looped": self.looped,
        }
        detail = {k: v for k, v in self.score.detail.items() if k not in fields}
        return json.dumps(fields | detail, allow_nan=False)

    @classmethod
    def from_line(cls, line: str) -> Self:
        """Read a line back.

        Raises:
            ValueError: if it is no record.
        """
        data = json.loads(line)
        try:
            calls, logprobs = data.pop("tool_calls"), data.pop("logprobs")
            text, tokens, truncated = (data.pop(k) for k in ("output", "tokens", "truncated"))
            response = Response(
                text or "",
                None if calls is None else tuple(ToolCall(**call) for call in calls),
                None if logprobs is None else tuple(logprobs),
                tokens,
                truncated,
            )
            own = {k: data.pop(k) for k in ("id", "sample", "prompt", "reasoning", "looped")}
            score = Score(data.pop("score"), data.pop("parsed"), data)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no record of an answer: {error}") from None
        return cls(response=None if text is None else response, score=score, **own)


def _plain_calls(calls: Sequence[ToolCall] | None) -> list[dict[str, Any]] | None:
    if calls is None:
        return None
    return [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]


def items_hash(items: Iterable[Item]) -> str:
    """Hash of items, in order."""
    return _hash([[item.id, dict(item.fields)] for item in items])


def prompt_hash(prompt: Prompt) -> str:
    """Hash of a prompt."""
    values = dataclasses.asdict(prompt)
    values.pop("images", None)  # places; what the pictures show is in the messages
    return _hash([type(prompt).__name__, values])


def prompts_hash(hashes: Iterable[str]) -> str:
    """Hash of the hashes of prompts, in order."""
    return _hash(list(hashes))


def _hash(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no JSON")


def with_fingerprint(header: EvalLog) -> EvalLog:
    """The header with the hash of all that its records depend on."""
    parts = [repr(getattr(header, name)) for name in _FINGERPRINTED]
    parts += [repr(header.options.get(name)) for name in _OPTIONS]
    if header.options.get("sampling") != "greedy":
        parts.append(repr(header.options.get("seed")))
    return dataclasses.replace(header, fingerprint=_hash(parts))


def header_path(folder: Path, task: str) -> Path:
    """The header of a task's log."""
    return folder / f"{task}.json"


def records_path(folder: Path, task: str) -> Path:
    """The records of a task's log."""
    return folder / f"{task}.jsonl"


def read_headers(folder: Path) -> dict[str, EvalLog]:
    """The headers in a directory of logs, by task.

    Raises:
        UsageError: if the directory does not exist.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no directory of logs; give one that optiq eval wrote")
    found = {}
    for path in sorted(folder.glob("*.json")):
        if path.with_suffix(".jsonl").is_file():
            found[path.stem] = EvalLog.load(path)
    return found


def config_of(header: EvalLog, folder: Path) -> EvalConfig:
    """The options of a run, from the header of its log.

    Raises:
        ArtifactMismatch: if they are not of this version of optiq.
    """
    try:
        return TypeAdapter(EvalConfig).validate_python(header.options)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ArtifactMismatch(
            f"the options in {header_path(folder, header.task)} are not of this version of optiq "
            f"({reason}); run the benchmark again"
        ) from None


def read_records(path: Path) -> list[ItemRecord]:
    """The records of a file; half a line at its end, of a run that was killed, is not one.

    Raises:
        ArtifactMismatch: if another line is no record.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(ItemRecord.from_line(line.decode()))
        except ValueError as error:
            raise ArtifactMismatch(
                f"{path}, line {number}: {error}; delete the file and run again"
            ) from None
    return records


class RunLog:
    """The log of one benchmark while it runs; a context manager that holds the files' lock.

    Args:
        folder: directory of logs.
        header: what the run is, with its fingerprint.

    Raises:
        ArtifactMismatch: if the directory has a log of another run of the task.
        UsageError: if another process is writing it.
    """

    def __init__(self, folder: Path, header: EvalLog) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._header = folder, header
        self._path = records_path(folder, header.task)
        self._file = self._path.open("ab")
        self.done: dict[tuple[str, int], ItemRecord] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.callback(self._file.close)
            self._lock()
            self._resume()
            undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"{self._path} is being written by another run; wait for it or give another -o"
            ) from None

    def _resume(self) -> None:
        """Take over the records of the same run; those that the harness failed on are dropped."""
        path = header_path(self._folder, self._header.task)
        if path.is_file():
            other = EvalLog.load(path)
            if other.fingerprint != self._header.fingerprint:
                raise ArtifactMismatch(
                    f"{path} is the log of another run ({_difference(other, self._header)}); give "
                    f"another -o, or delete {path.stem}.json and {path.stem}.jsonl there"
                )
        elif self._path.stat().st_size:
            raise ArtifactMismatch(f"{self._path} has no header beside it; give another -o")
        records = read_records(self._path)
        kept = [record for record in records if record.score.value is not None]
        self.done = {(record.id, record.sample): record for record in kept}
        if len(kept) < len(records) or not self._ends_whole():
            self._rewrite(kept)
        self._header.save(path)

    def _ends_whole(self) -> bool:
        data = self._path.read_bytes()
        return not data or data.endswith(b"\n")

    def _rewrite(self, records: Sequence[ItemRecord]) -> None:
        """Put these records in the place of all."""
        data = "".join(record.to_line() + "\n" for record in records).encode()
        write_atomic(self._path, data)
        self._file.close()
        self._file = self._path.open("ab")
        self._lock()

    def append(self, record: ItemRecord) -> None:
        """Write a record to the disk."""
        self._file.write(record.to_line().encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done[record.id, record.sample] = record

    def finish(self, order: Sequence[tuple[str, int]], header: EvalLog) -> None:
        """Put the records in order and write the last header.

        Args:
            order: id and sample of every record.
            header: with the score.
        """
        self._rewrite([self.done[key] for key in order])
        header.save(header_path(self._folder, header.task))


def _difference(old: EvalLog, new: EvalLog) -> str:
    """The first thing in which two runs differ, in words."""
    for name in _FINGERPRINTED:
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            if not dataclasses.is_dataclass(before):
                return f"its {name} is {before}, not {after}"
            for field in dataclasses.fields(before):
                values = getattr(before, field.name), getattr(after, field.name)
                if values[0] != values[1]:
                    return f"its {name} has {field.name} {values[0]}, not {values[1]}"
    return "its sampling, seeds or thinking are others"
