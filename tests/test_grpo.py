"""What grpo.py promises, each property against a truth of its own: plain formulas in float64 over full logits, enumeration of
all sequences, transformers' generate, a second run. Losses and advantages against TRL are in test_grpo_reference.py."""
import copy
import itertools
import json
import math
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer

import grpo
import models
import rewards
import runs
import sampler
import toys

PARTS = ("correct", "format", "length", "process", "efficiency")
KEYS = ("step", "reward", *PARTS, "frac_reward_zero_std", "frac_reward_zero_std_after", "completion_length", "truncated", "entropy", "kl",
        "clip_low", "clip_high", "grad_norm", "logp_gap", "lr", "temperature", "sample_seconds", "sample_tokens_per_s", "update_seconds",
        "update_tokens_per_s", "step_seconds", "peak_memory_gb")


# ------------------------------------------------------------------------------------------- helpers
@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    return toys.save(tmp_path_factory.mktemp("toy"))


def flags(toy, *more):
    """What most tests want, then `more`: flags one by one, or several with their values in one string."""
    more = [x for text in map(str, more) for x in (text.split() if text.startswith("--") else [text])]
    return [str(x) for x in ("--model", toy / "model", "--data", f"countdown={toy / 'countdown'}", "--steps", 2, "--prompts_per_step", 4,
                             "--group_size", 4, "--max_new_tokens", 12, "--beta", 0, "--warmup", 0, "--lr", 1e-3, *more)]


def cli(toy, out, *more):
    """A whole run -> its metrics."""
    grpo.main(flags(toy, "--output_dir", out, *more))
    return [m for m in toys.read(Path(out) / "metrics.jsonl") if "reward" in m]


def build(toy, *more, rows=toys.COUNTDOWN):
    """A run that has not begun, without its files."""
    args = grpo.parse_args(flags(toy, *more))
    tokenizer, eos_ids, _ = models.load_tokenizer(args.model)
    data = [{**row, "task": "countdown"} for row in rows]
    for row in data:
        row["prompt_ids"] = tokenizer.apply_chat_template(rewards.messages("countdown", row), add_generation_prompt=True, return_dict=False)
    return grpo.build(args, tokenizer, eos_ids, data, [], *runs.start_processes(args.dtype))


def pay(monkeypatch, earn):
    """Replaces the graders: a completion earns earn(text, row)."""
    def score_batch(tasks, texts, rows, **kwargs):
        earned = [float(earn(text, row)) for text, row in zip(texts, rows, strict=True)]
        return [dict.fromkeys(PARTS, 0.0) | {"correct": float(x > 0.5), "reward": x} for x in earned]
    monkeypatch.setattr(grpo.rewards, "score_batch", score_batch)


def made_up(n, seed=0, limit=12, adv=None):
    """Ragged rollouts: random ids, every third cut off at the limit, the others ended."""
    rng, out = random.Random(seed), []
    for i in range(n):
        ended = i % 3 != 0
        prompt = [rng.randrange(10, toys.VOCAB) for _ in range(rng.randint(2, 9))]
        ids = [rng.randrange(10, toys.VOCAB) for _ in range(rng.randint(0, limit - 1) if ended else limit)] + [0] * ended
        out.append(grpo.Rollout(index=0, prompt=prompt, completion=ids, logps=torch.full((len(ids),), -4.0), ended=ended, text="",
                                parts={"reward": 0.0}, advantage=rng.gauss(0, 1) if adv is None else adv))
    return out


def full_logps(lm, prompt, completion, temperature=1.0):
    """[len(completion), V] by one forward of one sequence, without cache, padding or chunks."""
    logits = lm(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
    return (logits[len(prompt) - 1:-1] / temperature).log_softmax(-1)


def taken(logps, ids):
    return logps.gather(1, torch.tensor(ids)[:, None]).squeeze(1)


def plain_gradient(lm, rollouts, loss, *, temperature=1.0, beta=0.0, ref=None, masked=False, limit=12):
    """Gradient of a whole step's loss at ratio 1 in float64, sequence by sequence, from the papers' formulas. -> {name: gradient}"""
    lm = copy.deepcopy(lm).double().train()
    lm.zero_grad()
    rows = [r for r in rollouts if r.ended or not masked]
    tokens, total = sum(len(r.completion) for r in rows), 0.0
    for r in rows:
        logp = taken(full_logps(lm, r.prompt, r.completion, temperature), r.completion)
        ratio = (logp - logp.detach()).exp()
        if loss == "gspo":
            ratio = (logp - logp.detach()).mean().exp().expand(len(logp))
        each = -(logp if loss == "cispo" else ratio) * r.advantage
        if beta:
            with torch.no_grad():
                at_ref = taken(full_logps(copy.deepcopy(ref).double(), r.prompt, r.completion, temperature), r.completion)
            each = each + beta * ((at_ref - logp).exp() - (at_ref - logp) - 1)
        total = total + {"grpo": each.mean() / len(rollouts), "gspo": each.mean() / len(rollouts), "dapo": each.sum() / tokens,
                         "cispo": each.sum() / tokens, "dr_grpo": each.sum() / (len(rollouts) * limit)}[loss]
    total.backward()
    return {name: p.grad for name, p in lm.named_parameters()}


def step_gradient(run, rollouts, temperature=1.0):
    """Gradient of a whole step by grpo.py's own path."""
    run.model.zero_grad()
    run.model.train()
    batches = grpo.micro_batches(rollouts, run.args.micro_batch_size, run.device, run.args.mask_truncated)
    sums = grpo.backward(run, batches, temperature, sum(float(b["mask"].sum()) for b in batches), len(rollouts))
    run.model.eval()
    return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}, sums


def assert_same(found, wanted, atol=1e-6):
    assert set(found) == set(wanted) and max(g.abs().max() for g in wanted.values()) > 1e-3
    for name in wanted:
        torch.testing.assert_close(found[name].double(), wanted[name].double(), rtol=0, atol=atol)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model, before):
    return max(float((p.detach() - before[name]).abs().max()) for name, p in model.named_parameters())


def p_value(chi_square, freedom):
    return float(torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), torch.tensor(chi_square / 2, dtype=torch.float64)))


# ------------------------------------------------------------------------------------------- 4. advantages
def test_equal_rewards_give_advantage_exactly_zero():
    for value in (0.1, 1 / 3, 1.3, -0.7, 1e-8, 12345.678):
        for group, scale in itertools.product((2, 3, 7, 12), ("group", "batch", "none")):
            mixed = torch.tensor([value] * group + [value + i for i in range(group)])
            found = grpo.advantages(mixed, group, scale)
            assert (found[:group] == 0).all() and (found[group:] != 0).any()


def test_advantages_are_the_formula_for_each_scale():
    rng = np.random.default_rng(0)
    groups = rng.random((5, 6))
    centred = groups - groups.mean(1, keepdims=True)
    wanted = {"group": centred / groups.std(1, ddof=1, keepdims=True), "batch": centred / groups.std(ddof=1), "none": centred}
    for scale, value in wanted.items():
        found = grpo.advantages(torch.tensor(groups.ravel()), 6, scale).numpy().reshape(5, 6)
        np.testing.assert_allclose(found, value, rtol=1e-3)     # the std has a small number added


# ------------------------------------------------------------------------------------------- 5, 6. log-probabilities and loss
@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "cispo", "gspo"])
def test_gradient_of_a_step_is_the_papers_for_any_split_into_micro_batches(toy, loss):
    run, rollouts = build(toy, "--loss", loss, "--beta", 0.05, "--mask_truncated"), made_up(7)
    with torch.no_grad():
        for p in run.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    wanted = plain_gradient(run.model, rollouts, loss, temperature=0.8, beta=0.05, ref=run.reference, masked=True)
    for size in (1, 3, 7):
        run.args.micro_batch_size = size
        assert_same(step_gradient(run, rollouts, 0.8)[0], wanted)
    assert_same(step_gradient(run, random.Random(3).sample(rollouts, 7), 0.8)[0], wanted)


def test_losses_of_micro_batches_add_up_when_ratios_differ_from_one():
    rng = torch.Generator().manual_seed(0)
    old = -2 * torch.rand(12, 9, generator=rng, dtype=torch.float64)
    logp, ref = (old + s * torch.randn(12, 9, generator=rng, dtype=torch.float64) for s in (0.3, 0.4))
    adv = torch.randn(12, generator=rng, dtype=torch.float64)
    mask = (torch.arange(9) < torch.randint(1, 10, (12, 1), generator=rng)).double()
    for loss in ("grpo", "dr_grpo", "dapo", "cispo", "gspo"):
        def grade(parts, width=9):
            leaf, total, said = logp.clone().requires_grad_(), 0.0, []
            for rows in parts:
                value, numbers = grpo.policy_loss(leaf[rows, :width], old[rows, :width], ref[rows, :width], adv[rows], mask[rows, :width],
                                                  loss=loss, beta=0.1, num_tokens=float(mask.sum()), num_seqs=12, max_new_tokens=9)
                value.backward()
                total += value.item()
                said.append({name: float(x) for name, x in numbers.items()})
            return total, leaf.grad, {name: sum(x[name] for x in said) for name in said[0]}
        whole = grade([list(range(12))])
        for parts in ([[i] for i in range(12)], [[7, 2, 9, 0, 4], [11, 1], [3, 5, 6, 8, 10]]):
            total, gradient, said = grade(parts)
            assert total == pytest.approx(whole[0], abs=1e-9)
            torch.testing.assert_close(gradient, whole[1], rtol=0, atol=1e-9)
            assert said == pytest.approx(whole[2], abs=1e-9)


