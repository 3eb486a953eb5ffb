"""The statistics of a layer: one entry each, from which the measurement, the table, the limits, the colours, the
scalars, the charts and the advice are made. A new statistic is an entry here, and nothing else.
"""

from __future__ import annotations

import numpy as np

from lightning_bn.activations.column import Column, Scale, Statistic
from lightning_bn.activations.formulas import (
    are_functions,
    are_layers,
    drift_value,
    extent,
    have_bias,
    have_run,
    have_weight,
    near_zero,
    rms,
    track,
)

# A root mean square, or a standard deviation, that no healthy layer reaches.
LARGE = 1e3

# Next to a value of 1, float32 hardly knows the difference: a network whose layers are that small has vanished. Gates,
# and what a small initial scale multiplies (LayerScale), begin with 1e-5.
TINY = 1e-7

# Channels of which a share tells nothing.
FEW = 8

# Pale is healthy and dark is sick; where both sides are sick, pale lies in the middle.
_FRACTION = Scale(0, 1, "OrRd", "share, 0 to 1")
# A ReLU's inputs are half below zero: up to there all is well.
_ZEROS = Scale(0.5, 1, "OrRd", "share; up to a half is healthy")
# One is half way up from none, so that a single NaN is seen.
_COUNT = Scale(-6, 6, "OrRd", "NaN and infinite values", log=True, count=True)
_CHANNELS = Scale(-3, 3, "OrRd", "channels", log=True, count=True)
_GRADIENT = Scale(-12, 3, "viridis", "standard deviation", log=True)

_LOWER_RATE = "Lower the learning rate, warm it up, or clip gradients"
_SLOW = (
    "take a larger momentum or an average that does not start at 0/1 (Exponential(debias=True), Window), "
    "or recalibrate after training (BatchNormRecalibration)"
)

