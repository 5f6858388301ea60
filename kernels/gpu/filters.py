"""min_p, top_k and top_p without a sort: the exact threshold of each row, found by narrowing.

A token is kept when its value is above the row's threshold, or equals it and the id is at most the row's
cut. Both filters ask for the largest value t whose tokens at or above it number k, or weigh p of the whole:

    ── low ────┬────┬────┬────┬────┬────┬────┬──── high ──▶     sums at or above each pivot, one pass
                     ▲ reached │ not reached                    ⇒ the next low and high

Pivots are spread evenly over values first and over the floats' order-preserving integers after that, so
about ten passes end at one float whatever the row holds. As soon as few values are left between low and high
they are copied together, and the later passes read those alone. One program does a row, in a fixed order.

Of a small top_k those few are known at once: the pass that finds the largest value leaves the largest of each of
1,024 lanes, and the k-th largest of these is reached by k tokens at least, and seldom by many more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenmill.kernels.gpu.jit import check_cuda, jit, tl

GREEDY_BELOW = 1e-5
CANDIDATES = 2048
"""Values between low and high that are few enough to be copied together."""

_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)
_CANDIDATES = tl.constexpr(CANDIDATES)
_PIVOTS = tl.constexpr(8)
_BLOCK = tl.constexpr(1024)
_EVEN_PASSES = tl.constexpr(3)
_HALVINGS = tl.constexpr(16)


@jit
def _flip(bits: tl.tensor) -> tl.tensor:
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@jit
def to_key(x: tl.tensor) -> tl.tensor:
    """int32 that orders as float32 x does."""
    return _flip(x.to(tl.int32, bitcast=True))


@jit
def from_key(key: tl.tensor) -> tl.tensor:
    """The float32 of a key."""
    return _flip(key).to(tl.float32, bitcast=True)


@jit
def load_scaled(row_ptr: tl.tensor, tokens: tl.tensor, V: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """logits / temperature as the reference rounds it; NaN and what is past the row is -inf, -0 is 0."""
    x = tl.load(row_ptr + tokens, mask=tokens < V, other=float("-inf")).to(tl.float32)
    x = tl.div_rn(x, temperature) + 0.0
    return tl.where(x == x, x, float("-inf"))


@jit
def _pick(values: tl.tensor, at: tl.tensor) -> tl.tensor:
    """values[at] of a short vector."""
    zero = tl.zeros(values.shape, values.dtype)
    return tl.sum(tl.where(tl.arange(0, _PIVOTS) == at, values, zero), axis=0)


@jit
def _pivot_keys(low: tl.tensor, high: tl.tensor, even: tl.tensor) -> tl.tensor:
    """Keys from `low` (the first) up to below `high`, rising; int32 keys as int64."""
    step = tl.arange(0, _PIVOTS)
    keys = low + (high - low) * step // _PIVOTS
    bottom, span = from_key(low.to(tl.int32)), from_key(high.to(tl.int32)) - from_key(low.to(tl.int32))
    if even & (span < 1e30):
        spread = to_key(bottom + span * (step.to(tl.float32) / _PIVOTS)).to(tl.int64)
        keys = tl.minimum(tl.maximum(spread, low), high - 1)
    return tl.where(step == 0, low, keys)


@jit
def _tally(
    ptr: tl.tensor,
    n: tl.tensor,
    temperature: tl.tensor,
    best: tl.tensor,
    pivots: tl.tensor,
    high: tl.tensor,
) -> tl.tensor:
    """(number, weight) [pivots] of the values from each pivot up to below `high`; x weighs e^(x - best)."""
    counts = tl.zeros((_PIVOTS, _BLOCK), tl.int32)
    weights = tl.zeros((_PIVOTS, _BLOCK), tl.float32)
    for start in range(0, n, _BLOCK):
        x = load_scaled(ptr, start + tl.arange(0, _BLOCK), n, temperature)
        weight = tl.exp(x - best)
        above = (x < high)[None, :] & (x[None, :] >= pivots[:, None])
        counts += above.to(tl.int32)
        weights += tl.where(above, weight[None, :], 0.0)
    return tl.sum(counts, axis=1), tl.sum(weights, axis=1)


@jit
def _gather_between(
    row_ptr: tl.tensor,
    V: tl.tensor,
    temperature: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    out_ptr: tl.tensor,
) -> tl.tensor:
    """Copy the row's scaled values in [low, high) together, by rising id, as far as there is room for them.

    Returns their number.
    """
    found = V * 0
    for start in range(0, V, _BLOCK):
        x = load_scaled(row_ptr, start + tl.arange(0, _BLOCK), V, temperature)
        inside = (x >= low) & (x < high)
        place = found + tl.cumsum(inside.to(tl.int32), axis=0) - 1
        tl.store(out_ptr + place, x, mask=inside & (place < _CANDIDATES))
        found += tl.sum(inside.to(tl.int32), axis=0)
    tl.debug_barrier()
    return found


@jit
def _narrow(
    ptr: tl.tensor,
    n: tl.tensor,
    temperature: tl.tensor,
    best: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    base_count: tl.tensor,
    base_weight: tl.tensor,
    target: tl.tensor,
    limit: tl.tensor,
    even: tl.tensor,
    BY_WEIGHT: tl.constexpr,
) -> tl.tensor:
    """One pass: the new (low, high, base count, base weight, target, values between).

    The bases are the sums at or above `high`. A negative target isn't known yet: it is the share `limit` of
    the weight at or above `low`, or the count `limit` as far as there are so many.
    """
    pivots = _pivot_keys(low, high, even)
    counts, weights = _tally(
        ptr, n, temperature, best, from_key(pivots.to(tl.int32)), from_key(high.to(tl.int32))
    )
    if BY_WEIGHT:
        sums = base_weight + weights
        target = tl.where(target < 0, limit * _pick(sums, 0), target)
    else:
        sums = (base_count + counts).to(tl.float32)
        target = tl.where(target < 0, tl.minimum(limit, _pick(sums, 0)), target)
    last = tl.sum(((sums >= target) & (tl.arange(0, _PIVOTS) > 0)).to(tl.int32), axis=0)
    if last < _PIVOTS - 1:
        high = _pick(pivots, last + 1)
        base_count += _pick(counts, last + 1)
        base_weight += _pick(weights, last + 1)
        between = _pick(counts, last) - _pick(counts, last + 1)
    else:
        between = _pick(counts, last)
    return _pick(pivots, last), high, base_count, base_weight, target, between


@jit
def _search(
    row_ptr: tl.tensor,
    scratch_ptr: tl.tensor,
    V: tl.tensor,
    temperature: tl.tensor,
    best: tl.tensor,
    low: tl.tensor,
    between: tl.tensor,
    target: tl.tensor,
    limit: tl.tensor,
    n: tl.tensor,
    BY_WEIGHT: tl.constexpr,
) -> tl.tensor:
    """The largest key whose tokens at or above it reach the target.

    Returns (key, tokens above it, their weight, tokens at it, target, n). `low` is a key that reaches it and
    `between` says how many tokens are at or above `low`, about: too low a guess costs a pass. The scratch holds
    the values from `low` on if `n`, their number, is at most CANDIDATES: before it, and from the key on after it.
    """
    high = to_key(best).to(tl.int64) + 1
    passes = tl.program_id(0) * 0
    base_count, base_weight = passes, best * 0.0
    left = n
    while (n > _CANDIDATES) & ((high - low > 1) | (passes == 0)):
        while (between > _CANDIDATES) & ((high - low > 1) | (passes == 0)):
            low, high, base_count, base_weight, target, between = _narrow(
                row_ptr, V, temperature, best, low, high, base_count, base_weight, target, limit,
                passes < _EVEN_PASSES, BY_WEIGHT,
            )  # fmt: skip
            passes += 1
        if (high - low > 1) | (passes == 0):
            bottom, top = from_key(low.to(tl.int32)), from_key(high.to(tl.int32))
            n = _gather_between(row_ptr, V, temperature, bottom, top, scratch_ptr)
            between = n
            left = tl.where(passes == 0, n, _CANDIDATES + 1)
    while (high - low > 1) | (passes == 0):
        low, high, base_count, base_weight, target, between = _narrow(
            scratch_ptr, n, 1.0, best, low, high, base_count, base_weight, target, limit,
            passes < _EVEN_PASSES, BY_WEIGHT,
        )  # fmt: skip
        passes += 1
    tl.debug_barrier()
    return low, base_count, base_weight, between, target, left


@jit
def _extremes(row_ptr: tl.tensor, V: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """(the largest of each lane [_BLOCK], smallest above -inf) of a row's scaled values."""
    largest = tl.full((_BLOCK,), float("-inf"), tl.float32)
    smallest = tl.full((_BLOCK,), float("inf"), tl.float32)
    for start in range(0, V, _BLOCK):
        x = load_scaled(row_ptr, start + tl.arange(0, _BLOCK), V, temperature)
        largest = tl.maximum(largest, x)
        smallest = tl.minimum(smallest, tl.where(x > float("-inf"), x, float("inf")))
    return largest, tl.min(smallest, axis=0)


