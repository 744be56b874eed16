"""Which linear layers an adapter is trained on."""

from __future__ import annotations

import re
from collections.abc import Sequence

from engine.errors import RequestError
from engine.model_config import ModelSpec

ALL_LINEAR = ("all-linear", "all")


def target_paths(spec: ModelSpec, target_modules: Sequence[str]) -> tuple[str, ...]:
    """Module paths of the layers to adapt, in the model's order.

    Args:
        spec: the base.
        target_modules: the last parts of a path ("q_proj", "mlp.up_proj") or regular expressions
            for whole paths; none, or "all-linear", means every linear layer but the head.

    Raises:
        RequestError: one matches no layer, or is no regular expression, or names the head or the
            embedding, which stay as they are.
    """
    paths = [path for path in spec.linear_shapes() if path != "lm_head"]
    if not target_modules or any(name in ALL_LINEAR for name in target_modules):
        return tuple(paths)
    wanted: set[str] = set()
    for name in target_modules:
        found = {path for path in paths if _matches(name, path)}
        if not found:
            raise _nothing_found(spec, name)
        wanted |= found
    return tuple(path for path in paths if path in wanted)


def _matches(name: str, path: str) -> bool:
    if path == name or path.endswith(f".{name}"):
        return True
    try:
        return re.fullmatch(name, path) is not None
    except re.error as error:
        raise RequestError(
            f"target_modules: {name!r} is neither a layer's name nor a regular expression "
            f"({error}).",
            param="target_modules",
        ) from error


def _nothing_found(spec: ModelSpec, name: str) -> RequestError:
    layers = ", ".join(sorted(path.rpartition(".")[2] for path in spec.layer_linear_shapes()))
    reason = "matches no linear layer of this base"
    if _matches(name, "lm_head") or _matches(name, "model.embed_tokens"):
        reason = "is the head or the embedding; only layers between them can be trained"
    return RequestError(
        f"target_modules: {name!r} {reason}. Name some of {layers}, or leave it out for all.",
        param="target_modules",
    )
