"""Allocate: one option per module, the least predicted KL within a budget of stored bytes.

Scores are used as they were measured, with negative ones taken as 0 and `keep` always at 0. More
bits at the same group never count as worse: all options of a module are scored with the same
probes, so where more bits score higher the weights lie nearer to the coarser grid, and the smaller
option is taken (a running minimum over nested options; in a knapsack, dominance). Noise that all
options of a module share does not change the choice within it; what is left of the optimizer's
curse is not corrected, and the prediction is checked after converting.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from fnmatch import fnmatchcase

import numpy as np

from optiq.artifacts import (
    KEEP,
    LATTICE,
    BitPlan,
    ModuleInfo,
    ModuleScores,
    OptionScore,
    PlanEntry,
    QuantOption,
    SensitivityTable,
)
from optiq.configs import AllocateConfig, parse_size
from optiq.errors import ArtifactMismatch, BudgetInfeasible, UsageError
from optiq.numerics.size import bpw, file_overhead_bytes, format_size
from optiq.quant.knapsack import FloatArray, IntArray, hull_path, solve, total

DEFAULT_BPW = 5.0
ROUTER_BITS = 8
SPEED_KL_RISE = 0.1
_SHADOWED = QuantOption("affine", LATTICE.bits, LATTICE.group_size)
_FAST_CUDA_BITS = (4, 8, 16)
_SLOW_CUDA_FACTOR = 1.3
_KL_ROUNDING = 1e-12  # sums of KL in another order differ by less
_LEAST_BOUND = 1e-12
_CURVE_STEP_BPW = 0.25
_CURVE_COARSE_FROM_BPW = 9.0


@dataclasses.dataclass(frozen=True)
class ParetoPoint:
    """The best plan of its size.

    Attributes:
        bpw: stored bits per weight.
        model_bytes: predicted bytes of `model*.safetensors`.
        predicted_kl: predicted KL in nats per token.
    """

    bpw: float
    model_bytes: int
    predicted_kl: float


def allocate(table: SensitivityTable, config: AllocateConfig) -> BitPlan:
    """Choose an option for every module.

    Objectives: `size` takes the least predicted KL. `speed` minimizes KL + mu x time, where time is
    the sum over modules of stored bytes x share read per token x kernel factor (on CUDA 1.3 for
    widths other than 4, 8 and 16 bits, else 1) and mu = 0.1 KL* / time* of the best plan for size,
    so that the predicted KL rises by at most 10% over KL*. With a KL target, `size` takes the
    fewest bytes and `speed` the least time that meet it.

    Args:
        table: scores of every option.
        config: target (default 5.0 bpw), pins, floors and objective.

    Returns:
        The plan, never above the target. Its gap is that of the objective.

    Raises:
        BudgetInfeasible: if the target is below the smallest plan that pins and floors allow.
        UsageError: if pins match nothing, contradict each other or a floor, or name an option that
            a module does not have; if the target is above the source's own size, or a KL target is
            given for scores that are no KL.
        ArtifactMismatch: if the table is empty or holds scores that are no numbers.

    Cost: below 1 s for 328 modules of 18 options.
    """
    problem = _Problem(table, config)
    if config.target_kl is not None:
        return problem.for_kl(config.target_kl)
    if config.target_size is not None:
        return problem.for_size(config.target_size)
    return problem.for_bpw(DEFAULT_BPW if config.target_bpw is None else config.target_bpw)


def pareto(table: SensitivityTable, config: AllocateConfig) -> list[ParetoPoint]:
    """The curve of size against predicted KL under the config's pins and floors.

    Returns:
        Points from the smallest plan to the best one, about 0.25 bpw apart up to 9 bpw and 1 bpw
        above. Each is a vertex of the knapsack's convex hull, hence optimal for its own size. The
        config's target and objective play no part.

    Raises:
        UsageError: as `allocate`, for pins.
        ArtifactMismatch: as `allocate`.
    """
    problem = _Problem(table, config)
    path = hull_path(problem.kls, problem.sizes)
    sizes = total(problem.sizes, path.start) + np.concatenate([[0.0], np.cumsum(path.costs)])
    reached = sizes * 8 / table.num_params
    fine = np.arange(math.floor(reached[0]), _CURVE_COARSE_FROM_BPW, _CURVE_STEP_BPW)
    coarse = np.arange(_CURVE_COARSE_FROM_BPW, math.ceil(reached[-1]) + 1)
    steps = np.searchsorted(reached, np.concatenate([fine, coarse]), side="right") - 1
    wanted = sorted({0, *steps[steps >= 0].tolist(), len(path.costs)})
    points = []
    for step in wanted:
        choice = path.choice(step)
        size_bytes = round(sizes[step])
        points.append(
            ParetoPoint(
                bpw(size_bytes, table.num_params),
                size_bytes + problem.other_bytes,
                total(problem.kls, choice),
            )
        )
    return points


def floors(table: SensitivityTable, config: AllocateConfig) -> dict[str, str]:
    """Modules that a floor keeps from the smallest options, with the reason; for the report."""
    if config.free_routers:
        return {}
    reason = f"router: at least {ROUTER_BITS} bits (lift with --free-routers)"
    return {m.module.path: reason for m in table.modules if m.module.role == "router"}


class _Problem:
    """A table under pins and floors, as columns of the knapsack."""

    def __init__(self, table: SensitivityTable, config: AllocateConfig) -> None:
        if not table.modules:
            raise ArtifactMismatch(f"the table of {table.source.name} has no modules")
        self.table, self.config = table, config
        pins = _pins(table, config)
        raised = floors(table, config)
        self.scores = [
            _allowed(m, config, pins.get(m.module.path), ROUTER_BITS * (m.module.path in raised))
            for m in table.modules
        ]
        self.sizes = [_column([float(s.size_bytes) for s in row]) for row in self.scores]
        self.kls = [_column([s.kl_nats_per_token for s in row]) for row in self.scores]
        self.other_bytes = table.source.fixed_bytes + file_overhead_bytes(table)
        self.least_bytes = int(sum(column.min() for column in self.sizes))
        self.source_bytes = sum(
            KEEP.size_bytes(m.module.shape, table.source.itemsize) for m in table.modules
        )

    def for_bpw(self, target: float) -> BitPlan:
        """The best plan of at most `target` stored bits per weight."""
        num_params = self.table.num_params
        own = bpw(self.source_bytes, num_params)
        if target > own:
            raise UsageError(
                f"--target-bpw {target:g} is above the source's own {own:.4g} stored bits per "
                f"weight; give less"
            )
        budget = int(target * num_params / 8)
        budget += bpw(budget + 1, num_params) <= target  # the product may round down
        return self._within(budget, f"{target:g} bpw")

    def for_size(self, target: str) -> BitPlan:
        """The best plan whose files take at most `target`."""
        target_bytes = parse_size(target)
        own = self.source_bytes + self.other_bytes
        if target_bytes > own:
            raise UsageError(
                f"--target-size {target} is above the source's own {format_size(own)} ({own} "
                f"bytes); give less"
            )
        return self._within(target_bytes - self.other_bytes, target)

    def for_kl(self, target: float) -> BitPlan:
        """The smallest (or fastest) plan of at most `target` predicted nats per token."""
        if self.table.method == "static":
            raise UsageError(
                "--target-kl needs scores in nats per token, and this table was made without data "
                "(--method static); measure with --method fisher or give --target-bpw"
            )
        least = float(sum(column.min() for column in self.kls))
        if least > target:
            raise UsageError(
                f"--target-kl {target:g} cannot be met: with the pins given the least predicted "
                f"KL is {least:.4g} nats per token; raise the target or lift a pin"
            )
        columns = self._times() if self.config.objective == "speed" else self.sizes
        solution = solve(columns, self.kls, max(least, target * (1 - _KL_ROUNDING)))
        return self._plan(solution.choice, f"KL {target:g}", solution.value, solution.bound)

    def _within(self, budget: int, target: str) -> BitPlan:
        """The best plan of at most `budget` stored bytes."""
        if budget < self.least_bytes:
            self._raise_infeasible(target)
        best = solve(self.kls, self.sizes, budget)
        if self.config.objective == "size":
            return self._plan(best.choice, target, best.value, best.bound)
        times = self._times()
        longest = total(times, best.choice)
        mu = SPEED_KL_RISE * best.value / longest if longest else 0.0
        weighed = [kl + mu * time for kl, time in zip(self.kls, times, strict=True)]
        fast = solve(weighed, self.sizes, budget)
        before = total(weighed, best.choice)
        choice, value = (fast.choice, fast.value)
        if before <= value:
            choice, value = best.choice, before
        return self._plan(choice, target, value, fast.bound)

    def _times(self) -> list[FloatArray]:
        """Bytes read for one token x kernel factor, of every option."""
        device = self.table.provenance.device.lower()
        cuda = "cuda" in device or "nvidia" in device
        return [
            _column(
                [
                    score.size_bytes * scores.module.active * _kernel_factor(score.option, cuda)
                    for score in row
                ]
            )
            for row, scores in zip(self.scores, self.table.modules, strict=True)
        ]

    def _plan(self, choice: IntArray, target: str, value: float, bound: float) -> BitPlan:
        entries = tuple(
            _entry(scores.module, row[item])
            for scores, row, item in zip(self.table.modules, self.scores, choice, strict=True)
        )
        size_bytes = sum(entry.size_bytes for entry in entries)
        suffix = ", for speed" if self.config.objective == "speed" else ""
        return BitPlan(
            source=self.table.source,
            entries=entries,
            target=target + suffix,
            rounding=self.table.rounding,
            bpw=bpw(size_bytes, self.table.num_params),
            size_bytes=size_bytes,
            model_bytes=size_bytes + self.other_bytes,
            predicted_kl=sum(entry.kl_nats_per_token for entry in entries),
            gap=max(value - bound, 0.0) / max(bound, _LEAST_BOUND),
        )

    def _raise_infeasible(self, target: str) -> None:
        """Say what the smallest plan takes and why it takes that."""
        least = bpw(self.least_bytes, self.table.num_params)
        least_model = self.least_bytes + self.other_bytes
        rounded = math.ceil(least * 1e4) / 1e4
        raise BudgetInfeasible(
            f"no plan fits {target}: the smallest{self._because()} takes {rounded:.4f} bpw, "
            f"{format_size(least_model)} ({least_model} bytes) of model*.safetensors; raise the "
            f"target or lift what restricts it",
            min_bpw=least,
            min_size_bytes=least_model,
        )

    def _because(self) -> str:
        """What narrows the menu, for messages: ` with --min-bits 4 and ...`, or nothing."""
        reasons = [f"--pin '{pin}'" for pin in self.config.pin]
        if self.config.min_bits > 2:
            reasons.append(f"--min-bits {self.config.min_bits}")
        routers = len(floors(self.table, self.config))
        if routers:
            reasons.append(f"{routers} routers at {ROUTER_BITS} bits or more (--free-routers)")
        return f" with {', '.join(reasons)}" if reasons else ""


def _column(numbers: list[float]) -> FloatArray:
    return np.array(numbers, np.float64)


def _kernel_factor(option: QuantOption, cuda: bool) -> float:
    return _SLOW_CUDA_FACTOR if cuda and option.bits not in _FAST_CUDA_BITS else 1.0


def _entry(module: ModuleInfo, score: OptionScore) -> PlanEntry:
    return PlanEntry(
        module.path,
        module.role,
        module.shape,
        score.option,
        score.size_bytes,
        score.kl_nats_per_token,
    )


@dataclasses.dataclass(frozen=True)
class _Pin:
    """A pin as the user wrote it, and the option it asks for."""

    text: str
    option: QuantOption


def _pins(table: SensitivityTable, config: AllocateConfig) -> dict[str, _Pin]:
    """The pin of every module that has one, by path."""
    paths = [scores.module.path for scores in table.modules]
    found: dict[str, _Pin] = {}
    for text in config.pin:
        pattern, _, choice = text.partition("=")
        pin = _Pin(text, QuantOption.parse(choice))
        matched = [path for path in paths if fnmatchcase(path, pattern)]
        if not matched:
            raise UsageError(_no_match(text, pattern, paths))
        for path in matched:
            earlier = found.setdefault(path, pin)
            if earlier.option != pin.option:
                raise UsageError(
                    f"--pin '{earlier.text}' and --pin '{text}' both cover {path} and differ; "
                    f"narrow one of them"
                )
    return found


def _no_match(text: str, pattern: str, paths: list[str]) -> str:
    """Message for a pattern without a module, with patterns that look alike and do match."""
    kinds = dict.fromkeys(f"*.{path.rpartition('.')[2]}" for path in paths)
    near = difflib.get_close_matches(pattern, [*kinds, *paths], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"a path is {paths[len(paths) // 2]}"
    return f"--pin '{text}' matches none of the {len(paths)} modules; {hint}"


def _allowed(
    scores: ModuleScores, config: AllocateConfig, pin: _Pin | None, floor: int
) -> list[OptionScore]:
    """The options of a module that its pin and floors leave, negative KL raised to 0."""
    path = scores.module.path
    options = []
    for score in scores.scores:
        kl = 0.0 if score.option == KEEP else score.kl_nats_per_token
        if not math.isfinite(kl):
            raise ArtifactMismatch(
                f"the score of {path} at {score.option.key} is {kl}; measure the source again"
            )
        options.append(dataclasses.replace(score, kl_nats_per_token=max(kl, 0.0)))
    if pin is None:
        lowest = max(config.min_bits, floor)
        shadowed = _SHADOWED if scores.lattice.exact else None  # as many bytes, never better
        return [s for s in options if s.option.bits >= lowest and s.option != shadowed]
    pinned = [score for score in options if score.option == pin.option]
    if not pinned:
        keys = ", ".join(score.option.key for score in options)
        raise UsageError(
            f"--pin '{pin.text}': {path} has no option {pin.option.key}; it has {keys}"
        )
    if pin.option.bits < config.min_bits:
        raise UsageError(
            f"--pin '{pin.text}' puts {path} below --min-bits {config.min_bits}; change one of them"
        )
    if pin.option.bits < floor:
        raise UsageError(
            f"--pin '{pin.text}' puts the router {path} below {floor} bits; "
            f"narrow the pattern or give --free-routers"
        )
    return pinned
