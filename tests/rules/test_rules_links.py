"""Every message sends its reader to a page that is installed with the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from costs import MISTAKES
from torch import nn

from lightning_bn import check
from lightning_bn.cli.program import main
from lightning_bn.rules import RULES
from lightning_bn.rules.register import LINK

PAGES = Path(__file__).parent.parent.parent / "docs" / "rules"


@pytest.mark.parametrize("code", RULES)
def test_the_link_prints_the_page_of_the_rule(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The link is a command, which prints the rule's page down to both of its programs, and what its mistakes cost;
    with --full the whole page."""
    command, *arguments = LINK.format(code=code).split()
    assert command == "lightning-bn"
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{code} ({RULES[code].level})")
    short, _, details = (PAGES / f"{code.lower()}.md").read_text().strip().partition("\n\n## ")
    assert short in out
    assert "In detail\n" not in out
    assert out.count("```python") == 2
    costs = re.findall(
        r"^Accuracy with (.*): [\d.]+ ± [\d.]+ %; mended: [\d.]+ ± [\d.]+ %; gain: .*\.$", out, re.MULTILINE
    )
    assert costs == [mistake.what for mistake in MISTAKES if mistake.code == code]
    assert main([*arguments, "--full"]) == 0
    full = capsys.readouterr().out
    assert short in full
    assert details in full


def test_findings_have_the_link() -> None:
    """A finding's message ends with its rule's link."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, momentum=0.0))
    model[1].running_var.fill_(torch.nan)
    found = check(model)
    assert {finding.code for finding in found} == {"BN203", "BN301"}
    for finding in found:
        assert finding.link == LINK.format(code=finding.code)
        assert str(finding).endswith(f"more: {finding.link}")
