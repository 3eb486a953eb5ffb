"""Discovery finds every batch norm once, and says what it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from fitting import fit
from small_models import Small
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from lightning_bn import (
    BatchNorm1d,
    BatchNormRecalibration,
    CompareAverages,
    Window,
    check,
    convert_batch_norm,
    recalibrate,
)
from lightning_bn.discovery import (
    find_batch_norms,
    find_unserved,
    has_known_forward,
    in_eval_mode,
    learning,
    parts_called_by,
    unserved,
)


def test_finds_each_layer_once() -> None:
    """Torch's, this package's and synchronised layers, in registration order; instance and layer norm are none."""
    shared = nn.BatchNorm1d(2)
    model = nn.ModuleDict(
        {
            "a": shared,
            "norms": nn.ModuleList([nn.InstanceNorm1d(2), nn.LayerNorm(2), nn.SyncBatchNorm(2)]),
            "b": nn.Sequential(BatchNorm1d(2, averaging=Window(3)), shared),
        }
    )
    found = find_batch_norms(model)
    assert [layer.names for layer in found] == [("a", "b.1"), ("norms.2",), ("b.0",)]
    assert [layer.shared for layer in found] == [True, False, False]
    assert [layer.synced for layer in found] == [False, True, False]
    assert [layer.kind for layer in found] == ["BatchNorm1d", "SyncBatchNorm", "BatchNorm1d"]


def test_frozen_means_that_nothing_learns() -> None:
    """Frozen: there are parameters and none requires grad. A layer without any is as free as what is around it."""
    layers = [nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2, affine=False)]
    layers[1].weight.requires_grad_(False)
    layers[2].requires_grad_(False)
    assert [layer.frozen for layer in find_batch_norms(nn.ModuleList(layers))] == [False, False, True, False]


def test_frozen_by_what_is_around() -> None:
    """A layer without parameters is frozen in a frozen backbone, and not in one that learns or has nothing to learn."""
    backbone = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.BatchNorm1d(2, affine=False)]))
    model = nn.Sequential(backbone, nn.Linear(2, 2))
    assert not find_batch_norms(model)[0].frozen
    backbone.requires_grad_(False)
    assert find_batch_norms(model)[0].frozen
    assert not find_batch_norms(nn.Sequential(nn.BatchNorm1d(2, affine=False)))[0].frozen


def test_frozen_by_the_weights_own_parameters() -> None:
    """A pruned or parametrized weight is a function of parameters under other names; they decide."""
    layers = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2)])
    prune.identity(layers[0], "weight")
    parametrize.register_parametrization(layers[1], "weight", nn.Identity())
    assert [layer.frozen for layer in find_batch_norms(layers)] == [False, False]
    layers[0].bias.requires_grad_(False)
    layers[1].bias.requires_grad_(False)
    assert [layer.frozen for layer in find_batch_norms(layers)] == [False, False]
    layers.requires_grad_(False)
    assert [layer.frozen for layer in find_batch_norms(layers)] == [True, True]


def test_an_activation_does_not_make_a_layer_learn() -> None:
    """What a subclass holds besides its own parameters, as a PReLU, has nothing to do with its statistics."""
    layer = nn.BatchNorm1d(2).requires_grad_(False)
    layer.activation = nn.PReLU()
    assert find_batch_norms(nn.Sequential(layer))[0].frozen


def test_what_training_moves() -> None:
    """`learning` leaves out the frozen, those that track nothing, and those that are in eval mode in training."""
    model = nn.Sequential(
        nn.BatchNorm1d(2),
        nn.BatchNorm1d(2).requires_grad_(False),
        nn.BatchNorm1d(2, track_running_stats=False),
        nn.BatchNorm1d(2).eval(),
    )
    layers = find_batch_norms(model)
    assert [layer.name for layer in learning(layers, in_eval_mode(layers))] == ["0"]
    assert [layer.name for layer in learning(layers, ())] == ["0", "3"]


def test_tracks() -> None:
    """Only where there are running statistics and training moves them."""
    layers = [nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False), nn.BatchNorm1d(2)]
    layers[2].track_running_stats = False
    assert [layer.tracks for layer in find_batch_norms(nn.ModuleList(layers))] == [True, False, False]


def test_names_through_torch_compile() -> None:
    """A compiled model's layers have the names the user wrote, and a layer alone has the empty one."""
    model = nn.Sequential(nn.Sequential(nn.BatchNorm1d(2)))
    model[0] = torch.compile(model[0])
    assert find_batch_norms(torch.compile(model))[0].name == "0.0"
    assert find_batch_norms(torch.compile(nn.BatchNorm1d(2)))[0].name == ""
    assert find_batch_norms(nn.BatchNorm1d(2))[0].name == ""


class Split(nn.BatchNorm2d):
    """Buffers with a set for each part of a batch, as norms that simulate several devices have."""

    def __init__(self, channels: int, parts: int) -> None:
        super().__init__(channels)
        self.register_buffer("running_mean", torch.zeros(channels * parts))
        self.register_buffer("running_var", torch.ones(channels * parts))


class ByHand(nn.Module):
    """No subclass of torch's: `shape` is that of its statistics."""

    def __init__(self, *shape: int, constant: bool = False, second: str = "running_var") -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer(second, torch.ones(shape))
        for name in ("weight", "bias"):
            if constant:
                self.register_buffer(name, torch.ones(shape))
            else:
                self.register_parameter(name, nn.Parameter(torch.ones(shape)))


