"""The tests of this folder: its pages, records, scripts and patches."""
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")   # in models this small, threads wait for each other
import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).resolve().parent
sys.path.insert(0, str(SCRIPTS))
import probe
import reproduce
import tables
from tables import PROJECT, RESULTS                             # makes these importable
import data
import train

STAR = data.PathStar(2, 5, 10)
TINY = (
    "--n_layer", 1, "--n_embd", 16, "--n_train", 200, "--n_test", 20, "--batch_size", 8,
    "--max_iters", 6, "--eval_interval", 3, "--device", "cpu",
)
EXERCISES = [patch.stem for patch in sorted((RESULTS / "patches").glob("[0-9]*.patch"))]


def call(module, *flags):
    """Runs a script in this process -> its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, flags)])
        try:
            module.main()
        except SystemExit as stop:
            return stop.code or 0
    return 0


def settings(*flags):
    """The settings of a run that is started with these flags."""
    args = train.make_parser().parse_args(list(map(str, flags)))
    train.resolve(args)
    return args


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.parent.name)
def test_the_pages_are_those_of_the_logs(page):
    assert tables.filled(page.read_text()) == page.read_text()


@pytest.mark.parametrize("name, row", [     # recomputed from the logs by other code
    ("default", "`python train.py --model mamba` | 0 of 5 | 0 of 5 | 49.7 % (46.0 - 54.2) | "
                "99.8 % (98.4 - 100.0) | 1,200"),
    ("long", "teacher-forced | G(2,5), 10 names | Transformer | 20,000 | 9,000 (8,500 - 9,500) | "
             "0 of 2 | 50.9 % (49.6 - 52.2) | 100.0 % (99.9 - 100.0) | 0.068 (0.049 - 0.087) | "
             "0.220 (0.180 - 0.260)"),
    ("loops", "`--model mamba --n_layer 6 --n_loop 1 --max_iters 3000` | 3 of 5 | "
              "83.6 % (49.2 - 99.8) | 84, 100, 100 % | 42k"),
    ("graphs", "G(10,5), 43 names |  | after G(5,5): 93.6; after G(7,5): 98.1, 99.4 |  | "),
    ("cures", "look ahead | 1 of 3 | 73.8 % (51.8 - 100.0) | 179k | 3 of 3 | 99.7 % (99.6 - 100.0) "
              "| 64k"),
])
def test_tables_count_right(name, row):
    assert f"| {row} |\n" in tables.table(name)
    page = "above\n<!-- table {} -->\n{}<!-- end of table -->\nbelow\n"
    assert tables.filled(page.format(name, "old\n")) == page.format(name, tables.table(name))


def test_tables_take_up_new_folders_of_logs(tmp_path, monkeypatch):
    log = tables.LOGS / "graphs" / "mamba-teacherless-deg2-len5-names23-seed0.jsonl"
    monkeypatch.setattr(tables, "LOGS", tmp_path)
    for folder, table in (("names50", "names50"), ("passes", "loops")):
        assert tables.table(table) == ""
        (tmp_path / folder).mkdir()
        shutil.copy(log, tmp_path / folder)
        assert "| 0 of 1 | 23.6 % | 49, 48, 100 % |" in tables.table(table)


def test_the_figures_are_those_of_the_logs(monkeypatch, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    import figures
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    assert call(figures) == 0
    kept = sorted((RESULTS / "figures").glob("*.svg"))
    assert [file.name for file in kept] == sorted(file.name for file in tmp_path.iterdir())
    if f"Matplotlib v{matplotlib.__version__}," in kept[0].read_text():  # others draw other bytes
        for file in kept:
            assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file


def test_each_recorded_command_asks_for_the_recorded_run():
    """With the defaults of today. (Those of the exercises need their patches.)"""
    for name, flags in reproduce.recorded_flags([""]).items():
        log = tables.read_log(tables.LOGS / f"{name}.jsonl")
        if not name.startswith("exercises") and reproduce.obstacle(name) is None:
            config = vars(settings(*flags))
            for key in config.keys() & log.config.keys():
                assert log.config[key] == config[key], (name, key)


def test_runs_are_made_recorded_and_made_again(monkeypatch, tmp_path, capfd):
    """In a copy of the code without records. One run is a cure's, in a copy with its patch."""
    monkeypatch.setattr(reproduce, "PROJECT", copy_code(tmp_path / "project"))
    monkeypatch.setattr(reproduce, "LOGS", tmp_path / "logs")
    tiny = " ".join(map(str, TINY))
    file = tmp_path / "commands.txt"
    file.write_text(f"new/a: python train.py {tiny} --seed 3\n\n"
                    f"cures/look_ahead/b: python train.py {tiny} --seed 3\n")
    assert call(reproduce, "--commands", file, "--record") == 0
    assert capfd.readouterr().out.count("there is no record") == 2
    out = tmp_path / "project" / "out" / "reproduce"
    record = tmp_path / "logs" / "new" / "a.jsonl"
    assert "commit" in tables.read_log(record).header
    assert "heads.0.weight" in torch.load(out / "cures" / "look_ahead" / "b" / "ckpt.pt")["model"]

    shutil.rmtree(out)
    assert call(reproduce, "new/") == 0
    printed = capfd.readouterr().out
    assert "iter     6" in printed and "the record is the same" in printed
    log = tables.read_log(out / "new" / "a" / "log.jsonl")
    header, *lines = [json.loads(line) for line in record.read_text().splitlines()]
    for other, says in (
        ((header, lines[0], lines[1] | {"lr": 0}, lines[2]), "differs from step 3 on"),
        ((header, *lines[:2]), "differs from step 6 on"),
        ((header | {"graphs": []}, *lines), "other graphs"),
    ):
        record.write_text("\n".join(map(json.dumps, other)))
        assert says in reproduce.compare(log, record)


