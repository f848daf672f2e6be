"""The whole backbone as a model of Hugging Face transformers: pictures, texts and pairs.

Nothing else in mmssl imports transformers, nor this module.  Of an exported folder DIR,
``AutoModel.from_pretrained(DIR, trust_remote_code=True)`` and ``MmsslModel.from_pretrained(DIR)`` are the same.

The config is transformers' own ``TimmWrapperConfig``, for without this class the folder is one of timm's.

Axes: B samples; S side of the pictures; L columns of the texts; K tokens (P + N of a picture, then the L of a text);
D width.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Int, Shaped
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, TimmWrapperConfig
from transformers.utils import ModelOutput

from mmssl.backbone import Backbone
from mmssl.pretrained.model import Pool, Pretrained
from mmssl.pretrained.sources import CONFIG_FILE, IMAGE_FILE, TEXT_FILE, SafeTensors, fetched, two_sides
from mmssl.pretrained.transformers_files import AUTO_MAP, CODE, CODE_FILE
from mmssl.pretrained.whole import check_format
from mmssl.types import Text

_INSIDE = "mmssl.backbone."  # what stands before the names of Backbone here
_OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")


@dataclass
class MmsslOutput(ModelOutput):
    """Features after the final norm, as :class:`mmssl.pretrained.model.Encoded` describes them.

    ``last_hidden_state``: [B, K, D].  ``pooler_output``: [B, D], as ``pool`` says.  ``attention_mask``: [B, K] int64, 0
    where a text is padded; there the token is zero.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    attention_mask: Tensor | None = None


