"""Megatron-LM's arguments say what model it is, or are refused by name."""

import argparse
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megashear.checkpoint import pickles
from megashear.checkpoint.megatron_lm_args import (
    arguments_of_shape,
    common_state,
    flags_beside,
    shape_of_arguments,
)
from megashear.checkpoint.pickles import COMMON_ENTRY, check_index, check_pickles, read_common
from megashear.conversion.megatron_lm import MegatronLmWeights, find_megatron_lm
from megashear.files.torch_files import Unread
from megashear.shape import PRESETS, ModelShape, RopeScaling
from tests.megatron_lm import arguments
from tests.unit.checkpoint.shapes import CUT_GROUPED, GROUPED, MULTI_HEAD

Harmed = Callable[[Callable[[Path], object]], Path]
LLAMA3 = RopeScaling(kind="llama3", factor=32.0)
SHAPES = {
    "multi-head": MULTI_HEAD,
    "cut": CUT_GROUPED,
    "llama2": PRESETS["llama2-1.3b"],
    "one group": ModelShape(**{**GROUPED.to_dict(), "num_query_groups": 1}),
    "llama3": ModelShape(
        **{**GROUPED.to_dict(), "rotary_base": 5e5, "tied_embeddings": True, "rope_scaling": LLAMA3}
    ),
    "linear": ModelShape(
        **{**GROUPED.to_dict(), "rope_scaling": RopeScaling(kind="linear", factor=2.5)}
    ),
    "qwen2": ModelShape(**{**GROUPED.to_dict(), "family": "qwen2", "qkv_bias": True}),
    "qwen3": ModelShape(**{**GROUPED.to_dict(), "family": "qwen3", "qk_norm": True}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_comes_back_from_its_arguments(name: str) -> None:
    shape = SHAPES[name]
    args = arguments_of_shape(shape)
    assert shape_of_arguments(args, "here", vocab_size=args.vocab_size) == shape


def test_every_argument_of_ours_counts_or_is_one_of_these() -> None:
    # said for Megatron-LM's sake: it compares them, or takes them over
    plain = {
        "seq_length",
        "vocab_size",
        "padded_vocab_size",
        "make_vocab_size_divisible_by",
        "add_position_embedding",
        "use_rotary_position_embeddings",
        "apply_query_key_layer_scaling",
        "attention_dropout",
        "hidden_dropout",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "ckpt_format",
        "rope_scaling_factor",  # counts with use_rope_scaling
    }
    args = arguments_of_shape(GROUPED)
    for name, value in vars(args).items():
        changed = argparse.Namespace(**vars(args))
        if isinstance(value, bool):
            setattr(changed, name, not value)
        elif isinstance(value, int | float):
            setattr(changed, name, 2 * value)
        else:
            setattr(changed, name, "other" if isinstance(value, str) else 2)
        try:
            same = shape_of_arguments(changed, "here", vocab_size=GROUPED.vocab_size) == GROUPED
        except ValueError:
            same = False
        assert same == (name in plain), name


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"add_bias_linear": True}, r"argument add_bias_linear is True, wanted False"),
        ({"add_bias_linear": None}, r"argument add_bias_linear is True, wanted False"),
        ({"normalization": "LayerNorm"}, r"normalization is 'LayerNorm', wanted 'RMSNorm'"),
        ({"swiglu": False}, r"swiglu is False, wanted True"),
        ({"position_embedding_type": "learned_absolute"}, r"'learned_absolute', wanted 'rope'"),
        ({"position_embedding_type": "yarn"}, r"is 'yarn', wanted 'rope'"),
        ({"rotary_percent": 0.5}, r"rotary_percent is 0.5, wanted 1.0; it changes what"),
        ({"rotary_interleaved": True}, r"rotary_interleaved is True, wanted False"),
        ({"num_experts": 8}, r"num_experts is 8, wanted absent or None"),
        ({"multi_latent_attention": True}, r"multi_latent_attention is True, wanted False"),
        ({"apply_layernorm_1p": True}, r"apply_layernorm_1p is True, wanted False"),
        ({"window_size": (128, 0)}, r"window_size is \(128, 0\), wanted absent or None"),
        ({"mtp_num_layers": 1}, r"mtp_num_layers is 1, wanted 0"),
        ({"spec": ["mine", "layer"]}, r"spec is \['mine', 'layer'\], wanted absent"),
        ({"softmax_type": "learnable"}, r"softmax_type is 'learnable', wanted 'vanilla'"),
        ({"num_layers": None}, r"argument num_layers is None; it must be a positive integer"),
        ({"hidden_size": "40"}, r"argument hidden_size is '40'; it must be a positive integer"),
        ({"norm_epsilon": 0}, r"argument norm_epsilon is 0; it must be a positive number"),
        ({"qk_layernorm": True, "add_qkv_bias": True}, r"belong to no family that is supported"),
        (
            {"use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 2},
            r"--rotary-seq-len-interpolation-factor 2 together are not supported",
        ),
    ],
)
def test_another_model_is_refused_by_the_arguments_name(
    changes: dict[str, Any], wanted: str
) -> None:
    shape_of_arguments(arguments(), "here", vocab_size=61)
    with pytest.raises(ValueError, match=f"^here: .*{wanted}"):
        shape_of_arguments(arguments(**changes), "here", vocab_size=61)


