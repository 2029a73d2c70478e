"""Files of the benchmarks: from a directory that the user gives, or from the hub.

Whatever a file's format, its rows are brought to one form and have one digest. Rows from the hub
must have the digest that is written here, so a moved branch or an edited file never passes unseen.
Files that the user gives may differ: the digest then becomes part of the task's version.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from optiq import extras, hub
from optiq.errors import EngineFailure, UsageError

Row = dict[str, Any]
_Check = Callable[[Any], bool]

_MMLU = ("cais/mmlu", "c30699e8356da336a370243923dbaf21066bb9fe")
_GSM8K = ("openai/gsm8k", "e53f048856ff4f594e959d75785d2c2d37b678ee")
_IFEVAL = ("google/IFEval", "966cd89545d6b6acfd7638bc708b98261ca58e84")
_HUMANEVAL = ("openai/openai_humaneval", "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544")
_BFCL = (
    "gorilla-llm/Berkeley-Function-Calling-Leaderboard",
    "61fc0608cfd831fcfbbaa676ebdfef0ed963eeda",
)


@dataclasses.dataclass(frozen=True)
class BenchmarkFile:
    """One file of a benchmark.

    Attributes:
        path: place below `--data-dir`.
        repo: data set on the hub, and the commit of it.
        remote: path of the file there.
        columns: fields that are kept, and what a value must be.
        digest: of the rows of the hub; see `digest`.
        correct: applied to every row from the hub.
    """

    path: str
    repo: tuple[str, str]
    remote: str
    columns: Mapping[str, _Check]
    digest: str
    correct: Callable[[Row], Row] = lambda row: row


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where rows came from.

    Attributes:
        source: path, or `repository@commit/file` of the hub.
        digest: of the rows, hex.
        published: the rows are those of the hub.
    """

    source: str
    digest: str
    published: bool


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a file in file order, and where they came from."""

    rows: tuple[Row, ...]
    provenance: Provenance


def _text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _four_texts(value: object) -> bool:
    return _texts(value) and isinstance(value, list) and len(value) == 4


def _number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _below_four(value: object) -> bool:
    return _number(value) and value in range(4)


def _objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _turns(value: object) -> bool:
    return isinstance(value, list) and len(value) == 1 and _objects(value[0])


def _one_function(value: object) -> bool:
    if not (isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict)):
        return False
    parameters = value[0].get("parameters")
    return (
        isinstance(value[0].get("name"), str)
        and isinstance(parameters, dict)
        and isinstance(parameters.get("properties"), dict)
        and isinstance(parameters.get("required", []), list)
    )


def _one_call(value: object) -> bool:
    if not (isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict)):
        return False
    return len(value[0]) == 1 and all(
        isinstance(arguments, dict) and all(isinstance(v, list) for v in arguments.values())
        for arguments in value[0].values()
    )


def _without_nulls(row: Row) -> Row:
    """Drop the empty arguments that columnar formats add, and repair one prompt.

    Prompt 2785 asks for one placeholder on the hub and is checked for three; its authors changed
    the text to three (google-research, commit 26d8ccd), the hub's copy was not changed.
    """
    kwargs = [{k: v for k, v in one.items() if v is not None} for one in row["kwargs"]]
    prompt = row["prompt"]
    if row["key"] == 2785:
        prompt = prompt.replace("at least one placeholder (", "at least 3 placeholders (")
    return row | {"kwargs": kwargs, "prompt": prompt}


_QUESTION = {"subject": _text, "question": _text, "choices": _four_texts, "answer": _below_four}

FILES = {
    "mmlu/test": BenchmarkFile(
        path="mmlu/test.jsonl",
        repo=_MMLU,
        remote="all/test-00000-of-00001.parquet",
        columns=_QUESTION,
        digest="612dc746d12bdc68eefc0df57608250b68ffb8ac341b7155b4dfec9076cb43db",
    ),
    "mmlu/dev": BenchmarkFile(
        path="mmlu/dev.jsonl",
        repo=_MMLU,
        remote="all/dev-00000-of-00001.parquet",
        columns=_QUESTION,
        digest="0e66c90438e914e913f3d56c4b07e4fb90b75417a3d056d8238a36a47a026f58",
    ),
    "gsm8k/test": BenchmarkFile(
        path="gsm8k/test.jsonl",
        repo=_GSM8K,
        remote="main/test-00000-of-00001.parquet",
        columns={"question": _text, "answer": _text},
        digest="176818e0349688ae3031a37f2fe8f454e7575635b88232abfc6b3387320e6605",
    ),
    "ifeval/input": BenchmarkFile(
        path="ifeval/input_data.jsonl",
        repo=_IFEVAL,
        remote="ifeval_input_data.jsonl",
        columns={
            "key": _number,
            "prompt": _text,
            "instruction_id_list": _texts,
            "kwargs": _objects,
        },
        digest="66e79458fb191d26da17eec816ae0d0f7bf97eaa2ec1b92af546d6b933959f89",
        correct=_without_nulls,
    ),
    "bfcl/questions": BenchmarkFile(
        path="bfcl/BFCL_v3_simple.json",
        repo=_BFCL,
        remote="BFCL_v3_simple.json",
        columns={"id": _text, "question": _turns, "function": _one_function},
        digest="c716a593d1ed4e955acaba14500d2a62aee1f2c1e724830bccd9e191564c2b8e",
    ),
    "bfcl/answers": BenchmarkFile(
        path="bfcl/possible_answer/BFCL_v3_simple.json",
        repo=_BFCL,
        remote="possible_answer/BFCL_v3_simple.json",
        columns={"id": _text, "ground_truth": _one_call},
        digest="aef69634a53baf5fb323071d595167212588866ffa3e587358bee393b50db408",
    ),
    "humaneval/problems": BenchmarkFile(
        path="humaneval/HumanEval.jsonl.gz",
        repo=_HUMANEVAL,
        remote="openai_humaneval/test-00000-of-00001.parquet",
        columns=dict.fromkeys(
            ("task_id", "prompt", "canonical_solution", "test", "entry_point"), _text
        ),
        digest="9345bdf84c12086d808c671a8f61f2fa89353e1c147804ec9c2223102d7dadc3",
    ),
}


@dataclasses.dataclass(frozen=True)
class BenchmarkData:
    """Where benchmark files come from.

    Attributes:
        directory: `--data-dir`, laid out as `mmlu/test.jsonl`, `mmlu/dev.jsonl`,
            `gsm8k/test.jsonl`, `ifeval/input_data.jsonl`, `bfcl/BFCL_v3_simple.json`,
            `bfcl/possible_answer/BFCL_v3_simple.json`, `humaneval/HumanEval.jsonl.gz`; None for
            the hub.
        offline: use the hub's cache alone.
    """

    directory: Path | None
    offline: bool = False

    def load(self, name: str) -> Rows:
        """Rows of a file.

        Args:
            name: key of `FILES`.

        Raises:
            UsageError: if the file is missing, cannot be had, or is not of the benchmark's format.
            EngineFailure: if the hub fails, or its rows are not the published ones.
        """
        file = FILES[name]
        if self.directory is not None:
            path = self._given(self.directory, file)
            rows = _checked(read_rows(path), file, str(path))
            found = digest(rows)
            return Rows(rows, Provenance(str(path), found, found == file.digest))
        repo_id, commit = file.repo
        source = f"{repo_id}@{commit}/{file.remote}"
        path = hub.fetch_dataset_file(repo_id, file.remote, revision=commit, offline=self.offline)
        rows = tuple(map(file.correct, _checked(read_rows(path), file, source)))
        found = digest(rows)
        if found != file.digest:
            raise EngineFailure(
                f"{source} has other rows than this version of optiq knows (digest {found[:12]}, "
                f"expected {file.digest[:12]}); delete {path} to download it again, or give the "
                f"files with --data-dir"
            )
        return Rows(rows, Provenance(source, found, True))

    def provenance(self, names: Sequence[str]) -> dict[str, Provenance]:
        """Where the files of a task came from, by their keys in `FILES`; for reports."""
        return {name: self.load(name).provenance for name in names}

    def variant(self, names: Sequence[str]) -> str:
        """A suffix for a task's version: empty for published rows, else by their content."""
        found = self.provenance(names)
        if all(file.published for file in found.values()):
            return ""
        joined = "".join(file.digest for file in found.values())
        return f"data-{hashlib.sha256(joined.encode()).hexdigest()[:8]}"

    @staticmethod
    def _given(directory: Path, file: BenchmarkFile) -> Path:
        path = directory / file.path
        if not directory.is_dir():
            raise UsageError(f"--data-dir {directory} is no directory; give one with {file.path}")
        if not path.is_file():
            raise UsageError(
                f"--data-dir {directory} has no {file.path}; put the file there, or leave the "
                f"option out to use the hub"
            )
        return path


