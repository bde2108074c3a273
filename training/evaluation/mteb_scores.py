"""Scores of mteb (https://github.com/embeddings-benchmark/mteb), which downloads the data of its tasks.

mteb wraps encoders of sentence-transformers. What it cannot know of a checkpoint is said here: its modalities, its
prompts for edits, and a revision by which results of other weights are not taken for its own.
"""

import difflib
import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Normalize
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

from mmgem.processing.sentence_transformers_mmgem import MMGEMTransformer, NestedVectors
from mmgem.training.loading import load_config

# Tasks whose queries are an image and how it is to change.
EDITS = ("CIRRIT2IRetrieval", "EDIRIT2IRetrieval", "FashionIQIT2IRetrieval")
SUGGESTIONS = 3
# Of a folder's files those that change a score.
OF_MODEL = ("*.safetensors", "config.json", "processor_config.json", "tokenizer*.json", "config_sentence*.json")


class TaskScore(NamedTuple):
    """The main score of a task.

    Args:
        asked_for: The name by which the task was asked for: its own, or that of a benchmark.
        task: Its name.
        kind: Its type, such as `Any2AnyRetrieval`.
        measure: What the main score is, such as `ndcg_at_10`.
        score: The mean of it over the splits and subsets of the task.
    """

    asked_for: str
    task: str
    kind: str
    measure: str
    score: float


def find_tasks(names: Sequence[str]) -> dict[str, list]:
    """Find tasks of mteb.

    Args:
        names: Names of tasks, such as `Flickr30kT2IRetrieval`, and of benchmarks, such as `MIEB(lite)`.

    Returns:
        The tasks for each name, of a task itself.

    Raises:
        ModuleNotFoundError: If mteb is not installed.
        ValueError: If there is no task or benchmark of a name; the nearest names are said.
    """
    mteb = _import_mteb()
    return {name: _find_tasks(mteb, name) for name in names}


def _find_tasks(mteb, name: str) -> list:
    try:
        return list(mteb.get_benchmark(name).tasks)
    except KeyError:
        pass
    try:
        return [mteb.get_task(name)]
    except KeyError:
        pass
    known = [benchmark.name for benchmark in mteb.get_benchmarks()]
    known += [task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)]
    by_case = {one.casefold(): one for one in known}
    near = difflib.get_close_matches(name.casefold(), by_case, SUGGESTIONS, cutoff=0.4)
    raise ValueError(
        f"`--mteb` is {name!r}, which mteb {mteb.__version__} does not know; expected the name of a task or a "
        f"benchmark, such as {', '.join(by_case[one] for one in near) or 'MIEB(lite)'}."
    )


def _import_mteb():
    try:
        import mteb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"mteb cannot be imported ({error}); expected it for --mteb: pip install mteb."
        ) from error
    return mteb


