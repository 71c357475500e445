"""GGUF: a model's folder as the one file that llama.cpp, and what is built on it, reads.

Reads a folder in Hugging Face's format as mlx-lm writes it (safetensors, also quantized by mlx);
writes a `.gguf` with weights, tokenizer, chat template and stop tokens. Which
tensors are permuted follows llama.cpp's converter (conversion/); names of tensors come from the
`gguf` package, which is llama.cpp's.

Limits of llama.cpp are in model/gguf_tokenizer.py.
"""

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from athanor import files
from athanor.chat.load import load_tokenizer
from athanor.chat.rendering import Rendering
from athanor.errors import UserError
from athanor.model.folder import read_config, stated_stop_ids
from athanor.model.gguf_architecture import (
    ARCHITECTURES,
    architecture_fields,
    head_dimension,
    model_arguments,
    rope_scaling,
)
from athanor.model.gguf_tokenizer import tokenizer_fields
from athanor.model.stored import read_unpacked

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter
    from mlx_lm.tokenizer_utils import TokenizerWrapper


# The dtypes of matrices, with llama.cpp's number for such a file; vectors are always float32.
DTYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}


def write_gguf(model: Path, out: Path, dtype: str, rendering: Rendering | None = None) -> None:
    """Write a model's folder as `out`, whole or not at all, one tensor in memory at a time.

    Matrices are stored as `dtype`: f32, f16, bf16 or q8_0 (8 bits, a scale for each 32 weights;
    a matrix whose rows are no multiple of 32 is stored as f16). Norms and biases are f32. Weights
    that mlx quantized are dequantized first. general.name is the file's name.

    Raises:
        UserError: where llama.cpp can't run this architecture or tokenizer, or has no name for a
            tensor.
        OSError: with errno.ENOSPC also where numpy could not write.
    """
    import mlx.core as mx
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGUFWriter

    config = read_config(model)
    tokenizer = load_tokenizer(model, rendering)
    try:
        fields = architecture_fields(config)
        fields |= tokenizer_fields(tokenizer, config, _read_stops(model, tokenizer))
    except UserError as error:
        raise UserError("fuse.gguf_unsupported", model=model, error=error) from error
    fields |= {"general.name": out.stem, "general.file_type": DTYPES[dtype]}
    fields["general.quantization_version"] = GGML_QUANT_VERSION

    tensors = dict(_tensors(model, config))
    kinds = {name: _stored_type(tensor, dtype) for name, tensor in tensors.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
    os.close(handle)
    writer = GGUFWriter(temporary, ARCHITECTURES[config["model_type"]])
    try:
        for key, value in fields.items():
            _add_field(writer, key, value)
        for name, tensor in tensors.items():
            block, size = GGML_QUANT_SIZES[kinds[name]]
            # The writer asks for a numpy dtype as well; it counts only where it is uint8.
            writer.add_tensor_info(
                name, tensor.shape, np.dtype(np.float32), tensor.size // block * size, kinds[name]
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in list(tensors):
            writer.write_tensor_data(_encode(tensors.pop(name), kinds[name], name))
            mx.clear_cache()  # or it keeps as many bytes as the largest tensors had
        writer.close()
        Path(temporary).chmod(0o644)
        files.take(Path(temporary), out)
    except BaseException as error:
        writer.close()
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is None:
            # On a full disk numpy reports no errno, only how much it could not write.
            raise OSError(errno.ENOSPC, str(error), str(out)) from error
        raise


def _read_stops(model: Path, tokenizer: "TokenizerWrapper") -> list[int]:
    """Return the stop tokens of generation_config.json, else those of the loaded tokenizer."""
    path = model / "generation_config.json"
    stated = stated_stop_ids(files.read_json(path)) if path.exists() else []
    return stated or sorted(tokenizer.eos_token_ids)


def _add_field(writer: "GGUFWriter", key: str, value: Any) -> None:
    """Add a key with the type that llama.cpp asks for: whole numbers are 32 bits, unsigned."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _tensors(model: Path, config: dict[str, Any]) -> "Iterator[tuple[str, mx.array]]":
    """Yield the weights under llama.cpp's names, as it expects them; nothing is computed yet."""
    import mlx.core as mx
    from gguf import MODEL_ARCH, get_tensor_name_map

    args = model_arguments(config)
    arch = ARCHITECTURES[config["model_type"]]
    heads = {"q_proj": args.num_attention_heads, "k_proj": args.num_key_value_heads}
    names = get_tensor_name_map(MODEL_ARCH[arch.upper()], args.num_hidden_layers)
    tied = getattr(args, "tie_word_embeddings", arch in ("gemma", "gemma2"))
    for name, tensor in read_unpacked(model, config):
        if name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
            continue
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise UserError("fuse.gguf_unknown_tensor", model=model, architecture=arch, name=name)
        part = name.split(".")[-2]
        if arch == "llama" and part in heads:
            tensor = _interleave(tensor, heads[part])
        if arch.startswith("gemma") and part.endswith("norm"):
            tensor = tensor.astype(mx.float32) + 1  # llama.cpp multiplies by the weight alone
        yield new, tensor
    if rope_scaling(args)[0] == "llama3":
        yield "rope_freqs.weight", _rope_factors(args)


def _interleave(tensor: "mx.array", heads: int) -> "mx.array":
    """Reorder the rows of a query or key map: neighbours rotate together here, not halves."""
    rows, *rest = tensor.shape
    return tensor.reshape(heads, 2, rows // heads // 2, *rest).swapaxes(1, 2).reshape(rows, *rest)


def _rope_factors(args: Any) -> "mx.array":
    """Return the factor by which Llama 3.1 slows each pair's rotation, [head_dim / 2]."""
    import mlx.core as mx
    from mlx_lm.models.rope_utils import initialize_rope

    dims = head_dimension(args)
    rope = initialize_rope(dims, args.rope_theta, False, args.rope_scaling)
    return rope._freqs / args.rope_theta ** (mx.arange(0, dims, 2) / dims)


def _stored_type(tensor: "mx.array", dtype: str) -> "GGMLQuantizationType":
    """Return the type in which llama.cpp expects a tensor to be stored."""
    from gguf import GGMLQuantizationType

    if tensor.ndim == 1:
        return GGMLQuantizationType.F32
    if dtype == "q8_0" and tensor.shape[-1] % 32:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType[dtype.upper()]


def _encode(tensor: "mx.array", kind: "GGMLQuantizationType", name: str) -> "np.ndarray[Any, Any]":
    """Return a tensor's bytes in the file, read and computed now."""
    import mlx.core as mx
    import numpy as np
    from gguf import GGMLQuantizationType, quantize

    if kind == GGMLQuantizationType.BF16:
        return np.asarray(tensor.astype(mx.bfloat16).view(mx.uint16))
    if kind == GGMLQuantizationType.F16:
        half = np.asarray(tensor.astype(mx.float16))
        if not np.isfinite(half).all():
            raise UserError("fuse.gguf_f16_overflow", name=name)
        return half
    return quantize(np.asarray(tensor.astype(mx.float32)), kind)
