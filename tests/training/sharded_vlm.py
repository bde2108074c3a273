"""A model that began as a VLM on two processes with FSDP2: it writes, embeds and learns as on one."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torchrun import leave
from vlms import build_vlm, build_vlm_processor, vlm_inputs

from mmgem.modeling_mmgem import MMGEMModel
from mmgem.training.distributed import adapt_to_fsdp, whole
from mmgem.training.inference import inference


def outputs_of(model: MMGEMModel) -> list[torch.Tensor]:
    """What it writes before any other call, scores and embeds."""
    inputs = vlm_inputs("gemma3")
    written = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    images = model.get_image_features(inputs["pixel_values"]).pooler_output
    return [written, model(**inputs).logits, model.get_multimodal_features(**inputs).pooler_output, images]


def learn(model: MMGEMModel) -> torch.Tensor:
    """One joint step; the gradient of the connector."""
    inputs = vlm_inputs("gemma3")
    texts = torch.tensor([[5, 6, 7], [8, 9, 0]])
    model(input_ids=texts, pixel_values=inputs["pixel_values"], return_loss=True).loss.backward()
    return whole(model.connector.multi_modal_projector.mm_input_projection_weight.grad)


def main():
    dist.init_process_group("gloo")
    vlm, processor = build_vlm("gemma3"), build_vlm_processor("gemma3")
    model = MMGEMModel.from_vlm(vlm, processor=processor, projection_dim=16, num_visual_tokens=4)
    with inference(model):
        expected = outputs_of(model)
    expected.append(learn(model))
    model.zero_grad()
    mesh = dist.init_device_mesh("cpu", (2,))
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    adapt_to_fsdp(model)
    with inference(model):
        found = outputs_of(model)
    found.append(learn(model))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


if __name__ == "__main__":
    main()
    leave()
