"""The tests of this folder: its pages, records, scripts and patches."""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
sys.path[:0] = [str(HERE), str(PROJECT)]

from test_all import SMALL_STAR as STAR, TINY, call, refusal, settings  # first: it sets the threads

import importlib.util
import json
import math
import shutil
import subprocess

import numpy as np
import pytest
import torch

import data
import probe
import reproduce
import tables
import train

PATCHES = sorted((HERE / "cures").glob("*.patch"))
SOLUTIONS = sorted((HERE / "exercises").glob("*.patch"))


def copy_code(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for file in PROJECT.glob("*.py"):
        shutil.copy(file, folder)
    return folder


def apply(patch, folder):
    done = subprocess.run(["patch", "-p1", "-F0", "-i", patch], cwd=folder, capture_output=True)
    assert done.returncode == 0, done.stdout


# ---- Logs and tables


def write_log(file, seed, accuracies, **config):
    """A log with an evaluation each 100 steps."""
    header = {"command": f"python train.py --seed {seed} --out_dir out/x", "machine": "m"}
    header["commit"] = "abc"
    header["versions"] = {"python": "3", "torch": "2"}
    header["config"] = vars(settings("--seed", seed)) | config
    lines = []
    for i, accuracy in enumerate(accuracies):
        lines.append({
            "iter": 100 * i, "examples": 12_800 * i, "elapsed_s": 60 * i, "accuracy": accuracy,
            "node_accuracy": [1, accuracy, 0.25, 0.5, 1],
            "forced_node_accuracy": [1, accuracy, 1, 1, 1], "cheat_accuracy": 0.75,
            "goal_moved": {"turns": accuracy, "stays": 0.125},
        })
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(map(json.dumps, [header, *lines])))


def cells(table):
    """-> the rows below the head"""
    return [row.strip("| ").split(" | ") for row in table.splitlines()[2:]]


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.parent.name)
def test_the_pages_are_those_of_the_logs(page):
    assert tables.filled(page.read_text()) == page.read_text()


def test_tables_count_right(tmp_path, monkeypatch):
    """Of one solved run and one that was not."""
    monkeypatch.setattr(tables, "LOGS", tmp_path)
    write_log(tmp_path / "default" / "a.jsonl", 0, [0, 0.25, 0.5])
    write_log(tmp_path / "default" / "b.jsonl", 5, [0, 0.989, 0.99, 1])
    ends = ["1 of 2", "75.0 % (50.0 - 100.0)"]
    assert cells(tables.default_table()) == [
        ["`python train.py`", "0 of 1", "1 of 1", ends[1], "75.0 %", "250 (200 - 300)"]
    ]
    assert cells(tables.goal_table()) == [
        ["Transformer", "teacher-forced", "2", ends[1], "12.5 %"]
    ]
    for seed, accuracies in ((0, [0, 0.25, 0.5]), (1, [0, 0.989, 0.99, 1])):
        for folder in ("loops", "graphs", "cures/look_ahead"):
            name = tmp_path / folder / f"{seed}.jsonl"
            write_log(name, seed, accuracies, teacherless=True, n_layer=3, n_loop=2)
    row = ["Transformer", "3 x 2", "-", *ends, "75, 25, 50 %", "26k", "1,500"]
    assert cells(tables.loops_table()) == [row]
    row = ["G(2,5), 10 names", "`python train.py`", *ends, "75, 25, 50 %", "250 (200 - 300)"]
    assert cells(tables.graphs_table()) == [row]
    assert cells(tables.stages_table()) == []
    for seed in (0, 1):
        before = dict(deg=3, num_nodes=13, init_from=f"out/reproduce/graphs/{seed}")
        write_log(tmp_path / "graphs" / f"{seed + 2}.jsonl", seed, [0, seed], **before)
    assert cells(tables.graphs_table()) == [row]
    assert cells(tables.stages_table()) == [[
        "Transformer", "-", "teacher-forced", "G(3,5), 13 names", "G(2,5)", "1 of 2",
        "50.0 % (0.0 - 100.0)", "50, 25, 50 %", "100",
    ]]
    before = dict(teacherless=True, init_from="out/reproduce/graphs/0")
    write_log(tmp_path / "graphs" / "4.jsonl", 0, [0, 0.5], **before)  # not from scratch
    write_log(tmp_path / "long" / "c.jsonl", 1, [0, 0.5])
    assert cells(tables.long_table()) == [["`python train.py`", "1", "50.0 %", "100"]]
    assert cells(tables.cures_table()) == [
        ["G(2,5), 10 names", "Transformer", "teacher-forced", "0 of 1", "50.0 %", "-", "96k"],
        ["G(2,5), 10 names", "Transformer", "teacherless", *ends, "26k", "96k"],
        ["G(2,5), 10 names", "Transformer", "look ahead", *ends, "26k", "96k"],
    ]
    runs = cells(tables.runs_table())
    assert len(runs) == 12
    machine = "m, Python 3, torch 2"
    link = "[default/b.jsonl](logs/default/b.jsonl)"
    assert [link, "5", "100.0 %", "300", "3.0", "abc", machine] in runs


