"""Helper of char_lm.py: the table and the figure of its three runs."""

from pathlib import Path

import numpy as np
from _recording import Log
from matplotlib import pyplot as plt

NORM, THRESHOLD = "autoclip/step/grad_norm", "autoclip/step/threshold"
COLORS = ("#777777", "#0072B2", "#D55E00")  # grey, and two of the Okabe-Ito palette for every kind of colour vision


def print_table(logs: dict[str, Log]) -> None:
    print(f"\n{'run':<14}{'validation loss':>16}{'largest norm':>14}{'steps clipped':>15}{'mean factor':>13}")
    for name, log in logs.items():
        norms, thresholds = log[NORM][1], log[THRESHOLD][1]
        factors = [min(1.0, threshold / norm) for norm, threshold in zip(norms, thresholds, strict=True)]
        clipped, mean = sum(factor < 1 for factor in factors) / len(factors), sum(factors) / len(factors)
        print(f"{name:<14}{log['val_loss'][1][-1]:>16.3f}{max(norms):>#14.3g}{clipped:>15.1%}{mean:>13.3f}")


def draw(logs: dict[str, Log], path: Path) -> None:
    plt.switch_backend("agg")  # into a file: needs no display
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    figure, (losses, norms) = plt.subplots(2, figsize=(6, 4.5), sharex=True, layout="constrained")
    for color, (name, log) in zip(COLORS, logs.items(), strict=True):
        losses.plot(*log["train_loss"], color=color, lw=0.7, alpha=0.5)
        steps, values = log["val_loss"]
        losses.plot(steps, values, color=color, lw=2, label=f"{name}: {values[-1]:.2f}")
    losses.set(yscale="log", ylabel="loss in nats per character")
    losses.set_yticks([1.5, 2, 3, 5], labels=["1.5", "2", "3", "5"])
    losses.minorticks_off()
    losses.legend(title="validation loss (thin: training)", ncols=3)
    steps, values = map(np.array, logs["AutoClip"][NORM])
    thresholds = np.array(logs["AutoClip"][THRESHOLD][1])
    clipped = values > thresholds
    norms.plot(steps[clipped], values[clipped], ".", ms=3.5, mew=0, color=COLORS[2], label="clipped")
    norms.plot(steps[~clipped], values[~clipped], ".", ms=3.5, mew=0, color=COLORS[0], label="left as it was")
    norms.plot(steps, thresholds, color="black", lw=1.2, label="threshold")
    norms.set(yscale="log", xlabel="optimizer step", ylabel="gradient norm")
    norms.yaxis.set_major_formatter("{x:g}")
    norms.legend(title="AutoClip, each step", ncols=3, markerscale=2.5)
    figure.savefig(path, dpi=200)
