"""Pushing a checkpoint's folder to the Hub, once it is known to be whole."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.constants import EVAL_RESULTS_FOLDER
from huggingface_hub.errors import HfHubHTTPError

from mmgem.processing.hub_code import code_files
from mmgem.training.output_lock import not_written

NEEDED = (
    *("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "README.md"),
)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def push_folder(folder: str | Path, repository: str, private: bool = False) -> str:
    """Push a whole Hub folder as one commit; its card then names the repository where it named the folder.

    Files that begin with a dot, but for the results of `write_eval_results`, and folders of checkpoints (`stages`,
    `checkpoint-...`) stay where they are.

    Args:
        folder: What `mmgem train`, `save_pretrained` of model and processor, and others leave.
        repository: `NAME` or `OWNER/NAME`; made if it is not there.
        private: Whether only its owner sees it, if it is made now.

    Returns:
        The address of the repository.

    Raises:
        BlockingIOError: If another job writes the folder.
        FileNotFoundError: If the folder is not there, or files are missing, each of which is named.
        PermissionError: If there is no token, or the Hub refuses it.
        ConnectionError: If the Hub cannot be reached.
        ValueError: If the Hub refuses for another reason, which is said.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "a file" if folder.exists() else "which is not there"
        raise FileNotFoundError(f"`folder` is {str(folder)!r}, {what}; expected that of a checkpoint.")
    missing = [name for name in (*NEEDED, *(file.name for file in code_files())) if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in WEIGHTS):
        missing.insert(0, " or ".join(WEIGHTS))
    if missing:
        raise FileNotFoundError(
            f"`folder` is {str(folder)!r}, which lacks {', '.join(missing)}; expected a whole one."
        )
    if get_token() is None:
        raise PermissionError("There is no token for the Hub; expected one of `hf auth login`, or in HF_TOKEN.")
    with not_written(folder, "folder"):
        return _push(folder, repository, private)


def _push(folder: Path, repository: str, private: bool) -> str:
    try:
        api = HfApi()
        url = api.create_repo(repository, private=private, exist_ok=True)
        card = (folder / "README.md").read_text(encoding="utf-8")
        card = card.replace(f'"{folder.resolve().name}"', f'"{url.repo_id}"')
        files = [
            CommitOperationAdd(
                file.relative_to(folder).as_posix(), card.encode() if file == folder / "README.md" else str(file)
            )
            for file in _files(folder)
        ]
        api.create_commit(url.repo_id, files, commit_message="Push the model with mmgem")
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise PermissionError(
                f"The Hub refuses the token for {repository!r} ({status}); expected one that may write there."
            ) from error
        raise ValueError(f"The Hub refuses {repository!r}: {_sentence(error)}") from error
    except Exception as error:
        if isinstance(error, OSError) or type(error).__module__.startswith("http"):
            raise ConnectionError(f"The Hub cannot be reached: {_sentence(error)}") from error
        raise
    return str(url)


def _sentence(error: Exception) -> str:
    """What an error of a library says first."""
    said = str(error).strip().splitlines() or [type(error).__name__]
    return f"{said[0].rstrip(' .:')}."


def _files(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    inner = [(file, file.relative_to(folder).parts) for file in files]
    return [
        file
        for file, parts in inner
        if (parts[0] == EVAL_RESULTS_FOLDER and file.suffix == ".yaml")
        or not any(part.startswith((".", "checkpoint-")) or part in ("stages", "__pycache__") for part in parts)
    ]