@jit
def _reached_by(values: tl.tensor, n: tl.tensor, low: tl.tensor, best: tl.tensor) -> tl.tensor:
    """A key from `low` on that at least n of `values` reach, and hardly more; `low` if fewer do."""
    keys = to_key(values).to(tl.int64)
    high = to_key(best).to(tl.int64) + 1
    for _ in range(_HALVINGS):
        middle = low + (high - low) // 2
        reached = tl.sum((keys >= middle).to(tl.int32), axis=0) >= n
        low, high = tl.where(reached, middle, low), tl.where(reached, high, middle)
    return low


@jit
def _nth_equal(
    row_ptr: tl.tensor, V: tl.tensor, temperature: tl.tensor, value: tl.tensor, n: tl.tensor
) -> tl.tensor:
    """The id of the n-th token (from 1, by rising id) whose scaled value is `value`."""
    found, nth = n * 0, n * 0
    for start in range(0, V, _BLOCK):
        tokens = start + tl.arange(0, _BLOCK)
        equal = (load_scaled(row_ptr, tokens, V, temperature) == value).to(tl.int32)
        rank = found + tl.cumsum(equal, axis=0)
        nth = tl.maximum(nth, tl.max(tl.where((equal > 0) & (rank == n), tokens, 0), axis=0))
        found += tl.sum(equal, axis=0)
    return nth