ENTRIES: tuple[Column, ...] = (
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
        f"{_LOWER_RATE.lower()}.",
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
        advice=f"{_LOWER_RATE}; look for a value in the data that is far from the others.",
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
        advice=f"One channel runs away: {_LOWER_RATE.lower()}, or weigh its parameters down (weight decay).",
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
        high=50.0,
        healthy=1.0,
        log=True,
        rank=6,
        mapped=False,
        logged=False,
        advice=f"One channel is far larger than the others: {_LOWER_RATE.lower()}, or weigh its parameters down "
        "(weight decay). In 8 bits, quantise it by itself.",
        code="trainer = Trainer(gradient_clip_val=1.0)",
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
        advice=f"{_LOWER_RATE}, normalise before this layer, or use a function that does not end at 0 (nn.LeakyReLU).",
        code="nn.LeakyReLU(0.01)  # in place of nn.ReLU()",
        chart="zeros, share (worst layer, median)",
    ),
    Statistic(
        "dead_fraction",
        "activation",
        lambda found: found.of_finite(found.total(found.dead) / found.widths),
        are_functions,
        label="share of channels that are dead",
        scale=_FRACTION,
        family="silence",
        high=0.25,
        # Of a handful of channels, as in squeeze and excitation, some are dead by chance.
        judged=lambda found: found.widths >= FEW,
        rank=2,
        advice=f"{_LOWER_RATE}, normalise before this layer, or use a function that does not end at 0 (nn.LeakyReLU).",
        code="nn.LeakyReLU(0.01)  # in place of nn.ReLU()",
        chart="dead channels, share (worst layer, median)",
    ),
    Statistic(
        "died_channels",
        "activation",
        lambda found: found.of_finite(found.total(found.lone)),
        are_functions,
        label="number of channels that have gone silent while the others fire",
        scale=_CHANNELS,
        family="channel",
        high=0,
        judged=lambda found: found.widths >= FEW,
        rank=7,
        mapped=False,
        advice=f"A channel gives 0 for every input: {_LOWER_RATE.lower()}, or use nn.LeakyReLU. A channel that "
        "was never active needs another initialisation.",
        code="nn.LeakyReLU(0.01)  # in place of nn.ReLU()",
    ),
    Statistic(
        "dormant_fraction",
        "activation",
        lambda found: found.of_finite(found.total(found.dormant) / found.widths),
        are_functions,
        label="share of channels that are dormant, next to 0 beside the others",
        scale=_FRACTION,
        family="silence",
        high=0.5,
        judged=lambda found: found.widths >= FEW,
        rank=4,
        mapped=False,
        logged=False,
        advice=f"{_LOWER_RATE}, or initialise these channels anew (Sokar et al. 2023).",
    ),
    Statistic(
        "saturated_fraction",
        "activation",
        lambda found: found.of_finite(found.saturated / found.values),
        lambda found: found.flags.is_bounded,
        judged=lambda found: ~found.flags.is_output,
        label="share of activations that are saturated",
        scale=_FRACTION,
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
        scale=_COUNT,
        family="numbers",
        high=0,
        rank=0,
        advice=(
            "Find the operation before this layer that overflows or divides by zero "
            f"(torch.autograd.set_detect_anomaly); {_LOWER_RATE.lower()}, or leave 16-bit precision."
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
        scale=_CHANNELS,
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
    Statistic(
        "drift_mean",
        "norm",
        drift_value(0),
        have_run,
        label="shift of the mean, in running standard deviations (rms over channels)",
        scale=Scale(0, 2, "OrRd", "running standard deviations"),
        family="drift",
        high=1.0,
        advice=f"The running statistics are not those of the batches: {_SLOW}.",
        code="convert_batch_norm(model, Window(20))",
        rule="BN208",
        chart="drift of the mean, in running standard deviations (worst layer, median)",
    ),
    Column("drift_mean_max", "norm", drift_value(1), have_run),
    Statistic(
        "drift_var",
        "norm",
        drift_value(2),
        have_run,
        label="log ratio of batch to running variance (rms over channels)",
        scale=Scale(0, 2, "OrRd", "|log(batch / running variance)|"),
        family="drift",
        high=1.0,
        advice=f"The running statistics are not those of the batches: {_SLOW}.",
        code="convert_batch_norm(model, Window(20))",
        rule="BN208",
        chart="drift of the variance, log ratio (worst layer, median)",
    ),
    Column("drift_var_max", "norm", drift_value(3), have_run),
    Statistic(
        "running_nonfinite",
        "norm",
        lambda found: found.nonfinite,
        track,
        label="number of channels whose running statistics are NaN or infinite",
        scale=_CHANNELS,
        family="numbers",
        high=0,
        rank=1,
        mapped=False,
        advice=(
            "Evaluation will give NaN: convert_batch_norm(model) skips batches that are not finite; "
            "reset_running_stats() and recalibrate to mend what is there."
        ),
        code="convert_batch_norm(model)",
        rule="BN203",
    ),
    Statistic(
        "below_eps_fraction",
        "norm",
        lambda found: found.below_eps,
        have_run,
        label="share of channels whose batch variance is below eps",
        scale=_FRACTION,
        family="silence",
        high=0.5,
        rank=4,
        mapped=False,
        logged=False,
        advice="This norm divides by eps and not by a deviation, since its input hardly varies: look at what feeds it "
        "(dead or tiny layers, constant inputs).",
        rule="BN210",
    ),
    Column("weight_min", "norm", lambda found: found.of_weight(np.minimum.reduceat), have_weight),
    Column("weight_max", "norm", lambda found: found.of_weight(np.maximum.reduceat), have_weight),
    Column("bias_min", "norm", lambda found: found.of_bias(np.minimum.reduceat), have_bias),
    Column("bias_max", "norm", lambda found: found.of_bias(np.maximum.reduceat), have_bias),
    Statistic(
        "weight_rms",
        "norm",
        lambda found: found.of_weight(rms),
        have_weight,
        label="root mean square of the affine weights",
        scale=Scale(-2, 2, "RdBu_r", "root mean square; 1 is the start", log=True),
        family="affine",
        low=0.05,
        high=1e6,
        healthy=1.0,
        log=True,
        rank=3,
        mapped=False,
        logged=False,
        advice=f"{_LOWER_RATE}, or put the norms' weights under weight decay.",
        advice_low="The weights of this norm are near 0, so it passes next to nothing on. If so from the start, they "
        "were initialised like other layers': set them to 1 (nn.init.ones_(norm.weight)). If later, leave them out of "
        "the weight decay.",
        code_low="for norm in model.modules():\n    if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm):\n"
        "        torch.nn.init.ones_(norm.weight)",
    ),
    Statistic(
        "weight_near_zero",
        "norm",
        lambda found: found.of_weight(near_zero),
        have_weight,
        label="share of affine weights near zero",
        scale=_FRACTION,
        family="affine",
        high=0.5,
        rank=2,
        mapped=False,
        advice="Most channels of this norm reach nothing: leave its weight out of the weight decay, or prune them.",
        code='torch.optim.SGD([{"params": norm_weights, "weight_decay": 0.0}, {"params": others}], lr=0.1, '
        "weight_decay=1e-4)",
    ),
    # No scale of a gradient is healthy in itself: it goes with the loss. What vanishes or explodes is far from the
    # other layers.
    Statistic(
        "grad_std",
        "gradient",
        lambda found: found.row_std,
        lambda found: found.n != 1,
        label="standard deviation of the gradient at the output",
        scale=_GRADIENT,
        family="gradient",
        # The smallest whose square float32 can hold, which Adam divides by.
        low=1e-19,
        high=1e3,
        healthy=None,
        log=True,
        rank=7,
        advice=f"Gradients explode: {_LOWER_RATE.lower()}.",
        advice_low="No gradient arrives here: look for what cuts it off above (detach, dead or saturated layers).",
        code="trainer = Trainer(gradient_clip_val=1.0)",
    ),
    Statistic(
        "grad_nonfinite",
        "gradient",
        lambda found: found.values - found.n,
        label="number of NaN and infinite gradients",
        scale=_COUNT,
        family="numbers",
        high=0,
        rank=8,
        advice=f"{_LOWER_RATE}, or let a GradScaler skip such steps.",
        code="trainer = Trainer(gradient_clip_val=1.0)",
    ),
)

COLUMNS: tuple[str, ...] = tuple(entry.name for entry in ENTRIES)
"""All columns of the table, in their order."""
STATISTICS: dict[str, Statistic] = {entry.name: entry for entry in ENTRIES if isinstance(entry, Statistic)}
"""By column, those that are summed up over the layers."""
DRIFT_STATISTICS: tuple[str, ...] = tuple(name for name in COLUMNS if name.startswith("drift"))
"""What `activations.drift` measures of a batch norm, in the order of its columns."""
