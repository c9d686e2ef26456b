"""What grpo.py promises, each property against a truth of its own: the papers' formulas in float64 over full
logits, TRL, enumeration of all sequences, transformers' generate, a run that was not interrupted.

TRL runs its own code from the rewards on, over ids, rewards and log-probabilities that are fixed here. Its
numbers are in grpo_reference.json, for where TRL is not installed; `python tests/test_grpo.py --write`
computes them again."""
import copy
import fcntl
import functools
import inspect
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo  # which FSDP imports: here, once for all forks
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import AutoModelForCausalLM, AutoTokenizer, Mamba2Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # for --write; pytest has conftest.py
import grpo
import rewards
import toys
from toys import exit_code

os.environ["TOKENIZERS_PARALLELISM"] = "false"                      # tests fork
LOSSES = ("grpo", "dr_grpo", "dapo", "cispo", "gspo")
KEYS = {"step", "reward", "correct", "format", "length", "process", "efficiency", "frac_reward_zero_std",
    "frac_reward_zero_std_after", "completion_length", "truncated", "entropy", "kl", "clip_low", "clip_high",
    "grad_norm", "logp_gap", "lr", "temperature", "groups_drawn", "sample_seconds", "update_seconds",
    "step_seconds", "peak_memory_gb"}
SCORE_BATCH = rewards.score_batch


# ------------------------------------------------------------------------------------------- helpers
@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toys.save(tmp_path_factory.mktemp("toy"))


def odd_sum(text, row):
    """A reward that any two completions are likely to differ in."""
    return sum(map(ord, text)) % 7 / 6


def pay(patch, earn):
    """Replaces the graders: a completion earns earn(text, row)."""
    def score_batch(tasks, texts, rows, *args, **kwargs):
        earned = [float(earn(text, row)) for text, row in zip(texts, rows, strict=True)]
        return [dict.fromkeys(rewards.WEIGHTS, 0.0) | {"correct": float(x > 0.5), "reward": x}
                for x in earned]
    patch.setattr(rewards, "score_batch", score_batch)


@pytest.fixture(autouse=True)
def paid(monkeypatch):
    pay(monkeypatch, odd_sum)


def flags(toy, out, *more):
    """What most tests want, then `more`, which overrides it."""
    usual = (f"--model {toy}/model --data countdown={toy}/countdown --output_dir {out}",
             "--steps 2 --group_size 4 --prompts_per_step 4 --max_new_tokens 12",
             "--beta 0 --warmup 0 --lr 1e-3 --max_resample 0")
    return " ".join(map(str, usual + more)).split()


def main(argv):
    """grpo.main(), after which this process holds neither its lock nor its signal handlers."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    locks, flock = [], fcntl.flock
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", lambda fd, how: (locks.append(fd), flock(fd, how)))
        try:
            grpo.main(argv)
        finally:
            for fd in locks:
                os.close(fd)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            grpo.STOP.clear()


def run(toy, out, *more):
    """A whole run -> its metrics, without the evaluations."""
    main(flags(toy, out, *more))
    return [m for m in toys.read(out / "metrics.jsonl") if "reward" in m]


def fork(argv, **kwargs):
    return toys.fork(grpo.main, argv, **kwargs)


def together(world, argv, before=lambda rank: None):
    return toys.together(grpo.main, world, argv, before)


@pytest.fixture
def seen(monkeypatch):
    """Of runs: policies, what is trained of them, scored groups, gradients before each update, what the loss
    was called with."""
    seen = SimpleNamespace(policies=[], trained=[], groups=[], gradients=[], losses=[])

    def spy(name, record):
        real = getattr(grpo, name)

        @functools.wraps(real)
        def function(*args, **kwargs):
            found = real(*args, **kwargs)
            record(found, *args)
            return found
        monkeypatch.setattr(grpo, name, function)

    real_update = grpo.update

    def update(trained, *args):
        masters = {name: master for name, (_, master) in trained.items()}
        seen.gradients.append({name: x.grad.clone() for name, x in masters.items() if x.grad is not None})
        return real_update(trained, *args)

    def kept(x):
        return x if x is None else x.detach().clone()

    spy("load_policy", lambda found, *_: seen.policies.append(found[0]))
    spy("fp32_masters", lambda found, *_: seen.trained.append(found))
    spy("roll_out", lambda groups, *_: seen.groups.append(groups))
    spy("policy_loss", lambda found, *args: seen.losses.append(tuple(map(kept, args))))
    monkeypatch.setattr(grpo, "update", update)
    return seen


def made_up(n, seed=0, limit=12):
    """Ragged rollouts: random ids, every third cut off at the limit, the others ended."""
    rng, out = random.Random(seed), []
    for i in range(n):
        prompt = [rng.randrange(10, toys.VOCAB) for _ in range(rng.randint(2, 9))]
        length = limit if i % 3 == 0 else rng.randint(0, limit - 1)
        ids = [rng.randrange(10, toys.VOCAB) for _ in range(length)] + [0] * (i % 3 != 0)
        out.append(grpo.Rollout({"task": "countdown", "prompt": "", "prompt_ids": prompt}, ids,
                                torch.full((len(ids),), -4.0), i % 3 != 0, "",
                                dict.fromkeys([*rewards.WEIGHTS, "reward"], 0.0), rng.gauss(0, 1)))
    return out


def train_on(monkeypatch, rollouts):
    """From now on every step trains on these rollouts, with the advantages that they have."""
    groups = [rollouts[at:at + 4] for at in range(0, len(rollouts), 4)]
    monkeypatch.setattr(grpo, "roll_out", lambda *args, **kwargs: groups)
    adv = torch.tensor([r.advantage for r in rollouts])
    monkeypatch.setattr(grpo, "advantages", lambda *args, **kwargs: adv)


def shaken(monkeypatch, size=0.02):
    """From now on policies start at some distance from the checkpoint, that is from the reference."""
    real = grpo.load_policy

    def load_policy(*args):
        found, rng = real(*args), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in found[0].parameters():
                if p.requires_grad:
                    p.add_(size * torch.randn(p.shape, generator=rng))
        return found
    monkeypatch.setattr(grpo, "load_policy", load_policy)


def full_logps(lm, prompt, completion, temperature=1.0):
    """[len(completion), V] by one forward of one sequence, without cache, padding or chunks."""
    logits = lm(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
    return (logits[len(prompt) - 1:-1] / temperature).log_softmax(-1)


def taken(logps, ids):
    return logps.gather(1, torch.tensor(ids)[:, None]).squeeze(1)


def plain_gradient(lm, rollouts, loss="dapo", *, temperature=1.0, beta=0.0, ref=None, limit=12, extra=0.0):
    """Gradient of a step's loss at ratio 1 in float64, sequence by sequence, from the papers' formulas."""
    lm = copy.deepcopy(lm).double().train()
    lm.zero_grad()
    tokens, total = sum(len(r.completion) for r in rollouts), 0.0
    for r in rollouts:
        prompt = r.row["prompt_ids"]
        logp = taken(full_logps(lm, prompt, r.completion, temperature), r.completion)
        ratio = (logp - logp.detach()).exp()
        if loss == "gspo":
            ratio = (logp - logp.detach()).mean().exp().expand(len(logp))
        each = -(logp if loss == "cispo" else ratio) * r.advantage + extra * logp
        if beta:
            with torch.no_grad():
                at_ref = taken(full_logps(copy.deepcopy(ref).double(), prompt, r.completion, temperature),
                               r.completion)
            each = each + beta * ((at_ref - logp).exp() - (at_ref - logp) - 1)
        total = total + {"grpo": each.mean() / len(rollouts), "gspo": each.mean() / len(rollouts),
                         "dapo": each.sum() / tokens, "cispo": each.sum() / tokens,
                         "dr_grpo": each.sum() / (len(rollouts) * limit)}[loss]
    total.backward()
    return {name: p.grad for name, p in lm.named_parameters()}


def assert_same(found, wanted, atol=1e-6):
    assert found.keys() == wanted.keys() and max(g.abs().max() for g in wanted.values()) > 1e-4
    for name in wanted:
        torch.testing.assert_close(found[name].double(), wanted[name].double(), rtol=0, atol=atol)


def weights(folder):
    return {k: v for file in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(file).items()}


def far(a, b):
    a, b = (x if isinstance(x, dict) else weights(x) for x in (a, b))
    assert a.keys() == b.keys() and a
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def metrics(out):
    """metrics.jsonl without what a clock or another process has a hand in."""
    return [{k: v for k, v in m.items() if not k.endswith(("seconds", "memory_gb"))}
            for m in toys.read(out / "metrics.jsonl")]


def assert_same_run(out, whole):
    assert metrics(out) == metrics(whole) and far(out, whole) == 0
    assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert not list(out.glob("tmp-*"))


def refusal(argv, capfd, alone=True):
    """The one line in which a command is refused; alone: nothing stands before it."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    *before, line = capfd.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("grpo.py: ") and not (alone and before), (before, line)
    return line


def place(group):
    """Of a group's row in toys.COUNTDOWN."""
    return [row["nums"] for row in toys.COUNTDOWN].index(group[0].row["nums"])


def p_value(chi_square, freedom):
    half = torch.tensor([freedom, chi_square], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(*half))


# -------------------------------------------------------------------------------------- advantages and loss
SCALES, BETAS = ("group", "batch", "none"), (0.0, 0.04)
COMBINATIONS = list(itertools.product(LOSSES, SCALES, BETAS, ((0.2, 0.2), (0.2, 0.28)), (False, True)))
GOLDEN = Path(__file__).with_name("grpo_reference.json")
# three groups of three, the second without spread; means are exact in binary: rounding decides nothing
REWARDS = [1.0, 0.25, 1.0, 0.5, 0.5, 0.5, 0.0, 1.0, 0.5]
LENGTHS, LIMIT = [6, 3, 2, 6, 1, 4, 5, 6, 3], 6
ENDED = [False, True, True, True, True, True, True, False, True]  # row 3 ends with the last token it may have


