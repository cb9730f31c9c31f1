"""Builds the page of recorded answers, or records answers for it.

    python -m cluster.page [--out build/playground.html]
    python -m cluster.page --record cluster/page/recordings/embedded-trio.yaml [--url http://127.0.0.1:8000]

Without --record: writes one HTML file with every recording of cluster/page/recordings, which a browser opens without a
network. This needs Python and nothing else. With --record: asks the questions of a YAML or JSON file in all three modes
of the playground, and writes the answers beside that file, as .json. The keys of the file are in
cluster/page/questions.py. It starts the file's service, or asks the one at --url; if that asks for a key, set
OPENAI_API_KEY. Exit status 1: the message says why.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.page.bundle import BundleError
from cluster.page.html import build
from cluster.page.recording import RecordingError

OUT = Path("build/playground.html")


def main(arguments: Sequence[str] | None = None) -> int:
    """Build or record. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help=f"the page to write; default: {OUT}")
    parser.add_argument("--record", type=Path, metavar="FILE", help="the questions to ask")
    parser.add_argument("--url", help="of a running service, for --record; default: start the file's service")
    options = parser.parse_args(arguments)
    if options.record is not None:
        from cluster.page.record import record_file  # loads Ray, without which pages are built

        return record_file(options.record, options.url)
    try:
        page = build()
    except (BundleError, RecordingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page, encoding="utf-8")
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB; open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())
