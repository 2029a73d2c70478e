"""Do our scorers agree with the official ones on everything?

    python bench/scorers.py --data-dir DIR --bfcl DIR --ifeval-python PYTHON

`--bfcl` is the folder that holds `bfcl_eval/` of an unpacked bfcl-eval 2025.7.17: its checker is
loaded alone, with a stub for the table of models that it asks whether dots in names are replaced.
`--ifeval-python` is the interpreter of an environment with lm-eval, nltk, langdetect and
immutabledict (NLTK_DATA set where nltk has no punkt_tab); it runs lm-eval's own scoring functions
and nothing of ours. Our side needs the `eval` extra. Prints counts as JSON; exit 1 on disagreement.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import random
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from optiq.configs import EvalConfig
from optiq.data.benchmarks import BenchmarkData
from optiq.evals.task import Item, Response, ToolCall
from optiq.evals.tasks import TASKS

FULL = EvalConfig(full=True)
MUTANTS = 2000

# runs in the other environment: rows of [item, response] -> verdicts of lm-eval's own functions
OFFICIAL_IFEVAL = """
import json, random, sys
import langdetect
from lm_eval.tasks.ifeval import utils
langdetect.DetectorFactory.seed = 0
verdicts = []
for row, text in json.load(sys.stdin):
    both = []
    for test in (utils.test_instruction_following_strict, utils.test_instruction_following_loose):
        parts = []
        for name, kwargs in zip(row["instruction_id_list"], row["kwargs"]):
            random.seed(0)
            one = utils.InputExample(row["key"], [name], row["prompt"], [kwargs])
            parts += test(one, text).follow_instruction_list
        both.append(parts)
    verdicts.append(both)
