"""BFCL V3, simple: one function, one request, one right call.

Reference: Patil et al. 2024, Berkeley Function Calling Leaderboard. The verdicts are those of its
checker for Python; the code is our own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from optiq.configs import EvalConfig
from optiq.data.benchmarks import BenchmarkData
from optiq.errors import UsageError
from optiq.evals.call_match import mismatch
from optiq.evals.call_syntax import as_json, read_calls
from optiq.evals.draw import evenly
from optiq.evals.task import Chat, Item, Response, Score, Task, ToolCall

_SHARE = 200
_MAX_TOKENS = 512
_SCHEMA_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
_INSTRUCTIONS = (
    "You can call functions. Answer a request with the calls that it needs and nothing else, as a "
    "Python list of calls with named arguments: [name(argument=value, other=value)]. Leave out "
    "arguments that the request does not ask for and that have a default. The functions, as "
    "JSON:\n\n"
)


def _dataset(data: BenchmarkData, config: EvalConfig) -> Sequence[Item]:
    answers = {row["id"]: row["ground_truth"][0] for row in data.load("bfcl/answers").rows}
    items = []
    for row in data.load("bfcl/questions").rows:
        if row["id"] not in answers:
            raise UsageError(
                f"bfcl/possible_answer/BFCL_v3_simple.json has no answer for '{row['id']}'"
            )
        (accepted,) = answers[row["id"]].values()
        fields = {
            "messages": row["question"][0],
            "function": row["function"][0],
            "accepted": accepted,
        }
        items.append(Item(id=row["id"], fields=fields))
    return evenly(items if config.full else items[:_SHARE], config.limit)


def _solver(item: Item, config: EvalConfig) -> Chat:
    messages, function = tuple(item.fields["messages"]), item.fields["function"]
    max_tokens = config.max_tokens or _MAX_TOKENS
    if config.bfcl_form == "native":
        return Chat(messages, max_tokens, tools=(tool_schema(function),))
    system = {
        "role": "system",
        "content": _INSTRUCTIONS + json.dumps(function, ensure_ascii=False, indent=2),
    }
    return Chat((system, *messages), max_tokens)


def tool_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """A function of the benchmark as an OpenAI tool.

    Python's names of types become those of JSON schema, and dots in the name, which most tool
    formats do not allow, underscores.
    """
    return {
        "type": "function",
        "function": {
            "name": _plain_name(function["name"]),
            "description": function.get("description", ""),
            "parameters": _schema(function["parameters"]),
        },
    }


def _plain_name(name: str) -> str:
    return name.replace(".", "_")


def _schema(node: Mapping[str, Any]) -> dict[str, Any]:
    schema = {
        name: value for name, value in node.items() if name != "optional"
    }  # not in JSON schema
    if "type" in node:
        schema["type"] = _SCHEMA_TYPES.get(node["type"], node["type"])
    if "properties" in node:
        schema["properties"] = {name: _schema(one) for name, one in node["properties"].items()}
    if "items" in node:
        schema["items"] = _schema(node["items"])
    return schema


def _scorer(item: Item, response: Response, config: EvalConfig) -> Score:
    calls = response.tool_calls
    if calls is None:
        calls = read_calls(response.text)
    if calls is None:
        return Score(0.0, detail={"reason": "the answer is no list of calls"})
    parsed = [as_json(call) for call in calls]
    if len(calls) != 1:
        return Score(0.0, parsed=parsed, detail={"reason": f"{len(calls)} calls instead of 1"})
    offered = response.tool_calls is not None and config.bfcl_form == "native"
    call = _restored(calls[0], item.fields["function"]["name"]) if offered else calls[0]
    reason = mismatch(call, item.fields["function"], item.fields["accepted"])
    if reason is not None:
        return Score(0.0, parsed=parsed, detail={"reason": reason})
    return Score(1.0, parsed=parsed)


def _restored(call: ToolCall, name: str) -> ToolCall:
    """A call of the name that was offered as a call of the name in the data."""
    return ToolCall(name, call.arguments) if call.name == _plain_name(name) else call


TASK = Task(
    name="bfcl",
    title="BFCL V3 simple",
    version="1",
    variant=lambda config: "prompt" if config.bfcl_form == "prompt" else "",
    files=("bfcl/questions", "bfcl/answers"),
    dataset=_dataset,
    solver=_solver,
    scorer=_scorer,
)
