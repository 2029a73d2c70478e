"""HumanEval: 164 Python functions to write from a signature and a docstring.

Reference: Chen et al. 2021, "Evaluating Large Language Models Trained on Code" (data and tests).
The program that is run is the same as theirs for a continuation. It runs with the standard library
alone, and the time limit counts processor time instead of seconds on the wall.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence

from optiq.configs import EvalConfig
from optiq.data.benchmarks import BenchmarkData
from optiq.evals import sandbox
from optiq.evals.draw import evenly
from optiq.evals.task import Chat, Continuation, Item, Prompt, Response, Score, Task

_FILE = "humaneval/problems"
_FIELDS = ("prompt", "entry_point", "test")
_TIMEOUT_S = 5.0
_CHAT_TOKENS = 1024
_TEXT_TOKENS = 512
_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif __name__", "\nprint")
_REQUEST = (
    "Complete this Python function. Answer with one Python code block that holds the whole "
    "function and the imports it needs.\n\n```python\n{prompt}\n```"
)

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.M | re.S)
_STATEMENT = re.compile(r"^(?:(?:from|import|def|class|async)\b|@)", re.M)
_MAX_BEGINS, _MAX_CUTS = 5, 20
_FUTURE = re.compile(r"^from __future__ import .*\n?", re.M)


def _ready(config: EvalConfig) -> None:
    """Try the walls of the sandbox."""
    sandbox.for_config(config)


def _dataset(data: BenchmarkData, config: EvalConfig) -> Sequence[Item]:
    rows = data.load(_FILE).rows
    items = [Item(row["task_id"], {name: row[name] for name in _FIELDS}) for row in rows]
    return evenly(items, config.limit)


def solver(item: Item, config: EvalConfig) -> Prompt:
    """The problem as a message, or as text to continue; `auto` is chat here.

    Whether a model has a template is known to whoever runs the task.
    """
    prompt = item.fields["prompt"]
    if config.humaneval_form == "text":
        return Continuation(prompt, config.max_tokens or _TEXT_TOKENS, _STOPS)
    text = _REQUEST.format(prompt=prompt.strip())
    return Chat(({"role": "user", "content": text},), config.max_tokens or _CHAT_TOKENS)


def scorer(item: Item, response: Response, config: EvalConfig) -> Score:
    """1 if the solution passes the tests, in the sandbox.

    Raises:
        UsageError: if code may not run or cannot be contained.
        EngineFailure: if the sandbox itself failed.
    """
    solution = extract(response.text, item.fields["prompt"], item.fields["entry_point"])
    program = f"{solution}\n{item.fields['test']}\ncheck({item.fields['entry_point']})"
    outcome = sandbox.for_config(config).run(program, _TIMEOUT_S)
    return Score(
        float(outcome.status == "passed"),
        solution,
        {"outcome": outcome.status, "reason": outcome.detail},
    )


def extract(text: str, prompt: str, entry_point: str) -> str:
    """The program in a response, without its tests.

    With fences: the first block that defines the function, else the first that holds its body.
    Without: the response as a continuation of the prompt, to the letter; where that is no Python,
    code with prose around it, or the continuation as far as the function goes. A block that defines
    the function gets the imports and helpers of the prompt in front.

    Args:
        text: the response.
        prompt: imports, helpers, signature and docstring, as in the data.
        entry_point: name of the function.

    Returns:
        Source that defines the function, where the response holds any; else the continuation to the
        letter, which fails.
    """
    preamble = prompt[: _definition(prompt, entry_point)]
    for candidate in _candidates(text, prompt, preamble, entry_point):
        if _defines(candidate, entry_point):
            return candidate
    return prompt + text


def _candidates(text: str, prompt: str, preamble: str, entry_point: str) -> Iterator[str]:
    blocks = [match[2] for match in _FENCE.finditer(text)]
    defining = [block for block in blocks if _is_defined(block, entry_point)]
    for block in defining:
        yield _join(preamble, block)
        yield _join(preamble, textwrap.dedent(block))
    for block in blocks:
        if block not in defining:
            yield prompt + block
            yield prompt + textwrap.indent(textwrap.dedent(block), "    ")
    if not blocks:
        yield prompt + text
        for code in _code_in_prose(text, entry_point):
            yield _join(preamble, code)
        yield prompt + _cut(text)


def _definition(source: str, name: str) -> int:
    """Where the first definition of a function on the outermost level begins; else the end."""
    found = re.search(rf"^(?:async )?def {re.escape(name)}\b", source, re.M)
    return found.start() if found else len(source)


def _is_defined(text: str, name: str) -> bool:
    return re.search(rf"^[ \t]*(?:async )?def {re.escape(name)}\b", text, re.M) is not None


def _defines(source: str, name: str) -> bool:
    """Whether this is Python and binds a name on its outermost level."""
    tree = _parsed(source)
    if not isinstance(tree, ast.Module):
        return False
    return any(
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and node.name == name
        for node in tree.body
    )


def _parsed(source: str) -> ast.Module | int:
    """The tree; where it is no Python, the line number of the error, or 0."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in strings
            tree = ast.parse(source)
            compile(tree, "response", "exec")  # knows more errors, e.g. a return without a function
            return tree
    except SyntaxError as error:
        return error.lineno or 0
    except (ValueError, RecursionError, MemoryError):  # null bytes, deep nesting
        return 0


def _join(preamble: str, code: str) -> str:
    """Code behind the imports and helpers of the prompt; imports from the future come first."""
    future = "".join(match[0].rstrip("\n") + "\n" for match in _FUTURE.finditer(code))
    return future + preamble + _FUTURE.sub("", code)


def _code_in_prose(text: str, entry_point: str) -> Iterator[str]:
    """From each line that may begin code, up to the function, as many lines as are Python."""
    start = _definition(text, entry_point)
    if start == len(text):
        return
    begins = [match.start() for match in _STATEMENT.finditer(text, 0, start)]
    for begin in [*begins[:_MAX_BEGINS], start]:
        lines = text[begin:].splitlines(keepends=True)
        for _ in range(_MAX_CUTS):
            tree = _parsed("".join(lines))
            if isinstance(tree, ast.Module):
                yield "".join(lines)
                break
            del lines[max(min(tree, len(lines)) - 1, 0) :]


def _cut(text: str) -> str:
    """A continuation up to where the function is over."""
    return text[: min((at for at in map(text.find, _STOPS) if at >= 0), default=len(text))]


def _variant(config: EvalConfig) -> str:
    return "text" if config.humaneval_form == "text" else ""


TASK = Task(
    name="humaneval",
    title="HumanEval",
    version="1",
    dataset=_dataset,
    solver=solver,
    scorer=scorer,
    variant=_variant,
    files=(_FILE,),
    needs_execution=True,
    ready=_ready,
)
