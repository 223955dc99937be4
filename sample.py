"""Shows what a trained model does: its answers to a few graphs, and how often it is right on many.

    python sample.py --out_dir out/...                     on graphs that the run has never seen
    python sample.py --out_dir out/... --file graphs.txt   on graphs in text form, see data.py
    python sample.py --out_dir out/... --graph "0,1|2,3|1,4|0,2/0,4="

For each graph it prints
- the arms, with the probability that the model gives to setting out on each (one that writes from
  goal to start, token by token, has written the later nodes by then);
- the model's answer, and how sure it is of each node;
- what it predicts when it is forced, that is, when it reads the true nodes before each place.

Then come the shares of right answers, and one more question: when the goal moves to the end of
another arm, and nothing else changes, does the first hop follow it?
"""
import argparse
import json
import os
import sys
import time

import numpy as np

from data import (
    bounded, draw_unseen, edges_of, find_arms, graph_keys, non_negative_int, parse_graph,
    positive_int, prefix_tokens, read_graphs, run_script
)
from train import (
    fresh_graphs, goal_moved, load_checkpoint, load_graphs, objective_of, predict,
    prefixes_and_solutions, probabilities, summary, verdict
)

BLUE, ORANGE = 34, 33  # terminal colours: right, wrong


def unseen_graphs(n, seed, ckpt, args):
    """Draws graphs that the run has neither trained nor stopped on."""
    star, (train_prefixes, _), (test_prefixes, _) = load_graphs(args, ckpt["header"]["data"])
    test_keys = set(graph_keys(star, test_prefixes))
    seen = test_keys | set(graph_keys(star, train_prefixes))
    if args.n_train == 0:
        for step in range(ckpt["lines"][-1]["iter"]):
            prefixes, _ = fresh_graphs(args, star, step, test_keys)
            seen.update(graph_keys(star, prefixes))
    return draw_unseen(star, n, np.random.default_rng([seed, 4]), seen)


def get_graphs(flags, ckpt, args, star):
    """The graphs that the flags ask for -> prefixes (n, prefix_len), paths (n, path_len)"""
    if flags.file is None and flags.graph is None:
        return unseen_graphs(flags.num_graphs, flags.seed, ckpt, args)
    if flags.file is not None:
        edges, paths, _ = read_graphs(flags.file, None, (star.deg, star.path_len))
        edges, paths = edges[:flags.num_graphs], paths[:flags.num_graphs]
    else:
        edges, path = parse_graph(flags.graph)
        if (len(edges), len(path)) != (star.n_edges, star.path_len):
            raise ValueError(f"--graph is not one of {star}, as the model was trained on")
        edges, paths = np.array([edges]), np.array([path])
    return prefix_tokens(star, edges, paths), paths


def is_arm(answer, arms):
    """Whether the answer walks one of the arms, right or wrong."""
    return any(answer == arm[:len(answer)] for arm in arms)


def colored(text, color):
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        return f"\033[{color}m{text}\033[0m"
    return text


def print_nodes(label, nodes, path, pause=0.0):
    """Prints nodes in a row. Those that are not on the path are in brackets."""
    print(f"{label:>12}", end="")
    for place, (node, right) in enumerate(zip(nodes, path)):
        text = f"{node:5}" if node == right else f"{f'[{node}]':>5}"
        arrow = " ->" if place > 0 else ""
        print(arrow + colored(text, BLUE if node == right else ORANGE), end="", flush=True)
        time.sleep(pause)
    print()


def show(graph, names, args, pause):
    """Prints a graph of the JSON form. Waits `pause` seconds at each node of the answer."""
    path, answer = graph["path"], graph["answer"]
    print("P(first hop)")
    for arm, p in zip(graph["arms"], graph["p_first_hop"]):
        nodes = " ->".join(f"{node:5}" for node in arm)
        if arm == path:
            nodes = colored(nodes, BLUE) + "   to the goal"
        print(f"{p:12.1%}{nodes}")
    print_nodes("answer", answer, path, pause)
    print(f"{'sure':>12}" + "   ".join(f"{share:5.0%}" for share in graph["sure"]))
    wrong = [place for place, node in enumerate(answer) if node != path[place]]
    text = "right"
    if wrong:
        first = wrong[-1] if args.reverse else wrong[0]         # in the order of writing
        text = f"first wrong: {names[first]}"
        if is_arm(answer, graph["arms"]):
            text += "; walks another arm"
    print(f"{'':14}{text}")
    if graph["forced"] is not None:
        print_nodes("forced", graph["forced"], path)
    print()


