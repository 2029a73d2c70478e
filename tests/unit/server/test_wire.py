"""Faults of bodies name the key at fault, wherever unions lie around it."""

import asyncio
import json
from typing import Annotated, Literal

import pydantic
import pytest
from pydantic import Field

from optiq.server.wire import Body, WireModel, body_of, only, read, rejected


class Text(WireModel):
    type: Literal["text"]
    text: str


class Url(WireModel):
    type: Literal["url"]
    url: str


class Turn(WireModel):
    role: Literal["user"]
    parts: str | list[Annotated[Text | Url, Field(discriminator="type")]]


class Talk(Body):
    refused = {"store": "nothing is kept"}

    turns: list[Turn]
    deep: Annotated[Literal[False] | None, only(False, reason="it is shallow")] = None


def turn(*parts):
    return {"turns": [{"role": "user", "parts": list(parts)}]}


@pytest.mark.parametrize(
    ("data", "param", "words"),
    [
        (turn({"type": "text", "text": 5}), "turns[0].parts[0].text", "(not 5)"),
        (turn({"type": "text"}), "turns[0].parts[0].text", "missing"),
        (turn({"type": "text", "text": "a", "b": 1}), "turns[0].parts[0].b", "unknown parameter"),
        (turn({"type": "url", "url": "a", "url2": 1}), "turns[0].parts[0].url2", "unknown"),
        (turn({"type": "url", "url": None}), "turns[0].parts[0].url", "(not None)"),
        (turn({"type": "audio"}), "turns[0].parts[0]", "'audio'"),
        (turn({"type": {}, "text": "a"}), "turns[0].parts[0]", "{}"),
        ({"turns": [{"type": {}, "role": "user", "parts": "a"}]}, "turns[0].type", "unknown"),
        ({"turns": [], "deep": True}, "deep", "it is shallow (not True)"),
        ({"turns": [], "deep": 0}, "deep", "it is shallow (not 0)"),
        ({}, "turns", "missing"),
    ],
)
def test_a_fault_names_the_key(data, param, words):
    with pytest.raises(pydantic.ValidationError) as caught:
        Talk.model_validate(data)
    told = rejected(caught.value, data)
    assert told.param == param
    assert words in str(told)


def test_a_documented_body_refers_to_nothing_else():
    schema = body_of(Talk)["requestBody"]["content"]["application/json"]["schema"]
    assert "$ref" not in str(schema)
    assert schema["properties"]["store"]["type"] == "null"
    assert schema["additionalProperties"] is False


class Named(WireModel):
    name: str


class Function(WireModel):
    type: Literal["function"]
    function: Named


class Tools(Body):
    without_effect = frozenset({"tools[].function.name", "tools[].function.none"})

    tools: list[Function]


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        ({"type": "function"}, "tools[0].function"),
        ({"type": "function", "function": {}}, "tools[0].function.name"),
        ({"type": "function", "function": {"name": 5}}, "tools[0].function.name"),
        ({"type": "function", "function": 5}, "tools[0].function"),
        ({"type": []}, "tools[0].type"),
    ],
)
def test_a_key_that_is_named_as_the_type_is_a_key_where_there_is_no_union(tool, param):
    with pytest.raises(pydantic.ValidationError) as caught:
        Tools.model_validate({"tools": [tool]})
    assert rejected(caught.value, {"tools": [tool]}).param == param


def test_what_is_ignored_in_lists_is_found():
    body = {"tools": [{"type": "function", "function": {"name": "f"}}]}

    class State:
        ignored = ()

    class Request:
        state = State

        @staticmethod
        async def body():
            return json.dumps(body).encode()

    asyncio.run(read(Request, Tools))
    assert State.ignored == ["tools[].function.name"]
