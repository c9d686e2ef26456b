"""models.py: fp32 masters in bf16 and 16 more bits are exact, optimisers go on to the bit, refresh and the head do as they say."""
import io
import math
from types import SimpleNamespace

import pytest
import torch

import models
import toys


def args(**changes):
    return SimpleNamespace(**dict(optim="adamw", lr=1e-3, muon_lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, max_grad_norm=1.0,
                                  fsdp=False, activation_checkpointing=False, lora_rank=0, lora_alpha=8, load_in_4bit=False, seed=0,
                                  trust_remote_code=False) | changes)


# ---------------------------------------------------------------- 32 bits in two halves
def test_any_32_bits_come_back_from_their_halves():
    torch.manual_seed(0)
    edges = [0, 1, -1, 2 ** 31 - 1, -2 ** 31, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x00800000, 0x3F808000, 0x3F807FFF, 0x3F818000]
    bits = torch.cat([torch.tensor(edges), torch.randint(-2 ** 31, 2 ** 31, (10 ** 6,))]).int()
    high, low = models.parted(bits.view(torch.float32))
    assert high.dtype == torch.bfloat16 and low.dtype == torch.int16
    assert torch.equal(models.joined(high, low).view(torch.int32), bits)


@pytest.mark.parametrize("scale", [1, 0.02, 1e-30, 1e-42, 1e30, -1e37])
def test_the_first_half_is_the_nearest_bf16(scale):
    torch.manual_seed(0)
    x = (torch.randn(10 ** 5, dtype=torch.float64) * scale).float()
    high, low = models.parted(x)
    assert torch.equal(models.joined(high, low), x)
    short, best = high.double(), x.bfloat16().double()          # where x lies in the middle, two are nearest
    assert short.isfinite().all() and ((short - x).abs() == (best - x).abs()).all() and (short == best).double().mean() > 0.99
    exact = x.bfloat16().float()
    assert torch.equal(models.parted(exact)[0].float(), exact) and not models.parted(exact)[1].any()


# ---------------------------------------------------------------- the optimiser
def feed(model, step):
    """Gradients of step `step` in two micro-batches, through backward; -> their fp32 sum by name."""
    sums = {}
    for half in range(2):
        torch.manual_seed(1000 * step + half)
        for name, p in model.named_parameters():
            g = torch.randn_like(p) * 0.05
            (p * g).sum().backward()
            sums[name] = sums.get(name, 0) + g.float()
    return sums


def reference(model, args):
    """fp32 copies of the weights and what updates them, by the libraries' own means."""
    copies = {name: torch.nn.Parameter(p.detach().float()) for name, p in model.named_parameters()}
    matrices = [p for name, p in copies.items() if args.optim == "muon" and p.ndim == 2 and ".layers." in name]
    rest = [p for p in copies.values() if not any(p is m for m in matrices)]
    adam = dict(lr=args.lr, betas=args.betas, weight_decay=args.weight_decay)
    if args.optim == "adamw8bit":
        import bitsandbytes
        return copies, [bitsandbytes.optim.AdamW8bit(rest, **adam)]
    muon = [torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=args.weight_decay)] if matrices else []
    return copies, [torch.optim.AdamW(rest, fused=True, **adam), *muon]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("optim", ["adamw", "adamw8bit", "muon"])
def test_masters_are_to_the_bit_those_of_the_optimiser_on_an_fp32_copy(optim, dtype):
    model, a = toys.model().to(dtype), args(optim=optim)
    optimizer, (copies, theirs) = models.Optimizer(model, a), reference(model, a)
    for step in range(1, 6):
        sums, factor = feed(model, step), 1 / step
        norm = optimizer.step(factor)
        for name, p in copies.items():
            p.grad = sums[name]
        assert norm == torch.nn.utils.clip_grad_norm_(copies.values(), a.max_grad_norm) > a.max_grad_norm
        for other in theirs:
            for group in other.param_groups:
                group["lr"] = other.defaults["lr"] * factor
            other.step()
        ours = optimizer.weights()
        assert ours.keys() == copies.keys() and all(torch.equal(ours[name], copies[name]) for name in copies), step
        assert all(p.dtype == dtype and torch.equal(p, models.parted(ours[name])[0]) or p.dtype == torch.float32
                   for name, p in model.named_parameters())
    assert all(master.numel() == 0 for p, master in optimizer.master.items() if p in optimizer.low)     # no fp32 copy stays


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("optim", ["adamw", "adamw8bit", "muon"])
def test_a_loaded_state_goes_on_to_the_bit(optim, dtype):
    model, file = toys.model().to(dtype), io.BytesIO()
    optimizer = models.Optimizer(model, args(optim=optim))
    for step in range(1, 6):
        feed(model, step)
        optimizer.step(1.0)
        if step == 2:
            torch.save(optimizer.state(), file)
    file.seek(0)
    other = toys.model(seed=1).to(dtype)
    again = models.Optimizer(other, args(optim=optim))
    again.load_state(torch.load(file, weights_only=True))
    for step in range(3, 6):
        feed(other, step)
        again.step(1.0)
    a, b = optimizer.weights(), again.weights()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_update_that_is_skipped_or_not_finite_changes_nothing_and_drops_its_gradient(dtype):
    model = toys.model().to(dtype)
    optimizer = models.Optimizer(model, args())
    feed(model, 1)
    optimizer.step(1.0)
    before, moments = optimizer.weights(), optimizer.state()["moments"]
    feed(model, 2)
    assert math.isfinite(optimizer.step(1.0, skip=True)) and not optimizer.grads()
    feed(model, 2)
    (model.model.norm.weight * math.inf).sum().backward()
    assert not math.isfinite(optimizer.step(1.0)) and not optimizer.grads()
    after = optimizer.state()
    assert all(torch.equal(before[name], after["weights"][name]) for name in before)
    assert all(torch.equal(moments[name][k], after["moments"][name][k]) for name in moments for k in moments[name])


