"""runs.py: flags, files and processes behave as sft.py, grpo.py and eval.py count on, killed at any moment too."""
import argparse
import json
import math
import os
import pathlib
import shutil
import signal
from functools import partial

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
import models
import runs
import toys


@pytest.fixture(autouse=True)
def script(monkeypatch):
    monkeypatch.setattr(runs, "script", "train.py")


def line(capfd, call, *args, code=2):
    """The one line that call(*args) ends the process with."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*args)
    err = capfd.readouterr().err
    assert stop.value.code == code and err.count("\n") == 1 and "Traceback" not in err, err
    return err


def namespace(out, **flags):
    return argparse.Namespace(**dict(output_dir=str(out), resume=False, overwrite=False, fsdp=False, micro_batch_size=8, lr=0.5,
                                     log_to=None) | flags)


FREE = {"output_dir", "resume", "overwrite", "micro_batch_size"}


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------- flags
def test_a_flag_file_reads_like_a_command_line_with_comments(tmp_path, capfd):
    parser = runs.Flags("train.py", "What it does.\n\nMore.")
    runs.add_training_flags(parser, lr=1e-5, warmup=0, lr_schedule="cosine", muon_lr=1e-2, save_every=500)
    (tmp_path / "flags.txt").write_text("# a comment\n\n--lr 3e-4  # the rest\n--output_dir 'a folder'\n--betas 0.9 0.95\n")
    args = parser.parse_args([f"@{tmp_path / 'flags.txt'}", "--lr", "1e-3"])
    assert (args.lr, args.output_dir, args.betas, args.warmup) == (1e-3, "a folder", [0.9, 0.95], 0)
    (tmp_path / "flags.txt").write_text("--output_dir 'a folder\n")
    assert "No closing quotation" in line(capfd, parser.parse_args, [f"@{tmp_path / 'flags.txt'}"])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@settings(max_examples=60, deadline=None)
@given(steps=st.integers(1, 300), warmup=st.integers(0, 300))
def test_the_learning_rate_rises_evenly_to_the_peak_and_never_after(schedule, steps, warmup):
    warmup = min(warmup, steps - 1)
    rates = [models.learning_rate(step, steps, warmup, schedule) for step in range(1, steps + 2)]
    rise, fall = rates[:warmup], rates[warmup:]
    assert rise == pytest.approx([i / warmup for i in range(1, warmup + 1)]) and fall[0] == 1
    assert all(a >= b for a, b in zip(fall, fall[1:])) and min(rates[:-1]) > 0
    assert rates[-1] == pytest.approx(1 if schedule == "constant" else 0, abs=1e-9)    # the step after the last


# ---------------------------------------------------------------- stopping
def test_the_first_signal_is_kept_and_the_handlers_come_back(capfd):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for first in (signal.SIGINT, signal.SIGTERM):
        with runs.Stop() as stop:
            stop.check()
            for number in (first, signal.SIGTERM):
                signal.raise_signal(number)
            with pytest.raises(KeyboardInterrupt) as stopped:
                stop.check()
            assert stopped.value.args == (first,)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert "Ctrl-C leaves at once" in capfd.readouterr().err


def test_a_second_ctrl_c_ends_the_process():
    def main(_):
        with runs.Stop():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
    assert toys.exit_code(toys.fork(main, [])) == -signal.SIGINT


def test_passes_end_after_the_one_in_which_a_signal_came_and_memory_never_hides_it():
    def one(i):
        done.append(i)
        if i == 2:
            stop.signal = signal.SIGTERM
            raise torch.OutOfMemoryError
    done, stop = [], runs.Stop()
    with pytest.raises(KeyboardInterrupt) as stopped:
        runs.passes(range(9), one, stop)
    assert done == [0, 1, 2] and stopped.value.args == (signal.SIGTERM,)
    with pytest.raises(torch.OutOfMemoryError):
        runs.passes(range(9), one)


@pytest.mark.parametrize("what, error", [(torch.OutOfMemoryError, torch.OutOfMemoryError), (signal.SIGTERM, KeyboardInterrupt)])
def test_three_processes_leave_their_passes_together(tmp_path, what, error):
    def main(_):
        runs.start_processes()
        done, stop = [], runs.Stop()

        def one(i):
            done.append(i)
            if i == 3 and runs.RANK == 2:
                if what is signal.SIGTERM:
                    stop.signal = what
                else:
                    raise what
        try:
            runs.passes(range(9), one, stop)
        except error:
            everyone = runs.gather(done), runs.largest(runs.RANK)
            (tmp_path / str(runs.RANK)).write_text(json.dumps(everyone))
        dist.destroy_process_group()
    assert toys.together(main, 3, []) == [0, 0, 0]
    assert [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)] == [[[[0, 1, 2, 3]] * 3, 2]] * 3


def test_a_stopped_run_names_the_command_that_goes_on(monkeypatch, capfd):
    argv = ["--model", "my model", "--overwrite", "--steps", "9"]
    assert "after step 3 of 9; go on with: python train.py --model 'my model' --steps 9 --resume\n" in line(
        capfd, runs.leave, KeyboardInterrupt(15), 3, 9, argv, code=143)
    monkeypatch.setattr(runs, "gather", lambda x: [x])
    monkeypatch.setattr(runs, "WORLD", 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    said = line(capfd, runs.leave, KeyboardInterrupt(2), 3, 9, argv, code=130)
    assert "on every machine" in said and "torchrun --nproc_per_node 4 train.py" in said


# ---------------------------------------------------------------- checkpoints
def fill(step, folder):
    for name in ("model.safetensors", "trainer.pt"):
        (folder / name).write_text(f"{name} of step {step} " * 999)


def whole(out):
    return [step for step, folder in runs.checkpoints(out).items() if runs.is_whole(folder)]


def test_a_run_killed_before_any_of_a_saves_file_operations_finds_a_whole_checkpoint(tmp_path):
    """Two are kept; the save of the third is killed before its first, second, ... operation, until one gets through."""
    def main(argv):
        calls = []

        def killing(real, *args, **kwargs):
            calls.append(1)
            if len(calls) == argv[0]:
                os._exit(9)
            return real(*args, **kwargs)
        of_paths = "write_text", "mkdir", "rename"
        for module, names in (os, ("fsync", "open", "mkdir", "rename", "rmdir", "unlink")), (pathlib.Path, of_paths):
            for name in names:
                real = getattr(module, name)
                setattr(module, name, partial(killing, real) if module is os else
                        lambda self, *a, real=real, **k: killing(partial(real, self), *a, **k))
        runs.save_checkpoint(argv[1], 3, 2, partial(fill, 3))
    start = tmp_path / "start"
    for step in (1, 2):
        runs.save_checkpoint(start, step, 2, partial(fill, step))
    assert whole(start) == [1, 2]
    found, n, code = set(), 0, 9
    while code == 9:
        n, out = n + 1, tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(start, out)
        code = toys.exit_code(toys.fork(main, [n, out]))
        steps = whole(out)
        found.add(tuple(steps))
        assert steps[:2] in ([1, 2], [2, 3]), n
        runs.save_checkpoint(out, 3, 2, partial(fill, 3))                   # what was left does not stand in the way
        assert whole(out) == [2, 3] == list(runs.checkpoints(out)) and not list(out.glob("tmp-*"))
    assert code == 0 and n > 12 and found >= {(1, 2), (1, 2, 3), (2, 3)}


def test_checkpoints_are_kept_as_asked_and_those_of_later_steps_are_left_alone(tmp_path):
    for step in (1, 2, 9, 10, 3):
        runs.save_checkpoint(tmp_path, step, 2, partial(fill, step))
    assert list(runs.checkpoints(tmp_path)) == [3, 9, 10]
    (tmp_path / "checkpoint-x").mkdir()
    assert max(runs.checkpoints(tmp_path)) == 10


@pytest.mark.parametrize("harm", [
    lambda f: (f / "trainer.pt").unlink(), lambda f: os.truncate(f / "trainer.pt", 100), lambda f: (f / "manifest.json").unlink(),
    lambda f: (f / "trainer.pt").write_bytes(b"T" + (f / "trainer.pt").read_bytes()[1:]), lambda f: (f / "manifest.json").write_text("[]"),
    lambda f: (f / "manifest.json").write_text('{"trainer.pt": 1}')])
def test_a_byte_that_is_not_as_it_was_written_is_noticed(tmp_path, harm):
    runs.save_checkpoint(tmp_path, 1, 2, partial(fill, 1))
    assert runs.is_whole(tmp_path / "checkpoint-1")
    harm(tmp_path / "checkpoint-1")
    assert not runs.is_whole(tmp_path / "checkpoint-1")


def test_a_save_that_fails_gets_one_line_and_leaves_what_was_there(tmp_path, capfd):
    def full(folder):
        fill(2, folder)
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\n")         # torch's words for it
    runs.save_checkpoint(tmp_path, 1, 1, partial(fill, 1))
    before = files(tmp_path)
    assert "make room, then --resume" in line(capfd, runs.save_checkpoint, tmp_path, 2, 1, full)
    assert files(tmp_path) == before


# ---------------------------------------------------------------- the folder of a run
def begun(out, steps=(), **flags):
    """A run's folder with checkpoints, as runs.py leaves it."""
    args = namespace(out, **flags)
    runs.find_checkpoint(args, FREE)
    runs.open_folder(args, None)
    for step in steps:
        runs.save_checkpoint(out, step, 9, partial(fill, step))
    return args