def test_what_megatron_lm_has_no_argument_for_is_left_out() -> None:
    other = RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=4096)
    shape = ModelShape(**{**GROUPED.to_dict(), "rope_scaling": other})
    with pytest.raises(ValueError, match=r"no argument for rope_scaling.original_max_position_emb"):
        arguments_of_shape(shape)
    assert common_state(shape, 3) == {}
    assert common_state(GROUPED, 3).keys() == {"args", "checkpoint_version", "iteration"}


def test_flags_that_megatron_lm_does_not_take_from_a_checkpoint_are_named() -> None:
    assert flags_beside(GROUPED) == ["--norm-epsilon 1e-05"]
    assert flags_beside(SHAPES["llama3"])[1:] == ["--use-rope-scaling", "--rope-scaling-factor 32"]
    assert "--rotary-seq-len-interpolation-factor 2.5" in flags_beside(SHAPES["linear"])
    assert "--qk-layernorm" in flags_beside(SHAPES["qwen3"])


class Malicious:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def as_megatron_lm(directory: Path, **common: Any) -> None:
    """Make our checkpoint one of Megatron-LM, as far as its directory shows."""
    for ours in ("megashear.json", "checksums.txt"):
        (directory / ours).unlink()
    torch.save({"iteration": 120, **common}, directory / "common.pt")


def without_common_pt(directory: Path, value: Any = None) -> None:
    """Move what common.pt holds to where megatron-core 0.19 puts it; or put ``value`` there."""
    common = torch.load(directory / "common.pt", weights_only=False)
    (directory / "common.pt").unlink()
    stored = io.BytesIO()
    torch.save([common] if value is None else value, stored)
    (directory / "__0_8.distcp").write_bytes(b"before" + stored.getvalue())
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    place = type(next(iter(metadata.storage_data.values())))
    metadata.state_dict_metadata[COMMON_ENTRY] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(COMMON_ENTRY)] = place(
        "__0_8.distcp", 6, len(stored.getvalue())
    )
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def test_a_checkpoint_without_common_pt_is_read_as_one_with_it(harmed: Harmed) -> None:
    checkpoint = harmed(lambda directory: as_megatron_lm(directory, args=arguments(vocab_size=64)))
    directory = checkpoint / "iter_0000120"
    before = MegatronLmWeights(checkpoint)
    wanted = dict(before)
    without_common_pt(directory)
    after = MegatronLmWeights(checkpoint)
    assert (after.shape, after.description) == (before.shape, before.description)
    assert after.description.details == {"megatron_lm_iteration": 120}
    assert list(after) == list(wanted)
    assert all(torch.equal(after[name], weight) for name, weight in wanted.items())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[1]], r"shard_0_1 in \S+__0_8\.distcp holds a list, not a checkpoint's values"),
        ([{"iteration": 3}], r"has no args in its common state, which say what model it is"),
        ([{"args": arguments(vocab_size=65)}], r"--vocab-size is 65, and the checkpoint stores 64"),
    ],
)
def test_another_common_state_entry_is_refused(harmed: Harmed, value: Any, message: str) -> None:
    checkpoint = harmed(lambda directory: as_megatron_lm(directory, args=arguments()))
    without_common_pt(checkpoint / "iter_0000120", value)
    with pytest.raises(ValueError, match=message):
        MegatronLmWeights(checkpoint)


