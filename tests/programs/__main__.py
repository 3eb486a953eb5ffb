"""Write the table of honest programs, and of what is said of each, into docs/rules/honest-programs.md:
`python -m programs` in tests/."""

from __future__ import annotations

import tempfile
from pathlib import Path

from programs import PROGRAMS
from programs.running import BEGIN, END, PAGE, row, run


def main() -> None:
    rows = ["| program | kind | said, as information |", "|---|---|---|"]
    for name in PROGRAMS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(name, run(name, Path(folder), watched=True).found))
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(rows) + f"\n{END}{after}")


if __name__ == "__main__":
    main()
