"""Outliers that leave a model's function as it is, such as large transformers have."""
EVERYWHERE = [(block, layer) for block in range(6) for layer in ("qkv", "up")]


def plant(state_dict, alpha, layers, both_ways=False):
    """The embedded model's weights, where the four largest channels between a layer norm and each
    of some layers are alpha times as large in the norm, and as small in the weight.

    both_ways: the next four are as small in the norm and as large in the weight.
    """
    names = {"qkv": ("ln_1", "attn.in_proj_weight"), "up": ("ln_2", "mlp.c_fc.weight")}
    state_dict = {name: value.clone() for name, value in state_dict.items()}
    for block, layer in layers:
        norm, weight = (f"visual.transformer.resblocks.{block}.{part}" for part in names[layer])
        channels = state_dict[f"{norm}.weight"].abs().argsort(descending=True)
        for some, factor in ((channels[:4], alpha), (channels[4:8], 1 / alpha))[:1 + both_ways]:
            state_dict[f"{norm}.weight"][some] *= factor
            state_dict[f"{norm}.bias"][some] *= factor
            state_dict[weight][:, some] /= factor
    return state_dict
