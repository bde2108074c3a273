"""Writes a complete Hub folder, which `SentenceTransformer` can load too. Needs no sentence-transformers."""

import json
import shutil
from pathlib import Path

MODALITY_METHODS = {
    "text": "get_text_features",
    "image": "get_image_features",
    "image+text": "get_multimodal_features",
}
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers_mmgem.MMGEMTransformer"},
    {"idx": 1, "name": "1", "path": "1_Normalize", "type": "sentence_transformers.base.modules.normalize.Normalize"},
]


def save_sentence_transformer(model, processor, folder: str | Path, prompts: dict[str, str] | None = None):
    """Saves a model and its processor so that everything loads from one folder.

    `AutoModel`, `AutoProcessor`, the pipelines and `SentenceTransformer`, each with `trust_remote_code=True`, need
    nothing but this folder: it holds the code as well.

    Args:
        model: `MMGEMModel`.
        processor: `MMGEMProcessor`.
        folder: where to; made if it is not there.
        prompts: put before texts, by name: those named `query` and `document` by `encode_query` and
            `encode_document`, the others when asked for.
    """
    folder = Path(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    code = Path(__file__).with_name("sentence_transformers_mmgem.py")
    shutil.copy(code, folder / code.name)
    _write_json(folder / "modules.json", MODULES)
    _write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {
                modality: {"method": method, "method_output_name": "pooler_output"}
                for modality, method in MODALITY_METHODS.items()
            },
            "module_output_name": "sentence_embedding",
        },
    )
    _write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": {"query": "", "document": "", **(prompts or {})},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )


def _write_json(path: Path, content):
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