def test_a_damaged_log_is_refused(tmp_path):
    for text in ("", "{", "{}", '{"config": {}}\n{"iter": 0}', "[]\n[]"):
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(ValueError, match="a.jsonl is not a log of train.py"):
            tables.read_log(tmp_path / "a.jsonl")


def test_tables_are_filled_between_their_markers():
    table = tables.long_table()
    text = f"above\n<!-- table long -->\n{table}<!-- end of table -->\nbelow\n"
    assert tables.filled(text.replace(table, "old\n")) == text
    for wrong in (text.replace("table long", "table short"), text.replace("<!-- end", "<!-- and")):
        with pytest.raises(ValueError, match="table short|marker"):
            tables.filled(wrong)


def test_each_recorded_command_asks_for_the_recorded_run():
    """With the defaults of today. (Those of the exercises need their patches.)"""
    logs = [log for log in tables.read_logs("") if "exercises" not in log.file.parts]
    assert logs
    for log in logs:
        config = train.config_of(settings(*log.flags))
        del config["dtype"]                                     # resolved in the log
        for name in config:
            assert log.config.get(name) == config[name], (log.file, name)  # older ones lack some


def test_the_long_runs_still_guess():
    """After five times the steps of the teacherless run of the same seed."""
    for log in tables.read_logs("long"):
        name = "{model}-teacherless-seed{seed}.jsonl".format(**log.config)
        twin = tables.read_log(tables.LOGS / "default" / name)
        assert twin.solved_line is not None and log.end["iter"] >= 5 * twin.end["iter"], log.file
        args = settings(*log.flags)
        assert train.is_guess(log.end["node_accuracy"][1], args, args.n_test), log.file


# ---- reproduce.py


@pytest.fixture
def project(monkeypatch, tmp_path):
    """A copy of the code, in which reproduce.py works. It has no records yet."""
    monkeypatch.setattr(reproduce, "PROJECT", copy_code(tmp_path / "project"))
    monkeypatch.setattr(reproduce, "LOGS", tmp_path / "logs")
    (tmp_path / "logs").mkdir()
    return tmp_path


def test_runs_are_made_recorded_and_made_again(project, capfd):
    """One of them a cure's, in a copy of the code with its patch."""
    tiny = " ".join(map(str, TINY))
    file = project / "commands.txt"
    file.write_text(f"new/a: python train.py {tiny} --seed 3\n\n"
                    f"cures/look_ahead/b: python train.py {tiny} --seed 3\n")
    assert call(reproduce, "--commands", file, "--at_once", 2, "--record") == 0
    printed = capfd.readouterr().out
    assert printed.count("there is no record") == 2 and "iter " not in printed
    out = project / "project" / "out" / "reproduce"
    for name in ("new/a", "cures/look_ahead/b"):
        assert "iter     6" in (out / name / "screen.txt").read_text()
        record = tables.read_log(project / "logs" / f"{name}.jsonl")
        assert record.end["iter"] == 6 and record.config["seed"] == 3
    cure = out / "cures" / "look_ahead" / "b"
    assert tables.read_log(cure / "log.jsonl").objective == "look ahead"
    weights = torch.load(cure / "ckpt.pt")["model"]
    assert any(name.startswith("heads.") for name in weights)

    shutil.rmtree(out)                                          # made again, from the records
    assert call(reproduce, "new/") == 0
    printed = capfd.readouterr().out
    assert "iter     6" in printed and "the record is the same" in printed
    assert not (out / "cures").exists()

    log = out / "new" / "a" / "log.jsonl"                       # killed before its last line
    whole = log.read_text().splitlines(keepends=True)
    log.write_text("".join(whole[:-1]))
    assert call(reproduce, "new/a") == 0
    printed = capfd.readouterr().out
    assert "iter " not in printed and "the record is the same" in printed
    assert log.read_text() == "".join(whole)

    record = project / "logs" / "new" / "a.jsonl"
    end = json.loads(whole[-1])
    record.write_text("".join(whole[:-1]) + json.dumps(end | {"train_loss": 1.0}))
    assert call(reproduce, "new/a") == 0
    assert "the record differs" in capfd.readouterr().out
    header = json.loads(whole[0])
    record.write_text(json.dumps(header | {"data": "others"}) + "\n" + "".join(whole[1:]))
    assert call(reproduce, "new/a") == 0
    assert "on other graphs" in capfd.readouterr().out
    header["command"] += " --lr 0.1"
    record.write_text(json.dumps(header) + "\n" + "".join(whole[1:]))
    assert "other flags" in refusal(capfd, reproduce, "new/a")


