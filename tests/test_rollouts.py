"""Between token ids and log-probs: generating in pieces, masks, shifts, padding, chunks of vocabulary."""
import itertools
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import common
import sgpo
from conftest import Successor, small_model, small_tokenizer

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2], [1]]
SHARED_PROMPTS = [[5, 6, 7]] * 3 + [[9, 8, 7, 6, 5, 4, 3]] * 2 + [[1]] + [[5, 6, 7]]
EOS = [257, 3, *range(40, 60)]


class Ends:
    """In the place of a tokenizer: its end and pad tokens."""

    def __init__(self, eos: int = 257, pad: int = 0):
        self.eos_token_id, self.pad_token_id = eos, pad


def ending(kind: str = "qwen2", **more):
    """A model whose greedy rows end at different places."""
    model = small_model(kind, seed=4, vocab=260, initializer_range=0.4, **more)
    model.generation_config.eos_token_id = EOS
    return model


def plain(model, prompts: list[list[int]], new: int, **settings) -> torch.Tensor:
    """transformers' generate, one call, on left-padded rows."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    settings = {"do_sample": False, "eos_token_id": EOS, "pad_token_id": 0, **settings}
    config = GenerationConfig(max_new_tokens=new, **settings)
    return model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:]


def reference_logps(model, prompt: list[int], completion: list[int], temperature: float) -> torch.Tensor:
    """log pi of every completion token by the textbook: the row alone, the model's logits, shifted by one."""
    logits = model(torch.tensor([prompt + completion])).logits[0].double() / temperature
    logps = logits.log_softmax(-1)
    return torch.stack([logps[len(prompt) + t - 1, token] for t, token in enumerate(completion)])


# ---- rollouts: the same tokens as one plain call

@pytest.mark.parametrize("kind, more", [
    ("qwen2", {}), ("llama", {}), ("qwen3", {}), ("gpt_neox", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("gemma2", {"hidden_activation": "gelu", "sliding_window": 4})])
def test_greedy_tokens_are_plain_generates(kind, more, monkeypatch):
    """Rows that end early and late, prompts equal and of different length; and rows do leave the batch."""
    model, sizes = ending(kind, head_dim=8, **more), []
    prompts = SHARED_PROMPTS + [[k, 2 * k] for k in range(10, 40)]
    theirs, true = plain(model, prompts, 60), model.generate
    monkeypatch.setattr(model, "generate", lambda ids, **how: sizes.append(len(ids)) or true(ids, **how))
    ours = common.generate(model, Ends(), prompts, 60, 0.0, 1.0)
    assert torch.equal(ours, theirs[:, :ours.shape[1]]) and (theirs[:, ours.shape[1]:] == 0).all()
    assert sizes[0] == 33  # each distinct prompt is read once
    assert len(sizes) > 2 and sizes[1:] == sorted(sizes[1:], reverse=True) and sizes[-1] < len(prompts)


def test_a_cache_that_cannot_drop_rows_takes_one_call():
    model = ending(
        "qwen3_next", head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"])
    ours = common.generate(model, Ends(), [[5, 6, 7]] * 2, 12, 0.0, 1.0)
    assert torch.equal(ours, plain(model, [[5, 6, 7]] * 2, 12)[:, :ours.shape[1]])


def test_a_rows_tokens_do_not_depend_on_who_else_is_in_the_batch():
    """Written all at once, three at a time, or alone; in pieces, with rows that leave."""
    model, draws = ending(), []
    for size in (100, 3, 1):
        torch.manual_seed(5)
        draws.append(common.generate(model, Ends(), SHARED_PROMPTS, 30, 1.0, 0.9, size))
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])