@pytest.mark.parametrize("entry", [False, True], ids=["common.pt", "entry"])
def test_arguments_are_read_and_nothing_else_is_made(harmed: Harmed, entry: bool) -> None:
    args = arguments()
    checkpoint = harmed(lambda directory: as_megatron_lm(directory, args=args))
    directory = checkpoint / "iter_0000120"
    if entry:
        without_common_pt(directory)
    common = read_common(directory, foreign=True, metadata=check_index(directory))
    found = common["args"]
    assert type(found) is argparse.Namespace
    assert isinstance(args.attention_backend, AttnBackend)
    assert isinstance(found.attention_backend, Unread)  # although megatron.core is imported here
    assert found.params_dtype is torch.float32
    assert vars(found).keys() == vars(args).keys()
    with pytest.raises(ValueError, match=r"wants to load (megatron\.core|argparse)\.\S+ when"):
        check_pickles(directory)  # ours have no need of them


@pytest.mark.parametrize("place", ["args", "beside", "entry"])
def test_code_in_common_values_is_refused_and_not_run(
    tmp_path: Path, harmed: Harmed, place: str
) -> None:
    ran = tmp_path / "ran"
    bad = Malicious(ran)
    values = {"args": arguments(data_path=bad)} if place == "args" else {"rng": [bad]}
    values = {"args": arguments()} if place == "entry" else values
    checkpoint = harmed(lambda directory: as_megatron_lm(directory, **values))
    if place == "entry":
        without_common_pt(checkpoint / "iter_0000120", [{"args": arguments(), "rng": bad}])
    with pytest.raises(
        ValueError, match=r"(distcp|common.pt) wants to load posix\.mkdir .*refused"
    ):
        MegatronLmWeights(checkpoint)
    assert not ran.exists()


def test_what_megatron_core_holds_safe_may_lie_beside_the_arguments() -> None:
    from megatron.core.safe_globals import SAFE_GLOBALS

    for known in SAFE_GLOBALS:
        name = f"{known.__module__}.{known.__qualname__}"
        assert name == pickles._ARGUMENTS or name in pickles._BESIDE_ARGUMENTS, name


def test_what_is_no_such_checkpoint(tmp_path: Path, harmed: Harmed) -> None:
    checkpoint = harmed(as_megatron_lm)
    directory = checkpoint / "iter_0000120"
    assert find_megatron_lm(checkpoint) == find_megatron_lm(directory) == directory
    with pytest.raises(
        ValueError, match=r"has no args in its common state, which say what model it is"
    ):
        MegatronLmWeights(checkpoint)
    torch.save({"args": arguments(vocab_size=65)}, directory / "common.pt")
    with pytest.raises(ValueError, match=r"--vocab-size is 65, and the checkpoint stores 64 rows"):
        MegatronLmWeights(checkpoint)
    torch.save({"args": arguments(vocab_size=64, num_layers=5)}, directory / "common.pt")
    with pytest.raises(ValueError, match=r"has shape \[4, .*its shape in this model is \[5"):
        MegatronLmWeights(checkpoint)
    torch.save([1], directory / "common.pt")
    with pytest.raises(ValueError, match=r"common.pt holds a list, not a checkpoint's values"):
        MegatronLmWeights(checkpoint)
    (directory / "common.pt").unlink()
    with pytest.raises(
        ValueError, match=r"is incomplete: neither a common\.pt nor, as from .* an "
    ):
        MegatronLmWeights(checkpoint)
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("release")
    directory.rename(checkpoint / "release")
    assert find_megatron_lm(checkpoint) == checkpoint / "release"
    (checkpoint / "release" / "mp_rank_00").mkdir()
    with pytest.raises(ValueError, match=r"for one layout only .*save it with --ckpt-format torch"):
        find_megatron_lm(checkpoint)
    assert find_megatron_lm(tmp_path / "nothing") is None


def test_our_own_checkpoint_without_its_description_is_not_taken_for_one(harmed: Harmed) -> None:
    checkpoint = harmed(lambda directory: (directory / "megashear.json").unlink())
    assert find_megatron_lm(checkpoint) is None


def test_our_own_checkpoint_is_not_taken_for_one(
    checkpoints: dict[str, tuple[Path, ModelShape, dict[str, torch.Tensor]]],
) -> None:
    assert find_megatron_lm(checkpoints["grouped"][0]) is None
    with pytest.raises(ValueError, match="is no Megatron-LM checkpoint in the torch_dist format"):
        MegatronLmWeights(checkpoints["grouped"][0])