def fixed_inputs():
    """Ids and log-probabilities [9, 6] in float64: the ratios lie on both sides of every clip."""
    rng = torch.Generator().manual_seed(0)
    ids = [torch.randint(10, toys.VOCAB, (n,), generator=rng).tolist()[:n - end] + [0] * end
           for n, end in zip(LENGTHS, ENDED)]
    prompts = [torch.randint(10, toys.VOCAB, (4,), generator=rng).tolist() for _ in range(3)]
    old = -3 * torch.rand(9, LIMIT, generator=rng, dtype=torch.float64) - 0.1
    logp = old + 0.3 * torch.randn(9, LIMIT, generator=rng, dtype=torch.float64)
    ref = old + 0.5 * torch.randn(9, LIMIT, generator=rng, dtype=torch.float64)
    return [prompts[i // 3] for i in range(9)], ids, logp, old, ref


def name_of(loss, scale, beta, clip, masked):
    return f"{loss} {scale} beta={beta} clip={clip[0]}-{clip[1]} masked={masked}"


def token_mask(masked):
    """[9, 6], 1 on tokens that are trained."""
    return torch.tensor([[float(t < n and (end or not masked)) for t in range(LIMIT)]
                         for n, end in zip(LENGTHS, ENDED)])


def trl_trainer(folder):
    """A GRPOTrainer on the toy model. TRL takes its settings once; here they change between calls."""
    import datasets
    from trl import GRPOConfig, GRPOTrainer
    toys.save(folder)
    config = GRPOConfig(output_dir=f"{folder}/out", per_device_train_batch_size=9, num_generations=3,
                        report_to="none", max_completion_length=LIMIT, use_bias_correction_kl=False,
                        temperature=1.3, beta=0.04, use_cpu=True, bf16=False, disable_tqdm=True)
    rows = datasets.Dataset.from_list([{"prompt": str(i), "row": i} for i in range(9)])
    trainer = GRPOTrainer(model=f"{folder}/model", args=config, train_dataset=rows,
                          reward_funcs=lambda prompts, completions, row, **_: [REWARDS[i] for i in row])
    trainer.current_gradient_accumulation_steps = 1                 # the training loop sets it
    trainer.model.train()
    return trainer


def trl_batch(t, loss, scale, beta, clip, masked):
    """TRL's ids, masks, token count and advantages, with these settings."""
    t.loss_type, t.importance_sampling_level = ("grpo", "sequence") if loss == "gspo" else (loss, "token")
    t.scale_rewards, t.beta, t.mask_truncated_completions = scale, beta, masked
    t.epsilon_low, t.epsilon_high = clip[0], clip[1] + (loss == "cispo")    # cispo: theirs is the cap itself
    prompts, ids, *_ = fixed_inputs()
    t._generate = lambda _: (prompts, ids, None, [str(x) for x in ids], None, {}, None, [])
    return t._generate_and_score_completions([{"prompt": str(i), "row": i} for i in range(9)])


def theirs(t, *combination):
    batch = trl_batch(t, *combination)
    _, _, logp, old, ref = fixed_inputs()
    logp.requires_grad_()
    t._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logp, torch.zeros_like(logp), None)
    loss = t._compute_loss(t.model, batch | {"old_per_token_logps": old, "ref_per_token_logps": ref})
    loss.backward()
    del t._get_per_token_logps_and_entropies
    return {"advantages": batch["advantages"].tolist(), "loss": loss.item(), "gradient": logp.grad.tolist()}


def ours(loss, scale, beta, clip, masked):
    """-> what theirs() returns, and the parts."""
    _, _, logp, old, ref = fixed_inputs()
    logp.requires_grad_()
    adv, mask = grpo.advantages(torch.tensor(REWARDS), 3, scale), token_mask(masked)
    total, parts = grpo.policy_loss(logp, old, ref if beta else None, adv, mask, loss=loss, clip_low=clip[0],
                                    clip_high=clip[1], beta=beta, num_tokens=float(mask.sum()), num_seqs=9,
                                    max_new_tokens=LIMIT)
    total.backward()
    return {"advantages": adv.tolist(), "loss": total.item(), "gradient": logp.grad.tolist()}, parts


@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    pytest.importorskip("trl")
    return trl_trainer(tmp_path_factory.mktemp("trl"))


@pytest.fixture(params=["golden numbers", "live"])
def reference(request):
    """combination -> TRL's advantages, loss and gradient."""
    if request.param == "live":
        trainer = request.getfixturevalue("trl")
        return lambda *combination: theirs(trainer, *combination)
    golden = json.loads(GOLDEN.read_text())
    assert set(golden) == {name_of(*c) for c in COMBINATIONS}
    distinct = {json.dumps(x["gradient"]) for x in golden.values()}
    assert len(distinct) > 0.8 * len(golden)                        # the inputs tell the combinations apart
    return lambda *combination: golden[name_of(*combination)]


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_gradient_and_advantages_equal_those_of_trl(reference, loss):
    for combination in (c for c in COMBINATIONS if c[0] == loss):
        found, wanted = ours(*combination)[0], reference(*combination)
        for key in wanted:
            torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(wanted[key]), rtol=0, atol=1e-6)


def test_clip_shares_and_kl_equal_those_of_trl(trl):
    shown = {}
    for combination in (c for c in COMBINATIONS if c[0] in LOSSES[:3] and c[1] == "group" and c[2]):
        trl._metrics["train"].clear()
        theirs(trl, *combination)
        parts = ours(*combination)[1]
        for mine, its in (("clip_low", "clip_ratio/low_mean"), ("clip_high", "clip_ratio/high_mean"),
                          ("kl", "kl")):
            assert float(parts[mine]) == pytest.approx(trl._metrics["train"][its][-1], abs=1e-6)
            shown[mine] = max(shown.get(mine, 0), float(parts[mine]))
    assert all(shown.values())


def test_equal_rewards_give_advantage_exactly_zero():
    for value in (0.1, 1 / 3, 1.3, -0.7, 1e-8, 12345.678):
        for group, scale in itertools.product((2, 3, 7, 12), SCALES):
            mixed = torch.tensor([value] * group + [value + i for i in range(group)])
            found = grpo.advantages(mixed, group, scale)
            assert (found[:group] == 0).all() and (found[group:] != 0).any()


def test_losses_of_micro_batches_add_up_when_ratios_differ_from_one():
    rng = torch.Generator().manual_seed(0)
    old = -2 * torch.rand(12, 9, generator=rng, dtype=torch.float64)
    logp, ref = (old + s * torch.randn(12, 9, generator=rng, dtype=torch.float64) for s in (0.3, 0.4))
    adv = torch.randn(12, generator=rng, dtype=torch.float64)
    mask = (torch.arange(9) < torch.randint(1, 10, (12, 1), generator=rng)).double()

    def grade(parts, loss):
        leaf, totals = logp.clone().requires_grad_(), torch.zeros(5)
        for rows in parts:
            value, said = grpo.policy_loss(leaf[rows], old[rows], ref[rows], adv[rows], mask[rows], loss=loss,
                                           beta=0.1,
                                           num_tokens=float(mask.sum()), num_seqs=12, max_new_tokens=9)
            value.backward()
            totals += torch.stack([value.detach(), *said.values()])
        return leaf.grad, totals

    for loss in LOSSES:
        for found, wanted in zip(grade([[7, 2, 9, 0, 4], [11, 1], [3], [5, 6, 8, 10]], loss),
                                 grade([list(range(12))], loss)):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


# -------------------------------------------------------------------------------------- log-probabilities
def padded(rollouts, more=0):
    """ids, prompt lengths and mask, right-padded by `more` columns beyond the longest row."""
    rows = [r.row["prompt_ids"] + r.completion for r in rollouts]
    ids = torch.full((len(rows), max(map(len, rows)) + more), 63)
    mask = torch.zeros(len(rows), max(len(r.completion) for r in rollouts) + more)
    for i, r in enumerate(rollouts):
        ids[i, :len(rows[i])] = torch.tensor(rows[i])
        mask[i, :len(r.completion)] = 1
    return ids, torch.tensor([len(r.row["prompt_ids"]) for r in rollouts]), mask


@pytest.mark.parametrize("kind", toys.KINDS)
def test_log_probabilities_and_entropies_equal_a_full_forward_whatever_the_padding_and_chunks(kind):
    lm, rollouts, gradients = toys.small(kind, vocab_size=toys.VOCAB), made_up(5), []
    for more, chunk in itertools.product((0, 6), (1, 7 * toys.VOCAB, 10 ** 9)):
        lm.zero_grad()
        logp, entropy = grpo.completion_logps(lm, *padded(rollouts, more), 0.7, chunk=chunk)
        (logp * torch.arange(1, 6)[:, None]).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None})
        for i, r in enumerate(rollouts):
            with torch.no_grad():
                wanted, n = full_logps(lm, r.row["prompt_ids"], r.completion, 0.7), len(r.completion)
            torch.testing.assert_close(logp[i, :n], taken(wanted, r.completion), rtol=0, atol=1e-5)
            torch.testing.assert_close(entropy[i, :n], -(wanted.exp() * wanted).sum(-1), rtol=0, atol=1e-5)
            assert not logp[i, n:].any() and not entropy[i, n:].any()
    for gradient in gradients[1:]:
        assert_same(gradient, gradients[0], atol=2e-4)


@pytest.mark.parametrize("kind, off", [(kind, key) for kind, (_, config) in toys.KINDS.items()
                                       for key in toys.OFF if key in config])
def test_windows_scales_and_caps_of_the_models_above_change_their_logits(kind, off):
    """Or leaving them out would go unseen."""
    with torch.no_grad():
        ids = torch.tensor([list(range(3, 20))])
        one, other = (toys.small(kind, **config)(ids).logits for config in ({}, {off: toys.OFF[off]}))
    assert (one.log_softmax(-1) - other.log_softmax(-1)).abs().max() > 1e-3


def test_logits_that_the_chunked_head_gets_wrong_are_refused():
    for kind, dtype in itertools.product(toys.KINDS, (torch.float32, torch.bfloat16)):
        grpo.check_head(toys.small(kind).to(dtype))
    lm = toys.small("granite").to(torch.float32)
    forward = lm.forward                                            # as HyperCLOVA X, which multiplies
    lm.forward = lambda **options: SimpleNamespace(logits=forward(**options).logits * 16)
    with pytest.raises(ValueError, match="granite changes its logits"):
        grpo.check_head(lm)


def test_the_entropy_has_no_gradient_and_the_change_of_a_word_that_the_code_names_gives_it_one():
    lm, rollouts, namespace = toys.model(), made_up(5), dict(vars(grpo))
    assert not grpo.completion_logps(lm, *padded(rollouts))[1].requires_grad
    source = inspect.getsource(grpo.completion_logps)
    assert "keep their gradient" in source and source.count("frozen = logps.detach()") == 1
    exec(source.replace("frozen = logps.detach()", "frozen = logps"), namespace)
    for chunk in (7 * toys.VOCAB, 10 ** 9):
        lm.zero_grad()
        namespace["completion_logps"](lm, *padded(rollouts), 0.7, chunk=chunk)[1].sum().backward()
        found = {name: p.grad.clone() for name, p in lm.named_parameters()}
        lm.zero_grad()
        for r in rollouts:
            wanted = full_logps(lm, r.row["prompt_ids"], r.completion, 0.7)
            (-(wanted.exp() * wanted).sum()).backward()
        assert_same(found, {name: p.grad for name, p in lm.named_parameters()}, atol=1e-4)


def test_no_tensor_of_batch_by_time_by_vocabulary_ever_exists():
    n, width, vocab, hidden, chunk = 2, 40, 151_936, 8, 2 ** 19
    lm = toys.model(vocab=vocab, hidden=hidden, layers=1)
    ids, mask = torch.randint(1, vocab, (n, width + 4)), torch.ones(n, width)
    with toys.Memory() as update:                                        # forward and backward
        logp = grpo.completion_logps(lm, ids, torch.full((n,), 4), mask, 1.0, chunk=chunk)[0]
        grpo.policy_loss(logp, logp.detach(), None, torch.ones(n), mask, num_tokens=n * width, num_seqs=n,
                         max_new_tokens=width)[0].backward()
    assert update.largest <= max(chunk, vocab * hidden) and 0 < update.peak < 0.5 * 4 * n * width * vocab
    with toys.Memory() as full:                                     # the ruler measures: full logits are seen
        lm(input_ids=ids[:1, :8]).logits.log_softmax(-1)
    assert full.largest == 8 * vocab and full.peak >= 2 * 4 * 8 * vocab
    with toys.Memory() as sampling:
        grpo.generate(lm, [[5] * 40, [6] * 30], noise(4, 3), 2, 3, 1.0, {0})
    assert sampling.largest <= max(4 * vocab, vocab * hidden)


# ------------------------------------------------------------------------------------------- the update
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_of_a_step_is_the_papers_for_any_split_into_micro_batches(
        toy, tmp_path, monkeypatch, seen, loss):
    shaken(monkeypatch)
    for size, order in ((8, 0), (3, 5)):
        rollouts = made_up(8)
        random.Random(order).shuffle(rollouts)
        with monkeypatch.context() as patch:
            train_on(patch, rollouts)
            run(toy, tmp_path / f"{size}", f"--loss {loss} --beta 0.05 --micro_batch_size {size} --steps 1",
                "--prompts_per_step 2 --temperature 0.8 --lr 0")
        before = toys.model()
        wanted = plain_gradient(seen.policies[-1], rollouts, loss, temperature=0.8, beta=0.05, ref=before)
        assert_same(seen.gradients[-1], wanted)


