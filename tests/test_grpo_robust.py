"""Nothing is lost: kills, full disks, signals, bad gradients, too little memory, several processes, bad input."""
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import time
import traceback
import zlib
from pathlib import Path

import pytest
import torch
import torch._dynamo  # which FSDP imports: here once for all forks
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import AutoModelForCausalLM

import grpo
import models
import runs
import sampler
import toys
from toys import exit_code

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tests fork
CLOCK = {"sample_seconds", "update_seconds", "step_seconds", "sample_tokens_per_s", "update_tokens_per_s", "peak_memory_gb"}


def coin(tasks, texts, rows, n_tokens, **_):
    """A reward that random text earns now and then, so that groups, pass rates and advantages differ."""
    right = [float(zlib.crc32(text.encode()) % 3 == 0) for text in texts]
    return [{"correct": x, "format": 0.0, "reward": x - n / 100} for x, n in zip(right, n_tokens)]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toys.save(tmp_path_factory.mktemp("toy"), max_position_embeddings=160)


@pytest.fixture(autouse=True)
def coins(monkeypatch):
    monkeypatch.setattr(grpo.rewards, "score_batch", coin)


def flags(toy, out, *more, steps=4):
    return ["--model", str(toy / "model"), "--data", f"countdown={toy}/countdown", "--output_dir", str(out), "--steps", str(steps),
            "--prompts_per_step", "3", "--group_size", "4", "--max_new_tokens", "10", "--lr", "1e-3", "--warmup", "2", "--temperature_end",
            "0.8", "--micro_batch_size", "4", "--save_every", "1", *map(str, more)]


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """A run that nothing happened to, of 6 steps."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo.rewards, "score_batch", coin)
        grpo.main(flags(toy, out, "--keep", 9, *evaluated(toy), steps=6))
    return out


def evaluated(toy):
    return "--eval_data", f"countdown={toy}/countdown", "--eval_every", 3


def weights(folder):
    return {k: v for f in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(f).items()}


def far(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and a
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def metrics(out):
    """metrics.jsonl without what a clock says."""
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in toys.read(Path(out) / "metrics.jsonl")]


def assert_same_run(out, whole):
    assert far(out, whole) == 0 and metrics(out) == metrics(whole)
    assert toys.read(out / "samples.jsonl") == toys.read(whole / "samples.jsonl")
    assert not list(out.glob("tmp-*"))


def fork(argv, **kwargs):
    return toys.fork(grpo.main, argv, **kwargs)


def together(world, argv, before=lambda rank: None, **env):
    return toys.together(grpo.main, world, argv, before, env)


def around(sampler, before):
    """In place of grpo.Sampler: one that calls before(prompts) each time it is to sample."""
    class Around(sampler):
        def __call__(self, prompts, *args, **kwargs):
            before(prompts)
            return super().__call__(prompts, *args, **kwargs)
    return Around


def whole_steps(out):
    return [step for step, folder in runs.checkpoints(out).items() if runs.is_whole(folder)]


def refusal(argv, capfd):
    """All that a command that is refused says: one line."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        grpo.main([str(a) for a in argv])
    err = capfd.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err and err.startswith("grpo.py: ") and err.count("\n") == 1, err
    return err


# ---------------------------------------------------------------- kills
def test_a_run_killed_at_twenty_random_moments_ends_with_the_same_bits(toy, whole, tmp_path):
    argv = lambda *more: flags(toy, tmp_path / "cut", *evaluated(toy), *more, steps=6)
    begun, rng, kills, finished = time.time(), random.Random(0), 0, 0
    assert exit_code(fork(argv())) == 0
    length = time.time() - begun
    while kills < 20 or not finished:
        start = "--resume" if whole_steps(tmp_path / "cut") and (kills or finished) else "--overwrite"
        pid = fork(argv(start))
        if kills < 20:
            time.sleep(rng.uniform(0.1, 0.7) * length)
            os.kill(pid, signal.SIGKILL)
        code = exit_code(pid)
        assert code in (0, -signal.SIGKILL)
        kills += code == -signal.SIGKILL
        if code == 0:
            finished += 1
            assert_same_run(tmp_path / "cut", whole)
            shutil.rmtree(tmp_path / "cut")


@pytest.mark.parametrize("moment", [
    "half the model", "half the trainer", "no manifest", "not renamed", "old ones half gone", "half the lines"])
def test_a_run_killed_in_the_middle_of_a_save_ends_with_the_same_bits(toy, whole, tmp_path, moment):
    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def arm():
        save_model, save, seal, append, rmtree, rename = grpo.save_model, torch.save, runs.seal, runs.append, shutil.rmtree, Path.rename

        def at_4(real, path, half):
            def patched(*args, **kwargs):
                on = "checkpoint-4" in str(path(*args))
                return half(*args) if on and real is rename else (real(*args, **kwargs), half(*args) if on else None)[0]
            return patched

        def cut(path):
            os.truncate(path, path.stat().st_size // 2)
            die()
        if moment == "half the model":
            grpo.save_model = at_4(save_model, lambda run, folder: folder, lambda run, folder: cut(folder / "model.safetensors"))
        if moment == "half the trainer":
            torch.save = at_4(save, lambda x, path: path, lambda x, path: cut(path))
        if moment == "no manifest":
            runs.seal = at_4(seal, lambda path: path, die)
        if moment == "not renamed":
            Path.rename = at_4(rename, lambda path, to: to, die)
        if moment == "old ones half gone":
            def half_gone(path, *a, **k):
                if Path(path).name == "checkpoint-3" and Path(path).exists():
                    (Path(path) / "trainer.pt").unlink()
                    die()
                rmtree(path, *a, **k)
            shutil.rmtree = half_gone
        if moment == "half the lines":
            def half_a_line(path, rows):
                append(path, rows)
                if rows[0]["step"] == 4:
                    cut(path)
            runs.append = half_a_line
    argv = flags(toy, tmp_path, *evaluated(toy), "--keep", 1, steps=6)
    assert exit_code(fork(argv, before=arm)) == -signal.SIGKILL
    assert whole_steps(tmp_path) == ([4] if moment == "old ones half gone" else [3])
    if moment == "half the lines":  # the file lost steps that a checkpoint counts as done: only this step's line was to go
        assert len(toys.read(whole / "metrics.jsonl")) > 4
        lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "metrics.jsonl").write_text("".join(x for x in lines if json.loads(x)["step"] < 4) + '{"step": 4, "rew')
    assert exit_code(fork([*argv, "--resume"])) == 0
    assert_same_run(tmp_path, whole)
    assert whole_steps(tmp_path) == [6]


