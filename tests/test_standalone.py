"""Each script, alone with rewards.py in an empty folder, does all its work on Countdown, GSM8K and ARC there.
And what keeps it so: imports, twins, files, sizes."""
import ast
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import toys

ROOT = Path(__file__).resolve().parent.parent
CEILINGS = {  # file -> lines, syntax nodes
    "grpo.py": (927, 10_200), "rewards.py": (600, 5_800), "sft.py": (652, 6_800), "countdown.py": (400, 4_800),
    "eval.py": (470, 5_600), "extras/report.py": (400, 4_800), "extras/sandbox.py": (400, 4_800),
    "extras/mathematics.py": (260, 2_900), "extras/sampler.py": (190, 2_200)}
TREES = {name: ast.parse((ROOT / name).read_text()) for name in CEILINGS}
# names of functions that are each script's own; what else has one name has one text
OWN = {"draw", "main", "parse_args", "train"}

ARC = [{"question": f"Which of these is {i}?", "answerKey": "B",
        "choices": {"text": ["none", str(i), "all"], "label": ["A", "B", "C"]}} for i in range(4)]
# Runs commands [folder, script, flags ...] in one interpreter, each in its folder with modules of its own, as
# `python script.py` would. Prints the exit code of each and what it wrote to stderr.
DRIVER = """
import contextlib, io, json, os, runpy, sys
for folder, script, *flags in json.loads(sys.stdin.read()):
    os.chdir(folder)
    sys.modules.pop("rewards", None)
    sys.argv, said, code = [script, *flags], io.StringIO(), 0
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    print(json.dumps([code, said.getvalue()]), flush=True)
"""


def python(*argv, cwd, **options):
    """A child Python that finds nothing of this project but what lies in `cwd`."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *map(str, argv)], cwd=cwd, env=env, capture_output=True, text=True,
                          timeout=300, **options)


def together(commands, cwd):
    """-> exit codes and outputs of the commands, in one child."""
    child = python("-c", DRIVER, cwd=cwd, input=json.dumps(commands))
    codes, said = zip(*map(json.loads, child.stdout.splitlines()))
    return list(codes), [*said, child.stderr]


def alone(folder, script, *others):
    """A new folder that holds the script and `others`."""
    folder.mkdir(parents=True)
    for name in (script, *others):
        shutil.copy(ROOT / f"{name}.py", folder)
    return folder


# ---------------------------------------------------------------------------------- in an empty folder
def test_each_script_does_its_work_with_rewards_alone(tmp_path):
    made = python("countdown.py", "--train", 20, "--test", 4, "--numbers", 2, 3, "--max_number", 12,
                  cwd=alone(tmp_path / "countdown", "countdown"))
    assert made.returncode == 0, made.stderr
    toys.save(tmp_path, max_position_embeddings=2048)
    (tmp_path / "model/model.safetensors").unlink()
    for split in ("train", "test"):
        toys.write(tmp_path / f"gsm8k/{split}.jsonl", [row for row in toys.GSM8K if row["answer"][0] != "#"])
        toys.write(tmp_path / f"arc/{split}.jsonl", ARC)
    places = {"countdown": "countdown/data/countdown", "gsm8k": "gsm8k", "arc": "arc"}
    data = [f"{task}={tmp_path}/{place}:2" for task, place in places.items()]
    folders = [str(alone(tmp_path / script, script, "rewards")) for script in ("sft", "grpo", "eval")]
    trained = [f"{folder}/run" for folder in folders[:2]]
    run = ["--data", *data, "--steps", "2", "--save_every", "1", "--output_dir", "run"]
    sft = [folders[0], "sft.py", "--model", "tiny", *run, "--batch_size", "6", "--max_length", "400"]
    grpo = [folders[1], "grpo.py", "--model", trained[0], *run, "--prompts_per_step", "6",
            "--group_size", "2", "--max_new_tokens", "8", "--max_resample", "0"]
    evaluation = [folders[2], "eval.py", "--model", *trained, "--data", *data, "--max_new_tokens", "8",
                  "--output", "results.json"]
    codes, said = together([sft, grpo, evaluation], tmp_path)
    assert codes == [0, 0, 0], said
    table = json.loads(Path(folders[2], "results.json").read_text())
    assert [(row["model"], row["task"]) for row in table] == [
        (model, task) for model in trained for task in ("countdown", "gsm8k", "arc")]

    # Again, from the first checkpoint, and with folders of the scripts' own names beside them.
    for folder in folders:
        for name in ("countdown", "sft", "grpo", "eval", "rewards", "extras"):
            Path(folder, name).mkdir()
    for out in trained:
        shutil.copytree(out, f"{out}-before")
        shutil.rmtree(f"{out}/checkpoint-2")
    again = [[*command, "--resume"] for command in (sft, grpo)]
    again.append([*grpo, "--cuda_graphs", "--output_dir", "other"])
    for task in ("math", "code"):                               # the data are read before a model is loaded
        for folder, script, *_ in (sft, grpo, evaluation):
            again.append([folder, script, "--model", f"{tmp_path}/model", "--data", task])
    codes, said = together(again, tmp_path)
    assert codes == [0, 0, 2, 2, 2, 2, 2, 2, 2], said
    for out in trained:
        steps = [line for line in toys.read(f"{out}/metrics.jsonl") if "loss" in line]
        assert [line["step"] for line in steps] == [1, 2]
        before, after = (Path(folder, "model.safetensors").read_bytes() for folder in (f"{out}-before", out))
        assert before == after
    assert {"correct/countdown", "correct/gsm8k", "correct/arc"} <= set(steps[-1])
    assert "No module named 'extras.sampler'" in said[2] and "Traceback" not in said[2]
    for (_, script, *_, task), line in zip(again[3:], said[3:]):
        extra = {"math": "extras/mathematics.py", "code": "extras/sandbox.py"}[task]
        assert line.startswith(f"{script}: {task}") and extra in line and line.count("\n") == 1


# ---------------------------------------------------------------------------------- in the repository
def test_git_holds_the_files_of_the_map_and_no_others():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [Path(line) for line in listed.stdout.splitlines()]
    assert {path.parts[0] for path in paths} == {
        "countdown.py", "sft.py", "grpo.py", "eval.py", "rewards.py", "README.md", "LICENSE", "pytest.ini",
        "requirements.txt", "tests", "recipes", "extras", "assets", ".ci", ".gitignore"}
    extras = {path.name for path in paths if path.parts[0] == "extras"}
    assert extras == {"mathematics.py", "sandbox.py", "report.py", "sampler.py"}


def imported(tree):
    """Modules that the file imports, wherever it does."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module)
    return {name.split(".")[0] for name in found}


