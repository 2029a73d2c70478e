"""Models in memory, and what makes room for them."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optiq.engine.options import KV_SHARE
from optiq.errors import EngineFailure, RequestRejected, UsageError
from optiq.events import no_emit
from optiq.server.catalog import Catalog
from optiq.server.messages import WorkerOptions
from optiq.server.shelf import Shelf, part_of_memory
from tests.gemma4 import ASSISTANT, TARGET
from tests.tiny import tiny_checkpoint

FAMILIES = ("llama", "qwen2", "qwen3")
TWO = "3200kB"  # room for two of them in float32, 1.35 MB each


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three models of about one size."""
    found = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        tiny_checkpoint(found, family)
    return found


def shelf(folder, emit=no_emit, loading=lambda name: None, **options):
    """A shelf of a directory."""
    return Shelf(Catalog.of([folder]).entries, WorkerOptions(**options), emit, loading)


def names(found):
    """Names of the models in memory."""
    return [loaded.name for loaded in found.loaded]


def test_the_model_used_longest_ago_makes_room(folder):
    found = shelf(folder, memory_limit=TWO)
    for name in ("llama", "qwen2", "llama", "qwen3"):
        assert found.use(name).name == name
    assert names(found) == ["llama", "qwen3"]
    assert [card.loaded for card in found.cards()] == [True, False, True]


def test_a_busy_model_is_not_unloaded(folder):
    found = shelf(folder, memory_limit=TWO)
    first, second = found.use("llama"), found.use("qwen2")
    first.num_tasks = second.num_tasks = 1
    assert found.use("qwen3") is None
    assert names(found) == ["llama", "qwen2"]
    second.num_tasks = 0
    assert found.use("qwen3").name == "qwen3"
    assert names(found) == ["llama", "qwen3"]


def test_a_model_that_never_fits_is_refused(folder):
    found = shelf(folder, memory_limit="500kB")
    with pytest.raises(RequestRejected, match="GB are allowed") as caught:
        found.use("llama")
    assert (caught.value.code, caught.value.param) == ("model_too_large", "model")


def test_an_unknown_model_is_refused(folder):
    with pytest.raises(RequestRejected) as caught:
        shelf(folder).use("other")
    assert caught.value.http_status == 404


def test_a_model_that_nobody_uses_is_unloaded(folder):
    found = shelf(folder, idle_unload_s=100)
    assert found.idle_left_s() is None
    old, busy, fresh = (found.use(name) for name in FAMILIES)
    assert 0 < found.idle_left_s() <= 100
    assert not found.unload_idle()
    old.used_at -= 200
    busy.used_at -= 200
    busy.num_tasks = 1
    assert found.idle_left_s() < 0
    assert found.unload_idle()
    assert names(found) == ["qwen2", "qwen3"]
    assert not hasattr(old, "engine")
    assert found.idle_left_s() <= fresh.used_at + 100
    assert found.use("llama").engine is not None


def test_without_a_time_nothing_is_unloaded(folder):
    found = shelf(folder)
    found.use("llama").used_at -= 1e9
    assert found.idle_left_s() is None
    assert not found.unload_idle()


def test_cards_say_what_the_files_say(folder):
    card = shelf(folder).cards()[0]
    assert dataclasses.replace(card, created=0, size_bytes=0) == dataclasses.replace(
        card,
        name="llama",
        created=0,
        loaded=False,
        context=512,
        vision=False,
        tools=False,
        thinking=False,
        chat=True,
        drafter=None,
        size_bytes=0,
        bpw=None,
    )
    assert card.size_bytes == (folder / "llama" / "model.safetensors").stat().st_size


def test_context_can_be_shortened(folder):
    found = shelf(folder, max_context=100)
    assert found.cards()[0].context == 100
    with pytest.raises(UsageError, match="100"):
        found.use("llama").engine.generate("a" * 100)


