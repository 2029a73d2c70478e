"""Scores of responses that were recorded elsewhere, and of logs over again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from optiq.artifacts import EvalLog, SubjectInfo, write_atomic
from optiq.configs import EvalConfig, RunConfig
from optiq.data.benchmarks import BenchmarkData
from optiq.errors import ArtifactMismatch, UsageError
from optiq.evals.exact import from_file
from optiq.evals.log import (
    ItemRecord,
    RunLog,
    config_of,
    header_path,
    items_hash,
    read_headers,
    read_records,
    records_path,
    with_fingerprint,
)
from optiq.evals.provenance import provenance
from optiq.evals.report import finished
from optiq.evals.run import (
    Evaluation,
    check_folder,
    check_ready,
    chosen_tasks,
    options_of,
    score_of,
    version_of,
    write_report,
)
from optiq.evals.task import Chat, Item, Response, Task, ToolCall
from optiq.evals.tasks import TASKS
from optiq.events import Emit, no_emit, track
from optiq.work import digest, work_root

_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class ResponseFile:
    """A file of responses to a benchmark.

    Attributes:
        path: JSON lines of `id` and `response`; an id may be there several times.
        task: the benchmark.
        partial: items without a response are left out, and the version of the log says so.
    """

    path: Path
    task: Task
    partial: bool = False


def response_file(path: Path, config: EvalConfig, *, partial: bool = False) -> ResponseFile:
    """A file of responses to the one benchmark that the options name.

    Raises:
        UsageError: if they name none or several.
    """
    named = config.tasks or config.task_file
    tasks = chosen_tasks(config) if named else []
    if len(tasks) != 1:
        raise UsageError("--responses is a file for one benchmark; name it with --tasks NAME")
    return ResponseFile(path, tasks[0], partial)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A line of a file of responses."""

    id: str
    response: Response


def score_responses(
    file: ResponseFile,
    logs: Path | None = None,
    *,
    config: EvalConfig,
    run: RunConfig | None = None,
    emit: Emit = no_emit,
) -> Evaluation:
    """Score a file of responses and write the logs and the report of a run.

    Records are in the order of the file. A file that covers all items of the benchmark, or all of
    the default share, needs no option that says so.

    Args:
        file: responses to a benchmark.
        logs: directory of logs; default: in the work directory, by file and options.
        config: options of the items and the scoring.
        run: work directory, offline.
        emit: receives progress.

    Raises:
        UsageError: if the file is not of the form, has unknown ids or lacks some.
    """
    run = run or RunConfig()
    data = BenchmarkData(config.data_dir, run.offline)
    task = file.task
    recorded = read_responses(file.path)
    items = _covered(file, recorded, config, data)
    _check_forms(file, recorded, items, config)
    samples = Counter[str]()
    keys = []
    for line in recorded:
        keys.append((line.id, samples[line.id]))
        samples[line.id] += 1
    header = _header(file, config, data, [item for id_, item in items.items() if id_ in samples])
    if len(samples) < len(items):
        header = dataclasses.replace(header, version=f"{header.version}+partial")
    header = with_fingerprint(header)
    folder = logs or work_root(run) / f"eval-{digest(file.task.name, header.fingerprint)}"
    check_folder(folder, header.subject)
    with RunLog(folder, header) as log:
        pairs = list(zip(keys, recorded, strict=True))
        for key, line in track(pairs, emit, task.name, len(pairs), "responses"):
            if key not in log.done:
                score = score_of(task, items[line.id], line.response, config)
                log.append(ItemRecord(*key, "", line.response, "", looped=False, score=score))
        log.finish(keys, finished(header, [log.done[key] for key in keys]))
    return Evaluation(write_report(folder, header.subject), folder)