def print_result(result, names, args, star):
    n, model = result["num_graphs"], f"{args.model}, {objective_of(args)}"
    print(f"{model}, on {n} graphs {star} (guessing an arm: {1 / star.deg:.1%})")
    print(f"{'':22}" + "".join(f"{name:>10}" for name in [*names, "all"]))
    own = "from $ alone" if args.teacherless else "from its own tokens"
    for label, key, key_of_all in (
        (own, "node_accuracy", "accuracy"),
        ("from the true tokens", "forced_node_accuracy", "forced_accuracy"),
    ):
        if result[key] is not None:
            shares = [*result[key], result[key_of_all]]
            print(f"{label:22}" + "".join(f"{share:10.1%}" for share in shares))
    if result["cheat_accuracy"] is not None:
        share = result["cheat_accuracy"]
        print(f"{share:.1%} have all nodes after the first hop right, from the true tokens")
    print(f"{result['real_arm']:.1%} of the answers walk a real arm, right or wrong")
    if result["goal_moved"] is not None:
        turns, stays = result["goal_moved"]["turns"], result["goal_moved"]["stays"]
        print(f"goal moved to another arm: the first hop turns there in {turns:.1%}, ", end="")
        print(f"stays as it was in {stays:.1%}")
    print(result["verdict"])


def make_parser():
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an error is one line then
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out_dir", required=True, help="folder of the run")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--file", help="take the graphs from this file")
    source.add_argument("--graph", help="take this graph: its edges, start and goal")
    add("--num_graphs", type=positive_int, default=1000, help="graphs to judge the model on")
    add("--show", type=non_negative_int, default=3, help="graphs to print")
    add("--seed", type=non_negative_int, default=0, help="of the graphs drawn")
    add("--pause", type=bounded(float, 0), default=0.0, help="seconds to wait at each node")
    add("--json", action="store_true", help="print one JSON object instead")
    return parser


def main():
    parser = make_parser()
    flags = parser.parse_args()
    try:
        ckpt, args, star, model = load_checkpoint(flags.out_dir)
        prefixes, paths = get_graphs(flags, ckpt, args, star)
    except (ValueError, OSError, MemoryError) as error:
        parser.error(str(error) or "not enough memory")

    prefix_tensor, solutions = prefixes_and_solutions(args, prefixes, paths)
    answers, forced, _ = predict(args, star, model, prefix_tensor, solutions)
    result = {"num_graphs": len(paths), **summary(args, answers, forced, paths)}
    result["goal_moved"] = None
    if star.deg > 1:
        result["goal_moved"] = goal_moved(args, star, model, prefixes, answers)
    p = probabilities(args, star, model, prefix_tensor[:flags.show], answers[:flags.show])
    graphs, real_arms = [], 0
    for i, (prefix, path, answer) in enumerate(zip(prefixes, paths.tolist(), answers.tolist())):
        arms = find_arms(edges_of(prefix.tolist()), path[0])
        real_arms += is_arm(answer, arms)
        if i < flags.show:
            graphs.append({
                "path": path,
                "arms": arms,
                "p_first_hop": [p[i, 1, arm[1]].item() for arm in arms],
                "answer": answer,
                "sure": [p[i, place, node].item() for place, node in enumerate(answer)],
                "forced": None if forced is None else forced[i].tolist(),
            })
    result["real_arm"] = real_arms / len(paths)
    result["verdict"] = verdict(result, args, len(paths))
    if flags.json:
        print(json.dumps({**result, "graphs": graphs}))
        return
    hops = ["first hop", *[f"hop {i}" for i in range(2, star.path_len - 1)]]
    names = ["start", *hops, "goal"][:answers.size(1)]
    for graph in graphs:
        show(graph, names, args, flags.pause)
    print_result(result, names, args, star)


if __name__ == "__main__":
    run_script(main)