@pytest.mark.parametrize("more", [
    ["--lora_rank", 4], ["--dtype", "bfloat16"], ["--optim", "adamw8bit"], ["--optim", "muon"], ["--inner_epochs", 2],
    ["--model", "DROPOUT", "--beta", 0]])
def test_a_resumed_run_ends_with_the_same_bits(toy, tmp_path, more):
    if "DROPOUT" in more:
        toys.model(attention_dropout=0.2).save_pretrained(tmp_path / "dropout")
        toys.tokenizer().save_pretrained(tmp_path / "dropout")
        more = ["--model", tmp_path / "dropout", *more[2:]]
    argv = lambda out, *extra: flags(toy, tmp_path / out, *more, "--save_every", 2, *extra)
    grpo.main(argv("a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b/checkpoint-4")
    grpo.main(argv("b", "--resume"))
    assert_same_run(tmp_path / "b", tmp_path / "a")


# ---------------------------------------------------------------- damage and full disks
@pytest.mark.parametrize("harm", [
    lambda f: os.truncate(f / "model.safetensors", 5000), lambda f: (f / "trainer.pt").unlink(),
    lambda f: (f / "manifest.json").write_text("{"),
    lambda f: (f / "trainer.pt").write_bytes((f / "trainer.pt").read_bytes()[:-1] + b"x"),
    lambda f: (f / "manifest.json").unlink()])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_is_used(toy, whole, tmp_path, capfd, harm):
    shutil.copytree(whole, tmp_path / "x")
    harm(tmp_path / "x/checkpoint-6")
    grpo.main(flags(toy, tmp_path / "x", *evaluated(toy), "--keep", 1, "--resume", steps=6))
    err = capfd.readouterr().err
    assert err.count("is damaged") == 1 and "checkpoint-6 is damaged" in err.splitlines()[0] and "step 6 " in err and "step 5 " not in err
    assert_same_run(tmp_path / "x", whole)
    assert whole_steps(tmp_path / "x") == [6]


def test_with_no_whole_checkpoint_a_run_does_not_go_on(toy, whole, tmp_path, capfd):
    assert "no whole checkpoint" in refusal(flags(toy, tmp_path / "new", "--resume"), capfd)
    for step in (5, 6):
        shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
        os.truncate(tmp_path / f"checkpoint-{step}" / "trainer.pt", 100)
    with pytest.raises(SystemExit) as stop:
        grpo.main(flags(toy, tmp_path, "--resume"))
    *noticed, last = capfd.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(noticed) == 2 and "no whole checkpoint" in last


def test_a_full_disk_stops_with_one_line_and_the_run_goes_on_when_there_is_room(toy, whole, tmp_path, monkeypatch, capfd):
    real = torch.save

    def full(state, path):
        Path(path).write_bytes(b"half")
        if "checkpoint-3" in str(path):
            raise OSError(28, "No space left on device")
        real(state, path)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(torch, "save", full)
        grpo.main(flags(toy, tmp_path, *evaluated(toy), "--keep", 1, steps=6))
    last = capfd.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "No space left" in last and "checkpoint-3" in last and "--resume" in last
    assert whole_steps(tmp_path) == [2] and not list(tmp_path.glob("tmp-*"))
    grpo.main(flags(toy, tmp_path, *evaluated(toy), "--resume", steps=6))
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("name, save_every", [("trainer.pt", 2), ("model.safetensors", 2), ("model.safetensors", 0), ("metrics.jsonl", 0)])
def test_a_file_that_cannot_be_written_stops_with_one_line(toy, whole, tmp_path, capfd, name, save_every):
    """The kernel refuses to write the last bytes of a checkpoint, of the final model, of the metrics."""
    limit = (whole / "checkpoint-2" / name if save_every else whole / name).stat().st_size - 500

    def small():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    assert exit_code(fork(flags(toy, tmp_path, "--save_every", save_every, steps=12 if name == "metrics.jsonl" else 2), before=small)) == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err and str(tmp_path) in err.splitlines()[-1] and err.splitlines()[-1].startswith("grpo.py: ")
    assert not runs.checkpoints(tmp_path) and not (tmp_path / "model.safetensors").exists()


# ---------------------------------------------------------------- signals
def interrupted(real, call, number=signal.SIGINT):
    """A function that gets a signal as it is called for the `call`-th time."""
    calls = []

    def function(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(number)
        return real(*args, **kwargs)
    return function


def stopped(argv):
    with pytest.raises(SystemExit) as stop:
        grpo.main(argv)
    return stop.value.code


@pytest.mark.parametrize("number, name, call", [
    (signal.SIGINT, "pick", 25), (signal.SIGTERM, "pick", 1), (signal.SIGTERM, "policy_loss", 5), (signal.SIGINT, "advantages", 3),
    (signal.SIGTERM, "save_model", 2), (signal.SIGINT, "means", 5)])
def test_a_stopped_run_saves_and_the_line_it_prints_goes_on(toy, whole, tmp_path, monkeypatch, capfd, number, name, call):
    """In the middle of sampling, of the first evaluation, of an update, of a save."""
    module = sampler if name == "pick" else grpo
    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    argv = flags(toy, tmp_path / "a b", *evaluated(toy), "--overwrite", steps=6)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted(getattr(module, name), call, number))
        assert stopped(argv) == 128 + number
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == handlers
    last = capfd.readouterr().err.splitlines()[-1]
    python, script, *again = shlex.split(last.partition("go on with: ")[2])
    assert (python, script) == ("python", "grpo.py") and "--resume" in again
    done = whole_steps(tmp_path / "a b")[-1]
    assert f"after step {done} of 6" in last and done < 6
    grpo.main(again)
    assert_same_run(tmp_path / "a b", whole)


def test_a_second_signal_leaves_at_once(toy, tmp_path, capfd):
    def slow():
        grpo.Sampler = around(grpo.Sampler, lambda *_: [(time.sleep(0.1), (tmp_path / "asleep").touch()) for _ in range(50)])
    pid = fork(flags(toy, tmp_path / "x"), before=slow)
    while not (tmp_path / "asleep").exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGINT)
    err = ""
    while "Ctrl-C leaves at once" not in err:
        time.sleep(0.02)
        err += capfd.readouterr().err
    begun = time.time()
    os.kill(pid, signal.SIGINT)
    assert exit_code(pid) == -signal.SIGINT and time.time() - begun < 1 and not runs.checkpoints(tmp_path / "x")


