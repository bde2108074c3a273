"""Every form against a reference of plain loops over NumPy numbers, its gradients included."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contrastive_batches import image_batch, mixed_batch, part_of, unit_rows
from forked_ranks import forked_ranks

from mmgem.contrastive import SCORES_AT_ONCE, ContrastiveObjective
from mmgem.contrastive_batch import DOCUMENT, IMAGE, ContrastiveBatch
from mmgem.training.trainer.contrastive_losses import build_objective
from mmgem.training.trainer.grad_cache import GradCache

MOMENTUM = {"momentum": 0.995}
OPTIONS = [
    {},
    {"all_positives": True},
    {"false_negative_threshold": 0.3},
    {"false_negative_margin": 0.1},
    {"false_negative_margin": -0.2},
    {"false_negative_teacher_margin": 0.0, "teacher": MOMENTUM},
    {"hardness": 9.0},
    {"hardness": 2.0, "all_positives": True, "false_negative_margin": 0.2},
    {"soft_targets": 0.4, "teacher": MOMENTUM},
    {"soft_targets": 0.4, "teacher": MOMENTUM, "all_positives": True, "false_negative_threshold": 0.5},
    {"loss": "sigmoid"},
    {"loss": "sigmoid", "false_negative_threshold": 0.2},
]


def a_teacher():
    """Other embeddings, of another size, for the rows of `mixed_batch`, and another temperature."""
    return mixed_batch(seed=4, dim=6)


# The reference


def numbers(batch):
    return {name: value.detach().numpy() for name, value in batch.items()}


def describing_pairs(batch):
    """Whether text q describes target p: it, or a text that says the same, was written for p or a copy of it."""
    b = numbers(batch)
    queries, targets = range(len(b["query_ids"])), range(len(b["target_ids"]))

    def is_copy(p, other):
        return b["target_ids"][p] == b["target_ids"][other] and b["target_modality"][p] == b["target_modality"][other]

    return [
        [
            any(
                b["query_ids"][other] == b["query_ids"][q]
                and b["target_index"][other] >= 0
                and is_copy(p, b["target_index"][other])
                for other in queries
            )
            for p in targets
        ]
        for q in queries
    ]


def may_compare(b, q, p):
    return b["query_modality"][q] == b["target_modality"][p]


def reference_infonce(
    batch,
    teacher_batch,
    all_positives=False,
    false_negative_threshold=math.inf,
    false_negative_margin=math.inf,
    false_negative_teacher_margin=math.inf,
    hardness=0.0,
    soft_targets=0.0,
    **_,
):
    """The loss and its gradient with respect to every similarity, anchor by anchor."""
    b, t = numbers(batch), numbers(teacher_batch)
    s, teacher_s = b["query_embeds"] @ b["target_embeds"].T, t["query_embeds"] @ t["target_embeds"].T
    describes = describing_pairs(batch)
    anchors = [q for q in range(len(s)) if b["target_index"][q] >= 0]
    loss, gradient = 0.0, np.zeros_like(s)
    for q in anchors:
        p = b["target_index"][q]
        same_modality = sum(b["query_modality"][anchors] == b["query_modality"][q])
        for candidates in ([(q, c) for c in range(s.shape[1])], [(c, p) for c in range(s.shape[0])]):
            kept = []
            for pair in candidates:
                if not may_compare(b, *pair):
                    continue
                right = pair == (q, p) or (describes[pair[0]][pair[1]] and all_positives)
                if not right and (
                    describes[pair[0]][pair[1]]
                    or s[pair] > false_negative_threshold
                    or s[pair] > s[q, p] + false_negative_margin
                    or teacher_s[pair] > teacher_s[q, p] + false_negative_teacher_margin
                ):
                    continue
                kept.append((pair, right))
            powers = np.array([math.exp(b["logit_scale"] * s[c] + hardness * s[c] * (not right)) for c, right in kept])
            guessed = powers / powers.sum()
            of_teacher = np.exp([t["logit_scale"] * teacher_s[c] for c, _ in kept])
            target = np.array([float(right) for _, right in kept])
            target = (1 - soft_targets) * target / target.sum() + soft_targets * of_teacher / of_teacher.sum()
            loss -= (target * np.log(guessed)).sum() / 2 / same_modality
            for (pair, _), slope in zip(kept, guessed - target, strict=True):
                gradient[pair] += b["logit_scale"] * slope / 2 / same_modality
    return loss, gradient


def reference_sigmoid(batch, teacher_batch, false_negative_threshold=math.inf, **_):
    b = numbers(batch)
    s = b["query_embeds"] @ b["target_embeds"].T
    describes = describing_pairs(batch)
    loss, gradient = 0.0, np.zeros_like(s)
    for q, p in np.ndindex(*s.shape):
        count = sum((b["query_modality"] == b["query_modality"][q]) & (b["target_index"] >= 0))
        z = 1 if describes[q][p] else -1
        if may_compare(b, q, p) and (z == 1 or s[q, p] <= false_negative_threshold):
            odds = math.exp(-z * (b["logit_scale"] * s[q, p] + b["logit_bias"]))
            loss += math.log(1 + odds) / count
            gradient[q, p] = -z * b["logit_scale"] * odds / (1 + odds) / count
    return loss, gradient


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_and_gradients_are_those_of_the_reference(options):
    batch, teacher = mixed_batch(), a_teacher()
    reference = reference_sigmoid if options.get("loss") == "sigmoid" else reference_infonce
    expected, slope = reference(batch, teacher, **options)
    loss = build_objective(**options)(batch, teacher=teacher)
    assert loss.item() == pytest.approx(expected, abs=1e-10)
    loss.backward()
    slope = torch.from_numpy(slope)
    queries, targets = batch.query_embeds.detach(), batch.target_embeds.detach()
    torch.testing.assert_close(batch.query_embeds.grad, slope @ targets)
    torch.testing.assert_close(batch.target_embeds.grad, slope.T @ queries)
    scale_gradient = (slope * (queries @ targets.T)).sum() / batch.logit_scale.detach()
    torch.testing.assert_close(batch.logit_scale.grad, scale_gradient)
    assert teacher.query_embeds.grad is None and teacher.logit_scale.grad is None


@pytest.mark.parametrize("loss, reference", [("infonce", reference_infonce), ("sigmoid", reference_sigmoid)])
def test_captions_and_texts_of_regions_weigh_the_same_however_many_there_are(loss, reference):
    batch = part_of(mixed_batch(), [0, 1, 2, 3, 4, 5, 6, 7], range(9))  # 5 captions, 2 texts of regions
    expected, _ = reference(batch, batch)
    assert build_objective(loss=loss)(batch).item() == pytest.approx(expected, abs=1e-10)


def test_every_option_of_the_list_makes_a_difference():
    losses = [build_objective(**options)(mixed_batch(), teacher=a_teacher()).item() for options in OPTIONS]
    assert len({round(loss, 6) for loss in losses}) == len(OPTIONS)


# What the forms become at the ends of their ranges


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hardness": 0.0},
        {"soft_targets": 0.0, "teacher": MOMENTUM},
        {"false_negative_threshold": 1.01},
        {"false_negative_margin": 2.01},
        {"false_negative_teacher_margin": 2.01, "teacher": MOMENTUM},
    ],
    ids=str,
)
def test_options_without_effect_give_plain_infonce(options):
    batch = mixed_batch()
    loss, expected = build_objective(**options)(batch, teacher=a_teacher()), ContrastiveObjective()(batch)
    leaves = [batch.query_embeds, batch.target_embeds, batch.logit_scale]
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-14)
    for gradient, known in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(gradient, known, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "options",
    [{}, {"all_positives": True}, {"hardness": 9.0}, {"soft_targets": 0.5, "teacher": MOMENTUM}],
    ids=str,
)
def test_equal_scores_give_the_logarithm_of_the_number_of_candidates(options):
    # Orthogonal to the texts, every image has the similarity 0: no candidate is harder or more probable than another.
    texts, images = torch.eye(8)[:5], torch.eye(8)[5:6].expand(5, -1)
    batch = image_batch(images, texts, scale=7.0)
    loss = build_objective(**options)(batch, teacher=batch)
    assert loss.item() == pytest.approx(math.log(5), abs=1e-6)


def test_images_and_regions_are_never_each_others_negatives():
    # Two images with a region each, one text for each of the four, and all similarities 0.
    batch = part_of(mixed_batch(), [0, 2, 6, 9], [0, 1, 4, 7])
    batch["query_embeds"] = torch.zeros_like(batch.query_embeds)
    assert build_objective()(batch).item() == pytest.approx(2 * math.log(2))


def test_soft_targets_of_a_perfect_student_are_met():
    # At share 1 the loss is the cross-entropy with the teacher, least, and flat, where the student agrees with it.
    batch = mixed_batch()
    objective = build_objective(soft_targets=1.0, teacher=MOMENTUM)
    loss = objective(batch, teacher=batch)
    for gradient in torch.autograd.grad(loss, [batch.query_embeds, batch.target_embeds, batch.logit_scale]):
        assert gradient.abs().max() < 1e-12
    assert loss < objective(mixed_batch(seed=2), teacher=batch)


def test_hardness_of_one_negative_analytic():
    # One text, its image at the similarity 1 and another at 0.5; against the image there is no other text.
    images = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]])
    loss = build_objective(hardness=9.0)(image_batch(images, images[:1], scale=4.0))
    expected = math.log1p(math.exp(4.0 * (0.5 - 1.0) + 9.0 * 0.5)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_a_sigmoid_of_zero_logits_costs_log_two_per_pair():
    texts, images = torch.eye(8)[:5], torch.eye(8)[5:6].expand(5, -1)
    loss = build_objective(loss="sigmoid")(image_batch(images, texts, scale=7.0, bias=0.0))
    assert loss.item() == pytest.approx(5 * math.log(2), abs=1e-5)


def test_sigmoid_at_the_start_of_training_is_nearly_the_loss_of_the_positives():
    # The bias of -10 that SigLIP starts from: each of 3 texts pays 10 for its image, and next to nothing for others.
    batch = image_batch(torch.eye(6)[3:], torch.eye(6)[:3], scale=10.0, bias=-10.0)
    expected = math.log1p(math.exp(10)) + 2 * math.log1p(math.exp(-10))
    assert build_objective(loss="sigmoid")(batch).item() == pytest.approx(expected, rel=1e-5)


def test_sigmoid_is_that_of_transformers_for_single_captions():
    images, texts = unit_rows(5, seed=1), unit_rows(5, seed=2)
    logits = 4.0 * texts @ images.T - 2.0
    # As in SiglipModel.forward.
    expected = -F.logsigmoid((2 * torch.eye(5) - 1) * logits).sum(-1).mean()
    torch.testing.assert_close(build_objective(loss="sigmoid")(image_batch(images, texts, 4.0, -2.0)), expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_lone_pair_gives_finite_numbers(options):
    batch, teacher = part_of(mixed_batch(), [6], [4]), part_of(a_teacher(), [6], [4])
    loss = build_objective(**options)(batch, teacher=teacher)
    gradients = torch.autograd.grad(loss, [batch.query_embeds, batch.target_embeds, batch.logit_scale])
    assert all(gradient.isfinite().all() for gradient in gradients)
    if options.get("loss") != "sigmoid":
        assert loss.item() == 0


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_hard_negatives_of_images_alone_with_texts_of_regions_give_finite_numbers(loss):
    batch = part_of(mixed_batch(), [5, 6, 7], [0, 4, 5])
    assert build_objective(loss=loss)(batch).isfinite()


def test_an_image_and_a_region_with_the_same_id_are_two_targets():
    # A caption of the first image says what the text of the region does, which makes it none of the second image's.
    batch, other = (part_of(mixed_batch(), [1, 4, 7], [0, 3, 5]) for _ in range(2))
    other["target_ids"] = batch.target_ids[[0, 1, 1]]
    assert build_objective()(batch) > 0
    torch.testing.assert_close(build_objective()(other), build_objective()(batch))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_autocast_changes_nothing(options):
    batch, teacher = (
        ContrastiveBatch(**{k: v.float() if v.is_floating_point() else v for k, v in b.items()})
        for b in (mixed_batch(), a_teacher())
    )
    expected = build_objective(**options)(batch, teacher=teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = build_objective(**options)(batch, teacher=teacher)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)


# Large batches


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_blocks_of_anchors_add_up_to_the_loss(options, monkeypatch):
    def loss_and_gradients():
        batch = mixed_batch()
        loss = build_objective(**options)(batch, teacher=a_teacher())
        return loss, *torch.autograd.grad(loss, [batch.query_embeds, batch.target_embeds, batch.logit_scale])

    expected = loss_and_gradients()
    monkeypatch.setattr("mmgem.contrastive.SCORES_AT_ONCE", 40)  # 3 texts at a time
    torch.testing.assert_close(loss_and_gradients(), expected)


def test_memory_does_not_grow_with_the_square_of_the_batch():
    held = []

    class Recorder(ContrastiveObjective):
        def score(self, query_embeds, target_embeds):
            held.append(len(query_embeds) * len(target_embeds))
            return super().score(query_embeds, target_embeds)

    batch = image_batch(unit_rows(3000, seed=1).requires_grad_(), unit_rows(3000, seed=2))
    Recorder()(batch).backward()
    assert max(held) <= SCORES_AT_ONCE < sum(held)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_through_chunks_of_a_cache_are_the_direct_ones(options):
    data, teacher = mixed_batch(), a_teacher()
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
    rows = ([0, 1, 4, 5, 6, 7, 10, 11, 8], [0, 3, 4, 5, 8]), ([2, 3, 9], [1, 2, 6, 7])
    order = [rows[0][side] + rows[1][side] for side in (0, 1)]

    def embed(part):
        batch = part_of(data, *part)
        batch["query_embeds"] = F.normalize(batch.query_embeds.detach() @ weight, dim=-1)
        batch["target_embeds"] = F.normalize(batch.target_embeds.detach() @ weight, dim=-1)
        batch["logit_scale"], batch["logit_bias"] = scale.exp(), scale * 2
        return batch

    def loss_of(batch):
        return build_objective(**options)(batch, teacher=part_of(teacher, *order))

    direct = loss_of(embed(order))
    expected = torch.autograd.grad(direct, [weight, scale])
    cache = GradCache(chunk_size=2)
    with torch.no_grad():
        embedded = [embed(part) for part in rows]
    loss, gradients = cache.loss_and_gradients(embedded, loss_of)
    surrogate = sum(cache.surrogate(embed(part), g) for part, g in zip(rows, gradients, strict=True))
    torch.testing.assert_close(loss, direct.detach())
    torch.testing.assert_close(torch.autograd.grad(surrogate, [weight, scale]), expected)


DEALS = {
    "uneven": (([0, 1, 4, 5, 6, 7, 10, 11, 8], [0, 3, 4, 5, 8]), ([2, 3, 9], [1, 2, 6, 7])),
    "regions on one process": (([0, 1, 2, 5], [0, 1]), ([3, 4, 6, 7, 8, 9, 10, 11], [2, 3, 4, 5, 6, 7, 8])),
    "nothing on one process": (([], []), (list(range(12)), list(range(9)))),
    "images on one, texts nowhere": (([], [0, 1]), ([], [])),
}


LEAVES = ("query_embeds", "target_embeds", "logit_scale", "logit_bias")


def loss_and_gradients(options: dict, fields: dict, teacher: dict) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Of an objective with `options`, for the fields of two [`ContrastiveBatch`]es."""
    leaves = {name: fields[name].detach().requires_grad_() for name in LEAVES}
    batch = ContrastiveBatch(**{**fields, **leaves})
    loss = build_objective(**options)(batch, teacher=ContrastiveBatch(**teacher))
    return loss.detach(), list(torch.autograd.grad(loss, list(leaves.values())))


