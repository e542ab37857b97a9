"""Rollouts: `generate` in pieces gives what one call of `generate` gives, and masks go by position."""
import math

import pytest
import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation import TopPLogitsWarper

import common
import grpo_baseline
from conftest import IM_END, small_model, small_tokenizer

END_IDS = [3, IM_END, *range(40, 60)]  # so many that greedy rows end at different positions
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [5, 6, 7], [1], [5, 6, 7], *([k, 2 * k] for k in range(10, 40))]
HYBRIDS = {
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
                  "mamba_n_groups": 1},
    "qwen3_next": {"head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
                   "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2,
                   "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                   "layer_types": ["linear_attention", "full_attention"]},
}


def settings(**more) -> GenerationConfig:
    """Return greedy settings with END_IDS; the padding is an end token, too."""
    values = {"do_sample": False, "top_k": 0, "max_new_tokens": 40, "eos_token_id": END_IDS,
              "pad_token_id": END_IDS[0], **more}
    return GenerationConfig(**values)


def generate(model, prompts: list = PROMPTS, max_rows: int = 1000, **more) -> torch.Tensor:
    return common.generate_in_pieces(model, prompts, settings(**more), max_rows)


def generate_in_one_call(model, prompts: list = PROMPTS, **more) -> torch.Tensor:
    """Return the completions of transformers' generate, padded prompts in one batch."""
    ids, mask = common.left_pad(prompts, 0, "cpu")
    own = model.generation_config
    model.generation_config = GenerationConfig()
    completions = model.generate(ids, attention_mask=mask, generation_config=settings(**more))
    model.generation_config = own
    return completions[:, ids.shape[1]:]


@pytest.fixture
def batch_sizes(monkeypatch):
    """Return a function that records the batch sizes of a model's calls of generate."""
    def record(model) -> list[int]:
        sizes = []
        original = model.generate

        def recorded(ids, **kwargs):
            sizes.append(len(ids))
            return original(ids, **kwargs)

        monkeypatch.setattr(model, "generate", recorded)
        return sizes

    return record


# ---- the same tokens as one call

@pytest.mark.parametrize("kind, more", [
    ("llama", {}), ("qwen2", {}), ("qwen3", {}), ("gpt_neox", {}), ("mistral", {"sliding_window": 4}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("gemma3_text", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]})])
def test_greedy_tokens_are_those_of_one_call(kind, more, batch_sizes):
    model = small_model(kind, seed=4, head_dim=8, **more)
    expected = generate_in_one_call(model)
    sizes = batch_sizes(model)
    completions = generate(model)
    assert torch.equal(completions, expected)
    assert sizes[:2] == [33, 35]  # equal prompts are read once
    assert sizes[1:] == sorted(sizes[1:], reverse=True)
    assert sizes[-1] < 30  # finished rows leave the batch


@pytest.mark.parametrize("kind", HYBRIDS)
def test_a_recurrent_state_takes_one_plain_call(kind, batch_sizes):
    model = small_model(kind, seed=4, **HYBRIDS[kind])
    assert not common.has_plain_cache(DynamicCache(config=model.config))
    expected = generate_in_one_call(model)
    sizes = batch_sizes(model)
    assert torch.equal(generate(model), expected)
    assert sizes == [35]


def test_sampling_through_a_recurrent_state_is_bounded_and_filtered(batch_sizes):
    model = small_model("falcon_h1", **HYBRIDS["falcon_h1"])
    sizes = batch_sizes(model)
    greedy = generate(model, max_rows=20)
    assert sizes == [20, 15]
    assert torch.equal(generate(model, max_rows=20, do_sample=True, temperature=1.0, top_p=1e-6), greedy)


