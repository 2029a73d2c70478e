"""What the renderers write for each event, with a clock that the test turns."""

import io
import json
from types import SimpleNamespace

import pytest

from optiq import events
from optiq.events import (
    JsonRenderer,
    Metric,
    Notice,
    PlainRenderer,
    Progress,
    RichRenderer,
    StageDone,
    StageStarted,
    no_emit,
    track,
)


@pytest.fixture
def clock(monkeypatch):
    """A clock whose `now` a test sets, in seconds."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(events, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def plain(clock, *timed, every_s=10.0):
    """Lines that a plain renderer writes for (seconds since the start, event) pairs."""
    stream, start = io.StringIO(), clock.now
    with PlainRenderer(stream, every_s) as emit:
        for seconds, event in timed:
            clock.now = start + seconds
            emit(event)
    return stream.getvalue().splitlines()


# -- track ---------------------------------------------------------------------------------------


def test_track_emits_start_progress_and_end():
    seen = []
    assert list(track("ab", seen.append, "write", 2, "tensors")) == ["a", "b"]
    assert seen == [
        StageStarted("write", 2, "tensors"),
        Progress("write", 1),
        Progress("write", 2),
        StageDone("write"),
    ]


def test_track_counts_an_item_when_it_is_finished():
    seen = []
    items = track([1, 2], seen.append, "write", 2)
    assert seen == []
    next(items)
    assert seen == [StageStarted("write", 2)]
    next(items)
    assert seen[1:] == [Progress("write", 1)]


def test_a_stage_that_fails_does_not_end():
    seen = []

    def failing():
        yield 1
        raise KeyError

    with pytest.raises(KeyError):
        list(track(failing(), seen.append, "write", 2))
    assert seen == [StageStarted("write", 2), Progress("write", 1)]


def test_an_empty_stage_ends():
    seen = []
    assert list(track([], seen.append, "write", 0)) == []
    assert seen == [StageStarted("write", 0), StageDone("write")]


def test_no_emit_drops_events():
    assert no_emit(Notice("x")) is None


# -- plain lines ---------------------------------------------------------------------------------


def test_lines_of_a_run(clock):
    lines = plain(
        clock,
        (0, Notice("source: 135M parameters")),
        (0, StageStarted("forward", 40, "blocks")),
        (5, Progress("forward", 10)),
        (12, Progress("forward", 20)),
        (13, Progress("forward", 21)),
        (24, Progress("forward", 39, "layer 39")),
        (25, Progress("forward", 40)),
        (25, StageDone("forward")),
        (26, Metric("KL", 0.0123456, "nats/token")),
        (26, Metric("agreement", 0.987654)),
        (26, Notice("the text is short", "warning")),
    )
    assert lines[0] == "source: 135M parameters"
    assert lines[1].startswith("  forward: 20/40, ")
    assert lines[2].startswith("  forward: 39/40, ")
    assert lines[2].endswith(" s left layer 39")
    assert lines[3:] == [
        "forward: 25.0 s",
        "KL: 0.01235 nats/token",
        "agreement: 0.9877",
        "warning: the text is short",
    ]


def test_how_a_stage_ended(clock):
    assert plain(clock, (0, StageStarted("plan")), (1.25, StageDone("plan", detail="4.5 bpw"))) == [
        "plan: 1.2 s, 4.5 bpw"
    ]
    assert plain(clock, (0, StageDone("measure", reused=True))) == ["measure: from an earlier run"]
    assert plain(clock, (0, StageDone("measure", reused=True, detail="fisher"))) == [
        "measure: from an earlier run, fisher"
    ]


def steady(start_at, total, seconds=10.0):
    """A stage that finishes one unit every `seconds`, from unit `start_at` on."""
    yield 0, StageStarted("backward", total)
    for done in range(start_at + 1, total + 1):
        yield (done - start_at) * seconds, Progress("backward", done)


def left(line):
    return int(line.split(", ")[1].split(" s left")[0])


def test_the_eta_is_the_rest_at_the_same_speed(clock):
    lines = plain(clock, *steady(0, 8))
    assert [left(line) for line in lines] == [70, 60, 50, 40, 30, 20, 10]


def test_the_eta_of_a_resumed_stage_counts_its_own_time(clock):
    """50 of 60 blocks are there from an earlier run; they took no time now."""
    lines = plain(clock, *steady(50, 60))
    assert lines[0] == "  backward: 51/60, 90 s left"
    assert [left(line) for line in lines] == [90, 80, 70, 60, 50, 40, 30, 20, 10]


def test_a_stage_that_runs_again_begins_again(clock):
    first = [*steady(50, 60), (100, StageDone("backward"))]
    second = [(seconds + 1000, event) for seconds, event in steady(0, 60)]
    lines = plain(clock, *first, *second)
    assert lines[9] == "backward: 100.0 s"
    assert [left(line) for line in lines[10:]] == list(range(590, 0, -10))


def test_few_progress_lines(clock):
    """At most one in ten seconds, and none before the first ten have passed."""
    many = [(0.1 * n, Progress("write", n)) for n in range(1, 1000)]
    lines = plain(clock, (0, StageStarted("write", 1000)), *many)
    assert 8 <= len(lines) <= 10
    assert plain(clock, (0, StageStarted("write", 99)), *many[:98]) == []
    assert plain(clock, (0, StageStarted("write", 1000)), *many, every_s=float("inf")) == []


def test_progress_without_a_total_or_a_stage_is_silent(clock):
    assert plain(clock, (0, StageStarted("read")), (60, Progress("read", 3))) == []
    assert plain(clock, (60, Progress("unknown", 3))) == []


def test_lines_have_no_control_characters(clock):
    text = "\n".join(plain(clock, *steady(0, 5), (60, StageDone("backward"))))
    assert all(c.isprintable() or c == "\n" for c in text)


# -- JSON lines ----------------------------------------------------------------------------------


def test_json_lines(clock):
    stream = io.StringIO()
    sent = [
        StageStarted("forward", 4, "blocks"),
        Progress("forward", 1, "layer 0"),
        StageDone("forward", reused=True),
        Metric("KL", 0.01, "nats/token"),
        Notice("naïve", "warning"),
    ]
    with JsonRenderer(stream) as emit:
        for event in sent:
            clock.now += 1.5
            emit(event)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line.pop("event") for line in lines] == [type(event).__name__ for event in sent]
    assert [line.pop("time_s") for line in lines] == [1.5, 3.0, 4.5, 6.0, 7.5]
    assert lines[0] == {"stage": "forward", "total": 4, "unit": "blocks"}
    for event, line in zip(sent, lines, strict=True):
        assert type(event)(**line) == event


class Flushed(io.StringIO):
    """Notes how much was there at each flush."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def flush(self):
        self.sizes.append(len(self.getvalue().splitlines()))


