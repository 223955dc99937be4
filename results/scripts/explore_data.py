"""Makes explore_data.js, which the page results/explore.html loads.

    python results/scripts/explore_data.py                     results/explore_data.js
    python results/scripts/explore_data.py OUT OUT OUT OUT     the same, with the models of these runs
    python results/scripts/explore_data.py OUT                 OUT/explore_data.js, a page of one run

The page asks four models, a Mamba and a Transformer, each trained teacher-forced and teacherless,
and replays every recorded default run. Without folders, the models are those of seed 0 that
reproduce.py leaves in out/reproduce/default. For a run of your own, the page is copied beside its
data: open OUT/explore.html.

The picture of README is the page itself, in chromium:

    chromium --headless --hide-scrollbars --window-size=1280,720 \\
        --screenshot=results/figures/explore.png "file://$PWD/results/explore.html#step=2&pass=3"
"""
import argparse
import base64
import json
import shutil
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent
ROOT = RESULTS.parent
sys.path.insert(0, str(ROOT))
import numpy as np  # noqa: E402
import torch  # noqa: E402

from data import draw, move_goals, to_text  # noqa: E402
from train import load_checkpoint  # noqa: E402

OBJECTIVES = ("teacher_forced", "teacherless")
RUNS = [ROOT / f"out/reproduce/default/{model}-{objective}-seed0"
        for model in ("mamba", "gpt") for objective in OBJECTIVES]
SIZES = ("n_layer", "n_loop", "n_head", "d_state", "d_conv", "dt_rank")
N_EXAMPLES = 4          # test graphs of a recorded run, with the answers over its training
N_JUDGED = 1000         # random graphs, to find a telling one and to see that int8 does no harm


def in_base64(x):
    return base64.b64encode(x.numpy().tobytes()).decode()


def quantize(x):
    """A tensor for the page, and the tensor that the page makes of it.

    Matrices of 32 and more columns become int8, with a scale for each row. The others are small,
    or sensitive.
    """
    if x.dim() < 2 or x.size(1) < 32:
        return {"float32": in_base64(x)}, x
    scale = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    numbers = torch.round(x / scale).to(torch.int8)
    return {"int8": in_base64(numbers), "scale": in_base64(scale)}, numbers * scale


class Pupil:
    """A model as the page will have it, in int8, with the run that made it."""

    def __init__(self, folder):
        ckpt, args, self.star, self.model = load_checkpoint(folder)
        if args.reverse or args.only_first_hop:
            raise ValueError(f"{folder}: the page asks models that write the path from its start")
        self.kind, self.teacherless = args.model, args.teacherless
        self.objective = OBJECTIVES[args.teacherless]
        self.header, self.lines = ckpt["header"], ckpt["lines"]
        self.tensors, weights = {}, {}
        for name, x in self.model.state_dict().items():
            self.tensors[name], weights[name] = quantize(x)
        del self.tensors["lm_head.weight"]                      # tied to the embedding
        prefixes, paths = draw(self.star, N_JUDGED, np.random.default_rng(N_JUDGED))
        judged = [(self.passes(prefixes)[-1].argmax(2).numpy() == paths).all(1).mean()]
        self.model.load_state_dict(weights)
        judged.append((self.passes(prefixes)[-1].argmax(2).numpy() == paths).all(1).mean())
        print(f"{folder}: {judged[0]:.1%} right on {N_JUDGED} graphs, {judged[1]:.1%} in int8")

    @torch.no_grad()
    def passes(self, prefixes):
        """What each place says after each pass: logits (n_loop, n, path_len, vocab_size)

        A looped model that stops after 1, 2, ... passes is the same model with a smaller n_loop.
        """
        model, star, idx = self.model, self.star, torch.from_numpy(prefixes)
        if self.teacherless:
            dollars = idx.new_full((len(idx), star.path_len - 1), star.dollar)
            idx = torch.cat([idx, dollars], dim=1)
        else:
            idx = model.generate(idx, star.path_len)[:, :-1]    # it reads what it wrote
        logits = []
        for model.config.n_loop in range(1, model.config.n_loop + 1):
            logits.append(model(idx)[0][:, -star.path_len:])
        return torch.stack(logits)

    def for_page(self):
        sizes = {name: getattr(self.model.config, name, None) for name in SIZES}
        task = {name: getattr(self.star, name) for name in ("deg", "path_len", "num_nodes")}
        made_by = {name: self.header.get(name) for name in ("command", "commit", "versions", "machine")}
        return {
            "kind": self.kind, "objective": self.objective, "seed": self.header["config"]["seed"],
            "config": {**sizes, **task, "teacherless": self.teacherless}, "made_by": made_by,
            "tensors": self.tensors,
        }


