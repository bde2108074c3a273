"""InfoNCE over the batch of all processes, as a class with five hooks."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .contrastive_batch import DOCUMENT, ContrastiveBatch
from .late_interaction import similarity

SCORES_AT_ONCE = 2**20  # similarities in memory: above, the loss goes block by block, and once more for the gradients


@dataclass
class Ranking:
    """Anchors against candidates, one direction of the loss: A texts against all targets, or A targets against all
    texts.

    Args:
        scores: (A, C) similarities, from the hook `score`.
        describes: (A, C) bool, whether text and target belong together by their ids.
        other_modality: (A, C) bool, whether one is of an image and the other of a region, or of a document.
        positive: (A,) long, the candidate that makes a pair with the anchor.
        logit_scale: Scalar, the inverse temperature.
        logit_bias: Scalar, or None.
        teacher_scores: (A, C) similarities of a teacher's embeddings, without gradients, or None.
        teacher_scale: Scalar, the teacher's inverse temperature, or None.
    """

    scores: torch.Tensor
    describes: torch.Tensor
    other_modality: torch.Tensor
    positive: torch.Tensor
    logit_scale: torch.Tensor
    logit_bias: torch.Tensor | None = None
    teacher_scores: torch.Tensor | None = None
    teacher_scale: torch.Tensor | None = None

    @property
    def logits(self) -> torch.Tensor:
        """(A, C)"""
        logits = self.logit_scale * self.scores
        return logits if self.logit_bias is None else logits + self.logit_bias

    @property
    def other_positives(self) -> torch.Tensor:
        """(A, C) bool, the candidates that belong to the anchor too, beside its `positive`."""
        return self.describes.scatter(1, self.positive[:, None], False)


class Pairs:
    """The texts and targets of all processes, as rankings of some of them against all others.

    Args:
        objective: The objective whose `score` compares them.
        batch, teacher: Gathered, in float32.

    Attributes:
        describing: (S,) long, the texts that describe something.
        counts: (Q,) long, for each text the number of describing ones of its modality.
    """

    def __init__(
        self, objective: "ContrastiveObjective", batch: ContrastiveBatch, teacher: ContrastiveBatch | None = None
    ):
        self.objective, self.batch, self.teacher = objective, batch, teacher
        self.describing = (batch.target_index >= 0).nonzero()[:, 0]
        counts = batch.query_modality[self.describing].bincount(minlength=DOCUMENT + 1).clamp(min=1)  # (3,)
        self.counts = counts[batch.query_modality]
        # Equal texts, and copies of a target, get one number, and a table says which belong together.
        _, self._text = batch.query_ids.unique(return_inverse=True)  # (Q,)
        targets = torch.stack([batch.target_ids, batch.target_modality])
        _, self._target = targets.unique(dim=1, return_inverse=True)  # (P,)
        self._describes = torch.zeros(
            len(batch.query_ids), len(batch.target_ids), dtype=torch.bool, device=self._text.device
        )
        own = batch.target_index[self.describing]  # (S,)
        self._describes[self._text[self.describing], self._target[own]] = True

    @property
    def has_several_vectors(self) -> bool:
        """Whether it matters which side asks."""
        return self.batch.target_embeds.ndim == 3

    def by_text(self, rows: torch.Tensor, targets_ask: bool = False) -> "Ranking":
        """(A,) texts against all P targets; `positive` is -1 for hard negatives. The queries are the texts, unless
        `targets_ask`.
        """
        matrices = self._compare(rows, slice(None), targets_ask)
        return self._ranking(matrices, self.batch.target_index[rows])

    def by_target(self, rows: torch.Tensor, targets_ask: bool = True) -> "Ranking":
        """The targets that (A,) texts were written for against all Q texts; `targets_ask` as for `by_text`."""
        matrices = self._compare(slice(None), self.batch.target_index[rows], targets_ask)
        return self._ranking({name: matrix.T for name, matrix in matrices.items()}, rows)

    def _ranking(self, matrices: dict[str, torch.Tensor], positive: torch.Tensor) -> "Ranking":
        return Ranking(
            **matrices,
            positive=positive,
            logit_scale=self.batch.logit_scale,
            logit_bias=self.batch.logit_bias,
            teacher_scale=None if self.teacher is None else self.teacher.logit_scale.detach(),
        )

    def _compare(
        self, texts: torch.Tensor | slice, targets: torch.Tensor | slice, targets_ask: bool
    ) -> dict[str, torch.Tensor]:
        """The matrices of a [`Ranking`], texts in rows."""

        def scores(embedded: ContrastiveBatch) -> torch.Tensor:
            text_embeds, target_embeds = embedded.query_embeds[texts], embedded.target_embeds[targets]
            score = self.objective.score
            return score(target_embeds, text_embeds).T if targets_ask else score(text_embeds, target_embeds)

        batch = self.batch
        query_modality, target_modality = batch.query_modality[texts][:, None], batch.target_modality[targets]
        matrices = {
            "scores": scores(batch),
            "describes": self._describes[self._text[texts][:, None], self._target[targets]],
            "other_modality": query_modality != target_modality,
        }
        if self.teacher is not None:
            with torch.no_grad():
                matrices["teacher_scores"] = scores(self.teacher)
        return matrices


class ContrastiveObjective:
    """Symmetric InfoNCE (CLIP, https://arxiv.org/abs/2103.00020) over the texts, images and regions of all processes.

    For a text q with its target p, score s and inverse temperature t:

        loss(q) = -1/2 log( exp(t s(q, p)) / sum over targets p' of exp(t s(q, p')) )
                  -1/2 log( exp(t s(p, q)) / sum over texts q' of exp(t s(p, q')) )

    The first argument of s is the query: with several vectors of each, MaxSim differs by the side that asks, and both
    are trained to ask.

    The loss of the batch is the mean over the texts of images, plus the mean over those of regions, plus the mean over
    those of documents. A text describes a target if it is one of the captions of a target with that id, or is equal to
    one of them. A text and a target that belong together are never negatives of each other: only p and q stand in the
    sums. Images and regions are never each other's negatives (modality-aware masking, UNITE,
    https://arxiv.org/abs/2505.19650). Hard negatives are candidates for images, never anchors (NegCLIP,
    https://arxiv.org/abs/2210.01936). With one caption per image, and no boxes, this
    is CLIP's loss.

    Subclasses change it by five hooks: `views`, `score`, `mask`, `weights` and `targets`.
    """

    def views(self, batch: ContrastiveBatch) -> list[ContrastiveBatch]:
        """Forms of the gathered batch, such as parts of its embeddings; the loss is the mean of those of each."""
        return [batch]

    def score(self, query_embeds: torch.Tensor, document_embeds: torch.Tensor) -> torch.Tensor:
        """(Q, D), (P, D) -> (Q, P) similarities: the cosine; MaxSim of (Q, k, D) and (P, m, D)."""
        return similarity(query_embeds, document_embeds)

    def mask(self, ranking: Ranking) -> torch.Tensor:
        """(A, C) bool, the candidates left out of the sum; never the anchor's `positive`."""
        return ranking.other_modality | ranking.other_positives

    def weights(self, ranking: Ranking) -> torch.Tensor | None:
        """(A, C) logarithms of the weights that candidates have in the sum; None if all weigh the same."""
        return None

    def targets(self, ranking: Ranking, left_out: torch.Tensor) -> torch.Tensor:
        """What the softmax should be: (A,) long, a candidate for each anchor, or (A, C), probabilities of them all."""
        return ranking.positive

    def __call__(self, batch: ContrastiveBatch, teacher: ContrastiveBatch | None = None) -> torch.Tensor:
        """Compute the loss over the batches of all processes.

        Args:
            batch: Of this process.
            teacher: The same texts and targets in the same order, embedded by a teacher; where a hook asks for it.

        Returns:
            Scalar, computed in float32, the same on every process; a 0 with gradients if no text describes anything.

        Raises:
            ValueError: If the shapes of the batch, or of its teacher's, do not fit together.
        """
        batch.check()
        if teacher is not None:
            teacher.check()
            sizes, expected = [(len(b.query_embeds), len(b.target_embeds)) for b in (teacher, batch)]
            if sizes != expected:
                raise ValueError(f"`teacher` holds {sizes} texts and targets; expected those of `batch`, {expected}.")
            teacher = teacher.gather().in_float32()
        batch = batch.gather().in_float32()
        if (batch.target_index < 0).all():
            parts = batch.query_embeds, batch.target_embeds, batch.logit_scale, batch.logit_bias
            return sum(part.sum() for part in parts if part is not None) * 0.0
        with torch.autocast(batch.query_embeds.device.type, enabled=False):
            losses = [self._loss_of_view(view, teacher) for view in self.views(batch)]
            return torch.stack(losses).mean()

    def _loss_of_view(self, batch: ContrastiveBatch, teacher: ContrastiveBatch | None) -> torch.Tensor:
        pairs = Pairs(self, batch, teacher)
        vectors = (
            1 if batch.target_embeds.ndim == 2 else max(batch.query_embeds.shape[1], batch.target_embeds.shape[1])
        )
        size = max(1, SCORES_AT_ONCE // (vectors * max(len(batch.query_ids), len(batch.target_ids))))
        blocks = self.anchors(pairs).split(size)
        if len(blocks) == 1:
            return self.loss(pairs, blocks[0])
        return sum(checkpoint(self.loss, pairs, block, use_reentrant=False) for block in blocks)

    def anchors(self, pairs: Pairs) -> torch.Tensor:
        """(A,) long, the texts whose losses make up that of the batch."""
        return pairs.describing

    def loss(self, pairs: Pairs, rows: torch.Tensor) -> torch.Tensor:
        """What the texts `rows`, (A,) long, contribute to the loss."""
        losses = self._cross_entropy(pairs.by_text(rows)) + self._cross_entropy(pairs.by_target(rows))  # (A,)
        return (losses / 2 / pairs.counts[rows]).sum()

    def _cross_entropy(self, ranking: Ranking) -> torch.Tensor:
        """(A,)"""
        left_out, weights = self.mask(ranking), self.weights(ranking)
        logits = ranking.logits if weights is None else ranking.logits + weights
        logits = logits.masked_fill(left_out, torch.finfo(logits.dtype).min)
        return F.cross_entropy(logits, self.targets(ranking, left_out), reduction="none")