@jit
def _threshold_of(
    row_ptr: tl.tensor,
    scratch_ptr: tl.tensor,
    V: tl.tensor,
    temperature: tl.tensor,
    best: tl.tensor,
    lanes: tl.tensor,
    smallest: tl.tensor,
    min_p: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
) -> tl.tensor:
    """(threshold, cut) of a row with a finite `best`; `lanes` [_BLOCK] are values of different tokens."""
    if min_p > 0:
        smallest = tl.maximum(smallest, best + tl.log(min_p))
    key, target = to_key(smallest).to(tl.int64), best * 0.0 - 1.0
    keep, ties, bound = V + tl.program_id(0) * 0, tl.program_id(0) * 0, V + tl.program_id(0) * 0
    n = V * 0 + _CANDIDATES + 1
    if (top_k > 0) & (top_k < V):
        if top_k <= _BLOCK:
            key, bound = _reached_by(lanes, top_k, key, best), top_k
        key, above, weight, ties, reached, n = _search(
            row_ptr, scratch_ptr, V, temperature, best, key, bound, target, top_k.to(tl.float32), n, False
        )
        keep = tl.minimum(ties, reached.to(tl.int32) - above)
        bound = above + ties
        share = tl.exp(from_key(key.to(tl.int32)) - best)
        target = top_p * (weight + keep.to(tl.float32) * share)
    if top_p < 1:
        kept_key = key
        key, above, weight, ties, target, n = _search(
            row_ptr, scratch_ptr, V, temperature, best, key, bound, target, top_p, n, True
        )
        share = tl.exp(from_key(key.to(tl.int32)) - best)
        most = tl.where(key == kept_key, tl.minimum(keep, ties), ties)
        missing = tl.ceil((target - weight) / tl.where(share > 0, share, 1.0))
        missing = tl.where(share > 0, tl.minimum(missing, most.to(tl.float32)), most.to(tl.float32))
        keep = tl.maximum(missing.to(tl.int32), 1)
    threshold = from_key(key.to(tl.int32))
    cut = V + tl.program_id(0) * 0
    if keep < ties:
        cut = _nth_equal(row_ptr, V, temperature, threshold, keep)
    return threshold, cut


