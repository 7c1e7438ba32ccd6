"""Try every scenario again and again with new random numbers: ``python tests/chaos/long.py --minutes 60 --seed 7``.

Each try is printed with its seed, which ``--only NAME --seed SEED --minutes 0`` repeats; failed ones leave a folder.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import time
import traceback
import warnings
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from random import Random, SystemRandom
from tempfile import mkdtemp

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]


def attempt(name: str, seed: int) -> bool:
    """One try of one scenario; whether it held."""
    from chaos.scenarios import SCENARIOS

    folder, begun, printed = Path(mkdtemp(prefix="chaos-")), time.monotonic(), StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            said = SCENARIOS[name](folder, Random(seed))
    except Exception:
        print(f"FAILED {name}, seed {seed}, in {folder}\n{printed.getvalue()[-2000:]}\n{traceback.format_exc()}")
        return False
    shutil.rmtree(folder, ignore_errors=True)
    print(f"held   {name}, seed {seed}: {said} ({time.monotonic() - begun:.0f} s)", flush=True)
    return True


def main() -> int:
    """Try until the time is over, each scenario once at least; print how many tries held."""
    import torch
    from chaos.scenarios import SCENARIOS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=55.0)
    parser.add_argument("--seed", type=int, default=SystemRandom().randrange(10**6))
    parser.add_argument("--only", choices=SCENARIOS, action="append")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    tried, held, seed = Counter[str](), Counter[str](), arguments.seed
    end = time.monotonic() + 60 * arguments.minutes
    while not tried or time.monotonic() < end:
        for name in arguments.only or SCENARIOS:
            if tried[name] and time.monotonic() > end:
                break
            tried[name] += 1
            held[name] += attempt(name, seed)
        seed += 1
    for name in tried:
        print(f"{name:40} tried {tried[name]:4}  held {held[name]:4}")
    return int(tried != held)


if __name__ == "__main__":
    sys.exit(main())