def test_what_cannot_be_made_is_refused(project, capsys):
    write_log(project / "logs" / "a.jsonl", 0, [0.5])
    log = (project / "logs" / "a.jsonl").read_text()
    log = log.replace("out/x", "out/x && python train.py --resume out/x --max_iters 9")
    (project / "logs" / "a.jsonl").write_text(log)
    assert "was extended" in refusal(capsys, reproduce, "a")
    assert "there is no record b" in refusal(capsys, reproduce, "b")
    assert "which runs" in refusal(capsys, reproduce)
    file = project / "commands.txt"
    for line in ("a python train.py", "a: rm", "../a: python train.py", "/a: python train.py"):
        file.write_text(line)
        assert "is not of the form" in refusal(capsys, reproduce, "--commands", file)
    assert not (project / "project" / "out").exists()


def test_a_failed_run_is_told(project, capfd):
    file = project / "commands.txt"
    file.write_text("a: python train.py --deg 0\n")
    assert call(reproduce, "--commands", file, "--record") == 1
    assert "a failed\n" in capfd.readouterr().err
    assert not list((project / "logs").iterdir())


def test_the_list_names_every_record(capsys):
    assert call(reproduce, "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(tables.LOGS.rglob("*.jsonl")))
    line, = [line for line in lines if line.startswith("cures/look_ahead/gpt-deg2-len5-seed0 ")]
    assert "python train.py --model gpt" in line and "with look_ahead.patch" in line


# ---- The scripts


def test_no_script_works_at_import():
    """Importing the scripts prints nothing, and needs no arguments."""
    names = [file.stem for file in HERE.glob("*.py")]
    if importlib.util.find_spec("matplotlib") is None:
        names.remove("draw_figures")
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import {', '.join(sorted(names))}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.slow
def test_the_figures_are_those_of_the_logs(monkeypatch, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    import draw_figures
    figures = sorted((HERE / "figures").glob("*.svg"))
    if f"Matplotlib v{matplotlib.__version__}," not in figures[0].read_text():
        pytest.skip("they were drawn by another version of matplotlib")
    monkeypatch.setattr(draw_figures, "HERE", tmp_path)
    assert call(draw_figures) == 0
    assert len(figures) == 5
    for figure in figures:
        assert (tmp_path / "figures" / figure.name).read_bytes() == figure.read_bytes(), figure


class Through(torch.nn.Module):
    def forward(self, x):
        return x, None


class OneAhead(torch.nn.Module):
    """Has each node in the stream at the place before it, and answers from there."""

    def __init__(self):
        super().__init__()
        self.transformer = torch.nn.ModuleDict({"h": torch.nn.ModuleList([Through()])})

    def forward(self, idx, targets=None):
        paths = []
        for *edges, start, goal, _ in idx[:, :STAR.prefix_len].tolist():
            before = dict(zip(edges[1::3], edges[::3]))
            path = [goal]
            while path[0] != start:
                path.insert(0, before[path[0]])
            paths.append(path)
        paths = torch.tensor(paths)
        known = torch.nn.functional.one_hot(paths, STAR.vocab_size).float()
        x = 0.01 * torch.randn(*idx.shape, STAR.vocab_size)     # of full rank, as a stream is
        x[:, -5:-1] += known[:, 1:]
        x, _ = self.transformer.h[0](x)
        answers = torch.cat([known[:, :1], x[:, -5:-1]], dim=1)
        return torch.cat([torch.zeros_like(x[:, :-5]), answers], dim=1), torch.tensor(0.0)


def test_probes_find_what_is_where():
    """Each node is found at the place before it, and is wrong if that place is exchanged."""
    args, model = settings("--teacherless"), OneAhead()
    found = cells(probe.probes(args, STAR, model))              # hops 1 to 3, at start to hop 3
    right = cells(probe.exchanges(args, STAR, model))           # at start to hop 3, start to goal
    assert (len(found), len(right)) == (3, 4)
    for place, row in enumerate(found):
        percent = [int(cell.rstrip("%")) for cell in row[2:]]
        assert percent.pop(place) == 100 and max(percent) < 50
    for place, row in enumerate(right):
        percent = [int(cell.rstrip("%")) for cell in row[1:]]
        assert percent.pop(place + 1) < 50 and min(percent) == 100


# ---- The cures and the exercises


def patched_train(patch, folder):
    """train.py with a patch, as a module."""
    apply(patch, copy_code(folder / "code"))
    spec = importlib.util.spec_from_file_location("patched_train", folder / "code" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model", ["gpt", "mamba"])
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_cures_fit_and_train(patch, model, tmp_path):
    """The loss falls. A run can be resumed, and inference is one token at a time."""
    module = patched_train(patch, tmp_path)
    out = tmp_path / "run"
    given = [*TINY, "--model", model, "--n_embd", 32, "--max_iters", 40, "--eval_interval", 20]
    if patch.stem == "half_and_half":
        given.append("--teacherless")
    assert call(module, *given, "--lr", 0.003, "--out_dir", out) == 0
    _, first, last = tables.read_log(out / "log.jsonl").lines
    assert last["train_loss"] < first["train_loss"]
    assert call(module, "--resume", out, "--max_iters", 60) == 0
    assert tables.read_log(out / "log.jsonl").end["iter"] == 60
    if patch.stem == "half_and_half":
        return                                                  # it adds nothing to the model
    _, _, star, whole = module.load_checkpoint(out)
    prefixes = torch.from_numpy(data.draw(star, 5, np.random.default_rng(0))[0])
    tokens = prefixes
    for _ in range(3):
        logits, _ = whole(tokens)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(dim=2)], dim=1)
    assert torch.equal(whole.generate(prefixes, 3), tokens)
    if patch.stem != "belief_state":                            # inference drops what is added
        assert torch.equal(whole(prefixes)[0], whole.model(prefixes)[0])


@pytest.mark.parametrize("model", ["gpt", "mamba"])
def test_half_and_half_adds_both_losses(model, tmp_path):
    """The loss of the first step is the sum of those of the two objectives, from equal weights."""
    patched = patched_train(HERE / "cures" / "half_and_half.patch", tmp_path)
    given = [*TINY, "--model", model, "--max_iters", 1, "--eval_interval", 1]
    losses = []
    for i, (module, flags) in enumerate(
        ((patched, ["--teacherless"]), (train, ["--teacherless"]), (train, []))
    ):
        assert call(module, *given, *flags, "--out_dir", tmp_path / str(i)) == 0
        losses.append(tables.read_log(tmp_path / str(i) / "log.jsonl").end["train_loss"])
    assert losses[0] == pytest.approx(losses[1] + losses[2], abs=1e-5)


def cure(name, folder):
    """-> the model of a cure, a batch (idx, targets), and the states and logits on it"""
    module = patched_train(HERE / "cures" / f"{name}.patch", folder)
    torch.manual_seed(0)
    args = settings("--n_layer", 2, "--n_embd", 16, "--n_head", 2)
    whole = module.build_model(args, STAR).double()
    graphs = data.draw(STAR, 3, np.random.default_rng(0))
    solutions = train.prefixes_and_solutions(args, *graphs)
    idx, targets = train.inputs_and_targets(args, STAR, *solutions)
    h, _ = whole.model.hidden_states(idx)
    return whole, idx, targets, h, whole.model.lm_head(h)


def mean_of(terms):
    return torch.stack(terms).mean()


def losses_ahead(logits, targets, k):
    """-log p of the token k places after the next one, where there is one. logits (B, T, V)"""
    terms = []
    for b, t in np.ndindex(*targets.shape):
        if t + k < targets.size(1) and targets[b, t + k] >= 0:
            terms.append(-logits[b, t].log_softmax(0)[targets[b, t + k]])
    return mean_of(terms)


def path_positions(targets):
    """Where the model has to write: (sequence, position, all tokens from the next to the goal)"""
    for b, t in np.ndindex(*targets.shape):
        if targets[b, t] >= 0:
            yield b, t, targets[b, t:].tolist()


def assert_is_loss(whole, idx, targets, expected):
    _, loss = whole(idx, targets)
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=0)
    return loss