def test_the_number_of_rows_in_memory_changes_nothing(batch_sizes, monkeypatch):
    model = small_model(seed=4)
    prompts = PROMPTS[:12]
    expected = generate_in_one_call(model, prompts)
    sizes = batch_sizes(model)
    for max_rows in (1, 5):
        assert torch.equal(generate(model, prompts, max_rows), expected)
    assert max(sizes) == 5
    sizes.clear()
    monkeypatch.setattr(common, "CPU_CACHE_BYTES", 7 * common.kv_bytes(model, 7 + 40))
    assert torch.equal(generate(model, prompts), expected)
    assert max(sizes) == 7


@pytest.mark.parametrize("prefill_tokens", [1, 70, 100])
def test_reading_prompts_in_parts_changes_nothing(prefill_tokens, monkeypatch):
    model = small_model(seed=4)
    expected = generate(model)
    monkeypatch.setattr(common, "PREFILL_TOKENS", prefill_tokens)
    assert torch.equal(generate(model), expected)


@pytest.mark.parametrize("prompts", [[[7]], [[7], [7], [9]], [[1, 2]] * 4])
def test_short_and_equal_prompts(prompts):
    model = small_model(seed=4)
    assert torch.equal(generate(model, prompts), generate_in_one_call(model, prompts))


def test_no_prompts_give_no_completions():
    ro = grpo_baseline.rollout(small_model(), small_tokenizer(), [], 1.0, grpo_baseline.Args())
    assert len(ro.completions) == len(ro.mask) == len(ro.truncated) == len(ro.texts) == 0


# ---- traps

def test_the_checkpoints_generation_config_does_not_leak():
    """T4."""
    poison = GenerationConfig(
        top_k=1, top_p=0.1, min_p=0.9, repetition_penalty=5.0, temperature=0.01, min_new_tokens=9,
        suppress_tokens=list(range(100)), no_repeat_ngram_size=1, bad_words_ids=[[120]], num_beams=3,
        forced_eos_token_id=200, eos_token_id=5, do_sample=True)
    drawn = []
    for own in (GenerationConfig(), poison):
        model = small_model()
        model.generation_config = own
        torch.manual_seed(0)
        drawn.append(generate(model, do_sample=True, temperature=0.9, top_p=0.95))
        assert model.generation_config is own  # it is saved beside the weights
    assert torch.equal(*drawn)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_rollout_right_after_training_equals_greedy(checkpointing):
    """T5."""
    model = small_model()
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    completions = generate(model, [[5, 6, 7], [1]], eos_token_id=[IM_END], max_new_tokens=10)
    assert model.training
    model.eval()
    for prompt, completion in zip([[5, 6, 7], [1]], completions.tolist()):
        ids = list(prompt)
        for token in completion:
            assert token == model(torch.tensor([ids])).logits[0, -1].argmax()
            if token == IM_END:
                break
            ids.append(token)


def test_a_pad_token_without_an_embedding_row_is_no_matter():
    tokenizer = small_tokenizer()
    model = small_model(vocab=tokenizer.pad_token_id)
    ro = grpo_baseline.rollout(model, tokenizer, PROMPTS, 1.0, grpo_baseline.Args(max_new_tokens=8))
    assert ro.completions.max() < tokenizer.pad_token_id
    tokenizer.pad_token = None
    model.generation_config.pad_token_id = 10 ** 6
    grpo_baseline.rollout(model, tokenizer, PROMPTS, 0.0, grpo_baseline.Args(max_new_tokens=8))


# ---- sampling

@pytest.mark.parametrize("temperature, top_p", [(0.7, 1.0), (1.3, 0.8)])
def test_samples_follow_the_distribution_of_one_call(temperature, top_p):
    """Chi-square of two samples: 20,000 pairs of tokens each, counted."""
    model = small_model(vocab=12, eos_token_id=11, initializer_range=0.2)
    how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "max_new_tokens": 2,
           "eos_token_id": [11], "pad_token_id": 11}
    prompts = [[3, 4]] * 10_000 + [[5]] * 10_000
    torch.manual_seed(0)
    counts = []
    for pairs in (generate(model, prompts, 10 ** 6, **how), generate_in_one_call(model, prompts, **how)):
        cell = torch.arange(20_000) // 10_000 * 144 + pairs[:, 0] * 12 + pairs[:, 1]
        counts.append(torch.bincount(cell, minlength=288).double())
    seen = sum(counts) > 10
    ours, theirs = counts[0][seen], counts[1][seen]
    chi_square = ((ours - theirs) ** 2 / (ours + theirs)).sum()
    freedom = len(ours) - 2
    assert freedom > 20
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)
    assert counts[1][counts[0] > 20].min() > 0  # the same nucleus


