"""Attention of new tokens over keys and values in pages: decode (one new token per row), verify, and short
continuations.

Lengths and page numbers stay on the device and nothing here waits for it, so that a call can be captured in a
CUDA graph: what is launched depends on shapes alone, and a graph serves every length up to the width of its
table. On CUDA it is the Triton kernel of `triton_attention`; whatever that does not take (`supported`) is
gathered from the pages and written out.

Not measured on a GPU so far: the kernel ran in Triton's interpreter only."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec
from subprocess import CalledProcessError

import torch
from torch import Tensor

from proxytune.engine.kernels.scores import ScoreRule
from proxytune.engine.kernels.trial import APART, farthest, trusted

PLAIN = ScoreRule()
MOST_NEW = 256
"""Most new tokens per row for the kernel."""
WIDEST = 256
"""Largest head size for the kernel."""
WIDE_WINDOW = {16: 4096, MOST_NEW: 128}
"""Window up to which a row outgrows it when the kernel is tried with so many new tokens: scores are written
out for that."""
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@cache
def _installed() -> bool:
    """Whether there is a Triton that can launch: it compiles its launcher when it is first asked for."""
    if find_spec("triton") is None:
        return False
    from triton.runtime import driver

    try:
        _ = driver.active.utils
    except (OSError, RuntimeError, CalledProcessError) as error:
        warnings.warn(f"no Triton kernels, which is slower: {error}", stacklevel=2)
        return False
    return True


def runs_triton(tensor: Tensor) -> bool:
    """Whether Triton kernels can take this tensor."""
    return tensor.is_cuda and _installed()


def supported(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether the kernel takes query [R, H, Q, Dk] with pools [pages, PAGE, Hkv, Dk] and [.., Dv].

    It does for 1 to 256 new tokens, heads in whole groups, head sizes up to 256, equal dtypes of 16 or 32
    bits, pages of a power of two, and rows of numbers that lie together; it looks at shapes only."""
    page, kv_heads = keys.shape[1:3]
    return (
        runs_triton(query)
        and query.dtype in KERNEL_DTYPES
        and query.dtype == keys.dtype == values.dtype
        and 1 <= query.shape[2] <= MOST_NEW
        and query.shape[1] % kv_heads == 0
        and max(query.shape[-1], values.shape[-1]) <= WIDEST
        and page & (page - 1) == 0
        and query.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
    )


def paged_attention(
    query: Tensor,  # [R, H, Q, Dk], rotated; R rows with Q new tokens each
    keys: Tensor,  # [pages, PAGE, Hkv, Dk], the new tokens' included
    values: Tensor,  # [pages, PAGE, Hkv, Dv]
    table: Tensor,  # [R, P] page numbers in order, padded with any valid page; int32 or int64
    lengths: Tensor,  # [R] tokens of each row, the new ones included; int32 or int64
    rule: ScoreRule = PLAIN,
    splits: int | None = None,
) -> Tensor:
    """Causal attention of the last Q tokens of every row -> [R, H, Q, Dv], a view of [R, Q, H, Dv].

    A row of length 0, which pads a batch, gives zeros. `splits` cuts every row's keys into that many parts
    that are added up; by default the shapes decide, so a result's last bits depend on the batch, unless it is
    given."""
    if not supported(query, keys, values) or not _right(query, keys, values, rule):
        return gathered(query, keys, values, table, lengths, rule)
    from proxytune.engine.kernels.triton_attention import launch

    return launch(query, keys, values, table, lengths, rule, splits)


def _right(query: Tensor, keys: Tensor, values: Tensor, rule: ScoreRule) -> bool:
    """Whether the kernel was found to be right for such heads, new tokens and scores."""
    sizes = query.shape[1:], *(pool.shape[1:] for pool in (keys, values))
    shape = sizes, query.dtype, rule.scaling, rule.window, rule.softcap, rule.sinks is not None
    dtype = query.dtype

    def apart() -> float:
        return _apart(query, keys, values, rule)

    return trusted("attention kernel", shape, query.device, apart, APART[dtype])


