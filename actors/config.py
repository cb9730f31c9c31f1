"""The configuration of the whole service: the `args` of `ray_config.yaml`.

Frozen, validated once at the edge, defaults written here only; an unknown key is an error that names it.
"""

from __future__ import annotations

import warnings
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from actors.api.generation import ROLES, Role
from actors.api.guidance import Guidance
from actors.api.sampling_params import Sampling, Thinking


class ConfigError(ValueError):
    """The configuration is wrong; the message names each key and what to do."""


class _Section(BaseModel):
    """One part of the configuration. Takes the keys' names of the release before, with a warning."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    renamed_keys: ClassVar[dict[str, str]] = {}  # old name -> new name; dropped in the next release

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
                raise ValueError(f"{old} is the old name of {new}, and both are given: leave {old} out")
            warnings.warn(
                f"the key {old} is called {new} now; the old name goes in the next release", FutureWarning, stacklevel=2
            )
            data[new] = data.pop(old)
        return data


class Replicas(_Section):
    """How many replicas of a deployment: fixed when min equals max, else Serve autoscales between them."""

    min: int = Field(1, ge=1)
    max: int = Field(1, ge=1)
    upscale_delay_s: float = Field(30, ge=0)  # so long must more be wanted before they are started
    downscale_delay_s: float = Field(600, ge=0)  # and fewer before one goes: starting one again loads a model
    look_back_s: float = Field(30, gt=0)  # load is averaged over so long, and reported three times in it

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"replicas.max ({self.max}) is below replicas.min ({self.min})")
        return self


class RequestReplicas(Replicas):
    """Replicas of what answers requests: Serve counts those that are open, streams included."""

    target_ongoing: float | None = Field(None, gt=0)  # open requests for each replica; None: see the deployment


class ModelReplicas(Replicas):
    """Replicas of a model role: scaled by cache use and waiting extends (actors.serve.autoscaling)."""

    target_cache: float = Field(0.7, gt=0, le=1)  # share of the cache in use; above it sessions soon evict one another
    target_waiting: float = Field(32, gt=0)  # extends that wait or run; above it a forward gets no better by width


class ModelConfig(_Section):
    """One role's model: where it comes from, how it is computed, where it is placed."""

    path: str = Field(min_length=1)  # a local folder or a Hugging Face hub id
    revision: str | None = None
    trust_remote_code: bool = False
    load_format: Literal["auto", "dummy"] = "auto"  # dummy: random weights of the config.json alone, to measure with
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    device_map: str | dict[str, int | str] | None = None  # accelerate's: over the GPUs of one node
    tensor_parallel: int = Field(1, ge=1)  # ranks of one node that share the model; num_cpus and num_gpus are a rank's
    quantization: dict[str, Any] | None = None  # passed to transformers as quantization_config
    adapter: str | None = None  # a PEFT adapter on top
    attention: Literal["auto", "flash", "per_session", "gathered"] = "auto"  # auto: by device and dtype
    cache_tokens: int = Field(65_536, ge=64)  # tokens of all sessions together
    prefill_chunk: int = Field(2_048, ge=1)  # prompt tokens in one forward at most
    max_position: int | None = Field(None, ge=1)  # tokens of one session; default: what the model was built for
    num_cpus: float = Field(0.2, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    resources: dict[str, float] = {}
    label_selector: dict[str, str] = {}  # Ray node labels that its node must have
    replicas: ModelReplicas = ModelReplicas(min=1, max=1)

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
    """What travels between coordinator and models at every step."""

    renamed_keys: ClassVar[dict[str, str]] = {"widen_above": "max_unseen_mass"}

    mode: Literal["topk", "full"] = "topk"
    k: int = Field(128, ge=1)  # width of a slice
    max_unseen_mass: float = Field(0.0005, ge=0, le=1)  # estimated unseen mass above which a row is widened; 1: never
    widen_factor: int = Field(8, ge=2)  # one widening multiplies k by this; the next takes the whole row
    audit_every: int = Field(1_000, ge=0)  # hold one guided row in so many against whole rows; 0: never


class Speculation(_Section):
    """Drafts: tokens guessed ahead and checked together. They never change an answer, only its speed."""

    drafts: int = Field(7, ge=0, le=8)  # tokens drafted ahead of one check at most; 0: never
    adapt: bool = True  # to each session's acceptance and to what a draft and a check cost; false: always `drafts`
    lookup: bool = True  # where nothing guides, guess from the session's own text (prompt lookup)


class CoordinatorConfig(_Section):
    """The coordinators: replicas that each decode many sessions."""

    max_sessions: int = Field(64, ge=1)  # decoded together by one coordinator; more wait
    max_waiting: int = Field(256, ge=0)  # beyond these a request is refused with 429
    num_cpus: float = Field(0.2, ge=0)
    replicas: RequestReplicas = RequestReplicas(min=1, max=1)
    label_selector: dict[str, str] = {}

    @property
    def target_ongoing(self) -> float:
        """Open requests for each replica at which autoscaling aims: below max_sessions, so that few wait meanwhile."""
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
    """Where API keys are found, in the form that router.keys says; with neither place everybody may ask."""

    file: str | None = Field(None, min_length=1)  # on the node of every router; read again when it changes
    env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")  # a variable of the routers' environment
    # Addresses that need no key, all below one that ends in /*; the log of requests leaves them out.
    open_paths: tuple[Annotated[str, Field(pattern="^/")], ...] = (
        *("/", "/playground/*", "/openapi.json"),
        *("/health", "/ready", "/version", "/metrics"),
    )

    @property
    def required(self) -> bool:
        """Whether only those who have a key may ask."""
        return self.file is not None or self.env is not None

    def opens(self, path: str) -> bool:
        """Whether an address needs no key."""
        return any(path == one or (one.endswith("/*") and path.startswith(one[:-1])) for one in self.open_paths)


class LimitsConfig(_Section):
    """What each key may ask of each router; None: no bound."""

    requests_per_minute: float | None = Field(None, gt=0)  # on average; as many at once after a minute without any
    open_requests: int | None = Field(None, ge=1)  # that are answered or wait at the same time


class RouterConfig(_Section):
    """The HTTP side."""

    max_request_bytes: int = Field(4_194_304, ge=1_024)
    keep_alive_s: float = Field(15, gt=0)  # a stream without news says so this often, lest somebody between closes it
    playground: bool = True  # the page at `/`
    examples: tuple[str, ...] = ()  # questions that the page offers
    num_cpus: float = Field(0.1, ge=0)
    replicas: RequestReplicas = RequestReplicas(min=1, max=1)
    max_request_tokens: int | None = Field(None, ge=1)  # prompts and answers of one request together
    keys: KeysConfig = KeysConfig()
    limits: LimitsConfig = LimitsConfig()
    cors_origins: tuple[
        Annotated[str, Field(pattern=r"^(\*|https?://[^/\s]+)$")], ...
    ] = ()  # sites whose pages may ask
    log_prompts: bool = False  # in the log of requests; prompts stand nowhere else in logs

    @property
    def target_ongoing(self) -> float:
        """Open requests for each replica at which autoscaling aims: a stream of events costs about 1 % of a core."""
        return self.replicas.target_ongoing or 64.0

    @model_validator(mode="after")
    def _countable(self) -> Self:
        if self.limits != LimitsConfig() and not self.keys.required:
            raise ValueError("limits are counted for each key: say keys.file or keys.env, or leave limits out")
        return self


class Deadlines(_Section):
    """Seconds after which a wait ends with an error instead of hanging."""

    renamed_keys: ClassVar[dict[str, str]] = {"missing_s": "reconnect_timeout_s", "silent_s": "peer_timeout_s"}

    model_load_s: float = Field(1_800, gt=0)
    reconnect_timeout_s: float = Field(300, gt=0)  # a session waits so long for a model or a coordinator that is away
    step_s: float = Field(60, gt=0)  # one answer of a model
    peer_timeout_s: float = Field(15, gt=0)  # a peer that says nothing at all for so long hangs or is cut off
    connect_s: float = Field(5, gt=0)
    request_s: float = Field(3_600, gt=0)


class ServiceConfig(_Section):
    """Everything that `ray_config.yaml` says about the service."""

    renamed_keys: ClassVar[dict[str, str]] = {"exact": "batch_invariant"}

    version: Literal[1]
    name: str = Field("thinklogit", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    models: Models
    batch_invariant: bool = False  # bitwise repeatable: CPU, fp32, one thread; slower
    beyond_context: Literal["continue", "stop_guidance", "error"] = "error"
    guidance: Guidance = Guidance()
    thinking: Thinking = Thinking()
    sampling: Sampling = Sampling()
    exchange: Exchange = Exchange()
    speculation: Speculation = Speculation()
    coordinator: CoordinatorConfig = CoordinatorConfig()
    router: RouterConfig = RouterConfig()
    deadlines: Deadlines = Deadlines()

    def with_target(self, path: str) -> Self:
        """The same service with another target."""
        target = self.models.target.model_copy(update={"path": path})
        return self.model_copy(update={"models": self.models.model_copy(update={"target": target})})

    def with_adapter(self, adapter: str | None) -> Self:
        """The same service whose guider has that adapter, or none."""
        guider = self.models.guider.model_copy(update={"adapter": adapter})
        return self.model_copy(update={"models": self.models.model_copy(update={"guider": guider})})

    @property
    def served_names(self) -> dict[str, Role | Literal["guided"]]:
        """The names under which clients find the guided model and each role alone."""
        alone: dict[str, Role | Literal["guided"]] = {f"{self.name}/{role.replace('_', '-')}": role for role in ROLES}
        return {self.name: "guided", **alone}


def load_config(args: dict[str, Any]) -> ServiceConfig:
    """The configuration in the `args` of `ray_config.yaml`. Raises ConfigError naming every key that is wrong."""
    try:
        return ServiceConfig.model_validate(args)
    except ValidationError as error:
        raise ConfigError("\n".join(_message(item) for item in error.errors())) from None


def _message(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "args"
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{where}: unknown key; the keys are those of ray_config.yaml and actors/config.py"
    return f"{where}: {item['msg'].removeprefix('Value error, ')}"