def wrap_model(model: str | Path, all_vectors: bool = False) -> Any:
    """Load a checkpoint as a model of mteb, with its `ModelMeta`. No code of its folder runs.

    Args:
        model: The folder of a checkpoint, or a name on the Hub.
        all_vectors: Whether all vectors of an input are compared, by `meanmaxsim`, for tasks of retrieval alone. By
            default the first one is, as in `SentenceTransformer`.

    Returns:
        mteb's wrapper of an encoder. Queries of tasks in `EDITS` get the model's prompt "edit", where it has one.

    Raises:
        FileNotFoundError, ValueError: If it cannot be loaded, as `load_config`; or the model has one vector and all
            are asked for.
        ModuleNotFoundError: If mteb is not installed.
    """
    _import_mteb()
    from mteb.models.sentence_transformer_wrapper import MultiVectorWrapper, SentenceTransformerEncoderWrapper

    config = load_config(model)
    if all_vectors and not config.is_multi_vector:
        raise ValueError(f"`model` is {str(model)!r}, which has one vector of an input; expected several of each.")
    transformer = MMGEMTransformer.load(str(model), trust_remote_code=False)
    modules = [transformer, NestedVectors.load(str(model), subfolder="1_NestedVectors")]
    if all_vectors:  # with what `MultiVectorEncoder` adds to the modules of a folder
        modules += [MultiVectorMask(), Normalize(module_input_name="token_embeddings")]
        encoder = MultiVectorEncoder(modules=modules, similarity_fn_name="meanmaxsim")
    else:
        encoder = SentenceTransformer(modules=modules)
    # `query` and `document` are mteb's names for them, too.
    prompts = {name: text for name, text in (config.prompts or {}).items() if name in ("query", "document")}
    if edit := (config.prompts or {}).get("edit"):
        prompts |= {f"{task}-query": edit for task in EDITS}
    encoder.prompts = {}
    wrapper = MultiVectorWrapper if all_vectors else SentenceTransformerEncoderWrapper
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of what mteb calls
        wrapped = wrapper(encoder, model_prompts=prompts or None)
    is_folder, weights = Path(model).is_dir(), list(transformer.model.parameters())
    known = {
        "name": f"mmgem/{Path(model).resolve().name}" if is_folder else str(model),
        "revision": _hash_folder(Path(model)) if is_folder else config._commit_hash,
        "modalities": ["text", "image"],
        "n_parameters": sum(weight.numel() for weight in weights),
        "memory_usage_mb": round(sum(weight.nbytes for weight in weights) / 2**20, 1),
        "embed_dim": transformer.get_embedding_dimension(),
        "framework": ["Sentence Transformers", "PyTorch"],
        "open_weights": True,
        "use_instructions": bool(prompts),
        "experiment_kwargs": {"vectors": config.num_embedding_tokens} if all_vectors else None,
    }
    wrapped.mteb_model_meta = wrapped.mteb_model_meta.model_copy(update=known)
    return wrapped


def _hash_folder(folder: Path) -> str:
    """What stands for a revision of the Hub: other weights or settings have another."""
    found = hashlib.sha256()
    for file in sorted(file for pattern in OF_MODEL for file in folder.glob(pattern)):
        found.update(f"{file.name}\0".encode())
        with file.open("rb") as stream:
            found.update(hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest()[:40]


def score_tasks(wrapped: Any, tasks: dict[str, list], out: str | Path, batch_size: int = 64) -> list[TaskScore]:
    """Run tasks of mteb.

    Args:
        wrapped: What `wrap_model` returns.
        tasks: What `find_tasks` returns.
        out: Folder for the results, in the files that mteb's leaderboard takes:
            `results/MODEL/REVISION/TASK.json`. What is there of this revision is not run again.
        batch_size: Inputs at a time.

    Returns:
        The main score of each task, in their order.

    Raises:
        ValueError: If the model has not the modalities of a task, before any runs.
        ConnectionError: If data of a task are neither on this machine nor to be had.
        ImportError: If a task needs a package that is not installed.
    """
    import mteb

    every = [task for group in tasks.values() for task in group]
    shows_bars = "TQDM_DISABLE" not in os.environ  # which mteb does not ask
    try:
        found = mteb.evaluate(
            wrapped,
            every,
            cache=mteb.ResultCache(out),
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": shows_bars},
            show_progress_bar=shows_bars,
            co2_tracker=False,
            public_only=False,  # otherwise a task whose data are missing is left out of the results
        )
    except Exception as error:
        if isinstance(error, ConnectionError) or type(error).__module__.startswith("http"):
            raise ConnectionError(
                f"The data of a task cannot be had ({str(error).rstrip('.')}); expected a connection to the Hub, or "
                "the data in the cache of datasets."
            ) from error
        raise
    named = [name for name, group in tasks.items() for _ in group]
    return [_score(*parts) for parts in zip(named, every, found.task_results, strict=True)]


def _score(asked_for: str, task: Any, result: Any) -> TaskScore:
    facts = task.metadata
    return TaskScore(asked_for, facts.name, facts.type, facts.main_score, float(result.get_score()))


def benchmark_means(scores: Sequence[TaskScore]) -> dict[str, float]:
    """The mean over the tasks of each benchmark that was asked for, mteb's `Mean (Task)`."""
    groups: dict[str, list[float]] = {}
    for score in scores:
        if score.asked_for != score.task:
            groups.setdefault(score.asked_for, []).append(score.score)
    return {name: sum(group) / len(group) for name, group in groups.items()}
