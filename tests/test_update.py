"""update() of grpo_baseline.py and sgpo.py against tests/reference.py, and what must not change its gradient."""
import copy
import math

import numpy as np
import pytest
import torch
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
        return [random.integers(10, 250, length).tolist() for length in random.integers(1, 7, count)]

    problems = []
    for prompt, rewards, guided_rewards in (
        ([5, 6, 7], [1, 0, 0], [1, 1]),
        ([9, 8, 7, 6, 5, 4, 3], [0, 0, 0], [1, 0]),
        ([1], [1, 1, 1], [1, 1]),
        ([2, 2, 9, 1], [0, 1, 1], [0, 0]),
    ):
        guided_prompt = [70, 71, 72, *prompt]
        problems.append(reference.Problem(prompt, samples(3), rewards, guided_prompt, samples(2), guided_rewards))
    problems[0].completions[0][-1] = IM_END
    problems[0].guided_completions[0][-1] = IM_END
    return [problems[q] for q in order]


def rollout_of(script, problems: list[reference.Problem], width: int = 6):
    """Return the problems' samples as a rollout; the ids behind the end are end tokens, as generate has them."""
    scored_with = [p.prompt for p in problems for _ in p.completions]
    sampled_from = list(scored_with)
    completions = [o for p in problems for o in p.completions]
    if script is sgpo:
        scored_with += [p.prompt for p in problems for _ in p.guided_completions]
        sampled_from += [p.guided_prompt for p in problems for _ in p.guided_completions]
        completions += [g for p in problems for g in p.guided_completions]
    ids = [o + [IM_END] * (width - len(o)) for o in completions]
    lengths = torch.tensor([len(o) for o in completions])
    mask = torch.arange(width) < lengths[:, None]
    prompts = [scored_with, sampled_from] if script is sgpo else [scored_with]
    return script.Rollout(*prompts, torch.tensor(ids), mask, None, None)


def record_steps(model, optimizer) -> list[tuple]:
    """Return a list to which every optimizer step adds the model before it and the gradient."""
    steps = []

    def record(*_) -> None:
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        steps.append((copy.deepcopy(model), gradient))

    optimizer.register_step_pre_hook(record)
    return steps


def args_of(script, **flags):
    settings = {"group_size": 3, "max_new_tokens": 6, "max_grad_norm": 1e9, "bf16": False}
    if script is sgpo:
        settings |= {"guided_group_size": 2, "delta": 2.0}
    return script.Args(**{**settings, **flags})


def run_update(script, model=None, problems=None, A=None, width=6, optimizer=None, **flags):
    """Run update(), by default with plain gradient descent; return its steps and its metrics."""
    model = model or small_model()
    problems = problems or example()
    args = args_of(script, **flags)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.05)
    steps = record_steps(model, optimizer)
    ro = rollout_of(script, problems, width)
    rewards = torch.tensor([p.rewards for p in problems], dtype=torch.float)
    if A is None:
        A = script.group_advantages(rewards, args.scale_rewards).flatten()
    if script is grpo_baseline:
        return steps, script.update(model, optimizer, ro, A, args)
    guided_rewards = torch.tensor([p.guided_rewards for p in problems])
    all_rewards = torch.cat([rewards.flatten(), guided_rewards.flatten()])
    guided_samples = {q: [12 + 2 * q, 13 + 2 * q] for q in range(4)}
    if args.distill == "none":
        guided_samples = {}
    guidance, guided_metrics = sgpo.guide(all_rewards, guided_samples, 4, args)
    metrics = sgpo.update(model, optimizer, ro, A * args.autonomous_grpo, guidance, args)
    return steps, metrics | guided_metrics


def gradient_of(script, *inputs, **flags) -> Tensor:
    steps, _ = run_update(script, *inputs, **flags)
    return steps[0][1]


def error(ours: Tensor, exact: Tensor) -> float:
    """Return the relative error of a gradient."""
    assert exact.abs().max() > 1e-3  # there is something to compare
    return ((ours - exact).norm() / exact.norm()).item()