@pytest.mark.parametrize("spread, name", [(5.0, "peaked"), (0.1, "flat: 1,024 tokens are not enough")])
@pytest.mark.parametrize("temperature, top_p", [(1.0, 0.95), (0.7, 0.5), (1.5, 1e-9)])
def test_the_nucleus_is_that_of_transformers(temperature, top_p, spread, name):
    torch.manual_seed(0)
    scores = torch.randn(4, 5000, dtype=torch.float64).mul(spread).float()
    ours = common.NucleusFilter(top_p, temperature)(None, scores) / temperature
    theirs = TopPLogitsWarper(top_p)(None, scores / temperature)
    differing = (ours.isfinite() != theirs.isfinite()).sum(1)
    assert differing.max() <= (1 if spread < 1 else 0)  # in fp32 their sums of thousands of terms are inexact
    both = ours.isfinite() & theirs.isfinite()
    assert torch.equal(ours[both], theirs[both])
    assert ours.isfinite().any(1).all()


def test_the_nucleus_of_a_small_vocabulary():
    scores = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    for top_p, kept in ((0.49, [1]), (0.51, [1, 3]), (0.81, [0, 1, 3]), (0.96, [0, 1, 2, 3])):
        filtered = common.NucleusFilter(top_p, 1.0)(None, scores)
        assert filtered[0].isfinite().nonzero()[:, 0].tolist() == kept


# ---- masks by position

@pytest.mark.parametrize("pad", [IM_END, 3, 0])
def test_the_mask_ends_with_the_first_of_several_end_tokens(pad, monkeypatch):
    """T1 and T2: the padding may itself be an end token, as in Qwen2.5-Instruct."""
    model = small_model()
    model.generation_config.eos_token_id = [IM_END, 3]
    tokenizer = small_tokenizer()
    a, b, c = tokenizer("abc").input_ids
    completions = torch.tensor([[a, b, 3, pad, pad], [a, IM_END, pad, pad, pad], [a, b, c, a, b],
                                [3, pad, pad, pad, pad], [a, b, c, a, IM_END]])
    monkeypatch.setattr(grpo_baseline, "generate_in_pieces", lambda *args: completions)
    ro = grpo_baseline.rollout(model, tokenizer, [[1]] * 5, 1.0, grpo_baseline.Args())
    assert ro.mask.sum(1).tolist() == [3, 2, 5, 1, 5]
    assert (ro.mask.int().diff(dim=1) <= 0).all()
    assert ro.truncated.tolist() == [False, False, True, False, False]
    assert ro.texts == ["ab", "a", "abcab", "", "abca"]
    assert ro.lengths() == [4, 3, 6, 2, 6]


def test_a_rollout_has_completions_masks_and_texts_of_its_samples():
    model = small_model(seed=4)
    model.generation_config.eos_token_id = END_IDS
    tokenizer = small_tokenizer()
    args = grpo_baseline.Args(max_new_tokens=40, generation_batch_size=20)
    ro = grpo_baseline.rollout(model, tokenizer, PROMPTS, 0.0, args)
    assert torch.equal(ro.completions, generate_in_one_call(model))
    assert 0 < ro.truncated.sum() < len(PROMPTS)
    for completion, mask, truncated, text in zip(ro.completions.tolist(), ro.mask, ro.truncated, ro.texts):
        length = next((i for i, token in enumerate(completion) if token in END_IDS), 40)
        assert mask.sum() == length + 1 - int(truncated)
        assert text == tokenizer.decode(completion[:length])
