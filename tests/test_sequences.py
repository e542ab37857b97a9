"""What can silently be wrong between token ids and log-probs: masks, shifts, padding, stop tokens, sampling settings, chunks."""
import math

import pytest
import torch
from transformers import GenerationConfig

import common
import sgpo
from conftest import small_model, small_tokenizer

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2], [1]]


def reference_logps(model, prompt: list[int], completion: list[int], temperature: float = 1.0) -> torch.Tensor:
    """log pi of every completion token by the textbook: the row alone, the model's own logits, a shift by one."""
    logits = model(torch.tensor([prompt + completion])).logits[0].double() / temperature
    logps = logits.log_softmax(-1)
    return torch.stack([logps[len(prompt) + t - 1, token] for t, token in enumerate(completion)])


# ---- T1, T2: masks by the position of the first end token

def test_mask_ends_with_the_first_of_several_end_tokens():
    pad = 3  # pad is itself an end token, as in Qwen2.5-Instruct
    completions = torch.tensor([[7, 8, 3, 3, 3, 3],    # stopped by the secondary end token
                                [7, 2, 3, 3, 3, 3],    # by the primary one
                                [7, 8, 9, 7, 8, 9],    # not at all
                                [2, 3, 3, 3, 3, 3]])   # at once
    mask, truncated = common.completion_mask(completions, [2, pad])
    assert mask.sum(1).tolist() == [3, 2, 6, 1]
    assert truncated.tolist() == [False, False, True, False]


def test_the_end_token_is_trained_although_it_is_the_pad():
    model = small_model()
    eos = 257
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
        torch.testing.assert_close(logps[i, :n].double(), reference_logps(model, prompt, completions[i, :n].tolist(), 0.7), atol=1e-5, rtol=0)


def test_sampled_rows_of_a_left_padded_batch_score_as_they_were_sampled():
    """generate's own log-probs, step by step on left-padded rows, equal ours on right-padded ones."""
    model = small_model()
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    torch.manual_seed(1)
    out = model.generate(input_ids=ids, attention_mask=attention, max_new_tokens=12, do_sample=True, top_k=0, eos_token_id=257, pad_token_id=257,
                         output_logits=True, return_dict_in_generate=True)
    completions = out.sequences[:, width:]
    mask, _ = common.completion_mask(completions, [257])
    theirs = torch.stack(out.logits, 1).log_softmax(-1).gather(-1, completions[..., None])[..., 0]
    ours, _ = common.completion_logps(model, PROMPTS, completions, mask, 1.0)
    torch.testing.assert_close(ours[mask], theirs[mask], atol=1e-5, rtol=0)


class Successor(torch.nn.Module):
    """A model that puts all its mass on (id + 1) mod V."""

    def __init__(self, V: int = 50):
        super().__init__()
        self.head, self.V = torch.nn.Linear(V, V, bias=False), V
        self.head.weight.data = 100 * torch.eye(V)
        self.base_model, self.device = self.forward, torch.device("cpu")

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=False):
        hidden = torch.nn.functional.one_hot((input_ids + 1) % self.V, self.V).float()
        return type("Output", (), {"last_hidden_state": hidden})