# ---------------------------------------------------------------- runs that go wrong
def times_nan(loss, parts):
    return loss * math.nan, parts


def nan_alone(loss, parts):
    """The gradient stays finite."""
    return loss, parts | {"loss": parts["loss"] * math.nan}


def spoil(monkeypatch, when, how=times_nan):
    """Losses of the steps for which `when` holds are not finite."""
    real, step = grpo.update, []

    def update(run, *args):
        step.append(1)
        with monkeypatch.context() as patch:
            loss = grpo.policy_loss
            if when(len(step)):
                patch.setattr(grpo, "policy_loss", lambda *a, **k: how(*loss(*a, **k)))
            return real(run, *args)
    monkeypatch.setattr(grpo, "update", update)


@pytest.mark.parametrize("how", [times_nan, nan_alone])
def test_a_loss_or_gradient_that_is_not_finite_is_not_used_and_counted(toy, tmp_path, monkeypatch, capfd, how):
    spoil(monkeypatch, lambda step: step in (2, 3), how)
    grpo.main(flags(toy, tmp_path, "--keep", 9))
    saved = [weights(tmp_path / f"checkpoint-{k}") for k in (1, 2, 3, 4)]
    moved = [any(not torch.equal(a[k], b[k]) for k in a) for a, b in zip(saved, saved[1:])]
    assert moved == [False, False, True] and all(x.isfinite().all() for x in saved[-1].values())
    rows = toys.read(tmp_path / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 1, 1, 0]
    assert [row["grad_norm" if how is times_nan else "loss"] is None for row in rows] == [False, True, True, False]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert {row["step"] for row in toys.read(tmp_path / "samples.jsonl")} == {1, 2, 3}
    assert capfd.readouterr().err.count("not finite") == 2


def test_five_gradients_in_a_row_that_are_not_finite_stop_the_run(toy, tmp_path, monkeypatch, capfd):
    spoil(monkeypatch, lambda step: step != 3)
    with pytest.raises(SystemExit) as stop:
        grpo.main(flags(toy, tmp_path, steps=20))
    last = capfd.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "step 8" in last and f"{tmp_path}/samples.jsonl" in last and "--lr" in last
    assert toys.read(tmp_path / "metrics.jsonl")[-1]["step"] == 8 == toys.read(tmp_path / "samples.jsonl")[-1]["step"]


@pytest.mark.parametrize("right, word", [(0.0, "no reward"), (1.0, "nearly everything")])
def test_a_run_that_goes_wrong_says_so_once(toy, tmp_path, monkeypatch, capfd, right, word):
    words, parts = [word, "dead", "cut off", "KL above 1", "logp_gap"], {"correct": right, "format": 0.0, "reward": right}
    monkeypatch.setattr(grpo.rewards, "score_batch", lambda tasks, texts, rows, **_: [parts for _ in texts])
    monkeypatch.setattr(grpo, "update", lambda *_: {"kl": 3.0, "logp_gap": 0.5, "grad_norm": 1.0, "entropy": 1.0, "skipped": 0})
    grpo.main(flags(toy, tmp_path, "--max_new_tokens", 2, "--save_every", 0, "--max_resample", 0, steps=45))
    warned = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warned) == len(words) and all(sum(word in line for line in warned) == 1 for word in words), warned


