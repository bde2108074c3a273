"""The code that travels with a checkpoint: the files that a Hub folder needs, found by their imports."""

import shutil
from importlib.util import find_spec
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

# What the Auto classes, the pipelines and sentence-transformers name; for each folder.
ENTRIES = {
    "mmgem": ("configuration_mmgem.py", "modeling_mmgem.py", "pipeline_mmgem.py"),
    "mmgem.processing": ("processing_mmgem.py",),
}


def code_files() -> list[Path]:
    """The files that loading a checkpoint executes: the entries, and the siblings that they import, sorted by name."""
    files: set[Path] = set()
    for package, names in ENTRIES.items():
        folder = Path(str(find_spec(package).origin)).parent  # type: ignore[union-attr]
        for name in names:
            files |= {folder / name, *map(Path, get_relative_import_files(folder / name))}
    return sorted(files, key=lambda file: file.name)


def copy_code(folder: str | Path) -> None:
    """Make the code in a Hub folder that of this package.

    Args:
        folder: An existing folder. Its Python files are replaced; one that nothing imports any more goes.
    """
    folder, files = Path(folder), code_files()
    for old in folder.glob("*.py"):
        if old.name not in {file.name for file in files}:
            old.unlink()
    for file in files:
        shutil.copyfile(file, folder / file.name)
