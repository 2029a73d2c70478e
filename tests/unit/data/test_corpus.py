"""The built-in corpus: enough of it, varied, and held out cleanly."""

import json
from collections import Counter
from importlib import resources

import pytest
from tokenizers import Tokenizer

from optiq.data.calibration import DOMAINS, builtin_records

MIN_TOKENS = {"calibration": 6000, "heldout": 2000}
ROW_KEYS = {"id", "split", "language", "programming", "text", "messages", "tools"}
WORDS_TO_TOKENS = 1.3


def rows(domain):
    path = resources.files("optiq") / "data" / "corpus" / f"{domain}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def parts(record):
    """What a model reads of a record, without the marks of a template."""
    if record.text is not None:
        return [record.text]
    out = [message["content"] for message in record.messages if message["content"]]
    for message in record.messages:
        out += [
            json.dumps(c["function"], ensure_ascii=False) for c in message.get("tool_calls", ())
        ]
    return [*out, *(json.dumps(tool, ensure_ascii=False) for tool in record.tools)]


def split_parts(domain, split):
    records = [record for record in builtin_records(split) if record.domain == domain]
    return [part for record in records for part in parts(record)]


@pytest.mark.parametrize("domain", DOMAINS)
def test_rows_are_well_formed_and_ids_are_unique(domain):
    found = rows(domain)
    assert len({row["id"] for row in found}) == len(found)
    for row in found:
        assert set(row) <= ROW_KEYS
        assert row["split"] in MIN_TOKENS
        assert row["id"].startswith(f"{domain}-")
        assert len(row["language"]) == 2


@pytest.mark.parametrize("split", MIN_TOKENS)
@pytest.mark.parametrize("domain", DOMAINS)
def test_there_are_words_enough(domain, split):
    words = sum(len(part.split()) for part in split_parts(domain, split))
    assert words * WORDS_TO_TOKENS >= 0.7 * MIN_TOKENS[split]


@pytest.mark.assets
@pytest.mark.parametrize("split", MIN_TOKENS)
@pytest.mark.parametrize("domain", DOMAINS)
def test_tokens_enough_and_no_filler(shared, domain, split):
    tokenizer = Tokenizer.from_file(str(shared / "assets/tokenizers/smollm2/tokenizer.json"))
    encoded = [tokenizer.encode(part).ids for part in split_parts(domain, split)]
    assert sum(map(len, encoded)) >= MIN_TOKENS[split]
    grams = [tuple(ids[i : i + 5]) for ids in encoded for i in range(len(ids) - 4)]
    assert len(set(grams)) / len(grams) >= 0.90


def test_human_and_programming_languages():
    found = [row for domain in DOMAINS for row in rows(domain)]
    for split in MIN_TOKENS:
        human = Counter(row["language"] for row in found if row["split"] == split)
        assert len(human) >= 3
    programming = {row["programming"] for row in found if "programming" in row}
    assert len(programming) >= 4


def test_splits_share_no_sentence():
    def runs(split):
        for record in builtin_records(split):
            words = " ".join(parts(record)).split()
            yield from (tuple(words[i : i + 13]) for i in range(len(words) - 12))

    assert not set(runs("calibration")) & set(runs("heldout"))
