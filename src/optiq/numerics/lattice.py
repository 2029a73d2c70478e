"""Grids that weights already lie on: QAT and GGUF blocks of 32 with 16 levels.

A block is on a grid when all its values are `d * q + m` with whole q in 0..15. For q4_0 and its
relatives m = -8 d. The search does not assume the rule that chose d: it tries the steps that the
block's own values allow, so it finds absmax/7, absmax/7.5, ext/-8 and min/max grids alike.
"""

from __future__ import annotations

from typing import NamedTuple, cast

from optiq.artifacts import LATTICE_GROUP_SIZE, LatticeReport
from optiq.backend import mx
from optiq.numerics.affine import Grid, decode, encode, grouped, minmax_grid, stored

BITS = 4
NEAR = 0.05
_LEVELS = 15
# Fits worse than this are not tried with stored values: rounding to bfloat16 moves a value by less.
_HOPELESS = 0.2
_PRIMES = (2, 3, 5, 7, 11, 13)
# Rows of an embedding that training never touched lie on no grid; the scores tell what they cost.
_MIN_SHARE = 0.9
# A sample that meets a few odd rows must not hide a grid: the share in the matrix decides.
_MIN_SAMPLE_SHARE = 0.75


class Lattice(NamedTuple):
    """Result of the search on one matrix.

    Attributes:
        grid: scale and bias of every block, (..., in / 32) float32 in the stored dtype.
        report: how well the weights lie on it.
    """

    grid: Grid
    report: LatticeReport


class _Found(NamedTuple):
    """Best grid so far for every block.

    Attributes:
        grid: scale and bias in the stored dtype.
        score: -1 where the rounded product equals the source, else the stored grid's residual.
        ideal: residual of the best grid with float32 scale and bias: is there a grid at all?
    """

    grid: Grid
    score: mx.array
    ideal: mx.array

    def on_grid(self) -> mx.array:
        """Blocks that a stored grid gives back, or that are near a grid."""
        return (self.score <= 0) | (self.ideal <= NEAR)


def _residual(blocks: mx.array, grid: Grid) -> tuple[mx.array, mx.array]:
    """Largest distance from the grid per block in units of its scale, and the decoded blocks."""
    back = decode(encode(blocks, grid, BITS), grid)
    error = mx.abs(back - blocks).max(axis=-1)
    step = mx.abs(grid.scales)
    relative = mx.where(step > 0, error / mx.where(step > 0, step, 1), 1e9)
    return mx.where(error == 0, 0.0, relative), back


def _try_stored(found: _Found, grid: Grid, blocks: mx.array, source: mx.Dtype) -> _Found:
    """Take a stored grid where it is better than what was found."""
    residual, back = _residual(blocks, grid)
    score = mx.where((back.astype(source) == blocks.astype(source)).all(axis=-1), -1.0, residual)
    take = score < found.score
    chosen = Grid(
        mx.where(take, grid.scales, found.grid.scales),
        mx.where(take, grid.biases, found.grid.biases),
    )
    return found._replace(grid=chosen, score=mx.where(take, score, found.score))


def _neighbours(values: mx.array, dtype: mx.Dtype) -> list[mx.array]:
    """Values in the stored dtype, and those one step below and above, as float32."""
    kind = mx.uint32 if dtype == mx.float32 else mx.uint16
    bits = values.astype(dtype).view(kind)
    return [(bits + mx.array(u, dtype=kind)).view(dtype).astype(mx.float32) for u in (0, 1)] + [
        (bits - mx.array(1, dtype=kind)).view(dtype).astype(mx.float32)
    ]


def _start(constant: mx.array, value: mx.array, dtype: mx.Dtype) -> _Found:
    """Constant blocks are on any grid; all others have found nothing yet."""
    bias = mx.where(constant, stored(value, dtype), 0.0)
    none = mx.where(constant, 0.0, 1e9)
    return _Found(Grid(mx.zeros_like(bias), bias), none, none)


def _symmetric(blocks: mx.array, dtype: mx.Dtype, source: mx.Dtype) -> _Found:
    """Best grid with bias -8 d: the value of largest magnitude is -k d, k in 8..1.

    For k < 8 the codes are symmetric, so that d of the other sign is the same grid.
    """
    at = mx.abs(blocks).argmax(axis=-1, keepdims=True)
    extreme = mx.take_along_axis(blocks, at, axis=-1)[..., 0]
    found = _start(extreme == 0, extreme, dtype)
    for k in range(8, 0, -1):
        scale = -extreme / k
        q = encode(blocks, Grid(scale, -8 * scale), BITS) - 8
        power = (q * q).sum(axis=-1)
        fitted = (q * blocks).sum(axis=-1) / mx.where(power > 0, power, 1)
        ideal, _ = _residual(blocks, Grid(fitted, -8 * fitted))
        found = found._replace(ideal=mx.minimum(found.ideal, ideal))
        if not (ideal <= _HOPELESS).any().item():
            continue
        for step in [stored(scale, dtype), *_neighbours(fitted, dtype)]:
            found = _try_stored(found, Grid(step, -8 * step), blocks, source)
        if (found.score <= 0).all().item():
            break
    return found