def test_every_sampled_id_is_trained_the_end_included_and_none_is_tokenised_again(toy, tmp_path, monkeypatch):
    trained, sampled = [], []
    logps, generate = grpo.completion_logps, grpo.generate

    def spy_logps(lm, ids, prompt_lengths, mask, *args):
        trained.extend(ids[i, :prompt_lengths[i] + int(mask[i].sum())].tolist() for i in range(len(ids))
                       if mask[i].any())
        return logps(lm, ids, prompt_lengths, mask, *args)

    def spy_generate(lm, prompts, noise, group_size, *args, **kwargs):
        found = generate(lm, prompts, noise, group_size, *args, **kwargs)
        sampled.extend(prompts[i // group_size] + ids for i, ids in enumerate(found[0]))
        return found

    monkeypatch.setattr(grpo, "completion_logps", spy_logps)
    monkeypatch.setattr(grpo, "generate", spy_generate)
    run(toy, tmp_path, "--steps 1 --group_size 8 --max_new_tokens 40 --beta 0.01")
    trained = [list(ids) for ids in set(map(tuple, trained))]       # under reference and policy
    assert sorted(trained) == sorted(sampled) and len(sampled) == 32
    assert any(ids[-1] == 0 for ids in trained)                     # here also the id that pads
    assert any(max(ids) >= len(toys.tokenizer()) for ids in trained)    # no text has these ids


@pytest.mark.parametrize("beta", [0, 0.1])
def test_a_step_of_equal_rewards_changes_nothing_without_the_kl_and_is_pulled_back_with_it(
        toy, tmp_path, monkeypatch, seen, beta):
    """The exact KL to the reference, over the whole vocabulary, on the completions of the first step."""
    pay(monkeypatch, lambda text, row: 0.1)
    shaken(monkeypatch, 0.03)
    trace, real, reference = [], grpo.update, toys.model()

    @torch.no_grad()
    def kl(lm):
        pairs = [[full_logps(m, r.row["prompt_ids"], r.completion) for m in (lm, reference)]
                 for r in sum(seen.groups[0], [])]
        return sum(float((p.exp() * (p - q)).sum()) for p, q in pairs)

    def update(*args, **kwargs):
        trace.append(kl(seen.policies[0]))
        return real(*args, **kwargs)

    monkeypatch.setattr(grpo, "update", update)
    lines = run(toy, tmp_path, f"--steps 5 --beta {beta} --lr 3e-4 --max_resample 1")
    trace.append(kl(seen.policies[0]))
    if beta:
        assert lines[-1]["kl"] > 0 and trace[0] > trace[2] > trace[-1] and trace[-1] < 0.9 * trace[0]
    else:
        assert trace == trace[:1] * 6 and all(m["grad_norm"] == 0 for m in lines)


def test_rows_without_an_advantage_are_left_out_without_the_kl_and_the_update_is_the_same(
        toy, tmp_path, monkeypatch, seen):
    rollouts, lines = made_up(12), []
    for r in rollouts[:7]:
        r.advantage = 0.0
    train_on(monkeypatch, rollouts)
    for beta in (0, 1e-12):                                         # with the KL every row has a gradient
        lines += run(toy, tmp_path / f"{beta}",
                     f"--beta {beta} --micro_batch_size 4 --steps 1 --prompts_per_step 3")
    assert [len(adv) for *_, adv, _ in seen.losses] == [4, 1, 4, 4, 4]
    for name in ("loss", "grad_norm"):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-4, abs=1e-7)
    assert_same(seen.gradients[0], seen.gradients[1])
    assert_same(seen.gradients[0], plain_gradient(toys.model(), rollouts))


@pytest.mark.parametrize("loss", ["dapo", "grpo"])
def test_where_too_few_groups_live_dead_ones_fill_up_and_count_in_the_denominators(
        toy, tmp_path, monkeypatch, seen, loss):
    lively = {row["target"] for row in toys.COUNTDOWN[:2]}
    pay(monkeypatch, lambda text, row: odd_sum(text, row) if row["target"] in lively else 0.25)
    m, = run(toy, tmp_path, f"--steps 1 --prompts_per_step 3 --max_resample 1 --lr 0 --loss {loss}")
    drawn = sum(seen.groups, [])
    dead = [len({r.parts["reward"] for r in group}) == 1 for group in drawn]
    living = [group for group, d in zip(drawn, dead) if not d]
    assert 0 < len(living) < 3 < len(drawn) == m["groups_drawn"]
    chosen = sum(living + [group for group, d in zip(drawn, dead) if d], [])[:12]
    assert m["frac_reward_zero_std_after"] == pytest.approx(1 - len(living) / 3)
    assert {r.advantage for r in chosen[4 * len(living):]} == {0.0}
    assert_same(seen.gradients[0], plain_gradient(toys.model(), chosen, loss))


def test_a_loss_term_of_your_own_is_trained_on_groups_without_advantage_too(toy, tmp_path, monkeypatch, seen):
    """A line in policy_loss, after per_token is complete, and train() leaves no row out."""
    rollouts, edited = made_up(8), {}
    for r in rollouts[:5]:
        r.advantage = 0.0
    for name, old, new in (("policy_loss", "    norm =", "    per_token += 0.3 * logp\n    norm ="),
                           ("train", "for r in rollouts if r.advantage or args.beta]", "for r in rollouts]")):
        source = inspect.getsource(inspect.unwrap(getattr(grpo, name)))
        assert source.count(old) == 1
        exec(source.replace(old, new), vars(grpo), edited)
        monkeypatch.setattr(grpo, name, edited[name])
    train_on(monkeypatch, rollouts)
    run(toy, tmp_path, "--micro_batch_size 2 --steps 1 --lr 0 --prompts_per_step 2")
    assert_same(seen.gradients[0], plain_gradient(toys.model(), rollouts, extra=0.3))


def test_groups_that_are_all_dead_are_warned_of_at_the_first_step_and_where_it_begins_later(
        toy, tmp_path, monkeypatch, capfd):
    """Once at step 1; later, once three steps in a row were so. What no live row measured is null."""
    step = [0]

    def score_batch(tasks, texts, *args, **kwargs):
        step[0] += 1
        dull = dict.fromkeys(rewards.WEIGHTS, 0.0) | {"format": 0.5, "reward": 0.15}
        return [dull if step[0] in dead else dull | {"reward": len(x) + odd_sum(x, None)} for x in texts]

    monkeypatch.setattr(rewards, "score_batch", score_batch)
    for dead, warned in (([1, 2, 3, 4], [1]), ([2, 3, 4, 5], [4]), ([1, 2, 4, 5, 6], [1, 6]), ([3, 4], [])):
        step[0], out = 0, tmp_path / f"{len(dead)}{dead[0]}"
        lines = run(toy, out, f"--steps {max(dead)} --prompts_per_step 2")
        assert [m["step"] for m in lines if m["frac_reward_zero_std"] == 1] == dead
        assert all(KEYS <= set(m) for m in lines)
        assert [m["step"] for m in lines if m["entropy"] is None and m["logp_gap"] is None] == dead
        assert (far(out, toy / "model") > 0) == (len(dead) < len(lines))
        said = capfd.readouterr().err.splitlines()
        marks = [i for i, line in enumerate(said) if "every group is dead" in line]
        assert [sum(line.startswith("step ") for line in said[:i]) for i in marks] == warned
        for i in marks:                                             # `length`, at 0 too, weighs nothing
            assert ": correct, process, efficiency. " in said[i] and "sft.py" in said[i]


def test_later_inner_epochs_take_the_first_ones_log_probabilities_as_old(toy, tmp_path, monkeypatch, seen):
    train_on(monkeypatch, made_up(8))
    line, = run(toy, tmp_path,
                "--inner_epochs 3 --micro_batch_size 8 --steps 1 --prompts_per_step 2 --clip_low 0.01",
                "--clip_high 0.02")
    (first, old, *_), *later = seen.losses
    assert len(later) == 2 and torch.equal(first, old)
    assert all(torch.equal(old, first) and (logp - old).abs().max() > 1e-3 for logp, old, *_ in later)
    assert not torch.equal(later[0][0], later[1][0])
    logp, old, _, adv, mask = later[-1]                             # metrics are those of the last epoch
    for name, clipped, sign in (("clip_low", lambda ratio: ratio < 0.99, -1),
                                ("clip_high", lambda ratio: ratio > 1.02, 1)):
        share = (clipped((logp - old).exp()) & (sign * adv[:, None] > 0) & (mask > 0)).sum() / mask.sum()
        assert line[name] == pytest.approx(float(share), abs=1e-6) and share > 0


def test_an_update_of_5e_7_reaches_the_masters_of_bfloat16_weights(toy, tmp_path, seen):
    """In bfloat16 itself an update of 5e-7 would be lost in nearly every weight."""
    run(toy, tmp_path, "--dtype bfloat16 --lr 5e-7 --prompts_per_step 2 --max_grad_norm 0")
    start, moved = dict(toys.model().bfloat16().named_parameters()), []
    for name, (_, master) in seen.trained[0].items():
        moved.append((master - start.pop(name).float()).abs().flatten())
    moved = torch.cat(moved)
    assert not start and moved.max() < 2e-6 and (moved > 1e-7).float().mean() > 0.7


def test_small_updates_add_up_in_the_masters_and_gradients_are_accumulated_in_fp32():
    args = grpo.parse_args("--model x --lr 5e-7 --optim adamw --max_grad_norm 0".split())
    model = torch.nn.Linear(8, 1, bias=False, dtype=torch.bfloat16)
    start = model.weight.data.fill_(0.1).clone()
    trained = grpo.fp32_masters(model)
    (p, master), = trained.values()
    optimizer = grpo.make_optimizer(trained, args)
    for size in (256, 1, 1, 1):                                     # bfloat16 makes 256 of 256 + 1
        (p.sum() * size).backward()
        assert p.grad is None
    assert (master.grad == 259).all()
    optimizer.zero_grad()
    for step in range(600):
        p.sum().backward()
        grpo.update(trained, optimizer, 1.0, args, True)
        assert master.grad is None and (step or torch.equal(p, start) and (master < start.float()).all())
    assert (p < start).all() and torch.equal(p, master.bfloat16())
    torch.testing.assert_close(master, start.float() - 600 * 5e-7, rtol=0, atol=6e-6)


@pytest.mark.parametrize("more", ["", "--lora_rank 4", "--lora_rank 4 --load_in_4bit"],
                         ids=["whole", "lora", "qlora"])
def test_in_bfloat16_the_gap_between_sampler_and_trainer_is_small(toy, tmp_path, seen, more):
    """It was up to 0.0078 here when fp32 weights were trained and a bfloat16 copy was sampled from."""
    lines = run(toy, tmp_path, "--dtype bfloat16 --steps 2 --group_size 8 --prompts_per_step 8 --lr 1e-2",
                "--max_new_tokens 24", more)
    assert all(0 < m["logp_gap"] < 0.0035 and m["grad_norm"] > 0 for m in lines)
    for p, master in seen.trained[0].values():                      # one set of weights, and its masters
        assert (p.dtype, master.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(p, master.bfloat16())


def test_dropout_is_off_in_every_pass(tmp_path, seen):
    """In transformers' GPT-2 it is 0.1 three times over; here it would drop half."""
    toys.save(tmp_path)
    toys.small("gpt2", vocab_size=toys.VOCAB, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5,
               eos_token_id=0).save_pretrained(tmp_path / "model")
    line, _ = run(tmp_path, tmp_path / "out", "--beta 0.1 --inner_epochs 2 --lr 0")
    assert abs(line["kl"]) < 1e-6 and line["logp_gap"] < 1e-4
    assert all(torch.equal(logp, old) for logp, old, *_ in seen.losses)


@pytest.mark.parametrize("schedule, falls", [
    ("constant", [1, 1, 1]), ("linear", [0.75, 0.5, 0.25]),
    ("cosine", [0.5 + 0.125 ** 0.5, 0.5, 0.5 - 0.125 ** 0.5])])
def test_the_learning_rate_rises_to_its_peak_and_then_follows_the_schedule(toy, tmp_path, schedule, falls):
    short = f"--lr_schedule {schedule} --prompts_per_step 1 --group_size 2 --max_new_tokens 2"
    lines = run(toy, tmp_path / "a", f"{short} --lr 1e-3 --steps 6 --warmup 2")
    assert [m["lr"] for m in lines] == pytest.approx([1e-3 * x for x in (0.5, 1, 1, *falls)])
    lines = run(toy, tmp_path / "b", f"{short} --lr 1e-3 --steps 4 --warmup 0")
    assert [m["lr"] for m in lines] == pytest.approx([1e-3 * x for x in (1, *falls)])
    m, = run(toy, tmp_path / "c", f"{short} --lr 1e-3 --steps 1 --warmup 4")
    assert m["lr"] == pytest.approx(2.5e-4)


# ------------------------------------------------------------------------------------------- sampling
ENDS = {0, 1, 2}
PROMPTS = [[5, 6, 7], list(range(9, 20)), [30, 31], [8, 7, 6, 5, 4]]


def noise(n=12, limit=20, seed=0):
    return grpo.uniforms([[seed, 1, row] for row in range(n)], limit)


@torch.no_grad()
def naive(lm, prompts, u, group_size, limit=20, temperature=1.2):
    """Row by row and token by token, a whole forward for each: no cache, no padding, no batch."""
    rows, logps = [], []
    for i in range(len(prompts) * group_size):
        ids, logp = [], []
        while len(ids) < limit and not ENDS & set(ids[-1:]):
            context = torch.tensor([prompts[i // group_size] + ids])
            logits = lm(input_ids=context, use_cache=False).logits[0, -1]
            p = (logits.double() / temperature).softmax(-1)
            ids.append(int(p.argmax()) if u is None else int((p.cumsum(0) <= u[i, len(ids)]).sum()))
            logp.append(float(p[ids[-1]].log()))
        rows.append(ids)
        logps.append(torch.tensor(logp))
    return rows, logps


def assert_sampled(found, wanted):
    assert found[0] == wanted[0]
    for a, b in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", toys.KINDS)
def test_completions_and_their_log_probabilities_are_those_of_a_naive_loop(kind):
    lm = toys.small(kind)
    three, last = PROMPTS[:3], PROMPTS[3:]
    for prompts, u, group in ((three, noise(), 4), (three, None, 1), (last, noise(2, 5), 2)):
        limit = 20 if u is None else u.shape[1]
        wanted = naive(lm, prompts, u, group, limit)
        assert_sampled(grpo.generate(lm, prompts, u, group, limit, 1.2, ENDS), wanted)
        assert group < 4 or len(set(map(len, wanted[0]))) > 2  # they end here and there, and leave the batch
    assert_sampled(grpo.generate(lm, PROMPTS[:1], noise(1, 1), 1, 1, 1.2, ENDS),
                   naive(lm, PROMPTS[:1], noise(1, 1), 1, 1))


@pytest.mark.parametrize("kind", toys.KINDS)
def test_greedy_completions_are_those_of_transformers_generate_with_every_end_token(kind):
    lm, prompts, width = toys.small(kind), PROMPTS, max(map(len, PROMPTS))
    ids = torch.tensor([[63] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = lm.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=40,
                      eos_token_id=None)
    free = out[:, width:].tolist()

    def cut(ends):
        return [row[:next((t for t, x in enumerate(row) if x in ends), 39) + 1] for row in free]

    pairs = itertools.combinations({*itertools.chain(*free)}, 2)
    ends = max(pairs, key=lambda pair: len(set(map(len, cut(pair)))))   # met at different times
    wanted = cut(ends)
    assert len(set(map(len, wanted))) > 1
    assert grpo.generate(lm, prompts, None, 1, 40, 1.0, ends)[0] == wanted


def test_a_completion_depends_on_its_prompt_and_noise_alone_not_on_its_company():
    lm, tok, key = toys.small(), toys.tokenizer(), [3, 1, 5]
    u = grpo.uniforms([[3, 1, 5 * 4 + i] for i in range(16)], 30)   # 5 groups were drawn before
    together, _ = grpo.generate(lm, PROMPTS, u, 4, 30, 1.2, ENDS)
    assert len(set(map(tuple, together))) == 16
    for i in range(4):
        alone = grpo.generate(lm, PROMPTS[i:i + 1], u[4 * i:4 * i + 4], 4, 30, 1.2, ENDS)[0]
        assert alone == together[4 * i:4 * i + 4]
    two = grpo.generate(lm, [PROMPTS[2], PROMPTS[0]], u[[9, 1]], 1, 30, 1.2, ENDS)[0]
    assert two == [together[9], together[1]]
    rows = [{"task": "countdown", "prompt": f"{i}", "prompt_ids": p} for i, p in enumerate(PROMPTS)]
    sampler = functools.partial(grpo.generate, lm, ends=ENDS)
    for size in (1, 8, 512):
        args = SimpleNamespace(group_size=4, sample_batch_size=size, max_new_tokens=30, style="reasoning",
                               length_penalty=[500, 800])
        groups = grpo.roll_out(sampler, tok, rows, args, rewards.WEIGHTS, ENDS, 1.2, key)
        assert [r.completion for group in groups for r in group] == together
        assert [r.row["prompt"] for group in groups for r in group] == [c for c in "0123" for _ in range(4)]
    for r in (r for group in groups for r in group):
        assert r.ended == (r.completion[-1] in ENDS) and not ENDS & set(r.completion[:-1])
        assert r.text == tok.decode(r.completion[:-1] if r.ended else r.completion)
        assert r.parts["reward"] == odd_sum(r.text, r.row)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_the_sampling_law_is_the_law_that_is_trained(temperature):
    """All sequences of up to 3 of 8 tokens, counted over 4,000 samples, against enumerated probabilities."""
    lm, limit, n = toys.model(seed=1, std=0.35, vocab=8, hidden=16, layers=1), 3, 4000
    exact, prompts = copy.deepcopy(lm).double(), [[3, 5, 1], [4, 4, 2, 6, 4]]   # the first one is left-padded

    @torch.no_grad()
    def grow(law, prompt, done, chance):
        if done and (done[-1] == 0 or len(done) == limit):
            law[done] = chance
            return
        p = (exact(torch.tensor([[*prompt, *done]])).logits[0, -1] / temperature).softmax(-1)
        for token in range(8):
            grow(law, prompt, (*done, token), chance * p[token].item())

    ids, _ = grpo.generate(lm, prompts, noise(2 * n, limit, 1), n, limit, temperature, {0})
    for k, prompt in enumerate(prompts):
        law = {}
        grow(law, prompt, (), 1.0)
        counts = dict.fromkeys(law, 0)
        for row in ids[k * n:(k + 1) * n]:
            counts[tuple(row)] += 1
        rare = [s for s in law if law[s] * n < 8]
        cells = [(counts[s], law[s] * n) for s in law if law[s] * n >= 8]
        cells += [(sum(counts[s] for s in rare), sum(law[s] for s in rare) * n)] if rare else []
        assert sum(law.values()) == pytest.approx(1) and len(cells) > 40
        assert p_value(sum((seen - due) ** 2 / due for seen, due in cells), len(cells) - 1) > 1e-4
    rows = list(law)[::17]
    logp = grpo.completion_logps(lm, torch.tensor([prompt + list(s) + [0] * (limit - len(s)) for s in rows]),
                                 torch.full((len(rows),), 5),
                                 torch.tensor([[float(t < len(s)) for t in range(limit)] for s in rows]),
                                 temperature)[0]
    torch.testing.assert_close(logp.sum(1).exp().double(), torch.tensor([law[s] for s in rows]).double(),
                               rtol=1e-3, atol=0)


def test_noise_is_uniform_and_a_function_of_its_key_alone():
    u = grpo.uniforms([[3, 4, row] for row in range(400)], 50)
    assert 0 <= u.min() and u.max() < 1
    bins = torch.histc(u, 20, 0, 1)
    assert p_value(float(((bins - 1000) ** 2 / 1000).sum()), 19) > 1e-4
    assert torch.equal(grpo.uniforms([[3, 4, 17], [3, 4, 2]], 20), u[[17, 2], :20])
    others = [grpo.uniforms([[*key, row] for row in range(400)], 50) for key in ([3, 5], [4, 4])]
    assert len(torch.cat([u, *others])[:, :2].unique(dim=0)) == 1200


@pytest.mark.parametrize("vocab", [50, 20_500])
def test_the_first_id_is_picked_whose_cumulated_probability_exceeds_u_and_none_of_probability_zero(vocab):
    torch.manual_seed(0)
    logits, u = 3 * torch.randn(300, vocab), torch.rand(300)
    p = (logits.double() / 1.3).softmax(-1)
    ids, logps = grpo.pick(logits, 1.3, u)
    chance, ends = (x.gather(1, ids[:, None]).squeeze(1) for x in (p, p.cumsum(1)))
    assert (ends > u - 1e-5).all() and (ends - chance <= u + 1e-5).all()
    torch.testing.assert_close(logps.double(), chance.log(), rtol=0, atol=1e-5)
    assert torch.equal(grpo.pick(logits, 1.3, None)[0], logits.argmax(-1))
    logits[:, ::7] = logits[:, -5:] = -torch.inf
    for edge in (0.0, 0.5, 1 - 2 ** -24):  # the last is the largest that uniforms() gives
        ids, logps = grpo.pick(logits, 1.0, torch.full((300,), edge))
        assert logps.isfinite().all() and logits.gather(1, ids[:, None]).isfinite().all()


# ------------------------------------------------------------------------------------------- policies
@pytest.mark.parametrize("more", ["", "--load_in_4bit"], ids=["lora", "qlora"])
def test_the_sampler_the_merged_export_and_the_adapter_in_peft_agree_with_the_policy(tmp_path, seen, more):
    import peft
    toys.save(tmp_path, tied=False, attention_bias=True)
    ids = torch.tensor([[40, 50, 60, 70, 80]])
    lines = run(tmp_path, tmp_path / "out", "--lora_rank 4 --merge --lr 1e-2", more)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out/merged")
    base = grpo.load_lm(tmp_path / "model", torch.device("cpu"), torch.float32, bool(more))
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    with torch.no_grad():
        wanted = seen.policies[0](ids).logits
        for model, atol in ((merged, 1e-4), (adapted, 1e-5)):
            torch.testing.assert_close(model(ids).logits, wanted, rtol=0, atol=atol)
        with seen.policies[0].disable_adapter():
            assert (seen.policies[0](ids).logits - wanted).abs().max() > 1e-2
    assert all(m["logp_gap"] < 1e-4 for m in lines)                 # with the adapter on, after a step too
    assert "quantization_config" not in json.loads((tmp_path / "out/merged/config.json").read_text())
    assert AutoTokenizer.from_pretrained(tmp_path / "out/merged").chat_template == toys.TEMPLATE
    changed = {n for n, p in seen.policies[0].named_parameters() if p.requires_grad}
    assert changed and all(".lora_" in name for name in changed)
    assert not (tmp_path / "out/model.safetensors").exists()


def test_gradient_of_an_adapter_is_that_of_the_merged_model(toy, tmp_path, monkeypatch, seen):
    """Chain rule: dL/dB = scale * dL/dW A^T, with dL/dW from a plain model that holds the merged weights."""
    rollouts = made_up(8)
    train_on(monkeypatch, rollouts)
    shaken(monkeypatch, 0.1)
    run(toy, tmp_path, "--lora_rank 4 --lora_alpha 12 --steps 1 --lr 0 --prompts_per_step 2 --merge")
    wanted = plain_gradient(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), rollouts)
    named = dict(seen.policies[0].named_parameters())
    pairs = {name: g for name, g in seen.gradients[0].items() if ".lora_B." in name}
    assert len(pairs) == 14
    for name, g in pairs.items():
        a = named[name.replace("lora_B", "lora_A")].detach().double()
        key = name.removeprefix("base_model.model.").replace("lora_B.default.", "")
        torch.testing.assert_close(g.double(), 12 / 4 * wanted[key] @ a.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("more", ["", "--load_in_4bit"], ids=["lora", "qlora"])
def test_the_reference_of_an_adapter_is_its_base_bitwise_also_after_the_adapter_has_moved(
        toy, tmp_path, monkeypatch, seen, more):
    train_on(monkeypatch, made_up(8))
    run(toy, tmp_path, "--lora_rank 4 --beta 0.01 --micro_batch_size 8 --prompts_per_step 2 --lr 1e-2", more)
    (start, _, first, *_), (now, _, second, *_) = seen.losses
    assert torch.equal(first, start) and torch.equal(second, start)  # B is 0 at the start: the base
    assert (now - start).abs().max() > 1e-3


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_final_model_and_every_checkpoint_load_with_the_logits_of_the_policy(tmp_path, seen, tied):
    toys.save(tmp_path, tied=tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.generation_config.eos_token_id = [0, 90]
    model.save_pretrained(tmp_path / "model")
    out, ids = tmp_path / "out", torch.tensor([[40, 50, 60, 70, 80]])
    run(tmp_path, out, "--steps 4 --save_every 1")
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    for folder in (out, out / "checkpoint-4"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, seen.policies[0](ids).logits)
            assert not torch.equal(loaded(ids).logits, model(ids).logits)
        assert loaded.config.tie_word_embeddings == tied
        assert ("lm_head.weight" in weights(folder)) == (not tied)
        assert loaded.generation_config.eos_token_id == [0, 90] and loaded.dtype == torch.float32
        assert tokenizer.chat_template == toys.TEMPLATE and tokenizer.eos_token_id == 0


@pytest.mark.parametrize("more", ["", "--lora_rank 4 --beta 0.02"], ids=["whole", "lora"])
def test_an_adapter_as_model_is_merged_and_trained_on_from_there(toy, tmp_path, seen, more):
    import peft
    run(toy, tmp_path / "sft", "--lora_rank 2 --lr 1e-1 --seed 5")      # another rank
    begin, ids = copy.deepcopy(seen.policies[0]), torch.tensor([[40, 50, 60, 70, 80]])
    shutil.copytree(toy / "model", tmp_path / "x/base")             # of a run that was stopped at once
    argv = flags(toy, tmp_path / "x", f"--model {tmp_path}/sft --steps 2 --save_every 1 --lr 1e-2", more)
    main(argv)
    shutil.copytree(tmp_path / "x", tmp_path / "whole")
    shutil.rmtree(tmp_path / "x/checkpoint-2")
    main([*argv, "--resume"])
    assert_same_run(tmp_path / "x", tmp_path / "whole")
    load = peft.AutoPeftModelForCausalLM if more else AutoModelForCausalLM
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "x/base")(ids).logits
        torch.testing.assert_close(base, begin(ids).logits, rtol=0, atol=1e-4)
        assert (base - toys.model()(ids).logits).abs().max() > 1e-2
        final = load.from_pretrained(tmp_path / "x")(ids).logits
        torch.testing.assert_close(final, seen.policies[-1](ids).logits, rtol=0, atol=1e-5)
        assert (final - base).abs().max() > 1e-3
    assert not more or seen.losses[-1] and metrics(tmp_path / "x")[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path / "x").chat_template == toys.TEMPLATE


@pytest.mark.parametrize("kind, more", [
    ("4-bit", "--lora_rank 4 --merge"), ("moe", ""), ("moe", "--lora_rank 4 --merge"),
    ("moe", "--lora_rank 4 --load_in_4bit --merge"), ("gemma 3", "")])
def test_4_bit_checkpoints_experts_and_windows_are_sampled_trained_and_saved(tmp_path, seen, kind, more):
    toys.save(tmp_path)
    if kind == "4-bit":
        lm = grpo.load_lm(tmp_path / "model", torch.device("cpu"), torch.float32, True)
    else:
        lm = toys.small(kind, vocab_size=toys.VOCAB, eos_token_id=0)
    lm.save_pretrained(tmp_path / "model")
    lines = run(tmp_path, tmp_path / "out", "--beta 0.01 --lr 1e-2", more)
    assert all(m["logp_gap"] < 1e-4 and m["grad_norm"] > 0 for m in lines)
    assert abs(lines[0]["kl"]) < 1e-6 and lines[1]["kl"] > 1e-3
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / ("out/merged" if more else "out"))
    with torch.no_grad():
        ids = torch.tensor([[40, 50, 60, 70, 80]])
        torch.testing.assert_close(saved(ids).logits, seen.policies[0](ids).logits, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------- whole runs
def test_every_end_of_model_tokenizer_and_template_ends_a_completion_and_is_cut_by_its_id(tmp_path, seen):
    """The template ends a turn with a token of its own, and opens the reasoning."""
    toys.save(tmp_path)
    template = toys.TEMPLATE.replace(toys.END, toys.UNKNOWN)
    tok = toys.tokenizer(template.replace(toys.ASSISTANT, f"{toys.ASSISTANT}<reasoning>\n"))
    tok.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.generation_config.eos_token_id = [90, 91, 92]
    model.generation_config.update(do_sample=True, top_k=90, repetition_penalty=1.5)    # is not sampled with
    model.save_pretrained(tmp_path / "model")
    run(tmp_path, tmp_path / "out", "--max_new_tokens 60 --group_size 16 --steps 1")
    rollouts = [r for groups in seen.groups for group in groups for r in group]
    ends = {0, 3, 90, 91, 92}
    assert {r.completion[-1] for r in rollouts if r.ended} == ends
    for r in rollouts:
        assert not ends & set(r.completion[:-1]) and r.ended == (r.completion[-1] in ends)
        assert r.text == "<reasoning>" + tok.decode(r.completion[:-1] if r.ended else r.completion)
        assert r.row["prompt"].endswith("<reasoning>\n")
    assert any(toys.USER in r.text or "</answer>" in r.text for r in rollouts)  # special tokens are text too


def test_instructions_stand_before_the_users_text_where_a_template_drops_or_refuses_the_system_turn():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    every, refuse = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}", "{{ raise_exception('no') }}"
    system = "{% if messages[0]['role'] == 'system' %}"
    drop = every.replace("messages", "messages if m['role'] != 'system'")
    for template, wanted in ((every, "[Be brief.][2+2?]"), (drop, "[Be brief.\n\n2+2?]"),
                             (f"{system}{refuse}{{% endif %}}{every}", "[Be brief.\n\n2+2?]")):
        assert grpo.render(toys.tokenizer(template), [chat, chat]) == [wanted] * 2


def test_short_completions_are_learned_where_length_costs(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "score_batch", SCORE_BATCH)
    lines = run(toy, tmp_path,
                "--weights length=1 --length_penalty 4 24 --max_new_tokens 24 --steps 12 --lr 2e-2",
                f"--prompts_per_step 8 --group_size 8 --eval_every 12 --eval_data countdown={toy}/countdown")
    assert all(-1 <= m["reward"] <= 0 and m["reward"] == pytest.approx(m["length"]) for m in lines)
    assert lines[-1]["completion_length"] < 0.5 * lines[0]["completion_length"]
    first, last = (m["eval_reward"] for m in toys.read(tmp_path / "metrics.jsonl") if "eval_reward" in m)
    assert first < -0.7 and last > -0.4  # greedy, by the weights after the last step


def test_an_adapter_learns_a_toy_reward(toy, tmp_path, monkeypatch):
    """The share of a completion that is digits: a tenth by chance."""
    pay(monkeypatch, lambda text, row: sum(c.isdigit() for c in text) / 8)
    lines = run(toy, tmp_path,
                "--steps 16 --prompts_per_step 4 --group_size 12 --max_new_tokens 8 --lr 8e-2 --lora_rank 8")
    first, *_, last = (m["reward"] for m in lines)
    assert first < 0.2 and last > 0.45


def test_metrics_and_samples_are_those_of_the_step(toy, tmp_path, monkeypatch, seen):
    """Every number again, from the policy before the update, sequence by sequence."""
    before, real = [], grpo.update

    def update(*args, **kwargs):
        before.append(copy.deepcopy(seen.policies[0]))
        return real(*args, **kwargs)

    monkeypatch.setattr(grpo, "update", update)
    lines = run(toy, tmp_path,
                "--steps 3 --temperature 1.2 --temperature_end 0.8 --beta 0.05 --lr 4e-3 --warmup 2",
                "--micro_batch_size 3 --max_grad_norm 0.01 --prompts_per_step 2")
    assert [m["step"] for m in lines] == [1, 2, 3] and all(KEYS <= set(m) for m in lines)
    assert [m["temperature"] for m in lines] == pytest.approx([1.2, 1.0, 0.8])
    assert [m["lr"] for m in lines] == pytest.approx([2e-3, 4e-3, 4e-3])
    for m, lm, groups in zip(lines, before, seen.groups, strict=True):
        rollouts, temperature = sum(groups, []), m["temperature"]
        logps, refs = ([full_logps(x, r.row["prompt_ids"], r.completion, temperature).detach()
                        for r in rollouts] for x in (lm, before[0]))
        gaps = [taken(ref, r.completion) - taken(x, r.completion) for x, ref, r in zip(logps, refs, rollouts)]
        tokens = sum(len(r.completion) for r in rollouts)
        gradient = plain_gradient(lm, rollouts, temperature=temperature, beta=0.05, ref=before[0])
        earned = [[odd_sum(r.text, None) for r in group] for group in groups]
        wanted = {"entropy": sum(float(-(x.exp() * x).sum()) for x in logps) / tokens, "clip_low": 0,
                  "kl": sum(float((d.exp() - d - 1).sum()) for d in gaps) / tokens, "clip_high": 0,
                  "grad_norm": math.sqrt(sum(float((g ** 2).sum()) for g in gradient.values())),
                  "completion_length": tokens / 8, "truncated": np.mean([not r.ended for r in rollouts]),
                  "reward": np.mean(earned), "correct": np.mean(np.array(earned) > 0.5), "groups_drawn": 2,
                  "frac_reward_zero_std": np.mean([len(set(group)) == 1 for group in earned])}
        assert {k: m[k] for k in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        assert 0 <= m["logp_gap"] < 1e-4 and 0.05 < m["peak_memory_gb"] < 50
        assert m["step_seconds"] == pytest.approx(m["sample_seconds"] + m["update_seconds"], rel=0.1)
    assert lines[1]["kl"] > 1e-6 and lines[0]["grad_norm"] > 0.1     # before it was clipped
    samples, first = toys.read(tmp_path / "samples.jsonl"), sum(seen.groups[0], [])
    for x, r in zip(samples, first, strict=True):
        assert (x["completion"], x["ended"], x["reward"]) == (r.text, r.ended, odd_sum(r.text, None))
    adv = grpo.advantages(torch.tensor([x["reward"] for x in samples]), 4)
    assert [x["advantage"] for x in samples] == pytest.approx(adv.tolist())
    assert all("Numbers: [" in x["prompt"] and x["step"] == 1 and {"task", "format"} <= set(x)
               for x in samples)


def test_dead_groups_are_replaced_by_fresh_prompts_up_to_the_limit_and_both_shares_are_reported(
        toy, tmp_path, monkeypatch, seen):
    """Half of the prompts always earn the same."""
    lively = {row["target"] for row in toys.COUNTDOWN[::2]}
    pay(monkeypatch, lambda text, row: odd_sum(text, row) if row["target"] in lively else 0.25)
    m, = run(toy, tmp_path / "on", "--max_resample 9 --steps 1 --prompts_per_step 2")
    dull = [[len({r.parts["reward"] for r in group}) == 1 for group in groups] for groups in seen.groups]
    assert m["frac_reward_zero_std"] == np.mean(dull[0]) and m["frac_reward_zero_std_after"] == 0
    assert m["groups_drawn"] == len(sum(dull, [])) and sum(not x for x in sum(dull, [])) == 2
    lines = run(toy, tmp_path / "off", "--steps 2 --prompts_per_step 3")
    assert all(m["frac_reward_zero_std"] == m["frac_reward_zero_std_after"] and m["groups_drawn"] == 3
               for m in lines)
    pay(monkeypatch, lambda text, row: 0.25)
    seen.groups.clear()
    m, = run(toy, tmp_path / "limit", "--max_resample 2 --steps 1 --prompts_per_step 2")
    indices = [place(group) for groups in seen.groups for group in groups]
    assert m["groups_drawn"] == 6 == len(set(indices)) and m["frac_reward_zero_std_after"] == 1
    assert len({tuple(r.completion) for groups in seen.groups for r in groups[0]}) > 9  # fresh noise


def test_prompts_are_drawn_in_epochs_shuffled_by_the_seed(toy, tmp_path, seen):
    rows, orders = len(toys.read(toy / "countdown/train.jsonl")), []
    for seed in (3, 4):
        seen.groups.clear()
        run(toy, tmp_path / str(seed), f"--steps {rows} --prompts_per_step 3 --group_size 2 --max_resample 0 "
                                       f"--max_new_tokens 1 --seed {seed}")
        orders.append([place(group) for groups in seen.groups for group in groups])
        epochs = [orders[-1][at:at + rows] for at in range(0, 3 * rows, rows)]
        assert [sorted(epoch) for epoch in epochs] == [list(range(rows))] * 3
        assert len(set(map(tuple, epochs))) == 3
    assert orders[0] != orders[1]


def test_mixed_tasks_are_graded_each_by_its_own_rules_with_metrics_by_task(toy, tmp_path, monkeypatch):
    """A sampler that is right in countdown always, and in gsm8k every other time."""
    tokenizer = toys.tokenizer()
    answers = {"[3, 5, 8]": "5+3+8", "[1, 2, 3, 4]": "1*2*3*4", "[7, 7, 2]": "7+7+2"}

    def write(lm, prompts, noise, group_size, *_, **__):
        ids = []
        for prompt, g in itertools.product(prompts, range(group_size)):
            text = tokenizer.decode(prompt)
            right = [x for key, x in answers.items() if key in text] or ["4" if "2+2" in text else "12"]
            answer = right[0] if "Target" in text or g % 2 else "1"
            ids.append(tokenizer(f"<reasoning>x</reasoning><answer>{answer}</answer>{toys.END}").input_ids)
        return ids, [torch.full((len(x),), -1.0) for x in ids]

    monkeypatch.setattr(grpo, "generate", write)
    monkeypatch.setattr(rewards, "score_batch", SCORE_BATCH)
    m, = run(toy, tmp_path,
             f"--data countdown={toy}/countdown:3 gsm8k={toy}/gsm8k:2 --steps 1 --prompts_per_step 5",
             "--weights correct=1 format=0.5 --max_new_tokens 100")
    assert {"correct/countdown": 1, "correct/gsm8k": 0.5, "format/gsm8k": 1, "reward/countdown": 1.5,
            "reward/gsm8k": 1.0}.items() <= m.items()
    assert m["correct"] == pytest.approx(0.8) and m["reward"] == pytest.approx(1.3)
    assert m["frac_reward_zero_std"] == pytest.approx(3 / 5) and m["truncated"] == 0


def test_a_reward_part_of_your_own_counts_and_shows_in_metrics_and_samples(toy, tmp_path, monkeypatch):
    real = rewards.score

    def score(task, text, row, style, weights, *args, **kwargs):
        known = {part: weight for part, weight in weights.items() if part != "vowels"}
        parts = real(task, text, row, style, known, *args, **kwargs)
        vowels = sum(c in "aeiou" for c in text) / 12
        return parts | {"vowels": vowels, "reward": parts["reward"] + weights["vowels"] * vowels}

    monkeypatch.setattr(rewards, "score_batch", SCORE_BATCH)
    monkeypatch.setattr(rewards, "score", score)
    monkeypatch.setitem(rewards.WEIGHTS, "vowels", 0.5)
    lines = run(toy, tmp_path, "--steps 1")
    samples = toys.read(tmp_path / "samples.jsonl")
    assert "vowels" in samples[0] and lines[0]["vowels"] > 0
    assert lines[0]["reward"] >= 0.5 * lines[0]["vowels"]


def test_evaluation_is_greedy_and_leaves_the_training_as_it_is(toy, tmp_path, seen):
    run(toy, tmp_path / "a")
    seen.groups.clear()
    run(toy, tmp_path / "b", f"--eval_data gsm8k={toy}/gsm8k --eval_every 1")
    assert far(tmp_path / "a", tmp_path / "b") == 0
    assert [m for m in metrics(tmp_path / "b") if "reward" in m] == metrics(tmp_path / "a")
    evaluations = [m for m in metrics(tmp_path / "b") if "eval_reward" in m]
    assert [m["step"] for m in evaluations] == [0, 1, 2]
    assert {"eval_correct", "eval_format", "eval_completion_length", "eval_truncated"} <= set(evaluations[0])
    for lm, groups, m in ((toys.model(), seen.groups[0], evaluations[0]),
                          (seen.policies[1], seen.groups[-1], evaluations[2])):
        assert [len(group) for group in groups] == [1] * 4
        for group, row in zip(groups, toys.GSM8K, strict=True):
            with torch.no_grad():
                logps = full_logps(lm, group[0].row["prompt_ids"], group[0].completion)
            assert logps.argmax(-1).tolist() == group[0].completion
            assert row["question"] in toys.tokenizer().decode(group[0].row["prompt_ids"])
        assert m["eval_reward"] == pytest.approx(np.mean([odd_sum(group[0].text, 0) for group in groups]))


def test_countdown_data_that_is_not_there_yet_is_made_and_what_is_there_is_taken(
        toy, tmp_path, monkeypatch, seen):
    monkeypatch.chdir(tmp_path)
    calls = []

    def call(command, **kwargs):
        calls.append(list(map(str, command)))
        toys.write(tmp_path / "data/countdown/train.jsonl", toys.COUNTDOWN)
        return 0

    monkeypatch.setattr(grpo.subprocess, "call", call)
    for out in ("a", "b"):
        run(toy, tmp_path / out, "--data countdown:6 --steps 1 --prompts_per_step 6")
    (_, script, *_), = calls
    assert Path(script) == Path(grpo.__file__).with_name("countdown.py")
    assert sorted(map(place, seen.groups[1])) == [0, 1, 2, 3, 4, 5]


def test_pass_rate_selects_rows(toy, tmp_path, seen):
    rates = [0.0, 0.1, 0.100001, 0.5, 0.9, 0.95, 1.0, 0.05]
    rows = [row | {"pass_rate": p} for row, p in zip(toys.COUNTDOWN, rates)]
    data = toys.write(tmp_path / "rows.jsonl", rows)
    run(toy, tmp_path / "out", f"--data countdown={data} --pass_rate 0.1 0.9 --steps 1")
    assert sorted(map(place, seen.groups[0])) == [1, 2, 3, 4]


def test_a_flag_file_reads_like_a_command_line_with_comments(toy, tmp_path):
    (tmp_path / "flags.txt").write_text(
        "# a comment\n\n--lr 3e-4  # the rest\n--output_dir 'a folder'\n--style think\n")
    args = grpo.parse_args(["--model", "x", f"@{tmp_path}/flags.txt", "--lr", "1e-3"])
    assert (args.lr, args.output_dir, args.style, args.steps) == (1e-3, "a folder", "think", 500)


@pytest.mark.parametrize("more, n", [("", 1), ("--lora_rank 4 --dtype bfloat16", 0)], ids=["whole", "lora"])
def test_a_line_before_the_first_step_says_what_runs_and_what_it_takes(toy, tmp_path, capfd, seen, more, n):
    run(toy, tmp_path, "--steps 1", more)
    said = capfd.readouterr().err.splitlines()
    line, first = (x for x in said if "parameters trained" in x or x.startswith("step 1/"))
    count = sum(p.numel() for p in seen.policies[0].parameters() if p.requires_grad)
    for part in (f"{toy}/model", f" {count / 1e6:.1f} M ", "8 rows", "4 x 4 completions", "cpu", "GB",
                 "float32" if n else "bfloat16"):
        assert part in line and part not in first, part
    args = json.loads((tmp_path / "args.json").read_text())         # what the device settled stands there
    assert (args["optim"], args["activation_checkpointing"]) == ("adamw", False)
    assert args["dtype"] == ("float32" if n else "bfloat16")


@pytest.mark.parametrize("more, settled", [
    ("", ("bfloat16", "adamw8bit", True)), ("--fsdp", ("bfloat16", "adamw", True)),
    ("--optim adamw --dtype float32 --no-activation_checkpointing", ("float32", "adamw", False))])
def test_on_a_gpu_the_defaults_are_those_that_take_less_memory(monkeypatch, more, settled):
    for name, value in {"is_available": True, "set_device": None, "is_bf16_supported": True}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    args = grpo.parse_args(["--model", "x", *more.split()])
    device, dtype = grpo.start_processes(args)
    assert (args.dtype, args.optim, args.activation_checkpointing) == settled
    assert str(device) == "cuda:0" and dtype == getattr(torch, settled[0])


def test_numbers_go_to_tensorboard_or_wandb_when_asked_for(toy, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    begun = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: begun.append(options)))
    for board in ("tensorboard", "wandb"):
        lines = run(toy, tmp_path / board, f"--log_to {board} --eval_data countdown={toy}/countdown")
        events = EventAccumulator(str(tmp_path / board))
        events.Reload()
        assert [(x.step, x.value) for x in events.Scalars("reward")] == [
            (m["step"], pytest.approx(m["reward"])) for m in lines]
        assert "eval_reward" in events.Tags()["scalars"]
    assert len(begun) == 1 and begun[0]["sync_tensorboard"] and begun[0]["config"]["group_size"] == 4
    run(toy, tmp_path / "neither", "--steps 1")
    assert not list((tmp_path / "neither").glob("events*"))


# ------------------------------------------------------------------------------- resuming, kills, damage
def long_flags(toy, out, *more):
    return flags(toy, out, "--steps 6 --prompts_per_step 3 --max_new_tokens 10 --temperature_end 0.8",
                 "--warmup 2 --beta 0.02 --save_every 1 --eval_every 3 --max_resample 2 --micro_batch_size 4",
                 f"--lr_schedule cosine --eval_data countdown={toy}/countdown:3", *more)


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """A run that nothing happened to, of 6 steps."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        pay(patch, odd_sum)
        main(long_flags(toy, out))
    return out


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def saved(out):
    return sorted(int(path.name[11:]) for path in out.glob("checkpoint-*"))


def signal_at(name, call, number, ranks=(0,), times=1):
    """In a forked process: a function of grpo.py gets a signal as it is called for the `call`-th time."""
    def before(rank=0):
        real, calls = getattr(grpo, name), []

        def function(*args, **kwargs):
            calls.append(1)
            for _ in range(times if rank in ranks and len(calls) == call else 0):
                signal.raise_signal(number)
            return real(*args, **kwargs)
        setattr(grpo, name, function)
    return before


@pytest.mark.parametrize("more", ["", "--dtype bfloat16", "--lora_rank 4", "--lora_rank 4 --load_in_4bit",
                                  "--optim adamw8bit", "--inner_epochs 2 --seed 1"])
def test_a_resumed_run_ends_with_the_same_bits_as_one_that_was_not_interrupted(toy, tmp_path, more):
    argv = lambda out: long_flags(toy, tmp_path / out, "--steps 3 --save_every 2", more)
    main(argv("a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")                 # it died in its third step
    for path in (tmp_path / "b").glob("*.safetensors"):
        path.unlink()
    with open(tmp_path / "b/metrics.jsonl", "a") as f:
        f.write('{"step": 4, "rew')
    main([*argv("b"), "--resume"])
    assert_same_run(tmp_path / "b", tmp_path / "a")
    assert all(m["grad_norm"] > 0 for m in metrics(tmp_path / "a") if "reward" in m)


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(toy, whole, tmp_path):
    """It is always started by the same command: --resume without a checkpoint starts."""
    argv, rng, kills, code = [*long_flags(toy, tmp_path / "x"), "--resume"], random.Random(0), 0, None
    began = time.time()
    assert exit_code(fork([*long_flags(toy, tmp_path / "timed"), "--resume"])) == 0
    length = time.time() - began
    while kills < 6 or code != 0:
        pid = fork(argv)
        if kills < 6:
            time.sleep(rng.uniform(0.2, 0.8) * length)
            os.kill(pid, signal.SIGKILL)
        code = exit_code(pid)
        assert code in (0, -signal.SIGKILL)
        kills += 1
    assert_same_run(tmp_path / "x", whole)


@pytest.mark.parametrize("moment", ["half the model", "half the trainer", "not renamed", "old one half gone",
                                    "half a line"])
def test_a_run_killed_within_a_save_ends_with_the_same_bits(toy, whole, tmp_path, moment):
    def die(path=None):
        if path:
            os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def before():
        save, append, rmtree, rename, step = torch.save, grpo.append, shutil.rmtree, Path.rename, [0]

        def torch_save(state, path):
            step[0] = state["done"]["step"]
            if step[0] == 4 and moment == "half the model":
                die(Path(path).parent / "model.safetensors")
            save(state, path)
            if step[0] == 4 and moment == "half the trainer":
                die(Path(path))

        def half_gone(path, *args, **kwargs):
            at_4 = Path(path).name == "checkpoint-2" and saved(tmp_path)[-1] == 4
            if moment == "old one half gone" and at_4:
                (Path(path) / "trainer.pt").unlink()
                die()
            rmtree(path, *args, **kwargs)

        def half_a_line(path, rows):
            append(path, rows)
            if rows[0]["step"] == 4 and moment == "half a line":
                os.truncate(path, path.stat().st_size - 20)
                die()

        def not_renamed(path, to):
            return die() if step[0] == 4 and moment == "not renamed" else rename(path, to)
        torch.save, shutil.rmtree, grpo.append, Path.rename = torch_save, half_gone, half_a_line, not_renamed

    assert exit_code(fork(long_flags(toy, tmp_path), before=before)) == -signal.SIGKILL
    assert saved(tmp_path)[-1] == (4 if moment == "old one half gone" else 3)
    main([*long_flags(toy, tmp_path), "--resume"])
    assert_same_run(tmp_path, whole)
    assert saved(tmp_path) == [5, 6]


@pytest.mark.parametrize("harm", [
    lambda folder: os.truncate(folder / "trainer.pt", 5000), lambda folder: (folder / "trainer.pt").unlink(),
    lambda folder: (folder / "trainer.pt").write_bytes(b"x"),
    lambda folder: torch.save([1], folder / "trainer.pt"),
    lambda folder: torch.save(Bomb(folder / "ran"), folder / "trainer.pt")],
    ids=["cut", "missing", "no archive", "of another program", "code"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(toy, whole, tmp_path, capfd, harm):
    shutil.copytree(whole, tmp_path / "x")
    harm(tmp_path / "x/checkpoint-6")
    main([*long_flags(toy, tmp_path / "x"), "--resume"])
    err = capfd.readouterr().err
    assert "checkpoint-6" in err.splitlines()[0] and err.count("is damaged") == 1
    assert "step 6/6" in err and "step 5/6" not in err
    assert_same_run(tmp_path / "x", whole)
    assert not list(tmp_path.glob("x/*/ran"))
    for step in (5, 6):
        harm(tmp_path / f"x/checkpoint-{step}")
    assert "no checkpoint in" in refusal([*long_flags(toy, tmp_path / "x"), "--resume"], capfd, alone=False)


def test_a_folder_of_another_run_is_refused_and_nothing_in_it_is_lost(
        toy, whole, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(grpo, "load_lm", lambda *args: pytest.fail("a model was loaded"))
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    assert "--resume" in refusal(long_flags(toy, whole), capfd)
    line = refusal([*long_flags(toy, whole, "--lr 0.5 --group_size 6 --weights correct=2"), "--resume"],
                   capfd)
    assert "--lr" in line and "--group_size" in line and "--weights" in line and "--beta" not in line
    with monkeypatch.context() as patch:                            # the same names, other rows
        load = rewards.load_rows
        patch.setattr(rewards, "load_rows", lambda *args: load(*args)[::-1])
        assert "data" in refusal([*long_flags(toy, whole), "--resume"], capfd)
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == before


def test_a_run_goes_on_for_more_steps_where_nothing_depends_on_their_number(toy, tmp_path, capfd):
    for out, more in (("whole", "--steps 4"), ("first", "--steps 2"), ("first", "--steps 4 --resume")):
        main(flags(toy, tmp_path / out, "--save_every 2", more))
    assert_same_run(tmp_path / "first", tmp_path / "whole")
    for i, depends in enumerate(("--lr_schedule linear", "--temperature_end 0.5")):
        main(flags(toy, tmp_path / str(i), "--save_every 2", depends))
        assert "--steps" in refusal(flags(toy, tmp_path / str(i), depends, "--steps 4 --resume"), capfd)


def test_flags_that_change_nothing_learned_may_change_and_one_that_was_not_there_yet_counts_as_its_default(
        toy, whole, tmp_path, capfd):
    shutil.copytree(whole, tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved/checkpoint-6")
    args = json.loads((whole / "args.json").read_text())
    assert args["scale"] == "group" and args["group_size"] == 4
    del args["scale"], args["clip_high"]  # as of a run before these flags were there
    trainer = tmp_path / "moved/checkpoint-5/trainer.pt"
    torch.save(torch.load(trainer) | {"args": args}, trainer)
    argv = [*long_flags(toy, tmp_path / "moved",
                        "--micro_batch_size 16 --sample_batch_size 4 --save_every 0 --resume",
                        "--activation_checkpointing")]
    line = refusal([*argv, "--scale", "none"], capfd)
    assert "--scale" in line and "--clip_high" not in line
    main(argv)
    assert far(tmp_path / "moved", whole) < 1e-5 and len(metrics(tmp_path / "moved")) == len(metrics(whole))


def test_logs_that_are_cut_or_damaged_do_not_stop_a_resume(toy, whole, tmp_path):
    for name, harm in (("cut", lambda path: os.truncate(path, 100)), ("gone", Path.unlink),
                       ("damaged", lambda path: path.write_bytes(b"\xff\x00" * 3000))):
        shutil.copytree(whole, tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoint-6")
        harm(tmp_path / name / "metrics.jsonl")
        harm(tmp_path / name / "args.json")                         # the flags stand in the checkpoint too
        main([*long_flags(toy, tmp_path / name), "--resume"])
        assert far(tmp_path / name, whole) == 0
        last = (tmp_path / name / "metrics.jsonl").read_bytes().splitlines()[-2:]
        assert [json.loads(line)["step"] for line in last] == [6, 6]    # none is glued to a torn one


def wait_for(path):
    while not path.exists():
        time.sleep(0.02)


def test_of_two_runs_in_one_folder_the_second_is_refused_and_the_first_loses_nothing(
        toy, whole, tmp_path, capfd):
    both = [fork(long_flags(toy, tmp_path / "new")) for _ in range(2)]
    assert sorted(exit_code(pid) for pid in both) == [0, 2]
    assert_same_run(tmp_path / "new", whole)
    shutil.copytree(whole, tmp_path / "old")                        # an old run that has something left to do
    shutil.rmtree(tmp_path / "old/checkpoint-6")
    argv = [*long_flags(toy, tmp_path / "old"), "--resume"]

    def slow():
        real = grpo.roll_out

        def roll_out(*args, **kwargs):
            (tmp_path / "holds").touch()
            time.sleep(1)
            return real(*args, **kwargs)
        grpo.roll_out = roll_out

    first = fork(argv, before=slow)
    wait_for(tmp_path / "holds")
    assert "in use by another run" in refusal(argv, capfd) and "in use" in refusal(argv[:-1], capfd)
    assert exit_code(first) == 0
    assert_same_run(tmp_path / "old", whole)


@pytest.mark.parametrize("number, name, call", [
    (signal.SIGTERM, "pick", 1), (signal.SIGINT, "pick", 50), (signal.SIGTERM, "policy_loss", 8),
    (signal.SIGINT, "means", 4), (signal.SIGTERM, "save_checkpoint", 2)],
    ids=["first evaluation", "sampling", "update", "evaluation", "save"])
def test_a_stopped_run_saves_and_says_how_to_go_on_and_ends_with_the_same_bits(
        toy, whole, tmp_path, capfd, number, name, call):
    """An evaluation that a signal cut short is made again."""
    pid = fork(long_flags(toy, tmp_path, "--save_every", 1 if name == "save_checkpoint" else 0),
               before=signal_at(name, call, number))
    assert exit_code(pid) == 128 + number
    last = capfd.readouterr().err.splitlines()[-1]
    done = max(saved(tmp_path), default=0)
    assert f"after step {done} of 6" in last and "--resume" in last and done < 6
    main([*long_flags(toy, tmp_path), "--resume"])
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("epochs, call, after, done", [(1, 4, 0, 1), (2, 2, 0, 0), (2, 4, 2, 1)],
                         ids=["between micro-batches", "in the first epoch", "in the second epoch"])
def test_a_stop_in_an_update_leaves_the_step_undone_unless_weights_have_moved(
        toy, tmp_path, monkeypatch, capfd, epochs, call, after, done):
    """Three micro-batches a pass. A step that has made its first update is finished, whole."""
    argv = lambda out: flags(toy, tmp_path / out, "--steps 3 --beta 0.02 --micro_batch_size 6 --inner_epochs",
                             f"{epochs} --lr 1e-2 --group_size 6 --prompts_per_step 3 --save_every 0")
    main(argv("whole"))
    real, calls = grpo.policy_loss, []

    def policy_loss(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(grpo, "policy_loss", policy_loss)
        main(argv("cut"))
    assert stop.value.code == 143 and len(calls) == call + after
    assert saved(tmp_path / "cut") == [done] * (done > 0)
    assert f"after step {done} of 3" in capfd.readouterr().err.splitlines()[-1]
    main([*argv("cut"), "--resume"])
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_second_ctrl_c_leaves_at_once(toy, tmp_path, capfd):
    def slow():
        grpo.pick = lambda *args: ((tmp_path / "asleep").touch(), time.sleep(60))

    pid = fork(flags(toy, tmp_path / "x"), before=slow)
    wait_for(tmp_path / "asleep")
    os.kill(pid, signal.SIGINT)
    err = ""
    while "Ctrl-C again leaves at once" not in err:
        time.sleep(0.02)
        err += capfd.readouterr().err
    os.kill(pid, signal.SIGINT)
    assert exit_code(pid) == -signal.SIGINT and not saved(tmp_path / "x")


@pytest.mark.parametrize("number, name, code", [
    (signal.SIGTERM, "parse_args", -signal.SIGTERM), (signal.SIGTERM, "load_lm", 143),
    (signal.SIGINT, "load_lm", 130)])
def test_a_signal_before_the_first_step_ends_the_process_and_leaves_nothing_half_written(
        toy, tmp_path, number, name, code):
    assert exit_code(fork(flags(toy, tmp_path), before=signal_at(name, 1, number))) == code
    assert not list(tmp_path.glob("*config.json")) and not saved(tmp_path)
    assert len(run(toy, tmp_path)) == 2                             # the same command simply starts


@pytest.mark.parametrize("how", ["gradient", "loss"])
def test_gradients_and_losses_that_are_not_finite_are_skipped_said_and_never_written_as_nan(
        toy, tmp_path, monkeypatch, capfd, how):
    real, steps, checkpoints = grpo.policy_loss, [], []

    def policy_loss(*args, **kwargs):
        steps.append(1)
        loss, parts = real(*args, **kwargs)
        if len(steps) not in (2, 3):
            return loss, parts
        if how == "gradient":
            return loss * math.nan, parts
        return loss, parts | {"loss": parts["loss"] * math.nan}

    save = grpo.save_checkpoint
    monkeypatch.setattr(grpo, "save_checkpoint", lambda *args: (
        checkpoints.append({name: x.clone() for name, (_, x) in args[2].items()}), save(*args)))
    monkeypatch.setattr(grpo, "policy_loss", policy_loss)
    lines = run(toy, tmp_path, "--steps 4 --save_every 1 --micro_batch_size 16")
    assert [far(a, b) > 0 for a, b in zip(checkpoints, checkpoints[1:])] == [False, False, True]
    assert all(x.isfinite().all() for x in checkpoints[-1].values())
    none = [m["grad_norm" if how == "gradient" else "loss"] is None for m in lines]
    assert none == [False, True, True, False]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert {row["step"] for row in toys.read(tmp_path / "samples.jsonl")} == {1, 2, 3}
    assert capfd.readouterr().err.count("not finite") == 2


def test_a_full_disk_stops_with_one_line_and_the_run_goes_on_when_there_is_room(
        toy, whole, tmp_path, monkeypatch, capfd):
    real = torch.save

    def full(state, path):
        Path(path).write_bytes(b"half")
        if state["done"]["step"] == 3:
            raise OSError(28, "No space left on device")
        real(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        last = refusal(long_flags(toy, tmp_path), capfd, alone=False)
    assert "No space left" in last and "checkpoint-3" in last and "--resume" in last
    assert saved(tmp_path) == [1, 2] and not list(tmp_path.glob("tmp-*"))
    main([*long_flags(toy, tmp_path), "--resume"])
    assert_same_run(tmp_path, whole)


def test_too_little_gpu_memory_gets_one_line_that_names_the_flags_that_help(
        toy, tmp_path, monkeypatch, capfd):
    def none(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(grpo, "policy_loss", none)
    line = refusal(flags(toy, tmp_path), capfd, alone=False)
    assert all(flag in line for flag in ("--micro_batch_size", "--sample_batch_size", "--resume"))


# -------------------------------------------------------------------------------------- several processes
@pytest.mark.parametrize("world, more", [(2, ""), (4, ""), (2, "--fsdp"),
                                         (2, "--lora_rank 4 --load_in_4bit")])
def test_several_processes_do_what_one_does(toy, tmp_path, world, more):
    argv = lambda out, *more: long_flags(toy, tmp_path / out, "--steps 3 --prompts_per_step 4", *more)
    main(argv("one", more.replace("--fsdp", "")))
    assert together(world, argv("many", more)) == [0] * world
    assert far(tmp_path / "one", tmp_path / "many") < 1e-5
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "many"), strict=True):
        assert a == {key: pytest.approx(value, rel=1e-3, abs=1e-5) for key, value in b.items()}
    assert toys.read(tmp_path / "one/samples.jsonl") == [{**row, "advantage": pytest.approx(row["advantage"])}
        for row in toys.read(tmp_path / "many/samples.jsonl")]


@pytest.mark.parametrize("worlds, more, then, name", [((2, 1), "", "", "pick"),
                                                      ((1, 2), "", "--fsdp", "advantages"),
                                                      ((2, 1), "--fsdp", "", "policy_loss")])
def test_all_processes_stop_whichever_gets_the_signal_and_another_number_of_them_goes_on(
        toy, whole, tmp_path, capfd, worlds, more, then, name):
    """SIGTERM comes twice, from a cluster and from torchrun."""
    argv = long_flags(toy, tmp_path, "--save_every 0")
    before = signal_at(name, 30 if name == "pick" else 3, signal.SIGTERM, [worlds[0] - 1], times=2)
    assert together(worlds[0], [*argv, *more.split()], before) == [128 + signal.SIGTERM] * worlds[0]
    err, (done,) = capfd.readouterr().err, saved(tmp_path)
    assert f"after step {done} of 6" in err and "Traceback" not in err
    assert together(worlds[1], [*argv, *then.split(), "--resume"]) == [0] * worlds[1]
    assert far(tmp_path, whole) < 1e-5
    assert [m["step"] for m in metrics(tmp_path)] == [m["step"] for m in metrics(whole)]


def test_torchrun_restarts_a_run_that_lost_a_process_where_it_was(toy, whole, tmp_path):
    """The launcher behind torchrun, whose processes fork here and so need not import torch."""
    def work():
        toys.as_process(int(os.environ["RANK"]), 2)
        real = grpo.policy_loss

        def fall(*args, **kwargs):
            first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
            if grpo.RANK == 1 and first and (tmp_path / "checkpoint-2").exists():
                os._exit(1)
            return real(*args, **kwargs)
        grpo.policy_loss = fall
        grpo.main([*long_flags(toy, tmp_path), "--resume"])

    def launch(_):
        config = LaunchConfig(1, 1, 2, run_id="one", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                              max_restarts=1, start_method="fork", monitor_interval=0.05)
        elastic_launch(config, work)()
    assert exit_code(toys.fork(launch, [])) == 0
    assert far(tmp_path, whole) < 1e-5
    assert [m["step"] for m in metrics(tmp_path)] == [m["step"] for m in metrics(whole)]


# ------------------------------------------------------------------------------------------- bad input
WRONG = """\
--group_size 1                              > --group_size | at least 2
--prompts_per_step 0                        > --prompts_per_step | at least 1
--temperature 0                             > --temperature
--temperature nan                           > --temperature
--loss ppo                                  > --loss | dr_grpo
--clip_low -0.1                             > --clip_low
--beta -1                                   > --beta
--steps 0                                   > --steps
--micro_batch_size all                      > --micro_batch_size
--lr fast                                   > --lr
--optim sgd                                 > --optim
--lora_rank -4                              > --lora_rank
--load_in_4bit                              > --load_in_4bit | --lora_rank
--fsdp                                      > --fsdp | torchrun
--seed -1                                   > --seed
--log_to paper                              > --log_to
--weights beauty=1                          > --weights | correct
--weights correct=much                      > --weights
--length_penalty 5                          > --length_penalty
--no_such_flag                              > --no_such_flag
--pass_rate 0.9 0.1                         > --pass_rate
--pass_rate 0.1 0.9                         > pass_rate
@/nowhere/flags.txt                         > /nowhere/flags.txt
@BAD/quote.txt                              > No closing quotation
--model /nowhere/model                      > /nowhere/model
--model BAD/empty                           > BAD/empty
--model BAD/untemplated                     > chat template
--model BAD/strict                          > chat template | no system turn, please
--model BAD/tagless                         > BAD/tagless | tags
--model BAD/linear                          > BAD/linear | linear attention
--model BAD/quantised                       > BAD/quantised | --lora_rank
--model BAD/few                             > BAD/few | its embeddings end at 39
--model BAD/short                           > BAD/short | its context of 24
--model BAD/orphan                          > BAD/orphan | names no base model
--model BAD/moved                           > BAD/moved | /nowhere/base
--data chess                                > chess
--data countdown=/nowhere/rows.jsonl        > /nowhere/rows.jsonl
--data countdown=BAD/broken.jsonl           > broken.jsonl | line 2
--data countdown=BAD/columns.jsonl          > columns.jsonl | line 2 | nums
--data countdown=BAD/nothing.jsonl          > nothing.jsonl
--eval_data countdown=BAD/word.jsonl        > word.jsonl | line 1 | nums
--data gsm8k:0                              > gsm8k:0
--eval_data gsm8k=/nowhere/held             > /nowhere/held
--output_dir BAD/file                       > BAD/file
--output_dir BAD/file/below                 > BAD/file
"""                                                                 # flags > what the one line must name


@pytest.fixture(scope="module")
def bad(toy, tmp_path_factory):
    """A folder full of things that are wrong."""
    folder, row = tmp_path_factory.mktemp("bad"), json.dumps(toys.COUNTDOWN[0]) + "\n"
    for name, text in {"file": "", "nothing.jsonl": "", "broken.jsonl": row + '{"nums": [1,\n',
                       "columns.jsonl": row + '{"target": 3}\n',
                       "word.jsonl": '{"nums": "3 4", "target": 7}\n', "quote.txt": "--model 'a\n"}.items():
        (folder / name).write_text(text)
    (folder / "empty").mkdir()
    for name, template in (("untemplated", None),
                           ("strict", "{{ raise_exception('no system turn, please') }}")):
        toys.model().save_pretrained(folder / name)
        toys.tokenizer(template).save_pretrained(folder / name)
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    for name, changes in {"quantised": {"quantization_config": nf4}, "few": {"vocab_size": 40},
                          "short": {"max_position_embeddings": 24}, "linear": {}, "tagless": {}}.items():
        toys.tokenizer().save_pretrained(folder / name)
        config = toys.model().config.to_dict() if name != "linear" else Mamba2Config().to_dict()
        (folder / name / "config.json").write_text(json.dumps(config | changes))
    text = (folder / "tagless/tokenizer.json").read_text()
    (folder / "tagless/tokenizer.json").write_text(text.replace("<answer>", "<>").replace('"w"', '"W W"'))
    for name, base in (("orphan", {}), ("moved", {"base_model_name_or_path": "/nowhere/base"})):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps(base))
    return folder


@pytest.mark.parametrize("more, says", [row.split("> ") for row in WRONG.splitlines()],
                         ids=lambda x: x.strip())
def test_wrong_flags_and_bad_rows_get_one_line_before_a_model_loads(
        toy, bad, tmp_path, monkeypatch, capfd, more, says):
    monkeypatch.setattr(grpo, "load_lm", lambda *args: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    line = refusal(flags(toy, tmp_path / "x", more.replace("BAD", str(bad))), capfd)
    assert all(word.strip().replace("BAD", str(bad)) in line for word in says.split("|")), line


def test_model_files_that_are_damaged_incomplete_or_missing_get_one_line(toy, tmp_path, capfd):
    from safetensors.torch import save_file
    kept = weights(toy / "model")
    kept.pop("model.layers.1.mlp.up_proj.weight")
    for name, change, says in (("cut", lambda path: os.truncate(path, 3000), "cut"),
                               ("missing", Path.unlink, "missing"),
                               ("lacks", lambda path: save_file(kept, path, {"format": "pt"}), "up_proj")):
        shutil.copytree(toy / "model", tmp_path / name)
        change(tmp_path / name / "model.safetensors")
        last = refusal(flags(toy, tmp_path / "out", f"--model {tmp_path}/{name}"), capfd, alone=False)
        assert last.startswith("grpo.py: --model") and says in last


@pytest.mark.parametrize("module, more", [("tensorboard", "--log_to wandb"), ("peft", "--lora_rank 4"),
                                          ("bitsandbytes", "--optim adamw8bit")])
def test_a_package_that_is_asked_for_and_not_there_gets_one_line(
        toy, tmp_path, monkeypatch, capfd, module, more):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)  # another test may load it
    assert module in refusal(flags(toy, tmp_path, more), capfd)


if __name__ == "__main__":                                          # python tests/test_grpo.py --write
    with tempfile.TemporaryDirectory() as directory:
        trainer_of_trl = trl_trainer(directory)
        numbers = {name_of(*c): theirs(trainer_of_trl, *c) for c in COMBINATIONS}
    rounded = json.loads(json.dumps(numbers), parse_float=lambda x: round(float(x), 9))
    rows_of_json = (f"{json.dumps(key)}: {json.dumps(x)}" for key, x in rounded.items())
    GOLDEN.write_text("{\n" + ",\n".join(rows_of_json) + "\n}\n")
