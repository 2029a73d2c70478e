"""HashHop: follow a chain of random hashes through a long shuffled list.

The items of the default are generated here. The published form is the algorithm of the generator
of its authors, so that prompts with its seeds are the same; which seeds the published cards used is
not known.

Reference: Magic 2024, HashHop: Long Context Evaluation.
"""

from __future__ import annotations

import itertools
import math
import random
import re
import string
from collections.abc import Iterator, Sequence

import numpy as np

from optiq.configs import EvalConfig
from optiq.data.benchmarks import BenchmarkData
from optiq.errors import UsageError
from optiq.evals import draw
from optiq.evals.task import Chat, Item, Response, Score, Task

LENGTHS = (1_000, 2_000, 4_000, 8_000, 16_000)  # characters of the list
HOPS = (1, 2, 3, 4)
_PER_CELL = 50
_PUBLISHED_LENGTH = 12_000
_PUBLISHED_PER_HOP = 25
_HASH_CHARS = 16
_LETTERS = string.ascii_lowercase + string.ascii_uppercase
_MAX_TOKENS = 128
_FRAME_CHARS = 500  # of the question around the list and its last chain, rounded up

_HASH = re.compile(rf"(?<![A-Za-z])[A-Za-z]{{{_HASH_CHARS}}}(?![A-Za-z])")


def _dataset(_data: BenchmarkData, config: EvalConfig) -> Sequence[Item]:
    lengths = _lengths(config)
    if not lengths:
        raise UsageError(
            f"no HashHop list fits into {config.hashhop_max_chars} characters; the shortest prompt "
            f"has up to {prompt_chars(_all_lengths(config)[0], config)}: leave hashhop out, or "
            f"allow more"
        )
    per_cell = _PUBLISHED_PER_HOP if config.hashhop_published else _PER_CELL
    make = _published if config.hashhop_published else _generated
    places = list(itertools.product(lengths, HOPS, range(per_cell)))
    return [make(config.seed, *place) for place in draw.evenly(places, config.limit)]


def _all_lengths(config: EvalConfig) -> tuple[int, ...]:
    return (_PUBLISHED_LENGTH,) if config.hashhop_published else LENGTHS


def _lengths(config: EvalConfig) -> tuple[int, ...]:
    limit = config.hashhop_max_chars or math.inf
    return tuple(n for n in _all_lengths(config) if prompt_chars(n, config) <= limit)


def prompt_chars(length: int, config: EvalConfig) -> int:
    """An upper bound of the characters of a prompt with a list of `length` characters."""
    if config.hashhop_published:  # which counts lines without the newline and the quotes
        length = math.ceil(length * (2 * _HASH_CHARS + 6) / (2 * _HASH_CHARS + 3))
    return length + _FRAME_CHARS


def _variant(config: EvalConfig) -> str:
    parts = ["published"] if config.hashhop_published else []
    if _lengths(config) != _all_lengths(config):
        parts.append(f"to-{max(_lengths(config), default=0)}")
    return "-".join(parts)


def _item(form: str, cell: tuple[int, int, int, int], lines: list[str], pair: list[str]) -> Item:
    seed, length, hops, index = cell
    fields = {"lines": lines, "start": pair[0], "target": pair[1], "hops": hops, "chars": length}
    return Item(id=f"{form}-{seed}-{length}-{hops}-{index}", fields=fields)


def _generated(seed: int, length: int, hops: int, index: int) -> Item:
    """A list of chains of `hops` steps, shuffled, and the ends of one of them."""
    num_chains = math.ceil(length / (hops * (2 * _HASH_CHARS + 4)))
    num_hashes = num_chains * (hops + 1)
    raw = draw.raw([seed, length, hops, index], num_hashes * _HASH_CHARS + num_chains * hops + 1)
    letters = raw[: num_hashes * _HASH_CHARS].reshape(num_chains, hops + 1, _HASH_CHARS)
    chains = [
        ["".join(_LETTERS[letter] for letter in one) for one in chain]
        for chain in (letters % np.uint64(len(_LETTERS))).tolist()
    ]
    pairs = [pair for chain in chains for pair in itertools.pairwise(chain)]
    order = np.argsort(raw[num_hashes * _HASH_CHARS : -1], kind="stable")
    asked = chains[int(raw[-1] % np.uint64(num_chains))]
    lines = ["{} = {}".format(*pairs[place]) for place in order]
    return _item("own", (seed, length, hops, index), lines, [asked[0], asked[-1]])


def _published(seed: int, length: int, hops: int, index: int) -> Item:
    """The first query of a problem of the authors' generator, for the seed `1000 seed + index`.

    Its draws: per chain the first two hashes; then, step by step, the next hash of all chains; then
    the order of the lines. Its queries are in the order of the chains.
    """
    legacy = np.random.RandomState(1000 * seed + index)  # the stream that the generator draws from
    shuffler = random.Random(1000 * seed + index)

    def hashes() -> Iterator[str]:
        while True:
            yield "".join(_LETTERS[i] for i in legacy.choice(len(_LETTERS), _HASH_CHARS))

    supply = hashes()
    num_chains = math.ceil(length / (hops * (2 * _HASH_CHARS + 3)))
    chains = [[next(supply), next(supply)] for _ in range(num_chains)]
    for _ in range(hops - 1):
        for chain in chains:
            chain.append(next(supply))
    lines = []
    for step in range(hops):
        quote = "'" if step == hops - 1 else ""  # marks the end of a chain
        lines += [f"{chain[step]} = {quote}{chain[step + 1]}{quote}" for chain in chains]
    shuffler.shuffle(lines)
    return _item("published", (seed, length, hops, index), lines, [chains[0][0], chains[0][-1]])


def _solver(item: Item, config: EvalConfig) -> Chat:
    hops = item.fields["hops"]
    steps = "1 step" if hops == 1 else f"{hops} steps"
    content = (
        "Each line below assigns a hash to another hash.\n\n"
        + "\n".join(item.fields["lines"])
        + f"\n\nStart at {item.fields['start']} and follow the assignments for {steps}: look up "
        "the hash assigned to it, then the hash assigned to that one, and so on. Which hash do you "
        "reach? Answer with that hash alone."
    )
    return Chat(({"role": "user", "content": content},), config.max_tokens or _MAX_TOKENS)


def _scorer(item: Item, response: Response, _config: EvalConfig) -> Score:
    """Exact match of the last hash in the answer."""
    found = _HASH.findall(response.text)
    if not found:
        return Score(0.0)
    return Score(float(found[-1] == item.fields["target"]), parsed=found[-1])


TASK = Task(
    name="hashhop",
    title="HashHop",
    version="1",
    variant=_variant,
    groups=lambda i: {"hops": str(i.fields["hops"]), "characters": str(i.fields["chars"])},
    dataset=_dataset,
    solver=_solver,
    scorer=_scorer,
)
