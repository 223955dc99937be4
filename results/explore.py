"""Makes a page to play with recorded runs: what did the model answer, at each step of training?

    python results/explore.py                      results/explore.html, from the logs on record
    python results/explore.py out/RUN [out/RUN2]   out/RUN/explore.html, from runs of your own

The page is explore_template.html with the runs in it, as JSON. It needs no network.
"""
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from data import datasets, edges_of, find_arms  # noqa: E402
from reproduce import read_log  # noqa: E402
from table import MODELS, command_of_group  # noqa: E402

FIRST_SHOWN = ["mamba-teacher_forced-seed0", "mamba-teacherless-seed0"]


def objective_of(config):
    if config["only_first_hop"]:
        return "first hop only"
    if config["teacherless"]:
        return "teacherless, reversed" if config["reverse"] else "teacherless"
    return "reversed" if config["reverse"] else "teacher-forced"


def test_graphs(config, n):
    """The first n test graphs of a run -> [{"arms": lists of nodes, "path": the right one of them}]

    Every arm starts with the start of the graph.
    """
    n_train = config["n_train"] if config["train_file"] is not None else 0  # not drawn: not needed
    _, _, (prefixes, paths) = datasets(
        config["deg"], config["path_len"], config["num_nodes"], n_train, config["n_test"],
        config["seed"], config["train_file"], config["test_file"]
    )
    graphs = []
    for prefix, path in zip(prefixes[:n].tolist(), paths[:n].tolist()):
        graphs.append({"arms": find_arms(edges_of(prefix), path[0]), "path": path})
    return graphs


def from_start(config, shares):
    """The accuracies of the nodes, from start to goal, in percent. None stays None."""
    if shares is None:
        return None
    if config["reverse"]:
        shares = shares[::-1]
    return [round(100 * share, 1) for share in shares]


def run_for_page(file):
    """What the page shows of a log, or None for a log without the model's answers."""
    header, lines = read_log(file)
    if not lines or "samples" not in lines[0]:
        return None
    config = header["config"]
    evaluations = []
    for line in lines:
        evaluations.append({
            "step": line["iter"],
            "accuracy": round(100 * line["accuracy"], 1),
            "nodes": from_start(config, line["node_accuracy"]),
            "forced": from_start(config, line["forced_node_accuracy"]),
            "answers": [sample["answer"] for sample in line["samples"]],
            "first_hop": [sample["first_hop"] for sample in line["samples"]],
        })
    return {
        "model": MODELS.get(config["model"], config["model"]),
        "objective": objective_of(config),
        "seed": config["seed"],
        "command": f"{command_of_group(header['command'])} --seed {config['seed']}",
        "deg": config["deg"],
        "num_nodes": config["num_nodes"],
        "n_layer": config["n_layer"],
        "n_test": config["n_test"],
        "graphs": test_graphs(config, len(lines[0]["samples"])),
        "evaluations": evaluations,
    }


def page(files, first_shown, folder):
    """The page for these logs, {name: file}, as text, to lie in a folder.

    first_shown has the names of two of them. Raises ValueError if one has no answers in its log.
    """
    runs = {}
    for name, file in files.items():
        run = run_for_page(file)
        if run is not None:
            runs[name] = run
    for name in first_shown:
        if name not in runs:
            raise ValueError(f"the log of {name} does not have the model's answers")
    data = json.dumps({"first_shown": first_shown, "runs": runs}, separators=(",", ":"))
    text = (HERE / "explore_template.html").read_text()
    text = text.replace("PATH_OF_README", os.path.relpath(HERE.parent / "README.md", folder))
    return text.replace("/* the runs */", data.replace("</", "<\\/"))  # no end of the script


def recorded_logs():
    """-> {name: file}"""
    return {file.stem: file for file in sorted((HERE / "logs").glob("*.jsonl"))}


def main():
    folders = [Path(folder) for folder in sys.argv[1:]]
    if folders:
        files = {str(folder): folder / "log.jsonl" for folder in folders}
        first_shown = [str(folders[0]), str(folders[-1])]
        out = folders[0] / "explore.html"
    else:
        files = recorded_logs()
        first_shown = FIRST_SHOWN
        out = HERE / "explore.html"
    try:
        text = page(files, first_shown, out.parent)
    except (OSError, ValueError) as error:
        sys.exit(f"explore.py: {error}")
    out.write_text(text)
    print(f"{out}, {len(text) / 1000:.0f} KB")


if __name__ == "__main__":
    main()
