"""Plans from synthetic tables: laws of the budget, pins and floors, errors, speed."""

import dataclasses
import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optiq.artifacts import KEEP, LATTICE, BitPlan, ModuleInfo, QuantOption
from optiq.configs import AllocateConfig
from optiq.errors import ArtifactMismatch, BudgetInfeasible, UsageError
from optiq.quant.allocate import allocate, floors, pareto
from tests.unit.quant.tables import (
    llama_modules,
    make_scores,
    make_source,
    make_table,
    moe_modules,
    random_table,
)

WIDE = settings(max_examples=60)


@st.composite
def tables(draw, max_modules=12):
    """Tables of odd shapes; rows of 48 take no group at all and can only be kept."""
    shapes = draw(
        st.lists(
            st.tuples(st.integers(1, 40), st.sampled_from([32, 48, 64, 96, 128, 256])),
            min_size=1,
            max_size=max_modules,
        )
    )
    modules = [ModuleInfo(f"m.{n}.proj", "linear", shape) for n, shape in enumerate(shapes)]
    return random_table(modules, draw(st.integers(0, 10**6)), lattice=draw(st.booleans()))


def smallest_bpw(table, **config):
    with pytest.raises(BudgetInfeasible) as caught:
        allocate(table, AllocateConfig(target_bpw=1e-3, **config))
    return caught.value.min_bpw


def options(plan: BitPlan) -> dict[str, QuantOption]:
    return {entry.path: entry.option for entry in plan.entries}


@given(tables(), st.floats(0, 1), st.sampled_from(["size", "speed"]))
@WIDE
def test_never_above_the_target(table, share, objective):
    least = smallest_bpw(table)
    target = least + share * (16 - least)
    plan = allocate(table, AllocateConfig(target_bpw=target, objective=objective))
    assert plan.bpw <= target
    assert plan.size_bytes == sum(
        e.option.size_bytes(e.shape, table.source.itemsize) for e in plan.entries
    )
    assert plan.bpw == plan.size_bytes * 8 / table.num_params
    target_bytes = plan.model_bytes
    by_size = allocate(table, AllocateConfig(target_size=str(target_bytes), objective=objective))
    assert by_size.model_bytes <= target_bytes
    assert by_size.entries == plan.entries


@given(tables(), st.lists(st.floats(0, 1), min_size=2, max_size=6))
@WIDE
def test_more_budget_is_never_worse(table, shares):
    least = smallest_bpw(table)
    targets = [least + share * (16 - least) for share in sorted(shares)]
    kls = [allocate(table, AllocateConfig(target_bpw=t)).predicted_kl for t in targets]
    assert all(b <= a * (1 + 1e-8) for a, b in itertools.pairwise(kls))


@given(tables(max_modules=3), st.floats(0, 1))
@WIDE
def test_best_of_all_plans(table, share):
    least = smallest_bpw(table)
    target = least + share * (16 - least)
    best = min(
        sum(max(s.kl_nats_per_token, 0) for s in choice)
        for choice in itertools.product(*(m.scores for m in table.modules))
        if sum(s.size_bytes for s in choice) * 8 / table.num_params <= target
    )
    plan = allocate(table, AllocateConfig(target_bpw=target))
    assert plan.predicted_kl == pytest.approx(best, rel=1e-8, abs=1e-18)
    assert 0 <= plan.gap < 1e-8


@given(tables(max_modules=3), st.floats(-6, 0))
@WIDE
def test_kl_target_is_met_in_the_fewest_bytes(table, exponent):
    target = 10**exponent
    plan = allocate(table, AllocateConfig(target_kl=target))
    assert plan.predicted_kl <= target
    smallest = min(
        sum(s.size_bytes for s in choice)
        for choice in itertools.product(*(m.scores for m in table.modules))
        if sum(s.kl_nats_per_token for s in choice) <= target * (1 - 1e-9)
    )
    assert plan.size_bytes <= smallest
    assert plan.gap < 1e-8


@given(tables())
@WIDE
def test_smallest_feasible_size_is_feasible(table):
    with pytest.raises(BudgetInfeasible) as caught:
        allocate(table, AllocateConfig(target_size="1B"))
    error = caught.value
    by_bpw = allocate(table, AllocateConfig(target_bpw=error.min_bpw))
    by_size = allocate(table, AllocateConfig(target_size=str(error.min_size_bytes)))
    assert by_bpw.size_bytes == by_size.size_bytes
    assert by_size.model_bytes == error.min_size_bytes
    assert str(error.min_size_bytes) in str(error)
    with pytest.raises(BudgetInfeasible):
        allocate(table, AllocateConfig(target_size=str(error.min_size_bytes - 1)))


