"""What the examples have in common."""

import logging
import warnings

import torch


def prepare() -> None:
    """Leave the progress bar of Lightning's output, and use one thread.

    The models are so small that more threads gain nothing, and lose much where cores are shared.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no list of devices, no tips
    # No advice on data loader workers (all data are in memory), no deprecations of torch inside Lightning.
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch")
    torch.set_num_threads(1)
