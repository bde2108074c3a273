"""The table and the plot of the experiment, from the results of its runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

METRICS = {
    "text_to_image": "text → image R@1",
    "image_to_text": "image → text R@1",
    "long_text": "long text → image R@1",
    "fidelity": "caption fidelity",
    "facts": "caption facts F1",
    "caption_nll": "caption NLL",
}
RETRIEVAL = ("text_to_image", "image_to_text", "long_text")
CAPTIONS = ("fidelity", "facts", "caption_nll")
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """A question, the two arms whose difference (first minus second) answers it, and by which metrics."""

    question: str
    first: str
    second: str
    metrics: Sequence[str]


COMPARISONS = (
    Comparison("Does captioning change retrieval?", "joint", "embedding-only", RETRIEVAL),
    Comparison("Does embedding change captions?", "joint", "captioning-only", CAPTIONS),
    Comparison("What does the aggregator's attention bring?", "joint", "average-pooling", RETRIEVAL + CAPTIONS),
    Comparison("4 visual tokens instead of 16?", "4-tokens", "joint", RETRIEVAL + CAPTIONS),
    Comparison("64 visual tokens instead of 16?", "64-tokens", "joint", RETRIEVAL + CAPTIONS),
    Comparison("Against a 77-token dual encoder?", "joint", "clip-77", RETRIEVAL),
    Comparison("... and one that reads 256 tokens?", "joint", "clip-256", RETRIEVAL),
    Comparison("Against a LLaVA-style captioner?", "joint", "llava", CAPTIONS),
    Comparison("... with as many visual tokens?", "64-tokens", "llava", CAPTIONS),
)


def write_report(results: Sequence[Mapping], titles: Mapping[str, str], out: Path) -> None:
    """Writes `OUT/table.md` and `OUT/plot.png`."""
    (out / "table.md").write_text(f"{results_table(results, titles)}\n\n{differences_table(results)}\n")
    draw_plot(results, titles, out / "plot.png")


def values_of(results: Sequence[Mapping], arm: str, metric: str) -> dict[int, float]:
    """Seed to value, of the runs of an arm that have the metric."""
    return {
        result["seed"]: result["metrics"][metric]
        for result in results
        if result["arm"] == arm and metric in result["metrics"]
    }


def spread(values: Sequence[float]) -> float:
    """Standard deviation over the seeds, 0 for one seed."""
    return stdev(values) if len(values) > 1 else 0.0


def interval(differences: Sequence[float]) -> float:
    """Half the width of the confidence interval of a mean, by Student's t; infinite for one value."""
    from scipy.stats import t

    if len(differences) < 2:
        return math.inf
    return t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1) * stdev(differences) / math.sqrt(len(differences))


def results_table(results: Sequence[Mapping], titles: Mapping[str, str]) -> str:
    """Markdown: a row for each arm, mean and standard deviation over the seeds."""
    lines = [_row(["", "parameters", *METRICS.values()]), _row(["---", *["---:"] * (len(METRICS) + 1)])]
    for arm, title in titles.items():
        runs = [result for result in results if result["arm"] == arm]
        if not runs:
            continue
        cells = []
        for metric in METRICS:
            values = list(values_of(results, arm, metric).values())
            deviation = f" ± {spread(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{deviation}" if values else "–")
        lines.append(_row([title, f"{runs[0]['trained_parameters'] / 1e6:.2f} M", *cells]))
    return "\n".join(lines)


def differences_table(results: Sequence[Mapping]) -> str:
    """Markdown: the differences that answer the questions, paired by seed, with 95% confidence intervals. Runs of one
    seed share their data and their order, so what a lucky seed gives to both cancels.
    """
    lines = [_row(["question", "difference", *METRICS.values()]), _row(["---", "---", *["---:"] * len(METRICS)])]
    for comparison in COMPARISONS:
        cells = []
        for metric in METRICS:
            first = values_of(results, comparison.first, metric)
            second = values_of(results, comparison.second, metric)
            differences = [first[seed] - second[seed] for seed in first if seed in second]
            if metric not in comparison.metrics or not differences:
                cells.append("–")
                continue
            margin = interval(differences)
            cells.append(
                f"{mean(differences):+.3f} ± {margin:.3f}" if margin < math.inf else f"{mean(differences):+.3f}"
            )
        lines.append(_row([comparison.question, f"{comparison.first} − {comparison.second}", *cells]))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw_plot(results: Sequence[Mapping], titles: Mapping[str, str], path: Path) -> None:
    """A panel for each metric: every run as a dot, the mean of an arm and its standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = [arm for arm in titles if any(result["arm"] == arm for result in results)]
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 6), sharey=True, layout="constrained")
    for axis, (metric, title) in zip(axes.flat, METRICS.items(), strict=True):
        for height, arm in enumerate(arms):
            values = list(values_of(results, arm, metric).values())
            if values:
                color = "tab:blue" if height == 0 else "tab:gray"
                axis.errorbar(mean(values), height, xerr=spread(values), fmt="o", color=color, capsize=4)
                axis.plot(values, [height] * len(values), "|", color=color, markersize=12, alpha=0.6)
        reference = list(values_of(results, arms[0], metric).values())
        if reference:
            axis.axvline(mean(reference), color="tab:blue", linewidth=0.8, linestyle=":")
        if metric != "caption_nll":  # a share
            axis.set_xlim(left=0)
        axis.set_title(title + (" (lower is better)" if metric == "caption_nll" else ""), fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_yticks(range(len(arms)), [titles[arm] for arm in arms])
    axes[0, 0].invert_yaxis()  # which the panels share
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