def _affine(blocks: mx.array, dtype: mx.Dtype, source: mx.Dtype) -> _Found:
    """Best grid with a free bias: low and high edge are k steps apart, k in 15..1."""
    low, high = blocks.min(axis=-1), blocks.max(axis=-1)
    found = _start(low == high, low, dtype)
    settled = found.score <= 0
    for k in range(_LEVELS, 0, -1):
        line = Grid((high - low) / k, low)
        for _ in range(2):
            line = _line(encode(blocks, line, BITS), blocks, line)
        ideal, _ = _residual(blocks, line)
        found = found._replace(ideal=mx.minimum(found.ideal, ideal))
        if not (ideal <= _HOPELESS).any().item():
            continue
        codes = encode(blocks, line, BITS)
        for step in _neighbours(line.scales, dtype):
            fitted = (blocks - codes * step[..., None]).mean(axis=-1)
            for grid in (Grid(step, low), Grid(step, fitted), Grid(-step, high)):
                grid = Grid(grid.scales, stored(grid.biases, dtype))
                found = _try_stored(found, grid, blocks, source)
        settled = settled | (found.score <= 0) | ((ideal <= NEAR) & ~_coarser(codes))
        if settled.all().item():
            break
    return found


def _coarser(codes: mx.array) -> mx.array:
    """Whether the codes of a block are whole multiples of more than 1, so that a larger step fits.

    The larger step may be one that the stored dtype holds exactly.
    """
    offset = codes - codes.min(axis=-1, keepdims=True)
    multiple = mx.zeros(codes.shape[:-1], dtype=mx.bool_)
    for prime in _PRIMES:
        multiple = multiple | (mx.remainder(offset, prime) == 0).all(axis=-1)
    return multiple


def _line(q: mx.array, w: mx.array, before: Grid) -> Grid:
    """Least-squares line w = scale q + bias per block."""
    mean_q, mean_w = q.mean(axis=-1), w.mean(axis=-1)
    dq, dw = q - mean_q[..., None], w - mean_w[..., None]
    den = (dq * dq).sum(axis=-1)
    slope = (dq * dw).sum(axis=-1) / mx.where(den > 0, den, 1)
    bias = mean_w - slope * mean_q
    return Grid(mx.where(den > 0, slope, before.scales), mx.where(den > 0, bias, before.biases))


def _search(blocks: mx.array, kind: str, dtype: mx.Dtype, source: mx.Dtype) -> _Found:
    find = _symmetric if kind == "q4_0" else _affine
    return find(blocks, dtype, source)


def find_lattice(w: mx.array, dtype: mx.Dtype, sample_rows: int = 32) -> Lattice | None:
    """The grid that a matrix lies on, exactly or nearly; None if there is none.

    Args:
        w: (..., in) weights in the source dtype.
        dtype: stored dtype of scales and biases.
        sample_rows: rows tried first; only a matrix whose sample is on a grid is searched whole.

    Returns:
        The grid with its report. `exact`: the float32 product, rounded to the source dtype, equals
        the source everywhere. Near: the values are within 0.05 d of a grid; what storing scale and
        bias in `dtype` adds is left to the scores. Up to a tenth of the blocks may be off the grid;
        they get the min/max grid.

    Cost: some 100 passes over the sample; over the matrix only when it is on a grid.
    """
    if w.shape[-1] % LATTICE_GROUP_SIZE:
        return None
    rows = w.reshape(-1, w.shape[-1])
    sample = rows[:: max(1, rows.shape[0] // sample_rows)]
    for kind in ("q4_0", "affine"):
        blocks = grouped(sample.astype(mx.float32), LATTICE_GROUP_SIZE)
        share = _search(blocks, kind, dtype, w.dtype).on_grid().mean()
        if _number(share) >= _MIN_SAMPLE_SHARE:
            lattice = _whole(rows, kind, dtype)
            if lattice.report.blocks >= _MIN_SHARE:
                shape = (*w.shape[:-1], w.shape[-1] // LATTICE_GROUP_SIZE)
                grid = Grid(lattice.grid.scales.reshape(shape), lattice.grid.biases.reshape(shape))
                return Lattice(grid, lattice.report)
    return None


def _number(value: mx.array) -> float:
    return cast(float, value.item())


def _whole(rows: mx.array, kind: str, dtype: mx.Dtype) -> Lattice:
    grids, largest, exact, on_grid, total = [], 0.0, True, 0.0, 0
    chunk = max(1, (1 << 20) // rows.shape[-1])
    for start in range(0, rows.shape[0], chunk):
        blocks = grouped(rows[start : start + chunk].astype(mx.float32), LATTICE_GROUP_SIZE)
        found = _search(blocks, kind, dtype, rows.dtype)
        near = found.on_grid()
        fallback = minmax_grid(blocks, BITS, dtype)
        grid = Grid(
            mx.where(near, found.grid.scales, fallback.scales),
            mx.where(near, found.grid.biases, fallback.biases),
        )
        back = decode(encode(blocks, grid, BITS), grid).astype(rows.dtype)
        same = (back == blocks.astype(rows.dtype)).all()
        residual = mx.where(near, found.ideal, 0.0).max()
        mx.eval(grid, same, residual)
        largest = max(largest, _number(residual))
        exact = exact and bool(same.item())
        on_grid += _number(near.sum())
        total += near.size
        grids.append(grid)
    report = LatticeReport(
        kind="q4_0" if kind == "q4_0" else "affine",
        exact=exact,
        blocks=on_grid / total,
        residual=round(largest, 6),
    )
    scales = mx.concatenate([grid.scales for grid in grids])
    return Lattice(Grid(scales, mx.concatenate([grid.biases for grid in grids])), report)
