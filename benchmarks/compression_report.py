"""The table of the compression experiment, from the lines of its runs."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean

from benchmarks.experiment_report import interval
from benchmarks.measure import markdown_table

HEADER = ("k", "pairs seen", "R@1 without", "R@1 with", "difference", "seeds", "better")


def report(lines: Sequence[Mapping]) -> str:
    """Markdown: a row for each number of vectors and pairs. Means over the seeds with half the width of their 95%
    confidence intervals, by Student's t; the difference is paired by seed, which shares scenes and order.

    Args:
        lines: Of `benchmarks.compression.run_all`, with and without the compress stage for each seed.
    """
    recalls = {(line["vectors"], line["pairs"], line["compressed"], line["seed"]): line["recall"] for line in lines}
    seeds = sorted({line["seed"] for line in lines})
    rows = []
    for vectors, pairs in sorted({(line["vectors"], line["pairs"]) for line in lines}):
        without, compressed = (
            [recalls[vectors, pairs, is_compressed, seed] for seed in seeds] for is_compressed in (False, True)
        )
        gains = [after - before for after, before in zip(compressed, without, strict=True)]
        figures = _spread(without), _spread(compressed), _spread(gains, "+"), len(seeds), sum(g > 0 for g in gains)
        rows.append((vectors, f"{pairs:,}", *figures))
    return markdown_table(HEADER, rows)


def _spread(values: Sequence[float], sign: str = "") -> str:
    margin = interval(values)
    return f"{mean(values):{sign}.3f}" + (f" ± {margin:.3f}" if margin < math.inf else "")
