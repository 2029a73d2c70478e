"""Benchmarks on a model: prompts -> answers -> scores -> records -> report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path

from optiq.artifacts import EvalLog, EvalReport, OptionValue, SubjectInfo
from optiq.configs import EvalConfig, RunConfig, ServedConfig
from optiq.data.benchmarks import BenchmarkData
from optiq.errors import ArtifactMismatch, UsageError
from optiq.eval_artifacts import CAPABILITY
from optiq.evals.exact import from_file
from optiq.evals.log import (
    ItemRecord,
    RunLog,
    items_hash,
    prompt_hash,
    prompts_hash,
    read_headers,
    read_records,
    records_path,
    with_fingerprint,
)
from optiq.evals.provenance import provenance
from optiq.evals.report import finished, report
from optiq.evals.subjects.base import Answer, Ask, Subject
from optiq.evals.subjects.opening import open_subject
from optiq.evals.task import Chat, Choice, Item, Prompt, Response, Score, Task
from optiq.evals.tasks import TASKS
from optiq.events import Emit, Notice, Progress, StageDone, StageStarted, no_emit

REPORT = "report.json"
_ROOM = 512  # tokens of an answer for which a prompt must leave room, if it may be that long


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Benchmarks of a model: the report, and the directory of the logs it is made from."""

    report: EvalReport
    logs: Path


@dataclasses.dataclass(frozen=True)
class _Question:
    """One question of a run: an answer to an item."""

    item: Item
    sample: int
    hash: str
    ask: Ask

    @property
    def key(self) -> tuple[str, int]:
        return self.item.id, self.sample


@dataclasses.dataclass(frozen=True)
class Plan:
    """A benchmark that is ready to run on a model.

    Attributes:
        task: the benchmark.
        config: options, `auto` forms resolved.
        questions: in the order of the log.
        header: of the log.
    """

    task: Task
    config: EvalConfig
    questions: tuple[_Question, ...]
    header: EvalLog

    def rounds(self, wave: int | None) -> list[list[_Question]]:
        """The questions in the order they are asked, by what is asked together.

        Choices with the same beginning are neighbours.
        """
        first: dict[str, int] = {}
        for number, question in enumerate(self.questions):
            first.setdefault(_beginning(question.ask.prompt), number)
        ordered = sorted(self.questions, key=lambda q: first[_beginning(q.ask.prompt)])
        size = wave or max(1, len(ordered))
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def _beginning(prompt: Prompt) -> str:
    return prompt.shared if isinstance(prompt, Choice) else ""


def chosen_tasks(config: EvalConfig) -> list[Task]:
    """The benchmarks that `--tasks` names: words or lists with commas; `all` means six.

    Without any it is the six, or the file of `--task-file` alone.

    Raises:
        UsageError: for a name that does not exist, and for one that runs code of the model without
            --allow-code-execution.
    """
    words = [word.strip() for text in config.tasks for word in text.split(",")]
    names = [name for word in words if word for name in (CAPABILITY if word == "all" else (word,))]
    if config.task_file is None:
        names = names or list(CAPABILITY)
    tasks = [TASKS.get(name) for name in dict.fromkeys(names)]
    if config.task_file is not None:
        tasks.append(from_file(config.task_file))
    check_ready(tasks, config)
    return tasks


def check_ready(tasks: Sequence[Task], config: EvalConfig) -> None:
    """Refuse benchmarks that cannot be scored, or that run code which nobody allowed.

    Raises:
        UsageError: names the flag, or what is missing.
    """
    for task in tasks:
        if task.needs_execution and not config.allow_code_execution:
            raise UsageError(
                f"{task.name} runs code that the model wrote; give --allow-code-execution, or "
                f"choose others with --tasks"
            )
        task.ready(config)


def evaluate(
    subject: Subject,
    tasks: Sequence[Task],
    config: EvalConfig,
    data: BenchmarkData,
    folder: Path,
    emit: Emit,
) -> EvalReport:
    """Run benchmarks on a model, or go on with them, and write logs and report.

    Args:
        subject: the model.
        tasks: benchmarks; see `chosen_tasks`.
        config: what is asked, and how.
        data: where benchmark files come from.
        folder: directory of logs; `<task>.jsonl`, `<task>.json` and `report.json` are written.
        emit: receives progress.

    Returns:
        The report over all complete logs in the directory.

    Raises:
        UsageError: if data are missing, the model cannot be asked so, or the directory has logs of
            another model or run.
        EngineFailure: if the machine or the server fails; what was answered is kept.
    """
    check_folder(folder, subject.info)
    plans = [plan(task, subject, config, data, emit) for task in tasks]
    for name, text in estimates(plans, subject):
        emit(Notice(f"{name}: {text}"))
    for each in plans:
        _run(each, subject, folder, emit)
    return write_report(folder, subject.info)


