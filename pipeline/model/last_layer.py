"""The last layer for last tokens only: last-token pooling reads nothing else of its output. Exact, both ways.

Its keys and values need every token; what follows attention (residual, norms, MLP: about 80 % of the layer's
arithmetic) does not. That is 1/40 of the whole model's work at 32 layers, 1/8 at six. Hooks do it, so the layer's code
stays that of transformers: the layer is entered with the last tokens' rows, its first norm is given all rows back, and
of what attention returns only those rows go on.
"""

import logging
from typing import Any

from torch import Tensor, nn

log = logging.getLogger(__name__)

# Families whose layer is norm -> attention -> add -> norm -> MLP -> add, with these names; the tests run each.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")


def keep_last_rows(decoder: Any) -> bool:
    """Let the decoder's last layer go on with the last token of each packed sequence; returns whether it could.

    Calls with `cu_seq_lens_q` (S + 1 edges) then give hidden states [1, S, D] instead of [1, T, D]; calls without it
    are as before.
    """
    if decoder.config.model_type not in FAMILIES:
        log.info("the last layer runs for all tokens: %s is not known to allow less", decoder.config.model_type)
        return False
    layer = decoder.layers[-1]
    # Activation checkpointing would re-run the layer without the hook at its door. It would save nothing here: backward
    # starts with this layer and needs its activations at once.
    layer.gradient_checkpointing = False
    whole: list[Tensor] = []  # between two hooks of one call

    def enter_layer(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if "cu_seq_lens_q" not in kwargs:
            return None
        hidden, *rest = args
        whole[:] = [hidden]  # not append: a call that failed may have left its own
        return (_last_rows(hidden, kwargs), *rest), kwargs

    def enter_first_norm(module: nn.Module, args: Any) -> Any:
        return (whole.pop(),) if whole else None

    def leave_attention(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if "cu_seq_lens_q" not in kwargs:
            return None
        hidden, *rest = output
        return (_last_rows(hidden, kwargs), *rest)

    layer.register_forward_pre_hook(enter_layer, with_kwargs=True)
    layer.input_layernorm.register_forward_pre_hook(enter_first_norm)
    layer.self_attn.register_forward_hook(leave_attention, with_kwargs=True)
    return True


def _last_rows(hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """[1, T, D] -> [1, S, D]."""
    return hidden[:, kwargs["cu_seq_lens_q"][1:].long() - 1]
