"""Every kernel in plain torch: the oracle of the fast ones, and what runs where none of those does.

Shapes use these letters: T tokens of the step, R sequences in it, N rows of logits, V logits width, H query
heads, G KV heads, D head size of queries and keys, E head size of values, B KV blocks, S block size, P the
most blocks a sequence may have.

The paged KV cache of a layer is `k_cache [B, G, S, D]` and `v_cache [B, G, S, E]`. Token t of a sequence
lives in block `block_table[row, t // S]` at offset `t % S`; `slot = block * S + offset` names the place.
The step's tokens lie one sequence after the other; `query_start [R + 1]` holds the borders. A sequence's
queries are its last ones: query i of row r stands at position `seq_lens[r] - q_len[r] + i`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

GREEDY_BELOW = 1e-5


@dataclass(slots=True)
class Routing:
    """How the `top` experts of a token, and their weights, follow from its router logits [X].

    Scores are a softmax over all experts, or each logit's own sigmoid. Chosen are the best scores plus `bias` [X];
    where there are several `groups` of X / groups neighbours each, only among the experts of the `top_groups` best,
    a group being worth its two best together. Weights are the scores of the chosen without the bias, made to sum
    to one with `renormalize`, times `scale`, and each times its expert's own of `gains` [X].
    """

    top: int
    renormalize: bool = True
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    bias: Tensor | None = None
    groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    gains: Tensor | None = None


def store_kv(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write this step's keys [T, G, D] and values [T, G, E] at `slots` [T] int64 of a layer's cache."""
    size = k_cache.shape[2]
    blocks, offsets = slots // size, slots % size
    k_cache[blocks, :, offsets] = key.to(k_cache.dtype)
    v_cache[blocks, :, offsets] = value.to(v_cache.dtype)


