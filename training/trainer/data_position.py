"""The place of a run in its data: kept with each checkpoint, so that a resumed run goes on at the row where it was."""

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from mmgem.training.data.mixture import Mixture

LAYOUT_NAME = "data_layout.json"
BOOKMARKS_NAME = "stream_bookmarks"


@dataclass(frozen=True)
class DataLayout:
    """How the rows of a run are dealt to its batches and steps.

    Args:
        train_batch_size: Rows of a batch, on one process.
        num_processes: Processes that read rows of their own.
        gradient_accumulation_steps: Batches of a step, on one process.
        stream_batch_size, num_stream_readers: Arguments of [`Mixture.split_streams`], which a run keeps.
    """

    train_batch_size: int
    num_processes: int
    gradient_accumulation_steps: int
    stream_batch_size: int
    num_stream_readers: int

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, over all processes."""
        return self.train_batch_size * self.num_processes * self.gradient_accumulation_steps


class DataPosition:
    """Makes a resumed run go on at the row at which its checkpoint was saved, or refuses to.

    The Trainer resumes by skipping the rows of as many steps as were taken. Those are the rows that were trained on if
    a step has as many rows as before, however they are divided among processes, batches and accumulation steps.

    Args:
        dataset: The training data. The streams of a [`Mixture`] are split among all workers of all processes.
    """

    def __init__(self, dataset):
        self.streams = dataset if isinstance(dataset, Mixture) and dataset.has_streams else None
        self.layout: DataLayout | None = None
        self._folder: tempfile.TemporaryDirectory | None = None  # of bookmarks, to which the workers write

    def begin(
        self,
        train_batch_size: int,
        num_processes: int,
        gradient_accumulation_steps: int,
        num_workers: int,
        checkpoint: str | Path | None = None,
    ) -> None:
        """Begin a run, or go on with one.

        Args:
            train_batch_size, num_processes, gradient_accumulation_steps: As for [`DataLayout`].
            num_workers: Workers of each process, 0 or more.
            checkpoint: Folder of the checkpoint to resume from, if any.

        Raises:
            FileNotFoundError: If the checkpoint does not say how its rows were dealt.
            ValueError: If a step had another number of rows.
        """
        self.layout = DataLayout(
            train_batch_size,
            num_processes,
            gradient_accumulation_steps,
            stream_batch_size=train_batch_size,
            num_stream_readers=num_processes * max(1, num_workers),
        )
        if checkpoint is not None:
            self.layout = _resumed(self.layout, Path(checkpoint))
        if self.streams is None:
            return
        self._folder = tempfile.TemporaryDirectory()
        bookmarks = Path(self._folder.name)
        if checkpoint is not None and (Path(checkpoint) / BOOKMARKS_NAME).is_dir():
            shutil.copytree(Path(checkpoint) / BOOKMARKS_NAME, bookmarks, dirs_exist_ok=True)
        self.streams.split_streams(self.layout.stream_batch_size, self.layout.num_stream_readers, bookmarks)

    def save(self, folder: str | Path, is_main_process: bool) -> None:
        """Write what `begin` reads to the folder of a checkpoint; every process calls this.

        Args:
            folder: Of the checkpoint.
            is_main_process: Whether to write what all processes have in common.
        """
        assert self.layout is not None
        if is_main_process:
            content = json.dumps(asdict(self.layout), indent=1)
            (Path(folder) / LAYOUT_NAME).write_text(content + "\n", encoding="utf-8")
        if self._folder is None:
            return
        target = Path(folder) / BOOKMARKS_NAME
        target.mkdir(parents=True, exist_ok=True)
        for path in Path(self._folder.name).iterdir():
            # A part has one reader, but resumed processes hold the old bookmarks of all: the longest is the newest.
            kept = target / path.name
            if not kept.is_file() or kept.stat().st_size < path.stat().st_size:
                shutil.copyfile(path, kept)


def _resumed(layout: DataLayout, checkpoint: Path) -> DataLayout:
    """The layout with the readers of streams that the run of a checkpoint began with."""
    path = checkpoint / LAYOUT_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"`resume_from_checkpoint` is {str(checkpoint)!r}, which has no {LAYOUT_NAME}; expected a checkpoint of "
            "MMGEMTrainer, or `ignore_data_skip` True to begin with the first row."
        )
    saved = DataLayout(**json.loads(path.read_text(encoding="utf-8")))
    if layout.rows_per_step != saved.rows_per_step:
        raise ValueError(
            "`per_device_train_batch_size` x processes x `gradient_accumulation_steps` is "
            f"{_factors(layout)} rows a step; expected {saved.rows_per_step}, as the checkpoint was trained with: "
            f"{_factors(saved)}."
        )
    return DataLayout(
        layout.train_batch_size,
        layout.num_processes,
        layout.gradient_accumulation_steps,
        saved.stream_batch_size,
        saved.num_stream_readers,
    )


def _factors(layout: DataLayout) -> str:
    factors = (layout.train_batch_size, layout.num_processes, layout.gradient_accumulation_steps)
    return f"{' x '.join(map(str, factors))} = {layout.rows_per_step}"
