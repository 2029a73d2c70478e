"""Records as lines, and hashes that change with what they are of."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiq.artifacts import EvalLog, SubjectInfo
from optiq.errors import UsageError
from optiq.evals.log import (
    ItemRecord,
    items_hash,
    prompt_hash,
    read_headers,
    read_records,
    with_fingerprint,
)
from optiq.evals.task import Chat, Continuation, Item, Response, Score, ToolCall
from tests.unit.quant.tables import PROVENANCE

TEXT = st.text(st.characters(exclude_categories=()))  # surrogates too
FINITE = st.floats(allow_nan=False, allow_infinity=False)
RESPONSES = st.builds(
    Response,
    TEXT,
    st.none() | st.lists(st.builds(ToolCall, TEXT, st.dictionaries(TEXT, FINITE))).map(tuple),
    st.none() | st.lists(FINITE).map(tuple),
    st.integers(0, 10**6),
    st.booleans(),
)
SCORES = st.builds(
    Score,
    st.none() | st.floats(0, 1),
    st.none() | TEXT | st.lists(st.booleans()),
    st.fixed_dictionaries({}, optional={"instructions": st.lists(st.booleans()), "why": TEXT}),
)
RECORDS = st.builds(
    ItemRecord, TEXT, st.integers(0, 99), st.text("0123"), st.none() | RESPONSES, TEXT,
    st.booleans(), SCORES,
)  # fmt: skip


@given(RECORDS)
def test_a_record_survives_its_line(record):
    line = record.to_line()
    assert "\n" not in line
    line.encode()
    assert ItemRecord.from_line(line) == record


def test_details_of_a_score_are_keys_of_the_line():
    score = Score(0.5, "four", {"instructions": [True, False]})
    line = ItemRecord("7", 0, "ab", Response("4"), "", False, score).to_line()
    data = json.loads(line)
    assert data["instructions"] == [True, False]
    assert (data["id"], data["score"], data["parsed"], data["output"]) == ("7", 0.5, "four", "4")


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"id": "a"}', "null"])
def test_lines_that_are_no_records(line):
    with pytest.raises(ValueError, match=r".+"):
        ItemRecord.from_line(line)


def test_half_a_line_at_the_end_is_none(tmp_path):
    record = ItemRecord("7", 0, "", Response("4"), "", False, Score(1.0))
    path = tmp_path / "t.jsonl"
    path.write_text(record.to_line() + "\n" + record.to_line()[:-1])
    assert read_records(path) == [record]
    assert read_records(tmp_path / "none.jsonl") == []
    with pytest.raises(UsageError, match="no directory of logs"):
        read_headers(tmp_path / "none")


def test_hashes_of_items_and_prompts():
    items = [Item("a", {"x": 1}), Item("b", {"x": [2]})]
    assert items_hash(items) == items_hash([dataclasses.replace(item) for item in items])
    assert items_hash(items) != items_hash(items[::-1])
    chat = Chat(({"role": "user", "content": "x"},), 5)
    different = [
        chat,
        dataclasses.replace(chat, max_tokens=6),
        dataclasses.replace(chat, tools=({"a": 1},)),
        Continuation("x", 5),
        Continuation("x", 5, ("a",)),
    ]
    assert len({prompt_hash(prompt) for prompt in different}) == len(different)


def test_a_fingerprint_is_of_all_that_answers_depend_on(tmp_path):
    subject = SubjectInfo("local", "m", "f", batch_size=8)
    options = {"sampling": "greedy", "seeds": 1, "seed": 0, "limit": 5}
    header = with_fingerprint(
        EvalLog("t", "T", "1", "", options, subject, "i", "p", 2, 1, PROVENANCE)
    )
    header.save(tmp_path / "t.json")
    assert with_fingerprint(EvalLog.load(tmp_path / "t.json")).fingerprint == header.fingerprint

    def changed(**fields):
        return with_fingerprint(dataclasses.replace(header, **fields)).fingerprint

    same = [{"title": "U"}, {"options": options | {"seed": 9}}, {"complete": True}]
    assert {changed(**fields) for fields in same} == {header.fingerprint}
    others = [
        {"version": "2"},
        {"items": "j"},
        {"prompts": "q"},
        {"num_samples": 2},
        {"subject": dataclasses.replace(subject, batch_size=4)},
        {"subject": dataclasses.replace(subject, fingerprint="g")},
        {"options": options | {"sampling": "model"}},
        {"options": options | {"sampling": "model", "seed": 9}},
        {"provenance": dataclasses.replace(PROVENANCE, mlx="9.9")},
    ]
    assert len({changed(**fields) for fields in others} | {header.fingerprint}) == len(others) + 1
