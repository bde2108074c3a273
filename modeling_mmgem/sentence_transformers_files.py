"""What sentence-transformers reads beside a checkpoint, so that its encoders load what `save_pretrained` wrote."""

import json
from pathlib import Path

from .configuration_mmgem import MMGEMConfig

# They travel with the processor.
MODULES = {
    "": "sentence_transformers_mmgem.MMGEMTransformer",
    "1_NestedVectors": "sentence_transformers_mmgem.NestedVectors",
}
MODALITIES = {"fused": "image+text"}  # the kinds of embeddings that have another name in sentence-transformers
# Checked by sentence-transformers before it loads a model; the bounds of the package.
REQUIREMENTS = {"sentence-transformers": ">=6.2.0,<7", "torch": ">=2.13.0", "transformers": ">=5.23.0,<6"}


def write_sentence_transformers_files(folder: Path, config: MMGEMConfig, embedding_dim: int):
    """Write the settings of `SentenceTransformer` and `MultiVectorEncoder` into the folder of a checkpoint.

    Both know `config.prompts` by name; those named `query` and `document` are put before texts by `encode_query` and
    `encode_document`.

    Args:
        folder: Existing folder.
        config: Of the model.
        embedding_dim: Width of its embeddings.
    """
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": class_name}
        for i, (path, class_name) in enumerate(MODULES.items())
    ]
    _write_json(folder / "modules.json", modules)
    _write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {
                MODALITIES.get(kind, kind): {"method": method, "method_output_name": "pooler_output"}
                for kind, method in config.embedding_methods.items()
            },
            "module_output_name": "token_embeddings",
        },
    )
    _write_json(
        folder / "1_NestedVectors" / "config.json", {"embedding_dimension": embedding_dim, "num_vectors": None}
    )
    _write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": {"query": "", "document": "", **(config.prompts or {})},
            "default_prompt_name": None,
            # Each class takes the functions that it has: of one vector the similarity is the cosine in any case.
            "similarity_fn_name": "meanmaxsim" if config.is_multi_vector else "cosine",
            "requirements": REQUIREMENTS,
        },
    )


def _write_json(path: Path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
