"""Token ids from a caller, checked before a table is asked for them.

On a GPU an id beyond a table is not an error of the request but the end of the process's CUDA.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from librobot_vlm_ros.core import ErrorCode, RequestError

#: Stands in labels for what is not to be learnt.
IGNORED = -100


def token_rows(
    ids: Any, attention_mask: Any, vocabulary: int, also: Collection[int] = ()
) -> list[list[int]]:
    """Rows of ids, those left out that `attention_mask` has 0 for.

    `ids` are integers [B, L] from 0 to `vocabulary` - 1, or one of `also`. Raises RequestError
    BAD_PARAMETER.
    """
    try:
        table = torch.as_tensor(ids)
        mask = None if attention_mask is None else torch.as_tensor(attention_mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RequestError(
            ErrorCode.BAD_PARAMETER, f"token ids are no table of integers: {error}"
        ) from error
    whole = table.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8) or not len(table)
    if table.dim() != 2 or not whole:
        raise RequestError(
            ErrorCode.BAD_PARAMETER,
            f"token ids are {str(table.dtype).removeprefix('torch.')} {list(table.shape)}",
            "expected integers [B, L], one row a prompt",
        )
    if mask is not None and mask.shape != table.shape:
        raise RequestError(
            ErrorCode.BAD_PARAMETER,
            f"attention_mask is {list(mask.shape)} for token ids {list(table.shape)}",
            "give one number an id: 1 to keep it, 0 for padding",
        )
    rows: list[list[int]] = table.tolist()
    if mask is not None:
        rows = [
            [token for token, keep in zip(row, kept, strict=True) if keep]
            for row, kept in zip(rows, mask.tolist(), strict=True)
        ]
    allowed = frozenset(also)
    strange = [t for row in rows for t in row if not 0 <= t < vocabulary and t not in allowed]
    if strange:
        raise RequestError(
            ErrorCode.BAD_PARAMETER,
            f"token ids hold {strange[0]}, the vocabulary goes from 0 to {vocabulary - 1}",
            "use the tokenizer that came with the weights",
        )
    return rows