def test_log_probabilities_and_entropies_equal_a_full_forward_whatever_the_padding_and_chunks(toy):
    lm, rollouts = AutoModelForCausalLM.from_pretrained(toy / "model"), made_up(5)
    for more in (0, 6):                                         # columns of padding beyond the longest row
        ids = torch.full((5, 21 + more), 99)
        mask = torch.zeros(5, 12 + more)
        for i, r in enumerate(rollouts):
            ids[i, :len(r.prompt + r.completion)] = torch.tensor(r.prompt + r.completion)
            mask[i, :len(r.completion)] = 1
        lengths, gradients = torch.tensor([len(r.prompt) for r in rollouts]), []
        for chunk in (1, 7 * toys.VOCAB, 10 ** 9):
            lm.zero_grad()
            logp, entropy = models.completion_logps(lm, ids, lengths, mask, 0.7, chunk=chunk)
            (logp * torch.arange(1, 6)[:, None]).sum().backward()
            gradients.append({name: p.grad.clone() for name, p in lm.named_parameters()})
            for i, r in enumerate(rollouts):
                with torch.no_grad():
                    wanted, n = full_logps(lm, r.prompt, r.completion, 0.7), len(r.completion)
                torch.testing.assert_close(logp[i, :n], taken(wanted, r.completion), rtol=0, atol=1e-5)
                torch.testing.assert_close(entropy[i, :n], -(wanted.exp() * wanted).sum(-1), rtol=0, atol=1e-5)
                assert not logp[i, n:].any()
            assert not entropy.requires_grad
        for gradient in gradients[1:]:
            for name, g in gradient.items():
                torch.testing.assert_close(g, gradients[0][name], rtol=1e-5, atol=1e-4)


class Memory(TorchDispatchMode):
    """The largest tensor made, in elements, and the most bytes alive at once, above those from before."""
    def __init__(self):
        super().__init__()
        self.largest, self.peak, self.alive = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.largest = max(self.largest, storage.nbytes() // x.element_size())
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def test_no_tensor_of_batch_by_time_by_vocabulary_ever_exists():
    n, width, vocab, hidden, chunk = 4, 48, 151_936, 8, 2 ** 20
    lm = toys.model(vocab=vocab, hidden=hidden, layers=1)
    ids, mask = torch.randint(1, vocab, (n, width + 4)), torch.ones(n, width)
    with Memory() as update:                                    # forward and backward
        logp, _ = models.completion_logps(lm, ids, torch.full((n,), 4), mask, 1.0, chunk=chunk)
        grpo.policy_loss(logp, logp.detach(), None, torch.ones(n), mask, num_tokens=n * width, num_seqs=n,
                         max_new_tokens=width)[0].backward()
    assert update.largest <= max(chunk, vocab * hidden)
    assert 0 < update.peak < 0.5 * 4 * n * width * vocab
    with Memory() as full:                                      # the ruler measures: logits in full are seen
        lm(input_ids=ids[:1, :8]).logits.log_softmax(-1)
    assert full.largest == 8 * vocab and full.peak >= 2 * 4 * 8 * vocab
    with Memory() as sampling:
        sampler.generate(lm, [[5] * 40, [6] * 30], sampler.uniforms(0, 1, range(4), 3), max_new_tokens=3, temperature=1.0, eos_ids={0},
                         group_size=2)
    assert sampling.largest <= max(4 * vocab, vocab * hidden)


def test_activation_checkpointing_changes_no_gradient(toy):
    rollouts, found = made_up(6), []
    for more in ([], ["--activation_checkpointing"]):
        run = build(toy, "--beta", 0.05, *more)
        assert base_checkpointing(run) == bool(more)
        found.append(step_gradient(run, rollouts)[0])
    assert_same(found[1], found[0])


def base_checkpointing(run):
    return any(getattr(module, "gradient_checkpointing", False) or getattr(module, "activation_checkpointing", False)
               for module in run.model.modules())


def test_two_inner_epochs_end_alike_for_any_split_and_order(toy):
    """Through update() itself, with plain SGD in place of Adam, which would blow rounding up where a gradient is nearly 0."""
    ends, rollouts = [], made_up(9)
    for size, order in ((9, rollouts), (2, rollouts), (4, rollouts[::-1])):
        run = build(toy, "--inner_epochs", 2, "--micro_batch_size", size, "--beta", 0.02, "--clip_low", 0.01, "--clip_high", 0.01)
        before = weights(run.model)
        run.optimizer.optimizers = [(torch.optim.SGD(run.optimizer.parameters, lr=0.1), run.optimizer.parameters)]
        grpo.update(run, order, 1.0, 1)
        assert moved(run.model, before) > 1e-3
        ends.append(weights(run.model))
    assert_same(ends[1], ends[0])
    assert_same(ends[2], ends[0])


def test_second_inner_epoch_takes_the_first_ones_log_probabilities_as_old(toy, monkeypatch):
    seen, real = [], grpo.policy_loss
    monkeypatch.setattr(grpo, "policy_loss", lambda *a, **k: (seen.append([x.detach().clone() for x in a[:2]]), real(*a, **k))[1])
    run = build(toy, "--inner_epochs", 3, "--micro_batch_size", 9)
    grpo.update(run, made_up(9), 1.0, 1)
    (first, old), *later = seen
    assert len(later) == 2 and torch.equal(first, old)
    for logp, old in later:
        assert torch.equal(old, first) and (logp - old).abs().max() > 1e-3
    assert not torch.equal(later[0][0], later[1][0])


# ------------------------------------------------------------------------------------------- 6, 7. what an update does
def test_the_end_token_is_trained(toy):
    """A completion that is the end token alone, and pays, becomes likelier: pad and end token are one id in this tokenizer."""
    run = build(toy)
    assert run.tokenizer.pad_token_id == run.tokenizer.eos_token_id == 0
    rollouts = made_up(4, adv=0.0)
    rollouts[1].completion, rollouts[1].logps, rollouts[1].advantage = [0], torch.tensor([-4.0]), 1.0
    before = full_logps(run.model, rollouts[1].prompt, [0])[0, 0].item()
    grpo.update(run, rollouts, 1.0, 1)
    assert full_logps(run.model, rollouts[1].prompt, [0])[0, 0].item() > before + 0.01


def test_every_sampled_token_is_trained_and_no_other():
    for masked in (False, True):
        rollouts = made_up(9)
        batches = grpo.micro_batches(rollouts, 4, torch.device("cpu"), masked)
        found = sorted((b["ids"][i, b["prompt_lengths"][i] + t].item(), b["adv"][i].item())
                       for b in batches for i in range(len(b["ids"])) for t in range(b["mask"].shape[1]) if b["mask"][i, t])
        wanted = sorted((x, torch.tensor(r.advantage).item()) for r in rollouts if r.ended or not masked for x in r.completion)
        assert found == wanted


def test_probability_of_the_end_rises_when_ending_is_rewarded(toy, monkeypatch):
    monkeypatch.setattr(grpo.Curriculum, "draw", lambda self, k, exclude=(): [i for i in range(k) if i not in exclude])
    run = build(toy, "--group_size", 16, "--max_resample", 0)
    pay(monkeypatch, lambda text, row: len(text) < 11)          # ended, more or less
    prompt = run.data[0]["prompt_ids"]

    def chance():
        return full_logps(run.model, prompt, [0])[0, 0].exp().item()

    before = chance()
    for step in range(1, 6):
        grpo.update(run, grpo.collect(run, step, 1.0)[0], 1.0, 3)
    assert chance() > 3 * before


def test_kl_pulls_back_to_the_reference(toy):
    """Zero advantages and beta > 0: each update brings the policy nearer to the reference, in the exact KL over the vocabulary."""
    run = build(toy, "--beta", 0.1)
    with torch.no_grad():
        for p in run.model.parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    rollouts = grpo.rollout(run, run.data, [0, 1, 2, 3], 1, 1.0)

    @torch.no_grad()
    def kl():
        total = 0.0
        for r in rollouts:
            logp, ref = (full_logps(lm, r.prompt, r.completion) for lm in (run.model, run.reference))
            total += float((logp.exp() * (logp - ref)).sum())
        return total

    trace = [kl()]
    for _ in range(5):
        said = grpo.update(run, rollouts, 1.0, 0.3)
        trace.append(kl())
    assert said["kl"] > 0 and trace == sorted(trace, reverse=True) and trace[-1] < 0.9 * trace[0]


def test_a_step_of_equal_rewards_changes_nothing(toy, monkeypatch):
    pay(monkeypatch, lambda text, row: 0.1)
    for resample in (0, 2):
        run = build(toy, "--max_resample", resample)
        before = weights(run.model)
        for step in (1, 2):
            said = grpo.update(run, grpo.collect(run, step, 1.0)[0], 1.0, 10)
            assert said["grad_norm"] == 0
        assert moved(run.model, before) == 0


def test_a_group_of_equal_rewards_adds_nothing_to_the_others_gradient(toy):
    run, live = build(toy, "--loss", "grpo"), made_up(8)
    dead = made_up(4, seed=9)
    for r, adv in zip(dead, grpo.advantages(torch.full((4,), 0.1), 4).tolist()):
        r.advantage = adv
    alone, both = step_gradient(run, live)[0], step_gradient(run, live + dead)[0]
    assert_same({name: g * 12 / 8 for name, g in both.items()}, alone)      # the mean is over 12 sequences


def test_rows_without_an_advantage_are_measured_but_get_no_backward_pass(toy, monkeypatch):
    said, gradients, backward = [], [], []
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss, real=torch.Tensor.backward: (backward.append(1), real(loss)))
    for beta in (0, 1e-12):                                     # with the KL every row has a gradient
        run, rollouts = build(toy, "--beta", beta, "--micro_batch_size", 4, "--lr", 0.1), made_up(12)
        for r in rollouts[:7]:
            r.advantage = 0.0
        backward.clear()
        before = weights(run.model)
        said.append(grpo.update(run, rollouts, 1.0, 1.0))
        gradients.append({name: w - before[name] for name, w in weights(run.model).items()})
        assert len(backward) == (2 if beta == 0 else 3)
    for name in ("entropy", "logp_gap", "loss", "grad_norm"):
        assert said[0][name] == pytest.approx(said[1][name], rel=1e-4, abs=1e-7), name
    assert_same(*gradients)