def test_scripts_and_extras_import_of_the_project_rewards_alone():
    project = {Path(name).stem for name in CEILINGS} | {"extras", "tests"}
    allowed = {"rewards.py": {"extras"}, "countdown.py": set(), "extras/sampler.py": set(),
               "grpo.py": {"rewards", "extras"}}
    for name, tree in TREES.items():
        assert imported(tree) & project <= allowed.get(name, {"rewards"}), name
    functions = [node for node in TREES["rewards.py"].body if isinstance(node, ast.FunctionDef)]
    needs = {node.name for node in functions if "extras" in imported(node)}
    outside = [node for node in TREES["rewards.py"].body if node not in functions]
    assert needs and "extras" not in imported(ast.Module(outside, []))     # only what needs it imports it
    tree = ast.parse((ROOT / "grpo.py").read_text())
    asked, = [node for node in ast.walk(tree)
              if isinstance(node, ast.If) and ast.unparse(node.test) == "args.cuda_graphs"]
    found = [ast.unparse(node) for node in asked.body if "extras" in imported(node)]
    assert found == ["from extras.sampler import Sampler"]
    asked.body.clear()
    assert "extras" not in imported(tree)                                   # and nowhere else


def test_what_two_scripts_have_under_one_name_is_one_text():
    texts = defaultdict(lambda: defaultdict(list))              # name -> text -> files
    for file in ("countdown.py", "sft.py", "grpo.py", "eval.py", "extras/report.py"):
        for node in TREES[file].body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                texts[node.name][ast.dump(node)].append(file)
    differ = {name: list(found.values()) for name, found in texts.items() if len(found) > 1}
    assert {name: files for name, files in differ.items() if name not in OWN} == {}
    assert OWN <= set(differ), "a name in OWN is no longer one of several texts"


@pytest.mark.parametrize("name", CEILINGS)
def test_a_file_keeps_to_its_size_with_one_statement_a_line(name):
    lines, nodes = (ROOT / name).read_text().splitlines(), list(ast.walk(TREES[name]))
    most_lines, most_nodes = CEILINGS[name]
    assert len(lines) <= most_lines
    assert len(nodes) <= most_nodes
    assert [i for i, line in enumerate(lines, 1) if len(line) > 110] == []
    starts = [node.lineno for node in nodes if isinstance(node, ast.stmt)]
    assert sorted({i for i in starts if starts.count(i) > 1}) == []
