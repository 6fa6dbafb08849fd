"""The layout of the embedded weights' file: OpenAI's names, fp16, and only the token rows in use.

| tensor                  | dtype | shape   |                                                    |
|-------------------------|-------|---------|----------------------------------------------------|
| `token_embedding.rows`  | fp16  | [K, W]  | rows of `token_embedding.weight`                   |
| `token_embedding.ids`   | int32 | [K]     | their token ids, ascending; all other rows are zero |
| every other name        | fp16  | OpenAI's|                                                    |

The file's metadata holds `format` (FORMAT), `vocab_size`, and facts of the training as strings.
"""
from typing import Mapping

import torch

FORMAT = "clip_ttrt-demo-1"


def pack(state_dict: Mapping[str, torch.Tensor], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of the file from a state dict in OpenAI's naming.

    `state_dict` has `token_embedding.weight` either in full or already cut to the rows of
    `ids`, int [K], ascending.  Everything else that floats becomes fp16, on the CPU.
    Raises ValueError where a value is not finite in fp16 or the ids do not fit the rows.
    """
    tensors = dict(state_dict)
    rows = tensors.pop("token_embedding.weight")
    if len(rows) != len(ids):
        rows = rows[ids.to(rows.device).long()]
    tensors["token_embedding.rows"] = rows
    tensors = {name: value.detach().to("cpu", torch.float16).contiguous()
               for name, value in tensors.items()}
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(f"these weights are not finite in fp16: {', '.join(broken)}")
    tensors["token_embedding.ids"] = ids.to("cpu", torch.int32).contiguous()
    return tensors


def unpack(tensors: Mapping[str, torch.Tensor], vocab_size: int) -> dict[str, torch.Tensor]:
    """A state dict in OpenAI's naming, fp32, token rows in full, from the tensors of a file."""
    state_dict = {name: value.float() for name, value in tensors.items()
                  if not name.startswith("token_embedding.")}
    rows = tensors["token_embedding.rows"].float()
    weight = torch.zeros(vocab_size, rows.shape[1])
    weight[tensors["token_embedding.ids"].long()] = rows
    state_dict["token_embedding.weight"] = weight
    return state_dict
