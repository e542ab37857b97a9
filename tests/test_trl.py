"""Our GRPO loss against TRL's, each loss type, same model and batch. Skipped where trl is not installed."""
import pytest
import torch

trl = pytest.importorskip("trl")

import common  # noqa: E402
import grpo_baseline  # noqa: E402
from conftest import small_model, small_tokenizer  # noqa: E402


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_loss_equals_trl(tmp_path, loss_type):
    from datasets import Dataset
    config = trl.GRPOConfig(output_dir=str(tmp_path), loss_type=loss_type, epsilon=0.2, epsilon_high=0.28,
                            num_generations=4, beta=0.0, use_cpu=True, bf16=False,
                            per_device_train_batch_size=4, max_completion_length=6, temperature=0.7,
                            report_to=[])
    model = small_model()
    trainer = trl.GRPOTrainer(model=model, reward_funcs=lambda completions,
                              **kwargs: [0.0] * len(completions), args=config,
                              train_dataset=Dataset.from_list([{"prompt": "1"}] * 4),
                              processing_class=small_tokenizer())
    model = trainer.model.eval()
    torch.manual_seed(0)
    prompts, lengths = [[5, 6, 7], [9, 8, 7, 6, 5], [1], [2, 2]], [3, 6, 1, 4]
    completions = torch.randint(10, 250, (4, 6))
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    old = torch.randn(4, 6) * 0.3 + common.completion_logps(model, prompts, completions, mask,
                                                            0.7)[0].detach()
    advantages = torch.tensor([1.0, -0.5, 0.3, -1.2])
    theirs = trainer._compute_loss(model, {"prompt_ids": torch.tensor([[0] * (5 - len(p)) + p for p
            in prompts]), "prompt_mask": torch.tensor([[0] * (5 - len(p)) + [1] * len(p) for p in prompts]),
                                           "completion_ids": completions, "completion_mask": mask.long(),
                                           "advantages": advantages, "old_per_token_logps": old,
                                           "num_items_in_batch": mask.sum()})
    logps, _ = common.completion_logps(model, prompts, completions, mask, 0.7)
    per_token, _ = grpo_baseline.policy_loss(logps, old, advantages, mask, 0.2, 0.28)
    ours = (per_token * grpo_baseline.token_weights(mask, loss_type, 6)[:, None]).sum()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    grads = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss
             in (ours, theirs)]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