def _apart(query: Tensor, keys: Tensor, values: Tensor, rule: ScoreRule) -> float:
    """How far the kernel is from `gathered`, for rows that begin, go on, outgrow the window, or only pad."""
    from proxytune.engine.kernels.triton_attention import launch

    (heads, new, size), (page, *_) = query.shape[1:], keys.shape[1:]
    widest = next(most for tokens, most in WIDE_WINDOW.items() if new <= tokens)
    beyond = min(rule.window or 0, widest) + 2 * page + 3
    lengths = [new, new + page - 1, 0, new + beyond, new + 5 * page + 1]
    width = -(-max(lengths) // page)
    draw = torch.Generator(query.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=query.device).to(query.dtype)

    q = normal(len(lengths), heads, new, size)
    k, v = (normal(width * len(lengths), *pool.shape[1:]) for pool in (keys, values))
    table = torch.randperm(width * len(lengths), generator=draw, device=query.device).view(
        len(lengths), width
    )
    ends = torch.tensor(lengths, device=query.device)
    want = torch.cat(
        [
            gathered(q[row : row + 1], k, v, table[row : row + 1], ends[row : row + 1], rule)
            for row in range(len(lengths))
        ]
    )
    found = [launch(q, k, v, table, ends, rule, splits) for splits in (None, 1)]
    return max((farthest(got, want) for got in found), key=lambda far: (far != far, far))


def gathered(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    rule: ScoreRule = PLAIN,
) -> Tensor:
    """`paged_attention` written out, in any dtype and on any device: copies every page in the table."""
    kv_heads, new, sinks = keys.shape[2], query.shape[2], rule.sinks
    wide = torch.promote_types(query.dtype, torch.float32)
    k, v = (pool[table.long()].flatten(1, 2).transpose(1, 2).to(wide) for pool in (keys, values))
    grouped = query.reshape(query.shape[0], kv_heads, -1, *query.shape[2:]).to(wide)  # [R, Hkv, G, Q, Dk]
    scores = grouped @ k[:, :, None].transpose(-1, -2) * rule.scale(query.shape[-1])  # [R, Hkv, G, Q, L]
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    at = lengths[:, None] - new + torch.arange(new, device=query.device)  # [R, Q]
    behind = at[..., None] - torch.arange(k.shape[2], device=query.device)  # [R, Q, L]
    visible = behind >= 0
    if rule.window is not None:
        visible &= behind < rule.window
    hidden = ~visible[:, None, None]
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        column = sinks.to(wide).view(1, kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]].masked_fill(hidden, 0.0)  # NaN where nothing is visible
    # a weight of 0 does not hide a value that is no number: it spoils the queries that see it alone
    broken = ~v.isfinite().all(-1)  # [R, Hkv, L]
    spoilt = (broken[:, :, None, None] & ~hidden).any(-1, keepdim=True)  # [R, Hkv, 1, Q, 1]
    out: Tensor = weights @ v.masked_fill(broken[..., None], 0.0)[:, :, None]  # [R, Hkv, G, Q, Dv]
    out = out.masked_fill(spoilt, float("nan")).to(query.dtype)
    return out.flatten(1, 2).transpose(1, 2).contiguous().transpose(1, 2)


def token_slots(table: Tensor, lengths: Tensor, new: int, page: int, spare: int) -> Tensor:
    """Where the last `new` tokens of every row go in a pool seen as [pages * PAGE, H, D]: [R * new], int64.

    Made on the device from table [R, P] and lengths [R]. Rows of length 0 write to slot `spare`, which must
    belong to no row: page 0, with which tables are padded, may be somebody's. Writing is
    `pool.flatten(0, 1).index_copy_(0, slots, new_tokens)`, which a CUDA graph captures as it is."""
    at = lengths[:, None].long() - new + torch.arange(new, device=lengths.device)  # [R, new]
    there = at.clamp(min=0)
    slots = table.long().gather(1, there // page) * page + there % page
    return slots.masked_fill(at < 0, spare).flatten()
