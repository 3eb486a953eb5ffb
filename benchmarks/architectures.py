"""Whether architectures, most of which no test uses, are converted, trained and recalibrated as they should be, and
whether the guard stays silent about them: the table of docs/compatibility.md.

    pip install --no-deps timm==1.0.31 torchvision==0.28.0
    python benchmarks/architectures.py [--messages] [NAME ...]

Each runs in a process of its own, from random weights, on one thread, with batches of 8:

- *identical*: after 2 steps of SGD losses and weights are bit-identical to those with torch's layers, converted without
  an averaging, with `Exponential` of the layers' own momentum (these two with all buffers) and with `Window(20)`.
- *recalibrated*: the largest difference from an oracle's mean (in standard deviations) and variance (relative), over
  all channels of all layers, of the model in float64: in float32 rounding grows through the layers of some networks
  to 3e-3. The oracle keeps what every layer is given, and takes moments of it at the end.
- *said*: what `ModeCheck` says of a healthy fit of two epochs, and `check` after it, with torch's layers and with
  `Window(20)`. Codes of information are in parentheses.
- *deviation* (with `--messages`): the largest standard deviation of a normalised channel over the validation images in
  eval mode, after each of these fits, and behind it the largest where each layer normalises with the batch, which is 1
  but for what eps and the unbiased variance change. In float64, by hooks that keep what every layer is given: what
  BN210 says is true where the former is 10 and more.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import sys
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import other_torchvision  # noqa: F401  # before lightning

# isort: split
import lightning.pytorch as pl

from lightning_bn import Averaging, Exponential, Finding, ModeCheck, Window, check, convert_batch_norm, recalibrate

BATCH, CLASSES, STEPS, BATCHES = 8, 4, 2, 4  # BATCHES in an epoch
PATIENCE = 900  # seconds for one architecture

TIMM = {  # by the side of the images, the smallest that is tried and works
    64: """
        gcresnext26ts botnet26t_256 test_byobnet cs3darknet_focus_s cspnext_tiny densenet121 dla46x_c dpn48b
        test_efficientnet efficientvit_b0 fasternet_t0 ghostnet_050 hardcorenas_b hgnetv2_b0 iformer_t
        inception_next_atto lcnetv2_small lowformer_b0 mobilenetv3_small_050 mobilevit_xxs nextvit_small regnetx_002
        repghostnet_050 repvit_m1 res2next50 resnest14d test_resnet resnetv2_18 rexnet_100 legacy_seresnet18 shvit_s1
        skresnet18 starnet_s050 ese_vovnet19b_slim_dw xception41p fastvit_t8 cpubone_nano efficientvim_m1
        visformer_tiny xcit_nano_12_p8_224 mobileone_s0 selecsls42
    """,
    128: "inception_v3",
    160: "test_coatnet",
    224: "efficientformer_l1 efficientvit_m0 levit_128s swiftformer_xs",
}
SIDES = {name: side for side, names in TIMM.items() for name in names.split()}

IMAGES, SERIES = (3, 64, 64), (32, 2)
HUGGING_FACE: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {  # class, shape of an input, config
    "MobileNetV1": ("ForImageClassification", IMAGES, {"depth_multiplier": 0.25}),
    "MobileViT": ("ForImageClassification", IMAGES, {"hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8] * 7}),
    "MobileViTV2": ("ForImageClassification", IMAGES, {"width_multiplier": 0.5}),
    "Levit": ("ForImageClassification", (3, 128, 128), {"image_size": 128}),
    "SwiftFormer": ("ForImageClassification", IMAGES, {"depths": [1, 1, 2, 1]}),
    "HGNetV2": ("ForImageClassification", IMAGES, {"stage_numb_of_layers": [2] * 4}),
    "TextNet": (
        "ForImageClassification",
        IMAGES,
        {
            "conv_layer_kernel_sizes": [[[3, 3]], [[3, 1], [1, 3]], [[3, 3]], [[3, 3]]],
            "conv_layer_strides": [[2], [2, 1], [2], [1]],
        },
    ),
    "Cvt": ("ForImageClassification", IMAGES, {"depth": [1, 2, 3]}),
    "PPLCNet": ("ForImageClassification", IMAGES, {"scale": 0.5}),
    "Segformer": ("ForSemanticSegmentation", IMAGES, {}),
    "Beit": (
        "ForSemanticSegmentation",
        IMAGES,
        {"image_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
        | {"intermediate_size": 64, "out_indices": [1, 2, 3, 4]},
    ),
    "PatchTST": ("ForPrediction", SERIES, {"num_input_channels": 2, "d_model": 16, "ffn_dim": 32, "dropout": 0.1}),
    "PatchTSMixer": ("ForPrediction", SERIES, {"num_input_channels": 2, "norm_mlp": "BatchNorm"}),
    "Wav2Vec2Conformer": (
        "Model",
        (4000,),
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        | {"conv_dim": [32] * 7, "num_conv_pos_embeddings": 16, "layerdrop": 0.0, "mask_time_prob": 0.0},
    ),
    "ParakeetEncoder": (
        "",
        (64, 80),
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        | {"subsampling_conv_channels": 8, "layerdrop": 0.0},
    ),
}


def build(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """Return the architecture with random weights, and the shape of an input of it."""
    torch.manual_seed(0)
    if name in HUGGING_FACE:
        import transformers

        kind, shape, settings = HUGGING_FACE[name]
        labels = {"num_labels": CLASSES} if kind.startswith(("ForImage", "ForSemantic")) else {}
        config = getattr(transformers, f"{name}Config")(**settings, **labels)
        return getattr(transformers, name + kind)(config), shape
    import timm

    side = SIDES[name]
    try:
        model = timm.create_model(name, num_classes=CLASSES, img_size=side)
    except TypeError:  # it takes any size
        model = timm.create_model(name, num_classes=CLASSES)
    return model, (3, side, side)


def data(shape: tuple[int, ...], batches: int, seed: int) -> TensorDataset:
    """Return inputs of `CLASSES` classes, each a pattern of its own in noise, and their classes."""
    patterns = torch.randn(CLASSES, *shape, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(CLASSES, (batches * BATCH,), generator=generator)
    return TensorDataset(patterns[classes] + torch.randn(len(classes), *shape, generator=generator), classes)


def answers(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the scores of the classes: the first numbers of the first tensor that the model returns."""
    output = model(inputs) if not hasattr(model, "main_input_name") else model(**{model.main_input_name: inputs})
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output.flatten(1)[:, :CLASSES]


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {name: each for name, each in model.named_modules() if isinstance(each, _BatchNorm)}