def test_a_resumed_run_counts_on_from_what_it_has_seen(toy, tmp_path, monkeypatch, capfd):
    """Gradients in a row that are not finite: two before the stop, three after it."""
    argv = flags(toy, tmp_path, "--save_every", 0, steps=20)
    with monkeypatch.context() as patch:
        spoil(patch, lambda step: step > 1)
        patch.setattr(grpo, "train_step", interrupted(grpo.train_step, 4))
        stopped(argv)
    spoil(monkeypatch, lambda step: True)
    with pytest.raises(SystemExit):
        grpo.main([*argv, "--resume"])
    assert "step 6" in capfd.readouterr().err.splitlines()[-1]


def test_a_resumed_run_warns_of_the_same_twenty_steps(toy, tmp_path, monkeypatch, capfd):
    keys = "loss", "kl", "clip_low", "clip_high", "logp_gap", "grad_norm", "entropy", "skipped"
    monkeypatch.setattr(grpo, "update", lambda *_: dict.fromkeys(keys, 0.0) | {"kl": 3.0})
    argv = flags(toy, tmp_path, "--max_new_tokens", 4, "--save_every", 0, "--max_resample", 0, steps=22)
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "train_step", interrupted(grpo.train_step, 13))
        stopped(argv)
    assert "KL above 1" not in capfd.readouterr().err
    grpo.main([*argv, "--resume"])
    lines = [line[:8] if line.startswith("step") else line for line in capfd.readouterr().err.splitlines()]
    at, = (i for i, line in enumerate(lines) if "KL above 1" in line)
    assert "step 20 " in lines[:at] and "step 21 " in lines[at:] and "step 13 " == lines[0]


# ---------------------------------------------------------------- memory
@pytest.mark.parametrize("more", [[], ["--lora_rank", 4], ["--inner_epochs", 2]])
def test_too_little_memory_halves_the_micro_batch_and_the_update_is_the_same(toy, tmp_path, monkeypatch, capfd, more):
    real, failed = grpo.policy_loss, []

    def small(logp, *args, **kwargs):
        loss, parts = real(logp, *args, **kwargs)
        if len(logp) > 2:
            loss.backward()  # what comes late has left gradients behind
            failed.append(len(logp))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss, parts
    argv = lambda out: flags(toy, tmp_path / out, "--micro_batch_size", 8, "--save_every", 0, *more, steps=2)
    grpo.main(argv("enough"))
    monkeypatch.setattr(grpo, "policy_loss", small)
    capfd.readouterr()
    grpo.main(argv("little"))
    assert failed == [8, 4]
    for one, other in zip(metrics(tmp_path / "enough"), metrics(tmp_path / "little"), strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    enough, little = (torch.cat([w.flatten() for _, w in sorted(weights(tmp_path / out).items())]) for out in ("enough", "little"))
    assert ((enough - little).abs() >= 1e-6).sum() <= len(enough) / 10_000                     # AdamW: 1e-11 of a gradient may show as 1e-6
    assert far(tmp_path / "enough", tmp_path / "little") < 1e-5
    err = capfd.readouterr().err
    assert err.count("--micro_batch_size 4") == err.count("--micro_batch_size 2") == 1


def test_a_reference_in_cpu_memory_gives_the_same_update(toy, whole, tmp_path):
    grpo.main(flags(toy, tmp_path, *evaluated(toy), "--offload_reference", steps=6))
    assert_same_run(tmp_path, whole)


def test_gradients_that_an_error_left_in_short_weights_are_dropped(toy, tmp_path, monkeypatch):
    real, calls = models.Optimizer.take, []

    def take(self, p):
        calls.append(p)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(self, p)
    argv = lambda out, size: flags(toy, tmp_path / out, "--dtype", "bfloat16", "--micro_batch_size", size, "--lr", 1e-5, steps=1)
    grpo.main(argv("enough", 8))
    monkeypatch.setattr(models.Optimizer, "take", take)
    grpo.main(argv("little", 16))
    a, b = (torch.load(tmp_path / f"{x}/checkpoint-1/trainer.pt")["moments"] for x in ("enough", "little"))
    assert all((a[i]["exp_avg"] - b[i]["exp_avg"]).norm() < 0.02 * a[i]["exp_avg"].norm() for i in a)


def test_too_little_memory_to_sample_takes_fewer_prompts_at_a_time_and_the_samples_are_the_same(toy, whole, tmp_path, monkeypatch, capfd):
    sizes = []

    def small(prompts):
        sizes.append(len(prompts))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(grpo, "Sampler", around(grpo.Sampler, small))
    grpo.main(flags(toy, tmp_path, *evaluated(toy), steps=6))
    assert toys.read(tmp_path / "samples.jsonl") == toys.read(whole / "samples.jsonl") and far(tmp_path, whole) < 1e-5
    assert sorted(set(sizes)) == [1, 2, 4, 8] and capfd.readouterr().err.count("--sample_batch_size") == 3


@pytest.mark.parametrize("name", ["policy_loss", "Sampler"])
def test_where_no_half_is_left_one_line_says_what_to_change(toy, tmp_path, monkeypatch, capfd, name):
    def none(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(grpo, name, around(grpo.Sampler, none) if name == "Sampler" else none)
    with pytest.raises(SystemExit) as stop:
        grpo.main(flags(toy, tmp_path))
    err = capfd.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err and "--activation_checkpointing" in err.splitlines()[-1]


# ---------------------------------------------------------------- several processes
def uneven(rank):
    """Rollouts take longer in some processes."""
    rng = random.Random(rank)
    grpo.Sampler = around(grpo.Sampler, lambda prompts: time.sleep(rng.uniform(0, 0.05)))


@pytest.mark.parametrize("world, more", [
    (2, []), (4, []), (2, ["--fsdp"]), (2, ["--lora_rank", 4]), (2, ["--lora_rank", 4, "--load_in_4bit"])])
def test_several_processes_do_what_one_does(toy, tmp_path, world, more):
    argv = lambda out, *extra: flags(toy, tmp_path / out, *evaluated(toy), "--keep", 9, "--prompts_per_step", 4, *extra)
    grpo.main(argv("one", *[x for x in more if x != "--fsdp"]))
    assert together(world, argv("many", *more), uneven) == [0] * world
    assert far(tmp_path / "one", tmp_path / "many") < 1e-5
    one, many = metrics(tmp_path / "one"), metrics(tmp_path / "many")
    assert len({row["groups_drawn"] for row in one if "groups_drawn" in row}) > 1 and len(one) == 7
    for a, b in zip(one, many, strict=True):
        assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], rel=1e-3, abs=1e-5) for k in a)
    a, b = (torch.load(tmp_path / f"{x}/checkpoint-4/trainer.pt")["curriculum"] for x in ("one", "many"))
    assert a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)
    assert len(set(a["passed"].tolist())) > 2
    assert toys.read(tmp_path / "one/samples.jsonl") == [
        {**row, "advantage": pytest.approx(row["advantage"])} for row in toys.read(tmp_path / "many/samples.jsonl")]