@jit
def _threshold_kernel(
    logits_ptr: tl.tensor,
    stride: tl.tensor,
    V: tl.tensor,
    temperature_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    scratch_ptr: tl.tensor,
    thresholds_ptr: tl.tensor,
    cuts_ptr: tl.tensor,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    temperature = tl.load(temperature_ptr + row)
    min_p, top_p = tl.load(min_p_ptr + row), tl.load(top_p_ptr + row)
    top_k = tl.minimum(tl.load(top_k_ptr + row), V).to(tl.int32)
    threshold = temperature * 0.0 + float("-inf")
    cut = V + tl.program_id(0) * 0
    if (temperature >= _GREEDY_BELOW) & ((min_p > 0) | (top_k > 0) | (top_p < 1)):
        lanes, smallest = _extremes(row_ptr, V, temperature)
        best = tl.max(lanes, axis=0)
        if (best > float("-inf")) & (best < float("inf")):
            threshold, cut = _threshold_of(
                row_ptr,
                scratch_ptr + row * _CANDIDATES,
                V,
                temperature,
                best,
                lanes,
                smallest,
                min_p,
                top_k,
                top_p,
            )
    tl.store(thresholds_ptr + row, threshold)
    tl.store(cuts_ptr + row, cut)


def filter_thresholds(
    logits: Tensor,
    temperature: Tensor,
    min_p: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    *,
    thresholds: Tensor | None = None,
    cuts: Tensor | None = None,
    scratch: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What each row of logits [N, V] keeps once divided by its temperature [N] float32.

    Token t stays when its scaled value x is above `thresholds[row]` (float32), or equal to it with
    t <= `cuts[row]` (int32). Rows that are greedy or use no filter get -inf. `scratch` is [N, CANDIDATES]
    float32; `min_p`, `top_p` are float32 [N], `top_k` int64 [N].
    """
    check_cuda(logits, temperature, min_p, top_k, top_p)
    rows, width = logits.shape
    if thresholds is None:
        thresholds = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if cuts is None:
        cuts = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if scratch is None:
        scratch = torch.empty(rows, CANDIDATES, dtype=torch.float32, device=logits.device)
    if rows:
        _threshold_kernel[(rows,)](
            logits, logits.stride(0), width, temperature, min_p, top_k, top_p, scratch, thresholds, cuts,
            num_warps=8, maxnreg=128,
        )  # fmt: skip
    return thresholds, cuts


@jit
def kept(x: tl.tensor, tokens: tl.tensor, threshold: tl.tensor, cut: tl.tensor) -> tl.tensor:
    """Whether each token's scaled value passes its row's filters."""
    return (x > threshold) | ((x == threshold) & (tokens <= cut))


@jit
def _keep_kernel(
    scaled_ptr: tl.tensor,
    stride: tl.tensor,
    V: tl.tensor,
    thresholds_ptr: tl.tensor,
    cuts_ptr: tl.tensor,
    out_ptr: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(scaled_ptr + row * stride + tokens, mask=tokens < V, other=0.0)
    passes = kept(x, tokens, tl.load(thresholds_ptr + row), tl.load(cuts_ptr + row))
    tl.store(out_ptr + row * V + tokens, tl.where(passes, x, float("-inf")), mask=tokens < V)


def filter_logits(scaled: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Logits [N, V] float32, already divided by the temperature, with excluded tokens at -inf."""
    thresholds, cuts = filter_thresholds(scaled, torch.ones_like(min_p), min_p, top_k, top_p)
    out = torch.empty(scaled.shape, dtype=scaled.dtype, device=scaled.device)
    if out.numel():
        grid = (scaled.shape[0], -(-scaled.shape[1] // 4096))
        _keep_kernel[grid](
            scaled, scaled.stride(0), scaled.shape[1], thresholds, cuts, out, BLOCK=4096, num_warps=8
        )
    return out
