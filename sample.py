"""Shows what a trained model does: its answer to a few graphs, and how often it is right on many.

    python sample.py --out_dir out/...                     on graphs drawn anew
    python sample.py --out_dir out/... --file graphs.txt   on graphs in text form (data.py), as `python data.py` prints them
    python sample.py --out_dir out/... --prompt "0,1|2,3|1,4|0,2/0,4="
"""
import numpy as np
import torch

from data import Flags, assemble, draw, parse_line, read_graphs, verdict, walk_arms
from train import load_run, predict, prompts_and_targets, summary


def graphs_from(args, star):
    """The graphs that were asked for -> prefixes (n, prefix_len), paths (n, path_len)"""
    if args.prompt is None and args.file is None:
        return draw(star, args.num_graphs, np.random.default_rng([args.seed, 4]))
    if args.prompt is not None:
        try:
            edges, paths = (np.array([x]) for x in parse_line(args.prompt.strip()))
        except ValueError as error:
            raise ValueError(f"--prompt: {error}") from None
    else:
        edges, paths = (x[:args.num_graphs] for x in read_graphs(args.file, num_nodes=star.num_nodes))
    if (edges.shape[1], paths.shape[1]) != (star.n_edges, star.path_len):
        raise ValueError(f"the model knows graphs of deg {star.deg} and path_len {star.path_len}, this one has deg "
                         f"{edges.shape[1] // (paths.shape[1] - 1)} and path_len {paths.shape[1]}")
    if edges.max() >= star.num_nodes:
        raise ValueError(f"node {edges.max()} is out of range: the model knows names from 0 to {star.num_nodes - 1}")
    return assemble(star, edges[:, :, 0], edges[:, :, 1], paths), paths


def show(arms, path, answer):
    """Prints a graph's arms and the model's answer, both from start to goal, and where the answer leaves the path."""
    print(f"from {path[0]} to {path[-1]}")
    for arm in sorted(arms, key=lambda arm: arm != path):
        print("  " + " -> ".join(map(str, arm)) + ("   the path" if arm == path else ""))
    wrong = next((i for i, (a, b) in enumerate(zip(answer, path)) if a != b), None)
    marked = " -> ".join(f"[{node}]" if i == wrong else str(node) for i, node in enumerate(answer))
    print(f"  model: {marked}   " + ("right" if wrong is None else f"wrong: leaves the path at node {wrong + 1}, where "
                                     f"{path[wrong]} is right" + (", and walks another arm" if answer in arms else "")))


def main():
    flags = Flags(__doc__)
    flags.add_argument("--out_dir", required=True, help="folder of the run")
    flags.add_argument("--num_graphs", type=int, default=1000, help="graphs to judge the model on")
    flags.add_argument("--show", type=int, default=3, help="graphs to print")
    flags.add_argument("--seed", type=int, default=0, help="of the graphs drawn")
    source = flags.add_mutually_exclusive_group()
    source.add_argument("--file", help="take the graphs from this file")
    source.add_argument("--prompt", help="take this graph: its edges, start and goal")
    args = flags.parse_args()
    if min(args.num_graphs - 1, args.show, args.seed) < 0:
        flags.error("--num_graphs must be at least 1, --show and --seed not negative")
    try:
        ckpt, star, model = load_run(args.out_dir)
        prefixes, paths = graphs_from(args, star)
    except (ValueError, OSError, MemoryError) as error:
        flags.error(str(error))
    config = ckpt["config"]

    prompts, targets = prompts_and_targets(config, prefixes, paths)
    own, forced = predict(model, prompts, targets, star.dollar if config["teacherless"] else None)
    answers = own.flip(1) if config["reverse"] else own
    if config["only_first_hop"]:
        answers = torch.cat([prompts[:, -1:], own], dim=1)
    graph_arms = [walk_arms(list(zip(row[0:-3:3], row[1:-3:3])), row[-3]) for row in prefixes.tolist()]
    for arms, path, answer in list(zip(graph_arms, paths.tolist(), answers.tolist()))[:args.show]:
        show(arms, path, answer)

    result = summary(own, forced, targets)
    real = np.mean([answer in [arm[:len(answer)] for arm in arms] for arms, answer in zip(graph_arms, answers.tolist())])
    print(f"\n{config['model']} on {len(paths)} graphs {star}, tokens in the order in which they are written")
    print(f"path accuracy     {result['accuracy']:7.1%}   (guessing an arm: {1 / star.deg:.1%})")
    print("node accuracy    ", *(f"{share:7.1%}" for share in result["node_accuracy"]), "  from its own tokens")
    if forced is not None:
        print("                 ", *(f"{share:7.1%}" for share in result["forced_node_accuracy"]), "  from the true tokens")
    if result["cheat_accuracy"] is not None:
        print(f"cheat accuracy    {result['cheat_accuracy']:7.1%}   all later nodes right, given the true ones before")
    print(f"a real arm        {real:7.1%}   of the answers, the wrong arm included")
    if len(paths) >= 100:                                            # fewer tell nothing
        print(verdict(result, config | {"n_test": len(paths)}))


if __name__ == "__main__":
    main()