def test_masked_truncation_leaves_no_trace_of_what_was_cut_off(toy):
    run, rollouts = build(toy, "--mask_truncated", "--loss", "dapo"), made_up(9)
    ended = [r for r in rollouts if r.ended]
    assert 0 < len(ended) < 9
    assert_same(step_gradient(run, rollouts)[0], step_gradient(run, ended)[0])
    run.args.mask_truncated = False
    with pytest.raises(AssertionError):
        assert_same(step_gradient(run, rollouts)[0], step_gradient(run, ended)[0])


def test_a_step_whose_completions_are_all_cut_off_and_masked_changes_nothing_and_logs_every_number(toy, tmp_path, monkeypatch):
    pay(monkeypatch, lambda text, row: len(text) % 2)
    folder = toys.save(tmp_path / "toy")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.generation_config.eos_token_id = model.config.eos_token_id = 127
    model.save_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.eos_token = toys.UNKNOWN                          # neither id comes within two tokens here
    tokenizer.save_pretrained(folder / "model")
    lines = cli(folder, tmp_path / "out", "--mask_truncated", "--max_new_tokens", 2, "--steps", 2)
    assert all(m["truncated"] == 1 for m in lines)
    assert all(set(KEYS) <= set(m) for m in lines), sorted(set(KEYS) - set(lines[0]))
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert moved(after, weights(model)) == 0


def optimizer(model, **changes):
    args = dict(optim="adamw", lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, max_grad_norm=0.0) | changes
    return models.Optimizer(model, SimpleNamespace(**args))


def test_an_update_of_5e_7_moves_bfloat16_weights_in_the_long_run():
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    start, masters = layer.weight.detach().clone(), optimizer(layer, lr=5e-7)
    for step in range(800):
        layer.weight.sum().backward()
        masters.step(1.0)
        if not step:
            torch.testing.assert_close(masters.weights()["weight"], start.float() - 5e-7, rtol=0, atol=1e-8)
    assert layer.weight.dtype == torch.bfloat16 and masters.weights()["weight"].dtype == torch.float32
    torch.testing.assert_close(masters.weights()["weight"], start.float() - 4e-4, rtol=0, atol=1e-5)
    assert is_nearest(layer.weight, masters.weights()["weight"]) and (layer.weight < start).float().mean() > 0.9

    plain = torch.nn.Parameter(start.clone())                   # without masters nearly nothing moves
    adamw = torch.optim.AdamW([plain], lr=5e-7, weight_decay=0.0)
    for _ in range(50):
        plain.grad = torch.ones_like(plain)
        adamw.step()
    assert (plain != start).float().mean() < 0.05


def is_nearest(short, master):
    """Is no bf16 nearer to the fp32 master? (Two are where it lies in the middle.)"""
    return bool(((short.float() - master).abs() <= (master.bfloat16().float() - master).abs()).all())


def test_gradients_of_bfloat16_weights_add_up_in_fp32():
    model = torch.nn.ParameterDict({"p": torch.ones(4, dtype=torch.bfloat16)})
    masters = optimizer(model)
    for _ in range(1000):                                       # in bf16 the sum would stick at 256
        model["p"].sum().backward()
    gradient, = masters.grads().values()
    assert gradient.dtype == torch.float32 and (gradient == 1000).all()


def test_an_fp32_weight_is_its_own_master():
    layer = torch.nn.Linear(4, 4)
    assert all(p is master for p, master in optimizer(layer).master.items())


# ------------------------------------------------------------------------------------------- 2. sampling
PROMPTS = [[40, 41, 42], [50], [60, 61, 62, 63, 64, 65, 66], [70, 71]]


def transformers_greedy(lm, prompts, limit, ends):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = lm.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=limit, eos_token_id=sorted(ends), pad_token_id=0)
    rows = []
    for row in out[:, width:].tolist():
        end = next((t for t, x in enumerate(row) if x in ends), limit)
        rows.append(row[:end + 1])
    return rows


@pytest.mark.parametrize("prompts", [PROMPTS, [p[:1] for p in PROMPTS]], ids=["ragged, left-padded", "one length"])
def test_sampler_equals_generate_token_for_token(prompts):
    lm = toys.model(seed=3, std=0.3)
    free = transformers_greedy(lm, prompts, 40, set())
    ends = {free[0][5], free[1][11], free[2][2]}                # several end tokens, met at different times
    wanted = transformers_greedy(lm, prompts, 40, ends)
    assert len({len(row) for row in wanted}) > 2
    found, logps = sampler.generate(lm, prompts, None, max_new_tokens=40, temperature=1.0, eos_ids=ends, pad_id=0)
    assert found == wanted
    for prompt, ids, logp in zip(prompts, found, logps):
        with torch.no_grad():
            torch.testing.assert_close(logp, taken(full_logps(lm, prompt, ids), ids), rtol=0, atol=1e-4)


