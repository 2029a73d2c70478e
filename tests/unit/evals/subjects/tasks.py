"""Small benchmarks and stand-ins for models, for tests of runs."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from optiq.artifacts import SubjectInfo
from optiq.evals.subjects.base import Answer, Ask
from optiq.evals.task import Chat, Choice, Continuation, Item, Prompt, Response, Score, Task

NUM_ITEMS = 12


def items(_data: Any, config: Any) -> list[Item]:
    """Twelve sums, twice as many with --full."""
    count = 2 * NUM_ITEMS if config.full else NUM_ITEMS
    return [Item(f"q{n}", {"n": n}) for n in range(count)][: config.limit]


def chat(item: Item, _config: Any) -> Chat:
    return Chat(({"role": "user", "content": f"{item.fields['n']} + 1 ="},), 12)


def text(item: Item, _config: Any) -> Continuation:
    return Continuation(f"{item.fields['n']} + 1 =", 12, stop=("\n",))


def choice(item: Item, _config: Any) -> Choice:
    shared = "Even or odd?\n" if item.fields["n"] % 3 else "Say which it is.\n"
    return Choice(shared, f"{item.fields['n']}:", (" even", " odd"))


def exact(item: Item, response: Response, _config: Any) -> Score:
    """Whether the answer is the sum."""
    return Score(float(response.text.strip() == str(item.fields["n"] + 1)), parsed=response.text)


def likeliest(item: Item, response: Response, _config: Any) -> Score:
    assert response.logprobs is not None
    best = response.logprobs.index(max(response.logprobs))
    return Score(float(best == item.fields["n"] % 2), parsed=best)


CHAT = Task("sums", "Sums", "1", items, chat, exact)
TEXT = Task("text", "Text", "1", items, text, exact)
CHOICE = Task("parity", "Parity", "1", items, choice, likeliest)


@dataclasses.dataclass
class Stub:
    """A model that answers by rule; counts what it was asked."""

    rule: Any = lambda prompt: Response("0")
    has_template: bool = True
    context: int | None = None
    wave: int | None = None
    info: SubjectInfo = dataclasses.field(
        default_factory=lambda: SubjectInfo("local", "stub", "0" * 64, 1000, 4.5)
    )
    asked: list[Prompt] = dataclasses.field(default_factory=list)
    keys: list[int] = dataclasses.field(default_factory=list)

    def num_tokens(self, prompt: Prompt) -> int | None:
        return len(prompt.text) if isinstance(prompt, Continuation) else None

    def check(self, prompt: Prompt) -> None:
        pass

    def seconds(self, asks: Sequence[Ask]) -> float | None:
        return 0.5 * len(asks)

    def answer(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Answer]]:
        for index, ask in reversed(list(enumerate(asks))):
            self.asked.append(ask.prompt)
            self.keys.append(ask.key)
            response = self.rule(ask.prompt)
            if isinstance(response, Answer):
                yield index, response
            else:
                yield index, Answer(response)


def right(prompt: Prompt) -> Response:
    """The right answer to a sum."""
    assert isinstance(prompt, Chat)
    return Response(str(int(prompt.messages[0]["content"].split()[0]) + 1), num_tokens=1)
