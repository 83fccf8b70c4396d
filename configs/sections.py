"""The sections of an experiment's settings, as dataclasses.

Order here is the order in a dumped file. The string under a field is its documentation: it goes
into docs/configuration.md. A field's annotation is its check: `Literal` lists the allowed values,
`Between` the allowed range.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

Kind = Literal["look", "image", "text", "two", "three"]
Method = Literal["obm", "task_arithmetic", "ties", "dare"]


class Between(NamedTuple):
    """Allowed range of a number, both ends included; `above` excludes the lower end."""

    low: float
    high: float | None = None
    above: bool = False


Positive = Between(1)
NotNegative = Between(0)


@dataclass
class Models:
    """The checkpoints: folders, hub ids (`owner/name`) or `atlas://name` for a shipped one."""

    base: str | None = None
    """base language model (theta_B) that both parents were fine-tuned from"""
    vlm: str | None = None
    """vision language model (theta_V); gives vision tower, projector and processor"""
    agent: str | None = None
    """text search agent (theta_S)"""
    init: str | None = None
    """checkpoint that training and evaluation start from: a merged folder, or the plain VLM"""


@dataclass
class Calibration:
    """Second moments of every linear input, taken once per parent."""

    samples: Annotated[int, Positive] = 64
    """number of calibration samples per parent"""
    batch_size: Annotated[int, Positive] = 8
    """samples per forward pass; changes speed and memory, not the statistics"""
    seed: int = 0
    """seed of the choice of samples"""
    vlm_kinds: list[Kind] = field(default_factory=lambda: ["look", "image"])
    """question kinds of the VLM's calibration data (those with a picture)"""
    output: str | None = None
    """folder of the statistics files; null = `<output>/calibration`"""


class Weights(TypedDict):
    """Scale lambda_k of each task vector."""

    vlm: Annotated[float, NotNegative]
    """weight of the VLM's task vector"""
    agent: Annotated[float, NotNegative]
    """weight of the agent's task vector"""


class Scope(TypedDict):
    """What happens to each group of tensors of the language module."""

    linear: Literal["method", "obm", "task_arithmetic", "ties", "dare", "vlm", "base"]
    """linear projections; `method` = whatever merge.method says"""
    norm_bias: Literal["task_arithmetic", "ties", "dare", "vlm", "base"]
    """norms and biases"""
    embedding: Literal["task_arithmetic", "ties", "dare", "vlm", "base"]
    """token embeddings and output head"""


@dataclass
class Merge:
    """How the three checkpoints become one."""

    method: Method = "obm"
    """rule for the linear projections"""
    density: Annotated[float, Between(0, 1)] = 0.5
    """share p of entries of each task vector that is kept (by saliency for obm)"""
    weights: Weights = field(default_factory=lambda: Weights(vlm=1.0, agent=1.0))
    """scales lambda_k of the task vectors"""
    saliency: Literal["diagonal"] = "diagonal"
    """estimate of the second-order loss change of dropping an entry"""
    normalization: Literal["none", "mean", "rank"] = "none"
    """how saliencies of the two parents are made comparable before the sign vote"""
    combine: Literal["sum", "mean"] = "sum"
    """entries that agree in sign are summed, or averaged over the parents that kept them"""
    scope: Scope = field(
        default_factory=lambda: Scope(linear="method", norm_bias="task_arithmetic", embedding="vlm")
    )
    """rule per group of tensors"""
    seed: int = 0
    """seed of methods that draw (dare)"""


