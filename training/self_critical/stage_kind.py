"""Self-critical training as a stage of a recipe."""

from collections.abc import Iterator, Sequence, Sized
from typing import Any

from torch import nn

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.training.data.rows import captions_of, images_of
from mmgem.training.data.skipped import readable_texts
from mmgem.training.recipes.joint_stage import JointStage
from mmgem.training.self_critical.caption_reward import CaptionReward
from mmgem.training.self_critical.trainer import SelfCritical, SelfCriticalTrainer, check_can_draw

ROWS_READ = 20_000  # of each source, by which words weigh


class SelfCriticalStage(JointStage):
    """A stage of the joint loss and the reward of drawn captions. Its options are those of [`SelfCritical`]."""

    def check(self) -> None:
        self._check_options(SelfCritical)
        if "grad_cache_chunk_size" in self.stage.training:
            raise ValueError(
                f"`self_critical` and `grad_cache_chunk_size` of stage `{self.stage.name}` exclude each other; "
                "expected one of them."
            )

    def arguments(self) -> dict[str, Any]:
        return {}

    def trainer(self, model, arguments, processor, collator, train_dataset, eval_dataset=None) -> SelfCriticalTrainer:
        return SelfCriticalTrainer(
            model,
            arguments,
            processing_class=processor,
            data_collator=collator,
            reward=self._reward(getattr(train_dataset, "sources", [])),
            options=SelfCritical(**self.stage.options),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
        )

    def try_on_meta(self, model: MMGEMModel) -> nn.Module:
        trained = self._select_trained(model)
        check_can_draw(trained)
        return trained

    def _reward(self, sources: Sequence) -> CaptionReward:
        """Words weighed by the captions of the images of all sources."""
        if streams := [source.name for source in sources if not isinstance(source, Sized)]:
            raise ValueError(
                f"`train_data` of stage `{self.stage.name}` has the stream {streams[0]}, whose captions cannot be "
                "counted beforehand; expected files on this machine for `self_critical`."
            )
        try:
            return CaptionReward(captions for source in sources for captions in _captions(source))
        except ValueError as error:
            raise ValueError(f"`train_data` of stage `{self.stage.name}`: {error}") from error


def _captions(source) -> Iterator[Sequence[str]]:
    """The captions of images of a source, by rows from all over it."""
    places = range(0, len(source), max(1, len(source) // ROWS_READ))
    for row in readable_texts(source, places):
        if images_of(row) and captions_of(row):
            yield captions_of(row)