def out_of_memory(where, fails):
    """Process 1 has too little memory at its calls of a function of grpo.py for which fails(number of the call, rows) holds."""
    def before(rank):
        real, calls = getattr(grpo, where), []

        def call(rows):
            calls.append(1)
            if rank == 1 and fails(len(calls), rows):
                raise torch.OutOfMemoryError("CUDA out of memory")
        if where == "Sampler":
            grpo.Sampler = around(real, lambda prompts: call(len(prompts)))
        else:                                                   # late in a pass: gradients of it may be there
            setattr(grpo, where, lambda *args, **kwargs: (real(*args, **kwargs), call(len(args[0 if where == "policy_loss" else 1])))[0])
    return before


@pytest.fixture(scope="module")
def five(toy, tmp_path_factory):
    """A run of two steps in one process. In two of them micro-batches of 5 rows are two in one process and one in the other."""
    out, more = tmp_path_factory.mktemp("five"), ["--micro_batch_size", 5, "--save_every", 0, "--max_resample", 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo.rewards, "score_batch", coin)
        grpo.main(flags(toy, out, *more, steps=2))
    return out, more


@pytest.mark.parametrize("where, fails, sizes", [
    ("policy_loss", lambda call, rows: call == 1, [3]), ("policy_loss", lambda call, rows: call == 2, [3]),
    ("policy_loss", lambda call, rows: rows > 2, [3, 2]), ("completion_logps", lambda call, rows: call == 1, [3]),
    ("completion_logps", lambda call, rows: call == 2, [3]), ("completion_logps", lambda call, rows: rows > 2, [3, 2]),
    ("Sampler", lambda call, rows: call == 1, [])])
def test_too_little_memory_in_one_process_is_seen_to_in_all(toy, five, tmp_path, capfd, where, fails, sizes):
    """In the policy's pass, the reference's, and in sampling; in the last pass of all too, which one process makes with no row
    of its own."""
    out, more = five
    more = [*more, "--prompts_per_step", 3] if where != "Sampler" else [*more, "--prompts_per_step", 4]
    if where == "Sampler":                                      # process 1 is to have a prompt to spare
        grpo.main(flags(toy, tmp_path / "one", *more, steps=2))
        out = tmp_path / "one"
    capfd.readouterr()
    assert together(2, flags(toy, tmp_path / "two", *more, steps=2), out_of_memory(where, fails)) == [0, 0]
    assert far(out, tmp_path / "two") < 1e-5
    for a, b in zip(metrics(out), metrics(tmp_path / "two"), strict=True):
        assert all(a[k] == pytest.approx(b[k], rel=1e-3, abs=1e-5) for k in a)
    assert re.findall("out of GPU memory: --micro_batch_size (\\d)", capfd.readouterr().err) == list(map(str, sizes))


@pytest.mark.parametrize("call, left", [(1, []), (3, [1])])
def test_a_start_after_too_little_memory_under_fsdp_is_with_half_the_micro_batch_and_touches_no_others_run(
        toy, five, tmp_path, capfd, call, left):
    """Before the first checkpoint and after it."""
    argv = flags(toy, tmp_path, "--max_resample", 0, "--micro_batch_size", 5, "--fsdp", steps=2)
    codes = together(2, argv, out_of_memory("policy_loss", lambda n, rows: n == call))
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("grpo.py: ")]
    assert codes[1] == 2 and codes[0] and len(said) == 1 and "--micro_batch_size 2" in said[0] and whole_steps(tmp_path) == left
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "LAUNCHER", "another")
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert "holds a run" in refusal([x for x in argv if x != "--fsdp"], capfd)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert together(2, argv, out_of_memory("policy_loss", lambda n, rows: rows > 2), TORCHELASTIC_RESTART_COUNT="1") == [0, 0]
    assert far(five[0], tmp_path) < 1e-5 and [row["step"] for row in metrics(tmp_path)] == [1, 2]