@dataclass
class Environment:
    """The world the policy searches in, and its questions."""

    name: Literal["atlas"] = "atlas"
    """which world"""
    dialect: Literal["search_r1", "mmsearch_r1"] = "search_r1"
    """how calls, observations and answers look as text"""
    kinds: list[Kind] = field(default_factory=lambda: ["two"])
    """question kinds to train on"""
    relations: list[str] | None = None
    """facts asked for; null = the world's default set"""
    strength: Annotated[float, Between(0, 2)] = 0.5
    """how strongly photos are warped: 0 flat, 0.5 default, 1 hard"""
    image_searches: Annotated[int, NotNegative] = 1
    """image searches allowed per episode"""
    text_searches: Annotated[int, NotNegative] = 2
    """text searches allowed per episode"""
    max_turns: Annotated[int, Positive] = 4
    """turns of the policy per episode, the answer included"""
    top_k_text: Annotated[int, Positive] = 2
    """passages per text search"""
    top_k_image: Annotated[int, Positive] = 3
    """matches per image search"""
    thumbnails: bool = False
    """image searches return pictures beside the titles"""
    train_size: Annotated[int, Positive] = 512
    """number of training questions"""
    eval_split: Literal["train", "dev", "test"] = "dev"
    """split of the held-out evaluation"""
    eval_size: Annotated[int, Positive] = 128
    """number of evaluation questions"""
    eval_kinds: list[Kind] = field(default_factory=lambda: ["two"])
    """question kinds of the evaluation"""
    data_seed: int = 0
    """seed of the choice of questions and of the photos; the same for both arms of a comparison"""
    timeout_s: Annotated[float, Between(0, above=True)] = 10.0
    """seconds after which a tool call counts as failed (infrastructure)"""
    invalid_ends: bool = True
    """a turn without call or answer ends the episode; false = the policy gets a hint and goes on"""

    def episode_settings(self) -> dict[str, Any]:
        """The part that a running episode needs: keyword arguments of SearchEnvironment."""
        names = (
            "dialect",
            "image_searches",
            "text_searches",
            "max_turns",
            "top_k_text",
            "top_k_image",
            "thumbnails",
            "timeout_s",
            "invalid_ends",
        )
        return {name: getattr(self, name) for name in names}


@dataclass
class Rewards:
    """total = accuracy * correct * (1 - search_penalty if it searched) + format * well_formed."""

    accuracy: Annotated[float, NotNegative] = 1.0
    """weight of a right answer"""
    format: Annotated[float, NotNegative] = 0.1
    """weight of a well-formed episode"""
    search_penalty: Annotated[float, Between(0, 1)] = 0.1
    """share of the accuracy part that a right answer loses when the episode searched at all"""
    max_answer_chars: Annotated[int, Positive] = 200
    """longer answers count as wrong"""
    infrastructure_fault: Literal["skip", "score"] = "skip"
    """episodes in which a tool failed: `skip` leaves them unscored, `score` treats them as usual"""


@dataclass
class Tracking:
    """Where numbers go, besides metrics.jsonl and trajectories.jsonl."""

    project: str = "obm-warmstart"
    """W&B project"""
    group: str | None = None
    """W&B group: one experiment, several arms and seeds"""
    arm: str | None = None
    """name of the starting point in tables and run names; null = last part of models.init"""
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto` = online with a login, offline without"""
    log_trajectories: Annotated[int, NotNegative] = 8
    """trajectories per logged step in the W&B table"""


@dataclass
class Compare:
    """Held-out evaluation during training, and the report over runs."""

    eval_every: Annotated[int, Positive] = 5
    """optimizer steps between evaluations; step 0 is always evaluated"""
    target_arm: str = "vlm"
    """arm whose ceiling the others have to reach"""
    smoothing: Annotated[int, Positive] = 3
    """evaluations averaged for the ceiling"""
    bootstrap: Annotated[int, Positive] = 2000
    """bootstrap samples of the 95 % intervals"""


@dataclass
class Config:
    """One experiment."""

    output: str
    """run folder; never overwritten without a flag"""
    seed: int = 0
    """seed of training and sampling"""
    models: Models = field(default_factory=Models)
    """checkpoints"""
    calibration: Calibration = field(default_factory=Calibration)
    """statistics for the merge"""
    merge: Merge = field(default_factory=Merge)
    """merge"""
    environment: Environment = field(default_factory=Environment)
    """world and questions"""
    rewards: Rewards = field(default_factory=Rewards)
    """reward parts"""
    grpo: dict[str, Any] = field(default_factory=dict)
    """handed untouched to TRL's GRPOConfig"""
    deepspeed: str | None = None
    """`zero2`, `zero3`, `none` or the path of a DeepSpeed JSON file"""
    tracking: Tracking = field(default_factory=Tracking)
    """W&B and logs"""
    compare: Compare = field(default_factory=Compare)
    """evaluation and report"""

    @property
    def arm_name(self) -> str:
        """Name of the starting point: tracking.arm, else the last part of models.init."""
        if self.tracking.arm:
            return self.tracking.arm
        init = (self.models.init or "").rstrip("/")
        return init.rsplit("/", 1)[-1] or "run"
