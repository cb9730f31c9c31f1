"""Is this configuration sound, and does it fit? Nothing is loaded or started.

    python -m cluster.check ray_config.yaml [--download]

Prints what each role costs, what its checkpoints disagree about, and what is missing with the command that mends it.
Exit status 0: the service can start. 1: it cannot, or not as configured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError
from rich.console import Console

from actors.config import ConfigError, ServiceConfig
from actors.preflight import Finding, findings, load_tokenizers
from actors.requests import ROLES
from cluster.estimate import Estimate, disk_findings, estimate, free_disk, memory_findings
from cluster.gpus import gpu_memory
from cluster.report import show
from cluster.serve_file import read_service_config
from cluster.weights import download


def main(arguments: Sequence[str] | None = None) -> int:
    """Check one file; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cluster.check", description="Check a service's configuration.")
    parser.add_argument("file", type=Path, help="the Serve config file, ray_config.yaml")
    parser.add_argument("--download", action="store_true", help="fetch the weights that are not here")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        config = read_service_config(options.file)
        if options.download:
            fetch(config, console)
        return check(config, console)
    except ConfigError as error:
        for line in str(error).splitlines():
            console.print(f"[bold red]error[/] {options.file}: ", end="")
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return 1


def check(config: ServiceConfig, console: Console) -> int:
    """Print everything about a configuration whose keys are sound; 1 if it cannot start."""
    tokenizers = load_tokenizers(config)
    found = findings(config, tokenizers)
    estimates: list[Estimate] = []
    for role in ROLES:
        costs, missing = estimate(config, role, tokenizers[role])
        estimates.append(costs)
        found += missing
    gpus = gpu_memory() if any(costs.gpus for costs in estimates) else []
    found += memory_findings(estimates, gpus)
    found += disk_findings(estimates, free_disk())
    found.sort(key=Finding.rank)
    show(console, estimates, gpus, found)
    errors = sum(finding.severity == "error" for finding in found)
    console.print(f"[bold red]{errors} errors: the service would not start.[/]" if errors else "[green]Ready.[/]")
    return 1 if errors else 0


def fetch(config: ServiceConfig, console: Console) -> None:
    """Download what is not a folder here. Raises ConfigError for what the hub refuses."""
    load_tokenizers(config)  # explains a gated or misspelt model before gigabytes are asked for
    for role in ROLES:
        model = config.models.role(role)
        if model.load_format == "dummy" or Path(model.path).expanduser().is_dir():
            continue
        console.print(f"{role}: {model.path}", highlight=False)
        try:
            download(model.path, model.revision)
        except (HfHubHTTPError, OSError) as error:
            raise ConfigError(f"models.{role}: {model.path} cannot be fetched: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
