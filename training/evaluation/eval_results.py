"""Figures of a model in the files from which the Hub reads results, `.eval_results/*.yaml` of its folder."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.constants import EVAL_RESULTS_FOLDER

from mmgem.training.output_folder import check_writable


def check_results_place(folder: str | Path, dataset_id: str) -> None:
    """Refuse what `write_eval_results` cannot use, before anything is measured.

    Raises:
        OSError: If nothing can be written there.
        ValueError: If `folder` is none, or `dataset_id` cannot be one on the Hub.
    """
    if not Path(folder).is_dir():
        raise ValueError(
            f"`folder` is {str(folder)!r}; expected the folder of a checkpoint, where its results are kept."
        )
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", dataset_id, re.ASCII):
        raise ValueError(f"`dataset_id` is {dataset_id!r}; expected OWNER/NAME of a dataset on the Hub.")
    results = Path(folder) / EVAL_RESULTS_FOLDER
    check_writable((results if results.is_dir() else Path(folder)) / f"{EVAL_RESULTS_FOLDER}.partial", "folder")


def write_eval_results(folder: str | Path, dataset_id: str, figures: Mapping[str, float]) -> Path:
    """Write the figures that a model has on a dataset of the Hub, in place of earlier ones on it.

    The Hub shows those whose names the dataset lists as its tasks, see https://huggingface.co/docs/hub/eval-results.

    Args:
        folder: The folder of the checkpoint.
        dataset_id: `OWNER/NAME` of the dataset on the Hub; nothing can tell offline whether it is the one measured on.
        figures: The figures, by their name, which becomes the `task_id`.

    Returns:
        The file.

    Raises:
        OSError, ValueError: As `check_results_place`.
    """
    check_results_place(folder, dataset_id)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    entries = [
        EvalResultEntry(dataset_id, measure, round(value, 4), date=date, notes="measured by mmgem evaluate")
        for measure, value in figures.items()
    ]
    import yaml

    file = Path(folder) / EVAL_RESULTS_FOLDER / f"{dataset_id.replace('/', '--')}.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")
    return file