# ---------------------------------------------------------------- the gradient is the paper's

def test_the_references_log_probs_are_those_of_transformers_own_loss():
    model = small_model().double()
    prompt, completion = [5, 6, 7], [20, 30, 40]
    labels = torch.tensor([[-100, -100, -100, 20, 30, 40]])
    mean_loss = model(torch.tensor([prompt + completion]), labels=labels).loss.item()
    assert reference.sum_logp(model, prompt, completion, 1.0) == pytest.approx(-3 * mean_loss)


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


def check_steps(steps: list[tuple], metrics: dict, method_loss, problems, args, *more) -> None:
    """Check every step's gradient and the mean of their losses against the reference."""
    assert len(steps) == metrics["updates"] == args.updates_per_rollout
    A = reference.advantages(problems, args.scale_rewards)
    old_model = steps[0][0]
    size = len(problems) // len(steps)
    losses = []
    for k, (model, gradient) in enumerate(steps):
        part = slice(k * size, (k + 1) * size)
        loss, exact = reference.loss_and_gradient(
            method_loss, model, old_model, problems[part], A[part], args, *more)
        assert error(gradient, exact) < 1e-5
        losses.append(loss)
    assert metrics["loss"] == pytest.approx(np.mean(losses), abs=1e-5)


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("script, flags", SETTINGS)
def test_gradient(script, flags, updates):
    """The second update is off-policy: its ratios are those to the policy that sampled."""
    flags = {**flags, "updates_per_rollout": updates}
    steps, metrics = run_update(script, **flags)
    method_loss = reference.grpo_loss if script is grpo_baseline else reference.sgpo_loss
    check_steps(steps, metrics, method_loss, example(), args_of(script, **flags))


def test_every_setting_moves_the_gradient():
    """Otherwise the comparison above would prove nothing about its flag."""
    gradients = []
    for script, flags in SETTINGS:
        gradient = gradient_of(script, **flags)
        assert all(error(gradient, other) > 1e-4 for other in gradients), flags
        gradients.append(gradient)


def test_without_distillation_sgpo_is_grpo_bit_for_bit():
    grpo = gradient_of(grpo_baseline)
    problems = example()
    for problem in problems:
        problem.guided_rewards = [0, 0]
    assert torch.equal(gradient_of(sgpo, problems=problems), grpo)
    assert torch.equal(gradient_of(sgpo, distill="none"), grpo)
    assert torch.equal(gradient_of(sgpo, weight="fixed", fixed_alpha=0.0), grpo)


# ---------------------------------------------------------------- what must not change the gradient

@BOTH
@pytest.mark.parametrize("change", [
    {"microbatch_tokens": 60},
    {"microbatch_tokens": 1},
    {"width": 12},
    {"problems": example([3, 2, 0, 1]), "microbatch_tokens": 40},
])
def test_microbatches_padding_and_order_change_nothing(script, change):
    assert error(gradient_of(script, **change), gradient_of(script)) < 1e-5


def test_activation_checkpointing_changes_nothing(model_dirs):
    gradients = []
    passes = {False: 0, True: 0}
    for on in passes:
        def count(*_, on=on) -> None:
            passes[on] += 1

        args = args_of(sgpo, model=str(model_dirs["qwen2"]), activation_checkpointing=on)
        model = common.load_policy(args)
        model.base_model.layers[0].mlp.register_forward_pre_hook(count)
        gradients.append(gradient_of(sgpo, model))
    assert torch.equal(*gradients)
    assert passes[True] > passes[False]  # a layer runs again in the backward pass


