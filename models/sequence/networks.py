"""The compared networks by name: building, saving, loading, and matching their sizes.

The paper compares networks of very similar numbers of parameters (section 4.2.3), so
:func:`matched_config` chooses a width for a given number, everything else as given.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from hiertcn.errors import InputError
from hiertcn.files import read_json, write_json
from hiertcn.training.checkpoints import CONFIG_FILE, WEIGHTS_FILE, load_weights, save_weights
from models.sequence.config import NetworkConfig
from models.sequence.gru import GRU, GRUConfig
from models.sequence.hierarchical import HRNN, HierGRU, HierGRUConfig, HRNNConfig
from models.sequence.sasrec import SASRec, SASRecConfig
from models.sequence.tcn import FlatTCN, FlatTCNConfig

_NETWORKS: Final[dict[type[NetworkConfig], Any]] = {
    GRUConfig: GRU,
    FlatTCNConfig: FlatTCN,
    HierGRUConfig: HierGRU,
    HRNNConfig: HRNN,
    SASRecConfig: SASRec,
}
_CONFIGS: Final = {config.network: config for config in _NETWORKS}
_WIDEST: Final = 4096


def build_network(config: NetworkConfig) -> nn.Module:
    """Return the network with fresh weights; seed torch to repeat them."""
    network: nn.Module = _NETWORKS[type(config)](config)
    return network


def network_config(values: Mapping[str, Any]) -> NetworkConfig:
    """Rebuild any network's configuration from its ``to_dict``.

    Raises:
        InputError: the network or a field is unknown.
    """
    name = values.get("network")
    if name not in _CONFIGS:
        raise InputError(f"the network is {name!r}; expected one of {', '.join(_CONFIGS)}")
    return _CONFIGS[name].from_dict(values)


def save_network(network: nn.Module, directory: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` into ``directory`` (created if absent)."""
    config: Any = network.config
    write_json(directory / CONFIG_FILE, config.to_dict())
    save_weights(network, directory / WEIGHTS_FILE)


def load_network(directory: Path) -> nn.Module:
    """Rebuild what :func:`save_network` or training wrote, in evaluation mode.

    Raises:
        InputError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    network = build_network(network_config(read_json(directory / CONFIG_FILE)))
    load_weights(network, directory / WEIGHTS_FILE)
    return network.eval()


def count_parameters(config: NetworkConfig) -> int:
    """Return how many weights the network has; none are made."""
    with torch.device("meta"):
        return sum(weights.numel() for weights in build_network(config).parameters())


def matched_config(config: NetworkConfig, parameters: int) -> NetworkConfig:
    """Return the configuration with the width that comes closest to ``parameters``.

    The width is ``filters`` of a TCN and ``hidden`` of the others, a multiple of SASRec's heads.

    Raises:
        InputError: no width comes within 5%, as the comparison demands.
    """
    name = "filters" if isinstance(config, FlatTCNConfig) else "hidden"
    step = config.heads if isinstance(config, SASRecConfig) else 1

    def of_width(width: int) -> NetworkConfig:
        changes: dict[str, Any] = {name: width * step}
        return replace(config, **changes)

    low, high = 1, _WIDEST
    while low < high:
        middle = (low + high) // 2
        if count_parameters(of_width(middle)) < parameters:
            low = middle + 1
        else:
            high = middle
    near = [of_width(width) for width in (low - 1, low) if width > 0]
    best = min(near, key=lambda one: abs(count_parameters(one) - parameters))
    if abs(count_parameters(best) - parameters) > 0.05 * parameters:
        raise InputError(
            f"no {name} gives a {config.network} of {parameters} parameters within 5%; expected "
            f"at least {count_parameters(of_width(1))}"
        )
    return best
