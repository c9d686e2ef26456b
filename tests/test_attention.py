"""Packed rows give what padded rows give, and compute nothing twice."""
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MambaConfig, MistralConfig, Qwen2Config

import attention
import models
import toys
from toys import KINDS
from toys import small as model

VOCAB = 64
STRANGE = {"window": (MistralConfig, {"sliding_window": 6}), "capped": (Gemma2Config, {"final_logit_softcapping": None}),
           "recurrent": (MambaConfig, {"state_size": 4}),
           "windows in some layers": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1})}


def batch(groups=3, size=4, seed=0):
    """Rows of `groups` prompts that all begin with the same eight ids, completions of 1 to 30, some of which begin alike; one is not
    trained, and one is the same as another -> ids, prompt_lengths, mask."""
    torch.manual_seed(seed)
    rows, lengths, trained, first = [], [], [], torch.randint(VOCAB, (8,)).tolist()
    for _ in range(groups):
        prompt = first + torch.randint(VOCAB, (int(torch.randint(1, 9, ())),)).tolist()
        for i in range(size):
            completion = [7, 8, 9][:i] + torch.randint(VOCAB, (int(torch.randint(1, 30, ())),)).tolist()
            rows.append(prompt + completion)
            lengths.append(len(prompt))
            trained.append(0 if (_, i) == (1, 1) else len(completion))
    rows[-1], trained[-1] = rows[-size:][0], trained[-size:][0]
    order = sorted(range(len(rows)), key=lambda i: rows[i])
    ids, mask = torch.full((len(rows), max(map(len, rows))), VOCAB - 1), torch.zeros(len(rows), 33)
    for place, i in enumerate(order):
        ids[place, :len(rows[i])] = torch.tensor(rows[i])
        mask[place, :trained[i]] = 1
    return ids, torch.tensor([lengths[i] for i in order]), mask


def logps(lm, ids, lengths, mask, grad=True, **options):
    """-> log-probabilities, entropies, the gradient of a loss that weighs every token otherwise"""
    lm.zero_grad()
    logp, entropy = models.completion_logps(lm, ids, lengths, mask, 1.1, **options)
    (logp * torch.linspace(-1, 1, logp.numel()).view_as(logp)).sum().backward()
    return logp.detach(), entropy, {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}


def padded(lm):
    """The same model, on the plain path."""
    lm.packed, lm.config._attn_implementation = False, "sdpa"
    return lm


def assert_close(found, expected):
    for a, b in zip(found[:2], expected[:2]):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert found[2].keys() == expected[2].keys()
    for name, g in expected[2].items():
        torch.testing.assert_close(found[2][name], g, rtol=0, atol=1e-5 * max(1, float(g.abs().max())), msg=lambda m: f"{name}: {m}")


# ---------------------------------------------------------------- packing
@pytest.mark.parametrize("seed", range(5))
def test_a_row_is_packed_without_the_beginning_of_the_row_before(seed):
    ids, _, _ = batch(seed=seed)
    lengths = torch.randint(1, ids.shape[1] + 1, (len(ids),))
    place, rows, (parts, back) = attention.pack(ids, lengths)
    texts = [row[:n] for row, n in zip(ids.tolist(), lengths.tolist())]
    shared = [0] + [next((k for k, (a, b) in enumerate(zip(x, y)) if a != b), min(len(x), len(y))) for x, y in zip(texts, texts[1:])]
    assert place.tolist() == [i * ids.shape[1] + k for i, x in enumerate(texts) for k in range(shared[i], len(x))]
    for i, x in enumerate(texts):
        assert ids.flatten()[place][rows[i, :len(x)]].tolist() == x
    flat = torch.cat([part.flatten() for part in parts])        # every token is given back from where it was put
    assert flat[back].tolist() == list(range(len(place)))
    assert sum(part.numel() for part in parts) < 1.4 * lengths.sum()                           # little of it is padding