def test_what_is_not_served_is_found() -> None:
    """With the reason; what keeps no running statistics, or keeps those of each instance, is no batch norm."""
    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    model = nn.ModuleDict(
        {
            "split": Split(8, 4),
            "types": ByHand(2, 8),
            "renorm": ByHand(8, second="running_std"),
            "frozen": ByHand(8, constant=True),
            "scripted": scripted,
            "instance": nn.InstanceNorm1d(2, track_running_stats=True),
            "plain": nn.Sequential(
                nn.BatchNorm1d(2), nn.LazyBatchNorm1d(), nn.BatchNorm1d(2, track_running_stats=False)
            ),
        }
    )
    found = {norm.name: norm for norm in find_unserved(model)}
    assert list(found) == ["split", "types", "renorm", "frozen", "scripted.1"]
    assert [norm.is_constant for norm in found.values()] == [False, False, False, True, False]
    assert (
        str(found["split"]) == "split (Split): its running_mean of shape (32,) is not one value for each of 8 channels"
    )
    assert str(found["types"]) == "types (ByHand): it is no subclass of torch's batch norm"
    assert str(found["scripted.1"]) == "scripted.1 (BatchNorm1d): it is TorchScript, in which hooks are not called"
    assert [layer.name for layer in find_batch_norms(model)] == ["plain.0", "plain.1", "plain.2"]
    assert unserved(model).endswith("renorm (ByHand): it is no subclass of torch's batch norm; and 1 more.")
    assert unserved(nn.Sequential(nn.BatchNorm1d(2), ByHand(8, constant=True))) == ""


class VarianceAlone(nn.BatchNorm2d):
    """An equivariant norm: no mean is subtracted, so none is kept."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.running_mean = None


def test_one_statistic_alone_is_not_served() -> None:
    """A subclass that keeps only a variance, or only a mean, is named, and not denied."""
    layers = nn.Sequential(VarianceAlone(2), nn.BatchNorm1d(2))
    layers[1].running_var = None
    assert find_batch_norms(layers) == []
    assert [norm.reason for norm in find_unserved(layers)] == [
        "it keeps a running_var alone",
        "it keeps a running_mean alone",
    ]


def test_frozen_norms_are_named_where_there_is_no_other() -> None:
    """Who says that a model has none says so of no model whose norms keep statistics."""
    model = nn.Sequential(ByHand(8, constant=True))
    with pytest.raises(ValueError, match=r"Not supported: 0 \(ByHand\)"):
        recalibrate(model, [])
    with pytest.warns(UserWarning, match=r"Not supported: 0 \(ByHand\)"):
        convert_batch_norm(model)


class TypeNorm(ByHand):
    """Runs, and keeps statistics that nobody but itself knows."""

    def forward(self, input: Tensor) -> Tensor:
        return input


def beside() -> nn.Sequential:
    """A layer that is served, one that is not, and a frozen one."""
    return nn.Sequential(nn.BatchNorm1d(5), TypeNorm(2, 5), TypeNorm(5, constant=True))


def test_who_works_on_batch_norms_names_what_it_leaves_out(tmp_path: Path) -> None:
    """Once, by name with the reason, beside a layer that it works on: each caller of the package; the frozen one never
    moves, so nothing is left out there."""
    named, batches = r"1 \(TypeNorm\): it is no subclass of torch's batch norm", torch.randn(4, 8, 5).unbind()
    report = recalibrate(beside(), batches, progress=False)
    assert re.search(rf"Not recalibrated: {named}\.", str(report))
    assert len(report.as_dict()["not_supported"]) == 1
    assert recalibrate(beside(), batches, layers="0", progress=False).not_supported == ()
    with pytest.warns(UserWarning, match=named):
        convert_batch_norm(beside(), Window(3))
    assert [finding.layers for finding in check(beside()) if finding.code == "BN100"] == [("1",)]

    module = Small()
    module.bn1 = beside()
    named = named.replace("1", "bn1.1", 1)
    for callback in (CompareAverages({"window": Window(3)}), BatchNormRecalibration()):
        with pytest.warns(UserWarning, match=named) as told:
            fit(callback, module=module, max_epochs=1, default_root_dir=tmp_path)
        texts = [str(one.message) for one in told if re.search(named, str(one.message))]
        assert [text.startswith(type(callback).__name__) for text in texts] == [True]


def test_channels_that_were_removed_are_no_other_layout() -> None:
    """Structured pruning may leave num_features as it was."""
    layer = nn.BatchNorm1d(4)
    layer.weight, layer.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
    layer.running_mean, layer.running_var = torch.zeros(3), torch.ones(3)
    assert find_unserved(layer) == []


def test_known_forwards() -> None:
    """Torch's and this package's; neither a subclass's own nor one that was put on a layer."""

    class Own(nn.BatchNorm1d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input)

    class Named(nn.BatchNorm1d):
        pass

    patched = nn.BatchNorm1d(2)
    patched.forward = patched.forward
    layers = [nn.BatchNorm1d(2), nn.SyncBatchNorm(2), BatchNorm1d(2, averaging=Window(3)), Named(2), Own(2), patched]
    assert [has_known_forward(layer) for layer in layers] == [True, True, True, True, False, False]


def test_parts_that_take_hooks() -> None:
    """What a training step calls, also in containers; TorchScript refuses hooks and is left out."""
    script = torch.jit.script(nn.Linear(2, 2))
    step = nn.ModuleDict({"model": nn.Linear(2, 2), "several": nn.ModuleList([nn.ReLU(), script]), "teacher": script})
    assert parts_called_by(step) == [step["model"], step["several"][0]]
