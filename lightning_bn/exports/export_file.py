"""Reads a program of ``torch.export.save`` (.pt2): JSON and plain numbers, of which nothing runs."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from lightning_bn.checkpoints.norms import norms_in
from lightning_bn.checkpoints.stored import Archive, StoredTensor, strided
from lightning_bn.exports.program import Leaf, NormUse, Program, WeightedUse

_DTYPES = {6: torch.float16, 7: torch.float32, 8: torch.float64, 13: torch.bfloat16, 5: torch.int64}
"""Of torch's schema, those that a norm or a weight has."""

_RANDOM = ("rand", "bernoulli", "multinomial", "randn", "rand_like", "randn_like", "normal")
_DROPOUTS = ("dropout", "dropout_", "native_dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")
_OLD = "serialized_exported_program"  # before torch 2.9


def _model(archive: Archive) -> str | None:
    return next(
        (name for name in archive.records if name.endswith(".json") and ("/models/" in name or _OLD in name)), None
    )


def is_export(archive: Archive) -> bool:
    """Whether an archive is of ``torch.export.save``."""
    return _model(archive) is not None


def read_export(archive: Archive) -> Program:
    """Return what is in a file of ``torch.export.save``.

    Raises:
        whatever damaged JSON raises.
    """
    module = json.loads(archive.read(_model(archive) or ""))["graph_module"]
    leaves = _leaves(archive)
    names: dict[str, str] = {}
    mutated: set[str] = set()
    for spec in module["signature"]["input_specs"]:
        for kind in ("parameter", "buffer"):
            if kind in spec:
                names[spec[kind]["arg"]["name"]] = spec[kind][f"{kind}_name"]
    for spec in module["signature"]["output_specs"]:
        if "buffer_mutation" in spec:
            mutated.add(spec["buffer_mutation"]["buffer_name"])
    uses: list[NormUse] = []
    layers: list[WeightedUse] = []
    random: list[str] = []
    state: dict[str, Leaf] = {}
    for node in module["graph"]["nodes"]:
        operation = node["target"].removeprefix("torch.ops.aten.").split(".")[0]
        given = {each["name"]: _argument(each["arg"], names) for each in node["inputs"]}
        scope = _scope(node)
        if "batch_norm" in operation:
            mean = given.get("running_mean")
            named = str(mean).removesuffix("running_mean").removesuffix(".") if mean else scope or node["name"]
            by_batch = mean is None or bool(given.get("training", "no_training" not in operation))
            writes = by_batch and mean is not None and (operation == "batch_norm" or mean in mutated)
            uses.append(NormUse(named, by_batch, writes, given.get("eps")))
            for part in ("weight", "bias", "running_mean", "running_var"):
                if mean is not None and given.get(part) in leaves:
                    state[f"{named}.{part}"] = leaves[given[part]]
        elif given.get("weight") in leaves and ("conv" in operation or operation in ("linear", "addmm")):
            layers.append(_weighted(operation, given, leaves))
        elif (operation in _DROPOUTS and given.get("train", True) and given.get("p", 1.0)) or operation in _RANDOM:
            random.append(scope or node["name"])
    norms, unjudged = norms_in(state)
    return Program("torch.export", tuple(uses), tuple(norms), tuple(layers), tuple(random), tuple(unjudged))


def _weighted(operation: str, given: Mapping[str, Any], leaves: Mapping[str, Leaf]) -> WeightedUse:
    return WeightedUse(
        str(given["weight"]).removesuffix("weight").removesuffix("."),
        "transpose" in operation or bool(given.get("transposed")),
        int(given.get("groups") or 1),
        leaves[given["weight"]],
        leaves.get(str(given.get("bias"))),
    )


def _argument(argument: Mapping[str, Any], names: Mapping[str, str]) -> Any:
    """A constant, the name of a parameter or buffer, or None."""
    if "as_tensor" in argument:
        return names.get(argument["as_tensor"]["name"])
    if "as_optional_tensor" in argument:
        return _argument(argument["as_optional_tensor"], names)
    return next((argument[kind] for kind in ("as_bool", "as_float", "as_int") if kind in argument), None)


def _scope(node: Mapping[str, Any]) -> str:
    """The module of an operation, as ``body.6``."""
    stack = node.get("metadata", {}).get("nn_module_stack", "").split(";")[-1].split(",")
    return stack[1] if len(stack) > 1 else ""


def _leaves(archive: Archive) -> dict[str, Leaf]:
    """Parameters and buffers by name."""
    found: dict[str, Leaf] = {}
    for name in archive.records:
        folder = name.rpartition("/")[0]
        if name.endswith(("_weights_config.json", "_constants_config.json")):
            for key, entry in json.loads(archive.read(name))["config"].items():
                if not entry.get("use_pickle"):
                    found[key] = _leaf(archive, f"{folder}/{entry['path_name']}", entry["tensor_meta"])
        elif name.endswith(("serialized_state_dict.pt", "serialized_state_dict.json")):  # before torch 2.9
            content = torch.load(io.BytesIO(archive.read(name)), map_location="cpu", weights_only=True)
            found |= {str(key): value for key, value in content.items()}
    return found


def _leaf(archive: Archive, record: str, meta: Mapping[str, Any]) -> StoredTensor:
    shape, stride = ([int(each["as_int"]) for each in meta[part]] for part in ("sizes", "strides"))
    if meta["dtype"] not in _DTYPES:
        return StoredTensor(tuple(shape), partial(_refused, meta["dtype"]))
    offset = int(meta["storage_offset"]["as_int"])
    return strided(partial(archive.read, record), _DTYPES[meta["dtype"]], offset, shape, stride)


def _refused(code: int) -> torch.Tensor:
    raise ValueError(f"its numbers are of kind {code}")