def test_of_sorted_rows_nothing_in_common_is_computed_twice():
    ids, lengths, mask = batch()
    place, _, _ = attention.pack(ids, lengths)
    prompts = {tuple(row[:n]) for row, n in zip(ids.tolist(), lengths.tolist())}
    assert len(place) == len({p[:k] for p in prompts for k in range(1, len(p) + 1)}) < lengths.sum() / 4
    seen, lm = [], model(LlamaConfig)
    lm.model.embed_tokens.register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    attention.packs(lm)
    seen.clear()
    models.completion_logps(lm, ids, lengths, mask)
    ends = (lengths + (mask.sum(1).int() - 1).clamp(min=0)).tolist()                           # the last token trained is never read
    assert seen == [len({tuple(row[:k]) for row, n in zip(ids.tolist(), ends) for k in range(1, n + 1)})]


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_and_gradients_are_those_of_padded_rows(kind):
    lm = model(KINDS[kind][0], **KINDS[kind][1])
    for rows in (batch(), batch(1, 1), batch(2, 7, seed=3), [x.flip(0) for x in batch(seed=2)]):
        found = logps(lm, *rows)
        assert lm.packed
        expected = logps(padded(lm), *rows)
        assert_close(found, expected)
        del lm.packed


def test_it_goes_with_activation_checkpointing_with_small_chunks_and_with_an_adapter(tmp_path):
    import peft
    lm, rows = model(LlamaConfig), batch()
    expected = logps(padded(lm), *rows)
    del lm.packed
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    lm.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    lm.train()
    found = logps(lm, *rows, chunk=3 * VOCAB)
    assert lm.packed and len(calls) >= 2                        # forward, and once more within backward
    assert_close(found, expected)
    lm = peft.get_peft_model(model(LlamaConfig), peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    found = logps(lm.get_base_model(), *rows)
    assert lm.get_base_model().packed and found[2] and all("lora_" in name for name in found[2])
    assert_close(found, logps(padded(lm.get_base_model()), *rows))


@pytest.mark.parametrize("kind", STRANGE)
def test_models_with_more_than_plain_attention_keep_to_padded_rows(kind):
    lm, rows = model(STRANGE[kind][0], **STRANGE[kind][1]), batch()
    usual = lm.config._attn_implementation
    found = logps(lm, *rows)
    assert not lm.packed and lm.config._attn_implementation == usual
    for row, n, m, logp in zip(rows[0], rows[1].tolist(), rows[2].sum(1).int().tolist(), found[0]):
        with torch.no_grad():
            full = (lm(row[None, :n + m]).logits[0] / 1.1).log_softmax(-1)
        torch.testing.assert_close(logp[:m], full[n - 1:n + m - 1].gather(1, row[n:n + m, None]).squeeze(1), rtol=0, atol=1e-4)


def test_a_chosen_attention_is_left_alone():
    lm = model(LlamaConfig, attn_implementation="eager")
    assert not attention.packs(lm) and lm.config._attn_implementation == "eager"


def test_a_model_that_is_wrong_when_packed_is_found_out():
    lm = model(LlamaConfig)
    lm.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out + 0.1 * out.cumsum(1))           # looks back
    assert not attention.packs(lm) and lm.config._attn_implementation == "sdpa"
    lm = model(LlamaConfig)
    lm.model.register_forward_pre_hook(lambda module, args, kwargs: (args, {**kwargs, "layout": None}), with_kwargs=True)
    assert not attention.packs(lm)                              # its attention is never told of the rows


def test_what_is_no_packed_row_is_attended_to_as_ever():
    lm, (ids, _, _) = model(Qwen2Config), batch()
    mask = torch.ones_like(ids)
    mask[::2, :5] = 0                                           # padded on the left
    with torch.no_grad():
        expected = lm(ids, attention_mask=mask).logits
        cached = lm.generate(ids[:, :10], attention_mask=mask[:, :10], max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert attention.packs(lm) and lm.config._attn_implementation == "packed"
        assert torch.equal(lm(ids, attention_mask=mask).logits, expected)
        assert torch.equal(lm.generate(ids[:, :10], attention_mask=mask[:, :10], max_new_tokens=5, do_sample=False, pad_token_id=0), cached)


def test_a_saved_model_knows_nothing_of_it(tmp_path):
    lm = toys.model()
    assert attention.packs(lm)
    lm.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
