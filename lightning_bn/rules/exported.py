"""BN4xx: what is wrong with a program that a model was exported to. They are found in files and in answers, not in a
fit."""

from __future__ import annotations

from lightning_bn.rules.finding import Fix
from lightning_bn.rules.rule import Rule

_EXPORT = "with exporting(model): torch.onnx.export(model, (batch,), path)"


class _ExportRule(Rule):
    level = "error"


class ByBatch(_ExportRule):
    code = "BN401"
    title = "an exported program normalises with its batch"
    why = "A sample's answer depends on what else is in its batch, and a batch of one has no variance."
    fix = Fix(_EXPORT, "after training", "the exporter wrote the mode that the layers were in")


class Random(_ExportRule):
    code = "BN402"
    title = "an exported program draws random numbers"
    why = "The same input gives another answer at each call: dropout was exported as in training."
    fix = Fix(_EXPORT, "after training", "dropout is off in eval mode, and sampling on purpose needs no fix")


class OtherStatistics(_ExportRule):
    code = "BN403"
    title = "an exported program is not the reference's network"
    why = "It was exported before the last recalibration or from another checkpoint, or a converter changed numbers."
    fix = Fix(_EXPORT, "after training", "after recalibrate; a float16 converter needs a range for the variances")


class Writes(_ExportRule):
    code = "BN404"
    title = "an exported program moves its statistics as it runs"
    why = "Each request trains the statistics of the model that serves it."
    fix = Fix(_EXPORT, "after training")


class AnswersNotFinite(_ExportRule):
    code = "BN405"
    title = "an exported program answers with what is not finite"
    why = "Statistics or weights are NaN, infinite or too large for the dtype of the program."
    fix = Fix("recalibrate(model, batches)", "after training", "before the export; keep statistics and sums in float32")


EXPORT_RULES: dict[str, Rule] = {rule.code: rule() for rule in _ExportRule.__subclasses__()}
"""Every rule about exported programs by its code."""