def test_look_ahead_is_its_equation(tmp_path):
    whole, idx, targets, h, logits = cure("look_ahead", tmp_path)
    expected = losses_ahead(logits, targets, 0)
    for k, head in enumerate(whole.heads, start=1):
        expected = expected + losses_ahead(whole.model.lm_head(head(h)), targets, k)
    assert len(whole.heads) == 3
    assert_is_loss(whole, idx, targets, expected)


def test_token_order_is_its_equation(tmp_path):
    """With the paper's scores W - j, here for a window of 7."""
    whole, idx, targets, h, logits = cure("token_order", tmp_path)
    terms = []
    for b, t, path in path_positions(targets):
        score = torch.full((STAR.vocab_size,), -math.inf)
        for j, token in enumerate(path, start=1):
            score[token] = 7 - j
        terms.append(-(score.softmax(0) * whole.order(h[b, t]).log_softmax(0)).sum())
    assert_is_loss(whole, idx, targets, losses_ahead(logits, targets, 0) + mean_of(terms))


def test_bag_of_words_is_its_equation(tmp_path):
    whole, idx, targets, h, logits = cure("bag_of_words", tmp_path)
    terms = []
    for b, t, path in path_positions(targets):
        p = whole.summary(h[b, t]).sigmoid()
        for token in range(STAR.vocab_size):
            terms.append(-(p[token] if token in path[1:] else 1 - p[token]).log())
    bag = STAR.vocab_size * mean_of(terms)
    assert_is_loss(whole, idx, targets, losses_ahead(logits, targets, 0) + bag)


