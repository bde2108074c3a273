import torch

from benchmarks.setting import build_batch, build_model, micro_setting
from benchmarks.two_pass import two_pass_losses


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_packed_joint_step_equals_the_plain_one_in_losses_and_gradients():
    setting = micro_setting()
    model, batch = build_model(setting), build_batch(setting)
    torch.nn.init.normal_(model.pool_aggregator.output.weight, std=0.1)  # as a trained one attends
    plain_caption, plain_contrastive = two_pass_losses(model, **batch)
    plain = gradients(model, plain_caption + plain_contrastive)
    packed_outputs = model(**batch, return_loss=True)
    packed = gradients(model, packed_outputs.loss)

    torch.testing.assert_close(packed_outputs.caption_loss, plain_caption)
    torch.testing.assert_close(packed_outputs.contrastive_loss, plain_contrastive)
    assert packed.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
