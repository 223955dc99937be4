"""Prints, as Markdown, what the recorded runs beside this file ended with: python results/table.py"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from train import make_flags  # noqa: E402

_, defaults = make_flags()
print("| command | accuracy | forced: first hop, worst later node | hops right from step | steps | minutes | on |\n"
      "|---|---|---|---|---|---|---|")
for file in sorted(HERE.glob("*.jsonl")):
    header, *lines = map(json.loads, file.read_text().splitlines())
    config, last = header["config"], lines[-1]
    command = "python train.py"
    for flag, value in config.items():
        default = defaults[flag][config["model"]] if value is not None and isinstance(defaults[flag], dict) else defaults[flag]
        if flag not in ("out_dir", "overwrite") and value is not None and value != default:
            command += f" --{flag}" + ("" if value is True else f" {value}")
    hops = last["forced_node_accuracy"] or []
    forced = f"{hops[1]:.1%}, {min(hops[2:]):.1%}" if len(hops) > 2 else "-"
    cascade = "-"
    if config["teacherless"] and not config["reverse"]:
        cascade = ", ".join(str(next((line["iter"] for line in lines if line["node_accuracy"][i] >= 0.95), "never"))
                            for i in range(1, config["path_len"] - 1))
    print(f"| `{command}` | {last['accuracy']:.1%} | {forced} | {cascade} | {last['iter']} | {last['elapsed_s'] / 60:.1f} | "
          f"{header['machine']}, torch {header['versions']['torch']}, seed {config['seed']} |")
