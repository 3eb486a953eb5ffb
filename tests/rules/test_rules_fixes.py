"""Fixes work: each one is applied as it was printed, and the run is then silent and no worse."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

import pytest
import torch
from applied_fixes import HELD_OUT, Fixed, Program, dataset, run
from fitting import quiet, trainer
from fixable_programs import PROGRAMS, MeanTeacher, frozen_backbone, momentum
from found import findings, of, serious
from small_models import Block, Module
from torch import nn
from torch.utils.data import DataLoader

from lightning_bn import ModeCheck, check

SEEDS = range(2)


@pytest.mark.parametrize("name", PROGRAMS)
def test_fix_works(name: str) -> None:
    """The finding comes; with its fix applied as printed nothing above information is said, and the network is no worse
    on data held out.

    The loss depends on the seed, so two are fitted, which is half of what the bounds were tried with. Where the
    mistake costs something, the worse mended network is better than the better other one. Elsewhere the mend costs less
    than another seed may.
    """
    mistake, wrong, mended = PROGRAMS[name], [], []
    for seed in SEEDS:
        found, loss = run(mistake.program, seed=seed, **mistake.options)
        wrong.append(loss)
        told = [each for each in of(mistake.code, found) if each.level != "info"] or of(mistake.code, found)
        assert len(told) == 1, serious(found)
        silent, loss = run(mistake.program, told[0], seed=seed, **mistake.options)
        mended.append(loss)
        assert serious(silent) == [], "\n".join(map(str, silent))
        assert told[0].level != "info" or of(mistake.code, silent) == []
    if mistake.costs:
        assert not min(wrong) <= max(mended)  # a loss of NaN is no good one
    else:
        assert mean(mended) - mean(wrong) <= stdev(wrong)


@pytest.mark.parametrize("frozen", ["nothing", "model.backbone", "model"])
def test_parameters_without_buffers(frozen: str) -> None:
    """Parameters loaded without buffers, into a network that is frozen or not: the printed call of recalibrate reaches
    the layers, and the validation is then silent and better."""
    trained, loaded = Program(Fixed()), Program(Fixed())
    with quiet():
        trainer(max_epochs=5).fit(trained, DataLoader(dataset(), 16))
        loaded.load_state_dict(dict(trained.named_parameters()), strict=False)
        if frozen != "nothing":
            loaded.get_submodule(frozen).requires_grad_(False)
        losses, told = [], []
        for _ in range(2):
            check = ModeCheck(action="log")
            trainer(check).validate(loaded, DataLoader(HELD_OUT, 48), verbose=False)
            losses.append(mean(loaded.judged.values()))
            told.append(of("BN204", check.findings))
            Fixed(next(iter(told[-1]), None)).at("after training", loaded)
    assert [len(each) for each in told] == [1, 0]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("many", [False, True])
def test_printed_allow_eval_covers_all_layers(many: bool) -> None:
    """BN102's second way out, `allow_eval`, taken as printed, silences it for every layer it names."""
    module = Module(
        nn.Sequential(*[Block(1, 1) if many else Block(1, 4)][:1], nn.Flatten(), nn.Linear(16 if many else 64, 2))
    )
    module.model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(9 if many else 3)])
    for block in module.model:
        block.eval()
    module.model.insert(0, nn.Sequential(nn.Flatten(), nn.Linear(36, 4)))
    (finding,) = (each for each in of("BN102", findings(module)) if each.level == "warning")
    allow = eval(f"dict({finding.fix.note.partition('ModeCheck(')[2].removesuffix(')')})")
    assert of("BN102", findings(module, check=ModeCheck(action="log", **allow))) == []


def test_where_and_seen_name_the_same_layer() -> None:
    """BN208 and BN203 name in "seen" the layer that "where" begins with, also after other layers were told of
    before."""
    found = run(momentum(0.001)).findings
    for finding in of("BN208", found):
        assert finding.layers[0] in finding.seen
        assert finding.where.startswith(finding.layers[0])


def test_averaged_teacher_in_train_mode() -> None:
    """A mean teacher, whose weights are averaged in any of the usual ways, is no frozen layer: information."""
    for write in ("lerp_", "data", "load"):

        class Teacher(MeanTeacher):
            way = write

            def __init__(self) -> None:
                super().__init__(Fixed(), in_training=True)
                self.teacher.train()

            def on_before_zero_grad(self, optimizer: Any) -> None:
                for mine, other in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
                    with torch.no_grad():
                        mine.lerp_(other, 0.1) if self.way == "lerp_" else mine.data.mul_(0.9).add_(
                            other.data, alpha=0.1
                        )
                if self.way == "load":
                    self.teacher.load_state_dict(self.model.state_dict())

        found = findings(Teacher(), max_epochs=2)
        assert serious(found) == [], write
        assert [finding.level for finding in of("BN106", found)] == ["info"]


def test_fields_make_the_message() -> None:
    """Every field of a finding is in its message, and the message in no other place."""
    (finding,) = of("BN201", findings(frozen_backbone(Fixed())))
    for part in (
        finding.code,
        finding.title,
        finding.where,
        finding.seen,
        finding.why,
        str(finding.fix),
        finding.link,
        finding.quiet,
    ):
        assert part in str(finding)
    assert finding.fix.code == "self.model.backbone.eval()"


@pytest.mark.parametrize("part", ["all", "backbone", "scattered"])
def test_the_fix_of_many_layers_is_a_loop(part: str) -> None:
    """Of 52 layers the code names the modules that hold them, runs, and reaches these layers alone; where no module
    holds them alone they are named."""

    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU())

    model = nn.ModuleDict({"backbone": nn.Sequential(*(block() for _ in range(52))), "head": block()})
    norms = {name: each for name, each in model.named_modules() if isinstance(each, nn.BatchNorm2d)}
    chosen = {
        name
        for place, name in enumerate(norms)
        if part == "all" or (name.startswith("backbone") and (part == "backbone" or place % 2))
    }
    for name in chosen:
        norms[name].momentum = 0.997
    (finding,) = of("BN301", check(model))
    assert set(finding.layers) == chosen
    if part == "scattered":
        assert finding.fix.code.count("model.") == len(chosen)
    else:
        assert len(finding.fix.code) < 140
    exec(finding.fix.code, {"model": model, "nn": nn})
    assert {name for name, each in norms.items() if each.momentum == 0.003} == chosen
