"""Names of the published PDR checkpoints -> names of :class:`pointdiff.pdr.network.DualPath`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

RULES = (
    (r"^module\.", ""),
    (r"^class_emb\.", "label."),
    (r"^fc_t1\.", "time.first."),
    (r"^fc_t2\.", "time.last."),
    (r"^fc_lyaer\.", "head."),
    (r"^(global_pnet|pnet)\.mlp1\.", "whole.first."),
    (r"^(global_pnet|pnet)\.mlp2\.", "whole.last."),
    (r"^SA_modules_condition\.", "partial_down."),
    (r"^SA_modules\.", "noisy_down."),
    (r"^FP_modules_condition\.", "partial_up."),
    (r"^FP_modules\.", "noisy_up."),
    (r"^encoder_feature_map\.", "transfer_down."),
    (r"^decoder_feature_map\.", "transfer_up."),
    (r"\bmlps\.0\.", "mlp."),
    (r"\bmlp1\.", "gather."),
    (r"\bmlp2\.", "mlp."),
    (r"\battention_modules?\.(0\.)?(?=[a-z])", "attention."),
    (r"\bgrouped_feat_conv\.", "key."),
    (r"\bfeat_conv\.", "query."),
    (r"\bweight_conv\.", "score."),
    (r"\bfeat_out_conv\.", "value."),
    (r"\bgroup_norm\.", ""),
    (r"\bres_connect\.", "shortcut."),
    (r"\bfc_second_condition\.", "second_condition."),
    (r"\bfc_condition\.", "condition."),
    (r"\bfc\.", "time."),
    (r"\bfirst_mlp\.", "first."),
    (r"\bsecond_mlp\.", "second."),
    (r"\brest_mlp\.", "rest."),
)


def rename(key: str) -> str:
    """The name of one parameter."""
    for pattern, new in RULES:
        key = re.sub(pattern, new, key)
    return key


def rename_all(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole state dict under its new names."""
    return {rename(key): value for key, value in state.items()}
