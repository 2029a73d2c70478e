"""Answers for scripted engines, and what they are in all."""

import dataclasses

from hypothesis import strategies as st

from optiq.engine.events import (
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallDone,
    ToolCallFailed,
    ToolCallStarted,
    Usage,
)
from optiq.server.jobs import Said, Started, Written
from tests.server.fake import CARD, ended, piece, said

DRAFTED = dataclasses.replace(CARD, drafter="draft_model")
BLIND = dataclasses.replace(CARD, thinking=False)
USAGE = Usage(
    prompt_tokens=11,
    completion_tokens=7,
    reasoning_tokens=2,
    cached_tokens=4,
    drafted_tokens=5,
    accepted_tokens=3,
)


def thought(text):
    """A token and the thought that it is."""
    return [Written(0, (piece(text),)), Said(0, ReasoningDelta(text))]


def called(index, name, *arguments):
    """A call in pieces."""
    call_id = f"call_{index}"
    return [
        Said(0, ToolCallStarted(index, call_id, name)),
        *(Said(0, ToolCallDelta(index, text)) for text in arguments),
        Said(0, ToolCallDone(index, call_id, name, "".join(arguments))),
    ]


def broken(index, name, text):
    """A call that cannot be read, and its text."""
    return [
        Said(0, ToolCallStarted(index, f"call_{index}", name)),
        Said(0, ToolCallDelta(index, '{"a": ')),
        Said(0, ToolCallFailed((index,), "no JSON")),
        Said(0, TextDelta(text)),
    ]


EVERYTHING = (
    Started(11),
    *thought("Let me"),
    *thought(" see."),
    *said("I look"),
    *said(" it up."),
    *called(0, "weather", '{"city": ', '"Oslo"}'),
    *called(1, "clock", "{}"),
    ended("tool_calls", usage=USAGE),
)

_words = st.text("ab é", min_size=1, max_size=4)
_parts = st.one_of(_words.map(said), _words.map(thought), _words.map(lambda text: [("call", text)]))


@st.composite
def answers(draw):
    """Any answer: text, thoughts and calls in any order."""
    steps, index = [], 0
    for part in draw(st.lists(_parts, max_size=8)):
        for step in part:
            if isinstance(step, tuple):
                steps += called(index, "f", '{"a": ', f'"{step[1]}"', "}")
                index += 1
            else:
                steps.append(step)
    reason = draw(st.sampled_from(["stop", "length"])) if not index else "tool_calls"
    return (Started(3), *steps, ended(reason))


def holding(path, value, inside=None):
    """A copy of `inside` that has a value where a path such as `a[].b` leads: at every place.

    What is not there on the way is made, parts of lists excepted.
    """
    step, _, rest = path.partition(".")
    name = step.removesuffix("[]")
    out = dict(inside or {})
    if not rest:
        out[name] = value
    elif step == name:
        out[name] = holding(rest, value, out.get(name))
    else:
        out[name] = [holding(rest, value, part) for part in out[name]]
    return out
