"""Is this configuration sound, and does it fit? Nothing is loaded or started.

    python -m cluster.check ray_config.yaml [--download]

Prints what each role costs, what its checkpoints disagree about, and what is missing with the command that mends it.
Exit status 0: the service can start. 1: it cannot, or not as configured.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError
from rich.console import Console

from actors.api.generation import ROLES
from actors.config import ConfigError, RouterConfig, ServiceConfig
from actors.preflight import Finding, findings, load_tokenizers
from cluster.check_report import show
from cluster.estimate import Estimate, disk_findings, estimate, free_disk, memory_findings
from cluster.gpus import gpu_memory
from cluster.serve_file import listening_host, read_service_config
from cluster.weights import download
from router.keys import Keys


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
        return check(config, listening_host(options.file), console)
    except ConfigError as error:
        for line in str(error).splitlines():
            console.print(f"[bold red]error[/] {options.file}: ", end="")
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return 1


def check(config: ServiceConfig, host: str, console: Console) -> int:
    """Print everything about a configuration whose keys are sound; 1 if it cannot start. host: where it listens."""
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
    found += entrance_findings(config.router, host)
    found.sort(key=Finding.rank)
    show(console, estimates, gpus, found)
    errors = sum(finding.severity == "error" for finding in found)
    console.print(f"[bold red]{errors} errors: the service would not start.[/]" if errors else "[green]Ready.[/]")
    return 1 if errors else 0


def entrance_findings(router: RouterConfig, host: str) -> list[Finding]:
    """What is to say about who may ask. Raises ConfigError where the API keys that are here are not sound."""
    if not router.keys.required:
        if _is_loopback(host):
            return []
        message = f"listens on {host} and asks nobody for a key: set router.keys, or put a gateway before it that does"
        return [Finding("warning", "router", message)]
    file, variable = router.keys.file, router.keys.env
    missing = [
        *([f"router.keys.file {file}"] if file and not Path(file).expanduser().exists() else []),
        *([f"router.keys.env {variable}"] if variable and variable not in os.environ else []),
    ]
    if not missing:
        Keys(router.keys)
    return [Finding("warning", "router", f"{name} is not here; each router needs it to start") for name in missing]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
