"""update() of grpo_baseline.py and sgpo.py against tests/reference.py; what must not change its gradient."""
import copy
import math
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from pytest import approx
from torch import Tensor

import common
import grpo_baseline
import reference
import sgpo
from conftest import IM_END, small_model

BOTH = pytest.mark.parametrize("script", [grpo_baseline, sgpo])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Make the logits of four tokens at a time, so that every update has several chunks."""
    monkeypatch.setattr(common, "CHUNK_LOGITS", 4 * 272)


# ---------------------------------------------------------------- an example

def example(order=range(4)) -> list[reference.Problem]:
    """Return four problems with three autonomous and two guided samples each, of 1 to 6 tokens."""
    random = np.random.default_rng(3)

    def samples(count: int) -> list[list[int]]:
        lengths = random.integers(1, 7, count)
        return [random.integers(10, 250, length).tolist() for length in lengths]

    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [1], [2, 2, 9, 1]]
    rewards = [[1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 1]]
    guided_rewards = [[1, 1], [1, 0], [1, 1], [0, 0]]
    problems = []
    for q, prompt in enumerate(prompts):
        problem = reference.Problem(prompt, samples(3), rewards[q])
        problem.guided_prompt = [70, 71, 72, *prompt]
        problem.guided_completions = samples(2)
        problem.guided_rewards = guided_rewards[q]
        problems.append(problem)
    problems[0].completions[0][-1] = IM_END
    problems[0].guided_completions[0][-1] = IM_END
    return [problems[q] for q in order]


def rollout_of(script, problems: list[reference.Problem], width: int = 6):
    """Return the problems' samples as a rollout, padded with the end token, as generate does."""
    prompts = [p.prompt for p in problems for _ in p.completions]
    sampling_prompts = list(prompts)
    completions = [o for p in problems for o in p.completions]
    if script is sgpo:
        prompts += [p.prompt for p in problems for _ in p.guided_completions]
        sampling_prompts += [p.guided_prompt for p in problems for _ in p.guided_completions]
        completions += [g for p in problems for g in p.guided_completions]
    padded = [(o + [IM_END] * width)[:width] for o in completions]
    lengths = torch.tensor([len(o) for o in completions])
    mask = torch.arange(width) < lengths[:, None]
    fields = {"prompts": prompts, "completions": torch.tensor(padded), "mask": mask}
    if script is sgpo:
        fields["sampling_prompts"] = sampling_prompts
    nothing = torch.zeros(mask.shape)
    return script.Rollout(**fields, truncated=None, texts=None, sampler_logps=nothing, kept_mass=nothing)


def rewards_of(problems: list[reference.Problem]) -> Tensor:
    return torch.tensor([p.rewards for p in problems]).float()


class Step(NamedTuple):
    model: torch.nn.Module  # before the step
    gradient: Tensor


