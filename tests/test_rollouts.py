"""Rollouts: `generate` in pieces gives what one call of `generate` gives, and masks go by position."""
import math

import pytest
import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation import TopPLogitsWarper

import common
import grpo_baseline
from conftest import IM_END, as_samples, small_model, small_tokenizer

END_IDS = [3, IM_END, *range(40, 60)]  # so many that greedy rows end at different positions
SHORT = [5, 6, 7]
LONG = [9, 8, 7, 6, 5, 4, 3]
PROMPTS = [SHORT, LONG, SHORT, [1], SHORT]
PROMPTS += [[k, 2 * k] for k in range(10, 40)]
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = [  # model type, settings beside those of conftest.small_model
    ("llama", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("gpt_neox", {}),
    ("mistral", {"sliding_window": 4}),
    ("qwen2", {"use_sliding_window": True, **SLIDING}),
    ("gemma3_text", SLIDING),
]
HYBRIDS = {  # models with a recurrent state
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}


def settings(**more) -> GenerationConfig:
    """Return greedy settings with END_IDS; the padding is an end token, too."""
    values = {
        "do_sample": False,
        "top_k": 0,
        "max_new_tokens": 40,
        "eos_token_id": END_IDS,
        "pad_token_id": END_IDS[0],
    }
    return GenerationConfig(**values | more)


def short_args(**more) -> grpo_baseline.Args:
    return grpo_baseline.Args(max_new_tokens=8, **more)


def generate(model, prompts: list = PROMPTS, max_rows: int = 1000, **more) -> torch.Tensor:
    return common.generate_in_pieces(model, prompts, settings(**more), max_rows).ids


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

@pytest.mark.parametrize("kind, more", MODELS)
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
    likeliest = {"do_sample": True, "temperature": 1.0, "top_p": 1e-6}
    assert torch.equal(generate(model, max_rows=20, **likeliest), greedy)


def test_the_number_of_rows_in_memory_changes_nothing(batch_sizes, monkeypatch):
    model = small_model(seed=4)
    prompts = PROMPTS[:12]
    expected = generate_in_one_call(model, prompts)
    sizes = batch_sizes(model)
    for max_rows in (1, 5):
        assert torch.equal(generate(model, prompts, max_rows), expected)
    assert max(sizes) == 5
    sizes.clear()
    bytes_per_row = common.kv_bytes(model.config, 4, len(LONG) + 40)
    monkeypatch.setattr(common, "CPU_CACHE_BYTES", 7 * bytes_per_row)
    assert torch.equal(generate(model, prompts), expected)
    assert max(sizes) == 7


@pytest.mark.parametrize("prefill_tokens", [1, 70, 100])
def test_reading_prompts_in_parts_changes_nothing(prefill_tokens, monkeypatch):
    model = small_model(seed=4)
    expected = generate(model)
    monkeypatch.setattr(common, "PREFILL_TOKENS", prefill_tokens)
    assert torch.equal(generate(model), expected)


@pytest.mark.parametrize("prompts", [
    [[7]],
    [[7], [7], [9]],
    [SHORT] * 4])
def test_short_and_equal_prompts(prompts):
    model = small_model(seed=4)
    assert torch.equal(generate(model, prompts), generate_in_one_call(model, prompts))


def test_no_prompts_give_no_completions():
    ro = grpo_baseline.rollout(small_model(), small_tokenizer(), [], 1.0, short_args())
    assert ro.mask.shape == ro.completions.shape
    assert len(ro.mask) == 0
    assert len(ro.truncated) == 0
    assert ro.texts == []


# ---- traps

def test_the_checkpoints_generation_config_does_not_leak():
    """T4."""
    poison = GenerationConfig(
        do_sample=True,
        num_beams=3,
        top_k=1,
        top_p=0.1,
        min_p=0.9,
        temperature=0.01,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        bad_words_ids=[[120]],
        suppress_tokens=list(range(100)),
        min_new_tokens=9,
        forced_eos_token_id=200,
        eos_token_id=5,
    )
    drawn = []
    for own in (GenerationConfig(), poison):
        model = small_model()
        model.generation_config = own
        torch.manual_seed(0)
        samples = generate(model, do_sample=True, temperature=0.9, top_p=0.95)
        drawn.append(samples)
        assert model.generation_config is own  # it is saved beside the weights
    assert torch.equal(*drawn)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_rollout_right_after_training_equals_greedy(checkpointing):
    """T5."""
    model = small_model()
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    prompts = [SHORT, [1]]
    completions = generate(model, prompts, eos_token_id=[IM_END], max_new_tokens=10)
    assert model.training
    model.eval()
    for prompt, completion in zip(prompts, completions.tolist()):
        ids = list(prompt)
        for token in completion:
            logits = model(torch.tensor([ids])).logits
            assert token == logits[0, -1].argmax()
            if token == IM_END:
                break
            ids.append(token)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_pad_token_without_an_embedding_row_is_no_matter(temperature):
    tokenizer = small_tokenizer()
    model = small_model(vocab=tokenizer.pad_token_id)
    model.generation_config.pad_token_id = 10 ** 6
    ro = grpo_baseline.rollout(model, tokenizer, PROMPTS, temperature, short_args())
    assert ro.completions.max() < tokenizer.pad_token_id


# ---- sampling

@pytest.mark.parametrize("temperature, top_p", [(0.7, 1.0), (1.3, 0.8)])
def test_samples_follow_the_distribution_of_one_call(temperature, top_p):
    """Chi-square of two samples: 20,000 pairs of tokens each, counted."""
    model = small_model(vocab=12, eos_token_id=11, initializer_range=0.2)
    how = {
        "do_sample": True,
        "temperature": temperature,
        "top_p": top_p,
        "max_new_tokens": 2,
        "eos_token_id": [11],
        "pad_token_id": 11,
    }
    torch.manual_seed(0)
    prompts = [[3, 4]] * 20_000
    counts = []
    for sample in (generate, generate_in_one_call):
        pairs = sample(model, prompts, **how)
        cells = pairs[:, 0] * 12 + pairs[:, 1]
        counts.append(cells.bincount(minlength=144).double())
    ours, theirs = counts
    is_frequent = ours + theirs > 10
    terms = (ours - theirs) ** 2 / (ours + theirs)
    chi_square = terms[is_frequent].sum()
    freedom = is_frequent.sum().item() - 1
    assert freedom > 20
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)
    assert theirs[ours > 20].min() > 0  # the same nucleus