@given(tables(), st.floats(0, 1), st.data())
@WIDE
def test_pins_are_kept(table, share, data):
    scores = data.draw(st.sampled_from(table.modules))
    pinned = data.draw(st.sampled_from([s.option for s in scores.scores]))
    pin = (f"{scores.module.path}={pinned.key}",)
    least = smallest_bpw(table, pin=pin)
    target = least + share * (16 - least)
    plan = allocate(table, AllocateConfig(target_bpw=target, pin=pin))
    assert options(plan)[scores.module.path] == pinned
    assert plan.bpw <= target


@pytest.mark.parametrize("lattice", [False, True])
def test_targets_are_filled(lattice):
    table = random_table(llama_modules(30, 576, 1536, 49152), 1, lattice=lattice)
    for target in np.linspace(smallest_bpw(table), 8.5, 20):
        plan = allocate(table, AllocateConfig(target_bpw=float(target)))
        assert 0.995 * target <= plan.bpw <= target
        assert plan.gap < 1e-3


def test_large_table_in_a_second():
    modules = llama_modules(46, 2048, 5632, 32000, tied=False)
    extra = [ModuleInfo(f"extra.{n}", "linear", (512, 1024)) for n in range(328 - len(modules))]
    table = random_table([*modules, *extra], 5)
    assert len(table.modules) == 328
    assert {len(m.scores) for m in table.modules} == {19}
    start = time.process_time()
    plan = allocate(table, AllocateConfig(target_bpw=4.5))
    points = pareto(table, AllocateConfig())
    assert time.process_time() - start < 1
    assert plan.gap < 1e-3
    assert len(points) > 20


def test_same_table_same_plan():
    table = random_table(llama_modules(6), 3)
    config = AllocateConfig(target_bpw=4.2)
    assert allocate(table, config).to_json() == allocate(table, config).to_json()


def test_default_target():
    plan = allocate(random_table(llama_modules(8), 2), AllocateConfig())
    assert plan.target == "5 bpw"
    assert 4.97 < plan.bpw <= 5.0


def test_plan_of_ties_takes_first_modules_and_options():
    modules = [ModuleInfo(f"m.{n}", "linear", (8, 64)) for n in range(4)]
    menu = [QuantOption("affine", 4, 64), QuantOption("affine", 8, 64)]
    table = make_table([make_scores(m, [1.0, 0.1], options=menu) for m in modules])
    sizes = [option.size_bytes((8, 64), 2) for option in menu]
    target = 8 * (2 * sizes[0] + 2 * sizes[1]) / (4 * 8 * 64)
    bits = [option.bits for option in options(allocate(table, AllocateConfig(target))).values()]
    assert bits == [8, 8, 4, 4]


def test_inverted_score_is_never_bought():
    module = ModuleInfo("m", "linear", (8, 64))
    menu = [QuantOption("affine", bits, 64) for bits in (4, 5, 8)]
    table = make_table([make_scores(module, [0.01, 0.5, 0.02], options=menu)])
    plan = allocate(table, AllocateConfig(target_bpw=9.0))
    assert plan.entries[0].option == menu[0]


def test_negative_score_counts_as_zero():
    module = ModuleInfo("m", "linear", (8, 64))
    menu = [QuantOption("affine", bits, 64) for bits in (4, 5)]
    table = make_table([make_scores(module, [-1e-9, -2e-9], options=menu)])
    plan = allocate(table, AllocateConfig(target_bpw=9.0))
    assert plan.entries[0].option == menu[0]
    assert plan.predicted_kl == 0


def test_an_exact_lattice_wins_over_ordinary_codes_of_its_size():
    table = random_table(llama_modules(4), 0, lattice=True)
    rows = []
    for row in table.modules:
        level = [dataclasses.replace(s, kl_nats_per_token=0.0) for s in row.scores]
        rows.append(dataclasses.replace(row, scores=tuple(level)))
    table = dataclasses.replace(table, modules=tuple(rows))
    plan = allocate(table, AllocateConfig(target_bpw=5.0, min_bits=4))
    exact = {row.module.path for row in table.modules if row.lattice.exact}
    assert exact
    assert all(e.option.key != "4/32" for e in plan.entries if e.path in exact)


def test_lattice_is_taken_where_it_is_best():
    table = random_table(llama_modules(4), 0, lattice=True)
    chosen = options(allocate(table, AllocateConfig(target_bpw=5.3)))
    linears = [option for path, option in chosen.items() if "layers" in path]
    assert linears.count(LATTICE) > 0.8 * len(linears)