def gradient_descent(model, lr: float = 0.05) -> tuple[torch.optim.Optimizer, list[Step]]:
    """Return an optimizer and a list to which it adds its steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr)
    return optimizer, record_steps(model, optimizer)


def record_steps(model, optimizer) -> list[Step]:
    steps = []

    def record(*_) -> None:
        parts = [p.grad.flatten() for p in model.parameters()]
        steps.append(Step(copy.deepcopy(model), torch.cat(parts)))

    optimizer.register_step_pre_hook(record)
    return steps


def args_of(script, **flags):
    settings = {"group_size": 3, "max_new_tokens": 6, "max_grad_norm": 1e9, "bf16": False,
                "microbatch_tokens": 16384}
    if script is sgpo:
        settings |= {"guided_group_size": 2, "delta": 2.0}
    return script.Args(**{**settings, **flags})


def run_update(script, model=None, problems=None, A=None, width=6, **flags):
    """Run update() with plain gradient descent; return its steps and its metrics."""
    model = model or small_model()
    problems = problems or example()
    args = args_of(script, **flags)
    optimizer, steps = gradient_descent(model)
    ro = rollout_of(script, problems, width)
    rewards = rewards_of(problems)
    if A is None:
        A = script.group_advantages(rewards, args.scale_rewards).flatten()
    if script is grpo_baseline:
        return steps, script.update(model, optimizer, ro, A, args)
    guided_rewards = torch.tensor([p.guided_rewards for p in problems])
    all_rewards = torch.cat([rewards.flatten(), guided_rewards.flatten()])
    guidance, guided_metrics = sgpo.weigh_problems(all_rewards, [0, 1, 2, 3], 4, args)
    if not args.autonomous_grpo:
        A = torch.zeros(12)
    metrics = sgpo.update(model, optimizer, ro, A, guidance, args)
    return steps, metrics | guided_metrics


def gradient_of(script, *inputs, **flags) -> Tensor:
    steps, _ = run_update(script, *inputs, **flags)
    return steps[0].gradient


def error(ours: Tensor, exact: Tensor) -> float:
    """Return the relative error of a gradient."""
    assert exact.abs().max() > 1e-3  # there is something to compare
    difference = (ours - exact).norm()
    return (difference / exact.norm()).item()


# ---------------------------------------------------------------- the gradient is the paper's

def test_the_references_log_probs_are_those_of_transformers_own_loss():
    model = small_model()
    ids = torch.tensor([[5, 6, 7, 20, 30, 40]])
    labels = ids.clone()
    labels[:, :3] = -100  # the prompt
    mean_loss = model(ids, labels=labels).loss.item()
    ours = reference.sum_logp(model, [5, 6, 7], [20, 30, 40], args_of(sgpo))
    assert ours == approx(-3 * mean_loss)


GRPO_FLAGS = [
    {},
    {"loss_type": "dapo"},
    {"loss_type": "dr_grpo"},
    {"temperature": 0.7},
    {"scale_rewards": "batch"},
    {"scale_rewards": "none"},
]
SGPO_FLAGS = [
    {},
    {"loss_type": "dapo"},
    {"temperature": 0.7},
    {"delta": 0.5},
    {"delta": math.inf},
    {"target": "all"},
    {"alpha_max": 9.0},
    {"weight": "fixed"},
    {"weight": "group_advantage", "alpha_max": 9.0},
    {"distill": "reverse_kl"},
    {"distill": "sft"},
    {"autonomous_grpo": False},
]
SETTINGS = [
    *[(grpo_baseline, flags) for flags in GRPO_FLAGS],
    *[(sgpo, flags) for flags in SGPO_FLAGS],
]


def check_steps(steps: list[Step], metrics: dict, method_loss, problems, args, *more) -> None:
    """Check every step's gradient and the mean of their losses against the reference."""
    assert len(steps) == metrics["updates"] == args.updates_per_rollout
    A = reference.advantages(problems, args.scale_rewards)
    old_model = steps[0].model
    size = len(problems) // len(steps)
    losses = []
    for k, step in enumerate(steps):
        part = slice(k * size, (k + 1) * size)
        inputs = problems[part], A[part], args, *more
        loss, exact = reference.loss_and_gradient(method_loss, step.model, old_model, *inputs)
        losses.append(loss)
        assert error(step.gradient, exact) < 1e-5
    assert metrics["loss"] == approx(np.mean(losses), abs=1e-5)


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("script, flags", SETTINGS)
def test_gradient(script, flags, updates):
    """The second update is off-policy: its ratios are those to the policy that sampled."""
    flags = {**flags, "updates_per_rollout": updates}
    args = args_of(script, **flags)
    steps, metrics = run_update(script, **flags)
    method_loss = reference.grpo_loss if script is grpo_baseline else reference.sgpo_loss
    check_steps(steps, metrics, method_loss, example(), args)


def test_every_setting_moves_the_gradient():
    """Otherwise the comparison above would prove nothing about its flag."""
    gradients = []
    for script, flags in SETTINGS:
        gradient = gradient_of(script, **flags)
        errors = [error(gradient, other) for other in gradients]
        assert min(errors, default=1) > 1e-4, flags
        gradients.append(gradient)