def are_identical(
    model: nn.Module, shape: tuple[int, ...], averagings: dict[str, tuple[Averaging | None, bool]]
) -> dict[str, Any]:
    """Train the model as it is and converted to each averaging, from one state and one seed, and say which come to the
    same losses and parameters, and where asked for buffers."""
    built = copy.deepcopy(model)
    losses = train(built, shape)

    def is_identical(averaging: Averaging | None, buffers: bool) -> bool:
        converted = convert_batch_norm(copy.deepcopy(model), averaging)
        if train(converted, shape) != losses:
            return False
        pairs = [(value, converted.get_parameter(name)) for name, value in built.named_parameters()]
        if buffers:
            pairs += [(value, converted.get_buffer(name)) for name, value in built.named_buffers()]
        return all(torch.equal(one, other) for one, other in pairs)

    return {kind: attempt(lambda given=given: is_identical(*given)) for kind, given in averagings.items()}


def train(model: nn.Module, shape: tuple[int, ...]) -> list[float]:
    """Return the losses of a few steps of SGD."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01, momentum=0.9)
    losses = []
    for inputs, classes in DataLoader(data(shape, STEPS, seed=1), BATCH):
        loss = F.cross_entropy(answers(model, inputs), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def recalibration_error(model: nn.Module, shape: tuple[int, ...]) -> float:
    """Return the largest difference between recalibrated statistics and the oracle's."""
    model = copy.deepcopy(model).double().eval()
    batches = [inputs.double() for inputs, _ in DataLoader(data(shape, 2, seed=2), BATCH)]
    expected = oracle(copy.deepcopy(model), batches)
    recalibrate(model, batches, forward=answers, progress=False)
    worst = 0.0
    for name, layer in batch_norms(model).items():
        if name in expected:
            mean, var = expected[name]
            scale = var + layer.eps
            shift, ratio = (layer.running_mean - mean) / scale.sqrt(), (layer.running_var - var) / scale
            worst = max(worst, shift.abs().max().item(), ratio.abs().max().item())
    return worst


