"""What an exported folder needs so that Hugging Face transformers opens it; transformers itself is not needed here.

The image side opens as timm's models do there (``TimmWrapperModel``), without any code.  The whole model is
:class:`mmssl.pretrained.huggingface.MmsslModel`, which ``AutoModel`` finds through ``auto_map`` in config.json.
"""

from typing import Any

from mmssl.data.tokenizer import TextTokenizer

TOKENIZER_CONFIG_FILE, CODE_FILE = "tokenizer_config.json", "modeling_mmssl.py"
AUTO_MAP = {"AutoModel": "modeling_mmssl.MmsslModel"}
CODE = '''"""AutoModel.from_pretrained(..., trust_remote_code=True) comes here; the code is in the package mmssl."""

try:
    from mmssl.pretrained.huggingface import MmsslModel
except ImportError as error:
    raise ImportError(
        f"the whole model needs the package mmssl ({error}); install it, or leave trust_remote_code out, and the image "
        "side alone opens"
    ) from error

__all__ = ["MmsslModel"]
'''


def tokenizer_config(tokenizer: TextTokenizer, max_tokens: int) -> dict[str, Any]:
    """tokenizer_config.json: with it AutoTokenizer gives the ids of ``tokenizer``; truncation is to ``max_tokens``."""
    ids = {
        "pad_token": tokenizer.pad_id,
        "unk_token": tokenizer.unk_id,
        "cls_token": tokenizer.cls_id,
        "sep_token": tokenizer.sep_id,
        "mask_token": tokenizer.mask_id,
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_tokens,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "right",
        "truncation_side": "right",
        "split_special_tokens": True,  # "[MASK]" inside a text is text
        "clean_up_tokenization_spaces": False,
        **{name: tokenizer.token(id) for name, id in ids.items()},
    }
