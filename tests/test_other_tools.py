"""The tools of docs/other_tools.md that a checkpoint's folder is given to as it is: they make of a text what
sentence-transformers makes of it. Each is skipped where it is not installed."""

from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

TINY = str(Path(__file__).parent.parent / "model_cards" / "mmgem-tiny")
TEXTS = ["a large red star", "two small blue circles", "a green square on the left"]
pytestmark = [pytest.mark.pages, pytest.mark.slow]


@pytest.fixture(scope="module")
def encoder() -> SentenceTransformer:
    return SentenceTransformer(TINY, trust_remote_code=True, device="cpu")


@pytest.fixture(scope="module")
def expected(encoder) -> np.ndarray:
    return encoder.encode(TEXTS)


def test_langchain(expected):
    langchain = pytest.importorskip("langchain_huggingface")
    arguments = {"trust_remote_code": True, "device": "cpu"}
    embeddings = langchain.HuggingFaceEmbeddings(model_name=TINY, model_kwargs=arguments)
    np.testing.assert_allclose(embeddings.embed_documents(TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(embeddings.embed_query(TEXTS[0]), expected[0], atol=1e-5)


def test_llama_index(expected):
    llama_index = pytest.importorskip("llama_index.embeddings.huggingface")
    embedding = llama_index.HuggingFaceEmbedding(model_name=TINY, trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(embedding.get_text_embedding_batch(TEXTS), expected, atol=1e-5)


def test_haystack(expected):
    embedders = pytest.importorskip("haystack_integrations.components.embedders.sentence_transformers")
    haystack = pytest.importorskip("haystack")
    embedder = embedders.SentenceTransformersDocumentEmbedder(model=TINY, trust_remote_code=True, progress_bar=False)
    embedder.warm_up()
    documents = embedder.run([haystack.Document(content=text) for text in TEXTS])["documents"]
    np.testing.assert_allclose([document.embedding for document in documents], expected, atol=1e-5)


def test_chroma(expected):
    functions = pytest.importorskip("chromadb.utils.embedding_functions")
    function = functions.SentenceTransformerEmbeddingFunction(model_name=TINY, trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(function(TEXTS), expected, atol=1e-5)


def test_txtai():
    txtai = pytest.importorskip("txtai")
    embeddings = txtai.Embeddings(path=TINY, method="sentence-transformers", vectors={"trust_remote_code": True})
    embeddings.index(TEXTS)
    assert [embeddings.search(text, 1)[0][0] for text in TEXTS] == [0, 1, 2]


def test_keybert(encoder):
    keybert = pytest.importorskip("keybert")
    words = keybert.KeyBERT(encoder).extract_keywords("a large red star and the and", top_n=1)
    assert words[0][0] in {"large", "red", "star"}


def test_setfit_trains_it(tmp_path):
    setfit = pytest.importorskip("setfit")
    from datasets import Dataset

    model = setfit.SetFitModel.from_pretrained(TINY, trust_remote_code=True, device="cpu")
    rows = Dataset.from_dict({"text": TEXTS * 4, "label": [0, 1, 2] * 4})
    arguments = setfit.TrainingArguments(str(tmp_path), max_steps=2, batch_size=4, report_to="none")
    setfit.Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert model.predict(TEXTS).tolist() == [0, 1, 2]