def test_the_checkpoints_generation_config_does_not_leak():
    clean, poisoned = small_model(), small_model()
    poisoned.generation_config = GenerationConfig(
        top_k=1, top_p=0.1, repetition_penalty=5.0, temperature=0.01, min_new_tokens=9, do_sample=True,
        suppress_tokens=list(range(100)), no_repeat_ngram_size=1, bad_words_ids=[[120]], eos_token_id=257)
    kept, drawn = poisoned.generation_config, []
    for model in (clean, poisoned):
        torch.manual_seed(0)
        drawn.append(common.generate(model, Ends(), PROMPTS * 8, 10, 1.0, 1.0))
    assert torch.equal(*drawn)
    assert poisoned.generation_config is kept  # what is saved beside the weights stays the checkpoint's


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_rollout_right_after_training_mode_equals_plain_greedy(checkpointing):
    model = small_model()
    if checkpointing:
        model.activation_checkpointing_enable()
    greedy = common.generate(model.eval(), Ends(), PROMPTS, 12, 0.0, 1.0)
    model.train()
    assert torch.equal(common.generate(model, Ends(), PROMPTS, 12, 0.0, 1.0), greedy)
    assert model.training  # and the mode is given back
    for prompt, row in zip(PROMPTS, greedy):  # greedy with the whole context, one token at a time
        ids = list(prompt)
        for token in row.tolist():
            assert token == model.eval()(torch.tensor([ids])).logits[0, -1].argmax().item()
            if token == 257:
                break
            ids.append(token)


def test_a_stop_ends_a_rollout_at_the_next_token(monkeypatch):
    true, calls = common.Sampler.__call__, []

    def stop_at_the_fourth(self, ids, scores):
        calls.append(1)
        common.Stop.asked = len(calls) == 4
        return true(self, ids, scores)

    monkeypatch.setattr(common.Sampler, "__call__", stop_at_the_fourth)
    out = common.generate(small_model(), Ends(271), [[6], [7]], 30, 1.0, 1.0, 1)
    assert out.shape == (2, 4) and out[0].any() and not out[1].any()  # the second was not begun


def test_complete_gives_ids_masks_and_texts():
    tokenizer, model = small_tokenizer(), ending()
    torch.manual_seed(0)
    ids, mask, truncated, texts = common.complete(model, tokenizer, SHARED_PROMPTS, 12, 1.0, 1.0, 4)
    again, cut = common.completion_mask(ids, EOS)
    assert torch.equal(mask, again) and torch.equal(truncated, cut) and len(texts) == 7
    assert texts[0] == tokenizer.decode(ids[0][mask[0]], skip_special_tokens=True)


# ---- the bf16 copy that samples on a GPU

def test_a_bf16_copy_leaves_weights_buffers_and_tied_heads_alone():
    model = small_model(tie_word_embeddings=True)
    half = common.bf16_copy(model)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert half.lm_head.weight is half.get_input_embeddings().weight
    assert {b.dtype for b in half.buffers()} == {b.dtype for b in model.buffers()} == {torch.float32}
    assert not any(p.requires_grad for p in half.parameters()) and model.lm_head.weight.requires_grad
    ids = torch.tensor([PROMPTS[1]])
    torch.testing.assert_close(half(ids).logits.float(), model(ids).logits, atol=0.3, rtol=0.1)


# ---- sampling

@pytest.mark.parametrize("temperature, top_p", [(0.7, 1.0), (1.3, 0.8)])
def test_samples_follow_plain_generates_distribution(temperature, top_p):
    """Pairs of tokens, 20,000 each, counted and compared: chi-square of two samples; the same nucleus."""
    model, n, counts = small_model(vocab=12, eos_token_id=11, initializer_range=0.2), 20_000, []
    torch.manual_seed(0)
    how = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=0, eos_token_id=[11])
    for pairs in (common.generate(model, Ends(11), [[3, 4]] * n, 2, temperature, top_p),
                  plain(model, [[3, 4]] * n, 2, **how)):
        counts.append(torch.bincount(pairs[:, 0] * 12 + pairs[:, 1], minlength=144).double())
    a, b = (c[counts[0] + counts[1] > 10] for c in counts)
    chi2, freedom = ((a - b) ** 2 / (a + b)).sum().item(), len(a) - 1
    assert freedom > 20 and chi2 < freedom + 4 * math.sqrt(2 * freedom)
    if top_p < 1:
        assert ((counts[0] == 0) == (counts[1] == 0)).float().mean() > 0.95


