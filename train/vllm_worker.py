"""Runs inside the vLLM server: takes over the policy's weights from safetensors files.

    vllm serve ... --worker-extension-cls train.vllm_worker.PolicyWorker

vLLM mixes the class into its workers, where `/collective_rpc` finds the method. Needs torch, vllm
and safetensors alone: the server's environment has no other package of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


class PolicyWorker:
    """What the trainer asks of every worker; `self` is the worker itself."""

    model_runner: Any
    model_config: Any

    def load_policy(self, folder: str) -> int:
        """Replaces the weights by those in `folder`/*.safetensors, under the hub's tensor names.

        Nothing is unpickled. Call it while no request runs; the caches of the old weights (prefix,
        pictures) are the caller's to reset.

        Returns:
            Number of tensors read.

        Raises:
            FileNotFoundError: there is no such file.
        """
        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{folder} holds no .safetensors file that this worker can see")
        names: list[str] = []
        self.model_runner.reload_weights(weights_iterator=_read(files, names))
        _tie_head(self.model_runner.get_model(), self.model_config)
        return len(names)


def _read(files: list[Path], names: list[str]) -> Iterator[tuple[str, Any]]:
    """Tensors of all files one by one; `names` collects what was read."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                names.append(name)
                yield name, tensors.get_tensor(name)


def _tie_head(model: Any, model_config: Any) -> None:
    """Points a tied head at the new embedding.

    vLLM 0.32 on the CPU packs the head's weight for its matrix product. A tied head has no tensor
    in the checkpoint, so a reload leaves the packed copy of the *old* embedding behind and says so
    in no more than a line of its log.
    """
    configs = (model_config.hf_config, model_config.hf_text_config)
    language = getattr(model, "language_model", model)
    head = getattr(language, "lm_head", None)
    is_tied = any(getattr(config, "tie_word_embeddings", False) for config in configs)
    if head is None or not is_tied:
        return
    head.weight = language.model.embed_tokens.weight
    if hasattr(head, "cpu_linear"):
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        dispatch_cpu_unquantized_gemm(head, remove_weight=False)
