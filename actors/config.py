"""The configuration of the whole service: the `args` of `ray_config.yaml`.

It is frozen and validated once, when it is read. The defaults of its keys are written here only, but for those of
`guidance`, `sampling` and `thinking`, which are in `actors.api`. An unknown key is an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from actors.api.generation import ROLES, Role
from actors.api.guidance import MAX_ALPHA, Guidance
from actors.api.sampling_params import Sampling, Thinking

# Forms in which models write tool calls: actors/text/tool_formats.py
ToolParserName = Literal["hermes", "llama3_json", "mistral", "mistral_args", "deepseek_v3", "deepseek_v31", "json"]


class ConfigError(ValueError):
    """The configuration is wrong; the message names each key and what to do."""


VLLM_VERSION = "0.32"  # the only minor version of vLLM whose internals the engine knows


class _Section(BaseModel):
    """One section of the configuration. Keys that the last release renamed keep their old names, with a warning."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    renamed_keys: ClassVar[dict[str, str]] = {}  # old name -> new name; an entry is removed one release later

    @model_validator(mode="before")
    @classmethod
    def _read_renamed_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for old, new in cls.renamed_keys.items():
            if old not in data:
                continue
            if new in data:
                raise ValueError(f"{old} is the old name of {new}, and both are given: remove {old}")
            warnings.warn(
                f"the key {old} is called {new} now; the old name expires next release", FutureWarning, stacklevel=2
            )
            data[new] = data.pop(old)
        return data


class Replicas(_Section):
    """Number of replicas of a deployment: fixed if min equals max, else Serve autoscales between the two."""

    min: int = Field(1, ge=1)
    max: int = Field(1, ge=1)
    upscale_delay_s: float = Field(30, ge=0)  # load must be high for so long before a replica starts
    downscale_delay_s: float = Field(600, ge=0)  # and low for so long before one stops: a new one has to load its model
    look_back_s: float = Field(30, gt=0)  # load is averaged over this period, and reported three times in it

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"replicas.max ({self.max}) is below replicas.min ({self.min})")
        return self


class RequestReplicas(Replicas):
    """Replicas of a router or coordinator, scaled by their open requests, streams included."""

    target_ongoing: float | None = Field(None, gt=0)  # open requests per replica; None: the deployment's own default


class ModelReplicas(Replicas):
    """Replicas of a model role, scaled by cache use and queued extends (actors.serve.autoscaling)."""

    target_cache: float = Field(0.7, gt=0, le=1)  # used share of the cache; well above it sessions evict each other
    target_waiting: float = Field(32, gt=0)  # extends that wait or run; larger batches gain no more throughput


class ModelConfig(_Section):
    """The model of one role: its source, how it computes, and where it is placed."""

    path: str = Field(min_length=1)  # a local folder or a Hugging Face hub id
    revision: str | None = None
    trust_remote_code: bool = False
    load_format: Literal["auto", "dummy"] = "auto"  # dummy: random weights, from config.json alone; for benchmarks
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if num_gpus is above 0, else the CPU
    engine: Literal["auto", "native", "vllm"] = "auto"  # auto: vllm on a GPU where it is installed, else native
    device_map: str | dict[str, int | str] | None = None  # as in accelerate: layers spread over the GPUs of one node
    tensor_parallel: int = Field(1, ge=1)  # ranks of vLLM on one node; num_cpus and num_gpus are per rank
    quantization: dict[str, Any] | None = None  # passed to transformers as quantization_config
    tool_parser: Literal["auto"] | ToolParserName = "auto"  # form of its tool calls; auto: by its chat template
    adapter: str | None = None  # a PEFT adapter: a folder or a hub id
    attention: Literal["auto", "flash", "per_session", "gathered"] = "auto"  # auto: by device and dtype
    cache_tokens: int | Literal["auto"] = 65_536  # tokens of the KV cache, of all sessions; auto: measured at load
    prefill_chunk: int = Field(2_048, ge=1)  # most prompt tokens in one forward
    max_position: int | None = Field(None, ge=1)  # tokens per session; None: as the checkpoint says
    num_cpus: float = Field(0.2, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    resources: dict[str, float] = {}
    label_selector: dict[str, str] = {}  # labels that its Ray node must have
    runtime_env: dict[str, Any] = {}  # Ray's, of its replicas, such as image_uri
    replicas: ModelReplicas = ModelReplicas(min=1, max=1)

    @field_validator("cache_tokens", mode="before")
    @classmethod
    def _countable(cls, value: Any) -> Any:
        if value != "auto" and (not isinstance(value, int) or value < 64):
            raise ValueError("it must be auto, or a whole number of at least 64")
        return value

    @model_validator(mode="after")
    def _measurable(self) -> Self:
        if self.cache_tokens == "auto" and self.device_map is not None:
            raise ValueError("cache_tokens: auto measures one GPU, and device_map may use several: set a number")
        return self

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if self.trust_remote_code and not self.revision:
            raise ValueError(
                "trust_remote_code runs code from the model's repository: pin a revision (a commit hash) beside it"
            )
        return self

    @model_validator(mode="after")
    def _shareable(self) -> Self:
        if self.tensor_parallel == 1:
            return self
        others = [name for name in ("device_map", "quantization", "adapter") if getattr(self, name)]
        if self.engine == "native":
            raise ValueError("tensor_parallel is vLLM's: set engine to auto or vllm")
        if others:
            raise ValueError(f"tensor_parallel cannot be combined with {' or '.join(others)}: leave one of them out")
        if self.num_gpus and not 0.5 < self.num_gpus <= 1:
            raise ValueError(
                f"num_gpus ({self.num_gpus:g}) is per rank of tensor_parallel: above 0.5, so that no two ranks share "
                "a GPU, and at most 1, or 0 for ranks on the CPU"
            )
        if not self.num_gpus and not self.num_cpus:
            raise ValueError("tensor_parallel needs num_cpus or num_gpus above 0 for each rank")
        return self


class Models(_Section):
    """The three roles."""

    target: ModelConfig
    guider: ModelConfig
    guider_base: ModelConfig

    def role(self, role: Role) -> ModelConfig:
        """The model of a role."""
        model: ModelConfig = getattr(self, role)
        return model


class Exchange(_Section):
    """The slices of logits that models send to coordinators."""

    renamed_keys: ClassVar[dict[str, str]] = {"widen_above": "max_unseen_mass"}

    mode: Literal["topk", "full"] = "topk"
    k: int = Field(128, ge=1)  # logits per slice
    max_unseen_mass: float = Field(0.0005, ge=0, le=1)  # widen an unsettled row above this unseen mass; 1: never
    widen_factor: int = Field(8, ge=2)  # the first widening multiplies k by this; the second requests the whole row
    audit_every: int = Field(1_000, ge=0)  # compare one guided row in so many with the whole rows; 0: none


class Speculation(_Section):
    """Speculative decoding: drafted tokens are verified together. Drafts change an answer's speed, never its tokens."""

    drafts: int = Field(7, ge=0, le=8)  # most drafted tokens per verification; 0: none
    adapt: bool = True  # fit the number to the session's acceptance and the forwards' times; false: always `drafts`
    lookup: bool = True  # without guidance, draft from the session's own text (prompt lookup)


class CoordinatorConfig(_Section):
    """The coordinators. Each decodes many sessions at a time."""

    max_sessions: int = Field(64, ge=1)  # sessions that one coordinator decodes together; more are queued
    max_waiting: int = Field(256, ge=0)  # queued requests; one more is refused with status 429
    num_cpus: float = Field(0.2, ge=0)
    replicas: RequestReplicas = RequestReplicas(min=1, max=1)
    label_selector: dict[str, str] = {}

    @property
    def most_sessions(self) -> int:
        """Sessions that all coordinators decode together, at most."""
        return self.max_sessions * self.replicas.max

    @property
    def target_ongoing(self) -> float:
        """Open requests per replica that autoscaling aims at: below max_sessions, so that few wait meanwhile."""
        return self.replicas.target_ongoing or 0.75 * self.max_sessions

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.replicas.max > self.replicas.min and self.target_ongoing >= self.max_sessions + self.max_waiting:
            raise ValueError(
                f"replicas.target_ongoing ({self.target_ongoing:g}) is never passed: a coordinator refuses "
                f"what is more than max_sessions + max_waiting ({self.max_sessions + self.max_waiting})"
            )
        return self


class KeysConfig(_Section):
    """The sources of API keys (format: router.keys). Without a file or variable the API is unauthenticated."""

    file: str | None = Field(None, min_length=1)  # on every router's node; read again when it changes
    env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")  # a variable in the routers' environment
    # Paths that need no key; /* at the end means all below. The request log leaves them out.
    open_paths: tuple[Annotated[str, Field(pattern="^/")], ...] = (
        *("/", "/playground/*", "/openapi.json"),
        *("/health", "/ready", "/version", "/metrics"),
    )

    @property
    def required(self) -> bool:
        """True if requests need a key."""
        return self.file is not None or self.env is not None

    def opens(self, path: str) -> bool:
        """True if a path needs no key."""
        return any(path == one or (one.endswith("/*") and path.startswith(one[:-1])) for one in self.open_paths)


class LimitsConfig(_Section):
    """Limits of each API key at each router replica; None: no limit."""

    requests_per_minute: float | None = Field(None, gt=0)  # on average; after a quiet minute as many at once
    open_requests: int | None = Field(None, ge=1)  # requests in progress or queued at the same time


class RouterConfig(_Section):
    """The HTTP server."""

    max_request_bytes: int = Field(4_194_304, ge=1_024)
    keep_alive_s: float = Field(15, gt=0)  # interval of comments in an idle stream, so that no proxy closes it
    playground: bool = True  # the page at `/`
    examples: tuple[str, ...] = ()  # questions that the playground suggests
    num_cpus: float = Field(0.1, ge=0)
    replicas: RequestReplicas = RequestReplicas(min=1, max=1)
    max_request_tokens: int | None = Field(None, ge=1)  # prompts and answers of one request together, in tokens
    keys: KeysConfig = KeysConfig()
    limits: LimitsConfig = LimitsConfig()
    cors_origins: tuple[
        Annotated[str, Field(pattern=r"^(\*|https?://[^/\s]+)$")], ...
    ] = ()  # origins whose pages may use the API
    log_prompts: bool = False  # write prompts to the request log; no other log has them

    @property
    def target_ongoing(self) -> float:
        """Open requests per replica that autoscaling aims at: one stream of events takes about 1 % of a core."""
        return self.replicas.target_ongoing or 64.0

    @model_validator(mode="after")
    def _countable(self) -> Self:
        if self.limits != LimitsConfig() and not self.keys.required:
            raise ValueError("limits are counted for each key: set keys.file or keys.env, or leave limits out")
        return self


class Deadlines(_Section):
    """Timeouts in seconds; the comments say what follows."""

    renamed_keys: ClassVar[dict[str, str]] = {"missing_s": "reconnect_timeout_s", "silent_s": "peer_timeout_s"}

    model_load_s: float = Field(1_800, gt=0)  # then the replica does not start, and the error names its last step
    reconnect_timeout_s: float = Field(300, gt=0)  # a session without a model or coordinator fails after this
    step_s: float = Field(60, gt=0)  # a model that owes a row so long and finishes no forward is taken for dead
    peer_timeout_s: float = Field(15, gt=0)  # a peer that sends nothing for so long is taken for dead
    connect_s: float = Field(5, gt=0)  # an attempt to connect is given up and made again
    request_s: float = Field(3_600, gt=0)  # the request ends with an error, status 504


class Effort(_Section):
    """One value of a request's reasoning_effort. The request's own fields win over it.

    thinking_tokens: limit of the thinking; 0: no thinking; None: thinking.max_tokens. alpha: None: as `guidance` says.
    """

    thinking_tokens: int | None = Field(None, ge=0)
    alpha: float | None = Field(None, ge=-MAX_ALPHA, le=MAX_ALPHA)


_NO_EFFORT = {"none": Effort(thinking_tokens=0, alpha=0.0)}
_EFFORTS = {
    "minimal": Effort(thinking_tokens=256),
    "low": Effort(thinking_tokens=1_024),
    "medium": Effort(thinking_tokens=4_096),
    "high": Effort(thinking_tokens=16_384),
    "xhigh": Effort(thinking_tokens=32_768),
    "max": Effort(),
}


def _sampling_tag(value: Any) -> str:
    return _CHECKPOINT if isinstance(value, str) else _VALUES


_CHECKPOINT, _VALUES = "checkpoint", "values"
_SamplingOrCheckpoint = Annotated[
    Annotated[Sampling, Tag(_VALUES)] | Annotated[Literal["checkpoint"], Tag(_CHECKPOINT)],
    Discriminator(_sampling_tag),
]


class ServiceConfig(_Section):
    """The `args` of `ray_config.yaml`."""

    renamed_keys: ClassVar[dict[str, str]] = {"exact": "batch_invariant"}

    version: Literal[1]
    name: str = Field("thinklogit", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    models: Models
    batch_invariant: bool = False  # bitwise repeatable whatever else is in the batch: CPU, fp32, one thread; slower
    beyond_context: Literal["continue", "stop_guidance", "error"] = "error"
    guidance: Guidance = Guidance()
    thinking: Thinking = Thinking()
    reasoning_effort: dict[str, Effort] = _EFFORTS  # by its values in requests, besides `none`
    sampling: _SamplingOrCheckpoint = Sampling()  # checkpoint: as the target's generation_config.json recommends
    exchange: Exchange = Exchange()
    speculation: Speculation = Speculation()
    coordinator: CoordinatorConfig = CoordinatorConfig()
    router: RouterConfig = RouterConfig()
    deadlines: Deadlines = Deadlines()

    @field_validator("reasoning_effort")
    @classmethod
    def _without_none(cls, efforts: dict[str, Effort]) -> dict[str, Effort]:
        if "none" in efforts:
            raise ValueError("none is always alpha 0 without thinking: leave it out, or give the value another name")
        return efforts

    @property
    def efforts(self) -> dict[str, Effort]:
        """The values of reasoning_effort that requests may have, `none` included."""
        return _NO_EFFORT | self.reasoning_effort

    @property
    def default_sampling(self) -> Sampling:
        """The sampling of requests that state none. `with_recommended_sampling` must have replaced `checkpoint`."""
        assert isinstance(self.sampling, Sampling)
        return self.sampling

    def with_recommended_sampling(self, recommended: Mapping[str, float]) -> Self:
        """A copy in which `sampling: checkpoint` is replaced by the checkpoint's values.

        recommended: parameters by name. Raises ConfigError if one is out of range.
        """
        if self.sampling != _CHECKPOINT:
            return self
        try:
            return self.model_copy(update={"sampling": recommended_sampling(recommended)})
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"sampling: checkpoint, but its generation_config.json is wrong: {error}; write the values instead"
            ) from error

    def with_target(self, path: str) -> Self:
        """A copy with another target model."""
        target = self.models.target.model_copy(update={"path": path})
        return self.model_copy(update={"models": self.models.model_copy(update={"target": target})})

    def with_cache(self, role: Role, tokens: int) -> Self:
        """A copy whose role has a cache of so many tokens."""
        model = self.models.role(role).model_copy(update={"cache_tokens": tokens})
        return self.model_copy(update={"models": self.models.model_copy(update={role: model})})

    def with_engine(self, engine: Literal["native", "vllm"]) -> Self:
        """A copy whose target runs on this engine."""
        target = self.models.target.model_copy(update={"engine": engine})
        return self.model_copy(update={"models": self.models.model_copy(update={"target": target})})

    def with_adapter(self, adapter: str | None) -> Self:
        """A copy whose guider has this adapter; None: no adapter."""
        guider = self.models.guider.model_copy(update={"adapter": adapter})
        return self.model_copy(update={"models": self.models.model_copy(update={"guider": guider})})

    @property
    def served_names(self) -> dict[str, Role | Literal["guided"]]:
        """The model names that clients use: one for the guided model, and one for each role alone."""
        alone: dict[str, Role | Literal["guided"]] = {f"{self.name}/{role.replace('_', '-')}": role for role in ROLES}
        return {self.name: "guided", **alone}


def recommended_sampling(recommended: Mapping[str, float]) -> Sampling:
    """Sampling with a checkpoint's values, as vLLM reads them. Raises ValueError or TypeError for wrong ones."""
    values: dict[str, Any] = dict(recommended)
    if "top_k" in values:
        values["top_k"] = max(0, int(values["top_k"]))  # -1 keeps all tokens
    return Sampling(**values)


def with_current_keys(stored: Any) -> Any:
    """A stored configuration, as plain data, with the current name of each key of the release before."""
    if not isinstance(stored, dict):
        return stored
    sections = (ServiceConfig, Exchange, Deadlines)
    names = {old: new for section in sections for old, new in section.renamed_keys.items()}
    return {names.get(key, key): with_current_keys(value) for key, value in stored.items()}


def as_this_release_reads(stored: Any) -> Any:
    """A stored configuration of a service, as plain data, with current names and the defaults of keys added since.

    One that is not valid any more has current names alone.
    """
    renamed = with_current_keys(stored)
    try:
        return load_config(renamed).model_dump(mode="json")
    except ConfigError:
        return renamed


def load_config(args: dict[str, Any]) -> ServiceConfig:
    """Read the `args` of `ray_config.yaml`. Raises ConfigError that names every key that is wrong."""
    try:
        return ServiceConfig.model_validate(args)
    except ValidationError as error:
        raise ConfigError("\n".join(_message(item) for item in error.errors())) from None


def _message(item: Any) -> str:
    tagged = item["loc"][:1] == ("sampling",)  # pydantic names the branch of a union
    where = ".".join(str(part) for i, part in enumerate(item["loc"]) if not (tagged and i == 1)) or "args"
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{where}: unknown key; the keys are those of ray_config.yaml and actors/config.py"
    return f"{where}: {item['msg'].removeprefix('Value error, ')}"