def test_too_little_memory_under_fsdp_restarts_by_itself(toy, five, tmp_path, capfd):
    """Twice, as a quarter of the micro-batch fits; the other process waits for a pass that does not come until it is ended."""
    argv = flags(toy, tmp_path, "--max_resample", 0, "--micro_batch_size", 5, "--fsdp", steps=2)
    assert torchrun(argv, out_of_memory("policy_loss", lambda n, rows: rows > 1), max_restarts=2) == 0
    assert far(five[0], tmp_path) < 1e-5 and [row["step"] for row in metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("where", ["policy_loss", "completion_logps"])
def test_a_stop_in_an_update_leaves_after_the_micro_batch_in_all_processes(toy, whole, tmp_path, capfd, where):
    def before(rank):
        update, real, passes = grpo.update, getattr(grpo, where), []

        def begin(*args):
            passes.append(0)
            return update(*args)

        def one(*args, **kwargs):
            passes[-1] += 1
            (tmp_path / f"passes-{rank}").write_text(json.dumps(passes))
            if rank == 1 and len(passes) == 3 and passes[-1] == 2:
                signal.raise_signal(signal.SIGTERM)
            return real(*args, **kwargs)
        grpo.update = begin
        setattr(grpo, where, one)
    argv = flags(toy, tmp_path / "run", *evaluated(toy), "--micro_batch_size", 1, "--save_every", 0, steps=6)
    assert together(2, argv, before) == [128 + signal.SIGTERM] * 2
    assert "after step 2 of 6" in capfd.readouterr().err and whole_steps(tmp_path / "run") == [2]
    first, second = (json.loads((tmp_path / f"passes-{rank}").read_text()) for rank in (0, 1))
    assert first == second and first[:2] >= [4, 4] and first[2:] == [2]
    assert together(2, [*argv, "--resume"]) == [0, 0]
    assert far(tmp_path / "run", whole) < 1e-5
    assert [row["step"] for row in metrics(tmp_path / "run")] == [row["step"] for row in metrics(whole)]


def stop_at(where, call, who=(0,)):
    """SIGTERM, twice as a cluster and torchrun send it, to the processes `who` at a call of a function."""
    def before(rank):
        real, calls = getattr(grpo, where), []

        def stop(*_):
            calls.append(1)
            if rank in who and len(calls) == call:
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)
        setattr(grpo, where, around(real, stop) if where == "Sampler" else lambda *args, **kwargs: (stop(), real(*args, **kwargs))[1])
    return before


@pytest.mark.parametrize("worlds, more, then, stop", [
    ((1, 2), [], [], stop_at("train_step", 4)), ((2, 1), [], [], stop_at("Sampler", 5, [1])),
    ((2, 2), [], [], stop_at("Sampler", 5, [0, 1])), ((4, 2), [], ["--fsdp"], stop_at("train_step", 4, [2])),
    ((2, 1), ["--fsdp"], [], stop_at("train_step", 4)), ((1, 2), [], ["--fsdp"], stop_at("train_step", 1))])
def test_a_stopped_run_goes_on_in_another_number_of_processes(toy, whole, tmp_path, capfd, worlds, more, then, stop):
    """All stop together whichever of them gets the signal, between steps, in the middle of sampling, before the first update."""
    argv = flags(toy, tmp_path, *evaluated(toy), "--save_every", 0, steps=6)
    assert together(worlds[0], [*argv, *more], stop) == [128 + signal.SIGTERM] * worlds[0]
    err, (done,) = capfd.readouterr().err, whole_steps(tmp_path)
    assert f"after step {done} of 6" in err and ("torchrun --nproc_per_node" in err) == (worlds[0] > 1) and "Traceback" not in err
    assert together(worlds[1], [*argv, *then, "--resume"]) == [0] * worlds[1]
    assert far(tmp_path, whole) < 1e-5
    assert [row["step"] for row in metrics(tmp_path)] == [row["step"] for row in metrics(whole)]


def torchrun(argv, before, max_restarts=0):
    """The launcher behind torchrun, whose two processes fork here and so need not import torch. -> its exit code"""
    def work():
        toys.as_process(int(os.environ["RANK"]), 2)
        before(grpo.RANK)
        try:
            grpo.main(argv)
        except Exception:                                       # as an interpreter that ends would
            traceback.print_exc()
            raise

    def launch(_):
        config = LaunchConfig(1, 1, 2, run_id="one", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=max_restarts,
                              start_method="fork", monitor_interval=0.05)
        elastic_launch(config, work)()
    return exit_code(toys.fork(launch, []))


def test_a_process_that_dies_ends_the_job_with_its_message(toy, tmp_path, capfd):
    def fall(rank):
        real = grpo.policy_loss

        def loss(*args, **kwargs):
            if rank == 1 and (tmp_path / "checkpoint-2").exists():
                raise RuntimeError("process 1 fell over")
            return real(*args, **kwargs)
        grpo.policy_loss = loss
    assert torchrun(flags(toy, tmp_path, steps=500), fall) == 1
    assert "RuntimeError: process 1 fell over" in capfd.readouterr().err and whole_steps(tmp_path)[-1] >= 2


