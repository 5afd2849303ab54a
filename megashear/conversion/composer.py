"""Pruned models of LLM-Shearing: the ``state_dict`` of its Composer runs, by Hugging Face name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megashear.files.torch_files import load_mapped, tensors_of
from megashear.models import weight_table
from megashear.models.finite import first_not_finite
from megashear.models.formats import NOT_FINITE
from megashear.shape import ModelShape

SUFFIXES = (".pt", ".pth")
"""Ends of the names of such files."""
HEAD_DIM = 128
NORM_EPSILON = 1e-5
ROTARY_BASE = 10000.0
MAX_POSITIONS = 4096
"""What the tensors do not say, as in LLaMA-2. Source: llmshearing/configs/llama2/*.yaml and
llmshearing/models/composer_llama.py of princeton-nlp/LLM-Shearing."""

_BLOCK = "model.transformer.blocks.{layer}."
_NAMES = {
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.output",
    "self_attn.q_proj": "attn.wq",
    "self_attn.k_proj": "attn.wk",
    "self_attn.v_proj": "attn.wv",
    "self_attn.o_proj": "attn.out_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
}
"""Composer name by Hugging Face name. Source: llmshearing/utils/composer_to_hf.py, ibid."""
_MASKS = "model.l0_module."
_TABLES = re.compile(r"model\.transformer\.blocks\.\d+\.attn\.rotary_emb\.inv_freq")
"""Rotary tables, which follow from head width and base and are held to them."""
_PASSED_OVER = (
    "_codecs",
    "collections",
    "composer",
    "datetime",
    "llmshearing",
    "numpy",
    "omegaconf",
    "torchmetrics",
)
"""Packages whose objects a trainer's checkpoint has beside its weights: metrics, times, generators.
None of them is imported."""


class ComposerWeights(Mapping[str, Tensor]):
    """The weights of an LLM-Shearing model by Hugging Face name, each read when it is asked for.

    Takes what its scripts write: the trainer's checkpoint of continued pretraining
    (``latest-rank0.pt``), a pruned model (``pruned-latest-rank0.pt``) and a converted source model
    (``state_dict.pt``). The file is mapped, not loaded. Extents follow from the tensors; what these
    do not say is LLaMA-2's unless given.

    Args:
        path: the file.
        head_dim: width of one head.
        norm_epsilon: added to the mean square in every RMSNorm.
        rotary_base: of the rotary position embedding.
        max_position_embeddings: longest sequence, tokens.

    Raises:
        ValueError: the file cannot be read or wants to run code; it has masks that are not folded
            in yet; names or shapes are not a LLaMA's.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        head_dim: int = HEAD_DIM,
        norm_epsilon: float = NORM_EPSILON,
        rotary_base: float = ROTARY_BASE,
        max_position_embeddings: int = MAX_POSITIONS,
    ) -> None:
        self.path = Path(path)
        where = f"Composer checkpoint {path}"
        found = _state_dict(self.path, where)
        tables = {name: found.pop(name) for name in list(found) if _TABLES.fullmatch(name)}
        _check_pruned(found, self.path)
        _check_tables(tables, head_dim, rotary_base, where)
        self.shape = _shape(
            found,
            where,
            head_dim=head_dim,
            norm_epsilon=norm_epsilon,
            rotary_base=rotary_base,
            max_position_embeddings=max_position_embeddings,
        )
        self._composer_names = {
            name: _composer_name(row.hf_name, layer)
            for name, row, layer in weight_table.weights(self.shape)
        }
        _check_names(found, set(self._composer_names.values()), where)
        self._tensors = found
        shapes = {name: tuple(found[theirs].shape) for name, theirs in self._composer_names.items()}
        weight_table.check_hf(shapes, self.shape, where)

    def __getitem__(self, name: str) -> Tensor:
        theirs = self._composer_names[name]
        found = self._tensors[theirs].clone()
        if (bad := first_not_finite([(theirs, found)])) is not None:
            raise ValueError(f"{self.path}: {bad}; {NOT_FINITE}")
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._composer_names)

    def __len__(self) -> int:
        return len(self._composer_names)

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the number format of every weight."""
        return {n: self._tensors[theirs].dtype for n, theirs in self._composer_names.items()}


def _state_dict(path: Path, where: str) -> dict[str, Tensor]:
    found = load_mapped(path, passed_over=_PASSED_OVER)
    if isinstance(found, Mapping) and "state" in found:
        state = found["state"]
        if not isinstance(state, Mapping) or "model" not in state:
            raise ValueError(f"{where} has no state['model']; is it a trainer's checkpoint?")
        found = state["model"]
    tensors = tensors_of(found, where)
    if "model.transformer.wte.weight" not in tensors:
        raise ValueError(
            f"{where} has no model.transformer.wte.weight, with which a model of LLM-Shearing "
            f"begins; of other models give the Hugging Face directory"
        )
    return tensors


def _check_tables(
    tables: Mapping[str, Tensor], head_dim: int, rotary_base: float, where: str
) -> None:
    """Hold the file's rotary tables to the head width and base it is read with.

    No shape of a weight shows it: the product of heads and their width is the same.
    """
    wanted = 1.0 / rotary_base ** (torch.arange(0, head_dim, 2).float() / head_dim)
    for name, table in tables.items():
        if 2 * len(table) != head_dim:
            raise ValueError(
                f"{where}: {name} has {len(table)} frequencies, which heads of width "
                f"{2 * len(table)} have, and --head-dim is {head_dim}; give --head-dim "
                f"{2 * len(table)}"
            )
        # bfloat16 keeps 8 bits; the first frequency is 1 whatever the base
        if not torch.allclose(table.float(), wanted, rtol=2**-7, atol=0.0):
            base = float(table[-1].double() ** (-head_dim / (head_dim - 2)))
            raise ValueError(
                f"{where}: {name} is not the table of --rotary-base {rotary_base:g}; its last "
                f"frequency is that of a base of about {base:.4g}: give the model's own"
            )


def _check_pruned(found: Mapping[str, Tensor], path: Path) -> None:
    masks = sorted(name for name in found if name.startswith(_MASKS))
    if masks:
        raise ValueError(
            f"Composer checkpoint {path} is of a pruning run that still has its masks "
            f"({masks[0]} and {len(masks) - 1} more): its weights compute nothing useful without. "
            f"Which masks multiply into which weight differs there, and what it keeps depends on "
            f"the config.pt beside it: let LLM-Shearing fold them in (python3 -m llmshearing.utils."
            f"post_pruning_processing prune_and_save_model {path}) and convert the "
            f"pruned-{path.name} that it writes"
        )


def _shape(
    found: Mapping[str, Tensor],
    where: str,
    *,
    head_dim: int,
    norm_epsilon: float,
    rotary_base: float,
    max_position_embeddings: int,
) -> ModelShape:
    layers = {
        int(match[1])
        for name in found
        if (match := re.match(r"model\.transformer\.blocks\.(\d+)\.", name))
    }
    if layers != set(range(len(layers))) or not layers:
        raise ValueError(
            f"{where} has layers {', '.join(map(str, sorted(layers))) or 'none'}, wanted all from "
            f"0 on; a pruned model's are renumbered by LLM-Shearing's prune_and_save_model"
        )
    rows = {}
    for part in ("attn.wq", "attn.wk", "mlp.gate_proj"):
        name = f"{_BLOCK.format(layer=0)}{part}.weight"
        if name not in found or found[name].dim() != 2:
            raise ValueError(f"{where} has no matrix {name}")
        rows[part] = found[name].shape[0]
    for part in ("attn.wq", "attn.wk"):
        if rows[part] % head_dim:
            raise ValueError(
                f"{where}: {_BLOCK.format(layer=0)}{part}.weight has {rows[part]} rows, which is "
                f"no multiple of --head-dim {head_dim}; give the width of one head"
            )
    vocab_size, hidden_size = found["model.transformer.wte.weight"].shape
    return ModelShape(
        num_layers=len(layers),
        hidden_size=hidden_size,
        num_attention_heads=rows["attn.wq"] // head_dim,
        num_query_groups=rows["attn.wk"] // head_dim,
        head_dim=head_dim,
        ffn_hidden_size=rows["mlp.gate_proj"],
        vocab_size=vocab_size,
        norm_epsilon=norm_epsilon,
        rotary_base=rotary_base,
        max_position_embeddings=max_position_embeddings,
    )


def _composer_name(hf_name: str, layer: int | None) -> str:
    stem = hf_name.removesuffix(".weight").removeprefix("model.layers.{layer}.")
    block = "" if layer is None else _BLOCK.format(layer=layer)
    return f"{block}{_NAMES[stem]}.weight"


def _check_names(found: Mapping[str, Tensor], wanted: set[str], where: str) -> None:
    unknown, missing = sorted(found.keys() - wanted), sorted(wanted - found.keys())
    if unknown or missing:
        raise ValueError(
            f"{where} is no LLaMA of {len(wanted)} weights: unknown are "
            f"{', '.join(unknown) or 'none'}; missing are {', '.join(missing) or 'none'}"
        )