def test_the_nucleus_and_the_ends_of_the_distribution():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def draw(u: float, top_p: float) -> int:
        return common.sample(logits, torch.tensor([u]), 1.0, top_p).item()

    assert [draw(u, 1.0) for u in (0.0, 0.49, 0.51, 0.79, 0.81, 0.96, 0.9999999)] == [0, 0, 1, 1, 2, 3, 3]
    assert [draw(u, 0.8001) for u in (0.0, 0.9999999)] == [0, 2]
    assert draw(0.9999999, 0.79) == 1 and draw(0.9999999, 1e-9) == 0
    certain = torch.full((1, 5), -torch.inf).index_fill_(1, torch.tensor([2]), 0.0)
    for u, top_p in itertools.product((0.0, 0.9999999), (1.0, 0.5)):
        assert common.sample(certain, torch.tensor([u]), 1.0, top_p).item() == 2


def test_unlikely_tokens_of_a_large_vocabulary_keep_their_share():
    """One token with nearly all the mass before 150,000 others: in fp32 sums, steps below 6e-8 round away."""
    logits = torch.zeros(1, 150_001)
    logits[0, 0] = math.log(150_000 * 20)  # the others hold 1/21, 3.2e-7 each
    u = torch.linspace(20 / 21 + 1e-4, 1 - 1e-4, 100)
    ids = common.sample(logits.expand(100, -1), u, 1.0, 1.0)
    expected = ((u.double() - 20 / 21) * 21 * 150_000).clamp(0)
    torch.testing.assert_close(ids.double(), expected, atol=40, rtol=0)


# ---- T1, T2: masks by the position of the first end token

def test_the_mask_ends_with_the_first_of_several_end_tokens():
    pad = 3  # pad is itself an end token, as in Qwen2.5-Instruct
    completions = torch.tensor([[7, 8, 3, 3, 3, 3],    # stopped by the secondary end token
                                [7, 2, 3, 3, 3, 3],    # by the primary one
                                [7, 8, 9, 7, 8, 9],    # not at all
                                [2, 3, 3, 3, 3, 3]])   # at once
    mask, truncated = common.completion_mask(completions, [2, pad])
    assert mask.sum(1).tolist() == [3, 2, 6, 1]
    assert truncated.tolist() == [False, False, True, False]


def test_a_last_end_token_is_kept_although_it_is_the_pad():
    """All rows end with the pad token: it is what they wrote, not padding."""
    model = small_model()
    first = common.generate(model, Ends(271), [[5, 6, 7]], 3, 0.0, 1.0)[0].tolist()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    out = common.generate(model, Ends(first[2], pad=first[2]), [[5, 6, 7]] * 2, 8, 0.0, 1.0)
    assert out.tolist() == [first, first]


def test_the_end_token_is_trained_although_it_is_the_pad():
    model, eos = small_model(), 257
    completions = torch.tensor([[11, 12, eos, eos, eos]])
    mask, _ = common.completion_mask(completions, [eos])
    hidden = common.completion_hidden(model, [PROMPTS[0]], completions, mask)
    logits = model.get_output_embeddings()(hidden).detach().requires_grad_()
    common.log_prob_and_entropy(logits, completions[mask])[0].sum().backward()
    assert logits.shape[0] == 3 and logits.grad[2, eos].abs() > 0.01


def test_stop_ids_come_from_tokenizer_config_and_generation_config():
    model, tokenizer = small_model(), small_tokenizer()
    model.generation_config.eos_token_id = [257, 258]
    assert common.stop_ids(model, tokenizer) == [257, 258]
    model.generation_config.eos_token_id = None
    assert common.stop_ids(model, tokenizer) == [257]


# ---- T3, T7: alignment and padding

