"""Small benchmark files of our own, in the layout of `--data-dir`."""

import gzip
import json
from pathlib import Path

SUBJECTS = {"first_subject": 7, "second_subject": 5}


def write_benchmarks(folder: Path) -> Path:
    """Write all files and return the folder."""
    write(folder / "mmlu/dev.jsonl", [_mmlu(s, n) for s in SUBJECTS for n in range(5)])
    write(
        folder / "mmlu/test.jsonl", [_mmlu(s, n + 10) for s in SUBJECTS for n in range(SUBJECTS[s])]
    )
    write(
        folder / "gsm8k/test.jsonl",
        [
            {"question": f"What is {n} times 1000?", "answer": f"<<{n}*1000={n}000>>\n#### {n},000"}
            for n in range(1, 13)
        ],
    )
    write(folder / "ifeval/input_data.jsonl", [_ifeval(n) for n in range(12)])
    write(folder / "bfcl/BFCL_v3_simple.json", [_function(n) for n in range(12)])
    write(
        folder / "bfcl/possible_answer/BFCL_v3_simple.json",
        [{"id": f"own_{n}", "ground_truth": [{"shop.order": _accepted(n)}]} for n in range(12)],
    )
    problems = "".join(json.dumps(_problem(n)) + "\n" for n in range(12))
    (folder / "humaneval").mkdir(exist_ok=True)
    (folder / "humaneval/HumanEval.jsonl.gz").write_bytes(gzip.compress(problems.encode()))
    return folder


def write(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _mmlu(subject: str, number: int) -> dict:
    return {
        "subject": subject,
        "question": f" Which of these is {number}? ",
        "choices": [str(number + (i - number) % 4) for i in range(4)],
        "answer": number % 4,
    }


def _ifeval(number: int) -> dict:
    return {
        "key": 7000 + number,
        "prompt": f"Name {number + 1} rivers in quotes and without commas.",
        "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
        "kwargs": [{}, {}],
    }


def _problem(number: int) -> dict:
    return {
        "task_id": f"own/{number}",
        "prompt": f'def times(a: int) -> int:\n    """{number} times a."""\n',
        "entry_point": "times",
        "canonical_solution": f"    return {number} * a\n",
        "test": f"def check(candidate):\n    assert candidate(7) == {7 * number}\n",
    }


def _function(number: int) -> dict:
    properties = {
        "item": {"type": "string", "description": "What."},
        "count": {"type": "integer"},
        "price": {"type": "float"},
        "tags": {"type": "array", "items": {"type": "string"}, "optional": True},
        "size": {"type": "tuple", "items": {"type": "integer"}},
        "to": {"type": "dict", "properties": {"city": {"type": "any"}}},
    }
    return {
        "id": f"own_{number}",
        "question": [[{"role": "user", "content": f"Order {number} apples."}]],
        "function": [
            {
                "name": "shop.order",
                "description": "Orders things.",
                "parameters": {
                    "type": "dict",
                    "properties": properties,
                    "required": ["item", "count"],
                },
            }
        ],
    }


def _accepted(number: int) -> dict:
    return {
        "item": ["apple", "apples"],
        "count": [number],
        "price": [1.5, 2.0, ""],
        "tags": [["Red", "ripe"], ""],
        "size": [[1, 2], ""],
        "to": [{"city": ["Oslo", "Old Town"], "zip": ["0150", ""]}, ""],
    }
