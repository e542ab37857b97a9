"""What makes a step fast changes nothing: rollouts are plain `generate`'s, gradients are those of full logits. Speed itself: tests/bench/."""
import itertools
import sys

import pytest
import torch
from transformers import GenerationConfig

import common
import sgpo
from conftest import small_model

PROMPTS = [[5, 6, 7]] * 3 + [[9, 8, 7, 6, 5, 4, 3]] * 2 + [[1]] + [[5, 6, 7]]
EOS = [257, 3, *range(40, 60)]


@pytest.fixture(autouse=True)
def _as_if_nothing_had_happened(monkeypatch):
    monkeypatch.setattr(common, "_rows_at_once", sys.maxsize)
    monkeypatch.setattr(common, "_warned", set())


def plain(model, prompts, new, **settings):
    """transformers' own generate on left-padded rows."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    config = GenerationConfig(max_new_tokens=new, eos_token_id=EOS, pad_token_id=0, **{"do_sample": False, **settings})
    return model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:]


def ending(kind="qwen2", **more):
    """A model whose greedy rows end at different places."""
    return small_model(kind, seed=3, vocab=260, initializer_range=0.4, **more)


@pytest.fixture(params=[False, True], ids=["default", "fast"])
def fast(request, monkeypatch):
    """Both rollout paths; without a GPU the fast one passes where its graph would be replayed."""
    if request.param:
        monkeypatch.setattr(common, "_is_fast", lambda model, flag: True)
    return request.param


# ---- rollouts

@pytest.mark.parametrize("kind", common.LOOP_MODELS)
def test_greedy_tokens_are_plain_generates(kind, fast, monkeypatch):
    """Rows that end early and late, prompts of different length, room that has to grow on the way."""
    monkeypatch.setattr(common._Layer, "ROOM", 8)
    model, kept, keep = ending(kind), [], common._Decoder.keep
    monkeypatch.setattr(common._Decoder, "keep", lambda self, rows: kept.append(len(rows)) or keep(self, rows))
    theirs = plain(model, PROMPTS + [[k, 2 * k] for k in range(10, 40)], 60)
    ours = common.generate(model, PROMPTS + [[k, 2 * k] for k in range(10, 40)], EOS, 0, 60, 0.0, 1.0)
    assert torch.equal(ours, theirs)
    lengths = common.completion_mask(ours, EOS)[0].sum(1)
    assert len(set(lengths.tolist())) > 2 and len(kept) > 1 and kept == sorted(kept, reverse=True)  # and rows did leave the batch


def test_sliding_windows_are_respected():
    model = small_model(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert torch.equal(common.generate(model, PROMPTS, EOS, 0, 20, 0.0, 1.0), plain(model, PROMPTS, 20))


def test_a_rows_draws_do_not_depend_on_who_else_is_in_the_batch(fast, monkeypatch, capsys):
    """Never leaving the batch, leaving it at once, and a batch cut in halves for want of memory: the same tokens."""
    model, write, sizes, draws = ending(), common._write, [], []

    def short(model, prompts, *rest):
        sizes.append(len(prompts))
        if len(prompts) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return write(model, prompts, *rest)

    init = common._Decoder.__init__
    for pays, writing in ((0.0, write), (1.0, write), (1.0, short)):
        monkeypatch.setattr(common._Decoder, "__init__", lambda self, *args: init(self, *args) or setattr(self, "PAYS", pays))
        monkeypatch.setattr(common, "_write", writing)
        torch.manual_seed(5)
        draws.append(common.generate(model, PROMPTS, EOS, 0, 30, 1.0, 0.9))
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])
    assert sizes == [7, 3, 3, 1] and "out of memory with 7 completions at once, going on with 3" in capsys.readouterr().err


@pytest.mark.parametrize("temperature, top_p", [(0.7, 1.0), (1.3, 0.8)])
def test_samples_follow_plain_generates_distribution(temperature, top_p, fast):
    """Pairs of tokens, 20,000 each, counted and compared (chi-square of two samples), and nothing outside the nucleus."""
    model = small_model(vocab=12, eos_token_id=11, initializer_range=0.2)
    torch.manual_seed(0)
    n, counts = 20_000, []
    for draw in (lambda: common.generate(model, [[3, 4]] * n, [11], 0, 2, temperature, top_p),
                 lambda: model.generate(input_ids=torch.tensor([[3, 4]] * n), attention_mask=torch.ones(n, 2, dtype=torch.long), generation_config=GenerationConfig(
                     do_sample=True, temperature=temperature, top_p=top_p, top_k=0, max_new_tokens=2, eos_token_id=[11], pad_token_id=0))[:, 2:]):
        pairs = draw()
        counts.append(torch.bincount(pairs[:, 0] * 12 + pairs[:, 1], minlength=144).double())
    a, b = (c[counts[0] + counts[1] > 10] for c in counts)
    chi2, freedom = ((a - b) ** 2 / (a + b)).sum().item(), len(a) - 1
    assert freedom > 20 and chi2 < freedom + 4 * (2 * freedom) ** 0.5
    if top_p < 1:
        assert ((counts[0] == 0) == (counts[1] == 0)).float().mean() > 0.95


def test_the_nucleus_and_the_ends_of_the_distribution():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    draw = lambda u, p: common.sample(logits, torch.tensor([u]), 1.0, p).item()
    assert [draw(u, 1.0) for u in (0.0, 0.49, 0.51, 0.79, 0.81, 0.96, 0.9999999)] == [0, 0, 1, 1, 2, 3, 3]
    assert [draw(u, 0.8001) for u in (0.0, 0.9999999)] == [0, 2] and draw(0.9999999, 0.79) == 1 and draw(0.9999999, 1e-9) == 0
    certain = torch.full((1, 5), -torch.inf)
    certain[0, 2] = 0.0
    assert [common.sample(certain, torch.tensor([u]), 1.0, p).item() for u in (0.0, 0.9999999) for p in (1.0, 0.5)] == [2] * 4


def test_unlikely_tokens_of_a_large_vocabulary_keep_their_share():
    """One token with half the mass before 150,000 others: where the sum is made in fp32, steps below 6e-8 round away."""
    logits = torch.zeros(1, 150_001)
    logits[0, 0] = torch.tensor(150_000.0 * 20).log()  # the others hold 1/21, 3.2e-7 each
    u = torch.linspace(20 / 21 + 1e-4, 1 - 1e-4, 400)
    ids = common.sample(logits.expand(400, -1), u, 1.0, 1.0)
    torch.testing.assert_close(ids.double(), ((u.double() - 20 / 21) * 21 * 150_000).clamp(0), atol=40, rtol=0)


def test_the_fast_path_falls_back_with_one_line(capsys):
    model = ending()
    for _ in range(2):
        ours = common.generate(model, PROMPTS, EOS, 0, 10, 0.0, 1.0, None, "on")
    assert torch.equal(ours, plain(model, PROMPTS, 10))
    assert capsys.readouterr().err == "warning: --fast_rollout: needs a GPU; going on without\n"
    common.generate(model, PROMPTS, EOS, 0, 2, 0.0, 1.0, None, "auto")  # no GPU has confirmed any model yet
    assert capsys.readouterr().err == ""


def test_off_and_unknown_models_are_plain_generate_to_the_draw(monkeypatch, capsys):
    model, looped = ending(), []
    monkeypatch.setattr(common, "_write", lambda *_: looped.append(1))
    model.generation_config.update(top_k=2, repetition_penalty=3.0, temperature=0.1)  # has no part in it
    torch.manual_seed(1)
    theirs = plain(model, PROMPTS, 12, do_sample=True, temperature=0.8, top_p=0.9, top_k=0, repetition_penalty=1.0)
    for flag, models in (("off", common.LOOP_MODELS), ("auto", ())):
        monkeypatch.setattr(common, "LOOP_MODELS", models)
        torch.manual_seed(1)
        assert torch.equal(common.generate(model, PROMPTS, EOS, 0, 12, 0.8, 0.9, None, flag), theirs)
    assert not looped and capsys.readouterr().err == "" and model.generation_config.top_k == 2


def test_a_graph_that_fails_falls_back_in_the_middle(monkeypatch, capsys):
    model = ending()
    monkeypatch.setattr(common, "_is_fast", lambda model, flag: True)
    real, calls = common._captured, []

    def captured(forward):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return real(forward)

    monkeypatch.setattr(common._Layer, "ROOM", 8)
    monkeypatch.setattr(common, "_captured", captured)
    assert torch.equal(common.generate(model, PROMPTS, EOS, 0, 30, 0.0, 1.0), plain(model, PROMPTS, 30))
    assert len(calls) == 2 and capsys.readouterr().err == "warning: --fast_rollout: operation not permitted when stream is capturing; going on without\n"


def test_a_stop_ends_a_rollout_at_the_next_token():
    def watch(ids, logits):
        return torch.full((len(ids),), ids.shape[1] == 4)
    assert common.generate(small_model(), [[5, 6]], [271], 0, 30, 1.0, 1.0, watch).shape == (1, 4)


# ---- training

@pytest.mark.parametrize("chunk", [1, 3, 10 ** 6])
@pytest.mark.parametrize("biased", [False, True])
def test_gradients_through_the_vocabulary_are_those_of_full_logits(chunk, biased, monkeypatch):
    """Log-probs of one side and the KL of two, head, bias and both hidden states, 1e-6 in fp32."""
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=biased)
    model = type("Model", (), {"get_output_embeddings": lambda self: head})()
    monkeypatch.setattr(common, "VOCABULARY_CHUNK", 50 * chunk)
    a, b = (torch.randn(8, 16, requires_grad=True) for _ in range(2))
    ids, weights, T = torch.randint(50, (8,)), torch.randn(2, 8), 0.7

    def both(x, y, ids):
        return common.log_prob_and_entropy(y, ids)[0], sgpo.reverse_kl(x, y), ids

    def gradients(outs):
        wanted = [a, b, *head.parameters()]
        return [g if g is not None else torch.zeros_like(x) for x, g in zip(wanted, torch.autograd.grad((torch.stack(outs) * weights).sum(), wanted, allow_unused=True))]

    *ours, same = common.over_vocabulary(both, model, [a, b], [ids], T)
    assert torch.equal(same, ids) and not same.requires_grad
    *full, _ = both(head(a) / T, head(b) / T, ids)
    for x, y in itertools.chain(zip(ours, full), zip(gradients(ours), gradients(full))):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


def test_a_frozen_head_and_no_gradient_at_all():
    head = torch.nn.Linear(16, 50, bias=False).requires_grad_(False)
    model, hidden = type("Model", (), {"get_output_embeddings": lambda self: head})(), torch.randn(4, 16, requires_grad=True)
    logps, _ = common.over_vocabulary(common.log_prob_and_entropy, model, [hidden], [torch.arange(4)])
    logps.sum().backward()
    assert hidden.grad.abs().max() > 0 and head.weight.grad is None
    assert not common.over_vocabulary(common.log_prob_and_entropy, model, [hidden.detach()], [torch.arange(4)])[0].requires_grad


@pytest.mark.parametrize("budget, per_batch", [(100, 0), (100, 8), (30, 8), (10 ** 6, 10), (1, 5)])
def test_microbatches_are_the_cheapest_cut(budget, per_batch):
    """Against all cuts there are."""
    def cost(batches):
        return sum(max(lengths[i] for i in b) * len(b) + per_batch for b in batches)

    lengths = [5, 40, 7, 7, 30, 12, 1, 30, 22]
    order, cuts = sorted(range(9), key=lambda i: (-lengths[i], i)), []
    for ends in itertools.product([False, True], repeat=8):
        places = [0, *(k + 1 for k, end in enumerate(ends) if end), 9]
        batches = [order[a:b] for a, b in itertools.pairwise(places)]
        if all(len(b) == 1 or lengths[b[0]] * len(b) <= budget for b in batches):
            cuts.append(cost(batches))
    ours = common.microbatches(lengths, budget, per_batch)
    assert sorted(i for b in ours for i in b) == list(range(9)) and cost(ours) == min(cuts)


def test_no_logits_of_a_whole_batch(monkeypatch):
    """Neither a rollout nor an update makes logits of more tokens than a chunk, or than one a row."""
    model, rows = small_model(), []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, out: rows.append(out.numel() // out.shape[-1]))
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, b=None: (rows.append(x.shape[0]) if w.shape[0] == 272 and x.ndim == 2 else None) or linear(x, w, b))
    monkeypatch.setattr(common, "VOCABULARY_CHUNK", 272 * 4)
    completions = common.generate(model, [[5] * 30] * 2, [257], 0, 12, 1.0, 1.0)
    mask, _ = common.completion_mask(completions, [257])
    common.completion_logps(model, [[5] * 30] * 2, completions, mask, 1.0)[0].sum().backward()
    assert len(rows) > 12 and max(rows) <= 4
