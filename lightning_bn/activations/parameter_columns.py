"""The columns that are measured of batch norms' statistics and parameters, and of gradients: an entry each, with its
limits, what to do and how it is drawn."""

from __future__ import annotations

import numpy as np

from lightning_bn.activations.column import CHANNELS, COUNT, FRACTION, LOWER_RATE, Column, Scale, Statistic
from lightning_bn.activations.formulas import drift_value, have_bias, have_run, have_weight, near_zero, rms, track

_GRADIENT = Scale(-12, 3, "viridis", "standard deviation", log=True)

_SLOW = (
    "take a larger momentum or an average that does not start at 0/1 (Exponential(debias=True), Window), "
    "or recalibrate after training (BatchNormRecalibration)"
)

PARAMETER_COLUMNS: tuple[Column, ...] = (
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
    Column("drift_mean_z", "norm", lambda found: found.drift_z[:, 0], have_run),
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
    Column("drift_var_z", "norm", lambda found: found.drift_z[:, 1], have_run),
    Statistic(
        "running_nonfinite",
        "norm",
        lambda found: found.nonfinite,
        track,
        label="number of channels whose running statistics are NaN or infinite",
        scale=CHANNELS,
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
        scale=FRACTION,
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
        advice=f"{LOWER_RATE}, or put the norms' weights under weight decay.",
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
        scale=FRACTION,
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
        advice=f"Gradients explode: {LOWER_RATE.lower()}.",
        advice_low="No gradient arrives here: look for what cuts it off above (detach, dead or saturated layers).",
        code="trainer = Trainer(gradient_clip_val=1.0)",
    ),
    Statistic(
        "grad_nonfinite",
        "gradient",
        lambda found: found.values - found.n,
        label="number of NaN and infinite gradients",
        scale=COUNT,
        family="numbers",
        high=0,
        rank=8,
        advice=f"{LOWER_RATE}, or let a GradScaler skip such steps.",
        code="trainer = Trainer(gradient_clip_val=1.0)",
    ),
    # What is usual goes with the optimizer and the size of a layer, so neither has a limit.
    Statistic(
        "grad_norm",
        "weight",
        lambda found: found[:, 0],
        label="norm of the gradient of the layer's parameters",
        scale=Scale(-12, 3, "viridis", "Euclidean norm", log=True),
        family="gradient",
        healthy=None,
        log=True,
        rank=9,
        mapped=False,
        advice=f"{LOWER_RATE}.",
    ),
    Statistic(
        "update_ratio",
        "weight",
        lambda found: found[:, 1],
        label="ratio of the norm of a step to that of the weights",
        scale=Scale(-6, 0, "RdBu_r", "ratio of norms; 0.001 is usual", log=True),
        family="gradient",
        healthy=1e-3,
        log=True,
        rank=9,
        mapped=False,
        advice="Far above 0.001 the learning rate is too high for this layer, far below it too low.",
    ),
)
