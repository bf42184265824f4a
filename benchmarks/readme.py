"""Put the tables of benchmarks/results into README.md, between their markers.

python benchmarks/readme.py [--check]
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def filled(page: str, results: Path) -> str:
    """The page with ``<!-- table: NAME --> ... <!-- end -->`` holding NAME.md, headings left out.

    Raises:
        FileNotFoundError: a table that no benchmark wrote.
    """

    def put(found: re.Match[str]) -> str:
        text = (results / f"{found[1]}.md").read_text()
        body = "\n".join(line for line in text.splitlines() if not line.startswith("# ")).strip()
        return f"<!-- table: {found[1]} -->\n{body}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", put, page, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    check = parser.parse_args().check
    file = ROOT / "README.md"
    page = file.read_text()
    new = filled(page, ROOT / "benchmarks" / "results")
    if check:
        return int(new != page)
    file.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