print("VERDICTS" + json.dumps(verdicts))
"""


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--bfcl", type=Path)
    parser.add_argument("--ifeval-python")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = BenchmarkData(args.data_dir)
    report: dict[str, Any] = {"gsm8k": gsm8k(data)}
    if args.bfcl is not None:
        report["bfcl"] = bfcl(data, args.bfcl, args.seed)
    if args.ifeval_python is not None:
        report["ifeval"] = ifeval(data, args.ifeval_python)
    print(json.dumps(report, indent=2))
    return int(any(part["disagreements"] for part in report.values()))


def gsm8k(data: BenchmarkData) -> dict[str, Any]:
    """Every published solution, read as if a model had written it, gives its own number."""
    task = TASKS.get("gsm8k")
    answers = [row["answer"] for row in data.load("gsm8k/test").rows]
    items = task.dataset(data, FULL)
    wrong = []
    for item, answer in zip(items, answers, strict=True):
        working, _, gold = answer.rpartition("####")
        for text in (answer, f"{working}\nThe answer is {gold.strip()}."):
            if task.score(item, Response(text), FULL).value != 1.0:
                wrong.append(item.id)
    return {
        "solutions": len(answers),
        "parsed": len(answers) - len(set(wrong)),
        "disagreements": wrong,
    }


def official_bfcl(folder: Path) -> Any:  # noqa: ANN401  a module
    """The official checker, alone."""
    sys.path.insert(0, str(folder))
    stub = types.ModuleType("bfcl_eval.constants.model_config")

    class NoDots(dict[str, Any]):
        def __missing__(self, name: str) -> Any:  # noqa: ANN401
            return types.SimpleNamespace(underscore_to_dot=False)

    vars(stub)["MODEL_CONFIG_MAPPING"] = NoDots()
    sys.modules[stub.__name__] = stub
    return importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")


def bfcl(data: BenchmarkData, folder: Path, seed: int) -> dict[str, Any]:
    """Verdicts on golden and mutated calls, as structured calls and as text."""
    task, checker = TASKS.get("bfcl"), official_bfcl(folder)
    rng = random.Random(seed)
    answers = {row["id"]: row["ground_truth"] for row in data.load("bfcl/answers").rows}
    items = {item.id: item for item in task.dataset(data, FULL)}

    def official(item: Item, call: tuple[str, dict[str, Any]]) -> bool | str:
        name, arguments = copy.deepcopy(call)
        try:
            return bool(
                checker.ast_checker(
                    [item.fields["function"]],
                    [{name: arguments}],
                    answers[item.id],
                    "Python",
                    "simple",
                    "any",
                )["valid"]
            )
        except (AttributeError, KeyError, TypeError) as error:
            return f"crash: {type(error).__name__}"

    golden = {key: golden_call(answer[0], items[key], rng) for key, answer in answers.items()}
    counts: Counter[str] = Counter()
    disagreements = []
    cases = [("golden", items[key], call) for key, call in golden.items()]
    cases += mutants(list(items.values()), golden, answers, rng)
    for kind, item, call in cases:
        theirs = official(item, call)
        forms = [Response("", tool_calls=(ToolCall(*call),)), Response(as_text(call))]
        ours = [task.score(item, form, FULL).value == 1.0 for form in forms]
        counts[f"{kind} accepted" if ours[0] else f"{kind} refused"] += 1
        counts["official checker crashed"] += isinstance(theirs, str)
        if ours != [theirs is True] * 2:
            disagreements.append([item.id, kind, theirs, ours, repr(call)])
    failing = [
        key
        for key, call in golden.items()
        if task.score(items[key], Response("", tool_calls=(ToolCall(*call),)), FULL).value != 1.0
    ]
    return {**counts, "golden that fail": failing, "disagreements": disagreements}


def golden_call(
    answer: dict[str, Any], item: Item, rng: random.Random
) -> tuple[str, dict[str, Any]]:
    """One accepted call; half of the arguments that may be left out are."""
    ((name, accepted),) = answer.items()
    required = item.fields["function"]["parameters"].get("required", [])
    arguments = {}
    for key, values in accepted.items():
        usable = [value for value in values if value != ""]
        needed = "" not in values or key in required
        if usable and (needed or rng.random() < 0.5):
            arguments[key] = plain(rng.choice(usable))
    return name, arguments


def plain(value: Any) -> Any:  # noqa: ANN401  any JSON value
    """An accepted value as a call has it: inside dictionaries, lists hold alternatives."""
    if isinstance(value, dict):
        return {k: plain(next(a for a in v if a != "")) for k, v in value.items() if "" not in v}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return copy.deepcopy(value)


def mutants(
    items: list[Item],
    golden: dict[str, tuple[str, dict[str, Any]]],
    answers: dict[str, Any],
    rng: random.Random,
) -> Iterator[tuple[str, Item, tuple[str, dict[str, Any]]]]:
    """Calls with one change: of a value, a type, an argument, or the name."""
    made = 0
    while made < MUTANTS:
        item = rng.choice(items)
        name, arguments = copy.deepcopy(golden[item.id])
        kind = rng.choice(["name", "drop", "extra", "other", "value", "value", "value", "value"])
        if kind == "name":
            name += "_x"
        elif kind == "extra":
            declared = list(item.fields["function"]["parameters"]["properties"])
            arguments[rng.choice([*declared, "unheard_of"])] = rng.choice([1, "x", [], None, True])
        elif kind == "other":
            arguments = copy.deepcopy(golden[rng.choice(items).id][1])
        elif not arguments:
            continue
        elif kind == "drop":
            del arguments[rng.choice(list(arguments))]
        else:
            key = rng.choice(list(arguments))
            options = answers[item.id][0]
            (accepted,) = options.values()
            arguments[key] = changed(arguments[key], accepted.get(key, []), rng)
        made += 1
        yield "mutant", item, (name, arguments)


def changed(value: Any, accepted: list[Any], rng: random.Random) -> Any:  # noqa: ANN401  any JSON value
    """A value near another: some are still accepted."""
    changes: list[Any] = [str(value), [value], {"a": value}, None, ""]
    if isinstance(value, bool):
        changes += [not value, int(value), str(value).lower()]
    elif isinstance(value, int | float):
        changes += [value + 1, float(value), -value, bool(value), value * 1.0 + 0.5, int(value)]
    elif isinstance(value, str):
        changes += [value.upper(), f" {value}.", value.replace(" ", "_"), value + "x", value[1:]]
        changes += [value.replace("'", '"'), f"{value[:2]},-/{value[2:]}"]
    elif isinstance(value, list):
        changes += [
            value[::-1],
            value[:-1],
            value + value,
            tuple(value),
            [],
            [str(v) for v in value],
        ]
        changes += [[changed(v, [], rng) for v in value]]
        changes += [[float(v) if isinstance(v, int) else v for v in value]]
    elif isinstance(value, dict):
        changes += [value | {"unheard_of": 1}, dict(list(value.items())[1:]), {}]
        changes += [{k: changed(v, [], rng) for k, v in value.items()}]
    changes += [copy.deepcopy(one) for one in accepted]
    return rng.choice(changes)


def as_text(call: tuple[str, dict[str, Any]]) -> str:
    """A call in the syntax that models answer with."""
    name, arguments = call
    return f"[{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})]"


def ifeval(data: BenchmarkData, python: str) -> dict[str, Any]:
    """Verdicts on three sets of responses: made to follow, the same damaged, and empty."""
    task = TASKS.get("ifeval")
    items = task.dataset(data, FULL)
    follow = [obedient(item) for item in items]
    sets = {
        "gold-like": follow,
        "corrupted": [damaged(text) for text in follow],
        "empty": [""] * len(items),
    }
    report: dict[str, Any] = {"disagreements": []}
    for name, texts in sets.items():
        rows = [[dict(item.fields), text] for item, text in zip(items, texts, strict=True)]
        run = subprocess.run(
            [python, "-c", OFFICIAL_IFEVAL],
            input=json.dumps(rows),
            capture_output=True,
            text=True,
            check=True,
        )
        verdicts = json.loads(run.stdout.rpartition("VERDICTS")[2])
        counts: Counter[str] = Counter()
        for item, text, (strict, loose) in zip(items, texts, verdicts, strict=True):
            score = task.score(item, Response(text), FULL)
            if score.value is None:
                report["disagreements"].append([name, item.id, score.detail])
                continue
            ours = score.detail["instructions"]
            counts["instructions"] += len(strict)
            counts["agree strict"] += sum(map(bool.__eq__, ours, strict))
            counts["agree loose"] += sum(map(bool.__eq__, score.detail["loose"], loose))
            counts["followed"] += sum(strict)
            if [ours, score.detail["loose"], score.value] != [strict, loose, float(all(strict))]:
                report["disagreements"].append([name, item.id])
        report[name] = dict(counts)
    return report


def repeated(make: Callable[[int], str], count: int, between: str = " ") -> str:
    """Numbered pieces, from 1."""
    return between.join(make(number) for number in range(1, count + 1))


# instruction -> text to put at the end, so that it is followed
ENDINGS: dict[str, Callable[[dict[str, Any]], str]] = {
    "existence": lambda k: " ".join(k["keywords"]),
    "frequency": lambda k: repeated(lambda _: k["keyword"], k["frequency"]),
    "letter_frequency": lambda k: k["letter"] * k["let_frequency"],
    "number_words": lambda k: repeated(
        lambda _: "word", k["num_words"] * (k["relation"] == "at least")
    ),
    "number_sentences": lambda k: repeated(
        lambda n: f"This is sentence {n}.", k["num_sentences"] * (k["relation"] == "at least")
    ),
    "number_placeholders": lambda k: repeated(lambda n: f"[place{n}]", k["num_placeholders"]),
    "number_highlighted_sections": lambda k: repeated(lambda n: f"*part {n}*", k["num_highlights"]),
    "number_bullet_lists": lambda k: (
        "\n" + repeated(lambda n: f"* point {n}\n", k["num_bullets"], "")
    ),
    "multiple_sections": lambda k: (
        "\n" + repeated(lambda n: f"{k['section_spliter']} {n} text\n", k["num_sections"], "")
    ),
    "number_paragraphs": lambda k: repeated(
        lambda n: f"Paragraph {n}", k["num_paragraphs"] - 1, "\n***\n"
    ).join(["\n***\n", ""]),
    "nth_paragraph_first_word": lambda k: repeated(
        lambda _: f"\n\n{k['first_word']} and more", k["num_paragraphs"], ""
    ),
    "postscript": lambda k: f"\n{k['postscript_marker']} more",
    "two_responses": lambda _: "\n******\nanother answer",
    "constrained_response": lambda _: "My answer is yes.",
}
# instruction -> how the whole text is changed, in this order
WHOLE: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "title": lambda text, _: f"<<A title>>\n{text}",
    "repeat_prompt": lambda text, k: f"{k['prompt_to_repeat']}\n{text}",
    "end_checker": lambda text, k: f"{text}\n{k['end_phrase']}",
    "no_comma": lambda text, _: text.replace(",", ""),
    "json_format": lambda text, _: json.dumps({"text": text}),
    "quotation": lambda text, _: f'"{text}"',
    "english_lowercase": lambda text, _: text.lower(),
    "english_capital": lambda text, _: text.upper(),
    "capital_word_frequency": lambda text, _: text.replace("river", "RIVER"),
}


def obedient(item: Item) -> str:
    """A text that tries to follow the instructions: it follows many of them, not all."""
    names = [name.partition(":")[2] for name in item.fields["instruction_id_list"]]
    wanted = dict(zip(names, item.fields["kwargs"], strict=True))
    parts = ["The river runs past the old mill. Every morning the baker opens the shop."]
    parts += [make(wanted[name]) for name, make in ENDINGS.items() if name in wanted]
    text = " ".join(parts)
    for name, change in WHOLE.items():
        if name in wanted:
            text = change(text, wanted[name])
    return text


def damaged(text: str) -> str:
    """The text without its last third, and with what instructions forbid."""
    return "Sure, here it is,\n" + text[: 2 * len(text) // 3].swapcase().replace("*", "").replace(
        "[", "("
    )


if __name__ == "__main__":
    sys.exit(main())