def test_records_that_cannot_be_made_again_are_told_apart(capsys):
    assert call(reproduce, "graphs/gpt-teacherless-deg3-len5-after-deg2-seed2") == 0
    assert "can't be made again: only commit 428629b" in capsys.readouterr().out
    same_names = "graphs/gpt-teacherless-reverse-deg2-len5-from-forward-seed2"
    assert reproduce.obstacle(same_names) is None


def test_the_list_names_every_record_and_its_reader_may_stop():
    command = f"'{sys.executable}' '{SCRIPTS / 'reproduce.py'}' --list"
    for command, lines in ((command, len(list(tables.LOGS.rglob("*.jsonl")))),
                           (f"{command} | head -n 2", 2)):
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert (done.stdout.count("\n"), done.stderr) == (lines, "")


def test_probes_have_graphs_of_their_own():
    """Not those of train.py, [seed, 0..2], of data.py, [seed, 3], or of sample.py, [seed, 4]."""
    inputs, _ = probe.graphs(settings("--teacherless", "--seed", 99), STAR)
    for stream in range(5):
        prefixes, _ = data.draw(STAR, len(inputs), np.random.default_rng([99, stream]))
        assert inputs[0, :STAR.prefix_len].tolist() != prefixes[0].tolist()


def copy_code(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for file in PROJECT.glob("*.py"):
        shutil.copy(file, folder)
    return folder


def patched_code(patch, folder):
    """A copy of the code in a folder, with a patch that has to fit without fuzz."""
    command = ["patch", "-p1", "-F0", "-i", RESULTS / "patches" / f"{patch}.patch"]
    subprocess.run(command, cwd=copy_code(folder), check=True)
    return folder


def patched_train(patch, folder):
    """train.py with a patch, as a module."""
    file = patched_code(patch, folder / "code") / "train.py"
    spec = importlib.util.spec_from_file_location("patched_train", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model", ["gpt", "mamba"])
@pytest.mark.parametrize("patch", tables.PATCHES)
def test_cures_fit_and_train(patch, model, tmp_path):
    """The loss falls. Inference without a cache writes the same tokens, one at a time."""
    module, out = patched_train(patch, tmp_path), tmp_path / "run"
    way = ["--teacherless"] if patch == "half_and_half" else []
    given = [*TINY, "--model", model, "--n_embd", 32, "--max_iters", 40, "--eval_interval", 20]
    assert call(module, *given, *way, "--lr", 0.003, "--out_dir", out) == 0
    _, first, last = tables.read_log(out / "log.jsonl").lines
    assert last["train_loss"] < first["train_loss"]
    whole = module.load_checkpoint(out)[-1]
    prefixes = torch.from_numpy(data.draw(STAR, 5, np.random.default_rng(0))[0])
    tokens = prefixes
    for _ in range(3):
        logits, _ = whole(tokens)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(dim=2)], dim=1)
    assert torch.equal(whole.generate(prefixes, 3), tokens)


def batch():
    """-> inputs and targets, teacher-forced"""
    prefixes, paths = map(torch.from_numpy, data.draw(STAR, 3, np.random.default_rng(0)))
    idx = torch.cat([prefixes, paths[:, :-1]], dim=1)
    return idx, torch.cat([torch.full_like(prefixes[:, 1:], -1), paths], dim=1)


def cure(name, folder):
    """-> the model of a cure, a batch (idx, targets), and the states and logits on it"""
    torch.manual_seed(0)
    args = settings("--n_layer", 2, "--n_embd", 16, "--n_head", 2)
    whole = patched_train(name, folder).build_model(args, STAR).double()
    idx, targets = batch()
    h, _ = whole.model.hidden_states(idx)
    return whole, idx, targets, h, whole.model.lm_head(h)


@pytest.mark.parametrize("model", ["gpt", "mamba"])
def test_half_and_half_adds_both_losses(model, tmp_path):
    """The loss of the first step is the sum of those of the two objectives, from equal weights."""
    given = [*TINY, "--model", model, "--max_iters", 1, "--eval_interval", 1]
    losses = []
    for module, way in ((patched_train("half_and_half", tmp_path), ["--teacherless"]),
                        (train, ["--teacherless"]), (train, [])):
        out = tmp_path / str(len(losses))
        assert call(module, *given, *way, "--out_dir", out) == 0
        losses.append(tables.read_log(out / "log.jsonl").end["train_loss"])
    assert losses[0] == pytest.approx(losses[1] + losses[2], abs=1e-5)


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


@pytest.mark.parametrize("patch", EXERCISES)
def test_solutions_of_the_exercises_fit(patch, tmp_path):
    patched_code(patch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name, tests", [
    ("4_attention", "gpt2 or cache or generation"), ("5_backward", "scan and cpu and not memory"),
    ("6_gru", "gru"),
])
def test_solutions_of_the_exercises_pass_the_tests_that_readme_names(name, tests, tmp_path):
    patched_code(name, tmp_path)
    for file in (".pytest.ini", "README.md"):
        shutil.copy(PROJECT / file, tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-k", tests, "test_all.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
