"""The loss of grpo_baseline.py against TRL's on the same model and batch; skipped if trl is missing."""
import pytest
import torch

import grpo_baseline
from conftest import small_model, small_tokenizer
from test_update import args_of, error, example, rollout_of

trl = pytest.importorskip("trl")


def trl_loss(model, ro, old_logps, advantages, loss_type: str, folder):
    """Return the loss of TRL's trainer."""
    from datasets import Dataset
    config = trl.GRPOConfig(
        str(folder),
        loss_type=loss_type,
        epsilon=0.2,
        epsilon_high=0.28,
        beta=0.0,
        num_generations=12,
        per_device_train_batch_size=12,
        max_completion_length=6,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    data = Dataset.from_list([{"prompt": "1"}] * 12)
    trainer = trl.GRPOTrainer(model, lambda **kwargs: [], config, data, processing_class=small_tokenizer())
    width = max(map(len, ro.prompts))
    padding = [width - len(prompt) for prompt in ro.prompts]  # on the left
    prompt_ids = [[0] * n + prompt for n, prompt in zip(padding, ro.prompts)]
    prompt_mask = [[0] * n + [1] * (width - n) for n in padding]
    return trainer._compute_loss(model, {
        "prompt_ids": torch.tensor(prompt_ids),
        "prompt_mask": torch.tensor(prompt_mask),
        "completion_ids": ro.completions,
        "completion_mask": ro.mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old_logps,
        "num_items_in_batch": ro.mask.sum(),
    })


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_loss_equals_trl(tmp_path, loss_type):
    model = small_model()
    ro = rollout_of(grpo_baseline, example())
    advantages = torch.linspace(-1, 1, 12)
    logps, _ = grpo_baseline.token_logps(model, ro, list(range(12)), args_of(grpo_baseline))
    log_ratios = torch.linspace(-0.4, 0.4, 72).view(12, 6)  # some are clipped
    old_logps = logps.detach() - log_ratios
    losses, _ = grpo_baseline.policy_loss(logps, old_logps, advantages, ro.mask, 0.2, 0.28)
    weights = grpo_baseline.token_weights(ro.mask, loss_type, 6, 12, ro.mask.sum())
    ours = (losses * weights[:, None]).sum()
    theirs = trl_loss(model, ro, old_logps, advantages, loss_type, tmp_path)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    gradients = []
    for loss in (ours, theirs):
        parts = torch.autograd.grad(loss, list(model.parameters()))
        gradients.append(torch.cat([part.flatten() for part in parts]))
    assert error(*gradients) < 1e-5
