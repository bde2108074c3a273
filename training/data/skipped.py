"""A log of the rows that could not be read during a run, so that it says at its end what it left out."""

import json
import logging
import os
from collections import Counter
from pathlib import Path

logger = logging.getLogger(__name__)


class SkippedLog:
    """A file of JSON lines `{"source", "key", "reason"}` to which any worker of any process may add.

    Each addition is one write to a file opened for appending, so lines never mix. The same row may be met again, by
    another process or in the next epoch; it counts once.

    Args:
        path: The file, made when there is something to write; None to keep none, so that only the rows that this
            process adds count.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = None if path is None else Path(path)
        self._added: set[tuple[str, str]] = set()

    def add(self, source: str, key: str, reason: str) -> None:
        """Note a row, or a whole shard, that was skipped; once a process.

        Args:
            source, key: The name of its source, and its own.
            reason: The error.
        """
        if (source, key) in self._added:
            return
        self._added.add((source, key))
        logger.warning("skipped %s:%s: %s", source, key, reason)
        if self.path is None:
            return
        line = json.dumps({"source": source, "key": key, "reason": reason}) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def counts(self) -> dict[str, int]:
        """The number of rows and shards skipped, by source, over all processes and earlier parts of the run."""
        skipped = set(self._added)
        if self.path is not None and self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the machine went down while it was written
                skipped.add((entry["source"], entry["key"]))
        return dict(Counter(source for source, _ in sorted(skipped)))
