"""Several vectors of an input: `MultiVectorEncoder` gives all of them, `SentenceTransformer` the first."""

import json

import pytest
import torch
from encoders import NUM_VECTORS, PROMPTS, close, learns_pairs, multi_vector_model, picture, unit_features
from sentence_transformers import (
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformer,
)
from sentence_transformers.multi_vector_encoder.losses import MultiVectorMultipleNegativesRankingLoss

from mmgem.late_interaction import maxsim
from mmgem.processing import save_sentence_transformer

TEXTS = ["a red star", "", "a large blue circle in the center"]
PHOTO = picture(0)
FUSED = {"image": PHOTO, "text": "in green"}
REGION = {"image": PHOTO, "boxes": [[5, 5, 30, 30]]}
LOADING = {"trust_remote_code": True, "device": "cpu"}


@pytest.fixture(scope="module")
def model():
    return multi_vector_model()


@pytest.fixture(scope="module")
def folder(model, tiny_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("multi_vector")
    save_sentence_transformer(model, tiny_processor, folder)
    return folder


@pytest.fixture(scope="module")
def encoder(folder) -> MultiVectorEncoder:
    return MultiVectorEncoder(str(folder), **LOADING)


@pytest.fixture(scope="module")
def expected(model, tiny_processor) -> dict[str, torch.Tensor]:
    """(N, k, D) straight from the model."""
    region = unit_features(model, tiny_processor, "image", images=PHOTO, boxes=[[5, 5, 30, 30]])  # (1, 1, k, D)
    return {
        "texts": unit_features(model, tiny_processor, text=TEXTS),
        "image": unit_features(model, tiny_processor, "image", images=PHOTO),
        "fused": unit_features(model, tiny_processor, "fused", images=PHOTO, text="<image>in green"),
        "region": region[0],
    }


def test_all_vectors_of_every_kind(encoder, expected):
    assert expected["texts"].shape == (3, NUM_VECTORS, 16)
    assert close(encoder.encode(TEXTS), expected["texts"])
    assert close(encoder.encode([PHOTO]), expected["image"])
    assert close(encoder.encode([FUSED]), expected["fused"])
    assert close(encoder.encode([REGION]), expected["region"])
    assert close(encoder.encode(PHOTO), expected["image"][0])
    for vectors in expected.values():  # or the order of vectors could not be seen
        assert (vectors @ vectors.mT - torch.eye(NUM_VECTORS)).tril(-1).amax() < 0.9999


@pytest.mark.parametrize("batch_size", [2, 32])
def test_a_list_that_mixes_them(encoder, expected, batch_size):
    embeddings = encoder.encode([TEXTS[0], REGION, PHOTO, FUSED, TEXTS[2]], batch_size=batch_size)
    texts, others = expected["texts"], [expected[name] for name in ("region", "image", "fused")]
    assert close(embeddings, torch.cat([texts[:1], *others, texts[2:]]))


def test_the_first_vector_stands_alone_in_a_sentence_transformer(folder, expected):
    encoder = SentenceTransformer(str(folder), **LOADING)
    embeddings = encoder.encode([TEXTS[0], PHOTO, FUSED, REGION])
    rows = torch.cat([expected["texts"][:1], expected["image"], expected["fused"], expected["region"]])
    assert close(embeddings, rows[:, 0])
    assert encoder.similarity_fn_name == "cosine"
    assert encoder.get_embedding_dimension() == 16
    assert close(encoder.encode([PHOTO], truncate_dim=4), expected["image"][:, 0, :4])


@pytest.mark.parametrize("r", [1, 2, NUM_VECTORS])
def test_fewer_vectors_are_the_first_ones_and_what_fewer_tokens_give(encoder, model, tiny_processor, expected, r):
    assert close(encoder.encode(TEXTS, num_vectors=r), expected["texts"][:, :r])
    assert close(
        encoder.encode([PHOTO, FUSED], num_vectors=r), torch.cat([expected["image"], expected["fused"]])[:, :r]
    )

    smaller = multi_vector_model(num_embedding_tokens=r)
    weights = model.state_dict()
    weights["embedding_tokens"] = weights["embedding_tokens"][:r]
    weights["image_vectors.queries"] = weights["image_vectors.queries"][: r - 1]
    smaller.load_state_dict(weights)
    assert close(encoder.encode(TEXTS, num_vectors=r), unit_features(smaller, tiny_processor, text=TEXTS))
    assert close(encoder.encode([PHOTO], num_vectors=r), unit_features(smaller, tiny_processor, "image", images=PHOTO))


def test_the_similarity_is_that_of_the_model(encoder, folder, expected):
    queries, documents = expected["texts"], torch.cat([expected["image"], expected["fused"]])
    for r, m in [(NUM_VECTORS, NUM_VECTORS), (2, 3)]:
        ours = maxsim(queries[:, :r], documents[:, :m])
        embeddings = encoder.encode(TEXTS, num_vectors=r), encoder.encode([PHOTO, FUSED], num_vectors=m)
        assert close(encoder.similarity(*embeddings), ours)
        summed = MultiVectorEncoder(str(folder), similarity_fn_name="maxsim", **LOADING)
        assert close(summed.similarity(*embeddings), r * ours)


def test_the_number_of_vectors_is_chosen_once_for_all(encoder, folder, expected, tmp_path):
    two = MultiVectorEncoder(str(folder), config_kwargs={"num_vectors": 2}, **LOADING)
    assert close(two.encode(TEXTS), expected["texts"][:, :2])
    assert close(two.encode(TEXTS, num_vectors=3), expected["texts"][:, :3])
    two.save(str(tmp_path / "two"))
    again = MultiVectorEncoder(str(tmp_path / "two"), **LOADING)
    assert close(again.encode(TEXTS), expected["texts"][:, :2])
    assert close(encoder.encode(TEXTS), expected["texts"])


@pytest.mark.parametrize("num_vectors", [0, -1, NUM_VECTORS + 1, True, 2.0, "2"])
def test_another_number_of_vectors_is_refused(encoder, num_vectors):
    with pytest.raises(ValueError, match=f"`num_vectors` is {num_vectors!r}; expected a whole number from 1 to 4"):
        encoder.encode(["a"], num_vectors=num_vectors)


def test_a_number_of_vectors_is_refused_while_loading(folder):
    with pytest.raises(ValueError, match="`num_vectors` is 0; expected a whole number from 1"):
        MultiVectorEncoder(str(folder), config_kwargs={"num_vectors": 0}, **LOADING)


def test_prompts_by_name(encoder, model, tiny_processor):
    query = unit_features(model, tiny_processor, text=["find a star"])
    assert close(encoder.encode_query(["a star"]), query)
    assert close(encoder.encode(["a star"], prompt_name="query"), query)
    assert close(encoder.encode_document(["a star"]), unit_features(model, tiny_processor, text=["a star"]))
    edited = unit_features(model, tiny_processor, "fused", images=PHOTO, text="<image>the same, but in green")
    assert close(encoder.encode([FUSED], prompt_name="edit"), edited)
    with pytest.raises(ValueError, match="'object' not found .*'edit'"):
        encoder.encode(["a star"], prompt_name="object")


def test_an_image_never_reaches_the_language_model(encoder):
    rows = []
    decoder = encoder[0].model.language_model.get_decoder()
    handle = decoder.register_forward_hook(
        lambda module, args, kwargs, output: rows.append(output[0].shape[0]), with_kwargs=True
    )
    encoder.encode([PHOTO, REGION])
    assert rows == []
    encoder.encode([PHOTO, "a", REGION, "b"])
    handle.remove()
    assert rows == [2]


def test_a_single_vector_model_is_a_multi_vector_one_with_one_vector(tiny_model, tiny_processor, tmp_path):
    save_sentence_transformer(tiny_model, tiny_processor, tmp_path)
    encoder = MultiVectorEncoder(str(tmp_path), **LOADING)
    embeddings = encoder.encode([*TEXTS, PHOTO])
    single = torch.as_tensor(SentenceTransformer(str(tmp_path), **LOADING).encode([*TEXTS, PHOTO]))
    assert close(embeddings, single[:, None])
    assert close(encoder.similarity(embeddings, embeddings), single @ single.T)
    with pytest.raises(ValueError, match="`num_vectors` is 2; expected a whole number from 1 to 1"):
        encoder.encode(["a"], num_vectors=2)


def test_saving_again_changes_nothing(encoder, expected, tmp_path):
    encoder.save(str(tmp_path / "again"))
    again = MultiVectorEncoder(str(tmp_path / "again"), **LOADING)
    assert close(again.encode([TEXTS[0], FUSED]), torch.cat([expected["texts"][:1], expected["fused"]]))
    assert [type(module).__name__ for module in again] == [type(module).__name__ for module in encoder]
    assert again.similarity_fn_name == "meanmaxsim"
    assert again.prompts == encoder.prompts
    assert json.loads((tmp_path / "again" / "config.json").read_text())["prompts"] == PROMPTS


def test_its_model_makes_a_folder_for_both_again(encoder, expected, tmp_path):
    encoder.save(str(tmp_path / "again"))
    again = MultiVectorEncoder(str(tmp_path / "again"), **LOADING)
    save_sentence_transformer(again[0].model, again[0].processor, tmp_path / "both")
    both = SentenceTransformer(str(tmp_path / "both"), **LOADING)
    assert close(both.encode([PHOTO]), expected["image"][:, 0])
    assert close(MultiVectorEncoder(str(tmp_path / "both"), **LOADING).encode([PHOTO]), expected["image"])


def test_nothing_is_learned_beside_the_model(encoder):
    assert {name.partition(".")[0] for name, _ in encoder.named_parameters()} == {"0"}


@pytest.mark.slow
def test_training_on_image_text_pairs(folder, tmp_path):
    encoder = MultiVectorEncoder(str(folder), **LOADING)
    loss = MultiVectorMultipleNegativesRankingLoss(encoder, scale=5.0)
    assert learns_pairs(encoder, MultiVectorEncoderTrainer, MultiVectorEncoderTrainingArguments, loss, tmp_path)


def test_what_a_sentence_transformer_saves_scores_as_before(folder, encoder, tmp_path):
    SentenceTransformer(str(folder), **LOADING).save(str(tmp_path / "again"))
    again = MultiVectorEncoder(str(tmp_path / "again"), **LOADING)
    embeddings = encoder.encode(TEXTS), encoder.encode([PHOTO, FUSED])
    assert close(again.similarity(*embeddings), torch.as_tensor(encoder.similarity(*embeddings)))
    assert SentenceTransformer(str(tmp_path / "again"), **LOADING).similarity_fn_name == "cosine"


def test_an_image_asks_with_the_vector_of_the_whole(encoder, expected):
    image, text, fused = expected["image"], expected["texts"][2:], expected["fused"]
    embeddings = encoder.encode_query([PHOTO, REGION, FUSED])
    assert [len(vectors) for vectors in embeddings] == [1, 1, NUM_VECTORS]
    assert close(embeddings[0], image[0, :1]) and close(embeddings[1], expected["region"][0, :1])
    assert close(encoder.encode_query([PHOTO]), image[:, :1])
    assert close(encoder.encode_query([PHOTO], num_vectors=2), image[:, :2])
    assert close(encoder.encode_document([PHOTO, FUSED]), torch.cat([image, fused]))
    documents = encoder.encode_document(TEXTS[2:])
    scores = encoder.similarity(encoder.encode_query([PHOTO]), documents)
    assert close(scores, (image[:, :1] @ text.mT).amax(-1))