class MmsslModel(PreTrainedModel):
    """``encode_image``, ``encode_text``, ``encode_pair`` of what an export's AutoImageProcessor and AutoTokenizer give.

    Args:
        config: config.json of an export.
        drop_path_rate: stochastic depth while training.

    Raises:
        ValueError: ``config`` is not of an export that this version can build.
    """

    config_class = TimmWrapperConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    accepts_loss_kwargs = False

    def __init__(self, config: TimmWrapperConfig, drop_path_rate: float = 0.0) -> None:
        config = copy.deepcopy(config)
        config.model_type = "mmssl"  # not timm_wrapper, whose tensors transformers renames
        super().__init__(config)
        about = getattr(config, "mmssl", None)
        if not isinstance(about, dict) or not {"backbone", "options", "text"} <= about.keys():
            raise ValueError(
                f"{config.name_or_path or 'the config'} is of no export of mmssl, or of one without what transformers "
                "needs (section 'mmssl' of config.json); export the run again"
            )
        check_format(about.get("format"), str(config.name_or_path or CONFIG_FILE))
        options = {**about["options"], **(about["text"] or {"experts": False}), "drop_path_rate": drop_path_rate}
        self.mmssl = Pretrained(Backbone(about["backbone"], **options), None)
        self.post_init()

    def forward(
        self,
        pixel_values: Shaped[Tensor, "B 3 S S"] | None = None,
        input_ids: Int[Tensor, "_ L"] | None = None,
        attention_mask: Tensor | None = None,
        pool: Pool | None = None,
        return_dict: bool | None = None,
    ) -> MmsslOutput | tuple[Any, ...]:
        """Features of pictures, of texts, or of pairs when both are given.

        Args:
            pixel_values: normalised pixels, as AutoImageProcessor gives them.
            input_ids, attention_mask: texts, padded at their end; without a mask nothing is padding.
            pool: "cls" or "mean", see :class:`mmssl.Pretrained`; None for the class token where there is one.
            return_dict: False for a tuple.

        Raises:
            ValueError: nothing given, pixels as integers, texts longer than the backbone's, padded elsewhere than at
                their end or empty, an unequal number of pictures and texts, or texts for a backbone that knows none.
        """
        if pixel_values is not None and input_ids is not None and len(pixel_values) != len(input_ids):
            raise ValueError(f"{len(pixel_values)} pictures came with {len(input_ids)} texts; give one per picture")
        if pixel_values is not None and not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values are {pixel_values.dtype}; give what AutoImageProcessor makes of pictures")
        text = None if input_ids is None else self._packed(input_ids, attention_mask)
        found = self.mmssl(None if pixel_values is None else pixel_values.to(self.device, self.dtype), text, pool)
        output = MmsslOutput(found.tokens, found.pooled, found.valid.long())
        return output.to_tuple() if return_dict is False else output

    def _packed(self, input_ids: Int[Tensor, "B L"], attention_mask: Tensor | None) -> Text:
        """Texts without their padding, on one axis."""
        backbone, columns = self.mmssl.backbone, input_ids.shape[1]
        if backbone.text is None:
            raise ValueError("this backbone knows no text: it was pretrained on pictures alone")
        if columns > backbone.max_text_tokens:
            raise ValueError(
                f"input_ids has {columns} columns, the backbone {backbone.max_text_tokens} text positions; call the "
                "tokenizer with truncation=True"
            )
        input_ids = input_ids.to(self.device)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(self.device)
        real = real != 0
        lengths = real.sum(1)
        if not torch.equal(real, torch.arange(columns, device=self.device) < lengths[:, None].clamp(min=1)):
            raise ValueError(
                "attention_mask must begin with a 1 in every row and have its zeros behind; pad at the end "
                "(padding_side='right'), and leave out texts without a token"
            )
        return Text(
            input_ids=input_ids[real],
            cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).int(),
            max_seqlen=columns,
            hidden=input_ids.new_empty(0),
            labels=input_ids.new_empty(0),
        )

    # ---- files

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *model_args: Any,
        config: PretrainedConfig | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a folder of ``mmssl export`` or of :meth:`save_pretrained`, or such a repository on the hub.

        Args are transformers' (``dtype``, ``device_map``, ``revision``, ...); safetensors only, nothing is unpickled.

        Raises:
            ValueError: there is no such folder or repository, or its tensors are not those of the model.
            CheckpointError: a file is damaged or cut short.
        """
        if pretrained_model_name_or_path is None:
            options = {**kwargs, "output_loading_info": output_loading_info}
            return super().from_pretrained(None, *model_args, config=config, **options)
        hub = {name: kwargs.pop(name) for name in _OF_THE_HUB if name in kwargs}
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = fetched(str(pretrained_model_name_or_path), **hub)
        config = TimmWrapperConfig.from_pretrained(folder) if config is None else config
        files = {path: _INSIDE + prefix for path, prefix in _files(folder, config).items()}
        kwargs |= {"config": config, "state_dict": dict(SafeTensors(files)), "output_loading_info": True}
        model, info = cast(Any, super()).from_pretrained(None, *model_args, **kwargs)
        if wrong := sorted({*info["missing_keys"], *info["unexpected_keys"]}):
            raise ValueError(
                f"{folder}: {len(wrong)} tensors are missing or have no place in the model "
                f"({', '.join(wrong[:3])}, ...): another model wrote it"
            )
        model.config.name_or_path = model.name_or_path = str(pretrained_model_name_or_path)
        return (model, info) if output_loading_info else model

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write an export: plain timm, ``mmssl.load_backbone`` and transformers open it.

        The tokenizer saves itself (``tokenizer.save_pretrained``), to the same folder.  Further arguments of
        transformers, about sharding and formats, are ignored.

        Raises:
            ValueError: ``push_to_hub``, for which there is ``model.push_to_hub``.
        """
        if push_to_hub:
            raise ValueError("save_pretrained does not push; call model.push_to_hub(...) or mmssl export --push")
        if not is_main_process:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict() if state_dict is None else state_dict
        image, text = two_sides({name.removeprefix(_INSIDE): value for name, value in state.items()})
        save_file(image, folder / IMAGE_FILE, {"format": "pt"})
        if text:
            save_file(text, folder / TEXT_FILE, {"format": "pt"})
        config = copy.deepcopy(self.config)
        config.dtype = self.dtype
        config.auto_map = AUTO_MAP
        config.mmssl = {**config.mmssl, "tokenizer_sha256": None}  # transformers writes tokenizer.json in its own way
        config.save_pretrained(folder)
        (folder / CODE_FILE).write_text(CODE, encoding="utf-8")

    # ---- what transformers asks a model for

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of text tokens."""
        embedding: nn.Module = self.mmssl.backbone.token_embedding
        return embedding

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        self.mmssl.backbone.grad_checkpointing = enable

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Parameters come from files, or began in the constructors; buffers that no file holds are made here."""
        if isinstance(module, Pretrained):
            module.begin_buffers()
        elif hasattr(module, "init_non_persistent_buffers"):  # timm's way, for rotary positions
            cast(Any, module).init_non_persistent_buffers()


def _files(folder: Path, config: PretrainedConfig) -> dict[Path, str]:
    """The files of weights, and what stands before their names in those of Backbone."""
    files = {folder / IMAGE_FILE: "vit."}
    if (getattr(config, "mmssl", None) or {}).get("text"):
        files[folder / TEXT_FILE] = ""
    return files