def oracle(model: nn.Module, batches: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return mean and unbiased variance of what each batch norm that runs is given, by its name, while they all
    normalise with the batch."""
    seen: dict[str, list[Tensor]] = {}
    for name, layer in batch_norms(model).items():
        layer.train()
        layer.register_forward_pre_hook(
            lambda _, given, name=name: seen.setdefault(name, []).append(given[0].transpose(0, 1).flatten(1))
        )
        for part in list(layer.modules())[1:]:  # such as a dropout of timm's layers
            part.eval()
    with torch.no_grad():
        for inputs in batches:
            answers(model, inputs)
    joined = {name: torch.cat(parts, 1) for name, parts in seen.items()}
    return {name: (values.mean(1), values.var(1, unbiased=True)) for name, values in joined.items()}


class Fit(pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(answers(self.model, batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-4)  # SGD diverges in some of them


def fitted(model: nn.Module, shape: tuple[int, ...]) -> tuple[list[Finding], float, float]:
    """Return what is said of a fit without a mistake, and of the model after it, and the two deviations."""
    guard, fit = ModeCheck(action="log"), Fit(model.train())
    torch.manual_seed(3)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_epochs=2, num_sanity_val_steps=0, callbacks=[guard], **off)
    loader = DataLoader(data(shape, BATCHES, seed=4), BATCH, shuffle=True)
    trainer.fit(fit, loader, DataLoader(data(shape, 1, seed=5), BATCH))
    found = [*guard.findings, *check(fit)]
    return found, *(deviation(model, shape, training=training) for training in (False, True))


def deviation(model: nn.Module, shape: tuple[int, ...], *, training: bool) -> float:
    """Return the largest standard deviation that a channel has over the validation images once it is normalised, over
    all layers, in float64."""
    model = copy.deepcopy(model).double().eval()
    largest = 0.0

    def look(layer: _BatchNorm, given: tuple[Tensor, ...]) -> None:
        nonlocal largest
        values = given[0].transpose(0, 1).flatten(1)
        var = values.var(1, unbiased=True)
        divided_by = var if training or layer.running_var is None else layer.running_var
        largest = max(largest, (var / (divided_by + layer.eps)).sqrt().max().item())

    for layer in batch_norms(model).values():
        layer.training = training
        layer.register_forward_pre_hook(look)
    with torch.no_grad():
        for inputs, _ in DataLoader(data(shape, 1, seed=5), BATCH):
            answers(model, inputs.double())
    return largest


def attempt(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:  # whatever goes wrong is a cell of the table
        return f"{type(error).__name__}: {str(error)[:200]}"


def windowed(model: nn.Module) -> nn.Module:
    return convert_batch_norm(copy.deepcopy(model), Window(20))


FITTED = {"torch's": copy.deepcopy, "windowed": windowed}
"""By what is fitted: how it is made of a model."""


def measure(name: str) -> dict[str, Any]:
    """Return the row of an architecture."""
    torch.set_num_threads(1)
    model, shape = build(name)
    layers = batch_norms(model).values()
    row: dict[str, Any] = {"layers": len(layers), "classes": sorted({type(each).__name__ for each in layers})}
    momenta = {each.momentum for each in layers}
    one = momenta.pop() if len(momenta) == 1 else None
    averagings = {"none": (None, True), "Window(20)": (Window(20), False)}
    averagings["Exponential"] = (Exponential(0.1 if one is None else one), one is not None)
    row |= are_identical(model, shape, averagings)
    row["recalibrated"] = attempt(lambda: recalibration_error(model, shape))
    for kind, convert in FITTED.items():
        found = attempt(lambda convert=convert: fitted(convert(model), shape))
        row[kind] = found if isinstance(found, str) else [(each.level, each.code, str(each)) for each in found[0]]
        if not isinstance(found, str):
            row["deviation"] = row.get("deviation", {}) | {kind: found[1:]}
    return row


def in_process(name: str) -> dict[str, Any]:
    """Return the row of an architecture; where its process ends without one, that."""
    context = get_context("fork")  # with what has been imported
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(name, send))
    process.start()
    send.close()
    try:
        row = receive.recv() if receive.poll(PATIENCE) else {"failed": f"no end in {PATIENCE} s"}
    except EOFError:
        row = {"failed": "its process ended"}
    process.kill()
    process.join()
    return dict(row)


def _send(name: str, send: Any) -> None:
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()):
        row = attempt(lambda: measure(name))
    send.send({"failed": row} if isinstance(row, str) else row)


def said(found: Any) -> str:
    if isinstance(found, str):
        return found
    codes = dict.fromkeys(code if level != "info" else f"({code})" for level, code, _ in found)
    return " ".join(codes) or "-"


def as_line(name: str, row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"| {name} | {row['failed']} |"
    kept = [row[kind] for kind in ("none", "Exponential", "Window(20)")]
    identical = "yes" if kept == [True] * 3 else "; ".join(map(str, kept))
    off = row["recalibrated"]
    norms, error = f"{row['layers']} {', '.join(row['classes'])}", off if isinstance(off, str) else f"{off:.0e}"
    return f"| {' | '.join((name, norms, identical, error, *(said(row[kind]) for kind in FITTED)))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures; all without any")
    parser.add_argument("--messages", action="store_true", help="print what is said in full too")
    options = parser.parse_args()
    print("| architecture | batch norms | identical | recalibrated | said, torch's layers | said, `Window(20)` |")
    print("|---|---|---|---:|---|---|")
    for name in options.names or [*HUGGING_FACE, *SIDES]:
        row = in_process(name)
        print(as_line(name, row), flush=True)
        if options.messages:
            print_messages(row)


def print_messages(row: dict[str, Any]) -> None:
    messages = [text for kind in FITTED if not isinstance(row.get(kind, ""), str) for *_, text in row[kind]]
    for line in dict.fromkeys(messages):
        print(line)
    for kind, (running, batch) in row.get("deviation", {}).items():
        print(f"deviation, {kind}: {running:.3g} in eval mode, {batch:.3g} with the batch's own statistics", flush=True)


if __name__ == "__main__":
    main()
