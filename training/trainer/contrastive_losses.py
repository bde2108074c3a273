"""The contrastive losses that a recipe can ask for. A new one is a class, and its name in `LOSSES`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from mmgem.configuration_mmgem import MMGEMConfig
from mmgem.contrastive import ContrastiveObjective, Pairs, Ranking
from mmgem.contrastive_batch import ContrastiveBatch
from mmgem.training.argument_checks import check_arguments, check_keys, check_type
from mmgem.training.trainer.latent_alignment import mix_latents, structure_loss

TEACHERS = {"momentum": float, "pretrained": str}


@dataclass(kw_only=True)
class MaskedObjective(ContrastiveObjective):
    """The base of the losses: it leaves out negatives, and takes a loss of parts of the embeddings too.

    Args:
        false_negative_threshold: The similarity with the anchor above which negatives are left out, as they are
            probably none; with cosines, a threshold above 1 leaves out nothing.
        vector_groups: For embeddings of k vectors, pairs of how many of them, from the first on, the texts and the
            targets have, such as `[[1, 1], [2, 4], [4, 8]]`, each pair with a loss of its own, so that any of them can
            be chosen when searching (MetaEmbed, https://arxiv.org/abs/2509.18095); by default all k.
        dimensions: Numbers of dimensions, from the first on, each with a loss of its own beside that of all of them
            (Matryoshka representations, https://arxiv.org/abs/2205.13147); of k vectors, the first group's.
        fusemix: The alpha of [`mmgem.training.trainer.latent_alignment.mix_latents`], by which pairs of cached
            features are mixed; by default they are not.
        structure: The weight of [`mmgem.training.trainer.latent_alignment.structure_loss`], which keeps the
            neighbourhoods of cached features (its authors have 10). It is added to the contrastive loss, and logged
            in it.
        structure_levels: The levels of these neighbourhoods.

    Attributes:
        teacher: The model that embeds each batch beside the one in training, if a loss asks one; see [`InfoNCE`].

    Raises:
        ValueError: If the threshold is not a finite number, groups or dimensions do not grow, groups are not pairs, or
            another number is out of its range.
    """

    false_negative_threshold: float | None = None
    vector_groups: list | None = None
    dimensions: list[int] | None = None
    fusemix: float | None = None
    structure: float = 0.0
    structure_levels: int = 1
    teacher: dict[str, Any] | None = field(default=None, init=False)

    def __post_init__(self):
        _check_range("false_negative_threshold", self.false_negative_threshold)
        if self.vector_groups is not None:
            _check_groups(self.vector_groups)
        if self.dimensions is not None:
            check_type(self.dimensions, list[int], "`dimensions`")
            _check_growing("dimensions", [0, *self.dimensions])
        if self.fusemix is not None and not 0 < self.fusemix < math.inf:
            raise ValueError(f"`fusemix` is {self.fusemix}; expected a number above 0, such as 1.")
        _check_range("structure", self.structure, lowest=0.0)
        if self.structure_levels < 1:
            raise ValueError(f"`structure_levels` is {self.structure_levels}; expected 1 or more.")

    def check(self, config: MMGEMConfig) -> None:
        """Refuse a model that lacks what the loss needs, before anything is trained.

        Args:
            config: The configuration of the model.

        Raises:
            ValueError: If the model does not have it; the message names the option and what the model has.
        """
        if self.vector_groups is not None:
            if config.embedding_pooling != "multi_vector":
                raise ValueError(
                    f"`vector_groups` is {self.vector_groups}, but `embedding_pooling` is "
                    f"{config.embedding_pooling!r}; expected 'multi_vector'."
                )
            if max(self.vector_groups[-1]) > config.num_embedding_tokens:
                raise ValueError(
                    f"`vector_groups` is {self.vector_groups}; expected at most `num_embedding_tokens`, "
                    f"{config.num_embedding_tokens}."
                )
        if self.dimensions is not None and self.dimensions[-1] > config.projection_dim:
            raise ValueError(
                f"`dimensions` is {self.dimensions}; expected at most `projection_dim`, {config.projection_dim}."
            )
        if self.structure and config.is_multi_vector:
            raise ValueError(
                f"`structure` is {self.structure}, but `embedding_pooling` is 'multi_vector'; expected embeddings of "
                "one vector."
            )

    def mixed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return a batch for the model as it is to be trained with: mixed, if `fusemix` says so."""
        return inputs if self.fusemix is None else mix_latents(inputs, self.fusemix)

    def regularization(
        self, inputs: Mapping[str, Any], image_embeds: torch.Tensor, text_embeds: torch.Tensor
    ) -> torch.Tensor | float:
        """Return what is added to the loss of a batch of this process; arguments as for `structure_loss`."""
        if not self.structure:
            return 0.0
        return self.structure * structure_loss(inputs, image_embeds, text_embeds, self.structure_levels)

    def views(self, batch: ContrastiveBatch) -> list[ContrastiveBatch]:
        """Return the batch with those parts of the embeddings that have a loss; the loss is the mean of theirs.

        Raises:
            ValueError: If the embeddings have fewer vectors or dimensions than are asked for.
        """
        views = [batch]
        if self.vector_groups is not None:
            shapes = [tuple(embeds.shape[1:-1]) for embeds in (batch.query_embeds, batch.target_embeds)]
            if any(not shape or shape[0] < count for shape, count in zip(shapes, self.vector_groups[-1], strict=True)):
                raise ValueError(
                    f"`vector_groups` goes up to {self.vector_groups[-1]}; expected no more vectors than texts and "
                    f"targets have, {shapes}."
                )
            views = [
                replace(
                    batch,
                    query_embeds=batch.query_embeds[:, :query_count],  # (Q, q, D)
                    target_embeds=batch.target_embeds[:, :target_count],  # (P, t, D)
                )
                for query_count, target_count in self.vector_groups
            ]
        whole = batch.query_embeds.shape[-1]
        if self.dimensions is not None and self.dimensions[-1] > whole:
            raise ValueError(f"`dimensions` goes up to {self.dimensions[-1]}; expected at most {whole}.")
        return [*views, *(_narrowed(views[0], width) for width in self.dimensions or () if width < whole)]

    def mask(self, ranking: Ranking) -> torch.Tensor:
        left_out = ranking.other_modality  # (A, C)
        if self.false_negative_threshold is not None:
            left_out = left_out | (~ranking.describes & (ranking.scores > self.false_negative_threshold))
        return left_out


@dataclass(kw_only=True)
class InfoNCE(MaskedObjective):
    """[`ContrastiveObjective`] with options, also those of [`MaskedObjective`]; without any it is the same.

    With s(a, c) the similarity of an anchor and a candidate, p the anchor's positive and t the inverse temperature,
    the loss of an anchor is the cross-entropy between target probabilities q(c) and

        softmax over c of  t s(a, c) + hardness * stop_gradient(s(a, c)) * [c is a negative]

    Args:
        all_positives: Whether q is uniform over all candidates that belong to the anchor by their ids (SupCon's "out"
            form, https://arxiv.org/abs/2004.11362); by default q(p) is 1 and the others are left out.
        false_negative_margin: The margin by which negatives with s(a, c) > s(a, p) + margin are left out (Qwen3
            Embedding, https://arxiv.org/abs/2506.05176, has 0.1).
        false_negative_teacher_margin: The same with a teacher's similarities (GISTEmbed,
            https://arxiv.org/abs/2402.16829, has 0).
        hardness: The weight of harder negatives over easier ones, 0 or more (LLaVE, https://arxiv.org/abs/2503.04812,
            has 9; RzenEmbed, https://arxiv.org/abs/2510.27350).
        soft_targets: The share of a teacher in the targets, in [0, 1]: (1 - share) q + share * softmax of its scaled
            similarities (ALBEF, https://arxiv.org/abs/2107.07651, has 0.4).
        teacher: `{"momentum": 0.995}`, a moving average of the model, or `{"pretrained": folder}`; for the two options
            that ask for one.

    Raises:
        ValueError: If a value is out of its range, options exclude each other, or a teacher is missing or useless.
    """

    all_positives: bool = False
    false_negative_margin: float | None = None
    false_negative_teacher_margin: float | None = None
    hardness: float = 0.0
    soft_targets: float | None = None
    teacher: dict[str, Any] | None = None

    def __post_init__(self):
        super().__post_init__()
        _check_range("false_negative_margin", self.false_negative_margin)
        _check_range("false_negative_teacher_margin", self.false_negative_teacher_margin)
        _check_range("hardness", self.hardness, lowest=0.0)
        _check_range("soft_targets", self.soft_targets, lowest=0.0, highest=1.0)
        by = ("false_negative_threshold", "false_negative_margin", "false_negative_teacher_margin")
        given = [name for name in by if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"`{given[0]}` and `{given[1]}` exclude each other; expected one of them.")
        if self.hardness and self.soft_targets is not None:
            raise ValueError(
                "`hardness` and `soft_targets` exclude each other; expected one of them, since with soft targets no "
                "candidate is only a negative."
            )
        self._check_teacher()

    def _check_teacher(self):
        asking = [n for n in ("soft_targets", "false_negative_teacher_margin") if getattr(self, n) is not None]
        if self.teacher is None:
            if asking:
                raise ValueError(f"`teacher` is None; expected one for `{asking[0]}`, such as {{momentum: 0.995}}.")
            return
        check_keys(self.teacher, TEACHERS, "`teacher`")
        if not asking:
            raise ValueError(
                f"`teacher` is {self.teacher}; expected `soft_targets` or `false_negative_teacher_margin` to ask it."
            )
        if len(self.teacher) != 1:
            raise ValueError(f"`teacher` has the keys {sorted(self.teacher)}; expected one of {', '.join(TEACHERS)}.")
        [(name, value)] = self.teacher.items()
        check_type(value, TEACHERS[name], f"`{name}` of the `teacher`")
        if name == "momentum":
            _check_range(name, value, lowest=0.0, highest=1.0)

    def mask(self, ranking: Ranking) -> torch.Tensor:
        left_out = super().mask(ranking)
        if not self.all_positives:
            left_out = left_out | ranking.other_positives
        margin, scores = self.false_negative_margin, ranking.scores
        if self.false_negative_teacher_margin is not None:
            margin, scores = self.false_negative_teacher_margin, _teacher_of(ranking)[0]
        if margin is not None:
            of_positive = scores.gather(1, ranking.positive[:, None])  # (A, 1)
            left_out = left_out | (~ranking.describes & (scores > of_positive + margin))
        return left_out

    def weights(self, ranking: Ranking) -> torch.Tensor | None:
        if not self.hardness:
            return None
        return (self.hardness * ranking.scores.detach()).masked_fill(ranking.describes, 0.0)

    def targets(self, ranking: Ranking, left_out: torch.Tensor) -> torch.Tensor:
        if not self.all_positives and self.soft_targets is None:
            return ranking.positive
        right = (ranking.describes & ~left_out).to(ranking.scores.dtype)  # (A, C)
        targets = right / right.sum(-1, keepdim=True)
        if self.soft_targets is None:
            return targets
        scores, scale = _teacher_of(ranking)
        logits = scale * scores
        teacher = logits.masked_fill(left_out, torch.finfo(logits.dtype).min).softmax(-1)
        return torch.lerp(targets, teacher, self.soft_targets)


@dataclass(kw_only=True)
class PairwiseSigmoid(MaskedObjective):
    """SigLIP's loss (https://arxiv.org/abs/2303.15343): every pair of a text and a target is told right from wrong
    alone.

        -1/N * sum over texts q and targets p of  log sigmoid(z(q, p) (t s(q, p) + b))

    where z is 1 if the text describes the target and -1 if not, and N is the number of texts that describe something.
    With several vectors of each it is the mean with that of s(p, q), in which the target asks. Texts of images and of
    regions each have their N, and the two losses are added. Its options are those of [`MaskedObjective`].
    """

    def check(self, config: MMGEMConfig) -> None:
        super().check(config)
        if config.logit_bias_init_value is None:
            raise ValueError(
                "`logit_bias_init_value` is None; expected a number in the configuration of the model, such as -10, "
                "for the loss `sigmoid`."
            )

    def anchors(self, pairs: Pairs) -> torch.Tensor:
        if pairs.batch.logit_bias is None:
            raise ValueError(
                "`logit_bias` of the batch is None; expected a model with `logit_bias_init_value`, such as -10, for "
                "the loss `sigmoid`."
            )
        return torch.arange(len(pairs.batch.query_ids), device=pairs.describing.device)  # hard negatives too

    def loss(self, pairs: Pairs, rows: torch.Tensor) -> torch.Tensor:
        losses = []
        for targets_ask in (False, True) if pairs.has_several_vectors else (False,):
            ranking = pairs.by_text(rows, targets_ask)
            wrong = torch.where(ranking.describes, -ranking.logits, ranking.logits)  # (A, P)
            losses.append(F.softplus(wrong).masked_fill(self.mask(ranking), 0.0).sum(-1))  # (A,)
        return (torch.stack(losses).mean(0) / pairs.counts[rows]).sum()


LOSSES: dict[str, type[MaskedObjective]] = {"infonce": InfoNCE, "sigmoid": PairwiseSigmoid}


def build_objective(loss: str = "infonce", **options: Any) -> MaskedObjective:
    """Build the contrastive objective of a recipe's section. Hard negatives are no option: they come with the data.

    Args:
        loss: A name in `LOSSES`: `infonce` or `sigmoid`.
        options: Arguments of its class, [`InfoNCE`] or [`PairwiseSigmoid`].

    Raises:
        ValueError: If a loss or an option is unknown (the nearest one is named), a value is of a wrong type or out of
            its range, or options exclude each other.
    """
    if not isinstance(loss, str) or loss not in LOSSES:
        raise ValueError(f"`loss` is {loss!r}; expected {' or '.join(LOSSES)}.")
    check_arguments(options, LOSSES[loss], f"the objective `{loss}`")
    return LOSSES[loss](**options)


def _check_groups(groups: object) -> None:
    """Nested: each group holds the one before it, on both sides, and is larger on one."""
    is_pair = (
        isinstance(groups, Sequence)
        and len(groups) > 0
        and all(
            isinstance(group, Sequence) and len(group) == 2 and all(type(n) is int and n > 0 for n in group)
            for group in groups
        )
    )
    if not is_pair:
        raise ValueError(
            f"`vector_groups` is {groups!r}; expected pairs of whole numbers above 0, such as [[1, 1], [4, 8]]."
        )
    assert isinstance(groups, Sequence)
    for group, larger in zip(groups, groups[1:], strict=False):
        if list(group) == list(larger) or any(n > m for n, m in zip(group, larger, strict=True)):
            raise ValueError(
                f"`vector_groups` is {groups!r}; expected nested groups, but {larger} does not hold {group}."
            )


def _check_growing(name: str, numbers: list[int]) -> None:
    if len(numbers) < 2 or any(n >= m for n, m in zip(numbers, numbers[1:], strict=False)):
        raise ValueError(f"`{name}` is {numbers[1:]}; expected whole numbers above 0 that grow.")


def _narrowed(batch: ContrastiveBatch, width: int) -> ContrastiveBatch:
    """The first dimensions of embeddings, of unit length again."""
    query_embeds, target_embeds = (
        F.normalize(embeds[..., :width], dim=-1) for embeds in (batch.query_embeds, batch.target_embeds)
    )
    return replace(batch, query_embeds=query_embeds, target_embeds=target_embeds)


def _check_range(name: str, value: float | None, lowest: float = -math.inf, highest: float = math.inf):
    if value is None:
        return
    if not math.isfinite(value):
        raise ValueError(f"`{name}` is {value}; expected a finite number.")
    if not lowest <= value <= highest:
        between = f"between {lowest:g} and {highest:g}" if math.isfinite(highest) else f"of {lowest:g} or more"
        raise ValueError(f"`{name}` is {value}; expected a number {between}.")


def _teacher_of(ranking: Ranking) -> tuple[torch.Tensor, torch.Tensor]:
    """Its similarities (A, C) and its scale."""
    if ranking.teacher_scores is None or ranking.teacher_scale is None:
        raise ValueError("`teacher` is None, but the objective asks one; expected the batch as the teacher embeds it.")
    return ranking.teacher_scores, ranking.teacher_scale
