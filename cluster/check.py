"""Checks a Serve config file and whether its models fit this machine, without loading weights or starting Ray.

    python -m cluster.check ray_config.yaml [--download]

Prints the memory that each role needs, the differences between the three checkpoints, every missing file with the
command that fetches it, and the tensors that a model lacks or does not take. Exit status: 0 if the service can start as
configured, otherwise 1.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError
from rich.console import Console

from actors.api.generation import ROLES
from actors.config import ConfigError, RouterConfig, ServiceConfig
from actors.preflight import Finding, findings, load_tokenizers
from cluster.check_report import show
from cluster.checkpoints import checkpoint_findings
from cluster.estimate import Estimate, disk_findings, estimate, free_disk, memory_findings
from cluster.gpus import gpu_memory
from cluster.serve_file import listening_host, read_service_config
from cluster.weights import download
from router.keys import Keys


def main(arguments: Sequence[str] | None = None) -> int:
    """Check one file. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cluster.check", description="Check a service's configuration.")
    parser.add_argument("file", type=Path, help="the Serve config file, ray_config.yaml")
    parser.add_argument("--download", action="store_true", help="first fetch weights that are missing here")
    options = parser.parse_args(arguments)
    console = Console()
    try:
        config, old_keys = read_with_old_keys(options.file)
        if options.download:
            fetch(config, console)
        return check(config, listening_host(options.file), console, old_keys)
    except ConfigError as error:
        show_config_error(console, options.file, error)
        return 1


def read_with_old_keys(file: Path) -> tuple[ServiceConfig, list[Finding]]:
    """The configuration, and a warning for each key under the name of an earlier release. Raises ConfigError."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FutureWarning)
        config = read_service_config(file)
    findings_of_keys = []
    for each in caught:
        if issubclass(each.category, FutureWarning):
            findings_of_keys.append(Finding("warning", "config", str(each.message)))
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno, source=each.source)
    return config, findings_of_keys


def show_config_error(console: Console, file: Path, error: ConfigError) -> None:
    """Print a line for each key that is wrong."""
    for line in str(error).splitlines():
        console.print(f"[bold red]error[/] {file}: ", end="", soft_wrap=True)
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def check(config: ServiceConfig, host: str, console: Console, old_keys: Sequence[Finding] = ()) -> int:
    """Print the costs and all findings. Returns 1 if the service cannot start. Arguments: see `examine`."""
    costs, gpus, found = examine(config, host, old_keys)
    show(console, costs, gpus, found)
    errors = sum(finding.severity == "error" for finding in found)
    console.print(f"[bold red]{errors} errors: the service would not start.[/]" if errors else "[green]Ready.[/]")
    return 1 if errors else 0


def examine(
    config: ServiceConfig, host: str, old_keys: Sequence[Finding] = ()
) -> tuple[list[Estimate], list[int], list[Finding]]:
    """Each role's costs, the bytes of memory of each GPU that is needed, and the findings, errors first.

    host: the address that the service listens on. old_keys: findings of `read_with_old_keys`. Raises ConfigError where
    API keys or tokenizers cannot be read.
    """
    tokenizers = load_tokenizers(config)
    found = [*old_keys, *findings(config, tokenizers)]
    estimates: list[Estimate] = []
    for role in ROLES:
        costs, missing = estimate(config, role, tokenizers)
        estimates.append(costs)
        found += missing
    broken = {finding.role for finding in found if finding.severity == "error"}
    found += checkpoint_findings(config, [costs.role for costs in estimates if costs.here and costs.role not in broken])
    gpus = gpu_memory() if any(costs.gpus for costs in estimates) else []
    found += memory_findings(estimates, gpus)
    found += disk_findings(estimates, free_disk())
    found += authentication_findings(config.router, host)
    found.sort(key=Finding.rank)
    return estimates, gpus, found


def authentication_findings(router: RouterConfig, host: str) -> list[Finding]:
    """Findings about HTTP authentication. Raises ConfigError if API keys on this machine are malformed."""
    if not router.keys.required:
        if _is_loopback(host):
            return []
        message = f"listens on {host} without authentication: set router.keys, or put a gateway with authentication "
        return [Finding("warning", "router", message + "in front of it")]
    file, variable = router.keys.file, router.keys.env
    missing = [
        *([f"router.keys.file {file} does not exist"] if file and not Path(file).expanduser().exists() else []),
        *([f"router.keys.env {variable} is not set"] if variable and variable not in os.environ else []),
    ]
    if not missing:
        Keys(router.keys)
    return [Finding("warning", "router", f"{one} on this machine; every router needs it to start") for one in missing]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def fetch(config: ServiceConfig, console: Console) -> None:
    """Download the weights of every role whose path is no local folder. Raises ConfigError if the hub refuses one."""
    load_tokenizers(config)  # a gated or misspelt model is refused before gigabytes are downloaded
    for role in ROLES:
        model = config.models.role(role)
        if model.load_format == "dummy" or Path(model.path).expanduser().is_dir():
            continue
        console.print(f"{role}: {model.path}", highlight=False)
        try:
            download(model.path, model.revision)
        except (HfHubHTTPError, OSError) as error:
            raise ConfigError(f"models.{role}: {model.path} cannot be downloaded: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