def test_without_distillation_sgpo_is_grpo_bit_for_bit():
    problems = example()
    for problem in problems:
        problem.guided_rewards = [0, 0]
    grpo = gradient_of(grpo_baseline)
    nothing_correct = gradient_of(sgpo, problems=problems)
    no_weight = gradient_of(sgpo, weight="fixed", fixed_alpha=0.0)
    assert torch.equal(nothing_correct, grpo)
    assert torch.equal(no_weight, grpo)


# ---------------------------------------------------------------- what must not change the gradient

@BOTH
@pytest.mark.parametrize("change", [
    {"microbatch_tokens": 60},
    {"microbatch_tokens": 1},
    {"width": 12},
    {"problems": example([3, 2, 0, 1])},
])
def test_microbatches_padding_and_order_change_nothing(script, change):
    changed = gradient_of(script, **change)
    assert error(changed, gradient_of(script)) < 1e-5


def test_no_pass_has_more_tokens_than_the_budget(monkeypatch):
    """The guided prompts are the longer ones."""
    sizes = []
    original = sgpo.completion_hidden

    def completion_hidden(model, prompts, completions, mask):
        lengths = [len(prompt) + n for prompt, n in zip(prompts, mask.sum(1).tolist())]
        sizes.append(len(lengths) * max(lengths))
        return original(model, prompts, completions, mask)

    monkeypatch.setattr(sgpo, "completion_hidden", completion_hidden)
    run_update(sgpo, target="all", microbatch_tokens=36)
    assert max(sizes) <= 36


def test_activation_checkpointing_changes_nothing(model_dirs):
    gradients = []
    passes = {False: 0, True: 0}
    for on in passes:
        def count(*_, on=on) -> None:
            passes[on] += 1

        args = args_of(sgpo, model=str(model_dirs["qwen2"]))
        args.activation_checkpointing = on
        model = common.load_policy(args)
        model.base_model.layers[0].mlp.register_forward_pre_hook(count)
        gradients.append(gradient_of(sgpo, model))
    assert torch.equal(*gradients)
    assert passes[True] > passes[False]  # a layer runs again in the backward pass


@pytest.mark.parametrize("script, rivals", [
    (grpo_baseline, []),
    (sgpo, [[12, 13, 16, 17]]),  # scored for Eq. 4, only if a problem has several
])
def test_samples_without_a_gradient_are_skipped(script, rivals, monkeypatch):
    """Problems 1 and 2 have equal rewards. They count in the normalizer, as the reference shows."""
    scored = []
    original = script.token_logps

    def token_logps(model, ro, idx, args):
        scored.append(sorted(idx))
        return original(model, ro, idx, args)

    monkeypatch.setattr(script, "token_logps", token_logps)
    run_update(script)
    assert scored == [[0, 1, 2, 9, 10, 11], *rivals]


@BOTH
def test_without_any_signal_the_optimizer_does_not_step(script):
    problems = example()
    for problem in problems:
        problem.rewards = [0, 0, 0]
        problem.guided_rewards = [0, 0]
    steps, metrics = run_update(script, problems=problems, updates_per_rollout=2)
    assert steps == []
    assert metrics["updates"] == metrics["loss"] == metrics["grad_norm"] == 0


@BOTH
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(script):
    A = torch.ones(12)
    A[0] = math.nan  # in the first of two updates
    steps, metrics = run_update(script, A=A, updates_per_rollout=2)
    assert metrics["skipped_updates"] == metrics["updates"] == len(steps) == 1
    assert metrics["grad_norm"] == approx(steps[0].gradient.norm().item(), rel=1e-5)
    unchanged = steps[0].model.state_dict()
    for name, weight in small_model().state_dict().items():
        assert torch.equal(unchanged[name], weight)


# ---------------------------------------------------------------- log-probs

def test_log_probs_of_a_batch_equal_those_of_full_logits_of_a_sample_alone():
    model = small_model()
    ro = rollout_of(grpo_baseline, example())
    args = args_of(grpo_baseline, temperature=0.7)
    logps, entropy = grpo_baseline.token_logps(model, ro, list(range(12)), args)
    assert not logps[~ro.mask].any()
    assert not entropy[~ro.mask].any()
    for i, mask in enumerate(ro.mask):
        ids = ro.completions[i, mask]
        exact = reference.log_probs(model, ro.prompts[i], ids.tolist(), args)
        chosen = exact[range(len(ids)), ids]
        exact_entropy = -(exact.exp() * exact).sum(1)
        assert torch.allclose(logps[i, mask], chosen, rtol=0, atol=1e-5)
        assert torch.allclose(entropy[i, mask], exact_entropy, rtol=0, atol=1e-5)