def telling_graph(left, right):
    """A graph, as text, that shows what a teacher-forced and a teacherless model differ in.

    The left model walks the wrong arm, unsure of its first hop, which stays when the goal is moved.
    The right model finds both paths, one node after the other, from the goal back.
    """
    star = left.star
    prefixes, paths = draw(star, N_JUDGED, np.random.default_rng(N_JUDGED))
    moved, other_paths = move_goals(prefixes)
    left_says, right_says = left.passes(prefixes), right.passes(prefixes)
    hops, right_hops = left_says.argmax(3).numpy(), right_says.argmax(3).numpy()
    moved_hop = left.passes(moved)[-1].argmax(2).numpy()[:, 1]
    moved_path = right.passes(moved)[-1].argmax(2).numpy()
    unsure = left_says[-1, :, 1].softmax(1).amax(1).numpy() < 0.7
    known = right_hops == paths                                 # (n_loop, n, path_len)
    backwards = (known[:, :, 1:] >= known[:, :, :-1])[:, :, 1:].all((0, 2))
    backwards &= (known[1:] >= known[:-1]).all((0, 2)) & known[-1].all(1) & ~known[0, :, 1:-1].any(1)
    tells = (hops[-1] == other_paths).all(1) | (hops[-1, :, 1:-1] == other_paths[:, 1:-1]).all(1)
    tells &= unsure & backwards & (moved_hop == hops[-1, :, 1]) & (moved_path == other_paths).all(1)
    if not tells.any():
        raise ValueError("no graph tells the two models apart: one of them has not learned")
    return to_text(prefixes[tells.argmax()].tolist())


def recorded_run(header, lines):
    """What the page shows of a log: whole percents would hide the last 0.5 %, so one digit more."""
    def percents(shares):
        return None if shares is None else [round(100 * share, 1) for share in shares]

    config = header["config"]
    objective = "reverse" if config["reverse"] else OBJECTIVES[config["teacherless"]]
    return {
        "kind": config["model"], "objective": objective, "seed": config["seed"],
        "graphs": header["graphs"][:N_EXAMPLES],
        "evaluations": [{
            "at": line["iter"],
            "accuracy": round(100 * line["accuracy"], 1),
            "nodes": percents(line["node_accuracy"]),
            "forced": percents(line["forced_node_accuracy"]),
            "answers": [sample["answer"] for sample in line["samples"][:N_EXAMPLES]],
            "p": [sample["p_first_hop"] for sample in line["samples"][:N_EXAMPLES]],
        } for line in lines],
    }


def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="of runs")
    folders = parser.parse_args().folders
    try:
        models = [Pupil(folder) for folder in folders or RUNS]
        pairs = [(left, right) for left in models for right in models if left.kind == right.kind
                 and (left.teacherless, right.teacherless) == (False, True)]
        runs = [(model.header, model.lines) for model in models]
        out = folders[0] if len(folders) == 1 else RESULTS
        if out == RESULTS:
            logs = [file for objective in (*OBJECTIVES, "reverse")
                    for file in sorted((RESULTS / "logs/default").glob(f"*-{objective}-seed*"))]
            runs = [(lines[0], lines[1:]) for lines in
                    ([json.loads(line) for line in log.open()] for log in logs)]
        data = {
            "models": [model.for_page() for model in models],
            "telling": {left.kind: telling_graph(left, right) for left, right in pairs},
            "runs": [recorded_run(*run) for run in runs],
        }
    except (OSError, ValueError) as error:
        parser.error(str(error))
    text = f"const DATA = {json.dumps(data, separators=(',', ':'))};\n"
    (out / "explore_data.js").write_text(text)
    if out != RESULTS:
        shutil.copy(RESULTS / "explore.html", out)
    print(f"{out / 'explore_data.js'}, {len(text) / 1000:.0f} KB")


if __name__ == "__main__":
    main()