def test_off_by_one():
    model = Successor()
    completions, mask = torch.tensor([[8, 9, 10], [2, 3, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    logps, entropy = common.completion_logps(model, [[5, 6, 7], [1]], completions, mask, 1.0)
    assert logps[mask].abs().max() < 1e-5 and entropy.abs().max() < 1e-3
    wrong, _ = common.completion_logps(model, [[5, 6, 7], [1]], completions + 1, mask, 1.0)
    assert wrong[:, 0].max() < -50


def test_guided_and_unguided_prompts_are_aligned_by_response_token():
    """The same completion behind prompts of different length: with a model that looks at the last token only, Eq. 3 is 0."""
    model = Successor()
    completions, mask = torch.tensor([[8, 9, 10]]), torch.ones(1, 3).bool()
    plain, guided = (common.completion_hidden(model, [p], completions, mask) for p in ([7], [1, 2, 3, 4, 7]))
    d, = common.over_vocabulary(lambda *logits: (sgpo.forward_kl(*logits),), model, [guided, plain])
    assert d.shape == (3,) and d.abs().max() < 1e-6


# ---- entropy, temperature, vocabulary chunks, wide embeddings

def test_entropy_and_temperature():
    logits = torch.randn(6, 40, dtype=torch.float64)
    logps, entropy = common.log_prob_and_entropy(logits / 0.7, torch.arange(6))
    p = (logits / 0.7).softmax(-1)
    torch.testing.assert_close(entropy, -(p * p.log()).sum(-1))
    torch.testing.assert_close(logps, p.log()[range(6), range(6)])


def test_vocabulary_chunks_change_nothing(monkeypatch):
    """Values and gradients of log-probs and of the KL are the same in one chunk and in chunks of two tokens, head included."""
    results = []
    for chunk_tokens in (10 ** 6, 2):
        model = small_model()
        monkeypatch.setattr(common, "VOCABULARY_CHUNK", 272 * chunk_tokens)
        completions, mask = torch.tensor([[10, 11, 12, 13, 14]]), torch.ones(1, 5).bool()
        logps, _ = common.completion_logps(model, [PROMPTS[1]], completions, mask, 1.0)
        with torch.no_grad():
            guided = common.completion_hidden(model, [PROMPTS[0]], completions, mask)
        plain = common.completion_hidden(model, [PROMPTS[1]], completions, mask)
        d, = common.over_vocabulary(lambda *logits: (sgpo.forward_kl(*logits),), model, [guided, plain])
        (logps.sum() + d.sum()).backward()
        results.append((logps.detach(), d.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


def test_no_gradient_reaches_the_guided_side_through_the_shared_head():
    """Detached hidden states are not enough: the guided logits come from the same lm_head (T12)."""
    model = small_model(tie_word_embeddings=False)
    completions, mask = torch.tensor([[10, 11, 12]]), torch.ones(1, 3).bool()
    with torch.no_grad():
        guided = common.completion_hidden(model, [PROMPTS[0]], completions, mask)
        plain = common.completion_hidden(model, [PROMPTS[1]], completions, mask)
    d, = common.over_vocabulary(lambda *logits: (sgpo.forward_kl(*logits),), model, [guided, plain])
    d.sum().backward()
    W = model.lm_head.weight
    p, q = ((h @ W.T).softmax(-1).detach() for h in (guided, plain))
    torch.testing.assert_close(W.grad, (q - p).T @ plain, atol=1e-5, rtol=1e-4)


def test_a_model_that_changes_its_logits_is_refused(monkeypatch, capsys):
    model = small_model()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: type("Output", (), {"logits": torch.tanh(forward(*a, **k).logits)}))
    with pytest.raises(SystemExit):
        common._check_head(model, "capped")
    assert "capped" in capsys.readouterr().err


# ---- T4, T5, T6: generate

def test_the_checkpoints_generation_config_does_not_leak():
    clean, poisoned = small_model(), small_model()
    poisoned.generation_config = GenerationConfig(top_k=1, top_p=0.1, repetition_penalty=5.0, temperature=0.01, min_new_tokens=9, do_sample=True,
                                                  suppress_tokens=list(range(100)), no_repeat_ngram_size=1, bad_words_ids=[[120]], eos_token_id=258)
    kept = poisoned.generation_config
    draws = []
    for model in (clean, poisoned):
        torch.manual_seed(0)
        draws.append(common.generate(model, PROMPTS * 8, [257], 257, 10, 1.0, 1.0))
    assert torch.equal(*draws)
    assert poisoned.generation_config is kept  # what is saved beside the weights stays the checkpoint's


def test_sampling_follows_the_model_distribution():
    """20,000 draws of one token against the softmax at T = 0.7: no top-k, no nucleus, no penalty is left (chi-square)."""
    model = small_model(vocab=30, eos_token_id=29, initializer_range=0.1)
    torch.manual_seed(0)
    draws = common.generate(model, [[3, 4]] * 20000, [29], 29, 1, 0.7, 1.0)[:, 0]
    p = (model(torch.tensor([[3, 4]])).logits[0, -1] / 0.7).softmax(-1).detach()
    expected = p * len(draws)
    assert expected.min() > 5
    chi2 = ((torch.bincount(draws, minlength=30) - expected) ** 2 / expected).sum().item()
    assert chi2 < 29 + 4 * math.sqrt(2 * 29)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rollout_right_after_training_mode_equals_plain_greedy(checkpointing):
    model = small_model()
    if checkpointing:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    plain = common.generate(model.eval(), PROMPTS, [257], 257, 12, 0.0, 1.0)
    model.train()
    assert torch.equal(common.generate(model, PROMPTS, [257], 257, 12, 0.0, 1.0), plain)
    assert model.training  # and the mode is given back
    for prompt, row in zip(PROMPTS, plain):  # greedy with the whole context, one token at a time
        ids = list(prompt)
        for token in row.tolist():
            assert token == model.eval()(torch.tensor([ids])).logits[0, -1].argmax().item()
            if token == 257:
                break
            ids.append(token)


# ---- micro-batches, order of problems, prompts

def test_microbatches_cover_every_row_once_within_the_budget():
    lengths = [5, 90, 7, 7, 30, 200, 1, 30]
    batches = common.microbatches(lengths, 100)
    assert sorted(i for b in batches for i in b) == list(range(8))
    assert [5] in batches  # longer than the budget: alone
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 100 for b in batches)
    assert common.microbatches([], 100) == []


def test_problem_order_is_a_function_of_seed_and_step():
    seen = [i for step in range(7) for i in common.batch_of_step(10, step, 4, seed=3)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10)) and seen[:10] != seen[10:20]
    assert common.batch_of_step(10, 5, 4, seed=3) == seen[20:24]
    assert common.batch_of_step(3, 0, 8, seed=0)[:3] != [] and len(common.batch_of_step(3, 0, 8, seed=0)) == 8


def test_prompts_through_the_chat_template_and_without_one():
    chat, base = small_tokenizer(), small_tokenizer(chat=False)
    assert chat.decode(common.build_prompt(chat, "1+1?", "Think.")) == "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    guided = chat.decode(common.build_prompt(chat, "1+1?", "", "Type: sum."))
    assert guided == "<|im_start|>user\nStrategy:\nType: sum.\n\nProblem:\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert base.decode(common.build_prompt(base, "1+1?", "Think.")) == "Think.\n\n1+1?\n\nSolution:"
    chat.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}[{{ messages[0]['content'] }}]"
    assert chat.decode(common.build_prompt(chat, "1+1?", "Think.")) == "[Think.\n\n1+1?]"
