"""transformers' tokenizer of a model folder, without what it would import for the model itself.

Given nothing but a folder, AutoTokenizer imports the class of the model's configuration, and with
it PyTorch's compiler, Triton and SymPy: 160 MB, and more than a second of each start. It looks at
that class only where the folder does not say which tokenizer it has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from engine.json_fields import read_json_object

CONFIG_KEYS = ("model_type", "model_name", "tokenizer_class", "_name_or_path")
"""What AutoTokenizer reads of a configuration."""


def load_auto_tokenizer(folder: Path) -> Any:
    """The tokenizer that AutoTokenizer finds in a folder; nothing is fetched, no code of it is run.

    Raises:
        Exception: whatever transformers and tokenizers raise for a folder that they cannot read.
    """
    from transformers import AutoTokenizer  # slow to import

    return AutoTokenizer.from_pretrained(
        str(folder), config=_general_config(folder), trust_remote_code=False, local_files_only=True
    )


def _general_config(folder: Path) -> Any | None:
    """config.json as that of no model in particular; None where AutoTokenizer must see whose it is,
    or what is wrong.
    """
    from transformers import PreTrainedConfig

    try:
        config = read_json_object(folder / "config.json")
        tokenizer_config = read_json_object(folder / "tokenizer_config.json")
    except CheckpointError:
        return None
    names = (config.get("model_type"), tokenizer_config.get("tokenizer_class"))
    if "auto_map" in tokenizer_config or not all(isinstance(name, str) and name for name in names):
        return None
    known = {key: config[key] for key in CONFIG_KEYS if key in config}
    return PreTrainedConfig.from_dict(known, name_or_path=str(folder))
