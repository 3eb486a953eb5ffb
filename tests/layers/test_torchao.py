"""What docs/recipes.md says of torchao: it folds the running statistics in as it prepares, and needs plain layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import Net
from torch import nn

from lightning_bn import Window, convert_batch_norm, to_torch

pytest.importorskip("torchao")


def prepared(model: nn.Module, images: torch.Tensor) -> Any:
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    return prepare_pt2e(torch.export.export(model, (images,)).module(), quantizer)


def batch_norms(model: Any) -> int:
    return sum("batch_norm" in str(node.target) for node in model.graph.nodes)


def test_prepare_pt2e_folds_plain_layers_and_refuses_ours() -> None:
    """The two convolutions' batch norms are folded in; a layer of this package is one that torchao refuses."""
    images = torch.randn(8, 1, 6, 6)
    model = convert_batch_norm(Net(), Window(3))
    model(images)
    plain = to_torch(model).eval()
    exported = torch.export.export(plain.backbone, (images,)).module()
    assert batch_norms(exported) == 2
    assert batch_norms(prepared(plain.backbone, images)) == 0
    converted = convert_batch_norm(Net(), Window(3)).eval()
    with pytest.raises(ValueError, match="Expected get_attr node"):
        prepared(converted.backbone, images)
