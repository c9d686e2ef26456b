"""Advantages, losses and gradients equal those of TRL, an independent implementation of the same papers.

TRL's own code runs from the rewards on (`_generate_and_score_completions`: masks, token counts, advantages; then
`_compute_loss`), on ids, rewards and log-probabilities that are fixed here. Its numbers stand in grpo_reference.json, so that
the equality is tested without TRL too; `python tests/test_grpo_reference.py --write` makes that file anew.
"""
import itertools
import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":                                      # pytest has conftest.py for this
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grpo
import models
import toys

FILE = Path(__file__).with_name("grpo_reference.json")
LOSSES, SCALES, BETAS = ("grpo", "dr_grpo", "dapo", "cispo", "gspo"), ("group", "batch", "none"), (0.0, 0.04)
CLIPS, MASKED = ((0.2, 0.2), (0.2, 0.28)), (False, True)
COMBINATIONS = list(itertools.product(LOSSES, SCALES, BETAS, CLIPS, MASKED))
GROUP, LIMIT = 3, 6
# three groups of three, the second without spread; means are exact in binary, so that rounding decides nothing
REWARDS = [1.0, 0.25, 1.0, 0.5, 0.5, 0.5, 0.0, 1.0, 0.5]
LENGTHS = [6, 3, 2, 6, 1, 4, 5, 6, 3]
ENDED = [False, True, True, True, True, True, True, False, True]  # row 3 ends with the last token it may have