def test_the_end_token_is_trained_although_it_is_the_padding():
    """The gradient by its row of the head is (pi(end) - 1) x hidden state."""
    model = small_model("llama", tie_word_embeddings=False)
    problem = reference.Problem([5, 6], [[IM_END]] * 3, [1, 0, 0])
    A = torch.tensor([3.0, 0.0, 0.0])
    optimizer, steps = gradient_descent(model, lr=0.0)
    ro = rollout_of(grpo_baseline, [problem])
    grpo_baseline.update(model, optimizer, ro, A, args_of(grpo_baseline))
    prompt = torch.tensor([problem.prompt])
    hidden = model.base_model(prompt).last_hidden_state[0, -1]
    p_end = model.lm_head(hidden).softmax(-1)[IM_END]
    head_gradient = steps[0].gradient[-272 * 32:]  # the last weight
    torch.testing.assert_close(head_gradient.view(272, 32)[IM_END], (p_end - 1) * hidden)


# ---------------------------------------------------------------- metrics by hand

def test_metrics_of_grpo():
    steps, metrics = run_update(grpo_baseline, microbatch_tokens=30)
    entropies = []
    lengths = []
    for problem in example([0, 3]):
        for completion in problem.completions:
            logps = reference.log_probs(small_model(), problem.prompt, completion, args_of(grpo_baseline))
            entropy = -(logps.exp() * logps).sum(1)
            entropies += entropy.tolist()
            lengths.append(len(problem.prompt + completion))
    assert metrics["entropy"] == approx(np.mean(entropies), abs=1e-5)
    assert metrics["clip_ratio"] == 0
    assert metrics["grad_norm"] == approx(steps[0].gradient.norm().item(), rel=1e-5)
    assert sorted(lengths) == [4, 5, 6, 7, 8, 8]  # micro-batches of 8, 8, 7 and of 6, 5, 4
    assert metrics["padding_frac"] == approx(1 - 38 / (24 + 18))


@pytest.mark.parametrize("script", [grpo_baseline, sgpo])
def test_the_gap_to_the_samplers_log_probs(script, monkeypatch):
    """`sampling/sampling_logp_difference/mean`, over the unguided samples that are trained."""
    problems = example()
    model = small_model()
    gap = 0.25 * (torch.arange(6) - 2)  # by position, positive and negative
    exact = script.token_logps
    plain_rollout = rollout_of

    def rollout_with_gap(script, problems, width):
        ro = plain_rollout(script, problems, width)
        everyone = list(range(len(ro.prompts)))
        with torch.no_grad():
            logps, _ = exact(model, ro, everyone, args_of(script))
        ro.sampler_logps = (logps - gap).masked_fill(~ro.mask, 99.0)
        return ro

    monkeypatch.setattr(sys.modules[__name__], "rollout_of", rollout_with_gap)
    _, metrics = run_update(script, model, problems)
    trained = [o for p in problems if len(set(p.rewards)) > 1 for o in p.completions]
    gaps = [abs(gap[t].item()) for o in trained for t in range(len(o))]
    measured = metrics["sampling/sampling_logp_difference/mean"]
    assert measured == pytest.approx(sum(gaps) / len(gaps), abs=1e-5)


def test_the_gradient_is_clipped_and_its_norm_is_that_before():
    norm = gradient_of(grpo_baseline).norm().item()
    steps, metrics = run_update(grpo_baseline, max_grad_norm=0.01)
    assert steps[0].gradient.norm().item() == approx(0.01, rel=1e-3)
    assert metrics["grad_norm"] == approx(norm, rel=1e-5)


