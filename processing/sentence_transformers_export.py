"""Writes a complete Hub folder, which sentence-transformers can load too. Needs no sentence-transformers."""

import json
import shutil
from pathlib import Path

MODALITIES = {"fused": "image+text"}  # the kinds of embeddings that have another name in sentence-transformers
CODE_FILES = ("sentence_transformers_mmgem.py", "sentence_transformers_inputs.py")
MODULES = {
    "": "sentence_transformers_mmgem.MMGEMTransformer",
    "1_NestedVectors": "sentence_transformers_mmgem.NestedVectors",
    "2_Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "3_Normalize": "sentence_transformers.base.modules.normalize.Normalize",
}


def save_sentence_transformer(model, processor, folder: str | Path):
    """Saves a model and its processor so that everything loads from one folder.

    `AutoModel`, `AutoProcessor`, the pipelines, `SentenceTransformer` and `MultiVectorEncoder`, each with
    `trust_remote_code=True`, need nothing but this folder: it holds the code as well.

    `SentenceTransformer` gives one vector for an input: of a model that keeps several, the first. `MultiVectorEncoder`
    gives all of them, or as many as asked for, see `NestedVectors`; it scores by `meanmaxsim`, as the model does. Both
    know `model.config.prompts` by name; those named `query` and `document` are put before texts by `encode_query` and
    `encode_document`.

    What `MultiVectorEncoder.save` writes is for that class alone; to have a folder for all, save `encoder[0].model`
    and `encoder[0].processor` here.

    Args:
        model: `MMGEMModel`.
        processor: `MMGEMProcessor`.
        folder: Where to; made if it is not there.
    """
    folder = Path(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for name in CODE_FILES:
        shutil.copy(Path(__file__).with_name(name), folder / name)
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
                for kind, method in model.config.embedding_methods.items()
            },
            "module_output_name": "token_embeddings",
        },
    )
    width = model.embedding_dim
    _write_json(folder / "1_NestedVectors" / "config.json", {"embedding_dimension": width, "num_vectors": None})
    _write_json(folder / "2_Pooling" / "config.json", {"embedding_dimension": width, "pooling_mode": "cls"})
    _write_json(folder / "3_Normalize" / "config.json", {"module_input_name": "sentence_embedding"})
    _write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": {"query": "", "document": "", **(model.config.prompts or {})},
            "default_prompt_name": None,
            # Each class takes the functions that it has: of one vector the similarity is the cosine in any case.
            "similarity_fn_name": "meanmaxsim" if model.config.is_multi_vector else "cosine",
        },
    )


def _write_json(path: Path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
