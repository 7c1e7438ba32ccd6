"""The learning rates of the tasks: what each ends at without clipping, at factors of two around the tuned rate.

    python examples/study/rates.py [--seeds 2] [--part new]

A tuned rate is the best or a neighbour that is as good, half of it where twice the best fails. No batch is bad here.
"""

import argparse
from dataclasses import replace

import numpy as np
from _tasks import TASKS
from study import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--part", choices=("first", "new"), default="first", help="which tasks")
    args = parser.parse_args()
    groups = {"first": ("choose", "report"), "new": ("new",)}[args.part]
    for name, task in list(TASKS.items()):
        if task.hot or task.factor != 1 or task.group not in groups:
            continue
        found = []
        for factor in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8):
            TASKS[name] = replace(task, lr=factor * task.lr, bad=0.0)
            errors = [train((name, "none", seed, task.steps))["error"] for seed in range(args.seeds)]
            found.append(f"{factor * task.lr:g}: {np.mean(errors):.4g}")
        print(f"{name:36}", "  ".join(found), flush=True)


if __name__ == "__main__":
    main()