def test_two_processes_compute_what_one_does(tmp_path):
    data, teacher = mixed_batch(), a_teacher()
    cases = [(options, deal) for options in OPTIONS for deal in DEALS.values()]

    def on_rank(rank: int) -> list:
        return [
            loss_and_gradients(options, *(dict(part_of(batch, *deal[rank])) for batch in (data, teacher)))
            for options, deal in cases
        ]

    results = forked_ranks(on_rank, tmp_path)
    for case, (options, deal) in enumerate(cases):
        whole = [first + second for first, second in zip(*deal, strict=True)]
        alone = [dict(part_of(batch, *whole)) for batch in (data, teacher)]
        loss, gradients = loss_and_gradients(options, *alone)
        expected = dict(zip(LEAVES, gradients, strict=True))
        for rank, part in enumerate(deal):
            gathered_loss, gathered = results[rank][case]
            torch.testing.assert_close(gathered_loss, loss)
            gathered = dict(zip(LEAVES, gathered, strict=True))
            for name, side in (("query_embeds", 0), ("target_embeds", 1)):
                first = len(deal[0][side]) * rank
                own = expected[name][first : first + len(part[side])]
                # DDP takes the mean over the two processes.
                torch.testing.assert_close(gathered[name] / 2, own)
            for name in ("logit_scale", "logit_bias"):
                torch.testing.assert_close(gathered[name], expected[name])


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "triplet"}, "`loss` is 'triplet'; expected infonce or sigmoid"),
        ({"loss": {"infonce": {}}}, "`loss` is"),
        ({"hardnes": 9}, "unknown key `hardnes`.* Did you mean `hardness`?"),
        ({"loss": "sigmoid", "hardness": 9.0}, "`sigmoid` has the unknown key `hardness`; expected false_neg"),
        ({"hardness": -1.0}, "`hardness` is -1.0; expected a number of 0 or more"),
        ({"hardness": math.nan}, "`hardness` is nan; expected a finite number"),
        ({"hardness": "9"}, "`hardness` in the objective `infonce` is '9'; expected float"),
        ({"all_positives": 1}, "`all_positives` in the objective `infonce` is 1; expected bool"),
        ({"false_negative_threshold": math.inf}, "`false_negative_threshold` is inf"),
        ({"false_negative_margin": math.inf}, "`false_negative_margin` is inf"),
        ({"false_negative_teacher_margin": math.nan}, "`false_negative_teacher_margin` is nan"),
        ({"fusemix": math.inf}, "`fusemix` is inf; expected a number above 0"),
        ({"soft_targets": 1.5, "teacher": MOMENTUM}, "`soft_targets` is 1.5; expected a number between 0 and 1"),
        ({"soft_targets": 0.4}, "`teacher` is None; expected one for `soft_targets`"),
        (
            {"false_negative_teacher_margin": 0.0},
            "`teacher` is None; expected one for `false_negative_teacher_margin`",
        ),
        ({"teacher": MOMENTUM}, "`teacher` is .*; expected `soft_targets`"),
        ({"soft_targets": 0.4, "teacher": {}}, "`teacher` has the keys"),
        ({"soft_targets": 0.4, "teacher": {"momentum": 0.9, "pretrained": "a"}}, "expected one of momentum, pretr"),
        (
            {"soft_targets": 0.4, "teacher": {"momentun": 0.9}},
            "^`teacher` has .*key `momentun`.*mean `momentum`?",
        ),
        ({"soft_targets": 0.4, "teacher": {"momentum": 2}}, "`momentum` is 2; expected a number between 0 and 1"),
        ({"soft_targets": 0.4, "teacher": {"momentum": None}}, "`momentum` of the `teacher` is None; expected float"),
        ({"soft_targets": 0.4, "teacher": {"pretrained": 3}}, "`pretrained` of the `teacher` is 3; expected str"),
        (
            {"false_negative_threshold": 0.9, "false_negative_margin": 0.1},
            "`false_negative_threshold` and `false_negative_margin` exclude each other",
        ),
        (
            {"false_negative_margin": 0.9, "false_negative_teacher_margin": 0.1, "teacher": MOMENTUM},
            "`false_negative_margin` and `false_negative_teacher_margin` exclude each other",
        ),
        ({"hardness": 9.0, "soft_targets": 0.4, "teacher": MOMENTUM}, "`hardness` and `soft_targets` exclude"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        build_objective(**options)


@pytest.mark.parametrize("options", [{"false_negative_threshold": 0.0}, {"false_negative_margin": -1.0}])
def test_a_negative_as_near_as_the_limit_stays(options):
    batch = image_batch(torch.eye(3), torch.eye(3))  # every positive is at 1, every negative at 0
    torch.testing.assert_close(build_objective(**options)(batch), ContrastiveObjective()(batch))
    nearer = {name: value - 0.01 for name, value in options.items()}
    assert build_objective(**nearer)(batch) == 0


def test_a_sigmoid_without_a_bias_says_where_it_comes_from():
    with pytest.raises(ValueError, match="`logit_bias` of the batch is None; expected .*`logit_bias_init_value`"):
        build_objective(loss="sigmoid")(image_batch(unit_rows(2), unit_rows(2)))


def test_a_teacher_that_does_not_come_is_missed():
    with pytest.raises(ValueError, match="`teacher` is None, but the objective asks one"):
        build_objective(soft_targets=0.4, teacher=MOMENTUM)(mixed_batch())


def test_an_image_and_its_document_are_never_negatives_of_each_other():
    """Two images, each also embedded as a document; a caption finds the image, another the document."""
    known = torch.eye(2)
    batch = ContrastiveBatch(
        query_embeds=known.repeat(2, 1),
        target_embeds=known.repeat(2, 1),
        target_index=torch.tensor([0, 1, 2, 3]),
        query_ids=torch.tensor([10, 11, 12, 13]),
        target_ids=torch.tensor([1, 2, 77, 78]),  # of a document the id is that of its row
        query_modality=torch.tensor([IMAGE, IMAGE, DOCUMENT, DOCUMENT]),
        target_modality=torch.tensor([IMAGE, IMAGE, DOCUMENT, DOCUMENT]),
        logit_scale=torch.tensor(100.0),
        logit_bias=None,
    )
    assert build_objective()(batch) < 1e-6