def read_responses(file: Path) -> list[Recorded]:
    """The lines of a file of responses.

    Raises:
        UsageError: if it cannot be read, or a line is not of the form; names the line.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"{file} does not exist; give a file of responses") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read as UTF-8 text: {error}") from None
    found = []
    # not splitlines: U+2028 and its like may stand inside a JSON string
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            found.append(_recorded(line, f"{file}, line {number}"))
    if not found:
        raise UsageError(
            f'{file} holds no responses; give lines such as {{"id": "0", "response": "..."}}'
        )
    return found


def _recorded(line: str, where: str) -> Recorded:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is no JSON: {error}") from None
    if not isinstance(row, dict) or "id" not in row or "response" not in row:
        raise UsageError(f'{where} must be an object such as {{"id": "0", "response": "..."}}')
    id_, response = row["id"], row["response"]
    if not isinstance(id_, str | int) or isinstance(id_, bool):
        raise UsageError(f"{where}: 'id' must be a text or a whole number, not {id_!r}")
    if isinstance(response, str):
        return Recorded(str(id_), Response(response))
    if isinstance(response, list) and all(map(_is_call, response)):
        calls = tuple(ToolCall(call["name"], call["arguments"]) for call in response)
        return Recorded(str(id_), Response("", calls))
    raise UsageError(
        f"{where}: 'response' must be a text, or a list of calls such as "
        f'{{"name": "f", "arguments": {{"x": 1}}}}, not {str(response)[:60]!r}'
    )


def _is_call(call: object) -> bool:
    return (
        isinstance(call, dict)
        and isinstance(call.get("name"), str)
        and isinstance(call.get("arguments"), dict)
    )


def _covered(
    file: ResponseFile, recorded: Sequence[Recorded], config: EvalConfig, data: BenchmarkData
) -> dict[str, Item]:
    """The items that the file is to cover: of the options, or all where its ids go beyond.

    Raises:
        UsageError: if an id is of neither, or an item has no response.
    """
    task = file.task
    ids = dict.fromkeys(line.id for line in recorded)
    items = {item.id: item for item in task.dataset(data, config)}
    if config.limit is None and not config.full and not ids.keys() <= items.keys():
        whole = dataclasses.replace(config, full=True)
        items = {item.id: item for item in task.dataset(data, whole)}
    unknown = [id_ for id_ in ids if id_ not in items]
    if unknown:
        raise UsageError(
            f"{file.path} has {len(unknown)} ids that {task.name} has not: {_some(unknown)}; its "
            f"ids are like {_some(list(items)[:2])}"
        )
    missing = [id_ for id_ in items if id_ not in ids]
    if missing and not file.partial:
        raise UsageError(
            f"{file.path} lacks {len(missing)} of the {len(items)} items of {task.name}: "
            f"{_some(missing)}; give --partial to score those that are there"
        )
    return items


def _some(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return ", ".join(repr(id_) for id_ in ids[:_SHOWN]) + more


def _check_forms(
    file: ResponseFile,
    recorded: Sequence[Recorded],
    items: Mapping[str, Item],
    config: EvalConfig,
) -> None:
    """Refuse lists of calls for a benchmark that offers no functions."""
    calling = next((line for line in recorded if line.response.tool_calls is not None), None)
    if calling is None:
        return
    native = dataclasses.replace(config, bfcl_form="native")
    prompt = file.task.solver(items[calling.id], native)
    if not (isinstance(prompt, Chat) and prompt.tools):
        raise UsageError(
            f"{file.path}: the response to '{calling.id}' is a list of calls; {file.task.name} "
            f"offers no functions: give texts"
        )


def _header(
    file: ResponseFile, config: EvalConfig, data: BenchmarkData, items: Sequence[Item]
) -> EvalLog:
    """The header of a log of recorded responses; how they were asked is not known."""
    variant = data.variant(file.task.files)
    return EvalLog(
        task=file.task.name,
        title=file.task.title,
        version="+".join([file.task.version, *filter(None, [variant]), "responses"]),
        fingerprint="",
        options=options_of(config),
        subject=SubjectInfo(
            kind="responses",
            name=str(file.path),
            fingerprint=hashlib.sha256(file.path.read_bytes()).hexdigest(),
        ),
        items=items_hash(items),
        prompts=None,
        num_items=len(items),
        num_samples=0,
        provenance=provenance(),
    )


def rescore(
    folder: Path, config: EvalConfig, run: RunConfig | None = None, emit: Emit = no_emit
) -> Evaluation:
    """Score the answers of a directory of logs again, and write logs and report anew.

    Args:
        folder: directory of logs.
        config: of which `data_dir` (default: that of then) and `allow_code_execution` count; the
            other options are those of the logs.
        run: offline.
        emit: receives progress.

    Raises:
        UsageError: if there are no complete logs, or a task needs to run code that may not.
        ArtifactMismatch: if the items are not those that were answered.
    """
    allowed, offline = config.allow_code_execution, (run or RunConfig()).offline
    headers = {name: h for name, h in read_headers(folder).items() if h.complete}
    if not headers:
        raise UsageError(f"{folder} has no finished log; run optiq eval first")
    configs = {
        name: dataclasses.replace(config_of(header, folder), allow_code_execution=allowed)
        for name, header in headers.items()
    }
    for name, old in configs.items():
        check_ready([_task(name, old)], old)
    for name, header in headers.items():
        data = BenchmarkData(config.data_dir or configs[name].data_dir, offline)
        _rescore(folder, header, configs[name], data, emit)
    subject = next(iter(headers.values())).subject
    return Evaluation(write_report(folder, subject), folder)


def _rescore(
    folder: Path, header: EvalLog, config: EvalConfig, data: BenchmarkData, emit: Emit
) -> None:
    task = _task(header.task, config)
    records = read_records(records_path(folder, header.task))
    items = _answered_items(task, header, records, config, data)
    scored = []
    for record in track(records, emit, task.name, len(records), "answers"):
        if record.response is not None:
            score = score_of(task, items[record.id], record.response, config)
            record = dataclasses.replace(record, score=score)
        scored.append(record)
    text = "".join(record.to_line() + "\n" for record in scored)
    write_atomic(records_path(folder, task.name), text.encode())
    version = _version(task, header, config, data)
    renewed = with_fingerprint(dataclasses.replace(header, version=version))
    finished(renewed, scored).save(header_path(folder, task.name))


def _task(name: str, config: EvalConfig) -> Task:
    """The benchmark of a log, or the user's own items."""
    own = from_file(config.task_file) if config.task_file is not None else None
    return own if own is not None and own.name == name else TASKS.get(name)


def _version(task: Task, header: EvalLog, config: EvalConfig, data: BenchmarkData) -> str:
    """The version of the task as it is now, with what a log adds to it."""
    words = header.version.split("+")
    added = [w for w in words if w in {"responses", "partial"} or w.startswith("context")]
    if "responses" not in added:
        return "+".join([version_of(task, config, data), *added])
    return "+".join([task.version, *filter(None, [data.variant(task.files)]), *added])


def _answered_items(
    task: Task,
    header: EvalLog,
    records: Sequence[ItemRecord],
    config: EvalConfig,
    data: BenchmarkData,
) -> dict[str, Item]:
    """The items that were answered, in the order of the benchmark.

    Raises:
        ArtifactMismatch: if they are not the same any more.
    """
    ids = {record.id for record in records}
    for full in (config.full, True):
        found = task.dataset(data, dataclasses.replace(config, full=full))
        kept = [item for item in found if item.id in ids]
        if items_hash(kept) == header.items:
            return {item.id: item for item in kept}
    raise ArtifactMismatch(
        f"the items of {task.name} are not those that were answered; give the --data-dir of then"
    )
