"""The columns that are measured of activations: an entry each, with its limits, what to do and how it is drawn."""

from __future__ import annotations

import numpy as np

from lightning_bn.activations.column import CHANNELS, COUNT, FRACTION, LOWER_RATE, Column, Scale, Statistic
from lightning_bn.activations.formulas import are_functions, are_layers, extent, off_by_chance

# A root mean square, or a standard deviation, that no healthy layer reaches.
LARGE = 1e3

# Next to a value of 1, float32 hardly knows the difference: a network whose layers are that small has vanished. Gates,
# and what a small initial scale multiplies (LayerScale), begin with 1e-5.
TINY = 1e-7

# Shares of a layer's channels that are too many.
MANY_DEAD, MANY_DORMANT = 0.25, 0.5

# Channels of which a share tells nothing.
FEW = 8

# Dettmers et al. (2022) find features up to twenty times as large as the others where outliers emerge.
OUTLIER = 20.0

# A ReLU's inputs are half below zero: up to there all is well.
_ZEROS = Scale(0.5, 1, "OrRd", "share; up to a half is healthy")

_LEAKY = "nn.LeakyReLU(0.01)  # in place of nn.ReLU(); F.leaky_relu(x, 0.01) in place of F.relu(x)"

ACTIVATION_COLUMNS: tuple[Column, ...] = (
    Column("mean", "activation", lambda found: found.row_mean),
    Statistic(
        "std",
        "activation",
        lambda found: found.row_std,
        lambda found: found.n != 1,
        label="standard deviation of the activations",
        scale=Scale(-3, 3, "RdBu_r", "standard deviation; 1 is healthy", log=True),
        family="scale",
        low=TINY,
        high=1e3,
        healthy=1.0,
        log=True,
        judged=are_layers,
        rank=4,
        advice=f"Initialise so that the scale is kept (He et al. 2015) or normalise before this layer; "
        f"{LOWER_RATE.lower()}.",
        advice_low="Initialise so that the scale is kept (He et al. 2015) or normalise before this layer; see what "
        "feeds it.",
        code="trainer = Trainer(gradient_clip_val=1.0)",
        chart="scale: standard deviation of the activations (median, smallest to largest layer)",
        band=True,
    ),
    Column("min", "activation", lambda found: extent(found, found.low)),
    Column("max", "activation", lambda found: extent(found, found.high)),
    Statistic(
        "abs_max",
        "activation",
        lambda found: extent(found, np.maximum(-found.low, found.high)),
        are_layers,
        label="greatest absolute activation",
        scale=Scale(0, 5, "OrRd", "greatest absolute value", log=True),
        family="scale",
        high=1e4,
        rank=6,
        mapped=False,
        advice=f"{LOWER_RATE}; look for a value in the data that is far from the others.",
        code="trainer = Trainer(gradient_clip_val=1.0)",
    ),
    Statistic(
        "channel_rms_max",
        "activation",
        lambda found: found.largest(found.channel_rms),
        are_layers,
        # Where the others are as large it is the layer that explodes, and no channel by itself.
        judged=lambda found: are_layers(found) & ~found.explodes_as_a_whole(LARGE),
        label="root mean square of the largest channel",
        scale=Scale(-3, 3, "RdBu_r", "root mean square; 1 is usual", log=True),
        family="scale",
        high=LARGE,
        healthy=1.0,
        log=True,
        rank=5,
        mapped=False,
        advice=f"One channel runs away: {LOWER_RATE.lower()}, or weigh its parameters down (weight decay).",
        code="trainer = Trainer(gradient_clip_val=1.0)",
    ),
    Statistic(
        "outlier_ratio",
        "activation",
        lambda found: found.outlier_ratio,
        are_layers,
        # Of an activation function many channels are next to 0, and a batch norm scales each by itself.
        judged=lambda found: found.flags.is_stream & (found.widths >= FEW),
        label="ratio of the largest channel's root mean square to the median's",
        scale=Scale(0, 3, "OrRd", "ratio of root mean squares", log=True),
        family="scale",
        high=OUTLIER,
        healthy=1.0,
        log=True,
        rank=6,
        mapped=False,
        logged=False,
        advice=f"One channel is far larger than the others: {LOWER_RATE.lower()}, or weigh its parameters down "
        "(weight decay). In 8 bits, quantise it by itself.",
        code="trainer = Trainer(gradient_clip_val=1.0)",
    ),
    Statistic(
        "kurtosis",
        "activation",
        lambda found: found.kurtosis,
        are_layers,
        label="kurtosis of the channels' root mean squares",
        scale=Scale(0, 3, "OrRd", "1: all channels alike; number of channels: one alone", log=True),
        family="scale",
        healthy=1.0,
        log=True,
        rank=9,
        mapped=False,
        logged=False,
        advice="A few channels are far larger than the others: see outlier_ratio.",
    ),
    Statistic(
        "effective_rank",
        "activation",
        lambda found: found.rank,
        lambda found: ~np.isnan(found.rank),
        label="effective rank of the activations",
        scale=Scale(0, 3, "viridis", "directions, 1 to the number of channels", log=True),
        family="scale",
        healthy=None,
        log=True,
        rank=9,
        mapped=False,
        advice="The activations use few directions: lower the learning rate, or initialise anew what lost its rank.",
    ),
    Statistic(
        "zero_fraction",
        "activation",
        lambda found: found.of_finite(found.total(found.zeros) / found.values),
        are_functions,
        label="share of activations that are zero",
        scale=_ZEROS,
        family="silence",
        high=0.95,
        rank=3,
        advice=f"{LOWER_RATE}, normalise before this layer, or use a function that does not end at 0 (nn.LeakyReLU).",
        code=_LEAKY,
        chart="zeros, share (worst layer, median)",
    ),
    Statistic(
        "dead_fraction",
        "activation",
        lambda found: found.of_finite(found.total(found.dead) / found.widths),
        are_functions,
        label="share of channels that are dead",
        scale=FRACTION,
        family="silence",
        high=MANY_DEAD,
        # Of a handful of channels, as in squeeze and excitation, some are dead by chance.
        judged=lambda found: (found.widths >= FEW) & ~off_by_chance(found, found.dead, MANY_DEAD),
        rank=2,
        advice=f"{LOWER_RATE}, normalise before this layer, or use a function that does not end at 0 (nn.LeakyReLU).",
        code=_LEAKY,
        chart="dead channels, share (worst layer, median)",
    ),
    Statistic(
        "died_channels",
        "activation",
        lambda found: found.of_finite(found.total(found.lone)),
        are_functions,
        label="number of channels that have gone silent while the others fire",
        scale=CHANNELS,
        family="channel",
        high=0,
        judged=lambda found: found.widths >= FEW,
        rank=7,
        mapped=False,
        advice=f"A channel gives 0 for every input: {LOWER_RATE.lower()}, or use nn.LeakyReLU. A channel that "
        "was never active needs another initialisation.",
        code=_LEAKY,
    ),
    Statistic(
        "dormant_fraction",
        "activation",
        lambda found: found.of_finite(found.total(found.dormant) / found.widths),
        are_functions,
        label="share of channels that are dormant (near 0 compared with the others)",
        scale=FRACTION,
        family="silence",
        high=MANY_DORMANT,
        judged=lambda found: (found.widths >= FEW) & ~off_by_chance(found, found.dormant, MANY_DORMANT),
        rank=4,
        mapped=False,
        logged=False,
        advice=f"{LOWER_RATE}, or initialise these channels anew (Sokar et al. 2023).",
    ),
    Statistic(
        "saturated_fraction",
        "activation",
        lambda found: found.of_finite(found.saturated / found.values),
        lambda found: found.flags.is_bounded,
        judged=lambda found: ~found.flags.is_output,
        label="share of activations that are saturated",
        scale=FRACTION,
        family="saturation",
        high=0.5,
        rank=3,
        # A classifier's last sigmoid is to be near 0 or 1.
        advice="No gradient passes a saturated function: normalise before it, initialise smaller, or take another one "
        "(nn.ReLU).",
        code="nn.ReLU()  # in place of nn.Sigmoid() or nn.Tanh()",
    ),
    Statistic(
        "nonfinite",
        "activation",
        lambda found: found.values - found.n,
        label="number of NaN and infinite activations",
        scale=COUNT,
        family="numbers",
        high=0,
        rank=0,
        advice=(
            "Find the operation before this layer that overflows or divides by zero "
            f"(torch.autograd.set_detect_anomaly); {LOWER_RATE.lower()}, or leave 16-bit precision."
        ),
        code="torch.autograd.set_detect_anomaly(True)",
        chart="NaN and infinite activations (worst layer, median)",
    ),
    Statistic(
        "constant_channels",
        "activation",
        lambda found: found.total((found.m2 == 0) & (found.count > 1)),
        lambda found: found.flags.is_input & found.flags.has_positions,
        label="number of input channels that are constant",
        scale=CHANNELS,
        family="input",
        high=0,
        rank=1,
        mapped=False,
        advice="The model is given a channel without information: look at the loader and its transforms.",
    ),
    Statistic(
        "input_shift",
        "given",
        lambda found: found[:, 0],
        label="shift of the input's mean from training, in training's standard deviations (rms over channels)",
        scale=Scale(0, 2, "OrRd", "training's standard deviations"),
        family="input",
        high=1.0,
        rank=1,
        mapped=False,
        advice="Evaluation is given other inputs than training: normalise both alike.",
    ),
    Statistic(
        "input_log_ratio",
        "given",
        lambda found: found[:, 2],
        label="log ratio of the input's variance to training's (rms over channels)",
        scale=Scale(0, 2, "OrRd", "|log(evaluation / training variance)|"),
        family="input",
        high=1.5,
        rank=2,
        mapped=False,
        advice="Evaluation is given other inputs than training: normalise both alike.",
    ),
)
