"""examples/cost_of_mistakes.py, and the table it wrote into docs/rules/what-mistakes-cost.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cost_of_mistakes import BEGIN, END, HEADER, measure, row, write
from costs import MISTAKES, Mistake, Outcome, Setting
from fitting import quiet

from lightning_bn.rules import RULES

PAGE = Path(__file__).parent.parent.parent / "docs" / "rules" / "what-mistakes-cost.md"
SORTED = sorted(MISTAKES, key=lambda mistake: mistake.code)


def lines() -> list[str]:
    """Return the lines of the table on the page."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip().splitlines()


def test_table_is_that_of_the_example() -> None:
    """A row for each program in which its rule spoke, and at least one for each rule; the gain is the difference."""
    assert lines()[:2] == list(HEADER)
    assert {mistake.code for mistake in MISTAKES} == set(RULES)
    for line, mistake in zip(lines()[2:], SORTED, strict=True):
        rule, what, said, wrong, mended, gain = (cell.strip() for cell in line.strip("|").split("|"))
        assert (rule, what) == (f"[{mistake.code}]({mistake.code.lower()}.md)", mistake.what)
        assert mistake.code in said.partition("mended")[0]
        before, after, difference = (float(re.search(r"[-+]?[\d.]+", cell).group()) for cell in (wrong, mended, gain))
        assert difference == pytest.approx(after - before, abs=0.11)


def test_page_says_why_a_rule_without_cost_is_one() -> None:
    """Of each rule none of whose programs lost accuracy beyond doubt, and of no other, the page gives the reason."""
    free = {_code_of(line) for line in lines()[2:]} - {_code_of(line) for line in lines()[2:] if "**+" in line}
    reasons = re.findall(r"^- \[(BN\d+)\]\(bn\d+\.md\): ", PAGE.read_text().partition(END)[2], re.MULTILINE)
    assert reasons == sorted(free)


def _code_of(line: str) -> str:
    return re.match(r"\| \[(BN\d+)\]", line).group(1)


def test_rows_are_replaced_in_their_places(tmp_path: Path) -> None:
    """New rows take the places of those of the same rule, and all else on the page stays."""
    page = tmp_path / "page.md"
    table = "\n".join(
        [BEGIN, *HEADER, "| [BN101] old |", "| [BN201] old |", "| [BN201] older |", "| [BN301] old |", END]
    )
    page.write_text(f"before\n{table}\nafter\n")
    write(page, ["| [BN201] new |", "| [BN302] new |"])
    new = ["| [BN101] old |", "| [BN201] new |", "| [BN301] old |", "| [BN302] new |"]
    assert page.read_text() == "\n".join(["before", BEGIN, *HEADER, *new, END, "after", ""])


@pytest.mark.parametrize("code", ["BN101", "BN107", "BN209", "BN305"])
def test_one_epoch(code: str) -> None:
    """The rule speaks of the mistake and nothing is said above information of the mended program."""
    mistake = next(each for each in MISTAKES if each.code == code)
    with quiet():
        assert code in {finding.code for finding in measure(mistake, Setting(0, 1), mend=False).findings}
        mended = measure(mistake, Setting(0, 1), mend=True).findings
    assert [finding.code for finding in mended if finding.level != "info"] == []


def test_row() -> None:
    """Means and standard deviations by hand; a gain that each of four runs shows alike is beyond doubt, one that
    scatters is not."""
    accuracies = {True: [92.0, 94.0, 91.0, 95.0], False: [90.0, 92.0, 89.0, 93.0]}
    mistake = Mistake("BN303", "bias", lambda setting, mend: Outcome(accuracies[mend][setting.seed], []))
    assert row(mistake, 4, 1) == "| [BN303](bn303.md) | bias |  | 91.0 ± 1.8 % | 93.0 ± 1.8 % | **+2.0** ± 0.0 |"
    accuracies[True] = [94.0, 92.0, 93.0, 93.0]
    # Differences of 4, 0, 4, 0: a standard error of 2.309 / 2, times Student's 5.841 at 99 % with 3 degrees of freedom.
    assert row(mistake, 4, 1).endswith("| +2.0 ± 6.7 |")