def inputs():
    """Fixed ids and log-probabilities [9, 6], in float64: the ratios lie on both sides of every clip."""
    rng = torch.Generator().manual_seed(0)
    ids = [torch.randint(10, toys.VOCAB, (n,), generator=rng).tolist()[:n - end] + [0] * end for n, end in zip(LENGTHS, ENDED)]
    prompts = [torch.randint(10, toys.VOCAB, (4,), generator=rng).tolist() for _ in range(3)]
    prompts = [prompts[i // GROUP] for i in range(9)]
    old = -3 * torch.rand(9, LIMIT, generator=rng, dtype=torch.float64) - 0.1
    logp = old + 0.3 * torch.randn(9, LIMIT, generator=rng, dtype=torch.float64)
    ref = old + 0.5 * torch.randn(9, LIMIT, generator=rng, dtype=torch.float64)
    return prompts, ids, logp, old, ref


def name(loss, scale, beta, clip, masked):
    return f"{loss} {scale} beta={beta} clip={clip[0]}-{clip[1]} masked={masked}"


def token_mask(masked):
    """[9, 6], 1 on tokens that are trained."""
    return torch.tensor([[float(t < n and (end or not masked)) for t in range(LIMIT)] for n, end in zip(LENGTHS, ENDED)])


# ------------------------------------------------------------------------------------------- theirs
def reward(prompts, completions, row, **kwargs):
    return [REWARDS[i] for i in row]


def trainer(folder):
    """A GRPOTrainer on the toy model. TRL takes its settings once; here they change between calls."""
    import datasets
    from trl import GRPOConfig, GRPOTrainer
    toys.save(folder)
    config = GRPOConfig(output_dir=str(Path(folder) / "out"), per_device_train_batch_size=9, num_generations=GROUP, report_to="none",
                        max_completion_length=LIMIT, use_bias_correction_kl=False, beta=0.04, temperature=1.3, use_cpu=True, bf16=False,
                        disable_tqdm=True)
    rows = datasets.Dataset.from_list([{"prompt": str(i), "row": i} for i in range(9)])
    t = GRPOTrainer(model=str(Path(folder) / "model"), args=config, reward_funcs=reward, train_dataset=rows)
    t.current_gradient_accumulation_steps = 1                   # the training loop sets it
    t.model.train()
    return t


def settings(t, loss, scale, beta, clip, masked):
    t.loss_type, t.importance_sampling_level = ("grpo", "sequence") if loss == "gspo" else (loss, "token")
    t.scale_rewards, t.beta, t.mask_truncated_completions = scale, beta, masked
    t.epsilon_low, t.epsilon_high = clip[0], 1 + clip[1] if loss == "cispo" else clip[1]  # cispo: theirs is the cap itself


def scored(t):
    """TRL's batch: ids, masks, token count and advantages, from fixed completions and rewards."""
    prompts, ids, *_ = inputs()
    t._generate = lambda _: (prompts, ids, None, [str(x) for x in ids], None, {}, None, [])
    return t._generate_and_score_completions([{"prompt": str(i), "row": i} for i in range(9)])


def theirs(t, *combination):
    settings(t, *combination)
    _, _, logp, old, ref = inputs()
    logp.requires_grad_()
    t._get_per_token_logps_and_entropies = lambda *a, **k: (logp, torch.zeros_like(logp), None)
    batch = scored(t) | {"old_per_token_logps": old, "ref_per_token_logps": ref}
    loss = t._compute_loss(t.model, batch)
    loss.backward()
    del t._get_per_token_logps_and_entropies
    return {"advantages": batch["advantages"].tolist(), "loss": loss.item(), "gradient": logp.grad.tolist()}


# ------------------------------------------------------------------------------------------- ours
def ours(loss, scale, beta, clip, masked, parts=False):
    _, _, logp, old, ref = inputs()
    logp.requires_grad_()
    adv, mask = grpo.advantages(torch.tensor(REWARDS), GROUP, scale), token_mask(masked)
    total, said = grpo.policy_loss(logp, old, ref if beta else None, adv, mask, loss=loss, clip_low=clip[0], clip_high=clip[1], beta=beta,
                                   num_tokens=float(mask.sum()), num_seqs=9, max_new_tokens=LIMIT)
    total.backward()
    found = {"advantages": adv.tolist(), "loss": total.item(), "gradient": logp.grad.tolist()}
    return (found, said) if parts else found


def assert_equal(found, wanted):
    for key in ("advantages", "loss", "gradient"):
        torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(wanted[key]), rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def golden():
    return json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    pytest.importorskip("trl")
    return trainer(tmp_path_factory.mktemp("trl"))


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_gradient_and_advantages_equal_the_golden_numbers_of_trl(golden, loss):
    assert set(golden) == {name(*c) for c in COMBINATIONS}
    for combination in (c for c in COMBINATIONS if c[0] == loss):
        assert_equal(ours(*combination), golden[name(*combination)])


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_gradient_and_advantages_equal_trl(live, loss):
    for combination in (c for c in COMBINATIONS if c[0] == loss):
        assert_equal(ours(*combination), theirs(live, *combination))


def test_the_inputs_tell_all_variants_apart(golden):
    """Equality over inputs on which two variants agree would show nothing: masked rows, clips, KL and scale all matter here."""
    _, _, logp, old, _ = inputs()
    ratio, trained = (logp - old).exp(), token_mask(False).bool()
    up, down = (torch.tensor(golden[name("dapo", "group", 0.0, (0.2, 0.2), False)]["advantages"])[:, None] * s > 0 for s in (1, -1))
    for case in ((ratio > 1.28) & up, (ratio > 1.2) & (ratio < 1.28) & up, (ratio < 0.8) & down, (ratio > 1.28) & down, (ratio < 0.8) & up):
        assert (case & trained).any()
    said = {(loss, *rest): golden[name(loss, *rest)]["gradient"] for loss, *rest in COMBINATIONS}
    distinct = {json.dumps(gradient) for gradient in said.values()}
    assert len(distinct) >= 0.8 * len(COMBINATIONS)             # a clip that no sequence's ratio meets, and its like


def test_clip_shares_and_kl_are_those_of_trl(live):
    for combination in (c for c in COMBINATIONS if c[0] in ("grpo", "dr_grpo", "dapo") and c[1] == "group" and c[2]):
        live._metrics["train"].clear()
        theirs(live, *combination)
        found, said = ours(*combination, parts=True)
        for mine, its in (("clip_low", "clip_ratio/low_mean"), ("clip_high", "clip_ratio/high_mean"), ("kl", "kl")):
            assert float(said[mine]) == pytest.approx(live._metrics["train"][its][-1], abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_of_the_weights_equals_trl(live, loss):
    """The whole path: ids -> log-probabilities at the temperature -> loss -> gradient of every weight, in fp32."""
    combination = loss, "group", 0.04, (0.2, 0.28), True
    settings(live, *combination)
    prompts, ids, _, _, _ = inputs()
    batch = scored(live)
    rng = torch.Generator().manual_seed(1)
    mask = batch["completion_mask"].float()
    with torch.no_grad():
        now = live._get_per_token_logps_and_entropies(live.model, torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
                                                      torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1), LIMIT)[0]
    old, ref = (now + s * torch.randn(now.shape, generator=rng) * mask for s in (0.3, 0.5))
    live.model.zero_grad()
    wanted = live._compute_loss(live.model, batch | {"old_per_token_logps": old, "ref_per_token_logps": ref})
    wanted.backward()
    gradient = {key: p.grad.clone() for key, p in live.model.named_parameters()}
    live.model.zero_grad()

    whole = torch.nn.utils.rnn.pad_sequence([torch.tensor(p + c) for p, c in zip(prompts, ids)], batch_first=True)
    logp, _ = models.completion_logps(live.model, whole, torch.tensor([len(p) for p in prompts]), token_mask(True), 1.3)
    found, _ = grpo.policy_loss(logp, old, ref, grpo.advantages(torch.tensor(REWARDS), GROUP), token_mask(True), loss=loss, clip_low=0.2,
                                clip_high=0.28, beta=0.04, num_tokens=float(mask.sum()), num_seqs=9, max_new_tokens=LIMIT)
    found.backward()
    assert found.item() == pytest.approx(wanted.item(), abs=1e-6)
    largest = max(g.abs().max() for g in gradient.values())
    assert largest > 1e-3                                       # else an absolute bound says nothing
    for key, p in live.model.named_parameters():
        torch.testing.assert_close(p.grad, gradient[key], rtol=0, atol=1e-6)
    live.model.zero_grad()


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("usage: python tests/test_grpo_reference.py --write")
    with tempfile.TemporaryDirectory() as folder:
        reference = trainer(folder)
        numbers = {name(*c): theirs(reference, *c) for c in COMBINATIONS}
    rounded = json.loads(json.dumps(numbers), parse_float=lambda x: round(float(x), 9))
    FILE.write_text("{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in rounded.items()) + "\n}\n")
    print(f"{len(numbers)} combinations -> {FILE}")
