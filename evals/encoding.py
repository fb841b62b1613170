"""Texts of requests -> token ids, as lm-eval's `TemplateLM` makes them, but each distinct text once and in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from megagpt.tokenizer import Tokenizer

Tokens = npt.NDArray[np.uint32]

CHUNK = 2048
"""Requests whose texts are encoded together: their tokens are held in memory."""


def encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], prefix_token_id: int
) -> Iterator[tuple[Tokens, Tokens]]:
    """Context and continuation ids of each request.

    A context and its continuation are encoded together and cut at the number of the context's own tokens; spaces at
    the context's end belong to the continuation; an empty context becomes the prefix token. Source: lm-eval 0.4.13,
    api/model.py, `TemplateLM.loglikelihood` and `_encode_pair`.

    Args:
        tokenizer: the model's.
        pairs: (context, continuation).
        prefix_token_id: what stands for an empty context.
    """
    prefix = np.array([prefix_token_id], dtype=np.uint32)
    for start in range(0, len(pairs), CHUNK):
        moved = [_move_spaces(*pair) if pair[0] else pair for pair in pairs[start : start + CHUNK]]
        texts = list(dict.fromkeys(text for context, rest in moved for text in (context, context + rest)))
        ids = dict(zip(texts, tokenizer.encode_batch_numpy(texts), strict=True))
        for (raw_context, _), (context, rest) in zip(pairs[start : start + CHUNK], moved, strict=True):
            whole = ids[context + rest]
            if raw_context:
                yield ids[context], whole[len(ids[context]) :]
            elif len(whole) and whole[0] == prefix_token_id:
                yield whole[:1], whole[1:]
            else:
                yield prefix, whole


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation
