"""How the weights of a model are quantised, and whether the libraries are here that load them so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from actors.engine.errors import LoadError, first_line


def quantization_config(path: str, settings: Mapping[str, Any]) -> Any:
    """transformers' quantisation config with these settings, which hold its `quant_method`.

    Raises LoadError for an unknown method or key, and names the library that the method needs and that is not here.
    """
    from transformers.quantizers.auto import (
        AutoHfQuantizer,
        AutoQuantizationConfig,
    )  # slow, rarely used

    what = f"quantization of {path}"
    try:
        config = AutoQuantizationConfig.from_dict(dict(settings))
        quantizer = AutoHfQuantizer.from_config(config)
    except (ValueError, TypeError) as error:
        out = "See transformers' quantization documentation for the keys of each quant_method."
        raise LoadError(what, str(error), out) from error
    except ImportError as error:
        raise _missing(what, error) from error
    try:
        quantizer.validate_environment(dtype=None, device_map=None, weights_only=None)
    except ImportError as error:
        raise _missing(what, error) from error
    except (RuntimeError, ValueError, TypeError):  # such as a missing GPU: loading says so, where it is loaded
        pass
    return config


def _missing(what: str, error: ImportError) -> LoadError:
    out = "Install it on every node that can have the role, or use a checkpoint without quantization."
    return LoadError(what, f"a library is not installed here: {first_line(error)}", out)