def sample(lm, prompts, rows, *, group_size=1, temperature=1.0, limit=30, ends=frozenset({0, 20, 21, 22, 23}), seed=5, step=2):
    noise = sampler.uniforms(seed, step, rows, limit)
    return sampler.generate(lm, prompts, noise, max_new_tokens=limit, temperature=temperature, eos_ids=ends, group_size=group_size)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_log_probabilities_of_the_sampler_equal_a_full_forward(temperature):
    lm = toys.model(seed=3)
    ids, logps = sample(lm, PROMPTS, range(16), group_size=4, temperature=temperature)
    assert len({len(row) for row in ids}) > 4
    for i, (row, logp) in enumerate(zip(ids, logps)):
        with torch.no_grad():
            torch.testing.assert_close(logp, taken(full_logps(lm, PROMPTS[i // 4], row, temperature), row), rtol=0, atol=1e-5)


def test_a_completion_ends_with_the_first_end_token_or_at_the_limit():
    ids, logps = sample(toys.model(seed=3), PROMPTS, range(80), group_size=20)
    ends = {0, 20, 21, 22, 23}
    assert all(len(logp) == len(row) for row, logp in zip(ids, logps))
    assert all(not ends & set(row[:-1]) and (row[-1] in ends or len(row) == 30) for row in ids)
    assert {row[-1] for row in ids} & ends > {0} and any(len(row) == 30 for row in ids)


def test_tokens_of_a_row_do_not_depend_on_its_company():
    lm = toys.model(seed=3)
    together, _ = sample(lm, PROMPTS, range(12), group_size=3)
    assert len(set(map(tuple, together))) == 12                 # each row has noise of its own
    for i, prompt in enumerate(PROMPTS):
        assert sample(lm, [prompt], range(3 * i, 3 * i + 3), group_size=3)[0] == together[3 * i:3 * i + 3]
    assert sample(lm, [PROMPTS[2], PROMPTS[0]], [7, 1])[0] == [together[7], together[1]]
    assert sample(lm, PROMPTS, range(12), group_size=3, step=3)[0] != together
    assert sample(lm, PROMPTS, range(12), group_size=3, seed=6)[0] != together


def test_splitting_the_sampling_changes_no_token(toy):
    found = []
    for size in (4, 8, 512):
        run = build(toy, "--sample_batch_size", size)
        found.append([r.completion for r in grpo.rollout(run, run.data, [3, 0, 5, 1], 7, 1.3)])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_sampling_law_is_the_training_law(temperature):
    """All sequences of up to 3 of 8 tokens, counted over 8,000 samples, against softmax(logits / T) enumerated in float64."""
    lm, limit, n = toys.model(seed=1, std=0.35, vocab=8, hidden=16, layers=1), 3, 8000
    exact, prompts = copy.deepcopy(lm).double(), [[3, 5, 1], [4, 4, 2, 6, 4]]           # the first one is left-padded

    @torch.no_grad()
    def grow(law, prompt, done, chance):
        if done and (done[-1] == 0 or len(done) == limit):
            law[done] = chance
            return
        for token, p in enumerate((exact(torch.tensor([[*prompt, *done]])).logits[0, -1] / temperature).softmax(-1).tolist()):
            grow(law, prompt, (*done, token), chance * p)

    ids, _ = sampler.generate(lm, prompts, sampler.uniforms(1, 1, range(2 * n), limit), max_new_tokens=limit, temperature=temperature,
                           eos_ids={0}, pad_id=0, group_size=n)
    for k, prompt in enumerate(prompts):
        law = {}
        grow(law, prompt, (), 1.0)
        assert sum(law.values()) == pytest.approx(1)
        counts = dict.fromkeys(law, 0)
        for row in ids[k * n:(k + 1) * n]:
            counts[tuple(row)] += 1
        rare = [s for s in law if law[s] * n < 8]
        cells = [(counts[s], law[s] * n) for s in law if law[s] * n >= 8]
        cells += [(sum(counts[s] for s in rare), sum(law[s] for s in rare) * n)] if rare else []
        assert len(cells) > 50
        assert p_value(sum((seen - due) ** 2 / due for seen, due in cells), len(cells) - 1) > 1e-4
    prompt = prompts[1]
    rows = list(law)[::17]                                      # and the trained log-probabilities are of that law
    mask = torch.tensor([[float(t < len(s)) for t in range(limit)] for s in rows])
    padded = torch.tensor([prompt + list(s) + [0] * (limit - len(s)) for s in rows])
    logp = models.completion_logps(lm, padded, torch.full((len(rows),), 5), mask, temperature)[0].sum(1)
    torch.testing.assert_close(logp.double(), torch.tensor([math.log(law[s]) for s in rows], dtype=torch.float64), rtol=0, atol=1e-4)


def test_noise_is_uniform_and_a_function_of_seed_step_and_row():
    noise = sampler.uniforms(3, 4, range(400), 50)
    assert noise.shape == (400, 50) and 0 <= noise.min() and noise.max() < 1
    bins = torch.histc(noise, 20, 0, 1)
    assert p_value(float(((bins - 1000) ** 2 / 1000).sum()), 19) > 1e-4
    assert torch.equal(sampler.uniforms(3, 4, [17, 2], 50), noise[[17, 2]])
    assert torch.equal(sampler.uniforms(3, 4, [17], 20)[0], noise[17, :20])
    pool = torch.cat([noise, sampler.uniforms(3, 5, range(400), 50), sampler.uniforms(4, 4, range(400), 50)])
    assert len(pool[:, :2].unique(dim=0)) == 1200


def test_a_token_of_no_probability_is_never_picked():
    """Where rounding makes the whole mass more or less than 1, the largest and smallest noise must still find a real token."""
    rng = torch.Generator().manual_seed(0)
    for edge in (0.0, 1 - 2 ** -24):
        logits = 3 * torch.randn(4000, 50, generator=rng)
        logits[:, :5] = logits[:, -5:] = -math.inf
        ids, logps = sampler.pick(logits, 1.0, torch.full((4000,), edge))
        assert logps.isfinite().all() and ((ids >= 5) & (ids < 45)).all()


def test_every_end_token_of_the_model_ends_a_completion(toy, tmp_path):
    folder = toys.save(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.generation_config.eos_token_id = [90, 91, 92]
    model.save_pretrained(folder / "model")
    run = build(folder, "--max_new_tokens", 60, "--group_size", 16)
    assert run.eos_ids == {0, 90, 91, 92}                       # the tokenizer's too
    rollouts = grpo.rollout(run, run.data, [0, 1, 2, 3], 1, 1.0)
    last = {r.completion[-1] for r in rollouts if r.ended}
    assert last == {0, 90, 91, 92}
    for r in rollouts:
        assert r.ended == (r.completion[-1] in run.eos_ids) and not run.eos_ids & set(r.completion[:-1])


def test_generation_config_of_the_checkpoint_does_not_leak_into_sampling(toy, tmp_path):
    folder = toys.save(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.generation_config.update(do_sample=True, top_k=2, top_p=0.5, repetition_penalty=1.5, temperature=0.1)
    model.save_pretrained(folder / "model")
    a, b = (build(x) for x in (toy, folder))
    found = [[r.completion for r in grpo.rollout(run, run.data, [0, 1], 1, 1.0)] for run in (a, b)]
    assert found[0] == found[1]


def test_text_that_is_scored_is_the_completion_without_special_tokens(toy, monkeypatch):
    seen = []
    pay(monkeypatch, lambda text, row: seen.append((text, row["target"])) or 0)
    run = build(toy, "--max_new_tokens", 40, "--group_size", 32)
    rollouts = grpo.rollout(run, run.data, [2, 5], 1, 1.0)
    assert 0 < sum(r.ended for r in rollouts) < 64
    for r, (text, target), index in zip(rollouts, seen, [2] * 32 + [5] * 32, strict=True):
        assert r.index == index and r.prompt == run.data[index]["prompt_ids"] and target == run.data[index]["target"]
        assert r.text == text == run.tokenizer.decode([x for x in r.completion if x not in run.tokenizer.all_special_ids])


# ------------------------------------------------------------------------------------------- policies
def lora_run(toy, *more):
    run = build(toy, "--lora_rank", 4, "--lora_alpha", 12, "--beta", 0.01, *more)
    rng = torch.Generator().manual_seed(0)
    return run, rng


def shake(run, rng, size=0.1):
    with torch.no_grad():
        for p in run.optimizer.parameters:
            p.copy_(size * torch.randn(p.shape, generator=rng))


def merged_once(toy, run):
    """W + alpha / rank * B A in float64, from the checkpoint's own weights. -> {name: weight}"""
    base = weights(AutoModelForCausalLM.from_pretrained(toy / "model"))
    adapter = {name: p.detach().double() for name, p in run.model.named_parameters() if ".lora_" in name}
    for name, a in adapter.items():
        if ".lora_A." in name:
            key = name.removeprefix("base_model.model.").replace("lora_A.default.", "")
            base[key] = base[key].double() + 12 / 4 * adapter[name.replace("lora_A", "lora_B")] @ a
    return base


def test_sampler_is_base_plus_adapter_after_a_thousand_refreshes(toy):
    run, rng = lora_run(toy)
    shake(run, rng)
    for i in range(1000):
        with torch.no_grad():
            run.optimizer.parameters[i % 28].neg_()             # A and B of 7 matrices in 2 layers
        models.refresh(run.sampler, run.model)
    wanted, found = merged_once(toy, run), weights(run.sampler)
    fresh = AutoModelForCausalLM.from_pretrained(toy / "model")
    models.refresh(fresh, run.model)
    assert sum(bool((found[name].double() - w.double()).abs().max() > 0) for name, w in
               weights(AutoModelForCausalLM.from_pretrained(toy / "model")).items()) == 14      # 7 matrices in 2 layers
    for name, w in wanted.items():
        torch.testing.assert_close(found[name].double(), w.double(), rtol=0, atol=1e-6)
        assert torch.equal(found[name], weights(fresh)[name])   # no drift: as after the first
    with torch.no_grad():
        ids = torch.tensor([[40, 50, 60, 70]])
        torch.testing.assert_close(run.sampler(ids).logits, run.model(ids).logits, rtol=0, atol=1e-4)


def test_the_next_rollout_sees_the_update(toy):
    for more in ([], ["--lora_rank", 4]):
        run = build(toy, *more)
        before = [r.completion for r in grpo.rollout(run, run.data, [0, 1], 1, 1.0)]
        grpo.update(run, made_up(8), 1.0, 30)
        after = grpo.rollout(run, run.data, [0, 1], 1, 1.0)
        assert [r.completion for r in after] != before
        for r in after:
            with torch.no_grad():
                torch.testing.assert_close(r.logps, taken(full_logps(run.model, r.prompt, r.completion), r.completion), rtol=0, atol=1e-4)


def test_reference_of_an_adapter_is_the_base_to_the_bit(toy, monkeypatch):
    """For LoRA, and for QLoRA on 4-bit weights, also after the adapter has moved."""
    import bitsandbytes  # noqa: F401
    seen, real = [], grpo.policy_loss
    monkeypatch.setattr(grpo, "policy_loss", lambda *a, **k: (seen.append([x.detach().clone() for x in a[:3]]), real(*a, **k))[1])
    for more in ([], ["--load_in_4bit"]):
        seen.clear()
        run = build(toy, "--lora_rank", 4, "--beta", 0.01, "--micro_batch_size", 9, *more)
        rollouts = made_up(9)
        for _ in range(2):
            said = grpo.update(run, rollouts, 1.0, 10)
        (start, _, first), (now, _, second) = seen
        assert torch.equal(first, start) and torch.equal(second, start)     # B is 0 at the start: the base
        assert not torch.equal(now, start) and said["kl"] > 1e-4


def test_only_the_adapter_is_trained(toy):
    run = build(toy, "--lora_rank", 4)
    before = weights(run.model)
    grpo.update(run, made_up(8), 1.0, 10)
    changed = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(".lora_" in name for name in changed)


def test_gradient_of_an_adapter_is_that_of_the_merged_model(toy):
    """Chain rule: dL/dB = scale * dL/dW A^T, with dL/dW from a plain model that holds the merged weights."""
    run, rng = lora_run(toy, "--beta", 0)
    shake(run, rng)
    models.refresh(run.sampler, run.model)
    rollouts = made_up(6)
    wanted, found = plain_gradient(run.sampler, rollouts, "dapo"), step_gradient(run, rollouts)[0]
    for name, g in found.items():
        if ".lora_B." in name:
            a = dict(run.model.named_parameters())[name.replace("lora_B", "lora_A")].detach().double()
            key = name.removeprefix("base_model.model.").replace("lora_B.default.", "")
            torch.testing.assert_close(g.double(), 12 / 4 * wanted[key] @ a.T, rtol=0, atol=1e-5)


def test_qlora_samples_from_the_weights_that_it_trains(toy):
    run = build(toy, "--lora_rank", 4, "--load_in_4bit")
    grpo.update(run, made_up(8), 1.0, 10)
    assert any(p.dtype == torch.uint8 for p in run.model.parameters())
    ids = torch.tensor([[40, 50, 60, 70]])
    with torch.no_grad():
        torch.testing.assert_close(run.sampler(ids).logits, run.model(ids).logits, rtol=0, atol=1e-4)
        assert (run.sampler(ids).logits - AutoModelForCausalLM.from_pretrained(toy / "model")(ids).logits).abs().max() > 0.01


def test_muon_moves_the_layers_matrices_and_adamw_the_rest(toy):
    """Each at its own peak learning rate, as the schedule scales it: AdamW's first step is the rate in every weight, Muon's
    matrices change by orthogonal ones: their singular values are alike."""
    run = build(toy, "--optim muon --muon_lr 2e-2 --lr 1e-3")
    before, used = weights(run.model), torch.arange(10, 20)
    grpo.update(run, made_up(8), 1.0, 0.5)                      # half of the peak
    for name, p in run.model.named_parameters():
        step = (p.detach() - before[name]).abs()
        if ".layers." in name and p.ndim == 2:
            values = torch.linalg.svdvals(p.detach() - before[name])
            assert 0.5e-2 < values[0] < 2.5e-2 and (values > 0.4 * values[0]).float().mean() > 0.5       # the rest: no gradient
        elif p.ndim == 1:
            assert step.median().item() == pytest.approx(5e-4, rel=0.05)
    embedding = run.model.lm_head.weight.detach() - before["model.embed_tokens.weight"]
    assert embedding[used].abs().median().item() == pytest.approx(5e-4, rel=0.1)


def test_8_bit_adamw_trains(toy):
    run = build(toy, "--optim", "adamw8bit")
    before = weights(run.model)
    grpo.update(run, made_up(8), 1.0, 1)
    assert 5e-4 < moved(run.model, before) < 2e-3


def test_bfloat16_policy_keeps_masters_that_the_weights_follow(toy):
    run = build(toy, "--dtype", "bfloat16")
    for _ in range(3):
        grpo.update(run, made_up(8), 1.0, 0.01)
    masters = run.optimizer.weights()
    for name, p in run.model.named_parameters():
        assert p.dtype == torch.bfloat16 and masters[name].dtype == torch.float32 and is_nearest(p, masters[name])
    assert any(not torch.equal(p.float(), masters[name]) for name, p in run.model.named_parameters())


# ------------------------------------------------------------------------------------------- 1, 3. curriculum
def test_pass_rate_estimate_is_right():
    rng, n, size = np.random.default_rng(0), 60, 8
    truth = np.repeat([0.0, 0.1, 0.3, 0.5, 0.8, 1.0], 10)
    curriculum, seen = grpo.Curriculum(n, size, 0, 0.1), [[] for _ in range(n)]
    for _ in range(80):
        for i in range(n):
            curriculum.record(i, int(rng.binomial(size, truth[i])))
            seen[i].append(curriculum.pass_rate(i))
    assert all(0 < p < 1 for row in seen for p in row)          # nothing is ever taken for certain
    for p in set(truth):
        assert np.mean([seen[i][3:] for i in range(n) if truth[i] == p]) == pytest.approx(p, abs=0.04)
    for i in range(n):                                          # and it follows a model that learns: the past decays
        for _ in range(4):
            curriculum.record(i, size)
        assert curriculum.pass_rate(i) > 0.85


def test_prompts_always_or_never_solved_come_rarely_but_come():
    rng, size, n = np.random.default_rng(0), 8, 90
    truth = np.repeat([0.0, 0.5, 1.0], n // 3)

    def counts(floor):
        curriculum, drawn = grpo.Curriculum(n, size, 0, floor), np.zeros(n)
        for step in range(400):
            chosen = curriculum.draw(6)
            assert len(set(chosen)) == 6
            for i in chosen:
                curriculum.record(i, int(rng.binomial(size, truth[i])))
                drawn[i] += step >= 30
        return drawn.reshape(3, -1)

    never, sometimes, always = counts(0.1)
    assert max(never.mean(), always.mean()) < 0.4 * sometimes.mean()
    assert min(never.min(), always.min()) >= 3                  # each of them
    even = counts(1.0)                                          # floor 1 switches it off
    assert even.max() <= 1.3 * even.min() + 3


def test_every_prompt_comes_early_in_an_order_that_is_the_seeds():
    seen = []
    for seed in (3, 4):
        curriculum, order = grpo.Curriculum(40, 4, seed, 0.1), []
        for _ in range(15):
            chosen = curriculum.draw(4)
            for i in chosen:
                curriculum.record(i, 2)
            order += chosen
        assert set(order) == set(range(40)) and len(set(order[:28])) == 28
        seen.append(order)
    assert seen[0] != seen[1] and seen[0][:28] != sorted(seen[0][:28])


def stub_rollout(truth, size, rng, calls=None):
    """In place of grpo.rollout: completions of prompt i are right with chance truth[i]; each has a tag of its own."""
    def rollout(run, data, indices, step, temperature, first_row=0):
        right = [float(rng.random() < truth[i]) for i in indices for _ in range(size)]
        calls is None or calls.append((list(indices), first_row))
        return [grpo.Rollout(index=indices[k // size], prompt=[1], completion=[2], logps=torch.zeros(1), ended=True,
                             text=f"{first_row + k}", parts=dict.fromkeys(PARTS, 0.0) | {"correct": x, "reward": x})
                for k, x in enumerate(right)]
    return rollout


def stub_run(n, prompts, size, resample, scale="group"):
    args = grpo.parse_args(["--model", "x", "--prompts_per_step", str(prompts), "--group_size", str(size), "--max_resample", str(resample),
                            "--scale", scale])
    return SimpleNamespace(args=args, data=[{"task": "countdown"}] * n, curriculum=grpo.Curriculum(n, size, 0, 0.1))


def test_fresh_groups_replace_dead_ones_up_to_the_limit(monkeypatch):
    size, rng = 4, random.Random(0)
    for resample, prompts in ((0, 6), (1, 6), (4, 6), (9, 2)):
        calls, run = [], stub_run(40, prompts, size, resample)
        monkeypatch.setattr(grpo, "rollout", stub_rollout([0.0] * 40, size, rng, calls))
        trained, first, drawn = grpo.collect(run, 1, 1.0)       # all dead: the limit holds, and nothing is lost
        assert len(calls) == 1 + resample and len(drawn) == prompts * size * (1 + resample)
        assert len({i for indices, _ in calls for i in indices}) == prompts * (1 + resample)    # fresh prompts
        assert [at for _, at in calls] == [prompts * size * k for k in range(1 + resample)]     # fresh noise
        assert trained == first == drawn[:prompts * size]
    calls, run = [], stub_run(40, 6, size, 30)
    monkeypatch.setattr(grpo, "rollout", stub_rollout([0.5, 0.0] * 20, size, rng, calls))
    trained, first, drawn = grpo.collect(run, 1, 1.0)
    groups = [trained[at:at + size] for at in range(0, len(trained), size)]
    assert len(groups) == 6 and all(len({r.parts["reward"] for r in group}) == 2 for group in groups)
    assert sum(len(indices) for indices, _ in calls) < 40       # and no more are drawn than it takes
    assert first == drawn[:6 * size]
    calls.clear()
    monkeypatch.setattr(grpo, "rollout", stub_rollout([1.0] * 8, size, rng, calls))
    assert len(grpo.collect(stub_run(8, 6, size, 30), 1, 1.0)[2]) == 8 * size       # fewer prompts than it would take


@pytest.mark.parametrize("scale", ["group", "none"])
def test_resampling_does_not_bias_the_advantages_of_a_group(monkeypatch, scale):
    """Whole groups are kept or dropped, their advantages are of themselves alone, and over many steps they are distributed as
    those of groups drawn at random that happen to be alive: each of the patterns in its due share."""
    size, p, rng, seen = 3, 0.8, random.Random(1), {}
    monkeypatch.setattr(grpo, "rollout", stub_rollout([p] * 30, size, rng))
    for step in range(450):
        trained, _, drawn = grpo.collect(stub_run(30, 4, size, 3, scale), step, 1.0)
        whole = {tuple(r.text for r in drawn[at:at + size]) for at in range(0, len(drawn), size)}
        for group in (trained[at:at + size] for at in range(0, len(trained), size)):
            assert tuple(r.text for r in group) in whole and len({r.index for r in group}) == 1
            earned = [r.parts["reward"] for r in group]
            alone = grpo.advantages(torch.tensor(earned), size, scale).tolist()
            assert [r.advantage for r in group] == pytest.approx(alone, abs=1e-6)
            seen[tuple(earned)] = seen.get(tuple(earned), 0) + 1
    law = {pattern: math.prod(p if x else 1 - p for x in pattern) for pattern in itertools.product((0.0, 1.0), repeat=size)}
    alive = {pattern: chance for pattern, chance in law.items() if len(set(pattern)) > 1}
    total, mass = sum(seen[pattern] for pattern in alive), sum(alive.values())
    assert set(seen) == set(alive) and total > 1500
    chi_square = sum((seen[x] - total * alive[x] / mass) ** 2 / (total * alive[x] / mass) for x in alive)
    assert p_value(chi_square, len(alive) - 1) > 1e-4


def test_resampling_leaves_fewer_dead_groups_and_reports_both_shares(toy, tmp_path, monkeypatch):
    """Half of the prompts always earn the same: before resampling the share is theirs in the first draw, after it nothing."""
    draws, earned, real = [], random.Random(0), grpo.rollout
    monkeypatch.setattr(grpo, "rollout", lambda run, data, at, *a, **k: (draws.append(list(at)), real(run, data, at, *a, **k))[1])
    pay(monkeypatch, lambda text, row: earned.random() if row["target"] in (16, 24) else 0.25)
    m, = cli(toy, tmp_path / "on", "--max_resample", 7, "--steps", 1, "--prompts_per_step", 2)
    dull = [i for i in draws[0] if toys.COUNTDOWN[i]["target"] not in (16, 24)]
    assert m["frac_reward_zero_std"] == len(dull) / 2
    draws.clear()
    lines = cli(toy, tmp_path / "off", "--max_resample", 0, "--steps", 4, "--prompts_per_step", 2)
    shares = [sum(toys.COUNTDOWN[i]["target"] not in (16, 24) for i in draw) / 2 for draw in draws]
    assert [x["frac_reward_zero_std"] for x in lines] == shares and 0 < sum(shares) < 4
    assert [x["frac_reward_zero_std_after"] for x in lines] == shares
    draws.clear()
    lines = cli(toy, tmp_path / "more", "--max_resample", 7, "--steps", 4, "--prompts_per_step", 2)
    assert [x["frac_reward_zero_std_after"] for x in lines] == [0] * 4 and any(x["frac_reward_zero_std"] for x in lines)


# ------------------------------------------------------------------------------------------- whole runs
def odd_sum(text, row):
    """A reward that any two completions are likely to differ in."""
    return sum(map(ord, text)) % 7 / 6


@pytest.fixture
def built(monkeypatch):
    """The runs that main() builds."""
    runs, real = [], grpo.build
    monkeypatch.setattr(grpo, "build", lambda *a, **k: (runs.append(real(*a, **k)), runs[-1])[1])
    return runs


def files(folder):
    """The bytes of the model in a folder."""
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.suffix in (".safetensors", ".jinja") or
            p.name in ("config.json", "tokenizer.json", "generation_config.json", "adapter_config.json")}


def steady(metrics):
    """Metrics less those that a clock or another process has a hand in."""
    return [{k: v for k, v in m.items() if not k.endswith(("seconds", "per_s", "memory_gb"))} for m in metrics]


def test_grpo_learns(toy, tmp_path, monkeypatch):
    """Reward: the share of a completion that is digits. By chance a tenth; 25 steps later nearly all."""
    pay(monkeypatch, lambda text, row: sum(c.isdigit() for c in text) / 8)
    lines = cli(toy, tmp_path, "--steps 25 --prompts_per_step 8 --group_size 8 --max_new_tokens 8 --lr 1e-2 --eval_every 25",
                "--eval_data", f"countdown={toy / 'countdown'}")
    assert np.mean([m["reward"] for m in lines[:3]]) < 0.2 and np.mean([m["reward"] for m in lines[-3:]]) > 0.8
    first, last = (m for m in toys.read(tmp_path / "metrics.jsonl") if "eval_reward" in m)
    assert first["eval_reward"] < 0.3 and last["eval_reward"] > 0.8         # greedy, by the weights after the last step


def test_an_adapter_learns(toy, tmp_path, monkeypatch):
    pay(monkeypatch, lambda text, row: sum(c.isdigit() for c in text) / 8)
    lines = cli(toy, tmp_path, "--steps 25 --prompts_per_step 8 --group_size 8 --max_new_tokens 8 --lr 3e-2 --lora_rank 8")
    assert np.mean([m["reward"] for m in lines[:3]]) < 0.2 and np.mean([m["reward"] for m in lines[-3:]]) > 0.6


def test_metrics_are_those_of_the_step(toy, tmp_path, monkeypatch):
    """Every number again, from the policy as it was before the update, in float64 and sequence by sequence."""
    pay(monkeypatch, odd_sum)
    before, real = [], grpo.update

    def update(run, trained, temperature, factor):
        before.append((copy.deepcopy(run.model).double(), trained, temperature))
        return real(run, trained, temperature, factor)

    monkeypatch.setattr(grpo, "update", update)
    lines = cli(toy, tmp_path, "--steps 3 --temperature 1.2 --temperature_end 0.8 --beta 0.05 --max_resample 0 --lr 4e-3 --warmup 2",
                "--micro_batch_size 3 --sample_every 1 --max_grad_norm 0.01 --prompts_per_step 2")
    samples = toys.read(tmp_path / "samples.jsonl")
    assert [m["step"] for m in lines] == [1, 2, 3] and all(set(KEYS) <= set(m) for m in lines)
    assert [m["temperature"] for m in lines] == pytest.approx([1.2, 1.0, 0.8])
    assert [m["lr"] for m in lines] == pytest.approx([2e-3, 4e-3, 4e-3])
    for m, (lm, trained, temperature) in zip(lines, before, strict=True):
        logps = [full_logps(lm, r.prompt, r.completion, temperature).detach() for r in trained]
        refs = [taken(full_logps(before[0][0], r.prompt, r.completion, temperature).detach(), r.completion) for r in trained]
        tokens = sum(len(r.completion) for r in trained)
        entropy = sum(float(-(x.exp() * x).sum()) for x in logps) / tokens
        gap = [ref - taken(x, r.completion) for x, ref, r in zip(logps, refs, trained)]
        norm = math.sqrt(sum(float((g ** 2).sum()) for g in
                             plain_gradient(lm, trained, "dapo", temperature=temperature, beta=0.05, ref=before[0][0]).values()))
        rows = [x for x in samples if x["step"] == m["step"]]
        groups = [{x["reward"] for x in rows[at:at + 4]} for at in (0, 4)]
        wanted = {"entropy": entropy, "kl": sum(float((d.exp() - d - 1).sum()) for d in gap) / tokens, "grad_norm": norm, "clip_low": 0,
                  "clip_high": 0, "completion_length": tokens / 8, "truncated": sum(not x["ended"] for x in rows) / 8,
                  "reward": sum(odd_sum(x["completion"], None) for x in rows) / 8, "correct": sum(x["correct"] for x in rows) / 8,
                  "frac_reward_zero_std": sum(len(g) == 1 for g in groups) / 2, "peak_memory_gb": m["peak_memory_gb"]}
        assert {k: m[k] for k in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        assert 0 <= m["logp_gap"] < 1e-4 and 0.05 < m["peak_memory_gb"] < 60
        assert m["step_seconds"] == pytest.approx(m["sample_seconds"] + m["update_seconds"], rel=0.1)
        assert m["sample_tokens_per_s"] * m["sample_seconds"] == pytest.approx(tokens, rel=1e-3)
        assert m["update_tokens_per_s"] * m["update_seconds"] == pytest.approx(tokens, rel=1e-3)
    assert lines[1]["kl"] > 1e-6 == pytest.approx(lines[0]["kl"] + 1e-6)
    assert lines[0]["grad_norm"] > 0.1                          # as it was before it was clipped


def test_clip_shares_are_means_over_the_whole_step(toy, tmp_path, monkeypatch):
    pay(monkeypatch, odd_sum)
    seen, real = [], grpo.policy_loss
    monkeypatch.setattr(grpo, "policy_loss", lambda logp, old, ref, adv, mask, **k: (
        seen.append((logp.detach(), old, adv, mask)), real(logp, old, ref, adv, mask, **k))[1])
    m, = cli(toy, tmp_path, "--steps 1 --inner_epochs 3 --micro_batch_size 3 --clip_low 0.01 --clip_high 0.02 --max_resample 0")
    tokens = sum(float(mask.sum()) for *_, mask in seen)        # each completion comes three times
    low = sum(float((((logp - old).exp() < 0.99) & (adv[:, None] < 0) & (mask > 0)).sum()) for logp, old, adv, mask in seen)
    high = sum(float((((logp - old).exp() > 1.02) & (adv[:, None] > 0) & (mask > 0)).sum()) for logp, old, adv, mask in seen)
    assert m["clip_low"] == pytest.approx(low / tokens, abs=1e-6) and m["clip_high"] == pytest.approx(high / tokens, abs=1e-6)
    assert low > 0 and high > 0


def test_learning_rate_warms_up_and_falls():
    def rates(*more, steps=20):
        a = grpo.parse_args(["--model", "x", "--lr", "1e-3", "--steps", str(steps), *more])
        return [a.lr * models.learning_rate(step, a.steps, a.warmup, a.lr_schedule) for step in range(1, steps + 1)]

    assert rates("--warmup", "0") == [1e-3] * 20
    assert rates("--warmup", "4")[:5] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    for schedule in ("linear", "cosine"):
        found = rates("--warmup", "4", "--lr_schedule", schedule)
        assert found[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3]) and max(found) == pytest.approx(1e-3)
        assert found[4:] == sorted(found[4:], reverse=True) and 0 < found[-1] < 2e-4
    falls = np.diff(rates("--warmup", "4", "--lr_schedule", "linear")[4:])
    assert falls == pytest.approx([falls[0]] * len(falls))
    assert rates("--warmup", "0", "--lr_schedule", "cosine", steps=8)[4] == pytest.approx(5e-4)


@pytest.mark.parametrize("more", [[], ["--lora_rank 4"], ["--dtype bfloat16"], ["--lora_rank 4 --load_in_4bit"], ["--optim adamw8bit"],
                                  ["--optim muon --muon_lr 1e-3"]], ids=["full", "lora", "bf16", "qlora", "adamw8bit", "muon"])
def test_same_seed_same_bytes_and_a_resumed_run_is_the_uninterrupted_one_to_the_bit(toy, tmp_path, monkeypatch, more):
    pay(monkeypatch, odd_sum)
    more = [*more, "--steps 4 --save_every 2 --keep 9 --beta 0.02 --temperature_end 0.8 --lr_schedule cosine --warmup 1 --inner_epochs 2",
            "--sample_every 1 --prompts_per_step 2 --eval_every 2", "--eval_data", f"gsm8k={toy / 'gsm8k'}:2"]
    whole, again = cli(toy, tmp_path / "whole", *more), tmp_path / "again"
    assert all(m["grad_norm"] > 0 for m in whole)
    shutil.copytree(tmp_path / "whole", again)                  # a run that died in its fourth step
    for path in [*again.glob("checkpoint-*"), *again.glob("*.safetensors")]:
        if path.name != "checkpoint-2":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with open(again / "metrics.jsonl", "a") as f:
        f.write('{"step": 5, "rew')
    resumed = cli(toy, again, *more, "--resume")
    assert steady(resumed) == steady(whole) and [m["step"] for m in resumed] == [1, 2, 3, 4]
    held = [[m for m in toys.read(folder / "metrics.jsonl") if "eval_reward" in m] for folder in (tmp_path / "whole", again)]
    assert steady(held[0]) == steady(held[1]) and [m["step"] for m in held[1]] == [0, 2, 4]
    assert (again / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()
    found = files(again)
    assert any(name.endswith(".safetensors") for name in found) and found == files(tmp_path / "whole")
    if more[0].startswith("--steps"):                                  # full-parameter: once more from the start, and another seed
        assert files(toy / "model")["model.safetensors"] != found["model.safetensors"]
        assert steady(cli(toy, tmp_path / "same", *more)) == steady(whole) and files(tmp_path / "same") == found
        cli(toy, tmp_path / "other", *more, "--seed", 1)
        assert files(tmp_path / "other")["model.safetensors"] != found["model.safetensors"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_final_model_loads_and_has_the_logits_of_the_policy(tmp_path, monkeypatch, built, tied):
    from safetensors import safe_open
    pay(monkeypatch, odd_sum)
    toy = toys.save(tmp_path / "toy", tied=tied)
    model = AutoModelForCausalLM.from_pretrained(toy / "model")
    model.generation_config.eos_token_id = [0, 90]
    model.save_pretrained(toy / "model")
    cli(toy, tmp_path / "out", "--steps", 1)
    folder = tmp_path / "out"
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([[40, 50, 60, 70, 80]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, built[0].model(ids).logits)
        assert not torch.equal(loaded(ids).logits, model(ids).logits)
    with safe_open(folder / "model.safetensors", "pt") as f:
        assert ("lm_head.weight" in f.keys()) == (not tied)
    assert loaded.config.tie_word_embeddings == tied
    assert (loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()) == tied
    assert loaded.generation_config.eos_token_id == [0, 90] and loaded.dtype == torch.float32
    before = AutoTokenizer.from_pretrained(toy / "model")
    assert tokenizer.chat_template == before.chat_template and tokenizer.get_vocab() == before.get_vocab()
    text = "<reasoning>3+5=8</reasoning>\n<answer>8</answer>" + toys.END
    assert tokenizer(text).input_ids == before(text).input_ids and tokenizer.eos_token_id == 0


@pytest.mark.parametrize("more", [[], ["--load_in_4bit"]], ids=["lora", "qlora"])
def test_adapter_loads_and_merge_exports_a_plain_model_with_the_logits_of_the_policy(toy, tmp_path, monkeypatch, built, more):
    pay(monkeypatch, odd_sum)
    cli(toy, tmp_path, "--lora_rank", 4, "--merge", "--lr", 1e-2, *more)
    run, ids = built[0], torch.tensor([[40, 50, 60, 70, 80]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config and not (tmp_path / "merged" / "adapter_config.json").exists()
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == toys.TEMPLATE
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, run.model(ids).logits, rtol=0, atol=1e-4)
        with run.model.disable_adapter():
            assert (merged(ids).logits - run.model(ids).logits).abs().max() > 1e-2
        if not more:
            adapted = AutoModelForCausalLM.from_pretrained(tmp_path)    # transformers puts the adapter on its base
            torch.testing.assert_close(adapted(ids).logits, run.model(ids).logits, rtol=0, atol=1e-5)
    assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "model.safetensors").exists()


def test_overwrite_leaves_nothing_of_the_run_before(toy, tmp_path, monkeypatch, built):
    pay(monkeypatch, odd_sum)
    cli(toy, tmp_path, "--lora_rank", 4, "--merge", "--save_every", 1)
    lines = cli(toy, tmp_path, "--overwrite", "--steps", 1)
    ids = torch.tensor([[40, 50, 60]])
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, built[1].model(ids).logits)
    assert len(lines) == 1 and not list(tmp_path.glob("*checkpoint-*")) and not (tmp_path / "merged").exists()


def test_checkpoints_are_kept_as_asked_and_are_models(toy, tmp_path, monkeypatch):
    pay(monkeypatch, odd_sum)
    cli(toy, tmp_path, "--steps", 4, "--save_every", 1, "--keep", 2)
    kept = sorted(p.name for p in tmp_path.glob("*checkpoint-*"))
    assert kept == ["checkpoint-3", "checkpoint-4"]
    last, final = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "checkpoint-4", tmp_path))
    assert moved(last, weights(final)) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "checkpoint-3").chat_template == toys.TEMPLATE


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_is_taken(toy, tmp_path, monkeypatch, capsys):
    pay(monkeypatch, odd_sum)
    more = ["--steps", 3, "--save_every", 1, "--keep", 9]
    cli(toy, tmp_path, *more)
    wanted, weight = files(tmp_path), tmp_path / "checkpoint-3" / "model.safetensors"
    data = bytearray(weight.read_bytes())
    data[-3] ^= 1
    weight.write_bytes(data)
    (tmp_path / "checkpoint-2" / "trainer.pt").write_bytes((tmp_path / "checkpoint-2" / "trainer.pt").read_bytes()[:-1])
    capsys.readouterr()
    cli(toy, tmp_path, *more, "--resume")
    said = capsys.readouterr().err
    assert said.count("is damaged") == 2 and "checkpoint-3" in said and "checkpoint-2" in said
    assert files(tmp_path) == wanted


def test_mixed_tasks_are_graded_each_by_its_own_rules_with_metrics_by_task(toy, tmp_path, monkeypatch):
    """A sampler that always writes the right countdown answer, and on gsm8k the right one in half of each group."""
    tokenizer, seen = toys.tokenizer(), []

    def generate(self, prompts, noise, *, group_size=1, **kwargs):
        ids = []
        for prompt in prompts:
            text = tokenizer.decode(prompt)
            for g in range(group_size):
                if "Target" in text:
                    answer = "5+3+8" if "[3, 5, 8]" in text else "1*2*3*4" if "[1, 2, 3, 4]" in text else "7+7+2"
                else:
                    answer = "4" if ("2+2" in text) == bool(g % 2) else "12 apples" if g % 2 else "1"
                ids.append(tokenizer(f"<reasoning>x</reasoning><answer>{answer}</answer>{toys.END}", add_special_tokens=False).input_ids)
            seen.append("countdown" if "Target" in text else "gsm8k")
        return ids, [torch.full((len(x),), -1.0) for x in ids]

    monkeypatch.setattr(grpo.Sampler, "__call__", generate)
    m, = cli(toy, tmp_path, "--data", f"countdown={toy / 'countdown'}:3", f"gsm8k={toy / 'gsm8k'}:2", "--steps", 1, "--prompts_per_step", 5,
             "--max_resample", 0, "--weights", "correct=1", "format=0.5", "--max_new_tokens", 100, "--sample_every", 1)
    assert sorted(seen) == ["countdown"] * 3 + ["gsm8k"] * 2
    by_task = {(part, task): m[next(k for k in m if part in k and task in k)] for part in ("reward", "correct", "format")
               for task in ("countdown", "gsm8k")}
    assert by_task == {("correct", "countdown"): 1, ("correct", "gsm8k"): 0.5, ("format", "countdown"): 1, ("format", "gsm8k"): 1,
                       ("reward", "countdown"): 1.5, ("reward", "gsm8k"): 1.0}
    assert m["correct"] == pytest.approx((3 * 1 + 2 * 0.5) / 5) and m["reward"] == pytest.approx(1.3)
    assert m["frac_reward_zero_std"] == pytest.approx(3 / 5) and m["truncated"] == 0


def test_countdown_data_that_is_not_there_yet_is_made(toy, tmp_path, monkeypatch, built):
    """And only then: what is there is taken as it is."""
    monkeypatch.chdir(tmp_path)
    calls = []

    def call(command, **kwargs):
        calls.append(list(map(str, command)))
        toys.write(tmp_path / "data" / "countdown" / "train.jsonl", toys.COUNTDOWN)
        return 0

    monkeypatch.setattr(grpo.subprocess, "call", call)
    for out in ("a", "b"):
        cli(toy, tmp_path / out, "--data", "countdown:6", "--steps", 1)
    (_, script, *rest), = calls
    assert Path(script) == Path(grpo.__file__).with_name("countdown.py") and rest == ["--out", "data/countdown"]
    assert [row["nums"] for row in built[1].data] == [row["nums"] for row in toys.COUNTDOWN[:6]]


def test_pass_rate_selects_rows(toy, tmp_path, built):
    rates = [0.0, 0.1, 0.100001, 0.5, 0.9, 0.95, 1.0, 0.05]
    data = toys.write(tmp_path / "rows.jsonl", [row | {"pass_rate": p} for row, p in zip(toys.COUNTDOWN, rates)])
    cli(toy, tmp_path / "out", "--data", f"countdown={data}", "--pass_rate", 0.1, 0.9, "--steps", 1)
    assert [row["pass_rate"] for row in built[0].data] == [0.1, 0.100001, 0.5, 0.9]
    assert len(built[0].curriculum.due) == 4


def test_samples_show_whole_completions_with_their_parts_prompt_and_advantage(toy, tmp_path, monkeypatch):
    pay(monkeypatch, odd_sum)
    cli(toy, tmp_path, "--steps", 4, "--sample_every", 2)
    rows = toys.read(tmp_path / "samples.jsonl")
    assert {2, 4} <= {x["step"] for x in rows}
    for x in rows:
        assert {"prompt", "completion", "advantage", "reward", *PARTS} <= set(x)
        assert "Numbers: [" in x["prompt"] and x["reward"] == odd_sum(x["completion"], None)
    for at in range(0, len(rows), 4):
        group = rows[at:at + 4]
        assert len({x["prompt"] for x in group}) == 1
        assert sorted(group, key=lambda x: x["reward"]) == sorted(group, key=lambda x: (x["advantage"], x["reward"]))


def test_length_penalty_is_soft_and_its_own_flag_sets_where_it_falls(toy, tmp_path):
    """With no other part the reward falls with length between START and END, and ending early is what is learned."""
    lines = cli(toy, tmp_path, "--weights", "length=1", "--length_penalty", 4, 24, "--max_new_tokens", 24, "--steps", 20, "--lr", 1e-2,
                "--prompts_per_step", 8, "--group_size", 8, "--sample_every", 1)
    for m in lines:
        assert -1 <= m["reward"] <= 0 and m["reward"] == pytest.approx(m["length"])
    assert lines[-1]["completion_length"] < 0.5 * lines[0]["completion_length"]
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.3


@pytest.mark.parametrize("more", [
    "--style think --data gsm8k={toy}/gsm8k --eval_data gsm8k={toy}/gsm8k:2 countdown={toy}/countdown:3",
    "--loss gspo --scale batch --clip_high 0.28 --inner_epochs 2 --activation_checkpointing",
    "--loss cispo --scale none --dtype bfloat16 --beta 0.1 --mask_truncated",
    "--lora_rank 4 --load_in_4bit --optim adamw8bit --activation_checkpointing --beta 0.01"], ids=["gsm8k", "gspo", "cispo", "qlora"])
def test_command_line_end_to_end(toy, tmp_path, more):
    out = tmp_path / "out"
    config = tmp_path / "flags.txt"
    config.write_text("# a comment\n\n" + " ".join(flags(toy)) + "\n" + more.format(toy=toy) +
                      f"\n--output_dir '{out}'  # where to\n--eval_every 1 --save_every 1\n")
    grpo.main([f"@{config}", "--steps", "2", "--prompts_per_step", "2"])
    lines = toys.read(out / "metrics.jsonl")
    train, evals = [m for m in lines if "reward" in m], [m for m in lines if "eval_reward" in m]
    assert [m["step"] for m in train] == [1, 2] and all(set(KEYS) <= set(m) for m in train)
    if "--eval_data" in more:
        assert [m["step"] for m in evals] == [0, 1, 2]
        assert all({"eval_correct", "eval_format", "eval_completion_length", "eval_truncated"} <= set(m) for m in evals)
        assert any("countdown" in key for key in evals[0]) and any("gsm8k" in key for key in evals[0])
    AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out).chat_template == toys.TEMPLATE
    assert json.loads((out / "args.json").read_text())["group_size"] == 4
    assert toys.read(out / "samples.jsonl") and (out / "checkpoint-2").is_dir()


def test_evaluation_is_greedy_and_leaves_the_training_as_it_is(toy, tmp_path, monkeypatch):
    pay(monkeypatch, odd_sum)
    plain = cli(toy, tmp_path / "a")
    cli(toy, tmp_path / "b", "--eval_data", f"gsm8k={toy / 'gsm8k'}", "--eval_every", 1)
    lines = toys.read(tmp_path / "b" / "metrics.jsonl")
    assert steady([m for m in lines if "reward" in m]) == steady(plain) and files(tmp_path / "a") == files(tmp_path / "b")
    run = build(toy)
    prompts = [run.tokenizer.apply_chat_template(rewards.messages("gsm8k", row), add_generation_prompt=True, return_dict=False)
               for row in toys.GSM8K]
    for folder, step in ((toy / "model", 0), (tmp_path / "b", 2)):
        greedy = transformers_greedy(AutoModelForCausalLM.from_pretrained(folder), prompts, 12, {0})
        earned = [odd_sum(run.tokenizer.decode(ids, skip_special_tokens=True), None) for ids in greedy]
        assert next(m for m in lines if "eval_reward" in m and m["step"] == step)["eval_reward"] == pytest.approx(np.mean(earned))


def test_metrics_go_to_a_board_only_when_asked_for(toy, tmp_path, monkeypatch):
    sent, board = [], SimpleNamespace(log=lambda metrics, step=None: sent.append((step, metrics)), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **kwargs: board, log=board.log, finish=board.finish))
    lines = cli(toy, tmp_path / "a")
    assert not sent
    lines = cli(toy, tmp_path / "b", "--log_to", "wandb")
    assert [(step, m["reward"]) for step, m in sent if "reward" in m] == [(m["step"], m["reward"]) for m in lines]


# ------------------------------------------------------------------------------------------- bad input
@pytest.fixture
def no_model(monkeypatch):
    """Whoever loads a model fails the test."""
    def loads(*args, **kwargs):
        pytest.fail("a model was loaded before the input was checked")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loads)


@pytest.fixture
def refused(toy, tmp_path, capsys, monkeypatch):
    """refused(says, *flags): exit code 2 and one line that says so, no traceback, and no run is begun."""
    monkeypatch.chdir(tmp_path)

    def refused(says, *more, out=tmp_path / "out"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            grpo.main(flags(toy, "--output_dir", out, *more))
        line, = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and line.startswith("grpo.py: ") and "Traceback" not in line
        assert all(word in line for word in says.split(" | ")), line
        assert not (tmp_path / "out" / "args.json").exists()
        return line
    return refused


WRONG = """\
--group_size 1                               > --group_size | at least 2
--group_size 2.5                             > --group_size
--prompts_per_step 0                         > --prompts_per_step
--max_new_tokens 0                           > --max_new_tokens
--temperature 0                              > --temperature
--temperature nan                            > --temperature
--temperature_end -1                         > --temperature_end
--max_resample -1                            > --max_resample
--curriculum_floor 0                         > --curriculum_floor
--sample_batch_size 0                        > --sample_batch_size
--loss ppo                                   > --loss | dr_grpo
--scale std                                  > --scale
--clip_low -1.5                              > --clip_low
--clip_high -0.1                             > --clip_high
--beta inf                                   > --beta
--beta -1                                    > --beta
--steps 0                                    > --steps
--inner_epochs 0                             > --inner_epochs
--micro_batch_size all                       > --micro_batch_size
--lr fast                                    > --lr
--lr -1e-06                                  > --lr
--warmup -1                                  > --warmup
--lr_schedule step                           > --lr_schedule
--max_grad_norm -1                           > --max_grad_norm
--optim sgd                                  > --optim
--lora_rank -4                               > --lora_rank
--load_in_4bit                               > --load_in_4bit | --lora_rank
--merge                                      > --merge | --lora_rank
--dtype int8                                 > --dtype
--eval_every 0                               > --eval_every
--keep 0                                     > --keep
--seed -1                                    > --seed
--log_to paper                               > --log_to
--style xml                                  > --style
--weights beauty=1                           > --weights | correct
--weights correct                            > --weights
--weights correct=much                       > --weights
--length_penalty 800 500                     > --length_penalty
--length_penalty 5                           > --length_penalty
--resume --overwrite                         > --resume | --overwrite
--no_such_flag                               > --no_such_flag
--pass_rate 0.9 0.1                          > --pass_rate
--pass_rate 0.1                              > --pass_rate
--pass_rate 0.1 1.9                          > --pass_rate
--pass_rate 0.1 0.9                          > pass_rate
@/nowhere/flags.txt                          > /nowhere/flags.txt
--model /nowhere/model                       > /nowhere/model
--resume                                     > --resume | checkpoint
--data chess                                 > chess
--data countdown=/nowhere/rows.jsonl         > /nowhere/rows.jsonl
--data gsm8k:0                               > gsm8k:0
--eval_data gsm8k=/nowhere/held              > /nowhere/held
--prompts_per_step 9                         > 9 | 8
--max_new_tokens 600                         > context | 512
--chat_template /nowhere/chat.jinja          > /nowhere/chat.jinja
"""                                                             # flags > what the one line must name


@pytest.mark.parametrize("more, says", [row.split("> ") for row in WRONG.splitlines()], ids=lambda x: x.strip())
def test_a_wrong_flag_gets_one_line_and_exit_code_2_before_any_model_loads(refused, no_model, more, says):
    refused(says, *more.split())


@pytest.mark.parametrize("says, text", [
    ("line 2", '{"nums": [1, 2], "target": 3}\n{"nums": [1, 2'), ("line 1 | nums", '{"target": 3}\n'),
    ("line 1 | target", '{"nums": [1, 2]}\n'), ("target", '{"nums": [1, 2], "target": "3"}\n'), ("no rows", ""), ("line 1", "[1, 2]\n")],
    ids=["broken", "no nums", "no target", "wrong type", "empty", "no object"])
def test_bad_rows_get_one_line_that_names_file_and_line(refused, no_model, tmp_path, says, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    refused(f"rows.jsonl | {says}", "--data", f"countdown={path}")
    refused(f"rows.jsonl | {says}", "--eval_data", f"countdown={path}")


def test_model_folders_that_cannot_do_get_one_line(refused, no_model, toy, tmp_path):
    def variant(name, change):
        folder = tmp_path / name
        shutil.copytree(toy / "model", folder)
        change(folder)
        return folder

    def edit(folder, file, **changes):
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not None}))

    def no_template(folder):
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        edit(folder, "tokenizer_config.json", chat_template=None)

    def no_end(folder):
        edit(folder, "tokenizer_config.json", eos_token=None)
        edit(folder, "config.json", eos_token_id=None)
        edit(folder, "generation_config.json", eos_token_id=None)

    bare = variant("bare", no_template)
    assert "--chat_template" in refused("chat template", "--model", bare)
    for name, text in (("broken", "{% for m in %}"), ("strict", "{{ raise_exception('System role not supported') }}")):
        (tmp_path / name).write_text(text)
        refused("template", "--model", bare, "--chat_template", tmp_path / name)
    refused("end token", "--model", variant("endless", no_end))
    refused("adapter", "--model", variant("adapter", lambda x: (x / "config.json").rename(x / "adapter_config.json")))
    refused("--model", "--model", variant("no tokenizer", lambda x: [path.unlink() for path in x.glob("tokenizer*")]))
    refused("--model", "--model", variant("no config", lambda x: (x / "config.json").unlink()))


def test_model_files_that_are_damaged_or_missing_get_one_line(refused, toy, tmp_path):
    for name, change in (("cut", lambda path: path.write_bytes(path.read_bytes()[:-100])), ("missing", Path.unlink)):
        folder = tmp_path / name
        shutil.copytree(toy / "model", folder)
        change(folder / "model.safetensors")
        refused("--model", "--model", folder)


@pytest.mark.parametrize("module, more", [
    ("torch.utils.tensorboard", "--log_to tensorboard"), ("wandb", "--log_to wandb"), ("peft", "--lora_rank 4"),
    ("bitsandbytes", "--optim adamw8bit"), ("bitsandbytes", "--load_in_4bit --lora_rank 4")])
def test_a_package_that_is_asked_for_and_not_there_gets_one_line(refused, no_model, monkeypatch, module, more):
    monkeypatch.setitem(sys.modules, module, None)
    refused(f"{more.split()[0]} | {module.split('.')[-1]}", more)


def test_muon_needs_no_other_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert grpo.parse_args(["--model", "x", "--optim", "muon"]).optim == "muon"


def test_the_folder_of_another_run_is_refused_and_nothing_in_it_is_lost(refused, no_model, toy, tmp_path, monkeypatch):
    monkeypatch.undo()                                          # for the first run
    pay(monkeypatch, odd_sum)
    out = tmp_path / "run"
    cli(toy, out, "--save_every", 1)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    refused("--resume | --overwrite", out=out)
    refused("--lr | 0.001 | 0.5", "--resume", "--lr", 0.5, out=out)
    refused("--group_size | 4 | 8", "--resume", "--group_size", 8, out=out)
    refused("/nowhere", "--overwrite", "--data", "countdown=/nowhere", out=out)
    refused("/nowhere", "--overwrite", "--model", "/nowhere", out=out)
    cut = tmp_path / "cut"
    shutil.copytree(toy / "model", cut)
    (cut / "model.safetensors").write_bytes(b"cut off")
    refused("--model", "--overwrite", "--model", cut, out=out)  # noticed only as the model loads
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_an_output_dir_that_is_a_file_gets_one_line(refused, no_model, tmp_path):
    (tmp_path / "file").write_text("kept")
    refused("--output_dir", out=tmp_path / "file")
    refused("--output_dir", out=tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "kept"