def test_a_state_of_another_model_gets_one_line(capsys):
    state = models.Optimizer(toys.model(), args()).state()
    with pytest.raises(SystemExit) as stop:
        models.Optimizer(toys.model(hidden=32), args()).load_state(state)
    assert stop.value.code == 2 and "of another model" in capsys.readouterr().err


# ---------------------------------------------------------------- the head
@pytest.mark.parametrize("chunk", [2 ** 26, 3 * toys.VOCAB])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_hits_are_where_the_likeliest_token_stands_whatever_the_chunks(chunk, temperature):
    lm = toys.model()
    torch.manual_seed(0)
    ids, lengths = torch.randint(0, toys.VOCAB, (5, 20)), torch.tensor([3, 8, 1, 19, 20])
    with torch.no_grad():                                       # every other token becomes the likeliest one
        for t in range(2, 20, 2):
            ids[:, t] = lm(ids).logits[:, t - 1].argmax(-1)
        best = lm(ids).logits.argmax(-1)
    mask = torch.zeros(5, 12)
    for i, n in enumerate([12, 12, 9, 1, 0]):
        mask[i, :n] = 1
    logp, hit = models.completion_logps(lm, ids, lengths, mask, temperature, extra="hit", chunk=chunk)
    for i, start in enumerate(lengths.tolist()):
        n = int(mask[i].sum())
        assert hit[i, :n].tolist() == [float(best[i, start + t - 1] == ids[i, start + t]) for t in range(n)]
        assert not hit[i, n:].any() and not logp[i, n:].any()
    assert 0.3 < hit.sum() / mask.sum() < 0.8 and logp.requires_grad and not hit.requires_grad


def test_the_backward_pass_of_a_head_in_chunks_computes_logits_again_and_entropies_not():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            return function(*args, **(kwargs or {}))

    lm, mask = toys.model(), torch.ones(4, 15)
    forward, calls = None, []
    with Count():
        logp, _ = models.completion_logps(lm, torch.arange(80).view(4, 20), torch.full((4,), 5), mask, 0.7, chunk=20 * toys.VOCAB)
        forward, calls = calls, []
        logp.sum().backward()
    for op, first, again in ((torch.ops.aten._log_softmax.default, 3, 3), (torch.ops.aten.exp.default, 3, 0)):         # 60 tokens
        assert (forward.count(op), calls.count(op)) == (first, again)


# ---------------------------------------------------------------- a policy as one plain model
@pytest.mark.parametrize("changes", [dict(lora_rank=4), dict(lora_rank=4, load_in_4bit=True)], ids=["lora", "qlora"])
def test_refresh_writes_the_model_that_an_adapter_on_a_base_with_biases_amounts_to_and_changes_nothing_in_it(tmp_path, changes):
    toys.model(tied=False, attention_bias=True, mlp_bias=True).save_pretrained(tmp_path)
    a, cpu = args(model=str(tmp_path), **changes), torch.device("cpu")
    policy, plain = models.load_policy(a, cpu, torch.float32), models.load_lm(str(tmp_path), cpu, torch.float32)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name or name.endswith("bias"):
                p.normal_(std=0.1)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    ids = torch.randint(0, toys.VOCAB, (3, 20))
    with torch.no_grad():
        far = (plain(ids).logits - policy(ids).logits).norm() / policy(ids).logits.norm()
        models.refresh(plain, policy)
        near = (plain(ids).logits - policy(ids).logits).norm() / policy(ids).logits.norm()
    assert far > 0.05 and near < 1e-4
    assert all(torch.equal(before[name], p) for name, p in policy.named_parameters())
    models.refresh(None, policy)                                # a process that only helps to gather


def test_an_adapter_trains_in_fp32_on_a_bf16_base_that_stays_as_it_is(tmp_path):
    toys.model().save_pretrained(tmp_path)
    policy = models.load_policy(args(model=str(tmp_path), lora_rank=4), torch.device("cpu"), torch.bfloat16)
    dtypes = {p.dtype if p.requires_grad else str(p.dtype) for p in policy.parameters()}
    assert dtypes == {torch.float32, "torch.bfloat16"}
    optimizer = models.Optimizer(policy, args())
    assert not optimizer.low and optimizer.names and all("lora_" in name for name in optimizer.names)


def test_a_model_file_without_some_of_its_weights_gets_one_line(tmp_path, capsys):
    from safetensors.torch import load_file, save_file
    toys.model().save_pretrained(tmp_path)
    kept = load_file(tmp_path / "model.safetensors")
    kept.pop("model.layers.1.mlp.up_proj.weight")
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit) as stop:
        models.load_lm(str(tmp_path), torch.device("cpu"), torch.float32)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "up_proj" in err.splitlines()[-1]