def test_next_latent_is_its_equation(tmp_path):
    """Its value and its gradients: none through the targets, and none to the W that reads g."""
    whole, idx, targets, h, logits = cure("next_latent", tmp_path)
    weight = whole.model.lm_head.weight
    expected = losses_ahead(logits, targets, 0)
    for k in range(1, 4):
        near, kl = [], []
        for b, t in np.ndindex(3, idx.size(1) - k):
            g = h[b, t]
            for j in range(1, k + 1):
                g = g + whole.dynamics(torch.cat([weight[idx[b, t + j]], g]))
            gap = (g - h[b, t + k].detach()).abs()
            near.append(torch.where(gap < 1, gap ** 2 / 2, gap - 0.5).mean())
            if targets[b, t + k] >= 0:
                p = logits[b, t + k].detach().softmax(0)
                q = (weight.detach() @ g).softmax(0)
                kl.append((p * (p / q).log()).sum())
        expected = expected + (mean_of(near) + mean_of(kl)) / 3
    loss = assert_is_loss(whole, idx, targets, expected)
    parameters = list(whole.parameters())
    others = torch.autograd.grad(expected, parameters)
    for gradient, other in zip(torch.autograd.grad(loss, parameters), others):
        torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-4)


def test_belief_state_is_its_equation(tmp_path):
    whole, idx, targets, h, _ = cure("belief_state", tmp_path)
    following, before = [], []
    for b, t, path in path_positions(targets):
        for c in range(1, len(path) + 1):                       # tokens from the next one
            tokens = [STAR.dollar, *reversed(path[c:])]
            end = whole.backward_model.hidden_states(torch.tensor([tokens]))[0][0, -1]
            next_logits, previous_logits = whole.head(torch.cat([h[b, t], end])).chunk(2)
            following.append(-next_logits.log_softmax(0)[path[0]])
            before.append(-previous_logits.log_softmax(0)[path[c - 1]])
    assert len(following) == 3 * 15
    assert_is_loss(whole, idx, targets, mean_of(following) + mean_of(before))


@pytest.mark.parametrize("patch", SOLUTIONS, ids=lambda patch: patch.stem)
def test_solutions_of_the_exercises_fit(patch, tmp_path):
    apply(patch, copy_code(tmp_path))


CHECKS = {"4": "gpt2 or cache or generation", "5": "scan and cpu and not memory", "6": "gru"}


@pytest.mark.slow
@pytest.mark.parametrize("patch", SOLUTIONS, ids=lambda patch: patch.stem)
def test_solutions_of_the_exercises(patch, tmp_path):
    """They pass the tests that README names for them, and train."""
    apply(patch, copy_code(tmp_path))
    for file in (".pytest.ini", "README.md"):
        shutil.copy(PROJECT / file, tmp_path)
    commands = [("train.py", *TINY, "--out_dir", "out/1")]
    commands.append(("train.py", *TINY, "--teacherless", "--model", "mamba", "--out_dir", "out/2"))
    if patch.stem[0] in CHECKS:
        commands.append(("-m", "pytest", "-k", CHECKS[patch.stem[0]], "test_all.py"))
    for command in commands:
        command = [sys.executable, *map(str, command)]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