def check_folder(folder: Path, info: SubjectInfo) -> None:
    """Refuse a directory with the logs of another model.

    Raises:
        ArtifactMismatch: names both.
    """
    for name, header in read_headers(folder).items() if folder.is_dir() else ():
        if header.subject.fingerprint != info.fingerprint:
            raise ArtifactMismatch(
                f"{folder} has the log of {name} of {header.subject.name}, which is not "
                f"{info.name}; give another -o"
            )


def write_report(folder: Path, info: SubjectInfo) -> EvalReport:
    """Write and return the report over the complete logs in a directory."""
    logs = {
        name: (header, read_records(records_path(folder, name)))
        for name, header in read_headers(folder).items()
        if header.complete
    }
    found = report(info, logs)
    found.save(folder / REPORT)
    return found


def plan(task: Task, subject: Subject, config: EvalConfig, data: BenchmarkData, emit: Emit) -> Plan:
    """Items and prompts of a benchmark for a model.

    Items whose prompts are beyond the context of the model are left out, under a version that says
    so.

    Raises:
        UsageError: if data are missing, or the model cannot be asked so.
    """
    config = _resolved(config, chat=subject.has_template)
    items = list(task.dataset(data, config))
    _check_items(task, items)
    prompts = [_prompt(task, item, config) for item in items]
    for prompt in {_kind(prompt): prompt for prompt in prompts}.values():
        _check_prompt(task, prompt, subject, config)
    fitting = [_fits(subject, prompt) for prompt in prompts]
    version = version_of(task, config, data)
    if not all(fitting):
        out = len(items) - sum(fitting)
        version += f"+context{subject.context}"
        emit(Notice(f"{task.name}: {out} of {len(items)} items are beyond the model's context"))
        if out == len(items):
            raise UsageError(
                f"no item of {task.name} fits into the context of {subject.info.name}, "
                f"{subject.context} tokens; leave it out with --tasks"
            )
    kept = [(i, p) for i, p, fits in zip(items, prompts, fitting, strict=True) if fits]
    samples = _num_samples(task, config, kept[0][1])
    questions = tuple(
        _Question(item, sample, prompt_hash(prompt), Ask(prompt, _key(task, item, sample, config)))
        for item, prompt in kept
        for sample in range(samples)
    )
    header = EvalLog(
        task=task.name,
        title=task.title,
        version=version,
        fingerprint="",
        options=options_of(config),
        subject=subject.info,
        items=items_hash(item for item, _ in kept),
        prompts=prompts_hash(question.hash for question in questions),
        num_items=len(kept),
        num_samples=samples,
        provenance=provenance(),
    )
    return Plan(task, config, questions, with_fingerprint(header))


def version_of(task: Task, config: EvalConfig, data: BenchmarkData) -> str:
    """Version and variant of the task, and of its files where they are not the published ones."""
    variant = data.variant(task.files)
    return task.full_version(config) + (f"+{variant}" if variant else "")


def options_of(config: EvalConfig) -> dict[str, OptionValue]:
    """The options as logs have them: paths as text."""
    fields = dataclasses.asdict(config)
    return {name: str(v) if isinstance(v, Path) else v for name, v in fields.items()}


def _resolved(config: EvalConfig, *, chat: bool) -> EvalConfig:
    """The options with `auto` forms replaced by what the model can be asked."""
    forms = {
        field.name: "chat" if chat else "text"
        for field in dataclasses.fields(config)
        if field.name.endswith("_form") and getattr(config, field.name) == "auto"
    }
    return dataclasses.replace(config, **forms)  # type: ignore[arg-type]


def _check_items(task: Task, items: Sequence[Item]) -> None:
    if not items:
        raise UsageError(f"{task.name} has no items; check --data-dir and --limit")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise UsageError(f"{task.name} has two items with the id '{item.id}'; ids are unique")
        seen.add(item.id)


def _prompt(task: Task, item: Item, config: EvalConfig) -> Prompt:
    prompt = task.solver(item, config)
    if config.max_tokens is not None and not isinstance(prompt, Choice):
        return dataclasses.replace(prompt, max_tokens=config.max_tokens)
    return prompt


def _kind(prompt: Prompt) -> tuple[object, ...]:
    """What decides whether a model can be asked so."""
    match prompt:
        case Chat():
            return (Chat, bool(prompt.tools))
        case Choice():
            return (Choice, prompt.chat)
        case _:
            return (type(prompt),)


