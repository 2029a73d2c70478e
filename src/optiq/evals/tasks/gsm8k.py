"""GSM8K: word problems of primary school whose answer is a number.

Reference: Cobbe et al. 2021, Training Verifiers to Solve Math Word Problems. The examples of the
raw-text form are our own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from optiq.configs import EvalConfig
from optiq.data.benchmarks import BenchmarkData
from optiq.errors import UsageError
from optiq.evals.draw import evenly, sample
from optiq.evals.task import Chat, Continuation, Item, Prompt, Response, Score, Task

_SHARE = 1000
_CHAT_TOKENS = 1024
_TEXT_TOKENS = 512
_REQUEST = (
    "Solve the problem step by step. End with one line that gives the result as a number: "
    '"The answer is NUMBER".'
)

_SHOTS = (
    (
        "A baker fills 6 trays with 14 rolls each. She keeps 9 rolls for her family and sells the "
        "rest. How many rolls does she sell?",
        "The trays hold 6 * 14 = 84 rolls. After keeping 9, she sells 84 - 9 = 75 rolls.",
        "75",
    ),
    (
        "Nadia cycles 12 kilometres to work and the same way back on 4 days a week. On Saturday "
        "she cycles 31 kilometres. How many kilometres is that in a week?",
        "A working day has 2 * 12 = 24 kilometres, so four of them have 4 * 24 = 96 kilometres. "
        "With Saturday that makes 96 + 31 = 127 kilometres.",
        "127",
    ),
    (
        "A jacket costs $80. In the sale its price falls by a quarter, and a member then gets $5 "
        "off. What does a member pay, in dollars?",
        "A quarter of 80 is 80 / 4 = 20, so the sale price is 80 - 20 = 60 dollars. A member pays "
        "60 - 5 = 55 dollars.",
        "55",
    ),
    (
        "Three pumps empty a pool in 8 hours. All pumps work equally fast. How many hours would "
        "four pumps need?",
        "The pool takes 3 * 8 = 24 hours of one pump. Four pumps share them: 24 / 4 = 6 hours.",
        "6",
    ),
    (
        "Omar is twice as old as Lena was 3 years ago. Lena is 17 now. How old will Omar be in 5 "
        "years?",
        "Three years ago Lena was 17 - 3 = 14. Omar is 2 * 14 = 28 now. In 5 years he will be "
        "28 + 5 = 33.",
        "33",
    ),
    (
        "A school orders 1,250 pencils in packs of 25 and pays $3 for each pack. How much does the "
        "order cost, in dollars?",
        "There are 1250 / 25 = 50 packs. They cost 50 * 3 = 150 dollars.",
        "150",
    ),
    (
        "A train has 5 coaches with 72 seats each. 40% of the seats are taken. How many seats are "
        "free?",
        "The train has 5 * 72 = 360 seats. Of these 60% are free: 0.6 * 360 = 216 seats.",
        "216",
    ),
    (
        "Ines mixes 2.5 litres of juice with three times as much water and fills the drink into "
        "bottles of half a litre. How many bottles does she fill?",
        "The water is 3 * 2.5 = 7.5 litres, so there are 2.5 + 7.5 = 10 litres. Bottles of half a "
        "litre: 10 / 0.5 = 20.",
        "20",
    ),
)
_EXAMPLES = "".join(
    f"Question: {question}\nAnswer: {working} The answer is {result}.\n\n"
    for question, working, result in _SHOTS
)

_SIGN = r"(?<![\w.)\]}%-])-(?!\s)"  # not the minus of `10-4` or `10 - 4`, nor a dash of a list
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})?\$?\s?"
    rf"(?:(?P<whole>\d+)\s+(?P<n>\d+)/(?P<d>\d+)(?![\d/])"  # 2 1/2
    rf"|(?P<top>{_DIGITS})\s?/\s?(?P<bottom>{_DIGITS})(?![\d/])"
    rf"|(?P<plain>{_DIGITS})(?P<exponent>[eE][+-]?\d{{1,2}}(?!\w))?)"
)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_MINUS = str.maketrans(dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-"))
_THIN = "[\u00a0\u2009\u202f]"
_PLAIN = (
    (re.compile(r"\\[dt]?frac\s*\{\s*([^{}]*)\}\s*\{\s*([^{}]*)\}"), r" \1/\2 "),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r" \1/\2 "),
    (re.compile(r"(?<=\d)(?:\{,\}|\\[,!;:]|" + _THIN + r")(?=\d{3}(?!\d))"), ","),
    (re.compile(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\(?:left|right|[,;:! ])"), ""),
    (re.compile(r"\\([$%])"), r"\1"),
)


def _dataset(data: BenchmarkData, config: EvalConfig) -> Sequence[Item]:
    items = []
    for number, row in enumerate(data.load("gsm8k/test").rows):
        gold = last_number(row["answer"].rpartition("####")[2])
        if "####" not in row["answer"] or gold is None:
            raise UsageError(f"gsm8k/test.jsonl, row {number}: 'answer' must end in '#### NUMBER'")
        fields = {"question": row["question"], "gold": str(gold)}
        items.append(Item(id=str(number), fields=fields))
    if not config.full:
        items = sample(items, _SHARE, config.seed, "gsm8k")
    return evenly(items, config.limit)


def _solver(item: Item, config: EvalConfig) -> Prompt:
    question = str(item.fields["question"])
    if config.gsm8k_form == "text":
        text = f"{_EXAMPLES}Question: {question}\nAnswer:"
        return Continuation(text, config.max_tokens or _TEXT_TOKENS, stop=("Question:",))
    message = {"role": "user", "content": f"{question}\n\n{_REQUEST}"}
    return Chat((message,), config.max_tokens or _CHAT_TOKENS)


def _scorer(item: Item, response: Response, _config: EvalConfig) -> Score:
    number = last_number(response.text)
    if number is None:
        return Score(0.0)
    return Score(float(number == Fraction(item.fields["gold"])), parsed=str(number))


def last_number(text: str) -> Fraction | None:
    r"""The number that a worked answer ends with, exact; None where there is none.

    A number in the last `\boxed{}` counts if there is one. Thousands separators, currency, units,
    percent signs, decimals, fractions, mixed numbers, other minus signs and LaTeX are understood;
    percentages are read as the number before the sign.
    """
    text = text.translate(_MINUS)
    if boxed := _BOXED.findall(text):
        number = _last(boxed[-1])
        if number is not None:
            return number
    return _last(text)


def _last(text: str) -> Fraction | None:
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    numbers = [value for match in _NUMBER.finditer(text) if (value := _value(match)) is not None]
    return numbers[-1] if numbers else None


def _value(match: re.Match[str]) -> Fraction | None:
    parts = {name: (text or "").replace(",", "") for name, text in match.groupdict().items()}
    try:
        if parts["whole"]:
            value = int(parts["whole"]) + Fraction(int(parts["n"]), int(parts["d"]))
        elif parts["top"]:
            value = Fraction(parts["top"]) / Fraction(parts["bottom"])
        else:
            value = Fraction(parts["plain"] + parts["exponent"])
    except (ZeroDivisionError, ValueError):  # 3/0; a number of more digits than Python reads
        return None
    return -value if parts["sign"] else value


TASK = Task(
    name="gsm8k",
    title="GSM8K",
    version="1",
    variant=lambda config: "8-shot" if config.gsm8k_form == "text" else "",
    files=("gsm8k/test",),
    dataset=_dataset,
    solver=_solver,
    scorer=_scorer,
)