def test_a_resume_takes_the_newest_whole_checkpoint_and_its_own_flags_only(tmp_path, capfd):
    begun(tmp_path, (1, 2, 10))
    assert runs.find_checkpoint(namespace(tmp_path, resume=True), FREE) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "trainer.pt").unlink()
    assert runs.find_checkpoint(namespace(tmp_path, resume=True, micro_batch_size=1), FREE) == tmp_path / "checkpoint-2"
    assert "checkpoint-10 is damaged" in capfd.readouterr().err
    shutil.rmtree(tmp_path / "checkpoint-10")
    before = files(tmp_path)
    find = lambda **flags: line(capfd, runs.find_checkpoint, namespace(tmp_path, **flags), FREE)
    assert "holds a run" in find() and "--lr 0.5 -> 0.1, --new None -> 3" in find(resume=True, lr=0.1, new=3)
    (tmp_path / "args.json").write_text("{")
    assert "cannot read the flags" in find(resume=True)
    shutil.rmtree(tmp_path / "checkpoint-1"), shutil.rmtree(tmp_path / "checkpoint-2")
    assert "no whole checkpoint" in find(resume=True) and "holds a run" in find()
    assert files(tmp_path) == {"args.json": b"{"} != before


def test_torchruns_restart_goes_on_by_itself_but_never_in_another_runs_folder(tmp_path, monkeypatch, capfd):
    again = lambda **flags: (args := namespace(tmp_path, **flags), runs.find_checkpoint(args, FREE))
    begun(tmp_path, (1, 2))
    (tmp_path / "micro_batch_size").write_text("4")
    refused = lambda: line(capfd, runs.find_checkpoint, namespace(tmp_path), FREE)
    assert "holds a run" in refused()                           # by hand
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        args, folder = again(**flags)
        assert folder == tmp_path / "checkpoint-2" and args.micro_batch_size == 4
    shutil.rmtree(tmp_path / "checkpoint-1"), shutil.rmtree(tmp_path / "checkpoint-2")
    args, folder = again()                                      # it fell before its first checkpoint
    assert folder is None and args.micro_batch_size == 4
    for other in ({"launcher": "another 1"}, {}):               # and of before there were launchers
        (tmp_path / "args.json").write_text(json.dumps(json.loads((tmp_path / "args.json").read_text()) | {"launcher": None} | other))
        before = files(tmp_path)
        assert "holds a run" in refused() and files(tmp_path) == before
    args, folder = again(overwrite=True)                        # a new run in the folder of one whose memory was too small
    assert folder is None and args.micro_batch_size == 8


