"""Makes explore_data.js, which the page results/explore.html loads.

    python results/scripts/explore_data.py                  results/explore_data.js
    python results/scripts/explore_data.py OUT OUT OUT OUT  the same, with the models of these runs
    python results/scripts/explore_data.py OUT              OUT/explore.html, a page of your own run

The page asks a Mamba and a Transformer, each trained teacher-forced and teacherless (by default the
runs of seed 0 in out/reproduce/default), and replays the recorded default runs. README's picture:

    chromium --headless --hide-scrollbars --window-size=1280,690 \\
        --screenshot=results/figures/explore.png "file://$PWD/results/explore.html#step=2&pass=2"
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
N_EXAMPLES = 4                  # test graphs of a recorded run that the page shows
N_CANDIDATES = 100              # graphs among which is one to open the page with


@torch.no_grad()
def passes(model, star, teacherless, prefixes):
    """The logits at each place of the path after each pass (n_loop, n, path_len, vocab_size).

    What a looped model says after pass k is what the same model says with n_loop = k.
    """
    idx, n_loop = torch.from_numpy(prefixes), model.config.n_loop
    if teacherless:
        idx = torch.cat([idx, idx.new_full((len(idx), star.path_len - 1), star.dollar)], dim=1)
    else:
        idx = model.generate(idx, star.path_len)[:, :-1]        # it reads what it wrote
    logits = []
    for model.config.n_loop in range(1, n_loop + 1):
        logits.append(model(idx)[0][:, -star.path_len:])
    return torch.stack(logits)


def stored(x):
    """A tensor for the page: a matrix of 32 and more columns as int8, with a scale for each row."""
    def in_base64(x):
        return base64.b64encode(x.numpy().tobytes()).decode()

    if x.dim() < 2 or x.size(1) < 32:
        return {"float32": in_base64(x)}
    scale = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    return {"int8": in_base64(torch.round(x / scale).to(torch.int8)), "scale": in_base64(scale)}


def model_for_page(ckpt, args, star, model):
    header, weights = ckpt["header"], model.state_dict()
    del weights["lm_head.weight"]                               # tied to the embedding
    made_by = {name: header.get(name) for name in ("command", "commit", "versions", "machine")}
    return {
        "kind": args.model, "objective": OBJECTIVES[args.teacherless], "seed": args.seed,
        "config": {**vars(model.config), **vars(star), "teacherless": args.teacherless},
        "made_by": made_by, "tensors": {name: stored(x) for name, x in weights.items()},
    }


def telling_graph(left, right):
    """A graph, as text. The left model walks the wrong arm, as unsure as can be, and its first hop
    stays if the goal is moved. The right one finds both paths, from the goal back."""
    prefixes, paths = draw(left[2], N_CANDIDATES, np.random.default_rng(0))
    moved, others = move_goals(prefixes)
    (says, says_moved), (finds, finds_moved) = [
        [passes(model, star, args.teacherless, graphs) for graphs in (prefixes, moved)]
        for _, args, star, model in (left, right)]
    hops, known = says[-1].argmax(2).numpy(), finds.argmax(3).numpy() == paths
    tells = (hops == others)[:, :-1].all(1) & known[-1].all(1) & ~known[0, :, 1:-1].any(1)
    tells &= (known[:, :, 1:-1] <= known[:, :, 2:]).all((0, 2))
    tells &= says_moved[-1, :, 1].argmax(1).numpy() == hops[:, 1]
    tells &= (finds_moved[-1].argmax(2).numpy() == others).all(1)
    if not tells.any():
        raise ValueError("no graph tells the two models apart: did both learn?")
    sure = says[-1, :, 1].softmax(1).amax(1).numpy()
    return to_text(prefixes[np.where(tells, sure, 2).argmin()].tolist())


def run_for_page(header, lines):
    config, examples = header["config"], slice(N_EXAMPLES)
    return {
        "kind": config["model"], "seed": config["seed"],
        "objective": "reverse" if config["reverse"] else OBJECTIVES[config["teacherless"]],
        "graphs": header["graphs"][examples],
        "evaluations": [{
            "at": line["iter"], "accuracy": line["accuracy"], "nodes": line["node_accuracy"],
            "forced": line["forced_node_accuracy"],
            "answers": [sample["answer"] for sample in line["samples"][examples]],
            "p": [sample["p_first_hop"] for sample in line["samples"][examples]],
        } for line in lines],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="OUT", help="the folder of a run")
    folders = parser.parse_args().folders or DEFAULT_RUNS
    out = folders[0] if len(folders) == 1 else RESULTS
    try:
        runs = [load_checkpoint(folder) for folder in folders]
        if any(args.reverse or args.only_first_hop for _, args, _, _ in runs):
            raise ValueError("the page asks models that write a path from its start, as a whole")
        pairs = [(left, right) for left in runs for right in runs
                 if left[1].model == right[1].model and left[1].teacherless < right[1].teacherless]
        telling = {left[1].model: telling_graph(left, right) for left, right in pairs}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    logs = [(ckpt["header"], *ckpt["lines"]) for ckpt, _, _, _ in runs]
    if out == RESULTS:
        files = [file for objective in (*OBJECTIVES, "reverse")
                 for file in sorted((RESULTS / "logs/default").glob(f"*-{objective}-seed*.jsonl"))]
        logs = [map(json.loads, file.open()) for file in files]
    data = {"models": [model_for_page(*run) for run in runs], "telling": telling,
            "runs": [run_for_page(header, lines) for header, *lines in logs]}
    text = f"const DATA = {json.dumps(data, separators=(',', ':'))};\n"
    (out / "explore_data.js").write_text(text)
    if out != RESULTS:
        shutil.copy(RESULTS / "explore.html", out)
    print(f"{out / 'explore_data.js'}, {len(text) / 1000:.0f} KB; open {out / 'explore.html'}")


if __name__ == "__main__":
    main()