def digest(rows: Sequence[Row]) -> str:
    """SHA-256 over the rows as canonical JSON lines, hex; the same whatever file they are from."""
    hasher = hashlib.sha256()
    for row in rows:
        text = json.dumps(row, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        hasher.update(text.encode() + b"\n")
    return hasher.hexdigest()


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a file of JSON lines, plain or in gzip, or of a Parquet file.

    Raises:
        UsageError: if the file cannot be read, a line is no JSON object (the line is named), or
            pyarrow is missing for a Parquet file.
    """
    if path.suffix == ".parquet":
        parquet = extras.load("pyarrow.parquet", extra="eval", purpose=f"reading {path.name}")
        arrow = extras.load("pyarrow", extra="eval", purpose=f"reading {path.name}")
        try:
            yield from parquet.read_table(path).to_pylist()
        except (OSError, arrow.ArrowException) as error:
            raise _unreadable(path, error) from None
        return
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # refuses halves of surrogate pairs
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UsageError(f"{path}, line {number} is not a JSON object")
        yield row


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; give a file of JSON lines") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UsageError:
    return UsageError(f"{path} cannot be read ({' '.join(str(error).split())}); get it again")


def _checked(rows: Iterator[Row], file: BenchmarkFile, source: str) -> tuple[Row, ...]:
    kept = []
    for number, row in enumerate(rows):
        for column, is_valid in file.columns.items():
            if column not in row:
                raise UsageError(
                    f"{source}: row {number} has no '{column}'; it has {sorted(row)}, and must "
                    f"have {sorted(file.columns)}"
                )
            if not is_valid(row[column]):
                raise UsageError(
                    f"{source}: '{column}' of row {number} is {str(row[column])[:60]!r}, which is "
                    f"not of the benchmark's format; compare the published file"
                )
        kept.append({column: row[column] for column in file.columns})
    if not kept:
        raise UsageError(f"{source} holds no rows; get it again")
    return tuple(kept)
