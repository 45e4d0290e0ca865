"""The routing of one text as a table: a row a token, a column a block, a letter an expert."""

from collections.abc import Sequence

from rich.cells import cell_len

from sparse_ft.evaluation.tables import printable, text_table
from sparse_ft.evaluation.token_routing import TokenRouting

MAX_IN_CELL = 3
"""Experts that a cell names; the number of further experts follows."""
MAX_TOKEN_WIDTH = 24


def token_table(routed: TokenRouting, *, width: int = 120) -> str:
    """Lay out the experts of a text and, if its tokens were routed, the experts of each token.

    Args:
        routed: As ``route_tokens`` returns it.
        width: Terminal columns; blocks that do not fit go into a second table below the first.
    """
    lines = [_headline(routed)]
    if routed.truncated:
        lines.append(f"The text is longer than the {len(routed.tokens)} tokens that are read (data.max_length).")
    if routed.familiarity is not None:
        least = f", unknown below {routed.min_familiarity:g}" if routed.min_familiarity else ""
        lines.append(f"Familiarity {routed.familiarity:.3f}{least}.")
    if not routed.weights.any():
        lines.append("No expert was chosen: the text goes through the bare backbone.")
    if routed.choosable:
        lines += ["", *_expert_table(routed)]
        if routed.by_token:
            more = " +2: two more experts have less." if len(routed.experts) > MAX_IN_CELL else ""
            lines += ["", f"A61: a weight of 0.61 on expert A.{more}"]
            lines += [line for table in _token_tables(routed, width) for line in ["", *table]]
    return "\n".join(lines)


def span(routed: TokenRouting) -> str:
    """Name the number of tokens and the blocks that were routed."""
    count = "1 token" if len(routed.tokens) == 1 else f"{len(routed.tokens)} tokens"
    first, last = routed.blocks[0], routed.blocks[-1]
    return f"{count}, block {first}" if first == last else f"{count}, blocks {first} to {last}"


def _headline(routed: TokenRouting) -> str:
    if not routed.choosable:
        return f"There is one expert, {routed.experts[0]}, so there is nothing to choose ({span(routed)})."
    how = "each token has its own experts in each block"
    if not routed.by_token:
        how = "one routing for the whole text, the same for all its tokens in all blocks"
    return f"Route {routed.route}: {how} ({span(routed)})."


def _expert_table(routed: TokenRouting) -> list[str]:
    marked = routed.by_token
    rows = [
        [*([_letter(index)] if marked else []), printable(expert), f"{weight:.2f}"]
        for index, (expert, weight) in enumerate(routed.usage.items())
    ]
    header = ["", "expert", "mean weight"] if marked else ["expert", "weight"]
    if routed.probabilities is not None:
        header.append("probability")
        rows = [[*row, f"{routed.probabilities[name]:.2f}"] for row, name in zip(rows, routed.experts, strict=True)]
    return text_table(header, rows, num_text_columns=2 if marked else 1)


def _token_tables(routed: TokenRouting, width: int) -> list[list[str]]:
    """Lay out the tokens and their mean, with as many blocks side by side as fit."""
    labels = ["token", *(shortened(token.text) for token in routed.tokens), "mean"]
    columns = [
        [f"block {block}", *(_cell(row) for row in [*weights.tolist(), weights.mean(0).tolist()])]
        for block, weights in zip(routed.blocks, routed.weights, strict=True)
    ]
    left = width - max(map(cell_len, labels))
    widths = [2 + max(map(cell_len, column)) for column in columns]
    tables, start = [], 0
    while start < len(columns):
        stop = start + 1
        while stop < len(columns) and sum(widths[start : stop + 1]) <= left:
            stop += 1
        header, *rows = zip(labels, *columns[start:stop], strict=True)
        tables.append(text_table(header, rows, num_text_columns=len(header)))
        start = stop
    return tables


def _letter(index: int) -> str:
    """Name an expert by a letter: A to Z, then AA, AB and so on."""
    letter = chr(ord("A") + index % 26)
    return letter if index < 26 else _letter(index // 26 - 1) + letter


def _cell(weights: Sequence[float]) -> str:
    """Write the experts of one token [E], the heaviest first, in hundredths; ``-`` if there is none."""
    order = sorted(range(len(weights)), key=lambda index: -weights[index])
    shown = [f"{_letter(index)}{100 * weights[index]:.0f}" for index in order if weights[index] >= 0.005]
    more = [f"+{len(shown) - MAX_IN_CELL}"] if len(shown) > MAX_IN_CELL else []
    return " ".join([*shown[:MAX_IN_CELL], *more]) or "-"


def shortened(token: str, *, width: int = MAX_TOKEN_WIDTH) -> str:
    """Cut a token or a name to the width of a cell, without the blanks that a tokenizer puts at its ends."""
    shown = printable(token.strip() or token)
    while cell_len(shown) > width:
        shown = shown[:-2] + "…"
    return shown