@pytest.mark.parametrize("spread", [5.0, 0.1])  # of 0.1: 1,024 of 5,000 tokens are not enough
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("top_p", [0.95, 0.5, 1e-9])
def test_the_nucleus_is_that_of_transformers(temperature, top_p, spread):
    torch.manual_seed(0)
    scores = spread * torch.randn(4, 5000)
    ours = common.NucleusFilter(top_p, temperature)(None, scores) / temperature
    theirs = TopPLogitsWarper(top_p)(None, scores / temperature)
    is_kept = ours.isfinite() & theirs.isfinite()
    assert torch.equal(ours[is_kept], theirs[is_kept])
    assert is_kept.any(1).all()
    num_differing = (ours.isfinite() != theirs.isfinite()).sum(1)
    assert num_differing.max() <= 1  # transformers adds thousands of terms up in fp32


@pytest.mark.parametrize("top_p, kept", [
    (0.49, "1"),
    (0.51, "13"),
    (0.81, "013"),
    (0.96, "0123")])
def test_the_nucleus_of_a_small_vocabulary(top_p, kept):
    probs = torch.tensor([[0.15, 0.5, 0.05, 0.3]])
    filtered = common.NucleusFilter(top_p, 1.0)(None, probs.log())
    tokens = filtered[0].isfinite().nonzero()
    assert "".join(map(str, tokens.flatten().tolist())) == kept


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.8), (0.0, 1.0)])
def test_the_sampler_reports_log_probs_and_the_mass_that_top_p_keeps(temperature, top_p, monkeypatch):
    """Against full logits of each sample alone, over several calls and batches."""
    monkeypatch.setattr(common, "sequences_that_fit", lambda *arguments: 16)
    model = small_model()
    sampling = {"do_sample": temperature > 0, "temperature": temperature or 1.0, "top_p": top_p}
    samples = common.generate_in_pieces(model, PROMPTS, settings(**sampling), 1000)
    for k, prompt in enumerate(PROMPTS):
        ids = samples.ids[k].tolist()
        length = next((t + 1 for t, token in enumerate(ids) if token in END_IDS), len(ids))
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids[:length]])).logits[0, len(prompt) - 1:-1]
        log_probs = (logits / (temperature or 1.0)).log_softmax(-1)
        exact = log_probs[torch.arange(length), ids[:length]]
        torch.testing.assert_close(samples.logps[k, :length], exact, atol=1e-4, rtol=0)
        for t in range(length):
            kept = 0.0
            for p in sorted(log_probs[t].exp().tolist(), reverse=True):
                if kept < top_p:
                    kept += p
            assert samples.kept_mass[k, t].item() == pytest.approx(kept, abs=1e-4)