def paged_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of `query` [T, H, D] over each sequence's cache; returns [T, H, E].

    `block_table` [R, P] int32, `seq_lens` [R] int32 (tokens in the cache, this step's included), `query_start`
    [R + 1] int32. `window` w > 0 lets position p see keys p - w + 1 .. p. `softcap` c > 0 replaces a score s by
    c * tanh(s / c). `sinks` [H] are logits of an extra key whose value is zero (gpt-oss). Scores and sums are
    float32; the cache must already hold this step's keys.
    """
    heads, kv_heads, size = query.shape[1], k_cache.shape[1], k_cache.shape[2]
    out = query.new_empty(query.shape[0], heads, v_cache.shape[3])
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    for row, length in enumerate(lengths):
        first, last = starts[row], starts[row + 1]
        if first == last:
            continue
        blocks = block_table[row, : -(-length // size)].long()
        keys = k_cache[blocks].transpose(0, 1).reshape(kv_heads, -1, k_cache.shape[3])[:, :length]
        values = v_cache[blocks].transpose(0, 1).reshape(kv_heads, -1, v_cache.shape[3])[:, :length]
        q = query[first:last].transpose(0, 1).float().reshape(kv_heads, heads // kv_heads, last - first, -1)
        scores = torch.einsum("ghqd,gkd->ghqk", q * scale, keys.float())
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(length - (last - first), length, device=query.device)[:, None]
        seen = torch.arange(length, device=query.device)[None, :]
        hidden = seen > at
        if window > 0:
            hidden |= seen <= at - window
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            sink = sinks.float().reshape(kv_heads, -1, 1, 1).expand(-1, -1, last - first, 1)
            weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
        else:
            weights = torch.softmax(scores, dim=-1)
        mixed = torch.einsum("ghqk,gke->qghe", weights, values.float())
        out[first:last] = mixed.reshape(last - first, heads, -1).to(out.dtype)
    return out


def copy_blocks(k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy whole blocks inside one layer's cache; `source` and `target` are [n] int64 and disjoint."""
    k_cache[target] = k_cache[source]
    v_cache[target] = v_cache[source]


def _mix32(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers held in int64 (the two-multiply mixer of Wellons' hash-prospector)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of a 64-bit pattern held in int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def noise_keys(seeds: Tensor, positions: Tensor) -> Tensor:
    """64-bit keys [N] int64 of each row's noise: splitmix64 of `seeds` [N] int64 and `positions` [N] int64."""
    z = seeds + (positions + 1) * -7046029254386353131  # 0x9E3779B97F4A7C15, wrapping
    z = (z ^ _shift_right(z, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ _shift_right(z, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return z ^ _shift_right(z, 31)


def gumbel_noise(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, float32 [N, tokens]: a pure function of (seed, position, token id).

    `seeds`, `positions` [N] int64; `tokens` [n] int64. A 32-bit hash h gives v = (h + 1/2) / 2^32 and the
    exponential E = -log(1 - v); the Gumbel is -log E. For h in the upper half 1 - v is formed from the
    complement of h, so that neither tail saturates in float32.
    """
    keys = noise_keys(seeds, positions)
    low, high = (keys & 0xFFFFFFFF)[:, None], _shift_right(keys, 32)[:, None]
    hashed = _mix32((_mix32(tokens[None, :] ^ low) + high) & 0xFFFFFFFF)
    upper = hashed >= 1 << 31
    part = torch.where(upper, 0xFFFFFFFF - hashed, hashed).float().add_(0.5).mul_(2.0**-32)
    exponential = torch.where(upper, -torch.log(part), -torch.log1p(-part))
    return -torch.log(exponential)


def apply_logit_bias(logits: Tensor, rows: Tensor, tokens: Tensor, values: Tensor) -> None:
    """Add `values` [n] float32 to logits [N, V] at (`rows`, `tokens`) int64 pairs, which are distinct."""
    logits[rows, tokens] += values


def apply_penalties(
    logits: Tensor,
    slots: Tensor,
    output_counts: Tensor,
    prompt_seen: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> None:
    """Penalise repeated tokens in place: logits [N, V] float32.

    Row i uses line `slots[i]` (int64, -1: none) of `output_counts` [M, V] int32 (tokens generated so far) and
    `prompt_seen` [M, V] bool. `repetition` [N] is Hugging Face's (divide positive, multiply negative logits of
    all tokens seen in prompt or output); `presence` and `frequency` [N] are OpenAI's over the output alone.
    """
    rows = (slots >= 0).nonzero().flatten()
    if rows.numel() == 0:
        return
    lines = slots[rows]
    counts = output_counts[lines]
    picked = logits[rows]
    factor = repetition[rows, None].expand_as(picked)
    seen = (counts > 0) | prompt_seen[lines]
    picked = torch.where(seen, torch.where(picked > 0, picked / factor, picked * factor), picked)
    picked = picked - frequency[rows, None] * counts - presence[rows, None] * (counts > 0)
    logits[rows] = picked


def apply_bitmask(logits: Tensor, rows: Tensor, bitmask: Tensor) -> None:
    """Set logits[rows[i], t] to -inf where bit t % 32 of bitmask[i, t // 32] (int32) is 0; in place."""
    width = logits.shape[1]
    bits = torch.arange(32, device=logits.device, dtype=torch.int32)
    allowed = ((bitmask[:, :, None] >> bits) & 1).flatten(1)[:, :width].bool()
    logits[rows] = logits[rows].masked_fill(~allowed, float("-inf"))


def filter_logits(scaled: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Logits [N, V] float32, already divided by the temperature, with excluded tokens at -inf.

    In this order, each over what the last one left: `min_p` [N] keeps tokens at least that many times as
    likely as the likeliest; `top_k` [N] int64 (0: off) keeps exactly k; `top_p` [N] keeps the shortest prefix,
    by falling probability, whose sum reaches it. Equal values: lowest id first.
    """
    floor = scaled.amax(-1, keepdim=True) + torch.log(min_p)[:, None]
    scaled = scaled.masked_fill(scaled < floor, float("-inf"))
    ordered, order = torch.sort(scaled, dim=-1, descending=True, stable=True)
    ranks = torch.arange(scaled.shape[1], device=scaled.device)[None, :]
    limit = torch.where(top_k > 0, top_k, scaled.shape[1])[:, None]
    ordered = ordered.masked_fill(ranks >= limit, float("-inf"))
    probabilities = torch.softmax(ordered, dim=-1)
    before = probabilities.cumsum(-1) - probabilities
    cut = (before >= top_p[:, None]) & (top_p < 1.0)[:, None]
    ordered = ordered.masked_fill(cut & (ranks > 0), float("-inf"))
    return torch.empty_like(scaled).scatter_(-1, order, ordered)


def sample(
    logits: Tensor,
    temperature: Tensor,
    min_p: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """Token ids [N] int64 drawn from logits [N, V] float32 by Gumbel-max; rows below GREEDY_BELOW take argmax.

    Argmax ties go to the lowest id. All settings are [N]: float32, but `top_k`, `seeds`, `positions` int64.
    """
    greedy = temperature < GREEDY_BELOW
    chosen = first_argmax(logits)
    drawn = (~greedy).nonzero().flatten()
    if drawn.numel() == 0:
        return chosen
    scaled = logits[drawn] / temperature[drawn, None]
    min_p, top_k, top_p = min_p[drawn], top_k[drawn], top_p[drawn]
    if bool(((min_p > 0) | (top_k > 0) | (top_p < 1)).any()):
        scaled = filter_logits(scaled, min_p, top_k, top_p)
    tokens = torch.arange(logits.shape[1], device=logits.device)
    chosen[drawn] = first_argmax(scaled + gumbel_noise(seeds[drawn], positions[drawn], tokens))
    return chosen


def first_argmax(values: Tensor) -> Tensor:
    """Index of the largest value of each row, the lowest among equals: [N, V] → [N] int64."""
    best = values.amax(-1, keepdim=True)
    ids = torch.arange(values.shape[1], device=values.device)
    return torch.where(values == best, ids, values.shape[1] - 1).amin(-1)


def token_logprobs(logits: Tensor, chosen: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-softmax of logits [N, V] at `chosen` [N] int64, and its `top` best.

    Returns (logprobs [N] float32, top ids [N, top] int64, top logprobs [N, top] float32), best first, equal
    values by rising id.
    """
    logits = logits.float()
    normalizer = torch.logsumexp(logits, dim=-1)
    picked = logits.gather(-1, chosen[:, None])[:, 0] - normalizer
    ordered, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    return picked, ids[:, :top], ordered[:, :top] - normalizer[:, None]


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """RMS norm over the last dimension in float32, times (offset + weight); result in x's dtype."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * (offset + weight.float())).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """residual + x, rounded to its dtype, and the RMS norm of that sum: (normed, sum)."""
    total = residual + x
    return rms_norm(total, weight, eps, offset), total


def norm_add(
    x: Tensor, weight: Tensor, eps: float, offset: float, residual: Tensor, scale: float = 1.0
) -> Tensor:
    """(residual + RMS norm of x) * scale for x, residual [T, N]; the norm is rounded to x's dtype, then the result.

    A `weight` [N / groups] shorter than rows norms each of their groups by itself.
    """
    normed = rms_norm(x.reshape(-1, weight.numel()), weight, eps, offset).view(x.shape)
    return ((residual.float() + normed.float()) * scale).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary embedding of the first 2 * W dimensions of x [T, heads, D]; cos, sin [T, W] float32.

    Pairs are (i, i + W), or (2i, 2i + 1) when `interleaved`. The rest of a head passes through.
    """
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    cos, sin = cos[:, None, :], sin[:, None, :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def activation_mul(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate) * up for gate_up [T, 2 * I] (gate first); `activation`: silu, gelu, gelu_tanh or swiglu_oai.

    swiglu_oai is gpt-oss's g * sigmoid(1.702 * g) * (u + 1), where g is at most 7 and u lies between -7 and 7.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    if activation == "swiglu_oai":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (gate * torch.sigmoid(1.702 * gate) * (up + 1.0)).to(gate_up.dtype)
    return (activate(gate, activation) * up).to(gate_up.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last dimension in float32; result in x's dtype."""
    wide = x.float()
    wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()
    return (wide if bias is None else wide + bias.float()).to(x.dtype)


def gate_add(x: Tensor, gate: Tensor, residual: Tensor | None = None) -> Tensor:
    """x [T, W] * sigmoid(gate [T, 1]), plus `residual` [T, W]."""
    out = x.float() * torch.sigmoid(gate.float())
    return (out if residual is None else out + residual.float()).to(x.dtype)


def activate(x: Tensor, activation: str) -> Tensor:
    """silu, gelu or gelu_tanh of x, computed in float32."""
    wide = x.float()
    if activation == "silu":
        return torch.nn.functional.silu(wide).to(x.dtype)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(wide, approximate=approximate).to(x.dtype)


def act_mul(x: Tensor, other: Tensor, start: int, activation: str) -> Tensor:
    """act(x) * columns `start` and after of `other`, for x [T, W]; silu, gelu or gelu_tanh."""
    columns = other[:, start : start + x.shape[1]]
    return (activate(x.float(), activation) * columns.float()).to(x.dtype)


def rope_store(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    heads: int,
    positions: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    norm_offset: float = 0.0,
    interleaved: bool = False,
    value_norm: bool = False,
    stores: bool = True,
) -> Tensor:
    """Norm, RoPE and KV store of qkv [T, H*D + G*D + G*E] in one pass; returns the queries [T, H, D].

    `cos`, `sin` are tables [context, W] float32 read at `positions` [T] int64, or rows [T, W] when that is None;
    without them nothing turns. `q_weight`, `k_weight` [D] ask for an RMS norm of each head before it, `value_norm`
    for one of each value head, without a weight. Unless a layer `stores`, its rows hold queries alone.
    """
    kv_heads, size, value_size = k_cache.shape[1] if stores else 0, k_cache.shape[3], v_cache.shape[3]
    query, key, value = torch.split(qkv, [heads * size, kv_heads * size, kv_heads * value_size], dim=-1)
    query, key = query.reshape(-1, heads, size), key.reshape(len(key), kv_heads, size)
    value = value.reshape(len(value), kv_heads, value_size)
    if q_weight is not None:
        query = rms_norm(query, q_weight, eps, norm_offset)
    if k_weight is not None:
        key = rms_norm(key, k_weight, eps, norm_offset)
    if cos is not None and sin is not None:
        if positions is not None:
            cos, sin = cos[positions], sin[positions]
        query, key = rope(query, cos, sin, interleaved), rope(key, cos, sin, interleaved)
    if value_norm:
        value = rms_norm(value, value.new_ones(value_size), eps)
    if stores:
        store_kv(key, value, k_cache, v_cache, slots)
    return query


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x [T, in] times weight [out, in] transposed, plus bias [out], plus residual [T, out]."""
    out: Tensor = torch.nn.functional.linear(x, weight, bias)
    return out if residual is None else residual + out


def route(logits: Tensor, routing: Routing, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The experts of each token from router logits [T, X]: (ids [T, top] int32, weights [T, top] float32).

    Best first, equal ones by rising id. A token whose `slots` [T] int64 entry is -1 is padding: its ids are -1,
    its weights zero.
    """
    logits = logits.float()
    scores = logits.sigmoid() if routing.scoring == "sigmoid" else logits.softmax(-1)
    # Without a bias the logits' own order, in which no two are equal that weren't.
    worth = logits if routing.bias is None and routing.groups == 1 else scores
    if routing.bias is not None:
        worth = worth + routing.bias.float()
    if routing.groups > 1:
        worth = worth.masked_fill(~_in_best_groups(worth, routing.groups, routing.top_groups), float("-inf"))
    ids = torch.sort(worth, dim=-1, descending=True, stable=True).indices[:, : routing.top]
    weights = scores.gather(-1, ids)
    if routing.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights * routing.scale
    if routing.gains is not None:
        weights = weights * routing.gains.float()[ids]
    if slots is not None:
        padding = (slots < 0)[:, None]
        ids, weights = ids.masked_fill(padding, -1), weights.masked_fill(padding, 0.0)
    return ids.int(), weights


def _in_best_groups(worth: Tensor, groups: int, top_groups: int) -> Tensor:
    """Which experts [T, X] are in a group whose two best are together among the `top_groups` most."""
    grouped = worth.view(len(worth), groups, -1)
    totals = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    chosen = torch.sort(totals, dim=-1, descending=True, stable=True).indices[:, :top_groups]
    kept = torch.zeros_like(totals, dtype=torch.bool).scatter_(-1, chosen, True)
    return kept[..., None].expand_as(grouped).flatten(1)


def mix_by_expert(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    expert: Callable[[int, Tensor], Tensor],
    residual: Tensor | None = None,
) -> Tensor:
    """sum over k of weights[t, k] * expert(ids[t, k], x[t]) for x [T, in]; `expert` takes all its rows at once.

    `ids` [T, k] int32 (-1: none), `weights` [T, k] float32. Summed in float32 by rising expert, plus `residual`.
    """
    out: Tensor | None = None if residual is None else residual.float()
    for number in torch.unique(ids).tolist():
        if number < 0:
            continue
        tokens, ranks = (ids == number).nonzero(as_tuple=True)
        part = expert(number, x[tokens]).float() * weights[tokens, ranks, None]
        out = part.new_zeros(x.shape[0], part.shape[1]) if out is None else out
        out = out.index_add(0, tokens, part)
    return torch.zeros_like(x) if out is None else out.to(x.dtype)


def mixture(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Gated experts: `gate_up` [X, 2 * I, in] with the gate first, `down` [X, out, I], biases [X, 2 * I] and [X, out].

    See `mix_by_expert`.
    """

    def expert(i: int, rows: Tensor) -> Tensor:
        hidden = linear(rows, gate_up[i], None if gate_up_bias is None else gate_up_bias[i])
        return linear(
            activation_mul(hidden, activation), down[i], None if down_bias is None else down_bias[i]
        )

    return mix_by_expert(x, ids, weights, expert, residual)
