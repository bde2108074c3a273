"""Two steps of training on two processes with FSDP2, and the second one again from the checkpoint after the first.

accelerate takes FSDP to be for accelerators only and, on a CPU, quietly trains with DDP; PyTorch's FSDP2 does run over
gloo. So accelerate is told here.
"""

import json
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from one_step import read_processor, rows
from tiny_models import build_model
from torchrun import leave

from mmgem.training.distributed import is_sharded
from mmgem.training.evaluation.evaluate import evaluate_model
from mmgem.training.trainer import trainer as trainer_module
from mmgem.training.trainer.trainer import MMGEMTrainer, MMGEMTrainingArguments

_initialize = AcceleratorState.__init__


def _initialize_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    _initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
CAPTIONED = {"eval_column": "captions"}
# Not saved: that alone would have FSDP forget the averages that an evaluation leaves gathered.
EMA = {"ema_decay": 0.5, "eval_on_start": True, "save_strategy": "no"}


def train(
    processor, folder: Path, batch_size: int, resume: str | None = None, eval_column="long_caption", **arguments
) -> dict:
    """What two steps log, and the metrics found after them; with `captions` to compare to, some are generated."""
    arguments = MMGEMTrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-2,
        adam_epsilon=0.1,  # a step is then smooth in its gradient, also where that is almost nothing
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    evaluated = [{"image": row["image"], eval_column: row["caption"]} for row in rows()]
    model = build_model()
    model.generation_config.update(num_beams=2, image_similarity_weight=1.0, allow_custom_entries=True)
    trainer = MMGEMTrainer(model, arguments, processing_class=processor, train_dataset=rows(), eval_dataset=evaluated)
    with patch.object(trainer_module, "evaluate_model", partial(evaluate_model, max_new_tokens=4)):
        trainer.train(resume_from_checkpoint=resume)
    names = ("loss", "caption_loss", "contrastive_loss", "grad_norm", "temperature")
    log = trainer.state.log_history
    steps = {entry["step"]: {name: entry[name] for name in names} for entry in log if "loss" in entry}
    metrics = [entry for entry in log if any(name.endswith("recall@1") for name in entry)]
    return {"steps": [steps[1], steps[2]], "metrics": metrics, "is_sharded": is_sharded(trainer.model)}


if __name__ == "__main__":
    AcceleratorState.__init__ = _initialize_with_fsdp
    root = Path(sys.argv[1])
    processor = read_processor(str(root / "tokenizer"))
    runs = {
        "captioned": train(processor, root / "run", 2, **CAPTIONED, **FSDP),
        "resumed": train(processor, root / "run", 2, str(root / "run" / "checkpoint-1"), **CAPTIONED, **FSDP),
        "cached": train(processor, root / "cached", 2, grad_cache_chunk_size=1, **EMA, **FSDP),
    }
    if dist.get_rank() == 0:
        (root / "report.json").write_text(json.dumps(runs))
    leave()