def test_clip_ratio():
    steps, metrics = run_update(grpo_baseline, updates_per_rollout=2)
    num_clipped = 0
    first, last = example([0, 3])
    num_tokens = sum(map(len, first.completions + last.completions))
    for completion, reward in zip(last.completions, last.rewards):
        inputs = last.prompt, completion, args_of(grpo_baseline)
        old = reference.log_probs(steps[0].model, *inputs)
        new = reference.log_probs(steps[1].model, *inputs)
        for t, a in enumerate(completion):
            rho = math.exp((new - old)[t, a].item())
            num_clipped += rho > 1.28 if reward else rho < 0.8
    assert num_clipped > 0
    assert metrics["clip_ratio"] == approx(num_clipped / num_tokens)


def test_metrics_of_sgpo():
    args = args_of(sgpo)
    _, metrics = run_update(sgpo, target="all", delta=1.0)
    d = []
    for problem in example([0, 1, 2]):
        for completion, reward in zip(problem.guided_completions, problem.guided_rewards):
            guided = reference.log_probs(small_model(), problem.guided_prompt, completion, args)
            unguided = reference.log_probs(small_model(), problem.prompt, completion, args)
            if reward:
                d += map(reference.kl, guided, unguided)
    is_clipped = [float(x > 1.0) for x in d]
    assert metrics["sgpo/kl"] == approx(sum(d).item() / len(d), abs=1e-5)
    assert metrics["sgpo/kl_clipped_frac"] == approx(np.mean(is_clipped))
    # Problem 2 keeps 0.5 (1 - 1 + 0.1) / (1 + 0.1); problems 0 and 1 reach alpha_max; 3 has no target.
    assert metrics["sgpo/alpha"] == approx((0.8 + 0.8 + 0.05 / 1.1) / 4)
    assert metrics["sgpo/p_auto"] == approx(6 / 12)
    assert metrics["sgpo/p_guided"] == approx(5 / 8)
    assert metrics["sgpo/no_target_frac"] == 0.25


# ---------------------------------------------------------------- precision

@BOTH
def test_bf16_is_close_to_fp32_and_weights_stay_fp32(script):
    flags = {"distill": "reverse_kl", "delta": math.inf} if script is sgpo else {}
    exact = gradient_of(script, small_model(initializer_range=0.1), **flags)
    model = small_model(initializer_range=0.1)
    gradient = gradient_of(script, model, bf16=True, **flags)
    assert 1e-3 < error(gradient, exact) < 3e-2
    assert model.dtype == gradient.dtype == torch.float32


def test_weights_move_at_the_papers_learning_rate(model_dirs):
    """In bf16 the weights would round nearly all of the update away."""
    model = common.load_policy(args_of(sgpo, model=str(model_dirs["qwen2"]), bf16=True))
    weight = model.base_model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    ro = rollout_of(grpo_baseline, example())
    A = torch.linspace(-1, 1, 12)
    grpo_baseline.update(model, optimizer, ro, A, args_of(grpo_baseline, bf16=True))
    assert (weight != before).float().mean() > 0.95


def test_the_head_gives_fp32_logits_from_bf16_inputs():
    model = small_model()
    hidden = torch.linspace(-1, 1, 32)[None]
    with torch.autocast("cpu", torch.bfloat16):
        logits = common.Fp32Head(model)(hidden)
    rounded_hidden = hidden.bfloat16().double()
    rounded_weight = model.lm_head.weight.bfloat16().double()
    exact = rounded_hidden @ rounded_weight.T
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, atol=1e-5, rtol=0)


def test_the_heads_gradient_is_added_up_in_fp32_under_bf16():
    """Chunk by chunk: a sum in bf16 would soon stop growing."""
    hidden = torch.linspace(-1, 1, 32)[None]
    gradients = []
    for num_chunks in (1, 500):
        model = small_model("llama", tie_word_embeddings=False)
        head = common.Fp32Head(model)
        with torch.autocast("cpu", torch.bfloat16):
            losses = [head(hidden).square().mean() for _ in range(num_chunks)]
        sum(losses).backward()
        gradients.append(model.lm_head.weight.grad / num_chunks)
    assert error(*gradients) < 1e-5