@pytest.mark.parametrize("renderer", [JsonRenderer, PlainRenderer])
def test_each_line_is_flushed_at_once(renderer):
    stream = Flushed()
    with renderer(stream) as emit:
        emit(Notice("one"))
        assert stream.sizes == [1]
        emit(Notice("two"))
        assert stream.sizes == [1, 2]


# -- the bar -------------------------------------------------------------------------------------


def test_the_bar_goes_to_stderr_and_ends_with_the_lines(capsys):
    renderer = RichRenderer()
    with renderer as emit:
        emit(StageStarted("forward", 4, "blocks"))
        (task,) = renderer._bar.tasks
        assert (task.description, task.total, task.completed) == ("forward", 4, 0)
        emit(Progress("forward", 3))
        assert renderer._bar.tasks[0].completed == 3
        emit(StageStarted("read"))
        assert renderer._bar.tasks[1].total is None
        emit(Progress("never started", 1))
        emit(StageDone("forward", detail="4 blocks"))
        assert [task.description for task in renderer._bar.tasks] == ["read"]
        emit(StageDone("measure", reused=True))
        emit(Notice("[bold]kept as it is[/bold]", "warning"))
    out, err = capsys.readouterr()
    assert out == ""
    assert ", 4 blocks\n" in err
    assert "measure: from an earlier run\n" in err
    assert "warning: [bold]kept as it is[/bold]\n" in err


def test_the_bar_stops_when_the_run_fails():
    renderer = RichRenderer()

    def run():
        with renderer as emit:
            emit(StageStarted("forward", 4))
            assert renderer._bar.live.is_started
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert not renderer._bar.live.is_started