# ---------------------------------------------------------------- untrusted things
def test_code_that_comes_with_a_model_does_not_run_unless_asked_to(toy, tmp_path, capfd):
    shutil.copytree(toy / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text()) | {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    (tmp_path / "model/own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(SystemExit) as stop:
        grpo.main(flags(toy, tmp_path / "x", "--model", tmp_path / "model"))
    assert stop.value.code == 2 and "--trust_remote_code" in capfd.readouterr().err and not (tmp_path / "ran").exists()
    with pytest.raises(SystemExit):
        grpo.main(flags(toy, tmp_path / "x", "--model", tmp_path / "model", "--trust_remote_code"))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["code", "a list", "another dict", "half of it", "another model"])
def test_a_checkpoint_that_is_none_gets_one_line_and_runs_no_code(toy, whole, tmp_path, capfd, kind):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    shutil.copytree(whole, tmp_path / "x")
    folder = tmp_path / "x/checkpoint-6"
    state = torch.load(folder / "trainer.pt", weights_only=True)
    torch.save({"code": Bomb(), "a list": [1], "another dict": {"step": 6}, "half of it": {k: state[k] for k in ("weights", "moments")},
                "another model": state | {"weights": {"w": torch.ones(2)}}}[kind], folder / "trainer.pt")
    (folder / "manifest.json").write_text(json.dumps({p.name: runs.seal(p) for p in folder.iterdir() if p.name != "manifest.json"}))
    line = refusal(flags(toy, tmp_path / "x", *evaluated(toy), "--keep", 9, "--resume", steps=6), capfd)
    assert ("another model" if kind == "another model" else "trainer.pt") in line
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- bad input
ROW = json.dumps(toys.COUNTDOWN[0]) + "\n"


@pytest.fixture(scope="module")
def bad(toy, tmp_path_factory):
    """A folder to stand in, full of things that are wrong."""
    folder = tmp_path_factory.mktemp("bad")
    texts = {"file": "", "broken.jsonl": ROW + '{"nums": [1,\n', "list.jsonl": "[1]\n",
        "columns.jsonl": ROW + '{"target": 3}\n', "nothing.jsonl": "", "word.jsonl": '{"nums": "3 4", "target": 7}\n',
        "null.jsonl": json.dumps({**toys.COUNTDOWN[0], "pass_rate": None}) + "\n", "few.jsonl": ROW,
        "rated.jsonl": (json.dumps({**toys.COUNTDOWN[0], "pass_rate": 0.9}) + "\n") * 8,
        "refuses.jinja": "{{ raise_exception('no system turn, please') }}", "broken.jinja": "{% for %}",
        "quote.txt": "--model 'a\n", "wrong.txt": "--lr 1e-6 x\n"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    for name in ("empty", "untemplated", "adapter"):
        (folder / name).mkdir()
    toys.model().save_pretrained(folder / "untemplated")
    toys.tokenizer(chat_template=None).save_pretrained(folder / "untemplated")
    (folder / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    return folder


@pytest.mark.parametrize("more, words", [
    (["--steps", 0], "--steps 0: must be at least 1"), (["--steps", "many"], "invalid int"),
    (["--steps"], "expected one argument"), (["--prompts_per_step", 0], "at least 1"),
    (["--group_size", 1], "--group_size 1: a group needs at least 2 completions"),
    (["--max_new_tokens", 0], "at least 1"), (["--temperature", 0], "--temperature 0.0"),
    (["--temperature", "nan"], "--temperature nan"), (["--temperature_end", 0], "--temperature_end 0.0"),
    (["--temperature_end", "inf"], "--temperature_end inf"), (["--max_resample", -1], "at least 0"),
    (["--curriculum_floor", 0], "above 0 and at most 1"), (["--curriculum_floor", "nan"], "above 0"),
    (["--curriculum_floor", 2], "at most 1"), (["--sample_batch_size", 0], "at least 1"),
    (["--clip_low", -0.1], "--clip_low -0.1"), (["--clip_high", "nan"], "--clip_high nan"),
    (["--beta", -1], "--beta -1.0"), (["--beta", "inf"], "--beta inf"), (["--inner_epochs", 0], "at least 1"),
    (["--micro_batch_size", 0], "at least 1"), (["--lr", -1e-6], "--lr"), (["--lr", "nan"], "--lr nan"),
    (["--warmup", -1], "at least 0"), (["--max_grad_norm", -1], "at least 0"), (["--lora_rank", -1], "at least 0"),
    (["--lora_rank", 4, "--lora_alpha", 0], "--lora_alpha 0"), (["--eval_every", 0], "at least 1"),
    (["--save_every", -1], "at least 0"), (["--keep", 0], "at least 1"), (["--sample_every", 0], "at least 1"),
    (["--seed", -1], "at least 0"), (["--seed", 2**40], "--seed"),
    (["--length_penalty", 5, 5], "START must be below END"), (["--length_penalty", -1, 5], "at least 0"),
    (["--length_penalty", 5], "expected 2 arguments"), (["--pass_rate", 0.9, 0.1], "in this order"),
    (["--pass_rate", "nan", 1], "--pass_rate"), (["--pass_rate", 0, 1.5], "between 0 and 1"),
    (["--weights", "correct=a"], "PART=NUMBER"), (["--weights", "beauty=1"], "parts are correct"),
    (["--weights", "correct=-1"], "at least 0"), (["--weights", "correct=nan"], "at least 0"),
    (["--weights", "correct"], "PART=NUMBER"), (["--loss", "ppo"], "invalid choice"),
    (["--scale", "x"], "invalid choice"), (["--style", "x"], "invalid choice"), (["--dtype", "int8"], "invalid choice"),
    (["--optim", "sgd"], "invalid choice"), (["--lr_schedule", "x"], "invalid choice"),
    (["--log_to", "paper"], "invalid choice"), (["--nonsense"], "unrecognized"), (["--load_in_4bit"], "--lora_rank"),
    (["--merge"], "--lora_rank"), (["--fsdp"], "torchrun"), (["--resume", "--overwrite"], "take one"),
    (["@nowhere.txt"], "nowhere.txt"), (["@quote.txt"], "No closing quotation"),
    (["@wrong.txt"], "unrecognized arguments: x"), (["@empty"], "empty"),
    (["--chat_template", "nowhere.jinja"], "nowhere.jinja: no such file"),
    (["--chat_template", "refuses.jinja"], "no system turn, please"),
    (["--chat_template", "broken.jinja"], "--chat_template"),
    (["--model", "nowhere/at/all/here"], "--model nowhere/at/all/here"),
    (["--model", "nobody/nothing"], "--model nobody/nothing"), (["--model", "empty"], "--model empty"),
    (["--model", "untemplated"], "--chat_template FILE"), (["--model", "adapter"], "is an adapter"),
    (["--model", "file"], "--model file"), (["--data", "chess"], "chess"), (["--data"], "expected at least one"),
    (["--data", "countdown=nowhere.jsonl"], "nowhere.jsonl"),
    (["--data", "countdown=broken.jsonl"], "broken.jsonl, line 2, column"),
    (["--data", "countdown=list.jsonl"], "list.jsonl"),
    (["--data", "countdown=columns.jsonl"], "column 'nums' is missing"),
    (["--data", "countdown=nothing.jsonl"], "nothing.jsonl"),
    (["--data", "countdown=word.jsonl"], "line 1: column 'nums'"),
    (["--data", "countdown=few.jsonl"], "--prompts_per_step 3"), (["--data", "countdown=few.jsonl:0"], "few.jsonl:0"),
    (["--data", "gsm8k=few.jsonl"], "column 'question' is missing"), (["--eval_data"], "expected at least one"),
    (["--eval_data", "countdown=nothing.jsonl"], "nothing.jsonl"),
    (["--eval_data", "countdown=TOY", "--eval_split", "moon"], "moon"), (["--pass_rate", 0.1, 0.9], "no such number"),
    (["--pass_rate", 0.1, 0.9, "--data", "countdown=null.jsonl"], "no such number"),
    (["--pass_rate", 0, 0.5, "--data", "countdown=rated.jsonl"], "has 0 prompts"),
    (["--max_new_tokens", 150], "the model's context of 160"), (["--output_dir", "file"], "file"),
    (["--output_dir", "file/x"], "file/x"), (["--output_dir", "TOYMODEL"], "--model is or lies in it"),
    (["--resume"], "no whole checkpoint")])
def test_a_wrong_command_line_gets_one_line_before_any_model_loads(toy, bad, tmp_path, monkeypatch, capfd, more, words):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(models.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(bad)
    more = [str(x).replace("TOYMODEL", str(toy / "model")).replace("TOY", str(toy / "countdown")) for x in more]
    assert words in refusal(flags(toy, tmp_path / "x", *more), capfd)
    assert not (tmp_path / "x").exists()


def test_a_run_is_not_lost_to_another(toy, whole, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    argv = flags(toy, whole, *evaluated(toy), steps=6)
    assert "--resume" in refusal(argv, capfd) and "--overwrite" in refusal(argv, capfd)
    line = refusal([*argv, "--resume", "--lr", 0.5, "--group_size", 6, "--weights", "correct=2"], capfd)
    assert "--lr 0.001 -> 0.5" in line and "--group_size 4 -> 6" in line and "--weights" in line and "--beta" not in line
    shutil.copytree(toy / "countdown", tmp_path / "countdown")
    assert "nowhere.jsonl" in refusal([*argv, "--overwrite", "--data", "countdown=nowhere.jsonl"], capfd)
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == before
    (tmp_path / "foreign/checkpoint-500").mkdir(parents=True)  # of another program, which writes no args.json
    assert "--overwrite" in refusal(flags(toy, tmp_path / "foreign"), capfd)


def test_a_run_does_not_go_on_with_other_data_or_without_its_flags(toy, whole, tmp_path, capfd):
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(toy / "countdown", tmp_path / "data")
    args = json.loads((tmp_path / "run/args.json").read_text()) | {"data": [f"countdown={tmp_path}/data"]}
    (tmp_path / "run/args.json").write_text(json.dumps(args))
    toys.write(tmp_path / "data/train.jsonl", toys.COUNTDOWN[:5])
    argv = flags(toy, tmp_path / "run", *evaluated(toy), "--resume", "--data", f"countdown={tmp_path}/data", steps=6)
    assert "5 prompts now, and had 8" in refusal(argv, capfd)
    (tmp_path / "run/args.json").write_text("{")
    assert "flags of the run" in refusal(argv, capfd)


def test_a_model_without_an_end_token_or_with_weights_that_do_not_load_gets_one_line(toy, tmp_path, capfd):
    shutil.copytree(toy / "model", tmp_path / "damaged")
    os.truncate(tmp_path / "damaged/model.safetensors", 3000)
    assert str(tmp_path / "damaged") in refusal(flags(toy, tmp_path / "x", "--model", tmp_path / "damaged"), capfd)
    toys.model(eos_token_id=None).save_pretrained(tmp_path / "endless")
    tok = toys.tokenizer()
    tok.eos_token = None
    tok.save_pretrained(tmp_path / "endless")
    assert "end token" in refusal(flags(toy, tmp_path / "y", "--model", tmp_path / "endless"), capfd)


def test_more_processes_than_gpus_and_a_quantised_model_without_one_get_one_line(toy, tmp_path, monkeypatch, capfd):
    shutil.copytree(toy / "model", tmp_path / "fp8")
    config = json.loads((tmp_path / "fp8/config.json").read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "fp8/config.json").write_text(json.dumps(config))
    if not torch.cuda.is_available():
        assert re.search("GPU|CUDA|gptq|optimum", refusal(flags(toy, tmp_path / "x", "--model", tmp_path / "fp8"), capfd))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "--nproc_per_node 1" in refusal(flags(toy, tmp_path / "y"), capfd)
