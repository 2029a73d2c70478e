"""Prometheus metrics, named in the manner of vLLM, and the service that is measured."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from optiq.engine.events import Finished
from optiq.server.jobs import (
    Counted,
    CountJob,
    Detokenized,
    DetokenizeJob,
    Embedded,
    EmbedJob,
    GenerateJob,
    ModelCard,
    Reply,
    Said,
    Started,
    Written,
)
from optiq.server.records import Record, current
from optiq.server.service import Service, Snapshot, Stream

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_GAPS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """What is counted and timed, in a registry of its own.

    Args:
        service: the engine, asked for a snapshot whenever the metrics are read.
    """

    def __init__(self, service: Service) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_Engine(service))
        self._requests = Counter(
            "optiq:requests",
            "HTTP requests that ended, each with one outcome.",
            ("method", "route", "status", "outcome"),
            registry=registry,
        )
        self._latency = Histogram(
            "optiq:e2e_request_latency_seconds",
            "From a request to the end of its answer, where tokens were written.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._first = Histogram(
            "optiq:time_to_first_token_seconds",
            "From a request to its first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._gap = Histogram(
            "optiq:inter_token_latency_seconds",
            "Time between tokens of an answer.",
            buckets=_GAPS,
            registry=registry,
        )
        self._finished = Counter(
            "optiq:request_success",
            "Answers that came to their end.",
            ("finished_reason",),
            registry=registry,
        )

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def request_ended(self, record: Record) -> None:
        """Count a request."""
        status = str(record.status)
        self._requests.labels(record.method, record.route, status, record.outcome).inc()
        if record.ttft_s is not None:
            self._latency.observe(record.duration_s)

    def first_token(self, seconds: float) -> None:
        """Time the beginning of an answer."""
        self._first.observe(seconds)

    def more_tokens(self, num_tokens: int, seconds: float) -> None:
        """Time tokens that came together, so long after those before."""
        for _ in range(num_tokens):
            self._gap.observe(seconds / num_tokens)

    def choice_ended(self, reason: str) -> None:
        """Count an answer."""
        self._finished.labels(reason).inc()


class _Engine(Collector):
    """What the engine says of itself when it is asked."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        """Metrics as they are now."""
        now = self._service.snapshot()
        for name, text, value in (
            ("num_requests_running", "Jobs that are worked on.", now.running),
            ("num_requests_waiting", "Jobs in the queue.", now.queued),
            ("engine_ready", "1 if /ready says 200.", int(self._service.ready()[0])),
            ("engine_memory_bytes", "Arrays of the engine process.", now.active_memory_bytes),
            ("models_loaded", "Models in memory.", len(now.loaded)),
        ):
            yield GaugeMetricFamily(f"optiq:{name}", text, value)
        for name, text, total in (
            ("prompt_tokens", "Tokens of prompts.", now.prompt_tokens),
            ("generation_tokens", "Tokens written.", now.completion_tokens),
            ("prompt_tokens_cached", "Tokens of prompts found in a cache.", now.cached_tokens),
            ("spec_decode_num_draft_tokens", "Tokens that drafters proposed.", now.drafted_tokens),
            ("spec_decode_num_accepted_tokens", "Of these, right ones.", now.accepted_tokens),
            ("engine_restarts", "Times the engine process was started again.", now.restarts),
            ("engine_steps", "Steps of the engine.", now.steps),
            ("engine_step_seconds", "Time of all steps.", now.step_seconds),
        ):
            yield CounterMetricFamily(f"optiq:{name}", text, total)
        jobs = CounterMetricFamily(
            "optiq:engine_jobs", "Jobs of the engine that ended.", labels=("outcome",)
        )
        for outcome, count in now.outcomes.items():
            jobs.add_metric([str(outcome)], count)
        yield jobs


class Measured:
    """A service that notes what goes through it, in metrics and in the record of the request."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service, self._metrics = service, metrics

    async def known(self) -> None:
        """See `Service`."""
        await self._service.known()

    def models(self) -> Sequence[ModelCard]:
        """See `Service`."""
        return self._service.models()

    def resolve(self, name: str | None) -> str:
        """See `Service`."""
        return self._service.resolve(name)

    def ready(self) -> tuple[bool, str]:
        """See `Service`."""
        return self._service.ready()

    def snapshot(self) -> Snapshot:
        """See `Service`."""
        return self._service.snapshot()

    def submit(self, job: GenerateJob) -> Stream:
        """See `Service`."""
        return _MeasuredStream(self._service.submit(job), self._metrics)

    async def embed(self, job: EmbedJob) -> Embedded:
        """See `Service`."""
        done = await self._service.embed(job)
        if record := current.get():
            record.prompt_tokens += done.prompt_tokens
        return done

    async def count(self, job: CountJob) -> Counted:
        """See `Service`."""
        return await self._service.count(job)

    async def detokenize(self, job: DetokenizeJob) -> Detokenized:
        """See `Service`."""
        return await self._service.detokenize(job)


class _MeasuredStream:
    """A stream that notes what goes through it."""

    def __init__(self, stream: Stream, metrics: Metrics) -> None:
        self._stream, self._metrics = stream, metrics
        self._record = current.get()
        self._began = self._record.began if self._record else time.perf_counter()
        self._written_at: dict[int, float] = {}

    def __aiter__(self) -> AsyncIterator[Reply]:
        return self

    async def __anext__(self) -> Reply:
        try:
            reply = await anext(self._stream)
        except StopAsyncIteration:
            raise
        except Exception as error:
            if self._record:
                self._record.error = error
            raise
        match reply:
            case Started(prompt_tokens) if self._record:
                self._record.prompt_tokens += prompt_tokens
            case Written(choice, pieces) if pieces:
                self._note(choice, len(pieces))
            case Said(_, Finished(reason)):
                self._metrics.choice_ended(reason)
        return reply

    def cancel(self) -> None:
        """See `Stream`."""
        self._stream.cancel()

    def _note(self, choice: int, num_tokens: int) -> None:
        now = time.perf_counter()
        if not self._written_at:
            self._metrics.first_token(now - self._began)
            if self._record and self._record.ttft_s is None:
                self._record.ttft_s = now - self._began
        before = self._written_at.get(choice)
        if before is not None:
            self._metrics.more_tokens(num_tokens, now - before)
        self._written_at[choice] = now
        if self._record:
            self._record.completion_tokens += num_tokens
