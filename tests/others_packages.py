"""Modules of packages that cannot be imported as a whole."""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest


def loaded_alone(package: str, path: str) -> ModuleType:
    """Return the module at `path` in an installed package, which is not imported: timm imports torchvision, whose build
    has to be that of torch. Skips the test where the package is not installed."""
    found = find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed")
    name = f"{package}_{Path(path).stem}"
    if name not in sys.modules:
        spec = spec_from_file_location(name, Path(found.origin).parent / path)
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
