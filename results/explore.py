"""Makes a page to play with recorded runs: what did the model answer, at each step of training?

    python results/explore.py                      results/explore.html, from results/logs/default
    python results/explore.py out/RUN [out/RUN2]   out/RUN/explore.html, from runs of your own

The page is explore_template.html with the runs in it, as JSON. It needs no network.
"""
import argparse
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from data import find_arms, parse_graph, run_script  # noqa: E402
from tables import LOGS, read_log  # noqa: E402

FIRST_SHOWN = ["mamba-teacher_forced-seed0", "mamba-teacherless-seed0"]


def in_percent(shares):
    return None if shares is None else [round(100 * share, 1) for share in shares]


def run_for_page(log):
    """What the page shows of a log, a dict."""
    graphs = []
    for line in log.header["graphs"]:
        edges, path = parse_graph(line)
        graphs.append({"arms": find_arms(edges, path[0]), "path": path})
    evaluations = []
    for line in log.lines:
        evaluations.append({
            "step": line["iter"],
            "accuracy": round(100 * line["accuracy"], 1),
            "nodes": in_percent(line["node_accuracy"]),
            "forced": in_percent(line["forced_node_accuracy"]),
            "answers": [sample["answer"] for sample in line["samples"]],
            "p_first_hop": [sample["p_first_hop"] for sample in line["samples"]],
        })
    names = ("seed", "deg", "num_nodes", "n_layer", "n_loop")
    settings = {name: log.config[name] for name in names}
    return {
        "model": log.model,
        "objective": log.objective,
        "command": f"{log.command} --seed {log.config['seed']}",
        **settings,
        "n_test": log.config["n_test"],
        "graphs": graphs,
        "evaluations": evaluations,
    }


def page(logs, folder):
    """The page for these logs, {name: Log}, as text, to lie in a folder.

    It opens with the runs FIRST_SHOWN, or with the first and the last.
    """
    runs = {name: run_for_page(log) for name, log in logs.items()}
    first_shown = FIRST_SHOWN
    if not set(FIRST_SHOWN) <= set(runs):
        first_shown = [list(runs)[0], list(runs)[-1]]
    data = json.dumps({"first_shown": first_shown, "runs": runs}, separators=(",", ":"))
    text = (HERE / "explore_template.html").read_text()
    text = text.replace("PATH_OF_README", os.path.relpath(HERE.parent / "README.md", folder))
    return text.replace("/* the runs */", data.replace("</", "<\\/"))  # no end of the script


def recorded_logs():
    """-> {name: Log} of the default runs with seeds 0 and 1"""
    files = sorted((LOGS / "default").glob("*-seed[01].jsonl"))
    return {file.stem: read_log(file) for file in files}


def main():
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, help="of runs")
    folders = parser.parse_args().folders
    try:
        if folders:
            logs = {str(folder): read_log(folder / "log.jsonl") for folder in folders}
            out = folders[0] / "explore.html"
        else:
            logs = recorded_logs()
            out = HERE / "explore.html"
        for name, log in logs.items():
            if log.is_old:
                raise ValueError(f"the log of {name} does not have the graphs: it is too old")
        if not logs:
            raise ValueError("no log in results/logs/default has the graphs")
        text = page(logs, out.parent)
        out.write_text(text)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{out}, {len(text) / 1000:.0f} KB")


if __name__ == "__main__":
    run_script(main)
