"""Where a prefix can be published: a pure rule over page size, sliding window and what has left the window.

Plain KV and GLM-5's latent with its index keys live in pages, so any multiple of the page size is a boundary.
DeepSeek-V4 keeps besides, for each token, blocks of 4 and of 128 tokens compressed into one, the raw scores of a block
that is not full yet, and only the last window of uncompressed keys. Its pages of 256 tokens are a multiple of both
blocks, so that nothing half compressed lies before a boundary; but the window before it must still be there.
"""

from __future__ import annotations

from typing import NamedTuple


class Layout(NamedTuple):
    """`page`: tokens. `window`: tokens before a prefix's end that its readers need uncompressed; 0 without one.

    `pairs`: the tree's keys are pairs of tokens (EAGLE, MTP), so that the last token of a key has no entry.
    """

    page: int
    window: int = 0
    pairs: bool = False


def publishable(asked: int, committed: int, in_tree: int, released: int, layout: Layout) -> int:
    """Tokens of a running request that can be in the tree, at most `asked`; `in_tree` when no more can.

    `committed`: tokens whose KV is computed. `released`: tokens at the front that have left the window and whose
    uncompressed keys are freed. Every argument and the result count tokens from the request's first.
    """
    end = round_down(min(asked, committed), layout)
    if end <= in_tree:
        return in_tree
    whole = not layout.window or released <= in_tree or end - released >= layout.window
    return end if whole else in_tree


def round_down(tokens: int, layout: Layout) -> int:
    """The boundary at or before a token."""
    return max(tokens - (1 if layout.pairs else 0), 0) // layout.page * layout.page


def key_tokens(end: int, layout: Layout) -> int:
    """Tokens that a key must have for `end` of them to be found."""
    return end + (1 if layout.pairs else 0)
