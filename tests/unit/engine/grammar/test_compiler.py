"""Grammars of every kind over tokens: what they let through, where they end, what is refused."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiq.backend import mx
from optiq.engine.grammar import Grammar
from optiq.engine.grammar.compiler import Run
from optiq.engine.grammar.masks import Masks
from optiq.errors import UsageError
from tests.unit.engine.grammar.conftest import STOP, VOCAB


def allowed(run: Run) -> set[int]:
    return {token for token, may in enumerate(run.allowed().tolist()) if may}


def follows(run: Run, tokens: list[int]) -> bool:
    """Whether the tokens may come one after the other, by the masks and by `accept`."""
    for token in tokens:
        in_mask = token in allowed(run)
        assert run.accept(token) == in_mask
        if not in_mask:
            return False
    return True


MATCHES = [
    (Grammar("json_object"), '{"a":[1,2.5,null,{"b":true}]}', '{"a": 1}'),
    (Grammar("json_schema", True), '["x"]', "[1, 2]"),
    (Grammar("json_schema", {"enum": ["a", 1]}), '"a"', "2"),
    (Grammar("json_schema", {"type": "string", "pattern": "^a"}), '"ab"', '"b"'),
    (Grammar("regex", "a/b\\/c\nd|[/]"), "a/b/c\nd", "a"),
    (Grammar("regex", "^[ab]{2}$"), "ba", "bab"),
    (Grammar("choice", ('a "q"\n', "b\u00e9", "ab")), 'a "q"\n', 'a "q'),
    (Grammar("lark", 'start: "x" y\ny: /[0-9]/'), "x1", "xy"),
]


@pytest.mark.parametrize(("grammar", "right", "wrong"), MATCHES)
def test_what_a_grammar_describes_comes_through_and_nothing_else(
    compiler, ids, grammar, right, wrong
):
    run = compiler.compile(grammar).start()
    assert follows(run, ids(right))
    assert run.may_end
    assert run.must_end == (allowed(run) == STOP)
    other = compiler.compile(grammar).start()
    assert not (follows(other, ids(wrong)) and other.may_end)


def test_stop_tokens_may_come_exactly_where_the_grammar_may_end(compiler, ids):
    run = compiler.compile(Grammar("regex", "ab|abab?")).start()
    for text, may_end in (("a", False), ("b", True), ("a", True), ("b", True)):
        assert not (STOP & allowed(run)) or run.may_end
        assert follows(run, ids(text))
        assert run.may_end is may_end
        assert STOP <= allowed(run) if may_end else not STOP & allowed(run)
    assert run.must_end
    assert allowed(run) == STOP


REFUSED = [
    (Grammar("json_schema", {"type": "array", "uniqueItems": True}), "uniqueItems"),
    (Grammar("json_schema", {"properties": {"a": {"not": {}}}}), "not"),
    (Grammar("json_schema", {"type": "object", "x-guidance": {"lenient": True}}), "x-guidance"),
    (Grammar("json_schema", {"$ref": "http://x/y"}), r"\$ref"),
    (Grammar("json_schema", {"$ref": "#"}), "nothing be written"),
    (Grammar("json_schema", False), "false"),
    (Grammar("json_schema", {"format": "unheard-of", "type": "string"}), "unheard-of"),
    (Grammar("json_schema", 5), "5"),
    (Grammar("json_schema", {"default": "x" * 300_000}), "300"),
    (Grammar("json_object", {}), "no value"),
    (Grammar("regex", "["), "unclosed"),
    (Grammar("regex", "(?=a)b"), "look-around"),
    (Grammar("regex", ""), "empty"),
    (Grammar("regex", "x" * 9000), "9000"),
    (Grammar("choice", ()), "at least one"),
    (Grammar("choice", ("a", "")), "empty"),
    (Grammar("lark", "start: a\na: a"), "nothing be written"),
    (Grammar("lark", "nonsense"), "Expected"),
    (Grammar("lark", '%llguidance {}\nstart: "a"'), "%llguidance"),
    (Grammar("xml", "<a>"), "xml"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("grammar", "said"), REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(compiler, grammar, said):
    with pytest.raises(UsageError, match=said):
        compiler.compile(grammar)


def test_a_schema_deeper_than_any_need_is_refused(compiler):
    deep: dict[str, object] = {"type": "string"}
    for _ in range(100_000):
        deep = {"items": deep}
    with pytest.raises(UsageError, match="levels deep"):
        compiler.compile(Grammar("json_schema", deep))


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|aa)+b{5000}", "a{100000}", "((a{1000}){1000}){1000}", "(.*a){20}.{20}"],
)
def test_catastrophic_patterns_cost_next_to_nothing(compiler, ids, pattern):
    start = time.process_time()
    run = compiler.compile(Grammar("regex", pattern)).start()
    follows(run, ids("a" * 30))
    assert time.process_time() - start < 5  # backtracking or unrolling takes minutes


def test_a_grammar_that_costs_too_much_on_the_way_ends_with_a_reason(compiler, ids):
    many = " | ".join(f"a{i}" for i in range(2500))  # more than may be open at a place
    rules = "\n".join(f'a{i}: "x" "{i}"' for i in range(2500))
    run = compiler.compile(Grammar("lark", f'start: "y" ({many})\n{rules}')).start()
    with pytest.raises(UsageError, match="lark grammar asks too much"):
        follows(run, ids("yx1"))


def test_the_last_grammars_are_kept(compiler):
    schema = {"type": "object", "properties": {"kept": {"type": "null"}}}
    first = compiler.compile(Grammar("json_schema", schema))
    assert compiler.compile(Grammar("json_schema", json.loads(json.dumps(schema)))) is first
    assert compiler.compile(Grammar("json_schema", {"type": "null"})) is not first


@given(st.data())
@settings(max_examples=30)
def test_going_back_is_as_if_one_had_not_gone(compiler, data):
    schema = {"type": "array", "items": {"type": ["string", "integer", "null"]}}
    run = compiler.compile(Grammar("json_schema", schema)).start()
    seen = [allowed(run)]
    for _ in range(data.draw(st.integers(1, 12))):
        choices = sorted(seen[-1] - STOP)
        if not choices:
            break
        assert run.accept(data.draw(st.sampled_from(choices)))
        seen.append(allowed(run))
    kept = data.draw(st.integers(0, run.depth))
    fork = run.fork()
    run.back_to(kept)
    assert allowed(run) == seen[kept]
    assert allowed(fork) == seen[-1]


@given(st.integers(1, 300), st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_bits_become_truth_values(size, rng):
    wanted = [rng.random() < 0.5 for _ in range(size)]
    words = -(-size // 32)
    bits = sum(1 << place for place, may in enumerate(wanted) if may).to_bytes(4 * words, "little")
    found = Masks(size, ()).of_bits(bits)
    assert found.dtype == mx.bool_
    assert found.tolist() == wanted


def test_sets_of_tokens_are_masks():
    masks = Masks(VOCAB, STOP)
    assert masks.only(frozenset({3})).tolist() == [token == 3 for token in range(VOCAB)]
    assert masks.all_but(frozenset({3})).tolist() == [token != 3 for token in range(VOCAB)]