def test_a_directory_that_was_found_is_passed_over_and_one_that_was_named_is_not(tmp_path):
    tiny_checkpoint(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("[]")
    told = []
    assert [card.name for card in shelf(tmp_path, told.append).cards()] == ["llama"]
    assert "broken" in told[0].text
    with pytest.raises(UsageError, match="JSON object"):
        shelf(tmp_path / "broken")


def test_weights_that_are_damaged_later_are_no_fault_of_the_request(tmp_path):
    folder = tiny_checkpoint(tmp_path)
    found = shelf(folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="loaded"):
        found.load("llama")
    with pytest.raises(EngineFailure, match="loaded") as caught:
        found.use("llama")
    assert str(tmp_path) not in str(caught.value)
    assert not found.loaded


def test_loading_is_told_before(folder):
    seen = []
    found = shelf(folder, loading=lambda name: seen.append((name, names(found))))
    found.use("llama")
    found.use("llama")
    assert seen == [("llama", [])]


def test_a_wrong_option_is_named(folder):
    with pytest.raises(UsageError, match="colour"):
        shelf(folder, engine={"colour": 1})
    with pytest.raises(UsageError, match="no size"):
        shelf(folder, memory_limit="much")


def test_a_drafter_that_is_none_is_refused(folder, tmp_path):
    entries = Catalog.of([folder / "llama"], drafter=str(tmp_path / "nothing")).entries
    with pytest.raises(UsageError, match="drafter"):
        Shelf(entries, WorkerOptions(), no_emit, lambda name: None)


def test_a_drafter_of_another_model_is_refused(folder):
    entries = Catalog.of([folder / "llama"], drafter=str(ASSISTANT)).entries
    found = Shelf(entries, WorkerOptions(), no_emit, lambda name: None)
    with pytest.raises(UsageError, match="drafter|assistant"):
        found.load("llama")


def test_card_of_a_model_that_can_do_everything():
    entries = Catalog.of([TARGET], drafter=str(ASSISTANT)).entries
    (card,) = Shelf(entries, WorkerOptions(), no_emit, lambda name: None).cards()
    assert (card.vision, card.tools, card.thinking, card.chat) == (True,) * 4
    assert card.drafter == "gemma4_assistant"


# -- memory for pasts ----------------------------------------------------------------------------

FREE = 1 << 30


def parts(found, order, monkeypatch):
    """Memory for pasts of models that are loaded in an order, by name."""
    used = []
    monkeypatch.setattr("optiq.server.shelf.memory_left", lambda: FREE - sum(used))
    for name in order:
        size = found._resident_bytes(found._cards[name])
        found.use(name)
        used.append(size)
    return {one.name: one.engine._options.kv_memory for one in found.loaded}


def test_models_that_fit_together_share_the_memory_in_equal_parts_in_any_order(folder, monkeypatch):
    orders = [FAMILIES, FAMILIES[::-1]]
    first, second = (parts(shelf(folder), order, monkeypatch) for order in orders)
    weights = sum(map(shelf(folder)._resident_bytes, shelf(folder).cards()))
    for name in FAMILIES:
        assert first[name] == pytest.approx(second[name], rel=0.01)
        assert first[name] == pytest.approx(KV_SHARE * (FREE - weights) / 3, rel=0.01)


def test_models_that_take_turns_do_not_share(folder, monkeypatch):
    """Where one fits at a time it has what a single model has, which the engine measures."""
    assert parts(shelf(folder, memory_limit="1600kB"), ("llama",), monkeypatch) == {"llama": None}
    assert parts(shelf(folder / "llama"), ("llama",), monkeypatch) == {"llama": None}
    two = parts(shelf(folder, memory_limit=TWO), ("llama", "qwen2"), monkeypatch)
    assert [part < 0.5 * KV_SHARE * FREE for part in two.values()] == [True, True]
    assert sum(two.values()) == pytest.approx(KV_SHARE * FREE, rel=0.01)


@given(
    left=st.integers(0, 1 << 40),
    own=st.integers(1, 1 << 36),
    others=st.integers(0, 1 << 38),
    together=st.integers(2, 9),
)
def test_a_part_is_never_all_and_never_nothing(left, own, others, together):
    part = part_of_memory(left, own, own + others, together)
    assert 0 <= part * together <= max(0, KV_SHARE * (left - own))
    if left > own + together * together * 4:
        assert part > 0


def test_kept_prompts_of_several_models_stay_below_one_limit(folder):
    found = shelf(folder, engine={"prefix_memory": 3000})
    assert found.use("llama").engine._options.prefix_memory == 1000
    alone = shelf(folder / "llama", engine={"prefix_memory": 3000})
    assert alone.use("llama").engine._options.prefix_memory == 3000
