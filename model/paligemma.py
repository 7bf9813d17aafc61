"""PaliGemma 1 and 2: SigLIP, a linear projector and Gemma, with the prefix-LM mask in training and generation."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pg_kernels import int8_linear, int8_topk, linear_cross_entropy
from pg_kernels.nn import LayerNorm, RMSNorm, is_plain_int8_linear, is_plain_linear
from pg_kernels.ops._common.checks import values_are_free

from .adapters import Adaptable, AdapterParent
from .cache import AttentionLengths, KVCache
from .checkpoints.hub import local_path
from .checkpoints.loading import load
from .checkpoints.saving import save_big_vision, save_huggingface
from .config import PaliGemmaConfig
from .decoding import GenerationOutput
from .gemma import GemmaModel
from .generation import GraphCachingModel, generate
from .graphs import GraphCache, GraphedDecodingSession
from .siglip import SiglipVisionTower, resample_position_embedding

# Arguments of transformers' forward that its callers, such as PEFT, pass as None or False.
_UNSUPPORTED_ARGUMENTS = ("inputs_embeds", "output_attentions", "output_hidden_states", "return_dict")


@dataclass
class PaliGemmaOutput:
    """`logits` fp32 [B, kept, V] and `loss` fp32 scalar; None where not asked for."""

    logits: Tensor | None = None
    loss: Tensor | None = None


torch.export.register_dataclass(PaliGemmaOutput, serialized_type_name="pg_kernels.model.PaliGemmaOutput")


class MultiModalProjector(AdapterParent):
    def __init__(self, config: PaliGemmaConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features)


class PaliGemmaModel(AdapterParent):
    """The network without its output head."""

    def __init__(self, config: PaliGemmaConfig) -> None:
        super().__init__()
        self.vision_tower = SiglipVisionTower(config.vision_config)
        self.multi_modal_projector = MultiModalProjector(config)
        self.language_model = GemmaModel(config.text_config)


class PaliGemma(Adaptable, GraphCachingModel):
    """The whole model; parameter names are those of transformers' PaliGemmaForConditionalGeneration.

    It compiles with `fullgraph=True` and exports with `torch.export.export`; in floats batch and length may be dynamic.

    Source: Beyer et al., https://arxiv.org/abs/2407.07726; Steiner et al., https://arxiv.org/abs/2412.03555; big_vision.
    """

    if TYPE_CHECKING:
        # nn.Module's __getattr__ makes type checkers accept every name as an attribute.
        __getattr__: None  # type: ignore[assignment, misc]

    def __init__(self, config: PaliGemmaConfig) -> None:
        super().__init__()
        self.config = replace(config)  # a copy: PEFT writes to it when head and embedding are no longer tied
        self.generation_defaults: dict[str, Any] = {}
        """The content of the checkpoint's generation_config.json, which `save_pretrained` writes back."""
        self.graph_cache: GraphCache[GraphedDecodingSession] = GraphCache()
        self.model = PaliGemmaModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.language_model.embed_tokens.weight
        if not self.lm_head.weight.is_meta:
            self._initialize()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        image_size: int | None = None,
        quantize: str | None = None,
        config: PaliGemmaConfig | None = None,
        progress: bool = True,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> PaliGemma:
        """Load a Hugging Face folder (safetensors), a repository of the hub, or a big_vision `.npz` file, in evaluation mode.

        Tensors are read one at a time into their dtype and device, or into int8: peak memory is the model and little more, and no
        tensor stays tied to the file. If all names begin with one prefix, such as `_orig_mod.`, they are read without it, and
        tensors beside them, which belong to another model, are left out; a warning says so.

        Args:
            path: the folder or file, or the repository's name, such as "google/paligemma2-3b-mix-224".
            dtype: of the parameters; default: the checkpoint's (config.json's, else the widest of its tensors; float64 becomes
                float32).
            device: default: the CPU.
            image_size: side of the square images in pixels; a size other than the checkpoint's resamples its position embedding.
            quantize: "int8" loads linear layers and embedding as int8 (W8A16); "int8-dynamic" also rounds activations to int8, by
                token (W8A8). For a checkpoint that is int8 already it only says whether activations are rounded.
            config: replaces the folder's config.json, or what is inferred from the .npz file; the tensors must fit it.
            progress: show a bar on stderr, if it is a terminal, once loading has taken a second.
            revision, token, cache_dir, local_files_only: of a repository, see `pg_kernels.model.checkpoints.hub.local_path`.

        Raises:
            FileNotFoundError: the path, repository, config.json or a shard does not exist.
            PermissionError: the repository is gated.
            ValueError: naming file and tensor: unreadable files, other architectures, missing, unexpected or wrongly shaped
                tensors; an unknown `quantize`.
            TypeError: a dtype that is not float32, float16 or bfloat16.
        """
        path = local_path(
            path,
            weights=True,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        model = load(cls, path, dtype=dtype, device=device, config=config, quantize=quantize, progress=progress)
        if image_size is not None:
            model.set_image_size(image_size)
        return model.eval()

    def save_pretrained(self, folder: str | Path, *, max_shard_bytes: float = 5e9) -> None:
        """Write a Hugging Face folder: config.json, generation_config.json and safetensors of at most `max_shard_bytes` each.

        transformers loads a float model's folder, too. int8 layers are written as int8 with their scales, for this package only.
        The output head is written unless it is the embedding, and config.json says which. Other files of an existing folder are
        kept, and no file is ever half-written.

        Raises OSError naming `folder` if it cannot be written; ValueError if the model does not hold exactly PaliGemma's
        parameters, in floats or int8 (wrapped layers).
        """
        save_huggingface(self, folder, PaliGemma, max_shard_bytes=max_shard_bytes)

    def save_big_vision(self, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a big_vision .npz file, by default in the embedding's dtype; bfloat16 as two-byte void, like released files.

        Raises OSError naming `path` if it cannot be written; ValueError for an output head whose values are not the embedding's,
        which the format cannot hold, and for a model that does not hold exactly PaliGemma's floating-point parameters.
        """
        save_big_vision(self, path, PaliGemma, dtype=dtype)

    def set_image_size(self, image_size: int) -> None:
        """Change the side of the square images, in pixels, by resampling the position embedding."""
        self.config = self.config.with_image_size(image_size)
        table = self.model.vision_tower.embeddings.position_embedding
        tokens = self.config.vision_config.num_image_tokens
        table.weight = nn.Parameter(resample_position_embedding(table.weight, tokens), table.weight.requires_grad)
        table.num_embeddings = tokens

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Encode and project images: [n, 3, H, W] or [B, n, 3, H, W] in [−1, 1] to [images, N, D].

        Raises ValueError for an image size other than the configuration's.
        """
        size = self.config.vision_config.image_size
        if pixel_values.dim() == 5:
            pixel_values = pixel_values.flatten(0, 1)
        if pixel_values.dim() != 4 or pixel_values.shape[1:] != (3, size, size):
            raise ValueError(f"pixel_values: expected shape [n, 3, {size}, {size}], got {list(pixel_values.shape)}")
        return self.model.multi_modal_projector(self.model.vision_tower(pixel_values))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        image_features: Tensor | None = None,
        logits_to_keep: int | None = None,
        loss_reduction: str = "token",
        label_smoothing: float = 0.0,
        **others: Any,
    ) -> PaliGemmaOutput:
        """Score a batch of prompts with their suffixes; the prefix is bidirectional, the suffix causal.

        Args:
            input_ids: [B, S] int64, with image_token_id wherever a projected image token goes.
            pixel_values: [n, 3, H, W] in [−1, 1], the batch's images in order; or `image_features`
                [n, N, D] as `get_image_features` gives them.
            attention_mask: [B, S], 0 for padding, on either side of the tokens but not between them; default: no padding.
            token_type_ids: [B, S], 0 for the prefix and 1 for the suffix after it; default: all prefix.
            labels: [B, S] int64, −100 for no loss. They are shifted here, as in transformers.
            logits_to_keep: how many last positions get logits, 0 for all; default: all without labels, none with labels.
            loss_reduction: "token" averages over all labels (transformers), "example" within each example first (big_vision).
            label_smoothing: as in torch.nn.functional.cross_entropy.
            others: other arguments of transformers' models, which PEFT passes; they must be None or False.

        Raises:
            TypeError: other arguments.
            ValueError: shapes that do not fit, images and placeholders of different number, masks with holes.
        """
        for name, value in others.items():
            if name not in _UNSUPPORTED_ARGUMENTS or not (value is None or value is False or name == "return_dict"):
                raise TypeError(f"{name}: PaliGemma takes no such argument")
        if loss_reduction not in ("token", "example"):
            raise ValueError(f"loss_reduction: got {loss_reduction!r}, expected 'token' or 'example'")
        if labels is not None and token_type_ids is None:
            raise ValueError("token_type_ids: needed with labels, to tell the prefix from the suffix")
        embeddings = self.embed(input_ids, pixel_values, image_features)
        lengths, positions = self.attention_lengths(input_ids, attention_mask, token_type_ids)
        hidden = self.model.language_model(embeddings, positions, lengths)
        output = PaliGemmaOutput()
        if logits_to_keep is not None or labels is None:
            output.logits = self.logits(hidden[:, -(logits_to_keep or 0) :])
        if labels is not None:
            output.loss = self._loss(hidden, labels, loss_reduction, label_smoothing)
        return output

    @overload
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        return_scores: Literal[True],
        **options: Any,
    ) -> GenerationOutput: ...

    @overload
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **options: Any,
    ) -> Tensor: ...

    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **options: Any,
    ) -> Tensor | GenerationOutput:
        """Continue prompts and return the new tokens; see `pg_kernels.model.generation.generate` for all options."""
        return generate(self, input_ids, pixel_values, attention_mask, token_type_ids, **options)

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None, image_features: Tensor | None) -> Tensor:
        """Embed tokens [B, S] to [B, S, D], image features in the places of their placeholders."""
        if input_ids.dim() != 2 or not input_ids.numel():
            raise ValueError(f"input_ids: expected shape [B, S] with at least one token, got {list(input_ids.shape)}")
        limit = self.config.text_config.max_position_embeddings
        if input_ids.shape[1] > limit:
            raise ValueError(f"input_ids: {input_ids.shape[1]} tokens are more than the model's {limit} positions")
        if pixel_values is not None and image_features is not None:
            raise ValueError("pixel_values and image_features: give one of them")
        if pixel_values is not None:
            image_features = self.get_image_features(pixel_values)
        placeholders = input_ids == self.config.image_token_id
        self._check_ids(input_ids, placeholders, image_features)
        # The placeholder's id may be outside the embedding.
        embeddings = self.model.language_model.embed(input_ids.masked_fill(placeholders, self.config.pad_token_id))
        if image_features is None:
            return embeddings
        return embeddings.masked_scatter(placeholders[..., None], image_features.to(embeddings.dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        """Score hidden states [..., D] over the vocabulary: fp32 [..., V], softcapped where the configuration says so."""
        head = self.lm_head
        if is_plain_int8_linear(head):  # its sums are fp32; rounding them would lose precision
            logits = int8_linear(hidden, head.weight, activations=head.activations, out_dtype=torch.float32)
        else:
            logits = head(hidden).float()
        softcap = self.config.text_config.final_logit_softcapping
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def topk_logits(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k largest logits of hidden states [..., D], fp32 [..., k] in descending order, and their ids [..., k]."""
        if is_plain_int8_linear(self.lm_head):
            softcap = self.config.text_config.final_logit_softcapping
            return int8_topk(hidden, self.lm_head.weight, k, softcap=softcap, activations=self.lm_head.activations)
        logits = self.logits(hidden)
        return logits.max(-1, keepdim=True) if k == 1 else logits.topk(k)

    def attention_lengths(
        self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None
    ) -> tuple[AttentionLengths, Tensor]:
        """Turn transformers' masks [B, S] into the attention's lengths and the rotary positions [B, S], counted from 0.

        Raises ValueError for masks of another shape or with holes.
        """
        for name, mask in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if mask is not None and mask.shape != input_ids.shape:
                raise ValueError(f"{name}: expected shape {list(input_ids.shape)} (input_ids'), got {list(mask.shape)}")
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        prefix = valid if token_type_ids is None else valid & (token_type_ids == 0)
        starts = valid.int().argmax(1).int()
        lens = valid.sum(1, dtype=torch.int32)
        prefix_lens = prefix.sum(1, dtype=torch.int32)
        offsets = torch.arange(input_ids.shape[1], device=input_ids.device)[None] - starts[:, None]
        if values_are_free(input_ids):
            if not torch.equal(valid, (offsets >= 0) & (offsets < lens[:, None])):
                raise ValueError("attention_mask: padding may stand before or after the tokens, not between them")
            if not torch.equal(prefix, valid & (offsets < prefix_lens[:, None])):
                raise ValueError("token_type_ids: the prefix (0) must come before the suffix (1)")
        lengths = AttentionLengths(prefix_lens, starts, starts + lens, torch.zeros_like(starts))
        return lengths, offsets.clamp(min=0)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Return an empty key-value cache for `batch` rows of `capacity` tokens, in the model's dtype on its device."""
        return KVCache(self.config.text_config, batch, capacity, dtype=self.dtype, device=self.device)

    def _loss(self, hidden: Tensor, labels: Tensor, reduction: str, label_smoothing: float) -> Tensor:
        hidden, targets = hidden[:, :-1], labels[:, 1:]
        head: Any = self.lm_head
        int8 = is_plain_int8_linear(head)
        if int8 or is_plain_linear(head):
            losses = linear_cross_entropy(
                hidden,
                head.weight.dequantize(hidden.dtype) if int8 else head.weight,
                targets,
                softcap=self.config.text_config.final_logit_softcapping,
                label_smoothing=label_smoothing,
                reduction="none",
            )
        else:  # An adapter's head is more than a product with its `.weight`, and hooks must see it called.
            logits = self.logits(hidden).transpose(1, 2)
            losses = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
        counts = (targets != -100).sum(1)
        if reduction == "token":
            return losses.sum() / counts.sum().clamp(min=1)
        return (losses.sum(1) / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)

    def _check_ids(self, input_ids: Tensor, placeholders: Tensor, image_features: Tensor | None) -> None:
        features = 0 if image_features is None else image_features.shape[0] * image_features.shape[1]
        if not values_are_free(input_ids):
            torch._assert_async(
                placeholders.sum() == features, "input_ids: image placeholders and features differ in number"
            )
            return
        found = int(placeholders.sum())
        if found != features:
            images = 0 if image_features is None else image_features.shape[0]
            raise ValueError(
                f"input_ids: {found} image placeholders (id {self.config.image_token_id}), but {images} image(s) "
                f"give {features} features"
            )
        vocabulary = self.config.text_config.vocab_size
        if bool(((input_ids < 0) | (input_ids >= vocabulary) & ~placeholders).any()):
            raise ValueError(
                f"input_ids: ids must lie in [0, {vocabulary}), got {int(input_ids.min())} to {int(input_ids.max())}"
            )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Untie the head if `state_dict` has a head other than the embedding: one would be loaded over the other."""
        embedding: Any = self.model.language_model.embed_tokens
        if getattr(self.lm_head, "weight", None) is getattr(embedding, "weight", None):
            for leaf in ("weight", "weight_scale"):  # the scale of int8
                head, table = (
                    state_dict.get(f"{prefix}{owner}.{leaf}")
                    for owner in ("lm_head", "model.language_model.embed_tokens")
                )
                if head is None or table is None or head.is_meta or table.is_meta or torch.equal(head, table.to(head)):
                    continue
                self.lm_head.weight = copy.deepcopy(self.lm_head.weight)
                self.config = replace(self.config, tie_word_embeddings=False)
                break
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _initialize(self) -> None:
        """Initialise: variance-preserving matrices, embeddings of unit variance after scaling, identity norms, zero biases."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
            elif isinstance(module, RMSNorm):
                nn.init.constant_(module.weight, 1.0 - module.weight_offset)
            elif isinstance(module, LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
