"""Makes a page to ask two models, and to see what others answered at each step of their training.

    python results/explore.py                      results/explore.html, from results/logs
    python results/explore.py out/RUN [out/RUN2]   out/RUN/explore.html, from runs of your own
    python results/explore.py --live out/A out/B   takes the models to ask from these runs

The page is explore_template.html with all that in it, as JSON. It needs no network. The models to
ask come in pairs of an architecture, the teacher-forced one first. Their matrices are stored as
int8 with a scale for each row, in live_models.json.
"""
import argparse
import base64
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import torch  # noqa: E402

from data import find_arms, parse_graph, run_script  # noqa: E402
from sample import unseen_graphs  # noqa: E402
from tables import LOGS, PATCHES, Log, read_log  # noqa: E402
from train import (  # noqa: E402
    TASK, load_checkpoint, predict, prefixes_and_solutions, summary
)

LIVE_MODELS = HERE / "live_models.json"
N_JUDGED = 1000         # new graphs, to see that int8 does no harm


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
    command = f"{log.command} --seed {log.config['seed']}"
    patch = log.objective.replace(" ", "_")
    if patch in PATCHES:
        command += f", with results/cures/{patch}.patch"
    names = ("seed", "deg", "num_nodes", "n_layer", "n_loop")
    settings = {name: log.config[name] for name in names}
    return {
        "model": log.model,
        "objective": log.objective,
        "command": command,
        **settings,
        "init_from": log.config.get("init_from"),
        "n_test": log.config["n_test"],
        "graphs": graphs,
        "evaluations": evaluations,
    }


# ---- Models to ask


def in_base64(x):
    return base64.b64encode(x.numpy().tobytes()).decode()


def quantize(x):
    """A tensor for the page, a dict, and the tensor that the page makes of it.

    Matrices of 32 and more columns become int8, with a scale for each row. The others are small,
    or sensitive.
    """
    if x.dim() < 2 or x.size(1) < 32:
        return {"float32": in_base64(x)}, x
    scale = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    numbers = torch.round(x / scale).to(torch.int8)
    return {"int8": in_base64(numbers), "scale": in_base64(scale)}, numbers * scale


def live_model(folder):
    """The model of a run, for the page, a dict. Raises OSError and ValueError as load_checkpoint.

    ValueError, too, if the page cannot run it.
    """
    ckpt, args, star, model = load_checkpoint(folder)
    if args.model not in ("gpt", "mamba") or args.reverse or args.only_first_hop:
        raise ValueError(f"the page cannot run the model of {folder}")
    graphs = unseen_graphs(N_JUDGED, 0, ckpt, args)

    def accuracy():
        answers, _, _ = predict(args, star, model, *prefixes_and_solutions(args, *graphs))
        return summary(args, answers, None, graphs[1])["accuracy"]

    before = accuracy()
    tensors, weights = {}, {}
    for name, x in model.state_dict().items():
        tensors[name], weights[name] = quantize(x)
    del tensors["lm_head.weight"]                               # tied to the embedding
    model.load_state_dict(weights)
    after = accuracy()
    log = Log(folder, ckpt["header"], ckpt["lines"])
    names = [
        "n_layer", "n_loop", "n_head", "d_state", "deg", "path_len", "num_nodes", "teacherless"
    ]
    config = {name: log.config[name] for name in names}
    if args.model == "mamba":
        config.update(d_conv=model.config.d_conv, dt_rank=model.config.dt_rank)
    return {
        "model": args.model,
        "title": f"{log.model}, {log.objective}",
        "objective": log.objective,
        "about": f"The run with seed {log.config['seed']} below. Right in {100 * after:.1f} % of "
        f"{N_JUDGED:,} new graphs.",
        "accuracy": {"float32": before, "int8": after},
        "command": f"{log.command} --seed {log.config['seed']}",
        "commit": log.header["commit"],
        "machine": log.header["machine"],
        "config": config,
        "tensors": tensors,
    }


# ---- The page


def page(logs, folder, live_models=()):
    """The page for these logs, {name: Log}, and models, as text, to lie in a folder."""
    runs = {name: run_for_page(log) for name, log in logs.items()}
    data = json.dumps({"runs": runs, "live": list(live_models)}, separators=(",", ":"))
    text = (HERE / "explore_template.html").read_text()
    text = text.replace("PATH_OF_README", os.path.relpath(HERE.parent / "README.md", folder))
    return text.replace("/* the runs */", data.replace("</", "<\\/"))  # no end of the script


def recorded_logs():
    """-> {name: Log} of default runs with seeds 0 and 1, and of other graphs and cures, seed 0"""
    logs = {}
    for pattern in ("default/*-seed[01]", "graphs/*-seed0", "cures/*/*-seed0"):
        for file in sorted(LOGS.glob(pattern + ".jsonl")):
            logs["-".join(file.relative_to(LOGS).with_suffix("").parts[1:])] = read_log(file)
    return logs


def main():
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, help="of runs")
    parser.add_argument("--live", nargs="+", type=Path, metavar="OUT", help="of the models to ask")
    args = parser.parse_args()
    folders = args.folders
    try:
        if args.live is not None:
            models = [live_model(folder) for folder in args.live]
            tasks = {tuple(model["config"][name] for name in TASK) for model in models}
            if len(tasks) > 1:
                raise ValueError("the models are of different tasks")
            LIVE_MODELS.write_text(json.dumps(models, indent=1) + "\n")
            for model in models:
                print(model["title"], model["accuracy"])
        live_models = []
        if folders:
            logs = {str(folder): read_log(folder / "log.jsonl") for folder in folders}
            out = folders[0] / "explore.html"
        else:
            logs = recorded_logs()
            live_models = json.loads(LIVE_MODELS.read_text())
            out = HERE / "explore.html"
        text = page(logs, out.parent, live_models)
        out.write_text(text)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{out}, {len(text) / 1000:.0f} KB")


if __name__ == "__main__":
    run_script(main)