def test_float32_source_counts_its_own_bytes():
    source = make_source(dtype="float32")
    module = ModuleInfo("m", "linear", (8, 64))
    menu = [QuantOption("affine", 4, 64)]
    scores = make_scores(module, [0.1], options=menu, itemsize=4)
    plan = allocate(make_table([scores], source=source), AllocateConfig(target_bpw=32.0))
    assert plan.entries[0].option == KEEP
    assert plan.bpw == 32.0


class TestRouters:
    table = random_table(moe_modules(4), 1)
    routers = [m.module.path for m in table.modules if m.module.role == "router"]

    def test_floor(self):
        config = AllocateConfig(target_bpw=3.0)
        chosen = options(allocate(self.table, config))
        assert all(chosen[path].bits >= 8 for path in self.routers)
        assert list(floors(self.table, config)) == self.routers
        assert "8 bits" in floors(self.table, config)[self.routers[0]]

    def test_lifted(self):
        config = AllocateConfig(
            target_bpw=smallest_bpw(self.table, free_routers=True), free_routers=True
        )
        chosen = options(allocate(self.table, config))
        assert all(chosen[path].bits == 2 for path in self.routers)
        assert floors(self.table, config) == {}

    def test_pin_below_the_floor(self):
        with pytest.raises(UsageError, match=r"router model\.layers\.0\.mlp\.gate below 8 bits"):
            allocate(self.table, AllocateConfig(pin=("*=4/64",)))
        config = AllocateConfig(pin=("*=4/64",), free_routers=True)
        assert {o.key for o in options(allocate(self.table, config)).values()} == {"4/64"}

    def test_infeasible_names_the_floor(self):
        with pytest.raises(BudgetInfeasible, match="4 routers at 8 bits or more"):
            allocate(self.table, AllocateConfig(target_bpw=1.0))


class TestSpeed:
    def cuda_table(self, seed):
        return random_table(llama_modules(12), seed, device="cuda: NVIDIA H200")

    @pytest.mark.parametrize("seed", range(5))
    def test_trades_little_kl_for_fast_widths(self, seed):
        table = self.cuda_table(seed)
        size = allocate(table, AllocateConfig(target_bpw=5.0))
        speed = allocate(table, AllocateConfig(target_bpw=5.0, objective="speed"))
        assert size.predicted_kl <= speed.predicted_kl <= 1.1 * size.predicted_kl * (1 + 1e-9)
        assert read_time(speed) <= read_time(size)
        assert speed.bpw <= 5.0
        assert speed.target == "5 bpw, for speed"

    def test_does_something(self):
        table = self.cuda_table(1)
        size = allocate(table, AllocateConfig(target_bpw=5.0))
        speed = allocate(table, AllocateConfig(target_bpw=5.0, objective="speed"))
        assert read_time(speed) < read_time(size)

    def test_kl_target(self):
        table = self.cuda_table(2)
        size = allocate(table, AllocateConfig(target_kl=0.05))
        speed = allocate(table, AllocateConfig(target_kl=0.05, objective="speed"))
        assert speed.predicted_kl <= 0.05
        assert read_time(speed) < read_time(size)
        assert size.size_bytes < speed.size_bytes

    def test_bits_go_where_few_bytes_are_read(self):
        modules = [
            ModuleInfo("dense", "linear", (256, 256)),
            ModuleInfo("experts", "expert", (1, 256, 256), active=0.01),
        ]
        menu = [QuantOption("affine", 4, 64), QuantOption("affine", 8, 64)]
        table = make_table(
            [
                make_scores(modules[0], [0.1001, 0.01], options=menu),
                make_scores(modules[1], [0.1, 0.01], options=menu),
            ]
        )
        size = allocate(table, AllocateConfig(target_bpw=6.5))
        speed = allocate(table, AllocateConfig(target_bpw=6.5, objective="speed"))
        assert [e.option.bits for e in size.entries] == [8, 4]
        assert [e.option.bits for e in speed.entries] == [4, 8]


def read_time(plan):
    slow = {bits: 1.3 for bits in (2, 3, 5, 6)}
    return sum(e.size_bytes * slow.get(e.option.bits, 1.0) for e in plan.entries)