def _check_prompt(task: Task, prompt: Prompt, subject: Subject, config: EvalConfig) -> None:
    """Refuse a benchmark in chat form on a model without a template, and what the model refuses."""
    in_chat = isinstance(prompt, Chat) or (isinstance(prompt, Choice) and prompt.chat)
    if in_chat and not subject.has_template:
        form = f"{task.name}_form"
        hints = typing.get_type_hints(EvalConfig)
        can_be_text = form in hints and "text" in typing.get_args(hints[form])
        hint = f"give --{task.name}-form text" if can_be_text else "leave it out with --tasks NAME"
        raise UsageError(
            f"{task.name} asks in chat form, and {subject.info.name} has no chat template; {hint}, "
            f"or give --tokenizer DIR with one"
        )
    if config.thinking and not in_chat:
        raise UsageError(
            f"{task.name} asks in raw text, where no model thinks first; leave out --thinking"
        )
    subject.check(prompt)


def _fits(subject: Subject, prompt: Prompt) -> bool:
    """Whether a prompt leaves room for its answer in the model's context, if that is known."""
    tokens, context = subject.num_tokens(prompt), subject.context
    if tokens is None or context is None:
        return True
    room = 0 if isinstance(prompt, Choice) else min(_ROOM, prompt.max_tokens)
    return tokens + room <= context


def _num_samples(task: Task, config: EvalConfig, prompt: Prompt) -> int:
    """Answers to each item: log-likelihoods have no seeds, and only code has --samples."""
    if isinstance(prompt, Choice):
        return 1
    return config.seeds * (config.samples if task.needs_execution else 1)


def _key(task: Task, item: Item, sample: int, config: EvalConfig) -> int:
    text = "\0".join((str(config.seed), task.name, item.id, str(sample)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def estimate(
    model: Path | None, config: EvalConfig, served: ServedConfig, run: RunConfig
) -> list[tuple[str, str]]:
    """Rows of `estimates` for a model; nothing is asked for a score, and nothing is written."""
    tasks = chosen_tasks(config)
    subject = open_subject(model, config, served, run)
    data = BenchmarkData(config.data_dir, run.offline)
    plans = [plan(task, subject, config, data, no_emit) for task in tasks]
    return list(estimates(plans, subject))


def estimates(plans: Sequence[Plan], subject: Subject) -> Iterator[tuple[str, str]]:
    """Benchmark, and the number of its answers with the time they take at most, if known."""
    for each in plans:
        asks = [question.ask for asked in each.rounds(None) for question in asked]
        seconds = subject.seconds(asks)
        text = f"{len(asks):,} answers"
        yield (
            each.task.name,
            text if seconds is None else f"{text}, up to about {_duration(seconds)}",
        )


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{max(1, math.ceil(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def _run(plan: Plan, subject: Subject, folder: Path, emit: Emit) -> None:
    """Ask what is missing, score it and finish the log."""
    task, total = plan.task, len(plan.questions)
    with RunLog(folder, plan.header) as log:
        emit(StageStarted(task.name, total, "answers"))
        for questions in plan.rounds(subject.wave):
            for question, answer in _answers(questions, subject, log):
                log.append(_record(plan, question, answer))
                emit(Progress(task.name, len(log.done)))
        order = [question.key for question in plan.questions]
        header = finished(plan.header, [log.done[key] for key in order])
        log.finish(order, header)
        emit(StageDone(task.name))


def _answers(
    questions: Sequence[_Question], subject: Subject, log: RunLog
) -> Iterator[tuple[_Question, Answer]]:
    """Answers that the log does not have."""
    missing = [question for question in questions if question.key not in log.done]
    if not missing:
        return
    asked = list(questions) if subject.wave is not None else missing
    for index, answer in subject.answer([question.ask for question in asked]):
        if asked[index].key not in log.done:
            yield asked[index], answer


def _record(plan: Plan, question: _Question, answer: Answer) -> ItemRecord:
    if answer.response is None:
        score = Score(None, detail={"failure": answer.failure})
    else:
        score = score_of(plan.task, question.item, answer.response, plan.config)
    return ItemRecord(
        id=question.item.id,
        sample=question.sample,
        prompt=question.hash,
        response=answer.response,
        reasoning=answer.reasoning,
        looped=answer.looped,
        score=score,
    )


def score_of(task: Task, item: Item, response: Response, config: EvalConfig) -> Score:
    """The score of a response; null, with the reason, where what the scorer gives is no score.

    Raises:
        OptiqError: if the scorer says what the user or the machine lacks.
    """
    score = task.score(item, response, config)
    if score.value is not None and not 0 <= score.value <= 1:
        return Score(None, detail={"failure": f"the scorer gives {score.value}, not 0 to 1"})
    try:
        json.dumps([score.parsed, dict(score.detail)], allow_nan=False)
    except (TypeError, ValueError) as error:
        return Score(None, detail={"failure": f"the scorer gives what is no JSON: {error}"})
    return score
