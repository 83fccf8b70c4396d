"""The sections of an experiment's settings, as dataclasses.

Order here is the order in a dumped file. The string under a field is its documentation: it goes
into docs/configuration.md. A field's annotation is its check: `Literal` lists the allowed values,
`Between` the allowed range.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

Kind = Literal["look", "image", "text", "two", "three", "pair"]
Method = Literal[
    "obm",
    "linear",
    "task_arithmetic",
    "ties",
    "dare",
    "dare_ties",
    "della",
    "breadcrumbs",
    "sce",
    "ram",
    "ram_plus",
    "layer_swap",
    "fisher",
    "sar",
    "regmean_diagonal",
    "regmean",
    "wudi",
]
# norms, biases and embeddings have no inputs to weigh them by
Elementwise = Literal[
    "linear",
    "task_arithmetic",
    "ties",
    "dare",
    "dare_ties",
    "della",
    "breadcrumbs",
    "sce",
    "ram",
    "ram_plus",
    "layer_swap",
    "fisher",
    "sar",
    "vlm",
    "agent",
    "base",
]


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
    donors: dict[str, str] = field(default_factory=dict)
    """further text models of the same base that are merged in: name (no method's) -> checkpoint"""
    init: str | None = None
    """checkpoint that training and evaluation start from: a merged folder, or the plain VLM"""
    reference: str = "init"
    """checkpoint that the KL term of `grpo.beta` pulls towards; `init` = the start itself"""
    freeze_vision: bool = False
    """training leaves vision tower and projector as they are"""
    max_pixels: Annotated[int, Between(784)] | None = None
    """larger pictures are scaled down to so many pixels, 784 of which are a token; null = the
    checkpoint's own limit"""


class CalibrationData(TypedDict):
    """Where a parent's calibration samples come from, and what of a row is shown to it."""

    source: str | None
    """null = the environment's own questions; or a data set on the hub (`owner/name`), a .json,
    .jsonl, .csv or .parquet file, a folder of save_to_disk, or a run's trajectories.jsonl"""
    subset: str | None
    """configuration of a data set on the hub"""
    split: str
    """split of a data set on the hub or on disk"""
    prompt: str
    """what the user says; `{column}` stands for the row's value"""
    answer: str | None
    """what the parent answers, `{column}` as above; null = what it says itself, greedily;
    '' = nothing"""
    images: list[str] | None
    """columns with a picture, or a list of pictures: file name, bytes or `datasets` image"""
    messages: str | None
    """column with chat messages (role, content), in the place of prompt and answer"""


def _no_data() -> CalibrationData:
    return CalibrationData(
        source=None, subset=None, split="train", prompt="{question}", answer=None, images=None,
        messages=None,
    )  # fmt: skip


@dataclass
class Calibration:
    """Statistics of every linear input, taken once per parent."""

    samples: Annotated[int, Positive] = 64
    """number of calibration samples per parent"""
    batch_size: Annotated[int, Positive] = 8
    """samples per forward pass; changes speed and memory, not the statistics"""
    seed: int = 0
    """seed of the choice of samples"""
    vlm_kinds: list[Kind] = field(default_factory=lambda: ["look", "image"])
    """question kinds of the VLM's calibration data (those with a picture)"""
    kinds: list[Literal["diagonal", "inverse", "fisher", "gram"]] = field(
        default_factory=lambda: ["diagonal"]
    )
    """statistics to make: diagonal (obm, regmean_diagonal), inverse (obm with saliency: inverse),
    fisher (fisher, sar), gram (regmean); the last two are as large as a checkpoint, or larger"""
    tokens: Literal["all", "answer"] = "all"
    """which tokens count: all, or what the parent itself says (no prompt, no observations); fisher
    is of the answer always"""
    streaming: Literal["auto", True, False] = "auto"
    """one layer in memory at a time, for a checkpoint larger than memory; auto = if it is needed.
    inverse and gram always stream. Changes no bit of the statistics"""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """in which the parent runs; auto = as it is stored"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the parent runs"""
    damping: Annotated[float, Between(0, above=True)] = 0.01
    """inverse: share of the mean second moment that is added before inverting"""
    max_tokens: Annotated[int, Positive] = 2048
    """longest sample; what a data set has beyond is cut off, but never a picture"""
    vlm_data: CalibrationData = field(default_factory=_no_data)
    """samples of the VLM"""
    agent_data: CalibrationData = field(default_factory=_no_data)
    """samples of the agent and of the donors"""
    output: str | None = None
    """folder of the statistics files; null = `<output>/calibration`"""


class Scope(TypedDict):
    """What happens to each group of tensors of the language module."""

    linear: Literal["method", Method, "vlm", "agent", "base"]
    """linear projections; `method` = whatever merge.method says"""
    norm_bias: Elementwise
    """norms and biases"""
    embedding: Elementwise
    """token embeddings and output head"""


@dataclass
class TensorRule:
    """Other settings for the language tensors whose canonical name a pattern finds."""

    match: str
    """regular expression, searched in names such as `model.layers.0.self_attn.q_proj.weight`"""
    method: Literal[Method, "vlm", "agent", "base"] | None = None
    """method of these tensors; null = as without this rule"""
    density: Annotated[float, Between(0, 1)] | None = None
    """density of these tensors"""
    weights: dict[str, Annotated[float, NotNegative]] | None = None
    """weights of these tensors; tasks left out keep theirs"""
    normalization: Literal["none", "mean", "rank"] | None = None
    """normalisation of these tensors"""
    combine: Literal["sum", "mean"] | None = None
    """combination of these tensors"""


@dataclass
class Merge:
    """How the checkpoints become one."""

    method: Method = "obm"
    """rule for the linear projections; docs/merge.md has each one's formula and source"""
    density: Annotated[float, Between(0, 1)] = 0.5
    """share p of entries of each task vector that is kept (by saliency for obm)"""
    weights: dict[str, Annotated[float, NotNegative]] = field(
        default_factory=lambda: {"vlm": 1.0, "agent": 1.0}
    )
    """scales lambda_k of the task vectors: vlm, agent, names in models.donors (1 if absent)"""
    saliency: Literal["diagonal", "inverse"] = "diagonal"
    """obm's estimate of the loss change of dropping an entry; `inverse` needs calibration.kinds"""
    normalization: Literal["none", "mean", "rank"] = "none"
    """how saliencies (sar: sensitivities) of the parents are made comparable before they vote"""
    combine: Literal["sum", "mean"] = "sum"
    """entries that agree in sign are summed, or averaged over the parents that kept them"""
    budget: Literal["tensor", "layer", "global"] = "tensor"
    """what the density is a share of: each tensor, each decoder layer, or the whole model"""
    scope: Scope = field(
        default_factory=lambda: Scope(linear="method", norm_bias="task_arithmetic", embedding="vlm")
    )
    """rule per group of tensors"""
    rules: list[TensorRule] = field(default_factory=list)
    """settings by tensor name; of several that match, the last that sets a key decides on it"""
    vocabulary: Literal["equal", "common", "protect"] = "equal"
    """where embeddings are merged: vocabularies must be equal, the rows that all parents have are
    merged, or those less the special tokens; other rows are the VLM's, which decides on the size"""
    window: Annotated[float, Between(0, 1)] = 0.1
    """della: half the range of keep probabilities within a row"""
    outliers: Annotated[float, Between(0, 1)] = 0.01
    """breadcrumbs: share of the largest entries that is dropped first"""
    threshold: Annotated[float, NotNegative] = 1.0e-5
    """ram, ram_plus, sar: an entry counts as changed where its delta is larger"""
    boost: Annotated[float, NotNegative] = 0.1
    """ram_plus: gain r of what only one task changed"""
    boost_limit: Annotated[float, NotNegative] = 0.2
    """ram_plus: highest ratio alpha of shared to unique entries that the gain uses"""
    shrink: Annotated[float, Between(0, 1)] = 0.9
    """regmean: factor on the off-diagonal entries of the Gram matrices"""
    steps: Annotated[int, Positive] = 300
    """wudi: steps of Adam"""
    learning_rate: Annotated[float, Between(0, above=True)] = 1.0e-5
    """wudi: learning rate of Adam"""
    layers: str = ""
    """layer_swap: decoder layers taken from the agent, such as `14-27` or `0,2,4-7`"""
    seed: int = 0
    """seed of methods that draw (dare, dare_ties, della)"""
    threads: Annotated[int, Positive] | None = None
    """tensors merged at a time; null = one a core. Changes no bit of the result"""
    shard_size: str | None = None
    """largest file of the output, such as `5GB`; null = the VLM's own files"""
    families: str | None = None
    """YAML file with further model families; docs/merge.md says what is in it"""


@dataclass
class Benchmark:
    """A benchmark of the field in the place of the atlas' questions; docs/evaluation.md."""

    name: Literal[
        "atlas", "table", "fvqa_train", "fvqa_test", "infoseek", "mmsearch", "livevqa",
        "nq_hotpotqa_train", "nq_hotpotqa_test",
    ] = "atlas"  # fmt: skip
    """which; `atlas` = the keys of `environment` choose the questions, `table` = questions of your
    own (docs/recipes.md)"""
    source: str | None = None
    """.jsonl, .json, .csv or .parquet file, folder of such files, or hub id; null = where it is
    published"""
    split: str | None = None
    """only questions of this split, or a part of it in the order of the rows: `train`, `[:80%]`,
    `train[100:]`"""
    kinds: list[str] = field(default_factory=list)
    """only questions of these kinds, as the benchmark names them; empty = all"""
    images: str | None = None
    """folder of the pictures that rows name; null = the folder of `source`"""
    pictured: bool = False
    """only questions with a picture (171 of MMSearch's 300)"""
    fetch: bool = False
    """take pictures given as base64 text or as an address, too"""
    limit: Annotated[int, Positive] | None = None
    """the first so many questions; null = all"""


@dataclass
class Environment:
    """The world the policy searches in, and its questions."""

    name: Literal["atlas"] = "atlas"
    """which world"""
    retrieval: str | None = None
    """search server that answers the tool calls, `http://host:port` (`obm serve`, or any that
    speaks Search-R1's protocol); null = the world's own indexes in this process"""
    text_provider: Literal["serper", "brave", "tavily"] | None = None
    """live text search in place of the world's own; its key comes from the environment
    (docs/live-search.md)"""
    image_provider: Literal["serpapi"] | None = None
    """live image search in place of the world's own; makes every searched picture public"""
    page_reader: Literal["direct", "jina"] | None = None
    """who reads pages: this machine, or a service"""
    cache: str | None = None
    """folder that keeps every tool result, so that a run can be replayed; null = nothing is kept"""
    cache_mode: Literal["read", "write", "refresh", "offline"] = "read"
    """`read` asks for what is missing and keeps it; `write` always asks and keeps what is new;
    `refresh` asks once more and replaces; `offline` never asks, and a miss is a fault of
    infrastructure"""
    dialect: str = "search_r1"
    """how calls, observations and answers look as text: `search_r1`, `search_r1_full`,
    `mmsearch_r1`, `hermes`, or a `.yaml` file with one of your own (docs/environment.md)"""
    kinds: list[Kind] = field(default_factory=lambda: ["two"])
    """question kinds to train on"""
    relations: list[str] | None = None
    """facts asked for; null = the world's default set"""
    domain: Literal["flags", "maps"] = "flags"
    """what the photos show of a place, and what the image search knows"""
    eval_domain: Literal["flags", "maps"] | None = None
    """what the evaluation's photos show; null = as `domain`. With another one the image search
    knows both"""
    counterfactual: int | None = None
    """seed by which the answers of every relation change places inside each split, in the passages
    and in what counts as right: what a model remembers is wrong; null = the facts as they are"""
    news: Literal["older", "newer", "both"] | None = None
    """dated fact sheets: half of the facts have changed in the newer one, the corpus holds one of
    them or both, and the newest page is right; null = one sheet without dates"""
    strength: Annotated[float, Between(0, 2)] = 0.5
    """how strongly photos are warped: 0 flat, 0.5 default, 1 hard"""
    image_searches: Annotated[int, NotNegative] = 1
    """image searches allowed per episode"""
    text_searches: Annotated[int, NotNegative] = 2
    """text searches allowed per episode"""
    visits: Annotated[int, NotNegative] = 0
    """web pages that may be read per episode; 0 = the tool is not offered"""
    visit_urls: Literal["results", "any"] = "results"
    """which pages: those that a search result of the episode showed, or any the policy names"""
    max_turns: Annotated[int, Positive] = 4
    """turns of the policy per episode, the answer included"""
    top_k_text: Annotated[int, Positive] = 2
    """passages per text search"""
    snippet_words: Annotated[int, Between(1, 300)] = 40
    """words that are shown of a passage of the world's own or of a search server, its best
    sentences; Search-R1's agents learnt with whole passages of 100"""
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
    train_benchmark: Benchmark | None = None
    """training asks these questions; null = the atlas', by the keys above"""
    eval_benchmark: Benchmark | None = None
    """the evaluation asks these; null = the atlas', by the keys above"""
    timeout_s: Annotated[float, Between(0, above=True)] = 10.0
    """seconds after which a tool call counts as failed (infrastructure), retries included"""
    retries: Annotated[int, NotNegative] = 2
    """further attempts after a fault of a service, within timeout_s; never after a bad call"""
    backoff_s: Annotated[float, NotNegative] = 0.5
    """mean pause in seconds before the first retry; it doubles with each"""
    invalid_ends: bool = True
    """a turn without call or answer ends the episode; false = the policy gets a hint and goes on"""
    long_results: Literal["end", "shorten"] = "end"
    """a result that does not fit the token budget: the episode ends with stop reason `length`, or
    its texts are cut until it fits, and say so"""

    def episode_settings(self) -> dict[str, Any]:
        """The part that a running episode needs: keyword arguments of SearchEnvironment."""
        names = (
            "dialect",
            "image_searches",
            "text_searches",
            "visits",
            "visit_urls",
            "max_turns",
            "top_k_text",
            "top_k_image",
            "thumbnails",
            "timeout_s",
            "retries",
            "backoff_s",
            "invalid_ends",
            "long_results",
        )
        return {name: getattr(self, name) for name in names}

    def domains(self) -> tuple[str, ...]:
        """What the image search knows: the domain, and the evaluation's if it is another."""
        return tuple(dict.fromkeys((self.domain, self.eval_domain or self.domain)))


@dataclass
class Live:
    """Live search services and page reading; used only with a provider or a reader in
    `environment`. Keys come from environment variables alone: docs/live-search.md."""

    text_url: str | None = None
    """base URL of the text provider; null = its own"""
    image_url: str | None = None
    """base URL of the image provider; null = its own"""
    page_url: str | None = None
    """base URL of the page service; null = its own"""
    image_host: str | None = None
    """where pictures are put so that an image provider can fetch them: a folder that a web server
    serves, or a URL that takes PUT (a bucket, WebDAV)"""
    image_host_url: str | None = None
    """public URL of what lies in image_host; null = image_host itself is that URL"""
    country: str | None = "us"
    """two letters; which country's results"""
    language: str | None = "en"
    """two letters; which language's results"""
    requests_per_second: Annotated[float, Between(0, above=True)] = 5.0
    """most requests to each service on average, all training processes together"""
    retries: Annotated[int, NotNegative] = 2
    """further attempts after a failure of a service, within environment.timeout_s"""
    read_results: bool = False
    """text hits carry a summary of their page instead of the search service's snippet"""
    summary_url: str | None = None
    """OpenAI-compatible endpoint, `http://host:port/v1`, that summarises pages in five sentences;
    null = the five best sentences by BM25"""
    summary_model: str | None = None
    """name of the model behind summary_url"""
    page_chars: Annotated[int, Positive] = 30_000
    """characters of a page's text that are looked at"""
    page_bytes: Annotated[int, Positive] = 2_000_000
    """largest page or picture that is fetched, as sent and as decompressed"""
    allow_loopback: bool = False
    """pages of this machine may be read; for tests only"""


FREE_LIVE = (
    "text_url", "image_url", "page_url", "summary_url", "image_host", "image_host_url",
    "requests_per_second", "retries",
)  # fmt: skip
"""Keys of `live` that decide no result: where a service is, and how often it is asked."""


@dataclass
class Rewards:
    """total = accuracy * correct * (1 - search_penalty if it searched) + format * well_formed
    + evidence * found + economy * thrift - redundancy * repeated; docs/rewards.md."""

    accuracy: Annotated[float, NotNegative] = 1.0
    """weight of a right answer"""
    format: Annotated[float, NotNegative] = 0.1
    """weight of a well-formed episode"""
    search_penalty: Annotated[float, Between(0, 1)] = 0.1
    """share of the accuracy part that a right answer loses when the episode searched at all"""
    search_penalty_per: Literal["episode", "search"] = "episode"
    """`episode` takes that share once, `search` with every call again, of what is left"""
    evidence: Annotated[float, NotNegative] = 0.0
    """weight of a gold passage among the text hits; only what the environment returned counts"""
    economy: Annotated[float, NotNegative] = 0.0
    """weight of (1 + b) / (1 + max(n, b)) for a right answer with n calls where the question states
    b as the best known number (`best_calls` or `hops`)"""
    redundancy: Annotated[float, NotNegative] = 0.0
    """cost of calls that repeat an earlier one of the episode, times their share of all calls"""
    answer_match: Literal["exact", "typed", "contains", "f1"] = "exact"
    """how an answer is right: equal to an alias after normalisation; also by the rules of its kind
    (number, date, list ...); gold within it; token F1. A list of guesses is wrong in every way"""
    max_answer_chars: Annotated[int, Positive] = 200
    """longer answers count as wrong"""
    judge: str | None = None
    """base address of an OpenAI-compatible service that is asked where the rules say wrong, e.g.
    http://127.0.0.1:8000/v1; null = nobody"""
    judge_model: str = ""
    """name of its model"""
    judge_key_variable: str = "OBM_JUDGE_KEY"
    """environment variable that holds its key, if it needs one"""
    judge_timeout_s: Annotated[float, Between(0, above=True)] = 30.0
    """seconds for one answer of the judge"""
    judge_workers: Annotated[int, Positive] = 8
    """answers that the judge is asked about at the same time"""
    judge_cache: str | None = None
    """JSON-lines file of its verdicts, so that no question is asked twice; null = in memory"""
    infrastructure_fault: Literal["skip", "score", "mask"] = "skip"
    """episodes in which a tool failed: `skip` leaves them unscored, `score` treats them as usual,
    `mask` does so too, but after three failures in a row the tokens from the first on carry no loss
    and what lies before is never punished"""


@dataclass
class OwnReward:
    """A reward function of your own, in a Python file of this machine; docs/recipes.md."""

    function: str
    """`my_rewards.py:name`, relative to the current directory; called once a batch as
    name(trajectories, **columns), it returns one number an episode, or None"""
    weight: float = 1.0
    """what its part is multiplied by in the total; below 0 it is a cost, 0 = only logged"""


@dataclass
class Algorithm:
    """Parts that TRL lacks, each a switch on one baseline; docs/algorithms.md has the sources."""

    dynamic_sampling: Annotated[int, NotNegative] = 0
    """rounds per rollout in which groups without signal are replaced by other questions (DAPO);
    0 = off. The discarded episodes cost time and count as tokens"""
    hop_credit: Annotated[float, Between(0, 1)] = 0.0
    """share w of the hop-anchored advantage (HaPO): A = (1 - w) A_episode + w A_hop"""
    efficiency_bonus: Annotated[float, NotNegative] = 0.0
    """added times the rank of a right episode's thrift among the right ones of its group (TRACE)"""
    overlong_penalty: Annotated[float, NotNegative] = 0.0
    """weight of DAPO's soft punishment of length; grpo.mask_truncated_completions leaves cut
    episodes out of the loss instead"""
    overlong_buffer: Annotated[int, Positive] = 64
    """tokens before the end of the budget in which that punishment grows from 0 to 1"""
    anchor: Annotated[float, NotNegative] = 0.0
    """strength a of the pull a/2 sum_ij h_j (theta - theta_init)^2 on the language linears, h the
    second moments of the merge, scaled to mean 1; not with zero3 or an adapter"""
    anchor_stats: list[str] = field(default_factory=list)
    """statistics of that pull, files or folders of `obm calibrate`; empty = those in the
    merge.json of models.init"""


@dataclass
class Rollout:
    """Who draws the tokens of an episode: this process, or a vLLM server (docs/vllm.md)."""

    backend: Literal["in_process", "vllm"] = "in_process"
    """`in_process` = the policy in the trainer's memory; `vllm` = a server that gets the policy's
    weights before the first rollout after each optimizer step"""
    tool_workers: Annotated[int, NotNegative] = 0
    """threads that call tools, so that slow services are asked at the same time and rows go on
    decoding meanwhile; 0 = one call after another, the fastest for tools in memory"""
    url: str = "http://127.0.0.1:8000"
    """vllm: the server, `http://host:port`; one training run at a time may use it"""
    timeout_s: Annotated[float, Between(0, above=True)] = 300.0
    """vllm: seconds after which a request counts as failed; also for loading weights"""
    retries: Annotated[int, NotNegative] = 3
    """vllm: further attempts after a failed request"""
    sync_dir: str | None = None
    """vllm: folder where weights are handed over, which the server sees under the same path; null =
    shared memory, for a server on the same machine"""
    sleep: bool = False
    """vllm: the server gives its GPU memory back between rollouts, so that it can share a GPU with
    the trainer; start it with --enable-sleep-mode"""
    importance_correction: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "token_truncate"
    """vllm: weight on the loss for what the server computes otherwise than the trainer, the ratio
    of the two probabilities of a token or of an episode: cut at the cap, or 0 above it (TRL)"""
    importance_cap: Annotated[float, Between(0, above=True)] = 2.0
    """vllm: cap of that weight"""


@dataclass
class Lora:
    """Low-rank adapters, trained in the place of the policy; `obm merge adapter` puts them in."""

    r: Annotated[int, NotNegative] = 0
    """rank; 0 = no adapter, the policy's own weights are trained"""
    alpha: Annotated[float, Between(0, above=True)] = 32.0
    """the adapter's product is multiplied by alpha / r"""
    dropout: Annotated[float, Between(0, 1)] = 0.0
    """of the adapters' input in training; above 0 the loss sees another policy than the rollout"""
    target_modules: list[str] | None = None
    """linears that get one, by the end of their name; null = all of the language module"""
    train_vision: bool = False
    """vision tower and projector get adapters, too"""


@dataclass
class Conflict:
    """Which attention heads search and perception pull apart: `obm diagnose heads`, docs/cast.md.
    The paper's formulas are not public; each choice here is our reading."""

    search: Literal["grpo", "agent"] = "grpo"
    """search objective: `grpo` = the policy gradient on episodes of models.init itself; `agent` =
    log-likelihood of models.agent's right episodes on text questions"""
    search_questions: Annotated[int, Positive] = 64
    """training questions of the search objective"""
    group_size: Annotated[int, Positive] = 8
    """grpo: episodes a question"""
    keep_questions: Annotated[int, Positive] = 128
    """training questions of the keep objective; those that the teacher answers right count"""
    keep_kinds: list[Kind] = field(default_factory=lambda: ["look", "image"])
    """their kinds"""
    keep_benchmark: Benchmark | None = None
    """the keep objective asks these instead; null = the atlas', by keep_kinds"""
    keep_words: Literal["vlm", "init"] = "vlm"
    """teacher, whose right answers (greedy, without tools) are the words to keep: models.vlm, or
    models.init itself"""
    batch_size: Annotated[int, Positive] = 64
    """episodes a backward pass"""
    join: Literal["ranks", "product", "opposition", "sensitivity"] = "ranks"
    """conflict score: product of the ranks of opposition and sensitivity, product of the two, or
    one of them alone"""
    seed: int = 0
    """seed of the choice of questions and of the episodes"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where the models run"""


@dataclass
class FreezeHeads:
    """Attention heads that training leaves as they are, to the bit (CAST, docs/cast.md). Short:
    `freeze_heads: cast(top=10%)`."""

    source: Literal["none", "cast", "random", "anti"] = "none"
    """`cast` = those of the highest conflict score, `anti` = of the lowest, `random` = drawn"""
    top: Annotated[float, Between(0, 1, above=True)] = 0.1
    """share of all query heads of the language module, rounded up to whole heads"""
    map: str | None = None
    """conflict.json of `obm diagnose heads`; null = conflict/conflict.json in the folder of
    models.init"""
    shared: Literal["most", "all", "any"] = "most"
    """keys and values that several heads use (GQA), and norms, are frozen with `most` (more than
    half), `all` or `any` of their heads"""
    seed: int = 0
    """random: seed of the draw"""


@dataclass
class Sport:
    """Step-wise preference tuning before GRPO (`obm sport`); docs/sport.md."""

    iterations: Annotated[int, Positive] = 2
    """rounds of sampling and tuning; each begins with the policy of the one before"""
    tasks: Annotated[int, Positive] = 64
    """tasks of an iteration, new ones each time"""
    kinds: list[Kind] | None = None
    """question kinds of the tasks; null = environment.kinds"""
    wording: Literal["graph", "llm"] = "graph"
    """who writes the tasks: the atlas's graph by its own words, or a language model anew (kept only
    where neither answer nor entity slips in)"""
    samples: Annotated[int, Between(2)] = 4
    """candidates for each step, all executed"""
    temperature: Annotated[float, Between(0, above=True)] | None = None
    """of sampling candidates; null = grpo.temperature"""
    verifier: Literal["facts", "llm"] = "facts"
    """who scores candidates: what the environment returned (evidence, legality, progress), or a
    language model"""
    margin: Annotated[float, Between(0, 1, above=True)] = 0.2
    """least difference of scores, 0 to 1, between the chosen and a rejected candidate"""
    max_similarity: Annotated[float, Between(0, 1)] = 0.9
    """pairs whose texts share more of their words, in order, are near duplicates and dropped"""
    max_illegal: Annotated[int, NotNegative] = 2
    """rejected candidates of a step that are no legal step at all"""
    max_unverified: Annotated[float, Between(0, 1)] = 0.5
    """share of steps without a verdict above which the run ends with an error"""
    llm_url: str | None = None
    """OpenAI-compatible endpoint, `http://host:port/v1`, for wording and verifier; its key, if it
    needs one, stands in the environment variable OBM_SPORT_KEY"""
    llm_model: str | None = None
    """name of the model behind llm_url"""
    llm_timeout_s: Annotated[float, Between(0, above=True)] = 60.0
    """seconds for one answer, repetitions included"""
    llm_workers: Annotated[int, Positive] = 8
    """requests at the same time"""
    dpo: dict[str, Any] = field(default_factory=dict)
    """handed untouched to TRL's DPOConfig, over the defaults in docs/sport.md"""


@dataclass
class Sft:
    """Cold start by supervised fine-tuning (`obm sft`); docs/sport.md."""

    teacher: str = "solver"
    """`solver` = the atlas's own, which knows the graph; or a checkpoint, whose right episodes are
    taken"""
    episodes: Annotated[int, Positive] = 512
    """episodes to learn from, at most; those that end in a wrong answer do not count"""
    kinds: list[Kind] | None = None
    """question kinds of the episodes; null = environment.kinds"""
    steps: Annotated[int, Positive] = 100
    """optimizer steps"""
    batch_size: Annotated[int, Positive] = 32
    """episodes a step"""
    micro_batch_size: Annotated[int, Positive] | None = None
    """of them, how many go through the model at once, for memory; null = all"""
    gradient_checkpointing: bool = False
    """compute activations again in the backward pass instead of keeping them, for memory"""
    learning_rate: Annotated[float, Between(0, above=True)] = 3.0e-4
    """peak, after warm-up; it falls as a cosine to zero"""
    warmup_steps: Annotated[int, NotNegative] = 10
    """steps over which the learning rate rises"""


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
    """`auto` = online with a login, offline without; the environment variable WANDB_MODE, where
    set, wins"""
    log_trajectories: Annotated[int, NotNegative] = 8
    """episodes of a training step that trajectories.jsonl keeps (of an evaluation: all), and of an
    evaluation in the W&B table"""
    live: Literal["auto", "off"] = "auto"
    """`auto` = the run's status in the last rows of the terminal, where there is one, else a line a
    step; `off` = a line a step everywhere"""
    follow: Annotated[int, NotNegative] = 4
    """evaluation questions whose episodes are marked at every evaluation, in trajectories.jsonl and
    in a W&B table of their own; `obm follow RUN` shows how they change"""
    token_logprobs: bool = True
    """trajectories.jsonl has text and log-prob of every token of the policy (`obm view` shades by
    them); lines are about a third longer"""
    picture_size: Annotated[int, Between(0, 2048)] = 256
    """longest side in pixels of the copies that `pictures/` keeps of recorded episodes' pictures;
    0 = none"""


@dataclass
class Compare:
    """Held-out evaluation during training, and the report over runs."""

    eval_every: Annotated[int, Positive] = 5
    """optimizer steps between evaluations; step 0 is always evaluated"""
    target_arm: str = "vlm"
    """arm whose ceiling the others have to reach; where it is less than one question right, the
    highest tenth that all runs of the reference reach takes its place"""
    budget_arm: str | None = None
    """accuracy at an equal budget: what this arm spent in all, preparation included; null = what
    the cheapest arm spent"""
    smoothing: Annotated[int, Positive] = 3
    """evaluations averaged for the ceiling"""
    bootstrap: Annotated[int, Positive] = 2000
    """bootstrap samples: of probabilities, and of the 95 % intervals from ten seeds on"""


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
    live: Live = field(default_factory=Live)
    """search services on the net"""
    rewards: Rewards = field(default_factory=Rewards)
    """reward parts"""
    reward_functions: list[OwnReward] = field(default_factory=list)
    """reward functions of your own, added to the total; each is logged as a part of its own"""
    rollout: Rollout = field(default_factory=Rollout)
    """back end of the rollout"""
    grpo: dict[str, Any] = field(default_factory=dict)
    """settings of TRL's GRPOConfig, over the defaults that docs/algorithms.md names"""
    algorithm: Algorithm = field(default_factory=Algorithm)
    """what TRL lacks"""
    deepspeed: str | None = None
    """`zero1`, `zero2`, `zero3`, `zero2_offload`, `zero3_offload`, `none` or the path of a JSON
    file; docs/distributed.md says which fits"""
    lora: Lora = field(default_factory=Lora)
    """adapters"""
    conflict: Conflict = field(default_factory=Conflict)
    """diagnosis of heads"""
    freeze_heads: FreezeHeads = field(default_factory=FreezeHeads)
    """heads that are not trained"""
    hang_timeout_s: Annotated[float, Between(0, above=True)] | None = 1800.0
    """seconds without progress in any process after which the run ends and says who was where;
    null = wait for ever"""
    sport: Sport = field(default_factory=Sport)
    """step-wise preferences"""
    sft: Sft = field(default_factory=Sft)
    """cold start"""
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