def test_a_bf16_copy_samples_a_little_away_from_the_trained_model():
    model = small_model()
    model.samples_from_bf16_copy = True
    samples = common.generate_in_pieces(model, PROMPTS, settings(), 1000)
    model.samples_from_bf16_copy = False
    exact = common.generate_in_pieces(model, PROMPTS, settings(), 1000)
    gap = (samples.logps - exact.logps)[:, 0].abs()  # the first tokens have the same prompts
    assert 1e-5 < gap.mean() < 0.1


# ---- masks by position

@pytest.mark.parametrize("pad", [IM_END, 3, 0])
def test_the_mask_ends_with_the_first_of_several_end_tokens(pad, monkeypatch):
    """T1 and T2: the padding may itself be an end token, as in Qwen2.5-Instruct."""
    model = small_model()
    model.generation_config.eos_token_id = [IM_END, 3]
    tokenizer = small_tokenizer()
    a, b, c = tokenizer("abc").input_ids
    completions = torch.tensor([
        [a, b, 3, pad, pad],
        [a, IM_END, pad, pad, pad],
        [a, b, c, a, b],
        [3, pad, pad, pad, pad],
        [a, b, c, a, IM_END]])
    monkeypatch.setattr(grpo_baseline, "generate_in_pieces", lambda *args: as_samples(completions))
    ro = grpo_baseline.rollout(model, tokenizer, [SHORT] * 5, 1.0, short_args())
    assert ro.lengths() == [6, 5, 8, 4, 8]
    assert (ro.mask.int().diff(dim=1) <= 0).all()  # no gap
    assert ro.truncated.nonzero().tolist() == [[2]]
    assert ro.texts == ["ab", "a", "abcab", "", "abca"]


def test_a_rollout_has_completions_masks_and_texts_of_its_samples():
    model = small_model(seed=4)
    model.generation_config.eos_token_id = END_IDS
    tokenizer = small_tokenizer()
    args = grpo_baseline.Args(max_new_tokens=40, generation_batch_size=20)
    ro = grpo_baseline.rollout(model, tokenizer, PROMPTS, 0.0, args)
    assert torch.equal(ro.completions, generate_in_one_call(model))
    assert ro.truncated.any()
    for i, completion in enumerate(ro.completions.tolist()):
        end = 0
        while end < 40 and completion[end] not in END_IDS:
            end += 1
        assert ro.truncated[i] == (end == 40)
        assert ro.mask[i].sum() == min(end + 1, 40)
        assert ro.texts[i] == tokenizer.decode(completion[:end])


# ---- micro-batches

def test_microbatches_hold_every_sample_once_within_the_budget():
    lengths = [5, 90, 7, 7, 30, 200, 1, 30]
    batches = common.microbatches(range(8), lengths, 100)
    assert sorted(sum(batches, [])) == list(range(8))
    assert [5] in batches  # it is longer than the budget
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert batch == [5] or len(batch) * longest <= 100


@pytest.mark.parametrize("lengths, budget, expected", [
    ([10] * 5, 30, [[0, 1, 2], [3, 4]]),
    ([1, 100, 1], 1000, [[1], [0, 2]]),  # padding would cost more than another pass
    ([9, 9], 100, [[0, 1]]),
    ([], 100, [])])
def test_microbatches(lengths, budget, expected, monkeypatch):
    monkeypatch.setattr(common, "PASS_COST", 32)
    assert common.microbatches(range(len(lengths)), lengths, budget) == expected
