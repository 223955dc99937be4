"""Makes explore_data.js, which the page results/explore.html loads.

    python results/scripts/explore_data.py [OUT OUT OUT OUT]  results/explore_data.js
    python results/scripts/explore_data.py OUT                OUT/explore.html, a page of one run

The page asks the models of four runs, teacher-forced and teacherless (by default those of seed 0 in
out/reproduce/default), and replays the recorded default runs. README's picture is the page:
chromium --headless --hide-scrollbars --window-size=1280,700 \\
--screenshot=results/figures/explore.png "file://$PWD/results/explore.html#models=gpt&step=2"
"""
import argparse
import base64
import json
import shutil
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(RESULTS.parent))
import numpy as np  # noqa: E402
import torch  # noqa: E402

from data import draw, move_goals, to_text  # noqa: E402
from train import load_checkpoint  # noqa: E402

OBJECTIVES = ("teacher_forced", "teacherless")
DEFAULT_RUNS = [RESULTS.parent / f"out/reproduce/default/{kind}-{objective}-seed0"
                for kind in ("mamba", "gpt") for objective in OBJECTIVES]
EXAMPLES = slice(4)     # test graphs of a recorded run that the page shows


@torch.no_grad()
def passes(model, star, teacherless, prefixes):
    """What each place of the path says after each pass: logits (n_loop, n, path_len, vocab_size)"""
    idx = torch.from_numpy(prefixes)
    if teacherless:
        idx = torch.cat([idx, idx.new_full((len(idx), star.path_len - 1), star.dollar)], dim=1)
    else:
        idx = model.generate(idx, star.path_len)[:, :-1]        # it reads what it wrote
    return torch.stack([model(idx)[0][:, -star.path_len:]       # each pass, as if it were the last
                        for model.config.n_loop in range(1, model.config.n_loop + 1)])


def stored(x):
    """A tensor for the page: a matrix of 32 and more columns as int8, with a scale for each row."""
    parts = {"float32": x}
    if x.dim() == 2 and x.size(1) >= 32:
        scale = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        parts = {"int8": torch.round(x / scale).to(torch.int8), "scale": scale}
    return parts


def as_stored(model):
    """The model with the rounded weights, which are those that the page asks"""
    for x in model.state_dict().values():
        parts = stored(x)
        x.copy_(parts["float32"] if "float32" in parts else parts["int8"] * parts["scale"])
    return model


def as_text(x):
    return base64.b64encode(x.numpy().tobytes()).decode()


def model_for_page(ckpt, args, star, model):
    weights = {}
    for name, x in model.state_dict().items():
        if "lm_head" not in name:
            weights[name] = {part: as_text(y) for part, y in stored(x).items()}
    return {"kind": args.model, "objective": OBJECTIVES[args.teacherless], "seed": args.seed,
            "config": {**vars(model.config), **vars(star), "teacherless": args.teacherless},
            "made_by": ckpt["header"], "tensors": weights}


def telling_graph(left, right):
    """A graph, as text. The left model walks the wrong arm, and its first hop stays if the goal is
    moved, by more than a rounding. The right one finds both paths, from the goal back, as few nodes
    in a pass as can be."""
    prefixes, paths = draw(left[2], 100, np.random.default_rng(0))
    moved, others = move_goals(prefixes)
    (says, says_moved), (finds, finds_moved) = [
        [passes(model, star, args.teacherless, graphs) for graphs in (prefixes, moved)]
        for _, args, star, model in (left, right)]
    hops, known = says[-1].argmax(2).numpy(), finds.argmax(3).numpy() == paths
    tells = (hops == others)[:, :-1].all(1) & known[-1].all(1) & ~known[0, :, 1:-1].any(1)
    tells &= (known[:, :, 1:-1] <= known[:, :, 2:]).all((0, 2))
    tells &= says_moved[-1, :, 1].argmax(1).numpy() == hops[:, 1]
    first, second = torch.stack([says, says_moved])[:, -1, :, 1].softmax(2).topk(2).values.unbind(2)
    tells &= (first - second > 0.01).all(0).numpy()
    tells &= (finds_moved[-1].argmax(2).numpy() == others).all(1)
    if not tells.any():
        raise ValueError("no graph tells the two models apart: did both learn?")
    at_once, sure = np.diff(known.sum(2), axis=0).max(0), first[0].numpy()
    return to_text(prefixes[np.where(tells, at_once + sure, np.inf).argmin()].tolist())


def run_for_page(header, lines):
    config = header["config"]
    objective = "reverse" if config["reverse"] else OBJECTIVES[config["teacherless"]]
    evaluations = [{
        "at": line["iter"], "accuracy": line["accuracy"],
        "nodes": line["node_accuracy"], "forced": line["forced_node_accuracy"],
        "answers": [sample["answer"] for sample in line["samples"][EXAMPLES]],
        "p": [sample["p_first_hop"] for sample in line["samples"][EXAMPLES]],
    } for line in lines]
    return {"kind": config["model"], "objective": objective, "seed": config["seed"],
            "graphs": header["graphs"][EXAMPLES], "evaluations": evaluations}


def main():
    parser = argparse.ArgumentParser(description="Makes the data of results/explore.html.")
    parser.add_argument("folders", nargs="*", type=Path, metavar="OUT", help="the folder of a run")
    folders = parser.parse_args().folders or DEFAULT_RUNS
    out = folders[0] if len(folders) == 1 else RESULTS
    torch.set_num_threads(1)                                    # small models: more would wait
    try:
        runs = [(*run[:3], as_stored(run[3])) for run in map(load_checkpoint, folders)]
        if any(args.reverse or args.only_first_hop for _, args, _, _ in runs):
            raise ValueError("the page asks models that write a path from its start, as a whole")
        telling = {run[1].model: telling_graph(run, other) for run in runs for other in runs if
                   run[1].model == other[1].model and run[1].teacherless < other[1].teacherless}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if out == RESULTS:
        logs = [map(json.loads, file.open()) for objective in (*OBJECTIVES, "reverse")
                for file in sorted((RESULTS / "logs/default").glob(f"*-{objective}-seed*"))]
    else:
        logs = [(ckpt["header"], *ckpt["lines"]) for ckpt, _, _, _ in runs]
        shutil.copy(RESULTS / "explore.html", out)
    data = {"models": [model_for_page(*run) for run in runs], "telling": telling,
            "runs": [run_for_page(header, lines) for header, *lines in logs]}
    text = json.dumps(data, separators=(",", ":"))
    (out / "explore_data.js").write_text(f"const DATA = {text};\n")
    print(f"{len(text) / 1000:.0f} KB; open {out / 'explore.html'}")


if __name__ == "__main__":
    main()