@pytest.mark.parametrize("script, expected", [
    (grpo_baseline, [[0, 1, 2, 9, 10, 11]]),
    (sgpo, [[0, 1, 2, 9, 10, 11], [12, 13, 16, 17]]),  # candidates only if a problem has several
])
def test_samples_without_a_gradient_are_skipped(script, expected, monkeypatch):
    """Problems 1 and 2 have equal rewards. They count in the normalizer, as the reference shows."""
    scored = []
    original = script.token_logps

    def token_logps(model, ro, idx, args):
        scored.append(sorted(idx))
        return original(model, ro, idx, args)

    monkeypatch.setattr(script, "token_logps", token_logps)
    run_update(script)
    assert scored == expected


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
    A = torch.tensor([math.nan] * 6 + [1.0, 0.0, -1.0] * 2)  # in the first of two updates
    steps, metrics = run_update(script, A=A, updates_per_rollout=2)
    (model, gradient), = steps
    assert metrics["skipped_updates"] == metrics["updates"] == 1
    assert metrics["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)
    for before, now in zip(small_model().parameters(), model.parameters()):
        assert torch.equal(before, now)


# ---------------------------------------------------------------- log-probs

def test_log_probs_of_a_batch_equal_those_of_full_logits_of_a_sample_alone():
    model = small_model()
    ro = rollout_of(grpo_baseline, example())
    args = args_of(grpo_baseline, temperature=0.7)
    logps, entropy = grpo_baseline.token_logps(model, ro, list(range(12)), args)
    for i, mask in enumerate(ro.mask):
        ids = ro.completions[i, mask]
        exact = reference.log_probs(model, ro.prompts[i], ids.tolist(), 0.7).float()
        chosen = exact.gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(logps[i, mask], chosen, atol=1e-5, rtol=0)
        torch.testing.assert_close(entropy[i, mask], -(exact.exp() * exact).sum(1), atol=1e-5, rtol=0)
    assert not logps[~ro.mask].any()
    assert not entropy[~ro.mask].any()


def test_the_end_token_is_trained_although_it_is_the_padding():
    model = small_model("llama", tie_word_embeddings=False)
    prompt = [5, 6]
    problem = reference.Problem(prompt, [[IM_END], [IM_END], [IM_END]], [1, 0, 0])
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    steps = record_steps(model, optimizer)
    ro = rollout_of(grpo_baseline, [problem])
    grpo_baseline.update(model, optimizer, ro, torch.tensor([3.0, 0, 0]), args_of(grpo_baseline))
    hidden = model.base_model(torch.tensor([prompt])).last_hidden_state[0, -1]
    p_end = model.lm_head(hidden).softmax(-1)[IM_END]
    gradient_of_head = steps[0][1][-272 * 32:].view(272, 32)
    torch.testing.assert_close(gradient_of_head[IM_END], -(1 - p_end) * hidden)


# ---------------------------------------------------------------- metrics by hand

def test_metrics_of_grpo():
    steps, metrics = run_update(grpo_baseline, microbatch_tokens=30)
    model, gradient = steps[0]
    entropies = []
    lengths = []
    for problem in example([0, 3]):
        for completion in problem.completions:
            logps = reference.log_probs(model, problem.prompt, completion, 1.0)
            entropies += (-(logps.exp() * logps).sum(1)).tolist()
            lengths.append(len(problem.prompt + completion))
    assert metrics["entropy"] == pytest.approx(np.mean(entropies), abs=1e-5)
    assert metrics["clip_ratio"] == 0
    assert metrics["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)
    assert sorted(lengths) == [4, 5, 6, 7, 8, 8]  # micro-batches of 8, 8, 7 and of 6, 5, 4
    assert metrics["padding_frac"] == pytest.approx(1 - 38 / (3 * 8 + 3 * 6))


def test_the_gradient_is_clipped_and_its_norm_is_that_before():
    steps, metrics = run_update(grpo_baseline, max_grad_norm=0.01)
    assert steps[0][1].norm().item() == pytest.approx(0.01, rel=1e-3)
    assert metrics["grad_norm"] == pytest.approx(gradient_of(grpo_baseline).norm().item(), rel=1e-5)


def test_clip_ratio():
    steps, metrics = run_update(grpo_baseline, updates_per_rollout=2)
    old_model, model = steps[0][0], steps[1][0]
    num_clipped = 0
    num_tokens = sum(len(o) for o in example()[0].completions)
    problem = example()[3]
    for completion, reward in zip(problem.completions, problem.rewards):
        new = reference.log_probs(model, problem.prompt, completion, 1.0)
        old = reference.log_probs(old_model, problem.prompt, completion, 1.0)
        for t, a in enumerate(completion):
            rho = (new[t, a] - old[t, a]).exp().item()
            num_clipped += rho > 1.28 if reward else rho < 0.8
            num_tokens += 1
    assert num_clipped > 0
    assert metrics["clip_ratio"] == pytest.approx(num_clipped / num_tokens)


def test_metrics_of_sgpo():
    steps, metrics = run_update(sgpo, target="all", delta=1.0)
    model = steps[0][0]
    d = []
    for problem in example([0, 1, 2]):
        for completion, reward in zip(problem.guided_completions, problem.guided_rewards):
            if reward:
                guided = reference.log_probs(model, problem.guided_prompt, completion, 1.0)
                unguided = reference.log_probs(model, problem.prompt, completion, 1.0)
                d += (guided.exp() * (guided - unguided)).sum(1).tolist()
    # Problem 2 keeps 0.5 (1 - 1 + 0.1) / (1 + 0.1); problems 0 and 1 reach alpha_max; 3 has no target.
    assert metrics["sgpo/alpha"] == pytest.approx((0.8 + 0.8 + 0.05 / 1.1 + 0) / 4)
    assert metrics["sgpo/p_auto"] == pytest.approx((1 / 3 + 0 + 1 + 2 / 3) / 4)
    assert metrics["sgpo/p_guided"] == pytest.approx((1 + 0.5 + 1 + 0) / 4)
    assert metrics["sgpo/no_target_frac"] == 0.25
    assert metrics["sgpo/kl"] == pytest.approx(np.mean(d), abs=1e-5)
    assert metrics["sgpo/kl_clipped_frac"] == pytest.approx(np.mean(np.array(d) > 1.0))


# ---------------------------------------------------------------- precision

@pytest.mark.parametrize("script, flags", [(grpo_baseline, {}), (sgpo, {"delta": math.inf})])
def test_bf16_is_close_to_fp32_and_weights_stay_fp32(script, flags):
    exact = gradient_of(script, small_model(initializer_range=0.1), **flags)
    model = small_model(initializer_range=0.1)
    gradient = gradient_of(script, model, bf16=True, **flags)
    assert 1e-3 < error(gradient, exact) < 3e-2
    assert model.dtype == gradient.dtype == torch.float32


def test_weights_move_at_the_papers_learning_rate(model_dirs):
    """In bf16 the weights would round nearly all of the updates away."""
    model = common.load_policy(args_of(sgpo, model=str(model_dirs["qwen2"]), bf16=True))
    weight = model.base_model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    run_update(sgpo, model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-6), bf16=True)
    assert (weight != before).float().mean() > 0.95


def test_the_head_gives_fp32_logits_from_bf16_inputs():
    model = small_model("llama", tie_word_embeddings=False)
    hidden = torch.linspace(-1, 1, 32)[None]
    with torch.autocast("cpu", torch.bfloat16):
        logits = common.Fp32Head(model)(hidden)
    exact = hidden.bfloat16().double() @ model.lm_head.weight.bfloat16().double().T
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, atol=1e-5, rtol=0)


def test_the_heads_gradient_is_added_up_in_fp32_under_bf16():
    """Chunk by chunk: a sum in bf16 would soon stop growing."""
    gradients = []
    for num_chunks in (1, 500):
        model = small_model("llama", tie_word_embeddings=False)
        head = common.Fp32Head(model)
        hidden = torch.linspace(-1, 1, 32)[None]
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(head(hidden).square().mean() for _ in range(num_chunks))
        loss.backward()
        gradients.append(model.lm_head.weight.grad / num_chunks)
    assert error(gradients[1], gradients[0]) < 1e-5