class TestPareto:
    def test_points_are_plans(self):
        table = random_table(llama_modules(6), 4)
        points = pareto(table, AllocateConfig())
        assert points[0].bpw == smallest_bpw(table)
        assert points[-1].predicted_kl == 0
        for before, after in itertools.pairwise(points):
            assert after.bpw > before.bpw
            assert after.predicted_kl < before.predicted_kl
        for point in points:
            plan = allocate(table, AllocateConfig(target_bpw=point.bpw))
            assert plan.model_bytes == point.model_bytes
            assert plan.predicted_kl == pytest.approx(point.predicted_kl, rel=1e-8)

    def test_pins_and_floors_count(self):
        table = random_table(llama_modules(6), 4)
        free = pareto(table, AllocateConfig())
        bound = pareto(table, AllocateConfig(pin=("*.v_proj=8/64",), min_bits=4))
        assert bound[0].bpw > 4
        assert free[0].bpw < 2.6

    def test_single_choice(self):
        table = random_table(llama_modules(2), 0)
        points = pareto(table, AllocateConfig(pin=("*=4/64",)))
        assert [point.bpw for point in points] == [4.5]


class TestErrors:
    table = random_table(llama_modules(3), 0)

    def refused(self, match, table=None, **config):
        with pytest.raises(UsageError, match=match) as caught:
            allocate(table or self.table, AllocateConfig(**config))
        return caught.value

    def test_pattern_without_match(self):
        self.refused(
            r"'\*\.down_prj=6/64' matches none of the 22 modules.*\*\.down_proj",
            pin=("*.down_prj=6/64",),
        )
        self.refused("did you mean.*layers.1.mlp", pin=("model.layers.1.mlp.up.weight=6/64",))
        self.refused(r"a path is model\.layers", pin=("qqqq=6/64",))

    def test_case_counts(self):
        self.refused("matches none", pin=("*.DOWN_PROJ=6/64",))

    def test_contradiction(self):
        error = self.refused("both cover", pin=("*.v_proj=6/64", "model.layers.1.*=8/64"))
        assert "'*.v_proj=6/64'" in str(error)
        assert "'model.layers.1.*=8/64'" in str(error)
        assert "model.layers.1.self_attn.v_proj" in str(error)

    def test_agreeing_pins(self):
        config = AllocateConfig(pin=("*.v_proj=6/64", "model.layers.1.*v_proj=6/64"))
        chosen = options(allocate(self.table, config))
        assert chosen["model.layers.1.self_attn.v_proj"].key == "6/64"

    def test_option_that_a_module_has_not(self):
        table = random_table([ModuleInfo("m", "linear", (8, 96))], 0)
        self.refused(r"m has no option 4/64; it has 2/32, .*keep", table, pin=("m=4/64",))
        self.refused("m has no option lattice", table, pin=("m=lattice",))

    def test_pin_below_min_bits(self):
        self.refused("below --min-bits 4", pin=("*.v_proj=2/64",), min_bits=4)

    def test_above_the_source(self):
        error = self.refused("above the source's own 16 stored bits", target_bpw=16.5)
        assert not isinstance(error, BudgetInfeasible)
        self.refused("above the source's own", target_size="1GB")
        assert allocate(self.table, AllocateConfig(target_bpw=16.0)).bpw == 16

    def test_infeasible_names_pins_and_bits(self):
        error = self.refused(
            r"no plan fits 3 bpw: the smallest with --pin '\*\.v_proj=8/64', --min-bits 4 takes",
            target_bpw=3.0,
            pin=("*.v_proj=8/64",),
            min_bits=4,
        )
        assert isinstance(error, BudgetInfeasible)

    def test_printed_minimum_is_feasible(self):
        error = self.refused("no plan fits", target_bpw=1.0)
        printed = float(str(error).split("takes ")[1].split(" bpw")[0])
        assert allocate(self.table, AllocateConfig(target_bpw=printed)).bpw == error.min_bpw

    def test_kl_out_of_reach(self):
        self.refused("least predicted KL is", target_kl=1e-6, pin=("*=2/64",))

    def test_kl_just_within_reach(self):
        pin = ("*=2/64",)
        least = allocate(self.table, AllocateConfig(target_bpw=3.0, pin=pin)).predicted_kl
        assert allocate(self.table, AllocateConfig(target_kl=least, pin=pin)).predicted_kl == least

    def test_kl_of_a_table_without_kl(self):
        static = dataclasses.replace(self.table, method="static")
        self.refused("--method static", static, target_kl=0.1)

    def test_broken_tables(self):
        empty = make_table([])
        with pytest.raises(ArtifactMismatch, match="no modules"):
            allocate(empty, AllocateConfig())
        module = ModuleInfo("m", "linear", (8, 64))
        menu = [QuantOption("affine", 4, 64)]
        broken = make_table([make_scores(module, [float("nan")], options=menu)])
        with pytest.raises(ArtifactMismatch, match="m at 4/64 is nan"):
            pareto(broken, AllocateConfig())