@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_rows_of_a_batch_score_as_alone(kind):
    model = small_model(kind)
    completions = torch.tensor([[10, 11, 12, 13], [20, 21, 0, 0], [30, 31, 32, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    logps, _ = common.completion_logps(model, PROMPTS, completions, mask, 0.7)
    assert (logps[~mask] == 0).all()
    for i, prompt in enumerate(PROMPTS):
        n = mask[i].sum()
        alone = reference_logps(model, prompt, completions[i, :n].tolist(), 0.7)
        torch.testing.assert_close(logps[i, :n].double(), alone, atol=1e-5, rtol=0)


def test_off_by_one():
    model, prompts = Successor(), [[5, 6, 7], [1]]
    completions, mask = torch.tensor([[8, 9, 10], [2, 3, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    logps, entropy = common.completion_logps(model, prompts, completions, mask, 1.0)
    assert logps[mask].abs().max() < 1e-5 and entropy.abs().max() < 1e-3
    wrong, _ = common.completion_logps(model, prompts, completions + 1, mask, 1.0)
    assert wrong[:, 0].max() < -50


def test_guided_and_unguided_prompts_are_aligned_by_response_token():
    """A completion behind prompts of different length: if the model reads one token only, Eq. 3 is 0."""
    model, completions, mask = Successor(), torch.tensor([[8, 9, 10]]), torch.ones(1, 3).bool()
    guided = common.completion_hidden(model, [[1, 2, 3, 4, 7]], completions, mask)
    kl = lambda *logits: (sgpo.forward_kl(*logits),)
    d, = common.token_values(kl, model, [[7]], completions, mask, [], 1.0, [guided])
    assert d.shape == (1, 3) and d.abs().max() < 1e-6


# ---- entropy, temperature, chunks of the vocabulary

def test_entropy_and_temperature():
    logits = torch.randn(6, 40, dtype=torch.float64)
    logps, entropy = common.log_prob_and_entropy(logits / 0.7, torch.arange(6))
    p = (logits / 0.7).softmax(-1)
    torch.testing.assert_close(entropy, -(p * p.log()).sum(-1))
    torch.testing.assert_close(logps, p.log()[range(6), range(6)])


@pytest.mark.parametrize("chunk", [1, 3, 10 ** 6])
@pytest.mark.parametrize("biased", [False, True])
def test_gradients_through_the_vocabulary_are_those_of_full_logits(chunk, biased, monkeypatch):
    """Log-probs of one side and the KL of two; head, bias and both hidden states, 1e-6 in fp32."""
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=biased)
    model = type("Model", (), {"get_output_embeddings": lambda self: head})()
    monkeypatch.setattr(common, "CHUNK", 50 * chunk)
    a, b = (torch.randn(8, 16, requires_grad=True) for _ in range(2))
    ids, weights, T = torch.randint(50, (8,)), torch.randn(2, 8), 0.7

    def both(x, y, ids):
        return common.log_prob_and_entropy(y, ids)[0], sgpo.reverse_kl(x, y), ids

    def gradients(outs):
        wanted = [a, b, *head.parameters()]
        found = torch.autograd.grad((torch.stack(outs) * weights).sum(), wanted, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found)]

    *ours, same = common.over_vocabulary(both, model, [a, b], [ids], T)
    assert torch.equal(same, ids) and not same.requires_grad
    *full, _ = both(head(a) / T, head(b) / T, ids)
    for x, y in [*zip(ours, full), *zip(gradients(ours), gradients(full))]:
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


def test_a_frozen_head_and_no_gradient_at_all():
    head = torch.nn.Linear(16, 50, bias=False).requires_grad_(False)
    model = type("Model", (), {"get_output_embeddings": lambda self: head})()
    hidden = torch.randn(4, 16, requires_grad=True)
    logps, _ = common.over_vocabulary(common.log_prob_and_entropy, model, [hidden], [torch.arange(4)])
    logps.sum().backward()
    assert hidden.grad.abs().max() > 0 and head.weight.grad is None
    with torch.no_grad():
        logps, _ = common.over_vocabulary(common.log_prob_and_entropy, model, [hidden], [torch.arange(4)])
    assert not logps.requires_grad


def test_no_gradient_reaches_the_guided_side_through_the_shared_head():
    """Detached hidden states are not enough: the guided logits come from the same lm_head (T12)."""
    model, completions, mask = small_model(), torch.tensor([[10, 11, 12]]), torch.ones(1, 3).bool()
    with torch.no_grad():
        guided = common.completion_hidden(model, [PROMPTS[0]], completions, mask)
        plain_side = common.completion_hidden(model, [PROMPTS[1]], completions, mask)
    d, = common.over_vocabulary(lambda *logits: (sgpo.forward_kl(*logits),), model, [guided, plain_side])
    d.sum().backward()
    W = model.lm_head.weight
    p, q = ((h @ W.T).softmax(-1).detach() for h in (guided, plain_side))
    torch.testing.assert_close(W.grad, (q - p).T @ plain_side, atol=1e-5, rtol=1e-4)


def test_no_logits_of_a_whole_batch(monkeypatch):
    """An update never makes logits of more tokens than a chunk."""
    model, rows = small_model(), []
    linear = torch.nn.functional.linear

    def counted(x, weight, bias=None):
        if weight.shape[0] == 272 and x.ndim == 2:
            rows.append(len(x))
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    monkeypatch.setattr(common, "CHUNK", 272 * 4)
    ids = torch.randint(5, 200, (2, 12))
    logps, _ = common.completion_logps(model, [[5] * 30] * 2, ids, torch.ones(2, 12).bool(), 1.0)
    logps.sum().backward()
    assert len(rows) == 12 and max(rows) == 4


# ---- micro-batches, models that are refused

def test_microbatches_cover_every_row_once_within_the_budget():
    lengths, sums = [5, 90, 7, 7, 30, 200, 1, 30], common.Sums()
    batches = common.microbatches(range(8), lengths, 100, sums)
    assert sorted(i for b in batches for i in b) == list(range(8))
    assert [5] in batches  # longer than the budget: alone
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 100 for b in batches)
    assert sums["tokens"] == sum(lengths)
    assert sums["padded"] == sum(len(b) * max(lengths[i] for i in b) for b in batches)
    assert common.microbatches([], lengths, 100) == []
    assert common.microbatches([3, 0], lengths, 100) == [[3, 0]]


def test_models_that_break_what_is_taken_for_granted_are_refused(tmp_path, monkeypatch, capsys):
    model = small_model()
    monkeypatch.setattr(common.AutoConfig, "from_pretrained", lambda *_: model.config)
    monkeypatch.setattr(common.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    true = model.forward

    def capped(*args, **kwargs):
        return type("Output", (), {"logits": torch.tanh(true(*args, **kwargs).logits)})

    def noisy(*args, **kwargs):
        logits = true(*args, **kwargs).logits
        return type("Output", (), {"logits": logits + model.training * torch.randn_like(logits)})

    def rounded(*args, **kwargs):
        return type("Output", (), {"logits": true(*args, **kwargs).logits + 0.01})

    changed = "changes its logits after lm_head"
    for forward, said in ((capped, changed), (noisy, "otherwise in train mode"), (rounded, changed)):
        monkeypatch.setattr(model, "forward", forward)
        for dtype in (torch.float32, torch.bfloat16):
            if forward is rounded and dtype == torch.bfloat16:  # no more than that
                common.load_model("some", dtype=dtype)
                continue
            with pytest.raises(SystemExit):
                common.load_model("some", dtype=dtype)
            assert said in capsys.readouterr().err


def test_dropout_that_no_module_holds_is_switched_off(tmp_path):
    """OPT drops out in a function call, by a number in its config."""
    config = AutoConfig.for_model("opt", vocab_size=260, hidden_size=16, ffn_dim=32, num_hidden_layers=1,
                                  num_attention_heads=2, max_position_embeddings=64, word_embed_proj_dim=16,
                                  dropout=0.5, attention_dropout=0.5)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model, ids = common.load_model(str(tmp_path)), torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)