def test_metrics_of_what_comes_again_are_dropped_and_a_torn_line_too(tmp_path):
    args = begun(tmp_path, (2, 4))
    rows = [{"step": 1}, {"step": 2}, {"step": 2, "eval_loss": 1}, {"step": 3}, {"step": 4}, {"step": 4, "eval_loss": 1}, {"step": 5}]
    runs.append(tmp_path / "metrics.jsonl", rows)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "lo')
    runs.open_folder(args, tmp_path / "checkpoint-4")
    assert toys.read(tmp_path / "metrics.jsonl") == rows[:5]    # the evaluation of step 4 is made again
    runs.open_folder(args, tmp_path / "checkpoint-2")
    assert toys.read(tmp_path / "metrics.jsonl") == rows[:2] and list(runs.checkpoints(tmp_path)) == [2]
    (tmp_path / "adapter_config.json").touch(), (tmp_path / "mine.txt").touch()
    runs.open_folder(args, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["args.json", "mine.txt"]


def test_a_log_line_is_json_whatever_the_numbers_are(tmp_path):
    runs.logger(namespace(tmp_path))({"step": 1, "loss": math.nan, "norm": math.inf, "skipped": 1, "none": None})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "norm": null, "skipped": 1, "none": null}\n'


@pytest.mark.parametrize("state", [{"step": 1, "weights": pathlib.PurePosixPath("x")}, {"step": 1}, [1, 2], print])
def test_a_state_that_is_none_or_could_run_code_gets_one_line(tmp_path, capfd, state):
    runs.save_checkpoint(tmp_path, 1, 2, lambda folder: torch.save(state, folder / "trainer.pt"))
    folder = tmp_path / "checkpoint-1"
    assert runs.is_whole(folder) and "does not hold the state of a run" in line(capfd, runs.read_state, folder)


@pytest.mark.parametrize("error, words, code", [
    (rewards.DataError("file.jsonl, line 2: no"), "file.jsonl, line 2", 2),
    (torch.OutOfMemoryError("CUDA"), "--activation_checkpointing", 2),
    (OSError(28, "No space left on device"), "No space left on device\n", 2),
    (KeyboardInterrupt(), "stopped before the first step", 130)])
def test_what_can_happen_to_a_run_ends_it_with_one_line(tmp_path, capfd, error, words, code):
    def fall():
        with runs.one_line(namespace(tmp_path)):
            raise error
    assert words in line(capfd, fall, code=code)
    runs.save_checkpoint(tmp_path, 1, 2, partial(fill, 1))
    assert "--resume" in line(capfd, fall, code=code) or isinstance(error, rewards.DataError)
